"""What each rank knows of the others: real processes that are killed, stopped, stuck or end well, on gloo."""

import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from imagenet_swa import watch
from imagenet_swa.watch import Watch, start_watch

SILENCE = 2.0
# How long after a fault the others may take to end: what they promise, and as much again for a busy machine.
BOUND = 5 * SILENCE


def host_the_store(port_file: Path) -> None:
    """What a launcher does beside its ranks."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port_file.with_suffix(".new").write_text(str(store.port))
    port_file.with_suffix(".new").replace(port_file)
    time.sleep(100)


def be_a_rank(rank: int, world_size: int, folder: Path, role: Callable[[Watch, int], None], stuck_seconds: float | None) -> None:
    log = os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "IMAGENET_SWA_STATUS": str(folder)}
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", int((folder / "port").read_text()), is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    others = start_watch(rank=rank, world_size=world_size, silence_seconds=SILENCE, stuck_seconds=stuck_seconds)
    role(others, rank)


class Ranks:
    """Processes that play a role each, and the process that hosts their store."""

    def __init__(self, folder: Path, role: Callable[[Watch, int], None], number: int = 3, stuck: float | None = None) -> None:
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["imagenet_swa.watch"])
        self.host: BaseProcess = context.Process(target=host_the_store, args=(folder / "port",), daemon=True)
        self.host.start()
        wait_until((folder / "port").exists)
        arguments = [(rank, number, folder, role, stuck) for rank in range(number)]
        self.processes: list[BaseProcess] = [context.Process(target=be_a_rank, args=each, daemon=True) for each in arguments]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        wait_until(lambda: len(list(self.folder.glob("ready-*"))) == len(self.processes))
        time.sleep(0.5)  # a beat or two, so that all have heard of all
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.host, *self.processes):
            process.kill()
            process.join()

    def send(self, number: signal.Signals, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes_of(self, *ranks: int, seconds: float = BOUND) -> list[int | None]:
        """Exit codes of ranks that end within the time."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(timeout=max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def last_line(self, rank: int) -> str:
        return (self.folder / f"stderr-{rank}").read_text().splitlines()[-1]

    def status(self, rank: int) -> dict:
        return json.loads((self.folder / f"rank-{rank}.json").read_text())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ready(rank: int) -> None:
    (Path(os.environ["IMAGENET_SWA_STATUS"]) / f"ready-{rank}").touch()


# ------------------------------------------------------------------------------------------------------------ roles


def hang_together(others: Watch, rank: int) -> None:
    """Rank 1 never comes; the others wait where no closed connection would be noticed, as in a collective of NCCL."""
    others.note(f"training, step {12 + (rank != 1)}")
    ready(rank)
    time.sleep(100)


def reduce_without_end(others: Watch, rank: int) -> None:
    """Collectives without end; who sees one fail asks who is late."""
    for step in range(10**9):
        others.note(f"training, step {step}")
        if step == 1:
            ready(rank)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            line = others.late_ranks()
            print(f"late: {line}", file=os.fdopen(os.dup(2), "w"), flush=True)
            others.close(line, lost_others=True)
            os._exit(7)
        time.sleep(0.05)


def one_does_not_come(others: Watch, rank: int) -> None:
    """All live, rank 1 does not come to the second collective."""
    others.note("training, step 0")
    dist.all_reduce(torch.ones(1))
    ready(rank)
    if rank == 1:
        time.sleep(100)
    others.note("training, step 1")
    dist.all_reduce(torch.ones(1))


def end_well(others: Watch, rank: int) -> None:
    """Rank 1 ends long before the others."""
    ready(rank)
    if rank != 1:
        time.sleep(2.5 * SILENCE)
    others.close()
    others.close()


def one_fails(others: Watch, rank: int) -> None:
    ready(rank)
    time.sleep(1)
    if rank == 1:
        others.close("the disk burns")
        os._exit(2)
    time.sleep(100)


def hold_the_lock_of_python(others: Watch, rank: int) -> None:
    """Rank 1 computes for most of the allowed silence in a library that lets no other Python thread run."""
    ready(rank)
    time.sleep(1)
    if rank == 1:
        ctypes.PyDLL(None).usleep(int(0.6 * SILENCE * 1e6))
    time.sleep(SILENCE)
    others.close()


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_silent_rank_ends_those_that_would_wait_for_ever(folder: Path, number: signal.Signals) -> None:
    """Ranks that hang without any error end with code 1 soon after another fell silent, and say which and what it last did."""
    with Ranks(folder, hang_together) as ranks:
        ranks.send(number, 1)
        assert ranks.codes_of(0, 2) == [1, 1]
        for rank in (0, 2):
            line = ranks.last_line(rank)
            assert line.startswith(f"imagenet-swa: error [rank {rank}]: rank 1 (")
            assert "is silent for" in line
            assert "it was last at: training, step 12" in line
            assert ranks.status(rank)["code"] == 1
            assert ranks.status(rank)["lost_others"]
            assert "rank 1 (" in ranks.status(rank)["message"]


def test_a_stopped_rank_that_goes_on_finds_itself_left(folder: Path) -> None:
    """A rank that was stopped for longer than silence is allowed does not accuse the others of its own silence: it ends as the
    one they left.
    """
    with Ranks(folder, reduce_without_end) as ranks:
        ranks.send(signal.SIGSTOP, 1)
        assert ranks.codes_of(0, 2) == [1, 1]  # by the watch: gloo sees a connection that is open
        ranks.send(signal.SIGCONT, 1)
        (code,) = ranks.codes_of(1)
        assert code in (1, 7)  # by the watch, or by its collective
        assert "rank 1 (" in ranks.last_line(1)
        assert "is silent for" in ranks.last_line(1)


def test_after_a_failed_collective_the_dead_rank_is_named(folder: Path) -> None:
    """Where a collective fails at once because a rank was killed, the others learn in a few beats which one."""
    with Ranks(folder, reduce_without_end) as ranks:
        ranks.send(signal.SIGKILL, 1)
        assert ranks.codes_of(0, 2) == [7, 7]
        for rank in (0, 2):
            assert ranks.last_line(rank).startswith("late: rank 1 (")
            assert "is silent for" in ranks.last_line(rank)
            assert "training, step" in ranks.last_line(rank)


def test_a_rank_that_lives_and_does_not_come_is_named(folder: Path) -> None:
    """All end after the time that they may wait for each other; who was behind is named with what it does and where."""
    with Ranks(folder, one_does_not_come, stuck=1.0) as ranks:
        assert ranks.codes_of(0, 1, 2) == [1, 1, 1]
        for rank in range(3):
            assert "rank 1 (" in ranks.last_line(rank)
            assert "lives but is behind" in ranks.last_line(rank)
            assert "training, step 0" in ranks.last_line(rank)


def test_waiting_is_said_before_it_ends(folder: Path) -> None:
    """Long before ranks give up on one that lives, one of them says once for whom they wait."""
    with Ranks(folder, one_does_not_come, stuck=100.0) as ranks:
        wait_until(lambda: (folder / "stderr-0").stat().st_size > 0)
        time.sleep(1)
        (line,) = (folder / "stderr-0").read_text().splitlines()
        assert line.startswith("imagenet-swa: warning: rank 1 (")
        assert "lives but is behind" in line
        assert (folder / "stderr-2").read_text() == ""
        assert all(process.is_alive() for process in ranks.processes)


def test_a_rank_that_has_closed_is_not_missed(folder: Path) -> None:
    """A rank that ended well may be silent for ever; the others end well when they want to."""
    with Ranks(folder, end_well) as ranks:
        assert ranks.codes_of(0, 1, 2, seconds=20) == [0, 0, 0]
        assert not any((folder / f"stderr-{rank}").read_text() for rank in range(3))


def test_a_rank_that_failed_ends_the_others_with_its_reason(folder: Path) -> None:
    """The others give a rank's own reason as theirs, sooner than its silence would have told."""
    with Ranks(folder, one_fails) as ranks:
        assert ranks.codes_of(0, 2) == [1, 1]
        for rank in (0, 2):
            assert "rank 1 (" in ranks.last_line(rank)
            assert "failed: the disk burns" in ranks.last_line(rank)


def test_the_loss_of_the_store_ends_all(folder: Path) -> None:
    """Where the process that hosts the store is gone, all ranks end and say where they looked for it."""
    with Ranks(folder, hang_together) as ranks:
        port = (folder / "port").read_text()
        ranks.host.kill()
        assert ranks.codes_of(0, 1, 2) == [1, 1, 1]
        for rank in range(3):
            assert f"their meeting place 127.0.0.1:{port} beside rank 0" in ranks.last_line(rank)


def test_a_busy_rank_is_not_taken_for_dead(folder: Path) -> None:
    """A rank whose threads cannot run for most of the allowed silence ends nobody."""
    with Ranks(folder, hold_the_lock_of_python) as ranks:
        assert ranks.codes_of(0, 1, 2, seconds=20) == [0, 0, 0]


def test_one_rank_watches_nobody() -> None:
    """A run of one process has no watch: no threads, nobody late, nothing to close."""
    alone = start_watch(rank=0, world_size=1, silence_seconds=1)
    alone.note("training")
    assert alone.late_ranks() is None
    alone.close()


def test_time_in_which_a_process_did_not_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pause of the whole process, its own clock counts no more than the longest gap."""
    present = 100.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: present)
    clock = watch._AwakeClock(longest_gap=2.0)
    present += 1.5
    assert clock.now() == 1.5
    present += 1000.0
    assert clock.now() == 3.5


def test_many_late_ranks_make_one_line() -> None:
    """Of many ranks four are named, and the number of the others."""
    others = Watch(HashStore(), rank=3, world_size=20, silence_seconds=600, beat_seconds=0.05)
    line = others.late_ranks()
    others.close()
    assert line is not None
    assert "\n" not in line
    assert line.count("is silent for") == watch.MOST_NAMED
    assert line.endswith("; and 15 ranks more")
    assert "rank 0 (never heard of) is silent" in line
