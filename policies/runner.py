"""A policy in front of one environment or robot: an observation in, an action out.

What a runner asks for chunks is a `Plan`: a policy (`plan_with`), or whatever else knows what to do next, such as an
exported file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from policies.base import Policy

Plan = Callable[[np.ndarray], np.ndarray]
"""The last observations [To, Do] float32, oldest first, to the next actions [Ta, Da] (discrete: [1] or [1, D])."""


def plan_with(policy: Policy, seed: int | None = None) -> Plan:
    """The chunks of a policy as it acts in evaluation; its noise comes from the seed, of None another each time."""
    device = next(policy.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def plan(history: np.ndarray) -> np.ndarray:
        obs = torch.from_numpy(history).to(device)[None]
        action = policy.sample(obs, deterministic=True, generator=generator).action
        return (action if policy.discrete else action[0]).cpu().numpy()

    return plan


class History:
    """The latest observations; at the start of an episode there is but the first, in place of all before it."""

    def __init__(self, length: int) -> None:
        """``length`` is To."""
        self._recent: deque[np.ndarray] = deque(maxlen=length)

    def clear(self) -> None:
        """A new episode begins."""
        self._recent.clear()

    def add(self, obs: np.ndarray) -> np.ndarray:
        """Take in an observation [Do]; the history [To, Do], oldest first."""
        obs = np.array(obs, np.float32)  # a copy: environments reuse their buffers
        self._recent.extend([obs] * (1 if self._recent else self._recent.maxlen or 1))
        return np.stack(self._recent)


class ChunkRunner:
    """Executes chunk after chunk, each to its end, and asks for the next when it is used up.

    The actions are those that were executed in training. They are in the environment's units, but not clipped to its
    bounds.
    """

    def __init__(self, plan: Plan, history: int) -> None:
        """``history`` is To."""
        self._plan = plan
        self._history = History(history)
        self._left: deque[np.ndarray] = deque()

    def reset(self) -> None:
        """A new episode begins: nothing of the last one is observed, and nothing of its chunk is executed."""
        self._history.clear()
        self._left.clear()

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action [Da] (discrete: a number, or [D]) after an observation [Do]; to be called at every step."""
        history = self._history.add(obs)
        if not self._left:
            self._left.extend(self._plan(history))
        return self._left.popleft()
