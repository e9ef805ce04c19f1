"""Resumable checkpoints of a run, with Orbax: all that changes, and nothing that does not.

The frozen base is not copied: the run's config.json names it and holds its fingerprint. A
checkpoint takes its name, `{directory}/{step}/`, when it is complete, a list of its files and their
checksums in it. So one that was damaged later is known, and the one before it taken. It has copies
of the run's own files, from which `repair.py` restores them.
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
"""Beside the data's position: the run's own files."""
_BLOCK = 2**22
_THREADS = 8


class Checkpoints:
    """The checkpoints of one run, written asynchronously.

    Args:
        directory: Made if it does not exist. What a killed process left unfinished in it is
            removed; what is newer than the newest whole checkpoint is renamed.
        config: How many to keep.

    Attributes:
        passed_over: What was renamed, and why.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
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
                create_directories_asynchronously=False,  # else its errors are waited for in vain
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step; None when there is none."""
        return None if self._newest < 0 else self._newest

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving, and if `state` lies in host memory finishes; then it may be donated.

        Args:
            state: What the next step starts from.
            data: The data's position, as plain JSON.

        Raises:
            CheckpointError: It cannot be written; or what was begun before could not be.
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
            self.wait()  # Orbax writes such arrays from where they lie, and so holds on to them

    def clear(self) -> None:
        """Removes them all."""
        if is_main_process():
            for step in self._steps():
                self._remove(step)
        self._newest = -1
        barrier()

    def check(self) -> None:
        """Notices early if what is being saved cannot be.

        Raises:
            CheckpointError: It cannot.
        """
        with self._explained(self._saving):
            self._orbax.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: It could not be written.
        """
        with self._explained(self._saving):
            self._orbax.wait_until_finished()
        if self._saving is not None:
            self._newest, self._saving = self._saving, None
            self._remove_old()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint, onto any number of devices.

        Args:
            abstract: Shapes, dtypes and shardings.

        Raises:
            CheckpointError: It has others, as after a change of recipe that was accepted.
        """
        place = self._directory / str(self._newest)
        # Looked at first: an Orbax that fails in the midst leaves reads behind that fail later.
        saved: Any = ocp.StandardCheckpointHandler().metadata(epath.Path(place / "state"))
        there = {path: tuple(leaf.shape) for path, leaf in saved.tree["trainable"].items()}
        here = {path: tuple(leaf.shape) for path, leaf in abstract.trainable.items()}
        if other := sorted(dict(there.items() ^ here.items())):
            path = other[0]
            raise CheckpointError(
                f"{place} is not what this recipe trains; go on with the one it began with, or "
                f"begin a run with a --name of its own. {len(other)} parameters differ: {path} is "
                f"{there.get(path)} there, {here.get(path)} here"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._orbax.restore(place, args=args)["state"], self.position()

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
        """Lets a save that has begun finish, whatever ended the run."""
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
        except Exception as error:  # of any kind: Orbax and what it writes with have many
            earlier = "" if self.latest is None else f"; that of step {self.latest} is untouched"
            raise CheckpointError(
                f"{self._directory / str(step)}: the checkpoint could not be saved{earlier}. The "
                f"same command continues from the last one. {_first_line(error)}"
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
                f"no checkpoint of this run is whole, so it cannot go on; remove "
                f"{self._directory} to start it anew\n  " + "\n  ".join(damaged.values())
            )
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            place = self._directory / str(step)
            _remove(place.with_name(f"{step}{DAMAGED}"))
            place.rename(place.with_name(f"{step}{DAMAGED}"))
            self.passed_over.append(f"the checkpoint of step {step} is passed over: {reason}")

    def _steps(self) -> list[int]:
        names = [path.name for path in self._directory.iterdir()]
        return [int(name) for name in names if _STEP.fullmatch(name)]

    def _remove_old(self) -> None:
        if is_main_process():
            for step in sorted(self._steps())[: -self._keep]:
                with suppress(OSError):  # the next start removes what is left
                    self._remove(step)

    def _remove(self, step: int) -> None:
        """Takes its name first, so that half of one is never taken for a checkpoint."""
        place = self._directory / str(step)
        shutil.rmtree(place.rename(place.with_name(f"{step}{ORBAX_UNFINISHED}")))


def _remove(place: Path) -> None:
    """Removes a directory, or whatever has its name; what cannot be removed stays."""
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
    """The text of a list of files, name -> [bytes, checksum], with a checksum of its own."""
    return json.dumps({"files": files, "checksum": _crc(files)}, indent=1) + "\n"


def read_manifest(text: str) -> dict[str, list[int]]:
    """The inverse.

    Raises:
        ValueError: It is not as it was written.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("checksum") != _crc(found.get("files")):
        raise ValueError("its checksum is not the one that was written")
    return found["files"]


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())


def what_is_damaged(place: Path) -> str | None:
    """Holds a checkpoint against its list of files; None if it is whole."""
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
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
