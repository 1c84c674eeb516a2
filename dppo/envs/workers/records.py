"""The memory through which worker processes take actions and give results: one record per environment.

N environments, To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

import mmap
import os
import tempfile

import numpy as np
from gymnasium.spaces import Box

from dppo.envs.chunk import ChunkEnv


def record_type(env: ChunkEnv) -> np.dtype:
    """What there is to say about one environment and one step; action and `lost` go in, everything else comes out."""
    action, obs = env.action_space, env.observation_space
    assert isinstance(obs, Box)
    chunk = action.shape[0] if isinstance(action, Box) else 1
    return np.dtype(
        [
            ("action", action.dtype, action.shape),  # [Ta, Da] (discrete: a number, or one of each dimension)
            ("obs", obs.dtype, obs.shape),  # [To, Do], the first of the next episode where one ended
            ("final_obs", obs.dtype, obs.shape),  # [To, Do], what the step led to
            ("step_rewards", np.float64, (chunk,)),  # [Ta]
            ("reward", np.float64),
            ("steps", np.int64),
            ("terminated", np.bool_),
            ("truncated", np.bool_),
            ("lost", np.bool_),  # the action was chosen in an episode that is lost, and is not to be executed
        ],
        align=True,
    )


def open_memory(size: int) -> int:
    """File descriptor of `size` bytes of memory that has no name: it is freed with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("environments")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    return memory


def map_records(memory: int, kind: np.dtype, num_envs: int) -> np.ndarray:
    """The records [N] in the memory of a file descriptor, which is not needed any more afterwards."""
    return np.frombuffer(mmap.mmap(memory, kind.itemsize * num_envs), kind)
