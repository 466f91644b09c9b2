"""What Prometheus is told."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from memorization_guard.core.settings import VERDICTS

from .settings import Outcome, Reason


class Metrics:
    """The metrics for Prometheus. Labels are words from short lists; nothing that a client sends becomes a label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, registry = "memorization_guard", self.registry
        self.requests = Counter(f"{name}_requests", "Requests by what came of them.", ["outcome"], registry=registry)
        self.verdicts = Counter(f"{name}_verdicts", "Sampled images by verdict.", ["verdict"], registry=registry)
        self.corrected_images = Counter(f"{name}_corrected_images", "Sampled images that were steered.", registry=registry)
        self.corrected_steps = Counter(f"{name}_corrected_steps", "Sampler steps that were steered.", registry=registry)
        self.admitted = Gauge(f"{name}_admitted", "Requests that are being sampled or wait.", registry=registry)
        self.connections = Gauge(f"{name}_connections", "Open connections.", registry=registry)
        self.closed_connections = Counter(
            f"{name}_closed_connections", "Connections that a limit closed.", ["reason"], registry=registry
        )
        self.sampling = Histogram(
            f"{name}_sampling_seconds",
            "From prompt to image, waiting not counted.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100),
            registry=registry,
        )
        self.overhead = Histogram(
            f"{name}_overhead_seconds",
            "Part of sampling_seconds in which the guard's own code ran, and the time to make the trace.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 10),
            registry=registry,
        )
        # A rate of something that never happened is then 0 instead of absent.
        for outcome in get_args(Outcome):
            self.requests.labels(outcome)
        for verdict in VERDICTS:
            self.verdicts.labels(verdict)
        for reason in get_args(Reason):
            self.closed_connections.labels(reason)
