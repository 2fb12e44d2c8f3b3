"""The text transformer: tokens to the context that the UNet attends to. Source: arXiv:2103.00020, sec. 2.4.

Letters: B batch, L tokens (77 in Stable Diffusion), C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.config import Config, Output
from depthdiff.models.attention import MultiHeadAttention
from depthdiff.models.base import Model
from depthdiff.models.layers import ACTIVATIONS
from depthdiff.models.plain import fuses_linear, is_bare, is_linear

PARTS, FEWEST_WEIGHTS = 4, 2**20
"""In so many parts of its width a feed-forward goes on a processor, each added to those before it, and from so many
weights of a layer on, since the products copy what they read: two prompts take 4 MiB in place of 9 in bfloat16, 8 in
place of 13 in float32, in 1.05 of the time."""


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """What a checkpoint fixes about the text encoder; names and defaults are those of the published `config.json`.

    Stable Diffusion 2 reads the last layer but one of OpenCLIP's 24: its file has 23 layers, and all of them run.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    COUNTS: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)
    POSITIVE: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "layer_norm_eps")
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "use_attention_mask": (None, False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if self[name] < 1:
                raise ValueError(f"{name} must be positive, got {self[name]}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of {self.num_attention_heads} heads")


@dataclass
class CLIPTextOutput(Output):
    """What the text encoder returns.

    Attributes:
        last_hidden_state: (B, L, C), after the final norm.
        pooler_output: (B, C), that of each text's end token.
        hidden_states: the embeddings and every layer's result, (B, L, C) each, before the final norm, if asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class EncoderLayer(nn.Module):
    """Causal self-attention and a feed-forward, each after a norm and around a short cut."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, config.layer_norm_eps)
        self.self_attn = MultiHeadAttention(dim, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(dim, config.layer_norm_eps)
        self.fc1 = nn.Linear(dim, config.intermediate_size)
        self.act = ACTIVATIONS[config.hidden_act]()
        self.fc2 = nn.Linear(config.intermediate_size, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C); `mask` as in `depthdiff.models.attention`."""
        x = x + self.self_attn(self.norm1(x), mask=mask)
        return x + self._feed(self.norm2(x))

    def _feed(self, x: Tensor) -> Tensor:
        if not self._goes_by_parts(x):
            return self.fc2(self.act(self.fc1(x)))
        tokens = x.flatten(0, 1)
        out: Tensor = self.fc2.bias
        weights = self.fc1.weight.chunk(PARTS), self.fc1.bias.chunk(PARTS), self.fc2.weight.chunk(PARTS, dim=1)
        fused = type(self.act) is nn.GELU and self.act.approximate == "none" and fuses_linear(x, self.fc1)
        for weight, bias, back in zip(*weights, strict=True):
            if fused:
                part = torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "gelu", [], "none")
            else:
                part = self.act(F.linear(tokens, weight, bias))
            out = torch.addmm(out, part, back.t())
        return out.view_as(x)

    def _goes_by_parts(self, x: Tensor) -> bool:
        if type(self.act) not in ACTIVATIONS.values() or not is_bare(self.act):
            return False
        return is_linear(x, self.fc1) and is_linear(x, self.fc2) and self.fc2.weight.numel() >= FEWEST_WEIGHTS


class CLIPTextModel(Model):
    """CLIP's text transformer, frozen.

    Args:
        config: its geometry.
    """

    config_class = CLIPTextConfig
    weights_name = "model"
    bodies = ("forward",)
    config: CLIPTextConfig

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CLIPTextOutput | tuple[Any, ...]:
        """Read texts.

        Args:
            input_ids: (B, L), int64, token numbers; L at most `max_position_embeddings`.
            attention_mask: (B, L), 1 where a token may be looked at; all may if absent.
            output_hidden_states: return every layer's result as well.
            return_dict: return a record, else the tuple of its fields.

        Raises:
            ValueError: more tokens than there are positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids must hold at most {self.config.max_position_embeddings} tokens, got {length}; truncate them"
            )
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()  # (B, 1, L, L)
        x = self.token_embedding(input_ids) + self.position_embedding(torch.arange(length, device=input_ids.device))
        hidden_states = [x] if output_hidden_states else []  # else each is given back once it was read
        for layer in self.layers:
            x = layer(x, mask)
            if output_hidden_states:
                hidden_states.append(x)
        x = self.final_layer_norm(x)
        output = CLIPTextOutput(x, self._pool(x, input_ids), tuple(hidden_states) or None)
        return output if return_dict else output.to_tuple()

    def _pool(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Pick each text's end token: the first one, or the largest number where an old config wrongly says 2."""
        eos = self.config.eos_token_id
        ends = input_ids.argmax(dim=1) if eos == 2 else (input_ids == eos).int().argmax(dim=1)
        return x[torch.arange(len(x), device=x.device), ends]
