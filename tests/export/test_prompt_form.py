"""prompt_form.py: templates of models become segments that say what the templates say; others are no such form."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import templates

from vlmtrim.export import prompt_form, prompt_proof
from vlmtrim.export.weights.tiny import SPECIAL_IDS, write_tokenizer
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.prompt import Conversation, Prompter

CONTRACT: Any = SimpleNamespace(image_token_id=SPECIAL_IDS["<image>"], video_token_id=None, max_seq_len=512)
FILMS: Any = SimpleNamespace(image_token_id=SPECIAL_IDS["<image>"], video_token_id=300, max_seq_len=512)


@pytest.fixture
def write(tmp_path):
    def of(template, contract=CONTRACT, video_mark=None):
        write_tokenizer(tmp_path, {**SPECIAL_IDS, "<video>": 300})
        (tmp_path / "chat_template.jinja").write_text(template)
        problem = prompt_form.write_form(tmp_path, contract, video_mark)
        path = tmp_path / "prompt.json"
        return problem, json.loads(path.read_text()) if path.exists() else None

    return of


@pytest.mark.parametrize("name", templates.FORMS)
def test_templates_of_models_are_forms(name, write):
    problem, form = write(templates.FORMS[name])
    assert problem is None and form["schema"] == 1
    assert (
        form["keeps_order"] == (name in ("qwen", "mllama", "behind texts")) and SPECIAL_IDS["<image>"] in form["image"]
    )
    kinds = [(opening["pictures"], opening["system"]) for opening in form["openings"]]
    expected = {"mistral": 2, "mllama": 3}.get(name, 4)
    assert len(set(kinds)) == len(kinds) == expected
    assert form["late_pictures"] == (name != "mllama")


@pytest.mark.parametrize("name", templates.HALF_FORMS)
def test_what_is_written_in_another_way_is_no_part_of_the_form(name, write):
    problem, form = write(templates.HALF_FORMS[name])
    assert problem is None and form["keeps_order"] is None
    assert (form["ended"] is None) == (name == "a sign alone")


def test_control_tokens_are_ids_and_dates_are_slots(write):
    _, form = write(templates.MLLAMA)
    plain = next(opening for opening in form["openings"] if not opening["pictures"] and not opening["system"])
    assert plain["before"][:2] == [SPECIAL_IDS["<s>"], SPECIAL_IDS["<pad>"]]
    assert {"date": "%d %b %Y"} in plain["before"]
    assert form["trims"] == dict.fromkeys(("question", "answer", "system"), "both")


@pytest.mark.parametrize("name", templates.NO_FORMS)
def test_other_templates_are_none(name, write, tmp_path):
    template, said = templates.NO_FORMS[name]
    (tmp_path / "prompt.json").write_text("of an earlier export")
    problem, form = write(template)
    assert form is None and said in problem


def test_a_form_that_says_something_else_is_found_out(write, tmp_path):
    _, form = write(templates.QWEN)
    prompter = Prompter(Folder(tmp_path), CONTRACT)
    prompt_proof.prove(prompter, form)
    for name in ("asked", "again", "image", "text"):
        with pytest.raises(prompt_proof.NoForm):
            prompt_proof.prove(prompter, {**form, name: [*form[name], " "]})
    with pytest.raises(prompt_proof.NoForm):
        prompt_proof.prove(prompter, {**form, "trims": dict.fromkeys(form["trims"], "both")})


@pytest.mark.parametrize("name", templates.VIDEO_FORMS)
def test_videos_are_written_as_pictures(name, write, tmp_path):
    problem, form = write(templates.VIDEO_FORMS[name], FILMS)
    assert problem is None and form["videos"]
    prompter = Prompter(Folder(tmp_path), FILMS)
    shown = [Conversation(prompter).ask("Which?", 2, videos) for videos in ((), (0,), (1,), (0, 1))]
    assert all(ids == shown[0] for ids in shown) and shown[0].count(FILMS.image_token_id) == 2


@pytest.mark.parametrize(
    ("template", "contract"),
    [
        (templates.VIDEO_FORMS["llava"], CONTRACT),
        (templates.LLAVA, FILMS),
        (templates.VIDEO_FORMS["llava"].replace("<video>", "<video>:"), FILMS),
    ],
    ids=["the bundle takes none", "not written", "written in another way"],
)
def test_where_videos_are_no_pictures_the_form_says_so(template, contract, write):
    problem, form = write(template, contract)
    assert problem is None and not form["videos"]


@pytest.mark.parametrize("name", templates.VIDEO_FORMS)
def test_what_stands_around_the_words_of_a_video(name, write):
    problem, form = write(templates.VIDEO_FORMS[name], video_mark="<video>")
    pad = SPECIAL_IDS["<pad>"]
    around = {"qwen": ([pad], [pad]), "llava": ([], ["\n"])}[name]
    found = form["video"] and (form["video"]["before"], form["video"]["behind"])
    assert problem is None and found == around
    for template in (
        templates.FORMS[name],
        templates.VIDEO_FORMS[name].replace("<video>", "<video>: <video>"),
        templates.VIDEO_FORMS["llava"].replace("<video>", "<video>!"),  # behind pictures, whatever the order is
    ):
        problem, form = write(template, video_mark="<video>")
        assert problem is None and form["video"] is None
