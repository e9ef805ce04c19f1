"""What a run's step moves among its devices, as compiled and by formula: `--help`."""

import argparse
import dataclasses
import math
import sys
from typing import Any

from llava_jax.distributed.environment import GIB, prepare_for_planning
from llava_jax.planning.devices import GPUS
from llava_jax.planning.measure import compile_for, sizes


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="python tools/collectives.py",
        description="Compiles a run's train step, of one micro-batch, for growing numbers of GPUs "
        "with all devices on the fsdp axis, and prints the GiB that a device takes part in moving: "
        "of a gather the result, of other collectives the operands. Any field of the config can be "
        "overridden, as in training.",
    )
    parser.add_argument("--config", required=True, help="a config file")
    names = f"one of {', '.join(GPUS)}"  # what TPUs move cannot be counted
    parser.add_argument("--device", default="h100", help=names)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 64, 256], help="devices")
    parser.add_argument("--micro-size", type=int, default=2, help="samples a device")
    given, rest = parser.parse_known_args(argv)
    prepare_for_planning(max(given.counts))

    import jax  # not before the environment is prepared

    from llava_jax.config import parse_config
    from llava_jax.planning.collectives import KINDS

    jax.config.update("jax_num_cpu_devices", max(given.counts))
    config = parse_config(["--config", given.config, *rest])
    print(f"{given.config} on {given.device}, micro-batch {given.micro_size}, GiB a micro-batch")
    print(f"| devices | {' | '.join(KINDS)} |\n|{'---|' * (1 + len(KINDS))}")
    for count in given.counts:
        measured, expected = count_bytes(config, given.device, count, given.micro_size)
        for name, found in ((f"{count}", measured), (f"{count}, formula", expected)):
            cells = [f"{found[kind] / GIB:.3f}" for kind in KINDS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def count_bytes(config: Any, device: str, count: int, micro_size: int) -> tuple[Any, Any]:
    """Bytes by kind of one micro-batch: as compiled, and by formula."""
    from llava_jax.planning.collectives import collective_bytes

    batch = dataclasses.replace(
        config.batch, global_size=micro_size * count, micro_size=micro_size, loss_group=1
    )
    config = dataclasses.replace(config, batch=batch)
    model = sizes(config)
    program, _, text = compile_for(config, model, device, count)
    return collective_bytes(text), formula(program, micro_size, config.data.max_length)


def formula(program: Any, rows: int, length: int) -> dict[str, int]:
    """What must be moved for a micro-batch where remat is "full" and all devices are on fsdp.

    A block's matrices are gathered forwards, and again when the backward pass computes the block
    again; so are the projector's. Those of a frozen tower are gathered once, as is the head. The
    gradients of all matrices that train are divided among the devices once. The table of embeddings
    stays where it is: its columns go to the devices whose tokens they are of, and their gradients
    back, if it trains. A matrix that the devices do not divide is on all of them, and the sum of
    its gradients too.
    """
    from llava_jax.models.paths import is_stacked

    item = program.dtype.itemsize
    size = {path: item * math.prod(leaf.shape) for path, leaf in program.abstract.items()}
    trained = set(program.trainable)
    lies_on_fsdp = lambda path: "fsdp" in str(program.abstract[path].sharding.spec)
    matrices = [path for path in size if program.abstract[path].ndim > 1 + is_stacked(path)]
    shared = [path for path in matrices if path in trained and not lies_on_fsdp(path)]
    matrices = list(filter(lies_on_fsdp, matrices))
    part = lambda *names: sum(size[path] for path in matrices if path.startswith(names))
    unused = ("vision.encoder.tail.", "vision.head.")
    vision = [path for path in matrices if path.startswith("vision.")]
    vision = [path for path in vision if not path.startswith(unused)]
    turns = 2 if trained & set(vision) else 1
    gathered = 2 * part("llm.layers.", "projector.") + turns * sum(size[path] for path in vision)
    gathered += part("llm.lm_head.") or part("llm.embed_tokens.")
    table = "llm.embed_tokens.weight"
    divided = sum(size[path] for path in matrices if path in trained and path != table)
    tokens = rows * length * item * program.abstract[table].shape[1]
    return {
        "all-gather": gathered,
        "reduce-scatter": divided,
        "all-reduce": sum(size[path] for path in shared),
        "all-to-all": tokens * (2 if table in trained else 1),
        "collective-permute": 0,
    }


if __name__ == "__main__":
    sys.exit(main())
