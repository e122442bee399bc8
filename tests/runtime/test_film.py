"""Video files: frames that transformers would take, at the size that the model sees, and nothing else in memory."""

import math
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchless import function_of

from vlmtrim import runtime
from vlmtrim.export.checkpoint import load_family
from vlmtrim.export.job import Job
from vlmtrim.export.job_contract import build_contract
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime import Video
from vlmtrim.runtime.cli import main
from vlmtrim.runtime.film import is_film
from vlmtrim.runtime.processors.base import load_processor

av = pytest.importorskip("av")
WIDTH, HEIGHT, RATE = 112, 84, 10
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "video_llava", "llava_onevision")


def frames_of(count):
    """Pictures that differ in every pixel from frame to frame."""
    ramp = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[..., None]
    return [Image.fromarray(((ramp * [1, 2, 3] + 29 * i) % 256).astype(np.uint8)) for i in range(count)]


def write(path, count, codec="ffv1", pixels="bgr0"):
    """A film that loses nothing (FFV1), or not."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(RATE))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for picture in frames_of(count):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write(tmp_path_factory.mktemp("film") / "film.mkv", 60)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """name -> the processor of a tiny bundle."""
    made = {}
    for family in (*FAMILIES, "llava"):
        module, folder = load_family(family), tmp_path_factory.mktemp(family)
        config = module.tiny_config()
        config.save_pretrained(folder)
        tiny.write_processor(module, folder, config, tiny.SPECIAL_IDS)
        contract = build_contract(Job("", "", max_seq_len=512), module, config, torch.float32, folder)
        made[family] = load_processor(Folder(folder), contract)
    return made


def sampled(total, rate, fps, most):
    """Qwen2VLVideoProcessor.sample_frames as its file has it."""
    sample = function_of("qwen2_vl", "sample_frames", math=math, torch=torch)
    own = SimpleNamespace(num_frames=None, fps=fps, temporal_patch_size=2, min_frames=4, max_frames=most)
    return sample(own, SimpleNamespace(total_num_frames=total, fps=rate)).tolist()


@pytest.mark.parametrize("fps", [0.5, 2.0, 3.7])
def test_frames_are_those_that_transformers_samples(processors, fps):
    processor = processors["qwen2_5_vl"]
    most = processor.frames(10**6, 1.0, 1000.0).size
    assert 4 < most <= 768
    for total in (4, 5, 37, 100, 299, 1000, 5000):
        for rate in (10.0, 24.0, 29.97):
            found = processor.frames(total, rate, fps)
            expected = np.array(sampled(total, rate, fps, most))
            # theirs are floored in float32: one too low at times, or one behind the film's end
            expected = expected[expected < total]
            assert found.size == expected.size and np.abs(found - expected).max() <= 1
            assert (found == expected).mean() > 0.7


def test_eight_frames_of_video_llava_are_those_of_its_authors(processors):
    """Model card of LanguageBind/Video-LLaVA-7B-hf: np.arange(0, total, total / 8).astype(int)."""
    for total in (8, 60, 100, 2048):
        expected = np.arange(0, total, total / 8).astype(int)
        np.testing.assert_array_equal(processors["video_llava"].frames(total, 10.0, 2.0), expected)
    assert processors["video_llava"].frames(3, 10.0, 2.0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("fps", [2.0, 3.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_film_is_its_frames_given_one_by_one(processors, film, family, fps):
    """To the bit, though what is held was shrunk to what the model sees."""
    processor = processors[family]
    video = runtime.read_film(film, processor, fps)
    chosen = processor.frames(60, RATE, fps)
    times = [number / RATE for number in chosen]
    given = Video([frames_of(60)[number] for number in chosen], video.fps, times, 6.0).load()
    assert len(video.frames) == len(chosen) >= 8
    assert video.fps == pytest.approx(len(chosen) / 6)
    whole, shrunk = processor([given]), processor([video.load()])
    assert whole.tokens == shrunk.tokens and whole.grids == shrunk.grids and whole.words == shrunk.words
    for name in whole.inputs:
        np.testing.assert_array_equal(whole.inputs[name], shrunk.inputs[name])


def test_a_long_film_leaves_few_pixels_in_memory(processors, tmp_path):
    video = runtime.read_film(write(tmp_path / "long.mkv", 400), processors["qwen2_5_vl"], 10.0)
    pixels = sum(frame.width * frame.height for frame in video.frames)
    assert pixels <= 2 * processors["qwen2_5_vl"].contract.image_tokens * 28**2 < 400 * WIDTH * HEIGHT


def test_a_film_that_lies_on_its_side_is_turned(processors, tmp_path):
    """Telephones write a matrix (ISO 14496-12, tkhd) in place of turning pixels."""
    path = write(tmp_path / "film.mp4", 8, "mpeg4", "yuv420p")
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    quarter = [0, 1 << 16, 0, -(1 << 16) & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30]  # clockwise
    data[start : start + 36] = b"".join(number.to_bytes(4, "big") for number in quarter)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    before = runtime.read_film(path, processors["qwen2_5_vl"]).frames[0]
    after = runtime.read_film(turned, processors["qwen2_5_vl"]).frames[0]
    assert after.size == before.size[::-1]
    difference = np.asarray(after, float) - np.asarray(before.transpose(Image.Transpose.ROTATE_270), float)
    assert np.abs(difference).max() <= 1  # resized before or after


def test_run_vlm_takes_a_film(export_tiny, film, capsys):
    folder = export_tiny("film", family="video_llava", method="none")
    assert main([str(folder), "--video", str(film), "--prompt", "What happens?", "--max-new-tokens", "2"]) == 0
    assert "136 visual tokens" in capsys.readouterr().err


def test_what_is_no_film_is_refused_in_a_sentence(processors, film, tmp_path, picture):
    assert is_film(film) and not is_film(picture) and not is_film(tmp_path)
    (tmp_path / "words.mkv").write_text("no film")
    (tmp_path / "cut.mkv").write_bytes(film.read_bytes()[:300])
    for name in ("words.mkv", "cut.mkv"):
        with pytest.raises(runtime.RuntimeRefusal, match=f"{name} (cannot be read as a video|has no moving)"):
            runtime.read_film(tmp_path / name, processors["video_llava"])
    with pytest.raises(runtime.RuntimeRefusal, match="of llava take no videos"):
        runtime.read_film(film, processors["llava"])
    with pytest.raises(runtime.RuntimeRefusal, match="frames a second"):
        runtime.read_film(film, processors["qwen2_5_vl"], 0.0)


def test_a_film_without_pyav_names_the_extra(processors, film, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(runtime.RuntimeRefusal, match=r"vlmtrim\[video\]"):
        runtime.read_film(film, processors["video_llava"])
