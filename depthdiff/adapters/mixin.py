"""The pipeline's methods for LoRA. Adapters are merged into the weights, so a step costs as much as without them."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from depthdiff.adapters.formats import COMPONENTS, lora_state, prefixed, read_file, read_lora, write_layers
from depthdiff.adapters.merging import AdapterState, Merging, Weight, check_weight, component_weight, scaled
from depthdiff.adapters.textual_inversion import TextualInversionLoaderMixin
from depthdiff.arguments import ADAPTER, sort_out, warn_of_pickles
from depthdiff.checks import check_flag, check_names, check_number, check_text, nearest
from depthdiff.models.peft import LORA_FILE

logger = logging.getLogger(__name__)

LORA_FILES = (LORA_FILE, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")


class LoraLoaderMixin(TextualInversionLoaderMixin, Merging):
    """Adds LoRA and textual inversion to the pipeline. Names and arguments are those of diffusers' mixin."""

    # Loading

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        **unused: Any,
    ) -> None:
        """Load a LoRA, LoCon, LoHa, LoKr or DoRA into UNet and text encoder; it becomes the only active one.

        The forms of diffusers (old and new), PEFT, kohya and LyCORIS are read; see `depthdiff.adapters.formats`.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub id, or tensors by name.
            adapter_name: for the methods below; "default_0" and so on if absent.
            hotswap: replace a loaded adapter of that name.
            weight_name: of the file in the folder or repository.
            subfolder: of the folder or repository.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            use_safetensors: refuse pickles if True.
            **unused: an argument of diffusers in `depthdiff.arguments.ADAPTER`.

        Raises:
            CheckpointError: the file is missing or damaged, or made for another model; nothing has changed then.
            TypeError: an unknown argument.
            ValueError: the name is taken.
        """
        token = sort_out(self.load_lora_weights, ADAPTER, {"token": token, **unused}, ("token",))["token"]
        check_text("adapter_name", adapter_name)
        name = self._free_name(adapter_name, hotswap)
        given = pretrained_model_name_or_path_or_dict
        state: Any = given
        settings: dict[str, Any] = {}
        source: object = f"adapter {name!r}"
        if not isinstance(given, Mapping):
            state, settings, source = read_file(
                given, LORA_FILES, weight_name=weight_name, subfolder=subfolder, use_safetensors=use_safetensors,
                revision=revision, cache_dir=cache_dir, token=token,
                local_files_only=local_files_only, force_download=force_download,
            )  # fmt: skip
        lora = read_lora(name, state, settings, self._adapted(), str(source))
        for warning in lora.warnings:
            logger.warning(warning)
        with self._turns.change("load_lora_weights"):
            name = self._free_name(adapter_name, hotswap)  # another thread may have loaded one meanwhile
            lora = replace(lora, name=name)
            self._become(replace(self._adapters, loras={**self._adapters.loras, name: lora}, active={name: 1.0}))

    def _free_name(self, adapter_name: str | None, hotswap: bool) -> str:
        loras = self._adapters.loras
        if adapter_name is None:
            return next(name for name in map("default_{}".format, itertools.count()) if name not in loras)
        if adapter_name in loras and not hotswap:
            raise ValueError(
                f"adapter_name {adapter_name!r} is taken; choose another, or delete_adapters({adapter_name!r}) first"
            )
        return adapter_name

    def unload_lora_weights(self) -> None:
        """Delete all adapters; fused ones stay in the weights until `unfuse_lora`, as in diffusers."""
        with self._turns.change("unload_lora_weights"):
            self._become(AdapterState(fused=self._adapters.fused))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters; if no active one is left, the first of the others becomes active."""
        with self._turns.change("delete_adapters"):
            gone = set(self._known(adapter_names))
            loras = {name: lora for name, lora in self._adapters.loras.items() if name not in gone}
            active = {name: weight for name, weight in self._adapters.active.items() if name not in gone}
            if loras and not active:
                active = {next(iter(loras)): 1.0}
            self._become(replace(self._adapters, loras=loras, active=active))

    # Which adapters are used, and how much

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight | None] | None = None
    ) -> None:
        """Make these adapters active, and no others.

        Args:
            adapter_names: one or several.
            adapter_weights: one for all, or one each; 1 if absent. A weight is a number, or a dict with numbers for
                "unet" and "text_encoder", or for "down", "mid" and "up" inside "unet", and for "block_1" and so on
                inside these; see `depthdiff.adapters.merging.Weight`.

        Raises:
            ValueError: an unknown name, or weights of another number or form.
        """
        names, given = self._known(adapter_names), adapter_weights
        weights: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights must be one, or one for each of {len(names)} names, got {len(weights)}")
        chosen = {name: 1.0 if weight is None else weight for name, weight in zip(names, weights, strict=True)}
        for weight in chosen.values():
            check_weight(weight, self._adapted()["unet"])
        with self._turns.change("set_adapters"):
            self._known(names)  # another thread may have deleted one meanwhile
            self._become(replace(self._adapters, active=chosen))

    def get_active_adapters(self) -> list[str]:
        """List the active adapters, also while they are disabled."""
        return list(self._adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """List the loaded adapters by the component that they change."""
        loras = self._adapters.loras.items()
        lists = {component: [name for name, lora in loras if component in lora.deltas] for component in COMPONENTS}
        return {component: names for component, names in lists.items() if names}

    def enable_lora(self) -> None:
        """Use the active adapters again."""
        with self._turns.change("enable_lora"):
            self._become(replace(self._adapters, enabled=True))

    def disable_lora(self) -> None:
        """Use the weights without any adapter that is not fused."""
        with self._turns.change("disable_lora"):
            self._become(replace(self._adapters, enabled=False))

    # Fusing

    @property
    def num_fused_loras(self) -> int:
        """The number of fused adapters."""
        return len(self.fused_loras)

    @property
    def fused_loras(self) -> set[str]:
        """The names of the fused adapters."""
        return {lora.name for fused in self._adapters.fused.values() for lora, _ in fused}

    def fuse_lora(
        self,
        components: str | Sequence[str] = COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        fuse_unet: bool = True,
        fuse_text_encoder: bool = True,
    ) -> None:
        """Make adapters part of the weights: they are saved with them, and scales and switches do not change them.

        Args:
            components: "unet", "text_encoder" or both.
            lora_scale: times the weight of each adapter; one that is fused already keeps what it was fused with.
            safe_fusing: ignored: a result that is not finite is always refused.
            adapter_names: those to fuse; the active ones if absent.
            fuse_unet: False leaves "unet" out of `components`.
            fuse_text_encoder: False leaves "text_encoder" out.

        Raises:
            ValueError: no adapter, an unknown one, or a result that is not finite; nothing has changed then.
        """
        components = _check_components(components, fuse_unet=fuse_unet, fuse_text_encoder=fuse_text_encoder)
        lora_scale = check_number("lora_scale", lora_scale, -1e6, 1e6)
        check_flag("safe_fusing", safe_fusing)
        with self._turns.change("fuse_lora"):
            names = self.get_active_adapters() if adapter_names is None else self._known(adapter_names)
            if not names:
                raise ValueError("fuse_lora needs an adapter, and none is active; call load_lora_weights first")
            state = self._adapters
            fused = dict(state.fused)
            for component, name in itertools.product(components, names):
                weight, lora = component_weight(state.active.get(name, 1.0), component), state.loras[name]
                before = fused.get(component, ())
                if component in lora.deltas and all(lora is not one for one, _ in before):
                    fused[component] = (*before, (lora, scaled(weight, lora_scale)))
            self._become(replace(state, fused=fused))

    def unfuse_lora(
        self,
        components: str | Sequence[str] = COMPONENTS,
        unfuse_unet: bool = True,
        unfuse_text_encoder: bool = True,
    ) -> None:
        """Remove fused adapters from the weights, bit for bit; arguments are those of `fuse_lora`."""
        gone = _check_components(components, unfuse_unet=unfuse_unet, unfuse_text_encoder=unfuse_text_encoder)
        with self._turns.change("unfuse_lora"):
            fused = {component: scales for component, scales in self._adapters.fused.items() if component not in gone}
            self._become(replace(self._adapters, fused=fused))

    # Saving

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        transformer_lora_layers: None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write trained LoRA layers, under published names, in the layout that diffusers loads.

        Args:
            save_directory: the folder; made where it does not exist.
            unet_lora_layers: a module, or tensors by name, such as `down_blocks...to_q.lora_A.weight`.
            text_encoder_lora_layers: the same, such as `text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight`.
            transformer_lora_layers: must be None: this model has no transformer.
            is_main_process: whether to write; of several processes one should.
            weight_name: of the file; "pytorch_lora_weights.safetensors" if absent.
            save_function: called with tensors and path instead of writing.
            safe_serialization: False is ignored, with a warning: pickles are never written.
            unet_lora_adapter_metadata: the settings of peft, `LoraConfig.to_dict()`, without which alpha and ranks are
                taken from the tensors alone; not written by a `save_function`.
            text_encoder_lora_adapter_metadata: the same, of the text encoder.

        Raises:
            TypeError: settings that are not a dict of what JSON holds.
            ValueError: no layers, or keys that are not a LoRA's.
        """
        if save_function is None:
            warn_of_pickles(safe_serialization)
        if transformer_lora_layers is not None:
            raise ValueError("transformer_lora_layers must be None: depth-to-image has a UNet")
        state = prefixed(unet_lora_layers, "unet") | prefixed(text_encoder_lora_layers, "text_encoder")
        if is_main_process:
            settings = {"unet": unet_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata}
            write_layers(save_directory, state, weight_name, save_function, settings)

    def save_lora_adapter(
        self, adapter_name: str, save_directory: str | os.PathLike[str], weight_name: str | None = None
    ) -> None:
        """Write a loaded adapter: LoRA in the layout of diffusers, all other methods in that of LyCORIS.

        Args:
            adapter_name: of the adapter.
            save_directory: the folder; made where it does not exist.
            weight_name: of the file; "pytorch_lora_weights.safetensors" if absent.
        """
        [name] = self._known(adapter_name)
        write_layers(save_directory, lora_state(self._adapters.loras[name], self._adapted()), weight_name)

    def _known(self, names: str | Sequence[str]) -> list[str]:
        names = check_names("adapter_names", names)
        for name in names:
            if name not in self._adapters.loras:
                loaded = ", ".join(map(repr, self._adapters.loras)) or "none"
                raise ValueError(
                    f"no adapter is called {name!r}, loaded: {loaded}{nearest(name, self._adapters.loras)}"
                )
        return names


def _check_components(components: str | Sequence[str], **wanted: bool) -> list[str]:
    """Return the names of components but those that a flag such as `fuse_unet` leaves out."""
    out = [name.partition("fuse_")[2] for name, flag in wanted.items() if not check_flag(name, flag)]
    names = check_names("components", components)
    for name in names or ["none"]:
        if name not in COMPONENTS:
            raise ValueError(f"components must be among {', '.join(COMPONENTS)}, got {name!r}")
    return [name for name in names if name not in out]
