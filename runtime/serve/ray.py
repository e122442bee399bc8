"""Many machines: the same application in replicas of a Ray Serve deployment, an engine of its own in each.

``serve-vlm BUNDLE --ray`` starts one here or joins a cluster. Where a cluster deploys by itself, :func:`app` builds it:
``serve run vlmtrim.runtime.serve.ray:app bundle=/shared/bundle replicas=1:4``. Needs the extra ``ray``; nothing else
imports this module.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import threading
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import cluster
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.serve.app import make_app
from vlmtrim.runtime.serve.arguments import Parser, make_client, read_settings, start_logging
from vlmtrim.runtime.serve.client import FAILED
from vlmtrim.runtime.serve.errors import RETRY_AFTER
from vlmtrim.runtime.serve.http import App, Receive, Scope, Send
from vlmtrim.runtime.serve.server import listen

SPARE = 8  # requests a replica takes beyond slots and queue: health checks, and those that it refuses in OpenAI's words
QUEUED = 64  # that wait at a proxy for a replica with a place; one more is refused there, in Ray's words
REFUSED = re.compile(r"(?:RuntimeRefusal|BundleError): (.+)")  # in what Ray tells of a replica's constructor
SAID_BY = b"x-vlmtrim-replica"  # header of an answer


class Replica:
    """An engine and the application around it, in a process of its own.

    Args:
        args: of serve-vlm; the bundle, and a key's file, are read on the replica's machine.
    """

    async def __init__(self, args: argparse.Namespace):
        start_logging(args)
        self._client = make_client(args)
        await self._client.start()

    def __serve_build_asgi_app__(self) -> App:
        """For Ray, behind the constructor."""
        return signed(make_app(self._client), serve.get_replica_context().replica_tag)

    def check_health(self) -> None:
        """Ray asks now and then, and starts another replica in the place of one that raises."""
        state = self._client.state()
        if self._client.status == FAILED or state is None or state.closed:
            raise RuntimeError("the engine has stopped")

    async def __del__(self) -> None:
        """Behind its last answer."""
        await self._client.close()


def signed(inner: App, name: str) -> App:
    """An application whose answers say in a header which replica gave them."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (SAID_BY, name.encode())]}
            await send(message)

        await inner(scope, receive, sending)

    return outer


def app(arguments: Mapping[str, str]) -> serve.Application:
    """For ``serve run`` and configuration files of Ray Serve: serve-vlm's arguments by their names, ``_`` for ``-``.

    What listens is Ray's: ``host``, ``port`` and ``address`` have no effect. Raises RuntimeRefusal or BundleError.
    """
    given = dict(arguments)
    argv = [str(given.pop("bundle", "")), "--ray"]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if str(value).lower() == "true" else [f"{flag}={value}"]
    if not argv[0]:
        raise RuntimeRefusal("no bundle is given; add bundle=FOLDER, which every machine of the cluster can read")
    return application(Parser(raising=True).parse_args(argv))


def application(args: argparse.Namespace) -> serve.Application:
    """What Ray Serve runs. Raises RuntimeRefusal or BundleError for what no replica could run."""
    settings = read_settings(args)
    low, high = cluster.replicas(args.replicas)
    contract = open_bundle(args.bundle, args.verify).contract
    slots = args.slots or contract.dims["B"][1]
    own = {"bundle": str(Path(args.bundle).resolve()), "name": settings.name, "threads": cluster.threads(args)}
    told = argparse.Namespace(**vars(args) | own)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="replica",
        ray_actor_options={"num_cpus": told.threads, "num_gpus": cluster.gpus(args)},
        max_ongoing_requests=slots + settings.queue + SPARE,
        max_queued_requests=QUEUED,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER),
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.grace + 5,
        health_check_period_s=2,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    if low == high:
        return deployment.options(num_replicas=low).bind(told)
    bounds = AutoscalingConfig(min_replicas=low, max_replicas=high, target_ongoing_requests=slots)
    return deployment.options(autoscaling_config=bounds).bind(told)


def serve_with_ray(args: argparse.Namespace) -> None:
    """Answer until SIGINT or SIGTERM. Raises RuntimeRefusal or BundleError."""
    low, high = cluster.replicas(args.replicas)
    name = read_settings(args).name
    logging.getLogger("ray.serve").setLevel("INFO" if args.verbose else "WARNING")
    open_bundle(args.bundle, args.verify)  # before Ray starts, which takes seconds
    port = args.port
    if args.address is None:
        with listen(args.host, port) as tried:
            port = tried.getsockname()[1]
    cluster.join(args, shown=not args.quiet)
    try:
        stop = threading.Event()
        cluster.on_signals(lambda _: stop.set())
        target = application(args)
        everywhere = "HeadOnly" if args.address is None else "EveryNode"
        address, log = {"host": args.host, "port": port}, {"log_level": "INFO" if args.verbose else "WARNING"}
        serve.start(proxy_location=everywhere, http_options=address, logging_config=log)
        run(target, name)
        _say_ready(args, name, port, low, high)
        stop.wait()
        print("serve-vlm: shutting down", file=sys.stderr, flush=True)
        serve.delete(name)  # replicas end their answers first, and the proxy lives on until they have
    finally:
        ray.shutdown()  # one that was started here ends with it


def run(target: serve.Application, name: str) -> None:
    """Deploy and wait until every replica is ready. Raises RuntimeRefusal with what a replica refused."""
    try:
        serve.run(target, name=name, route_prefix="/")
    except RuntimeError as error:
        deployed = serve.status().applications[name].deployments.values()
        said = REFUSED.findall("\n".join(deployment.message for deployment in deployed))
        serve.delete(name)
        raise RuntimeRefusal(said[-1] if said else f"Ray Serve could not start the replicas: {error}") from error


def _say_ready(args: argparse.Namespace, name: str, port: int, low: int, high: int) -> None:
    number = f"{low}" if low == high else f"{low} to {high}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{host}:{port}" if args.address is None else f"Ray Serve's port of the cluster at {args.address}"
    print(f"serve-vlm: {name} is ready on {where} ({number} replica{'s' * (high > 1)})", file=sys.stderr, flush=True)
