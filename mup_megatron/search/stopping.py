"""Ctrl-C and SIGTERM while a sweep runs: noticed at once, acted on where it does no harm. Knows nothing of trials."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mup_megatron.errors import Terminated

AT_MOST_S = 9.0
"""How long after SIGTERM the process may live: batch systems that take a machine back grant little more."""


class Stop:
    """Tells if this process was told to stop. A second Ctrl-C ends it where it stands.

    It can be waited for beside connections, as `multiprocessing.connection.wait` does.
    """

    def __init__(self) -> None:
        self._requested: signal.Signals | None = None
        self._reader, self._writer = os.pipe()
        self._deadline: threading.Timer | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """For the time of a sweep. Python lets only the main thread handle signals; elsewhere none comes."""
        numbers = [signal.SIGTERM, signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
        # A shell has what it starts in the background ignore Ctrl-C.
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number in numbers:
                signal.signal(number, before[number])
            if self._deadline is not None:
                self._deadline.cancel()
            os.close(self._reader)
            os.close(self._writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested is not None and number == signal.SIGINT:
            raise self.error()
        if self._requested == signal.SIGTERM:
            return  # some send it to a process and then to its whole group
        self._requested = signal.Signals(number)
        os.write(self._writer, b"!")
        if number == signal.SIGTERM:
            # Whatever hangs then, a storage that is away for one. The next call takes over what could not be put back.
            self._deadline = threading.Timer(AT_MOST_S, os._exit, (128 + number,))
            self._deadline.daemon = True
            self._deadline.start()

    def fileno(self) -> int:
        """Returns what becomes readable when this process is told to stop."""
        return self._reader

    @property
    def requested(self) -> bool:
        """True once this process was told to stop."""
        return self._requested is not None

    def error(self) -> KeyboardInterrupt:
        """Returns what leaves a sweep that was told to stop."""
        return Terminated() if self._requested == signal.SIGTERM else KeyboardInterrupt()

    def sleep(self, seconds: float) -> bool:
        """Waits, until this process is told to stop if that comes first; returns whether it was not."""
        if not self.requested:
            select.select([self], [], [], seconds)
        return not self.requested
