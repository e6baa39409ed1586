"""Several processes of one run: asked to end, stalled, killed, started again with fewer."""

import signal
import time

import pytest
import run_helpers as runs
import soak_processes as soak
import stores

from kdgqa_jax import state_checkpoints

ARG = "steps=24,every=50"  # saves nothing by itself


@pytest.fixture(scope="session")
def alone(made_once, config_file):
    """The workdir of the same steps by one process that nobody disturbs."""

    def run(workdir):
        (process,) = soak.start_all(config_file, workdir, 1, arg=ARG)
        runs.finish(process)

    return made_once("alone", run)


def newest(workdir):
    return max(
        (int(name) for name in state_checkpoints._complete(workdir / "checkpoints")), default=0
    )


def test_a_process_that_finds_no_others_says_so(config_file, tmp_path):
    flags = ["--multihost", "--coordinator", f"127.0.0.1:{stores.free_port()}"]
    flags += ["--num-processes", "2", "--process-id", "1", "--join-timeout", "1"]
    process = runs.start(config_file, tmp_path / "run", *flags)
    (status,), (error,) = soak.wait_for_all([process], 60.0)
    assert status == 1 and "did not find each other" in error and "within 1 seconds" in error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_to_one_process_or_all_saves_the_same_step_everywhere(
    config_file,
    alone,
    tmp_path,
):
    """Two processes, of which the last is asked to end, then four, of which all are."""
    before = 0
    for count, asked in ((2, slice(1, 2)), (4, slice(0, 4))):
        processes = soak.start_all(config_file, tmp_path, count, arg=ARG)
        runs.wait_for_step(processes[0], tmp_path, before + 2)
        for process in processes[asked]:
            process.send_signal(signal.SIGTERM)
        statuses, errors = soak.wait_for_all(processes, 60.0)
        assert statuses == [143] * count, errors
        saved = newest(tmp_path)
        assert before + 2 <= saved < 24
        assert all(f"step {saved} of 24 is saved" in error for error in errors)
        before = saved
    statuses, errors = soak.wait_for_all(soak.start_all(config_file, tmp_path, 1, arg=ARG), 300.0)
    assert statuses == [0], errors
    assert soak.compare(tmp_path, alone) <= 1e-5


@pytest.mark.slow
def test_a_process_that_stalls_ends_the_others_in_a_sentence(config_file, tmp_path):
    processes = soak.start_all(config_file, tmp_path, 2, arg=ARG)
    runs.wait_for_step(processes[0], tmp_path, 2)
    processes[1].send_signal(signal.SIGSTOP)
    stalled = time.monotonic()
    _, err = processes[0].communicate(timeout=90)
    assert time.monotonic() - stalled < 75
    processes[1].send_signal(signal.SIGCONT)
    assert soak.wait_for_all(processes[1:], 60.0)[0] != [0]
    assert processes[0].returncode == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("kdgqa") and "process 1 of this run has ended or stalled" in last


@pytest.mark.slow
def test_two_kills_of_a_short_soak(config_file, alone, tmp_path):
    soak.soak(config_file, tmp_path, kills=2, seed=1, counts=(4, 2, 1), arg="steps=24,every=2")
    assert soak.compare(tmp_path, alone) <= 1e-5
