"""A run, from top to bottom."""

import dataclasses
import functools
import os
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax.config import MAY_DIFFER, Parts, TrainConfig, flatten, to_json
from llava_jax.distributed.lock import hold_for_run
from llava_jax.distributed.multihost import (
    barrier,
    broadcast_from_main,
    is_alone,
    is_lost,
    is_main_process,
    join,
    leave_others,
    local_devices,
    report_and_exit,
    say,
)
from llava_jax.distributed.sharding import data_parallel_size, layout_table, make_mesh
from llava_jax.errors import CheckpointError, ConfigError, RunError
from llava_jax.models.layers import Params
from llava_jax.planning.choose import plan_for_attached
from llava_jax.planning.measure import attention_here
from llava_jax.pretrained.adapters import load_adapter
from llava_jax.pretrained.load import fingerprint
from llava_jax.pretrained.model import load_weights
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import TrainState, init_state, micro_size
from llava_jax.training.agreement import agree, not_shared, run_facts
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.export import discard, export, export_dir, publish
from llava_jax.training.inputs import find_model, open_inputs
from llava_jax.training.loop import train
from llava_jax.training.repair import repair_objects, repair_rows
from llava_jax.training.resume import check_begun, follow_adapter, refuse_to_replace
from llava_jax.training.run_config import (
    describe,
    write_description,
)
from llava_jax.training.signals import Stopped, StopRequest
from llava_jax.training.trackers import check_packages, open_trackers


def run(config: TrainConfig) -> int:
    """Runs, and says how it ended; returns the exit status."""
    try:
        join()
        with StopRequest() as stop, hold_for_run(config.run_dir):
            return _run(config, stop)
    except Stopped as stopped:
        return report_and_exit(
            f"stopped {stopped}; the same command continues", 128 + stopped.signal
        )
    except Exception as error:
        if is_lost(error):  # whatever it is taken for: a save that needs all is no failed disk
            leave_others()
        if isinstance(error, ConfigError | CheckpointError | RunError):
            return report_and_exit(f"error: {error}")
        if isinstance(error, OSError):
            return report_and_exit(f"error: {error}; the same command continues")
        if not jax.distributed.is_initialized():
            raise
        return report_and_exit(traceback.format_exc())


def _run(config: TrainConfig, stop: StopRequest) -> int:
    """One run, from its config to the adapter or model it leaves; continues one that was stopped.

    Returns:
        The exit status: 0 when the run is finished.

    Raises:
        ConfigError: The config, its data or its devices do not fit together.
        CheckpointError: The weights to start from cannot be used, or a checkpoint not be written.
        RunError: Its data or its numbers went bad.
        Stopped: A signal ended it, saved.
    """
    _keep_compiled(Path(config.output_dir).absolute() / ".compilation_cache")
    check_packages(config.log)
    config, found = follow_adapter(config)
    source = found.base if found else None
    base = None if source is None else fingerprint(source)
    model_config, processor = find_model(config, source)
    inputs = open_inputs(config, model_config, processor)
    total = config.total_steps(inputs.order.samples)
    describe_run = functools.partial(
        describe, model=model_config, steps=total, fingerprint=base, data=inputs.digest
    )
    if not is_alone():
        facts = run_facts(config, model_config, total, base, inputs)
        agree(facts, *not_shared(Path(config.output_dir)))
        agree({"the number of devices": local_devices()})
    mesh = make_mesh(config.mesh)
    inputs = inputs.divided(data_parallel_size(mesh))
    with Checkpoints(config.run_dir / "checkpoints", config.checkpoint) as saved:
        for line in saved.passed_over:
            say(line)
        if saved.latest is not None:
            _repair(repair_objects(config.run_dir, saved.files()))
            check_begun(config, saved, describe_run(config), inputs.order.identity)
        if (saved.latest or 0) > total:
            raise ConfigError(f"{config.run_dir} has {saved.latest} steps, more than {total}")
        _repair(repair_rows(config.run_dir, saved.files(), saved.latest or 0))
        if broadcast_from_main(saved.latest == total and export_dir(config).is_dir()):
            say(f"{config.run_dir} is finished: {saved.latest} steps, {export_dir(config)}")
            return 0
        inputs.check_some()
        say(inputs.summary())
        say(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}")
        config = plan_for_attached(config, model_config, total, mesh, inputs.spec.max_images)
        trackers = open_trackers(config, saved.latest or 0, write=is_main_process())
        with jax.set_mesh(mesh), trackers as trackers:
            implementation = attention_here(config, model_config)
            agree(flatten(to_json(config), MAY_DIFFER) | {"attention": implementation})
            say(f"attention: {implementation}")
            program = build_program(
                config, model_config, total, mesh, implementation=implementation
            )
            if config.mesh.show:
                say(layout_table(program.abstract))
            write = functools.partial(
                export, config, program, processor, found.name if found else None, base
            )
            batches = inputs.train_batches(program.rows(config.batch.global_size))
            description = describe_run(_with_micro_size(config, mesh))
            if saved.latest is None:
                refuse_to_replace(config)
                state, frozen = _start(config, program, source, base)
                write_description(config.run_dir, description)
                discard(write(state.trainable, frozen))  # better now than after ten hours
                saved.save(state, batches.state())
                saved.wait()
            else:
                frozen = _load(config, program, source, program.frozen)
                state, position = saved.restore(program.state)
                batches.restore(position)
                if config.checkpoint.accept_changes:
                    write_description(config.run_dir, description)
            state = train(
                config, program, inputs, batches, saved, state, frozen, stop, total, trackers
            )
            saved.wait()
            stop.raise_if_asked(f"after step {int(state.step)}")
            publish(write(state.trainable, frozen), export_dir(config))
            say(f"wrote {export_dir(config)}")
            say(f"{config.run_dir}/report.html shows the run; to talk to what it made:")
            say(f"llava-jax chat {config.run_dir}")
    return 0


def _keep_compiled(directory: Path) -> None:
    """Keeps what is compiled, small programs too, so that a second start compiles nothing.

    JAX would keep only what took a second. But a start has some dozens of programs that take a
    fiftieth, one for each shape of a weight; what the environment says goes before.
    """
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in options.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _repair(lines: Iterator[str]) -> None:
    """Lets the first process mend a run's files, line by line; the others read them later."""
    if is_main_process():
        for line in lines:
            say(line)
    barrier()


def _with_micro_size(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    batch = dataclasses.replace(config.batch, micro_size=micro_size(config.batch, mesh))
    return dataclasses.replace(config, batch=batch)


def _start(
    config: TrainConfig, program: Program, source: Path | Parts | None, base: str | None
) -> tuple[TrainState, Params]:
    """The state before the first step, and the frozen parameters."""
    brought = {}
    if config.init_adapter is not None:
        brought = load_adapter(
            config.init_adapter,
            program.adapters,
            program.model_config,
            program.abstract,
            program.trainable,
            base,
        )
    wanted = [path for path in program.abstract if path not in brought]
    params = _load(config, program, source, wanted) | brought
    trainable = {path: params.pop(path) for path in program.trainable}
    return init_state(program.state, trainable, config.seed), params


def _load(
    config: TrainConfig, program: Program, source: Path | Parts | None, wanted: Collection[str]
) -> Params:
    return load_weights(
        source,
        program.model_config,
        program.abstract,
        seed=config.seed,
        wanted=wanted,
        say=say,
    )
