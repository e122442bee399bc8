"""What a processor is: pictures -> inputs of the vision graph, visual tokens a picture, positions of the tokens."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder, shown
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.video import Video

LONGEST_MARK = 64  # characters of a special token


@dataclass(frozen=True)
class Pictures:
    """What the pictures of one step become, all rows' in order.

    Attributes:
        inputs: of the vision graph, by name: float32 (cast to the contract's dtype later) or int64.
        tokens: visual tokens that each picture brings.
        grids: what a family's positions depend on, per picture; empty where they do not.
        words: what the prompt says of each picture in place of its mark, its image tokens among it; empty where that is
            the mark alone, once for every token.
    """

    inputs: Mapping[str, np.ndarray]
    tokens: tuple[int, ...]
    grids: tuple[tuple[int, ...], ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """A part of a picture as the model sees it; ``tokens`` int64 [rows, columns] says which of a row's visual tokens
    lie on it, and where.
    """

    image: Image.Image
    tokens: np.ndarray


class Processor(ABC):
    """The pictures' way into a bundle of one family; does what the checkpoint's Hugging Face processor does."""

    film_fps = 2.0  # frames a second of a film, where nobody wants others
    # What templates write for a video where the processor has words for it; None where that is a token of the contract.
    video_mark: str | None = None

    def __init__(self, files: Folder, contract: Contract):
        self.contract = contract

    @property
    def takes_videos(self) -> bool:
        """Whether videos may stand among the pictures."""
        return self.video_mark is not None or self.contract.video_token_id is not None

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image]) -> Pictures:
        """RGB pictures of one row's prompt, at least one -> inputs of the vision graph."""

    def of_rows(self, rows: Sequence[Sequence[Image.Image]]) -> Pictures:
        """The same for the pictures of several rows; where a picture's company changes nothing, they are as of one."""
        return self([image for row in rows for image in row])

    @abstractmethod
    def framed(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the model sees, for drawings."""

    def check_tiles(self, pictures: int, tiles: int) -> None:
        """Raise RuntimeRefusal where so many pictures become more tiles than the vision graph takes in a step (T)."""
        most = self.contract.dims["T"][1]
        if tiles > most:
            raise RuntimeRefusal(
                f"{pictures} pictures become {tiles} tiles, the bundle takes {most} in one step; "
                "give fewer pictures at once, or export with a larger --max-seq-len"
            )

    def check_frames(self, images: Sequence[Image.Image | Video]) -> None:
        """The same of the frames of videos alone, where each is a tile: before any is made."""
        self.check_tiles(len(images), sum(len(image.frames) for image in images if isinstance(image, Video)))

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """Which frames the model is shown of a film.

        Args:
            total: frames that it has.
            rate: frames a second that it has.
            fps: frames a second wanted, for families that take as many as the film is long.

        Returns:
            Their numbers, int64 [n], ascending, at least one.

        Raises:
            RuntimeRefusal: the family takes no videos.
        """
        raise RuntimeRefusal(f"bundles of {self.contract.family} take no videos; give the frames as pictures")

    def most_frames(self, tokens: int) -> int:
        """Frames of so many visual tokens that half of a conversation holds and the vision graph takes as tiles."""
        return max(1, min(self.contract.max_seq_len // 2 // tokens, self.contract.dims["T"][1]))

    def shrunk(self, frame: Image.Image, count: int) -> Image.Image:
        """One of ``count`` frames of a video at the size that the model sees: what becomes of it is the same."""
        return self.framed(frame)

    def views(self, images: Sequence[Image.Image]) -> list[View]:
        """What to draw of one row's pictures; by default each one framed, with the tokens of the contract's grid."""
        assert self.contract.image_grid is not None
        rows, columns = self.contract.image_grid
        tokens = np.arange(len(images) * rows * columns).reshape(len(images), rows, columns)
        return [View(self.framed(image), of_one) for image, of_one in zip(images, tokens, strict=True)]

    def positions(
        self, ids: np.ndarray, counts: np.ndarray, start: np.ndarray, pictures: Pictures | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of a step's tokens.

        Args:
            ids: int64 [B, S], padded on the right.
            counts: int64 [B], real tokens of each row.
            start: int64 [B], each row's first free position.
            pictures: of this step.

        Returns:
            position_ids as the contract states them, and each row's first free position after the step.
        """
        return start[:, None] + np.arange(ids.shape[1]), start + counts


def evenly(total: int, count: int) -> np.ndarray:
    """Numbers of ``count`` frames at equal distances of ``total``, int64, from the first on."""
    return np.arange(count) * total // count


def special_tokens(files: Folder, usual: Mapping[str, str]) -> list[str]:
    """The special tokens of some roles, as the tokenizer's settings name them; ``usual`` by role where they do not.

    Raises BundleError.
    """
    raw = files.json("tokenizer_config.json") if "tokenizer_config.json" in files else {}
    extra = raw.get("extra_special_tokens")
    named = [{} if not isinstance(extra, dict) else extra, raw]
    found = []
    for role, token in usual.items():
        value = next((settings[role] for settings in named if settings.get(role)), token)
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_MARK:
            raise BundleError(
                f"{files.path / 'tokenizer_config.json'}: {role} is {shown(value)}; expected a token of at most "
                f"{LONGEST_MARK} characters"
            )
        found.append(value)
    return found


def load_processor(files: Folder, contract: Contract) -> Processor:
    """The processor of a bundle's family.

    Raises RuntimeRefusal where this vlmtrim has none, BundleError where the bundle's image-processor settings are none,
    or are not those of its vision graph.
    """
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
    if contract.family not in names:
        raise RuntimeRefusal(f"the bundle is of family {contract.family!r}; this vlmtrim runs {', '.join(names)}")
    return importlib.import_module(f"{__package__}.{contract.family}").Processor(files, contract)
