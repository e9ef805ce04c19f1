"""Saves and restores a run's checkpoints with Orbax: everything that changes while it trains.

The frozen base is not part of them: the run's config.json has its name and its fingerprint. A
checkpoint gets its name, `{directory}/{step}/`, only when it is complete. It contains a manifest
with the checksums of its files, so a checkpoint that was damaged later is recognized and the one
before it is used. It also has copies of the run's own files, from which `repair.py` restores them.
"""

import functools
import json
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llava_jax.config import CheckpointConfig
from llava_jax.distributed.host_memory import is_for_host
from llava_jax.distributed.multihost import barrier, broadcast_from_main, is_main_process
from llava_jax.errors import CheckpointError
from llava_jax.jax_compat import ORBAX_METADATA, ORBAX_UNFINISHED, is_late_callback
from llava_jax.train_step.step import TrainState
from llava_jax.training.repair import copy_files

MANIFEST = "manifest.json"
DAMAGED = ".damaged"
"""What the name of a checkpoint that was passed over ends in."""

_STEP = re.compile(r"0|[1-9][0-9]{0,14}")
_FILES = "files"
"""Key of the copies of the run's own files, which are saved with the data's position."""
_BLOCK = 2**22
_THREADS = 8


class Checkpoints:
    """The checkpoints of one run, written asynchronously.

    Args:
        directory: Directory of the checkpoints, which is created if it does not exist. Unfinished
            checkpoints of a killed process are removed; damaged checkpoints that are newer than
            the newest intact one are renamed.
        config: Config of the checkpoints: how many to keep.

    Attributes:
        passed_over: A line of text for each renamed checkpoint, with the reason.

    Raises:
        CheckpointError: There are checkpoints, but all of them are damaged.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        _drop_late_callbacks()
        self._directory = directory.absolute()
        self._keep = config.keep
        self.passed_over: list[str] = []
        newest = None
        if is_main_process():
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"*{ORBAX_UNFINISHED}*"):
                _remove(left)
            newest = self._newest_whole()
        self._newest = broadcast_from_main(-1 if newest is None else newest)
        self._saving: int | None = None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._complete,
                # Otherwise Orbax waits forever for a directory that could not be created.
                create_directories_asynchronously=False,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest intact checkpoint; None if there is none."""
        return None if self._newest < 0 else self._newest

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts to save a checkpoint. When this returns, `state` may be donated.

        If any of `state` is in host memory, it returns only when the checkpoint is saved.

        Args:
            state: State from which the next step starts.
            data: Position in the data, as plain JSON.

        Raises:
            CheckpointError: It cannot be written, or the one before it could not be.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest:
            return
        files = copy_files(self._directory.parent) if is_main_process() else {}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data | {_FILES: files})
        )
        with self._explained(step):
            self._saving = step
            self._orbax.save(self._directory / str(step), args=args)
        if any(map(is_for_host, jax.tree.leaves(state))):
            self.wait()  # Orbax writes such arrays without copying them first

    def clear(self) -> None:
        """Removes all checkpoints."""
        if is_main_process():
            for step in self._steps():
                self._remove(step)
        self._newest = -1
        barrier()

    def check(self) -> None:
        """Checks, without waiting, whether the save in progress has failed.

        Raises:
            CheckpointError: It has failed.
        """
        with self._explained(self._saving):
            self._orbax.check_for_errors()

    def wait(self) -> None:
        """Waits until the save in progress is complete.

        Raises:
            CheckpointError: The checkpoint could not be written.
        """
        with self._explained(self._saving):
            self._orbax.wait_until_finished()
        if self._saving is not None:
            self._newest, self._saving = self._saving, None
            self._remove_old()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint, onto any number of devices.

        Args:
            abstract: Shapes, dtypes and shardings of the state.

        Returns:
            The state and the position in the data.

        Raises:
            CheckpointError: The saved parameters have other names or shapes, for example after a
                change of the recipe that was accepted.
        """
        checkpoint = self._directory / str(self._newest)
        # Shapes are compared before Orbax reads anything: if it fails during a restore, some of
        # its reads go on in the background and fail later, during something else.
        saved: Any = ocp.StandardCheckpointHandler().metadata(epath.Path(checkpoint / "state"))
        there = {path: tuple(leaf.shape) for path, leaf in saved.tree["trainable"].items()}
        here = {path: tuple(leaf.shape) for path, leaf in abstract.trainable.items()}
        if other := sorted(dict(there.items() ^ here.items())):
            path = other[0]
            raise CheckpointError(
                f"{checkpoint} does not have the parameters that this recipe trains; continue with "
                "the recipe that the run started with, or start another run with its own --name. "
                f"{len(other)} parameters differ: {path} is {there.get(path)} there, "
                f"{here.get(path)} here"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._orbax.restore(checkpoint, args=args)["state"], self.position()

    def position(self) -> dict[str, Any]:
        """The data's position when the newest checkpoint was saved."""
        return {name: value for name, value in self._data().items() if name != _FILES}

    def files(self) -> dict[str, str]:
        """The run's own files as they were when the newest checkpoint was saved; text by name."""
        return {} if self.latest is None else self._data().get(_FILES, {})

    def _data(self) -> dict[str, Any]:
        place = self._directory / str(self._newest)
        return self._orbax.restore(place, args=ocp.args.Composite(data=ocp.args.JsonRestore()))[
            "data"
        ]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress, also if an error ended the run."""
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            self._orbax.close()

    @contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise errors of many types
            earlier = (
                f"; the one of step {self.latest} is intact" if self.latest is not None else ""
            )
            raise CheckpointError(
                f"{self._directory / str(step)}: the checkpoint could not be saved{earlier}. The "
                f"same command continues from the last checkpoint. {_first_line(error)}"
            ) from error

    def _complete(self) -> None:
        """Writes the list of files, before the checkpoint takes its name."""
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

    def _newest_whole(self) -> int | None:
        damaged = {}
        for step in sorted(self._steps(), reverse=True):
            reason = what_is_damaged(self._directory / str(step))
            if reason is None:
                self._set_aside(damaged)
                return step
            damaged[step] = reason
        if damaged:
            raise CheckpointError(
                "all checkpoints of this run are damaged, so it cannot continue; remove "
                f"{self._directory} to start it again\n  " + "\n  ".join(damaged.values())
            )
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            renamed = self._directory / f"{step}{DAMAGED}"
            _remove(renamed)
            (self._directory / str(step)).rename(renamed)
            self.passed_over.append(f"the checkpoint of step {step} is not used: {reason}")

    def _steps(self) -> list[int]:
        names = [path.name for path in self._directory.iterdir()]
        return [int(name) for name in names if _STEP.fullmatch(name)]

    def _remove_old(self) -> None:
        if is_main_process():
            for step in sorted(self._steps())[: -self._keep]:
                with suppress(OSError):  # the next start removes what remains
                    self._remove(step)

    def _remove(self, step: int) -> None:
        """Takes its name first, so that half of one is never taken for a checkpoint."""
        place = self._directory / str(step)
        shutil.rmtree(place.rename(place.with_name(f"{step}{ORBAX_UNFINISHED}")))


def _remove(place: Path) -> None:
    """Removes a directory or a file, as far as that is possible."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()


@functools.cache
def _drop_late_callbacks() -> None:
    """Keeps one useless complaint off a run's output, from now on; see `is_late_callback`."""
    others = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not is_late_callback(unraisable.exc_value):
            others(unraisable)

    sys.unraisablehook = hook


def write_manifest(files: dict[str, list[int]]) -> str:
    """The text of a manifest: the files, name -> [bytes, checksum], and a checksum of this list."""
    return json.dumps({"files": files, "checksum": _crc(files)}, indent=1) + "\n"


def read_manifest(text: str) -> dict[str, list[int]]:
    """The files that a manifest's text lists.

    Raises:
        ValueError: The text is damaged.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("checksum") != _crc(found.get("files")):
        raise ValueError("its checksum is not the one that was written")
    return found["files"]


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())


def what_is_damaged(place: Path) -> str | None:
    """Compares a checkpoint with its manifest; None if it is intact, otherwise the reason."""
    try:
        expected = read_manifest((place / MANIFEST).read_text())
        json.loads((place / ORBAX_METADATA).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{place / MANIFEST} or {ORBAX_METADATA} cannot be read ({error})"
    for name, (size, _) in expected.items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            return f"{place / name} {what}, not the {size} that were written"
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(checksum, [place / name for name in expected])
        for (name, (_, value)), found in zip(expected.items(), sums, strict=True):
            if found != value:
                return f"{place / name} is damaged: its checksum is not the one that was written"
    return None


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
