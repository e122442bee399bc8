"""A decode step of the toy decoder in numpy in which some layers attend to chosen entries. Imports nothing of ours."""

import numpy as np
from oracles.decoder import rotate, softmax


def step(w, x, position, past, entries, selecting):
    """x [D], past: (K, V) [KV, n, Dh] per layer -> (logits, sets of chosen entries by layer and key head, caches)."""
    (heads, kv, dh), chosen, caches, mask = w["sizes"], {}, [], None
    for i, layer in enumerate(w["layers"]):
        q, k, v = ((x @ layer[n]).reshape(-1, 1, dh) for n in "qkv")
        at = np.array([position])
        q, k = rotate(q, at, w["freq"]), rotate(k, at, w["freq"])
        k, v = np.concatenate([past[i][0], k], 1), np.concatenate([past[i][1], v], 1)
        caches.append((k, v))
        logits = np.einsum("gd,gnd->gn", q[:, 0], np.repeat(k, heads // kv, 0)) * dh**-0.5
        if i in selecting:
            p = softmax(logits).reshape(kv, heads // kv, -1).mean(1)
            p[:, -1] = np.inf
            chosen[i] = [set(np.argsort(-row, kind="stable")[:entries].tolist()) for row in p]
            mask = np.array([[n in chosen[i][h * kv // heads] for n in range(k.shape[1])] for h in range(heads)])
        elif mask is not None:
            logits = np.where(mask, logits, -np.inf)
        x = x + np.einsum("gn,gnd->gd", softmax(logits), np.repeat(v, heads // kv, 0)).reshape(-1) @ layer["o"]
        x = x + np.tanh(x @ layer["m"])
    return x @ w["head"], chosen, caches
