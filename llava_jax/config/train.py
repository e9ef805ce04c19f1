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
    """Which parts of the model are trained, and how.

    Attributes:
        llm: How the decoder is trained: not at all, with LoRA adapters, or in full.
        vision: How the vision tower is trained: not at all, with LoRA adapters, or in full.
        projector: Whether the projector is trained in full or not at all.
    """

    llm: Tuning = "lora"
    vision: Tuning = "frozen"
    projector: Literal["frozen", "full"] = "full"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA as PEFT defines it: y = W x + (alpha / rank) B A dropout(x).

    Attributes:
        rank: Rank of the adapter matrices A and B.
        alpha: Scale of the adapters; their output is multiplied by alpha / rank.
        dropout: Dropout rate of the inputs of the adapters.
        targets: Names of the linear layers that get an adapter.
    """

    rank: Annotated[int, at_least(1, "an adapter of rank 0 has no weights")] = 128
    alpha: float = 256.0
    dropout: Annotated[
        float,
        Bound(
            lambda rate: 0 <= rate < 1, "0 or more, and below 1", "it is the share of zeroed inputs"
        ),
    ] = 0.05
    targets: tuple[str, ...] = LLM_LINEARS


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One of several data sets that a run trains on together.

    Attributes:
        path: Data files of this data set, in any form that `DataConfig.path` may have.
        image_root: Directory or fsspec URL that relative image paths of this data set start from.
        weight: Number of times that an epoch contains each record. With 0.5, an epoch contains half
            of the records, and the next epoch the other half.
    """

    path: str
    image_root: str = ""
    weight: Annotated[
        float, Bound(lambda weight: 0 < weight < math.inf, "above 0", "or leave this data set out")
    ] = 1.0

    def __post_init__(self):
        check_fields(self, "data.mixture: ")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and the evaluation data.

    Attributes:
        path: Data file, directory of data files, or pattern ("data/train-*.parquet"). A file is a
            JSON list, JSON lines or Parquet, as detected from its contents, with records in LLaVA's
            format or with "messages". It may be at an fsspec URL (gs://, s3://). The name
            "easy_vqa:train[:FORM...]" selects easy-VQA from its PyPI package.
        image_root: Directory or fsspec URL that relative image paths of the records start from.
        mixture: Data sets to train on together, instead of `path` and `image_root`.
        follow_links: Allow symbolic links in data.image_root that lead to images outside of it.
        template: Name of the chat template; data/templates.py defines the templates.
        image_aspect: How an image becomes square: "pad" adds borders of the mean color, "crop"
            keeps the center, and "squash" scales width and height separately, as SigLIP does.
        image_decode: How training images are decoded: "exact" at full size, "draft" at a half, a
            quarter or an eighth of the size if a JPEG is much larger than needed. "draft" reads
            large JPEGs twice as fast and changes pixels by 0.5 to 2.5 of 255 levels on average.
        max_length: Maximum number of tokens in a sequence, including the tokens of its images;
            longer sequences are truncated.
        max_text_length: Maximum number of tokens in a sequence if each image counts as one token,
            as in XTuner; longer sequences are truncated. None sets no such limit.
        buckets: Lengths in tokens that batches are padded to, in addition to data.max_length.
        packing: Put as many samples of a step as fit into each row of data.max_length tokens.
            Samples do not attend to each other, so results do not change, but there is less
            padding. Replaces data.buckets.
        max_images: Maximum number of images in a sample; None takes the maximum in the data.
        shuffle: Read the records in a new random order in each epoch.
        group_by_modality_length: Never mix samples with and without images in a batch, like LLaVA's
            option of the same name.
        max_skipped: Largest fraction of the samples that may be skipped because they cannot be
            used. If more are skipped, the run stops.
        workers: Number of processes that decode images; 0 decodes in the main process.
        eval_path: Evaluation data, in any form that data.path may have. Its image paths start from
            data.image_root too.
        eval_samples: Number of samples to evaluate on, from the first on; None takes all samples.
    """

    path: Annotated[str, LOCATION] = ""
    image_root: Annotated[str, LOCATION] = ""
    mixture: Annotated[tyro.conf.Suppress[tuple[DataSet, ...]], LOCATION] = ()
    follow_links: bool = False
    template: str = "vicuna_v1"
    image_aspect: Aspect = "pad"
    image_decode: Decode = "exact"
    max_length: Annotated[int, at_least(1, "a sequence needs a token")] = 2048
    max_text_length: Annotated[int | None, at_least(1, "a sequence needs a token")] = None
    buckets: tuple[int, ...] = ()
    packing: Annotated[bool, PLAN] = False
    max_images: int | None = None
    shuffle: bool = True
    group_by_modality_length: bool = False
    max_skipped: Annotated[float, OBSERVED, at_least(0, "it is a share of the samples")] = 0.01
    workers: Annotated[int, MACHINE, at_least(0, "0 decodes in the main process")] = 4
    eval_path: Annotated[str | None, LOCATION] = None
    eval_samples: Annotated[
        int | None, OBSERVED, at_least(1, "to skip evaluation, leave data.eval_path out")
    ] = None


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Batch sizes, and how the loss of a batch is averaged.

    Attributes:
        global_size: Number of samples in an optimizer step, over all devices.
        micro_size: Number of samples in a forward pass on each device. None lets the plan "auto"
            choose; with the plan "manual" it means all samples of a step.
        loss_weighting: "token" gives each supervised token of a step the same weight.
            "sample_mean" averages over the tokens of each group of consecutive samples, and then
            over the groups. LLaVA's published runs do so; a group is the micro-batch of one GPU.
        loss_group: Number of samples in a group of batch.loss_weighting "sample_mean".
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
        projector_learning_rate: Peak learning rate of the projector; None takes `learning_rate`.
        vision_learning_rate: Peak learning rate of the vision tower and its adapters; None
            takes `learning_rate`.
        schedule: How the learning rate falls to 0 after the warmup; "constant" keeps the peak.
        warmup_ratio: Fraction of the steps in which the learning rate rises from 0 to its peak.
        weight_decay: Weight decay of AdamW; it is not applied to biases and norm weights.
        b1: Decay rate of AdamW's first moment.
        b2: Decay rate of AdamW's second moment.
        eps: Number that AdamW adds to the denominator of an update.
        clip_norm: Maximum global norm of the gradients; None turns clipping off.
    """

    learning_rate: Annotated[float, at_least(0, "a negative rate would increase the loss")] = 2e-4
    projector_learning_rate: Annotated[
        float | None, at_least(0, "a negative rate would increase the loss")
    ] = None
    vision_learning_rate: Annotated[
        float | None, at_least(0, "a negative rate would increase the loss")
    ] = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, at_least(0, "it is a share of the steps")] = 0.03
    weight_decay: Annotated[float, at_least(0, "a negative value would let weights grow")] = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The plan: where arrays are kept and what is recomputed. It never changes a result.

    Attributes:
        plan: "auto" finds the fastest plan that fits the devices before anything is loaded;
            "manual" uses the other memory fields as they are.
        limit_gib: Memory of one device in GiB, for the plan "auto"; None asks the device.
        remat: What the forward pass keeps for the backward pass, which recomputes the rest.
            "full" keeps only the input of each block, "dots" also the outputs of linear layers, and
            "none" keeps everything except norms and gated products.
        offload_optimizer: Keep the optimizer's moments in host memory, and with remat "full" also
            the float32 weights of fully trained blocks. One layer at a time is on the device.
        stream_weights: Keep the weights of the blocks, and the gradients of trained blocks, in host
            memory. One layer at a time is on the device. Needs remat "full".
        offload_activations: Keep the inputs of the blocks in host memory from the forward pass to
            the backward pass. Needs remat "full".
    """

    plan: Literal["auto", "manual"] = "manual"
    limit_gib: Annotated[float | None, IGNORED_BY_PLAN] = None
    remat: Remat = "full"
    offload_optimizer: bool = False
    stream_weights: bool = False
    offload_activations: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    Attributes:
        data: Number of copies of the model, each on one device or one group of devices. Samples are
            divided among the copies. -1 takes all devices that the other axes leave.
        fsdp: Number of devices that each parameter and the samples are divided among, as in
            ZeRO-3. -1 takes all devices that the other axes leave.
        tensor: Number of devices that share the attention heads and the feed-forward width of each
            layer. -1 takes all devices that the other axes leave.
        show: Print how each parameter is sharded.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    show: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how to resume.

    Attributes:
        every: Number of optimizer steps between checkpoints.
        keep: Number of checkpoints to keep; older ones are deleted.
        accept_changes: Resume a run even if its recipe or its data has changed since the run began.
            The changes are shown and recorded. The number of training records cannot change.
    """

    every: Annotated[int, at_least(1, "it is a number of steps")] = 500
    keep: Annotated[int, at_least(1, "a run resumes from the newest one")] = 2
    accept_changes: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
        every: Number of steps between evaluations; None evaluates before and after the run only.
        batch_size: Number of samples in an evaluation batch, over all devices; None takes as many
            as a micro-batch has.
        examples: Number of evaluation questions to show with the model's answers, in report.html
            and at the end of the run.
    """

    every: Annotated[int | None, at_least(1, "it is a number of steps")] = None
    batch_size: Annotated[int | None, at_least(1, "a batch needs a sample")] = None
    examples: int = 12


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where a run is logged, in addition to the files in its directory.

    Attributes:
        tensorboard: Write TensorBoard events to `{run directory}/tensorboard`.
        wandb: Project at Weights & Biases to log to; None logs nothing there. Environment variables
            set everything else, for example WANDB_MODE=offline.
        profile_steps: First and last step to profile, into `{run directory}/profile`.
    """

    tensorboard: bool = False
    wandb: str | None = None
    profile_steps: Annotated[
        tuple[int, int] | None,
        Bound(
            lambda steps: 1 <= steps[0] <= steps[1],
            "a first step of 1 or more, and a last step that does not come before it",
            "steps are counted from 1",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    r"""The config of one training run.

    Attributes:
        name: Name of the run; its directory is `{output_dir}/{name}`. At most 200 bytes,
            without / or \. It must not start with a dot, dash or space, nor end with a space.
        output_dir: Directory that contains the run's directory. The run writes nothing elsewhere.
        seed: Seed for new parameters, for dropout and for the order of the data.
        steps: Number of optimizer steps; None computes it from `epochs`.
        epochs: Number of passes through the training data; not used if `steps` is set.
        init_from: Source of the weights: a Hugging Face directory or hub id, the directory of an
            earlier run, or separate parts. None initializes new weights for the sizes in `model`.
        init_adapter: Directory of a PEFT adapter to continue training from.
        model: Sizes of a model that is trained from scratch. If `init_from` is a checkpoint that
            does not exist yet, these sizes are used to plan the run.
        processor: Directory with the tokenizer and the image processor; None takes those that
            belong to `init_from`.
        tune: Which parts of the model are trained, and how.
        lora: LoRA adapters of the decoder.
        vision_lora: LoRA adapters of the vision tower.
        data: Training data and evaluation data.
        batch: Batch sizes and the weights of tokens in the loss.
        optimizer: AdamW and its learning rates.
        memory: The plan: where arrays are kept and what is recomputed. It never changes a result.
        mesh: Number of devices along each axis of the mesh.
        dtype: Dtype of the computation and of frozen weights. Trained weights, their moments,
            norms, softmax and the loss are float32.
        nonfinite_limit: Number of consecutive steps with an infinite or NaN loss or gradient after
            which the run stops. The updates of such steps are not applied.
        quantize: Format of the decoder's frozen linear layers, as in bitsandbytes: "nf4" (4.5 bits
            per weight), "nf4_double" (with double quantization, 4.13 bits) or "int8". Quantization
            changes results.
        checkpoint: When to save a checkpoint, and how to resume.
        eval: Evaluation during training.
        log: Where the run is logged, in addition to the files in its directory.
    """

    name: Annotated[str, OBSERVED]
    output_dir: Annotated[str, LOCATION] = "runs"
    seed: Annotated[int, IGNORED_BY_PLAN] = 42
    steps: Annotated[
        int | None, IGNORED_BY_PLAN, at_least(1, "a run trains for at least one step")
    ] = None
    epochs: Annotated[float, RESOLVED, at_least(0, "it is a number of passes")] = 1.0
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
        """Directory of the run."""
        return Path(self.output_dir) / self.name

    def total_steps(self, samples: int) -> int:
        """Returns the number of optimizer steps if the training data has this many samples."""
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * samples / self.batch.global_size)


MAY_CHANGE = field_paths(TrainConfig, lambda field: field.role.may_change)
"""Names of the fields that may change when a run resumes, as they do not decide what is learned."""

MAY_DIFFER = field_paths(TrainConfig, lambda field: field.role.may_differ)
"""Names of the fields whose values may differ between the processes of a run."""

IGNORED_BY_PLANS = field_paths(TrainConfig, lambda field: field.is_ignored_by_plan)
"""Names of the fields that do not affect how much memory a train step needs."""


def _check_name(name: str) -> None:
    """Raises ConfigError if `name` is no name of a directory or looks like a path or an option."""
    shown = f"--name {name!a:.80}"
    if not name:
        raise ConfigError("--name is empty; give one, for example --name my_run")
    if slash := next((sign for sign in name if sign in "/\\"), None):
        raise ConfigError(
            f'{shown} contains "{slash}". A name may not contain / or \\; use --output-dir to '
            "choose the folder"
        )
    if not name.isprintable():  # this is also true of a lone surrogate
        raise ConfigError(f"{shown} contains a character that cannot be printed; leave it out")
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
