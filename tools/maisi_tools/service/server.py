"""The DICOM port: what a caller may cost us before it is known, and afterwards."""

from __future__ import annotations

import gc
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pynetdicom import evt
from pynetdicom.transport import ThreadedAssociationServer

logger = logging.getLogger(__name__)

MAX_PENDING = 64
"""Connections that have not said yet who they are; one more, and the one that has been silent longest is closed."""

PENDING_SECONDS = 10.0
"""In which a connection has to say who it is, TLS included, however slowly it talks."""

SILENT_SECONDS = 30.0
"""After which a caller from whom the rest of a message does not come is cut off."""

COLLECT_SECONDS = 30.0
"""Between collections of garbage, of which pynetdicom's server makes one every 60 requests."""

MAX_ASSOCIATIONS = 10
"""Of callers that are known, at a time."""

MAX_PDU = 1 << 20
"""Bytes of one message (PDU); we ask callers for 16 kB, and a request for an association has a few."""


class Server(ThreadedAssociationServer):
    """pynetdicom's server with limits.

    A connection is pending until its association is accepted. Pending ones do not count among the associations, so
    silent ones do not keep an archive out.

    Attributes:
        max_object: bytes that a caller may send before an object is complete.
    """

    max_object: int
    request_queue_size = 128

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lock, self._stored, self._stores = threading.Lock(), threading.Condition(), 0
        self._collected = time.monotonic()
        self._pending: dict[socket.socket, float] = {}
        super().__init__(*args, **kwargs)
        self.bind(evt.EVT_CONN_OPEN, self._opened)
        self.bind(evt.EVT_ACCEPTED, lambda event: self._settled(event.assoc.dul.socket.socket))
        self.bind(evt.EVT_CONN_CLOSE, self._forget_closed)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; TLS is spoken in its own thread, so that a silent one does not stop the others."""
        assert self.socket is not None
        connection, address = self.socket.accept()
        connection.settimeout(SILENT_SECONDS)
        if self.ssl_context:
            connection = self.ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        oldest = None
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                oldest = min(self._pending, key=lambda one: self._pending[one])
                del self._pending[oldest]
            self._pending[connection] = time.monotonic()
        if oldest is not None:
            _cut(oldest)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in its thread, from its first byte on; waiting for that, pynetdicom would poll."""
        if self.ssl_context:
            request.do_handshake()
        first = select.poll()
        first.register(request, select.POLLIN)
        if first.poll(1000 * PENDING_SECONDS):
            super().finish_request(request, client_address)
        else:
            self._settled(request)
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line that a connection failed."""
        self._settled(request)
        logger.warning("the connection of %s failed: %s", client_address[0], sys.exc_info()[1])

    def service_actions(self) -> None:
        """Cut off connections that have not said in time who they are; called twice a second."""
        if (
            time.monotonic() - self._collected > COLLECT_SECONDS
        ):  # ended associations lie in cycles, with what they read
            gc.collect()
            self._collected = time.monotonic()
        with self._lock:
            self._pending = {one: since for one, since in self._pending.items() if one.fileno() >= 0}
            late = [one for one, since in self._pending.items() if time.monotonic() - since > PENDING_SECONDS]
            for one in late:
                del self._pending[one]
        for one in late:
            _cut(one)

    def known(self) -> int:
        """Associations that were accepted."""
        return sum(one.is_established for one in self.active_associations)

    @contextmanager
    def storing(self) -> Iterator[None]:
        """While an object is stored, :meth:`close` waits."""
        with self._stored:
            self._stores += 1
        try:
            yield
        finally:
            with self._stored:
                self._stores -= 1
                self._stored.notify_all()

    def close(self, seconds: float = 10.0) -> None:
        """Take no more connections, let objects end that are being stored, and abort the associations.

        Args:
            seconds: to wait for objects.
        """
        self.shutdown()
        with self._stored:
            self._stored.wait_for(lambda: self._stores == 0, seconds)
        for one in self.active_associations:
            if one.is_established:
                one.abort()
            else:
                one.kill()

    def _opened(self, event: Any) -> None:
        """Limit what an association reads: of one message, and before an object is complete."""
        connection = event.assoc.dul.socket
        read = connection.recv
        event.assoc.received = 0

        def limited(count: int) -> bytearray:
            event.assoc.received += count
            if count > MAX_PDU or event.assoc.received > self.max_object:
                logger.warning(
                    "%s is cut off: a message of %d bytes, %d since its last object; allowed are %d and %d",
                    *(event.assoc.requestor.address, count, event.assoc.received, MAX_PDU, self.max_object),
                )
                raise OSError("too large")
            return read(count)

        connection.recv = limited

    def _settled(self, connection: Any) -> None:
        with self._lock:
            self._pending.pop(connection, None)

    def _forget_closed(self, _: Any) -> None:
        with self._lock:
            self._pending = {one: since for one, since in self._pending.items() if one.fileno() >= 0}


def _cut(connection: socket.socket) -> None:
    try:
        # The plain socket's, because that of an SSL socket waits for the other side.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:  # closed meanwhile
        pass
