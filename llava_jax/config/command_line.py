"""Loads config files and overrides their fields with command-line options."""

import argparse
import dataclasses
import difflib
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import tyro

from llava_jax.config import model, source, train
from llava_jax.config.presets import find_preset, preset_names, suggest_preset
from llava_jax.config.train import TrainConfig
from llava_jax.errors import ConfigError


def load_config(path: str | Path) -> TrainConfig:
    """Executes a config file as a Python program and returns the variable `config` that it sets.

    Args:
        path: Path of the file, or the name of a preset.

    Raises:
        ConfigError: The file or preset does not exist, the file does not set `config` to a
            `TrainConfig`, or the file sets a field that does not exist.
    """
    if not Path(path).is_file():
        preset = find_preset(str(path))
        if preset is None:
            raise ConfigError(f"--config {path}: no such file; {suggest_preset(str(path))}")
        path = preset
    try:
        config = runpy.run_path(str(path)).get("config")
    except TypeError as error:
        raise ConfigError(f"{path}: {_suggest_field(str(error))}") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} must set `config` to a llava_jax.config.TrainConfig")
    return config


def _suggest_field(message: str) -> str:
    """Returns an error message for an unknown field, with the name of the most similar field.

    If `message` is not Python's error about an unknown field, it is returned unchanged.
    """
    found = re.search(
        r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", message
    )
    if not found:
        return message
    known = [c for module in (model, source, train) for c in vars(module).values()]
    classes = [c for c in known if isinstance(c, type) and dataclasses.is_dataclass(c)]
    meant = [c for c in classes if c.__name__ == found[1]] or classes
    fields = {field.name: c.__name__ for c in meant for field in dataclasses.fields(c)}
    near = difflib.get_close_matches(found[2], fields, n=1, cutoff=0.0)[0]
    return f"there is no field '{found[2]}'; did you mean '{near}' of {fields[near]}?"


def parse_config(
    argv: Sequence[str] | None = None, *, prog: str = "llava-jax train"
) -> TrainConfig:
    """Loads the config file given by `--config FILE` and overrides fields with the other options.

    The option `--optimizer.learning-rate 1e-4`, for example, sets `optimizer.learning_rate`.

    Args:
        argv: Arguments of the command; None takes the arguments of the process.
        prog: Name of the command in help texts and errors.

    Raises:
        ConfigError: The config file is missing or wrong, or a field has a value that is not
            allowed.
        SystemExit: The command line is wrong (status 2), or it asks for help (status 0).
    """
    first = argparse.ArgumentParser(
        prog=prog,
        description="Trains a LLaVA model. Every field of the config can be set by an option, for "
        "example --optimizer.learning-rate 1e-4. `--config FILE --help` lists all fields and their "
        "values in this config.",
        epilog=f"Presets: {', '.join(preset_names())}.",
        add_help=False,
    )
    first.add_argument(
        "--config",
        metavar="FILE",
        help="path of a config file, for example configs/7b_lora.py, or name of a preset",
    )
    found, rest = first.parse_known_args(argv)
    if found.config is None:
        first.print_help()
        raise SystemExit(0 if {"-h", "--help"} & set(rest) else 2)
    return tyro.cli(
        TrainConfig,
        default=load_config(found.config),
        args=rest,
        prog=f"{prog} --config {found.config}",
        config=(tyro.conf.AvoidSubcommands,),
    )
