"""Work on a stream in processes, results in the stream's order, with bounded memory."""

import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from imagenet_swa.config import TrainingError

T = TypeVar("T")
R = TypeVar("R")
_CHUNKS_PER_WORKER = 4  # on their way at a time


def in_order(work: Callable[[T], R], items: Iterable[T], num_workers: int | None, chunk: int = 8) -> Generator[R]:
    """`map(work, items)` in `num_workers` processes, 0 for this one, None for one per core; items are taken as needed.

    Close it to stop early. Workers end with this process, however it ends.

    Raises:
        TrainingError: a worker was killed.
    """
    if num_workers == 0:
        yield from map(work, items)
        return
    num_workers = num_workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(num_workers, context, begin_worker, (dict(os.environ),))
    try:
        waiting: deque[Future[list[R]]] = deque()
        for part in _chunks(iter(items), chunk):
            waiting.append(pool.submit(_work_on_chunk, work, part))
            if len(waiting) >= _CHUNKS_PER_WORKER * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise TrainingError("a worker process was killed, perhaps for want of memory; try again with fewer num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while part := list(itertools.islice(items, size)):
        yield part


def _work_on_chunk(work: Callable[[Any], R], part: list[Any]) -> list[R]:
    return [work(item) for item in part]


def begin_worker(environment: dict[str, str]) -> None:
    """Ctrl-C is for the parent, which ends its workers; Pillow's warnings about odd metadata are for nobody.

    The environment, which tells where S3 is, is the parent's of now, not of when its first worker was forked.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
