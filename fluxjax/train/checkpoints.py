"""Checkpoints of a training: written in the background, whole or not at all, for any mesh.

A checkpoint holds the state as one array per name, the place in the data, and what identifies the
training. Frozen weights are not in it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fluxjax.checkpoint.disk import FULL_DISK
from fluxjax.printable import printable_path
from fluxjax.train.batch import StreamState
from fluxjax.train.named_leaves import leaf_path_name
from fluxjax.train.step import TrainState

Identity = Mapping[str, Any]
"""What a checkpoint must have been made with to be continued: texts and numbers by name."""


class CheckpointContent(NamedTuple):
    """What a checkpoint holds: the state, and the place in the data behind its last batch."""

    state: TrainState
    data: StreamState


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the `last` ones, and those at multiples of `every` steps, if any."""

    last: int = 2
    every: int | None = None


class Checkpoints:
    """The checkpoints in a folder, by the number of the step.

    They are written while the training goes on; `wait` returns when all are complete. A process
    that is killed while it writes leaves the previous ones as they are.

    **Arguments:** `folder`: made if there is none. `identity`: of this training. `kept`: which
    stay.
    """

    def __init__(self, folder: Path, identity: Identity, *, kept: Retention = Retention()):
        self.folder, self.identity = folder, dict(identity)
        self._begun: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept.last,
            keep_period=kept.every,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with _explained(folder):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Return the number of the last complete checkpoint's step, or None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: StreamState) -> None:
        """Begin to write a checkpoint; the state may be donated once this returns.

        One of this step that there is already, or that is being written, stays.

        **Raises:** `OSError` for a full disk, also if an earlier checkpoint failed since.
        """
        step = int(state.step)
        if step in (self._begun, self.latest()):
            return
        about = {"identity": self.identity, "data": data}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_flat(state)), about=ocp.args.JsonSave(about)
        )
        with _explained(self.folder):
            self._manager.save(step, args=items, force=True)
        self._begun = step

    def restore(self, like: TrainState, step: int | None = None) -> CheckpointContent:
        """Return the state of a checkpoint, the last one by default.

        **Arguments:** `like`: shapes, dtypes and shardings of the state, which may be of another
        mesh than the one that was written.
        **Raises:** `ValueError` for a checkpoint of another training, which names the differences;
        `FileNotFoundError` if there is none.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(
                f"There is no checkpoint in {printable_path(self.folder)}. Begin a new training."
            )
        about = self._manager.restore(
            step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
        ).about
        self._check(step, about["identity"])
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_flat(like)))
        try:
            arrays = self._manager.restore(step, args=items).state
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"Checkpoint {step} in {printable_path(self.folder)} is damaged, or its arrays are "
                f"not those of this training ({error}). Remove it, or choose another folder."
            ) from error
        leaves, structure = jax.tree.flatten(like)
        ordered = [arrays[name] for name in _flat(like)]
        assert len(ordered) == len(leaves)
        return CheckpointContent(jax.tree.unflatten(structure, ordered), about["data"])

    def _check(self, step: int, found: Identity) -> None:
        """**Raises:** `ValueError` if the checkpoint is of another training."""
        differences = []
        for name in {**found, **self.identity}:
            theirs, ours = found.get(name), self.identity.get(name)
            if theirs != ours:
                differences.append(f"{name} {theirs!r}, not {ours!r}")
        if differences:
            raise ValueError(
                f"Checkpoint {step} in {printable_path(self.folder)} is of another training: "
                f"{'; '.join(differences)}. Use the same configuration, or another folder."
            )

    def wait(self) -> None:
        """Return when all checkpoints are complete. **Raises:** as `save`."""
        with _explained(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and stop the background threads. **Raises:** as `save`."""
        with _explained(self.folder):
            self._manager.close()


def _flat(state: PyTree) -> dict[str, Any]:
    """Return the leaves of a state by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {leaf_path_name(path): leaf for path, leaf in leaves}


_FULL = ("no space left", "enospc", "disk quota", "resource_exhausted", "file too large")
"""What the messages of libraries hold where the disk is full."""


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into one that says what is needed.

    **Raises:** `OSError` if the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise OSError(
            f"There is not enough disk space for a checkpoint in {printable_path(folder)}; the "
            "previous one is whole. Free some space and continue, or keep fewer of them."
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return True
        if any(word in str(error).lower() for word in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
