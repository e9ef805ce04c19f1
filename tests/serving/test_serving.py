"""The server, asked by OpenAI's client and by less friendly ones."""

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import (
    CHAT,
    JSON,
    RED_TRIANGLE,
    data_url,
    huge_png,
    metric,
    picture,
    resident,
    server,
    user,
)

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

QUESTIONS = ("what color is the shape?", "what shape is present?", "is there a red shape?")
LONG = {"temperature": 1000, "max_tokens": 400}  # any token, and so hardly ever the last


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    limits = ("--slots", "2", "--max-queue", "4", "--max-body-mib", "1", "--max-images", "2")
    with server("--no-page", *limits) as found:
        yield found


@pytest.fixture
def client(address) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return client.chat.completions.create(
        model="tiny-llava", messages=messages, **{"temperature": 0, **more}
    )


def text_of(completion: Any) -> str:
    return completion.choices[0].message.content


def post(address: str, body: object, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"{address}{CHAT}",
        content=content,
        headers={**JSON, **headers},
        timeout=60,
    )


def chat(**more: object) -> dict[str, object]:
    asked = {"model": "tiny-llava", "messages": [{"role": "user", "content": "hello"}]}
    return {**asked, "temperature": 0, **more}


def test_an_image_is_answered(client):
    answers = [text_of(ask(client, [user(question, picture())])) for question in QUESTIONS]
    assert answers == ["red", "triangle", "yes"]


def test_text_alone_is_answered(client):
    completion = ask(client, [{"role": "user", "content": "hello"}])
    assert completion.object == "chat.completion"
    assert text_of(completion)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == (
        completion.usage.prompt_tokens + completion.usage.completion_tokens
    )


def test_an_image_counts_as_its_tokens(client):
    alone, seen = (ask(client, [user("hello", *urls)]) for urls in ((), (picture(),)))
    assert 64 <= seen.usage.prompt_tokens - alone.usage.prompt_tokens < 70


def test_turns_are_remembered(client):
    messages = [user(QUESTIONS[0], picture())]
    for question, expected in ((QUESTIONS[1], "triangle"), (QUESTIONS[2], "yes")):
        messages.append({"role": "assistant", "content": text_of(ask(client, messages))})
        messages.append({"role": "user", "content": question})
        assert text_of(ask(client, messages)) == expected


@pytest.mark.parametrize("more", [{}, {"temperature": 5, "seed": 3, "max_tokens": 60}])
def test_a_stream_says_what_a_whole_answer_says(client, more):
    messages = [user(QUESTIONS[0], picture())]
    whole = ask(client, messages, **more)
    chunks = list(
        ask(client, messages, stream=True, stream_options={"include_usage": True}, **more)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text_of(whole)
    assert len([piece for piece in pieces if piece]) > (10 if more else 0)
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == whole.choices[0].finish_reason
    assert set(ends[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_a_stream_has_the_usage_only_when_asked(address):
    with httpx.stream("POST", f"{address}{CHAT}", json=chat(stream=True), timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in events[:-1])


def test_what_limits_an_answer(client):
    messages = [{"role": "user", "content": "hello"}]
    more = {"temperature": 1000, "seed": 7}
    whole = ask(client, messages, max_tokens=50, **more)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 50
    assert text_of(ask(client, messages, max_completion_tokens=50, **more)) == text_of(whole)
    stop = next(word for word in text_of(whole).split()[3:] if word.isascii() and len(word) > 3)
    cut = ask(client, messages, max_tokens=50, stop=[stop, "never said"], **more)
    assert text_of(cut) == text_of(whole).partition(stop)[0].strip()
    assert cut.choices[0].finish_reason == "stop"
    assert text_of(ask(client, messages, max_tokens=50, stop="@@", **more)) == text_of(whole)


def test_extensions_and_harmless_fields(client):
    messages = [user(QUESTIONS[0], picture())]
    one = {"temperature": 5, "extra_body": {"top_k": 1, "repetition_penalty": 1.0}}
    idle = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "someone", "top_p": 1}
    assert text_of(ask(client, messages, **one)) == "red"
    assert text_of(ask(client, messages, extra_body={"top_k": -1}, **idle)) == "red"


NULLS = ("stream", "stop", "seed", "tools", "guided_json", "logprobs", "max_tokens", "top_k", "n")
HARMLESS = {"user": "someone", "metadata": {"a": "b"}, "store": True, "stream_options": None}
IDLE = {
    "min_tokens": 0,
    "stop_token_ids": [],
    "response_format": {"type": "text"},
    "top_logprobs": 0,
}


def test_null_is_the_default_and_harmless_fields_are_ignored(address):
    plain = post(address, chat()).json()["choices"]
    said = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
    for more in (dict.fromkeys(NULLS), HARMLESS, IDLE):
        response = post(address, chat(**more))
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain
    assert post(address, chat(messages=[*text("a"), said, *text("b")])).status_code == 200


def test_log_probabilities(client):
    """Of each token of the answer, whole and streamed; those of a stop string are not told."""
    messages = [user(QUESTIONS[1], picture())]
    more = {"logprobs": True, "top_logprobs": 3}
    for settings in ({}, {"temperature": 9, "seed": 5, "max_tokens": 30}):
        whole = ask(client, messages, **more, **settings)
        content = whole.choices[0].logprobs.content
        ended = whole.choices[0].finish_reason == "stop"  # by a token that is not a part of it
        assert len(content) == whole.usage.completion_tokens - ended
        for item in content:
            assert item.logprob <= 0
            assert len(item.top_logprobs) == 3
            values = [one.logprob for one in item.top_logprobs]
            assert values == sorted(values, reverse=True)
            if not settings:
                assert (item.token, item.logprob) == (item.top_logprobs[0].token, values[0])
                assert bytes(item.bytes).decode() == item.token
        if not settings:
            assert "".join(item.token for item in content).strip() == text_of(whole)
        chunks = ask(client, messages, stream=True, **more, **settings)
        found = [chunk.choices[0].logprobs for chunk in chunks]
        assert [item for one in found if one for item in one.content] == content
    stop = text_of(whole).split()[2]
    cut = ask(client, messages, stop=[stop], **more, **settings)
    told = cut.choices[0].logprobs.content
    assert 0 < len(told) < len(content)
    assert told == content[: len(told)]
    bare = ask(client, messages, logprobs=True).choices[0].logprobs.content
    assert bare[0].top_logprobs == []
    assert ask(client, messages).choices[0].logprobs is None


def test_the_last_message_is_continued(address):
    asked = user(QUESTIONS[1], picture())
    begun = {"role": "assistant", "content": "a red"}
    more = {"continue_final_message": True, "max_tokens": 4}
    whole = post(address, chat(messages=[asked, begun], **more)).json()
    both = post(address, chat(messages=[asked, begun], add_generation_prompt=False, **more)).json()
    assert whole["choices"] == both["choices"]
    alone = post(address, chat(messages=[asked], max_tokens=4)).json()
    added = whole["usage"]["prompt_tokens"] - alone["usage"]["prompt_tokens"]
    assert 1 <= added <= 5


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny-llava"]
    assert client.models.retrieve("tiny-llava").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def text(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


REFUSED = {
    "not JSON": (b'{"model": "tiny-llava", ', 400, None, "not valid JSON"),
    "not text": (b"\xff\xfe\x00", 400, None, "not valid JSON"),
    "deep": (b"[" * 20_000, 400, None, "not valid JSON"),
    "many values": (b"[" * 100_000, 400, None, "more than 20,000 JSON values"),
    "no object": ([], 400, None, "object"),
    "no messages": ({"model": "tiny-llava"}, 400, "messages", "required"),
    "empty": (chat(messages=[]), 400, "messages", "at least 1"),
    "a role": (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role", "'user'"),
    "text for number": (chat(temperature="hot"), 400, "temperature", "number"),
    "a wrong part": (
        chat(messages=[{"role": "user", "content": [{"type": "audio"}]}]),
        400,
        "messages.0.content.0",
        "audio",
    ),
    "cold": (chat(temperature=-1), 400, "temperature", "must be 0, or from"),
    "nan": (json.dumps(chat(temperature=float("nan"))).encode(), 400, "temperature", "finite"),
    "top_p": (chat(top_p=0), 400, "top_p", "from 1e-6 to 1"),
    "max_tokens": (chat(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
    "n": (chat(n=2), 400, "n", "n = 2"),
    "n as a boolean": (chat(n=True), 400, "n", "n = True"),
    "penalty": (chat(presence_penalty=0.5), 400, "presence_penalty", "0.5"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools", "tools"),
    **{
        name: (chat(**{name: value}), 400, name, f"does not support the field '{name}'")
        for name, value in {
            "guided_choice": ["a"],
            "guided_json": {},
            "structured_outputs": {"choice": ["a"]},
            "prompt_logprobs": 1,
            "chat_template": "x",
        }.items()
    },
    **{
        name: (chat(**{name: value}), 400, name, f"{name} = {value!r}: this server supports only")
        for name, value in {
            "min_tokens": 3,
            "stop_token_ids": [2],
            "ignore_eos": True,
            "logit_bias": {"5": 100},
            "response_format": {"type": "json_object"},
            "min_p": 0.1,
        }.items()
    },
    "misspelt": (chat(temprature=0), 400, "temprature", "did you mean 'temperature'?"),
    "misspelt inside": (
        chat(messages=[{"role": "user", "content": "x", "prefix": True}]),
        400,
        "messages.0.prefix",
        "messages.0: this server does not support the field 'prefix'",
    ),
    "misspelt in a part": (
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]),
        400,
        "messages.0.content.0.y",
        "the field 'y'",
    ),
    "a video": (
        chat(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}]),
        400,
        "messages.0.content.0",
        "The server reads no videos; send frames of the video as images",
    ),
    "top_logprobs": (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "equal to 20"),
    "top_logprobs alone": (chat(top_logprobs=2), 400, "top_logprobs", "needs logprobs = true"),
    "to continue a question": (
        chat(continue_final_message=True),
        400,
        "messages",
        "must be from the assistant",
    ),
    "no generation prompt": (
        chat(add_generation_prompt=False),
        400,
        "add_generation_prompt",
        "must be different",
    ),
    "another model": (chat(model="gpt-4"), 404, "model", "models are: tiny-llava"),
    "huge": (chat(messages=text("word " * 2000)), 400, "messages", "tokens"),
    "huger": (chat(messages=text("word " * 100_000)), 400, "messages", "500,000 characters"),
    "ends wrong": (
        chat(messages=[*text("x"), {"role": "assistant", "content": "y"}]),
        400,
        "messages",
        "human turn",
    ),
    "no image": (chat(messages=[user("x", data_url(b"hello"))]), 400, "messages", "none of PNG"),
    "SVG": (chat(messages=[user("x", data_url(b"<svg/>"))]), 400, "messages", "none of PNG"),
    "EPS": (chat(messages=[user("x", data_url(b"%!PS-Adobe"))]), 400, "messages", "none of PNG"),
    "not base64": (
        chat(messages=[user("x", "data:image/png;base64,???")]),
        400,
        "messages",
        "not valid base64",
    ),
    "pixels": (
        chat(messages=[user("x", data_url(huge_png()))]),
        400,
        "messages",
        "1200000000 pixels",
    ),
    "images": (chat(messages=[user("x", *[picture()] * 3)]), 400, "messages", "3 images"),
    "system's image": (
        chat(messages=[{**user("x", picture()), "role": "system"}, *text("y")]),
        400,
        "messages.0",
        "user messages",
    ),
    **{
        url: (chat(messages=[user("x", url)]), 400, "messages", why)
        for url, why in {
            "file:///etc/passwd": "is not supported",
            "/etc/passwd": "is not supported",
            "ftp://127.0.0.1/x.png": "is not supported",
            "http://example.com/x.png": "without --remote-images",
            "HTTPS://example.com/x.png": "without --remote-images",
        }.items()
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(address, client, case):
    body, status, param, reason = REFUSED[case]
    response = post(address, body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error["param"] == param, error
    assert reason in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert text_of(ask(client, [user(QUESTIONS[0], picture())])) == "red"


def test_refusals_of_http(address):
    large = chat(messages=text("x" * 2**21))
    assert post(address, large).status_code == 413
    pieces = (b"x" * 2**16 for _ in range(40))  # of no stated length
    url = f"{address}{CHAT}"
    assert httpx.post(url, content=pieces, headers=JSON).status_code == 413
    assert httpx.post(url, data={"model": "tiny-llava"}).status_code == 415
    assert httpx.get(url).status_code == 404
    assert "no such route" in httpx.post(f"{address}/v1/embeddings").json()["error"]["message"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    for path in ("/health", "/v1/models"):
        response = httpx.head(address + path)
        assert (response.status_code, response.content) == (200, b"")
    assert httpx.options(url).status_code == 404


SMALL = b'{"model": "tiny-llava", "messages": [%s]}'
USER = b'{"role": "user", "content": %s}'
COSTLY = {
    "messages": SMALL % (b"{}," * 300_000),
    "few messages": SMALL % (b"{}," * 90_000 + b"{}"),
    "parts": SMALL % (USER % (b"[" + b"{}," * 90_000 + b"{}]")),
    "texts": SMALL % (USER % (b"[" + b'{"type":"text","text":""},' * 25_000 + b"{}]")),
    "numbers": SMALL % (b"1," * 400_000),
    "another field": SMALL % USER + b', "x": [' + b"[]," * 300_000 + b"[]]}",
    "tools": b'{"tools": [' + b"{}," * 300_000 + b"{}]}",
    "depth": b'{"tools": ' + b"[" * 90_000,
    "digits": b'{"seed": ' + b"9" * 900_000 + b"}",
    "keys": b"{" + b",".join(b'"%d": 1' % number for number in range(90_000)) + b"}",
    "stop": json.dumps(chat(stop="x" * 900_000)).encode(),
    "stops": json.dumps(chat(stop=["x" * 900] * 900)).encode(),
}


@pytest.mark.parametrize("case", COSTLY)
def test_small_bodies_cost_little(address, case):
    before = resident(address)
    began = time.monotonic()
    response = post(address, COSTLY[case])
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert time.monotonic() - began < 2
    assert resident(address) - before < 100


def test_a_stop_of_the_longest_length_costs_little(address):
    body = chat(stop=["x" * 1000] * 16, seed=2, **LONG)
    usual = min(seconds(address, chat(seed=2, **LONG)) for _ in range(2))
    assert seconds(address, body) < 2 * usual + 1


def seconds(address: str, body: dict[str, object]) -> float:
    began = time.monotonic()
    assert post(address, body).status_code == 200
    return time.monotonic() - began


def test_one_client_leaves_places_to_others():
    from llava_jax.serving.limits import Limits, RequestError
    from llava_jax.serving.service import Service

    async def ask() -> None:
        with service.enter("a"), service.enter("a"):
            with pytest.raises(RequestError, match="2 requests from a are waiting") as full:
                service.enter("a")
            assert full.value.status == 429
            with service.enter("b"), pytest.raises(RequestError, match="3 requests are waiting"):
                service.enter("c")
        with service.enter("a"):
            pass

    service = Service({}, Limits(queue=3, client_queue=2))
    asyncio.run(ask())


def figures(address: str) -> str:
    return httpx.get(f"{address}/metrics").text


def wait_for(address: str, name: str, value: float) -> None:
    until = time.monotonic() + 30
    while metric(figures(address), name) != value:
        assert time.monotonic() < until, figures(address)
        time.sleep(0.02)


def test_a_full_queue_says_when_to_come_again(address):
    post(address, chat(**LONG))  # compiled
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda seed: post(address, chat(seed=seed, **LONG)), range(16)))
    assert {response.status_code for response in responses} == {200, 429}
    full = next(response for response in responses if response.status_code == 429)
    assert int(full.headers["Retry-After"]) >= 1
    assert full.json()["error"]["code"] == "queue_full"
    assert post(address, chat()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(address, stream):
    gone = 'llava_requests_total{code="499"}'
    before = metric(figures(address), gone)
    body = json.dumps(chat(stream=stream, seed=1, **LONG)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    )
    with connect(address) as raw:
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_for(address, "llava_requests_running", 1)
    wait_for(address, gone, before + 1)
    wait_for(address, "llava_requests_running", 0)
    wait_for(address, "llava_requests_waiting", 0)


def connect(address: str) -> Any:
    import socket

    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_metrics(address, client):
    before = figures(address)
    ask(client, [user(QUESTIONS[0], picture())])
    after = figures(address)
    grown = lambda name: metric(after, name) - metric(before, name)
    assert grown('llava_requests_total{code="200"}') == 1
    assert grown('llava_generated_tokens_total{model="tiny-llava"}') == 2
    assert 64 < grown('llava_prompt_tokens_total{model="tiny-llava"}') < 120
    assert grown("llava_request_seconds_count") == 1
    assert grown("llava_time_to_first_token_seconds_count") == 1
    assert metric(after, "process_resident_memory_bytes") > 10**8


def test_many_at_once_are_answered_as_one_is(client):
    asked = [[user(question, picture())] for question in QUESTIONS] + [text("hello")]
    alone = [text_of(ask(client, messages)) for messages in asked]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda messages: text_of(ask(client, messages)), asked + asked[:2])
    assert list(together) == alone + alone[:2]


def test_an_error_of_the_model_fails_its_requests_alone():
    """In this process, where a step can be made to fail."""
    from live_server import TINY

    from llava_jax.data.conversation import Turn
    from llava_jax.generation.assistant import Assistant
    from llava_jax.generation.prompts import Prompt
    from llava_jax.generation.sampling import GREEDY
    from llava_jax.pretrained.resolve import resolve
    from llava_jax.serving.limits import Limits, RequestError
    from llava_jax.serving.schema import Message
    from llava_jax.serving.service import Service

    assistant = Assistant.load(resolve(TINY), slots=2, max_length=64)
    healthy, fails = assistant.step, itertools.chain([True], itertools.repeat(False))
    assistant.step = lambda: 1 // 0 if next(fails) else healthy()
    service = Service({"tiny": assistant}, Limits())
    prompt = Prompt((Turn("human", "hello"),))

    async def answer() -> str:
        with service.enter("client") as ticket:
            messages = [Message(role="user", content="hello")]
            answer = await ticket.begin(
                "tiny", messages, service.images.fetch, new_tokens=9, sampling=GREEDY
            )
            async for _ in ticket.updates():
                pass
        return answer.reply.text

    async def both() -> str:
        service.start()
        with pytest.raises(RequestError, match="ZeroDivisionError") as failed:
            await answer()
        assert failed.value.status == 500
        return await answer()

    try:
        found = asyncio.run(both())
        assert service.engine.failure is None
        assert service.waiting == 0
    finally:
        service.stop()
    assistant.step = healthy
    assert found == "".join(assistant.stream(prompt, max_new_tokens=9)).strip()


def test_images_that_cost_much_hold_up_nobody():
    """Their decoding ends with their request, and others are answered beside it."""
    from hostile_images import jpeg

    slow = data_url(jpeg(4096, 70))
    body = chat(messages=[user("x", slow)])
    with server("--no-page", "--max-seconds", "2") as address:
        while post(address, chat(max_tokens=1)).status_code != 200:  # until it is compiled
            pass
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(post, address, body) for _ in range(4)]
            until, waited = time.monotonic() + 3, []
            while time.monotonic() < until:
                waited.append(seconds(address, chat(max_tokens=1)))
            statuses = [one.result().status_code for one in asked]
        assert set(statuses) <= {200, 400, 504}
        assert 504 in statuses
        assert max(waited) < 1.5
        began = time.monotonic()
    assert time.monotonic() - began < 10


def test_requests_have_an_end():
    """A request that takes too long is given up, and an engine that has ended says so."""
    from llava_jax.serving.limits import Limits, RequestError
    from llava_jax.serving.service import Service

    async def wait() -> None:
        with service.enter("client") as ticket:
            await ticket.read(lambda: asleep.wait(5))

    asleep, service = threading.Event(), Service({}, Limits(seconds=0.1))
    with pytest.raises(RequestError, match=r"longer than 0\.1 s") as late:
        asyncio.run(wait())
    asleep.set()
    assert (late.value.status, service.waiting) == (504, 0)
    service.engine.failure = "it broke"
    with pytest.raises(RequestError, match="it broke") as ended:
        asyncio.run(wait())
    assert ended.value.status == 503


def test_fetched_images_come_from_public_addresses_alone():
    with server("--no-page", "--remote-images") as address:
        for url in (
            f"{address}/x.png",
            "http://localhost/x.png",
            "http://169.254.169.254/latest/meta-data/",
            "https://[::1]/x.png",
            "http://[x/y.png",
        ):
            response = post(address, chat(messages=[user("x", url)]))
            assert response.status_code == 400
            assert "cannot be fetched" in response.json()["error"]["message"]
        body = chat(messages=[user("x", "file:///etc/passwd")])
        assert "is not supported" in post(address, body).json()["error"]["message"]
        assert post(address, chat()).status_code == 200


@pytest.mark.slow
def test_adapters_are_served_by_name(tmp_path):
    """Each answers as it does when it is served alone."""
    from tiny_adapter import write_adapter

    body = chat(messages=[user(QUESTIONS[0], picture())], max_tokens=8, logprobs=True)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    places = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    options = [part for name in places for part in ("--adapter", f"{name}={places[name]}")]
    with server("--no-page", *options) as address:
        names = [one["id"] for one in httpx.get(f"{address}/v1/models").json()["data"]]
        assert names == ["tiny-llava", "a", "b"]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda name: post(address, body | {"model": name}), names * 2))
        said = {name: one.json()["choices"] for name, one in zip(names * 2, found, strict=True)}
        again = [one.json()["choices"] for one in found[:3]]
        assert post(address, body | {"model": "c"}).status_code == 404
    assert [said[name] for name in names] == again
    for name, place in places.items():
        with server("--no-page", "--name", name, checkpoint=place) as address:
            assert post(address, body | {"model": name}).json()["choices"] == said[name]
    assert len({json.dumps(one) for one in said.values()}) == 3


@pytest.mark.slow
def test_64_clients_for_two_minutes(record_property):
    """No error but 429, every answer what it is alone, and memory that stays as it is."""
    asked = [[user(question, picture())] for question in QUESTIONS] + [text("hello")]
    asked += [[user(q, p)] for q in QUESTIONS for p in pictures(range(1, 9))]
    with server("--no-page", "--max-queue", "48") as address:
        alone = [post(address, chat(messages=messages)).json() for messages in asked]
        known = [whole["choices"][0]["message"]["content"] for whole in alone]
        found = asyncio.run(load(address, list(zip(asked, known, strict=True)), seconds=120.0))
        again = [post(address, chat(messages=messages)).json() for messages in asked]
    assert [whole["choices"][0]["message"]["content"] for whole in again] == known
    for name, value in found.items():
        record_property(name, value)
    print(found)
    assert found["answers"] > 1000
    assert found["rss_end"] < 1.05 * found["rss_20s"]


def pictures(numbers: Iterable[int]) -> list[str]:
    return [data_url((RED_TRIANGLE.parent / f"{n}.png").read_bytes()) for n in numbers]


async def load(
    address: str, asked: list[tuple[list[dict[str, Any]], str]], *, seconds: float
) -> dict[str, float]:
    """64 clients that ask one thing after another, whole and streamed."""
    found = dict.fromkeys(("answers", "full", "rss_20s", "rss_end"), 0.0)
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            messages, known = draw.choice(asked)
            stream = draw.random() < 0.5
            body = chat(messages=messages, stream=stream)
            response = await http.post(f"{address}{CHAT}", json=body)
            if response.status_code == 429:
                found["full"] += 1
                await asyncio.sleep(float(response.headers["Retry-After"]) * draw.random())
                continue
            assert response.status_code == 200, response.text
            assert said(response) == known
            found["answers"] += 1

    async def watch() -> None:
        for name, at in (("rss_20s", until - seconds + 20), ("rss_end", until)):
            await asyncio.sleep(at - time.monotonic())
            text = (await http.get(f"{address}/metrics")).text
            found[name] = metric(text, "process_resident_memory_bytes") / 2**20

    limits = httpx.Limits(max_connections=70)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        await asyncio.gather(watch(), *(client(number) for number in range(64)))
    return found


def said(response: Any) -> str:
    """The text of an answer, whole or streamed to its very end."""
    if response.headers["content-type"] == "application/json":
        return response.json()["choices"][0]["message"]["content"]
    *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] == "stop"
    return "".join(choice["delta"].get("content", "") for choice in choices)
