"""serve-vlm: an OpenAI-compatible server of a bundle, and a page to try it with."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmtrim.graphs.bundle import BundleError, open_bundle
from vlmtrim.runtime.cli import Version
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.progress import running
from vlmtrim.runtime.select_backend import add_arguments, choose_backend
from vlmtrim.runtime.serve.settings import Limits, Settings, read_key
from vlmtrim.runtime.terminal import harmless

NEEDED = ("starlette", "uvicorn", "prometheus_client")  # of the extra


def parser() -> argparse.ArgumentParser:
    """Arguments of serve-vlm."""
    p = argparse.ArgumentParser(
        prog="serve-vlm",
        description="Serve a bundle: POST /v1/chat/completions, GET /v1/models, /health, /health/ready, /metrics, and "
        "a page at /. For networks that you trust: see SECURITY.md.",
        epilog="Example: serve-vlm bundles/demo-fastv-k2-r0.5, then open http://127.0.0.1:8000",
    )
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
    p.add_argument("--verify", action="store_true", help="hash every byte of the bundle, also of large unchanged files")
    p.add_argument("-q", "--quiet", action="store_true", help="no line for each request")
    p.add_argument("-v", "--verbose", action="store_true", help="which backend runs, and where unforeseen errors arose")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 stopped by a signal, 2 bad input."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except (BundleError, RuntimeRefusal) as error:
        print(f"serve-vlm: {harmless(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeRefusal(f"serve-vlm needs {', '.join(missing)}; install them with: pip install 'vlmtrim[serve]'")
    from vlmtrim.runtime.serve.client import EngineClient
    from vlmtrim.runtime.serve.server import listen, serve
    from vlmtrim.runtime.slots import Engine

    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("vlmtrim.serve").setLevel(level)
    with running("checking the bundle") as show:
        bundle = open_bundle(args.bundle, args.verify, show)
    backend = choose_backend(args.backend, bundle, args.threads, verbose=args.verbose, activations=args.activations)
    opened = listen(args.host, args.port)

    def open_engine() -> Engine:
        return Engine(bundle, backend, slots=args.slots, queue=settings.queue)

    serve(EngineClient(settings, bundle, open_engine), opened)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    """Raises RuntimeRefusal where a number is out of range."""
    ranges = {"port": (0, 65535), "queue": (0, 100_000), "grace": (0, 3600), "threads": (0, 4096)}
    ranges |= {"max_body_mb": (1, 1024), "max_image_mb": (1, 512), "max_images": (1, 1000)}
    ranges |= {"max_megapixels": (1, 67), "body_seconds": (1, 3600), "slots": (1, 4096)}
    for name, (low, high) in ranges.items():
        value = vars(args)[name]
        if value is not None and not low <= value <= high:
            raise RuntimeRefusal(f"--{name.replace('_', '-')} is {value}; give a number from {low} to {high}")
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


if __name__ == "__main__":
    sys.exit(main())
