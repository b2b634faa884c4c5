"""A DICOM association that we open, to a node of the settings."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
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

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
"""That are offered: our results are written in the first; the second is what every node has to understand, and we to
offer (DICOM PS3.5 section 10.1)."""

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 120.0
"""In which a node has to accept an association, and to answer a request."""


class ArchiveAway(ConnectionError):
    """A node that cannot be reached or used now, and may be later."""


class ArchiveRefuses(ConnectionError):
    """A node that does not take what it is given; it may not later either."""


@contextmanager
def association(node: Node, calling: str, classes: Iterable[str]) -> Iterator[Association]:
    """Open an association, in TLS where the node wants it, and release it afterwards.

    Args:
        node: whom to call.
        calling: our AE title.
        classes: SOP classes; the node has to accept all of them.

    Raises:
        ArchiveAway: it cannot be reached, or refuses us; the reason is said.
        ArchiveRefuses: it does not accept some of the classes, which are named.
    """
    ae = AE(calling)
    ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout = CONNECT_SECONDS, CONNECT_SECONDS, ANSWER_SECONDS
    for one in sorted(set(classes)):
        ae.add_requested_context(one, SYNTAXES)
    place, connected = f"{node.ae_title} at {node.host}:{node.port}", []  # type: str, list[Any]
    tls: Any = (node.context, node.host) if node.context else None
    handlers: list[Any] = [(evt.EVT_CONN_OPEN, connected.append)]
    try:
        opened = ae.associate(node.host, node.port, ae_title=node.ae_title, tls_args=tls, evt_handlers=handlers)
    except OSError as error:  # its name has no address
        raise ArchiveAway(f"{place} cannot be reached ({error})") from error
    try:
        if refused := opened.rejected_contexts:
            named = ", ".join(f"{UID(one.abstract_syntax or '').name} ({one.status})" for one in refused)
            raise ArchiveRefuses(f"{place} does not take {named}; let it take these, in Explicit or Implicit VR")
        if not opened.is_established:
            raise ArchiveAway(f"{place} {_why(node, opened) if connected else _why_unreachable(node)}")
        yield opened
    finally:
        opened.release()


def _why(node: Node, opened: Association) -> str:
    """Why a node that was reached gives us no association."""
    if opened.is_rejected:
        answer: Any = opened.acceptor.primitive
        return f"refuses us, {opened.requestor.ae_title}: {answer.reason_str} ({answer.result_str})"
    wants = "a certificate of ours (certificate, key)" if node.tls else "TLS (tls: true)"
    return f"ended the connection, or was silent for {CONNECT_SECONDS:g} s; it may want {wants}, or be no DICOM node"


def _why_unreachable(node: Node) -> str:
    """Why a node cannot be connected to; it is tried once more, because pynetdicom keeps the reason to itself."""
    try:
        with socket.create_connection((node.host, node.port), CONNECT_SECONDS) as plain:
            if node.context:
                node.context.wrap_socket(plain, server_hostname=node.host).close()
    except ssl.SSLError as error:
        return f"cannot be reached in TLS ({error}); authority is the file of who signed its certificate"
    except OSError as error:
        return f"cannot be reached ({error})"
    return "could not be reached"
