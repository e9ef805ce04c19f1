"""Finds the sizes of a run's model, from its checkpoint or from its config."""

from pathlib import Path

from llava_jax.config import ModelConfig, Parts, TrainConfig
from llava_jax.errors import ConfigError
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.resolve import resolve


def sizes(config: TrainConfig) -> ModelConfig:
    """Returns the sizes of a run's model.

    The sizes come from the checkpoint `init_from`. If the checkpoint does not exist yet, the sizes
    come from `config.model`.

    Raises:
        ConfigError: Neither `init_from` nor `model` is set.
    """
    source = config.init_from
    base = source.llm if isinstance(source, Parts) else source
    if source is not None and (config.model is None or Path(str(base)).exists()):
        return read_config(resolve(source).base)
    if config.model is None:
        raise ConfigError(
            "init_from and model are both None; set model, or set init_from to a checkpoint"
        )
    return config.model
