"""Counters, histograms and gauges in the units that dashboards of LLM servers know, under the prefix ``eff_``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from eff_serve.engine.types import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_BETWEEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)


class _EngineGauges(Collector):
    """Reads the engine when it is asked, so that a gauge is never older than its scrape."""

    def __init__(self, stats: Callable[[], EngineStats | None], model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterable[GaugeMetricFamily]:
        stats = self._stats() or EngineStats(0, 0, 0.0)
        for name, text, value in (
            ("eff_num_requests_running", "Sequences that are being generated.", stats.running),
            ("eff_num_requests_waiting", "Sequences in the waiting line.", stats.waiting),
            ("eff_num_requests_layer_reuse", "Sequences that decode with layer reuse.", stats.reusing),
            ("eff_kv_cache_usage_perc", "Part of the key-value cache in use, from 0 to 1.", stats.kv_usage),
            ("eff_kv_cache_kept_perc", "Part of it that holds earlier texts for later ones.", stats.kv_kept),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family


class Metrics:
    """All metrics of one app, in a registry of its own.

    Args:
        model: Value of the label ``model_name``.
        stats: The engine's counts at this moment, None while there is no engine.
    """

    def __init__(self, model: str, stats: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineGauges(stats, model))
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

        self._finished = counter("eff_request_success_total", "Ended sequences by reason.", "finished_reason")
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model, reason)
        self._gone = counter("eff_client_disconnects_total", "Requests whose client left before the end.", "endpoint")
        self._rejected = counter("eff_admission_rejections_total", "Requests turned away.", "reason")
        self._http = counter("eff_http_requests_total", "HTTP responses.", "method", "path", "status")
        self._prompt_tokens = counter("eff_prompt_tokens_total", "Prompt tokens processed.").labels(model)
        self._cached_tokens = counter(
            "eff_prefix_cache_hits_total", "Prompt tokens that an earlier text held already and were not computed."
        ).labels(model)
        self._new_tokens = counter("eff_generation_tokens_total", "Tokens generated.").labels(model)
        first = "Time from a request's arrival to the first token of each sequence."
        self._first = histogram("eff_time_to_first_token_seconds", first, _SECONDS).labels(model)
        self._between = histogram(
            "eff_inter_token_latency_seconds", "Time between tokens of a sequence.", _BETWEEN
        ).labels(model)
        self._whole = histogram(
            "eff_e2e_request_latency_seconds", "Time from arrival to the last token.", _SECONDS
        ).labels(model)
        self._prompt_size = histogram("eff_request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS).labels(
            model
        )
        self._new_size = histogram("eff_request_generation_tokens", "Generated tokens of a sequence.", _TOKENS).labels(
            model
        )
        self._limit = Gauge(
            "eff_max_model_len", "Most tokens of prompt and output.", ["model_name"], registry=self.registry
        )

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)

    def model_loaded(self, max_model_len: int) -> None:
        """Note the context length of the model."""
        self._limit.labels(self._model).set(max_model_len)

    def client_gone(self, endpoint: str) -> None:
        """Count a client that left early."""
        self._gone.labels(self._model, endpoint).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away."""
        self._rejected.labels(self._model, reason).inc()

    def responded(self, method: str, path: str, status: int) -> None:
        """Count a response; ``path`` is that of the route, not of the request, so that there are few."""
        self._http.labels(self._model, method, path, str(status)).inc()

    def sequence(self, arrival: float, prompt_tokens: int) -> SequenceMetrics:
        """Begin to measure one sequence."""
        return SequenceMetrics(self, arrival, prompt_tokens)


class SequenceMetrics:
    """Measures one sequence from its arrival to its end."""

    def __init__(self, metrics: Metrics, arrival: float, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None
        self._prompt_tokens = prompt_tokens
        self._started = False
        self._tokens = 0
        self._ended = False

    def step(self, *, token: bool, cached_tokens: int = 0) -> None:
        """Note a message of the engine, with a token or only with scores of the prompt.

        Args:
            token: Whether it has a token.
            cached_tokens: Prompt tokens that were not computed; those of the first message count.
        """
        m = self._metrics
        if not self._started:
            self._started = True
            m._prompt_tokens.inc(self._prompt_tokens)
            m._prompt_size.observe(self._prompt_tokens)
            m._cached_tokens.inc(cached_tokens)
        if not token:
            return
        now = time.perf_counter()
        if self._last is None:
            m._first.observe(now - self._arrival)
        else:
            m._between.observe(now - self._last)
        self._last = now
        self._tokens += 1
        m._new_tokens.inc()

    def end(self, reason: str) -> None:
        """Note why the sequence ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        m = self._metrics
        m._finished.labels(m._model, reason).inc()
        m._new_size.observe(self._tokens)
        if reason in ("stop", "length"):
            m._whole.observe(time.perf_counter() - self._arrival)
