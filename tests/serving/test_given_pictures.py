"""Pictures of requests: what is opened, what is refused before it is decoded, and that nothing of it is logged."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import struct
import urllib.request
import zlib

import numpy as np
import pytest
import scripted
import serving
from PIL import Image
from serving import data_url, image_part, text_part

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.generate import Prompt
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.serve.settings import Limits, Settings

LIMITS = Limits(image_bytes=1 << 20, images=4, pixels=1_000_000, body_bytes=8 << 20)


@pytest.fixture(scope="module")
def engine():
    return scripted.Engine()


@pytest.fixture(scope="module")
def server(fastv_bundle, engine):
    with serving.running(Settings("tiny", limits=LIMITS), open_bundle(fastv_bundle), engine) as made:
        yield made


def ask(server, *parts):
    return server.ask([text_part("say 2"), *parts])


def png_of(width: int, height: int, depth: int = 1) -> bytes:
    """A header that promises much, and no pixels."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = piece(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + piece(b"IDAT", zlib.compress(b"\0" * 100)) + piece(b"IEND", b"")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/a.png",
        "https://example.org/a.png",
        "HTTP:\\\\127.0.0.1\\a.png",
        "//127.0.0.1/a.png",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.png",
        "/etc/passwd",
        "-",
        "",
        " data:image/png;base64,AAAA",
    ],
)
def test_nothing_is_fetched_and_no_file_is_opened(server, engine, monkeypatch, url):
    """Requirement 4: refused while no socket can be opened but the test's own."""
    connection = server.connect()
    connection.connect()
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("a socket"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: pytest.fail("a socket"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("a URL"))
    before = len(engine.prepared)
    body = json.dumps({"messages": [{"role": "user", "content": [image_part(url)]}]})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    assert answer.status == 400 and error["code"] == "remote_url_refused"
    assert error["param"] == "messages[0].content[0].image_url.url" and len(engine.prepared) == before
    connection.close()


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (png_of(60_000, 60_000), "has more pixels than the limit of 67 million"),
        (png_of(1001, 1000), "1001 x 1000 pixels"),
        (bytes((1 << 20) + 9), "at most 1 MB"),
        (b"", "no picture that is read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that is read here"),
        (b"8BPS" + bytes(90), "no picture that is read here"),
        (b"\0\0\2" + bytes(9) + b"\x09\0\x09\0\x18\0" + bytes(300), "no picture that is read here"),  # TGA
        (b"\x80\0\0\0\x11\xaf\1\0" + bytes(120), "no picture that is read here"),  # FLI
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture that is read here"),
    ],
    ids=["bomb", "large", "long", "empty", "eps", "psd", "tga", "fli", "svg"],
)
def test_refused_without_decoding(server, monkeypatch, picture, said):
    """Requirements 5 and 6: by header or first bytes; no decoder runs."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    reply = ask(server, image_part(picture))
    assert reply.status == 400 and said in reply.error["message"] and reply.error["code"] == "invalid_image"
    assert reply.error["param"] == "messages[0].content[1].image_url.url"


def test_too_many_pictures(server, monkeypatch):
    """Requirement 5: by their number before any is decoded, and by their pixels together."""
    small = image_part(Image.new("RGB", (4, 4)))
    assert ask(server, *[small] * 4).status == 200
    large = image_part(Image.new("L", (800, 800)))
    reply = ask(server, large, large)
    assert reply.status == 400 and "1000000 pixels together" in reply.error["message"]
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("opened"))
    reply = ask(server, *[small] * 1000)
    assert reply.status == 400 and "1000 pictures, at most 4" in reply.error["message"]


def odd_pictures() -> dict[str, tuple[bytes, bool]]:
    """Bytes of strange pictures, and whether they are whole."""
    picture = generated_picture(3)

    def saved(image, kind="PNG", **settings):
        file = io.BytesIO()
        image.save(file, kind, **settings)
        return file.getvalue()

    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    frames = [Image.new("P", (9, 9), n) for n in range(3)]
    return {
        "1x1": (saved(picture.resize((1, 1))), True),
        "1xN": (saved(picture.resize((1, 900))), True),
        "Nx1": (saved(picture.resize((900, 1))), True),
        "cmyk": (saved(picture.convert("CMYK"), "JPEG"), True),
        "16 bit": (saved(deep), True),
        "float": (saved(Image.fromarray(np.random.default_rng(1).random((9, 9), np.float32)), "TIFF"), True),
        "animated": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "palette": (saved(picture.quantize(7)), True),
        "transparent": (saved(picture.convert("RGBA")), True),
        "truncated": (saved(picture)[:2000], False),
        "truncated jpeg": (saved(picture, "JPEG")[:900], False),
        "no bytes": (b"", False),
        "noise": (np.random.default_rng(2).bytes(3000), False),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_get_an_answer_or_a_refusal(server, engine, name):
    """Requirements 7 and 8: the error is one of our own sentences."""
    picture, whole = odd_pictures()[name]
    reply = ask(server, image_part(picture))
    if whole:
        assert reply.status == 200
        (prompt,) = [m.content for m in engine.prepared[-1]]
        assert isinstance(prompt, Prompt) and prompt.pictures[0].mode == "RGB"
        return
    param = "messages[0].content[1].image_url.url"
    sentences = (
        f"{param}: the picture is no picture that is read here; give a PNG, JPEG, WebP, BMP, GIF or TIFF",
        f"{param}: the picture is damaged, truncated or unreadable; give an intact picture",
    )
    assert reply.status == 400 and reply.error["message"] in sentences
    assert reply.error | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_image",
    }


@pytest.mark.parametrize("url", ["data:", "data:,x", "data:image/png;base64", "data:a;base64,&&", "DATA:x;base64,A"])
def test_data_urls_that_are_none(server, url):
    assert ask(server, image_part(url)).error["code"] == "invalid_image"


def test_order_of_words_and_pictures(server, engine):
    """Behind all words, pictures go before them, as chat templates write them; between words they stay."""
    red, blue = (image_part(Image.new("RGB", (4, 4), colour)) for colour in ("red", "blue"))

    def kinds() -> list[str]:
        parts = engine.prepared[-1][-1].content.parts
        return [p if isinstance(p, str) else "rb"[p.source.getpixel((0, 0))[2] > 99] for p in parts]

    server.ask([text_part("say 2"), red, blue])
    assert kinds() == ["r", "b", "say 2"]
    server.ask([red, text_part("say 2"), blue])
    assert kinds() == ["r", "say 2", "b"]
    server.ask([text_part("say 2"), red, text_part("than"), blue, text_part("?")])
    assert kinds() == ["say 2", "r", "than", "b", "?"]


def test_no_log_line_holds_words_or_pictures(server, caplog):
    """Requirement 5: whether requests are answered, refused or fail."""
    caplog.set_level(logging.DEBUG)
    picture = data_url(generated_picture(5))
    for words in ("say 2 swordfish", "refuse swordfish", "crash swordfish", "too long swordfish"):
        for url in (picture, picture[:300], "http://swordfish/"):
            server.ask([text_part(words), image_part(url)])
    lines = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert len([line for line in lines if "chatcmpl-" in line]) >= 12  # a line of the test before may come late
    for secret in ("swordfish", "/etc/passwd", picture[40:60], base64.b64decode(picture[30:62]).hex()[:16]):
        assert not any(secret in line for line in lines)
