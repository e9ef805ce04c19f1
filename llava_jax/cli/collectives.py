"""Implements `llava-jax collectives`, which counts the bytes that devices exchange in a step."""

import argparse
import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from llava_jax.cli.arguments import Parser, at_least_one, report_errors
from llava_jax.distributed.environment import GIB, prepare_for_planning
from llava_jax.planning.devices import GPUS

if TYPE_CHECKING:
    import jax

    from llava_jax.config import TrainConfig
    from llava_jax.distributed.disk_weights import DiskStack
    from llava_jax.models.quant import Quantised

PROG = "llava-jax collectives"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 for a user's mistake."""
    parser = Parser(
        prog=PROG,
        description="Compiles the train step of a run for several numbers of GPUs. The step has "
        "one micro-batch, and all GPUs are on the mesh axes fsdp and sequence. Prints how many GiB "
        "each GPU exchanges with the others: first measured in the compiled step, then computed by "
        "a formula. The size of an all-gather is the size of its result, and the size of any other "
        "collective is the size of its operands. Like llava-jax train, the command also accepts an "
        "option for every field of the config.",
    )
    parser.add_argument("--config", required=True, help="config file or name of a preset")
    # TPUs are not in the list, because the bytes of their collectives cannot be counted.
    names = "type of the GPUs (default: %(default)s)"
    parser.add_argument("--device", choices=GPUS, default="h100", help=names)
    counts = "numbers of GPUs to compile for (default: 8 64 256)"
    parser.add_argument("--counts", type=at_least_one, nargs="+", default=[8, 64, 256], help=counts)
    micro = "number of samples in a micro-batch on each GPU (default: %(default)s)"
    parser.add_argument("--micro-size", type=at_least_one, default=2, help=micro)
    given, rest = parser.parse_known_args(argv)
    prepare_for_planning()

    import jax  # must be imported after the environment is prepared

    from llava_jax.config import parse_config

    jax.config.update("jax_num_cpu_devices", max(given.counts))
    return report_errors(
        lambda: show(given, parse_config(["--config", given.config, *rest], prog=PROG))
    )


def show(given: argparse.Namespace, config: "TrainConfig") -> int:
    """Prints the table and returns the exit status 0.

    Args:
        given: Arguments of the command.
        config: Config of the run.
    """
    from llava_jax.planning.collectives import KINDS

    print(f"{given.config} on {given.device}, micro-batch {given.micro_size}, GiB per micro-batch")
    print(f"| devices | {' | '.join(KINDS)} |\n|{'---|' * (1 + len(KINDS))}")
    for count in given.counts:
        measured, expected = count_bytes(config, given.device, count, given.micro_size)
        for name, found in ((f"{count}", measured), (f"{count}, formula", expected)):
            cells = [f"{found[kind] / GIB:.3f}" for kind in KINDS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def count_bytes(config: "TrainConfig", device: str, count: int, micro_size: int) -> tuple[Any, Any]:
    """Counts the bytes that each device exchanges in a micro-batch, by kind of collective.

    Args:
        config: Config of the run.
        device: Name of the device type.
        count: Number of devices.
        micro_size: Number of samples in a micro-batch on each device.

    Returns:
        The bytes in the compiled step, and the bytes that `formula` computes.
    """
    import jax

    from llava_jax.distributed.sharding import data_parallel_size, make_mesh
    from llava_jax.planning.collectives import collective_bytes
    from llava_jax.planning.compile import compile_for, slots_per_row
    from llava_jax.planning.model_sizes import sizes

    shares = data_parallel_size(make_mesh(config.mesh, jax.devices()[:count]))
    batch = dataclasses.replace(
        config.batch, global_size=micro_size * shares, micro_size=micro_size, loss_group=1
    )
    config = dataclasses.replace(config, batch=batch)
    model = sizes(config)
    program, step = compile_for(config, model, device, count)
    images = micro_size * slots_per_row(config, model)
    return collective_bytes(step.text), formula(program, config, micro_size, images)


def gathered_bytes(leaf: "jax.ShapeDtypeStruct | DiskStack | Quantised", item: int) -> int:
    """Returns the bytes of a parameter on a device that has gathered the parts of all devices.

    Arrays that each device has as a whole are not counted.

    Args:
        leaf: Shape and sharding of the parameter, which may be quantized or on disk.
        item: Size in bytes of a weight, unless it is quantized.
    """
    import jax

    from llava_jax.distributed.disk_weights import DiskStack

    def is_divided(array: "jax.ShapeDtypeStruct | DiskStack") -> bool:
        spec, sizes = array.sharding.spec, array.sharding.mesh.shape
        names = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
        return any(sizes[name] > 1 for name in sum(names, ()) if name != "tensor")

    if isinstance(leaf, jax.ShapeDtypeStruct | DiskStack):
        return item * math.prod(leaf.shape) if is_divided(leaf) else 0
    arrays = filter(is_divided, jax.tree.leaves(leaf))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def formula(program: Any, config: "TrainConfig", rows: int, images: int) -> dict[str, int]:
    """Returns the bytes that each device must exchange in a micro-batch, by kind of collective.

    The formula is for memory.remat "full" with all devices on the axes fsdp and sequence. The
    matrices of the decoder blocks and of the projector are gathered in the forward pass, and again
    in the backward pass, which repeats the forward pass of each block. The matrices of a frozen
    vision tower and of the output layer are gathered once. The gradients of all trained matrices
    are reduced and scattered once. The embedding table is not gathered: its columns are sent to the
    devices that have the tokens, along one mesh axis after the other, and the gradients of the
    columns are sent back if the table is trained. A matrix that cannot be sharded is on all
    devices, and its gradients are summed over all devices.

    The formula is a lower bound in two cases. Quantized weights are counted with their codes and
    scales, but XLA gathers the attention weights after they are converted to `dtype`. And streamed
    weights and weights on disk are gathered again for each chunk of tokens, except if `sequence`
    divides the tokens.

    If the tokens of a row are divided, queries, keys, values and the result of attention are sent
    three times: in both forward passes, and as gradients. The features of all images of the rows
    are gathered, and their gradients are reduced and scattered, because the projector is trained.
    This is for a number of images that `sequence` divides; other images are computed by all these
    devices together, in ways that XLA chooses.

    Args:
        program: Program of the run.
        config: Config of the run.
        rows: Number of rows of a micro-batch on each device.
        images: Number of image slots of these rows.
    """
    import jax.numpy as jnp

    from llava_jax.data.batch import round_up
    from llava_jax.models.paths import is_stacked

    item, model = jnp.dtype(config.dtype).itemsize, program.model_config
    fsdp, sequence = (program.mesh.shape[axis] for axis in ("fsdp", "sequence"))
    trained = set(program.trainable)
    is_matrix = lambda path, leaf: len(leaf.shape) > 1 + is_stacked(path)
    matrices = {path: leaf for path, leaf in program.abstract.items() if is_matrix(path, leaf)}
    size = {path: gathered_bytes(leaf, item) for path, leaf in matrices.items()}
    shared = [matrices[path] for path in size if path in trained and not size[path]]
    part = lambda *names: sum(size[path] for path in size if path.startswith(names))
    unused = ("vision.encoder.tail.", "vision.head.")
    vision = [path for path in size if path.startswith("vision.")]
    vision = [path for path in vision if not path.startswith(unused)]
    turns = 2 if trained & set(vision) else 1
    gathered = 2 * part("llm.layers.", "projector.") + turns * sum(size[path] for path in vision)
    gathered += part("llm.lm_head.") or part("llm.embed_tokens.")
    table = "llm.embed_tokens.weight"
    divided = sum(size[path] for path in size if path in trained and path != table)
    tokens = rows * round_up(config.data.max_length, sequence) // sequence
    embedded = item * tokens * model.llm.hidden_size * ((fsdp > 1) + (sequence > 1))
    exchanged, features = 0, 0
    if sequence > 1:
        heads = model.llm.num_attention_heads, model.llm.num_key_value_heads
        heads_sent = 2 * (heads[0] + math.lcm(heads[1], sequence))
        exchanged = 3 * model.llm.num_hidden_layers * item * tokens * heads_sent
        exchanged *= model.llm.head_dim
        features = item * images * model.image_tokens * model.llm.hidden_size
    return {
        "all-gather": gathered + features,
        "reduce-scatter": divided + features,
        "all-reduce": item * sum(math.prod(leaf.shape) for leaf in shared),
        "all-to-all": embedded * (2 if table in trained else 1) + exchanged,
        "collective-permute": 0,
    }


if __name__ == "__main__":
    sys.exit(main())
