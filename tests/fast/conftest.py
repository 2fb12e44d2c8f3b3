"""What the tests of the fast computations share."""

import pytest

from depthdiff import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from depthdiff.models.clip import CLIPTextConfig


@pytest.fixture
def spy(monkeypatch):
    """Record the arguments of a function each time it is called: spy(module, name) -> list."""

    def watch(module, name):
        calls, function = [], getattr(module, name)

        def watched(*args, **kwargs):
            calls.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


def distance(mine, expected):
    """Compute the norm of the error beside that of the expected result."""
    return ((mine.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def smallest(pipe):
    """A pipeline whose networks are traced quickly: one level, or two, and one layer."""
    attend = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    widths = {"in_channels": 5, "block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    heads = {"cross_attention_dim": 40, "attention_head_dim": 2, "mid_block_type": None}
    pipe.unet = UNet2DConditionModel.from_config({**attend, **widths, **heads}).eval()
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    pipe.vae = AutoencoderKL.from_config({"block_out_channels": [4, 8], "norm_num_groups": 4, **levels}).eval()
    config = CLIPTextConfig.from_dict({**pipe.text_encoder.config, "num_hidden_layers": 1})
    pipe.text_encoder = CLIPTextModel(config).eval()
    return pipe


@pytest.fixture
def tiny_photo(photo):
    """A photograph, 48x32."""
    return photo.resize((48, 32))
