"""What a run is: frozen dataclasses. A config file is Python that builds one and calls it `config`.

A run is a *recipe* (what is learned) and a *plan* (how it fits). `memory`, `mesh`,
`batch.micro_size` and `data.packing` are the plan; they never change a number of the recipe.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from beartype import BeartypeConf
from beartype.door import is_bearable

from llava_jax.config.model import LLM_LINEARS, VISION_LINEARS, ModelConfig
from llava_jax.config.source import Source
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
    """What trains: nothing, LoRA adapters, or every weight, for each part."""

    llm: Tuning = "lora"
    vision: Tuning = "frozen"
    projector: Literal["frozen", "full"] = "full"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA as PEFT means it: y = W x + (alpha / rank) B A dropout(x)."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
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
    weight: float = 1.0

    def __post_init__(self):
        for name in ("path", "image_root"):
            _check_text(getattr(self, name), f"data.mixture: {name}")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"data.mixture: {self.path} has weight {self.weight}; it must be > 0")


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

    path: str = ""
    image_root: str = ""
    mixture: tyro.conf.Suppress[tuple[DataSet, ...]] = ()
    follow_links: bool = False
    template: str = "vicuna_v1"
    image_aspect: Aspect = "pad"
    image_decode: Decode = "exact"
    max_length: int = 2048
    max_text_length: int | None = None
    buckets: tuple[int, ...] = ()
    packing: bool = False
    max_images: int | None = None
    shuffle: bool = True
    group_by_modality_length: bool = False
    max_skipped: float = 0.01
    workers: int = 4
    eval_path: str | None = None
    eval_samples: int | None = None


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

    global_size: int = 128
    micro_size: int | None = None
    loss_weighting: Literal["token", "sample_mean"] = "token"
    loss_group: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Projector and vision tower (its adapters too) may have learning rates of their own."""

    learning_rate: float = 2e-4
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
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
    limit_gib: float | None = None
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

    every: int = 500
    keep: int = 2
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

    every: int | None = None
    batch_size: int | None = None
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
    profile_steps: tuple[int, int] | None = None


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

    name: str
    output_dir: str = "runs"
    seed: int = 42
    steps: int | None = None
    epochs: float = 1.0
    init_from: Source = None
    init_adapter: str | None = None
    model: ModelConfig | None = None
    processor: str | None = None
    tune: TuneConfig = TuneConfig()
    lora: LoraConfig = LoraConfig()
    vision_lora: LoraConfig = LoraConfig(rank=64, alpha=16.0, targets=VISION_LINEARS)
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    mesh: MeshConfig = MeshConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nonfinite_limit: int = 3
    quantize: Quantisation | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        _check(self, "")
        _check_name(self.name)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of a run over so many samples; the last batch may wrap round."""
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * samples / self.batch.global_size)


_AT_LEAST_ONE = (
    *("steps", "lora.rank", "vision_lora.rank", "data.max_length", "batch.global_size"),
    "data.max_text_length",
    *("batch.micro_size", "batch.loss_group", "checkpoint.every", "checkpoint.keep"),
    *("eval.every", "eval.batch_size", "data.eval_samples", "nonfinite_limit"),
)
_AT_LEAST_ZERO = (
    *(
        "data.workers",
        "data.max_skipped",
        "epochs",
        "optimizer.learning_rate",
        "optimizer.projector_learning_rate",
    ),
    *("optimizer.vision_learning_rate", "optimizer.weight_decay", "optimizer.warmup_ratio"),
)


def _check(config: Any, prefix: str) -> None:
    """Holds every field, those of nested dataclasses too, against its annotation.

    Raises:
        ConfigError: One has a value that its type or meaning does not allow.
    """
    for name, kind in get_type_hints(type(config)).items():
        path, value = prefix + name, getattr(config, name)
        _check_text(value, path)
        if not is_bearable(value, kind, conf=BeartypeConf(is_pep484_tower=True)):
            raise ConfigError(f"{path} = {value!r}: it must be {_allowed(kind)}")
        for least, paths in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
            if path in paths and value is not None and value < least:
                raise ConfigError(f"{path} = {value!r}: it must be at least {least}")
        if isinstance(value, LoraConfig) and not 0 <= value.dropout < 1:
            raise ConfigError(f"{path}.dropout = {value.dropout}: it must be 0 or more, below 1")
        if name == "profile_steps" and isinstance(value, tuple) and not 1 <= value[0] <= value[1]:
            raise ConfigError(
                f"{path} = {value}: it must be a first step, 1 or more, and a last, not before it"
            )
        if dataclasses.is_dataclass(value):
            _check(value, f"{path}.")


def _check_text(text: Any, path: str) -> None:
    """Refuses text that no path, no file and no tokenizer can take.

    Raises:
        ConfigError: It has half of a character, as names of files may that are not UTF-8, or a NUL.
    """
    if not isinstance(text, str):
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = ascii(error.object[error.start])
        raise ConfigError(f"{path} = {text!a}: {bad} is not a whole character") from None
    if "\0" in text:
        raise ConfigError(f"{path} = {text!a}: it has a NUL character")


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


def _allowed(kind: Any) -> str:
    """An annotation, in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The whole config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
