"""The first training step of LLaVA's own code: the same samples, loss and gradients.

`fixtures/make_original_training.py` says what the fixture holds and how weights follow from names.
"""

import dataclasses
import importlib.resources
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_training import change

from llava_jax.config import (
    LLM_LINEARS,
    BatchConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Parts,
    TrainConfig,
    TuneConfig,
)
from llava_jax.data.batch import Batch
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.layers import Params
from llava_jax.pretrained.adapters import load_adapter
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.model_config import read_parts_config
from llava_jax.train_step.program import build_program
from llava_jax.train_step.step import init_state, normalised
from llava_jax.training.inputs import open_inputs

FIXTURES = Path(__file__).parent / "fixtures"
ORIGINAL = FIXTURES / "original_training"
SIZE, PIECES, LENGTH = 8, 32000, 128
IMAGE, PAD = 31999, 0  # a piece that no sample has; unk, with which LLaVA pads
STD, LORA_STD = 0.2, 0.1

STAGE_1 = TrainConfig(
    name="original",
    dtype="float32",
    tune=TuneConfig(llm="frozen", vision="frozen", projector="full"),
    data=DataConfig(
        path=str(ORIGINAL / "stage1.json"),
        image_root=str(ORIGINAL / "images"),
        template="plain",
        image_aspect="crop",
        max_length=LENGTH,
        shuffle=False,
        workers=0,
    ),
    batch=BatchConfig(global_size=SIZE, loss_weighting="sample_mean", loss_group=SIZE),
    optimizer=OptimizerConfig(b1=0.0),  # so that the first moments are the gradients
)
STAGE_2 = change(
    STAGE_1,
    tune={"llm": "lora"},
    lora={"rank": 4, "alpha": 8.0, "dropout": 0.0},
    data={"path": str(ORIGINAL / "stage2.json"), "template": "vicuna_v1", "image_aspect": "pad"},
)
STAGES = {"stage1": STAGE_1, "stage2": STAGE_2}

pytestmark = pytest.mark.parity("training", "llava-torch 1.2.2.post1", "transformers 4.37.2")


class FirstStep(NamedTuple):
    """What a train step leaves; gradients by our paths."""

    loss: float
    norm: float
    supervised: int
    gradients: dict[str, np.ndarray]


def weight(name: str, shape: tuple[int, ...], std: float = STD) -> np.ndarray:
    """`tiny.weight`: values that follow from the name; vectors are moved by 0.5."""
    generator = np.random.default_rng([0, zlib.crc32(name.encode())])
    values = np.float32(std) * generator.standard_normal(shape, np.float32)
    return values + np.float32(0.5) if len(shape) == 1 else values


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(stage: str) -> dict[str, np.ndarray]:
    """What LLaVA's code did."""
    return dict(np.load(ORIGINAL / f"{stage}.npz"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The decoder with 32000 pieces, as its directory was there, and the tower of base/clip."""
    llm = tmp_path_factory.mktemp("original") / "llm"
    llm.mkdir()
    base = FIXTURES / "base" / "llm"
    tensors = {}
    for name, values in load_file(base / "model.safetensors").items():
        ours = "language_model." + name
        np.testing.assert_array_equal(values, weight(ours, values.shape), err_msg=name)
        is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        shape = (PIECES, *values.shape[1:]) if is_vocabulary else values.shape
        tensors[name] = weight(ours, shape)
    save_file(tensors, llm / "model.safetensors")
    write_changed(base / "config.json", llm, vocab_size=PIECES, max_position_embeddings=2048)
    write_changed(base / "tokenizer_config.json", llm, pad_token="<unk>")
    data = importlib.resources.files("mistral_common") / "data"
    (llm / "tokenizer.model").write_bytes((data / "tokenizer.model.v1").read_bytes())
    return Parts(str(llm), str(FIXTURES / "base" / "clip"))


def write_changed(file: Path, directory: Path, **changes: object) -> None:
    (directory / file.name).write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def model_config(parts: Parts) -> ModelConfig:
    """The model as it was: its vocabulary does not grow by an image token."""
    return read_parts_config(parts, IMAGE, PAD)


def write_trained(directory: Path, arrays: Mapping[str, np.ndarray], lora: LoraConfig) -> Path:
    """Arrays by the fixture's names, in files as LLaVA's code leaves what it trained."""
    directory.mkdir()
    adapters = {name: values for name, values in arrays.items() if "lora_" in name}
    beside = {name: values for name, values in arrays.items() if name not in adapters}
    save_file(beside, directory / "mm_projector.safetensors")
    if adapters:
        save_file(adapters, directory / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none"}
        settings |= {"lora_dropout": lora.dropout, "target_modules": list(LLM_LINEARS)}
        (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def gradients_of(original: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = "gradient/"
    return {n.removeprefix(prefix): x for n, x in original.items() if n.startswith(prefix)}


@pytest.fixture(autouse=True)
def _image_token(monkeypatch: pytest.MonkeyPatch):
    """The original has no image token in its vocabulary, so here a rare piece stands for images."""
    for check in ("image_token_of", "check_vocabulary"):
        monkeypatch.setattr(f"llava_jax.training.inputs.{check}", lambda *_: "")


def first_batch(config: TrainConfig, model: ModelConfig, parts: Parts) -> Batch:
    return next(open_inputs(config, model, parts).train_batches())


def first_step(
    config: TrainConfig,
    model: ModelConfig,
    parts: Parts,
    original: Mapping[str, np.ndarray],
    directory: Path,
) -> tuple[FirstStep, Params]:
    """The step on our own batch; and LLaVA's gradients, by our paths."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, model, 1, mesh)
    there = gradients_of(original)
    start = {
        name: weight(name, x.shape, LORA_STD if "lora_" in name else STD)
        for name, x in there.items()
    }
    read = lambda name, arrays: load_adapter(
        write_trained(directory / name, arrays, config.lora),
        program.adapters,
        model,
        program.abstract,
        program.trainable,
        None,
    )
    params = load_weights(parts, model, program.abstract, seed=0, wanted=program.frozen)
    state = init_state(program.state, read("start", start), config.seed)
    with jax.set_mesh(mesh):
        batch = program.device_put(first_batch(config, model, parts))
        state, metrics = program.train_step(state, params, batch)
    metrics = {name: value.sum().item() for name, value in metrics.items()}
    moments = first_moments(state.opt_state)
    step = FirstStep(metrics["loss"], metrics["grad_norm"], metrics["supervised_tokens"], moments)
    return step, read("gradients", there)


def first_moments(opt_state: object) -> dict[str, np.ndarray]:
    """AdamW's averages of the gradients; without a past, the gradients."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    found = {}
    for path, leaf in leaves:
        if any(getattr(key, "name", None) == "mu" for key in path):
            found[path[-1].key] = np.asarray(leaf)
    return found


def relative(ours: float, theirs: np.ndarray) -> float:
    return abs(ours / theirs.item() - 1)


def test_what_is_supervised_in_the_original(
    stage: str, original: dict, parts: Parts, model_config: ModelConfig, assert_parity: Callable
):
    """Ids, mask and pixels of the whole batch, as the original's loss sees them."""
    batch = first_batch(STAGES[stage], model_config, parts)
    width = original["expanded_ids"].shape[1]
    assert batch.segment_ids[:, width:].sum() == batch.loss_mask[:, width:].sum() == 0
    ids, used = batch.input_ids[:, :width], batch.segment_ids[:, :width] > 0
    assert (batch.segment_ids > 0).any(axis=1).all()
    assert_parity("padding that differs", (used != original["expanded_mask"]).sum(), 0)
    ids = np.where(ids == IMAGE, -200, ids)
    assert_parity("token ids that differ", (ids != original["expanded_ids"]).sum(), 0)
    labels = np.where(batch.loss_mask[:, :width], ids, -100)
    assert_parity("labels that differ", (labels != original["expanded_labels"]).sum(), 0)
    assert (labels != -100).sum() > 50
    has_image = (batch.input_ids == IMAGE).any(axis=1)  # in others' places, there are zeros
    pixels = np.abs(normalised(batch)[:, 0] - original["images"])[has_image].max()
    assert_parity("pixels, normalised", pixels, 1e-6)


def test_first_step_of_the_original_in_float32(
    stage: str,
    original: dict,
    parts: Parts,
    model_config: ModelConfig,
    assert_parity: Callable,
    tmp_path: Path,
):
    ours, theirs = first_step(STAGES[stage], model_config, parts, original, tmp_path)
    assert ours.supervised == (original["expanded_labels"][:, 1:] != -100).sum()
    assert_parity("loss, relative", relative(ours.loss, original["loss_float32"]), 1e-5)
    norm = relative(ours.norm, original["grad_norm_float32"])
    assert_parity("gradient norm, relative", norm, 1e-5)
    assert ours.gradients.keys() == theirs.keys()
    largest = {path: np.abs(x).max() for path, x in theirs.items()}
    assert min(largest.values()) > 0
    apart = [np.abs(ours.gradients[p] - x).max() / largest[p] for p, x in theirs.items()]
    assert_parity("gradients, of each weight's largest", max(apart), 1e-5)


def test_first_step_of_the_original_in_bfloat16(
    stage: str,
    original: dict,
    parts: Parts,
    model_config: ModelConfig,
    assert_parity: Callable,
    tmp_path: Path,
):
    """Beside both of its ways: autocast, as ours keeps float32 where it trains, and DeepSpeed."""
    config = dataclasses.replace(STAGES[stage], dtype="bfloat16")
    ours, _ = first_step(config, model_config, parts, original, tmp_path)
    for way in ("autocast", "bfloat16"):
        case = f"{stage}, {way}"
        assert_parity("loss, relative", relative(ours.loss, original[f"loss_{way}"]), 1e-3, case)
        norm = relative(ours.norm, original[f"grad_norm_{way}"])
        assert_parity("gradient norm, relative", norm, 1e-2, case)


@pytest.mark.slow
def test_first_step_of_the_original_with_a_new_image_token(
    stage: str, original: dict, parts: Parts, assert_parity: Callable, tmp_path: Path
):
    """As a run starts from parts: 64 rows more, whose shares in the softmax LLaVA does not have."""
    model = read_parts_config(parts)
    assert (model.image_token_id, model.llm.vocab_size) == (PIECES, PIECES + 64)
    ours, _ = first_step(STAGES[stage], model, parts, original, tmp_path)
    loss = ours.loss - original["loss_float32"].item()
    assert 0 < loss < np.log1p(64 / PIECES)  # the mean logit's share is at most the mean share
    assert_parity("loss, relative", relative(ours.loss, original["loss_float32"]), 1e-3)
    norm = relative(ours.norm, original["grad_norm_float32"])
    assert_parity("gradient norm, relative", norm, 1e-3)
