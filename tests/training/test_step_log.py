"""What a run records of its steps, and when that ends it."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import TrainConfig
from llava_jax.errors import RunError
from llava_jax.training.console import Reporter
from llava_jax.training.inputs import Inputs
from llava_jax.training.step_log import StepLog

NAN = jnp.array(jnp.nan)
METRICS: Any = {name: jnp.ones(()) for name in ("loss", "learning_rate", "grad_norm", "tokens")}
METRICS |= {
    "supervised_tokens": jnp.ones((), int),
    "samples": jnp.full((), 2),
    "present": jnp.ones(2, int),
}


class Records(list[int]):
    def where(self, number: int) -> str:
        return f"sample {number}"


def open_step_log(directory: Path, first_step: int) -> StepLog:
    data = Mock(max_skipped=1.0)
    config = Mock(spec=TrainConfig, run_dir=directory, nonfinite_limit=3, data=data)
    order = Mock(batch=lambda number: np.arange(2))
    inputs = Mock(spec=Inputs, records=Records([0, 1]), order=order)
    reporter = Reporter(directory / "metrics.jsonl", first_step, 9)
    return StepLog(config, inputs, reporter, first_step)


@pytest.mark.parametrize("stopped_after", [2, 3])
def test_steps_that_are_not_finite_are_counted_across_a_stop(tmp_path: Path, stopped_after: int):
    bad = METRICS | {"loss": NAN}
    step_log = open_step_log(tmp_path, 0)
    step_log.log(METRICS, 1)
    for step in range(2, stopped_after + 1):
        step_log.log(bad, step)
    step_log = open_step_log(tmp_path, stopped_after)
    assert step_log.nonfinite == stopped_after - 1
    for step in range(stopped_after + 1, 4):
        step_log.log(bad, step)
    with pytest.raises(RunError, match="3 consecutive steps, the last of which is step 4, had"):
        step_log.log(bad, 4)
    assert open_step_log(tmp_path, 1).nonfinite == 0
