"""Load, save, move and offload the components of a pipeline."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar

import torch
from tqdm.auto import tqdm

import depthdiff.fast as fast
from depthdiff.arguments import PIPELINE, SAVING, SHARING, sort_out
from depthdiff.checkpoint.hub import BUNDLED
from depthdiff.checkpoint.save import model_index, save_components
from depthdiff.checks import check_flag, check_number, read_device_map, show
from depthdiff.config import FrozenDict
from depthdiff.devices import DeviceMixin, device_of, dtype_of, hook_device
from depthdiff.image import VaeImageProcessor
from depthdiff.parts import check_part, is_function
from depthdiff.progress import check_bar
from depthdiff.registry import COMPONENT_CLASSES, Dtypes, load_components
from depthdiff.sharing import uncompiled

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class DiffusionPipeline(DeviceMixin):
    """Base of the pipeline: a set of named components, each an attribute.

    Attributes:
        NAMES: of the components, in the order of the constructor.
        name_or_path: what the pipeline was loaded from.
        vae_scale_factor: how many pixels, in height and in width, one latent stands for.
        image_processor: images to pixels and back.
    """

    NAMES: ClassVar[tuple[str, ...]] = tuple(COMPONENT_CLASSES)
    config_name = "model_index.json"
    unet_name, text_encoder_name = "unet", "text_encoder"
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []
    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    depth_estimator: Any
    feature_extractor: Any
    vae_scale_factor = 8
    image_processor: VaeImageProcessor

    def __init__(self, *, fast: bool = True, **components: Any) -> None:
        self._fast = check_flag("fast", fast)
        self.name_or_path: str | None = None
        self._planning = threading.RLock()
        self._progress_bar_config: dict[str, Any] = {}
        super().__init__()
        self.image_processor = VaeImageProcessor(self.vae_scale_factor)
        self.register_modules(**components)

    def register_modules(self, **components: Any) -> None:
        """Set components by name.

        Raises:
            TypeError: one that does not do what a component of that name must.
        """
        for name, part in components.items():
            check_part(name, part)
        for name, part in components.items():
            setattr(self, name, part)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "vae" and hasattr(value, "config"):
            factor = 2 ** (len(value.config.block_out_channels) - 1)
            if factor != self.vae_scale_factor:
                self.vae_scale_factor, self.image_processor = factor, VaeImageProcessor(factor)
        if name in self.NAMES and isinstance(value, torch.nn.Module) and self._fast:
            fast.enable(value)

    def __repr__(self) -> str:
        rows = [f"  {name}: {summary(part)}" for name, part in self.components.items()]
        return "\n".join([f"{type(self).__name__} ({self.name_or_path or 'not loaded from a checkpoint'})", *rows])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_planning"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _planning=threading.RLock())
        for network in self.networks.values() if self._fast else ():
            fast.enable(network)  # which copies of networks leave behind

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, as the constructor takes them."""
        return {name: getattr(self, name) for name in self.NAMES}

    @property
    def config(self) -> FrozenDict:
        """The library and class of each component by name."""
        index = model_index(self._uncompiled(), type(self).__name__)
        return FrozenDict({name: tuple(entry) if isinstance(entry, list) else entry for name, entry in index.items()}
                          | {"_name_or_path": self.name_or_path})  # fmt: skip

    @property
    def networks(self) -> dict[str, Any]:
        """Those components that have weights."""
        return {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **components: Any,
    ) -> Self:
        """Make a pipeline of this class with the components of another one, but for those that are given.

        Both share their locks: a change of weights by either waits for the calls of both. While they have the same
        UNet and text encoder, they have the same adapters. Offloading that is on is on for both.

        Args:
            pipeline: whose components are shared; one of diffusers may be given as well.
            torch_dtype: to cast them to, for both pipelines.
            dtype: another name of `torch_dtype`.
            **components: to use instead; or an argument of diffusers in `depthdiff.arguments.SHARING`.

        Raises:
            TypeError: an unknown argument, or not a pipeline or a component.
            ValueError: an argument that is refused, or components that do not fit each other.
        """
        components = sort_out(cls.from_pipe, SHARING, components, cls.NAMES)
        shared = getattr(pipeline, "components", None)
        if not isinstance(shared, Mapping):
            raise TypeError(f"pipeline must be one, with components, got {show(pipeline)}")
        parts = {name: part for name, part in shared.items() if name in cls.NAMES} | components
        made = cls(**parts, fast=getattr(pipeline, "_fast", True))
        if isinstance(pipeline, DiffusionPipeline):
            made._share(pipeline)
        dtype = dtype if torch_dtype is None else torch_dtype
        return made if dtype is None else made.to(dtype=dtype)

    def _share(self, pipeline: DiffusionPipeline) -> None:
        """Use the locks of a pipeline whose components this one has."""
        self._turns, self._planning, self._workers = pipeline._turns, pipeline._planning, pipeline._workers
        self._offload_device, self._offload_whole = pipeline._offload_device, pipeline._offload_whole

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        torch_dtype: Dtypes = None,
        dtype: Dtypes = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        disable_mmap: bool = False,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        fast: bool = True,
        **components: Any,
    ) -> Self:
        """Load a pipeline from a folder in the published layout, or from the Hub.

        Args:
            pretrained_model_name_or_path: a folder that holds `model_index.json`, a Hub id, or "mini": the small
                model that comes with the package and knows tables with toys; used where nothing is named.
            torch_dtype: of all weights, or a dict by component whose "default" is for the others; float32 if absent;
                "auto" is the files' own where there is a CUDA device, else bfloat16 if the processor has it, with a
                float32 depth net, else float32. A dtype may be given by its name, such as "float16".
            dtype: another name of `torch_dtype`.
            variant: of the weight files, such as "fp16".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            use_safetensors: True for these alone, False for pickles (`.bin`) alone, None for pickles where there is
                nothing else. Of a pickle, nothing but tensors is read, and nothing is run.
            low_cpu_mem_usage: False reads the weights into memory of the process's own. Otherwise those that keep their
                dtype are mapped from the files, and another program that cuts such a file off in its place ends this
                process (SIGBUS); no form holds the weights twice.
            disable_mmap: another name of `low_cpu_mem_usage=False`.
            device_map: where to move the networks, see `depthdiff.checks.read_device_map`.
            fast: let the networks compute the same faster where they can; see `depthdiff.fast`.
            **components: ready components by name, used instead of the checkpoint's, such as `scheduler=...`; or an
                argument of diffusers in `depthdiff.arguments.PIPELINE`.

        Raises:
            CheckpointError: a file is missing or damaged, or describes what this package does not have.
            TypeError: an unknown argument.
            ValueError: an argument that no file can have, or that is refused.
        """
        for name in components.keys() & set(cls.NAMES):
            check_part(name, components[name])
        given = {"token": token, **components}
        components = sort_out(cls.from_pretrained, PIPELINE, given, (*cls.NAMES, "token"))
        token = components.pop("token")
        device = read_device_map(device_map)
        if pretrained_model_name_or_path is None:
            logger.warning("no model is named, so the small one that comes with the package is used: %r", BUNDLED)
            pretrained_model_name_or_path = BUNDLED
        parts = load_components(
            pretrained_model_name_or_path,
            overrides=components,
            torch_dtype=torch_dtype if torch_dtype is not None else dtype,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            use_safetensors=use_safetensors,
            copy=check_flag("disable_mmap", disable_mmap)
            or not (low_cpu_mem_usage is None or check_flag("low_cpu_mem_usage", low_cpu_mem_usage)),
        )
        pipeline = cls._from_components(parts, fast)
        pipeline.name_or_path = os.fspath(pretrained_model_name_or_path)
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def _from_components(cls, components: dict[str, Any], fast: bool) -> Self:
        """Build the pipeline; from the base class, one of the class that goes from depth to image."""
        kind: Any = cls
        while not hasattr(kind, "prepare"):
            kind = kind.__subclasses__()[0]
        return kind(**components, fast=fast)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = "10GB",
        **unused: Any,
    ) -> None:
        """Write all components in the published layout, which diffusers loads; all or nothing.

        Of adapters, what is fused is part of the weights; what is merely active is not. A `depth_estimator` that is a
        function is left out, with a warning; pass it again to `from_pretrained`.

        Args:
            save_directory: the folder; made where it does not exist.
            safe_serialization: False is ignored, with a warning: pickles are never written.
            variant: put into the names of the weight files, such as "fp16".
            max_shard_size: bytes, or text such as "5GB"; larger weights are split into shards with an index.
            **unused: arguments of diffusers in `depthdiff.arguments.SAVING`.

        Raises:
            TypeError: an unknown argument, or one of a wrong type.
            ValueError: `push_to_hub`, or a size or variant that no file can have.
        """
        sort_out(self.save_pretrained, SAVING, unused)
        if is_function(self.depth_estimator):
            logger.warning("the depth_estimator is a function and is not saved; pass it again to from_pretrained")
        with self._turns.use():
            save_components(
                self._saved(),
                save_directory,
                class_name=type(self).__name__,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size="10GB" if max_shard_size is None else max_shard_size,
            )

    def _has_adapters(self) -> bool:
        """Return whether adapters are loaded or fused."""
        return False

    def _saved(self) -> dict[str, Any]:
        """Return the components as they are saved."""
        return self._uncompiled()

    def _uncompiled(self) -> dict[str, Any]:
        """Return the components without what `torch.compile` wraps around them, and None for a function."""
        return {name: None if is_function(part) else uncompiled(part) for name, part in self.components.items()}

    def _need(self, *names: str) -> None:
        """Refuse to begin work without these components, or with one whose weights are not there.

        Raises:
            TypeError: the assigned object is not such a component.
            ValueError: there is none, or it is on the meta device.
        """
        for name in names:
            part = getattr(self, name)
            if part is None and name == "feature_extractor" and is_function(self.depth_estimator):
                continue  # which takes images as they are
            if part is None:
                raise ValueError(
                    f"the pipeline has no {name}, which this call needs; load one and pass it as {name}=..."
                )
            check_part(name, part)
            if isinstance(part, torch.nn.Module) and device_of(part).type == "meta" and hook_device(part) is None:
                raise ValueError(f"{name} must have weights, got one on the meta device, which holds none; load it")

    # Memory and speed

    def set_attention(self, name: str, slice_size: int | Literal["auto", "max"] = "auto") -> None:
        """Choose the attention of all networks; see `depthdiff.models.attention.AttentionMixin.set_attention`."""
        for network in self.networks.values():
            if hasattr(network, "set_attention"):
                network.set_attention(name, slice_size)

    def set_attention_slice(self, slice_size: int | Literal["auto", "max"] | None) -> None:
        """Compute attention for some heads at a time, in the networks that can; see `enable_attention_slicing`."""
        for network in self.networks.values():
            if hasattr(network, "set_attention_slice"):
                network.set_attention_slice(slice_size)

    def enable_attention_slicing(self, slice_size: int | Literal["auto", "max"] | None = "auto") -> None:
        """Compute the UNet's attention in several steps to save memory.

        Args:
            slice_size: "auto" for half of the heads at a time, "max" for one, a number for so many.
        """
        self.unet.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention in one step again."""
        self.enable_attention_slicing(None)

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Use torch's memory-efficient kernel, xFormers' own, in UNet and autoencoder; it wins over slicing.

        Args:
            attention_op: must be None: torch chooses the operator.
        """
        for name in ("unet", "vae"):
            getattr(self, name).enable_xformers_memory_efficient_attention(attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to slicing where that is on, else to torch's own choice of kernel."""
        for name in ("unet", "vae"):
            getattr(self, name).disable_xformers_memory_efficient_attention()

    def enable_vae_slicing(self) -> None:
        """Encode and decode one image of the batch at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode the whole batch at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images in overlapping tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode images whole."""
        self.vae.disable_tiling()

    # The progress bar

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Wrap an iterable, or count to `total`, in tqdm's bar with the settings of `set_progress_bar_config`."""
        if iterable is not None and not isinstance(iterable, Iterable):
            raise TypeError(f"iterable must be one, or None, got {show(iterable)}")
        total = total if total is None else check_number("total", total, 0, whole=True)
        return tqdm(iterable, **{"total": total, **self._progress_bar_config})

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Set tqdm's arguments for the bars of this pipeline, such as `disable=True`.

        Raises:
            TypeError: tqdm has no such argument, or not of this type.
        """
        check_bar(kwargs)
        self._progress_bar_config = kwargs


def summary(part: Any) -> str:
    """Describe a component in one line: its class, and of a network its size, dtype and device."""
    if not isinstance(part, torch.nn.Module):
        return "None" if part is None else type(part).__name__
    count = sum(weight.numel() for weight in part.parameters())
    return f"{type(part).__name__}, {count / 1e6:.1f} M parameters, {dtype_of(part)} on {device_of(part)}"
