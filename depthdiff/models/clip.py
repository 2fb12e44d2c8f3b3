"""The text transformer: tokens to the embeddings that the UNet attends to. Source: arXiv:2103.00020, sec. 2.4.

Letters: B batch, L tokens (77 in Stable Diffusion), C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthdiff.config import BaseOutput, Config
from depthdiff.models.base import PreTrainedModel, recomputed
from depthdiff.models.embeddings import ACTIVATIONS, get_activation
from depthdiff.models.peft import PeftAdapterMixin


@dataclass(eq=False)
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
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    model_type: ClassVar[str] = "clip_text_model"
    COUNTS: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)
    POSITIVE: ClassVar[tuple[str, ...]] = (
        *("num_hidden_layers", "layer_norm_eps", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_attention_heads", "max_position_embeddings"),
    )
    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "use_attention_mask": (None, False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of {self.num_attention_heads} heads")


@dataclass
class BaseModelOutputWithPooling(BaseOutput):
    """Output of the text encoder.

    Attributes:
        last_hidden_state: (B, L, C), after the final norm.
        pooler_output: (B, C), that of each text's end token.
        hidden_states: the embeddings and every layer's result, (B, L, C) each, before the final norm, if asked for.
        attentions: every layer's attention matrix, (B, H, L, L), if asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CLIPTextEmbeddings(nn.Module):
    """A vector for each token, and one for its position."""

    position_ids: Tensor

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        positions = torch.arange(config.max_position_embeddings, device="cpu").expand(1, -1)  # no weight: never meta
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens (B, L), or take their vectors (B, L, C) as given: (B, L, C).

        Raises:
            ValueError: more tokens than there are positions.
        """
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
        length, limit = inputs_embeds.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"input_ids must hold at most {limit} tokens, got {length}; truncate them")
        if position_ids is None:
            position_ids = self.position_ids[:, :length]
        return inputs_embeds + self.position_embedding(position_ids)


class CLIPAttention(nn.Module):
    """Multi-head self-attention. Source: arXiv:1706.03762, eq. 1."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scale, self.dropout = self.head_dim**-0.5, config.attention_dropout
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, L, C).
            attention_mask: (B or 1, 1, L, L), True where a token may be looked at.
            output_attentions: compute the attention matrix as well.

        Returns:
            (B, L, C), and the matrix (B, H, L, L) or None.
        """
        q, k, v = (
            project(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = None
        if output_attentions:
            scores = self.scale * q @ k.transpose(2, 3)
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask, -torch.inf)
            weights = scores.softmax(dim=-1)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attention_mask, dropout, scale=self.scale)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights


class GELUActivation(nn.GELU):
    """GELU, under the name that transformers gives it."""


class CLIPMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_fn = GELUActivation() if config.hidden_act == "gelu" else get_activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and a feed-forward, each after a norm and with a residual connection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embed_dim, self.gradient_checkpointing = config.hidden_size, False
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(self.embed_dim, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(self.embed_dim, config.layer_norm_eps)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, L, C) -> (B, L, C); with the attention matrix where that is asked for."""
        attended, weights = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states),
            attention_mask=attention_mask,
            output_attentions=output_attentions,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return (hidden_states, weights) if output_attentions else hidden_states


class CLIPEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(B, L, C) -> the last layer's result; the embeddings and every layer's, and the matrices, if asked for."""
        x, states, attentions = inputs_embeds, [inputs_embeds], []
        for layer in self.layers:
            x = recomputed(self)(layer, x, attention_mask, output_attentions=output_attentions)
            if output_attentions:
                x, weights = x
                attentions.append(weights)
            if output_hidden_states:
                states.append(x)
        return x, states, attentions


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and a final norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config, self.eos_token_id = config, config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Read texts; see `CLIPTextModel.forward`."""
        if input_ids is None:
            raise ValueError("input_ids must be given: token numbers (B, L)")
        input_ids = input_ids.view(-1, input_ids.shape[-1])
        length = input_ids.shape[1]
        x = self.embeddings(input_ids=input_ids, position_ids=position_ids)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()  # (B, 1, L, L)
        asked = chosen(output_hidden_states, self.config, "hidden_states")
        x, states, attentions = self.encoder(
            inputs_embeds=x,
            attention_mask=mask,
            output_attentions=chosen(output_attentions, self.config, "attentions"),
            output_hidden_states=asked,
        )
        last = self.final_layer_norm(x)
        output = BaseModelOutputWithPooling(
            last, self._pool(last, input_ids), tuple(states) if asked else None, tuple(attentions) or None
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _pool(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Pick each text's end token: the first one, or the largest number where an old config wrongly says 2."""
        eos = self.eos_token_id
        ends = input_ids.argmax(dim=1) if eos == 2 else (input_ids == eos).int().argmax(dim=1)
        return x[torch.arange(x.shape[0], device=x.device), ends]


def chosen(given: bool | None, config: CLIPTextConfig, what: str) -> bool:
    """Return an option of a call, or where it is None that of the config."""
    return bool(config.get(f"output_{what}", False) if given is None else given)


class CLIPTextModel(PreTrainedModel, PeftAdapterMixin):
    """CLIP's text transformer.

    Args:
        config: its geometry.

    Attributes:
        text_model: the transformer; `embeddings`, `encoder` and `final_layer_norm` are its parts.
    """

    config_class = CLIPTextConfig
    config: CLIPTextConfig
    base_model_prefix = "text_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("CLIPTextEmbeddings", "CLIPEncoderLayer")

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = CLIPTextTransformer(config)
        self._init_weights()

    def _init_weights(self) -> None:
        """Draw first weights as transformers does, in its order. Source: openai/CLIP, clip/model.py."""
        config, model = self.config, self.text_model
        factor, width, depth = config.initializer_factor, config.hidden_size, config.num_hidden_layers
        for std in (config.initializer_range, 0.02 * factor):  # transformers draws the tables twice
            for table in (model.embeddings.token_embedding, model.embeddings.position_embedding):
                nn.init.normal_(table.weight, std=std)
        inner, outer = width**-0.5 * (2 * depth) ** -0.5 * factor, width**-0.5 * factor
        layers: Any = model.encoder.layers
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            linears = [attention.k_proj, attention.v_proj, attention.q_proj, attention.out_proj]
            drawn = [(attention.q_proj, inner), (attention.k_proj, inner), (attention.v_proj, inner)]
            drawn.append((attention.out_proj, outer))
            self._draw(linears, drawn)
            self._draw([mlp.fc1, mlp.fc2], [(mlp.fc1, (2 * width) ** -0.5 * factor), (mlp.fc2, inner)])

    def _draw(self, linears: list[nn.Linear], scaled: list[tuple[nn.Linear, float]]) -> None:
        for linear in linears:
            nn.init.normal_(linear.weight, std=self.config.initializer_range)
            nn.init.zeros_(linear.bias)
        for linear, std in scaled:
            nn.init.normal_(linear.weight, std=std)

    @property
    def embeddings(self) -> CLIPTextEmbeddings:
        """The embeddings of `text_model`."""
        return self.text_model.embeddings

    @property
    def encoder(self) -> CLIPEncoder:
        """The layers of `text_model`."""
        return self.text_model.encoder

    @property
    def final_layer_norm(self) -> nn.LayerNorm:
        """The last norm of `text_model`."""
        return self.text_model.final_layer_norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("embeddings", "encoder", "final_layer_norm"):  # no second registration beside `text_model`
            setattr(self.text_model, name, value)
        else:
            super().__setattr__(name, value)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of the tokens' vectors."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the table of the tokens' vectors."""
        self.text_model.embeddings.token_embedding = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the table of embeddings, keep the old rows, and return it.

        Args:
            new_num_tokens: rows; as many as there are if None.
            pad_to_multiple_of: round the number of rows up to a multiple.
            mean_resizing: draw new rows around the mean of the old ones, with a thousandth of their covariance; else
                with the deviation that first weights have.
        """
        table = self.text_model.embeddings.token_embedding
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows == table.num_embeddings:
            return table
        old = table.weight.data
        if rows > len(old):
            new = torch.empty(rows - len(old), old.shape[1], device=old.device, dtype=old.dtype)
            new = (
                self._draw_rows(new, old) if mean_resizing else nn.init.normal_(new, std=self.config.initializer_range)
            )
            old = torch.cat([old, new])
        table.weight = nn.Parameter(old[:rows].clone(), requires_grad=table.weight.requires_grad)
        table.num_embeddings = self.config.vocab_size = rows
        return table

    @staticmethod
    def _draw_rows(new: Tensor, old: Tensor) -> Tensor:
        """Draw rows around the mean of the old ones, with a thousandth of their deviation in every channel."""
        mean, deviation = old.float().mean(0), old.float().std(0, correction=0)
        return (mean + 1e-3 * deviation * torch.randn(new.shape, device=new.device)).to(new.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Read texts.

        Args:
            input_ids: (B, L), int64, token numbers; L at most `max_position_embeddings`.
            attention_mask: (B, L), 1 where a token may be looked at; all may if None.
            position_ids: (1 or B, L), int64; 0..L - 1 if None.
            output_attentions: return every layer's attention matrix as well.
            output_hidden_states: return every layer's result as well.
            return_dict: return a record, also if None, else the tuple of its fields.

        Raises:
            ValueError: more tokens than there are positions.
        """
        return self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
