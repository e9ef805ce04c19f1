"""Resumable checkpoints of a run, with Orbax: all that changes, and nothing that does not.

The frozen base is not copied: the run's config.json names it and holds its fingerprint.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llava_jax.config import CheckpointConfig
from llava_jax.host import is_for_host
from llava_jax.step import TrainState


class Checkpoints:
    """The checkpoints of one run, `{directory}/{step}/`, written asynchronously.

    Args:
        directory: Made if it does not exist.
        config: How many to keep.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step; None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving, and if `state` lies in host memory finishes; then it may be donated.

        Args:
            state: What the next step starts from.
            data: The data's position, as plain JSON.
        """
        step = int(state.step)
        if step == self.latest:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        self._manager.save(step, args=args)
        if any(map(is_for_host, jax.tree.leaves(state))):
            self.wait()  # Orbax writes such arrays from where they lie, and so holds on to them

    def clear(self) -> None:
        """Removes them all."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint, onto any number of devices.

        Args:
            abstract: Shapes, dtypes and shardings.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self.latest, args=args)
        return restored["state"], restored["data"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets a save that has begun finish, whatever ended the run."""
        self._manager.close()
