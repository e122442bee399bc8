"""The rows of gpu_report.py's table, from what its stages measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from vlmtrim.graphs.contract import DTYPE_BYTES
from vlmtrim.runtime.measure import bench


def rows(
    benches: list[Mapping[str, Any]], pytorch: Mapping[str, Any], contract: Any, peak: Any
) -> list[dict[str, Any]]:
    """A row for everything measured; the dense bundle once, as it ran beside the first ratio."""
    out: list[dict[str, Any]] = []
    for report in benches:
        if "failed" in report:
            continue
        for bundle in report["bundles"]:
            name = f"{report['backend']} {bundle['name']}" + (" plain" if report.get("cuda_graphs") == "off" else "")
            if any(row["name"] == name for row in out):
                continue
            found, against = bundle["metrics"], bundle.get("against")
            out.append(
                {
                    "name": name,
                    "ttft": found["ttft"]["median"],
                    "prefill": found["prefill"]["median"],
                    "tpot": found["tpot"]["median"],
                    "bandwidth": found["bandwidth"] and found["bandwidth"]["median"],
                    "share": bundle["share_of_bandwidth"],
                    "speedup": against and against["prefill"]["median"],
                    "predicted": against and against["prefill_by_flops"],
                    "caches": bundle["memory"]["backend"].get("caches"),
                    "contract": bundle["memory"]["caches_by_contract"],
                }
            )
    for name, samples in pytorch.get("samples", {}).items():
        if samples:
            out.append(torch_row(name, samples, pytorch["samples"], contract, peak))
    return out


def torch_row(name: str, samples: list, everything: Mapping[str, list], contract: Any, peak: Any) -> dict[str, Any]:
    """PyTorch's bandwidth is by the host clock; its speed-up is of the time to the first token."""
    middle = {key: statistics.median(sample[key] for sample in samples) for key in ("ttft", "tpot")}
    entries, size = samples[0]["entries"], None
    if entries and contract.macs is not None:
        layer = {2 * g.kv_heads * g.head_size for g in contract.groups}.pop() * DTYPE_BYTES[contract.dtype]
        size = contract.step_bytes([0] * len(contract.groups)) + layer * sum(entries)
    attention, _, what = name.partition(" ")
    dense = everything.get(f"{attention} dense")
    speedup = None
    if what != "dense" and dense:
        speedup = statistics.median(a["ttft"] / b["ttft"] for a, b in zip(dense, samples, strict=False))
    bandwidth = size and size / middle["tpot"]
    return {
        "name": f"PyTorch {name}",
        **middle,
        "prefill": None,
        "bandwidth": bandwidth,
        "share": bench.share(bandwidth, peak.bandwidth),
        "speedup": speedup,
        "predicted": None,
        "caches": samples[0]["caches"],
        "contract": None,
    }


def line(row: Mapping[str, Any]) -> str:
    cell = lambda value, form, width, unit=1.0: f"{'-' if value is None else format(value * unit, form):>{width}}"  # noqa: E731
    caches = cell(row["caches"], ".3f", 10, 1e-6)
    if row["contract"] is not None:
        exact = "=" if row["caches"] == row["contract"] else "!="
        caches += f" ({exact} {row['contract'] / 1e6:.3f})"
    return (
        f"{row['name']:26}{cell(row['ttft'], '.2f', 9, 1e3)}{cell(row['prefill'], '.2f', 9, 1e3)}"
        f"{cell(row['tpot'], '.2f', 9, 1e3)}{cell(1 / row['tpot'], '.1f', 9)}{cell(row['bandwidth'], '.1f', 8, 1e-9)}"
        f"{cell(row['share'], '.1%', 8)}{cell(row['speedup'], '.2f', 9)}{cell(row['predicted'], '.2f', 9)}  {caches}"
    )
