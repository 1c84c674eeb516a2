"""A vector environment whose environments live in worker processes.

N environments, To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

import logging
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import cloudpickle
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dppo.envs.chunk import ChunkEnv
from dppo.envs.infos import same_step_infos
from dppo.envs.restoring import NotRestorable, envs_of
from dppo.envs.seeds import seeds_of
from dppo.envs.workers.process import WorkerDiedError, WorkerProcess, end_all
from dppo.envs.workers.records import map_records, open_memory, record_type
from dppo.envs.workers.worker import Assignment, Failure, Reset, States, Tell
from policies.errors import UserError

log = logging.getLogger(__name__)

MOST_DEATHS = 3
"""How often a worker may die in a row, without having completed a step in between."""


class WorkerVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments as `SyncVectorEnv` would step N `ChunkEnv`s in SAME_STEP mode, several in each worker process.

    A step is one short message to each worker and back; actions and results are in memory that they share. What an
    environment raises is raised here too, with a note that says where it happened. A process that dies is replaced: its
    environments begin new episodes, and "dropped" [N] in the infos of the step says which.
    """

    def __init__(self, env: ChunkEnv, constructor: bytes, num_envs: int, *, workers: int) -> None:
        """Start the processes and wait until they have made their environments.

        Args:
            env: one of the environments, which gives the spaces; it is not stepped.
            constructor: function without arguments that makes one, pickled with cloudpickle.
            num_envs: N.
            workers: how many processes; at most N are started.

        Raises:
            WorkerDiedError: a process died, and `MOST_DEATHS` in its place.
            Exception: what the constructor raised.
        """
        self.num_envs = num_envs
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        kind = record_type(env)
        blocks = _blocks(num_envs, min(workers, num_envs))
        self.stepped = f"in {len(blocks)} worker processes"
        """How, for people to read."""
        self.restarts = 0
        """How often a process has died and been replaced."""
        self._assignments = [Assignment(constructor, rows, num_envs, kind) for rows in blocks]
        self._deaths = [0] * len(blocks)  # in a row
        self._seeds: list[int | None] | None = None  # the last ones given; None: nothing was reset yet
        self._workers: list[WorkerProcess] = []
        self._memory = open_memory(kind.itemsize * num_envs)
        # Ends the processes when this object is closed, is collected, or the interpreter exits: whatever comes first.
        self._end = weakref.finalize(self, _end, self._workers, self._memory)
        try:
            self._records = map_records(self._memory, kind, num_envs)  # [N]
            self._lost = self._records["lost"]  # [N], whose episode is to be reported as dropped
            self._workers.extend(WorkerProcess(rows, self._memory) for rows in blocks)
            self._ask(self._assignments)
        except BaseException:
            self.close()
            raise

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
        if self._seeds is None or seed is not None:
            self._seeds = seeds
        rows = mask
        while rows.any():  # again where a process died: what took its place has begun an episode with other seeds
            self._lost &= ~rows
            order = Reset({int(row): seeds[row] for row in np.flatnonzero(rows)}, own)
            self._ask([order] * len(self._workers))
            rows = mask & self._lost
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
        lost = results["lost"]
        if lost.any():
            self._lost[:] = False
            for name in ("step_rewards", "reward", "steps", "terminated"):
                results[name][lost] = 0
            results["truncated"][lost] = True
            results["final_obs"][lost] = results["obs"][lost]
        terminated, truncated = results["terminated"], results["truncated"]
        infos = same_step_infos(results["step_rewards"], results["steps"], results["final_obs"], terminated | truncated)
        if lost.any():
            infos["dropped"] = lost
        return results["obs"], results["reward"], terminated, truncated, infos

    def get_state(self) -> dict[str, Any]:
        """A copy of the whole state, as plain data: those of `ChunkEnv.get_state`, which see.

        Raises:
            NotRestorable: as there, or a process has died since the last step: the last observations are not of the
                episodes that have begun in its place, and the next step is to drop those.
        """
        answers = self._ask([Tell()] * len(self._workers))
        if self._lost.any():
            raise NotRestorable("a worker process has died, and the next step drops its episodes")
        told = [answer.of for answer in answers if isinstance(answer, States)]
        states = {row: state for of_worker in told for row, state in of_worker.items()}
        return {"envs": [states[row] for row in range(self.num_envs)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`, of this or another instance for the same task and sizes.

        Raises:
            ValueError: there are more or fewer environments.
        """
        order, again = States(dict(enumerate(envs_of(state, self.num_envs)))), True
        while again:  # where a process died, another one has begun new episodes
            self._lost[:] = False
            self._ask([order] * len(self._workers))
            again = bool(self._lost.any())

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes."""
        self._end()

    def _ask(self, messages: Sequence[Any]) -> list[States | None]:
        """Give every worker its message, and wait until all have done what it says, or were replaced; their answers.

        Raises:
            ClosedEnvironmentError: the processes have been ended.
            WorkerDiedError: a process has died too often; the others are ended.
            Exception: what an environment raised, of several the first one; all can be reset afterwards.
        """
        if self.closed:
            raise ClosedEnvironmentError("the worker processes of these environments have been ended")
        answers: list[Failure | States | None] = []
        try:
            for worker, message in zip(self._workers, messages, strict=True):
                with suppress(WorkerDiedError):  # who cannot be told anything gives no answer either
                    worker.send(message)
            for index, message in enumerate(messages):
                try:
                    answers.append(self._workers[index].receive())
                    if message is None:
                        self._deaths[index] = 0
                except WorkerDiedError as error:
                    answers.append(self._replace(index, error))
        except BaseException:  # also KeyboardInterrupt: answers that are still to come would be taken for later ones
            self.close()
            raise
        done: list[States | None] = []
        for answer in answers:
            if isinstance(answer, Failure):
                raise _error(answer)
            done.append(answer)
        return done

    def _replace(self, index: int, error: WorkerDiedError) -> Failure | States | None:
        """Another process in place of one that has died, with new episodes if there were any.

        Raises:
            WorkerDiedError: it has died too often.
        """
        assignment = self._assignments[index]
        orders: list[Any] = [assignment]
        if self._seeds is not None:
            orders.append(Reset({row: self._fresh_seed(row) for row in assignment.rows}, None))
        while True:
            self._deaths[index] += 1
            if self._deaths[index] == MOST_DEATHS:
                raise WorkerDiedError(
                    f"{error}, {MOST_DEATHS} times in a row; was there too little memory (`dmesg` tells), or did the "
                    "environment crash? threads=1 runs it in the main process"
                )
            log.warning("%s; another one takes its place, and the running episodes are dropped", error)
            self.restarts += 1
            self._lost[assignment.rows.start : assignment.rows.stop] = self._seeds is not None
            end_all([self._workers[index]])
            try:
                self._workers[index] = worker = WorkerProcess(assignment.rows, self._memory)
                for order in orders:
                    worker.send(order)
                    failure = worker.receive()
                    if failure is not None:
                        return failure
                return None
            except WorkerDiedError as again:
                error = again

    def _fresh_seed(self, row: int) -> int | None:
        """For an environment whose generator was lost: another one than it began with, but the same in every run."""
        assert self._seeds is not None
        seed = self._seeds[row]
        return None if seed is None else int(np.random.SeedSequence((seed, self.restarts + 1)).generate_state(1)[0])


def _end(workers: list[WorkerProcess], memory: int) -> None:
    end_all(workers)
    os.close(memory)


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
