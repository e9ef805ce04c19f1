"""The page's HTTP: no component, event or route of Gradio reads a file or a URL for a client."""

import http.server
import importlib.util
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from live_server import RED_TRIANGLE, server

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")
GRADIO = importlib.util.find_spec("gradio")
if GRADIO is None:
    pytest.skip("Gradio is not installed", allow_module_level=True)

SECRET = b"the-content-of-a-secret-file"
MARK = "gradio.FileData"
LINK = "0" * 32 + ".png"
"""Named as uploads are."""


class Page(NamedTuple):
    """A server with the page, and what an attacker is after.

    Attributes:
        http: Asks the server.
        temporary: The server's temporary directory.
        secret: A file that is no upload.
        url: Of another server, which nobody should ask.
        asked: Paths that it was asked for all the same.
    """

    http: Any
    temporary: Path
    secret: Path
    url: str
    asked: list[str]

    def event(self, function: int, data: list[Any], **more: object) -> tuple[int, str]:
        """Sends an event; returns the status and what came of it."""
        session = "session1"
        body = {"fn_index": function, "data": data, "session_hash": session, **more}
        joined = self.http.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return joined.status_code, joined.text
        text = ""
        url = f"/gradio_api/queue/data?session_hash={session}"
        with self.http.stream("GET", url) as stream:
            for line in stream.iter_lines():
                text += line + "\n"
                if "close_stream" in line:
                    break
        return 200, text

    def upload(self, data: bytes, name: str = "a.png") -> Any:
        return self.http.post("/gradio_api/upload", files=[("files", (name, data))])

    def check(self) -> None:
        """Nothing was copied, and nothing fetched."""
        files = [file for file in self.temporary.rglob("*") if file.is_file()]
        copies = [file for file in files if not file.is_symlink() and SECRET in file.read_bytes()]
        assert copies == []
        assert self.asked == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    temporary = tmp_path_factory.mktemp("temporary")
    secret = tmp_path_factory.mktemp("home") / "secret.png"
    secret.write_bytes(RED_TRIANGLE.read_bytes() + SECRET)
    asked: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{other.server_address[1]}/secret.png"
        with (
            server("--max-images", "2", TMPDIR=temporary) as address,
            httpx.Client(base_url=address, timeout=30) as client,
        ):
            yield Page(client, temporary, secret, url, asked)
        other.shutdown()
    thread.join()


def uploads(page: Page) -> Path:
    (folder,) = page.temporary.glob("llava_jax-*")
    return folder


def paths(page: Page) -> list[str]:
    """Ways to name what is not an upload."""
    link = uploads(page) / LINK
    if not link.is_symlink():
        link.symlink_to(page.secret)
    up = "../" * 20
    return [
        str(page.secret),
        up + str(page.secret)[1:],
        f"{uploads(page)}/{up}{str(page.secret)[1:]}",
        str(link),
        LINK,
        f"file:{page.secret}",
        f"file://{page.secret}",
        page.url,
        page.url.upper().replace("HTTP", "http", 1),
        f"/gradio_api/file={page.secret}",
        f"{page.secret}\0.png",
    ]


def forms(path: str) -> list[Any]:
    """Values in which Gradio, somewhere, finds a file."""
    file = {"path": path, "meta": {"_type": MARK}}
    return [
        file,
        file | {"url": path, "is_stream": False, "orig_name": "a.png", "mime_type": "image/png"},
        {"text": "x", "files": [file]},
        {"text": file, "files": [path]},
        [[file]],
        {"value": file, "__type__": "update"},
        path,
    ]


def functions(page: Page) -> list[dict[str, Any]]:
    return [row for row in page.http.get("/config").json()["dependencies"] if row["backend_fn"]]


def test_no_component_of_any_event_takes_a_path(page):
    good = {"text": "", "files": []}
    kinds = {row["id"]: row["type"] for row in page.http.get("/config").json()["components"]}
    usual = {"multimodaltextbox": good, "checkbox": False, "slider": 1, "state": None}
    tried = 0
    for function in functions(page):
        values = [usual[kinds[number]] for number in function["inputs"]]
        places = [*range(len(values)), None]  # None: beside the components
        for place, path in itertools.product(places, paths(page)):
            for form in forms(path):
                data = list(values)
                more = {}
                if place is None:
                    more = {"event_data": form, "oauth_token": path, "batched": True}
                else:
                    data[place] = form
                status, text = page.event(function["id"], data, **more)
                # A state is the server's, and what is beside components is left out.
                ignored = place is None or kinds[function["inputs"][place]] == "state"
                assert status in ((200, 400, 404) if ignored else (400, 404)), text
                assert SECRET.decode() not in text
                tried += 1
    assert tried > 500
    page.check()


def routes() -> set[tuple[str, str]]:
    """The methods and paths that Gradio's source has routes for."""
    assert GRADIO is not None
    assert GRADIO.origin is not None
    source = (Path(GRADIO.origin).parent / "routes.py").read_text()
    found = re.findall(r'@(app|router)\.(get|head|post)\(\s*f?"([^"]+)"', source)
    api = {"app": "", "router": "/gradio_api"}
    return {(method.upper(), api[owner] + path) for owner, method, path in found}


def test_no_route_of_gradio_serves_a_file_or_a_url(page):
    found = routes()
    assert len(found) > 60
    names = [row["api_name"] for row in functions(page)]
    answered = set()
    for (method, route), path in itertools.product(sorted(found), paths(page)):
        if "{session_hash}" in route and "heartbeat" in route:
            continue  # which is endless
        for name in names if "{api_name}" in route else [""]:
            url = route.replace("{api_name}", name)
            url = re.sub(r"\{[^}]*\}", lambda _, path=path: path.replace("\0", "%00"), url)
            query = {"deep_link": path, "path": path, "url": path, "session_hash": path}
            body = {"data": forms(path), "session_hash": "s", "fn_index": 0, "path": path}
            sent = {"json": body} if method == "POST" else {}
            response = page.http.request(method, url, params=query, **sent)
            assert SECRET not in response.content, (method, url)
            if response.status_code != 200:
                assert 400 <= response.status_code < 500, (method, url, response.text)
            else:
                answered.add((method, route))
    served = {"/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json"}
    assert {route for _, route in answered} <= served | {"/assets/{path:path}"}
    page.check()


def test_nothing_is_kept_that_a_deep_link_could_show(page):
    page.event(0, [{"text": "hello", "files": []}, None, False, 0, 1, 5])
    assert page.http.get("/gradio_api/deep_link", params={"session_hash": "session1"}).is_error
    shown = page.http.get("/config", params={"deep_link": "x"}).json()
    assert "deep_link_state" not in shown


def test_an_upload_is_asked_about_and_shown(page):
    (name,) = page.upload(RED_TRIANGLE.read_bytes(), "../../evil.html").json()
    assert re.fullmatch(r"[0-9a-f]{32}\.png", name)
    file = {"path": name, "meta": {"_type": MARK}, "orig_name": "x", "url": page.url}
    question = {"text": "what color is the shape?", "files": [file]}
    status, text = page.event(0, [question, None, False, 0, 1, 5])
    assert status == 200
    assert '"red"' in text
    shown = re.findall(r"/gradio_api/file=([^\"]+)", text)
    assert shown
    for path in (name, *shown):
        response = page.http.get(f"/gradio_api/file={path}")
        assert response.content == RED_TRIANGLE.read_bytes()
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-content-type-options"] == "nosniff"
    page.check()


@pytest.mark.parametrize(
    ("data", "name"),
    [(b"<script>alert(1)</script>", "a.html"), (b"<svg/>", "a.svg"), (b"%!PS", "a.png"), (b"", "")],
)
def test_an_upload_is_an_image(page, data, name):
    assert page.upload(data, name).status_code == 400


def test_an_upload_has_as_many_images_as_a_conversation(page):
    files = [("files", ("a.png", RED_TRIANGLE.read_bytes()))] * 3
    assert page.http.post("/gradio_api/upload", files=files).status_code == 400
    assert page.http.post("/gradio_api/upload", content=b"x").status_code == 415


def test_events_of_other_forms_are_refused(page):
    for body in (
        b"[]",
        b"{",
        json.dumps({"fn_index": 99, "session_hash": "s", "data": []}).encode(),
        json.dumps({"fn_index": 0, "session_hash": "../s", "data": []}).encode(),
        json.dumps({"fn_index": 0, "session_hash": "s", "data": [None] * 6}).encode(),
        json.dumps({"fn_index": 0, "session_hash": "s", "data": [{}] * 10**5}).encode(),
        b'{"fn_index": 0, "session_hash": "s", "data": ' + b"[" * 10**5,
    ):
        response = page.http.post("/gradio_api/queue/join", content=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


def test_uploads_are_bounded(monkeypatch):
    import asyncio

    from llava_jax.serving import uploads
    from llava_jax.serving.limits import Limits, RequestError

    data = RED_TRIANGLE.read_bytes()

    async def add(count: int) -> list[str]:
        return [await kept.add(data) for _ in range(count)]

    for name, most in (("MAX_BYTES", 2 * len(data)), ("MAX_FILES", 2)):
        kept = uploads.Uploads(Limits())
        with monkeypatch.context() as patched:
            patched.setattr(uploads, name, most)
            names = asyncio.run(add(4))
        assert len(list(kept.folder.iterdir())) == 2
        with pytest.raises(RequestError, match="was removed"):
            kept.path(names[0])
        assert kept.path(names[-1]).read_bytes() == data
        kept.close()
        assert not kept.folder.exists()


def test_forms_that_cost_much(page):
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    upload = lambda content, kind: page.http.post(
        "/gradio_api/upload", content=content, headers=kind
    )
    assert upload(b"&" * 2**22, kind).status_code == 415
    parts = {"Content-Type": "multipart/form-data; boundary=x"}
    fields = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 10**5
    for content in (fields, b"--x\r\n" * 10**6, b"\r\n--" * 10**6, b"x" * 2**24):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(upload, content, parts)
            waited = []
            while not asked.done():
                began = time.monotonic()
                assert page.http.get("/health").status_code == 200
                waited.append(time.monotonic() - began)
        assert asked.result().status_code == 400
        assert max(waited, default=0) < 2


def test_a_session_that_does_not_read(page):
    question = {"text": "<" * 10_000, "files": []}
    body = {"fn_index": 0, "data": [question, None, False, 0, 1, 1], "session_hash": "silent"}
    join = lambda body: page.http.post("/gradio_api/queue/join", json=body).status_code
    assert [join(body) for _ in range(6)] == [200] * 4 + [429] * 2
    body["data"][0]["text"] *= 2
    assert join(body | {"session_hash": "other"}) == 400
    for session in ("unknown", "", "../x"):
        url = f"/gradio_api/queue/data?session_hash={session}"
        assert page.http.get(url).status_code == 404
    assert page.http.get("/gradio_api/queue/data").status_code == 404
    for number in range(200):
        body = {"fn_index": 0, "data": [{"text": "", "files": []}, *[None] * 5]}
        join(body | {"session_hash": f"s{number}"})
    assert page.event(0, [{"text": "hello", "files": []}, None, False, 0, 1, 2])[0] == 200


def test_pages_of_others_find_nothing(page):
    served = (
        "/",
        "/config",
        "/gradio_api/upload",
        "/gradio_api/queue/join",
        "/v1/chat/completions",
    )
    for path, method in itertools.product(served, ("GET", "POST", "OPTIONS")):
        for headers in (
            {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
            {"Origin": "null"},
            {"Host": "rebound.example"},
        ):
            response = page.http.request(method, path, headers=headers)
            assert response.status_code == 403, (method, path, headers)
            assert not [name for name in response.headers if name.startswith("access-control")]
