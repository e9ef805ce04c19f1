"""Exports a run's trained parameters, as a PEFT adapter or as a complete Hugging Face model."""

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
    """Returns the directory of a run's export: `adapter/` if the run trains LoRA, else `model/`."""
    return config.run_dir / ("adapter" if config.tune.has_adapters else "model")


def unfinished_dir(config: TrainConfig) -> Path:
    """Returns the directory of a run's export until `publish` gives it its final name."""
    final = export_dir(config)
    return final.with_name(final.name + ".unfinished")


def export(
    directory: Path,
    config: TrainConfig,
    program: Program,
    processor: Path | Parts,
    base_name: str | None,
    fingerprint: str | None,
    trainable: Params,
    frozen: Params,
) -> None:
    """Writes a run's trained parameters. All processes call this; only the main process writes.

    Args:
        directory: Directory to write, which is replaced if it exists.
        config: Config of the run.
        program: Program of the run.
        processor: Source of the tokenizer and the image processor.
        base_name: Name or path of the adapter's base model; None if there is no base model.
        fingerprint: Fingerprint of the base model; None if there is no base model.
        trainable: Trainable parameters by path.
        frozen: Frozen parameters by path.

    Raises:
        OSError: The directory cannot be written.
    """
    with _removed_on_failure(directory):
        if program.adapters:
            # PEFT saves and loads a fully trained module as a whole, so the export of a trained
            # vision tower also needs the layers of the tower that are frozen.
            whole = ("vision.",) if config.tune.vision == "full" else ()
            trained = trainable | {p: leaf for p, leaf in frozen.items() if p.startswith(whole)}
            save_adapter(
                directory,
                trained,
                program.adapters,
                program.model_config,
                base_name=base_name,
                fingerprint=fingerprint,
            )
        else:
            save_params(trainable | frozen, directory, program.model_config, dtype=config.dtype)
        if is_main_process():
            if not program.adapters:
                write_model_config(program.model_config, directory, config.dtype)
            save_processor(
                processor,
                directory,
                program.model_config,
                template=TEMPLATES[config.data.template],
                aspect=config.data.image_aspect,
                exif_orientation=config.data.exif_orientation,
            )


@contextmanager
def _removed_on_failure(directory: Path) -> Iterator[None]:
    """Creates an empty directory, and removes it if the `with` block raises an exception."""
    if is_main_process():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    try:
        with naming(directory):
            yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def discard(config: TrainConfig) -> None:
    """Removes an export that was only written to test whether exporting works.

    Args:
        config: Config of the run, which has written an export to `unfinished_dir`.
    """
    if is_main_process():
        shutil.rmtree(unfinished_dir(config))


def publish(config: TrainConfig, card: str) -> None:
    """Adds the model card to a complete export, and renames the export to its final name.

    An older export with this name is removed.

    Args:
        config: Config of the run, which has written an export to `unfinished_dir`.
        card: Text of the README.md.
    """
    if is_main_process():
        written, final = unfinished_dir(config), export_dir(config)
        (written / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
