#!/usr/bin/env python3
"""Writes a random checkpoint of a published size, so that exports can be tried at full size without a download."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from vlmtrim.export.checkpoint import published_sizes
from vlmtrim.export.weights.large import config_of, write_config, write_weights
from vlmtrim.runtime.progress import running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--like", required=True, choices=published_sizes(), help="whose shapes, names and shards")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file")
    parser.add_argument("--tied", action="store_true", help="one matrix for token embedding and output")
    parser.add_argument("--new-names", action="store_true", help="today's tensor names instead of the hub's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "config.json").exists():
        parser.error(f"{args.output} holds a checkpoint already; give another folder")
    write_config(args.output, config_of(args.like, args.dtype, args.layers, args.tied))
    shard_bytes = int(args.shard_gb * 1e9)
    with running("weights") as show:
        write_weights(args.output, getattr(torch, args.dtype), shard_bytes, args.seed, not args.new_names, show)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"{args.output}: {size / 1e9:.2f} GB of {args.dtype} weights", file=sys.stderr)


if __name__ == "__main__":
    main()
