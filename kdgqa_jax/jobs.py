"""Tasks that wait for one another, run one at a time or in several processes at once.

A task that fails does not end the others; those that wait for it fail with it.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kdgqa_jax import console
from kdgqa_jax.errors import Preempted, UserError, one_line


@dataclasses.dataclass(frozen=True)
class Task:
    """A call, by a name that nothing else has.

    Attributes:
      name: of the task.
      argument: what the call takes.
      after: the name of the task that has to be done before; "": none.
    """

    name: str
    argument: Any
    after: str = ""


Call = Callable[[Any], str]
"""What is done for an argument; it returns a line for the user, or ""."""


def run(tasks: Sequence[Task], call: Call, count: int = 1) -> dict[str, str]:
    """Run every task after the one that it waits for.

    Args:
      tasks: in an order in which they can be run.
      call: with more than one process, it and the arguments are pickled.
      count: processes; 1: this one.

    Returns:
      By the name of each task that has failed: why, in a sentence.

    Raises:
      Preempted: SIGTERM came, and whatever can resume has saved its state.
    """
    failures: dict[str, str] = {}
    if count > 1:
        _in_processes(list(tasks), call, count, failures)
        return failures
    for task in tasks:
        if task.after in failures:
            failures[task.name] = _inherited(task, failures)
            continue
        _ended(task, *_attempt(call, task.argument), failures)
    return failures


def _inherited(task: Task, failures: dict[str, str]) -> str:
    """Why a task fails whose forerunner has failed: the first one's name and reason."""
    reason = failures[task.after]
    return reason if _FAILED in reason else f"{task.after}{_FAILED}{reason}"


_FAILED = " failed: "


def _attempt(call: Call, argument: Any) -> tuple[str, str]:
    """(line, why it failed): one of them is empty."""
    try:
        return call(argument), ""
    except UserError as error:
        return "", str(error)
    except Preempted:
        raise
    except Exception as error:  # whatever a cell raises, the others are run
        return "", f"{type(error).__name__}: {one_line(error)}"


def _ended(task: Task, line: str, failure: str, failures: dict[str, str]) -> None:
    if failure:
        failures[task.name] = failure
        console.say(f"{task.name}{_FAILED}{failure}")
    elif line:
        console.say(line)


# --- several processes ----------------------------------------------------------------------------


@dataclasses.dataclass
class _Worker:
    """A process, the end of its pipe, and what it does now."""

    process: Any
    pipe: Any
    task: Task | None = None


def _in_processes(waiting: list[Task], call: Call, count: int, failures: dict[str, str]) -> None:
    done = {""}
    with _workers(call, min(count, len(waiting))) as start, _stopped_by_sigterm():
        workers = [start(i) for i in range(min(count, len(waiting)))]
        while True:
            for task in list(waiting):  # in order, so that those that wait for them follow
                if task.after not in failures:
                    continue
                failures[task.name] = _inherited(task, failures)
                waiting.remove(task)
            for worker in workers:
                ready = next((t for t in waiting if t.after in done), None)
                if ready and not worker.task:
                    waiting.remove(ready)
                    worker.task = ready
                    worker.pipe.send(ready.argument)
            busy = {worker.pipe: i for i, worker in enumerate(workers) if worker.task}
            if not busy:
                return
            for pipe in multiprocessing.connection.wait(list(busy)):
                index = busy[pipe]
                worker = workers[index]
                try:
                    line, failure = pipe.recv()
                except EOFError:
                    worker.process.join()
                    line, failure = "", f"its process ended ({_reason(worker.process.exitcode)})"
                    workers[index] = start(index)
                _ended(worker.task, line, failure, failures)
                if not failure:
                    done.add(worker.task.name)
                worker.task = None


def _reason(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


@contextlib.contextmanager
def _workers(call: Call, count: int) -> Iterator[Callable[[int], _Worker]]:
    """A function that starts the worker of a number; all of them have ended after the block."""
    context = multiprocessing.get_context("spawn")  # JAX has threads, which forks do not survive
    started: list[_Worker] = []

    def start(index: int) -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(call, theirs, index, count))
        process.start()
        theirs.close()
        started.append(_Worker(process, ours))
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            if worker.task and worker.process.is_alive():
                worker.process.terminate()  # which saves what can resume
            with contextlib.suppress(OSError):
                worker.pipe.close()  # which ends the others
        for worker in started:
            worker.process.join()


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Preempted is raised in the block when SIGTERM comes, where this process can notice."""

    def stop(*_: Any) -> None:
        raise Preempted("stopped as asked; what has been finished is kept")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work(call: Call, pipe: Any, index: int, count: int) -> None:
    """A worker: takes arguments until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _take_cores(index, count)
    console.be_silent()
    with contextlib.suppress(EOFError, Preempted):
        while True:
            pipe.send(_attempt(call, pipe.recv()))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _take_cores(index: int, count: int) -> None:
    """Keep to this worker's share of the cores, where the system has a call for that.

    Sums in another order round otherwise, and how a sum is split depends on the number of threads.
    So there are as many threads as one process alone would have, on fewer cores: NPROC is what XLA
    takes for the number of cores, and linear algebra of NumPy and SciPy counts them when it is
    loaded.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    with contextlib.suppress(ImportError):
        import scipy.linalg  # noqa: F401

    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("NPROC", str(len(cores)))
    share = cores[index % len(cores) :: count] or [cores[index % len(cores)]]
    os.sched_setaffinity(0, share)
