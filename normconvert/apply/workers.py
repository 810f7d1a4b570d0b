"""Threads that work on tensors: a few, each with one of torch's own, since blocks are too small to share out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

WORKERS = 2  # each holds one tensor: more would need more memory, and a disk is busy with two


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks are too small to share out: threads would only wait for each other (measured: 10 x slower when busy)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(makes: Iterable[Callable[[], T]], workers: int = WORKERS) -> Iterator[T]:
    """What each function gives, without gradients, in their order; as many as there are ``workers`` run at a time.

    No more than that many results wait to be taken. What a function raises is raised when its turn comes.
    """
    waiting: deque[Future[T]] = deque()
    count = min(workers, os.cpu_count() or 1)

    def without_gradients(make: Callable[[], T]) -> T:
        with torch.no_grad():  # torch keeps it by thread
            return make()

    pool = ThreadPoolExecutor(count, "normconvert-worker", torch.set_num_threads, (1,))
    with one_thread():
        try:
            for make in makes:
                waiting.append(pool.submit(without_gradients, make))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # After an error, or if nobody takes the rest: what has not begun never does.
            pool.shutdown(cancel_futures=True)


__all__ = ["WORKERS", "in_order", "one_thread"]
