"""Common checkpoints that cannot be used are named in one sentence."""

import json
import shutil
from pathlib import Path

import pytest

from llava_jax import LlavaModel
from llava_jax.config.presets import TINY_LLAVA
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.model_config import read_model_config
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.tokenizer import check_vocabulary, image_token_of, load_tokenizer
from llava_jax.pretrained.unsupported import refuse_quantized

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4943162336\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(TINY_LLAVA, tmp_path / "model")


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(name, copy):
    (copy / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as error:
        resolve(copy)
    assert f"{name} is only a pointer of git-lfs" in sentence(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "photo.png", "trainer_state.json"])
def test_a_pointer_that_is_not_read_does_no_harm(name, copy):
    (copy / name).write_text(POINTER)
    assert resolve(copy).base == copy


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin"])
def test_a_pickle_that_is_read_is_named(name, copy):
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    (copy / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is only a pointer of git-lfs"):
        resolve(copy)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
@pytest.mark.parametrize("is_inside", [False, True])
def test_quantized_weights_are_named(settings, method, is_inside, copy):
    inner = {"quantization_config": settings}
    change(copy / "config.json", **({"text_config": inner} if is_inside else inner))
    with pytest.raises(CheckpointError) as error:
        LlavaModel.from_pretrained(copy)
    assert f"the weights are quantized with {method}; use the model with" in sentence(error)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ],
)
def test_quantized_tensors_are_named_without_a_config(name, method):
    with pytest.raises(CheckpointError) as error:
        refuse_quantized(Path("model"), ["model.embed_tokens.weight", name])
    assert f"quantized with {method} (found: {name})" in sentence(error)


@pytest.mark.parametrize("values", [{"model_type": "video_llava"}, {"mm_video_tower": "x/y"}])
def test_a_video_llava_is_named(values, copy):
    change(copy / "config.json", **values)
    with pytest.raises(CheckpointError) as error:
        LlavaModel.from_pretrained(copy)
    assert "is a Video-LLaVA" in sentence(error)


def test_a_tokenizer_with_another_image_token_is_an_error_with_both_ids(copy):
    config, tokenizer = read_model_config(copy), load_tokenizer(copy)
    own = config.image_token_id
    assert image_token_of(tokenizer, config, copy) == "<image>"
    change(copy / "config.json", image_token_index=own - 1, image_token_id=own - 1)
    with pytest.raises(CheckpointError) as error:
        image_token_of(tokenizer, read_model_config(copy), copy)
    text = sentence(error)
    assert f"image token of the model has the id {own - 1}, but the tokenizer has the id {own}" in (
        text
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy):
    config, tokenizer = read_model_config(copy), load_tokenizer(copy)
    check_vocabulary(tokenizer, config, copy)
    tokenizer.add_tokens([f"<new{i}>" for i in range(config.llm.vocab_size)])
    with pytest.raises(CheckpointError) as error:
        check_vocabulary(tokenizer, config, copy)
    assert "resize_token_embeddings" in sentence(error)


def test_spaces_beside_a_token_of_added_tokens_json_are_kept(tmp_path):
    source = FIXTURES / "base" / "llm"
    shutil.copy(source / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    size = len(load_tokenizer(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size, "<pad>": size + 1}))
    legacy = load_tokenizer(tmp_path)
    token = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    known = {str(size): {"content": "<image>", "special": False, **token}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": known}))
    (tmp_path / "added_tokens.json").unlink()
    explicit = load_tokenizer(tmp_path)
    for text in ("USER: <image>\nWhat", "a <image> b", "a  <image>  b", "<image>", "a<image>b"):
        ids = legacy(text).input_ids
        assert size in ids
        assert ids == explicit(text).input_ids
