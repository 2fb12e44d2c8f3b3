"""A Gaussian for each number of the latents, as the encoder predicts it.

Letters: B batch, C channels, h and w height and width of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from depthdiff.noise import randn


class DiagonalGaussianDistribution:
    """A mean and a variance for each number of the latents.

    Args:
        parameters: (B, 2C, h, w), the mean and the logarithm of the variance, which is clamped to [-30, 20].
        deterministic: take the variance as 0.

    Attributes:
        mean: (B, C, h, w).
        logvar: (B, C, h, w), the logarithm of the variance.
        std: (B, C, h, w), the standard deviation.
        var: (B, C, h, w), the variance.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), self.logvar.exp()
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """Draw latents (B, C, h, w); see `depthdiff.noise.randn` for the generator."""
        noise = randn(self.mean.shape, generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the most probable latents (B, C, h, w)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Compute the divergence from another Gaussian, the unit normal if None: (B,), in nats.

        Source: arXiv:1312.6114, appendix B.
        """
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        ratio = (self.mean - other.mean) ** 2 / other.var + self.var / other.var
        return 0.5 * (ratio - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Compute the negative logarithm of the density of `sample` (B, C, h, w), summed over `dims`, in nats."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
