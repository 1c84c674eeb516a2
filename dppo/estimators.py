"""Estimators of advantages: what they want collected, what a critic says of it, and what follows for each action."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dppo.advantages import gae, group_advantages
from dppo.critic import AnyCritic, LatentCritic
from dppo.envs.restoring import generator_of, generator_state
from dppo.reward_scaling import RewardScaler
from dppo.rollout import Actor, Rollout, Storage, collect_episodes, collect_rollout
from dppo.updates.config import UpdateConfig
from policies import Policy, UserError

VALUE_BATCH = 16_384
"""Rows of observations that the critic sees at once outside of updates; bounds the memory of its hidden layers."""


@dataclass(frozen=True)
class GAEConfig:
    """Settings of `GAE`."""

    discount_per: Literal["chunk", "step"] = "chunk"
    """What ``gamma`` is the discount of: a chunk, as in the DPPO paper, or an environment step."""


@dataclass(frozen=True)
class GroupConfig:
    """Settings of `GroupRelative`."""

    group_size: int | None = None
    """Environments whose episodes begin in the same state; None: all of them."""

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, not {self.group_size}")


AdvantageConfig = GAEConfig | GroupConfig
CONFIGS: dict[str, type[AdvantageConfig]] = {"gae": GAEConfig, "group": GroupConfig}
"""The settings of each by its name."""


@dataclass(frozen=True)
class Values:
    """What a critic says of a rollout."""

    current: Tensor
    """[T, N, L], V(s_t); of each inner step (L = K), or of the observation alone (L = 1)."""
    following: Tensor
    """[T, N], V of the true successor of each row."""


@dataclass(frozen=True)
class Estimate:
    """What an update learns from."""

    advantages: Tensor
    """[T, N, K], or [T, N, 1] where all inner steps are told the same."""
    returns: Tensor | None
    """[T, N] or, of a critic that values inner steps, [T, N, K]: its targets; None: there is no critic."""
    values: Tensor | None
    """As ``returns``: its estimates before the update."""


class Estimator(Protocol):
    """From rollouts to advantages."""

    begins_episodes: bool
    """Whether each rollout begins with new episodes, wherever the environments were."""

    def collect(
        self, actor: Actor, policy: Policy, steps: int, on_step: Callable[[int], None], storage: Storage
    ) -> Rollout:
        """A rollout of up to ``steps`` chunk steps, see `collect_rollout`."""
        ...

    def score(self, policy: Policy, rollout: Rollout) -> Values | None:
        """What the critic says of it; None where there is none."""
        ...

    def estimate(self, rollout: Rollout, values: Values | None) -> Estimate:
        """The advantages, from a rollout and its `score`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that it has learned, as tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        ...


class Discounting:
    """Scaled rewards of chunks, and their discounts."""

    def __init__(self, config: GAEConfig, algo: UpdateConfig, policy: Policy, num_envs: int) -> None:
        self.gamma = algo.gamma
        self.per_step = config.discount_per == "step"
        # A chunk that ends early ends the episode: so every one whose reward is followed by another is whole.
        of_chunk = algo.gamma**policy.config.executed_chunk if self.per_step else algo.gamma
        device = next(policy.parameters()).device
        self.scaler = RewardScaler(num_envs, of_chunk).to(device) if algo.reward_scaling else None

    def __call__(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Rewards and discounts of the rows of a rollout, [T, N] each."""
        if self.per_step:
            within = self.gamma ** torch.arange(rollout.step_rewards.shape[2], device=rollout.steps.device)
            rewards, discounts = (rollout.step_rewards * within).sum(2), self.gamma ** rollout.steps.float()
        else:
            rewards, discounts = rollout.rewards, torch.full_like(rollout.rewards, self.gamma)
        if self.scaler is not None:
            rewards = self.scaler(rewards, rollout.terminated | rollout.truncated, rollout.valid)
        return rewards, discounts

    def state_dict(self) -> dict[str, Any]:
        """Of the reward scaler."""
        return {} if self.scaler is None else {"reward_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state["reward_scaler"])


class GAE:
    """Generalised advantage estimation with a critic, of observations or of every inner step.

    Without one, values are 0: with lambda = 1, the advantages are the returns that followed, until the end of the
    episode or of the rollout.
    """

    begins_episodes = False
    collect = staticmethod(collect_rollout)

    def __init__(
        self,
        config: GAEConfig,
        algo: UpdateConfig,
        policy: Policy,
        critic: AnyCritic | None,
        num_envs: int,
        generator: torch.Generator,
    ) -> None:
        """``generator`` starts the chains whose values follow the end of a rollout, on the policy's device."""
        self.critic = critic
        self.gae_lambda = algo.gae_lambda
        self.discounting = Discounting(config, algo, policy, num_envs)
        self.generator = generator

    @torch.no_grad()
    def score(self, policy: Policy, rollout: Rollout) -> Values:
        """Of a critic, every observation (or, if inner steps are valued, every latent) is seen once."""
        shape = rollout.rewards.shape
        if self.critic is None:
            return Values(rollout.rewards.new_zeros(*shape, 1), rollout.rewards.new_zeros(shape))
        obs = torch.cat([rollout.obs.flatten(0, 1), rollout.last_obs, rollout.truncated_obs])
        ends = len(obs) - shape.numel()
        if isinstance(self.critic, LatentCritic):
            steps = policy.num_steps
            inner = rollout.chain[:, :, :steps].flatten(0, 2)
            behind = policy.sample(obs[-ends:], generator=self.generator).chain[:, 0]
            step = torch.arange(steps, device=obs.device).repeat(shape.numel())
            obs = torch.cat([obs[:-ends].repeat_interleave(steps, 0), obs[-ends:]])
            columns = obs, torch.cat([inner, behind]), torch.cat([step, step.new_zeros(ends)])
        else:
            columns = (obs,)
        parts = zip(*(column.split(VALUE_BATCH) for column in columns), strict=True)
        found = [self.critic(policy.normalize_obs(first), *others) for first, *others in parts]
        values, after_last, at_truncation = torch.cat(found).split([len(obs) - ends, shape[1], ends - shape[1]])
        values = values.view(*shape, -1)  # [T, N, L]
        following = torch.cat([values[1:, :, 0], after_last[None]])
        following[rollout.truncated] = at_truncation
        return Values(values, following)

    def estimate(self, rollout: Rollout, values: Values | None) -> Estimate:
        """Over the two layers unrolled: each inner step is followed by the next at once and without a reward.

        With a critic of observations that is a chain of one step, and GAE as ever. With one of inner steps, lambda is
        spread over the L steps of a chain, so that from action to action it is what it would be without them.
        """
        assert values is not None
        rewards, discounts = self.discounting(rollout)
        layers = values.current.shape[2]

        def unrolled(last: Tensor, before: Tensor | float | bool) -> Tensor:
            """[T L, N], from what is so of a chain's last step [T, N] and of those before it."""
            column = last[..., None].repeat(1, 1, layers)
            column[..., :-1] = before
            return column.transpose(1, 2).flatten(0, 1)

        found = gae(
            unrolled(rewards, 0.0),
            values.current.transpose(1, 2).flatten(0, 1),
            unrolled(values.following, values.current[..., 1:]),
            unrolled(rollout.terminated, False),
            unrolled(rollout.truncated, False),
            gamma=unrolled(discounts, 1.0),
            gae_lambda=self.gae_lambda ** (1 / layers),
            valid=None if rollout.valid.all() else unrolled(rollout.valid, rollout.valid[..., None]),
        )
        advantages, returns = (column.unflatten(0, (-1, layers)).transpose(1, 2) for column in found)
        if self.critic is None:
            return Estimate(advantages, None, None)
        if isinstance(self.critic, LatentCritic):
            return Estimate(advantages, returns, values.current)
        return Estimate(advantages, returns[..., 0], values.current[..., 0])

    def state_dict(self) -> dict[str, Any]:
        """The reward scaler, and the state of the generator."""
        return {**self.discounting.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.discounting.load_state_dict(state)
        self.generator.set_state(state["generator"])


class GroupRelative:
    """GRPO's advantages (Shao et al. 2024, section 4.1): an episode's return among those from the same state.

    The environments of a group begin each rollout with the same seed, and so in the same state. What counts is the
    first episode of each, as far as the rollout goes: all of a group are cut at the same time, so that their returns
    can be compared. What an environment does after its first episode would begin elsewhere, and is left out.
    """

    begins_episodes = True

    def __init__(self, config: GroupConfig, num_envs: int, seed: int) -> None:
        """``seed`` draws those of the groups.

        Raises:
            UserError: the environments do not make whole groups of two or more.
        """
        self.size = config.group_size or num_envs
        if num_envs % self.size or self.size < 2:
            raise UserError(f"num_envs={num_envs} cannot be dealt out to groups of advantage.group_size={self.size}")
        self.seeds = np.random.default_rng(seed)

    def collect(
        self, actor: Actor, policy: Policy, steps: int, on_step: Callable[[int], None], storage: Storage
    ) -> Rollout:
        groups = self.seeds.integers(2**31, size=actor.env.num_envs // self.size)
        actor.reset(groups.repeat(self.size).tolist())
        return collect_episodes(actor, policy, steps, on_step, storage)

    def score(self, policy: Policy, rollout: Rollout) -> None:
        return None

    def estimate(self, rollout: Rollout, values: Values | None) -> Estimate:
        returns = torch.where(rollout.valid, rollout.rewards, 0.0).sum(0)  # [N]
        advantages = group_advantages(returns, self.size, rollout.valid.any(0))
        return Estimate(advantages.expand_as(rollout.rewards)[..., None], None, None)

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator of seeds."""
        return {"seeds": generator_state(self.seeds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seeds = generator_of(state["seeds"])


def make_estimator(
    config: AdvantageConfig,
    algo: UpdateConfig,
    policy: Policy,
    critic: AnyCritic | None,
    num_envs: int,
    seed: int,
) -> Estimator:
    """The estimator of a configuration.

    Raises:
        UserError: groups that do not fit, or a critic that they have no use for.
    """
    if isinstance(config, GroupConfig):
        if critic is not None:
            raise UserError("advantage=group has no use for a critic: leave critic=... out, or set critic=none")
        return GroupRelative(config, num_envs, seed)
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
    return GAE(config, algo, policy, critic, num_envs, generator)
