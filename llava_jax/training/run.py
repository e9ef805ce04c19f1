"""A run, from top to bottom."""

import contextlib
import dataclasses
import functools
import os
import shutil
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.pretrained import model
from llava_jax.training.agreement import LOCAL, agree, not_shared, refuse_texts, run_facts
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.config import (
    ConfigError,
    ModelConfig,
    Parts,
    RunError,
    TrainConfig,
    to_json,
)
from llava_jax.data.batching import Batch, Batches
from llava_jax.data.sources import Records
from llava_jax.training.run_config import changes, data_sources, describe, flatten, write_description
from llava_jax.planning.devices import GIB, RESERVE_SHARE
from llava_jax.distributed.environment import host_memory
from llava_jax.training.evaluation import HeldOut
from llava_jax.training.export import discard, export, export_dir, publish
from llava_jax.pretrained.resolve import Checkpoint, adapter_in, resolve_start
from llava_jax.pretrained.safetensors import CheckpointError
from llava_jax.pretrained.adapters import load_adapter
from llava_jax.pretrained.load import fingerprint
from llava_jax.training.inputs import Inputs, find_model, open_inputs
from llava_jax.training.step_log import Journal
from llava_jax.lock import hold_for_run
from llava_jax.training.progress import Reporter
from llava_jax.models.layers import Params
from llava_jax.planning.search import attention_here, choose_plan, least_devices, write_trial
from llava_jax.planning.cache import measure_once
from llava_jax.distributed.multihost import devices_of_machine, end, from_first, highest_of, is_alone, is_first, is_lost, join, leave_others, local_devices, meet, of_all
from llava_jax.training.profiler import Profiler
from llava_jax.train_step.program import Program, build_program
from llava_jax.training.repair import repair_objects, repair_rows
from llava_jax.report.report import Report
from llava_jax.distributed.sharding import data_parallel_size, layout_table, make_mesh
from llava_jax.train_step.step import EvalResult, Metrics, TrainState, init_state, micro_size
from llava_jax.training.signals import Stopped, StopRequest
from llava_jax.training.trackers import Tracker, check_packages, open_trackers


def run(config: TrainConfig) -> int:
    """Runs, and says how it ended; returns the exit status."""
    try:
        join()
        with StopRequest() as stop, hold_for_run(config.run_dir):
            return _run(config, stop)
    except Stopped as stopped:
        return end(f"stopped {stopped}; the same command continues", 128 + stopped.signal)
    except Exception as error:
        if is_lost(error):  # whatever it is taken for: a save that needs all is no failed disk
            leave_others()
        if isinstance(error, ConfigError | CheckpointError | RunError):
            return end(f"error: {error}")
        if isinstance(error, OSError):
            return end(f"error: {error}; the same command continues")
        if not jax.distributed.is_initialized():
            raise
        return end(traceback.format_exc())


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
    config, found = _follow_adapter(config)
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
            _say(line)
        if saved.latest is not None:
            _repair(repair_objects(config.run_dir, saved.files()))
            _check_begun(config, saved, describe_run(config), inputs.order.identity)
        if (saved.latest or 0) > total:
            raise ConfigError(f"{config.run_dir} has {saved.latest} steps, more than {total}")
        _repair(repair_rows(config.run_dir, saved.files(), saved.latest or 0))
        if from_first(saved.latest == total and export_dir(config).is_dir()):
            _say(f"{config.run_dir} is finished: {saved.latest} steps, {export_dir(config)}")
            return 0
        inputs.check_some()
        _say(inputs.summary())
        _say(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}")
        config = _choose_plan(config, model_config, total, mesh, inputs.spec.max_images)
        trackers = open_trackers(config, saved.latest or 0, write=is_first())
        with jax.set_mesh(mesh), trackers as trackers:
            kind = attention_here(config, model_config)
            agree(flatten(to_json(config), LOCAL) | {"attention": kind})
            _say(f"attention: {kind}")
            program = build_program(config, model_config, total, mesh, kind=kind)
            if config.mesh.show:
                _say(layout_table(program.abstract))
            write = functools.partial(
                export, config, program, processor, found.name if found else None, base
            )
            batches = inputs.train_batches(program.rows(config.batch.global_size))
            description = describe_run(_with_micro_size(config, mesh))
            if saved.latest is None:
                _refuse_to_replace(config)
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
            state = _train(
                config, program, inputs, batches, saved, state, frozen, stop, total, trackers
            )
            saved.wait()
            stop.raise_if_asked(f"after step {int(state.step)}")
            publish(write(state.trainable, frozen), export_dir(config))
            _say(f"wrote {export_dir(config)}")
            _say(f"{config.run_dir}/report.html shows the run; to talk to what it made:")
            _say(f"python tools/chat.py {config.run_dir}")
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
    if is_first():
        for line in lines:
            _say(line)
    meet()


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _train(
    config: TrainConfig,
    program: Program,
    inputs: Inputs,
    batches: Batches,
    saved: Checkpoints,
    state: TrainState,
    frozen: Params,
    stop: StopRequest,
    total: int,
    trackers: Sequence[Tracker],
) -> TrainState:
    """The loop. Metrics are read one step late, so that the device never waits for the host."""
    first = int(state.step)
    size = config.batch.global_size
    every = config.eval.every
    due = lambda step: step in (0, total) or (every is not None and step % every == 0)
    asked = functools.partial(_ask, stop, inputs)
    halted = lambda checksum, numbers: asked(checksum, lambda: numbers, inputs.eval_records)() > 0
    metrics_file = config.run_dir / "metrics.jsonl"
    with (
        stop.deferred(),
        contextlib.closing(batches),
        Reporter(metrics_file, first, total, trackers, quiet=not is_first()) as reporter,
        Report(config.run_dir, write=is_first()) as report,
        Profiler(config.run_dir / "profile", config.log.profile_steps) as profiler,
    ):
        journal = Journal(config, inputs, reporter, first)
        held_out = _held_out(config, program, inputs, frozen, reporter, first)

        def look(step: int) -> None:
            if due(step):
                held_out.measure(step, state.trainable, halted)
            report.update()
            reporter.skip_time()

        look(first)
        waiting: list[tuple[Metrics, int]] = []
        for step in range(first + 1, total + 1):
            if due(step - 1) and asked()():  # a measurement was given up: it comes first, later
                break
            batch = next(batches)
            numbers = functools.partial(inputs.order.batch, step - 1)
            stops = asked(batch.text_checksum, numbers)
            if not inputs.spec.has_one_shape:
                stops()  # processes whose shapes differ must not begin the step
            profiler.before(step, state)
            state, metrics = program.train_step(state, frozen, program.place(batch, size))
            for earlier in waiting:
                journal.log(*earlier)
            stops()  # before anything of this step is recorded
            waiting = [(metrics, step)]
            if due(step) or step % config.checkpoint.every == 0:
                journal.log(*waiting.pop())
                if not journal.nonfinite:  # else the last good one stays the last
                    saved.save(state, batches.state())
                look(step)
            saved.check()
            if stops():
                break
        for earlier in waiting:
            journal.log(*earlier)
        saved.save(state, batches.state())
        if int(state.step) == total:
            held_out.say_tables()
        stop.signal = asked()() or None  # whichever process it came to
    return state


def _ask(
    stop: StopRequest,
    inputs: Inputs,
    checksum: int = 0,
    numbers: Callable[[], np.ndarray] = lambda: np.array([]),
    records: Records | None = None,
) -> Callable[[], int]:
    """Asks all processes for signals, and whether they have read the same texts.

    Args:
        stop: This process' signals.
        inputs: The data.
        checksum: Of the texts of a batch.
        numbers: Gives the records of that batch.
        records: What these refer to; None is the training data.

    Returns:
        The highest signal, when it is called; it raises RunError where texts differ.
    """
    answer = highest_of(lambda: (stop.signal or 0, checksum, -checksum))

    def read() -> int:
        signal, highest, lowest = answer()
        if highest != -lowest:
            refuse_texts(inputs, inputs.records if records is None else records, numbers().tolist())
        return signal

    return read


def _held_out(
    config: TrainConfig,
    program: Program,
    inputs: Inputs,
    frozen: Params,
    reporter: Reporter,
    first: int,
) -> HeldOut:
    def eval_step(trainable: Params, batch: Batch) -> EvalResult:
        placed = program.place(batch, program.eval_size, to_train=False)
        return program.eval_step(trainable, frozen, placed)

    size = program.eval_size
    return HeldOut(config.run_dir, eval_step, inputs, size, program.rows(size), reporter, first)


def _follow_adapter(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Where the weights lie; a run's directory may stand for its base and its adapter."""
    if (source := config.init_from) is None:
        if "lora" in (config.tune.llm, config.tune.vision):
            raise ConfigError("tune 'lora' needs a base to adapt: set init_from to a checkpoint")
        return config, None
    if config.init_adapter is not None:
        adapter = str(adapter_in(config.init_adapter))
        config = dataclasses.replace(config, init_adapter=adapter)
    found = resolve_start(source)
    if found.adapter is None:
        return config, found
    if config.init_adapter is not None:
        raise ConfigError(
            f"init_from {config.init_from} brings the adapter {found.adapter}, so init_adapter "
            f"{config.init_adapter} is one too many; name its base {found.name} in init_from"
        )
    if "lora" not in (config.tune.llm, config.tune.vision):
        raise ConfigError(
            f"init_from {config.init_from} brings the adapter {found.adapter}, but this run trains "
            "none; merge it first (LlavaModel: merge_adapter, save_pretrained), start from that"
        )
    return dataclasses.replace(config, init_adapter=str(found.adapter)), found


def _choose_plan(
    config: TrainConfig, model: ModelConfig, steps: int, mesh: Mesh, images: int
) -> TrainConfig:
    """The cheapest plan that fits the attached devices, if asked for, before a weight is loaded.

    Raises:
        ConfigError: None fits; names the closest.
    """
    if is_first():
        write_trial(config.run_dir, None)
    if config.memory.plan == "manual":
        return config
    capacity = min(of_all(_device_memory(config)))
    if not capacity:  # a CPU without a declared limit
        return config
    known = Path(config.output_dir) / ".plans"
    for_host = min(of_all(int(0.9 * host_memory()) // devices_of_machine()))
    as_run = dataclasses.replace(config, steps=steps)  # so that the step need not compile again
    measure = lambda plan: dataclasses.replace(
        measure_once(known, plan.apply(as_run), model, images, capacity), host_capacity=for_host
    )
    chosen = choose_plan(config, data_parallel_size(mesh), measure)
    if not chosen.usage.fits:
        usage, devices = chosen.usage, least_devices(chosen.usage, mesh.size)
        raise ConfigError(
            f"no plan fits {capacity / GIB:.1f} GiB a device, of which {usage.reserve / GIB:.1f} "
            f"are left to the runtime, and {for_host / GIB:.1f} GiB of host memory a device; the "
            f"closest is {chosen.plan}: {usage.total / GIB:.2f} and {usage.host_total / GIB:.2f}; "
            "take "
            + ("more host memory, or " if usage.host_headroom < 0 else "")
            + (f"at least {devices} such devices, or " if devices else "")
            + "a smaller model, data.max_length or lora.rank"
        )
    if is_first():
        write_trial(config.run_dir, chosen)
    return chosen.plan.apply(config)


def _device_memory(config: TrainConfig) -> int:
    """Bytes of one device, as declared or found; 0 if they are neither."""
    if config.memory.limit_gib is not None:
        return int(config.memory.limit_gib * GIB)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return int(limit / (1 - RESERVE_SHARE))


def _with_micro_size(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    batch = dataclasses.replace(config.batch, micro_size=micro_size(config.batch, mesh))
    return dataclasses.replace(config, batch=batch)


def _check_begun(
    config: TrainConfig,
    saved: Checkpoints,
    description: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """Holds a run to the recipe it began with; a start that trained nothing is forgotten instead.

    Args:
        config: The run.
        saved: Its checkpoints, of which there is one.
        description: As `describe` gives it.
        identity: Of the order of the samples.

    Raises:
        ConfigError: It has another recipe, and something was trained.
    """
    found = changes(config.run_dir, description)
    position = saved.position()
    fixed = [name for name, value in identity.items() if position.get(name) != value]
    if not (found.recipe or found.data or fixed):
        return
    rows = config.run_dir / "metrics.jsonl"
    if saved.latest == 0 and not (rows.exists() and rows.stat().st_size):
        saved.clear()
        for name in ("evaluations.jsonl", "wandb.json"):
            (config.run_dir / name).unlink(missing_ok=True)
        for name in ("examples", "tensorboard"):
            shutil.rmtree(config.run_dir / name, ignore_errors=True)
        return
    if fixed:
        name, now = fixed[0], data_sources(description["config"]["data"])
        raise _cannot_change(
            config.run_dir, name, position.get(name), identity[name], (found.sources, now)
        )
    what, other = ("recipe", "another recipe") if found.recipe else ("data", "other data")
    both = " and other data" if found.recipe and found.data else ""
    lines = [f"the run in {config.run_dir} began with {other}{both}:", *found.recipe, *found.data]
    if not config.checkpoint.accept_changes:
        lines += [
            f"To go on with the changed {what}, add --checkpoint.accept-changes. To train anew, "
            "give another --name."
        ]
        raise ConfigError("\n".join(lines))
    _say("\n".join([*lines, "These changes are accepted."]))


def _cannot_change(
    run_dir: Path, name: str, before: Any, now: Any, sources: tuple[str, str]
) -> ConfigError:
    """Says what of the order of the samples differs from that in which a run was trained."""
    what = {
        "records": "number of training records",
        "weights": "weights of data.mixture",
        "batch_size": "batch.global_size",
        "seed": "seed",
        "group": "number of samples in a group (data.group_by_modality_length, batch.loss_group)",
    }[name]
    text = f"{run_dir} was trained with {what} {before}; this command gives {now}"
    mend = "Give the old value"
    if name == "records":
        count = lambda counts: " + ".join(map(str, counts or [0]))
        text = f"{run_dir} was trained on {count(before)} records of {sources[0]}; "
        text += f"this command gives {count(now)} ({sources[1]})"
        mend = "Restore the old data"
    return ConfigError(
        f"{text}. The {what} cannot change while a run goes on, even with "
        f"--checkpoint.accept-changes. {mend}, or start a new run with another --name."
    )


def _refuse_to_replace(config: TrainConfig) -> None:
    """A run without checkpoints starts anew; it must not do so over a result."""
    if from_first(export_dir(config).exists()):
        raise ConfigError(
            f"{export_dir(config)} exists, but {config.run_dir} has no checkpoints to continue "
            "from; move it away, or give the run a new name"
        )


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
    return model.load(
        source,
        program.model_config,
        program.abstract,
        seed=config.seed,
        wanted=wanted,
        say=_say,
    )
