"""Restart-marker copies: checked by pixels of Pillow and DALI, and by a JPEG reader of this file's own."""

import io
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagenet_swa.config import InputError
from imagenet_swa.data import native
from imagenet_swa.data.restart import add_restart_markers, jpeg_sizes, take_segments

compiled = pytest.mark.skipif(native.library() is None, reason="the package was installed without a C compiler")
SIZES = [(1, 1), (7, 70), (16, 16), (33, 5), (40, 129), (70, 67), (57, 68), (130, 200)]
KINDS = [
    "grey",
    "grey 2x2",
    "4:4:4",
    "4:2:2",
    "4:2:0",
    "4:4:0",
    "4:1:1",
    "4:1:0",
    "RGB",
    "Adobe",
    "JFIF",
    "CMYK",
    "optimised",
    "restarts",
]


# --------------------------------------------------------------------------------------------------------- images


def noise(height: int, width: int, channels: int, *, seed: int = 0) -> Image.Image:
    """Large patches with noise on them: coarse and fine coefficients, and chroma that differs from pixel to pixel."""
    random = np.random.default_rng((seed, height, width, channels))
    coarse = random.integers(0, 200, (height // 9 + 1, width // 9 + 1, channels))
    pixels = np.kron(coarse, np.ones((9, 9, 1), int))[:height, :width] + random.integers(0, 56, (height, width, channels))
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    return Image.fromarray(pixels.astype(np.uint8).squeeze(-1) if channels == 1 else pixels.astype(np.uint8), mode)


def save(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 85, **options})
    return file.getvalue()


def segments(jpeg: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(position, marker, payload) of the header's segments, SOS the last."""
    position, marker = 2, 0
    while marker != 0xDA:
        marker, length = jpeg[position + 1], struct.unpack(">H", jpeg[position + 2 : position + 4])[0]
        yield position, marker, jpeg[position + 4 : position + 2 + length]
        position += 2 + length


def frame_at(jpeg: bytes) -> int:
    """Where the payload of the frame header starts."""
    return next(position + 4 for position, marker, _ in segments(jpeg) if marker in (0xC0, 0xC1, 0xC2))


def with_frame(jpeg: bytes, height: int, width: int, factors: int) -> bytes:
    """The same coefficients as another image: an encoder for sampling factors that Pillow does not write."""
    at = frame_at(jpeg)
    changed = bytearray(jpeg)
    changed[at + 1 : at + 5] = struct.pack(">HH", height, width)
    changed[at + 7] = factors
    return bytes(changed)


def image_of(kind: str, height: int, width: int, **options: object) -> bytes:
    """A JPEG of noise; for some kinds the blocks of a usual one in another arrangement, a mosaic but a valid JPEG."""
    colour = noise(height, width, 3)
    match kind:
        case "grey":
            return save(noise(height, width, 1), **options)
        case "grey 2x2":
            return with_frame(save(noise(height, width, 1), **options), height, width, 0x22)
        case "4:4:4" | "4:2:2" | "4:2:0":
            return save(colour, subsampling=kind, **options)
        case "4:4:0":  # as many MCUs as a 4:2:2 image of exchanged sides
            return with_frame(save(noise(width, height, 3), subsampling="4:2:2", **options), height, width, 0x12)
        case "4:1:1":  # MCUs of 32 x 8 where there were 16 x 16
            twice, half = 2 * height, -(-width // 2)
            return with_frame(save(noise(twice, half, 3), subsampling="4:2:0", **options), height, width, 0x41)
        case "4:1:0":
            half, twice = -(-height // 2), 2 * width
            return with_frame(save(noise(half, twice, 3), subsampling="4:2:0", **options), height, width, 0x14)
        case "RGB":
            return save(colour, keep_rgb=True, **options)
        case "Adobe":  # says that the components are R, G and B, in place of JFIF's segment of 18 bytes
            return b"\xff\xd8\xff\xee\x00\x0eAdobe" + bytes([0, 100, 0, 0, 0, 0, 0]) + save(colour, **options)[20:]
        case "JFIF":  # says that components named R, G and B are none
            jfif = b"\xff\xd8\xff\xe0\x00\x10JFIF\0" + bytes([1, 1, 0, 0, 1, 0, 1, 0, 0])
            return jfif + save(colour, keep_rgb=True, **options)[2:]
        case "CMYK":
            return save(noise(height, width, 4), **options)
        case "optimised":
            return save(colour, optimize=True, quality=60, **options)
        case "restarts":
            return save(colour, restart_marker_blocks=3, **options)
    raise ValueError(kind)


def pixels_of(jpeg: bytes | np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(bytes(jpeg))) as image:
        return np.asarray(image)


def array_of(jpeg: bytes) -> np.ndarray:
    return np.frombuffer(jpeg, np.uint8)


def copy_of(jpeg: bytes, *, pixels: int = 64) -> bytes:
    copy = add_restart_markers(jpeg, pixels=pixels)
    assert copy is not None
    return copy


def random_windows(random: np.random.Generator, height: int, width: int, num: int) -> np.ndarray:
    """Windows of all sizes, (num, 4); every second side touches or nearly touches an edge."""
    windows = []
    for _ in range(num):
        sides = []
        for length in (height, width):
            size = int(random.integers(1, length + 1))
            room = length - size
            near, far = min(room, int(random.integers(0, 4))), int(random.integers(0, room + 1))
            sides.append(((near, room - near, far, far)[random.integers(4)], size))
        windows.append([sides[0][0], sides[1][0], sides[0][1], sides[1][1]])
    return np.array(windows, np.int64)


def cut(pixels: np.ndarray, window: np.ndarray) -> np.ndarray:
    top, left, height, width = window
    assert top >= 0 and left >= 0 and top + height <= pixels.shape[0] and left + width <= pixels.shape[1]
    return pixels[top : top + height, left : left + width]


# ------------------------------------------------------------------------------------------- an independent reader


def read_coefficients(jpeg: bytes) -> list[np.ndarray]:
    """Quantised coefficients of each component in the order of the file, (blocks, 64) in zigzag order: T.81 by the letter."""
    codes: dict[tuple[int, int], dict[str, int]] = {}
    interval, frame, scan, end = 0, b"", b"", 0
    for position, marker, payload in segments(jpeg):
        end = position + 4 + len(payload)
        if marker in (0xC0, 0xC1):
            frame = payload
        elif marker == 0xDD:
            (interval,) = struct.unpack(">H", payload)
        elif marker == 0xDA:
            scan = payload
        while marker == 0xC4 and payload:
            total, code, symbols = sum(payload[1:17]), 0, iter(payload[17:])
            table = codes[payload[0] >> 4, payload[0] & 15] = {}
            for length in range(1, 17):
                for _ in range(payload[length]):
                    table[format(code, f"0{length}b")] = next(symbols)
                    code += 1
                code *= 2
            payload = payload[17 + total :]
    height, width, num = *struct.unpack(">HH", frame[1:5]), frame[5]
    factors = [(frame[7 + 3 * c] >> 4, frame[7 + 3 * c] & 15) if num > 1 else (1, 1) for c in range(num)]
    tables = [(scan[2 + 2 * c] >> 4, scan[2 + 2 * c] & 15) for c in range(num)]
    per_row, rows = -(-width // (8 * max(h for h, _ in factors))), -(-height // (8 * max(v for _, v in factors)))
    blocks: list[list[list[int]]] = [[] for _ in range(num)]
    bits, at, predictors = "", 0, [0] * num

    def start_segment(start: int) -> int:
        """Make `bits` of what comes up to the next marker; where that stands."""
        nonlocal bits
        stop = start
        while jpeg[stop] != 0xFF or jpeg[stop + 1] == 0:
            stop += 1
        bits = "".join(format(byte, "08b") for byte in jpeg[start:stop].replace(b"\xff\x00", b"\xff"))
        return stop

    def take(table: dict[str, int]) -> tuple[int, int]:
        """A symbol's upper half (for DC: nothing) and the signed number behind it."""
        nonlocal at
        length = next(n for n in range(1, 17) if bits[at : at + n] in table)
        symbol = table[bits[at : at + length]]
        size = symbol & 15
        extra = bits[at + length : at + length + size]
        at += length + size
        value = int(extra or "0", 2)
        return symbol, value if not extra or extra[0] == "1" else value - 2**size + 1

    marker_at = start_segment(end)
    for mcu in range(rows * per_row):
        if interval and mcu and mcu % interval == 0:
            assert jpeg[marker_at + 1] == 0xD0 + (mcu // interval - 1) % 8
            assert set(bits[at:]) <= {"1"} and len(bits) - at < 8
            marker_at, at, predictors = start_segment(marker_at + 2), 0, [0] * num
        for c, (h, v) in enumerate(factors):
            for _ in range(h * v):
                block = [0] * 64
                predictors[c] += take(codes[0, tables[c][0]])[1]
                block[0], k = predictors[c], 1
                while k < 64:
                    symbol, value = take(codes[1, tables[c][1]])
                    if symbol == 0:
                        break
                    k += symbol >> 4
                    block[k] = value
                    k += 1
                blocks[c].append(block)
    assert jpeg[marker_at : marker_at + 2] == b"\xff\xd9"
    return [np.array(component) for component in blocks]


def interval_of(jpeg: bytes) -> int:
    return next(struct.unpack(">H", payload)[0] for _, marker, payload in segments(jpeg) if marker == 0xDD)


# ----------------------------------------------------------------------------------------------------------- copies


@compiled
@pytest.mark.parametrize("pixels", [8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_the_coefficients_of_its_original(kind: str, pixels: int):
    """Read by the letter of the standard, every quantised coefficient of the copy is the original's, and so is every pixel."""
    jpeg = image_of(kind, 45, 139)
    copy = copy_of(jpeg, pixels=pixels)
    for ours, theirs in zip(read_coefficients(copy), read_coefficients(jpeg), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(pixels_of(copy), pixels_of(jpeg))


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_of_a_copy_is_the_copy(kind: str, size: tuple[int, int]):
    """Copying twice changes nothing more."""
    copy = copy_of(image_of(kind, *size))
    assert add_restart_markers(copy) == copy


@compiled
@pytest.mark.parametrize(
    ("width", "pixels", "interval"),
    [
        (512, 64, 8),
        (511, 64, 8),
        (505, 64, 8),
        (504, 64, 7),
        (512, 40, 4),
        (512, 8, 1),
        (5, 64, 1),
        (64, 64, 8),
        (72, 64, 3),
        (375, 64, 47),  # 47 is a prime number: one MCU a segment, or a whole row
        (376, 8, 1),
        (1000, 64, 5),
        (464, 64, 29),  # 58 = 2 x 29: 2 MCUs are not more than a quarter of 64 pixels
        (512, 0, 1),
        (512, 2**40, 64),
    ],
)
def test_segments_divide_a_row_of_blocks(width: int, pixels: int, interval: int):
    """A segment is the largest divisor of a row not wider than asked; if that is a quarter of it or less, the next larger one."""
    assert interval_of(copy_of(image_of("4:4:4", 9, width), pixels=pixels)) == interval


@compiled
def test_everything_else_in_the_file_is_kept():
    """Comment, EXIF, profile, quantisation tables, Adobe's and JFIF's segments and what follows the image stay, in order."""
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = save(noise(50, 150, 4), exif=exif, icc_profile=bytes(range(256)) * 300, comment=b"a comment", quality=70)
    jpeg = jpeg.replace(b"\xff\xdb", b"\xff\xe9\x00\x0csomebody's\xff\xdb", 1) + b"more from the camera"
    copy = copy_of(jpeg)

    def others(data: bytes) -> list[tuple[int, bytes]]:
        return [(m, p) for _, m, p in segments(data) if m not in (0xC4, 0xDD) and not p.startswith(b"SWARST")]

    assert others(copy) == others(jpeg)
    assert {0xE1, 0xE2, 0xE9, 0xEE, 0xFE, 0xDB} <= {marker for marker, _ in others(copy)}
    assert copy.endswith(b"\xff\xd9more from the camera")
    assert add_restart_markers(copy) == copy


@compiled
@pytest.mark.parametrize("kind", ["grey", "4:2:0", "restarts"])
def test_the_table_tells_where_the_segments_lie(kind: str):
    """The private APP9 holds R and the lengths of the pieces into which a search for markers cuts the scan."""
    copy = copy_of(image_of(kind, 130, 200))
    *_, (start, _, scan_header) = segments(copy)
    scan = copy[start + 4 + len(scan_header) :]
    marks = [i for i in range(len(scan) - 1) if scan[i] == 0xFF and scan[i + 1] != 0]
    pieces = [marks[0], *(after - before - 2 for before, after in pairwise(marks))]
    (table,) = [p for _, marker, p in segments(copy) if marker == 0xE9]
    assert table == struct.pack(f">7sBH{len(pieces)}H", b"SWARST", 1, interval_of(copy), *pieces)


@compiled
def test_a_copy_is_hardly_larger_for_optimal_tables():
    """Where the original has the standard's tables, the copy is smaller than the original in spite of its markers."""
    jpeg = save(noise(300, 512, 3), quality=95)
    assert len(copy_of(jpeg)) < len(jpeg)


def several_scans(height: int, width: int) -> bytes:
    """A sequential JPEG whose components come one after the other."""
    grey = [save(noise(height, width, 1, seed=seed)) for seed in range(3)]
    at, (*_, (scan_at, _, _)) = frame_at(grey[0]), segments(grey[0])
    components = b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + components
    header = grey[0][: at - 4] + frame + grey[0][at + 9 : scan_at]
    scans = [b"\xff\xda\x00\x08\x01" + bytes([c + 1, 0, 0, 63, 0]) + grey[c][scan_at + 10 : -2] for c in range(3)]
    return header + b"".join(scans) + b"\xff\xd9"


def changed(jpeg: bytes, offset: int, value: int) -> bytes:
    """One byte from the start of the frame header (its marker at -3) set anew."""
    at = frame_at(jpeg) + offset
    return jpeg[:at] + bytes([value]) + jpeg[at + 1 :]


@compiled
def test_what_cannot_be_copied_is_left_as_it_is():
    """Other coding processes, broken headers and tables too large give None; so does an image cut short anywhere."""
    jpeg = image_of("4:2:0", 40, 60)
    several = several_scans(40, 60)
    assert pixels_of(several).shape == (40, 60, 3)
    refused = {
        "nothing": b"",
        "text": b"no image",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "progressive": save(noise(40, 60, 3), progressive=True),
        "several scans": several,
        "12 bits": changed(jpeg, 0, 12),
        "lossless": changed(jpeg, -3, 0xC3),
        "arithmetic": changed(jpeg, -3, 0xC9),
        "hierarchical": changed(jpeg, -3, 0xC5),
        "height told later": changed(changed(jpeg, 1, 0), 2, 0),
        "more rows than data": changed(jpeg, 2, 200),
        "fewer rows than data": changed(jpeg, 2, 16),
        "no such component": changed(jpeg, 6, 77),
        "sampling factor 0": changed(jpeg, 7, 0x02),
        "MCU of more than ten blocks": with_frame(image_of("RGB", 16, 24), 32, 32, 0x44),
        "garbage before the end": jpeg[:-2] + b"\x12\x34\xff\xd9",
        "lines told after the scan": jpeg[:-2] + b"\xff\xdc\x00\x04\x00\x28\xff\xd9",
    }
    assert {name for name, data in refused.items() if add_restart_markers(data) is not None} == set()
    assert all(add_restart_markers(jpeg[:length]) is None for length in range(len(jpeg)))
    assert add_restart_markers(changed(jpeg, -3, 0xC1)) is not None  # extended sequential, 8 bits


@compiled
def test_limits_of_the_table():
    """32,761 segments fit, a row of blocks more does not; nor does a segment of more than 65,535 bytes."""
    side = 181 * 8
    copy = copy_of(save(Image.new("L", (side, side))), pixels=8)
    (part,), _ = take_segments([array_of(copy)], np.array([[side - 9, side - 9, 9, 9]], np.int64))
    assert part.size < 500
    assert add_restart_markers(save(Image.new("L", (side, side + 8))), pixels=8) is None
    row = np.random.default_rng(0).integers(0, 256, (8, 16_000)).astype(np.uint8)
    wide = save(Image.fromarray(row), quality=100)
    assert len(wide) > 66_000
    assert add_restart_markers(wide) is not None
    assert add_restart_markers(wide, pixels=16_000) is None


# ------------------------------------------------------------------------------------------------------------ parts


@compiled
@pytest.mark.parametrize("pixels", [8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_under_a_window_are_those_of_the_whole(kind: str, pixels: int):
    """Pillow's decode of the part, cut to the moved window, is its decode of the original cut to the window."""
    random = np.random.default_rng(0)
    shapes = [*SIZES, *random.integers(1, 71, (30, 2)).tolist()]
    for height, width in shapes:
        jpeg = image_of(kind, height, width)
        whole = pixels_of(jpeg)
        windows = random_windows(random, height, width, 25)
        parts, moved = take_segments([array_of(copy_of(jpeg, pixels=pixels))] * len(windows), windows)
        np.testing.assert_array_equal(moved[:, 2:], windows[:, 2:])
        for part, window, original in zip(parts, moved, windows, strict=True):
            np.testing.assert_array_equal(cut(pixels_of(part), window), cut(whole, original), err_msg=f"{original}")


@compiled
@pytest.mark.parametrize("kind", ["4:2:0", "4:2:2", "4:4:0", "grey"])
def test_every_narrow_window_at_the_right_and_lower_edge(kind: str):
    """All windows of 1 to 6 pixels a side at the last rows and columns, where decoders have rules of their own."""
    for height, width in [(33, 65), (34, 67), (40, 68), (17, 81), (35, 66)]:
        jpeg = image_of(kind, height, width)
        whole = pixels_of(jpeg)
        windows = np.array(
            [(height - a - h, width - b - w, h, w) for a in range(2) for b in range(2) for h in (1, 3) for w in range(1, 7)],
            np.int64,
        )
        parts, moved = take_segments([array_of(copy_of(jpeg, pixels=16))] * len(windows), windows)
        for part, window, original in zip(parts, moved, windows, strict=True):
            np.testing.assert_array_equal(
                cut(pixels_of(part), window), cut(whole, original), err_msg=f"{height, width, original}"
            )


def decode_with_dali(images: list[np.ndarray], windows: np.ndarray) -> list[np.ndarray]:
    """The windows of images, decoded by DALI on the CPU in one batch."""
    dali = pytest.importorskip("nvidia.dali")
    fn, types = dali.fn, dali.types
    pipeline = dali.pipeline.Pipeline(batch_size=len(images), num_threads=2, device_id=None)
    with pipeline:
        encoded, start, shape = (fn.external_source(name=name) for name in ("encoded", "start", "shape"))
        how = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        pipeline.set_outputs(fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], device="cpu", **how))
    pipeline.build()
    pipeline.feed_input("encoded", images)
    pipeline.feed_input("start", list(windows[:, :2].astype(np.int32)))
    pipeline.feed_input("shape", list(windows[:, 2:].astype(np.int32)))
    (decoded,) = pipeline.run()
    return [np.array(decoded[i]) for i in range(len(images))]


def check_with_dali(originals: list[bytes], windows: np.ndarray) -> None:
    whole = decode_with_dali([array_of(jpeg) for jpeg in originals], windows)
    parts, moved = take_segments([array_of(copy_of(jpeg)) for jpeg in originals], windows)
    for one, other in zip(decode_with_dali(parts, moved), whole, strict=True):
        np.testing.assert_array_equal(one, other)


@compiled
def test_dali_decodes_the_same_pixels():
    """DALI's region decode of the part gives the bytes that it gives for the original."""
    random = np.random.default_rng(1)
    sizes = [(h, w) for h, w in SIZES if min(h, w) > 1]
    shapes = [(kind, *size) for kind in KINDS for size in sizes for _ in range(4)]
    windows = np.concatenate([random_windows(random, h, w, 1) for _, h, w in shapes])
    check_with_dali([image_of(*shape) for shape in shapes], windows)


@compiled
def test_parts_are_small():
    """Of an image of 1024 x 1024, a window of a quarter of the area takes less than 35 % of the bytes."""
    jpeg = image_of("4:2:0", 1024, 1024)
    random = np.random.default_rng(0)
    windows = np.array([[*random.integers(0, 513, 2), 512, 512] for _ in range(20)], np.int64)
    parts, _ = take_segments([array_of(copy_of(jpeg))] * 20, windows)
    assert max(part.size for part in parts) < 0.35 * len(jpeg)


@compiled
def test_images_and_windows_that_stay_as_they_are():
    """Originals, images needed whole, other formats and windows outside come back themselves; the arguments do not change."""
    jpeg = image_of("4:2:0", 100, 200)
    plain, copy = array_of(jpeg), array_of(copy_of(jpeg))
    large = 2**63 - 1
    cases = [
        (plain, (10, 10, 20, 20)),
        (copy, (0, 0, 100, 200)),
        (copy, (1, 1, 98, 198)),
        (array_of(b"text"), (0, 0, 1, 1)),
        (np.empty(0, np.uint8), (0, 0, 1, 1)),
        *((copy, window) for window in [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 5, -5), (96, 0, 5, 5), (0, 196, 5, 5)]),
        *((copy, window) for window in [(large, 0, 5, 5), (0, 0, large, 5), (large, 0, large, 5), (-large, 0, 5, 5)]),
    ]
    windows = np.array([window for _, window in cases], np.int64)
    before = windows.copy()
    parts, moved = take_segments([image for image, _ in cases], windows)
    assert all(part is image for part, (image, _) in zip(parts, cases, strict=True))
    np.testing.assert_array_equal(moved, before)
    np.testing.assert_array_equal(windows, before)
    assert take_segments([], np.empty((0, 4), np.int64))[0] == []


@compiled
def test_a_batch_of_images_with_and_without_parts():
    """Each image's part is its own, whatever stands beside it; arrays with gaps are read as the bytes they show."""
    jpegs = [image_of(kind, 90 + i, 150 + i) for i, kind in enumerate(KINDS)]
    copies = [array_of(jpeg if i % 3 == 0 else copy_of(jpeg)) for i, jpeg in enumerate(jpegs)]
    spaced = np.zeros(2 * copies[1].size, np.uint8)
    spaced[::2] = copies[1]
    images = [copies[0], spaced[::2], *copies[2:]]
    windows = np.concatenate([random_windows(np.random.default_rng(i), 40, 60, 1) for i in range(len(jpegs))])
    parts, moved = take_segments(images, windows)
    assert [part is not image for part, image in zip(parts, images, strict=True)] == [i % 3 != 0 for i in range(len(jpegs))]
    for part, window, jpeg, original in zip(parts, moved, jpegs, windows, strict=True):
        np.testing.assert_array_equal(cut(pixels_of(part), window), cut(pixels_of(jpeg), original))


@compiled
def test_a_table_that_does_not_agree_with_the_data_is_not_believed():
    """A changed length, interval, marker or size, a lost byte or a second table: the image is taken as it is."""
    copy = copy_of(image_of("4:2:0", 130, 250))
    window = np.array([[40, 70, 20, 20]], np.int64)
    table = copy.index(b"SWARST\0\1")
    (segment,) = [copy[p : p + 4 + len(payload)] for p, marker, payload in segments(copy) if marker == 0xE9]
    after_table = table - 4 + len(segment)
    marker = copy.index(b"\xff\xd2", after_table)
    end = len(copy) - 2

    def with_byte(at: int, value: int) -> bytes:
        return copy[:at] + bytes([value]) + copy[at + 1 :]

    damaged = {
        "first length": with_byte(table + 11, copy[table + 11] ^ 1),
        "last length": with_byte(table + len(segment) - 5, copy[table + len(segment) - 5] ^ 1),
        "a length of 65,535": with_byte(table + 10, 0xFF),
        "interval": with_byte(table + 9, 3),
        "version": with_byte(table + 7, 2),
        "lost byte": copy[:marker] + copy[marker + 1 :],
        "height": changed(copy, 2, 100),
        "width": changed(copy, 4, 180),
        "end": with_byte(end + 1, 0xD5),
        "cut": copy[:-1],
        "two tables": copy[: table - 4] + segment + copy[table - 4 :],
        "a length too many": copy[: table - 2] + struct.pack(">H", len(segment)) + segment[4:] + bytes(2) + copy[after_table:],
        "markers behind the parts": copy[:table] + copy[table:].replace(b"\xff\xd1", b"\xff\xd3"),
        "markers before the parts": copy[:table] + copy[table:].replace(b"\xff\xd0", b"\xff\xd3"),
    }
    cut_in_memory = [array_of(copy)[:-length] for length in (1, 2, 3, 100, 1000)]  # what was cut off lies behind them
    images = [*map(array_of, damaged.values()), *cut_in_memory]
    parts, moved = take_segments(images, window.repeat(len(images), 0))
    names = [*damaged, *["cut in memory"] * len(cut_in_memory)]
    believed = [name for name, part, image in zip(names, parts, images, strict=True) if part is not image]
    assert believed == []
    np.testing.assert_array_equal(moved, window.repeat(len(images), 0))
    assert take_segments([array_of(copy)], window)[0][0].size < len(copy)  # and the undamaged one is


def mutations(num: int) -> Iterator[bytes]:
    """Copies and originals with changed, doubled and lost bytes, most of them in the header."""
    originals = [image_of(kind, 40, 80) for kind in KINDS] + [save(noise(40, 80, 3), progressive=True)]
    originals += [copy for copy in map(add_restart_markers, originals) if copy is not None]
    random = np.random.default_rng(0)
    for _ in range(num):
        data = bytearray(originals[random.integers(len(originals))])
        for _ in range(random.integers(0, 6)):
            at = int(random.integers(len(data) if random.random() < 0.5 else 700))
            match random.integers(5):
                case 0:
                    data[at : at + 1] = bytes([random.integers(256)])
                case 1:
                    data[at : at + 1] = b"\xff"
                case 2:
                    data[at : at + 1] = b"\x00"
                case 3:
                    del data[at : at + random.integers(1, 9)]
                case 4:
                    data[at:at] = data[at - 40 : at - 40 + random.integers(1, 40)]
        yield bytes(data if random.random() < 0.7 else data[: random.integers(len(data) + 1)])


@compiled
def test_damaged_bytes_do_no_harm():
    """Whatever the bytes: a copy, if there is one, is its own copy; a part is smaller than its image, the window inside it."""
    images = [array_of(data) for data in mutations(8000)]
    copies = [copy for copy in (add_restart_markers(image.tobytes()) for image in images) if copy is not None]
    assert 100 < len(copies) < 7900
    assert all(add_restart_markers(copy) == copy for copy in copies)
    windows = random_windows(np.random.default_rng(2), 40, 80, len(images))
    parts, moved = take_segments(images, windows)
    heights, widths = jpeg_sizes(parts)
    num_parts = 0
    for part, image, window, height, width in zip(parts, images, moved, heights, widths, strict=True):
        if part is not image:
            num_parts += 1
            assert part.size < image.size and part[-2:].tobytes() == b"\xff\xd9"
            assert window.min() >= 0 and window[0] + window[2] <= height and window[1] + window[3] <= width
    assert num_parts > 100


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


@compiled
def test_sizes_are_those_that_pillow_reads():
    """Heights and widths of every kind of JPEG, progressive and in several scans among them; 0 for everything else."""
    jpegs = [image_of(kind, 30 + i, 300 + i) for i, kind in enumerate(KINDS)]
    jpegs += [save(noise(41, 77, 3), progressive=True), several_scans(20, 90)]
    jpegs += [b"\xff\xd8\xff" + jpegs[0][2:]]  # a fill byte
    shapes = [pixels_of(jpeg).shape for jpeg in jpegs]
    others = [b"", b"\xff", b"\xff\xd8", b"text", jpegs[0][:20], changed(changed(jpegs[0], 1, 0), 2, 0), jpegs[0][2:]]
    heights, widths = jpeg_sizes([array_of(data) for data in (*jpegs, *others)])
    assert heights.dtype == widths.dtype == np.int64
    assert heights.tolist() == [shape[0] for shape in shapes] + [0] * len(others)
    assert widths.tolist() == [shape[1] for shape in shapes] + [0] * len(others)
    length = frame_at(jpegs[0]) + 9
    heights, _ = jpeg_sizes([array_of(jpegs[0])[:length], array_of(jpegs[0])[: length - 1]])
    assert heights.tolist() == [30, 0]  # nothing is read behind the end of an array


@compiled
def test_sizes_are_the_same_without_the_compiled_part(monkeypatch: pytest.MonkeyPatch):
    """The Python reader finds what the compiled one finds, in damaged headers too."""
    images = [array_of(data) for data in mutations(3000)]
    images += [image[: np.random.default_rng(3).integers(800)] for image in images[:500]]
    compiled_sizes = jpeg_sizes(images)
    monkeypatch.setattr(native, "library", lambda: None)
    np.testing.assert_array_equal(jpeg_sizes(images), compiled_sizes)
    assert 500 < np.count_nonzero(compiled_sizes[0]) < 3490


@pytest.mark.usefixtures("nothing_compiled")
def test_without_the_compiled_part():
    """No copies, and one line that says what to do; images are taken as they are; sizes are found all the same."""
    with pytest.raises(InputError, match=r"install a C compiler.* and reinstall") as error:
        add_restart_markers(b"")
    assert "\n" not in str(error.value)
    images = [array_of(image_of("4:2:0", 20, 30)), array_of(b"text")]
    windows = np.array([[1, 2, 3, 4], [0, 0, 1, 1]], np.int64)
    parts, moved = take_segments(images, windows)
    assert all(part is image for part, image in zip(parts, images, strict=True))
    np.testing.assert_array_equal(moved, windows)
    assert [sizes.tolist() for sizes in jpeg_sizes(images)] == [[20, 0], [30, 0]]
    assert [sizes.tolist() for sizes in jpeg_sizes([])] == [[], []]


# -------------------------------------------------------------------------------------------------------- real data


@compiled
@pytest.mark.realdata
def test_real_images(real_data: Path):
    """All 154: the same pixels, under windows too, by Pillow and by DALI, for at most 2.9 % more bytes on average."""
    random = np.random.default_rng(0)
    jpegs = [path.read_bytes() for path in sorted((real_data / "train").rglob("*.JPEG"))]
    heights, widths = jpeg_sizes([array_of(jpeg) for jpeg in jpegs])
    growth, small, drawn = [], [], []
    for jpeg, height, width in zip(jpegs, heights, widths, strict=True):
        copy, whole = copy_of(jpeg), pixels_of(jpeg)
        assert whole.shape[:2] == (height, width)
        np.testing.assert_array_equal(pixels_of(copy), whole)
        windows = random_windows(random, height, width, 8)
        parts, moved = take_segments([array_of(copy)] * len(windows), windows)
        for part, window, original in zip(parts, moved, windows, strict=True):
            np.testing.assert_array_equal(cut(pixels_of(part), window), cut(whole, original))
        growth.append(len(copy) / len(jpeg) - 1)
        if height * width < 1_000_000:
            small.append(jpeg)
            drawn.append(windows[0])
    assert len(jpegs) == 154
    assert np.mean(growth) <= 0.029
    check_with_dali(small, np.array(drawn))
