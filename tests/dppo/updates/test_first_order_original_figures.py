"""The losses and gradients of PPO are those that the original DPPO implementation was recorded with."""

import pytest
import torch
from original import CASES, Figures, new_name

from dppo.critic import Critic
from dppo.surrogates import approximate_kl, value_losses
from dppo.updates.batch import Batch, Pairs, Targets
from dppo.updates.first_order import FirstOrder
from dppo.updates.first_order_config import PPOConfig
from dppo.updates.gradient import MeanGradient


def recorded_ppo(figures: Figures) -> tuple[FirstOrder, Pairs, Targets]:
    """PPO with the recorded settings and weights, and what it learned from."""
    c = figures.config
    policy = figures.policy("actor_moved.")
    network = {"type": "mlp", "hidden_dims": [16, 16, 16], "activation": "mish", "residual": True}
    critic = Critic(network, c["To"], c["Do"])
    critic.network.load_state_dict(
        {new_name(f"mlp_mean.{k}").removeprefix("mlp."): v for k, v in figures.renamed("critic.Q1.").items()}
    )
    config = PPOConfig(
        inner_gamma=c["gamma_denoising"],
        clip=c["clip"],
        clip_base=c["clip_base"],
        clip_rate=c["clip_rate"],
        log_ratio="mean",
        log_prob_clamp=(-5, 2),
    )
    rows, steps = figures["loss_env_index"], figures["loss_step_index"]
    batch = Batch(
        obs=figures["obs"][rows],
        chain=figures["chain"][rows],
        log_prob_factors=figures["log_prob"][rows],
        advantages=figures["loss_advantages"][:, None].expand(-1, c["ft"]),
        returns=figures["loss_returns"],
        values=figures["loss_old_values"],
    )
    each = torch.arange(len(batch))  # one row per pair
    ppo = FirstOrder(config, policy, critic, torch.Generator())
    pairs = batch.pairs(each * batch.num_steps + steps)
    return ppo, ppo.objective.prepare(pairs), batch.targets(each)


@pytest.mark.parametrize("case", CASES)
def test_the_policy_loss_and_its_statistics_are_the_recorded_ones(case: str) -> None:
    figures = Figures(case)
    ppo, pairs, _ = recorded_ppo(figures)
    losses, log_ratios, clipped = ppo.rows(pairs)
    torch.testing.assert_close(losses.mean(), figures["loss.pg_loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(approximate_kl(log_ratios), figures["loss.approx_kl"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(clipped.mean(), figures["loss.clip_fraction"])
    torch.testing.assert_close(log_ratios.exp().mean(), figures["loss.ratio_mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_value_loss_is_the_recorded_one(case: str) -> None:
    figures = Figures(case)
    ppo, _, targets = recorded_ppo(figures)
    torch.testing.assert_close(ppo.critic_fit.rows(targets)[0].mean(), figures["loss.v_loss"], rtol=1e-5, atol=1e-6)
    assert not value_losses(targets.returns, targets.returns, targets.values).any()


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_the_policy_loss_is_the_recorded_one(case: str) -> None:
    figures = Figures(case)
    ppo, pairs, _ = recorded_ppo(figures)
    gradient, _ = MeanGradient(ppo.objective, ppo.optimizer.parameters, threads=1)(pairs)
    recorded = figures.renamed("grad.actor.")
    names, parameters = zip(*ppo.policy.network.named_parameters(), strict=True)
    parts = gradient.split([parameter.numel() for parameter in parameters])
    gradients = {n: part.view_as(w) for n, w, part in zip(names, parameters, parts, strict=True)}
    assert gradients.keys() == recorded.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, recorded[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
