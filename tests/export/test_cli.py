"""export-vlm: bad input gets one sentence and a status; a dry run tells the sizes. Nothing here traces a graph."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmtrim.export import arguments, memory, weights
from vlmtrim.export.cli import main
from vlmtrim.export.families import llava
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV
from vlmtrim.runtime.errors import RuntimeRefusal


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*argv) -> (status, stdout, stderr); the working directory is an empty folder."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(list(argv))
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert list(here.iterdir()) == []
        return status, out, err

    return call


def check_refused(result, *words: str, status: int = 2) -> None:
    code, out, err = result
    assert code == status
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("export-vlm: ")
    for word in words:
        assert word in lines[0]


def write_config(folder, change=None, **variant):
    folder.mkdir(parents=True, exist_ok=True)
    config = llava.tiny_config(**variant).to_dict()
    if change:
        change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny LLaVA as config.json alone: 4 layers, 16 visual tokens an image, 1024 positions."""
    return write_config(tmp_path_factory.mktemp("tiny"))


def test_unknown_model_is_refused_with_what_is_allowed(run):
    check_refused(run("--model", "nonsense"), "nonsense", "llava-7b", "tiny:", "hub id")


def test_unknown_family_is_refused_with_the_families_there_are(run):
    check_refused(run("--model", "tiny:nope"), "nope", "llava")
    check_refused(run("--model", "tiny:nope", "--dry-run"), "nope", "llava")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--k", "-1"),
        ("--r", "1"),
        ("--r", "1.5"),
        ("--r", "-0.1"),
        ("--r", "nan"),
        ("--max-seq-len", "0"),
        ("--max-seq-len", "-1"),
        ("--max-seq-len", "-5"),
        ("--max-seq-len", "1"),
        ("--max-seq-len", "1025"),
        ("--max-seq-len", "16"),
        ("--max-batch", "0"),
        ("--max-batch", "-2"),
        ("--images", "0"),
        ("--image-tokens", "-1"),
        ("--max-memory", "nan"),
        ("--max-memory", "inf"),
        ("--max-memory", "0"),
        ("--max-memory", "-1"),
        ("--eos-token-id", "-1"),
        ("--eos-token-id", "272"),
        ("--images", "64"),
        ("--seed", "-1"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_number(run, tiny, flag, value):
    check_refused(run("--model", tiny, flag, value, "--dry-run"), value)


@pytest.mark.parametrize("k", [4, 5, 100])
def test_k_beyond_the_layers_is_refused(run, tiny, k):
    check_refused(run("--model", tiny, "--k", str(k), "--dry-run"), str(k), "4")


@pytest.mark.parametrize(
    "argv", [["--k", "two"], ["--r", "half"], ["--dtype", "int3"], ["--method", "best"], ["--engine", "jet"], ["--x"]]
)
def test_what_argparse_cannot_read_has_status_2_and_no_traceback(run, tiny, argv):
    status, out, err = run("--model", tiny, *argv)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    assert argv[0] in err.splitlines()[-1]


def test_help_has_status_0(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "REMOVED" in out


@pytest.mark.parametrize("as_bundle", [True, False])
def test_an_existing_output_is_refused_without_force_and_unchanged(run, tiny, tmp_path, as_bundle):
    output = tmp_path / "out"
    output.mkdir()
    (output / ("SHA256SUMS" if as_bundle else "holiday.jpg")).write_text("precious")
    check_refused(run("--model", tiny, "--output", str(output)), str(output), "--output")
    if not as_bundle:
        check_refused(run("--model", tiny, "--output", str(output), "--force"), "is no bundle")
    assert [p.read_text() for p in output.iterdir()] == ["precious"]


def test_a_folder_without_config_is_refused(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    check_refused(run("--model", str(empty), "--dry-run"), str(empty), "config.json")
    output = tmp_path / "made"
    check_refused(run("--model", str(empty), "--output", str(output)), "config.json")
    assert not output.exists()


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"model_type": "bert"}', '{"model_type": 3}'])
def test_a_config_that_names_no_family_is_refused(run, tmp_path, text):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    check_refused(run("--model", str(folder), "--dry-run"))


def test_a_folder_without_weights_is_refused_and_leaves_nothing(run, tiny, tmp_path):
    output = tmp_path / "made"
    code, out, err = run("--model", tiny, "--output", str(output))
    assert (code, out) == (2, "")
    assert "model.safetensors" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.glob("*made*")) == []


def test_an_unsupported_text_model_is_refused_by_name(run, tmp_path):
    def change(config):
        config["text_config"] = {"model_type": "gpt2"}

    check_refused(run("--model", write_config(tmp_path / "m", change), "--dry-run"), "gpt2", "llama")


def test_an_unsupported_vision_tower_is_refused_by_name(run, tmp_path):
    def change(config):
        config["vision_config"] = {"model_type": "vit"}

    check_refused(run("--model", write_config(tmp_path / "m", change), "--dry-run"), "vit", "clip_vision_model")


def test_a_sliding_window_smaller_than_the_conversation_is_refused(run, tmp_path):
    def change(config):
        config["text_config"]["sliding_window"] = 300

    model = write_config(tmp_path / "m", change, text="mistral")
    check_refused(run("--model", model, "--max-seq-len", "301", "--dry-run"), "300")
    assert run("--model", model, "--max-seq-len", "300", "--dry-run")[0] == 0


def test_an_image_token_outside_the_vocabulary_is_refused(run, tmp_path):
    def change(config):
        config["image_token_id"] = 9999

    check_refused(run("--model", write_config(tmp_path / "m", change), "--dry-run"), "9999", "272")


def test_a_dry_run_prints_contract_and_sizes_and_writes_nothing(run):
    status, out, _ = run("--model", "tiny:llava", "--dry-run", "--k", "2", "--r", "0.5", "--max-seq-len", "512")
    assert status == 0
    for word in ("decoder.onnx: inputs", "visual_positions", "kept_indices", "layers 0-1", "layers 2-3"):
        assert word in out
    # 2 (key, value) x 2 layers x 2 heads x 64 wide x 4 bytes = 2048 bytes a token; 16 visual tokens, 8 removed
    assert f"{2048 * 2 * 512 / 1e6:.1f} MB" in out
    assert "504 tokens" in out


# Llama-2-7B: 32 layers, 32 key/value heads of 128; float16. CLIP ViT-L/14 at 336: 24 x 24 = 576 visual tokens.
BYTES_PER_TOKEN_AND_LAYER = 2 * 32 * 128 * 2


@pytest.fixture(scope="module")
def llava_7b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava-7b")
    large.write_config(folder, large.config_of("llava-7b"))
    return str(folder)


@pytest.mark.parametrize(("r", "kept"), [(0.5, 288), (0.75, 144), (0.9, 58), (0.0, 576)])
def test_the_plan_of_a_7b_model_tells_the_pruned_cache_bytes(llava_7b, r, kept):
    from vlmtrim.export.job import Job
    from vlmtrim.export.pipeline import prepare

    job = Job(model=llava_7b, output="", method=FastV(k=2, r=r), max_seq_len=2048, max_batch=2)
    out = "\n".join(prepare(job, Path(llava_7b), None).plan_lines)
    early = 2 * 2 * 2048 * BYTES_PER_TOKEN_AND_LAYER  # batch, layers, tokens
    late = 2 * 30 * (2048 - 576 + kept) * BYTES_PER_TOKEN_AND_LAYER
    dense = 2 * 32 * 2048 * BYTES_PER_TOKEN_AND_LAYER
    found = re.findall(r"caches(?: \d)? +([\d.]+) MB", out)
    assert found == [f"{value / 1e6:.1f}" for value in (early, late, early + late)]
    assert f"unpruned: {dense / 1e6:.1f} MB" in out
    parameters = float(re.search(r"\(([\d.]+) M parameters, float16, copies", out)[1])
    assert "disk            14128.9 MB" in out
    assert 7000 < parameters < 7100  # LLaVA-1.5-7B has 7.06 billion


def test_engine_shards_follow_from_memory(llava_7b):
    """A build takes 3.2 times its weights, a layer has 405 MB: 8 GB admit five layers, so seven pieces."""
    from vlmtrim.export.job import Job, Refusal
    from vlmtrim.export.pipeline import prepare

    def plan(**fields):
        job = Job(model=llava_7b, output="", engine="tensorrt-rtx", max_seq_len=2048, **fields)
        return prepare(job, Path(llava_7b), None).plan

    assert [plan(max_memory=limit).shards for limit in (60, 24, 18, 8)] == [1, 2, 3, 7]
    for limit in (60, 24, 18, 8):
        assert plan(max_memory=limit).peak <= limit * 1e9
    assert plan(max_memory=60, engine_shards=5).shards == 5
    with pytest.raises(Refusal, match=r"building the engines needs about 22\.3 GB, --max-memory allows 18 GB.*shards"):
        plan(max_memory=18, engine_shards=2)


def test_max_memory_refuses_before_the_work(run, tmp_path):
    argv = ["--model", "tiny:llava", "--output", str(tmp_path / "b"), "--max-memory", "0.1"]
    status, _, err = run(*argv)
    assert status == 2 and "--max-memory allows 0.1 GB" in err and "trace" not in err
    assert not list(tmp_path.glob("*b*"))


def test_a_dry_run_counts_the_operators_that_the_export_writes(run, tmp_path):
    argv = ["--model", "tiny:llava", "--k", "1", "--r", "0.5"]
    status, out, _ = run(*argv, "--dry-run", "--operators")
    assert status == 0
    assert run(*argv, "--output", str(tmp_path / "b"))[0] == 0
    nodes = json.loads((tmp_path / "b" / "job.json").read_text())["nodes"]
    # Two a layer and one behind them; the last layer's first is computed for all rows and for the last one.
    assert nodes["decoder"]["RMSNormalization"] == 10 and nodes["decoder"]["RotaryEmbedding"] == 8
    said = " ".join(out.split())
    for name, counts in nodes.items():
        listed = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        assert f"{name}: {sum(counts.values())} nodes: {listed}" in said


def test_operators_are_counted_in_a_dry_run_alone(run, tiny):
    check_refused(run("--model", tiny, "--operators"), "--operators", "--dry-run")


# Finding 19: what takes no look at the model's code takes no import of it.
EARLY = [
    ["--k", "100"],
    ["--k", "-1"],
    ["--r", "1"],
    ["--max-batch", "0"],
    ["--images", "0"],
    ["--image-tokens", "-1"],
    ["--max-seq-len", "1"],
    ["--max-seq-len", "1025"],
    ["--max-memory", "nan"],
    ["--engine-shards", "2"],
    ["--eos-token-id", "272"],
    ["--output", ""],
    ["--method", "trimmed-llama"],
    ["--ratio", "0.5"],
    ["--output", "."],
    ["--output", "/proc/bundle"],
    ["--model", "nonsense"],
    ["--model", "tiny:nope"],
    ["--model", "tiny:mllama"],
    ["--model", "tiny:llava", "--k", "4"],
    ["--model", "tiny:mllama", "--method", "trimmed-llama", "--ratio", "2"],
    ["--engine", "tensorrt"],
    ["--list"],
    ["--help"],
]
REFUSING = """
import json, sys
import vlmtrim.export.arguments as arguments
from vlmtrim.export.cli import main
arguments.find_library = lambda name: (_ for _ in ()).throw(arguments.RuntimeRefusal(name + " is not installed"))
for argv in json.loads(sys.argv[2]):
    try:
        status = main(["--model", sys.argv[1], *argv])
    except SystemExit as stop:
        status = stop.code
    print("status", status)
    loaded = sorted({"torch", "transformers", "onnx_ir"} & set(sys.modules))
    assert not loaded, (argv, loaded)
"""


def test_bad_arguments_are_refused_before_torch_is_imported(tiny, tmp_path):
    command = [sys.executable, "-c", REFUSING, tiny, json.dumps(EARLY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("status")]
    expected = ["0" if argv[0] in ("--list", "--help") else "1" if argv[0] == "--engine" else "2" for argv in EARLY]
    assert found == expected, done.stderr
    assert len(done.stderr.splitlines()) == len(EARLY) - 2


def test_a_dry_run_says_that_the_engines_library_is_missing(run, tiny, monkeypatch):
    def missing(name):
        raise RuntimeRefusal(f"{name} is not installed")

    monkeypatch.setattr(arguments, "find_library", missing)
    argv = ["--model", tiny, "--engine", "tensorrt"]
    status, out, err = run(*argv, "--dry-run")
    assert status == 0 and "engines" in out and "tensorrt is not installed" in err
    check_refused(run(*argv), "tensorrt is not installed", status=1)


@pytest.mark.parametrize("link", [True, False])
def test_a_bundle_that_does_not_fit_is_refused_before_the_trace(run, tmp_path, monkeypatch, link):
    """Finding 16: what is free is compared with what is written, and links write nothing."""
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    monkeypatch.setattr(weights.taking, "_clone", lambda *_: False)
    argv = ["--model", "demo", "--output", str(tmp_path / "b"), *["--link-weights"] * link]
    status, out, err = run(*argv, "--dry-run")
    assert status == 0 and "3.0 MB are free" in out
    assert ("linked to the checkpoint's files" if link else "copies of the checkpoint's files") in out
    if not link:
        status, out, err = run(*argv)
        assert status == 2 and "needs about" in err and "--link-weights" in err and "trace" not in err
    assert not list(tmp_path.glob("*b*"))


def test_a_checkpoint_without_an_end_token_exports_with_a_warning(run, tmp_path):
    from vlmtrim import runtime
    from vlmtrim.export.weights import tiny

    folder = tiny.write_checkpoint(llava, tmp_path / "c")
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((folder / name).read_text())
        raw.get("text_config", {})["eos_token_id"] = raw["eos_token_id"] = None
        (folder / name).write_text(json.dumps(raw))
    argv = ["--model", str(folder), "--output", str(tmp_path / "b")]
    status, _, err = run(*argv)
    assert status == 0 and "warning" in err and "--eos-token-id" in err
    chat = runtime.open(tmp_path / "b")
    for _ in range(2):  # a second turn follows an answer that no token ended
        steps = list(chat.generate("What?", max_new_tokens=5))
        assert len(steps) == 5 and steps[-1].ended == ("length",)
    argv += ["--dry-run", "--eos-token-id", "7", "--eos-token-id", "9"]
    status, out, err = run(*argv)
    assert status == 0 and "warning" not in err and "(7, 9)" in out


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "two"}', '{"eos_token_id": [2, 999]}'])
def test_generation_settings_that_cannot_be_are_refused(run, tiny, text):
    path = Path(tiny) / "generation_config.json"
    path.write_text(text)
    try:
        check_refused(run("--model", tiny, "--dry-run"), "eos" if "eos" in text else "generation_config.json")
    finally:
        path.unlink()


def test_engine_shards_that_cannot_be_are_refused(run, tiny):
    check_refused(run("--model", tiny, "--engine-shards", "2", "--dry-run"), "--engine-shards", "--engine tensorrt-rtx")
    argv = ["--model", tiny, "--engine", "tensorrt-rtx", "--engine-shards", "5", "--dry-run"]
    check_refused(run(*argv), "5", "4 layers")


def test_help_lists_the_flags_of_the_method_without_onnx_or_torch():
    program = (
        "import sys; from vlmtrim.export.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'onnx', 'onnx_ir', 'torch', 'transformers'} & set(sys.modules)))"
    )
    for method, own, other in (("fastv", "--k K", "--ratio"), ("trimmed-llama", "--ratio RATIO", "--score")):
        argv = [sys.executable, "-c", program, "--method", method, "--help"]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        assert own in said and other not in said and said.splitlines()[-1] == "[]"


def test_an_argument_of_another_method_is_refused_with_its_owner(run):
    check_refused(run("--model", "demo", "--ratio", "0.5"), "--ratio belongs to --method trimmed-llama", "is fastv")
    check_refused(run("--model", "demo", "--method", "none", "--r=0.5"), "--r belongs to --method fastv", "is none")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_engine_shards_that_are_no_number_are_refused(run, text):
    status, _, err = run("--model", "demo", "--engine-shards", text)
    assert status == 2 and f"'{text}' is neither auto nor a number" in err.splitlines()[-1]


def test_commands_without_the_extra_name_it(monkeypatch, capsys):
    from vlmtrim.export import check_cli, cli, requirements

    real = requirements.importlib.util.find_spec
    monkeypatch.setattr(
        requirements.importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else real(name)
    )
    assert cli.main(["--model", "demo"]) == check_cli.main(["bundle"]) == 2
    assert (
        capsys.readouterr().err.count("onnx_ir not installed; this command needs: pip install 'vlmtrim[export]'") == 2
    )


def test_a_weight_that_overflows_ends_the_export_unless_clipped(run, tmp_path):
    from safetensors.torch import load_file, save_file

    from vlmtrim.export.weights import tiny

    folder = tiny.write_checkpoint(llava, tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    argv = ["--model", str(folder), "--dtype", "float16", "--output", str(tmp_path / "b")]
    status, _, err = run(*argv)
    assert status == 2 and name in err and "--clip-overflow" in err and not (tmp_path / "b").exists()
    assert run(*argv, "--clip-overflow")[0] == 0
    assert load_file(tmp_path / "b" / "model.safetensors")[name][0, 0] == 65504
