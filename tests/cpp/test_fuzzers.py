"""libFuzzer over the C++ code that reads what strangers wrote, from seeds that the other tests use."""

import json
import os
import shutil
import subprocess

import pytest
import templates
import test_pictures
import test_prompt
import test_tokenizer
from probing import ROOT

from vlmtrim.export import prompt_form
from vlmtrim.export.weights.tiny import SPECIAL_IDS, write_tokenizer
from vlmtrim.graphs.caches import load_policy
from vlmtrim.runtime.image import generated_picture

SECONDS = int(os.environ.get("VLMTRIM_FUZZ_SECONDS", "10"))
BUILD = ROOT / "build/cpp-fuzz"


@pytest.fixture(scope="module")
def built():
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    # With the headers that scripts/cpp.sh finds, in a build of its own.
    environment = {**os.environ, "VLMTRIM_CPP_BUILD": str(BUILD)}
    options = ["-DVLMTRIM_FUZZ=ON", "-DVLMTRIM_TESTS=OFF", "-DVLMTRIM_EXAMPLES=OFF", "-DCMAKE_CXX_COMPILER=clang++"]
    done = subprocess.run([ROOT / "scripts/cpp.sh", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return BUILD / "fuzz"


def contracts(export_tiny):
    yield (export_tiny("cut", cache=load_policy("snapkv")()) / "contract.json").read_bytes()
    fields = {"family": "mllama", "method": "trimmed-llama", "ratio": 0.25, "images": 3}
    yield (export_tiny("cpp-trimmed", **fields) / "contract.json").read_bytes()


def tokenizers(export_tiny):
    for make in test_tokenizer.KINDS.values():
        yield make().to_str().encode() + "\0 Héllo 12345 <image> 你好\n".encode()


def prompts(export_tiny):
    """By the fuzzer's tokenizer, which has the tiny one's ids."""
    for name, template in templates.FORMS.items():
        folder = BUILD / f"seed-{name}"
        folder.mkdir(exist_ok=True)
        write_tokenizer(folder, SPECIAL_IDS)
        (folder / "chat_template.jinja").write_text(template)
        assert prompt_form.write_form(folder, test_prompt.CONTRACT) is None
        form = json.loads((folder / "prompt.json").read_text())
        form["video"] = {"before": form["image"], "behind": ["\n"]}
        (folder / "prompt.json").write_text(json.dumps(form))
        for said in (
            b"Odd.\2Hi </s>\6\1",
            b"Odd\6\1\2What?\3 Yes \4\2And\6now?",
            b"\2Hi </s>",
            b"Be brief.\2What <image>?\3 Yes \4And<s>\1 now\5\4\1\2Which?\2Why?\4End",
        ):
            yield (folder / "prompt.json").read_bytes() + b"\0" + said


def pictures(export_tiny):
    forms = [("png", mode) for mode in ("RGB", "P", "LA")] + [("jpeg", "RGB"), ("jpeg", "L")]
    forms += [("webp", "RGB"), ("webp", "RGBA")]
    for suffix, mode in forms:
        path = BUILD / f"seed.{suffix}"
        generated_picture(0).resize((20, 14)).convert(mode).save(path)
        yield path.read_bytes()
    frames = [(2, 4, generated_picture(1).resize((10, 8))), (0, 0, generated_picture(2).resize((20, 14)))]
    yield test_pictures.animation(frames, (20, 14))


SEEDS = {"contract": contracts, "tokenizer": tokenizers, "prompt": prompts, "picture": pictures}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_nothing_is_found(name, built, export_tiny, tmp_path):
    (tmp_path / "seeds").mkdir()
    for number, data in enumerate(SEEDS[name](export_tiny)):
        (tmp_path / f"seeds/{number}").write_bytes(data)
    command = [built / f"fuzz_{name}", f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=3000", "-seed=7"]
    command += ["-max_len=200000", f"-artifact_prefix={BUILD}/{name}-", str(tmp_path / "seeds")]
    command += ["-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    (BUILD / f"{name}.log").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
