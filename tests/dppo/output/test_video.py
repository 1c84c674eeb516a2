import os
import subprocess
import sys
from types import SimpleNamespace

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from dppo.envs.vector import make_env
from dppo.output import video
from dppo.output.video import Camera, choose_gl_backend, gl_problem, record_video
from dppo.task import Task
from policies.base import PolicyConfig
from policies.errors import UserError

SIZE = (64, 48)


class Lamp(gymnasium.Env):
    """An environment whose picture gets brighter with every step, by 10 of 255."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  # as gymnasium has it
    observation_space = Box(-1, 1, (3,))

    def __init__(self, render_mode=None, discrete=False, size=SIZE, fails_at=None):
        self.render_mode = render_mode
        self.action_space = Discrete(2) if discrete else Box(-1, 1, (2,))
        self.size = size
        self.fails_at = fails_at
        self.time = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(3, np.float32), 0.0, False, False, {}

    def render(self):
        if self.time == self.fails_at:
            raise RuntimeError("the lamp\nis broken")
        return np.full((*self.size, 3), 10 * self.time, np.uint8)


class Actor(nn.Module):
    """Notes how it is asked to act."""

    def __init__(self, chunk, discrete=False):
        super().__init__()
        self.config = PolicyConfig(obs_dim=3, action_dim=2, history=2, chunk=chunk)
        self.weight = nn.Parameter(torch.zeros(1))
        self.discrete = discrete
        self.seen = []
        self.actions = []

    def sample(self, obs, *, deterministic, generator):
        self.seen.append((tuple(obs.shape), obs.dtype, deterministic, torch.is_grad_enabled()))
        shape = (1,) if self.discrete else (1, self.config.chunk, 2)
        action = torch.rand(shape, generator=generator)
        self.actions.append(action)
        return SimpleNamespace(action=(action > 0.5).long() if self.discrete else action)


@pytest.fixture(autouse=True)
def lamp():
    gymnasium.register("Lamp-v0", Lamp, max_episode_steps=10)
    yield
    del gymnasium.registry["Lamp-v0"]
    video._warn_once.cache_clear()


def task(**kwargs):
    return Task(name="lamp", env_id="Lamp-v0", env_kwargs=kwargs)


def brightness(path):
    return [round(float(frame.mean()) / 10) for frame in imageio.imread(path)]


def test_every_step_inside_a_chunk_is_in_the_video(tmp_path):
    path = tmp_path / "videos" / "lamp.mp4"
    assert record_video(Actor(chunk=4), task(), path, seed=0) == path
    assert brightness(path) == list(range(11))
    assert imageio.immeta(path)["fps"] == 20
    assert imageio.improps(path).shape[1:] == (*SIZE, 3)
    assert os.listdir(path.parent) == ["lamp.mp4"]


def test_a_simulator_that_steps_faster_than_the_eye_is_drawn_in_real_time(tmp_path, monkeypatch):
    monkeypatch.setitem(Lamp.metadata, "render_fps", 50)
    path = record_video(Actor(chunk=5), task(), tmp_path / "lamp.mp4", seed=0)
    assert brightness(path) == [0, 2, 4, 6, 8, 10]
    assert imageio.immeta(path)["fps"] == 25


def test_the_policy_acts_as_in_evaluation(tmp_path):
    actor = Actor(chunk=4)
    record_video(actor, task(), tmp_path / "lamp.mp4", seed=0)
    assert actor.seen == [((1, 2, 3), torch.float32, True, False)] * 3


def test_the_seed_fixes_the_noise_of_the_policy(tmp_path):
    first, same, other = Actor(chunk=4), Actor(chunk=4), Actor(chunk=4)
    for actor, seed in ((first, 1), (same, 1), (other, 2)):
        record_video(actor, task(), tmp_path / "lamp.mp4", seed=seed)
    assert torch.equal(first.actions[0], same.actions[0])
    assert not torch.equal(first.actions[0], other.actions[0])


def test_a_discrete_policy_can_be_recorded(tmp_path):
    path = record_video(Actor(chunk=1, discrete=True), task(discrete=True), tmp_path / "lamp.mp4", seed=0)
    assert len(brightness(path)) == 11


def test_frames_of_odd_size_are_recorded_without_a_word(tmp_path, caplog):
    path = record_video(Actor(chunk=4), task(size=(51, 65)), tmp_path / "lamp.mp4", seed=0)
    assert len(brightness(path)) == 11
    assert caplog.messages == []


@pytest.mark.parametrize("caption", ["before", "after fine-tuning with a long, long story to tell about it"])
def test_a_caption_is_a_band_of_text_that_fits(caption):
    frame = np.full((200, 320, 3), 128, np.uint8)
    captioned = video._captioned(frame, caption)
    assert captioned.shape == frame.shape
    assert captioned[:36].max() > 200
    assert (captioned[36 + 1 :] == 128).all()
    assert captioned[:36, -10:].max() < 128


def test_an_environment_that_cannot_be_drawn_costs_one_line_once(tmp_path, caplog):
    path = tmp_path / "lamp.mp4"
    for _ in range(2):
        assert record_video(Actor(chunk=4), task(fails_at=0), path, seed=0) is None
    assert caplog.messages == ["no video: the lamp is broken"]


def test_a_picture_that_fails_in_the_middle_leaves_no_file(tmp_path, caplog):
    assert record_video(Actor(chunk=4), task(fails_at=6), tmp_path / "lamp.mp4", seed=0) is None
    assert list(tmp_path.iterdir()) == []
    assert len(caplog.messages) == 1


def test_an_environment_without_pictures_costs_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Lamp, "render", lambda self: None)
    assert record_video(Actor(chunk=4), task(), tmp_path / "lamp.mp4", seed=0) is None
    assert caplog.messages == ["no video: Lamp-v0 does not render pictures"]


def test_a_missing_pygame_costs_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    cartpole = Task(name="cartpole", env_id="CartPole-v1")
    assert record_video(Actor(chunk=1, discrete=True), cartpole, tmp_path / "cartpole.mp4", seed=0) is None
    (message,) = caplog.messages
    assert "pygame is not installed" in message


def test_a_camera_starts_anew_with_each_episode():
    camera = Camera(Lamp("rgb_array"), stride=2)
    for _ in range(2):
        camera.reset()
        for _ in range(3):
            camera.step(None)
        assert [int(frame.max()) for frame in camera.take()] == [0, 20]
    assert camera.take() == []


# --- OpenGL ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with the OpenGL libraries and working drivers that a test puts into it, and no display."""
    installed, broken = set(), set()
    monkeypatch.setattr(video, "_has_libraries", lambda backend: backend in installed)
    monkeypatch.setattr(video, "_probe", lambda backend: "broken" if backend in broken else None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")
    gl_problem.cache_clear()
    yield SimpleNamespace(installed=installed, broken=broken)
    gl_problem.cache_clear()


@pytest.mark.parametrize(
    ("installed", "broken", "chosen"),
    [
        ({"egl"}, set(), "egl"),
        ({"osmesa"}, set(), "osmesa"),
        ({"egl", "osmesa"}, set(), "egl"),
        ({"egl", "osmesa"}, {"egl"}, "osmesa"),
        (set(), set(), "disable"),
    ],
)
def test_without_a_display_the_backend_is_one_that_works(machine, installed, broken, chosen):
    machine.installed |= installed
    machine.broken |= broken
    choose_gl_backend()
    assert os.environ["MUJOCO_GL"] == chosen


def test_with_a_display_and_nothing_else_the_choice_is_left_to_mujoco(machine, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    choose_gl_backend()
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize("chosen", ["glfw", "disable", "egl", "EGL"])
def test_a_choice_of_the_user_that_can_work_stands(machine, monkeypatch, chosen):
    machine.installed.add("egl")
    monkeypatch.setenv("MUJOCO_GL", chosen)
    choose_gl_backend()
    assert os.environ["MUJOCO_GL"] == chosen


@pytest.mark.parametrize("chosen", ["bogus", "osmesa"])
def test_a_choice_of_the_user_that_would_break_the_import_of_mujoco_is_one_clear_line(machine, monkeypatch, chosen):
    monkeypatch.setenv("MUJOCO_GL", chosen)
    with pytest.raises(UserError, match=f"MUJOCO_GL={chosen}"):
        choose_gl_backend()


def test_a_machine_without_opengl_is_told_apart_from_a_switch(machine, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert "not installed" in str(gl_problem())
    machine.installed.add("egl")
    gl_problem.cache_clear()
    assert "switched off" in str(gl_problem())


def test_a_driver_that_aborts_or_hangs_is_a_problem_and_no_crash(monkeypatch):
    monkeypatch.setattr(video, "PROBE", "import os; os.abort()")
    assert "died" in str(video._probe("egl"))
    monkeypatch.setattr(video, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(video, "PROBE_TIMEOUT", 0.2)
    assert "does not answer" in str(video._probe("egl"))


def test_a_machine_whose_egl_has_no_driver_goes_on_without_video(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nonexistent")
    gl_problem.cache_clear()
    env = make_env(task(), history=1, chunk=1)
    monkeypatch.setattr(Lamp, "mujoco_renderer", None, raising=False)
    assert video._renders_with_mujoco(env)
    assert record_video(Actor(chunk=4), task(), tmp_path / "lamp.mp4", seed=0) is None
    (message,) = caplog.messages
    assert message.startswith("no video: OpenGL does not work (MUJOCO_GL=egl)")
    assert capfd.readouterr().err == ""
    gl_problem.cache_clear()


WHOLE = """
import sys
from pathlib import Path
from dppo.output.video import choose_gl_backend, gl_problem, record_video
slow = {"mujoco", "matplotlib", "tensorboard", "scipy", "imageio"} & set(sys.modules)
assert not slow, slow
choose_gl_backend()
if gl_problem():
    sys.exit(77)
from dppo.task import Task
from policies import GaussianPolicy
policy = GaussianPolicy(GaussianPolicy.Config(obs_dim=4, action_dim=1, chunk=2))
task = Task("pendulum", "InvertedPendulum-v5", env_kwargs={"width": 64, "height": 64}, max_episode_steps=4)
assert record_video(policy, task, Path(sys.argv[1]), seed=0)
"""


def test_mujoco_is_drawn_off_screen_and_the_process_ends_in_silence(tmp_path):
    path = tmp_path / "pendulum.mp4"
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    command = [sys.executable, "-c", WHOLE, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip("no OpenGL here")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    frames = imageio.imread(path)
    assert len(frames) >= 3
    assert frames[0].std() > 10


@pytest.mark.parametrize(("cameras", "chosen", "expected"), [(1, -1, 0), (0, -1, -1), (1, 5, 5)])
def test_the_camera_that_goes_with_the_robot_is_taken_unless_another_was_asked_for(cameras, chosen, expected):
    import mujoco

    camera = '<camera name="track" mode="trackcom"/>' * cameras
    body = f'<body>{camera}<geom type="sphere" size="1"/></body>'
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
    renderer = SimpleNamespace(model=model, camera_id=chosen)
    video._follow(SimpleNamespace(unwrapped=SimpleNamespace(mujoco_renderer=renderer)))
    assert renderer.camera_id == expected
