"""Every update rule on every kind of policy."""

import math

import pytest
import torch

from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.config import UpdateConfig
from dppo.updates.rules import CONFIGS

CRITIC = {"type": "mlp", "hidden_dims": [8]}
POLICIES = {
    "gaussian": ("gaussian", {}),
    "squashed": ("gaussian", {"squash": True}),
    "gaussian, std by state": ("gaussian", {"std": "state"}),
    "mixture": ("mixture", {}),
    "categorical": ("categorical", {}),
    "flow": ("diffusion_ode", {}),
    "flow, estimated divergence": ("diffusion_ode", {"divergence": "hutchinson"}),
    "diffusion": ("diffusion", {}),
    "diffusion, one step": ("diffusion", {"finetuned_steps": 1}),
}


def small(rule: str) -> UpdateConfig:
    return CONFIGS[rule](gamma=0.9, **({} if rule in ("awr", "npg", "rwr", "trpo") else {"entropy_coefficient": 0.01}))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", CONFIGS)
def test_every_rule_moves_every_policy_and_says_how_far(small_policy, task_of, rule, policy):
    kind, settings = POLICIES[policy]
    trainer = Trainer(small_policy(kind, **settings), task_of(kind), TrainerConfig(1000, 4, 8), small(rule), CRITIC)
    before = [parameter.clone() for parameter in trainer.policy.parameters() if parameter.requires_grad]
    rows = [trainer.iterate() for _ in range(3)]
    trainer.close()
    after = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.isfinite().all() for parameter in after)
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("policy_loss", "entropy", "value_loss"))
        if rule in ("awr", "rwr"):
            continue
        kl = row["kl" if rule in ("npg", "trpo") else "approx_kl"]
        if rule in ("vpg", "a2c"):
            assert kl is None, "it is not known after the only step"
        else:
            assert kl >= -1e-6
