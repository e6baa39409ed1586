"""The training loop: it learns, compiles once, and resumes exactly where it was stopped."""

import csv
import dataclasses
import itertools
import json
import math
import shutil

import helpers
import jax
import numpy as np
import pytest

from kdgqa_jax import checkpoint, config, evaluate, logs, state_checkpoints, train, tree_utils
from kdgqa_jax.data import sources
from kdgqa_jax.errors import UserError


def tiny_config(attention="mha", **changes):
    """Digits on a mu/4 (five tokens): a second of training."""
    settings = config.train_config()
    settings.model.name = "mu/4"
    settings.model.image_size = 8
    settings.model.attention = attention
    settings.model.window = 3
    settings.model.scan_layers = True
    settings.data.augment.rand_augment_ops = 0
    settings.optim.learning_rate = 2e-3
    settings.batch_size = 32
    settings.epochs = 12 * 32 / 1437
    settings.eval_every_epochs = 0.0
    settings.checkpoint_every = 5
    settings.log_every = 1
    settings.update_from_flattened_dict(changes)
    return settings


def final_state(workdir):
    """Every array of the newest checkpoint of a run."""
    from orbax.checkpoint import v1 as ocp

    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        return ocp.load(workdir / "checkpoints" / str(step))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


TIMES = ("images_per_second", "step_seconds", "data_seconds")
FIGURES = ("top1", "top5", "loss", "allocation", "steps", "best_top1")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(workdir, result) of an uninterrupted dgqa_diff run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train.train_and_evaluate(tiny_config("dgqa_diff"), workdir)


def test_run_leaves_what_it_promises(whole_run):
    workdir, result = whole_run
    assert result["steps"] == 12
    records = logs.read_metrics(workdir)
    steps = [record["step"] for record in records if record["split"] == "train"]
    assert steps == list(range(1, 13))
    assert records[-1]["split"] == "test" and records[-1]["top1"] == result["top1"]
    rows = list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(records)
    assert float(rows[3]["loss"]) == records[3]["loss"]
    assert json.loads((workdir / "result.json").read_text())["loss"] == result["loss"]
    assert records[0]["loss"] == pytest.approx(math.log(10), abs=1e-4)  # the head starts at zero
    model, variables, description = checkpoint.load_model(workdir / "model")
    assert model.attention.variant == "dgqa_diff"
    assert description["class_names"] == [str(i) for i in range(10)]
    assert set(variables) == {"params", "norm_stats"}


def test_one_compilation_while_allocations_change(whole_run):
    workdir, result = whole_run
    allocations = {
        json.dumps(r["allocation"]) for r in logs.read_metrics(workdir) if r["split"] == "train"
    }
    assert len(allocations) >= 3
    assert result["train_step_compilations"] == 1


def test_allocation_changes_in_steps_of_the_window_only(whole_run):
    workdir, _ = whole_run
    records = [r for r in logs.read_metrics(workdir) if r["split"] == "train"]
    changed_at = [
        after["step"] - 1  # the step that the update did, counted from zero
        for before, after in itertools.pairwise(records)
        if before["allocation"] != after["allocation"]
    ]
    assert changed_at and all(step % 3 == 0 for step in changed_at)


def interrupt(settings, workdir, step):
    """Run until the metrics of a step are written."""
    write = logs.MetricsWriter.write

    def stop(self, **record):
        write(self, **record)
        if record["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logs.MetricsWriter, "write", stop)
        train.train_and_evaluate(settings, workdir)


@pytest.mark.parametrize("stop_at", [3, 8])
def test_interrupted_run_resumes_bit_for_bit(whole_run, tmp_path, stop_at):
    """Stopped before and after the first checkpoint (step 5)."""
    workdir, result = whole_run
    interrupt(tiny_config("dgqa_diff"), tmp_path, stop_at)
    resumed = train.train_and_evaluate(tiny_config("dgqa_diff"), tmp_path)
    assert {k: resumed[k] for k in FIGURES} == {k: result[k] for k in FIGURES}
    assert_same(final_state(tmp_path), final_state(workdir))

    def figures(folder):
        return [
            {k: v for k, v in record.items() if k not in TIMES}
            for record in logs.read_metrics(folder)
        ]

    assert figures(tmp_path) == figures(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(True, False), (None, True)])
def test_a_run_resumes_with_its_layers_in_the_other_layout(tmp_path, monkeypatch, before, after):
    def settings(scan_layers):
        changes = {"ema_decay": 0.9, "optim.freeze": ("pos_embed", "blocks_*/norm1")}
        changed = tiny_config("dgqa_diff", **changes, **{"model.scan_layers": scan_layers})
        changed.model.name = "mini/4"  # which has two layers
        return changed

    interrupt(settings(before), tmp_path / "run", 8)
    saved, restored = final_state(tmp_path / "run"), []
    restore = state_checkpoints.StateCheckpoints.restore

    def record(*arguments):
        found = restore(*arguments)
        if found:
            restored.append(jax.device_get(found[0]))
        return found

    monkeypatch.setattr(state_checkpoints.StateCheckpoints, "restore", record)
    resumed = train.train_and_evaluate(settings(after), tmp_path / "run")
    (state,) = restored
    assert (
        tree_utils.is_stacked(state.params) == bool(after) != tree_utils.is_stacked(saved["params"])
    )
    for name in ("params", "ema", "norm_stats"):
        assert_same(getattr(state, name), tree_utils.in_layout(saved[name], bool(after)))
    whole = train.train_and_evaluate(settings(after), tmp_path / "whole")
    assert resumed["steps"] == 12
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_finished_run_is_left_as_it_is(whole_run):
    workdir, result = whole_run
    again = train.train_and_evaluate(tiny_config("dgqa_diff"), workdir)
    assert {k: again[k] for k in FIGURES} == {k: result[k] for k in FIGURES}
    assert len(logs.read_metrics(workdir)) == 13


def test_seed_decides_the_run(whole_run, tmp_path):
    _, result = whole_run
    other = train.train_and_evaluate(tiny_config("dgqa_diff", seed=1), tmp_path)
    assert other["loss"] != result["loss"]


@pytest.mark.slow
def test_mha_learns_digits(tmp_path):
    settings = tiny_config(batch_size=64, epochs=5.0, log_every=50, checkpoint_every=1000)
    result = train.train_and_evaluate(settings, tmp_path)
    assert result["top1"] > 80


def test_missing_start_leaves_no_trace(tmp_path):
    with pytest.raises(UserError, match="source nowhere not found"):
        train.train_and_evaluate(tiny_config("gqa", init="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_data_set_of_ones_own(whole_run, tmp_path):
    """The same numbers as those of a source with these images; resuming takes the same ones."""
    settings, digits = tiny_config("dgqa_diff"), sources.load("digits")
    own = dataclasses.replace(digits, name="own digits")
    result = train.train_and_evaluate(settings, tmp_path, dataset=own)
    assert {n: result[n] for n in FIGURES} == {n: whole_run[1][n] for n in FIGURES}
    assert json.loads((tmp_path / "config.json").read_text())["data"]["name"] == "own digits"
    test = sources.ArraySplit(own.test.images[:9], own.test.labels[:9])
    less = dataclasses.replace(own, test=test)
    with pytest.raises(UserError, match="9 instead of 360 images to test on"):
        train.train_and_evaluate(settings, tmp_path, dataset=less)


def test_config_of_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="kdgqa study"):
        train.train_and_evaluate(config.load_config("demo"), tmp_path / "run")


def test_start_from_another_model(whole_run, tmp_path):
    """`init` takes over the parameters; the optimizer and the step are newly initialised."""
    workdir, _ = whole_run
    settings = tiny_config("dgqa_diff", init=str(workdir / "model"), epochs=32 / 1437)
    settings.optim.learning_rate = 1e-12
    started = train.train_and_evaluate(settings, tmp_path)
    assert started["steps"] == 1
    before, after = (checkpoint.load_model(d / "model")[1]["params"] for d in (workdir, tmp_path))
    helpers.assert_close(before, after, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_of_half_precision_from_a_model_in_float32(whole_run, tmp_path, dtype):
    """Moments are float32: in float16 the epsilon of Adam would be zero, and the loss NaN."""
    settings = tiny_config("dgqa_diff", init=str(whole_run[0] / "model"), epochs=4 * 32 / 1437)
    settings.model.param_dtype = dtype
    result = train.train_and_evaluate(settings, tmp_path)
    assert math.isfinite(result["loss"]) and result["train_step_compilations"] == 1
    _, variables, _ = checkpoint.load_model(tmp_path / "model")
    assert {x.dtype.name for x in jax.tree.leaves(variables["params"])} == {dtype}


@pytest.mark.slow
def test_a_kill_in_the_first_checkpoint_does_not_lose_the_start(whole_run, tmp_path):
    """The run begins again from the model given by `init`, not from new weights."""
    workdir, _ = whole_run
    settings = tiny_config("gqa", init=str(workdir / "model"), epochs=2 * 32 / 1437)
    result = train.train_and_evaluate(settings, tmp_path / "whole")
    killed = tmp_path / "killed"
    (killed / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    for name in ("config.json", "start.json"):
        shutil.copy(tmp_path / "whole" / name, killed)
    again = train.train_and_evaluate(settings, killed)
    assert {k: again[k] for k in FIGURES} == {k: result[k] for k in FIGURES}
    assert_same(*(checkpoint.load_model(d / "model")[1] for d in (tmp_path / "whole", killed)))


def test_start_from_a_model_of_another_architecture_is_refused(whole_run, tmp_path):
    workdir, _ = whole_run
    settings = tiny_config("dgqa_diff", init=str(workdir / "model"))
    settings.model.name, settings.model.norm_epsilon = "mu/2", 1e-5
    says = "norm_epsilon is 1e-06 there, 1e-05 here; patch_size is 4 there, 2 in mu/2; leave these"
    with pytest.raises(UserError, match=says):
        train.train_and_evaluate(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def go_back(workdir, step):
    """Make of a run that has ended one that was stopped after `step`."""
    (workdir / "result.json").unlink()
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.slow
def test_numbers_that_are_not_finite(monkeypatch, poison, tmp_path):
    """They stop a run; it resumes under `skip`, which leaves them out, and then under `stop`."""
    read = train.pipeline.TrainBatches.__next__

    def with_a_bad_one(self):
        step = self.get_state()["batches"] + 1
        batch = read(self)
        return batch | {"image": batch["image"] * np.uint8(step != 7)}

    monkeypatch.setattr(train.pipeline.TrainBatches, "__next__", with_a_bad_one)
    stop = tiny_config("gqa", **{"optim.schedule": "cosine"})
    skip = stop.copy_and_resolve_references()
    skip.on_nonfinite = "skip"
    with pytest.raises(UserError, match=r"step 7 are not .* is the checkpoint of step 5 in"):
        train.train_and_evaluate(stop, tmp_path)
    skipped = train.train_and_evaluate(skip, tmp_path)
    assert (skipped["steps"], skipped["skipped_updates"]) == (12, 1)
    schedule = train.optim.make_schedule(stop.optim, 12)
    for record in logs.read_metrics(tmp_path):
        if record["split"] == "train":
            last_update = record["step"] - (record["step"] >= 7)
            assert record["learning_rate"] == pytest.approx(float(schedule(last_update - 1)))
    go_back(tmp_path, 10)
    again = train.train_and_evaluate(stop, tmp_path)
    assert {k: again[k] for k in FIGURES} == {k: skipped[k] for k in FIGURES}
    assert again["skipped_updates"] == 1


@pytest.mark.slow
def test_the_best_model_is_kept(tmp_path):
    """Also by a run that resumes, which knows the tests before."""
    often = {"keep_best": "loss", "eval_every_epochs": 2 * 32 / 1437}
    settings = tiny_config("gqa", **often, **{"optim.learning_rate": 0.02})
    train.train_and_evaluate(settings, tmp_path)
    tests = {r["step"]: r["loss"] for r in logs.read_metrics(tmp_path) if r["split"] == "test"}
    assert list(tests) == [2, 4, 6, 8, 10, 12]
    best = min(tests.values())

    def kept():
        return checkpoint.load_model(tmp_path / "best")[2]["trained_on"]["steps"]

    assert tests[kept()] == best
    before = kept()
    go_back(tmp_path, 10)
    train.train_and_evaluate(settings, tmp_path)
    assert tests[kept()] == best and kept() >= before


def test_which_test_is_the_best():
    tests = [{"top1": 90.0, "loss": 0.5}, {"top1": 91.0, "loss": 0.6}]
    assert [train._is_best(test, tests, "top1") for test in tests] == [False, True]
    assert [train._is_best(test, tests, "loss") for test in tests] == [True, False]
    nan, none, good = ({"loss": x} for x in (math.nan, None, 1.0))
    assert train._is_best(good, [nan, none, good], "loss")
    assert not train._is_best(nan, [none, nan], "loss")


def test_workdir_of_another_config_is_refused_and_kept(whole_run):
    workdir, _ = whole_run
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"another config \(model.beta: 0.9 there, 0.5 here\)"):
        train.train_and_evaluate(tiny_config("dgqa_diff", **{"model.beta": 0.5}), workdir)
    assert (workdir / "config.json").read_text() == before


def test_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.train_and_evaluate(tiny_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.attention": "kdgq"}, "unknown attention variant 'kdgq': did you mean 'kdgqa'"),
        ({"model.name": "XL/16"}, "unknown model 'XL/16'"),
        ({"model.num_kv_heads": 3, "model.attention": "gqa"}, "does not divide the 8 query heads"),
        ({"data.name": "fashion"}, "did you mean 'fashion_mnist'"),
        ({"optim.schedule": "cosin"}, "did you mean 'cosine'"),
        ({"optim.learning_rate": 0.0}, "must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"batch_size": 2**31 - 1}, r"batch_size=2147483647 images of 8x8x1 take \d+ GiB, more"),
        ({"eval_batch_size": 2**31 - 1}, "eval_batch_size=2147483647 images"),
        ({"log_every": 0}, "log_every=0 must be positive"),
        ({"init": "/nowhere/model"}, "source /nowhere/model not found"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        train.train_and_evaluate(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unknown_config_field_is_refused(tmp_path):
    settings = tiny_config()
    settings.optim.learning_rat = 1.0
    with pytest.raises(
        UserError, match=r"'optim.learning_rat': did you mean 'optim.learning_rate'"
    ):
        train.train_and_evaluate(settings, tmp_path)


# --- parts --------------------------------------------------------------------------------------


def test_top_k_counts_like_a_sort():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 200)
    order = np.argsort(-logits, axis=-1, kind="stable")
    for k in (1, 3, 5):
        expected = [label in row[:k] for label, row in zip(labels, order, strict=True)]
        assert evaluate.correct_in_top(logits, labels, k).tolist() == expected
    ties = evaluate.correct_in_top(np.zeros((3, 7), np.float32), np.array([0, 4, 5]), 5)
    assert ties.tolist() == [True, True, False]


def test_allocations_by_frequency():
    allocations = np.array([[[2, 0], [1, 1]], [[0, 2], [1, 1]], [[0, 2], [2, 0]]])
    found = tree_utils.allocations_by_frequency(allocations)
    assert [rows.tolist() for rows in found] == [[[0, 2], [2, 0]], [[1, 1], [2, 0]]]


def test_cut_off_last_metrics_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert logs.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    logs.MetricsWriter(tmp_path, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_model_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save_model(tmp_path / "model", {"params": {}}, {"not JSON": object()})
    assert list(tmp_path.iterdir()) == []
