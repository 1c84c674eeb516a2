"""The simulations of N environments of one model, advanced by several threads.

N environments, Ta chunk, Nq positions, Nv velocities, Nu controls, S size of a state.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco as _mujoco
import numpy as np
from mujoco.rollout import Rollout

from dppo.envs.native.rules import Frames

mujoco: Any = _mujoco  # without types: its compiled modules have none
MjModel = Any
MjData = Any

_STATE = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)  # time, positions, velocities, activations


class Physics:
    """N simulations, each a vector of state; a thread loads one into its `MjData`, advances it and takes it back.

    A simulation goes through a whole chunk in one call of `mujoco.rollout`, without the GIL. They cannot all share one
    call: it keeps to itself where the constraint solver starts next, and only after the last simulation of a call is
    that still to be found in `MjData`. Without it the next chunk would differ.

    Where frames need more than positions and velocities, every environment step is a call of its own: some
    observations of Gymnasium are made of what a step leaves in `MjData`, with RK4 the values of its last inner stage.
    """

    def __init__(
        self, model: MjModel, frame_skip: int, num_envs: int, *, fields: Sequence[str] = (), threads: int = 1
    ) -> None:
        """Simulate `model`.

        Args:
            model: the model, shared by all.
            frame_skip: steps of the simulation per environment step.
            num_envs: N.
            fields: names of those fields of `MjData` that frames hold besides qpos and qvel.
            threads: how many work at once, the caller's own among them.
        """
        self._model = model
        self._frame_skip = frame_skip
        self._workers = [mujoco.MjData(model) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads - 1, "physics") if threads > 1 else None
        self._rollout = Rollout(nthread=0)  # on the thread that calls it
        self._state = np.zeros((num_envs, mujoco.mj_stateSize(model, _STATE)))  # [N, S]
        self._warmstart = np.zeros((num_envs, model.nv))  # [N, Nv], where the constraint solver starts
        self._fields = {name: np.zeros((num_envs, *getattr(self._workers[0], name).shape)) for name in fields}

    def place(self, row: int, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Start a simulation anew at positions [Nq] and velocities [Nv]."""
        data = self._workers[0]
        mujoco.mj_resetData(self._model, data)
        data.qpos[:] = qpos
        data.qvel[:] = qvel
        mujoco.mj_forward(self._model, data)
        mujoco.mj_getState(self._model, data, self._state[row], _STATE)
        self._warmstart[row] = data.qacc_warmstart
        for name, values in self._fields.items():
            values[row] = getattr(data, name)

    def now(self, rows: np.ndarray) -> Frames:
        """The present of some simulations, [R, *shape] each."""
        return self._frames(self._state[rows], {name: values[rows] for name, values in self._fields.items()})

    def advance(self, controls: np.ndarray) -> Frames:
        """Advance every simulation.

        Args:
            controls: [N, Ta, Nu], each held for `frame_skip` steps of the simulation.

        Returns:
            [N, Ta + 1, *shape] each: before the first control, and after every one.
        """
        controls = controls.astype(np.float64)
        states = _room(self._state, controls.shape[1])  # [N, Ta + 1, S]
        fields = {name: _room(values, controls.shape[1]) for name, values in self._fields.items()}
        if fields or controls.shape[1] == 1:  # a chunk of one step takes no more time outside of MuJoCo in this way
            self._share(lambda data, row: self._step(data, row, controls, states, fields))
        else:
            self._roll(controls, states)
        self._state[:] = states[:, -1]
        for name, values in self._fields.items():
            values[:] = fields[name][:, -1]
        return self._frames(states, fields)

    def save(self) -> dict[str, np.ndarray]:
        """A copy of all that the simulations depend on besides their controls, [N, ...] each."""
        return {name: values.copy() for name, values in self._memory().items()}

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Go on from what `save` gave."""
        for name, values in self._memory().items():
            values[:] = saved[name]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _memory(self) -> dict[str, np.ndarray]:
        # The fields are no function of the state, they lag behind it: they say what was before the next step.
        return {"state": self._state, "warmstart": self._warmstart, **self._fields}

    def _roll(self, controls: np.ndarray, states: np.ndarray) -> None:
        """Fill states [N, 1:, S], a whole chunk of a simulation at a time."""
        held = np.repeat(controls, self._frame_skip, axis=1)  # [N, Ta * frame_skip, Nu]
        every = np.empty((*held.shape[:2], states.shape[2]))  # [N, Ta * frame_skip, S]
        warmstart = self._warmstart.copy()
        models = [self._model]

        def roll(data: MjData, row: int) -> None:
            one = slice(row, row + 1)
            self._rollout.rollout(
                models,
                [data],
                self._state[one],
                held[one],
                initial_warmstart=warmstart[one],
                nstep=held.shape[1],
                state=every[one],
                skip_checks=True,
            )
            self._warmstart[row] = data.qacc_warmstart

        self._share(roll)
        states[:, 1:] = every[:, self._frame_skip - 1 :: self._frame_skip]
        # MuJoCo restarts a simulation that has become unstable, and a rollout ends there. Gymnasium goes on.
        due = self._state[:, 0] + (held.shape[1] - 0.5) * self._model.opt.timestep  # [N], of the time
        for row in np.flatnonzero(~(states[:, -1, 0] > due)).tolist():
            self._warmstart[row] = warmstart[row]
            self._step(self._workers[0], row, controls, states, {})

    def _step(
        self, data: MjData, row: int, controls: np.ndarray, states: np.ndarray, fields: dict[str, np.ndarray]
    ) -> None:
        """Fill states[row, 1:] and those of the fields as Gymnasium does, an environment step at a time."""
        mujoco.mj_setState(self._model, data, states[row, 0], _STATE)
        data.qacc_warmstart[:] = self._warmstart[row]
        for step, control in enumerate(controls[row], 1):
            data.ctrl[:] = control
            mujoco.mj_step(self._model, data, self._frame_skip)
            mujoco.mj_getState(self._model, data, states[row, step], _STATE)
            if fields:
                mujoco.mj_rnePostConstraint(self._model, data)  # for cfrc_ext; no step depends on what it computes
            for name, values in fields.items():
                values[row, step] = getattr(data, name)
        self._warmstart[row] = data.qacc_warmstart

    def _share(self, work: Callable[[MjData, int], None]) -> None:
        """Work on every row, with all threads: whichever is free takes the next."""
        if self._pool is None:
            for row in range(len(self._state)):
                work(self._workers[0], row)
            return
        rows = deque(range(len(self._state)))  # its popleft is safe between threads

        def work_off(data: MjData) -> None:
            while True:
                try:
                    row = rows.popleft()
                except IndexError:
                    return
                work(data, row)

        others = [self._pool.submit(work_off, data) for data in self._workers[1:]]
        work_off(self._workers[0])
        for other in others:
            other.result()

    def _frames(self, states: np.ndarray, fields: dict[str, np.ndarray]) -> Frames:
        first, last = 1 + self._model.nq, 1 + self._model.nq + self._model.nv  # the time comes before the positions
        return {"qpos": states[..., 1:first], "qvel": states[..., first:last], **fields}


def _room(present: np.ndarray, steps: int) -> np.ndarray:
    """The present [N, *shape] with room for some steps more [N, 1 + steps, *shape]."""
    values = np.empty((len(present), steps + 1, *present.shape[1:]))
    values[:, 0] = present
    return values
