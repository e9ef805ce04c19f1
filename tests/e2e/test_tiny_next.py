"""The embedded model of the NeXT kind sees in tiles what an image as a whole does not show."""

import json
import shutil
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from live_server import CHAT, JSON, data_url, server, user
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import metrics, popen
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from llava_jax import LlavaModel, generate
from llava_jax.cli import check_data, evaluate
from llava_jax.config.presets import TINY_MODELS
from llava_jax.generation.messages import to_prompt
from llava_jax.generation.prompts import PromptReader

TINY = TINY_MODELS["tiny-next"]
MAX_BYTES = 10**6
ONLY_TILES = ("pattern", "place")
NEW_TOKENS = 64

CONFIG = """
from llava_jax.config import *
config = TrainConfig(
    name="run", output_dir={output!r}, init_from={base!r}, steps={steps}, dtype="float32",
    tune=TuneConfig(llm={llm!r}, vision="frozen", projector="full"),
    lora=LoraConfig(rank=8, alpha=16.0, dropout=0.0),
    data=DataConfig(path={train!r}, image_root={root!r}, eval_path={test!r}, max_length=128,
                    buckets=(), workers=0),
    batch=BatchConfig(global_size=16, micro_size=16),
    memory=MemoryConfig(plan="manual", remat="none"),
    optimizer=OptimizerConfig(learning_rate=5e-3, clip_norm=1.0),
    eval=EvalConfig(batch_size=64, examples=3),
)
"""


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("tiny_next_data")


@pytest.fixture(scope="module")
def fresh(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file with one question about each of 180 new conversations, of 240 new images."""
    return tool.write_data(tmp_path_factory.mktemp("fresh"), "fresh", 180, seed=7, turns=1)


@pytest.fixture(scope="module")
def records(fresh: Path) -> list[dict[str, Any]]:
    return json.loads(fresh.read_text())


@pytest.fixture(scope="module")
def untiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose only tile is the whole image at the size of the vision tower."""
    folder = tmp_path_factory.mktemp("untiled") / "model"
    return without_tiles(shutil.copytree(TINY, folder))


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return LlavaModel.from_pretrained(TINY)


def without_tiles(folder: Path) -> Path:
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["image_grid_pinpoints"] = [[32, 32]]
        (folder / name).write_text(json.dumps(settings))
    return folder


def text_of(record: dict[str, Any]) -> str:
    return record["conversations"][0]["value"].replace("<image>\n", "")


def answer_of(record: dict[str, Any]) -> str:
    return record["conversations"][1]["value"]


def images_of(record: dict[str, Any], data: Path) -> list[Image.Image]:
    return [Image.open(data.parent / image) for image in record["image"]]


def evaluated(checkpoint: Path, data: Path, output: Path) -> dict[str, float]:
    """The accuracy in each category, as the command says."""
    own = ["--task", "json", "--data", str(data), "--output", str(output)]
    assert evaluate.main([str(checkpoint), *own]) == 0
    categories = json.loads((output / "scores.json").read_text())["scores"]["categories"]
    return {name: scores["accuracy"] for name, scores in categories.items()}


def test_it_is_small():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= MAX_BYTES


def test_the_patterns_vanish_at_the_size_of_the_tower(records, fresh, model):
    """Not a single level of 255 tells images of one color apart. A guess is mostly wrong."""
    reader = PromptReader.open(TINY, model.config)
    for image in (image for record in records for image in images_of(record, fresh)):
        whole, *tiles = reader.transform.prepare(image, tiled=True).pixels
        is_plain = lambda pixels: bool((pixels == pixels[:, :1, :1]).all())
        assert is_plain(whole)
        assert not all(map(is_plain, tiles))
    for category in ONLY_TILES:
        answers = Counter(answer_of(one) for one in records if one["category"] == category)
        assert max(answers.values()) <= 0.55 * answers.total()


def test_it_answers_with_tiles(fresh: Path, tmp_path: Path):
    scores = evaluated(TINY, fresh, tmp_path / "out")
    assert min(scores.values()) >= 0.95, scores


def test_it_guesses_without_tiles(untiled: Path, fresh: Path, tmp_path: Path):
    scores = evaluated(untiled, fresh, tmp_path / "out")
    assert max(scores[name] for name in ONLY_TILES) <= 0.6, scores
    assert scores["color"] >= 0.5  # of eight colors


def test_it_tells_several_images_apart(records, fresh: Path, model: LlavaModel):
    pairs = [record for record in records if len(record["image"]) == 2][:16]
    given = model.generate_batch(list(map(text_of, pairs)), [images_of(r, fresh) for r in pairs])
    right = sum(map(str.__eq__, given, map(answer_of, pairs)))
    assert right >= 15
    first, second = images_of(pairs[0], fresh)
    question = "what color is the second image?"
    both = {model.chat(question, pair) for pair in ((first, second), (second, first))}
    colours = {model.chat("what color is the image?", image) for image in (first, second)}
    assert both == colours
    messages = [
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text"}]},
        {"role": "assistant", "content": "gray"},
        {"role": "user", "content": "which pattern is in the image?"},
    ]
    messages[0]["content"][1]["text"] = "what color is the image?"
    assert model.chat(messages) == model.chat("which pattern is in the image?", first)


@pytest.mark.parametrize("count", [1, 2])
def test_transformers_says_the_same(count: int, records, fresh: Path, model: LlavaModel):
    """Same ids, same pixels, and the same greedy tokens."""
    processor = AutoProcessor.from_pretrained(TINY)
    theirs = LlavaNextForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    reader = PromptReader.open(TINY, model.config)
    asked = [record for record in records if len(record["image"]) == count][:4]
    for record in asked:
        images = images_of(record, fresh)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text_of(record)}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        batch = processor(images=images, text=text, return_tensors="pt")
        ours = reader(to_prompt(text_of(record), images))
        np.testing.assert_array_equal(ours.input_ids, batch["input_ids"][0].numpy())
        pixels = batch["pixel_values"].flatten(0, 1).numpy()
        np.testing.assert_allclose(ours.pixel_values, pixels, atol=1e-6)
        with torch.no_grad():
            wanted = theirs.generate(
                **batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
        arrays = {name: value.numpy() for name, value in batch.items()}
        given = generate(model, **arrays, max_new_tokens=NEW_TOKENS, eos_token_id=())
        np.testing.assert_array_equal(given, wanted[:, -NEW_TOKENS:].numpy())
        said = processor.decode(given[0]).split("</s>")[0].strip()
        assert said == model.chat(text_of(record), images)


def test_a_server_answers(records, fresh: Path):
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    pairs = [record for record in records if len(record["image"]) == 2][:3]
    right = 0
    with server("--no-page", "--slots", "2", checkpoint=TINY) as address:
        for record in [*pairs, *records[:3]]:
            urls = [data_url((fresh.parent / image).read_bytes()) for image in record["image"]]
            message = user(text_of(record), *urls)
            message["content"].append(message["content"].pop(0))  # as in training, images first
            body = {"model": TINY.name, "messages": [message], "temperature": 0}
            request = urllib.request.Request(
                f"{address}{CHAT}", json.dumps(body).encode(), headers=JSON
            )
            with urllib.request.urlopen(request) as reply:
                message = json.load(reply)["choices"][0]["message"]
            right += message["content"].strip() == answer_of(record)
    assert right >= 5


def test_the_data_of_a_run_is_checked(fresh: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lost = json.loads(fresh.read_text())[:20]
    lost[4]["image"] = ["lost.png"]
    (tmp_path / "some.json").write_text(json.dumps(lost))
    own = ["--config", "tiny_next", "--data.eval-path", "None", "--data.image-root"]
    status = check_data.main([*own, str(fresh.parent), "--data.path", "some.json"])
    said = capsys.readouterr().out
    assert status == 1
    assert "lost.png" in said


@pytest.fixture(scope="module")
def lesson(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lesson")
    tool.write_data(folder, "train", 640, seed=11, turns=3)
    tool.write_data(folder, "test", 96, seed=12, turns=1)
    return folder


@pytest.mark.parametrize(
    ("llm", "steps"), [("lora", 60), pytest.param("frozen", 200, marks=pytest.mark.slow)]
)
def test_a_run_learns_with_tiles_only(llm: str, steps: int, lesson: Path, tmp_path: Path):
    """The model has forgotten its projector, and learns a new one, with adapters or without."""
    accuracies = {}
    for name in ("tiled", "untiled"):
        base = Path(shutil.copytree(TINY, tmp_path / name))
        forget_projector(base)
        if name == "untiled":
            without_tiles(base)
        paths = {"train": lesson / "train.json", "test": lesson / "test.json", "root": lesson}
        paths |= {"base": base, "output": tmp_path / f"{name}-runs"}
        fields = {field: str(path) for field, path in paths.items()}
        (tmp_path / f"{name}.py").write_text(CONFIG.format(**fields, steps=steps, llm=llm))
        process = popen(tmp_path / f"{name}.py", JAX_NUM_CPU_DEVICES=1)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        run = paths["output"] / "run"
        assert len(metrics(run)) == steps
        assert "data:image/jpeg;base64," in (run / "report.html").read_text()
        last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
        right = {name: last["exact"][name] / count for name, count in last["samples"].items()}
        accuracies[name] = [right[category] for category in ONLY_TILES]
        assert right["color"] >= 0.5  # of eight colors
    assert min(accuracies["tiled"]) >= 0.85
    assert max(accuracies["untiled"]) <= 0.6, accuracies


def forget_projector(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if "multi_modal_projector" in name:
            new = torch.rand(value.shape, generator=generator) * 2 - 1
            weights[name] = (new * value.shape[-1] ** -0.5).to(value.dtype)
    save_file(weights, file, {"format": "pt"})
