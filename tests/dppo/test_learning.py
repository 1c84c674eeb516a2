"""PPO learns: CartPole from scratch, and a diffusion policy beyond the poor demonstrations that it was cloned from."""

import numpy as np
import pytest
import torch

from dppo.building import build_task, build_update_rule, scratch_policy
from dppo.cloning import Cloner, CloningConfig
from dppo.commands.finetune import trainer_config
from dppo.configuration import compose_config
from dppo.data.demos import Episode, WindowDataset
from dppo.evaluation import EvaluationConfig, evaluate
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.config import UpdateConfig
from dppo.updates.first_order_config import FirstOrderConfig, PPOConfig, PPOKLConfig, PPOMaskConfig
from dppo.updates.natural import NaturalConfig, TRPOConfig
from dppo.updates.weighted_imitation import WeightedImitationConfig
from policies import Policy


def test_cartpole_is_solved_with_the_settings_that_come_with_it():
    config = compose_config("finetune", ["task=cartpole", "env_steps=40_000"])
    task = build_task(config)
    torch.manual_seed(config["seed"])
    policy = scratch_policy(config, task)
    trainer = Trainer(policy, task, trainer_config(config), build_update_rule(config), config["critic"])
    while not trainer.finished:
        trainer.iterate()
    assert evaluate(policy, task, EvaluationConfig(episodes=20, num_envs=20))[0].return_mean >= 475
    trainer.close()


def cloned(seed: int) -> Policy:
    """A small diffusion policy of demonstrations that go only halfway to the target of `PointEnv`, and not exactly."""
    rng = np.random.default_rng(seed)
    target = rng.uniform(-1, 1, (2001, 2)).astype(np.float32)
    action = (0.5 * target[:-1] + rng.normal(0, 0.1, (2000, 2))).astype(np.float32)
    dataset = WindowDataset([Episode(target, action, np.zeros(2000, np.float32), False, True)], history=1, chunk=1)
    torch.manual_seed(seed)
    network = {"type": "mlp", "hidden_dims": [32, 32, 32], "step_dim": 8}
    config = {"type": "diffusion", "obs_dim": 2, "action_dim": 2, "denoising_steps": 5, "network": network}
    settings = CloningConfig(
        400, 128, 3e-3, final_learning_rate_share=0.1, warmup=0.0, weight_decay=0.0, ema_decay=0.98
    )
    cloner = Cloner(Policy.from_config(config), dataset, None, settings, seed=seed)
    cloner.run(settings.updates)
    return cloner.averaged


MYOPIC = {"gamma": 0.0, "gae_lambda": 0.0}
"""In `PointEnv`, a reward says all about its action."""
RULES: dict[str, UpdateConfig] = {
    "vpg": FirstOrderConfig(**MYOPIC, learning_rate=5e-3),
    "a2c": FirstOrderConfig(**MYOPIC, batch_size=600, learning_rate=3e-3),
    "ppo": PPOConfig(**MYOPIC, epochs=5, batch_size=600, learning_rate=1e-3),
    "ppo in bfloat16": PPOConfig(**MYOPIC, epochs=5, batch_size=600, learning_rate=1e-3, precision="bfloat16"),
    "ppo with a dual clip": PPOConfig(**MYOPIC, epochs=5, batch_size=600, learning_rate=1e-3, dual_clip=3.0),
    "ppo_kl": PPOKLConfig(**MYOPIC, epochs=5, batch_size=600, learning_rate=1e-3),
    "ppo_mask": PPOMaskConfig(**MYOPIC, epochs=5, batch_size=600, learning_rate=1e-3),
    "awr": WeightedImitationConfig(**MYOPIC, batch_size=100, learning_rate=1e-3, temperature=0.3),
    "npg": NaturalConfig(**MYOPIC, max_kl=0.05, damping=0.01),
    "trpo": TRPOConfig(**MYOPIC, max_kl=0.1, damping=0.01),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_improves_a_diffusion_policy_that_was_cloned_from_poor_demonstrations(rule):
    task = Task("point", "Point-v0")
    policy = cloned(seed=0).adjusted(finetuned_steps=3)
    algo = RULES[rule]
    size = TrainerConfig(env_steps=9_000, num_envs=20, rollout_steps=30)
    trainer = Trainer(policy, task, size, algo, {"type": "mlp", "hidden_dims": [32]})
    episodes = EvaluationConfig(episodes=100, num_envs=50)
    before = evaluate(policy, task, episodes)[0].return_mean
    while not trainer.finished:
        trainer.iterate()
    after = evaluate(policy, task, episodes)[0].return_mean
    trainer.close()
    # Going halfway costs 6 * 2 * E[(x / 2)^2] = 1 an episode.
    assert -1.3 < before < -0.7
    assert after > (-0.1 if rule.startswith("ppo") else -0.4)
