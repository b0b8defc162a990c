"""harness/batches.py: the order of batches. Its loader is tested with those of vocoders and images."""

import itertools

import pytest

from harness.batches import BatchLoader, ShuffledBatches
from harness.errors import InputError


def first(batches, count):
    return list(itertools.islice(batches, count))


def test_an_epoch_has_every_item_once_but_the_incomplete_batch():
    batches = ShuffledBatches(n_items=11, batch_size=3, seed=5)
    assert batches.batches_per_epoch == 3
    order = first(batches, 9)
    for epoch in range(3):
        keys = [key for batch in order[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 9 and {key[1] for key in keys} <= set(range(11))
    assert [[i for _, i in batch] for batch in order[:3]] != [[i for _, i in batch] for batch in order[3:6]]
    assert order != first(ShuffledBatches(n_items=11, batch_size=3, seed=6), 9)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 30])
def test_a_later_start_goes_on_exactly_in_the_order(start):
    whole = first(ShuffledBatches(11, 3, seed=5), 40)
    assert first(ShuffledBatches(11, 3, seed=5, start_batch=start), 40 - start) == whole[start:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world_size):
    whole = first(ShuffledBatches(17, 8, seed=5, start_batch=1), 6)
    ranks = [first(ShuffledBatches(17, 8, 5, 1, rank, world_size), 6) for rank in range(world_size)]
    assert [[*itertools.chain(*shares)] for shares in zip(*ranks, strict=True)] == whole
    assert {len(share) for share in ranks[0]} == {8 // world_size}


def test_too_few_items_and_uneven_shares_are_refused():
    assert first(ShuffledBatches(8, 8, seed=0), 1)
    with pytest.raises(InputError, match="7 items are fewer than batch_size 8"):
        ShuffledBatches(7, 8, seed=0)
    with pytest.raises(InputError, match="batch_size 8 cannot be shared evenly by 3"):
        ShuffledBatches(20, 8, seed=0, world_size=3)


def test_more_workers_than_cores_are_no_reason_to_speak(recwarn):
    BatchLoader(list(range(4)), 2000, "words", batch_size=2)
    assert not recwarn.list
