"""The server under attack: others are answered meanwhile, and nothing fails."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hostile_images import jpeg, plain_jpeg
from serving import data_url, metric, picture, server, user
from test_serving import COSTLY, chat, text

for package in ("fastapi", "uvicorn", "prometheus_client", "httptools"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")

MIB = 2**20
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


class Attack:
    """Clients of all kinds against one server, for some time.

    Args:
        address: The server's.
        seconds: How long.
    """

    def __init__(self, address: str, seconds: float):
        self.address = address
        self.until = time.monotonic() + seconds
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []

    async def run(self, clients: int, slow: int) -> None:
        limits = httpx.Limits(max_connections=clients + 40)
        images = [data_url(jpeg(4096, 70)), data_url(jpeg(1024, 900)), picture()]
        bodies = [chat(messages=[user("x", image)], max_tokens=2) for image in images]
        stops = chat(stop=["x" * 1000] * 16, temperature=9, max_tokens=100)
        async with httpx.AsyncClient(base_url=self.address, timeout=60, limits=limits) as http:
            posts = [lambda b=b: self.post(http, json.dumps(b).encode()) for b in [*bodies, stops]]
            posts += [lambda b=b: self.post(http, b) for b in COSTLY.values()]
            posts += [
                lambda: self.post(http, b"x" * (30 * MIB)),  # more than may be
                lambda: self.post(http, b"{}" * (5 * MIB), "/gradio_api/queue/join"),
                lambda: self.upload(http, b"x" * (12 * MIB)),
            ]
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
            raws = [head, "", f"{head}Content-Length: 9\r\n\r\n", "GET / HTTP/1.1\nHost: x\n\n"]
            raws.append(f"{head}Content-Length: 20000000\r\n\r\n" + "x" * MIB)
            await asyncio.gather(
                *(self.ask(http, number) for number in range(clients)),
                *(self.repeat(post) for post in posts),
                *(self.hold(raws[number % len(raws)].encode()) for number in range(slow)),
            )

    async def ask(self, http: Any, number: int) -> None:
        """A client that means well: text, one request after the other."""
        draw = random.Random(number)
        while time.monotonic() < self.until:
            body = chat(messages=text(draw.choice(("hello", "is it red?", "what is it?"))))
            began = time.monotonic()
            response = await http.post(CHAT, json=body)
            self.latencies.append(time.monotonic() - began)
            self.statuses[response.status_code] += 1
            if response.status_code == 429:
                await asyncio.sleep(0.5 + draw.random())

    async def repeat(self, post: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self.until:
            await post()
            await asyncio.sleep(0.2)

    async def post(self, http: Any, body: bytes, path: str = CHAT) -> None:
        response = await http.post(path, content=body, headers=JSON)
        self.statuses[response.status_code] += 1

    async def upload(self, http: Any, data: bytes) -> None:
        response = await http.post("/gradio_api/upload", files=[("files", ("a.png", data))])
        self.statuses[response.status_code] += 1

    async def hold(self, sent: bytes) -> None:
        """A connection that is kept for as long as the server allows, again and again."""
        host, port = self.address.removeprefix("http://").split(":")
        while time.monotonic() < self.until:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection(host, int(port))
                with contextlib.closing(writer):
                    writer.write(sent)
                    left = self.until - time.monotonic()
                    await asyncio.wait_for(reader.read(), max(0.1, left))
            await asyncio.sleep(0.5)  # the clients here share two cores with the server


def resident(address: str) -> float:
    figures = httpx.get(f"{address}/metrics").text
    return metric(figures, "process_resident_memory_bytes") / MIB


def attack(seconds: float, clients: int, slow: int) -> Attack:
    """Returns what came of it, with the memory that was needed as `grown` MiB."""
    with server("--max-queue", "128", "--max-client-queue", "128") as address:
        for number in range(1, 9):  # compiled for as many as come at a time
            httpx.post(f"{address}{CHAT}", json=chat(messages=text("x " * 2**number)), timeout=60)
        before = resident(address)
        found = Attack(address, seconds)
        asyncio.run(found.run(clients, slow))
        found.grown = resident(address) - before  # pyright: ignore[reportAttributeAccessIssue]
    return found


def check(found: Any, p99: float) -> None:
    ordered = sorted(found.latencies)
    figures = {
        "requests": len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[int(0.99 * len(ordered))],
        "grown MiB": found.grown,
        "statuses": dict(found.statuses),
    }
    print(figures)
    assert all(status == 200 or 400 <= status < 500 for status in found.statuses), figures
    assert found.grown < 300, figures
    assert figures["p99"] < p99, figures


def test_others_are_answered_during_an_attack():
    check(attack(6.0, clients=4, slow=40), p99=5)


@pytest.mark.slow
def test_64_clients_for_a_minute_during_an_attack():
    check(attack(60.0, clients=64, slow=400), p99=3)


def mutated(draw: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A request that is nearly right: method, path, body, headers."""
    whole = [
        chat(messages=[user("x", picture())], max_tokens=1),
        chat(stop=["a"], stream=True, max_tokens=1, stream_options={"include_usage": True}),
        {"fn_index": 0, "session_hash": "s", "data": [{"text": "x", "files": []}, *[0] * 5]},
    ]
    body = json.dumps(mutate(draw.choice(whole), draw)).encode()
    if draw.random() < 0.3:
        at = draw.randrange(len(body))
        body = body[:at] + draw.randbytes(draw.randrange(1, 9)) + body[at + draw.randrange(9) :]
    paths = [CHAT] * 6 + ["/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/upload"]
    paths += [
        "/",
        "/config",
        "/v1/models",
        "/v1/models/%2e%2e/x",
        "/gradio_api/file=%00",
        "//",
        "/*",
    ]
    headers = dict(JSON)
    if draw.random() < 0.2:
        kinds = ["text/plain", "multipart/form-data; boundary=x", "multipart/form-data", ""]
        headers["Content-Type"] = draw.choice(kinds)
        body = draw.choice(
            [body, b"--x\r\n\r\n" * 900, b"--x\r\nContent-Disposition: form-data\r\n"]
        )
    method = draw.choice(["POST"] * 9 + ["GET", "PUT", "OPTIONS", "HEAD", "DELETE"])
    return method, draw.choice(paths), body, headers


ODD = (None, True, -1, 10**40, 1e308, "", "x" * 10**5, "\ud800", "\0", [], {}, [[[]]], {"a": {}})


def mutate(value: Any, draw: random.Random) -> Any:
    """The same value with about one part of it replaced, repeated or taken away."""
    if draw.random() < 0.07:
        return draw.choice(
            [*ODD, data_url(plain_jpeg()[: draw.randrange(300)]), "file:///etc/passwd"]
        )
    if isinstance(value, dict):
        made = {name: mutate(one, draw) for name, one in value.items() if draw.random() > 0.02}
        return (
            made | {draw.choice(["n", "tools", "seed", "x"]): 7} if draw.random() < 0.03 else made
        )
    if isinstance(value, list):
        return [mutate(one, draw) for one in value] * draw.choice([1] * 30 + [2, 300])
    return value


def fuzz(count: int) -> None:
    draw = random.Random(16)
    slowest = 0.0
    with server() as address, httpx.Client(base_url=address, timeout=20) as http:
        before = resident(address)
        for number in range(count):
            method, path, body, headers = mutated(draw)
            began = time.monotonic()
            response = http.request(method, path, content=body, headers=headers)
            slowest = max(slowest, time.monotonic() - began)
            assert response.status_code == 200 or 400 <= response.status_code < 500, (
                number,
                response.text,
            )
        grown = resident(address) - before
    print({"slowest": slowest, "grown MiB": grown})
    assert slowest < 10
    assert grown < 300


def test_fuzzed_requests():
    fuzz(100)


@pytest.mark.slow
def test_1000_fuzzed_requests():
    fuzz(1000)
