"""Tokens of an answer -> OpenAI's objects: ``chat.completion``, its chunks, log-probabilities, usage."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlmtrim.runtime.slots import Answer, Request, Token

# Why an answer ended, in OpenAI's words.
FINISHED = {"eos": "stop", "stop": "stop", "length": "length", "capacity": "length"}
DONE = b"data: [DONE]\n\n"

TokenText = Callable[[int], str]


@dataclass(frozen=True)
class Head:
    """What every object of one answer begins with."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str) -> dict[str, Any]:
        """The fields that OpenAI's clients want in every object."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def encoded(value: Any) -> bytes:
    """JSON in ASCII: a lone surrogate in a text is no reason to fail."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


def chunk(head: Head, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    """One piece of a streamed answer; ``finish`` with the last one only."""
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return head.of("chat.completion.chunk") | {"choices": [choice]}


def completion(head: Head, text: str, finish: str, logprobs: Any, usage: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
    return head.of("chat.completion") | {"choices": [choice], "usage": usage}


def usage(request: Request, answer: Answer, tokens: int) -> dict[str, Any]:
    """Counts as OpenAI names them, and under ``vlmtrim`` what became of the visual tokens, and seconds."""
    prefill, times = answer.prefill, answer.times
    assert prefill is not None
    return {
        "prompt_tokens": len(request.ids),
        "completion_tokens": tokens,
        "total_tokens": len(request.ids) + tokens,
        "vlmtrim": {
            "visual_tokens": prefill.visual,
            "kept": prefill.kept,
            "removed": prefill.visual - prefill.kept,
            "queued_s": round(times.queued, 6),
            "prefill_s": round(times.prefill, 6),
            "decode_s": round(times.decode, 6),
        },
    }


def logprobs(tokens: list[Token], text: TokenText) -> dict[str, Any] | None:
    """Of tokens that belong to the answer's text; None where none were asked for.

    A token's text is what it is alone; bytes that form no character by themselves are U+FFFD there.
    """
    if not tokens or tokens[0].logprob is None:
        return None
    return {"content": [_entry(token, text) for token in tokens if token.ended != "eos"], "refusal": None}


def _entry(token: Token, text: TokenText) -> dict[str, Any]:
    top = [_piece(text(number), logprob) for number, logprob in token.top]
    assert token.logprob is not None
    return _piece(text(token.token_id), token.logprob) | {"top_logprobs": top}


def _piece(text: str, logprob: float) -> dict[str, Any]:
    # OpenAI writes -9999 for a token that cannot be drawn; JSON has no infinity.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
