"""Which layer, and which of its tensors, a key of an adapter file means; every spelling goes back to the same tables.

unet.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight            diffusers
down_blocks.0.attentions.0...attn1.processor.to_q_lora.down.weight    diffusers, before 0.22
base_model.model.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight  PEFT
lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight  kohya and LyCORIS
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

COMPONENTS = ("unet", "text_encoder")
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
OLD_TEXT_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"(?:\.lora_linear_layer|\.lora|_lora)\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.default)?\.weight"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|(?:\.lora)?\.(?P<own>alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_\w+|lokr_\w+)"
    r")"
)
PARTS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
"""Names of a tensor that have another here."""


def split_key(key: str) -> tuple[str, str] | None:
    """Cut a key into the spelling of its layer and the name of the tensor; None where it is no adapter's key."""
    found = KEY.fullmatch(key)
    if found is None:
        return None
    layer, *names = found.groups()
    name = next(name for name in names if name is not None)
    return layer.replace(".processor.", "."), PARTS.get(name, name)


def is_kohya(key: str) -> bool:
    """Return whether a key is in kohya's form, with dots turned to underscores."""
    return key.startswith(tuple(prefix for prefixes in KOHYA.values() for prefix in prefixes))


def layer_names(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """List every spelling of every layer that an adapter may change.

    Args:
        networks: by component, those of COMPONENTS.

    Returns:
        Spelling -> component, our module path.
    """
    names: dict[str, tuple[str, str]] = {}
    for component, network in networks.items():
        for key, _ in network.named_parameters():
            if not key.endswith(".weight") or "_embedding.weight" in key:
                continue
            layer = key.removesuffix(".weight")
            for spelling in spellings(component, layer):
                names[spelling] = component, layer
    return names


def spellings(component: str, published: str) -> Iterator[str]:
    """List the spellings of a published layer name."""
    variants = {published, published.removeprefix("text_model.")}
    if component == "unet":
        variants.add(re.sub(r"\.to_out\.0$", ".to_out", published))
    else:
        *_, last = published.split(".")
        if last in OLD_TEXT_NAMES:
            variants |= {variant.removesuffix(last) + OLD_TEXT_NAMES[last] for variant in set(variants)}
    for variant in variants:
        for prefix in ("", f"{component}.", "base_model.model.", f"{component}.base_model.model."):
            yield prefix + variant
        for prefix in KOHYA[component]:
            yield prefix + variant.replace(".", "_")
