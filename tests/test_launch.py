"""The launchers as a user calls them: what they pass on, what they refuse, and runs through accelerate and SLURM."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from conftest import PROJECT, QUICK_RUN, run
from launched import RANK, Launched, wait_until

LAUNCH = PROJECT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), PROJECT / ".ci" / "run"])

# What a scheduler that this test runs under may have set.
SCHEDULER = ["SLURM_NNODES", "NNODES", "SLURM_NODEID", "NODE_RANK", "SLURM_JOB_NODELIST", "SLURM_STEP_NUM_TASKS"]
SCHEDULER += ["MASTER_ADDR", "MASTER_PORT", "MAIN_PROCESS_PORT", "OMP_NUM_THREADS", "WORLD_SIZE"]
# One step, without any data.
SHORT_RUN = (*QUICK_RUN, "--data.synthetic_num_images=[16,16]", "--swa.num_epochs=1", "--swa.report_epochs=[1]")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "some config.yaml"
    path.write_text("seed: 3\n")
    return path


def program(folder: Path, name: str, text: str) -> Path:
    """A stand-in for a program, found first on a PATH that starts with `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def scontrol(folder: Path, nodes: str, first: str, second: str) -> None:
    """A stand-in that knows one list of nodes; it still writes when a reader of one line would have gone."""
    program(folder, "scontrol", f'[ "$*" = "show hostnames {nodes}" ] && echo {first}; sleep 0.1; echo {second}')


def start(command: Sequence[str | Path], *environment: str, programs: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a launcher on CPUs with some settings `NAME=VALUE` in its environment."""
    # Behind conftest's own PATH, which is complete only inside `run`.
    first = [] if programs is None else ["bash", "-c", 'PATH="$0:$PATH"; export PATH; exec "$@"', programs]
    without = [f"--unset={name}" for name in SCHEDULER]
    return run(["env", *without, "CUDA_VISIBLE_DEVICES=", *environment, *first, *command])


# --------------------------------------------------------------------------------------------- what is not accepted

REFUSED = [
    ("single_node.sh", [], "no such configuration: (none given)"),
    ("single_node.sh", ["nowhere.yaml"], "no such configuration: nowhere.yaml"),
    ("single_node.sh", ["--num_processes"], "--num_processes wants a number of at least 1, got ''"),
    ("single_node.sh", ["--num_processes", "two", "CONFIG"], "--num_processes wants a number of at least 1, got 'two'"),
    ("single_node.sh", ["--num_processes", "0", "CONFIG"], "--num_processes wants a number of at least 1, got '0'"),
    ("single_node.sh", ["--num_processes", "2"], "no such configuration: (none given)"),
    ("single_node.sh", ["--max_restarts"], "--max_restarts wants a number, got ''"),
    ("single_node.sh", ["--num_processes", "2", "--max_restarts", "-1", "CONFIG"], "--max_restarts wants a number, got '-1'"),
    ("multi_node.sh", [], "no such configuration: (none given)"),
    ("multi_node.sh", ["--num_machines", "2", "nowhere.yaml"], "no such configuration: nowhere.yaml"),
    ("multi_node.sh", ["--num_machines"], "--num_machines wants a value"),
    ("multi_node.sh", ["CONFIG"], "how many machines? give --num_machines"),
    ("multi_node.sh", ["--num_machines", "many", "CONFIG"], "got 'many'"),
    ("multi_node.sh", ["--num_machines", "2", "CONFIG"], "which machine is this? give --machine_rank 0..1, or set NODE_RANK"),
    ("multi_node.sh", ["--num_machines", "2", "--machine_rank", "-1", "CONFIG"], "got '-1'"),
    ("multi_node.sh", ["--num_machines", "2", "--machine_rank", "2", "CONFIG"], "--machine_rank 2 is not below --num_machines 2"),
    ("multi_node.sh", ["--num_machines", "2", "--machine_rank", "0", "CONFIG"], "where is machine 0? give --main_process_ip"),
    ("multi_node.sh", ["GOOD", "--main_process_port", "http", "CONFIG"], "--main_process_port wants a number"),
    ("multi_node.sh", ["GOOD", "--num_processes", "some", "CONFIG"], "--num_processes wants a number of at least 1, got 'some'"),
    ("multi_node.sh", ["GOOD", "--num_processes", "0", "CONFIG"], "--num_processes wants a number of at least 1, got '0'"),
]
GOOD = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "10.0.0.1"]


@pytest.mark.parametrize(("script", "arguments", "message"), REFUSED)
def test_bad_arguments_are_refused_in_one_line(config: Path, script: str, arguments: list[str], message: str) -> None:
    """A launcher that cannot be meant this way says so in one line that starts with its name, and exits with 2."""
    words = [word for argument in arguments for word in (GOOD if argument == "GOOD" else [argument])]
    process = start(["bash", LAUNCH / script, *(str(config) if word == "CONFIG" else word for word in words)])
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{script}: ")
    assert message in line


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_a_forgotten_environment_is_named(config: Path, script: str) -> None:
    """Without accelerate on the PATH a launcher says which step is missing."""
    process = start(["env", "PATH=/usr/bin:/bin", "bash", LAUNCH / script, *(GOOD if script == "multi_node.sh" else []), config])
    assert process.returncode == 2
    assert "activate the environment" in process.stderr


# ---------------------------------------------------------------------------------------------- what is passed on


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Stand-ins: an `accelerate` that prints its arguments, one a line, and a `python` that sees three GPUs."""
    folder = tmp_path / "programs"
    program(folder, "accelerate", "printf '%s\\n' \"$@\"")
    program(folder, "python", f'[ "$1" = -c ] && echo 3 || exec "{sys.executable}" "$@"')
    scontrol(folder, "node[7-8]", "node7", "node8")
    return folder


def passed_on(process: subprocess.CompletedProcess[str]) -> tuple[dict[str, str], list[str]]:
    """accelerate's own flags, and the words from -m on."""
    assert process.returncode == 0, process.stderr
    words = process.stdout.splitlines()
    assert words[0] == "launch"
    flags, program = words[1 : words.index("-m")], words[words.index("-m") :]
    return {a: b for a, b in zip(flags, [*flags[1:], ""], strict=True) if a.startswith("--")}, program


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_settings_arrive_as_they_were_written(config: Path, programs: Path, script: str) -> None:
    """Spaces, quotes, stars and empty words in the configuration's path and in settings reach the program unchanged."""
    settings = ["--output", "a b", "--model.kwargs", "{'drop_rate': 0.1}", "--data.train=*", "", "--num_machines", "7"]
    first = GOOD if script == "multi_node.sh" else []
    _, words = passed_on(start(["bash", LAUNCH / script, *first, config, *settings], programs=programs))
    assert words == ["-m", "imagenet_swa.train", "--config", str(config), *settings]


@pytest.mark.parametrize(
    ("given", "number", "file"),
    [([], 3, "eight_gpus"), (["--num_processes", "1"], 1, "one_process"), (["--num_processes", "2"], 2, "eight_gpus")],
)
def test_single_node_starts_a_process_per_gpu(config: Path, programs: Path, given: list[str], number: int, file: str) -> None:
    """The number of processes is the one that was given, else that of the GPUs that torch sees; they share the cores."""
    flags, _ = passed_on(start(["bash", LAUNCH / "single_node.sh", *given, config], programs=programs))
    assert flags["--num_processes"] == str(number)
    assert flags["--config_file"] == str(LAUNCH / "accelerate" / f"{file}.yaml")
    assert flags["--num_cpu_threads_per_process"] == str(max(1, len(os.sched_getaffinity(0)) // number))


def test_restarts_are_passed_on(config: Path, programs: Path) -> None:
    """accelerate restarts several processes, three times if not said otherwise; one alone it would not."""
    for arguments, number in (([], "3"), (["--max_restarts", "0", "--num_processes", "2"], "0"), (["--max_restarts", "7"], "7")):
        flags, _ = passed_on(start(["bash", LAUNCH / "single_node.sh", *arguments, config], programs=programs))
        assert flags["--max_restarts"] == number


def test_a_process_alone_is_restarted(config: Path, programs: Path, tmp_path: Path) -> None:
    """One process, which accelerate would not restart, comes back after a crash, unless that is switched off."""
    (tmp_path / "rank.py").write_text(RANK)
    program(programs, "accelerate", f"exec '{sys.executable}' {tmp_path}/rank.py 'crash once'")
    for number, code in (("0", 1), ("1", 0)):
        command = ["bash", LAUNCH / "single_node.sh", "--num_processes", "1", "--max_restarts", number, config]
        process = start(command, f"PYTHONPATH={PROJECT}", f"NOTES={tmp_path}", programs=programs)
        assert process.returncode == code, process.stderr
    assert (tmp_path / "note-0").read_text().split() == ["begun", "0", "begun", "0", "begun", "1"]


def test_a_stop_before_the_start(config: Path, programs: Path) -> None:
    """A signal that comes while a launcher still looks around stops it with 85 too."""
    program(programs, "python", "kill -USR1 $PPID; sleep 0.2; echo 3")
    process = start(["bash", LAUNCH / "single_node.sh", config], programs=programs)
    assert (process.returncode, process.stdout) == (85, "")


def test_single_node_meets_at_the_named_port(config: Path, programs: Path) -> None:
    """Several processes meet at MAIN_PROCESS_PORT, or at any free port, which accelerate writes as 0."""
    for environment, port in (((), "0"), (("MAIN_PROCESS_PORT=4000",), "4000")):
        flags, _ = passed_on(start(["bash", LAUNCH / "single_node.sh", config], *environment, programs=programs))
        assert flags["--main_process_port"] == port


BY_SLURM = ("SLURM_NNODES=4", "SLURM_NODEID=3", "MASTER_ADDR=10.0.0.9", "MASTER_PORT=4000")


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (GOOD, (), ("2", "0", "6", "10.0.0.1", "29500")),
        ([], BY_SLURM, ("4", "3", "12", "10.0.0.9", "4000")),
        ([*GOOD, "--main_process_port", "5000", "--num_processes", "2"], BY_SLURM, ("2", "0", "4", "10.0.0.1", "5000")),
        ([], ("NNODES=2", "NODE_RANK=1", "MASTER_ADDR=head"), ("2", "1", "6", "head", "29500")),
        ([], ("SLURM_NNODES=2", "SLURM_NODEID=1", "SLURM_JOB_NODELIST=node[7-8]"), ("2", "1", "6", "node7", "29500")),
    ],
)
def test_multi_node_finds_its_place(
    config: Path, programs: Path, arguments: list[str], environment: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    """Arguments come before the scheduler's environment; accelerate is told the total of processes."""
    flags, _ = passed_on(start(["bash", LAUNCH / "multi_node.sh", *arguments, config], *environment, programs=programs))
    names = ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port")
    assert tuple(flags[name] for name in names) == expected


# --------------------------------------------------------------------------------------------------- files as such


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    """bash can parse every script, and shellcheck, where it is installed, has nothing to say."""
    assert run(["bash", "-n", script]).stderr == ""
    if shutil.which("shellcheck"):
        assert run(["shellcheck", "--external-sources", script]).stdout == ""


@pytest.mark.parametrize(
    ("name", "distributed_type", "num_machines", "num_processes"),
    [
        ("one_process", DistributedType.NO, 1, 1),
        ("two_cpu_processes", DistributedType.MULTI_GPU, 1, 2),
        ("eight_gpus", DistributedType.MULTI_GPU, 1, 8),
        ("two_nodes", DistributedType.MULTI_GPU, 2, 16),
    ],
)
def test_accelerate_reads_its_configurations(name: str, distributed_type: str, num_machines: int, num_processes: int) -> None:
    """Each file is what its name says to accelerate's own reader, and leaves precision and compilation to the run."""
    path = LAUNCH / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_machines, config.num_processes) == (distributed_type, num_machines, num_processes)
    assert (config.mixed_precision, config.use_cpu, config.machine_rank) == ("no", False, 0)
    assert not config.dynamo_config and not config.fsdp_config and not config.deepspeed_config
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file launch/accelerate/{name}.yaml" in comment
    assert "-m imagenet_swa.train --config configs/" in comment


def test_every_configuration_of_accelerate_is_tested() -> None:
    """The folder holds the four files of the test above."""
    names = {path.stem for path in (LAUNCH / "accelerate").iterdir()}
    assert names == {"one_process", "two_cpu_processes", "eight_gpus", "two_nodes"}


# ------------------------------------------------------------------------------------------------------- real runs


def test_a_project_folder_with_a_space_and_a_hostile_home(tmp_path: Path) -> None:
    """A run works from a copy of the project in a folder with a space, whatever accelerate's file in the user's home says.

    And outside a checkout it says that it knows no commit.
    """
    project = tmp_path / "my project"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("launch", "imagenet_swa"):
        shutil.copytree(PROJECT / folder, project / folder, ignore=ignored)
    config = project / "my config.yaml"
    config.write_text("output: the run\n")
    home = tmp_path / "huggingface"
    (home / "accelerate").mkdir(parents=True)
    hostile = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 8, "mixed_precision": "fp16"}
    (home / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(hostile))
    command = ["bash", project / "launch" / "single_node.sh", config.name, *SHORT_RUN]
    process = run(["env", "-C", project, "CUDA_VISIBLE_DEVICES=", f"HF_HOME={home}", *command])
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    record = json.loads((project / "the run" / "environment.json").read_text())
    assert (record["world_size"], record["git"]) == (1, None)
    assert record["command"][0] == str(project / "imagenet_swa" / "train.py")
    assert (project / "the run" / "swa.safetensors").is_file()


# ------------------------------------------------------------------------------------------- scripts that go on after a run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_scripts_pass_signals_on(tmp_path: Path, number: signal.Signals) -> None:
    """A signal for a script alone reaches its command while it runs, INT as itself and the others as USR1, and the command's own
    exit code is the script's.
    """
    (tmp_path / "rank.py").write_text(RANK)
    script = (
        'set -eu; source launch/stoppable.sh; code=0; stoppable "$@" || code=$?; echo "code $code" >"$NOTES/code"; exit "$code"'
    )
    command = [sys.executable, "launch/supervise.py", sys.executable, tmp_path / "rank.py", "wait"]
    launched = Launched(tmp_path, ["bash", "-c", script, "script", *command])
    launched.wait_for("begun 0", 0)
    launched.send(number)
    assert launched.finish()[0] == 85
    assert launched.notes() == ["begun 0", "SIGINT" if number == signal.SIGINT else "SIGUSR1"]
    assert (tmp_path / "code").read_text() == "code 85\n"


@pytest.mark.parametrize(
    ("code", "count", "requeued"), [(0, "", 0), (1, "", 0), (2, "", 0), (137, "", 0), (85, "", 1), (85, "99", 1), (85, "100", 0)]
)
@pytest.mark.parametrize("script", ["slurm.sbatch", "study.sbatch"])
def test_slurm_requeues_what_was_stopped(tmp_path: Path, script: str, code: int, count: str, requeued: int) -> None:
    """After 85, and no other exit code, a job is put back into the queue, at most a hundred times; the code is passed on."""
    programs = tmp_path / "programs"
    scontrol(programs, "here", "127.0.0.1", "")
    program(programs, "scontrol", f'[ "$1" = show ] && echo here || echo "$*" >>{tmp_path}/scontrol')
    program(programs, "srun", f'echo "$*" >{tmp_path}/srun; exit {code}')
    program(programs, "imagenet-swa", "echo --seed=3")
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "launch" / "single_node.sh").write_text(f"exit {code}\n")
    (tmp_path / "grid.yaml").write_text("")
    job = [
        "SLURM_JOB_ID=4711",
        "SLURM_JOB_NODELIST=here",
        "SLURM_ARRAY_TASK_ID=1",
        *([f"SLURM_RESTART_COUNT={count}"] if count else []),
    ]
    process = start(["env", "-C", tmp_path, "bash", f"launch/{script}", "grid.yaml", "--seed", "1"], *job, programs=programs)
    assert process.returncode == code, process.stderr
    asked = (tmp_path / "scontrol").read_text().splitlines() if (tmp_path / "scontrol").exists() else []
    assert asked == ["requeue 4711"] * requeued
    assert ("MAX_REQUEUES" in process.stderr) == (code == 85 and not requeued)
    if script == "slurm.sbatch":
        flags, command = (tmp_path / "srun").read_text().strip().split(" bash ")
        assert flags.split() == ["--kill-on-bad-exit=0", "--wait=120"]
        assert command == "launch/multi_node.sh grid.yaml --seed 1"


def test_slurm_is_told_to_signal_and_requeue() -> None:
    """The jobs ask for USR1 in time, the one without srun for its own shell, for a requeue, and for one log."""
    for script, sent in (("slurm.sbatch", "USR1@300"), ("study.sbatch", "B:USR1@300")):
        lines = (LAUNCH / script).read_text().splitlines()
        options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
        assert {f"--signal={sent}", "--requeue", "--open-mode=append"} <= set(options)
        assert lines.index("set -euo pipefail") > max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))


def free_port() -> int:
    """A port that slurm.sbatch can come to from a job's number."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    pytest.fail("no free port between 20000 and 32000")


# Two nodes on this machine. Signals go on to both tasks, but TERM, at which the real one ends a job at once.
SRUN = """
shift 2
echo "$SRUN_CPUS_PER_TASK" >{folder}/cores
export SLURM_STEP_NUM_TASKS=2
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
trap 'kill -KILL $first $second; exit 137' TERM
codes=()
for task in $first $second; do
    while true; do code=0; wait $task || code=$?; kill -0 $task 2>/dev/null || break; done
    code=0; wait $task || code=$?
    codes+=($code)
done
printf '%s\\n' "${{codes[@]}}" | sort -n | tail -1 >{folder}/code
exit "$(cat {folder}/code)"
"""


def test_a_slurm_job_on_two_nodes(tmp_path: Path) -> None:
    """A job of two nodes that is preempted is put back into the queue, and its second start ends as if nothing had happened.

    slurm.sbatch starts a launcher on each node, which make one run of a process each, with the job's cores.
    """
    programs, out = tmp_path / "programs", tmp_path / "run"
    scontrol(programs, "here[0-1]", "127.0.0.1", "127.0.0.2")
    with (programs / "scontrol").open("a") as file:
        file.write(f'if [ "$1" = requeue ]; then echo "$2" >>{tmp_path}/requeued; fi\n')
    program(programs, "srun", SRUN.format(folder=tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\n")
    job_id = free_port() - 20000
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "here[0-1]", "SLURM_JOB_ID": str(job_id), "SLURM_CPUS_PER_TASK": "6"}
    one_thread = {"OMP_NUM_THREADS": "1"}
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = (*QUICK_RUN, "--data.synthetic_num_images=[160,40]", "--swa.num_epochs=2", "--log_every=1")

    def submit(**more: str) -> Launched:
        command = ["env", *(f"--unset={name}" for name in SCHEDULER), "bash", "launch/slurm.sbatch"]
        words = [*command[:-2], *(f"{name}={value}" for name, value in (job | more | one_thread).items()), *command[-2:]]
        return Launched(tmp_path, [*words, config, *settings, f"--output={out}"], PATH=path, GLOO_SOCKET_IFNAME="lo")

    first = submit()

    def has_begun() -> bool:
        metrics = out / "metrics.jsonl"
        return metrics.exists() and '"kind": "train"' in metrics.read_text()

    wait_until(lambda: has_begun() or first.process.poll() is not None, "the first step", 120)
    first.send(signal.SIGTERM)
    code, screen = first.finish()
    assert code == 85, screen
    assert (tmp_path / "requeued").read_text() == f"{job_id}\n"
    assert not (out / "swa.safetensors").exists()
    code, screen = submit(SLURM_RESTART_COUNT="1").finish(120)
    assert code == 0, screen
    assert (tmp_path / "requeued").read_text() == f"{job_id}\n"
    record = json.loads((out / "environment.json").read_text())
    assert (record["world_size"], record["local_world_size"]) == (2, 1)
    assert (tmp_path / "cores").read_text() == "6\n"
    whole = tmp_path / "whole"
    process = start(
        ["bash", LAUNCH / "single_node.sh", "--num_processes", "2", config, *settings, f"--output={whole}"], "OMP_NUM_THREADS=1"
    )
    assert process.returncode == 0, process.stderr
    for name in ("swa.safetensors", "captures/epoch-02.safetensors", "predictions/swa-epoch-02.parquet"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_slurm_job_from_elsewhere_is_refused(tmp_path: Path) -> None:
    """Submitted from another folder, the job says so in one line before it starts anything."""
    process = start(["env", "-C", tmp_path, "bash", LAUNCH / "slurm.sbatch"])
    assert process.returncode == 2
    assert process.stderr == f"slurm.sbatch: submit from the project's folder, not from {tmp_path}\n"


def test_launchers_that_start_fewer_processes_are_noticed(tmp_path: Path) -> None:
    """Where accelerate silently starts one process instead of two, by flags or by its file, the run is refused in one line."""
    cpus = tmp_path / "cpus.yaml"
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_machines": 1, "num_processes": 2}
    cpus.write_text(yaml.safe_dump(settings | {"use_cpu": True, "machine_rank": 0, "mixed_precision": "no"}))
    ways = [("--cpu", "--num_processes", "2"), ("--config_file", str(cpus))]

    def launch(way: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        program = ("-m", "imagenet_swa.train", *SHORT_RUN, f"--output={tmp_path}/out")
        return start(["accelerate", "launch", *way, *program])

    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(launch, ways))
    for process in processes:
        assert process.returncode != 0
        (line,) = [line for line in process.stderr.splitlines() if "error:" in line]
        assert line.startswith("imagenet-swa: error: 2 processes were asked for, but this run has 1: ")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- Kubernetes

JOB = LAUNCH / "kubernetes" / "trainjob.yaml"
FREE_FORM = ("labels", "requests", "limits")  # whose keys the schema does not know


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(JOB.read_text()))


def misfits(document: dict[str, Any]) -> list[str]:
    """What Kubeflow Trainer's own models refuse or do not know in an object."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="the extra `dev` has kubeflow-trainer-api")
    try:
        known = getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document).to_dict()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return [str(error)]
    return list(differences(document, known, ""))


def differences(a: object, b: object, where: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from differences(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif a != b:
        yield where


def misspellings(node: object) -> Iterator[Callable[[], None]]:
    """For each field below a node a function that changes its name a little, and back when called again."""
    if isinstance(node, list):
        for item in node:
            yield from misspellings(item)
    elif isinstance(node, dict):
        for key in list(node):

            def toggle(key: str = key) -> None:
                there, other = (key, key + "s") if key in node else (key + "s", key)
                node[other] = node.pop(there)

            yield toggle
            if key not in FREE_FORM:
                yield from misspellings(node[key])


def test_the_kubernetes_job_fits_its_schema() -> None:
    """Kubeflow Trainer's models know every field of the file, and each value has the field's type."""
    assert [document["kind"] for document in objects()] == ["TrainingRuntime", "TrainJob"]
    for document in objects():
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert misfits(document) == []


def test_a_wrong_kubernetes_job_is_noticed() -> None:
    """The check above notices each single field that is misspelt, and a value of another type."""
    number = 0
    for document in objects():
        for toggle in misspellings(document):
            toggle()
            assert misfits(document), document
            toggle()
            assert misfits(document) == []
            number += 1
    assert number > 60
    _, job = objects()
    job["spec"]["trainer"]["numNodes"] = "2"
    assert misfits(job)


def test_the_kubernetes_job_follows_the_exit_codes() -> None:
    """2 fails the job, 85 and disruptions start a new pod without counting, and there is time to save; names that refer to each
    other agree, and memory is mounted at /dev/shm.
    """
    runtime, job = objects()
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert job["spec"]["runtimeRef"] == reference
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    action = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"containerName": "node", "operator": "In", "values": [None]})
        assert (codes["containerName"], codes["operator"]) == (container["name"], "In")
        action |= {code: rule["action"] for code in codes["values"] if code not in action}
    assert action == {2: "FailJob", 85: "Ignore", None: "Ignore"}
    assert pod["restartPolicy"] == "Never"
    assert spec["backoffLimit"] > 0
    assert pod["terminationGracePeriodSeconds"] >= 120
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in mounts["/data"]
    words = job["spec"]["trainer"]["args"][0].split()
    assert all(word.startswith("/data/") for word in words if word.startswith("/"))
    assert (PROJECT / words[words.index("launch/multi_node.sh") + 1]).is_file()


def test_the_kubernetes_job_starts_a_launcher(programs: Path) -> None:
    """The job's command hands the place that Kubeflow gives a pod to accelerate, without a shell in between."""
    _, job = objects()
    trainer = job["spec"]["trainer"]
    place = ("PET_NNODES=2", "PET_NODE_RANK=1", "PET_MASTER_ADDR=resnet50-node-0-0.resnet50", "PET_MASTER_PORT=29400")
    flags, words = passed_on(start([*trainer["command"], *trainer["args"]], *place, programs=programs))
    names = ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port")
    assert tuple(flags[name] for name in names) == ("2", "1", "6", "resnet50-node-0-0.resnet50", "29400")
    assert words[:4] == ["-m", "imagenet_swa.train", "--config", "configs/resnet50.yaml"]
    assert " exec bash launch/" in trainer["args"][0]
