"""Reads PEFT's adapter_config.json, and refuses settings that change the meaning of an adapter.

PEFT has dozens of settings, and new versions add more. Some only describe how the training began.
Others change what the stored weights mean, and some even change the base model when an adapter is
loaded. A setting is therefore either applied here, or known to mean nothing for a stored adapter,
or refused by name.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType

from llava_jax.disk import Json
from llava_jax.errors import CheckpointError
from llava_jax.models.lora import Adapter
from llava_jax.pretrained.limited_process import LimitedProcess, ProgramError
from llava_jax.pretrained.safetensors import read_json

CONFIG = "adapter_config.json"
"""Name of the file with the settings of an adapter."""

_TYPES = {
    **{"base_model_name_or_path": str, "revision": str},
    **{"rank_pattern": dict, "alpha_pattern": dict},
    **{"lora_dropout": int | float, "use_rslora": bool, "ensure_weight_tying": bool},
    **{"target_modules": str | list, "exclude_modules": str | list, "modules_to_save": list},
    **{"layers_to_transform": int | list, "layers_pattern": str | list},
    "trainable_token_indices": list | dict,
}
"""Settings that are applied, with their types; None stands for the default value."""

_WITHOUT_MEANING = {
    *("peft_type", "auto_mapping", "peft_version", "task_type", "inference_mode"),
    *("r", "lora_alpha", "bias", "init_lora_weights"),  # checked elsewhere
    # These only describe how an adapter was initialized, or belong to a setting that is refused.
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "Activated LoRA, which adapts only the tokens after an invocation",
    "arrow_config": "Arrow, which chooses between several adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "layers of Megatron",
    "layer_replication": "a base whose layers are repeated",
    "target_parameters": "adapters of parameters that belong to no linear layer",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "adapters with a bias",
}
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights with which PEFT does not change the base when it loads an adapter."""

_MAX = 2**24  # larger than the rank and alpha of any adapter


def read_settings(file: Path) -> Json:
    """Reads an adapter_config.json.

    Raises:
        CheckpointError: The file cannot be read, does not describe LoRA adapters, or has settings
            that are invalid or not supported.
    """
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {settings.get('peft_type')!r:.80}; only 'LORA' is supported"
        )
    if refused := _refused(settings):
        raise CheckpointError(f"{file}: these settings are not supported: {', '.join(refused)}")
    init = settings.get("init_lora_weights")
    if not any(init is plain or init == plain for plain in _PLAIN_INITS):
        raise CheckpointError(
            f"{file}: init_lora_weights is {init!r:.80}, with which PEFT may change the base when "
            "it loads the adapter; merge it with PEFT (merge_and_unload, save_pretrained) and use "
            "the merged model"
        )
    for name, kind in _TYPES.items():
        if not isinstance(settings.get(name), kind | None):
            raise CheckpointError(
                f"{file}: {name} is {settings[name]!r:.80}, which has the wrong type"
            )
    return settings


def _refused(settings: Json) -> list[str]:
    """Returns a text for each setting that is not supported and has not its default value."""
    refused = []
    for name, value in settings.items():
        if name in _REFUSED and value not in (None, False, [], {}):
            refused.append(f"{name} = {value!r:.80} ({_REFUSED[name]})")
        elif value and name not in (_TYPES.keys() | _REFUSED.keys() | _WITHOUT_MEANING):
            refused.append(f"{name:.80} = {value!r:.80} (an unknown setting)")
    if settings.get("bias", "none") != "none":
        refused.append(f"bias = {settings['bias']!r:.80} (trained biases)")
    return refused


def find_targets(
    file: Path, settings: Json, modules: Sequence[str], process: LimitedProcess
) -> list[bool] | None:
    """Returns, for each linear layer of a model, whether PEFT adds an adapter to it.

    Args:
        file: The adapter_config.json, for messages.
        settings: Content of the file.
        modules: Names of the layers in the model that the adapter was trained on.
        process: Process that matches the patterns.

    Returns:
        None if the file has no target_modules.

    Raises:
        CheckpointError: The settings cannot be used.
    """
    if settings.get("target_modules") is None:
        return None
    names = ("target_modules", "exclude_modules", "modules_to_save")
    names += ("layers_to_transform", "layers_pattern")
    rules = {name: settings.get(name) for name in names}
    try:
        return process("targets", modules=modules, **rules)
    except ProgramError as error:
        raise CheckpointError(f"{file}: target_modules cannot be used: {error}") from error


def ranks_and_alphas(
    file: Path, settings: Json, modules: Sequence[str], process: LimitedProcess
) -> list[tuple[int, float]]:
    """Returns the rank and the alpha of each module, as the settings have them.

    Args:
        file: The adapter_config.json, for messages.
        settings: Content of the file.
        modules: Names of linear layers.
        process: Process that matches the patterns.

    Raises:
        CheckpointError: A value or a pattern is invalid.
    """
    values = partial(_by_pattern, file, settings, modules, process)
    ranks = values("r", "rank_pattern", int)
    alphas = values("lora_alpha", "alpha_pattern", int | float)
    return [(int(rank), float(alpha)) for rank, alpha in zip(ranks, alphas, strict=True)]


def read_dropout(file: Path, settings: Json) -> float:
    """Returns the dropout rate; raises CheckpointError if it is not a probability."""
    dropout = settings.get("lora_dropout") or 0.0
    if not 0 <= dropout < 1:
        raise CheckpointError(
            f"{file}: lora_dropout is {dropout:.5g}; it must be at least 0 and less than 1"
        )
    return float(dropout)


def _by_pattern(
    file: Path,
    settings: Json,
    modules: Sequence[str],
    process: LimitedProcess,
    name: str,
    pattern_name: str,
    kind: type | UnionType,
) -> list[int | float]:
    """Returns the rank, or the alpha, of each module.

    As in PEFT, the first pattern that matches the end of a module's name gives the module's value.
    A module that no pattern matches has the value of the field `name`.
    """
    patterns = settings.get(pattern_name) or {}
    found: list[int | None] = [None] * len(modules)
    if patterns:
        try:
            found = process("match", patterns=[*patterns], names=modules)
        except ProgramError as error:
            raise CheckpointError(f"{file}: {pattern_name} cannot be used: {error}") from error
    values = [*patterns.values(), settings.get(name)]
    chosen = [values[-1 if index is None else index] for index in found]
    for value in chosen:
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < _MAX:
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}; r must be a positive integer, and lora_alpha "
                "must be a positive number"
            )
    return chosen


def read_tokens(file: Path, settings: Json, module: str, size: int) -> tuple[int, ...]:
    """Returns the ids of the tokens whose vectors were trained.

    Args:
        file: The adapter_config.json, for messages.
        settings: Content of the file.
        module: Name of the module, "embed_tokens" or "lm_head".
        size: Number of tokens of the model's vocabulary.

    Raises:
        CheckpointError: The ids are missing or invalid.
    """
    given = settings.get("trainable_token_indices") or {}
    if isinstance(given, list):  # PEFT takes the embedding if no module is named
        given = {"embed_tokens": given}
    ids = next((x for name, x in given.items() if name.rsplit(".", 1)[-1] == module), None)
    is_id = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < size
    if not isinstance(ids, list) or not all(map(is_id, ids)) or len({*ids}) < len(ids):
        raise CheckpointError(
            f"{file}: trainable_token_indices has {ids!r:.80} for {module}; different token ids "
            f"from 0 to {size - 1} are expected"
        )
    return tuple(ids)


def common_adapter(adapters: Mapping[str, Adapter]) -> Adapter:
    """Returns an adapter with the most frequent rank and alpha, for r and lora_alpha.

    Args:
        adapters: Adapters by the path of the linear layer. If there is none, the result has PEFT's
            default values.
    """
    found = [*adapters.values()] or [Adapter((8,), (8.0,))]
    counts = Counter(pair for adapter in found for pair in adapter.ranks_and_alphas if pair[0])
    ((rank, alpha), _) = counts.most_common(1)[0]
    return Adapter((rank,), (alpha,), found[0].dropout)
