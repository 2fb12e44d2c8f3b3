"""Arguments that diffusers takes, or took in 0.26.3, and that this package has under another name or not at all.

Each is renamed, ignored with a warning that says what happens instead, or refused with a remedy.
docs/compatibility.md lists them all.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from depthdiff.checks import check_flag, nearest


class Handling(NamedTuple):
    """What becomes of an argument.

    Attributes:
        kind: what is done with it; None and False, which ask for nothing, are dropped silently.
        says: the name here; what happens instead; or the remedy.
    """

    kind: Literal["renamed", "ignored", "refused"]
    says: str


def _ignored(*names: str, says: str) -> dict[str, Handling]:
    return dict.fromkeys(names, Handling("ignored", says))


CODE = _ignored("trust_remote_code", "custom_revision", says="code of a repository is never run")
CHECKER = _ignored("safety_checker", "requires_safety_checker", says="this pipeline has no safety checker")
IMAGE_ENCODER = _ignored("image_encoder", says="this pipeline reads no picture as a prompt")

HUB = {
    "use_auth_token": Handling("renamed", "token"),
    "resume_download": Handling("ignored", "downloads always resume"),
    "proxies": Handling("ignored", "proxies are read from the environment variable HTTPS_PROXY"),
    "mirror": Handling("ignored", "mirrors are read from the environment variable HF_ENDPOINT"),
    "user_agent": Handling("ignored", "huggingface_hub names itself"),
    **_ignored("local_dir", "local_dir_use_symlinks", says="downloads are stored in cache_dir"),
    **CODE,
}
"""Arguments of every loader."""

WEIGHTS = HUB | {
    **_ignored("max_memory", "offload_folder", "offload_state_dict", says="weights are mapped from their files"),
    **_ignored("use_flashpack", "flashpack_kwargs", says="weights are read from safetensors or pickles"),
    "parallel_config": Handling("ignored", "a network works on one device"),
    "from_flax": Handling("refused", "convert the weights to safetensors with diffusers"),
    "quantization_config": Handling("refused", "load without it, and quantize the network afterwards"),
    "ignore_mismatched_sizes": Handling("refused", "build the network from its config, and load what fits"),
}
"""Arguments of loaders of networks."""

PIPELINE = WEIGHTS | {
    **CHECKER,
    **IMAGE_ENCODER,
    **_ignored("provider", "provider_options", "sess_options", says="networks run in PyTorch"),
    "load_connected_pipeline": Handling("ignored", "there is no second pipeline"),
    "custom_pipeline": Handling(
        "refused", "write a subclass of StableDiffusionDepth2ImgPipeline; no downloaded code is run"
    ),
    "use_onnx": Handling("refused", "load the PyTorch weights; torch.onnx.export writes ONNX"),
    "dduf_file": Handling("refused", "unpack the archive, and name the folder"),
}
"""Arguments of `StableDiffusionDepth2ImgPipeline.from_pretrained`."""

SINGLE_FILE = WEIGHTS | {
    **_ignored("original_config", "original_config_file", "image_size", "num_in_channels", "upcast_attention",
               says="the geometry is inferred from the shapes of the weights"),
    **_ignored("low_cpu_mem_usage", "disable_mmap", says="weights that keep their dtype are mapped, others copied"),
    "config_file": Handling("renamed", "config"),
    "config_revision": Handling("ignored", "the config is read at its repository's main branch"),
    "extract_ema": Handling("ignored", "the weights that the file holds for inference are read"),
    "use_safetensors": Handling("ignored", "the file's name says which kind it is"),
    "model_type": Handling("ignored", "the file is read as a depth-to-image checkpoint"),
    **_ignored("load_safety_checker", says="this pipeline has no safety checker"),
    **CHECKER,
}  # fmt: skip
"""Arguments of `from_single_file`."""

ADAPTER = HUB | {
    **_ignored("network_alphas", "unet_config", "metadata", says="an adapter's settings are read from its file"),
    "return_lora_metadata": Handling("ignored", "nothing is returned"),
    "low_cpu_mem_usage": Handling("ignored", "an adapter is in memory once"),
    "load_into_transformer_2": Handling("ignored", "depth-to-image has a UNet"),
    "use_safetensors": Handling("ignored", "the file's name says which kind it is"),
}
"""Arguments of `load_lora_weights`, `load_textual_inversion` and `load_lora_adapter`."""

NO_WEIGHTS = HUB | {
    **_ignored("torch_dtype", "dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "device_map",
               says="there are no weights to load"),
    **_ignored("use_fast", "backend", says="there is one implementation"),
}  # fmt: skip
"""Arguments of `from_pretrained` of tokenizers, preprocessors and schedulers."""

CONFIGS = {"return_commit_hash": Handling("refused", "huggingface_hub.model_info names the commit")}
"""Arguments of `load_config` beside those of `HUB`."""

SAVING = {
    "push_to_hub": Handling("refused", "upload the saved folder with huggingface_hub"),
    **_ignored("repo_id", "commit_message", "private", "create_pr", "token", "subfolder", says="nothing is uploaded"),
    "save_function": Handling("ignored", "weights are written as safetensors"),
    "use_flashpack": Handling("ignored", "weights are written as safetensors"),
}
"""Arguments of `save_pretrained`."""

SHARING = {
    **CHECKER,
    **IMAGE_ENCODER,
    **CODE,
    "custom_pipeline": Handling("refused", "no downloaded code is run; call from_pipe of your own class"),
}
"""Arguments of `from_pipe`."""

CALL = {
    **_ignored("latents", says="pass latents as image"),
    **_ignored("timesteps", "sigmas", says="the scheduler plans them; num_inference_steps and strength say how many"),
    **_ignored("ip_adapter_image", "ip_adapter_image_embeds", says="this pipeline reads no picture as a prompt"),
}
"""Arguments of calls of other pipelines, which diffusers 0.26.3 ignores in this one's."""

SETTINGS = {
    **_ignored("dtype", "torch_dtype", says="a config has no weights"),
    "pretrained_model_name_or_path": Handling("refused", "call from_pretrained"),
} | _ignored(
    *("algorithm_type", "corrector_order", "disable_corrector", "euler_at_final", "final_sigmas_type", "flow_shift"),
    *("interpolation_type", "lambda_min_clipped", "lower_order_final", "original_inference_steps", "predict_x0"),
    *("predictor_order", "rho", "shift_terminal", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule", "tau_func"),
    *("solver_order", "solver_p", "solver_type", "time_shift_type", "timestep_scaling", "timestep_type"),
    *("use_dynamic_shifting", "use_flow_sigmas", "use_lu_lambdas", "variance_type", "use_karras_sigmas", "snr"),
    *("use_beta_sigmas", "use_exponential_sigmas", "clip_sample", "clip_sample_range", "sample_max_value"),
    *("thresholding", "dynamic_thresholding_ratio", "rescale_betas_zero_snr", "set_alpha_to_one", "skip_prk_steps"),
    *("fix_start", "steps_offset", "timestep_spacing", "trained_betas", "shift", "base_shift", "max_shift", "eta"),
    *("base_image_seq_len", "max_image_seq_len", "noise_sampler_seed", "invert_sigmas", "stochastic_sampling"),
    *("s_noise", "s_churn", "fix_order"),
    says="it is a setting of other schedulers",
)
"""Settings that other schedulers have; a menu of schedulers passes them to all."""


def _outside() -> int:
    """Return the `stacklevel` of a warning at the line that called this package, past torch's decorators."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("depthdiff", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def warn_of_pickles(safe_serialization: object) -> None:
    """Say that safetensors are written where `safe_serialization` is False; both packages load them."""
    if not check_flag("safe_serialization", safe_serialization):
        text = "safe_serialization=False is ignored: pickles are never written, safetensors are"
        warnings.warn(text, UserWarning, stacklevel=_outside())


def sort_out(
    function: Callable[..., Any], handlings: Mapping[str, Handling], given: Mapping[str, Any], known: Iterable[str] = ()
) -> dict[str, Any]:
    """Select the arguments that count, and say once of each other one what becomes of it.

    Args:
        function: which got them; for messages.
        handlings: of the arguments of diffusers that may be given.
        given: the arguments that `function` leaves to this; first those that have an old name.
        known: names that count.

    Returns:
        Those that are known or renamed, by their names here.

    Raises:
        TypeError: an unknown name; the nearest known one is suggested.
        ValueError: an argument that is refused.
    """
    called = "the pipeline" if function.__name__ == "__call__" else function.__name__
    known = tuple(known)
    kept = {}
    for name, value in given.items():
        if name in known:
            kept[name] = value
            continue
        if name not in handlings:
            every = [*known, *inspect.signature(function).parameters, *handlings]
            raise TypeError(f"{called} got an unknown argument {name!r}{nearest(name, every)}")
        kind, says = handlings[name]
        if value is None or (value is False and name != "low_cpu_mem_usage"):
            continue
        if kind == "refused":
            raise ValueError(f"{called} does not take {name}: {says}")
        if kind == "renamed":
            if given.get(says) is not None:
                raise TypeError(f"{called} got both {says} and {name}, which is its old name; give one of them")
            kept[says] = value
            warnings.warn(f"{called}: {name} is the old name of {says}", FutureWarning, stacklevel=_outside())
        else:
            warnings.warn(f"{called} ignores {name}: {says}", UserWarning, stacklevel=_outside())
    return kept
