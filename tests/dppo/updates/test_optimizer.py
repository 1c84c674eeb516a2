"""The flat AdamW against PyTorch's own on the separate parameters."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dppo.updates.faults import MOST_SKIPPED, NotFiniteError
from dppo.updates.optimizer import FlatAdamW
from policies import Policy


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))


def flat(parameters: Any, **settings: Any) -> FlatAdamW:
    return FlatAdamW(parameters, **{"learning_rate": 0.1, "what": "policy", **settings})


def step_of(optimizer: FlatAdamW, waiting: bool | int) -> Callable[[Tensor, Tensor], Any]:
    """Both kinds of step take a gradient and a loss."""
    return partial(optimizer.step, evidence=dict) if waiting else optimizer.step_if_finite


def content(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def loss_of(module: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
    return scale * (module(x) - y).square().mean()


def assert_views(optimizer: FlatAdamW, module: nn.Module) -> None:
    """The module's trained parameters lie end to end in the optimiser's tensor, and a change of it is theirs."""
    before = optimizer.parameters.values.clone()
    optimizer.parameters.values.data.add_(0.25)
    trained = [parameter.detach().flatten() for parameter in module.parameters() if parameter.requires_grad]
    assert torch.equal(torch.cat(trained), optimizer.parameters.values)
    storages = {parameter.untyped_storage().data_ptr() for parameter in trained}
    assert storages == {optimizer.parameters.values.untyped_storage().data_ptr()}
    optimizer.parameters.values.data.copy_(before)


# --- the step


@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_adamw_on_the_separate_parameters_with_clipped_gradients(max_grad_norm, weight_decay):
    ours, theirs = network(), network()
    optimizer = flat(ours.parameters(), learning_rate=0.01, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=weight_decay, foreach=False)
    start = content(ours)
    for step in range(6):
        rate = 0.01 / (1 + step)
        optimizer.learning_rate = reference.param_groups[0]["lr"] = rate
        scale = 10.0 ** (step % 3)  # gradients of different lengths, or clipping them would not show
        loss = loss_of(ours, step, scale)
        step_of(optimizer, step % 2)(optimizer.parameters.gradient(loss), loss.detach())
        reference.zero_grad()
        loss_of(theirs, step, scale).backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        reference.step()
    expected = content(theirs)
    for name, weight in content(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
        assert (weight - start[name]).abs().mean() > 1e-3


@pytest.mark.parametrize(("max_grad_norm", "length"), [(0.5, 0.5), (100.0, 10.0), (None, 10.0)])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_gradient_is_shortened_to_the_largest_norm_allowed(max_grad_norm, length, waiting):
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1))]
    optimizer = flat(weights, max_grad_norm=max_grad_norm)
    loss = 6 * weights[0].sum() + 8 * weights[1].sum()
    step_of(optimizer, waiting)(optimizer.parameters.gradient(loss), loss.detach())
    moments = optimizer.state_dict()
    learned = moments["exp_avg"] / 0.1
    assert learned.tolist() == pytest.approx([0.6 * length, 0.8 * length], rel=1e-4)


def test_the_learning_rate_is_that_of_the_next_step():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = flat([weight], learning_rate=1.0)
    optimizer.learning_rate = 0.3
    assert optimizer.learning_rate == 0.3
    optimizer.step_if_finite(optimizer.parameters.gradient(weight.sum()), torch.zeros(()))
    assert weight.item() == pytest.approx(-0.3)


def test_the_gradient_is_zero_for_parameters_that_the_loss_does_not_depend_on():
    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))
    optimizer = flat([unused, used])
    gradient = optimizer.parameters.gradient(used.square().sum())
    assert gradient.tolist() == [0.0, 2.0, 4.0]
    optimizer.step_if_finite(gradient, torch.zeros(()))
    assert unused.item() == 3.0
    assert used.tolist() == pytest.approx([0.9, 1.9])


def test_parameters_that_require_no_gradient_stay_where_and_what_they_are():
    module = network()
    module[2].requires_grad_(False)
    frozen = module[2].weight
    before, memory = frozen.clone(), frozen.data_ptr()
    optimizer = flat(module.parameters(), weight_decay=0.5)
    loss = loss_of(module, 0)
    optimizer.step_if_finite(optimizer.parameters.gradient(loss), loss)
    assert torch.equal(frozen, before)
    assert frozen.data_ptr() == memory
    assert len(optimizer.parameters.values) == sum(p.numel() for p in module.parameters()) - frozen.numel()


# --- errors


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.5, None])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(max_grad_norm, waiting):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = flat([weight], max_grad_norm=max_grad_norm)
    loss = weight.abs().sqrt().sum()  # 0, but its slope is not finite
    assert not step_of(optimizer, waiting)(optimizer.parameters.gradient(loss), loss.detach())
    assert weight.tolist() == [0.0, 0.0]
    assert not any(moment.any() for moment in optimizer.moments)


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was_and_the_next_step_is_taken(value, waiting):
    module = network()
    optimizer = flat(module.parameters(), what="critic", weight_decay=0.5)
    step, gradient = step_of(optimizer, waiting), torch.ones_like(optimizer.parameters.values)
    step(gradient, torch.tensor(0.0))
    before, moments = content(module), [moment.clone() for moment in optimizer.moments]
    assert not step(gradient, torch.tensor(value))
    assert all(torch.equal(value, before[name]) for name, value in content(module).items())
    assert all(torch.equal(new, old) for new, old in zip(optimizer.moments, moments, strict=True))
    assert step(gradient, torch.tensor(0.0))
    assert optimizer.moments[2] == 2


def test_skipped_steps_are_in_a_row_with_those_before_the_state_was_saved():
    def skip(optimizer: FlatAdamW) -> bool:
        gradient = torch.ones_like(optimizer.parameters.values)
        return optimizer.step(
            gradient, torch.tensor(math.nan), lambda: {"loss": gradient[0], "gradient_norm": gradient[0]}
        )

    first, second = (flat(network().parameters()) for _ in range(2))
    for _ in range(MOST_SKIPPED - 1):
        skip(first)
    second.load_state_dict(first.state_dict())
    assert second.skips.state_dict() == {"in_a_row": MOST_SKIPPED - 1, "counted": MOST_SKIPPED - 1}
    with pytest.raises(NotFiniteError, match=f"^{MOST_SKIPPED} updates of the policy network in a row"):
        skip(second)


# --- parameters as views


def test_taking_parameters_over_changes_neither_their_names_nor_shapes_nor_values():
    module, expected = network(), network()
    optimizer = flat(module.parameters())
    assert_views(optimizer, module)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert loss_of(module, 0) == loss_of(expected, 0)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in module.parameters())


def test_weights_that_are_loaded_are_those_that_learn_on():
    module = network()
    optimizer = flat(module.parameters())
    module.load_state_dict(network(seed=1).state_dict())
    assert_views(optimizer, module)
    assert loss_of(module, 0) == loss_of(network(seed=1), 0)
    before = content(module)
    loss = loss_of(module, 0)
    optimizer.step_if_finite(optimizer.parameters.gradient(loss), loss)
    assert all(not torch.equal(value, before[name]) for name, value in content(module).items())


def test_a_copy_of_the_module_learns_nothing_and_the_module_goes_on():
    module = network()
    optimizer = flat(module.parameters())
    twin = copy.deepcopy(module)
    before = content(twin)
    loss = loss_of(module, 0)
    optimizer.step_if_finite(optimizer.parameters.gradient(loss), loss)
    assert_views(optimizer, module)
    assert all(torch.equal(value, before[name]) for name, value in content(twin).items())
    with torch.no_grad():
        next(twin.parameters()).fill_(7.0)
    assert next(module.parameters()).max() < 7.0


def test_a_copy_can_be_taken_over_by_an_optimiser_of_its_own():
    module = network()
    flat(module.parameters())
    twin = copy.deepcopy(module)
    optimizer = flat(twin.parameters())
    before = content(module)
    optimizer.step_if_finite(optimizer.parameters.gradient(loss_of(twin, 0)), torch.zeros(()))
    assert_views(optimizer, twin)
    assert all(torch.equal(value, before[name]) for name, value in content(module).items())


# --- policies on disk


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
def test_a_policy_is_saved_and_loaded_after_a_step_as_it_is_then(small_policy, tmp_path, kind):
    policy = small_policy(kind)
    optimizer = flat(policy.parameters())
    before = content(policy)
    optimizer.step_if_finite(torch.ones_like(optimizer.parameters.values), torch.zeros(()))
    policy.save_pretrained(tmp_path)
    assert_views(optimizer, policy)
    saved, loaded = content(policy), content(Policy.from_pretrained(tmp_path))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())
    trained = {name for name in before if not torch.equal(before[name], loaded[name])}
    assert trained == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in stored.items()} == {name: value.shape for name, value in saved.items()}
    size = sum(value.nbytes for value in saved.values())
    assert (tmp_path / "model.safetensors").stat().st_size < size + 200 * len(saved), "each weight once"


def test_an_adjusted_policy_learns_nothing_of_the_one_it_was_made_of(small_policy):
    policy = small_policy("diffusion")
    optimizer = flat(policy.parameters())
    adjusted = policy.adjusted(executed=1)
    before = content(adjusted)
    optimizer.step_if_finite(torch.ones_like(optimizer.parameters.values), torch.zeros(()))
    assert all(torch.equal(value, before[name]) for name, value in content(adjusted).items())
    assert_views(optimizer, policy)
