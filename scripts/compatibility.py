"""Write docs/compatibility.md: what diffusers and transformers publish about these classes, and what is here.

python scripts/compatibility.py [--check]

Names, keys and arguments are read from the installed packages by introspection; nothing is listed by hand but the
reasons for what is absent. With --check nothing is written, and the status is 1 where the page would change.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import depthdiff

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
UNET = {
    "in_channels": 5,
    "block_out_channels": (32, 64, 96, 96),
    "norm_num_groups": 8,
    "cross_attention_dim": 40,
    "attention_head_dim": (2, 4, 6, 6),
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (16, 32, 48, 48),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
TEXT = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
ABSENT = {
    "name_or_path": "an attribute of each pipeline here, not of the class",
    "push_to_hub": "nothing is uploaded; use huggingface_hub with a saved folder",
    "fuse_qkv_projections": "a layout of weights that no checkpoint here has",
    "unfuse_qkv_projections": "a layout of weights that no checkpoint here has",
    "set_attn_processor_ip_adapter": "IP-Adapter needs an image encoder that this pipeline lacks",
    "load_ip_adapter": "IP-Adapter needs an image encoder that this pipeline lacks",
}
ABSENT |= dict.fromkeys(
    ("load_lora_into_text_encoder", "load_lora_into_unet", "lora_state_dict", "pack_weights", "write_lora_layers",
     "set_lora_device", "enable_lora_hotswap", "text_encoder_name", "unet_name"), "inside of diffusers' LoRA loader"
)  # fmt: skip
ABSENT |= dict.fromkeys(
    ("extract_init_dict", "get_config_dict", "has_compatibles", "ignore_for_config", "from_config", "load_config",
     "register_to_config", "save_config", "to_json_file", "to_json_string", "register_for_auto_class", "download"),
    "inside of diffusers' base classes",
)  # fmt: skip
ABSENT |= dict.fromkeys(("get_aug_embed", "process_encoder_hidden_states"), "conditions of other UNets")
ABSENT |= {"set_use_memory_efficient_attention_xformers": "call `enable_xformers_memory_efficient_attention`"}
NOTE = "offloading in groups, other devices and back ends of attention, quantization, parallelism: not offered"


def networks() -> dict[str, tuple[Any, Any]]:
    """Build ours and the published one of each network, from the same seed."""
    made = {}
    for name, ours, theirs in (
        ("UNet2DConditionModel", depthdiff.UNet2DConditionModel, diffusers.UNet2DConditionModel),
        ("AutoencoderKL", depthdiff.AutoencoderKL, diffusers.AutoencoderKL),
    ):
        settings = UNET if name.startswith("UNet") else VAE
        pair = []
        for kind in (ours, theirs):
            torch.manual_seed(0)
            pair.append(kind(**settings))
        made[name] = tuple(pair)
    torch.manual_seed(0)
    text = depthdiff.CLIPTextModel(depthdiff.CLIPTextConfig(**TEXT))
    torch.manual_seed(0)
    made["CLIPTextModel"] = text, transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    return made


def without_level(key: str) -> str:
    """Drop the level that transformers 5 has dropped."""
    return key.removeprefix("text_model.")


def network_row(name: str, ours: Any, theirs: Any) -> str:
    """Compare the trees and the first weights of a network."""
    mine = {without_level(key): value for key, value in ours.state_dict().items()}
    published = theirs.state_dict()
    equal = sum(key in mine and torch.equal(mine[key], value) for key, value in published.items())
    tree = [(key, module) for key, module in ours.named_modules() if key != "text_model"]
    modules = {without_level(key): type(module).__name__ for key, module in tree}
    others = {key: type(module).__name__ for key, module in theirs.named_modules()}
    same = sum(modules.get(key) == kind for key, kind in others.items())
    forward = arguments(ours.forward), arguments(theirs.forward)
    kept = [argument for argument in forward[1] if argument in forward[0]]
    counts = [(same, others), (len(mine.keys() & published.keys()), published), (equal, published)]
    counts.append((len(kept), forward[1]))
    return f"| `{name}` | " + " | ".join(f"{found} of {len(every)}" for found, every in counts) + " |"


def arguments(function: Any) -> list[str]:
    """List the arguments of a function by name."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, one in inspect.signature(function).parameters.items() if one.kind not in kinds]


def public_names(thing: Any) -> set[str]:
    """List the public names of a class, beside those of every torch module and dict."""
    plain = set(dir(torch.nn.Module)) | set(dir(dict)) | set(dir(object))
    return {name for name in dir(thing) if not name.startswith("_")} - plain


def name_row(name: str, ours: Any, theirs: Any) -> tuple[str, list[str]]:
    """Compare the public names of two classes: a row, and what is absent here."""
    published = public_names(theirs)
    missing = sorted(published - public_names(ours))
    return f"| `{name}` | {len(published)} | {len(published) - len(missing)} |", missing


def page() -> str:
    """Write the page."""
    pairs = networks()
    lines = [
        "# Compatibility",
        "",
        f"Written by `scripts/compatibility.py` from diffusers {diffusers.__version__} and transformers "
        f"{transformers.__version__};",
        "`tests/parity` compares what these names do.",
        "",
        "## Networks",
        "",
        "What agrees with the published classes, at a small geometry; first weights after `torch.manual_seed(0)`.",
        "",
        "| network | modules, path and class | weights, key | first weights | `forward` arguments |",
        "|---|---|---|---|---|",
        *(network_row(name, *pair) for name, pair in pairs.items()),
        "",
        "The text encoder has the `text_model` level of transformers 4, where adapters and research code look for",
        "its layers; both spellings of keys load. `embeddings`, `encoder` and `final_layer_norm` are properties.",
        "The inside of the depth net has names of its own.",
        "",
        "## Public names",
        "",
        "| class | published | here |",
        "|---|---|---|",
    ]
    classes = {name: (type(ours), type(theirs)) for name, (ours, theirs) in pairs.items() if name != "CLIPTextModel"}
    for name in ("StableDiffusionDepth2ImgPipeline", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"):
        classes[name] = getattr(depthdiff, name), getattr(diffusers, name)
    absent = []
    for name, pair in classes.items():
        row, missing = name_row(name, *pair)
        lines.append(row)
        absent.append((name, missing))
    lines += ["", "Absent:", ""]
    for name, missing in absent:
        reasons: dict[str, list[str]] = {}
        for one in missing:
            reasons.setdefault(ABSENT.get(one, NOTE), []).append(f"`{one}`")
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        lines.append(f"- {name}: {text or 'nothing'}.")
    lines += ["", "## Arguments", "", "| call | published | here | extra here |", "|---|---|---|---|"]
    ours, theirs = (one.StableDiffusionDepth2ImgPipeline for one in (depthdiff, diffusers))
    calls = [
        ("__call__", ours.__call__, theirs.__call__),
        *(
            (method, getattr(ours, method), getattr(theirs, method))
            for method in ("check_inputs", "encode_prompt", "prepare_depth_map", "get_timesteps", "prepare_latents")
        ),
    ]
    for name, mine, other in calls:
        published, here = arguments(other), arguments(mine)
        extra = [f"`{one}`" for one in here if one not in published]
        lines.append(f"| `{name}` | {len(published)} | {len(set(published) & set(here))} | {', '.join(extra)} |")
    lines += ["", "Where we differ on purpose is in [differences.md](differences.md)."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page would change")
    options = parser.parse_args()
    text = page()
    if options.check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
