"""The server under attack: others are answered meanwhile, and nothing fails."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest
from hostile_images import plain_jpeg
from live_server import CHAT, JSON, data_url, picture, resident, server, user
from test_serving import chat, text
from tiny_run import ROOT, environment

for package in ("fastapi", "uvicorn", "prometheus_client", "httptools"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")


class Clients:
    """Clients that mean well: text, one request after the other.

    Args:
        address: The server's.
        seconds: How long they ask.
    """

    def __init__(self, address: str, seconds: float):
        self.address = address
        self.until = time.monotonic() + seconds
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []

    async def run(self, count: int) -> None:
        await asyncio.gather(*(self.ask(number) for number in range(count)))

    async def ask(self, number: int) -> None:
        draw = random.Random(number)
        # Each has its own connection: in a common pool they would wait for each other.
        async with httpx.AsyncClient(base_url=self.address, timeout=60, verify=False) as http:
            while time.monotonic() < self.until:
                body = chat(messages=text(draw.choice(("hello", "is it red?", "what is it?"))))
                began = time.monotonic()
                response = await http.post(CHAT, json=body)
                self.latencies.append(time.monotonic() - began)
                self.statuses[response.status_code] += 1
                if response.status_code == 429:
                    await asyncio.sleep(0.5 + draw.random())


def attack(seconds: float, clients: int, slow: int) -> Clients:
    """Returns what came of it, with the memory that was needed as `grown` MiB.

    The attackers are a process of their own, so that what the others measure is the server.
    """
    with server("--max-queue", "128", "--max-client-queue", "128") as address:
        for number in range(1, 9):
            httpx.post(f"{address}{CHAT}", json=chat(messages=text("x " * 2**number)), timeout=60)
        before = resident(address)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [
            sys.executable,
            "tests/serving/attackers.py",
            address,
            str(seconds + 3),
            str(slow),
        ]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(PYTHONPATH=paths), stdout=subprocess.PIPE
        ) as attackers:
            assert attackers.stdout is not None
            attackers.stdout.readline()  # they have begun
            found = Clients(address, seconds)
            asyncio.run(found.run(clients))
            statuses = json.loads(attackers.stdout.readline())
        assert attackers.returncode == 0
        found.statuses.update({int(status): count for status, count in statuses.items()})
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
