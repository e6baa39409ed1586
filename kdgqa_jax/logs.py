"""Records of a run: metrics.jsonl and metrics.csv, and by choice TensorBoard and Weights & Biases.

A record is what one moment of a run measured: "step" (updates done), "epoch", "split" and values.
"""

import contextlib
import csv
import importlib
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from kdgqa_jax import extras, paths, storage, workdir
from kdgqa_jax.errors import UserError, one_line

Record = dict[str, Any]


# --- What is recorded ---------------------------------------------------------------------------


def idle_kv_heads(allocation: Any) -> np.ndarray:
    """(L,) int: how many key/value heads serve no query head, from allocations (L, K).

    Of mean allocations over images, those that serve none for any image.
    """
    return np.sum(np.asarray(allocation) == 0, axis=-1)


def allocation_changes(allocation: Any, before: Any) -> np.ndarray:
    """(L,) float: by how many query heads two allocations (L, K) differ, sum(abs(a - b)) / 2."""
    difference = np.asarray(allocation, np.float64) - np.asarray(before, np.float64)
    return np.abs(difference).sum(axis=-1) / 2


def _plain(value: Any) -> Any:
    """Arrays as lists, NumPy's and JAX's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return np.asarray(value).tolist()


def valid_json(value: Any) -> Any:
    """The same value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: valid_json(x) for key, x in value.items()}
    if isinstance(value, list):
        return [valid_json(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_BY_LAYER = ("key_norm", "allocation", "idle_kv_heads", "allocation_changes")


def _curves(record: Record) -> dict[str, float]:
    """Numbers by the name of their curve.

    train/loss, train_idle_kv_heads/layer_03, train_key_norm/layer_03/head_1: plots of the same kind
    stand together.
    """
    split = record.get("split", "run")
    curves = {
        f"{split}/{name}": float(x)
        for name, x in record.items()
        if isinstance(x, int | float) and name != "step"
    }
    for name in _BY_LAYER:
        for layer, values in enumerate(record.get(name, [])):
            of_layer = f"{split}_{name}/layer_{layer:02}"
            if isinstance(values, list):
                curves |= {f"{of_layer}/head_{k}": float(x) for k, x in enumerate(values)}
            else:
                curves[of_layer] = float(values)
    return curves


# --- metrics.jsonl and metrics.csv --------------------------------------------------------------


def read_metrics(folder: str | os.PathLike) -> list[Record]:
    """The records of metrics.jsonl in `folder`, but for a last line that a kill has cut short.

    NaN and infinities come back as None. No file: no records.

    Raises UserError: the file cannot be read, or another line is damaged.
    """
    path = paths.place(folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except paths.failures(path) as error:
        raise UserError(f"{path} cannot be read ({paths.reason(error)})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}: line {number} is damaged; delete that line, or choose another workdir"
            ) from None
        records.append(record)
    return records


@contextlib.contextmanager
def _failure_in_a_sentence(path: paths.Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except paths.failures(path) as error:
        raise UserError(
            f"{path} cannot be written ({paths.reason(error)}); mend that, and the same command"
            " resumes from the last checkpoint"
        ) from None


class _Files:
    """metrics.jsonl with every value; metrics.csv with a column for every scalar."""

    def __init__(self, folder: pathlib.Path, kept: list[Record]):
        self._folder = folder
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        with workdir.written_file(self._jsonl) as temporary:
            temporary.write_text("".join(_line(record) for record in kept))
        self._columns: list[str] = ["step", "epoch", "split"]
        self._write_csv(kept)

    def _write_csv(self, records: list[Record]) -> None:
        for record in records:
            self._columns += [name for name in _scalars(record) if name not in self._columns]
        with workdir.written_file(self._csv) as temporary, temporary.open("w", newline="") as file:
            rows = csv.DictWriter(file, self._columns)
            rows.writeheader()
            rows.writerows(_scalars(record) for record in records)

    def write(self, record: Record) -> None:
        record = valid_json(record)
        with _failure_in_a_sentence(self._jsonl), self._jsonl.open("a") as file:
            file.write(_line(record))
        scalars = _scalars(record)
        if scalars.keys() <= set(self._columns):
            with _failure_in_a_sentence(self._csv), self._csv.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(scalars)
        else:  # a new column
            self._write_csv(read_metrics(self._folder))

    def close(self) -> None:
        """Nothing is open between two records."""


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _scalars(record: Record) -> Record:
    return {name: x for name, x in record.items() if not isinstance(x, list | dict)}


# --- TensorBoard --------------------------------------------------------------------------------


def check_packages(tensorboard: bool = False, wandb: str = "") -> None:
    """Raise UserError if a package that is asked for is not installed."""
    if tensorboard:
        _optional(*_TENSORBOARD)
    if wandb:
        _optional(*_WANDB)


_RUN_ID = "wandb_run_id"
_TENSORBOARD = ("tensorboardX.event_file_writer", "TensorBoard")
_WANDB = ("wandb", "Weights & Biases")


def _optional(module: str, wanted: str) -> ModuleType:
    extras.needs(module.partition(".")[0], wanted, instead="turn it off")
    return importlib.import_module(module)


class _TensorBoard:
    """An event file in `folder`/tensorboard, with which TensorBoard drops what is after `step`.

    Not by tensorboardX's SummaryWriter: that one writes in a thread, and where the thread meets a
    full disk the run would wait for it without end.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        writer = _optional(*_TENSORBOARD)
        self._proto = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        self._place = folder / "tensorboard"
        with _failure_in_a_sentence(self._place):
            self._place.mkdir(parents=True, exist_ok=True)
            self._file = writer.EventsWriter(
                os.fspath(self._place / "events"), filename_suffix=f".{uuid.uuid4().hex[:8]}"
            )
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._append(step=step + 1, session_log=start)  # of this step and later all is purged

    def _append(self, **fields: Any) -> None:
        with _failure_in_a_sentence(self._place):
            self._file.write_event(self._proto.Event(wall_time=time.time(), **fields))
            self._file.flush()

    def write(self, record: Record) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=x) for name, x in _curves(record).items()
        ]
        self._append(step=record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        with _failure_in_a_sentence(self._place):
            self._file.close()


# --- Weights & Biases ---------------------------------------------------------------------------


class _WeightsAndBiases:
    """A run of a project; restarts resume the same one, whose id is in `folder`/wandb_run_id.

    `name` is what people see.

    Every curve is drawn over "step". Records after the last checkpoint come twice, with the same
    values. The environment variables of wandb hold: WANDB_MODE=offline needs no network.
    """

    def __init__(
        self, folder: pathlib.Path, name: str, project: str, config: dict[str, Any] | None
    ):
        wandb = _optional(*_WANDB)
        id_file = folder / _RUN_ID
        if not id_file.exists():
            with workdir.written_file(id_file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                id=id_file.read_text(),
                resume="allow",
                name=name,
                dir=os.fspath(folder),
                config=config,
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of the network, of the account, of wandb itself
            reason = one_line(error)
            raise UserError(
                f"Weights & Biases did not start ({type(error).__name__}: {reason}); log in, set"
                " WANDB_MODE=offline, or turn it off"
            ) from None

    def write(self, record: Record) -> None:
        self._run.log({"step": record["step"], **_curves(record)})

    def close(self) -> None:
        self._run.finish()


# --- The writer ---------------------------------------------------------------------------------


UPLOAD_EVERY = 30.0  # seconds


class MetricsWriter:
    """Writes the records of a run, to metrics.jsonl and metrics.csv at least.

    A run that resumes from step n drops the records after it, which it will write again: the files
    are replaced whole, and what a kill has cut short goes too. To records with an "allocation"
    (L, K) it adds by layer `idle_kv_heads` and `allocation_changes` since the record before of the
    same split (none before: 0). JSON has null, and CSV nothing, for NaN and infinities.

    What belongs on object storage is written in a local folder, which `flush` uploads; records do
    so by themselves every `UPLOAD_EVERY` seconds.

    Args:
      folder: the workdir of the run.
      step: updates done before; 0 for a new run.
      tensorboard: write `folder`/tensorboard too.
      wandb: a project of Weights & Biases; "": none.
      config: of the run, for Weights & Biases.
      enabled: False writes nothing at all: for every process but the first.

    Raises:
      UserError: a file cannot be written (the disk is full, say), from `write` too; a damaged
        metrics.jsonl; a package that is not installed; Weights & Biases does not start.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        step: int,
        tensorboard: bool = False,
        wandb: str = "",
        config: dict[str, Any] | None = None,
        enabled: bool = True,
    ):
        self._sinks: list[Any] = []
        self._allocation: dict[str, Any] = {}  # the last one of every split
        self._mirror: storage.Mirror | None = None
        self._flushed = time.monotonic()
        if not enabled:
            return
        place = paths.place(folder)
        folder, name = place, place.name
        if paths.is_remote(place):
            with _failure_in_a_sentence(place):
                self._mirror = storage.Mirror(place, ("metrics.jsonl", _RUN_ID))
            folder = self._mirror.local
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        for record in kept:
            if "allocation" in record:
                self._allocation[record.get("split", "")] = record["allocation"]
        try:
            if tensorboard:
                self._sinks.append(_TensorBoard(folder, step))
            if wandb:
                self._sinks.append(_WeightsAndBiases(folder, name, wandb, config))
            self._sinks.append(_Files(folder, kept))
        except UserError:
            self.close()
            raise

    def write(self, **record: Any) -> None:
        """Append one record.

        Args:
          **record: step (updates done), epoch, split, and values: numbers, strings, arrays of any
            framework and lists of them. Arrays on a device are waited for.
        """
        if not self._sinks:
            return
        record = _plain(record)
        if "allocation" in record:
            split, now = record.get("split", ""), record["allocation"]
            record["idle_kv_heads"] = idle_kv_heads(now).tolist()
            changes = allocation_changes(now, self._allocation.get(split, now))
            record["allocation_changes"] = changes.tolist()
            self._allocation[split] = now
        for sink in self._sinks:
            sink.write(record)
        if time.monotonic() - self._flushed > UPLOAD_EVERY:
            self.flush()

    def flush(self) -> None:
        """Until all records are where they belong; to be called before a checkpoint is saved."""
        self._flushed = time.monotonic()
        if self._mirror:
            with _failure_in_a_sentence(self._mirror.place):
                workdir.check_held(self._mirror.place)
                self._mirror.push()

    def close(self) -> None:
        """End what is open; a second call does nothing."""
        sinks, self._sinks = self._sinks, []
        with contextlib.ExitStack() as stack:  # all of them, even if one fails
            if self._mirror:
                stack.callback(self._forget)
                stack.callback(self.flush)
            for sink in sinks:
                stack.callback(sink.close)

    def _forget(self) -> None:
        mirror, self._mirror = self._mirror, None
        if mirror:
            mirror.close()
