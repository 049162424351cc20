"""Two machines, in network namespaces, of which something breaks while they train: a rank, a machine, the link between them.

Each time the others end within a known time and name who was missing; and the run comes back from its last checkpoint and
ends with the very bytes of a run that nobody disturbed.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import PROJECT, QUICK_RUN, run
from test_distributed import two_machines

pytestmark = [pytest.mark.network_namespaces, pytest.mark.timeout(400)]

SILENCE = 6
SETTINGS = (
    *QUICK_RUN,
    "--swa.num_epochs=6",
    "--swa.report_epochs=[3]",
    f"--processes.silence_seconds={SILENCE}",
    "--checkpoint.every_minutes=0",
)
# What a busy machine needs to start a run again: imports, network, images.
START_SECONDS = 90


class Cluster:
    """Two machines that train one run together, one process each, as a scheduler starts them."""

    def __init__(self, machines: list[tuple[str, str, str]], folder: Path, launcher: list[str], settings: list[str]) -> None:
        self.machines, self.folder, self.launcher, self.settings = machines, folder, launcher, settings
        self.out = folder / "run"
        self.mark = uuid.uuid4().hex
        self.launched: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        """Start a machine's command."""
        name, interface, _ = self.machines[number]
        flags = ["--num_machines", "2", "--machine_rank", str(number), "--main_process_ip", self.machines[0][2]]
        command = ["ip", "netns", "exec", name, "bash", "launch/multi_node.sh", *flags, "--num_processes", "1", *self.launcher]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / f"screen-{number}").open("ab") as screen:
            self.launched[number] = subprocess.Popen(
                [*command, str(self.folder / "config.yaml"), *self.settings, f"--output={self.out}"],
                cwd=PROJECT,
                env=os.environ | own | {"PATH": path, f"SWA_TEST_{self.mark}": str(number)},
                stdout=screen,
                stderr=screen,
                start_new_session=True,
            )

    def processes(self, *wanted: str) -> list[int]:
        """Processes of this cluster that have all of the given words in their environment."""
        words = [word.encode() for word in (f"SWA_TEST_{self.mark}=", *wanted)]
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                environment = b"\0" + path.read_bytes()
                if all(b"\0" + word in environment for word in words):
                    found.append(int(path.parent.name))
        return found

    def kill_rank(self, rank: int) -> None:
        pids = self.processes(f"RANK={rank}\0", "LOCAL_RANK=0\0")
        assert pids
        kill(pids)

    def kill_machine(self, number: int) -> None:
        """As when its power fails, but for the kernel, which closes its connections."""
        while pids := self.processes(f"SWA_TEST_{self.mark}={number}\0"):
            kill(pids)
            self.launched[number].wait()

    def link(self, state: str) -> None:
        name, interface, _ = self.machines[0]
        subprocess.run(["ip", "-n", name, "link", "set", interface, state], check=True, timeout=30)

    def step(self) -> int:
        """Of the newest checkpoint."""
        names = [path.name for path in (self.out / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def trains_again(self, before: list[int]) -> float:
        """Seconds until other processes than those train."""
        start = time.monotonic()
        wait_until(lambda: {*self.processes("RANK=")} - {*before} != set() and not {*self.processes("RANK=")} & {*before})
        step = self.step()
        wait_until(lambda: self.step() > step)
        return time.monotonic() - start

    def codes(self, *numbers: int, seconds: float) -> list[int]:
        """Exit codes of machines' commands, which end within the time and leave no process behind."""
        deadline = time.monotonic() + seconds
        codes = []
        for number in numbers:
            try:
                codes.append(self.launched[number].wait(timeout=max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                pytest.fail(f"machine {number} still ran after {seconds} s\n{self.screen(0)[-5000:]}\n{self.screen(1)[-5000:]}")
            assert self.processes(f"SWA_TEST_{self.mark}={number}\0") == []
        return codes

    def screen(self, number: int) -> str:
        return (self.folder / f"screen-{number}").read_text(errors="replace")

    def last_line(self, number: int) -> str:
        return self.screen(number).splitlines()[-1]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(is_so: Callable[[], bool], seconds: float = START_SECONDS) -> float:
    """Wait; how many seconds it took."""
    start = time.monotonic()
    while not is_so():
        assert time.monotonic() < start + seconds, f"not so after {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


@contextmanager
def training_cluster(folder: Path, *launcher: str, settings: tuple[str, ...] = SETTINGS) -> Iterator[Cluster]:
    """A cluster in the middle of its second epoch."""
    (folder / "config.yaml").write_text("seed: 3\n")
    with two_machines() as machines:
        cluster = Cluster(machines, folder, list(launcher), list(settings))
        try:
            cluster.start(0)
            cluster.start(1)
            wait_until(lambda: cluster.step() >= 8)
            yield cluster
        finally:
            while pids := cluster.processes():
                kill(pids)
            for process in cluster.launched.values():
                process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "config.yaml").write_text("seed: 3\n")
    launcher = ["bash", "launch/single_node.sh", "--num_processes", "2", folder / "config.yaml"]
    process = run([*launcher, *SETTINGS, f"--output={folder}/run"], CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    return folder / "run"


def assert_same_run(out: Path, undisturbed: Path) -> None:
    """All weights and predictions are the same files, byte for byte."""
    names = sorted(
        path.relative_to(undisturbed) for path in undisturbed.rglob("*.safetensors") if "checkpoints" not in path.parts
    )
    names += sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*.parquet"))
    assert len(names) > 12
    for name in (*names, Path("results.json")):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


# -------------------------------------------------------------------------------------------------- and it comes back


def test_a_killed_rank_comes_back_by_itself(tmp_path: Path, undisturbed: Path) -> None:
    """After a rank was killed all start again from the last checkpoint, and end as if nothing had been."""
    with training_cluster(tmp_path) as cluster:
        before = cluster.processes("RANK=")
        cluster.kill_rank(1)
        print(f"rank 1 killed: trains again after {cluster.trains_again(before):.1f} s")
        assert cluster.codes(0, 1, seconds=START_SECONDS) == [0, 0]
        assert_same_run(cluster.out, undisturbed)
        assert "rank 1 (" in cluster.screen(0)  # who was late, from whom it was missing to


def test_a_killed_machine_comes_back_when_it_is_started(tmp_path: Path, undisturbed: Path) -> None:
    """Where a machine with its launcher was lost, the other one waits, and goes on once the lost one's command is started."""
    with training_cluster(tmp_path) as cluster:
        cluster.kill_machine(1)
        seconds = wait_until(lambda: not cluster.processes("RANK=0\0"), SILENCE + 30)
        print(f"machine 1 killed: rank 0 ended after {seconds:.1f} s")
        cluster.start(1)
        print(f"trains again {cluster.trains_again([]):.1f} s after its start")
        assert cluster.codes(0, 1, seconds=START_SECONDS) == [0, 0]
        assert_same_run(cluster.out, undisturbed)


def test_a_cut_link_that_comes_back(tmp_path: Path, undisturbed: Path) -> None:
    """With the link cut all ranks end soon after the allowed silence, on both sides, and say who is missing; once it is back
    they go on.
    """
    with training_cluster(tmp_path) as cluster:
        cluster.link("down")
        start = time.monotonic()
        wait_until(lambda: not cluster.processes("RANK="), 3 * SILENCE)
        print(f"link cut: all ranks ended after {time.monotonic() - start:.1f} s")
        assert "[rank 0]: rank 1 (" in cluster.screen(0)
        assert "is silent for" in cluster.screen(0)
        assert "[rank 1]: the other ranks cannot be reached" in cluster.screen(1)
        cluster.link("up")
        print(f"trains again {cluster.trains_again([]):.1f} s after it is back")
        assert cluster.codes(0, 1, seconds=START_SECONDS) == [0, 0]
        assert_same_run(cluster.out, undisturbed)


@pytest.mark.slow
def test_two_kills_in_one_run(tmp_path: Path, undisturbed: Path) -> None:
    """The same where rank 0, which hosts what ranks share and writes the files, is killed, and another one after it."""
    with training_cluster(tmp_path) as cluster:
        for rank in (0, 1):
            before = cluster.processes("RANK=")
            cluster.kill_rank(rank)
            print(f"rank {rank} killed: trains again after {cluster.trains_again(before):.1f} s")
        assert cluster.codes(0, 1, seconds=START_SECONDS) == [0, 0]
        assert_same_run(cluster.out, undisturbed)


@pytest.mark.slow
def test_the_machine_that_hosts_the_meeting_comes_back(tmp_path: Path, undisturbed: Path) -> None:
    """Where machine 0 was lost, the other one waits for it to be started again, too."""
    with training_cluster(tmp_path) as cluster:
        cluster.kill_machine(0)
        seconds = wait_until(lambda: not cluster.processes("RANK="), SILENCE + 30)
        print(f"machine 0 killed: rank 1 ended after {seconds:.1f} s")
        cluster.start(0)
        print(f"trains again {cluster.trains_again([]):.1f} s after its start")
        assert cluster.codes(0, 1, seconds=START_SECONDS) == [0, 0]
        assert_same_run(cluster.out, undisturbed)


@pytest.mark.slow
def test_a_link_that_is_cut_for_a_moment_costs_nothing(tmp_path: Path, undisturbed: Path) -> None:
    """A link that is cut for less than the allowed silence ends nobody."""
    with training_cluster(tmp_path) as cluster:
        ranks = cluster.processes("RANK=")
        cluster.link("down")
        time.sleep(SILENCE / 4)
        cluster.link("up")
        step = cluster.step()
        wait_until(lambda: cluster.step() > step)
        assert set(cluster.processes("RANK=")) <= set(ranks)
        assert cluster.codes(0, 1, seconds=START_SECONDS) == [0, 0]
        assert_same_run(cluster.out, undisturbed)


# ------------------------------------------------------------------------------------------------- and it comes not back


@pytest.mark.slow
def test_without_restarts_a_killed_rank_ends_all(tmp_path: Path) -> None:
    """Without restarts all machines end with code 1 soon after a rank was killed; the last line names it."""
    with training_cluster(tmp_path, "--max_restarts", "0", "--rejoin_seconds", "10") as cluster:
        cluster.kill_rank(1)
        start = time.monotonic()
        assert cluster.codes(0, 1, seconds=SILENCE + 30) == [1, 1]
        print(f"rank 1 killed: both commands ended after {time.monotonic() - start:.1f} s")
        assert "rank 1 (" in cluster.last_line(0)
        assert "is silent for" in cluster.last_line(0)
        assert "killed or crashed without a word: rank 1 (" in cluster.last_line(1)


@pytest.mark.slow
def test_a_link_that_stays_cut_ends_all(tmp_path: Path) -> None:
    """Where the link does not come back, the commands of both machines end with code 1 after the time that they wait for it."""
    with training_cluster(tmp_path, "--rejoin_seconds", "10") as cluster:
        cluster.link("down")
        start = time.monotonic()
        assert cluster.codes(0, seconds=120) == [1]
        print(f"link cut: the command of machine 0 ended after {time.monotonic() - start:.1f} s")
        assert cluster.codes(1, seconds=300) == [1]
        print(f"link cut: the command of machine 1 ended after {time.monotonic() - start:.1f} s")
        assert "rank 1 (" in cluster.last_line(0)
        assert "[rank 1]: the other ranks cannot be reached" in cluster.screen(1)
