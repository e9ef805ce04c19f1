"""Implements `llava-jax plan`, which computes whether a run fits into the memory of a device."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llava_jax.cli.arguments import (
    Parser,
    at_least_one,
    chart_file,
    output_file,
    positive,
    report_errors,
)
from llava_jax.distributed.environment import GIB, HOST_SHARE, prepare_for_planning
from llava_jax.planning.devices import GPUS, TPUS, Gpu, shares_host, without_bfloat16

if TYPE_CHECKING:
    from llava_jax.config import ModelConfig, TrainConfig
    from llava_jax.planning.search import Plan, Trial
    from llava_jax.planning.usage import Usage

PROG = "llava-jax plan"
MAX_DEVICES = 64  # largest number of devices to try if --count devices are not enough


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 if the run fits into the memory, 3 if the run does not fit, 1 for a user's mistake.
    """
    parser = Parser(
        prog=PROG,
        description="Compiles the train step of a run for a type of device, and prints how much "
        "memory the step needs. This machine does not need to have such a device. Like llava-jax "
        "train, the command also accepts an option for every field of the config. The exit status "
        "is 0 if the run fits into the memory, 3 if the run does not fit, and 1 if there is a "
        "mistake in the arguments.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="config file or name of a preset")
    rows = "print the rows of the table in docs/memory.md whose number of devices is --count"
    what.add_argument("--table", action="store_true", help=rows)
    names = f"type of the devices: {', '.join([*GPUS, *TPUS])} (default: %(default)s)"
    parser.add_argument("--device", default="rtx3090", help=names)
    parser.add_argument(
        "--count", type=at_least_one, default=1, help="number of devices (default: 1)"
    )
    parser.add_argument(
        "--memory",
        type=positive,
        help="memory of one device in GiB (default: the memory of the device type)",
    )
    host = f"host memory in GiB for all devices together, of which plans use {HOST_SHARE:.0%} "
    host = f"{host.replace('%', '%%')}(default: host memory is not checked)"
    parser.add_argument("--host-memory", type=positive, help=host)
    fit = "search for the fastest memory plan that fits into the memory; without --fit, there is a "
    fit += "search only if memory.plan is auto and no other field of memory is set"
    parser.add_argument("--fit", action="store_true", help=fit)
    parser.add_argument(
        "--json", type=output_file, help="JSON file for the results (default: no file)"
    )
    chart = "PNG file for a bar chart of the memory (default: no file)"
    parser.add_argument("--chart", type=chart_file, help=chart)
    given, rest = parser.parse_known_args(argv)
    if rest and given.table:
        parser.error(f"unknown arguments: {' '.join(rest)}; --table takes no fields of a config")
    prepare_for_planning()

    import jax  # must be imported after the environment is prepared

    from llava_jax.config import parse_config

    jax.config.update("jax_num_cpu_devices", max(given.count, MAX_DEVICES))
    if given.table:
        return report_errors(lambda: table(given))
    return report_errors(
        lambda: plan(given, parse_config(["--config", given.config, *rest], prog=PROG))
    )


def plan(given: argparse.Namespace, config: "TrainConfig") -> int:
    """Chooses a memory plan, prints the memory that the plan needs and writes the result files.

    Args:
        given: Arguments of the command.
        config: Config of the run.

    Returns:
        0 if the run fits into the memory, 3 if the run does not fit.
    """
    import jax

    from llava_jax.config import MemoryConfig
    from llava_jax.distributed.sharding import data_parallel_size, make_mesh
    from llava_jax.planning import compile as compiling
    from llava_jax.planning import search
    from llava_jax.planning.beside import outside_pool
    from llava_jax.planning.check_devices import division_warnings
    from llava_jax.planning.estimate import make_estimator
    from llava_jax.planning.forecast import describe_forecast
    from llava_jax.planning.measure import measure as measure_step
    from llava_jax.planning.model_sizes import sizes
    from llava_jax.planning.usage import largest_table, reserve_of, usage_table
    from llava_jax.train_step.step import micro_size
    from llava_jax.training.setup import context_warnings

    model = sizes(config)
    capacity = None if given.memory is None else int(given.memory * GIB)
    for_host = None if given.host_memory is None else int(HOST_SHARE * given.host_memory * GIB)
    host_share = lambda count: None if for_host is None else for_host // count
    measure = lambda plan, count=given.count: dataclasses.replace(
        measure_step(plan.apply(config), model, given.device, count, capacity),
        host_capacity=host_share(count),
    )
    target = compiling.find_device(given.device)
    kind = compiling.attention_for(config, model, target)
    print(f"attention: {kind}")
    slots = compiling.slots_per_row(config, model)
    print(describe_row(config.data.max_length, slots, model), flush=True)
    mesh = make_mesh(config.mesh, jax.devices()[: given.count])
    too_long = context_warnings(config.data.max_length, model.llm)
    for line in (*too_long, *division_warnings(config, model, mesh.shape)):
        print(line, flush=True)
    searches = given.fit or config.searches_plan
    if given.fit:
        config = dataclasses.replace(config, memory=MemoryConfig())
    if searches:
        build = lambda config: compiling.program_for(config, model, given.device, given.count)
        estimate = make_estimator(config, model, target.rates, build, slots)
        outside = outside_pool(target.platform, given.device, given.count)
        size = capacity or target.memory
        free = size - reserve_of(size, outside)
        room = search.Capacity(free, host_share(given.count), shares_host(given.device))
        found = search.find_plan(config, data_parallel_size(mesh), measure, estimate, room)
        chosen = search.choose_plan(found)
    else:
        wanted = search.Plan(micro_size(config.batch, mesh), config.memory)
        chosen = search.Trial(wanted, measure(wanted))
    print(f"{given.config} on {given.count} x {given.device}: {chosen.plan}")
    print(usage_table(chosen.usage), flush=True)
    if chosen.usage.largest:
        print(largest_table(chosen.usage))
    if chosen.usage.forecast:
        print(describe_forecast(chosen.usage.forecast, target.rates))
    print(compare_flops(chosen, config, model, given.count))
    if config.dtype == "bfloat16" and isinstance(target, Gpu):
        flops = chosen.usage.flops
        if line := without_bfloat16(target.name, target.capability, flops):
            print(line)
    if chosen.usage.host_headroom < 0 <= chosen.usage.headroom:
        missing = -chosen.usage.host_headroom / HOST_SHARE / GIB * given.count
        print(f"the plan would fit with {missing:.1f} GiB more host memory")
    elif searches and not chosen.usage.fits:
        print("looking for a number of devices on which the plan would fit", flush=True)
        print(devices_that_would(chosen.plan, measure, given.count))
    figures = {"plan": dataclasses.asdict(chosen.plan), **dataclasses.asdict(chosen.usage)}
    figures["fits"] = chosen.usage.fits
    write(given, figures, [(str(chosen.plan), chosen.usage)])
    return 0 if chosen.usage.fits else 3


def describe_row(tokens: int, slots: int, model: "ModelConfig") -> str:
    """Returns a line with the size of the rows that the plan is for.

    Args:
        tokens: Number of tokens of a row.
        slots: Number of image slots of a row.
        model: Sizes of the model.
    """
    row = f"row: {tokens} tokens and {slots} image slot{'s' * (slots != 1)}"
    if model.tiling is None:
        return row
    most = model.max_slots_per_image
    return f"{row}; an image takes up to {most}, for the whole image and {most - 1} tiles"


def compare_flops(chosen: "Trial", config: "TrainConfig", model: "ModelConfig", count: int) -> str:
    """Returns a line with the FLOPs that the model needs, and the ratio to the compiled step.

    Args:
        chosen: Plan, with the memory and the FLOPs of its compiled step.
        config: Config of the run.
        model: Sizes of the model.
        count: Number of devices.
    """
    from llava_jax.planning.compile import slots_per_row
    from llava_jax.planning.model_flops import full_row, model_flops

    config = chosen.plan.apply(config)
    row = full_row(config, slots_per_row(config, model))
    needed = model_flops(config, model, row) * config.batch.global_size / count
    ratio = ""
    if chosen.usage.flops is not None:
        ratio = f"; the compiled step has {chosen.usage.flops / needed:.3f} times as many"
    return f"FLOPs that the model needs: {needed:.3e} per device and optimizer step{ratio}"


def table(given: argparse.Namespace) -> int:
    """Prints the rows of the table in docs/memory.md whose number of devices is --count.

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
        raise ConfigError(
            f"--count {given.count}: the table has no row for this number of devices; choose from "
            f"{counts}"
        )
    print(HEADER)
    found = []
    for row in rows:
        measured = measure(row)
        print(describe(row, measured), flush=True)
        found.append((row, measured.usage))
    figures = [
        dataclasses.asdict(row) | {"usage": dataclasses.asdict(usage)} for row, usage in found
    ]
    write(given, figures, [(str(row), usage) for row, usage in found])
    return 0 if all(row.holds(usage) for row, usage in found) else 3


def write(given: argparse.Namespace, figures: object, bars: list[tuple[str, "Usage"]]) -> None:
    """Writes the results to the files given by --json and --chart.

    Args:
        given: Arguments of the command.
        figures: Content of the JSON file.
        bars: Label and memory of each bar in the chart.
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
        count: Number of devices, which is doubled until the plan fits.
    """
    from llava_jax.errors import ConfigError

    tried = None
    while (count := 2 * count) <= MAX_DEVICES:
        try:
            if measure(plan, count).fits:
                return f"the plan would fit on {count} of these devices"
        except ConfigError:  # no TPU slice has this size, or the batch cannot be divided
            continue
        tried = count
    if tried is None:
        return f"no larger number of devices, up to {MAX_DEVICES}, can be planned for this run"
    return f"the plan would not fit on {tried} of these devices either"


if __name__ == "__main__":
    sys.exit(main())
