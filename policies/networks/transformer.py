"""A transformer over the actions of a chunk, which attend to the denoising step and to each observation of the history.

Diffusion Policy's TransformerForDiffusion where the observation conditions it (Chi et al. 2023, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.networks.denoiser import Denoiser, Port
from policies.networks.dropout import RowDropout, draw_seeds
from policies.networks.mlp import OutputLayer, sinusoidal_embedding

INITIAL_STD = 0.02
"""Of all weights and position embeddings at the start, as in GPT."""
MOST_LAYERS = 1000


@dataclass(frozen=True)
class DenoisingTransformerConfig:
    """The shape of a `DenoisingTransformer`."""

    width: int = 64
    """Dimension of a token."""
    layers: int = 2
    """Of the decoder: self-attention over the actions, attention to step and observations, and two dense layers."""
    heads: int = 4
    """Of each attention; they divide the width."""
    condition_layers: int = 0
    """Layers of the encoder, in which the tokens of step and observations attend to each other. 0: an MLP of each."""
    causal: bool = True
    """Let an action attend to itself and the actions before it only, and to no later observation."""
    chunk_start: Literal["last", "first"] = "last"
    """The observation of the history at which the chunk starts, for ``causal``: the last, or, as in Diffusion Policy,
    the first, so that early actions belong to the past and do not see the observations after them."""
    embedding_dropout: float = 0.0
    """Share of the tokens' entries that are dropped in imitation."""
    attention_dropout: float = 0.0
    """Share of the attention, and of what each layer adds, that is dropped in imitation."""

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 2:
            raise ValueError(f"width must be even and at least 4, not {self.width}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads must divide width = {self.width}, and {self.heads} does not")
        for name, least in (("layers", 1), ("condition_layers", 0)):
            if not least <= getattr(self, name) <= MOST_LAYERS:
                raise ValueError(f"{name} must lie between {least} and {MOST_LAYERS}, not {getattr(self, name)}")
        for name in ("embedding_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")


class Attention(nn.Module):
    """Attention of several heads; tokens are [B, T, E], queries, keys and values [B, heads, T, E / heads]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        """To queries, keys and values, end to end."""
        self.out = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def queries_keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three of the same tokens."""
        queries, keys, values = self.project(tokens).chunk(3, dim=-1)
        return self._heads(queries), self._heads(keys), self._heads(values)

    def queries(self, tokens: Tensor) -> Tensor:
        """Of tokens that attend to others."""
        width = tokens.shape[-1]
        return self._heads(F.linear(tokens, self.project.weight[:width], self.project.bias[:width]))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens that others attend to; any leading dimensions."""
        width = tokens.shape[-1]
        keys, values = F.linear(tokens, self.project.weight[width:], self.project.bias[width:]).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, drop: RowDropout) -> Tensor:
        """What the queries find, [B, T, E].

        Args:
            mask: [T, T'], 0 where a query may attend to a key and -inf where not; None: everywhere.
            drop: applied to the attention.

        Written out, since torch's fused attention has no second derivative on a CPU, and natural gradients need one.
        """
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5  # [B, heads, T, T']
        attention = (scores if mask is None else scores + mask).softmax(-1)
        found = drop(attention, self.dropout) @ values
        return self.out(found.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Attention of tokens to each other, added to them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None, drop: RowDropout) -> Tensor:
        found = self.attention(*self.attention.queries_keys_values(self.norm(x)), mask, drop)
        return x + drop(found, self.dropout)


class CrossAttention(nn.Module):
    """Attention of tokens to others, added to them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.dropout = dropout

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, drop: RowDropout) -> Tensor:
        found = self.attention(self.attention.queries(self.norm(x)), keys, values, mask, drop)
        return x + drop(found, self.dropout)


class FeedForward(nn.Module):
    """Two dense layers for each token, added to it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor, drop: RowDropout) -> Tensor:
        hidden = drop(F.gelu(self.expand(self.norm(x))), self.dropout)
        return x + drop(self.contract(hidden), self.dropout)


class EncoderLayer(nn.Module):
    """Tokens of step and observations attend to each other."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout)
        self.feedforward = FeedForward(width, dropout)

    def forward(self, x: Tensor, drop: RowDropout) -> Tensor:
        return self.feedforward(self.self_attention(x, None, drop), drop)


class DecoderLayer(nn.Module):
    """Actions attend to each other, then to step and observations."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout)
        self.cross_attention = CrossAttention(width, heads, dropout)
        self.feedforward = FeedForward(width, dropout)


KeysValues = list[tuple[Tensor, Tensor]]
"""For each layer of the decoder, those of what it attends to beside the actions, [B, heads, T, E / heads] each."""


@dataclass(frozen=True)
class Prepared:
    """What of a `DenoisingTransformer` stays the same along a chain."""

    obs_tokens: Tensor
    """[B, To, E], encoded where the encoder treats each token for itself."""
    step_tokens: Tensor
    """[S, E], likewise."""
    obs: KeysValues
    """Of the observations alone, [B, heads, To, E / heads] each; empty where the encoder mixes them with the step."""
    steps: KeysValues
    """Of each step alone, [S, heads, 1, E / heads] each; empty likewise."""


class DenoisingTransformer(Denoiser):
    """Decoder layers over the action tokens; their memory is one token of the step, then one of each observation."""

    Config = DenoisingTransformerConfig
    steps: Tensor
    encoder: Any
    """Layers, each an `EncoderLayer`; an MLP where there are none."""
    decoder: Any
    """Layers, each a `DecoderLayer`."""
    action_mask: Tensor | None
    memory_mask: Tensor | None

    def __init__(
        self,
        latent_shape: tuple[int, int],
        obs_shape: tuple[int, int],
        num_timesteps: int,
        config: DenoisingTransformerConfig,
    ) -> None:
        super().__init__()
        self.config, self.obs_shape = config, obs_shape
        width, dropout = config.width, config.attention_dropout
        (chunk, action_dim), (history, obs_dim) = latent_shape, obs_shape
        self.action_embedding = nn.Linear(action_dim, width)
        self.action_positions = nn.Parameter(torch.empty(1, chunk, width))
        self.obs_embedding = nn.Linear(obs_dim, width)
        self.memory_positions = nn.Parameter(torch.empty(1, 1 + history, width))
        if config.condition_layers:
            layers = [EncoderLayer(width, config.heads, dropout) for _ in range(config.condition_layers)]
            self.encoder = nn.ModuleList(layers)
        else:
            self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.decoder = nn.ModuleList(DecoderLayer(width, config.heads, dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.output = OutputLayer(width, action_dim)
        self.register_buffer("steps", sinusoidal_embedding(torch.arange(num_timesteps), width), persistent=False)
        action_mask, memory_mask = masks(chunk, history, config)
        self.register_buffer("action_mask", action_mask, persistent=False)
        self.register_buffer("memory_mask", memory_mask, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        for positions in (self.action_positions, self.memory_positions):
            nn.init.normal_(positions, std=INITIAL_STD)

    def observation_ports(self) -> list[Port]:
        return [Port("obs_embedding.weight", 1)]

    def action_ports(self) -> list[Port]:
        return [Port("action_embedding.weight", 1), Port("output.weight", 0), Port("output.bias", 0)]

    def draw_dropout(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The seeds of `RowDropout` while the network is in training mode."""
        drops = max(self.config.embedding_dropout, self.config.attention_dropout) > 0
        return (draw_seeds(batch, generator, self.steps.device),) if self.training and drops else ()

    def forward(self, latent: Tensor, timestep: Tensor, obs: Tensor, *dropout: Tensor) -> Tensor:
        drop = RowDropout(*dropout or (None,))
        steps, observed = self._tokens(obs)
        memory = self._memory(steps[timestep][:, None], observed, drop)
        return self._decode(latent, self._keys_values(memory), drop)

    def prepare(self, obs: Tensor) -> Prepared:
        steps, observed = self._tokens(obs)
        if self.config.condition_layers:
            return Prepared(observed, steps, [], [])
        steps, observed = self.encoder(steps), self.encoder(observed)
        return Prepared(observed, steps, self._keys_values(observed), self._keys_values(steps[:, None]))

    def forward_prepared(self, latent: Tensor, timestep: int, prepared: Prepared) -> Tensor:
        batch, drop = latent.shape[0], RowDropout(None)  # not len(): an export shall not take it for a constant
        if self.config.condition_layers:
            step = prepared.step_tokens[timestep].expand(batch, 1, -1)
            return self._decode(latent, self._keys_values(self._memory(step, prepared.obs_tokens, drop)), drop)

        def joined(of_steps: Tensor, of_obs: Tensor) -> Tensor:
            return torch.cat([of_steps[timestep].expand(batch, -1, -1, -1), of_obs], dim=2)

        both = zip(prepared.steps, prepared.obs, strict=True)
        keys_values = [(joined(steps[0], obs[0]), joined(steps[1], obs[1])) for steps, obs in both]
        return self._decode(latent, keys_values, drop)

    def _keys_values(self, memory: Tensor) -> KeysValues:
        """What each layer of the decoder attends to, of encoded tokens [..., T, E]."""
        return [layer.cross_attention.attention.keys_values(memory) for layer in self.decoder]

    def _tokens(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Of all steps [S, E] and of observations [B, To*Do] -> [B, To, E], with their positions, not yet encoded."""
        observed = self.obs_embedding(obs.unflatten(1, self.obs_shape))
        return self.steps + self.memory_positions[0, 0], observed + self.memory_positions[:, 1:]

    def _memory(self, step: Tensor, observed: Tensor, drop: RowDropout) -> Tensor:
        """Encode tokens of a step [B, 1, E] and of observations [B, To, E] -> [B, 1 + To, E]."""
        tokens = drop(torch.cat([step, observed], dim=1), self.config.embedding_dropout)
        if not self.config.condition_layers:
            return self.encoder(tokens)
        for layer in self.encoder:
            tokens = layer(tokens, drop)
        return tokens

    def _decode(self, latent: Tensor, keys_values: KeysValues, drop: RowDropout) -> Tensor:
        tokens = self.action_embedding(latent) + self.action_positions
        tokens = drop(tokens, self.config.embedding_dropout)
        for layer, (keys, values) in zip(self.decoder, keys_values, strict=True):
            tokens = layer.self_attention(tokens, self.action_mask, drop)
            tokens = layer.cross_attention(tokens, keys, values, self.memory_mask, drop)
            tokens = layer.feedforward(tokens, drop)
        return self.output(self.norm(tokens))


def masks(chunk: int, history: int, config: DenoisingTransformerConfig) -> tuple[Tensor | None, Tensor | None]:
    """What actions may not attend to: of the actions [Tp, Tp], and of step and observations [Tp, 1 + To].

    0 where they may and -inf where not; None where they may everywhere.
    """
    if not config.causal:
        return None, None
    action = torch.arange(chunk)[:, None]
    later_action = torch.arange(chunk) > action
    first = history - 1 if config.chunk_start == "last" else 0  # the observation that belongs to the first action
    later_obs = torch.arange(-1, history) > action + first  # the step comes first, and is never too late
    of_memory = torch.zeros(later_obs.shape).masked_fill(later_obs, -torch.inf) if history - 1 > first else None
    return torch.zeros(later_action.shape).masked_fill(later_action, -torch.inf), of_memory
