"""Reads a whole data set as a run does, and finds the samples that the run would skip."""

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
"""Number of records that a worker process reads at a time."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The reason why a sample cannot be used.

    Attributes:
        sample: Index of the sample.
        where: File of the sample, and its line, record or row in the file.
        kind: Kind of the problem; see `SampleError.kind`.
        reason: Full description of the problem.
    """

    sample: int
    where: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """Sizes of the N samples of a data set, and the problems that were found.

    Attributes:
        tokens: int32 [N]. Number of tokens in each sample after truncation; 0 if its text cannot be
            used.
        learned: int32 [N]. Number of these tokens that are targets.
        images: int32 [N]. Number of images in each sample.
        cut: int32 [N]. Number of tokens that truncation removed.
        problems: Problems of the bad samples, one for each.
    """

    tokens: Int32[np.ndarray, " N"]
    learned: Int32[np.ndarray, " N"]
    images: Int32[np.ndarray, " N"]
    cut: Int32[np.ndarray, " N"]
    problems: list[Problem]

    @property
    def good(self) -> Bool[np.ndarray, " N"]:
        """Returns a mask, bool [N], of the samples that a run learns from."""
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
    """Reads the texts and images of all records, and keeps only sizes and problems.

    Args:
        records: Records of the data set.
        encoder: Encoder of the run.
        workers: Number of processes that read; 0 reads in a thread of this process.
        advance: Function that is called with the number of records that were read since its last
            call.

    Raises:
        RunError: A worker process died. The message names the record that it was reading.
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
    """Reads the chunk of records with a given number; returns their sizes, and problems as JSON."""

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
    """Returns the records if `write_clean` can write them.

    Raises:
        ConfigError: The records are not all from JSON files, or are from several data sets.
    """
    if isinstance(records, FileRecords) and all(isinstance(f, JsonFile) for f in records.files):
        return records
    raise ConfigError(
        "only records of JSON lists or JSON lines can be written, and only of one data set at a "
        "time; for other data, use --json, which lists the samples to leave out"
    )


def write_clean(records: FileRecords, findings: Findings, path: Path) -> None:
    """Writes the good records as JSON lines, with the content that they have in their files."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        for number in np.flatnonzero(findings.good).tolist():
            file.write(json.dumps(records.read_raw(number)) + "\n")
    os.replace(unfinished, path)
