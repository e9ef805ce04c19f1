"""Clients that attack a server: `python tests/serving/attackers.py ADDRESS SECONDS SLOW`.

Prints a line when they begin, and then how often they saw each status, as JSON.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from hostile_images import jpeg
from live_server import CHAT, JSON, MIB, data_url, picture, user
from test_serving import COSTLY, chat


class Attack:
    """All kinds of attacks on one server at the same time.

    Args:
        address: The server's.
        seconds: How long.
    """

    def __init__(self, address: str, seconds: float):
        self.address = address
        self.until = time.monotonic() + seconds
        self.statuses: Counter[int] = Counter()

    async def run(self, slow: int) -> None:
        limits = httpx.Limits(max_connections=40)
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
                *(self.repeat(post) for post in posts),
                *(self.hold(raws[number % len(raws)].encode()) for number in range(slow)),
            )

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


def main(address: str, seconds: str, slow: str) -> None:
    attack = Attack(address, float(seconds))
    print("begun", flush=True)
    asyncio.run(attack.run(int(slow)))
    print(json.dumps(attack.statuses), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
