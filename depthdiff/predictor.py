"""What the loop asks for the noise: the UNet on the guidance batch, with what stays the same over a run made once.

Letters: B pictures, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.run import Run
from depthdiff.sampler import guide

Predict = Callable[[Tensor, Tensor], Tensor]
"""(latents scaled for the network (B, 4, h, w), timestep) -> its prediction (B, 4, h, w)."""


@contextmanager
def noise_predictor(unet: UNet2DConditionModel, run: Run) -> Iterator[Predict]:
    """Make the function that a run's loop calls; within, the UNet embeds timesteps and reads prompts once."""
    sample = UNetInput(unet.conv_in.weight)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        guided = run.guidance_scale > 1
        noise = unet(sample.filled(latents, run.depth, 2 if guided else 1), timestep, run.context).sample
        if not guided:
            return noise
        uncond, cond = noise.chunk(2)
        return guide(uncond, cond, run.guidance_scale)

    with unet.remembering(run.plan.calls):
        yield predict


class UNetInput:
    """One tensor for the UNet's input of every step: the depth stays in it, the latents are written into it.

    Args:
        weight: of the layer that reads it, whose memory format it takes.
    """

    def __init__(self, weight: Tensor) -> None:
        last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.depth: Tensor | None = None
        self.copies = 0
        self.sample = torch.empty(0)

    def filled(self, latents: Tensor, depth: Tensor, copies: int) -> Tensor:
        """Return (copies B, 5, h, w): the latents, `copies` times, and the depth (copies B, 1, h, w)."""
        channels = latents.shape[1]
        if depth is not self.depth or copies != self.copies:
            sample = torch.cat([torch.cat([latents] * copies), depth], dim=1)
            self.sample, self.depth, self.copies = sample.contiguous(memory_format=self.memory_format), depth, copies
        else:
            self.sample[:, :channels].unflatten(0, (copies, -1)).copy_(latents)
        return self.sample
