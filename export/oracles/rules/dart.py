"""Eight pivots of largest L1 norm, each of which takes the tokens left that are least like it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from vlmtrim.export.oracles.rules import Seen


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.seam is not None and seen.embeds is not None
    keys = seen.embeds if seen.rotated is None else seen.rotated.transpose(0, 1).flatten(1)
    norms = keys[visual].abs().sum(dim=1)
    chosen = norms.sort(descending=True, stable=True).indices.tolist()[:8]
    states = normalize(seen.seam[visual], dim=1)
    each = -(-max(count - 8, 0) // 8)
    for pivot in list(chosen):
        likeness = states @ states[pivot]
        order = likeness.sort(stable=True).indices.tolist()
        chosen += [token for token in order if token not in chosen][:each]
    return chosen, -norms
