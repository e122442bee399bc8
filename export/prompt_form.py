"""A chat template as segments that can be put together without Jinja: ``prompt.json``, for the C++ runtime.

The segments are found by rendering conversations whose texts are marks that nobody can guess, and proven by rendering
random conversations both ways. A template that is no such form gets no ``prompt.json``.

    schema              1
    start               text of the start token where the settings name one, else ""
    openings            what stands before the first question's text or first picture, by whether the conversation has
                        ``pictures`` and a ``system`` text: ``before``, and behind the system text ``between``
    image               what stands for a picture
    mark                of ``image``, the token that a processor's words about a picture stand in place of
    joint               what stands behind a question's text that another part follows
    text                what stands between the last picture and the text
    asked               behind a question, up to the answer
    ended               the same behind one whose last part is a picture; null where that is written in another way
    spaced              white space that the template writes before an answer
    again               between an answer and the next question
    trims               which ends of ``system``, ``question`` and ``answer`` it strips: "", "left", "right" or "both"
    keeps_order         whether pictures between texts stand there, or are marks in one text; null where neither is so
    late_pictures       whether a conversation that began without pictures may go on with some
    videos              whether a video is written as a picture is, but for its mark

Every piece of text is a list: of strings, of token ids (control tokens of the tokenizer), and of ``{"date": format}``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.prompt import Conversation, Prompter, Rendered

SCHEMA = 1
CONVERSATIONS = 50
FILE = "prompt.json"
_SLOT = re.compile("\ue010([^\ue011]*)\ue011")  # of a date
_TRIMS = {"": str, "both": str.strip, "left": str.lstrip, "right": str.rstrip}
_DIRECTIVES = re.compile("(?:[^%]|%[aAbBdHIjmMpSyYeD%])*")  # of dates that every runtime writes alike

Segments = list[Any]
Piece = tuple[Any, bool]  # of a conversation, and whether people wrote it


class NoForm(Exception):
    """The template is no such form; the message says why."""


class _Slot:
    """Stands in for a moment: writes the format of a date in place of the date."""

    def strftime(self, form: str) -> str:
        if _DIRECTIVES.fullmatch(form) is None:
            raise NoForm(f"it writes a date as {form!r}")
        return f"\ue010{form}\ue011"


def write_form(folder: Path, contract: Contract) -> str | None:
    """Write ``prompt.json`` into a bundle's folder; returns why there is none, or None where there is."""
    try:
        prompter = Prompter(Folder(folder), contract)
        form = find_form(prompter)
        try:
            prove(prompter, form)
        except NoForm:
            form["keeps_order"] = None
            prove(prompter, form)
        form["videos"] = contract.video_token_id is not None and takes_videos(prompter, form)
    except (NoForm, RuntimeRefusal, BundleError) as error:
        (folder / FILE).unlink(missing_ok=True)
        return str(error)
    (folder / FILE).write_text(json.dumps(form, ensure_ascii=False, indent=1) + "\n")
    return None


def find_form(prompter: Prompter) -> dict[str, Any]:
    """The form of a bundle's template. Raises NoForm or RuntimeRefusal."""
    return _Finder(prompter).form()


class _Finder:
    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        self._slot: Any = _Slot()

    def form(self) -> dict[str, Any]:
        """Every part, found in the smallest conversations that have it."""
        pictures, texts = {"type": "image"}, {"type": "text", "text": "words"}
        image, text = self._picture()
        asked = self._pieces(_user(texts))[-1]
        answered = self._pieces(_user(texts), _assistant(), _user(texts))
        if not answered[1].startswith(asked) or answered[1][len(asked) :].strip():
            raise NoForm("it writes something between the answer's mark and the answer")
        again = answered[2].removesuffix(text) if text else answered[2]
        joint = self._pieces(_user(texts, texts))[1]
        ended = self._ended(image, text)
        order = self._pieces(_user(texts, pictures, texts, pictures))
        ordered = [joint + image, joint + image + ended] if ended is not None else []
        return {
            "schema": SCHEMA,
            "start": self._prompter.special("bos_token"),
            "openings": list(self._openings(image, text)),
            "image": self._segments(image),
            "mark": self._prompter.tokenizer.token_to_id(self._prompter.mark),
            "joint": self._segments(joint),
            "text": self._segments(text),
            "asked": self._segments(asked),
            "ended": None if ended is None else self._segments(ended),
            "spaced": answered[1][len(asked) :],
            "again": self._segments(again),
            "trims": self._trims(),
            "keeps_order": order[1:] == ordered and text == "",
            "late_pictures": self._late(),
        }

    def _pieces(self, *messages: dict[str, Any]) -> list[str]:
        """What the template writes around the texts of a conversation, all of which it must write once, in order."""
        count = sum(part["type"] == "text" for message in messages for part in message["content"])
        pieces = self._prompter.pieces(list(messages), self._slot)
        if [number.strip() for number in pieces[1::2]] != [str(number) for number in range(count)]:
            raise NoForm("it does not write every text once, in order")
        return pieces[::2]

    def _picture(self) -> tuple[str, str]:
        """(what stands for a picture, what stands between the last one and the text)."""
        heads = [self._head(count) for count in range(4)]
        whole = heads[1]
        for cut in range(len(whole), -1, -1):
            for end in range(cut, len(whole) + 1):
                start, image, text = whole[:cut], whole[cut:end], whole[end:]
                if image.count(self._prompter.mark) == 1 and all(
                    heads[count] == start + image * count + text for count in (1, 2, 3)
                ):
                    return image, text
        raise NoForm("it does not write every picture alike, before the question's words")

    def _head(self, pictures: int, system: bool = False) -> str:
        """What stands before the first question's text."""
        messages = [_system()] if system else []
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": "words"}]
        return self._pieces(*messages, _user(*content))[-2]

    def _openings(self, image: str, text: str) -> Any:
        for pictures, system in product((False, True), (False, True)):
            try:
                content = [{"type": "image"}] * pictures + [{"type": "text", "text": "words"}]
                pieces = self._pieces(*([_system()] if system else []), _user(*content))
            except (NoForm, RuntimeRefusal):
                if not system:
                    raise
                continue  # the template does not take a system text here
            tail = image * pictures + text
            if not pieces[-2].endswith(tail):
                raise NoForm("it writes the first question in another way than later ones")
            head = pieces[-2][: len(pieces[-2]) - len(tail)]
            found = {"pictures": pictures, "system": system, "before": self._segments(pieces[0] if system else head)}
            yield {**found, "between": self._segments(head)} if system else found

    def _ended(self, image: str, text: str) -> str | None:
        """What stands behind a question that is a picture alone; None where that is written in another way."""
        head = self._head(1).removesuffix(image + text) + image
        whole = self._pieces(_user({"type": "image"}))[0]
        return whole[len(head) :] if whole.startswith(head) else None

    def _late(self) -> bool:
        """Whether a conversation that began without pictures may go on with some."""
        texts = {"type": "text", "text": "words"}
        plain = self._pieces(_user(texts), _assistant(), _user(texts))
        try:
            late = self._pieces(_user(texts), _assistant(), _user({"type": "image"}, texts))
        except (NoForm, RuntimeRefusal):
            return False
        return plain[:2] == late[:2]

    def _trims(self) -> dict[str, str]:
        texts = {"type": "text", "text": "words"}
        padded = {"type": "text", "text": " \n a  b\t "}
        conversations = {
            "question": [_user(padded)],
            "answer": [_user(texts), {"role": "assistant", "content": [padded]}, _user(texts)],
            "system": [{"role": "system", "content": [padded]}, _user(texts)],
        }
        return {name: self._trim(messages, padded["text"]) for name, messages in conversations.items()}

    def _trim(self, messages: list[dict[str, Any]], padded: str) -> str:
        """Which ends of a padded text a conversation strips."""
        try:
            pieces = self._pieces(*messages)
            text = self._prompter.write(messages, self._slot)
        except (NoForm, RuntimeRefusal):
            return ""
        others = ["words"] * (len(pieces) - 2)
        place = next(i for i, part in enumerate(p for m in messages for p in m["content"]) if part["text"] == padded)
        for name, strip in _TRIMS.items():
            texts = [*others[:place], strip(padded), *others[place:]]
            if text == "".join(piece + word for piece, word in zip(pieces, [*texts, ""], strict=True)):
                return name
        raise NoForm("it changes texts in another way than by stripping their ends")

    def _segments(self, text: str) -> Segments:
        """A piece of the template: strings, control tokens as their ids, dates."""
        segments: Segments = []
        for place, part in enumerate(_SLOT.split(text)):
            if place % 2:
                segments.append({"date": part})
            else:
                segments += self._prompter.split_control(part)
        return [segment for segment in segments if segment != ""]


def _user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def _assistant() -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": "words"}]}


def _system() -> dict[str, Any]:
    return {"role": "system", "content": [{"type": "text", "text": "words"}]}


def _plain(segments: Segments) -> list[Piece]:
    return [(segment, False) for segment in segments]


class Speaker:
    """A conversation by a form: the second way to the ids of a :class:`vlmtrim.runtime.prompt.Conversation`."""

    def __init__(self, prompter: Prompter, form: dict[str, Any], system: str = ""):
        self._prompter, self._form, self._system = prompter, form, system
        self._said: str | None = None
        self._pictured = False
        self._began = datetime.now()

    def ask(self, parts: Sequence[dict[str, Any]]) -> list[int]:
        """Ids that continue the caches; see Conversation.ask."""
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
                pieces += _plain((form["joint"] if before == "text" else []) + form["image"])
            before = part["type"]
        tail = form["asked" if before == "text" else "ended"]
        if tail is None:
            raise RuntimeRefusal("the chat template writes a question that ends with a picture in another way")
        return [*pieces, *_plain(tail)]

    def _one_text(self, parts: Sequence[dict[str, Any]]) -> list[Piece]:
        """The parts as one text with marks in it, of whose ends the template strips white space."""
        pieces: list[Piece] = [
            (part["text"], True) if part["type"] == "text" else (self._form["mark"], False) for part in parts
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
        return _TRIMS[self._form["trims"][what]](text)

    def _written(self, piece: Any) -> str:
        if isinstance(piece, int):
            return str(self._prompter.tokenizer.id_to_token(piece))
        return self._began.strftime(piece["date"]) if isinstance(piece, dict) else piece


def prove(prompter: Prompter, form: dict[str, Any], videos: bool = False) -> None:
    """Random conversations both ways. Raises NoForm where one differs.

    ``videos``: whether the template is given some of the pictures as videos, which the form does not tell apart.
    """
    dice = random.Random(0)
    for number in range(CONVERSATIONS):
        system = _words(prompter, dice) if number % 3 == 2 else ""
        ours, theirs = Conversation(prompter, system), Speaker(prompter, form, system)
        for _ in range(dice.randint(1, 4)):
            parts, said = _parts(prompter, dice, form), _words(prompter, dice)
            films = [_as_film(part) if videos and dice.random() < 0.7 else part for part in parts]
            expected, found = _asked(ours, films), _asked(theirs, parts)
            if expected is None and not (films != parts and found):  # refused, which ends a conversation
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


def takes_videos(prompter: Prompter, form: dict[str, Any]) -> bool:
    """Whether random conversations with videos are those with pictures in their places."""
    try:
        prove(prompter, form, videos=True)
    except NoForm:
        return False
    return True


def _asked(talk: Conversation | Speaker, parts: Sequence[dict[str, Any]]) -> list[int] | None:
    try:
        return talk.ask(parts)
    except RuntimeRefusal:
        return None


def _words(prompter: Prompter, dice: random.Random) -> str:
    """A text with odd ends, and now and then a control token that is none."""
    tokens: Sequence[str] = prompter.control_texts
    pieces = ["What", " is ", "this?", "\n", "  ", "Äpfel", "ASSISTANT:", "user", "1", dice.choice(tokens)]
    text = "".join(dice.choice(pieces) for _ in range(dice.randint(1, 6)))
    return text if text.strip() else "x" + text
