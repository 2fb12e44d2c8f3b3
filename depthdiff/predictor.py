"""What the loop asks for the noise: the UNet on the guidance batch, with what stays the same over a run made once.

Letters: B pictures, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from depthdiff.models.plain import is_bare, version_of
from depthdiff.models.shortcuts import DeepFeatures
from depthdiff.models.unet import UNet2DConditionModel
from depthdiff.run import Run, check_tensors
from depthdiff.sampler import guide

Predict = Callable[[Tensor, Tensor], Tensor]
"""(latents scaled for the network (B, 4, h, w), timestep) -> its prediction (B, 4, h, w)."""


@contextmanager
def noise_predictor(unet: UNet2DConditionModel, run: Run) -> Iterator[Predict]:
    """Make the function that a run's loop calls; within, the UNet embeds timesteps and reads prompts once."""
    sample, told = UNetInput(unet.conv_in.weight), Told(shares=type(unet) is UNet2DConditionModel and is_bare(unet))
    deep, merging = run.shortcuts.deep_features(), run.shortcuts.merging()
    steps = zip(run.plan.calls, run.plan.numbers, strict=True)
    outside = {id(t) for t, number in steps if not run.shortcuts.guides(number / run.plan.config.num_train_timesteps)}

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        check_tensors(run, latents, unet)
        guided = run.guidance_scale > 1
        whole = not guided or id(timestep) not in outside
        context, depth = told.look_up(run, deep, whole)
        noise = unet(sample.filled(latents, depth), timestep, context, deep=deep, merging=merging).sample
        if not (guided and whole):
            return noise
        uncond, cond = noise.chunk(2)
        return guide(uncond, cond, run.guidance_scale)

    with unet.remembering(run.plan.calls):
        yield predict


class Told:
    """What the UNet is told of a run: context and depth, whole or, where guidance pauses, their half for the prompt.

    These stay the same tensors while the run's do, by which the UNet recognises a prompt that it has read.

    Args:
        shares: whether the UNet may get one depth for both halves of guidance. One that is hooked itself, or whose
            `forward` is another's, gets two, as one would of diffusers; hooks on layers within do not count.
    """

    def __init__(self, shares: bool) -> None:
        self.shares = shares
        self.source: tuple[Tensor, int, Tensor, int] | None = None
        self.all: tuple[Tensor, Tensor] | None = None
        self.half: tuple[Tensor, Tensor] | None = None
        self.whole = True

    def look_up(self, run: Run, deep: DeepFeatures | None, whole: bool) -> tuple[Tensor, Tensor]:
        """Return context and depth for the next call, and make `deep` fit them.

        Args:
            run: whose context and depth may have been replaced or changed since the last call.
            deep: forgets where they were; goes on with the prompt's half where guidance has stopped.
            whole: whether all rows are wanted.
        """
        source = (run.context, version_of(run.context), run.depth, version_of(run.depth))
        known = self.source
        if known is None or known[0] is not source[0] or known[2] is not source[2] or known[1::2] != source[1::2]:
            self.source, self.all, self.half = source, None, None
            if deep is not None:
                deep.forget()
        if deep is not None and self.whole and not whole:
            deep.keep_second_half()
        self.whole = whole
        one_depth = len(run.depth) < len(run.context)
        if whole:
            if self.all is None:
                self.all = run.context, torch.cat([run.depth] * 2) if one_depth and not self.shares else run.depth
            return self.all
        if self.half is None:
            self.half = run.context.chunk(2)[1], run.depth if one_depth else run.depth.chunk(2)[1]
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
        self.version = 0
        self.sample = torch.empty(0)

    def filled(self, latents: Tensor, depth: Tensor) -> Tensor:
        """Return (N, 5, h, w): the latents (B, 4, h, w), N / B times, and the depth (N, 1, h, w)."""
        channels, copies = latents.shape[1], len(depth) // len(latents)
        if depth is not self.depth or version_of(depth) != self.version:
            sample = torch.cat([torch.cat([latents.to(depth.dtype)] * copies), depth], dim=1)
            self.sample = sample.contiguous(memory_format=self.memory_format)
            self.depth, self.version = depth, version_of(depth)
        else:
            self.sample[:, :channels].unflatten(0, (copies, -1)).copy_(latents)
        return self.sample
