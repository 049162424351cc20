"""The NVIDIA DALI backend: encoded images in, normalised batches out, on the CPU or decoded on the GPU.

No DALI reader and no DALI random numbers: an external source hands over bytes and crop windows, so that a stream follows
from its arguments alone. A pipeline lives as long as one stream. On the CPU, our compiled resize takes the place of DALI's.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.batch import BadImages, Batch, labels_on
from imagenet_swa.data.buffers import Buffers, keep_freed_memory
from imagenet_swa.data.crops import EncodedCrops, evaluation_crops, training_crops
from imagenet_swa.data.dali_pipeline import Mode, PipelineMaker
from imagenet_swa.data.encoded import EncodedImages, why_undecodable
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.resize import PixelAddresses, resize_in_threads
from imagenet_swa.data.sampling import Indices
from imagenet_swa.data.streams import ahead, in_background, until_exit

_Pixels = Generator[tuple[torch.Tensor, EncodedCrops], None, None]


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
        compiled_resize: bool = False,
        channels_last: bool = True,
        bad_images: BadImages | None = None,
    ) -> None:
        self.index = index
        self._preprocessing = preprocessing
        self._seed = seed
        self._device = device
        self._num_threads = max(1, num_threads)
        self._prefetch = prefetch
        self._pipelines = PipelineMaker(
            preprocessing=preprocessing,
            device=device,
            decode_on_gpu=decode_on_gpu,
            compiled_resize=compiled_resize and not decode_on_gpu,
            num_threads=self._num_threads,
            prefetch=prefetch,
        )
        self.decoder = f"DALI on the {'GPU' if decode_on_gpu else 'CPU'}" + (
            ", compiled resize" if self._pipelines.compiled_resize else ""
        )
        self._channels_last = channels_last
        self._bad_images = bad_images or BadImages(index)
        keep_freed_memory()
        self._buffers, self._files = Buffers(num_kept=prefetch + 3), Buffers(num_kept=2 * prefetch + 4)
        mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
        self._scale, self._bias = 1 / (255 * std), -mean / std

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name, or leaves the image out."""
        return until_exit(self._stream("train", batches, epoch))

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name, or leaves the image out."""
        return until_exit(self._stream("evaluation", batches, epoch=0))

    # ------------------------------------------------------------------------------------------------- the stream

    def _stream(self, mode: Mode, batches: Iterable[Indices], epoch: int) -> Generator[Batch, None, None]:
        batches = [np.asarray(indices, np.int64) for indices in batches]
        batch_size = max(map(len, batches), default=1) or 1  # of the pipeline, which takes no larger ones than it was built for
        self._bad_images.start_pass()
        # Closed from the last to the first, also where an exception goes on holding this frame.
        with (
            closing(EncodedImages(self.index, self._num_threads, self._files)) as encoded,
            closing(ahead(lambda indices: self._prepare(mode, encoded, indices, epoch), batches, self._prefetch + 1)) as prepared,
            closing(self._pixels(mode, prepared, batch_size)) as pixels,
        ):
            for images, batch in pixels:
                self._bad_images.leave_out(batch.bad, num_good=len(batch) if mode == "train" else None)
                labels = labels_on(self._device, self.index.labels[batch.indices])
                yield Batch(self._finish(images), labels, batch.indices, tuple(batch.bad))

    def _prepare(self, mode: Mode, encoded: EncodedImages, indices: Indices, epoch: int) -> EncodedCrops:
        """Read the images of a batch and work out what is to be decoded of them."""
        found = encoded.read_batch(indices)
        parts = self._pipelines.takes_windows(mode) and not self._pipelines.decode_on_gpu
        if mode == "train":
            crops = training_crops(found, self._preprocessing, seed=self._seed, epoch=epoch)
        else:
            crops = evaluation_crops(found, self._preprocessing)
        return crops.with_segments(lambda size: self._files.take((size,), np.uint8)) if parts else crops

    def _outputs(self, mode: Mode, prepared: Iterator[EncodedCrops], batch_size: int) -> Iterator[tuple[Any, EncodedCrops]]:
        """What the pipeline makes of each batch, until the next one is asked for; of images that fail, nothing.

        DALI would go on with the next batch after an error without a word, so a pipeline that failed is not used again:
        the images that it had are tried one by one, and a fresh one goes on with those that can be decoded.
        """
        in_flight: deque[EncodedCrops] = deque()  # fed to the pipeline, not yet returned by it, oldest first
        fed: deque[Any] = deque(maxlen=self._prefetch + 4)  # memory that DALI reads while they are in flight
        again: deque[EncodedCrops] = deque()
        faults: list[BaseException] = []  # of the preparation, not of an image

        def source() -> Iterator[tuple[Any, ...]]:
            while True:
                try:
                    batch = again.popleft() if again else next(prepared, None)
                except BaseException as error:
                    faults.append(error)
                    raise
                if batch is None:
                    return
                in_flight.append(batch)
                fed.append(self._pipelines.fields(mode, batch))
                yield fed[-1]

        # On a GPU, DALI's output and its copy belong to torch's stream: each waits for the other there, not on the host.
        on_gpu = self._pipelines.on_gpu and not self._pipelines.leaves_resize(mode)
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        pipeline = self._pipelines.build(mode, source(), batch_size)
        while True:
            try:
                (pixels,) = pipeline.run(stream)
            except StopIteration:
                return
            except (RuntimeError, OSError) as error:
                if faults:
                    raise faults[0] from None
                bad = self._undecodable(mode, in_flight)
                if not bad:
                    raise error
                again.extendleft(reversed([batch.without(bad) for batch in in_flight]))
                in_flight.clear()
                pipeline = self._pipelines.build(mode, source(), batch_size)
                continue
            yield pixels, in_flight[0]
            in_flight.popleft()

    def _undecodable(self, mode: Mode, in_flight: Iterable[EncodedCrops]) -> dict[int, str]:
        """Numbers of the images that fail when they are alone in a pipeline, and why; none where a sound picture fails too,
        since then the fault is not theirs.
        """
        bad: dict[int, str] = {}
        waiting = deque(batch.at([position], {}) for batch in in_flight for position in range(len(batch)))
        while waiting:
            pipeline = self._pipelines.build(mode, iter([self._pipelines.fields(mode, one) for one in waiting]), 1, prefetch=1)
            try:
                while waiting:
                    pipeline.run()
                    waiting.popleft()
            except (RuntimeError, OSError):
                suspect = waiting.popleft()
                if (told := self._pipelines.error_of(mode, self._pipelines.fields(mode, suspect))) is not None:
                    reason = why_undecodable(suspect.images[0].tobytes())
                    bad[int(suspect.indices[0])] = reason or f"DALI cannot decode it, although Pillow can: {told}"
        nothing = self._pipelines.fields(mode, next(iter(in_flight)).at([], {})) if bad else ()
        return {} if bad and self._pipelines.error_of(mode, nothing) is not None else bad

    # ------------------------------------------------------------------------------------------- pixels of a batch

    def _pixels(self, mode: Mode, prepared: Iterator[EncodedCrops], batch_size: int) -> _Pixels:
        """What `_finish` takes, (n, H, W, 3), of each batch; resized by us in a thread ahead of the one that trains."""
        outputs = self._outputs(mode, prepared, batch_size)
        if self._pipelines.leaves_resize(mode):
            return in_background(self._resized_on_host(mode, outputs), self._prefetch)
        return self._pixels_from_pipeline(outputs)

    def _pixels_from_pipeline(self, outputs: Iterator[tuple[Any, EncodedCrops]]) -> _Pixels:
        """Copies of DALI's normalised output (n, H, W, 3), whose memory the next run overwrites."""
        stream = torch.cuda.current_stream(self._device) if self._pipelines.on_gpu else None
        size = self._preprocessing.image_size
        for output, batch in outputs:
            shape = (len(batch), size, size, 3)
            if self._pipelines.on_gpu:
                copy = torch.empty(shape, dtype=torch.float32, device=self._device)
            else:
                copy = torch.from_numpy(self._buffers.take(shape, np.float32))
            if len(batch):
                feed_ndarray(output.as_tensor(), copy, cuda_stream=stream)
            yield copy, batch

    def _resized_on_host(self, mode: Mode, outputs: Iterator[tuple[Any, EncodedCrops]]) -> _Pixels:
        """DALI's decoded images resized by our own code (n, H, W, 3): normalised float32 for the CPU, for a GPU uint8, a quarter
        of the bytes to send, in page-locked memory.
        """
        p = self._preprocessing
        size = p.image_size
        interpolation = p.train_interpolation if mode == "train" else p.interpolation
        normalise = {} if self._pipelines.on_gpu else {"scale": self._scale, "bias": self._bias}
        with ThreadPoolExecutor(self._num_threads, "resize") as pool:
            for output, batch in outputs:
                shape = (len(batch), size, size, 3)
                if self._pipelines.on_gpu:
                    result = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
                else:
                    result = torch.from_numpy(self._buffers.take(shape, np.float32))
                resize_in_threads(
                    pool,
                    self._num_threads,
                    _addresses(output, batch),
                    resized=batch.resized,
                    offsets=batch.offsets,
                    flips=batch.flips,
                    out=result.numpy(),
                    interpolation=interpolation,
                    **normalise,
                )
                yield result, batch

    def _finish(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) float32 on the device from (n, H, W, 3)."""
        if images.dtype == torch.uint8:
            scale, bias = (torch.from_numpy(v).to(self._device) for v in (self._scale, self._bias))
            images = images.to(self._device, non_blocking=True) * scale + bias
        images = images.permute(0, 3, 1, 2)
        return images if self._channels_last else images.contiguous()


def _addresses(output: Any, batch: EncodedCrops) -> PixelAddresses:
    """Where the pictures lie of which DALI decoded windows: a picture's first pixel may be before the window's."""
    shapes = np.array(output.shape(), np.int64).reshape(-1, 3)
    strides = 3 * shapes[:, 1]
    assert (shapes[: len(batch), :2] == batch.windows[:, 2:]).all(), "DALI decoded other windows than were asked for"
    first = np.array([output[k].data_ptr() for k in range(len(batch))], np.int64)
    before = batch.origins[:, 0] * strides + 3 * batch.origins[:, 1]
    return PixelAddresses(addresses=(first - before).astype(np.uint64), sizes=batch.sizes, strides=strides)
