"""A DICOM association that we open, to a node of the settings."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pynetdicom import AE
from pynetdicom.association import Association

from maisi_tools.service.settings import Node

SUCCESS = 0x0000
"""Status of every service that has done what it was asked (DICOM PS3.7 annex C)."""

STORED_WITH_WARNING = (0xB000, 0xB006, 0xB007)
"""Status of an object that is stored, an element of it coerced, or not of its kind (DICOM PS3.4 table B.2-1)."""

OUT_OF_RESOURCES = 0xA7
"""What the status of an archive that has no room now begins with (DICOM PS3.4 table B.2-1)."""

PENDING = (0xFF00, 0xFF01)
"""Status of an answer after which more will come (DICOM PS3.4 tables C.4-1 and C.4-2)."""


CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 120.0
"""In which a node has to accept an association, and to answer a request."""


class ArchiveAway(ConnectionError):
    """A node that cannot be reached or used now, and may be later."""


@contextmanager
def association(node: Node, calling: str, contexts: Iterable[tuple[str, ...]]) -> Iterator[Association]:
    """Open an association, in TLS where the node wants it, and release it afterwards.

    Args:
        node: whom to call.
        calling: our AE title.
        contexts: SOP classes, each with its transfer syntax if it is not one of pynetdicom's own.

    Raises:
        ArchiveAway: it cannot be reached, or refuses us.
    """
    ae = AE(calling)
    ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout = CONNECT_SECONDS, CONNECT_SECONDS, ANSWER_SECONDS
    for context in contexts:
        ae.add_requested_context(*context)
    tls: Any = (ssl.create_default_context(), node.host) if node.tls else None
    opened = ae.associate(node.host, node.port, ae_title=node.ae_title, tls_args=tls)
    if not opened.is_established:
        raise ArchiveAway(f"{node.ae_title} at {node.host}:{node.port} cannot be reached, or refuses us")
    try:
        yield opened
    finally:
        opened.release()
