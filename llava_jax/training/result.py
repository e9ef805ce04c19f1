"""Writes the result of a run at its end: the export, its model card and the last report."""

from llava_jax.distributed.multihost import broadcast_from_main, is_main_process, say
from llava_jax.models.layers import Params
from llava_jax.report.early_stopping import is_stalled
from llava_jax.report.report import Report
from llava_jax.report.rows import read_rows
from llava_jax.train_step.program import Program
from llava_jax.train_step.step import TrainState
from llava_jax.training.check_learning import why_nothing_changed
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.export import export, publish, unfinished_dir
from llava_jax.training.model_card import model_card
from llava_jax.training.setup import Setup


def is_finished(setup: Setup, saved: Checkpoints) -> bool:
    """Returns True if the main process finds a checkpoint of the last step, and the result.

    Args:
        setup: Setup of the run.
        saved: Checkpoints of the run.
    """
    config = setup.config
    rows = read_rows(config.run_dir / "evaluations.jsonl").rows
    is_early = is_stalled(rows, config.eval.patience, config.eval.best_by)
    is_last = is_early and rows[-1]["step"] == saved.latest
    return broadcast_from_main(
        (is_last or saved.latest == setup.total_steps) and config.export_dir.is_dir()
    )


def say_finished(setup: Setup, saved: Checkpoints) -> None:
    """Prints where the result of an already finished run is, and writes its report again."""
    config = setup.config
    say(f"the run in {config.run_dir} is finished after {saved.latest} steps")
    say(f"its result is in {config.export_dir}")
    Report(config.run_dir, write=is_main_process()).update(now=True)


def write_result(
    setup: Setup, program: Program, saved: Checkpoints, trained: list[TrainState], frozen: Params
) -> None:
    """Exports the parameters of the last step, or those of the best step, and prints where.

    With `checkpoint.keep_best`, the result has the parameters of the checkpoint of the best
    evaluation. All processes must call this.

    Args:
        setup: Setup of the run.
        program: Program of the run.
        saved: Checkpoints of the run; the last one contains the last train state.
        trained: List that contains only the last train state, which is removed from the list. The
            memory of this state is free when another state is restored.
        frozen: Frozen parameters by path.
    """
    config, state = setup.config, trained.pop()
    last = int(state.step)
    # Only one process reads the whole checkpoint to find damage.
    best = broadcast_from_main(saved.intact_best_step() if is_main_process() else None)
    if best is not None and best != last:
        del state
        state = saved.restore_state(program.state, best)
    export(setup, program, frozen, unfinished_dir(config), state)
    publish(config, _card(setup, last, best))
    warning = why_nothing_changed(config, config.run_dir / "metrics.jsonl", setup.total_steps)
    if warning and is_main_process():
        say(warning)
    which = "" if best is None else f", with the parameters of step {best} (checkpoint.keep_best)"
    say(f"wrote {config.export_dir}{which}")
    Report(config.run_dir, write=is_main_process()).update(now=True)
    say(f"{config.run_dir}/report.html shows the run; to chat with the trained model:")
    say(f"llava-jax chat {config.run_dir}")


def _card(setup: Setup, steps: int, best: int | None) -> str:
    """Returns the model card of the run's export."""
    name = setup.found.name if setup.found else None
    counts = len(setup.inputs.records), len(setup.inputs.eval_records)
    rows = read_rows(setup.config.run_dir / "evaluations.jsonl").rows
    return model_card(setup.config, name, steps, counts, rows, best)
