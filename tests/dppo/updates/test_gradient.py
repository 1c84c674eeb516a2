import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dppo.threads import single_thread
from dppo.updates.gradient import MeanGradient
from dppo.updates.optimizer import FlatAdamW

Data = tuple[Tensor, Tensor]
ROWS = 23
SIZES = (7, 1, 10, 5)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """So that one thread can be told from what was there before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Regression:
    """Least squares with a small network; the result is each row's error."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
        self.optimizer = FlatAdamW(self.network.parameters(), learning_rate=0.1, what="test")
        self.data = torch.randn(ROWS, 3), torch.randn(ROWS, 1)
        self.seen: list[tuple[str, int]] = []

    def loss(self, inputs: Data) -> tuple[Tensor, Tensor]:
        """It also notes in which thread it is computed, and how many threads torch has in it."""
        self.seen.append((threading.current_thread().name, torch.get_num_threads()))
        errors = (self.network(inputs[0]) - inputs[1]).square().squeeze(1)
        return errors.mean(), errors.detach()

    def parts(self, *sizes: int) -> list[tuple[Data, float]]:
        columns = (column.split(list(sizes)) for column in self.data)
        return [((x, y), len(x) / ROWS) for x, y in zip(*columns, strict=True)]

    def expected(self) -> Tensor:
        with single_thread():
            return self.optimizer.gradient(self.loss(self.data)[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", [(ROWS,), SIZES, (1,) * ROWS, (20, 3)], ids=str)
def test_the_gradient_of_parts_of_unequal_sizes_is_that_of_the_whole(sizes, threads):
    task = Regression()
    gradient, _ = MeanGradient(task.loss, task.network, task.optimizer, threads=threads)(task.parts(*sizes))
    assert gradient.shape == task.optimizer.flat.shape
    torch.testing.assert_close(gradient, task.expected(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_results_come_in_the_order_of_the_parts(threads):
    task = Regression()
    parts = task.parts(*SIZES)
    _, results = MeanGradient(task.loss, task.network, task.optimizer, threads=threads)(parts)
    assert [len(result) for result in results] == list(SIZES)
    errors = (task.network(task.data[0]) - task.data[1]).square().squeeze(1)
    torch.testing.assert_close(torch.cat(results), errors.detach())


def test_the_gradient_does_not_depend_on_the_number_of_threads_to_the_last_bit():
    found = []
    for threads in (1, 3):
        task = Regression()
        mean_gradient = MeanGradient(task.loss, task.network, task.optimizer, threads=threads)
        found.append([mean_gradient(task.parts(*sizes))[0].clone() for sizes in (SIZES, (4,) * 5 + (3,))])
        names = {name for name, _ in task.seen}
        assert all(name.startswith("dppo") for name in names) == (threads == 3)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_gradient_owes_nothing_to_those_before_it(threads):
    task = Regression()
    mean_gradient = MeanGradient(task.loss, task.network, task.optimizer, threads=threads)
    for sizes in (SIZES, (20, 3), (ROWS,), (1,) * ROWS):  # fewer parts and more
        gradient, _ = mean_gradient(task.parts(*sizes))
        torch.testing.assert_close(gradient, task.expected(), rtol=1e-5, atol=1e-7)
        task.optimizer.step(gradient)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", [(ROWS,), SIZES], ids=str)
def test_each_part_is_computed_on_one_thread_and_the_threads_are_given_back(sizes, threads):
    task = Regression()
    MeanGradient(task.loss, task.network, task.optimizer, threads=threads)(task.parts(*sizes))
    assert [own for _, own in task.seen] == [1] * len(sizes)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_part_comes_through_and_the_threads_are_given_back(threads):
    task = Regression()
    mean_gradient = MeanGradient(task.loss, task.network, task.optimizer, threads=threads)
    parts = task.parts(*SIZES)
    (x, y), share = parts[2]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        mean_gradient([*parts[:2], ((x[:, :2], y), share), *parts[3:]])
    assert torch.get_num_threads() == 3
    gradient, _ = mean_gradient(parts)
    torch.testing.assert_close(gradient, task.expected(), rtol=1e-5, atol=1e-7)
