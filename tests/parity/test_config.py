"""The configurations of the networks in diffusers' form: values, files, arguments of the constructors, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings

import pytest
import torch
import transformers

import depthdiff.pipeline  # noqa: F401  (with all records)
from depthdiff.config import BaseOutput
from depthdiff.models.clip import CLIPTextConfig
from tests.parity.geometries import GEOMETRIES, KINDS, SD1, SIDES, TEXT, build, pair

CASES = [("unet", "sd2"), ("unet", "sd1"), ("vae", "sd")]


class Pairs(dict):
    """Pairs of networks by kind and name, built when first asked for."""

    def __missing__(self, case):
        self[case] = pair(*case)
        return self[case]


@pytest.fixture(scope="module")
def pairs():
    """Pairs of networks, built once."""
    return Pairs()


cases = pytest.mark.parametrize("case", CASES, ids=" ".join)


@cases
def test_values(pairs, case):
    """Every key is there, at its default too, as an item and as an attribute."""
    ours, reference = (side.config for side in pairs[case])
    assert isinstance(ours, dict)
    expected = {key: value for key, value in reference.items() if not key.startswith("_")}
    assert {key: value for key, value in dict(ours).items() if not key.startswith("_")} == expected
    for key, value in expected.items():
        assert getattr(ours, key) == value
        assert key in ours
    assert "foo" not in ours
    assert ours.get("foo", 3) == 3
    assert not hasattr(ours, "foo")


@cases
def test_json(pairs, case):
    ours, reference = pairs[case]
    public = [{k: v for k, v in json.loads(json.dumps(n.config)).items() if k[0] != "_"} for n in (ours, reference)]
    assert public[0] == public[1]
    skip = "_diffusers_version"
    texts = [[x for x in n.to_json_string().splitlines() if skip not in x] for n in (ours, reference)]
    assert texts[0] == texts[1]


@cases
def test_written_file(pairs, case, tmp_path):
    """The written file is the reference's, and each side reads the other's."""
    for side, network in zip(("ours", "theirs"), pairs[case], strict=True):
        network.save_config(tmp_path / side)
    files = [(tmp_path / side / "config.json").read_text() for side in ("ours", "theirs")]
    lines = [[line for line in file.splitlines() if "_diffusers_version" not in line] for file in files]
    assert lines[0] == lines[1]
    kinds = [type(network) for network in pairs[case]]
    for kind in kinds:
        for side in ("ours", "theirs"):
            config = kind.load_config(tmp_path / side)
            assert config["_class_name"] == kind.__name__
            torch.manual_seed(1)
            again = kind.from_config(config)
            assert again.state_dict().keys() == pairs[case][0].state_dict().keys()
            assert list(again.config.block_out_channels) == list(pairs[case][0].config.block_out_channels)
            assert "_use_default_values" not in config


@cases
def test_refused_changes(pairs, case):
    config = pairs[case][0].config
    for change in (
        lambda: config.pop("in_channels"),
        lambda: config.update(in_channels=3),
        lambda: config.setdefault("in_channels", 3),
        lambda: config.__delitem__("in_channels"),
    ):
        with pytest.raises(Exception, match="FrozenDict"):
            change()
    with pytest.raises(AttributeError, match="config"):
        pairs[case][0].config = {}


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name or path")
@pytest.mark.parametrize("side", SIDES)
def test_round_trip(side, tmp_path):
    """Extra keys are kept and come back, known overrides count, unknown overrides come back; also from a folder."""
    unet = build("unet", "sd1", side)
    kind = type(unet)
    again, unused = kind.from_config({**unet.config, "extra": 1}, in_channels=7, unknown=2, return_unused_kwargs=True)
    assert (unused["unknown"], unused["extra"]) == (2, 1)
    again.save_config(tmp_path)
    loaded, unused = kind.from_config(str(tmp_path), unknown=3, return_unused_kwargs=True)
    assert (unused["unknown"], unused["extra"], loaded.conv_in.in_channels) == (3, 1, 7)
    assert unused.keys() == {"unknown", "extra", "_class_name", "_diffusers_version"}
    assert again.config["extra"] == again.config.extra == 1
    assert again.conv_in.in_channels == again.config.in_channels == 7
    assert "unknown" not in again.config
    assert again.config.norm_num_groups == 4
    assert kind.from_config({"_class_name": "Other", **unet.config}).config.cross_attention_dim == 20
    with pytest.raises(ValueError):
        kind.from_config(None)


def test_extra_key_warns(caplog):
    kind = type(build("unet", "sd1", "ours"))
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("WARNING"):
        warnings.simplefilter("always")
        kind.from_config({**SD1, "extra": 1})
    assert "extra" in caplog.text + "".join(str(item.message) for item in caught)


@pytest.mark.parametrize("side", SIDES)
def test_constructor(side):
    """Arguments may be positional; unknown ones are refused unless their names begin with an underscore."""
    for kind, name in (("unet", "sd1"), ("vae", "sd")):
        network = build(kind, name, side)
        config = GEOMETRIES[kind][name]
        with pytest.raises(TypeError, match="foo"):
            type(network)(**config, foo=1)
        assert type(network)(**config, _foo=1).config["_foo"] == 1
    positional = list(inspect.signature(type(build("unet", "sd1", side)).__init__).parameters)
    assert positional[1:4] == ["sample_size", "in_channels", "out_channels"]
    unet = type(build("unet", "sd1", side))(8, 6, 3, **SD1)
    assert (unet.sample_size, unet.conv_in.in_channels, unet.conv_out.out_channels) == (8, 6, 3)


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_constructor_arguments(kind):
    """The same arguments in the same order with the same defaults."""
    lists = []
    for network in KINDS[kind]:
        parameters = list(inspect.signature(network.__init__).parameters.values())
        lists.append([(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD])
    assert lists[0] == lists[1]


def test_text_config():
    """CLIPTextConfig has the published keys and defaults."""
    names = "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads "
    names += "max_position_embeddings hidden_act layer_norm_eps attention_dropout initializer_range "
    names += "initializer_factor pad_token_id bos_token_id eos_token_id"
    for values in ({}, TEXT):
        mine, theirs = CLIPTextConfig(**values), transformers.CLIPTextConfig(**values)
        for name in names.split():
            assert getattr(mine, name) == getattr(theirs, name), name


@pytest.mark.parametrize("side", SIDES)
def test_fallback_attributes(side):
    """A key of the configuration read from the network itself answers with a FutureWarning; others raise."""
    unet, vae = build("unet", "sd1", side), build("vae", "sd", side)
    for network, names in (
        (unet, "in_channels out_channels cross_attention_dim"),
        (vae, "block_out_channels scaling_factor"),
    ):
        for name in names.split():
            with pytest.warns(FutureWarning, match=name):
                assert getattr(network, name) == network.config[name]
        assert not hasattr(network, "foo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unet.sample_size is None


@pytest.mark.parametrize("side", SIDES)
def test_register_to_config(side):
    unet = build("unet", "sd1", side)
    before = unet.config
    unet.register_to_config(in_channels=9)
    assert unet.config.in_channels == unet.config["in_channels"] == 9
    assert before["in_channels"] == 4
    assert set(before) == set(unet.config)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 2},
        {"down_block_types": ("DownBlock2D",)},
        {"down_block_types": ("FooBlock", "DownBlock2D")},
        {"block_out_channels": (16,)},
        {"act_fn": "foo"},
    ],
    ids=str,
)
def test_refused_values(side, change):
    with pytest.raises(ValueError):
        KINDS["unet"][SIDES.index(side)](**{**SD1, **change})


def test_outputs_of_their_items():
    """A record is made of one dict of its items, as accelerate does; so it is in the references."""
    from accelerate.utils import convert_to_fp32
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    half = torch.ones(2, dtype=torch.bfloat16)
    for kind, given in {
        UNet2DConditionOutput: {"sample": half},
        DecoderOutput: {"sample": half},
        BaseModelOutputWithPooling: {"last_hidden_state": half, "hidden_states": (half, half)},
    }.items():
        names = {sub.__name__: sub for sub in BaseOutput.__subclasses__()}
        for side in (names[kind.__name__], kind):
            for output in (side(given), convert_to_fp32(side(**given))):
                assert type(output) is side
                assert list(output) == list(given) and len(output.to_tuple()) == len(given)
                assert output[0] is output[next(iter(given))] is getattr(output, next(iter(given)))
            assert output[0].dtype == torch.float32
    for kind in BaseOutput.__subclasses__():
        first = dataclasses.fields(kind)[0].name
        assert list(kind({first: half}).items()) == list(kind(**{first: half}).items()) == [(first, half)]
        with pytest.raises(TypeError, match="unknown"):
            kind({"unknown": half})
