"""Who sees which image, when, and through which crop: pure functions of (seed, epoch, image index).

Nothing here keeps state. The global batches, crops and flips are therefore the same for every number of processes, and
a run resumes from (seed, epoch, step) alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

NUM_TRIES = 10  # torchvision's RandomResizedCrop tries ten windows before it falls back to a central one
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


# ---------------------------------------------------------------------------------------------------------- order


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Indices:
    """A permutation of range(num_images), (N,), keyed by (seed, epoch).

    The sort of raw Philox words, not `Generator.permutation`: numpy promises to keep the former's bits between versions.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_images)
    return np.argsort(words, kind="stable").astype(np.int64)


def split_global_batch(global_batch_size: int, *, world_size: int, max_batch_size_per_device: int) -> tuple[int, int]:
    """(batch_size_per_device, num_accumulation): each process takes num_accumulation batches of that size per step.

    The batch is the largest equal part of a process's share that is not above the maximum.

    Raises:
        ValueError: the global batch is not a multiple of the number of processes.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or share == 0:
        sizes = " or ".join(str(k * world_size) for k in (share, share + 1) if k)
        counts = ", ".join(str(d) for d in range(1, global_batch_size + 1) if global_batch_size % d == 0)
        raise ValueError(
            f"global_batch_size {global_batch_size} does not divide over {world_size} processes; "
            f"set it to {sizes}, or start one of {counts} processes"
        )
    batch_size = max(b for b in range(1, min(share, max_batch_size_per_device) + 1) if share % b == 0)
    return batch_size, share // batch_size


def training_batches(
    num_images: int,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    batch_size_per_device: int,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
) -> Indices:
    """Image indices of one process for one epoch, (steps, num_accumulation, batch_size_per_device).

    Global batch k is order[kG : (k+1)G]; process r takes the r-th of `world_size` equal slices. The images left over
    after the last whole global batch sit this epoch out; each epoch leaves out others.
    """
    num_steps = num_images // global_batch_size
    order = epoch_order(num_images, seed=seed, epoch=epoch)[: num_steps * global_batch_size]
    mine = order.reshape(num_steps, world_size, -1, batch_size_per_device)[first_step:, rank]
    return np.ascontiguousarray(mine)


def evaluation_batches(num_images: int, *, rank: int, world_size: int, batch_size: int) -> list[Indices]:
    """Image indices of one process when every image is to be seen exactly once over all processes; ragged at the end."""
    mine = np.arange(rank, num_images, world_size, dtype=np.int64)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def statistics_batches(
    num_images: int, *, seed: int, epoch: int, rank: int, world_size: int, batch_size: int, num_used: int | None = None
) -> list[Indices]:
    """Image indices of one process for the BatchNorm pass: `num_used` (default all) images, each once, in random order.

    The order is random because BatchNorm normalises each batch by its own statistics, which sorted classes would bend.
    All batches of all processes differ by at most one image in size, so that none is left with too few to normalise by.
    """
    order = epoch_order(num_images, seed=seed, epoch=epoch)[:num_used]
    largest_share = -(-len(order) // world_size)
    num_batches = -(-largest_share // batch_size)
    return [part for part in np.array_split(order[rank::world_size], num_batches) if len(part)]


# ------------------------------------------------------------------------------------------------- crops and flips


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that scatters counters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(indices: Indices, *, seed: int, epoch: int, num: int) -> NDArray[np.float64]:
    """`num` numbers in [0, 1) for each image, (n, num): a counter hash of (seed, epoch, index, position)."""
    with np.errstate(over="ignore"):  # 64-bit words wrap around by design
        key = _mix(np.array([seed], np.uint64) + _GOLDEN)
        key = _mix(key ^ (np.array([epoch], np.uint64) + _GOLDEN))
        per_image = _mix(key ^ (np.asarray(indices).astype(np.uint64) + _GOLDEN))
        words = _mix(per_image[:, None] + _GOLDEN * np.arange(1, num + 1, dtype=np.uint64))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class CropDraws:
    """What chance decides about n images, before their sizes are known.

    `width_factor`, `height_factor` (n, 10) are the sides of each tried window in units of sqrt(image area), `top`,
    `left` (n,) in [0, 1) its place in the room it leaves, `flip` (n,) whether to mirror.
    """

    width_factor: NDArray[np.float64]
    height_factor: NDArray[np.float64]
    top: NDArray[np.float64]
    left: NDArray[np.float64]
    flip: NDArray[np.bool_]

    def at(self, part: slice) -> "CropDraws":
        """Those of some of the images."""
        return CropDraws(
            width_factor=self.width_factor[part],
            height_factor=self.height_factor[part],
            top=self.top[part],
            left=self.left[part],
            flip=self.flip[part],
        )


def draw_crops(
    indices: Indices,
    *,
    seed: int,
    epoch: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    horizontal_flip: bool,
) -> CropDraws:
    """Random resized crops as torchvision draws them: area uniform, aspect ratio log-uniform, place uniform."""
    u = uniforms(indices, seed=seed, epoch=epoch, num=2 * NUM_TRIES + 3)
    share = area[0] + (area[1] - area[0]) * u[:, :NUM_TRIES]
    log_low, log_high = np.log(aspect[0]), np.log(aspect[1])
    ratio = np.exp(log_low + (log_high - log_low) * u[:, NUM_TRIES : 2 * NUM_TRIES])
    top, left, flip = u[:, 2 * NUM_TRIES :].T
    return CropDraws(
        width_factor=np.sqrt(share * ratio),
        height_factor=np.sqrt(share / ratio),
        top=np.ascontiguousarray(top),
        left=np.ascontiguousarray(left),
        flip=(flip < 0.5) & horizontal_flip,
    )


def crop_windows(
    draws: CropDraws, heights: NDArray[np.int64], widths: NDArray[np.int64], *, aspect: tuple[float, float]
) -> NDArray[np.int64]:
    """Windows (n, 4) as top, left, height, width in pixels: the first of ten tries that fits, else a central one.

    Same rule as torchvision's RandomResizedCrop, which rounds halves to even where this rounds them up.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    root = np.sqrt((heights * widths).astype(np.float64))[:, None]
    w = np.floor(root * draws.width_factor + 0.5).astype(np.int64)
    h = np.floor(root * draws.height_factor + 0.5).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    central_h, central_w = central_window(heights, widths, aspect)
    h = np.where(found, np.take_along_axis(h, first, 1)[:, 0], central_h)
    w = np.where(found, np.take_along_axis(w, first, 1)[:, 0], central_w)
    top = np.where(found, np.floor(draws.top * (heights - h + 1)), (heights - h) // 2)
    left = np.where(found, np.floor(draws.left * (widths - w + 1)), (widths - w) // 2)
    return np.stack([top.astype(np.int64), left.astype(np.int64), h, w], axis=1)


def central_window(
    heights: NDArray[np.int64], widths: NDArray[np.int64], aspect: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Height and width of the largest central window whose aspect ratio lies in the range."""
    w = np.minimum(widths, np.floor(heights * aspect[1] + 0.5).astype(np.int64))
    h = np.minimum(heights, np.floor(widths / aspect[0] + 0.5).astype(np.int64))
    return np.maximum(h, 1), np.maximum(w, 1)


def padded_crops(
    draws: CropDraws, heights: NDArray[np.int64], widths: NDArray[np.int64], *, padding: int, image_size: int
) -> NDArray[np.int64]:
    """Top and left (n, 2) of square windows in images with `padding` pixels of border on each side, counted from the image.

    Every place within the border is as likely as any other, as in torchvision's RandomCrop; a window that begins in the border
    begins at a negative number. Images without room for a window (`room_for_crops`) have no meaningful one.
    """
    room = room_for_crops(heights, widths, padding=padding, image_size=image_size)
    return np.floor(np.stack([draws.top, draws.left], axis=1) * (room + 1)).astype(np.int64) - padding


def room_for_crops(heights: NDArray[np.int64], widths: NDArray[np.int64], *, padding: int, image_size: int) -> NDArray[np.int64]:
    """Pixels (n, 2) down and across by which padded images are larger than a window; negative where none fits."""
    return np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1) + 2 * padding - image_size


def central_crops(
    heights: NDArray[np.int64], widths: NDArray[np.int64], *, resize: int, image_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Evaluation: sizes (n, 2) after the shorter side was resized, and top and left (n, 2) of the central crop in them.

    Sizes by integer floor and the offset rounded half to even, as torchvision does both: a pixel's shift, which the usual
    resize_shorter and crop of DALI make on most images, changes 2-3 % of the predictions.
    """
    sizes = np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1)
    resized = sizes * resize // sizes.min(axis=1, keepdims=True)
    room = resized - image_size
    half = room // 2
    return resized, half + (room & 1) * (half & 1)


def regions_under_crops(
    sizes: NDArray[np.int64], resized: NDArray[np.int64], offsets: NDArray[np.int64], *, image_size: int, filter_radius: float
) -> NDArray[np.int64]:
    """Windows (n, 4) of images (n, 2) that decide the pixels of crops at `offsets` (n, 2) after a resize to `resized` (n, 2).

    An antialiasing filter reaches `filter_radius` pixels of the coarser of the two grids to each side; one more is to spare.
    """
    scale = sizes / resized
    reach = filter_radius * np.maximum(scale, 1) + 1
    low = np.maximum(np.floor((offsets + 0.5) * scale - reach), 0).astype(np.int64)
    high = np.minimum(np.ceil((offsets + image_size - 0.5) * scale + reach).astype(np.int64), sizes)
    return np.concatenate([low, high - low], axis=1)
