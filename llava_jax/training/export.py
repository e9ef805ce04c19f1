"""Exports a run's trained parameters, as a PEFT adapter or as a complete Hugging Face model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_jax.config import TrainConfig
from llava_jax.data.templates import TEMPLATES
from llava_jax.disk import naming
from llava_jax.distributed.multihost import is_main_process
from llava_jax.models.layers import Params
from llava_jax.pretrained.model_config import write_model_config
from llava_jax.pretrained.peft import save_adapter
from llava_jax.pretrained.processor import save_processor
from llava_jax.pretrained.save import save_params
from llava_jax.train_step.program import Program
from llava_jax.train_step.step import TrainState
from llava_jax.training.setup import Setup


def unfinished_dir(config: TrainConfig) -> Path:
    """Returns the directory of a run's export until `publish` gives it its final name."""
    final = config.export_dir
    return final.with_name(final.name + ".unfinished")


def export(
    setup: Setup, program: Program, frozen: Params, directory: Path, state: TrainState
) -> None:
    """Writes a run's trained parameters. All processes call this; only the main process writes.

    Args:
        setup: Setup of the run.
        program: Program of the run.
        frozen: Frozen parameters by path.
        directory: Directory to write, which is replaced if it exists.
        state: Train state with the trained parameters.

    Raises:
        OSError: The directory cannot be written.
    """
    config, model = setup.config, program.model_config
    with _removed_on_failure(directory):
        if program.adapters:
            # PEFT saves and loads a fully trained module as a whole, so the export of a trained
            # vision tower also needs the layers of the tower that are frozen.
            whole = ("vision.",) if config.tune.vision == "full" else ()
            kept = {path: leaf for path, leaf in frozen.items() if path.startswith(whole)}
            save_adapter(
                directory,
                state.trainable | kept,
                program.adapters,
                model,
                base_name=setup.found.name if setup.found else None,
                fingerprint=setup.fingerprint,
            )
        else:
            save_params(state.trainable | frozen, directory, model, dtype=config.dtype)
        if is_main_process():
            if not program.adapters:
                write_model_config(model, directory, config.dtype)
            save_processor(
                setup.processor,
                directory,
                model,
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
        written, final = unfinished_dir(config), config.export_dir
        (written / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
