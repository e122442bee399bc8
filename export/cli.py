"""export-vlm: argv -> Job -> pipeline."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtrim.export.job import DTYPES, ENGINES, SCORES, Refusal
from vlmtrim.export.requirements import missing_extra
from vlmtrim.graphs.methods import method_names


def parser() -> argparse.ArgumentParser:
    """Arguments of export-vlm; their names are the fields of Job."""
    p = argparse.ArgumentParser(
        prog="export-vlm",
        description="Export a vision-language model to an ONNX bundle that drops visual tokens inside the decoder.",
        epilog="Example: export-vlm --model demo --k 2 --r 0.5",
    )
    p.add_argument("--list", action=_List, help="print families, presets, methods and what is proven, and exit")
    p.add_argument("--model", required=True, help="demo, a preset (--list), tiny:<family>, folder or hub id")
    _add_method_arguments(p)
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights; auto keeps the checkpoint's")
    p.add_argument(
        "--max-seq-len", type=int, default=None, help="tokens of a conversation (default: 2048 or the model's)"
    )
    p.add_argument("--max-batch", type=int, default=1, help="rows that run at once (default 1)")
    p.add_argument(
        "--images", type=int, default=1, help="images a full-length conversation holds; sizes the later caches"
    )
    p.add_argument(
        "--image-tokens",
        type=int,
        default=0,
        help="visual tokens of one picture at most, where pictures may have any size (default: half of --max-seq-len "
        "over --images); larger pictures are scaled down",
    )
    p.add_argument("--output", default=None, help="bundle folder (default: bundles/<model>-<method>)")
    p.add_argument("--engine", default="none", choices=ENGINES, help="TensorRT engines to build as well")
    p.add_argument(
        "--engine-shards",
        type=_shards,
        default=0,
        metavar="auto|N",
        help="cut the decoder into N engines of consecutive layers; auto (default): as few as memory allows",
    )
    p.add_argument("--copy-weights", action="store_true", help="copy the checkpoint's files instead of linking them")
    p.add_argument(
        "--clip-overflow", action="store_true", help="clip weights that do not fit --dtype instead of refusing them"
    )
    p.add_argument("--max-memory", type=float, default=None, metavar="GB", help="refuse a job that needs more memory")
    p.add_argument("--dry-run", action="store_true", help="print job, contract, sizes and operators; load no weights")
    p.add_argument("--force", action="store_true", help="replace an existing bundle")
    return p


class _List(argparse.Action):
    """Like --help: prints and exits, whatever else is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if problem := missing_extra():
            parser.exit(2, f"export-vlm: {problem}\n")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from vlmtrim.export import listing

        print(listing.text())
        parser.exit()


def _add_method_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--method",
        default="fastv",
        choices=(*method_names(), "none"),
        help="what selects visual tokens (default fastv); takes its own arguments alone",
    )
    p.add_argument("--k", type=int, help="fastv: decoder layers that run on all tokens (default 2)")
    p.add_argument("--r", type=float, help="fastv: share of visual tokens REMOVED, 0 <= r < 1 (0.5)")
    p.add_argument(
        "--score",
        choices=SCORES,
        help="fastv: what ranks visual tokens: attention of the prompt's last token (last-row, default), the same "
        "without rotary embedding (no-rope) or shared with a uniform stride (coverage); stride and random as baselines",
    )
    p.add_argument("--seed", type=int, help="fastv: of --score random, and phase of --score stride")
    p.add_argument("--ratio", type=float, help="trimmed-llama: share of image features a head keeps (0.25)")
    p.add_argument(
        "--bound",
        type=float,
        help="trimmed-llama: share of image features that the caches hold at most (default 3.5 times --ratio)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the work failed, 2 bad arguments."""
    args = parser().parse_args(argv)
    if problem := missing_extra():
        print(f"export-vlm: {problem}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from vlmtrim.export.run import dry_run, execute, make_job
    from vlmtrim.graphs.errors import GraphError
    from vlmtrim.runtime.errors import RuntimeRefusal

    try:
        job = make_job(args)
        if args.dry_run:
            print(dry_run(job))
        else:
            folder = execute(job)
            print(folder)
    except (Refusal, GraphError, FileExistsError, RuntimeRefusal) as error:
        print(f"export-vlm: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refusal | FileExistsError) else 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"export-vlm: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export-vlm: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _shards(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of 1 or more")
    return int(text)


def default_output(model: str, label: str) -> str:
    """Folder name of a bundle where the user gives none."""
    stem = Path(model).name if Path(model).is_dir() else model.replace(":", "-").replace("/", "--")
    return str(Path("bundles") / f"{stem}-{label}")


if __name__ == "__main__":
    sys.exit(main())
