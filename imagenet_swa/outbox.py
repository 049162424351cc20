"""Files that are written in the background, in order, each whole or not there; what the disk refuses is tried again."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from imagenet_swa import status
from imagenet_swa.config import TrainingError


@dataclass(frozen=True)
class _Letter:
    key: str
    write: Callable[[], object]


class Outbox:
    """A queue of writes and the thread that does them.

    After an OSError the write stays at the head of the queue until somebody asks for another try, as each checkpoint does. A
    write supersedes one of the same key that still waits, so that a full disk does not fill the memory too.
    """

    def __init__(
        self,
        *,
        max_failures: int,
        say: Callable[[str], None],
        may_write: Callable[[], bool] = lambda: True,
        in_background: bool = True,
    ) -> None:
        self._max_failures = max_failures
        self._say = say
        self._may_write = may_write
        self._changed = threading.Condition()
        self._waiting: list[_Letter] = []
        self._is_asked = self._is_writing = self._is_closed = self._is_retry = False
        self._num_failures = 0
        self._refusal: Exception | None = None  # of the last write, if it was refused
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True) if in_background else None
        if self._thread is not None:
            self._thread.start()

    @property
    def failure(self) -> Exception | None:
        """Why it has given up, None as long as it has not."""
        return self._failure

    def give_up(self, failure: Exception) -> None:
        """Write nothing more, for a reason of somebody else's."""
        with self._changed:
            self._failure = self._refusal = failure
            self._waiting = self._waiting[:1] if self._is_writing else []

    def put(self, key: str, write: Callable[[], object], *, retry: bool = False) -> None:
        """Write soon, after what was put before; returns at once where it works in the background. With `retry`, what was
        refused is tried again, and a refusal counts towards the most that there may be in a row.
        """
        assert not self._is_closed, "nobody writes any more"
        with self._changed:
            in_work = self._waiting[:1] if self._is_writing else []
            rest = [letter for letter in self._waiting[len(in_work) :] if letter.key != key]
            self._waiting = [*in_work, *rest, _Letter(key, write)]
            self._is_retry |= retry
            self._is_asked |= retry or self._refusal is None
            self._changed.notify_all()
        if self._thread is None and self._is_asked:
            self._try_all()

    def wait(self) -> None:
        """Return when all is written, after another try of what was refused.

        Raises:
            OSError: the disk refuses it still.
        """
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()
        if self._thread is None:
            self._try_all()
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_asked or self._is_writing))
            refusal = self._failure or (self._refusal if self._waiting else None)
        if refusal is not None:
            raise refusal

    def close(self, *, seconds: float | None = None) -> None:
        """Try once more what waits, for so long at most, and end the thread."""
        with self._changed:
            self._is_asked = self._is_closed = True
            self._changed.notify_all()
        if self._thread is None:
            self._try_all()
        else:
            self._thread.join(seconds)

    # ---------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_asked or self._is_closed)
                is_last = self._is_closed
            self._try_all()
            if is_last:
                return

    def _try_all(self) -> None:
        """Write what waits, until the first failure."""
        with self._changed:
            is_retry, self._is_retry = self._is_retry, False
            self._is_asked, self._is_writing = False, bool(self._waiting) and self._failure is None
            self._changed.notify_all()
        if self._is_writing:  # else, on the other ranks, rank 0's thread may
            status.writing(True)
        while self._is_writing:
            letter, failure = self._waiting[0], None
            try:
                if not self._may_write():
                    raise TrainingError("another job took the run folder over; nothing more was written into it")
                letter.write()
            except Exception as error:
                failure = error
            with self._changed:
                self._note(failure, is_retry)
                if failure is None:
                    self._waiting.pop(0)
                self._is_writing = failure is None and self._failure is None and bool(self._waiting)
                if not self._is_writing:
                    status.writing(False)
                self._changed.notify_all()

    def _note(self, failure: Exception | None, is_retry: bool) -> None:
        if self._failure is not None:
            return
        self._refusal = failure
        if failure is None:
            if len(self._waiting) == 1:  # nothing is left: a line of a log may find room where a checkpoint finds none
                self._num_failures = 0
            return
        self._num_failures += is_retry
        if not isinstance(failure, OSError) or self._num_failures >= self._max_failures:
            self._failure = failure
            return
        with suppress(Exception):  # nothing that a screen refuses may end the thread
            self._say(self._warning(failure))

    def _warning(self, failure: OSError) -> str:
        return (
            f"warning: {failure.strerror or failure} ({failure.filename}): nothing new is on disk, what was there stays; tried "
            f"again with the next, and the run stops after {self._max_failures - self._num_failures} more failures"
        )
