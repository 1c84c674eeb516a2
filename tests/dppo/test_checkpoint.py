import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dppo import checkpoint
from dppo.checkpoint import find_policy, load_policy, save_checkpoint
from dppo.envs.vector import make_plain_env
from dppo.task import Task, permitted
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import PPOConfig
from policies import Policy, UserError


@pytest.fixture
def saved(small_policy: Callable[..., Policy], point_task: Task, tmp_path: Path) -> Path:
    """A checkpoint with next to nothing of a training in it."""
    path = tmp_path / "run" / "checkpoints" / "100"
    return save_checkpoint(path, small_policy("diffusion"), point_task, {"iteration": 1})


# --- saving


def test_a_checkpoint_holds_the_critic_the_optimisers_and_the_generators(small_policy, point_task, tmp_path):
    policy = small_policy("diffusion")
    trainer = Trainer(policy, point_task, TrainerConfig(1000, 2, 4), PPOConfig(epochs=1), {"type": "mlp"})
    trainer.iterate()
    path = save_checkpoint(tmp_path / "1", policy, point_task, trainer.state_dict())
    tensors = load_file(path / "trainer" / "state.safetensors")
    plain = json.loads((path / "trainer" / "state.json").read_text())
    assert torch.equal(tensors["critic/network.input.weight"], trainer.critic.network.input.weight)
    assert torch.equal(tensors["actor/generator"], trainer.actor.generator.get_state())
    assert torch.equal(tensors["update_rule/generator"], trainer.update_rule.generator.get_state())
    assert torch.equal(tensors["estimator/reward_scaler/discounted"], trainer.estimator.discounting.scaler.discounted)
    rule = trainer.update_rule
    for name, module, optimizer in (("actor", policy, rule.optimizer), ("critic", trainer.critic, rule.critic_fit)):
        moments = optimizer.state_dict()
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert moments[moment].shape == (trained,)
            assert torch.equal(tensors[f"update_rule/{name}_optimizer/{moment}"], moments[moment])
    assert (plain["iteration"], plain["env_steps"]) == (1, trainer.env_steps)
    assert plain["critic"]["network.input.weight"] == {"tensor": "critic/network.input.weight"}


def test_the_policy_comes_back_with_its_weights_its_settings_and_its_task(small_policy, point_task, tmp_path):
    policy = small_policy("diffusion", finetuned_steps=2)
    save_checkpoint(tmp_path / "1", policy, point_task, {})
    reloaded, task = load_policy(tmp_path / "1" / "policy")
    assert task == point_task
    assert reloaded.config == policy.config
    assert reloaded.num_steps == 2
    state = policy.state_dict()
    assert state.keys() == reloaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in reloaded.state_dict().items())
    assert not reloaded.training


def test_a_policy_that_knows_no_task_is_loaded_without_one(small_policy, tmp_path):
    small_policy("gaussian").save_pretrained(tmp_path / "policy")
    assert load_policy(tmp_path / "policy")[1] is None


def test_an_interrupted_save_leaves_nothing_under_the_final_name(small_policy, point_task, tmp_path, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "run" / "checkpoints" / "200"
    monkeypatch.setattr(checkpoint, "write_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, small_policy("gaussian"), point_task, {})
    assert not path.exists()
    with pytest.raises(UserError, match="is neither a run"):
        find_policy(str(tmp_path / "run"))


def test_an_interrupted_save_leaves_the_earlier_checkpoint_of_that_name(saved, small_policy, point_task, monkeypatch):
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    monkeypatch.setattr(checkpoint, "write_state", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, small_policy("gaussian"), point_task, {})
    assert {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()} == before


def test_saving_again_replaces_the_checkpoint_and_what_an_interruption_left(saved, small_policy, point_task):
    left = saved.with_name("100.tmp")
    left.mkdir()
    (left / "half").write_text("")
    save_checkpoint(saved, small_policy("gaussian"), point_task, {"iteration": 2})
    assert load_policy(saved / "policy")[0].type == "gaussian"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["100"]
    assert sorted(path.name for path in saved.iterdir()) == ["manifest.json", "policy", "trainer"]


# --- finding


def test_a_run_means_its_latest_checkpoint(saved, small_policy, point_task):
    for steps in ("20", "1000", "300"):  # the latest by number, not by name
        save_checkpoint(saved.with_name(steps), small_policy("gaussian"), point_task, {})
    saved.with_name("2000.tmp").mkdir()
    run = saved.parent.parent
    assert find_policy(str(run)) == saved.with_name("1000") / "policy"


def test_a_checkpoint_and_a_policy_mean_themselves(saved):
    assert find_policy(str(saved)) == saved / "policy"
    assert find_policy(str(saved / "policy")) == saved / "policy"


def test_a_path_may_begin_with_a_tilde(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert find_policy("~/100") == saved / "policy"


@pytest.fixture
def embedded(tmp_path, small_policy, monkeypatch) -> Path:
    folder = tmp_path / "pretrained"
    small_policy("gaussian").save_pretrained(folder / "point")
    monkeypatch.setattr(checkpoint, "PRETRAINED", folder)
    return folder


def test_embedded_means_the_checkpoint_that_comes_with_the_package(embedded):
    assert find_policy("embedded", "point") == embedded / "point"
    assert find_policy("embedded/point") == embedded / "point"
    assert find_policy("embedded/point", "hopper") == embedded / "point"


@pytest.mark.parametrize("name", ["embedded", "embedded/hopper"])
def test_a_task_without_an_embedded_checkpoint_is_told_how_to_make_one(embedded, name):
    with pytest.raises(UserError, match=r"no checkpoint is embedded for task 'hopper' \(there are: point\)") as caught:
        find_policy(name, "hopper")
    assert "`dppo pretrain task=hopper`" in str(caught.value)


def test_without_any_embedded_checkpoint_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "nowhere")
    with pytest.raises(UserError, match="there are: none"):
        find_policy("embedded", "hopper")


def test_a_missing_path_and_an_empty_folder_are_each_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        find_policy(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is neither a run .* nor a checkpoint .* nor a policy"):
        find_policy(str(tmp_path))


# --- damage


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_or_cut_short_is_one_clear_line(saved, name):
    file = saved / "policy" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name) as caught:
        load_policy(saved / "policy")
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match=f"not a policy checkpoint: it has no {name}"):
        load_policy(saved / "policy")


def edit(saved: Path, **changes: object) -> None:
    path = saved / "policy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": None, **changes}))


def test_weights_of_another_shape_are_refused(saved):
    edit(saved, chunk=5)
    with pytest.raises(UserError, match=r"model.safetensors is damaged or does not fit config.json"):
        load_policy(saved / "policy")


def test_a_setting_that_this_version_does_not_know_is_named(saved):
    edit(saved, denoisingsteps=5)
    with pytest.raises(UserError, match=r"no setting 'denoisingsteps' \(did you mean denoising_steps"):
        load_policy(saved / "policy")


def test_a_task_that_this_version_does_not_know_is_named(saved, point_task):
    edit(saved, metadata={"task": {**dataclasses.asdict(point_task), "colour": "red"}})
    with pytest.raises(UserError, match=r"the task in .*config.json has no setting 'colour'"):
        load_policy(saved / "policy")


# --- nothing is executed


def test_what_looks_like_code_in_a_task_is_refused_by_name_or_is_text(saved, point_task, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    edit(saved, metadata={"task": {**dataclasses.asdict(point_task), "_target_": "os.system"}})
    with pytest.raises(UserError, match=r"the task in .*config.json has no setting '_target_'"):
        load_policy(saved / "policy")
    hostile = {"_target_": "os.system", "length": "${oc.env:SECRET}", "_args_": ["true"]}
    edit(saved, metadata={"task": {**dataclasses.asdict(point_task), "env_kwargs": hostile, "dataset": "${a:b}"}})
    task = load_policy(saved / "policy")[1]
    assert task is not None
    assert (task.env_kwargs, task.dataset) == (hostile, "${a:b}")
    with pytest.raises(UserError, match="Point-v0 does not take these env_kwargs"):
        make_plain_env(task)


@pytest.mark.parametrize(
    ("env_id", "modules", "refused"),
    [
        ("Hopper-v5", [], False),
        ("gymnasium_robotics:PointMaze_UMaze-v3", [], False),
        ("gymnasium_robotics.envs:PointMaze_UMaze-v3", [], False),
        ("os:Hopper-v5", [], True),
        ("gymnasium_robotics_:Hopper-v5", [], True),
        (".gymnasium:Hopper-v5", [], True),
        ("a.gymnasium:Hopper-v5", [], True),
        ("os:os:Hopper-v5", ["os"], True),
        ("my_envs:Hopper-v5", ["", None, "my_envs"], False),
        ("GymV21Environment-v0", [], True),
        ("gymnasium:GymV26Environment-v0", ["gymnasium"], True),
    ],
)
def test_only_modules_that_are_known_or_named_may_be_imported(env_id, modules, refused):
    task = Task("any", env_id)
    if not refused:
        assert permitted(task, "it", modules) is task
        return
    with pytest.raises(UserError, match=r"^it asks for "):
        permitted(task, "it", modules)
