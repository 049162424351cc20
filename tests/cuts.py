"""Power cuts in this process: a run ends in a chosen place, and what it had not yet written is lost."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from imagenet_swa import checkpoint
from imagenet_swa.outbox import Outbox
from imagenet_swa.run import Run
from imagenet_swa.stepper import Stepper


class PowerCut(Exception):
    """The machine goes down."""


@contextmanager
def power_cut() -> Iterator[pytest.MonkeyPatch]:
    """The block, which patches something, ends with a cut."""
    close = Outbox.close

    def lose_what_waits(self: Outbox, **options: Any) -> None:
        self.give_up(PowerCut())
        close(self, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Outbox, "close", lose_what_waits)
        yield patch


@contextmanager
def cut_at_epoch(epoch: int, method: str) -> Iterator[None]:
    """Cut when `method` of Run is called with this many finished epochs; `results.add`: when they have just been measured."""
    name = "evaluate_what_is_due" if method == "results.add" else method
    original: Callable[..., Any] = getattr(Run, name)

    def cut(self: Run, *arguments: Any) -> Any:
        if self.epoch == epoch and method != "results.add":
            raise PowerCut
        if self.epoch == epoch:
            setattr(self.results, "add", _go_down)  # noqa: B010  a method of one object
        return original(self, *arguments)

    with power_cut() as patch:
        patch.setattr(Run, name, cut)
        yield


@contextmanager
def cut_at_step(step: int, place: str) -> Iterator[None]:
    """Cut after so many finished steps, in a place of `PLACES`."""
    with power_cut() as patch:
        PLACES[place](patch, step)
        yield


def _go_down(*_arguments: object, **_options: object) -> None:
    raise PowerCut


def _in_the_loader(patch: pytest.MonkeyPatch, step: int) -> None:
    launch = Stepper.launch
    patch.setattr(Stepper, "launch", lambda self, n, stream, wishes: launch(self, n, stream if n < step else _dead(), wishes))


def _dead() -> Iterator[Any]:
    _go_down()
    yield


def _in_the_run(method: str, patch: pytest.MonkeyPatch, step: int) -> None:
    original = getattr(Run, method)

    def cut(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        if self.step >= step:
            raise PowerCut

    patch.setattr(Run, method, cut)


def _in_a_write(patch: pytest.MonkeyPatch, step: int) -> None:
    write, newest = checkpoint.write_flushed, [0]
    save = checkpoint.Checkpoints.save

    def torn(path: Any, content: bytes) -> str:
        if newest[0] >= step and path.name.startswith("momentum"):
            path.write_bytes(content[: len(content) // 2])
            raise PowerCut
        return write(path, content)

    def note(self: Any, snapshot: Any) -> Any:
        newest[0] = snapshot.progress["step"]
        return save(self, snapshot)

    patch.setattr(checkpoint, "write_flushed", torn)
    patch.setattr(checkpoint.Checkpoints, "save", note)


PLACES: dict[str, Callable[[pytest.MonkeyPatch, int], None]] = {
    "loader": _in_the_loader,
    "minimum": functools.partial(_in_the_run, "at_minimum"),
    "after a step": functools.partial(_in_the_run, "heed"),
    "write": _in_a_write,
}
