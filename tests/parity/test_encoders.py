"""The text encoder's arguments, results and embeddings, and the autoencoder's, against the references."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from tests.parity.geometries import SIDES, TEXT, build, distance, draw, pair, randomize, text_inputs

TOLERANCE = 1e-5  # relative L2 in float32; observed: at most 1e-7


@pytest.fixture(scope="module")
def networks():
    return pair("text", "sd2")


def mask(*kept: int) -> torch.Tensor:
    return torch.tensor([[1] * count + [0] * (17 - count) for count in kept])


ARGUMENTS = {
    "mask": {"attention_mask": mask(17, 9, 5)},
    "mask of bools": {"attention_mask": mask(17, 9, 5).bool()},
    "mask of floats": {"attention_mask": mask(17, 9, 5).float()},
    "mask that keeps all": {"attention_mask": mask(17, 17, 17)},
    "positions": {"position_ids": torch.arange(17).flip(0)[None]},
    "positions of rows": {"position_ids": torch.stack([torch.arange(17).roll(row) for row in range(3)])},
    "states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(networks, name):
    mine, theirs = (network(text_inputs(), **ARGUMENTS[name]) for network in networks)
    assert list(mine) == list(theirs)
    assert distance(mine.last_hidden_state, theirs.last_hidden_state) < TOLERANCE
    assert distance(mine.pooler_output, theirs.pooler_output) < TOLERANCE
    if name.startswith(("mask of", "positions")) or name == "mask":
        assert distance(mine.last_hidden_state, networks[0](text_inputs()).last_hidden_state) > 1e-3


def test_positional_arguments(networks):
    """`input_ids, attention_mask, position_ids` in this order."""
    positions = torch.arange(17).flip(0)[None]
    mine, theirs = (network(text_inputs(), mask(17, 9, 5), positions)[0] for network in networks)
    assert distance(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 4, 17])
def test_lengths(networks, tokens):
    """Fewer tokens than positions."""
    mine, theirs = (network(text_inputs(tokens=tokens)) for network in networks)
    assert distance(mine.last_hidden_state, theirs.last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
def test_too_many_tokens(side):
    with pytest.raises(ValueError, match="17"):
        build("text", "sd2", side)(torch.zeros(1, 18, dtype=torch.long))


def test_attentions():
    """Attention maps of each layer, as the reference's eager form gives them; each row sums to 1."""
    torch.manual_seed(0)
    reference = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, attn_implementation="eager")))
    ours = build("text", "sd2", "ours")
    ours.load_state_dict({f"text_model.{key}": value for key, value in reference.state_dict().items()})
    given = {"attention_mask": mask(17, 9, 5), "output_attentions": True}
    mine, theirs = (network.eval()(text_inputs(), **given) for network in (ours, reference))
    assert len(mine.attentions) == len(theirs.attentions) == 3
    for one, other in zip(mine.attentions, theirs.attentions, strict=True):
        assert one.shape == (3, 4, 17, 17)
        assert distance(one, other) < TOLERANCE
        assert torch.allclose(one.sum(-1), torch.ones(3, 4, 17), atol=1e-6)


@pytest.mark.parametrize("case", ["sd2", "sd1"])
@pytest.mark.parametrize("ends", ["one", "several", "none"])
def test_pooler(case, ends):
    """The pooled state is that of the first end token, or of the largest number where the config says 2."""
    ids = text_inputs()
    if ends == "none":
        ids = ids.clamp(max=90)
    elif ends == "one":
        ids = torch.where(ids == 98, 1, ids)
        ids[torch.arange(3), torch.tensor([2, 16, 8])] = 98
    mine, theirs = (network(ids).pooler_output for network in pair("text", case))
    assert distance(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("side", SIDES)
def test_embeddings(side):
    """They can be read, replaced and resized; old rows stay, new ones lie near the old ones' mean."""
    text = build("text", "sd2", side)
    table = text.get_input_embeddings()
    assert table is text.embeddings.token_embedding
    before = table.weight.detach().clone()
    resized = text.resize_token_embeddings(105)
    assert resized is text.get_input_embeddings()
    assert type(resized) is nn.Embedding
    assert (resized.num_embeddings, resized.weight.shape, text.config.vocab_size) == (105, (105, 24), 105)
    assert torch.equal(resized.weight[:99], before)
    assert (resized.weight[99:] - before.mean(0)).abs().max() < 3 * before.std()
    assert resized.weight.requires_grad
    assert text.resize_token_embeddings() is text.get_input_embeddings()
    assert text.resize_token_embeddings(None, pad_to_multiple_of=8).weight.shape == (112, 24)
    assert text.resize_token_embeddings(50).weight.shape == (50, 24)
    assert text.config.vocab_size == 50
    assert torch.equal(text.get_input_embeddings().weight, before[:50])
    assert text(text_inputs().clamp(max=49))[0].shape == (3, 17, 24)
    table = nn.Embedding(7, 24)
    text.set_input_embeddings(table)
    assert text.get_input_embeddings() is text.embeddings.token_embedding is table
    assert next(text.parameters()) is table.weight


def test_embeddings_module(networks):
    """The embeddings called by themselves, with numbers or with embeddings, as textual inversion does."""
    results = []
    for network in networks:
        assert network.embeddings.position_ids.shape == (1, 17)
        assert "position_ids" not in "".join(network.state_dict())
        embeds = network.get_input_embeddings()(text_inputs())
        results.append(network.embeddings(input_ids=text_inputs()))
        assert torch.equal(network.embeddings(inputs_embeds=embeds), results[-1])
    assert distance(*results) < TOLERANCE


def test_a_learnt_row(networks):
    """The gradient of one row of the table (textual inversion)."""
    found = []
    for network in networks:
        table = network.get_input_embeddings().weight
        loss = network(text_inputs()).last_hidden_state.square().sum()
        found.append(torch.autograd.grad(loss, table)[0])
    assert distance(*found) < TOLERANCE


@pytest.mark.parametrize("kind, name", [("unet", "sd1"), ("vae", "sd"), ("text", "sd2")])
@pytest.mark.parametrize("trainable", [False, True])
def test_num_parameters(kind, name, trainable):
    counts = []
    for network in pair(kind, name):
        next(network.parameters()).requires_grad_(False)
        everything = network.num_parameters(only_trainable=trainable)
        counts.append((everything, network.num_parameters(only_trainable=trainable, exclude_embeddings=True)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("posterior", [False, True])
def test_autoencoder_forward(posterior):
    """Both forms of the third argument, and one generator's numbers."""
    results = []
    for vae in pair("vae", "sd"):
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            (result,) = vae(draw(2, 3, 24, 16), posterior, False, generator)
            again = vae(draw(2, 3, 24, 16), sample_posterior=posterior, generator=torch.Generator().manual_seed(4))
        assert torch.equal(result, again.sample)
        results.append(result)
    assert distance(*results) < TOLERANCE


@pytest.mark.parametrize("sizes", [(24, 24), (40, 28), (17, 23)], ids=str)
def test_autoencoder_tiles(sizes):
    """Tiles by the switch and by their own methods; blending as in the reference."""
    results = []
    for vae in pair("vae", "sd"):
        with torch.no_grad():
            vae.enable_tiling()
            found = [vae.encode(draw(1, 3, *sizes)).latent_dist.parameters]
            latents = draw(1, 4, *(size // 2 for size in sizes), seed=3)
            found += [vae.decode(latents).sample, vae.tiled_decode(latents).sample]
            assert torch.equal(found[1], vae.tiled_decode(latents, return_dict=False)[0])
            vae.disable_tiling()
            found.append(vae.decode(latents).sample)
        a, b = draw(1, 2, 6, 8), draw(1, 2, 6, 8, seed=2)
        found += [vae.blend_v(a, b.clone(), 3), vae.blend_h(a, b.clone(), 4)]
        results.append(found)
    for mine, theirs in zip(*results, strict=True):
        assert distance(mine, theirs) < TOLERANCE
