"""Which image features stay, given what every head scores. Imports nothing of ours."""


def kept_by_union(scores, numbers, ratio, bound):
    """Ascending indices: each head's best round(ratio * live) features, at least one, never filling (number < 0);
    of a union above floor(bound * n) the best ranks stay, of equal ranks the first heads."""
    live = [j for j, number in enumerate(numbers) if number >= 0]
    count, kept = max(1, round(ratio * len(live))) if live else 0, []
    ranked = [sorted(live, key=lambda j: (-row[j], j))[:count] for row in scores]
    for rank in range(count):
        for best in ranked:
            if best[rank] not in kept and len(kept) < int(bound * len(numbers) + 1e-9):
                kept.append(best[rank])
    return sorted(kept)
