"""Iterators whose items are made in threads, ahead of whoever takes them."""

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], depth: int) -> Generator[R, None, None]:
    """`map(function, items)`, computed in threads up to `depth` items ahead of whoever takes them; ends with its taker."""
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(depth, "prepare")
    try:
        for item in items:
            waiting.append(pool.submit(partial(function, item)))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_background(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made in a thread up to `depth` of them ahead of whoever takes them; ends with its taker."""
    made: Queue[tuple[bool, Any]] = Queue(depth)
    no_longer_wanted = Event()

    def put(is_item: bool, value: Any) -> None:
        while not no_longer_wanted.is_set():
            try:
                made.put((is_item, value), timeout=0.1)
                return
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(True, item)
                if no_longer_wanted.is_set():
                    break
            put(False, None)
        except BaseException as error:  # the taker's business, whatever it is
            put(False, error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = made.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        no_longer_wanted.set()
        thread.join()


_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def until_exit(stream: Generator[T, None, None]) -> Generator[T, None, None]:
    """The stream, which is closed when the process ends and nobody is in the middle of it, as after an error whose traceback
    holds it: threads of DALI's that still run would turn the exit into an abort. A forked process leaves it to its parent.
    """
    _close_at_exit()
    _open.add(stream)
    return stream


@cache
def _close_at_exit() -> None:
    """Registered when a stream is opened, after DALI's own clean-up, and so run before it."""
    atexit.register(_close_all)
    os.register_at_fork(after_in_child=_open.clear)


def _close_all() -> None:
    for stream in list(_open):
        with suppress(ValueError):  # another thread is taking its next item
            stream.close()
