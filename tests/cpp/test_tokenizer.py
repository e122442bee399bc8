"""The C++ tokenizer against `tokenizers`: ids, text, and text as it streams, over random strings."""

import ctypes
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import unicode_tables
from probing import ProbeError, array, call, library, result
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from vlmtrim.export.demo.evaluate import CHECKPOINT
from vlmtrim.runtime.tokenizing import TextStream, control_tokens, renamed

ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ["<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<unk>"]
GEMMA_MARKS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus():
    """Texts in several scripts to learn merges from."""
    for name in ("README.md", "CHANGELOG.md", "runtime/session.py", "graphs/contract.py"):
        yield from (ROOT / name).read_text().splitlines()
    yield from [
        "Der Bär füttert süße Äpfel, Straße",
        "Ёлка и ещё зелёный",
        "猫は窓の外を見ている",
        "한국어 고양이가 창문",
    ] * 20


def byte_level(pattern, forms):
    """As of Llama-3 and Qwen2."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is LLAMA3))
    if forms:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=False)])
    if pattern is LLAMA3:
        template = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


def llama(legacy):
    """As of Llama-2: SentencePiece's BPE with bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=not legacy)
    trainer = trainers.BpeTrainer(vocab_size=1800, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [entry for entry in raw["added_tokens"] if entry["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken("<pad>", normalized=True), AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True, normalized=False), AddedToken("  ", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    )
    return tokenizer


def gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    return tokenizer


def gemma():
    """As of Gemma 3: SentencePiece's BPE without a space in front; runs of newlines are tokens of their own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", *BYTES], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [entry for entry in raw["added_tokens"] if entry["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    runs = ["\n" * count for count in range(1, 32)] + ["▁" * count for count in range(2, 32)]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in runs])
    names = [*SPECIALS, *GEMMA_MARKS]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def digits(each):
    """As of SmolLM2: digits apart, or numbers, then GPT-2's pattern."""
    tokenizer = gpt2()
    steps = [pre_tokenizers.Digits(individual_digits=each), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


KINDS = {
    "demo": lambda: Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")),
    "llama3": lambda: byte_level(LLAMA3, forms=False),
    "qwen2": lambda: byte_level(QWEN2, forms=True),
    "llama": lambda: llama(legacy=False),
    "llama-legacy": lambda: llama(legacy=True),
    "gpt2": gpt2,
    "smollm2": lambda: digits(each=True),
    "gemma": gemma,
    "numbers": lambda: digits(each=False),
}


class Native:
    def __init__(self, source: bytes):
        made = library().probe_tokenizer
        made.restype = ctypes.c_void_p
        place = made(source, ctypes.c_size_t(len(source)))
        if not place:
            raise ProbeError(result("error").decode(errors="replace"))
        self._handle = ctypes.c_void_p(place)

    def encode(self, text, add=True, name="probe_encode"):
        data = text.encode()
        call(name, self._handle, data, ctypes.c_size_t(len(data)), int(add))
        return array("ids", np.int64).tolist()

    def decode(self, ids):
        given = np.array(ids, dtype=np.int64)
        call("probe_decode_ids", self._handle, given.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(len(ids)))
        return result("text").decode()

    def stream(self, ids):
        texts = []
        for number, token in enumerate(ids):
            call("probe_stream", self._handle, ctypes.c_int64(token), int(number == 0))
            texts.append(result("text").decode())
        return texts


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    tokenizer = KINDS[request.param]()
    return tokenizer, Native(tokenizer.to_str().encode())


PIECES = [
    *(" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "▁", "."),
    *(
        "'s",
        "'LL",
        "'\u017f",
        "don't",
        "12345",
        "½",
        "٣",
        "IV",
        "Ⅷ",
        "!!!",
        "?)",
        "…",
        "'",
        "\u2019s",
        "the",
        "picture",
        "word",
    ),
    *(
        "Äpfel",
        "A\u0308pfel",
        "ё",
        "\u0435\u0308",
        "한국어",
        "\u1112\u1161\u11ab",
        "猫",
        "क\u093c",
        "\u0958",
        "e\u0327\u0301",
    ),
    *(
        "é",
        "\u212b",
        "\ufb01",
        "🙂",
        "👩\u200d🚀",
        "🇩🇪",
        "\U0001f468",
        "\u1e9b\u0323",
        "\U00011099\U000110ba",
        "\u1c89",
    ),
    *("<s>", "</s>", "<image>", "<|im_end|>", "<im", "age>", "<unk>", "<pad>", "<mask>", "<end>", "<tool>", "<0x0A>"),
    *("visual", "tokens", "_", "self.", "return", "\x00", "\x7f", "\ufffd", "\ufeff"),
    *("\n\n\n", "\n" * 33, "▁▁", " " * 17, "<start_of_image>", "\n\n<image_soft_token>", "<end_of_turn>\n"),
]


def strings(count, seed):
    random = np.random.default_rng(seed)
    for number in range(count):
        if number % 4:
            words = random.choice(len(PIECES), random.integers(0, 9))
            yield "".join(PIECES[index] + (" " if random.random() < 0.3 else "") for index in words)
            continue
        high = int(random.choice([128, 0x250, 0x3100, 0xD800, 0x20000]))
        codes = random.integers(1, high, random.integers(1, 12)).tolist()
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def compare(pair, count, seed):
    tokenizer, native = pair
    for text in strings(count, seed):
        for add in (True, False):
            assert native.encode(text, add) == tokenizer.encode(text, add_special_tokens=add).ids, repr(text)


def test_ids_are_the_librarys(pair):
    compare(pair, 1500, 0)


@pytest.mark.slow
def test_ids_of_a_hundred_thousand_strings_are_the_librarys(pair):
    compare(pair, 100_000, 1)


def test_text_is_the_librarys(pair):
    tokenizer, native = pair
    random, size = np.random.default_rng(2), tokenizer.get_vocab_size()
    for _ in range(400):
        ids = random.integers(0, size + 5, random.integers(0, 12)).tolist()
        assert native.decode(ids) == tokenizer.decode(ids)
    for text in strings(300, 3):
        ids = tokenizer.encode(text).ids
        assert native.decode(ids) == tokenizer.decode(ids)


def test_text_streams_as_in_python(pair):
    tokenizer, native = pair
    random, size = np.random.default_rng(4), tokenizer.get_vocab_size()
    answers = [random.integers(0, size, 30).tolist() for _ in range(60)]
    answers += [tokenizer.encode(text).ids for text in strings(300, 5)]
    for ids in answers:
        stream = TextStream(tokenizer)
        assert native.stream(ids) == [stream.step(token) for token in ids]


def test_no_text_becomes_a_control_token_where_they_have_other_names(pair):
    tokenizer, native = pair
    control = control_tokens(tokenizer)
    secret, _ = renamed(tokenizer.to_str().encode(), control, "tokenizer.json")
    for text in strings(1500, 6):
        found = native.encode(text, False, "probe_encode_hidden")
        assert found == secret.encode(text, add_special_tokens=False).ids, repr(text)
        unknown = tokenizer.token_to_id("<unk>")
        assert not {token for token in found if token != unknown} & control.keys()


def test_nfc_is_the_librarys():
    library_nfc = normalizers.NFC()
    random = np.random.default_rng(7)
    every = [chr(code) for code in range(0x110000) if unicodedata.normalize("NFD", chr(code)) != chr(code)][::7]
    marks = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
    texts = [char + "".join(random.choice(marks, random.integers(0, 4))) for char in every]
    texts += ["".join(random.choice(every, 3)) for _ in range(500)]
    for text in [*texts, *strings(2000, 8)]:
        for form in (text, unicodedata.normalize("NFD", text)):
            data = form.encode()
            call("probe_nfc", data, ctypes.c_size_t(len(data)))
            assert result("text").decode() == library_nfc.normalize_str(form), ascii(form)


@pytest.mark.slow
def test_the_tables_are_those_of_the_library(tmp_path, monkeypatch):
    written = unicode_tables.TARGET.read_text()
    monkeypatch.setattr(unicode_tables, "TARGET", tmp_path / "tables.inc")
    unicode_tables.main()
    assert (tmp_path / "tables.inc").read_text() == written


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN2, GPT2, r"[?,.!\n]", r"a{2}|(?:bc)+d?|[a-c]*x(?=y)|\P{L}"])
def test_matches_are_the_librarys(pattern):
    splitter = pre_tokenizers.Split(Regex(pattern), "removed")
    letters = "abcdxy ?\n1é"
    random = np.random.default_rng(9)
    for text in [*strings(1500, 10), *("".join(random.choice(list(letters), 12)) for _ in range(1500))]:
        data = text.encode()
        call("probe_matches", pattern.encode(), data, ctypes.c_size_t(len(data)))
        ends = array("places", np.int64).reshape(-1, 2)
        left = np.ones(len(data), dtype=bool)
        for start, end in ends:
            left[start:end] = False
        expected = np.zeros(len(data), dtype=bool)
        sizes = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])]).astype(int)
        for _, (start, end) in splitter.pre_tokenize_str(text):
            expected[sizes[start] : sizes[end]] = True
        np.testing.assert_array_equal(left, expected, err_msg=repr(text))


def test_bytes_that_are_no_text_are_replaced_as_rust_and_python_do():
    random = np.random.default_rng(11)
    for _ in range(3000):
        data = random.choice(
            np.array([0x41, 0x80, 0xBF, 0xC2, 0xE0, 0xA0, 0xED, 0x9F, 0xF0, 0x90, 0xF4, 0x8F, 0xFF], np.uint8), 6
        ).tobytes()
        call("probe_lossy", data, ctypes.c_size_t(len(data)))
        assert result("text").decode() == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["model"].update(type="Unigram"), "the C\\+\\+ runtime knows BPE"),
        (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "normalizer has .Lowercase."),
        (lambda raw: raw.update(decoder={"type": "WordPiece"}), "decoder has .WordPiece."),
        (lambda raw: raw["model"]["merges"].append(["q", "zzz"]), "names no tokens"),
        (lambda raw: raw["model"].update(dropout=0.5), "dropout is 0.5"),
        (lambda raw: raw.update(model=None), "has no model"),
        (
            lambda raw: raw.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": r"(a)\1"}, "behavior": "Isolated", "invert": False}
            ),
            "does not know",
        ),
    ],
)
def test_what_is_not_known_is_refused(change, said):
    raw = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    change(raw)
    with pytest.raises(ProbeError, match=said):
        Native(json.dumps(raw).encode())


def test_a_pattern_that_would_search_for_ever_is_refused():
    text = b"a" * 5000
    with pytest.raises(ProbeError, match="takes too long"):
        call("probe_matches", b"(?:a*)*(?:a*)*(?:a*)*b", text, ctypes.c_size_t(len(text)))
