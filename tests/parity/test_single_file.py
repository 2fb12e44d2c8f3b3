"""The names in the single file against diffusers' own conversion, and the bundled tokenizer against transformers'."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig as TheirTextConfig
from transformers import CLIPTextModel as TheirTextModel
from transformers import CLIPTokenizer as TheirTokenizer

from depthdiff import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from depthdiff.checkpoint.ldm import TABLES
from depthdiff.tokenizer import clip_tokenizer
from depthdiff.tokenizer.bpe import read_vocabulary
from tests.ldm import SMALL, random_twins


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A single file of random weights and its tensors."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("single") / "single.safetensors"
    tensors, _ = random_twins(SMALL)
    save_file(tensors, path)
    return path, tensors


def agree(model, theirs):
    table = TABLES[type(model).__name__]
    ours = {table.published(key): tensor for key, tensor in model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def test_unet_as_diffusers_converts_it(file):
    unet = UNet2DConditionModel.from_single_file(file[0])
    agree(unet, convert_ldm_unet_checkpoint(dict(file[1]), dict(unet.config)))


def test_autoencoder_as_diffusers_converts_it(file):
    vae = AutoencoderKL.from_single_file(file[0])
    agree(vae, convert_ldm_vae_checkpoint(dict(file[1]), dict(vae.config)))


def test_text_encoder_as_diffusers_converts_it(file):
    """diffusers drops the last layer because of the config's 23; here it has 3."""
    text_encoder = CLIPTextModel.from_single_file(file[0])
    config = TheirTextConfig(hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2)
    tower = {key: x for key, x in file[1].items() if ".resblocks.3." not in key}
    theirs = convert_open_clip_checkpoint(TheirTextModel(config), tower, prefix="cond_stage_model.model.")
    theirs = {f"text_model.{key.removeprefix('text_model.')}": x for key, x in theirs.items()}
    agree(text_encoder, {key: x for key, x in theirs.items() if "projection" not in key and "position_ids" not in key})


TEXTS = (
    "two tigers",
    "a photo of a cat!",
    "Ein Bär, 1234 Bäume & “quotes” — 日本語 🎉",
    "",
    "it's <|endoftext|> over",
    "x" * 400,
    "masterpiece, best quality, ((8k)), trending on artstation's page",
    "naïve café ﬁne ½ ① \t\n tabs",
    "don't'll 've'S",
)


def test_bundled_tokenizer(tmp_path):
    """Ids are those of transformers with the same files, and those known from CLIP's own code and published file."""
    vocab, merges = read_vocabulary()
    assert (len(vocab), len(merges)) == (49408, 48894)
    known = {"!": 0, "!</w>": 256, "in": 512, "the</w>": 518, "a</w>": 320, "cat</w>": 2368, "<|startoftext|>": 49406}
    assert {token: vocab[token] for token in known} == known
    text = "#version: 0.2\n" + "\n".join(merges) + "\n"
    assert round(len(text.encode()) / 1000) == 525  # the published merges.txt has 525 kB
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(text, encoding="utf-8")
    theirs = TheirTokenizer.from_pretrained(tmp_path, pad_token="!", model_max_length=77)
    ours = clip_tokenizer()
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    for one in TEXTS:
        assert ours(one, **options).input_ids == theirs(one, **options)["input_ids"], one
    assert ours("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (ours.pad_token_id, ours.model_max_length) == (0, 77)
