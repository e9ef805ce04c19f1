"""The process of one side of `llava-jax benchmark`: `python -m llava_jax.speed.side ours|hf DIR`.

It writes a line of JSON when it is ready. After that, each line that it reads is a number of steps
to make, and each line that it writes has the measurements of these steps.
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
    """A model that trains.

    Attributes:
        ahead: Number of steps that may be started before the first of them has ended, as in
            training. It is 0 if the host itself computes.
        compile_seconds: Seconds for compiling, or None.
        name: The name of the device.
    """

    ahead: int
    compile_seconds: float | None
    name: str

    def place(self, batch: dict[str, Any]) -> Any:
        """Puts a batch on the device."""
        ...

    def step(self, batch: Any) -> Callable[[], float]:
        """Starts a step with a placed batch; returns a function that waits for the loss."""
        ...

    def device_peak(self) -> int | None:
        """Returns the peak of the device's memory in bytes; None if that is the host's memory."""
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
    """Makes steps; returns the seconds of each, those spent on the input, and the losses."""
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
    """Takes turns until the input ends."""
    name, directory = sys.argv[1], Path(sys.argv[2])
    case = load_case(directory)
    replies = os.fdopen(os.dup(1), "w")  # libraries may print
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
