"""Memory that is used again: never while anybody can see it."""

import gc
import sys

import numpy as np
import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.data.buffers import Buffers, keep_freed_memory


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again() -> None:
    """An array that nobody refers to any more gives its memory to the next one of its size or less."""
    buffers = Buffers(num_kept=2)
    first = buffers.take((100, 7), np.float32)
    place = address(first)
    del first
    again = buffers.take((70, 10), np.float32)
    assert address(again) == place and again.shape == (70, 10) and again.flags.c_contiguous and again.flags.writeable


VIEWS = {
    "the array": lambda array: array,
    "a slice": lambda array: array[2:5],
    "a slice of a slice": lambda array: array[2:][1:, ::2],
    "a reshape": lambda array: array.reshape(4, 32).T,
    "a tensor": torch.from_numpy,
    "a view of a tensor": lambda array: torch.from_numpy(array).permute(1, 0)[3:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_what_can_be_seen_is_not_used_again(view: str) -> None:
    """While anything made of an array lives, its memory is nobody else's, and afterwards it is."""
    buffers = Buffers(num_kept=2)
    array = buffers.take((8, 16), np.float32)
    place = address(array)
    array[:] = 3
    kept = VIEWS[view](array)
    del array
    other = buffers.take((8, 16), np.float32)
    other[:] = 5
    assert address(other) != place and float(kept.min()) == 3 == float(kept.max())
    del kept, other
    gc.collect()
    taken = [buffers.take((8, 16), np.float32) for _ in range(2)]
    assert place in {address(array) for array in taken}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5)), min_size=1, max_size=40))
def test_arrays_in_use_never_overlap(requests: list[tuple[int, int]]) -> None:
    """Whatever is taken and dropped in whatever order, each array keeps what was written into it."""
    buffers, held = Buffers(num_kept=3), []
    for number, (size, dropped) in enumerate(requests):
        array = buffers.take((size, 3), np.int32)
        array[:] = number
        held.append((number, array))
        del array
        if dropped < len(held):
            del held[dropped]
        assert all((array == wanted).all() for wanted, array in held)


def test_at_most_so_many_unused_blocks_stay() -> None:
    """What is given back beyond the number to keep goes to the system, the smallest first."""
    buffers = Buffers(num_kept=2)
    arrays = [buffers.take((size,), np.uint8) for size in (1000, 3000, 2000, 4000)]
    places = {array.size: address(array) for array in arrays}
    arrays.clear()
    taken = [buffers.take((size,), np.uint8) for size in (2500, 2500)]
    assert [address(array) for array in taken] == [places[3000], places[4000]]


def test_a_collection_in_the_middle_does_not_lock_up() -> None:
    """Arrays in reference cycles come back whenever the garbage collector runs, on the very thread that takes one."""
    script = """
import gc
import numpy as np
from imagenet_swa.data.buffers import Buffers

class CollectsInTheMiddle(Buffers):
    def _sort_in_the_returned(self):
        gc.collect()
        super()._sort_in_the_returned()

buffers = CollectsInTheMiddle(num_kept=4)
gc.disable()
for _ in range(3):
    cycle = [buffers.take((50,), np.uint8)]
    cycle.append(cycle)
    del cycle
print("done")
"""
    assert run([sys.executable, "-c", script], timeout=30).stdout == "done\n"


def test_freed_memory_is_kept_where_glibc_is() -> None:
    """The setting is taken by glibc, and asking for it again does no harm."""
    assert keep_freed_memory() is keep_freed_memory() is (sys.platform == "linux")
