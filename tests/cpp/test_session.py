"""The C++ session against the Python one on the same library: logits, kept tokens and caches' lengths to the bit."""

import numpy as np
import pytest
from probing import Native, ProbeError

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.backends.ort import OrtBackend
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.guided import drawn_scores
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.video import Video

# name -> family and what it is exported with
CASES = {
    "dense": ("llava", {"method": "none"}),
    "fastv": ("llava", {"k": 2, "r": 0.5}),
    "half": ("llava", {"k": 2, "r": 0.5, "dtype": "float16"}),
    "tower": ("llava", {"k": 0, "r": 0.5, "score": "fastervlm"}),
    "zipvl": ("llava", {"method": "zipvl"}),
    "pyramid": ("llava", {"method": "pyramid"}),
    "guided": ("llava", {"method": "guided"}),
    "emitting": ("llava", {"method": "none", "emit_guide": True}),
    "packed": ("llava", {"k": 1, "r": 0.5, "weights": "int4", "block": 32, "vision_weights": "w8a8"}),
    "next": ("llava_next", {"k": 2, "r": 0.5}),
    "qwen2": ("qwen2_vl", {"k": 1, "r": 0.5}),
    "qwen2_5": ("qwen2_5_vl", {"k": 1, "r": 0.5}),
    "qwen3": ("qwen3_vl", {"k": 1, "r": 0.5}),
    "onevision": ("llava_onevision", {"k": 2, "r": 0.5}),
    "video": ("video_llava", {"k": 2, "r": 0.5}),
    "smol": ("smolvlm", {"k": 2, "r": 0.5}),
    "idefics": ("idefics3", {"k": 2, "r": 0.5}),
    "intern": ("internvl", {"k": 2, "r": 0.5}),
    "gemma": ("gemma3", {"k": 2, "r": 0.5}),
    "gemma-dense": ("gemma3", {"method": "none"}),
    "gemma-half": ("gemma3", {"k": 2, "r": 0.5, "dtype": "float16"}),
    "gemma-guided": ("gemma3", {"method": "guided"}),
    "gemma-pyramid": ("gemma3", {"method": "pyramid"}),
    "cross": ("mllama", {"method": "none", "images": 3}),
    "trimmed": ("mllama", {"method": "trimmed-llama", "ratio": 0.25, "images": 3}),
}

SELDOM = ("gemma-dense", "gemma-half", "gemma-pyramid")  # slow: what the methods are is not a family's


def seldom(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in names]


# More of them, which only engines run in pieces. A packed weight is multiplied as the CPU's kernels do, by their own
# rounding: no engine would. Idefics3 and InternVL differ from SmolVLM in what is before the engines.
ON_ENGINES = {
    "chained": ("llava", {"k": 2, "r": 0.5, "engine": "tensorrt-rtx", "engine_shards": 2}),
    "crossing-chain": (
        "mllama",
        {"method": "trimmed-llama", "images": 3, "engine": "tensorrt-rtx", "engine_shards": 3},
    ),
    **{name: case for name, case in CASES.items() if name not in ("packed", "idefics", "intern")},
}


def ids_of(contract, tokens, length, seed):
    """A prompt that holds so many image tokens by picture, apart from each other."""
    words = np.random.default_rng(seed).integers(3, 90, size=length)
    words[words == contract.image_token_id] = 2
    at = 2
    for count in tokens:
        words = np.concatenate([words[:at], np.full(count, contract.image_token_id), words[at:]])
        at += count + 3
    return words.astype(np.int64)


def compare(ours, native, ids, pictures, guide=None):
    """One prefill in both; returns the next token."""
    expected = ours.prefill([ids.tolist()], pictures, guide)
    found = native.prefill(ids, pictures, guide)
    np.testing.assert_array_equal(found["logits"], expected.logits[0].astype(np.float32))
    assert (found["visual"], found["kept"]) == (expected.visual, expected.kept)
    assert found["entries"].tolist() == [entries[0] for entries in ours.lengths.entries]
    if expected.kept_indices is not None:
        np.testing.assert_array_equal(found["kept_indices"], expected.kept_indices[0])
        np.testing.assert_array_equal(found["visual_scores"], expected.visual_scores[0])
    if expected.kept_features is not None:
        np.testing.assert_array_equal(found["kept_features"], expected.kept_features[0])
    if expected.kept_by_layer is not None:
        assert found["kept_by_layer"] == [rows[0].tolist() for rows in expected.kept_by_layer]
    if expected.held is not None:
        assert found["held"] == [[one.tolist() for one in rows[0]] for rows in expected.held]
    assert ("held" in found) == (expected.held is not None)
    return int(expected.logits.argmax())


def decode(ours, native, token, steps):
    for _ in range(steps):
        expected, (found, entries) = ours.decode(np.array([token])), native.decode(token)
        np.testing.assert_array_equal(found, expected[0].astype(np.float32))
        assert entries.tolist() == [entries[0] for entries in ours.lengths.entries]
        token = int(expected.argmax())


def three_turns(folder, native, buckets=False):
    """A conversation with pictures in both, two in the last turn; ``buckets``: live windows as TensorRT gets them."""
    backend = OrtBackend("ort-cpu")
    if buckets:
        backend.window = profiles.bucket
    with Session(open_bundle(folder), backend) as ours:
        contract = ours.contract
        if emits := ours.attention.emitted:
            ours.attention.on = True
            native.sum_attention()
        for turn, sizes in enumerate([[(240, 200)], [], [(70, 90), (33, 61)]]):
            images = [generated_picture(turn).resize(size) for size in sizes]
            pictures = ours.processor(images) if images else None
            ids = ids_of(contract, pictures.tokens if pictures else [], 12, turn)
            token = compare(ours, native, ids, pictures, drawn_scores(contract, [ids.tolist()]))
            decode(ours, native, token, 8)
            if emits:
                np.testing.assert_array_equal(native.received(), ours.attention.received[0])
        ours.reset()
        native.reset()
        ids = ids_of(contract, [], 9, 5)
        compare(ours, native, ids, None, drawn_scores(contract, [ids.tolist()]))
        with pytest.raises(ProbeError, match="no attention was summed"):
            native.received()


@pytest.mark.parametrize("name", seldom(CASES))
def test_three_turns_to_the_bit(name, export_tiny):
    family, fields = CASES[name]
    folder = export_tiny(f"cpp-{name}", family=family, **fields)
    native = Native(folder)
    three_turns(folder, native)
    native.close()


@pytest.mark.parametrize("name", seldom(ON_ENGINES))
def test_three_turns_on_engines_to_the_bit(name, export_tiny, place, tmp_path):
    """TensorRT's backend on stand-ins of CUDA and TensorRT: steps that repeat are replayed as CUDA graphs."""
    family, fields = ON_ENGINES[name]
    bundle = export_tiny(f"cpp-{name}", family=family, **fields)
    here = place()
    native = Native(here.with_engines(bundle, tmp_path / "bundle"), backend="tensorrt")
    three_turns(bundle, native, buckets=True)
    native.close()
    assert here.count("replays") > 20 and here.count("graphs") < 20


@pytest.mark.parametrize("name", ["qwen3", "smol", "intern"])
def test_videos_in_words_to_the_bit(name, export_tiny):
    """Their frames are apart from each other in the prompt, and have positions so."""
    family, fields = CASES[name]
    bundle = open_bundle(export_tiny(f"cpp-{name}", family=family, **fields))
    with Session(bundle, OrtBackend("ort-cpu")) as ours:
        native = Native(bundle.folder)
        frames = [generated_picture(seed).resize((70, 44)) for seed in range(5)]
        for shown in ([Video(frames, 1.5)], [frames[0], Video(frames[1:3], 8.0), Video(frames[3:4], 2.0)]):
            images = [one.load() if isinstance(one, Video) else one for one in shown]
            pictures = ours.processor(images)
            films = [number for number, one in enumerate(shown) if isinstance(one, Video)]
            asked = Conversation(ours.prompter).ask("And now?", len(shown), films, pictures.words)
            ids = np.array(ours.prompter.expand_images(asked, pictures.tokens, pictures.words))
            decode(ours, native, compare(ours, native, ids, pictures), 4)
            ours.reset()
            native.reset()
        native.close()


def test_demo_to_the_bit(demo_bundle):
    bundle = open_bundle(demo_bundle)
    with Session(bundle, OrtBackend("ort-cpu")) as ours:
        native = Native(bundle.folder)
        pictures = ours.processor([generated_picture(3)])
        decode(ours, native, compare(ours, native, ids_of(bundle.contract, pictures.tokens, 20, 1), pictures), 64)
        native.close()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "the prompt is empty"),
        ([3, 5000], "the prompt holds token 5000, the model has"),
        ([3, -1], "the prompt holds token -1"),
        ([5] * 600, "their capacity is"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(ids, said, fastv_bundle):
    native = Native(fastv_bundle)
    with pytest.raises(ProbeError, match=said):
        native.prefill(np.array(ids))
    assert native.prefill(np.array([3, 4]))["entries"].tolist() == [2, 2]
    native.close()


def test_an_image_token_without_a_picture_is_refused(fastv_bundle):
    image_token = open_bundle(fastv_bundle).contract.image_token_id
    native = Native(fastv_bundle)
    with pytest.raises(ProbeError, match=r"the prompt holds 2 image tokens, 0 image\(s\) bring 0"):
        native.prefill(np.array([3, image_token, image_token]))
    native.close()


def test_inputs_that_the_contract_does_not_promise_are_refused(fastv_bundle):
    bundle = open_bundle(fastv_bundle)
    with Session(bundle, OrtBackend("ort-cpu")) as ours:
        pictures = ours.processor([generated_picture(0)])
    ids = ids_of(bundle.contract, pictures.tokens, 4, 0)
    pictures.inputs["pixel_values"] = pictures.inputs["pixel_values"][:, :, 1:]
    native = Native(fastv_bundle)
    with pytest.raises(ProbeError, match=r"vision.onnx: pixel_values is float32 .* the contract promises"):
        native.prefill(ids, pictures)
    native.close()
