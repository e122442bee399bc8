"""What is fuzzed: bundles, pictures, prompts and templates; every one ``run(count, seed, ...) -> Report``."""

from __future__ import annotations

import base64
import io
import random
import shutil
import string
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mutations
import numpy as np
from harness import Report, attempt
from PIL import Image

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.image import generated_picture, load_image, picture_argument
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.prompt import Conversation, Prompter
from vlmtrim.runtime.template import ChatTemplate


def bundles(folders: Sequence[Path], count: int, seed: int) -> Report:
    """Mutants of bundles, 9 of 10 with fitting checksums; each is opened and asked about a picture."""
    report, originals = Report(), [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    picture = generated_picture(seed).resize((40, 30))
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            whole = draw.choice(range(len(folders)))
            files = dict(originals[whole])
            sums = files.pop("SHA256SUMS")
            what, files, odd = mutations.mutate(files, draw)
            sealed = not what.startswith("sums") and draw.random() < 0.9
            sums = mutations.mutated_sums(sums, draw) if what.startswith("sums") else sums
            target = Path(scratch) / "bundle"
            mutations.write(target, files, odd, sealed, sums, draw)
            name = f"{seed}/{number} {folders[whole].name} {what} {odd or ''}"
            attempt(name, partial(_ask, target, picture), report)
            shutil.rmtree(target)
    return report


def _ask(folder: Path, picture: Image.Image) -> None:
    sampling = runtime.Sampling(temperature=1.0, seed=0)
    with runtime.open(folder, threads=1) as chat:
        for _ in chat.generate("What is this?", [picture], max_new_tokens=3, sampling=sampling):
            pass


def pictures(folders: Sequence[Path], count: int, seed: int) -> Report:
    """Pictures of odd modes and sizes in every format, whole and damaged, through the processors of the families."""
    report = Report()
    processors = [load_processor(b.files, b.contract) for b in map(open_bundle, folders)]
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        data, what = _picture(draw)
        attempt(f"{seed}/{number} {what}", partial(_look, data, draw.choice(processors), draw.random()), report)
    return report


def _look(data: bytes, processor, way: float) -> None:
    if way < 0.1:
        data = picture_argument("data:image/png;base64," + base64.b64encode(data).decode())
    processor([load_image(data if way < 0.6 else io.BytesIO(data))])


def _picture(draw: random.Random) -> tuple[bytes, str]:
    mode = draw.choice(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "YCbCr"])
    side = [1, 2, 3, 17, 64, 200, 1000, 20000]
    width, height = draw.choice(side), draw.choice(side[:6])
    if draw.random() < 0.5:
        width, height = height, width
    picture = Image.fromarray(np.random.default_rng(draw.randrange(99)).integers(0, 255, (height, width), np.uint8))
    picture = picture.convert(mode) if mode != "I;16" else Image.new("I;16", (width, height), 30000)
    form = draw.choice(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "EPS", "TGA", "PCX", "ICO"])
    stream = io.BytesIO()
    try:
        picture.save(stream, form)
        data = stream.getvalue()
    except (OSError, ValueError, KeyError):
        form, data = "raw", draw.randbytes(draw.randrange(300))
    damage = draw.choice(["none", "bytes", "bytes", "size"])
    if damage == "bytes":
        data = mutations.mutated_bytes(data, draw)
    elif damage == "size" and form == "PNG":  # a header that promises more than there is
        data = data[:16] + draw.choice([1, 60000, 2**31 - 1]).to_bytes(4, "big") * 2 + data[24:]
    return data, f"{mode} {width}x{height} {form} {damage}"


def prompts(folders: Sequence[Path], count: int, seed: int) -> Report:
    """Texts of any characters; the control tokens of the ids are those of a harmless text, and the text stays."""
    report = Report()
    prompters = [Prompter(b.files, b.contract) for b in map(open_bundle, folders)]
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        prompter = draw.choice(prompters)
        control = [token.content for token in prompter.tokenizer.get_added_tokens_decoder().values()]
        words = [*control, *map(chr, draw.sample(range(0x110000), 5)), *string.printable, "\u202e", "\ufeff", "é", "🍎"]
        pieces = [draw.choice(words) for _ in range(draw.choice([0, 1, 5, 50, 3000]))]
        text = "".join(piece if draw.random() < 0.9 else piece[:-1] for piece in pieces)
        attempt(f"{seed}/{number} {text[:40]!r}", partial(_type, prompter, text, draw.randrange(3)), report)
    return report


def _type(prompter: Prompter, text: str, images: int) -> None:
    control = prompter.tokenizer.get_added_tokens_decoder().keys()
    talk = Conversation(prompter)
    found = [token for token in talk.ask(text, images) if token in control]
    harmless = [token for token in Conversation(prompter).ask("Hello", images) if token in control]
    assert found == harmless, f"control tokens {found}, of a harmless text {harmless}"
    talk.answer(text)
    talk.ask(text, 0)


def templates(count: int, seed: int) -> Report:
    """Programs put together from what makes Jinja work hard."""
    report = Report()
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        text = _program(draw, draw.randrange(1, 6))
        attempt(f"{seed}/{number} {text[:120]!r}", partial(_render, text), report)
    return report


def _render(text: str) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    ChatTemplate(text, 100_000).render(messages=messages, add_generation_prompt=True, bos_token="<s>", x="ab")


def _program(draw: random.Random, depth: int) -> str:
    inner = (lambda: _program(draw, depth - 1)) if depth else (lambda: "{{ x }}")
    number = draw.choice(["3", "99", "99999", "10**9", "10**(10**10)", "-1", "x", "messages | length"])
    value = _value(draw, depth, number)
    kind = draw.randrange(9)
    if kind == 0:
        over = draw.choice([f"range({number})", "x", "messages", value])
        return "{% for i in " + over + " %}" + inner() + "{% endfor %}"
    if kind == 1:
        return "{% set x = " + value + " %}" + inner()
    if kind == 2:
        double = "{% for i in range(" + number + ") %}{% set n.x = n.x ~ n.x %}{% endfor %}"
        return "{% set n = namespace(x=x) %}" + double + inner()
    if kind == 3:
        calls = draw.choice(["", "{{ m(y) }}", "{{ m(y) }}{{ m(x) }}"])
        return "{% macro m(y) %}" + inner() + calls + "{% endmacro %}{{ m(x) }}"
    if kind == 4:
        return "{% if " + value + " %}" + inner() + "{% else %}" + inner() + "{% endif %}"
    if kind == 5:
        return "{{ " + value + " }}" + inner()
    if kind == 6:
        broken = ["{% include x %}", "{% raw %}", "{% endfor %}", "{{", "{# ", "{% call m(x) %}", "\0"]
        return draw.choice(broken) + inner()
    if kind == 7:
        return "{{ " + draw.choice(["(", "[", "not ", "- ", "{1:"]) * draw.choice([3, 300, 30000]) + "1 }}"
    return inner() + inner()


def _value(draw: random.Random, depth: int, number: str) -> str:
    filters = ["upper", "list", "join(x)", "replace('a', x)", "tojson", "sort", "unique", "length", "reverse"]
    filters += [f"center({number})", f"batch({number})", f"indent({number})", "map('upper')", "xmlattr"]
    forms = ["x ~ x", "x + x", "x.__class__", "messages", "x[::2]", "[x, [x, [x]]]", "x is string"]
    forms += [f"x * {number}", f"{number} * [x]", f"'%0{number}d' % 1", f"range({number}) | list", f"x.ljust({number})"]
    forms += [f"x | {draw.choice(filters)}", f"messages | {draw.choice(filters)}", "'{:>999999999}'.format(x)"]
    forms += ["x.join([x, x])", "lipsum(99)", "cycler(x)"]
    value = draw.choice(forms)
    return f"({value} | {draw.choice(filters)})" if depth and draw.random() < 0.4 else f"({value})"
