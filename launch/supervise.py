"""Run a launcher of ranks so that signals reach them, the exit code is theirs and nothing of them stays behind.

    python launch/supervise.py [--restarts N] [--idle SECONDS] accelerate launch [FLAGS] -m imagenet_swa.train [SETTINGS]

`accelerate launch` makes 1 of every exit code but 0, dies of USR1 and USR2, and leaves its ranks running when it is killed. Here
it runs with signals ignored, which the ranks inherit until they have handlers. INT, TERM, USR1 and USR2 go on to the ranks of
this machine, HUP as TERM. The files of the ranks (imagenet_swa/status.py) give the last line and the exit code: 0 all finished;
1 or 2 the first that failed or refused its input; 85 stopped as asked; 130 a second Ctrl-C, which waits for nobody.

accelerate's --max_restarts restarts after any code but 0. After an end that would come again, or a stop, it is ended instead.
--restarts N starts the command again, as for one process, which accelerate never restarts. --idle ends a launcher that has had no
living rank for so long, as where it waits for another machine. Linux only; elsewhere COMMAND runs as it is.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

STATUS = "IMAGENET_SWA_STATUS"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
POLL_SECONDS = 0.1
ONE_PRESS_SECONDS = 0.5  # a Ctrl-C may arrive twice
GRACE_SECONDS = 5.0  # from a second Ctrl-C, or a request to stop that no rank is there to hear, to the end of what is left
LINGER_SECONDS = 60.0  # that a rank may take to end after it said that it would

Rank = dict[str, Any]  # what a rank's file says


def belongs(pid: int, folder: Path) -> bool:
    """Whether the process is alive and comes, over whatever other processes, from the launcher with this folder."""
    with suppress(OSError):
        return f"{STATUS}={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def end_processes(folder: Path) -> None:
    """Kill whatever belongs to the folder; those last that remove shared memory once its users are dead."""
    start = time.monotonic()
    while time.monotonic() < start + 10:
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if belongs(int(path.name), folder)]
        if not pids:
            return
        for pid in pids:
            with suppress(OSError):
                tidies = b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
                if not tidies or time.monotonic() > start + 2:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal by now."""
    with suppress(OSError, IndexError):
        mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(mask, 16) >> (number - 1) & 1)
    return False


def make_folder() -> tuple[Path, IO[str]]:
    """A folder and its lock, which only this process and its guard hold: where both were killed, the next start tidies up."""
    for folder in Path(tempfile.gettempdir()).glob("imagenet-swa-ranks-????????"):
        with suppress(OSError), (folder / "supervisor").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="imagenet-swa-ranks-"))
    lock = (folder / "new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "supervisor")
    return folder, lock


def start_guard(folder: Path) -> tuple[int, int]:
    """A process (id, pipe) that ends all others and removes the folder once the pipe closes, be it because we were killed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()  # out of the terminal's reach; other signals are blocked
            os.close(write_end)
            os.read(read_end, 1)
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os._exit(0)
    os.close(read_end)
    return pid, write_end


def environment_of_launcher(folder: Path, restart: int) -> dict[str, str]:
    """The environment with the ranks' folder, where temporary files go too: torch's launcher leaves some behind."""
    (folder / "tmp").mkdir(exist_ok=True)
    compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"}  # stays for the next run
    ours = {STATUS: str(folder), "TMPDIR": str(folder / "tmp"), "TORCHELASTIC_RESTART_COUNT": str(restart)}
    # torch's agent would handle TERM, and kill ranks that still save after half a minute. It wants one name at least.
    return compiled | dict(os.environ) | ours | {"PET_SIGNALS_TO_HANDLE": "SIGQUIT"}


def ignore_signals() -> None:
    """In the launcher, before it starts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def is_final(rank: Rank) -> bool:
    """Whether the rank failed in a way that a restart would repeat."""
    return rank["code"] not in (None, 0, 85) and not rank["lost_others"] and not rank["restart_may_help"]


def decides(ranks: list[Rank]) -> bool:
    """Whether a restart of all would be useless. The launcher itself asks ranks to stop where one has died: 85 of all counts."""
    codes = {rank["code"] for rank in ranks}
    return any(map(is_final, ranks)) or (85 in codes and codes <= {0, 85} and len(ranks) == ranks[0]["local_world_size"])


def read_ranks(folder: Path) -> list[Rank]:
    """What the ranks of this machine say by rank: those of the restart that should have been the last one, or is."""
    restarts: dict[int, list[Rank]] = {}
    for path in folder.glob("*rank-*.json"):
        with suppress(OSError, ValueError):
            rank = json.loads(path.read_text(encoding="utf-8"))
            restarts.setdefault(rank["restart"], []).append(rank)
    for number in sorted(restarts):
        # After a change of machines a process of this one may be another rank than before.
        newest = {rank["local_rank"]: rank for rank in sorted(restarts[number], key=lambda rank: rank["time"])}
        ranks = sorted(newest.values(), key=lambda rank: rank["rank"])
        if decides(ranks) or number == max(restarts):
            return ranks
    return []


@dataclass
class Watch:
    """One command: what was asked of it, which ranks know, what they said last."""

    folder: Path
    idle: float = math.inf  # seconds without a living rank after which the launcher is ended
    requested: list[int] = field(default_factory=list)  # signals, in their order
    ranks: list[Rank] = field(default_factory=list)
    at_once: float | None = None  # when to end all without waiting for anybody
    unheard: bool = False  # no rank was there to hear a request
    _passed_on: set[tuple[int, int]] = field(default_factory=set)
    _first_interrupt: float | None = None
    _last_request: float = 0.0
    _lifeless_since: float | None = None

    def run(self, command: list[str], restart: int, waited: Collection[signal.Signals]) -> int:
        """Run the command until it ends or has nothing left to do; its exit code."""
        for path in self.folder.glob("*rank-*"):  # of the command's start before
            path.unlink()
        alone: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": ignore_signals}
        process = subprocess.Popen(command, env=environment_of_launcher(self.folder, restart), **alone)
        while process.poll() is None and not self.look():
            arrived = signal.sigtimedwait([*waited, signal.SIGCHLD], POLL_SECONDS)
            if arrived is not None and arrived.si_signo != signal.SIGCHLD:
                self.request(arrived.si_signo)
        end_processes(self.folder)
        self.ranks = read_ranks(self.folder)
        return process.wait()

    def request(self, number: int) -> None:
        """Note a signal for the ranks."""
        now = time.monotonic()
        if number == signal.SIGINT and self._first_interrupt is None:
            self._first_interrupt = now
        elif number == signal.SIGINT and now - (self._first_interrupt or now) < ONE_PRESS_SECONDS:
            return
        elif number == signal.SIGINT:
            self.at_once = self.at_once or now + GRACE_SECONDS
        (self.folder / "asked").touch()  # tells ranks this TERM from that of a launcher which is about to restart them
        self._last_request = now
        self.requested.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def look(self) -> bool:
        """Pass on what ranks do not know yet, once they can hear it; whether nothing is left to do."""
        self.ranks = read_ranks(self.folder)
        alive = [rank for rank in self.ranks if belongs(rank["pid"], self.folder)]
        for rank in alive:
            for number, wanted in enumerate(self.requested):
                key = (rank["pid"], number)
                if rank["code"] is None and key not in self._passed_on and catches(rank["pid"], wanted):
                    send(rank["pid"], wanted)
                    self._passed_on.add(key)
            if rank["code"] is not None and time.time() - rank["time"] > LINGER_SECONDS:
                send(rank["pid"], signal.SIGKILL)
        now = time.monotonic()
        self._lifeless_since = None if alive else self._lifeless_since or now
        lifeless = now - (self._lifeless_since or now)
        self.unheard = bool(self.requested) and min(lifeless, now - self._last_request) > GRACE_SECONDS
        is_over = not alive and (decides(self.ranks) or self.unheard or (bool(self.ranks) and lifeless > self.idle))
        return is_over or (self.at_once is not None and now > self.at_once)


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def judge(watch: Watch, launcher_code: int) -> tuple[int, list[str], bool]:
    """Exit code, last lines on the screen, and whether a restart may help."""
    ranks = watch.ranks
    if watch.at_once is not None and not (ranks and all(rank["code"] == 0 for rank in ranks)):
        return 130, ["imagenet-swa: interrupted; checkpoints are whole, and the same command goes on from the last one"], False
    if watch.unheard and not any(map(is_final, ranks)):
        return 85, ["imagenet-swa: stopped as asked, with no rank running; the same command goes on"], False
    if not ranks:
        line = f"imagenet-swa: error: the launcher ended with code {launcher_code} before any rank began; see above"
        return (max(launcher_code, 1), [line], False) if launcher_code else (0, [], False)
    if watch.requested:  # who was asked to stop may have lost those who did before
        ranks = [rank | {"code": 85, "message": None} if rank["lost_others"] else rank for rank in ranks]
    stopped = [rank for rank in ranks if rank["code"] == 85]
    silent = [f"rank {rank['rank']} (process {rank['pid']}) while {rank['phase']}" for rank in ranks if rank["code"] is None]
    if len(ranks) < ranks[0]["local_world_size"] and not (stopped and watch.requested):
        silent.append(f"{ranks[0]['local_world_size'] - len(ranks)} before they began")
    lines = [f"imagenet-swa: error: killed or crashed without a word: {', '.join(silent)}; see above"] if silent else []
    failed = sorted((rank for rank in ranks if rank["code"] in (1, 2)), key=lambda rank: (rank["lost_others"], rank["time"]))
    if failed and not (lines and failed[0]["lost_others"]):
        return failed[0]["code"], [*lines, line_of(failed[0])], not any(map(is_final, failed))
    if lines:
        return 1, lines, True
    if interrupted := [line_of(rank) for rank in ranks if rank["code"] == 130]:
        return 130, interrupted[:1], False
    if stopped:
        why = next((rank["message"] for rank in stopped if rank["message"]), "stopped as asked").removeprefix("imagenet-swa: ")
        return 85, [f"imagenet-swa: {why}" + ("" if "same command" in why else "; the same command goes on")], False
    return 0, [], False


def line_of(rank: Rank) -> str:
    """A rank's message as a line of the program's."""
    text = rank["message"] or f"exit code {rank['code']}"
    return text if text.startswith("imagenet-swa:") else f"imagenet-swa: error [rank {rank['rank']}]: {text}"


def show(lines: list[str]) -> None:
    """Lines on the screen, if it is still there."""
    with suppress(OSError):
        print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """Supervise a command; its ranks' exit code."""
    options = {"--restarts": 0, "--idle": math.inf}
    while len(words) > 1 and words[0] in options and words[1].isdigit():
        options[words[0]], words = int(words[1]), words[2:]
    if not words or words[0].startswith("-"):
        show(["supervise.py: usage: python launch/supervise.py [--restarts N] [--idle SECONDS] COMMAND [ARGUMENT ...]"])
        return 2
    if not sys.platform.startswith("linux"):
        os.execvp(words[0], words)
    # What nohup and shells' background jobs ignore stays ignored.
    may_be_ignored = (signal.SIGHUP, signal.SIGINT)
    waited = [n for n in SIGNALS if n not in may_be_ignored or signal.getsignal(n) != signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, [*waited, signal.SIGCHLD])
    folder, lock = make_folder()
    guard, pipe = start_guard(folder)
    watch, restarts = Watch(folder, idle=options["--idle"]), int(options["--restarts"])
    code, lines = 1, []
    try:
        for restart in range(restarts + 1):
            code, lines, may_help = judge(watch, watch.run(words, restart, waited))
            if not may_help or watch.requested or restart == restarts:
                break
            show([*lines, f"imagenet-swa: starting again from the last checkpoint, {restart + 1} of {restarts}"])
    except OSError as error:
        lines = [f"supervise.py: cannot run {words[0]}: {error.strerror}"]
    finally:
        os.close(pipe)
        os.waitpid(guard, 0)
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
    show(lines)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
