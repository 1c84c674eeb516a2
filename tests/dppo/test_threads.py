import threading
from collections.abc import Callable, Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dppo import threads as threads_module
from dppo.threads import (
    MOST_PARTS,
    PRODUCTS_PER_GRADIENT_PART,
    ROWS_PER_GRADIENT_PART,
    rows_per_part,
    sample_in_parts,
    single_thread,
)
from policies import Policy, Sample

KINDS = ("gaussian", "categorical", "diffusion")
ROWS = 11


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """So that one thread can be told from what was there before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def splitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a small policy is worth a thread for every row, and the threads are new."""
    threads_module._pool.cache_clear()
    monkeypatch.setattr(threads_module, "PRODUCTS_PER_SAMPLE_PART", 1)


def inputs(policy: Policy, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn((rows, policy.config.history, policy.config.obs_dim), generator=generator)
    return obs, policy.draw_noise(rows, generator)


def spied(policy: Policy) -> list[tuple[int, str, int]]:
    """Rows of each call of ``policy.sample``, the name of its thread, and how many threads torch had in it."""
    calls: list[tuple[int, str, int]] = []
    sample = policy.sample

    def spy(obs: Tensor, **kwargs: bool | Tensor) -> Sample:
        calls.append((len(obs), threading.current_thread().name, torch.get_num_threads()))
        return sample(obs, **kwargs)

    policy.sample = spy  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("splitting")
def test_rows_dealt_out_to_threads_are_sampled_as_together_whatever_the_number_of_threads(
    small_policy: Callable[..., Policy], kind, threads, deterministic
):
    policy = small_policy(kind)
    obs, noise = inputs(policy)
    together = policy.sample(obs, deterministic=deterministic, noise=noise)
    calls = spied(policy)
    sample = sample_in_parts(policy, obs, noise, deterministic=deterministic, threads=threads)
    for field in fields(Sample):
        ours = getattr(sample, field.name)
        torch.testing.assert_close(ours, getattr(together, field.name), rtol=1e-5, atol=1e-5, msg=field.name)
        assert not (ours.requires_grad or ours.is_inference()), "it can be learned from"
    parts = min(threads, ROWS)
    assert sorted(rows for rows, *_ in calls) == sorted(len(part) for part in obs.tensor_split(parts))
    if parts > 1:
        assert all(name.startswith("dppo") for _, name, _ in calls)
        assert {own for *_, own in calls} == {1}, "each part is computed on one thread"
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("splitting")
def test_threads_that_were_used_before_see_the_weights_as_they_are_now(small_policy):
    policy = small_policy("diffusion")
    obs, noise = inputs(policy)
    for _ in range(2):
        sample = sample_in_parts(policy, obs, noise, deterministic=False, threads=2)
        torch.testing.assert_close(sample.chain, policy.sample(obs, noise=noise).chain, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for weights in policy.parameters():
                weights.add_(0.1)


@pytest.mark.parametrize(("products", "parts"), [(1, 1), (199, 1), (200, 2), (399, 3), (400, 4), (10_000, 4)])
def test_there_are_as_many_parts_as_are_worth_a_thread(small_policy, monkeypatch, products, parts):
    monkeypatch.setattr(threads_module, "PRODUCTS_PER_SAMPLE_PART", 1000)
    policy = small_policy("gaussian")
    monkeypatch.setattr(type(policy), "products_per_sample", products)
    obs, noise = inputs(policy, 10)
    calls = spied(policy)
    sample_in_parts(policy, obs, noise, deterministic=False, threads=4)
    assert len(calls) == parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_policy_is_sampled_in_the_calling_thread(small_policy, kind):
    policy = small_policy(kind)
    obs, noise = inputs(policy, 200)
    calls = spied(policy)
    sample_in_parts(policy, obs, noise, deterministic=False, threads=8)
    assert calls == [(200, threading.current_thread().name, 3)]


@pytest.mark.parametrize(("settings", "share"), [({}, 4), ({"finetuned_steps": 1}, 4), ({"denoising_steps": 8}, 8)])
def test_the_products_of_a_diffusion_policy_are_those_of_its_whole_chain(small_policy, settings, share):
    policy = small_policy("diffusion", **settings)
    assert policy.products_per_sample == share * sum(weights.numel() for weights in policy.network.parameters())


@pytest.mark.usefixtures("splitting")
def test_an_error_in_a_part_comes_through_and_the_threads_are_given_back(small_policy):
    policy = small_policy("gaussian")
    obs, noise = inputs(policy)
    with pytest.raises(RuntimeError, match="must match the size"):
        sample_in_parts(policy, torch.cat([obs, obs], -1), noise, deterministic=False, threads=2)
    assert torch.get_num_threads() == 3


def test_a_single_thread_is_one_inside_and_what_was_before_outside_also_after_an_error():
    with pytest.raises(ZeroDivisionError), single_thread():
        assert torch.get_num_threads() == 1
        1 // 0  # noqa: B018
    assert torch.get_num_threads() == 3


# --- minibatches in parts

CPU = torch.device("cpu")
SMALL, LARGE = 2_000, 5_000_000
"""Parameters of a network that is not worth more than one thread up to `ROWS_PER_GRADIENT_PART` rows, and of one whose
minibatches are."""


@pytest.mark.parametrize("rows", [1, 100, 50_000])
def test_a_minibatch_stays_whole_off_the_cpu(rows):
    assert rows_per_part(rows, LARGE, torch.device("cuda")) == rows


@pytest.mark.parametrize("products", [0, 1, SMALL, 300_000, LARGE])
@pytest.mark.parametrize("rows", [1, 2, 7, 2499, 2500, 2501, 4999, 5001, 20_001, 123_457])
def test_a_part_never_has_more_rows_than_fit_in_the_cache_and_parts_are_about_equal(rows, products):
    size = rows_per_part(rows, products, CPU)
    assert 1 <= size <= min(rows, ROWS_PER_GRADIENT_PART)
    parts = -(-rows // size)
    assert parts <= max(MOST_PARTS, -(-rows // ROWS_PER_GRADIENT_PART))
    assert parts * size - rows < parts, "no part is much smaller than the others"


@pytest.mark.parametrize("rows", [1, 64, 1000, ROWS_PER_GRADIENT_PART])
def test_a_minibatch_of_a_small_network_is_one_part(rows):
    assert rows_per_part(rows, SMALL, CPU) == rows


@pytest.mark.parametrize(("worth", "size"), [(0.9, 240), (1.9, 240), (2, 120), (3.5, 80), (8, 30), (100, 30)])
def test_a_minibatch_has_as_many_parts_as_are_worth_a_thread(worth, size):
    assert rows_per_part(240, int(worth * PRODUCTS_PER_GRADIENT_PART / 240), CPU) == size


def test_the_size_of_a_part_does_not_depend_on_the_number_of_threads():
    sizes = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sizes.append([rows_per_part(rows, LARGE, CPU) for rows in (3, 100, 6000)])
    assert sizes[0] == sizes[1]
