"""Writes the trained demo model as a Hugging Face checkpoint, and a few of the test pictures that it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from vlmtrim.export.demo import task
from vlmtrim.export.demo.evaluate import Demo, judged

SHOWN = ("count", "word", "exists", "beside", "digit", "colour")


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, curve: list[dict], folder: Path
) -> None:
    """Weights in float16, everything that transformers needs to load them, and the training curve."""
    tokens = processor.tokenizer
    model.model.language_model.config._attn_implementation = "sdpa"
    model.generation_config = GenerationConfig(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    # Older readers look for the image processor in a file of its own.
    processor.image_processor.save_pretrained(folder)
    (folder / "training_curve.json").write_text(json.dumps(curve, indent=1) + "\n")


def save_examples(demo: Demo, folder: Path) -> None:
    """One test picture for every kind in SHOWN, the first that the model answers rightly and that is full enough."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shown: dict[str, dict[str, str]] = {}
    for example, answer in judged(demo, task.examples("test", 20 * len(task.QUESTION_KINDS))):
        question = example.question
        full = len(task.scene_of(example.seed, "test").shapes) >= 4 and answer not in ("0", "1", "no")
        if question.kind in SHOWN and question.kind not in shown and full and answer == question.answer:
            name = f"{question.kind}.png"
            example.image.save(folder / name)
            shown[question.kind] = {"file": name, "question": question.text, "answer": answer}
    (folder / "examples.json").write_text(json.dumps([shown[kind] for kind in SHOWN], indent=1) + "\n")
