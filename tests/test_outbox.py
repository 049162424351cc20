"""Writes in the background: their order, a disk that refuses, and when the outbox gives up."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.config import TrainingError
from imagenet_swa.outbox import Outbox

BACKGROUND = pytest.mark.parametrize("in_background", [True, False], ids=["background", "foreground"])


def full_disk(path: str = "somewhere") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


class Disk:
    """Notes what is written; refuses while `is_full`."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.num_attempts = 0
        self.is_full = False

    def writing(self, name: str) -> Callable[[], None]:
        def write() -> None:
            self.num_attempts += 1
            if self.is_full:
                raise full_disk(name)
            self.written.append(name)

        return write


@contextmanager
def outbox(*, in_background: bool, max_failures: int = 3, said: list[str] | None = None) -> Iterator[Outbox]:
    box = Outbox(max_failures=max_failures, say=[].append if said is None else said.append, in_background=in_background)
    try:
        yield box
    finally:
        box.close(seconds=10)


def settle(box: Outbox) -> None:
    """Return when it has tried what it was asked to try, without asking for another try."""
    with box._changed:
        assert box._changed.wait_for(lambda: not (box._is_asked or box._is_writing), timeout=10)


@BACKGROUND
def test_order(in_background: bool):
    """What was put is written in the order in which it was put, each once."""
    disk, names = Disk(), [str(number) for number in range(50)]
    with outbox(in_background=in_background) as box:
        for name in names:
            box.put(name, disk.writing(name))
        box.wait()
    assert disk.written == names


@BACKGROUND
def test_nothing_to_wait_for(in_background: bool):
    """Waiting with nothing to write returns, again and again, also after writes."""
    with outbox(in_background=in_background) as box:
        waiter = threading.Thread(target=lambda: [box.wait() for _ in range(100)], daemon=True)
        waiter.start()
        waiter.join(10)
        assert not waiter.is_alive()


@BACKGROUND
def test_what_is_refused_is_tried_again(in_background: bool):
    """A refused write, and all behind it, wait in their order until somebody asks for another try, and then are all written."""
    disk, said = Disk(), []
    with outbox(in_background=in_background, said=said) as box:
        disk.is_full = True
        box.put("a", disk.writing("a"))
        settle(box)
        box.put("b", disk.writing("b"))  # does not ask for another try
        settle(box)
        assert (disk.written, disk.num_attempts, len(said)) == ([], 1, 1)
        disk.is_full = False
        box.put("c", disk.writing("c"), retry=True)
        settle(box)
        assert disk.written == ["a", "b", "c"]
        assert box.failure is None
    assert said == [
        "warning: No space left on device (a): nothing new is on disk, what was there stays; tried again with the next, and the "
        "run stops after 3 more failures"
    ]


@BACKGROUND
@pytest.mark.parametrize("max_failures", [1, 2, 4])
def test_gives_up_after_so_many_in_a_row(in_background: bool, max_failures: int):
    """It gives up at the max_failures-th refusal in a row and not before; a write in between starts the count again."""
    disk, said = Disk(), []
    with outbox(in_background=in_background, max_failures=max_failures, said=said) as box:

        def put(number: int) -> None:
            box.put(f"checkpoint {number}", disk.writing(str(number)), retry=True)
            settle(box)

        for round_number in range(2):
            disk.is_full = True
            for number in range(max_failures - 1):
                put(10 * round_number + number)
                assert box.failure is None
            disk.is_full = False
            put(10 * round_number + max_failures)
        disk.is_full = True
        for number in range(max_failures - 1):
            put(20 + number)
        assert box.failure is None
        put(30)
        assert isinstance(box.failure, OSError)
        disk.is_full = False
        num_attempts, written = disk.num_attempts, list(disk.written)
        box.put("later", disk.writing("later"), retry=True)
        with pytest.raises(OSError, match="No space left on device"):
            box.wait()
        assert (disk.num_attempts, disk.written) == (num_attempts, written), "it had given up"
    assert len(said) == 3 * (max_failures - 1)
    assert all(f"after {max_failures - 1 - i % (max_failures - 1)} more" in line for i, line in enumerate(said))


@BACKGROUND
def test_a_line_that_still_finds_room(in_background: bool):
    """On a disk that takes a line of a log but no checkpoint, the checkpoints' failures are failures in a row."""
    disk, full = Disk(), Disk()
    full.is_full = True
    with outbox(in_background=in_background, max_failures=3) as box:
        for number in range(3):
            assert box.failure is None
            box.put("log", disk.writing(f"log {number}"))
            box.put("checkpoint", full.writing("checkpoint"), retry=True)
            settle(box)
        assert box.failure is not None
    assert disk.written[0] == "log 0"


@BACKGROUND
def test_captures_do_not_count(in_background: bool):
    """Only checkpoints, which ask for another try, count towards the failures after which a run stops."""
    disk = Disk()
    disk.is_full = True
    with outbox(in_background=in_background, max_failures=2) as box:
        for number in range(5):
            box.put(f"capture {number}", disk.writing("capture"))
            settle(box)
        assert box.failure is None and disk.num_attempts == 1
        box.put("checkpoint", disk.writing("checkpoint"), retry=True)
        settle(box)
        assert box.failure is None and disk.num_attempts == 2
        box.put("checkpoint", disk.writing("checkpoint"), retry=True)
        settle(box)
        assert box.failure is not None


@BACKGROUND
def test_waiting_raises_what_the_disk_says(in_background: bool):
    """wait() tries once more and raises the refusal; with room again it returns when all is written."""
    disk = Disk()
    disk.is_full = True
    with outbox(in_background=in_background, max_failures=99) as box:
        box.put("a", disk.writing("a"))
        settle(box)
        with pytest.raises(OSError, match="No space left on device") as caught:
            box.wait()
        assert caught.value.filename == "a" and disk.num_attempts == 2
        disk.is_full = False
        box.wait()
        assert disk.written == ["a"]


@BACKGROUND
def test_a_defect_is_not_swallowed(in_background: bool):
    """An error that is not the disk's ends the writing at once: wait() raises it, and nothing behind it is written."""
    disk = Disk()

    def defect() -> None:
        raise KeyError("a name")

    with outbox(in_background=in_background) as box:
        with suppress(KeyError):
            box.put("defect", defect)
        box.put("b", disk.writing("b"), retry=True)
        settle(box)
        assert isinstance(box.failure, KeyError)
        with pytest.raises(KeyError, match="a name"):
            box.wait()
    assert disk.written == []


@BACKGROUND
def test_a_folder_that_is_another_jobs(in_background: bool):
    """Where the run folder was lost to another job nothing is written from then on, and the run hears why."""
    disk, is_mine = Disk(), [True]
    box = Outbox(max_failures=3, say=print, may_write=lambda: is_mine[0], in_background=in_background)
    box.put("a", disk.writing("a"))
    box.wait()
    is_mine[0] = False
    box.put("b", disk.writing("b"))
    with pytest.raises(TrainingError, match="another job took the run folder over"):
        box.wait()
    box.close(seconds=10)
    assert disk.written == ["a"]


class Slow:
    """A write that lasts until it is let go."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def write(self) -> None:
        self.has_begun.set()
        assert self.may_end.wait(10)


def test_memory(tmp_path: Path):
    """Of checkpoints that a slow disk lets wait, all but the newest are let go: one waits beside the one in work."""
    del tmp_path
    slow, disk, held = Slow(), Disk(), []
    with outbox(in_background=True) as box:
        box.put("checkpoint", slow.write, retry=True)
        assert slow.has_begun.wait(10)
        for number in range(20):
            box.put(f"capture {number}", disk.writing(f"capture {number}"))
            box.put("checkpoint", disk.writing(f"checkpoint {number}"), retry=True)
            held.append(sum(letter.key == "checkpoint" for letter in box._waiting))
        slow.may_end.set()
        box.wait()
    assert max(held) == 2
    assert disk.written == [*(f"capture {number}" for number in range(20)), "checkpoint 19"]


def test_putting_does_not_wait():
    """In the background, put returns while the disk is busy."""
    slow = Slow()
    with outbox(in_background=True) as box:
        box.put("a", slow.write)
        assert slow.has_begun.wait(10)
        box.put("b", lambda: None, retry=True)
        assert not slow.may_end.is_set()
        slow.may_end.set()


def test_closing_with_a_limit():
    """close(seconds) returns after so long although a write hangs; close() without waits for all that was put."""
    slow, disk = Slow(), Disk()
    box = Outbox(max_failures=3, say=print)
    box.put("a", slow.write)
    box.put("b", disk.writing("b"))
    assert slow.has_begun.wait(10)
    start = time.monotonic()
    box.close(seconds=0.05)
    assert time.monotonic() - start < 5 and disk.written == []
    slow.may_end.set()
    box.close()
    assert disk.written == ["b"]


@BACKGROUND
def test_closing_tries_once_more(in_background: bool):
    """What the disk had refused is written at the end if there is room by then; a full disk does not keep it from ending."""
    for has_room in (True, False):
        disk = Disk()
        box = Outbox(max_failures=99, say=lambda _: None, in_background=in_background)
        disk.is_full = True
        box.put("a", disk.writing("a"))
        settle(box)
        disk.is_full = not has_room
        box.close(seconds=10)
        assert (disk.written, disk.num_attempts) == (["a"] if has_room else [], 2)


def test_giving_up_for_another_reason():
    """give_up drops what waits; the write in work comes to its end; who waits hears the reason."""
    slow, disk = Slow(), Disk()
    box = Outbox(max_failures=3, say=print)
    box.put("a", slow.write)
    box.put("b", disk.writing("b"))
    assert slow.has_begun.wait(10)
    box.give_up(TrainingError("the folder is lost"))
    slow.may_end.set()
    with pytest.raises(TrainingError, match="the folder is lost"):
        box.wait()
    box.close(seconds=10)
    assert disk.written == []


# -------------------------------------------------------------------------------------------------------- a simple model


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "retry", "wait"]), st.sampled_from("abc"), st.booleans()), max_size=25),
    st.integers(1, 3),
    st.booleans(),
)
def test_against_a_model(events: list[tuple[str, str, bool]], max_failures: int, in_background: bool):
    """Whatever is put, under whatever key, while the disk is full or not, the writes are those of a plain list that is worked
    off from its head, and the run stops when that says so.
    """
    disk, said = Disk(), []
    waiting: list[tuple[str, str]] = []
    written: list[str] = []
    num_failures, is_refused, has_failed = 0, False, False
    with outbox(in_background=in_background, max_failures=max_failures, said=said) as box:
        for number, (event, key, is_full) in enumerate(events):
            disk.is_full = is_full
            text = f"{key}{number}"
            if event != "wait":
                waiting = [*(letter for letter in waiting if letter[0] != key), (key, text)]
                box.put(key, disk.writing(text), retry=event == "retry")
                settle(box)
            else:
                with suppress(OSError):
                    box.wait()
            if has_failed or (event == "put" and is_refused):
                assert disk.written == written
                continue
            if waiting and is_full:
                is_refused = True
                num_failures += event == "retry"
                has_failed = num_failures >= max_failures
            elif waiting:
                written += [content for _, content in waiting]
                waiting, is_refused, num_failures = [], False, 0
            assert disk.written == written
            assert (box.failure is not None) == has_failed
