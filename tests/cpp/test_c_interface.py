"""vlmtrim.h through ctypes: conversations have the tokens of the Python runtime; what goes wrong is a sentence."""

import ctypes
import threading
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from functools import cache

import numpy as np
import pytest
from probing import build_folder
from test_session import CASES as BUNDLES

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import Image, Prompt
from vlmtrim.runtime.generate import Chat
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.video import Video

TEXT, FILE, BYTES, PIXELS, VIDEO = range(5)
ENDED = ["", "eos", "stop", "length", "capacity", "cancelled"]


class ModelOptions(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("backend", c_char_p),
        ("onnxruntime", c_char_p),
        ("threads", c_int32),
        ("exact", c_int32),
        ("verify", c_int32),
        ("tensorrt", c_char_p),
        ("cuda_graphs", c_char_p),
    ]


class Part(ctypes.Structure):
    _fields_ = [
        ("kind", c_int32),
        ("text", c_char_p),
        ("data", POINTER(c_uint8)),
        ("length", c_size_t),
        ("width", c_int32),
        ("height", c_int32),
        ("channels", c_int32),
        ("stride", c_int64),
        ("frames", c_void_p),
        ("frame_count", c_size_t),
        ("fps", c_double),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("max_new_tokens", c_int32),
        ("temperature", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("has_seed", c_int32),
        ("seed", c_uint64),
        ("stop", POINTER(c_char_p)),
        ("stops", c_size_t),
        ("guide", POINTER(c_float)),
        ("guides", c_size_t),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("index", c_int64),
        ("token", c_int64),
        ("text", c_void_p),
        ("length", c_size_t),
        ("ended", c_int32),
    ]


class Answer(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("text", c_void_p),
        ("length", c_size_t),
        ("tokens", POINTER(c_int64)),
        ("token_count", c_size_t),
        ("ended", c_int32),
        ("visual", c_int64),
        ("kept", c_int64),
        ("kept_by_layer", POINTER(c_int64)),
        ("layers", c_size_t),
        ("vision_seconds", c_double),
        ("prefill_seconds", c_double),
        ("decode_seconds", c_double),
        ("decode_steps", c_int64),
        ("caches", c_char_p),
        ("caches_seconds", c_double),
        ("guided", c_int32),
        ("exited", c_int32),
        ("confidence", c_double),
        ("guide_seconds", c_double),
        ("guided_seconds", c_double),
    ]


Callback = ctypes.CFUNCTYPE(c_int32, c_void_p, POINTER(Step))


class Failed(Exception):
    pass


@cache
def api():
    found = ctypes.CDLL(str(build_folder() / "libvlmtrim.so"))
    for name in ("vlmtrim_version", "vlmtrim_error", "vlmtrim_model_description"):
        getattr(found, name).restype = c_char_p
    for name in ("vlmtrim_model_close", "vlmtrim_session_close", "vlmtrim_cancel", "vlmtrim_model_description"):
        getattr(found, name).argtypes = [c_void_p]
    return found


def check(status):
    if status:
        raise Failed(f"{status}: {api().vlmtrim_error().decode()}")


def options_of(stop=(), guide=(), **settings):
    made = Options(size=ctypes.sizeof(Options), **settings)
    made.stop, made.stops = (c_char_p * len(stop))(*(text.encode() for text in stop)), len(stop)
    made.guide, made.guides = (c_float * len(guide))(*guide), len(guide)
    return made


def part(value):
    """Of a text, a Pillow picture (its pixels, in rows with a gap), bytes of a file, a Path, or a Video of these."""
    if isinstance(value, Video):
        frames = (Part * len(value.frames))(*map(part, value.frames))
        made = Part(VIDEO, frames=ctypes.cast(frames, c_void_p), frame_count=len(frames), fps=value.fps)
        made.kept = frames
        return made
    if isinstance(value, str):
        return Part(TEXT, value.encode())
    if isinstance(value, bytes):
        return Part(BYTES, None, (c_uint8 * len(value)).from_buffer_copy(value), len(value))
    if hasattr(value, "size"):
        pixels = np.asarray(value)
        wide = np.zeros((pixels.shape[0], pixels.shape[1] + 3, 3), np.uint8)
        wide[:, :-3] = pixels
        data = wide.tobytes()
        buffer = (c_uint8 * len(data)).from_buffer_copy(data)
        return Part(PIXELS, None, buffer, 0, value.width, value.height, 3, wide.strides[0])
    return Part(FILE, str(value).encode())


def said(told):
    return ctypes.string_at(told.text, told.length).decode()


class Native:
    def __init__(self, folder):
        self.model, self.session = c_void_p(), c_void_p()
        given = ModelOptions(size=ctypes.sizeof(ModelOptions))
        check(api().vlmtrim_model_open(str(folder).encode(), ctypes.byref(given), ctypes.byref(self.model)))
        check(api().vlmtrim_session_open(self.model, ctypes.byref(self.session)))
        api().vlmtrim_model_close(self.model)  # a session keeps its model alive

    def close(self):
        api().vlmtrim_session_close(self.session)

    def reset(self, system=""):
        check(api().vlmtrim_session_reset(self.session, system.encode()))

    def generate(self, parts, listener=None, ids=None, **settings):
        """(text, tokens, why it ended, visual, kept); listener is given every step's text and token."""
        heard = Callback(lambda _, step: listener(said(step[0]), step[0].token) or 0) if listener else None
        made = list(map(part, parts))
        given = (Part * len(parts))(*made)
        answer, options = Answer(size=ctypes.sizeof(Answer)), options_of(**settings)
        rest = (ctypes.byref(options), heard, None, ctypes.byref(answer))
        if ids is None:
            check(api().vlmtrim_generate(self.session, given, c_size_t(len(parts)), *rest))
        else:
            numbers = (c_int64 * len(ids))(*ids)
            check(
                api().vlmtrim_generate_ids(
                    self.session, numbers, c_size_t(len(ids)), given, c_size_t(len(parts)), *rest
                )
            )
        self.answer = answer
        tokens = answer.tokens[: answer.token_count]
        return said(answer), tokens, ENDED[answer.ended], answer.visual, answer.kept


def python_answer(chat: Chat, question, images, stop=(), **settings):
    limit = settings.pop("max_new_tokens", 128)
    sampling = Sampling(**settings) if settings else None
    steps = list(chat.generate(question, images, max_new_tokens=limit, sampling=sampling, stop=stop))
    tokens, last = [step.token_ids[0] for step in steps], steps[-1]
    return "".join(step.text for step in steps), tokens, last.ended[0], last.prefill.visual, last.prefill.kept


CASES = [
    "fastv",
    "zipvl",
    "next",
    "qwen2",
    "qwen2_5",
    "qwen3",
    "onevision",
    "video",
    "smol",
    "intern",
    "gemma",
    "trimmed",
]
SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 7}


def seeded(settings):
    return {**settings, "has_seed": 1} if "seed" in settings else settings


# The others are the same code over other processors.
OFTEN = ("fastv", "zipvl", "trimmed", "onevision", "smol", "intern", "gemma")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_three_turns_have_the_tokens_of_python(name, export_tiny):
    family, fields = BUNDLES[name]
    folder = export_tiny(f"cpp-{name}", family=family, **fields)
    native = Native(folder)
    picture, other = (generated_picture(seed).resize(size) for seed, size in ((1, (90, 60)), (2, (31, 40))))
    with runtime.open(folder, backend="ort-cpu") as chat:
        for settings in ({"max_new_tokens": 24}, {"max_new_tokens": 24, **SAMPLED}):
            chat.reset("Be brief.")
            native.reset("Be brief.")
            for question, images in (("What <image>?", [picture]), ("And</s>now?", []), ("Here?", [picture, other])):
                expected = python_answer(chat, question, images, **settings)
                assert native.generate([*images, question], **seeded(settings)) == expected
    native.close()


def test_demo_answers_with_sixty_four_tokens_and_more(demo_bundle, picture):
    native = Native(demo_bundle)
    with runtime.open(demo_bundle, backend="ort-cpu") as chat:
        for settings in ({}, {"max_new_tokens": 64, "temperature": 2.0, "seed": 3}, {"max_new_tokens": 2}):
            chat.reset()
            native.reset()
            for _ in range(3):
                heard: list = []
                expected = python_answer(chat, "Which word is written?", [picture], **settings)
                found = native.generate(
                    [picture, "Which word is written?"],
                    lambda *step, heard=heard: heard.append(step),
                    **seeded(settings),
                )
                assert found == expected
                assert "".join(text for text, _ in heard) == found[0] and [token for _, token in heard] == found[1]
    native.close()


def test_pictures_stand_where_they_are_put(fastv_bundle, picture):
    native = Native(fastv_bundle)
    image = generated_picture(2)
    with runtime.open(fastv_bundle, backend="ort-cpu") as chat:
        question = Prompt("Is ", Image(image), " larger than ", Image(picture), "?")
        expected = python_answer(chat, question, (), max_new_tokens=8)
        parts = ["Is ", image, " larger than ", picture.read_bytes(), "?"]
        assert native.generate(parts, max_new_tokens=8) == expected
    native.close()


def test_stop_texts_end_an_answer(demo_bundle, picture):
    native = Native(demo_bundle)
    whole = native.generate([picture, "Which word is written?"])
    stop = whole[0][1:3]
    native.reset()
    with runtime.open(demo_bundle, backend="ort-cpu") as chat:
        expected = python_answer(chat, "Which word is written?", [picture], stop=(stop,))
    assert native.generate([picture, "Which word is written?"], stop=(stop,)) == expected
    assert expected[2] == "stop" and expected[0] == whole[0][:1]
    native.close()


def test_ids_from_outside(fastv_bundle, picture):
    """Where the template is no prompt.json: the same answer from ids."""
    contract = open_bundle(fastv_bundle).contract
    native = Native(fastv_bundle)
    with runtime.open(fastv_bundle, backend="ort-cpu") as chat:
        ids = chat._rows[0].ask("Hi", 1)
        chat.reset()
        expected = python_answer(chat, "Hi", [picture], max_new_tokens=8)
    assert ids.count(contract.image_token_id) == 1
    assert native.generate([picture], ids=ids, max_new_tokens=8) == expected
    native.close()


@pytest.mark.parametrize("how", ["callback", "cancel"])
def test_an_answer_that_is_ended_goes_on_as_in_python(how, fastv_bundle):
    """The last token was said and is not in the caches: the next question brings it there."""
    native = Native(fastv_bundle)

    def end(_, token):
        heard.append(token)
        if how == "cancel" and len(heard) == 3:
            other = threading.Thread(target=api().vlmtrim_cancel, args=(native.session,))
            other.start()
            other.join()
        return int(how == "callback" and len(heard) == 3)

    heard = []
    found = native.generate(["Hello?"], end)
    assert found[2] == "cancelled" and found[1] == heard and len(heard) == 3
    with runtime.open(fastv_bundle, backend="ort-cpu") as chat:
        steps = chat.generate("Hello?")
        assert [next(steps).token_ids[0] for _ in range(3)] == heard
        steps.close()
        assert native.generate(["Go on."], max_new_tokens=9) == python_answer(chat, "Go on.", (), max_new_tokens=9)
    native.close()


def test_sessions_of_a_model_run_in_threads(fastv_bundle, picture):
    model, sessions, found = c_void_p(), [c_void_p(), c_void_p()], {}
    check(api().vlmtrim_model_open(str(fastv_bundle).encode(), None, ctypes.byref(model)))

    def ask(number):
        native = Native.__new__(Native)
        native.session = sessions[number]
        for turn in range(4):
            native.reset()
            found[number, turn] = native.generate([picture, "What?"], max_new_tokens=12)
        native.close()

    for session in sessions:
        check(api().vlmtrim_session_open(model, ctypes.byref(session)))
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    api().vlmtrim_model_close(model)
    assert len(found) == 8 and len({str(value) for value in found.values()}) == 1


def test_a_second_thread_in_a_session_is_refused(fastv_bundle):
    native, said = Native(fastv_bundle), []

    def intrude(*_):
        def other():
            try:
                native.reset()
            except Failed as refusal:
                said.append(str(refusal))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return 1

    native.generate(["Hello?"], intrude)
    assert len(said) == 1 and "another thread is using this session" in said[0]
    native.close()


@pytest.mark.parametrize(
    ("parts", "settings", "said"),
    [
        ([" "], {}, "2: the prompt is empty"),
        ([], {}, "2: the prompt is empty"),
        (["x"], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (["x"], {"temperature": -1}, "temperature is -1"),
        (["x"], {"top_p": 2}, "top-p is 2"),
        (["x"], {"stop": ("",)}, "a stop text is empty"),
        (["x"], {"guide": (1.0,)}, "scores of a guide are given"),
        ([b"GIF", "x"], {}, "is no picture that is read here"),
        (["x" * 30000], {}, "characters, this bundle takes 16384"),
        (["x" * 3000], {}, "their capacity is"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(parts, settings, said, fastv_bundle):
    native = Native(fastv_bundle)
    before = native.generate(["Hello?"], max_new_tokens=3)
    with pytest.raises(Failed, match=said):
        native.generate(parts, **settings)
    after = native.generate(["Go on."], max_new_tokens=3)
    native.reset()
    assert native.generate(["Hello?"], max_new_tokens=3) == before
    assert native.generate(["Go on."], max_new_tokens=3) == after
    native.close()


def test_misuse_is_a_sentence(tmp_path, fastv_bundle):
    model = c_void_p()
    with pytest.raises(Failed, match=r"1: .* is no bundle"):
        check(api().vlmtrim_model_open(str(tmp_path).encode(), None, ctypes.byref(model)))
    given = ModelOptions(size=ctypes.sizeof(ModelOptions), backend=b"abacus")
    with pytest.raises(Failed, match=r"2: backend .abacus. is not in this library"):
        check(api().vlmtrim_model_open(str(fastv_bundle).encode(), ctypes.byref(given), ctypes.byref(model)))
    given = ModelOptions(size=ctypes.sizeof(ModelOptions), onnxruntime=b"/nowhere/libonnxruntime.so")
    with pytest.raises(Failed, match="2: ONNX Runtime's library is not found"):
        check(api().vlmtrim_model_open(str(fastv_bundle).encode(), ctypes.byref(given), ctypes.byref(model)))
    with pytest.raises(Failed, match=r"2: vlmtrim_model_options\.size is 1"):
        given = ModelOptions(size=1)
        check(api().vlmtrim_model_open(str(fastv_bundle).encode(), ctypes.byref(given), ctypes.byref(model)))
    with pytest.raises(Failed, match="2: folder is NULL"):
        check(api().vlmtrim_model_open(None, None, ctypes.byref(model)))
    with pytest.raises(Failed, match="2: session is NULL"):
        check(api().vlmtrim_session_reset(None, b""))
    assert api().vlmtrim_version().decode() == "0.1.0"
