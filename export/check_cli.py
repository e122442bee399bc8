"""check-vlm: a bundle against the pruned PyTorch reference, or against another backend."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.export.requirements import missing_extra
from vlmtrim.graphs.bundle import Bundle, BundleError, open_bundle
from vlmtrim.graphs.contract import PATCHES, ROUNDING
from vlmtrim.graphs.methods import load_method
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.guided import drawn_scores
from vlmtrim.runtime.image import generated_picture, load_image
from vlmtrim.runtime.measure.check import Parity, Recording, Row, Turn, compare_turns, record
from vlmtrim.runtime.measure.stages import Recorder, Replayer
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import ACTIVATIONS, AUTO, BACKENDS, choose_backend
from vlmtrim.runtime.session import Session


def parser() -> argparse.ArgumentParser:
    """Arguments of check-vlm."""
    p = argparse.ArgumentParser(
        prog="check-vlm",
        description="Compare a bundle with the unpatched Hugging Face model and an independent pruning oracle: kept "
        "tokens, caches of every layer, logits and greedy tokens. Exit status 1 when the check fails.",
    )
    p.add_argument("bundle", help="bundle folder")
    p.add_argument("--backend", default="ort-cpu", choices=(AUTO, *BACKENDS), help="what runs the bundle (ort-cpu)")
    p.add_argument("--against", default="pytorch", choices=("pytorch", *BACKENDS), help="what it is compared with")
    p.add_argument("--checkpoint", default=None, help="original checkpoint folder (default: the bundle's own weights)")
    p.add_argument("--image", action="append", default=[], help="picture to ask about (default: two generated ones)")
    p.add_argument("--prompt", default="What is in the picture?", help="question")
    p.add_argument("--tokens", type=int, default=32, help="greedy tokens to compare (default 32)")
    p.add_argument(
        "--activations",
        default="float32",
        choices=ACTIVATIONS,
        help="what ONNX Runtime multiplies packed weights by (default float32, which is exact)",
    )
    p.add_argument("--cache-share", type=float, metavar="S", help="what a cache policy leaves (default: the bundle's)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    if args.against == "pytorch" and (problem := missing_extra()):
        print(f"check-vlm: {problem}", file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from vlmtrim.export.job import Refusal

    try:
        parity = check(args)
    except (BundleError, RuntimeRefusal, Refusal) as error:
        print(f"check-vlm: {error}", file=sys.stderr)
        return 2
    if args.json:
        record_ = {"bundle": args.bundle, "backend": args.backend, "against": args.against, **parity.to_dict()}
        print(json.dumps(record_, indent=2))
    else:
        print(parity.table())
        print("passed" if parity else "FAILED")
    return 0 if parity else 1


def check(args: argparse.Namespace) -> Parity:
    """Run the turns on both sides and compare."""
    bundle = open_bundle(args.bundle)
    if args.tokens < 1:
        raise RuntimeRefusal(f"--tokens is {args.tokens}; give 1 or more")
    replayer = Replayer(bundle, choose_backend(args.backend, bundle, activations=args.activations))
    session = replayer.session
    if args.cache_share is not None:
        session.caching.share = args.cache_share
    images = args.image or [generated_picture(seed) for seed in (0, 1)]
    turns = make_turns(session, args.prompt, images)
    needed = sum(len(turn.ids) + args.tokens for turn in turns[:2])
    if needed > bundle.contract.max_seq_len:
        turns = turns[:1]
    if args.against == "pytorch":
        return Parity(tuple(_against_pytorch(args, bundle, session, turns, images[0])))
    return Parity(tuple(_against_backend(args, bundle, replayer, turns)))


def _against_backend(args: argparse.Namespace, bundle: Bundle, replayer: Replayer, turns: list[Turn]) -> list[Row]:
    """Every turn as a whole, and graph by graph on the other side's inputs."""
    recorder = Recorder(bundle, choose_backend(args.against, bundle, activations=args.activations))
    recorded = [recorder.record(turn, args.tokens) for turn in turns]
    groups, dtype = [group.layers for group in bundle.contract.groups], _precision(args, bundle)
    pairs = (
        (record(replayer.session, turn, tokens)[0], expected)
        for turn, (expected, tokens, _) in zip(turns, recorded, strict=True)
    )
    whole = compare_turns(turns, pairs, groups, dtype)
    rows: list[Row] = []
    for turn, (expected, tokens, tape), plain in zip(turns, recorded, whole, strict=True):
        rows += [*replayer.compare(turn, expected, tokens, tape), *plain]
    return rows


def _against_pytorch(
    args: argparse.Namespace, bundle: Bundle, session: Session, turns: list[Turn], image: Any
) -> list[Row]:
    from vlmtrim.export.checkpoint import load_reference, read_config
    from vlmtrim.export.weights import quantised

    source = Path(args.checkpoint) if args.checkpoint else bundle.folder
    if args.checkpoint and quantised.read_settings(source) is not None:
        raise RuntimeRefusal(
            f"{source} comes quantised; leave --checkpoint out, and the bundle's own weights are unpacked instead"
        )
    family, _ = read_config(source)
    selection = None if bundle.contract.selection is None else dict(bundle.contract.selection)
    cache, policy = bundle.contract.cache, {}
    if cache is not None:
        policy = {"cache": asdict(cache), "share": session.caching.share}
    reference = load_reference(bundle.contract.family)(family.MODEL_CLASS, source, selection, **policy)
    rows = _compare_inputs(bundle, session, args.prompt, image)
    groups = [group.layers for group in bundle.contract.groups]

    def both(turn: Turn) -> tuple[Recording, Recording]:
        expected, tokens = reference.record(turn, args.tokens)
        return record(session, turn, tokens)[0], expected

    compared = compare_turns(turns, map(both, turns), groups, _precision(args, bundle))
    return [*rows, *itertools.chain.from_iterable(compared)]


def _precision(args: argparse.Namespace, bundle: Bundle) -> str:
    """What decides how near the two sides must be."""
    packed = bundle.contract.packed
    rounds = args.activations == "int8" or any(kind.format in ROUNDING for kind in packed)
    return "int8" if packed and rounds else bundle.contract.dtype


def _compare_inputs(bundle: Bundle, session: Session, prompt: str, image: Any) -> list[Row]:
    """Prompt ids and pixel values against the checkpoint's own Hugging Face processor."""
    from vlmtrim.export.oracles.reference import processed

    picture = load_image(image)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    rendered = session.prompter.render(messages)
    expected_ids, expected = processed(bundle.folder, rendered.text, picture)
    pictures = session.processor([picture])
    ids = session.prompter.encode(rendered, opening=True, words=pictures.words)
    ids = session.prompter.expand_images(ids, pictures.tokens, pictures.words)
    written = f"{len(ids)} tokens"
    if bundle.contract.selection and load_method(bundle.contract.selection["method"]).prunes == PATCHES:
        # a picture is fewer tokens than its processor, which knows nothing of it, writes
        ids, expected_ids = (_one_a_picture(found, bundle.contract.image_token_id) for found in (ids, expected_ids))
    pixels = pictures.inputs["pixel_values"]
    same_size = pixels.size == expected.size
    error = float(np.abs(pixels - expected.reshape(pixels.shape)).max()) if same_size else float("inf")
    return [
        Row("inputs", "prompt token ids", float(ids != expected_ids), 0.0, ids == expected_ids, written),
        Row("inputs", "pixel values", error, 0.0, error == 0.0),
    ]


def _one_a_picture(ids: list[int], mark: int) -> list[int]:
    """Token ids with one image token in place of each run of them."""
    return [token for before, token in zip([-1, *ids], ids, strict=False) if (before, token) != (mark, mark)]


def _asked(session: Session, talk: Conversation, prompt: str, images: Sequence[Any]) -> list[int]:
    """Token ids of a question with its pictures."""
    if not images:
        return talk.ask(prompt)
    pictures = session.processor(images)
    ids = talk.ask(prompt, len(images), words=pictures.words)
    return session.prompter.expand_images(ids, pictures.tokens, pictures.words)


def make_turns(session: Session, prompt: str, images: Sequence[Any]) -> list[Turn]:
    """Two turns of one conversation, the second with another picture if it fits, and one without pictures."""
    talk = Conversation(session.prompter)
    opening, closing = load_image(images[0]), load_image(images[-1])
    first = _asked(session, talk, prompt, (opening,))
    talk.answer("")
    # Caches of cross-attention may be made for one picture.
    more = (closing,) if session.contract.max_images > 1 or not session.contract.crosses else ()
    second = _asked(session, talk, "And in this one?", more)
    text_only = Conversation(session.prompter).ask(prompt, 0)
    turns = [
        Turn("picture", first, (opening,)),
        Turn("second turn", second, more, opens=False),
        Turn("text only", text_only),
    ]
    scores = [drawn_scores(session.contract, [turn.ids]) for turn in turns]
    return [replace(turn, guide=None if s is None else s[0]) for turn, s in zip(turns, scores, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
