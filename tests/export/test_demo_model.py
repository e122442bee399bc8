"""The shipped demo model, loaded with plain transformers, on pictures that it was never trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from vlmtrim.export.checkpoint import SHIPPED
from vlmtrim.export.demo import task
from vlmtrim.export.demo.evaluate import CHECKPOINT, Demo, judged
from vlmtrim.export.demo.model import prompt

EXAMPLES = CHECKPOINT.parent / "examples"
ASKED = 60
MEASURED = 0.992  # over 2400 test questions, as printed by scripts/train_demo.py --evaluate-only
SMALL = 0.983  # of demo-small, over 480


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


def test_checkpoint_is_small_and_complete():
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "training_curve.json",
    } <= names
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 12e6
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["num_hidden_layers"] >= 8
    assert config["image_seq_length"] >= 144


def test_weights_are_float16():
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_tokenizer_gives_back_any_text_and_one_token_a_word():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for text in ("What colour is the circle?", "Zoë says: 10 € — ¿qué?"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    for answer in task.ANSWERS:
        assert len(tokenizer(answer).input_ids) == 2  # <s> and the word


def test_chat_template_is_llavas(demo: Demo):
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is written?"}]
    text = demo.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt("Which digit is written?")


def test_held_out_questions_are_answered(demo: Demo):
    answered = list(judged(demo, task.examples("test", ASKED)))
    right = sum(answer == example.question.answer for example, answer in answered)
    # Three standard deviations below what the model earns on the whole test.
    assert right >= ASKED * MEASURED - 3 * math.sqrt(ASKED * MEASURED * (1 - MEASURED))


def test_the_small_demo_sees_the_same_tokens_and_answers():
    """Half of the decoder; tokenizer, processor and vision settings to the byte."""
    small = SHIPPED["demo-small"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (small / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (small, CHECKPOINT))
    assert one["text_config"].pop("num_hidden_layers") * 2 == other["text_config"].pop("num_hidden_layers") == 8
    assert one == other
    answered = list(judged(Demo(small), task.examples("test", 48)))
    right = sum(answer == example.question.answer for example, answer in answered)
    assert right >= 48 * SMALL - 3 * math.sqrt(48 * SMALL * (1 - SMALL))


def test_padding_does_not_change_answers(demo: Demo):
    examples = list(task.examples("test", 12))
    assert demo.answers(examples) == [demo.answers([example])[0] for example in examples]


def test_shown_examples_are_answered(demo: Demo):
    shown = json.loads((EXAMPLES / "examples.json").read_text())
    assert 4 <= len(shown) <= 6
    assert {"count.png", "word.png"} <= {each["file"] for each in shown}
    for each in shown:
        image = Image.open(_inside(EXAMPLES, each["file"]))
        question = task.Question("shown", each["question"], each["answer"])
        assert demo.answers([task.Example("test", 0, image, question)]) == [each["answer"]]


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    assert path.is_file()
    return path
