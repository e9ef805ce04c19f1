"""From any checkpoint to any other form, a tensor at a time: `llava-jax convert`.

Nothing is ever whole in memory: what is written are `weights.Stored` parameters, that are read,
merged and written layer by layer. A destination has its name only when it is complete.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from llava_jax.config import Aspect, LoraConfig, ModelConfig, Parts, absolute_source, format_source
from llava_jax.conversion.any_file import open_any
from llava_jax.conversion.write_llava import save_official, save_official_adapter
from llava_jax.data.templates import TEMPLATES, Template
from llava_jax.errors import ConfigError
from llava_jax.models.build import build_model
from llava_jax.models.layers import Abstract
from llava_jax.models.lora import merge_layer
from llava_jax.models.paths import is_adapter
from llava_jax.pretrained import layouts, llava_directory
from llava_jax.pretrained.adapters import AdapterCheckpoint, check_base, open_adapter
from llava_jax.pretrained.load import (
    Source,
    Stored,
    find_base_tensors,
    fingerprint_of,
    open_sources,
    stored,
)
from llava_jax.pretrained.model_config import read_config, read_json_config, write_model_config
from llava_jax.pretrained.peft import save_adapter
from llava_jax.pretrained.processor import choose_template, has_processor, save_processor
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.safetensors import Tensor
from llava_jax.pretrained.save import save_params
from llava_jax.pretrained.tokenizer import has_slow_tokenizer, has_tokenizer

Form = Literal["hf", "hf5", "peft", "llava"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source, opened and checked, not read.

    Attributes:
        name: The base's name, as its user gave it.
        base: The base's directory or parts.
        config: Sizes of the model.
        abstract: Shapes of the model's parameters.
        sources: The base's files.
        tensors: Where the parameters lie, those of the base with what was trained in full on it.
        trained: What was trained on the base; None for a base alone.
        inputs: The directory or parts with the tokenizer and the image processor.
        adapter: The directory or file of what was trained; None for a base alone.
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
    def adapters(self) -> dict[str, LoraConfig]:
        return self.trained.adapters if self.trained else {}

    @property
    def is_xtuner(self) -> bool:
        """Whether XTuner trained it."""
        of_trained = self.trained.layouts if self.trained else []
        return any(layout.is_xtuner for layout in [*(of for _, of in self.sources), *of_trained])

    @property
    def fingerprint(self) -> str:
        """Of the base."""
        return fingerprint_of(self.sources)

    @property
    def dtype(self) -> np.dtype:
        """Of the decoder."""
        return self.tensors["llm.embed_tokens.weight"][0].numpy_dtype


def open_source(
    source: str | Parts,
    base: str | Parts | None = None,
    *,
    alphas: Mapping[str, float] | None = None,
    say: Callable[[str], None] = print,
) -> Opened:
    """Opens what is to be converted, and says what it is.

    Args:
        source: A whole model, or what was trained on one, in any form.
        base: What `source` was trained on; None if it is whole or names its base.
        alphas: LoRA's alpha by stack, for a file that does not say it.
        say: Prints a line.

    Raises:
        ConfigError: The two do not go together.
        CheckpointError: One cannot be read, or they do not fit.
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
                "it has no fingerprint of its base, so whether it was trained on these is unchecked"
            )
        else:
            check_base(trained, found.adapter, found.base, fingerprint_of(sources))
        _check_alphas(trained, found.adapter, alphas or {})
        tensors |= {path: t for path, t in trained.tensors.items() if not is_adapter(path)}
        inputs = found.adapter if has_processor(found.adapter) else found.base
    if missing := [path for path in abstract if path not in tensors]:
        part = missing[0].split(".")[0]
        raise ConfigError(
            f"{format_source(source)} has no {part}; name one: "
            f"{'--base ' if trained else ''}llm=DIR,vision=DIR,projector=FILE"
        )
    return Opened(
        found.name, found.base, config, abstract, sources, tensors, trained, inputs, found.adapter
    )


def _summary(trained: AdapterCheckpoint) -> str:
    parts = [
        f"adapters of rank {lora.rank}, alpha {lora.alpha:g} in {stack}*"
        for stack, lora in trained.adapters.items()
    ]
    whole = sorted({path.split(".")[0] for path in trained.abstract if not is_adapter(path)})
    return "; ".join([*parts, *(f"{part} in full" for part in whole)])


def _check_alphas(trained: AdapterCheckpoint, path: Path, alphas: Mapping[str, float]) -> None:
    for stack, lora in trained.adapters.items():
        if (given := alphas.get(stack, lora.alpha)) != lora.alpha:
            raise ConfigError(
                f"{path} has alpha {lora.alpha:g}, as it says itself, in {stack}*, not the alpha "
                f"{given:g} that was given"
            )


def merged(opened: Opened) -> dict[str, Stored]:
    """The whole model's parameters: the base's, what was trained in full, adapters folded in."""
    params = {
        path: stored(path, opened.tensors[path], spec) for path, spec in opened.abstract.items()
    }
    for stack, lora in opened.adapters.items():
        assert opened.trained is not None
        for path in opened.trained.tensors:
            if path.startswith(stack) and path.endswith(".lora_a"):
                weight = path.removesuffix("lora_a") + "weight"
                params[weight] = _merge(params[weight], opened.trained.tensors, path, lora)
    return params


def _merge(
    weight: Stored, tensors: Mapping[str, list[Tensor]], path: str, lora: LoraConfig
) -> Stored:
    a, b = tensors[path], tensors[path.removesuffix("a") + "b"]

    def read(index: int) -> np.ndarray:
        low_rank = (x[index].read().astype(np.float32) for x in (a, b))
        return np.asarray(merge_layer(weight.read(index), *low_rank, lora.alpha / lora.rank))

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
    """Writes what was opened in another form.

    Args:
        opened: The result of `open_source`.
        destination: A directory that does not exist or is empty.
        to: "hf" is Hugging Face's (layout A), "hf5" the same in the names of transformers 5 (D),
            "peft" an adapter, "llava" what LLaVA's own code reads (E; G for adapters).
        merge: Whether adapters are folded in.
        era: Which names a PEFT adapter has, see `peft.save_adapter`.
        dtype: The dtype of a whole model's weights; None keeps each as it is.
        template: Conversations, for `apply_chat_template`; None keeps the source's own, or takes
            what `processor.choose_template` says.
        aspect: What happens to images that are not square; None is what the source says.
        prove: Looks at what was written before it takes its name; None trusts it.
        say: Prints a line.

    Raises:
        ConfigError: The form cannot hold it, or the destination is taken.
    """
    if merge and not opened.adapters:
        raise ConfigError("there are no adapters to merge: drop --merge")
    as_adapter = bool(opened.adapters) and not merge and to in ("peft", "llava")
    if to == "peft" and not as_adapter:
        raise ConfigError(
            "there are no adapters to write, so --to hf"
            if not opened.adapters
            else "an adapter that is merged is none any more: drop --merge, or take --to hf"
        )
    if opened.adapters and not as_adapter and not merge:
        raise ConfigError(
            "these are adapters on a base: take --to peft, or --merge to fold them into it"
        )
    check_free(destination)
    aspect = aspect or _own_aspect(opened)
    if template is None and has_tokenizer(opened.inputs):
        template = _own_template(opened, say)
    with unfinished(destination) as directory:
        if to != "llava":  # first, so that an error in these is found before the weights are read
            _write_inputs(opened, directory, template, aspect, say)
        if as_adapter and to == "peft":
            _write_peft(opened, directory, era)
        elif as_adapter:
            _write_official_adapter(opened, directory, aspect)
        elif to == "llava":
            _write_official(opened, directory, destination, dtype, aspect, template)
            if not has_slow_tokenizer(directory):
                say(
                    f"{opened.inputs} has no tokenizer.model, of which LLaVA's own code makes its "
                    f"tokenizer; copy the decoder's to {destination}"
                )
        else:
            _write_hf(opened, directory, to, dtype)
        if prove is not None:
            prove(opened, directory)


def check_free(destination: Path) -> None:
    """Refuses a destination that holds something.

    Raises:
        ConfigError: It does.
    """
    is_free = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if not is_free or not destination.name:  # "." has no name to give to what is complete
        raise ConfigError(f"{destination} exists; name a directory that does not")


@contextmanager
def unfinished(destination: Path) -> Iterator[Path]:
    """Yields a directory that takes its name when all went well, and vanishes otherwise."""
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
    layout = layouts.HF_4_36 if to == "hf" else layouts.HF_5
    save_params(merged(opened), directory, opened.config, layout=layout, dtype=dtype)
    write_model_config(opened.config, directory, dtype or str(opened.dtype))


def _trained_params(opened: Opened) -> dict[str, Stored]:
    assert opened.trained is not None
    specs = opened.trained.abstract
    return {path: stored(path, t, specs[path]) for path, t in opened.trained.tensors.items()}


def _write_peft(opened: Opened, directory: Path, era: Literal[4, 5]) -> None:
    params = _trained_params(opened)
    if any(path.startswith("llm.") and not is_adapter(path) for path in params):
        raise ConfigError("a PEFT adapter has no room for a decoder trained in full; add --merge")
    save_adapter(
        directory,
        params,
        opened.adapters,
        opened.config,
        base_name=opened.name,
        fingerprint=opened.fingerprint,
        era=era,
    )


def _write_official(
    opened: Opened,
    directory: Path,
    final: Path,
    dtype: str | None,
    aspect: Aspect | None,
    template: Template | None,
) -> None:
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
    llm, tower = None, None
    if isinstance(opened.base, Parts):
        llm, tower = map(absolute_source, (opened.base.llm, opened.base.vision))
    params = _trained_params(opened)
    save_official_adapter(
        directory, params, opened.adapters, opened.config, llm, tower, opened.inputs, aspect
    )


def _own_aspect(opened: Opened) -> Aspect | None:
    """What LLaVA's own config.json says of images, the adapter's before the base's; XTuner pads."""
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
    """What fits the decoder, where no template for images is stored: with parts, and XTuner's."""
    is_parts = isinstance(opened.base, Parts) and opened.inputs == opened.base
    if not is_parts and not opened.is_xtuner:
        return None
    name = choose_template(opened.inputs, is_xtuner=opened.is_xtuner)
    if name is None:
        return None
    say(f"conversations are as in the template {name}, by the tokenizer; --template names another")
    return TEMPLATES[name]


def _write_inputs(
    opened: Opened,
    directory: Path,
    template: Template | None,
    aspect: Aspect | None,
    say: Callable[[str], None],
) -> None:
    if has_tokenizer(opened.inputs):
        save_processor(opened.inputs, directory, opened.config, template=template, aspect=aspect)
    else:
        inputs = format_source(opened.inputs)
        say(f"{inputs} has no tokenizer: neither that nor a processor is written")
