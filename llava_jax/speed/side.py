"""Runs one side of `llava-jax benchmark`: `python -m llava_jax.speed.side ours|hf DIR`.

A side is this package ("ours") or the peer ("hf"). When the process is ready, it writes one line of
JSON to stdout. Then it reads lines from stdin; each line contains a number of steps. For each line,
the process runs these steps and writes one line of JSON with the measurements.
"""

import itertools
import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llava_jax.distributed.environment import prepare_for_training
from llava_jax.speed.case import BASE, Case, load_case


@runtime_checkable
class Side(Protocol):
    """A model that is trained as one side of the benchmark.

    Attributes:
        ahead: Largest number of steps that may be unfinished when a new step starts; 0 if the
            model runs on the CPU.
        compile_seconds: Compilation time in seconds; None if nothing is compiled.
        name: Name of the device.
    """

    ahead: int
    compile_seconds: float | None
    name: str

    def place(self, batch: dict[str, Any]) -> Any:
        """Puts a batch on the device."""
        ...

    def step(self, batch: Any) -> Callable[[], float]:
        """Starts a step on a placed batch; returns a function that waits for the loss."""
        ...

    def device_peak(self) -> int | None:
        """Returns the peak of the device memory in bytes; None if the device uses host memory."""
        ...


class Ours:
    """The side that trains with llava_jax."""

    def __init__(self, case: Case, directory: Path):
        import jax

        from llava_jax.config import MeshConfig
        from llava_jax.data.batch import Batch
        from llava_jax.distributed.sharding import make_mesh
        from llava_jax.planning.compile import attention_here
        from llava_jax.pretrained.model import load_weights
        from llava_jax.train_step.program import build_program
        from llava_jax.train_step.step import init_state

        self.device = jax.devices()[0]
        self.name = self.device.device_kind
        self.ahead = int(self.device.platform != "cpu")
        self.batch_type = Batch
        implementation = attention_here(case.config, case.model)
        mesh = make_mesh(MeshConfig(), [self.device])
        self.program = build_program(
            case.config, case.model, 1, mesh, implementation=implementation
        )
        seed = case.config.seed
        params = load_weights(directory / BASE, case.model, self.program.abstract, seed=seed)
        trainable = {path: params.pop(path) for path in self.program.trainable}
        self.frozen = params
        self.state = init_state(self.program.state, trainable, seed)
        start = time.perf_counter()
        abstract = self.program.abstract_batch(case.samples, case.tokens, 1)
        self.compiled = self.program.trace_train_step(abstract).lower().compile()
        self.compile_seconds: float | None = time.perf_counter() - start

    def place(self, batch: dict[str, Any]) -> Any:
        return self.program.device_put(self.batch_type(**batch))

    def step(self, batch: Any) -> Callable[[], float]:
        self.state, metrics = self.compiled(self.state, self.frozen, batch)
        return metrics["loss"].item

    def device_peak(self) -> int | None:
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")


def take_turn(side: Side, case: Case, first: int, steps: int) -> dict[str, Any]:
    """Runs training steps and returns their measurements.

    Args:
        side: Side that is measured.
        case: Run that the side executes.
        first: Number of the first step, which selects the batch.
        steps: Number of steps.

    Returns:
        Dict with the seconds of each step, the seconds until the batch of each step was placed, the
        loss of each step, the mean CPU seconds of a step as a list of one value, and the peaks of
        host and device memory in bytes.

    Raises:
        ArithmeticError: A loss is not finite.
    """
    batches = [case.batch(step) for step in range(first, first + steps)]
    waits, ends, losses = [], [time.perf_counter()], []
    pending: deque[Callable[[], float]] = deque()

    def finish() -> None:
        losses.append(pending.popleft()())
        ends.append(time.perf_counter())

    cpu = time.process_time()
    for batch in batches:
        start = time.perf_counter()
        placed = side.place(batch)
        waits.append(time.perf_counter() - start)
        pending.append(side.step(placed))
        if len(pending) > side.ahead:
            finish()
    while pending:
        finish()
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"some losses are not finite: {losses}")
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **{"seconds": seconds, "waits": waits, "losses": losses},
        "cpu_seconds": [(time.process_time() - cpu) / steps],
        **{"host_peak": peak, "device_peak": side.device_peak()},
    }


def main() -> None:
    """Reads numbers of steps from stdin, and runs these steps, until stdin ends."""
    name, directory = sys.argv[1], Path(sys.argv[2])
    case = load_case(directory)
    # Libraries may print to stdout, so stdout is redirected to stderr, and replies are written to a
    # copy of the original stdout.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name == "ours":
        prepare_for_training()
        side: Side = Ours(case, directory)
    else:
        from llava_jax.speed.peer import Peer

        side = Peer(case, directory)
    say = lambda found: print(json.dumps(found), file=replies, flush=True)
    say({"device": side.name, "compile_seconds": side.compile_seconds})
    done = 0
    for line in sys.stdin:
        steps = int(line)
        say(take_turn(side, case, done, steps))
        done += steps


if __name__ == "__main__":
    main()
