"""The transformer against torch's own layers, put together as in Diffusion Policy."""

from typing import Any

import pytest
import torch
from reference_transformer import LATENT, OBS, Reference
from torch import Tensor

from policies.imports.diffusion_policy import TRANSFORMER_NAMES
from policies.imports.files import renamed
from policies.networks.transformer import DenoisingTransformer, DenoisingTransformerConfig, masks

TIMESTEPS = 7
SMALL: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2}


def transformer(seed: int = 0, **settings: Any) -> DenoisingTransformer:
    torch.manual_seed(seed)
    network = DenoisingTransformer(LATENT, OBS, TIMESTEPS, DenoisingTransformerConfig(**{**SMALL, **settings}))
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.2 * torch.randn(weights.shape))
    return network


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, *LATENT, generator=generator)
    return latent, torch.arange(batch) % TIMESTEPS, torch.randn(batch, OBS[0] * OBS[1], generator=generator)


@pytest.mark.parametrize("condition_layers", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_with_diffusion_policys_weights_it_computes_what_torchs_layers_do(condition_layers: int, causal: bool) -> None:
    torch.manual_seed(0)
    settings = {**SMALL, "condition_layers": condition_layers, "causal": causal, "chunk_start": "first"}
    reference, network = Reference(settings), transformer(**settings)
    with torch.no_grad():
        for weights in reference.parameters():
            weights.add_(0.2 * torch.randn(weights.shape))
    network.load_state_dict(renamed(reference.state_dict(), TRANSFORMER_NAMES))
    latent, timestep, obs = inputs(2 * TIMESTEPS)
    expected = reference(latent, timestep, obs.unflatten(1, OBS))
    torch.testing.assert_close(network(latent, timestep, obs), expected, rtol=1e-4, atol=1e-5)


def what_each_action_depends_on(network: DenoisingTransformer) -> tuple[Tensor, Tensor]:
    """Whether each action [Tp] depends on each noisy action [Tp], and on each observation [To]."""
    latent, timestep, obs = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(1))
    of_actions, of_obs = [], []
    for action in network(latent, timestep, obs)[0]:
        by_latent, by_obs = torch.autograd.grad(action.sum(), [latent, obs], retain_graph=True)
        of_actions.append(by_latent[0].abs().sum(1) > 0)
        of_obs.append(by_obs.view(OBS).abs().sum(1) > 0)
    return torch.stack(of_actions), torch.stack(of_obs)


def test_an_action_of_a_causal_network_depends_on_none_after_it() -> None:
    on_actions, on_obs = what_each_action_depends_on(transformer())
    assert torch.equal(on_actions, torch.ones(5, 5).tril().bool())
    assert on_obs.all(), "the chunk starts at the last of them"
    on_actions, on_obs = what_each_action_depends_on(transformer(causal=False))
    assert on_actions.all() and on_obs.all()


def test_an_action_of_the_past_does_not_see_the_observations_after_it() -> None:
    _, on_obs = what_each_action_depends_on(transformer(chunk_start="first"))
    assert torch.equal(on_obs, torch.ones(5, 3).tril().bool())


def test_a_mask_that_forbids_nothing_is_left_out() -> None:
    config = DenoisingTransformerConfig(chunk_start="first")
    assert masks(5, 1, config)[1] is None
    assert masks(5, 3, DenoisingTransformerConfig())[1] is None
    assert masks(5, 3, config)[1] is not None
    assert masks(5, 3, DenoisingTransformerConfig(causal=False)) == (None, None)


def test_weights_start_small_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    network = DenoisingTransformer(LATENT, OBS, TIMESTEPS, DenoisingTransformerConfig())
    for name, weights in network.named_parameters():
        if "norm" in name:
            assert torch.equal(weights, torch.ones_like(weights) if name.endswith("weight") else weights * 0), name
        elif name.endswith("bias"):
            assert not weights.any(), name
        else:
            assert weights.std().item() == pytest.approx(0.02, rel=0.25), name


@pytest.mark.parametrize("condition_layers", [0, 1])
def test_what_the_observation_says_is_computed_once_for_a_chain(condition_layers: int) -> None:
    network = transformer(condition_layers=condition_layers)
    seen: list[str] = []
    network.obs_embedding.register_forward_hook(lambda *_: seen.append("embedded"))
    if not condition_layers:
        network.encoder.register_forward_hook(lambda *_: seen.append("encoded"))
    latent, _, obs = inputs(4)
    prepared = network.prepare(obs)
    for step in range(TIMESTEPS):
        network.forward_prepared(latent, step, prepared)
    assert seen.count("embedded") == 1
    assert seen.count("encoded") == (0 if condition_layers else 2)  # steps and observations


# --- dropout


DROPPING: dict[str, Any] = {"embedding_dropout": 0.2, "attention_dropout": 0.3, "condition_layers": 1}


def test_nothing_is_dropped_without_seeds_and_none_are_drawn_for_a_network_that_is_evaluated() -> None:
    network, still = transformer(**DROPPING), transformer(condition_layers=1)
    latent, timestep, obs = inputs(6)
    assert torch.equal(network(latent, timestep, obs), still(latent, timestep, obs))
    assert still.draw_dropout(6) == ()
    assert network.eval().draw_dropout(6) == ()


@pytest.mark.parametrize("condition_layers", [0, 1])
@pytest.mark.parametrize("share", ["embedding_dropout", "attention_dropout"])
def test_a_row_drops_what_its_seed_says_whoever_is_beside_it(share: str, condition_layers: int) -> None:
    network = transformer(**{share: 0.3, "condition_layers": condition_layers})
    latent, timestep, obs = inputs(6)
    (seeds,) = network.draw_dropout(6, torch.Generator().manual_seed(0))
    together = network(latent, timestep, obs, seeds)
    apart = [network(latent[i : i + 1], timestep[i : i + 1], obs[i : i + 1], seeds[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(latent, timestep, obs, seeds + 1), together)
    assert not torch.allclose(network(latent, timestep, obs), together)


def test_what_is_dropped_of_the_tokens_is_the_embeddings_share_and_leaves_their_mean() -> None:
    network = transformer(embedding_dropout=0.4)
    rows = 20_000
    latent, timestep, obs = (x[:1].expand(rows, *x.shape[1:]) for x in inputs(1))
    seen: list[Tensor] = []
    norm = network.decoder[0].self_attention.norm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(latent, timestep, obs, *network.draw_dropout(rows, torch.Generator().manual_seed(0)))
    network(latent[:1], timestep[:1], obs[:1])
    dropped, whole = seen
    assert (dropped == 0).float().mean().item() == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(dropped.mean(0, keepdim=True), whole, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"width": 10, "heads": 4}, "heads must divide width = 10, and 4 does not"),
        ({"width": 7, "heads": 1}, "width must be even and at least 4, not 7"),
        ({"layers": 0}, "layers must lie between 1 and 1000, not 0"),
        ({"condition_layers": -1}, "condition_layers must lie between 0 and 1000, not -1"),
        ({"attention_dropout": 1.0}, r"attention_dropout must lie in \[0, 1\), not 1.0"),
        ({"embedding_dropout": -0.1}, r"embedding_dropout must lie in \[0, 1\)"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DenoisingTransformerConfig(**settings)
