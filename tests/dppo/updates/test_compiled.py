"""The compiled step against the one that is not.

Most tests trace the step and then run it operation by operation: that takes no C++ compiler, and little time. One of
`test_first_order` compiles in earnest.
"""

import functools

import pytest
import torch
from torch import Tensor, nn

from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.compiled import CompiledStep
from dppo.updates.faults import MOST_SKIPPED, NotFiniteError
from dppo.updates.first_order_config import PPOKLConfig, PPOMaskConfig
from dppo.updates.gradient import GradientStep
from dppo.updates.objective import Objective, Outcome, Rows, as_it_is
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.step import make_step
from policies import UserError

Data = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


class Regression:
    """Least squares with a small network; what is known of a row is its error, and its first input."""

    def __init__(self, *, prepare=as_it_is, allow=None, **settings) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
        self.optimizer = FlatAdamW(self.network.parameters(), **{"learning_rate": 0.1, "what": "test", **settings})
        self.objective: Objective[Data] = Objective(self.network, self.rows, prepare, allow)

    def rows(self, data: Data) -> Rows:
        return (self.network(data[0]) - data[1]).square().squeeze(1), data[0][:, 0]


def data(rows: int, seed: int = 0, scale: float = 1.0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), scale * torch.randn(rows, 1, generator=generator)


def both(**settings) -> tuple[Regression, CompiledStep[Data], Regression, GradientStep[Data]]:
    ours, theirs = Regression(**settings), Regression(**settings)
    compiled = CompiledStep(ours.objective, ours.optimizer)
    return ours, compiled, theirs, GradientStep(theirs.objective, theirs.optimizer, threads=1)


def state(task: Regression) -> list[Tensor]:
    return [tensor.clone() for tensor in (task.optimizer.parameters.values, *task.optimizer.moments)]


def centred(data: Data) -> Data:
    return data[0], data[1] - data[1].mean()


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 100.0, "weight_decay": 0.1}, {"prepare": centred}],
    ids=["plain", "short", "decaying", "prepared"],
)
def test_steps_are_those_that_are_not_compiled(settings):
    ours, compiled, theirs, step = both(**settings)
    start = ours.optimizer.parameters.values.clone()
    for turn, rows in enumerate([7, 6, 7, 20, 2]):
        ours.optimizer.learning_rate = theirs.optimizer.learning_rate = 0.02 / (1 + turn)
        minibatch = data(rows, seed=turn, scale=10.0 ** (turn % 3))
        (found, taken), (expected, _) = compiled(minibatch), step(minibatch)
        assert taken is Outcome.TAKEN
        assert [column.shape for column in found] == [(rows,), (rows,)]
        assert not any(column.requires_grad for column in found)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state(ours), state(theirs), rtol=1e-4, atol=1e-5)
    assert (ours.optimizer.parameters.values - start).abs().min() > 1e-4
    assert ours.optimizer.moments[2] == 5


def test_what_is_compiled_and_what_is_not_share_the_moments():
    """So steps of both kinds can follow each other, and a saved state is that of AdamW."""
    ours, compiled, theirs, step = both()
    eager = GradientStep(ours.objective, ours.optimizer, threads=1)
    for turn, one in enumerate([eager, compiled, eager, compiled]):
        one(data(8, seed=turn))
        step(data(8, seed=turn))
        torch.testing.assert_close(state(ours), state(theirs), rtol=1e-4, atol=1e-5)
    saved = ours.optimizer.state_dict()
    assert torch.equal(saved["exp_avg"], ours.optimizer.moments[0])


def test_a_minibatch_of_one_row_is_not_taken_for_one_of_many():
    """A deviation of one value is not a number, and is guarded against by a look at the shape."""

    def scaled(data: Data) -> Data:
        return data if len(data[0]) == 1 else (data[0], data[1] / data[1].std())

    _, compiled, theirs, step = both(prepare=scaled)
    for rows in (5, 4, 1, 5):
        (errors, _), _ = compiled(data(rows, seed=rows))
        expected = theirs.rows(scaled(data(rows, seed=rows)))[0].detach()
        step(data(rows, seed=rows))
        torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1e-6, 1e6])
def test_a_step_that_is_not_allowed_is_not_taken(limit):
    ours, compiled, _, _ = both(allow=lambda rows: rows[0].mean() < limit)
    before = state(ours)
    (errors, _), taken = compiled(data(8))
    assert taken is (Outcome.TAKEN if limit > 1 else Outcome.REFUSED)
    assert errors.shape == (8,)
    assert all(torch.equal(new, old) for new, old in zip(state(ours), before, strict=True)) == (limit < 1)


def test_a_loss_that_is_not_finite_is_skipped_as_it_is_without_compiling():
    ours, compiled, theirs, step = both(max_grad_norm=0.5, weight_decay=0.1)
    compiled(data(8)), step(data(8))
    before = state(ours)
    for skipped in (compiled(data(8, scale=torch.inf)), step(data(8, scale=torch.inf))):
        assert skipped[1] is Outcome.SKIPPED
    assert all(torch.equal(new, old) for new, old in zip(state(ours), before, strict=True))
    compiled(data(8)), step(data(8))
    assert not torch.equal(ours.optimizer.parameters.values, before[0])
    torch.testing.assert_close(state(ours), state(theirs), rtol=1e-4, atol=1e-5)
    assert ours.optimizer.skips.since_last() == theirs.optimizer.skips.since_last() == 1


def test_a_gradient_that_is_not_finite_is_skipped():
    task = Regression(weight_decay=0.1)
    steep = Objective[Data](task.network, lambda data: ((0 * task.network(data[0])).abs().sqrt().squeeze(1),))
    before = state(task)
    assert CompiledStep(steep, task.optimizer)(data(8))[1] is Outcome.SKIPPED
    assert all(torch.equal(new, old) for new, old in zip(state(task), before, strict=True))


def test_after_too_many_skipped_steps_both_kinds_give_the_same_evidence():
    found = []
    for step in both()[1::2]:
        for _ in range(MOST_SKIPPED - 1):
            step(data(8, scale=torch.inf))
        with pytest.raises(
            NotFiniteError, match=r"^10 updates of the test network in a row had a loss \(inf\)"
        ) as caught:
            step(data(8, scale=torch.inf))
        found.append(caught.value.evidence)
    assert (
        found[0].keys() == found[1].keys() >= {"minibatch/1", "rows/0", "gradient_norm/0.weight", "parameters/2.bias"}
    )
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], equal_nan=True)


def test_parameters_that_were_moved_are_an_error_and_not_left_behind():
    ours, compiled, _, _ = both()
    ours.network.double().float()
    with pytest.raises(RuntimeError, match="no views of the flat tensor any more"):
        compiled(data(8))


def test_the_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        _, compiled, _, _ = both()
        compiled(data(8))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "categorical", "diffusion"])
def test_the_policy_that_sampled_is_not_compiled_in(small_policy, task_of, kind):
    found = []
    for compile in (False, True):
        config = PPOMaskConfig(epochs=2, batch_size=7, learning_rate=3e-3, max_kl=1e-5, compile=compile)
        policy = small_policy(kind, observation_scaling="running")
        size = TrainerConfig(env_steps=300, num_envs=4, rollout_steps=8)
        trainer = Trainer(policy, task_of(kind), size, config, {"type": "none"})
        found.append([trainer.iterate()["masked_fraction"] for _ in range(3)])
        trainer.close()
    eager, compiled = found
    assert all(0 < share < 1 for share in eager)
    assert compiled == pytest.approx(eager, abs=0.03)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "categorical", "diffusion"])
def test_what_changes_between_updates_is_not_compiled_in(small_policy, task_of, kind):
    """Statistics of observations, the coefficient of the KL penalty, learning rates, sizes of minibatches."""
    found = []
    for compile in (False, True):
        config = PPOKLConfig(
            epochs=2,
            batch_size=7,
            learning_rate=3e-3,
            schedule="linear",
            entropy_coefficient=0.01,
            compile=compile,
            advantage_quantiles=(0.1, 0.8),
        )
        policy = small_policy(kind, observation_scaling="running")
        size = TrainerConfig(env_steps=300, num_envs=4, rollout_steps=8)
        trainer = Trainer(policy, task_of(kind), size, config, {"type": "mlp", "hidden_dims": [8]})
        rows = [trainer.iterate() for _ in range(3)]
        found.append((policy.state_dict(), [(row["kl_penalty"], row["approx_kl"]) for row in rows]))
        trainer.close()
    (eager, metrics), (compiled, same) = found
    assert len({penalty for penalty, _ in metrics}) > 1
    assert same == [(penalty, pytest.approx(kl, rel=1e-2, abs=1e-5)) for penalty, kl in metrics]
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_steps_on_a_flow_are_not_compiled_and_the_refusal_says_so(small_policy):
    policy = small_policy("diffusion_ode")
    optimizer = FlatAdamW(policy.parameters(), learning_rate=0.1, what="test")
    with pytest.raises(UserError, match=r"a diffusion_ode policy cannot be compiled; set algo\.compile=false"):
        make_step(Objective(policy, lambda pairs: (pairs.advantages,)), optimizer, compile=True)
