"""Twenty LoRA steps beside transformers + peft + torch's AdamW: the same losses."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from training import MODEL, change, random_batch

from llava_jax import pretrained
from llava_jax.config import (
    BatchConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
)
from llava_jax.data.batching import Batch
from llava_jax.hf.model_config import read_model_config
from llava_jax.hf.peft import save_adapter
from llava_jax.models.layers import merge
from llava_jax.models.llava import head_logits
from llava_jax.program import Program, build_program
from llava_jax.sharding import make_mesh
from llava_jax.step import init_state

STEPS, SIZE, GROUP = 20, 8, 2

CONFIG = TrainConfig(
    name="parity",
    dtype="float32",
    tune=TuneConfig(llm="lora", vision="frozen", projector="full"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0),
    batch=BatchConfig(global_size=SIZE, loss_group=GROUP),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, projector_learning_rate=2e-4, warmup_ratio=0.1, weight_decay=0.1
    ),
)
VARIANTS = {
    "one batch": CONFIG,
    "accumulated": change(CONFIG, batch={"micro_size": GROUP}),
    "sample mean, clipped": change(
        CONFIG,
        batch={"micro_size": GROUP, "loss_weighting": "sample_mean"},
        optimizer={"clip_norm": 0.1},
    ),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft 0.21 with transformers 5
    pytest.mark.parity("training", "peft", "transformers"),
]


def hf_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of a batch of ours; Hugging Face takes only the images that are there."""
    images = [
        pixels
        for row, ids in zip(batch.pixel_values, batch.input_ids, strict=True)
        for pixels in row[: int((ids == MODEL.image_token_id).sum()) // MODEL.image_tokens]
    ]
    return model(
        input_ids=torch.tensor(batch.input_ids).long(),
        attention_mask=torch.tensor(batch.segment_ids),
        pixel_values=torch.tensor(np.stack(images)),
    ).logits


def ours(
    config: TrainConfig, base: Path, adapter: Path
) -> tuple[list[float], Program, dict[str, jax.Array]]:
    """Trains with this package; leaves the adapter it starts from in `adapter`."""
    model_config = read_model_config(base)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, model_config, STEPS, mesh)
    params = pretrained.load(base, model_config, program.abstract, seed=3)
    trainable = {path: params.pop(path) for path in program.trainable}
    save_adapter(
        adapter, trainable, program.adapters, model_config, base_name=None, fingerprint=None
    )
    state = init_state(program.state, trainable, seed=3)
    losses = []
    with jax.set_mesh(mesh):
        for step in range(STEPS):
            batch = program.place(random_batch(step, SIZE))
            state, metrics = program.train_step(state, params, batch)
            losses.append(metrics["loss"].item())
    save_adapter(
        adapter.with_name("trained"),
        state.trainable,
        program.adapters,
        model_config,
        base_name=None,
        fingerprint=None,
    )
    return losses, program, params | state.trainable


def theirs(config: TrainConfig, hf: torch.nn.Module, adapter: Path) -> list[float]:
    """The same with torch, written as LLaVA's trainer does it."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(hf), adapter, is_trainable=True).train()
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projector = [p for name, p in trains if "multi_modal_projector" in name]
    biases = [p for p in projector if p.ndim == 1]
    recipe = config.optimizer
    rates = recipe.learning_rate, recipe.projector_learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in trains if "lora" in name], "lr": rates[0]},
            {"params": [p for p in projector if p.ndim > 1], "lr": rates[1]},
            {"params": biases, "lr": rates[1], "weight_decay": 0.0},
        ],
        betas=(recipe.b1, recipe.b2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    warmup = math.ceil(recipe.warmup_ratio * STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            step / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        ),
    )

    def nll(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.tensor(np.where(batch.loss_mask, batch.input_ids, -100)).long()[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            hf_logits(model, batch)[:, :-1].transpose(1, 2), labels, reduction="none"
        )
        return losses, labels != -100

    def loss_of(batch: Batch) -> torch.Tensor:
        losses, mask = nll(batch)
        if config.batch.loss_weighting == "token":
            return losses.sum() / mask.sum()
        groups = losses.reshape(SIZE // GROUP, -1).sum(1), mask.reshape(SIZE // GROUP, -1).sum(1)
        return (groups[0] / groups[1]).mean()

    losses = []
    for step in range(STEPS):
        loss = loss_of(random_batch(step, SIZE))
        loss.backward()
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_([p for _, p in trains], recipe.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def apart(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two trajectories."""
    return np.max(np.abs(np.divide(ours, theirs) - 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_twenty_steps_beside_peft(
    name: str, make_hf: Callable, saved: Callable, assert_parity: Callable, tmp_path: Path
):
    config = VARIANTS[name]
    losses, program, params = ours(config, saved("gqa"), tmp_path / "start")
    expected = theirs(config, make_hf("gqa"), tmp_path / "start")
    assert_parity("losses, relative", apart(losses, expected), 1e-4)
    assert len(set(losses)) == STEPS

    batch = random_batch(0, SIZE)
    base = copy.deepcopy(make_hf("gqa"))
    with torch.no_grad():
        before = hf_logits(base, batch).numpy()
        trained = peft.PeftModel.from_pretrained(base, tmp_path / "trained").eval()
        exported = hf_logits(trained, batch).numpy()
    model = merge(program.graph, params)
    on_device = program.place(batch)
    hidden = model.hidden_states(on_device.input_ids, on_device.segment_ids, on_device.pixel_values)
    own = np.asarray(head_logits(hidden, model.llm.head))
    real = batch.segment_ids > 0
    limit = np.abs(exported).max()
    assert np.abs(own - exported)[real].max() < 2e-5 * limit
    assert np.abs(exported - before)[real].max() > 1e-2 * limit  # training did something
