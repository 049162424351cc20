"""One step without consequences before the first real one."""

import torch
from torch import nn

from imagenet_swa.runtime import Runtime


def rehearse(network: nn.Module, batch_size: int, image_size: int, runtime: Runtime) -> None:
    """A forward and backward pass over black images, which leaves parameters, buffers and gradients as they were.

    After its first backward pass DDP puts the gradients into other buckets, in the order in which they came, and where a
    gradient lies in a bucket decides the order in which its parts are summed over ranks. With this, a resumed run's first step
    has the buckets, and so the last bits, that the same step has in the middle of an uninterrupted run.
    """
    if runtime.world_size == 1:
        return
    before = [buffer.clone() for buffer in network.buffers()]
    network.train()
    images = torch.zeros(batch_size, 3, image_size, image_size, device=runtime.device)
    runtime.accelerator.backward(network(images).float().sum())
    for parameter in network.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, saved in zip(network.buffers(), before, strict=True):
            buffer.copy_(saved)
