"""Fisher-vector products against the explicit Hessian of the KL; conjugate gradients against a dense solve."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)
from torch.func import functional_call

from dppo.updates.fisher import FisherProduct, conjugate_gradients
from dppo.updates.flat import FlatParameters

ROWS = 7
LAWS: dict[str, tuple[int, Callable[[Tensor], Distribution]]] = {
    "normal": (4, lambda out: Independent(Normal(out[:, :2], out[:, 2:].exp()), 1)),
    "normal of fixed deviation": (2, lambda out: Independent(Normal(out, torch.full_like(out, 0.3)), 1)),
    "normal over a chunk": (6, lambda out: Independent(Normal(out.unflatten(1, (3, 2)), torch.tensor([0.1, 2.0])), 2)),
    "categorical": (4, lambda out: Categorical(logits=out)),
    "independent categoricals": (6, lambda out: Independent(Categorical(logits=out.unflatten(1, (2, 3))), 1)),
}


class Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(autouse=True)
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=LAWS)
def case(request) -> tuple[Net, Callable[[Tensor], Distribution], Tensor]:
    outputs, law = LAWS[request.param]
    return Net(outputs), law, torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))


def hessian_of_kl(net: Net, law: Callable[[Tensor], Distribution], x: Tensor) -> Tensor:
    """[P, P], of the mean KL(old || new) at new = old."""
    names, shapes = zip(*((name, value.shape) for name, value in net.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]
    flat = torch.cat([value.detach().flatten() for value in net.parameters()])
    with torch.no_grad():
        old = law(net(x))

    def mean_kl(flat: Tensor) -> Tensor:
        parts = {n: part.view(s) for n, s, part in zip(names, shapes, flat.split(sizes), strict=True)}
        return kl_divergence(old, law(functional_call(net, parts, (x,)))).mean()

    return torch.autograd.functional.hessian(mean_kl, flat)


def matrix(net: Net, law: Callable[[Tensor], Distribution], x: Tensor) -> Tensor:
    """[P, P], column by column."""
    parameters = FlatParameters(net.parameters())
    value = law(net(x)).sample()
    return torch.stack(
        [FisherProduct(law(net(x)), value, parameters)(unit) for unit in torch.eye(len(parameters))], dim=1
    )


def test_the_product_is_that_with_the_hessian_of_the_kl(case):
    net, law, x = case
    fisher = matrix(net, law, x)
    torch.testing.assert_close(fisher, hessian_of_kl(net, law, x), rtol=1e-8, atol=1e-10)
    assert fisher.abs().max() > 0.01
    assert not fisher[:2].any(), "what the law does not depend on"


def test_the_product_is_symmetric_and_positive_semidefinite(case):
    fisher = matrix(*case)
    torch.testing.assert_close(fisher, fisher.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(fisher).min() > -1e-10


def test_the_product_of_a_law_without_a_closed_form_is_that_of_its_scores():
    """And the mean over many samples is the Hessian of the KL, here of a mixture that is no mixture."""

    def mixture(out: Tensor) -> Distribution:
        parts = Independent(Normal(out[:, None].expand(-1, 2, -1), 0.5), 1)
        return MixtureSameFamily(Categorical(logits=torch.zeros(len(out), 2)), parts)

    def same(out: Tensor) -> Distribution:
        return Independent(Normal(out, torch.full_like(out, 0.5)), 1)

    net, x = Net(2), torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    parameters = FlatParameters(net.parameters())
    torch.manual_seed(1)
    many = x.repeat(4000, 1)
    value = mixture(net(many)).sample()
    vector = torch.randn(len(parameters))
    product = FisherProduct(mixture(net(many)), value, parameters)(vector)
    scores = torch.stack([parameters.gradient(mixture(net(x)).log_prob(value[:ROWS])[i]) for i in range(ROWS)])
    few = FisherProduct(mixture(net(x)), value[:ROWS], parameters)(vector)
    torch.testing.assert_close(few, scores.T @ (scores @ vector) / ROWS)
    expected = hessian_of_kl(net, same, x) @ vector
    assert torch.cosine_similarity(product, expected, dim=0) > 0.999
    assert float(product.norm()) == pytest.approx(float(expected.norm()), rel=0.03)


def test_the_result_goes_into_the_memory_that_is_given():
    net, x = Net(2), torch.randn(ROWS, 3)
    parameters, law = FlatParameters(net.parameters()), LAWS["normal of fixed deviation"][1]
    out = torch.empty(len(parameters))
    vector = torch.randn(len(parameters))
    product = FisherProduct(law(net(x)), net(x), parameters)(vector, out)
    assert product.data_ptr() == out.data_ptr()
    assert torch.equal(product, FisherProduct(law(net(x)), net(x), parameters)(vector))


def test_kept_graphs_give_the_same_products_again_and_again(case):
    net, law, x = case
    parameters, value = FlatParameters(net.parameters()), law(net(x)).sample()
    kept = FisherProduct(law(net(x)), value, parameters)
    for vector in torch.randn(3, len(parameters)):
        assert torch.equal(kept(vector), FisherProduct(law(net(x)), value, parameters)(vector))


# --- conjugate gradients


def system(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(size, size, generator=generator)
    return root @ root.T + 0.1 * torch.eye(size), torch.randn(size, generator=generator)


def test_the_solution_is_that_of_a_dense_solve():
    a, b = system()
    solution = conjugate_gradients(lambda v: a @ v, b, iterations=100, tolerance=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    assert solution.quadratic == pytest.approx(float(solution.x @ a @ solution.x), rel=1e-9)
    assert solution.residual < 1e-11


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_an_unfinished_solution_says_how_far_it_came(iterations):
    a, b = system()
    solution = conjugate_gradients(lambda v: a @ v, b, iterations=iterations, tolerance=0.0)
    assert solution.iterations == iterations
    assert solution.residual == pytest.approx(float((b - a @ solution.x).norm() / b.norm()), rel=1e-6)
    assert solution.quadratic == pytest.approx(float(solution.x @ a @ solution.x), rel=1e-9)


def test_it_stops_at_the_tolerance():
    a, b = system()
    exact = conjugate_gradients(lambda v: a @ v, b, iterations=100, tolerance=1e-12)
    loose = conjugate_gradients(lambda v: a @ v, b, iterations=100, tolerance=0.05)
    assert loose.residual <= 0.05
    assert loose.iterations < exact.iterations


def test_a_product_that_reuses_its_memory_does_no_harm():
    a, b = system()
    memory = torch.empty_like(b)
    solution = conjugate_gradients(lambda v: torch.mv(a, v, out=memory), b, iterations=100, tolerance=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)


def test_no_right_side_needs_no_product():
    solution = conjugate_gradients(lambda v: v / 0, torch.zeros(3), iterations=5, tolerance=1e-5)
    assert solution.x.tolist() == [0, 0, 0]
    assert (solution.quadratic, solution.iterations) == (0, 0)


def test_a_direction_without_curvature_ends_it():
    a = torch.diag(torch.tensor([1.0, 0.0]))
    solution = conjugate_gradients(lambda v: a @ v, torch.tensor([0.0, 1.0]), iterations=5, tolerance=1e-5)
    assert solution.x.isfinite().all()
    assert solution.quadratic == 0


@pytest.mark.parametrize(("b", "product"), [(1.0, math.nan), (math.nan, 1.0)])
def test_what_is_not_a_number_is_not_taken_for_the_end_of_the_search(b, product):
    solution = conjugate_gradients(lambda v: v * product, torch.full((3,), b), iterations=5, tolerance=1e-5)
    assert math.isnan(solution.quadratic)
