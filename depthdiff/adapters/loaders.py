"""LoRA in the pipeline: adapters are merged into the weights, so that a step costs what it costs without them.

See `depthdiff.adapters.merging` for how.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from depthdiff.adapters.files import find_file, read_file
from depthdiff.adapters.lora import read_lora
from depthdiff.adapters.merging import AdapterState, Merging
from depthdiff.adapters.names import COMPONENTS
from depthdiff.adapters.saving import lora_state, prefixed, write_layers
from depthdiff.adapters.textual_inversion import TextualInversionLoaderMixin
from depthdiff.adapters.weights import Weight, check_components, check_weight, component_weight, scaled
from depthdiff.checks import check_flag, check_names, check_number, check_path, check_text, nearest

logger = logging.getLogger(__name__)

LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors",
              "adapter_model.bin")  # fmt: skip


class LoraLoaderMixin(TextualInversionLoaderMixin, Merging):
    """Adds LoRA and learnt words to the components. Names and arguments are those of diffusers' mixin."""

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
        proxies: None = None,
        resume_download: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
    ) -> None:
        """Load a LoRA, LoCon, LoHa, LoKr or DoRA into UNet and text encoder; it becomes the one that is active.

        The forms of diffusers (old and new), PEFT, kohya and LyCORIS are read; see `depthdiff.adapters.names`.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub id, or tensors by name.
            adapter_name: for the methods below; "default_0" and so on if absent.
            hotswap: take the place of a loaded adapter of that name.
            weight_name: of the file in the folder or repository.
            subfolder: of the folder or repository.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            use_safetensors: refuse pickles if True.
            proxies: must be None: they are read from HTTPS_PROXY.
            resume_download: ignored: downloads always go on where they stopped.
            low_cpu_mem_usage: ignored.

        Raises:
            CheckpointError: the file is missing or damaged, or made for another model; nothing has changed then.
            ValueError: the name is taken.
        """
        check_text("adapter_name", adapter_name)
        name = self._free_name(adapter_name, hotswap)
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            settings: dict[str, Any] = {}
            state, source = pretrained_model_name_or_path_or_dict, f"adapter {name!r}"
        else:
            check_path("the adapter's name", pretrained_model_name_or_path_or_dict)
            path = find_file(
                pretrained_model_name_or_path_or_dict,
                LORA_FILES,
                weight_name=weight_name,
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
                use_safetensors=use_safetensors,
                proxies=proxies,
            )
            (state, settings), source = read_file(path), str(path)
        lora = read_lora(name, state, settings, self._adapted(), source)
        for note in lora.notes:
            logger.warning(note)
        with self._turns.change("load_lora_weights"):
            name = self._free_name(adapter_name, hotswap)  # another thread may have loaded one meanwhile
            lora = replace(lora, name=name)
            self._become(replace(self._adapters, loras={**self._adapters.loras, name: lora}, active={name: 1.0}))

    def _free_name(self, adapter_name: str | None, hotswap: bool) -> str:
        """Return the name of a new adapter, or refuse one that is taken."""
        loras = self._adapters.loras
        if adapter_name is None:
            return next(name for name in map("default_{}".format, itertools.count()) if name not in loras)
        if adapter_name in loras and not hotswap:
            raise ValueError(
                f"adapter_name {adapter_name!r} is taken; choose another, or delete_adapters({adapter_name!r}) first"
            )
        return adapter_name

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what is fused stays fused until `unfuse_lora`, as in diffusers."""
        with self._turns.change("unload_lora_weights"):
            self._become(AdapterState(fused=self._adapters.fused))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget some adapters; where none of the active ones is left, the first of the others becomes active."""
        with self._turns.change("delete_adapters"):
            gone = set(self._known(adapter_names))
            loras = {name: lora for name, lora in self._adapters.loras.items() if name not in gone}
            active = {name: weight for name, weight in self._adapters.active.items() if name not in gone}
            if loras and not active:
                active = {next(iter(loras)): 1.0}
            self._become(replace(self._adapters, loras=loras, active=active))

    # Which adapters count, and how much

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight | None] | None = None
    ) -> None:
        """Make these adapters active, and no others.

        Args:
            adapter_names: one or several.
            adapter_weights: one for all, or one each; 1 if absent. A weight is a number, or a dict with numbers for
                "unet" and "text_encoder", or for "down", "mid" and "up" inside "unet", and for "block_1" and so on
                inside these; see `depthdiff.adapters.weights.Weight`.

        Raises:
            ValueError: an unknown name, or weights of another number or form.
        """
        names = self._known(adapter_names)
        one = not isinstance(adapter_weights, (list, tuple))
        weights: list[Any] = [adapter_weights] * len(names) if one else list(adapter_weights)  # type: ignore[arg-type]
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights must be one, or one for each of {len(names)} names, got {len(weights)}")
        chosen = {name: 1.0 if weight is None else weight for name, weight in zip(names, weights, strict=True)}
        for weight in chosen.values():
            check_weight(weight, self._adapted()["unet"])
        with self._turns.change("set_adapters"):
            self._known(names)  # another thread may have deleted one meanwhile
            self._become(replace(self._adapters, active=chosen))

    def get_active_adapters(self) -> list[str]:
        """Name the adapters that count, also while they are disabled."""
        return list(self._adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Name the loaded adapters by the component that they change."""
        lists = {
            part: [name for name, lora in self._adapters.loras.items() if part in lora.deltas] for part in COMPONENTS
        }
        return {part: names for part, names in lists.items() if names}

    def enable_lora(self) -> None:
        """Let the active adapters count again."""
        with self._turns.change("enable_lora"):
            self._become(replace(self._adapters, enabled=True))

    def disable_lora(self) -> None:
        """Use the weights without any adapter that is not fused."""
        with self._turns.change("disable_lora"):
            self._become(replace(self._adapters, enabled=False))

    # Fusing

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused."""
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
    ) -> None:
        """Make adapters part of the weights: they are saved with them, and neither scales nor switches touch them.

        Args:
            components: "unet", "text_encoder" or both.
            lora_scale: times the weight of each adapter; one that is fused already keeps what it was fused with.
            safe_fusing: ignored: a result that is not finite is always refused.
            adapter_names: those to fuse; the active ones if absent.

        Raises:
            ValueError: no adapter, an unknown one, or a result that is not finite; nothing has changed then.
        """
        components = check_components(components)
        lora_scale = check_number("lora_scale", lora_scale, -1e6, 1e6)
        check_flag("safe_fusing", safe_fusing)
        with self._turns.change("fuse_lora"):
            names = self.get_active_adapters() if adapter_names is None else self._known(adapter_names)
            if not names:
                raise ValueError("fuse_lora needs an adapter, and none is active; call load_lora_weights first")
            state = self._adapters
            fused = dict(state.fused)
            for component in components:
                for name in names:
                    share, lora = component_weight(state.active.get(name, 1.0), component), state.loras[name]
                    known = [one for one, _ in fused.get(component, ())]
                    if component in lora.deltas and lora not in known:
                        fused[component] = (*fused.get(component, ()), (lora, scaled(share, lora_scale)))
            self._become(replace(state, fused=fused))

    def unfuse_lora(self, components: str | Sequence[str] = COMPONENTS) -> None:
        """Take fused adapters out of the weights again, bit for bit."""
        with self._turns.change("unfuse_lora"):
            gone = check_components(components)
            fused = {component: shares for component, shares in self._adapters.fused.items() if component not in gone}
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
    ) -> None:
        """Write trained LoRA layers, under published names, in the layout that diffusers loads.

        Args:
            save_directory: the folder; made where it does not exist.
            unet_lora_layers: a module, or tensors by name, such as `down_blocks...to_q.lora_A.weight`.
            text_encoder_lora_layers: the same, such as `text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight`.
            transformer_lora_layers: must be None: this model has no transformer.
            is_main_process: write at all; of several processes one should.
            weight_name: of the file; "pytorch_lora_weights.safetensors" if absent.
            save_function: called with tensors and path instead of writing.
            safe_serialization: must be True: pickles are not written.

        Raises:
            ValueError: no layers, keys that are no LoRA's, or `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True, got False: pickles are not written")
        if transformer_lora_layers is not None:
            raise ValueError("transformer_lora_layers must be None: depth-to-image has a UNet")
        state = prefixed(unet_lora_layers, "unet") | prefixed(text_encoder_lora_layers, "text_encoder")
        if is_main_process:
            write_layers(save_directory, state, weight_name, save_function)

    def save_lora_adapter(
        self, adapter_name: str, save_directory: str | os.PathLike[str], weight_name: str | None = None
    ) -> None:
        """Write a loaded adapter: LoRA in the layout of diffusers, LoHa, LoKr, DoRA and the like in that of LyCORIS.

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
