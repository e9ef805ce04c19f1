"""What a monitoring system reads, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server.

    Attributes:
        requests: That are over, by HTTP status; 499 is a client that went away.
        prompt_tokens: That were read, images expanded.
        new_tokens: That were generated.
        waiting: Requests before their first token.
        running: Requests after it.
        seconds: Time from an answered request's arrival to its end.
        first_seconds: Time from its arrival to its first token.
    """

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "llava_requests", "Requests that are over", ["code"], registry=registry
        )
        self.prompt_tokens = Counter(
            "llava_prompt_tokens", "Tokens of prompts read", ["model"], registry=registry
        )
        self.new_tokens = Counter(
            "llava_generated_tokens", "Tokens generated", ["model"], registry=registry
        )
        self.waiting = Gauge(
            "llava_requests_waiting", "Requests before their first token", registry=registry
        )
        self.running = Gauge(
            "llava_requests_running", "Requests after their first token", registry=registry
        )
        self.seconds = Histogram(
            "llava_request_seconds",
            "Seconds that answered requests took",
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
        """All of it."""
        return generate_latest(self._registry)
