"""Messages -> token ids, with the checkpoint's own chat template and tokenizer; ids -> text, token by token.

What people type is text and stays text: ``</s>``, ``<|im_end|>`` or ``<image>`` in a question are spelled out, so that
nobody forges a turn or moves a picture. The template alone writes control tokens.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import count
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder, shown
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.template import ChatTemplate

# The prompt of LLaVA-1.5 (its model card), for checkpoints that ship no template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ image_token + '\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

Message = dict[str, Any]
Span = tuple[int, int]  # of what people wrote, in characters of the rendered text

# Characters of a conversation for each token that it may have, and for the template's own words. Tokens of words and
# code have 4 on average; runs of spaces up to 128.
CHARACTERS_A_TOKEN = 32
CHARACTERS_OF_TEMPLATE = 64 << 10


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and where in it what people wrote stands, in order."""

    text: str
    spans: tuple[Span, ...]

    def since(self, start: int) -> Rendered:
        """The part from a character on."""
        spans = tuple((max(a - start, 0), b - start) for a, b in self.spans if b > start)
        return Rendered(self.text[start:], spans)


class Prompter:
    """Tokenizer and chat template of a bundle.

    Raises BundleError or RuntimeRefusal where a file of them is missing, damaged or asks for too much.
    """

    def __init__(self, files: Folder, contract: Contract):
        self._source = files.bytes("tokenizer.json")
        self._file = files.path / "tokenizer.json"
        self.tokenizer = _tokenizer(self._source, str(self._file))
        token = self.tokenizer.id_to_token(contract.image_token_id)
        if token is None:
            raise BundleError(f"{self._file} has no token {contract.image_token_id}, the image token")
        self.image_token: str = token
        self._image_token_id = contract.image_token_id
        self._video_token_id = contract.video_token_id
        self.most_characters = CHARACTERS_A_TOKEN * contract.max_seq_len
        self._settings = files.json("tokenizer_config.json") if "tokenizer_config.json" in files else {}
        template = _template_text(files, self._settings)
        self._template = ChatTemplate(template, self.most_characters + CHARACTERS_OF_TEMPLATE)
        self._control = frozenset(self.tokenizer.get_added_tokens_decoder())

    def special(self, name: str) -> str:
        """Text of a special token, e.g. ``bos_token``; empty where there is none."""
        value = self._settings.get(name) or ""
        value = value.get("content", "") if isinstance(value, dict) else value
        return value if isinstance(value, str) else ""

    def render(self, messages: list[Message], now: datetime | None = None) -> Rendered:
        """A conversation that the assistant is about to answer; ``now`` is for templates that write a date."""
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        for text in texts:
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise RuntimeRefusal("the prompt is no valid Unicode text (a lone surrogate); give UTF-8")
        size = sum(map(len, texts))
        if size > self.most_characters:
            raise RuntimeRefusal(
                f"the conversation has {size} characters, this bundle takes {self.most_characters}; "
                "shorten the prompt, reset the conversation, or export with a larger --max-seq-len"
            )
        when = now or datetime.now()
        return _with_spans(self._write(messages, when), self._pieces(messages, when), texts)

    def _write(self, messages: list[Message], now: datetime) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=True,
            image_token=self.image_token,
            bos_token=self.special("bos_token"),
            eos_token=self.special("eos_token"),
            strftime_now=now.strftime,
        )

    def _pieces(self, messages: list[Message], now: datetime) -> list[str]:
        """What the template writes around the texts, and between those pieces the number of the text that stands there:
        found by rendering the conversation with a mark that nobody can guess in place of every text."""
        nonce = secrets.token_hex(8)
        marks = (f"{nonce} {number} {nonce}" for number in count())
        marked = [{**message, "content": [_named(part, marks) for part in message["content"]]} for message in messages]
        pieces = self._write(marked, now).split(nonce)
        if len(pieces) % 2 == 0 or not all(number.strip().isdigit() for number in pieces[1::2]):
            raise RuntimeRefusal("the bundle's chat template takes texts apart, so they cannot be kept from its marks")
        return pieces

    def encode(self, rendered: Rendered, opening: bool) -> list[int]:
        """Token ids; ``opening`` adds the start token that the tokenizer prescribes, unless the text has it already.

        Where people wrote what the tokenizer takes for a control token, their text is spelled out. The mark of a video
        becomes that of an image: features take their places all the same.
        """
        bos = self.special("bos_token")
        add = opening and not (bos and rendered.text.startswith(bos))
        found = _encode(self.tokenizer, rendered.text, add)
        if any(_overlap(span, rendered.spans) for span in self._controls(found)):
            found = self._spelled_out(rendered, add)
        return [self._image_token_id if token == self._video_token_id else token for token in found.ids]

    def _controls(self, encoding: Any) -> Iterator[Span]:
        """Where an encoding has control tokens that stand for characters of the text."""
        for token, span in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control and span[0] < span[1]:
                yield span

    def _spelled_out(self, rendered: Rendered, add: bool) -> Any:
        """The encoding by a tokenizer that knows the control tokens under other names, which nobody can guess; the
        template's are written so."""
        renamed, names = self._secret
        at, parts = 0, []
        for start, end in (*rendered.spans, (len(rendered.text),) * 2):
            parts += [self._renamed(rendered.text[at:start], names), rendered.text[start:end]]
            at = end
        return _encode(renamed, "".join(parts), add)

    def _renamed(self, template: str, names: Mapping[int, str]) -> str:
        """A piece of the template with its control tokens under their secret names."""
        found, at, parts = _encode(self.tokenizer, template, False), 0, []
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token in names and start < end:
                parts += [template[at:start], names[token]]
                at = end
        return "".join([*parts, template[at:]])

    @cached_property
    def _secret(self) -> tuple[Tokenizer, dict[int, str]]:
        """A tokenizer like the bundle's whose control tokens have other names, and the name of each by its id."""
        raw = json.loads(self._source)
        nonce = secrets.token_hex(8)
        contents = {entry["id"]: entry["content"] for entry in raw["added_tokens"]}
        names = {number: f"\ue000{nonce}{index}\ue001" for index, number in enumerate(contents)}
        by_content = {content: names[number] for number, content in contents.items()}
        for entry in raw["added_tokens"]:
            entry["content"] = names[entry["id"]]
        model = raw["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {by_content.get(content, content): number for content, number in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[by_content.get(content, content), score] for content, score in vocabulary]
        if model.get("unk_token") in by_content:
            model["unk_token"] = by_content[model["unk_token"]]
        renamed = _tokenizer(json.dumps(raw).encode(), str(self._file))
        if any(renamed.token_to_id(name) != number for number, name in names.items()):
            raise BundleError(f"{self._file}: control tokens are not where their ids say, so text cannot be kept apart")
        return renamed, names

    def decode_stream(self) -> TextStream:
        """Incremental decoder: holds bytes back until they form characters."""
        return TextStream(self.tokenizer)

    def expand_images(self, ids: list[int], tokens: Sequence[int]) -> list[int]:
        """Repeat the image token of every picture for each of its visual tokens, ``tokens`` of them by picture."""
        marks = ids.count(self._image_token_id)
        if marks != len(tokens):
            raise RuntimeRefusal(f"the prompt holds {marks} {self.image_token} mark(s) for {len(tokens)} image(s)")
        counts = iter(tokens)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == self._image_token_id else 1)
        return expanded


class TextStream:
    """Token ids of one answer -> text, as soon as their bytes form characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # since the last text

    def step(self, token: int) -> str:
        """What the token adds to the text; empty while bytes are missing."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # bytes that form no text, which a model may say too: decoded on their own, and begun anew
            text = self._tokenizer.decode(self._held)
            self._stream = DecodeStream(skip_special_tokens=True)
        if text:
            self._held.clear()
        return text


class Conversation:
    """The turns of one row; knows which part of the rendered text the caches already hold.

    Args:
        prompter: of the bundle.
        system: what stands before the first question, where the template has a place for it; empty for nothing.
    """

    def __init__(self, prompter: Prompter, system: str = ""):
        self._prompter = prompter
        self._system = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        self._messages: list[Message] = self._system
        self._consumed = ""
        self._before: tuple[list[Message], str] = (self._messages, "")
        self._began = datetime.now()  # another date in a later turn would rewrite the first one

    def ask(self, prompt: str | Sequence[Message], images: int = 0, videos: Collection[int] = ()) -> list[int]:
        """Token ids that continue the caches with a question; image tokens are not repeated yet.

        Args:
            prompt: a text, or the question's parts in order, as templates take them: ``{"type": "text", "text": ...}``,
                ``{"type": "image"}`` or ``{"type": "video"}``.
            images: pictures of a text; they stand where the template puts them.
            videos: numbers of those that are videos.

        Raises RuntimeRefusal where prompt and images do not fit.
        """
        if isinstance(prompt, str):
            content: list[Message] = [{"type": "video" if i in videos else "image"} for i in range(images)]
            content.append({"type": "text", "text": prompt})
        else:
            content = list(prompt)
        if self._messages and self._messages[-1]["role"] == "user":
            self.answer("")  # nobody waited for it
        opening = self._messages == self._system
        messages = [*self._messages, {"role": "user", "content": content}]
        rendered = self._prompter.render(messages, self._began)
        fresh = rendered if opening else rendered.since(self._answered(rendered.text))
        self._before = self._messages, self._consumed
        self._messages, self._consumed = messages, rendered.text
        return self._prompter.encode(fresh, opening)

    def take_back(self) -> None:
        """Forget the question that was just asked: the caches did not take it."""
        self._messages, self._consumed = self._before

    def answer(self, text: str) -> None:
        """Record what the assistant said."""
        self._messages = [*self._messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]

    def _answered(self, text: str) -> int:
        """Where the last answer ends in the newly rendered conversation."""
        said = self._messages[-1]["content"][0]["text"]
        fresh = text[len(self._consumed) :]
        if said not in fresh:  # templates may trim what was said
            said = said.strip()
        start = fresh.find(said)
        if not text.startswith(self._consumed) or start < 0 or fresh[:start].strip():
            raise RuntimeRefusal(
                "the chat template rewrites earlier turns, so the caches cannot be continued; "
                "start a new conversation with reset()"
            )
        return len(self._consumed) + start + len(said)


def _named(part: Message, marks: Iterator[str]) -> Message:
    return {**part, "text": next(marks)} if part["type"] == "text" else part


def _with_spans(text: str, pieces: Sequence[str], texts: Sequence[str]) -> Rendered:
    """A rendered conversation with the places of its texts, which templates may trim. Where they do more than that to
    them, the conversation is put together from the pieces."""
    around, spans, at = pieces[::2], [], 0
    wrote = [texts[int(number)] for number in pieces[1::2]]
    for before, whole, behind in zip(around, wrote, around[1:], strict=False):
        trims = (whole, whole.strip(), whole.lstrip(), whole.rstrip())
        form = next((form for form in trims if text.startswith(before + form + behind, at)), None)
        if form is None:
            break
        spans.append((at + len(before), at + len(before) + len(form)))
        at = spans[-1][1]
    if len(spans) == len(wrote) and text[at:] == around[-1]:
        return Rendered(text, tuple(spans))
    text, spans = around[0], []
    for whole, behind in zip(wrote, around[1:], strict=True):
        spans.append((len(text), len(text) + len(whole)))
        text += whole + behind
    return Rendered(text, tuple(spans))


def _overlap(span: Span, others: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _tokenizer(source: bytes, where: str) -> Tokenizer:
    """Of a tokenizer.json; the library raises bare exceptions, and its panics are no Exception at all."""
    try:
        tokenizer = Tokenizer.from_buffer(source)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(f"{where} is no tokenizer: {_first_line(error)}") from error
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, add: bool) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=add)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeRefusal(f"the bundle's tokenizer fails: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _template_text(files: Folder, settings: Mapping[str, Any]) -> str:
    """The chat template, from the place where it lies; LLaVA-1.5's where a checkpoint has none."""
    if "chat_template.jinja" in files:
        return files.text("chat_template.jinja")
    where, template = "tokenizer_config.json", settings.get("chat_template")
    if "chat_template.json" in files:
        where, template = "chat_template.json", files.json("chat_template.json").get("chat_template")
    if isinstance(template, list):  # named ones
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else template
    if template is None and where == "tokenizer_config.json":
        return DEFAULT_TEMPLATE
    if not isinstance(template, str):
        raise BundleError(f"{files.path / where}: chat_template is {shown(template)}; expected a text")
    return template
