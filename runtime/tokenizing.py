"""A checkpoint's tokenizer: read within limits, its errors as sentences; and once more with secret names for its
control tokens, so that text which looks like them is text.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import secrets
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vlmtrim.graphs.reading import BundleError
from vlmtrim.runtime.errors import RuntimeRefusal

STEPS = 64  # normalizers, pre-tokenizers and decoders, one inside the other; tokenizers of models have 10
GROWTH = 64  # characters that replacements may make of one; SentencePiece's have up to 18


def load(source: bytes, where: str) -> Tokenizer:
    """Of a tokenizer.json. Raises BundleError where it is none, or would fill the memory with what it writes."""
    try:
        raw = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is no tokenizer: {_first_line(error)}") from error
    _check_growth(raw if isinstance(raw, dict) else {}, where)
    return _load(source, where)


def _load(source: bytes, where: str) -> Tokenizer:
    """The library raises bare exceptions, and its panics are no Exception at all."""
    try:
        tokenizer = Tokenizer.from_buffer(source)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(f"{where} is no tokenizer: {_first_line(error)}") from error
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, add: bool) -> Any:
    """The library's Encoding of a text; ``add`` adds what the tokenizer prescribes. Raises RuntimeRefusal."""
    try:
        return tokenizer.encode(text, add_special_tokens=add)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeRefusal(f"the bundle's tokenizer fails: {_first_line(error)}") from error


def control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Text of every token that is more than its text, by id.

    Those that were added to the vocabulary; runs of spaces or line ends among them are text, unless they are special.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {number: str(token.content) for number, token in added.items() if token.special or _is_word(token.content)}


def _is_word(text: str) -> bool:
    return bool(text.replace("▁", " ").strip())


def renamed(source: bytes, control: dict[int, str], where: str) -> tuple[Tokenizer, dict[int, str]]:
    """(A tokenizer whose control tokens have names that nobody can guess, and the name of each by its id).

    Whatever else makes a control token's text one piece, such as BPE's merges, is left out.
    """
    raw = json.loads(source)
    nonce = secrets.token_hex(8)
    names = {number: f"\ue000{nonce}{index}\ue001" for index, number in enumerate(control)}
    by_text = {text: names[number] for number, text in control.items()}
    for entry in raw["added_tokens"]:
        entry["content"] = names.get(entry["id"], entry["content"])
    model = raw["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {by_text.get(text, text): number for text, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[by_text.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in by_text:
        model["unk_token"] = by_text[model["unk_token"]]
    if model.get("merges"):
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not by_text.keys() & {a, b, a + b}]
    tokenizer = _load(json.dumps(raw).encode(), where)
    if any(tokenizer.token_to_id(name) != number for number, name in names.items()):
        raise BundleError(f"{where}: control tokens are not where their ids say, so text cannot be kept apart")
    return tokenizer, names


class TextStream:
    """Token ids of one answer -> text, as soon as their bytes form characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # since the last text

    def step(self, token: int) -> str:
        """What the token adds to the text; empty while bytes are missing."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # bytes that form no text, which a model may say too: decoded on their own, and begun anew
            text = self._tokenizer.decode(self._held)
            self._stream = DecodeStream(skip_special_tokens=True)
        if text:
            self._held.clear()
        return text


def _check_growth(raw: dict[str, Any], where: str) -> None:
    """Refuse what makes a text much longer than it was: native code would end the process when memory does."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = list(_steps(raw.get(name)))
        if len(steps) > STEPS:
            raise BundleError(f"{where}: {name} has {len(steps)} steps, {STEPS} are allowed")
        if name == "post_processor":
            prescribed = max((_prescribed(step) for step in steps), default=0)
            if prescribed > GROWTH:
                raise BundleError(f"{where}: {name} may add {prescribed} tokens, {GROWTH} are allowed")
            continue
        growth = math.prod(_growth(step) for step in steps)
        if growth > GROWTH:
            raise BundleError(f"{where}: {name} may make a text {growth:.0f} times as long, {GROWTH} times is allowed")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer, those inside sequences too."""
    if not isinstance(part, dict):
        return
    yield part
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        inner = part.get(name)
        for step in inner if isinstance(inner, list) else ():
            yield from _steps(step)


def _growth(step: dict[str, Any]) -> float:
    """Characters that a step may make of one; by its fields, as the library knows old files without types."""
    content, pattern = step.get("content"), step.get("pattern")
    if isinstance(step.get("prepend"), str):
        return 1.0 + len(step["prepend"])
    if isinstance(content, str) and pattern is not None:
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match between all characters.
        return max(1.0, len(content) / len(plain)) if isinstance(plain, str) and plain else 1.0 + len(content)
    return float(_longest_replacement(step["precompiled_charsmap"])) if "precompiled_charsmap" in step else 1.0


def _prescribed(step: dict[str, Any]) -> int:
    """Tokens that a step adds to a text, at most: pieces of its template, each of so many tokens."""
    pieces, special = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(special, dict):
        return 0
    ids = [entry.get("ids") for entry in special.values() if isinstance(entry, dict)]
    return len(pieces) * max((len(each) for each in ids if isinstance(each, list)), default=0)


def _longest_replacement(charsmap: Any) -> int:
    """Of SentencePiece's table: the size of a trie (4 bytes), the trie, then its texts, each ended by a zero."""
    try:
        table = base64.b64decode(charsmap)
    except (TypeError, ValueError, binascii.Error):
        return 1  # the library refuses it
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
