"""Ray, where serve-vlm and batch-vlm use it: joined or started here, and what a replica reserves. Extra ``ray``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import socket
from collections.abc import Callable, Sequence

from vlmtrim.runtime.errors import RuntimeRefusal

OBJECTS = 256 << 20  # bytes of shared memory of a Ray that is started here
SECONDS = 5.0  # for a cluster to answer in
NO_CLUSTER = (
    "--address: there is no Ray cluster at {}, or it asks for a token; give its host:port, or auto for this machine's, "
    "and for the token RAY_AUTH_MODE=token"
)
OF_RAY = ("replicas", "gpus_per_replica", "address")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """``--replicas``, ``--gpus-per-replica`` and ``--address``."""
    parser.add_argument(
        "--replicas",
        metavar="N|MIN:MAX",
        help="engines, or bounds between which their number follows the work (default 1)",
    )
    parser.add_argument(
        "--gpus-per-replica",
        type=float,
        metavar="G",
        help="that each reserves, .5 for two on one (default: 1 where Ray has GPUs and --backend is not ort-cpu)",
    )
    parser.add_argument("--address", help="of a Ray cluster to join: host:port, or auto for the one of this machine")


def check_installed(command: str, names: Sequence[str], extras: str) -> None:
    """Raise RuntimeRefusal where a module of an extra is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeRefusal(
            f"{command} needs {', '.join(missing)}; install them with: pip install 'vlmtrim[{extras}]'"
        )


def replicas(text: str | None) -> tuple[int, int]:
    """``N`` or ``MIN:MAX`` as bounds. Raises RuntimeRefusal."""
    found = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", "1" if text is None else text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise RuntimeRefusal(f"--replicas is {text}; give a number from 1 on, or two of them as in 1:4")
    return low, high


def threads(args: argparse.Namespace) -> int:
    """CPU threads of a replica, and CPUs that it reserves: one per core would have replicas fight for them."""
    return args.threads or 1


def gpus(args: argparse.Namespace) -> float:
    """GPUs that a replica reserves."""
    import ray

    if args.gpus_per_replica is not None:
        return args.gpus_per_replica
    return float(args.backend != "ort-cpu" and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)


def join(args: argparse.Namespace, shown: bool) -> None:
    """Start Ray here, with room for all replicas, or join a cluster; ``shown`` brings what they write to stderr.

    Raises RuntimeRefusal."""
    prepare_environment()
    import ray

    _, most = replicas(args.replicas)
    level = {"logging_level": "WARNING", "log_to_driver": shown}
    if args.address is not None:
        _check_address(args.address)
        try:
            ray.init(address=args.address, **level)
        except ConnectionError as error:
            raise RuntimeRefusal(NO_CLUSTER.format(args.address)) from error
        except (RuntimeError, ValueError) as error:  # of another version of Ray or Python, for example
            raise RuntimeRefusal(f"--address: the Ray cluster at {args.address} cannot be joined ({error})") from error
        return
    # Ray's CPUs are places, not cores: replicas that share cores are slow, those without a place never start.
    places = max(os.cpu_count() or 1, most * threads(args))
    ray.init(address="local", num_cpus=places, object_store_memory=OBJECTS, include_dashboard=False, **level)
    wanted, there = gpus(args) * most, ray.cluster_resources().get("GPU", 0)
    if wanted > there:
        ray.shutdown()
        raise RuntimeRefusal(
            f"--replicas {most} of {wanted / most:g} GPUs each need {wanted:g}, here are {there:g}; give fewer, or a "
            "smaller --gpus-per-replica"
        )


def prepare_environment() -> None:
    """Before Ray is imported: it tells its makers what it is used for, and shows one of log lines that look
    alike, unless the environment says otherwise."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def _check_address(address: str) -> None:
    """Ray itself waits for minutes where nobody answers."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise RuntimeRefusal(NO_CLUSTER.format(address)) from error


def on_signals(hear: Callable[[int], None]) -> None:
    """The first SIGINT or SIGTERM is heard, the second ends at once. To be called behind :func:`join`: Ray takes the
    signals for itself when it starts."""
    heard: list[int] = []

    def handle(number: int, _: object) -> None:
        if heard:
            os._exit(128 + number)
        heard.append(number)
        hear(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
