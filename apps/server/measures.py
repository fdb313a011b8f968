"""What a server counts, in Prometheus' terms; the names follow vLLM's.

A registry of its own for every server, so that two of them in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from apps.server.asked import Ended

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)


class _Sums(Collector):
    """A histogram that the model's process has filled (tensorpar/sum_times.py): sums over the devices of a cluster."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}  # by upper bound
        self.total_s = 0.0

    def collect(self) -> Iterator[Metric]:
        buckets = list(zip(self.counts, accumulate(self.counts.values()), strict=True))
        yield HistogramMetricFamily("edgert_allreduce_seconds", "One sum over the devices, waiting for them included",
                                    buckets or [("+Inf", 0)], self.total_s)


class Measures:
    """Counters of one server; `page` is what /metrics gives."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.prompt_tokens = Counter("edgert_prompt_tokens", "Prompt tokens computed", registry=registry)
        self.cached_tokens = Counter("edgert_cached_prompt_tokens", "Prompt tokens that the KV cache held",
                                     registry=registry)
        self.generation_tokens = Counter("edgert_generation_tokens", "Tokens of answers", registry=registry)
        self.read_bytes = Counter("edgert_weight_read_bytes", "Weights read from disk because they do not stay",
                                  registry=registry)
        self.peer_bytes = Counter("edgert_peer_bytes", "Bytes that went to another device, or came from it",
                                  ["peer", "direction"], registry=registry)
        self.requests = Counter("edgert_requests", "Requests that ended", ["finish_reason"], registry=registry)
        self.failed = Counter("edgert_requests_failed", "Requests that failed", ["kind"], registry=registry)
        self.refused = Counter("edgert_requests_refused", "Requests refused because the queue was full",
                               registry=registry)
        self._first = Histogram("edgert_time_to_first_token_seconds", "From request to first token", registry=registry,
                                buckets=_TTFT_BUCKETS)
        self._between = Histogram("edgert_inter_token_latency_seconds", "Between two tokens", registry=registry,
                                  buckets=_TOKEN_BUCKETS)
        self._kv_ratio = Gauge("edgert_kv_cache_usage_ratio", "Share of the context in use", registry=registry)
        self._weight_bytes = Gauge("edgert_weight_cache_bytes", "Weights that stay in memory", registry=registry)
        self._device_sums = _Sums()
        registry.register(self._device_sums)
        self.tokens_per_s: dict[str, float] = {}  # by model: the last answer's
        self._sums: dict[tuple[str, ...], float] = {}  # what the model's process had counted at its last answer

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read whenever the page is."""
        Gauge(name, what, registry=self._registry).set_function(read)

    def tokens(self, n: int, after_s: float, *, is_first: bool) -> None:
        """So many tokens came, `after_s` after those before; or after the request, where they are an answer's first."""
        if is_first:
            self._first.observe(after_s)
            return
        for _ in range(n):
            self._between.observe(after_s / n)

    def ended(self, event: Ended, model: str) -> None:
        """Count an answer."""
        self.prompt_tokens.inc(event.prompt_tokens - event.cached_tokens)
        self.cached_tokens.inc(event.cached_tokens)
        self.generation_tokens.inc(event.completion_tokens)
        self.requests.labels(finish_reason=event.finish_reason).inc()
        self.read_bytes.inc(self._growth(int(event.memory.get("streamed_bytes") or 0), "streamed"))
        if "cluster" in event.plan:
            self._devices(event.plan["cluster"])
        self._weight_bytes.set(int(event.memory.get("pinned_bytes") or 0))
        speed = event.timings.get("predicted_per_second")
        if speed and event.completion_tokens >= 8:  # fewer tell more of the first token than of the model
            self.tokens_per_s[model] = float(speed)

    def _devices(self, told: dict[str, Any]) -> None:
        """Count what went between devices."""
        for peer, both in told["peer_bytes"].items():
            for direction, n_bytes in zip(("sent", "received"), both, strict=True):
                self.peer_bytes.labels(peer, direction).inc(self._growth(n_bytes, peer, direction))
        sums, mine = told["sums"], self._device_sums
        for bound, count in zip((*map(str, sums["bounds_s"]), "+Inf"), sums["counts"], strict=True):
            mine.counts[bound] = mine.counts.get(bound, 0) + self._growth(count, "sums", bound)
        mine.total_s += self._growth(sums["total_s"], "sums", "total")

    def _growth(self, now: float, *what: str) -> float:
        """How much a sum has grown; it begins anew with another process or connection."""
        before = self._sums.get(what, 0)
        self._sums[what] = now
        return now - before if now >= before else now

    def context_used(self, ratio: float) -> None:
        self._kv_ratio.set(ratio)

    def page(self) -> bytes:
        return generate_latest(self._registry)
