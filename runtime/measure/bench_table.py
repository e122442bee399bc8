"""What :func:`vlmtrim.runtime.measure.bench.measure` found, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(report: Mapping[str, Any]) -> str:
    """The record as text, a column a bundle."""
    bundles = report["bundles"]
    driver = f", driver {report['driver']}" if report["driver"] else ""
    dtypes = "/".join(sorted({bundle["dtype"] for bundle in bundles}))
    lengths = sorted({(bundle["tokens"], bundle["visual"]) for bundle in bundles})
    prompts = "; ".join(f"{tokens} tokens, {visual} visual" for tokens, visual in lengths)
    lines = [
        f"{report['date']}, {report['device']}{driver}, {report['backend']}, {dtypes}",
        f"prompt of {prompts}; {report['new_tokens']} new tokens; medians of {report['rounds']} rounds, "
        "+- half their range",
        "",
    ]
    rows = [(title, [cell(bundle) for bundle in bundles]) for title, cell in ROWS]
    width = 2 + max(len(text) for _, cells in rows for text in cells)
    lines += [
        f"{title:22}" + "".join(f"{text or '-':>{width}}" for text in cells) for title, cells in rows if any(cells)
    ]
    lines.append(f"process: {report['peak_rss'] / 1e9:.2f} GB resident at its peak")
    if report["device_memory_used"] is not None:
        lines[-1] += f"; device: {report['device_memory_used'] / 1e9:.2f} GB in use at the end"
    return "\n".join(lines)


def _timed(name: str, unit: float = 1e3, label: str = "ms") -> Any:
    def cell(bundle: Mapping[str, Any]) -> str:
        found = bundle["metrics"][name]
        if not found or not found["median"]:
            return ""
        spread = (found["max"] - found["min"]) / found["median"] / 2
        return f"{found['median'] * unit:.2f} {label} +-{spread:.0%}"

    return cell


def _percent(name: str) -> Any:
    return lambda bundle: "" if bundle[name] is None else f"{bundle[name]:.1%}"


def _speedup(name: str, predicted: str | None) -> Any:
    def cell(bundle: Mapping[str, Any]) -> str:
        if "against" not in bundle:
            return ""
        said = bundle["against"].get(predicted) if predicted else None
        expected = f" (by {predicted.rpartition('_')[2]} {said:.2f})" if predicted and said else ""
        return f"{bundle['against'][name]['median']:.2f}x{expected}"

    return cell


def _caches(bundle: Mapping[str, Any]) -> str:
    found = bundle["memory"]
    if found["caches_as_predicted"] is None:
        return f"{found['caches_by_contract'] / 1e6:.1f} MB"
    held = found["backend"]["caches"]
    verdict = "as the contract" if found["caches_as_predicted"] else f"contract {found['caches_by_contract'] / 1e6:.1f}"
    return f"{held / 1e6:.1f} MB {verdict}"


def _groups(bundle: Mapping[str, Any]) -> str:
    """Bytes of the caches of each group, as the contract has them."""
    groups = bundle["memory"]["groups"]
    return "" if len(groups) < 2 else " + ".join(f"{group['bytes'] / 1e6:.1f}" for group in groups)


ROWS: tuple[tuple[str, Any], ...] = (
    ("", lambda bundle: bundle["name"]),
    ("visual tokens kept", lambda bundle: f"{bundle['kept']} of {bundle['visual']}"),
    ("vision", _timed("vision")),
    ("embed", _timed("embed")),
    ("prefill", _timed("prefill")),
    ("cutting the caches", _timed("caches")),
    ("decode, one token", _timed("decode")),
    ("TTFT", _timed("ttft")),
    ("TPOT", _timed("tpot")),
    ("tokens/s", lambda bundle: f"{bundle['tokens_per_second']:.1f}"),
    ("decode bandwidth", _timed("bandwidth", 1e-9, "GB/s")),
    ("  share of peak", _percent("share_of_bandwidth")),
    ("prefill, share of peak", _percent("share_of_flops")),
    ("caches", _caches),
    ("  by group, MB", _groups),
    ("  filled in the end", lambda bundle: f"{bundle['memory']['entries'] / 1e6:.1f} MB"),
    ("prefill speed-up", _speedup("prefill", "prefill_by_flops")),
    ("TTFT speed-up", _speedup("ttft", None)),
    ("decode speed-up", _speedup("decode", "decode_by_bytes")),
)
