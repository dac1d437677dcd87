"""Checkpoints in a run directory: written in the background, kept by policy, restored onto any mesh.

One checkpoint is a folder named by its step with four items: `params` (alone, so that serving reads nothing else),
`state` (the optimizer, step and rng), `data` (the data iterator's state, one integer) and `extra` (small JSON facts).
A checkpoint is written under a temporary name and renamed when it is complete, so one that can be seen is whole. With
it are the checksums of its files, by which `damage` finds what a disk did to it later; `set_aside` takes such a one
out of the way.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from llm_jax import checksums, orbax_errors, storage
from llm_jax.errors import UserError

CHUNK_BYTES = 16 << 20  # most bytes of a piece in which parameters lie on disk
DAMAGED = "damaged"  # first word of the name of a checkpoint that was set aside
_LEAST_UNIT_BYTES = 4 << 20
_PARAMS = "params"
_TEMPORARY = ".orbax-checkpoint-tmp"
_STAMPED = ("_CHECKPOINT_METADATA", "commit_success.txt")  # which Orbax writes last; they say nothing but the time


class UnreadableCheckpoint(UserError):
    """A checkpoint that is there and can't be read; `reason` is what reading said."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class _Held:
    """A preservation policy of Orbax's: checkpoints that are kept for what they are worth, not for their age."""

    def __init__(self) -> None:
        self.steps: set[int] = set()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [info.step in self.steps for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: epath.PathLike, *, keep: int = 3, keep_every: int | None = None, save_every: int = 1,
                 read_only: bool = False):
        """Opens a folder of checkpoints.

        Args:
          directory: the run's `checkpoints` folder, local or in a bucket; made if it isn't there (unless read_only).
          keep: how many of the latest are kept.
          keep_every: steps whose multiples are kept for good as well; None keeps none.
          save_every: `save` does something at the multiples of this number of steps only, unless forced.
          read_only: nothing is ever written or removed, temporary folders included.

        Raises:
          UserError: the folder is not there, or can't be made or written.
        """
        # Imported here: it takes a second, which a finished run or a --help should not pay.
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        if keep < 1 or save_every < 1:
            raise UserError(f"a run keeps at least one checkpoint and saves at most every step: keep={keep}, "
                            f"save_every={save_every}")
        for name in ("absl", "asyncio"):  # the latter for a second read that fails while the first is raised
            logging.getLogger(name).addFilter(orbax_errors.is_not_raised_as_well)
        self._ocp = ocp
        self._has_failed = False
        self._writing_step: int | None = None
        self.directory = storage.located(directory)  # Orbax writes to absolute paths only
        self.read_only = read_only
        check_place(self.directory)
        if read_only and not self.directory.is_dir():
            raise UserError(f"no checkpoints at {self.directory}: is it a run directory?")
        self._held = _Held()
        policies: list[Any] = [checkpoint_managers.LatestN(keep), self._held]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        handlers = {"params": ocp.StandardCheckpointHandler(), "state": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        try:
            with orbax_errors.quiet() if read_only else contextlib.nullcontext():
                options = ocp.CheckpointManagerOptions(
                    save_decision_policy=checkpoint_managers.FixedIntervalPolicy(save_every),
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                    enable_async_checkpointing=not read_only,
                    async_options=None if read_only else ocp.AsyncOptions(
                        post_finalization_callback=self._add_checksums),
                )
                self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise UserError(f"can't write checkpoints to {self.directory}: {error.strerror or error}") from error

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def hold(self, steps: set[int]) -> None:
        """From the next `save` on, keeps the checkpoints of these steps too, however old; no longer those of others."""
        self._held.steps = set(steps)

    def save(self, step: int, state: dict[str, Any], data_state: int, extra: dict[str, Any] | None = None,
             force: bool = False) -> bool:
        """Starts to write a checkpoint; the arrays may be donated as soon as this returns.

        Args:
          step: its name; one that is already saved is left as it is.
          state: a dict of pytrees of arrays with a "params" entry.
          data_state: batches consumed.
          extra: facts that JSON can hold.
          force: save whatever the policy says of this step.

        Returns:
          Whether a checkpoint was begun.

        Raises:
          UserError: this one, or the one that was begun before, can't be written.
        """
        if step in self._manager.all_steps() or not (force or self._manager.should_save(step)):
            return False
        args = self._ocp.args
        items = {"params": args.StandardSave(state[_PARAMS], save_args=self._cuts(state[_PARAMS])),
                 "data": args.JsonSave({"batches": int(data_state)}), "extra": args.JsonSave(extra or {})}
        if rest := _without_params(state):
            items["state"] = args.StandardSave(rest)
        with self._writing():
            self._manager.wait_until_finished()  # before another step's name is put down for `_add_checksums`
            self._writing_step = step
            return self._manager.save(step, force=force, args=args.Composite(**items))

    def _add_checksums(self) -> None:
        """Called by Orbax, on the process that commits, between the last write and the renaming."""
        temporary = self.directory / f"{self._writing_step}{_TEMPORARY}"
        folder = temporary if temporary.exists() else self.directory / str(self._writing_step)  # in a bucket
        write_checksums(folder)

    def has_checksums(self, step: int) -> bool:
        """Whether `damage` can tell; checkpoints from before there were checksums have none."""
        return checksums.exists(self.directory / str(step))

    def damage(self, step: int, item: str = "") -> str | None:
        """What a checkpoint's checksums say is wrong with it, or with one item of it, or None; several processes share
        the reading, and each hears of its own part."""
        return checksums.damage(self.directory / str(step), jax.process_index(), jax.process_count(),
                                f"{item}/" if item else "")

    def set_aside(self, step: int) -> epath.Path:
        """Renames a checkpoint so that nothing finds it any more, and nothing ever removes it; returns where it is.

        With several processes one calls this, and all `reload`.
        """
        folder = self.directory / f"{DAMAGED}-{step}"
        number = 1
        while folder.exists():
            number += 1
            folder = self.directory / f"{DAMAGED}-{step}-{number}"
        (self.directory / str(step)).rename(folder)
        self.reload()
        return folder

    def remove(self, step: int) -> None:
        """Deletes a checkpoint; all processes call this."""
        self._manager.delete(step)

    def reload(self) -> None:
        """Looks again at which checkpoints there are."""
        self._manager.reload()

    def restore(self, abstract_state: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], int, dict]:
        """Reads a whole checkpoint.

        Args:
          abstract_state: what `save` was given, with `jax.ShapeDtypeStruct`s (their shardings decide where arrays go;
            the mesh may be another than the one that saved).
          step: None for the latest.

        Returns:
          (state, data_state, extra) as they were saved.

        Raises:
          UserError: no such checkpoint, or one whose arrays have other names or shapes; an `UnreadableCheckpoint` if it
            can't be read.
        """
        step = self._step(step)
        args = self._ocp.args
        self._check(step, _PARAMS, abstract_state[_PARAMS])
        items = {"params": args.StandardRestore(abstract_state[_PARAMS]), "data": args.JsonRestore(),
                 "extra": args.JsonRestore()}
        if rest := _without_params(abstract_state):
            self._check(step, "state", rest)
            items["state"] = args.StandardRestore(rest)
        restored = self._read(step, lambda: self._manager.restore(step, args=args.Composite(**items)))
        state = {_PARAMS: restored["params"], **(restored["state"] if rest else {})}
        return state, int(restored["data"]["batches"]), restored["extra"]

    def restore_params(self, abstract_params: Any = None, step: int | None = None) -> Any:
        """Reads the parameters alone; nothing is written, so the directory may be read-only.

        Their checksums are looked at first.

        Args:
          abstract_params: tree of `jax.ShapeDtypeStruct`; with shardings, arrays go where those say; without, each
            goes whole to the first device. None takes names and shapes from the checkpoint.
          step: None for the latest.

        Raises:
          UserError: as `restore`.
        """
        step = self._step(step)
        if abstract_params is None:
            abstract_params = self._saved_shapes(step, _PARAMS)
        self._check(step, _PARAMS, abstract_params)
        if problem := self.damage(step, _PARAMS):
            raise self._unreadable(step, problem)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or one_device), abstract_params)
        args = self._ocp.args
        restored = self._read(step, lambda: self._manager.restore(step, args=args.Composite(
            params=args.StandardRestore(target))))
        return restored["params"]

    def check_params(self, abstract_params: Any, step: int | None = None) -> None:
        """UserError, naming the first difference, unless a checkpoint's parameters have these names and shapes."""
        self._check(self._step(step), _PARAMS, abstract_params)

    def params_shapes(self, step: int | None = None) -> tuple[int, Any]:
        """The step (the latest for None) and a tree of `jax.ShapeDtypeStruct` of its parameters.

        Raises:
          UserError: as `restore`.
        """
        step = self._step(step)
        return step, self._saved_shapes(step, _PARAMS)

    def wait(self) -> None:
        """Returns when everything that `save` began is complete on disk; a UserError if it can't be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the background threads; a UserError as `wait`, unless it was raised before."""
        had_failed = self._has_failed
        try:
            with self._writing():
                self._manager.close()
        except UserError:
            if not had_failed:
                raise

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """UserError for what the file system refuses, such as a full disk; TensorStore reports that as a ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._has_failed = True
            if not (reason := orbax_errors.refusal(error)):
                raise
            last = max(self._manager.all_steps(), default=None)
            have = "there is none yet" if last is None else f"the last complete one is that of step {last}"
            raise UserError(f"can't write a checkpoint to {self.directory}: {reason}; {have}") from error

    def _cuts(self, params: Any) -> Any:
        """How large leaves are cut into chunks on disk: first into layers (and experts), so that one can be read."""
        def cut(leaf: Any) -> Any:
            if leaf.nbytes <= CHUNK_BYTES:
                return self._ocp.SaveArgs()
            units, left = 0, leaf.nbytes
            while units < leaf.ndim and left // leaf.shape[units] >= _LEAST_UNIT_BYTES:
                left //= leaf.shape[units]
                units += 1
            return self._ocp.SaveArgs(shard_axes=tuple(range(units)), chunk_byte_size=CHUNK_BYTES)

        return jax.tree.map(cut, params)

    def _step(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"no complete checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        return steps[-1] if step is None else step

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # Orbax raises bare Exceptions too, with TensorStore's error as their cause
            cause = error.__cause__ or error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            del cause
        orbax_errors.end_reads()
        raise self._unreadable(step, reason[:300])

    def _unreadable(self, step: int, reason: str) -> UnreadableCheckpoint:
        others = [other for other in self.steps() if other != step]
        hint = f"remove it to use that of step {others[-1]}" if others else "there is no other"
        return UnreadableCheckpoint(f"checkpoint {self.directory / str(step)} can't be read, it is damaged or "
                                    f"incomplete ({reason}); {hint}", reason)

    def _saved_shapes(self, step: int, item: str) -> Any:
        def read() -> Any:
            metadata = self._manager.item_metadata(step)[item]
            if metadata is None:
                raise ValueError(f"{item} has no metadata")
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)

        return self._read(step, read)

    def _check(self, step: int, item: str, wanted: Any) -> None:
        """UserError that names the first array in which the checkpoint differs from `wanted`."""
        saved, expected = _shapes(self._saved_shapes(step, item)), _shapes(wanted)
        where = f"checkpoint {self.directory / str(step)} does not fit this model and optimizer: {item}/"
        for name, shape in expected.items():
            if name not in saved:
                raise UserError(f"{where}{name} of shape {shape} is not in it")
            if saved[name] != shape:
                raise UserError(f"{where}{name} has shape {saved[name]}, expected {shape}")
        for name, shape in saved.items():
            if name not in expected:
                raise UserError(f"{where}{name} of shape {shape} is in it and has no place here")


def check_place(directory: epath.PathLike) -> None:
    """UserError if `directory` is where no checkpoints can be: in `s3://`, for which Orbax has no driver (to its array
    driver anything but `gs://` is a file, and it knows only there what completes a checkpoint without a renaming)."""
    if os.fspath(directory).startswith("s3://"):
        raise UserError(f"{directory}: checkpoints can be on a disk or in gs://, not in s3://, which Orbax does not "
                        "write; mount the bucket (mount-s3, s3fs-fuse) and give its path")


def write_checksums(folder: epath.Path) -> None:
    """Writes the checksums of a checkpoint whose files are all there."""
    checksums.write(folder, without=_STAMPED)


def _without_params(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != _PARAMS}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape; names are the same for a NamedTuple and for the dict as which a checkpoint stores it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
