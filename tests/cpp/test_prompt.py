"""Questions become the same ids in C++ as in Python, turn by turn; tokens are drawn and answers are stopped alike."""

import ctypes
import json
import random
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import templates
import test_tokenizer
from probing import ProbeError, array, call, library, pointer, record, result

from vlmtrim.export import prompt_form
from vlmtrim.export.families import gemma3
from vlmtrim.export.weights.tiny import SPECIAL_IDS, write_tokenizer
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.prompt import Conversation, Prompter
from vlmtrim.runtime.sampling import Sampler, Sampling
from vlmtrim.runtime.stopping import Stopper

CONTRACT: Any = SimpleNamespace(image_token_id=SPECIAL_IDS["<image>"], video_token_id=None, max_seq_len=512)
WORDS = ["What", " is ", "this?", "\n", "  ", "Äpfel", "ASSISTANT:", "<image>", "</s>", "<s>", "<pa", "d>", "\x1f", "1"]


class Native:
    def __init__(self, folder, system="", contract=CONTRACT):
        made = library().probe_talk
        made.restype = ctypes.c_void_p
        image, most = ctypes.c_int64(contract.image_token_id), ctypes.c_int64(contract.max_seq_len)
        place = made(str(folder).encode(), image, most, system.encode())
        if not place:
            raise ProbeError(result("error").decode(errors="replace"))
        self._talk = ctypes.c_void_p(place)

    def ask(self, parts, words=()):
        call("probe_ask", self._talk, json.dumps(parts).encode(), json.dumps(words).encode())
        return array("ids", np.int64).tolist()

    def answer(self, text):
        call("probe_answer", self._talk, text.encode())

    def take_back(self):
        call("probe_take_back", self._talk)


@pytest.fixture(params=templates.FORMS)
def folder(request, tmp_path):
    write_tokenizer(tmp_path, SPECIAL_IDS)
    (tmp_path / "chat_template.jinja").write_text(templates.FORMS[request.param])
    assert prompt_form.write_form(tmp_path, CONTRACT) is None
    return tmp_path


def content(parts):
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def asked(talk, parts):
    """Ids, or None where the question is refused."""
    try:
        return talk.ask(parts)
    except (ProbeError, RuntimeRefusal):
        return None


def words(dice):
    text = "".join(dice.choice(WORDS) for _ in range(dice.randint(1, 6)))
    return text if text.strip() else "x" + text


def test_conversations_have_the_ids_of_python(folder):
    prompter, dice = Prompter(Folder(folder), CONTRACT), random.Random(1)
    turns = 0
    for number in range(150):
        system = words(dice) if number % 3 == 2 else ""
        ours, native = Conversation(prompter, system), Native(folder, system)
        for _ in range(4):
            pictures = [None] * dice.choice((0, 0, 1, 2))
            texts = [words(dice) for _ in range(dice.choice((0, 1, 1, 1, 2, 3) if pictures else (1, 1, 2)))]
            parts = pictures + texts
            if dice.random() < 0.3:
                dice.shuffle(parts)
            expected, found = asked(ours, content(parts)), asked(native, parts)
            if expected is None:
                break
            assert found == expected, (parts, folder)
            turns += 1
            if dice.random() < 0.2:
                ours.take_back()
                native.take_back()
            elif dice.random() < 0.9:  # else nobody answers
                said = dice.choice(["Yes", "", " It is. ", words(dice), "\n"])
                ours.answer(said)
                native.answer(said)
    assert turns > 150


@pytest.mark.parametrize("name", templates.HALF_FORMS)
def test_questions_that_are_no_part_of_the_form_are_refused(name, tmp_path):
    write_tokenizer(tmp_path, SPECIAL_IDS)
    (tmp_path / "chat_template.jinja").write_text(templates.HALF_FORMS[name])
    assert prompt_form.write_form(tmp_path, CONTRACT) is None
    native, ours = Native(tmp_path), Conversation(Prompter(Folder(tmp_path), CONTRACT))
    with pytest.raises(ProbeError, match="the chat template writes pictures between words in another way"):
        native.ask(["x", None, "y"])
    if name == "a sign alone":
        with pytest.raises(ProbeError, match="a question that ends with a picture in another way; put words behind"):
            native.ask([None])
    assert native.ask([None, "x"]) == ours.ask("x", 1)


FIRST = (  # Gemma's, as if it wrote pictures before words
    "{{ '<start_of_image>' }}{% endif %}{% endfor %}{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] | trim }}"
)


@pytest.mark.parametrize("first", [False, True])
def test_words_about_pictures_are_cut_among_those_around_them(first, tmp_path):
    """Of Gemma 3, where newlines around a picture become one token with those that the template writes."""
    template, middle = gemma3.CHAT_TEMPLATE, "{{ '<start_of_image>' }}{% else %}{{ content['text'] | trim }}"
    assert middle in template
    tokenizer = test_tokenizer.gemma()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text(template.replace(middle, FIRST) if first else template)
    contract: Any = SimpleNamespace(
        image_token_id=tokenizer.token_to_id("<image_soft_token>"), video_token_id=None, max_seq_len=512
    )
    assert prompt_form.write_form(tmp_path, contract) is None
    assert json.loads((tmp_path / "prompt.json").read_text())["keeps_order"] == (not first)
    prompter, dice, runs = Prompter(Folder(tmp_path), contract), random.Random(2), 0
    told = "\n\n<start_of_image>" + "<image_soft_token>" * 3 + "<end_of_image>\n\n"
    for _ in range(100):
        ours, native = Conversation(prompter), Native(tmp_path, contract=contract)
        for _ in range(3):
            parts = [*[None] * dice.choice((0, 1, 2)), *[words(dice) for _ in range(dice.choice((1, 2)))]]
            if dice.random() < 0.5:
                dice.shuffle(parts)
            given = [told + dice.choice(("", " and ", "</s>")) for part in parts if part is None]
            found = native.ask(parts, given)
            assert found == ours.ask(content(parts), words=given), parts
            assert found.count(contract.image_token_id) == 3 * len(given)
            runs += tokenizer.token_to_id("\n\n\n") in found
            said = dice.choice(["Yes.", " \n", words(dice)])
            ours.answer(said)
            native.answer(said)
    assert runs > 20


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(ProbeError, match=r"the conversation has 20000 characters, this bundle takes 16384"):
        Native(folder).ask(["x" * 20000])
    form = json.loads((folder / "prompt.json").read_text())
    (folder / "prompt.json").write_text(json.dumps({**form, "schema": 9}))
    with pytest.raises(ProbeError, match="has schema 9, this vlmtrim reads 1"):
        Native(folder)
    (folder / "prompt.json").write_text(json.dumps({**form, "asked": [7]}))
    with pytest.raises(ProbeError, match="holds 7, which is no control token"):
        Native(folder)
    (folder / "prompt.json").unlink()
    with pytest.raises(ProbeError, match=r"has no prompt\.json.*give token ids"):
        Native(folder)


@pytest.mark.parametrize("text", ["<s>x", "x", "s>x"])
@pytest.mark.parametrize("before", ["", "{{ bos_token }}", "<"])
def test_a_start_token_that_people_spell_is_none(before, text, tmp_path):
    """Where the template writes nothing before what they say."""
    role = "message['role'].upper() + ': '"
    template = templates.LLAVA.replace(role, f"{role} if message['role'] != 'user'")
    write_tokenizer(tmp_path, SPECIAL_IDS)
    (tmp_path / "chat_template.jinja").write_text(before + template)
    assert prompt_form.write_form(tmp_path, CONTRACT) is None
    found = Native(tmp_path).ask([text])
    assert found == Conversation(Prompter(Folder(tmp_path), CONTRACT)).ask(text)
    assert found[0] == SPECIAL_IDS["<s>"] and found.count(SPECIAL_IDS["<s>"]) == 1


def test_a_date_is_todays(tmp_path):
    write_tokenizer(tmp_path, SPECIAL_IDS)
    (tmp_path / "chat_template.jinja").write_text(templates.MLLAMA.replace("%d %b %Y", "%A %d %B %Y, %e %j %m/%y %a"))
    assert prompt_form.write_form(tmp_path, CONTRACT) is None
    before = datetime.now()
    found = Native(tmp_path).ask(["x"])
    expected = Conversation(Prompter(Folder(tmp_path), CONTRACT)).ask("x")
    assert found == expected or datetime.now().date() != before.date()


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_random_numbers_are_numpys(seed):
    call("probe_uniform", ctypes.c_uint64(seed), ctypes.c_size_t(1000))
    np.testing.assert_array_equal(array("values", np.float64), np.random.default_rng(seed).random(1000))


@pytest.mark.parametrize("settings", [(0, 0, 1), (1, 0, 1), (0.7, 5, 1), (1.3, 0, 0.9), (0.01, 50, 0.5), (5, 3, 0.99)])
def test_seeded_tokens_are_pythons(settings):
    temperature, top_k, top_p = settings
    for seed in range(4):
        logits = np.random.default_rng(seed).normal(0, 4, (400, 97)).astype(np.float32).round(1)
        sampler = Sampler(Sampling(temperature, top_k, top_p, seed))
        given = ctypes.c_double(temperature), ctypes.c_int64(top_k), ctypes.c_double(top_p), ctypes.c_uint64(seed)
        call("probe_sample", pointer(logits), ctypes.c_size_t(400), ctypes.c_size_t(97), *given)
        assert array("drawn", np.int64).tolist() == [int(sampler(row[None])[0]) for row in logits]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((-1.0, 0, 1.0), "temperature is -1"),
        ((1.0, -2, 1.0), "top-k is -2"),
        ((1.0, 0, 1.5), "top-p is 1.5"),
        ((float("nan"), 0, 1.0), "temperature is nan"),
    ],
)
def test_settings_that_are_none_are_refused(settings, said):
    logits = np.zeros((1, 3), np.float32)
    given = ctypes.c_double(settings[0]), ctypes.c_int64(settings[1]), ctypes.c_double(settings[2]), ctypes.c_uint64(0)
    with pytest.raises(ProbeError, match=said):
        call("probe_sample", pointer(logits), ctypes.c_size_t(1), ctypes.c_size_t(3), *given)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = np.float32([[0, value]])
    given = ctypes.c_double(0), ctypes.c_int64(0), ctypes.c_double(1), ctypes.c_uint64(0)
    with pytest.raises(ProbeError, match="NaN or infinity in place of logits"):
        call("probe_sample", pointer(logits), ctypes.c_size_t(1), ctypes.c_size_t(2), *given)


def test_answers_are_stopped_as_in_python():
    dice = random.Random(3)
    for _ in range(2000):
        pieces = ["".join(dice.choice("aabé") for _ in range(dice.randint(0, 4))) for _ in range(5)]
        stops = ["".join(dice.choice("abé") for _ in range(dice.randint(1, 3))) for _ in range(dice.randint(0, 2))]
        stopper, expected = Stopper(stops), []
        for number, piece in enumerate(pieces):
            expected.append(list(stopper.take(piece, number == 4)))
        call("probe_stop", json.dumps(pieces).encode(), json.dumps(stops).encode())
        assert record() == expected
