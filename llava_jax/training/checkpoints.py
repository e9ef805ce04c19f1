"""Saves and restores a run's checkpoints with Orbax.

A checkpoint contains everything that changes during training. It does not contain the frozen
weights of the base model, whose name and fingerprint are in the run's config.json. An unfinished
checkpoint has a temporary name; only a complete checkpoint is renamed to `{directory}/{step}/`.
Each checkpoint has a manifest with the checksums of its files. If a checkpoint is damaged, the
checksums show this, and an older checkpoint is used. A checkpoint also contains copies of the run's
own files, such as config.json; `repair_logs.py` restores damaged files from these copies.

Orbax compresses an array before it writes the array, and reads an array before it moves the array
to its place. It would do this with all arrays at once, which needs the memory of the state a second
time. Therefore only a few arrays are written or read at the same time; see `checkpoint_buffer`.
"""

import functools
import json
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llava_jax.config import CheckpointConfig
from llava_jax.distributed.host_memory import (
    CHECKPOINT_PIECE,
    MIN_CHECKPOINT_BUFFER,
    checkpoint_buffer,
    is_for_host,
)
from llava_jax.distributed.multihost import barrier, broadcast_from_main, is_main_process
from llava_jax.errors import CheckpointError
from llava_jax.jax_compat import (
    ORBAX_METADATA,
    ORBAX_UNFINISHED,
    is_late_callback,
    readable_in_place,
)
from llava_jax.train_step.step import TrainState
from llava_jax.training.repair_logs import copy_files

MANIFEST, ADAPTER = "manifest.json", "adapter"
DAMAGED = ".damaged"
"""Suffix of the name of a damaged checkpoint that is not used."""

_STEP = re.compile(r"0|[1-9][0-9]{0,14}")
_FILES = "files"
"""Key of the copies of the run's own files, in the dict that contains the position in the data."""
_PIECES = ocp.SaveArgs(chunk_byte_size=CHECKPOINT_PIECE)
"""An array is compressed in pieces, by several threads. Pieces of more than 32 MiB go back to the
system as soon as they are written, because glibc maps each of them by itself."""
_BLOCK = 2**22
_THREADS = 8


class Checkpoints:
    """The checkpoints of one run, which are saved in the background.

    The object is a context manager; at the end of the context, it waits for the save in progress.

    Args:
        directory: Directory of the checkpoints, which is created if it does not exist. Unfinished
            checkpoints of a killed process are removed; damaged checkpoints that are newer than
            the newest intact checkpoint are renamed.
        config: Checkpoint settings, with the number of checkpoints to keep.

    Attributes:
        passed_over: One line of text for each damaged checkpoint that was renamed, with the damage.
        export: Function that writes the adapter of a train state to a directory. Each checkpoint
            then contains the adapter, in its directory `adapter`. None writes no adapters.
        best: Step of the best evaluation; its checkpoint is kept. None keeps no such checkpoint.
            If the step has no checkpoint, the newest checkpoint before it is kept.

    Raises:
        CheckpointError: The directory contains checkpoints, but all checkpoints are damaged.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        _drop_late_callbacks()
        self._directory = directory.absolute()
        self._keep = config.keep
        self.passed_over: list[str] = []
        self.export: Callable[[Path, TrainState], None] | None = None
        self.best: int | None = None
        newest = None
        if is_main_process():
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"*{ORBAX_UNFINISHED}*"):
                _remove(left)
            newest = self._newest_whole()
        self._newest = broadcast_from_main(-1 if newest is None else newest)
        self._saving: int | None = None
        self._buffer = MIN_CHECKPOINT_BUFFER
        self._orbax = self._open_orbax()

    @property
    def latest(self) -> int | None:
        """Number of steps done at the newest intact checkpoint; None if there is no checkpoint."""
        return None if self._newest < 0 else self._newest

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts to save a checkpoint, unless the newest checkpoint has the same step.

        After `save` returns, the arrays of `state` may be donated. If an array of `state` is in
        pinned host memory, `save` returns only when the checkpoint is complete.

        Args:
            state: Train state to save.
            data: Position in the data, as a JSON object.

        Raises:
            CheckpointError: The checkpoint cannot be written, or the previous save has failed.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest:
            return
        files = copy_files(self._directory.parent) if is_main_process() else {}
        hosted = any(map(is_for_host, jax.tree.leaves(state)))
        readable = jax.tree.map(lambda x: readable_in_place(x) if is_for_host(x) else x, state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(readable, jax.tree.map(lambda _: _PIECES, state)),
            data=ocp.args.JsonSave(data | {_FILES: files}),
        )
        with self._explained(step):
            if self.export is not None:
                self.export(self._unfinished_adapter(step), state)
            self._bound_buffer(state)
            self._saving = step
            self._orbax.save(self._directory / str(step), args=args)
        if hosted:
            self.wait()  # Orbax writes arrays in host memory without copying them first

    def clear(self) -> None:
        """Removes all checkpoints. All processes must call this."""
        if is_main_process():
            for step in self._steps():
                self._remove(step)
        self._newest = -1
        barrier()

    def check(self) -> None:
        """Raises an error if the save in progress has failed, without waiting for the save.

        Raises:
            CheckpointError: The save has failed.
        """
        with self._explained(self._saving):
            self._orbax.check_for_errors()

    def wait(self) -> None:
        """Waits until the save in progress is complete, and then removes old checkpoints.

        Raises:
            CheckpointError: The checkpoint could not be written.
        """
        with self._explained(self._saving):
            self._orbax.wait_until_finished()
        if self._saving is not None:
            self._newest, self._saving = self._saving, None
            self._remove_old()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint. The number of devices may have changed since the save.

        Args:
            abstract: Shapes, dtypes and shardings of the train state.

        Returns:
            The train state and the position in the data.

        Raises:
            CheckpointError: As in `restore_state`.
        """
        return self.restore_state(abstract, self._newest), self.position()

    def restore_state(self, abstract: TrainState, step: int) -> TrainState:
        """Restores the train state of a checkpoint.

        Args:
            abstract: Shapes, dtypes and shardings of the train state.
            step: Number of steps of the checkpoint.

        Raises:
            CheckpointError: The saved arrays have other paths or shapes than `abstract`.
        """
        checkpoint = self._directory / str(step)
        # Compare the shapes before Orbax reads an array: if a restore fails, some of Orbax's reads
        # continue in the background and raise errors later, in unrelated code.
        saved: Any = ocp.PyTreeCheckpointHandler().metadata(epath.Path(checkpoint / "state"))
        name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        pairs = map(jax.tree.leaves_with_path, (saved.tree, abstract))
        before, now = ({name(path): tuple(x.shape) for path, x in leaves} for leaves in pairs)
        if other := sorted(dict(before.items() ^ now.items())):
            path = other[0]
            raise CheckpointError(
                f"{checkpoint} is of a recipe with other trained parameters or another optimizer; "
                "continue with that recipe, or start a new run with another --name. "
                f"{len(other)} arrays differ; for example, {path} has shape {before.get(path)} "
                f"in the checkpoint and {now.get(path)} in this run"
            )
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=places))
        self._bound_buffer(abstract)
        return self._orbax.restore(checkpoint, args=args)["state"]

    def position(self) -> dict[str, Any]:
        """Returns the position in the data, from the newest checkpoint."""
        return {name: value for name, value in self._data().items() if name != _FILES}

    def files(self) -> dict[str, str]:
        """Returns the copies of the run's own files in the newest checkpoint: text by file name."""
        return {} if self.latest is None else self._data().get(_FILES, {})

    def _data(self) -> dict[str, Any]:
        """Reads the position in the data and the file copies from the newest checkpoint."""
        place = self._directory / str(self._newest)
        return self._orbax.restore(place, args=ocp.args.Composite(data=ocp.args.JsonRestore()))[
            "data"
        ]

    def _bound_buffer(self, state: TrainState) -> None:
        """Opens Orbax again if its buffer does not have the size that this state needs."""
        buffer = checkpoint_buffer(jax.tree.leaves(state))
        if buffer != self._buffer:
            self._orbax.close()
            self._buffer = buffer
            self._orbax = self._open_orbax()

    def _open_orbax(self) -> ocp.AsyncCheckpointer:
        """Returns a checkpointer that writes or reads at most `_buffer` bytes at the same time."""
        gigabytes: Any = self._buffer / 10**9  # Orbax names the type int, and multiplies by 10^9
        handler = ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=gigabytes,
            restore_concurrent_gb=gigabytes,
            # XLA's pool of pinned memory would grow by more than the copies of device arrays.
            enable_pinned_host_transfer=False,
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, handler)
        handlers.add("state", ocp.args.PyTreeRestore, handler)
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=handlers),
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._complete,
                # With asynchronous creation, Orbax waits forever if a directory cannot be created.
                create_directories_asynchronously=False,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress, even if an exception ends the context."""
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            self._orbax.close()

    @contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        """Turns every exception into a CheckpointError that names the checkpoint of `step`."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types
            before = self.latest is not None
            earlier = f"; the checkpoint of step {self.latest} is intact" if before else ""
            raise CheckpointError(
                f"{self._directory / str(step)}: the checkpoint could not be saved{earlier}. The "
                f"same command continues from the last checkpoint. {_first_line(error)}"
            ) from error

    def _complete(self) -> None:
        """Adds the manifest and the adapter, before Orbax gives the checkpoint its final name.

        The manifest does not list the adapter, which is for users and not for resuming.
        """
        (unfinished,) = self._directory.glob(f"{self._saving}{ORBAX_UNFINISHED}*")
        files = [
            path for path in unfinished.rglob("*") if path.is_file() and path.name != ORBAX_METADATA
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = pool.map(checksum, files)
            listed = {
                str(path.relative_to(unfinished)): [path.stat().st_size, value]
                for path, value in zip(files, sums, strict=True)
            }
        (unfinished / MANIFEST).write_text(write_manifest(listed))
        if self._saving is not None and (made := self._unfinished_adapter(self._saving)).is_dir():
            made.rename(unfinished / ADAPTER)

    def _unfinished_adapter(self, step: int) -> Path:
        """Returns the directory of an adapter until the checkpoint of `step` is complete."""
        return self._directory / f"{ADAPTER}-{step}{ORBAX_UNFINISHED}"

    def _newest_whole(self) -> int | None:
        """Returns the step of the newest intact checkpoint, and renames newer, damaged ones."""
        damaged = {}
        for step in sorted(self._steps(), reverse=True):
            reason = what_is_damaged(self._directory / str(step))
            if reason is None:
                self._set_aside(damaged)
                return step
            damaged[step] = reason
        if damaged:
            raise CheckpointError(
                "all checkpoints of this run are damaged, so the run cannot continue; remove "
                f"{self._directory} to start again from step 0\n  " + "\n  ".join(damaged.values())
            )
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Renames damaged checkpoints, and adds a line with the reason to `passed_over`."""
        for step, reason in damaged.items():
            renamed = self._directory / f"{step}{DAMAGED}"
            _remove(renamed)
            (self._directory / str(step)).rename(renamed)
            self.passed_over.append(f"the checkpoint of step {step} is not used: {reason}")

    def _steps(self) -> list[int]:
        """Returns the steps of all checkpoints that have their final name."""
        names = [path.name for path in self._directory.iterdir()]
        return [int(name) for name in names if _STEP.fullmatch(name)]

    def _remove_old(self) -> None:
        """Removes the oldest checkpoints, so that the best and the configured number remain."""
        if is_main_process():
            best = self._best_step()
            for step in sorted(self._steps())[: -self._keep]:
                if step != best:
                    with suppress(OSError):  # the next start of the run removes remaining files
                        self._remove(step)

    def intact_best_step(self) -> int | None:
        """Returns the step of the checkpoint that `best` protects, or None if it is damaged."""
        step = self._best_step()
        is_intact = step is not None and what_is_damaged(self._directory / str(step)) is None
        return step if is_intact else None

    def _best_step(self) -> int | None:
        if self.best is None:
            return None
        return max((step for step in self._steps() if step <= self.best), default=None)

    def _remove(self, step: int) -> None:
        """Renames a checkpoint and then removes it, so that a partly removed one is never used."""
        place = self._directory / str(step)
        shutil.rmtree(place.rename(place.with_name(f"{step}{ORBAX_UNFINISHED}")))


def _remove(place: Path) -> None:
    """Removes a directory or a file, and ignores errors."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()


@functools.cache
def _drop_late_callbacks() -> None:
    """Suppresses a misleading traceback after a failed save; see `is_late_callback`."""
    others = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not is_late_callback(unraisable.exc_value):
            others(unraisable)

    sys.unraisablehook = hook


def write_manifest(files: dict[str, list[int]]) -> str:
    """Returns the text of a manifest: a list of files, and a checksum of this list.

    Args:
        files: Size in bytes and checksum of each file, by name.
    """
    return json.dumps({"files": files, "checksum": _crc(files)}, indent=1) + "\n"


def read_manifest(text: str) -> dict[str, list[int]]:
    """Returns the files that a manifest lists: size in bytes and checksum by name.

    Args:
        text: Text of the manifest.

    Raises:
        ValueError: The text is not JSON, or its checksum is wrong.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("checksum") != _crc(found.get("files")):
        raise ValueError("the checksum of the list of files is wrong")
    return found["files"]


def _crc(value: Any) -> int:
    """Returns the CRC-32 of a value's JSON text."""
    return zlib.crc32(json.dumps(value).encode())


def what_is_damaged(place: Path) -> str | None:
    """Compares a checkpoint with its manifest and describes the first damage that is found.

    Args:
        place: Directory of the checkpoint.

    Returns:
        Description of the damage; None if the checkpoint is intact.
    """
    try:
        expected = read_manifest((place / MANIFEST).read_text())
        json.loads((place / ORBAX_METADATA).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{place / MANIFEST} or {ORBAX_METADATA} cannot be read ({error})"
    for name, (size, _) in expected.items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            return f"{place / name} {what}, but {size} bytes were written"
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(checksum, [place / name for name in expected])
        for (name, (_, value)), found in zip(expected.items(), sums, strict=True):
            if found != value:
                return f"{place / name} is damaged: its checksum differs from the manifest"
    return None


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _first_line(error: Exception) -> str:
    """Returns the type of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
