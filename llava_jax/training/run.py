"""Executes a run: opens its inputs, plans it, starts or resumes it, trains and exports."""

import dataclasses
import json
import os
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax.config import MAY_DIFFER, Json, ModelConfig, TrainConfig, flatten, to_json
from llava_jax.data.batching import Batches
from llava_jax.data.padding import Buckets
from llava_jax.distributed.check_slices import check_slices
from llava_jax.distributed.lock import hold_for_run
from llava_jax.distributed.multihost import (
    barrier,
    broadcast_from_main,
    is_lost,
    is_main_process,
    join,
    leave_others,
    report_and_exit,
    say,
)
from llava_jax.distributed.sharding import (
    data_parallel_size,
    layout_table,
    make_mesh,
    sequence_size,
)
from llava_jax.errors import CheckpointError, ConfigError, RunError
from llava_jax.models.layers import Params
from llava_jax.planning.check_devices import check_accelerator, division_warnings
from llava_jax.planning.choose import plan_for_attached
from llava_jax.planning.compile import attention_here, capability_here
from llava_jax.planning.devices import without_bfloat16
from llava_jax.pretrained.adapters import load_adapter
from llava_jax.pretrained.model import load_weights
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import TrainState, init_state, micro_size
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.export import discard, export, unfinished_dir
from llava_jax.training.hub import push
from llava_jax.training.loop import train
from llava_jax.training.process_agreement import agree
from llava_jax.training.repair_logs import repair_objects, repair_rows
from llava_jax.training.result import is_finished, say_finished, write_result
from llava_jax.training.resume import (
    begun_buckets,
    begun_plan,
    check_begun,
    refuse_to_replace,
)
from llava_jax.training.run_config import describe_start, write_description
from llava_jax.training.setup import Setup, agree_on, open_setup, startup_notes
from llava_jax.training.signals import Stopped, StopRequest
from llava_jax.training.trackers import open_trackers


def run(config: TrainConfig) -> int:
    """Executes a run, prints how the run ended, and returns the exit status.

    The status is 0 if the run is finished, 128 plus the signal number if a signal stopped the run,
    and 1 after an error. In a run of one process, unexpected exceptions are raised.

    Args:
        config: Config of the run.
    """
    try:
        join()
        with StopRequest() as stop, hold_for_run(config.run_dir):
            return _run(config, stop)
    except Stopped as stopped:
        return report_and_exit(
            f"stopped {stopped}; the same command continues the run", 128 + stopped.signal
        )
    except Exception as error:
        # This check comes first, because a lost process causes other errors. For example, a save
        # that needs all processes fails with an OSError, as if the disk were the cause.
        if is_lost(error):
            leave_others()
        if isinstance(error, ConfigError | CheckpointError | RunError):
            return report_and_exit(f"error: {error}")
        if isinstance(error, OSError):
            return report_and_exit(f"error: {error}; the same command continues the run")
        if not jax.distributed.is_initialized():
            raise
        return report_and_exit(traceback.format_exc())


def _run(config: TrainConfig, stop: StopRequest) -> int:
    """Executes a run from the config to the export. A run that was stopped is resumed.

    Returns:
        The exit status 0, when the run is finished.

    Raises:
        ConfigError: The config, the data and the devices do not fit together.
        CheckpointError: The weights to start from cannot be used, or a checkpoint cannot be
            written.
        RunError: Too many samples cannot be used, too many steps are not finite, or the processes
            have read different texts.
        Stopped: A signal stopped the run.
    """
    _keep_compiled(Path(config.output_dir).absolute() / ".compilation_cache")
    setup = open_setup(config)
    agree_on(setup)
    mesh = make_mesh(setup.config.mesh)
    with Checkpoints(config.run_dir / "checkpoints", config.checkpoint) as saved:
        _check_run_dir(setup, saved)
        if is_finished(setup, saved):
            say_finished(setup, saved)
        else:
            _train(setup, mesh, saved, stop)
    push(config)
    return 0


def _train(setup: Setup, mesh: Mesh, saved: Checkpoints, stop: StopRequest) -> None:
    """Plans a run, starts or resumes it, trains and writes the result."""
    is_resumed = saved.latest is not None
    for line in startup_notes(setup, data_parallel_size(mesh)):
        say(line)
    setup = _choose_buckets(_plan(setup, mesh, is_resumed=is_resumed), is_resumed=is_resumed)
    say(setup.inputs.summary())
    for line in setup.inputs.warnings:
        say(line)
    trackers = open_trackers(setup.config, saved.latest or 0, write=is_main_process())
    with jax.set_mesh(mesh), trackers as trackers:
        program = _build_program(setup, mesh)
        batches = setup.inputs.train_batches(program.rows(setup.config.batch.global_size))
        begin = _resume if is_resumed else _start
        state, frozen = begin(setup, program, saved, batches)
        trained = [
            train(
                setup.config,
                program,
                setup.inputs,
                batches,
                saved,
                state,
                frozen,
                stop,
                setup.total_steps,
                trackers,
            )
        ]
        del state
        saved.wait()
        stop.raise_if_asked(f"after step {int(trained[0].step)}")
        write_result(setup, program, saved, trained, frozen)


def _check_run_dir(setup: Setup, saved: Checkpoints) -> None:
    """Repairs the run's files, and raises ConfigError if the recipe or the data differs."""
    run_dir = setup.config.run_dir
    for line in saved.passed_over:
        say(line)
    if saved.latest is not None:
        _repair(repair_objects(run_dir, saved.files()))
        identity = setup.inputs.order.identity
        check_begun(setup.config, saved, setup.describe(setup.config), identity)
    if (saved.latest or 0) > setup.total_steps:
        raise ConfigError(
            f"{run_dir} has a checkpoint of step {saved.latest}, but this command trains only "
            f"{setup.total_steps} steps; raise steps or epochs, or give the run a new --name"
        )
    _repair(repair_rows(run_dir, saved.files(), saved.latest or 0))


def _plan(setup: Setup, mesh: Mesh, *, is_resumed: bool) -> Setup:
    """Tests some samples, and returns the setup with a plan for the attached devices.

    A resumed run keeps the plan that it began with if the plan fits, to continue bit for bit.
    """
    inputs = setup.inputs
    check_accelerator(setup.config, setup.model_config)
    inputs.check_some()
    for line in _describe_devices(setup.config, setup.model_config, mesh):
        say(line)
    planned = plan_for_attached(
        setup.config,
        setup.model_config,
        setup.total_steps,
        mesh,
        inputs.spec.max_slots,
        begun_plan(setup.config) if is_resumed else None,
    )
    devices = data_parallel_size(mesh)
    rows = devices * micro_size(planned.batch, mesh)
    inputs = inputs.planned(devices, rows, sequence_size(mesh))
    return dataclasses.replace(setup, config=planned, inputs=inputs)


def _choose_buckets(setup: Setup, *, is_resumed: bool) -> Setup:
    """Returns the setup with buckets; the main process chooses them, and all others agree.

    A resumed run keeps the buckets that it began with, so that it continues bit for bit.
    """
    config, inputs = setup.config, setup.inputs
    if "auto" not in (config.data.buckets, config.data.image_buckets):
        return setup
    chosen, padding = None, None
    if is_main_process():
        chosen = begun_buckets(config) if is_resumed else None
        if chosen is None:
            chosen, padding = inputs.choose_buckets(setup.total_steps)
    lengths, images = map(tuple, broadcast_from_main(list(chosen or ((), ()))))
    padding = broadcast_from_main(padding)
    data = config.data
    lengths = lengths if data.buckets == "auto" else data.buckets
    images = images if data.image_buckets == "auto" else data.image_buckets
    data = dataclasses.replace(data, buckets=lengths, image_buckets=images)
    inputs = inputs.with_buckets(Buckets(lengths, images))
    why = "as when the run began" if padding is None else f"padding {100 * padding:.0f} %"
    say(f"buckets: {', '.join(map(str, inputs.spec.lengths))} ({why})")
    return dataclasses.replace(setup, config=dataclasses.replace(config, data=data), inputs=inputs)


def _describe_devices(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Iterator[str]:
    """Yields a line about the devices of a run, and lines if they do not suit the run."""
    name = mesh.devices.flat[0].device_kind
    yield f"devices: {mesh.size} x {name}"
    slow = without_bfloat16(name, capability_here()) if config.dtype == "bfloat16" else None
    if slow is not None:
        yield slow
    yield from division_warnings(config, model, mesh.shape)


def _build_program(setup: Setup, mesh: Mesh) -> Program:
    """Checks that all processes have the same plan and attention, and builds the program.

    If arrays are in host memory, this also checks that the device gets the right slices of them.
    """
    config, model_config = setup.config, setup.model_config
    implementation = attention_here(config, model_config)
    agree(flatten(to_json(config), MAY_DIFFER) | {"attention": implementation})
    program = build_program(
        config, model_config, setup.total_steps, mesh, implementation=implementation
    )
    say(f"attention: {implementation}")
    say(program.describe_parameters())
    if program.uses_host:
        check_slices()
    if config.mesh.show:
        say(layout_table(program.abstract))
    return program


def _start(
    setup: Setup, program: Program, saved: Checkpoints, batches: Batches
) -> tuple[TrainState, Params]:
    """Starts a run: saves the initial state, and returns this state and the frozen parameters."""
    config = setup.config
    refuse_to_replace(config)
    state, frozen = _initial_state(setup, program)
    _write_description(setup, program)
    # This export is a test: if exporting fails, it fails now and not after hours of training. The
    # first checkpoint already has an adapter, so that only the export of a whole model is tested.
    saved.export = _adapter_export(setup, program, frozen)
    if saved.export is None:
        export(setup, program, frozen, unfinished_dir(config), state)
        discard(config)
    saved.save(state, batches.state())
    saved.wait()
    return state, frozen


def _resume(
    setup: Setup, program: Program, saved: Checkpoints, batches: Batches
) -> tuple[TrainState, Params]:
    """Resumes a run: returns the state of the newest checkpoint, and the frozen parameters."""
    config = setup.config
    frozen = _load(setup, program, program.frozen)
    saved.export = _adapter_export(setup, program, frozen)
    state, position = saved.restore(program.state)
    batches.restore(position)
    if config.checkpoint.accept_changes:
        _write_description(setup, program, json.loads((config.run_dir / "config.json").read_text()))
    return state, frozen


def _write_description(setup: Setup, program: Program, began: Json | None = None) -> None:
    """Writes config.json and data.json; `began` is the config.json of the first start, if any."""
    config = setup.config
    description = setup.describe(_with_micro_size(config, program.mesh))
    write_description(
        config.run_dir, description | describe_start(program.count_parameters(), began)
    )


def _adapter_export(
    setup: Setup, program: Program, frozen: Params
) -> Callable[[Path, TrainState], None] | None:
    """Returns the function that writes the adapter of a checkpoint; None without adapters."""
    return partial(export, setup, program, frozen) if program.adapters else None


def _keep_compiled(directory: Path) -> None:
    """Makes JAX cache all compiled programs in a directory, so that a later start compiles nothing.

    By default, JAX caches only programs that take at least 1 second to compile. A start also
    compiles dozens of programs that take about 20 ms, one for each shape of a weight. Environment
    variables that the user has set have priority.
    """
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in options.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _repair(lines: Iterator[str]) -> None:
    """Repairs a run's files in the main process, which prints each repair; all processes wait."""
    if is_main_process():
        for line in lines:
            say(line)
    barrier()


def _with_micro_size(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """Returns the config with the chosen `batch.micro_size` instead of None."""
    batch = dataclasses.replace(config.batch, micro_size=micro_size(config.batch, mesh))
    return dataclasses.replace(config, batch=batch)


def _initial_state(setup: Setup, program: Program) -> tuple[TrainState, Params]:
    """Returns the state before the first step, and the frozen parameters."""
    config = setup.config
    brought = {}
    if config.init_adapter is not None:
        brought = load_adapter(
            config.init_adapter,
            program.adapters,
            program.model_config,
            program.abstract,
            program.trainable,
            setup.fingerprint,
        )
    wanted = [path for path in program.abstract if path not in brought]
    params = _load(setup, program, wanted) | brought
    trainable = {path: params.pop(path) for path in program.trainable}
    return init_state(program.state, trainable, config.seed), params


def _load(setup: Setup, program: Program, wanted: Collection[str]) -> Params:
    """Loads parameters from the base model; initializes parameters that the base model lacks."""
    return load_weights(
        setup.source,
        program.model_config,
        program.abstract,
        seed=setup.config.seed,
        wanted=wanted,
        adapters=program.adapters,
        say=say,
    )
