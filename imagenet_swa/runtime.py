"""Processes, devices and random numbers of a run; the record of the environment it ran in."""

import gc
import hashlib
import os
import platform
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.commands.config.config_args import default_config_file
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object

from imagenet_swa.config import Config, InputError, LostOthersError
from imagenet_swa.stop import StopRequest, request
from imagenet_swa.watch import Watch, start_watch

T = TypeVar("T")
_watches: list[Watch] = []  # the one of this process, as its group is
# What gloo, NCCL and the store say when a peer is gone, in errors of no class of their own.
_SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "[gloo", "gloo/transport", "NCCL")
_SIGNS_OF_LOSS += ("Broken pipe", "Failed to recv", "failed to recv", "recvValue failed", "sendBytes failed")
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """This process among the processes of the run."""

    accelerator: Accelerator
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    watch: Watch | None = None
    stop: StopRequest = request

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files: rank 0."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on every rank; exact for integers."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value of a small picklable object, on every rank."""
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def on_main(self, call: Callable[[], object]) -> None:
        """Let rank 0 do something while the others wait; what it raises, all raise, the others in words."""
        problem: Exception | None = None
        if self.is_main:
            try:
                call()
            except Exception as error:
                problem = error
        text, is_input = self.from_main((problem and str(problem), isinstance(problem, InputError)))
        if problem is not None:
            raise problem
        if text is not None:
            raise InputError(text) if is_input else LostOthersError(f"rank 0 failed: {text}")

    def gather(self, value: T) -> list[T]:
        """Every rank's value of a small picklable object, in the order of ranks, on every rank."""
        return gather_object([value]) if self.world_size > 1 else [value]

    def wants_to_stop(self, what: str) -> bool:
        """Whether this rank was asked to stop. For where all ranks are about to agree: they hear what this one does."""
        self.doing(what)
        self.stop.is_heeded = True
        return self.stop.reason is not None

    def doing(self, what: str) -> None:
        """Let the other ranks know what this one does, should they wait for it."""
        if self.watch is not None:
            self.watch.note(what)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One process of each machine goes first, the others find what it left in the cache.

        They also go when it failed, to find the same error: waiting for a process that has ended is an error of its own.
        """
        if self.local_rank > 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()

    def autocast(self, precision: str) -> AbstractContextManager[object]:
        """The named arithmetic, "fp32", "bf16" or "fp16", for a forward pass without gradients."""
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST_DTYPES[precision])

    def seed(self, *key: int, alone: bool = False) -> None:
        """Seed what networks draw themselves (dropout) by a key and, unless this process works alone, the rank: nothing to
        save, nothing to restore.
        """
        # Not numpy's SeedSequence, which takes (key) and (key, 0) for the same.
        digest = hashlib.sha256(repr((0 if alone else self.rank, *map(int, key))).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8]))


def start_runtime(config: Config) -> Runtime:
    """Join the process group that the launcher announced and choose the device.

    Raises:
        InputError: fewer processes than were asked for, or arithmetic that the device does not have.
    """
    on_gpu = torch.cuda.is_available()
    check_precision(config, on_gpu=on_gpu)
    check_trackers(config.trackers)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.speed.tf32
    torch.backends.cudnn.benchmark = on_gpu
    # torch 2.14 has another name for it, which torch 2.10 does not know and Accelerate does not pass on.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # Without a GPU, Accelerate has to be told, or N processes become N runs that overwrite each other.
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision={"fp32": "no"}.get(config.speed.precision, config.speed.precision),
        log_with=list(config.trackers) or None,
        project_dir=str(config.output),
        kwargs_handlers=[
            # Each rank keeps its own BatchNorm statistics while training; `capture` averages them.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            # The watch, which knows who is late, comes first.
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.processes.collective_minutes + 5)),
        ],
    )
    while _watches:
        _watches.pop().close()
    watch = start_watch(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        silence_seconds=config.processes.silence_seconds,
        stuck_seconds=60 * config.processes.collective_minutes,
    )
    _watches.append(watch)
    gc.collect()
    gc.freeze()  # what the imports made stays; else each full collection walks it, a tenth of a second at a time
    num_processes = accelerator.num_processes
    check_num_processes(num_processes, processes_asked_for(os.environ, _parent_command()))
    return Runtime(
        accelerator=accelerator,
        rank=accelerator.process_index,
        local_rank=accelerator.local_process_index,
        world_size=num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        device=accelerator.device,
        watch=watch,
    )


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise InputError for a tracker whose package is missing, which Accelerate would leave out without a word."""
    missing = set(trackers) - {str(tracker.value) for tracker in get_available_trackers()}
    if missing:
        raise InputError(f"trackers: {min(missing)} is not installed; pip install {min(missing)}, or leave it out")


def check_precision(config: Config, *, on_gpu: bool) -> None:
    """Raise InputError where the device cannot do what the configuration asks for."""
    precisions = (config.speed.precision, config.evaluation.precision)
    if not on_gpu and "fp16" in precisions:
        raise InputError("fp16 needs a GPU and none was found; use bf16 or fp32")
    if not on_gpu and config.model.sync_batchnorm:
        raise InputError("model.sync_batchnorm needs GPUs and none was found; set it to false")
    if on_gpu and "bf16" in precisions and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("this GPU has no bf16; set speed.precision and evaluation.precision to fp16 or fp32")


def what_others_did(error: BaseException) -> str | None:
    """A line where an error says no more than that another process of the group is gone or late; None for other errors."""
    text = " ".join(str(error).split())
    is_collective = isinstance(error, torch.distributed.DistError) or any(sign in text for sign in _SIGNS_OF_LOSS)
    if not (is_collective and torch.distributed.is_available()):
        return None
    late = _watches[0].late_ranks() if _watches else None
    return late or f"another process of this run has ended or does not answer ({text[:200]})"


def part_from_others(failure: str | None, *, lost_others: bool = False) -> bool:
    """Tell the other ranks that this one ends, and why if it failed; whether the threads that listened to them have ended."""
    return all(watch.close(failure, lost_others=lost_others) for watch in _watches)


# ------------------------------------------------------------------------------------- were all processes started?


def check_num_processes(num_processes: int, asked_for: int | None) -> None:
    """Raise InputError where a launcher silently started another number of processes than it was asked for."""
    if asked_for is not None and asked_for != num_processes:
        raise InputError(
            f"{asked_for} processes were asked for, but this run has {num_processes}: `accelerate launch --cpu` starts one "
            "whatever --num_processes says, srun alone starts runs that do not know of each other, several machines want a "
            "number that divides over them; use launch/single_node.sh, launch/multi_node.sh or launch/slurm.sbatch"
        )


def processes_asked_for(environment: Mapping[str, str], launcher: Sequence[str]) -> int | None:
    """How many processes the user asked the launcher for: by the launcher's flags, its config file or its environment.

    `accelerate launch --cpu --num_processes 2` starts one process and tells it nothing of the 2, which therefore have to
    be read from the launcher's command line; 3 processes on 2 machines become 2. None where nobody asked for a number.
    """
    if any(Path(word).name.startswith("accelerate") for word in launcher[:3]) and (number := _in_accelerate_flags(launcher)):
        return number
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    return int(environment["SLURM_STEP_NUM_TASKS"]) if "SLURM_STEP_NUM_TASKS" in environment else None


def _in_accelerate_flags(launcher: Sequence[str]) -> int | None:
    flags = dict(zip(launcher, [*launcher[1:], ""], strict=True))
    flags |= dict(word.split("=", 1) for word in launcher if word.startswith("--") and "=" in word)
    for name in ("--num_processes", "--num-processes"):
        if flags.get(name, "").isdigit():
            return int(flags[name])
    # Without the flag, what `accelerate config` once wrote into the user's home.
    config_file = Path(flags.get("--config_file", default_config_file))
    if not config_file.is_file() or ("--cpu" in launcher and "--config_file" not in flags):
        return None
    settings = yaml.safe_load(config_file.read_text())
    return settings.get("num_processes") if isinstance(settings, dict) else None


def _parent_command() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


# --------------------------------------------------------------------------------------------------- environment


def environment_record(runtime: Runtime, config: Config) -> dict[str, Any]:
    """What a reader needs to know to repeat or doubt the numbers: versions, hardware, code, launch."""
    packages = ("torch", "torchvision", "timm", "pytorchcv", "accelerate", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    return {
        "versions": {"python": platform.python_version(), "imagenet-swa": _version("imagenet-swa")}
        | {name: version for name in (*packages, "numpy", "scipy", "pillow") if (version := _version(name))},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": _cpu_name(),
        "num_cpus": num_cpus(),
        "hostname": socket.gethostname(),
        "world_size": runtime.world_size,
        "local_world_size": runtime.local_world_size,
        "device": str(runtime.device),
        "seed": config.seed,
        "command": sys.argv,
        "git": _git_state(),
    }


def num_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from, and whether files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True, timeout=30)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "."))}
    except (OSError, subprocess.SubprocessError):
        return None
