"""Asks a saved demo checkpoint one question a prompt, through transformers' own processor and `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlmtrim.export.demo import task

CHECKPOINT = Path(__file__).parent / "checkpoint"


class Demo:
    """A checkpoint of the demo model, its float16 weights computed with in float32."""

    def __init__(self, folder: Path = CHECKPOINT):
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def answers(self, examples: Sequence[task.Example]) -> list[str]:
        """The greedy answer to every example, one prompt each, as text without its surrounding spaces."""
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": each.image}, {"type": "text", "text": each.question.text}],
                }
            ]
            for each in examples
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        with torch.no_grad():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=8)  # pyright: ignore
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def judged(demo: Demo, examples: Iterable[task.Example], batch: int = 32) -> Iterator[tuple[task.Example, str]]:
    """Every example with the model's answer to it."""
    rest = iter(examples)
    while some := list(islice(rest, batch)):
        yield from zip(some, demo.answers(some), strict=True)


def accuracy(demo: Demo, split: str, count: int) -> dict[str, float]:
    """Share of exact answers by kind, and over all `count` questions under "all"; kinds are asked equally often."""
    right: dict[str, list[bool]] = {kind: [] for kind in (*task.QUESTION_KINDS, "all")}
    for example, answer in judged(demo, task.examples(split, count)):
        for name in (example.question.kind, "all"):
            right[name].append(answer == example.question.answer)
    return {name: sum(marks) / len(marks) for name, marks in right.items()}
