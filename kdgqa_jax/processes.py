"""What several processes of one run do together; one process is a job of one."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kdgqa_jax.errors import UserError

LOOK_EVERY = 10.0  # seconds between looks at the other processes
GONE = "start all of them again: the run resumes from its newest checkpoint"


def joined() -> bool:
    """This is one process of a job, or was about to become one."""
    return jax.distributed.is_initialized()


def join_processes(
    coordinator: str | None, count: int | None, index: int | None, seconds: int = 300
) -> int:
    """Become one process of a job, and return which; to be called before JAX is used otherwise.

    On TPU pods and under SLURM all three are None: JAX finds them out.

    Args:
      coordinator: HOST:PORT of process 0.
      count: of processes.
      index: of this one.
      seconds: to wait for the others.

    Raises UserError: the others cannot be found.
    """
    given = [x is not None for x in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id belong together")
    # On CPUs; the other platforms have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Otherwise the runtime aborts this process when another one ends; `_watch` says why it ends.
    jax.config.update("jax_enable_recoverability", True)
    lonely = (
        f"start all of them within {seconds} seconds (--join-timeout), with the same --coordinator"
        " HOST:PORT and --num-processes"
    )
    _abort_says(f"the processes of --multihost did not find each other; {lonely}")
    try:
        jax.distributed.initialize(
            coordinator, count, index, initialization_timeout=seconds, heartbeat_timeout_seconds=20
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(
            f"the processes of --multihost did not find each other ({reason[0][:200]}); {lonely}"
        ) from None
    _abort_says(f"the runtime gave up, most likely because process 0 of this run has ended; {GONE}")
    threading.Thread(target=_watch, daemon=True).start()
    return jax.process_index()


_HANDLERS: list[Any] = []  # kept: C code holds no references


def _abort_says(text: str) -> None:
    """Where process 0 is gone the runtime aborts this one, past all handlers of Python: say why."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        leave(text)

    _HANDLERS.append(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)


def _watch() -> None:
    """End this process when another one is gone, whatever it is waiting for."""
    from jax._src import distributed

    client, everyone = distributed.global_state.client, list(range(jax.process_count()))
    while True:
        time.sleep(LOOK_EVERY)
        try:
            alive = client.get_live_nodes(everyone)
            gone = [str(i) for i in everyone if i not in alive]
        except Exception:  # process 0, which keeps the list
            gone = ["0"]
        if distributed.global_state.client is None:  # the run has ended
            return
        if gone:
            time.sleep(LOOK_EVERY)  # most often the failed step has reported it by then
            leave(f"process {', '.join(gone)} of this run has ended or stalled; {GONE}")


def part(status: int = 0) -> None:
    """End the job in good order: the first process, whom the others watch, is the last to go.

    `status` is the exit status of the others.
    """
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("the run has ended")
    if jax.process_index() > 0:
        sys.stdout.flush()
        os._exit(status)
    time.sleep(1.0)


_LEAVING = threading.Lock()


def leave(text: str) -> None:
    """End this process at once: an orderly end would wait for processes that may be gone."""
    _LEAVING.acquire()  # for good: several threads may notice at the same time, one says it
    sys.stdout.flush()
    print(f"kdgqa: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def on_first_process(call: Callable[[], Any]) -> Any:
    """The JSON value of `call`, made by process 0, in every process; its UserError too."""
    if jax.process_count() == 1:
        return call()
    from jax.experimental import multihost_utils

    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": call()}
        except UserError as error:
            outcome = {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, length)  # of another length elsewhere; the first one's counts
    outcome = json.loads(bytes(multihost_utils.broadcast_one_to_all(text)))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]
