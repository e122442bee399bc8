"""What serve-vlm is told, and what stands for it: settings, and a client of an engine that is not open yet."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import cluster
from vlmtrim.runtime.cli import Version
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.progress import running
from vlmtrim.runtime.select_backend import add_arguments, choose_backend
from vlmtrim.runtime.serve.settings import Limits, Settings, read_key

if TYPE_CHECKING:
    from vlmtrim.runtime.serve.client import EngineClient

RANGES = {"port": (0, 65535), "queue": (0, 100_000), "grace": (0, 3600), "threads": (0, 4096)}
RANGES |= {"max_body_mb": (1, 1024), "max_image_mb": (1, 512), "max_images": (1, 1000)}
RANGES |= {"max_megapixels": (1, 67), "body_seconds": (1, 3600), "slots": (1, 4096), "gpus_per_replica": (0, 64)}


class Parser(argparse.ArgumentParser):
    """Of serve-vlm.

    Args:
        raising: bad arguments raise RuntimeRefusal instead of ending the process.
    """

    def __init__(self, raising: bool = False):
        self._raising = raising
        super().__init__(
            prog="serve-vlm",
            description="Serve a bundle: POST /v1/chat/completions, GET /v1/models, /health, /health/ready, /metrics, "
            "and a page at /. For networks that you trust: see SECURITY.md.",
            epilog="Example: serve-vlm bundles/demo-fastv-k2-r0.5, then open http://127.0.0.1:8000",
        )
        _add_arguments(self)

    def error(self, message: str) -> None:  # type: ignore[override]
        """What argparse says of bad arguments."""
        if self._raising:
            raise RuntimeRefusal(message)
        super().error(message)


def _add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", help="bundle folder made by export-vlm; --max-batch of it is the number of slots")
    p.add_argument("--version", action=Version, help="print the version and exit")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000; 0 for any free one)")
    p.add_argument("--slots", type=int, help="requests that are answered at once (default: --max-batch of the bundle)")
    p.add_argument("--queue", type=int, default=16, help="requests that wait; one more is refused, 429 (default 16)")
    p.add_argument("--api-key-file", metavar="FILE", help="file with a key that every path but /health asks for")
    p.add_argument("--name", help="name of the model (default: the bundle folder's)")
    p.add_argument(
        "--grace", type=float, default=10.0, help="seconds that answers have to end in after SIGTERM (default 10)"
    )
    add_arguments(p)
    limits = p.add_argument_group("limits of a request", "checked before the work starts")
    limits.add_argument("--max-body-mb", type=int, default=32, help="megabytes of its body (default 32)")
    limits.add_argument("--max-image-mb", type=int, default=20, help="megabytes of a picture's file (default 20)")
    limits.add_argument("--max-images", type=int, default=16, help="pictures (default 16)")
    limits.add_argument(
        "--max-megapixels", type=int, default=67, help="million pixels of a picture, and of all together (default 67)"
    )
    limits.add_argument("--body-seconds", type=float, default=30.0, help="to arrive in (default 30)")
    _add_ray(p)
    p.add_argument("--verify", action="store_true", help="hash every byte of the bundle, also of large unchanged files")
    p.add_argument("-q", "--quiet", action="store_true", help="no line for each request")
    p.add_argument("-v", "--verbose", action="store_true", help="which backend runs, and where unforeseen errors arose")


def _add_ray(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group(
        "Ray",
        "several engines behind one address, on this machine or many (extra ray); slots and queue are each replica's, "
        "--threads (default 1 here) also the CPUs that each reserves",
    )
    group.add_argument("--ray", action="store_true", help="serve with Ray Serve, started here without --address")
    cluster.add_arguments(group)


def read_settings(args: argparse.Namespace) -> Settings:
    """Raises RuntimeRefusal where a number is out of range, or an argument makes no sense without another."""
    for name, (low, high) in RANGES.items():
        value = vars(args)[name]
        if value is not None and not low <= value <= high:
            raise RuntimeRefusal(f"--{name.replace('_', '-')} is {value}; give a number from {low} to {high}")
    alone = [f"--{name.replace('_', '-')}" for name in cluster.OF_RAY if vars(args)[name] is not None]
    if alone and not args.ray:
        raise RuntimeRefusal(f"{', '.join(alone)} is of a deployment with Ray; give --ray as well, or leave it out")
    limits = Limits(
        body_bytes=args.max_body_mb << 20,
        image_bytes=args.max_image_mb << 20,
        images=args.max_images,
        pixels=args.max_megapixels * 1_000_000,
        body_seconds=args.body_seconds,
    )
    key = None if args.api_key_file is None else read_key(args.api_key_file)
    name = args.name or Path(args.bundle).resolve().name
    return Settings(name, args.queue, key, args.grace, limits)


def make_client(args: argparse.Namespace) -> EngineClient:
    """A client whose engine opens when it starts. Raises RuntimeRefusal or BundleError."""
    from vlmtrim.runtime.serve.client import EngineClient
    from vlmtrim.runtime.slots import Engine

    settings = read_settings(args)
    with running("checking the bundle") as show:
        bundle = open_bundle(args.bundle, args.verify, show)
    backend = choose_backend(args.backend, bundle, args.threads, verbose=args.verbose, activations=args.activations)

    def open_engine() -> Engine:
        return Engine(bundle, backend, slots=args.slots, queue=settings.queue)

    return EngineClient(settings, bundle, open_engine)


def start_logging(args: argparse.Namespace) -> None:
    """A line for each request on stderr, unless --quiet."""
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("vlmtrim.serve").setLevel(level)
