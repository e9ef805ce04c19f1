"""Twenty steps of each recipe beside transformers, peft and torch's AdamW: the same losses."""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from tiny_training import MODEL, change, random_batch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.trainer_pt_utils import get_parameter_names

from llava_jax.config import (
    BatchConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
)
from llava_jax.data.batch import Batch
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.layers import Params
from llava_jax.models.llava import head_logits
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.model_config import read_model_config, write_model_config
from llava_jax.pretrained.peft import save_adapter
from llava_jax.pretrained.save import save_params
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import forward, init_state, normalised

STEPS, SIZE, GROUP = 20, 8, 2
LIMIT = 1e-5  # rounding makes less than 1e-6; norms that decay, 1e-4

CONFIG = TrainConfig(
    name="parity",
    dtype="float32",
    tune=TuneConfig(llm="lora", vision="frozen", projector="full"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0),
    vision_lora=LoraConfig(rank=2, alpha=3.0, dropout=0.0, targets=("q_proj", "out_proj", "fc2")),
    batch=BatchConfig(global_size=SIZE, loss_group=GROUP),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, projector_learning_rate=2e-4, warmup_ratio=0.1, weight_decay=0.1
    ),
)
FULL = change(CONFIG, tune={"llm": "full"}, optimizer={"learning_rate": 1e-3})
STAGE_1 = change(
    CONFIG,
    tune={"llm": "frozen"},
    data={"template": "plain"},
    optimizer={"learning_rate": 1e-3, "projector_learning_rate": None},
)
CASES = {  # a recipe, and the model it starts from
    "LoRA, one batch": (CONFIG, "gqa"),
    "LoRA, accumulated": (change(CONFIG, batch={"micro_size": GROUP}), "gqa"),
    "LoRA, sample mean, clipped": (
        change(
            CONFIG,
            batch={"micro_size": GROUP, "loss_weighting": "sample_mean"},
            optimizer={"clip_norm": 0.1},
        ),
        "gqa",
    ),
    "LoRA in decoder and tower": (
        change(CONFIG, tune={"vision": "lora"}, optimizer={"vision_learning_rate": 4e-3}),
        "gqa",
    ),
    "projector only": (STAGE_1, "gqa"),
    "full": (change(FULL, batch={"micro_size": GROUP}), "gqa"),
    "full, tied embeddings": (FULL, "tied"),
    "full, tower too": (
        change(FULL, tune={"vision": "full"}, optimizer={"vision_learning_rate": 5e-4}),
        "gqa",
    ),
    "LoRA in Qwen2 and SigLIP": (
        change(CONFIG, tune={"vision": "lora"}, vision_lora={"rank": 4, "alpha": 8.0}),
        "qwen2_siglip",
    ),
    "full, Qwen3": (FULL, "qwen3"),
}
PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "linear_1": 3},
    "alpha_pattern": {"down_proj": 5.0, r"layers\.0\.mlp\.up_proj": 2.0},
}
CASES |= {
    "LoRA with patterns, in the projector too": (
        change(
            CONFIG,
            tune={"projector": "lora"},
            lora=PATTERNS | {"targets": ("q_proj", "up_proj", "down_proj")},
            batch={"micro_size": GROUP},
        ),
        "gqa",
    ),
    "rsLoRA of some layers, embedding and head in full": (
        change(
            CONFIG,
            lora={
                "use_rslora": True,
                "layers_to_transform": (0, 2),
                "modules_to_save": ("embed_tokens", "lm_head"),
            },
        ),
        "gqa",
    ),
    "LoRA and tokens": (change(CONFIG, lora={"trainable_token_indices": (5, 9, 33)}), "gqa"),
    "LoRA and tokens, tied": (change(CONFIG, lora={"trainable_token_indices": (5, 9)}), "tied"),
}
SHORT = (
    "LoRA with patterns, in the projector too",
    "LoRA and tokens",
    *("LoRA, sample mean, clipped", "projector only", "full, tied embeddings"),
    *("LoRA in Qwen2 and SigLIP", "full, Qwen3"),
)
PARTS = {
    "llm": "language_model|lm_head|image_newline",
    "vision": "vision_tower",
    "projector": "projector",
}
"""The words in Hugging Face's names that tell our three parts."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft 0.21 with transformers 5
    pytest.mark.parity("training", "peft", "transformers"),
]


def step_batch(config: TrainConfig, step: int) -> Batch:
    """A step's samples; the plain template learns everything but images."""
    batch = random_batch(step, SIZE)
    if config.data.template != "plain":
        return batch
    words = (batch.segment_ids > 0) & (batch.input_ids != MODEL.image_token_id)
    return dataclasses.replace(batch, loss_mask=words)


def hf_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of a batch of ours; Hugging Face takes only the images that are there."""
    images = [
        pixels
        for row, ids in zip(np.asarray(normalised(batch)), batch.input_ids, strict=True)
        for pixels in row[: int((ids == MODEL.image_token_id).sum()) // MODEL.image_tokens]
    ]
    return model(
        input_ids=torch.tensor(batch.input_ids).long(),
        attention_mask=torch.tensor(batch.segment_ids > 0).long(),
        pixel_values=torch.tensor(np.stack(images)),
    ).logits


def save(program: Program, params: Params, directory: Path) -> None:
    """Writes what a run leaves: its adapter, or the whole model."""
    config = program.model_config
    if program.adapters:
        # PEFT loads a tower only as a whole, with the layers after the feature layer.
        tower = "vision.embeddings.patch_embedding.weight"
        whole = "vision." if tower in program.trainable else "none"
        kept = lambda path: path in program.trainable or path.startswith(whole)
        trained = {path: value for path, value in params.items() if kept(path)}
        names = {"base_name": None, "fingerprint": None}
        save_adapter(directory, trained, program.adapters, config, **names)
    else:
        save_params(params, directory, config)
        write_model_config(config, directory, "float32")


def opened(config: TrainConfig, base: torch.nn.Module, directory: Path) -> torch.nn.Module:
    """What `save` wrote, in torch; what the recipe trains requires gradients."""
    if config.tune.has_adapters:
        base = copy.deepcopy(base)
        return peft.PeftModel.from_pretrained(base, directory, is_trainable=True)
    model = type(base).from_pretrained(directory, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(config.tune, part_of(name)) == "full")
    return model


def part_of(name: str) -> str:
    (part,) = (part for part, words in PARTS.items() if any(w in name for w in words.split("|")))
    return part


def ours(
    config: TrainConfig,
    base: Path,
    start: Path,
    batch_of: Callable[[TrainConfig, int], Batch] = step_batch,
) -> tuple[list[float], Program, Params]:
    """Trains with this package; leaves what it starts from in `start`, the end in "trained"."""
    model_config = read_model_config(base)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, model_config, STEPS, mesh)
    adapters = {"adapters": program.adapters}
    params = load_weights(base, model_config, program.abstract, seed=3, **adapters)
    save(program, params, start)
    trainable = {path: params.pop(path) for path in program.trainable}
    state = init_state(program.state, trainable, seed=3)
    losses = []
    with jax.set_mesh(mesh):
        for step in range(STEPS):
            batch = program.device_put(batch_of(config, step))
            state, metrics = program.train_step(state, params, batch)
            losses.append(metrics["loss"].item())
    params |= state.trainable
    save(program, params, start.with_name("trained"))
    return losses, program, params


def groups(recipe: OptimizerConfig, model: torch.nn.Module) -> list[dict]:
    """Parameters as LLaVA's trainer groups them: norms and biases decay in no group."""
    rates = {
        "llm": recipe.learning_rate,
        "vision": recipe.vision_learning_rate or recipe.learning_rate,
        "projector": recipe.projector_learning_rate or recipe.learning_rate,
    }
    norms = [torch.nn.LayerNorm, LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm]
    decaying = get_parameter_names(model, norms, ["bias"])
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[rates[part_of(name)], name in decaying].append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (rate, decays), parameters in found.items()
    ]


def theirs(
    config: TrainConfig,
    hf: torch.nn.Module,
    start: Path,
    batch_of: Callable[[TrainConfig, int], Batch] = step_batch,
    logits_of: Callable[[torch.nn.Module, Batch], torch.Tensor] = hf_logits,
) -> list[float]:
    """The same with torch, written as LLaVA's trainer does it."""
    model = opened(config, hf, start).train()
    recipe = config.optimizer
    optimizer = torch.optim.AdamW(
        groups(recipe, model), betas=(recipe.b1, recipe.b2), eps=recipe.eps
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
            logits_of(model, batch)[:, :-1].transpose(1, 2), labels, reduction="none"
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
        loss = loss_of(batch_of(config, step))
        loss.backward()
        if recipe.clip_norm:
            trains = [p for p in model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trains, recipe.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def apart(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two trajectories."""
    return np.max(np.abs(np.divide(ours, theirs) - 1))


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_twenty_steps_beside_torch(
    name: str, make_hf: Callable, saved: Callable, assert_parity: Callable, tmp_path: Path
):
    config, variant = CASES[name]
    base = make_hf(variant)
    losses, program, params = ours(config, saved(variant), tmp_path / "start")
    assert_parity(
        "losses, relative", apart(losses, theirs(config, base, tmp_path / "start")), LIMIT
    )
    assert len(set(losses)) == STEPS

    batch = step_batch(config, 0)
    with torch.no_grad():
        before = hf_logits(base, batch).numpy()
        exported = hf_logits(opened(config, base, tmp_path / "trained").eval(), batch).numpy()
    on_device = program.device_put(batch)
    own = np.asarray(head_logits(*forward(program.graphdef, params, on_device, None)))
    real = batch.segment_ids > 0
    relative = lambda x, y: np.abs(x - y)[real].max() / np.abs(y).max()
    assert_parity("logits of the export, of the largest", relative(own, exported), 2e-5)
    assert relative(before, exported) > 1e-2  # training did something
