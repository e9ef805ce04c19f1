"""Every preset of a real size builds, traces and shards, without a weight."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import pytest
from recipes import (
    ADAPTERS,
    CLIP_TOWER,
    CLIP_TRAINED,
    DIFFERENCES,
    HUB,
    PROJECTOR,
    RECIPES,
    SIGLIP_TOWER,
    SIGLIP_TRAINED,
    SIZES,
    VISION_ADAPTERS,
    WHOLE,
    Recipe,
)

from llava_jax.config import (
    LLAVA_7B,
    LLM_LINEARS,
    SIGLIP,
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
        vision_rate=config.optimizer.vision_learning_rate,
        length=config.data.max_length,
        data=config.data.path.removeprefix("data/"),
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
    if name != "onevision_7b_pretrain":
        assert config.model == SIZES[size_of(name)]
    assert config.data.shuffle
    assert config.searches_plan
    assert config.batch.loss_weighting == "sample_mean"
    assert (config.epochs, config.steps, config.seed, config.dtype) == (1, None, 42, "bfloat16")
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.schedule) == (0, "cosine")


@pytest.mark.parametrize("name", RECIPES)
def test_runs_start_where_they_should(name: str):
    start, size = preset(name).init_from, size_of(name)
    if name == "onevision_7b_pretrain":
        tower = "checkpoints/siglip-so400m-patch14-384"
        assert start == Parts("checkpoints/Qwen2-7B-Instruct", tower)
        return
    if name == "onevision_7b_full":  # the result of the stage before
        assert start == "llava-hf/llava-onevision-qwen2-7b-si-hf"
        return
    decoder = "Meta-Llama-3-8B-Instruct" if size == "llama3_8b" else f"vicuna-{size}-v1.5"
    if "pretrain" in name:
        clip = "checkpoints/clip-vit-large-patch14-336"
        assert start == Parts(f"checkpoints/{decoder}", clip)
    elif "task" in name or size == "next_7b":
        assert start == f"llava-hf/{HUB[size]}"
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

    is_siglip = SIZES[size].vision == SIGLIP
    if config.tune.llm == "full":
        whole_tower = SIGLIP_TOWER if is_siglip else CLIP_TOWER
        decoder = WHOLE[size] - whole_tower - PROJECTOR[size]
    else:
        decoder = ADAPTERS[size, recipe.rank] if recipe.rank else 0
    tower = VISION_ADAPTERS if recipe.vision_rank else 0
    if config.tune.vision == "full":
        tower = SIGLIP_TRAINED if is_siglip else CLIP_TRAINED
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
        adapters = (VISION_ADAPTERS if recipe.vision_rank else 0) + (decoder if recipe.rank else 0)
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
