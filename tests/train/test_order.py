"""The order of examples, and continuing from any place with any number of processes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.generate.text import TextStates
from fluxjax.train import DataSettings, ProcessShare, TrainBatch
from fluxjax.train.order import EpochOrder
from fluxjax.train.ordered import OrderedBatches

SIZES = [(32, 32)] * 9 + [(16, 64)] * 6 + [(64, 16)]
BATCH = 4
STEPS = 3 + 2 + 1
"""Batches of an epoch: the last one of each size is filled up."""


class NumberedBatches(OrderedBatches[int]):
    """Batches that hold nothing but their numbers and weights."""

    def __init__(self, share: ProcessShare, seed: int = 0, batch_size: int = BATCH):
        settings = DataSettings(threads=1, seed=seed)
        names = [f"example {number}" for number in range(len(SIZES))]
        super().__init__(settings, names, SIZES, batch_size=batch_size, share=share)

    def _load(self, number, epoch):
        return 100 * epoch + number

    def _assemble(self, elements, rows):
        assert elements == [100 * rows.epoch + number for number in rows.numbers]
        count = len(elements)
        text = TextStates(jnp.zeros((count, 1, 1)), None)
        latents = jnp.zeros((count, 1, 1))
        weight, numbers = jnp.asarray(rows.weight), jnp.asarray(rows.numbers)
        return TrainBatch(latents, text, weight, numbers, size=rows.size)

    def empty_text(self):
        raise NotImplementedError

    def broken(self):
        return ()


def open_processes(count: int, **options) -> list[NumberedBatches]:
    return [NumberedBatches(ProcessShare(index, count), **options) for index in range(count)]


def take(processes: list[NumberedBatches], steps: int) -> list[tuple]:
    """Return numbers, weights and size of some batches of all processes together."""
    found = []
    for _ in range(steps):
        batches = [next(process) for process in processes]
        assert len({batch.size for batch in batches}) == 1
        numbers = np.concatenate([batch.numbers for batch in batches]).tolist()
        weights = np.concatenate([batch.weight for batch in batches]).tolist()
        found.append((numbers, weights, batches[0].size))
    return found


def close(processes: list[NumberedBatches]) -> None:
    for process in processes:
        process.close()


def used(batches: list[tuple]) -> list[int]:
    """Return the examples that count."""
    found = []
    for numbers, weights, _ in batches:
        found += [number for number, weight in zip(numbers, weights, strict=True) if weight]
    return found


def test_each_epoch_is_a_permutation_and_they_differ():
    order = EpochOrder(SIZES, BATCH, seed=0)
    assert order.batches == STEPS
    epochs = []
    for epoch in range(3):
        plan = order.epoch(epoch)
        rows = [row[:count] for row, count in zip(plan.rows, plan.counts, strict=True)]
        epochs.append(np.concatenate(rows).tolist())
        assert plan.ends[-1] == len(SIZES)
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(SIZES)))
    assert len(set(map(tuple, epochs))) == 3


def test_batches_have_one_size_and_are_filled_with_their_own_examples():
    plan = EpochOrder(SIZES, BATCH, seed=1).epoch(5)
    for row, count in zip(plan.rows, plan.counts, strict=True):
        assert len({SIZES[number] for number in row}) == 1
        assert len(set(row[:count])) == count
        assert set(row[count:]) <= set(row[:count])


def test_the_order_depends_on_the_seed_alone():
    first, again, other = (EpochOrder(SIZES, BATCH, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.epoch(2).rows, again.epoch(2).rows)
    assert (first.epoch(2).rows != other.epoch(2).rows).any()


def test_processes_share_each_batch_and_lose_and_repeat_nothing():
    alone = open_processes(1)
    expected = take(alone, 2 * STEPS)
    close(alone)
    for epoch in (expected[:STEPS], expected[STEPS:]):
        assert sorted(used(epoch)) == list(range(len(SIZES)))
    for count in (2, 4):
        processes = open_processes(count)
        assert take(processes, 2 * STEPS) == expected
        close(processes)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2)])
def test_a_stream_continues_from_every_place_with_any_number_of_processes(before, after):
    processes, later = open_processes(before), open_processes(after)
    expected = take(processes, 2 * STEPS + 2)
    close(processes)
    processes = open_processes(before)
    for place in range(2 * STEPS + 1):
        states = [json.dumps(process.state()) for process in processes]
        assert len(set(states)) == 1
        for process in later:
            process.restore(json.loads(states[0]))
        assert take(later, 2) == expected[place : place + 2]
        take(processes, 1)
    close(processes + later)


def test_the_state_counts_the_examples_of_all_processes():
    processes = open_processes(2)
    batches = take(processes, 3)
    assert processes[1].state()["examples"] == len(used(batches))
    take(processes, 3)
    assert processes[0].state() | {"epoch": 1, "examples": 0} == processes[0].state()
    close(processes)


def test_a_place_of_other_data_or_another_batch_is_refused():
    state = open_processes(1)[0].state()
    for other, name in (
        (NumberedBatches(ProcessShare(), seed=1), "seed 0, not 1"),
        (NumberedBatches(ProcessShare(), batch_size=2), "batch_size 4, not 2"),
    ):
        with pytest.raises(ValueError, match=name):
            other.restore(state)
    with pytest.raises(ValueError, match="not the end of a batch"):
        open_processes(1)[0].restore({**state, "examples": 1})


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch of 4 can't be shared evenly by 3"):
        NumberedBatches(ProcessShare(0, 3))


def test_reports_name_examples():
    assert open_processes(1)[0].names([3, 0]) == ["example 3", "example 0"]
