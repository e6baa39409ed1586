"""Data that change under a run or a study: refused in a sentence, and nothing is lost."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from source_helpers import folder_tree, noise, save
from test_study import tiny_study
from test_train import tiny_config

from kdgqa_jax import processes, state_checkpoints, study, train
from kdgqa_jax.data import identity, sources
from kdgqa_jax.data.dataset import ArraySplit
from kdgqa_jax.errors import Preempted, UserError

# --- What is distinguished ----------------------------------------------------------------------


def describe(root):
    return identity.describe(sources.load(f"folder:{root}"))


def grow(root):
    save(root / "ant" / "more.png", noise(9, 4, 4, 3))


def shrink(root):
    (root / "bee" / "000.png").unlink()


def rename(root):
    (root / "bee" / "000.png").rename(root / "bee" / "zzz.png")


def add_a_class(root):
    folder_tree(root, ("cow",))


def remove_a_class(root):
    shutil.rmtree(root / "bee")


def rename_a_class(root):
    (root / "bee").rename(root / "wasp")


CHANGES = {
    grow: "6 instead of 5 images to train on",
    shrink: "4 instead of 5 images to train on",
    rename: "other images to train on, or other labels or names of them",
    add_a_class: "class 'cow' added; 8 instead of 5 images to train on",
    remove_a_class: "class 'bee' removed; 2 instead of 5 images to train on",
    rename_a_class: "class 'wasp' added; class 'bee' removed",
}


def tree(root):
    """Two classes of three images to train on, one of them gone; two to test on."""
    folder_tree(root / "train")
    (root / "train/ant/002.png").unlink()
    folder_tree(root / "val", count=1)
    return root


def change(root, how):
    for split in ("train", "val"):
        if "class" in how.__name__ or split == "train":
            how(root / split)


@pytest.mark.parametrize("how", CHANGES)
def test_every_change_of_the_listing_is_reported(tmp_path, how):
    root, run = tree(tmp_path / "photos"), tmp_path / "run"
    identity.check(run, {"data": describe(root)})
    shutil.copytree(root, tmp_path / "elsewhere")
    identity.check(run, {"data": describe(tmp_path / "elsewhere")})  # moved, the same
    change(root, how)
    with pytest.raises(UserError) as error:
        identity.check(run, {"data": describe(root)})
    text = str(error.value)
    assert text.startswith(f"the data of the run in {run} changed after it began: {CHANGES[how]}")
    assert text.endswith("is there now") and "\n" not in text


def test_order_of_classes_pixels_and_labels_of_arrays_count():
    def described(pixels, labels, names=("a", "b")):
        split = ArraySplit(pixels, np.int32(labels))
        return identity.describe(sources.Dataset("x", names, split, split))

    pixels = noise(0, 2, 4, 4, 1)
    first = described(pixels, [0, 1])
    assert first == described(pixels.copy(), [0, 1]) == json.loads(json.dumps(first))
    others = (described(pixels ^ 1, [0, 1]), described(pixels, [1, 0]),
              described(pixels, [0, 1], ("b", "a")))  # fmt: skip
    assert [identity._changes(first, other)[0] for other in others] == [
        *["other images to train on, or other labels or names of them"] * 2,
        "the order of the classes",
    ]


def test_shifted_and_prepared_sets_have_a_listing():
    plain = sources.load("digits")
    assert identity.describe(plain) == identity.describe(sources.load("digits", shift="negative"))
    assert identity.describe(plain)["train"] != identity.describe(plain)["test"]


# --- Runs ---------------------------------------------------------------------------------------


def run_until(step, settings, workdir):
    """Preempted after a step; steps count and do nothing, so that none is compiled."""

    def count(state, batch):
        assert batch["image"].shape == (8, 8, 8, 3)
        zero = jnp.zeros((), jnp.int32)
        metrics = {"loss": zero, "skipped_updates": zero, "first_skipped": zero}
        return state.replace(step=state.step + 1), metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_train_step", lambda *_: count)
        patch.setattr(train.Preemption, "asked", lambda self, now: now == step)
        with pytest.raises(Preempted, match=f"step {step} of 5 is saved"):
            train.train_and_evaluate(settings, workdir)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(folder of data, config, workdir) of a run that was preempted after its second step."""
    place = tmp_path_factory.mktemp("stopped")
    root = tree(place / "photos")
    data = {"data.name": f"folder:{root}", "batch_size": 8, "eval_batch_size": 8, "epochs": 8.0}
    settings = tiny_config("gqa", **data)
    run_until(2, settings, place / "run")
    return root, settings, place / "run"


@pytest.fixture
def copied(stopped, tmp_path, monkeypatch):
    """The same at another place, where it may be changed; data under the path of before."""
    root, settings, workdir = stopped
    shutil.copytree(root, tmp_path / "kept")
    yield root, settings, shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "kept", root)


def written(workdir):
    """When each file of a run was last written, but for the lock, which every start takes."""
    files = (path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("how", CHANGES)
def test_a_run_does_not_resume_on_other_data(copied, how):
    root, settings, workdir = copied
    files = written(workdir)
    change(root, how)
    with pytest.raises(UserError, match=r"changed after it began: .* restore them to resume it"):
        train.train_and_evaluate(settings, workdir)
    assert files == written(workdir)


def test_a_run_without_a_record_gets_one_and_resumes(copied, capsys):
    _root, settings, workdir = copied
    before = (workdir / "data.json").read_text()
    (workdir / "data.json").unlink()
    run_until(3, settings, workdir)
    assert "step 2 of 5" in capsys.readouterr().out
    assert (workdir / "data.json").read_text() == before


def test_a_class_more_without_a_record_is_no_damage(copied):
    """The state does not fit, which is reported, and stays where it is."""
    root, settings, workdir = copied
    (workdir / "data.json").unlink()
    change(root, add_a_class)
    with pytest.raises(UserError, match=r"step 2 in .* does not fit this run .*head/kernel is fl"):
        train.train_and_evaluate(settings, workdir)
    assert (workdir / "checkpoints/2").is_dir() and not list(workdir.glob("damaged*"))


def test_processes_that_see_other_data_than_the_first_are_refused(tmp_path, monkeypatch):
    here, elsewhere = tree(tmp_path / "here"), tree(tmp_path / "elsewhere")
    grow(elsewhere / "train")
    first = {"data": describe(here)}
    monkeypatch.setattr(processes, "on_first_process", lambda call: json.loads(json.dumps(first)))
    identity.check(tmp_path, {"data": describe(here)})
    with pytest.raises(UserError, match="6 instead of 5 images to train on"):
        identity.check(tmp_path, {"data": describe(elsewhere)})


# --- Studies ------------------------------------------------------------------------------------


def test_a_study_does_not_mix_data(tmp_path, monkeypatch):
    root = tree(tmp_path / "photos")
    stages = ("pretrain", "uptrain", "finetune")
    settings = tiny_study(**{f"{stage}.data.name": f"folder:{root}" for stage in stages})
    monkeypatch.setattr(study.jobs, "run", lambda *_: {})
    monkeypatch.setattr(study, "_records", lambda *_: [])
    monkeypatch.setattr(study, "_write", lambda *_: None)
    study.run_study(settings, tmp_path / "study")
    change(root, grow)  # nothing has begun on the old data
    study.run_study(settings, tmp_path / "study")
    (tmp_path / "study" / "seed0" / "pretrained").mkdir(parents=True)
    study.run_study(settings, tmp_path / "study")
    change(root, add_a_class)
    with pytest.raises(UserError, match=r"the pretrain data of the run in .*/study changed"):
        study.run_study(settings, tmp_path / "study")


# --- Checkpoints --------------------------------------------------------------------------------


def like(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"a": jnp.zeros((2, 4)), "b": jnp.zeros(3)}, r"a is float32\[2, 3\] there, float32\[2, 4"),
        ({"a": jnp.zeros((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}, r"b is float32\[3\] there, bf"),
        ({"a": jnp.zeros((2, 3))}, r"b is float32\[3\] there, missing here"),
        ({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(3)}}, r"b/c is missing there, float32\[3"),
    ],
)
def test_a_sound_checkpoint_that_does_not_fit_stays(tmp_path, other, says):
    state = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with state_checkpoints.StateCheckpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"at": step})
        checkpoints.wait()
        with pytest.raises(UserError, match=says):
            checkpoints.restore(like(other))
        assert checkpoints.steps == [1, 2]
        restored, position = checkpoints.restore(like(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert position == {"at": 2} and not list(tmp_path.glob("damaged*"))


@pytest.mark.parametrize("error", [MemoryError(), ValueError("RESOURCE_EXHAUSTED: 8 GiB")])
def test_a_checkpoint_is_not_set_aside_for_want_of_memory(tmp_path, monkeypatch, error):
    def load(*arguments):
        raise error

    with state_checkpoints.StateCheckpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"a": jnp.ones(3)}, {})
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._checkpointer, "load", load)
        with pytest.raises(UserError, match=r"step 2 in .* cannot be read now .* left as it is"):
            checkpoints.restore(like({"a": jnp.ones(3)}))
        assert checkpoints.steps == [1, 2]
