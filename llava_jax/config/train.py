"""What a run is: frozen dataclasses. A config file is Python that builds one and calls it `config`.

A run is a *recipe* (what is learned) and a *plan* (how it fits). `memory`, `mesh`,
`batch.micro_size` and `data.packing` are the plan; they never change a number of the recipe.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from beartype import BeartypeConf
from beartype.door import is_bearable

Tuning = Literal["frozen", "lora", "full"]
Quantisation = Literal["nf4", "nf4_double", "int8"]
Remat = Literal["full", "dots", "none"]
AttentionKind = Literal["plain", "cudnn", "flash", "splash"]
Aspect = Literal["pad", "crop", "squash"]
Decode = Literal["exact", "draft"]

LLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


MAX_NAME_BYTES = 200


class ConfigError(Exception):
    """A mistake in a config file or on the command line; its text says where and what to do."""


class RunError(Exception):
    """A run cannot go on; its text says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, CLIP's or SigLIP's. Field names are those of Hugging Face's configs.

    Attributes:
        vision_use_head: Whether SigLIP's pooling head is there. It is kept, but never computed.
    """

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: Literal["clip_vision_model", "siglip_vision_model"] = "clip_vision_model"
    vision_use_head: bool = False

    @property
    def has_class_token(self) -> bool:
        return self.model_type == "clip_vision_model"

    @property
    def num_patches(self) -> int:
        """Patches of an image; what is left at its right and its bottom belongs to none."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Patches, and the class token."""
        return self.num_patches + self.has_class_token


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling. Field names are those of Hugging Face's `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlmConfig:
    """A LLaMA, Mistral or Qwen2 decoder. Field names are those of Hugging Face's configs.

    Attributes:
        sliding_window: Mistral's tokens see so many tokens, themselves included. Longer sequences
            are not computed. None is no limit.
    """

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    model_type: Literal["llama", "mistral", "qwen2"] = "llama"
    sliding_window: int | None = None

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LLaVA: vision tower, two-layer projector, decoder."""

    vision: VisionConfig = VisionConfig()
    llm: LlmConfig = LlmConfig()
    image_token_id: int = 32000
    pad_token_id: int = 32001
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_hidden_act: str = "gelu"

    @property
    def used_vision_layers(self) -> int:
        """Vision blocks before the feature, which is hidden_states[vision_feature_layer].

        Raises:
            ConfigError: The tower has no such hidden state.
        """
        layer, depth = self.vision_feature_layer, self.vision.num_hidden_layers
        used = layer if layer >= 0 else depth + 1 + layer
        if not 0 < used <= depth:
            raise ConfigError(f"vision_feature_layer {layer} of a vision tower with {depth} layers")
        return used

    @property
    def image_tokens(self) -> int:
        """Tokens one image takes in the sequence.

        "default" drops the first position, as Hugging Face does: CLIP's class token, but SigLIP's
        first patch.
        """
        return self.vision.num_positions - (self.vision_feature_select_strategy == "default")


LLAVA_7B = ModelConfig()
LLAVA_13B = ModelConfig(
    llm=LlmConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
)

# The decoder of Llama-3-8B, its vocabulary grown by the image token and a padding token.
LLAVA_LLAMA3_8B = ModelConfig(
    llm=LlmConfig(
        vocab_size=128_320,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
    image_token_id=128_256,
    pad_token_id=128_257,
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the separate parts of a LLaVA lie: a decoder, a vision tower, perhaps a projector."""

    llm: str
    vision: str
    projector: str | None = None


def parse_source(text: str) -> str | Parts | None:
    """A source as text: a path, a hub id, `None`, or `llm=DIR,vision=DIR[,projector=FILE]`.

    Raises:
        ConfigError: It begins as parts, and is something else.
    """
    if text == "None":
        return None
    if not text.startswith("llm="):
        return text
    given = {}
    for part in text.split(","):
        name, _, place = part.strip().partition("=")
        given[name] = place
    names = [field.name for field in dataclasses.fields(Parts)]
    unknown = [name for name in given if name not in names]
    if unknown or not given.keys() >= {"llm", "vision"}:
        what = f"unknown part {unknown[0]!r}" if unknown else "llm and vision are needed"
        raise ConfigError(f"{text!r}: {what}; the form is llm=DIR,vision=DIR[,projector=FILE]")
    return Parts(**given)


def format_source(source: str | Path | Parts | None) -> str:
    """The inverse of `parse_source`."""
    if not isinstance(source, Parts):
        return str(source)
    parts = dataclasses.asdict(source).items()
    return ",".join(f"{name}={value}" for name, value in parts if value)


def absolute_source(source: str) -> str:
    """A source as text with its local paths made absolute, and its hub ids kept."""
    parts = parse_source(source)
    if isinstance(parts, Parts):
        places = {name: place and absolute_source(place) for name, place in vars(parts).items()}
        return format_source(Parts(**places))
    return str(Path(source).absolute()) if Path(source).exists() else source


Source = Annotated[
    str | Parts | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|DIR|HUB-ID|llm=DIR,vision=DIR[,projector=FILE]",
        instance_from_str=lambda words: parse_source(words[0]),
        is_instance=lambda value: value is None or isinstance(value, str | Parts),
        str_from_instance=lambda source: [format_source(source)],
    ),
]
"""Where weights come from."""


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


def load_config(path: str | Path) -> TrainConfig:
    """Runs a config file and returns its `config`. The file is code: it can do what Python can.

    Raises:
        ConfigError: There is no such file, it has no `config`, or a field does not exist.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except TypeError as error:
        raise ConfigError(f"{path}: {_suggest_field(str(error))}") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path}: must set `config` to a llava_jax.config.TrainConfig")
    return config


def _suggest_field(message: str) -> str:
    """Adds the nearest field's name to Python's message about an unknown one."""
    found = re.search(
        r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", message
    )
    if not found:
        return message
    classes = [c for c in globals().values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    meant = [c for c in classes if c.__name__ == found[1]] or classes
    fields = {field.name: c.__name__ for c in meant for field in dataclasses.fields(c)}
    near = difflib.get_close_matches(found[2], fields, n=1, cutoff=0.0)[0]
    return f"no field '{found[2]}'; did you mean '{near}' of {fields[near]}?"


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """Reads `--config FILE` and any field's override, e.g. `--optimizer.learning-rate 1e-4`.

    Raises:
        ConfigError: The file is missing or wrong.
        SystemExit: The command line is wrong (2), or asked for help (0).
    """
    first = argparse.ArgumentParser(
        prog="python -m llava_jax.train",
        description="Trains a LLaVA. With a config, --help lists every field and its value there.",
        add_help=False,
    )
    first.add_argument("--config", metavar="FILE", help="for example configs/7b_lora.py")
    found, rest = first.parse_known_args(argv)
    if found.config is None:
        first.print_help()
        raise SystemExit(0 if {"-h", "--help"} & set(rest) else 2)
    return tyro.cli(
        TrainConfig,
        default=load_config(found.config),
        args=rest,
        prog=f"python -m llava_jax.train --config {found.config}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The whole config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
