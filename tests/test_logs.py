"""Records of a run: what every file holds, restarts, kills, full disks, missing packages."""

import csv
import json
import math
import os
import stat
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax import logs
from kdgqa_jax.errors import UserError

FIRST = {"step": 1, "epoch": 0.5, "split": "train", "loss": 2.5}
ALLOCATIONS = ([[2, 2], [4, 0]], [[3, 1], [4, 0]], [[0, 4], [2, 2]])


def write_run(folder, steps, start=0, **options):
    """A record of training per step, and one of the test after every second one."""
    writer = logs.MetricsWriter(folder, start, **options)
    for step in range(start + 1, steps + 1):
        allocation = np.array(ALLOCATIONS[step % 3])
        writer.write(
            step=step, epoch=step / 2, split="train", loss=jnp.float32(1 / step),
            key_norm=np.full((2, 2), 0.5, np.float32), allocation=allocation,
        )  # fmt: skip
        if step % 2 == 0:
            writer.write(step=step, epoch=step / 2, split="test", top1=50.0, count=np.int64(7))
    writer.close()


def contents(folder):
    return {name: (folder / name).read_text() for name in ("metrics.jsonl", "metrics.csv")}


def events(folder):
    """(events by file, oldest first) of the TFRecord framing: length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    files = sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    found = []
    for path in files:
        data, at, inside = path.read_bytes(), 0, []
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            inside.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
        found.append(inside)
    return found


def curves(event):
    return {value.tag: value.simple_value for value in event.summary.value}


# --- the files ----------------------------------------------------------------------------------


def test_jsonl_has_every_value_and_csv_the_scalars(tmp_path):
    write_run(tmp_path, 4)
    records = logs.read_metrics(tmp_path)
    assert [(r["step"], r["split"]) for r in records] == [
        (1, "train"), (2, "train"), (2, "test"), (3, "train"), (4, "train"), (4, "test")
    ]  # fmt: skip
    assert records[0]["key_norm"] == [[0.5, 0.5], [0.5, 0.5]]
    assert records[0]["idle_kv_heads"] == [0, 1]
    rows = list(csv.DictReader(contents(tmp_path)["metrics.csv"].splitlines()))
    assert list(rows[0]) == ["step", "epoch", "split", "loss", "top1", "count"]
    assert [row["top1"] for row in rows] == ["", "", "50.0", "", "", "50.0"]
    assert [float(row["loss"]) for row in rows if row["loss"]] == [
        record["loss"] for record in records if "loss" in record
    ]


def test_allocation_changes_are_counted_in_query_heads_since_the_last_record(tmp_path):
    write_run(tmp_path, 4)
    changes = [r["allocation_changes"] for r in logs.read_metrics(tmp_path) if "allocation" in r]
    # steps 1..4 have the allocations 1, 2, 0, 1
    assert changes == [[0, 0], [3, 2], [2, 2], [1, 0]]
    naive = [
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) / 2
        for x, y in zip(ALLOCATIONS[1], ALLOCATIONS[2], strict=True)
    ]
    assert logs.allocation_changes(ALLOCATIONS[1], ALLOCATIONS[2]).tolist() == naive
    assert logs.idle_kv_heads([[0.0, 1.5, 0.0], [1.0, 0.5, 0.0]]).tolist() == [2, 1]


def test_splits_have_allocations_of_their_own(tmp_path):
    writer = logs.MetricsWriter(tmp_path, 0)
    for split, allocation in (("train", [[4, 0]]), ("test", [[2, 2]]), ("train", [[3, 1]])):
        writer.write(step=1, split=split, allocation=allocation)
    assert [r["allocation_changes"] for r in logs.read_metrics(tmp_path)] == [[0], [0], [1]]


def test_nan_and_infinities_are_null(tmp_path):
    writer = logs.MetricsWriter(tmp_path, 0)
    writer.write(**FIRST, worst=math.inf, norms=np.array([np.nan, 1.0]), nested={"a": -math.inf})

    def refuse(name):
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record == {**FIRST, "worst": None, "norms": [None, 1.0], "nested": {"a": None}}
    (row,) = csv.DictReader(contents(tmp_path)["metrics.csv"].splitlines())
    assert row == {"step": "1", "epoch": "0.5", "split": "train", "loss": "2.5", "worst": ""}


# --- restarts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [2, 3, 5])
def test_restart_ends_with_the_same_files(tmp_path, killed_at):
    """Killed in mid-record after some steps, resumes from step 2."""
    write_run(tmp_path / "whole", 6)
    write_run(tmp_path / "killed", killed_at)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_run(tmp_path / "killed", 6, start=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_cut_off_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert logs.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    logs.MetricsWriter(tmp_path, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


@pytest.mark.parametrize("line", ["nonsense", '{"loss": 1}', "[1]", "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
        logs.MetricsWriter(tmp_path, 0)


def test_no_file_holds_no_records(tmp_path):
    assert logs.read_metrics(tmp_path / "nowhere") == []


# --- processes, disks ---------------------------------------------------------------------------


def test_other_processes_write_nothing(tmp_path):
    write_run(tmp_path, 3, enabled=False, tensorboard=True, wandb="project")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    writer = logs.MetricsWriter(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(
        UserError, match=r"metrics.jsonl cannot be written \(Is a directory\); mend"
    ):
        writer.write(**FIRST)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
def test_a_full_disk_is_one_sentence(tmp_path, name):
    writer = logs.MetricsWriter(tmp_path, 0)
    writer.write(**FIRST)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{name} cannot be written \(No space left on device\)"):
        writer.write(**FIRST)
    writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_does_not_hang_tensorboard(tmp_path, monkeypatch):
    from tensorboardX import record_writer

    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(record_writer, "open_file", lambda path: full)
        with pytest.raises(UserError, match=r"tensorboard cannot be written \(No space left on"):
            logs.MetricsWriter(tmp_path, 0, tensorboard=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(Permission denied\)"):
        logs.MetricsWriter(tmp_path, 0)


# --- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_has_curves_of_scalars_and_of_layers(tmp_path):
    write_run(tmp_path, 2, tensorboard=True)
    ((version, start, first, second, test),) = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == start.session_log.START and start.step == 1
    assert (first.step, second.step, test.step) == (1, 2, 2)
    assert curves(first) == {
        "train/epoch": 0.5,
        "train/loss": 1.0,
        **{f"train_key_norm/layer_0{i}/head_{k}": 0.5 for i in (0, 1) for k in (0, 1)},
        "train_allocation/layer_00/head_0": 3.0,
        "train_allocation/layer_00/head_1": 1.0,
        "train_allocation/layer_01/head_0": 4.0,
        "train_allocation/layer_01/head_1": 0.0,
        "train_idle_kv_heads/layer_00": 0.0,
        "train_idle_kv_heads/layer_01": 1.0,
        "train_allocation_changes/layer_00": 0.0,
        "train_allocation_changes/layer_01": 0.0,
    }
    assert curves(second)["train_allocation_changes/layer_00"] == 3.0
    assert curves(test) == {"test/epoch": 1.0, "test/top1": 50.0, "test/count": 7.0}


def test_tensorboard_purges_what_a_restart_writes_again(tmp_path):
    write_run(tmp_path, 4, tensorboard=True)
    write_run(tmp_path, 5, start=2, tensorboard=True)
    _, (_, start, *after) = events(tmp_path)  # two files, even within a second
    assert start.session_log.status == start.session_log.START and start.step == 3
    assert [event.step for event in after] == [3, 4, 4, 5]


def test_tensorboard_takes_nan(tmp_path):
    writer = logs.MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(**{**FIRST, "loss": np.float32("nan")})
    writer.close()
    writer.close()
    assert math.isnan(curves(events(tmp_path)[0][-1])["train/loss"])


# --- optional packages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "modules", "says"),
    [
        ({"tensorboard": True}, ["tensorboardX", "tensorboardX.event_file_writer"],
         "TensorBoard needs the package tensorboardX: pip install \"kdgqa-jax\\[train\\]\""),
        ({"wandb": "mine"}, ["wandb"],
         "Weights & Biases needs the package wandb: pip install \"kdgqa-jax\\[wandb\\]\""),
    ],
)  # fmt: skip
def test_missing_packages_are_one_sentence(tmp_path, monkeypatch, options, modules, says):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=says):
        logs.MetricsWriter(tmp_path, 0, **options)
    assert list(tmp_path.iterdir()) == []
    logs.MetricsWriter(tmp_path, 0)  # nobody who does not ask for them needs them


class FakeWandb(types.ModuleType):
    """What the writer calls of wandb, recorded."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        if "bad" in options["project"]:
            raise RuntimeError("api_key not\nconfigured")
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_run(tmp_path, 2, wandb="mine", config={"seed": 42})
    write_run(tmp_path, 3, start=2, wandb="mine", config={"seed": 42})
    first, second = wandb.started
    assert first == second and first["resume"] == "allow" and first["id"]
    assert (first["project"], first["config"], first["dir"]) == (
        "mine",
        {"seed": 42},
        str(tmp_path),
    )
    assert [values["step"] for values in wandb.logged] == [1, 2, 2, 3]
    assert wandb.logged[0]["train_idle_kv_heads/layer_01"] == 1.0
    assert wandb.finished == 2


def test_weights_and_biases_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(
        UserError, match=r"did not start \(RuntimeError: api_key not configured\); .*offline"
    ):
        logs.MetricsWriter(tmp_path, 0, wandb="bad")
