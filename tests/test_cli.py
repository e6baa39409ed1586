"""The command line: help on one screen, and one clear sentence for every mistake."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import fuzz_command_line
import jax
import pytest

from kdgqa_jax import checkpoint, cli, config, console, flags, study, vit
from kdgqa_jax.errors import UserError


@pytest.mark.parametrize(
    "arguments", [[], ["bench"], *(command.split() for command in cli.COMMANDS)]
)
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


# --- config files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(arg):\n    pass\n", "returns None; expected what train_config() or"),
        ("def get_config(arg):\n    return {'seed': 1}\n", "returns {'seed': 1}; expected"),
        ("def get_config(arg):\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass\n", "does not work (TypeError: get_config() takes 0"),
        ("def get_config(arg:\n", "does not work (SyntaxError:"),
        ("import no_such_module\n", "does not work (ModuleNotFoundError: No module named 'no_s"),
        ("get_config = 1\n", "has no function get_config(arg)"),
        ("\0", "does not work (SyntaxError: source code"),
        ("from kdgqa_jax.config import study_config\nget_config = lambda arg: study_config()\n",
         "this config is one of a study"),
    ],
)  # fmt: skip
def test_config_files_that_give_no_config(capsys, tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text)
    place = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "mine.py"), "--workdir", str(place)]
    assert cli.main(["train", *arguments]) == 1
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and not place.exists()


def test_debug_shows_where_a_config_file_fails(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(arg):\n    return 1 / 0\n")
    arguments = ["--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")]
    with pytest.raises(UserError) as raised:
        cli.main(["train", *arguments, "--debug"])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_the_config_of_a_run_is_no_study(capsys, tmp_path):
    assert cli.main(["study", "--config", "testing", "--workdir", str(tmp_path / "run")]) == 1
    assert "one of a single run: kdgqa train" in capsys.readouterr().err


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", x) for x in ("nan", "inf", "-1", "0", "1e400", "true", "1e300", "")),
        *(("seed", x) for x in ("-1", "4294967296", "1.5", "x")),
        *(("batch_size", x) for x in ("-1", "0", "2147483648", "9" * 30, "nan")),
        *(("model.dtype", x) for x in ("float33", "", "int32")),
        *(("optim.learning_rate", x) for x in ("nan", "-1", "inf")),
        *(("model.window", x) for x in ("0", "2147483648")),
        *(("microbatch", "-2"), ("accumulate", "0"), ("data.workers", "-1")),
        *(("model.param_dtype", "None"), ("data.mean", "nan"), ("data.std", "0.5,inf")),
        *(("logs.tensorboard", "1"), ("data.augment.mixup", "nan"), ("ema_decay", "nan")),
    ],
)
def test_values_that_no_field_takes(capsys, tmp_path, field, value):
    place = tmp_path / "run"
    arguments = ["--config", "testing", "--workdir", str(place), f"--config.{field}={value}"]
    assert cli.main(["train", *arguments]) == 1
    shown = capsys.readouterr()
    assert field.rpartition(".")[2] in shown.err and shown.err.count("\n") == 1
    assert "--debug" not in shown.err and not place.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": "5"}, "config field epochs='5' must be a float"),
        ({"epochs": None}, "config field epochs=None must be a float"),
        ({"batch_size": True}, "config field batch_size=True must be a int"),
        ({"batch_size": 32.0}, "config field batch_size=32.0 must be a int"),
        ({"model.num_kv_heads": "2"}, "config field model.num_kv_heads='2' must be a int"),
        ({"model.class_token": 1}, "config field model.class_token=1 must be a bool"),
        ({"data.mean": (0.5, "x")}, "config field data.mean='x' must be a float"),
        ({"optim": 3}, "config section optim=3 must have fields"),
    ],
)
def test_values_of_another_type(changes, says):
    settings = config.train_config()
    for field, value in changes.items():
        section, _, name = field.rpartition(".")
        (settings[section] if section else settings)[name] = value
    with pytest.raises(UserError) as raised:
        config.check_fields(settings, config.train_config())
    assert says in str(raised.value)


def numeric_flags():
    """(command, flag) of every flag that takes numbers, from the parsers themselves."""
    for command, parser in cli.build_parsers().items():
        for action in parser._actions:
            if action.option_strings and action.type not in (None, *TEXTS):
                yield command, action.option_strings[0]


TEXTS = (flags.PATH, flags.PATH_OR_NONE, flags.SOURCE)
ANY_NUMBER = ("--mean", "--std", "--suggest-kv-heads", "--noise-scales")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "9" * 30, "9" * 5000, "", "x", "1.5.1"])
def test_no_flag_takes_numbers_beyond_use(capsys, value):
    checked = 0
    for command, flag in numeric_flags():
        takes = flag in ANY_NUMBER and value in ("-1", "9" * 30)
        if not takes:
            assert cli.main([*command.split(), f"{flag}={value}"]) == 2
            error = capsys.readouterr().err
            assert f"argument {flag}: " in error and error.count("\n") == 1
            checked += 1
    assert checked > 15


# --- endings ------------------------------------------------------------------------------------


NEEDED = {
    "convert": ["--source=a", "--out=b"],
    "predict": ["--checkpoint=a", "--images=b"],
    "inspect": ["--checkpoint=a"],
    "export": ["--checkpoint=a", "--out=b"],
    "card": ["--checkpoint=a"],
    "report": ["--workdir=a"],
    "analyse": ["--checkpoint=a", "--images=b", "--out=c"],
    "merge-encoder": ["--source=a", "--num-kv-heads=2", "--out=b"],
    "evaluate": ["--checkpoint=a", "--dataset=digits"],
    "prepare": ["--dataset=digits"],
    "compile": ["--config=testing", "--topology=v5e:2x2"],
    "doctor": [],
    "bench train": [],
    "bench eval": [],
    "bench data": [],
    "bench convert": [],
    "train": ["--config=testing", "--workdir=a"],
    "study": ["--config=demo", "--workdir=a"],
    "demo": ["--workdir=a"],
}


def test_only_commands_that_resume_say_so(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name, command in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(command, run=interrupted))
    said = {}
    for name in cli.COMMANDS:
        assert cli.main([*name.split(), *NEEDED[name]]) == 130
        said[name] = capsys.readouterr().err
    resume = {name for name, text in said.items() if "the same command resumes" in text}
    assert resume == {"train", "study", "demo"}
    assert said["convert"] == "kdgqa convert: interrupted\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    arguments = {"name": "mu/4", "depth": 1, "image_size": 8, "num_classes": 2}
    variables = vit.init_variables(vit.create(**arguments), jax.random.key(0))
    about = {"model": arguments, "channels": 3, "class_names": ["a", "b"], "preprocessing": {}}
    path = tmp_path_factory.mktemp("model") / "model"
    checkpoint.save_model(path, variables, about)
    return path


@pytest.mark.parametrize("stream", [">&-", "| head -1", "> /dev/full"])
def test_standard_output_that_nobody_reads(model, stream):
    if "/dev/full" in stream and not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f"{sys.executable} -u -m kdgqa_jax.cli inspect --checkpoint {model} {stream}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if "full" in stream:
        assert done.returncode == 1
        assert done.stderr == (
            "kdgqa inspect: standard output cannot be written (No space left on device)\n"
        )
    else:
        assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("name", ["inspect", "train"])
def test_a_reader_that_has_gone_ends_a_command(name, monkeypatch, capfd):
    def run(arguments):
        for _ in range(99):
            console.say("a line")

    monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(cli.COMMANDS[name], run=run))
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w"))  # noqa: SIM115
    assert cli.main([name, *NEEDED[name]]) == 1
    print("still open")  # to the null device
    monkeypatch.undo()
    said = "kdgqa train: standard output cannot be written (Broken pipe); the same command resumes"
    assert capfd.readouterr().err == (f"{said}\n" if name == "train" else "")


def test_another_broken_pipe_is_an_error(capsys, monkeypatch):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    command = dataclasses.replace(cli.COMMANDS["inspect"], run=broken)
    monkeypatch.setitem(cli.COMMANDS, "inspect", command)
    assert cli.main(["inspect", "--checkpoint", "x"]) == 1
    assert "BrokenPipeError: [Errno 32] Broken pipe (--debug" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), "(RESOURCE_EXHAUSTED: Out"),
        (OSError(36, "File name too long", "x"), "kdgqa inspect: x: File name too long\n"),
        (UserError("two\nlines"), "kdgqa inspect: two"),
    ],
)
def test_errors_of_the_system_are_one_line(capsys, monkeypatch, error, says):
    def failing(*_):
        raise error

    command = dataclasses.replace(cli.COMMANDS["inspect"], run=failing)
    monkeypatch.setitem(cli.COMMANDS, "inspect", command)
    assert cli.main(["inspect", "--checkpoint", "x"]) == 1
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1 and "--debug" not in shown


# --- at random ----------------------------------------------------------------------------------


def test_command_lines_drawn_at_random(tmp_path):
    """The cheap ones; `python tests/fuzz_command_line.py` draws from all."""
    statuses = set()
    for _, case in fuzz_command_line.cases(seed=1, first=0, count=40, folder=tmp_path, cheap=True):
        assert not case.faults(), (case.faults(), case)
        statuses.add(case.status)
    assert statuses == {0, 1, 2}


def _raises(arguments):
    raise RuntimeError("out of cheese")


def _litters(arguments):
    pathlib.Path("litter").write_text("")


def _says_two_things(arguments):
    print("by the way", file=sys.stderr)
    raise UserError("no")


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (_raises, "an error that nobody expected"),
        (_litters, "stray files ['litter']"),
        (_says_two_things, "2 lines on standard error"),
        (lambda arguments: sys.exit(7), "status 7"),
        (lambda arguments: print("Traceback"), "a traceback"),
        (lambda arguments: None, None),
    ],
)
def test_faults_of_a_command_are_seen(monkeypatch, tmp_path, run, fault):
    command = dataclasses.replace(cli.COMMANDS["inspect"], run=run)
    monkeypatch.setitem(cli.COMMANDS, "inspect", command)
    (tmp_path / "inputs").mkdir()
    place = tmp_path / "case"
    case = fuzz_command_line.run(["inspect", "--checkpoint=IN"], tmp_path / "inputs", place, False)
    assert case.faults()[:1] == ([fault] if fault else [])
