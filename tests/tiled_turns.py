"""Pictures and prompts of the families whose pictures become tiles of any number."""

from PIL import Image

from vlmtrim.export.check_cli import generated_picture
from vlmtrim.runtime.session import Session


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return generated_picture(seed).resize(size, Image.Resampling.BICUBIC)


def prompt(session: Session, text: list[int], *images: Image.Image) -> list[int]:
    """Two tokens of text, then a picture and a token, and so on, then the other tokens."""
    ids, rest = [256, *text[:2]], text[2:]
    for tokens in session.processor(images).tokens:
        ids += [session.contract.image_token_id] * tokens + [rest.pop()]
    return ids + rest
