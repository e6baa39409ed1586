"""Tasks that wait for one another: order, failures, processes."""

import os
import signal

import pytest

from kdgqa_jax import jobs
from kdgqa_jax.errors import UserError

TASKS = [
    jobs.Task("base", "base"),
    jobs.Task("bad", "bad", "base"),
    jobs.Task("after bad", "never", "bad"),
    jobs.Task("after that", "never", "after bad"),
    jobs.Task("odd", "odd", "base"),
    jobs.Task("killed", "killed", "base"),
    jobs.Task("good", "good", "base"),
    jobs.Task("after good", "good too", "good"),
]


def act(argument):
    assert argument != "never"
    if argument == "bad":
        raise UserError("it is bad")
    if argument == "odd":
        raise RuntimeError("it is\nodd")
    if argument == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"done: {argument}"


@pytest.mark.parametrize("count", [1, 2])
def test_what_fails_takes_along_those_that_wait_for_it_alone(capsys, count):
    tasks = [task for task in TASKS if count > 1 or task.name != "killed"]
    failures = jobs.run(tasks, act, count)
    expected = {
        "bad": "it is bad",
        "after bad": "bad failed: it is bad",
        "after that": "bad failed: it is bad",
        "odd": "RuntimeError: it is odd",
        "killed": "its process ended (SIGKILL)",
    }
    if count == 1:
        del expected["killed"]
    assert failures == expected
    shown = capsys.readouterr().out.splitlines()
    assert {"done: base", "done: good", "done: good too", "bad failed: it is bad"} <= set(shown)
    assert shown.index("done: base") < shown.index("done: good") < shown.index("done: good too")
