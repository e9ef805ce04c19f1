"""All processes of a run must run the same: what they compare, and what they say if they do not."""

import dataclasses
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import jax
from tokenizers import Tokenizer

from llava_jax.config import ModelConfig, TrainConfig, to_json
from llava_jax.data.order import NO_RECORD
from llava_jax.data.sources import Records
from llava_jax.disk import naming
from llava_jax.distributed.environment import versions
from llava_jax.distributed.multihost import (
    all_gather_values,
    broadcast_from_main,
    differences,
    is_main_process,
    this_process,
)
from llava_jax.errors import ConfigError, RunError
from llava_jax.jax_compat import COMPILER_VARIABLES
from llava_jax.planning.cache import hash_code
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.training.inputs import Inputs
from llava_jax.training.run_config import PATH_FIELDS, flatten

LOCAL = (*PATH_FIELDS, "data.workers")
"""Fields of a config that may differ: where files lie on a machine, how many cores it has."""

_OPTIONS = (
    *("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
_TOKEN_SECONDS = 5
"""All machines of a shared disk see a new file in so long."""

_MOST_LINES = 40


def run_facts(
    config: TrainConfig, model: ModelConfig, steps: int, fingerprint: str | None, inputs: Inputs
) -> dict[str, Any]:
    """All that decides what a run does, by name; found without a device. All must ask.

    Args:
        config: The run.
        model: The model's sizes.
        steps: Optimizer steps of the whole run.
        fingerprint: Of the base; None without one.
        inputs: The data.
    """
    fields = flatten(to_json(dataclasses.replace(config, steps=steps, model=model)), LOCAL)
    of_images = _of_images("", inputs.digest["train"])
    of_images |= _of_images("held-out ", inputs.digest["eval"])
    read_by_all = set.intersection(*map(set, all_gather_values([*of_images])))
    tokenizer = cast("Tokenizer", inputs.tokenizer.backend_tokenizer)
    return fields | {
        "the base's fingerprint": fingerprint,
        **_of_adapter(config.init_adapter),
        **_of_data("", inputs.records, inputs.digest["train"]),
        **_of_data("held-out ", inputs.eval_records, inputs.digest["eval"]),
        **{name: of_images[name] for name in read_by_all},
        "the order of the samples": inputs.order.identity,
        "the tokenizer's checksum": _crc(tokenizer.to_str()),
        "the image transform": repr(inputs.encoder.transform),
        **{f"the version of {name}": version for name, version in versions().items()},
        "the source of llava_jax": hash_code(),
        **{name: os.environ.get(name) for name in COMPILER_VARIABLES},
        **{name: getattr(jax.config, name) for name in _OPTIONS},
    }


def agree(facts: dict[str, Any], *found: str) -> None:
    """Compares facts among all processes, which must all ask.

    Args:
        facts: By name; JSON can hold them.
        found: Differences that are known already, a line each.

    Raises:
        ConfigError: There are differences.
    """
    if lines := [*found, *differences(facts)]:
        more = [f"  and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        raise ConfigError(
            "\n".join(
                [
                    f"the processes of this run differ, so all end; this is {this_process()}",
                    *lines[:_MOST_LINES],
                    *more,
                    "give all the same command, environment, software, data and output_dir",
                ]
            )
        )


def refuse_texts(inputs: Inputs, records: Records, numbers: Sequence[int]) -> NoReturn:
    """Says of which records processes read different texts. All must ask.

    Args:
        inputs: The data.
        records: Training data or held-out data.
        numbers: Of the records in the batch that was not the same for all.

    Raises:
        RunError: Always.
    """
    texts = {}
    for number in numbers:
        if number != NO_RECORD:
            texts[f"{records.where(number)}, as tokens"] = inputs.describe_text(number, records)
    lines = differences(texts) or ["  none when they are read once more; did a disk fail?"]
    raise RunError(
        f"the processes of this run read different texts, so all end; this is {this_process()}\n"
        + "\n".join(lines[:_MOST_LINES])
        + "\nmend the data where it is wrong; the same command then continues"
    )


def _of_data(kind: str, records: Records, digest: list[dict[str, Any]]) -> dict[str, Any]:
    """What tells data apart, by name."""
    facts: dict[str, Any] = {f"the number of {kind}samples": len(records)}
    for number, source in enumerate(digest):
        files = [[count, digest] for _, count, digest in source["files"]]
        facts[f"{kind}data set {number}, records and digest of each file"] = files
    return facts


def _of_images(kind: str, digest: list[dict[str, Any]]) -> dict[str, str]:
    """Sizes and checksums of the image files that could be read, by name."""
    return {
        f"{kind}image {name}": image
        for source in digest
        for name, image in source["images"].items()
    }


def _of_adapter(place: str | None) -> dict[str, Any]:
    """A digest of an adapter's tensors, of a part of each as a fingerprint has."""
    facts = {}
    for file in sorted(Path(place).rglob("*.safetensors")) if place else ():
        tensors = open_tensors(file).items()
        facts[f"the checksum of init_adapter's {file.name}"] = _crc(
            repr([(name, t.dtype, t.shape, t.sample()) for name, t in tensors])
        )
    return facts


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def not_shared(output_dir: Path) -> list[str]:
    """Which processes do not find in output_dir what the first one writes there; all must ask.

    Raises:
        OSError: The first cannot write there.
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
        f"  output_dir, which all must share: what process 0 writes into {written} is not in "
        f"{place} of process {number}"
        for number, place in enumerate(lacking)
        if place is not None
    ]
