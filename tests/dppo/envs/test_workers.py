import gc
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from equality import assert_same
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv

from dppo.envs.one_by_one import OneByOne
from dppo.envs.restoring import NotRestorable
from dppo.envs.stepper import Stepper
from dppo.envs.vector import make_vector_env, sync_vector_env, worker_vector_env
from dppo.envs.workers import process
from dppo.envs.workers.process import WorkerProcess
from dppo.envs.workers.vector_env import WorkerVectorEnv
from dppo.task import Task
from policies.errors import UserError

WorkerEnv = Callable[..., WorkerVectorEnv]


class Mishap(Exception):
    """An exception that only this module has."""


class PickyError(Exception):
    """An exception that cannot be unpickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one)


class FaultyEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Observes its process, its threads and its seed; what its first action is about to do is in `DEEDS`."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-100, 100, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        seen = -1 if seed is None else seed
        return np.array([os.getpid(), os.environ.get("OMP_NUM_THREADS", "0"), (options or {}).get("at", seen)], "f"), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        DEEDS[int(action[0])]()
        return np.zeros(3, np.float32), 0.0, False, False, {}


def fail(error: BaseException) -> None:
    raise error


DEEDS: list[Callable[[], Any]] = [
    lambda: None,
    lambda: fail(Mishap("spilled")),
    lambda: fail(UserError("out of tokens")),
    lambda: fail(PickyError("one", "other")),
    lambda: os.kill(os.getpid(), signal.SIGKILL),
    lambda: time.sleep(0.001),
    lambda: time.sleep(60),
]
NOTHING, MISHAP, USER_ERROR, PICKY, SUICIDE, SLOW, HANG = range(len(DEEDS))

FAULTY = Task("faulty", "Faulty-v0")


@pytest.fixture(scope="module", autouse=True)
def environments_that_only_this_process_knows(counting_env) -> Iterator[None]:
    """Classes of these modules travel by value, so that workers need not import them, and pytest with them."""
    modules = [sys.modules[counting_env.__module__], sys.modules[FaultyEnv.__module__]]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    gymnasium.registry["Faulty-v0"] = EnvSpec("Faulty-v0", lambda: FaultyEnv())
    yield
    del gymnasium.registry["Faulty-v0"]
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def faulty() -> Iterator[WorkerVectorEnv]:
    """Five faulty environments in two processes, which survive what the tests do to them."""
    env = worker_vector_env(FAULTY, 5, history=1, chunk=1, workers=2)
    yield env
    env.close()


@pytest.fixture
def worker_env() -> Iterator[WorkerEnv]:
    """Builds environments of its own for a test, and closes them in the end."""
    built: list[WorkerVectorEnv] = []

    def build(task: Task = FAULTY, num_envs: int = 2, *, history: int = 1, chunk: int = 1, workers: int = 2):
        built.append(worker_vector_env(task, num_envs, history=history, chunk=chunk, workers=workers))
        return built[-1]

    yield build
    for env in built:
        env.close()


def test_workers_outlive_a_sigterm_that_all_processes_get(faulty):
    faulty.reset(seed=0)
    for worker in faulty._workers:
        os.kill(worker._process.pid, signal.SIGTERM)
    obs = faulty.step(np.full(faulty.action_space.shape, SLOW, np.float32))[0]
    assert obs.shape == (5, 1, 3)


def deeds(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.float32).reshape(-1, 1, 1)


def gone(pid: float, *, or_zombie: bool = False) -> bool:
    """Whether a process has ended and was waited for (a zombie: ended, but its parent has died as well)."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = (Path("/proc") / str(int(pid)) / "stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if or_zombie and state == "Z":
            return True
        time.sleep(0.01)
    return False


# --- the same results


MAZE = Task("maze", "gymnasium_robotics:PointMaze_UMaze-v3", {"continuing_task": False}, max_episode_steps=7)
CASES = {
    "ends inside chunks": (Task("counting", "Counting-v0"), {"history": 3, "chunk": 4}),
    "discrete actions": (Task("counting", "Counting-v0", {"discrete": True}), {"history": 2, "chunk": 1}),
    "observations that are flattened": (MAZE, {"history": 2, "chunk": 4}),
    "random starts and float64 observations": (Task("pendulum", "Pendulum-v1"), {"history": 1, "chunk": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_results_are_those_of_gymnasium_to_the_last_bit_and_nothing_is_printed(worker_env, case, capfd):
    task, sizes = CASES[case]
    reference = sync_vector_env(task, 5, **sizes)
    reference.action_space.seed(0)
    actions = [reference.action_space.sample() for _ in range(12)]
    mask = np.array([True, False, False, True, False])

    def results(env: WorkerVectorEnv | SyncVectorEnv) -> list[Any]:
        found: list[Any] = [env.reset(seed=3), *(env.step(action) for action in actions[:8]), env.reset()]
        found += [env.step(actions[8]), env.reset(options={"reset_mask": mask}), env.step(actions[9])]
        found += [env.reset(seed=[5, None, 9, None, 2]), *(env.step(action) for action in actions[10:])]
        return found

    env = worker_env(task, 5, **sizes)
    assert env.observation_space == reference.observation_space
    assert env.action_space == reference.action_space
    assert env.single_observation_space == reference.single_observation_space
    assert env.single_action_space == reference.single_action_space
    assert env.metadata == reference.metadata
    # Kept until the end, so that a result which a later step changes is found out. Gymnasium's own ones are such.
    reference.copy = True
    ended = 0
    for k, (found, expected) in enumerate(zip(results(env), results(reference), strict=True)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs, f"{case}, {k}")
        ended += np.sum(expected[-1].get("_final_obs", 0))
    assert ended or task.env_id == "Pendulum-v1", "the comparison must have met ends of episodes"
    reference.close()
    assert capfd.readouterr() == ("", "")


def test_consecutive_environments_share_a_process_and_none_is_in_this_one(faulty):
    pids = faulty.reset()[0][:, 0, 0]
    assert pids[0] == pids[1] != pids[2] == pids[3] == pids[4]
    assert os.getpid() not in pids


def test_no_more_processes_than_environments_are_started(worker_env):
    assert len(set(worker_env(num_envs=2, workers=8).reset()[0][:, 0, 0])) == 2


def test_options_reach_the_environments_and_are_left_alone(faulty):
    options = {"reset_mask": np.array([False, True, False, False, True]), "at": 77}
    faulty.reset(seed=1)
    assert faulty.reset(seed=1, options=options)[0][:, 0, 2].tolist() == [1, 77, 3, 4, 77]
    assert options.keys() == {"reset_mask", "at"}


def test_a_worker_uses_one_thread(worker_env, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert worker_env().reset()[0][:, 0, 1].tolist() == [1, 1]


def test_what_a_worker_imports_has_no_torch_and_no_simulator_in_it():
    code = "import dppo.envs.workers.worker, dppo.envs.vector, sys; print(sys.modules.keys() & {'torch', 'mujoco'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("relative", [False, True])
def test_a_module_is_found_in_workers_where_it_is_found_here(worker_env, tmp_path, monkeypatch, relative):
    name = f"some_envs_{relative}".lower()
    (tmp_path / f"{name}.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class ModuleEnv(PendulumEnv):\n"
        "    pass\n"
        "gymnasium.register('Module-v0', ModuleEnv)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("" if relative else tmp_path)
    try:
        assert worker_env(Task("module", f"{name}:Module-v0")).reset(seed=0)[0].shape == (2, 1, 3)
    finally:
        gymnasium.registry.pop("Module-v0", None)


def test_an_id_means_in_workers_what_it_means_here(worker_env, monkeypatch):
    monkeypatch.setitem(gymnasium.registry, "Pendulum-v1", gymnasium.spec("Faulty-v0"))
    assert worker_env(Task("pendulum", "Pendulum-v1")).reset(seed=6)[0][:, 0, 2].tolist() == [6, 7]


def test_a_warning_of_the_constructor_is_given_in_this_process_alone(worker_env, monkeypatch, capfd):
    def build() -> FaultyEnv:
        warnings.warn("out of date", stacklevel=1)
        return FaultyEnv()

    monkeypatch.setitem(gymnasium.registry, "Old-v0", EnvSpec("Old-v0", build))
    with pytest.warns(UserWarning, match="out of date"):
        worker_env(Task("old", "Old-v0")).reset()
    assert capfd.readouterr().err == ""


# --- what goes wrong


def test_an_exception_keeps_its_type_and_says_where_it_was_raised(faulty):
    faulty.reset()
    with pytest.raises(Mishap) as caught:
        faulty.step(deeds(0, 0, 0, MISHAP, USER_ERROR))
    assert str(caught.value) == "spilled"
    (note,) = caught.value.__notes__
    assert "Raised in a worker process by environment 3:" in note
    assert "DEEDS[int(action[0])]()" in note


def test_of_several_exceptions_the_first_environments_is_raised(faulty):
    faulty.reset()
    with pytest.raises(UserError, match=r"^environment 1: out of tokens\n"):
        faulty.step(deeds(0, USER_ERROR, MISHAP, MISHAP, 0))


def test_an_exception_that_cannot_be_pickled_keeps_its_name(faulty):
    faulty.reset()
    with pytest.raises(RuntimeError, match="PickyError: one"):
        faulty.step(deeds(0, 0, 0, 0, PICKY))


def test_after_an_exception_the_environments_can_be_reset_and_stepped(faulty):
    faulty.reset()
    with pytest.raises(Mishap):
        faulty.step(deeds(MISHAP, 0, 0, 0, 0))
    assert faulty.reset(seed=4)[0][:, 0, 2].tolist() == [4, 5, 6, 7, 8]
    assert not faulty.step(deeds(0, 0, 0, 0, 0))[0].any()


def test_stepping_before_the_first_reset_is_refused_as_elsewhere(worker_env):
    with pytest.raises(ResetNeeded):
        worker_env().step(deeds(0, 0))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (4, 1, 1), (5, 2, 1)])
def test_actions_of_the_wrong_shape_are_refused(faulty, shape):
    faulty.reset()
    with pytest.raises(ValueError, match=re.escape(f"(5, 1, 1), got {shape}")):
        faulty.step(np.zeros(shape, np.float32))


def kill(pid: float) -> None:
    os.kill(int(pid), signal.SIGKILL)
    while Path(f"/proc/{int(pid)}/stat").read_text().split()[2] != "Z":
        time.sleep(0.001)


def test_a_process_that_dies_is_replaced_and_the_episodes_of_its_environments_are_dropped(worker_env, caplog):
    env = worker_env(num_envs=4)
    first = env.reset(seed=3)[0][:, 0]
    obs, rewards, terminated, truncated, infos = env.step(deeds(0, 0, SUICIDE, 0))
    assert infos["dropped"].tolist() == truncated.tolist() == [False, False, True, True]
    assert not terminated.any() and not rewards.any()
    assert not infos["final_info"]["steps"].any()
    assert not obs[:2].any()
    assert obs[2, 0, 0] == obs[3, 0, 0] != first[2, 0]
    assert gone(first[2, 0])
    assert env.restarts == 1
    assert "environments 2 to 3 has died (killed: Killed); another one takes its place" in caplog.text
    assert "dropped" not in env.step(deeds(0, 0, 0, 0))[-1]


def test_what_takes_the_place_of_a_process_is_seeded_anew_and_alike_in_every_run(worker_env):
    seeds = []
    for _ in range(2):
        env = worker_env(num_envs=2)
        env.reset(seed=3)
        seeds.append([env.step(deeds(0, SUICIDE))[0][1, 0, 2], env.step(deeds(0, SUICIDE))[0][1, 0, 2]])
    assert seeds[0] == seeds[1]
    assert len({4, *seeds[0]}) == 3


def test_three_deaths_in_a_row_are_an_error_and_the_other_processes_end(worker_env):
    env = worker_env(num_envs=4)
    pids = env.reset()[0][:, 0, 0]
    env.step(deeds(0, 0, SUICIDE, 0))
    env.step(deeds(0, 0, 0, SUICIDE))
    message = r"environments 2 to 3 has died \(killed: Killed\), 3 times in a row; .*memory.*threads=1"
    with pytest.raises(UserError, match=message):
        env.step(deeds(0, 0, SUICIDE, 0))
    assert gone(pids[0])
    with pytest.raises(ClosedEnvironmentError):
        env.step(deeds(0, 0, 0, 0))


def test_deaths_with_a_step_in_between_are_not_in_a_row(worker_env):
    env = worker_env(num_envs=2)
    env.reset()
    for _ in range(3):
        env.step(deeds(SUICIDE, 0))
        env.step(deeds(0, 0))
    assert env.restarts == 3


def test_a_death_during_a_reset_changes_nothing(worker_env):
    env = worker_env(num_envs=4)
    kill(env.reset()[0][2, 0, 0])
    assert env.reset(seed=7)[0][:, 0, 2].tolist() == [7, 8, 9, 10]
    assert "dropped" not in env.step(deeds(0, 0, 0, 0))[-1]


def test_an_episode_that_is_lost_while_others_are_reset_is_dropped_in_the_next_step(worker_env):
    """Its action, which was chosen by an observation of the lost episode, is not executed in the new one."""
    env = worker_env(num_envs=4)
    pid = env.reset(seed=0)[0][2, 0, 0]
    kill(pid)
    obs, _ = env.reset(seed=7, options={"reset_mask": np.array([True, False, True, False])})
    assert obs[[0, 2], 0, 2].tolist() == [7, 9]
    obs, *_, infos = env.step(deeds(0, 0, 0, MISHAP))
    assert infos["dropped"].tolist() == [False, False, False, True]
    assert not obs[:3].any()
    assert obs[3, 0, 0] not in (0, pid), "the first observation of the new episode"
    with pytest.raises(Mishap):
        env.step(deeds(0, 0, 0, MISHAP))


def test_after_a_death_there_is_no_state_to_tell_until_the_next_step_has_dropped_what_was_lost(worker_env):
    env = worker_env(Task("point", "Point-v0"), num_envs=4)
    env.reset(seed=3)
    kill(env._workers[1]._process.pid)
    for _ in range(2):
        with pytest.raises(NotRestorable, match="a worker process has died"):
            env.get_state()
    obs, *_, infos = env.step(np.zeros((4, 1, 2), np.float32))
    assert infos["dropped"].tolist() == [False, False, True, True]
    told = [state["env"]["layers"][-1]["own"] for state in env.get_state()["envs"]]
    assert [state["steps"] for state in told] == [1, 1, 0, 0]
    np.testing.assert_array_equal([state["target"] for state in told], obs[:, 0])


def test_a_death_while_a_state_is_put_back_changes_nothing(worker_env):
    env = worker_env(Task("point", "Point-v0"), num_envs=4)
    env.reset(seed=3)
    state = env.get_state()
    kill(env._workers[0]._process.pid)
    env.set_state(state)
    found = env.step(np.zeros((4, 1, 2), np.float32))
    assert "dropped" not in found[-1]
    env.set_state(state)
    expected = env.step(np.zeros((4, 1, 2), np.float32))
    assert_same(found[0], expected[0], "the same step again")


def test_a_stepper_has_no_transition_where_a_process_died(worker_env):
    stepper = Stepper(worker_env(num_envs=4))
    stepper.reset(0)
    step = stepper.step(deeds(0, 0, SUICIDE, 0))
    assert step.valid.tolist() == [True, True, False, False]
    assert step.dropped.tolist() == step.truncated.tolist() == [False, False, True, True]
    assert step.steps.tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(step.final_obs[2:], step.obs[2:])
    assert stepper.restarts == 1


def test_an_interruption_ends_the_processes_even_if_an_environment_hangs(worker_env, monkeypatch):
    def interrupt(worker: WorkerProcess) -> None:
        raise KeyboardInterrupt

    env = worker_env()
    pids = env.reset()[0][:, 0, 0]
    monkeypatch.setattr(WorkerProcess, "receive", interrupt)
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    with pytest.raises(KeyboardInterrupt):
        env.step(deeds(0, HANG))
    assert env.closed
    assert gone(pids[0]) and gone(pids[1])


def test_closing_ends_the_processes_and_frees_the_memory(worker_env):
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:environments")

    gc.collect()
    before, files = mappings(), len(os.listdir("/proc/self/fd"))
    env = worker_vector_env(FAULTY, 2, history=1, chunk=1, workers=2)
    pids = env.reset()[0][:, 0, 0]
    assert mappings() == before + 1
    began = time.monotonic()
    env.close()
    env.close()
    assert time.monotonic() - began < 2
    assert gone(pids[0]) and gone(pids[1])
    del env
    gc.collect()
    assert mappings() == before
    assert len(os.listdir("/proc/self/fd")) == files


# --- the process that trains


SCRIPT = """
import os, signal, sys, time
import gymnasium
import numpy as np
from gymnasium.spaces import Box
from dppo.envs.vector import worker_vector_env
from dppo.task import Task

class OwnEnv(gymnasium.Env):
    observation_space = action_space = Box(-np.inf, np.inf, (1,), np.float32)
    def reset(self, seed=None, options=None):
        return np.full(1, os.getpid()), {}
    def step(self, action):
        time.sleep(float(action[0]))
        return np.full(1, os.getpid()), 0.0, False, False, {}

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
gymnasium.register("Own-v0", OwnEnv)
env = worker_vector_env(Task("own", "Own-v0"), 2, history=1, chunk=1, workers=2)
try:
    print(*env.reset()[0].ravel(), flush=True)
    if sys.argv[1] == "step":
        env.step(np.array([[[0.5]], [[0.5]]]))
        time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def script(tmp_path) -> Iterator[Callable[[str], tuple[subprocess.Popen, list[float]]]]:
    """Runs a script that does not guard its main part and never closes its environments; and the workers' ids."""
    (tmp_path / "script.py").write_text(SCRIPT)
    processes = []

    def run(argument: str) -> tuple[subprocess.Popen, list[float]]:
        command = [sys.executable, "-X", "dev", "-W", "error", tmp_path / "script.py", argument]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        options: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        processes.append(subprocess.Popen(command, start_new_session=True, **options))
        return processes[-1], [float(pid) for pid in processes[-1].stdout.readline().split()]

    yield run
    for each in processes:
        each.kill()
        each.communicate()


def test_a_script_without_a_guard_runs_once_and_leaves_nothing_behind(script):
    process, pids = script("")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "", "")
    assert len(pids) == 2 and all(gone(pid, or_zombie=True) for pid in pids)


def test_workers_end_when_the_process_that_trains_is_killed(script):
    process, pids = script("step")
    process.kill()
    assert process.communicate(timeout=30) == ("", "")
    assert len(pids) == 2 and all(gone(pid, or_zombie=True) for pid in pids)


def test_an_interruption_from_the_terminal_is_heard_by_the_process_that_trains_alone(script):
    process, pids = script("step")
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("interrupted\n", "")
    assert len(pids) == 2 and all(gone(pid, or_zombie=True) for pid in pids)


# --- the choice


@pytest.fixture
def chosen(monkeypatch) -> Iterator[Callable[..., type]]:
    """The class that `make_vector_env` chooses for two environments, of which each step takes a millisecond."""
    envs = []

    def choose(task: Task = FAULTY, num_envs: int = 2, **settings: Any) -> type:
        envs.append(make_vector_env(task, num_envs, history=1, chunk=1, **settings))
        return type(envs[-1])

    monkeypatch.setattr(FaultyEnv, "action_space", Box(SLOW, SLOW, (1,), np.float32))
    yield choose
    for env in envs:
        env.close()


def test_slow_environments_get_workers(chosen):
    assert chosen(threads=2) is WorkerVectorEnv


def test_environments_that_are_faster_than_an_exchange_share_this_process(chosen, counting_task):
    assert chosen(counting_task, 8, threads=8) is OneByOne


@pytest.mark.parametrize("settings", [{"threads": 1}, {"num_envs": 1, "threads": 2}])
def test_one_processor_or_one_environment_needs_no_workers(chosen, settings):
    assert chosen(**settings) is OneByOne


def test_an_environment_that_cannot_be_made_elsewhere_stays_in_this_process(chosen, monkeypatch, caplog):
    here = os.getpid()
    spec = EnvSpec("Bound-v0", lambda: FaultyEnv() if os.getpid() == here else fail(Mishap("bound to one process")))
    monkeypatch.setitem(gymnasium.registry, "Bound-v0", spec)
    assert chosen(Task("bound", "Bound-v0"), threads=2) is OneByOne
    assert "task bound: " in caplog.text and "bound to one process" in caplog.text


def test_a_process_that_dies_at_its_start_is_no_reason_to_make_the_environments_here(chosen, monkeypatch):
    here = os.getpid()
    spec = EnvSpec("Large-v0", lambda: FaultyEnv() if os.getpid() == here else os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setitem(gymnasium.registry, "Large-v0", spec)
    with pytest.raises(
        UserError, match=r"worker process of environment 0 has died \(killed: Killed\), 3 times in a row"
    ):
        chosen(Task("large", "Large-v0"), threads=2)


def test_an_environment_that_fails_when_it_is_tried_out_fails_where_it_is_used(chosen, monkeypatch):
    monkeypatch.setattr(FaultyEnv, "action_space", Box(MISHAP, MISHAP, (1,), np.float32))
    assert chosen(threads=2) is OneByOne
