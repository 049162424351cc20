"""Checks everything that a run needs before it starts, a line each."""

import shutil
import time
from collections.abc import Callable
from importlib import metadata
from typing import TypeVar

import torch

from imagenet_swa.config import Config, InputError, Preprocessing
from imagenet_swa.data import imagenet, resize
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.loaders import build_indices, build_loaders, hold_out
from imagenet_swa.data.sampling import evaluation_batches, training_batches
from imagenet_swa.files import existing
from imagenet_swa.models import batchnorm_layers, check_forward, load_pretrained, resolve_preprocessing
from imagenet_swa.plan import make_plan
from imagenet_swa.results import compare_with_published
from imagenet_swa.runtime import Runtime, num_cpus, start_runtime
from imagenet_swa.session import evaluate_network

GIB = 2**30
T = TypeVar("T")


class _Examination:
    """Runs checks, prints what each found, and remembers whether all passed. Main process prints."""

    def __init__(self) -> None:
        self.healthy = True
        self.runtime: Runtime | None = None

    def check(self, title: str, examine: Callable[[], tuple[str, T]]) -> T | None:
        """One check: its finding and its value, or None after a failure."""
        try:
            finding, value = examine()
        except InputError as error:
            self.healthy = False
            self._print("FAIL", title, str(error), every_rank=error.concerns_one_rank)
            return None
        self._print(" ok ", title, finding)
        return value

    def warn(self, title: str, finding: str) -> None:
        """Something that a run survives and its owner may not want."""
        self._print("warn", title, finding)

    def on_all_ranks(self, passed: bool) -> bool:
        """Whether a check passed everywhere: what follows needs every rank."""
        assert self.runtime is not None
        failures = self.runtime.sum(torch.tensor([int(not passed)], device=self.runtime.device))
        self.healthy &= failures.item() == 0
        return failures.item() == 0

    def _print(self, verdict: str, title: str, finding: str, *, every_rank: bool = False) -> None:
        if every_rank or self.runtime is None or self.runtime.is_main:
            print(f"[{verdict}] {title}: {finding}", flush=True)


def examine(config: Config, *, measure_baseline: bool = True) -> bool:
    """Check launcher, GPUs, DALI, data, network, batches, decoding and disk; measure the baseline. True if all passed."""
    examination = _Examination()
    runtime = examination.check("processes", lambda: _processes(config))
    if runtime is None:
        return False
    examination.runtime = runtime
    examination.check("DALI", lambda: _dali(config))
    if not resize.available() and config.data.backend == "dali" and not config.data.synthetic:
        examination.warn(
            "compiled part",
            "not built: on the CPU, DALI resizes and restart markers are not used, which is slower; install a C "
            "compiler (gcc or clang) and the package again",
        )
    indices = examination.check("images", lambda: _images(config, runtime))
    if indices is not None:
        for finding in _unlike_imagenet(config, indices):
            examination.warn("images", finding)
    loaded = examination.check("network", lambda: _network(config))
    if loaded is not None:
        examination.check("disk", lambda: _disk(config, loaded[1], len(indices[0]) if indices else 0))
    if indices is not None and loaded is not None:
        examination.check("batches", lambda: (_batches(config, indices, runtime), None))
        decoded = examination.check("decoding", lambda: _decoding(config, indices, loaded[0], runtime))
        if examination.on_all_ranks(bool(decoded)) and measure_baseline:
            examination.check("baseline", lambda: _baseline(config, loaded[0]))
    return examination.healthy


def _processes(config: Config) -> tuple[str, Runtime]:
    runtime = start_runtime(config)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ", ".join(gpus) if gpus else f"no GPU, {num_cpus()} CPU cores"
    return f"{runtime.world_size} started; {devices}; torch {torch.__version__}", runtime


def _dali(config: Config) -> tuple[str, None]:
    if config.data.synthetic or config.data.backend != "dali":
        return "not used by this configuration", None
    try:
        import nvidia.dali
    except ImportError as error:
        raise InputError(f"cannot be imported ({error}); install the extra dali-cuda13 or dali-cuda12") from None
    names = [d.metadata["Name"] for d in metadata.distributions() if (d.metadata["Name"] or "").startswith("nvidia-dali-cuda")]
    return f"{nvidia.dali.__version__} ({', '.join(names)}), torch built for CUDA {torch.version.cuda}", None


def _images(config: Config, runtime: Runtime) -> tuple[str, tuple[ImageIndex, ImageIndex]]:
    start = time.perf_counter()
    train, val = build_indices(config, runtime)
    indices = hold_out(train, config.data.num_held_out)[0], val
    counts = [f"{len(index):,} of {len(set(index.labels.tolist()))} classes" for index in indices]
    return f"training {counts[0]}, validation {counts[1]}, read in {time.perf_counter() - start:.1f} s", indices


def _unlike_imagenet(config: Config, indices: tuple[ImageIndex, ImageIndex]) -> list[str]:
    if config.model.num_classes != imagenet.NUM_CLASSES or config.data.synthetic:
        return []
    expected = (("training", imagenet.NUM_TRAIN), ("validation", imagenet.NUM_VAL))
    return [
        f"{len(index):,} {split} images, ImageNet-1k has {number:,}"
        for index, (split, number) in zip(indices, expected, strict=True)
        if len(index) != number
    ]


def _network(config: Config) -> tuple[str, tuple[Preprocessing, float]]:
    network = load_pretrained(config.model)
    preprocessing = resolve_preprocessing(config.model, config.preprocessing, network)
    check_forward(network, preprocessing.image_size, config.model)
    mib = sum(t.nbytes for t in network.state_dict().values()) / 2**20
    num_layers = len(batchnorm_layers(network))
    finding = (
        f"{config.model.library} {config.model.name}, {mib:.1f} MiB, {num_layers} BatchNorm layers; {preprocessing.describe()}"
    )
    return finding, (preprocessing, mib)


def _disk(config: Config, mib: float, num_images: int) -> tuple[str, None]:
    """Captures, two averages per report, the final one, the pretrained weights, and checkpoints of weights, momentum, average,
    pretrained weights.
    """
    swa = config.swa
    cycle_steps, num_steps = swa.cycle_steps, swa.num_epochs * (num_images // config.global_batch_size)
    num_captures = swa.num_epochs // swa.cycle_epochs if cycle_steps is None else num_steps // cycle_steps
    copies = num_captures + 2 * len(swa.epochs_to_report) + 1 + swa.averages + 4 * (config.checkpoint.keep + 1)
    needed, free = copies * mib * 2**20, shutil.disk_usage(existing(config.output)).free
    if free < needed:
        raise InputError(f"{config.output} has {free / GIB:.1f} GiB free, this run needs about {needed / GIB:.1f} GiB")
    return f"{free / GIB:.1f} GiB free at {config.output}, this run needs about {needed / GIB:.2f} GiB", None


def _batches(config: Config, indices: tuple[ImageIndex, ImageIndex], runtime: Runtime) -> str:
    """The arithmetic of the batches; raises InputError where it does not work out."""
    return make_plan(config, num_images=len(indices[0]), world_size=runtime.world_size).describe()


def _decoding(
    config: Config, indices: tuple[ImageIndex, ImageIndex], preprocessing: Preprocessing, runtime: Runtime
) -> tuple[str, bool]:
    loaders = build_loaders(config, indices, preprocessing, runtime)
    plan = make_plan(config, num_images=len(indices[0]), world_size=runtime.world_size)
    batches = training_batches(
        plan.num_images,
        seed=config.seed,
        epoch=0,
        global_batch_size=plan.global_batch_size,
        batch_size_per_device=plan.batch_size_per_device,
        rank=runtime.rank,
        world_size=runtime.world_size,
    ).reshape(-1, plan.batch_size_per_device)[:4]
    start = time.perf_counter()
    shapes = [tuple(batch.images.shape) for batch in loaders.train.training_stream(batches, epoch=0)]
    rate = batches.size / (time.perf_counter() - start)
    some = evaluation_batches(len(indices[1]), rank=runtime.rank, world_size=runtime.world_size, batch_size=8)[:1]
    shapes += [tuple(batch.images.shape) for batch in loaders.val.evaluation_stream(some)]
    return f"batches of shape {shapes[0]} by {loaders.train.decoder}; {rate:.0f} images/s per process at first, cold", True


def _baseline(config: Config, preprocessing: Preprocessing) -> tuple[str, None]:
    evaluation = evaluate_network(config)
    top1 = evaluation.num_correct / evaluation.num_images
    finding = compare_with_published(config, preprocessing, top1, evaluation.num_images).strip()
    if "DIFFERS" in finding:
        raise InputError(finding)
    return finding, None
