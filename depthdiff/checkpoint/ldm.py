"""Names as data: tables of the names in files beside those of our networks, to apply, invert and check.

A row pairs two module paths, with `{i}`, `{j}`, `{k}` for numbers; the last segment of a key, `weight` or `bias`,
stays. A bare parameter, such as `cls_token`, has its whole key in the table. Every key must match exactly one row.
Layers that a file stacks along the first axis, such as query, key and value, have rows for their parts: `[0]qkv`,
`[1]qkv` and so on are equal parts of the tensor `qkv`. UNet, autoencoder and text encoder have the names of diffusers'
files, so that only older spellings need a row.

Source of the single file's names: Stability-AI/stablediffusion, ldm/modules; mlfoundations/open_clip, transformer.py;
isl-org/MiDaS, midas/dpt_depth.py; timm, resnetv2.py and vision_transformer.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from depthdiff.config import CheckpointError

Shape = tuple[int, ...]

NUMBER, PLACE = re.compile(r"\d+"), re.compile(r"\{(\w)\}|(\d+)")  # in a key, and in a template
PART = re.compile(r"\[(\d)\](.*)", re.DOTALL)


def split_part(key: str) -> tuple[int | None, str]:
    """Split the name of a part of a stacked tensor into its number, None for a whole one, and the tensor's name."""
    found = PART.fullmatch(key)
    return (None, key) if found is None else (int(found[1]), found[2])


def nest(published: str, ours: str, rows: Mapping[str, str]) -> dict[str, str]:
    """Put a prefix before both columns of some rows."""
    return {f"{published}.{left}": f"{ours}.{right}" for left, right in rows.items()}


def same(*names: str) -> dict[str, str]:
    """Make rows for layers whose names are the same on both sides."""
    return {name: name for name in names}


class _Rows:
    """Left templates -> right templates; the left ones are found by what remains of a key without its numbers."""

    def __init__(self, rows: Mapping[str, str]) -> None:
        self.index: dict[str, list[tuple[list[tuple[str, str]], str]]] = {}
        for left, right in rows.items():
            self.index.setdefault(PLACE.sub("#", left), []).append((PLACE.findall(left), right))

    def find(self, key: str) -> Iterator[str]:
        """Rewrite a key by every row that it matches."""
        stem, dot, leaf = key.rpartition(".")
        for name, end in [(key, ""), (stem, dot + leaf)][: 2 if leaf in ("weight", "bias") else 1]:
            numbers = NUMBER.findall(name)
            for places, right in self.index.get(NUMBER.sub("#", name), ()):
                pairs = list(zip(places, numbers, strict=False))
                if len(places) == len(numbers) and all(fixed in ("", number) for (_, fixed), number in pairs):
                    yield right.format(**{letter: number for (letter, _), number in pairs if letter}) + end


@dataclass(frozen=True)
class Table:
    """The published names of one network beside ours.

    Attributes:
        rows: published template -> our template.
        aliases: another published template of a layer -> the template in `rows`.
        ignored: template of a key that no layer of ours reads -> the reason.
        reshaped: our templates whose weights may also come as 1x1 convolutions.
        identity: keys without a row are the same in both layouts.
    """

    rows: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()
    identity: bool = False

    @cached_property
    def _rows(self) -> dict[str, _Rows]:
        back = {right: left for left, right in self.rows.items()}
        rows = {"ours": self.rows, "published": back, "aliases": self.aliases}
        rows |= {"ignored": dict.fromkeys(self.ignored, "x"), "reshaped": dict.fromkeys(self.reshaped, "x")}
        return {name: _Rows(one) for name, one in rows.items()}

    @cached_property
    def _stacked(self) -> dict[str, int]:
        parts = (whole for number, whole in map(split_part, self.rows) if number is not None)
        return dict(Counter(PLACE.sub("#", whole) for whole in parts))

    def _translate(self, key: str, side: str) -> str:
        matches = list(self._rows[side].find(key)) or [key] * self.identity
        if not matches:
            raise KeyError(key)
        if len(matches) > 1:
            raise ValueError(f"{key!r} matches {len(matches)} rows: {_first(matches)}")
        return matches[0]

    def ours(self, key: str) -> str | None:
        """Translate a published key; return None for one that is ignored.

        Raises:
            KeyError: no row matches.
            ValueError: several rows match.
        """
        if any(self._rows["ignored"].find(key)):
            return None
        return self._translate(next(self._rows["aliases"].find(key), key), "ours")

    def published(self, key: str) -> str:
        """Translate one of our keys; errors as in `ours`."""
        return self._translate(key, "published")

    def is_reshaped(self, key: str) -> bool:
        """Return whether the weights behind one of our keys may also come as a 1x1 convolution."""
        return any(self._rows["reshaped"].find(key))

    def parts(self, key: str) -> int:
        """Return how many layers a published key stacks; 1 for an ordinary one."""
        name = NUMBER.sub("#", key)
        return self._stacked.get(name) or self._stacked.get(name.rpartition(".")[0], 1)

    def cut(self, published: Mapping[str, Shape]) -> dict[str, Shape]:
        """Replace stacked tensors, key -> shape, by their parts, where they can be divided."""
        cut: dict[str, Shape] = {}
        for key, shape in published.items():
            count = self.parts(key)
            if count == 1 or not shape or shape[0] % count:
                cut[key] = shape
            else:
                cut |= {f"[{i}]{key}": (shape[0] // count, *shape[1:]) for i in range(count)}
        return cut

    def compare(self, published: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Comparison:
        """Pair the tensors of a file, key -> shape, with those of the network, and list what does not fit."""
        found = Comparison()
        for key in published:
            try:
                name = self.ours(key)
            except KeyError:
                found.unknown.append(key)
                continue
            if name is None:
                found.ignored.append(key)
            elif name in found.pairs:
                found.twice.append(f"{key!r} and {found.pairs[name]!r} are the same layer; keep one of them")
            else:
                found.pairs[name] = key
        found.unknown += [found.pairs[name] for name in found.pairs.keys() - wanted.keys()]
        found.missing = [self.published(name) for name in wanted if name not in found.pairs]
        for name in found.pairs.keys() & wanted.keys():
            key = found.pairs[name]
            squeezed = self.is_reshaped(name) and published[key] == (*wanted[name], 1, 1)
            if published[key] != wanted[name] and not squeezed:
                found.wrong.append(f"{key!r} is {published[key]} instead of {wanted[name]}")
        return found

    def assign(self, source: str, published: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
        """Pair every tensor of a file with a tensor of the network; return our key -> published key.

        Raises:
            CheckpointError: keys without a row, two keys for one tensor, tensors missing or of a wrong shape.
        """
        found = self.compare(published, wanted)
        faults = found.faults(len(published), len(wanted))
        if faults:
            raise CheckpointError(f"{source}: {faults[0]}")
        return found.pairs


@dataclass
class Comparison:
    """How the keys of a file fit a network; `pairs` is our key -> published key, `wrong` the text of an error."""

    pairs: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def faults(self, published: int, wanted: int) -> list[str]:
        """List what does not fit, the plainest first; `published` and `wanted` are the numbers of keys."""
        faults = self.twice[:1]
        if self.unknown:
            faults.append(
                f"{len(self.unknown)} of {published} keys match no layer, first: {_first(self.unknown)}; "
                "wrong file, a config that does not fit it, or an unknown layout"
            )
        if self.missing:
            faults.append(f"{len(self.missing)} of {wanted} weights missing, first: {_first(self.missing)}")
        if self.wrong:
            faults.append(f"{len(self.wrong)} weights have a wrong shape, first: {', '.join(sorted(self.wrong)[:3])}")
        return faults


def _first(names: Iterable[str]) -> str:
    return ", ".join(repr(split_part(name)[1][:100]) for name in sorted(names)[:3])


VAE_ATTENTION = [f"{coder}.mid_block.attentions.0" for coder in ("encoder", "decoder")]
QKV_OUT = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLVED = tuple(f"{path}.{layer}" for path in VAE_ATTENTION for layer in QKV_OUT)
"""The autoencoder's attention layers, which older files and ldm store as 1x1 convolutions."""

VAE_BEFORE_0_17 = dict(zip(("query", "key", "value", "proj_attn"), QKV_OUT, strict=True))
"""diffusers renamed the autoencoder's attention layers in version 0.17; the published files are older."""

CLIP_STEMS = (
    *("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"),
    *(f"encoder.layers.{{i}}.self_attn.{name}_proj" for name in ("k", "v", "q", "out")),
    *(f"encoder.layers.{{i}}.{name}" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
)
"""The names that transformers 5 writes, without the prefix `text_model`."""

BIT_LAYER = same("conv1", "conv2", "conv3", "norm1", "norm2", "norm3", "downsample.conv", "downsample.norm")
DPT_LAYER = {
    "layernorm_before": "norm1",
    **nest("attention.attention", "attention", {"query": "to_q", "key": "to_k", "value": "to_v"}),
    "attention.output.dense": "attention.to_out.0",
    "layernorm_after": "norm2",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
}
DPT_FUSION = same("projection", *(f"residual_layer{i}.convolution{j}" for i in (1, 2) for j in (1, 2)))
DPT = {
    **nest("dpt.embeddings", "embeddings", same("cls_token", "position_embeddings", "projection")),
    "dpt.embeddings.patch_embeddings.projection": "embeddings.patch_projection",
    **nest("dpt.embeddings.backbone.bit.embedder", "backbone.stem", {"convolution": "conv", "norm": "norm"}),
    **nest("dpt.embeddings.backbone.bit.encoder.stages.{i}.layers.{j}", "backbone.stages.{i}.layers.{j}", BIT_LAYER),
    **nest("dpt.encoder.layer.{i}", "layers.{i}", DPT_LAYER),
    "neck.reassemble_stage.readout_projects.{i}.0": "reassemble.{i}.readout",
    **nest("neck.reassemble_stage.layers.{i}", "reassemble.{i}", same("projection", "resize")),
    "neck.convs.{i}": "convs.{i}",
    **nest("neck.fusion_stage.layers.{i}", "fusion.{i}", DPT_FUSION),
    **nest("head", "head", {"projection": "projection", "head.0": "conv1", "head.2": "conv2", "head.4": "conv3"}),
}
NOT_READ = "never read: the depth head looks at the layers before the last norm, and its coarsest level has no skip"
KEPT = {
    "dpt.layernorm": "pretrained.model.norm",
    "neck.fusion_stage.layers.0.residual_layer1.convolution1": "scratch.refinenet4.resConfUnit1.conv1",
    "neck.fusion_stage.layers.0.residual_layer1.convolution2": "scratch.refinenet4.resConfUnit1.conv2",
}
"""Layers of the depth net that nothing reads but both layouts hold, folder -> single file; a conversion keeps them."""

TABLES: dict[str, Table] = {
    **dict.fromkeys(("UNet2DConditionModel", "AutoencoderTiny"), Table({}, identity=True)),
    "AutoencoderKL": Table(
        {},
        aliases={f"{path}.{old}": f"{path}.{new}" for path in VAE_ATTENTION for old, new in VAE_BEFORE_0_17.items()},
        reshaped=CONVOLVED,
        identity=True,
    ),
    "CLIPTextModel": Table(
        {},
        aliases={stem: f"text_model.{stem}" for stem in CLIP_STEMS},
        ignored={
            "text_model.embeddings.position_ids": "the constants 0..76; made where they are needed",
            "embeddings.position_ids": "the same without the prefix",
        },
        identity=True,
    ),
    "DPTForDepthEstimation": Table(DPT, ignored=dict.fromkeys(KEPT, NOT_READ)),
}
"""Class of the network -> its table for files in the layout of diffusers."""

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.model.",
    "depth_estimator": "depth_model.model.",
}
"""Component -> what its keys begin with in a single file."""

SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)
IGNORED = {
    **dict.fromkeys(SCHEDULE, "a constant of the noise schedule, which the scheduler computes from its config"),
    **dict.fromkeys(("lvlb_weights", "logvar"), "weights of the training loss"),
    "scale_factor": "the scaling of the latents, 0.18215 in all published files; the autoencoder's config has it",
}
"""Key of a single file -> why no network reads it."""

IGNORED_PREFIXES = {
    **dict.fromkeys(
        ("model_ema.decay", "model_ema.num_updates"), "how the second copy of the UNet was averaged over a training"
    ),
    "model_ema.": "a second copy of the UNet, averaged over a training; in files to be used the first is the average",
    **dict.fromkeys(("first_stage_model.loss.", "loss."), "the losses that the autoencoder was trained with"),
}
"""What keys begin with -> why no network reads them."""

SAME_WIDTH = same("norm1", "conv1", "norm2", "conv2")
BLOCK = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2",
         *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in QKV_OUT))  # fmt: skip
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_CODER = {
    **same("conv_in", "conv_out"),
    "norm_out": "conv_norm_out",
    **nest("mid.block_1", "mid_block.resnets.0", SAME_WIDTH),
    **nest("mid.block_2", "mid_block.resnets.1", SAME_WIDTH),
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    **nest("mid.attn_1", "mid_block.attentions.0", {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}),
}
DPT_REASSEMBLE = {"0.project.0": "readout", "3": "projection", "4": "resize"}
DPT_REFINE = {
    "out_conv": "projection",
    **{f"resConfUnit{i}.conv{j}": f"residual_layer{i}.convolution{j}" for i in (1, 2) for j in (1, 2)},
}


def _transformer(published: str, ours: str, depth: int) -> dict[str, str]:
    blocks = (f"transformer_blocks.{k}.{layer}" for k in range(depth) for layer in BLOCK)
    return nest(published, ours, same("norm", "proj_in", "proj_out", *blocks))


def _per_level(config: Any, name: str) -> tuple[int, ...]:
    """Return a setting once for each level, whether it is one number or a list."""
    value = config[name]
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(config["block_out_channels"])


def _unet_table(config: Any) -> Table:
    """Make the table of one geometry: ldm numbers the blocks through."""
    depths = _per_level(config, "transformer_layers_per_block")
    rows = {
        **nest("time_embed", "time_embedding", {"0": "linear_1", "2": "linear_2"}),
        "input_blocks.0.0": "conv_in",
        **nest("middle_block.0", "mid_block.resnets.0", RESNET),
        **_transformer("middle_block.1", "mid_block.attentions.0", depths[-1]),
        **nest("middle_block.2", "mid_block.resnets.1", RESNET),
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    last, layers = len(config.block_out_channels) - 1, _per_level(config, "layers_per_block")
    number = 1
    for i, kind in enumerate(config.down_block_types):
        for j in range(layers[i]):
            rows |= nest(f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{j}", RESNET)
            if kind == "CrossAttnDownBlock2D":
                rows |= _transformer(f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{j}", depths[i])
            number += 1
        if i < last:
            rows[f"input_blocks.{number}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            number += 1
    number = 0
    for i, kind in enumerate(config.up_block_types):
        has_attention = kind == "CrossAttnUpBlock2D"
        for j in range(layers[last - i] + 1):
            rows |= nest(f"output_blocks.{number}.0", f"up_blocks.{i}.resnets.{j}", RESNET)
            if has_attention:
                rows |= _transformer(f"output_blocks.{number}.1", f"up_blocks.{i}.attentions.{j}", depths[last - i])
            number += 1
        if i < last:
            rows[f"output_blocks.{number - 1}.{1 + has_attention}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return Table(rows)


def _vae_table(config: Any) -> Table:
    """Make the table of one geometry: ldm counts the decoder's levels from the finest, we from the coarsest."""
    resnet = SAME_WIDTH | {"nin_shortcut": "conv_shortcut"}
    rows = {
        **same("quant_conv", "post_quant_conv"),
        **nest("encoder", "encoder", VAE_CODER),
        **nest("decoder", "decoder", VAE_CODER),
        **nest("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", resnet),
        "encoder.down.{i}.downsample.conv": "encoder.down_blocks.{i}.downsamplers.0.conv",
    }
    levels = len(config.block_out_channels)
    for i in range(levels):
        here = f"decoder.up.{levels - 1 - i}"
        rows |= nest(here + ".block.{j}", f"decoder.up_blocks.{i}.resnets." + "{j}", resnet)
        rows[f"{here}.upsample.conv"] = f"decoder.up_blocks.{i}.upsamplers.0.conv"
    return Table(rows, reshaped=CONVOLVED)


def _text_layer(published: str, ours: str) -> dict[str, str]:
    """Make the rows of one layer of the text tower; query, key and value are stacked."""
    rows = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
    rows |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    stacked = {
        f"[{i}]{published}.attn.in_proj_{leaf}": f"{ours}.self_attn.{name}.{leaf}"
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
        for leaf in ("weight", "bias")
    }
    return nest(published, ours, rows) | stacked


def _text_table(config: Any) -> Table:
    """Make the table of a text tower, of which the model reads the last layer but one."""
    dropped = _text_layer(f"transformer.resblocks.{config.num_hidden_layers}", "")
    return Table(
        {
            "token_embedding": "text_model.embeddings.token_embedding",
            "positional_embedding": "text_model.embeddings.position_embedding.weight",
            **_text_layer("transformer.resblocks.{i}", "text_model.encoder.layers.{i}"),
            "ln_final": "text_model.final_layer_norm",
        },
        ignored={
            **dict.fromkeys(dropped, "never read: the UNet looks at the layer before it"),
            "text_projection": "leads to where CLIP compares texts with images; the UNet reads what is before it",
            "logit_scale": "a constant of CLIP's training",
            "attn_mask": "the constant triangle of causal attention; made where it is needed",
        },
    )


def _depth_table(config: Any) -> Table:
    """Make the table of a hybrid depth net; MiDaS counts levels from 1 and fuses them from the last."""
    vit = "pretrained.model"
    rows = {
        f"{vit}.cls_token": "embeddings.cls_token",
        f"{vit}.pos_embed": "embeddings.position_embeddings",
        f"{vit}.patch_embed.proj": "embeddings.projection",
        **nest(f"{vit}.patch_embed.backbone.stem", "backbone.stem", same("conv", "norm")),
        **nest(vit + ".patch_embed.backbone.stages.{i}.blocks.{j}", "backbone.stages.{i}.layers.{j}", BIT_LAYER),
        **nest(vit + ".blocks.{i}", "layers.{i}", {"attn.proj": "attention.to_out.0", **same("norm1", "norm2")}),
        **nest(vit + ".blocks.{i}.mlp", "layers.{i}", same("fc1", "fc2")),
        **{f"[{i}]{vit}.blocks.{{i}}.attn.qkv": f"layers.{{i}}.attention.{QKV_OUT[i]}" for i in range(3)},
        **nest("scratch.output_conv", "head", {"0": "conv1", "2": "conv2", "4": "conv3"}),
    }
    for level in range(4):
        rows[f"scratch.layer{level + 1}_rn"] = f"convs.{level}"
        rows |= nest(f"scratch.refinenet{4 - level}", f"fusion.{level}", DPT_REFINE)
        rows |= nest(f"pretrained.act_postprocess{level + 1}", f"reassemble.{level}", DPT_REASSEMBLE)
    ignored = dict.fromkeys(KEPT.values(), NOT_READ)
    return Table(rows, ignored=ignored | {f"{vit}.head": "names one of 1000 kinds of things; depth does not need it"})


TABLES_LDM: Mapping[str, Callable[[Any], Table]] = {
    "UNet2DConditionModel": _unet_table,
    "AutoencoderKL": _vae_table,
    "CLIPTextModel": _text_table,
    "DPTForDepthEstimation": _depth_table,
}
"""Class of the network -> what makes its table for single files from its config."""
