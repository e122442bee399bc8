"""run-vlm: ask a bundle about pictures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from vlmtrim.graphs.bundle import BundleError
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Step
from vlmtrim.runtime.select_backend import AUTO, BACKENDS


def parser() -> argparse.ArgumentParser:
    """Arguments of run-vlm."""
    p = argparse.ArgumentParser(
        prog="run-vlm",
        description="Ask a bundle about a picture; the answer is streamed to stdout.",
        epilog="Example: run-vlm bundles/demo-fastv-k2-r0.5 --image word.png --prompt 'Which word is written?'",
    )
    p.add_argument("bundle", help="bundle folder made by export-vlm")
    p.add_argument("--prompt", required=True, help="question")
    p.add_argument(
        "--image", action="append", default=[], help="picture file, - for stdin, or a data: URL; repeat for several"
    )
    p.add_argument("--video", nargs="+", default=[], metavar="FRAME", help="frames of a video, or their folder")
    p.add_argument("--fps", type=float, default=2.0, help="frames a second of --video (default 2)")
    p.add_argument(
        "--backend", default=AUTO, choices=(AUTO, *BACKENDS), help="what runs it (default: the fastest here)"
    )
    p.add_argument("--max-new-tokens", type=int, default=128, help="at most so many tokens (default 128)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=int, default=0, help="only the k most probable tokens; 0 for all")
    p.add_argument("--top-p", type=float, default=1.0, help="only the most probable tokens that reach p")
    p.add_argument("--seed", type=int, default=None, help="of the sampling")
    p.add_argument(
        "--show-kept",
        metavar="OUT.png",
        help="draw the pictures with kept patches bright and removed ones dimmed, scores as heat beside them",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the work failed, 2 bad input."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except (BundleError, RuntimeRefusal) as error:
        print(f"run-vlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    from vlmtrim import runtime
    from vlmtrim.runtime.image import load_image, picture_argument
    from vlmtrim.runtime.show import check_target, draw_kept, save_drawing

    args.image = [picture_argument(text) for text in args.image]
    sampling = runtime.Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    start = time.perf_counter()
    chat = runtime.open(args.bundle, backend=args.backend)
    opened = time.perf_counter() - start
    contract = chat.session.contract
    if args.show_kept:
        check_target(args.show_kept, contract, len(args.image))
    shown = [*args.image, *([runtime.Video.of(args.video, args.fps)] if args.video else [])]
    steps: list[Step] = []
    for step in chat.generate(args.prompt, shown, max_new_tokens=args.max_new_tokens, sampling=sampling):
        steps.append(step)
        if not args.json:
            print(step.text, end="", flush=True)
    prefill, times = steps[-1].prefill, chat.session.times
    if args.show_kept:
        views = chat.session.processor.views([load_image(path) for path in args.image])
        save_drawing(draw_kept(views, prefill), args.show_kept)
    if args.json:
        answer = {
            "text": "".join(step.text for step in steps),
            "token_ids": [step.token_ids[0] for step in steps],
            "ended": steps[-1].ended[0],
            "visual": prefill.visual,
            "kept": prefill.kept,
            "removed": prefill.visual - prefill.kept,
            "backend": chat.session.backend.name,
            "selection": contract.selection,
            "times": {
                "open": round(opened, 6),
                "vision": round(times.vision, 6),
                "prefill": round(times.prefill, 6),
                "decode": round(times.decode, 6),
            },
        }
        print(json.dumps(answer))
        return 0
    print()
    rate = times.steps / times.decode if times.decode else 0.0
    what = "image features" if chat.session.contract.crosses else "visual tokens"
    print(
        f"{prefill.visual} {what}, {prefill.kept} kept, {prefill.visual - prefill.kept} removed; "
        f"vision {times.vision:.3f} s, prefill {times.prefill:.3f} s, decode {rate:.1f} tokens/s "
        f"({chat.session.backend.name})",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
