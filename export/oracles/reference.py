"""The oracle of parity: the Hugging Face model as it is, and FastV written a second time, from the paper's rules.

Nothing here shares code with the graph pass. The layers are transformers' own modules with eager attention; this
file only calls them one after the other, so that hidden states can be gathered in between (FastV, arXiv
2403.06764: score = softmax attention of layer k-1, last query row, mean over heads; before layer k keep the
``round(N (1 - r))`` best visual tokens and all others, in order, with their original positions). The other scores
(``no-rope``, ``coverage``, ``stride``, ``random``) are written a second time as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, DynamicCache
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vlmtrim.runtime.measure.check import Recording, Turn


class Reference:
    """One conversation on the unpatched model, batch 1, float32.

    Args:
        model_class: transformers class of the checkpoint.
        folder: checkpoint, or a bundle (which is one); its own Hugging Face image processor prepares the pictures.
        selection: the contract's selection (``k``, ``r``, ``seed``, ``score``), or None for the plain forward.
    """

    METHODS = ("fastv",)  # that this oracle writes a second time

    def __init__(self, model_class: Any, folder: Path, selection: dict[str, Any] | None):
        self.model = model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        self._text = self.model.model.language_model
        self._selection = selection
        self._visual_token = self.model.config.image_token_id
        self._image_processor = own_processor(folder).image_processor
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._cache = DynamicCache()
        self._position = 0

    @torch.no_grad()
    def record(self, turn: Turn, steps: int) -> tuple[Recording, list[int]]:
        """Run a turn and ``steps`` greedy tokens; returns the recording and the tokens that were fed."""
        if turn.opens:
            self.reset()
        ids = torch.tensor([turn.ids])
        logits, kept = self._forward(ids, self._inputs(turn) if turn.images else {})
        layers: list[Any] = self._cache.layers
        caches = [(layer.keys[0].numpy().copy(), layer.values[0].numpy().copy()) for layer in layers]
        all_logits, tokens = [logits], []
        for _ in range(steps):
            tokens.append(int(all_logits[-1].argmax()))
            all_logits.append(self._forward(torch.tensor([[tokens[-1]]]), {})[0])
        kept_array = None if kept is None else kept.numpy()
        return Recording(kept_array, caches, torch.stack(all_logits).numpy()), tokens

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        """What the model's own processor makes of a turn's pictures."""
        return dict(self._image_processor(list(turn.images), return_tensors="pt"))

    def _features(self, pictures: dict[str, Tensor]) -> Tensor:
        """[N, D], in the order of the prompt."""
        return torch.cat(list(self.model.get_image_features(**pictures).pooler_output))

    def _forward(self, ids: Tensor, pictures: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(logits [V] of the last token, kept indices); ``pictures`` as the model's own processor made them."""
        positions = self._positions(ids, pictures)
        self._position = int(positions.max()) + 1
        if self._selection is None:
            output = self.model(
                input_ids=ids, **pictures, position_ids=positions, past_key_values=self._cache, use_cache=True
            )
            return output.logits[0, -1], None
        hidden = self._text.embed_tokens(ids)
        visual = torch.zeros(0, dtype=torch.int64)
        if pictures:
            visual = torch.nonzero(ids[0] == self._visual_token)[:, 0]
            hidden[0, visual] = self._features(pictures)
        hidden, kept = self._layers(hidden, positions, visual)
        return self.model.lm_head(self._text.norm(hidden))[0, -1], kept

    def _positions(self, ids: Tensor, pictures: dict[str, Tensor]) -> Tensor:
        """[1, S], or [3, 1, S] by the model's own rule, which counts every turn from 0."""
        rule = getattr(self.model.model, "get_rope_index", None)
        if rule is None:
            return torch.arange(self._position, self._position + ids.shape[1])[None]
        config = self.model.config
        marks = (config.image_token_id, config.video_token_id) if pictures else ()  # in an answer they are words
        kinds = sum(((ids == mark) * (i + 1) for i, mark in enumerate(marks)), torch.zeros_like(ids))
        grids = {name: value for name, value in pictures.items() if not name.startswith("pixel_values")}
        return rule(ids, kinds, **grids)[0] + self._position

    def _layers(self, hidden: Tensor, positions: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        assert self._selection is not None
        k = self._selection["k"]
        kept = torch.arange(hidden.shape[1])
        seen: dict[str, Tensor] = {}
        watched = self._text.layers[max(k - 1, 0)].self_attn
        handles = [
            watched.register_forward_hook(lambda _, __, output: seen.update(attention=output[1])),
            watched.q_proj.register_forward_hook(lambda _, __, output: seen.update(query=output)),
            watched.k_proj.register_forward_hook(lambda _, __, output: seen.update(key=output)),
        ]
        try:
            for index, layer in enumerate(self._text.layers):
                if index == k:
                    kept = self._choose(seen, visual, hidden.shape[1], watched)
                    hidden, positions = hidden[:, kept], positions[..., kept]
                past = self._cache.get_seq_length(index)
                output = layer(
                    hidden,
                    attention_mask=_causal(hidden.shape[1], past),
                    position_ids=positions,
                    position_embeddings=self._text.rotary_emb(hidden, positions),
                    past_key_values=self._cache,
                    use_cache=True,
                )
                hidden = output[0] if isinstance(output, tuple) else output
        finally:
            for handle in handles:
                handle.remove()
        return hidden, kept

    def _choose(self, seen: dict[str, Tensor], visual: Tensor, tokens: int, watched: Any) -> Tensor:
        """Ascending indices that survive; ``seen`` holds attention [1, H, S, past + S] and q, k [1, S, H Dh]."""
        assert self._selection is not None
        rule, seed = self._selection["score"], self._selection["seed"]
        count, given = round(len(visual) * (1 - self._selection["r"])), len(visual)
        first: list[int] = []
        if rule == "random":
            scores = torch.from_numpy(np.random.default_rng(seed).random(given, dtype=np.float32))
        elif rule == "stride":
            first, scores = _strided(count, given, seed), torch.zeros(given)
        elif rule == "no-rope":
            scores = _unrotated_row(seen["query"][0], seen["key"][0], watched.head_dim)[visual]
        else:
            scores = seen["attention"][0].mean(dim=0)[-1, -tokens:][visual]
            first = _strided(count // 2, given, seed) if rule == "coverage" else []
        order = torch.sort(scores, descending=True, stable=True).indices.tolist()
        ranked = [*first, *(index for index in order if index not in set(first))]
        winners = visual[sorted(ranked[:count])]
        is_text = torch.ones(tokens, dtype=torch.bool)
        is_text[visual] = False
        return torch.cat([torch.nonzero(is_text)[:, 0], winners]).sort().values


def _strided(count: int, given: int, seed: int) -> list[int]:
    """``count`` of ``given`` tokens at equal distances."""
    return [(i * given + seed % max(given, 1)) // count for i in range(count)]


def _unrotated_row(query: Tensor, key: Tensor, size: int) -> Tensor:
    """Attention of the last token [S] from projections [S, H Dh] and [S, KV Dh] that were not rotated."""
    heads, groups = query.unflatten(1, (-1, size)), key.unflatten(1, (-1, size))
    groups = groups.repeat_interleave(heads.shape[1] // groups.shape[1], dim=1)
    logits = torch.einsum("hd,shd->hs", heads[-1], groups) * size**-0.5
    return logits.softmax(-1).mean(0)


def _causal(tokens: int, past: int) -> Tensor:
    """Additive mask [1, 1, tokens, past + tokens]."""
    above = torch.full((tokens, past + tokens), torch.finfo(torch.float32).min)
    return above.triu(diagonal=past + 1)[None, None]


def own_processor(folder: Path) -> Any:
    """The checkpoint's Hugging Face processor, without its video part where that lacks torchvision."""
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError:
        kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder))]

        class WithoutVideo(kind):
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
                """Take None for a video processor."""

        return WithoutVideo(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), None)


def processed(folder: Path, text: str, image: Any) -> tuple[list[int], np.ndarray]:
    """Token ids and pixel values that the checkpoint's own Hugging Face processor makes of a rendered prompt."""
    processor = own_processor(folder)
    start = processor.tokenizer.bos_token
    written = bool(start) and text.startswith(start)  # by the template; the tokenizer would write a second one
    inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=not written)
    return inputs["input_ids"][0].tolist(), inputs["pixel_values"].numpy()
