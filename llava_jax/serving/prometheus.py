"""Collects metrics of the server and formats the metrics as text for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Metrics of one server.

    Attributes:
        requests: Number of finished requests by HTTP status; 499 if the client disconnected.
        prompt_tokens: Number of prompt tokens by model, image tokens included.
        new_tokens: Number of generated tokens by model.
        waiting: Number of requests that wait for their first token.
        running: Number of requests between their first and their last token.
        seconds: Seconds from a request's entry into the queue to the end of its answer.
        first_seconds: Seconds from a request's entry into the queue to its first token.
    """

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("llava_requests", "Finished requests", ["code"], registry=registry)
        self.prompt_tokens = Counter(
            "llava_prompt_tokens", "Prompt tokens", ["model"], registry=registry
        )
        self.new_tokens = Counter(
            "llava_generated_tokens", "Generated tokens", ["model"], registry=registry
        )
        self.waiting = Gauge(
            "llava_requests_waiting", "Requests that wait for their first token", registry=registry
        )
        self.running = Gauge(
            "llava_requests_running",
            "Requests between their first and their last token",
            registry=registry,
        )
        self.seconds = Histogram(
            "llava_request_seconds",
            "Seconds from a request to the end of its answer",
            registry=registry,
            buckets=_SECONDS,
        )
        self.first_seconds = Histogram(
            "llava_time_to_first_token_seconds",
            "Seconds from a request to its first token",
            registry=registry,
            buckets=_SECONDS,
        )

    def text(self) -> bytes:
        """Returns all metrics in the text format of Prometheus, as UTF-8."""
        return generate_latest(self._registry)
