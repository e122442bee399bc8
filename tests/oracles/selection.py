"""Which tokens survive, given scores. Imports nothing of ours."""


def kept_by_score(tokens, visual, scores, r):
    """Indices that survive: all text, and the round(N (1 - r)) visual tokens of highest score, lowest index first."""
    count = round(len(visual) * (1 - r))
    order = sorted(range(len(visual)), key=lambda j: (-scores[j], j))
    gone = set(visual) - {visual[j] for j in order[:count]}
    return [t for t in range(tokens) if t not in gone]


def kept_by_stride(tokens, visual, r, seed):
    """The same with visual token number floor((i N + seed mod N) / M) for i in 0 .. M - 1."""
    n, m = len(visual), round(len(visual) * (1 - r))
    chosen = {visual[(i * n + seed % n) // m] for i in range(m)}
    return [t for t in range(tokens) if t not in set(visual) - chosen]
