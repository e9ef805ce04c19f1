"""Every preset of a real size builds, traces and shards, without a weight."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from llava_jax.config import (
    LLAVA_7B,
    LLAVA_13B,
    LLAVA_LLAMA3_8B,
    LLM_LINEARS,
    VISION_LINEARS,
    LlmConfig,
    MeshConfig,
    Parts,
    TrainConfig,
    TuneConfig,
    load_config,
)
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import ConfigError
from llava_jax.train_step.optimizer import learning_rates
from llava_jax.train_step.program import build_program

CONFIGS = Path(__file__).parents[2] / "configs"

SIZES = {"7b": LLAVA_7B, "13b": LLAVA_13B, "llama3_8b": LLAVA_LLAMA3_8B}
WHOLE = {"7b": 7_063_427_072, "13b": 13_351_494_656}
PROJECTOR = {"7b": 20_979_712, "13b": 31_467_520, "llama3_8b": 20_979_712}
VISION = 303_507_456
# (size, rank): all seven linears of the decoder.
ADAPTERS = {
    ("7b", 64): 159_907_840,
    ("7b", 128): 319_815_680,
    ("7b", 512): 1_279_262_720,
    ("13b", 64): 250_347_520,
    ("13b", 128): 500_695_040,
    ("13b", 512): 2_002_780_160,
    ("llama3_8b", 64): 167_772_160,
}
# Rank 64 on the four linears of 1024 and the two of 4096 of the 23 blocks before the feature.
VISION_ADAPTERS = 23 * 64 * (4 * 2 * 1024 + 2 * (1024 + 4096))


class Recipe(NamedTuple):
    """What a published run is, in full."""

    tunes: str  # decoder, vision tower; the projector always trains
    rate: float
    projector_rate: float
    rank: int = 0
    alpha: float = 0
    vision_rank: int = 0
    quantize: str | None = None
    batch: int = 128
    loss_group: int = 16  # a GPU's micro-batch there
    clip: float | None = None
    template: str = "vicuna_v1"
    aspect: str = "pad"
    text: int | None = None  # limit of text tokens, beside 2048 in all
    grouped: bool = True
    samples: int = 665_298
    steps: int = 5198
    warmup: int = 156


STAGE_1 = {"batch": 256, "loss_group": 32, "aspect": "crop", "grouped": False}
STAGE_1 |= {"samples": 558_128, "steps": 2181, "warmup": 66}
XTUNER = {"template": "vicuna_xtuner", "text": 1472, "clip": 1.0}
SINGLE = {"template": "llama_3", "loss_group": 1}

FULL = Recipe("full frozen", 2e-5, 2e-5)
LORA = Recipe("lora frozen", 2e-4, 2e-5, 128, 256)
PRETRAIN = Recipe("frozen frozen", 1e-3, 1e-3, **(STAGE_1 | {"template": "plain"}))
LORA_XTUNER = LORA._replace(projector_rate=2e-4, **XTUNER)
PRETRAIN_XTUNER = PRETRAIN._replace(**XTUNER)
QLORA_XTUNER = LORA_XTUNER._replace(
    tunes="lora lora", rank=512, vision_rank=64, quantize="nf4_double"
)

OF_BOTH_SIZES = {
    "pretrain": PRETRAIN,
    "full": FULL,
    "task": FULL,
    "lora": LORA,
    "task_lora": LORA,
    "qlora": LORA._replace(rate=2e-5, rank=64, alpha=16, quantize="nf4_double"),
    "pretrain_xtuner": PRETRAIN_XTUNER,
    "lora_xtuner": LORA_XTUNER,
    "qlora_xtuner": QLORA_XTUNER,
}
RECIPES = {f"{size}_{name}": r for size in ("7b", "13b") for name, r in OF_BOTH_SIZES.items()}
RECIPES |= {
    "7b_full_1gpu": FULL,
    "llama3_8b_pretrain_1gpu": PRETRAIN_XTUNER._replace(**SINGLE),
    "llama3_8b_qlora_1gpu": QLORA_XTUNER._replace(
        tunes="lora frozen", rank=64, alpha=16, vision_rank=0, **SINGLE
    ),
}

# Config: its base, and every field in which it differs.
DECODER = {"model", "init_from"}
PROMPT = {"data.template", "data.max_text_length", "optimizer.clip_norm"}
DIFFERENCES = {
    "7b_pretrain": (
        "7b_full",
        {"init_from", "tune.llm", "optimizer.learning_rate"}
        | {"batch.global_size", "batch.loss_group"}
        | {
            f"data.{name}"
            for name in (
                "path",
                "image_root",
                "template",
                "image_aspect",
                "buckets",
                "group_by_modality_length",
            )
        },
    ),
    "7b_lora": (
        "7b_full",
        {"tune.llm", "optimizer.learning_rate", "optimizer.projector_learning_rate"},
    ),
    "7b_qlora": ("7b_lora", {"quantize", "lora.rank", "lora.alpha", "optimizer.learning_rate"}),
    "7b_full_1gpu": ("7b_full", {"checkpoint.keep"}),
    "7b_task": ("7b_full", {"init_from"}),
    "7b_task_lora": ("7b_lora", {"init_from"}),
    "7b_pretrain_xtuner": ("7b_pretrain", PROMPT),
    "7b_lora_xtuner": ("7b_lora", PROMPT | {"init_from", "optimizer.projector_learning_rate"}),
    "7b_qlora_xtuner": ("7b_lora_xtuner", {"quantize", "lora.rank", "tune.vision"}),
    "llama3_8b_pretrain_1gpu": (
        "7b_pretrain_xtuner",
        DECODER | {"data.template", "batch.loss_group"},
    ),
    "llama3_8b_qlora_1gpu": (
        "7b_qlora_xtuner",
        DECODER | {"tune.vision", "lora.rank", "lora.alpha", "data.template", "batch.loss_group"},
    ),
    **{f"13b_{name}": (f"7b_{name}", DECODER) for name in OF_BOTH_SIZES},
}


def preset(name: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.py")


def size_of(name: str) -> str:
    return next(size for size in SIZES if name.startswith(f"{size}_"))


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        nested = dataclasses.is_dataclass(value) and name not in ("model", "init_from")
        found |= fields(value, f"{name}.") if nested else {name: value}
    return found


def test_every_preset_is_held():
    names = {path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("tiny")}
    assert names == RECIPES.keys() == DIFFERENCES.keys() | {"7b_full"}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_preset_differs_from_its_base_as_stated_and_in_nothing_else(name: str):
    base, stated = DIFFERENCES[name]
    here, there = fields(preset(name)), fields(preset(base))
    assert {field for field in here if here[field] != there[field]} == stated | {"name"}
    assert here["name"] == name


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name: str):
    config, recipe = preset(name), RECIPES[name]
    found = Recipe(
        tunes=f"{config.tune.llm} {config.tune.vision}",
        rate=config.optimizer.learning_rate,
        projector_rate=config.optimizer.projector_learning_rate or config.optimizer.learning_rate,
        rank=config.lora.rank if config.tune.llm == "lora" else 0,
        alpha=config.lora.alpha if config.tune.llm == "lora" else 0,
        vision_rank=config.vision_lora.rank if config.tune.vision == "lora" else 0,
        quantize=config.quantize,
        batch=config.batch.global_size,
        loss_group=config.batch.loss_group,
        clip=config.optimizer.clip_norm,
        template=config.data.template,
        aspect=config.data.image_aspect,
        text=config.data.max_text_length,
        grouped=config.data.group_by_modality_length,
        samples=recipe.samples,
        steps=config.total_steps(recipe.samples),
        warmup=recipe.warmup,
    )
    assert found == recipe
    # What all of them share.
    assert (config.lora.dropout, config.lora.targets) == (0.05, LLM_LINEARS)
    vision_lora = config.vision_lora
    assert (vision_lora.alpha, vision_lora.dropout, vision_lora.targets) == (
        *(16.0, 0.05),
        VISION_LINEARS,
    )
    assert config.tune.projector == "full"
    assert config.model == SIZES[size_of(name)]
    assert (config.data.max_length, config.data.shuffle) == (2048, True)
    assert config.batch.loss_weighting == "sample_mean"
    assert (config.epochs, config.steps, config.seed, config.dtype) == (1, None, 42, "bfloat16")
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.schedule) == (0, "cosine")
    assert optimizer.vision_learning_rate is None
    assert config.data.path.endswith("558k.json" if recipe.steps == 2181 else "mix665k.json")


@pytest.mark.parametrize("name", RECIPES)
def test_runs_start_where_they_should(name: str):
    start, size = preset(name).init_from, size_of(name)
    decoder = "Meta-Llama-3-8B-Instruct" if size == "llama3_8b" else f"vicuna-{size}-v1.5"
    if "pretrain" in name:
        clip = "checkpoints/clip-vit-large-patch14-336"
        assert start == Parts(f"checkpoints/{decoder}", clip)
    elif "task" in name:
        assert start == f"llava-hf/llava-1.5-{size}-hf"
    else:
        ending = "_1gpu" if size == "llama3_8b" else "_xtuner" if "xtuner" in name else ""
        assert start == f"runs/{size}_pretrain{ending}"
        assert f"{size}_pretrain{ending}" in RECIPES


@pytest.mark.parametrize("name", ["7b_pretrain", "7b_full", "7b_lora", "7b_qlora_xtuner"])
def test_the_rates_rise_and_fall_as_published(name: str):
    config, recipe = preset(name), RECIPES[name]
    warmup, steps = recipe.warmup, recipe.steps
    rates = learning_rates(config.optimizer, steps)
    group = {"full": "llm", "lora": "lora", "frozen": "projector"}[config.tune.llm]
    for rate, peak in ((rates[group], recipe.rate), (rates["projector"], recipe.projector_rate)):
        assert float(rate(0)) == 0.0
        assert float(rate(warmup)) == pytest.approx(peak)
        assert float(rate(warmup - 1)) == pytest.approx(peak * (warmup - 1) / warmup)
        assert float(rate(steps)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_of_parameters_are_the_published_ones(name: str):
    config, recipe, size = preset(name), RECIPES[name], size_of(name)
    program = build_program(config, SIZES[size], recipe.steps, make_mesh(config.mesh))

    def count(paths: Iterable[str], part: str = "") -> int:
        shapes = [program.abstract[path].shape for path in paths if path.startswith(part)]
        return sum(map(math.prod, shapes))

    if config.tune.llm == "full":
        decoder = WHOLE[size] - VISION - PROJECTOR[size]
    else:
        decoder = ADAPTERS[size, recipe.rank] if recipe.rank else 0
    tower = VISION_ADAPTERS if recipe.vision_rank else 0
    assert count(program.trainable, "llm.") == decoder
    assert count(program.trainable, "vision.") == tower
    assert count(program.trainable) == decoder + tower + PROJECTOR[size]
    assert all(program.abstract[path].dtype == "float32" for path in program.trainable)
    kinds = {path: leaf.kind for path, leaf in program.abstract.items() if hasattr(leaf, "kind")}
    if recipe.quantize:
        assert set(kinds.values()) == {recipe.quantize}
        assert len(kinds) == len(LLM_LINEARS)
    else:
        assert not kinds
        assert all(program.abstract[path].dtype == "bfloat16" for path in program.frozen)
    if size in WHOLE and not recipe.quantize:
        adapters = tower + (decoder if recipe.rank else 0)
        assert count(program.abstract) == WHOLE[size] + adapters


@pytest.mark.parametrize(
    "tune", [TuneConfig(llm="full"), TuneConfig(llm="frozen", vision="frozen")]
)
def test_only_a_frozen_decoder_with_adapters_is_quantised(tune: TuneConfig):
    config = dataclasses.replace(preset("7b_lora"), tune=tune, quantize="nf4")
    with pytest.raises(ConfigError, match="quantize 'nf4' needs frozen decoder weights"):
        build_program(config, LLAVA_7B, 100, make_mesh(config.mesh))


def test_inputs_that_are_no_whole_blocks_are_named():
    model = dataclasses.replace(LLAVA_7B, llm=LlmConfig(hidden_size=100, intermediate_size=128))
    config = dataclasses.replace(preset("7b_lora"), quantize="nf4")
    with pytest.raises(ConfigError, match=r"quantize: llm\.layers.*multiple of 64 inputs"):
        build_program(config, model, 100, make_mesh(config.mesh))


@pytest.mark.parametrize(
    ("size", "recipe", "mesh"),
    [
        ("7b", "pretrain", MeshConfig(1, 8, 1)),
        ("7b", "lora", MeshConfig(2, 2, 2)),
        ("7b", "full", MeshConfig(1, 4, 2)),
        ("13b", "lora", MeshConfig(1, 8, 1)),
    ],
)
def test_the_real_step_lowers_and_every_parameter_is_sharded(
    size: str, recipe: str, mesh: MeshConfig
):
    config = dataclasses.replace(preset(f"{size}_{recipe}"), mesh=mesh)
    program = build_program(config, SIZES[size], 100, make_mesh(mesh))
    for path, leaf in program.abstract.items():
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert shard * mesh.fsdp <= math.prod(leaf.shape), path
    batch = program.abstract_batch(config.batch.global_size, config.data.max_length, 1)
    text = program.trace_train_step(batch).lower().as_text()
    # No array has the full logits' shape, or even one sample's.
    assert f"{config.data.max_length}x{SIZES[size].llm.vocab_size}x" not in text


def test_moments_lie_as_their_parameters_do():
    config = preset("7b_lora")
    program = build_program(config, SIZES["7b"], 100, make_mesh(config.mesh))
    moments = [
        (path[-1].key, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.opt_state)
        if isinstance(path[-1], jax.tree_util.DictKey)
    ]
    assert len(moments) == 2 * len(program.trainable)
    assert all(sharding == program.abstract[path].sharding for path, sharding in moments)
