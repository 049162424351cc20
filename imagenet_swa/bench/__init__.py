"""How fast the loader is on this machine and these images, beside the loaders that people use instead of it.

Blocks of a fixed number of images, the candidates taking turns within one run; quotes the median over rounds of the ratios
to the reference within a round, since neighbours on a machine bend a rate and leave a ratio alone.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imagenet_swa.bench.alternatives import ALTERNATIVES, REFERENCE, Alternative, Mode, Stream, Work
from imagenet_swa.bench.measure import Candidate, empty_folder, measure, one_line
from imagenet_swa.bench.results import Block, images_per_second, summarise, write_results
from imagenet_swa.config import Config, InputError, Preprocessing, require, to_plain
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.loaders import build_indices, build_loaders
from imagenet_swa.data.sampling import epoch_order
from imagenet_swa.models import IMAGENET_MEAN, IMAGENET_STD
from imagenet_swa.runtime import Runtime, environment_record, num_cpus, start_runtime

MODES: tuple[Mode, ...] = ("train", "evaluation")
PACKAGES = ("spdl_io", "webdataset", "ffcv", "opencv-python", "opencv-python-headless", "numba", "pillow-simd")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Measurement of the loaders"""

    output: Path = Path("runs/bench")
    """Folder that loader.json, loader.md and loader.png go to, and the files that some loaders have to write first."""
    mode: Literal["train", "evaluation", "both"] = "both"
    """Random crops, central crops, or both."""
    candidates: tuple[str, ...] | None = None
    """Names of the loaders to measure, as the table shows them; default: all. The reference always is."""
    variants: tuple[str, ...] = ()
    """Other settings of ours to measure as well: "data.prefetch=4", several with spaces between, and a name for the table
    before them if wanted: "shards: data.train=/data/shards data.train_list=null"."""
    rounds: int = 5
    """Blocks per loader that are counted; a round before them is not."""
    num_images: int | None = None
    """Images per block; default: 512 per worker. Rounded up to whole batches of every worker."""
    batch_size: int | None = None
    """Images per batch; default: speed.max_batch_size_per_device."""

    def __post_init__(self) -> None:
        for name in ("rounds", "num_images", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"bench.{name} must be at least 1, got {value}")

    def flags_of_variants(self) -> dict[str, list[str]]:
        """Flags of each variant by the name that the table shows."""
        parts = [variant.rpartition(": ") for variant in self.variants]
        return {name or text: [f"--{setting}" for setting in text.split()] for name, _, text in parts}


def bench_preprocessing(config: Config) -> Preprocessing:
    """The configured preprocessing, blanks filled as for ResNet-50: a network's own would need its weights."""
    chosen = {name: value for name, value in vars(config.preprocessing).items() if value is not None}
    size = chosen.get("image_size", 224)
    own = {"image_size": size, "resize": size * 256 // 224, "interpolation": "bilinear"}
    return Preprocessing(**{**own, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, **chosen})


def _num_workers(config: Config) -> int:
    return num_cpus() if config.data.num_workers is None else config.data.num_workers


def cyclic_order(num_images: int, length: int, seed: int) -> np.ndarray:
    """(length,) image numbers in random order; every image once, then the same again, where there are not enough."""
    return np.resize(epoch_order(num_images, seed=seed, epoch=0), length)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What all candidates of a run share."""

    config: Config
    settings: BenchSettings
    runtime: Runtime
    folder: Path
    fail: Callable[[Mode, str, str], None]

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size or self.config.speed.max_batch_size_per_device

    @property
    def num_timed(self) -> int:
        """Batches per block: as many of every worker, which deliver in step."""
        workers = max(1, _num_workers(self.config))
        num_images = self.settings.num_images or 512 * workers
        return -(-num_images // (self.batch_size * workers)) * workers

    def wanted(self, name: str) -> bool:
        return self.settings.candidates is None or name in (*self.settings.candidates, REFERENCE)

    def variant(self, name: str, config: Config) -> list[Candidate]:
        """Our loader with other settings; none, with the reason, where these name no images."""
        try:
            return self.ours(name, config, build_indices(config))
        except InputError as error:
            for mode in self.modes:
                self.fail(mode, name, f"failed: {one_line(error)}")
            return []

    def ours(self, name: str, config: Config, indices: tuple[ImageIndex, ImageIndex]) -> list[Candidate]:
        """Our loader as configured, in every mode."""
        # Whatever holds batches, a queue or a number of workers: no more than this.
        capacity = config.data.prefetch * (max(1, _num_workers(config)) + 1) + 1
        length = (2 * capacity + self.num_timed) * self.batch_size

        def open_(mode: Mode, number: int) -> Stream:
            loaders = build_loaders(config, indices, bench_preprocessing(config), self.runtime)
            loader = loaders.train if mode == "train" else loaders.val
            batches = cyclic_order(len(loader.index.labels), length, config.seed).reshape(-1, self.batch_size)
            # Other crops in every round, as the alternatives draw them.
            stream = loader.training_stream(batches, epoch=number) if mode == "train" else loader.evaluation_stream(batches)
            for batch in stream:
                yield batch.images, batch.labels

        return [
            Candidate(mode=mode, name=name, output="float32", open=partial(open_, mode), capacity=capacity) for mode in self.modes
        ]

    @property
    def modes(self) -> tuple[Mode, ...]:
        return MODES if self.settings.mode == "both" else (self.settings.mode,)

    def alternatives(self, mode: Mode, index: ImageIndex) -> list[Candidate]:
        """The others that are installed, on the same images."""
        found = []
        for alternative in filter(lambda a: self.wanted(a.name), ALTERNATIVES):
            if not alternative.is_installed():
                self.fail(mode, alternative.name, "not installed")
            elif not os.path.isfile(index.path(0)):
                self.fail(mode, alternative.name, "needs local image files, which these are not")
            else:
                found.append(alternative)
        if not found:
            return []
        work = self._work(mode, index, max_capacity=0)
        work = self._work(mode, index, max(alternative.capacity(work) for alternative in found))
        return [_candidate(alternative, work) for alternative in found]

    def _work(self, mode: Mode, index: ImageIndex, max_capacity: int) -> Work:
        length = (2 * max_capacity + self.num_timed) * self.batch_size
        order = cyclic_order(len(index.labels), length, self.config.seed)
        used = order[: len(index.labels)]
        data, on_gpu = self.config.data, self.runtime.device.type == "cuda"
        return Work(
            files=[index.path(i) for i in used],
            labels=[int(label) for label in index.labels[used]],
            order=np.arange(length) % len(used),
            mode=mode,
            preprocessing=bench_preprocessing(self.config),
            batch_size=self.batch_size,
            num_workers=_num_workers(self.config),
            prefetch=data.prefetch,
            device=self.runtime.device,
            decode_on_gpu=on_gpu and data.decode != "cpu",
            folder=self.folder,
        )


def _candidate(alternative: Alternative, work: Work) -> Candidate:
    return Candidate(
        mode=work.mode,
        name=alternative.name,
        output=alternative.output,
        open=lambda _: alternative.open(work, alternative.output),
        capacity=alternative.capacity(work),
    )


# ------------------------------------------------------------------------------------------------------------ run


def bench_loader(config: Config, settings: BenchSettings, variants: Mapping[str, Config]) -> dict[str, Any]:
    """Measure our loader, its variants and the alternatives; write loader.json, loader.md and loader.png; return the record.

    `variants` are other configurations of ours by the text that names them. A candidate that fails is named with the reason
    and does not stop the others; an interrupt (Ctrl-C) ends the measurement, and what there is so far is written.

    Raises:
        InputError: unusable data, or more than one process.
    """
    names = ["ours", *(alternative.name for alternative in ALTERNATIVES)]
    for name in settings.candidates or ():
        require(name in names, f"bench.candidates: no loader {name!r}; wanted some of {', '.join(names)}")
    runtime = start_runtime(config)
    require(runtime.world_size == 1, f"bench measures one process, got {runtime.world_size}; start it without a launcher")
    indices = build_indices(config)
    folder = empty_folder(settings.output / "files-of-loaders")
    blocks: list[Block] = []
    absent: list[dict[str, str]] = []

    def fail(mode: Mode, name: str, reason: str) -> None:
        absent.append({"mode": mode, "candidate": name, "reason": reason})
        _say(f"{mode}, {name}: {reason}")

    def record(block: Block) -> None:
        blocks.append(block)
        _say(
            f"round {block.round} of {settings.rounds}, {block.mode}, {block.candidate}: {images_per_second(block):.0f} images/s"
        )

    try:
        bench = _Bench(config=config, settings=settings, runtime=runtime, folder=folder, fail=fail)
        candidates = bench.ours("ours", config, indices) if bench.wanted("ours") else []
        for text, variant in variants.items():
            candidates += bench.variant(f"ours[{text}]", variant)
        for mode in bench.modes:
            candidates += bench.alternatives(mode, indices[MODES.index(mode)])
        interrupted = False
        per_round = f"blocks of {bench.num_timed * bench.batch_size} images in each: {len(candidates)}"
        _say(f"rounds after the rehearsal: {settings.rounds}; {per_round}")
        try:
            measure(
                candidates,
                rounds=settings.rounds,
                num_timed=bench.num_timed,
                record=record,
                fail=lambda candidate, reason: fail(candidate.mode, candidate.name, reason),
            )
        except KeyboardInterrupt:
            interrupted = True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outputs = {candidate.name: candidate.output for candidate in candidates}
    result = {
        "interrupted": interrupted,
        "reference": REFERENCE,
        "summary": [row | {"output": outputs[row["candidate"]]} for row in summarise(blocks, REFERENCE)],
        "absent": absent,
        "blocks": [asdict(block) for block in blocks],
        "batch_size": bench.batch_size,
        "num_images_per_block": bench.num_timed * bench.batch_size,
        "num_workers": _num_workers(config),
        "num_images": dict(zip(MODES, map(len, indices), strict=True)),
        "settings": to_plain(settings),
        "data": to_plain(config.data),
        "variants": {text: to_plain(variant.data) for text, variant in variants.items()},
        "preprocessing": to_plain(bench_preprocessing(config)),
        "environment": _environment(runtime, config),
    }
    write_results(result, settings.output)
    return result


def _environment(runtime: Runtime, config: Config) -> dict[str, Any]:
    """The record of the environment, with the versions of the alternatives."""
    environment = environment_record(runtime, config)
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            environment["versions"][package] = metadata.version(package)
    return environment


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
