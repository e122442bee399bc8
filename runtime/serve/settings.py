"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlmtrim.runtime.errors import RuntimeRefusal

LEAST_KEY = 8  # characters of an API key


@dataclass(frozen=True)
class Limits:
    """What one request may cost, checked before the work starts.

    Attributes:
        body_bytes: of the whole request.
        image_bytes: of one picture, before base64.
        images: in all messages together.
        pixels: of one picture, by its header, and of all together.
        messages: of a conversation.
        body_seconds: that a request may take to arrive.
    """

    body_bytes: int = 32 << 20
    image_bytes: int = 20 << 20
    images: int = 16
    pixels: int = 67_000_000
    messages: int = 1000
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        name: of the model, as clients say it.
        queue: requests that wait while every slot is taken; one more is refused (429).
        key: that every path but /health asks for; None for none.
        grace: seconds that answers have to end in when the server is told to stop.
    """

    name: str
    queue: int = 16
    key: str | None = None
    grace: float = 10.0
    limits: Limits = field(default_factory=Limits)


def read_key(path: str) -> str:
    """The API key in a file, one line. Raises RuntimeRefusal."""
    try:
        key = Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise RuntimeRefusal(f"--api-key-file: {path} cannot be read as a line of ASCII text") from error
    if len(key) < LEAST_KEY or not key.isprintable() or " " in key:
        raise RuntimeRefusal(
            f"--api-key-file: {path} holds no key; write one line of {LEAST_KEY} or more printable characters without "
            "spaces, for example from: openssl rand -hex 24"
        )
    return key
