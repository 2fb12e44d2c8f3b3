"""What teaches the UNet which words belong to which object, beside the loss of denoising.

The renderer knows where each object is, and the caption's maker knows the words that name it. Three more losses use it:

- places of an object look at the words that name it, and tell it from others (`looking_loss`);
- they can say what stands there: its shape, and its place among its like (`Guesses`, of what is asked of the words);
- the words that name an object can say its colour (`Guesses`, of the words themselves).

Denoising alone learns these last, and "on the left" not at all: only together do a sense of place in the picture and a
word that knows its noun lower the loss.

Letters: B pictures, K objects, H heads, Lq places, L tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scenes import COLOURS, MAX_OBJECTS, PLACES, SHAPES, Scene, group_of, place_among
from torch import Tensor, nn

from depthdiff import CLIPTokenizer, UNet2DConditionModel
from depthdiff.models.attention import Attention, AttnProcessor

UNKNOWN = -100
"""Says in `facts` that there is nothing to guess."""

Look = tuple[Tensor, Tensor]
"""Of one layer: its queries (B, Lq, channels), and where they look (B, H, Lq, L)."""


class Watching(AttnProcessor):
    """Attention that notes what it asks and where it looks.

    Args:
        looks: list to append to.
    """

    def __init__(self, looks: list[Look]) -> None:
        self.looks = looks

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Compute softmax(q kᵀ / sqrt(D)) v of (B, Lq, C) and (B, L, C): (B, Lq, C)."""
        queries, keys, values = (attn.head_to_batch_dim(x, out_dim=4) for x in (q, k, v))
        look = ((queries * attn.scale) @ keys.transpose(-1, -2)).softmax(-1)
        self.looks.append((q, look))
        return (look @ values).transpose(1, 2).flatten(2)


def watch_words(unet: UNet2DConditionModel) -> list[Look]:
    """Let the layers that look at words append to the list returned what they ask and where they look."""
    looks: list[Look] = []
    for layer in readers(unet):
        layer.set_processor(Watching(looks))
    return looks


def readers(unet: UNet2DConditionModel) -> list[Attention]:
    """List the layers that look at words, in the order of the data, in which the middle comes before what goes up."""
    parts = (unet.down_blocks, unet.mid_block, unet.up_blocks)
    layers = (layer for part in parts for name, layer in part.named_modules() if name.endswith("attn2"))
    return [layer for layer in layers if isinstance(layer, Attention)]


def name_tokens(tokenizer: CLIPTokenizer, texts: list[tuple[str, dict[int, str]]]) -> tuple[Tensor, Tensor]:
    """Mark the tokens that name each object, and those of them that tell it from the others: two of (B, K, L), bool.

    All of them tell it apart, unless the name ends in a place: then it is the last word alone. What comes before cannot
    know of it, as tokens look at those before them only; two balls are one to all words but "left" and "right".
    """
    names = torch.zeros(len(texts), MAX_OBJECTS, tokenizer.model_max_length, dtype=torch.bool)
    telling = torch.zeros_like(names)
    for n, (text, parts) in enumerate(texts):
        for k, name in parts.items():
            before = text.index(name)
            after = before + len(name)
            told = after - len(name.split()[-1]) if name.endswith(PLACES) else before
            start, last, stop = (1 + len(tokenizer.tokenize(text[:end])) for end in (before, told, after))
            names[n, k, start:stop] = telling[n, k, last:stop] = True  # after the start token
    return names, telling


def facts(scene: Scene, seen: list[int], flip: bool) -> Tensor:
    """Tell of each object its shape, its place among its like and its colour, as numbers: (K, 3), int64.

    Args:
        scene: of the picture.
        seen: the objects that can be seen; of others all is `UNKNOWN`, as is a place among one or among four.
        flip: whether the picture is the scene's mirror image.
    """
    told = torch.full((MAX_OBJECTS, 3), UNKNOWN)
    for k in seen:
        place = place_among(scene, k, group_of(scene, k, seen))
        side = PLACES.index(place) if place else UNKNOWN
        side = len(PLACES) - 1 - side if flip and place else side
        colour = list(COLOURS).index(scene.skins[k].colour)
        told[k] = torch.tensor([SHAPES.index(scene.bodies[k].shape), side, colour])
    return told


def at_places(places: Tensor, count: int, of_object: Tensor) -> Tensor:
    """Say at each of a layer's places something of the object there.

    Args:
        places: (B, h, w), int64, 0 or the number of the object there, from 1.
        count: Lq, of the layer.
        of_object: (B, K + 1, n), what to say where there is no object, and of each.

    Returns:
        (B, Lq, n).
    """
    step = math.isqrt(places[0].numel() // count)
    here = places[:, step // 2 :: step, step // 2 :: step].flatten(1)
    return of_object.gather(1, here[:, :, None].expand(-1, -1, of_object.shape[2]))


def looking_loss(looks: list[Look], places: Tensor, tokens: Tensor) -> Tensor:
    """Ask half of the heads that an object's places look at the words that tell it from the others.

    Args:
        looks: of each layer.
        places: (B, h, w), int64, 0 or the number of the object there, from 1.
        tokens: (B, K, L), bool, the tokens that tell each object from the others.

    Returns:
        The mean of -log(share of attention on them), float, over the places of named objects.
    """
    named = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1).float()
    losses = []
    for _, look in looks:
        wanted = at_places(places, look.shape[2], named)
        share = (look[:, : (look.shape[1] + 1) // 2].float().mean(1) * wanted).sum(2)
        known = wanted.any(2)
        losses.append(-((share + 1e-4).log() * known).sum() / known.sum().clamp(min=1))
    return torch.stack(losses).mean()


class Guesses(nn.Module):
    """Linear layers that guess facts; they are trained beside the networks and thrown away after.

    Args:
        unet: whose queries to words are to tell shape and place.
        width: channels of the text encoder's result, which is to tell colours.
    """

    def __init__(self, unet: UNet2DConditionModel, width: int) -> None:
        super().__init__()
        self.things = nn.ModuleList(
            nn.Linear(layer.to_q.out_features, len(SHAPES) + len(PLACES)) for layer in readers(unet)
        )
        self.colours = nn.Linear(width, len(COLOURS))

    def forward(
        self, looks: list[Look], context: Tensor, places: Tensor, tokens: Tensor, told: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cross-entropies of the guesses: shape and place from queries, colour from words.

        Args:
            looks: of each layer.
            context: (B, L, width), the text encoder's result.
            places: (B, h, w), int64, 0 or the number of the object there, from 1.
            tokens: (B, K, L), bool, the tokens that name each object.
            told: (B, K, 3), int64, of each picture what `facts` returns.
        """
        known = torch.cat([torch.full_like(told[:, :1], UNKNOWN), told], 1)
        shapes, sides = [], []
        for layer, (queries, _) in zip(self.things, looks, strict=True):
            truth = at_places(places, queries.shape[1], known)
            shape, side = layer(queries.float()).split((len(SHAPES), len(PLACES)), 2)
            shapes.append(cross_entropy(shape, truth[:, :, 0]))
            sides.append(cross_entropy(side, truth[:, :, 1]))
        # the article comes first, when nothing is known yet
        after_article = tokens & tokens.roll(1, 2)
        named = torch.where(after_article, told[:, :, 2:], UNKNOWN).amax(1)
        colour = cross_entropy(self.colours(context.float()), named)
        return torch.stack(shapes).mean(), torch.stack(sides).mean(), colour


def cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """Compare scores (B, n, classes) with classes (B, n), where they are known; 0 where none is."""
    known = (truth != UNKNOWN).sum().clamp(min=1)
    return F.cross_entropy(scores.flatten(0, 1), truth.flatten(), ignore_index=UNKNOWN, reduction="sum") / known
