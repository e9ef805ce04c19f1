"""Measures the two sides of `llava-jax benchmark`, in processes that take turns."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

import jax
import numpy as np

from llava_jax.config import MeshConfig
from llava_jax.distributed.environment import GIB
from llava_jax.distributed.sharding import make_mesh
from llava_jax.jax_compat import PREALLOCATE
from llava_jax.planning.devices import bfloat16_tflops
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.peft import save_adapter
from llava_jax.speed.case import ADAPTER, BASE, Case
from llava_jax.speed.random_checkpoint import write_checkpoint
from llava_jax.train_step.program import build_program

LOSS_DIFFERENCE = "largest relative difference of the losses"
"""Key of this value in the result of `compare`."""


@dataclasses.dataclass
class Row:
    """Measurements of one side.

    The times do not include the warm-up steps; the losses and the peaks include them.

    Attributes:
        name: Name of the side: "ours" or the name of the peer.
        device: Name of the device.
        compile_seconds: Compilation time in seconds; None if nothing is compiled.
        seconds: Time of each step in seconds.
        cpu_seconds: Mean CPU time of a step in seconds, summed over all threads, for each turn.
        waits: Seconds that each step waited until its batch was on the device.
        losses: Loss of each step, including the warm-up steps.
        host_peak: Peak memory of the process in bytes.
        device_peak: Peak memory of the device in bytes; None if the device uses host memory.
    """

    name: str
    device: str
    compile_seconds: float | None
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    waits: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    host_peak: int = 0
    device_peak: int | None = None

    def add(self, found: dict[str, Any]) -> None:
        """Adds the measurements of one turn, as returned by `side.take_turn`."""
        for name in ("seconds", "waits", "losses", "cpu_seconds"):
            getattr(self, name).extend(found[name])
        self.host_peak, self.device_peak = found["host_peak"], found["device_peak"]


def measure(
    case: Case, names: list[str], directory: Path, warmup: int, rounds: int, steps: int
) -> list[Row]:
    """Runs the sides in turns, and returns the measurements of each side.

    Args:
        case: Run that the sides execute.
        names: Names of the sides.
        directory: Empty directory, to which the initial weights of both sides are written.
        warmup: Number of steps before the first turn; only the losses of these steps are kept.
        rounds: Number of turns of each side.
        steps: Number of steps per turn.

    Raises:
        SystemExit: The process of a side has ended.
    """
    # Without this setting, this process would also reserve memory of the GPU.
    jax.config.update("jax_platforms", "cpu")
    write_start(case, directory, with_adapter=len(names) > 1)
    with ExitStack() as stack:
        sides = [stack.enter_context(Turns(name, directory)) for name in names]
        rows = [Row(name, **side.ready()) for name, side in zip(names, sides, strict=True)]
        for row, side in zip(rows, sides, strict=True):
            row.losses += side.take(warmup)["losses"]
        for _ in range(rounds):
            for row, side in zip(rows, sides, strict=True):
                row.add(side.take(steps))
    return rows


class Turns:
    """Process that runs one side. It is killed when the context ends."""

    def __init__(self, name: str, directory: Path):
        command = [sys.executable, "-m", "llava_jax.speed.side", name, directory]
        # Without this variable, the first side would reserve most of the memory of a GPU.
        env = {PREALLOCATE: "false", **os.environ}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.__exit__(None, None, None)  # closes the pipes and waits

    def ready(self) -> dict[str, Any]:
        """Waits for the next line of the process and returns its JSON.

        The first line means that the side is ready.

        Raises:
            SystemExit: The process has ended.
        """
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            raise SystemExit("a process of the benchmark has ended; its error is printed above")
        return json.loads(line)

    def take(self, steps: int) -> dict[str, Any]:
        """Lets the process run a number of steps, and returns their measurements."""
        print(steps, file=self._process.stdin, flush=True)
        return self.ready()


def write_start(case: Case, directory: Path, *, with_adapter: bool) -> None:
    """Writes the case, and the initial weights of both sides in Hugging Face's and PEFT's formats.

    Args:
        case: Run that the sides execute.
        directory: Directory to write to.
        with_adapter: Whether to write an adapter too, if the decoder is trained with LoRA.
    """
    case.save(directory)
    write_checkpoint(directory / BASE, case.model)
    if not with_adapter or case.config.tune.llm != "lora":
        return
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plain = dataclasses.replace(case.config, quantize=None)
    program = build_program(plain, case.model, 1, mesh)
    params = load_weights(
        directory / BASE,
        case.model,
        program.abstract,
        seed=case.config.seed,
        wanted=program.trainable,
    )
    path, adapters = directory / ADAPTER, program.adapters
    save_adapter(path, params, adapters, case.model, base_name=None, fingerprint=None)


HEADER = (
    "side", "step s (p10-p90)", "samples/s", "tokens/s", "TFLOP/s", "MFU",
    "device GiB", "host GiB", "compile s", "input ms",
)  # fmt: skip


def table(case: Case, rows: list[Row]) -> str:
    """Returns the measurements as a Markdown table."""
    config = case.config
    head = f"{config.tune.llm}, {config.dtype}, remat {config.memory.remat}, on {rows[0].device}: "
    head += f"{case.samples} samples of {case.tokens} tokens, {case.learned} of them with a loss, "
    head += f"micro-batch {config.batch.micro_size or case.samples}"
    lines = [HEADER, ["---"] * len(HEADER), *(cells(case, row) for row in rows)]
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines)])


def cells(case: Case, row: Row) -> list[str]:
    """Returns the cells of one row of the table."""
    least, median, most = np.percentile(row.seconds, [10, 50, 90])
    rate = case.model_flops / median / 1e12
    peak = bfloat16_tflops(row.device) if case.config.dtype == "bfloat16" else None
    gib = lambda size: "-" if size is None else f"{size / GIB:.2f}"
    return [
        row.name,
        f"{median:.3f} ({least:.3f}-{most:.3f})",
        f"{case.samples / median:.3g}",
        f"{case.samples * case.tokens / median:.0f}",
        f"{rate:.3g}",
        "-" if peak is None else f"{rate / peak:.1%}",
        gib(row.device_peak),
        gib(row.host_peak),
        "-" if row.compile_seconds is None else f"{row.compile_seconds:.1f}",
        f"{1000 * statistics.median(row.waits):.1f}",
    ]


def compare(rows: list[Row]) -> dict[str, float]:
    """Compares this package with the peer.

    Args:
        rows: Measurements of this package and of the peer, in this order.

    Returns:
        Dict with two ratios of speed, the ratio of memory, and the largest relative difference of
        the losses. This package is better if a ratio of speed is above 1, or the ratio of memory is
        below 1.
    """
    ours, theirs = rows
    ratio = lambda kind: np.median(getattr(theirs, kind)) / np.median(getattr(ours, kind))
    return {
        "tokens/s, ours / theirs": ratio("seconds"),
        "the same by CPU seconds": ratio("cpu_seconds"),
        "host peak, ours / theirs": ours.host_peak / theirs.host_peak,
        LOSS_DIFFERENCE: float(np.max(np.abs(np.divide(ours.losses, theirs.losses) - 1))),
    }
