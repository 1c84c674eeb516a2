"""The model card of a policy: what it is, what it is worth, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.base import Policy

TEMPLATE = """---
{front}
---

# {title}

A `{type}` policy{of_task}, made by [DPPO](https://arxiv.org/abs/2409.00588): fine-tuning of diffusion policies with
reinforcement learning.

| | |
|---|---|
{table}
{results}
## How to load it

```python
import torch
from policies import Policy

policy = Policy.from_pretrained({name})
obs = torch.zeros(1, policy.config.history, policy.config.obs_dim)  # [B, To, Do], in the environment's units
noise = torch.Generator().manual_seed(0)
action = policy.sample(obs, deterministic=True, generator=noise).action  # {action_shape}
```
"""


def model_card(policy: Policy, name: str) -> str:
    """Markdown with YAML front matter; ``name`` is a directory or a repository.

    The metadata that is shown: ``task`` (``name`` and ``env_id``), ``evaluation`` (``return_mean``, ``success_rate``,
    with their intervals, and ``episodes``), and ``inputs`` and ``outputs``, pairs of a name and a dimension.
    """
    task, evaluation = (_mapping(policy.metadata.get(key)) for key in ("task", "evaluation"))
    task_name = _line(task.get("name", ""))
    return TEMPLATE.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in _front(policy, name, task, evaluation).items()),
        title=f"{policy.type} policy{f' for {task_name}' if task_name else ''}",
        type=policy.type,
        of_task=f" for the task `{task_name}` (`{_line(task.get('env_id'))}`)" if task_name else "",
        table="\n".join(f"| {key} | {value} |" for key, value in _facts(policy).items()),
        results=_results(evaluation),
        name=json.dumps(name),
        action_shape="[B] integers" if policy.discrete else "[B, Ta, Da], in the environment's units",
    )


def _front(policy: Policy, name: str, task: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata. Values are JSON, which is YAML, whatever the text in them."""
    tags = ["robotics", "reinforcement-learning", "dppo", f"{policy.type.replace('_', '-')}-policy"]
    front = {
        "library_name": "dppo",
        "pipeline_tag": "robotics",
        "tags": tags + ([_line(task["name"])] if "name" in task else []),
    }
    metrics = [
        {"type": kind, "value": evaluation[key]}
        for kind, key in (("mean_reward", "return_mean"), ("success_rate", "success_rate"))
        if isinstance(evaluation.get(key), int | float)
    ]
    if not metrics:
        return front
    dataset = {"type": _line(task.get("env_id", "unknown")), "name": _line(task.get("name", "unknown"))}
    result = {"task": {"type": "robotics", "name": "robotics"}, "dataset": dataset, "metrics": metrics}
    return {**front, "model-index": [{"name": name, "results": [result]}]}


def _facts(policy: Policy) -> dict[str, str]:
    config = policy.config
    actions = f"{config.action_dim} to choose from" if policy.discrete else f"{config.chunk} x {config.action_dim}"
    facts = {
        "network": str(getattr(config, "network", {}).get("type")),
        "weights": f"{sum(weight.numel() for weight in policy.parameters()):,}",
        "observations": f"{config.history} x {config.obs_dim}",
        "actions": actions if policy.discrete else f"{actions}, {config.executed_chunk} of them executed",
    }
    for key, heading in (("inputs", "sees"), ("outputs", "does")):
        parts = policy.metadata.get(key)
        if isinstance(parts, list) and all(isinstance(part, list) and len(part) == 2 for part in parts):
            facts[heading] = ", ".join(f"`{_line(part)}` ({_line(dim)})" for part, dim in parts)
    if policy.num_steps > 1:
        facts["inner steps"] = f"{policy.num_steps}, the denoising steps that are trained"
    return facts


def _results(evaluation: Mapping[str, Any]) -> str:
    if "return_mean" not in evaluation:
        return ""
    values = [
        _interval(evaluation, "return_mean", "return_ci95"),
        _interval(evaluation, "success_rate", "success_ci95"),
        _line(evaluation.get("episodes")),
    ]
    heading = "| return (95 % CI) | success rate (95 % CI) | episodes |\n|---|---|---|"
    return f"\n## Results\n\n{heading}\n| {' | '.join(values)} |\n"


def _interval(evaluation: Mapping[str, Any], key: str, interval: str) -> str:
    """A value with its interval, if there are any."""
    ends = evaluation.get(interval)
    numbers = [
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        for value in (evaluation.get(key), *(ends if isinstance(ends, list) else ()))
        if isinstance(value, int | float)
    ]
    return numbers[0] + (f" [{', '.join(numbers[1:])}]" if numbers[1:] else "") if numbers else "-"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(value: Any) -> str:
    """Text of one line that ends no table's cell and no code."""
    return " ".join(str(value).split()).translate({ord(character): None for character in "`|<>"})
