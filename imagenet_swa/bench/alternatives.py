"""The loaders that people use instead of ours, each by its usual recipe: what `imagenet-swa bench loader` compares with.

All take the same images, the same random resized crop, flip and central crop, antialiased, and the same number of workers.
A loader that is not installed is listed as such; none of them is a dependency.
"""

import importlib
import importlib.util
import random
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2

from imagenet_swa.config import Preprocessing

Mode = Literal["train", "evaluation"]
Output = Literal["float32", "uint8"]
Tensors = tuple[torch.Tensor, torch.Tensor]
Stream = Generator[Tensors, None, None]
"""(n, 3, H, W) images and (n,) labels; closing it ends the loader and its processes."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a loader is to do: images `files[i]` of class `labels[i]` for i in `order`, in batches."""

    files: list[str]
    labels: list[int]
    order: np.ndarray
    """Positions in `files`; longer than the list where it has to be gone through several times."""
    mode: Mode
    preprocessing: Preprocessing
    batch_size: int
    num_workers: int
    prefetch: int
    device: torch.device
    decode_on_gpu: bool
    folder: Path
    """For files that a loader has to write first."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a loader makes once and uses in every block, such as those files."""

    @property
    def filter(self) -> str:
        """Name of the resize's filter."""
        p = self.preprocessing
        return p.train_interpolation if self.mode == "train" else p.interpolation

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for."""
        if name not in self.prepared:
            self.prepared[name] = make()
        return self.prepared[name]


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A loader by name: the package that it needs, what it yields and how it is started."""

    name: str
    package: str
    output: Output
    open: Callable[[Work, Output], Stream]
    capacity: Callable[[Work], int]
    """Upper bound of the batches that may lie ready, or half ready, before the first is asked for."""

    def is_installed(self) -> bool:
        """Whether its package can be found; nothing is imported but the package's parents."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:
            return False


def _optional(module: str) -> Any:
    """A module that may not be installed, and that type checkers therefore do not know."""
    return importlib.import_module(module)


def _workers_capacity(work: Work) -> int:
    return max(1, work.num_workers) * work.prefetch + 1


def _queue_capacity(work: Work) -> int:
    return 2 * max(1, work.num_workers) + work.prefetch + 4


# ---------------------------------------------------------------------------------------- DataLoader with torchvision


class _Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, work: Work, load: Callable[[str], Any], transform: Callable[[Any], torch.Tensor]) -> None:
        self._files, self._labels, self._order = work.files, work.labels, work.order
        self._load, self._transform = load, transform

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        i = self._order[number]
        return self._transform(self._load(self._files[i])), self._labels[i]


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main process ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _geometry(work: Work, library: Any) -> list[Any]:
    """Crop and flip by `torchvision.transforms` or its second version."""
    p, filter_ = work.preprocessing, InterpolationMode(work.filter)
    if work.mode == "evaluation":
        return [library.Resize(p.resize, interpolation=filter_, antialias=True), library.CenterCrop(p.image_size)]
    crop = library.RandomResizedCrop(p.image_size, p.crop_area, p.crop_aspect, interpolation=filter_, antialias=True)
    return [crop, library.RandomHorizontalFlip(0.5 if p.horizontal_flip else 0.0)]


def _pil_transform(work: Work, output: Output) -> Callable[[Any], torch.Tensor]:
    p = work.preprocessing
    to_tensor = [transforms.PILToTensor()]
    if output == "float32":
        to_tensor = [transforms.ToTensor(), transforms.Normalize(p.mean, p.std)]
    return transforms.Compose([*_geometry(work, transforms), *to_tensor])


def _tensor_transform(work: Work, output: Output) -> Callable[[Any], torch.Tensor]:
    p = work.preprocessing
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(p.mean), list(p.std))]
    return v2.Compose(_geometry(work, v2) + (to_float if output == "float32" else []))


def _follow(loader: Any, device: torch.device) -> Stream:
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _worker_settings(work: Work) -> dict[str, Any]:
    return {
        "num_workers": work.num_workers,
        "prefetch_factor": work.prefetch if work.num_workers else None,
        "pin_memory": work.device.type == "cuda",
        "worker_init_fn": _ignore_interrupts,
    }


def _pil(work: Work, output: Output) -> Stream:
    images = _Images(work, default_loader, _pil_transform(work, output))
    yield from _follow(DataLoader(images, work.batch_size, **_worker_settings(work)), work.device)


def _v2_tensors(work: Work, output: Output) -> Stream:
    images = _Images(work, partial(decode_image, mode=ImageReadMode.RGB), _tensor_transform(work, output))
    yield from _follow(DataLoader(images, work.batch_size, **_worker_settings(work)), work.device)


# --------------------------------------------------------------------------------------------------------- DALI


def _stock_dali(work: Work, output: Output) -> Stream:
    """The recipe of NVIDIA's ImageNet example: a file reader, fused decode and crop, resize, normalisation."""
    import nvidia.dali as dali
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    fn, types = dali.fn, dali.types  # pyright: ignore[reportAttributeAccessIssue]  made while DALI is imported
    p, size = work.preprocessing, work.preprocessing.image_size
    on_gpu, train = work.device.type == "cuda", work.mode == "train"
    filter_ = {"bilinear": types.INTERP_TRIANGULAR, "bicubic": types.INTERP_CUBIC}[work.filter]
    decoder = {"device": "mixed" if work.decode_on_gpu else "cpu", "output_type": types.RGB}
    pipeline = Pipeline(
        batch_size=work.batch_size,
        num_threads=max(1, work.num_workers),
        device_id=(work.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=work.prefetch,
    )
    files, labels = [work.files[i] for i in work.order], [work.labels[i] for i in work.order]
    with pipeline:
        encoded, label = fn.readers.file(files=files, labels=labels, random_shuffle=train, name="reader")
        if train:
            ranges = {"random_area": list(p.crop_area), "random_aspect_ratio": list(p.crop_aspect)}
            images = fn.decoders.image_random_crop(encoded, num_attempts=10, **ranges, **decoder)
            images = fn.resize(images, resize_x=size, resize_y=size, interp_type=filter_)
            mirror = fn.random.coin_flip(probability=0.5 if p.horizontal_flip else 0.0)
        else:
            images = fn.resize(fn.decoders.image(encoded, **decoder), resize_shorter=p.resize, interp_type=filter_)
            mirror = 0
        normal = {"mean": [255 * m for m in p.mean], "std": [255 * s for s in p.std], "dtype": types.FLOAT}
        images = fn.crop_mirror_normalize(
            images.gpu() if on_gpu else images,
            mirror=mirror,
            crop=(size, size),
            output_layout="CHW",
            **(normal if output == "float32" else {"dtype": types.UINT8}),
        )
        pipeline.set_outputs(images, label.gpu() if on_gpu else label)
    for (batch,) in DALIClassificationIterator(pipeline, reader_name="reader"):
        yield batch["data"], batch["label"].squeeze(-1)


# --------------------------------------------------------------------------------------------------------- SPDL


def _spdl(work: Work, output: Output) -> Stream:
    """Threads that run FFmpeg's decoder and filters, a batch each."""
    spdl, pipelines = _optional("spdl.io"), _optional("spdl.pipeline")
    p, size = work.preprocessing, work.preprocessing.image_size
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (p.mean, p.std))

    def filters(height: int, width: int) -> str:
        if work.mode == "evaluation":
            factor = p.resize / min(height, width)
            parts = [f"scale={int(width * factor)}:{int(height * factor)}:flags={work.filter}", f"crop={size}:{size}"]
        else:
            shape_only = torch.empty(3, height, width, device="meta")
            top, left, h, w = transforms.RandomResizedCrop.get_params(shape_only, list(p.crop_area), list(p.crop_aspect))
            parts = [f"crop={w}:{h}:{left}:{top}", f"scale={size}:{size}:flags={work.filter}"]
            parts += ["hflip"] * (p.horizontal_flip and random.random() < 0.5)
        return ",".join([*parts, "format=pix_fmts=rgb24"])

    def load(positions: np.ndarray) -> Tensors:
        frames = []
        for i in positions:
            packets = spdl.demux_image(work.files[i])
            frames.append(spdl.decode_packets(packets, filters(packets.codec.height, packets.codec.width)))
        images = spdl.to_torch(spdl.convert_frames(frames)).permute(0, 3, 1, 2)
        if output == "float32":
            images = (images - mean) / std
        return images, torch.tensor([work.labels[i] for i in positions])

    workers = max(1, work.num_workers)
    batches = np.split(work.order, range(work.batch_size, len(work.order), work.batch_size))
    pipeline = pipelines.PipelineBuilder().add_source(batches).pipe(load, concurrency=workers).add_sink(work.prefetch)
    pipeline = pipeline.build(num_threads=workers)
    with pipeline.auto_stop():
        yield from _follow(pipeline.get_iterator(), work.device)


# -------------------------------------------------------------------------------------- those that want other files


def _webdataset(work: Work, output: Output) -> Stream:
    """Tar files, a shard or more per worker, decoded by PIL."""
    webdataset = _optional("webdataset")

    def write() -> list[str]:
        shards = [str(work.folder / f"{work.mode}-{number}.tar") for number in range(max(1, work.num_workers))]
        for number, shard in enumerate(shards):
            with webdataset.TarWriter(shard) as tar:
                for i in range(number, len(work.files), len(shards)):
                    tar.write({"__key__": f"{i:08d}", "jpg": Path(work.files[i]).read_bytes(), "cls": work.labels[i]})
        return shards

    shards = work.once("tar", write)
    # Not `.repeat()`, which ends a pass with a short batch. Worker w of n reads every n-th of the list: its own shard.
    num_passes = len(work.order) // len(work.files) + 2
    data = webdataset.WebDataset(shards * num_passes, shardshuffle=False, empty_check=False)
    if work.mode == "train":
        data = data.shuffle(1000, initial=100)
    data = data.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(_pil_transform(work, output), int)
    data = data.batched(work.batch_size, partial=False)
    yield from _follow(DataLoader(data, batch_size=None, **_worker_settings(work)), work.device)


class _PilImages(_Images):
    """What FFCV's writer reads: each file once, decoded."""

    def __init__(self, work: Work) -> None:
        super().__init__(work, default_loader, lambda image: image)
        self._order = np.arange(len(work.files))


def _ffcv(work: Work, output: Output) -> Stream:
    """FFCV's own file format: images re-encoded as JPEG, sides up to 512 pixels, so fewer pixels than the others decode.

    With numba 0.68, FFCV 1.0.2 decodes in one thread whatever it is told: look at images per CPU-second.
    """
    fields, decoders, images = _optional("ffcv.fields"), _optional("ffcv.fields.decoders"), _optional("ffcv.fields.rgb_image")
    loading, steps_of, writing = _optional("ffcv.loader"), _optional("ffcv.transforms"), _optional("ffcv.writer")
    p, size, train = work.preprocessing, work.preprocessing.image_size, work.mode == "train"

    def write() -> Path:
        path = work.folder / f"{work.mode}.beton"
        image = fields.RGBImageField(write_mode="jpg", max_resolution=512, jpeg_quality=90)
        writer = writing.DatasetWriter(
            str(path), {"image": image, "label": fields.IntField()}, num_workers=max(1, work.num_workers)
        )
        writer.from_indexed_dataset(_PilImages(work))
        return path

    def build() -> Any:
        if train:
            steps = [images.RandomResizedCropRGBImageDecoder((size, size), scale=p.crop_area, ratio=p.crop_aspect)]
            steps += [steps_of.RandomHorizontalFlip(0.5 if p.horizontal_flip else 0.0)]
        else:
            steps = [images.CenterCropRGBImageDecoder((size, size), ratio=size / p.resize)]
        if output == "float32":
            steps += [steps_of.NormalizeImage(255 * np.array(p.mean), 255 * np.array(p.std), np.float32)]
        return loading.Loader(
            str(work.once("beton", write)),
            work.batch_size,
            num_workers=max(1, work.num_workers),
            os_cache=True,
            order=loading.OrderOption.RANDOM if train else loading.OrderOption.SEQUENTIAL,
            indices=work.order,
            batches_ahead=work.prefetch,
            pipelines={
                "image": [*steps, steps_of.ToTensor(), steps_of.ToTorchImage()],
                "label": [decoders.IntDecoder(), steps_of.ToTensor(), steps_of.Squeeze()],
            },
        )

    num_threads = torch.get_num_threads()  # of all of torch, which FFCV sets
    passes = iter(work.once(f"ffcv {output}", build))  # compiled once, in seconds; between two passes it has no thread
    try:
        yield from _follow(passes, work.device)
    finally:
        passes.close()
        passes.join(10)
        torch.set_num_threads(num_threads)


def _both(name: str, package: str, open_: Callable[..., Any], capacity: Callable[[Work], int]) -> list[Alternative]:
    """A recipe with float and with uint8 output."""
    outputs: list[tuple[str, Output]] = [("", "float32"), (" uint8", "uint8")]
    return [
        Alternative(name=name + end, package=package, output=output, open=open_, capacity=capacity) for end, output in outputs
    ]


REFERENCE = "torchvision PIL"
ALTERNATIVES = [
    *_both(REFERENCE, "torchvision", _pil, _workers_capacity),
    *_both("torchvision v2 tensors", "torchvision", _v2_tensors, _workers_capacity),
    *_both("stock DALI", "nvidia.dali", _stock_dali, _queue_capacity),
    *_both("SPDL", "spdl.io", _spdl, _queue_capacity),
    *_both("WebDataset", "webdataset", _webdataset, _workers_capacity)[:1],
    *_both("FFCV, JPEG up to 512 px", "ffcv", _ffcv, _queue_capacity),
]
