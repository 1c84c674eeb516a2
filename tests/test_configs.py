"""Every configuration file composes, and everything in it is known to the code that reads it."""

import dataclasses
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dppo import anchors, estimators
from dppo.annealing import Annealing
from dppo.building import DEFAULT_SAMPLER, PARTS, build_advantage, build_policy, build_task, build_update_rule
from dppo.cli import COMMANDS
from dppo.cloning import CloningConfig
from dppo.commands.finetune import trainer_config
from dppo.comparison.plan import ComparisonConfig, plan
from dppo.configuration import compose_config, config_directory, groups_of, options
from dppo.critic import make_critic
from dppo.envs.vector import Spaces, space_dims
from dppo.evaluation import EvaluationConfig
from dppo.output.run_directory import RunDirectory
from dppo.run_setup import build_sinks
from dppo.task import Task
from dppo.trainer import TrainerConfig
from dppo.updates.rules import CONFIGS
from policies import Policy, UserError
from policies.config import config_from_dict
from policies.networks.registry import DENOISERS
from policies.samplers import Sampler

TRAINING = ("collect", "pretrain", "finetune")
FILES = sorted(path.relative_to(config_directory()) for path in config_directory().rglob("*.yaml"))
CHOICES = [path for path in FILES if len(path.parts) == 2]


@cache
def spaces_of(task: str) -> Spaces:
    return space_dims(build_task(compose_config("finetune", [f"task={task}"])))


def fits(config: dict[str, Any], spaces: Spaces) -> bool:
    return spaces.discrete == (config["policy"]["type"] == "categorical")


def build_everything(command: str, config: dict[str, Any]) -> None:
    """Make every record and network that the command makes of its configuration."""
    if command == "compare":
        names = [field.name for field in dataclasses.fields(ComparisonConfig)]
        comparison = config_from_dict(ComparisonConfig, {name: config[name] for name in names}, "compare")
        of_one_seed = dataclasses.replace(comparison, seeds=comparison.seeds[:1])  # runs differ in it alone
        for run in plan(of_one_seed, Path("nowhere")):
            build_everything("finetune", compose_config("finetune", run.overrides))
        return
    spaces = spaces_of(build_task(config).name)
    policy = None
    if not config["policy"]["type"].startswith("diffusion") and config["network"]["type"] != "mlp":
        with pytest.raises(UserError, match=f"cannot use the network type '{config['network']['type']}'"):
            build_policy(config, spaces)
    elif fits(config, spaces):
        policy = build_policy(config, spaces)
        assert policy.config.chunk == config["policy"]["chunk"]
    else:
        with pytest.raises(UserError, match="use policy="):
            build_policy(config, spaces)
    if command in ("finetune", "collect"):
        assert type(build_update_rule(config)) is CONFIGS[config["algo"]["type"]]
        assert type(build_advantage(config)) is estimators.CONFIGS[config["advantage"]["type"]]
        if config["critic"]["type"] != "shared" and policy is not None:  # not every policy can share
            critic = make_critic(config["critic"], policy)
            assert (critic is None) == (config["critic"]["type"] == "none")
    if command in ("finetune", "pretrain"):
        evaluation = {key: value for key, value in config["evaluation"].items() if key != "interval"}
        config_from_dict(EvaluationConfig, evaluation, "evaluation")
    if command == "finetune":
        trainer_config(config)
    if command == "pretrain":
        names = [field.name for field in dataclasses.fields(CloningConfig)]
        config_from_dict(CloningConfig, {name: config[name] for name in names}, "pretrain")
    if command == "collect":
        assert config["demonstrator"]["type"] in ("expert", "waypoint")


# --- composing


@pytest.mark.parametrize("policy", options("policy"))
@pytest.mark.parametrize("task", options("task"))
@pytest.mark.parametrize("command", TRAINING)
def test_every_command_composes_with_every_task_and_policy(command, task, policy):
    config = compose_config(command, [f"task={task}", f"policy={policy}"])
    assert (config["task"]["name"], config["policy"]["type"]) == (task, policy)
    build_everything(command, config)


@pytest.mark.parametrize("task", options("task"))
@pytest.mark.parametrize("command", TRAINING)
def test_every_task_has_a_policy_that_fits_it_unless_told_otherwise(command, task):
    config = compose_config(command, [f"task={task}"])
    spaces = spaces_of(task)
    assert fits(config, spaces)
    build_policy(config, spaces)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_of_every_group_composes_with_the_commands_that_have_the_group(choice):
    group, name = choice.parent.name, choice.stem
    commands = [command for command in COMMANDS if group in groups_of(command)]
    assert commands, f"no command has the group {group}"
    extra = ["policy.finetuned_steps=null"] if group == "sampler" else []
    if group == "sampler":  # of a diffusion policy
        commands = ["pretrain", "finetune"]
    for command in commands if group != "experiment" else ["finetune"]:
        build_everything(command, compose_config(command, [f"{group}={name}", *extra]))


@pytest.mark.parametrize("network", options("network"))
@pytest.mark.parametrize("policy", options("policy"))
def test_every_policy_can_be_made_of_every_network_or_says_why_not(policy, network):
    task = "cartpole" if policy == "categorical" else "hopper"
    config = compose_config("finetune", [f"task={task}", f"policy={policy}", f"network={network}"])
    build_everything("finetune", config)


@pytest.mark.parametrize("policy", options("policy"))
@pytest.mark.parametrize("network", options("network"))
def test_a_network_has_its_own_settings_and_those_that_its_policy_adds(policy, network):
    config = compose_config("pretrain", [f"policy={policy}", f"network={network}"])
    added = {"step_dim"} if policy.startswith("diffusion") and config["network"]["type"] == "mlp" else set()
    assert config["network"].keys() == keys("network", f"{network}.yaml") | {"type"} | added


@pytest.mark.parametrize("network", options("network"))
def test_every_denoising_network_lists_every_setting_that_it_has(network):
    listed = compose_config("pretrain", ["policy=diffusion", f"network={network}"])["network"]
    assert listed.keys() - {"type"} == fields(DENOISERS[listed["type"]].Config)


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_the_defaults_of_a_denoising_network_are_those_of_its_record(network):
    settings = compose_config("pretrain", [f"network={network}"])["network"]
    default = dataclasses.asdict(DENOISERS[settings.pop("type")].Config())
    assert settings == {key: list(value) if isinstance(value, tuple) else value for key, value in default.items()}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("network.down_dim=[8]", "did you mean network.down_dims"),
        ("network.layers=3", "it belongs to network=transformer"),
        ("network.hidden_dims=[8]", "it belongs to network=mlp or network=residual_mlp"),
    ],
)
def test_a_setting_that_the_chosen_network_does_not_have_is_refused(override, says):
    with pytest.raises(UserError, match=says):
        compose_config("pretrain", ["network=unet", override])


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_says_which_task_it_is(name):
    text = (config_directory() / "experiment" / f"{name}.yaml").read_text()
    assert "override /task:" in text
    assert "override /policy:" in text


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "tuning"], ids=str)
def test_every_tuning_belongs_to_choices_that_there_are(path):
    """They are chosen by the choices of other groups, and a name that nobody makes would never take effect."""
    directory = path.parent.name
    groups = ["task"] if directory == "collect" else directory.split("_")
    names = ["_".join(names) for names in itertools.product(*(options(group) for group in groups))]
    assert path.stem in names


@pytest.mark.parametrize("algo", options("algo"))
@pytest.mark.parametrize("policy", options("policy"))
def test_every_policy_can_be_trained_by_every_update_rule(policy, algo):
    task = "cartpole" if policy == "categorical" else "hopper"
    config = compose_config("finetune", [f"task={task}", f"policy={policy}", f"algo={algo}"])
    assert config["algo"]["type"] == algo
    build_everything("finetune", config)


@pytest.mark.parametrize("kind", ["paper_{}", "paper_{}_gaussian"])
def test_the_papers_rows_differ_in_task_and_length_only(kind):
    tasks = ["hopper", "walker2d", "halfcheetah"]
    rows = [compose_config("finetune", [f"experiment={kind.format(task)}"]) for task in tasks]
    assert [row.pop("task")["name"] for row in rows] == tasks
    lengths = [row.pop("env_steps") for row in rows]
    assert rows[0] == rows[1] == rows[2]
    per_iteration = rows[0]["num_envs"] * rows[0]["rollout_steps"] * rows[0]["policy"]["chunk"]
    assert all(length % per_iteration == 0 for length in lengths)


def test_a_tuning_takes_effect_for_its_own_task_and_policy_only():
    assert compose_config("finetune", ["task=cartpole"])["checkpoint"] == "scratch"
    assert compose_config("finetune", ["task=hopper"])["checkpoint"] == "embedded"
    kinds = [compose_config("collect", [f"task={task}"])["demonstrator"]["type"] for task in ("maze", "hopper")]
    assert kinds == ["waypoint", "expert"]


def test_what_the_user_sets_wins_over_tuning_experiment_and_policy():
    config = compose_config("finetune", ["task=cartpole", "algo.batch_size=7", "env_steps=9"])
    assert (config["algo"]["batch_size"], config["env_steps"]) == (7, 9)
    config = compose_config("finetune", ["experiment=demo", "algo.clip=0.5", "policy.chunk=2"])
    assert (config["algo"]["clip"], config["policy"]["chunk"]) == (0.5, 2)


def test_every_command_composes_without_any_choice():
    for command in COMMANDS:
        needed = {
            "evaluate": ["checkpoint=somewhere"],
            "export": ["format=onnx", "checkpoint=somewhere", "output=elsewhere"],
            "import": ["source=somewhere", "output=elsewhere"],
        }
        config = compose_config(command, needed.get(command, []))
        seeds = {"evaluate": {"seed": 100_000}, "compare": {"seeds": [0, 1, 2, 3, 4]}}
        seeds |= {"import": {"task": None}, "export": {"state_dim": None}}
        assert seeds.get(command, {"seed": 0}).items() <= config.items()


# --- nothing unknown, nothing missing


def keys(*parts: str) -> set[str]:
    content = OmegaConf.to_container(OmegaConf.load(config_directory().joinpath(*parts)))
    assert isinstance(content, dict)
    return {str(key) for key in content.get(parts[0], content)} - {"defaults", "type"}


def fields(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


@pytest.mark.parametrize("name", options("algo"))
def test_every_update_rule_lists_every_setting_that_it_has(name):
    assert keys("algo", f"{name}.yaml") == fields(CONFIGS[name])


@pytest.mark.parametrize("name", options("algo"))
def test_the_defaults_of_an_update_rule_are_those_of_its_record(name):
    """But for those that two rules share a record in, and differ in."""
    rule = build_update_rule(compose_config("finetune", ["task=maze", "policy=gaussian", f"algo={name}"]))
    own = {key: value for key, value in vars(rule).items() if value != vars(CONFIGS[name]())[key]}
    shared = {
        "a2c": {"gae_lambda", "learning_rate", "normalize_advantages"},
        "awr": {"normalize_advantages"},
        "rwr": {"gae_lambda"},
        "vpg": {"gae_lambda", "learning_rate", "critic_epochs", "critic_batch_size"},
    }
    assert own.keys() == shared.get(name, set())


@pytest.mark.parametrize("name", options("advantage"))
def test_every_estimator_of_advantages_lists_every_setting_that_it_has(name):
    assert set(compose_config("finetune", [f"advantage={name}"])["advantage"]) - {"type"} == fields(
        estimators.CONFIGS[name]
    )


def test_group_relative_advantages_come_without_a_critic_unless_told_otherwise():
    config = compose_config("finetune", ["advantage=group"])
    assert (config["critic"]["type"], config["algo"]["normalize_advantages"]) == ("none", False)
    assert compose_config("finetune", ["advantage=group", "critic=mlp"])["critic"]["type"] == "mlp"


@pytest.mark.parametrize("name", options("anchor"))
def test_every_anchor_lists_every_setting_that_it_has(name):
    settings = dict(compose_config("finetune", [f"anchor={name}"])["anchor"])
    assert settings.pop("type") == name
    if name == "none":
        assert not settings
    else:
        assert settings.keys() == fields(anchors.CONFIGS[name])
        config_from_dict(anchors.CONFIGS[name], settings, "anchor")


@pytest.mark.parametrize("name", options("task"))
def test_every_task_lists_every_setting_that_a_task_has(name):
    assert set(compose_config("finetune", [f"task={name}"])["task"]) == fields(Task)


@pytest.mark.parametrize("name", options("policy"))
def test_every_policy_lists_every_setting_that_it_has(name):
    listed = set(compose_config("finetune", [f"policy={name}"])["policy"]) - {"type"}
    own = fields(Policy.registry[name].Config) - {"obs_dim", "action_dim", *PARTS}
    part = {"executed", "first_executed"}
    fixed = {"categorical": {*part, "choices", "masked"}, "mixture": part}  # by the task, or at all
    assert listed == own - fixed.get(name, set())


@pytest.mark.parametrize("name", options("sampler"))
def test_every_sampler_lists_every_setting_that_a_sampler_has(name):
    assert keys("sampler", f"{name}.yaml") == fields(Sampler)


def test_the_default_sampler_is_that_of_a_policy_that_names_none():
    settings = compose_config("finetune", [])["sampler"]
    assert settings == compose_config("finetune", [f"sampler={DEFAULT_SAMPLER}"])["sampler"]
    assert config_from_dict(Sampler, settings, "sampler") == Sampler()


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_the_evaluation_lists_every_setting_that_an_evaluation_has(command):
    assert set(compose_config(command, [])["evaluation"]) - {"interval"} == fields(EvaluationConfig)


def test_the_commands_list_every_setting_of_their_records():
    assert fields(TrainerConfig) <= keys("finetune.yaml")
    assert set(compose_config("finetune", [])["anneal"]) == fields(Annealing)
    assert fields(CloningConfig) <= keys("pretrain.yaml")
    assert fields(EvaluationConfig) <= keys("evaluate.yaml")
    assert fields(TrainerConfig) - {"seed", "max_minutes", "anneal"} < set(
        compose_config("collect", [])["demonstrator"]["expert"]
    )


@pytest.mark.parametrize("name", options("logger"))
def test_every_logger_can_be_made_or_says_what_is_missing(name, tmp_path):
    config = compose_config("finetune", [f"logger={name}"])
    run = RunDirectory(tmp_path)
    if name == "wandb":
        with pytest.raises(UserError, match="pip install wandb"):
            build_sinks(config, run, "env_steps")
        return
    sinks = build_sinks(config, run, "env_steps")
    assert len(sinks) == (name == "tensorboard")
    for sink in sinks:
        sink.close()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_left_out_of_these_tests(path: Path):
    """A new folder of configurations must be a group of some command, or hold what choices of a group share."""
    groups = {group for command in COMMANDS for group in groups_of(command)}
    commands = "".join((config_directory() / f"{command}.yaml").read_text() for command in COMMANDS)
    if len(path.parts) == 1:
        assert path.stem in COMMANDS
    elif len(path.parts) == 3 and path.parts[0] in groups:
        choices = "".join(one.read_text() for one in (config_directory() / path.parts[0]).glob("*.yaml"))
        assert f"  - {path.parts[1]}/{path.stem}\n" in choices
    else:
        assert path.parent.name in groups or f"  - optional {path.parent}: " in commands
