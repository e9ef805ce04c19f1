"""The model that lmms-eval sees, called as its evaluator calls it; lmms-eval need not be there."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava_jax.data.conversation import Turn
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.assistant import Assistant, Reply
from llava_jax.generation.sampling import Sampling


@dataclass
class Result:
    text: str
    token_counts: Any = None


class Base:
    def __init__(self):
        self.task_dict: dict = {}
        self.cached: list = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *row: self.cached.append(row))


STUBS = {
    "lmms_eval.api.instance": {"GenerationResult": Result, "Instance": Any, "TokenCounts": tuple},
    "lmms_eval.api.model": {"lmms": Base},
    "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
    "loguru": {"logger": SimpleNamespace(warning=lambda _: None)},
}


@pytest.fixture
def lmms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """llava_jax.evals.lmms_eval, on stubs of what it imports of lmms-eval."""
    stubs = STUBS | {name: {} for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    for name, contents in stubs.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llava_jax.evals.lmms_eval", raising=False)
    module = importlib.import_module("llava_jax.evals.lmms_eval")
    module.TokenCounts = lambda *counts: counts
    yield module
    sys.modules.pop("llava_jax.evals.lmms_eval", None)


class Echo(Assistant):
    """Answers with the question; refuses questions with "bad" in them."""

    def __init__(self):
        self.calls: list[tuple[int, Sampling, tuple[str, ...]]] = []

    def answer_all(self, prompts, *, max_new_tokens, sampling, stop, refused):
        self.calls.append((max_new_tokens, sampling, stop))
        found = []
        for number, prompt in enumerate(prompts):
            text = prompt.turns[-1].text
            if "bad" in text:
                refused(number, SampleError("it is bad"))
            else:
                found.append((number, Reply(text.split("\n")[-1], "stop", 5, 2)))
        yield from reversed(found)


def user(*parts: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_requests_are_answered_in_their_order(lmms, monkeypatch):
    loaded: dict[str, Any] = {}
    echo = Echo()
    monkeypatch.setattr(lmms, "resolve", lambda source, base: loaded.update(base=base) or source)
    monkeypatch.setattr(Assistant, "load", lambda *a, **k: loaded.update(k, source=a[0]) or echo)
    arguments = {"batch_size": "2", "max_batch_size": None, "device": "cuda:0"}
    model = lmms.LlavaJax(pretrained="run", base="b", **arguments)
    assert not model.is_simple
    assert loaded["source"] == "run"
    assert (loaded["slots"], loaded["base"], loaded["quantize"]) == (2, "b", "as_trained")
    picture = Image.new("RGB", (2, 2))
    model.task_dict = {"task": {"test": ["one", "bad", "three", "four"]}}
    short, long = {"max_new_tokens": 4}, {"max_new_tokens": 9, "until": ["\n\n"]}
    requests = [
        SimpleNamespace(
            args=("context", lambda doc: [user(picture, doc)], settings, number, "task", "test")
        )
        for number, settings in enumerate([short, short, long, short])
    ]
    results = model.generate_until(requests)
    assert [result.text for result in results] == ["one", "", "three", "four"]
    assert results[0].token_counts == (5, 2)
    assert echo.calls == [(4, Sampling(), ()), (9, Sampling(), ("\n\n",))]
    assert sorted(row[2] for row in model.cached) == ["", "four", "one", "three"]
    assert model.generate_until([]) == []


def test_messages_become_a_prompt(lmms):
    pictures = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    system = {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    messages = [system, user(pictures[0], "What?"), answer, user("And <image>", pictures[1])]
    prompt = lmms.to_prompt(messages)
    assert prompt.turns == (
        Turn("system", "Be short."),
        Turn("human", "<image>\nWhat?"),
        Turn("gpt", "Red."),
        Turn("human", "And <image>\n"),
    )
    assert prompt.images == tuple(pictures)
    video = {"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}
    with pytest.raises(ConfigError, match="text and images"):
        lmms.to_prompt([video])


def test_a_model_with_tiles_answers(lmms, load_tool, tmp_path: Path):
    tool = load_tool("tiny_next_data")
    rows = json.loads(tool.write_data(tmp_path, "asked", 24, seed=3, turns=1).read_text())
    model = lmms.LlavaJax(pretrained="tiny-next", batch_size="4")
    model.task_dict = {"task": {"test": rows}}

    def asked(row: dict[str, Any]) -> list[dict[str, Any]]:
        images = [Image.open(tmp_path / image) for image in row["image"]]
        return [user(*images, row["conversations"][0]["value"])]

    requests = [
        SimpleNamespace(args=("context", asked, {"max_new_tokens": 8}, number, "task", "test"))
        for number in range(len(rows))
    ]
    texts = [result.text for result in model.generate_until(requests)]
    expected = [row["conversations"][1]["value"] for row in rows]
    assert sum(map(str.__eq__, texts, expected)) >= 22


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, (256, Sampling(), ())),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0}, (256, Sampling(), ())),
        ({"temperature": 0.7, "top_p": None}, (256, Sampling(0.7), ())),
        ({"do_sample": True, "temperature": 1, "top_k": 5}, (256, Sampling(1.0, 5), ())),
        ({"until": "\n", "max_new_tokens": 1, "num_beams": 1}, (1, Sampling(), ("\n",))),
    ],
)
def test_settings_of_tasks(lmms, given, read):
    assert lmms.read_settings(given) == read


def test_what_is_not_known_is_refused(lmms):
    with pytest.raises(ConfigError, match="beams"):
        lmms.LlavaJax(pretrained="run", beams=3)
