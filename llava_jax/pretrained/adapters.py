"""Reads adapter checkpoints, and checks that they fit a model.

An adapter checkpoint contains the parameters that were trained on a base model: LoRA adapters, and
parts (such as the projector) that were trained in full. These formats are supported:

    PEFT directory             adapter_config.json, adapter_model.safetensors
    LLaVA's LoRA directory     the same files with LLaVA's tensor names, non_lora_trainables.bin
    LLaVA's stage 1            mm_projector.bin
    XTuner's exports           llm_adapter/, visual_encoder_adapter/ or visual_encoder/, projector/
    XTuner's .pth              one file, or a DeepSpeed directory, with all trained parameters

The format is recognized by the names of the tensors. A checkpoint is refused if any of its tensors
does not fit the model.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llava_jax.config import ModelConfig, Parts, format_source
from llava_jax.errors import CheckpointError
from llava_jax.models.layers import Abstract, Params
from llava_jax.models.lora import Adapter, Adapters, TokenRows
from llava_jax.models.paths import (
    BEHIND_FEATURE,
    LLM,
    PROJECTOR,
    TRAINABLE_TOKENS,
    VISION,
    is_adapter,
)
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.adapter_contents import (
    Piece,
    find_adapters,
    find_full,
    padded,
    used_tensors,
)
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.load import Reader, assemble, find_tensors
from llava_jax.pretrained.peft import BASE, plain_name
from llava_jax.pretrained.peft_config import CONFIG, read_settings
from llava_jax.pretrained.safetensors import Tensor, commonest, open_tensors, read_json
from llava_jax.pretrained.unsupported import BESIDE, refuse_pointers

_LAYOUTS = (
    *(layouts.LLAMA, layouts.CLIP, layouts.CLIP_BARE),
    *layouts.LLAVA_LAYOUTS,
    *layouts.PROJECTOR_LAYOUTS,
)


def _flags(field: str) -> str:
    """Returns the options for the ranks and the alphas of adapters, and for the adapted modules."""
    names = ("rank", "alpha", "use-rslora", "rank-pattern", "alpha-pattern", "targets")
    return ", ".join(f"--{field}.{name}" for name in (*names, "layers-to-transform"))


_SETTINGS = {
    LLM: f"tune.llm and {_flags('lora')}",
    PROJECTOR: f"tune.projector and {_flags('lora')}",
    VISION: f"tune.vision and {_flags('vision-lora')}",
}
_XTUNER_PARTS = ("llm_adapter", "visual_encoder_adapter", "visual_encoder", "projector")


@dataclasses.dataclass(frozen=True)
class AdapterCheckpoint:
    """An opened adapter checkpoint that fits a model. The values are not read yet.

    Attributes:
        layouts: Layout of the tensor names in each file or directory of the checkpoint.
        adapters: Adapters by the path of their module.
        abstract: Shape and dtype of each parameter in the checkpoint, by its path: adapters, with
            the largest rank of a stack, and parameters that were trained in full.
        tensors: Tensors of each parameter, by the parameter's path. A stacked parameter has one
            tensor per layer.
        base_name: Path, hub id or parts of the base, as the checkpoint names it; None if the
            checkpoint names no base.
        revision: Revision of the base on the hub, as in `NamedBase`.
        fingerprint: Fingerprint of the base's weights; None if the checkpoint has none.
    """

    layouts: list[Layout]
    adapters: Adapters
    abstract: Abstract
    tensors: Mapping[str, list[Tensor]]
    base_name: str | None
    revision: str | None
    fingerprint: str | None

    @property
    def naming(self) -> str:
        """Returns the names of the layouts in one string, for messages."""
        return "; ".join(dict.fromkeys(layout.name for layout in self.layouts))

    def load(self, abstract: Abstract | None = None) -> Params:
        """Reads the values of the parameters.

        Args:
            abstract: Parameters to read, with their shapes, dtypes and shardings; None reads all
                parameters of the checkpoint, in the dtypes of `self.abstract`.

        Raises:
            CheckpointError: A tensor cannot be read, or has NaN or infinite values.
        """
        abstract = self.abstract if abstract is None else abstract
        return {path: assemble(path, self.tensors[path], spec) for path, spec in abstract.items()}


def is_adapter_checkpoint(path: Path) -> bool:
    """Returns True for a file, or a directory with adapters or parts but without a whole model."""
    return not _is_whole(path) and bool(_parts_in(path))


def _is_whole(path: Path) -> bool:
    has_adapter = (path / CONFIG).is_file() or (path / "llm_adapter").is_dir()
    weights = ("model*.safetensors*", "pytorch_model*.bin*")
    return not has_adapter and any(any(path.glob(pattern)) for pattern in weights)


def _parts_in(path: Path) -> list[Path]:
    """Returns the files and directories of an adapter checkpoint: `path`, or entries of `path`."""
    if path.is_file():
        return [path]
    is_zero = any(path.glob("*model_states.pt")) or (path / "latest").is_file()  # from DeepSpeed
    has_own = (path / CONFIG).is_file() or _is_whole(path) or is_zero
    parts = [path / part for part in _XTUNER_PARTS if (path / part).is_dir()]
    files = [file for name in BESIDE if (file := file_beside(path, name))]
    return [*([path] if has_own else []), *parts, *files]


def file_beside(directory: Path, stem: str) -> Path | None:
    """Returns the file of tensors with a name such as those of `BESIDE`, or None without one."""
    found = [directory / f"{stem}{ending}" for ending in (".safetensors", ".bin")]
    return next((file for file in found if file.is_file()), None)


def check_readable(path: Path, read: Reader) -> None:
    """Raises CheckpointError unless the tensor names of an adapter checkpoint are recognized.

    Args:
        path: Directory or file, as in `open_adapter`.
        read: Function that opens a file or directory and returns its tensors by name.

    Raises:
        CheckpointError: A file cannot be read, or its tensor names fit no known layout.
    """
    for piece in _parts_in(path):
        _open_piece(piece, read)


class NamedBase(NamedTuple):
    """The base that an adapter checkpoint names.

    Attributes:
        name: Path, hub id or parts as text; None if the checkpoint names no base.
        revision: Branch, tag or commit on the hub, of the base or of one of its parts; None means
            the newest commit.
    """

    name: str | None
    revision: str | None


def named_base(path: Path) -> NamedBase:
    """Returns the base that an adapter checkpoint names.

    Raises:
        CheckpointError: An adapter_config.json or config.json cannot be read, or its settings are
            not supported.
    """
    settings = {
        piece: read_settings(piece / CONFIG)
        for piece in _parts_in(path)
        if (piece / CONFIG).is_file()
    }
    named = {piece: found.get("base_model_name_or_path") for piece, found in settings.items()}
    revision = next(filter(None, (found.get("revision") for found in settings.values())), None)
    if path in named:
        llm, vision = named[path], None
        if (path / "config.json").is_file():  # LLaVA's code names only the decoder as base
            vision = read_json(path / "config.json").get("mm_vision_tower")
        name = format_source(Parts(llm, vision)) if llm and vision else llm
    else:
        llm, vision = (named.get(path / part) for part in ("llm_adapter", "visual_encoder_adapter"))
        name = format_source(Parts(llm, vision)) if llm and vision else None
    return NamedBase(name, revision)


def stored_fingerprint(path: Path) -> str | None:
    """Returns the fingerprint of the base's weights in an adapter checkpoint; None without one."""
    return read_json(path / BASE).get("fingerprint") if (path / BASE).is_file() else None


def open_adapter(
    path: str | Path,
    config: ModelConfig,
    abstract: Abstract,
    *,
    read: Reader = open_tensors,
    alphas: Mapping[str, float] | None = None,
) -> AdapterCheckpoint:
    """Opens an adapter checkpoint, and checks that it fits a model. Does not read the values.

    Adapters of vision layers after the feature layer are skipped, because these layers do not
    change the output of the model.

    Args:
        path: Directory or file in one of the formats that this module supports.
        config: Sizes of the base model.
        abstract: Shapes of the model's parameters; adapters may be among them.
        read: Function that opens a file or directory and returns its tensors by name.
        alphas: LoRA's alpha by the path prefix of the part, for files that do not contain it, such
            as XTuner's .pth files.

    Raises:
        CheckpointError: There is no adapter checkpoint at `path`, the kind of the adapters is not
            supported, or the adapter checkpoint does not fit the model. In the last case, the
            message names every tensor that is missing, does not belong to the model, or has the
            wrong shape.
    """
    path = Path(path)
    pieces = [_open_piece(piece, read) for piece in _parts_in(path) or [path]]
    adapters: dict[str, Adapter | TokenRows] = {}
    full: set[str] = set()
    for piece in pieces:
        adapters |= find_adapters(piece, config, alphas or {})
        full |= find_full(piece, config, abstract)
    specs = _adapter_specs(adapters, abstract)
    specs |= {path: abstract[path].shape for path in sorted(full)}
    if not specs:
        raise CheckpointError(f"{path} has no tensor that belongs to this model")
    specs = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in specs.items()}
    sources = [(used_tensors(piece, config), piece.layout) for piece in pieces]
    found = find_tensors(str(path), sources, config, specs, may_grow=True, adapters=adapters)
    found = {path: padded(path, x, specs[path].shape, adapters) for path, x in found.items()}
    named = [piece.layout for piece in pieces]
    base, fingerprint = named_base(path), stored_fingerprint(path)
    return AdapterCheckpoint(named, adapters, specs, found, *base, fingerprint)


def _open_piece(path: Path, read: Reader) -> Piece:
    refuse_pointers(path)
    settings = read_settings(path / CONFIG) if (path / CONFIG).is_file() else None
    own = None if settings is None else file_beside(path, "adapter_model")
    file = own or path
    named = read(file)
    tensors = {plain_name(name): tensor for name, tensor in named.items()}
    if len(tensors) < len(named):
        raise CheckpointError(
            f"{file} has two tensors for the parameter {commonest(map(plain_name, named))}"
        )
    try:
        layout = layouts.recognise(tensors, _LAYOUTS)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path} has no tensors of a LLaVA model: {error}") from error
    return Piece(path, tensors, layout, settings)


def _adapter_specs(adapters: Adapters, abstract: Abstract) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of the adapters, by path."""
    shapes = {}
    for path, adapter in adapters.items():
        *layers, outputs, inputs = abstract[f"{path}.weight"].shape
        if isinstance(adapter, TokenRows):
            shapes[path + TRAINABLE_TOKENS] = len(adapter.indices), inputs
        else:
            rank = max(adapter.ranks)
            shapes[f"{path}.lora_a"] = *layers, rank, inputs
            shapes[f"{path}.lora_b"] = *layers, outputs, rank
    return shapes


def check_base(
    trained: AdapterCheckpoint, path: str | Path, base: str | Path | Parts, fingerprint: str
) -> None:
    """Raises CheckpointError if an adapter checkpoint was trained on a base with other weights.

    A checkpoint without a fingerprint of its base is accepted.

    Args:
        trained: Adapter checkpoint, as `open_adapter` returns it.
        path: Directory or file of the adapter checkpoint, for the message.
        base: Directory or parts of the base, for the message.
        fingerprint: Fingerprint of the base's weights.

    Raises:
        CheckpointError: The two fingerprints differ.
    """
    if trained.fingerprint not in (None, fingerprint):
        raise CheckpointError(
            f"{path} was trained on {trained.base_name}, but {format_source(base)} has other "
            "weights; use the base that the adapter was trained on"
        )


def load_adapter(
    path: str | Path,
    adapters: Adapters,
    config: ModelConfig,
    abstract: Abstract,
    trainable: Collection[str],
    fingerprint: str | None,
) -> Params:
    """Reads an adapter checkpoint that a run continues to train.

    Args:
        path: Directory or file, as in `open_adapter`.
        adapters: Adapters of the run; the checkpoint must have the same modules, ranks and alphas.
        config: Sizes of the base model.
        abstract: Shapes, dtypes and shardings of the run's parameters.
        trainable: Paths of the parameters that the run trains.
        fingerprint: Fingerprint of the run's base; None skips the comparison.

    Returns:
        Parameters by path, without the vision layers after the feature layer, which do not change
        the output of the model.

    Raises:
        CheckpointError: `open_adapter` fails, the LoRA settings differ from the run's settings, the
            checkpoint has parameters that the run does not train, or the checkpoint was trained on
            another base.
    """
    alphas = {
        part: next(alpha for rank, alpha in adapter.ranks_and_alphas if rank)
        for part in _SETTINGS
        for path, adapter in adapters.items()
        if path.startswith(part) and isinstance(adapter, Adapter)
    }
    trained = open_adapter(path, config, abstract, alphas=alphas)
    problems = [*_other_settings(trained, adapters)]
    kept = [path for path in trained.abstract if not path.startswith(BEHIND_FEATURE)]
    frozen = [path for path in kept if not is_adapter(path) and path not in trainable]
    if frozen:
        problems.append(f"it contains {', '.join(frozen)}, but the run does not train them")
    if None not in (fingerprint, trained.fingerprint) and fingerprint != trained.fingerprint:
        problems.append(
            f"it was trained on {trained.base_name} with fingerprint {trained.fingerprint}, but "
            f"the run's base has fingerprint {fingerprint}"
        )
    if problems:
        what = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{path} does not fit this run:\n{what}")
    return trained.load({path: abstract[path] for path in kept})


def _other_settings(trained: AdapterCheckpoint, adapters: Adapters) -> Iterable[str]:
    """Yields a text for each part whose adapters differ from those of the run."""
    for part, fields in _SETTINGS.items():
        has, wants = _ranks_and_alphas(trained.adapters, part), _ranks_and_alphas(adapters, part)
        if has == wants:
            continue
        texts = [_summary(found) for found in (has, wants)]
        if texts[0] == texts[1]:  # only some modules differ
            path = next(path for path in {**has, **wants} if has.get(path) != wants.get(path))
            texts = [f"{found.get(path)} in {path}" for found in (has, wants)]
        yield (
            f"for {part}*, the adapter has (rank, alpha, targets) = {texts[0]}, but the run has "
            f"{texts[1]}; give the run the same values with {fields}"
        )
    rows = [
        {path: x.indices for path, x in found.items() if isinstance(x, TokenRows)}
        for found in (trained.adapters, adapters)
    ]
    if rows[0] != rows[1]:
        yield (
            f"the adapter has trained the tokens {rows[0] or 'None'}, but the run trains "
            f"{rows[1] or 'None'}; give the run the same ids with --lora.trainable-token-indices"
        )


def _ranks_and_alphas(adapters: Adapters, part: str) -> dict[str, tuple[tuple[int, float], ...]]:
    """Returns the ranks and the alphas of a part's adapters, by path."""
    found = {path: x for path, x in adapters.items() if path.startswith(part)}
    return {path: x.ranks_and_alphas for path, x in found.items() if isinstance(x, Adapter)}


def _summary(values: Mapping[str, tuple[tuple[int, float], ...]]) -> str:
    if not values:
        return "None"
    pairs = sorted({pair for layers in values.values() for pair in layers if pair[0]})
    targets = sorted({path.rsplit(".", 1)[-1] for path in values})
    both = pairs[0] if len(pairs) == 1 else tuple([*x] for x in zip(*pairs, strict=True))
    return str((*both, targets))
