"""Files that are damaged, large, sharded or not quite right; parity/ has the models."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.config import LlmConfig, MeshConfig, ModelConfig, Parts, Quantisation, VisionConfig
from llava_jax.distributed import host_memory
from llava_jax.distributed.sharding import make_mesh, shardings, with_shardings
from llava_jax.errors import CheckpointError
from llava_jax.models.build import build_model
from llava_jax.models.layers import Params
from llava_jax.models.lora import TokenRows
from llava_jax.models.paths import VOCABULARY
from llava_jax.models.quant import abstract, quantise
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.load import find_tensors, fingerprint, load_params
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.pretrained.save import save_params

CONFIG = ModelConfig(
    vision=VisionConfig(28, 14, 16, 32, 3, 2),
    llm=LlmConfig(64, 16, 32, 2, 2, 2, 8, 128),
    image_token_id=60,
    pad_token_id=61,
)
EMBED = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
HEAD_PATH = "llm.lm_head.weight"


def abstract_params(config: ModelConfig = CONFIG) -> dict[str, jax.ShapeDtypeStruct]:
    return build_model(config, {})[1]


def random_params(config: ModelConfig = CONFIG, dtype: str = "float32") -> Params:
    rng = np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(rng.normal(size=spec.shape), dtype)
    return {path: draw(spec) for path, spec in abstract_params(config).items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_params(random_params(), tmp_path / "checkpoint", CONFIG)
    return tmp_path / "checkpoint"


def assert_equal(ours: Params, expected: Params) -> None:
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 8_000])
def test_written_weights_read_back(dtype, shard_bytes, tmp_path):
    params = random_params(dtype=dtype)
    save_params(params, tmp_path, CONFIG, shard_bytes=shard_bytes)
    files = sorted(file.name for file in tmp_path.iterdir())
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        assert files[-1] == "model.safetensors.index.json"
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files) - 1:05}.safetensors"
    abstract = {p: jax.ShapeDtypeStruct(s.shape, dtype) for p, s in abstract_params().items()}
    assert_equal(load_params(tmp_path, CONFIG, abstract), params)


def test_the_safetensors_library_agrees(tmp_path):
    """Mixed dtypes in one file: all tensors are where the library expects them."""
    params = random_params()
    params["llm.norm.weight"] = params["llm.norm.weight"].astype(jnp.bfloat16)
    save_params(params, tmp_path, CONFIG)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = open_tensors(tmp_path)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name], err_msg=name)
    assert theirs["language_model.model.norm.weight"].dtype == ml_dtypes.bfloat16


def test_values_are_cast_where_they_land(checkpoint):
    abstract = {p: jax.ShapeDtypeStruct(s.shape, "bfloat16") for p, s in abstract_params().items()}
    expected = {path: value.astype(jnp.bfloat16) for path, value in random_params().items()}
    assert_equal(load_params(checkpoint, CONFIG, abstract), expected)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)])
def test_shards_go_to_their_devices_and_back(mesh, checkpoint, tmp_path):
    abstract = with_shardings(abstract_params(), make_mesh(mesh))
    params = load_params(checkpoint, CONFIG, abstract)
    assert_equal(params, random_params())
    for path, value in params.items():
        assert value.sharding == abstract[path].sharding, path
    wide = params["llm.layers.mlp.down_proj.weight"]
    assert wide.addressable_shards[0].data.size < wide.size
    save_params(params, tmp_path / "again", CONFIG)
    assert_equal(load_params(tmp_path / "again", CONFIG, abstract), random_params())


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
@pytest.mark.parametrize("kind", get_args(Quantisation))
def test_weights_are_quantised_as_they_come(kind, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "MIN_SLICE", 8)
    config = dataclasses.replace(CONFIG, llm=LlmConfig(64, 64, 128, 3, 2, 2, 32, 128))
    values = random_params(config)
    save_params(values, tmp_path, config)
    path = "llm.layers.mlp.gate_proj.weight"
    shapes = abstract_params(config)
    shapes[path] = abstract(kind, shapes[path].shape)
    placed = with_shardings(
        shapes, make_mesh(MeshConfig(1, 4, 2)), lambda _: memory == "pinned_host"
    )
    loaded = load_params(tmp_path, config, placed)[path]
    layers = [quantise(np.asarray(layer), kind) for layer in values[path]]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *layers)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings(placed[path])
    assert loaded.codes.sharding.memory_kind == memory
    assert loaded.codes.addressable_shards[0].data.size == loaded.codes.size // 8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_values_that_are_no_numbers_are_refused(dtype, value, tmp_path):
    path = "llm.layers.mlp.gate_proj.weight"
    values = random_params(dtype=dtype)
    values[path] = values[path].at[1, 2, 3].set(value)
    save_params(values, tmp_path, CONFIG)
    name = r"model\.safetensors: language_model\.model\.layers\.1\.mlp\.gate_proj\.weight"
    with pytest.raises(CheckpointError, match=f"{name} has values that are NaN or infinite"):
        load_params(tmp_path, CONFIG, abstract_params())


def test_only_what_is_wanted_is_read(checkpoint):
    wanted = ("llm.norm.weight", "llm.layers.mlp.up_proj.weight")
    params = load_params(checkpoint, CONFIG, abstract_params(), wanted=wanted)
    assert_equal(params, {path: random_params()[path] for path in wanted})


def test_everything_amiss_is_one_error(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    del tensors["vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"]  # in the tail
    tensors["multi_modal_projector.linear_3.weight"] = np.zeros(2, np.float32)
    tensors[EMBED] = tensors[EMBED][:-1]
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(5)  # old buffer
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_params(checkpoint, CONFIG, abstract_params())
    for part in (
        "missing tensors (2):\n  ",
        "language_model.model.layers.1.mlp.up_proj.weight [32, 16]",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias [32]",
        "tensors that do not belong to the model (1):\n  multi_modal_projector.linear_3.weight [2]",
        f"tensors with the wrong shape (1):\n  {EMBED} has shape [63, 16], expected [64, 16]",
        str(checkpoint),
    ):
        assert part in str(error.value)
    assert "position_ids" not in str(error.value)


TIED = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, tie_word_embeddings=True))


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_head_may_be_there_or_not_when_it_is_tied(checkpoint):
    abstract = abstract_params(TIED)
    assert HEAD_PATH not in abstract
    expected = {path: x for path, x in random_params().items() if path != HEAD_PATH}
    edit_tensors(checkpoint, lambda tensors: tensors.update({HEAD: tensors[EMBED]}))
    assert_equal(load_params(checkpoint, TIED, abstract), expected)
    edit_tensors(checkpoint, lambda tensors: tensors.pop(HEAD))
    assert_equal(load_params(checkpoint, TIED, abstract), expected)
    with pytest.raises(CheckpointError, match="missing"):
        load_params(checkpoint, CONFIG, abstract_params())


def test_a_tied_head_may_have_a_dtype_of_its_own(checkpoint):
    half = load_file(checkpoint / "model.safetensors")[EMBED].astype(np.float16)
    wide = {EMBED: half.astype(np.float32), HEAD: half}
    edit_tensors(checkpoint, lambda tensors: tensors.update(wide))
    params = load_params(checkpoint, TIED, abstract_params(TIED))
    np.testing.assert_array_equal(params["llm.embed_tokens.weight"], wide[EMBED])


@pytest.mark.parametrize(
    "head", [lambda x: x[::-1], lambda x: x + 1e-3 * (x == x[-1]), lambda x: x[:-1]]
)
def test_a_head_that_differs_is_refused_when_it_is_tied(head, checkpoint):
    change = lambda tensors: tensors.update({HEAD: head(tensors[EMBED]).astype(np.float32)})
    edit_tensors(checkpoint, change)
    message = rf"{HEAD} \[6[34], 16\] .* is not equal to {EMBED} \[64, 16\].*: set tie_word_emb"
    with pytest.raises(CheckpointError, match=message) as error:
        load_params(checkpoint, TIED, abstract_params(TIED), wanted=["llm.norm.weight"])
    assert str(checkpoint) in str(error.value)


def save_parts(directory: Path, config: ModelConfig) -> Parts:
    params = random_params(config)
    llm, vision = directory / "llm", directory / "vision"
    decoder = {path: x for path, x in params.items() if path.startswith("llm.")}
    save_params(decoder, llm, config, layout=layouts.LLAMA)
    tower = {path: x for path, x in params.items() if path.startswith("vision.")}
    save_params(tower, vision, config, layout=layouts.CLIP)
    return Parts(str(llm), str(vision))


def test_a_tied_head_is_held_to_the_embedding_before_it_grows(tmp_path):
    parts = save_parts(tmp_path, CONFIG)
    grown = dataclasses.replace(TIED, llm=dataclasses.replace(TIED.llm, vocab_size=70))
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    with pytest.raises(CheckpointError, match=rf"{head} \[64, 16\] .* is not equal to {embed}"):
        load_params(parts, grown, abstract_params(grown))
    edit_tensors(tmp_path / "llm", lambda tensors: tensors.update({head: tensors[embed]}))
    params = load_params(parts, grown, abstract_params(grown))
    assert params["llm.embed_tokens.weight"].shape == (70, 16)


def test_a_tied_head_without_an_embedding_is_left_over(checkpoint):
    """As of an adapter that trained the head alone."""
    source = {HEAD: open_tensors(checkpoint)[HEAD]}, layouts.HF_4_36
    with pytest.raises(CheckpointError, match=rf"do not belong to the model \(1\):\n  {HEAD}"):
        find_tensors("adapter", [source], TIED, {})


def test_adapters_are_not_saved_as_a_model(tmp_path):
    params = random_params() | {"llm.layers.mlp.up_proj.lora_a": jnp.zeros((2, 1, 16))}
    with pytest.raises(ValueError, match=r"merge the adapters .*up_proj\.lora_a"):
        save_params(params, tmp_path, CONFIG)


def test_a_smaller_save_leaves_nothing_of_a_larger_one(tmp_path):
    save_params(random_params(), tmp_path, CONFIG, shard_bytes=8_000)
    save_params(random_params(), tmp_path, CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_one(checkpoint, monkeypatch):
    before = (checkpoint / "model.safetensors").read_bytes()
    broken = random_params()
    broken["llm.norm.weight"].delete()  # reading it fails in the middle of the file
    with pytest.raises(RuntimeError):
        save_params(broken, checkpoint, CONFIG)
    assert [file.name for file in checkpoint.iterdir()] == ["model.safetensors"]
    assert (checkpoint / "model.safetensors").read_bytes() == before


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: dict, data: bytes) -> None:
    table = json.dumps(header).encode()
    file.write_bytes(len(table).to_bytes(8, "little") + table + data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_offsets": [0, 10**9]}, "lies outside the file"),
        ({"data_offsets": [8, 4]}, "lies outside the file"),
        ({"data_offsets": [-8, 4088]}, "lies outside the file"),
        ({"shape": [64, 17]}, r"has 4096 bytes, but its dtype F32 and shape \[64, 17\] need 4352"),
        ({"shape": "all"}, "damaged entry"),
        ({"dtype": "F99"}, "has the unknown dtype .F99."),
        ({"dtype": "I32"}, "has dtype I32; supported: F32, F16, BF16"),
    ],
)
def test_a_damaged_table_names_file_and_tensor(entry, message, checkpoint):
    file = checkpoint / "model.safetensors"
    header, data = header_of(file)
    header[EMBED] |= entry
    write_header(file, header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        load_params(checkpoint, CONFIG, abstract_params())
    assert str(file) in str(error.value)
    assert EMBED in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 64,
        (9).to_bytes(8, "little") + b"not json!",
        b"\2" + b"\0" * 7 + b"[]",
    ],
)
def test_a_file_of_another_kind_is_refused(content, checkpoint):
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_tensors(checkpoint)


def test_a_file_cut_short_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        open_tensors(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ("[]", "is not an index"),
        ('{"weight_map": {"x": "model-9.safetensors"}}', "not in its directory: model-9"),
        ('{"weight_map": {"x": "../up.safetensors"}}', "names files not in its directory"),
        ('{"weight_map": {"x": "model.safetensors"}}', "names tensors not in its files: x"),
    ],
)
def test_a_damaged_index_is_refused(index, message, checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(checkpoint)


def test_a_directory_without_safetensors_tells_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found: pytorch_model\.bin"):
        open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_tensors(tmp_path / "nowhere")


def test_a_fingerprint_is_of_the_weights_and_nothing_else(checkpoint, tmp_path):
    first = fingerprint(checkpoint)
    save_params(random_params(), tmp_path / "shards", CONFIG, shard_bytes=8_000)
    assert fingerprint(tmp_path / "shards") == first
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace("vision_model.", ""): x for name, x in tensors.items()}
    (tmp_path / "d").mkdir()
    save_file(renamed, tmp_path / "d" / "model.safetensors")
    assert fingerprint(tmp_path / "d") == first
    changed = random_params()
    changed["llm.norm.weight"] = changed["llm.norm.weight"] + 1
    save_params(changed, tmp_path / "changed", CONFIG)
    assert fingerprint(tmp_path / "changed") != first
    save_params(random_params(), tmp_path / "half", CONFIG, dtype="float16")
    assert fingerprint(tmp_path / "half") != first


def test_a_fingerprint_stays_what_adapters_have_written_down():
    fixture = Path(__file__).parents[1] / "parity" / "fixtures" / "hf_4_48"
    expected = "8df28d55f80ad5224e375396abd19bbd1e5062a4c6456b16f2177e6c023c0219"
    assert fingerprint(fixture) == expected


MEASURE = """
import resource, sys
import jax
from llava_jax.config import *
from llava_jax.models.build import build_model
from llava_jax.pretrained.load import load_params
from llava_jax.pretrained.save import save_params

config = ModelConfig(
    vision=VisionConfig(28, 14, 16, 16, 2, 2),
    llm=LlmConfig(4096, 512, 2048, 32, 4, 4, 128),
)
abstract = {
    path: jax.ShapeDtypeStruct(spec.shape, sys.argv[3])
    for path, spec in build_model(config, {})[1].items()
}
size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if sys.argv[1] == "save":
    params = {path: jax.numpy.ones(spec.shape, spec.dtype) for path, spec in abstract.items()}
    before = peak()
    save_params(params, sys.argv[2], config)
    print(peak() - before, size(params))
else:
    jax.block_until_ready(jax.numpy.zeros(8))
    before = peak()
    params = load_params(sys.argv[2], config, abstract)
    print(peak() - before - size(params), size(params))
"""


def test_host_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """277 MB on disk, stacks of 67 MB (134 in float32), no tensor in it above 4.2 MB."""

    def measure(*args: str) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *args], capture_output=True, text=True, check=True
        )
        beyond, total = map(int, done.stdout.split())
        return beyond, total

    # Measured: 22 and 42 MB, compiler included. A host copy of one stack would exceed the limits.
    beyond, total = measure("save", str(tmp_path), "bfloat16")
    assert total > 260e6
    assert beyond < 60e6
    beyond, _ = measure("load", str(tmp_path), "float32")
    assert beyond < 90e6


def test_tokens_begin_as_those_of_a_table_in_host_memory(tmp_path, monkeypatch):
    """The table is in another dtype in the file, and XLA must not compute in host memory."""
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    params = random_params(dtype="float16")
    save_params(params, tmp_path, CONFIG)
    path, rows = "llm.embed_tokens", TokenRows((5, 9))
    shapes = {p: jax.ShapeDtypeStruct(s.shape, "bfloat16") for p, s in abstract_params().items()}
    shapes[f"{path}.trainable_tokens"] = jax.ShapeDtypeStruct((2, 16), "float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = with_shardings(shapes, mesh, lambda name: name in VOCABULARY)
    loaded = load_weights(tmp_path, CONFIG, abstract, seed=0, adapters={path: rows})
    table = loaded[f"{path}.weight"]
    assert table.sharding.memory_kind == "pinned_host"
    assert table.dtype == "bfloat16"
    np.testing.assert_array_equal(table, params[f"{path}.weight"].astype("bfloat16"))
    found = np.asarray(loaded[f"{path}.trainable_tokens"])
    np.testing.assert_array_equal(found, np.asarray(table)[[5, 9]].astype(np.float32))
