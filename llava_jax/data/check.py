"""Reads a whole data set as a run does, and tells which samples it would leave out."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from llava_jax.data.batching import SampleEncoder, worker_died
from llava_jax.data.conversation import SampleError
from llava_jax.data.json_file import JsonFile
from llava_jax.data.sources import FileRecords, Records
from llava_jax.data.workers import WorkerError, read_ahead, write_progress
from llava_jax.errors import ConfigError

_CHUNK = 64
"""Records that a worker process reads at a time."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a sample.

    Attributes:
        sample: Its number.
        where: Its file, and its line, record or row there.
        kind: The same as `SampleError.kind`.
        reason: All about it.
    """

    sample: int
    where: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """What N samples are like.

    Attributes:
        tokens: Length of each sample, cut to the longest that is used; 0 where the text is bad.
        learned: How many of these are targets.
        images: Number of images of each sample.
        cut: Tokens that the cut took away.
        problems: A problem of each bad sample.
    """

    tokens: Int32[np.ndarray, " N"]
    learned: Int32[np.ndarray, " N"]
    images: Int32[np.ndarray, " N"]
    cut: Int32[np.ndarray, " N"]
    problems: list[Problem]

    @property
    def good(self) -> Bool[np.ndarray, " N"]:
        """Which samples a run learns from."""
        good = np.ones(len(self.tokens), bool)
        good[[problem.sample for problem in self.problems]] = False
        return good


def check(
    records: Records,
    encoder: SampleEncoder,
    *,
    workers: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Findings:
    """Reads every record, its text and its images, and remembers only numbers and problems.

    Args:
        records: The data set.
        encoder: The run's.
        workers: Processes that read; 0 reads in a thread of this one.
        advance: Called with the number of records that were read since the last call.

    Raises:
        RunError: A worker process died; names the record that it was at.
        ConfigError: A data file changed, or the template does not fit the tokenizer.
    """
    chunks = read_ahead(
        _Check(records, encoder), 0, workers, stop=-(-len(records) // _CHUNK), most_bytes=2**20
    )
    parts: list[np.ndarray] = []
    problems: list[Problem] = []
    try:
        for rows, found in chunks:
            parts.append(rows)
            for number, kind, reason in json.loads(found.tobytes()):
                problems.append(Problem(number, records.where(number), kind, reason))
            advance(len(rows))
    except WorkerError as error:
        raise worker_died(error, records) from error
    finally:
        chunks.close()
    tokens, learned, images, cut = np.concatenate(parts).T
    return Findings(tokens, learned, images, cut, problems)


@dataclasses.dataclass(frozen=True)
class _Check:
    """Number of a chunk -> a row of numbers for each record, and the problems as JSON's bytes."""

    records: Records
    encoder: SampleEncoder

    def __call__(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.records)))
        rows = np.zeros((len(numbers), 4), np.int32)
        problems = []
        for row, number in zip(rows, numbers, strict=True):
            write_progress(number)
            try:
                record = self.records[number]
                encoded = self.encoder.encode_text(record)
                length, learned = len(encoded.input_ids), int(encoded.loss_mask.sum())
                row[:] = length, learned, len(record.images), encoded.cut
                self.encoder.add_images(record, encoded)
            except SampleError as error:
                problems.append((number, error.kind, str(error)))
        return rows, np.frombuffer(json.dumps(problems).encode(), np.uint8)


def only_json(records: Records) -> FileRecords:
    """The records, if `write_clean` can write them.

    Raises:
        ConfigError: It cannot.
    """
    if isinstance(records, FileRecords) and all(isinstance(f, JsonFile) for f in records.files):
        return records
    raise ConfigError(
        "only records of JSON lists or lines can be written, and of one data set at a time; of "
        "other data, --json names the samples to leave out"
    )


def write_clean(records: FileRecords, findings: Findings, path: Path) -> None:
    """Writes the good records as JSON lines, each as its file has it."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        for number in np.flatnonzero(findings.good).tolist():
            file.write(json.dumps(records.read_raw(number)) + "\n")
    os.replace(unfinished, path)
