"""SIGTERM and Ctrl-C: a training saves first."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from ldm.system.messages import EXIT_STACK, LOGGER

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """SIGTERM and Ctrl-C are held back; processes that start within begin with them held back. Not on
    Windows."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def leave_signals_to_the_main_process(worker: int) -> None:
    """For loader processes: they outlive a signal to the whole group, so that the main process gets the
    batches to finish its step with. They end with the main process, or 20 s after SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, where no one sends it SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # killed by it, torch would report an error
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class Interruption:
    """Handles SIGTERM and Ctrl-C: the training saves first, then the script ends with the shell's exit code
    for that signal (143, 130). Without unsaved steps (`unsaved`) it ends at once.

    Attributes:
        received: whether a signal came since the newest handler was made.
    """

    received = False

    def __init__(self):
        Interruption.received = False
        self.signal, self.unsaved, self.process = None, False, os.getpid()
        for number in STOPPING:
            EXIT_STACK.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # a loader process, forked with this handler
            return
        self.signal, Interruption.received = signal.Signals(number), True
        if not self.unsaved:
            self.leave()

    def leave(self) -> None:
        """End the script."""
        name = self.signal.name if self.signal else "a signal to another process"
        if int(os.environ.get("RANK", 0)) == 0:
            message = f"stopped by {name}; everything is saved. Run the same command to resume."
            LOGGER.info(message)
            print(message, file=sys.stderr)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))
