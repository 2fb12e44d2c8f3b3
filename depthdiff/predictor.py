"""What the loop asks for the noise: the UNet on the guidance batch, with what stays the same over a run made once.

Letters: B pictures, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from depthdiff.models.shortcuts import DeepFeatures
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.run import Run
from depthdiff.sampler import guide

Predict = Callable[[Tensor, Tensor], Tensor]
"""(latents scaled for the network (B, 4, h, w), timestep) -> its prediction (B, 4, h, w)."""


@contextmanager
def noise_predictor(unet: UNet2DConditionModel, run: Run) -> Iterator[Predict]:
    """Make the function that a run's loop calls; within, the UNet embeds timesteps and reads prompts once."""
    sample, told = UNetInput(unet.conv_in.weight), Told()
    deep, merging = run.shortcuts.deep_features(), run.shortcuts.merging()
    steps = zip(run.plan.calls, run.plan.numbers, strict=True)
    outside = {id(t) for t, number in steps if not run.shortcuts.guides(number / run.plan.config.num_train_timesteps)}

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        guided = run.guidance_scale > 1
        whole = not guided or id(timestep) not in outside
        context, depth = told.look_up(run, deep, whole)
        copies = 2 if guided and whole else 1
        inputs = sample.filled(latents, depth, copies)
        noise = unet(inputs, timestep, context, deep=deep, merging=merging).sample
        if copies == 1:
            return noise
        uncond, cond = noise.chunk(2)
        return guide(uncond, cond, run.guidance_scale)

    with unet.remembering(run.plan.calls):
        yield predict


class Told:
    """What the UNet is told of a run: context and depth, whole or, where guidance pauses, their half for the prompt.

    The halves stay the same tensors while the run's do, by which the UNet recognises a prompt that it has read.
    """

    def __init__(self) -> None:
        self.source: tuple[Tensor, int, Tensor, int] | None = None
        self.half: tuple[Tensor, Tensor] | None = None
        self.whole = True

    def look_up(self, run: Run, deep: DeepFeatures | None, whole: bool) -> tuple[Tensor, Tensor]:
        """Return context and depth for the next call, and make `deep` fit them.

        Args:
            run: whose context and depth may have been replaced or changed since the last call.
            deep: forgets where they were; goes on with the prompt's half where guidance has stopped.
            whole: whether all rows are wanted.
        """
        source = (run.context, run.context._version, run.depth, run.depth._version)
        known = self.source
        if known is None or known[0] is not source[0] or known[2] is not source[2] or known[1::2] != source[1::2]:
            self.source, self.half = source, None
            if deep is not None:
                deep.forget()
        if deep is not None and self.whole and not whole:
            deep.keep_second_half()
        self.whole = whole
        if whole:
            return run.context, run.depth
        if self.half is None:
            self.half = run.context.chunk(2)[1], run.depth.chunk(2)[1]
        return self.half


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
