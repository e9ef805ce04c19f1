"""`llava-jax collectives`: counts the bytes that the devices of a run exchange in a step."""

import argparse
import dataclasses
import math
import sys
from typing import Any

from llava_jax.distributed.environment import GIB, prepare_for_planning
from llava_jax.planning.devices import GPUS

PROG = "llava-jax collectives"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog=PROG,
        description="Compiles the train step of a run, with one micro-batch, for several numbers "
        "of GPUs, with all devices on the fsdp axis. Prints the GiB that each device exchanges "
        "with others, as compiled and by formula: for a gather the size of the result, for other "
        "collectives the size of the operands. Any field of the config can be set by an option, as "
        "in training.",
    )
    parser.add_argument("--config", required=True, help="a config file or the name of a preset")
    names = f"the device: {', '.join(GPUS)}"  # the bytes of TPUs cannot be counted
    parser.add_argument("--device", default="h100", help=names)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[8, 64, 256], help="numbers of devices"
    )
    parser.add_argument("--micro-size", type=int, default=2, help="samples of a device")
    given, rest = parser.parse_known_args(argv)
    prepare_for_planning(max(given.counts))

    import jax  # only after the environment is prepared

    from llava_jax.config import parse_config
    from llava_jax.planning.collectives import KINDS

    jax.config.update("jax_num_cpu_devices", max(given.counts))
    config = parse_config(["--config", given.config, *rest], prog=PROG)
    print(f"{given.config} on {given.device}, micro-batch {given.micro_size}, GiB a micro-batch")
    print(f"| devices | {' | '.join(KINDS)} |\n|{'---|' * (1 + len(KINDS))}")
    for count in given.counts:
        measured, expected = count_bytes(config, given.device, count, given.micro_size)
        for name, found in ((f"{count}", measured), (f"{count}, formula", expected)):
            cells = [f"{found[kind] / GIB:.3f}" for kind in KINDS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def count_bytes(config: Any, device: str, count: int, micro_size: int) -> tuple[Any, Any]:
    """Returns the bytes of a micro-batch by kind, first as compiled, then by formula."""
    from llava_jax.planning.collectives import collective_bytes
    from llava_jax.planning.measure import compile_for, sizes

    batch = dataclasses.replace(
        config.batch, global_size=micro_size * count, micro_size=micro_size, loss_group=1
    )
    config = dataclasses.replace(config, batch=batch)
    model = sizes(config)
    program, _, text = compile_for(config, model, device, count)
    return collective_bytes(text), formula(program, micro_size, config.data.max_length)


def formula(program: Any, rows: int, length: int) -> dict[str, int]:
    """Returns the bytes that a micro-batch needs, with remat "full" and all devices on fsdp.

    The matrices of a block are gathered in the forward pass, and again when the backward pass
    computes the block again. The same is true of the projector. The matrices of a frozen tower and
    of the head are gathered once. The gradients of all trained matrices are divided among the
    devices once. The embedding table is not gathered: its columns go to the devices that have the
    tokens, and their gradients come back if the table is trained. A matrix that cannot be divided
    is on all devices, and so is the sum of its gradients.
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
