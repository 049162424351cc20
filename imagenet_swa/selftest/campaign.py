"""The campaign: undisturbed runs for reference, then runs that are killed and started again until they finish."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from imagenet_swa.config import TrainingError, require, to_plain
from imagenet_swa.selftest import FaultSettings
from imagenet_swa.selftest.blows import WRITING, Blow, draw_blow
from imagenet_swa.selftest.compare import differences, results
from imagenet_swa.selftest.ranks import MARKER, Mother, Ranks, end_left_over
from imagenet_swa.selftest.small_run import write_run
from imagenet_swa.selftest.tally import Kill, Tally, table
from imagenet_swa.selftest.whole import checkpoints, last_logged_step, left_overs, what_is_broken, what_is_torn

REQUEUE = 85
_ATTEMPT_SECONDS = 180.0  # that an undisturbed start may take to the end of the run
_ALONE_SECONDS = 15.0  # that ranks get to end by themselves after another one died, before they are told to
_TOLD_SECONDS = 30.0  # that torchrun gives from TERM to KILL
_ORPHAN_SECONDS = 10.0
_MAX_ATTEMPTS = 60


def faults(settings: FaultSettings) -> int:
    """Run the campaign, print its table, write `output`/faults.json; returns the exit code: 0 if nothing was found.

    Raises:
        InputError: `output` is not empty.
        TrainingError: undisturbed runs fail or differ, so that nothing can be compared.
    """
    require(not (settings.output.exists() and any(settings.output.iterdir())), f"{settings.output} is not empty; name another")
    started = time.monotonic()
    with Campaign(settings) as campaign:
        campaign.make_references()
        try:
            while len(campaign.tally.kills) < settings.kills:
                campaign.disturb_one_run()
        except KeyboardInterrupt:
            print("interrupted; the figures so far:")
    minutes = (time.monotonic() - started) / 60
    about = {name: value for name, value in to_plain(settings).items() if name != "output"} | {"minutes": minutes}
    record = campaign.tally.write(settings.output / "faults.json", **about)
    print("\n".join(table(record)))
    for problem in campaign.tally.problems:
        print(f"PROBLEM {problem.line}")
    print(f"all kills, one by one: {settings.output / 'faults.json'} ({minutes:.1f} minutes)")
    return 1 if campaign.tally.problems or len(campaign.tally.kills) < settings.kills else 0


class Campaign:
    """Runs that are disturbed, and what was found so far. A context manager, at whose end no process of it is left.

    Attributes:
        reference: folder of an undisturbed run.
        tally: what was found so far.
    """

    def __init__(self, settings: FaultSettings) -> None:
        self._settings = settings
        self._folder = settings.output.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._draws = random.Random(settings.seed)
        self._config = write_run(self._folder, settings)
        self.reference = self._folder / "reference"
        self._seconds = 0.0  # of an undisturbed run
        self._marker = uuid.uuid4().hex
        self._mothers: list[Mother] = []
        self.tally = Tally()

    def __enter__(self) -> "Campaign":
        # Two, which order sets differently: a run may neither differ with that order nor the ranks of one.
        self._mothers = [Mother(self._marker, hash_seed=self._draws.randrange(1, 2**32)) for _ in range(2)]
        return self

    def __exit__(self, *_: object) -> None:
        for mother in self._mothers:
            mother.__exit__()
        end_left_over(self._marker, [], 0.0)

    # ---------------------------------------------------------------------------------------------- for reference

    def make_references(self) -> None:
        """Two undisturbed runs, which must be equal: one as users start it, through torchrun, one as all others here."""
        self._run_with_torchrun()
        repeated = self._folder / "repeated"
        ranks = self._start(repeated)
        ranks.wait(_ATTEMPT_SECONDS)
        self._seconds = time.monotonic() - ranks.started
        _demand(ranks.codes == [0] * len(ranks.pids), f"an undisturbed run ended with {ranks.codes}: {self._log(repeated)}")
        found = differences(self.reference, repeated)
        _demand(not found, f"two undisturbed runs differ, so nothing can be compared: {'; '.join(found[:5])}")
        _check_richness(results(self.reference))
        shutil.rmtree(repeated)
        names = ", ".join(sorted({name.split("/")[0] for name in results(self.reference)}))
        print(f"two undisturbed runs, by torchrun and without, are the same, {self._seconds:.1f} s: {names}", flush=True)

    def _run_with_torchrun(self) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._settings.processes}"]
        command = [*launcher, "-m", "imagenet_swa", *self._arguments(self.reference)]
        environment = os.environ | {MARKER: self._marker, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        log = self._log(self.reference)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=environment, timeout=2 * _ATTEMPT_SECONDS, check=False)
        _demand(done.returncode == 0, f"an undisturbed run through torchrun ended with {done.returncode}: {log}")
        self._check_processes(self.reference)

    def _start(self, run: Path) -> Ranks:
        mothers = self._draws.choices(self._mothers, k=self._settings.processes)
        return Ranks(mothers, self._arguments(run), self._folder / "status", self._log(run))

    def _arguments(self, run: Path) -> list[str]:
        return ["train", f"--config={self._config}", f"--output={run}"]

    def _log(self, run: Path) -> Path:
        return self._folder / "logs" / f"{run.name}.log"

    # ----------------------------------------------------------------------------------------------- disturbed runs

    def disturb_one_run(self) -> None:
        """Start a run, strike it, start it again and so on until it finishes; then compare it with the reference."""
        self.tally.num_runs += 1
        run = self._folder / f"run-{self.tally.num_runs:03d}"
        num_problems, num_kills = len(self.tally.problems), len(self.tally.kills)
        if self.bring_to_its_end(run):
            self._compare(run)
        kills = [f"{kill.signal[3:]} {kill.phase}" for kill in self.tally.kills[num_kills:]]
        found = [problem.line for problem in self.tally.problems[num_problems:]]
        verdict = "; ".join(found) if found else "the same as undisturbed"
        print(f"{run.name}: {len(kills)} kills ({', '.join(kills)}): {verdict}", flush=True)
        if not found:
            shutil.rmtree(run)
            self._log(run).unlink(missing_ok=True)

    def bring_to_its_end(self, run: Path) -> bool:
        """Start a run and strike it, again and again; returns whether it finished."""
        newest = None
        for attempt in range(_MAX_ATTEMPTS):
            self.tally.num_resumes += newest is not None
            ranks = self._start(run)
            blow = self._next_blow()
            kills = self._strike(ranks, blow, attempt) if blow else []
            self.tally.kills += kills
            needed = None if kills else self._see_out(ranks, _ATTEMPT_SECONDS)
            codes, seconds = ranks.codes, time.monotonic() - ranks.started
            self._check_processes(run)
            self._check_disk(run, newest)
            newest = max(checkpoints(run), default=None)
            for kill in kills:
                self._judge(kill, run)
            if all(code == 0 for code in codes):
                if attempt == 0 and not kills:  # the machine is as busy now as it is
                    self._seconds = seconds
                return True
            if not kills:
                said = " | ".join(line or "nothing" for line in ranks.last_words())
                how = f"ended with {codes}{f' and {needed}' * bool(needed)}, said: {said}"
                self.tally.add("other", f"{run.name} {how}, though nobody disturbed it: {self._log(run)}")
                return False
        self.tally.add("other", f"{run.name} did not finish in {_MAX_ATTEMPTS} attempts")
        return False

    def _next_blow(self) -> Blow | None:
        if len(self.tally.kills) >= self._settings.kills:
            return None
        return draw_blow(self._draws, self._settings.processes, 0.7 * self._seconds)

    def _strike(self, ranks: Ranks, blow: Blow, attempt: int, *, after_request: bool = False) -> list[Kill]:
        """Wait for the moment, send the signal, see the processes end; returns the blows that reached them, none if the run ended
        before.
        """
        patience = _ALONE_SECONDS if after_request else _ATTEMPT_SECONDS
        ranks.wait(blow.after)
        if blow.phase is not None and not ranks.wait(patience, lambda: _is_in(ranks, blow.phase)):
            return []
        ranks.wait(blow.delay)
        if None not in ranks.codes:
            return []
        phase, while_writing = ranks.phase(blow.ranks[0]), ranks.is_writing()
        sent = time.monotonic()
        (ranks.ask if blow.is_graceful else ranks.send)(blow.signal, blow.ranks)
        followed_by = self._strike(ranks, blow.then, attempt, after_request=True) if blow.then else []
        needed = self._see_out(ranks, _ALONE_SECONDS)
        kill = Kill(
            run=self.tally.num_runs,
            attempt=attempt,
            signal=blow.signal.name,
            ranks=blow.ranks,
            phase=phase,
            while_writing=while_writing,
            codes=tuple(ranks.codes),
            seconds_to_end=round(time.monotonic() - sent, 3),
            needed=needed,
            said=ranks.last_words(),
            after_request=after_request,
            was_followed=bool(followed_by),
        )
        return [kill, *followed_by]

    def _see_out(self, ranks: Ranks, seconds: float) -> str | None:
        """Wait for all to end; those that do not are told to, as torchrun does. Returns what that took."""
        for needed, patience in ((None, seconds), (signal.SIGTERM, _TOLD_SECONDS), (signal.SIGKILL, _TOLD_SECONDS)):
            if needed is not None:
                ranks.send(needed, range(len(ranks.pids)))
            ranks.wait(patience)
            if None not in ranks.codes:
                return needed.name if needed is not None else None
        raise RuntimeError(f"processes {ranks.pids} do not even end when they are killed")

    # ------------------------------------------------------------------------------------------------- what came of it

    def _check_processes(self, run: Path) -> None:
        for pid in end_left_over(self._marker, [mother.pid for mother in self._mothers], _ORPHAN_SECONDS):
            self.tally.add("orphan", f"{run.name}: process {pid} outlived its run")

    def _check_disk(self, run: Path, newest_before: int | None) -> None:
        """All that is finished is whole, and no checkpoint was given up for nothing."""
        saved = checkpoints(run)
        self.tally.num_examined += len(saved)
        self.tally.add("torn", *(f"{run.name}: {line}" for line in what_is_torn(run)))
        self.tally.add("other", *(f"{run.name}: {line}" for line in what_is_broken(run)))
        if newest_before is not None and max(saved, default=-1) < newest_before:
            self.tally.add("other", f"{run.name}: the checkpoint of step {newest_before} is gone, there is {list(saved)}")

    def _judge(self, kill: Kill, run: Path) -> None:
        """What the exit codes must be, and what a stop on request must leave behind."""
        problem = unexpected_end(kill)
        if problem is None and set(kill.codes) == {REQUEUE} and last_logged_step(run) > max(checkpoints(run), default=0):
            problem = f"stopped on request, but step {last_logged_step(run)} is logged and {list(checkpoints(run))} are saved"
        if problem is not None:
            said = " | ".join(line or "nothing" for line in kill.said)
            self.tally.add("other", f"{run.name}, {kill.describe()}: {problem}; said: {said}")

    def _compare(self, run: Path) -> None:
        found = differences(self.reference, run)
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            self.tally.add("different", f"{run.name}: {'; '.join(found[:8])}{more}")
        self.tally.add("other", *(f"{run.name}: left {name} behind" for name in left_overs(run)))


def unexpected_end(kill: Kill) -> str | None:
    """Why processes should not have ended as they did, None if they should.

    After a request to stop all end with 85, or with 0 where the run had nothing left to do. A request that comes before a process
    can listen ends it as signals do, and the others as after a loss. Killed processes end by that, the others with an error.
    """
    if kill.was_followed:
        return None
    if kill.needed == "SIGKILL":
        return "they did not end, even when told to"
    codes, by_signal = set(kill.codes), -signal.Signals[kill.signal].value
    if kill.needed == "SIGTERM" and kill.phase != "starting":
        return "they did not end by themselves"
    told = {-signal.SIGTERM.value} if kill.needed else set()
    if kill.signal == "SIGKILL":
        struck = {kill.codes[rank] for rank in kill.ranks}
        others = {code for rank, code in enumerate(kill.codes) if rank not in kill.ranks}
        stopped = {REQUEUE} if kill.after_request else set()
        is_fine = struck <= {by_signal, 0, *stopped} and others <= {0, 1, *told, *stopped}
    elif kill.phase == "starting":
        is_fine = codes in ({REQUEUE}, {0}) or (codes <= {1, by_signal, 130, *told} and 0 not in codes)
    else:
        is_fine = codes in ({REQUEUE}, {0})
    return None if is_fine else f"ended with {list(kill.codes)}"


def _is_in(ranks: Ranks, phase: str | None) -> bool:
    if phase == WRITING:
        return ranks.is_writing()
    return any(ranks.phase(rank) == phase for rank in range(len(ranks.pids)))


def _check_richness(files: dict[str, bytes]) -> None:
    """The reference holds each kind of result, so that a comparison compares something."""
    kinds = ("captures/", "averages/", "predictions/", "checkpoint/momentum", "checkpoint/statistics", "checkpoint/average")
    kinds += ("swa.safetensors", "pretrained.safetensors", "results.json", "metrics.jsonl")
    for kind in kinds:
        _demand(any(name.startswith(kind) and content for name, content in files.items()), f"the small run leaves no {kind}")


def _demand(condition: bool, message: str) -> None:
    """Raise TrainingError(message) unless the condition holds: without it there is no campaign."""
    if not condition:
        raise TrainingError(message)
