"""Saving and restoring the state of a training run, by Orbax."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from kdgqa_jax import orbax_logs, paths, processes, sharding, storage, tree_utils, workdir
from kdgqa_jax.console import say
from kdgqa_jax.errors import UserError, one_line


def abstract(shapes: Any, shardings: Any) -> Any:
    """What `StateCheckpoints.restore` takes, from trees of shapes and of shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def any_saved(directory: paths.Path) -> bool:
    """If there is a checkpoint; one that a kill has left half-written does not count."""
    return bool(_complete(directory))


def _complete(directory: paths.Path) -> list[str]:
    """The names of the steps that are saved.

    On object storage, which renames nothing, the folder of a step is there from the beginning.
    """
    try:
        steps = [path for path in directory.iterdir() if path.name.isdigit()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except paths.failures(directory) as error:
        raise UserError(f"{directory} cannot be read ({paths.reason(error)})") from None
    if paths.is_remote(directory):
        steps = [path for path in steps if (path / storage.COMPLETE).exists()]
    return [path.name for path in steps]


class StateCheckpoints:
    """The checkpoints of one run: the whole training state by step, the newest `keep` of them.

    Saving is asynchronous and atomic: a kill at any moment leaves the checkpoints before it. Each
    carries a checksum over all bits of the state, which holds on any number of devices.

    Orbax itself writes to gs://. To s3:// it cannot: there a local folder is uploaded.
    """

    def __init__(self, directory: paths.Path, keep: int = 2):
        self.directory = directory
        self._mirror: storage.Mirror | None = None  # on the first process
        self._uploads = concurrent.futures.ThreadPoolExecutor(1)
        orbax_logs.silence()
        with self._reported("read"):
            self._checkpointer = ocp.training.Checkpointer(
                directory if paths.orbax_writes(directory) else self._local_folder(),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )
        self._saving: Any = None

    def _local_folder(self) -> pathlib.Path:
        """A folder that holds what is saved, which the first process uploads.

        Raises UserError: another process does not see it.
        """

        def begin() -> str:
            self._mirror = storage.Mirror(self.directory, _complete(self.directory))
            return os.fspath(self._mirror.local)

        folder = pathlib.Path(processes.on_first_process(begin))
        if not folder.is_dir():
            raise UserError(
                f"checkpoints in {self.directory} are written through a folder that all processes"
                f" have to see, and {folder} is not one; set TMPDIR to one, or use gs:// or a"
                " shared file system"
            )
        return folder

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Save in the background, unless this step is saved already; `position` is JSON.

        Raises UserError: this checkpoint, or one before it, cannot be written.
        """
        if self.latest_step == step:
            return
        metadata = {**position, "checksum": int(_checksum(state))}
        with self._reported("written"):
            self._settle()
            if paths.is_remote(self.directory):
                run = self.directory.parent
                processes.on_first_process(lambda: workdir.check_held(run))
            self._saving = self._checkpointer.save_async(
                step, state, custom_metadata=metadata, force=True
            )
            if self._mirror:
                self._saving = self._uploads.submit(self._upload, self._mirror, self._saving)

    def _upload(self, mirror: storage.Mirror, saving: Any) -> None:
        """Upload what is saved; it counts once the file that says that it is complete is there."""
        saving.result()
        for name in _complete(mirror.local):
            (mirror.local / name / storage.COMPLETE).touch()
        mirror.push()

    def wait(self) -> None:
        """Until saves under way have ended. Raises UserError if one of them failed."""
        with self._reported("written"):
            self._settle()
            self._checkpointer.wait()

    def _settle(self) -> None:
        """Wait for the save under way: nothing else ends its thread."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    @property
    def steps(self) -> list[int]:
        """The steps that are saved, oldest first."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    @property
    def latest_step(self) -> int | None:
        """The newest step that is saved."""
        latest = self._checkpointer.latest
        return latest.step if latest else None

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """(state, position) of the newest step that can be read; None: there are no checkpoints.

        Damaged ones are reported and set aside beside `directory`; a sound one never is. Layers may
        have been stacked when it was saved and not be now, or the other way round.

        Args:
          like: an abstract state: shapes, dtypes and shardings, which need not be those of before.

        Raises UserError: there are checkpoints, and none of them can be read, or the newest of
          those that can has other arrays.
        """
        steps = self.steps
        for step in reversed(steps):
            found = self._restore(step, like)
            if not isinstance(found, str):
                return found
            aside = self.directory.parent / f"damaged_checkpoint_{step}"
            say(f"checkpoint of step {step} in {self.directory} is damaged ({found})")
            if step == steps[0]:
                raise UserError(
                    f"no checkpoint in {self.directory} can be read; delete that folder to start"
                    " over, or choose another --workdir"
                )
            processes.on_first_process(functools.partial(self._set_aside, step, aside))
            say(f"it is now {aside}; going back to the one before it")
            self._checkpointer.reload()
        return None

    def _restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]] | str:
        """(state, position), or why not. Raises UserError if it is sound but has other arrays."""
        try:
            metadata = self._checkpointer.metadata(step)
            position = dict(metadata.custom_metadata)
            checksum, stored = position.pop("checksum"), _arrays(metadata.metadata)
        except KeyError:
            return "its metadata is incomplete"
        except Exception as error:  # whatever Orbax and TensorStore raise
            return self._damage(step, error)
        there = like
        if stored.keys() != _arrays(like).keys():
            there = _in_other_layout(like)
        self._check_fits(step, stored, _arrays(there))
        try:
            state = self._checkpointer.load(step, there)
        except Exception as error:
            return self._damage(step, error)
        if int(_checksum(state)) != checksum:
            return "its checksum is wrong"
        if there is not like:
            shardings = jax.tree.map(lambda x: x.sharding, like)
            convert = functools.partial(
                tree_utils.in_layout, stacked=bool(tree_utils.is_stacked(like))
            )
            state = jax.jit(convert, out_shardings=shardings)(state)
        return state, position

    def _damage(self, step: int, error: Exception) -> str:
        """What is damaged. Raises UserError if it is something else that fails."""
        text = f"{error} {error.__cause__ or ''}"
        if isinstance(error, MemoryError) or any(reason in text for reason in _NOT_DAMAGE):
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} cannot be read now"
                f" ({_one_line(error)}); it is left as it is; mend that, then run this again"
            )
        return _one_line(error)

    def _check_fits(self, step: int, there: dict[str, str], here: dict[str, str]) -> None:
        wrong = [
            f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if wrong:
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} does not fit this run"
                f" ({'; '.join(wrong[:2])}{more}) and is left as it is; resume with the config,"
                " data and release that it was made with, or choose another --workdir"
            )

    def _set_aside(self, step: int, aside: paths.Path) -> None:
        storage.move(self.directory / str(step), aside)
        if self._mirror:
            storage.remove(self._mirror.local / str(step))

    def __enter__(self) -> "StateCheckpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for saves under way. Raises UserError if one of them failed."""
        try:
            self._end(error)
        finally:
            self._uploads.shutdown()
            if self._mirror:
                self._mirror.close()

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.wait()
            with self._reported("written"):
                self._checkpointer.close()
        elif jax.process_count() == 1:  # others, which may be gone, would have to close it too
            with contextlib.suppress(Exception):  # the first error is reported
                self._settle()
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = _one_line(error)
            if jax.process_count() > 1 and reason not in _DISK:
                raise  # another process
            raise UserError(
                f"a checkpoint in {self.directory} cannot be {what} ({reason}); older"
                " ones are as they were; free space or change permissions, then run this again"
            ) from None


def _in_other_layout(like: Any) -> Any:
    """An abstract state with its layers stacked if they are not, and the other way round."""
    stacked = tree_utils.is_stacked(like)
    if stacked is None:
        return like
    try:
        shapes = jax.eval_shape(functools.partial(tree_utils.in_layout, stacked=not stacked), like)
    except ValueError:  # layers that differ, as some are frozen
        return like
    return abstract(shapes, sharding.by_rules(shapes, jax.tree.leaves(like)[0].sharding.mesh))


def _arrays(tree: Any) -> dict[str, str]:
    """Dtype and shape by path, of arrays or what describes them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named}


@jax.jit
def _checksum(state: Any) -> jax.Array:
    """() uint32: a weighted sum over all bits; integers add up alike in whatever order."""
    total = jnp.uint32(0)
    for i, x in enumerate(jax.tree.leaves(state)):
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = place * 31 + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        total = total * 16777619 + jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32) + i
    return total


_STORE = ("PERMISSION_DENIED", "Forbidden", "Access Denied", "AccessDenied")  # of objects
_DISK = (
    *("No space left on device", "File too large", "Permission denied", "Read-only file system"),
    *_STORE,
)
_NOT_DAMAGE = (*_DISK, "RESOURCE_EXHAUSTED", "Cannot allocate memory", "Too many open files")
_DATA = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE")  # what TensorStore begins with


def _one_line(error: Exception) -> str:
    """The part of a long message that says what happened."""
    text = one_line(f"{error} {error.__cause__ or ''}", None)
    disk = next((reason for reason in _DISK if reason in text), None)
    start = min((text.find(reason) for reason in _DATA if reason in text), default=0)
    return disk or f"{type(error).__name__}: {text[start : start + 160]}"
