"""Reads and writes LoRA adapters as PEFT directories.

A PEFT directory has an adapter_config.json and an adapter_model.safetensors. The names of tensors
depend on the version of transformers; the code calls the two conventions era 5 and era 4:

    transformers 5            base_model.model.model.language_model.layers.0.self_attn.q_proj...
    transformers up to 4.51   base_model.model.language_model.model.layers.0.self_attn.q_proj...

Adapters are written for era 5 by default, and both eras are read. PEFT silently ignores tensors
that have the names of the other era. This module instead refuses a file unless every tensor belongs
to the model.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax

from llava_jax.config import ModelConfig, absolute_source
from llava_jax.disk import Json
from llava_jax.distributed.multihost import is_main_process
from llava_jax.models.lora import Adapter, Adapters, TokenRows
from llava_jax.models.paths import (
    BEHIND_FEATURE,
    LLM,
    PROJECTOR,
    TRAINABLE_TOKENS,
    VISION,
    is_adapter,
    is_projector,
)
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.load import Stored
from llava_jax.pretrained.peft_config import CONFIG, common_adapter
from llava_jax.pretrained.safetensors import write_tensors
from llava_jax.pretrained.save import save_tensors

WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"  # not part of PEFT's format; it has the fingerprint of the base's weights

_PREFIX, _TOKENS = "base_model.model.", ".token_adapter.trainable_tokens_delta"
_ERAS = {4: layouts.HF_4_36, 5: layouts.HF_5_MEMORY}
# For each part, two patterns of the names before those of its modules, in every version of
# transformers: from the start of the name for target_modules, and for rank_pattern and
# alpha_pattern from a later module on. Older versions of PEFT need at least one module name before
# such a match, and in era 4, the names start with the name of the part.
_NAMES = {
    LLM: (r"(model\.)?language_model\.(model\.)?layers\.", r"(language_model|model)\.layers\."),
    VISION: (r"(model\.)?vision_tower\.(vision_model\.)?encoder\.layers\.", r"encoder\.layers\."),
    PROJECTOR: (r"(model\.)?multi_modal_projector\.", ""),
}
# Names of the parts in PEFT's modules_to_save, which lists the parts that were trained in full.
_MODULES = {
    "projector.": "multi_modal_projector",
    "vision.": "vision_tower",
    "llm.embed_tokens.": "embed_tokens",
    "llm.lm_head.": "lm_head",
}
_PROJECTOR_SIZE = 4  # weight and bias of two linear layers


def save_adapter(
    directory: str | Path,
    params: Mapping[str, jax.Array | Stored],
    adapters: Adapters,
    config: ModelConfig,
    *,
    base_name: str | None,
    fingerprint: str | None,
    revision: str | None = None,
    era: Literal[4, 5] = 5,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` can add to the Hugging Face base.

    All processes of a run must call this function; only the first process writes files.

    Args:
        directory: Directory to write; it is created if it does not exist.
        params: All trained parameters: adapters, and the parameters of parts that were trained in
            full. If the vision tower was trained in full, its frozen parameters must be included,
            because PEFT can only load a complete tower.
        adapters: Adapters by the path of their module.
        config: Sizes of the model that was trained.
        base_name: Path, hub id or parts of the base. It is stored for programs that load the
            adapter; local paths are made absolute.
        fingerprint: Fingerprint of the base's weights, or None if it is not known.
        revision: Branch, tag or commit of the base on the hub; None means the newest commit.
        era: Version of transformers whose module names are used: 5 for versions from 4.52 on, 4 for
            versions up to 4.51.

    Raises:
        ValueError: `params` has parameters that a PEFT adapter cannot store, or only a part of the
            vision tower.
    """
    directory = Path(directory)
    full = [path for path in params if not is_adapter(path)]
    if foreign := not_storable(params):
        raise ValueError(f"a PEFT adapter cannot store these parameters: {', '.join(foreign)}")
    modules = [name for ours, name in _MODULES.items() if any(p.startswith(ours) for p in full)]
    if "vision_tower" in modules and not any(path.startswith(BEHIND_FEATURE) for path in full):
        raise ValueError(
            "PEFT can only load a complete vision tower; also include the layers after the feature "
            "layer"
        )
    base = {"fingerprint": fingerprint}
    named = None if base_name is None else absolute_source(base_name)
    written = _peft_config(adapters, config, modules)
    written |= {"base_model_name_or_path": named, "revision": revision}
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
    write = lambda specs, fetch: write_tensors(directory / WEIGHTS, specs, fetch)
    save_tensors(params, config, partial(peft_name, _ERAS[era]), write, adapters=adapters)
    if is_main_process():
        (directory / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        (directory / BASE).write_text(json.dumps(base, indent=2, sort_keys=True) + "\n")


def not_storable(params: Collection[str]) -> list[str]:
    """Returns the paths of the parameters that a PEFT adapter cannot store.

    PEFT stores adapters, and whole modules that were trained in full: the projector, the vision
    tower, the embedding and the output matrix.

    Args:
        params: Paths of trained parameters.
    """
    full = [path for path in params if not is_adapter(path)]
    projector = [*filter(is_projector, full)]
    foreign = [path for path in full if not path.startswith(tuple(_MODULES))]
    return foreign + (projector if len(projector) not in (0, _PROJECTOR_SIZE) else [])


def peft_name(layout: Layout, parameter: str) -> str:
    """Returns the name that the tensor of a parameter has in the file of a PEFT adapter.

    Args:
        layout: Layout of the base's tensor names.
        parameter: Parameter path with the layer index, as `models.paths.unstacked` returns it.
    """
    name = layout.file_name(parameter)
    name = re.sub(r"\.lora_([ab])$", lambda match: f".lora_{match[1].upper()}.weight", name)
    return _PREFIX + name.replace(TRAINABLE_TOKENS, _TOKENS)


def _peft_config(adapters: Adapters, config: ModelConfig, modules: list[str]) -> Json:
    """Returns the content of adapter_config.json.

    The rank and the alpha of the first adapter are r and lora_alpha. Adapters with another rank or
    alpha are in `rank_pattern` and `alpha_pattern`.
    """
    linears = {path: x for path, x in adapters.items() if isinstance(x, Adapter)}
    rows = {path: x for path, x in adapters.items() if isinstance(x, TokenRows)}
    first = common_adapter(linears)
    patterns = [_patterns(part, linears, first) for part in _NAMES]
    targets = [_target_pattern(part, linears, config) for part in _NAMES]
    is_tied = config.llm.tie_word_embeddings
    indices = {path.rsplit(".", 1)[-1]: [*x.indices] for path, x in rows.items()}
    return lora_settings(first) | {
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "rank_pattern": {key: rank for found in patterns for key, (rank, _) in found.items()},
        "alpha_pattern": {key: alpha for found in patterns for key, (_, alpha) in found.items()},
        "target_modules": "|".join(filter(None, targets)),
        "modules_to_save": modules or None,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        # Old versions of PEFT do not know these fields, so they are written only if they are used.
        **({"trainable_token_indices": indices} if indices else {}),
        **({"ensure_weight_tying": True} if is_tied and "embed_tokens" in modules else {}),
    }


def lora_settings(adapter: Adapter) -> Json:
    """Returns the fields that adapter_config.json has in PEFT's and in LLaVA's directories."""
    return {
        "peft_type": "LORA",
        "r": adapter.ranks[0],
        "lora_alpha": adapter.alphas[0],
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _patterns(
    part: str, linears: Mapping[str, Adapter], first: Adapter
) -> dict[str, tuple[int, float]]:
    """Returns the rank and the alpha of adapters that differ from `first`, by name pattern."""
    of_part = {path: x for path, x in linears.items() if path.startswith(part)}
    pairs = {pair for x in of_part.values() for pair in x.ranks_and_alphas if pair[0]}
    if pairs <= {*first.ranks_and_alphas}:
        return {}
    start = _NAMES[part][1]
    if len(pairs) == 1 and start:
        return {f"{start}.*": pairs.pop()}
    found = {}
    for path, adapter in of_part.items():
        for pair in sorted(pairs - {*first.ranks_and_alphas}):
            layers = [i for i, x in enumerate(adapter.ranks_and_alphas) if x == pair]
            if layers:
                found[start + _end(part, path, layers)] = pair
    return found


def _target_pattern(part: str, linears: Mapping[str, Adapter], config: ModelConfig) -> str:
    """Returns a regular expression that matches the modules of a part that have adapters."""
    ends: dict[tuple[int, ...], list[str]] = {}
    for path, adapter in linears.items():
        if path.startswith(part):
            layers = tuple(index for index, rank in enumerate(adapter.ranks) if rank)
            ends.setdefault(layers, []).append(path)
    is_all = lambda layers: part == LLM and len(layers) == config.llm.num_hidden_layers
    return "|".join(
        _NAMES[part][0] + _end(part, found, () if is_all(layers) else layers)
        for layers, found in ends.items()
    )


def _end(part: str, linears: str | list[str], layers: Sequence[int]) -> str:
    """Returns a pattern for the ends of the names of linear layers; no index means all layers."""
    paths = [linears] if isinstance(linears, str) else linears
    names = "|".join(path.removeprefix(part).replace(".", r"\.") for path in paths)
    index = rf"({'|'.join(map(str, layers))})" if layers else r"\d+"
    return f"({names})" if part == PROJECTOR else rf"{index}\.({names})"


def plain_name(name: str) -> str:
    """Removes the parts that PEFT adds to a tensor name.

    The resulting name of an adapter ends in `.lora_a` or `.lora_b`, like the adapter's path in this
    package.
    """
    name = name.replace(_PREFIX, "", 1).replace(".base_layer.", ".")
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name).replace(_TOKENS, TRAINABLE_TOKENS)
    return re.sub(
        r"\.lora_([AB])(\.default)?\.weight$", lambda match: f".lora_{match[1].lower()}", name
    )
