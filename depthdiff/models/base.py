"""What every network shares: device and dtype, loading and saving, its config, and gradient checkpointing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from depthdiff.arguments import SAVING, SINGLE_FILE, WEIGHTS, sort_out
from depthdiff.checkpoint.hub import HUB_ARGUMENTS
from depthdiff.checkpoint.loading import ConfigMixin, load_model
from depthdiff.checkpoint.save import save_model
from depthdiff.checkpoint.single_file import load_single_model
from depthdiff.checks import check_flag, check_number, read_device_map, show
from depthdiff.config import Config, constructor_fields
from depthdiff.hooks import enable_layerwise_casting as cast_layers
from depthdiff.hooks import refuse_to_cast

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")
CheckpointFunction = Callable[..., Any]


class Network(nn.Module):
    """Base of the networks.

    Attributes:
        weights_name: stem of the weight file in the published layout.
        gradient_checkpointing: on the submodules that have it, whether they compute their layers again for gradients.
    """

    weights_name: ClassVar[str]
    _gradient_checkpointing_func: CheckpointFunction | None = None
    _storage_dtype: torch.dtype | None = None
    _compute_dtype: torch.dtype | None = None

    @property
    def storage_dtype(self) -> torch.dtype | None:
        """The dtype in which layerwise casting stores the weights; None without it."""
        return self._storage_dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights compute."""
        return self._compute_dtype or next((p.dtype for p in self.parameters()), torch.float32)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the weights.

        Args:
            only_trainable: count those that get gradients alone.
            exclude_embeddings: leave out tables of embeddings.
        """
        tables = {id(layer.weight) for layer in self.modules() if isinstance(layer, nn.Embedding)}
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if not (exclude_embeddings and id(p) in tables))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Count the bytes of the weights, and of the buffers."""
        tensors: list[Tensor] = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    @classmethod
    def _build(cls, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        """Build the network from the parsed JSON of a config file."""
        raise NotImplementedError(f"{cls.__name__} has no config")

    @classmethod
    def _config_fields(cls) -> list[str]:
        """List the settings that a caller may override when loading."""
        return []

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        disable_mmap: bool = False,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load the network from a folder or from the Hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder that holds `config.json` and weights, or a Hub id.
            subfolder: of the folder or repository, such as "unet".
            torch_dtype: of the weights; float32 if absent, the file's own for "auto".
            variant: of the weight file, such as "fp16".
            use_safetensors: True for these alone, False for pickles (`.bin`) alone, None for pickles where there is
                nothing else. Of a pickle, only tensors are read, and nothing is run.
            low_cpu_mem_usage: False copies the weights into memory of the process; else their file is mapped.
            disable_mmap: another name of `low_cpu_mem_usage=False`.
            device_map: where to move the network, see `depthdiff.checks.read_device_map`.
            dtype: another name of `torch_dtype`.
            output_loading_info: also return which keys were missing, unexpected or of another shape: none ever are.
            **kwargs: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` for the Hub; settings
                that replace those of the config; or an argument of diffusers in `depthdiff.arguments.WEIGHTS`.

        Returns:
            The network; with `output_loading_info`, a tuple of it and a dict of lists.

        Raises:
            CheckpointError: a file is missing or damaged, or describes a network that this class is not.
            TypeError: an unknown argument.
            ValueError: an argument that is refused.
        """
        known = (*HUB_ARGUMENTS, *cls._config_fields())
        kwargs = sort_out(cls.from_pretrained, WEIGHTS, kwargs, known)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        device = read_device_map(device_map)
        loaded = load_model(
            cls,
            pretrained_model_name_or_path,
            subfolder=subfolder,
            torch_dtype=torch_dtype if torch_dtype is not None else dtype,
            variant=variant,
            use_safetensors=use_safetensors,
            copy=check_flag("disable_mmap", disable_mmap) or low_cpu_mem_usage is False,
            overrides=kwargs,
            **hub,
        )
        if device is not None:
            loaded.to(device)
        nothing = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (loaded, {name: [] for name in nothing}) if output_loading_info else loaded

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        **hub: Any,
    ) -> Self:
        """Load the network from one file in the layout of Stability's own code, which may hold others beside it.

        Args:
            pretrained_model_link_or_path: a file, the address of one on the Hub, or "owner/name/file.safetensors".
            config: folder or Hub id with its `config.json`; inferred from shapes if absent.
            subfolder: of `config`.
            torch_dtype: of the weights; float32 if absent, the file's own for "auto".
            dtype: another name of `torch_dtype`.
            device_map: where to move the network, see `depthdiff.checks.read_device_map`.
            device: another name of `device_map`.
            **hub: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` for the Hub;
                `scaling_factor` of an autoencoder; or an argument of diffusers in `depthdiff.arguments.SINGLE_FILE`.

        Raises:
            CheckpointError: the file is missing, damaged, holds code, or has no such network.
            TypeError: an unknown argument.
            ValueError: an argument that is refused.
        """
        own = {"scaling_factor"} & set(cls._config_fields())
        hub = sort_out(cls.from_single_file, SINGLE_FILE, hub, (*HUB_ARGUMENTS, *own))
        settings = {name: check_number(name, hub.pop(name), 1e-6, 1e6) for name in own & hub.keys()}
        place = read_device_map(device if device_map is None else device_map)
        loaded: Self = load_single_model(
            cls,
            pretrained_model_link_or_path,
            config=hub.pop("config", config),
            subfolder=subfolder,
            torch_dtype=dtype if torch_dtype is None else torch_dtype,
            **hub,
        )
        if settings:
            loaded.register_to_config(**settings)  # type: ignore[operator]
        return loaded if place is None else loaded.to(place)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **unused: Any,
    ) -> None:
        """Write `config.json` and the weights in the published layout, all or nothing.

        Args:
            save_directory: the folder; made where it does not exist.
            is_main_process: whether to write; of several processes one should.
            save_function: ignored: weights are written as safetensors.
            safe_serialization: False is ignored, with a warning: pickles are never written.
            variant: put into the file's name, such as "fp16".
            max_shard_size: bytes, or text such as "5GB"; larger weights are split into shards with an index.
            **unused: arguments of diffusers in `depthdiff.arguments.SAVING`.

        Raises:
            TypeError: an unknown argument, or one of a wrong type.
            ValueError: `push_to_hub`, or a size or variant that no file can have.
        """
        sort_out(self.save_pretrained, SAVING, {"save_function": save_function, **unused})
        if check_flag("is_main_process", is_main_process):
            save_model(
                self, save_directory, safe_serialization=safe_serialization, variant=variant,
                max_shard_size=max_shard_size,
            )  # fmt: skip

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True if any layer is recomputed for its gradients."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_gradient_checkpointing(self, enable: bool, function: CheckpointFunction | None = None) -> None:
        modules: list[Any] = [module for module in self.modules() if "gradient_checkpointing" in vars(module)]
        if not modules:
            raise ValueError(f"{type(self).__name__} does not support gradient checkpointing")
        for module in modules:
            module.gradient_checkpointing = enable
            module._gradient_checkpointing_func = function if enable else None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        refuse_to_cast(self, fn)
        return super()._apply(fn, recurse)


class ModelMixin(ConfigMixin, Network):
    """Base of the networks that diffusers publishes: built from keyword arguments, which are their config."""

    weights_name = "diffusion_pytorch_model"
    _supports_gradient_checkpointing: ClassVar[bool] = False
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    _no_split_modules: ClassVar[list[str] | None] = None
    _repeated_blocks: ClassVar[list[str] | None] = None

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return self._from_config(name)

    @classmethod
    def _build(cls, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        return cls.from_config(config, **overrides)  # type: ignore[return-value]

    @classmethod
    def _config_fields(cls) -> list[str]:
        return list(constructor_fields(cls))

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: CheckpointFunction | None = None) -> None:
        """Keep the inputs of layers alone for the gradients, and compute the rest again. Source: arXiv:1604.06174.

        Args:
            gradient_checkpointing_func: (layer, *args, **kwargs) -> the layer's result; torch's if None.

        Raises:
            ValueError: the network does not support it.
        """
        self._set_gradient_checkpointing(True, gradient_checkpointing_func)

    def disable_gradient_checkpointing(self) -> None:
        """Keep everything for the gradients."""
        self._set_gradient_checkpointing(False)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: str | tuple[str, ...] | None = None,
        skip_modules_classes: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the weights in fewer bits than they compute in; see `depthdiff.hooks.enable_layerwise_casting`."""
        cast_layers(self, storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, non_blocking)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: None = None) -> None:
        """Choose the kernel that never holds the attention matrix, in every layer, or the default one.

        Raises:
            ValueError: `attention_op` is given: torch chooses the operator.
        """
        check_flag("valid", valid)
        modules: list[Any] = list(self.modules())
        for module in modules:
            if module is not self and hasattr(module, "set_use_memory_efficient_attention_xformers"):
                module.set_use_memory_efficient_attention_xformers(valid, attention_op)

    def enable_xformers_memory_efficient_attention(self, attention_op: None = None) -> None:
        """Use torch's memory-efficient kernel, which is xFormers' own.

        Raises:
            ValueError: `attention_op` is given: torch chooses the operator.
        """
        self.set_use_memory_efficient_attention_xformers(True, attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Use torch's own attention kernels."""
        self.set_use_memory_efficient_attention_xformers(False)


class PreTrainedModel(Network):
    """Base of the networks that transformers publishes: built from a config object.

    Attributes:
        config: what the checkpoint fixes.
        config_class: its class.
    """

    weights_name = "model"
    config_class: ClassVar[type[Config]]
    supports_gradient_checkpointing: ClassVar[bool] = False
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            kind = self.config_class.__name__
            raise TypeError(f"config must be a {kind}, got {show(config)}; from_config also takes a dict")
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network with random weights from a config or from the parsed JSON of one.

        Raises:
            CheckpointError: it describes no network of this class.
        """
        return cls(config if isinstance(config, cls.config_class) else cls.config_class.from_dict(config))

    @classmethod
    def _build(cls, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        return cls.from_config({**config, **overrides} if overrides else config)

    def to_json_string(self) -> str:
        """Write the config as JSON, sorted, with the class it belongs to."""
        head = {"architectures": [type(self).__name__], "model_type": self.config_class.model_type}
        return json.dumps(self.config.to_dict() | head, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _config_fields(cls) -> list[str]:
        return list(constructor_fields(cls.config_class))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keep the inputs of layers alone for the gradients, and compute the rest again. Source: arXiv:1604.06174.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.

        Raises:
            ValueError: the network does not support it.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

        def function(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return checkpoint(layer, *args, **options, **kwargs)

        self._set_gradient_checkpointing(True, function if gradient_checkpointing_kwargs else None)

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the gradients."""
        self._set_gradient_checkpointing(False)


def recomputed(module: Any) -> CheckpointFunction:
    """Return what calls the layers of `module`: directly, or through checkpointing where gradients need it."""
    if module.gradient_checkpointing and torch.is_grad_enabled():
        return module._gradient_checkpointing_func or checkpoint_layer
    return call_layer


def call_layer(layer: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a layer."""
    return layer(*args, **kwargs)


def checkpoint_layer(layer: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a layer, and let its gradients compute it again."""
    return checkpoint(layer, *args, use_reentrant=False, **kwargs)
