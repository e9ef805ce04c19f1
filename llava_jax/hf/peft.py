"""LoRA adapters as PEFT directories: adapter_config.json and adapter_model.safetensors.

Adapters are written with the names of transformers 5 and read with those of either era:

    transformers 5            base_model.model.model.language_model.layers.0.self_attn.q_proj...
    transformers up to 4.51   base_model.model.language_model.model.layers.0.self_attn.q_proj...

PEFT loads a file of the other era without a word and without effect. Here a file is read only if
all of it belongs to the model.
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llava_jax.config import LLM_LINEARS, VISION_LINEARS, LoraConfig, ModelConfig
from llava_jax.hf import layouts
from llava_jax.hf.tensorfile import CheckpointError, Tensor, open_tensors, write_tensors
from llava_jax.hf.weights import assemble, find_tensors, save_tensors
from llava_jax.lora import BEHIND_FEATURE, LLM, VISION, is_adapter
from llava_jax.models.layers import Abstract, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # ours: which weights the adapter was trained on; PEFT passes it over

_PREFIX = "base_model.model."
_NAMES = layouts.C
# Where a stack's blocks are in the modules' names, in every version of transformers.
_BLOCKS = {
    LLM: r"(model\.)?language_model\.(model\.)?layers",
    VISION: r"(model\.)?vision_tower\.(vision_model\.)?encoder\.layers",
}
_VISION_PATTERN = r"vision_tower\..*"
# What is trained in full beside adapters, as PEFT's modules_to_save names it.
_MODULES = {"projector.": "multi_modal_projector", "vision.": "vision_tower"}
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter directory, checked against a model but not read yet.

    Attributes:
        adapters: LoRA settings by stack, `LLM` or `VISION`.
        abstract: Shape and dtype of every parameter in the file, by our names: `lora_a` and
            `lora_b` of each target, and what was trained in full.
        base_name: Where its base lay when it was trained; None if the directory does not say.
        fingerprint: Of that base, as `weights.fingerprint` gives it; None if it does not say.
    """

    adapters: dict[str, LoraConfig]
    abstract: Abstract
    base_name: str | None
    fingerprint: str | None
    tensors: Mapping[str, list[Tensor]]

    def load(self, abstract: Abstract | None = None) -> Params:
        """Reads the parameters that `abstract` names, as it says; None is `self.abstract`."""
        abstract = self.abstract if abstract is None else abstract
        return {path: assemble(path, self.tensors[path], spec) for path, spec in abstract.items()}


def save_adapter(
    directory: str | Path,
    params: Params,
    adapters: Mapping[str, LoraConfig],
    config: ModelConfig,
    *,
    base_name: str | None,
    fingerprint: str | None,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads on the Hugging Face base.

    Every process of a run must call it; the first one writes.

    Args:
        directory: Made if it does not exist.
        params: Everything that was trained: adapters, and the parts tuned in full beside them. Of
            such a vision tower also what did not train, for PEFT takes it only whole.
        adapters: LoRA settings by stack, `LLM` or `VISION`.
        config: Of the model that was trained.
        base_name: Directory or hub id of the base, for those who load the adapter.
        fingerprint: Of the base, as `weights.fingerprint` gives it.

    Raises:
        ValueError: `params` has something that a PEFT adapter cannot hold.
    """
    directory = Path(directory)
    whole = [path for path in params if not is_adapter(path)]
    foreign = [path for path in whole if not path.startswith(tuple(_MODULES))]
    if foreign:
        raise ValueError(f"a PEFT adapter has no room for {', '.join(foreign)}")
    modules = [name for ours, name in _MODULES.items() if any(p.startswith(ours) for p in whole)]
    if "vision_tower" in modules and not any(path.startswith(BEHIND_FEATURE) for path in whole):
        raise ValueError("PEFT takes a vision tower only whole, with the layers behind the feature")
    base = {"fingerprint": fingerprint}
    written = _peft_config(adapters, config, modules) | {"base_model_name_or_path": base_name}
    directory.mkdir(parents=True, exist_ok=True)
    write = lambda specs, fetch: write_tensors(directory / WEIGHTS, specs, fetch)
    save_tensors(params, config, _peft_name, write)
    if jax.process_index() == 0:
        (directory / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        (directory / BASE).write_text(json.dumps(base, indent=2, sort_keys=True) + "\n")


def _peft_name(parameter: str) -> str:
    name = _NAMES.file_name(parameter)
    name = re.sub(r"\.lora_([ab])$", lambda match: f".lora_{match[1].upper()}.weight", name)
    return _PREFIX + name


def _peft_config(
    adapters: Mapping[str, LoraConfig], config: ModelConfig, modules: list[str]
) -> dict[str, Any]:
    """adapter_config.json: the decoder's settings, and the tower's as patterns if they differ."""
    first = adapters.get(LLM) or adapters[VISION]
    ranks, alphas = {}, {}
    if VISION in adapters and adapters[VISION] != first:
        ranks[_VISION_PATTERN] = adapters[VISION].rank
        alphas[_VISION_PATTERN] = adapters[VISION].alpha
    targets = [_target_pattern(stack, lora, config) for stack, lora in adapters.items()]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": "|".join(targets),
        "modules_to_save": modules or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def _target_pattern(stack: str, lora: LoraConfig, config: ModelConfig) -> str:
    """A regular expression for the linears with adapters; unused vision layers do not match."""
    layers = r"\d+"
    if stack == VISION:
        layers = f"({'|'.join(map(str, range(config.used_vision_layers)))})"
    return rf"{_BLOCKS[stack]}\.{layers}\.\w+\.({'|'.join(lora.targets)})"


def open_adapter(directory: str | Path, config: ModelConfig, abstract: Abstract) -> Adapter:
    """Opens a PEFT directory, ours or one that PEFT wrote.

    Adapters in vision layers behind the feature are passed over: no output depends on them.

    Args:
        directory: With adapter_config.json and adapter_model.safetensors.
        config: Of the base model.
        abstract: The model's parameters, with adapters or without.

    Raises:
        CheckpointError: Not a LoRA adapter, one of a kind that is not supported, or one that does
            not fit the model: an error that names every tensor that is missing, foreign or of
            another rank or shape.
    """
    directory = Path(directory)
    settings = _read_settings(directory / CONFIG)
    tensors = {_plain_name(name): t for name, t in open_tensors(directory / WEIGHTS).items()}
    try:
        layout = layouts.recognise(tensors)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{directory} has nothing for this model: {error}") from error
    paths = {name: layouts.stacked(layout.parameter(name) or "", config) for name in tensors}
    behind = [n for n, path in paths.items() if ".tail." in path and is_adapter(path)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in behind}
    modules = {stack: [n for n in tensors if _is_adapter_of(paths[n], stack)] for stack in _BLOCKS}
    adapters = {
        stack: _stack_settings(directory, settings, stack, names)
        for stack, names in modules.items()
        if names
    }
    if not adapters:
        raise CheckpointError(f"{directory} has no LoRA tensors for the decoder or vision tower")
    specs = _expected(adapters, {paths[name] for name in tensors}, abstract)
    found = find_tensors(str(directory), [(tensors, layout)], config, specs)
    base = _read_json(directory / BASE) if (directory / BASE).is_file() else {}
    return Adapter(adapters, specs, base_name(directory), base.get("fingerprint"), found)


def base_name(directory: str | Path) -> str | None:
    """What an adapter's base was called when it was trained; None if the directory does not say.

    Raises:
        CheckpointError: It is not a LoRA adapter.
    """
    return _read_settings(Path(directory) / CONFIG).get("base_model_name_or_path")


def load_adapter(
    directory: str | Path,
    adapters: Mapping[str, LoraConfig],
    config: ModelConfig,
    abstract: Abstract,
    trainable: Collection[str],
    fingerprint: str | None,
) -> Params:
    """Reads an adapter that a run is to go on with; it must be of the run's own kind.

    Args:
        directory: A PEFT directory.
        adapters: The run's LoRA settings by stack; dropout may differ.
        config: Of the base model.
        abstract: The run's parameters with their dtypes and shardings.
        trainable: The parameters that the run trains.
        fingerprint: Of the run's base; None is not compared.

    Raises:
        CheckpointError: As `open_adapter`; or it has other settings than the run, holds parameters
            that the run keeps frozen, or was trained on another base.
    """
    adapter = open_adapter(directory, config, abstract)
    problems = []
    meaning = lambda lora: lora and (lora.rank, lora.alpha, sorted(lora.targets))
    for stack in (LLM, VISION):
        has, wants = meaning(adapter.adapters.get(stack)), meaning(adapters.get(stack))
        if has != wants:
            problems.append(f"{stack}* has (rank, alpha, targets) {has}, the run {wants}")
    trained = [path for path in adapter.abstract if not path.startswith(BEHIND_FEATURE)]
    frozen = [path for path in trained if not is_adapter(path) and path not in trainable]
    if frozen:
        problems.append(f"it holds {', '.join(frozen)}, which the run keeps frozen")
    if None not in (fingerprint, adapter.fingerprint) and fingerprint != adapter.fingerprint:
        problems.append(
            f"it was trained on {adapter.base_name} with fingerprint {adapter.fingerprint}, but "
            f"the run's base has {fingerprint}"
        )
    if problems:
        what = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{directory} does not fit this run\n{what}")
    return adapter.load({path: abstract[path] for path in trained})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no {file.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error


def _read_settings(file: Path) -> dict[str, Any]:
    settings = _read_json(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {settings.get('peft_type')!r}, not 'LORA'")
    odd = [f"{name} = {settings[name]!r}" for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        odd.append(f"bias = {settings['bias']!r}")
    if odd:
        raise CheckpointError(f"{file}: not supported: {', '.join(odd)}")
    return settings


def _plain_name(name: str) -> str:
    """A file's tensor name without what PEFT put round it; adapters end as ours do."""
    name = name.removeprefix(_PREFIX)
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
    return re.sub(
        r"\.lora_([AB])(\.default)?\.weight$", lambda match: f".lora_{match[1].lower()}", name
    )


def _is_adapter_of(path: str, stack: str) -> bool:
    return path.startswith(stack) and is_adapter(path)


def _stack_settings(
    directory: Path, settings: dict[str, Any], stack: str, names: list[str]
) -> LoraConfig:
    """The one setting of all of a stack's adapters.

    Args:
        directory: For messages.
        settings: adapter_config.json.
        stack: Which.
        names: Its adapters' tensors.
    """
    modules = sorted({name.rsplit(".", 1)[0] for name in names})
    ranks = {_of_module(settings, "r", "rank_pattern", module) for module in modules}
    alphas = {_of_module(settings, "lora_alpha", "alpha_pattern", module) for module in modules}
    if len(ranks) > 1 or len(alphas) > 1:
        raise CheckpointError(
            f"{directory / CONFIG}: {stack}* has ranks {sorted(ranks)} and alphas "
            f"{sorted(alphas)}; one of each is supported"
        )
    (rank,), (alpha,) = ranks, alphas
    if settings.get("use_rslora"):  # scales by alpha / sqrt(rank)
        alpha *= math.sqrt(rank)
    linears = {module.rsplit(".", 1)[1] for module in modules}
    order = LLM_LINEARS if stack == LLM else VISION_LINEARS
    targets = tuple(linear for linear in order if linear in linears)
    return LoraConfig(int(rank), float(alpha), float(settings.get("lora_dropout") or 0), targets)


def _of_module(settings: dict[str, Any], name: str, pattern_name: str, module: str) -> int | float:
    """A module's rank or alpha: of the first pattern that its name ends in, as in PEFT."""
    for pattern, value in (settings.get(pattern_name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return settings[name]


def _expected(adapters: Mapping[str, LoraConfig], paths: set[str], abstract: Abstract) -> Abstract:
    """What an adapter with tensors of `paths` must hold, all of it."""
    shapes = {}
    for stack, lora in adapters.items():
        linears = {path.rsplit(".", 1)[0] for path in paths if _is_adapter_of(path, stack)}
        for linear in sorted(linears):
            if (weight := abstract.get(f"{linear}.weight")) is not None:
                layers, outputs, inputs = weight.shape
                shapes[f"{linear}.lora_a"] = layers, lora.rank, inputs
                shapes[f"{linear}.lora_b"] = layers, outputs, lora.rank
    whole = {path for path in paths if path in abstract and not is_adapter(path)}
    for part in [part for part in _MODULES if any(path.startswith(part) for path in whole)]:
        needed = [path for path in abstract if path.startswith(part) and not is_adapter(path)]
        shapes |= {path: abstract[path].shape for path in needed}
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
