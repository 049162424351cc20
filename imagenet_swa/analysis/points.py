"""Measure networks at many points of weight space: BatchNorm statistics recomputed, then train loss and errors of each.

Points are shared out over the ranks, each of which goes through all images by itself; several points share a pass. What is
finished stands in journals on disk, a file per rank, so that a measurement goes on where it stopped, on any number of ranks.
The numbers are the same to the last bit for any number of ranks of the same arithmetic: on CPUs, as many threads each.
"""

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imagenet_swa.config import OptimizerConfig, TrainingError, require, to_plain
from imagenet_swa.files import flush_file
from imagenet_swa.models import Weights
from imagenet_swa.optim import make_sgd
from imagenet_swa.plain import is_number, parse_json
from imagenet_swa.runtime import Runtime
from imagenet_swa.session import Session

Values = dict[str, Any]
_MOST_NETWORKS_PER_PASS = 16
_SHARE_OF_MEMORY = 4
_SECONDS_BETWEEN_LOOKS = 0.5
_MEASURED = {"train_loss", "train_nll", "l2", "train_error", "test_error", "test_nll"}
_FAILED = "failed-rank-*.txt"


@dataclass(frozen=True)
class Point:
    """A place in weight space.

    Attributes:
        name: for people.
        definition: what decides its weights, as plain values: it is recognised by this when a measurement goes on.
        make: its weights, made when they are needed.
    """

    name: str
    definition: dict[str, Any]
    make: Callable[[], Weights]


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How points are measured.

    Attributes:
        epoch, step: of the run; decide the crops of the BatchNorm pass.
        num_batchnorm_images, num_train_images: how many training images; None: all.
        networks_per_pass: points that share a pass over the data; None: what fits into a quarter of the free memory, at most 16.
    """

    epoch: int
    step: int
    num_batchnorm_images: int | None = None
    num_train_images: int | None = None
    networks_per_pass: int | None = None


def measure_points(
    session: Session,
    points: Sequence[Point],
    *,
    journal: Path,
    settings: MeasureSettings,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Values]:
    """The values of each point by its name, on every rank: `train_loss` (with the L2 term), `train_nll`, `l2`, `train_error`,
    `test_error`, `test_nll`, and the numbers of images.

    The statistics of a point see the same images and the same dropout whoever measures it and whatever else shares its pass.

    Args:
        journal: folder of the journals; those that it holds are read, and only what is missing is measured. Lines that
            another configuration, other images or other weights left there stay and are not used.

    Raises:
        InputError: the ranks do not see the same folder.
        TrainingError: another rank failed.
    """
    runtime = session.runtime
    _prepare_folder(journal, runtime)
    conditions = conditions_of(session, settings)
    # Rank 0's, since the last bits of what defines a point may differ between machines.
    keys = runtime.from_main({point.name: key_of(point, conditions) for point in points})
    assert keys.keys() == {point.name for point in points} and len(keys) == len(points), "names that are not one per point"
    done = runtime.from_main(read_journals(journal) if runtime.is_main else None)
    missing = list({keys[point.name]: point for point in points if keys[point.name] not in done}.values())
    if runtime.is_main:
        say(_what_is_to_do(len(set(keys.values())), len(missing), len(done)))
    mine = missing[runtime.rank :: runtime.world_size]
    try:
        if mine:
            _measure_and_note(session, mine, keys, journal, settings, say if runtime.is_main else lambda _line: None)
    except BaseException as error:
        (journal / _FAILED.replace("*", f"{runtime.rank:02d}")).write_text(f"{type(error).__name__} {error}"[:500])
        raise
    values = _all_values(journal, set(keys.values()), runtime)
    return {name: values[key] for name, key in keys.items()}


def conditions_of(session: Session, settings: MeasureSettings) -> dict[str, Any]:
    """All but the weights that decides a point's values."""
    config = session.config
    train, val = (index.fingerprint for index in session.indices)
    return {
        "model": {name: value for name, value in to_plain(config.model).items() if name not in ("weights", "pretrained")},
        "preprocessing": to_plain(session.preprocessing),
        "weight_decay": config.optimizer.weight_decay,
        "decay_norm_and_bias": config.optimizer.decay_norm_and_bias,
        "seed": config.seed,
        "training images": train,
        "validation images": val,
        "decoder": session.loaders.train.decoder,
        "batch_size": config.evaluation.batch_size,
        "precision": config.evaluation.precision,
        "tf32": config.speed.tf32,
        "channels_last": config.speed.channels_last,
        "device": session.runtime.device.type,
        "epoch": settings.epoch,
        "step": settings.step,
        "num_batchnorm_images": settings.num_batchnorm_images,
        "num_train_images": settings.num_train_images,
    }


def key_of(point: Point, conditions: dict[str, Any]) -> str:
    """What a point's values are found by in the journals."""
    return hashlib.sha256(json.dumps([point.definition, conditions], sort_keys=True).encode()).hexdigest()


def _what_is_to_do(num_points: int, num_missing: int, num_lines: int) -> str:
    num_found = num_points - num_missing
    unused = num_lines - num_found
    text = f"{num_points} points, {num_found} of them measured before" if num_found else f"{num_points} points to measure"
    return f"{text}; {unused} other points in the journals, of other settings or weights, are left alone" if unused else text


# ------------------------------------------------------------------------------------------------------- journals


def read_journals(folder: Path) -> dict[str, Values]:
    """Values by key from the journals of all ranks. A line that a killed process left half-written counts as absent."""
    found: dict[str, Values] = {}
    for path in sorted(folder.glob("points-rank-*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                entry = parse_json(line)
                if entry["values"].keys() >= _MEASURED and all(v is None or is_number(v) for v in entry["values"].values()):
                    found.setdefault(entry["key"], _with_nan(entry["values"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return found


def _measure_and_note(
    session: Session,
    points: Sequence[Point],
    keys: dict[str, str],
    journal: Path,
    settings: MeasureSettings,
    say: Callable[[str], None],
) -> None:
    """Measure the points of this rank, a line on disk for each once its pass is over."""
    num_passes = math.ceil(len(points) / (settings.networks_per_pass or _networks_that_fit(session)))
    start, num_done = time.perf_counter(), 0
    path = journal / f"points-rank-{session.runtime.rank:02d}.jsonl"
    with path.open("ab+") as file:
        _end_last_line(file)
        for part in np.array_split(np.arange(len(points)), num_passes):
            group = [points[i] for i in part]
            entries = [
                {"key": keys[point.name], "name": point.name, "values": _without_nan(values)}
                for point, values in zip(group, _measure(session, group, settings), strict=True)
            ]
            # At once: should two commands note into one folder, their lines must not mix.
            file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            flush_file(file)
            num_done += len(group)
            seconds = (time.perf_counter() - start) / num_done
            say(f"  {num_done} of {len(points)} points of this process, {seconds:.1f} s each")


def _prepare_folder(journal: Path, runtime: Runtime) -> None:
    """Make the folder, clear it of what an earlier failure left, and see that all ranks share it: else they wait for ever."""
    token = runtime.from_main(uuid.uuid4().hex)
    mark = journal / f"{token}.tmp"
    if runtime.is_main:
        journal.mkdir(parents=True, exist_ok=True)
        for path in journal.glob(_FAILED):
            path.unlink()
        mark.touch()
    runtime.barrier()
    num_blind = int(runtime.sum(torch.tensor(int(not mark.exists()))))
    if runtime.is_main:
        mark.unlink()
    require(
        num_blind == 0,
        f"{num_blind} of {runtime.world_size} processes do not see {journal} as rank 0 does; the folder of the results must be "
        "one that all machines share",
    )


def _end_last_line(file: Any) -> None:
    """A line that was cut off must not swallow the next one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")


def _all_values(journal: Path, wanted: set[str], runtime: Runtime) -> dict[str, Values]:
    """The journals' values once all of them are there.

    Other ranks may need hours longer where points do not divide evenly, and a barrier has its time limit: so look, and wait.
    A rank that fails says so in the folder; one that is killed ends the others through the launcher.
    """
    while not wanted <= (values := read_journals(journal)).keys():
        assert runtime.world_size > 1
        for path in journal.glob(_FAILED):
            raise TrainingError(f"another process failed, and its points are missing: {path.read_text()} ({path})")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    runtime.barrier()
    return values


def _without_nan(values: Values) -> Values:
    """JSON has no infinity and no NaN; far out a loss may be one."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _with_nan(values: Values) -> Values:
    return {k: math.nan if v is None else v for k, v in values.items()}


# ------------------------------------------------------------------------------------------------------ measuring


def _measure(session: Session, points: Sequence[Point], settings: MeasureSettings) -> Iterator[Values]:
    """Three passes for all of the points: statistics, training images, validation images."""
    networks = {str(i): session.network_with(point.make()) for i, point in enumerate(points)}
    num_statistics = recompute_statistics_alone(session, list(networks.values()), settings)
    train = session.evaluate(networks, split="train", num_images=settings.num_train_images, alone=True)
    test = session.evaluate(networks, alone=True)
    for name, network in networks.items():
        l2 = l2_term(network, session.config.optimizer)
        yield {
            "train_loss": train[name].nll + l2,
            "train_nll": train[name].nll,
            "l2": l2,
            "train_error": (train[name].num_images - train[name].num_correct) / train[name].num_images,
            "test_error": (test[name].num_images - test[name].num_correct) / test[name].num_images,
            "test_nll": test[name].nll,
            "num_train_images": train[name].num_images,
            "num_test_images": test[name].num_images,
            "num_batchnorm_images": num_statistics,
        }


def recompute_statistics_alone(session: Session, networks: Sequence[nn.Module], settings: MeasureSettings) -> int:
    """`session.recompute_batchnorm` by this rank alone, with dropout that is the same for every network.

    Otherwise the networks of a pass would share one stream of random numbers, and a point's statistics would depend on
    which others it shares a pass with.
    """
    hooks = [_same_dropout(network, session.config.seed, settings.step) for network in networks]
    try:
        return session.recompute_batchnorm(
            networks, epoch=settings.epoch, step=settings.step, num_images=settings.num_batchnorm_images, alone=True
        )
    finally:
        for hook in hooks:
            hook.remove()


def _same_dropout(network: nn.Module, *key: int) -> Any:
    """A hook that seeds the network's n-th forward pass by (key, n)."""
    num_passes = 0

    def seed(*_: object) -> None:
        nonlocal num_passes
        numbers = hashlib.sha256(repr((*key, num_passes)).encode()).digest()
        torch.manual_seed(int.from_bytes(numbers[:8]))
        num_passes += 1

    return network.register_forward_pre_hook(seed)


def l2_term(network: nn.Module, optimizer: OptimizerConfig) -> float:
    """Half the weight decay times the squared norm of the parameters that it covers: what SGD's decay is the gradient of."""
    plain = make_sgd(network, replace(optimizer, momentum=0.0, nesterov=False), fused=False)
    squares = (
        (group["weight_decay"], p.detach().double().square().sum()) for group in plain.param_groups for p in group["params"]
    )
    return math.fsum(decay / 2 * float(square) for decay, square in squares)


def _networks_that_fit(session: Session) -> int:
    """How many networks and their results fit into a quarter of what is free on the device."""
    runtime = session.runtime
    if runtime.device.type == "cuda":
        free = torch.cuda.mem_get_info(runtime.device)[0]
    else:
        free = _free_memory() // runtime.local_world_size
    num_images = max(map(len, session.indices))
    size = sum(tensor.nbytes for tensor in session.network.state_dict().values()) + 64 * num_images
    return max(1, min(_MOST_NETWORKS_PER_PASS, free // _SHARE_OF_MEMORY // size))


def _free_memory() -> int:
    """Bytes that the kernel could give to processes; without its word, what lies idle."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
