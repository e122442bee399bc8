#!/usr/bin/env python3
"""What an export of a full-size model costs: wall time by stage, peak memory, bytes written beside the weights.

Makes a random checkpoint of the size (once, in --work), exports it in a process of its own and watches that process.
--ordinary exports a shortened model beside it the usual way, loaded with from_pretrained and exported with its weights;
--engine builds engines as well; --run asks the bundle a question on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmtrim.export.families import llava
from vlmtrim.export.weights.large import config_of, write_config, write_weights
from vlmtrim.runtime.progress import running

SHARD_BYTES = 5_000_000_000


@dataclass
class Cost:
    """Of one process: seconds, and peaks of all its resident memory and of the part that no file backs, bytes."""

    seconds: float
    resident: int = 0
    anonymous: int = 0
    output: str = ""

    def __str__(self) -> str:
        return (
            f"{self.seconds:7.1f} s   peak {self.resident / 1e9:5.2f} GB, {self.anonymous / 1e9:5.2f} GB without files"
        )


def watch(command: list[str]) -> Cost:
    """Run a command; its standard error goes on to ours. Exits where it fails."""
    start = time.perf_counter()
    cost = Cost(0.0)
    with tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        while process.poll() is None:
            _look(process.pid, cost)
            time.sleep(0.05)
        cost.seconds = time.perf_counter() - start
        stdout.seek(0)
        cost.output = stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return cost


def _look(pid: int, cost: Cost) -> None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmHWM" in fields:
        cost.resident = max(cost.resident, int(fields["VmHWM"].split()[0]) * 1024)
        cost.anonymous = max(cost.anonymous, int(fields["RssAnon"].split()[0]) * 1024)


def make_checkpoint(folder: Path, like: str, layers: int | None) -> None:
    if (folder / "config.json").exists():
        return
    start = time.perf_counter()
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    write_config(fresh, config_of(like, layers=layers))
    with running("weights") as show:
        write_weights(fresh, torch.float16, SHARD_BYTES, progress=show)
    fresh.rename(folder)
    print(f"made {folder} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def written(bundle: Path) -> int:
    """Bytes of the files that the bundle does not share with the checkpoint, engines left out."""
    files = (path for path in bundle.iterdir() if path.suffix != ".engine" and path.stat().st_nlink == 1)
    return sum(path.stat().st_size for path in files)


def ordinary(checkpoint: Path, output: Path) -> None:
    """The usual export: every weight in memory, every weight written again."""
    from vlmtrim.export import checkpoint as checkpoints
    from vlmtrim.export.job import Job
    from vlmtrim.export.job_contract import build_contract
    from vlmtrim.export.tracing.attention import IMPLEMENTATION

    family, config = checkpoints.read_config(checkpoint)
    model = family.MODEL_CLASS.from_pretrained(checkpoint, dtype="auto", attn_implementation=IMPLEMENTATION).eval()
    job = Job(model=str(checkpoint), output="", method=None)
    contract = build_contract(job, family, config, model.dtype, checkpoint)
    output.mkdir()
    for plan in family.plans(model, family.read_shape(config), model.dtype, contract.graphs["decoder"]):
        with torch.no_grad():
            program = torch.onnx.export(
                plan.module,
                tuple(plan.args),
                dynamo=True,
                opset_version=24,
                dynamic_shapes=plan.dynamic_shapes,
                verbose=False,
            )
        assert program is not None
        program.save(output / plan.spec.file, external_data=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--like", default="llava-7b", choices=llava.SIZES)
    parser.add_argument("--work", type=Path, default=Path("build/export"), help="where checkpoints and bundles go")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--r", type=float, default=0.5)
    parser.add_argument("--dtype", default="auto", help="of the bundle")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    parser.add_argument(
        "--ordinary", type=int, metavar="LAYERS", help="compare with the usual export at so many layers"
    )
    parser.add_argument("--engine", default="none", help="build engines too")
    parser.add_argument("--run", type=int, metavar="TOKENS", help="ask a question on ort-cpu")
    parser.add_argument("--ordinary-worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ordinary_worker:
        ordinary(*args.ordinary_worker)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    export(args, args.layers, args.engine)
    if args.ordinary:
        export(args, args.ordinary, "none")
        target = args.work / "ordinary"
        shutil.rmtree(target, ignore_errors=True)
        source = args.work / f"{args.like}-{args.ordinary}"
        cost = watch([sys.executable, __file__, "--ordinary-worker", str(source), str(target)])
        print(f"\n{args.like}, {args.ordinary} layers, the ordinary way\n  export         {cost}")
        print(f"  written        {sum(path.stat().st_size for path in target.iterdir()) / 1e6:.1f} MB")
        shutil.rmtree(target)


def export(args: argparse.Namespace, layers: int | None, engine: str) -> None:
    name = args.like if layers is None else f"{args.like}-{layers}"
    make_checkpoint(args.work / name, args.like, layers)
    bundle = args.work / f"{name}-bundle"
    command = [sys.executable, "-m", "vlmtrim.export.cli", "--model", str(args.work / name), "--output", str(bundle)]
    command += [
        "--k",
        str(args.k),
        "--r",
        str(args.r),
        "--dtype",
        args.dtype,
        "--engine",
        engine,
        "--force",
        "--link-weights",
    ]
    cost = watch(command)
    record: dict[str, Any] = json.loads((bundle / "job.json").read_text())
    checksums = cost.seconds - sum(record["stages"].values())
    print(f"\n{args.like}, {layers or 'all'} layers, --k {args.k} --r {args.r} --dtype {args.dtype} --engine {engine}")
    print(f"  export         {cost}")
    for stage, seconds in record["stages"].items():
        print(f"    {stage:24}{seconds:8.1f} s")
    print(f"    {'start and checksums':24}{checksums:8.1f} s")
    print(f"  beside weights {written(bundle) / 1e6:.1f} MB")
    if engine != "none":
        for name, entry in json.loads((bundle / "engines.json").read_text()).items():
            print(f"    {name:24}{entry['seconds']:8.1f} s {entry['bytes'] / 1e6:10.1f} MB")
    if args.run:
        run(bundle, args.run)


def run(bundle: Path, tokens: int) -> None:
    from vlmtrim.runtime.image import generated_picture

    with tempfile.TemporaryDirectory() as scratch:
        picture = os.path.join(scratch, "picture.png")
        generated_picture(0).save(picture)
        command = [
            sys.executable,
            "-m",
            "vlmtrim.runtime.cli",
            str(bundle),
            "--image",
            picture,
            "--prompt",
            "What is it?",
        ]
        cost = watch([*command, "--max-new-tokens", str(tokens), "--json"])
    answer = json.loads(cost.output)
    times = {name: round(seconds, 1) for name, seconds in answer["times"].items()}
    print(f"  run-vlm        {cost}")
    counts = f"{answer['visual']} visual tokens, {answer['kept']} kept, {len(answer['token_ids'])} tokens"
    print(f"    {counts}; seconds: {times}")


if __name__ == "__main__":
    main()
