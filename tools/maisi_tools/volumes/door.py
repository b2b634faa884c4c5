"""The check at the door: every input is read and prepared once before the first one is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm


def check_inputs(data: Sequence[Mapping[str, Any]], preprocessing: Callable[[Any], Any]) -> None:
    """Run a config's preprocessing over all inputs and drop the results.

    A file that is damaged or does not fit the weights then stops the run at once, not after hours, and nothing is left
    half written.

    Raises:
        What the preprocessing raises: for wrong input an InputError, at some depth of the exception's chain.
    """
    for item in tqdm(data, desc="checking inputs", unit="volume", delay=2):
        preprocessing(dict(item))
