"""A vector environment whose environments live in worker processes.

N environments, To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

import os
import weakref
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import cloudpickle
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dppo.envs.chunk import ChunkEnv
from dppo.envs.infos import same_step_infos
from dppo.envs.restoring import envs_of
from dppo.envs.seeds import seeds_of
from dppo.envs.workers.process import WorkerProcess, end_all
from dppo.envs.workers.records import map_records, open_memory, record_type
from dppo.envs.workers.worker import Assignment, Failure, Reset, States, Tell
from policies.errors import UserError


class WorkerVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments as `SyncVectorEnv` would step N `ChunkEnv`s in SAME_STEP mode, several in each worker process.

    A step is one short message to each worker and back; actions and results are in memory that they share. What an
    environment raises is raised here too, with a note that says where it happened.
    """

    def __init__(self, env: ChunkEnv, constructor: bytes, num_envs: int, *, workers: int) -> None:
        """Start the processes and wait until they have made their environments.

        Args:
            env: one of the environments, which gives the spaces; it is not stepped.
            constructor: function without arguments that makes one, pickled with cloudpickle.
            num_envs: N.
            workers: how many processes; at most N are started.

        Raises:
            UserError: a process died.
            Exception: what the constructor raised.
        """
        self.num_envs = num_envs
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        kind = record_type(env)
        self._workers: list[WorkerProcess] = []
        # Ends the processes when this object is closed, is collected, or the interpreter exits: whatever comes first.
        self._end = weakref.finalize(self, end_all, self._workers)
        memory = open_memory(kind.itemsize * num_envs)
        try:
            self._records = map_records(memory, kind, num_envs)  # [N]
            blocks = _blocks(num_envs, min(workers, num_envs))
            self._workers.extend(WorkerProcess(rows, memory) for rows in blocks)
            self.stepped = f"in {len(blocks)} worker processes"
            """How, for people to read."""
            self._ask(Assignment(constructor, rows, num_envs, kind) for rows in blocks)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode everywhere, or where `options["reset_mask"]` [N] says so.

        Environment i is seeded with seed + i; without a seed its generator goes on.

        Returns:
            First observations, repeated To times [N, To, Do], and an empty info.
        """
        seeds = seeds_of(seed, self.num_envs)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        own = options and {name: value for name, value in options.items() if name != "reset_mask"}
        order = Reset({int(row): seeds[row] for row in np.flatnonzero(mask)}, own)
        self._ask([order] * len(self._workers))
        return self._records["obs"].copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute a chunk everywhere.

        Args:
            actions: [N, Ta, Da] (Discrete: [N]).

        Returns:
            Observations [N, To, Do], summed rewards [N], terminated [N], truncated [N], and infos in the layout of
            Gymnasium's SAME_STEP mode.
        """
        actions, shape = np.asarray(actions), self.action_space.shape
        if actions.shape != shape:
            raise ValueError(f"expected action chunks of shape {shape}, got {actions.shape}")
        self._records["action"] = actions
        self._ask([None] * len(self._workers))
        results = self._records.copy()  # what is returned now is not changed by the next step
        terminated, truncated = results["terminated"], results["truncated"]
        infos = same_step_infos(results["step_rewards"], results["steps"], results["final_obs"], terminated | truncated)
        return results["obs"], results["reward"], terminated, truncated, infos

    def get_state(self) -> dict[str, Any]:
        """A copy of the whole state, as plain data: those of `ChunkEnv.get_state`, which see."""
        answers = self._ask([Tell()] * len(self._workers))
        states = {row: state for answer in answers if isinstance(answer, States) for row, state in answer.of.items()}
        return {"envs": [states[row] for row in range(self.num_envs)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`, of this or another instance for the same task and sizes.

        Raises:
            ValueError: there are more or fewer environments.
        """
        self._ask([States(dict(enumerate(envs_of(state, self.num_envs))))] * len(self._workers))

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes."""
        self._end()

    def _ask(self, messages: Iterable[Any]) -> list[States | None]:
        """Give every worker its message, and wait until all have done what it says; their answers.

        Raises:
            ClosedEnvironmentError: the processes have been ended.
            UserError: a process has died; the others are ended.
            Exception: what an environment raised, of several the first one; all can be reset afterwards.
        """
        if self.closed:
            raise ClosedEnvironmentError("the worker processes of these environments have been ended")
        try:
            for worker, message in zip(self._workers, messages, strict=True):
                worker.send(message)
            answers = [worker.receive() for worker in self._workers]
        except BaseException:  # also KeyboardInterrupt: answers that are still to come would be taken for later ones
            self.close()
            raise
        done: list[States | None] = []
        for answer in answers:
            if isinstance(answer, Failure):
                raise _error(answer)
            done.append(answer)
        return done


def _blocks(num_envs: int, workers: int) -> list[range]:
    """Consecutive rows for each worker, of nearly equal number."""
    bounds = [i * num_envs // workers for i in range(workers + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _error(failure: Failure) -> BaseException:
    """The exception of a worker as it is raised here."""
    error: BaseException = cloudpickle.loads(failure.error)
    if type(error) is UserError and failure.row is not None:
        error = UserError(f"environment {failure.row}: {error}")
    where = "while it was set up" if failure.row is None else f"by environment {failure.row}"
    error.add_note(f"\nRaised in a worker process {where}:\n\n{failure.traceback}")
    return error
