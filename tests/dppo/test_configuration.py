from pathlib import Path

import pytest

from dppo.configuration import compose_config, config_directory, groups_of, options, overridden_keys
from policies import UserError


def refusal(command: str, *overrides: str, extra: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        compose_config(command, overrides, extra)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what comes out


def test_a_configuration_is_plain_data():
    config = compose_config("finetune", ["task=hopper", "network.hidden_dims=[4,5]", "+task.env_kwargs.foo=1.5"])
    assert config["network"]["hidden_dims"] == [4, 5]
    assert type(config["network"]["hidden_dims"]) is list
    assert config["task"]["env_kwargs"] == {"foo": 1.5}
    assert config["num_envs"] == 40


def test_a_setting_may_refer_to_another():
    assert compose_config("finetune", ["rollout_steps=${num_envs}", "num_envs=7"])["rollout_steps"] == 7


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("env_steps=1e6", "env_steps", 1_000_000),
        ("env_steps=20_000", "env_steps", 20_000),
        ("seed='3'", "seed", 3),
        ("checkpoint=7", "checkpoint", "7"),
        ("overwrite=no", "overwrite", False),
        ("overwrite=yes", "overwrite", True),
        ("overwrite=TRUE", "overwrite", True),
    ],
)
def test_a_setting_of_the_command_has_the_type_of_its_default(override, name, expected):
    value = compose_config("finetune", [override])[name]
    assert value == expected
    assert type(value) is type(expected)


def test_a_setting_that_is_a_rate_may_be_written_as_an_integer():
    value = compose_config("pretrain", ["learning_rate=1"])["learning_rate"]
    assert (value, type(value)) == (1.0, float)


def test_the_keys_and_groups_that_were_overridden():
    assert overridden_keys(["task=hopper", "policy.chunk=3", "+task.env_kwargs.a=1", "++seed=4"]) == {
        "task",
        "policy.chunk",
        "task.env_kwargs.a",
        "seed",
    }


# --- errors, in one line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env_step=5"], "finetune has no setting 'env_step' (did you mean env_steps or num_envs?)"),
        (["env_steps=5", "env_steps_=5"], "finetune has no setting 'env_steps_' (did you mean env_steps"),
        (["policy=gaussian", "policy.initialstd=3"], "no setting 'policy.initialstd' (did you mean policy.initial_std"),
        (["task=hopper", "task.envid=a"], "finetune has no setting 'task.envid' (did you mean task.env_id"),
        (["algo=trpo", "algo.clip=0.1"], "finetune has no setting 'algo.clip' here; it belongs to algo=ppo"),
        (["policy=diffusion", "policy.squash=true"], "no setting 'policy.squash' here; it belongs to policy=gaussian"),
        (["algo=ppo", "algo.gama=1"], "finetune has no setting 'algo.gama' (did you mean algo.gamma"),
        (["tasks=hopper"], "finetune has no setting 'tasks' (did you mean task"),
        (["seed.value=1"], "finetune has no setting 'seed.value'"),
        (["+env_step=5"], "finetune has no setting 'env_step' (did you mean env_steps"),
        (["+evaluation.episode=5"], "finetune, evaluation has no setting 'episode' (did you mean episodes?)"),
        (["xyzzy=1"], "finetune has no setting 'xyzzy'"),
        (["inner_gamma=0.9"], "finetune has no setting 'inner_gamma' (did you mean algo.inner_gamma?)"),
        (["learned_eta=scalar"], "(did you mean sampler.learned_eta?)"),
        (["finetuned_steps=5"], "(did you mean anneal.finetuned_steps or policy.finetuned_steps?)"),
    ],
)
def test_an_unknown_setting_is_named_with_its_near_misses(overrides, message):
    assert message in refusal("finetune", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=hoper", "unknown task 'hoper' (did you mean hopper?); there are: acrobot, cartpole, halfcheetah"),
        ("policy=gausian", "unknown policy 'gausian' (did you mean gaussian"),
        ("algo=xyzzy", "unknown algo 'xyzzy'; there are: a2c, awr, npg, ppo, ppo_kl, ppo_mask, rwr, trpo, vpg"),
        ("experiment=demmo", "unknown experiment 'demmo' (did you mean demo?)"),
        ("task=null", "unknown task 'None'"),
        ("task=", "unknown task ''"),
        ("task=[hopper,maze]", "unknown task"),
        ("task=Hopper", "unknown task 'Hopper' (did you mean hopper"),
        ("task=../task/hopper", "unknown task '../task/hopper'"),
    ],
)
def test_an_unknown_choice_is_named_with_its_near_misses_and_all_there_are(override, message):
    assert message in refusal("finetune", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed' is no setting; settings are given as key=value"),
        ("seed: 3", "'seed: 3' is no setting; settings are given as key=value"),
        ("=3", "cannot read the override '=3': it names no setting"),
        ("network.hidden_dims=[64", "cannot read the override"),
        ("seed:=3", "cannot read the override"),
        ("seed=1,2,3", "seed=1,2,3 gives seed several values; start one run for each, or write a list: seed=[...]"),
        ("seed=range(3)", "gives seed several values"),
        ("~seed", "~seed: settings can be set, but neither removed nor moved"),
        ("task@elsewhere=hopper", "neither removed nor moved"),
        ("algo.learning_rate=${nothing}", "Interpolation key 'nothing' not found"),
        ("seed=${", "cannot read the override"),
        ("+seed=3", "An item is already at 'seed'"),
    ],
)
def test_what_cannot_be_read_is_one_line(override, message):
    assert message in refusal("finetune", override)


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("env_steps=many", "env_steps"),
        ("num_envs=1.5", "num_envs"),
        ("seed=null", "seed"),
        ("seed=abc", "seed"),
        ("overwrite=maybe", "overwrite"),
        ("video=2", "video"),
        ("checkpoint=null", "checkpoint"),
        ("checkpoint=[a]", "checkpoint"),
        ("checkpoint_interval=often", "checkpoint_interval"),
        ("evaluation.interval=often", "evaluation, interval"),
        ("evaluation=3", "evaluation"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_setting(override, setting):
    assert refusal("finetune", override).startswith(f"finetune, {setting}: ")


def test_an_evaluation_needs_a_checkpoint():
    assert refusal("evaluate") == "evaluate needs checkpoint=...; see `dppo evaluate --help`"


@pytest.mark.parametrize("command", ["evaluate", "pretrain"])
def test_a_setting_of_another_command_is_unknown(command):
    assert f"{command} has no setting 'rollout_steps'" in refusal(command, "rollout_steps=3")


# --- groups, and choices of one's own


def test_the_groups_of_a_command_are_those_of_its_defaults():
    assert groups_of("evaluate") == {"sampler": None}
    assert set(groups_of("pretrain")) == {"task", "policy", "network", "sampler", "logger"}
    assert options("policy") == ["categorical", "diffusion", "diffusion_ode", "gaussian", "mixture"]
    assert (config_directory() / "finetune.yaml").is_file()


@pytest.mark.parametrize(
    "needed", [["evaluate", "checkpoint=x"], ["import", "source=x", "output=y"]], ids=lambda n: n[0]
)
def test_some_commands_take_a_task_without_what_its_choice_means_for_training(needed):
    command, *rest = needed
    config = compose_config(command, [*rest, "task=cartpole", "task.max_episode_steps=7"])
    assert (config["task"]["name"], config["task"]["max_episode_steps"]) == ("cartpole", 7)
    assert "policy" not in config and "algo" not in config
    assert compose_config(command, rest)["task"] is None
    assert "unknown task 'hoper' (did you mean hopper?)" in refusal(command, *rest, "task=hoper")
    assert "name the task, too: task=..." in refusal(command, *rest, "task.max_episode_steps=7")
    assert "no setting 'policy'" in refusal(command, *rest, "policy=gaussian")


def own_task(folder: Path, text: str = "env_id: Reach-v0") -> Path:
    (folder / "task").mkdir(parents=True)
    content = f"name: reach\n{text}\nenv_kwargs: {{}}\nmax_episode_steps: null\nsuccess_reward: null\ndataset: ''\n"
    (folder / "task" / "reach.yaml").write_text(content)
    return folder


def test_a_directory_of_ones_own_adds_choices(tmp_path):
    mine = own_task(tmp_path)
    assert compose_config("finetune", ["task=reach"], mine)["task"]["env_id"] == "Reach-v0"
    assert "reach" in options("task", mine)
    assert "reach" in refusal("finetune", "task=reech", extra=mine)
    assert "unknown task 'reach'" in refusal("finetune", "task=reach")
    assert compose_config("finetune", ["task=hopper"], mine)["task"]["name"] == "hopper"


def test_a_directory_of_ones_own_may_have_blanks_in_its_name(tmp_path):
    mine = own_task(tmp_path / "my own configs")
    assert compose_config("pretrain", ["task=reach"], mine)["task"]["name"] == "reach"


def test_a_typo_in_an_experiment_of_ones_own_is_found(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nenv_step: 5\n")
    assert "finetune has no setting 'env_step' (did you mean env_steps" in refusal(
        "finetune", "experiment=mine", extra=tmp_path
    )


def test_a_file_of_ones_own_that_is_no_yaml_is_one_line(tmp_path):
    mine = own_task(tmp_path, "env_id: [")
    assert "reach.yaml" in refusal("finetune", "task=reach", extra=mine)


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    assert refusal("finetune", extra=tmp_path / "nowhere") == f"--config-dir {tmp_path}/nowhere is not a directory"


def test_what_another_command_chooses_is_not_offered():
    message = refusal("evaluate", "checkpoint=x", "policy.finetuned_steps=5")
    assert message == (
        "evaluate has no setting 'policy.finetuned_steps', nor any other of policy; see `dppo evaluate --help`"
    )


@pytest.mark.parametrize(
    ("choice", "setting"),
    [("algo=trpo", "algo.epochs"), ("algo=ppo_mask", "algo.clip"), ("policy=gaussian", "policy.denoising_steps")],
)
def test_a_choice_that_lacks_what_an_experiment_sets_is_refused_by_both_names(choice, setting):
    message = refusal("finetune", "experiment=paper_hopper", choice)
    assert message.startswith(f"experiment=paper_hopper sets {setting}")
    assert message.endswith(f", which {choice} does not have; leave one of them out")
    assert compose_config("finetune", ["experiment=paper_hopper", "algo=ppo", "policy=diffusion", "critic=mlp"])
    assert compose_config("finetune", ["experiment=paper_hopper"], implied=[choice])  # of a checkpoint, say
