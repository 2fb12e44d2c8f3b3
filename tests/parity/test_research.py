"""The way into the networks that published methods take, written anew: each finds its layers and gives the same here.

A recipe gets a network and patches or calls it as the method's code does; ours, plainly and with `fast` on, and the
reference, treated alike, return the same. Observed: at most 3e-6 relative L2 in float32, 2e-5 for gradients.
"""

from __future__ import annotations

import copy
import math
import types

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from depthdiff import fast
from depthdiff.schedulers.ddim import DDIMScheduler
from tests.parity.geometries import distance, draw, pair

TOLERANCE = 1e-5
SAMPLE, PROMPTS = draw(1, 5, 16, 16), draw(2, 7, 20, seed=6)


def predict(unet, t=301, sample=None, embeds=PROMPTS):
    """Call a UNet on two rows, as under guidance."""
    x = SAMPLE if sample is None else sample
    return unet(torch.cat([x] * len(embeds)), t, encoder_hidden_states=embeds, return_dict=False)[0]


def plug_and_play(unet):
    """arXiv:2211.12572: features of one residual block and queries of self-attention go from row 0 to the others."""
    block = unet.up_blocks[1].resnets[1]

    def features(self, input_tensor, temb, *args, **kwargs):
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        h[1:] = h[:1]
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + h) / self.output_scale_factor

    def queries(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k = (self.head_to_batch_dim(layer(hidden_states[:1])) for layer in (self.to_q, self.to_k))
        weights = self.get_attention_scores(q, k).repeat(len(hidden_states), 1, 1)
        v = self.head_to_batch_dim(self.to_v(hidden_states))
        return self.to_out[0](self.batch_to_head_dim(weights @ v))

    block.forward = types.MethodType(features, block)
    for i, j in ((1, 1), (2, 0), (3, 2)):
        attention = unet.up_blocks[i].attentions[j].transformer_blocks[0].attn1
        attention.forward = types.MethodType(queries, attention)
    return predict(unet)


def masactrl(unet):
    """arXiv:2304.08465: from a layer on, every row's self-attention reads keys and values of row 0."""
    layers = [module for module in unet.modules() if type(module).__name__ == "Attention"]
    assert len(layers) == 32
    for number, layer in enumerate(layers):

        def forward(x, encoder_hidden_states=None, attention_mask=None, self=layer, number=number, **kwargs):
            context = encoder_hidden_states
            if context is None:
                context = x[:1].expand_as(x) if number > 10 else x
            q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
            q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
            out = (q @ k.mT * self.scale).softmax(-1) @ v
            return self.to_out[0](out.transpose(1, 2).flatten(2))

        layer.forward = forward
    return predict(unet)


def token_flow(unet):
    """arXiv:2307.10373: blocks get another class, which reuses what a pivotal pass has kept."""
    kept = {}
    for name, module in list(unet.named_modules()):
        if type(module).__name__ == "BasicTransformerBlock":

            class Flow(type(module)):
                def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
                    x = self.norm1(hidden_states)
                    out = kept.setdefault(self.place, self.attn1(x).mean(0, keepdim=True))
                    hidden_states = hidden_states + out
                    hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
                    return hidden_states + self.ff(self.norm3(hidden_states))

            module.__class__, module.place = Flow, name
    return torch.cat([predict(unet), predict(unet, sample=SAMPLE + 0.1)])


class Edited:
    """arXiv:2208.01626 (prompt-to-prompt): the maps of row 0 replace those of the others, and one word counts more."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = map(attn.head_to_batch_dim, (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        maps = attn.get_attention_scores(q, k, attention_mask)
        if encoder_hidden_states is not None:
            maps = torch.cat([maps[: attn.heads]] * len(hidden_states))
            maps = maps * torch.linspace(0.5, 1.5, maps.shape[-1])
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(maps @ v)))


def prompt_to_prompt(unet):
    """Every layer gets its editor by name."""
    unet.set_attn_processor({name: Edited() for name in unet.attn_processors})
    return predict(unet)


class Keeping(Edited):
    """Keeps the maps of attention to the prompt."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        if encoder_hidden_states is not None:
            q, k = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
            self.kept.append(attn.get_attention_scores(attn.head_to_batch_dim(q), attn.head_to_batch_dim(k)))
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


def attend_and_excite(unet):
    """arXiv:2301.13826: the latents move along the gradient of what a word attends to."""
    kept = []
    unet.set_attn_processor(Keeping(kept))
    latents = SAMPLE.clone().requires_grad_()
    with torch.enable_grad():
        predict(unet, sample=latents, embeds=PROMPTS[1:])
        loss = sum(1 - maps[..., 2].amax() for maps in kept if maps.shape[1] == 16)
        [gradient] = torch.autograd.grad(loss, latents)
    return gradient


def daam(unet):
    """arXiv:2210.04885: heat maps of every word, from the cross-attention that class names lead to."""
    kept = []
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        if "CrossAttn" in type(block).__name__:
            for transformer in block.attentions:
                for inner in transformer.transformer_blocks:
                    inner.attn2.set_processor(Keeping(kept))
    predict(unet)
    assert len(kept) == 16
    maps = [one.mT.unflatten(2, (math.isqrt(one.shape[1]), -1)) for one in kept]
    return torch.stack([F.interpolate(one, size=(16, 16)).mean(0) for one in maps])


def freeu(unet):
    """arXiv:2309.11497, by its switch."""
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    on = predict(unet)
    unet.disable_freeu()
    return torch.cat([on, predict(unet)])


class Identity(nn.Module):
    """arXiv:2403.17377 (PAG): self-attention whose map is the identity."""

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


def perturbed_attention(unet):
    """A second prediction with the middle's self-attention perturbed guides the first."""
    plain = predict(unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    own = attention.processor
    attention.set_processor(Identity())
    perturbed = predict(unet)
    attention.set_processor(own)
    return plain + 3 * (plain - perturbed) + predict(unet)


def token_merging(unet):
    """arXiv:2303.17604: blocks found by class name drop every other token before self-attention; a hook tells sizes."""
    assert any(kind.__name__ == "ModelMixin" for kind in type(unet).__mro__)
    size = {}
    unet.register_forward_pre_hook(lambda module, args: size.update(now=args[0].shape[2:]))
    for module in list(unet.modules()):
        if any(kind.__name__ == "BasicTransformerBlock" for kind in type(module).__mro__):

            class Merged(type(module)):
                def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
                    x = self.norm1(hidden_states)
                    if x.shape[1] == size["now"].numel():
                        hidden_states = hidden_states + self.attn1(x[:, ::2]).repeat_interleave(2, dim=1)
                    else:
                        hidden_states = hidden_states + self.attn1(x)
                    hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
                    return hidden_states + self.ff(self.norm3(hidden_states))

            module.__class__ = Merged
    return predict(unet)


def deep_cache(unet):
    """arXiv:2312.00858: the deep blocks' forwards are replaced by ones that return what they returned before."""
    kept, reuse = {}, [False]
    blocks = {f"down{i}": block for i, block in enumerate(unet.down_blocks) if i}
    blocks |= {f"up{i}": block for i, block in enumerate(unet.up_blocks[:-1])} | {"mid": unet.mid_block}
    for name, block in blocks.items():

        def forward(*args, name=name, plain=block.forward, **kwargs):
            if not reuse[0]:
                kept[name] = plain(*args, **kwargs)
            return kept[name]

        block.forward = forward
    first, reuse[0] = predict(unet), True
    return torch.cat([first, predict(unet, 281, SAMPLE + 0.1)])


def distillation(unet):
    """arXiv:2302.01721 (TEXTure) and 2311.17261 (SceneTex): guidance's prediction as the gradient of a texture."""
    texture = nn.Parameter(draw(1, 4, 16, 16, seed=3))
    noise, t = draw(1, 4, 16, 16, seed=4), torch.tensor([411])
    scheduler = (DDIMScheduler if type(unet).__module__.startswith("depthdiff") else diffusers.DDIMScheduler)()
    noisy = scheduler.add_noise(texture, noise, t)
    sample = torch.cat([noisy, SAMPLE[:, 4:]], dim=1)
    with torch.no_grad():
        uncond, cond = predict(unet, t, sample).chunk(2)
        weight = 1 - scheduler.alphas[t].view(1, 1, 1, 1)
        gradient = weight * (uncond + 7.5 * (cond - uncond) - noise)
    F.mse_loss(noisy, (noisy - gradient).detach(), reduction="sum").backward()
    with torch.enable_grad():
        predict(unet, t, torch.cat([texture, SAMPLE[:, 4:]], dim=1)).square().sum().backward()
    return texture.grad


class Low(nn.Module):
    """A LoRA layer in the manner of cloneofsimo/lora."""

    def __init__(self, linear):
        super().__init__()
        self.linear = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        self.linear.weight, self.linear.bias = linear.weight, linear.bias
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)
        self.scale = 1.0

    def forward(self, x):
        return self.linear(x) + self.scale * self.up(self.down(x))


def injected_lora(unet):
    """Layers below classes of these names are replaced, and their scale changes with every step."""
    torch.manual_seed(0)
    found = []
    for module in [m for m in unet.modules() if type(m).__name__ in ("CrossAttention", "Attention", "GEGLU")]:
        for name, child in [one for one in module.named_modules() if isinstance(one[1], nn.Linear)]:
            path, _, last = name.rpartition(".")
            parent = module.get_submodule(path)
            parent._modules[last] = Low(child)
            found.append(parent._modules[last])
    assert len(found) == 144
    results = []
    for step, t in enumerate((601, 401, 201)):
        for layer in found:
            layer.scale = 0.5 * step
        results.append(predict(unet, t))
    return torch.cat(results)


RECIPES = [plug_and_play, masactrl, token_flow, prompt_to_prompt, attend_and_excite, daam, freeu, perturbed_attention,
           token_merging, deep_cache, distillation, injected_lora]  # fmt: skip


@pytest.fixture(scope="module")
def unets():
    return pair("unet", "sd2")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(unets, recipe):
    """The same plainly, with `fast` on, and in the reference; and not what the network gives without it."""
    results = []
    for unet, on in ((unets[1], False), (unets[0], False), (unets[0], True)):
        network = copy.deepcopy(unet)
        if on:
            fast.enable(network)
        with torch.set_grad_enabled(recipe is distillation):
            plain = predict(unet)
            results.append(recipe(network).detach())
    assert distance(results[1], results[0]) < TOLERANCE
    assert distance(results[2], results[0]) < TOLERANCE
    assert results[0].shape != plain.shape or distance(results[0], plain.detach()) > 1e-3


def test_textual_inversion():
    """A word is added, its row is trained for a step; rows, gradients and results equal the reference's."""
    results = []
    for encoder in pair("text", "sd2"):
        table = encoder.resize_token_embeddings(100, mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[99] = draw(24, seed=9)
        assert table is encoder.get_input_embeddings() and len(table.weight) == encoder.config.vocab_size == 100
        ids = torch.tensor([[97, 5, 99, 8, 98]])
        encoder(ids)[0].square().sum().backward()
        results.append(table.weight.grad)
    assert distance(*results) < 1e-5
    assert results[0][99].abs().sum() > 0
