"""Writes the directories that LLaVA's own code reads: whole models and LoRA adapters."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from llava_jax.config import Aspect, LlmConfig, ModelConfig, Parts
from llava_jax.data.templates import Template
from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.models.lora import Adapter, Adapters
from llava_jax.models.paths import LLM, VOCABULARY, is_adapter, is_projector
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.image_processor import write_image_processor, write_json
from llava_jax.pretrained.llava_directory import official_settings
from llava_jax.pretrained.load import Stored
from llava_jax.pretrained.model_config import read_llm_config, text_settings, tower_settings
from llava_jax.pretrained.peft import WEIGHTS, lora_settings, peft_name
from llava_jax.pretrained.peft_config import CONFIG, common_adapter
from llava_jax.pretrained.processor import generation_settings
from llava_jax.pretrained.safetensors import write_tensors
from llava_jax.pretrained.save import save_params, save_tensors
from llava_jax.pretrained.tokenizer import copy_tokenizer, has_tokenizer, load_tokenizer

_TOWER = "vision_tower"


def save_official(
    directory: Path,
    final: Path,
    params: Mapping[str, Stored],
    config: ModelConfig,
    inputs: Path | Parts,
    *,
    dtype: str | None,
    said: str,
    aspect: Aspect | None,
    template: Template | None,
) -> None:
    """Writes a whole model for LLaVA's own code.

    The vision tower is written twice: in the checkpoint, and as a subdirectory. LLaVA's code builds
    the tower from the subdirectory, and then loads the weights of the checkpoint into the tower.

    Args:
        directory: Existing directory to write to.
        final: Path that `directory` will be renamed to; config.json names the tower's subdirectory
            by this path.
        params: Parameters of the whole model.
        config: Sizes of the model.
        inputs: Directory or parts with the tokenizer and the image processor.
        dtype: Dtype of the weights; None keeps the dtype of each weight.
        said: Dtype that is written into config.json.
        aspect: Handling of images that are not square, as in `official_settings`.
        template: Template of conversations; None if it is unknown.

    Raises:
        ConfigError: LLaVA's own code does not support the decoder, vision tower or projector.
    """
    _check(config)
    llm = _own_llm(config, inputs)
    cut = {path: _first_rows(params[path], llm.vocab_size) for path in VOCABULARY if path in params}
    save_params({**params, **cut}, directory, config, layout=layouts.LLAVA, dtype=dtype)
    tower = {path: x for path, x in params.items() if path.startswith("vision.")}
    (directory / _TOWER).mkdir()
    save_params(tower, directory / _TOWER, config, layout=layouts.CLIP, dtype=dtype)
    settings = tower_settings(config.vision) | {"torch_dtype": said}
    write_json(directory / _TOWER / "config.json", settings)
    write_image_processor(inputs, directory / _TOWER)
    settings = text_settings(llm) | _token_ids(inputs) | {"torch_dtype": said}
    tower_dir = str(final.absolute() / _TOWER)
    write_json(directory / "config.json", official_settings(config, settings, tower_dir, aspect))
    if has_tokenizer(inputs):
        copy_tokenizer(inputs, directory)
        generation = generation_settings(inputs, load_tokenizer(inputs), config, template)
        write_json(directory / "generation_config.json", generation | {"pad_token_id": None})


def save_official_adapter(
    directory: Path,
    params: Mapping[str, Stored],
    adapters: Adapters,
    config: ModelConfig,
    base: str | None,
    tower: str | None,
    inputs: Path | Parts,
    aspect: Aspect | None,
) -> None:
    """Writes adapters for LLaVA's own code: a PEFT adapter, and the projector as a pickle.

    Args:
        directory: Existing directory to write to.
        params: Parameters that were trained.
        adapters: Adapters by the path of their module.
        config: Sizes of the model.
        base: Path or hub id of the decoder that the adapters were trained on; None if the decoder
            has no directory of its own.
        tower: Path or hub id of the vision tower; None if it has no directory of its own.
        inputs: Directory or parts with the tokenizer.
        aspect: Handling of images that are not square, as in `official_settings`.

    Raises:
        ConfigError: `params` has more than the decoder's adapters and the projector, LLaVA's own
            code does not support the vision tower or the projector, the adapters have different
            ranks, or PyTorch is not installed.
    """
    lora = {path: x for path, x in params.items() if path.startswith(LLM) and is_adapter(path)}
    projector = {path: x for path, x in params.items() if is_projector(path)}
    if foreign := sorted(params.keys() - lora.keys() - projector.keys()):
        raise ConfigError(
            f"LLaVA's LoRA directories cannot store {len(foreign)} of the trained parameters, for "
            f"example {foreign[0]}; add --merge"
        )
    linears = {path: x for path, x in adapters.items() if isinstance(x, Adapter)}
    if len({pair for x in linears.values() for pair in x.ranks_and_alphas}) > 1:
        raise ConfigError(
            "LLaVA's LoRA directories cannot store adapters with different ranks or alphas, or "
            "adapters of only some layers; add --merge"
        )
    naming = partial(peft_name, layouts.LLAVA)
    save_tensors(lora, config, naming, partial(write_tensors, directory / WEIGHTS))
    _save_pickle({naming(p): x for p, x in projector.items()}, directory)
    written = lora_settings(common_adapter(linears)) | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in linears}),
        "modules_to_save": None,
    }
    write_json(directory / CONFIG, written)
    _check(config)
    # LLaVA's code loads the decoder with this config. So the vocabulary must have the size of the
    # decoder's own vocabulary, without the tokens that were added for LLaVA.
    llm = read_llm_config(base) if base else _own_llm(config, inputs)
    settings = text_settings(llm) | _token_ids(inputs)
    own = official_settings(config, settings, tower or "", aspect)
    write_json(directory / "config.json", own | {"unfreeze_mm_vision_tower": False})


def _save_pickle(params: Mapping[str, Stored], directory: Path) -> None:
    """Writes non_lora_trainables.bin, in float32; raises ConfigError if PyTorch is missing."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            "LLaVA's LoRA directories contain a pickle; writing it needs PyTorch: pip install torch"
        ) from error
    values = {name: torch.from_numpy(x.read(0).astype(np.float32)) for name, x in params.items()}
    torch.save(values, directory / "non_lora_trainables.bin")


def _token_ids(inputs: Path | Parts) -> Json:
    """Returns the ids of the tokens that begin and end a text, as entries of a config.json."""
    if not has_tokenizer(inputs):
        return {}
    tokenizer = load_tokenizer(inputs)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def _check(config: ModelConfig) -> None:
    """Raises ConfigError unless LLaVA's own code supports the decoder, tower and projector."""
    if config.llm.model_type == "qwen3":
        raise ConfigError("LLaVA's own code does not support a qwen3 decoder; use --to hf")
    if config.vision.model_type != "clip_vision_model" or config.projector_hidden_act != "gelu":
        raise ConfigError(
            f"LLaVA's own code does not support a {config.vision.model_type} tower with a "
            f"{config.projector_hidden_act} projector, only a clip_vision_model tower with a gelu "
            "projector; use --to hf"
        )


def _own_llm(config: ModelConfig, inputs: Path | Parts) -> LlmConfig:
    """Returns the decoder's sizes without the image and padding tokens, if these ids are the last.

    LLaVA's own code has neither an image token nor this padding token.
    """
    if not has_tokenizer(inputs):  # the number of tokens is unknown
        return config.llm
    added = {config.image_token_id, config.pad_token_id}
    rows = known = len(load_tokenizer(inputs))
    while rows - 1 in added:
        rows -= 1
    return dataclasses.replace(config.llm, vocab_size=rows) if rows < known else config.llm


def _first_rows(param: Stored, rows: int) -> Stored:
    """Returns a parameter that consists of the first rows of another parameter."""
    return Stored((rows, *param.shape[1:]), param.dtype, lambda index: param.read(index)[:rows])
