"""Messages -> token ids, with the checkpoint's own chat template and tokenizer; ids -> text, token by token.

What people type is text and stays text: ``</s>``, ``<|im_end|>`` or ``<image>`` in a question are spelled out, so that
nobody forges a turn or moves a picture. The template alone writes control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import count
from typing import Any

from tokenizers import Tokenizer

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder, shown
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.template import ChatTemplate
from vlmtrim.runtime.tokenizing import TextStream, control_tokens, encode, load, renamed

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

    def told(self, marks: Collection[str], words: Sequence[str]) -> Rendered:
        """With words in place of the template's marks, in order. Raises RuntimeRefusal where they do not match."""
        mark = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        left, at, parts, spans, size = list(reversed(words)), 0, [], [], 0
        for start, end in (*self.spans, (len(self.text),) * 2):
            first, *others = mark.split(self.text[at:start])
            if len(others) > len(left):
                break
            written = first + "".join(left.pop() + other for other in others)
            parts += [written, self.text[start:end]]
            spans.append((size + len(written), size + len(written) + end - start))
            at, size = end, spans[-1][1]
        else:
            if not left:
                return Rendered("".join(parts), tuple(spans[:-1]))
        count, names = len(mark.findall(self.text)), " or ".join(sorted(set(marks)))
        raise RuntimeRefusal(f"the prompt holds {count} {names} mark(s) for {len(words)} image(s)")

    def since(self, start: int) -> Rendered:
        """The part from a character on."""
        spans = tuple((max(a - start, 0), b - start) for a, b in self.spans if b > start)
        return Rendered(self.text[start:], spans)


class Prompter:
    """Tokenizer and chat template of a bundle.

    Args:
        files: of the bundle.
        contract: its contract.
        video_mark: what templates write for a video where the processor has words for it.

    Raises BundleError or RuntimeRefusal where a file of them is missing, damaged or asks for too much.
    """

    def __init__(self, files: Folder, contract: Contract, video_mark: str | None = None):
        self._source = files.bytes("tokenizer.json")
        self._file = files.path / "tokenizer.json"
        self.tokenizer = load(self._source, str(self._file))
        token = self.tokenizer.id_to_token(contract.image_token_id)
        if token is None:
            raise BundleError(f"{self._file} has no token {contract.image_token_id}, the image token")
        self.image_token: str = token
        self._image_token_id = contract.image_token_id
        self._video_token_id = contract.video_token_id
        video = None if self._video_token_id is None else self.tokenizer.id_to_token(self._video_token_id)
        self._video_mark = video_mark or video or token
        self._video_words = video_mark
        self.most_characters = CHARACTERS_A_TOKEN * contract.max_seq_len
        self._settings = files.json("tokenizer_config.json") if "tokenizer_config.json" in files else {}
        template = _template_text(files, self._settings)
        self._template = ChatTemplate(template, self.most_characters + CHARACTERS_OF_TEMPLATE)
        self._control = control_tokens(self.tokenizer)

    def special(self, name: str) -> str:
        """Text of a special token, e.g. ``bos_token``; empty where there is none."""
        value = self._settings.get(name) or ""
        value = value.get("content", "") if isinstance(value, dict) else value
        return value if isinstance(value, str) else ""

    def render(self, messages: list[Message], now: datetime | None = None) -> Rendered:
        """A conversation that the assistant is about to answer; ``now`` is for templates that write a date."""
        parts = [part for message in messages for part in message["content"] if part["type"] == "text"]
        texts = [part["text"] for part in parts]
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
        return _with_spans(self.write(messages, when), self.pieces(messages, when), parts)

    def placed(self, content: list[Message]) -> list[Message]:
        """A question's parts so that the template leaves its pictures where they are.

        Templates that write pictures first, as LLaVA's do, get one text with the marks in it; ``typed`` are the spans
        of that text which people wrote. So do those that know no videos, for each of these.
        """
        if any(part["type"] == "video" for part in content) and not self._knows_videos:
            mark = {"type": "text", "text": self._video_mark, "typed": []}
            content = [mark if part["type"] == "video" else part for part in content]
        kinds = [part["type"] for part in content]
        if kinds == sorted(kinds, key="text".__eq__) or self._keeps_order:
            return content
        text, typed = "", []
        for part in content:
            is_text = part["type"] == "text"
            mark = self._video_mark if part["type"] == "video" else self.mark
            words = part["text"] if is_text else mark
            spans = part.get("typed", [(0, len(words))] if is_text else [])
            typed += [(len(text) + start, len(text) + end) for start, end in spans]
            text += words
        return [{"type": "text", "text": text, "typed": typed}]

    @cached_property
    def mark(self) -> str:
        """What the template writes for a picture: the image token, or one that words stand in place of."""
        words, now = {"type": "text", "text": "words"}, datetime.now()
        shown, plain = (
            self.write([{"role": "user", "content": content}], now) for content in ([{"type": "image"}, words], [words])
        )
        new = [text for text in self.control_texts if shown.count(text) > plain.count(text)]
        return new[0] if len(new) == 1 else self.image_token

    @cached_property
    def _keeps_order(self) -> bool:
        """Whether the template writes a picture between two texts there."""
        words = {"type": "text", "text": "words"}
        pieces = self.pieces([{"role": "user", "content": [words, {"type": "image"}, words]}], datetime.now())
        return pieces[1::2] == [" 0 ", " 1 "] and self.mark in pieces[2]

    @cached_property
    def _knows_videos(self) -> bool:
        """Whether the template writes the mark of a video."""
        content = [{"type": "video"}, {"type": "text", "text": "words"}]
        try:
            return self._video_mark in self.pieces([{"role": "user", "content": content}], datetime.now())[0]
        except RuntimeRefusal:  # it takes every other part for a text
            return False

    def write(self, messages: list[Message], now: datetime) -> str:
        """What the template makes of a conversation."""
        return self._template.render(
            messages=messages,
            add_generation_prompt=True,
            image_token=self.image_token,
            bos_token=self.special("bos_token"),
            eos_token=self.special("eos_token"),
            strftime_now=now.strftime,
        )

    def pieces(self, messages: list[Message], now: datetime) -> list[str]:
        """What the template writes around the texts, and between those pieces the number of the text that stands there:
        found by rendering the conversation with a mark that nobody can guess in place of every text."""
        nonce = secrets.token_hex(8)
        marks = (f"{nonce} {number} {nonce}" for number in count())
        marked = [{**message, "content": [_named(part, marks) for part in message["content"]]} for message in messages]
        pieces = self.write(marked, now).split(nonce)
        if len(pieces) % 2 == 0 or not all(number.strip().isdigit() for number in pieces[1::2]):
            raise RuntimeRefusal("the bundle's chat template takes texts apart, so they cannot be kept from its marks")
        return pieces

    def encode(self, rendered: Rendered, opening: bool, words: Sequence[str] = ()) -> list[int]:
        """Token ids; ``opening`` adds the start token that the tokenizer prescribes, unless the text has it already.
        ``words`` stand in place of the pictures' marks, where the bundle's processor has any.

        Where people wrote what the tokenizer takes for a control token, their text is spelled out. The mark of a video
        becomes that of an image: features take their places all the same.
        """
        rendered = rendered.told({self.mark, self._video_words or self.mark}, words) if words else rendered
        bos = self.special("bos_token")
        # A start token that people spell is none.
        starts = bos and rendered.text.startswith(bos) and not _overlap((0, len(bos)), rendered.spans)
        add = opening and not starts
        found = encode(self.tokenizer, rendered.text, add)
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
        tokenizer, names = self._secret
        at, parts = 0, []
        for start, end in (*rendered.spans, (len(rendered.text),) * 2):
            parts += [self._renamed(rendered.text[at:start], names), rendered.text[start:end]]
            at = end
        return encode(tokenizer, "".join(parts), add)

    def _renamed(self, template: str, names: Mapping[int, str]) -> str:
        """A piece of the template with its control tokens under their secret names."""
        return "".join(names[part] if isinstance(part, int) else part for part in self.split_control(template))

    def split_control(self, template: str) -> list[str | int]:
        """A piece of the template as texts and the ids of its control tokens, in order."""
        found, at = encode(self.tokenizer, template, False), 0
        parts: list[str | int] = []
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token in self._control and start < end:
                parts += [template[at:start], token]
                at = end
        return [*parts, template[at:]]

    @property
    def control_texts(self) -> list[str]:
        """Texts of the control tokens."""
        return list(self._control.values())

    @cached_property
    def _secret(self) -> tuple[Tokenizer, dict[int, str]]:
        """A tokenizer like the bundle's whose control tokens have other names, and the name of each by its id."""
        return renamed(self._source, self._control, str(self._file))

    def decode_stream(self) -> TextStream:
        """Incremental decoder: holds bytes back until they form characters."""
        return TextStream(self.tokenizer)

    def expand_images(self, ids: list[int], tokens: Sequence[int], words: Sequence[str] = ()) -> list[int]:
        """Repeat the image token of every picture for each of its visual tokens, ``tokens`` of them by picture; where
        ``words`` were encoded, they have them all."""
        tokens = (1,) * sum(tokens) if words else tokens
        marks = ids.count(self._image_token_id)
        if marks != len(tokens):
            raise RuntimeRefusal(f"the prompt holds {marks} {self.image_token} mark(s) for {len(tokens)} image(s)")
        counts = iter(tokens)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == self._image_token_id else 1)
        return expanded


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

    def ask(
        self,
        prompt: str | Sequence[Message],
        images: int = 0,
        videos: Collection[int] = (),
        words: Sequence[str] = (),
    ) -> list[int]:
        """Token ids that continue the caches with a question; image tokens are not repeated yet.

        Args:
            prompt: a text, or the question's parts in order, as templates take them: ``{"type": "text", "text": ...}``,
                ``{"type": "image"}`` or ``{"type": "video"}``.
            images: pictures of a text; they stand where the template puts them.
            videos: numbers of those that are videos.
            words: what stands in place of each picture's mark; empty for the mark.

        Raises RuntimeRefusal where prompt and images do not fit.
        """
        if isinstance(prompt, str):
            content: list[Message] = [{"type": "video" if i in videos else "image"} for i in range(images)]
            content.append({"type": "text", "text": prompt})
        else:
            content = list(prompt)
        content = self._prompter.placed(content)
        if self._messages and self._messages[-1]["role"] == "user":
            self.answer("")  # nobody waited for it
        opening = self._messages == self._system
        messages = [*self._messages, {"role": "user", "content": content}]
        rendered = self._prompter.render(messages, self._began)
        fresh = rendered if opening else rendered.since(self._answered(rendered.text))
        self._before = self._messages, self._consumed
        self._messages, self._consumed = messages, rendered.text
        return self._prompter.encode(fresh, opening, words)

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


def _with_spans(text: str, pieces: Sequence[str], texts: Sequence[Message]) -> Rendered:
    """A rendered conversation with the places of its texts, which templates may trim. Where they do more than that to
    them, the conversation is put together from the pieces."""
    around, spans, at = pieces[::2], [], 0
    wrote = [texts[int(number)] for number in pieces[1::2]]
    for before, part, behind in zip(around, wrote, around[1:], strict=False):
        whole = part["text"]
        trims = (whole, whole.strip(), whole.lstrip(), whole.rstrip())
        form = next((form for form in trims if text.startswith(before + form + behind, at)), None)
        if form is None:
            break
        spans += _typed(part, form, at + len(before))
        at += len(before) + len(form)
    else:
        if text[at:] == around[-1]:
            return Rendered(text, tuple(spans))
    text, spans = around[0], []
    for part, behind in zip(wrote, around[1:], strict=True):
        spans += _typed(part, part["text"], len(text))
        text += part["text"] + behind
    return Rendered(text, tuple(spans))


def _typed(part: Message, form: str, at: int) -> list[Span]:
    """What people wrote of a text that stands at ``at``, trimmed to ``form``: all but the marks of its pictures."""
    cut = part["text"].index(form)
    typed = part.get("typed", [(0, len(part["text"]))])
    kept = ((max(start - cut, 0), min(end - cut, len(form))) for start, end in typed)
    return [(at + start, at + end) for start, end in kept if start < end]


def _overlap(span: Span, others: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


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
