"""trim-onnx: a decoder that others exported, with visual tokens dropped inside. Needs the extra ``graphs`` alone."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.methods import make_method, parameters
from vlmtrim.graphs.rules import described

_METHOD = "fastv"
_DESCRIPTION = """\
Insert FastV into a decoder that optimum, transformers.js, mobius-onnx, onnxruntime-genai or torch.onnx.export wrote:
inputs_embeds, attention_mask, position_ids, past_key_values.L.key/value -> logits, present.L.key/value. The result has
the same boundary, the input visual_positions [B, N] (places of the visual tokens, ascending; [B, 0] in a step without)
and the output kept_indices. attention_mask and position_ids go on counting all tokens. Weights stay where they are."""


def parser() -> argparse.ArgumentParser:
    """Arguments of trim-onnx; those of the selection are the fields of the method."""
    p = argparse.ArgumentParser(
        prog="trim-onnx",
        description=_DESCRIPTION,
        epilog="Example: trim-onnx model.onnx trimmed.onnx --k 2 --r 0.5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("decoder", metavar="IN.onnx", type=Path, help="the decoder")
    p.add_argument(
        "output", metavar="OUT.onnx", type=Path, help="the result: in the folder of the weights, or above it"
    )
    for name, settings in parameters(_METHOD).items():
        p.add_argument(f"--{name}", **settings)
    p.add_argument("--list", action=_List, help="print what visual tokens can be ranked by, and exit")
    p.add_argument(
        "--grid", type=_grid, metavar="ROWSxCOLUMNS", help="of a picture's visual tokens, e.g. 24x24 (LLaVA-1.5)"
    )
    p.add_argument("--most-visual", type=_count, default=0, metavar="N", help="visual tokens of a step at most (16384)")
    p.add_argument("--force", action="store_true", help="replace OUT.onnx")
    return p


class _List(argparse.Action):
    """Like --help: prints and exits, whatever else is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(["scores (--score)", *described()]))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the decoder cannot be trimmed, 2 bad arguments."""
    args = parser().parse_args(argv)
    try:
        given = {name: value for name in parameters(_METHOD) if (value := getattr(args, name)) is not None}
        method = make_method(_METHOD, **given)
        _check_output(args)
    except ValueError as error:
        print(f"trim-onnx: {error}", file=sys.stderr)
        return 2
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnx_ir")):
        print("trim-onnx: onnx and onnx-ir are missing; install vlmtrim[graphs]", file=sys.stderr)
        return 1
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # it says more than one sentence of a broken graph
    try:
        print(trim_file(args.decoder, args.output, method, args.grid, args.most_visual))
    except (GraphError, ValueError) as error:
        print(f"trim-onnx: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"trim-onnx: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    return 0


def trim_file(
    source: Path, target: Path, method: Any, grid: tuple[int, int] | None = None, most_visual: int = 0
) -> str:
    """Read a decoder, insert a method, write the result beside its weights; returns what to know about it.

    Raises GraphError or OSError, and leaves nothing behind then.
    """
    from vlmtrim.graphs.files import load
    from vlmtrim.graphs.foreign.boundary import is_foreign, recognise
    from vlmtrim.graphs.foreign.files import save_beside

    model = load(source)
    if not is_foreign(model):
        raise GraphError(
            f"{source} is no decoder with caches that grow: expected inputs past_key_values.L.key/value and none of "
            "write_indices; decoders of export-vlm take a method when they are exported"
        )
    layers = len(recognise(model).caches)
    method(model, visual_tokens=most_visual, grid=grid)
    files = save_beside(model, target)
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    seen = f"layers 0 to {method.k - 1} see all tokens, " if method.k else ""
    return "\n".join(
        [
            f"{target}: {seen}layers {method.k} to {layers - 1} the text and round({1 - method.r:.6g} N) of N visual "
            f"tokens (score {method.rule})",
            f"inputs:  those of {source}, and visual_positions int64 [B, N]",
            f"outputs: logits {logits.shape}, present.L.key/value, and kept_indices int64 [B, T]",
            f"weights: {', '.join(map(str, files)) or 'inside'}",
        ]
    )


def _check_output(args: argparse.Namespace) -> None:
    if args.output.resolve() == args.decoder.resolve():
        raise ValueError(f"{args.output} is the decoder itself; give another name for the result")
    if args.output.is_dir():
        raise ValueError(f"{args.output} is a folder; give a file name in it")
    if args.output.exists() and not args.force:
        raise ValueError(f"{args.output} exists; give another name, or --force to replace it")
    if not args.output.resolve().parent.is_dir():
        raise ValueError(f"{args.output.parent} is no folder; make it first")


def _grid(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no grid such as 24x24")
    return int(sides[0]), int(sides[1])


def _count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 to {1 << 20}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
