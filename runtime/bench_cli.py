"""bench-vlm: times, rates and memory of bundles, side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmtrim.graphs.bundle import BundleError, open_bundle
from vlmtrim.runtime.backends.tensorrt import CUDA_GRAPHS
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture, load_image
from vlmtrim.runtime.measure import bench
from vlmtrim.runtime.measure.bench_table import table
from vlmtrim.runtime.measure.machine import Peak
from vlmtrim.runtime.select_backend import ACTIVATIONS, AUTO, BACKENDS


def parser() -> argparse.ArgumentParser:
    """Arguments of bench-vlm."""
    p = argparse.ArgumentParser(
        prog="bench-vlm",
        description="Measure bundles side by side: vision, prefill, decode, TTFT, TPOT, bandwidth, memory, and what "
        "pruning gains over the unpruned bundle where one is among them.",
        epilog="Example: bench-vlm bundles/demo-dense bundles/demo-fastv-k2-r0.5 --new-tokens 32",
    )
    p.add_argument("bundle", nargs="+", help="bundle folders; they take turns in every round")
    p.add_argument(
        "--backend", default=AUTO, choices=(AUTO, *BACKENDS), help="what runs them (default: the fastest here)"
    )
    p.add_argument("--image", action="append", default=[], help="picture file; repeat for several")
    p.add_argument("--images", type=int, default=1, help="generated pictures where no --image is given (default 1)")
    p.add_argument("--prompt", default="What is in the picture?", help="question")
    p.add_argument("--prompt-tokens", type=int, default=None, metavar="N", help="fill the prompt up to N tokens")
    p.add_argument("--new-tokens", type=int, default=32, help="greedy tokens a conversation (default 32)")
    p.add_argument("--repeat", type=int, default=5, help="rounds that count (default 5)")
    p.add_argument("--warmup", type=int, default=1, help="rounds before them (default 1)")
    p.add_argument(
        "--cuda-graphs", default="auto", choices=CUDA_GRAPHS, help="how TensorRT's decode steps are replayed (auto)"
    )
    p.add_argument(
        "--activations",
        default=ACTIVATIONS[0],
        choices=ACTIVATIONS,
        help="what ONNX Runtime multiplies packed weights by (default int8; float32 is exact and slow)",
    )
    p.add_argument("--cache-share", type=float, metavar="S", help="what cache policies leave (default: the bundles')")
    p.add_argument("--peak-bandwidth", type=float, default=None, metavar="GB/S", help="of the device's memory, at best")
    p.add_argument("--peak-flops", type=float, default=None, metavar="TFLOP/S", help="of the device, at best")
    p.add_argument("--json", metavar="OUT", default=None, help="also write every sample, versions and digests here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the work failed, 2 bad input."""
    args = parser().parse_args(argv)
    try:
        report = _run(args)
    except (BundleError, RuntimeRefusal) as error:
        print(f"bench-vlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(report))
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            print(f"bench-vlm: {args.json} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _run(args: argparse.Namespace) -> dict:
    if args.images < 0:
        raise RuntimeRefusal(f"--images is {args.images}; give 0 or more")
    if not args.image:
        most = min(open_bundle(bundle).contract.max_images for bundle in args.bundle)
        if args.images > max(most, 1):
            raise RuntimeRefusal(f"--images is {args.images}; a prompt of these bundles holds at most {max(most, 1)}")
    images = tuple(map(load_image, args.image)) or tuple(map(generated_picture, range(args.images)))
    rounds = (args.repeat, args.warmup, args.cuda_graphs, args.activations, args.cache_share)
    work = bench.Work(args.prompt, images, args.prompt_tokens, args.new_tokens, *rounds)
    scaled = (value and value * unit for value, unit in ((args.peak_bandwidth, 1e9), (args.peak_flops, 1e12)))
    return bench.measure(args.bundle, args.backend, work, Peak(*scaled))


if __name__ == "__main__":
    sys.exit(main())
