"""PEFT's adapters in a network: the `peft` package (`pip install peft`) injects, switches and trains its layers.

Adapters from files, merged into the weights, are in `depthdiff.adapters`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from depthdiff.arguments import ADAPTER, sort_out, warn_of_pickles
from depthdiff.checkpoint.hub import HUB_ARGUMENTS, fetch, parse_json
from depthdiff.checkpoint.save import tensor_entry, write_safetensors
from depthdiff.checkpoint.transaction import check_folder, making
from depthdiff.checkpoint.weights import read_header
from depthdiff.checks import check_number, refuse_values, show
from depthdiff.config import CheckpointError

LORA_FILE = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"
"""Key of PEFT's settings in the header of diffusers' files."""
LOWER = ".lora_A.weight"


class PeftAdapterMixin:
    """Base of the networks into which PEFT's layers can be injected."""

    _hf_peft_config_loaded = False
    peft_config: dict[str, Any]

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Inject an adapter with random weights, and activate it alone.

        Args:
            adapter_config: of peft, such as `LoraConfig(r=4, target_modules=["to_q", "to_v"])`.
            adapter_name: a name that is not in use.

        Raises:
            ImportError: peft is not installed.
            ValueError: the name is in use, or the config is not peft's.
        """
        peft = _peft()
        if self._hf_peft_config_loaded and adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name} already exists; choose another adapter_name")
        if not isinstance(adapter_config, peft.PeftConfig):
            raise ValueError(f"adapter_config must be a PeftConfig of peft, got {show(adapter_config)}")
        adapter_config.base_model_name_or_path = None
        peft.inject_adapter_in_model(adapter_config, self, adapter_name)
        self._hf_peft_config_loaded = True
        self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Use these adapters alone.

        Raises:
            ValueError: there is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._need(names)
        for layer in self._tuner_layers():
            layer.set_adapter(names)

    def active_adapters(self) -> list[str]:
        """List the adapters in use.

        Raises:
            ValueError: no adapter was added.
        """
        self._need([])
        layer = next(self._tuner_layers(), None)
        return [] if layer is None else list(layer.active_adapters)

    def disable_adapters(self) -> None:
        """Compute without adapters, and keep them."""
        self._need([])
        for layer in self._tuner_layers():
            layer.enable_adapters(enabled=False)

    def enable_adapters(self) -> None:
        """Compute with the active adapters."""
        self._need([])
        for layer in self._tuner_layers():
            layer.enable_adapters(enabled=True)

    disable_lora, enable_lora = disable_adapters, enable_adapters

    def set_adapters(
        self, adapter_names: str | list[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Use these adapters, each multiplied by a weight; 1 where that is None."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        shares = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if len(shares) != len(names):
            raise ValueError(f"weights must hold one number for each of {len(names)} adapters, got {len(shares)}")
        self.set_adapter(names)
        for layer in self._tuner_layers():
            for name, share in zip(names, shares, strict=True):
                if name in layer.scaling:
                    layer.set_scale(name, 1.0 if share is None else share)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Remove adapters.

        Raises:
            ValueError: there is no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._need(names)
        for name in names:
            for layer in self._tuner_layers():
                layer.delete_adapter(name)
            self.peft_config.pop(name)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add the adapters, multiplied by `lora_scale`, to the weights themselves until `unfuse_lora`.

        Args:
            lora_scale: of the adapters.
            safe_fusing: refuse a result that holds NaN.
            adapter_names: to be fused; the active ones if None.
        """
        self._need(adapter_names or [])
        for layer in self._tuner_layers():
            chosen = layer.active_adapters if adapter_names is None else adapter_names
            for name in set(chosen) & layer.scaling.keys() - set(layer.merged_adapters):
                vars(layer).setdefault("_scaling_before_fusing", {})[name] = layer.scaling[name]
                layer.scaling[name] *= lora_scale  # until `unfuse_lora`, which subtracts what was added
            layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names)

    def unfuse_lora(self) -> None:
        """Remove fused adapters from the weights."""
        self._need([])
        for layer in self._tuner_layers():
            layer.unmerge()
            layer.scaling.update(vars(layer).pop("_scaling_before_fusing", {}))

    def unload_lora(self) -> None:
        """Remove all adapters: restore the layers that PEFT's replace."""
        self._need([])
        for name, layer in list(self.named_modules()):  # type: ignore[attr-defined]
            if isinstance(layer, _peft().tuners.tuners_utils.BaseTunerLayer):
                path, _, last = name.rpartition(".")
                parent: nn.Module = self.get_submodule(path)  # type: ignore[attr-defined]
                parent._modules[last] = layer.get_base_layer()
        del self.peft_config
        self._hf_peft_config_loaded = False

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write an adapter's weights and settings into a folder, as diffusers does.

        Args:
            save_directory: the folder; made if it does not exist.
            adapter_name: of the adapter.
            upcast_before_saving: write float32.
            safe_serialization: False is ignored, with a warning: pickles are never written.
            weight_name: of the file; "pytorch_lora_weights.safetensors" if None.

        Raises:
            ValueError: there is no such adapter.
        """
        warn_of_pickles(safe_serialization)
        self._need([adapter_name])
        state = _peft().get_peft_model_state_dict(self, adapter_name=adapter_name)
        settings = self.peft_config[adapter_name].to_dict()
        text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        entries = [tensor_entry(key, one.float() if upcast_before_saving else one) for key, one in state.items()]
        folder = check_folder("save_directory", save_directory)
        with making(folder):
            write_safetensors(folder / (weight_name or LORA_FILE), entries, metadata={SETTINGS: text})

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        prefix: str | None = "unet",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **hub: Any,
    ) -> None:
        """Inject an adapter with the weights of a file or dict, such as those that `save_lora_adapter` writes.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a Hub id, a file, or tensors by name.
            prefix: of the keys to read; None for keys without one.
            hotswap: must be False.
            adapter_name: a name that is not in use; "default_0" and so on if None.
            weight_name: of the file; "pytorch_lora_weights.safetensors" if None.
            subfolder: of the folder or repository.
            **hub: see `depthdiff.checkpoint.hub.fetch`; or an argument of diffusers in `depthdiff.arguments.ADAPTER`.

        Raises:
            CheckpointError: the file is missing or damaged, or does not fit any layer.
            TypeError: an unknown argument.
            ValueError: the name is in use.
        """
        hub = sort_out(self.load_lora_adapter, ADAPTER, hub, HUB_ARGUMENTS)
        refuse_values("load_lora_adapter", hotswap=(hotswap, False))
        given, settings, source = pretrained_model_name_or_path_or_dict, {}, "the dict given"
        if not isinstance(given, Mapping):
            path = Path(given)
            if not path.is_file():
                name = weight_name or LORA_FILE
                path = fetch(given, [name], subfolder=subfolder, **hub) / name
            sources, header = read_header(path)
            text = header.get(SETTINGS, "{}").encode("utf-8", "surrogatepass")
            settings, source = parse_json(text, path, SETTINGS), str(path)
            given = {key: tensor.get() for key, tensor in sources.items()}
        start = "" if prefix is None else f"{prefix}."
        state = {key.removeprefix(start): tensor for key, tensor in given.items() if key.startswith(start)}
        for old, new in ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B.")):  # diffusers' older files
            state = {key.replace(old, new): tensor for key, tensor in state.items()}
        ranks = {key.removesuffix(LOWER): len(tensor) for key, tensor in state.items() if key.endswith(LOWER)}
        if not ranks:
            raise CheckpointError(f"{source} has no key such as '{start}...{LOWER}'; pass another prefix")
        used = getattr(self, "peft_config", {})
        name = adapter_name or next(f"default_{i}" for i in range(len(used) + 1) if f"default_{i}" not in used)
        alpha = settings.get("lora_alpha", next(iter(ranks.values())))
        chosen = {"rank_pattern": ranks, "target_modules": list(ranks), "lora_alpha": alpha}
        chosen |= {key: settings[key] for key in ("use_rslora", "use_dora", "alpha_pattern") if key in settings}
        if "lora_alpha" not in settings:
            chosen["alpha_pattern"] = ranks
        self.add_adapter(_peft().LoraConfig(r=next(iter(ranks.values())), **chosen), name)
        wrong = _peft().set_peft_model_state_dict(self, state, name).unexpected_keys
        if wrong:
            self.delete_adapters(name)
            raise CheckpointError(f"{source}: {len(wrong)} keys fit no layer, first: {sorted(wrong)[0]!r}")

    def save_attn_procs(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the active adapter: the name of `save_lora_adapter` in older training scripts."""
        refuse_values("save_attn_procs", save_function=(save_function, None))
        name = self.active_adapters()[0]
        if is_main_process:
            self.save_lora_adapter(save_directory, name, weight_name=weight_name, safe_serialization=safe_serialization)

    def load_attn_procs(
        self, pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor], **kwargs: Any
    ) -> None:
        """Inject an adapter whose keys have no prefix: the name of `load_lora_adapter` in older scripts."""
        self.load_lora_adapter(pretrained_model_name_or_path_or_dict, **{"prefix": None, **kwargs})

    def _need(self, names: list[str]) -> None:
        """Refuse names without an adapter."""
        if not self._hf_peft_config_loaded:
            raise ValueError("No adapter loaded. Please load an adapter first, with add_adapter")
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"adapter_name must be one of {', '.join(self.peft_config)}, got {name!r}")

    def _tuner_layers(self) -> Iterator[Any]:
        kind = _peft().tuners.tuners_utils.BaseTunerLayer
        return (layer for layer in self.modules() if isinstance(layer, kind))  # type: ignore[attr-defined]

    @contextmanager
    def _scaled_adapters(self, kwargs: dict[str, Any] | None) -> Iterator[None]:
        """Multiply PEFT's adapters by the "scale" of `cross_attention_kwargs` for one call; None is 1."""
        scale = (kwargs or {}).get("scale")
        if not self._hf_peft_config_loaded or scale is None or scale == 1:
            yield
            return
        layers = list(self._tuner_layers())
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scale_layer(check_number("scale", scale))
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters of PEFT need the peft package: pip install peft") from error
    return peft
