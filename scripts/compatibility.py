"""Write docs/compatibility.md: what diffusers and transformers publish about these classes, and what is here.

python scripts/compatibility.py [--check]

Names, keys and arguments are read from the installed packages by introspection, and of diffusers 0.26.3 from the list
that `scripts/published.py` made. Only the reasons for what differs are written by hand; a name or an argument without
one ends the script with an error. With --check nothing is written, and the status is 1 where the page would change.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from published import CLASSES, SPECIAL, installed

import depthdiff
from depthdiff import arguments
from depthdiff.checkpoint.hub import HUB_ARGUMENTS

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
OLD = Path(__file__).with_name("published_0.26.3.json")
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
TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (12,) * 4}
TEXT = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}


def because(reason: str, *names: str) -> dict[str, str]:
    """Give one reason for several names."""
    return dict.fromkeys(names, reason)


ABSENT = {
    **because("nothing is uploaded; use huggingface_hub with a saved folder", "push_to_hub"),
    **because("elsewhere: an attribute of each pipeline, not of the class", "name_or_path"),
    **because("a layout of weights that no checkpoint here has", "fuse_qkv_projections", "unfuse_qkv_projections"),
    **because("old keys are translated when weights are loaded", "convert_state_dict_legacy_attn_format"),
    **because("IP-Adapter needs an image encoder that this pipeline lacks", "get_aug_embed",
              "process_encoder_hidden_states"),
    **because("a pipeline's config is its list of components; from_pretrained and save_pretrained read and write it",
              "from_config", "load_config", "register_to_config", "save_config", "to_json_file", "to_json_string",
              "has_compatibles", "ignore_for_config"),
    **because("call load_config and from_config", "get_config_dict", "extract_init_dict"),
    **because("call from_pretrained, which downloads", "download"),
    **because("no code of a repository is run", "register_for_auto_class"),
    **because("call set_adapters with weights by component, such as {'text_encoder': 0.0}",
              "disable_lora_for_text_encoder", "enable_lora_for_text_encoder", "set_adapters_for_text_encoder"),
    **because("inside of the LoRA loader; load_lora_weights and save_lora_weights do it", "load_lora_into_text_encoder",
              "load_lora_into_transformer", "load_lora_into_unet", "lora_state_dict", "pack_weights",
              "write_lora_layers", "transformer_name", "text_encoder_name", "unet_name"),
    **because("adapters are merged, and move with their network; load_lora_weights(hotswap=True) replaces one",
              "set_lora_device", "enable_lora_hotswap"),
    **because("call enable_xformers_memory_efficient_attention", "set_use_memory_efficient_attention_xformers"),
    **because("one device holds the pipeline", "hf_device_map", "reset_device_map", "enable_parallelism"),
    **because("offloading is whole (enable_model_cpu_offload) or by layer (enable_sequential_cpu_offload)",
              "enable_group_offload"),
    **because("call depthdiff.fast.compile", "compile_repeated_blocks"),
    **because("call set_attention or set_attn_processor", "set_attention_backend", "reset_attention_backend"),
    **because("there are no kernels for NPU and XLA", "disable_npu_flash_attention", "disable_xla_flash_attention",
              "enable_npu_flash_attention", "enable_xla_flash_attention", "set_use_npu_flash_attention",
              "set_use_xla_flash_attention"),
    **because("weights are not loaded quantized", "dequantize"),
    **because("a part of a step; read `advance` of the plan, and `depthdiff.schedulers.exponential`",
              "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update",
              "multistep_dpm_solver_third_order_update", "singlestep_dpm_solver_second_order_update",
              "singlestep_dpm_solver_third_order_update", "singlestep_dpm_solver_update", "deis_first_order_update",
              "multistep_deis_second_order_update", "multistep_deis_third_order_update", "multistep_uni_c_bh_update",
              "multistep_uni_p_bh_update", "get_coefficients_exponential_negative", "lagrange_polynomial_coefficient",
              "get_coefficients_exponential_positive", "get_coefficients_fn", "stochastic_adams_bashforth_update",
              "stochastic_adams_moulton_update"),
    **because("it is `boundary_scalings` of `depthdiff.schedulers.lcm`",
              "get_scalings_for_boundary_condition_discrete"),
    **because("for flow matching, which no network here does", "stretch_shift_to_terminal", "time_shift"),
}  # fmt: skip
"""Public names that are not here -> why, or what to call."""

BETTER = {
    "from_pretrained": "strict; memory-mapped without accelerate; of a pickle nothing but tensors is read",
    "from_single_file": "loads depth-to-image files, which diffusers 0.42.1 cannot for this pipeline",
    "save_pretrained": "all or nothing, also when the process is killed; other files of the folder stay",
    "load_lora_weights": "all or nothing; LoCon, LoHa, LoKr and DoRA as well; merged, so that a step costs the same",
    "load_textual_inversion": "all or nothing",
    "enable_model_cpu_offload": "without accelerate; device may be any",
    "enable_sequential_cpu_offload": "without accelerate",
    "save_lora_weights": "refuses keys that no loader reads",
}
"""Public names that do more here -> what."""

ELSEWHERE = {
    "device": "same",
    "dtype": "same",
    "torch_device": "renamed `device`",
    "torch_dtype": "renamed `dtype`",
    "scaling_factor": "for an autoencoder",
    "timestep": "by position; it does not count",
    "sigmas": "call `plan(sigmas=...)`; diffusers takes them for flow matching alone",
    "set_alpha_to_zero": "the old name of `set_alpha_to_one`",
    "silence_dtype_warnings": "accepted: there are no such warnings",
    "pretrained_model_link_or_path_or_dict": "a file, as first argument; `load_state_dict` takes tensors",
}
"""Arguments that are taken without being a parameter -> how."""
HANDLINGS = {
    "from_single_file": arguments.SINGLE_FILE,
    "from_pipe": arguments.SHARING,
    "from_config": arguments.SETTINGS,
    "load_config": arguments.HUB | arguments.CONFIGS,
    "__call__": arguments.CALL,
} | dict.fromkeys(("save_pretrained", "save_config"), arguments.SAVING)
HANDLINGS |= dict.fromkeys(
    ("load_lora_weights", "load_textual_inversion", "load_lora_adapter", "load_attn_procs"), arguments.ADAPTER
)
TAKES_HUB = ("from_pretrained", "from_single_file", "load_config", "load_lora_adapter", "load_attn_procs")


def networks() -> dict[str, tuple[Any, Any]]:
    """Build ours and the published one of each network, from the same seed."""
    made = {}
    for name, settings in (("UNet2DConditionModel", UNET), ("AutoencoderKL", VAE), ("AutoencoderTiny", TINY)):
        pair = []
        for package in (depthdiff, diffusers):
            torch.manual_seed(0)
            pair.append(getattr(package, name)(**settings))
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
    here, published_arguments = parameters(ours.forward), parameters(theirs.forward)
    kept = [argument for argument in published_arguments if argument in here]
    counts = [(same, others), (len(mine.keys() & published.keys()), published), (equal, published)]
    counts.append((len(kept), published_arguments))
    return f"| `{name}` | " + " | ".join(f"{found} of {len(every)}" for found, every in counts) + " |"


def parameters(function: Any) -> list[str]:
    """List the parameters of a function by name."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, one in inspect.signature(function).parameters.items() if one.kind not in kinds]


def listed(names: Iterable[str]) -> str:
    """Write names as code, in order."""
    return ", ".join(f"`{name}`" for name in sorted(names))


def versions(name: str, old: Iterable[str], new: Iterable[str]) -> str:
    """Return the versions that have a name, where not both do."""
    return "" if name in old and name in new else (" (0.26.3)" if name in old else f" ({diffusers.__version__})")


def name_rows(kind: str, old: list[str], new: list[str]) -> list[str]:
    """Write the verdict on each public name of a class: same, better or refused."""
    ours = getattr(depthdiff, kind)
    every = sorted({*old, *new})
    better = [name for name in every if hasattr(ours, name) and name in BETTER]
    same = [name for name in every if hasattr(ours, name) and name not in BETTER]
    rows = [f"| same | {', '.join(f'`{name}`{versions(name, old, new)}' for name in same)} | |"]
    for name in better:
        how = "strict" if name == "from_pretrained" and kind.endswith("Scheduler") else BETTER[name]
        rows.append(f"| better | `{name}`{versions(name, old, new)} | {how} |")
    reasons: dict[str, list[str]] = {}
    for name in every:
        if not hasattr(ours, name):
            if name not in ABSENT:
                raise SystemExit(f"{kind}.{name} is published and not here, and scripts/compatibility.py has no reason")
            reasons.setdefault(ABSENT[name], []).append(f"`{name}`{versions(name, old, new)}")
    return rows + [f"| refused | {', '.join(names)} | {reason} |" for reason, names in reasons.items()]


def handlings_of(kind: str, method: str) -> dict[str, arguments.Handling]:
    """Return what becomes of the arguments that a method has no parameter for."""
    if method == "from_pretrained":
        loading = {"StableDiffusionDepth2ImgPipeline": arguments.PIPELINE}
        return loading.get(kind, arguments.NO_WEIGHTS if kind.endswith("Scheduler") else arguments.WEIGHTS)
    return HANDLINGS.get(method, {})


def argument_verdicts(kind: str, method: str, published: list[str]) -> dict[str, str]:
    """Return what becomes of each argument of a published method: "same", or a text."""
    function = getattr(getattr(depthdiff, kind), method)
    here = parameters(function) if callable(function) else []
    handlings, verdicts = handlings_of(kind, method), {}
    for name in published:
        if name in here or (method in TAKES_HUB and name in HUB_ARGUMENTS):
            verdicts[name] = "same"
        elif name in handlings:
            what, says = handlings[name]
            verdicts[name] = f"renamed `{says}`" if what == "renamed" else f"{what}: {says}"
        elif method == "load_attn_procs" and name in parameters(getattr(depthdiff, kind).load_lora_adapter):
            verdicts[name] = "same"
        elif name in ELSEWHERE:
            verdicts[name] = ELSEWHERE[name]
        else:
            raise SystemExit(f"{kind}.{method}({name}=) is published and not here, and there is no reason")
    return verdicts


def argument_rows(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Write a row for each published method: how many arguments are the same, and what becomes of the others."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for kind in CLASSES:
        before, now = old[kind]["arguments"], new[kind]["arguments"]
        for method in sorted({*before, *now}, key=lambda name: (name not in SPECIAL, name)):
            if not hasattr(getattr(depthdiff, kind), method):
                continue
            given = list(dict.fromkeys([*now.get(method, []), *before.get(method, [])]))
            verdicts = argument_verdicts(kind, method, given)
            same = [name for name, verdict in verdicts.items() if verdict == "same"]
            texts: dict[str, list[str]] = {}
            for name, verdict in verdicts.items():
                if verdict != "same":
                    texts.setdefault(verdict, []).append(name)
            others = "; ".join(f"{listed(names)}: {text}" for text, names in texts.items())
            tables.setdefault((method, f"{len(same)} of {len(given)}", others), []).append(kind)
    return [
        f"| `{method}` of {listed(kinds)} | {counts} | {others} |"
        for (method, counts, others), kinds in tables.items()
        if others
    ] + [f"| every other method, {sum(len(kinds) for (*_, others), kinds in tables.items() if not others)} | all | |"]


SUITES = """
## diffusers' own tests

The tests of diffusers 0.42.1 for these classes, run with our classes put in the place of its own: 713 pass of the 843
that pass there: 592 of 670 of the schedulers, 121 of 173 of UNet, autoencoder, blocks, attention and the pipeline with
stand-ins for files of the Hub. Four of the pipeline's tests compare with stored pixels that the stand-ins do not reach;
both packages miss them by the same amounts, to 1e-6. This table is written by hand, from runs on 28 November 2026. What
is left, by cause:

| tests | cause |
|---|---|
| 29 | blocks and layers of other networks: SimpleCrossAttn, Skip, AttnSkip and Resnet blocks, `scale_shift`, \
FIR kernels, adaptive norms, transposed convolutions; refused by name |
| 20 | `trained_betas` must be as many as `num_train_timesteps` here |
| 20 | `_deprecated_kwargs`, a private list |
| 20 | saving a scheduler adds `_class_name` to its config in diffusers; here it changes nothing |
| 10 | `_keep_in_fp32_modules`, a private switch of classes; \
cast what must stay in float32 with `torch_dtype` by component |
| 8 | schedulers of the DPM family are stepped at a timestep that the run does not have, which counts as its last one \
there; refused |
| 5 | `beta_end=2`, with which nothing is left of the picture |
| 4 | IP-Adapter and custom diffusion: other conditions |
| 3 | UNets with class embeddings or levels of unequal depth; refused by name |
| 5 | an error of another text, or a folder where only some networks have the variant: refused, and named |
| 2 | flow matching |
| 3 | `variance_type="other"` and an argument that a constructor drops, refused; equal timesteps, kept |
| 1 | reads the source of the class from diffusers' folder |
"""


def page() -> str:
    """Write the page."""
    pairs = networks()
    old, new = json.loads(OLD.read_text(encoding="utf-8")), installed(diffusers)
    lines = [
        "# Compatibility",
        "",
        f"Written by `scripts/compatibility.py` from diffusers {diffusers.__version__} and 0.26.3 and transformers "
        f"{transformers.__version__};",
        "`tests/parity` and `tests/field` compare what these names do. Where we differ on purpose is in",
        "[differences.md](differences.md).",
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
        "Of both versions of diffusers; a version in brackets is the only one with that name.",
    ]
    for kind in CLASSES:
        rows = name_rows(kind, old[kind]["names"], new[kind]["names"])
        lines += ["", f"### {kind}", "", "| here | names | how, or why not |", "|---|---|---|", *rows]
    lines += [
        "",
        "## Arguments",
        "",
        "Of every method that is here, in both versions, with what is taken out of `**kwargs`. An argument is the",
        "same; renamed, with a warning; ignored, with a warning that says what happens instead (None and False are",
        "dropped silently); or refused with a remedy. A word that neither version knows is refused, and the nearest",
        "known one is suggested.",
        "",
        "| method | same | others |",
        "|---|---|---|",
        *argument_rows(old, new),
        "",
        "A call also accepts these arguments of other pipelines, which diffusers 0.26.3 drops silently:",
        "",
        *(f"- `{name}`: {handling.kind}: {handling.says}" for name, handling in arguments.CALL.items()),
        "",
        "Loaders of tokenizers, preprocessors and schedulers also accept these:",
        listed(name for name in arguments.NO_WEIGHTS if name not in arguments.HUB) + ".",
        "Schedulers accept the settings of other schedulers, with a warning.",
    ]
    return "\n".join(lines) + "\n" + SUITES


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
