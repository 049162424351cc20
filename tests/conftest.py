"""Data sets, weights and launchers that several tests use.

Real ImageNet images and weights are found through IMAGENET_SWA_TEST_DATA, a folder that holds `imagenet-mini/` (train, val,
train.txt, val.txt) and `get_weights.py`, which writes mobilenet_v2.torchvision.safetensors and
tf_efficientnet_lite0.timm.safetensors; by default `../shared/data` beside the project.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from PIL import Image

from imagenet_swa import stop
from imagenet_swa.config import InputError, Preprocessing
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.sources import Source, scan

settings.register_profile("any machine", deadline=None)  # no test is one of speed
settings.load_profile("any machine")

PROJECT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("IMAGENET_SWA_TEST_DATA", PROJECT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason on the screen, what this machine cannot run."""
    reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA GPU",
        "realdata": None if (REAL_DATA / "imagenet-mini").is_dir() else f"no real images at {REAL_DATA}",
        "network_namespaces": None if _can_make_namespaces() else "no right or no `ip` command to make network namespaces",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _can_make_namespaces() -> bool:
    name = f"swa-probe-{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.fixture(scope="module")
def on_the_cpu() -> Iterator[None]:
    """No GPU, whose sums do not repeat to the last bit, and one thread: more of them wait for each other where cores are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """Accelerate keeps the settings of the first run of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def nobody_asked_to_stop() -> Iterator[None]:
    """`imagenet-swa train` in this process takes over its signals, and would remember those of an earlier test."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    vars(stop.request).update(vars(stop.StopRequest()))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train (3 classes x 8) and DIR/val (3 classes x 4): JPEGs of noise around the class's own colour, of many sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, per_class in (("train", 8), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                height, width = random.integers(40, 120, 2)
                smooth = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
                smooth[..., label] = 220
                image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.JPEG", quality=95)
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder `imagenet-mini`; only in tests marked `realdata`."""
    return REAL_DATA / "imagenet-mini"


@pytest.fixture(scope="session")
def real_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real pretrained weights; only in tests marked `realdata`."""
    out = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, REAL_DATA / "get_weights.py", out], check=True, capture_output=True, timeout=300)
    return out


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size, such as 32m, in the folder, which is made; skips the test where nobody may mount one."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"no right to mount a file system: {mount.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def preprocessing(**changes: object) -> Preprocessing:
    """Small inputs whose normalisation leaves grey levels 0..255 as they are."""
    unit = Preprocessing(
        image_size=32,
        resize=36,
        interpolation="bilinear",
        train_interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
        crop_area=(0.08, 1.0),
        crop_aspect=(3 / 4, 4 / 3),
        horizontal_flip=True,
    )
    return replace(unit, **changes)  # pyright: ignore[reportArgumentType]


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Files of these contents below the folder, which is returned."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def one_line(call: Callable[..., object], *arguments: object) -> str:
    """The message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def index_folder(root: Path) -> ImageIndex:
    """The index of a folder of class folders."""
    return scan(Source("train", str(root)), num_classes=1000)[0]


def index_list(list_file: Path, root: Path, num_classes: int = 1000) -> ImageIndex:
    """The index of a list file whose paths start from `root`."""
    return scan(Source("train", str(root), str(list_file)), num_classes=num_classes)[0]


def index_names(root: Path, names: Sequence[bytes], labels: Sequence[int] | None = None) -> ImageIndex:
    """An index of files of these names, whatever they hold and whether they exist."""
    return make_index(str(root), list(names), list(labels or range(len(names))), [-1] * len(names))


def run(
    command: Sequence[str | Path], *, timeout: float = 180, cwd: Path = PROJECT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, in the project's folder, with this Python's programs first on the PATH.

    The result has stdout and stderr as text; a command that hangs fails the test after `timeout` seconds, with all it started.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"{command} still ran after {timeout} s\n{out[-2000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_ranks(work: Callable[[int, Path], None], num_ranks: int, folder: Path) -> None:
    """Call `work(rank, folder)` in a process of its own for each rank; fails unless all end well within 90 seconds."""
    context = multiprocessing.get_context("forkserver")  # imports torch once, for all ranks
    context.set_forkserver_preload(["imagenet_swa.batchnorm", "imagenet_swa.evaluate"])
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * num_ranks, "a rank failed or hung (None); see the captured output"


# Flags of a run that takes seconds on a CPU, without any data: 24 steps of a network with 13 BatchNorm layers.
QUICK_RUN = (
    "--data.synthetic",
    "--data.synthetic_num_images=[96,40]",
    "--model.name=test_efficientnet",
    "--model.pretrained=false",
    "--model.num_classes=10",
    "--preprocessing.image_size=32",
    "--global_batch_size=16",
    "--swa.num_epochs=4",
    "--swa.report_epochs=[2]",
    "--swa.lr_max=0.05",
    "--swa.lr_min=0.005",
    "--log_every=2",
    "--evaluation.batch_size=16",
)
