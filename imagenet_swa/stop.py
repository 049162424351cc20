"""Requests to stop: signals of schedulers, of people, and the time limit. A request is noted; who trains looks at the note."""

import atexit
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from imagenet_swa import status

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A terminal's Ctrl-C reaches a process twice, from the terminal and from its launcher, in an instant.
ONE_PRESS_SECONDS = 0.5
_GRACE_SECONDS = 3.0
FAILED, REQUEUE, INTERRUPTED = 1, 85, 130  # exit codes


class StopRequest:
    """Whether this process was asked to stop, and by what. The first request is noted; a second Ctrl-C ends the process at
    once.
    """

    def __init__(self) -> None:
        self._by_signal: str | None = None
        self._first_interrupt = math.inf
        self._started = time.monotonic()
        self._minutes = math.inf
        self.is_heeded = False  # whether the run has come to where it looks at the note, in each step

    @property
    def reason(self) -> str | None:
        """What asked for it: `SIGTERM`, or `max_minutes`; None if nothing has."""
        if self._by_signal is None and time.monotonic() - self._started > 60 * self._minutes:
            return f"max_minutes {self._minutes:g}"
        return self._by_signal

    def limit(self, minutes: float | None) -> None:
        """Ask for a stop so many minutes after `listen`."""
        self._minutes = math.inf if minutes is None else minutes

    def listen(self) -> None:
        """Note signals from now on. For the main thread."""
        self._started = time.monotonic()
        self._watch_from_a_thread()
        for number in SIGNALS:
            signal.signal(number, self._note)
        # The interpreter's own end puts back what signals do by default, and a late one would kill a process that ended well.
        atexit.register(ignore_in_child)

    def _note(self, number: int, _frame: FrameType | None = None) -> None:
        if number == signal.SIGTERM and status.by_launcher():
            return  # the thread ends the process: this is no request that the run should remember
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._first_interrupt > ONE_PRESS_SECONDS:
                raise KeyboardInterrupt
            self._first_interrupt = min(now, self._first_interrupt)
        self._by_signal = self._by_signal or signal.Signals(number).name

    def _watch_from_a_thread(self) -> None:
        """A thread that ends the process where the main one cannot: it may wait for other processes, or for a slow disk, and not
        notice a second Ctrl-C, nor, before the first step, any signal at all. Nothing is lost then that was not lost before.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_no_longer_wake)  # else a signal to a child would be taken for one to this process

        def watch() -> None:
            first = math.inf
            while numbers := os.read(reader, 64):
                now = time.monotonic()
                if signal.SIGINT in numbers and now - first > ONE_PRESS_SECONDS:
                    time.sleep(_GRACE_SECONDS)
                    os._exit(INTERRUPTED)
                if signal.SIGINT in numbers:
                    first = min(first, now)
                asked = next((signal.Signals(number).name for number in numbers if number in SIGNALS), None)
                if signal.SIGTERM in numbers and status.by_launcher():
                    _after_grace(self._end_for_the_others, 2 * _GRACE_SECONDS)  # the watch, which names who is lost, comes first
                elif asked is not None and not self.is_heeded:
                    _after_grace(partial(self._end_early, asked))

        threading.Thread(target=watch, name="stop signals", daemon=True).start()

    def _end_early(self, asked: str) -> None:
        if not self.is_heeded:
            _end_now(REQUEUE, f"stopped: by {asked} before the first step; the same command goes on")

    def _end_for_the_others(self) -> None:
        # A scheduler's signal goes to all processes of a job, and may be here before the supervisor has said that it was asked.
        if status.by_launcher():
            _end_now(FAILED, "error: the launcher ends this process, since another one of the run was lost", lost_others=True)


def _no_longer_wake() -> None:
    signal.set_wakeup_fd(-1)


def _after_grace(call: Callable[[], None], seconds: float = _GRACE_SECONDS) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def _end_now(code: int, message: str, *, lost_others: bool = False) -> None:
    line = f"imagenet-swa: {message}"
    status.end(code, line, lost_others=lost_others)
    if not status.is_watched():
        print(line, file=sys.stderr, flush=True)
    os._exit(code)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the block ends; a process that is started in it never gets them unless it asks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_child() -> None:
    """For processes that serve this one: whoever asks all of a job to stop means it, and it ends them itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


request = StopRequest()  # of this process, as its signals are
