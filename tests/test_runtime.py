"""Ranks, seeds, precision and the environment record; whether all processes were started."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from conftest import run
from hypothesis import example, given
from hypothesis import strategies as st

from imagenet_swa import runtime
from imagenet_swa.config import Config, EvaluationConfig, InputError, ModelConfig, SpeedConfig
from imagenet_swa.runtime import (
    Runtime,
    check_num_processes,
    check_precision,
    check_trackers,
    environment_record,
    processes_asked_for,
)


def runtime_of_rank(rank: int) -> Runtime:
    """As a process of that rank would have it; nothing that asks Accelerate is called."""
    return Runtime(cast(Accelerator, None), rank, rank, 1, 1, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- two ranks

# Each rank writes what it got. Numbers above 2^53 would lose bits in any floating-point sum.
RANKS = """
import json, sys
from pathlib import Path
import torch
from imagenet_swa.config import Config, InputError
from imagenet_swa.runtime import start_runtime

runtime = start_runtime(Config())
mine = torch.tensor([2**61 + 1 + runtime.rank, -(2**53) - runtime.rank, runtime.rank])
kept = mine.clone()
got = {"world_size": runtime.world_size, "local_world_size": runtime.local_world_size, "is_main": runtime.is_main}
got["sum"] = runtime.sum(mine).tolist()
got["float_sum"] = runtime.sum(torch.tensor([0.5 + runtime.rank], dtype=torch.float64)).tolist()
got["unchanged"] = bool((mine == kept).all())
got["from_main"] = runtime.from_main({"rank": runtime.rank} if runtime.is_main else None)
first = Path(sys.argv[1]) / "first"
with runtime.local_main_first():
    got["found"] = first.exists()
    first.touch()
try:
    with runtime.local_main_first():
        raise InputError("the same on every rank")
except InputError as error:
    got["error"] = str(error)
runtime.barrier()
runtime.seed(0, 7)
got["drawn"] = torch.rand(3).tolist()
(Path(sys.argv[1]) / f"{runtime.rank}.json").write_text(json.dumps(got))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    launcher = ["torchrun", "--standalone", "--nproc_per_node=2"]
    process = run(["env", "CUDA_VISIBLE_DEVICES=", *launcher, folder / "ranks.py", folder])
    assert process.returncode == 0, process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_sums_of_integers_are_exact_on_every_rank(ranks: list[dict]) -> None:
    """The sum of 64-bit integers over two ranks is the exact one, on both, and leaves the summands as they were."""
    expected = [2**62 + 3, -(2**54) - 1, 1]
    assert [rank["sum"] for rank in ranks] == [expected, expected]
    assert [rank["float_sum"] for rank in ranks] == [[2.0], [2.0]]
    assert all(rank["unchanged"] for rank in ranks)


def test_ranks_know_each_other(ranks: list[dict]) -> None:
    """Two processes are two ranks of one run, and rank 0 is the main one, whose value all get."""
    assert [(rank["world_size"], rank["local_world_size"], rank["is_main"]) for rank in ranks] == [(2, 2, True), (2, 2, False)]
    assert [rank["from_main"] for rank in ranks] == [{"rank": 0}, {"rank": 0}]


def test_the_main_process_goes_first_even_into_an_error(ranks: list[dict]) -> None:
    """What the first process leaves is there for the second; where it fails, the second fails alike instead of hanging."""
    assert [rank["found"] for rank in ranks] == [False, True]
    assert [rank["error"] for rank in ranks] == ["the same on every rank"] * 2


def test_ranks_draw_different_numbers(ranks: list[dict]) -> None:
    """The same key gives each rank its own stream, the one that it would have in any other run."""
    assert ranks[0]["drawn"] != ranks[1]["drawn"]
    for rank in range(2):
        runtime_of_rank(rank).seed(0, 7)
        assert torch.rand(3).tolist() == ranks[rank]["drawn"]


# ----------------------------------------------------------------------------------------------------------- seeds

KEYS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3).map(tuple)


def stream(rank: int, key: tuple[int, ...]) -> tuple[float, ...]:
    runtime_of_rank(rank).seed(*key)
    return tuple(torch.rand(4).tolist())


@given(first=st.tuples(st.integers(0, 3), KEYS), second=st.tuples(st.integers(0, 3), KEYS))
@example(first=(0, (5,)), second=(0, (5, 0)))
@example(first=(0, (0,)), second=(0, (0, 0)))
@example(first=(1, (5, 3)), second=(0, (5, 3, 1)))
@example(first=(0, (2**32,)), second=(0, (0, 1)))
@example(first=(0, (1, 2)), second=(0, (12,)))
def test_every_rank_and_key_has_its_own_stream(first: tuple[int, tuple[int, ...]], second: tuple[int, tuple[int, ...]]) -> None:
    """Two seeds give the same numbers exactly if rank and key are the same."""
    assert (stream(*first) == stream(*second)) == (first == second)
    assert stream(*first) == stream(*first)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_in_the_named_arithmetic(precision: str, dtype: torch.dtype) -> None:
    """A matrix product of fp32 numbers under autocast comes out in the named type, and outside in fp32 again."""
    a = torch.ones(2, 2)
    with runtime_of_rank(0).autocast(precision):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "on_gpu", "message"),
    [
        (Config(speed=SpeedConfig(precision="fp16")), False, "fp16 needs a GPU .* use bf16 or fp32"),
        (Config(evaluation=EvaluationConfig(precision="fp16")), False, "fp16 needs a GPU .* use bf16 or fp32"),
        (Config(model=ModelConfig(sync_batchnorm=True)), False, "model.sync_batchnorm needs GPUs .* set it to false"),
        (Config(speed=SpeedConfig(precision="bf16")), True, "no bf16; set speed.precision .* to fp16 or fp32"),
        (Config(evaluation=EvaluationConfig(precision="bf16")), True, "no bf16; set .*evaluation.precision to fp16 or fp32"),
    ],
)
def test_arithmetic_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: Config, on_gpu: bool, message: str
) -> None:
    """fp16 and SyncBatchNorm want a GPU, bf16 one that has it: the message names the setting and the way out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(InputError, match=message):
        check_precision(config, on_gpu=on_gpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_arithmetic_is_accepted_on_cpus(precision) -> None:
    """fp32 and bf16 run on CPUs, in training as in evaluation."""
    check_precision(
        Config(speed=SpeedConfig(precision=precision), evaluation=EvaluationConfig(precision=precision)), on_gpu=False
    )


def test_fp16_on_a_cpu_ends_the_program_with_one_line() -> None:
    """The command line refuses fp16 without a GPU with one line on stderr and exit code 2."""
    process = run(["env", "CUDA_VISIBLE_DEVICES=", "imagenet-swa", "train", "--data.synthetic", "--speed.precision=fp16"])
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["imagenet-swa: error: fp16 needs a GPU and none was found; use bf16 or fp32"]


# ------------------------------------------------------------------------------------- were all processes started?

ACCELERATE = ("/env/bin/python3", "/env/bin/accelerate", "launch")


@pytest.fixture
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where `accelerate config` would write; nothing is there yet."""
    monkeypatch.setattr(runtime, "default_config_file", str(tmp_path / "default_config.yaml"))
    return tmp_path / "default_config.yaml"


@pytest.mark.parametrize(
    ("launcher", "environment", "number"),
    [
        ((*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "imagenet_swa.train"), {}, 2),
        ((*ACCELERATE, "--num_processes=3", "train.py"), {}, 3),
        ((*ACCELERATE, "--num-processes", "3", "train.py"), {}, 3),
        (("python", "-m", "accelerate.commands.launch", "--num_processes", "4", "train.py"), {}, 4),
        (("/env/bin/python", "/env/bin/accelerate-launch", "--num_processes", "4", "train.py"), {}, 4),
        # Under srun accelerate's total counts, not that of the launchers that srun started.
        ((*ACCELERATE, "--num_processes", "16", "train.py"), {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, 16),
        (("python", "/env/bin/torchrun", "--nproc_per_node=2", "train.py"), {"WORLD_SIZE": "2"}, 2),
        (("slurmstepd: [1.0]",), {"SLURM_STEP_NUM_TASKS": "4"}, 4),
        # One shell in a step of SLURM, and torchrun in it.
        (("bash",), {"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "2"}, 2),
        (("bash",), {}, None),
        (("bash", "/home/me/accelerate-trials/run.sh", "--num_processes", "4"), {}, None),
        (("bash", "/home/me/accelerate/run.sh", "--num_processes", "4"), {}, None),
        (ACCELERATE, {}, None),
    ],
)
@pytest.mark.usefixtures("no_default_config")
def test_the_number_that_was_asked_for(launcher: tuple[str, ...], environment: dict[str, str], number: int | None) -> None:
    """Flags of accelerate come before WORLD_SIZE, that before SLURM's tasks; without any of them nobody asked."""
    assert processes_asked_for(environment, launcher) == number


def test_the_number_in_accelerates_configuration_files(no_default_config: Path, tmp_path: Path) -> None:
    """A flag comes before the file of --config_file, and that before the one in the user's home."""
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text("distributed_type: MULTI_CPU\nnum_processes: 3\n")
    with_file = (*ACCELERATE, "--config_file", str(chosen), "train.py")
    assert processes_asked_for({}, (*ACCELERATE, "--config_file", str(chosen), "--num_processes", "2", "train.py")) == 2
    assert processes_asked_for({}, with_file) == 3
    assert processes_asked_for({}, (*ACCELERATE, f"--config_file={chosen}", "train.py")) == 3
    no_default_config.write_text("num_processes: 5\n")
    assert processes_asked_for({}, with_file) == 3
    assert processes_asked_for({}, (*ACCELERATE, "train.py")) == 5
    # With --cpu accelerate does not look at that file.
    assert processes_asked_for({}, (*ACCELERATE, "--cpu", "train.py")) is None
    no_default_config.write_text("")
    assert processes_asked_for({}, (*ACCELERATE, "train.py")) is None


def test_another_number_of_processes_is_refused() -> None:
    """3 processes asked for on 2 machines become 2: both numbers and the launchers that work are named, in one line."""
    with pytest.raises(InputError, match=r"^3 processes were asked for, but this run has 2: ") as refusal:
        check_num_processes(2, 3)
    assert "launch/multi_node.sh" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    check_num_processes(2, 2)
    check_num_processes(2, None)


def test_srun_without_a_launcher_is_refused() -> None:
    """Four copies of the program that srun starts are not taken for four runs."""
    process = run(["env", "SLURM_STEP_NUM_TASKS=4", "CUDA_VISIBLE_DEVICES=", "imagenet-swa", "train", "--data.synthetic"])
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("imagenet-swa: error: 4 processes were asked for, but this run has 1: ")
    assert "launch/slurm.sbatch" in line


# ---------------------------------------------------------------------------------------------- environment record


def test_the_environment_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, processor, processes, seed and command are in the record, which JSON can hold."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "3"])
    record = json.loads(json.dumps(environment_record(runtime_of_rank(0), Config(seed=3))))
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == platform.python_version()
    assert {"imagenet-swa", "torchvision", "timm", "accelerate", "numpy"} <= record["versions"].keys()
    assert record["cpu"] and record["cpu"] in (platform.machine(), platform.processor(), *processors())
    assert record["num_cpus"] == len(os.sched_getaffinity(0))
    assert (record["world_size"], record["device"], record["seed"]) == (1, "cpu", 3)
    assert record["command"] == ["train.py", "--seed", "3"]


def processors() -> Iterator[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            yield line.partition(": ")[2]


def test_the_state_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commit, and whether the package's files differ from it; nothing outside a checkout or inside somebody else's."""
    source = tmp_path / "imagenet_swa" / "runtime.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    monkeypatch.setattr(runtime, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def state() -> object:
        return environment_record(runtime_of_rank(0), Config())["git"]

    assert state() is None
    git("init")
    (tmp_path / "theirs.txt").write_text("other files\n")
    git("add", "theirs.txt")
    git("commit", "-m", "theirs")
    assert state() is None
    git("add", "imagenet_swa")
    git("commit", "-m", "ours")
    commit = git("rev-parse", "HEAD")
    assert state() == {"commit": commit, "modified": False}
    (tmp_path / "theirs.txt").write_text("changed\n")
    assert state() == {"commit": commit, "modified": False}
    source.write_text("x = 2\n")
    assert state() == {"commit": commit, "modified": True}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    """Accelerate would drop it without a word; the user learns which package is missing."""
    monkeypatch.setattr(runtime, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    check_trackers(["tensorboard"])
    with pytest.raises(InputError, match="trackers: wandb is not installed; pip install wandb"):
        check_trackers(["tensorboard", "wandb"])
