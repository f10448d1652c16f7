"""SIGTERM and Ctrl-C: what is unsaved is saved first."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from ldm.system.messages import CLEAN_UP, SAID

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait; processes that start meanwhile begin with them waiting. Not on Windows."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def leave_signals_to_the_main_process(worker: int) -> None:
    """A loader process outlives a signal to the whole group for a while, or the main one would have no batch
    to end its step with. It ends with the main one, or 20 s after it was told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, where no one sends it SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class Interruption:
    """SIGTERM and Ctrl-C: what is unsaved is saved first, then the script ends with the shell's exit code for
    that signal (143, 130)."""

    def __init__(self):
        self.signal, self.unsaved, self.process = None, False, os.getpid()
        for number in STOPPING:
            CLEAN_UP.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # a loader process, forked with this handler
            return
        self.signal = signal.Signals(number)
        if not self.unsaved:
            self.leave()

    def leave(self) -> None:
        """End the script; the same command goes on."""
        name = self.signal.name if self.signal else "a signal to another process"
        if int(os.environ.get("RANK", 0)) == 0:
            message = f"stopped by {name}; all is saved, and the same command goes on"
            SAID.info(message)
            print(message, file=sys.stderr)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))
