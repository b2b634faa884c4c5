"""The check at the door: every input is read and prepared once before the first one is computed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

PACKAGE = "maisi_tools."


def check_inputs(data: Sequence[Mapping[str, Any]], preprocessing: Callable[[Any], Any]) -> None:
    """Run a config's preprocessing over all inputs and drop the results.

    A file that is damaged or does not fit the weights then stops the run at once, not after hours, and nothing is left
    half written. What the log says here of an input, it does not say once more when the input is computed.

    Raises:
        What the preprocessing raises: for wrong input an InputError, at some depth of the exception's chain.
    """
    _said.forget()
    with _said.listening():
        for item in tqdm(data, desc="checking inputs", unit="volume", delay=2):
            preprocessing(dict(item))
    _said.silence()


class _Said:
    """What the package's loggers said while this listened; as often as they did they can be kept from saying it."""

    def __init__(self) -> None:
        self.lines: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note each record as it is made: a handler would take the place of logging's last resort."""
        factory = logging.getLogRecordFactory()

        def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = factory(*args, **kwargs)
            if record.name.startswith(PACKAGE):
                self.lines[record.name, record.getMessage()] += 1
            return record

        logging.setLogRecordFactory(made)
        try:
            yield
        finally:
            logging.setLogRecordFactory(factory)

    def silence(self) -> None:
        for name, _ in list(self.lines):
            logging.getLogger(name).addFilter(self._is_news)

    def forget(self) -> None:
        for name, _ in list(self.lines):
            logging.getLogger(name).removeFilter(self._is_news)
        self.lines.clear()

    def _is_news(self, record: logging.LogRecord) -> bool:
        line = record.name, record.getMessage()
        left = self.lines.get(line, 0)
        if left:
            self.lines[line] = left - 1
        return not left


_said = _Said()
