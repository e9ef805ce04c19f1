"""Reads a whole data set like a training run, and finds the samples that the run would skip."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from llava_jax.data.batching import worker_died
from llava_jax.data.json_file import JsonFile
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import FileRecords, Records
from llava_jax.data.workers import WorkerError, read_ahead, write_progress
from llava_jax.errors import ConfigError, SampleError

_CHUNK = 64
"""Number of records that a worker process reads at a time."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The reason why a sample cannot be used for training.

    Attributes:
        sample: Index of the sample in the data set.
        where: Location of the sample: the file, and the line, record or row in the file.
        kind: Kind of the problem; see `SampleError.kind`.
        reason: Full description of the problem.
    """

    sample: int
    where: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """Sizes of the N samples of a data set, and the problems of the bad samples.

    Attributes:
        tokens: int32 [N]. Number of tokens in each sample after truncation; 0 if the text of the
            sample cannot be used.
        learned: int32 [N]. Number of tokens in each sample that are training targets.
        images: int32 [N]. Number of images in each sample.
        slots: int32 [N]. Number of image slots of each sample after truncation.
        cut: int32 [N]. Number of tokens that truncation removed from each sample.
        deep: int32 [N]. Number of images in each sample with more than 8 bits per channel.
        turned: int32 [N]. Number of images in each sample that are turned upright because of their
            Exif orientation.
        dark: int32 [N]. Number of images in each sample with more than 8 bits per channel that are
            nearly black in 8 bits.
        problems: One problem for each bad sample.
    """

    tokens: Int32[np.ndarray, " N"]
    learned: Int32[np.ndarray, " N"]
    images: Int32[np.ndarray, " N"]
    slots: Int32[np.ndarray, " N"]
    cut: Int32[np.ndarray, " N"]
    deep: Int32[np.ndarray, " N"]
    turned: Int32[np.ndarray, " N"]
    dark: Int32[np.ndarray, " N"]
    problems: list[Problem]

    @property
    def good(self) -> Bool[np.ndarray, " N"]:
        """Returns a mask, bool [N], which is True for each sample without a problem."""
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
    """Reads the text and the images of each record, and returns only sizes and problems.

    Args:
        records: Records of the data set.
        encoder: Encoder that the run uses.
        workers: Number of worker processes that read records; 0 reads them in a thread of this
            process.
        advance: Function that is called with the number of records that were read since the
            previous call.

    Raises:
        RunError: A worker process died. The message names the record that the process was reading.
        ConfigError: A data file changed after it was opened, or the tokenizer lacks a control token
            of the template.
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
    return Findings(*np.concatenate(parts).T, problems=problems)


@dataclasses.dataclass(frozen=True)
class _Check:
    """Callable that reads one chunk of records; returns their sizes, and their problems as JSON."""

    records: Records
    encoder: SampleEncoder

    def __call__(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.records)))
        rows = np.zeros((len(numbers), 8), np.int32)
        problems = []
        for row, number in zip(rows, numbers, strict=True):
            write_progress(number)
            try:
                record = self.records[number]
                encoded = self.encoder.encode_text(record)
                length, learned = len(encoded.input_ids), int(encoded.loss_mask.sum())
                row[:5] = length, learned, len(record.images), sum(encoded.slots), encoded.cut
                row[5:] = np.sum(self.encoder.add_images(record, encoded).kinds, axis=0)
            except SampleError as error:
                problems.append((number, error.kind, str(error)))
        return rows, np.frombuffer(json.dumps(problems).encode(), np.uint8)


def only_json(records: Records) -> FileRecords:
    """Returns the records unchanged if `write_clean` can write them.

    Raises:
        ConfigError: Some records are not from JSON files, or the records are from several data
            sets.
    """
    if isinstance(records, FileRecords) and all(isinstance(f, JsonFile) for f in records.files):
        return records
    raise ConfigError(
        "--write-clean can only write records of JSON files (lists or JSON lines), and only of one "
        "data set at a time; for other data, use --json FILE, which lists the bad samples"
    )


def write_clean(records: FileRecords, findings: Findings, path: Path) -> None:
    """Writes the records without problems, unchanged, to a file of JSON lines."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        for number in np.flatnonzero(findings.good).tolist():
            file.write(json.dumps(records.read_raw(number)) + "\n")
    os.replace(unfinished, path)
