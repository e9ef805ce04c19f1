"""Measures both sides of `llava-jax benchmark`, in processes of their own that take turns."""

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
from llava_jax.planning.devices import bfloat16_tflops
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.peft import save_adapter
from llava_jax.speed.case import ADAPTER, BASE, Case
from llava_jax.speed.random_checkpoint import write_checkpoint
from llava_jax.train_step.program import build_program


@dataclasses.dataclass
class Row:
    """The measurements of one side, for every step after the warm-up.

    Attributes:
        name: "ours", or the name of the peer.
        device: The name of the device.
        compile_seconds: Seconds for compiling; None if nothing is compiled.
        seconds: Seconds of each step.
        cpu_seconds: CPU seconds of the mean step of each turn, for all threads together.
        waits: Seconds of each step until its input was on the device.
        losses: Loss of each step.
        host_peak: Largest number of bytes that the process had.
        device_peak: The same for the memory of the device; None if that is the memory of the host.
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
        """Adds the measurements of a turn."""
        for name in ("seconds", "waits", "losses", "cpu_seconds"):
            getattr(self, name).extend(found[name])
        self.host_peak, self.device_peak = found["host_peak"], found["device_peak"]


def measure(
    case: Case, names: list[str], directory: Path, warmup: int, rounds: int, steps: int
) -> list[Row]:
    """Lets the sides take turns, and returns what was measured of each.

    Args:
        case: The run.
        names: The names of the sides.
        directory: An empty directory, for the weights from which both sides start.
        warmup: Number of steps before the first turn. Only their losses are kept.
        rounds: Number of turns of each side.
        steps: Number of steps of a turn.
    """
    jax.config.update(
        "jax_platforms", "cpu"
    )  # otherwise this process would take memory of the GPU too
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
    """The process of a side."""

    def __init__(self, name: str, directory: Path):
        command = [sys.executable, "-m", "llava_jax.speed.side", name, directory]
        # Without this, the first side would take most of the memory of a GPU at its start.
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.__exit__(None, None, None)  # closes the pipes, and waits

    def ready(self) -> dict[str, Any]:
        """Waits for a line of the process and returns it; the first says that the side is ready."""
        line = cast("IO[str]", self._process.stdout).readline()
        if not line:
            raise SystemExit("a side of the benchmark ended, see above")
        return json.loads(line)

    def take(self, steps: int) -> dict[str, Any]:
        """Makes a number of steps, and returns their measurements."""
        print(steps, file=self._process.stdin, flush=True)
        return self.ready()


def write_start(case: Case, directory: Path, *, with_adapter: bool) -> None:
    """Writes the weights from which both sides start, in the forms of Hugging Face and PEFT."""
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
    head += f"{case.samples} samples of {case.tokens} tokens, {case.learned} of them learned, "
    head += f"micro-batch {config.batch.micro_size or case.samples}"
    lines = [HEADER, ["---"] * len(HEADER), *(cells(case, row) for row in rows)]
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines)])


def cells(case: Case, row: Row) -> list[str]:
    """Returns the cells of a line of the table."""
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
    """Compares ours with the peer: above 1 is better for speed, below 1 for memory."""
    ours, theirs = rows
    ratio = lambda kind: np.median(getattr(theirs, kind)) / np.median(getattr(ours, kind))
    return {
        "tokens/s, ours / theirs": ratio("seconds"),
        "the same by CPU seconds": ratio("cpu_seconds"),
        "host peak, ours / theirs": ours.host_peak / theirs.host_peak,
        "losses apart": float(np.max(np.abs(np.divide(ours.losses, theirs.losses) - 1))),
    }
