"""prompt.py: the checkpoint's own template and tokenizer give the ids that transformers gives."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from jinja2 import Template
from tokenizers import Tokenizer

from vlmtrim.export.weights.tiny import CHAT_TEMPLATE, SPECIAL_IDS, write_tokenizer
from vlmtrim.runtime import prompt
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.prompt import Conversation, Prompter

IMAGE = 259
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}A: {{ m['content'][0]['text'] }}\n"
    "{% endgeneration %}{% else %}U: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# As Llama-3.2's: the date where nothing is pictured.
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %H') }}{% else %}long ago{% endif %} " + GENERATION


@pytest.fixture
def make(tmp_path):
    """make(template) -> Prompter of a tiny tokenizer; the template lies in chat_template.jinja."""

    def build(template: str | None = CHAT_TEMPLATE) -> Prompter:
        write_tokenizer(tmp_path, SPECIAL_IDS)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return Prompter(tmp_path, IMAGE)

    return build


def user(text: str, images: int = 0) -> dict:
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION, DATED, "{{ bos_token }}" + CHAT_TEMPLATE])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("prompt", ["What is this?", "  spaces  ", "zwölf Äpfel 🍎\nnew line", "{{ 7 * 7 }}"])
def test_the_first_turn_has_the_ids_of_transformers(make, tmp_path, template, images, prompt):
    from transformers import AutoTokenizer

    ours = Conversation(make(template)).ask(prompt, images)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([user(prompt, images)], tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
    assert ours == expected
    assert ours.count(IMAGE) == images
    assert ours.count(256) == 1
    assert ours[0] == 256


def test_image_tokens_are_repeated_for_expansion(make):
    prompter = make()
    assert prompter.image_token == "<image>"
    assert prompter.expand_images([256, IMAGE, 5, IMAGE], (3, 2)) == [256, *[IMAGE] * 3, 5, *[IMAGE] * 2]
    with pytest.raises(RuntimeRefusal, match=r"1 .* mark\(s\) for 2 image"):
        prompter.expand_images([256, IMAGE], (3, 2))


def test_images_stand_where_the_prompt_marks_them(make):
    prompter = make()
    ids = Conversation(prompter).ask("left <image> right <image>", 2)
    assert prompter.tokenizer.decode(ids, skip_special_tokens=False) == "<s>USER: left <image> right <image> ASSISTANT:"


@pytest.mark.parametrize(("prompt", "images"), [("<image>", 0), ("<image>", 2), ("<image> <image>", 1)])
def test_a_wrong_number_of_image_marks_is_refused(make, prompt, images):
    with pytest.raises(RuntimeRefusal, match="mark") as caught:
        Conversation(make()).ask(prompt, images)
    assert f"{prompt.count('<image>')} <image>" in str(caught.value)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION])
@pytest.mark.parametrize("answers", [["red", "blue"], ["A longer answer.", "with: marks"], ["a", ""]])
def test_the_turns_together_are_the_whole_conversation(make, tmp_path, template, answers):
    conversation = Conversation(make(template))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    messages, ids = [], []
    for turn, said in enumerate([*answers, None]):
        ids += conversation.ask(f"question {turn}", int(turn == 0))
        messages.append(user(f"question {turn}", int(turn == 0)))
        whole = Template(plain, trim_blocks=True, lstrip_blocks=True).render(
            messages=messages, add_generation_prompt=True
        )
        assert ids == tokenizer.encode(whole).ids
        if said is not None:
            spoken = " " + said if said and template == CHAT_TEMPLATE else said
            ids += tokenizer.encode(spoken, add_special_tokens=False).ids
            conversation.answer(spoken)
            text = {"type": "text", "text": said}
            messages.append({"role": "assistant", "content": [text]})


def test_midnight_does_not_rewrite_history(make, monkeypatch):
    class Clock:
        day = 1

        @staticmethod
        def now():
            return datetime(2026, 1, Clock.day)

    monkeypatch.setattr(prompt, "datetime", Clock)
    talk = Conversation(make(DATED))
    assert make().tokenizer.decode(talk.ask("Hi?", 0)).startswith("01 Jan 2026")
    talk.answer("Hello.")
    Clock.day = 2
    assert make().tokenizer.decode(talk.ask("And now?", 0)).strip().startswith("U: And now?")


def test_a_template_that_rewrites_history_is_refused_on_the_second_turn(make):
    conversation = Conversation(make("{{ messages | length }} {{ messages[-1]['content'][-1]['text'] }}"))
    conversation.ask("one", 0)
    conversation.answer("yes")
    with pytest.raises(RuntimeRefusal, match="rewrites earlier turns"):
        conversation.ask("two", 0)


def test_the_template_is_found_in_every_place_it_may_lie(make, tmp_path):
    prompter = make(None)
    messages = [user("hello", 1)]
    assert prompter.render(messages) == "USER: <image>\nhello ASSISTANT:"  # LLaVA-1.5's model card
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "from config"}))
    assert Prompter(tmp_path, IMAGE).render(messages) == "from config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Prompter(tmp_path, IMAGE).render(messages) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert Prompter(tmp_path, IMAGE).render(messages) == "from jinja"


@pytest.mark.parametrize("template", ["{% for %}", "{{ unclosed", "{% nonsense %}", "{% generation %}never ends"])
def test_bad_jinja_is_refused_when_the_bundle_is_opened(make, template):
    with pytest.raises(RuntimeRefusal, match="not valid Jinja"):
        make(template)


def test_what_the_template_itself_refuses_is_told(make):
    with pytest.raises(RuntimeRefusal, match="no system turns"):
        Conversation(make("{{ raise_exception('no system turns') }}")).ask("x", 0)


@pytest.mark.parametrize("template", ["{{ messages[3]['content'] }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_fails_when_rendered_is_refused(make, template):
    with pytest.raises(RuntimeRefusal, match="template"):
        Conversation(make(template)).ask("x", 0)


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>"}])
def test_the_start_token_is_not_doubled_when_the_template_writes_it(make, tmp_path, bos):
    make("{{ bos_token }}hi")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": bos}))
    assert Conversation(Prompter(tmp_path, IMAGE)).ask("x", 0).count(256) == 1


def test_an_image_token_outside_the_tokenizer_is_refused(make, tmp_path):
    make()
    with pytest.raises(RuntimeRefusal, match="9999"):
        Prompter(tmp_path, 9999)
