"""Infos as Gymnasium's vector environments lay them out.

N environments, To history, Ta executed chunk, Do observation dimension.
"""

from typing import Any

import numpy as np


def same_step_infos(
    step_rewards: np.ndarray, steps: np.ndarray, final: np.ndarray, ended: np.ndarray
) -> dict[str, Any]:
    """The infos of one step of `ChunkEnv`s in SAME_STEP mode.

    What an episode's last step gave is in "final_info"; every entry has a mask of the environments that gave it.

    Args:
        step_rewards: [N, Ta].
        steps: [N].
        final: [N, To, Do], the observation that the step led to.
        ended: [N], whether the episode ended with it.
    """

    def masked(rows: np.ndarray) -> dict[str, Any]:
        if not rows.any():
            return {}
        rewards = np.where(rows[:, None], step_rewards, 0.0)
        return {"step_rewards": rewards, "_step_rewards": rows, "steps": np.where(rows, steps, 0), "_steps": rows}

    infos = masked(~ended)
    if ended.any():
        last = np.full(len(ended), None, object)
        for row in np.flatnonzero(ended):
            last[row] = final[row]
        infos |= {"final_obs": last, "_final_obs": ended, "final_info": masked(ended), "_final_info": ended}
    return infos
