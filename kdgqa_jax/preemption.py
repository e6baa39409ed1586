"""SIGTERM, which schedulers send before they take a machine away: save, and end in good order."""

import signal
import threading
from types import TracebackType
from typing import Any

import jax


class Preempted(Exception):
    """The run was asked to end, has saved its state and can go on later."""


class Preemption:
    """`with Preemption() as preemption: ... if preemption.asked(step): save and raise Preempted`.

    With several processes all of them get the same answer at the same step.
    """

    def __init__(self):
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        # With several processes the runtime of JAX listens; other threads cannot.
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self._asked = True

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        """The run is to end after this step; to be called once in every step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
