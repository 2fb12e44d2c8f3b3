"""What a pipeline does with checkpoints in a single file: it is made from one, or takes networks from one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from depthdiff.checkpoint.single_pipeline import load_into, load_single_components
from depthdiff.checks import nearest
from depthdiff.components import Components

if TYPE_CHECKING:
    from typing_extensions import Self


class SingleFiles(Components):
    """Adds single files to the components."""

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
            prediction_type: what the UNet predicts, which no weight tells; "epsilon" if absent.
            revision: branch, tag or commit on the Hub, of the file.
            cache_dir: where downloads lie; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.
            **components: ready components by name, used instead of the file's, or where the file has none.

        Raises:
            CheckpointError: the file is missing, damaged, holds code, or is of a model without depth.
            TypeError: an unknown argument.
            ValueError: `prediction_type` beside a scheduler, or components that do not fit each other.
        """
        for name in sorted(components.keys() - set(cls.NAMES)):
            raise TypeError(f"from_single_file got an unknown argument {name!r}{nearest(name, cls.NAMES)}")
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
        pipeline = cls(**parts)
        pipeline.name_or_path = os.fspath(pretrained_model_link_or_path)
        return pipeline

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
        """Put the networks that a file holds in the place of the pipeline's: a fine-tuned UNet, a better autoencoder.

        They keep the configs, dtypes and devices of those they replace. All are replaced or none.

        Args:
            pretrained_model_link_or_path: as in `from_single_file`; a whole checkpoint or one network, with or without
                the prefix that it has in a whole one.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads lie; huggingface_hub's own cache if absent.
            token: for gated repositories.
            local_files_only: never ask the network.
            force_download: ignore the cache.

        Returns:
            The names of the components that were replaced.

        Raises:
            CheckpointError: the file is missing, damaged, or its networks are of another geometry.
            ValueError: adapters are loaded or offloading is on; both hold on to the present weights. Or the file has
                a UNet, and the pipeline's lies in fewer bits than it works in.
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
            vars(self).update(loaded)
        return list(loaded)
