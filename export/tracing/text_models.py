"""Language models that families may have: one entry each, keyed by the ``model_type`` of its config.

An entry says what the layers hold, so that a trace in which a norm or a rotation was not recognised is refused; how far
they attend; and what a random config of the model needs beside sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _sees_all(text: Any) -> int | None:
    return None


def _sees_window(text: Any) -> int | None:
    return text.sliding_window


@dataclass(frozen=True)
class TextModel:
    """A language model of transformers with ``embed_tokens``, ``layers`` and ``norm``.

    Attributes:
        norms: RMS norms of a layer; one more follows the last layer.
        rotations: rotary embeddings of a layer, of whole heads.
        window: config -> how many tokens attention reaches back, where that is bounded.
        tiny: settings of a random config beside those that all have.
    """

    norms: int = 2
    rotations: int = 2
    window: Callable[[Any], int | None] = _sees_all
    tiny: Mapping[str, Any] = field(default_factory=dict)

    def fusions(self, layers: int) -> dict[str, int]:
        """Operator -> how often a decoder of so many layers holds it."""
        return {"RMSNormalization": self.norms * layers + 1, "RotaryEmbedding": self.rotations * layers}


_HEAD_NORMS = 4  # of a layer whose queries and keys are normed head by head


def _in_three_axes(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}}


TEXT_MODELS = {
    "llama": TextModel(),
    "mistral": TextModel(window=_sees_window, tiny={"sliding_window": None}),
    "qwen2": TextModel(window=_sees_window),  # None unless use_sliding_window
    "qwen3": TextModel(_HEAD_NORMS, window=_sees_window),
    "qwen2_vl_text": TextModel(window=_sees_window, tiny=_in_three_axes(8, 12, 12)),
    "qwen2_5_vl_text": TextModel(window=_sees_window, tiny=_in_three_axes(8, 12, 12)),
    "qwen3_vl_text": TextModel(_HEAD_NORMS, tiny=_in_three_axes(12, 10, 10)),
    "gemma3_text": TextModel(  # which layers see a window is the family's
        6,
        tiny={
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 48,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "mllama_text_model": TextModel(),  # its cross-attention layers are the family's
}
_NAMES = {"language_model", "text_model"}  # of the language model in models of all families
PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # a position is one number; families of any tower may have these


def in_language_model(parameter: str) -> bool:
    """Whether a parameter belongs to the language model, by its name in transformers' model; ``lm_head`` is outside."""
    return not _NAMES.isdisjoint(parameter.split("."))


def text_model(config: Any) -> TextModel:
    """The entry of a checkpoint's language model."""
    return TEXT_MODELS[config.text_config.model_type]


def tiny_text(text: str = "llama", heads: int = 4, kv_heads: int = 2, layers: int = 4) -> dict[str, Any]:
    """Settings of a random language model small enough for tests: head size 64, ids of ``weights.tiny``."""
    return {
        "model_type": text,
        "hidden_size": 64 * heads,
        "intermediate_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": 272,
        "max_position_embeddings": 1024,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        **TEXT_MODELS[text].tiny,
    }
