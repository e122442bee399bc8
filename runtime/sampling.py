"""From logits to token ids: greedy, temperature, top-k, top-p, reproducible by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmtrim.runtime.errors import RuntimeRefusal


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy (the lowest id wins ties); above, logits are divided by it.
        top_k: only the k most probable tokens; 0 for all.
        top_p: the smallest set of most probable tokens whose probabilities reach p; 1 for all.
        seed: of the generator; None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise RuntimeRefusal(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise RuntimeRefusal(f"top-k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise RuntimeRefusal(f"top-p is {self.top_p}; give a share above 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise RuntimeRefusal(f"seed is {self.seed}; give 0 or more")


class Sampler:
    """Draws tokens for one answer; two samplers with equal settings and a seed draw equal tokens."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """logits [B, V] -> token ids int64 [B]. Raises RuntimeRefusal where they are no numbers."""
        if np.isnan(logits).any() or np.isposinf(logits).any():
            raise RuntimeRefusal(
                "the model returned NaN or infinity in place of logits: its weights overflow the bundle's dtype, or "
                "its picture settings are damaged; export it again, with --dtype float32 where the dtype is float16"
            )
        if self._sampling.temperature == 0:
            return logits.argmax(axis=-1).astype(np.int64)
        return np.array([self._draw(row) for row in logits.astype(np.float64)], dtype=np.int64)

    def _draw(self, logits: np.ndarray) -> int:
        probabilities = token_probabilities(logits, self._sampling)
        return int(self._generator.choice(len(probabilities), p=probabilities))


def token_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Distribution [V] that a token is drawn from: temperature, top-k, top-p, in transformers' order."""
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    with np.errstate(over="ignore"):  # a temperature close to 0 leaves the best token alone
        kept = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
    kept /= kept.sum()
    if sampling.top_p < 1:
        before = np.cumsum(kept) - kept
        kept = np.where(before < sampling.top_p, kept, 0.0)
        kept /= kept.sum()
    probabilities = np.zeros(len(logits))
    probabilities[order] = kept
    return probabilities


def largest_probability(logits: np.ndarray) -> np.ndarray:
    """Of the likeliest token, at temperature 1: logits [B, V] -> float64 [B]."""
    wide = logits.astype(np.float64)
    return 1 / np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1)


def log_probabilities(logits: np.ndarray, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of a token, and of the ``top`` likeliest ones in falling order (equal ones by id): logits [V], temperature 1."""
    wide = logits.astype(np.float64)
    total = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    best = np.argpartition(-wide, min(top, len(wide) - 1))[:top]
    best = best[np.lexsort((best, -wide[best]))]
    return float(wide[token] - total), tuple((int(one), float(wide[one] - total)) for one in best)
