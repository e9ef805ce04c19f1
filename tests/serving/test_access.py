"""Who may ask the server: Host, Origin, key, and where it listens."""

import asyncio
import base64
from typing import Any

import pytest

from llava_jax.cli import serve

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")

KEY = "a key: voilà"


def ask(
    headers: dict[str, str], *, method: str = "POST", path: str = "/v1/x", **options: Any
) -> Any:
    """Sends a request to an application behind the checks."""
    from fastapi import FastAPI

    from llava_jax.serving.access import guard_access

    app = FastAPI()
    answer = lambda: {"answer": 42}
    app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])(answer)
    guard_access(app, **{"host": "127.0.0.1"} | options)

    async def send() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as http:
            return await http.request(method, path, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("host", "status"),
    {
        "127.0.0.1:7860": 200,
        "localhost:7860": 200,
        "LOCALHOST": 200,
        "[::1]:7860": 200,
        "10.0.0.5": 200,  # no page of another has an address of this machine
        "rebound.example": 403,
        "rebound.example:7860": 403,
        "127.0.0.1.nip.io": 403,
        "localhost.evil.example": 403,
        "evil.example@127.0.0.1": 403,
        "127.0.0.1:7860/x": 403,
        "127.0.0.1#.evil.example": 403,
        "0x7f000001": 403,
        "": 403,
        "[": 403,
    }.items(),
)
def test_another_name_finds_nothing(host, status):
    assert ask({"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    {
        "http://127.0.0.1:7860": 200,
        "https://127.0.0.1:7860": 200,  # a proxy took the TLS away
        "http://127.0.0.1": 403,
        "http://localhost:7860": 403,
        "https://evil.example": 403,
        "https://good.example": 200,
        "http://good.example": 403,
        "https://good.example.evil": 403,
        "http://127.0.0.1:7860.evil.example": 403,
        "http://evil@127.0.0.1:7860": 403,
        "null": 403,
        "file://": 403,
    }.items(),
)
def test_pages_of_other_origins_may_not_ask(origin, status):
    response = ask({"Origin": origin}, origins=["https://good.example"])
    assert response.status_code == status, response.text
    allowed = response.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://good.example" else None)


@pytest.mark.parametrize(
    ("origin", "status"), [("https://a.example", 200), ("https://b.example", 403)]
)
def test_a_preflight_is_answered_to_allowed_origins_alone(origin, status):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = ask(headers, method="OPTIONS", origins=["https://a.example"], api_key=KEY)
    assert response.status_code == status
    assert ("access-control-allow-origin" in response.headers) == (status == 200)
    assert "access-control-allow-credentials" not in response.headers


def test_an_allowed_origin_is_a_name_of_the_server():
    headers = {"Host": "chat.example", "Origin": "https://chat.example"}
    assert ask(headers, origins=["https://chat.example"]).status_code == 200
    assert ask(headers).status_code == 403


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        (f"Bearer {KEY}".encode(), 200),
        (f"bearer  {KEY}".encode(), 200),
        (basic(KEY), 200),
        ("Bearer a key: voil", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (f"Digest {KEY}".encode(), 401),
        (KEY.encode(), 401),
        (basic("x"), 401),
        ("Basic ?", 401),
        ("Basic ", 401),
    ],
)
def test_the_key(authorization, status):
    headers = {} if authorization is None else {"Authorization": authorization}
    response = ask(headers, api_key=KEY)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert ask(headers, path="/", api_key=KEY).headers["www-authenticate"].startswith("Basic")
    assert ask(headers, path="/metrics", api_key=KEY).status_code == status
    assert ask(headers, path="/health", method="GET", api_key=KEY).status_code == 200


def test_it_listens_to_other_machines_only_with_a_key_or_when_told(capsys, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", ""):
        assert serve.main(["nowhere", "--no-page", "--host", host, "--port", "0"]) == 1
        assert "--no-auth" in capsys.readouterr().err
    for more in (["--no-auth"], ["--api-key", KEY]):
        assert serve.main(["nowhere", "--no-page", "--host", "0.0.0.0", "--port", "0", *more]) == 1
        assert "nowhere" in capsys.readouterr().err  # which comes after the address
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY)
    assert serve.parse(["nowhere"]).api_key == KEY
    assert serve.parse(["nowhere", "--api-key", "read from a file\n"]).api_key == "read from a file"
    origins = ["--allow-origin", "https://Chat.example.org", "--allow-origin", "http://a:8080"]
    assert serve.parse(["x", *origins]).allow_origin == [
        "https://chat.example.org",
        "http://a:8080",
    ]


@pytest.mark.parametrize(
    "given",
    [
        ["--api-key", " "],
        ["--api-key", "a\nb"],
        *(["--allow-origin", origin] for origin in ("chat.example", "https://a/b", "http://[x")),
        *(["--allow-origin", origin] for origin in ("https://a.example:443", "http://a@b")),
    ],
)
def test_options_that_make_no_sense(given, capsys):
    with pytest.raises(SystemExit):
        serve.parse(["nowhere", *given])
    assert given[0].strip("-").replace("-", " ").split()[0] in capsys.readouterr().err.lower()
