"""Who of the ranks is still there. Each tells the others, through the store of the process group, that it lives and what it does;
where one falls silent, the others end within a known time instead of waiting for it in a collective that nothing else ends.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import broadcast_object_list
from torch.distributed.distributed_c10d import _get_default_store

from imagenet_swa import status

State = Literal["alive", "closed", "failed", "lost others"]

MOST_NAMED = 4  # ranks in one line
# So many beats without a sign of life, and a rank is named where something else says that one is missing.
_BEATS_TO_BE_NAMED = 3
_PACKAGE = str(Path(__file__).parent) + os.sep


@dataclass
class _Other:
    """What is known of another rank. Times are of this process's own clock: clocks of machines differ."""

    record: dict[str, Any] = field(default_factory=dict)
    heard_at: float = 0.0
    progress_at: float = 0.0

    @property
    def state(self) -> State:
        return self.record.get("state", "alive")

    @property
    def count(self) -> int:
        return self.record.get("count", 0)

    def hear(self, record: dict[str, Any], now: float) -> None:
        """Take in what it wrote, which may be what it wrote before."""
        if record.get("count") != self.record.get("count"):
            self.progress_at = now
        if record.get("beat") != self.record.get("beat"):
            self.heard_at = now
        self.record = record


class _AwakeClock:
    """Seconds during which this process ran: one that was stopped must not take the others for silent when it goes on."""

    def __init__(self, longest_gap: float) -> None:
        self._longest_gap, self._last, self._seconds = longest_gap, time.monotonic(), 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """To be asked more often than every `longest_gap` seconds, of which no more is counted."""
        with self._lock:
            present = time.monotonic()
            self._seconds += min(present - self._last, self._longest_gap)
            self._last = present
            return self._seconds


class Watch:
    """This rank's view of the others. Made by all ranks when the process group is there; closed before it goes.

    It ends the process, with exit code 1 and the reason on stderr, where another rank was silent for `silence_seconds` or the
    store could not be reached as long, where another rank failed and this one does not notice by itself, and where it waits
    `stuck_seconds` for a rank that lives but does not come.

    Args:
        store: of the process group; None where this rank is the only one, which watches nobody.
        token: the same on all ranks and another one in each start of the run: launchers use one store for several starts.
        silence_seconds: a rank that says nothing for so long is lost.
        stuck_seconds: one that lives and is behind the others without moving for so long is stuck; None: nobody is.
        beat_seconds: between two signs of life; by default a second, more where there are hundreds of ranks.
        host: name of this machine for the others' messages.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        rank: int,
        world_size: int,
        silence_seconds: float,
        stuck_seconds: float | None = None,
        beat_seconds: float | None = None,
        host: str | None = None,
        token: str = "",
    ) -> None:
        self._rank, self._silence, self._stuck = rank, silence_seconds, stuck_seconds
        self._beat_seconds = beat_seconds or min(max(1.0, world_size / 100), silence_seconds / 5)
        self._grace = min(2 * _BEATS_TO_BE_NAMED * self._beat_seconds, silence_seconds)
        self._host, self._beat = host or socket.gethostname(), 0
        self._state, self._failure = "alive", ""
        self._doing = (0, "starting")
        self._progress_at = 0.0
        if store is not None:
            self._connect, self._place_of_store = _own_connection(store, f"imagenet_swa/watch/{token}", silence_seconds)
        self._clock = _AwakeClock(longest_gap=2 * self._beat_seconds)
        self._answered_at = 0.0
        self._trouble = "it does not answer"
        self._others = {number: _Other() for number in range(world_size) if number != rank}
        self._trouble_since: float | None = None
        self._warned_of: set[int] = set()
        self._main_thread = threading.main_thread().ident
        self._wake, self._closing = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._tell_and_listen, name="watch: signs of life", daemon=True),
            threading.Thread(target=self._judge, name="watch: others", daemon=True),
        ]
        if self._others:
            for thread in self._threads:
                thread.start()

    def note(self, what: str) -> None:
        """What this rank does from now on. Every rank calls it at the same places of the program: best just before it waits for
        the others, so that who has not come yet is behind in the count of calls.
        """
        self._doing = (self._doing[0] + 1, what)

    def late_ranks(self) -> str | None:
        """One line that names the ranks which are gone, failed, or are behind the others; None if there is none.

        For the moment after a collective failed. It takes a few beats, in which who lives gives a sign of life.
        """
        if not self._others or self._closing.is_set():
            return None
        start = self._clock.now()
        alive_since = start + 1.2 * self._beat_seconds  # what is heard before may have been written before the failure
        while self._clock.now() - start < _BEATS_TO_BE_NAMED * self._beat_seconds:
            others = self._others.values()
            if any(other.state == "failed" for other in others):
                break
            if all(other.state == "closed" or other.heard_at > alive_since for other in others):
                break
            time.sleep(self._beat_seconds / 10)
        return self._line_on_others(alive_since)

    def close(self, failure: str | None = None, *, lost_others: bool = False) -> bool:
        """Say that this rank ends, so that its silence means nothing.

        Returns whether the threads have ended. One that has not waits in the store's code, where the store is out of reach: the
        process has to end by os._exit then, for the interpreter's own end would abort it.

        Args:
            failure: why, if it did not end well; the others end then, too.
            lost_others: it failed because another rank did.
        """
        if self._others and not self._closing.is_set():
            self._say_last("closed" if failure is None else "lost others" if lost_others else "failed", failure or "")
        return not any(thread.is_alive() for thread in self._threads)

    # ----------------------------------------------------------------------------------------------- signs of life

    def _tell_and_listen(self) -> None:
        store: Store | None = None
        while True:
            is_last = self._closing.is_set()
            if is_last and store is None:
                return
            try:
                store = store or self._connect()
                self._exchange(store)
            except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
                store, self._trouble = None, str(error).splitlines()[0][:200]
            if is_last:
                return
            self._wake.wait(self._beat_seconds)

    def _exchange(self, store: Store) -> None:
        self._beat += 1
        count, what = self._doing
        record = {
            **{"beat": self._beat, "count": count, "what": what, "place": self._place(), "host": self._host},
            **{"state": self._state, "failure": self._failure},
        }
        store.set(str(self._rank), json.dumps(record))
        # Reading a key that is not there would wait for it.
        there = [number for number, other in self._others.items() if other.record or store.check([str(number)])]
        texts = store.multi_get([str(number) for number in there]) if there else []
        for number, text in zip(there, texts, strict=True):
            self._others[number].hear(json.loads(text), self._clock.now())
        self._answered_at = self._clock.now()

    def _place(self) -> str:
        """Where the main thread is in this package: `data/encoded.py:120 read_batch`."""
        frame = sys._current_frames().get(self._main_thread or 0)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        if frame is None:
            return ""
        return f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"

    def _say_last(self, state: State, failure: str) -> None:
        self._state, self._failure = state, failure
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2 * self._beat_seconds)

    # --------------------------------------------------------------------------------------------------- judgement

    def _judge(self) -> None:
        last_count = -1
        while not self._closing.wait(self._beat_seconds / 2):
            if self._doing[0] != last_count:
                last_count, self._progress_at = self._doing[0], self._clock.now()
            line = self._verdict()
            if line is not None:
                self._end(line)

    def _verdict(self) -> str | None:
        """Why this process should end, if it should."""
        now = self._clock.now()
        if now - self._answered_at > self._silence:
            return self._line_on_the_store()
        # Of silence only that time counts in which the store answered.
        if any(other.state == "alive" and self._answered_at - other.heard_at > self._silence for other in self._others.values()):
            return self._line_on_others(self._answered_at - self._silence)
        if not any(other.state in ("failed", "lost others") for other in self._others.values()):
            self._trouble_since = None
        elif self._trouble_since is None:
            self._trouble_since = now
        elif now - self._trouble_since > self._grace:
            return self._line_on_others(now - _BEATS_TO_BE_NAMED * self._beat_seconds)
        return self._verdict_on_the_stuck(now)

    def _verdict_on_the_stuck(self, now: float) -> str | None:
        behind = self._behind()
        waited = min((now - max(self._others[number].progress_at, self._progress_at) for number in behind), default=0.0)
        if self._stuck is not None and waited > self._stuck:
            return self._names(behind, self._describe_stuck)
        if waited > self._silence and not set(behind) <= self._warned_of:
            self._warned_of |= set(behind)
            if self._rank == min(number for number in (self._rank, *self._others) if number not in behind):
                print(f"imagenet-swa: warning: {self._names(behind, self._describe_stuck)}", file=sys.stderr, flush=True)
        return None

    def _end(self, line: str) -> None:
        self._say_last("lost others", line)
        status.end(1, line, lost_others=True)
        with suppress(OSError, ValueError):
            print(f"imagenet-swa: error [rank {self._rank}]: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # not sys.exit: the main thread may never come back from its collective

    # ------------------------------------------------------------------------------------------------------- lines

    def _line_on_others(self, silent_since: float) -> str | None:
        """The line on who is at fault: who failed, cannot be reached, is silent since then, is behind; in this order."""
        failed, lost = ([n for n, other in self._others.items() if other.state == s] for s in ("failed", "lost others"))
        if failed:
            return self._names(failed, lambda number: f"{self._name(number)} failed: {self._others[number].record['failure']}")
        if self._answered_at < silent_since:
            return self._line_on_the_store()
        silent = [n for n, other in self._others.items() if other.state == "alive" and other.heard_at < silent_since]
        if silent:
            return self._names(silent, self._describe_silent)
        if lost:  # which know who it was
            return self._others[lost[0]].record["failure"]
        behind = self._behind()
        return self._names(behind, self._describe_stuck) if behind else None

    def _line_on_the_store(self) -> str:
        host = self._others[0].record.get("host", "the first machine") if 0 in self._others else self._host
        return (
            f"the other ranks cannot be reached for {self._clock.now() - self._answered_at:.0f} s: their meeting place "
            f"{self._place_of_store} beside rank 0 ({host}) does not answer ({self._trouble}); "
            "rank 0, its machine, its launcher or the link is lost"
        )

    def _behind(self) -> list[int]:
        alive = {number: other.count for number, other in self._others.items() if other.state == "alive"}
        return [number for number, count in alive.items() if count < self._doing[0]]

    def _names(self, numbers: Sequence[int], describe: Callable[[int], str]) -> str:
        more = f"; and {len(numbers) - MOST_NAMED} ranks more" if len(numbers) > MOST_NAMED else ""
        return "; ".join(describe(number) for number in numbers[:MOST_NAMED]) + more

    def _name(self, number: int) -> str:
        return f"rank {number} ({self._others[number].record.get('host', 'never heard of')})"

    def _describe_silent(self, number: int) -> str:
        other = self._others[number]
        return (
            f"{self._name(number)} is silent for {self._clock.now() - other.heard_at:.0f} s: killed, stopped or cut off; "
            f"it was last at: {_what(other.record)}"
        )

    def _describe_stuck(self, number: int) -> str:
        other = self._others[number]
        return (
            f"{self._name(number)} lives but is behind: for {self._clock.now() - other.progress_at:.0f} s at: "
            f"{_what(other.record)}; rank {self._rank} waits at: {self._doing[1]}"
        )


def start_watch(*, rank: int, world_size: int, silence_seconds: float, stuck_seconds: float | None = None) -> Watch:
    """A watch over the default process group; all of its ranks call it together. One rank alone watches nobody."""
    token = [uuid.uuid4().hex]
    if world_size == 1:
        return Watch(None, rank=rank, world_size=1, silence_seconds=silence_seconds)
    broadcast_object_list(token)
    return Watch(
        _get_default_store(),
        rank=rank,
        world_size=world_size,
        silence_seconds=silence_seconds,
        stuck_seconds=stuck_seconds,
        token=token[0],
    )


def _what(record: dict[str, Any]) -> str:
    place = f" ({record['place']})" if record.get("place") else ""
    return f"{record.get('what', 'its start')}{place}"


def _own_connection(store: Store, prefix: str, timeout_seconds: float) -> tuple[Callable[[], Store], str]:
    """How to open a connection of our own, so that what the main thread waits for in the store's does not hold us up, and the
    store's address.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return lambda: PrefixStore(prefix, store), "in memory or a file"
    host, port, timeout = store.host, store.port, timedelta(seconds=timeout_seconds)
    return lambda: PrefixStore(prefix, TCPStore(host, port, is_master=False, timeout=timeout)), f"{host}:{port}"
