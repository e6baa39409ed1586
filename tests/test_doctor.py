"""What `kdgqa doctor` finds, on a machine whose parts are known."""

import json

import pytest

from kdgqa_jax import chips, cli, config, doctor
from kdgqa_jax.data import pipeline


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"STORED_MIB": 1, "REDUCED_MIB": 1, "DATA_SECONDS": 0.1}.items():
        monkeypatch.setattr(doctor, name, value)


def test_it_finds_figures_and_leaves_nothing(tmp_path, capsys):
    file, workdir = tmp_path / "figures.json", tmp_path / "run"
    arguments = ["doctor", "--config", "testing", "--workdir", str(workdir), "--json", str(file)]
    assert cli.main(arguments) == 0
    (found,) = json.loads(file.read_text())["results"]
    assert sorted(tmp_path.iterdir()) == [file]
    figures = found["figures"]
    for name in ("write_bytes_per_second", "read_bytes_per_second", "images_per_second_of_data"):
        assert figures[name] > 0
    assert figures["devices"] >= 1 and figures["parts_of_a_batch"] == 1
    shown = capsys.readouterr().out
    assert "JAX finds no accelerator" in shown and "traceback" not in shown.lower()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--config.data.name=mnist"], "data set 'mnist' needs a data directory"),
        (["--config.batch_size=0"], "batch_size=0 must be a positive multiple of"),
    ],
)
def test_what_is_missing_is_a_sentence(overrides, says):
    settings = config.override(config.load_config("testing"), overrides)
    (problem,) = [p for p in doctor.examine(settings)["problems"] if "accelerator" not in p]
    assert says in problem and "\n" not in problem


def test_what_holds_a_run_back(monkeypatch):
    """A device that is too small and too fast for its data."""
    monkeypatch.setattr(chips, "memory", lambda device: 2**20)
    monkeypatch.setattr(doctor, "matrix_product_rate", lambda: 1e15)
    monkeypatch.setattr(pipeline.TrainBatches, "__next__", slow(pipeline.TrainBatches.__next__))
    problems = " ".join(doctor.run(config.load_config("testing")).problems)
    assert "a step needs about" in problems and "--config.mesh.fsdp=N" in problems
    assert "data come at" in problems and "--config.data.workers" in problems


def slow(read):
    def delayed(self):
        doctor.time.sleep(0.05)
        return read(self)

    return delayed


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    problems = doctor.examine(workdir=tmp_path / "file" / "run")["problems"]
    assert any("cannot be written (Not a directory)" in problem for problem in problems)


def test_fields_need_a_config(capsys):
    assert cli.main(["doctor", "--config.epochs=3"]) == 1
    assert "--config.epochs=3 needs --config NAME" in capsys.readouterr().err
