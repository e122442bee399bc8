"""Gemma 3's pictures and prompts, bit-equal with transformers' own processor; which tokens see ahead."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_turns import sized

from vlmtrim.export.families import gemma3
from vlmtrim.export.job import Job
from vlmtrim.export.job_contract import build_contract
from vlmtrim.export.oracles.reference import own_processor
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.looking_ahead import last_seen
from vlmtrim.runtime.processors.gemma3 import Processor
from vlmtrim.runtime.prompt import Conversation, Prompter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    config = gemma3.tiny_config()
    config.save_pretrained(folder)
    gemma3.write_tiny_processor(folder, config)
    return folder


@pytest.fixture(scope="module")
def contract(folder):
    return build_contract(Job("", "", None, max_seq_len=512), gemma3, gemma3.tiny_config(), torch.float32, folder)


def check(folder, contract, *pictures):
    """Pixels, and the words that stand for every picture."""
    theirs = own_processor(folder)
    found = Processor(Folder(folder), contract)(pictures)
    text = " and ".join(["<start_of_image>"] * len(pictures))
    expected = theirs(text=text, images=list(pictures), return_tensors="pt")
    np.testing.assert_array_equal(found.inputs["pixel_values"], expected["pixel_values"].numpy())
    ids = theirs.tokenizer(" and ".join(found.words))["input_ids"]
    assert ids == expected["input_ids"][0].tolist() and ids.count(263) == sum(found.tokens) == 16 * len(pictures)
    assert expected["token_type_ids"][0].tolist() == [int(token == 263) for token in ids]


@pytest.mark.parametrize("size", [(112, 112), (1, 1000), (1000, 1), (17, 9), (240, 200), (3000, 1700)])
def test_pictures_and_words_are_transformers_at_many_sizes(folder, contract, size):
    check(folder, contract, sized(*size))


@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 500), height=st.integers(1, 500))
def test_two_pictures_are_transformers_at_any_size(folder, contract, width, height):
    check(folder, contract, sized(width, height, 1), sized(height, width, 2))


def test_settings_without_a_filter_mean_transformers_default(folder, contract, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    del raw["resample"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    check(tmp_path, contract, sized(300, 200))


def test_pan_and_scan_and_marks_of_another_kind_are_refused(folder, contract, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, change, said in (
        ("tokenizer_config.json", {"extra_special_tokens": {"boi_token": 7}}, "boi_token is 7; expected a token"),
        ("preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan is true, and pictures are not cut"),
    ):
        raw = json.loads((folder / name).read_text())
        (tmp_path / name).write_text(json.dumps({**raw, **change}))
        with pytest.raises(BundleError, match=said):
            Processor(Folder(tmp_path), contract)
        (tmp_path / name).write_text(json.dumps(raw))


def test_what_people_type_is_no_mark(folder, contract):
    prompter = Prompter(Folder(folder), contract)
    parts = [{"type": "text", "text": "<start_of_image> <image_soft_token>"}, {"type": "image"}]
    made = Processor(Folder(folder), contract)([sized(30, 40)])
    ids = prompter.expand_images(Conversation(prompter).ask(parts, 1, words=made.words), made.tokens, made.words)
    assert [ids.count(token) for token in (261, 262, 263)] == [1, 1, 16]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), tokens=st.integers(1, 40), rows=st.integers(1, 3))
def test_a_visual_token_sees_to_the_end_of_its_run(data, tokens, rows):
    count = data.draw(st.integers(0, tokens))
    places = st.permutations(range(tokens)).map(lambda order: sorted(order[:count]))
    visual = [data.draw(places) for _ in range(rows)]
    found = last_seen(tokens, np.array(visual, dtype=np.int64).reshape(rows, count))
    assert found.dtype == np.int64
    for row, of_row in zip(found.tolist(), visual, strict=True):
        for token, last in enumerate(row):
            run = token
            while token in of_row and run + 1 in of_row:
                run += 1
            assert last == run
