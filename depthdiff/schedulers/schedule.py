"""The noise schedule: how much noise each training timestep holds, which timesteps a run has, and what is predicted.

Letters: B batch, C, h, w channels, height and width of the latents, N steps of a run, T training timesteps. ᾱ
(`alphas_cumprod`, and `alpha_prod_t` for one timestep) is the signal's share of the variance of noisy latents:
noisy = sqrt(ᾱ) clean + sqrt(1 - ᾱ) noise (arXiv:2006.11239, eq. 4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depthdiff.checks import check_number, check_tensor, plain, show
from depthdiff.config import MAX_LENGTH

MAX_BETA = 0.999
TABLE: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Kind of the tables of constants, whatever torch's default device is: their numbers serve latents on any device."""


def make_betas(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    trained_betas: Sequence[float] | None = None,
) -> Tensor:
    """Compute the variance that each training timestep adds.

    Args:
        num_train_timesteps: T.
        beta_start: of the first timestep, in [0, 1).
        beta_end: of the last one, in [0, 1).
        beta_schedule: "linear", "scaled_linear" (linear in the square root) or "sigmoid"; or "squaredcos_cap_v2", "exp"
            or "laplace", which ignore both ends.
        trained_betas: T numbers to use instead.

    Returns:
        (T,), float32, on the CPU.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: one out of range, or an unknown schedule.

    Source: arXiv:2006.11239, sec. 4 (linear); CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py,
        `make_beta_schedule` (scaled_linear); arXiv:2102.09672, eq. 17 (squared cosine); arXiv:2203.02923, appendix
        (sigmoid); arXiv:2407.03297, table 1 (laplace).
    """
    count = check_number("num_train_timesteps", num_train_timesteps, 1, MAX_LENGTH, whole=True)
    betas = {"beta_start": beta_start, "beta_end": beta_end}
    if trained_betas is not None:
        betas = {f"trained_betas[{i}]": beta for i, beta in enumerate(trained_betas)}
    for name, beta in betas.items():
        if not 0 <= check_number(name, beta) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {beta}")
    if trained_betas is not None:
        if len(trained_betas) != count:
            raise ValueError(f"trained_betas must hold {count} numbers, got {len(trained_betas)}")
        return torch.tensor(trained_betas, **TABLE)
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, count, **TABLE)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, count, **TABLE) ** 2
    if beta_schedule == "sigmoid":
        return torch.linspace(-6, 6, count, **TABLE).sigmoid() * (beta_end - beta_start) + beta_start
    if beta_schedule not in SIGNALS:
        known = ", ".join(("linear", "scaled_linear", "sigmoid", *SIGNALS))
        raise ValueError(f"beta_schedule must be one of {known}, got {beta_schedule!r}")
    signal = [SIGNALS[beta_schedule](i / count) for i in range(count + 1)]
    return torch.tensor([min(1 - after / before, MAX_BETA) for before, after in itertools.pairwise(signal)], **TABLE)


def _laplace_signal(time: float) -> float:
    """Return sqrt(ᾱ) where log-SNR is spread as a Laplace distribution."""
    distance = 0.5 - time
    ratio = math.exp(-0.5 * math.copysign(1, distance) * math.log(1 - 2 * abs(distance) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


SIGNALS: Mapping[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda time: math.exp(-12 * time),
    "laplace": _laplace_signal,
}
"""Schedule -> the signal left at a share of the training time, whose ratios give the betas."""


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch a schedule so that its last step leaves no signal. Source: arXiv:2305.08891, algorithm 1."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas_cumprod = ((roots - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def make_timesteps(
    num_inference_steps: int, num_train_timesteps: int, timestep_spacing: str, steps_offset: int = 0
) -> np.ndarray:
    """Choose N of the T training timesteps, falling. Source: arXiv:2305.08891, table 2.

    Returns:
        (N,), float64; "linspace" gives fractions, which only methods in terms of sigma can use.
    """
    count = num_train_timesteps
    if timestep_spacing == "linspace":
        return np.linspace(0, count - 1, num_inference_steps)[::-1]
    if timestep_spacing == "leading":
        steps: np.ndarray = np.arange(num_inference_steps)[::-1] * (count // num_inference_steps) + float(steps_offset)
        return steps
    if timestep_spacing == "trailing":
        return np.round(np.arange(count, 0, -count / num_inference_steps)) - 1
    raise ValueError(f"timestep_spacing must be leading, trailing or linspace, got {timestep_spacing!r}")


def check_timesteps(timesteps: object, num_train_timesteps: int, *, whole: bool = True) -> np.ndarray:
    """Return the caller's own timesteps as an array of float64.

    Raises:
        TypeError: not numbers in a row.
        ValueError: none, too many, out of range, or not falling.
    """
    if isinstance(timesteps, (Tensor, np.ndarray)) and timesteps.ndim == 1:
        timesteps = timesteps.tolist()
    if not isinstance(timesteps, Sequence) or isinstance(timesteps, str):
        raise TypeError(f"timesteps must be a list of falling numbers, got {show(timesteps)}")
    if not 1 <= len(timesteps) <= MAX_LENGTH:
        raise ValueError(f"timesteps must hold 1 to {MAX_LENGTH} numbers, got {len(timesteps)}")
    numbers = [check_number("timesteps", one, 0, num_train_timesteps - 1, whole=whole) for one in timesteps]
    rises = [i for i in range(1, len(numbers)) if numbers[i] >= numbers[i - 1]]
    if rises:
        before, after = numbers[rises[0] - 1], numbers[rises[0]]
        raise ValueError(f"timesteps must fall, each once, got {after} after {before}; sort them, the largest first")
    return np.array(numbers, dtype=np.float64)


def check_sigmas(sigmas: object) -> np.ndarray:
    """Return the caller's own noise levels as an array of float64.

    Raises:
        TypeError: not numbers in a row.
        ValueError: fewer than two, too many, below 0, or not falling.
    """
    if isinstance(sigmas, (Tensor, np.ndarray)) and sigmas.ndim == 1:
        sigmas = sigmas.tolist()
    if not isinstance(sigmas, Sequence) or isinstance(sigmas, str):
        raise TypeError(f"sigmas must be a list of falling numbers, got {show(sigmas)}")
    if not 2 <= len(sigmas) <= MAX_LENGTH:
        raise ValueError(
            f"sigmas must hold 2 to {MAX_LENGTH} numbers, got {len(sigmas)}; the last one is where the run ends"
        )
    numbers = [check_number("sigmas", one, 0) for one in sigmas]
    for before, after in itertools.pairwise(numbers):
        if after > before or before == 0:
            raise ValueError(f"sigmas must not rise, got {after:g} after {before:g}; sort them, the largest first")
    return np.array(numbers, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels of a run in terms of timesteps: ᾱ of each, and where the steps end.

    Attributes:
        alphas_cumprod: (T,), on the CPU.
        final_alpha_cumprod: 0-d, ᾱ after the last step, where timesteps are below 0.
        step_ratio: distance between timesteps.
        run: the caller's own timesteps, falling; empty where they are `step_ratio` apart.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    step_ratio: int
    run: tuple[float, ...] = ()

    def alpha_prod(self, timestep: float) -> Tensor:
        """Return ᾱ of a timestep; one beyond the last of the training has the ᾱ of that."""
        if timestep < 0:
            return self.final_alpha_cumprod
        return self.alphas_cumprod[min(int(timestep), len(self.alphas_cumprod) - 1)]

    def alpha_prods(self, timesteps: Sequence[float]) -> tuple[Tensor, ...]:
        """Return ᾱ of each of several timesteps, as `alpha_prod` does of one."""
        last = len(self.alphas_cumprod) - 1
        table = torch.cat([self.alphas_cumprod, self.final_alpha_cumprod.to(self.alphas_cumprod).reshape(1)])
        return table[[-1 if timestep < 0 else min(int(timestep), last) for timestep in timesteps]].unbind()

    def after(self, timestep: float) -> float:
        """Return the timestep at which the step from this one ends; below 0 after the last."""
        return max((t for t in self.run if t < timestep), default=-1) if self.run else timestep - self.step_ratio

    def before(self, timestep: float) -> float:
        """Return the timestep from which a step ends at this one."""
        if self.run:
            return min((t for t in self.run if t > timestep), default=timestep)
        return timestep + self.step_ratio


def predict_x0(prediction_type: str, sample: Tensor, model_output: Tensor, alpha_prod_t: Tensor | float) -> Tensor:
    """Predict the clean latents from noisy ones and what the network returned. Source: arXiv:2202.00512, appendix D.

    Raises:
        ValueError: an unknown type, or the noise is to tell what is left of the image where nothing is.
    """
    if prediction_type == "epsilon":
        if alpha_prod_t == 0:
            raise ValueError(
                "prediction_type must be 'v_prediction' or 'sample' where a step starts from pure noise, got "
                "'epsilon'; or leave out rescale_betas_zero_snr, or lower beta_end"
            )
        return (sample - (1 - alpha_prod_t) ** 0.5 * model_output) / alpha_prod_t**0.5
    if prediction_type == "v_prediction":
        return alpha_prod_t**0.5 * sample - (1 - alpha_prod_t) ** 0.5 * model_output
    if prediction_type == "sample":
        return model_output
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


def predict_epsilon(prediction_type: str, sample: Tensor, model_output: Tensor, alpha_prod_t: Tensor | float) -> Tensor:
    """Predict the noise in noisy latents from what the network returned. Source: arXiv:2202.00512, appendix D."""
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "v_prediction":
        return alpha_prod_t**0.5 * model_output + (1 - alpha_prod_t) ** 0.5 * sample
    return epsilon_from_x0(sample, model_output, alpha_prod_t)


def epsilon_from_x0(sample: Tensor, pred_original_sample: Tensor, alpha_prod_t: Tensor | float) -> Tensor:
    """Return the noise in latents whose clean part is known; none where ᾱ is 1."""
    if alpha_prod_t == 1:
        return torch.zeros_like(sample)
    return (sample - alpha_prod_t**0.5 * pred_original_sample) / (1 - alpha_prod_t) ** 0.5


def dynamic_threshold(pred_original_sample: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clip each sample to its own `ratio` quantile, and scale to [-1, 1]. Source: arXiv:2205.11487, sec. 2.3."""
    flat = widen(pred_original_sample).flatten(1)
    limit = torch.quantile(flat.abs(), ratio, dim=1).clamp(1, max_value)[:, None]
    return (flat.clamp(-limit, limit) / limit).view_as(pred_original_sample).to(pred_original_sample.dtype)


def clip_x0(pred_original_sample: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Clip predicted clean latents as a config says: to a quantile, to a range, or not."""
    if config["thresholding"]:
        return dynamic_threshold(pred_original_sample, config["dynamic_thresholding_ratio"], config["sample_max_value"])
    limit = config["clip_sample_range"]
    return pred_original_sample.clamp(-limit, limit) if config["clip_sample"] else pred_original_sample


def noisy_at(clean: Tensor, noise: Tensor, alpha_prod: Tensor) -> Tensor:
    """Make clean latents as noisy as ᾱ, 0-d, says: arXiv:2006.11239, eq. 4."""
    alpha_prod = alpha_prod.to(clean.dtype)
    return alpha_prod**0.5 * clean + (1 - alpha_prod) ** 0.5 * noise


def widen(x: Tensor) -> Tensor:
    """Return half precision as float32, in which solvers compute, and other tensors as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_pair(name: str, x: object, other_name: str, other: object) -> None:
    """Refuse what are not two float tensors of one shape."""
    first, second = (check_tensor(*one, "(B, C, h, w)") for one in ((name, x), (other_name, other)))
    if first.shape != second.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def check_past(past: Sequence[Tensor], latents: Tensor) -> None:
    """Refuse latents of another shape than the predictions that a multistep method remembers."""
    if past and past[0].shape != latents.shape:
        raise ValueError(
            f"latents must keep their shape {tuple(past[0].shape)} in a run of a multistep method, got "
            f"{tuple(latents.shape)}; DDIM remembers nothing and takes others"
        )


def read_timestep(timestep: object, last: float, *, first: float = 0, whole: bool = True) -> Any:
    """Return a timestep, a number or a tensor of one, as a number from `first` to `last`; 20.0 counts as whole."""
    one = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.numel() == 1 else timestep
    number = check_number("timestep", one, first, last)
    if whole and number != int(number):
        raise ValueError(f"timestep must be a whole number, got {number}; take it from `timesteps`")
    return number


def read_steps(num_inference_steps: object, most: int) -> int:
    """Return a number of steps from 1 to `most`; 20.0 counts as 20."""
    number = plain(num_inference_steps)
    whole = int(number) if isinstance(number, float) and number.is_integer() else num_inference_steps
    count = check_number("num_inference_steps", whole, whole=True)
    if not 1 <= count <= most:
        raise ValueError(f"num_inference_steps must be from 1 to {most}, got {show(count).removeprefix('int ')}")
    return count
