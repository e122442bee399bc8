"""VisionZip's choice of one picture in numpy. Imports nothing of ours."""

import numpy as np


def kept(states, attention, keys, has_class, count, merged):
    """states [T, D], attention [H, T, T], keys [H, T, Dh] -> [count, D]: class token, dominant patches, merged ones."""
    start = int(has_class)
    summed = attention.sum(0)
    paid = summed[0, 1:] if has_class else summed.mean(0)
    order = np.argsort(-paid, kind="stable")
    dominant = np.sort(order[: count - merged - start]) + start
    rest = np.setdiff1d(np.arange(start, len(states)), dominant)
    targets = rest[:: max(1, len(rest) // max(merged, 1))][:merged]
    mean = keys.mean(0)
    mean = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    sums, counts = np.zeros((merged, states.shape[1])), np.zeros(merged)
    for patch in np.setdiff1d(rest, targets) if merged else []:
        nearest = int((mean[targets] @ mean[patch]).argmax())
        sums[nearest] += states[patch]
        counts[nearest] += 1
    means = sums / np.maximum(counts, 1)[:, None]
    return np.concatenate([states[:start], states[dominant], states[targets] + means])
