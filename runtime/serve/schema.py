"""The body of POST /v1/chat/completions -> :class:`Ask`, or an ApiError that names the field.

A field is supported, harmless (accepted and without effect), accepted at a value that asks for nothing, or refused by
name: nobody is answered as if a wish had been granted. ``null`` is a field that was not given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.serve.errors import ApiError

# Accepted and without effect: what they ask for is bookkeeping of a hosted service.
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
# Accepted at a value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
SUPPORTED = (
    "model",
    "messages",
    "max_completion_tokens",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "vlmtrim",
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LARGEST = 2**31 - 1
LARGEST_SEED = 2**63 - 1
MOST_STOPS, LONGEST_STOP = 4, 1000
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class PictureUrl:
    """A picture of a message, as it was sent; ``param`` is its place in the request."""

    url: str
    param: str


@dataclass(frozen=True)
class Turn:
    """One message: its texts and pictures in order."""

    role: str
    parts: tuple[str | PictureUrl, ...]
    param: str


@dataclass(frozen=True)
class Ask:
    """A request whose every field is of its type and in its range."""

    model: str | None
    turns: tuple[Turn, ...]
    max_new_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    show_kept: bool


def read(body: bytes, most_messages: int) -> Ask:
    """The request that a body states. Raises ApiError."""
    data = _json(body)
    _check_names(data)
    fields = _Fields(data)
    top = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top is not None and not fields.boolean("logprobs"):
        raise refuse("top_logprobs", "is given without logprobs; set logprobs to true as well")
    stream = fields.boolean("stream")
    options = fields.inner("stream_options", ("include_usage", "include_obfuscation"))
    if options.given and not stream:
        raise refuse("stream_options", "is of streamed answers; set stream to true, or leave it out")
    own = fields.inner("vlmtrim", ("show_kept",))
    limit = fields.integer("max_completion_tokens", 1, LARGEST)
    old_limit = fields.integer("max_tokens", 1, LARGEST)
    return Ask(
        model=fields.text("model"),
        turns=_turns(data.get("messages"), most_messages),
        max_new_tokens=old_limit if limit is None else limit,
        sampling=Sampling(
            temperature=fields.number("temperature", 0.0, 2.0, 0.0),
            top_k=fields.integer("top_k", 0, LARGEST) or 0,
            top_p=fields.number("top_p", 0.0, 1.0, 1.0, above=True),
            seed=fields.integer("seed", 0, LARGEST_SEED),
        ),
        stop=_stops(data.get("stop")),
        top_logprobs=(top or 0) if fields.boolean("logprobs") else None,
        stream=stream,
        include_usage=options.boolean("include_usage"),
        show_kept=own.boolean("show_kept"),
    )


def refuse(param: str, what: str, code: str = "invalid_value") -> ApiError:
    """An error about a field; the sentence begins with its name."""
    return ApiError(400, f"{param} {what}", param, code)


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no UTF-8, and endless integers
        raise ApiError(400, "the body is no JSON; send one JSON object in UTF-8", None, "invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is {kind(data)}; send one JSON object", None, "invalid_json")
    return data


def _no_number(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _check_names(data: dict[str, Any]) -> None:
    """Refuse what this server does not do, by name."""
    for name, value in data.items():
        if value is None or name in SUPPORTED or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            said = name if len(name) <= 60 and name.isprintable() and name.isascii() else "of that name"
            raise ApiError(
                400, f"there is no field {said} here; supported: {', '.join(SUPPORTED)}", said, "unknown_parameter"
            )
        if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name]) or "null"
            raise refuse(name, f"is not supported; leave it out, or give {allowed}", "unsupported_parameter")


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and true is no 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def kind(value: Any) -> str:
    """What a JSON value is, for a sentence; never the value itself."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class _Fields:
    """Typed access to an object of the request."""

    def __init__(self, data: dict[str, Any], where: str = "", given: bool = True):
        self._data, self._where, self.given = data, where, given

    def inner(self, name: str, known: Sequence[str]) -> _Fields:
        """An object inside, which holds known fields only."""
        value = self._data.get(name)
        if value is None:
            return _Fields({}, f"{name}.", given=False)
        if not isinstance(value, dict):
            raise refuse(name, f"is {kind(value)}; give an object with {', '.join(known)}")
        if value.keys() - set(known):
            raise refuse(name, f"holds an unknown field; supported: {', '.join(known)}", "unknown_parameter")
        return _Fields(value, f"{name}.")

    def boolean(self, name: str) -> bool:
        """False where it is not given."""
        value = self._data.get(name)
        if value is not None and not isinstance(value, bool):
            raise refuse(self._where + name, f"is {kind(value)}; give true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """None where it is not given."""
        value = self._data.get(name)
        if value is not None and not isinstance(value, str):
            raise refuse(self._where + name, f"is {kind(value)}; give a string")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """From ``low`` to ``high``; None where it is not given."""
        value = self._data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refuse(self._where + name, f"is {_number(value)}; give an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float, above: bool = False) -> float:
        """From ``low`` to ``high``; ``above`` leaves ``low`` itself out."""
        value = self._data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refuse(self._where + name, f"is {_number(value)}; give a number from {low:g} to {high:g}")
        if above and value <= low:
            raise refuse(self._where + name, f"is {_number(value)}; give a number above {low:g}, at most {high:g}")
        return float(value)


def _number(value: Any) -> str:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return str(value) if plain else kind(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        what = kind(stops) if not isinstance(stops, list) else f"a list of {len(stops)}"
        raise refuse("stop", f"is {what}; give a text, or a list of at most {MOST_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise refuse("stop", f"holds something else than texts of 1 to {LONGEST_STOP} characters")
    return tuple(stops)


def _turns(messages: Any, most: int) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else "missing" if messages is None else kind(messages)
        raise refuse("messages", f"is {what}; give a list of messages, the last one of the user")
    if len(messages) > most:
        raise refuse("messages", f"holds {len(messages)} messages, at most {most} are taken; start anew")
    turns = tuple(_turn(message, f"messages[{index}]") for index, message in enumerate(messages))
    for index, turn in enumerate(turns):
        if turn.role == "system" and index:
            raise refuse(f"{turn.param}.role", "is system, which stands first or nowhere; put it first")
        before = turns[index - 1].role if index else "assistant"
        if turn.role == "assistant" and before != "user":
            raise refuse(f"{turn.param}.role", "is assistant where the user has not asked; give the question before it")
    if turns[-1].role != "user":
        raise refuse("messages", "ends with a message that is not the user's; end it with a question")
    return turns


def _turn(message: Any, param: str) -> Turn:
    if not isinstance(message, dict):
        raise refuse(param, f"is {kind(message)}; give an object with role and content")
    for name, value in message.items():
        if name not in ("role", "content", "name", "refusal") and value not in (None, []):
            raise refuse(param, "holds a field that is not supported; give role and content", "unsupported_parameter")
    given = message.get("role")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise refuse(f"{param}.role", f"is not supported; supported: {', '.join(ROLES)}")
    content, where = message.get("content"), f"{param}.content"
    if isinstance(content, str):
        return Turn(role, (content,), where)
    if not isinstance(content, list) or not content:
        what = "an empty list" if content == [] else kind(content)
        raise refuse(where, f"is {what}; give a text, or a list of parts of type text and image_url")
    return Turn(role, tuple(_part(part, role, f"{where}[{index}]") for index, part in enumerate(content)), where)


def _part(part: Any, role: str, param: str) -> str | PictureUrl:
    if not isinstance(part, dict):
        raise refuse(param, f"is {kind(part)}; give an object of type text or image_url")
    if part.get("type") == "text":
        if not isinstance(part.get("text"), str):
            raise refuse(f"{param}.text", f"is {kind(part.get('text'))}; give a string")
        return part["text"]
    if part.get("type") != "image_url":
        raise refuse(f"{param}.type", "is not supported; supported: text, image_url")
    if role != "user":
        raise refuse(param, f"is a picture in a message of the {role}; only the user's have pictures")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise refuse(f"{param}.image_url", 'is no picture; give {"url": "data:image/png;base64,..."}')
    return PictureUrl(url, f"{param}.image_url.url")
