"""An independent writer of checkpoints in two layouts: it builds the networks of the original code on paper.

Every layer is written down with its name in the single file (ldm, OpenCLIP, MiDaS with timm) and in the folder
(diffusers 0.10, transformers 4.26), in the order in which the original constructors make them. No table of the package
is read.
"""

from dataclasses import dataclass, field

import torch

SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    channels: tuple = (320, 640, 1280, 1280)
    attended: tuple = (True, True, True, False)
    layers: int = 2
    context: int = 1024
    depth_channels: int = 1
    vae: tuple = (128, 256, 512, 512)
    vae_layers: int = 2
    vocab: int = 49408
    text_layers: int = 24
    text_ff: int = 4096
    vit: int = 768
    vit_layers: int = 12
    vit_ff: int = 3072
    grid: int = 24
    stem: int = 64
    bit: tuple = (256, 512, 1024)
    bit_layers: tuple = (3, 4, 9)
    neck: tuple = (256, 512, 768, 768)
    fusion: int = 256


FULL = Geometry()
SMALL = Geometry(
    channels=(64, 128, 192), attended=(True, True, False), layers=1, context=128,
    vae=(32, 64, 64, 96), vae_layers=1, text_layers=4, text_ff=160,
    vit=128, vit_layers=5, vit_ff=192, grid=4, stem=32, bit=(128, 256, 512), bit_layers=(1, 2, 1),
    neck=(128, 256, 80, 112), fusion=40,
)  # fmt: skip


@dataclass
class Writer:
    """Collects (component, name in the single file or None, names in the folder, shape of each, whether 1x1 in ldm)."""

    g: Geometry
    records: list = field(default_factory=list)

    def add(self, part, ldm, hf, shape, *, conv=False):
        hf = (hf,) if isinstance(hf, str) else tuple(hf)
        self.records.append((part, ldm, hf, tuple(shape), conv))

    def layer(self, part, ldm, hf, shape, *, conv=False, bias=True):
        self.add(part, f"{ldm}.weight" if ldm else None, f"{hf}.weight" if hf else (), shape, conv=conv)
        if bias:
            self.add(part, f"{ldm}.bias" if ldm else None, f"{hf}.bias" if hf else (), shape[:1])

    def norm(self, part, ldm, hf, width):
        self.layer(part, ldm, hf, (width,))


def unet(w):
    g, p = w.g, "model.diffusion_model"
    base, time = g.channels[0], 4 * g.channels[0]

    def resblock(ldm, hf, cin, cout):
        w.norm("unet", f"{p}.{ldm}.in_layers.0", f"{hf}.norm1", cin)
        w.layer("unet", f"{p}.{ldm}.in_layers.2", f"{hf}.conv1", (cout, cin, 3, 3))
        w.layer("unet", f"{p}.{ldm}.emb_layers.1", f"{hf}.time_emb_proj", (cout, time))
        w.norm("unet", f"{p}.{ldm}.out_layers.0", f"{hf}.norm2", cout)
        w.layer("unet", f"{p}.{ldm}.out_layers.3", f"{hf}.conv2", (cout, cout, 3, 3))
        if cin != cout:
            w.layer("unet", f"{p}.{ldm}.skip_connection", f"{hf}.conv_shortcut", (cout, cin, 1, 1))

    def transformer(ldm, hf, c):
        w.norm("unet", f"{p}.{ldm}.norm", f"{hf}.norm", c)
        w.layer("unet", f"{p}.{ldm}.proj_in", f"{hf}.proj_in", (c, c))
        inner = "transformer_blocks.0"
        for attn, width in (("attn1", c), ("attn2", g.context)):
            here, there = f"{p}.{ldm}.{inner}.{attn}", f"{hf}.{inner}.{attn}"
            w.layer("unet", f"{here}.to_q", f"{there}.to_q", (c, c), bias=False)
            w.layer("unet", f"{here}.to_k", f"{there}.to_k", (c, width), bias=False)
            w.layer("unet", f"{here}.to_v", f"{there}.to_v", (c, width), bias=False)
            w.layer("unet", f"{here}.to_out.0", f"{there}.to_out.0", (c, c))
        w.layer("unet", f"{p}.{ldm}.{inner}.ff.net.0.proj", f"{hf}.{inner}.ff.net.0.proj", (8 * c, c))
        w.layer("unet", f"{p}.{ldm}.{inner}.ff.net.2", f"{hf}.{inner}.ff.net.2", (c, 4 * c))
        for i in (1, 2, 3):
            w.norm("unet", f"{p}.{ldm}.{inner}.norm{i}", f"{hf}.{inner}.norm{i}", c)
        w.layer("unet", f"{p}.{ldm}.proj_out", f"{hf}.proj_out", (c, c))

    w.layer("unet", f"{p}.time_embed.0", "time_embedding.linear_1", (time, base))
    w.layer("unet", f"{p}.time_embed.2", "time_embedding.linear_2", (time, time))
    w.layer("unet", f"{p}.input_blocks.0.0", "conv_in", (base, 4 + g.depth_channels, 3, 3))
    ch, chans, n = base, [base], 1
    for level, width in enumerate(g.channels):
        for i in range(g.layers):
            resblock(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}", ch, width)
            ch = width
            if g.attended[level]:
                transformer(f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{i}", ch)
            chans.append(ch)
            n += 1
        if level != len(g.channels) - 1:
            w.layer("unet", f"{p}.input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv", (ch, ch, 3, 3))
            chans.append(ch)
            n += 1
    resblock("middle_block.0", "mid_block.resnets.0", ch, ch)
    transformer("middle_block.1", "mid_block.attentions.0", ch)
    resblock("middle_block.2", "mid_block.resnets.1", ch, ch)
    n = 0
    for step, level in enumerate(reversed(range(len(g.channels)))):
        for i in range(g.layers + 1):
            resblock(f"output_blocks.{n}.0", f"up_blocks.{step}.resnets.{i}", ch + chans.pop(), g.channels[level])
            ch, k = g.channels[level], 1
            if g.attended[level]:
                transformer(f"output_blocks.{n}.{k}", f"up_blocks.{step}.attentions.{i}", ch)
                k += 1
            if level and i == g.layers:
                w.layer(
                    "unet", f"{p}.output_blocks.{n}.{k}.conv", f"up_blocks.{step}.upsamplers.0.conv", (ch, ch, 3, 3)
                )
            n += 1
    w.norm("unet", f"{p}.out.0", "conv_norm_out", ch)
    w.layer("unet", f"{p}.out.2", "conv_out", (4, ch, 3, 3))


def vae(w):
    g, p, widths = w.g, "first_stage_model", w.g.vae

    def resblock(ldm, hf, cin, cout):
        for i, (a, b) in enumerate(((cin, cout), (cout, cout)), 1):
            w.norm("vae", f"{p}.{ldm}.norm{i}", f"{hf}.norm{i}", a)
            w.layer("vae", f"{p}.{ldm}.conv{i}", f"{hf}.conv{i}", (b, a, 3, 3))
        if cin != cout:
            w.layer("vae", f"{p}.{ldm}.nin_shortcut", f"{hf}.conv_shortcut", (cout, cin, 1, 1))

    def middle(coder, c):
        resblock(f"{coder}.mid.block_1", f"{coder}.mid_block.resnets.0", c, c)
        hf = f"{coder}.mid_block.attentions.0"
        w.norm("vae", f"{p}.{coder}.mid.attn_1.norm", f"{hf}.group_norm", c)
        for ldm, name in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn")):
            w.layer("vae", f"{p}.{coder}.mid.attn_1.{ldm}", f"{hf}.{name}", (c, c), conv=True)
        resblock(f"{coder}.mid.block_2", f"{coder}.mid_block.resnets.1", c, c)

    last = len(widths) - 1
    w.layer("vae", f"{p}.encoder.conv_in", "encoder.conv_in", (widths[0], 3, 3, 3))
    ch = widths[0]
    for level, width in enumerate(widths):
        for i in range(g.vae_layers):
            resblock(f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}", ch, width)
            ch = width
        if level != last:
            names = f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
            w.layer("vae", f"{p}.{names[0]}", names[1], (ch, ch, 3, 3))
    middle("encoder", ch)
    w.norm("vae", f"{p}.encoder.norm_out", "encoder.conv_norm_out", ch)
    w.layer("vae", f"{p}.encoder.conv_out", "encoder.conv_out", (8, ch, 3, 3))
    w.layer("vae", f"{p}.decoder.conv_in", "decoder.conv_in", (ch, 4, 3, 3))
    middle("decoder", ch)
    for level in reversed(range(len(widths))):
        there = f"decoder.up_blocks.{last - level}"
        for i in range(g.vae_layers + 1):
            resblock(f"decoder.up.{level}.block.{i}", f"{there}.resnets.{i}", ch, widths[level])
            ch = widths[level]
        if level:
            w.layer("vae", f"{p}.decoder.up.{level}.upsample.conv", f"{there}.upsamplers.0.conv", (ch, ch, 3, 3))
    w.norm("vae", f"{p}.decoder.norm_out", "decoder.conv_norm_out", ch)
    w.layer("vae", f"{p}.decoder.conv_out", "decoder.conv_out", (3, ch, 3, 3))
    w.layer("vae", f"{p}.quant_conv", "quant_conv", (8, 8, 1, 1))
    w.layer("vae", f"{p}.post_quant_conv", "post_quant_conv", (4, 4, 1, 1))


def text_encoder(w):
    g, p, c, t = w.g, "cond_stage_model.model", w.g.context, "text_model"
    w.add("text_encoder", f"{p}.positional_embedding", f"{t}.embeddings.position_embedding.weight", (77, c))
    w.add("text_encoder", f"{p}.token_embedding.weight", f"{t}.embeddings.token_embedding.weight", (g.vocab, c))
    w.add("text_encoder", f"{p}.text_projection", (), (c, c))
    w.add("text_encoder", f"{p}.logit_scale", (), ())
    for i in range(g.text_layers):
        here, dropped = f"{p}.transformer.resblocks.{i}", i == g.text_layers - 1
        there = None if dropped else f"{t}.encoder.layers.{i}"

        def name(leaf, there=there):
            return f"{there}.{leaf}" if there else None

        w.norm("text_encoder", f"{here}.ln_1", name("layer_norm1"), c)
        for leaf, shape in (("weight", (c, c)), ("bias", (c,))):
            three = [f"{there}.self_attn.{one}_proj.{leaf}" for one in "qkv"] if there else ()
            w.add("text_encoder", f"{here}.attn.in_proj_{leaf}", three, shape if there else (3 * c, *shape[1:]))
        w.layer("text_encoder", f"{here}.attn.out_proj", name("self_attn.out_proj"), (c, c))
        w.norm("text_encoder", f"{here}.ln_2", name("layer_norm2"), c)
        w.layer("text_encoder", f"{here}.mlp.c_fc", name("mlp.fc1"), (g.text_ff, c))
        w.layer("text_encoder", f"{here}.mlp.c_proj", name("mlp.fc2"), (c, g.text_ff))
    w.norm("text_encoder", f"{p}.ln_final", f"{t}.final_layer_norm", c)


def depth_estimator(w):
    g, p, vit, d = w.g, "depth_model.model", "depth_model.model.pretrained.model", "depth_estimator"
    w.add(d, f"{vit}.cls_token", "dpt.embeddings.cls_token", (1, 1, g.vit))
    w.add(d, f"{vit}.pos_embed", "dpt.embeddings.position_embeddings", (1, g.grid**2 + 1, g.vit))
    here, there = f"{vit}.patch_embed.backbone", "dpt.embeddings.backbone.bit"
    w.layer(d, f"{here}.stem.conv", f"{there}.embedder.convolution", (g.stem, 3, 7, 7), bias=False)
    w.norm(d, f"{here}.stem.norm", f"{there}.embedder.norm", g.stem)
    cin = g.stem
    for s, (width, depth) in enumerate(zip(g.bit, g.bit_layers, strict=True)):
        for b in range(depth):
            ldm, hf = f"{here}.stages.{s}.blocks.{b}", f"{there}.encoder.stages.{s}.layers.{b}"
            mid = width // 4
            if b == 0:
                w.layer(d, f"{ldm}.downsample.conv", f"{hf}.downsample.conv", (width, cin, 1, 1), bias=False)
                w.norm(d, f"{ldm}.downsample.norm", f"{hf}.downsample.norm", width)
            for i, shape in enumerate(((mid, cin, 1, 1), (mid, mid, 3, 3), (width, mid, 1, 1)), 1):
                w.layer(d, f"{ldm}.conv{i}", f"{hf}.conv{i}", shape, bias=False)
                w.norm(d, f"{ldm}.norm{i}", f"{hf}.norm{i}", shape[0])
            cin = width
    w.layer(d, f"{vit}.patch_embed.proj", "dpt.embeddings.projection", (g.vit, g.bit[-1], 1, 1))
    for i in range(g.vit_layers):
        ldm, hf = f"{vit}.blocks.{i}", f"dpt.encoder.layer.{i}"
        w.norm(d, f"{ldm}.norm1", f"{hf}.layernorm_before", g.vit)
        for leaf, shape in (("weight", (g.vit, g.vit)), ("bias", (g.vit,))):
            three = [f"{hf}.attention.attention.{one}.{leaf}" for one in ("query", "key", "value")]
            w.add(d, f"{ldm}.attn.qkv.{leaf}", three, shape)
        w.layer(d, f"{ldm}.attn.proj", f"{hf}.attention.output.dense", (g.vit, g.vit))
        w.norm(d, f"{ldm}.norm2", f"{hf}.layernorm_after", g.vit)
        w.layer(d, f"{ldm}.mlp.fc1", f"{hf}.intermediate.dense", (g.vit_ff, g.vit))
        w.layer(d, f"{ldm}.mlp.fc2", f"{hf}.output.dense", (g.vit, g.vit_ff))
    w.norm(d, f"{vit}.norm", "dpt.layernorm", g.vit)
    w.layer(d, f"{vit}.head", None, (1000, g.vit))
    for i in (3, 4):
        post, stage = f"{p}.pretrained.act_postprocess{i}", "neck.reassemble_stage"
        w.layer(d, f"{post}.0.project.0", f"{stage}.readout_projects.{i - 1}.0", (g.vit, 2 * g.vit))
        w.layer(d, f"{post}.3", f"{stage}.layers.{i - 1}.projection", (g.neck[i - 1], g.vit, 1, 1))
    w.layer(d, f"{post}.4", f"{stage}.layers.3.resize", (g.neck[3], g.neck[3], 3, 3))
    for i in (1, 2, 3, 4):
        width, f = g.neck[i - 1], g.fusion
        w.layer(d, f"{p}.scratch.layer{i}_rn", f"neck.convs.{i - 1}", (f, width, 3, 3), bias=False)
        ldm, hf = f"{p}.scratch.refinenet{i}", f"neck.fusion_stage.layers.{4 - i}"
        w.layer(d, f"{ldm}.out_conv", f"{hf}.projection", (f, f, 1, 1))
        for u in (1, 2):
            for c in (1, 2):
                names = f"{ldm}.resConfUnit{u}.conv{c}", f"{hf}.residual_layer{u}.convolution{c}"
                w.layer(d, *names, (f, f, 3, 3))
    w.layer(d, f"{p}.scratch.output_conv.0", "head.head.0", (f // 2, f, 3, 3))
    w.layer(d, f"{p}.scratch.output_conv.2", "head.head.2", (32, f // 2, 3, 3))
    w.layer(d, f"{p}.scratch.output_conv.4", "head.head.4", (1, 32, 1, 1))


def records(geometry):
    w = Writer(geometry)
    for network in (unet, vae, text_encoder, depth_estimator):
        network(w)
    return w.records


def key_lists(geometry):
    """Return the keys with shapes: of the single file, and of every component's folder."""
    single, folder = {name: (1000,) for name in SCHEDULE}, {}
    for part, ldm, hf, shape, conv in records(geometry):
        for name in hf:
            folder.setdefault(part, {})[name] = shape
        stacked = (len(hf) * shape[0], *shape[1:]) if len(hf) > 1 else shape
        single[ldm] = (*stacked, 1, 1) if conv and len(shape) == 2 else stacked
    folder["text_encoder"]["text_model.embeddings.position_ids"] = (1, 77)
    return single, folder


def random_twins(geometry, seed=0, dtype=torch.float32):
    """Return the same random weights in both layouts: a single file's, and every component's."""
    generator = torch.Generator().manual_seed(seed)
    single = {name: torch.rand(1000, generator=generator) for name in SCHEDULE}
    folder = {}
    for part, ldm, hf, shape, conv in records(geometry):
        tensors = [_random(ldm, shape, generator).to(dtype) for _ in range(max(len(hf), 1))]
        for name, tensor in zip(hf, tensors, strict=False):
            folder.setdefault(part, {})[name] = tensor
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0].clone()
        single[ldm] = tensor[..., None, None].contiguous() if conv and len(shape) == 2 else tensor
    folder["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return single, folder


def _random(name, shape, generator):
    """Draw weights under which signals neither die nor explode."""
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5
    if name.endswith("output_conv.4.bias"):
        return torch.full(shape, 3.0)  # the depth head ends in a ReLU: keep it alive
    is_scale = name.endswith("weight")
    return (1.0 if is_scale else 0.0) + 0.1 * torch.randn(shape, generator=generator)
