"""One side of `tools/benchmark.py`, in a process of its own: takes turns, a line of JSON each.

`python tools/benchmark_side.py ours|hf DIRECTORY`. After a first line, when all is ready, every
line read is a number of steps to make, every line written what was measured of them.
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
from typing import Any, Protocol

from benchmark_case import BASE, Case, load_case

from llava_jax.distributed.environment import prepare_for_training


class Side(Protocol):
    """A model that trains.

    Attributes:
        ahead: Steps that may be asked for before the first of them has ended, as in training: 0
            where computing is the host's own work.
        compile_seconds: What it took to compile, or None.
        name: What the device calls itself.
    """

    ahead: int
    compile_seconds: float | None
    name: str

    def place(self, batch: dict[str, Any]) -> Any:
        """A batch, on the device."""
        ...

    def step(self, batch: Any) -> Callable[[], float]:
        """Makes a step of a placed batch; what it returns waits for the loss."""
        ...

    def device_peak(self) -> int | None:
        """Most bytes of the device's memory that were ever taken; None where it is the host's."""
        ...


class Ours:
    """This package."""

    def __init__(self, case: Case, directory: Path):
        import jax

        from llava_jax.config import MeshConfig
        from llava_jax.data.batch import Batch
        from llava_jax.distributed.sharding import make_mesh
        from llava_jax.planning.measure import attention_here
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
    """Makes steps; seconds of each, what of them was spent on the input, and losses."""
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
        raise ArithmeticError(f"losses are not finite: {losses}")
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **{"seconds": seconds, "waits": waits, "losses": losses},
        "cpu_seconds": [(time.process_time() - cpu) / steps],
        **{"host_peak": peak, "device_peak": side.device_peak()},
    }


def main() -> None:
    """Serves turns until its input ends."""
    name, directory = sys.argv[1], Path(sys.argv[2])
    case = load_case(directory)
    replies = os.fdopen(os.dup(1), "w")  # libraries may print
    os.dup2(2, 1)
    if name == "ours":
        prepare_for_training()
        side: Side = Ours(case, directory)
    else:
        from benchmark_peer import Peer

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
