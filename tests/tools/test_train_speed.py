"""tools/train_speed.py: both programs get the same samples, and a run is measured until its end."""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_training import MODEL

from llava_jax.config import LlmConfig, ModelConfig, VisionConfig
from llava_jax.speed.case import BASE, load_case
from llava_jax.training.inputs import find_model, open_inputs

TOOLS = Path(__file__).parents[2] / "tools"

SMALL = ModelConfig(
    VisionConfig(28, 14, 32, 64, 3, 4), LlmConfig(**{**vars(MODEL.llm), "vocab_size": 512})
)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.delitem(sys.modules, "speed", raising=False)
    return importlib.import_module("speed.train")


def test_both_programs_have_the_same_samples(tool: ModuleType, tmp_path: Path):
    """Tokens, labels and, to less than two levels of 255, pixels."""
    peer_loop = importlib.import_module("speed.peer_loop")
    tool.prepare(tmp_path, SMALL, (20, 60), 4, "float32")
    case = load_case(tmp_path)
    inputs = open_inputs(case.config, *find_model(case.config, tmp_path / BASE))
    batches = inputs.train_batches()
    ours = next(batches)
    batches.close()
    samples = peer_loop.Samples(inputs, tmp_path / BASE, peer_loop.torch.float32)
    collate = peer_loop.Collate(case.model.pad_token_id)
    theirs = collate([samples[number] for number in inputs.order.batch(0).tolist()])
    length = theirs["input_ids"].shape[1]
    np.testing.assert_array_equal(theirs["input_ids"], ours.input_ids[:, :length])
    np.testing.assert_array_equal(theirs["attention_mask"], ours.segment_ids[:, :length] > 0)
    np.testing.assert_array_equal(theirs["labels"] != -100, ours.loss_mask[:, :length])
    assert not ours.segment_ids[:, length:].any()
    factors, added = (ours.pixel_scale[:, i, :, None, None] for i in range(2))
    pixels = ours.pixel_values[:, 0] * factors + added
    np.testing.assert_allclose(theirs["pixel_values"].numpy(), pixels, atol=2 / 255 / 0.26)


@pytest.mark.slow
def test_both_programs_train(tool: ModuleType):
    given = argparse.Namespace(batch=2, rounds=1, warmup=1, steps=3, peer_dtype="float32")
    found = tool.compare(SMALL, (20, 60), given, ["--data.workers", "0"])
    assert found.ours > 0
    assert found.theirs > 0
    assert "2048 (padding" in found.buckets


def test_the_speed_is_the_median_of_the_steps(tool: ModuleType):
    rows = [{"tokens": tokens, "seconds": 2} for tokens in (10, 400, 20)]
    assert tool.median_speed(rows) == 10
