"""What is called, with which arguments: one function a kind of case, from its number to a call that can be made."""

import inspect
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_checkpoint import GEOMETRIES, SCHEDULER, load_tokenizer

import depthdiff
from depthdiff import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    DPTForDepthEstimation,
    DPTImageProcessor,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)
from depthdiff.config import constructor_fields
from tests.fuzz.values import ODD


def picture():
    return Image.new("RGB", (24, 16), "brown")


def generator():
    return torch.Generator().manual_seed(0)


def nothing(*arguments):
    return None


def returning(value):
    """Make a callback that returns a value."""
    return lambda *arguments: value


def setting(value):
    """Make a callback that sets the guidance scale."""

    def callback(pipe, index, timestep, tensors):
        pipe._guidance_scale = value
        return tensors

    return callback


def writing(name, value):
    """Make a callback that replaces one tensor."""
    return lambda pipe, index, timestep, tensors: {name: value}


GOOD = {
    "prompt": (lambda: "a toy", lambda: ["a toy", "a cube"], lambda: ""),
    "image": (
        picture,
        lambda: [picture(), picture()],
        lambda: torch.rand(1, 3, 16, 24),
        lambda: np.zeros((16, 24, 3), dtype=np.uint8),
        lambda: np.random.default_rng(0).random((2, 16, 24, 3)),
    ),
    "depth_map": (lambda: None, lambda: torch.rand(16, 24), lambda: Image.new("I;16", (24, 16)), lambda: np.eye(16)),
    "strength": (lambda: 0.5, lambda: 1, lambda: 0.0, lambda: np.float32(0.5), lambda: torch.tensor(0.5)),
    "num_inference_steps": (lambda: 2, lambda: np.int64(2), lambda: torch.tensor(1), lambda: 1),
    "guidance_scale": (lambda: 1, lambda: 3.0, lambda: np.float64(2), lambda: np.array(2)),
    "negative_prompt": (lambda: None, lambda: "bad", lambda: ["bad"]),
    "num_images_per_prompt": (lambda: 1, lambda: 2, lambda: np.int8(1)),
    "eta": (lambda: 0, lambda: 0.5, lambda: np.float16(1)),
    "generator": (generator, lambda: [generator()], lambda: None),
    "prompt_embeds": (lambda: None,),
    "negative_prompt_embeds": (lambda: None, lambda: torch.randn(1, 77, 40)),
    "output_type": (lambda: "pil", lambda: "np", lambda: "pt", lambda: "latent"),
    "return_dict": (lambda: True, lambda: np.bool_(True)),
    "cross_attention_kwargs": (lambda: None, lambda: {}, lambda: {"scale": 0.5}, lambda: {"scale": np.float32(1)}),
    "clip_skip": (lambda: None, lambda: 1, lambda: np.int32(0)),
    "callback_on_step_end": (lambda: None, lambda: nothing, lambda: returning({})),
    "callback_on_step_end_tensor_inputs": (
        lambda: ["latents"],
        lambda: (),
        lambda: ["latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask"],
    ),
    "guidance_interval": (lambda: None, lambda: (0.2, 1), lambda: [np.float32(0), torch.tensor(0.5)]),
    "deep_cache": (lambda: None, lambda: 2, lambda: np.int64(3)),
    "token_merging": (lambda: None, lambda: 0.5),
    "preset": (lambda: None, lambda: "fast"),
    "callback": (lambda: None, lambda: nothing),
    "callback_steps": (lambda: 1, lambda: None),
    "height": (lambda: None, lambda: 16, lambda: np.int64(24)),
    "width": (lambda: None, lambda: 16, lambda: torch.tensor(8)),
    "resize_mode": (lambda: None, lambda: "pad"),
    "start": (lambda: "image", lambda: "noise"),
    "mask_image": (lambda: None, picture, lambda: np.eye(16, dtype=bool), lambda: torch.rand(16, 24)),
    "mask_blur": (lambda: None, lambda: 1, lambda: np.float32(0.5)),
    "mask_content": (lambda: None, lambda: "noise"),
    "depth_invert": (lambda: False, lambda: np.bool_(True), lambda: "flip"),
    "depth_range": (lambda: None, lambda: (0.9, 0.1), lambda: np.array([0.1, 0.9])),
    "depth_normalize": (lambda: "each", lambda: "batch"),
    "depth_keep_aspect": (lambda: False, lambda: True),
    "prompt_syntax": (lambda: None, lambda: "a1111"),
    "seamless": (lambda: False, lambda: True, lambda: "x"),
    "windows": (lambda: None, lambda: (16, 8), lambda: [np.int32(8), 8]),
    "guidance_rescale": (lambda: 0, lambda: 0.5, lambda: np.float16(1)),
    "hires": (lambda: None, lambda: 1.5, lambda: torch.tensor(1)),
    "hires_strength": (lambda: None, lambda: 0.5),
    "preview": (lambda: None, lambda: nothing),
    "preview_steps": (lambda: None, lambda: 1),
    "preview_decoder": (lambda: None,),
}
"""Argument of a call -> what makes values that it takes."""

BEFORE = ("embeds for the prompt", "callback returns", "callback replaces", "callback sets")


def odd(rng):
    """Draw an odd value and its name."""
    name = rng.choice(list(ODD))
    return name, ODD[name]()


def call_case(number):
    """Make the arguments of one call: most of them good, one to three odd, or an odd word of a callback."""
    rng = random.Random(f"call {number}")
    arguments = {name: rng.choice(values)() for name, values in GOOD.items() if rng.random() < 0.5}
    arguments |= {"prompt": "a toy", "num_inference_steps": 2} | arguments
    arguments.setdefault("image", picture())
    told = []
    if rng.random() < 0.2:
        way, (name, value) = rng.choice(BEFORE), odd(rng)
        told.append(f"{way}: {name}")
        if way == "embeds for the prompt":
            arguments |= {"prompt": None, "prompt_embeds": value}
        elif way == "callback returns":
            arguments["callback_on_step_end"] = returning(value)
        elif way == "callback sets":
            arguments["callback_on_step_end"] = setting(value)
        else:
            tensor = rng.choice(["latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask"])
            arguments["callback_on_step_end"] = writing(tensor, value)
            told[-1] += f" as {tensor}"
    while not told or rng.random() < 0.3:
        argument, (name, value) = rng.choice(list(GOOD)), odd(rng)
        arguments[argument] = value
        told.append(f"{argument}={name}")
    return ", ".join(told), lambda pipe: pipe(**arguments)


def lora():
    """Return a small LoRA of the tiny UNet."""
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{stem}.lora_A.weight": torch.randn(2, 32), f"{stem}.lora_B.weight": torch.randn(32, 2)}


def load_lora(pipe, name="a"):
    pipe.load_lora_weights(lora(), name)
    return pipe


WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
NETWORKS = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, DPTForDepthEstimation)
CONFIGS = dict(zip(NETWORKS, ("unet", "vae", "text_encoder", "depth_estimator"), strict=True))
SWITCHES = (
    "to",
    "set_attention",
    "enable_attention_slicing",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_xformers_memory_efficient_attention",
    "set_adapters",
    "delete_adapters",
    "fuse_lora",
    "unfuse_lora",
    "load_lora_weights",
    "load_textual_inversion",
    "unload_textual_inversion",
    "estimate_depth",
    "decode",
    "denoise",
    "progress_bar",
    "load_single_file",
)
PIPELINE_NAMES = StableDiffusionDepth2ImgPipeline.NAMES


def odd_to(rng, name, value):
    keyword = rng.choice([None, "device", "dtype", "non_blocking", "memory_format", "silence_dtype_warnings"])
    if keyword is None:
        return f"to({name})", lambda pipe, folder: pipe.to(value)
    return f"to({keyword}={name})", lambda pipe, folder: pipe.to(**{keyword: value})


def odd_switch(rng, name, value):
    method = rng.choice(SWITCHES)
    if method == "denoise":
        return f"denoise({name})", lambda pipe, folder: list(pipe.denoise(value))
    if method == "progress_bar":
        keyword = rng.choice(["iterable", "total"])
        return f"progress_bar({keyword}={name})", lambda pipe, folder: pipe.progress_bar(**{keyword: value})
    if method == "load_textual_inversion" and rng.random() < 0.5:
        return f"{method}(token={name})", lambda pipe, folder: pipe.load_textual_inversion(torch.randn(40), value)
    if method == "load_lora_weights" and rng.random() < 0.5:
        return f"{method}(adapter_name={name})", lambda pipe, folder: pipe.load_lora_weights(lora(), value)
    if method in ("set_adapters", "fuse_lora") and rng.random() < 0.6:
        if method == "set_adapters":
            return f"{method}(a, {name})", lambda pipe, folder: load_lora(pipe).set_adapters("a", value)
        keyword = rng.choice(["components", "lora_scale", "safe_fusing", "adapter_names"])
        return f"{method}({keyword}={name})", lambda pipe, folder: load_lora(pipe).fuse_lora(**{keyword: value})
    return f"{method}({name})", lambda pipe, folder: getattr(pipe, method)(value)


def odd_bar(rng, name, value):
    keyword = rng.choice(["foo", "disable", "desc", "total", "unit", "file", "ncols", "leave", "mininterval", "ascii",
                          "bar_format", "position", "initial", "iterable", "smoothing", "colour"])  # fmt: skip

    def case(pipe, folder):
        pipe.set_progress_bar_config(**{"disable": True, keyword: value})
        return pipe("a toy", picture(), num_inference_steps=1, strength=1.0)

    return f"set_progress_bar_config({keyword}={name})", case


def odd_load(rng, name, value):
    """A pipeline or network from a folder, with an odd name or option."""
    cls = rng.choice([StableDiffusionDepth2ImgPipeline, *NETWORKS, CLIPTokenizer, DPTImageProcessor, PNDMScheduler])
    folder_of = {
        **CONFIGS,
        CLIPTokenizer: "tokenizer",
        DPTImageProcessor: "feature_extractor",
        PNDMScheduler: "scheduler",
    }
    words = [*WHERE, "name"]
    if cls in NETWORKS or cls is StableDiffusionDepth2ImgPipeline:
        words += ["torch_dtype", "variant", "use_safetensors"]
    if cls is StableDiffusionDepth2ImgPipeline:
        words += [*PIPELINE_NAMES, "dtype", "low_cpu_mem_usage", "foo"]
        words.remove("subfolder")
    word = rng.choice(words)

    def case(pipe, folder):
        options = {} if cls is StableDiffusionDepth2ImgPipeline else {"subfolder": folder_of[cls]}
        if word == "name":
            return cls.from_pretrained(value, **options, local_files_only=True)
        return cls.from_pretrained(folder, **{**options, word: value})

    return f"{cls.__name__}.from_pretrained({word}={name})", case


def odd_single(rng, name, value):
    cls = rng.choice([StableDiffusionDepth2ImgPipeline, UNet2DConditionModel])
    words = ["name", "config", "torch_dtype", "revision", "cache_dir", "token", "local_files_only", "force_download"]
    words += ["prediction_type", "scheduler", "dtype"] if cls is StableDiffusionDepth2ImgPipeline else ["subfolder"]
    word = rng.choice(words)

    def case(pipe, folder):
        path, config = Path(folder).parent / "tiny.safetensors", {"config": folder}
        if word == "name":
            return cls.from_single_file(value, local_files_only=True, **config)
        return cls.from_single_file(path, **{**config, word: value})

    return f"{cls.__name__}.from_single_file({word}={name})", case


def odd_save(rng, name, value):
    part = rng.choice([None, "unet", "tokenizer", "scheduler", "feature_extractor"])
    word = rng.choice(["save_directory", "safe_serialization"]) if part in (None, "unet") else "save_directory"
    if name in ("empty text", "text", "path", "path-like text", "number as text", "long text", "np text"):
        name, value = "true", True  # these name folders here

    def case(pipe, folder):
        saved = pipe if part is None else getattr(pipe, part)
        if word == "save_directory":
            return saved.save_pretrained(value)
        return saved.save_pretrained(Path(folder).parent / "saved", safe_serialization=value)

    return f"{part or 'pipeline'}.save_pretrained({word}={name})", case


def odd_part(rng, name, value):
    part = rng.choice(PIPELINE_NAMES)
    other = rng.random() < 0.2
    stranger = rng.choice([one for one in PIPELINE_NAMES if one != part])

    def case(pipe, folder):
        parts = {**pipe.components, part: pipe.components[stranger] if other else value}
        made = StableDiffusionDepth2ImgPipeline(**parts)
        made.set_progress_bar_config(disable=True)
        return made("a toy", picture(), num_inference_steps=1, strength=1.0)

    return f"pipeline({part}={stranger if other else name})", case


def odd_prepare(rng, name, value):
    word = rng.choice([*list(GOOD)[:9], "lora_scale", "clip_skip", "generator"])
    word = "strength" if word == "num_images_per_prompt" and value is None else word

    def case(pipe, folder):
        arguments = {"prompt": "a toy", "image": picture(), "num_inference_steps": 1, "strength": 1.0, word: value}
        return list(pipe.denoise(pipe.prepare(**arguments)))

    return f"prepare({word}={name})", case


def odd_run(rng, name, value):
    fields = ["scheduler", "timesteps", "latents", "prompt_embeds", "depth", "guidance_scale", "generator", "eta"]
    field = rng.choice([*fields, "cross_attention_kwargs", "approximations"])

    def case(pipe, folder):
        run = pipe.prepare("a toy", picture(), num_inference_steps=2, strength=1.0, guidance_scale=2.0)
        setattr(run, field, value)
        return list(pipe.denoise(run))

    return f"run.{field}={name}", case


def odd_step(rng, name, value):
    solver = rng.choice([PNDMScheduler, DDIMScheduler, LMSDiscreteScheduler])

    def case(pipe, folder):
        pipe.scheduler = solver.from_config(SCHEDULER)
        run = pipe.prepare("a toy", picture(), num_inference_steps=3, strength=1.0)
        for step in pipe.denoise(run):
            step.latents = value
        return pipe.decode(run.latents)

    return f"step.latents={name} ({solver.__name__})", case


def odd_encode(rng, name, value):
    word = rng.choice(["prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt",
                       "prompt_embeds", "negative_prompt_embeds", "lora_scale", "clip_skip"])  # fmt: skip

    def case(pipe, folder):
        prompt = None if word == "prompt_embeds" else "a toy"
        return pipe.encode_prompt(**{"prompt": prompt, word: value})

    return f"encode_prompt({word}={name})", case


def odd_decode(rng, name, value):
    if rng.random() < 0.5:
        return f"decode({name})", lambda pipe, folder: pipe.decode(value, "pt")
    return f"decode(output_type={name})", lambda pipe, folder: pipe.decode(torch.randn(1, 4, 2, 3), value)


def odd_config(rng, name, value):
    cls = rng.choice([*NETWORKS, DPTImageProcessor])
    config = GEOMETRIES["tiny"][CONFIGS[cls]] if cls in CONFIGS else {}
    if rng.random() < 0.2:
        if rng.random() < 0.5:
            return f"{cls.__name__}({name})", lambda pipe, folder: cls(value)
        return f"{cls.__name__}.from_config({name})", lambda pipe, folder: cls.from_config(value)
    made_by = getattr(cls, "config_class", cls)  # which takes the settings one by one
    field = rng.choice(list(constructor_fields(made_by)))
    if rng.random() < 0.5:
        return f"{made_by.__name__}({field}={name})", lambda pipe, folder: made_by(**{**config, field: value})
    return f"{cls.__name__}.from_config({field}={name})", lambda pipe, folder: cls.from_config({**config, field: value})


def odd_tokenizer(rng, name, value):
    method = rng.choice(["__call__", "encode", "tokenize", "decode", "batch_decode", "convert_tokens_to_ids",
                         "convert_ids_to_tokens", "add_words", "remove_words", "option", "construct"])  # fmt: skip
    if method == "option":
        word = rng.choice(["padding", "truncation", "max_length", "return_tensors", "add_special_tokens"])
        return f"tokenizer({word}={name})", lambda pipe, folder: pipe.tokenizer(["a toy", "b"], **{word: value})
    if method == "construct":
        word = rng.choice(["vocab", "merges", "bos_token", "eos_token", "unk_token", "pad_token", "model_max_length",
                           "added_tokens"])  # fmt: skip
        known = load_tokenizer()
        arguments = {"vocab": known.get_vocab(with_added_tokens=False), "merges": known.merges, word: value}
        return f"CLIPTokenizer({word}={name})", lambda pipe, folder: CLIPTokenizer(**arguments)("a toy")
    return f"tokenizer.{method}({name})", lambda pipe, folder: getattr(pipe.tokenizer, method)(value)


def odd_processor(rng, name, value):
    method = rng.choice(["__call__", "return_tensors", "post_process_depth_estimation", "sizes", "output_size"])
    if method == "return_tensors":
        return f"processor({method}={name})", lambda pipe, folder: pipe.feature_extractor(picture(), value)
    if method == "sizes":
        output = depthdiff.models.dpt.DepthEstimatorOutput(torch.rand(1, 4, 4))
        return (
            f"post_process(target_sizes={name})",
            lambda pipe, folder: pipe.feature_extractor.post_process_depth_estimation(output, value),
        )
    if method == "output_size":
        return f"output_size({name}, 5)", lambda pipe, folder: pipe.feature_extractor.output_size(value, 5)
    return f"processor.{method}({name})", lambda pipe, folder: getattr(pipe.feature_extractor, method)(value)


METHODS = (
    odd_to,
    odd_switch,
    odd_switch,
    odd_switch,
    odd_bar,
    odd_load,
    odd_load,
    odd_single,
    odd_save,
    odd_part,
    odd_prepare,
    odd_run,
    odd_step,
    odd_encode,
    odd_decode,
    odd_config,
    odd_config,
    odd_tokenizer,
    odd_tokenizer,
    odd_processor,
)


def method_case(number):
    """Make one call of another method: its name, and a function of a pipeline and a folder that holds one."""
    rng = random.Random(f"method {number}")
    return rng.choice(METHODS)(rng, *odd(rng))


SOLVERS = (PNDMScheduler, DDIMScheduler, LMSDiscreteScheduler)


def settings(rng, cls):
    """Draw good settings of a scheduler, odd ones among them."""
    good = {
        "num_train_timesteps": lambda: rng.choice([10, 100, 1000, np.int64(50)]),
        "beta_start": lambda: rng.choice([0, 0.0001, 0.00085]),
        "beta_end": lambda: rng.choice([0.012, 0.02, 0.9]),
        "beta_schedule": lambda: rng.choice(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "prediction_type": lambda: rng.choice(["epsilon", "v_prediction", "sample"]),
        "timestep_spacing": lambda: rng.choice(["leading", "trailing", "linspace"]),
        "steps_offset": lambda: rng.choice([0, 1]),
        "clip_sample": lambda: rng.choice([True, False]),
        "set_alpha_to_one": lambda: rng.choice([True, False]),
        "thresholding": lambda: rng.choice([True, False]),
        "rescale_betas_zero_snr": lambda: rng.choice([True, False]),
        "use_karras_sigmas": lambda: rng.choice([True, False]),
        "use_exponential_sigmas": lambda: rng.choice([True, False]),
        "fix_start": lambda: rng.choice([True, False]),
        "skip_prk_steps": lambda: rng.choice([True, False]),
        "sample_max_value": lambda: rng.choice([1.0, 2, 0.5]),
        "clip_sample_range": lambda: rng.choice([1.0, 2]),
    }
    names = constructor_fields(cls)
    return {name: make() for name, make in good.items() if name in names and rng.random() < 0.4}


def scheduler_case(number):
    """Make one use of a scheduler: its settings, a plan, a step or the contract of diffusers, something of it odd."""
    rng = random.Random(f"scheduler {number}")
    cls, place = rng.choice(SOLVERS), rng.random() if rng.random() < 0.75 else 1.0
    chosen, (name, value) = settings(rng, cls), odd(rng)
    told, through_config = cls.__name__, rng.random() < 0.5
    if place < 0.4:
        field = rng.choice([*constructor_fields(cls), "foo"])
        chosen[field] = value
        told += f"({field}={name})"
    elif place < 0.45:
        return f"{told}.from_config({name})", lambda: cls.from_config(value)
    contract = rng.random() < 0.5
    words = ["num_inference_steps", "device"] + (["model_output", "timestep", "sample", "generator", "return_dict",
             "use_clipped_model_output", "begin", "timesteps", "original", "eta"] if contract else
             ["strength", "eta", "index", "noise_pred", "latents", "clean", "state"])  # fmt: skip
    word = rng.choice(words) if 0.45 <= place < 1 else None
    if word is not None:
        told += f" {word}={name}"
    if place == 1:
        told += f" {chosen}"
    steps = rng.choice([1, 2, 3, 7, 10])
    eta = rng.choice([0.0, 1.0])

    def given(argument, default):
        return value if argument == word else default

    def plans(scheduler):
        plan = scheduler.plan(given("num_inference_steps", steps), given("strength", 1.0), eta=given("eta", eta),
                              device=given("device", "cpu"))  # fmt: skip
        torch.manual_seed(0)
        latents = plan.add_noise(given("clean", torch.randn(1, 4, 2, 3)), torch.randn(1, 4, 2, 3))
        state = plan.init_state()
        for index in range(len(plan)):
            plan.scale_model_input(latents, index)
            result = plan.step(given("noise_pred", torch.randn(1, 4, 2, 3)), given("index", index),
                               given("latents", latents), given("state", state))  # fmt: skip
            latents, state = result.prev_sample, result.state
        return latents

    taken = inspect.signature(cls.step).parameters

    def contracts(scheduler):
        scheduler.set_timesteps(given("num_inference_steps", steps), device=given("device", "cpu"))
        torch.manual_seed(0)
        sample = torch.randn(1, 4, 2, 3)
        if word == "begin" and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(value)
        if word in ("timesteps", "original"):
            noise, times = torch.randn(1, 4, 2, 3), given("timesteps", scheduler.timesteps[:1])
            if hasattr(scheduler, "get_velocity"):
                scheduler.get_velocity(given("original", sample), noise, times)
            return scheduler.add_noise(given("original", sample), noise, times)
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(given("sample", sample), given("timestep", timestep))
            more = {"eta": eta, "use_clipped_model_output": False, "generator": None, "return_dict": True}
            sample = scheduler.step(
                given("model_output", torch.randn(1, 4, 2, 3)),
                given("timestep", timestep),
                given("sample", sample),
                **{name: given(name, usual) for name, usual in more.items() if name in taken},
            )[0]
        return sample

    spoilt = word in ("noise_pred", "latents", "clean", "model_output", "sample", "original") and name in (
        "nan tensor", "huge tensor", "huge embeds", "both ends", "array of nan", "0-d nan tensor")  # fmt: skip

    def case():
        scheduler = cls.from_config(chosen) if through_config else cls(**chosen)
        result = contracts(scheduler) if contract else plans(scheduler)
        return None if spoilt else result

    return told, case
