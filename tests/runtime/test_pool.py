"""What is kept between calls: leased to one at a time, limited by bytes, let go when memory runs out."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from fastldm.runtime.pool import Pool


@dataclass(eq=False)
class Thing:
    nbytes: int = 10


def test_the_same_thing_for_the_same_key() -> None:
    pool = Pool(100)
    with pool.lease("a", Thing) as first:
        pass
    with pool.lease("b", Thing) as other, pool.lease("a", Thing) as again:
        assert again is first
        assert other is not first
    assert (len(pool), pool.nbytes) == (2, 20)


def test_two_leases_of_a_key_are_two_things() -> None:
    pool = Pool(100)
    with pool.lease("a", Thing) as first, pool.lease("a", Thing) as second:
        assert first is not second
        assert len(pool) == 0
    assert len(pool) == 2


def test_an_error_gives_the_thing_back() -> None:
    pool = Pool(100)
    with pytest.raises(ZeroDivisionError), pool.lease("a", Thing):
        raise ZeroDivisionError
    assert len(pool) == 1


def test_the_least_recently_used_goes_first() -> None:
    pool = Pool(30)
    for key in "abcad":
        with pool.lease(key, Thing):
            pass
    made: list[str] = []

    def noted(key: str) -> Callable[[], Thing]:
        return lambda: made.append(key) or Thing()  # type: ignore[func-returns-value]

    for key in "cad":
        with pool.lease(key, noted(key)):
            pass
    assert made == []
    with pool.lease("b", noted("b")):
        pass
    assert made == ["b"]


def test_twenty_keys_in_turn_keep_memory_flat() -> None:
    pool, made = Pool(55), []

    def make() -> Thing:
        thing = Thing()
        made.append(weakref.ref(thing))
        return thing

    for k in range(200):
        with pool.lease(k % 20, make):
            assert pool.nbytes <= 55
    gc.collect()
    assert sum(ref() is not None for ref in made) == len(pool) == 5
    assert len(made) == 200
    pool.clear()
    assert sum(ref() is not None for ref in made) == 0


def test_a_thing_beyond_the_limit_is_not_kept_and_drops_no_other() -> None:
    pool = Pool(15)
    with pool.lease("a", Thing), pool.lease("large", lambda: Thing(16)):
        pass
    assert (len(pool), pool.nbytes) == (1, 10)


def test_a_limit_of_nothing_keeps_nothing() -> None:
    pool = Pool(0)
    with pool.lease("a", lambda: Thing(0)):
        pass
    assert len(pool) == 0


def test_without_memory_all_that_is_idle_goes_and_it_is_tried_again() -> None:
    pool, tries = Pool(100), []

    def make() -> Thing:
        tries.append(len(pool))
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return Thing()

    with pool.lease("a", Thing), pool.lease("b", Thing):
        pass
    with pool.lease("c", make):
        pass
    assert tries == [2, 0]


def test_a_second_lack_of_memory_is_the_callers() -> None:
    def never() -> Thing:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError), Pool(100).lease("a", never):
        pass


def test_threads_never_share() -> None:
    pool, taken, clashes = Pool(1000), set(), []

    def work() -> None:
        for _ in range(300):
            with pool.lease("a", Thing) as thing:
                if id(thing) in taken:
                    clashes.append(thing)
                taken.add(id(thing))
                taken.discard(id(thing))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not clashes
    assert 1 <= len(pool) <= 6
