"""What a version of diffusers publishes about the classes that are here: public names, and arguments of methods.

python scripts/published.py FOLDER > scripts/published_0.26.3.json     # FOLDER: the unpacked package `diffusers`

The code of an old version is parsed, not run, since its requirements clash with those of the newest. Only names and
arguments are kept. Besides parameters, what a method takes out of its `**kwargs` by name counts as an argument.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch

CLASSES = (
    *("StableDiffusionDepth2ImgPipeline", "UNet2DConditionModel", "AutoencoderKL"),
    *("DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "DDPMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    *("LCMScheduler", "TCDScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
)
COMMON = set(dir(torch.nn.Module)) | set(dir(dict)) | set(dir(object))
"""Names that every torch module or dict has."""
TAKEN = re.compile(r'(?<!\w)kwargs\.(?:pop|get)\(\s*"([a-z]\w*)"')
SPECIAL = ("__init__", "__call__", "forward")
Published = dict[str, dict[str, Any]]


def installed(package: Any) -> Published:
    """Read an installed package by introspection."""
    found: Published = {}
    for name in CLASSES:
        kind = getattr(package, name)
        names = sorted(one for one in dir(kind) if not one.startswith("_") and one not in COMMON)
        methods = {}
        for method in (*SPECIAL, *names):
            function = getattr(kind, method, None)
            if inspect.isroutine(function) and getattr(function, "__module__", "").startswith(package.__name__):
                every = inspect.signature(function).parameters.values()
                plain = [one.name for one in every if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
                methods[method] = merged(plain, inspect.getsource(inspect.unwrap(function)))
        found[name] = {"names": names, "arguments": methods}
    return found


def merged(parameters: list[str], source: str) -> list[str]:
    """Add what is taken out of `**kwargs` to the parameters of a method, without its owner."""
    every = [*parameters, *sorted(set(TAKEN.findall(source)))]
    return [name for name in dict.fromkeys(every) if name not in ("self", "cls", "kwargs")]


def parsed(folder: Path) -> Published:
    """Read the classes from the source of a package that is not installed."""
    classes: dict[str, tuple[ast.ClassDef, str]] = {}
    for path in sorted(folder.rglob("*.py")):
        if "dummy" in path.name or "flax" in path.name:
            continue
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name not in [getattr(base, "id", "") for base in node.bases]:
                classes.setdefault(node.name, (node, source))
    found: Published = {}
    for name in CLASSES:
        names: set[str] = set()
        methods: dict[str, list[str]] = {}
        waiting = [name]
        while waiting:
            if (entry := classes.get(waiting.pop(0))) is None:
                continue
            node, source = entry
            waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name in SPECIAL):
                    names |= set() if child.name in SPECIAL else {child.name}
                    parameters = [one.arg for one in (*child.args.args, *child.args.kwonlyargs)]
                    text = ast.get_source_segment(source, child) or ""
                    methods.setdefault(child.name, merged(parameters, text))
                elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                    targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                    names |= {one.id for one in targets if isinstance(one, ast.Name) and not one.id.startswith("_")}
        found[name] = {"names": sorted(names - COMMON), "arguments": dict(sorted(methods.items()))}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(json.dumps(parsed(parser.parse_args().folder), indent=1, sort_keys=True))
