"""Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eff_studio.worker import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """Reads the worker when it is asked.

    Args:
        worker: To read.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._responses = Counter(
            "eff_studio_responses", "Responses.", ["method", "path", "status"], registry=self.registry
        )

    def responded(self, method: str, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(method, path, str(status)).inc()

    def collect(self) -> Iterable[Metric]:
        """Counts of this moment."""
        counts = self._worker.counts
        jobs = CounterMetricFamily("eff_studio_jobs", "Ended jobs by how they ended.", labels=["state"])
        for state in ("done", "failed", "cancelled"):
            jobs.add_metric([state], getattr(counts, state))
        yield jobs
        yield CounterMetricFamily("eff_studio_pictures", "Pictures made.", value=counts.pictures)
        yield CounterMetricFamily("eff_studio_busy_seconds", "Time spent on jobs.", value=counts.busy_seconds)
        yield GaugeMetricFamily("eff_studio_jobs_waiting", "Jobs in line.", value=self._worker.jobs.waiting())
        yield GaugeMetricFamily("eff_studio_jobs_running", "Jobs under way.", value=len(self._worker.running))

    def render(self) -> bytes:
        """The text for a scraper."""
        return generate_latest(self.registry)
