"""DALI's graph of one stream: what is fed per image, decoded, resized, normalised. No DALI reader, no DALI random numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali.pipeline import Pipeline

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.crops import EncodedCrops

Mode = Literal["train", "evaluation"]
# DALI makes its operators and types while it is imported, where a type checker cannot see them.
fn: Any = dali.fn
types: Any = dali.types

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
# What the source feeds per image: number of dimensions and type.
_FIELDS = {
    "encoded": (1, types.UINT8),
    "start": (1, types.INT32),
    "shape": (1, types.INT32),
    "flip": (0, types.INT32),
    "roi_start": (1, types.FLOAT),
    "roi_end": (1, types.FLOAT),
    "anchor": (1, types.INT32),
}
# What it feeds of a batch that has no image, since DALI takes no empty one: a small picture that nobody looks at.
_PLACEHOLDER = {
    "encoded": np.frombuffer(b"P6\n2 2\n255\n" + bytes(12), np.uint8),
    "start": np.zeros(2, np.int32),
    "shape": np.full(2, 2, np.int32),
    "flip": np.zeros((), np.int32),
    "roi_start": np.zeros(2, np.float32),
    "roi_end": np.full(2, 2, np.float32),
    "anchor": np.zeros(2, np.int32),
}


@dataclass(frozen=True, kw_only=True)
class PipelineMaker:
    """Builds pipelines for a loader; those that `leaves_resize` end with the decoded pixels, which our own code resizes."""

    preprocessing: Preprocessing
    device: torch.device
    decode_on_gpu: bool
    compiled_resize: bool
    num_threads: int
    prefetch: int

    @property
    def on_gpu(self) -> bool:
        """Whether the network is on a GPU, whoever decodes."""
        return self.device.type == "cuda"

    def pads(self, mode: Mode) -> bool:
        """Whether images get a border and are not resized."""
        return mode == "train" and self.preprocessing.train_crop == "padded"

    def leaves_resize(self, mode: Mode) -> bool:
        """Whether a pipeline ends with the decoded pixels, which our own code resizes."""
        return self.compiled_resize and not self.pads(mode)

    def takes_windows(self, mode: Mode) -> bool:
        """Whether a pipeline decodes windows of images; DALI's own resize of a whole image wants all of it, and so do borders."""
        return self.leaves_resize(mode) or (mode == "train" and not self.pads(mode))

    def fields(self, mode: Mode, batch: EncodedCrops) -> tuple[Any, ...]:
        """The batch as the pipeline takes it, in the order of `_field_names`."""
        if not len(batch):
            return tuple([_PLACEHOLDER[name]] for name in self._field_names(mode))
        windows = batch.windows if self.takes_windows(mode) else np.concatenate([0 * batch.sizes, batch.sizes], axis=1)
        names, scale, size = self._field_names(mode), batch.sizes / batch.resized, self.preprocessing.image_size
        fields: dict[str, Any] = {
            "encoded": batch.images,
            "start": windows[:, :2].astype(np.int32),
            "shape": windows[:, 2:].astype(np.int32),
            "flip": batch.flips.astype(np.int32),
            "roi_start": (batch.offsets * scale).astype(np.float32),
            "roi_end": ((batch.offsets + size) * scale).astype(np.float32),
            "anchor": batch.offsets.astype(np.int32),
        }
        # Views, whose memory DALI reads later: the tuple keeps it alive.
        return tuple(
            [fields[name][k] if name == "encoded" else fields[name][k, ...] for k in range(len(batch))] for name in names
        )

    def _field_names(self, mode: Mode) -> tuple[str, ...]:
        if self.leaves_resize(mode):
            return ("encoded", "start", "shape")
        if self.takes_windows(mode):
            return ("encoded", "start", "shape", "flip")
        # Asked for the whole image as a window, DALI on the CPU checks that the image has the size that the region relies on.
        whole = ("encoded",) if self.decode_on_gpu else ("encoded", "start", "shape")
        return (*whole, "anchor", "flip") if self.pads(mode) else (*whole, "roi_start", "roi_end")

    def build(self, mode: Mode, source: Iterator[tuple[Any, ...]], batch_size: int, prefetch: int | None = None) -> Pipeline:
        """A pipeline of one output, the pixels, fed from `source` with batches of at most `batch_size`."""
        names = self._field_names(mode)
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.num_threads,
            device_id=(self.device.index or 0) if self.on_gpu and not self.leaves_resize(mode) else None,
            prefetch_queue_depth=prefetch or self.prefetch,
        )
        with pipeline:
            fed = fn.external_source(
                source=source,
                num_outputs=len(names),
                batch=True,
                no_copy=not self.decode_on_gpu,  # on the CPU nobody reads the bytes after the batch was returned
                ndim=[_FIELDS[name][0] for name in names],
                dtype=[_FIELDS[name][1] for name in names],
            )
            inputs = dict(zip(names, fed, strict=True))
            images = self._decoded(inputs)
            pipeline.set_outputs(images if self.leaves_resize(mode) else self._cropped_and_normalised(mode, images, inputs))
        pipeline.build()
        return pipeline

    def _decoded(self, inputs: dict[str, Any]) -> Any:
        """uint8 (h, w, 3): what lies under the window, or the whole image where DALI's resize is to crop it."""
        options = {
            "device": "mixed" if self.decode_on_gpu else "cpu",
            "output_type": types.RGB,
            # ImageFolder does not turn images by their EXIF tag, so nothing here may.
            "adjust_orientation": False,
            # nvJPEG's smooth chroma upsampling, as libjpeg (and so PIL) does it; the CPU decoder always does.
            "jpeg_fancy_upsampling": True,
        }
        if "start" not in inputs:
            return fn.decoders.image(inputs["encoded"], **options)
        return fn.decoders.image_slice(inputs["encoded"], start=inputs["start"], shape=inputs["shape"], axes=[0, 1], **options)

    def _cropped_and_normalised(self, mode: Mode, images: Any, inputs: dict[str, Any]) -> Any:
        p = self.preprocessing
        images = fn.crop_mirror_normalize(
            self._padded(images, inputs) if self.pads(mode) else self._resized(mode, images, inputs),
            mirror=inputs["flip"] if mode == "train" else 0,
            mean=[255 * m for m in p.mean],
            std=[255 * s for s in p.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        return images.gpu() if self.on_gpu else images

    def _padded(self, images: Any, inputs: dict[str, Any]) -> Any:
        """The windows at the anchors, black where they reach beyond the images."""
        size = [self.preprocessing.image_size] * 2
        return fn.slice(images, start=inputs["anchor"], shape=size, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)

    def _resized(self, mode: Mode, images: Any, inputs: dict[str, Any]) -> Any:
        """DALI's own resize; in evaluation resize and central crop as one resize of the region that the crop comes from."""
        p, is_training = self.preprocessing, mode == "train"
        return fn.resize(
            images,
            size=[p.image_size, p.image_size],
            interp_type=_FILTERS[p.train_interpolation if is_training else p.interpolation],
            antialias=True,
            **({} if is_training else {"roi_start": inputs["roi_start"], "roi_end": inputs["roi_end"]}),
        )

    def error_of(self, mode: Mode, fields: tuple[Any, ...]) -> str | None:
        """What DALI says to one image, None if it decodes it."""
        try:
            self.build(mode, iter([fields]), 1, prefetch=1).run()
        except (RuntimeError, OSError) as error:
            return _told(error)
        return None


def _told(error: Exception) -> str:
    """What DALI's many lines say of the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[lines.index("encountered:") + 1] if "encountered:" in lines[:-1] else lines[0])[:120]
