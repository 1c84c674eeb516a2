"""A scripted demonstrator for the point mazes of gymnasium-robotics."""

from collections import deque
from collections.abc import Sequence

import gymnasium
import numpy as np

from policies.errors import UserError

Cell = tuple[int, int]
"""(row, column) of a maze map."""

_WALL = 1
_SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))
_ARRIVAL = 0.3  # metres: a waypoint this near is passed, and the corner cut a little
_POSITION_GAIN = 8.0  # 1/s: metres per second asked for per metre of distance
_VELOCITY_GAIN = 1.0  # s/m: force per metre per second of wrong velocity; the largest force is 1
_SPEED = 5.0  # metres per second: the most that the environment allows
_NOISE_MEMORY = 0.9  # share of the noise that is left at the next step: white noise hardly moves a mass


class WaypointController:
    """Walks a point mass along a shortest path of cells, with noise on its actions.

    The path is planned by breadth-first search at every reset; of equally short paths either may be taken. From one
    cell centre to the next, and last to the goal itself, a proportional law turns distance into a wanted velocity, no
    faster than the environment allows, and the error of the velocity into a force.

    The noise is a stationary Gaussian process, so that demonstrations wander off their path and come back to it.

    Raises:
        UserError: on construction, if the environment is not a maze with a point in it.
    """

    def __init__(self, env: gymnasium.Env, noise: float = 0.5, seed: int = 0) -> None:
        """Control `env`.

        Args:
            env: a PointMaze, in any wrappers.
            noise: standard deviation of the action noise, in units of the largest force.
            seed: of the noise and of the choice between equally short paths.
        """
        maze = getattr(env.unwrapped, "maze", None)
        if maze is None or not hasattr(env.unwrapped, "point_env"):
            raise UserError(f"the waypoint controller only knows PointMaze environments, not {env.unwrapped}")
        self._maze = maze
        self._noise_std = noise
        self._rng = np.random.default_rng(seed)
        self._waypoints: deque[np.ndarray] = deque()
        self._noise = np.zeros(2)

    def reset(self, obs: np.ndarray) -> None:
        """Plan the path of a new episode from its first observation [8]."""
        position, goal = obs[:2], obs[2:4]
        start, end = (_cell(self._maze.cell_xy_to_rowcol(xy)) for xy in (position, goal))
        path = shortest_path(self._maze.maze_map, start, end, self._rng)
        centres = [self._maze.cell_rowcol_to_xy(np.array(cell)) for cell in path[1:-1]]
        self._waypoints = deque([*centres, np.array(goal, np.float64)])
        self._noise = self._rng.normal(0.0, self._noise_std, 2)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """The next action.

        Args:
            obs: [8] as FlattenObservation orders it: position (2), goal (2), position again (2), velocity (2).

        Returns:
            Force [2] float32 in [-1, 1].
        """
        position, velocity = obs[:2], obs[6:8]
        if len(self._waypoints) > 1 and np.linalg.norm(self._waypoints[0] - position) < _ARRIVAL:
            self._waypoints.popleft()
        wanted = _POSITION_GAIN * (self._waypoints[0] - position)
        wanted *= min(1.0, _SPEED / max(float(np.linalg.norm(wanted)), 1e-9))
        force = _VELOCITY_GAIN * (wanted - velocity)
        fresh = self._rng.normal(0.0, self._noise_std, 2)
        self._noise = _NOISE_MEMORY * self._noise + np.sqrt(1.0 - _NOISE_MEMORY**2) * fresh
        return np.clip(force + self._noise, -1.0, 1.0).astype(np.float32)


def shortest_path(
    maze_map: Sequence[Sequence[int | str]], start: Cell, end: Cell, rng: np.random.Generator
) -> list[Cell]:
    """A shortest path of cells from start to end, both included, at random among equally short ones.

    Raises:
        ValueError: there is no path.
    """
    previous: dict[Cell, Cell] = {start: start}
    frontier = deque([start])
    while frontier and end not in previous:
        cell = frontier.popleft()
        for side in rng.permutation(_SIDES):
            near = (cell[0] + int(side[0]), cell[1] + int(side[1]))
            if near not in previous and maze_map[near[0]][near[1]] != _WALL:
                previous[near] = cell
                frontier.append(near)
    if end not in previous:
        raise ValueError(f"the maze has no path from {start} to {end}")
    path = [end]
    while path[-1] != start:
        path.append(previous[path[-1]])
    return path[::-1]


def _cell(rowcol: np.ndarray) -> Cell:
    return int(rowcol[0]), int(rowcol[1])
