"""Diffusion Policy's transformer, put together of torch's own layers under its names."""

from typing import Any

import torch
from torch import Tensor, nn

from policies.networks.mlp import sinusoidal_embedding
from policies.networks.transformer import DenoisingTransformerConfig

LATENT, OBS = (5, 2), (3, 4)
"""(Tp, Da) and (To, Do)."""


class Reference(nn.Module):
    """Computes without masks where it is not causal; nothing is dropped."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        config = DenoisingTransformerConfig(**settings)
        width, how = config.width, {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.input_emb, self.cond_obs_emb = nn.Linear(LATENT[1], width), nn.Linear(OBS[1], width)
        self.pos_emb = nn.Parameter(torch.randn(1, LATENT[0], width))
        self.cond_pos_emb = nn.Parameter(torch.randn(1, 1 + OBS[0], width))
        if config.condition_layers:
            layer = nn.TransformerEncoderLayer(width, config.heads, 4 * width, **how)
            self.encoder: nn.Module = nn.TransformerEncoder(layer, config.condition_layers, enable_nested_tensor=False)
        else:
            self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        layer = nn.TransformerDecoderLayer(width, config.heads, 4 * width, **how)
        self.decoder = nn.TransformerDecoder(layer, config.layers)
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, LATENT[1])
        self.causal, self.width = config.causal, width

    def forward(self, latent: Tensor, timestep: Tensor, obs: Tensor) -> Tensor:
        step = sinusoidal_embedding(timestep, self.width)[:, None]
        memory = self.encoder(torch.cat([step, self.cond_obs_emb(obs)], 1) + self.cond_pos_emb)
        allowed = [[query >= key for key in range(LATENT[0])] for query in range(LATENT[0])]
        seen = [[query >= key - 1 for key in range(1 + OBS[0])] for query in range(LATENT[0])]
        how = {"tgt_mask": ~torch.tensor(allowed), "memory_mask": ~torch.tensor(seen)} if self.causal else {}
        return self.head(self.ln_f(self.decoder(self.input_emb(latent) + self.pos_emb, memory, **how)))
