"""What is to be learned: the environment, its episode limit, what counts as success, and the demonstrations."""

import contextlib
import difflib
import importlib
import io
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from policies.errors import UserError

KNOWN_MODULES = ("gymnasium", "gymnasium_robotics")
"""Packages that are installed with this one, and may be imported because a checkpoint says so."""


@dataclass(frozen=True)
class Task:
    """One learning problem.

    Raises:
        UserError: the name is none for a path, `max_episode_steps` is not positive, or `env_kwargs` sets what is set
            elsewhere.
    """

    name: str
    """Short name, for paths and plots."""
    env_id: str
    """Gymnasium id with its version, e.g. "Hopper-v5". Gymnasium's own "module:Id" form imports the module first."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    max_episode_steps: int | None = None
    """Environment steps (not chunks) after which an episode is truncated. None: the limit registered with the id."""
    success_reward: float | None = None
    """An episode succeeds if the reward of any environment step is at least this. None: there is no such notion."""
    dataset: str = ""
    """Minari id of the demonstrations. Empty: there are none."""
    action_mask: str | None = None
    """Where discrete actions are marked as valid: "info" for info["action_mask"], or a key of the observation."""

    observation_parts: dict[str, int] | None = None
    """Names and dimensions of the parts of the flattened observation, in order, which imported policies are matched to.
    None: the keys of a Dict; any other observation is one part, "observation"."""
    action_parts: dict[str, int] | None = None
    """Likewise, of the action. None: it is one part, "action"."""

    def __post_init__(self) -> None:
        if not self.name.isprintable() or self.name in ("", ".", "..") or {"/", "\\"} & set(self.name):
            raise UserError(f"a task's name becomes part of paths, and cannot be {self.name!r}")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise UserError(f"task {self.name}: max_episode_steps must be at least 1, got {self.max_episode_steps}")
        for name in ("max_episode_steps", "render_mode", "disable_env_checker"):  # gymnasium.make's own arguments
            if name in self.env_kwargs:
                raise UserError(f"task {self.name}: env_kwargs cannot set {name}: it is no argument of the environment")

    def env_spec(self) -> EnvSpec:
        """Gymnasium's registration of the environment.

        Raises:
            UserError: the module of `env_id` cannot be imported, or gymnasium does not know the id.
        """
        module, _, env_id = self.env_id.rpartition(":")
        if module:
            _import_environments(module, f"task {self.name}: env_id {self.env_id!r}")
        spec = gymnasium.registry.get(env_id)
        if spec is None:
            raise UserError(f"task {self.name}: gymnasium has no environment {env_id!r}; {_suggestion(env_id, module)}")
        return spec


def trust_of(task: Task) -> str:
    """What a command line has to say so that the task is `permitted`, after a space; nothing, where it is anyway."""
    module = task.env_id.rpartition(":")[0]
    return f" trust={module}" if module and module.split(".")[0] not in KNOWN_MODULES else ""


def permitted(task: Task, where: str, modules: Collection[str]) -> Task:
    """A task that a file describes, if it imports nothing that nobody but the file has named.

    To import a module is to run it, and whoever writes a checkpoint can name any.

    Args:
        task: as the file says.
        where: the file, for the message.
        modules: what the user has named himself.

    Raises:
        UserError: the environment is of another module, or of one of Gymnasium's ids that import what they are told.
    """
    module, _, env_id = task.env_id.rpartition(":")
    if trust_of(task) and module not in modules:
        raise UserError(
            f"{where} asks for an environment of the module {module!r}, which would be imported and so run; if you "
            f"trust it, add{trust_of(task)}"
        )
    if env_id.startswith("GymV"):
        raise UserError(f"{where} asks for {env_id}, which imports what it is told; it is not run from a file")
    return task


def _suggestion(env_id: str, module: str) -> str:
    near = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
    if near:
        prefix = f"{module}:" if module else ""
        return f"did you mean {' or '.join(prefix + name for name in near)}?"
    return "an environment from another package is named with its module, e.g. gymnasium_robotics:PointMaze_UMaze-v3"


def _import_environments(module: str, where: str) -> None:
    # gymnasium_robotics prints a notice about its Adroit tasks to stderr on every import. Only that package is muted:
    # what another module prints may matter.
    muted = module.split(".")[0] == "gymnasium_robotics"
    try:
        with contextlib.redirect_stderr(io.StringIO()) if muted else contextlib.nullcontext():
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        raise UserError(
            f"{where} needs the Python module {missing!r}; install its package, or put its folder on PYTHONPATH"
        ) from error
    except ImportError as error:
        raise UserError(f"{where}: importing {module!r} failed: {error}") from error
