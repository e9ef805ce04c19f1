"""What was trained on a base, in every form it comes in: read onto a model, or refused.

    PEFT's, of either era      adapter_config.json, adapter_model.safetensors
    LLaVA's LoRA directory     the same on the decoder's names; non_lora_trainables.bin
    LLaVA's stage 1            mm_projector.bin
    XTuner's exports           llm_adapter/, visual_encoder_adapter/ or visual_encoder/, projector/
    XTuner's .pth              one file, or a directory of DeepSpeed's, with all that was trained

They are recognised by the names of their tensors. What fits the model in part fits not at all.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from llava_jax.config import LoraConfig, ModelConfig, Parts, format_source
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError
from llava_jax.models import paths
from llava_jax.models.layers import Abstract, Params
from llava_jax.models.paths import BEHIND_FEATURE, LLM, VISION, is_adapter
from llava_jax.pretrained import layouts
from llava_jax.pretrained.layouts import Layout
from llava_jax.pretrained.load import Reader, assemble, find_tensors
from llava_jax.pretrained.peft import BASE, CONFIG, plain_name, read_settings, stack_settings
from llava_jax.pretrained.safetensors import Tensor, commonest, open_tensors, read_json

_LAYOUTS = (
    *(layouts.LLAMA, layouts.CLIP, layouts.CLIP_BARE),
    *layouts.LLAVA_LAYOUTS,
    *layouts.PROJECTOR_LAYOUTS,
)
_STACKS = (LLM, VISION)
_SETTINGS = {
    LLM: "tune.llm and --lora.rank, --lora.alpha, --lora.targets",
    VISION: "tune.vision and --vision-lora.rank, --vision-lora.alpha, --vision-lora.targets",
}
_XTUNER_PARTS = ("llm_adapter", "visual_encoder_adapter", "visual_encoder", "projector")
BESIDE = ("non_lora_trainables", "mm_projector")
"""Files of LLaVA's code, without their endings."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One file or directory: its tensors by plain names, and settings of adapters among them."""

    path: Path
    tensors: Mapping[str, Tensor]
    layout: Layout
    settings: Json | None


@dataclasses.dataclass(frozen=True)
class AdapterCheckpoint:
    """What was trained, checked against a model but not read yet.

    Attributes:
        layouts: How its pieces name their tensors.
        adapters: LoRA settings by stack, `models.lora.LLM` or `models.lora.VISION`.
        abstract: Shape and dtype of every parameter, by our names: `lora_a` and `lora_b` of each
            target, and what was trained in full.
        tensors: Where each lies, one a layer of those that are stacked.
        base_name: Its base, as it says itself; None if it does not.
        fingerprint: The fingerprint of that base; None if the checkpoint has none.
    """

    layouts: list[Layout]
    adapters: dict[str, LoraConfig]
    abstract: Abstract
    tensors: Mapping[str, list[Tensor]]
    base_name: str | None
    fingerprint: str | None

    @property
    def naming(self) -> str:
        """Whose names its tensors have, for messages."""
        return "; ".join(dict.fromkeys(layout.name for layout in self.layouts))

    def load(self, abstract: Abstract | None = None) -> Params:
        """Reads the parameters that `abstract` names, as it says; None is `self.abstract`."""
        abstract = self.abstract if abstract is None else abstract
        return {path: assemble(path, self.tensors[path], spec) for path, spec in abstract.items()}


def is_adapter_checkpoint(path: Path) -> bool:
    """Whether a place holds something to be put on a base, and no whole model."""
    return not _is_whole(path) and bool(_parts_in(path))


def _is_whole(path: Path) -> bool:
    has_adapter = (path / CONFIG).is_file() or (path / "llm_adapter").is_dir()
    weights = ("model*.safetensors*", "pytorch_model*.bin*")
    return not has_adapter and any(any(path.glob(pattern)) for pattern in weights)


def _parts_in(path: Path) -> list[Path]:
    """Files and directories with what was trained: the place itself, and what lies in it."""
    if path.is_file():
        return [path]
    is_zero = any(path.glob("*model_states.pt")) or (path / "latest").is_file()  # DeepSpeed's
    has_own = (path / CONFIG).is_file() or _is_whole(path) or is_zero
    parts = [path / part for part in _XTUNER_PARTS if (path / part).is_dir()]
    files = [file for name in BESIDE if (file := _file_beside(path, name))]
    return [*([path] if has_own else []), *parts, *files]


def _file_beside(directory: Path, stem: str) -> Path | None:
    found = [directory / f"{stem}{ending}" for ending in (".safetensors", ".bin")]
    return next((file for file in found if file.is_file()), None)


def check_readable(path: Path, read: Reader) -> None:
    """Refuses what is nothing that was trained, a text file or a directory of checkpoints.

    Raises:
        CheckpointError: Says what it is instead.
    """
    for piece in _parts_in(path):
        _open_piece(piece, read)


def named_base(path: Path) -> str | None:
    """The base that something trained names: a directory, a hub id, or parts; None if it does not.

    Raises:
        CheckpointError: It has settings that are not LoRA's.
    """
    named = {
        piece: read_settings(piece / CONFIG).get("base_model_name_or_path")
        for piece in _parts_in(path)
        if (piece / CONFIG).is_file()
    }
    if path in named:
        llm, vision = named[path], None
        if (path / "config.json").is_file():  # LLaVA's: the base is the decoder alone
            vision = read_json(path / "config.json").get("mm_vision_tower")
        return format_source(Parts(llm, vision)) if llm and vision else llm
    llm, vision = (named.get(path / part) for part in ("llm_adapter", "visual_encoder_adapter"))
    return format_source(Parts(llm, vision)) if llm and vision else None


def open_adapter(
    path: str | Path,
    config: ModelConfig,
    abstract: Abstract,
    *,
    read: Reader = open_tensors,
    alphas: Mapping[str, float] | None = None,
) -> AdapterCheckpoint:
    """Opens what was trained on a model.

    Adapters in vision layers behind the feature are passed over: no output depends on them.

    Args:
        path: A directory or file in a form that this module knows.
        config: Sizes of the base model.
        abstract: The model's parameters, with adapters or without.
        read: Opens one file or directory of tensors.
        alphas: LoRA's alpha by stack, for a .pth file, which does not say it.

    Raises:
        CheckpointError: Not such a place, a kind of adapter that is not supported, or one that does
            not fit the model: an error that names every tensor that is missing, foreign or of
            another rank or shape.
    """
    path = Path(path)
    pieces = [_without_unused(_open_piece(p, read), config) for p in _parts_in(path) or [path]]
    adapters: dict[str, LoraConfig] = {}
    paths: set[str] = set()
    for piece in pieces:
        named = {name: _path(piece, name, config) for name in piece.tensors}
        paths |= set(named.values())
        for stack in _STACKS:
            names = [name for name, path in named.items() if _is_adapter_of(path, stack)]
            if names:
                adapters[stack] = _settings(piece, stack, names, alphas or {})
    specs = _expected(adapters, paths, abstract)
    if not specs:
        raise CheckpointError(f"{path} has no tensor that this model could take")
    sources = [(dict(piece.tensors), piece.layout) for piece in pieces]
    found = find_tensors(str(path), sources, config, specs, may_grow=True)
    base = read_json(path / BASE) if (path / BASE).is_file() else {}
    fingerprint = base.get("fingerprint")
    named = [piece.layout for piece in pieces]
    return AdapterCheckpoint(named, adapters, specs, found, named_base(path), fingerprint)


def _open_piece(path: Path, read: Reader) -> _Piece:
    settings = read_settings(path / CONFIG) if (path / CONFIG).is_file() else None
    own = None if settings is None else _file_beside(path, "adapter_model")
    file = own or path
    named = read(file)
    tensors = {plain_name(name): tensor for name, tensor in named.items()}
    if len(tensors) < len(named):
        raise CheckpointError(f"{file} has {commonest(map(plain_name, named))} under two names")
    try:
        layout = layouts.recognise(tensors, _LAYOUTS)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path} has nothing for this model: {error}") from error
    return _Piece(path, tensors, layout, settings)


def _path(piece: _Piece, name: str, config: ModelConfig) -> str:
    return paths.stacked(piece.layout.parameter(name) or "", config)


def _without_unused(piece: _Piece, config: ModelConfig) -> _Piece:
    unused = lambda path: ".tail." in path and is_adapter(path)
    kept = {n: t for n, t in piece.tensors.items() if not unused(_path(piece, n, config))}
    return dataclasses.replace(piece, tensors=kept)


def _is_adapter_of(path: str, stack: str) -> bool:
    return path.startswith(stack) and is_adapter(path)


def _settings(
    piece: _Piece, stack: str, names: list[str], alphas: Mapping[str, float]
) -> LoraConfig:
    if piece.settings is not None:
        return stack_settings(piece.path, piece.settings, stack, names)
    if stack not in alphas:
        raise CheckpointError(
            f"{piece.path} has adapters in {stack}*, and does not say their alpha: it stands in "
            "the config that they were trained with, XTuner's .py, as lora_alpha; give it with "
            "--alpha (of the decoder) or --vision-alpha"
        )
    shapes = [piece.tensors[name].shape for name in names if name.endswith(".lora_a")]
    if not shapes or not shapes[0]:
        raise CheckpointError(f"{piece.path} has adapters in {stack}* without a rank: {names[0]}")
    rank = shapes[0][0]
    return stack_settings(piece.path, {"r": rank, "lora_alpha": alphas[stack]}, stack, names)


def _expected(adapters: Mapping[str, LoraConfig], paths: set[str], abstract: Abstract) -> Abstract:
    """What must be there, all of it, where there are tensors of `paths`."""
    shapes = {}
    for stack, lora in adapters.items():
        linears = {path.rsplit(".", 1)[0] for path in paths if _is_adapter_of(path, stack)}
        for linear in sorted(linears):
            weight = abstract.get(f"{linear}.weight")
            if weight is not None and len(weight.shape) == 3:  # else what it has is left over
                layers, outputs, inputs = weight.shape
                shapes[f"{linear}.lora_a"] = layers, lora.rank, inputs
                shapes[f"{linear}.lora_b"] = layers, outputs, lora.rank
    whole = {path.split(".", 1)[0] for path in paths if path in abstract and not is_adapter(path)}
    for part in sorted(whole):
        needed = [p for p in abstract if p.startswith(f"{part}.") and not is_adapter(p)]
        shapes |= {path: abstract[path].shape for path in needed}
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


def check_base(
    trained: AdapterCheckpoint, path: str | Path, base: str | Path | Parts, fingerprint: str
) -> None:
    """Refuses a base other than the one that adapters were trained on, if they name one.

    Args:
        trained: The result of `open_adapter`.
        path: Its directory or file.
        base: The base's directory or parts.
        fingerprint: The base's fingerprint.

    Raises:
        CheckpointError: The base has other weights.
    """
    if trained.fingerprint not in (None, fingerprint):
        raise CheckpointError(
            f"{path} was trained on {trained.base_name}, whose weights are not those of "
            f"{format_source(base)}; load that base"
        )


def load_adapter(
    path: str | Path,
    adapters: Mapping[str, LoraConfig],
    config: ModelConfig,
    abstract: Abstract,
    trainable: Collection[str],
    fingerprint: str | None,
) -> Params:
    """Reads adapters that a run continues to train; their settings must be those of the run.

    Args:
        path: A directory or file, as in `open_adapter`.
        adapters: The run's LoRA settings by stack; dropout may differ.
        config: Sizes of the base model.
        abstract: The run's parameters with their dtypes and shardings.
        trainable: The parameters that the run trains.
        fingerprint: The fingerprint of the run's base; None is not compared.

    Raises:
        CheckpointError: `open_adapter` fails; or it has other settings than the run, parameters
            that the run keeps frozen, or was trained on another base.
    """
    alphas = {stack: lora.alpha for stack, lora in adapters.items()}
    trained = open_adapter(path, config, abstract, alphas=alphas)
    problems = [*_other_settings(trained, adapters)]
    kept = [path for path in trained.abstract if not path.startswith(BEHIND_FEATURE)]
    frozen = [path for path in kept if not is_adapter(path) and path not in trainable]
    if frozen:
        problems.append(f"it holds {', '.join(frozen)}, which the run keeps frozen")
    if None not in (fingerprint, trained.fingerprint) and fingerprint != trained.fingerprint:
        problems.append(
            f"it was trained on {trained.base_name} with fingerprint {trained.fingerprint}, but "
            f"the run's base has {fingerprint}"
        )
    if problems:
        what = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{path} does not fit this run\n{what}")
    return trained.load({path: abstract[path] for path in kept})


def _other_settings(
    trained: AdapterCheckpoint, adapters: Mapping[str, LoraConfig]
) -> Iterable[str]:
    meaning = lambda lora: lora and (lora.rank, lora.alpha, sorted(lora.targets))
    for stack in _STACKS:
        has, wants = meaning(trained.adapters.get(stack)), meaning(adapters.get(stack))
        if has != wants:
            yield (
                f"{stack}* has (rank, alpha, targets) {has}, the run {wants}: it must have the "
                f"same, by {_SETTINGS[stack]}"
            )
