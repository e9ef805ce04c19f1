"""What a run is: frozen dataclasses. A config file is Python that builds one and calls it `config`.

A run is a *recipe* (what is learned) and a *plan* (how it fits the devices). The plan never changes
a result. What a field belongs to, and which values it may have, is metadata of its type; see
`llava_jax.config.fields`.
"""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llava_jax.config.fields import (
    IGNORED_BY_PLAN,
    LOCATION,
    MACHINE,
    OBSERVED,
    PLAN,
    RESOLVED,
    Bound,
    at_least,
    check_fields,
    field_paths,
)
from llava_jax.config.model import LLM_LINEARS, VISION_LINEARS, ModelConfig
from llava_jax.config.source import Source
from llava_jax.disk import Json
from llava_jax.errors import ConfigError

Tuning = Literal["frozen", "lora", "full"]
Quantisation = Literal["nf4", "nf4_double", "int8"]
Remat = Literal["full", "dots", "none"]
AttentionImplementation = Literal["plain", "cudnn", "flash", "splash"]
Aspect = Literal["pad", "crop", "squash"]
Decode = Literal["exact", "draft"]


MAX_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What trains of each part: nothing ("frozen"), LoRA adapters, or every weight ("full")."""

    llm: Tuning = "lora"
    vision: Tuning = "frozen"
    projector: Literal["frozen", "full"] = "full"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA as PEFT defines it: y = W x + (alpha / rank) B A dropout(x)."""

    rank: Annotated[int, at_least(1, "an adapter of rank 0 has no weights")] = 128
    alpha: float = 256.0
    dropout: Annotated[
        float,
        Bound(
            lambda rate: 0 <= rate < 1, "0 or more, below 1", "the rest is divided by 1 - dropout"
        ),
    ] = 0.05
    targets: tuple[str, ...] = LLM_LINEARS


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One of several data sets that a run trains on together.

    Attributes:
        path: As `DataConfig.path`.
        image_root: Folder that its image paths are relative to.
        weight: How often an epoch has each of its records. With 0.5, every epoch has another half
            of them.
    """

    path: str
    image_root: str = ""
    weight: Annotated[
        float, Bound(lambda weight: 0 < weight < math.inf, "above 0", "leave the data set out")
    ] = 1.0

    def __post_init__(self):
        check_fields(self, "data.mixture: ")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and the evaluation data.

    Attributes:
        path: A data file, a folder of them or a pattern ("data/train-*.parquet"). Files are JSON
            lists, JSON lines or Parquet, which is seen from their contents, with records in LLaVA's
            form or with "messages". Or easy-VQA from its PyPI package: "easy_vqa:train[:FORM...]".
            Paths of fsspec (gs://, s3://) are read in place.
        image_root: Folder or fsspec path that the image paths of the records are relative to.
        mixture: Data sets to train on together, instead of `path` and `image_root`.
        follow_links: Whether links in image_root may lead to images outside of it.
        template: Name of a template in data/templates.py.
        image_aspect: How an image becomes square: "pad" it with the mean colour, "crop" its centre,
            or "squash" it, as SigLIP's processor does.
        image_decode: How training images are decoded. "draft" decodes JPEGs at a half, a quarter or
            an eighth of their size where that is about the size needed. Large ones are then read
            twice as fast, and pixels differ by 0.5 to 2.5 steps of 1/255 on average.
        max_length: Longest sequence in tokens, with images expanded; longer ones are truncated.
        max_text_length: Longest sequence in tokens if an image counts as one token, which is
            XTuner's limit; longer ones are truncated. None sets no such limit.
        buckets: Lengths that batches are padded to; empty means max_length alone.
        packing: Put as many samples of a step as fit into one row of max_length. Samples do not see
            each other, so results are the same as with one row for each; there is less padding.
            Replaces buckets.
        max_images: Most images in one sample; None counts them in the data.
        shuffle: Whether each epoch has the records in another random order.
        group_by_modality_length: Make batches either of samples with images or of samples without,
            as LLaVA's option of this name does.
        max_skipped: Largest share of samples that may be skipped because they cannot be used; if
            there are more, the run stops.
        workers: Processes that decode images; 0 decodes them in the main process.
        eval_path: Evaluation data, in any form that `path` may have, with the same image_root.
        eval_samples: Evaluate on the first so many samples only; None takes all.
    """

    path: Annotated[str, LOCATION] = ""
    image_root: Annotated[str, LOCATION] = ""
    mixture: Annotated[tyro.conf.Suppress[tuple[DataSet, ...]], LOCATION] = ()
    follow_links: bool = False
    template: str = "vicuna_v1"
    image_aspect: Aspect = "pad"
    image_decode: Decode = "exact"
    max_length: Annotated[int, at_least(1, "a sequence has a token")] = 2048
    max_text_length: Annotated[int | None, at_least(1, "a sequence has a token")] = None
    buckets: tuple[int, ...] = ()
    packing: Annotated[bool, PLAN] = False
    max_images: int | None = None
    shuffle: bool = True
    group_by_modality_length: bool = False
    max_skipped: Annotated[float, OBSERVED, at_least(0, "a share of the samples")] = 0.01
    workers: Annotated[int, MACHINE, at_least(0, "0 decodes in the main process")] = 4
    eval_path: Annotated[str | None, LOCATION] = None
    eval_samples: Annotated[
        int | None, OBSERVED, at_least(1, "to measure nothing, leave data.eval_path out")
    ] = None


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Batch sizes, and how the loss of a batch is averaged.

    Attributes:
        global_size: Samples per optimizer step, over all devices.
        micro_size: Samples per device and forward pass; None leaves it to the plan.
        loss_weighting: "token" gives every supervised token of the step the same weight.
            "sample_mean" takes the mean over the tokens of each `loss_group` consecutive samples,
            and then the mean of these. That is LLaVA's published form, with the micro-batch of one
            GPU as the group.
        loss_group: Samples in a group of "sample_mean".
    """

    global_size: Annotated[int, at_least(1, "a step needs a sample")] = 128
    micro_size: Annotated[int | None, PLAN, at_least(1, "a forward pass needs a sample")] = None
    loss_weighting: Literal["token", "sample_mean"] = "token"
    loss_group: Annotated[int, at_least(1, "a mean needs a sample")] = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rates.

    Attributes:
        learning_rate: Peak learning rate.
        projector_learning_rate: Peak rate of the projector; None takes `learning_rate`.
        vision_learning_rate: Peak rate of the vision tower and its adapters; None takes
            `learning_rate`.
        schedule: How the rate falls from its peak to 0 after the warmup; "constant" keeps the peak.
        warmup_ratio: Share of the steps over which the rate rises from 0 to its peak.
        weight_decay: Decay of AdamW; biases and norms do not decay.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the denominator of the update.
        clip_norm: Largest global norm of the gradients; None turns clipping off.
    """

    learning_rate: Annotated[float, at_least(0, "a negative one would increase the loss")] = 2e-4
    projector_learning_rate: Annotated[
        float | None, at_least(0, "a negative one would increase the loss")
    ] = None
    vision_learning_rate: Annotated[
        float | None, at_least(0, "a negative one would increase the loss")
    ] = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, at_least(0, "a share of the steps")] = 0.03
    weight_decay: Annotated[float, at_least(0, "a negative one would make the weights grow")] = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The plan: where arrays are kept and what is computed again. It never changes a result.

    Attributes:
        plan: "auto" finds the cheapest plan that fits the devices before anything is loaded;
            "manual" takes the fields as they are.
        limit_gib: Memory of one device in GiB, for "auto"; None asks the device.
        remat: What the forward pass keeps for the backward pass, which computes the rest again.
            "full" keeps only the input of each block, "dots" also the outputs of its linear layers,
            "none" everything except norms and gated products.
        offload_optimizer: Keep the optimizer's moments in host memory, and with remat "full" also
            the float32 weights of blocks that train in full. One layer at a time is on the device.
        stream_weights: Keep the weights of the blocks, and their gradients if they train, in host
            memory. One layer at a time is on the device. Needs remat "full".
        offload_activations: Keep the inputs of the blocks in host memory until the backward pass
            needs them. Needs remat "full".
    """

    plan: Literal["auto", "manual"] = "manual"
    limit_gib: Annotated[float | None, IGNORED_BY_PLAN] = None
    remat: Remat = "full"
    offload_optimizer: bool = False
    stream_weights: bool = False
    offload_activations: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; -1 takes the rest.

    Attributes:
        data: Devices, or groups of them, that each hold the whole model. Samples are divided among
            them.
        fsdp: Devices that samples and every parameter are divided among, as in ZeRO-3.
        tensor: Devices that share the heads and feed-forward widths of each layer.
        show: Print how every parameter is sharded.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    show: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how to resume.

    Attributes:
        every: Optimizer steps between checkpoints.
        keep: How many of the newest checkpoints are kept.
        accept_changes: Resume a run although its recipe or its data differs from what it began
            with. The differences are shown and recorded. The number of training records cannot
            change.
    """

    every: Annotated[int, at_least(1, "a number of steps")] = 500
    keep: Annotated[int, at_least(1, "a run resumes from the newest")] = 2
    accept_changes: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
        every: Steps between evaluations; None evaluates before and after the run only.
        batch_size: Samples in an evaluation batch, over all devices; None takes a micro-batch.
        examples: Evaluation questions to show with their answers, in report.html and at the end of
            the run.
    """

    every: Annotated[int | None, at_least(1, "a number of steps")] = None
    batch_size: Annotated[int | None, at_least(1, "a batch needs a sample")] = None
    examples: int = 12


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where a run is logged, besides its own files. It never changes a result.

    Attributes:
        tensorboard: Write events to `{run directory}/tensorboard`.
        wandb: Project at Weights & Biases; None logs nothing there. Everything else is set by the
            environment, for example WANDB_MODE=offline.
        profile_steps: The first and the last step to profile, into `{run directory}/profile`.
    """

    tensorboard: bool = False
    wandb: str | None = None
    profile_steps: Annotated[
        tuple[int, int] | None,
        Bound(
            lambda steps: 1 <= steps[0] <= steps[1],
            "a first step, 1 or more, and a last, not before it",
            "steps are counted from 1",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        name: Name of the run; its directory is `{output_dir}/{name}`. At most 200 bytes,
            without / or \\. It must not start with a dot, dash or space, nor end with a space.
        output_dir: Folder of the run's directory. Nothing is written outside of it.
        seed: Seed of new parameters, dropout masks and the order of the data.
        steps: Optimizer steps; None takes `epochs`.
        epochs: Passes through the data.
        init_from: Where the weights come from: a Hugging Face directory or hub id, the directory of
            an earlier run, or `Parts`. None initialises new ones for `model`.
        init_adapter: A PEFT adapter directory to continue from.
        model: Sizes of a model that is trained from scratch. With `init_from`, they are used while
            that checkpoint does not exist yet, so that the run can be planned.
        processor: Directory with the tokenizer and image processor; None takes those of
            `init_from`.
        tune: What trains.
        lora: Adapters of the decoder.
        vision_lora: Adapters of the vision tower.
        data: The training data and the evaluation data.
        batch: Batch sizes and the weighting of the loss.
        optimizer: AdamW and its learning rates.
        memory: The plan: how the run fits the devices.
        mesh: How the devices share the work.
        dtype: Dtype of the computation and of frozen weights. Weights that train, their moments,
            norms, softmax and the loss are float32.
        nonfinite_limit: After so many steps in a row whose loss or gradients are infinite or NaN,
            the run stops. The updates of such steps are not applied.
        quantize: Format of the frozen linear layers of the decoder, as in bitsandbytes: "nf4" (4.5
            bits a weight), "nf4_double" (with double quantisation, 4.13 bits) or "int8". It changes
            results, so it is part of the recipe.
        checkpoint: When to save, and how to resume.
        eval: Evaluation during training.
        log: Where the run is logged.
    """

    name: Annotated[str, OBSERVED]
    output_dir: Annotated[str, LOCATION] = "runs"
    seed: Annotated[int, IGNORED_BY_PLAN] = 42
    steps: Annotated[
        int | None, IGNORED_BY_PLAN, at_least(1, "a run trains for a step or more")
    ] = None
    epochs: Annotated[float, RESOLVED, at_least(0, "a number of passes through the data")] = 1.0
    init_from: Annotated[Source, LOCATION] = None
    init_adapter: Annotated[str | None, LOCATION] = None
    model: ModelConfig | None = None
    processor: Annotated[str | None, IGNORED_BY_PLAN] = None
    tune: TuneConfig = TuneConfig()
    lora: LoraConfig = LoraConfig()
    vision_lora: LoraConfig = LoraConfig(rank=64, alpha=16.0, targets=VISION_LINEARS)
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: Annotated[MemoryConfig, PLAN] = MemoryConfig()
    mesh: Annotated[MeshConfig, PLAN] = MeshConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nonfinite_limit: Annotated[int, OBSERVED, at_least(1, "the run stops after so many steps")] = 3
    quantize: Quantisation | None = None
    checkpoint: Annotated[CheckpointConfig, OBSERVED] = CheckpointConfig()
    eval: Annotated[EvalConfig, OBSERVED] = EvalConfig()
    log: Annotated[LogConfig, OBSERVED] = LogConfig()

    def __post_init__(self):
        check_fields(self)
        _check_name(self.name)

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return Path(self.output_dir) / self.name

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of a run over so many samples; the last batch may be filled up."""
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * samples / self.batch.global_size)


MAY_CHANGE = field_paths(TrainConfig, lambda field: field.role.may_change)
"""Fields that may change when a run resumes: none of them decides what is learned."""

MAY_DIFFER = field_paths(TrainConfig, lambda field: field.role.may_differ)
"""Fields of which each process of a run may have its own value."""

IGNORED_BY_PLANS = field_paths(TrainConfig, lambda field: field.is_ignored_by_plan)
"""Fields on which the memory that a train step takes does not depend."""


def _check_name(name: str) -> None:
    """Checks that a run's name can name a directory, and is neither a path nor an option.

    Raises:
        ConfigError: It cannot; says why.
    """
    shown = f"--name {name!a:.80}"
    if not name:
        raise ConfigError("--name is empty; give one, for example --name my_run")
    if slash := next((sign for sign in name if sign in "/\\"), None):
        raise ConfigError(
            f'{shown} contains "{slash}". A name may not contain / or \\; use --output-dir to '
            "choose the folder"
        )
    if not name.isprintable():  # half of a character is not printable either
        raise ConfigError(f"{shown} contains a character that cannot be printed; leave it out")
    if name.startswith((".", "-", " ")):
        raise ConfigError(f"{shown} must not start with a dot, a dash or a space")
    if name.endswith(" "):
        raise ConfigError(f"{shown} must not end with a space")
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        raise ConfigError(f"{shown} has {size} bytes; at most {MAX_NAME_BYTES} are allowed")


def to_json(config: TrainConfig) -> Json:
    """The whole config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(config: Json, leave_out: Collection[str] = (), prefix: str = "") -> Json:
    """The fields of a config as JSON, by dotted name.

    Args:
        config: From `to_json`, or one of its groups.
        leave_out: Dotted names of fields and groups that are left out.
        prefix: What the names start with.
    """
    fields: Json = {}
    for name, value in config.items():
        path = prefix + name
        if path in leave_out:
            continue
        is_group = isinstance(value, dict)
        fields |= flatten(value, leave_out, f"{path}.") if is_group else {path: value}
    return fields
