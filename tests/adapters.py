"""Random adapters in every spelling, written from the layouts' descriptions and not by the code that reads them."""

import torch


def linear_layers(unet, text_encoder):
    """List (component, published name, weight) of attention and feed-forward layers of diffusers' own networks."""
    for component, network, ends in (
        ("unet", unet, ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")),
        ("text_encoder", text_encoder, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    ):
        for name, module in network.named_modules():
            if name.endswith(ends) and hasattr(module, "weight"):
                yield component, name, module.weight


def conv_layers(unet):
    """List those of 3x3 convolutions."""
    for name, module in unet.named_modules():
        if name.endswith(("conv1", "conv2", "conv_shortcut", "samplers.0.conv", "conv_in", "conv_out")):
            yield "unet", name, module.weight


def pairs(layers, rank, seed=0, strength=0.1):
    """Give every layer a random (down, up), convolutions with the kernel in down."""
    generator = torch.Generator().manual_seed(seed)
    for component, name, weight in layers:
        o, i, *kernel = weight.shape
        down = torch.randn(rank, i, *kernel, generator=generator) * (i**-0.5)
        up = torch.randn(o, rank, *[1] * len(kernel), generator=generator) * strength
        yield component, name, down, up


def old(component, name):
    """Spell a layer as diffusers did before 0.22: attention layers inside a processor."""
    head, _, last = name.rpartition(".")
    if name.endswith("to_out.0"):
        head, last = name.removesuffix(".to_out.0"), "to_out"
    if component == "text_encoder":
        last = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[last]
        return f"{head}.{last}_lora"
    return f"{head}.processor.{last}_lora"


SPELLINGS = {
    "attn processor, no prefix": lambda c, n, p: f"{old(c, n)}.{p}.weight",
    "attn processor, prefix": lambda c, n, p: f"{c}.{old(c, n)}.{p}.weight",
    "lora.down": lambda c, n, p: f"{c}.{n}.{'lora' if c == 'unet' else 'lora_linear_layer'}.{p}.weight",
    "lora_A": lambda c, n, p: f"{c}.{n}.lora_{'A' if p == 'down' else 'B'}.weight",
    "raw PEFT": lambda c, n, p: f"base_model.model.{n}.lora_{'A' if p == 'down' else 'B'}.weight",
    "kohya": lambda c, n, p: f"lora_{'unet' if c == 'unet' else 'te'}_{n.replace('.', '_')}.lora_{p}.weight",
}


def spell(spelling, rows):
    """Write (component, name, down, up) rows as a file's tensors."""
    write = SPELLINGS[spelling]
    state = {}
    for component, name, down, up in rows:
        state[write(component, name, "down")] = down
        state[write(component, name, "up")] = up
    return state
