"""What an encoder says of the latents: a Gaussian for each number.

Letters: B batch, C channels, h and w height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from depthdiff.noise import randn


class DiagonalGaussianDistribution:
    """What the encoder says of the latents: a mean and a variance for each number.

    Args:
        parameters: (B, 2C, h, w), the mean and the logarithm of the variance, which is clamped to [-30, 20].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """(B, C, h, w), the standard deviation."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """Draw latents (B, C, h, w); see `depthdiff.noise.randn` for the generator."""
        mean = self.mean
        return mean + self.std * randn(mean.shape, generator, device=mean.device, dtype=mean.dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> DiagonalGaussianDistribution:
        """Return the distribution whose parameters are `change` of these, such as more copies of each."""
        return DiagonalGaussianDistribution(change(self.parameters))

    def mode(self) -> Tensor:
        """Return the most probable latents (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the unit normal, summed over a sample: (B,), in nats. Source: arXiv:1312.6114, appendix B."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))
