"""export-vlm: argv -> Job -> pipeline."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vlmtrim.export import arguments, calibration
from vlmtrim.export.job import AUTO, DTYPES, ENGINES, FLOAT, Job, Refusal
from vlmtrim.export.requirements import missing_extra
from vlmtrim.graphs.caches import fields_of, load_policy, policy_names
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.formats import format_names
from vlmtrim.graphs.methods import load_method, method_names, parameters
from vlmtrim.graphs.staging import TargetError, check_target
from vlmtrim.runtime.errors import RuntimeRefusal

DEFAULT_METHOD = "fastv"
_FORMATS_HELP = (
    "the decoder's matrices: int4 or int8 for ONNX Runtime and engines, fp8 or nvfp4 for engines, w8a8 for ONNX "
    "Runtime's CPU (default: float, as --dtype says). Recommended on a device: --dtype float16 --weights int4; for "
    "ort-cpu: float32, int4, --vision-weights w8a8"
)


def parser(method: str = DEFAULT_METHOD, cache: str = arguments.NONE) -> argparse.ArgumentParser:
    """Arguments of export-vlm; their names are the fields of Job, of the method and of the cache policy."""
    p = argparse.ArgumentParser(
        prog="export-vlm",
        description="Export a vision-language model to an ONNX bundle that drops visual tokens inside the decoder.",
        epilog="Example: export-vlm --model demo --k 2 --r 0.5",
        allow_abbrev=False,  # --k of another method is not --keep
    )
    p.add_argument("--list", action=_List, help="print families, presets, methods and what is proven, and exit")
    _add_source(p)
    _add_method_arguments(p, method)
    _add_cache(p, cache)
    _add_measuring(p)
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="of activations and weights; auto: the checkpoint's")
    _add_packing(p)
    _add_limits(p)
    p.add_argument("--output", default=None, help="bundle folder (default: bundles/<model>-<method>)")
    p.add_argument("--engine", default="none", choices=ENGINES, help="TensorRT engines to build as well")
    p.add_argument(
        "--engine-shards",
        type=_number_or("auto"),
        default=0,
        metavar="auto|N",
        help="cut the decoder into N engines of consecutive layers; auto (default): as few as memory allows",
    )
    p.add_argument(
        "--link-weights",
        action="store_true",
        help="hard-link the checkpoint's files instead of copying them: no disk space, but onnx and Polygraphy do not "
        "read linked files; only where the weights stay as they are (--dtype, --weights)",
    )
    p.add_argument(
        "--clip-overflow", action="store_true", help="clip weights that do not fit --dtype instead of refusing them"
    )
    p.add_argument("--max-memory", type=float, default=None, metavar="GB", help="refuse a job that needs more memory")
    p.add_argument(
        "--eos-token-id",
        type=int,
        action="append",
        dest="eos_token_ids",
        metavar="ID",
        help="token that ends an answer, repeated for several (default: those that the checkpoint names)",
    )
    p.add_argument("--dry-run", action="store_true", help="print job, contract and sizes; load no weights")
    p.add_argument("--operators", action="store_true", help="with --dry-run: trace the graphs and count operators")
    p.add_argument("--force", action="store_true", help="replace an existing bundle")
    return p


def _add_limits(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--max-seq-len", type=int, default=None, help="tokens of a conversation (default: 2048 or the model's)"
    )
    p.add_argument(
        "--max-input-len",
        type=int,
        default=None,
        metavar="N",
        help="tokens of one step: of a chat's turn with pictures, or of a request with all its turns (default: "
        "--max-seq-len). With less, layers that see a sliding window (gemma3) have caches of the window and N tokens",
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


def _add_cache(p: argparse.ArgumentParser, cache: str) -> None:
    p.add_argument(
        "--cache",
        default=arguments.NONE,
        choices=(*policy_names(), arguments.NONE),
        help="what stays in the caches behind a question with pictures (default none: all of it); takes its own "
        "arguments alone: --cache P --help lists those of P. Positions stay, a turn's memory at its peak too; later "
        "tokens read less, and more turns fit",
    )
    p.add_argument(
        "--cache-share",
        type=float,
        default=None,
        metavar="S",
        help="visual tokens that stay, as a share; run-vlm may say another (default 0.5). What does not matter to the "
        "question at hand goes: with less, FOLLOW-UP questions about the same picture are answered worse",
    )
    if cache not in policy_names():
        return
    group = p.add_argument_group(f"--cache {cache}", (load_policy(cache).__doc__ or "").splitlines()[0])
    for name, settings in fields_of(load_policy(cache)).items():
        default = load_policy(cache).__dataclass_fields__[name].default
        group.add_argument(f"--cache-{name.replace('_', '-')}", default=default, **settings)


def _add_source(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", "--like", required=True, help="demo, a preset (--list), tiny:<family>, folder or hub id")
    p.add_argument(
        "--decoder",
        default=None,
        metavar="FILE",
        help="a decoder that another exporter wrote (mobius-onnx, onnxruntime-genai, torch.onnx.export), to take with "
        "its weights instead of tracing one; --like CHECKPOINT then gives settings, and the graphs that no file is "
        "given for",
    )
    p.add_argument(
        "--vision",
        default=None,
        metavar="FILE",
        help="the same of a vision graph, pixel_values -> image_features, where pictures are squares (llava, gemma3)",
    )
    p.add_argument(
        "--embedding",
        default=None,
        metavar="FILE",
        help="the same of a token embedding, input_ids -> inputs_embeds, with image_features as a second input or none",
    )


def _add_packing(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--fp32-layers",
        type=_numbers,
        default=(),
        metavar="I,J",
        help="decoder layers, from 0, that compute in float32 where float16 would overflow; --calibrate names them",
    )
    formats = (FLOAT, *format_names())
    group = p.add_argument_group("weights in fewer bits", "of the matrices; embeddings, norms and projector stay")
    group.add_argument("--weights", default=FLOAT, choices=formats, help=_FORMATS_HELP)
    group.add_argument(
        "--block",
        type=_number_or("channel"),
        default=None,
        metavar="32|64|128|channel",
        help="weights of a column that share a scale; where it does not divide the inputs, the next smaller that does "
        "(default: 128 for int4 and int8; channel for fp8, which also takes 128; nvfp4 takes 16, w8a8 channel)",
    )
    group.add_argument(
        "--head-weights",
        default=AUTO,
        choices=(AUTO, *formats),
        help="the logits' matrix (auto: 8 bits with --weights)",
    )
    group.add_argument("--vision-weights", default=FLOAT, choices=formats, help="the vision tower (default float)")
    group.add_argument(
        "--keep",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="parameters that stay, e.g. '*.layers.0.*' '*down_proj*'",
    )


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0,1,30")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _number_or(word: str) -> Callable[[str], int]:
    """Reads a number of 1 or more, or a word, which is 0."""

    def read(text: str) -> int:
        if text == word:
            return 0
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word} nor a number of 1 or more")
        return int(text)

    return read


def _add_measuring(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--calibrate",
        default=None,
        metavar="FOLDER",
        help="pictures (NAME.txt beside one is its question). zipvl: measure what every layer keeps of them, bound "
        "each by its mean and one deviation, and put budgets.json into the bundle. --weights int4, int8: GPTQ on the "
        "first 128 of them, instead of every weight by itself. --dtype float16: say which layers leave its range",
    )
    p.add_argument(
        "--emit-guide",
        action="store_true",
        help="with --method none: return attention too, to guide a larger bundle (run-vlm LARGE --guide SMALL)",
    )


class _List(argparse.Action):
    """Like --help: prints and exits, whatever else is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vlmtrim.export import listing

        print(listing.text())
        parser.exit()


def _add_method_arguments(p: argparse.ArgumentParser, method: str) -> None:
    p.add_argument(
        "--method",
        default=DEFAULT_METHOD,
        choices=(*method_names(), "none"),
        help=f"what selects visual tokens (default {DEFAULT_METHOD}); takes its own arguments alone: --method M --help "
        "lists those of M",
    )
    if method not in method_names():
        return
    group = p.add_argument_group(f"--method {method}", (load_method(method).__doc__ or "").splitlines()[0])
    for name, settings in parameters(method).items():
        default = load_method(method).__dataclass_fields__[name].default
        group.add_argument(f"--{name.replace('_', '-')}", default=default, **settings)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with those of the method that they name. Raises Refusal for arguments of another method."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=DEFAULT_METHOD)
    first.add_argument("--cache", default=arguments.NONE)
    named = first.parse_known_args(argv)[0]
    method, whole = named.method, parser(named.method, named.cache)
    args, unknown = whole.parse_known_args(argv)
    for given in unknown:
        name = given.partition("=")[0]
        for owner in method_names():
            if name in [f"--{parameter.replace('_', '-')}" for parameter in parameters(owner)]:
                raise Refusal(
                    f"{name} belongs to --method {owner}, the method is {method}; leave it out, or give "
                    f"--method {owner}"
                )
        for policy in policy_names():
            if name in [f"--cache-{parameter.replace('_', '-')}" for parameter in fields_of(load_policy(policy))]:
                raise Refusal(f"{name} belongs to --cache {policy}, the policy is {named.cache}; leave it out")
    if unknown:
        whole.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the work failed, 2 bad arguments."""
    try:
        args = parse(argv)
        if args.operators and not args.dry_run:
            raise Refusal("--operators belongs to --dry-run; every export counts them in its job.json")
        if problem := missing_extra():
            raise Refusal(problem)
        job = arguments.make_job(args)
        arguments.check(job)
        calibration.check(job)
        if not args.dry_run:
            check_target(job.output, job.force)
    except (Refusal, TargetError) as error:
        print(f"export-vlm: {error}", file=sys.stderr)
        return 2
    return _run(job, args)


def _run(job: Job, args: argparse.Namespace) -> int:
    """The work, with the status for each way in which it can end."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with ends_as_interrupts():
            if missing := arguments.missing_library(job):
                if not args.dry_run:
                    raise RuntimeRefusal(missing)
                print(f"warning: {missing}; the export needs it", file=sys.stderr)
            run = _load()
            print(run.dry_run(job, args.operators) if args.dry_run else run.execute(job))
    except (Refusal, TargetError, GraphError, RuntimeRefusal) as error:
        print(f"export-vlm: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refusal | TargetError) else 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"export-vlm: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("export-vlm: interrupted; nothing was written", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    return 0


def _load() -> Any:
    """The module that needs torch and transformers. They make objects by the million and no garbage: a dry run in
    which none is ever looked for among them takes a quarter less time."""
    name = "vlmtrim.export.run"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def ends_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block like Ctrl-C, so that what was begun is removed; who ignores them goes on."""

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
