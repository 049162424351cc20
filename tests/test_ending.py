"""Exit codes and last lines."""

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagenet_swa import ending
from imagenet_swa.config import InputError, LostOthersError, StopRequested, TrainingError
from imagenet_swa.ending import exit_code_of
from imagenet_swa.stop import StopRequest


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopRequest]:
    """No launcher, no other ranks, nothing asked for so far."""
    for name in ("RANK", "LOCAL_RANK", "IMAGENET_SWA_STATUS"):
        monkeypatch.delenv(name, raising=False)
    request = StopRequest()
    monkeypatch.setattr(ending, "request", request)
    monkeypatch.setattr(ending, "_part_from_others", lambda *_, **__: None)
    yield request


def raising(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


ENDINGS = [
    (InputError("no such folder"), 2, "error: no such folder"),
    (StopRequested("by SIGTERM"), 85, "stopped: by SIGTERM"),
    (KeyboardInterrupt(), 130, "error: interrupted; goes on"),
    (TrainingError("the loss is NaN"), 1, "error: the loss is NaN"),
    *((OSError(n, "refused", "/f"), 1, "error: refused (/f); goes on") for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDINGS, ids=lambda value: type(value).__name__)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str):
    """Each known ending has its code and one line on stderr."""
    assert exit_code_of(raising(error), goes_on="; goes on") == code
    assert capsys.readouterr().err == f"imagenet-swa: {line}\n"


def test_a_good_end(capsys: pytest.CaptureFixture[str]):
    """A command's own code is the exit code; nothing is said."""
    assert [exit_code_of(lambda code=code: code) for code in (0, 1, 2)] == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]):
    """Newlines and terminal escapes from hostile names do not reach the screen."""
    assert exit_code_of(raising(InputError("no such file: a\nb\x1b[2J"))) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "\x1b" not in shown


def test_other_ranks_of_a_machine_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What all ranks know, the first of a machine says; what only one knows, it says with its number."""
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code_of(raising(TrainingError("the loss is NaN"))) == 1
    assert capsys.readouterr().err == ""
    error = InputError("cannot decode the image")
    error.concerns_one_rank = True
    assert exit_code_of(raising(error)) == 2
    assert capsys.readouterr().err == "imagenet-swa: error [rank 5]: cannot decode the image\n"


@pytest.mark.parametrize(("asked", "code"), [(False, 1), (True, 85)])
def test_lost_others(alone: StopRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: bool, code: int):
    """A rank whose others are gone failed, unless all were asked to stop; who watches is told whose fault it was."""
    monkeypatch.setenv("IMAGENET_SWA_STATUS", str(tmp_path))
    if asked:
        alone._by_signal = "SIGTERM"
    assert exit_code_of(raising(LostOthersError("rank 1 is gone"))) == code
    told = json.loads((tmp_path / "rank-0.json").read_text())
    assert told["code"] == code and "rank 1 is gone" in told["message"]
    assert told["lost_others"] == (not asked)
