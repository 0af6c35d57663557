"""The router's own metrics."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deltazip_deployments.text.choices import Choices

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class RouterMetrics:
    """Prometheus metrics in a registry of their own. ``tier`` is where the delta was: ``device`` is warm."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "deltazip_router_requests", "Requests by answer", ("endpoint", "status"), registry=self.registry
        )
        self._open = Gauge("deltazip_router_open_requests", "Requests being answered", registry=self.registry)
        self._first_token = Histogram(
            "deltazip_router_first_token_seconds",
            "From a request's arrival to its first token",
            ("tier",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter("deltazip_router_tokens", "Tokens taken and made", ("kind",), registry=self.registry)

    def text(self) -> str:
        """All of them, for a scrape."""
        return generate_latest(self.registry).decode()

    def arrived(self) -> float:
        """Count a new request; returns its arrival time for :meth:`begun`."""
        self._open.inc()
        return time.perf_counter()

    def begun(self, arrived: float, choices: Choices) -> None:
        """Record the first token."""
        self._first_token.labels(choices.tier).observe(time.perf_counter() - arrived)

    def ended(self, endpoint: str, status: int, choices: Choices | None) -> None:
        """Record the end of a request, answered or not."""
        self._open.dec()
        self._requests.labels(endpoint, str(status)).inc()
        if choices is not None:
            self._tokens.labels("prompt").inc(len(choices.asked.prompt))
            self._tokens.labels("completion").inc(choices.completion_tokens)
