"""The UNet's optional arguments, FreeU and half the bits against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.parity.geometries import distance, draw, pair, unet_inputs

TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 2e-6


@pytest.fixture(scope="module")
def unets():
    return pair("unet", "sd2")


def residuals(seed: int = 0) -> dict[str, object]:
    """Return ControlNet's residuals for a UNet of four levels and two layers at 20x12: twelve, and the middle's."""
    widths = [16, 16, 16, 16, 24, 24, 24, 32, 32, 32, 48, 48]
    sizes = [(20, 12)] * 3 + [(10, 6)] * 3 + [(5, 3)] * 3 + [(3, 2)] * 3
    skips = [draw(2, width, *size, seed=seed + i) for i, (width, size) in enumerate(zip(widths, sizes, strict=True))]
    middle = draw(2, 48, 3, 2, seed=seed + 20)
    return {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}


def adapters() -> dict[str, object]:
    sizes = [(16, 20, 12), (24, 10, 6), (32, 5, 3), (48, 3, 2)]
    return {"down_intrablock_additional_residuals": [draw(2, *size, seed=i) for i, size in enumerate(sizes)]}


ARGUMENTS = {
    "ControlNet": residuals,
    "T2I adapter": adapters,
    "both": lambda: {**residuals(), **adapters()},
    "mask": lambda: {"encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])},
    "mask of bools": lambda: {"encoder_attention_mask": torch.tensor([[True] * 7, [True] * 4 + [False] * 3])},
    "mask of floats": lambda: {"encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3])},
    "conditions that are not used": lambda: {"added_cond_kwargs": {"text_embeds": 1}, "timestep_cond": None},
}
TIMESTEPS = [7, 7.5, *map(torch.tensor, (7, [7], [7, 900], [7.5, 0.0])), torch.tensor([7], dtype=torch.int32)]
ARGUMENTS |= {f"timestep {form!r}": lambda form=form: {"timestep": form} for form in TIMESTEPS}
ARGUMENTS["timestep of doubles"] = lambda: {"timestep": torch.tensor(7.5, dtype=torch.float64)}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_unet_arguments(unets, name):
    """Optional arguments count as in the reference; the caller's own list is not touched."""
    with torch.no_grad():
        given = ARGUMENTS[name]()
        mine = unets[0](**{**unet_inputs("sd2"), **given}).sample
        assert len(given.get("down_intrablock_additional_residuals", range(4))) == 4
        theirs = unets[1](**{**unet_inputs("sd2"), **ARGUMENTS[name]()}).sample
        assert distance(mine, theirs) < TOLERANCE
        if name in ("ControlNet", "T2I adapter", "both", "mask"):
            assert distance(mine, unets[0](**unet_inputs("sd2")).sample) > 1e-3


def test_zero_residuals(unets):
    zeros = {"down_block_additional_residuals": [x * 0 for x in residuals()["down_block_additional_residuals"]]}
    zeros["mid_block_additional_residual"] = residuals()["mid_block_additional_residual"] * 0
    with torch.no_grad():
        plain = unets[0](**unet_inputs("sd2")).sample
        assert torch.equal(unets[0](**unet_inputs("sd2"), **zeros).sample, plain)


def test_mask_equals_truncated_prompt(unets):
    """Observed: 0; values reach 3.3."""
    inputs = unet_inputs("sd2")
    mask = torch.tensor([[1] * 4 + [0] * 3] * 2)
    with torch.no_grad():
        masked = unets[0](**inputs, encoder_attention_mask=mask).sample
        prompt = inputs["encoder_hidden_states"][:, :4]
        truncated = unets[0](**{**inputs, "encoder_hidden_states": prompt}).sample
    torch.testing.assert_close(masked, truncated, atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width", [(16, 8), (20, 12)])
def test_freeu(height, width):
    ours, reference = pair("unet", "sd2")
    inputs = unet_inputs("sd2", height=height, width=width)
    with torch.no_grad():
        plain = ours(**inputs).sample
        for unet in (ours, reference):
            unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        changed = ours(**inputs).sample
        assert distance(changed, reference(**inputs).sample) < TOLERANCE
        assert distance(changed, plain) > 1e-3
        for block in ours.up_blocks:
            block.s1 = None
        assert torch.equal(ours(**inputs).sample, plain)
        ours.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        ours.disable_freeu()
        assert torch.equal(ours(**inputs).sample, plain)


def only(name: str) -> dict[str, object]:
    return {name: residuals()[name]}


REFUSED = {
    "class_labels": lambda: {"class_labels": torch.tensor([1, 2])},
    "timestep_cond": lambda: {"timestep_cond": draw(2, 16)},
    "attention_mask": lambda: {"attention_mask": torch.ones(2, 240)},
    "down_block_additional_residuals": lambda: only("mid_block_additional_residual"),
    "mid_block_additional_residual": lambda: only("down_block_additional_residuals"),
    "timestep": lambda: {"timestep": torch.tensor([1, 2, 3])},
    "sample": lambda: {"sample": draw(2, 4, 20, 12)},
    "encoder_hidden_states": lambda: {"encoder_hidden_states": draw(2, 7, 21)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments(unets, name):
    """What the reference ignores or drops in silence is refused by name; a wrong shape is an error as there."""
    shapes = name in ("timestep", "sample", "encoder_hidden_states")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=None if shapes else name):
        unets[0](**{**unet_inputs("sd2"), **REFUSED[name]()})


def test_bfloat16():
    """Half the bits: as far from float32 as the reference is. Observed: 1.3e-2 and 1.4e-2."""
    ours, reference = pair("unet", "sd2")
    inputs = unet_inputs("sd2")
    with torch.no_grad():
        exact = reference(**inputs).sample
        small = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
        mine, theirs = (unet.bfloat16()(**small).sample for unet in (ours, reference))
    assert mine.dtype == torch.bfloat16
    error, expected = (distance(result.float(), exact) for result in (mine, theirs))
    assert error < 1.5 * expected
