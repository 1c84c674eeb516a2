"""The judge of speed: what it counts and how it reports. It is not run here as a whole: that takes minutes."""

import os
import subprocess
import sys

import pytest
import torch

from dppo.updates.first_order_config import PPOConfig
from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.networks.mlp import MLP, MLPConfig
from throughput import cloning, comparison, dppo_iteration, gaussian
from throughput.flops import DenoiserFlops, chain_flops, forward_flops, training_flops
from throughput.limits import ProductLimit
from throughput.memory import PeakMemory, descendants, peak_bytes, proportional_bytes
from throughput.options import Options, medians
from throughput.report import markdown
from throughput.turns import SCRIPTS, Turns, environment


def policy(finetuned_steps: int | None) -> DiffusionPolicy:
    """Latent 2 x 3 = 6, observation 5, hidden 8, K = 4."""
    network = {"type": "mlp", "hidden_dims": [8, 8, 8], "residual": True, "step_dim": 4}
    config = DiffusionConfig(
        obs_dim=5, action_dim=3, chunk=2, network=network, denoising_steps=4, finetuned_steps=finetuned_steps
    )
    return DiffusionPolicy(config)


def test_a_plain_network_costs_two_operations_per_weight_and_three_times_that_in_training() -> None:
    network = MLP(3, 2, MLPConfig(hidden_dims=(4, 5)))
    assert forward_flops(network) == 2 * (3 * 4 + 4 * 5 + 5 * 2)
    assert training_flops(network) == 3 * 2 * (3 * 4 + 4 * 5 + 5 * 2) - 2 * 3 * 4  # the input needs no gradient


def test_a_denoiser_is_counted_without_its_steps_share() -> None:
    flops = DenoiserFlops.of(policy(None).network)
    assert (flops.latent, flops.obs, flops.trunk) == (2 * 6 * 8, 2 * 5 * 8, 2 * (8 * 8 + 8 * 8 + 8 * 6))
    assert flops.training == 2 * (96 + 80) + 3 * 352


@pytest.mark.parametrize(("finetuned_steps", "networks"), [(None, 1), (2, 2)])
def test_a_chain_meets_the_observation_once_for_each_network(finetuned_steps: int | None, networks: int) -> None:
    assert chain_flops(policy(finetuned_steps)) == networks * 80 + 4 * (96 + 352)


def test_an_iterations_work_and_fractions_are_those_of_a_hand_calculation() -> None:
    class Config:
        num_envs, rollout_steps = 3, 7

    class Critic:
        network = MLP(5, 1, MLPConfig(hidden_dims=(4,)))

    class Trainer:
        config, critic, env_steps = Config, Critic, 100
        algo = PPOConfig(epochs=5, batch_size=30)
        policy = policy(2)

        def iterate(self) -> dict[str, float]:
            self.env_steps += 40
            # 3 * 7 * 2 = 42 pairs in minibatches of 30 are two an epoch; the target KL stopped the actor after 3 of 10
            return {f"{phase}_s": 2.0 for phase in dppo_iteration.PHASES} | {"actor_steps": 3}

    limits = {"environment": 80.0, "sampling": 1e4, "scoring": 1e3, "update": 1e5}
    turn = dppo_iteration._turn(Trainer(), limits)  # pyright: ignore[reportArgumentType]
    sampling, scoring = 21 * (2 * 80 + 4 * 448), 21 * 2 * (5 * 4 + 4)
    update = 3 / 2 * 42 * (2 * 176 + 3 * 352) + 5 * 21 * (2 * 2 * 5 * 4 + 3 * 2 * 4)
    assert turn["work"] == {"environment": 40, "sampling": sampling, "scoring": scoring, "update": update}
    assert turn["fractions"] == pytest.approx(
        {"environment": 0.25, "sampling": sampling / 2e4, "scoring": scoring / 2e3, "update": update / 2e5}
    )
    assert turn["whole"] == {"total_s": 10.0, "env_steps": 40, "env_steps_per_s": 4.0}


def test_the_paper_setting_is_what_the_tables_say() -> None:
    trainer = dppo_iteration.build_trainer(["experiment=paper_hopper", "task=halfcheetah", "checkpoint=scratch"])
    trainer.close()
    assert trainer.task.env_id == "HalfCheetah-v5"
    assert (trainer.config.num_envs, trainer.config.rollout_steps, trainer.policy.num_steps) == (40, 500, 10)
    assert (trainer.algo.batch_size, trainer.algo.epochs) == (50_000, 5)
    assert trainer.policy.config.network["hidden_dims"] == [512, 512, 512]


def test_the_gaussian_setting_is_that_of_the_others() -> None:
    trainer = gaussian.gaussian_trainer("hopper", 8, compiled=False)
    trainer.close()
    assert trainer.config.num_envs * trainer.config.rollout_steps == 2048
    weights = [parameter.numel() for parameter in trainer.policy.parameters()]
    assert sum(weights) == (11 * 64 + 64) + (64 * 64 + 64) + (64 * 3 + 3) + 3
    assert (trainer.algo.batch_size, trainer.algo.epochs, trainer.algo.max_grad_norm) == (64, 10, 0.5)


def test_the_cloner_is_that_of_the_paper() -> None:
    cloner = cloning._cloner("float32")
    assert cloner.batch_size == 128
    assert cloning._sample_flops(cloner) == 2 * 2 * (12 + 11) * 512 + 3 * 2 * (2 * 512 * 512 + 512 * 12)


def test_medians_are_taken_by_column() -> None:
    assert medians([{"a": 1, "b": 9}, {"a": 5, "b": 7}, {"a": 2, "b": 8}]) == {"a": 2, "b": 8}


def test_measuring_a_limit_leaves_the_number_of_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert min(ProductLimit(40, "bfloat16").rates(repeats=1).values()) > 0
    assert torch.get_num_threads() == threads


# --- memory -----------------------------------------------------------------------------------------------------------

HOLDS = "import time; held = b'x' * (64 << 20); time.sleep(0.5)"


@pytest.mark.parametrize("descends", [False, True])
def test_the_peak_is_that_of_the_process_and_its_children_whoever_started_it(descends: bool) -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}])"
    with (
        subprocess.Popen([sys.executable, "-c", parent if descends else HOLDS]) as process,
        PeakMemory(process.pid) as memory,
    ):
        process.wait()
    assert 64 << 20 < memory.peak < 130 << 20  # this process, with torch, has more


def test_a_process_that_is_gone_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert proportional_bytes(process.pid) == peak_bytes(process.pid) == 0
    assert descendants(process.pid) == [process.pid]
    assert os.getpid() in descendants(os.getppid())


# --- against others ---------------------------------------------------------------------------------------------------


def test_a_contender_times_what_it_is_told_to_and_ends_with_its_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["2\n", "1\n", ""])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines))
    iterations: list[None] = []
    with pytest.raises(SystemExit):
        Turns().run(lambda: iterations.append(None))
    assert len(iterations) == 3
    assert [line.count(",") for line in capsys.readouterr().out.splitlines()] == [1, 0]


def test_contenders_choose_themselves_how_they_use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert not any(name.startswith("OMP_") for name in environment())
    assert environment()["PYTHONPATH"] == os.pathsep.join([str(SCRIPTS), "/mine"])


def run(who: str, num_envs: int, steps_per_s: float, vector: str = "native") -> dict[str, object]:
    settings = {"task": "hopper", "vector": vector, "threads": None, "memory_bytes": 1 << 20}
    return {**settings, "who": who, "num_envs": num_envs, "steps_per_s": steps_per_s}


COMPILED = [run("ours", count, rate, "native, compiled") for count, rate in ((1, 4.0), (8, 12.0), (4, 10.0))]


def test_the_final_has_each_sides_fastest_and_its_fastest_single_environment() -> None:
    trial = [run("ours", 1, 2.0), run("ours", 8, 9.0), run("ours", 4, 8.0), run("sb3", 1, 3.0), run("sb3", 1, 7.0)]
    trial += [run("sb3", 2, 4.0), run("sb3", 4, 5.0), *COMPILED]
    chosen = [(one["who"], one["num_envs"], one["steps_per_s"]) for one in comparison.finalists(trial)]
    theirs, eager = [("sb3", 1, 7.0), ("sb3", 4, 5.0)], [("ours", 8, 9.0), ("ours", 4, 8.0), ("ours", 1, 2.0)]
    assert chosen == [*theirs, *eager, ("ours", 8, 12.0), ("ours", 4, 10.0), ("ours", 1, 4.0)]


def test_ratios_are_ours_to_theirs_at_each_ones_best() -> None:
    final = [run("ours", 8, 9.0), run("ours", 1, 2.0), run("sb3", 4, 3.0), run("sb3", 1, 4.0), *COMPILED]
    assert {name: pair["ratio"] for name, pair in comparison.ratios(final).items()} == {
        "native, best": 9 / 4,
        "native, single": 1 / 2,
        "native, compiled, best": 3,
        "native, compiled, single": 1,
    }


def test_both_sides_are_tried_with_the_same_numbers_of_environments() -> None:
    ways = comparison.ways("sb3", "halfcheetah", Options(quick=True))
    assert {one["env_id"] for one in ways} == {"HalfCheetah-v5"}
    ours = [("native", None), ("native, compiled", None)]
    dummy, subproc = ([(vector, threads) for threads in (None, 1)] for vector in ("dummy", "subproc"))
    assert [(one["who"], one["num_envs"], one["vector"], one["threads"]) for one in ways] == [
        *(("ours", 1, *way) for way in ours),
        *(("sb3", 1, *way) for way in dummy),
        *(("ours", 4, *way) for way in ours),
        *(("sb3", 4, *way) for way in (*dummy, *subproc)),
    ]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_shows_seconds_fractions_and_ratios() -> None:
    phases = {"environment": 2.0, "advantages": 0.5}
    whole = {"total_s": 2.5, "env_steps": 1000.0, "env_steps_per_s": 400.0}
    iteration = {"seconds": phases, "whole": whole, "fractions": {"environment": 0.75}, "turns": 3}
    section = {"threads": 2, "memory_bytes": 300 << 20, "seconds": 9.0}
    pair = {"ours": run("ours", 8, 9000.0), "theirs": run("sb3", 1, 4500.0), "ratio": 2.0}
    text = markdown(
        {
            "machine": {
                "date": "today",
                "cpu": "a CPU",
                "cores": 2,
                "memory_gib": 4,
                "load_at_start": 0.1,
                "versions": {"torch": "2"},
            },
            "options": {"quick": True},
            "sections": {"hopper": {**section, "result": {"float32": iteration, "bfloat16": iteration}}},
            "against": {"sb3": {"hopper": {"native, best": pair, "native, single": pair}}},
        }
    )
    assert "| environment | 2.00 s | 75% | 2.00 s | 75% |" in text
    assert "| advantages | 0.50 s |  | 0.50 s |  |" in text
    assert "| environment steps/s | 400 |  | 400 |  |" in text
    assert "| hopper, one environment | 9,000 (8 native, 1 MiB) | 4,500 (1 native, 1 MiB) | 2.00 |" in text
    assert "| hopper | 300 MiB |" in text
    assert "these numbers mean nothing" in text
