"""Wrong options of the solvers: one clear error each, before any work."""

import math
import sys

import pytest

from depthdiff import schedulers
from tests.gaussian import (
    ANCESTRAL,
    DDIM_INVERSE,
    DDPM,
    DEIS,
    DPM_SDE,
    EULER,
    HEUN,
    KDPM2,
    LCM,
    LMS,
    MULTI,
    MULTI_INVERSE,
    SA,
    SINGLE,
    TCD,
    UNIPC,
)

KARRAS = {"use_karras_sigmas": True}
TWO = {**KARRAS, "use_exponential_sigmas": True}

CONSTRUCTION = [
    *(
        (kind, {"solver_order": order}, ValueError, r"solver_order must be in \[1, 3\], got [04]$")
        for kind in (MULTI, SINGLE, DEIS, UNIPC)
        for order in (0, 4)
    ),
    (MULTI, {"solver_order": 2.5}, TypeError, "solver_order must be int, got 2.5"),
    (SA, {"predictor_order": 5}, ValueError, r"predictor_order must be in \[1, 4\], got 5"),
    (SA, {"corrector_order": 0}, ValueError, r"corrector_order must be in \[1, 4\], got 0"),
    (SA, {"predictor_order": "2"}, TypeError, "predictor_order must be int, got '2'"),
    (
        MULTI,
        {"algorithm_type": "dpmsolver+++"},
        ValueError,
        r"algorithm_type is 'dpmsolver\+\+\+'; implemented here: 'dpmsolver', 'dpmsolver\+\+'",
    ),
    (
        SINGLE,
        {"algorithm_type": "ddim"},
        ValueError,
        r"algorithm_type is 'ddim'; implemented here: 'dpmsolver', 'dpmsolver\+\+'",
    ),
    (DEIS, {"algorithm_type": "data"}, ValueError, "algorithm_type is 'data'; implemented here: 'deis'"),
    (
        SA,
        {"algorithm_type": "data"},
        ValueError,
        "algorithm_type is 'data'; implemented here: 'data_prediction', 'noise_prediction'",
    ),
    (
        MULTI_INVERSE,
        {"algorithm_type": "sde-dpmsolver++"},
        ValueError,
        r"algorithm_type is 'sde-dpmsolver\+\+'; implemented here: 'dpmsolver', 'dpmsolver\+\+'",
    ),
    (MULTI, {"solver_type": "euler"}, ValueError, "solver_type is 'euler'; implemented here: 'midpoint', 'heun'"),
    (SINGLE, {"solver_type": "euler"}, ValueError, "solver_type is 'euler'; implemented here: 'midpoint', 'heun'"),
    (DEIS, {"solver_type": "rhoab"}, ValueError, "solver_type is 'rhoab'; implemented here: 'logrho'"),
    (UNIPC, {"solver_type": "bh3"}, ValueError, "solver_type is 'bh3'; implemented here: 'bh1', 'bh2'"),
    *(
        (
            kind,
            {"prediction_type": "flow_prediction"},
            ValueError,
            "prediction_type is 'flow_prediction'; implemented here: 'epsilon', 'v_prediction', 'sample'",
        )
        for kind in (MULTI, SINGLE, DEIS, UNIPC, SA, EULER, HEUN, DDPM, LCM)
    ),
    (
        MULTI,
        {"prediction_type": "original_sample"},
        ValueError,
        "prediction_type is 'original_sample'; implemented here: 'epsilon', 'v_prediction', 'sample'",
    ),
    *(
        (kind, {"use_flow_sigmas": True}, ValueError, "use_flow_sigmas is True; implemented here: False")
        for kind in (MULTI, SINGLE, DEIS, UNIPC, SA)
    ),
    *(
        (kind, {"use_dynamic_shifting": True}, ValueError, "use_dynamic_shifting is True; implemented here: False")
        for kind in (MULTI, SINGLE, DEIS, UNIPC)
    ),
    (UNIPC, {"solver_p": object()}, ValueError, "solver_p is object; implemented here: None"),
    (UNIPC, {"shift_terminal": 0.1}, ValueError, "shift_terminal is 0.1; implemented here: None"),
    (
        UNIPC,
        {"time_shift_type": "cubic"},
        ValueError,
        "time_shift_type is 'cubic'; implemented here: 'exponential', 'linear'",
    ),
    *(
        (kind, TWO, ValueError, "use_karras_sigmas and use_exponential_sigmas exclude each other; choose one")
        for kind in (EULER, HEUN, KDPM2, DPM_SDE, MULTI, SINGLE, DEIS, UNIPC, SA, LMS)
    ),
    (
        MULTI,
        {"use_lu_lambdas": True, "use_beta_sigmas": True},
        ValueError,
        "use_beta_sigmas and use_lu_lambdas exclude each other; choose one",
    ),
    (
        MULTI,
        {"algorithm_type": "dpmsolver"},
        ValueError,
        'final_sigmas_type must be "sigma_min" with algorithm_type .dpmsolver., got "zero".*or choose',
    ),
    (
        SINGLE,
        {"algorithm_type": "sde-dpmsolver"},
        ValueError,
        'final_sigmas_type must be "sigma_min" with .*sde-dpmsolver., got "zero".*or choose',
    ),
    (
        UNIPC,
        {"final_sigmas_type": "none"},
        ValueError,
        "final_sigmas_type is 'none'; implemented here: 'zero', 'sigma_min'",
    ),
    (
        EULER,
        {"final_sigmas_type": "sigma_max"},
        ValueError,
        "final_sigmas_type is 'sigma_max'; implemented here: 'zero', 'sigma_min'",
    ),
    (
        EULER,
        {"interpolation_type": "cubic"},
        ValueError,
        "interpolation_type is 'cubic'; implemented here: 'linear', 'log_linear'",
    ),
    (
        EULER,
        {"timestep_type": "whole"},
        ValueError,
        "timestep_type is 'whole'; implemented here: 'discrete', 'continuous'",
    ),
    (
        EULER,
        {"timestep_spacing": "even"},
        ValueError,
        "timestep_spacing is 'even'; implemented here: 'leading', 'trailing', 'linspace'",
    ),
    (
        DDIM_INVERSE,
        {"timestep_spacing": "linspace"},
        ValueError,
        "timestep_spacing is 'linspace'; implemented here: 'leading', 'trailing'",
    ),
    (EULER, {"beta_end": math.nan}, ValueError, "beta_end must be a finite number, got nan"),
    (MULTI, {"beta_start": math.inf}, ValueError, "beta_start must be a finite number, got inf"),
    (KDPM2, {"beta_start": -0.1}, ValueError, r"beta_start must be in \[0, 1\), got -0.1"),
    (UNIPC, {"sigma_min": math.nan}, ValueError, "sigma_min must be a finite number, got nan"),
    (EULER, {"sigma_max": math.inf, **KARRAS}, ValueError, "sigma_max must be a finite number, got inf"),
    (
        EULER,
        {"sigma_min": -1.0, **KARRAS},
        ValueError,
        "sigma_min and sigma_max must rise from above 0, got -1 and 157",
    ),
    (
        UNIPC,
        {"sigma_min": 5.0, "sigma_max": 1.0, **KARRAS},
        ValueError,
        "sigma_min and sigma_max must rise from above 0, got 5 and 1",
    ),
    (
        MULTI,
        {"lambda_min_clipped": math.nan},
        ValueError,
        "lambda_min_clipped must be a number, or -inf for none, got nan",
    ),
    (
        SA,
        {"lambda_min_clipped": math.inf},
        ValueError,
        "lambda_min_clipped must be a number, or -inf for none, got inf",
    ),
    (SINGLE, {"lambda_min_clipped": "low"}, TypeError, "lambda_min_clipped must be float, got 'low'"),
    (
        MULTI,
        {"dynamic_thresholding_ratio": 1.5},
        ValueError,
        r"dynamic_thresholding_ratio must be in \[0, 1\], got 1.5",
    ),
    (
        LCM,
        {"dynamic_thresholding_ratio": -0.5},
        ValueError,
        r"dynamic_thresholding_ratio must be in \[0, 1\], got -0.5",
    ),
    (DEIS, {"sample_max_value": -1.0}, ValueError, "sample_max_value must be positive, got -1.0"),
    (HEUN, {"clip_sample_range": -1.0}, ValueError, "clip_sample_range must be positive, got -1.0"),
    (DDPM, {"clip_sample_range": 0.0}, ValueError, "clip_sample_range must be positive, got 0.0"),
    (
        DDPM,
        {"variance_type": "fixed"},
        ValueError,
        "variance_type is 'fixed'; implemented here: None, 'fixed_small', 'fixed_small_log', 'fixed_large'",
    ),
    (
        MULTI,
        {"variance_type": "fixed"},
        ValueError,
        "variance_type is 'fixed'; implemented here: None, 'learned', 'learned_range'",
    ),
    (LCM, {"original_inference_steps": 1001}, ValueError, r"original_inference_steps must be in \[1, 1000\], got 1001"),
    (TCD, {"original_inference_steps": 0}, ValueError, "original_inference_steps must be positive, got 0"),
    (LCM, {"timestep_scaling": math.nan}, ValueError, "timestep_scaling must be a finite number, got nan"),
    (SA, {"tau_func": 0.5}, TypeError, "tau_func must be a function of the timestep, or None, got float 0.5"),
    (
        DPM_SDE,
        {"noise_sampler_seed": 1.5},
        TypeError,
        r"noise_sampler_seed must be int \| tuple\[int, ...\] \| None, got 1.5",
    ),
    (
        DPM_SDE,
        {"noise_sampler_seed": "seed"},
        TypeError,
        r"noise_sampler_seed must be int \| tuple\[int, ...\] \| None, got 'seed'",
    ),
    (KDPM2, {"steps_offset": 1000}, ValueError, r"steps_offset must be in \[0, 999\], got 1000"),
    (ANCESTRAL, {"steps_offset": -1}, ValueError, r"steps_offset must be in \[0, 999\], got -1"),
    (EULER, {"trained_betas": (0.1, 0.2)}, ValueError, "trained_betas must hold 1000 numbers, got 2"),
    (
        UNIPC,
        {"disable_corrector": ("first",)},
        TypeError,
        r"disable_corrector must be tuple\[int, ...\], got \['first'\]",
    ),
    (UNIPC, {"disable_corrector": 3}, TypeError, r"disable_corrector must be tuple\[int, ...\], got 3"),
    (ANCESTRAL, {"use_karras_sigmas": True}, TypeError, "got an unexpected keyword argument 'use_karras_sigmas'"),
    (EULER, {"use_karras_sigmas": "maybe"}, TypeError, r"use_karras_sigmas must be bool \| None, got 'maybe'"),
    (MULTI, {"fix_order": "yes"}, TypeError, "fix_order must be bool, got 'yes'"),
    (DEIS, {"num_train_timesteps": 0}, ValueError, r"num_train_timesteps must be in \[1, 100000\], got 0"),
]


@pytest.mark.parametrize("kind, settings, error, message", CONSTRUCTION)
def test_wrong_settings_are_refused_at_construction(kind, settings, error, message):
    with pytest.raises(error, match=message):
        getattr(schedulers, kind)(**settings)


PACKAGES = [
    ("torchsde", DPM_SDE, {}, "DPMSolverSDEScheduler needs torchsde: pip install 'depthdiff"),
    *(
        ("scipy.stats", kind, {"use_beta_sigmas": True}, "use_beta_sigmas needs scipy: pip install 'depthdiff")
        for kind in (EULER, HEUN, KDPM2, MULTI, SINGLE, DEIS, UNIPC, SA, LMS, MULTI_INVERSE)
    ),
]


@pytest.mark.parametrize("module, kind, settings, message", PACKAGES)
def test_a_missing_package_is_named_at_construction(monkeypatch, module, kind, settings, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        getattr(schedulers, kind)(**settings)
    monkeypatch.undo()
    assert len(getattr(schedulers, kind)(**settings).plan(3)) in (3, 5)
