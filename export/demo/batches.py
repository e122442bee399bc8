"""Training batches of the demo task, drawn by a worker process while the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaProcessor

from vlmtrim.export.demo import task
from vlmtrim.export.demo.labels import HEADS, IGNORE, PATCHES, patch_labels
from vlmtrim.export.demo.model import prompt
from vlmtrim.export.demo.scene import owners, render

BLOCK = 12  # tokens of the longest question with its answer


@dataclass
class Batch:
    """B pictures with Q questions each; `targets` is IGNORE but where the answer and the end of text are predicted."""

    pixels: Tensor  # uint8 [B, SIZE, SIZE, 3]
    labels: Tensor  # int64 [B, heads, patches]
    blocks: Tensor  # int64 [B, Q, BLOCK]
    targets: Tensor  # int64 [B, Q, BLOCK]
    kinds: Tensor  # int64 [B, Q], index into task.QUESTION_KINDS
    about: Tensor  # bool [B, Q, patches], the patches of the things that the question is about


class Packer:
    """Turns a question and its answer into a row of a block, with the processor's own tokens."""

    def __init__(self, processor: LlavaProcessor):
        self.tokenizer = processor.tokenizer
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        line = self.tokenizer(prompt("")).input_ids
        at = line.index(image)
        # The line end after the picture is the same for all questions, so it belongs to the prefix.
        self.prefix = torch.tensor(line[:at] + [image] * PATCHES + [line[at + 1]])
        self.first = at  # of the visual tokens, in the prefix
        self._skip = at + 2
        self._known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def row(self, question: task.Question) -> tuple[list[int], list[int]]:
        """Token ids and targets, BLOCK each."""
        key = (question.text, question.answer)
        if key not in self._known:
            ids = self.tokenizer(f"{prompt(question.text)} {question.answer}").input_ids[self._skip :]
            if len(ids) > BLOCK:
                raise ValueError(f"{question} takes {len(ids)} tokens, but a block has {BLOCK}; raise BLOCK.")
            end, pad = self.tokenizer.eos_token_id, BLOCK - len(ids)
            targets = [IGNORE] * (len(ids) - 2) + [ids[-1], end]
            self._known[key] = (ids + [end] * pad, targets + [IGNORE] * pad)
        return self._known[key]


class Pictures(IterableDataset):
    """Endless batches from picture number `start` on; `weights` says how much more often a kind is drawn."""

    def __init__(
        self,
        packer: Packer,
        split: str,
        start: int,
        batch: int,
        questions: int,
        weights: dict[str, float] | None = None,
    ):
        self.packer, self.split, self.start = packer, split, start
        self.batch, self.questions = batch, questions
        self.weights = [(weights or {}).get(kind, 1.0) for kind in task.QUESTION_KINDS]

    def __iter__(self) -> Iterator[Batch]:
        start = self.start
        while True:
            rows = [self._picture(seed) for seed in range(start, start + self.batch)]
            pixels, labels, blocks, targets, kinds, about = (
                torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)
            )
            yield Batch(pixels, labels, blocks, targets, kinds, about)
            start += self.batch

    def _picture(self, seed: int) -> tuple[np.ndarray, ...]:
        scene = task.scene_of(seed, self.split)
        pixels = np.asarray(render(scene))
        labels = patch_labels(scene) if self.split == "train" else np.zeros((len(HEADS), PATCHES), np.int64)
        rng = task.generator(seed, self.split, 2)
        asked = list(dict.fromkeys(question for _ in range(2) for question in task.questions(scene, rng)))
        kinds = np.array([task.QUESTION_KINDS.index(question.kind) for question in asked])
        # The largest keys of u^(1/w) are a weighted draw without replacement; a poor scene repeats its questions.
        keys = rng.random(len(asked)) ** (1 / np.array(self.weights)[kinds])
        chosen = np.resize(np.argsort(-keys), self.questions)
        blocks, targets = zip(*(self.packer.row(asked[index]) for index in chosen), strict=True)
        owner = owners(scene).reshape(-1)
        about = np.stack([np.isin(owner, asked[index].about) for index in chosen])
        return pixels, labels, np.array(blocks), np.array(targets), kinds[chosen], about


def loader(pictures: Pictures) -> Iterator[Batch]:
    """The batches of `pictures`, made ahead of time by one worker process."""
    return iter(DataLoader(pictures, batch_size=None, num_workers=1, prefetch_factor=4))


def normalise(pixels: Tensor, processor: LlavaProcessor) -> Tensor:
    """uint8 [B, SIZE, SIZE, 3] -> float32 [B, 3, SIZE, SIZE], as the image processor does to a picture of SIZE."""
    mean, deviation = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    return ((pixels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()
