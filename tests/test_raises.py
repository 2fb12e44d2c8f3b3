"""Every error that a docstring announces: each case calls the function itself with what the docstring describes."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from random_checkpoint import build_pipeline, load_tokenizer
from torch import nn

from depthdiff import (
    DDIMScheduler,
    DPTImageProcessor,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    UNet2DConditionModel,
)
from depthdiff.checkpoint import hub, transaction, write
from depthdiff.checks import check_dense, check_names, check_path, check_text
from depthdiff.cli import save_all
from depthdiff.command_checks import check_room
from depthdiff.config import CheckpointError, Config
from depthdiff.fast.compile import compile as compile_pipeline
from depthdiff.fast.cuda_graphs import capture
from depthdiff.fast.tiled import tiled_norm_act_conv
from depthdiff.forks import Workers
from depthdiff.models.attention import Attention
from depthdiff.models.base import ModelMixin, PreTrainedModel
from depthdiff.models.embeddings import TimestepEmbedding, get_activation
from depthdiff.models.levels import resnet_options
from depthdiff.models.transformer import BasicTransformerBlock
from depthdiff.noise import randn
from depthdiff.parts import parse_move
from depthdiff.run import Run, check_run
from depthdiff.schedulers.lms import lms_weights
from depthdiff.schedulers.pndm import pndm_transfer
from depthdiff.schedulers.schedule import make_betas, predict_x0
from depthdiff.turns import Turns

X, Y = torch.randn(2, 4, 6, 8), torch.randn(1, 4, 6, 8)
LAYERS = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 3)}
IDS = {"input_ids": [[1, 2, 3], [4, 5]]}
PLANS = {one: one().plan(4) for one in (DDIMScheduler, PNDMScheduler, LMSDiscreteScheduler)}
SCHEDULERS = tuple(PLANS)
Pipeline = StableDiffusionDepth2ImgPipeline


class Plain(ModelMixin):
    """A network without anything that could be recomputed."""

    def __init__(self) -> None:
        super().__init__()


@dataclasses.dataclass
class Settings(Config):
    """A config of one number."""

    POSITIVE = ("size",)
    CHOICES = {"kind": ("a", "b")}  # noqa: RUF012
    size: int = 3
    kind: str = "a"


class PlainPreTrained(PreTrainedModel):
    """The same, built from a config."""

    config_class = Settings


@pytest.fixture(scope="module")
def pipe():
    """One pipeline for all cases, none of which changes it."""
    return build_pipeline("tiny")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a file where a component may be wanted, and a list of libraries."""
    (tmp_path / "unet").write_text("a file")
    (tmp_path / "maps").write_text("/usr/lib/libgomp.so.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attention() -> Attention:
    return Attention(8, heads=2, dim_head=4)


def conv() -> nn.Conv2d:
    return nn.Conv2d(5, 6, 3, padding=1)


def noisy_run(**changes) -> Run:
    given = {"scheduler": None, "timesteps": X, "num_inference_steps": 1, "latents": X, "prompt_embeds": X, "depth": X}
    return Run(**{**given, "guidance_scale": 1.0, **changes})


def write_into(path: Path | str) -> None:
    with write.writing(path) as file:
        file.write(b"x")


def replace_parts(folder: Path, part: str) -> None:
    """Replace a checkpoint's files where a file has the name of a part."""
    with transaction.replacing(folder, {part: ["config.json"]}):
        raise AssertionError("the block must not be entered")


def without_room(place: Path) -> None:
    """Check the room on a disk that has 10 bytes left."""
    options = argparse.Namespace(size=512, height=None, width=None, hires=None, model=None)
    with mock.patch("shutil.disk_usage", return_value=argparse.Namespace(free=10)):
        check_room(options, [place / "a.png"], 48, 64)


def without_peft(network: nn.Module) -> None:
    with mock.patch.dict("sys.modules", {"peft": None}):
        network.add_adapter(object())


def forked(place: Path) -> None:
    """Begin work where the thread's workers stayed in another process, with GNU OpenMP loaded."""
    workers = Workers()
    workers.process, workers.threads = -1, {threading.get_ident()}
    with mock.patch("depthdiff.forks.MAPS", place / "maps"), mock.patch("torch.get_num_threads", return_value=2):
        workers.enter()


def change_during_a_run() -> None:
    """Change weights while another thread steps through a run."""
    turns = Turns()
    run = turns.use(ends_by_itself=False)
    thread = threading.Thread(target=run.__enter__)
    thread.start()
    thread.join()
    try:
        with turns.change("unload_lora_weights"):
            raise AssertionError("the change must not begin")
    finally:
        run.__exit__(None, None, None)


def change_within_a_call() -> None:
    """Change weights within a call, while another thread's call has not ended."""
    turns = Turns()
    call = turns.use()
    thread = threading.Thread(target=call.__enter__)
    thread.start()
    thread.join()
    try:
        with turns.use(), turns.change("load_lora_weights"):
            raise AssertionError("the change must not begin")
    finally:
        call.__exit__(None, None, None)


CASES = {
    # checks of arguments
    "check_text number": (lambda: check_text("prompt", 3), TypeError, "prompt must be a text or None, got int 3"),
    "check_path number": (lambda: check_path("place", 3), TypeError, "place must be a path or a name, got int 3"),
    "check_path bytes": (lambda: check_path("place", b"x"), TypeError, "place must be a path"),
    "check_path zero": (lambda: check_path("place", "a\0b"), ValueError, "place must be a name that a file can have"),
    "check_path long": (lambda: check_path("place", "a" * 256), ValueError, "place must have names of at most 255"),
    "check_dense meta": (lambda: check_dense("latents", X.to("meta")), TypeError, "latents must be .*meta device"),
    "check_dense sparse": (lambda: check_dense("latents", X.to_sparse()), TypeError, "latents must be .*to_dense"),
    "check_dense nested": (
        lambda: check_dense("latents", torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)),
        TypeError,
        "latents must be a dense tensor, got a nested one",
    ),
    "check_dense quantised": (
        lambda: check_dense("latents", torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)),
        TypeError,
        "latents must be a dense tensor, got a quantised one",
    ),
    "check_names number": (lambda: check_names("adapter_names", 3), TypeError, "adapter_names must be a text or a"),
    "check_names mixed": (lambda: check_names("adapter_names", ["a", 3]), TypeError, "adapter_names .* list of texts"),
    "parse_move number": (lambda: parse_move((3.5,), {}), TypeError, "argument 1 of `to` must be a device"),
    "parse_move keyword": (lambda: parse_move((), {"device": 3.5}), TypeError, "device of `to` must be a device"),
    "parse_move unknown device": (lambda: parse_move(("x",), {}), TypeError, "`to` takes a device.*got str 'x'"),
    "parse_move unknown keyword": (lambda: parse_move((), {"dtipe": None}), TypeError, "`to` takes .*dtipe=NoneType"),
    "randn generator": (
        lambda: randn((2, 3), 3, device="cpu", dtype=torch.float32),
        TypeError,
        "generator must be a torch.Generator or a list of them, got int",
    ),
    "randn three generators for two": (
        lambda: randn((2, 3), [torch.Generator() for _ in range(3)], device="cpu", dtype=torch.float32),
        ValueError,
        "generator must be one or a list of 2, one a sample, got 3",
    ),
    "check_run other": (lambda: check_run({"latents": X}), TypeError, "run must be what `prepare` returns, got dict"),
    "check_run approximations": (lambda: check_run(noisy_run(approximations=3)), TypeError, "approximations of a run"),
    "check_run generator": (lambda: check_run(noisy_run(generator=3)), TypeError, "generator must be"),
    "check_run timesteps": (lambda: check_run(noisy_run(timesteps=[1])), TypeError, "timesteps of a run must be"),
    "check_run scheduler": (
        lambda: check_run(noisy_run(scheduler="ddim")),
        TypeError,
        "scheduler of a run must have step",
    ),
    "check_run latents list": (lambda: check_run(noisy_run(latents=[1.0])), TypeError, "latents must be a tensor"),
    "check_run latents": (lambda: check_run(noisy_run(latents=X[0])), ValueError, r"latents must .*\(4, 6, 8\)"),
    "config type": (lambda: Settings(size="a"), TypeError, "size must be int, got"),
    "config range": (lambda: Settings(size=0), ValueError, "size must be"),
    "config choice": (lambda: Settings(kind="c"), ValueError, "kind"),
    # files and options of loading
    "check_places unknown": (lambda: hub.check_places(subfoldr="x"), TypeError, "'subfoldr' .* mean 'subfolder'"),
    "check_places flag": (lambda: hub.check_places(local_files_only=3), TypeError, "local_files_only must be True or"),
    "check_places text": (lambda: hub.check_places(revision=3), TypeError, "revision must be a text or None"),
    "check_places token": (lambda: hub.check_places(token=3), TypeError, "token must be a text or None"),
    "check_places path": (lambda: hub.check_places(cache_dir=3), TypeError, "cache_dir must be a path"),
    "check_places name": (lambda: hub.check_places(cache_dir="a\0"), ValueError, "cache_dir must be a name that a"),
    "fetch number": (lambda: hub.fetch(3, []), TypeError, "the model's name must be a path or a name, got int 3"),
    "fetch subfolder": (lambda: hub.fetch("mini", [], subfolder=3), TypeError, "subfolder must be a text or None"),
    "fetch option": (lambda: hub.fetch("mini", [], revison="x"), TypeError, "'revison' .* mean 'revision'"),
    "check_target empty": (lambda: write.check_target(""), ValueError, "path of a file to write must not be empty"),
    "writing empty": (lambda: write_into(""), ValueError, "path of a file to write must not be empty"),
    "check_room pixels": (
        lambda: check_room(argparse.Namespace(size=10**6, height=None, width=None, hires=None), [], 48, 64),
        ValueError,
        "--size 1000000 asks for .* pixels, at most",
    ),
    # processes and threads
    "change during a run": (change_during_a_run, RuntimeError, "unload_lora_weights changes.*steps through a run"),
    "change within a call": (change_within_a_call, RuntimeError, "load_lora_weights changes.*from inside a call"),
    # schedulers
    "lms_weights": (lambda: lms_weights([1.0, 1.0, 0.0], 1, 2), ValueError, r"noise levels must fall.*\[1.0, 1.0\]"),
    "pndm_transfer": (
        lambda: pndm_transfer(X, X, torch.tensor(0.0), torch.tensor(0.5), "epsilon"),
        ValueError,
        "beta_end must leave some of the image",
    ),
    "predict_x0 type": (
        lambda: predict_x0("flow", X, X, torch.tensor(0.5)),
        ValueError,
        "prediction_type must be epsilon, v_prediction or sample, got 'flow'",
    ),
    "predict_x0 noise": (
        lambda: predict_x0("epsilon", X, X, torch.tensor(0.0)),
        ValueError,
        "prediction_type must be 'v_prediction' or 'sample' where a step starts from pure noise",
    ),
    "make_betas length": (lambda: make_betas(9.5, 0.1, 0.2, "linear"), TypeError, "num_train_timesteps must be an int"),
    "make_betas start": (
        lambda: make_betas(9, "0.1", 0.2, "linear"),
        TypeError,
        "beta_start must be a number, got str",
    ),
    "make_betas end": (
        lambda: make_betas(9, 0.1, None, "linear"),
        TypeError,
        "beta_end must be a number, got NoneType",
    ),
    "make_betas range": (lambda: make_betas(9, 0.1, 1.0, "linear"), ValueError, r"beta_end must be in \[0, 1\), got"),
    "make_betas trained": (
        lambda: make_betas(2, 0.1, 0.2, "linear", (0.1, "0.2")),
        TypeError,
        r"trained_betas\[1\] must be a number, got str '0.2'",
    ),
    "LMS beta": (lambda: LMSDiscreteScheduler(beta_start="a"), TypeError, "beta_start must be float"),
    "LMS unknown": (lambda: LMSDiscreteScheduler(beta_strt=0.1), TypeError, "beta_strt"),
    "PNDM beta": (lambda: PNDMScheduler(beta_start="a"), TypeError, "beta_start must be float"),
    "PNDM unknown": (lambda: PNDMScheduler(beta_strt=0.1), TypeError, "beta_strt"),
    "LMS step order": (lambda: LMSDiscreteScheduler().step(X, 1, X, "4"), TypeError, "order must be an int, got str"),
    "LMS step return_dict": (lambda: LMSDiscreteScheduler().step(X, 1, X, 4, 3), TypeError, "return_dict must be True"),
    "LMS step sample": (lambda: LMSDiscreteScheduler().step(X, 1, [1.0]), TypeError, "sample must be a tensor"),
    # layers
    "slice": (lambda: attention().set_attention_slice(9), ValueError, "slice_size must be at most .* heads, got 9"),
    "attention operator": (
        lambda: attention().set_use_memory_efficient_attention_xformers(True, "cutlass"),
        ValueError,
        "attention_op must be None, got 'cutlass'",
    ),
    "attention mask": (
        lambda: attention().prepare_attention_mask(torch.zeros(2, 1, 5), 7, 2),
        ValueError,
        "attention_mask must be 7 tokens long, got 5",
    ),
    "transformer": (
        lambda: BasicTransformerBlock(8, 2, 4, norm_type="ada_norm"),
        ValueError,
        "norm_type must be 'layer_norm', got 'ada_norm'",
    ),
    "activation": (lambda: get_activation("tanhh"), ValueError, "activation must be one of .*, got 'tanhh'"),
    "condition": (lambda: TimestepEmbedding(4, 8)(X[0, 0], X), ValueError, "condition must be None"),
    "resnet_options": (
        lambda: resnet_options(4, 0.0, 1e-5, "scale_shift", "silu", 4),
        ValueError,
        "resnet_time_scale_shift must be 'default' or 'group', got 'scale_shift'",
    ),
    "tiles": (lambda: tiled_norm_act_conv(X, conv()), ValueError, r"x must have 5 channels, got 4"),
    "checkpointing": (
        lambda: Plain().enable_gradient_checkpointing(),
        ValueError,
        "Plain does not support gradient checkpointing",
    ),
    "checkpointing, transformers": (
        lambda: PlainPreTrained(Settings()).gradient_checkpointing_enable(),
        ValueError,
        "PlainPreTrained does not support gradient checkpointing",
    ),
    "compile a number": (lambda: compile_pipeline(3), TypeError, "must be a pipeline"),
    "compile mode": (lambda: compile_pipeline(conv(), mode="fast"), ValueError, "mode must be one of .*, got 'fast'"),
    "compile fullgraph": (lambda: compile_pipeline(conv(), fullgraph=3), TypeError, "fullgraph must be True or False"),
    "compile dynamic": (lambda: compile_pipeline(conv(), dynamic=3), TypeError, "dynamic must be True or False"),
    "compile backend": (lambda: compile_pipeline(conv(), backend=3), TypeError, "backend must be .*, got int 3"),
    "capture a number": (lambda: capture(3), TypeError, "pipe must be a pipeline with a UNet, .* got int"),
    "capture text": (lambda: capture(conv(), "4"), TypeError, "max_graphs must be an int, got str '4'"),
    "capture no graphs": (lambda: capture(conv(), 0), ValueError, "max_graphs must be at least 1, got 0"),
    # texts and images
    "depth": (
        lambda: DPTImageProcessor().post_process_depth_estimation("x"),
        TypeError,
        "predicted_depth must be a tensor",
    ),
    "sizes": (
        lambda: DPTImageProcessor().post_process_depth_estimation(X[0], [3, 4, 5, 6]),
        TypeError,
        "target_sizes must be pairs of height and width",
    ),
    "sizes of texts": (
        lambda: DPTImageProcessor().post_process_depth_estimation(X[0], [("3", 4)] * 4),
        TypeError,
        "height must be an int",
    ),
    "add_tokens": (lambda: load_tokenizer().add_tokens("a\ud800"), ValueError, "words must"),
    "pad ragged": (lambda: load_tokenizer().pad(IDS, False, return_tensors="pt"), ValueError, "rows of 3, 2 ids"),
    "pad option": (lambda: load_tokenizer().pad(IDS, "longst"), ValueError, "padding must be"),
    "pad kind": (lambda: load_tokenizer().pad(IDS, return_tensors="tf"), ValueError, "return_tensors must be"),
    # cases that are given a folder
    "load_config": (lambda place: UNet2DConditionModel.load_config(place), CheckpointError, "has no config.json"),
    "replacing": (lambda place: replace_parts(place, "unet"), OSError, "a file is where a folder is needed.*unet"),
    "check_target": (lambda place: write.check_target(place), OSError, "the file to write is a folder"),
    "writing": (lambda place: write_into(place / "none" / "a"), OSError, "folder to write to does not exist.*none"),
    "writing a folder": (lambda place: write_into(place), OSError, "the file to write is a folder"),
    "try_to_write place": (lambda place: write.try_to_write(place / "none"), OSError, "none"),
    "try_to_write room": (lambda place: write.try_to_write(place, 10**20), OSError, "there is room for .* free some"),
    "save_all": (
        lambda place: save_all([partial(write.write_file, place / "none" / "a.png", b"x")]),
        OSError,
        "folder to write to does not exist.*none",
    ),
    "check_room": (without_room, OSError, "there is room for 10 bytes, and up to .* free some"),
    "forked": (forked, ValueError, "pipeline must be called in the process that it was loaded in.*2 threads"),
    "save_lora_weights no dict": (
        lambda place: Pipeline.save_lora_weights(place, LAYERS, unet_lora_adapter_metadata=[("r", 4)]),
        TypeError,
        "unet_lora_adapter_metadata must be a dict or None, got list",
    ),
    "save_lora_weights no JSON": (
        lambda place: Pipeline.save_lora_weights(place, LAYERS, unet_lora_adapter_metadata={"r": object()}),
        TypeError,
        "unet_lora_adapter_metadata must hold what JSON can",
    ),
    # cases that are given a pipeline
    "offload to a number": (lambda pipe: pipe.enable_sequential_cpu_offload(device=3.5), TypeError, "device must be"),
    "offload to a name": (lambda pipe: pipe.enable_model_cpu_offload("a"), TypeError, "gpu_id must be an int, got str"),
    "offload nowhere": (
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cuda:99"),
        ValueError,
        "device must be one that exists here, got cuda:99",
    ),
    "offload to two": (
        lambda pipe: pipe.enable_sequential_cpu_offload(1, "cuda:0"),
        ValueError,
        "gpu_id 1 and device cuda:0 name different devices",
    ),
    "DPT size": (
        lambda pipe: pipe.depth_estimator(torch.rand(1, 3, 50, 64)),
        ValueError,
        "pixel_values must have multiples of 16 as height and width, got 50x64",
    ),
    "DPT channels": (
        lambda pipe: pipe.depth_estimator(torch.rand(1, 4, 64, 64)),
        ValueError,
        "pixel_values must have 3 channels, got 4",
    ),
    "xformers operator": (
        lambda pipe: pipe.unet.enable_xformers_memory_efficient_attention("cutlass"),
        ValueError,
        "attention_op must be None, got 'cutlass'",
    ),
    "xformers operator, set": (
        lambda pipe: pipe.unet.set_use_memory_efficient_attention_xformers(True, "cutlass"),
        ValueError,
        "attention_op must be None, got 'cutlass'",
    ),
    "add_adapter without peft": (lambda pipe: without_peft(pipe.unet), ImportError, "peft"),
    "delete_adapters": (lambda pipe: pipe.unet.delete_adapters("toy"), ValueError, "No adapter loaded"),
    "save_lora_adapter": (lambda pipe: pipe.unet.save_lora_adapter("unused", "toy"), ValueError, "No adapter loaded"),
    "prepare_latents": (
        lambda pipe: pipe.prepare_latents(X[:, :3], torch.tensor([1]), 3, 1, torch.float32, torch.device("cpu")),
        ValueError,
        "`image` of batch size 2 to 3",
    ),
}
for scheduler, plan in PLANS.items():
    CASES |= {
        f"{scheduler.__name__} plan.step type": (
            partial(plan.step, [1.0], 0, X, plan.init_state()),
            TypeError,
            "noise_pred must be a tensor",
        ),
        f"{scheduler.__name__} plan.step shapes": (
            partial(plan.step, X, 0, Y, plan.init_state()),
            ValueError,
            "noise_pred and latents must have the same shape",
        ),
        f"{scheduler.__name__} plan.step index": (
            partial(plan.step, X, 99, X, plan.init_state()),
            ValueError,
            r"index must be in \[0, \d+\], got 99",
        ),
        f"{scheduler.__name__} plan.add_noise type": (
            partial(plan.add_noise, X, None),
            TypeError,
            "noise must be a tensor",
        ),
        f"{scheduler.__name__} plan.add_noise text": (
            partial(plan.add_noise, X, X, "0"),
            TypeError,
            "index must be an int, got str '0'",
        ),
    }


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("case", CASES)
def test_a_function_raises_what_it_announces(request, place, case):
    call, error, message = CASES[case]
    given = [request.getfixturevalue(name) for name in inspect.signature(call).parameters if name in ("place", "pipe")]
    before = sorted(place.iterdir())
    with pytest.raises(error, match=message):
        call(*given)
    assert sorted(place.iterdir()) == before
