"""A training that is taken up from a checkpoint is the one that never stopped, to the last bit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo.anchors import Anchor, KLPenalty, KLReward
from dppo.annealing import Annealing
from dppo.checkpoint import load_policy, save_checkpoint
from dppo.commands.finetune import FREE
from dppo.estimators import GAEConfig, GroupConfig
from dppo.output.metrics import Row
from dppo.randomness import shared_state
from dppo.resuming import restore
from dppo.states import read_state
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.config import UpdateConfig
from dppo.updates.first_order_config import PPOConfig, PPOKLConfig
from dppo.updates.natural import TRPOConfig
from dppo.updates.weighted_imitation import WeightedImitationConfig
from policies import Policy, UserError

MLP = {"type": "mlp", "hidden_dims": [8], "activation": "tanh"}
CARTPOLE = Task("cartpole", "CartPole-v1", max_episode_steps=17)
HOPPER = Task("hopper", "Hopper-v5", max_episode_steps=30)
POINT = Task("point", "Point-v0", {"length": 7}, success_reward=-0.1)

Make = Callable[[Policy | None], Trainer]
"""A trainer of the policy, or of a fresh one."""


@pytest.fixture
def trainers(small_policy: Callable[..., Policy]) -> Callable[..., Make]:
    """Makes trainers of one kind."""

    def of(
        kind: str,
        task: Task,
        algo: UpdateConfig,
        *,
        settings: dict[str, Any] | None = None,
        critic: dict[str, Any] = MLP,
        advantage: GAEConfig | GroupConfig | None = None,
        anchor: Callable[[Policy], Anchor] | None = None,
        **size: Any,
    ) -> Make:
        def make(policy: Policy | None = None) -> Trainer:
            policy = small_policy(kind, **(settings or {})) if policy is None else policy
            config = TrainerConfig(**{"env_steps": 300, "num_envs": 3, "rollout_steps": 5, "seed": 2, **size})
            anchored = None if anchor is None else anchor(policy)
            return Trainer(policy, task, config, algo, critic, advantage, anchored)

        return make

    return of


HOPPER_SIZES = {"obs_dim": 11, "action_dim": 3}
CASES: dict[str, dict[str, Any]] = {
    "diffusion ppo": dict(kind="diffusion", task=POINT, algo=PPOConfig(epochs=2, batch_size=20)),
    "native environments": dict(
        kind="diffusion", task=HOPPER, algo=PPOConfig(epochs=1), settings=HOPPER_SIZES, rollout_steps=9
    ),
    "gaussian trpo with running scaling": dict(
        kind="gaussian", task=POINT, algo=TRPOConfig(critic_epochs=1), settings={"observation_scaling": "running"}
    ),
    "adapted kl penalty": dict(kind="gaussian", task=POINT, algo=PPOKLConfig(epochs=2, learning_rate=0.01)),
    "learning rate by kl": dict(
        kind="gaussian", task=POINT, algo=PPOConfig(epochs=2, learning_rate=0.01, desired_kl=1.0, schedule="linear")
    ),
    "cartpole": dict(
        kind="categorical", task=CARTPOLE, algo=PPOConfig(epochs=2), settings={"obs_dim": 4, "action_dim": 2}
    ),
    "annealed steps": dict(
        kind="diffusion",
        task=POINT,
        algo=PPOConfig(epochs=2),
        anneal=Annealing(finetuned_steps=1, exploration_std=0.02),
        env_steps=120,
    ),
    "anchor": dict(kind="diffusion", task=POINT, algo=PPOConfig(epochs=2), anchor=lambda policy: KLPenalty(1, policy)),
    "anchor in the reward": dict(
        kind="gaussian", task=POINT, algo=TRPOConfig(), anchor=lambda policy: KLReward(0.1, policy)
    ),
    "group": dict(
        kind="gaussian", task=POINT, algo=PPOConfig(epochs=2), critic={"type": "none"}, advantage=GroupConfig()
    ),
    "latent critic": dict(
        kind="diffusion", task=POINT, algo=PPOConfig(epochs=1), critic={"type": "latent", "network": MLP}
    ),
    "shared critic": dict(kind="gaussian", task=POINT, algo=PPOConfig(epochs=2), critic={"type": "shared"}),
    "weighted imitation": dict(kind="diffusion", task=POINT, algo=WeightedImitationConfig(epochs=1, batch_size=8)),
    "mixture": dict(kind="mixture", task=POINT, algo=PPOConfig(epochs=1)),
}


def iterated(trainer: Trainer, count: int) -> list[Row]:
    rows = [trainer.iterate() for _ in range(count)]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    critic = {} if trainer.critic is None else trainer.critic.state_dict()
    named = {"policy": trainer.policy.state_dict(), "critic": critic}
    return {f"{part}.{name}": value.clone() for part, values in named.items() for name, value in values.items()}


def saved(trainer: Trainer, path: Path) -> Path:
    return save_checkpoint(path, trainer.policy, trainer.task, {**trainer.state_dict(), "notes": {"device": "cpu"}})


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_is_the_one_that_never_stopped(trainers, tmp_path, case):
    make: Make = trainers(**CASES[case])
    whole = make(None)
    iterated(whole, 3)
    path = saved(whole, tmp_path / "1")
    expected = iterated(whole, 4)
    torch.rand(3)  # whatever came between
    resumed = make(load_policy(path / "policy")[0])
    exactly, _ = restore(path, resumed, torch.device("cpu"), FREE)
    assert exactly
    assert iterated(resumed, 4) == expected
    found, wanted = weights(resumed), weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert resumed.first_steps == whole.first_steps
    if case == "annealed steps":
        assert whole.policy.num_steps < whole.first_steps
    ends = [read_state(saved(trainer, tmp_path / name) / "trainer") for trainer, name in ((whole, "a"), (resumed, "b"))]
    assert without_times(ends[0]) == without_times(ends[1])
    whole.close()
    resumed.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"notes": {"device": "cuda"}}, "written on device=cuda and goes on on that kind of device only, not on cpu"),
        ({"notes": {}}, "notes, device: Field required"),
        ({"notes": [1]}, "notes, device: Field required"),
        ({"notes": {"device": "cpu", "best": {"steps": 3}}}, "notes, best"),
        ({"notes": {"device": "cpu", "before": 3}}, "notes, before"),
        ({"randomness": {}}, "lacks entry 'randomness/numpy'"),
        ({"randomness": {**shared_state(), "torch": torch.zeros(3)}}, "entry 'randomness/torch' is Tensor"),
        (
            {"randomness": {**shared_state(), "numpy": np.random.default_rng(0).bit_generator.state}},
            "entry 'randomness/numpy",
        ),
        (
            {"randomness": {**shared_state(), "python": {**shared_state()["python"], "version": 9}}},
            "the state of the random generators is damaged: state with version 9",
        ),
    ],
)
def test_a_state_that_is_none_of_this_training_is_refused_in_a_line(trainers, tmp_path, changes, told):
    trainer: Trainer = trainers(**CASES["cartpole"])(None)
    state = {**trainer.state_dict(), "notes": {"device": "cpu"}, **changes}
    path = save_checkpoint(tmp_path / "1", trainer.policy, trainer.task, state)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        restore(path, trainer, torch.device("cpu"), FREE)
    assert str(path / "trainer" / "state.json") in str(caught.value)
    trainer.close()


def without_times(state: Any) -> Any:
    """A state that can be compared."""
    if isinstance(state, dict):
        return {name: without_times(value) for name, value in state.items() if name != "wall_clock_s"}
    if isinstance(state, list | tuple):
        return [without_times(value) for value in state]
    return state.tolist() if isinstance(state, Tensor | np.ndarray) else state
