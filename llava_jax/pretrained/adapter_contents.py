"""Finds out what the tensors of an adapter checkpoint are: adapters, token rows, whole modules.

A checkpoint is refused by name if it contains trained parameters of a kind that is not supported,
because a model without some of its trained parameters would give wrong answers without a message.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llava_jax.config import ModelConfig
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError
from llava_jax.models import paths
from llava_jax.models.layers import Abstract
from llava_jax.models.lora import Adapter, Adapters, TokenRows, layers_of, linear_layers
from llava_jax.models.paths import (
    BEHIND_FEATURE,
    HEAD,
    LLM,
    NEWLINE,
    PROJECTOR,
    TRAINABLE_TOKENS,
    VISION,
    VOCABULARY,
    is_adapter,
)
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.limited_process import LimitedProcess
from llava_jax.pretrained.peft_config import (
    CONFIG,
    find_targets,
    ranks_and_alphas,
    read_dropout,
    read_tokens,
)
from llava_jax.pretrained.safetensors import Tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file or directory of an adapter checkpoint.

    Attributes:
        path: The file or directory.
        tensors: Tensors by name, without the parts that PEFT adds to the names.
        layout: Layout of the names.
        settings: Content of its adapter_config.json; None if there is no such file.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    layout: Layout
    settings: Json | None

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Yields the name and the path of each tensor that belongs to a LLaVA.

        The path is the path of the parameter, with the layer index.
        """
        for name in self.tensors:
            if parameter := self.layout.parameter(name):
                yield name, parameter


def used_tensors(piece: Piece, config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors without the adapters of vision layers after the feature layer."""
    unused = {
        name
        for name, parameter in piece.parameters()
        if is_adapter(parameter) and paths.stacked(parameter, config).startswith(BEHIND_FEATURE)
    }
    return {name: tensor for name, tensor in piece.tensors.items() if name not in unused}


def find_adapters(
    piece: Piece, config: ModelConfig, alphas: Mapping[str, float]
) -> dict[str, Adapter | TokenRows]:
    """Returns the adapters that a file or directory has, by the path of their module.

    Args:
        piece: File or directory of an adapter checkpoint.
        config: Sizes of the base model.
        alphas: LoRA's alpha by the path prefix of the part, for files that do not contain it.

    Raises:
        CheckpointError: There are adapters of a kind that is not supported, the settings are
            invalid, or they do not select the modules that have adapters in the file.
    """
    _refuse_unknown(piece, config)
    own = {p.rpartition(".")[0] for _, p in piece.parameters() if is_adapter(p)}
    layers = {  # paths with layer index, by path, of the parts that the file contains
        path: layers_of(path, count, config)
        for path, count in linear_layers(config).items()
        if piece.layout.holds(f"{path}.")
    }
    names = {
        layer: piece.layout.file_name(f"{layer}.").removesuffix(".")
        for found in layers.values()
        for layer in found
    }
    process = LimitedProcess()  # it starts when there is a pattern to match
    chosen = _chosen(piece, layers, names, own, process)
    if unused := sorted(own & names.keys() - chosen):
        raise CheckpointError(
            f"{piece.path} has an adapter of {names[unused[0]]}, which PEFT would ignore, because "
            f"target_modules and the other settings in {CONFIG} do not select this module; correct "
            "these settings"
        )
    values = _ranks_and_alphas(piece, names, alphas, process) if chosen else {}
    dropout = read_dropout(piece.path / CONFIG, piece.settings or {})
    adapters: dict[str, Adapter | TokenRows] = {
        path: Adapter(
            tuple(values[layer][0] * (layer in chosen) for layer in found),
            tuple(values[layer][1] for layer in found),
            dropout,
            use_rslora=bool(piece.settings and piece.settings.get("use_rslora")),
        )
        for path, found in layers.items()
        if chosen.intersection(found)
    }
    for path in sorted(p for _, p in piece.parameters() if p.endswith(TRAINABLE_TOKENS)):
        module = path.removesuffix(TRAINABLE_TOKENS)
        if f"{module}.weight" == HEAD and config.llm.tie_word_embeddings:
            raise CheckpointError(
                f"{piece.path / CONFIG}: trainable_token_indices has other tokens for lm_head than "
                "for embed_tokens, but the base uses its embedding as its output matrix; this is "
                "not supported"
            )
        where, settings = piece.path / CONFIG, piece.settings or {}
        size = config.llm.vocab_size
        indices = read_tokens(where, settings, module.rsplit(".", 1)[-1], size)
        adapters[module] = TokenRows(indices)
    return adapters


def _refuse_unknown(piece: Piece, config: ModelConfig) -> None:
    """Raises CheckpointError if there are adapters of a kind that is not supported."""
    linears, refused = linear_layers(config), {}
    for name, parameter in piece.parameters():
        found = re.match(r"(.*?)\.(lora_\w+)", parameter)
        if found is None:
            continue
        module = paths.stacked(f"{found[1]}.", config).removesuffix(".")
        is_known = is_adapter(parameter) and module in linears
        if not is_known and not f"{module}.".startswith(BEHIND_FEATURE):
            refused.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), name)
    if refused:
        raise CheckpointError(
            f"{piece.path} has adapters that are not supported: "
            f"{', '.join([*refused.values()][:5])}; only plain adapters lora_A and lora_B of the "
            "linear layers in decoder, vision tower and projector are supported"
        )


def _chosen(
    piece: Piece,
    layers: Mapping[str, list[str]],
    names: Mapping[str, str],
    own: set[str],
    process: LimitedProcess,
) -> set[str]:
    """Returns the paths of the layers that have adapters, by the settings or else by the tensors.

    Without settings, all layers of a linear layer must have adapters if one of them has.
    """
    file, modules = piece.path / CONFIG, [*names.values()]
    found = find_targets(file, piece.settings, modules, process) if piece.settings else None
    if found is not None:
        return {layer for layer, is_target in zip(names, found, strict=True) if is_target}
    return {layer for some in layers.values() if not own.isdisjoint(some) for layer in some}


def _ranks_and_alphas(
    piece: Piece, names: Mapping[str, str], alphas: Mapping[str, float], process: LimitedProcess
) -> dict[str, tuple[int, float]]:
    """Returns the rank and the alpha of each layer, by its path, of the parts with adapters.

    Without settings, all adapters of a part have the rank of the first one.
    """
    if piece.settings is not None:
        file, modules = piece.path / CONFIG, [*names.values()]
        found = ranks_and_alphas(file, piece.settings, modules, process)
        return dict(zip(names, found, strict=True))
    ranks = {}
    for part in (LLM, VISION, PROJECTOR):
        found = {p: n for n, p in piece.parameters() if p.startswith(part) and is_adapter(p)}
        if not found:
            continue
        if part not in alphas:
            raise CheckpointError(
                f"{piece.path} has adapters in {part}*, but does not contain their alpha; find "
                "lora_alpha in the XTuner config (.py) of the training, and give its value as "
                "--alpha (decoder) or --vision-alpha (vision tower)"
            )
        shapes = (piece.tensors[n].shape for p, n in found.items() if p.endswith(".lora_a"))
        shape = next(shapes, ())
        if not shape or not shape[0]:
            raise CheckpointError(
                f"{piece.path} has adapters in {part}*, but no lora_A tensor with their rank "
                f"(found: {next(iter(found.values()))})"
            )
        settings = {"r": shape[0], "lora_alpha": alphas[part]}
        own = [layer for layer in names if layer.startswith(part)]
        ranks |= zip(own, ranks_and_alphas(piece.path, settings, own, process), strict=True)
    return ranks


def find_full(piece: Piece, config: ModelConfig, abstract: Abstract) -> set[str]:
    """Returns the paths of the parameters that were trained in full, and that a file must have.

    Embedding, output matrix and newline may be there alone, and so may the modules that PEFT's
    `modules_to_save` names. Of any other part, all parameters must be there.

    Args:
        piece: File or directory of an adapter checkpoint.
        config: Sizes of the base model.
        abstract: Shapes of the model's parameters.

    Raises:
        CheckpointError: `modules_to_save` names only some layers of a stack, or one of two tied
            matrices without `ensure_weight_tying`.
    """
    found = {paths.stacked(p, config) for _, p in piece.parameters() if not is_adapter(p)}
    found &= abstract.keys()
    saved = (piece.settings or {}).get("modules_to_save") or []
    for part in {path.split(".")[0] for path in found}:
        own = [p for p in abstract if p.startswith(f"{part}.") and not is_adapter(p)]
        if found.intersection(own) <= {*VOCABULARY, NEWLINE}:
            continue
        is_saved = lambda path: _is_saved(piece, path, abstract[path].shape, config, saved)
        found |= {path for path in own if not saved or is_saved(path)}
    _check_tied(piece, config, saved)
    return found


def _is_saved(
    piece: Piece, path: str, shape: tuple[int, ...], config: ModelConfig, saved: list[str]
) -> bool:
    """Returns True if `modules_to_save` contains a parameter, by PEFT's rule for names."""
    names = [piece.layout.file_name(layer) for layer, _ in paths.layers(path, shape, config)]
    ends = tuple(map(str, saved))
    is_in = lambda name: any(name[: dot.start()].endswith(ends) for dot in re.finditer(r"\.", name))
    inside = [*map(is_in, names)]
    if any(inside) and not all(inside):
        raise CheckpointError(
            f"{piece.path / CONFIG}: modules_to_save is {saved}, which contains {path} of only "
            "some layers; this is not supported"
        )
    return all(inside)


def _check_tied(piece: Piece, config: ModelConfig, saved: list[str]) -> None:
    """Raises CheckpointError if PEFT trained separate copies of two tied matrices."""
    names = [name for name in map(str, saved) if name.rsplit(".", 1)[-1] in _VOCABULARY]
    keeps_tie = (piece.settings or {}).get("ensure_weight_tying")
    if config.llm.tie_word_embeddings and names and not keeps_tie:
        raise CheckpointError(
            f"{piece.path / CONFIG}: modules_to_save contains {' and '.join(names)}, but the base "
            "uses its embedding as its output matrix, so PEFT has trained a separate copy; this is "
            "supported only with ensure_weight_tying"
        )


_VOCABULARY = [path.split(".")[1] for path in VOCABULARY]


@dataclasses.dataclass(frozen=True)
class Padded(Tensor):
    """Tensor of an adapter in a stack with larger ranks, filled up with zeros.

    Attributes:
        inner: Tensor in the file; None if the layer has no adapter.
    """

    inner: Tensor | None = None

    def read(self, rows: int | None = None) -> np.ndarray:
        """Returns the values of the file, and zeros beyond them."""
        values = np.zeros(self.shape, self.numpy_dtype)
        if self.inner is not None:
            own = self.inner.read()
            values[tuple(map(slice, own.shape))] = own
        return values


def padded(
    path: str, tensors: list[Tensor], shape: tuple[int, ...], adapters: Adapters
) -> list[Tensor]:
    """Returns the tensors of an adapter's parameter, one for each layer, all of the same shape.

    Args:
        path: Path of the parameter; the tensors of other parameters are returned unchanged.
        tensors: Tensors of the layers that have an adapter.
        shape: Shape of the parameter.
        adapters: Adapters of the checkpoint.
    """
    adapter = adapters.get(path.rpartition(".")[0])
    if not isinstance(adapter, Adapter) or not is_adapter(path):
        return tensors
    first, rest = tensors[0], iter(tensors)
    inner = [next(rest) if rank else None for rank in adapter.ranks]
    like = [tensor or first for tensor in inner]
    return [
        Padded(x.name, x.file, x.dtype, shape[-2:], 0, 0, tensor)
        for x, tensor in zip(like, inner, strict=True)
    ]
