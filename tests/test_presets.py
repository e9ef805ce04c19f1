"""Every preset of a real size builds, traces and shards, without a weight."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from llava_jax.config import (
    LLAVA_7B,
    LLAVA_13B,
    ConfigError,
    LlmConfig,
    MeshConfig,
    TrainConfig,
    TuneConfig,
    load_config,
)
from llava_jax.optim import learning_rates
from llava_jax.program import build_program
from llava_jax.sharding import make_mesh

CONFIGS = Path(__file__).parent.parent / "configs"

SIZES = {"7b": LLAVA_7B, "13b": LLAVA_13B}
WHOLE = {"7b": 7_063_427_072, "13b": 13_351_494_656}
PROJECTOR = {"7b": 20_979_712, "13b": 31_467_520}
VISION = 303_507_456
ADAPTERS = {"7b": 319_815_680, "13b": 500_695_040}  # rank 128, all seven linears
SAMPLES = {"pretrain": 558_128, "full": 665_298, "lora": 665_298}
# Recipe: (optimizer steps, warm-up steps, rate, projector's rate)
PUBLISHED = {
    "pretrain": (2181, 66, 1e-3, 1e-3),
    "full": (5198, 156, 2e-5, 2e-5),
    "lora": (5198, 156, 2e-4, 2e-5),
}


def preset(size: str, recipe: str) -> TrainConfig:
    return load_config(CONFIGS / f"{size}_{recipe}.py")


@pytest.mark.parametrize("recipe", SAMPLES)
@pytest.mark.parametrize("size", SIZES)
def test_counts_of_parameters_are_the_published_ones(size: str, recipe: str):
    config = preset(size, recipe)
    steps = config.total_steps(SAMPLES[recipe])
    program = build_program(config, SIZES[size], steps, make_mesh(config.mesh))
    count = lambda paths: sum(math.prod(program.abstract[path].shape) for path in paths)
    adapters = ADAPTERS[size] if recipe == "lora" else 0
    language = WHOLE[size] - VISION - PROJECTOR[size]
    trained = {"pretrain": 0, "full": language, "lora": adapters}[recipe] + PROJECTOR[size]
    assert count(program.abstract) == WHOLE[size] + adapters
    assert count(program.trainable) == trained
    assert all(program.abstract[path].dtype == "float32" for path in program.trainable)
    assert all(program.abstract[path].dtype == "bfloat16" for path in program.frozen)


@pytest.mark.parametrize("recipe", SAMPLES)
def test_recipes_are_the_published_ones(recipe: str):
    config = preset("7b", recipe)
    steps, warmup, rate, projector_rate = PUBLISHED[recipe]
    assert config.total_steps(SAMPLES[recipe]) == steps
    rates = learning_rates(config.optimizer, steps)
    group = "llm" if recipe == "full" else recipe if recipe == "lora" else "projector"
    assert float(rates[group](0)) == 0.0
    assert float(rates[group](warmup)) == pytest.approx(rate)
    assert float(rates["projector"](warmup)) == pytest.approx(projector_rate)
    assert float(rates[group](warmup - 1)) == pytest.approx(rate * (warmup - 1) / warmup)
    assert float(rates[group](steps)) == pytest.approx(0.0, abs=1e-12)
    assert config.optimizer.clip_norm is None
    assert config.batch.global_size == (256 if recipe == "pretrain" else 128)
    assert config.batch.loss_group * 8 == config.batch.global_size
    assert config.data.image_aspect == ("crop" if recipe == "pretrain" else "pad")
    assert config.data.template == ("plain" if recipe == "pretrain" else "vicuna_v1")


QUANTISED = {
    # rank, adapters of the decoder, rate, clip
    "7b_qlora": (64, 159_907_840, 2e-5, None),
    "13b_qlora": (64, 250_347_520, 2e-5, None),
    "13b_qlora_xtuner": (512, 2_002_780_160, 2e-4, 1.0),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_recipes_are_the_published_ones(name: str):
    config = load_config(CONFIGS / f"{name}.py")
    rank, adapters, rate, clip = QUANTISED[name]
    assert config.model is not None
    program = build_program(config, config.model, 100, make_mesh(config.mesh))
    of_decoder = [p for p in program.trainable if p.startswith("llm.")]
    assert sum(math.prod(program.abstract[path].shape) for path in of_decoder) == adapters
    assert (config.quantize, config.lora.rank) == ("nf4_double", rank)
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (rate, clip)
    kinds = {path: leaf.kind for path, leaf in program.abstract.items() if hasattr(leaf, "kind")}
    assert set(kinds.values()) == {"nf4_double"}
    assert len(kinds) == 7
    in_tower = [path for path in program.trainable if path.startswith("vision.")]
    assert len(in_tower) == (2 * 6 if "xtuner" in name else 0)


@pytest.mark.parametrize(
    "tune", [TuneConfig(llm="full"), TuneConfig(llm="frozen", vision="frozen")]
)
def test_only_a_frozen_decoder_with_adapters_is_quantised(tune: TuneConfig):
    config = dataclasses.replace(preset("7b", "lora"), tune=tune, quantize="nf4")
    with pytest.raises(ConfigError, match="quantize 'nf4' needs a decoder that does not train"):
        build_program(config, LLAVA_7B, 100, make_mesh(config.mesh))


def test_inputs_that_are_no_whole_blocks_are_named():
    model = dataclasses.replace(LLAVA_7B, llm=LlmConfig(hidden_size=100, intermediate_size=128))
    config = dataclasses.replace(preset("7b", "lora"), quantize="nf4")
    with pytest.raises(ConfigError, match=r"quantize: llm\.layers.*64 inputs a block"):
        build_program(config, model, 100, make_mesh(config.mesh))


@pytest.mark.parametrize("recipe", SAMPLES)
def test_both_sizes_have_one_recipe(recipe: str):
    small, large = preset("7b", recipe), preset("13b", recipe)
    assert (
        dataclasses.replace(large, name=small.name, init_from=small.init_from, model=small.model)
        == small
    )


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
    config = dataclasses.replace(preset(size, recipe), mesh=mesh)
    program = build_program(config, SIZES[size], 100, make_mesh(mesh))
    for path, leaf in program.abstract.items():
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert shard * mesh.fsdp <= math.prod(leaf.shape), path
    batch = program.abstract_batch(config.batch.global_size, config.data.max_length, 1)
    text = program.trace_train_step(batch).lower().as_text()
    # No array has the full logits' shape, or even one sample's.
    assert f"{config.data.max_length}x{SIZES[size].llm.vocab_size}x" not in text


def test_moments_lie_as_their_parameters_do():
    config = preset("7b", "lora")
    program = build_program(config, SIZES["7b"], 100, make_mesh(config.mesh))
    moments = [
        (path[-1].key, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.opt_state)
        if isinstance(path[-1], jax.tree_util.DictKey)
    ]
    assert len(moments) == 2 * len(program.trainable)
    assert all(sharding == program.abstract[path].sharding for path, sharding in moments)
