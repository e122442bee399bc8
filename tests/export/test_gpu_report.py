"""The report's stages on a CPU, FastV in PyTorch against the reference, and the table's arithmetic."""

import json

import gpu_report
import gpu_table
import numpy as np
import pytest
import torch
from torch_fastv import TorchFastV

from vlmtrim.export.families import llava
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import CacheGroup, Macs
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.measure.machine import Peak
from vlmtrim.runtime.processors.base import load_processor


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fastv_in_pytorch_drops_what_the_reference_drops(fastv_bundle, attention):
    contract = open_bundle(fastv_bundle).contract
    ids, picture = [256, 5, *[259] * 16, *range(40, 60)], generated_picture(3)
    expected, tokens = Reference(llava.MODEL_CLASS, fastv_bundle, dict(contract.selection)).record(
        Turn("t", ids, (picture,)), 4
    )
    model = llava.MODEL_CLASS.from_pretrained(fastv_bundle, dtype=torch.float32, attn_implementation=attention).eval()
    run = TorchFastV(model, contract.selection["k"], contract.selection["r"], attention)
    pixels = load_processor(Folder(fastv_bundle), contract)([picture]).inputs["pixel_values"]
    logits = [run.prefill(torch.tensor([ids]), torch.from_numpy(pixels))]
    logits += [run.decode(torch.tensor([[token]])) for token in tokens]
    np.testing.assert_array_equal(run.kept.numpy(), expected.kept)
    np.testing.assert_allclose(torch.stack(logits).numpy(), expected.logits, atol=1e-4)
    lengths = [layer.keys.shape[2] for layer in run.cache.layers]
    assert lengths == [len(ids) + 4] * 2 + [len(ids) - 8 + 4] * 2


def test_every_stage_runs_and_is_skipped_when_done(tmp_path, capsys):
    argv = ["--like", "tiny", "--work", str(tmp_path), "--r", "0.5", "--images", "2", "--new-tokens", "3"]
    assert gpu_report.main([*argv, "--rounds", "1", "--tokens", "80"]) == 0
    first = capsys.readouterr().out
    assert all(f"{stage}: " in first for stage in gpu_report.STAGES)
    report = json.loads((tmp_path / "report.json").read_text())
    by_name = {row["name"]: row for row in report["rows"]}
    assert list(by_name) == [
        "ort-cpu dense",
        "ort-cpu r0.5",
        *(f"PyTorch {a} {what}" for what in ("dense", "r0.5") for a in ("eager", "sdpa")),
    ]
    assert all(row["ttft"] > 0 and row["tpot"] > 0 and row["bandwidth"] > 0 for row in report["rows"])
    pruned = by_name["ort-cpu r0.5"]
    assert pruned["caches"] == pruned["contract"] and pruned["predicted"] > 1 and "(= " in first
    # Two layers keep all of 80 + 2 entries, two drop 16 of 32 visual tokens; 2 key/value heads of 64 float32 numbers.
    assert by_name["PyTorch eager r0.5"]["caches"] == 2 * 2 * 64 * 4 * (2 * 82 + 2 * 66)
    assert report["failed"] == {"PyTorch compiled dense": "transformers compiles on CUDA only"}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json") if path.name != "report.json"}
    assert gpu_report.main([*argv, "--rounds", "1", "--tokens", "80"]) == 0
    assert capsys.readouterr().out.count("there already") == 3
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    side = gpu_report.Torch(gpu_report.parse([*argv, "--tokens", "80"]))
    static, dynamic = side.compiled(), side.dense("sdpa")
    assert static["ttft"] > 0 and static["tpot"] > 0 and dynamic["entries"] == [82] * 4


def test_a_backend_that_does_not_work_is_told_with_its_reason(fastv_bundle, tmp_path):
    args = gpu_report.parse(["--like", "tiny", "--work", str(tmp_path), "--tokens", "9"])
    reason = gpu_report.bench_pair(args, "ort-nowhere", [fastv_bundle, fastv_bundle], tmp_path / "out.json")
    assert "ort-nowhere" in reason and "\n" not in reason


class Contract:
    dtype = "float16"
    groups = (CacheGroup((0, 1), 100, 4, 8), CacheGroup((2,), 50, 4, 8, 0.5))
    macs = Macs(1000, 10, 500)

    def step_bytes(self, entries):
        return 7000  # 3 layers of 1000 weights and 500 of the logits, 2 bytes each


def torch_sample(ttft, tpot):
    return {"ttft": ttft, "tpot": tpot, "caches": 12345, "entries": [30, 30, 20]}


def test_the_table_adds_up():
    """By hand: 7,000 bytes of weights and 2 * 4 * 8 * 2 * 80 = 10,240 of caches in half a second, of 100 kB/s."""
    samples = {
        "eager dense": [torch_sample(4.0, 1.0), torch_sample(6.0, 1.0)],
        "eager r0.5": [torch_sample(2.0, 0.5)] * 2,
    }
    row = gpu_table.torch_row("eager r0.5", samples["eager r0.5"], samples, Contract(), Peak(1e5, None))
    assert row["bandwidth"] == 17240 / 0.5 and row["share"] == pytest.approx(0.3448)
    assert row["speedup"] == 2.5 and row["ttft"] == 2.0
    metrics = {name: {"median": value} for name, value in (("ttft", 0.3), ("prefill", 0.2), ("tpot", 0.02))}
    bundle = {
        "name": "r0.5",
        "metrics": {**metrics, "bandwidth": {"median": 2.5e12}},
        "share_of_bandwidth": 0.75,
        "against": {"prefill": {"median": 1.7}, "prefill_by_flops": 1.8},
        "memory": {"backend": {"caches": 4_000_000}, "caches_by_contract": 4_000_000},
    }
    reports = [{"backend": "b", "bundles": [bundle]}, {"backend": "c", "failed": "no GPU"}]
    (found,) = gpu_table.rows(reports, {}, Contract(), Peak(None, None))
    cells = gpu_table.line(found).split()
    assert cells == [
        "b",
        "r0.5",
        "300.00",
        "200.00",
        "20.00",
        "50.0",
        "2500.0",
        "75.0%",
        "1.70",
        "1.80",
        "4.000",
        "(=",
        "4.000)",
    ]
