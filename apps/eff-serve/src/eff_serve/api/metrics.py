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
    """Reads the engines when it is asked, so that a gauge is never older than its scrape."""

    def __init__(self) -> None:
        self.of_model: dict[str, Callable[[], EngineStats | None]] = {}

    def collect(self) -> Iterable[GaugeMetricFamily]:
        found = {model: stats() or EngineStats(0, 0, 0.0) for model, stats in self.of_model.items()}
        for name, text, field in (
            ("eff_num_requests_running", "Sequences that are being generated.", "running"),
            ("eff_num_requests_waiting", "Sequences in the waiting line.", "waiting"),
            ("eff_num_requests_layer_reuse", "Sequences that decode with layer reuse.", "reusing"),
            ("eff_kv_cache_usage_perc", "Part of the key-value cache in use, from 0 to 1.", "kv_usage"),
            ("eff_kv_cache_kept_perc", "Part of it that holds earlier texts for later ones.", "kv_kept"),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            for model, stats in found.items():
                family.add_metric([model], getattr(stats, field))
            yield family


class Families:
    """The metrics of one app, in a registry of its own; `Metrics` are those of one of its models."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gauges = _EngineGauges()
        self.registry.register(self.gauges)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)

        self.finished = counter("eff_request_success_total", "Ended sequences by reason.", "finished_reason")
        self.gone = counter("eff_client_disconnects_total", "Requests whose client left before the end.", "endpoint")
        self.rejected = counter("eff_admission_rejections_total", "Requests turned away.", "reason")
        self.http = counter("eff_http_requests_total", "HTTP responses.", "method", "path", "status")
        self.prompt_tokens = counter("eff_prompt_tokens_total", "Prompt tokens processed.")
        self.cached_tokens = counter(
            "eff_prefix_cache_hits_total", "Prompt tokens that an earlier text held already and were not computed."
        )
        self.new_tokens = counter("eff_generation_tokens_total", "Tokens generated.")
        self.first = histogram(
            "eff_time_to_first_token_seconds",
            "Time from a request's arrival to the first token of each sequence.",
            _SECONDS,
        )
        self.between = histogram("eff_inter_token_latency_seconds", "Time between tokens of a sequence.", _BETWEEN)
        self.whole = histogram("eff_e2e_request_latency_seconds", "Time from arrival to the last token.", _SECONDS)
        self.prompt_size = histogram("eff_request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self.new_size = histogram("eff_request_generation_tokens", "Generated tokens of a sequence.", _TOKENS)
        self.limit = gauge("eff_max_model_len", "Most tokens of prompt and output; 0 while the model is not loaded.")
        self.loaded = gauge("eff_model_loaded", "Whether the model is loaded.")
        self.memory = gauge("eff_model_memory_bytes", "Its weights and its room for keys and values.")
        self.loads = counter("eff_model_loads_total", "Loads of a model, by how they ended.", "outcome")
        self.load_seconds = histogram("eff_model_load_seconds", "Time that a load took.", _SECONDS)

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)

    def responded(self, model: str, method: str, path: str, status: int) -> None:
        """Count a response; ``path`` is that of the route, not of the request, so that there are few."""
        self.http.labels(model, method, path, str(status)).inc()


class Metrics:
    """Metrics of one model.

    Args:
        families: Those of the app.
        model: Value of the label ``model_name``.
        stats: The engine's counts at this moment, None while there is no engine.
    """

    def __init__(self, families: Families, model: str, stats: Callable[[], EngineStats | None]) -> None:
        self.families, self.model = families, model
        families.gauges.of_model[model] = stats
        for reason in ("stop", "length", "abort", "error"):
            families.finished.labels(model, reason)
        for family in (families.prompt_tokens, families.cached_tokens, families.new_tokens, families.loaded):
            family.labels(model)

    def model_loaded(self, max_model_len: int, memory: int, seconds: float | None = None) -> None:
        """Note what is known of a model that was loaded, within ``seconds`` if it was loaded for a request."""
        f = self.families
        f.limit.labels(self.model).set(max_model_len)
        f.memory.labels(self.model).set(memory)
        f.loaded.labels(self.model).set(1)
        if seconds is not None:
            f.loads.labels(self.model, "loaded").inc()
            f.load_seconds.labels(self.model).observe(seconds)

    def model_unloaded(self) -> None:
        """Note that a model is loaded no longer."""
        for family in (self.families.limit, self.families.memory, self.families.loaded):
            family.labels(self.model).set(0)

    def load_failed(self) -> None:
        """Count a load that ended with an error."""
        self.families.loads.labels(self.model, "failed").inc()

    def client_gone(self, endpoint: str) -> None:
        """Count a client that left early."""
        self.families.gone.labels(self.model, endpoint).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away."""
        self.families.rejected.labels(self.model, reason).inc()

    def sequence(self, arrival: float, prompt_tokens: int) -> SequenceMetrics:
        """Begin to measure one sequence."""
        return SequenceMetrics(self.families, self.model, arrival, prompt_tokens)


class SequenceMetrics:
    """Measures one sequence from its arrival to its end."""

    def __init__(self, families: Families, model: str, arrival: float, prompt_tokens: int) -> None:
        self._families, self._model = families, model
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
        f, model = self._families, self._model
        if not self._started:
            self._started = True
            f.prompt_tokens.labels(model).inc(self._prompt_tokens)
            f.prompt_size.labels(model).observe(self._prompt_tokens)
            f.cached_tokens.labels(model).inc(cached_tokens)
        if not token:
            return
        now = time.perf_counter()
        if self._last is None:
            f.first.labels(model).observe(now - self._arrival)
        else:
            f.between.labels(model).observe(now - self._last)
        self._last = now
        self._tokens += 1
        f.new_tokens.labels(model).inc()

    def end(self, reason: str) -> None:
        """Note why the sequence ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        f, model = self._families, self._model
        f.finished.labels(model, reason).inc()
        f.new_size.labels(model).observe(self._tokens)
        if reason in ("stop", "length"):
            f.whole.labels(model).observe(time.perf_counter() - self._arrival)
