"""Files, folders and model directories on object storage, by emulators of gs:// and s3://."""

import json
import os

import encoder_helpers
import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import source_helpers
import stores

from kdgqa_jax import checkpoint, cli, logs, paths, state_checkpoints, storage, vit, workdir
from kdgqa_jax.data import identity, images, sources
from kdgqa_jax.errors import UserError


@pytest.fixture(scope="module", params=stores.STORES)
def store(request, tmp_path_factory):
    with stores.running(request.param, tmp_path_factory.mktemp("cache")) as store:
        yield store


@pytest.fixture
def place(store, request):
    """A folder of object storage for one test."""
    return paths.place(f"{store.root}/{request.node.originalname}")


def test_json_is_written_and_read(place):
    workdir.write_json(place / "a" / "b.json", {"x": [1, 2]})
    assert workdir.read_json(place / "a" / "b.json") == {"x": [1, 2]}
    with pytest.raises(UserError, match=r"c\.json not found"):
        workdir.read_json(place / "c.json")
    with pytest.raises(UserError, match=r"a/b\.json exists already"):
        workdir.check_new(f"{place}/a/b.json")
    assert str(workdir.check_new(f"{place}/d/")) == f"{place}/d"


def test_a_file_of_a_block_that_fails_never_appears(place):
    with pytest.raises(RuntimeError), workdir.written_file(place / "f") as file:
        file.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), workdir.written_whole(place / "folder") as folder:
        (folder / "model.json").write_text("{}")
        raise RuntimeError
    assert not place.exists()


def test_local_copies_follow_what_is_there(place):
    for name in ("a.txt", "in/b.txt"):
        (place / name).write_text("one")
    copy = storage.fetched(place)
    assert (copy / "in" / "b.txt").read_text() == "one"
    untouched = (copy / "a.txt").stat().st_mtime_ns
    (place / "in" / "b.txt").write_text("two")  # as long as before
    (place / "c.txt").write_text("three")
    assert storage.fetched(place) == copy
    assert (copy / "in" / "b.txt").read_text() == "two" and (copy / "c.txt").exists()
    assert (copy / "a.txt").stat().st_mtime_ns == untouched
    (place / "a.txt").unlink()
    storage.fetched(str(place))
    assert sorted(p.name for p in copy.rglob("*.txt")) == ["b.txt", "c.txt"]
    assert storage.fetched(place / "c.txt").read_text() == "three"
    with pytest.raises(UserError, match=r"source .*/nothing not found"):
        storage.fetched(place / "nothing", "source")


def test_a_folder_is_replaced_whole(place):
    for names in (("weights", "model.json", "old"), ("weights", "model.json")):
        with workdir.written_whole(place) as folder:
            for name in names:
                (folder / name).write_text(f"{len(names)}")
    assert {p.name: p.read_text() for p in place.iterdir()} == {"weights": "2", "model.json": "2"}


def test_what_says_that_a_folder_is_whole_comes_last(monkeypatch, place):
    """A kill before it leaves what no reader takes for a model."""
    description, variables = tiny()
    checkpoint.save_model(place, variables, description)
    put, uploads = storage._store(str(place))[0].put, []

    def failing(files, places, **options):
        uploads.append([os.path.basename(file) for file in files])
        if "model.json" in uploads[-1]:
            raise KeyboardInterrupt
        return put(files, places, **options)

    monkeypatch.setattr(storage._store(str(place))[0], "put", failing)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_model(place, variables, description)
    assert uploads == [["weights.safetensors"], ["model.json"]]
    with pytest.raises(UserError, match="is not a model directory"):
        checkpoint.load_model(place)


def tiny():
    model = helpers.tiny_vit("dgqa_ema")
    arguments = {"name": "mu/4", "attention": "dgqa_ema", "num_kv_heads": 3, **helpers.TINY}
    assert vit.create(**arguments) == model
    description = {"model": arguments, "channels": 1, "class_names": [], "preprocessing": {}}
    return description, helpers.vit_variables(model)


def test_model_directories(place):
    description, variables = tiny()
    checkpoint.save_model(f"{place}/model", variables, description)
    model, read, _ = checkpoint.load_model(f"{place}/model")
    helpers.assert_close(read, variables, 0.0)
    assert model.attention.variant == "dgqa_ema"
    (place / "other" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a model"):
        checkpoint.save_model(f"{place}/other", variables, description)
    with pytest.raises(UserError, match=rf"{place}/none is not a model directory"):
        checkpoint.load_model(f"{place}/none")


def test_data_sets(place, tmp_path):
    """The same images as from a local folder, and the same listing."""
    source_helpers.folder_tree(tmp_path / "photos")
    files = {f: place / f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*.png")}
    storage.upload(files)
    here, there = (sources.load(f"folder:{root}/photos") for root in (tmp_path, place))
    assert here.class_names == there.class_names and len(there.train) == 4
    assert list(source_helpers.rows(here.train)) == list(source_helpers.rows(there.train))
    described = [dict(identity.describe(dataset)) for dataset in (here, there)]
    assert described[0] == described[1]
    with pytest.raises(UserError, match=rf"{place} holds none of train-images.*; put train-im"):
        sources.load("mnist", str(place))


def test_images_and_encoders(place, tmp_path):
    """What calibrates a conversion, what is predicted, and an encoder that is merged."""
    source_helpers.folder_tree(tmp_path / "photos")
    encoder = encoder_helpers.MODELS["bert"]()
    encoder.save_pretrained(tmp_path / "encoder")
    np.save(tmp_path / "tokens.npy", np.arange(24).reshape(3, 8) % 30)
    files = {f: place / f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*")}
    storage.upload({file: there for file, there in files.items() if file.is_file()})
    names = [[f.name for f in images.find([f"{root}/photos"])] for root in (tmp_path, place)]
    assert names[0] == names[1] != []
    with pytest.raises(UserError, match=rf"{place}/none not found"):
        images.find([f"{place}/none"])
    for root in (tmp_path, place):
        flags = [f"--source={root}/encoder", f"--calibration={root}/tokens.npy"]
        assert cli.main(["merge-encoder", *flags, "--num-kv-heads=2", f"--out={root}/out"]) == 0
    for file in (tmp_path / "out").iterdir():
        assert (place / "out" / file.name).read_bytes() == file.read_bytes(), file


def test_the_newest_run_holds_a_workdir(place):
    """A run that another one has followed ends before it writes a checkpoint or metrics."""
    with workdir.held(place, {"seed": 1}):
        workdir.check_held(place)
        (place / workdir.LOCK).write_text("process 7 on elsewhere, 0")
        with pytest.raises(UserError, match="is now that of process 7 on elsewhere"):
            workdir.check_held(place)
        writer = logs.MetricsWriter(place, 0)
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            writer.close()
    workdir.check_held(place)  # which nobody holds
    with pytest.raises(UserError, match=r"another config \(seed: 1 there, 2 here\)"):
        workdir.claim(place, {"seed": 2})
    assert not (place / "metrics.jsonl").exists()


def test_metrics_are_uploaded_when_they_are_flushed(place):
    writer = logs.MetricsWriter(place, 0, tensorboard=True)
    writer.write(step=1, split="train", loss=2.0)
    assert logs.read_metrics(place) == []
    writer.flush()
    assert [r["step"] for r in logs.read_metrics(place)] == [1]
    writer.write(step=2, split="train", loss=1.0)
    writer.close()
    assert [r["step"] for r in logs.read_metrics(place)] == [1, 2]
    assert len(list((place / "tensorboard").iterdir())) == 1
    writer = logs.MetricsWriter(place, 1)  # resumes from step 1
    writer.close()
    assert [r["step"] for r in logs.read_metrics(place)] == [1]
    assert "loss" in (place / "metrics.csv").read_text()


def test_states_are_saved_and_restored(place):
    state = {"a": jnp.arange(6.0).reshape(2, 3), "step": jnp.int32(0)}
    like = helpers.abstract(state)
    assert not state_checkpoints.any_saved(place)
    with state_checkpoints.StateCheckpoints(place) as checkpoints:
        assert checkpoints.restore(like) is None
        for step in (1, 2, 3):
            checkpoints.save(step, {**state, "step": jnp.int32(step)}, {"at": step})
    assert sorted(state_checkpoints._complete(place)) == ["2", "3"]
    (place / "3" / storage.COMPLETE).unlink()  # as after a kill
    assert state_checkpoints._complete(place) == ["2"]
    with state_checkpoints.StateCheckpoints(place) as checkpoints:
        found, position = checkpoints.restore(like)
        assert int(found["step"]) == 2 and position == {"at": 2}
        np.testing.assert_array_equal(found["a"], state["a"])
        checkpoints.save(3, state, {"at": 3})
        checkpoints.wait()
    assert sorted(state_checkpoints._complete(place)) == ["2", "3"]


def test_a_damaged_checkpoint_is_set_aside(place, capsys):
    state = {"a": jnp.asarray(helpers.normal(0, 4096))}
    with state_checkpoints.StateCheckpoints(place / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"at": step})
    damaged = storage.fetched(place / "checkpoints" / "2")
    files = [file for file in damaged.rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)  # which holds the array
    place_of_it = place / "checkpoints" / "2" / file.relative_to(damaged).as_posix()
    place_of_it.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with state_checkpoints.StateCheckpoints(place / "checkpoints") as checkpoints:
        assert checkpoints.restore(helpers.abstract(state))[1] == {"at": 1}
    assert f"it is now {place}/damaged_checkpoint_2" in " ".join(capsys.readouterr().out.split())
    assert (place / "damaged_checkpoint_2").exists()
    assert state_checkpoints._complete(place / "checkpoints") == ["1"]


def test_a_bucket_that_refuses_writes(place, store):
    """One sentence that names the place, and what was there stays."""
    description, variables = tiny()
    workdir.write_json(place / "a.json", 1)
    checkpoint.save_model(place / "model", variables, description)
    state = {"step": jnp.int32(1)}
    with state_checkpoints.StateCheckpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
    store.refuses = True
    try:
        refused = {
            "a.json": lambda: workdir.write_json(place / "a.json", 2),
            "run": lambda: workdir.claim(place / "run", {}),
            "model": lambda: checkpoint.save_model(place / "model", variables, description),
            "checkpoints": lambda: save(place / "checkpoints", state),
        }
        for name, write in refused.items():
            with pytest.raises(UserError) as error:
                write()
            text = str(error.value)
            assert f"{place}/{name}" in text and "cannot be written (" in text and "\n" not in text
    finally:
        store.refuses = False
    assert json.loads((place / "a.json").read_text()) == 1
    helpers.assert_close(checkpoint.load_model(place / "model")[1], variables, 0.0)
    assert state_checkpoints._complete(place / "checkpoints") == ["1"]


def save(place, state):
    with state_checkpoints.StateCheckpoints(place) as checkpoints:
        checkpoints.save(2, state, {})
