"""Whether a step fits: the caches' room, the pictures of a prompt, and what the decoder says that it kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtrim.graphs.contract import IMAGES, Contract
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.base import Pictures


def visual_tokens(contract: Contract, pictures: Pictures | None, rows: int = 1) -> int:
    """Visual tokens, or image features, that the pictures of so many rows bring to each."""
    if pictures is None:
        return 0
    if contract.crosses:
        return len(pictures.tokens) * contract.image_tokens // rows
    return sum(pictures.tokens) // rows


def check_pictures(contract: Contract, brought: Sequence[Sequence[int]]) -> None:
    """Raise RuntimeRefusal where a row's pictures bring more visual tokens than a step takes; ``brought`` by row and
    picture."""
    most, longest = contract.dims["N"][1], contract.dims["S"][1]
    if max(map(sum, brought)) > most:
        what = "step" if longest < contract.max_seq_len else "conversation"
        raise RuntimeRefusal(
            f"{max(map(len, brought))} images of {max(map(sum, brought))} visual tokens for one prompt; a "
            f"{what} of {longest} tokens holds at most {most} of them"
        )


def check_room(contract: Contract, entries: Sequence[np.ndarray], tokens: int, visual: int) -> None:
    """Raise RuntimeRefusal where a step does not fit into the caches.

    Args:
        contract: of the bundle.
        entries: of every group that the caches hold before it, int64 [B] each.
        tokens: of the longest row.
        visual: visual tokens, or image features, of each row.
    """
    longest, rows = contract.dims["S"][1], len(entries[0])
    if contract.max_seq_len > longest < tokens and (visual or rows > 1):  # the text of one row goes in several steps
        what = "pictures" if visual else f"{rows} rows"
        raise RuntimeRefusal(
            f"the prompt has {tokens} tokens ({visual} visual), a step with {what} takes {longest}: shorten it, say it "
            "in several turns, or export with a larger --max-input-len"
        )
    for group, filled in zip(contract.groups, entries, strict=True):
        if group.window:  # there is room for a window and the longest step
            continue
        needed = int(filled.max()) + group.length(tokens, visual)
        if needed > group.capacity and group.source == IMAGES:
            held, each, brings = int(filled.max()), contract.image_tokens, group.length(tokens, visual)
            raise RuntimeRefusal(
                f"{visual // each} picture(s) of {each} features bring up to {brings} entries, "
                f"the caches of the cross-attention layers hold {held} of at most {group.capacity}: give fewer "
                f"pictures, {'reset the conversation, ' if held else ''}or export with more --images"
            )
        if needed > group.capacity:
            full = int(filled.max())
            raise RuntimeRefusal(
                f"the prompt has {tokens} tokens ({visual} visual), {full} are in the caches; layers "
                f"{group.layers[0]}-{group.layers[-1]} would hold {needed}, their capacity is {group.capacity}: "
                "shorten the prompt, reset the conversation, or export with a larger --max-seq-len"
            )


def check_kept(contract: Contract, kept: int, tokens: int, visual: int) -> None:
    """Refuse a graph that keeps another number of tokens than the contract says: the caches' lengths would lie."""
    promised = contract.groups[-1].length(tokens, visual)
    if kept != promised:
        raise RuntimeRefusal(
            f"the decoder kept {kept} of {tokens} tokens ({visual} visual), its contract promises {promised}; "
            "export the model again"
        )
