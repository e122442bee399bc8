"""The runtime on a real tiny bundle: in-place caches, turns, limits, the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import cli
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import load_image
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session


@pytest.fixture
def chat(fastv_bundle):
    return runtime.open(fastv_bundle)


def answer(chat, *args, **kwargs):
    return [step.token_ids[0] for step in chat.generate(*args, **kwargs)]


def test_caches_are_updated_in_place(fastv_bundle, picture, capfd):
    """The decoder writes into the very buffers it was given, and ONNX Runtime does not warn of a copy."""
    session = Session(open_bundle(fastv_bundle), make_backend("ort-cpu"))
    pointers = {name: value.data_ptr() for name, value in session.caches.items()}
    views = {name: value.numpy().copy() for name, value in session.caches.items()}
    session.prefill([[256, 1, 2, 3]])
    session.decode(np.array([4]))
    assert {name: value.data_ptr() for name, value in session.caches.items()} == pointers
    outputs = session._graph("decoder")._binding.get_outputs()
    bound = {value.data_ptr() for value in outputs}
    assert set(pointers.values()) <= bound
    for name, value in session.caches.items():
        assert np.abs(value.numpy()[:, :, :5]).min(axis=-1).any() and not np.array_equal(value.numpy(), views[name])
        assert not value.numpy()[:, :, 5:].any()
    assert "TensorScatter" not in capfd.readouterr().err


def test_results_outlive_the_session(fastv_bundle, picture):
    """ONNX Runtime's arrays are views of memory that goes with the session; ours are copies."""
    session = Session(open_bundle(fastv_bundle), make_backend("ort-cpu"))
    prefill = session.prefill([[256, 1, 2, 3]])
    arrays = [prefill.logits, prefill.visual_scores, *prefill.kept_indices]
    arrays += [array for pair in session.cache_contents(0) for array in pair]
    features = session.encode_images(session.processor([load_image(picture)]))
    assert all((array if array.base is None else array.base).flags.owndata for array in arrays)
    assert features.owner.numpy().ctypes.data == features.owner.data_ptr()
    assert session.backend.to_host(features).ctypes.data != features.owner.data_ptr()


def test_later_caches_are_smaller_and_counts_add_up(chat, picture):
    groups = chat.session.contract.groups
    assert groups[1].capacity == groups[0].capacity - 8
    steps = list(chat.generate("What is it?", [picture], max_new_tokens=3))
    prefill = steps[-1].prefill
    assert (prefill.visual, prefill.kept) == (16, 8)
    full, pruned = (entries[0] for entries in chat.session.lengths.entries)
    assert full - pruned == 8 and full == chat.session.lengths.positions[0]


def test_a_second_turn_continues_on_the_same_caches(chat, picture):
    answer(chat, "What is it?", [picture], max_new_tokens=4)
    before = chat.session.lengths.positions[0]
    answer(chat, "And this?", [picture], max_new_tokens=4)
    answer(chat, "Sure?", max_new_tokens=2)
    assert chat.session.lengths.positions[0] > before + 16
    full, pruned = (entries[0] for entries in chat.session.lengths.entries)
    assert full - pruned == 16


def test_reset_forgets(chat, picture):
    first = answer(chat, "What is it?", [picture], max_new_tokens=6)
    chat.reset()
    assert answer(chat, "What is it?", [picture], max_new_tokens=6) == first


def test_two_rows_answer_as_they_do_alone(fastv_bundle, picture):
    questions = ["What is it?", "How many things are there in this picture?"]
    pair = runtime.open(fastv_bundle, batch=2)
    together = [step.token_ids for step in pair.generate(questions, [[picture], [picture]], max_new_tokens=6)]
    for row, question in enumerate(questions):
        alone = answer(runtime.open(fastv_bundle), question, [picture], max_new_tokens=6)
        assert [ids[row] for ids in together if ids[row] is not None] == alone


def test_sampling_is_reproducible_by_seed(chat, picture):
    drawn = []
    for seed in (1, 1, 2):
        chat.reset()
        sampling = runtime.Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        drawn.append(answer(chat, "What is it?", [picture], max_new_tokens=12, sampling=sampling))
    assert drawn[0] == drawn[1] != drawn[2]


def test_generation_stops_at_the_capacity(fastv_bundle):
    chat = runtime.open(fastv_bundle)
    steps = list(chat.generate("x" * 470, max_new_tokens=400))
    assert steps[-1].ended[0] in ("capacity", "eos")
    assert chat.session.room() <= 1 or steps[-1].ended[0] == "eos"


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("x" * 600, 0, "their capacity is"),
        ("hi", 40, "holds at most 512"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(chat, picture, prompt, images, says):
    with pytest.raises(RuntimeRefusal, match=says):
        chat.generate(prompt, [picture] * images)


@pytest.mark.parametrize("family", ["llava", "mllama"])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_refused_turn_leaves_the_conversation_as_it_was(export_tiny, fastv_bundle, picture, family, turns):
    """Refused for its pictures or its text, as the first turn or the second: the next one answers as without it."""
    crossing = family == "mllama"
    folder = export_tiny("refusing", family=family, method="trimmed-llama") if crossing else fastv_bundle
    found = []
    for refused in ([], [("Those?", [picture] * 40)], [("x" * 600, [])]):
        chat = runtime.open(folder)
        ids = [answer(chat, "What is it?", [picture], max_new_tokens=4) for _ in range(turns)]
        for prompt, images in refused:
            with pytest.raises(RuntimeRefusal):
                chat.generate(prompt, images)
        found.append([*ids, answer(chat, "And why?", max_new_tokens=4)])
    assert found[0] == found[1] == found[2]


def test_a_refused_turn_of_a_batch_leaves_both_rows_as_they_were(fastv_bundle, picture):
    found = []
    for refused in (False, True):
        pair = runtime.open(fastv_bundle, batch=2)
        list(pair.generate(["What is it?", "And that?"], [[picture], [picture]], max_new_tokens=3))
        if refused:
            with pytest.raises(RuntimeRefusal, match="must bring as many"):
                pair.generate(["a", "b"], [[picture], []])
        steps = pair.generate(["Why?", "Is it?"], [[], []], max_new_tokens=4)
        found.append([step.token_ids for step in steps])
    assert found[0] == found[1]


@pytest.mark.parametrize("close", [True, False])
def test_stopping_early_is_an_answer_that_was_cut_short(fastv_bundle, picture, close):
    chat = runtime.open(fastv_bundle)
    said = answer(chat, "What is it?", [picture], max_new_tokens=3)
    expected = said, answer(chat, "And why?", max_new_tokens=4)
    chat.reset()
    steps = chat.generate("What is it?", [picture], max_new_tokens=9)
    heard = [next(steps).token_ids[0] for _ in range(3)]
    if close:
        steps.close()
    assert (heard, answer(chat, "And why?", max_new_tokens=4)) == expected


def test_an_answer_that_nobody_heard_is_an_empty_one(chat, picture):
    chat.generate("What is it?", [picture])
    before = chat.session.lengths.entries[0].copy()
    assert answer(chat, "And why?", max_new_tokens=2)
    assert chat.session.lengths.entries[0] > before


def test_rows_with_different_numbers_of_images_are_refused(fastv_bundle, picture):
    with pytest.raises(RuntimeRefusal, match="must bring as many"):
        runtime.open(fastv_bundle, batch=2).generate(["a", "b"], [[picture], []])


def test_wrong_feeds_name_the_tensor(chat):
    feeds = {"input_ids": np.zeros((1, 3), np.int32), "image_features": np.zeros((1, 0, 256), np.float32)}
    with pytest.raises(RuntimeRefusal, match="visual_positions"):
        chat.session._graph("embed").run(feeds)
    feeds["visual_positions"] = np.zeros((1, 0), np.int64)
    with pytest.raises(RuntimeRefusal, match="input_ids is int32"):
        chat.session._graph("embed").run(feeds)


def test_batch_beyond_the_bundle_is_refused(fastv_bundle):
    with pytest.raises(RuntimeRefusal, match="batch 3 is outside"):
        runtime.open(fastv_bundle, batch=3)


def test_cuda_without_cuda_says_what_to_install(fastv_bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    with pytest.raises(RuntimeRefusal, match=r"vlmtrim\[cuda\]"):
        runtime.open(fastv_bundle, backend="ort-cuda")


def test_run_vlm_streams_and_reports(fastv_bundle, picture, capsys):
    assert cli.main([str(fastv_bundle), "--image", str(picture), "--prompt", "Hi?", "--max-new-tokens", "4"]) == 0
    assert "16 visual tokens, 8 kept, 8 removed" in capsys.readouterr().err
    argv = [str(fastv_bundle), "--image", str(picture), "--prompt", "Hi?", "--max-new-tokens", "4", "--json"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["visual"], report["kept"], report["removed"], report["backend"]) == (16, 8, 8, "ort-cpu")
    assert len(report["token_ids"]) <= 4 and isinstance(report["text"], str)
    assert all(report["times"][name] >= 0 for name in ("vision", "prefill", "decode"))


@pytest.mark.parametrize("content", ["text", "bomb", "missing"])
def test_run_vlm_refuses_bad_pictures_in_one_line(fastv_bundle, tmp_path, capsys, content):
    path = tmp_path / "picture.png"
    if content == "text":
        path.write_text("no picture")
    elif content == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    argv = [str(fastv_bundle), "--image", str(path), "--prompt", "Hi?", "--backend", "ort-cpu"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("run-vlm: ") and "\n" not in error and str(path) in error


def test_running_imports_neither_torch_nor_transformers(fastv_bundle, picture):
    code = (
        "import sys; from vlmtrim.runtime import cli; "
        f"cli.main([{str(fastv_bundle)!r}, '--image', {str(picture)!r}, '--prompt', 'Hi?', '--max-new-tokens', '2']); "
        "print([m for m in ('torch', 'transformers', 'onnx', 'vlmtrim.export') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
