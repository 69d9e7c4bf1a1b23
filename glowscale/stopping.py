"""Stopping on request: a signal asks, all processes agree on a step, the job's status tells."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75
"""Exit status of a job that was asked to stop and saved its state: the same command goes on.

It is EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
"""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job."""


class Stopped(Exception):  # noqa: N818 - the job was asked to, nothing failed
    """Work that was asked to stop; the message says where it stands."""


class LostProcessError(Exception):
    """Another process of the job is gone, or never came; nothing is wrong with this one."""


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM or SIGUSR1.

    Used as a context manager; within it these signals only set the request. Outside they end the
    process as ever, and so they do where the context is not entered in the main thread.

    >>> with StopRequest() as request:
    ...     signal.raise_signal(signal.SIGUSR1)
    ...     request.name
    'SIGUSR1'
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the first signal that asked."""
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


def leave_signals_to_parent(_: int = 0) -> None:
    """In a process that reads data: ignore what schedulers and terminals send to everyone.

    Its parent, which gets the same signals, ends it when it is done.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
