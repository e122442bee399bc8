"""run-vlm: ask a bundle about pictures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlmtrim.graphs.bundle import BundleError
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Chat, Step
from vlmtrim.runtime.guided import Guided
from vlmtrim.runtime.select_backend import add_arguments
from vlmtrim.runtime.terminal import OutputError, harmless, write

LARGEST_PROMPT = 1 << 20  # bytes of a prompt on stdin; what a bundle takes is checked against its own length
ENDINGS = {
    "eos": "the model ended it",
    "stop": "ended before a --stop text",
    "length": "cut after --max-new-tokens",
    "capacity": "cut where the caches were full",
}


def parser() -> argparse.ArgumentParser:
    """Arguments of run-vlm."""
    p = argparse.ArgumentParser(
        prog="run-vlm",
        description="Ask a bundle about a picture; the answer is streamed to stdout. Without --prompt, a conversation.",
        epilog="Example: run-vlm bundles/demo-fastv-k2-r0.5 --image word.png --prompt 'Which word is written?'",
    )
    p.add_argument("bundle", help="bundle folder made by export-vlm")
    p.add_argument("--version", action=Version, help="print the version and exit")
    p.add_argument("--prompt", default=None, help="question, or - for stdin; without it a conversation in the terminal")
    p.add_argument("--system", default="", metavar="TEXT", help="what stands before the first question")
    p.add_argument(
        "--image", action="append", default=[], help="picture file, - for stdin, or a data: URL; repeat for several"
    )
    p.add_argument("--video", nargs="+", default=[], metavar="FRAME", help="a video file, frames, or their folder")
    p.add_argument(
        "--fps",
        type=float,
        default=None,
        help="frames a second of --video: of frames what they are (default 2), of a file what is taken (default: what "
        "the family takes)",
    )
    add_arguments(p)
    p.add_argument("--max-new-tokens", type=int, default=128, help="at most so many tokens (default 128)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; repeatable"
    )
    drawn = p.add_argument_group("sampling", "how tokens are drawn; greedy, and so the same every time, by default")
    drawn.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default); higher is more varied")
    drawn.add_argument("--top-k", type=int, default=0, help="only the k most probable tokens; 0 for all (default)")
    drawn.add_argument(
        "--top-p", type=float, default=1.0, help="only the most probable tokens that reach p (default 1)"
    )
    drawn.add_argument("--seed", type=int, default=None, help="draws the same tokens again (default: other ones)")
    p.add_argument(
        "--guide",
        metavar="SMALL",
        help="bundle (--method none --emit-guide) that sees every picture first and ranks its tokens for this one "
        "(--method guided); questions without a picture are answered by this one alone",
    )
    p.add_argument(
        "--exit-confidence",
        type=float,
        metavar="C",
        help="with --guide and --prompt: answer with the guide's answer where the geometric mean of its tokens' "
        "probabilities reaches C",
    )
    _add_caches(p)
    p.add_argument(
        "--show-kept",
        metavar="OUT.png",
        help="draw the pictures with kept patches bright and removed ones dimmed, scores as heat beside them",
    )
    p.add_argument("--verify", action="store_true", help="hash every byte of the bundle, also of large unchanged files")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    p.add_argument("-v", "--verbose", action="store_true", help="say which backend runs, and why not the others")
    return p


def _add_caches(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--cache-share",
        type=float,
        metavar="S",
        help="with a bundle of --cache: share of visual tokens that stays in the caches (default: the bundle's). With "
        "less, later tokens are faster and FOLLOW-UP questions about the same picture are answered worse",
    )
    p.add_argument(
        "--cache-every",
        type=int,
        metavar="T",
        help="with a bundle of --cache keyformer or scope: decode steps between two rounds (default: the bundle's)",
    )


class Version(argparse.Action):
    """Like --help: prints and exits, whatever else is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and end."""
        import importlib.metadata

        print(f"vlmtrim {importlib.metadata.version('vlmtrim')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the work failed, 2 bad input, 141 the reader closed the pipe."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except OutputError as error:
        if str(error):
            print(f"run-vlm: {error}", file=sys.stderr)
        return error.status
    except (BundleError, RuntimeRefusal) as error:
        print(f"run-vlm: {harmless(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    from vlmtrim import runtime
    from vlmtrim.runtime.image import picture_argument
    from vlmtrim.runtime.show import check_target

    sampling = runtime.Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.threads < 0:
        raise RuntimeRefusal(f"--threads is {args.threads}; give 1 or more, or 0 for one per core")
    if args.prompt is None:
        _check_conversation(args)
    pictures = [picture_argument(text) for text in args.image]
    prompt = _stdin_text(args.image) if args.prompt == "-" else args.prompt
    start = time.perf_counter()
    with _open(args) as chat:
        opened = time.perf_counter() - start
        settings = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "stop": args.stop}
        chat.reset(args.system)
        shown = [*pictures, *_videos(args, chat)]
        if prompt is None:
            from vlmtrim.runtime.chat_cli import converse

            return converse(chat, args.system, shown, settings)
        if args.show_kept:
            check_target(args.show_kept, chat.session.contract, len(pictures))
        steps: list[Step] = []
        for step in chat.generate(prompt, shown, **settings):
            steps.append(step)
            if not args.json:
                write(step.text)
        _finish(args, chat, steps, pictures, opened)
    return 0


def _videos(args: argparse.Namespace, chat: Chat | Guided) -> list[Any]:
    """What --video names: nothing, or one video."""
    from vlmtrim import runtime
    from vlmtrim.runtime.film import is_film

    if not args.video:
        return []
    if len(args.video) == 1 and is_film(args.video[0]):
        return [runtime.read_film(args.video[0], chat.session.processor, args.fps)]
    return [runtime.Video.of(args.video, 2.0 if args.fps is None else args.fps)]


def _open(args: argparse.Namespace) -> Chat | Guided:
    """The bundle, with its guide where there is one."""
    from vlmtrim import runtime

    if args.exit_confidence is not None and args.guide is None:
        raise RuntimeRefusal("--exit-confidence is of a guide's answer; give --guide SMALL as well")
    settings = {"backend": args.backend, "verify": args.verify, "threads": args.threads}
    settings |= {"verbose": args.verbose, "activations": args.activations}
    chat = runtime.open(args.bundle, **settings)
    if args.cache_share is not None:
        chat.session.caching.share = args.cache_share
    if args.cache_every is not None:
        chat.session.caching.every = args.cache_every
    if args.guide is None:
        return chat
    return runtime.Guided(runtime.open(args.guide, **settings), chat, args.exit_confidence)


def _check_conversation(args: argparse.Namespace) -> None:
    """Raise RuntimeRefusal where a conversation in the terminal is no way to ask."""
    if args.json or args.show_kept:
        raise RuntimeRefusal("--json and --show-kept are of one answer; give a --prompt")
    if args.exit_confidence is not None:
        raise RuntimeRefusal(
            "--exit-confidence is of one question: a conversation goes on with one model; give --prompt"
        )
    if not sys.stdin.isatty():
        raise RuntimeRefusal(
            "no --prompt is given, and stdin is no terminal to ask in; give --prompt TEXT, or --prompt -"
        )


def _stdin_text(images: Sequence[str]) -> str:
    if "-" in images:
        raise RuntimeRefusal("stdin cannot be both the prompt and a picture; give one of them otherwise")
    data = sys.stdin.buffer.read(LARGEST_PROMPT + 1)
    if len(data) > LARGEST_PROMPT:
        raise RuntimeRefusal(f"the prompt on stdin has more than {LARGEST_PROMPT} bytes; give a shorter one")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RuntimeRefusal(f"the prompt on stdin is no UTF-8 text (byte {error.start})") from error


def _finish(
    args: argparse.Namespace, chat: Chat | Guided, steps: list[Step], pictures: list[Any], opened: float
) -> None:
    """What follows the answer: the drawing, and the numbers."""
    from vlmtrim.runtime.image import load_image
    from vlmtrim.runtime.show import draw_kept, save_drawing

    prefill, times, ended = steps[-1].prefill, chat.session.times, steps[-1].ended[0]
    guidance = chat.guidance if isinstance(chat, Guided) else None
    if args.json:
        write(json.dumps(_record(chat, steps, opened)) + "\n")
    else:
        write("\n")
        rate = times.steps / times.decode if times.decode else 0.0
        if guidance is not None:
            who = "its answer" if guidance.exited else f"guided {chat.session.bundle.folder.name}"
            print(
                f"guide {args.guide}: confidence {guidance.confidence:.3f}, {guidance.small:.3f} s; {who}",
                file=sys.stderr,
            )
        held = ""
        if prefill.held is not None:
            share = prefill.layers_that_hold(0).mean()
            held = f"{share:.1%} of the picture stays in the caches ({times.caches:.3f} s); "
        what = "image features" if chat.session.contract.crosses else "visual tokens"
        print(
            f"{prefill.visual} {what}, {prefill.kept} kept, {prefill.visual - prefill.kept} removed; {held}"
            f"vision {times.vision:.3f} s, prefill {times.prefill:.3f} s, decode {rate:.1f} tokens/s "
            f"({chat.session.backend.name}; {ENDINGS[str(ended)]})",
            file=sys.stderr,
        )
    if args.show_kept:
        views = chat.session.processor.views([load_image(picture) for picture in pictures])
        save_drawing(draw_kept(views, prefill), args.show_kept)


def _record(chat: Chat | Guided, steps: list[Step], opened: float) -> dict[str, Any]:
    """What --json prints."""
    prefill, times = steps[-1].prefill, chat.session.times
    guidance = chat.guidance if isinstance(chat, Guided) else None
    return {
        "text": "".join(step.text for step in steps),
        "token_ids": [step.token_ids[0] for step in steps],
        "ended": steps[-1].ended[0],
        "visual": prefill.visual,
        "kept": prefill.kept,
        "removed": prefill.visual - prefill.kept,
        "kept_by_layer": None if prefill.kept_by_layer is None else prefill.layers_that_keep(0).sum(axis=1).tolist(),
        "caches": _caches(chat.session, prefill),
        "backend": chat.session.backend.name,
        "selection": chat.session.contract.selection,
        "guide": None if guidance is None else {name: _rounded(value) for name, value in asdict(guidance).items()},
        "times": {
            "open": round(opened, 6),
            "vision": round(times.vision, 6),
            "prefill": round(times.prefill, 6),
            "decode": round(times.decode, 6),
            "caches": round(times.caches, 6),
        },
    }


def _caches(session: Any, prefill: Any) -> dict[str, Any] | None:
    """What a cache policy left after the answer: of the pictures, entries by layer, their bytes; None without one."""
    if not session.caching:
        return None
    contract, entries = session.contract, [int(length[0]) for length in session.lengths.entries]
    by_layer = {layer: n for group, n in zip(contract.groups, entries, strict=True) for layer in group.layers}
    return {
        "policy": dict(contract.cache.policy),
        "share": session.caching.share,
        "visual_by_layer": None if prefill.held is None else prefill.layers_that_hold(0).sum(axis=1).tolist(),
        "entries_by_layer": [by_layer[layer] for layer in sorted(by_layer)],
        "bytes": contract.entry_bytes(entries),
        "allocated": sum(group.nbytes(1, contract.dtype) for group in contract.groups),
    }


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
