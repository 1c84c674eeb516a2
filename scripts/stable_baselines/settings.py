"""PPO and TRPO at settings that are the same on both sides: Stable-Baselines3's defaults, with normalisation.

One rollout of one environment between updates, running statistics of observations and rewards, two networks of 64 x 64.
What cannot be made equal is in `DIFFERENCES`.
"""

from __future__ import annotations

from typing import Any

STEPS = 2048
"""Environment steps between updates."""
RULES = ("ppo", "trpo")
GAMMA, GAE_LAMBDA = 0.99, 0.95
HIDDEN = [64, 64]
MEAN_KL, MEAN_DAMPING = 0.01, 0.1
"""Of TRPO, as SB3-contrib counts: there, a KL divergence is the mean over action dimensions, not their sum."""
SEARCHES = 10
"""Step lengths that TRPO's line search tries."""

DIFFERENCES = """\
- SB3-contrib averages the KL divergence of TRPO over action dimensions, here it is their sum. With Da dimensions,
  `max_kl` and `damping` are Da times its `target_kl` and `cg_damping`: the same region, and the same direction from
  the same gradient.
- In its line search, SB3-contrib measures KL(new ‖ old), here it is KL(old ‖ new). Its conjugate gradients start at
  small noise and stop at an absolute residual, here at zero and a relative one; both take all 15 iterations nearly
  always. Neither sub-samples.
- The std is exp(parameter) there, 0.01 + softplus(parameter) here, both 1 at first.
- Statistics of observations and rewards change with every step there (`VecNormalize`), with every rollout here; the
  first rollout here sees plain observations.
- PPO's gradient is clipped to 0.5 over both networks together there, in each of them here. Advantages are normalised
  by minibatch in PPO and by rollout in TRPO on both sides. The critic's loss in TRPO is twice that of here, which
  Adam does not notice.
- Adam's epsilon is 1e-8 on both sides, which is not Stable-Baselines3's default (1e-5).
- Random numbers are drawn in different ways, so equal seeds share nothing but the environments of the evaluation."""


def our_settings(task: str, rule: str, action_dim: int, *, compiled: bool) -> list[str]:
    """Overrides of `dppo finetune`."""
    return [
        f"task={task}",
        "policy=gaussian",
        f"algo={rule}",
        "checkpoint=scratch",
        "num_envs=1",
        f"rollout_steps={STEPS}",
        f"network.hidden_dims={HIDDEN}",
        "network.activation=tanh",
        "critic=mlp",
        f"critic.hidden_dims={HIDDEN}",
        "critic.activation=tanh",
        "policy.initial_std=1.0",
        f"algo.gamma={GAMMA}",
        f"algo.gae_lambda={GAE_LAMBDA}",
        "algo.reward_scaling=true",
        "algo.normalize_advantages=true",
        "algo.schedule=constant",
        f"algo.compile={compiled}",
        *(_OURS[rule]),
        *(() if rule == "ppo" else _summed(action_dim)),
    ]


_OURS = {
    "ppo": (
        "algo.batch_size=64",
        "algo.epochs=10",
        "algo.learning_rate=3e-4",
        "algo.critic_learning_rate=3e-4",
        "algo.clip=0.2",
        "algo.max_grad_norm=0.5",
    ),
    "trpo": (
        "algo.iterations=15",
        f"algo.backtracks={SEARCHES - 1}",
        "algo.backtrack_factor=0.8",
        "algo.critic_learning_rate=1e-3",
        "algo.critic_epochs=10",
        "algo.critic_batch_size=128",
        "algo.max_grad_norm=null",
    ),
}


def _summed(action_dim: int) -> list[str]:
    return [f"algo.max_kl={action_dim * MEAN_KL:g}", f"algo.damping={action_dim * MEAN_DAMPING:g}"]


def their_settings(rule: str) -> dict[str, Any]:
    """Arguments of Stable-Baselines3's PPO and SB3-contrib's TRPO."""
    return {
        "n_steps": STEPS,
        "gamma": GAMMA,
        "gae_lambda": GAE_LAMBDA,
        "normalize_advantage": True,
        "policy_kwargs": {
            "net_arch": {"pi": HIDDEN, "vf": HIDDEN},
            "log_std_init": 0.0,
            "optimizer_kwargs": {"eps": 1e-8},
        },
        **_THEIRS[rule],
    }


_THEIRS: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4, "clip_range": 0.2, "max_grad_norm": 0.5},
    "trpo": {
        "cg_max_steps": 15,
        "cg_damping": MEAN_DAMPING,
        "target_kl": MEAN_KL,
        "line_search_max_iter": SEARCHES,
        "line_search_shrinking_factor": 0.8,
        "learning_rate": 1e-3,
        "n_critic_updates": 10,
        "batch_size": 128,
    },
}
