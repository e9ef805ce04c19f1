"""Exports what a run has trained, as a PEFT adapter or as a whole Hugging Face model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_jax.config import Parts, TrainConfig
from llava_jax.data.templates import TEMPLATES
from llava_jax.disk import naming
from llava_jax.distributed.multihost import is_main_process
from llava_jax.models.layers import Params
from llava_jax.pretrained.model_config import write_model_config
from llava_jax.pretrained.peft import save_adapter
from llava_jax.pretrained.processor import save_processor
from llava_jax.pretrained.save import save_params
from llava_jax.train_step.program import Program


def export_dir(config: TrainConfig) -> Path:
    """The directory of a run's export: `adapter/` if it trains adapters, otherwise `model/`."""
    has_adapters = "lora" in (config.tune.llm, config.tune.vision)
    return config.run_dir / ("adapter" if has_adapters else "model")


def export(
    config: TrainConfig,
    program: Program,
    processor: Path | Parts,
    base_name: str | None,
    fingerprint: str | None,
    trainable: Params,
    frozen: Params,
) -> Path:
    """Writes what a run has trained into a directory with a temporary name, and returns it.

    `publish` then gives it its final name.

    Args:
        config: Config of the run.
        program: Compiled program of the run.
        processor: Source of the tokenizer and the image processor.
        base_name: Name or path of the base that an adapter is for.
        fingerprint: Fingerprint of the base.
        trainable: Trainable parameters.
        frozen: Frozen parameters.

    Raises:
        OSError: The directory cannot be written.
    """
    final = export_dir(config)
    unfinished = final.with_name(final.name + ".unfinished")
    with _removed_on_failure(unfinished):
        if program.adapters:
            # PEFT saves and loads a fully trained module as a whole, so the export must have the
            # frozen layers of a vision tower that trains, too.
            whole = ("vision.",) if config.tune.vision == "full" else ()
            trained = trainable | {p: leaf for p, leaf in frozen.items() if p.startswith(whole)}
            save_adapter(
                unfinished,
                trained,
                program.adapters,
                program.model_config,
                base_name=base_name,
                fingerprint=fingerprint,
            )
        else:
            save_params(trainable | frozen, unfinished, program.model_config, dtype=config.dtype)
        if is_main_process():
            if not program.adapters:
                write_model_config(program.model_config, unfinished, config.dtype)
            save_processor(
                processor,
                unfinished,
                program.model_config,
                template=TEMPLATES[config.data.template],
                aspect=config.data.image_aspect,
            )
    return unfinished


@contextmanager
def _removed_on_failure(directory: Path) -> Iterator[None]:
    """Creates a directory to write into, and removes it again if an error occurs."""
    if is_main_process():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    try:
        with naming(directory):
            yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def discard(written: Path) -> None:
    """Removes an export that was written only to test that it can be."""
    if is_main_process():
        shutil.rmtree(written)


def publish(written: Path, final: Path) -> None:
    """Gives a complete export its final name; an older export of that name is removed first."""
    if is_main_process():
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
