"""A checkpoint that is damaged, foreign or hostile is one readable line, and nothing in it is executed."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from policies import Policy, UserError

NETWORK = {"type": "mlp", "hidden_dims": [8, 8], "activation": "tanh", "residual": False}
TYPES = ("categorical", "diffusion", "gaussian")


def policy(kind: str = "gaussian", **changes: Any) -> Policy:
    torch.manual_seed(0)
    return Policy.from_config({"type": kind, "obs_dim": 3, "action_dim": 2, "network": NETWORK, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a sound policy."""
    policy().save_pretrained(tmp_path)
    return tmp_path


def refusal(directory: Path) -> str:
    """The one line that loading ``directory`` fails with."""
    with pytest.raises(UserError) as caught:
        Policy.from_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message or "policy" in message or "network" in message
    assert len(message) < 600
    return message


def edit(directory: Path, **changes: Any) -> None:
    """As who means it, and so removes the checksums."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": None, **changes}))


def test_a_sound_policy_loads(saved: Path) -> None:
    assert Policy.from_pretrained(saved).type == "gaussian"


def test_a_directory_is_made_with_its_parents_and_a_policy_in_it_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "policy"
    policy("categorical").save_pretrained(directory)
    policy("gaussian").save_pretrained(str(directory))
    assert Policy.from_pretrained(str(directory)).type == "gaussian"
    assert sorted(path.name for path in directory.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_saved_is_plain_json_and_plain_tensors(kind: str, tmp_path: Path) -> None:
    saved = policy(kind)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["type"] == kind and config["network"] == NETWORK and config["metadata"] == {}
    assert load_file(tmp_path / "model.safetensors").keys() == saved.state_dict().keys()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert refusal(saved) == f"{saved} is not a policy checkpoint: it has no {name}"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "is not a policy checkpoint" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.3, 0.6, 0.99, -1])
def test_weights_that_were_cut_short_are_refused(saved: Path, length: float) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if 0 < length < 1 else int(length)])
    assert len(path.read_bytes()) < len(whole)
    assert "damaged or does not fit config.json" in refusal(saved)


def test_weights_with_a_tail_that_does_not_belong_to_them_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    assert "damaged" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("raw_std"), "raw_std"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "extra"),
        (lambda weights: weights.update(raw_std=torch.zeros(5)), "raw_std"),
    ],
    ids=["missing", "unknown", "of another shape"],
)
def test_a_weight_that_does_not_fit_is_named(saved: Path, change: Callable[[dict], object], named: str) -> None:
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")
    assert named in refusal(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"obs_dim": 4},
        {"action_dim": 3},
        {"history": 2},
        {"chunk": 3},
        {"std": "state"},
        {"observation_scaling": "running"},
        {"network": {**NETWORK, "hidden_dims": [8, 9]}},
        {"network": {**NETWORK, "hidden_dims": [8, 8, 8]}},
        {"network": {**NETWORK, "hidden_dims": [8, 8, 8], "residual": True}},
    ],
    ids=str,
)
def test_a_configuration_of_other_weights_is_refused(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    assert "does not fit config.json" in refusal(saved)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "gaussian"])
def test_the_weights_of_another_policy_type_are_refused(saved: Path, kind: str, tmp_path: Path) -> None:
    policy(kind).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(saved / "model.safetensors")
    assert "does not fit config.json" in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"obs_dmi": 3}, "policy 'gaussian' has no setting 'obs_dmi' (did you mean obs_dim"),
        ({"denoising_steps": 20}, "policy 'gaussian' has no setting 'denoising_steps'"),
        (
            {"network": {**NETWORK, "hidden_dim": [8]}},
            "network 'mlp' has no setting 'hidden_dim' (did you mean hidden_dims",
        ),
        ({"network": {**NETWORK, "activation": "swish"}}, "unknown activation 'swish'"),
        ({"network": {"type": "unet"}}, "network type 'unet'"),
        ({"type": "gausian"}, "unknown policy type 'gausian'"),
        ({"type": None}, "unknown policy type None"),
        ({"type": ["gaussian"]}, "unknown policy type ['gaussian']"),
    ],
    ids=str,
)
def test_an_unknown_name_is_refused(saved: Path, changes: dict[str, Any], complaint: str) -> None:
    edit(saved, **changes)
    assert complaint in refusal(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"obs_dim": "three"},
        {"obs_dim": None},
        {"obs_dim": 2.5},
        {"obs_dim": 0},
        {"obs_dim": -3},
        {"history": [1]},
        {"executed": 5},
        {"network": "mlp"},
        {"network": None},
        {"std": "fixed"},
        {"min_std": "small"},
        {"initial_std": float("nan")},
        {"observation_scaling": "none"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    assert next(iter(changes)) in refusal(saved)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_dims": "wide"}, {"hidden_dims": [8, "8 units"]}, {"hidden_dims": [8, -8]}, {"residual": "perhaps"}],
    ids=str,
)
def test_a_network_setting_of_the_wrong_kind_is_refused_by_its_name(saved: Path, settings: dict[str, Any]) -> None:
    edit(saved, network={**NETWORK, **settings})
    assert next(iter(settings)) in refusal(saved)


@pytest.mark.parametrize("prediction", ["noise", 3, None])
def test_a_diffusion_policy_that_predicts_something_unknown_is_refused(tmp_path: Path, prediction: object) -> None:
    policy("diffusion").save_pretrained(tmp_path)
    edit(tmp_path, prediction=prediction)
    message = refusal(tmp_path)
    assert "prediction" in message and "epsilon" in message


def test_a_missing_setting_is_named(saved: Path) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    del content["obs_dim"]
    path.write_text(json.dumps(content))
    assert "obs_dim" in refusal(saved)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"type": "gaussian"', b"{'type': 'gaussian'}", b"not json", b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "brace", "cut", "python", "text", "bytes", "nested"],
)
def test_a_configuration_that_is_no_json_is_refused(saved: Path, text: bytes) -> None:
    (saved / "config.json").write_bytes(text)
    assert "is not valid JSON" in refusal(saved)


@pytest.mark.parametrize("value", [[], [{"type": "gaussian"}], "gaussian", 3, None, True], ids=str)
def test_a_configuration_that_is_no_object_is_refused(saved: Path, value: object) -> None:
    (saved / "config.json").write_text(json.dumps(value))
    assert "is not a policy configuration" in refusal(saved)


@pytest.mark.parametrize("metadata", [None, "hopper", [1]], ids=str)
def test_metadata_that_is_no_object_is_refused(saved: Path, metadata: object) -> None:
    edit(saved, metadata=metadata)
    assert "is not a policy configuration" in refusal(saved)


def test_a_configuration_without_metadata_loads(saved: Path) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    del content["metadata"], content["sha256"]
    path.write_text(json.dumps(content))
    assert Policy.from_pretrained(saved).metadata == {}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"_target_": "os.system"}, "policy 'gaussian' has no setting '_target_'"),
        ({"network": {**NETWORK, "_target_": "os.system"}}, "network 'mlp' has no setting '_target_'"),
        ({"type": "builtins.eval"}, "unknown policy type 'builtins.eval'"),
        ({"type": "../../gaussian"}, "unknown policy type '../../gaussian'"),
        ({"network": {**NETWORK, "type": "../mlp"}}, "cannot use the network type '../mlp'"),
        ({"network": {**NETWORK, "activation": "${oc.env:HOME}"}}, "unknown activation '${oc.env:HOME}'"),
        ({"obs_dim": "${oc.env:HOME}"}, "policy 'gaussian', obs_dim"),
        ({"weights": "../../etc/passwd"}, "policy 'gaussian' has no setting 'weights'"),
    ],
    ids=str,
)
def test_what_would_name_code_variables_or_files_elsewhere_is_only_an_unknown_name(
    saved: Path, changes: dict[str, Any], complaint: str
) -> None:
    edit(saved, **changes)
    assert complaint in refusal(saved)


def test_metadata_is_kept_as_text_and_nothing_in_it_is_computed(saved: Path) -> None:
    metadata = {"task": {"_target_": "os.system", "name": "${oc.env:HOME}"}}
    edit(saved, metadata=metadata)
    assert Policy.from_pretrained(saved).metadata == metadata


TERABYTES = [
    ("gaussian", {"obs_dim": 10**12}),
    ("gaussian", {"obs_dim": 10**30}),
    ("gaussian", {"obs_dim": 10**12, "observation_scaling": "running"}),
    ("gaussian", {"action_dim": 10**12, "std": "state"}),
    ("gaussian", {"history": 10**12}),
    ("gaussian", {"chunk": 10**12}),
    ("gaussian", {"network": {**NETWORK, "hidden_dims": [10**7, 10**7]}}),
    ("mixture", {"components": 10**12}),
    ("categorical", {"action_dim": 10**12}),
    ("diffusion", {"denoising_steps": 10**12}),
    ("diffusion", {"network": {**NETWORK, "step_dim": 10**12}}),
    ("diffusion", {"network": {"type": "unet", "down_dims": [8, 2**40]}}),
    ("diffusion", {"network": {"type": "transformer", "width": 2**30, "heads": 2}}),
    ("diffusion", {"network": {"type": "transformer", "layers": 10**12}}),
    ("diffusion", {"network": {"type": "transformer", "causal": True}, "chunk": 10**12}),
    ("diffusion_ode", {"solver_steps": 10**12}),
    ("diffusion_ode", {"denoising_steps": 10**12}),
]


def without_memory(layer: torch.nn.Linear) -> None:
    """In place of what initialises a layer."""
    assert layer.weight.is_meta


@pytest.mark.parametrize(("kind", "changes"), TERABYTES, ids=str)
def test_a_configuration_that_asks_for_terabytes_is_refused_before_anything_is_made(
    tmp_path: Path, kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(kind).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    monkeypatch.setattr("policies.pretrained.load_file", lambda path: pytest.fail("weights were read"))
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", without_memory)
    message = refusal(tmp_path)
    name = next(iter(changes))
    assert any(text in message for text in (name, "the file has", "sizes that cannot be", "at most", "layers"))


# --- damage that still looks like a policy


def flipped(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_of_a_weight_is_noticed(saved: Path) -> None:
    flipped(saved / "model.safetensors", -1)
    assert "model.safetensors is damaged or was changed: its checksum" in refusal(saved)


def test_a_digit_of_the_configuration_that_became_another_is_noticed(saved: Path) -> None:
    edit(saved, sha256=json.loads((saved / "config.json").read_text())["sha256"], initial_std=0.7)
    assert "config.json is damaged or was changed" in refusal(saved)


@pytest.mark.parametrize("seal", [{}, [], "", 0, {"config": "0"}], ids=str)
def test_checksums_that_are_none_are_refused(saved: Path, seal: object) -> None:
    edit(saved, sha256=seal)
    assert "config.json is damaged or was changed" in refusal(saved)


def test_another_layout_of_the_same_configuration_is_the_same(saved: Path) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert Policy.from_pretrained(saved).type == "gaussian"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_or_cut_is_an_error_or_changes_nothing(tmp_path_factory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("policy")
    whole = policy("gaussian")
    whole.save_pretrained(directory)
    path = directory / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    size = path.stat().st_size
    if data.draw(st.booleans()):
        flipped(path, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    else:
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, size - 1))])
    try:
        loaded = Policy.from_pretrained(directory)
    except UserError:
        return
    assert loaded.config == whole.config and loaded.metadata == whole.metadata
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.state_dict().items())


# --- nothing is executed


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_in_place_of_a_file_is_refused_and_never_executed(
    saved: Path, name: str, write: Callable[[object, Path], object], tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    hostile = Hostile(trace)
    write({"network.input.weight": hostile}, saved / name)
    refusal(saved)
    assert not trace.exists()
    pickle.loads(pickle.dumps(hostile))  # it would have been seen
    assert trace.exists()


def test_an_unserializable_metadata_leaves_the_saved_policy_as_it_was(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    broken = policy()
    broken.metadata = {"task": object()}
    with pytest.raises(TypeError):
        broken.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_policy_of_every_kind_loads_after_importing_the_base_alone(saved: Path) -> None:
    code = "import sys; from policies.base import Policy; print(Policy.from_pretrained(sys.argv[1]).type)"
    result = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert result.stdout == "gaussian\n"
