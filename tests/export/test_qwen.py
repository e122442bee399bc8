"""Qwen2-VL and Qwen2.5-VL beyond what every family is tested for: sizes, batches, videos, names, engines."""

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_turns import IMAGE, VIDEO, assert_rows, assert_turns, parity, prompt, sized

from vlmtrim import runtime
from vlmtrim.export import check_cli, weights
from vlmtrim.export.checkpoint import load_family
from vlmtrim.export.job import Refusal
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.measure.check import Turn, record
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.video import Video

FAMILIES = ("qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request, export_tiny):
    return open_bundle(export_tiny("qwen", family=request.param, max_batch=2, images=4))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(load_family(bundle.contract.family).MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


def test_vision_is_transformers(bundle, session, reference):
    """Features of three pictures and a film in one call, against the tower that splits by lengths."""
    film = Video([sized(120, 90, seed) for seed in range(4)]).load()
    pictures = session.processor([sized(240, 200, 1), sized(56, 300, 2), film, sized(84, 84, 3)])
    found = session.backend.to_host(session.encode_images(pictures))[0]
    grids = torch.tensor([(len(times), 2 * high, 2 * wide) for high, wide, *times in pictures.grids])
    patches = torch.from_numpy(pictures.inputs["pixel_values"]).flatten(0, 1)
    with torch.no_grad():
        expected = reference.model.model.visual(patches, grid_thw=grids).pooler_output
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_pictures_of_other_sizes_in_three_turns(session, reference):
    turns = [
        prompt(session, [1, 2], sized(240, 200, 1), [3], sized(56, 300, 2), [4, 5, 6]),
        prompt(session, [7], sized(84, 84, 3), [8, 9]),
        prompt(session, [10, 11, 12]),
    ]
    assert_turns(session, reference, turns)
    # Positions of a picture grow by its longer side, entries by its tokens.
    assert session.lengths.positions[0] < session.lengths.entries[0][0]


def test_rows_of_a_batch_equal_single_runs(session, reference):
    assert_rows(session, reference, sized(168, 56, 1), sized(84, 112, 2))


class FilmReference(Reference):
    """The unpatched model on ``pixel_values_videos``, made of pictures: the video processor needs torchvision."""

    def _inputs(self, turn):
        (film,) = turn.images
        made = self._image_processor(list(film.frames), return_tensors="pt")
        (_, high, wide), count = made["image_grid_thw"][0].tolist(), len(film.frames)
        frames = made["pixel_values"].reshape(count // 2, 2, high * wide, 3, 2, 14, 14)[:, :, :, :, 0]
        self._visual_token = self.model.config.video_token_id
        return {
            "pixel_values_videos": frames.permute(0, 2, 3, 1, 4, 5).reshape(count // 2 * high * wide, -1),
            "video_grid_thw": torch.tensor([[count // 2, high, wide]]),
            "second_per_grid_ts": torch.tensor([2 / film.fps]),
        }

    def _features(self, pictures):
        return self.model.get_video_features(pictures["pixel_values_videos"], pictures["video_grid_thw"]).pooler_output[
            0
        ]


@pytest.mark.parametrize("pruned", [True, False])
def test_a_video_is_transformers(bundle, session, export_tiny, pruned):
    """Frames small enough to keep their size, so that both sides see the same; then a turn of words."""
    film = Video([sized(112, 84, seed) for seed in range(6)], fps=0.8).load()
    family = bundle.contract.family
    if not pruned:
        bundle = open_bundle(export_tiny("film", family=family, method="none"))
        session = Session(bundle, make_backend("ort-cpu"))
    selection = dict(bundle.contract.selection) if pruned else None
    oracle = FilmReference(load_family(family).MODEL_CLASS, bundle.folder, selection)
    ids, images = prompt(session, [1, 2], film, [3, 4])
    expected, tokens = oracle.record(Turn("film", [VIDEO if i == IMAGE else i for i in ids], images), 6)
    found, _ = record(session, Turn("film", ids, images), tokens)
    assert parity("film", found, expected, bundle)
    words = Turn("words", [5, 6, 7], opens=False)
    expected, tokens = oracle.record(words, 4)
    assert parity("words", record(session, words, tokens)[0], expected, bundle)


def test_a_chat_takes_videos_beside_pictures(bundle, session):
    frames = [sized(112, 84, seed) for seed in range(4)]
    chat = runtime.Chat(Session(bundle, make_backend("ort-cpu")))
    first = next(iter(chat.generate("What happens?", [sized(84, 84), Video(frames, fps=1.0)], max_new_tokens=1)))
    assert first.prefill.visual == 9 + 2 * 12
    rendered = session.prompter.render(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]
    )
    assert rendered.text == "USER: <|vision_start|><|video_pad|><|vision_end|>a ASSISTANT:"
    assert VIDEO not in session.prompter.encode(rendered, True) and IMAGE in session.prompter.encode(rendered, True)


def test_a_family_without_videos_refuses_them(fastv_bundle):
    with pytest.raises(runtime.RuntimeRefusal, match="take no videos"):
        runtime.open(fastv_bundle).generate("?", [Video([Image.new("RGB", (9, 9))])])


def test_the_bound_on_pictures_is_in_the_settings(export_tiny, bundle):
    """Whoever prepares pictures by the bundle's settings stays below what the contract allows."""
    assert bundle.contract.image_tokens == 512 // 2 // 4
    small = open_bundle(export_tiny("small", family=bundle.contract.family, image_tokens=20))
    processor = Session(small, make_backend("ort-cpu")).processor
    assert small.contract.image_tokens == 20 and 15 <= processor([sized(1400, 1000)]).tokens[0] <= 20
    assert '"longest_edge": 15680' in small.file("preprocessor_config.json").read_text()


def test_pictures_of_one_size_take_no_bound(export_tiny):
    with pytest.raises(Refusal, match="--image-tokens bounds pictures of any size"):
        export_tiny("bounded", image_tokens=9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hubs_names_are_known(family, tied):
    """``visual.*``, ``model.layers.*``, with and without a matrix of the logits."""
    module = load_family(family)
    model = trace.build_without_memory(module.MODEL_CLASS, module.tiny_config(tied=tied), torch.float32, IMPLEMENTATION)
    old = {
        name: name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        for name, _ in model.named_parameters()
    }
    if tied:
        old["lm_head.weight"] = "model.embed_tokens.weight"
    shapes = {old[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {name: weights.StoredTensor(None, "F32", shape, 0, 0) for name, shape in shapes.items()}
    assert weights.match_parameters(model, stored) == old


def test_no_rope_ranks_by_what_was_not_rotated(export_tiny, bundle):
    folder = export_tiny("unrotated", family=bundle.contract.family, score="no-rope")
    assert check_cli.main([str(folder), "--tokens", "2"]) == 0


def test_engines_build_and_a_chain_runs_like_the_whole(export_tiny, bundle):
    """Float32 in two pieces, cut behind the selection: positions of the survivors are found again in each."""
    family = bundle.contract.family
    folder = export_tiny("cut", family=family, k=1, engine="tensorrt-rtx", engine_shards=2, max_batch=2)
    cut, recorded = open_bundle(folder), []
    assert cut.contract.chain("decoder") == ("decoder-0", "decoder-1")
    for chained in (False, True):
        backend = make_backend("ort-cpu")
        backend.chained = chained
        chat = runtime.Chat(Session(cut, backend))
        steps = list(chat.generate("What is it?", [sized(112, 84)], max_new_tokens=3))
        recorded.append((steps[0].prefill.logits, chat.session.cache_contents(0), [step.token_ids for step in steps]))
    np.testing.assert_equal(recorded[0], recorded[1])


@pytest.mark.slow  # float16 of every family: test_families.py; bfloat16 of llava: tests/runtime/test_engines.py
def test_bfloat16_engines_build(export_tiny):
    folder = export_tiny("bfloat16", family="qwen2_vl", dtype="bfloat16", engine="tensorrt-rtx", max_batch=2)
    assert {"vision.engine", "embed.engine", "decoder.engine"} <= {path.name for path in folder.iterdir()}
