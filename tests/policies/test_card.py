"""The model card says what a policy is, what it is worth and how to load it, whatever its metadata holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from policies import Policy

NETWORK = {"type": "mlp", "hidden_dims": [8, 8, 8]}
TASK = {"name": "hopper", "env_id": "Hopper-v5"}
EVALUATION = {
    **{"return_mean": 2430.4, "return_ci95": [2233.0, 2574.0], "success_rate": 0.25, "success_ci95": [0.125, None]},
    "episodes": 50,
}


def card(tmp_path: Path, kind: str = "diffusion", **metadata: Any) -> tuple[dict[str, Any], str]:
    """The front matter and the text of a policy's card."""
    torch.manual_seed(0)
    policy = Policy.from_config({"type": kind, "obs_dim": 3, "action_dim": 2, "network": NETWORK})
    policy.metadata = metadata
    policy.save_pretrained(tmp_path / "my policy")
    start, front, text = (tmp_path / "my policy" / "README.md").read_text().split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    front, _ = card(tmp_path, task=TASK, evaluation=EVALUATION)
    assert front == {
        "library_name": "dppo",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "reinforcement-learning", "dppo", "diffusion-policy", "hopper"],
        "model-index": [
            {
                "name": str(tmp_path / "my policy"),
                "results": [
                    {
                        "task": {"type": "robotics", "name": "robotics"},
                        "dataset": {"type": "Hopper-v5", "name": "hopper"},
                        "metrics": [
                            {"type": "mean_reward", "value": 2430.4},
                            {"type": "success_rate", "value": 0.25},
                        ],
                    }
                ],
            }
        ],
    }


def test_the_text_shows_the_task_the_result_and_the_parts(tmp_path: Path) -> None:
    _, text = card(tmp_path, task=TASK, evaluation=EVALUATION, inputs=[["agent_pos", 1], ["goal", 2]])
    assert "# diffusion policy for hopper" in text
    assert "for the task `hopper` (`Hopper-v5`)" in text
    assert "| 2,430 [2,233, 2,574] | 0.25 [0.125] | 50 |" in text
    assert "| sees | `agent_pos` (1), `goal` (2) |" in text
    assert f'Policy.from_pretrained("{tmp_path / "my policy"}")' in text


def test_what_is_not_known_is_not_there(tmp_path: Path) -> None:
    front, text = card(tmp_path)
    assert "model-index" not in front and "Results" not in text and " for the task" not in text


def test_the_code_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, shape in (("diffusion", (1, 1, 2)), ("categorical", (1,))):
        _, text = card(tmp_path, kind)
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(text.split("```python\n")[1].split("```")[0], names)
        assert names["action"].shape == shape


HOSTILE = 'x"\n---\n- !!python/object/apply:os.system ["true"]\n# |`<script>'


@pytest.mark.parametrize(
    "metadata",
    [
        {"task": {"name": HOSTILE, "env_id": HOSTILE}, "evaluation": {"return_mean": 1, "episodes": HOSTILE}},
        {"task": "hopper", "evaluation": [1, 2], "inputs": "obs"},
        {"task": {"name": None}, "evaluation": {"return_mean": "good", "return_ci95": 3}, "inputs": [[1]]},
        {"evaluation": {"return_mean": None}, "outputs": [["a", "b", "c"]]},
        {"inputs": [[HOSTILE, HOSTILE]]},
    ],
    ids=str,
)
def test_whatever_the_metadata_holds_the_front_matter_stays_data(tmp_path: Path, metadata: dict[str, Any]) -> None:
    front, text = card(tmp_path, **metadata)
    assert set(front) - {"model-index"} == {"library_name", "pipeline_tag", "tags"}
    assert "<script>" not in text and "\n- !!python" not in text
