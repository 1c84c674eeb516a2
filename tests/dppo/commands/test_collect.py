import os
import signal
from typing import Any

import minari
import numpy as np
import pytest
import torch

from dppo.commands import collect
from dppo.commands.collect import PolicyDemonstrator
from dppo.data.demos import load_episodes
from dppo.stopping import Stopped
from dppo.trainer import Trainer

CARTPOLE = ("task=cartpole", "network.hidden_dims=[8]")


def test_an_expert_is_trained_until_it_is_good_enough_and_no_longer(command, tmp_path):
    summary = command("collect", *CARTPOLE, f"run={tmp_path / 'run'}")
    assert summary["training_env_steps"] == 240
    assert summary["demonstrator"] == "PPO, categorical policy"
    assert minari.load_dataset("dppo/cartpole/weak-v0").storage.metadata["algorithm_name"] == "PPO, categorical policy"


def test_an_expert_that_does_not_get_there_is_an_error_and_records_nothing(refused, tiny, tmp_path):
    budget = ["demonstrator.expert.target_return=10_000", "demonstrator.expert.env_steps=480"]
    message = refused("collect", *tiny["collect"], *CARTPOLE, f"run={tmp_path / 'run'}", *budget)
    assert "in 480 steps, not demonstrator.expert.target_return=10000" in message
    assert "lower it, or raise demonstrator.expert.env_steps" in message
    assert minari.list_local_datasets() == {}
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1, "what was trained is kept"


def test_a_scripted_controller_needs_no_training(command, tmp_path):
    summary = command("collect", "task=maze", "steps=30", f"run={tmp_path / 'run'}")
    assert (summary["demonstrator"], summary["training_env_steps"]) == ("WaypointController", 0)
    assert summary["demonstrations"]["success_rate"] is not None
    assert load_episodes("dppo/maze/noisy-v0")[0].observation.shape[1] == 8


def test_the_seed_decides_the_demonstrations(command, tmp_path):
    actions = []
    for number, seed in enumerate((3, 3, 4)):
        dataset = f"me/cart{number}-v0"
        command("collect", *CARTPOLE, f"run={tmp_path / str(number)}", f"dataset={dataset}", f"seed={seed}")
        actions.append(np.concatenate([episode.action for episode in load_episodes(dataset)]))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])


def test_an_expert_whose_training_is_stopped_is_saved_and_records_nothing(command, tmp_path, monkeypatch):
    iterate = Trainer.iterate

    def stopped(trainer: Trainer, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return iterate(trainer, *arguments)

    monkeypatch.setattr(Trainer, "iterate", stopped)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; the expert is saved in .*/checkpoints/240 as it was"):
        command("collect", *CARTPOLE, f"run={tmp_path / 'run'}", "demonstrator.expert.target_return=1e9")
    assert minari.list_local_datasets() == {}


# --- errors


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(collect, "_train_expert", lambda *args, **kwargs: pytest.fail("an expert was trained"))


def test_an_existing_dataset_is_refused_before_any_training(command, refused, tiny, tmp_path, monkeypatch):
    command("collect", *CARTPOLE, f"run={tmp_path / 'run'}")
    monkeypatch.setattr(collect, "_train_expert", lambda *args, **kwargs: pytest.fail("an expert was trained"))
    message = refused("collect", *tiny["collect"], *CARTPOLE, f"run={tmp_path / 'other'}")
    assert "dataset dppo/cartpole/weak-v0 exists already" in message
    assert not (tmp_path / "other").exists()


def test_an_environment_that_cannot_be_stored_is_refused_before_any_training(refused, point, tiny, untrained, tmp_path):
    message = refused("collect", *tiny["collect"], *point, f"run={tmp_path / 'run'}")
    assert "Point-v0 cannot be stored in a dataset: register it under the name of its class" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps must be at least 1"),
        ("dataset=weak", "is not of the form namespace/name-v0"),
        ("task.dataset=''", "task cartpole names no dataset to write; set dataset=me/cartpole/mine-v0"),
        ("demonstrator.type=human", "unknown demonstrator.type 'human'; there are: expert, waypoint"),
        ("demonstrator.type=waypoint", "the waypoint controller only knows PointMaze environments"),
        ("policy=gaussian", "use policy=categorical"),
        ("demonstrator.expert.num_envs=0", "must be at least 1"),
        ("+demonstrator.expert.speed=2", "has no setting 'speed'"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(refused, tiny, tmp_path, override, message):
    assert message in refused("collect", *tiny["collect"], *CARTPOLE, f"run={tmp_path / 'run'}", override)


# --- a policy as a demonstrator


class Recorder(torch.nn.Module):
    """Answers with the number of the call and of the action in the chunk, and keeps what it saw."""

    discrete = False

    def __init__(self, history: int, chunk: int) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"history": history})
        self.chunk, self.seen = chunk, []

    def sample(self, obs: torch.Tensor, generator: torch.Generator) -> Any:
        self.seen.append(obs[0, :, 0].tolist())
        action = torch.tensor([[[10.0 * len(self.seen) + i] for i in range(self.chunk)]])
        return type("Sample", (), {"action": action})


def test_a_policy_demonstrates_its_chunks_step_by_step_and_sees_every_step(small_policy):
    policy = Recorder(history=3, chunk=2)
    demonstrator = PolicyDemonstrator(policy, seed=0)  # type: ignore[arg-type]
    actions = []
    for first in (0, 100):
        demonstrator.reset(np.array([first]))
        actions += [float(demonstrator(np.array([first + step]))[0]) for step in range(5)]
    assert policy.seen == [[0, 0, 0], [0, 1, 2], [2, 3, 4], [100, 100, 100], [100, 101, 102], [102, 103, 104]]
    assert actions == [10, 11, 20, 21, 30, 40, 41, 50, 51, 60], "and begins a new chunk with a new episode"


def test_a_discrete_policy_demonstrates_integers(small_policy):
    demonstrator = PolicyDemonstrator(small_policy("categorical"), seed=0)
    demonstrator.reset(np.zeros(2))
    actions = [demonstrator(np.zeros(2)) for _ in range(50)]
    assert {type(action) for action in actions} == {int}
    assert set(actions) == {0, 1, 2}, "with its exploration"
