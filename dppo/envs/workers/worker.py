"""What runs in a worker process: a block of environments, stepped and reset on demand.

Nothing here may import torch, which takes seconds and hundreds of megabytes.
"""

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import numpy as np

from dppo.envs.chunk import ChunkEnv
from dppo.envs.workers.records import map_records


@dataclass(frozen=True)
class Assignment:
    """The environments of one worker."""

    constructor: bytes
    """Pickled function that makes one."""
    rows: range
    """Which of all environments they are."""
    num_envs: int
    """N, how many there are in all workers together."""
    record_type: np.dtype


@dataclass(frozen=True)
class Reset:
    """The order to start episodes; that to execute a chunk is `None`."""

    seeds: dict[int, int | None]
    """By row; only the rows that are there are reset."""
    options: dict[str, Any] | None


@dataclass(frozen=True)
class Tell:
    """The order to tell the states of the environments, which is answered with `States`."""


@dataclass(frozen=True)
class States:
    """States of environments, also the order to go on from them."""

    of: dict[int, dict[str, Any]]
    """By row, as of `ChunkEnv.get_state`."""


Order = Reset | Tell | States | None


@dataclass(frozen=True)
class Failure:
    """An exception on its way to the process that trains; any other order is answered with `None` when it is done."""

    row: int | None
    """The environment that raised; None: it was raised before there were any."""
    error: bytes
    """The exception, pickled."""
    traceback: str

    @classmethod
    def of(cls, error: BaseException, row: int | None) -> "Failure":
        """Pack an exception, or its name and message where it cannot be pickled itself."""
        try:
            pickled = cloudpickle.dumps(error)
            cloudpickle.loads(pickled)  # an exception whose __init__ takes something else fails only here
        except Exception:
            pickled = cloudpickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return cls(row, pickled, "".join(traceback.format_exception(error)))


class Block:
    """Some consecutive environments and their records."""

    def __init__(self, assignment: Assignment, memory: int) -> None:
        """Make the environments of `assignment`; `memory` holds the records of all workers."""
        rows = assignment.rows
        make: Callable[[], ChunkEnv] = cloudpickle.loads(assignment.constructor)
        records = map_records(memory, assignment.record_type, assignment.num_envs)[rows.start : rows.stop]
        self._fields = {name: records[name] for name in assignment.record_type.names or ()}
        self._rows = rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the process that trains has made one, too, and warned once
            self._envs = [make() for _ in rows]

    def carry_out(self, order: Order) -> Failure | States | None:
        """Do in each environment what the order says."""
        states: dict[int, dict[str, Any]] = {}
        for i, (row, env) in enumerate(zip(self._rows, self._envs, strict=True)):
            try:
                if order is None:
                    self._step(i, env)
                elif isinstance(order, Tell):
                    states[row] = env.get_state()
                elif isinstance(order, States):
                    env.set_state(order.of[row])
                elif row in order.seeds:
                    self._fields["obs"][i], _ = env.reset(seed=order.seeds[row], options=order.options)
            except BaseException as error:  # also SystemExit: the process that trains decides what becomes of it
                return Failure.of(error, row)
        return States(states) if isinstance(order, Tell) else None

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _step(self, i: int, env: ChunkEnv) -> None:
        of = self._fields
        if of["lost"][i]:
            return
        obs, of["reward"][i], terminated, truncated, info = env.step(of["action"][i])
        of["step_rewards"][i], of["steps"][i] = info["step_rewards"], info["steps"]
        of["terminated"][i], of["truncated"][i] = terminated, truncated
        of["final_obs"][i] = obs
        if terminated or truncated:
            obs, _ = env.reset()
        of["obs"][i] = obs


def serve(channel_fd: int, memory: int) -> None:
    """Carry out orders until the channel is closed, be it because the process at its other end was killed."""
    # Batch systems send it to all processes of a job. This one ends with its channel: who trains still needs it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    os.set_inheritable(channel_fd, False)  # else a process that an environment starts would keep the channel open
    channel = Connection(channel_fd)
    with suppress(EOFError, ConnectionError):
        try:
            block = Block(channel.recv(), memory)
        except BaseException as error:
            channel.send(Failure.of(error, None))
            return
        os.close(memory)
        channel.send(None)
        try:
            while True:
                channel.send(block.carry_out(channel.recv()))
        finally:
            block.close()
