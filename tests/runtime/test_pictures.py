"""Pictures of strangers: every odd one is opened or refused in a sentence, and nothing of the process changes."""

from __future__ import annotations

import base64
import errno
import io
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from vlmtrim.runtime import Video, cli, show
from vlmtrim.runtime import image as pictures
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import load_image, picture_argument
from vlmtrim.runtime.video import as_pictures

# pytest shows warnings whatever filters a module sets; that they stay away is tested in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, more: bytes = b"", rows: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert("RGB" if mode not in ("RGBA", "LA") else mode).convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return saved(noise(30, 20), kind, exif=exif)


BOMB = zlib.compress(bytes(200 << 20), 9)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
# name -> (bytes, size that it is opened at, or None for a refusal)
CORPUS = {
    "1x1": (saved(noise(1, 1), "PNG"), (1, 1)),
    "1xN": (saved(noise(1, 65000), "JPEG"), (1, 65000)),
    "Nx1": (saved(noise(65000, 1), "JPEG"), (65000, 1)),
    "no byte": (b"", None),
    "truncated": (saved(noise(60, 50), "PNG")[:900], None),
    "cmyk jpeg": (saved(noise(30, 20).convert("CMYK"), "JPEG"), (30, 20)),
    "cmyk tiff": (saved(noise(30, 20).convert("CMYK"), "TIFF"), (30, 20)),
    "lab tiff": (saved(Image.new("LAB", (30, 20)), "TIFF"), (30, 20)),
    "1 bit": (saved(noise(30, 20, "1"), "PNG"), (30, 20)),
    "1 bit tiff": (saved(noise(30, 20, "1"), "TIFF", compression="group4"), (30, 20)),
    "palette": (saved(noise(30, 20, "P"), "PNG"), (30, 20)),
    "palette of bytes": (saved(noise(30, 20, "P"), "PNG", transparency=bytes(range(200))), (30, 20)),
    "grey and alpha": (saved(noise(30, 20, "LA"), "PNG"), (30, 20)),
    "animated gif": (saved(noise(9, 8), "GIF", save_all=True, append_images=[noise(9, 8), noise(9, 8)]), (9, 8)),
    "animated webp": (saved(noise(9, 8), "WEBP", save_all=True, append_images=[noise(9, 8)]), (9, 8)),
    "turned jpeg": (turned("JPEG"), (20, 30)),
    "turned tiff": (turned("TIFF"), (20, 30)),
    "corrupt exif": (saved(noise(30, 20), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\xff" * 40), (30, 20)),
    "mpo": (saved(noise(30, 20), "MPO", save_all=True, append_images=[noise(30, 20)]), (30, 20)),
    "huge header": (png(60000, 60000), None),
    "warned header": (png(10000, 10000), None),
    "largest header": (png(2**31 - 1, 2**31 - 1), None),
    "no pixels": (png(0, 5), None),
    "apng of no frames": (png(1, 1, more=chunk(b"acTL", bytes(8)), rows=bytes(4)), (1, 1)),
    "ztxt bomb": (png(1, 1, more=chunk(b"zTXt", b"a\0\0" + BOMB), rows=bytes(4)), None),
    "iccp bomb": (png(1, 1, more=chunk(b"iCCP", b"a\0\0" + BOMB), rows=bytes(4)), None),
    "itxt bomb": (png(1, 1, more=chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB), rows=bytes(4)), None),
    "eps": (EPS, None),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", None),
    "pdf": (b"%PDF-1.4\n", None),
    "ppm": (b"P6 2 2 255\n" + bytes(12), None),
}


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("given", ["path", "bytes"])
def test_odd_pictures_are_opened_or_refused_in_a_sentence(tmp_path, name, given):
    data, size = CORPUS[name]
    path = tmp_path / "odd.png"
    path.write_bytes(data)
    source = path if given == "path" else data
    if size is not None:
        loaded = load_image(source)
        assert (loaded.mode, loaded.size) == ("RGB", size)
        return
    with pytest.raises(RuntimeRefusal) as caught:
        load_image(source)
    said = str(caught.value)
    assert said.startswith("the picture " if given == "bytes" else str(path)) and "\n" not in said
    assert not any(word in said for word in ("0x", "PIL", "Pillow", "Ghostscript", "Error", "bytes not", "MAX_"))


def test_any_damage_is_opened_or_refused():
    """Bytes of small pictures changed at random: nothing but a picture or a RuntimeRefusal."""
    draw, outcomes = random.Random(11), {True: 0, False: 0}
    whole = [saved(noise(23, 17), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")]
    whole += [data for name, (data, _) in CORPUS.items() if len(data) < 5000 and name != "eps"]
    for _ in range(1500):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 6)):
            if data:
                data[draw.randrange(len(data))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data) + 1) :]
        try:
            outcomes[load_image(bytes(data)).mode == "RGB"] += 1
        except RuntimeRefusal as refusal:
            assert "\n" not in str(refusal)
            outcomes[False] += 1
    assert outcomes[True] > 100 and outcomes[False] > 100


def test_an_eps_file_reaches_no_interpreter(tmp_path, monkeypatch):
    """Finding 22."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: called.append(args))
    for suffix in ("eps", "png"):
        (tmp_path / f"a.{suffix}").write_bytes(EPS)
        with pytest.raises(RuntimeRefusal, match="PNG, JPEG"):
            load_image(tmp_path / f"a.{suffix}")
    assert called == []


def test_a_lower_limit_of_the_process_is_a_refusal_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(RuntimeRefusal, match="more pixels than the limit"):
        load_image(saved(noise(30, 20), "PNG"))


def test_threads_do_not_meet():
    """Finding 6 of the issue: Pillow's limit stays what it was, and every thread gets its own picture."""
    before, wrong = Image.MAX_IMAGE_PIXELS, []
    good = {side: saved(noise(side, side + 1), kind) for side, kind in ((40, "PNG"), (50, "WEBP"), (60, "TIFF"))}

    def work(side: int) -> None:
        for _ in range(40):
            if before != Image.MAX_IMAGE_PIXELS or load_image(good[side]).size != (side, side + 1):
                wrong.append(side)
            try:
                load_image(png(60000, 60000))
                wrong.append(side)
            except RuntimeRefusal:
                pass

    threads = [threading.Thread(target=work, args=(side,)) for side in good for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and before == Image.MAX_IMAGE_PIXELS


FRESH = """
import sys, threading
from vlmtrim.runtime.image import load_image
paths, found = sys.argv[1:], []
gate = threading.Barrier(len(paths))
def work(path):
    gate.wait()
    try:
        found.append(load_image(path).size)
    except Exception as error:
        found.append(type(error).__name__)
threads = [threading.Thread(target=work, args=(path,)) for path in paths]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sorted(map(str, found)))
"""


def test_a_fresh_process_opens_with_threads_at_once_and_says_nothing(tmp_path):
    """Finding 23: no warnings of Pillow on stderr; and no thread finds a plugin missing that another one loads."""
    noisy = ("corrupt exif", "palette of bytes", "apng of no frames", "warned header", "animated webp", "cmyk tiff")
    for name in noisy:
        (tmp_path / name).write_bytes(CORPUS[name][0])
    command = [sys.executable, "-W", "default::ResourceWarning", "-c", FRESH, *(str(tmp_path / n) for n in noisy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = [CORPUS[name][1] or "RuntimeRefusal" for name in noisy]
    assert (done.stdout.strip(), done.stderr) == (str(sorted(map(str, expected))), "")


@pytest.mark.parametrize("name", ["cmyk jpeg", "cmyk tiff", "1 bit", "1 bit tiff", "palette"])
def test_other_modes_are_what_pillow_makes_of_them(name):
    with Image.open(io.BytesIO(CORPUS[name][0])) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(CORPUS[name][0])), expected)


def test_a_file_is_bounded_before_it_is_read(tmp_path):
    """Of a WebP file, Pillow reads the whole before it looks at the size."""
    with (tmp_path / "sparse.webp").open("wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(30 << 30)
    with pytest.raises(RuntimeRefusal, match=r"sparse\.webp has more than 512 MB"):
        load_image(tmp_path / "sparse.webp")


def test_a_picture_is_taken_in_every_form(tmp_path):
    """Finding 24."""
    image = noise(30, 20)
    path, data = tmp_path / "a.png", saved(image, "PNG")
    path.write_bytes(data)
    stream = io.BytesIO(data)
    stream.read(7)  # it is read from its start all the same
    with path.open("rb") as file:
        for source in (
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            stream,
            file,
            np.asarray(image),
            image,
        ):
            assert as_pictures(source)[0] is source and len(as_pictures(source)) == 1
            assert as_pictures([source, source]) == [source, source] or isinstance(source, np.ndarray)
            np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(load_image(grey)), np.repeat(grey[..., None], 3, axis=2))
    assert as_pictures(()) == [] and as_pictures(picture for picture in (path,)) == [path]
    assert len(as_pictures(Video([image]))) == 1


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (None, "given as None;"),
        (5, "given as int;"),
        ([None], "picture 1 is given as None;"),
        (["a.png", ["b.png"]], "picture 2 is given as list;"),
        ({"a": 1}, "given as dict;"),
        (np.zeros((2, 4, 4, 3), np.uint8), "an array of 4 dimensions;"),
    ],
)
def test_what_is_no_picture_is_named(images, said):
    with pytest.raises(RuntimeRefusal, match=said):
        as_pictures(images)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
        (io.StringIO("text"), "StringIO of str"),
        (5, "given as int"),
        ("https://example.org/cat.png", "https://example.org/cat.png is a URL; nothing is fetched"),
        ("a\0b", "no picture at 'a"),
        ("x" * 5000, "no picture at x"),
    ],
)
def test_a_source_that_is_none_is_refused_by_name(source, said):
    with pytest.raises(RuntimeRefusal, match=said):
        load_image(source)


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "HTTPS://a/b", "file:///etc/passwd", "file:a", "ftp://a/b", "s3://a/b"]
)
def test_urls_are_refused_and_no_socket_is_opened(monkeypatch, url):
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket"))
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("a socket"))
    with pytest.raises(RuntimeRefusal, match="is a URL; nothing is fetched here"):
        picture_argument(url)


def test_a_data_url_is_a_picture():
    data = saved(noise(30, 20), "PNG")
    text = base64.b64encode(data).decode()
    assert picture_argument(f"data:image/png;base64,{text}") == data
    assert picture_argument(f"DATA:image/png;name=a;BASE64,{text}") == data
    assert picture_argument("data;base64,a.png") == "data;base64,a.png"  # a path like any other


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data:image/svg+xml,<svg/>", "no data: URL of a picture"),
        ("data:image/png;base64,&&&&", "no base64"),
        ("data:image/png;base64,AAA", "no base64"),
    ],
)
def test_other_data_urls_are_refused(text, said):
    with pytest.raises(RuntimeRefusal, match=said):
        picture_argument(text)


def test_a_data_url_is_bounded_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 3000)
    monkeypatch.setattr(base64, "b64decode", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(RuntimeRefusal, match="at most"):
        picture_argument("data:image/png;base64," + "A" * 4000)


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes, terminal: bool = False):
        super().__init__(io.BytesIO(data))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_dash_is_stdin(monkeypatch):
    data = saved(noise(30, 20), "PNG")
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert picture_argument("-") == data
    for stdin, said in ((Stdin(b""), "empty"), (Stdin(data, terminal=True), "terminal"), (None, "terminal")):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(RuntimeRefusal, match=said):
            picture_argument("-")
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    with pytest.raises(RuntimeRefusal, match="stdin has more than"):
        picture_argument("-")


def test_the_command_takes_a_picture_from_stdin_and_draws_it(fastv_bundle, picture, tmp_path, monkeypatch, capsys):
    argv = [str(fastv_bundle), "--prompt", "Hi?", "--max-new-tokens", "3", "--backend", "ort-cpu", "--image"]
    assert cli.main([*argv, str(picture)]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", Stdin(picture.read_bytes()))
    assert cli.main([*argv, "-", "--show-kept", str(tmp_path / "kept.png")]) == 0
    assert capsys.readouterr().out == expected
    assert (tmp_path / "kept.png").stat().st_size > 1000


@pytest.mark.parametrize("target", ["/proc/x.png", "/dev/full/x.png", "{}/folder.png", "{}/fifo.png"])
def test_a_drawing_that_cannot_be_written_is_refused_before_the_answer(fastv_bundle, picture, tmp_path, capsys, target):
    """Finding 14."""
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    argv = [str(fastv_bundle), "--prompt", "Hi?", "--image", str(picture), "--backend", "ort-cpu"]
    assert cli.main([*argv, "--show-kept", target.format(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("run-vlm: --show-kept") and captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo.png", "folder.png"]


def test_a_disk_that_is_full_leaves_no_half_a_drawing(tmp_path, monkeypatch):
    target = tmp_path / "kept.png"
    target.write_bytes(b"an older one")

    def full(self, stream, **options):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RuntimeRefusal, match=r"cannot write .*kept\.png \(No space left on device\)"):
        show.save_drawing(noise(9, 9), target)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"] and target.read_bytes() == b"an older one"


def test_a_drawing_is_written_through_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "kept.jpg").symlink_to(tmp_path / "there" / "real.jpg")
    show.save_drawing(noise(9, 9), tmp_path / "kept.jpg")
    with Image.open(tmp_path / "there" / "real.jpg") as image:
        assert image.format == "JPEG" and image.size == (9, 9)


def frame(side: int = 9) -> Image.Image:
    return Image.new("RGB", (side, side))


@pytest.mark.parametrize(
    ("film", "said"),
    [
        (Video([frame()] * 5000), "a video of 5000 frames; give at most 4096"),
        (Video([frame(1000)] * 400), "a video of 400 frames of 1000 x 1000 pixels; all together .* fewer frames"),
        (Video([frame()], float("nan")), "above 0"),
        (Video([frame()], float("inf")), "above 0"),
        (Video([frame()], 1e-300), "above 0"),
        (Video([frame()], "2"), "'2' frames a second"),  # type: ignore[arg-type]
        (Video([frame()], times=[0.0, 1.0]), "1 frames with 2 times; give one of each"),
        (Video([frame()], times=[float("nan")]), "a time in a video is nan; give seconds"),
        (Video([frame()], duration=-1.0), "a time in a video is -1.0; give seconds"),
        (Video([frame(), None]), "frame 2 of a video of 2: a picture is given as NoneType"),  # type: ignore[list-item]
    ],
)
def test_videos_are_bounded(film, said):
    with pytest.raises(RuntimeRefusal, match=said):
        film.load()


def test_the_frames_of_a_long_video_are_not_all_opened_before_it_is_refused(tmp_path):
    path = tmp_path / "a.png"
    frame(1000).save(path)
    start = time.perf_counter()
    with pytest.raises(RuntimeRefusal, match="all together"):
        Video([path] * 4000).load()
    assert time.perf_counter() - start < 2


def test_a_folder_of_frames_with_another_file_is_refused_by_its_name(tmp_path):
    frame().save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RuntimeRefusal, match=r"frame 2 of a video of 2: .*notes\.txt is no picture"):
        Video.of([tmp_path], 2.0).load()


def test_paths_are_said_on_one_line(tmp_path: Path):
    with pytest.raises(RuntimeRefusal) as caught:
        load_image(tmp_path / "a\nb\x1b[31m.png")
    assert str(caught.value).isprintable()
