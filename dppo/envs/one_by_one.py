"""Gymnasium's vector environment of one environment after the other, with a state.

N environments.
"""

from typing import Any

from gymnasium.vector import AutoresetMode, SyncVectorEnv

from dppo.envs.restoring import envs_of


class OneByOne(SyncVectorEnv):
    """`SyncVectorEnv` of `ChunkEnv`s."""

    def get_state(self) -> dict[str, Any]:
        """A copy of the whole state, as plain data.

        Returns:
            envs: N states of `ChunkEnv.get_state`, which see.
            resets_next: [N], which of them the next step only resets; in NEXT_STEP mode alone, so that any other state
                is one for worker processes, too.
        """
        waiting = {"resets_next": self._autoreset_envs.copy()} if self._resets_later else {}
        return {"envs": [env.get_state() for env in self._chunk_envs], **waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`, of this or another instance for the same task and sizes.

        Raises:
            ValueError: there are more or fewer environments.
        """
        for env, of_env in zip(self._chunk_envs, envs_of(state, self.num_envs), strict=True):
            env.set_state(of_env)
        if self._resets_later:
            self._autoreset_envs = state["resets_next"].copy()

    @property
    def _resets_later(self) -> bool:
        return self.autoreset_mode is AutoresetMode.NEXT_STEP

    @property
    def _chunk_envs(self) -> list[Any]:
        return list(self.envs)
