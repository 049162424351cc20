"""The NVIDIA DALI backend: files in, normalised batches out, on the CPU or decoded on the GPU.

No DALI reader and no DALI random numbers: an external source says which files come next and what chance decided about
their crops, so that a stream follows from its arguments alone. A pipeline lives as long as one stream.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.batch import BadImageError, Batch, labels_on
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import NUM_TRIES, Indices, draw_crops

Mode = Literal["train", "evaluation"]
Fields = tuple[list[np.ndarray], ...]
# DALI makes its operators and types while it is imported, where a type checker cannot see them.
fn: Any = dali.fn
math: Any = dali.math
types: Any = dali.types

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_OPERATORS_THAT_READ = ("io.file.read", "peek_image_shape", "decoders.image")
# Name, number of dimensions and type of what the source feeds per image, after the path.
_TRAIN_FIELDS = (
    ("width_factor", 1, types.FLOAT64),
    ("height_factor", 1, types.FLOAT64),
    ("top", 0, types.FLOAT64),
    ("left", 0, types.FLOAT64),
    ("flip", 0, types.INT32),
)


class DaliLoader:
    """Batches of an index, decoded by DALI; see `ImageLoader` for the interface."""

    def __init__(
        self,
        index: ImageIndex,
        preprocessing: Preprocessing,
        *,
        seed: int,
        device: torch.device,
        decode_on_gpu: bool,
        num_threads: int,
        prefetch: int,
        channels_last: bool = True,
    ) -> None:
        self.index = index
        self._preprocessing = preprocessing
        self._seed = seed
        self._device = device
        self._decode_on_gpu = decode_on_gpu
        self._num_threads = max(1, num_threads)
        self._prefetch = prefetch
        self._channels_last = channels_last

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name."""
        return self._stream("train", batches, epoch)

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name."""
        return self._stream("evaluation", batches, epoch=0)

    def windows(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[np.ndarray]:
        """The training crops as DALI computes them, (n, 4) top, left, height, width: for checking against numpy."""
        batches = list(batches)
        source = (self._fields("train", indices, epoch) for indices in batches)
        pipeline = self._build("train", source, max(map(len, batches)), windows_only=True)
        for _ in batches:
            windows, _ = pipeline.run()
            yield np.array(windows.as_cpu().as_tensor())

    def _stream(self, mode: Mode, batches: Iterable[Indices], epoch: int) -> Iterator[Batch]:
        batches = [np.asarray(indices, np.int64) for indices in batches]
        if not batches:
            return
        in_flight: deque[Indices] = deque()  # fed to the pipeline, not yet returned by it, oldest first

        def source() -> Iterator[Fields]:
            for indices in batches:
                in_flight.append(indices)
                yield self._fields(mode, indices, epoch)

        pipeline = self._build(mode, source(), max(map(len, batches)))
        # On a GPU, DALI's output and its copy belong to torch's stream: each waits for the other there, not on the host.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        for _ in batches:
            try:
                (images,) = pipeline.run(stream)
            except (RuntimeError, OSError) as error:
                # DALI would go on with the next batch without a word; this pipeline is not used again.
                self._name_the_culprit(mode, [i for indices in in_flight for i in indices], epoch, error)
            indices = in_flight.popleft()
            yield Batch(self._to_torch(images, stream), labels_on(self._device, self.index.labels[indices]), indices)

    def _to_torch(self, images: Any, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """A copy of DALI's output, whose memory the next run overwrites, as (n, 3, H, W)."""
        tensor = images.as_tensor()
        result = torch.empty(tensor.shape(), dtype=torch.float32, device=self._device)
        feed_ndarray(tensor, result, cuda_stream=stream)
        return result.permute(0, 3, 1, 2) if self._channels_last else result

    def _fields(self, mode: Mode, indices: Indices, epoch: int) -> Fields:
        """What the pipeline needs to know about a batch, a list per field with an array per image."""
        paths = [np.frombuffer(self.index.path(i).encode("utf-8", "surrogateescape"), np.uint8) for i in indices]
        if mode == "evaluation":
            return (paths,)
        p = self._preprocessing
        draws = draw_crops(
            indices, seed=self._seed, epoch=epoch, area=p.crop_area, aspect=p.crop_aspect, horizontal_flip=p.horizontal_flip
        )
        columns = (draws.width_factor, draws.height_factor, draws.top, draws.left, draws.flip.astype(np.int32))
        return (paths, *[list(map(np.asarray, column)) for column in columns])

    def _build(self, mode: Mode, source: Iterator[Fields], batch_size: int, windows_only: bool = False) -> Pipeline:
        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._prefetch,
        )
        with pipeline:
            fields = (("path", 1, types.UINT8), *(_TRAIN_FIELDS if mode == "train" else ()))
            path, *draws = fn.external_source(
                source=source,
                num_outputs=len(fields),
                batch=True,
                ndim=[ndim for _, ndim, _ in fields],
                dtype=[dtype for _, _, dtype in fields],
            )
            encoded = fn.io.file.read(path)
            # ImageFolder does not turn images by their EXIF tag, so nothing here may.
            shape = fn.peek_image_shape(encoded, adjust_orientation=False)
            if mode == "train":
                top, left, height, width = _crop_window(shape, draws, self._preprocessing.crop_aspect)
                if windows_only:
                    pipeline.set_outputs(fn.stack(top, left, height, width), draws[-1])
                else:
                    window = fn.stack(top, left), fn.stack(height, width)
                    pipeline.set_outputs(self._training_images(encoded, window, draws[-1]))
            else:
                pipeline.set_outputs(self._evaluation_images(encoded, shape))
        pipeline.build()
        return pipeline

    @property
    def _decoder(self) -> dict[str, Any]:
        return {
            "device": "mixed" if self._decode_on_gpu else "cpu",
            "output_type": types.RGB,
            "adjust_orientation": False,
            # nvJPEG's smooth chroma upsampling, as libjpeg (and so PIL) does it; the CPU decoder always does.
            "jpeg_fancy_upsampling": True,
        }

    def _training_images(self, encoded: Any, window: tuple[Any, Any], flip: Any) -> Any:
        """Decodes only the part of the image under the window."""
        images = fn.decoders.image_slice(encoded, start=window[0], shape=window[1], axes=[0, 1], **self._decoder)
        size = self._preprocessing.image_size
        filter_ = _FILTERS[self._preprocessing.train_interpolation]
        images = fn.resize(images, size=[size, size], interp_type=filter_, antialias=True)
        return self._normalise(images, flip)

    def _evaluation_images(self, encoded: Any, shape: Any) -> Any:
        """Resize of the shorter side and central crop as one resize of the region that the crop comes from.

        Sizes by integer floor and the offset rounded half to even, as torchvision does both: a pixel's shift, which the
        usual resize_shorter and crop make on most images, changes 2-3 % of the predictions.
        """
        p = self._preprocessing
        height, width = shape[0], shape[1]
        shorter = math.min(height, width)
        starts, ends = [], []
        for side in (height, width):
            resized = side * p.resize // shorter
            room = resized - p.image_size
            half = room // 2
            start = half + (room & 1) * (half & 1)
            scale = fn.cast(side, dtype=types.FLOAT64) / fn.cast(resized, dtype=types.FLOAT64)
            starts.append(fn.cast(start * scale, dtype=types.FLOAT))
            ends.append(fn.cast((start + p.image_size) * scale, dtype=types.FLOAT))
        images = fn.resize(
            fn.decoders.image(encoded, **self._decoder),
            size=[p.image_size, p.image_size],
            roi_start=fn.stack(*starts),
            roi_end=fn.stack(*ends),
            interp_type=_FILTERS[p.interpolation],
            antialias=True,
        )
        return self._normalise(images, flip=0)

    def _normalise(self, images: Any, flip: Any) -> Any:
        p = self._preprocessing
        images = fn.crop_mirror_normalize(
            images,
            mirror=flip,
            mean=[255 * m for m in p.mean],
            std=[255 * s for s in p.std],
            dtype=types.FLOAT,
            output_layout="HWC" if self._channels_last else "CHW",
        )
        return images.gpu() if self._device.type == "cuda" else images

    def _name_the_culprit(self, mode: Mode, indices: list[int], epoch: int, error: Exception) -> NoReturn:
        """Run each image alone; raise BadImageError for the first that fails, the original error if none does."""
        for i in dict.fromkeys(indices):
            pipeline = self._build(mode, iter([self._fields(mode, np.array([i]), epoch)]), batch_size=1)
            try:
                pipeline.run()
            except (RuntimeError, OSError) as alone:
                if any(operator in str(alone) for operator in _OPERATORS_THAT_READ):
                    raise BadImageError(self.index.path(i), _reason(self.index.path(i), alone)) from None
        raise error


def _crop_window(shape: Any, draws: list[Any], aspect: tuple[float, float]) -> tuple[Any, Any, Any, Any]:
    """`sampling.crop_windows` in DALI arithmetic: top, left, height, width as int32 scalars.

    Everything in float64, where numpy and DALI agree to the last bit.
    """
    width_factor, height_factor, u_top, u_left, _ = draws
    height, width = (fn.cast(shape[i], dtype=types.FLOAT64) for i in (0, 1))
    root = math.sqrt(height * width)
    w = math.floor(root * width_factor + 0.5)
    h = math.floor(root * height_factor + 0.5)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    earlier_is_more = types.Constant(np.arange(NUM_TRIES, 0, -1, dtype=np.int32), device="cpu")
    score = fn.cast(fits, dtype=types.INT32) * earlier_is_more
    best = fn.reductions.max(score)
    found = fn.cast(best > 0, dtype=types.FLOAT64)
    chosen = fn.cast((score == best) & (score > 0), dtype=types.FLOAT64)

    def first_fit(sides: Any) -> Any:  # reductions do not take float64; sides in pixels are exact in int32
        return fn.cast(fn.reductions.sum(fn.cast(chosen * sides, dtype=types.INT32)), dtype=types.FLOAT64)

    central_w = math.max(math.min(width, math.floor(height * aspect[1] + 0.5)), 1.0)
    central_h = math.max(math.min(height, math.floor(width / aspect[0] + 0.5)), 1.0)
    w = first_fit(w) + (1.0 - found) * central_w
    h = first_fit(h) + (1.0 - found) * central_h
    top = found * math.floor(u_top * (height - h + 1.0)) + (1.0 - found) * math.floor((height - h) * 0.5)
    left = found * math.floor(u_left * (width - w + 1.0)) + (1.0 - found) * math.floor((width - w) * 0.5)
    to_int = {"dtype": types.INT32}
    return fn.cast(top, **to_int), fn.cast(left, **to_int), fn.cast(h, **to_int), fn.cast(w, **to_int)


def _reason(path: str, error: Exception) -> str:
    """Why DALI refused a file, in words; its own message is many lines and often names neither file nor reason."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(16)
    except OSError as problem:
        return str(problem.strerror).lower()
    if not start:
        return "the file is empty"
    if not start.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"II", b"MM", b"P5", b"P6")):
        return f"not an image that DALI reads; it starts with {start[:8]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[lines.index("encountered:") + 1] if "encountered:" in lines[:-1] else lines[0]
    return f"damaged or cut short (DALI: {told[:120]})"
