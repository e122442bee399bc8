#!/usr/bin/env python3
"""Inputs for `polygraphy run --load-inputs`: what the graphs of a bundle are fed in a real conversation.

Polygraphy draws random inputs, and random indices lie outside the tables they point into. This runs a picture, a
question and one decode step on ONNX Runtime and writes OUT/<graph>.json for every graph, one set of inputs a run; then
it prints, for every graph, the command that compares ONNX Runtime with TensorRT on them, with the profiles of the
bundle's engines.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.json import save_json

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import TOLERANCE
from vlmtrim.runtime.measure.watch import Run, watch

RULES = {
    "vision": profiles.vision_profiles,
    "embed": profiles.decoder_profiles,
    "decoder": profiles.decoder_profiles,
}


def feeds_of(folder: Path, images: list[Any], prompt: str) -> dict[str, list[dict[str, np.ndarray]]]:
    """Graph -> the inputs of each of its runs: the prefill, then one decode step, caches as they were before it."""
    backend = runtime.make_backend("ort-cpu")
    seen: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)

    def host(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: v if isinstance(v, np.ndarray) else backend.to_host(v) for name, v in values.items()}

    def note(graph: str, feeds: Mapping[str, Any], run: Run) -> dict[str, Any]:
        seen[graph].append(host({**feeds, **(chat.session.caches if graph == "decoder" else {})}))
        return run(feeds)

    chat = runtime.Chat(runtime.Session(open_bundle(folder), watch(backend, note)))
    list(chat.generate(prompt, images, max_new_tokens=2))
    return dict(seen)


def command(folder: Path, contract: Contract, graph: str, inputs: Path) -> str:
    """The comparison of one graph."""
    spec = contract.graphs[graph]
    parts = [f"polygraphy run {folder / spec.file} --onnxrt --trt --strongly-typed --load-inputs {inputs}"]
    symbols = {dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)}
    for ranges in RULES[graph](contract).values():
        own = {dim: limits for dim, limits in ranges.items() if dim in symbols}
        shapes = {tensor.name: profiles.shapes(tensor, own) for tensor in spec.inputs}
        for index, option in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
            named = " ".join(f"{name}:[{','.join(map(str, sizes[index]))}]" for name, sizes in shapes.items())
            parts.append(f"{option} {named}")
    tolerance = TOLERANCE[contract.dtype]
    parts.append(f"--rtol {tolerance:g} --atol {tolerance:g}")
    return " \\\n  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path, help="folder for the inputs")
    parser.add_argument("--image", action="append", default=[], help="picture file; repeat for several")
    parser.add_argument("--prompt", default="What is in the picture?")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    contract = open_bundle(args.bundle).contract
    for graph, feeds in feeds_of(args.bundle, args.image or [generated_picture(0)], args.prompt).items():
        path = args.output / f"{graph}.json"
        save_json(feeds, str(path))
        print(command(args.bundle, contract, graph, path), end="\n\n")


if __name__ == "__main__":
    main()
