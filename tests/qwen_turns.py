"""Conversations with pictures of any size that tests hold families to: a bundle's session against the oracle."""

import numpy as np

from vlmtrim import runtime
from vlmtrim.export.check_cli import generated_picture
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, record
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

START, IMAGE, VIDEO, END = 260, 261, 262, 263


def sized(width, height, seed=0):
    return generated_picture(seed).resize((width, height))


def prompt(session, *parts):
    """Words and pictures -> ids as a bundle takes them, and the pictures."""
    ids, images = [256], tuple(part for part in parts if not isinstance(part, list))
    tokens = iter(session.processor(images).tokens) if images else iter(())
    for part in parts:
        ids += part if isinstance(part, list) else [START, *[IMAGE] * next(tokens), END]
    return ids, images


def asked(session, *parts, talk=None):
    """As a chat asks: texts (or so many letters as a list is long), pictures and videos -> ids, and the pictures."""
    parts = ["w" * len(part) if isinstance(part, list) else part for part in parts]
    images = tuple(
        part.load() if isinstance(part, runtime.Video) else part for part in parts if not isinstance(part, str)
    )
    question = runtime.Prompt(*(p if isinstance(p, str | runtime.Video) else runtime.Image(p) for p in parts))
    pictures = session.processor(images) if images else None
    tokens, words = (pictures.tokens, pictures.words) if pictures else ((), ())
    ids = (talk or Conversation(session.prompter)).ask(question.content(), words=words)
    return session.prompter.expand_images(ids, tokens, words), images


def film(seed, frames=3, size=(96, 64), **more):
    """A video whose frames differ; ``more`` is what Video takes beside them."""
    return runtime.Video([sized(*size, seed + number) for number in range(frames)], **more)


def conversation(session, *questions):
    """The turns of one conversation as :func:`asked` makes them."""
    talk, turns = Conversation(session.prompter), []
    for parts in questions:
        turns.append(asked(session, *parts, talk=talk))
        talk.answer("")
    return turns


def parity(name, found, expected, bundle):
    return Parity(tuple(compare(name, found, expected, [g.layers for g in bundle.contract.groups], "float32")))


def assert_turns(session, reference, turns):
    """Every turn of a conversation (as :func:`prompt` makes them) and six tokens of its answer."""
    for number, (ids, images) in enumerate(turns):
        turn = Turn(str(number), ids, images, opens=not number)
        expected, tokens = reference.record(turn, 6)
        found, _ = record(session, turn, tokens)
        assert parity(turn.name, found, expected, session.bundle)
        assert session.contract.selection is None or len(found.kept) < len(ids) or not images


def assert_rows(session, reference, wide, tall, write=prompt):
    """Rows that bring as many visual tokens in pictures of other sizes, in other order, and other words."""
    bundle = session.bundle
    prompts = [write(session, [1, 2], wide, tall, [3, 4]), write(session, tall, [5, 6, 7, 8], wide, [9, 10, 11])]
    rows, images = zip(*prompts, strict=True)
    batch = Session(bundle, make_backend("ort-cpu"), batch=2)
    prefill = batch.prefill(rows, batch.processor([image for row in images for image in row]))
    caches = [batch.cache_contents(row) for row in range(2)]
    logits = [prefill.logits]
    expected = [reference.record(Turn("row", ids, shown), 4) for ids, shown in prompts]
    for step in range(4):
        logits.append(batch.decode(np.array([fed[step] for _, fed in expected])))
    for row, (want, _) in enumerate(expected):
        found = Recording(prefill.kept_indices[row], caches[row], np.stack([step[row] for step in logits]))
        assert parity(f"row {row}", found, want, bundle)
