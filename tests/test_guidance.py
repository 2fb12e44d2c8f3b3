"""Guidance: one scale a picture, and its rescaling."""

import numpy as np
import pytest
import torch

from depthdiff.guidance import apply_guidance, rescale_guidance

TWO = ["two tigers", "a cup of tea"]


def paint(pipe, photo, prompt, scale, seeds=(0, 1), **options):
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": 3, "output_type": "np", "generator": generator, **options}
    return pipe(prompt, photo, guidance_scale=scale, **call).images


@pytest.mark.parametrize("scales", [(3.0, 7.5), (1.0, 5.0), (0.5, 5.0), (2.0, 2.0)])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_each_picture_has_its_own_scale(scales, kind, pipe, small_photo):
    """As if it was painted alone, also where guidance is off for one. Observed: 2e-6, from rounding in batches."""
    both = paint(pipe, small_photo, TWO, kind(scales))
    assert pipe.guidance_scale == pytest.approx(scales) and pipe.do_classifier_free_guidance
    for i in range(2):
        alone = paint(pipe, small_photo, TWO[i], scales[i], seeds=(i,))[0]
        assert np.abs(both[i] - alone).max() < 1e-4


def test_no_guidance_for_any(pipe, small_photo):
    off, one = (paint(pipe, small_photo, TWO, scale) for scale in ([1.0, 0.0], 1.0))
    assert np.array_equal(off, one) and not pipe.do_classifier_free_guidance


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(share):
    """Observed: 2e-7."""
    published = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion").rescale_noise_cfg
    uncond, cond = torch.randn(2, 3, 4, 6, 8)
    guided = apply_guidance(uncond, cond, 7.5)
    expected = published(guided, cond, guidance_rescale=share)
    assert (rescale_guidance(guided, cond, share) - expected).abs().max() < 1e-5
    if share == 1:
        assert torch.allclose(rescale_guidance(guided, cond, share).std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_rescaling_in_a_call(pipe, small_photo):
    """Off is off, on counts, and without guidance there is nothing to rescale."""
    plain, zero, on = (paint(pipe, small_photo, TWO, 7.5, guidance_rescale=share) for share in (0.0, 0, 0.7))
    assert np.array_equal(plain, zero) and np.abs(on - plain).max() > 1e-3
    off, still = (paint(pipe, small_photo, TWO, 1.0, guidance_rescale=share) for share in (0.0, 0.7))
    assert np.array_equal(off, still)


@pytest.mark.parametrize(
    "scale, error, text",
    [
        (-1, ValueError, "guidance_scale must be at least 0, got -1: .*pass that as negative_prompt"),
        ([3, -0.5], ValueError, "guidance_scale must be at least 0, got -0.5"),
        ([], ValueError, "got an empty list"),
        ([1, 2, 3], ValueError, "guidance_scale must be one number, or 2, one a picture, got a list of 3"),
        ([5.0, "5"], TypeError, "guidance_scale must be a number, got str '5'"),
        ([5.0, float("inf")], ValueError, "guidance_scale must be in"),
    ],
)
def test_scales_that_cannot_be(scale, error, text, pipe, small_photo):
    pipe.text_encoder.forward = None  # nothing may start
    with pytest.raises(error, match=text):
        paint(pipe, small_photo, TWO, scale)


def test_a_callback_may_set_scales(pipe, small_photo):
    def set_scales(pipe, index, timestep, tensors):
        pipe._guidance_scale = (2.0, 4.0)

    call = {"num_inference_steps": 4, "strength": 1.0}
    changed = paint(pipe, small_photo, TWO, 7.5, callback_on_step_end=set_scales, **call)
    whole = paint(pipe, small_photo, TWO, 7.5, **call)
    assert np.abs(changed - whole).max() > 1e-3
