"""The TensorRT backend on a fake CUDA and a fake TensorRT that run the bundle's own ONNX files: against ort-cpu."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
from fake_machine import Machine
from parity import FIELDS, combinations, room_of

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle, seal
from vlmtrim.graphs.caches import load_policy
from vlmtrim.runtime import bench_cli
from vlmtrim.runtime.backends import tensorrt
from vlmtrim.runtime.engines import fingerprint, profiles
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.guided import drawn_scores
from vlmtrim.runtime.select_backend import make_backend


@pytest.fixture
def machine(chained_bundle, monkeypatch, tmp_path):  # the bundle first: it is exported with the real library
    return Machine(monkeypatch, tmp_path / "home")


@pytest.fixture
def rtx_machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "home", rtx=True)


@pytest.fixture(scope="module")
def chained_bundle(export_tiny):
    return export_tiny("chained", k=2, r=0.5, engine="tensorrt-rtx", engine_shards=2, max_batch=2)


@pytest.fixture(scope="module")
def crossing_chain(export_tiny):
    fields = {"family": "mllama", "method": "trimmed-llama", "max_batch": 2, "images": 2}
    return export_tiny("crossing-chain", engine="tensorrt-rtx", engine_shards=3, **fields)


@pytest.fixture(scope="module")
def emitting_chain(export_tiny):
    fields = {"method": "none", "emit_guide": True, "engine": "tensorrt-rtx", "engine_shards": 3}
    return export_tiny("emitting-chain", max_batch=2, **fields)


def conversation(backend, folder, picture, batch=1):
    """Two turns with pictures and one without, rows of different length; then all that was computed."""
    chat = runtime.Chat(runtime.Session(open_bundle(folder), backend, batch))
    long, short = "How many things are there in this picture, and which of them is the largest?", "What is it?"
    steps, decoded, decode = [], [], chat.session.decode
    chat.session.decode = lambda *args: decoded.append(decode(*args)) or decoded[-1]
    prefill = chat.session.prefill
    chat.session.prefill = lambda ids, pictures, guide: prefill(
        ids, pictures, drawn_scores(chat.session.contract, ids) if guide is None else guide
    )

    def ask(questions, images, tokens):
        if batch == 1:
            return list(chat.generate(questions[0], images[0] if images else [], max_new_tokens=tokens))
        return list(chat.generate(questions, images, max_new_tokens=tokens))

    pictures = [[picture], [picture]]
    for questions, images, tokens in (
        ([long, short], pictures, 12),
        ([short, long], pictures, 6),
        ([short, short], [], 3),
    ):
        steps += ask(questions, images, tokens)
    del chat.session.decode, chat.session.prefill  # a cycle would keep the graphs alive
    caches = [array for row in range(batch) for pair in chat.session.cache_contents(row) for array in pair]
    prefills = [step.prefill for step in steps if step.index == 0]
    kept = [row for prefill in prefills for row in prefill.kept_indices or prefill.kept_features or []]
    numbers = [array for prefill in prefills for array in (prefill.logits, prefill.visual_scores) if array is not None]
    return [step.token_ids for step in steps], kept, [*numbers, *decoded, *caches]


def assert_equal(found, expected, tolerance=0.0):
    assert found[0] == expected[0]
    for have, want in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(have, want)
    for have, want in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(have, want, atol=tolerance, rtol=0)


def ort_cpu(window=None):
    """ONNX Runtime on the CPU, with live windows in buckets as TensorRT gets them unless others are asked for."""
    backend = make_backend("ort-cpu")
    backend.window = window or profiles.bucket
    return backend


@pytest.mark.parametrize("cuda_graphs", ["auto", "off"])
@pytest.mark.parametrize(("bundle", "batch"), [("fastv_bundle", 1), ("chained_bundle", 2), ("dense_bundle", 1)])
def test_a_conversation_equals_ort_cpu_to_the_bit(request, machine, tmp_path, picture, bundle, batch, cuda_graphs):
    folder = machine.with_engines(request.getfixturevalue(bundle), tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt", cuda_graphs), folder, picture, batch)
    assert_equal(found, conversation(ort_cpu(), folder, picture, batch))
    assert (machine.cuda.count["replays"] > 20) == (cuda_graphs == "auto")


@pytest.mark.parametrize(("family", "method"), combinations("TensorRT on a fake GPU"))
def test_a_conversation_of_every_family_equals_ort_cpu_to_the_bit(
    export_tiny, machine, tmp_path, picture, family, method, proves
):
    """Two rows; tiles and patches of any number, three position axes, features that only cross-attention takes."""
    bundle = export_tiny("chat", family=family, method=method, **room_of(family), **FIELDS.get(method, {}))
    folder = machine.with_engines(bundle, tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt"), folder, picture, batch=2)
    assert_equal(found, conversation(ort_cpu(), folder, picture, batch=2))
    assert machine.cuda.count["replays"] > 20
    proves(family, method, "TensorRT on a fake GPU")


def test_a_chain_with_cross_attention_equals_ort_cpu_to_the_bit(crossing_chain, machine, tmp_path, picture):
    """Numbers of the kept features go from engine to engine on the device, the features to each of them."""
    folder = machine.with_engines(crossing_chain, tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt"), folder, picture, batch=2)
    assert_equal(found, conversation(ort_cpu(), crossing_chain, picture, batch=2))


def test_windows_that_move_equal_ort_cpu_to_the_bit(export_tiny, machine, tmp_path, picture):
    """Two rows that hold more and less than the window; decode steps behind a move are replayed again."""
    bundle = export_tiny("windows-chat", family="gemma3", max_batch=2, images=3, max_input_len=152, max_seq_len=1024)
    folder = machine.with_engines(bundle, tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt"), folder, picture, batch=2)
    expected = conversation(ort_cpu(), folder, picture, batch=2)
    assert_equal(found, expected)
    near, far = (expected[2][-16 + 2 * layer].shape[1] for layer in (0, 1))  # of row 0, whose last turn was longer
    assert near < 24 + 152 < far and machine.cuda.count["replays"] > 20


@pytest.mark.parametrize(("policy", "method"), [("aircache", "fastv"), ("snapkv", "zipvl"), ("elastic", "none")])
def test_caches_that_are_cut_equal_ort_cpu_to_the_bit(export_tiny, machine, tmp_path, picture, policy, method):
    """Scores, choice and compaction on the device; decode steps behind it are replayed as CUDA graphs."""
    merges = {"merge": True} if policy == "elastic" else {}
    bundle = export_tiny("cut", method=method, cache=load_policy(policy)(**merges), cache_share=0.4, max_batch=2)
    folder = machine.with_engines(bundle, tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt"), folder, picture, batch=2)
    assert_equal(found, conversation(ort_cpu(), folder, picture, batch=2))
    assert machine.cuda.count["replays"] > 20


def test_attention_is_summed_over_the_engines_of_a_chain(emitting_chain, machine, tmp_path, picture):
    """Each engine adds its layers' part; replayed steps feed the rows as plain ones do."""
    folder = machine.with_engines(emitting_chain, tmp_path / "bundle")
    found = []
    for backend in (tensorrt.TrtBackend("tensorrt"), ort_cpu()):
        chat = runtime.Chat(runtime.Session(open_bundle(folder), backend, batch=2))
        chat.session.attention.on = True
        steps = list(chat.generate(["What?", "What is it, and why?"], [[picture]] * 2, max_new_tokens=8))
        found.append(([step.token_ids for step in steps], [], [chat.session.attention.received]))
    assert_equal(*found)
    assert found[0][2][0].min() > 0 and machine.cuda.count["replays"] > 3


@pytest.mark.parametrize("how", ["auto", "off"])
def test_bench_vlm_measures_with_and_without_cuda_graphs(machine, dense_bundle, tmp_path, capsys, how):
    folder, out = machine.with_engines(dense_bundle, tmp_path / "bundle"), tmp_path / "out.json"
    argv = [str(folder), "--backend", "tensorrt", "--cuda-graphs", how, "--new-tokens", "8", "--repeat", "1"]
    assert bench_cli.main([*argv, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["cuda_graphs"] == how
    assert (machine.cuda.count["replays"] > 0) == (how == "auto")
    assert bench_cli.main([str(folder), "--backend", "ort-cpu", "--cuda-graphs", "off"]) == 2
    assert "of the TensorRT backends, not of ort-cpu" in capsys.readouterr().err


def test_longer_live_windows_change_nothing(fastv_bundle, picture):
    """Buckets give attention keys that no query may see; rows of different length, both groups, to the capacity."""
    expected = conversation(ort_cpu(lambda length, capacity: length), fastv_bundle, picture, batch=2)
    for window in (profiles.bucket, lambda length, capacity: capacity):
        assert_equal(conversation(ort_cpu(window), fastv_bundle, picture, batch=2), expected, tolerance=1e-5)


def open_session(machine, folder, target, batch=1, cuda_graphs="auto"):
    """A session on the fake machine, with engines in a copy of the bundle."""
    backend = tensorrt.TrtBackend(machine.library, cuda_graphs)
    return runtime.Session(open_bundle(machine.with_engines(folder, target)), backend, batch)


def decode(session, steps):
    return [session.decode(np.full(session.batch, 65 + step)) for step in range(steps)]


def test_a_decode_step_waits_once_and_allocates_nothing(machine, chained_bundle, tmp_path, picture):
    """Three engines: ids, position and write indices go up (the last group's once more, for the last row's place),
    logits come down, and nothing else moves."""
    session = open_session(machine, chained_bundle, tmp_path / "bundle")
    chat = runtime.Chat(session)
    list(chat.generate("What is it?", [picture], max_new_tokens=4))
    before = machine.cuda.count.copy()
    decode(session, 10)
    done = machine.cuda.count - before
    assert done["waits"] == done["copies out"] == 10 and done["replays"] == 30
    assert done["copies in"] == 10 * 5 and not done["cudaMalloc"] and not done["graphs"]


def test_nothing_visual_passes_the_host(machine, chained_bundle, tmp_path, picture, monkeypatch):
    """Features and hidden states stay on the device: what comes down in a prefill are the three results."""
    session = open_session(machine, chained_bundle, tmp_path / "bundle")
    read = []
    real = session.backend.device.read
    monkeypatch.setattr(session.backend.device, "read", lambda address, n: read.append(n) or real(address, n))
    prefill = next(iter(runtime.Chat(session).generate("What is it?", [picture], max_new_tokens=1))).prefill
    vocabulary, survivors = prefill.logits.shape[1], len(prefill.kept_indices[0])
    assert read == [4 * vocabulary, 8 * survivors, 4 * prefill.visual]


def test_graphs_are_captured_anew_when_the_window_leaves_its_bucket(machine, dense_bundle, tmp_path):
    session = open_session(machine, dense_bundle, tmp_path / "bundle")
    session.backend._scratch.fit(1 << 20)  # so that nothing but the shapes changes
    expected = runtime.Session(open_bundle(dense_bundle), ort_cpu())
    captured = []
    for _ in range(2):  # the second time every buffer is large enough: nothing but the window changes
        before = machine.cuda.count["graphs"]
        for one in (session, expected):
            one.reset()
            one.prefill([list(range(1, 121))])
        for step in range(12):  # 129 entries are in the next bucket
            found, wanted = (one.decode(np.array([60 + step])) for one in (session, expected))
            np.testing.assert_array_equal(found, wanted)
        captured.append(machine.cuda.count["graphs"] - before)
    assert captured == [3, 2]  # the decoder twice each time, the embedding once


@pytest.mark.parametrize("scratch", [0, 1 << 20])
def test_a_longer_prefill_between_decode_steps_moves_buffers_safely(machine, fastv_bundle, tmp_path, scratch):
    """The embeddings' buffer grows after the decode graphs were captured, and the scratch memory where it is small."""
    session = open_session(machine, fastv_bundle, tmp_path / "bundle")
    session.backend._scratch.fit(scratch)
    expected = runtime.Session(open_bundle(fastv_bundle), ort_cpu())
    allocated = machine.cuda.count["cudaMalloc"]
    for tokens in (5, 60, 300):
        for one in (session, expected):
            one.prefill([[1 + token % 200 for token in range(tokens)]])
        grown, allocated = machine.cuda.count["cudaMalloc"] > allocated, machine.cuda.count["cudaMalloc"]
        assert grown
        for found, wanted in zip(decode(session, 4), decode(expected, 4), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert not machine.cuda.count["frees of memory in use"]


@pytest.mark.parametrize("how", ["the library launches nothing", "cuda"])
def test_where_capture_is_refused_steps_are_launched_plainly_and_it_is_said_once(
    machine, chained_bundle, tmp_path, picture, capsys, how
):
    if how == "cuda":
        machine.cuda.capture_error = machine.cuda.cudaError_t.cudaErrorStreamCaptureInvalidated
    else:
        machine.trt.capturable = False
    folder = machine.with_engines(chained_bundle, tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt"), folder, picture, 2)
    assert_equal(found, conversation(ort_cpu(), folder, picture, 2))
    said = [line for line in capsys.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert len(said) == 1 and said[0].startswith("no CUDA graphs: ") and "kernel by kernel" in said[0]
    assert not machine.cuda.count["replays"]


def test_tensorrt_rtx_replays_by_itself(rtx_machine, fastv_bundle, tmp_path, picture):
    machine, folder = rtx_machine, rtx_machine.with_engines(fastv_bundle, tmp_path / "bundle")
    backend = tensorrt.TrtBackend("tensorrt-rtx")
    assert_equal(conversation(backend, folder, picture), conversation(ort_cpu(), folder, picture))
    strategies = [context.config.cuda_graph_strategy for context in machine.trt.contexts]
    assert len(strategies) == 5  # vision; prefill and decode of the embedding and of the decoder
    assert strategies.count(machine.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE) == 2 and not machine.cuda.count["graphs"]


def test_compiled_kernels_are_kept_for_the_next_start(rtx_machine, fastv_bundle, tmp_path, picture):
    """TensorRT-RTX compiles on the target; the second start finds what the first one compiled."""
    machine, folder = rtx_machine, rtx_machine.with_engines(fastv_bundle, tmp_path / "bundle")
    kept = tmp_path / "home" / "vlmtrim" / "tensorrt-rtx"

    def start():
        machine.trt.contexts.clear()
        chat = runtime.Chat(runtime.Session(open_bundle(folder), tensorrt.TrtBackend("tensorrt-rtx")))
        caches = {id(c.config.cache): c.config.cache for c in machine.trt.contexts}.values()
        found = [len(cache.kernels) for cache in caches]
        list(chat.generate("What is it?", [picture], max_new_tokens=3))
        return found

    assert start() == [0, 0]
    gc.collect()
    files = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert sorted(name.split("-")[0] for name in files) == ["decoder", "embed", "vision"]
    assert min(start()) > 0
    gc.collect()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == files
    for path in kept.iterdir():
        path.write_bytes(b"of another driver")
    assert start() == [0, 0]
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("no folder")  # nothing can be kept, and nothing fails
    assert start() == [0, 0]


def test_tensorrt_rtx_can_be_captured_with_its_final_kernels(rtx_machine, fastv_bundle, tmp_path, picture):
    machine, folder = rtx_machine, rtx_machine.with_engines(fastv_bundle, tmp_path / "bundle")
    backend = tensorrt.TrtBackend("tensorrt-rtx", "capture")
    assert_equal(conversation(backend, folder, picture), conversation(ort_cpu(), folder, picture))
    configs = [context.config for context in machine.trt.contexts]
    eager = machine.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert [config.dynamic_shapes_kernel_specialization_strategy == eager for config in configs].count(True) == 2
    assert all(config.cuda_graph_strategy == "DISABLED" for config in configs) and machine.cuda.count["replays"]


def test_memory_is_told_by_use(machine, fastv_bundle, tmp_path, picture):
    """Caches as the contract predicts, to the byte; nothing of it grows while decoding; all of it is given back."""
    session = open_session(machine, fastv_bundle, tmp_path / "bundle", batch=2)
    contract, backend = session.contract, session.backend
    predicted = sum(group.nbytes(2, contract.dtype) for group in contract.groups)
    assert backend.memory()["caches"] == predicted
    chat = runtime.Chat(session)
    list(chat.generate(["What is it?", "And how many?"], [[picture], [picture]], max_new_tokens=3))
    used = backend.memory()
    decode(session, 3)
    assert backend.memory() == used and used["activations"] > 0 and used["io"] > 0
    assert set(used) == {"engines", "caches", "activations", "io"}
    device = backend.device
    del chat, session, backend, picture
    gc.collect()
    assert not any(device.used.values()) and not machine.cuda.device


def test_what_is_closed_is_freed_at_once(machine, fastv_bundle, tmp_path, picture, request):
    """Graphs and caches are in no cycle that only a search for garbage would free."""
    session = open_session(machine, fastv_bundle, tmp_path / "bundle")
    list(runtime.Chat(session).generate("What is it?", [picture], max_new_tokens=3))
    graphs = [weakref.ref(graph) for graph in session._graphs.values()]
    assert len(graphs) == 3 and session.backend.memory()["caches"] > 0
    request.addfinalizer(gc.enable)
    gc.disable()
    session.close()
    assert session.backend.memory()["caches"] == 0 and not any(graph() for graph in graphs)


def test_a_step_outside_the_profiles_is_refused_before_the_launch(machine, fastv_bundle, tmp_path):
    """An engine may be built for less than the contract allows: its own limits hold."""
    folder = machine.with_engines(fastv_bundle, tmp_path / "bundle")
    entries = json.loads((folder / fingerprint.FILE).read_text())
    entries["decoder.engine"]["profiles"]["prefill"]["S"] = [1, 32, 64]
    (folder / fingerprint.FILE).write_text(json.dumps(entries))
    seal(folder)
    session = runtime.Session(open_bundle(folder), tensorrt.TrtBackend("tensorrt"))
    with pytest.raises(RuntimeRefusal, match=r"decoder\.onnx: .*S is 65, 1 to 64 fit.*shorten the prompt"):
        session.prefill([[1] * 65])
    assert session.prefill([[1] * 64]).logits.shape == (1, 272)


def test_times_are_of_the_device(machine, fastv_bundle, tmp_path):
    backend = open_session(machine, fastv_bundle, tmp_path / "bundle").backend
    start = backend.mark()
    middle, end = backend.mark(), backend.mark()
    assert backend.elapsed(start, end) == pytest.approx(2e-3) and backend.elapsed(start, middle) == pytest.approx(1e-3)


def test_a_view_must_hold_as_many_bytes(machine):
    backend = tensorrt.TrtBackend("tensorrt")
    zeros = backend.zeros((2, 3), "float32")
    view = backend.reshape(zeros, (3, 2))
    assert view.address == zeros.address and not backend.to_host(view).any()
    with pytest.raises(RuntimeRefusal, match="cannot be read as"):
        backend.reshape(zeros, (3, 3))


def test_what_does_not_fit_on_the_gpu_says_how_much_is_missing(machine, fastv_bundle, tmp_path):
    folder = machine.with_engines(fastv_bundle, tmp_path / "bundle")
    machine.cuda.total = 1_000_000
    with pytest.raises(RuntimeRefusal, match=r"Fake GPU has .* GB free, .* GB more are needed for caches"):
        runtime.Session(open_bundle(folder), tensorrt.TrtBackend("tensorrt"), batch=2)
