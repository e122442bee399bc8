"""Proof of a :mod:`vlmtrim.export.prompt_form`: random conversations by the template, and by the form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from typing import Any

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.prompt import Conversation, Prompter, Rendered

CONVERSATIONS = 50
TRIMS = {"": str, "both": str.strip, "left": str.lstrip, "right": str.rstrip}

Segments = list[Any]
Piece = tuple[Any, bool]  # of a conversation, and whether people wrote it


class NoForm(Exception):
    """The template is no such form; the message says why."""


class Films(Enum):
    """What random conversations have of videos: none, some in place of pictures, or all told in words."""

    NONE, AS_PICTURES, TOLD = range(3)


def _plain(segments: Segments) -> list[Piece]:
    return [(segment, False) for segment in segments]


class Speaker:
    """A conversation by a form: the second way to the ids of a :class:`vlmtrim.runtime.prompt.Conversation`."""

    def __init__(self, prompter: Prompter, form: dict[str, Any], system: str = ""):
        self._prompter, self._form, self._system = prompter, form, system
        self._said: str | None = None
        self._pictured = False
        self._began = datetime.now()

    def ask(self, parts: Sequence[dict[str, Any]], words: Sequence[str] = ()) -> list[int]:
        """Ids that continue the caches; see Conversation.ask."""
        left = iter(words)
        parts = [part if part["type"] == "text" else {**part, "words": next(left, None)} for part in parts]
        opening, images = self._said is None, sum(part["type"] != "text" for part in parts)
        head = self._opening(images) if opening else self._later(images)
        self._pictured = self._pictured or images > 0
        text, spans = "", []
        for piece, typed in [*head, *self._question(parts)]:
            if typed:
                spans.append((len(text), len(text) + len(piece)))
            text += piece if typed else self._written(piece)
        self._said = ""
        return self._prompter.encode(Rendered(text, tuple(spans)), opening)

    def _question(self, parts: Sequence[dict[str, Any]]) -> list[Piece]:
        """The parts as the template writes them, up to the answer."""
        form, kinds = self._form, [part["type"] == "text" for part in parts]
        if kinds != sorted(kinds):
            if form["keeps_order"] is None:
                raise RuntimeRefusal("the chat template writes pictures between words in another way")
            if not form["keeps_order"]:
                return self._one_text(parts)
        pieces, before = [], ""
        for part in parts:
            if part["type"] == "text":
                pieces += _plain(form["joint" if before == "text" else "text"])
                pieces.append((self._trimmed("question", part["text"]), True))
            else:
                pieces += _plain((form["joint"] if before == "text" else []) + self._shown(part))
            before = part["type"]
        tail = form["asked" if before == "text" else "ended"]
        if tail is None:
            raise RuntimeRefusal("the chat template writes a question that ends with a picture in another way")
        return [*pieces, *_plain(tail)]

    def _shown(self, part: dict[str, Any]) -> Segments:
        """A picture or a video, with the words that there are of it."""
        form, words = self._form, part["words"]
        if words is None:
            return form["image"]
        if part["type"] == "video":
            return [*form["video"]["before"], words, *form["video"]["behind"]]
        return [words if segment == form["mark"] else segment for segment in form["image"]]

    def _one_text(self, parts: Sequence[dict[str, Any]]) -> list[Piece]:
        """The parts as one text with marks in it, of whose ends the template strips white space."""
        mark = self._form["mark"]
        pieces: list[Piece] = [
            (part["text"], True)
            if part["type"] == "text"
            else (mark if part["words"] is None else part["words"], False)
            for part in parts
        ]
        how = self._form["trims"]["question"]
        for way, strip in (("left", str.lstrip), ("right", str.rstrip)):
            turn = 1 if way == "left" else -1
            for index in range(len(pieces))[::turn] if how in (way, "both") else ():
                piece, typed = pieces[index]
                pieces[index] = (strip(piece), True) if typed else (piece, False)
                if pieces[index][0] != "":
                    break
        return [*_plain(self._form["text"]), *pieces, *_plain(self._form["asked"])]

    def answer(self, text: str) -> None:
        """What the assistant said."""
        self._said = text

    def _opening(self, images: int) -> list[Piece]:
        wanted = (images > 0, bool(self._system))
        found = [one for one in self._form["openings"] if (one["pictures"], one["system"]) == wanted]
        if not found:
            raise RuntimeRefusal("the chat template takes no system text here")
        head = [(piece, False) for piece in found[0]["before"]]
        if self._system:
            head.append((self._trimmed("system", self._system), True))
            head += [(piece, False) for piece in found[0]["between"]]
        return head

    def _later(self, images: int) -> list[Piece]:
        """What stands behind the answer, of which the caches hold what was said."""
        if images and not self._pictured and not self._form["late_pictures"]:
            raise RuntimeRefusal("the chat template rewrites earlier turns")
        said = str(self._said)
        fresh, spaced = self._trimmed("answer", said), self._form["spaced"]
        again = [(piece, False) for piece in self._form["again"]]
        first = again[0][0] if again and isinstance(again[0][0], str) else ""
        whole = spaced + fresh + first
        said = said if said in whole else said.strip()
        at = whole.find(said)
        if whole[:at].strip():
            raise RuntimeRefusal("the chat template rewrites earlier turns")
        left = whole[at + len(said) :]
        typed = max(0, len(left) - len(first))
        rest = again[1:] if first else again
        return [(left[:typed], True), (left[typed:], False), *rest]

    def _trimmed(self, what: str, text: str) -> str:
        return TRIMS[self._form["trims"][what]](text)

    def _written(self, piece: Any) -> str:
        if isinstance(piece, int):
            return str(self._prompter.tokenizer.id_to_token(piece))
        return self._began.strftime(piece["date"]) if isinstance(piece, dict) else piece


def prove(prompter: Prompter, form: dict[str, Any], films: Films = Films.NONE) -> None:
    """Random conversations both ways. Raises NoForm where one differs."""
    dice = random.Random(0)
    for number in range(CONVERSATIONS):
        system = _words(prompter, dice) if number % 3 == 2 else ""
        ours, theirs = Conversation(prompter, system), Speaker(prompter, form, system)
        for _ in range(dice.randint(1, 4)):
            parts, said = _parts(prompter, dice, form), _words(prompter, dice)
            shown = [_as_film(part) if films != Films.NONE and dice.random() < 0.7 else part for part in parts]
            words = [_told(prompter, dice) for part in parts if part["type"] == "image" and films == Films.TOLD]
            expected = _asked(ours, shown, words)
            found = _asked(theirs, shown if words else parts, words)
            if expected is None and not (shown != parts and found):  # refused, which ends a conversation
                break
            if expected != found:
                raise NoForm("conversations that are put together of its segments differ from it")
            ours.answer(said)
            theirs.answer(said)


def _parts(prompter: Prompter, dice: random.Random, form: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a question: pictures and texts, in any order where the form says how that is written."""
    parts = [{"type": "image"}] * dice.choice((0, 0, 1, 2))
    texts = dice.choice((1, 1, 1, 2)) if not parts or form["ended"] is None else dice.choice((0, 1, 1, 2))
    parts += [{"type": "text", "text": _words(prompter, dice)} for _ in range(texts)]
    if form["keeps_order"] is not None and dice.random() < 0.4:
        dice.shuffle(parts)
        if form["ended"] is None and parts[-1]["type"] == "image":
            parts.append({"type": "text", "text": "words"})
    return parts


def _as_film(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "video"} if part["type"] == "image" else part


def _told(prompter: Prompter, dice: random.Random) -> str:
    """What a prompt might say of a picture or a video."""
    return f"{dice.choice(('', 'Frame', ' '))}{prompter.image_token * dice.randint(1, 3)}{_words(prompter, dice)}"


def is_proven(prompter: Prompter, form: dict[str, Any], films: Films) -> bool:
    """Whether all of them are alike."""
    try:
        prove(prompter, form, films)
    except NoForm:
        return False
    return True


def _asked(
    talk: Conversation | Speaker, parts: Sequence[dict[str, Any]], words: Sequence[str] = ()
) -> list[int] | None:
    try:
        return talk.ask(parts, words=words)
    except RuntimeRefusal:
        return None


def _words(prompter: Prompter, dice: random.Random) -> str:
    """A text with odd ends, and now and then a control token that is none."""
    tokens: Sequence[str] = prompter.control_texts
    pieces = ["What", " is ", "this?", "\n", "  ", "Äpfel", "ASSISTANT:", "user", "1", dice.choice(tokens)]
    text = "".join(dice.choice(pieces) for _ in range(dice.randint(1, 6)))
    return text if text.strip() else "x" + text
