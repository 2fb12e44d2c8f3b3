"""Arguments of diffusers that count for something else here, or for nothing: renamed, ignored and said, or refused."""

import inspect
import warnings

import pytest
import torch
from random_checkpoint import build_pipeline
from safetensors.torch import load_file

from depthdiff import (
    AutoencoderKL,
    CLIPTokenizer,
    DDIMScheduler,
    DPTImageProcessor,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
    arguments,
    convert,
)
from depthdiff.checks import read_device_map


def load_pipeline(folder, pipe, tmp_path, **options):
    return StableDiffusionDepth2ImgPipeline.from_pretrained(folder, **options)


def load_unet(folder, pipe, tmp_path, **options):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options)


def load_scheduler(folder, pipe, tmp_path, **options):
    return DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **options)


def load_tokenizer(folder, pipe, tmp_path, **options):
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", **options)


def load_preprocessor(folder, pipe, tmp_path, **options):
    return DPTImageProcessor.from_pretrained(folder, subfolder="feature_extractor", **options)


def load_adapter(folder, pipe, tmp_path, **options):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipe.unet.get_submodule(name)
    state = {f"unet.{name}.lora_A.weight": torch.zeros(2, layer.in_features)}
    state[f"unet.{name}.lora_B.weight"] = torch.zeros(layer.out_features, 2)
    pipe.load_lora_weights(state, **options)


def learn_word(folder, pipe, tmp_path, **options):
    word = f"<cup{len(pipe.tokenizer)}>"
    pipe.load_textual_inversion({word: torch.zeros(pipe.text_encoder.config.hidden_size)}, **options)


def single_file(folder):
    """Write the checkpoint as one file, once for all tests."""
    file = folder.parent / "one.safetensors"
    if not file.exists():
        convert.to_single_file(folder, file)
    return file


def load_one_file(folder, pipe, tmp_path, **options):
    options = options if "config_file" in options else {"config": folder, **options}
    return StableDiffusionDepth2ImgPipeline.from_single_file(single_file(folder), **options)


def load_network_of_file(folder, pipe, tmp_path, **options):
    options = options if "config_file" in options else {"config": folder, **options}
    return AutoencoderKL.from_single_file(single_file(folder), **options)


def save_pipeline(folder, pipe, tmp_path, **options):
    pipe.save_pretrained(tmp_path / "saved", **options)


def save_unet(folder, pipe, tmp_path, **options):
    pipe.unet.save_pretrained(tmp_path / "saved", **options)


def save_scheduler(folder, pipe, tmp_path, **options):
    pipe.scheduler.save_pretrained(tmp_path / "saved", **options)


def save_tokenizer(folder, pipe, tmp_path, **options):
    pipe.tokenizer.save_pretrained(tmp_path / "saved", **options)


def share(folder, pipe, tmp_path, **options):
    return StableDiffusionDepth2ImgPipeline.from_pipe(pipe, **options)


def configure(folder, pipe, tmp_path, **options):
    return PNDMScheduler.from_config(pipe.scheduler.config, **options)


def read_settings(folder, pipe, tmp_path, **options):
    return DDIMScheduler.load_config(folder, subfolder="scheduler", **options)


def foreign(kind):
    """Select the settings that a scheduler does not have itself."""
    own = inspect.signature(kind.__init__).parameters
    return {name: handling for name, handling in arguments.SETTINGS.items() if name not in own}


DOORS = {
    load_pipeline: arguments.PIPELINE,
    load_unet: arguments.WEIGHTS,
    load_scheduler: arguments.NO_WEIGHTS | foreign(DDIMScheduler),
    load_tokenizer: arguments.NO_WEIGHTS,
    load_preprocessor: arguments.NO_WEIGHTS,
    load_adapter: {name: handling for name, handling in arguments.ADAPTER.items() if name != "use_safetensors"},
    learn_word: {name: handling for name, handling in arguments.ADAPTER.items() if name != "use_safetensors"},
    load_one_file: {name: handling for name, handling in arguments.SINGLE_FILE.items() if name != "config_file"},
    load_network_of_file: {name: handling for name, handling in arguments.SINGLE_FILE.items() if name != "config_file"},
    save_pipeline: arguments.SAVING,
    save_unet: arguments.SAVING,
    save_scheduler: arguments.SAVING,
    save_tokenizer: arguments.SAVING,
    share: arguments.SHARING,
    configure: foreign(PNDMScheduler),
    read_settings: arguments.HUB | arguments.CONFIGS,
}
"""What is called -> the arguments of diffusers that it takes beside its own."""
CASES = [(door, name) for door, handlings in DOORS.items() for name in handlings]
CASES.remove((load_scheduler, "pretrained_model_name_or_path"))  # its own argument


def value_of(name):
    return "secret" if name == "use_auth_token" else {"http": "localhost:1"} if name == "proxies" else True


@pytest.fixture(scope="module")
def used():
    """One pipeline for all: each call loads, saves or adds, and asks nothing of what came before."""
    return build_pipeline("tiny")


@pytest.mark.parametrize(("door", "name"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_every_argument_is_handled(door, name, tiny_folder, used, tmp_path):
    kind, says = DOORS[door][name]
    if kind == "refused":
        with pytest.raises(ValueError, match=name) as caught:
            door(tiny_folder, used, tmp_path, **{name: value_of(name)})
        assert says in str(caught.value)
        assert not list(tmp_path.iterdir()), "nothing was written"
    else:
        with pytest.warns((UserWarning, FutureWarning), match=name) as found:
            door(tiny_folder, used, tmp_path, **{name: value_of(name)})
        ours = [one for one in found if says in str(one.message)]
        assert len(ours) == 1, "one warning, that says what happens"
        assert ours[0].filename == __file__, "at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        door(tiny_folder, used, tmp_path / "second", **{name: None})


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_unknown_words_are_refused_with_the_nearest(door, tiny_folder, used, tmp_path):
    known = next(iter(DOORS[door]))
    with pytest.raises(TypeError, match=f"unknown argument '{known}x'; did you mean '{known}'"):
        door(tiny_folder, used, tmp_path, **{f"{known}x": 1})
    with pytest.raises(TypeError, match=r"unknown argument 'qqqqqqqq'$"):
        door(tiny_folder, used, tmp_path, qqqqqqqq=None)


@pytest.mark.parametrize("name", arguments.CALL)
def test_words_of_other_pipelines_in_a_call(name, pipe, small_photo):
    options = {"num_inference_steps": 2, "output_type": "np"}
    expected = pipe("a cup", small_photo, generator=torch.manual_seed(0), **options).images
    with pytest.warns(UserWarning, match=f"ignores {name}: ") as found:
        images = pipe("a cup", small_photo, generator=torch.manual_seed(0), **{name: 512}, **options).images
    assert found[0].filename == __file__
    assert (images == expected).all()


def test_numpy_is_an_old_name_of_np(pipe, small_photo):
    options = {"num_inference_steps": 2}
    images = [
        pipe("a cup", small_photo, generator=torch.manual_seed(0), output_type=kind, **options).images
        for kind in ("np", "numpy")
    ]
    assert (images[0] == images[1]).all()


def test_an_old_name_beside_the_new_one_is_refused(tiny_folder):
    with pytest.raises(TypeError, match="both token and use_auth_token"):
        UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet", token="x", use_auth_token="y")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), {"": "cpu"}, {"unet": "cpu", "vae": "cpu"}])
def test_a_device_map_that_names_a_device(device, tiny_folder):
    assert StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, device_map=device).device.type == "cpu"
    assert UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet", device_map=device).device.type == "cpu"


@pytest.mark.parametrize("name", ["auto", "balanced", "sequential"])
def test_a_device_map_that_names_the_best_device(name, tiny_folder):
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert StableDiffusionDepth2ImgPipeline.from_pretrained(tiny_folder, device_map=name).device.type == best


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"unet": "cpu", "vae": "cuda"}, ValueError, "device_map must name one device, which holds all weights, got 2"),
        ("gpu", ValueError, "device_map must be a device"),
        ("meta", ValueError, "device_map must be a device that computes"),
        (2.5, TypeError, "device_map must be a device"),
    ],
)
def test_other_device_maps_are_refused_before_anything_is_read(value, error, message, tmp_path):
    with pytest.raises(error, match=message):
        StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "missing", device_map=value)


@pytest.mark.parametrize("word", ["torch_dtype", "dtype"])
def test_dtypes_by_name_and_by_component(word, tiny_folder):
    load = StableDiffusionDepth2ImgPipeline.from_pretrained
    for value in ("float16", "torch.float16", torch.float16):
        assert {network.dtype for network in load(tiny_folder, **{word: value}).networks.values()} == {torch.float16}
        network = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet", **{word: value})
        assert network.dtype == torch.float16
    pipe = load(tiny_folder, **{word: {"default": "bfloat16", "vae": torch.float32}})
    dtypes = {name: network.dtype for name, network in pipe.networks.items()}
    assert dtypes.pop("vae") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"torch_dtype must have entries for .* got 'unett'; did you mean 'unet'"):
        load(tiny_folder, **{word: {"unett": torch.float16}})
    with pytest.raises(ValueError, match=r"torch_dtype must be a floating-point torch dtype.*'float17'"):
        load(tiny_folder, **{word: "float17"})


def test_weights_in_memory_of_the_process(tiny_folder, tmp_path):
    """Under another name: a file that changes afterwards does not matter."""
    pipe = build_pipeline("tiny")
    pipe.unet.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, disable_mmap=True)
    expected = {key: value.clone() for key, value in unet.state_dict().items()}
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4000, 2)
        stream.write(bytes(4000))
    assert all(torch.equal(value, expected[key]) for key, value in unet.state_dict().items())


def test_what_single_files_take(tiny_folder):
    file, load = single_file(tiny_folder), StableDiffusionDepth2ImgPipeline.from_single_file
    pipe = load(file, config=tiny_folder, scheduler_type="ddim", scaling_factor=0.5, device_map="cpu")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.vae.config.scaling_factor == 0.5
    with pytest.raises(ValueError, match=r"scheduler_type must be one of pndm, .* got 'eulr'; did you mean 'euler'"):
        load(file, config=tiny_folder, scheduler_type="eulr")
    assert load(file, config=tiny_folder, scheduler_type="DPM++ 2M Karras").scheduler.config.use_karras_sigmas
    with pytest.raises(ValueError, match="give one of them"):
        load(file, config=tiny_folder, scheduler_type="ddim", scheduler=PNDMScheduler())
    vae = AutoencoderKL.from_single_file(file, config=tiny_folder, scaling_factor=0.5, device="cpu", dtype="float16")
    assert (vae.config.scaling_factor, vae.dtype) == (0.5, torch.float16)
    with pytest.warns(FutureWarning, match="config_file is the old name of config"):
        AutoencoderKL.from_single_file(file, config_file=tiny_folder)
    with pytest.raises(TypeError, match="unknown argument 'scaling_factor'"):
        UNet2DConditionModel.from_single_file(file, config=tiny_folder, scaling_factor=0.5)


def test_what_loading_says(tiny_folder):
    unet, info = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet", output_loading_info=True)
    assert isinstance(unet, UNet2DConditionModel)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


def test_only_the_main_process_saves(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    pipe.unet.save_pretrained(tmp_path / "a", True, None, True, "fp16")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    }
    pipe.save_pretrained(tmp_path / "b", push_to_hub=False, max_shard_size=None)
    assert load_file(tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors")


def test_settings_of_other_schedulers(pipe):
    """As a menu of schedulers passes them to all; what a scheduler has counts."""
    with pytest.warns(UserWarning, match="from_config ignores algorithm_type: it is a setting of other schedulers"):
        made = LMSDiscreteScheduler.from_config(
            pipe.scheduler.config, use_karras_sigmas=True, algorithm_type="dpmsolver++"
        )
    assert made.config.use_karras_sigmas is True
    made, unused = LMSDiscreteScheduler.from_config(pipe.scheduler.config, return_unused_kwargs=True, anything=1)
    assert unused["anything"] == 1


def test_sharing_components_with_another_dtype(pipe):
    made = StableDiffusionDepth2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert made.unet is pipe.unet
    assert {network.dtype for network in made.networks.values()} == {torch.bfloat16}


def test_old_names_beside_the_new_ones_at_every_loader(tiny_folder, pipe):
    """Neither is dropped silently."""
    load = StableDiffusionDepth2ImgPipeline
    old = {"token": "a", "use_auth_token": "b"}
    for call in (
        lambda: load.from_pretrained(tiny_folder, **old),
        lambda: load.from_single_file(single_file(tiny_folder), config=tiny_folder, **old),
        lambda: load.from_single_file(single_file(tiny_folder), config=tiny_folder, config_file=tiny_folder),
        lambda: load_adapter(tiny_folder, pipe, None, **old),
        lambda: learn_word(tiny_folder, pipe, None, hf_token="a", use_auth_token="b"),
        lambda: load_tokenizer(tiny_folder, pipe, None, **old),
        lambda: load_preprocessor(tiny_folder, pipe, None, **old),
        lambda: load_scheduler(tiny_folder, pipe, None, **old),
        lambda: read_settings(tiny_folder, pipe, None, return_unused_kwargs=True, **old),
    ):
        with pytest.raises(TypeError, match="got both"):
            call()


def test_a_scaling_factor_leaves_a_vae_that_is_given(tiny_folder, pipe):
    with pytest.raises(ValueError, match="scaling_factor and vae both say"):
        StableDiffusionDepth2ImgPipeline.from_single_file(single_file(tiny_folder), vae=pipe.vae, scaling_factor=0.5)
    assert pipe.vae.config.scaling_factor != 0.5


def test_moving_by_old_names(pipe):
    assert pipe.to(torch_device="cpu", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to(device="cpu", dtype=torch.float32, silence_dtype_warnings=True).dtype == torch.float32


def test_the_number_of_a_device():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device_map must be one that exists here, got cuda:0"):
            read_device_map({"": 0})
    with pytest.raises(TypeError, match="device_map must be a device"):
        read_device_map({"": [0]})
    with pytest.raises(TypeError, match="device_map must be a device"):
        read_device_map(True)


def test_unfusing_names_its_own_flag(pipe):
    with pytest.raises(TypeError, match="unfuse_unet must be True or False"):
        pipe.unfuse_lora(unfuse_unet="x")


def test_one_component_is_fused(pipe, tiny_folder):
    load_adapter(tiny_folder, pipe, None)
    pipe.fuse_lora(fuse_unet=False)
    assert not any(pipe._adapters.fused.get("unet", ()))
    with pytest.raises(TypeError, match="pipeline must be one, with components, got int 3"):
        StableDiffusionDepth2ImgPipeline.from_pipe(3)


def test_every_setting_of_every_scheduler_is_known():
    """Of the installed diffusers: no menu of schedulers passes a word that is refused."""
    diffusers = pytest.importorskip("diffusers")
    for kind in diffusers.DDIMScheduler().compatibles:
        parameters = inspect.signature(kind.__init__).parameters.values()
        names = [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        for ours in (DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler):
            fields = inspect.signature(ours.__init__).parameters
            unknown = {
                name for name in names if name != "self" and name not in fields and name not in arguments.SETTINGS
            }
            assert not unknown, f"{kind.__name__}: {unknown}"
