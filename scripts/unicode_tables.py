"""Write the C++ runtime's Unicode tables: letters, numbers, white space, and what NFC needs.

They are read off the `tokenizers` library, code point by code point, so that they are of the versions of Unicode that
it was built with: one for the properties in regular expressions, an older one for NFC. Both are named in the file.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

TARGET = Path(__file__).resolve().parents[1] / "runtime/cpp/src/text/unicode_tables.inc"
POINTS = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
HANGUL = range(0xAC00, 0xAC00 + 11172)  # composed by arithmetic
HIGH = "\u0345"  # of combining class 240: what has a lower one goes before it
# The first letter that a version added, newest first.
FIRST_LETTERS = {"17.0": 0x1C8B, "16.0": 0x1C89, "15.1": 0x2EBF0, "15.0": 0x1E4D0, "14.0": 0x1E290, "13.0": 0x08BE}
# The first composed character, or mark with a class, of each.
FIRST_MARKS = {"15.0": 0x0CF3, "14.0": 0x0898, "13.0": 0x1ABF, "12.0": 0x0EBA, "11.0": 0x07FD, "10.0": 0x1DF6}


def matching(pattern: str) -> list[int]:
    """Code points that a regular expression matches."""
    splitter = pre_tokenizers.Split(Regex(pattern), "removed")
    text = "".join(map(chr, POINTS))
    left = [False] * len(POINTS)
    for _, (start, end) in splitter.pre_tokenize_str(text):
        left[start:end] = [True] * (end - start)
    return [code for code, stays in zip(POINTS, left, strict=True) if not stays]


def ranges(codes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of every run."""
    start = last = -2
    for code in codes:
        if code != last + 1:
            if start >= 0:
                yield start, last
            start = code
        last = code
    if start >= 0:
        yield start, last


def classes() -> list[tuple[int, int, int]]:
    """(first, last, combining class) of the marks that the library orders."""
    nfd = normalizers.NFD()
    known = []
    for code in POINTS:
        rank = unicodedata.combining(chr(code))
        if rank == 0:
            continue
        before = "a" + HIGH + chr(code) if rank < 240 else "a" + chr(code) + "\u0334"
        if rank == 240 or nfd.normalize_str(before) != before:
            known.append((code, rank))
    found: list[tuple[int, int, int]] = []
    for code, rank in known:
        if found and found[-1][1] == code - 1 and found[-1][2] == rank:
            found[-1] = (found[-1][0], code, rank)
        else:
            found.append((code, code, rank))
    return found


def decompositions() -> tuple[list[tuple[int, ...]], list[tuple[int, int, int]]]:
    """(code, its whole decomposition of up to four) and (first, second, composed)."""
    nfd, nfc = normalizers.NFD(), normalizers.NFC()
    apart, together = [], []
    for code in POINTS:
        char = chr(code)
        parts = nfd.normalize_str(char)
        if parts == char or code in HANGUL:
            continue
        assert len(parts) <= 4
        apart.append((code, *map(ord, parts)))
        head = nfc.normalize_str(parts[:-1])
        if nfc.normalize_str(char) == char and len(head) == 1:
            together.append((ord(head), ord(parts[-1]), code))
    return apart, sorted(together)


def table(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> str:
    """C++ of an array."""
    lines, line = [], "   "
    for row in rows:
        cell = " {" + ", ".join(f"0x{value:X}" if value > 9 else str(value) for value in row) + "},"
        if len(line) + len(cell) > 118:
            lines.append(line)
            line = "   "
        line += cell
    return f"constexpr {kind} {name}[] = {{\n" + "\n".join([*lines, line]) + "\n};\n"


def version_of(firsts: dict[str, int], known: Iterable[int], oldest: str) -> str:
    """The newest version whose first addition is known."""
    codes = set(known)
    return next((version for version, code in firsts.items() if code in codes), oldest)


def main() -> None:
    letters, numbers = matching(r"\p{L}"), matching(r"\p{N}")
    spaces = matching(r"\s")
    marks = classes()
    apart, together = decompositions()
    ranked = [code for first, last, _ in marks for code in range(first, last + 1)]
    text = (
        f"// Written by scripts/unicode_tables.py from tokenizers {tokenizers.__version__}: properties of Unicode "
        f"{version_of(FIRST_LETTERS, letters, '12.1 or older')},\n"
        f"// NFC of Unicode {version_of(FIRST_MARKS, ranked, '9.0')}.\n"
    )
    text += table("Range", "kLetters", ranges(letters)) + table("Range", "kNumbers", ranges(numbers))
    text += table("Range", "kSpaces", ranges(spaces)) + table("Ranked", "kClasses", marks)
    text += table("Apart", "kApart", apart) + table("Together", "kTogether", together)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
