"""Measure the solvers on the bundled model, and write the tables of docs/schedulers.md and docs/schedulers.png.

    python scripts/schedulers.py [names] [errors] [times] [sheet]

Without arguments everything is measured, in some 15 minutes on two cores; else only what is named. The words of the
page stay; its tables are between marks. Needs the extra "schedulers", and diffusers for the times.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import depthdiff
from depthdiff import DDIMScheduler, StableDiffusionDepth2ImgPipeline
from depthdiff.image import contact_sheet
from depthdiff.registry import make_scheduler
from depthdiff.schedulers.names import SHORT_NAMES

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts" / "mini"))
from evaluate import GUIDANCE, Evaluation  # noqa: E402

PAGE = ROOT / "docs" / "schedulers.md"
SHEET = ROOT / "docs" / "schedulers.png"
MODEL = ROOT / "weights" / "mini"
PROMPT = "a golden sphere and a blue cube, at sunset"
CALLS = (5, 10, 20, 50)
SCENES, REFERENCE, STEPS = 3, 1000, 50
TRAILING = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True, "skip_prk_steps": True}
LINSPACE = {**TRAILING, "timestep_spacing": "linspace"}
ORDER_3 = {**TRAILING, "solver_order": 3}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNDM": ("pndm", TRAILING),
    "DDIM": ("ddim", TRAILING),
    "Euler": ("euler", TRAILING),
    "Euler Karras": ("euler", {**LINSPACE, "use_karras_sigmas": True}),
    "LMS": ("lms", TRAILING),
    "LMS Karras": ("lms", {**LINSPACE, "use_karras_sigmas": True}),
    "Heun": ("heun", TRAILING),
    "Heun Karras": ("heun", {**LINSPACE, "use_karras_sigmas": True}),
    "DPM2": ("dpm2", TRAILING),
    "DPM2 Karras": ("dpm2", {**LINSPACE, "use_karras_sigmas": True}),
    "DPM++ 2M": ("dpmpp_2m", TRAILING),
    "DPM++ 2M Karras": ("dpmpp_2m", {**LINSPACE, "use_karras_sigmas": True}),
    "DPM++ 3M": ("dpmpp_2m", ORDER_3),
    "DPM++ 3M, `fix_order=True`": ("dpmpp_2m", {**ORDER_3, "fix_order": True}),
    "DPM++ 2S": ("dpmpp_2s", TRAILING),
    "DEIS": ("deis", TRAILING),
    "UniPC": ("unipc", TRAILING),
    "SA-Solver, tau 0": ("sa_solver", {**TRAILING, "tau_func": lambda timestep: 0.0}),
    "TCD, eta 0": ("tcd", TRAILING),
    "DDIM, leading, offset 1": ("ddim", {"set_alpha_to_one": False}),
}
"""Row of the table of errors -> short name, and settings that replace those of the bundled model."""

COMFY = dict.fromkeys(("ddim", "ddpm", "lms", "euler", "heun", "deis", "lcm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde"))
COMFY = {name: name for name in COMFY} | {"euler_a": "euler_ancestral", "dpm2": "dpm_2", "dpm2_a": "dpm_2_ancestral"}
COMFY |= {"pndm": "ipndm (related)", "unipc": "uni_pc_bh2", "sa_solver": "sa_solver"}
"""Short name -> ComfyUI's."""

STOCHASTIC = dict.fromkeys(("ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde", "dpmpp_sde", "lcm"), "yes")
STOCHASTIC |= {"ddim": "with `eta`", "tcd": "with `eta`", "sa_solver": "timesteps 200 to 800"}
"""Short name -> whether noise is added on the way."""


def build(name: str, settings: dict[str, Any]) -> Any:
    """Build a solver from the bundled model's config."""
    config = DDIMScheduler.load_config(MODEL, subfolder="scheduler")
    base = make_scheduler(name, config)
    fields = depthdiff.config.constructor_fields(type(base))
    return type(base).from_config(base.config, **{key: value for key, value in settings.items() if key in fields})


def steps_for(name: str, calls: int) -> int:
    """Return the most steps that at most `calls` calls of the UNet allow."""
    order = getattr(depthdiff, SHORT_NAMES[name].kind).order
    return (calls + 1) // 2 if order == 2 else calls - 1 if name == "pndm" else calls


class Runner:
    """The inputs of some scenes, prepared once, and a plain loop over a plan."""

    def __init__(self) -> None:
        evaluation = Evaluation(MODEL, SCENES)
        self.pipe = evaluation.pipe
        photos = evaluation.photos(evaluation.shown)
        noise = torch.Generator().manual_seed(0)
        run = self.pipe.prepare(evaluation.captions, photos, strength=1.0, guidance_scale=GUIDANCE, generator=noise)
        self.prompt_embeds, self.depth = run.prompt_embeds, run.depth
        pixels = self.pipe.image_processor.preprocess(photos)
        with torch.no_grad():
            self.clean = self.pipe.vae.encode(pixels).latent_dist.mode() * self.pipe.vae.config.scaling_factor
        self.noise = torch.randn(self.clean.shape, generator=noise)

    @torch.no_grad()
    def paint(self, scheduler: Any, steps: int, calls: int) -> Tensor:
        """Run a plan from the same noise: (SCENES, 4, h, w)."""
        plan = scheduler.plan(steps)
        if len(plan) > calls:
            raise SystemExit(f"{type(scheduler).__name__} takes {len(plan)} calls for {steps} steps, more than {calls}")
        latents, state = plan.add_noise(self.clean, self.noise), plan.init_state()
        for index in range(len(plan)):
            inputs = plan.scale_model_input(latents, index).repeat(2, 1, 1, 1)
            inputs = torch.cat([inputs, self.depth], dim=1)
            output = self.pipe.unet(inputs, plan.timesteps[index], encoder_hidden_states=self.prompt_embeds).sample
            negative, positive = output.chunk(2)
            latents, _, state = plan.step(negative + GUIDANCE * (positive - negative), index, latents, state)
        return latents


RUNNER: list[Runner] = []
"""Of a worker process."""


def work(row: str, calls: int) -> Tensor:
    """Do one run in a worker process."""
    if not RUNNER:
        torch.set_num_threads(1)
        RUNNER.append(Runner())
    name, settings = SOLVERS[row]
    begin = time.perf_counter()
    latents = RUNNER[0].paint(build(name, settings), steps_for(name, calls), calls)
    print(f"{row}, {calls} calls: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return latents


def errors() -> list[str]:
    """Measure the distance of every ordinary solver's final latents from the reference's."""
    pairs = [("DDIM", REFERENCE), *((row, calls) for calls in CALLS[::-1] for row in SOLVERS)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = dict(zip(pairs, pool.map(work, *zip(*pairs, strict=True)), strict=True))
    expected = found["DDIM", REFERENCE]
    lines = [f"| calls of the UNet | {' | '.join(map(str, CALLS))} |", f"|---|{'---|' * len(CALLS)}"]
    for row in SOLVERS:
        relative = [(found[row, calls] - expected).flatten(1).norm(dim=1) for calls in CALLS]
        shares = [median((one / expected.flatten(1).norm(dim=1)).tolist()) for one in relative]
        lines.append(f"| {row} | {' | '.join(f'{share:.3f}' for share in shares)} |")
    return lines


def seconds(*functions: Callable[[], Any]) -> list[float]:
    """Time functions in turn: the median of each."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(31):
        for function, times in zip(functions, taken, strict=True):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return [median(times) for times in taken]


def step_times(ours: Any, published: Any, eta: float) -> list[float]:
    """Time a plan's step, our `step` and diffusers' in turn, at every step of a run: the median of each."""
    sample, output = torch.randn(2, 4, 64, 64), torch.randn(2, 4, 64, 64)
    taken: list[list[float]] = [[], [], []]
    for _ in range(7):
        plan, states = ours.plan(STEPS, eta=eta), [None]
        states[0] = plan.init_state()
        for scheduler in (ours, published):
            scheduler.set_timesteps(STEPS)
            scheduler.scale_model_input(sample, scheduler.timesteps[0])
        for index, timestep in enumerate(ours.timesteps):
            functions = (
                lambda i=index, p=plan, s=states: s.__setitem__(0, p.step(output, i, sample, s[0]).state),
                lambda t=timestep: ours.step(output, t, sample),
                lambda t=published.timesteps[index]: published.step(output, t, sample),
            )
            for function, times in zip(functions, taken, strict=True):
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
    return [median(times) for times in taken]


def times() -> list[str]:
    """Time plans and steps beside diffusers'."""
    import diffusers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [
        "| solver | `plan(50)` / `set_timesteps(50)`, ms | ratio | `plan.step` / diffusers' `step`, µs | ratio "
        "| our `step`, ratio | plan and steps, ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, solver in SHORT_NAMES.items():
        ours = build(name, {"skip_prk_steps": True})
        settings = {key: value for key, value in ours.config.items() if not key.startswith("_")}
        published = getattr(diffusers, solver.kind).from_config(settings)
        eta = 0.3 if name == "tcd" else 0.0
        plan, start = seconds(lambda s=ours, e=eta: s.plan(STEPS, eta=e), lambda s=published: s.set_timesteps(STEPS))
        step, contract, theirs = step_times(ours, published, eta)
        run = (plan + STEPS * step) / (start + STEPS * theirs)
        cells = [name, f"{plan * 1e3:.2f} / {start * 1e3:.2f}", f"{plan / start:.2f}"]
        cells += [f"{step * 1e6:.0f} / {theirs * 1e6:.0f}", f"{step / theirs:.2f}", f"{contract / theirs:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{run:.2f}'])} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def sheet() -> list[str]:
    """Draw one scene by every solver at ten calls, and by DDIM at fifty."""
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    photo = Image.open(ROOT / "docs" / "scene.png").convert("RGB")
    config, tiles = pipe.scheduler.config, {"photo": photo}
    for name, calls in (("ddim", 50), *((name, 10) for name in SHORT_NAMES)):
        pipe.scheduler = make_scheduler(name, {**config, "skip_prk_steps": True})
        tiles[f"{name}, {calls}"] = pipe(
            PROMPT,
            photo,
            strength=1.0,
            num_inference_steps=steps_for(name, calls),
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    pictures = [tile.resize((160, 160), Image.Resampling.BICUBIC) for tile in tiles.values()]
    labels = [*tiles]
    rows = [contact_sheet(pictures[i : i + 5], labels[i : i + 5]) for i in range(0, len(pictures), 5)]
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        whole.paste(row, (0, i * row.height))
    whole.quantize(256).save(SHEET, optimize=True)
    return ["![Every solver at ten calls of the UNet](schedulers.png)"]


def names() -> list[str]:
    """List every solver under all its names."""
    lines = ["| name | class | A1111 | ComfyUI | calls a step | noise | `--karras` |", "|---|---|---|---|---|---|---|"]
    for name, solver in SHORT_NAMES.items():
        kind = getattr(depthdiff, solver.kind)
        karras = "use_karras_sigmas" in depthdiff.config.constructor_fields(kind)
        cells = [f"`{name}`", f"`{solver.kind}`", solver.others[0] if solver.others else "", COMFY.get(name, "")]
        cells += [str(kind.order), STOCHASTIC.get(name, ""), "yes" if karras else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parts: dict[str, Callable[[], list[str]]] = {"names": names, "errors": errors, "times": times, "sheet": sheet}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"out of {', '.join(parts)}; all if none is named")
    chosen = parser.parse_args().parts or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"PART must be one of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    for part in chosen:
        lines = parts[part]()
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(f"<!-- {part} -->\n")
        after = rest.split(f"<!-- end of {part} -->\n")[1]
        table = "\n".join(["<!-- " + part + " -->", *lines, f"<!-- end of {part} -->", ""])
        PAGE.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
