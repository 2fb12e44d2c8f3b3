"""The package's public doors on a second device; `test_second_device.py` runs this file in a process of its own.

Everything is compared with the same work on the processor. The device's numbers are the processor's, but its faster
ways are off, so the last digits differ.
"""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoint import GEOMETRIES, build_pipeline, randomize, vae

from depthdiff import (
    AutoencoderKL,
    DDIMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
    fast,
    schedulers,
)
from depthdiff.cli import main
from depthdiff.fast import cuda_graphs
from depthdiff.fast.calls import find
from depthdiff.image import depth_image
from tests import second_device
from tests.adapters import pairs, spell

second_device.install()
ON = torch.device("second", 0)
CLOSE = 1e-4  # of pictures in [0, 1] and of latents; observed: at most 3e-5
QUIET = ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep",
         "UniPCMultistep")  # fmt: skip
SCHEDULERS = {
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}, {}),
    "PNDM, Runge-Kutta": (PNDMScheduler, {"skip_prk_steps": False}, {}),
    "DDIM": (DDIMScheduler, {"clip_sample": False}, {}),
    "DDIM, eta": (DDIMScheduler, {"clip_sample": False}, {"eta": 0.5}),
    "LMS": (LMSDiscreteScheduler, {}, {}),
    "LMS, Karras": (LMSDiscreteScheduler, {"use_karras_sigmas": True}, {}),
    **{name: (getattr(schedulers, f"{name}Scheduler"), {}, {}) for name in QUIET},
}
DRAWING = ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "SASolver", "LCM", "TCD", "DPMSolverSDE")


UNET = {
    **GEOMETRIES["tiny"]["unet"],
    "block_out_channels": [32, 48],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 3],
}


@pytest.fixture(scope="session")
def photo(photo):
    return photo.resize((32, 24))


def build():
    """Build a pipeline that is smaller still than the tiny one: what takes time on this device is an operation."""
    pipe = build_pipeline("tiny")
    unet, autoencoder = UNet2DConditionModel.from_config(UNET), AutoencoderKL.from_config(vae([8, 16], 1, 4, 16))
    for network in (unet, autoencoder):
        randomize(network.eval(), 0)
    return painter(pipe, unet=unet, vae=autoencoder, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))


def painter(pipe, **components):
    """Make a pipeline of the components of another."""
    twin = type(pipe)(**{**pipe.components, **components})
    twin.set_progress_bar_config(disable=True)
    return twin


@pytest.fixture
def pipe():
    return build()


@pytest.fixture(scope="module")
def pair():
    """The same pipeline on the processor and on the device; not to be changed."""
    return build(), build().to(ON)


def seeded(*seeds, device="cpu"):
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def paint(pipe, photo, **arguments):
    arguments = {"image": photo, "num_inference_steps": 2, "strength": 1.0, "generator": seeded(0)[0], **arguments}
    return pipe(**{"prompt": "two tigers", "output_type": "np", **arguments}).images


def latents_of(pipe, photo, **arguments):
    """Run the UNet alone, which is quicker."""
    return numbers(paint(pipe, photo, depth_map=random(48, 64), output_type="latent", **arguments))


def numbers(images):
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images]) / 255
    return images.cpu().numpy() if isinstance(images, torch.Tensor) else images


def agree(ours, expected, limit=CLOSE):
    ours, expected = numbers(ours), numbers(expected)
    assert ours.shape == expected.shape
    assert expected.std() > 1e-3, "a flat picture proves nothing"
    assert np.abs(ours - expected).max() <= limit


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def pixels(photo):
    return torch.from_numpy(np.asarray(photo).astype(np.float32) / 255)


def halves():
    """Make a mask that keeps the left half."""
    mask = np.zeros((48, 64), np.float32)
    mask[:, 32:] = 1
    return mask


def embeds(rows, where):
    return {"prompt_embeds": random(rows, 77, 40).to(where), "negative_prompt_embeds": random(rows, 77, 40).to(where)}


# Each case: the arguments
CASES = {
    "defaults": lambda photo: {},
    "images, negative prompts": lambda photo: {
        "prompt": ["two tigers", "a cup"],
        "image": [photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)],
        "negative_prompt": ["blurry", "dark"],
    },
    "array": lambda photo: {"image": pixels(photo).numpy()},
    "depth map as an array": lambda photo: {"depth_map": random(48, 64).numpy()},
    "no guidance": lambda photo: {"guidance_scale": 1.0},
    "clip_skip": lambda photo: {"clip_skip": 1},
    "PIL output": lambda photo: {"output_type": "pil"},
    "tensor output": lambda photo: {"output_type": "pt"},
    "latent output": lambda photo: {"output_type": "latent"},
    "fast": lambda photo: {"preset": "fast", "num_inference_steps": 4},
    "token merging": lambda photo: {"token_merging": 0.5},
    "callback": lambda photo: {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask"],
    },
    "older callback": lambda photo: {"callback": lambda index, timestep, latents: latents.mul_(0.9)},
    "mask": lambda photo: {"mask_image": halves(), "mask_content": "noise", "num_images_per_prompt": 2},
    "mask, PIL output": lambda photo: {"mask_image": halves(), "start": "noise", "output_type": "pil"},
    "depth alone": lambda photo: {"image": None, "depth_map": random(48, 64).numpy()},
    "distances": lambda photo: {"depth_map": random(48, 64).abs().numpy() + 1, "depth_invert": True},
    "size": lambda photo: {"height": 32, "width": 40, "resize_mode": "pad", "depth_keep_aspect": True},
    "seamless": lambda photo: {"seamless": True},
    "windows": lambda photo: {"windows": (32, 16), "guidance_rescale": 0.5},
    "second pass": lambda photo: {"hires": 1.5, "mask_image": halves()},
    "scales": lambda photo: {"guidance_scale": [2.0, 5.0], "num_images_per_prompt": 2},
    "syntax": lambda photo: {"prompt": "a (red:1.3) cup BREAK [of] tea", "prompt_syntax": "a1111"},
    "preview": lambda photo: {"preview": lambda index, pictures: pictures[0].size, "preview_steps": 1},
}
# The same with tensors or generators on a device `at`
WITH_TENSORS = {
    "tensor": lambda photo, at: {"image": pixels(photo).movedim(2, 0)[None].to(at)},
    "list of tensors": lambda photo, at: {"image": [pixels(photo).movedim(2, 0).to(at)]},
    "latents": lambda photo, at: {"image": random(1, 4, 12, 16).to(at), "depth_map": random(1, 9, 7).to(at)},
    "depth map": lambda photo, at: {"depth_map": random(48, 64).to(at)},
    "embeds": lambda photo, at: {"prompt": None, **embeds(2, at)},
    "embeds without guidance": lambda photo, at: {
        "prompt": None,
        "prompt_embeds": embeds(1, at)["prompt_embeds"],
        "guidance_scale": 1.0,
    },
    "mask": lambda photo, at: {"mask_image": torch.from_numpy(halves()).to(at)},
    "depth alone": lambda photo, at: {"image": None, "depth_map": random(48, 64).to(at)},
    "generator": lambda photo, at: {"generator": seeded(3, device=at)[0]},
    "generators": lambda photo, at: {"generator": seeded(3, device=at) + seeded(4), "num_images_per_prompt": 2},
}


def change(pipeline, index, timestep, tensors):
    """Change everything that a callback may."""
    if index == 1:
        pipeline._guidance_scale = 3.0
    return {name: tensor * 0.9 for name, tensor in tensors.items() if name != "negative_prompt_embeds"}


def compare(pair, photo, given, given_to_the_processor):
    """Paint on both devices; pictures as PIL images may be one grey level apart."""
    images = paint(pair[1], photo, **given)
    limit = 1.01 / 255 if isinstance(images, list) else CLOSE
    agree(images, paint(pair[0], photo, **given_to_the_processor), limit)
    assert not isinstance(images, torch.Tensor) or images.device == ON


@pytest.mark.parametrize("case", CASES)
def test_a_call_paints_the_processors_picture(pair, photo, case):
    compare(pair, photo, CASES[case](photo), CASES[case](photo))


@pytest.mark.parametrize("at", ["cpu", ON], ids=str)
@pytest.mark.parametrize("case", WITH_TENSORS)
def test_tensors_and_generators_may_be_on_either_device(pair, photo, case, at):
    compare(pair, photo, WITH_TENSORS[case](photo, at), WITH_TENSORS[case](photo, "cpu"))


@pytest.mark.parametrize("name", ["PNDM", "DDIM, eta", "LMS"])
def test_every_scheduler_paints_the_processors_picture(pair, photo, name):
    """Also where it draws noise on the way, from a generator of either device."""
    kind, settings, options = SCHEDULERS[name]
    cpu, device = (painter(pipe, scheduler=kind.from_config(pipe.scheduler.config, **settings)) for pipe in pair)
    expected = paint(cpu, photo, num_inference_steps=3, **options)
    for at in ("cpu", ON) if options else ("cpu",):
        agree(paint(device, photo, num_inference_steps=3, generator=seeded(0, device=at)[0], **options), expected)


@pytest.mark.parametrize("name", DRAWING)
def test_solvers_that_draw(name):
    """From a generator of the processor, whose noise is the same on both. Observed: at most 1e-6."""
    ends = []
    for device in ("cpu", ON):
        scheduler = getattr(schedulers, f"{name}Scheduler")()
        scheduler.set_timesteps(6, device=device)
        latents, noise = random(2, 4, 6, 8).to(device), random(2, 4, 6, 8).flip(0).to(device)
        latents = scheduler.add_noise(latents, noise, scheduler.timesteps[:1].repeat(2))
        for timestep in scheduler.timesteps:
            noise_pred = scheduler.scale_model_input(latents, timestep).tanh()
            more = {"generator": seeded(0, device="cpu")[0]}
            latents = scheduler.step(noise_pred, timestep, latents, **more).prev_sample
        assert latents.device.type == torch.device(device).type
        ends.append(latents.cpu())
    assert (ends[0] - ends[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps_on", ["cpu", ON], ids=str)
def test_a_loop_in_diffusers_form(name, steps_on):
    """Observed: equal to the bit."""
    kind, settings, options = SCHEDULERS[name]
    ends = []
    for device, timesteps_on in (("cpu", "cpu"), (ON, steps_on)):
        scheduler = kind(**settings)
        scheduler.set_timesteps(6, device=timesteps_on)
        latents, noise = random(2, 4, 6, 8).to(device), random(2, 4, 6, 8).flip(0).to(device)
        latents = scheduler.add_noise(latents, noise, scheduler.timesteps[:1].repeat(2))
        for timestep in scheduler.timesteps:
            noise_pred = scheduler.scale_model_input(latents, timestep).tanh()
            more = {**options, "generator": seeded(0, device=device)[0]} if options else {}
            latents = scheduler.step(noise_pred, timestep, latents, **more).prev_sample
        assert latents.device.type == torch.device(device).type
        ends.append(latents)
        if hasattr(scheduler, "get_velocity"):
            some = scheduler.timesteps[[1, 3]] if name == "EulerDiscrete" else torch.tensor([5, 7])
            assert scheduler.get_velocity(latents, noise, some).device == latents.device
    agree(*reversed(ends), limit=1e-5)


@pytest.mark.parametrize("at", ["cpu", ON], ids=str)
def test_the_callers_own_loop(pair, photo, at):
    """`prepare`, `denoise` and `decode`, whose latents may have been on the processor in between."""
    pictures = []
    for pipe, where in zip(pair, ("cpu", at), strict=True):
        run = pipe.prepare("two tigers", photo, num_inference_steps=3, generator=seeded(0)[0])
        for step in pipe.denoise(run):
            step.latents = step.latents + 0.01 * step.denoised
        pictures.append(pipe.decode(run.latents.to(where), "np"))
    agree(*reversed(pictures))


def test_parts_of_the_work(pair, photo):
    """Depth and prompts, whose result is where it is asked for."""
    cpu, device = pair
    agree(device.estimate_depth(photo), cpu.estimate_depth(photo))
    agree(device.estimate_depth(pixels(photo).movedim(2, 0)[None].to(ON)), cpu.estimate_depth(photo))
    arguments = {"num_images_per_prompt": 2, "negative_prompt": "blurry", "clip_skip": 1}
    expected = cpu.encode_prompt(["two tigers", "a cup"], **arguments)
    for where in (None, "cpu", ON):
        for ours, theirs in zip(
            device.encode_prompt(["two tigers", "a cup"], where, **arguments), expected, strict=True
        ):
            assert ours.device == torch.device(where or ON)
            agree(ours, theirs)


def test_training_reaches_the_weights(pair):
    """Gradients of the UNet are the processor's. Observed: 9e-7 of the largest one apart."""
    gradients = []
    for pipe in pair:
        unet = copy.deepcopy(pipe.unet)
        sample, context = random(1, 5, 16, 16).to(unet.device), random(1, 7, 40).to(unet.device)
        unet(sample, torch.tensor([500], device=unet.device), context).sample.square().mean().backward()
        gradients.append(unet.conv_in.weight.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-4 * gradients[0].abs().max().item())


# What the host waits for


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNDM", {}),
        ("DDIM", {}),
        ("LMS", {}),
        ("PNDM", {"guidance_scale": 1.0}),
        ("DDIM", {"preset": "fast", "cross_attention_kwargs": {"scale": 0.5}}),
        ("DDIM", {"token_merging": 0.5}),
    ],
    ids=str,
)
def test_no_step_makes_the_host_wait(pair, photo, name, options):
    """But the first, after which the work is looked at."""
    kind, settings, _ = SCHEDULERS[name]
    pipe = painter(pair[1], scheduler=kind.from_config(pair[1].scheduler.config, **settings))
    run = pipe.prepare("two tigers", photo, num_inference_steps=4, strength=1.0, **options)
    steps = pipe.denoise(run)
    with second_device.counting() as waits:
        next(steps)
    assert sum("precision.py" in where for _, where in waits) == 1, "what is counted is what makes the host wait"
    with second_device.counting() as waits:
        assert len(list(steps)) == len(run) - 1 >= 3
    assert not waits


# Switches


@pytest.mark.parametrize("form", ["sdpa", "efficient", "sliced", "math"])
def test_every_form_of_attention(pair, photo, form):
    pair[1].set_attention(form)
    try:
        agree(paint(pair[1], photo), paint(pair[0], photo))
    finally:
        pair[1].set_attention("sdpa")


def test_slicing_and_tiling(pair, photo):
    large = photo.resize((40, 20))
    pictures = []
    for pipe in pair:
        pipe.enable_attention_slicing("max")
        pipe.enable_vae_slicing()
        pipe.enable_vae_tiling()
        pictures.append(paint(pipe, large, num_images_per_prompt=2))
        pipe.disable_attention_slicing()
        pipe.disable_vae_slicing()
        pipe.disable_vae_tiling()
    agree(*reversed(pictures))


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(pipe, photo, how):
    """The networks work on the device, also `decode` alone, and are on the processor afterwards."""
    expected = paint(pipe, photo)
    latents = pipe.prepare("two tigers", photo).latents
    decoded = pipe.decode(latents, "np")
    getattr(pipe, how)(device="second")
    assert pipe.execution_device.type == "second"
    agree(paint(pipe, photo), expected)
    agree(pipe.decode(latents, "np"), decoded)
    pipe.remove_all_hooks()
    assert {parameter.device.type for net in pipe.networks.values() for parameter in net.parameters()} == {"cpu"}
    agree(paint(pipe, photo), expected)


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_a_device_that_does_not_exist(pipe, photo, how):
    """Is refused at once, and nothing has changed."""
    for arguments in ({"device": "second:3"}, {"device": "second", "gpu_id": 3}, {"device": "xpu"}):
        with pytest.raises(ValueError, match="device must be one that exists here, got "):
            getattr(pipe, how)(**arguments)
    assert pipe.execution_device.type == "cpu"
    pipe.to(ON)


def adapt(pipe):
    """Load a LoRA for half of the UNet's attention and for the text encoder's."""
    layers = [
        (part, name, layer.weight)
        for part, ends in (("unet", ("to_q", "to_v")), ("text_encoder", ("q_proj",)))
        for name, layer in getattr(pipe, part).named_modules()
        if name.endswith(ends)
    ]
    pipe.load_lora_weights(spell("lora_A", pairs(layers, 3)), "one")


def test_adapters(photo):
    """Loaded before and after the move, scaled, fused, and taken away."""
    pipes = [build() for _ in range(3)]
    pipes[1].to(ON)
    for pipe in pipes:
        adapt(pipe)
    pipes[2].to(ON)

    def results(pipe):
        yield latents_of(pipe, photo, cross_attention_kwargs={"scale": 0.5})
        pipe.set_adapters("one", 0.3)
        pipe.fuse_lora()
        yield latents_of(pipe, photo)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        yield latents_of(pipe, photo)

    expected = list(results(pipes[0]))
    assert min(np.abs(one - expected[-1]).max() for one in expected[:-1]) > 10 * CLOSE
    for pipe in pipes[1:]:
        for result, wanted in zip(results(pipe), expected, strict=True):
            agree(result, wanted)


def test_learnt_words(pipe):
    vectors = random(2, 40)
    pipe.load_textual_inversion({"<toy>": vectors})
    expected, _ = pipe.encode_prompt("a <toy>")
    pipe.unload_textual_inversion()
    plain, _ = pipe.encode_prompt("a <toy>")
    pipe.to(ON)
    for given in (vectors, vectors.to(ON)):
        pipe.load_textual_inversion({"<toy>": given})
        agree(pipe.encode_prompt("a <toy>")[0], expected)
        pipe.unload_textual_inversion()
        agree(pipe.encode_prompt("a <toy>")[0], plain)


def test_layerwise_casting(pipe, photo):
    """Before and after the move."""
    twin, plain = copy.deepcopy(pipe), latents_of(pipe, photo)
    pipe.unet.enable_layerwise_casting()
    expected = latents_of(pipe, photo)
    assert np.abs(expected - plain).max() > 10 * CLOSE
    agree(latents_of(pipe.to(ON), photo), expected)
    twin.to(ON)
    twin.unet.enable_layerwise_casting()
    agree(latents_of(twin, photo), expected)


def test_saved_and_loaded(pair, photo, tmp_path):
    pair[1].save_pretrained(tmp_path / "folder")
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "folder")
    for name, network in pipe.networks.items():
        for key, weight in getattr(pair[0], name).state_dict().items():
            assert torch.equal(network.state_dict()[key], weight)
    agree(paint(painter(pipe).to(ON), photo), paint(pair[0], photo))


def test_the_command(tiny_folder, photo, tmp_path):
    """`--device`, whose picture is the processor's to one grey level."""
    photo.save(tmp_path / "photo.png")
    pictures = []
    for device in ("cpu", "second"):
        out = tmp_path / f"{device}.png"
        more = ["--steps", "3", "--seed", "1", "--dtype", "float32", "--device", device, "-o", str(out)]
        assert main(["two tigers", str(tmp_path / "photo.png"), "--model", str(tiny_folder), *more]) == 0
        with Image.open(out) as picture:
            pictures.append([picture.copy()])
    agree(*reversed(pictures), limit=1.01 / 255)


# A default device


@pytest.mark.parametrize("name", ["PNDM", "DDIM, eta", "LMS"])
def test_a_scheduler_made_within_a_default_device(pair, photo, name):
    """Its tables are on the processor as ever, and it serves networks on either device."""
    kind, settings, options = SCHEDULERS[name]
    plain = kind.from_config(pair[0].scheduler.config, **settings)
    with torch.device(ON):
        scheduler = kind.from_config(pair[0].scheduler.config, **settings)
        tables = {table: value for table, value in vars(plain).items() if isinstance(value, torch.Tensor)}
        assert {"betas", "alphas_cumprod"} <= tables.keys()
        for table, value in tables.items():
            assert torch.equal(getattr(scheduler, table), value)
    pictures = [paint(painter(pipe, scheduler=scheduler), photo, **options) for pipe in pair]
    agree(*reversed(pictures))


def test_a_call_within_a_default_device(pair, photo):
    for pipe in pair:
        expected = paint(pipe, photo, token_merging=0.5)
        with torch.device(ON):
            agree(paint(pipe, photo, token_merging=0.5), expected)


def test_nothing_on_the_device_is_float64(pair, photo, monkeypatch):
    """As a device without float64 wants it, Apple's for one; with every scheduler."""
    run = second_device.run

    def checked(function, args, kwargs):
        result = run(function, args, kwargs)
        for one in second_device.leaves([result]):
            assert not (second_device.is_ours(one) and one.dtype == torch.float64), function
        return result

    monkeypatch.setattr(second_device, "run", checked)
    for kind, settings, options in (SCHEDULERS[name] for name in ("PNDM", "DDIM, eta", "LMS")):
        pipe = painter(pair[1], scheduler=kind.from_config(pair[1].scheduler.config, **settings))
        paint(pipe, photo, num_inference_steps=1, **options)
    depth_image(pipe.estimate_depth(photo))


# Captured steps


class Replays:
    """Captures on the device as CUDA graphs do."""

    def __init__(self):
        self.records = 0

    def record(self, work, device):
        self.records += 1
        with second_device.Recorder() as recorder:
            output = work()
        return recorder.replay, output


@pytest.fixture
def captured(pipe, monkeypatch):
    """A pipeline on the device whose steps are captured, and what captures them."""
    device = Replays()
    monkeypatch.setattr(cuda_graphs, "record", device.record)
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("second",))
    monkeypatch.setattr(cuda_graphs, "Tensor", second_device.SecondTensor)  # which are its plain tensors
    fast.capture(pipe.to(ON))
    return pipe, device


def uncaptured(pipe, photo, **options):
    """Work without graphs, which are kept."""
    runner = find(pipe.unet, cuda_graphs.CUDAGraphRunner)
    runner.blocked, blocked = (lambda: "not now"), runner.blocked
    try:
        return latents_of(pipe, photo, **options)
    finally:
        runner.blocked = blocked


def test_captured_pictures_are_the_plain_ones(captured, photo):
    """To the bit; a graph, in which nothing may make the host wait, serves other numbers of its kind."""
    pipe, device = captured
    for options in ({}, {"guidance_scale": 1.0}, {"prompt": "a cup", "guidance_scale": 3.0}, {}):
        result = latents_of(pipe, photo, **options)
        assert find(pipe.unet, cuda_graphs.CUDAGraphRunner).reason is None
        assert np.array_equal(result, uncaptured(pipe, photo, **options))
    assert device.records == 2


def doubled(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


CHANGES = {
    "forward": lambda pipe: doubled(pipe.unet.conv_out),
    "eps": lambda pipe: [setattr(m, "eps", 0.3) for m in pipe.unet.modules() if isinstance(m, torch.nn.GroupNorm)],
    "moved": lambda pipe: pipe.to("cpu") and pipe.to(ON),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_ignored_after_the_capture(captured, photo, change):
    pipe, _ = captured
    before = latents_of(pipe, photo)
    CHANGES[change](pipe)
    after = latents_of(pipe, photo)
    assert np.array_equal(after, uncaptured(pipe, photo))
    assert change == "moved" or np.abs(after - before).max() > 10 * CLOSE
