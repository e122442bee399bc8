"""How the demo model learns: first to see (labels of every patch), then to answer (many questions a picture).

Both stages are given in minutes, so a run ends in time on any machine; a run that was stopped goes on from its last
save.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlmtrim.export.demo import packing, task
from vlmtrim.export.demo.batches import Batch, Packer, Pictures, loader, normalise
from vlmtrim.export.demo.labels import HEADS, IGNORE, PLAIN_HEADS, WORD_HEADS
from vlmtrim.export.demo.model import build_model
from vlmtrim.export.demo.optim import Muon

# Kinds that are learnt last, or that few scenes allow, are drawn more often than the others.
WEIGHTS = {"shape": 3.0, "count": 4.0, "exists": 3.0, "digit": 2.0, "beside": 1.5, "larger": 1.5, "side": 1.5}
WEIGHTS |= {"colour": 0.6, "ink": 0.4, "background": 0.2}
WARM_UP = 60  # optimizer steps
LAST_RATE = 0.02  # of the full learning rate
ADAM_SHARE = 0.4
LOOKING_LAYERS = (1, 3)  # decoder layers whose attention is shown where to look
LOOKING_SHARE, PATCH_SHARE = 0.3, 0.05  # of these losses beside the answers' own
STARTED_AT = 10_000_000  # number of the first picture of a run that goes on from a published checkpoint
FITTING_STEPS = 150  # of the patch heads alone, which a published checkpoint lacks


@dataclass(frozen=True)
class Recipe:
    """What the command line sets."""

    work: Path
    vision_minutes: float
    minutes: float
    lr: float = 2.5e-3  # of Muon; AdamW gets ADAM_SHARE of it
    start: Path | None = None  # a checkpoint whose weights a fresh run begins with
    layers: tuple[int, ...] = ()  # of the decoder of that checkpoint, the ones to begin with; none given: all of them
    vision_batch: int = 32
    batch: int = 10
    questions: int = 20
    save_every: float = 180.0  # seconds
    validate_every: float = 240.0  # seconds


class PatchHeads(nn.Module):
    """Reads the labels of every patch off its visual token; words are scored against the decoder's own embeddings."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor):
        super().__init__()
        width = model.lm_head.in_features
        self.plain = nn.ModuleDict({head: nn.Linear(width, classes) for head, classes in PLAIN_HEADS.items()})
        tokens = processor.tokenizer
        self.words = {
            head: tokens.convert_tokens_to_ids(["▁" + word for word in words]) for head, words in WORD_HEADS.items()
        }

    def forward(self, visual: Tensor, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Summed loss, and the share of right patches by head.

        `visual` is [B, N, D], `embeddings` of the vocabulary [V, D], `labels` [B, heads, N].
        """
        total, right = visual.new_zeros(()), {}
        for index, head in enumerate(HEADS):
            wanted = labels[:, index].flatten()
            concerned = (wanted != IGNORE).nonzero()[:, 0]
            tokens, wanted = visual.flatten(0, 1)[concerned], wanted[concerned]
            scores = self.plain[head](tokens) if head in PLAIN_HEADS else tokens @ embeddings[self.words[head]].T
            total = total + cross_entropy(scores, wanted)
            right[head] = (scores.argmax(-1) == wanted).float().mean().item()
        return total, right


class Trainer:
    """Model, optimizers and clock of one run; `state` holds all that a later run needs to go on."""

    def __init__(self, recipe: Recipe, processor: LlavaProcessor):
        torch.manual_seed(0)
        self.recipe, self.processor = recipe, processor
        self.packer = Packer(processor)
        self.model = (
            build_model(processor.tokenizer, len(recipe.layers)) if recipe.layers else build_model(processor.tokenizer)
        )
        _place_patches(self.model)
        self.model.model.language_model.config._attn_implementation = packing.ATTENTION
        self.heads = PatchHeads(self.model, processor)
        self.optimizers = _optimizers(self.model, self.heads)
        self.clock = {"vision": 0.0, "answers": 0.0}  # seconds spent in each stage
        self.steps = {"vision": 0, "answers": 0}
        self.pictures = 0
        self.curve: list[dict] = []
        self.path = recipe.work / "state.pt"
        if self.path.exists():
            self._load()
        elif recipe.start is not None:
            self._start_from(recipe.start)

    def run(self) -> None:
        """Both stages, from wherever the last save left them."""
        for stage, minutes in (("vision", self.recipe.vision_minutes), ("answers", self.recipe.minutes)):
            if self.clock[stage] < 60 * minutes:
                self._stage(stage, 60 * minutes)
        self.save()

    def save(self) -> None:
        """Writes the state beside the old one and swaps them, so that a kill leaves one of the two whole."""
        fresh = self.path.with_suffix(".new")
        torch.save(
            {
                "model": self.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "clock": self.clock,
                "steps": self.steps,
                "pictures": self.pictures,
                "curve": self.curve,
            },
            fresh,
        )
        fresh.replace(self.path)
        (self.recipe.work / "training_curve.json").write_text(json.dumps(self.curve, indent=1) + "\n")

    def validate(self, batches: int = 6) -> dict[str, float]:
        """Share of right answers by kind on pictures of the validation split."""
        pictures = iter(Pictures(self.packer, "val", 0, 32, self.recipe.questions))
        right, asked = torch.zeros(len(task.QUESTION_KINDS)), torch.zeros(len(task.QUESTION_KINDS))
        with torch.no_grad():
            for _ in range(batches):
                batch = next(pictures)
                visual = packing.visual_tokens(self.model, normalise(batch.pixels, self.processor))
                states = packing.block_states(self.model, self.packer.prefix, visual, batch.blocks)
                good, kinds = _answered(self.model, states, batch)
                right.index_add_(0, kinds, good)
                asked.index_add_(0, kinds, torch.ones_like(good))
        return {kind: round(float(right[i] / asked[i]), 4) for i, kind in enumerate(task.QUESTION_KINDS) if asked[i]}

    def _stage(self, stage: str, seconds: float) -> None:
        recipe, answers = self.recipe, stage == "answers"
        size = recipe.batch if answers else recipe.vision_batch
        batches = loader(
            Pictures(self.packer, "train", self.pictures, size, recipe.questions if answers else 1, WEIGHTS)
        )
        last_save = last_check = last = time.monotonic()
        while self.clock[stage] < seconds:
            self._set_rate(stage, self.clock[stage] / seconds)
            loss, right = self._step(next(batches), answers)
            self.steps[stage] += 1
            self.pictures += size
            now = time.monotonic()
            self.clock[stage] += now - last
            last = now
            due = now - last_check > recipe.validate_every
            if self.steps[stage] % 20 == 0 or due:
                print(
                    f"{stage} {self.steps[stage]} {self.clock[stage]:.0f}s loss {loss:.3f} {_brief(right)}", flush=True
                )
            if due or self.clock[stage] >= seconds:
                self._record(stage, loss, self.validate() if answers else right)
                last_check = now
            if now - last_save > recipe.save_every:
                self.save()
                last_save = now

    def _step(self, batch: Batch, answers: bool) -> tuple[float, dict[str, float]]:
        visual = packing.visual_tokens(self.model, normalise(batch.pixels, self.processor))
        embeddings = self.model.get_input_embeddings().weight
        patch_loss, right = self.heads(visual, embeddings, batch.labels)
        loss = total = patch_loss
        if answers:
            watch: dict[int, Tensor] = dict.fromkeys(LOOKING_LAYERS, visual)
            states = packing.block_states(self.model, self.packer.prefix, visual, batch.blocks, watch)
            away = torch.stack([_looks_away(watch[layer], batch, self.packer.first) for layer in watch]).sum()
            wanted = batch.targets != IGNORE
            loss = cross_entropy(self.model.lm_head(states[wanted]), batch.targets[wanted])
            total = loss + PATCH_SHARE * patch_loss + LOOKING_SHARE * away
            good, kinds = _answered(self.model, states, batch)
            right = {"away": away.item()} | {
                kind: good[kinds == i].mean().item() for i, kind in enumerate(task.QUESTION_KINDS)
            }
        total.backward()
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), right

    def _set_rate(self, stage: str, progress: float) -> None:
        rate = self.recipe.lr * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        rate *= min(1.0, (self.steps[stage] + 1) / WARM_UP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                # The tower has learnt to see by then; it only follows what the decoder asks for.
                follows = 0.3 if stage == "answers" and group["sees"] else 1.0
                group["lr"] = rate * follows * (1.0 if isinstance(optimizer, Muon) else ADAM_SHARE)

    def _record(self, stage: str, loss: float, accuracy: dict[str, float]) -> None:
        mean = round(sum(accuracy.values()) / len(accuracy), 4)
        self.curve.append(
            {
                "stage": stage,
                "step": self.steps[stage],
                "wall_seconds": round(self.clock["vision"] + self.clock["answers"], 1),
                "loss": round(loss, 4),
                "accuracy": mean,
                "accuracy_by_kind": {kind: round(value, 4) for kind, value in accuracy.items()},
            }
        )
        print(f"== {stage} {self.steps[stage]} mean {mean:.4f} {_brief(accuracy)}", flush=True)

    def _start_from(self, folder: Path) -> None:
        """Takes the weights and the curve of a published checkpoint; the patch heads are fitted to its tower anew."""
        trained = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        if layers := self.recipe.layers:
            decoder = trained.model.language_model
            decoder.layers = nn.ModuleList(decoder.layers[layer] for layer in layers)
        else:
            self.curve = json.loads((folder / "training_curve.json").read_text())
        self.model.load_state_dict(trained.state_dict())
        self.pictures = STARTED_AT  # pictures that the published run has not seen
        optimizer = torch.optim.AdamW(self.heads.parameters(), lr=3e-3)
        batches = loader(Pictures(self.packer, "train", 0, self.recipe.vision_batch, 1))
        embeddings = self.model.lm_head.weight.detach()
        for _ in range(FITTING_STEPS):
            batch = next(batches)
            with torch.no_grad():
                visual = packing.visual_tokens(self.model, normalise(batch.pixels, self.processor))
            self.heads(visual, embeddings, batch.labels)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.clock, self.steps = state["clock"], state["steps"]
        self.pictures, self.curve = state["pictures"], state["curve"]


def _answered(model: LlavaForConditionalGeneration, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Whether each answer's token is the likeliest (1.0 or 0.0), and the question's kind; both [B * Q]."""
    at = _answer_column(batch)
    rows = torch.arange(len(at))
    likeliest = model.lm_head(states.flatten(0, 1)[rows, at]).argmax(-1)
    return (likeliest == batch.targets.flatten(0, 1)[rows, at]).float(), batch.kinds.flatten()


def _looks_away(attention: Tensor, batch: Batch, first: int) -> Tensor:
    """How far the answering token's attention [B, Q, L, P] is from lying evenly on the patches that it should look at.

    The cross entropy with an even spread over the patches of the things asked about; picture tokens start at `first`.
    """
    at = _answer_column(batch)
    on_patches = attention.flatten(0, 1)[torch.arange(len(at)), at, first : first + batch.about.shape[-1]]
    about = batch.about.flatten(0, 1).float()
    patches = about.sum(-1)
    distance = -(about * (on_patches + 1e-6).log()).sum(-1) / patches.clamp(min=1)
    return distance[patches > 0].mean()


def _answer_column(batch: Batch) -> Tensor:
    """Where in its block each question's answer is predicted, [B * Q]."""
    return (batch.targets != IGNORE).int().argmax(-1).flatten()


def _place_patches(model: LlavaForConditionalGeneration) -> None:
    """Starts the tower's positions as waves along x and y, as strong as the patches, so that places are told apart."""
    table = model.model.vision_tower.embeddings.position_embedding.weight.data
    side = math.isqrt(len(table) - 1)
    waves = torch.arange(side)[:, None] * (math.pi / side) * torch.arange(1, table.shape[1] // 4 + 1) / 4
    axis = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    table[1:] = 0.3 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _optimizers(model: LlavaForConditionalGeneration, heads: PatchHeads) -> list[torch.optim.Optimizer]:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *heads.named_parameters()):
        matrix = parameter.ndim == 2 and ("layers" in name or "projector" in name)
        sees = "vision_tower" in name or "projector" in name
        groups.setdefault((matrix, sees), []).append(parameter)

    def of(matrix: bool) -> Iterator[dict]:
        return ({"params": groups[matrix, sees], "sees": sees} for sees in (False, True))

    return [
        Muon(list(of(True)), lr=0.0, weight_decay=0.01),
        torch.optim.AdamW(list(of(False)), lr=0.0, weight_decay=0.0),
    ]


def _brief(accuracy: dict[str, float]) -> str:
    return " ".join(f"{name[:6]} {value:.2f}" for name, value in accuracy.items())
