"""Finds the fields of a config that are set, but have no effect because of another field."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from llava_jax.config.train import TrainConfig, flatten, to_json


class _Situation(NamedTuple):
    """What the rules look at: the config, and facts that only an opened run knows."""

    config: TrainConfig
    steps: int
    has_eval_data: bool

    def evaluates_often(self) -> bool:
        """Returns True if there are evaluations during training, and not only before and after."""
        every = self.config.eval.every
        return self.has_eval_data and every is not None and every < self.steps

    def uses_groups(self) -> bool:
        """Returns True if samples are grouped, for the loss or for batches of similar samples."""
        is_weighted = self.config.batch.loss_weighting == "sample_mean"
        return is_weighted or self.config.data.group_by_modality_length

    def profiles(self) -> bool:
        """Returns True unless the profile begins after the last step."""
        profiled = self.config.log.profile_steps
        return profiled is None or profiled[0] <= self.steps


class _Rule(NamedTuple):
    """Fields and groups of fields, when they have an effect, and why they have none otherwise."""

    fields: tuple[str, ...]
    has_effect: Callable[[_Situation], bool]
    reason: str


_RULES = (
    _Rule(("epochs",), lambda s: s.config.steps is None, "steps is set"),
    _Rule(
        ("lora",),
        lambda s: "lora" in (s.config.tune.llm, s.config.tune.projector),
        "tune.llm is not 'lora', and tune.projector is not either",
    ),
    _Rule(
        ("lora.layers_to_transform", "lora.modules_to_save", "lora.trainable_token_indices"),
        lambda s: s.config.tune.llm == "lora",
        "tune.llm is not 'lora'",
    ),
    _Rule(("vision_lora",), lambda s: s.config.tune.vision == "lora", "tune.vision is not 'lora'"),
    _Rule(
        ("optimizer.learning_rate",),
        lambda s: "optimizer.learning_rate" in s.config.peak_rates(),
        "all trained parts have learning rates of their own",
    ),
    _Rule(
        ("optimizer.projector_learning_rate",),
        lambda s: s.config.tune.projector != "frozen",
        "tune.projector is 'frozen'",
    ),
    _Rule(
        ("optimizer.vision_learning_rate",),
        lambda s: s.config.tune.vision != "frozen",
        "tune.vision is 'frozen'",
    ),
    _Rule(
        ("batch.loss_group",),
        _Situation.uses_groups,
        "batch.loss_weighting is 'token'",
    ),
    _Rule(
        ("data.image_root",),
        lambda s: not s.config.data.mixture or s.config.data.uses_image_root_for_eval,
        "each data set of data.mixture has its own image_root",
    ),
    _Rule(("memory.limit_gib",), lambda s: s.config.searches_plan, "no plan is searched"),
    _Rule(
        ("memory.stream_adapters",),
        lambda s: s.config.memory.stream_weights and s.config.tune.has_adapters,
        "memory.stream_weights is not set, or the run trains no adapters",
    ),
    _Rule(
        ("data.eval_image_root",),
        lambda s: s.config.data.eval_path is not None,
        "data.eval_path is not set",
    ),
    _Rule(
        ("eval", "data.eval_samples", "checkpoint.keep_best"),
        lambda s: s.has_eval_data,
        "there is no eval data; set data.eval_path or data.eval_fraction",
    ),
    _Rule(
        ("eval.best_by",),
        lambda s: s.config.eval.patience is not None or s.config.checkpoint.keep_best,
        "neither eval.patience nor checkpoint.keep_best is set",
    ),
    _Rule(
        ("eval.patience", "eval.best_by", "checkpoint.keep_best"),
        _Situation.evaluates_often,
        "there are no evaluations during training; set eval.every",
    ),
    _Rule(("log.profile_steps",), _Situation.profiles, "the run ends before these steps"),
)


def ignored_fields(config: TrainConfig, steps: int, *, has_eval_data: bool) -> Iterator[str]:
    """Yields a line of text for each reason why fields that are set have no effect.

    A field counts as set if its value is not the default.

    Args:
        config: Config of a run.
        steps: Number of optimizer steps of the whole run.
        has_eval_data: Whether the run has eval data.
    """
    default = flatten(to_json(TrainConfig(config.name)))
    fields = flatten(to_json(config))
    found = {name: value for name, value in fields.items() if value != default.get(name)}
    situation = _Situation(config, steps, has_eval_data)
    for rule in _RULES:
        if rule.has_effect(situation):
            continue
        names = [name for name in found if any(f"{name}.".startswith(f"{x}.") for x in rule.fields)]
        if names:
            have = "has" if len(names) == 1 else "have"
            yield f"{', '.join(names)} {have} no effect, because {rule.reason}"
            for name in names:
                del found[name]
