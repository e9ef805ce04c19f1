"""Converts a checkpoint from one format to another (`llava-jax convert`).

The whole model is never in memory: parameters are `pretrained.load.Stored` objects, which are read,
merged and written layer by layer. The destination gets its final name only when it is complete.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from llava_jax.config import Aspect, ModelConfig, Parts, absolute_source, format_source
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.conversion.write_llava import save_official, save_official_adapter
from llava_jax.data.templates import TEMPLATES, Template
from llava_jax.errors import ConfigError
from llava_jax.models.build import build_model
from llava_jax.models.layers import Abstract
from llava_jax.models.lora import (
    Adapter,
    Adapters,
    TokenRows,
    describe,
    given_alphas,
    merge_layer,
)
from llava_jax.models.paths import NEWLINE, TRAINABLE_TOKENS, VOCABULARY, is_adapter
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained import llava_directory
from llava_jax.pretrained.adapters import AdapterCheckpoint, check_base, open_adapter
from llava_jax.pretrained.chat_templates import choose_template
from llava_jax.pretrained.load import (
    Source,
    Stored,
    find_base_tensors,
    fingerprint_of,
    open_sources,
    stored,
)
from llava_jax.pretrained.model_config import read_config, read_json_config, write_model_config
from llava_jax.pretrained.peft import not_storable, save_adapter
from llava_jax.pretrained.processor import has_processor, save_processor
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.safetensors import Tensor
from llava_jax.pretrained.save import save_params
from llava_jax.pretrained.tokenizer import has_slow_tokenizer, has_tokenizer

Form = Literal["hf", "hf5", "peft", "llava"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened and checked, but whose weights were not read.

    Attributes:
        name: Name of the base, as the user gave it.
        base: Directory or parts of the base.
        config: Sizes of the model.
        abstract: Shapes of the model's parameters.
        sources: Files of the base.
        tensors: Tensors of each parameter, by path: from `trained` for parameters that were trained
            in full, from the base for all others.
        trained: Adapters and other parameters that were trained on the base; None if the checkpoint
            is a whole model.
        inputs: Directory or parts with the tokenizer and the image processor.
        adapter: Directory or file that `trained` is in; None if the checkpoint is a whole model.
    """

    name: str
    base: Path | Parts
    config: ModelConfig
    abstract: Abstract
    sources: list[Source]
    tensors: Mapping[str, list[Tensor]]
    trained: AdapterCheckpoint | None
    inputs: Path | Parts
    adapter: Path | None = None

    @property
    def adapters(self) -> Adapters:
        """Returns the adapters by the path of their module."""
        return self.trained.adapters if self.trained else {}

    @property
    def is_xtuner(self) -> bool:
        """Returns True if XTuner wrote the base or the adapter checkpoint."""
        of_trained = self.trained.layouts if self.trained else []
        return any(layout.is_xtuner for layout in [*(of for _, of in self.sources), *of_trained])

    @property
    def fingerprint(self) -> str:
        """Returns the fingerprint of the base."""
        return fingerprint_of(self.sources)

    @property
    def dtype(self) -> np.dtype:
        """Returns the dtype of the decoder's token embeddings."""
        return self.tensors["llm.embed_tokens.weight"][0].numpy_dtype


def open_source(
    source: str | Parts,
    base: str | Parts | None = None,
    *,
    alphas: Mapping[str, float] | None = None,
    say: Callable[[str], None] = print,
) -> Opened:
    """Opens a checkpoint to convert, and prints the formats that were recognized.

    Args:
        source: Path, hub id or parts of a whole model; or path or hub id of adapters and other
            parameters that were trained on a model.
        base: Model that `source` was trained on; None if `source` is a whole model or names its
            base.
        alphas: Alpha of the LoRA adapters by stack, for files that do not contain the alpha.
        say: Function that prints a line.

    Raises:
        ConfigError: There is no such checkpoint, `source` and `base` or `alphas` contradict each
            other, or a part of the model is missing.
        CheckpointError: A file cannot be read, or the tensors do not fit the model.
    """
    found = resolve(source, open_any, base=base)
    config = read_config(found.base)
    _, abstract = build_model(config, {})
    sources = open_sources(found.base, open_any)
    tensors = find_base_tensors(found.base, sources, config, abstract)
    for files, layout in sources:
        say(f"{next(iter(files.values())).file.parent}: {layout.name}")
    trained, inputs = None, found.base
    if found.adapter is not None:
        read = partial(open_adapter, config=config, abstract=abstract, read=open_any)
        trained = read(found.adapter, alphas=alphas)
        say(f"{found.adapter}: {_summary(trained)} ({trained.naming})")
        if trained.fingerprint is None:
            say(
                f"{found.adapter} has no fingerprint of its base; make sure that it was trained on "
                f"{found.name}"
            )
        else:
            check_base(trained, found.adapter, found.base, fingerprint_of(sources))
        _check_alphas(trained, found.adapter, alphas or {})
        tensors |= {path: t for path, t in trained.tensors.items() if not is_adapter(path)}
        inputs = found.adapter if has_processor(found.adapter) else found.base
    if missing := [path for path in abstract if path not in tensors]:
        part = missing[0].split(".")[0]
        raise ConfigError(
            f"{format_source(source)} has no {part}; give all parts: "
            f"{'--base ' if trained else ''}llm=DIR,vision=DIR,projector=FILE"
        )
    return Opened(
        found.name, found.base, config, abstract, sources, tensors, trained, inputs, found.adapter
    )


def _summary(trained: AdapterCheckpoint) -> str:
    """Returns a text that lists the adapters by stack and the parts that were trained in full."""
    full = sorted({_part(path) for path in trained.abstract if not is_adapter(path)})
    return "; ".join([*describe(trained.adapters), *(f"{part} trained in full" for part in full)])


def _part(path: str) -> str:
    """Returns the part of a parameter, or the module if it may be trained alone."""
    is_alone = path in (*VOCABULARY, NEWLINE)
    return path.removesuffix(".weight") if is_alone else path.split(".")[0]


def _check_alphas(trained: AdapterCheckpoint, path: Path, alphas: Mapping[str, float]) -> None:
    """Raises ConfigError if a given alpha contradicts the alpha in the checkpoint."""
    for part, given in alphas.items():
        found = [x for at, x in trained.adapters.items() if at.startswith(part)]
        known = {*given_alphas(x for x in found if isinstance(x, Adapter))}
        if known - {given}:
            raise ConfigError(
                f"{path} has alpha {max(known - {given}):g} in {part}*, but alpha {given:g} was "
                "given; remove the option with this alpha"
            )


def merged(opened: Opened) -> dict[str, Stored]:
    """Returns the parameters of the whole model; adapters are merged when a weight is read.

    A merged weight is float32 when it is read, so it is rounded only once, when it is written.
    """
    params = {
        path: stored(path, opened.tensors[path], spec) for path, spec in opened.abstract.items()
    }
    for path, adapter in opened.adapters.items():
        assert opened.trained is not None
        weight, tensors = params[f"{path}.weight"], opened.trained.tensors
        if isinstance(adapter, TokenRows):
            (rows,) = tensors[path + TRAINABLE_TOKENS]
            params[f"{path}.weight"] = with_rows(weight, rows, adapter)
        else:
            a, b = (tensors[f"{path}.lora_{x}"] for x in "ab")
            params[f"{path}.weight"] = _merge(weight, a, b, adapter.scales)
    return params


def _merge(weight: Stored, a: list[Tensor], b: list[Tensor], scales: Sequence[float]) -> Stored:
    """Returns a weight that reads a layer of W + scale B A."""

    def read(index: int) -> np.ndarray:
        low_rank = (x[index].read().astype(np.float32) for x in (a, b))
        return np.asarray(merge_layer(weight.read(index), *low_rank, scales[index], np.float32))

    return dataclasses.replace(weight, read=read)


def with_rows(weight: Stored, rows: Tensor, adapter: TokenRows) -> Stored:
    """Returns a matrix of the vocabulary that has trained rows."""

    def read(index: int) -> np.ndarray:
        values = weight.read(index).astype(np.float32)
        values[list(adapter.indices)] = rows.read()
        return values

    return dataclasses.replace(weight, read=read)


def convert(
    opened: Opened,
    destination: Path,
    to: Form,
    *,
    merge: bool = False,
    era: Literal[4, 5] = 5,
    dtype: str | None = None,
    template: Template | None = None,
    aspect: Aspect | None = None,
    prove: Callable[[Opened, Path], object] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes a checkpoint in another format.

    Args:
        opened: Checkpoint from `open_source`.
        destination: Directory that does not exist or is empty.
        to: Format to write: "hf" is a LLaVA model with the tensor names of transformers 4.36 to
            4.51, "hf5" is the same with the names of transformers 5, "peft" is a PEFT adapter, and
            "llava" is a model or a LoRA directory for LLaVA's own code.
        merge: Whether to merge the adapters into the weights.
        era: Version of transformers whose tensor names a PEFT adapter gets, as in
            `pretrained.peft.save_adapter`.
        dtype: Dtype of the weights, for a whole model; None keeps the dtype of each weight.
        template: Conversation template that is written as the chat template. None keeps the
            source's own, or uses the template that `choose_template` returns.
        aspect: Handling of images that are not square; None keeps the source's setting.
        prove: Function that raises an error if the written directory is wrong. It is called before
            the directory gets its final name. None skips this check.
        say: Function that prints a line.

    Raises:
        ConfigError: The format cannot store the checkpoint, or the destination exists and is not an
            empty directory.
    """
    if merge and not opened.adapters:
        raise ConfigError("the source has no adapters to merge; remove --merge")
    as_adapter = bool(opened.adapters) and not merge and to in ("peft", "llava")
    if to == "peft" and not as_adapter:
        raise ConfigError(
            "the source has no adapters to write; use --to hf"
            if not opened.adapters
            else "--merge merges the adapters, but --to peft writes them; remove --merge, or use "
            "--to hf"
        )
    if opened.adapters and not as_adapter and not merge:
        raise ConfigError(
            "the source has adapters; use --to peft, or add --merge to merge them into the base"
        )
    check_free(destination)
    aspect = aspect or _own_aspect(opened)
    if template is None and has_tokenizer(opened.inputs):
        template = _own_template(opened, say)
    with unfinished(destination) as directory:
        if to != "llava":
            # These files come first, because an error in them is then found before the slow part.
            _write_inputs(opened, directory, template, aspect, say)
        if as_adapter and to == "peft":
            _write_peft(opened, directory, era)
        elif as_adapter:
            _write_official_adapter(opened, directory, aspect)
        elif to == "llava":
            _write_official(opened, directory, destination, dtype, aspect, template)
            if not has_slow_tokenizer(directory):
                say(
                    f"{format_source(opened.inputs)} has no tokenizer.model, which LLaVA's code "
                    f"needs; copy the decoder's tokenizer.model to {destination}"
                )
        else:
            _write_hf(opened, directory, to, dtype)
        if prove is not None:
            prove(opened, directory)


def check_free(destination: Path) -> None:
    """Checks that a destination does not exist, or is an empty directory.

    Raises:
        ConfigError: The destination is a file or a directory with entries, or is a path without a
            name, such as ".".
    """
    is_free = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if not is_free or not destination.name:  # "." has no name to rename to
        raise ConfigError(f"{destination} exists already; give a directory that does not exist")


@contextmanager
def unfinished(destination: Path) -> Iterator[Path]:
    """Yields a new directory; renames it to `destination` at the end, or deletes it on an error."""
    directory = destination.with_name(f".{destination.name}.unfinished")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
        if destination.exists():
            destination.rmdir()
        directory.rename(destination)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_hf(opened: Opened, directory: Path, to: Form, dtype: str | None) -> None:
    """Writes the weights and the config of the whole model for transformers."""
    layout = layouts.HF_4_36 if to == "hf" else layouts.HF_5
    save_params(merged(opened), directory, opened.config, layout=layout, dtype=dtype)
    write_model_config(opened.config, directory, dtype or str(opened.dtype))


def _trained_params(opened: Opened) -> dict[str, Stored]:
    """Returns the parameters that were trained on the base, not merged into it."""
    assert opened.trained is not None
    specs = opened.trained.abstract
    return {path: stored(path, t, specs[path]) for path, t in opened.trained.tensors.items()}


def _write_peft(opened: Opened, directory: Path, era: Literal[4, 5]) -> None:
    """Writes the adapters, and the parts that were trained in full, as one PEFT directory."""
    params, trained = _trained_params(opened), opened.trained
    assert trained is not None
    if NEWLINE in params and _is_in_base(NEWLINE, params[NEWLINE], opened):
        del params[NEWLINE]  # LLaVA-NeXT's code stores it beside LoRA, even if it did not change
    if foreign := not_storable(params):
        raise ConfigError(
            f"a PEFT adapter cannot store {len(foreign)} of the parameters that were trained in "
            f"full, for example {foreign[0]}; add --merge"
        )
    save_adapter(
        directory,
        params,
        opened.adapters,
        opened.config,
        base_name=opened.name,
        fingerprint=opened.fingerprint,
        revision=trained.revision if opened.name == trained.base_name else None,
        era=era,
    )


def _is_in_base(path: str, trained: Stored, opened: Opened) -> bool:
    """Returns True if the base has the values of a trained parameter that is not stacked."""
    found = [s[0].get(s[1].file_name(path)) for s in opened.sources if s[1].holds(path)]
    return any(x is not None and np.array_equal(x.read(), trained.read(0)) for x in found)


def _write_official(
    opened: Opened,
    directory: Path,
    final: Path,
    dtype: str | None,
    aspect: Aspect | None,
    template: Template | None,
) -> None:
    """Writes the whole model for LLaVA's own code; `final` is the directory's final path."""
    save_official(
        directory,
        final,
        merged(opened),
        opened.config,
        opened.inputs,
        dtype=dtype,
        said=dtype or str(opened.dtype),
        aspect=aspect,
        template=template,
    )


def _write_official_adapter(opened: Opened, directory: Path, aspect: Aspect | None) -> None:
    """Writes the adapters as a LoRA directory for LLaVA's own code."""
    llm, tower = None, None
    if isinstance(opened.base, Parts):
        llm, tower = map(absolute_source, (opened.base.llm, opened.base.vision))
        if opened.base.vision == opened.base.llm:  # the tower is in the files of the decoder
            tower = read_json_config(opened.base.llm)[1]["mm_vision_tower"]
    params = _trained_params(opened)
    save_official_adapter(
        directory, params, opened.adapters, opened.config, llm, tower, opened.inputs, aspect
    )


def _own_aspect(opened: Opened) -> Aspect | None:
    """Returns the source's handling of images that are not square; None if it is unknown.

    XTuner always pads images. For LLaVA's own code, the setting is in the config.json of the
    adapter, or else of the base.
    """
    if opened.is_xtuner:
        return "pad"
    base = opened.base.llm if isinstance(opened.base, Parts) else None
    for directory in (opened.adapter, base):
        if directory is not None and (Path(directory) / "config.json").is_file():
            found = llava_directory.image_aspect(read_json_config(directory)[1])
            if found is not None:
                return found
    return None


def _own_template(opened: Opened, say: Callable[[str], None]) -> Template | None:
    """Returns the template that fits the decoder; None if the source's chat template is kept.

    Only separate parts and models of XTuner have no stored chat template for images.
    """
    is_parts = isinstance(opened.base, Parts) and opened.inputs == opened.base
    if not is_parts and not opened.is_xtuner:
        return None
    name = choose_template(opened.inputs, is_xtuner=opened.is_xtuner)
    if name is None:
        return None
    say(f"the conversation template is {name}, which fits the tokenizer; --template changes it")
    return TEMPLATES[name]


def _write_inputs(
    opened: Opened,
    directory: Path,
    template: Template | None,
    aspect: Aspect | None,
    say: Callable[[str], None],
) -> None:
    """Writes the tokenizer, the image processor and the chat template, if there is a tokenizer."""
    if has_tokenizer(opened.inputs):
        save_processor(opened.inputs, directory, opened.config, template=template, aspect=aspect)
    else:
        inputs = format_source(opened.inputs)
        say(f"{inputs} has no tokenizer, so no tokenizer and no processor are written")
