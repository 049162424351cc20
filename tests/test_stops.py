"""A run that is asked to stop does so within a step, in whatever it does, and goes on as if nothing had happened."""

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from struck import Arena, Struck, arena
from test_exact_resume import BF16, RESNET, RUN, on_images, undisturbed

from imagenet_swa.selftest.compare import differences
from imagenet_swa.selftest.whole import checkpoints, what_is_torn

STOPPED, INTERRUPTED = 85, 130
NUM_STEPS, PER_STEP = 20, 16
SLOW = {"SPY_NAP": "0.2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("stops")) as place:
        yield place


def after_signal(start: Struck, rank: int, phase: str) -> list[dict]:
    """Batches that a rank took up after the first signal to any, in that phase."""
    sent = min(note["time"] for r in range(len(start.pids)) for note in start.notes(r) if "signal" in note)
    return [note for note in start.notes(rank, phase) if note["time"] > sent]


def check_stop(place: Arena, run: Path, num_processes: int, flags: Sequence[str], blow: str) -> None:
    """A signal at a batch ends all ranks with 85, none of them more than a step later."""
    first, phase = max(checkpoints(run), default=0), blow.split()[0]
    start = place.start(run, num_processes, flags, blow=blow)
    codes = start.end()
    assert codes == [STOPPED] * num_processes, f"{codes}\n{start.screen()}"
    assert "the same command goes on" in start.screen()
    assert what_is_torn(run) == []
    assert {len(start.notes(rank, phase)) for rank in range(num_processes)} <= {
        len(start.notes(0, phase)) - 1,
        len(start.notes(0, phase)),
    }
    saved = max(checkpoints(run), default=0)
    if phase == "training":
        parts = PER_STEP // num_processes // 2
        num_steps = len(start.notes(0, phase)) / parts
        assert saved == first + num_steps, "what was trained is not what was saved"
        at = int(blow.split()[1]) // parts  # finished steps of this start when the signal came
        assert num_steps <= at + 2, "the step of the signal, and one more"
    else:
        assert all(len(after_signal(start, rank, phase)) <= 1 for rank in range(num_processes))


def test_stops_of_two_processes(place: Arena) -> None:
    """TERM, INT, USR1 and USR2, to one process or both, in training, BatchNorm pass and evaluation, and the time limit, stop both
    within a step with 85; stopped so often, the run ends as the undisturbed one.
    """
    flags = (*RUN, *BF16)
    wanted, run = undisturbed(place, 2, flags), place.folder / "two"
    check_stop(place, run, 2, flags, "evaluation 1 SIGUSR1 1")
    check_stop(place, run, 2, flags, "training 9 SIGTERM 1")
    check_stop(place, run, 2, flags, "batchnorm 5 SIGINT 0,1")
    check_stop(place, run, 2, flags, "evaluation 2 SIGTERM 0")
    check_stop(place, run, 2, flags, "training 6 SIGUSR2 0,1")
    limited = place.start(run, 2, (*flags, "--max_minutes=0.000001"))
    assert limited.end() == [STOPPED] * 2, limited.screen()
    assert "max_minutes" in limited.screen()
    place.finish(run, 2, flags)
    assert differences(wanted, run) == []


def test_stops_of_one_process(place: Arena) -> None:
    """A single process stops as well, in training, BatchNorm pass and evaluation, where its next batch would begin."""
    wanted, run = undisturbed(place, 1, RESNET), place.folder / "one"
    check_stop(place, run, 1, RESNET, "training 20 SIGUSR1 0")
    check_stop(place, run, 1, RESNET, "batchnorm 7 SIGTERM 0")
    check_stop(place, run, 1, RESNET, "evaluation 3 SIGINT 0")
    place.finish(run, 1, RESNET)
    assert differences(wanted, run) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_interrupt_ends_at_once(place: Arena, num_processes: int) -> None:
    """Where a step takes long, a second Ctrl-C ends the run within seconds, with 130; what was on disk stays whole."""
    run = place.folder / f"interrupted-{num_processes}"
    start = place.start(run, num_processes, RUN, SPY_NAP="20")
    start.until(lambda start: all(start.notes(rank, "evaluation") for rank in range(num_processes)))
    start.send_to_groups(signal.SIGINT)
    time.sleep(1)
    assert None in start.codes, "a first Ctrl-C waits for the batch"
    pressed = time.monotonic()
    start.send_to_groups(signal.SIGINT)
    codes = start.end()
    assert codes == [INTERRUPTED] * num_processes, f"{codes}\n{start.screen()}"
    assert time.monotonic() - pressed < 15
    place.finish(run, num_processes, (*RUN, "--swa.num_epochs=1"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_loader_processes_outlive_the_signal(place: Arena, image_folder: Path, number: signal.Signals) -> None:
    """A signal to a whole process group, torchvision's decoding processes included, stops the run with 85 like any other."""
    flags = on_images(image_folder, "torchvision")
    run = place.folder / f"group-{number.name}"
    start = place.start(run, 1, flags, **SLOW)
    start.until(lambda start: len(start.notes(0, "training")) > 2)
    (start.status_folder / "asked").touch()
    start.send_to_groups(number)
    codes = start.end()
    assert codes == [STOPPED], f"{codes}\n{start.screen()}"
    assert 2 <= max(checkpoints(run)) <= 11
    place.finish(run, 1, flags)
    assert differences(undisturbed(place, 1, flags), run) == []
