"""Exponential integrators: what DPM-Solver, DEIS, UniPC and SA-Solver have in common.

In lambda = -log(sigma), half the log-SNR, a step integrates exp(lambda) times the predicted clean latents ("data") or
exp(-lambda) times the predicted noise exactly, if the prediction is a polynomial in lambda. These methods differ in the
points through which that polynomial goes, and in what they simplify. Noisy latents are alpha clean + alpha sigma noise,
with alpha = sqrt(ᾱ) = 1 / sqrt(1 + sigma^2).

Source: arXiv:2206.00927, eq. 3.4 and appendix B; arXiv:2211.01095, eq. 8; with noise on the way, arXiv:2309.05019,
prop. 4.1 and eq. 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from depthdiff.checks import check_number, check_tensor
from depthdiff.schedulers.base import SchedulerMixin
from depthdiff.schedulers.schedule import (
    dynamic_threshold,
    epsilon_from_x0,
    make_timesteps,
    predict_epsilon,
    predict_x0,
    widen,
)
from depthdiff.schedulers.sigmas import SigmaPlan, SigmaSchedulerMixin

Rule = Literal["exact", "midpoint", "linear"]
"""How the slope between two predictions counts: by its exact integral, by half of that of a constant, or by z / 2."""

TERMS = 20
MOST_ORDER = 3


def phi(k: int, z: float) -> float:
    """Compute phi_k(z), the sum over j of z^j / (j + k)!: phi_1(z) = (e^z - 1) / z. Source: arXiv:2302.04867."""
    if abs(z) < 1:
        return sum(z**j / math.factorial(j + k) for j in range(TERMS))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def alpha_of(sigma: float) -> float:
    """Return alpha, the root of the signal's share of the variance, at a noise level."""
    return 1 / (1 + sigma**2) ** 0.5


class Transfer(NamedTuple):
    """A step between two noise levels, but for the predictions.

    Attributes:
        sample: factor of the latents.
        moments: minus the integrals of the kernel times 1, theta, theta^2, ..., theta running from 0 to 1 in the step.
        noise: deviation of the noise that is added.
    """

    sample: float
    moments: list[float]
    noise: float


def transfer(
    sigma: float, sigma_next: float, order: int, *, data: bool, tau: float = 0.0, rule: Rule = "exact"
) -> Transfer:
    """Compute the coefficients of a step.

    Args:
        sigma: the level at which it begins, above 0.
        sigma_next: the level at which it ends.
        order: how many predictions are used; 1 where it ends at 0.
        data: the clean latents are predicted, else the noise.
        tau: share of the reverse diffusion's noise; 0 is the ordinary equation, 1 the reverse diffusion.
        rule: for the slope between two predictions.

    Source: arXiv:2309.05019, prop. 4.1 (data) and appendix (noise); for tau 0, arXiv:2211.01095, eq. 8, and
        arXiv:2206.00927, eq. 3.4; "midpoint" is the approximation of their second-order solvers and, for "linear",
        arXiv:2302.04867, sec. 3.1, with B(h) = h.
    """
    alpha, alpha_next = alpha_of(sigma), alpha_of(sigma_next)
    h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
    if data:
        z, factor = -(1 + tau**2) * h, alpha_next
        kept = math.exp(-(tau**2) * h) if tau else 1.0
        sample = kept * alpha_next * sigma_next / (alpha * sigma)
        noise = alpha_next * sigma_next * max(0.0, 1 - kept**2) ** 0.5
        whole = factor * math.expm1(z)
    else:
        z, factor = h, (1 + tau**2) * alpha_next * sigma_next
        sample = alpha_next / alpha
        noise = tau * alpha_next * max(0.0, sigma**2 - sigma_next**2) ** 0.5
        whole = (1 + tau**2) * alpha_next * (sigma - sigma_next)
    if order == 2 and rule != "exact":
        return Transfer(sample, [whole, whole / 2 if rule == "midpoint" else factor * z / 2], noise)
    higher = [factor * math.factorial(k) * z * phi(k + 1, z) for k in range(1, order)]
    return Transfer(sample, [whole, *higher], noise)


def exponential_step(
    sample: Tensor, step: Transfer, predictions: Sequence[Tensor], places: Sequence[float], noise: Tensor | None = None
) -> Tensor:
    """Take a step along the polynomial through predictions.

    Args:
        sample: (B, C, h, w), at the step's beginning.
        step: its coefficients, with as many moments as there are predictions.
        predictions: (B, C, h, w) each.
        places: theta of each, in lambda: 0 at the step's beginning, 1 at its end, below 0 before it.
        noise: (B, C, h, w), unit normal; needed where the step adds some.
    """
    powers = np.vander(np.array(places), increasing=True).T
    weights = np.linalg.solve(powers, np.array(step.moments)).tolist() if len(places) > 1 else step.moments
    prev_sample = step.sample * sample
    for weight, prediction in zip(weights, predictions, strict=True):
        prev_sample = prev_sample - weight * prediction
    return prev_sample if noise is None or step.noise == 0 else prev_sample + step.noise * noise


def place(sigma: float, begin: float, end: float) -> float:
    """Return theta of a noise level: where it is in lambda in the step from `begin` to `end`."""
    return 0.0 if sigma == begin else math.log(begin / sigma) / math.log(begin / end)


def multistep_order(sigmas: Sequence[float], index: int, most: int) -> int:
    """Return how many of the last predictions a step can use: 1 where it ends at 0, and none at a level met before."""
    if sigmas[index + 1] in (0.0, sigmas[index]):
        return 1
    past = sigmas[max(0, index - most + 1) : index + 1]
    return next((k for k in range(1, len(past)) if past[-k - 1] == past[-k]), len(past))


def multistep(
    sample: Tensor,
    predictions: Sequence[Tensor],
    sigmas: Sequence[float],
    index: int,
    *,
    data: bool,
    tau: float = 0.0,
    rule: Rule = "exact",
    share: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Take a step along the last predictions: an Adams-Bashforth method.

    Args:
        sample: (B, C, h, w), at the level `sigmas[index]`.
        predictions: newest first, at the levels `sigmas[index]`, `sigmas[index - 1]`, ...
        sigmas: of the whole run, and that of its end.
        index: of the step.
        data: see `transfer`.
        tau: see `transfer`.
        rule: see `transfer`.
        share: of the curvature's integral that counts.
        noise: (B, C, h, w), unit normal.
    """
    begin, end = sigmas[index], sigmas[index + 1]
    if begin == end:
        return sample
    predictions = predictions[: multistep_order(sigmas, index, len(predictions))]
    step = transfer(begin, end, len(predictions), data=data, tau=tau, rule=rule)
    if len(predictions) == 3:
        step = step._replace(moments=[*step.moments[:2], step.moments[2] * share])
    places = [place(sigmas[index - k], begin, end) for k in range(len(predictions))]
    return exponential_step(sample, step, predictions, places, noise)


@dataclass(frozen=True, eq=False)
class ExponentialPlan(SigmaPlan):
    """A run of an exponential integrator, whose latents are alpha clean + alpha sigma noise; see `SigmaPlan`."""

    @property
    def init_noise_sigma(self) -> float:
        """See `Plan`."""
        return 1.0

    def scale_model_input(self, latents: Tensor, index: int) -> Tensor:
        """See `Plan`: as they are."""
        return latents

    def _noisy(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        return mix(clean, noise, self.sigmas[index + self.t_start].to(clean.dtype))

    @property
    def data(self) -> bool:
        """Whether the method goes by predicted clean latents, else by predicted noise."""
        return True

    def predict(self, sample: Tensor, model_output: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return what the method goes by, and the predicted clean latents: (B, C, h, w) both."""
        c, sigma = self.config, float(self.sigmas[index])
        if str(c.get("variance_type")).startswith("learned"):
            model_output = model_output[:, : sample.shape[1]]
        alpha_prod = 1 / (1 + sigma**2)
        x0 = predict_x0(c.prediction_type, sample, model_output, alpha_prod)
        if c.thresholding:
            x0 = dynamic_threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        if self.data:
            return x0, x0
        if c.thresholding:
            return epsilon_from_x0(sample, x0, alpha_prod), x0
        return predict_epsilon(c.prediction_type, sample, model_output, alpha_prod), x0


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Make clean latents as noisy as a level says, with unit variance: arXiv:2006.11239, eq. 4."""
    wide = widen(sigma)
    alpha = 1 / (1 + wide**2) ** 0.5
    return alpha.to(clean.dtype) * clean + (wide * alpha).to(clean.dtype) * noise


def pushed(past: Sequence[Tensor | None], newest: Tensor) -> tuple[Tensor | None, ...]:
    """Return past predictions, oldest first, with the newest one and without the oldest."""
    return (*past[1:], newest)


def newest_first(past: Sequence[Tensor | None], most: int) -> list[Tensor]:
    """Return the last predictions, as many as there are and at most `most`."""
    return [one for one in reversed(past) if one is not None][:most]


FLOW = {"use_flow_sigmas": (False,), "use_dynamic_shifting": (False,), "time_shift_type": ("exponential", "linear")}
"""Settings of flow matching, whose noise levels this network was not trained on."""


class ExponentialSchedulerMixin(SigmaSchedulerMixin):
    """Base of the schedulers of exponential integrators.

    Timesteps are whole. N steps have N + 1 levels, of which the last one is the run's end.

    Attributes:
        alpha_t: (T,), alpha of each training timestep.
        sigma_t: (T,), alpha sigma of it.
        lambda_t: (T,), half its log-SNR.
    """

    CHOICES: ClassVar[Any] = {**SigmaSchedulerMixin.CHOICES, **FLOW}
    POSITIVE: ClassVar[tuple[str, ...]] = ("sample_max_value",)
    UNBOUNDED: ClassVar[tuple[str, ...]] = ("lambda_min_clipped",)
    PLAN: ClassVar[Any] = ExponentialPlan
    fractional_timesteps: ClassVar[bool] = False
    timestep_dtype: ClassVar[torch.dtype] = torch.int64
    init_noise_sigma: Any = 1.0

    def _start(self, *, zero_terminal_snr: bool = False) -> None:
        """Set the attributes of a scheduler without a run."""
        c = self.config
        ratio = c.get("dynamic_thresholding_ratio", 0.995)
        check_number("dynamic_thresholding_ratio", ratio, 0.0, 1.0)
        for name in ("solver_order", "predictor_order", "corrector_order"):
            if name in c:
                check_number(name, c[name], 1, MOST_ORDER + (name != "solver_order"), whole=True)
        lowest = self._own("lambda_min_clipped", -math.inf)
        if not lowest < math.inf:
            raise ValueError(f"lambda_min_clipped must be a number, or -inf for none, got {lowest}")
        self._check_spacing()
        self._make_noise_schedule(zero_terminal_snr=zero_terminal_snr)
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        if lowest >= float(self.lambda_t[0]):
            raise ValueError(
                f"lambda_min_clipped must be below {float(self.lambda_t[0]):.3g}, half the log-SNR of the first "
                f"timestep, got {lowest}"
            )
        levels = self._train_sigmas()
        last = self._last_sigma(levels, levels)
        calls = self._calls_of(np.arange(len(self))[::-1], np.append(levels[::-1], last))
        plan = self._plan_of(*calls, 0, 0.0, torch.device("cpu"))
        self.timesteps = plan.timesteps
        self._start_run(plan.timesteps.numpy(), plan)

    def _most_steps(self) -> int:
        return self._last_timestep() - (self._own("timestep_spacing") == "leading")

    def _last_timestep(self) -> int:
        """Return how many training timesteps a run may use, from the first one."""
        clipped = torch.searchsorted(self.lambda_t.cpu().flip(0), self._own("lambda_min_clipped", -math.inf))
        return len(self) - int(clipped)

    def _spaced_timesteps(self, count: int) -> np.ndarray:
        last, spacing = self._last_timestep(), self._own("timestep_spacing", "linspace")
        if self._spacing:  # from which the timesteps will follow
            return np.linspace(last - 1, 0, count)
        if spacing == "trailing":
            return np.round(np.arange(last, 0, -len(self) / count)) - 1
        offset = self._own("steps_offset", 0)
        run = make_timesteps(count + 1, last, spacing, offset)[:-1].round()
        if run[0] >= len(self):
            raise ValueError(f"steps_offset {offset} with {count} steps reaches timestep {run[0]:g}; use fewer steps")
        return run

    def _ends(self, sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
        return levels[::-1]

    def _last_sigma(self, sigmas: np.ndarray, levels: np.ndarray) -> float:
        if self._own("final_sigmas_type", "sigma_min") == "zero":
            return 0.0
        return float(sigmas[-1] if self._spacing and len(sigmas) > 1 else levels[0])

    # diffusers' contract

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Start a run; `timesteps` is then what the network is to see.

        Args:
            num_inference_steps: N, 1..T.
            device: of the timesteps; None is the CPU.
            mu: must be None; it shifts the levels of flow matching.
            timesteps: of the caller's own, instead of N: falling whole numbers in [0, T-1], each once.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: one out of range, or both or neither of N and `timesteps`.
        """
        if mu is not None:
            raise ValueError(f"mu must be None, got {mu}: it is for flow matching, which no network here does")
        self._set_steps(self._choose_steps(num_inference_steps, timesteps), device)

    _check_started = SchedulerMixin._check_started

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the latents (B, C, h, w) unchanged: this method needs no scaling."""
        return check_tensor("sample", sample, "(B, C, h, w)")

    def _mix(self, original_samples: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return mix(original_samples, noise, sigmas)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        return dynamic_threshold(sample, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)

    def convert_model_output(self, model_output: Tensor, timestep: Any = None, sample: Tensor | None = None) -> Tensor:
        """Return what the method predicts at the present step: clean latents or noise (B, C, h, w).

        Args:
            model_output: (B, C, h, w), what the network returned.
            timestep: does not count.
            sample: (B, C, h, w), the latents.

        Raises:
            TypeError: `sample` is missing.
        """
        latents = check_tensor("sample", sample, "(B, C, h, w)")
        kept: Tensor = self._plan_as_it_is().predict(latents, model_output, self._step_index or 0)[0]
        return kept

    def denoised(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Return the clean latents (B, C, h, w) that the last step predicted.

        Args:
            model_output: (B, C, h, w), what the network returned.
            sample: (B, C, h, w), the latents before that step.
        """
        index = max((self._step_index or 0) - 1, 0)
        kept: Tensor = self._plan_as_it_is().predict(sample, model_output, index)[1]
        return kept
