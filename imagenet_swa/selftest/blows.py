"""What the campaign does to a run: which signal reaches which processes, and when."""

import random
import signal
from dataclasses import dataclass

# KILL as often as all others together: it gives a process no chance to prepare.
_SIGNALS = {signal.SIGKILL: 4, signal.SIGTERM: 1, signal.SIGINT: 1, signal.SIGUSR1: 1, signal.SIGUSR2: 1}
# Phases that a moment chosen by the clock would hardly ever hit.
WRITING = "writing"  # not a phase of a rank: files are written in the background of any
_RARE_PHASES = (WRITING, WRITING, "batchnorm", "batchnorm", "evaluation", "finishing")
_AFTER_PHASE_SECONDS = 0.15
# Where the run saves itself after a request to stop; whoever asked may lose his patience.
LAST_SAVE = "waiting to write"
_IMPATIENT = 1 / 3
_AFTER_LAST_SAVE_SECONDS = 0.05


@dataclass(frozen=True)
class Blow:
    """A signal to some ranks.

    Attributes:
        after: seconds after the start of the processes.
        phase: it waits further until any rank is in this phase, or files are being written; None: it does not.
        delay: seconds after that.
        then: what follows, if the processes still run.
    """

    signal: signal.Signals
    ranks: tuple[int, ...]
    after: float
    phase: str | None
    delay: float
    then: "Blow | None" = None

    @property
    def is_graceful(self) -> bool:
        """Whether processes can answer it with a checkpoint."""
        return self.signal != signal.SIGKILL


def draw_blow(draws: random.Random, num_processes: int, seconds: float) -> Blow:
    """A random blow at a run that takes so many seconds: half of them by the clock, half in a rare phase. Some of the requests to
    stop are followed by a KILL while the run saves itself.
    """
    number = draws.choices(list(_SIGNALS), list(_SIGNALS.values()))[0]
    then = None
    if number != signal.SIGKILL and draws.random() < _IMPATIENT:
        delay = draws.uniform(0, _AFTER_LAST_SAVE_SECONDS)
        then = Blow(signal.SIGKILL, _some(draws, num_processes), after=0.0, phase=LAST_SAVE, delay=delay)
    ranks = _some(draws, num_processes)
    if draws.random() < 0.5:
        return Blow(number, ranks, after=draws.uniform(0, seconds), phase=None, delay=0.0, then=then)
    phase = draws.choice(_RARE_PHASES)
    after = 0.0 if phase == "finishing" else draws.uniform(0, seconds / 2)
    return Blow(number, ranks, after=after, phase=phase, delay=draws.uniform(0, _AFTER_PHASE_SECONDS), then=then)


def _some(draws: random.Random, num_processes: int) -> tuple[int, ...]:
    """All processes, or one."""
    return tuple(range(num_processes)) if draws.random() < 0.4 else (draws.randrange(num_processes),)
