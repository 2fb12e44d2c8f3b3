"""What every network shares: a config, a device and a dtype, loading and saving, and the switches of its attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from depthdiff.checks import show
from depthdiff.config import Config
from depthdiff.models.attention import AttentionName, use_attention
from depthdiff.models.pages import give_back_unwritten

if TYPE_CHECKING:
    from typing_extensions import Self


IMAGE_CHANNELS = 8
"""Pixels, depth and latents have no more channels than this; what reads them is a network's first convolution."""


class Body:
    """Base of what stands in the place of a method of one network; a copy of the network does without.

    Attributes:
        body: the method, or what stood in its place before.
    """

    body: Callable[..., Any]


class Model(nn.Module):
    """Base of the networks.

    Attributes:
        config: what the checkpoint fixes; the only argument of the constructor.
        config_class: its class.
        weights_name: stem of the weight file in the published layout.
        bodies: the methods that do the work, in whose place a `Body` may stand.
        mark: another object whenever weights are replaced rather than changed, as a cast or an adapter does.
    """

    config_class: ClassVar[type[Config]]
    weights_name: ClassVar[str]
    bodies: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            kind = self.config_class.__name__
            raise TypeError(f"config must be a {kind}, got {show(config)}; from_config also takes a dict")
        self.config = config
        self._slice_size: int | Literal["auto", "max"] | None = None
        self._efficient = False
        self.mark = object()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, Body)}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.dtype if next(self.parameters(), None) is not None else None
        super()._apply(fn, recurse)
        if before is not None and self.dtype != before:
            self.mark = object()
        return self

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network with random weights from a config or from the parsed JSON of one.

        Raises:
            CheckpointError: it describes no network of this class.
        """
        return cls(config if isinstance(config, cls.config_class) else cls.config_class.from_dict(config))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool | None = None,
    ) -> Self:
        """Load the network from a folder or from the Hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder that holds `config.json` and weights, or a Hub id.
            subfolder: of the folder or repository, such as "unet".
            torch_dtype: of the weights; float32 if absent, the file's own for "auto".
            variant: of the weight file, such as "fp16".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads lie; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            use_safetensors: True for these alone, False for pickles (`.bin`) alone, None for pickles where there is
                nothing else. Of a pickle, nothing but tensors is read, and nothing is run.

        Raises:
            CheckpointError: a file is missing or damaged, or describes a network that this class is not.
        """
        from depthdiff.checkpoint.loading import load_model  # deferred: the checkpoint package knows all models

        return load_model(
            cls,
            pretrained_model_name_or_path,
            subfolder=subfolder,
            torch_dtype=torch_dtype,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            use_safetensors=use_safetensors,
        )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load the network from one file in the layout of Stability's own code, which may hold others beside it.

        Args:
            pretrained_model_link_or_path: a file, the address of one on the Hub, or "owner/name/file.safetensors".
            config: folder or Hub id with its `config.json`; inferred from shapes if absent.
            subfolder: of `config`.
            torch_dtype: of the weights; float32 if absent, the file's own for "auto".
            revision: branch, tag or commit on the Hub, of the file.
            cache_dir: where downloads lie; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.

        Raises:
            CheckpointError: the file is missing, damaged, holds code, or has no such network.
        """
        from depthdiff.checkpoint.single_file import load_single_model  # deferred, as above

        return load_single_model(
            cls,
            pretrained_model_link_or_path,
            config=config,
            subfolder=subfolder,
            torch_dtype=torch_dtype,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write `config.json` and the weights in the published layout, all or nothing.

        Args:
            save_directory: the folder; made where it does not exist.
            safe_serialization: must be True: pickles are not written.
            variant: put into the file's name, such as "fp16".
            max_shard_size: bytes, or text such as "5GB"; larger weights are split into shards with an index.
        """
        from depthdiff.checkpoint.saving import save_model  # deferred, as above

        save_model(
            self, save_directory, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def use_fast_layout(self, device: torch.device | None = None) -> None:
        """Lay convolutions out with the channels last, where they are faster so: in half precision, and on a processor.

        On a processor float32 weights stay as they are, since torch rearranges them anyway, but for the first
        convolutions: their results, and what follows, have the layout of their weights. On another device these get
        the layout of the other convolutions back. The depth net's backbone makes its filters anew at every use and
        keeps torch's layout.

        Args:
            device: where the network is to work; that of its weights if absent.
        """
        convolutions = [layer for layer in layers_of(self) if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
        first = [layer for layer in convolutions if layer.in_channels <= IMAGE_CHANNELS]
        if self.dtype in (torch.float16, torch.bfloat16):
            wanted, changed = torch.channels_last, convolutions
        elif (device or self.device).type == "cpu":
            wanted, changed = torch.channels_last, first
        else:  # first ones that were rearranged for a processor
            others = (layer for layer in convolutions if layer.in_channels > IMAGE_CHANNELS)
            wanted = torch.contiguous_format
            changed = first if all(layer.weight.is_contiguous() for layer in others) else []
        for layer in changed:
            if not layer.weight.is_contiguous(memory_format=wanted):
                before = layer.weight.data
                with torch.inference_mode(False):  # weights made in inference mode could not be trained later
                    layer.to(memory_format=wanted)  # type: ignore[call-overload]
                give_back_unwritten(before)  # what is mapped from a file would count twice

    def num_parameters(self) -> int:
        """Count the weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def set_attention(self, name: AttentionName, slice_size: int | Literal["auto", "max"] = "auto") -> None:
        """Choose the form of attention: see `depthdiff.models.attention.use_attention`."""
        use_attention(self, name, slice_size)

    def set_attention_slice(self, slice_size: int | Literal["auto", "max"] | None) -> None:
        """Compute attention for some heads at a time ("auto" half of them, "max" one), or at once for None."""
        use_attention(self, "sdpa" if slice_size is None else "sliced", "auto" if slice_size is None else slice_size)
        self._slice_size = slice_size
        self._apply_switches()

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Use torch's memory-efficient kernel, which is xFormers' own; it takes precedence over slicing.

        Args:
            attention_op: must be None: torch chooses the operator.

        Raises:
            ValueError: an operator was given.
        """
        if attention_op is not None:
            raise ValueError(f"attention_op must be None, got {show(attention_op)}: torch chooses the operator itself")
        self._efficient = True
        self._apply_switches()

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to what slicing says, or to torch's own choice of kernel."""
        self._efficient = False
        self._apply_switches()

    def _apply_switches(self) -> None:
        if self._efficient:
            use_attention(self, "efficient")
        elif self._slice_size is not None:
            use_attention(self, "sliced", self._slice_size)
        else:
            use_attention(self, "sdpa")


def layers_of(network: nn.Module) -> list[nn.Module]:
    """List a network and all that is in it; several times faster than `modules()`, as it is done at every step."""
    layers = [network]
    for layer in layers:
        layers.extend(child for child in layer._modules.values() if child is not None)
    return layers


def hooked(network: nn.Module) -> bool:
    """Tell whether any layer has a hook on its way forward."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers_of(network))
