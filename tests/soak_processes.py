"""Kills random processes of a run at random moments and starts all of them again, many times.

    python tests/soak_processes.py --kills 10

The run begins with 4 processes, and each time it is started again with 4, 2 and 1 in turns. It has
to end with the parameters and allocations of a run that nobody disturbed, and what a kill leaves
over has to end within a minute. Prints a line for each kill and the figures; fails with a status.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import helpers
import run_helpers as runs
import stores

from kdgqa_jax import checkpoint, logs

COUNTS = (4, 2, 1)
BOUND = 60.0  # seconds that others may take to end
JOIN = 25  # seconds that they wait for each other at the start, while one of them may be killed
# Its groups follow the changes of the norms: they differ in size, and most updates change them.
FLAGS = ("--config.model.attention=dgqa_diff",)
ALLOCATIONS = ("allocation", "idle_kv_heads")


def start_all(config_file, workdir, count, *flags, arg="", devices=1):
    """All processes of a run, by one command but for the number of each."""
    flags = (*FLAGS, *flags)
    if count == 1:
        return [runs.start(config_file, workdir, *flags, arg=arg, devices=devices)]
    job = ["--multihost", "--coordinator", f"127.0.0.1:{stores.free_port()}"]
    job += ["--join-timeout", str(JOIN)]
    job += ["--num-processes", str(count)]
    return [
        runs.start(
            config_file, workdir, *job, "--process-id", str(i), *flags, arg=arg, devices=devices
        )
        for i in range(count)
    ]


def wait_for_all(processes, seconds):
    """(exit statuses, standard errors), once all have ended; AssertionError: one has not."""
    end, errors = time.monotonic() + seconds, []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=max(end - time.monotonic(), 0.1))[1])
        except subprocess.TimeoutExpired:
            for left in processes:
                left.kill()
            raise AssertionError(f"a process has not ended within {seconds:.0f} s") from None
    return [process.returncode for process in processes], errors


def kill_one(processes, workdir, moments):
    """Kill a process of a run, in a third of all cases while it starts; (which, steps done)."""
    victim = moments.randrange(len(processes))
    steps, started = runs.steps_done(workdir), time.monotonic()
    wait = moments.uniform(0.5, 8.0) if moments.random() < 1 / 3 else 600.0
    while runs.steps_done(workdir) <= steps and time.monotonic() - started < wait:
        assert all(p.poll() is None for p in processes), [p.communicate()[1] for p in processes]
        time.sleep(0.01)
    if runs.steps_done(workdir) > steps:
        time.sleep(moments.uniform(0.0, 0.3))
    os.killpg(processes[victim].pid, signal.SIGKILL)
    return victim, runs.steps_done(workdir)


def soak(config_file, workdir, kills, seed=0, counts=COUNTS, arg="steps=60,every=4"):
    """Kill `kills` times, then let the run end; seconds that what was left over took to end."""
    moments, left_over = random.Random(seed), []
    for kill in range(kills):
        processes = start_all(config_file, workdir, counts[kill % len(counts)], arg=arg)
        victim, step = kill_one(processes, workdir, moments)
        killed = time.monotonic()
        statuses, errors = wait_for_all(processes, BOUND)
        left_over.append(time.monotonic() - killed)
        others = [e for i, e in enumerate(errors) if i != victim]
        print(
            f"kill {kill + 1}: process {victim} of {len(processes)} at step {step}; the others"
            f" ended after {left_over[-1]:.1f} s",
            flush=True,
        )
        assert all(s == 1 for i, s in enumerate(statuses) if i != victim), (statuses, errors)
        assert all("Traceback" not in error and "kdgqa" in error for error in others), others
    statuses, errors = wait_for_all(
        start_all(config_file, workdir, counts[kills % len(counts)], arg=arg), 600.0
    )
    assert set(statuses) == {0}, errors
    return left_over


def compare(workdir, alone):
    """How far two runs are apart, relative to the largest parameter; allocations must be equal."""
    ours, theirs = (checkpoint.load_model(run / "model")[1] for run in (workdir, alone))
    allocations = [
        [[r.get(name) for name in ALLOCATIONS] for r in logs.read_metrics(run)]
        for run in (workdir, alone)
    ]
    assert allocations[0] == allocations[1]
    assert len({str(allocation) for allocation, _ in allocations[1]}) > 2  # they are not all equal
    return helpers.relative_difference(ours["params"], theirs["params"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        config_file = runs.write_config(folder)
        statuses, errors = wait_for_all(
            start_all(config_file, folder / "alone", 1, arg="steps=60,every=4"), 600.0
        )
        assert statuses == [0], errors
        left_over = soak(config_file, folder / "run", arguments.kills, arguments.seed)
        difference = compare(folder / "run", folder / "alone")
    print(
        f"{arguments.kills} kills: parameters differ by {difference:.2g} of the largest,"
        f" allocations not at all; the longest that others took to end: {max(left_over):.1f} s"
    )
    return 0 if difference <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
