"""Writes directories for the code of LLaVA and LLaVA-NeXT: whole models and LoRA adapters."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from llava_jax.config import Aspect, LlmConfig, ModelConfig, Parts
from llava_jax.data.templates import Template
from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.models.lora import Adapter, Adapters
from llava_jax.models.paths import LLM, NEWLINE, VOCABULARY, is_adapter, is_projector
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.image_processor import write_image_processor, write_json
from llava_jax.pretrained.llava_directory import SIGLIP, known_tower, official_settings
from llava_jax.pretrained.load import Stored
from llava_jax.pretrained.model_config import (
    VOCABULARY_MULTIPLE,
    read_llm_config,
    text_settings,
    tower_settings,
)
from llava_jax.pretrained.peft import WEIGHTS, lora_settings, peft_name
from llava_jax.pretrained.peft_config import CONFIG, common_adapter
from llava_jax.pretrained.processor import generation_settings
from llava_jax.pretrained.safetensors import Specs, write_tensors
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

    A CLIP tower is written twice: in the checkpoint, and as a subdirectory. LLaVA's code builds the
    tower from the subdirectory, and then loads the weights of the checkpoint into the tower.
    LLaVA-NeXT's code builds a SigLIP tower from its hub id only, and deletes its last layer.

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
    own = {path: x for path, x in {**params, **cut}.items() if not _is_deleted(path, config)}
    save_params(own, directory, config, layout=layouts.LLAVA, dtype=dtype)
    tower = SIGLIP
    if config.vision.has_class_token:
        tower = str(final.absolute() / _TOWER)
        vision = {path: x for path, x in params.items() if path.startswith("vision.")}
        (directory / _TOWER).mkdir()
        save_params(vision, directory / _TOWER, config, layout=layouts.CLIP, dtype=dtype)
        settings = tower_settings(config.vision) | {"torch_dtype": said}
        write_json(directory / _TOWER / "config.json", settings)
        write_image_processor(inputs, directory / _TOWER)
    settings = text_settings(llm) | _token_ids(inputs) | {"torch_dtype": said}
    write_json(directory / "config.json", official_settings(config, settings, tower, aspect))
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
    """Writes adapters for LLaVA's own code: a PEFT adapter, and other trained parts as a pickle.

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
        ConfigError: `params` has parameters that these directories cannot store, LLaVA's own code
            does not support the vision tower or the projector, the adapters have different ranks,
            or PyTorch is not installed.
    """
    lora = {path: x for path, x in params.items() if path.startswith(LLM) and is_adapter(path)}
    # The loader of LLaVA-NeXT reads more than the loader of LLaVA-1.5.
    is_own = lambda path: path == NEWLINE or (config.has_newline and path.startswith("vision."))
    whole = {path: x for path, x in params.items() if not is_adapter(path)}
    beside = {path: x for path, x in whole.items() if is_projector(path) or is_own(path)}
    if foreign := sorted(params.keys() - lora.keys() - beside.keys()):
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
    beside = {path: x for path, x in beside.items() if not _is_deleted(path, config)}
    save_tensors(beside, config, naming, partial(_save_pickle, directory))
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
    named = tower if config.vision.has_class_token else SIGLIP
    own = official_settings(config, settings, named or "", aspect)
    write_json(directory / "config.json", own | {"unfreeze_mm_vision_tower": False})


def _save_pickle(directory: Path, specs: Specs, fetch: Callable[[str], np.ndarray]) -> None:
    """Writes non_lora_trainables.bin, in float32; raises ConfigError if PyTorch is missing."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            "LLaVA's LoRA directories contain a pickle; writing it needs PyTorch: pip install torch"
        ) from error
    values = {name: torch.from_numpy(fetch(name).astype(np.float32)) for name in specs}
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
    if len(config.feature_layers) > 1:
        raise ConfigError(
            f"LLaVA's own code takes the features of one layer of the tower, not of the layers "
            f"{config.vision_feature_layer}; use --to hf"
        )
    vision, known = config.vision, known_tower({"mm_vision_tower": SIGLIP})
    if config.projector_hidden_act != "gelu":
        raise ConfigError(
            f"LLaVA's own code does not support a {config.projector_hidden_act} projector, only a "
            "gelu projector; use --to hf"
        )
    used = dataclasses.replace(
        vision, num_hidden_layers=config.used_vision_layers, vision_use_head=False
    )
    is_whole = config.vision_feature_select_strategy == "full"
    if not vision.has_class_token and not (used == known and is_whole):
        raise ConfigError(
            "LLaVA's own code supports only one SigLIP tower, siglip-so400m-patch14-384, with all "
            f"features of its layer 26; this model has layer {config.used_vision_layers} of a "
            f"tower with images of {vision.image_size} pixels and hidden states of "
            f"{vision.hidden_size} numbers (vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r}); use --to hf"
        )


def _is_deleted(path: str, config: ModelConfig) -> bool:
    """Returns True for the parts of a SigLIP tower that LLaVA-NeXT's code deletes."""
    is_after = path.startswith(("vision.encoder.tail.", "vision.head."))
    return is_after and not config.vision.has_class_token


def _own_llm(config: ModelConfig, inputs: Path | Parts) -> LlmConfig:
    """Returns the decoder's sizes without the rows that were added for LLaVA's new tokens.

    LLaVA's own code has no tokens for images and videos, and no token that is only padding. A
    vocabulary that has more rows than the tokens need was not extended, and is kept.
    """
    if not has_tokenizer(inputs):  # the number of tokens is unknown
        return config.llm
    added = {*config.media_token_ids, config.pad_token_id}
    rows = known = len(load_tokenizer(inputs))
    while rows - 1 in added:
        rows -= 1
    is_extended = config.llm.vocab_size <= -(-known // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if rows == known or not is_extended:
        return config.llm
    return dataclasses.replace(config.llm, vocab_size=rows)


def _first_rows(param: Stored, rows: int) -> Stored:
    """Returns a parameter that consists of the first rows of another parameter."""
    return Stored((rows, *param.shape[1:]), param.dtype, lambda index: param.read(index)[:rows])
