"""Measures the memory that saving and restoring a checkpoint of state in host memory needs.

    python tools/checks/checkpoint_memory.py --mib 2048

Each part runs in a process of its own. The figures are the largest resident memory (RSS) of the
process while it saves or restores, less its memory before that, in MiB. Before it saves, the
process has the state; before it restores, it has none, so the state itself is subtracted.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

MIB = 2**20
ARRAYS = 13  # then an array has the share of the state that the largest stack of a 7B model has
LIMIT = 0.25  # largest allowed memory, as a fraction of the state
INTERVAL = 0.002  # seconds between two readings


class Peak:
    """Reads the resident memory of this process in a thread, while the context is open.

    Attributes:
        more: Largest resident memory, less the memory at the start, in bytes.
    """

    more = 0

    def __enter__(self) -> "Peak":
        self._open, self._start = True, resident()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        while self._open:
            self.more = max(self.more, resident() - self._start)
            time.sleep(INTERVAL)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._open = False
        self._thread.join()


def resident() -> int:
    """Returns the resident memory of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


def measure(part: str, mib: int, directory: Path) -> float:
    """Saves or restores a state in host memory, in this process.

    Args:
        part: "save" or "restore". The first saves the checkpoint that the second restores.
        mib: Size of the state in MiB.
        directory: Directory of the checkpoints.

    Returns:
        The memory that this needed beside the state, in MiB.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llava_jax.config import CheckpointConfig
    from llava_jax.distributed import host_memory
    from llava_jax.train_step.step import TrainState
    from llava_jax.training.checkpoints import Checkpoints

    size = mib * MIB // ARRAYS
    host_memory.MIN_CHECKPOINT_BUFFER = min(host_memory.MIN_CHECKPOINT_BUFFER, mib * MIB // 8)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    device = NamedSharding(mesh, PartitionSpec())
    pinned = device.with_memory_kind(host_memory.PINNED_HOST)

    def state_of(count: int, rows: int) -> TrainState:
        struct = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding
        )
        arrays = {f"{n}": struct((32, rows, 256), np.float32, pinned) for n in range(count)}
        number = struct((), np.int32, device)
        return TrainState(number, arrays, {}, struct((2,), np.uint32, device))

    def fill(state: TrainState, step: int) -> TrainState:
        random = np.random.default_rng(0)
        arrays = {
            # Nearly random bits: zstd makes them hardly smaller, like the weights of a model.
            path: jax.block_until_ready(
                jax.device_put(random.standard_normal(leaf.shape, np.float32), pinned)
            )
            for path, leaf in state.trainable.items()
        }
        number = jax.device_put(np.int32(step), device)
        key = jax.device_put(np.zeros(2, np.uint32), device)
        return dataclasses.replace(state, step=number, trainable=arrays, key=key)

    abstract = state_of(ARRAYS, size // (32 * 256 * 4))
    first = directory / "first"
    with Checkpoints(first, CheckpointConfig()) as saved:  # loads what any checkpoint needs
        saved.save(fill(state_of(1, 8), 1), {})
        saved.wait()
        saved.restore(state_of(1, 8))
    shutil.rmtree(first)
    with Checkpoints(directory / "second", CheckpointConfig()) as saved:
        if part == "save":
            state = fill(abstract, 1)
            with Peak() as peak:
                saved.save(state, {})
                saved.wait()
            return peak.more / MIB
        with Peak() as peak:
            jax.block_until_ready(saved.restore(abstract))
        return peak.more / MIB - mib


def main() -> int:
    """Measures both parts in processes, and returns 1 if one needs more than `LIMIT`, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=2048, help="size of the state in MiB")
    parser.add_argument("--part", choices=("save", "restore"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(f"{measure(given.part, given.mib, given.directory):.0f}")
        return 0
    holds = True
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        for part in ("save", "restore"):
            arguments = ["--mib", str(given.mib), "--part", part, "--directory", directory]
            command = [sys.executable, __file__, *arguments]
            start = time.monotonic()
            done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
            more = int(done.stdout)
            holds &= more <= LIMIT * given.mib
            print(
                f"{part}: {more} MiB beside {given.mib} MiB of state ({more / given.mib:.0%}), "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
