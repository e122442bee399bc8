"""A decoder with norms in numpy, one row at a time, tokens really removed. Imports nothing of ours."""

import numpy as np
from oracles.decoder import softmax


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rotate(x, positions, w):  # [heads, S, Dh]
    (x1, x2), cos, sin = np.split(x, 2, -1), w["cos"][positions], w["sin"][positions]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def forward(w, x, positions, past, stay, k, dh):
    """x [S, D] -> (logits [T, V], kept, caches). ``stay(scores [S])`` names the tokens that go on to layer ``k``; past:
    (K, V) [KV, n, Dh] per layer; k None: all stay."""
    kept, caches, p = np.arange(len(x)), [], None
    for i, layer in enumerate(w["layers"]):
        if i == k:
            kept = stay(None if p is None else p.mean(0)[-1, -len(x) :])
            x, positions = x[kept], positions[kept]
        normed = norm(x, layer["norm1"])
        q, kk, v = (np.moveaxis((normed @ layer[n]).reshape(len(x), -1, dh), 1, 0) for n in "qkv")
        kk = np.concatenate([past[i][0], rotate(kk, positions, w)], 1)
        v = np.concatenate([past[i][1], v], 1)
        caches.append((kk, v))
        seen = np.tril(np.ones((len(x), kk.shape[1])), kk.shape[1] - len(x)).astype(bool)
        logits = rotate(q, positions, w) @ np.repeat(kk, len(q) // len(kk), 0).swapaxes(1, 2) * dh**-0.5
        p = softmax(np.where(seen, logits, -np.inf))
        x = x + np.moveaxis(p @ np.repeat(v, len(q) // len(kk), 0), 0, 1).reshape(len(x), -1) @ layer["o"]
        x = x + np.tanh(norm(x, layer["norm2"]) @ layer["up"]) @ layer["down"]
    return norm(x, w["norm"]) @ w["head"], kept, caches
