"""The command line: help on one screen, and one clear sentence for every mistake."""

import pytest

from kdgqa_jax import cli, config, study
from kdgqa_jax.errors import UserError


@pytest.mark.parametrize("arguments", [[], *([command] for command in cli.COMMANDS)])
def test_help_fits_one_screen(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variants", "gqa,dgqa"], "unknown attention variant 'dgqa': did you mean 'kdgqa'?"),
        (["--dataset", "digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["--config.pretrain.model.name=mv/2"], "unknown model 'mv/2'"),
        (["--config.pretrain.epoch=2"], "unknown config field 'pretrain.epoch': did you mean"),
        (["--config.pretrain.epochs=two"], "pretrain.epochs"),
        (["--config.pretrain.epochs"], "must have the form --config.pretrain.epochs=VALUE"),
        (["--cofnig.seed=2"], "unknown argument '--cofnig.seed=2'"),
        (["--config.num_kv_heads=3"], "num_kv_heads=3 does not divide the 8 query heads"),
        (["--dataset", "fashion_mnist"], "needs a data directory"),
        (["--dataset", "fashion_mnist", "--data-dir", "{tmp}"], "train-images-idx3-ubyte.gz"),
        (["--seeds", "0"], "--seeds: '0' must be a whole number, at least 1"),
        (["--seed", "-1"], "--seed: '-1' must be a seed, 0 to 2**32 - 1"),
        (["--seed", "4294967295", "--seeds", "2"], "seed=4294967296 must be at least 0 and below"),
        (["--workdir", "{tmp}/file/run"], "cannot be written"),
        (["--workdir", "{tmp}/other"], "holds a run of another config (seed: 7 there, 42 here)"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(capsys, tmp_path, arguments, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    settings = config.load_config("demo:dataset=digits")
    settings.seed = 7
    study.workdir_lib.claim(tmp_path / "other", settings.to_dict())

    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert cli.main(["demo", "--workdir", str(tmp_path / "run"), *arguments]) in (1, 2)
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.startswith("kdgqa demo: ") and shown.err.count("\n") == 1
    assert "Traceback" not in shown.err + shown.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dem", "unknown config 'dem': did you mean 'demo'?"),
        ("demo:datset=digits", "unknown config argument 'datset': did you mean 'dataset'?"),
        ("demo:dataset", "must have the form dataset=VALUE"),
        ("nowhere.py", "config file nowhere.py not found"),
    ],
)
def test_unknown_configs_are_refused(capsys, tmp_path, name, says):
    assert cli.main(["study", "--config", name, "--workdir", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_unexpected_errors_name_themselves_and_debug_shows_them(capsys, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of cheese")

    monkeypatch.setattr(study, "run_study", broken)
    arguments = ["demo", "--workdir", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "RuntimeError: out of cheese (--debug" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        cli.main([*arguments, "--debug"])


def test_interrupt_says_that_the_run_can_go_on(capsys, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", interrupted)
    assert cli.main(["demo", "--workdir", str(tmp_path)]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_config_file_of_the_user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from kdgqa_jax.config import train_config\n"
        "def get_config(arg):\n"
        "    config = train_config()\n"
        "    config.seed = int(arg)\n"
        "    return config\n"
    )
    loaded = config.override(config.load_config(f"{path}:5"), ["--config.optim.learning_rate=3e-4"])
    assert (loaded.seed, loaded.optim.learning_rate) == (5, 3e-4)


@pytest.mark.parametrize("name", config.config_names())
def test_every_config_declares_its_fields(name):
    loaded = config.load_config(name)
    schema = config.study_config() if "variants" in loaded else config.train_config()
    config.check_fields(loaded, schema)


def test_fields_of_another_type_are_refused():
    settings = config.train_config()
    settings.batch_size = "many"
    with pytest.raises(UserError, match="config field batch_size='many' must be a int"):
        config.check_fields(settings, config.train_config())


def test_fields_that_take_a_number_or_several():
    given = ["--config.data.mean=0.1,0.2,0.3", "--config.model.image_size=32,16"]
    settings = config.override(config.train_config(), given)
    assert settings.data.mean == (0.1, 0.2, 0.3) and settings.model.image_size == (32, 16)
    settings = config.override(settings, ["--config.data.mean=0.4"])
    assert settings.data.mean == 0.4
    config.check_fields(settings, config.train_config())
    settings.batch_size = (4, 4)
    with pytest.raises(UserError, match="config field batch_size="):
        config.check_fields(settings, config.train_config())
