"""What Orbax still reads is not donated; half of a checkpoint is never taken for one."""

import asyncio
import dataclasses
import itertools
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import tensorstore
from tiny_training import CONFIG, change, start

from llava_jax.config import CheckpointConfig
from llava_jax.distributed import host_memory
from llava_jax.errors import CheckpointError
from llava_jax.training import checkpoints
from llava_jax.training.checkpoints import MANIFEST, Checkpoints, read_manifest, write_manifest


@pytest.mark.parametrize("on_host", [True, False])
def test_saving_waits_for_what_lies_in_host_memory(
    on_host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    config = change(CONFIG, memory={"offload_optimizer": on_host})
    program, state, _ = start(config, 1, 3)
    with Checkpoints(tmp_path, config.checkpoint) as saved, jax.set_mesh(program.mesh):
        saved.save(state, {})
        assert saved.latest == (0 if on_host else None)
        saved.wait()
        assert saved.latest == 0


def test_checkpoints_can_be_removed_to_begin_anew(tmp_path: Path):
    program, state, _ = start(CONFIG, 1, 3)
    with Checkpoints(tmp_path, CONFIG.checkpoint) as saved, jax.set_mesh(program.mesh):
        saved.save(state, {})
        saved.wait()
        saved.clear()
        assert saved.latest is None
        saved.save(state, {})
        saved.wait()
        assert saved.latest == 0


def test_writes_that_outlive_a_failed_save_are_not_complained_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(str(found.exc_value)))

    async def wait_for(future: tensorstore.Future) -> None:
        await future

    def complain() -> None:
        promise, future = tensorstore.Promise.new()
        loop = asyncio.new_event_loop()
        task = loop.create_task(wait_for(future))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        promise.set_result(task)

    complain()
    assert seen == ["Event loop is closed"]
    checkpoints._drop_late_callbacks.cache_clear()
    with Checkpoints(tmp_path, CONFIG.checkpoint):
        complain()
    assert len(seen) == 1
    other: Any = SimpleNamespace(exc_value=ValueError("other"))
    sys.unraisablehook(other)
    assert seen[1:] == ["other"]
    checkpoints._drop_late_callbacks.cache_clear()  # what it set is undone


def test_a_kill_while_an_old_one_is_removed_leaves_nothing_that_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program, state, _ = start(CONFIG, 1, 3)
    config = CheckpointConfig(every=1, keep=1)

    def killed(place: Path, **_: bool) -> None:
        (place / MANIFEST).unlink()
        raise OSError

    with Checkpoints(tmp_path, config) as saved, jax.set_mesh(program.mesh):
        saved.save(state, {})
        saved.wait()
        monkeypatch.setattr(shutil, "rmtree", killed)
        saved.save(dataclasses.replace(state, step=state.step + 1), {})
        saved.wait()
    monkeypatch.undo()
    assert (tmp_path / "1").is_dir()
    assert not (tmp_path / "0").exists()
    with Checkpoints(tmp_path, config) as saved:
        assert saved.latest == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_checkpoint_of_another_recipe_is_no_traceback(tmp_path: Path):
    program, state, _ = start(CONFIG, 1, 3)
    with Checkpoints(tmp_path, CONFIG.checkpoint) as saved, jax.set_mesh(program.mesh):
        saved.save(state, {})
    other_rank = change(CONFIG, lora={"rank": 2})
    in_full = change(CONFIG, tune={"llm": "full", "vision": "full"})
    eight_bit = change(CONFIG, optimizer={"name": "adamw_8bit"}, lora={"rank": 256})
    for changed in (other_rank, in_full, eight_bit):
        program, _, _ = start(changed, 1, 3)
        with (
            Checkpoints(tmp_path, CONFIG.checkpoint) as saved,
            jax.set_mesh(program.mesh),
            pytest.raises(CheckpointError, match="0 is of a recipe with other trained parameters"),
        ):
            saved.restore(program.state)


def test_a_list_of_files_that_lost_any_stretch_is_no_list():
    """What is left may be JSON, and name files that never were."""
    files = {f"d/{name}": [10 * name, name] for name in range(1, 6)}
    text = write_manifest(files)
    assert read_manifest(text) == files
    noticed = 0
    for first, last in itertools.combinations(range(len(text) + 1), 2):
        try:
            assert read_manifest(text[:first] + text[last:]) == files  # but for blanks
        except ValueError:
            noticed += 1
    assert noticed > 0.9 * math.comb(len(text) + 1, 2)
