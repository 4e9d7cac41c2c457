"""How processes find a name that those before them did not have. Several real ones: ``tests/distributed``."""

import threading
from datetime import timedelta

import pytest
from torch import distributed as dist

from helmholtz.training.distributed import fresh_name

SOON = timedelta(seconds=20)


def names(store, size):
    found = [None] * size
    threads = [
        threading.Thread(
            target=lambda rank=rank: found.__setitem__(rank, fresh_name(store, rank, size, SOON))
        )
        for rank in range(size)
    ]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_agree_each_time_on_another_name_whatever_the_store_holds():
    store = dist.HashStore()
    rounds = [names(store, size) for size in (3, 3, 1, 2, 4)]
    assert all(len(set(found)) == 1 for found in rounds)
    assert len({found[0] for found in rounds}) == 5


def test_a_number_that_was_left_by_a_process_that_died_is_not_taken_for_its_successor():
    store = dist.HashStore()
    store.set("asked_1", "of the dead")
    store.set("confirmed_old_1", "")
    assert len(set(names(store, 2))) == 1


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    store.set("asked_1", "of the dead")
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 did not come within 0.1 s"):
        fresh_name(store, 0, 3, timedelta(seconds=0.1))
