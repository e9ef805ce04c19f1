"""Checks that all processes of a run have the same config, software, data and output_dir."""

import dataclasses
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, cast

import jax
from tokenizers import Tokenizer

from llava_jax.config import MAY_DIFFER, Json, ModelConfig, TrainConfig, flatten, to_json
from llava_jax.data.order import NO_RECORD
from llava_jax.data.sources import Records
from llava_jax.disk import naming
from llava_jax.distributed.environment import hash_code, versions
from llava_jax.distributed.multihost import (
    all_gather_values,
    broadcast_from_main,
    differences,
    is_main_process,
    this_process,
)
from llava_jax.errors import ConfigError, RunError
from llava_jax.jax_compat import COMPILER_VARIABLES
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.training.inputs import Inputs

_OPTIONS = (
    *("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
"""Options of JAX that can change results."""

_TOKEN_SECONDS = 5
"""Seconds after which a new file is visible on all machines that share a disk."""

_MAX_LINES = 40
"""Maximum number of differences that an error lists."""


def run_facts(
    config: TrainConfig,
    model: ModelConfig,
    steps: int,
    fingerprint: str | None,
    inputs: Inputs,
    digest: Json,
) -> Json:
    """Returns all facts that determine what a run computes, by name, without using a device.

    All processes must call this, because the processes exchange the names of the images that they
    have read.

    Args:
        config: Config of the run.
        model: Sizes and token ids of the model.
        steps: Number of optimizer steps of the whole run.
        fingerprint: Fingerprint of the base model; None if there is no base model.
        inputs: Inputs of the run.
        digest: Digests of the data, from `Inputs.digest`.
    """
    fields = flatten(to_json(dataclasses.replace(config, steps=steps, model=model)), MAY_DIFFER)
    images = _image_facts("", digest["train"])
    images |= _image_facts("eval ", digest["eval"])
    # Only images that every process has read can be compared.
    read_by_all = set.intersection(*map(set, all_gather_values([*images])))
    tokenizer = cast("Tokenizer", inputs.tokenizer.backend_tokenizer)
    return fields | {
        "the base's fingerprint": fingerprint,
        **_adapter_facts(config.init_adapter),
        **_data_facts("", inputs.records, digest["train"]),
        **_data_facts("eval ", inputs.eval_records, digest["eval"]),
        **{name: images[name] for name in read_by_all},
        "the order of the samples": inputs.order.identity,
        "the tokenizer's checksum": _crc(tokenizer.to_str()),
        "the image transform": repr(inputs.encoder.transform),
        **{f"the version of {name}": version for name, version in versions().items()},
        "the source of llava_jax": hash_code(),
        **{name: os.environ.get(name) for name in COMPILER_VARIABLES},
        **{name: getattr(jax.config, name) for name in _OPTIONS},
    }


def agree(facts: Json, *found: str) -> None:
    """Raises ConfigError unless all processes have the same facts. All processes must call this.

    Args:
        facts: Facts by name, as a JSON object.
        found: One line of text for each difference that is already known.

    Raises:
        ConfigError: A fact differs between processes, or `found` is not empty.
    """
    if lines := [*found, *differences(facts)]:
        more = [f"  and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
        raise ConfigError(
            "\n".join(
                [
                    "the processes of this run have different settings, software or data, so all "
                    f"of them stop; this is {this_process()}",
                    *lines[:_MAX_LINES],
                    *more,
                    "start all processes with the same command, environment, software, data and "
                    "output_dir",
                ]
            )
        )


def refuse_texts(inputs: Inputs, records: Records, numbers: Sequence[int]) -> NoReturn:
    """Raises an error that lists the records whose texts differ between processes.

    All processes must call this.

    Args:
        inputs: Inputs of the run.
        records: Training data or eval data.
        numbers: Indices of the records in the batch whose checksum differs between processes.

    Raises:
        RunError: Always.
    """
    texts = {}
    for number in numbers:
        if number != NO_RECORD:
            texts[f"the text of {records.where(number)}"] = inputs.describe_text(number, records)
    again = "  the texts are the same when they are read again; a disk may have failed"
    lines = differences(texts) or [again]
    raise RunError(
        "the processes of this run have read different texts, so all of them stop; this is "
        f"{this_process()}\n"
        + "\n".join(lines[:_MAX_LINES])
        + "\ncorrect the data on the machines where it is wrong; the same command then continues "
        "the run"
    )


def _data_facts(kind: str, records: Records, digest: list[Json]) -> Json:
    """Returns the number of records, and the digests of the files of each data set, by name."""
    facts: Json = {f"the number of {kind}samples": len(records)}
    for number, source in enumerate(digest):
        files = [[count, digest] for _, count, digest in source["files"]]
        facts[f"{kind}data set {number}, records and digest of each file"] = files
    return facts


def _image_facts(kind: str, digest: list[Json]) -> dict[str, str]:
    """Returns the sizes and checksums of the image files that could be read, by name."""
    return {
        f"{kind}image {name}": image
        for source in digest
        for name, image in source["images"].items()
    }


def _adapter_facts(directory: str | None) -> Json:
    """Returns a checksum of each file of an adapter, computed from a sample of each tensor."""
    facts = {}
    for file in sorted(Path(directory).rglob("*.safetensors")) if directory else ():
        tensors = open_tensors(file).items()
        facts[f"the checksum of init_adapter's {file.name}"] = _crc(
            repr([(name, t.dtype, t.shape, t.sample()) for name, t in tensors])
        )
    return facts


def _crc(text: str) -> str:
    """Returns the CRC-32 of a text as 8 hexadecimal digits."""
    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def not_shared(output_dir: Path) -> list[str]:
    """Finds the processes that do not share the output_dir of process 0.

    All processes must call this. Process 0 creates a file in its output_dir, and the other
    processes look for the file.

    Args:
        output_dir: Directory that contains the directories of all runs.

    Returns:
        One line of text for each process that does not find the file.

    Raises:
        OSError: Process 0 cannot write to its output_dir.
    """
    token = output_dir / f".shared-{broadcast_from_main(secrets.token_hex(8))}"
    if is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
        with naming(token):
            token.touch()
    written = broadcast_from_main(str(output_dir.absolute()))
    until = time.monotonic() + _TOKEN_SECONDS
    while not (found := token.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    lacking = all_gather_values(None if found else str(output_dir.absolute()))
    if is_main_process():
        token.unlink(missing_ok=True)
    return [
        f"  all processes must share one output_dir: process 0 wrote a file into {written}, but "
        f"process {number} does not find the file in {directory}"
        for number, directory in enumerate(lacking)
        if directory is not None
    ]
