"""A conversation made ready for the engine: token ids, pictures, and how the answer is to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.fitting import check_pictures, check_room, visual_tokens
from vlmtrim.runtime.generate import Picture, Prompt, process
from vlmtrim.runtime.processors.base import Pictures, Processor
from vlmtrim.runtime.prompt import Prompter
from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.stopping import Stopper

ROLES = ("system", "user", "assistant")
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ROLES.
        content: a text; of the user also a :class:`vlmtrim.runtime.Prompt`, with pictures in their places.
    """

    role: str
    content: str | Prompt


@dataclass(frozen=True)
class Request:
    """What the engine needs to answer a conversation.

    Attributes:
        ids: its tokens, image tokens repeated.
        pictures: of all its turns, as the bundle's processor makes them; None for none.
        max_new_tokens: at most so many tokens; None for what the caches have room for.
        sampling: how tokens are drawn.
        stop: texts that end the answer.
        top_logprobs: how many of the likeliest tokens to tell with each, 0 to MOST_LOGPROBS; None: none, and no
            log-probabilities.
        visual: visual tokens, or image features, that the pictures bring.
    """

    ids: tuple[int, ...]
    pictures: Pictures | None
    max_new_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    top_logprobs: int | None
    visual: int


class Preparer:
    """Makes requests, on any thread and several at once."""

    def __init__(self, contract: Contract, prompter: Prompter, processor: Processor):
        self._contract, self._prompter, self._processor = contract, prompter, processor

    def __call__(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None,
        sampling: Sampling | None,
        stop: str | Sequence[str],
        top_logprobs: int | None,
    ) -> Request:
        """Raises RuntimeRefusal where the conversation is none or does not fit, or a setting is out of its limits."""
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RuntimeRefusal(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        if top_logprobs is not None and not 0 <= top_logprobs <= MOST_LOGPROBS:
            raise RuntimeRefusal(f"top_logprobs is {top_logprobs}; give 0 to {MOST_LOGPROBS}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        Stopper(stops)
        conversation = [self._turn(message) for message in messages]
        _check_turns(messages)
        shown: list[Picture] = []
        for message in messages:
            shown += message.content.pictures if isinstance(message.content, Prompt) else []
        pictures = process(self._processor, shown)
        brought = () if pictures is None else pictures.tokens
        check_pictures(self._contract, [brought])
        words = () if pictures is None else pictures.words
        ids = self._prompter.encode(self._prompter.render(conversation, datetime.now()), True, words)
        ids, visual = self._prompter.expand_images(ids, brought, words), visual_tokens(self._contract, pictures)
        check_room(self._contract, [np.zeros(1, dtype=np.int64)] * len(self._contract.groups), len(ids), visual)
        return Request(tuple(ids), pictures, max_new_tokens, sampling or Sampling(), stops, top_logprobs, visual)

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as chat templates take it."""
        role, content = message.role, message.content
        if role not in ROLES:
            raise RuntimeRefusal(f"a message's role is {role!r}; give one of {', '.join(ROLES)}")
        if isinstance(content, Prompt) and role == "user":
            return {"role": role, "content": self._prompter.placed(content.content())}
        if not isinstance(content, str):
            allowed = "a text or a Prompt" if role == "user" else "a text"
            raise RuntimeRefusal(f"content of role {role} is of type {type(content).__name__}; give {allowed}")
        return {"role": role, "content": [{"type": "text", "text": content}]}


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise RuntimeRefusal unless a user asks something at the end."""
    last = messages[-1] if messages else None
    if last is None or last.role != "user":
        ends = "has no messages" if last is None else f"ends with role {last.role}"
        raise RuntimeRefusal(f"the conversation {ends}; the last message must be the user's")
    parts = last.content.parts if isinstance(last.content, Prompt) else (last.content,)
    if not any(not isinstance(part, str) or part.strip() for part in parts):
        raise RuntimeRefusal("the prompt is empty; ask something, or give a picture")
