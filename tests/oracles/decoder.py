"""The toy decoder in numpy, one row at a time, tokens really removed. Imports nothing of ours."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x, positions, freq):  # [heads, S, Dh]
    a, (x1, x2) = positions[:, None] * freq, np.split(x, 2, -1)
    return np.concatenate([x1 * np.cos(a) - x2 * np.sin(a), x2 * np.cos(a) + x1 * np.sin(a)], -1)


def forward(w, x, positions, visual, past, k, r, score="last-row"):
    """x [S, D] -> (logits, kept, caches); past: list of (K, V) [KV, n, Dh] per layer; k None: nothing is removed."""
    return staged(w, x, positions, visual, past, {} if k is None else {k: 1 - r}, score)


def staged(w, x, positions, visual, past, stages, score):
    """With any number of selections: stages {layer: share of the visual tokens that stays from it on}."""
    kept, (heads, kv, dh), caches, scores = np.arange(len(x)), w["sizes"], [], None
    left = list(visual)  # of the step's own tokens
    for i, layer in enumerate(w["layers"]):

        def attention(x, positions, layer, rope):
            q, kk = (np.moveaxis((x @ layer[n]).reshape(len(x), -1, dh), 1, 0) for n in "qk")
            if rope:
                q, kk = rotate(q, positions, w["freq"]), rotate(kk, positions, w["freq"])
            return softmax(np.einsum("hd,hsd->hs", q[:, -1], np.repeat(kk, heads // kv, 0)) * dh**-0.5).mean(0)

        if i in stages:
            if score == "own-row":
                scores = attention(x, positions, layer, True)
            of = dict(zip(kept.tolist(), scores, strict=True))
            order = sorted(left, key=lambda token: (-of[token], token))
            gone = set(order[round(len(visual) * stages[i]) :])
            left = [token for token in left if token not in gone]
            stay = np.array([j for j, token in enumerate(kept) if token not in gone])
            x, positions, kept = x[stay], positions[stay], kept[stay]
        plain = attention(x, positions, layer, False)
        q, kk, v = (np.moveaxis((x @ layer[n]).reshape(len(x), -1, dh), 1, 0) for n in "qkv")
        q, kk = rotate(q, positions, w["freq"]), rotate(kk, positions, w["freq"])
        kk, v = np.concatenate([past[i][0], kk], 1), np.concatenate([past[i][1], v], 1)
        caches.append((kk, v))
        seen = np.tril(np.ones((len(x), kk.shape[1])), kk.shape[1] - len(x)).astype(bool)
        p = softmax(np.where(seen, q @ np.repeat(kk, heads // kv, 0).swapaxes(1, 2) * dh**-0.5, -np.inf))
        scores = plain if score == "no-rope" else p.mean(0)[-1, -len(x) :]
        x = x + np.moveaxis(p @ np.repeat(v, heads // kv, 0), 0, 1).reshape(len(x), -1) @ layer["o"]
        x = x + np.tanh(x @ layer["m"])
    return x[-1] @ w["head"], kept, caches
