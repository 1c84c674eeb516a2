import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dppo.threads import single_thread
from dppo.updates.faults import NotFiniteError
from dppo.updates.gradient import GradientStep, MeanGradient
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import FlatAdamW

Data = tuple[Tensor, Tensor]
ROWS = 23
PARTS = (1, 4, 10, 23, 50)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """So that one thread can be told from what was there before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows_per_part(monkeypatch):
    return lambda rows: monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", rows)


class Regression:
    """Least squares with a small network; what is known of a row is its error, and its first input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
        self.optimizer = FlatAdamW(self.network.parameters(), learning_rate=0.1, what="test")
        self.data = torch.randn(ROWS, 3), torch.randn(ROWS, 1)
        self.seen: list[tuple[str, int, int]] = []
        self.objective: Objective[Data] = Objective(self.network, self.rows)

    def rows(self, data: Data) -> Rows:
        """It also notes in which thread it is computed, how many threads torch has in it, and on how many rows."""
        self.seen.append((threading.current_thread().name, torch.get_num_threads(), len(data[0])))
        return (self.network(data[0]) - data[1]).square().squeeze(1), data[0][:, 0]

    def expected(self) -> Tensor:
        with single_thread():
            return self.optimizer.parameters.gradient(self.rows(self.data)[0].mean())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", PARTS)
def test_the_gradient_of_parts_is_that_of_the_whole(at_once, threads, rows_per_part):
    rows_per_part(at_once)
    task = Regression()
    gradient, _ = MeanGradient(task.objective, task.optimizer.parameters, threads=threads)(task.data)
    assert len(task.seen) == -(-ROWS // at_once)
    assert gradient.shape == task.optimizer.parameters.values.shape
    torch.testing.assert_close(gradient, task.expected(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", PARTS)
def test_what_is_known_of_the_rows_comes_in_their_order_and_without_a_graph(at_once, threads, rows_per_part):
    rows_per_part(at_once)
    task = Regression()
    (errors, inputs), taken = GradientStep(task.objective, task.optimizer, threads=threads)(task.data)
    assert taken
    assert not errors.requires_grad
    fresh = Regression()
    torch.testing.assert_close(errors, fresh.rows(fresh.data)[0].detach())
    assert torch.equal(inputs, task.data[0][:, 0])


def test_the_gradient_does_not_depend_on_the_number_of_threads_to_the_last_bit(rows_per_part):
    found = []
    for threads in (1, 3):
        task = Regression()
        mean_gradient = MeanGradient(task.objective, task.optimizer.parameters, threads=threads)
        gradients = []
        for at_once in (4, 10):
            rows_per_part(at_once)
            gradients.append(mean_gradient(task.data)[0].clone())
        found.append(gradients)
        assert all(name.startswith("dppo") for name, *_ in task.seen) == (threads == 3)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_owes_nothing_to_the_gradients_before_it(threads, rows_per_part):
    task = Regression()
    mean_gradient = MeanGradient(task.objective, task.optimizer.parameters, threads=threads)
    step = GradientStep(task.objective, task.optimizer, threads=threads)
    for at_once in PARTS:  # more parts, and fewer
        rows_per_part(at_once)
        torch.testing.assert_close(mean_gradient(task.data)[0], task.expected(), rtol=1e-5, atol=1e-7)
        before = task.optimizer.parameters.values.clone()
        step(task.data)
        assert not torch.equal(task.optimizer.parameters.values, before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", [ROWS, 7])
def test_each_part_is_computed_on_one_thread_and_the_threads_are_given_back(at_once, threads, rows_per_part):
    rows_per_part(at_once)
    task = Regression()
    GradientStep(task.objective, task.optimizer, threads=threads)(task.data)
    assert [own for _, own, _ in task.seen] == [1] * len(task.seen)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_part_comes_through_and_the_threads_are_given_back(threads, rows_per_part):
    rows_per_part(10)
    task = Regression()

    def fails_on_the_last(data: Data) -> Rows:
        if len(data[0]) < 8:
            raise ZeroDivisionError("the last part")
        return task.rows(data)

    objective = Objective[Data](task.network, fails_on_the_last)
    mean_gradient = MeanGradient(objective, task.optimizer.parameters, threads=threads)
    rows_per_part(10)  # 8, 8, 7
    with pytest.raises(ZeroDivisionError, match="the last part"):
        mean_gradient(task.data)
    assert torch.get_num_threads() == 3
    rows_per_part(ROWS)
    torch.testing.assert_close(mean_gradient(task.data)[0], task.expected(), rtol=1e-5, atol=1e-7)


def test_a_minibatch_is_prepared_as_a_whole(rows_per_part):
    rows_per_part(7)
    task = Regression()

    def centred(data: Data) -> Data:
        return data[0], data[1] - data[1].mean()

    objective = Objective[Data](task.network, task.rows, prepare=centred)
    (errors, _), _ = GradientStep(objective, task.optimizer, threads=1)(task.data)
    fresh = Regression()
    torch.testing.assert_close(errors, fresh.rows(centred(fresh.data))[0].detach())


@pytest.mark.parametrize("allowed", [True, False])
def test_a_step_that_is_not_allowed_is_not_taken(allowed, rows_per_part):
    rows_per_part(7)
    task = Regression()
    before = task.optimizer.parameters.values.clone()
    looked_at = []

    def allow(rows: Rows) -> Tensor:
        looked_at.append(len(rows[0]))
        return torch.tensor(allowed)

    objective = Objective[Data](task.network, task.rows, allow=allow)
    rows, taken = GradientStep(objective, task.optimizer, threads=1)(task.data)
    assert taken is (Outcome.TAKEN if allowed else Outcome.REFUSED)
    assert looked_at == [ROWS] == [len(rows[1])]
    assert torch.equal(task.optimizer.parameters.values, before) != allowed


def test_a_loss_that_is_not_finite_is_skipped_ten_times_and_then_an_error():
    task = Regression()
    broken = task.data[0], task.data[1] * torch.inf
    step, before = GradientStep(task.objective, task.optimizer, threads=1), task.optimizer.parameters.values.clone()
    for _ in range(9):
        assert step(broken)[1] is Outcome.SKIPPED
    with pytest.raises(NotFiniteError, match=r"^10 updates of the test network in a row had a loss \(inf\)"):
        step(broken)
    assert torch.equal(task.optimizer.parameters.values, before)
