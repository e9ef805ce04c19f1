"""Finds the tensors in a DeepSpeed checkpoint directory, for the ZeRO stages 1 to 3.

Each process wrote a part of one long float32 array, which contains the parameters one after the
other. The stored shapes tell where each parameter begins (as in deepspeed/utils/zero_to_fp32.py).
Stages 1 and 2 divide the array among the processes; stage 3 divides each parameter. DeepSpeed's own
script is not used, because it needs torch and DeepSpeed, executes code in the pickles, and keeps
the whole model in memory.
"""

import dataclasses
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax.conversion.torch_pickle import open_pickle
from llava_jax.disk import read_regular
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import Tensor, is_shape

_MAX_NAME_BYTES = 1000
_MODEL, _OPTIMIZER = "*model_states.pt", "*_optim_states.pt"


@dataclasses.dataclass(frozen=True)
class Joined(Tensor):
    """A tensor whose values are stored in several pieces.

    Attributes:
        pieces: One-dimensional tensors that contain the values of the whole tensor, in order.
    """

    pieces: tuple[Tensor, ...] = ()

    def _read_into(self, values: np.ndarray) -> None:
        start = 0
        for piece in self.pieces:
            stop = start + math.prod(piece.shape)
            values[start:stop] = piece.read()
            start = stop

    def stretch(self, at: int, count: int) -> bytes:
        """Returns `count` bytes of the values, starting at byte `at`."""
        found, start = [], 0
        for piece in self.pieces:
            first, last = max(at - start, 0), min(at + count - start, piece.size)
            if first < last:
                found.append(piece.stretch(first, last - first))
            start += piece.size
        return b"".join(found)


def zero_directory(path: Path) -> Path | None:
    """Finds the directory of a ZeRO checkpoint.

    This is `path`, or the subdirectory of `path` that the file `latest` in `path` names.

    Returns:
        The directory, or None if there is no ZeRO checkpoint.

    Raises:
        CheckpointError: `latest` cannot be read, or it does not name a subdirectory.
    """
    if any(path.glob(_MODEL)):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    try:
        name = read_regular(latest, _MAX_NAME_BYTES).decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{latest} cannot be read: {error}") from error
    if "\0" in name or Path(name).name != name or not (path / name).is_dir():
        raise CheckpointError(
            f"{latest} names {name!r:.80}, but there is no such directory in {path}"
        )
    return path / name if any((path / name).glob(_MODEL)) else None


def open_zero(directory: Path) -> dict[str, Tensor]:
    """Opens the trained parameters of a ZeRO checkpoint, without reading their values.

    Args:
        directory: Directory with the files of all processes.

    Returns:
        The float32 tensors by the parameter names of the model that DeepSpeed wrapped.

    Raises:
        CheckpointError: The file of a process is missing, or the files do not fit together.
    """
    models, optimizers = (_by_rank(directory, pattern) for pattern in (_MODEL, _OPTIMIZER))
    try:
        states = [open_pickle(file)["optimizer_state_dict"] for file in optimizers]
        shapes = _checked(open_pickle(models[0])["param_shapes"])
        count = states[0]["partition_count"]
        count = count[0] if isinstance(count, list) else count
        if not isinstance(count, int):
            raise CheckpointError(f"{directory}: partition_count is not a number")
        by_parameter = "fp32_flat_groups" in states[0]
        name = "fp32_flat_groups" if by_parameter else "single_partition_of_fp32_groups"
        parts = [state[name] for state in states]
        if not all(_is_line(part) for line in parts for part in line):
            raise CheckpointError(
                f"{directory}: an entry of {name} is not a one-dimensional float32 tensor"
            )
        if len(parts) != count:
            raise CheckpointError(
                f"{directory} has the files of {len(parts)} processes, but {count} processes wrote "
                "the checkpoint; copy the files of all processes to the directory"
            )
        if by_parameter:  # stage 3 has one array for all groups
            shapes = [{name: shape for group in shapes for name, shape in group.items()}]
            parts = [[groups] for groups in parts]
        else:
            parts = [[[group] for group in groups] for groups in parts]
        if odd := [len(part) for part in parts if len(part) != len(shapes)]:
            raise CheckpointError(
                f"{directory}: {name} has {odd[0]} groups of values; param_shapes has "
                f"{len(shapes)} groups"
            )
        found = {}
        for index, group in enumerate(shapes):
            ranks = [part[index] for part in parts]
            found |= dict(_cut(directory, group, ranks, by_parameter=by_parameter))
    except CheckpointError:
        raise
    except Exception as error:  # the pickles may contain anything, so any step may fail
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{directory} is not a complete ZeRO checkpoint: {said:.500}"
        ) from error
    return found


def _checked(groups: Any) -> list[dict[str, tuple[int, ...]]]:
    """Returns the shapes of all groups by name; raises ValueError if they are malformed."""
    if len({*map(id, groups)}) != len(groups):  # a pickle can repeat one group a million times
        raise ValueError("param_shapes has the same group twice")
    for group in groups:
        for name, shape in group.items():
            if not isinstance(name, str) or not isinstance(shape, tuple) or not is_shape(shape):
                raise ValueError("param_shapes has an entry that is not a name and a shape")
    return groups


def _is_line(part: object) -> bool:
    """Returns True if an object is a one-dimensional float32 tensor."""
    return type(part) is Tensor and part.dtype == "F32" and len(part.shape) == 1


def _by_rank(directory: Path, pattern: str) -> list[Path]:
    """Returns the files that match a pattern, in the order of the processes that wrote them."""
    rank = lambda file: int((re.search(r"pp_rank_(\d+)", file.name) or ["", "0"])[1])
    found = sorted(directory.glob(pattern), key=rank)
    if not found:
        raise CheckpointError(f"{directory} has no file {pattern}")
    return found


def _cut(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    ranks: list[list[Tensor]],
    *,
    by_parameter: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the tensor of each parameter in one group.

    Args:
        directory: Directory of the checkpoint, for error messages.
        shapes: Shapes of the parameters, in the order of their values.
        ranks: For each process, one or more one-dimensional tensors with its part of the values.
        by_parameter: True if each parameter is divided among the processes (stage 3), False if the
            whole array is divided (stages 1 and 2).
    """
    stretches = ranks if by_parameter else [[part for line in ranks for part in line]]
    lines = [_Line.of(line) for line in stretches]
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        step = -(-size // len(lines))
        pieces: list[Tensor] = []
        for line, done in zip(lines, range(0, size, step or 1), strict=False):
            pieces += line.cut(name, at, min(step, size - done))
        at += step
        found = sum(math.prod(piece.shape) for piece in pieces)
        if found != size or not pieces:
            raise CheckpointError(
                f"{directory} has only {found} of the {size} values of {name:.200}; the checkpoint "
                "is incomplete"
            )
        first = pieces[0]
        yield name, Joined(name, first.file, first.dtype, shape, first.start, 4 * size, (*pieces,))
    for line in lines:
        # Stages 1 and 2 pad the whole array to a multiple of twice the number of processes. Stage 3
        # pads each parameter, and `at` already includes this padding.
        _refuse_surplus(line, at, 1 if by_parameter else 2 * len(ranks))


class _Line(NamedTuple):
    """One-dimensional tensors in order; `ends` is the number of values up to each tensor's end."""

    stretches: list[Tensor]
    ends: list[int]

    @classmethod
    def of(cls, stretches: list[Tensor]) -> "_Line":
        """Returns the line that consists of these tensors."""
        return cls(stretches, [*accumulate(math.prod(part.shape) for part in stretches)])

    def cut(self, name: str, start: int, size: int) -> Iterator[Tensor]:
        """Yields tensors with the name `name` for the values from `start` to `start + size`."""
        for index in range(bisect_right(self.ends, start), len(self.ends)):
            stretch = self.stretches[index]
            before = self.ends[index] - math.prod(stretch.shape)
            if before >= start + size:
                return
            first, last = max(start, before) - before, min(start + size, self.ends[index]) - before
            if first < last:
                offset, length = stretch.start + 4 * first, last - first
                yield Tensor(name, stretch.file, stretch.dtype, (length,), offset, 4 * length)


def _refuse_surplus(line: _Line, taken: int, align: int) -> None:
    """Raises CheckpointError for values after the parameters, padded to a multiple of `align`."""
    held, most = (line.ends or [0])[-1], -(-taken // align) * align
    if held > most:
        raise CheckpointError(
            f"{line.stretches[-1].file}: there are {held} values up to the end of this file; the "
            f"parameters in param_shapes take {taken} and padding takes {most - taken}, so "
            f"{held - most} values belong to no parameter"
        )
