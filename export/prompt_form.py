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
    video               of processors with words for videos: what stands ``before`` and ``behind`` these, where pictures
                        and videos stand in any order; null where the template does not write them so

Every piece of text is a list: of strings, of token ids (control tokens of the tokenizer), and of ``{"date": format}``.
"""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

from vlmtrim.export.prompt_proof import TRIMS, Films, NoForm, Segments, is_proven, prove
from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.prompt import Prompter

SCHEMA = 1
FILE = "prompt.json"
_SLOT = re.compile("\ue010([^\ue011]*)\ue011")  # of a date
_DIRECTIVES = re.compile("(?:[^%]|%[aAbBdHIjmMpSyYeD%])*")  # of dates that every runtime writes alike


class _Slot:
    """Stands in for a moment: writes the format of a date in place of the date."""

    def strftime(self, form: str) -> str:
        if _DIRECTIVES.fullmatch(form) is None:
            raise NoForm(f"it writes a date as {form!r}")
        return f"\ue010{form}\ue011"


def write_form(folder: Path, contract: Contract, video_mark: str | None = None) -> str | None:
    """Write ``prompt.json`` into a bundle's folder; returns why there is none, or None where there is.

    ``video_mark``: what templates write for a video where the bundle's processor has words for it.
    """
    try:
        prompter = Prompter(Folder(folder), contract, video_mark)
        form = find_form(prompter)
        try:
            prove(prompter, form)
        except NoForm:
            form["keeps_order"] = None
            prove(prompter, form)
        form["videos"] = contract.video_token_id is not None and is_proven(prompter, form, Films.AS_PICTURES)
        form["video"] = None if video_mark is None else _video(prompter, form, video_mark)
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

    def around(self, mark: str) -> dict[str, Segments] | None:
        """What stands around the mark of a video; None where the template does not write it once."""
        image, text = self._picture()
        start = self._head(1).removesuffix(image + text)
        whole = self._pieces(_user({"type": "video"}, {"type": "text", "text": "words"}))[0]
        before, *behind = whole.removeprefix(start).removesuffix(text).split(mark)
        if len(behind) != 1 or not whole.startswith(start) or not whole.endswith(text):
            return None
        return {"before": self._segments(before), "behind": self._segments(behind[0])}

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
        for name, strip in TRIMS.items():
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


def _video(prompter: Prompter, form: dict[str, Any], mark: str) -> dict[str, Segments] | None:
    """What stands around the words of a video; None where random conversations with some differ."""
    finder = _Finder(prompter)
    try:
        found = finder.around(mark)
    except (NoForm, RuntimeRefusal):
        return None
    return found if found and is_proven(prompter, {**form, "video": found}, Films.TOLD) else None
