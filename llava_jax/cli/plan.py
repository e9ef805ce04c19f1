"""Implements `llava-jax plan`, which computes whether a run fits into the memory of a device."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llava_jax.distributed.environment import GIB, prepare_for_planning
from llava_jax.planning.devices import GPUS, TPUS

if TYPE_CHECKING:
    from llava_jax.config import ModelConfig, TrainConfig
    from llava_jax.planning.measure import Usage
    from llava_jax.planning.search import Plan, Trial

PROG = "llava-jax plan"
MAX_DEVICES = 64  # largest number of devices to try if --count devices are not enough


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 if the run fits, 3 if the run does not fit, or 1 for a user's mistake.
    """
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Compiles the train step of a run for a device and prints how much memory the "
        "step needs. This machine does not need to have such a device. Every field of the config "
        "can be set by an option, as for llava-jax train. The exit status is 0 if the run fits "
        "into the memory, 3 if it does not fit, and 1 if there is a mistake in the arguments.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="config file or name of a preset")
    rows = "print the rows of the table in docs/memory.md that have --count devices"
    what.add_argument("--table", action="store_true", help=rows)
    names = f"type of the devices: {', '.join([*GPUS, *TPUS])} (default: %(default)s)"
    parser.add_argument("--device", default="rtx3090", help=names)
    parser.add_argument("--count", type=int, default=1, help="number of devices (default: 1)")
    parser.add_argument(
        "--memory",
        type=float,
        help="memory of one device in GiB (default: the memory of this type of device)",
    )
    parser.add_argument(
        "--host-memory", type=float, help="host memory for all devices together, in GiB"
    )
    fit = "search for the fastest plan that fits; always on if memory.plan of the config is auto"
    parser.add_argument("--fit", action="store_true", help=fit)
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--chart", type=Path, help="PNG file to draw the figures to, as bars")
    given, rest = parser.parse_known_args(argv)
    prepare_for_planning(given.count)

    import jax  # only after the environment is prepared

    from llava_jax.config import parse_config
    from llava_jax.errors import CheckpointError, ConfigError

    jax.config.update("jax_num_cpu_devices", max(given.count, MAX_DEVICES))
    try:
        if given.table:
            return table(given)
        return plan(given, parse_config(["--config", given.config, *rest], prog=PROG))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def plan(given: argparse.Namespace, config: "TrainConfig") -> int:
    """Finds the plan, prints the memory that it needs and writes the files that the user named.

    Args:
        given: Arguments of the command.
        config: Config of the run.

    Returns:
        0 if the run fits into the memory, 3 if the run does not fit.
    """
    import jax

    from llava_jax.distributed.sharding import data_parallel_size, make_mesh
    from llava_jax.planning import measure as measuring
    from llava_jax.planning import search
    from llava_jax.train_step.step import micro_size

    model = measuring.sizes(config)
    capacity = None if given.memory is None else int(given.memory * GIB)
    for_host = given.host_memory
    measure = lambda plan, count=given.count: dataclasses.replace(
        measuring.measure(plan.apply(config), model, given.device, count, capacity),
        host_capacity=None if for_host is None else int(for_host * GIB) // count,
    )
    kind = measuring.attention_for(config, model, measuring.find_device(given.device))
    print(f"attention: {kind}", flush=True)
    mesh = make_mesh(config.mesh, jax.devices()[: given.count])
    searches = given.fit or config.memory.plan == "auto"
    if searches:
        chosen = search.choose_plan(config, data_parallel_size(mesh), measure)
    else:
        wanted = search.Plan(micro_size(config.batch, mesh), config.memory)
        chosen = search.Trial(wanted, measure(wanted))
    print(f"{given.config} on {given.count} x {given.device}: {chosen.plan}")
    print(measuring.usage_table(chosen.usage))
    print(compare_flops(chosen, config, model, given.count))
    if searches and not chosen.usage.fits:
        print(devices_that_would(chosen.plan, measure, given.count))
    figures = {"plan": dataclasses.asdict(chosen.plan), **dataclasses.asdict(chosen.usage)}
    figures["fits"] = chosen.usage.fits
    write(given, figures, [(str(chosen.plan), chosen.usage)])
    return 0 if chosen.usage.fits else 3


def compare_flops(chosen: "Trial", config: "TrainConfig", model: "ModelConfig", count: int) -> str:
    """Returns a line that compares the FLOPs of the compiled step with those the model needs.

    Args:
        chosen: Plan, and what its compiled step uses.
        config: Config of the run.
        model: Sizes of the model.
        count: Number of devices.
    """
    from llava_jax.data.packing import images_in_row
    from llava_jax.planning.model_flops import full_row, model_flops

    config = chosen.plan.apply(config)
    images = 1 if config.data.max_images is None else config.data.max_images
    row = full_row(config, images_in_row(config.data, model, images))
    needed = model_flops(config, model, row) * config.batch.global_size / count
    ratio = "" if chosen.usage.flops is None else f"; compiled, {chosen.usage.flops / needed:.3f} x"
    return f"FLOPs needed: {needed:.3e} a device and optimizer step{ratio}"


def table(given: argparse.Namespace) -> int:
    """Prints the rows of the table in docs/memory.md that have --count devices.

    Rows with another number of devices need another process, because a process compiles for several
    devices in another way than for one device.

    Args:
        given: Arguments of the command.

    Returns:
        0 if all rows stay below their limits, 3 if a row is above its limit.

    Raises:
        ConfigError: The table has no row with this number of devices.
    """
    from llava_jax.errors import ConfigError
    from llava_jax.planning.published_table import HEADER, ROWS, describe, measure

    rows = [row for row in ROWS if row.count == given.count]
    if not rows:
        counts = ", ".join(str(count) for count in sorted({row.count for row in ROWS}))
        raise ConfigError(f"--count {given.count}: the table has only rows of {counts} devices")
    print(HEADER)
    found = []
    for row in rows:
        usage, flops = measure(row)
        print(describe(row, usage, flops), flush=True)
        found.append((row, usage))
    figures = [
        dataclasses.asdict(row) | {"usage": dataclasses.asdict(usage)} for row, usage in found
    ]
    write(given, figures, [(str(row), usage) for row, usage in found])
    return 0 if all(row.holds(usage) for row, usage in found) else 3


def write(given: argparse.Namespace, figures: object, bars: list[tuple[str, "Usage"]]) -> None:
    """Writes the figures to the files that the arguments name.

    Args:
        given: Arguments of the command.
        figures: Content of the JSON file.
        bars: Label and memory of each bar of the chart.
    """
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    if given.chart:
        from llava_jax.planning.chart import draw

        draw(given.chart, bars)


def devices_that_would(plan: "Plan", measure: Callable[..., "Usage"], count: int) -> str:
    """Returns a sentence that says on how many devices the plan would fit.

    Args:
        plan: Plan that does not fit on `count` devices.
        measure: Function that measures a plan on a number of devices.
        count: Number of devices; it is doubled until the plan fits.
    """
    from llava_jax.errors import ConfigError

    while (count := 2 * count) <= MAX_DEVICES:
        try:
            if measure(plan, count).fits:
                return f"it would fit on {count} of these devices"
        except ConfigError:  # there is no slice of this size, or the batch cannot be divided
            continue
    return f"it would not fit on {MAX_DEVICES} of these devices either"


if __name__ == "__main__":
    sys.exit(main())
