"""A rearranged policy does with rearranged observations what the policy did, in another order."""

from typing import Any

import pytest
import torch
from torch import Tensor

from policies import DiffusionPolicy, Policy, UserError
from policies.rearranging import rearranged

MLP = {"type": "mlp", "hidden_dims": [8, 8, 8], "step_dim": 4}
UNET = {"type": "unet", "down_dims": [8, 16], "groups": 4, "step_dim": 8}
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": MLP,
    "plain mlp": {**MLP, "residual": False},
    "unet": UNET,
    "unet with an encoder": {**UNET, "obs_dims": [8, 8, 8, 5]},
    "transformer": {"type": "transformer", "width": 8, "heads": 2},
}
OBSERVATION, ACTION = [3, 0, 4], [2, 0, 1]
"""Where the three entries of each are from now on; observations have five."""


def policy(**settings: Any) -> DiffusionPolicy:
    torch.manual_seed(0)
    sizes = {"obs_dim": 3, "action_dim": 3, "history": 2, "chunk": 4, "denoising_steps": 3, "finetuned_steps": 2}
    made = Policy.from_config({"type": "diffusion", **sizes, **settings})
    assert isinstance(made, DiffusionPolicy)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    made.fit_observations(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 9.0]))
    made.fit_actions(*torch.stack([-torch.ones(n := made.config.action_dim), torch.arange(n) + 1.0]))
    made.metadata["task"] = {"name": "point"}
    return made


def sampled(policy: DiffusionPolicy, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    sample = policy.sample(obs, noise=noise)
    return sample.action, sample.log_prob


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("eta", [None, "state", "action"])
def test_it_samples_and_scores_what_it_did_in_the_new_order(network: str, eta: str | None) -> None:
    before = policy(network=NETWORKS[network], sampler={"steps": 3, "learned_eta": eta})
    after = rearranged(before, OBSERVATION, 5, ACTION)
    obs, noise = torch.randn(6, 2, 3), before.draw_noise(6)
    new_obs, new_noise = torch.randn(6, 2, 5), torch.empty_like(noise)
    new_obs[..., OBSERVATION] = obs
    new_noise[..., ACTION] = noise
    action, log_prob = sampled(before, obs, noise)
    new_action, new_log_prob = sampled(after, new_obs, new_noise)
    torch.testing.assert_close(new_action[..., ACTION], action, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_log_prob, log_prob, rtol=1e-4, atol=1e-4)
    assert after.metadata == before.metadata
    assert (after.config.obs_dim, after.config.history) == (5, 2)


def test_actions_stay_as_they_are_unless_they_are_to_be_moved() -> None:
    before = policy(network=MLP)
    after = rearranged(before, [0, 1, 2], 3)
    assert after.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


def test_running_statistics_move_too() -> None:
    before = policy(network=MLP, observation_scaling="running")
    before.observe(torch.randn(50, 3) * torch.tensor([1.0, 5.0, 9.0]))
    after = rearranged(before, OBSERVATION, 5)
    obs = torch.randn(4, 5)
    torch.testing.assert_close(after.normalize_obs(obs)[:, OBSERVATION], before.normalize_obs(obs[:, OBSERVATION]))


def test_a_unet_that_adds_actions_to_its_channels_as_they_are_keeps_their_order() -> None:
    before = policy(network={**UNET, "down_dims": [4, 8], "final_groups": 4}, action_dim=4)
    assert rearranged(before, OBSERVATION, 5).config.obs_dim == 5
    with pytest.raises(UserError, match="no other order"):
        rearranged(before, OBSERVATION, 5, [1, 0, 2, 3])
