"""Defines the config of a training run: frozen dataclasses whose root is `TrainConfig`.

A config has two parts: the *recipe* decides what is learned, and the *plan* decides how the run
fits the devices. The plan never changes a result. The metadata of a field's type says which part
the field belongs to and which values it allows; see `llava_jax.config.fields`.
"""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from llava_jax.config.data import DataConfig
from llava_jax.config.fields import (
    IGNORED_BY_PLAN,
    LOCATION,
    NOT_EMPTY,
    OBSERVED,
    PLAN,
    RESOLVED,
    Bound,
    above,
    at_least,
    at_most,
    check_fields,
    field_paths,
    fraction,
    within,
)
from llava_jax.config.model import VISION_LINEARS, ModelConfig
from llava_jax.config.source import Source
from llava_jax.config.tuning import LoraConfig, TuneConfig
from llava_jax.disk import Json
from llava_jax.errors import ConfigError

Quantisation = Literal["nf4", "nf4_double", "int8"]
Remat = Literal["full", "dots", "none"]
AttentionImplementation = Literal["plain", "cudnn", "flash", "splash"]

MAX_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Batch sizes, and how the loss of a batch is averaged.

    Attributes:
        global_size: Number of samples in an optimizer step, on all devices together.
        micro_size: Number of samples in a forward pass on each device. If None, memory.plan "auto"
            chooses the number, and a plan that is not searched for puts a whole step into one
            forward pass.
        loss_weighting: How the loss is averaged. With "token", all supervised tokens of a step have
            the same weight. With "sample_mean", as in LLaVA, the loss is averaged over the tokens
            of each group of consecutive samples, and then over the groups.
        loss_group: Number of samples in a group if batch.loss_weighting is "sample_mean". In LLaVA,
            the micro-batch of one GPU is a group.
    """

    global_size: Annotated[int, at_least(1, "a step needs at least one sample")] = 128
    micro_size: Annotated[int | None, PLAN, at_least(1, "it is a number of samples")] = None
    loss_weighting: Literal["token", "sample_mean"] = "token"
    loss_group: Annotated[int, at_least(1, "a group needs at least one sample")] = 1


_LEAST_RATE = at_least(0, "a negative rate would increase the loss")
_MOST_RATE = at_most(10, "a larger rate destroys the weights")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rates.

    Attributes:
        name: "adamw", or "adamw_8bit", whose moments take 8 bits per element instead of 32, as in
            bitsandbytes' AdamW8bit. Moments of tensors with less than 4096 elements take 32 bits.
        learning_rate: Peak learning rate.
        projector_learning_rate: Peak learning rate of the projector; None uses `learning_rate`.
        vision_learning_rate: Peak learning rate of the vision tower and its adapters; None
            uses `learning_rate`.
        schedule: How the learning rate falls to 0 after the warmup; "constant" keeps the peak.
        warmup_ratio: Fraction of the steps in which the learning rate rises from 0 to its peak.
        weight_decay: Weight decay of AdamW; it is not applied to biases and norm weights.
        b1: Decay rate of AdamW's first moment.
        b2: Decay rate of AdamW's second moment.
        eps: Number that AdamW adds to the denominator of an update.
        clip_norm: Maximum global norm of the gradients; None turns gradient clipping off.
        weight_dtype: Dtype of trained matrices. "bfloat16" halves their memory; updates are
            computed in float32 and rounded at random, so that small updates are not lost.
        gradient_dtype: Dtype in which the gradients of trained matrices are summed over
            micro-batches. In "bfloat16", each sum is rounded.
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: Annotated[float, _LEAST_RATE, _MOST_RATE] = 2e-4
    projector_learning_rate: Annotated[float | None, _LEAST_RATE, _MOST_RATE] = None
    vision_learning_rate: Annotated[float | None, _LEAST_RATE, _MOST_RATE] = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, within(0, 1, "it is a fraction of the steps")] = 0.03
    weight_decay: Annotated[
        float,
        at_least(0, "a negative value would let weights grow"),
        at_most(10, "a larger value removes the weights"),
    ] = 0.0
    b1: Annotated[float, fraction("it is a decay rate")] = 0.9
    b2: Annotated[float, fraction("it is a decay rate")] = 0.999
    eps: Annotated[
        float, within(1e-30, 1, "it prevents a division by zero; a large value prevents learning")
    ] = 1e-8
    clip_norm: Annotated[
        float | None,
        above(0, "to turn clipping off, set it to None"),
        at_least(1e-4, "with a smaller norm, nothing is trained"),
    ] = None
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"

    def rate_field(self, part: str) -> str:
        """Returns the name of the field with the peak learning rate of a part of the model."""
        own = f"{part}_learning_rate"
        return "learning_rate" if getattr(self, own, None) is None else own


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memory plan: where arrays are kept, and what is recomputed. Results do not change.

    Attributes:
        plan: How the plan is chosen. Before weights are loaded, "auto" searches for the fastest
            plan that fits into memory. If one of the fields after limit_gib is set to another value
            than its default, the search is only for batch.micro_size, unless this is set too.
            "manual" uses the values of these fields in any case.
        limit_gib: Memory size of a device in GiB, for memory.plan "auto". None asks the device; a
            CPU has the memory of the machine that is available.
        remat: Activations that are kept for the backward pass; the others are recomputed. "full"
            keeps only the input of each block, "dots" also keeps the outputs of linear layers, and
            with "none", everything is kept except the outputs of norms and gated products.
        offload_optimizer: Keep the optimizer's moments in host memory; if memory.remat is "full",
            also the float32 weights of fully trained blocks. A device holds one layer at a time.
        stream_weights: Keep the weights of the blocks, and their gradients, in host memory. A
            device holds one layer at a time. Needs memory.remat "full".
        stream_adapters: With stream_weights, also keep the adapters of the blocks, and their
            gradients, in host memory.
        offload_vocabulary: Keep the embedding and the output matrix of the decoder, and their
            gradients, in host memory.
        offload_activations: Keep the inputs of the blocks in host memory between the forward pass
            and the backward pass. Needs memory.remat "full".
        weights_on_disk: Leave the frozen weights of the blocks in the files of init_from, and read
            one layer at a time, twice in each micro-batch. Needs memory.remat "full" and a decoder
            that is neither quantized nor trained in full.
    """

    plan: Literal["auto", "manual"] = "auto"
    limit_gib: Annotated[float | None, IGNORED_BY_PLAN, above(0, "it is a memory size")] = None
    remat: Remat = "full"
    offload_optimizer: bool = False
    stream_weights: bool = False
    stream_adapters: bool = True
    offload_vocabulary: bool = False
    offload_activations: bool = False
    weights_on_disk: bool = False

    @property
    def is_searched(self) -> bool:
        """Whether a run searches for the fields after limit_gib; see `plan`."""
        return self == MemoryConfig(plan="auto", limit_gib=self.limit_gib)


AXIS_SIZE = Bound(
    lambda size: size == -1 or size >= 1,
    "-1 or at least 1",
    "it is a number of devices; -1 uses the remaining devices",
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the device mesh.

    Attributes:
        data: Number of copies of the model. The samples of a batch are divided among the copies. -1
            uses all devices that the other axes do not use.
        fsdp: Number of devices among which each parameter and the samples of a batch are divided,
            as in ZeRO-3. -1 uses all devices that the other axes do not use.
        tensor: Number of devices among which the attention heads and the feed-forward width of each
            layer are divided. -1 uses all devices that the other axes do not use.
        sequence: Number of devices among which the tokens of each row, and in addition to `fsdp`
            each parameter, are divided. For attention, the devices exchange tokens for heads, so
            this number times `tensor` must divide the number of attention heads. -1 uses all
            devices that the other axes do not use.
        show: Print how each parameter is sharded.
    """

    data: Annotated[int, AXIS_SIZE] = 1
    fsdp: Annotated[int, AXIS_SIZE] = -1
    tensor: Annotated[int, AXIS_SIZE] = 1
    sequence: Annotated[int, AXIS_SIZE] = 1
    show: Annotated[bool, OBSERVED] = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save a checkpoint, and how to resume.

    Attributes:
        every: Number of optimizer steps between checkpoints.
        keep: Number of checkpoints to keep; older ones are deleted.
        keep_best: Also keep the checkpoint of the best evaluation (see eval.best_by), however old.
            The result of the run has its parameters instead of those of the last step.
        accept_changes: Resume a run even if its recipe or its data has changed since the run began.
            The changes are shown and recorded. The number of training records must not change.
    """

    every: Annotated[int, at_least(1, "it is a number of steps")] = 500
    keep: Annotated[int, at_least(1, "a run resumes from the newest checkpoint")] = 2
    keep_best: bool = False
    accept_changes: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
        every: Number of steps between evaluations; None evaluates only before and after training.
        patience: Number of consecutive evaluations without a new best one after which the run stops
            early. None trains for all steps.
        best_by: What decides which evaluation is the best: the lowest "loss" or the highest
            "accuracy". Of several equal evaluations, the first one is the best.
        batch_size: Number of samples in an evaluation batch, on all devices together; None takes
            the size of a micro-batch.
        examples: Number of evaluation questions to show with the model's answers, in report.html
            and at the end of the run.
    """

    every: Annotated[int | None, at_least(1, "it is a number of steps")] = None
    patience: Annotated[int | None, at_least(1, "it is a number of evaluations")] = None
    best_by: Literal["loss", "accuracy"] = "loss"
    batch_size: Annotated[int | None, at_least(1, "a batch needs at least one sample")] = None
    examples: Annotated[
        int,
        at_least(0, "it is a number of questions"),
        at_most(1000, "each answer takes many calls of the model"),
    ] = 12


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where a run is logged, in addition to the files in its directory.

    Attributes:
        tensorboard: Write TensorBoard events to `{run directory}/tensorboard`.
        wandb: Weights & Biases project to log to; None does not log to Weights & Biases. Set its
            other options with environment variables such as WANDB_MODE=offline.
        profile_steps: First and last step to profile, with traces in `{run directory}/profile`.
    """

    tensorboard: bool = False
    wandb: Annotated[str | None, NOT_EMPTY] = None
    profile_steps: Annotated[
        tuple[int, int] | None,
        Bound(
            lambda steps: 1 <= steps[0] <= steps[1],
            "a first step of at least 1 and a last step that is not before the first step",
            "steps are counted from 1",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    r"""The config of one training run.

    Attributes:
        name: Name of the run, whose directory is `{output_dir}/{name}`. A name has at most 200
            bytes and no / or \. It must not begin with a dot, dash or space, or end with a space.
        output_dir: Directory that contains the run's directory. The run does not write elsewhere.
        seed: Random seed for new parameters, dropout and the order of the data.
        steps: Number of optimizer steps; None computes the number from `epochs`.
        epochs: Number of passes through the training data; not used if `steps` is set.
        init_from: Source of the weights: a Hugging Face directory or hub id, the directory of an
            earlier run, or separate parts. None initializes random weights for a model with
            the sizes in `model`.
        init_adapter: Directory of a PEFT adapter to continue training from.
        model: Sizes of a model that is trained from scratch. If `init_from` is a checkpoint that
            does not exist yet, these sizes are used to plan the run.
        processor: Directory with the tokenizer and the image processor; None takes the tokenizer
            and the image processor of `init_from`.
        tune: Which parts of the model are trained, and how.
        lora: LoRA adapters of the decoder.
        vision_lora: LoRA adapters of the vision tower.
        data: Training data and evaluation data.
        batch: Batch sizes and the weights of tokens in the loss.
        optimizer: AdamW and its learning rates.
        memory: Memory plan: where arrays are kept, and what is recomputed. Results do not change.
        mesh: Number of devices along each axis of the device mesh.
        dtype: Dtype of the computation and of frozen weights. Trained weights have the dtype of
            `optimizer.weight_dtype`. Norms, softmax and the loss are always float32. A CPU always
            computes in float32, because it is slow in bfloat16.
        nonfinite_limit: The run stops after this number of consecutive steps with an infinite or
            NaN loss or gradient. The updates of such steps are not applied.
        quantize: Quantization of the decoder's frozen linear layers, as in bitsandbytes: "nf4" (4.5
            bits per weight), "nf4_double" (4.13 bits) or "int8". Quantization changes results.
        checkpoint: When to save a checkpoint, and how to resume.
        eval: Evaluation during training.
        log: Where the run is logged, in addition to the files in its directory.
        push_to_hub: Repository on the Hugging Face Hub, USER/NAME, to which the result is uploaded
            when the run is finished. A new repository is private. None uploads nothing.
    """

    name: Annotated[str, OBSERVED]
    output_dir: Annotated[str, LOCATION] = "runs"
    seed: Annotated[int, IGNORED_BY_PLAN, at_least(0, "random seeds are not negative")] = 42
    steps: Annotated[
        int | None, IGNORED_BY_PLAN, at_least(1, "a run trains for at least one step")
    ] = None
    epochs: Annotated[
        float,
        RESOLVED,
        Bound(
            lambda passes: 0 < passes <= 1e6,
            "above 0 and at most 1,000,000",
            "it is a number of passes through the data",
        ),
    ] = 1.0
    init_from: Annotated[Source, LOCATION] = None
    init_adapter: Annotated[str | None, LOCATION, NOT_EMPTY] = None
    model: ModelConfig | None = None
    processor: Annotated[str | None, IGNORED_BY_PLAN, NOT_EMPTY] = None
    tune: TuneConfig = TuneConfig()
    lora: LoraConfig = LoraConfig()
    vision_lora: LoraConfig = LoraConfig(rank=64, alpha=16.0, targets=VISION_LINEARS)
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: Annotated[MemoryConfig, PLAN] = MemoryConfig()
    mesh: Annotated[MeshConfig, PLAN] = MeshConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nonfinite_limit: Annotated[int, OBSERVED, at_least(1, "it is a number of steps")] = 3
    quantize: Quantisation | None = None
    checkpoint: Annotated[CheckpointConfig, OBSERVED] = CheckpointConfig()
    eval: Annotated[EvalConfig, OBSERVED] = EvalConfig()
    log: Annotated[LogConfig, OBSERVED] = LogConfig()
    push_to_hub: Annotated[str | None, OBSERVED, NOT_EMPTY] = None

    def __post_init__(self):
        check_fields(self)
        _check_name(self.name)

    @property
    def searches_plan(self) -> bool:
        """Whether a run searches for its plan, or at least for the size of its micro-batches."""
        is_open = self.memory.is_searched or self.batch.micro_size is None
        return self.memory.plan == "auto" and is_open

    @property
    def may_read_from_disk(self) -> bool:
        """Whether memory.weights_on_disk is possible: frozen decoder weights that are in files."""
        is_frozen = self.tune.llm != "full" and self.quantize is None
        return is_frozen and self.init_from is not None

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.output_dir) / self.name

    @property
    def export_dir(self) -> Path:
        """Directory of the run's result: `adapter/` if the run trains LoRA, else `model/`."""
        return self.run_dir / ("adapter" if self.tune.has_adapters else "model")

    def peak_rates(self) -> dict[str, float]:
        """Returns the peak learning rates of the trained parts, by the names of their fields."""
        parts = [part for part, how in vars(self.tune).items() if how != "frozen"]
        fields = dict.fromkeys(map(self.optimizer.rate_field, parts))
        return {f"optimizer.{field}": getattr(self.optimizer, field) for field in fields}

    def total_steps(self, samples: int) -> int:
        """Returns the number of optimizer steps if the training data has this many samples."""
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * samples / self.batch.global_size)


MAY_CHANGE = field_paths(TrainConfig, lambda field: field.role.may_change)
"""Names of the fields that may change when a run resumes; they do not affect what is learned."""

MAY_DIFFER = field_paths(TrainConfig, lambda field: field.role.may_differ)
"""Names of the fields whose values may differ between the processes of a run."""

IGNORED_BY_PLANS = field_paths(TrainConfig, lambda field: field.is_ignored_by_plan)
"""Names of the fields that do not affect how much memory a train step needs."""


def _check_name(name: str) -> None:
    """Raises ConfigError if `name` is not a directory name, or looks like a path or an option."""
    shown = f"--name {name!a:.80}"
    if not name:
        raise ConfigError("--name is empty; give one, for example --name my_run")
    if slash := next((sign for sign in name if sign in "/\\"), None):
        raise ConfigError(
            f'{shown} contains "{slash}". A name must not contain / or \\; use --output-dir to '
            "choose the directory"
        )
    if not name.isprintable():  # lone surrogates are not printable either
        raise ConfigError(f"{shown} contains a character that cannot be printed; remove it")
    if name.startswith((".", "-", " ")):
        raise ConfigError(f"{shown} must not start with a dot, a dash or a space")
    if name.endswith(" "):
        raise ConfigError(f"{shown} must not end with a space")
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        raise ConfigError(f"{shown} has {size} bytes; at most {MAX_NAME_BYTES} are allowed")


def to_json(config: TrainConfig) -> Json:
    """Returns the config as nested dictionaries of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(config: Json, leave_out: Collection[str] = (), prefix: str = "") -> Json:
    """Returns the fields of a config by dotted name, for example "optimizer.b1".

    Args:
        config: Config as returned by `to_json`, or one of its groups.
        leave_out: Dotted names of the fields and groups to leave out.
        prefix: Text in front of each name.
    """
    fields: Json = {}
    for name, value in config.items():
        path = prefix + name
        if path in leave_out:
            continue
        is_group = isinstance(value, dict)
        fields |= flatten(value, leave_out, f"{path}.") if is_group else {path: value}
    return fields
