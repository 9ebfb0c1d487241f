"""Which samples a run takes: the same for any number of processes, all equally often, in groups."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from localdit.training.order import Draws, Order, ProcessBatches, Resampled


@pytest.fixture
def groups():
    return np.random.default_rng().integers(0, 5, size=103)


def indices(order, steps):
    return [index for step in range(steps) for index, _ in order.step(step)]


def test_ungrouped_samples_come_once_in_each_pass_and_in_another_order_in_the_next():
    order = Order(None, 10, batch=4, seed=3)
    seen = indices(order, 10)
    passes = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert seen != indices(Order(None, 10, batch=4, seed=4), 10)


def test_positions_count_the_samples_of_the_run():
    order = Order(None, 7, batch=5, seed=0)
    assert [position for step in range(9) for _, position in order.step(step)] == list(range(45))


def test_a_batch_is_of_one_group_and_no_sample_is_left_out_or_favoured(groups):
    order = Order(groups, len(groups), batch=8, seed=1)
    steps = 400
    for step in range(steps):
        assert len({int(groups[index]) for index, _ in order.step(step)}) == 1
    counts = Counter(indices(order, steps))
    for group in np.unique(groups):
        times = [counts[int(i)] for i in np.flatnonzero(groups == group)]
        assert max(times) - min(times) <= 1  # a group is gone through evenly, over the seams of its passes
    assert set(counts) == set(range(len(groups)))
    mean = steps * 8 / len(groups)
    assert all(abs(times - mean) <= 4 for times in counts.values())  # and the groups as their sizes ask


def test_a_group_smaller_than_a_batch_has_its_turn():
    groups = np.array([0] * 50 + [1])
    counts = Counter(indices(Order(groups, 51, batch=4, seed=0), 51))  # four passes
    assert counts[50] == 4


def test_groups_alternate_instead_of_coming_one_after_the_other(groups):
    order = Order(groups, len(groups), batch=2, seed=2)
    sequence = [int(groups[order.step(step)[0][0]]) for step in range(50)]
    assert sum(a != b for a, b in itertools.pairwise(sequence)) > 20


@pytest.mark.parametrize(
    ("world", "size", "accumulation"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)]
)
@pytest.mark.parametrize("kind", [Order, Resampled])
def test_processes_and_accumulation_share_the_samples_of_a_step(groups, kind, world, size, accumulation):
    order = kind(groups, len(groups), batch=8, seed=5, shards=np.arange(103) // 9)
    steps = range(3, 9)
    ranks = [list(ProcessBatches(order, steps, size, rank, world)) for rank in range(world)]
    assert all(len(batches) == len(ProcessBatches(order, steps, size, 0, world)) for batches in ranks)
    for number, step in enumerate(steps):
        micro = [b for batches in ranks for b in batches[number * accumulation : (number + 1) * accumulation]]
        assert sorted(sample for one in micro for sample in one) == sorted(order.step(step))


def test_with_shards_few_of_them_are_open_at_a_time():
    shards = np.repeat(np.arange(20), 10)
    order = Order(None, 200, batch=10, seed=0, shards=shards, window=4)
    seen = indices(order, 20)
    assert sorted(seen) == list(range(200))
    windows = [{int(shards[i]) for i in seen[start : start + 40]} for start in range(0, 200, 40)]
    assert all(len(window) == 4 for window in windows)
    assert seen[:40] != sorted(seen[:40])
    assert windows != [
        {int(shards[i]) for i in indices(order, 40)[200:][s : s + 40]} for s in range(0, 200, 40)
    ]


def test_resampling_draws_every_sample_as_often_as_any_other_but_not_in_passes(groups):
    """Over groups and shards of unequal sizes, where shards differ in what groups they hold."""
    shards = np.sort(np.random.default_rng().integers(0, 9, size=103)) ** 2
    groups = np.sort(groups)[np.argsort(shards % 5)]
    for given in (None, shards):
        order = Resampled(groups, 103, batch=4, seed=7, shards=given, window=3)
        seen = indices(order, 2_000)
        counts = np.bincount(seen, minlength=103) / (2_000 * 4 / 103)
        assert counts.min() > 0.3
        assert counts.std() < 0.3
        assert 20 < len(set(seen[:103])) < 90  # of independent draws, 1 - 1/e of the samples


def test_a_resampled_step_is_a_function_of_the_seed_and_its_number(groups):
    options = {"count": 103, "batch": 8, "shards": np.arange(103) // 9}
    order = Resampled(groups, seed=5, **options)
    steps = [order.step(step) for step in range(40)]
    assert [Resampled(groups, seed=5, **options).step(step) for step in reversed(range(40))] == steps[::-1]
    assert indices(Resampled(groups, seed=6, **options), 40) != indices(order, 40)
    assert len({tuple(index for index, _ in step) for step in steps}) == 40
    assert [position for step in steps for _, position in step] == list(range(320))
    assert all(len({int(groups[index]) for index, _ in step}) == 1 for step in steps)


def test_resampling_too_keeps_few_shards_open_at_a_time():
    shards, groups = np.repeat(np.arange(40), 25), np.random.default_rng().integers(0, 4, size=1000)
    order = Resampled(groups, 1000, batch=10, seed=0, shards=shards, window=4)
    windows = [{int(shards[i]) for i in indices(order, 100)[at : at + 100]} for at in range(0, 1000, 100)]
    assert all(len(window) <= 4 for window in windows)
    assert len(set.union(*windows)) > 20


def test_a_batch_of_a_rare_group_is_not_made_of_the_few_that_a_window_holds():
    groups = np.zeros(1000, dtype=int)
    groups[::20] = 1  # one in each of 50 shards
    order = Resampled(groups, 1000, batch=20, seed=0, shards=np.arange(1000) // 20, window=4)
    rare = [step for step in map(order.step, range(400)) if groups[step[0][0]]]
    assert 5 < len(rare) < 40
    assert all(len({index for index, _ in step}) > 10 for step in rare)


@pytest.mark.parametrize("kind", [Order, Resampled])
def test_an_empty_set_is_an_error(kind):
    with pytest.raises(ValueError, match="the training set is empty"):
        kind(None, 0, batch=1, seed=0)


def test_a_sample_draws_the_same_numbers_in_any_company():
    cpu = torch.device("cpu")
    together, apart = Draws(7, [3, 1, 8], cpu), [Draws(7, [p], cpu) for p in (3, 1, 8)]
    for name, shape in (("normal", (2, 3)), ("uniform", ()), ("normal", (5,))):
        batch = getattr(together, name)(*shape)
        assert batch.shape == (3, *shape)
        assert torch.equal(batch, torch.cat([getattr(one, name)(*shape) for one in apart]))
    numbers = Draws(7, range(4000), cpu).normal()
    assert abs(numbers.mean()) < 0.08
    assert abs(numbers.std() - 1) < 0.06
    assert not torch.equal(numbers, Draws(8, range(4000), cpu).normal())
