"""Two and four ranks against one: real runs by the launchers, on CPUs, and with `gpu` on two GPUs.

Fine-tuning starts from a weights file, as it does in earnest. The network has GroupNorm where its sibling has BatchNorm, which
would see batches of another size.
"""

import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import QUICK_RUN, index_folder, run
from launched import processes_with
from safetensors.torch import load_file, save_file

from imagenet_swa.data.sampling import training_batches

Weights = dict[str, torch.Tensor]

# Ranks add the same fp32 numbers in another order. After six steps differences of 1e-6 were seen; the weights move by 0.05.
TOLERANCE = 1e-5
MOVED_AT_LEAST = 100 * TOLERANCE

SETTINGS = (
    "--model.name=test_efficientnet_gn",
    "--model.num_classes=3",
    "--preprocessing.image_size=32",
    "--swa.num_epochs=2",
    "--swa.report_epochs=[2]",
    "--swa.lr_max=0.01",
    "--swa.lr_min=0.001",
    "--evaluation.batch_size=16",
    "--log_every=1",
)
SYNTHETIC = ("--data.synthetic", "--data.synthetic_num_images=[48,41]", "--global_batch_size=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file go, with the configuration and the weights that they start from."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet_gn", num_classes=3).state_dict(), folder / "start.safetensors")
    (folder / "config.yaml").write_text(f"seed: 1\nmodel:\n  weights: {folder}/start.safetensors\n")
    return folder


def on_cpu(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = [f"{name}={value}" for name, value in environment.items()]
    return run(["env", "CUDA_VISIBLE_DEVICES=", *settings, *command])


def single_node(num_processes: int, folder: Path, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["bash", "launch/single_node.sh", "--num_processes", str(num_processes), folder / "config.yaml"]
    return on_cpu(*launcher, *settings, **environment)


def finished(process: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    return process


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Path:
    out = folder / "one"
    launcher = ["accelerate", "launch", "--config_file", "launch/accelerate/one_process.yaml", "-m", "imagenet_swa.train"]
    finished(on_cpu(*launcher, "--config", folder / "config.yaml", *SETTINGS, *SYNTHETIC, f"--output={out}"))
    return out


# Found by Python before any other module; notes which rank opens for writing, makes, renames or removes what.
SPY = """
import os, sys

def spy(event, arguments):
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    if event == "open" and not (isinstance(arguments[1], str) and set("wax+") & set(arguments[1])):
        return
    if str(arguments[0]).startswith(os.environ["SPY_ON"]):
        line = os.environ["RANK"] + " " + event + " " + str(arguments[0]) + "\\n"
        os.write(log, line.encode())

if "RANK" in os.environ:
    log = os.open(os.environ["SPY_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(spy)
"""


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    out = folder / "two"
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    spying = {"PYTHONPATH": str(folder / "spy"), "SPY_ON": str(out), "SPY_LOG": str(folder / "spy" / "log")}
    finished(single_node(2, folder, *SETTINGS, *SYNTHETIC, f"--output={out}", **spying))
    return out


# ---------------------------------------------------------------------------------------------------- comparisons


def largest_difference(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_same_training(a: Path, b: Path, start: Weights) -> None:
    names = [path.relative_to(a) for path in (*sorted(a.glob("captures/*")), a / "swa.safetensors")]
    assert len(names) == 3
    for name in names:
        weights = load_file(a / name)
        assert largest_difference(weights, start) > MOVED_AT_LEAST
        assert largest_difference(weights, load_file(b / name)) < TOLERANCE, name


def assert_same_results(a: Path, b: Path, num_images: int) -> None:
    results, others = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    assert len(results) == 5  # pretrained, two captures, two averages
    for result, other in zip(results, others, strict=True):
        counts = ("name", "epoch", "step", "num_images", "num_correct", "num_correct_top5", "top1", "top5")
        assert [result[key] for key in counts] == [other[key] for key in counts]
        assert result["num_images"] == num_images
        assert result["nll"] == pytest.approx(other["nll"], abs=1e-4)


def environment_of(run_folder: Path) -> dict:
    return json.loads((run_folder / "environment.json").read_text())


def metrics_of(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- two ranks and one


def test_two_ranks_train_to_the_weights_of_one(folder: Path, one_rank: Path, two_ranks: Path) -> None:
    """Two ranks train to the same captures and average as one with the same global batch, but for rounding."""
    assert_same_training(one_rank, two_ranks, load_file(folder / "start.safetensors"))


def test_two_ranks_measure_what_one_measures(one_rank: Path, two_ranks: Path) -> None:
    """Evaluation counts every image once on any number of ranks: 41 images are no multiple of two."""
    assert environment_of(one_rank)["world_size"] == 1
    assert environment_of(two_ranks)["world_size"] == environment_of(two_ranks)["local_world_size"] == 2
    assert_same_results(one_rank, two_ranks, num_images=41)


def test_two_ranks_log_the_loss_of_the_whole_batch(one_rank: Path, two_ranks: Path) -> None:
    """The logged loss is the mean over the global batch, whoever computed which part of it, and logged once."""
    losses = [[line["loss"] for line in metrics_of(folder) if line["kind"] == "train"] for folder in (one_rank, two_ranks)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_run_folder_is_the_same_for_any_number_of_ranks(one_rank: Path, two_ranks: Path) -> None:
    """A run leaves the same files behind, none of them half-written, and each line of the log once."""
    files = [{str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} for out in (one_rank, two_ranks)]
    assert files[0] == files[1]
    assert not any(name.endswith(".partial") for name in files[0])
    assert {"environment.json", "report.md", "results.json", "swa.safetensors", "config.yaml"} <= files[0]
    lines = [(out / "train.log").read_text().splitlines() for out in (one_rank, two_ranks)]
    assert len(lines[0]) == len(lines[1])


def test_only_rank_0_writes(folder: Path, two_ranks: Path) -> None:
    """No other rank creates, opens for writing, renames or removes anything in the run folder."""
    lines = (folder / "spy" / "log").read_text().splitlines()
    assert f"0 os.mkdir {two_ranks}" in lines
    assert any(line.startswith("0 open ") for line in lines)
    assert [line for line in lines if not line.startswith("0 ")] == []


def test_images_from_files_with_accumulation(folder: Path, image_folder: Path) -> None:
    """Two ranks that accumulate two batches of two JPEGs each train to the weights of one rank with batches of eight."""
    data = (f"--data.train={image_folder}/train", f"--data.val={image_folder}/val", "--global_batch_size=8")
    alone = ("python", "-m", "imagenet_swa.train", "--config", folder / "config.yaml")
    finished(on_cpu(*alone, *SETTINGS, *data, f"--output={folder}/dali-one"))
    accumulation = "--speed.max_batch_size_per_device=2"
    two = finished(single_node(2, folder, *SETTINGS, *data, accumulation, f"--output={folder}/dali-two"))
    assert "2 per device x 2 processes x 2 accumulated = 8" in two.stderr
    assert_same_training(folder / "dali-one", folder / "dali-two", load_file(folder / "start.safetensors"))
    assert_same_results(folder / "dali-one", folder / "dali-two", num_images=12)


# ------------------------------------------------------------------------------------------------------ BatchNorm


@pytest.fixture(scope="module")
def batchnorm_run(folder: Path) -> tuple[Path, str]:
    """Two ranks from random weights, by accelerate's own launcher: run folder and stdout."""
    out = folder / "batchnorm"
    launcher = ["accelerate", "launch", "--config_file", "launch/accelerate/two_cpu_processes.yaml", "-m", "imagenet_swa.train"]
    short = ("--data.synthetic_num_images=[64,41]", "--swa.num_epochs=2")
    return out, finished(on_cpu(*launcher, *QUICK_RUN, *short, f"--output={out}")).stdout


def test_with_batchnorm_two_ranks_run_through_to_the_table(batchnorm_run: tuple[Path, str]) -> None:
    """A BatchNorm network on two ranks ends with the table, once, and with counts of the whole validation set."""
    out, stdout = batchnorm_run
    assert stdout.count("SWA (Alg. 1)") == 1
    assert environment_of(out)["world_size"] == 2
    assert [result["num_images"] for result in json.loads((out / "results.json").read_text())] == [41] * 5


@pytest.mark.parametrize(
    ("weights", "predictions"),
    [
        ("captures/epoch-01.safetensors", "capture-epoch-01"),
        ("captures/epoch-02.safetensors", "capture-epoch-02"),
        ("averages/swa-epoch-02.safetensors", "swa-epoch-02"),
        ("averages/swa-without-pretrained-epoch-02.safetensors", "swa-without-pretrained-epoch-02"),
        ("swa.safetensors", "swa-epoch-02"),
    ],
)
def test_all_ranks_hold_the_network_that_rank_0_saved(batchnorm_run: tuple[Path, str], weights: str, predictions: str) -> None:
    """Predictions of images that rank 1 evaluated (every second one) are those of the saved file, as rank 0's are.

    It covers the random start (in the average of Alg. 1), the mean of the ranks' moving statistics (captures) and the
    recomputed statistics (averages).
    """
    out, _ = batchnorm_run
    network = timm.create_model("test_efficientnet", num_classes=10)
    network.load_state_dict(load_file(out / weights))
    # The loader's picture i of noise, by its documented rule.
    pool = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        probabilities = network.eval()(pool[:41]).softmax(1)
    table = pq.read_table(out / "predictions" / f"{predictions}.parquet").to_pydict()
    assert table["index"] == list(range(41))
    expected = probabilities[torch.arange(41), torch.tensor(table["label"])]
    np.testing.assert_allclose(table["probability"], expected.numpy(), atol=1e-4)
    assert np.ptp(table["probability"]) > 0.01


# ------------------------------------------------------------------------------------------------- several machines


@contextmanager
def two_machines() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable, each as (name, interface, address)."""
    pid, subnet = os.getpid(), f"10.{os.getpid() % 199 + 50}.{os.getpid() // 199 % 250}"
    machines = [(f"swa-test-{pid}-{i}", f"swa{pid % 10**8}{'ab'[i]}", f"{subnet}.{i + 1}") for i in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)

    with ExitStack() as cleanup:
        for name, _, _ in machines:
            ip("netns", "add", name)
            cleanup.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, timeout=30)
        (name_a, interface_a, _), (name_b, interface_b, _) = machines
        cable = ["link", "add", interface_a, "netns", name_a, "type", "veth", "peer", "name", interface_b, "netns", name_b]
        ip(*cable)
        for name, interface, address in machines:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield machines


def on_both(machines: list[tuple[str, str, str]], commands: list[list[str | Path]], environments: list[dict[str, str]]) -> None:
    """Run a command on each machine at the same time."""
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(on_cpu, "ip", "netns", "exec", name, *command, GLOO_SOCKET_IFNAME=interface, **environment)
            for (name, interface, _), command, environment in zip(machines, commands, environments, strict=True)
        ]
        processes = [each.result() for each in runs]
    for process in processes:
        finished(process)
    assert "run folder:" in processes[0].stdout
    assert processes[1].stdout == ""


def assert_four_ranks(out: Path, one_rank: Path, folder: Path) -> None:
    assert (environment_of(out)["world_size"], environment_of(out)["local_world_size"]) == (4, 2)
    assert_same_training(one_rank, out, load_file(folder / "start.safetensors"))
    assert_same_results(one_rank, out, num_images=41)


@pytest.mark.network_namespaces
@pytest.mark.slow
def test_two_machines_told_by_arguments(folder: Path, one_rank: Path) -> None:
    """Two machines of two processes, rank and address given as arguments, train to the weights of one process."""
    out = folder / "machines-arguments"
    settings = [folder / "config.yaml", *SETTINGS, *SYNTHETIC, f"--output={out}"]
    with two_machines() as machines:
        launcher = ["bash", "launch/multi_node.sh", "--num_machines", "2", "--num_processes", "2"]
        launcher += ["--main_process_ip", machines[0][2]]
        commands = [[*launcher, "--machine_rank", str(rank), *settings] for rank in range(2)]
        on_both(machines, commands, [{}, {}])
    assert_four_ranks(out, one_rank, folder)


@pytest.mark.network_namespaces
def test_two_machines_told_by_the_scheduler(folder: Path, one_rank: Path) -> None:
    """The same with number, rank, address and port in the scheduler's environment."""
    out = folder / "machines-scheduler"
    command = ["bash", "launch/multi_node.sh", "--num_processes", "2", folder / "config.yaml", *SETTINGS, *SYNTHETIC]
    with two_machines() as machines:
        common = {"SLURM_NNODES": "2", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": machines[0][2], "MASTER_PORT": "23456"}
        environments = [common | {"SLURM_NODEID": str(rank)} for rank in range(2)]
        on_both(machines, [[*command, f"--output={out}"]] * 2, environments)
    assert_four_ranks(out, one_rank, folder)


# ---------------------------------------------------------------------------------------------------------- errors


def test_a_batch_that_does_not_divide_is_refused_once(folder: Path) -> None:
    """A global batch that does not divide over the processes is refused in one line that names both, printed by one rank."""
    process = single_node(2, folder, *SETTINGS, *SYNTHETIC, "--global_batch_size=15", f"--output={folder}/odd")
    assert process.returncode != 0
    (line,) = [line for line in process.stderr.splitlines() if "error:" in line]
    assert "global_batch_size 15 does not divide over 2 processes" in line
    assert "set it to 14 or 16" in line


def test_an_image_that_only_rank_1_reads_ends_the_run(folder: Path, image_folder: Path) -> None:
    """A damaged file that only one rank meets ends all ranks soon, with the file's name and without processes left behind."""
    index = index_folder(image_folder / "train")
    batches = training_batches(len(index), seed=1, epoch=0, global_batch_size=8, batch_size_per_device=4, rank=1, world_size=2)
    bad = Path(index.path(batches[0, 0, 0]))
    marker = f"SWA_TEST_{uuid.uuid4().hex}"
    whole = bad.read_bytes()
    bad.write_text("<html>not found</html>")
    try:
        data = (f"--data.train={image_folder}/train", f"--data.val={image_folder}/val", "--global_batch_size=8")
        process = single_node(2, folder, *SETTINGS, *data, f"--output={folder}/damaged", **{marker: "1"})
    finally:
        bad.write_bytes(whole)
    assert process.returncode != 0
    (line,) = [line for line in process.stderr.splitlines() if "error [rank" in line]
    assert line.startswith(f"imagenet-swa: error [rank 1]: cannot decode the image {bad}")
    deadline = time.monotonic() + 10
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(marker) == []


# ------------------------------------------------------------------------------------- SyncBatchNorm, half precision

# SyncBatchNorm trains on GPUs only, but its evaluation mode runs anywhere.
CONVERTED = """
import sys
from pathlib import Path
import torch
from torch import nn
from imagenet_swa import runtime
from imagenet_swa.config import Config, DataConfig, ModelConfig, PreprocessingConfig
from imagenet_swa.run import Run

runtime.check_precision = lambda *_, **__: None
model = ModelConfig(name="test_efficientnet", pretrained=False, num_classes=10, sync_batchnorm=True)
small = PreprocessingConfig(image_size=32)
run = Run.start(Config(output=Path(sys.argv[1]), model=model, data=DataConfig(synthetic=True), preprocessing=small))
images = torch.randn(2, 3, 32, 32)
with torch.inference_mode():
    print(float((run.state.network.eval()(images) - run.session.network.eval()(images)).abs().max()))
print(sum(isinstance(layer, nn.SyncBatchNorm) for layer in run.state.network.modules()))
"""


def test_synchronised_batchnorm_changes_no_other_layer(folder: Path) -> None:
    """With model.sync_batchnorm the network computes what it did, activations that timm fuses with BatchNorm included."""
    process = on_cpu("python", "-c", CONVERTED, folder / "converted")
    assert process.returncode == 0, process.stderr
    difference, num_layers = process.stdout.split()
    assert float(difference) < 1e-5
    assert int(num_layers) == 13


@pytest.mark.gpu
def test_synchronised_batchnorm_closes_the_gap(folder: Path) -> None:
    """With model.sync_batchnorm two GPUs train a BatchNorm network to the weights of one GPU with the same global batch.

    In full fp32 and over few steps, so that rounding has no time to grow.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip(f"wants two GPUs, found {torch.cuda.device_count()}")
    torch.manual_seed(0)
    start = timm.create_model("test_efficientnet", num_classes=3).state_dict()
    save_file(start, folder / "batchnorm.safetensors")
    network = ("--model.name=test_efficientnet", f"--model.weights={folder}/batchnorm.safetensors", "--speed.tf32=false")
    outs = []
    for num_processes, sync in ((1, "true"), (2, "true"), (2, "false")):
        outs.append(folder / f"gpu-{num_processes}-{sync}")
        settings = (*SETTINGS, *SYNTHETIC, *network, f"--model.sync_batchnorm={sync}", f"--output={outs[-1]}")
        launcher = ["bash", "launch/single_node.sh", "--num_processes", str(num_processes), folder / "config.yaml"]
        process = run([*launcher, *settings])
        assert process.returncode == 0, process.stderr
    one, two, apart = (load_file(out / "captures" / "epoch-02.safetensors") for out in outs)
    assert largest_difference(one, start) > 0.01
    assert largest_difference(one, two) < 1e-3
    assert largest_difference(one, apart) > 10 * largest_difference(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_on_a_gpu(folder: Path, precision: str) -> None:
    """Training and evaluation in half precision finish on a GPU with finite results and fp32 weights."""
    out = folder / precision
    settings = (*QUICK_RUN, f"--speed.precision={precision}", f"--evaluation.precision={precision}", f"--output={out}")
    process = run(["python", "-m", "imagenet_swa.train", *settings])
    assert process.returncode == 0, process.stderr
    assert environment_of(out)["device"].startswith("cuda")
    assert all(np.isfinite(result["nll"]) for result in json.loads((out / "results.json").read_text()))
    assert all(np.isfinite(line["loss"]) for line in metrics_of(out) if line["kind"] == "train")
    weights = load_file(out / "swa.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}
