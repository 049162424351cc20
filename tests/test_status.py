"""What a rank tells its launcher: files that are whole at every moment, and calls that never disturb a run."""

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imagenet_swa import status


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The launcher's folder, and this process as rank 3, second of two on its machine, in its second start."""
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(status.VARIABLE, str(tmp_path))
    return tmp_path


def told(folder: Path, name: str = "rank-3.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_a_rank_tells_its_life(folder: Path) -> None:
    """The file names the process from its beginning, then its phase, then its end; `time` is that of the last change."""
    before = time.time()
    status.begin()
    first = told(folder)
    facts = {"pid": os.getpid(), "rank": 3, "local_rank": 1, "local_world_size": 2, "host": socket.gethostname(), "restart": 1}
    life = {"phase": "starting", "code": None, "message": None, "lost_others": False, "restart_may_help": False}
    assert first == {**facts, **life, "time": first["time"]}
    assert before <= first["time"] <= time.time()
    status.phase("training")
    assert told(folder) == {**first, "phase": "training", "time": told(folder)["time"]}
    status.end(1, "no more", lost_others=True)
    last = told(folder)
    assert last == {**first, "phase": "training", "code": 1, "message": "no more", "lost_others": True, "time": last["time"]}
    assert first["time"] < last["time"]
    assert sorted(path.name for path in folder.iterdir()) == ["rank-3.json"]


def test_alone_without_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable nothing is written and nobody watches; with it alone, a process is rank 0 of one."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", status.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    status.begin()
    status.phase("training")
    status.writing(True)
    status.end(0, None)
    assert not status.is_watched()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(status.VARIABLE, str(tmp_path))
    status.begin()
    assert status.is_watched()
    record = told(tmp_path, "rank-0.json")
    assert [record[key] for key in ("rank", "local_rank", "local_world_size", "restart")] == [0, 0, 1, 0]


def test_an_earlier_start_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank said before it was restarted stays readable, however soon the restart comes."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    status.begin()
    status.end(2, "bad input")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status.begin()
    assert (told(folder)["restart"], told(folder)["code"]) == (1, None)
    earlier = told(folder, "before-restart-1-rank-3.json")
    assert (earlier["restart"], earlier["code"], earlier["message"]) == (0, 2, "bad input")


def test_the_mark_of_the_writer(folder: Path) -> None:
    """The file `writing` is there while files are written, however often that is said."""
    for is_writing in (True, True, False, False, True):
        status.writing(is_writing)
        assert (folder / "writing").exists() == is_writing


def test_who_asks_to_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TERM comes from the launcher itself unless its supervisor has left the mark of a request; without a supervisor it never
    does.
    """
    assert status.by_launcher()
    (folder / "asked").touch()
    assert not status.by_launcher()
    monkeypatch.delenv(status.VARIABLE)
    assert not status.by_launcher()


@contextmanager
def no_space() -> Iterator[None]:
    """No file of this process can grow."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_disturbs_no_run(folder: Path) -> None:
    """Where nothing can be written, nothing half-written takes the place of the record, and no call fails."""
    with no_space():
        with pytest.raises(OSError, match="large"):
            (folder / "probe").write_text("x")
        status.begin()
        status.phase("training")
        status.writing(True)
        status.end(0, None)
    assert not (folder / "rank-3.json").exists()


@pytest.mark.parametrize("how", ["gone", "a file"])
def test_a_lost_folder_disturbs_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A folder that has gone, or that is none, ends no run; neither do odd numbers in the environment nor odd messages."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    monkeypatch.setenv(status.VARIABLE, str(folder / "not there"))
    if how == "a file":
        (folder / "not there").write_text("")
    status.begin()
    status.phase("training")
    status.writing(True)
    status.writing(False)
    status.end(1, "text with a lone surrogate \ud800")
    assert not list(folder.glob("rank-*"))


def test_a_reader_never_sees_half_a_file(folder: Path) -> None:
    """Whoever reads while a rank writes finds the old record or the new one."""
    status.begin()
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            status.phase("x" * (number % 7 * 1000))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(len(told(folder)["phase"]))
    writer.join()
    assert len(seen) > 1
