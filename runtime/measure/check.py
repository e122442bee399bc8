"""Parity between two recordings of the same turns: what a bundle did, and what a reference or another backend did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vlmtrim.runtime.session import Session

# Largest difference allowed, relative to the largest magnitude of the reference (at least 1). float32: the order of
# summation differs, and errors grow over the layers; 1e-4 is far above what is seen (1e-6) and far below any wrong
# rule. float16 and bfloat16 carry 11 and 8 bits; the reference runs in float32. Kept tokens may differ where their
# scores are as near to the threshold, relative to it: such scores are equal within what the dtype can tell.
# int8: packed weights multiplied by activations that are rounded to 8 bits.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}


@dataclass(frozen=True)
class Turn:
    """One question as both sides get it: token ids with image tokens repeated, and RGB pictures.

    guide: what its visual tokens are ranked by, float32 [N], where another bundle provides that.
    """

    name: str
    ids: list[int]
    images: tuple[Image.Image, ...] = ()
    opens: bool = True
    guide: np.ndarray | None = None


@dataclass(frozen=True)
class Recording:
    """What one side did with a turn.

    kept: indices of the turn's tokens, or image features, that survive, or None; caches: (keys, values) [KV, length,
    Dh] per layer after the prefill; logits [1 + steps, V]: prefill, then each greedy token fed back; visual, scores:
    indices of the turn's visual tokens and what they were ranked by, [N] each, where that side tells; margins [N]: of a
    choice that has no single score, how far each image feature is from the other side, relative to its threshold.
    kept_by_layer, layer_margins: the same of every layer where layers choose by themselves; margins of visual tokens.
    held, held_ranking: of every layer the tokens that a cache policy left in its caches, [X, n] of X sets, and what
    tokens were ranked by, [X, S], where that side tells.
    nearest [1 + steps]: of steps that attend to chosen cache entries, how near an entry is to the other side, relative
    to its threshold; infinite where all are attended to.
    windows: layer -> entries that its caches hold at least, where they hold the last ones alone.
    """

    kept: np.ndarray | None
    caches: list[tuple[np.ndarray, np.ndarray]]
    logits: np.ndarray
    visual: np.ndarray | None = None
    scores: np.ndarray | None = None
    margins: np.ndarray | None = None
    kept_by_layer: list[np.ndarray] | None = None
    layer_margins: list[np.ndarray] | None = None
    held: list[np.ndarray] | None = None
    held_ranking: list[np.ndarray] | None = None
    nearest: np.ndarray | None = None
    windows: Mapping[int, int] = field(default_factory=dict)

    def same_choices(self, other: Recording) -> bool:
        """Whether both kept the same tokens, in every layer; true where either does not tell."""
        pairs = [(self.kept, other.kept)] if self.kept is not None and other.kept is not None else []
        if self.kept_by_layer is not None and other.kept_by_layer is not None:
            pairs += zip(self.kept_by_layer, other.kept_by_layer, strict=True)
        if self.held is not None and other.held is not None:
            pairs += zip(self.held, other.held, strict=True)
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def tied(self, tolerance: float) -> bool:
        """Whether what a step attends to is decided within the tolerance."""
        return self.nearest is not None and bool((self.nearest <= tolerance).any())


@dataclass(frozen=True)
class Row:
    """One line of the parity table."""

    turn: str
    what: str
    difference: float
    tolerance: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Parity:
    """The verdict; true when every row passed."""

    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return all(row.passed for row in self.rows)

    def table(self) -> str:
        """The rows as text; a failed row says which tolerance would have passed."""
        width = max([len(row.turn) for row in self.rows] + [4])
        lines = [f"{'turn':{width}}  {'what':28} {'difference':>11} {'allowed':>9}  result"]
        for row in self.rows:
            verdict = "ok" if row.passed else f"FAILED (would pass at {row.difference:.2g})"
            note = f"  {row.note}" if row.note else ""
            lines.append(
                f"{row.turn:{width}}  {row.what:28} {row.difference:11.3g} {row.tolerance:9.1g}  {verdict}{note}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"passed": bool(self), "rows": [asdict(row) for row in self.rows]}


def record(session: Session, turn: Turn, tokens: int | Sequence[int], row: int = 0) -> tuple[Recording, list[int]]:
    """Run a turn on every row of a session, then decode; records one row.

    Args:
        tokens: tokens to feed one by one, or the number of greedy tokens to decode.

    Returns:
        The recording, and the tokens that were fed.
    """
    if turn.opens:
        session.reset()
    pictures = session.processor.of_rows([turn.images] * session.batch) if turn.images else None
    guide = None if turn.guide is None else np.stack([turn.guide] * session.batch)
    prefill = session.prefill([turn.ids] * session.batch, pictures, guide)
    caches = session.cache_contents(row)
    logits, fed = [prefill.logits[row]], []
    for step in range(tokens if isinstance(tokens, int) else len(tokens)):
        fed.append(int(logits[-1].argmax()) if isinstance(tokens, int) else tokens[step])
        logits.append(session.decode(np.full(session.batch, fed[-1], dtype=np.int64))[row])
    selected = prefill.kept_indices or (prefill.kept_features if session.contract.selection else None)
    kept = None if selected is None else selected[row]
    scores = None if prefill.visual_scores is None else prefill.visual_scores[row]
    visual, by_layer = prefill.visual_positions[row], prefill.kept_by_layer
    return Recording(
        kept,
        caches,
        np.stack(logits).astype(np.float32),
        visual,
        scores,
        kept_by_layer=None if by_layer is None else [rows[row] for rows in by_layer],
        held=None if prefill.held is None else [rows[row] for rows in prefill.held],
        windows={layer: group.window for group in session.contract.groups if group.window for layer in group.layers},
    ), fed


def compare_turns(
    turns: Sequence[Turn], pairs: Iterable[tuple[Recording, Recording]], groups: Sequence[Sequence[int]], dtype: str
) -> list[list[Row]]:
    """Rows of every turn; ``pairs`` are (found, expected), in the order of the turns."""
    rows, differed = [], False
    for turn, (found, expected) in zip(turns, pairs, strict=True):
        differed = differed and not turn.opens
        rows.append(compare(turn.name, found, expected, groups, dtype, differed))
        differed = differed or not found.same_choices(expected) or expected.tied(TOLERANCE[dtype])
    return rows


def compare(
    turn: str,
    found: Recording,
    expected: Recording,
    groups: Sequence[Sequence[int]],
    dtype: str,
    differed: bool = False,
) -> list[Row]:
    """Rows for one turn.

    Args:
        turn: its name.
        found, expected: the two sides.
        groups: the layers of each cache group.
        dtype: chooses the tolerances.
        differed: whether earlier turns of the conversation kept other tokens, or may have attended to other entries,
            so that what follows the selection cannot be compared.
    """
    tolerance = TOLERANCE[dtype]
    rows: list[Row] = []
    same_tokens = True
    if found.kept is not None and expected.kept is not None:
        same_tokens = np.array_equal(found.kept, expected.kept) and not differed
        rows.append(_compare_kept(turn, found, expected, tolerance))
        if differed and not rows[-1].passed and expected.margins is not None:  # chosen among other features
            rows[-1] = Row(turn, rows[-1].what, 0.0, tolerance, True, "not comparable: other features are held")
    if found.kept_by_layer is not None and expected.kept_by_layer is not None:
        same_tokens = found.same_choices(expected) and not differed
        rows.append(_compare_layers(turn, found, expected, tolerance, differed))
    if found.held is not None and expected.held is not None:
        rows.append(_compare_held(turn, found, expected, tolerance, not same_tokens))
        same_tokens = same_tokens and found.same_choices(expected) and not differed
    for index, layers in enumerate(groups):
        selected = index > 0 or (len(groups) > 1 and max(layers) > min(groups[1]))  # holds what follows a selection
        selected = selected or found.kept_by_layer is not None or found.held is not None
        if selected and not same_tokens:
            what = _cache_row_name(layers)
            rows.append(Row(turn, what, 0.0, tolerance, True, "not comparable: other tokens were kept"))
        else:
            rows.append(_compare_caches(turn, layers, found, expected, tolerance))
    if not same_tokens and rows[0].passed:
        return [*rows, Row(turn, "logits", 0.0, tolerance, True, "not comparable: other tokens were kept")]
    scale = max(1.0, float(np.abs(expected.logits).max()))
    errors = np.abs(found.logits - expected.logits).max(axis=1) / scale
    rows.append(_row(turn, "prefill logits", errors[0], tolerance))
    steps, compared = len(errors) - 1, _before_a_tie(errors, expected.nearest, tolerance)
    if steps:
        note = "" if compared > steps else f"{compared - 1} of {steps}; then a tie decides what is attended to"
        worst = errors[1:compared].max(initial=0.0)
        rows.append(_row(turn, f"decode logits, {steps} steps", worst, tolerance, note))
    rows.append(_compare_choices(turn, found.logits[:compared], expected.logits[:compared], tolerance * scale))
    if differed and expected.nearest is not None:
        what = "not comparable: a tie in an earlier turn decided what was attended to"
        rows = [row if row.passed else Row(turn, row.what, 0.0, tolerance, True, what) for row in rows]
    return rows


def _before_a_tie(errors: np.ndarray, nearest: np.ndarray | None, tolerance: float) -> int:
    """How many of the steps' errors [1 + steps] count: all, unless the first too large one follows a tie."""
    wrong = np.nonzero(errors[1:] > tolerance)[0] + 1
    if nearest is None or not len(wrong) or not (nearest[: wrong[0] + 1] <= tolerance).any():
        return len(errors)
    return int(wrong[0])


def _row(turn: str, what: str, difference: float, tolerance: float, note: str = "") -> Row:
    passed = bool(np.isfinite(difference)) and float(difference) <= tolerance
    return Row(turn, what, float(difference), tolerance, passed, note)


def difference(turn: str, what: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]], dtype: str) -> Row:
    """A row for (found, expected) arrays of one kind, the largest difference relative to the largest magnitude."""
    worst = 0.0
    for found, expected in pairs:
        if found.shape != expected.shape:
            return Row(turn, what, float("inf"), TOLERANCE[dtype], False, f"{found.shape} against {expected.shape}")
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        errors = np.abs(found.astype(np.float32) - expected.astype(np.float32))
        worst = max(worst, float(errors.max(initial=0.0)) / scale)
    return _row(turn, what, worst, TOLERANCE[dtype])


def _compare_kept(turn: str, found: Recording, expected: Recording, tolerance: float) -> Row:
    """Other tokens may be kept only where their scores tie with the threshold (:func:`tie_gaps`)."""
    assert found.kept is not None and expected.kept is not None
    what = "kept tokens"
    margins = expected.margins if expected.margins is not None else found.margins
    if len(found.kept) != len(expected.kept) and margins is None:
        return Row(turn, what, 1.0, 0.0, False, f"kept {len(found.kept)}, expected {len(expected.kept)}")
    common = f"{len(np.intersect1d(found.kept, expected.kept))} of {len(expected.kept)} equal"
    if np.array_equal(found.kept, expected.kept):
        return _row(turn, what, 0.0, tolerance, common)
    one, other = (expected, found) if expected.scores is not None else (found, expected)
    if margins is not None:
        gaps = margins[np.setxor1d(found.kept, expected.kept)]
    elif one.scores is None:
        return Row(turn, what, 1.0, tolerance, False, f"{common}; neither side tells the scores")
    else:
        gaps = tie_gaps(one, other)
    ties = int((gaps <= tolerance).sum())
    note = f"{common}; {ties} of the {len(gaps)} others within {tolerance:.0e} of the threshold score (ties)"
    return _row(turn, what, float(gaps.max()), tolerance, note)


def _compare_layers(turn: str, found: Recording, expected: Recording, tolerance: float, differed: bool) -> Row:
    """What every layer kept, up to the first that differs, since later ones judge other states: it must be by ties."""
    assert found.kept_by_layer is not None and expected.kept_by_layer is not None
    what, pairs = "kept tokens", zip(found.kept_by_layer, expected.kept_by_layer, strict=True)
    layer = next((i for i, (have, want) in enumerate(pairs) if not np.array_equal(have, want)), None)
    layers = len(expected.kept_by_layer)
    if layer is None or differed:
        note = "not comparable: other tokens are held" if differed else f"all {layers} layers equal"
        return Row(turn, what, 0.0, tolerance, True, note)
    margins, visual = (expected.layer_margins or found.layer_margins), expected.visual
    if margins is None or visual is None:
        return Row(turn, what, 1.0, tolerance, False, f"layer {layer} differs; neither side tells the margins")
    apart = np.setxor1d(found.kept_by_layer[layer], expected.kept_by_layer[layer])
    gap = dict(zip(visual.tolist(), margins[layer].tolist(), strict=True))
    worst = max(gap.get(token, np.inf) for token in apart.tolist())
    return _row(turn, what, worst, tolerance, f"layer {layer} of {layers}: {len(apart)} tokens by that much of a tie")


def _compare_held(turn: str, found: Recording, expected: Recording, tolerance: float, differed: bool) -> Row:
    """What a cache policy left in every layer and set; others only where they tie with the last one that stays."""
    assert found.held is not None and expected.held is not None
    what, worst, others = "cache entries", 0.0, 0
    if differed:
        return Row(turn, what, 0.0, tolerance, True, "not comparable: other tokens were kept")
    for layer, (have, want) in enumerate(zip(found.held, expected.held, strict=True)):
        if expected.held_ranking is None and not np.array_equal(have, want):
            return Row(turn, what, 1.0, tolerance, False, f"layer {layer} differs; neither side tells its scores")
        for row, (mine, theirs) in enumerate(zip(have, want, strict=True)):
            apart = np.setxor1d(mine, theirs)
            if len(apart) and expected.held_ranking is not None:
                scores = expected.held_ranking[layer][row]
                visual = np.intersect1d(theirs, expected.visual if expected.visual is not None else [])
                last = scores[visual].min() if len(visual) else np.inf
                gaps = np.abs(scores[apart] - last) / max(abs(last), np.finfo(np.float64).tiny)
                worst, others = max(worst, float(gaps.max())), others + len(apart)
    total = sum(one.size for one in expected.held)
    return _row(turn, what, worst, tolerance, f"{total} in all layers and sets; {others} differ, by that much of a tie")


def tie_gaps(one: Recording, other: Recording) -> np.ndarray:
    """How far from the threshold each token lies that only one side kept, relative to the threshold: float64 [n].

    By the scores of ``one``: a token that it kept and the other did not is compared with the best that it dropped, a
    token that it dropped with the worst that it kept. Infinite for a token that is not visual: text is never removed.
    """
    assert one.scores is not None and one.visual is not None and one.kept is not None and other.kept is not None
    score = dict(zip(one.visual.tolist(), one.scores.astype(np.float64).tolist(), strict=True))
    kept = set(one.kept.tolist()) & set(score)
    worst_kept = min((score[token] for token in kept), default=np.inf)
    best_dropped = max((score[token] for token in set(score) - kept), default=-np.inf)
    gaps = []
    for token in np.setxor1d(one.kept, other.kept).tolist():
        if token not in score:
            gaps.append(np.inf)
        else:
            gaps.append(score[token] - best_dropped if token in kept else worst_kept - score[token])
    return np.array(gaps) / max(abs(worst_kept), np.finfo(np.float64).tiny)


def _cache_row_name(layers: Sequence[int]) -> str:
    consecutive = layers[-1] - layers[0] + 1 == len(layers)
    return f"caches, {'' if consecutive else f'{len(layers)} of '}layers {layers[0]}-{layers[-1]}"


def _compare_caches(turn: str, layers: Sequence[int], found: Recording, expected: Recording, tolerance: float) -> Row:
    what = _cache_row_name(layers)
    worst, length, note = 0.0, 0, "entries"
    for layer in layers:
        for have, want in zip(found.caches[layer], expected.caches[layer], strict=True):
            if (window := found.windows.get(layer, expected.windows.get(layer))) is not None:
                have, want = _last_entries(have, want, window)
                note = "last entries"
            if have.shape != want.shape:
                return Row(turn, what, float("inf"), tolerance, False, f"{have.shape} against {want.shape}")
            scale = max(1.0, float(np.abs(want).max(initial=0.0)))
            worst = max(worst, float(np.abs(have.astype(np.float32) - want).max(initial=0.0)) / scale)
            length = have.shape[1]
    return _row(turn, what, worst, tolerance, f"{length} {note}")


def _last_entries(one: np.ndarray, other: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """What two caches [KV, length, Dh] both hold, if that is the window at least; else they as they are."""
    common, most = sorted((one.shape[1], other.shape[1]))
    if common < min(window, most):
        return one, other
    return one[:, one.shape[1] - common :], other[:, other.shape[1] - common :]


def _compare_choices(turn: str, found: np.ndarray, expected: np.ndarray, slack: float) -> Row:
    """Greedy tokens must agree wherever the reference's best token leads by more than twice the tolerance."""
    chosen, wanted = found.argmax(axis=1), expected.argmax(axis=1)
    top_two = np.sort(expected, axis=1)[:, -2:]
    undecided = top_two[:, 1] - top_two[:, 0] <= 2 * slack
    wrong = int(((chosen != wanted) & ~undecided).sum())
    agreeing = int((chosen == wanted).sum())
    return _row(turn, "greedy tokens", wrong, 0.0, f"{agreeing} of {len(wanted)} equal")
