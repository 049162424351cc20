"""Reading ahead: order, bounds, errors and what is left behind."""

import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.data.streams import ahead, in_background


class OurFaultError(Exception):
    """Raised in the middle of a stream."""


def soon(holds: Any) -> bool:
    """Whether a condition comes true within some seconds."""
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


def numbers(stop: int, fails_at: int | None = None, closed: list[str] | None = None) -> Generator[int, None, None]:
    try:
        for number in range(stop):
            if number == fails_at:
                raise OurFaultError(number)
            yield number
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


def read_ahead(kind: str, items: Iterator[int], depth: int) -> Generator[int, None, None]:
    return ahead(lambda number: number, items, depth) if kind == "ahead" else in_background(items, depth)


both = pytest.mark.parametrize("kind", ["ahead", "in_background"])


@both
@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 30), depth=st.integers(1, 7))
def test_the_items_in_their_order(kind: str, length: int, depth: int) -> None:
    """All items come out, once, in the order in which they went in, and no thread stays."""
    before = threading.active_count()
    assert list(read_ahead(kind, numbers(length), depth)) == list(range(length))
    assert soon(lambda: threading.active_count() <= before)


def test_slow_items_do_not_overtake() -> None:
    """`ahead` computes several items at a time; an early one that takes long still comes first."""

    def slowly(number: int) -> int:
        time.sleep(0.02 * (number % 3 == 0))
        return 10 * number

    assert list(ahead(slowly, range(20), 4)) == [10 * number for number in range(20)]


@both
@pytest.mark.parametrize("depth", [1, 3])
def test_the_lead_is_bounded(kind: str, depth: int) -> None:
    """No more is taken from the source than `depth` items and two beyond what was handed on."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    with closing(read_ahead(kind, source(), depth)) as stream:
        for number_handed_on in range(1, 20):
            next(stream)
            time.sleep(0.01)
            assert number_handed_on <= len(taken) <= number_handed_on + depth + 2
        assert soon(lambda: len(taken) >= 19 + depth)  # it does read ahead


@both
@pytest.mark.parametrize("place", [0, 1, 7, 19])
def test_an_error_of_the_source_comes_where_it_belongs(kind: str, place: int) -> None:
    """The items before an error arrive first, then the error itself, then nothing."""
    stream, arrived = read_ahead(kind, numbers(20, fails_at=place), 3), []
    with pytest.raises(OurFaultError) as error:
        for number in stream:
            arrived.append(number)
    assert error.value.args == (place,)
    if kind == "in_background":
        assert arrived == list(range(place))
    assert next(stream, None) is None


def test_an_error_of_the_function_comes_where_it_belongs() -> None:
    """`ahead` hands on the results before the item that failed, however far it was ahead."""

    def fails_at_seven(number: int) -> int:
        if number == 7:
            raise OurFaultError
        return number

    stream, arrived = ahead(fails_at_seven, range(20), 4), []
    with pytest.raises(OurFaultError):
        for number in stream:
            arrived.append(number)
    assert arrived == list(range(7))


@both
@pytest.mark.parametrize("num_taken", [0, 1, 5, 30])
def test_closing_early_ends_all(kind: str, num_taken: int) -> None:
    """A taker that leaves ends the threads, and the source is closed in the thread that it ran in."""
    before, closed = threading.active_count(), []
    source = numbers(30, closed=closed)
    stream = read_ahead(kind, source, 2)
    for _ in range(num_taken):
        next(stream)
    stream.close()
    assert soon(lambda: threading.active_count() <= before)
    if kind == "in_background" and num_taken:
        assert len(closed) == 1 and closed[0] != threading.current_thread().name


def test_a_full_queue_does_not_keep_the_worker() -> None:
    """Also a worker that waits for room in the queue ends when its taker leaves."""
    before = threading.active_count()
    stream = in_background(numbers(1000), 1)
    next(stream)
    time.sleep(0.05)
    stream.close()
    assert soon(lambda: threading.active_count() <= before)


LEAVES_A_STREAM_OPEN = """
import atexit
atexit.register(print, "a library's clean-up")
from imagenet_swa.data.streams import until_exit

def stream():
    try:
        while True:
            yield 1
    finally:
        print("closed")

opened = until_exit(stream())
next(opened)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemError('in the middle')", "next(opened); opened.close(); print('by hand')"])
def test_open_streams_are_closed_at_the_end_of_the_process(end: str) -> None:
    """A stream that somebody still holds when the process ends is closed then, before libraries clean up; one that is closed
    is left alone.
    """
    result = run([sys.executable, "-c", LEAVES_A_STREAM_OPEN.format(end=end)])
    assert result.stdout.split("\n")[:-1] == ["closed", *["by hand"] * ("by hand" in end), "a library's clean-up"]
    assert result.returncode == ("raise" in end)
