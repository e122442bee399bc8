"""What a session returns of its steps: what a prefill did, and how long things took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Times:
    """Seconds spent since the session was opened or reset, and the number of decode steps; ``caches`` is what cutting
    the caches took."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    caches: float = 0.0


@dataclass(frozen=True)
class Prefill:
    """What one prefill did.

    Attributes:
        logits: [B, V] of each row's last token.
        visual, kept: visual tokens (or image features) of this step, and how many the last layers keep; where that
            depends on the data, of the row that keeps most, and where every layer chooses, its mean over the layers.
        kept_indices: per row, indices into its new tokens that survive, ascending; None where nothing is selected.
        visual_positions: indices of the visual tokens among each row's new tokens, [B, N].
        visual_scores: what the visual tokens were ranked by, float32 [B, N]; None where nothing is selected.
        kept_features: per row, indices into the step's image features that the caches took, ascending; None where
            pictures are tokens.
        kept_by_layer: per layer and row, indices into its new tokens that survive, where layers choose by themselves.
        held: per layer and row, the new tokens that a cache policy left in the caches, [X, n] of X sets; None without.
    """

    logits: np.ndarray
    visual: int
    kept: int
    kept_indices: list[np.ndarray] | None
    visual_positions: np.ndarray
    visual_scores: np.ndarray | None
    kept_features: list[np.ndarray] | None = None
    kept_by_layer: list[list[np.ndarray]] | None = None
    held: list[list[np.ndarray]] | None = None

    def layers_that_hold(self, row: int) -> np.ndarray:
        """Share of a layer's sets that hold each of a row's visual tokens, float64 [layers, N]; none without policy."""
        positions = self.visual_positions[row]
        return np.array([[np.isin(positions, one) for one in rows[row]] for rows in self.held or []]).mean(axis=1)

    def layers_that_keep(self, row: int) -> np.ndarray:
        """Which of a row's visual tokens each layer keeps, bool [layers, N]; of no layer where none chooses."""
        return np.array([np.isin(self.visual_positions[row], rows[row]) for rows in self.kept_by_layer or []])

    def survivors(self, row: int) -> np.ndarray:
        """Which of a row's visual tokens survive, in any layer, bool [N]; all of them where nothing is selected."""
        if self.kept_by_layer is not None:
            return np.asarray(self.layers_that_keep(row).any(axis=0))
        if self.kept_indices is None:
            return np.ones(self.visual_positions.shape[1], dtype=bool)
        return np.isin(self.visual_positions[row], self.kept_indices[row])
