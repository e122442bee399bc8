"""serve-vlm: an OpenAI-compatible server of a bundle, and a page to try it with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlmtrim.graphs.bundle import BundleError
from vlmtrim.runtime.cluster import check_installed, prepare_environment
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.serve.arguments import Parser, make_client, read_settings, start_logging
from vlmtrim.runtime.terminal import harmless

NEEDED = ("starlette", "uvicorn", "prometheus_client")  # of the extra


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 stopped by a signal, 2 bad input."""
    args = Parser().parse_args(argv)
    try:
        return _run(args)
    except (BundleError, RuntimeRefusal) as error:
        print(f"serve-vlm: {harmless(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    read_settings(args)
    if args.ray:
        check_installed("serve-vlm --ray", (*NEEDED, "ray"), "serve,ray")
        prepare_environment()
        from vlmtrim.runtime.serve.ray import serve_with_ray

        serve_with_ray(args)
        return 0
    check_installed("serve-vlm", NEEDED, "serve")
    from vlmtrim.runtime.serve.server import listen, serve

    start_logging(args)
    client = make_client(args)
    serve(client, listen(args.host, args.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
