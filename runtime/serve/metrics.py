"""What /metrics tells, under the names that dashboards and load generators know from vLLM, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vlmtrim.runtime.slots import State

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; every series has the label ``model_name``.

    Args:
        model: its name.
        state: of the engine when a scrape asks; None while there is none.
    """

    def __init__(self, model: str, state: Callable[[], State | None]):
        self._registry, self._model, self._state = CollectorRegistry(), model, state
        self._gauge("vllm:num_requests_running", "Requests in a slot.", lambda state: state.live)
        self._gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", lambda state: state.waiting)
        self._gauge("vllm:kv_cache_usage_perc", "Share of the caches in use, 0 to 1.", lambda state: state.cache_usage)
        self._gauge("vlmtrim:slots", "Requests that can be answered at once.", lambda state: state.slots)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts, visual ones among them.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens of answers.")
        self.visual_tokens = self._counter("vlmtrim:visual_tokens", "Visual tokens of prompts.")
        self.removed_tokens = self._counter("vlmtrim:visual_tokens_removed", "Visual tokens removed in the decoder.")
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN
        )
        self.between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "From one token of an answer to the next.", BETWEEN_TOKENS
        )
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From a request to its answer's end.", WHOLE)
        self._ended = Counter(
            "vllm:request_success",
            "Answers by why they ended.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._refused = Counter(
            "vlmtrim:requests_refused",
            "Requests that got an error, by HTTP status; 499 is a client that went away.",
            ("model_name", "status"),
            registry=self._registry,
        )

    def ended(self, reason: str) -> None:
        """An answer ended."""
        self._ended.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """A request got an error in place of an answer."""
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, what: str, value: Callable[[State], float]) -> None:
        def now() -> float:
            state = self._state()
            return 0.0 if state is None else float(value(state))

        Gauge(name, what, ("model_name",), registry=self._registry).labels(self._model).set_function(now)

    def _counter(self, name: str, what: str) -> Any:
        return Counter(name, what, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        return Histogram(name, what, ("model_name",), registry=self._registry, buckets=buckets).labels(self._model)
