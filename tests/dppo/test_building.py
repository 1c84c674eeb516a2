from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo.building import (
    build_policy,
    build_task,
    build_update_rule,
    check_spaces,
    implied_choices,
    scratch_policy,
    starting_point,
    with_sampler,
)
from dppo.checkpoint import save_checkpoint
from dppo.configuration import compose_config, overridden_keys
from dppo.envs.vector import space_dims
from dppo.task import Task
from dppo.updates.first_order_config import PPOConfig
from policies import DiffusionPolicy, ODEPolicy, Policy, UserError
from policies.samplers import Sampler

SMALL = ["network.hidden_dims=[8,8,8]", "policy.denoising_steps=4", "policy.finetuned_steps=2"]


def compose(*overrides: str, policy: str = "diffusion") -> dict[str, Any]:
    """A fine-tuning configuration on the test's own environment."""
    small = SMALL if policy == "diffusion" else SMALL[:1]
    task = ["task=hopper", "task.name=point", "task.env_id=Point-v0", f"policy={policy}", *small]
    return compose_config("finetune", [*task, *overrides])


@pytest.fixture
def pretrained(small_policy: Callable[..., Policy], point_task: Task, tmp_path: Path) -> Path:
    """A diffusion policy all of whose 4 denoising steps were cloned, and none fine-tuned."""
    policy = small_policy("diffusion", finetuned_steps=None, executed=None, likelihood_std=0.3)
    return save_checkpoint(tmp_path / "pretrained" / "checkpoints" / "1", policy, point_task, {})


@pytest.fixture
def finetuned(small_policy: Callable[..., Policy], point_task: Task, tmp_path: Path) -> Path:
    policy = small_policy("diffusion", finetuned_steps=3, likelihood_std=0.3)
    return save_checkpoint(tmp_path / "finetuned" / "checkpoints" / "1", policy, point_task, {})


def start(path: Path, *overrides: str, policy: str = "diffusion") -> Any:
    config = compose(f"checkpoint={path}", *overrides, policy=policy)
    return starting_point(config, overridden_keys(overrides))[0]


# --- where it starts


def test_the_result_of_a_checkpoint_is_not_that_of_what_becomes_of_it(pretrained):
    policy = Policy.from_pretrained(pretrained / "policy")
    policy.metadata["evaluation"] = {"return_mean": 1.0}
    policy.save_pretrained(pretrained.parent / "evaluated")
    assert start(pretrained.parent / "evaluated").metadata.keys() == {"task"}


# --- samplers


def test_a_pretrained_policy_is_finetuned_under_the_sampler_that_is_named(pretrained):
    policy = start(pretrained, "sampler=ddim", "sampler.steps=2")
    assert (policy.config.sampler.steps, policy.config.sampler.evaluation_eta) == (2, 0.0)
    assert policy.num_steps == policy.config.finetuned_steps == 2


def test_the_default_number_of_finetuned_steps_is_no_more_than_a_sampler_has(pretrained):
    policy = start(pretrained, "sampler=ddim", "sampler.steps=1")
    assert policy.num_steps == 1
    with pytest.raises(UserError, match=r"finetuned_steps must lie between 1 and sampler.steps = 1, not 2"):
        start(pretrained, "sampler=ddim", "sampler.steps=1", "policy.finetuned_steps=2")


def test_a_checkpoint_keeps_its_own_sampler_unless_another_is_named(pretrained, tmp_path, point_task):
    policy = start(pretrained, "sampler=ddim", "sampler.steps=2")
    saved = save_checkpoint(tmp_path / "ddim" / "checkpoints" / "1", policy, point_task, {})
    assert start(saved).config.sampler == policy.config.sampler
    assert start(saved, "sampler=ddpm").config.sampler == Sampler()


def test_a_policy_from_scratch_has_the_sampler_that_is_named():
    config = compose("checkpoint=scratch", "sampler=ddim", "sampler.steps=2")
    policy = scratch_policy(config, build_task(config))
    assert isinstance(policy, DiffusionPolicy) and policy.num_steps == policy.config.sampler.steps == 2


@pytest.mark.parametrize(("steps", "warned"), [(1, False), (2, False), (3, True), (4, False)])
def test_steps_that_leave_the_noisiest_timesteps_out_are_warned_of(pretrained, caplog, steps, warned):
    policy = start(pretrained, "sampler=ddim", f"sampler.steps={steps}")
    assert policy.timesteps[-1] == {1: 0, 2: 2, 3: 2, 4: 3}[steps]
    says = "sampler.steps=3 does not divide policy.denoising_steps=4: the 1 noisiest timesteps are left out"
    assert (says in caplog.text) == warned
    assert ("sampler.steps=4 leaves none out" in caplog.text) == warned


def test_no_steps_are_not_all_of_them(pretrained):
    with pytest.raises(UserError, match=r"finetuned_steps must lie between 1 and denoising_steps = 4, not 0"):
        start(pretrained, "policy.finetuned_steps=0")
    assert start(pretrained, "policy.finetuned_steps=null").num_steps == 4


def test_a_policy_from_scratch_without_a_chain_has_no_sampler(point_task):
    with pytest.raises(UserError, match=r"a gaussian policy has no sampler; leave sampler=... out"):
        scratch_policy(compose("checkpoint=scratch", "sampler=ddim", policy="gaussian"), point_task)


def test_a_policy_without_a_chain_has_no_sampler(small_policy):
    with pytest.raises(UserError, match=r"a gaussian policy has no sampler; leave sampler=... out"):
        with_sampler(small_policy("gaussian"), {"steps": 5})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampler.steps=9", "sampler.steps must not exceed denoising_steps = 4, but is 9"),
        ("sampler.eta=2", r"sampler: eta must lie in \[0, 1\], not 2"),
        ("+sampler.stepz=2", r"sampler has no setting 'stepz' \(did you mean steps"),
    ],
)
def test_a_wrong_setting_of_the_sampler_is_named(pretrained, override, says):
    with pytest.raises(UserError, match=says):
        start(pretrained, "sampler=ddim", override)


# --- from a checkpoint


def test_a_pretrained_policy_takes_what_was_chosen_from_the_configuration_and_all_else_from_itself(pretrained):
    policy = start(pretrained, "policy.exploration_std=0.2")
    assert policy.num_steps == policy.config.finetuned_steps == 2
    assert policy.config.exploration_std == 0.2
    assert policy.config.likelihood_std == 0.3, "the configuration has its default of 0.1"
    assert (policy.config.denoising_steps, policy.config.chunk, policy.config.history) == (4, 3, 2)


def test_the_frozen_and_the_trained_network_both_begin_with_the_cloned_weights(pretrained):
    policy = start(pretrained)
    frozen = policy.frozen.state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in policy.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in policy.frozen.parameters())


def test_a_finetuned_policy_keeps_its_own_settings_unless_they_are_given(finetuned):
    policy = start(finetuned)
    assert (policy.num_steps, policy.config.likelihood_std) == (3, 0.3), "the configuration has 2 and 0.1"
    assert start(finetuned, "policy.likelihood_std=0.2").config.likelihood_std == 0.2


def test_all_steps_finetuned_stay_all_steps_finetuned(pretrained, point_task, tmp_path):
    first = start(pretrained, "policy.finetuned_steps=null")
    assert (first.num_steps, first.config.finetuned_steps, first.frozen) == (4, 4, None)
    again = save_checkpoint(tmp_path / "again" / "checkpoints" / "1", first, point_task, {})
    assert start(again).num_steps == 4, "the configuration has 2"


def test_a_diffusion_policy_from_scratch_freezes_nothing_unless_asked(point_task):
    assert scratch_policy(compose(), point_task).frozen is None
    asked = "policy.finetuned_steps=1"
    assert scratch_policy(compose(asked), point_task, overridden_keys([asked])).num_steps == 1


def test_an_experiment_counts_as_a_choice_and_a_default_does_not(pretrained, finetuned):
    """The configuration's own files set what the user did not name on the command line."""
    for path in (pretrained, finetuned):
        chosen = starting_point(compose(f"checkpoint={path}", "policy.exploration_std=0.2"), set())[0].config
        assert (chosen.exploration_std, chosen.likelihood_std) == (0.2, 0.3)  # type: ignore[attr-defined]


def test_another_number_of_finetuned_steps_does_not_fit_a_finetuned_policy(finetuned):
    with pytest.raises(UserError, match="already fine-tuned on its last 3 steps; leave it out"):
        start(finetuned, "policy.finetuned_steps=1")


@pytest.mark.parametrize("override", ["policy.chunk=5", "policy.history=1", "policy.denoising_steps=8"])
def test_a_setting_that_the_weights_fix_cannot_be_overridden(pretrained, finetuned, override):
    name = override.split("=")[0]
    for path in (pretrained, finetuned):
        with pytest.raises(UserError, match=f"{name} is fixed by the checkpoint's weights"):
            start(path, override)


@pytest.mark.parametrize("override", ["network=mlp", "network.hidden_dims=[4,4,4]"])
def test_the_network_cannot_be_overridden(pretrained, override):
    with pytest.raises(UserError, match="the network is fixed by the checkpoint"):
        start(pretrained, override)


def test_an_override_that_says_what_the_checkpoint_has_anyway_is_no_error(pretrained):
    assert start(pretrained, "policy.chunk=3", "policy.history=2").config.chunk == 3


def test_a_checkpoint_of_another_kind_than_the_one_asked_for_is_refused(pretrained):
    with pytest.raises(UserError, match=r"holds a diffusion policy, not a gaussian one"):
        start(pretrained, "policy=gaussian", policy="gaussian")


def test_the_flow_of_a_diffusion_checkpoint_is_finetuned_if_it_is_named(pretrained):
    policy = start(pretrained, "policy=diffusion_ode", "policy.solver=heun3", policy="diffusion_ode")
    assert isinstance(policy, ODEPolicy)
    assert (policy.config.solver, policy.config.chunk, policy.config.denoising_steps) == ("heun3", 3, 4)
    weights = Policy.from_pretrained(pretrained / "policy").state_dict()
    assert all(torch.equal(ours, weights[name]) for name, ours in policy.state_dict().items())


def test_the_flow_of_a_finetuned_chain_is_refused_and_so_are_settings_of_its_weights(finetuned, pretrained):
    with pytest.raises(UserError, match="fine-tuned on its last 3 steps"):
        start(finetuned, "policy=diffusion_ode", policy="diffusion_ode")
    with pytest.raises(UserError, match=r"policy\.chunk is fixed"):
        start(pretrained, "policy=diffusion_ode", "policy.chunk=2", policy="diffusion_ode")
    with pytest.raises(UserError, match="a diffusion_ode policy has no sampler"):
        start(pretrained, "policy=diffusion_ode", "sampler=ddim", policy="diffusion_ode")


def test_a_checkpoint_of_a_task_with_other_dimensions_is_refused_with_both(pretrained):
    with pytest.raises(UserError) as caught:
        start(pretrained, "task.env_id=Hopper-v5")
    message = str(caught.value)
    assert str(pretrained) in message
    assert "does not fit task point" in message
    assert "obs_dim 2 (observation 2, action 2), the task has 11 (observation 11, action 3)" in message


def test_the_task_is_the_checkpoints_own_unless_one_is_named(pretrained, point_task):
    config = compose(f"checkpoint={pretrained}", "task.success_reward=-0.5")
    assert starting_point(config, {"checkpoint"})[1] == point_task
    assert starting_point(config, {"checkpoint", "task.success_reward"})[1].success_reward == -0.5


def test_a_checkpoint_implies_the_choices_that_go_with_it(small_policy, tmp_path):
    task = Task("walker2d", "Point-v0")
    run = save_checkpoint(tmp_path / "run" / "checkpoints" / "1", small_policy("gaussian"), task, {}).parent.parent
    config = compose_config("finetune", [f"checkpoint={run}"])
    assert implied_choices(config, {"checkpoint"}) == ["policy=gaussian", "task=walker2d"]
    assert implied_choices(config, {"checkpoint", "task"}) == ["policy=gaussian"]
    assert implied_choices(config, {"checkpoint", "task", "policy"}) == []


def test_a_checkpoint_of_another_type_of_network_implies_its_choice(small_policy, point_task, tmp_path):
    network = {"type": "unet", "down_dims": [8]}
    policy = small_policy("diffusion", finetuned_steps=None, network=network)
    run = save_checkpoint(tmp_path / "run" / "checkpoints" / "1", policy, point_task, {}).parent.parent
    config = compose_config("finetune", [f"checkpoint={run}"])
    assert implied_choices(config, {"checkpoint"}) == ["policy=diffusion", "network=unet"]
    assert implied_choices(config, {"checkpoint", "network"}) == ["policy=diffusion"]


def test_a_task_that_is_no_choice_here_is_not_implied(pretrained):
    assert implied_choices(compose_config("finetune", [f"checkpoint={pretrained}"]), set()) == ["policy=diffusion"]


def test_nothing_is_implied_from_scratch_or_for_a_command_that_has_no_choice_of_policy(pretrained):
    assert implied_choices(compose("checkpoint=scratch"), set()) == []
    assert implied_choices(compose_config("evaluate", [f"checkpoint={pretrained}"]), set()) == []
    assert implied_choices(compose_config("pretrain", []), set()) == []


# --- from scratch


def test_a_policy_from_scratch_has_running_statistics_and_the_bounds_of_the_actions(point_task):
    policy = start(Path("scratch"), "policy.chunk=2", policy="gaussian")
    assert policy.config.observation_scaling == "running"
    assert policy.config.chunk == 2
    torch.testing.assert_close(
        policy.action_scaler.denormalize(torch.tensor([[-1.0, 1.0]])), torch.tensor([[-1.0, 1.0]])
    )


def test_a_policy_from_scratch_maps_its_unit_range_onto_the_actions():
    task = Task("pendulum", "Pendulum-v1")
    policy: Any = scratch_policy(compose(policy="gaussian"), task)
    torch.testing.assert_close(
        policy.action_scaler.denormalize(torch.tensor([[-1.0], [0.5]])), torch.tensor([[-2.0], [1.0]])
    )


def test_actions_without_bounds_need_a_pretrained_checkpoint(counting_task):
    with pytest.raises(UserError, match="task counting: its actions have no bounds"):
        scratch_policy(compose(policy="gaussian"), counting_task)


@pytest.mark.parametrize(
    ("env_id", "policy", "says"),
    [
        ("CartPole-v1", "gaussian", "the gaussian policy has continuous actions, but task point has discrete ones; "),
        ("Point-v0", "categorical", "the categorical policy has discrete actions, but task point has continuous ones"),
    ],
)
def test_a_policy_for_the_other_kind_of_actions_is_refused(env_id, policy, says):
    spaces = space_dims(Task("point", env_id))
    with pytest.raises(UserError, match=says):
        build_policy(compose(policy=policy), spaces)


def test_a_policy_that_fits_passes(small_policy, point_task):
    check_spaces(small_policy("gaussian"), space_dims(point_task), "this", "point")


# --- records


def test_the_task_is_the_configured_one():
    task = build_task(compose("task.max_episode_steps=7", "task.success_reward=0.5"))
    assert task == Task("point", "Point-v0", {}, 7, 0.5, "dppo/hopper/weak-v0")


def test_the_update_rule_is_the_configured_one():
    algo = build_update_rule(compose("algo.clip=0.3", "algo.log_prob_clamp=[-1,1]"))
    assert isinstance(algo, PPOConfig)
    assert (algo.clip, algo.log_prob_clamp, algo.log_ratio) == (0.3, (-1.0, 1.0), "mean")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("algo.type=trpq", "unknown algo.type 'trpq'"),
        ("algo.log_ratio=product", "algo, log_ratio: .*'sum' or 'mean'"),
        ("algo.learning_rate=fast", "algo, learning_rate: .*fast"),
        ("algo.epochs=2.5", "algo, epochs: .*2.5"),
        ("algo.schedule=falling", "algo, schedule: must be 'constant', 'linear' or 'cosine', not 'falling'"),
        ("algo.epochs=0", "epochs must be at least 1"),
        ("+algo.clipp=1", r"algo has no setting 'clipp' \(did you mean clip"),
    ],
)
def test_a_wrong_setting_of_the_update_rule_is_named(override, says):
    with pytest.raises(UserError, match=says):
        build_update_rule(compose(override))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.chunk=long", "chunk: .*long"),
        ("policy.finetuned_steps=9", "finetuned_steps must lie between 1 and denoising_steps = 4, not 9"),
        ("policy.executed=9", "executed must lie between 1 and chunk = 4"),
        ("policy.likelihood_std=0", "likelihood_std must be positive"),
        ("network.activation=rellu", "unknown activation 'rellu'"),
    ],
)
def test_a_wrong_setting_of_the_policy_is_named(point_task, override, says):
    with pytest.raises(UserError, match=says) as caught:
        scratch_policy(compose(override), point_task, overridden_keys([override]))
    assert "\n" not in str(caught.value)
