"""Messages -> token ids, with the checkpoint's own chat template and tokenizer; ids -> text, token by token."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vlmtrim.runtime.errors import RuntimeRefusal

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


class Prompter:
    """Tokenizer and chat template of a bundle."""

    def __init__(self, folder: Path, image_token_id: int, video_token_id: int | None = None):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        token = self.tokenizer.id_to_token(image_token_id)
        if token is None:
            raise RuntimeRefusal(f"{folder / 'tokenizer.json'} has no token {image_token_id}, the image token")
        self.image_token: str = token
        self._image_token_id = image_token_id
        self._video_token_id = video_token_id
        settings = folder / "tokenizer_config.json"
        self._settings: dict[str, Any] = json.loads(settings.read_text()) if settings.is_file() else {}
        self._template = _compile(_template_text(folder, self._settings))

    def special(self, name: str) -> str:
        """Text of a special token, e.g. ``bos_token``; empty where there is none."""
        value = self._settings.get(name) or ""
        return value.get("content", "") if isinstance(value, dict) else value

    def render(self, messages: list[Message], now: datetime | None = None) -> str:
        """Text of a conversation that the assistant is about to answer; ``now`` is for templates that write a date."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                image_token=self.image_token,
                bos_token=self.special("bos_token"),
                eos_token=self.special("eos_token"),
                strftime_now=(now or datetime.now()).strftime,
            )
        except RuntimeRefusal:
            raise
        except Exception as error:  # a template is a program; whatever it raises, the bundle's template is at fault
            raise RuntimeRefusal(f"the bundle's chat template fails: {type(error).__name__}: {error}") from error

    def encode(self, text: str, opening: bool) -> list[int]:
        """Token ids; ``opening`` adds the start token that the tokenizer prescribes, unless the text has it already.

        The mark of a video becomes that of an image: features take their places all the same.
        """
        bos = self.special("bos_token")
        add = opening and not (bos and text.startswith(bos))
        ids = self.tokenizer.encode(text, add_special_tokens=add).ids
        return [self._image_token_id if token == self._video_token_id else token for token in ids]

    def decode_stream(self) -> DecodeStream:
        """Incremental decoder: holds bytes back until they form characters."""
        return DecodeStream(skip_special_tokens=True)

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


class Conversation:
    """The turns of one row; knows which part of the rendered text the caches already hold."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        self._messages: list[Message] = []
        self._consumed = ""
        self._before: tuple[list[Message], str] = ([], "")
        self._began = datetime.now()  # another date in a later turn would rewrite the first one

    def ask(self, prompt: str, images: int, videos: Collection[int] = ()) -> list[int]:
        """Token ids that continue the caches with a question; image tokens are not repeated yet.

        Images stand where the template puts them, or where the prompt itself holds the image token; those whose
        numbers are in ``videos`` are videos.
        Raises RuntimeRefusal where prompt and images do not fit.
        """
        marks = prompt.count(self._prompter.image_token)
        if marks not in (0, images):
            raise RuntimeRefusal(
                f"the prompt holds {marks} {self._prompter.image_token} mark(s) for {images} image(s); "
                "write one for each image, or none"
            )
        content: list[Message] = [] if marks else [{"type": "video" if i in videos else "image"} for i in range(images)]
        content.append({"type": "text", "text": prompt})
        if self._messages and self._messages[-1]["role"] == "user":
            self.answer("")  # nobody waited for it
        opening = not self._messages
        messages = [*self._messages, {"role": "user", "content": content}]
        text = self._prompter.render(messages, self._began)
        fresh = text if opening else self._continuation(text)
        self._before = self._messages, self._consumed
        self._messages, self._consumed = messages, text
        return self._prompter.encode(fresh, opening)

    def take_back(self) -> None:
        """Forget the question that was just asked: the caches did not take it."""
        self._messages, self._consumed = self._before

    def answer(self, text: str) -> None:
        """Record what the assistant said."""
        self._messages = [*self._messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]

    def _continuation(self, text: str) -> str:
        """What follows the last answer in the newly rendered conversation."""
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
        return fresh[start + len(said) :]


def _template_text(folder: Path, settings: dict[str, Any]) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text())["chat_template"]
    template = settings.get("chat_template")
    return template if isinstance(template, str) else DEFAULT_TEMPLATE


def _compile(text: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; for us it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise RuntimeRefusal(f"the chat template refuses the conversation: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise RuntimeRefusal(f"the bundle's chat template is not valid Jinja: {error}") from error
