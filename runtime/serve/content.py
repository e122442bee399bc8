"""Messages of a request -> messages of the engine, with the pictures decoded; runs off the event loop."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image as Pillow

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Image, Prompt
from vlmtrim.runtime.image import data_picture, load_image
from vlmtrim.runtime.serve.errors import ApiError
from vlmtrim.runtime.serve.schema import PictureUrl, Turn, refuse
from vlmtrim.runtime.serve.settings import Limits
from vlmtrim.runtime.slots import Message

NOT_FETCHED = "is no data: URL; nothing is fetched from a network or a disk: send data:image/png;base64,..."


def messages(turns: Sequence[Turn], limits: Limits) -> tuple[list[Message], list[Pillow.Image]]:
    """The engine's messages, and their pictures as RGB, in order.

    Pictures that stand behind all words of a message go before them, as models learnt it and chat templates write it;
    those between words stay there. Raises ApiError that names the part at fault.
    """
    urls = [part for turn in turns for part in turn.parts if isinstance(part, PictureUrl)]
    if len(urls) > limits.images:
        raise refuse("messages", f"holds {len(urls)} pictures, at most {limits.images} are taken; send fewer")
    for url in urls:
        if url.url[:5].lower() != "data:":
            raise refuse(url.param, NOT_FETCHED, "remote_url_refused")
    taken, pictures = [], []
    left = limits.pixels
    for turn in turns:
        parts: list[str | Image] = []
        for part in _pictures_first(turn.parts):
            if isinstance(part, PictureUrl):
                picture = _decoded(part, limits)
                left -= picture.width * picture.height
                if left < 0:
                    raise refuse("messages", f"holds pictures of more than {limits.pixels} pixels together; send fewer")
                pictures.append(picture)
                parts.append(Image(picture))
            else:
                parts.append(part)
        if any(isinstance(part, Image) for part in parts):
            taken.append(Message(turn.role, Prompt(*parts)))
        else:
            taken.append(Message(turn.role, "\n".join(str(part) for part in parts)))
    return taken, pictures


def _pictures_first(parts: Sequence[str | PictureUrl]) -> Sequence[str | PictureUrl]:
    words = [part for part in parts if isinstance(part, str)]
    behind = parts[len(words) :]
    return [*behind, *words] if list(parts[: len(words)]) == words else parts


def _decoded(part: PictureUrl, limits: Limits) -> Pillow.Image:
    try:
        return load_image(data_picture(part.url, limits.image_bytes), limits.pixels)
    except RuntimeRefusal as refusal:
        raise ApiError(400, f"{part.param}: {refusal}", part.param, "invalid_image") from refusal
