"""Opens everything that a run needs before a device is used, and compares it between processes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llava_jax.config import Json, LlmConfig, ModelConfig, Parts, TrainConfig
from llava_jax.config.ignored import ignored_fields
from llava_jax.distributed.multihost import is_alone, local_devices
from llava_jax.planning.check_devices import check_accelerator
from llava_jax.pretrained.load import fingerprint
from llava_jax.pretrained.resolve import Checkpoint
from llava_jax.training.check_learning import learning_warnings
from llava_jax.training.check_sources import check_sources
from llava_jax.training.hub import check_push
from llava_jax.training.inputs import Inputs, find_model, open_inputs
from llava_jax.training.process_agreement import agree, not_shared, run_facts
from llava_jax.training.resume import follow_adapter
from llava_jax.training.run_config import describe
from llava_jax.training.trackers import check_packages


@dataclasses.dataclass(frozen=True)
class Setup:
    """The checkpoint, the model sizes and the data of a run, found before a device is used.

    A run makes copies of it whose config and inputs contain the chosen plan and buckets.

    Attributes:
        config: Config of the run. Its `init_adapter` is the path of an adapter or None.
        found: Checkpoint to start from; None if the model is trained from scratch.
        fingerprint: Fingerprint of the base model; None if there is no base model.
        model_config: Sizes and token ids of the model.
        processor: Source of the tokenizer and the image processor.
        inputs: Inputs of the run.
        digest: Digests of the data, from `Inputs.digest`.
        total_steps: Number of optimizer steps of the whole run.
    """

    config: TrainConfig
    found: Checkpoint | None
    fingerprint: str | None
    model_config: ModelConfig
    processor: Path | Parts
    inputs: Inputs
    digest: Json
    total_steps: int

    @property
    def source(self) -> Path | Parts | None:
        """Location of the base model's weights; None if the model is trained from scratch."""
        return None if self.found is None else self.found.base

    def describe(self, config: TrainConfig) -> Json:
        """Returns the content of config.json and data.json for this config."""
        return describe(config, self.model_config, self.total_steps, self.fingerprint, self.digest)


def open_setup(config: TrainConfig) -> Setup:
    """Finds the checkpoint and the sizes of the model, and opens the data."""
    check_packages(config.log)
    check_sources(config)
    check_push(config)
    if config.model is not None and is_alone():  # several processes first agree; see `_run`
        check_accelerator(config, config.model)  # before a checkpoint is downloaded
    config, found = follow_adapter(config)
    source = None if found is None else found.base
    base = None if source is None else fingerprint(source)
    model_config, processor = find_model(config, source)
    inputs = open_inputs(config, model_config, processor)
    total = config.total_steps(inputs.order.samples)
    return Setup(config, found, base, model_config, processor, inputs, inputs.digest(), total)


def agree_on(setup: Setup) -> None:
    """Raises ConfigError unless all processes have the same setup, output_dir and device count."""
    if is_alone():
        return
    facts = run_facts(
        setup.config,
        setup.model_config,
        setup.total_steps,
        setup.fingerprint,
        setup.inputs,
        setup.digest,
    )
    agree(facts, *not_shared(Path(setup.config.output_dir)))
    agree({"the number of devices": local_devices()})


def context_warnings(max_length: int, llm: LlmConfig) -> Iterator[str]:
    """Yields a warning if samples may be longer than the decoder's context.

    Args:
        max_length: The limit `data.max_length`.
        llm: Sizes of the decoder, with the scaling of its RoPE.
    """
    context = llm.context_length
    if max_length <= context:
        return
    change = 'give the "rope_scaling" a larger factor'
    if llm.rope_scaling is None:
        change = (
            f'set "rope_scaling": {{"rope_type": "yarn", "factor": {-(-max_length // context)}.0, '
            f'"original_max_position_embeddings": {context}}}'
        )
    yield (
        f"warning: data.max_length is {max_length}, but the decoder is made for at most {context} "
        f"tokens, and reads later tokens badly. To train on longer samples, {change} in the "
        "decoder's settings in config.json; "
        'see "Long sequences" in docs/models.md'
    )


def startup_notes(setup: Setup, devices: int) -> Iterator[str]:
    """Yields a line for each field without an effect, for each reason to learn nothing, and more.

    Args:
        setup: Setup of the run.
        devices: Number of devices that the samples of a batch are divided among.
    """
    config, steps, inputs = setup.config, setup.total_steps, setup.inputs
    for line in ignored_fields(config, steps, has_eval_data=len(inputs.eval_records) > 0):
        yield f"note: {line}"
    yield from context_warnings(config.data.max_length, setup.model_config.llm)
    yield from learning_warnings(config, inputs.order.samples, steps, devices)
