"""How a run's noise levels are spaced between the largest and the smallest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

KARRAS_RHO = 7.0
"""Source: arXiv:2206.00364, sec. 5.1."""

BETA = 0.6
"""Both parameters of the beta distribution. Source: arXiv:2407.12173, sec. 3.1."""


def karras_sigmas(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Space noise levels evenly in their rho-th root: (count,), falling. Source: arXiv:2206.00364, eq. 5."""
    roots = np.linspace(sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO), count)
    return roots**KARRAS_RHO


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Space noise levels evenly in their logarithm: (count,), falling. Source: arXiv:2206.00927, sec. 3.4."""
    levels: np.ndarray = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return levels


def lu_sigmas(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Space noise levels evenly in lambda: (count,), falling, from logarithms in float32. Source: arXiv:2211.01095."""
    high, low = (float(np.log(np.float32(end))) for end in (sigma_max, sigma_min))
    levels: np.ndarray = np.exp(high + np.linspace(0, 1, count) * (low - high))
    return levels


def beta_sigmas(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Space noise levels as quantiles of a beta distribution: (count,), falling. Source: arXiv:2407.12173, sec. 3.1."""
    shares = need("scipy.stats", "use_beta_sigmas").beta.ppf(1 - np.linspace(0, 1, count), BETA, BETA)
    levels: np.ndarray = sigma_min + shares * (sigma_max - sigma_min)
    return levels


def need(module: str, wanted_for: str) -> Any:
    """Import a package of the extra "schedulers".

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"{wanted_for} needs {name}: pip install 'depthdiff[schedulers]' or {name}") from error


SPACINGS: Mapping[str, Callable[[float, float, int], np.ndarray]] = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
    "use_lu_lambdas": lu_sigmas,
}
"""Setting of a scheduler -> how it spaces noise levels; timesteps follow from them."""
