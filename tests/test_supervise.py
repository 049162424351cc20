"""launch/supervise.py over real processes: signals, exit codes, last lines, and nothing left behind.

Most tests use stand-ins for the launcher and its ranks; the last ones the real `accelerate launch` with stand-in ranks.
"""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROJECT
from launched import LAUNCHER, RANK, Launched, processes_with, wait_until

SUPERVISE = [sys.executable, PROJECT / "launch" / "supervise.py"]
Start = Callable[..., Launched]
Words = tuple[str, ...]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Supervise the stand-in launcher with ranks of these behaviours."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(*behaviours: str, options: Words = (), launcher: Words = (), before: Words = ()) -> Launched:
        command = launcher or (sys.executable, "-c", LAUNCHER, str(len(behaviours)))
        started.append(Launched(tmp_path, [*before, *SUPERVISE, *options, *command, tmp_path / "rank.py", *behaviours]))
        return started[-1]

    yield start
    for launched in started:
        for pid in processes_with(launched.marker):
            os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


# --------------------------------------------------------------------------------------------- exit code and last line

TEXT = "imagenet-swa: error: killed or crashed without a word: rank 1 (process "


@pytest.mark.parametrize(
    ("behaviours", "code", "last"),
    [
        (["end|0|", "end|0|"], 0, None),
        (["end|0|"], 0, None),
        (["end|2|imagenet-swa: error: no such file"], 2, "imagenet-swa: error: no such file"),
        (["end|0|", "end|2|bad input"], 2, "imagenet-swa: error [rank 1]: bad input"),
        (["lost|rank 1 has gone", "end|1|the disk is full"], 1, "imagenet-swa: error [rank 1]: the disk is full"),
        (["lost|a", "lost|rank 7 has gone"], 1, "imagenet-swa: error [rank "),
        (["lost|rank 1 has gone", "crash"], 1, TEXT),
        (["end|0|", "crash"], 1, TEXT),
        (["end|85|stopped by SIGTERM", "crash"], 1, TEXT),
        (["end|85|stopped by SIGTERM", "end|1|out of memory"], 1, "imagenet-swa: error [rank 1]: out of memory"),
        (["lost|rank 1 has gone", "unborn"], 1, "imagenet-swa: error: killed or crashed without a word: 1 before they began"),
        (["unborn"], 1, "imagenet-swa: error: the launcher ended with code 1 before any rank began; see above"),
        (["end|85|imagenet-swa: stopped by USR1", "end|85|"], 85, "imagenet-swa: stopped by USR1; the same command goes on"),
        (["end|85|", "end|85|"], 85, "imagenet-swa: stopped as asked; the same command goes on"),
        (["end|130|interrupted", "end|85|"], 130, "imagenet-swa: error [rank 0]: interrupted"),
    ],
    ids=str,
)
def test_the_end_is_the_ranks(start: Start, behaviours: list[str], code: int, last: str | None) -> None:
    """Whatever the launcher makes of it, exit code and last line are those of the first rank that failed for itself."""
    found, screen = start(*behaviours).finish()
    assert found == code, screen
    assert screen == [] if last is None else screen[-1].startswith(last)
    assert sum("stopped by USR1" in line or "the disk is full" in line for line in screen) <= 1


def test_the_first_failure_counts(start: Start) -> None:
    """Of two ranks that fail for themselves the earlier one is the last line."""
    code, screen = start("end|1|second", "end|2|first").finish()
    first, second = ("second", "first") if "second" in screen[-1] else ("first", "second")
    assert (code, second) in ((1, "first"), (2, "second"))
    assert not any(second in line for line in screen), first


@pytest.mark.parametrize("command", [["false"], ["sh", "-c", "kill -9 $$"], ["sh", "-c", "exit 2"], ["true"]], ids=str)
def test_a_command_without_ranks(tmp_path: Path, command: list[str]) -> None:
    """A command that starts no rank keeps its exit code; death by a signal is 1."""
    code, screen = Launched(tmp_path, [*SUPERVISE, *command]).finish()
    assert code == {"false": 1, "true": 0}.get(command[0], 2 if "exit" in command[-1] else 1)
    assert len(screen) == (code != 0)


@pytest.mark.parametrize(
    ("words", "code", "text"), [([], 2, "usage"), (["--restarts"], 2, "usage"), (["no-such-program"], 1, "cannot run")]
)
def test_what_cannot_be_run(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    """A command line without a command, or with one that is not there, is refused in one line."""
    found, screen = Launched(tmp_path, [*SUPERVISE, *words]).finish()
    assert found == code
    assert len(screen) == 1
    assert text in screen[0]


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once(start: Start, number: signal.Signals) -> None:
    """A signal for the supervisor arrives at each rank once (HUP as TERM), and all ends with 85."""
    launched = start("wait", "wait")
    launched.wait_for("begun 0", 0, 1)
    launched.send(number)
    code, screen = launched.finish()
    name = "SIGTERM" if number == signal.SIGHUP else number.name
    assert (code, screen[-1]) == (85, f"imagenet-swa: stopped by {name}; the same command goes on")
    assert launched.notes(0) == launched.notes(1) == ["begun 0", name]


def test_ranks_know_who_asks(start: Start) -> None:
    """TERM from the launcher is told from one that the supervisor passes on; a rank that was asked to stop and lost another that
    has stopped already counts as stopped.
    """
    launched = start("asked", "wait")
    launched.wait_for("begun 0", 0, 1)
    (pid,) = [pid for pid in processes_with("RANK=0") if pid in processes_with(launched.marker)]
    os.kill(pid, signal.SIGTERM)
    launched.wait_for("by launcher: True", 0)
    launched.send(signal.SIGTERM)
    launched.wait_for("by launcher: False", 0)
    code, screen = launched.finish()
    assert (code, screen[-1]) == (85, "imagenet-swa: stopped by SIGTERM; the same command goes on")


def test_a_signal_waits_for_ranks_that_cannot_hear_yet(start: Start) -> None:
    """A signal that comes before a rank has handlers neither kills it nor is lost."""
    launched = start("late", "deaf first")
    launched.wait_for("up", 0, 1)
    launched.send(signal.SIGTERM)
    assert launched.finish()[0] == 85
    assert launched.notes(0) == launched.notes(1) == ["up", "begun 0", "SIGTERM"]


@pytest.mark.parametrize("behaviour", [[], ["lost|rank 7 has gone"]], ids=str)
def test_a_signal_that_no_rank_hears(start: Start, behaviour: list[str]) -> None:
    """Where no rank is alive, because the launcher waits for other machines, a stop ends it within seconds, with 85."""
    launcher = ("sh", "-c", 'if [ $# -gt 1 ]; then "$0" "$@"; fi; sleep 60', sys.executable)
    launched = start(*behaviour, launcher=launcher)
    if behaviour:
        launched.wait_for("begun 0", 0)
    # The supervisor, its guard, the shell and its sleep.
    wait_until(lambda: len(processes_with(launched.marker)) == 4, "the launcher's waiting")
    launched.send(signal.SIGUSR1)
    code, screen = launched.finish(20)
    assert (code, screen) == (85, ["imagenet-swa: stopped as asked, with no rank running; the same command goes on"])


def test_a_launcher_without_ranks_is_ended(start: Start) -> None:
    """--idle ends a launcher whose ranks have ended and that starts no others, with their code and message."""
    launcher = ("sh", "-c", '"$0" "$@"; sleep 60', sys.executable)
    code, screen = start("lost|rank 7 has gone", options=("--idle", "1"), launcher=launcher).finish(20)
    assert (code, screen) == (1, ["imagenet-swa: error [rank 0]: rank 7 has gone"])


def test_all_of_a_job_may_be_signalled(start: Start) -> None:
    """A scheduler that sends TERM to every process of a job, as SLURM does, stops the ranks as one that tells the supervisor."""
    launched = start("wait", "wait")
    launched.wait_for("begun 0", 0, 1)
    for pid in processes_with(launched.marker):
        os.kill(pid, signal.SIGTERM)
    code, screen = launched.finish()
    assert (code, screen[-1]) == (85, "imagenet-swa: stopped by SIGTERM; the same command goes on")


def test_a_second_interrupt_ends_ranks_that_do_not_listen(start: Start) -> None:
    """Two INT half a second apart are both passed on, and after a few seconds nothing is left: 130. TERM has no such limit."""
    launched = start("deaf", "deaf")
    launched.wait_for("begun 0", 0, 1)
    launched.send(signal.SIGTERM)
    launched.send(signal.SIGINT)
    launched.send(signal.SIGINT)  # of the same press
    time.sleep(0.6)
    begin = time.monotonic()
    launched.send(signal.SIGINT)
    code, screen = launched.finish(20)
    assert time.monotonic() - begin > 4
    assert code == 130
    assert "interrupted" in screen[-1]
    assert sorted(launched.notes(0)) == sorted(launched.notes(1)) == ["SIGINT", "SIGINT", "SIGTERM", "begun 0"]


def test_ctrl_c_at_a_terminal_arrives_once(tmp_path: Path) -> None:
    """A terminal's Ctrl-C, which goes to all processes in its foreground, reaches a rank once."""
    (tmp_path / "rank.py").write_text(RANK)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*SUPERVISE, sys.executable, tmp_path / "rank.py", "wait"],
        env=os.environ | {"NOTES": str(tmp_path), "PYTHONPATH": str(PROJECT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    notes = tmp_path / "note-0"
    wait_until(lambda: notes.exists() and "begun 0" in notes.read_text(), "the rank's beginning")
    os.write(ours, b"\x03")
    assert process.wait(timeout=30) == 85
    assert notes.read_text().splitlines() == ["begun 0", "SIGINT"]
    assert b"stopped by SIGINT" in os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)


def test_what_was_ignored_stays_ignored(start: Start) -> None:
    """HUP and INT that were ignored before, as by nohup and for a shell's background jobs, do not stop a run; TERM does."""
    launched = start("wait", before=("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh"))
    launched.wait_for("begun 0", 0)
    launched.send(signal.SIGHUP)
    launched.send(signal.SIGINT)
    time.sleep(0.3)
    launched.send(signal.SIGTERM)
    assert launched.finish()[0] == 85
    assert launched.notes() == ["begun 0", "SIGTERM"]


def test_nothing_outlives_a_killed_supervisor(start: Start) -> None:
    """KILL to the supervisor, which nobody can pass on, ends launcher and ranks and removes the folder all the same."""
    launched = start("deaf", "deaf")
    launched.wait_for("begun 0", 0, 1)
    launched.send(signal.SIGKILL)
    assert launched.finish(20)[0] == -signal.SIGKILL


def test_the_next_start_tidies_up(start: Start, tmp_path: Path) -> None:
    """Where even its guard was killed, the next supervisor ends the ranks and removes the folder, but not those of the living."""
    living, dead = start("wait"), start("late")
    living.wait_for("begun 0", 0)
    dead.wait_for("up", 0)
    folders = {path.name for path in (tmp_path / "tmp").iterdir()}
    (guard,) = [
        pid for pid in processes_with(dead.marker) if parent_of(pid) == dead.process.pid and "supervise" in command_of(pid)
    ]
    os.kill(guard, signal.SIGKILL)
    dead.send(signal.SIGKILL)
    dead.process.wait(10)
    assert processes_with(dead.marker)
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == folders
    assert start("end|0|").process.wait(30) == 0
    assert processes_with(dead.marker) == []
    assert len(folders) == 2
    living.send(signal.SIGTERM)
    assert living.finish()[0] == 85


def test_nothing_outlives_a_killed_launcher(start: Start) -> None:
    """Ranks that their launcher left behind are ended, and the end is a failure."""
    launched = start(
        "deaf", "deaf", launcher=("sh", "-c", '"$0" "$@" & sleep 2; kill -9 $$', sys.executable, "-c", LAUNCHER, "2")
    )
    launched.wait_for("begun 0", 0, 1)
    code, screen = launched.finish(20)
    assert code == 1
    assert screen[-1].startswith("imagenet-swa: error: killed or crashed without a word: rank 0 (process ")


# --------------------------------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize(
    ("behaviour", "starts", "code"),
    [
        ("crash once", 2, 0),
        ("crash", 3, 1),
        ("end|1|a fault of the GPU|again", 3, 1),
        ("end|1|the same each time", 1, 1),
        ("end|2|", 1, 2),
    ],
)
def test_a_process_alone_is_started_again(start: Start, behaviour: str, starts: int, code: int) -> None:
    """--restarts starts again after a crash, as often as it says, but not after errors that would come again."""
    launched = start(behaviour, options=("--restarts", "2"), launcher=(sys.executable,))
    found, screen = launched.finish()
    assert found == code
    assert launched.notes() == [f"begun {restart}" for restart in range(starts)]
    again = [line for line in screen if "starting again" in line]
    assert again == [f"imagenet-swa: starting again from the last checkpoint, {n + 1} of 2" for n in range(starts - 1)]
    assert code == 0 or screen[-1].startswith("imagenet-swa: error")


def test_a_stop_is_no_reason_to_start_again(start: Start) -> None:
    """After a stop that was asked for, --restarts starts nothing."""
    launched = start("wait", options=("--restarts", "2"), launcher=(sys.executable,))
    launched.wait_for("begun 0", 0)
    launched.send(signal.SIGUSR1)
    assert launched.finish()[0] == 85
    assert launched.notes() == ["begun 0", "SIGUSR1"]


# Like accelerate's with --max_restarts 2, but it waits before each restart.
RESTARTING = """
import os, subprocess, sys, time
for restart in range(3):
    code = subprocess.call([sys.executable, *sys.argv[2:]], env=os.environ | {"TORCHELASTIC_RESTART_COUNT": str(restart)})
    if code == 0:
        break
    time.sleep(float(sys.argv[1]))
sys.exit(code != 0)
"""


@pytest.mark.parametrize("pause", ["0", "1"])
@pytest.mark.parametrize(
    ("behaviour", "code", "starts"),
    [("end|2|bad input", 2, 1), ("end|1|full disk", 1, 1), ("end|85|", 85, 1), ("end|130|", 130, 1), ("crash once", 0, 2)],
)
def test_useless_restarts_are_prevented(start: Start, pause: str, behaviour: str, code: int, starts: int) -> None:
    """A launcher that restarts after any failure is ended after one that would come again, or a stop; what was said before the
    restart counts, even where the restart was quicker.
    """
    launched = start(behaviour, launcher=(sys.executable, "-c", RESTARTING, pause))
    found, screen = launched.finish()
    assert found == code, screen
    assert code == 0 or ("bad input" in screen[-1], "full disk" in screen[-1]) == (code == 2, code == 1)
    assert pause == "0" or launched.notes() == [f"begun {restart}" for restart in range(starts)]


# ------------------------------------------------------------------------------------------- accelerate's own launcher


@pytest.fixture
def accelerate(start: Start) -> Start:
    """Supervise `accelerate launch` with stand-in ranks of these behaviours."""

    def start_accelerate(*behaviours: str, max_restarts: int = 0) -> Launched:
        number = len(behaviours)
        kind = ("eight_gpus", "--main_process_port=0") if number > 1 else ("one_process", "--quiet")
        launcher = ("accelerate", "launch", f"--config_file={PROJECT}/launch/accelerate/{kind[0]}.yaml", kind[1])
        more = (f"--num_processes={number}", f"--max_restarts={max_restarts}", "--num_cpu_threads_per_process=1")
        return start(*behaviours, launcher=(*launcher, *more))

    return start_accelerate


@pytest.mark.parametrize("number", [1, 2])
def test_accelerate_stops_as_asked(accelerate: Start, number: int) -> None:
    """USR1, and TERM for all processes of the job, of which accelerate's launchers die, stop their ranks; none is restarted."""
    launched = accelerate(*["wait"] * number, max_restarts=3)
    launched.wait_for("begun 0", *range(number))
    if number == 1:
        launched.send(signal.SIGUSR1)
    else:
        for pid in processes_with(launched.marker):
            os.kill(pid, signal.SIGTERM)
    name = "SIGUSR1" if number == 1 else "SIGTERM"
    code, screen = launched.finish()
    assert (code, screen[-1]) == (85, f"imagenet-swa: stopped by {name}; the same command goes on")
    assert all(launched.notes(rank)[:2] == ["begun 0", name] for rank in range(number))
    assert not any("death signal" in line for line in screen)  # torch's agent would kill those that save for half a minute


def test_accelerate_restarts_what_crashed(accelerate: Start) -> None:
    """A killed rank brings all ranks back, once, and then all is well; that accelerate stops the others for it is no stop."""
    launched = accelerate("wait once", "crash once", max_restarts=3)
    code, screen = launched.finish()
    assert code == 0, screen
    assert launched.notes(0) == ["begun 0", "SIGTERM", "begun 1"]
    assert launched.notes(1) == ["begun 0", "begun 1"]


def test_accelerate_has_not_the_last_word(accelerate: Start) -> None:
    """With accelerate's tables above, the failing rank's own error is the last line, with its code."""
    code, screen = accelerate("wait", "end|2|bad input").finish()
    assert code == 2
    assert screen[-1] == "imagenet-swa: error [rank 1]: bad input"


def test_accelerate_dies_with_its_supervisor(accelerate: Start) -> None:
    """KILL to the supervisor ends accelerate and its ranks."""
    launched = accelerate("deaf", "deaf")
    launched.wait_for("begun 0", 0, 1)
    launched.send(signal.SIGKILL)
    assert launched.finish(20)[0] == -signal.SIGKILL
