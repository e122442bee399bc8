"""A video file as a bundle sees it: frames that its family's rule takes out of it, each as small as the model sees it.

Reads with PyAV, which brings FFmpeg's libraries (extra ``video``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.base import Processor
from vlmtrim.runtime.video import FASTEST, SLOWEST, Video

_PICTURES = (b"\x89PNG", b"\xff\xd8\xff")


def is_film(path: str | Path) -> bool:
    """Whether a path is of a file that is none of the pictures that are taken."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return not stream.read(4).startswith(_PICTURES)


def read_film(path: str | Path, processor: Processor, fps: float | None = None) -> Video:
    """Frames of a video file; no more than these are held, at the size that the model sees.

    Args:
        path: a file that FFmpeg reads.
        processor: of the session that is asked (``chat.session.processor``); its family says which frames are taken.
        fps: frames a second wanted, for families that take as many as the video is long; None for what they take.

    Raises:
        RuntimeRefusal: the file is no video, the family takes none, or PyAV is not installed.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise RuntimeRefusal(
            "reading a video file takes PyAV: pip install 'vlmtrim[video]', or give a folder of frames"
        ) from None
    fps = processor.film_fps if fps is None else fps
    if not SLOWEST <= fps <= FASTEST:
        raise RuntimeRefusal(f"{fps!r} frames a second; give a number from {SLOWEST:g} to {FASTEST:g}")
    try:
        # opened here: FFmpeg takes names for addresses
        with Path(path).open("rb") as stream, av.open(stream) as container:
            if not container.streams.video:
                raise RuntimeRefusal(f"{path} has no moving picture; give a video file, or a folder of frames")
            total, rate = _counted(container)
            chosen = processor.frames(total, rate, fps).tolist()
            frames, size = _taken(container, chosen, processor)
    except (OSError, FFmpegError) as error:
        reason = error.strerror or type(error).__name__
        raise RuntimeRefusal(f"{path} cannot be read as a video ({reason}); give another file") from error
    if not frames:
        raise RuntimeRefusal(f"{path} cannot be read as a video (no frame in it); give another file")
    taken = min(max(len(chosen) / total * rate, SLOWEST), FASTEST)
    times = [number / rate for number in chosen[: len(frames)]]
    return Video(frames, taken, times, duration=total / rate, shrunk_from=size)


def _counted(container: Any) -> tuple[int, float]:
    """Frames of the first moving picture, and frames a second; both at least what one frame has."""
    stream = container.streams.video[0]
    total = stream.frames
    if not total:  # some containers do not say
        total = sum(packet.size > 0 for packet in container.demux(stream))
        container.seek(0)
    return max(total, 1), float(stream.average_rate or stream.guessed_rate or 24)


def _taken(container: Any, chosen: list[int], processor: Processor) -> tuple[list[Image.Image], tuple[int, int] | None]:
    """The frames of these numbers, ascending, and the size that they had."""
    wanted, last = set(chosen), max(chosen)
    frames, size = [], None
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            upright = frame.to_image().rotate(frame.rotation, expand=True)
            size = size or upright.size
            frames.append(processor.shrunk(upright, len(chosen)))
        if number == last:
            break
    return frames, size
