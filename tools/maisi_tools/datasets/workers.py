"""The same work on many cases, in one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from maisi_tools.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, desc: str, unit: str = "case"
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in the order of the items, with a progress bar.

    Args:
        function: picklable where there are workers, such as a function of a module or a partial of one.
        items: what to work on.
        workers: processes; 0 works in this one.
        desc, unit: for the progress bar.

    Raises:
        InputError: workers is no whole number from 0 on.
        What the function raises, as soon as its item's turn comes; the items that have not begun are dropped.
    """
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise InputError(f"workers is {workers!r}; allowed is a whole number of processes, 0 for none beside this one")
    bar: Any = tqdm(total=len(items), desc=desc, unit=unit, delay=2)
    with bar:
        if workers == 0:
            for item in items:
                yield function(item)
                bar.update()
            return
        # Not forked: torch's threads do not survive that. One thread each: more would wait for one another.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
