"""Checkpoints in a single file: a pipeline is made from one, or takes networks from one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from depthdiff.arguments import SINGLE_FILE, sort_out
from depthdiff.checkpoint.geometry import SCHEDULER
from depthdiff.checkpoint.hub import check_places, fetch_config, refuse_other_unet
from depthdiff.checkpoint.loading import read_dtype
from depthdiff.checkpoint.single_file import (
    LDM,
    NETWORKS,
    SingleFile,
    check_known,
    find_single_file,
    load_part,
    open_single_file,
    read_config,
)
from depthdiff.checks import check_number, read_device_map
from depthdiff.config import CheckpointError
from depthdiff.image_processor import DPTImageProcessor
from depthdiff.parts import is_function
from depthdiff.pipeline_utils import DiffusionPipeline
from depthdiff.registry import CLASSES, COMPONENT_CLASSES, component_class, computing_dtype, make_scheduler
from depthdiff.schedulers.names import find_scheduler
from depthdiff.schedulers.pndm import PNDMScheduler
from depthdiff.tokenizer import clip_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

BILINEAR = 2
"""How the published preprocessor resizes; everything else of it is the default."""


class FromSingleFileMixin(DiffusionPipeline):
    """Adds single files to the components. Names and arguments are those of diffusers' mixin."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        scheduler_type: str | None = None,
        scaling_factor: float | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        fast: bool = True,
        **components: Any,
    ) -> Self:
        """Load a pipeline from one file in the layout of Stability's own code, safetensors or `.ckpt`.

        Such a file holds weights alone. The geometry is inferred from their shapes (heads have 64 channels, norms 32
        groups); tokenizer, scheduler and preprocessor are those of the published model.

        Args:
            pretrained_model_link_or_path: a file, the address of one on the Hub, or "owner/name/file.safetensors".
            config: folder or Hub id whose configs, tokenizer, scheduler and preprocessor are used instead.
            torch_dtype: of all weights; float32 if absent; "auto" is the files' own where there is a CUDA device,
                else bfloat16 if the processor has it, with a float32 depth net, else float32.
            dtype: another name of `torch_dtype`.
            prediction_type: what the UNet predicts, which cannot be seen in weights; "epsilon" if absent.
            revision: branch, tag or commit on the Hub, of the file.
            cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            scheduler_type: the solver; see `depthdiff.schedulers.names.find_scheduler`. "pndm" is the default.
            scaling_factor: of the autoencoder's latents; 0.18215 if absent.
            device_map: where to move the networks, see `depthdiff.checks.read_device_map`.
            fast: let the networks compute the same faster where they can; see `depthdiff.fast`.
            **components: ready components by name, used instead of the file's, or where the file has none; or an
                argument of diffusers in `depthdiff.arguments.SINGLE_FILE`.

        Raises:
            CheckpointError: the file is missing, damaged, holds code, or is of a model without depth.
            TypeError: an unknown argument.
            ValueError: `prediction_type` or `scheduler_type` beside a scheduler, `scaling_factor` beside a `vae`, an
                unknown type, an argument that is refused, or components that do not fit each other.
        """
        given = {"token": token, "config": config, **components}
        components = sort_out(cls.from_single_file, SINGLE_FILE, given, (*cls.NAMES, "token", "config"))
        token, config = components.pop("token"), components.pop("config")
        _check_scheduler_type(scheduler_type, "scheduler" in components)
        factor = None if scaling_factor is None else check_number("scaling_factor", scaling_factor, 1e-6, 1e6)
        if factor is not None and "vae" in components:
            raise ValueError("scaling_factor and vae both say how latents are scaled; give one of them")
        device = read_device_map(device_map)
        parts = load_single_components(
            pretrained_model_link_or_path,
            overrides=components,
            config=config,
            torch_dtype=torch_dtype if torch_dtype is not None else dtype,
            prediction_type=prediction_type,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        if scheduler_type is not None:
            parts["scheduler"] = make_scheduler(scheduler_type, parts["scheduler"].config, "scheduler_type")
        if factor is not None:
            parts["vae"].register_to_config(scaling_factor=factor)
        pipeline = cls(**parts, fast=fast)
        pipeline.name_or_path = os.fspath(pretrained_model_link_or_path)
        return pipeline if device is None else pipeline.to(device)

    def load_single_file(
        self,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> list[str]:
        """Replace the pipeline's networks by those that a file holds: a fine-tuned UNet, a better autoencoder.

        They keep the configs, dtypes and devices of those they replace. All are replaced or none.

        Args:
            pretrained_model_link_or_path: as in `from_single_file`; a whole checkpoint or one network, with or without
                the prefix that it has in a whole one.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.

        Returns:
            The names of the components that were replaced.

        Raises:
            CheckpointError: the file is missing, damaged, or its networks are of another geometry.
            ValueError: adapters are loaded or offloading is on; both hold on to the present weights. Or the file has
                a UNet, and the pipeline's is stored in fewer bits than it computes in.
        """
        if self.device.type == "meta" or self._offload_device is not None:
            raise ValueError("load_single_file needs weights in place; call remove_all_hooks() first")
        if self._has_adapters():
            raise ValueError("adapters are merged into the present weights; unload or unfuse them first")
        loaded = load_into(
            self.networks,
            pretrained_model_link_or_path,
            prediction_type=self.components["scheduler"].config.prediction_type,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        with self._turns.change("load_single_file"):
            self.register_modules(**loaded)
        return list(loaded)


def _check_scheduler_type(name: str | None, given: bool) -> None:
    """Refuse an unknown `scheduler_type`, or one beside a scheduler, which is `given`."""
    if name is not None:
        find_scheduler(name, "scheduler_type")
        if given:
            raise ValueError("scheduler_type and scheduler both say which solver to use; give one of them")


def load_single_components(
    name: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any],
    config: str | os.PathLike[str] | None = None,
    torch_dtype: Any = None,
    prediction_type: str | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Load every component of a pipeline that is not in `overrides`; see `FromSingleFileMixin.from_single_file`."""
    torch_dtype = read_dtype(torch_dtype)
    check_places(**where)
    if prediction_type is not None and "scheduler" in overrides:
        raise ValueError("prediction_type and scheduler both say what the UNet predicts; give one of them")
    predicted = "epsilon" if prediction_type is None else prediction_type
    scheduler = None
    if "scheduler" not in overrides:
        scheduler = PNDMScheduler(**dict[str, Any](SCHEDULER), prediction_type=predicted)
    file = open_single_file(find_single_file(name, **where))
    from_where = {key: value for key, value in where.items() if key != "revision"}
    missing = [component for component in NETWORKS if component not in file.parts and component not in overrides]
    if "unet" not in overrides:
        refuse_other_unets(file, predicted)
    check_known(file)
    if missing:
        arguments = ", ".join(f"{component}=..." for component in missing)
        raise CheckpointError(
            f"{file.path} holds {' and '.join(file.parts)} alone; pass the rest as {arguments}, or load a whole "
            "pipeline and call its load_single_file with this file"
        )
    parts = {"scheduler": scheduler, **overrides}
    for component in NETWORKS:
        if component not in parts:
            values = None if config is None else read_config(config, component, **from_where)
            parts[component] = load_part(
                file, component, CLASSES[component], values, computing_dtype(component, torch_dtype), config
            )
    if config is not None:
        if prediction_type is None and "scheduler" not in overrides:
            del parts["scheduler"]
        parts |= _small_components(config, [name for name in COMPONENT_CLASSES if name not in parts], from_where)
        return parts
    if "tokenizer" not in parts:
        parts["tokenizer"] = _bundled_tokenizer(file, parts["text_encoder"])
    if "feature_extractor" not in parts:
        parts["feature_extractor"] = _preprocessor(parts["depth_estimator"])
    return parts


def load_into(
    networks: Mapping[str, Any], name: str | os.PathLike[str], *, prediction_type: str = "epsilon", **where: Any
) -> dict[str, Any]:
    """Load the networks that a file holds, with the configs, dtypes and devices of those given."""
    file = open_single_file(find_single_file(name, **where))
    refuse_other_unets(file, prediction_type)
    check_known(file)
    absent = [component for component in file.parts if component not in networks]
    if absent:
        raise CheckpointError(
            f"{file.path} holds a {absent[0]}, which the pipeline does not have; load it as {absent[0]}=..."
        )
    for component in file.parts:
        network = networks[component]
        if getattr(network, "storage_dtype", None) is not None:
            raise ValueError(f"{component} weights are stored in {network.storage_dtype}; load files before that")
    return {
        component: load_part(
            file, component, CLASSES[component], networks[component].config, networks[component].dtype
        ).to(networks[component].device)
        for component in file.parts
    }


def refuse_other_unets(file: SingleFile, prediction_type: str) -> None:
    """Refuse a file whose UNet does not take depth; errors as in `refuse_other_unet`."""
    if "unet" not in file.parts:
        return
    part = file.parts["unet"]
    first = part.shapes.get("input_blocks.0.0.weight" if part.layout == LDM else "conv_in.weight", ())
    widths = [s[1] for key, s in part.shapes.items() if key.endswith("attn2.to_k.weight") and len(s) == 2]
    if len(first) == 4:
        width = widths[-1] if widths else None
        refuse_other_unet(file.path, {"in_channels": first[1], "cross_attention_dim": width}, prediction_type)


def _bundled_tokenizer(file: SingleFile, text_encoder: Any) -> Any:
    tokenizer = clip_tokenizer()
    if text_encoder is not None and text_encoder.config.vocab_size != len(tokenizer):
        raise CheckpointError(
            f"{file.path}: its text encoder knows {text_encoder.config.vocab_size} tokens, CLIP's vocabulary has "
            f"{len(tokenizer)}; pass its tokenizer as tokenizer=..."
        )
    return tokenizer


def _preprocessor(depth_estimator: Any) -> DPTImageProcessor | None:
    if is_function(depth_estimator):
        return None  # it takes images as they are
    size = 384 if depth_estimator is None else getattr(depth_estimator.config, "image_size", None)
    if not isinstance(size, int):
        kind = type(depth_estimator).__name__
        raise ValueError(f"depth_estimator {kind} must come with its image processor; pass it as feature_extractor=...")
    return DPTImageProcessor.from_config({"size": {"height": size, "width": size}, "resample": BILINEAR})


def _small_components(config: str | os.PathLike[str], names: list[str], where: Mapping[str, Any]) -> dict[str, Any]:
    """Load tokenizer, scheduler and preprocessor from a folder."""
    index = fetch_config(config, "model_index.json", **where)
    kinds = {name: component_class(name, index, config) for name in names}
    return {name: kind.from_pretrained(config, subfolder=name, **where) for name, kind in kinds.items()}
