"""One update of SGD from a global batch, which is not made where a loss or a gradient is not finite."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from imagenet_swa.agreement import Agreement, Verdict, Wishes, share_of_good
from imagenet_swa.config import Config, TrainingError
from imagenet_swa.data.batch import Batch
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.optim import bare
from imagenet_swa.plan import Plan
from imagenet_swa.runtime import Runtime

WAY_OUT = (
    "nothing of it was averaged or saved. Start again with a lower swa.lr_max or another speed.precision, into another output"
)
_MOST_NAMED = 4
_SMALLEST_LOSS_SCALE = 2.0**-14


@dataclass(frozen=True)
class _Seen:
    """What a rank's part of a step was made of: image numbers and their losses, both (n,)."""

    step: int
    indices: list[np.ndarray]
    losses: list[torch.Tensor]


class Stepper:
    """Launches steps and learns, on a GPU a step later, what became of them.

    Whether all losses and gradients of a step are finite, on all ranks, is known to the device when it comes to the update,
    which a fused optimizer leaves out if they are not, with all that follow. The host need not wait. Without a fused optimizer,
    and with a loss scale, it does.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        config: Config,
        runtime: Runtime,
        index: ImageIndex,
    ) -> None:
        self._network, self._optimizer, self._plan = network, optimizer, plan
        self._config, self._runtime, self._index = config, runtime, index
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._device_decides = config.speed.fused_optimizer and runtime.accelerator.scaler is None
        lag = int(self._device_decides and runtime.device.type == "cuda")
        self._agreement = Agreement(runtime, lag=lag)
        self._seen: deque[_Seen] = deque()  # of the steps without a verdict
        self._verdicts: list[Verdict] = []

    def launch(self, step: int, stream: Iterator[Batch], wishes: Wishes) -> None:
        """One update from the next global batch of the stream.

        Raises:
            TrainingError: it was known at once not to be finite; the update was not made.
        """
        self._optimizer.zero_grad(set_to_none=True)
        loss, num_left_out = self._backward(step, stream)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        is_finite = loss.isfinite()
        if self._runtime.accelerator.scaler is None:  # else an infinite gradient is its business
            is_finite &= are_finite(gradients)
        vote = self._agreement.vote(wishes, loss=loss, num_left_out=num_left_out, is_finite=is_finite)
        if self._config.data.on_bad_image == "skip":
            share = share_of_good(vote, self._plan.global_batch_size).float()
            for gradient in gradients:
                gradient.mul_(share)  # the mean over the images that there are
        if self._device_decides:
            set_found_inf(self._optimizer, self._agreement.poison)
        else:
            self._verdicts += self._read(all_of_them=True)
        self._optimizer.step()
        self._check_loss_scale(step)

    def verdicts(self, *, all_of_them: bool = False) -> list[Verdict]:
        """What all ranks said about the steps since the last call, in order; perhaps without the newest one.

        Raises:
            TrainingError: a loss or gradient was not finite; no update was made from then on.
        """
        found, self._verdicts = self._verdicts + self._read(all_of_them=all_of_them), []
        return found

    def _backward(self, step: int, stream: Iterator[Batch]) -> tuple[torch.Tensor, int]:
        """This rank's part of the mean loss, (), and the number of its bad images; leaves the gradients in the parameters."""
        plan, runtime = self._plan, self._runtime
        total, num_left_out = torch.zeros((), device=runtime.device), 0
        seen = _Seen(step, [], [])
        self._seen.append(seen)
        for part in range(plan.num_accumulation):
            batch = next(stream)
            num_left_out += len(batch.left_out)
            is_last = part + 1 == plan.num_accumulation
            if is_last:  # a rank that never comes here, with a loader that hangs, is behind those that wait for its gradients
                runtime.doing(f"training, step {step + 1}, which needs all gradients")
            with nullcontext() if is_last else runtime.accelerator.no_sync(self._network):
                logits = self._network(batch.images)
                smoothing = self._config.optimizer.label_smoothing
                losses = F.cross_entropy(logits.float(), batch.labels, reduction="none", label_smoothing=smoothing)
                loss = losses.sum() / plan.global_batch_size
                # DDP averages gradients over ranks; times their number, the average is the gradient of the global mean.
                runtime.accelerator.backward(loss * plan.world_size)
            total += loss.detach()
            seen.indices.append(batch.indices)
            seen.losses.append(losses.detach())
        return total, num_left_out

    def _read(self, *, all_of_them: bool) -> list[Verdict]:
        found = self._agreement.verdicts(all_of_them=all_of_them)
        for verdict in found:
            seen = self._seen.popleft()
            if verdict.num_not_finite:
                raise TrainingError(self._what_happened(seen))
        return found

    def _what_happened(self, seen: _Seen) -> str:
        """Step and images, the same line on every rank."""
        indices = np.concatenate(seen.indices)
        is_bad = ~torch.cat(seen.losses).isfinite().cpu().numpy()
        everybody = self._runtime.gather((indices[is_bad].tolist(), indices.tolist()))
        bad = sorted(i for of_rank, _ in everybody for i in of_rank)
        if bad:
            return f"the loss of step {seen.step + 1} is infinite or NaN for {self._named(bad)}; no update was made, {WAY_OUT}"
        batch = self._named(sorted(i for _, of_rank in everybody for i in of_rank))
        return f"a gradient of step {seen.step + 1} is infinite or NaN, its batch holds {batch}; no update was made, {WAY_OUT}"

    def _named(self, indices: list[int]) -> str:
        """`image 17 (n01440764/a.JPEG), 20 (...) and 30 others`."""
        named = ", ".join(f"{i} ({self._index.listed_name(i)})" for i in indices[:_MOST_NAMED])
        rest = f" and {len(indices) - _MOST_NAMED} others" if len(indices) > _MOST_NAMED else ""
        return f"image{'s' if len(indices) > 1 else ''} {named}{rest}"

    def _check_loss_scale(self, step: int) -> None:
        """fp16: the scaler makes no update where a gradient is not finite, and halves its scale, for ever if need be."""
        scaler: Any = self._runtime.accelerator.scaler
        if scaler is not None and scaler.get_scale() < _SMALLEST_LOSS_SCALE:
            raise TrainingError(f"by step {step + 1} gradients are infinite or NaN whatever the loss scale; {WAY_OUT}")


def are_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """() bool on the device: whether no gradient holds an infinity or a NaN. Those of a norm above 1.8e19 count as infinite."""
    return nn.utils.get_total_norm(gradients, norm_type=2.0).isfinite()


def set_found_inf(optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
    """Let a fused optimizer look at this () tensor in each step: where it is 1, it leaves parameters and momentum alone."""
    setattr(bare(optimizer), "found_inf", found_inf)  # noqa: B010  torch's own name for it, declared nowhere
