"""Videos through the C interface and vlmtrim-run: answers are those of the Python runtime; other frames are refused."""

import json
import shutil

import pytest
from PIL import Image
from test_c_interface import SAMPLED, Failed, Native, python_answer, seeded
from test_pictures import saved
from test_session import CASES
from test_tools import run

from vlmtrim import runtime
from vlmtrim.graphs.bundle import seal
from vlmtrim.runtime import cli
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.video import Video


@pytest.fixture
def bundle_of(export_tiny):
    """A bundle by the name of its case."""
    return lambda name: export_tiny(f"cpp-{name}", family=CASES[name][0], **CASES[name][1])


NAMES = ["qwen2_5", "qwen3", pytest.param("onevision", marks=pytest.mark.slow), "video", "smol", "intern"]


@pytest.mark.parametrize("name", NAMES)
def test_questions_about_videos_have_the_tokens_of_python(name, bundle_of, tmp_path):
    folder, settings = bundle_of(name), {"max_new_tokens": 12, **SAMPLED}
    native, picture = Native(folder), generated_picture(5).resize((60, 90))
    frames = [generated_picture(seed).resize((40, 30)) for seed in range(4)]
    frames[1].save(tmp_path / "1.png")
    film, more = Video([frames[0], (tmp_path / "1.png").read_bytes(), *frames[2:]], 1.5), Video(frames[:1], 8.0)
    with runtime.open(folder, backend="ort-cpu") as chat:
        for question, shown in (("What?", [film]), ("Now?", [more, picture]), ("Then?", [])):
            expected = python_answer(chat, question, shown, **settings)
            assert native.generate([*shown, question], **seeded(settings)) == expected
        image, video = chat.session.contract.image_token_id, chat.session.contract.video_token_id
        chat.reset()
        words = chat.session.processor([film.load()]).words  # ids from outside may have all tokens of a video
        ids = [video if token == image and video else token for token in chat._rows[0].ask("Hi", 1, (0,), words)]
        chat.reset()
        native.reset()
        assert native.generate([film], ids=ids, max_new_tokens=8) == python_answer(chat, "Hi", [film], max_new_tokens=8)
    native.close()


def test_vlmtrim_run_takes_frames(bundle_of, tmp_path, capsys):
    folder, frames = bundle_of("video"), tmp_path / "frames"
    frames.mkdir()
    for seed in range(3):
        generated_picture(seed).resize((33, 44)).save(frames / f"{seed}.png")
    generated_picture(7).save(tmp_path / "still.png")
    asked = ["--video", str(frames), "--image", str(tmp_path / "still.png"), "--fps", "0.5", "--prompt", "What?"]
    asked += ["--max-new-tokens", "6", "--json"]
    assert cli.main([str(folder), *asked, "--backend", "ort-cpu"]) == 0
    expected, found = json.loads(capsys.readouterr().out), json.loads(run("vlmtrim-run", folder, *asked).stdout)
    assert found["visual"] == 3 * 17 + 16
    assert {**found, "times": 0} == {**expected, "times": 0}
    names = [word for name in sorted(frames.iterdir()) for word in ("--video", name)]
    assert json.loads(run("vlmtrim-run", folder, *names, *asked[2:]).stdout)["text"] == expected["text"]


PICTURE = generated_picture(0)
PLAIN = saved(Image.new("RGB", (300, 240)), "PNG")


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (Video([], 2), "a video without frames; give at least one"),
        (Video([b""] * 4097, 2), "a video of 4097 frames; give at most 4096"),
        (Video([PICTURE], -1), "a video of -1 frames a second; give a number above 0, from 0.001 to 1000"),
        (Video([PICTURE, b"GIF"], 2), "frame 2 of a video of 2: the picture is no picture that is read here"),
        (Video([PLAIN] * 4096, 2), "a video of 4096 frames of 300 x 240 pixels; all together may have 268 million"),
        (Video([PICTURE, PICTURE.resize((9, 7))], 2), r"2 sizes or more, among them \[\(9, 7\), \(240, 200\)\]"),
        (Video([PICTURE], 2), "bundles of llava take no videos; give the frames as pictures"),
    ],
    ids=["none", "many", "slow", "no picture", "large", "sizes", "family"],
)
def test_what_is_no_video_is_refused(video, said, fastv_bundle):
    native = Native(fastv_bundle)
    with pytest.raises(Failed, match=said):
        native.generate([video, "x"])
    native.close()


def test_a_bundle_that_does_not_say_how_videos_are_written_is_refused(bundle_of, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("video"), folder)
    form = json.loads((folder / "prompt.json").read_text())
    del form["videos"]
    (folder / "prompt.json").write_text(json.dumps(form))
    seal(folder)
    native = Native(folder)
    with pytest.raises(Failed, match=r"prompt\.json does not say that videos are written as pictures are"):
        native.generate([Video([PICTURE], 2), "x"])
    native.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fps", "0"], "--fps is 0; give a number above 0"),
        (["--fps", "2000"], "a video of 2000 frames a second; give a number above 0, from 0.001 to 1000"),
        (["--video", "/nowhere"], "frame 1 of a video of 1: no picture at /nowhere"),
        (["--video", "empty"], "a video without frames"),
    ],
)
def test_bad_frames_are_a_sentence(arguments, said, fastv_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    PICTURE.save(tmp_path / "a.png")
    given = [tmp_path / word if word == "empty" else word for word in arguments]
    given = given if "--video" in given else ["--video", tmp_path / "a.png", *given]
    done = run("vlmtrim-run", fastv_bundle, "--prompt", "x", *given)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
