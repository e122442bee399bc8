"""The Hugging Face model as it is, with or without a selection that an oracle of this folder writes a second time.

Nothing here shares code with the graph passes. The layers are transformers' own modules with eager attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, DynamicCache
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vlmtrim.export.job import Refusal
from vlmtrim.export.oracles import Kept, load_oracle, run_layer
from vlmtrim.export.oracles.cutting import Cutting
from vlmtrim.export.oracles.formats import unpacked
from vlmtrim.runtime.measure.check import Recording, Turn


class Reference:
    """One conversation on the unpatched model, batch 1, float32.

    Args:
        model_class: transformers class of the checkpoint.
        folder: checkpoint, or a bundle (which is one); its own Hugging Face image processor prepares the pictures.
        selection: the contract's selection, ``method`` and its parameters, or None for the plain forward.
        cache: the contract's record of its cache policy, or None where caches hold everything.
        share: what the policy leaves of the visual tokens; None for the record's own.
    """

    def __init__(
        self,
        model_class: Any,
        folder: Path,
        selection: dict[str, Any] | None,
        cache: dict[str, Any] | None = None,
        share: float | None = None,
    ):
        with unpacked(folder) as plain:
            self.model = model_class.from_pretrained(plain, attn_implementation="eager", dtype=torch.float32).eval()
        self._text: Any = self.model.get_decoder()
        self._oracle = None if selection is None else load_oracle({**selection, "side": self._side()})
        self._cutting: Cutting | None = None
        if cache is not None:
            self._cutting = Cutting(self._text, cache, cache["share"] if share is None else share)
        self._visual_token = self.model.config.image_token_id
        self._image_processor = own_processor(folder).image_processor
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._cache = DynamicCache()
        self._position = 0
        if self._cutting is not None:
            self._cutting.reset()

    @torch.no_grad()
    def record(self, turn: Turn, steps: int) -> tuple[Recording, list[int]]:
        """Run a turn and ``steps`` greedy tokens; returns the recording and the tokens that were fed."""
        if turn.opens:
            self.reset()
        ids = torch.tensor([turn.ids])
        if turn.guide is not None and self._oracle is not None:
            self._oracle.guide = torch.from_numpy(turn.guide)
        before = [] if self._cutting is None else self._cutting.lengths(self._cache)
        logits, kept = self._forward(ids, self._inputs(turn) if turn.images else {})
        visual = torch.tensor([i for i, token in enumerate(turn.ids) if token == self._visual_token and turn.images])
        held = None
        if self._cutting is not None:
            held = self._cutting.cut(self._cache, before, len(turn.ids), visual, kept)
        layers: list[Any] = self._cache.layers
        caches = [(layer.keys[0].numpy().copy(), layer.values[0].numpy().copy()) for layer in layers]
        all_logits, tokens, nearest = [logits], [], [kept.nearest]
        for _ in range(steps):
            tokens.append(int(all_logits[-1].argmax()))
            if self._cutting is not None:
                self._cutting.make_room(self._cache)
            logits, chosen = self._forward(torch.tensor([[tokens[-1]]]), {})
            all_logits.append(logits)
            nearest.append(chosen.nearest)
            if self._cutting is not None:
                self._cutting.grown(self._cache)
        arrays = lambda tensors: None if tensors is None else [tensor.numpy() for tensor in tensors]  # noqa: E731
        return Recording(
            None if kept.tokens is None else kept.tokens.numpy(),
            caches,
            torch.stack(all_logits).numpy(),
            visual=visual.numpy(),
            kept_by_layer=arrays(kept.layers),
            margins=None if kept.token_margins is None else kept.token_margins.numpy(),
            layer_margins=arrays(kept.margins),
            held=None if held is None else arrays(held.tokens),
            held_ranking=None if held is None else arrays(held.ranking),
            nearest=np.array(nearest),
        ), tokens

    def _side(self) -> int | None:
        """Visual tokens along a picture, where all have as many."""
        vision: Any = self.model.config.vision_config
        return vision.image_size // vision.patch_size if hasattr(vision, "image_size") else None

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        """What the model's own processor makes of a turn's pictures."""
        return dict(self._image_processor(list(turn.images), return_tensors="pt"))

    def _features(self, pictures: dict[str, Tensor]) -> Tensor:
        """[N, D], in the order of the prompt."""
        return torch.cat(list(self.model.get_image_features(**pictures).pooler_output))

    def _looked_at(self, pixels: Tensor) -> Tensor:
        """[N]: attention of the class token to the patches in the layer whose states become features, or of all patches
        where there is none; mean over heads."""
        config = self.model.config
        layer = config.vision_feature_layer  # of hidden states, the first of which enters layer 0
        layers = self.model.model.vision_tower(pixels, output_attentions=True).attentions
        paid = layers[layer if layer < 0 else layer - 1].mean(dim=1)  # [I, T, T]
        has_class = config.vision_config.model_type == "clip_vision_model"
        return (paid[:, 0, 1:] if has_class else paid.mean(dim=1)).flatten()

    def _forward(self, ids: Tensor, pictures: dict[str, Tensor]) -> tuple[Tensor, Kept]:
        """(logits [V] of the last token, kept indices); ``pictures`` as the model's own processor made them."""
        positions = self._positions(ids, pictures)
        self._position = int(positions.max()) + 1
        if self._oracle is None and self._cutting is None:
            output = self.model(
                input_ids=ids,
                **pictures,
                **self._told(ids, pictures),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
            return output.logits[0, -1], Kept()
        hidden = self._text.embed_tokens(ids)
        visual = torch.zeros(0, dtype=torch.int64)
        if pictures:
            visual = torch.nonzero(ids[0] == self._visual_token)[:, 0]
            features = getattr(self._oracle, "features", None)  # of a method that works in the vision tower
            hidden[0, visual] = self._features(pictures) if features is None else features(self.model, **pictures)
            if self._oracle is not None and getattr(self._oracle, "looks", False):
                self._oracle.vision = self._looked_at(pictures["pixel_values"])
        if self._oracle is None:
            kept = Kept()
            for index in range(len(self._text.layers)):
                hidden = run_layer(self._text, index, self._cache, hidden, positions)
        else:
            hidden, kept = self._oracle.layers(self._text, self._cache, hidden, positions, visual)
        return self.model.lm_head(self._text.norm(hidden))[0, -1], kept

    def _told(self, ids: Tensor, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """What else the model is told of a step's tokens."""
        return {}

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


def own_processor(folder: Path) -> Any:
    """The checkpoint's Hugging Face processor, without its video part where that lacks torchvision."""
    try:
        return AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError):  # which of them is the video part's own choice
        kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder))]

        class WithoutVideo(kind):
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
                """Take None for a video processor."""

        parts: dict[str, Any] = {
            "image_processor": AutoImageProcessor.from_pretrained(folder),
            "tokenizer": AutoTokenizer.from_pretrained(folder),
            "video_processor": None,
        }
        try:
            return WithoutVideo.from_args_and_dict((), WithoutVideo.get_processor_dict(folder)[0], **parts)
        except ImportError as error:
            raise Refusal(f"transformers cannot make the checkpoint's processor: {str(error).strip()}") from error


def prepared(processor: Any, text: str, image: Any) -> Any:
    """What a Hugging Face processor makes of a rendered prompt and its picture, by name."""
    start = processor.tokenizer.bos_token
    written = bool(start) and text.startswith(start)  # by the template; the tokenizer would write a second one
    return processor(text=text, images=image, return_tensors="pt", add_special_tokens=not written)


def processed(folder: Path, text: str, image: Any) -> tuple[list[int], np.ndarray]:
    """Token ids and pixel values that the checkpoint's own Hugging Face processor makes of a rendered prompt."""
    inputs = prepared(own_processor(folder), text, image)
    pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
    return inputs["input_ids"][0].tolist(), pixels.numpy()
