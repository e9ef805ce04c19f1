"""Measures the memory that published recipes need, for the rows of `llava-jax plan --table`."""

import dataclasses
import functools
import math

from llava_jax.config import TrainConfig, parse_config
from llava_jax.distributed.environment import GIB
from llava_jax.planning import compile as compiling
from llava_jax.planning import search
from llava_jax.planning.devices import GPUS, Gpu
from llava_jax.planning.forecast import Forecast, forecast
from llava_jax.planning.measure import usage_of
from llava_jax.planning.model_sizes import sizes
from llava_jax.planning.usage import Usage


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe with a plan, and the largest allowed memory of the compiled run.

    Attributes:
        run: Description of the recipe and the plan.
        config: Name of the recipe's preset.
        device: Name of a device in `planning/devices.py`.
        count: Number of devices.
        micro_size: Number of samples per micro-batch and device.
        plan: Fields of `MemoryConfig` that are True.
        device_gib: Largest allowed device memory, in GiB.
        host_gib: Largest allowed host memory per device, in GiB.
        options: Further command-line options of the recipe or the plan.
    """

    run: str
    config: str
    device: str
    count: int
    micro_size: int
    plan: tuple[str, ...]
    device_gib: float
    host_gib: float
    options: tuple[str, ...] = ()

    @property
    def planned(self) -> TrainConfig:
        """Returns the config of the run, with its plan."""
        config = parse_config(["--config", self.config, *self.options])
        memory = dataclasses.replace(config.memory, **dict.fromkeys(self.plan, True))
        return search.Plan(self.micro_size, memory).apply(config)

    def __str__(self) -> str:
        return f"{self.run}, {self.count} x {self.device}, micro-batch {self.micro_size}"

    def holds(self, usage: Usage) -> bool:
        """Returns True if the measured memory does not exceed the limits of this row."""
        device, host = usage.total / GIB, usage.host_total / GIB
        return device <= self.device_gib and host <= self.host_gib


OPTIMIZER = ("offload_optimizer",)
STREAMED = (*OPTIMIZER, "stream_weights")
ACTIVATIONS = (*STREAMED, "offload_activations")

EIGHT_BIT = ("--optimizer.name", "adamw_8bit")
NARROW = (*EIGHT_BIT, "--optimizer.weight-dtype", "bfloat16", "--optimizer.gradient-dtype",
          "bfloat16")  # fmt: skip
LONG = "--data.max-length"

ROWS = (
    Row("7B LoRA, nothing offloaded", "7b_lora", "rtx3090", 1, 4, (), 22.5, 0.5),
    Row("7B LoRA, streamed", "7b_lora", "rtx3090", 1, 1, STREAMED, 2.2, 18.0),
    Row("7B LoRA, streamed", "7b_lora", "rtx3090", 1, 8, STREAMED, 7.5, 18.0),
    Row("7B LoRA, streamed, 32k tokens", "7b_lora", "rtx3090", 1, 1, ACTIVATIONS, 4.5, 27.0,
        (LONG, "32768")),
    Row("7B LoRA, streamed, 64k tokens", "7b_lora", "rtx3090", 1, 1, ACTIVATIONS, 7.5, 35.0,
        (LONG, "65536")),
    Row("7B LoRA, streamed, 128k tokens", "7b_lora", "rtx3090", 1, 1, ACTIVATIONS, 14.0, 51.0,
        (LONG, "131072")),
    Row("13B LoRA, streamed", "13b_lora", "rtx3090", 1, 1, STREAMED, 3.0, 33.0),
    Row("13B LoRA, streamed", "13b_lora", "rtx3090", 1, 8, STREAMED, 10.5, 33.0),
    Row("7B QLoRA, streamed", "7b_qlora", "rtx3090", 1, 1, STREAMED, 1.7, 6.5),
    Row("7B QLoRA, optimizer on host", "7b_qlora", "rtx3090", 1, 1, OPTIMIZER, 6.5, 2.0),
    Row("13B QLoRA, streamed", "13b_qlora", "rtx3090", 1, 1, STREAMED, 2.4, 11.0),
    Row("13B QLoRA, optimizer on host", "13b_qlora", "rtx3090", 1, 1, OPTIMIZER, 11.0, 3.0),
    Row("13B QLoRA of rank 512 and ViT LoRA", "13b_qlora_xtuner", "rtx3090", 8, 16,
        ACTIVATIONS, 7.0, 16.0, ("--memory.no-stream-adapters",)),
    Row("7B full, nothing offloaded", "7b_full", "rtx3090", 8, 1, (), 15.0, 0.5),
    Row("7B full, optimizer on host", "7b_full", "rtx3090", 8, 8, OPTIMIZER, 11.0, 11.0),
    Row("7B full, streamed", "7b_full_1gpu", "rtx3090", 1, 1, STREAMED, 4.5, 99.5),
    Row("7B full, streamed", "7b_full_1gpu", "rtx3090", 1, 16, STREAMED, 14.0, 99.5),
    Row("7B full, streamed, 8-bit AdamW", "7b_full_1gpu", "rtx3090", 1, 16, STREAMED, 14.0, 62.0,
        EIGHT_BIT),
    Row("7B full, streamed, 8-bit AdamW, bfloat16 weights", "7b_full_1gpu", "rtx3090", 1, 16,
        STREAMED, 14.0, 40.0, NARROW),
    Row("13B full, streamed", "13b_full", "rtx3090", 8, 1, STREAMED, 2.6, 25.0),
    Row("13B full, streamed, 8-bit AdamW", "13b_full", "rtx3090", 1, 8, STREAMED, 14.0, 122.0,
        EIGHT_BIT),
    Row("13B full, streamed, 8-bit AdamW, bfloat16 weights", "13b_full", "rtx3090", 1, 8,
        STREAMED, 12.5, 74.0, NARROW),
    Row("NeXT-7B LoRA, nothing offloaded", "next_7b_task_lora", "rtx3090", 1, 1, (), 22.5, 0.5),
    Row("NeXT-7B LoRA, streamed", "next_7b_task_lora", "rtx3090", 1, 1, STREAMED, 3.0, 18.5),
    Row("NeXT-34B QLoRA, streamed, activations on host", "next_34b_task_qlora", "rtx3090", 1, 1,
        ACTIVATIONS, 4.0, 29.0),
    Row("OneVision-7B LoRA, streamed", "onevision_7b_task_lora", "rtx3090", 1, 1, STREAMED,
        6.0, 21.0),
    Row("OneVision-0.5B full, streamed", "onevision_0_5b_task", "rtx4060", 1, 1, STREAMED, 4.5,
        16.0),
    Row("7B LoRA, optimizer on host", "7b_lora", "v5e", 4, 1, OPTIMIZER, 6.5, 1.0),
    Row("7B LoRA, streamed", "7b_lora", "v5e", 1, 1, STREAMED, 3.0, 18.0),
    Row("7B LoRA, streamed", "7b_lora", "v6e", 1, 1, STREAMED, 3.0, 18.0),
    Row("13B LoRA, weights and vocabulary on host", "13b_lora", "v5e", 1, 1,
        ("stream_weights", "offload_vocabulary"), 8.0, 30.0),
    Row("7B QLoRA, optimizer on host", "7b_qlora", "v5e", 1, 1, OPTIMIZER, 8.5, 2.0),
    Row("7B QLoRA, streamed", "7b_qlora", "v5e", 1, 1, STREAMED, 3.0, 8.0),
    Row("7B full, optimizer on host", "7b_full", "v5e", 8, 1, OPTIMIZER, 8.0, 10.0),
    Row("NeXT-7B LoRA, streamed", "next_7b_task_lora", "v5e", 1, 1, STREAMED, 4.5, 18.5),
    Row("OneVision-7B LoRA, streamed", "onevision_7b_task_lora", "v5e", 1, 1, STREAMED, 7.0,
        24.0),
)  # fmt: skip

FORECAST = ("rtx3090", "rtx4090", "h100")
"""Devices for which the table has forecasts. They use the step that was compiled for the row."""

HEADER = """\
| run | devices | micro-batch | device GiB (at most) | host GiB per device (at most) | FLOPs | \
seconds per step on RTX 3090, RTX 4090, H100 (without overlap) |
|---|---|---|---|---|---|---|"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures of a row.

    Attributes:
        usage: Memory use.
        flops: FLOPs divided by the FLOPs of the plan that offloads nothing; NaN if the FLOPs could
            not be counted.
        forecasts: Forecast for each device in `FORECAST`; empty for TPUs.
    """

    usage: Usage
    flops: float
    forecasts: dict[str, Forecast]


def measure(row: Row) -> Measured:
    """Compiles the train step of a row, and of the same row without offloading."""
    usage, forecasts = _measure(_without_limits(row))
    resident, _ = _measure(_without_limits(dataclasses.replace(row, plan=())))
    ratio = math.nan
    if usage.flops is not None and resident.flops is not None:
        ratio = usage.flops / resident.flops
    return Measured(usage, ratio, forecasts)


def _without_limits(row: Row) -> Row:
    """Returns the row without what does not affect its figures."""
    return dataclasses.replace(row, run="", device_gib=0.0, host_gib=0.0)


@functools.cache
def _measure(row: Row) -> tuple[Usage, dict[str, Forecast]]:
    """Compiles the train step of a row; cached, because rows share some plans."""
    planned = row.planned
    target = compiling.find_device(row.device)
    program, step = compiling.compile_for(planned, sizes(planned), row.device, row.count)
    batch = compiling.largest_batch(program, planned)
    usage = usage_of(program, planned, batch, step, target.memory, target.platform, row.device)
    on_gpu = isinstance(target, Gpu)
    return usage, {name: forecast(step.text, GPUS[name].rates) for name in FORECAST if on_gpu}


def describe(row: Row, measured: Measured) -> str:
    """Returns a line of the Markdown table, marked SHORT if the memory exceeds the limits."""
    usage, flops, forecasts = measured.usage, measured.flops, measured.forecasts.values()
    seconds = ", ".join(f"{x.seconds:.1f}" for x in forecasts)
    serial = ", ".join(f"{x.serial_seconds:.1f}" for x in forecasts)
    cells = (
        row.run,
        f"{row.count} x {row.device}",
        str(row.micro_size),
        f"{usage.total / GIB:.2f} ({row.device_gib})",
        f"{usage.host_total / GIB:.2f} ({row.host_gib})",
        "–" if math.isnan(flops) else f"{flops:.2f} x",
        f"{seconds} ({serial})" if forecasts else "–",
    )
    return f"| {' | '.join(cells)} |" + ("" if row.holds(usage) else " SHORT")
