"""One episode as an MP4, on machines with a screen, without one, and, politely, on those that cannot render at all.

Rendering is never worth a training run: whatever stands in its way becomes one logged line and no video.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch

from dppo.envs.chunk import ChunkEnv
from dppo.envs.vector import make_env, make_plain_env
from dppo.task import Task
from dppo.threads import single_thread
from policies.base import Policy
from policies.errors import UserError

log = logging.getLogger(__name__)

MAX_FPS = 30
"""Pictures per second of simulated time. Many simulators step more often, and drawing is what takes the time (0.05 to
0.1 s a picture without a GPU)."""
CAPTION_SIZE = 18

# --- OpenGL ---------------------------------------------------------------------------------------------------------

BACKEND_LIBRARIES = {
    "egl": (("libEGL.so.1",), ("libOpenGL.so.0", "libGL.so.1")),
    "osmesa": (("libOSMesa.so.8", "libOSMesa.so.6"),),
}
"""What MuJoCo's ways to render without a screen need: of each group one library. Linux only."""

OTHER_BACKENDS = ("glfw", "glx", "enable", "enabled", "on", "true", "1")
DISABLED = ("disable", "disabled", "off", "false", "0")

PROBE_TIMEOUT = 60.0
PROBE = """
import os
try:
    import mujoco
    renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16)
    renderer.render()
except BaseException as error:
    print(type(error).__name__, " ".join(str(error).split()), flush=True)
    os._exit(1)
os._exit(0)  # without destructors, which are noisy where a context is half made
"""


def choose_gl_backend() -> None:
    """Settle MUJOCO_GL. To be called before anything imports mujoco, whose import fails for a backend that is missing.

    Unset, it becomes what renders off screen here: EGL, else OSMesa, else (without a display) nothing.

    Raises:
        UserError: the user set it to something that cannot work here.
    """
    if sys.platform != "linux":
        return
    chosen = os.environ.get("MUJOCO_GL", "")
    if not chosen:
        available = [backend for backend in BACKEND_LIBRARIES if _has_libraries(backend)]
        if len(available) > 1 and _probe(available[0]) is not None:  # only then is there a choice worth 0.4 s
            available.pop(0)
        if available:
            os.environ["MUJOCO_GL"] = available[0]
        elif "DISPLAY" not in os.environ:
            os.environ["MUJOCO_GL"] = "disable"
        else:
            os.environ.pop("MUJOCO_GL", None)
        return
    backend = chosen.lower().strip()
    advice = "unset it, and the best one is chosen; MUJOCO_GL=disable trains without rendering"
    if backend not in (*BACKEND_LIBRARIES, *OTHER_BACKENDS, *DISABLED):
        raise UserError(f"MUJOCO_GL={chosen} is not a rendering backend of MuJoCo; {advice}")
    if backend in BACKEND_LIBRARIES and not _has_libraries(backend):
        raise UserError(f"MUJOCO_GL={chosen} is set, but its OpenGL libraries are not installed; {advice}")


@cache
def gl_problem() -> str | None:
    """Why MuJoCo cannot render here, in one line; None if it can. Tried once (0.4 s), in a process of its own."""
    backend = os.environ.get("MUJOCO_GL", "").lower().strip()
    if backend not in DISABLED:
        return _probe(backend)
    if any(map(_has_libraries, BACKEND_LIBRARIES)):
        return f"rendering is switched off (MUJOCO_GL={backend})"
    return "OpenGL is not installed (Debian, Ubuntu: apt install libegl1 libgl1 libgl1-mesa-dri)"


def _has_libraries(backend: str) -> bool:
    return all(any(map(_loads, group)) for group in BACKEND_LIBRARIES[backend])


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _probe(backend: str) -> str | None:
    """Render a frame in another process: a bad driver may abort, hang, or talk to stderr."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    try:
        command = [sys.executable, "-c", PROBE]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"OpenGL does not answer (MUJOCO_GL={backend})"
    if result.returncode == 0:
        return None
    reason = result.stdout.strip().split(". ")[0] or f"the process died with status {result.returncode}"
    return f"OpenGL does not work (MUJOCO_GL={backend}): {textwrap.shorten(reason, 120, placeholder=' ...')}"


# --- the episode ----------------------------------------------------------------------------------------------------


@single_thread()
def record_video(policy: Policy, task: Task, path: Path, *, seed: int, caption: str | None = None) -> Path | None:
    """Record one deterministic episode in real time, inside the chunks too.

    Args:
        policy: acts as in evaluation, on the device it is on.
        task: whose environment to draw.
        path: the MP4 to write; its folder is made.
        seed: of the environment, and of the noise a diffusion policy starts from.
        caption: a line over the picture.

    Returns:
        The path, or None where nothing can be rendered; the reason is logged, once, as a warning.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws the simpler environments, and needs no screen
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(make_plain_env(task)) as plain:
            if "rgb_array" not in (plain.metadata.get("render_modes") or ()):
                raise UserError(f"{task.env_id} does not render pictures")
        env = make_env(task, history=policy.config.history, chunk=policy.config.executed_chunk, render_mode="rgb_array")
        with closing(env):
            if _renders_with_mujoco(env) and (problem := gl_problem()):
                raise UserError(problem)
            fps = env.metadata.get("render_fps", MAX_FPS)
            stride = math.ceil(fps / MAX_FPS)
            _follow(env)
            camera = env.env = Camera(env.env, stride)  # below the chunks, where the single steps are
            with _writer(path, fps / stride) as write:
                for _ in _episode(policy, env, seed):
                    for frame in camera.take():
                        write(_captioned(frame, caption) if caption else frame)
    except Exception as error:  # whatever a simulator, a driver or a missing package comes up with
        log.debug("recording failed", exc_info=True)
        _warn_once(f"no video: {' '.join(str(error).split()) or type(error).__name__}")
        return None
    return path


class Camera(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Takes a picture at the reset and after every ``stride``-th step of one environment."""

    def __init__(self, env: gymnasium.Env, stride: int) -> None:
        super().__init__(env)
        self._stride = stride
        self._steps = 0
        self._frames: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment and take the first picture."""
        result = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._shoot()
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment, and take a picture if it is time."""
        result = self.env.step(action)
        self._steps += 1
        if self._steps % self._stride == 0:
            self._shoot()
        return result

    def take(self) -> list[np.ndarray]:
        """The pictures [height, width, 3] uint8 since the last call."""
        frames, self._frames = self._frames, []
        return frames

    def _shoot(self) -> None:
        frame = self.env.render()
        if not isinstance(frame, np.ndarray):
            name = self.env.spec.id if self.env.spec is not None else str(self.env.unwrapped)
            raise UserError(f"{name} does not render pictures")
        self._frames.append(frame)


def _follow(env: gymnasium.Env) -> None:
    """Look through the model's own camera that goes with the robot, if it has one and no other was asked for.

    Gymnasium 1.4 takes a free camera instead, which stays where it is while the robot walks out of the picture.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.camera_id == -1:
        import mujoco

        module: Any = mujoco  # whose stubs leave these names out
        renderer.camera_id = module.mj_name2id(renderer.model, module.mjtObj.mjOBJ_CAMERA, "track")


@torch.no_grad()
def _episode(policy: Policy, env: ChunkEnv, seed: int) -> Iterator[None]:
    """Act out one episode, with a pause after the reset and after every chunk."""
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    obs, _ = env.reset(seed=seed)  # [To, Do]
    yield
    ended = False
    while not ended:
        batch = torch.from_numpy(obs).unsqueeze(0).to(device)  # [1, To, Do]
        action = policy.sample(batch, deterministic=True, generator=generator).action  # [1, Ta, Da] or [1]
        obs, _, terminated, truncated, _ = env.step(action[0].cpu().numpy())
        yield
        ended = terminated or truncated


def _renders_with_mujoco(env: gymnasium.Env) -> bool:
    """Whether the environment, or one that it keeps inside (a maze its robot), uses gymnasium's MuJoCo renderer."""
    inner = env.unwrapped
    return any(hasattr(candidate, "mujoco_renderer") for candidate in (inner, *vars(inner).values()))


@contextmanager
def _writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Append frames to an MP4 that takes its name once it is complete."""
    import imageio.v2 as imageio  # 0.2 s

    unfinished = path.with_name(f".{path.name}")
    try:
        # Closed by us, because the writer's own context manager leaves ffmpeg running after an error.
        with closing(imageio.get_writer(unfinished, fps=fps, codec="libx264", macro_block_size=2)) as writer:
            yield lambda frame: writer.append_data(_even(frame))  # pyright: ignore[reportAttributeAccessIssue]
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _even(frame: np.ndarray) -> np.ndarray:
    """The frame without an odd last row or column, which H.264 cannot hold."""
    height, width = frame.shape[:2]
    return frame[: height // 2 * 2, : width // 2 * 2]


def _captioned(frame: np.ndarray, caption: str) -> np.ndarray:
    """The frame with a line of text on a dark band along its top."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(frame)
    draw = ImageDraw.Draw(image, "RGBA")
    draw.rectangle((0, 0, image.width, 2 * CAPTION_SIZE), fill=(0, 0, 0, 150))
    font = ImageFont.load_default(CAPTION_SIZE)
    room = image.width - 2 * CAPTION_SIZE
    if (length := draw.textlength(caption, font)) > room:
        font = ImageFont.load_default(CAPTION_SIZE * room / length)
    draw.text((CAPTION_SIZE, CAPTION_SIZE), caption, font=font, anchor="lm")
    return np.asarray(image)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
