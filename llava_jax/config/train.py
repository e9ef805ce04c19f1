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
from typing import Annotated, Any, Literal

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
from llava_jax.errors import ConfigError

Tuning = Literal["frozen", "lora", "full"]
Quantisation = Literal["nf4", "nf4_double", "int8"]
Remat = Literal["full", "dots", "none"]
AttentionImplementation = Literal["plain", "cudnn", "flash", "splash"]
Aspect = Literal["pad", "crop", "squash"]
Decode = Literal["exact", "draft"]
Json = dict[str, Any]
"""A JSON object."""


MAX_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What trains: nothing, LoRA adapters, or every weight, for each part."""

    llm: Tuning = "lora"
    vision: Tuning = "frozen"
    projector: Literal["frozen", "full"] = "full"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA as PEFT means it: y = W x + (alpha / rank) B A dropout(x)."""

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
    """One of several data sets that are learned from together.

    Attributes:
        path: As `DataConfig.path`.
        image_root: Folder that its image paths are relative to.
        weight: How often an epoch has each of its records; of 0.5, every epoch has another half.
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
    """What is learned from.

    Attributes:
        path: A data file, a folder of them or a pattern ("data/train-*.parquet"). JSON lists, JSON
            lines and Parquet, of records in LLaVA's form or with "messages"; what a file is, is
            seen from its contents. Or easy-VQA from its PyPI package: "easy_vqa:train[:FORM...]".
            Paths of fsspec (gs://, s3://) are read in place.
        image_root: Folder that the records' image paths are relative to, or such a path.
        mixture: Data sets that are learned from together, in the place of `path` and `image_root`.
        follow_links: Whether images may be, by links in image_root, outside of it.
        template: Name of a template in data/conversation.py.
        image_aspect: What becomes of images that are not square: "pad" to a square of the mean
            colour, "crop" the centre, or "squash" into a square, as SigLIP's processor does.
        image_decode: How training images are decoded: "exact", or "draft": JPEGs at a half, a
            quarter or an eighth of their size where that is about what is needed. Large ones
            are read twice as fast, and pixels differ by 0.5 to 2.5 steps of 1/255 on average.
        max_length: Longest sequence in tokens, images expanded; longer ones are cut.
        max_text_length: Longest sequence in tokens where an image counts as one, which is XTuner's
            limit; longer ones are cut. None leaves it to max_length.
        buckets: Lengths that batches are padded to; empty means max_length alone.
        packing: Put several samples of a step, as many as there is room for, into one row of
            max_length. A sample sees itself alone, so results are those of a row for each; what it
            saves is padding. Takes the place of buckets.
        max_images: Most images in one sample; None counts them in the data.
        group_by_modality_length: Batches of samples with images, or of samples without, as LLaVA's
            option of this name makes them; else any samples are a batch.
        max_skipped: Largest share of the data's samples that may be left out because they cannot
            be learned from; more stop the run.
        workers: Processes that decode; 0 decodes in the main process.
        eval_path: Held-out data, in any form that `path` has, with the same image_root.
        eval_samples: Use only the first so many held-out samples; None uses all.
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
    """How many samples make a step.

    Attributes:
        global_size: Samples per optimizer step, over all devices.
        micro_size: Samples per device and forward pass; None leaves it to the plan.
        loss_weighting: "token" weighs every supervised token of the step alike. "sample_mean" takes
            the token mean over each `loss_group` consecutive samples, then the plain mean of
            those: LLaVA's published form, whose group was one GPU's micro-batch.
        loss_group: Samples in a group of "sample_mean".
    """

    global_size: Annotated[int, at_least(1, "a step needs a sample")] = 128
    micro_size: Annotated[int | None, PLAN, at_least(1, "a forward pass needs a sample")] = None
    loss_weighting: Literal["token", "sample_mean"] = "token"
    loss_group: Annotated[int, at_least(1, "a mean needs a sample")] = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Projector and vision tower (its adapters too) may have learning rates of their own."""

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
    """The plan: where things lie and what is recomputed. Never changes a result.

    Attributes:
        plan: "auto" finds the cheapest plan that fits the devices before anything is loaded;
            "manual" takes the fields as they are.
        limit_gib: Memory of one device, for "auto"; None asks the device.
        remat: What the backward pass computes again: "full" keeps only each block's input, "dots"
            also what its linear layers return, "none" all but norms and gated products.
        offload_optimizer: Keep the optimizer's moments in host memory, and with remat "full" the
            float32 weights of blocks that train in full; a layer at a time is on the device.
        stream_weights: Keep the blocks' weights, and their gradients where they train, in host
            memory; a layer at a time is on the device. Needs remat "full".
        offload_activations: Keep the blocks' inputs in host memory until the backward pass needs
            them. Needs remat "full".
    """

    plan: Literal["auto", "manual"] = "manual"
    limit_gib: Annotated[float | None, IGNORED_BY_PLAN] = None
    remat: Remat = "full"
    offload_optimizer: bool = False
    stream_weights: bool = False
    offload_activations: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 is the rest. `fsdp` shards parameters as ZeRO-3 does.

    Attributes:
        data: Copies of the model; samples are divided among them.
        fsdp: Samples are divided among these devices too, and so is every parameter.
        tensor: Devices that share the heads and feed-forward widths of each layer.
        show: Print where every parameter lies.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    show: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Save every so many optimizer steps, keep the newest few.

    Attributes:
        accept_changes: Go on with a run though its recipe or its data differs from what it began
            with; the differences are shown, and the new ones recorded. The number of training
            records cannot change.
    """

    every: Annotated[int, at_least(1, "a number of steps")] = 500
    keep: Annotated[int, at_least(1, "a run resumes from the newest")] = 2
    accept_changes: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Measuring on held-out data.

    Attributes:
        every: Steps between measurements; None measures before and after the run only.
        batch_size: Held-out samples in a batch, all devices together; None takes a micro-batch.
        examples: Held-out questions to show with their answers: in report.html, and printed at the
            end.
    """

    every: Annotated[int | None, at_least(1, "a number of steps")] = None
    batch_size: Annotated[int | None, at_least(1, "a batch needs a sample")] = None
    examples: int = 12


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where a run can be watched besides its own files. Never changes a result.

    Attributes:
        tensorboard: Write events to `{run directory}/tensorboard`.
        wandb: Project at Weights & Biases; None logs nothing there. The environment says all else,
            such as WANDB_MODE=offline.
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
        output_dir: Nothing is written elsewhere.
        seed: Of new parameters, dropout and the order of the data.
        steps: Optimizer steps; None takes `epochs`.
        epochs: Passes through the data.
        init_from: Where the weights come from: a Hugging Face directory or hub id, an earlier run's
            directory, or `Parts`. None makes new ones, for `model`.
        init_adapter: A PEFT adapter directory to continue from.
        model: Sizes of a model trained from scratch; with `init_from`, they stand in for those of
            a checkpoint that is not there yet, so that a run can be planned.
        processor: Directory with the tokenizer and image processor; None takes `init_from`'s.
        tune: What trains.
        lora: Adapters of the decoder.
        vision_lora: Adapters of the vision tower.
        dtype: What is computed in, and what frozen weights are kept in. What trains, its moments,
            norms, softmax and the loss are float32.
        nonfinite_limit: Steps in a row whose loss or gradients may be infinite or no number; then
            the run stops. No such step's update is applied.
        quantize: Bits of the decoder's frozen linears, as bitsandbytes has them: "nf4" (4.5 bits a
            weight), "nf4_double" (its double quantisation, 4.13 bits) or "int8". Part of the
            recipe: it changes results.
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
        return Path(self.output_dir) / self.name

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of a run over so many samples; the last batch may wrap round."""
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
