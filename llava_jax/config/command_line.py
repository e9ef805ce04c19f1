"""Loads config files and overrides their fields with command-line options."""

import argparse
import dataclasses
import functools
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from llava_jax.config.data import DEMO_DATA
from llava_jax.config.fields import field_groups
from llava_jax.config.presets import find_preset, preset_names, suggest_preset
from llava_jax.config.suggestions import suggest_field, suggest_option
from llava_jax.config.train import TrainConfig
from llava_jax.errors import ConfigError


def load_config(path: str | Path) -> TrainConfig:
    """Executes a config file as a Python program and returns the variable `config` that it sets.

    Args:
        path: Path of the file, or the name of a preset.

    Raises:
        ConfigError: The file or preset does not exist, the file raises an exception, or the file
            does not set `config` to a `TrainConfig`.
    """
    if not Path(path).is_file():
        preset = find_preset(str(path))
        if preset is None:
            raise ConfigError(f"--config {path}: no such file; {suggest_preset(str(path))}")
        path = preset
    try:
        config = runpy.run_path(str(path)).get("config")
    except ConfigError:
        raise
    except Exception as error:  # whatever the file does
        what = "" if isinstance(error, TypeError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"{path}{_line(error, str(path))}: {what}{suggest_field(str(error))}"
        ) from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} must set `config` to a llava_jax.config.TrainConfig")
    return config


def _line(error: Exception, path: str) -> str:
    """Returns the line of a file that raised an exception as ", line 5", or "" if it is unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    number = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    return "" if number is None else f", line {number}"


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
    default = load_config(found.config)
    _hide_none(TrainConfig)
    config, unknown = tyro.cli(
        TrainConfig,
        default=default,
        args=rest,
        prog=f"{prog} --config {found.config}",
        config=(tyro.conf.AvoidSubcommands,),
        return_unknown_args=True,
    )
    if unknown:
        first.error(suggest_option(unknown[0]))
    options = {word.partition("=")[0].replace("_", "-") for word in rest}
    return _replace_eval_data(_replace_steps(config, default, options), default, options)


def _replace_steps(config: TrainConfig, default: TrainConfig, options: set[str]) -> TrainConfig:
    """Lets the option --epochs replace the number of steps that a config file sets.

    Args:
        config: Config with the values of all options.
        default: Config of the file.
        options: Names of the options that were given.

    Raises:
        ConfigError: Both --steps and --epochs are given.
    """
    if "--epochs" not in options or config.steps is None:
        return config
    if "--steps" in options:
        raise ConfigError(
            f"--steps {config.steps} and --epochs {config.epochs:g} are both given; leave out one "
            "of them"
        )
    text = f"--epochs {config.epochs:g} replaces steps = {default.steps} of the config"
    print(text, file=sys.stderr)
    return dataclasses.replace(config, steps=None)


def _replace_eval_data(config: TrainConfig, default: TrainConfig, options: set[str]) -> TrainConfig:
    """Leaves out the eval data of a config file if the options say that other data is trained on.

    The option --data.eval-fraction replaces the eval data. The data set of the demo does not judge
    a model that is trained on the user's data.

    Args:
        config: Config with the values of all options.
        default: Config of the file.
        options: Names of the options that were given.
    """
    own = default.data.eval_path
    if own is None or "--data.eval-path" in options:
        return config
    is_demo = own.startswith(DEMO_DATA) and not (config.data.path or "").startswith(DEMO_DATA)
    if "--data.eval-fraction" in options and config.data.eval_fraction:
        text = f"--data.eval-fraction replaces data.eval_path = {own} of the config"
    elif "--data.path" in options and is_demo:
        text = (
            f"note: data.eval_path = {own} of the config is not used, because --data.path is "
            "given; to evaluate the model, add --data.eval-path FILE or --data.eval-fraction 0.1"
        )
    else:
        return config
    print(text, file=sys.stderr)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_path=None))


@functools.cache  # the annotations are changed once
def _hide_none(config_class: type) -> None:
    """Lets --help not show `(default: None)`; the help of a field says what None means."""
    hint = tyro.conf.arg(help_behavior_hint=lambda x: "" if x == "None" else f"(default: {x})")
    for group, _ in field_groups(config_class):
        for name, kind in group.__annotations__.items():
            group.__annotations__[name] = Annotated[kind, hint]
