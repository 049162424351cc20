"""One job per run folder: laws with real processes that are killed, suspended, and started at once."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagenet_swa import lock
from imagenet_swa.config import InputError
from imagenet_swa.lock import RunLock

BEAT = 0.2

# A job: says "held" or why not, then "lost" if so; ends at the end of its input, by releasing. PLACE is the machine that it
# believes to be on; FLOCK is `works`, `local` (another machine's locks are not seen) or `missing` in its file system.
JOB = """
import errno, fcntl, os, sys
from pathlib import Path
from imagenet_swa import lock
def missing(*_): raise OSError(errno.ENOLCK, "No locks available")
if os.environ.get("PLACE"): lock._place = lambda: os.environ["PLACE"]
if os.environ.get("FLOCK") == "local": fcntl.flock = lambda *_: None
if os.environ.get("FLOCK") == "missing": fcntl.flock = missing
def say(line): print(line, flush=True)
def lost(line): say("lost: " + line)
run_lock = lock.RunLock(Path(sys.argv[1]), heartbeat_seconds=float(sys.argv[2]), on_lost=lost, say=say)
try:
    run_lock.acquire()
except lock.InputError as error:
    say(error)
    sys.exit(2)
say("held")
sys.stdin.read()
run_lock.release()
"""


class Job:
    """A process that takes the lock of a folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(folder), str(BEAT)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: int) -> None:
        """A signal."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> str:
        """Let it release the lock; the rest of what it says."""
        return self.process.communicate(timeout=30)[0].strip()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs on the test's folder, and kills those that are left."""
    with ExitStack() as jobs:

        def start_job(**environment: str) -> Job:
            job = Job(tmp_path, **environment)
            jobs.callback(job.process.wait)
            jobs.callback(job.process.kill)
            return job

        yield start_job


class Fresh:
    """A lock of this process that writes down what it says and that it lost the folder."""

    def __init__(self, folder: Path, beat: float = BEAT) -> None:
        self.said: list[str] = []
        self.lost: list[str] = []
        self.lock = RunLock(folder, heartbeat_seconds=beat, on_lost=self.lost.append, say=self.said.append)


def in_file(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.lock").read_text())


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------------------- one machine


def test_a_second_job_is_refused(tmp_path: Path, start: Callable[..., Job]):
    """It hears at once and in one line who holds the folder, since when, and what to do; the holder is left alone."""
    job = start(SLURM_JOB_ID="4711")
    assert job.line() == "held"
    second = Fresh(tmp_path)
    message = one_line(second.lock.acquire)
    holder = in_file(tmp_path)
    for part in (f"process {job.process.pid} on {os.uname().nodename}", "job 4711", holder["since"], str(tmp_path), "delete"):
        assert str(part) in message
    assert not second.said
    assert job.end() == ""
    with second.lock:
        assert second.lock.is_held()


def test_a_killed_job_is_followed_at_once(tmp_path: Path, start: Callable[..., Job]):
    """kill -9, and the next job has the folder without watching anything, again and again."""
    for _ in range(3):
        job = start()
        assert job.line() == "held"  # not that it watches
        job.send(signal.SIGKILL)
    following = Fresh(tmp_path)
    following.lock.acquire()
    assert not following.said
    following.lock.release()


def test_release_leaves_nothing(tmp_path: Path):
    """No file, no thread, no open file stay; the same lock can be taken again, and released twice."""
    descriptors = os.listdir("/proc/self/fd")
    mine = Fresh(tmp_path)
    for _ in range(2):
        with mine.lock:
            assert os.listdir(tmp_path) == ["run.lock"]
            with pytest.raises(InputError):
                Fresh(tmp_path).lock.acquire()
        assert not os.listdir(tmp_path)
        assert not mine.lock.is_held()
        mine.lock.release()
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_suspended_job_of_this_machine_keeps_its_lock(tmp_path: Path, start: Callable[..., Job]):
    """The system knows that it lives, however long its heartbeat stands still."""
    job = start()
    assert job.line() == "held"
    job.send(signal.SIGSTOP)
    time.sleep(2 * BEAT)
    assert f"process {job.process.pid}" in one_line(Fresh(tmp_path).lock.acquire)
    job.send(signal.SIGCONT)
    assert job.end() == ""


def test_a_fork_does_not_inherit_the_lock(tmp_path: Path):
    """A loader's worker that outlives its killed job does not hold the folder, nor does it release it while the job lives."""
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        mine = Fresh(tmp_path)
        mine.lock.acquire()
        worker = os.fork()
        if worker == 0:
            mine.lock.release()
            os.write(tell, f"{os.getpid()}\n".encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(ready, 20))
    try:
        assert f"process {holder} " in one_line(Fresh(tmp_path).lock.acquire)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        following = Fresh(tmp_path)
        with following.lock:
            assert not following.said
            os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ other machines


@pytest.mark.parametrize("flock", ["works", "local", "missing"])
def test_a_living_job_elsewhere_is_not_followed(tmp_path: Path, start: Callable[..., Job], flock: str):
    """Whatever flock is worth between the machines: a heartbeat refuses the second job and names the first."""
    job = start(PLACE="node 7", FLOCK=flock)
    assert job.line() == "held"
    second = Fresh(tmp_path)
    assert f"process {job.process.pid}" in one_line(second.lock.acquire)
    assert "watching it for up to" in second.said[0]
    assert len(second.said) == 1
    assert job.end() == ""


@pytest.mark.parametrize("flock", ["works", "missing"])
def test_a_dead_job_elsewhere_is_followed_after_a_while(tmp_path: Path, start: Callable[..., Job], flock: str):
    """Three heartbeats of silence, no fewer, and the folder changes hands with a line that says so."""
    job = start(PLACE="node 7", FLOCK=flock)
    assert job.line() == "held"
    job.send(signal.SIGKILL)
    following, begin = Fresh(tmp_path), time.monotonic()
    following.lock.acquire()
    assert time.monotonic() - begin > 3 * BEAT
    assert f"no sign of life from process {job.process.pid}" in following.said[1]
    assert in_file(tmp_path)["pid"] == os.getpid()
    following.lock.release()
    assert not os.listdir(tmp_path)


def test_a_dead_job_without_flock_is_followed_at_once_on_its_machine(start: Callable[..., Job]):
    """Where the file system has no locks, a process number that is gone tells as much, on the machine that gave it."""
    job = start(FLOCK="missing")
    assert job.line() == "held"
    job.send(signal.SIGKILL)
    following = start(FLOCK="missing")
    assert following.line() == "held"
    assert "in use by process" in start(FLOCK="missing").end()


def test_a_suspended_job_elsewhere_notices_that_it_lost(tmp_path: Path, start: Callable[..., Job]):
    """A lock that outlives its machine is replaced after six heartbeats of silence; whoever then wakes up says that it lost,
    and neither its heartbeat nor its release touches the new lock.
    """
    job = start(PLACE="node 7")
    assert job.line() == "held"
    job.send(signal.SIGSTOP)
    following, begin = Fresh(tmp_path), time.monotonic()
    following.lock.acquire()
    assert time.monotonic() - begin > 6 * BEAT
    job.send(signal.SIGCONT)
    assert job.line().startswith(f"lost: the run folder {tmp_path} was taken over by process {os.getpid()}")
    time.sleep(3 * BEAT)
    assert job.end() == ""  # once is enough
    assert in_file(tmp_path)["pid"] == os.getpid()
    assert following.lock.is_held()
    assert not following.lost
    following.lock.release()


def test_of_two_machines_that_take_over_at_the_same_moment_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job whose file was replaced before its first heartbeat does not believe that it holds the folder."""
    (tmp_path / "run.lock").write_text(json.dumps({"token": "dead", "place": "node 7", "beat": 3}))
    winner = json.dumps({"token": "winner", "place": "node 8", "pid": 12, "beat": 0})
    replace, first = Path.replace, []

    def lose(partial: Path, path: Path) -> None:
        replace(partial, path)
        if not first:
            first.append(path)
            path.unlink()
            path.write_text(winner)

    monkeypatch.setattr(Path, "replace", lose)
    loser = Fresh(tmp_path, beat=0.05)
    loser.lock.acquire()  # the winner died
    assert ["watching" in line for line in loser.said] == [True, False, True, False]
    assert "process 12" in loser.said[3]
    loser.lock.release()


# --------------------------------------------------------------------------------------------------------------- races


@pytest.mark.parametrize("ends", [False, True])
def test_a_lock_that_changes_while_it_is_opened(
    tmp_path: Path, start: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, ends: bool
):
    """Whoever locks a file that another job has replaced in the meantime, or deleted at its end, looks again."""
    (tmp_path / "run.lock").write_text(json.dumps(lock._this_process()))
    flock, others = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not others:
            others.append(start())
            assert others[0].line() == "held"
            if ends:
                others[0].end()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    mine = Fresh(tmp_path)
    if ends:
        with mine.lock:
            assert in_file(tmp_path)["pid"] == os.getpid()
    else:
        message = one_line(mine.lock.acquire)
        assert f"process {others[0].process.pid} " in message
    assert not mine.said


def attempt(folder: Path, seconds: float, *, die: bool) -> int:
    """One job that holds the folder for a moment: exit code 0 held, 2 refused, 3 when another one held it too, 9 died."""
    mine = RunLock(folder, heartbeat_seconds=0.05, on_lost=lambda _: os._exit(4), say=lambda _: None)
    try:
        mine.acquire()
    except InputError:
        return 2
    witness = folder / "holders" / str(os.getpid())
    witness.touch()
    for other in os.listdir(witness.parent):
        if other != witness.name and (witness.parent / other).exists():
            return 3
    time.sleep(seconds)
    witness.unlink()
    if die:
        return 9
    mine.release()
    return 0


def attempts(folder: Path, number: int, seed: int, place: str) -> dict[int, int]:
    """So many jobs one after the other, each in a process of its own, some of which die; how often they ended in which way."""
    lock._place = lambda: place
    counts: dict[int, int] = {}
    for turn in range(number):
        process = os.fork()
        if process == 0:
            code = 5
            with suppress(Exception):
                code = attempt(folder, 0.001 * ((turn * 7 + seed) % 5), die=(turn + seed) % 4 == 0)
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        counts[code] = counts.get(code, 0) + 1
    return counts


def at_once(folder: Path, places: list[str], number: int) -> list[dict[int, int]]:
    """`attempts` of as many processes at the same time as there are places."""
    (folder / "holders").mkdir()
    processes = []
    for seed, place in enumerate(places):
        process = os.fork()
        if process == 0:
            with suppress(BaseException):
                (folder.parent / f"{folder.name}-{seed}").write_text(repr(attempts(folder, number, seed, place)))
            os._exit(0)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
    return [eval((folder.parent / f"{folder.name}-{seed}").read_text()) for seed in range(len(places))]


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a disk and in shared memory."""
    where = Path("/dev/shm") if request.param == "tmpfs" else tmp_path
    path = where / f"swa-lock-{os.getpid()}" / "run"
    path.mkdir(parents=True)
    yield path
    for file in sorted(path.parent.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.parent.rmdir()


def test_never_two_holders(folder: Path):
    """Three starters at once, again and again, some of which die with the lock: the folder never has two of them."""
    counts = at_once(folder, ["here"] * 3, 40)
    total = {code: sum(count.get(code, 0) for count in counts) for code in (0, 2, 9)}
    assert sum(total.values()) == 3 * 40, f"3: two holders, 4: lost, 5: failed: {counts}"
    assert min(total[0], total[9]) > 3
    assert total[2] > 3, "they never met"


def test_never_two_holders_on_two_machines(tmp_path: Path):
    """The same between machines that see each other's locks, where a dead job's folder is taken over after a watch."""
    (tmp_path / "run").mkdir()
    counts = at_once(tmp_path / "run", ["node 7", "node 8"], 20)
    total = {code: sum(count.get(code, 0) for count in counts) for code in (0, 2, 9)}
    assert sum(total.values()) == 2 * 20, f"3: two holders, 4: lost, 5: failed: {counts}"
    assert min(total[0], total[2], total[9]) > 0, counts


def test_of_all_that_start_at_once_without_flock_one_begins(start: Callable[..., Job]):
    """Where the file system has no locks, of three jobs on three machines one gets a new folder and two are refused."""
    jobs = [start(PLACE=f"node {number}", FLOCK="missing") for number in range(3)]
    last = []
    for job in jobs:
        line = job.line()
        last.append(job.line() if "watching" in line else line)
    assert last.count("held") == 1, last
    assert sum("in use by" in line for line in last) == 2


# ---------------------------------------------------------------------------------------------------------- bad things


def fails(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["pwrite", "fsync", "open"])
def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """A heartbeat that cannot be written (or whose folder cannot be read) is left out; it goes on when there is room again."""
    mine = Fresh(tmp_path, beat=0.02)
    with mine.lock:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            time.sleep(0.1)
            assert mine.lock.is_held()
        before = in_file(tmp_path)["beat"]
        wait_until(lambda: in_file(tmp_path)["beat"] != before)
        assert not mine.lost


def test_a_real_full_disk(tmp_path: Path):
    """Without a free block the lock is refused with its reason, and leaves nothing; one taken before lives on."""
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount")
    try:
        mine = Fresh(tmp_path, beat=0.02)
        with mine.lock, (tmp_path / "rest").open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            before = in_file(tmp_path)["beat"]
            wait_until(lambda: in_file(tmp_path)["beat"] != before)
        (tmp_path / "more").write_bytes(bytes(4096))
        assert "No space left on device" in one_line(Fresh(tmp_path).lock.acquire)
        assert sorted(os.listdir(tmp_path)) == ["more", "rest"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_deleted_file_comes_back(tmp_path: Path):
    """A holder whose file was deleted writes it again, locked, before another job can believe that the folder is free."""
    mine = Fresh(tmp_path, beat=0.02)
    with mine.lock:
        for _ in range(3):
            (tmp_path / "run.lock").unlink()
            wait_until((tmp_path / "run.lock").exists)
            assert f"process {os.getpid()}" in one_line(Fresh(tmp_path).lock.acquire)
        assert not mine.lost
    assert not os.listdir(tmp_path)


SOMETHING_LIKE_A_LOCK = st.dictionaries(
    st.sampled_from(["token", "place", "pid", "host", "job", "since", "beat"]),
    st.none() | st.integers() | st.text() | st.floats() | st.lists(st.integers(), max_size=2),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=50) | SOMETHING_LIKE_A_LOCK.map(lambda holder: json.dumps(holder).encode()))
def test_whatever_stands_in_the_file(tmp_path: Path, content: bytes):
    """A file that no job holds is taken over, whatever it says, with lines of printable text."""
    (tmp_path / "run.lock").write_bytes(content)
    mine = Fresh(tmp_path, beat=0.001)
    with mine.lock:
        assert in_file(tmp_path)["pid"] == os.getpid()
    assert all(line.isprintable() for line in mine.said)
    assert not os.listdir(tmp_path)


def test_a_huge_or_deep_file(tmp_path: Path):
    """A gigabyte of zeros, and brackets without end, are taken over like any other file."""
    for content in (b"", b"[" * 100_000, b'{"token": "' + b"9" * 5000):
        with (tmp_path / "run.lock").open("wb") as file:
            file.write(content)
            file.truncate(2**30)
        with Fresh(tmp_path, beat=0.001).lock:
            assert (tmp_path / "run.lock").stat().st_size < 1000


def test_a_file_that_is_held_but_says_nothing(tmp_path: Path):
    """A job that could not write down who it is still holds the folder."""
    with (tmp_path / "run.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "a job that did not write down who it is" in one_line(Fresh(tmp_path, beat=0.01).lock.acquire)


def test_somebody_elses_file_is_not_written_into(tmp_path: Path):
    """A link to another file is replaced, not followed."""
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "run.lock").symlink_to(tmp_path / "thesis")
    with Fresh(tmp_path, beat=0.001).lock:
        assert not (tmp_path / "run.lock").is_symlink()
    assert (tmp_path / "thesis").read_text() == "years of work"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, ""),
        (lambda path: path.symlink_to("nowhere"), "it keeps changing"),
        (lambda path: path.parent.rmdir(), "No such file"),
    ],
)
def test_what_cannot_be_a_lock_file(tmp_path: Path, make: Callable[[Path], object], why: str):
    """A folder, a pipe, a link to nowhere, a folder that is gone: one line, and no waiting for ever."""
    run = tmp_path / "run"
    run.mkdir()
    make(run / "run.lock")
    descriptors = os.listdir("/proc/self/fd")
    message = one_line(Fresh(run, beat=0.001).lock.acquire)
    assert why in message
    assert str(run) in message
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_file_that_became_a_pipe(tmp_path: Path):
    """Neither the heartbeat nor the release waits for somebody to write into it."""
    mine = Fresh(tmp_path, beat=0.01)
    with mine.lock:
        (tmp_path / "run.lock").unlink()
        with suppress(FileExistsError):  # the heartbeat was faster
            os.mkfifo(tmp_path / "run.lock")
        time.sleep(0.05)
        assert mine.lock.is_held()


def test_what_a_killed_taker_left_is_removed(tmp_path: Path):
    """The new lock that a job was about to put in place when it was killed does not stay for ever."""
    (tmp_path / "run.lock.0123456789abcdef").write_text("{}")
    with Fresh(tmp_path).lock:
        assert os.listdir(tmp_path) == ["run.lock"]
