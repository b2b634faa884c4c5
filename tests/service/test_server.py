"""The DICOM port against callers that say nothing, too much, or what they should not."""

from __future__ import annotations

import socket
import ssl
import threading
import time

import pytest

pytest.importorskip("pynetdicom", reason="needs the extra 'dicom'")

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE

from maisi_tools.errors import InputError
from maisi_tools.service import server as server_module
from maisi_tools.service.receive import CANNOT_UNDERSTAND, REFUSED, _addresses, start_receiver
from maisi_tools.service.server import MAX_ASSOCIATIONS, MAX_PENDING
from maisi_tools.service.settings import Listen, Node
from maisi_tools.service.troubles import Troubles

KIND = SecondaryCaptureImageStorage


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
        return True
    except OSError:
        return False


class Receiver:
    def __init__(self, folder, port: int, **settings) -> None:
        self.port, self.incoming, self.troubles = port, folder / "incoming", Troubles()
        self.incoming.mkdir()
        usual = {"host": "127.0.0.1", "allowed": (Node("ARCHIVE", "127.0.0.1"),)}
        self.server = start_receiver(Listen(port=port, **usual | settings), self.incoming, self.troubles)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def associate(self, title: str = "ARCHIVE", tls=None, syntax=ExplicitVRLittleEndian, host: str = "127.0.0.1"):
        ae = AE(title)
        ae.add_requested_context(KIND, syntax)
        return ae.associate(host, self.port, ae_title="MAISI", tls_args=tls)

    def store(self, **changes) -> int:
        """Status of a C-STORE, -1 where the connection was cut, -2 where there was none."""
        association = self.associate()
        if not association.is_established:
            return -2
        status = association.send_c_store(an_object(**changes))
        association.release() if association.is_established else association.abort()
        return status.Status if status else -1


def an_object(**changes) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = KIND, "1.2.3"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = "1.2", "1.2.1", "OT"
    for keyword, value in changes.items():
        if keyword == "PixelData":
            ds.add_new("PixelData", "OB", value)
        else:
            ds[keyword]._value = value  # past pydicom's own checks
    return ds


@pytest.fixture
def receive(tmp_path, free_port):
    """``receive(**settings)`` starts a receiver that knows ARCHIVE."""
    started = []

    def start(**settings):
        started.append(Receiver(tmp_path, free_port(), **settings))
        return started[-1]

    yield start
    for one in started:
        one.server.close(2.0)


def is_cut(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side closes the connection in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def test_silent_callers_do_not_keep_the_archive_out(receive, monkeypatch):
    monkeypatch.setattr(server_module, "PENDING_SECONDS", 4.0)
    receiver = receive()
    silent = [receiver.connect() for _ in range(MAX_PENDING + 20)]
    start = time.monotonic()
    assert receiver.store() == 0 and time.monotonic() - start < 3
    assert all(is_cut(one, 10) for one in silent) and time.monotonic() - start < 10
    assert receiver.server.active_associations == [] or receiver.server.known() == 0


def test_a_caller_that_trickles_is_cut_off_in_time(receive, monkeypatch):
    monkeypatch.setattr(server_module, "PENDING_SECONDS", 1.5)
    receiver = receive()
    connection, start = receiver.connect(), time.monotonic()
    try:
        for byte in b"\1\0\0\0\2\0" + b"\0" * 100:
            connection.send(bytes([byte]))
            time.sleep(0.1)
    except OSError:
        pass
    assert time.monotonic() - start < 5 and receiver.store() == 0


def test_a_request_of_300_megabytes_is_not_read(receive, caplog):
    receiver = receive()
    connection = receiver.connect()
    connection.sendall(b"\1\0" + (300_000_000).to_bytes(4, "big") + b"\0" * 1000)
    assert is_cut(connection, 5)
    assert "a message of 300000000 bytes" in caplog.text and receiver.store() == 0


def test_an_object_beyond_the_limit_is_cut_off(receive):
    receiver = receive(max_megabytes=2)
    assert receiver.store(PixelData=b"\0" * 1_000_000) == 0
    assert receiver.store(SOPInstanceUID="1.2.4", PixelData=b"\0" * 3_000_000) == -1
    association = receiver.associate()  # the limit is that of one object, not of an association
    for number in range(5):
        ds = an_object(SOPInstanceUID=f"1.2.5.{number}", PixelData=b"\0" * 1_000_000)
        assert association.send_c_store(ds).Status == 0
    association.release()
    names = sorted(path.name for path in receiver.incoming.rglob("*.dcm"))
    assert names == ["1.2.3.dcm", *(f"1.2.5.{number}.dcm" for number in range(5))]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *(("StudyInstanceUID", value) for value in ("..", "../../../x", "/tmp/x", "1" * 300, "1.2\0.3", "")),
        *(("SeriesInstanceUID", value) for value in ("../../../x", "/tmp/x", "1" * 300, "")),
        *(("SOPInstanceUID", value) for value in ("..", "../../../x", "/tmp/x")),  # others pynetdicom does not send
    ],
)
def test_names_from_outside_become_no_paths(receive, tmp_path, keyword, value):
    receiver = receive()
    assert receiver.store(**{keyword: value}) == CANNOT_UNDERSTAND
    assert [path.name for path in tmp_path.rglob("*")] == ["incoming"]
    assert receiver.store() == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.dcm")] == ["incoming/1.2/1.2.3.dcm"]


def test_a_full_disk_refuses_objects_and_is_counted(receive):
    receiver = receive(min_free_gigabytes=1e6)
    assert receiver.store() == REFUSED and "GB are free" in receiver.troubles.recent()["store"]
    assert not list(receiver.incoming.iterdir())


def test_deflated_objects_and_strangers_are_not_accepted(receive):
    receiver = receive()
    stranger = receiver.associate("STRANGER")
    assert not stranger.is_established
    deflated = receiver.associate(syntax=DeflatedExplicitVRLittleEndian)
    assert not deflated.accepted_contexts
    deflated.abort()


def test_hosts_have_addresses_of_either_family(receive):
    """However they are written; an unknown host is refused in words."""
    assert _addresses("fd00:0::0005") == {"fd00::5"} and _addresses("::ffff:10.0.0.5") == {"10.0.0.5"}
    with pytest.raises(InputError, match=r"has the host nowhere\.invalid, which has no address"):
        receive(allowed=(Node("ARCHIVE", "nowhere.invalid"),))


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_a_port_that_is_open_to_both_families_knows_callers_of_both(receive):
    receiver = receive(host="::", allowed=(Node("FOUR", "127.0.0.1"), Node("SIX", "::1")))
    for title, host, known in (
        ("FOUR", "127.0.0.1", True),
        ("SIX", "::1", True),
        ("FOUR", "::1", False),
        ("SIX", "127.0.0.1", False),
    ):
        association = receiver.associate(title, host=host)
        assert association.is_established == known, (title, host)
        association.release()


def test_more_associations_than_allowed_are_turned_away_and_the_others_go_on(receive):
    receiver = receive()
    opened = [receiver.associate() for _ in range(MAX_ASSOCIATIONS)]
    assert all(one.is_established for one in opened)
    assert receiver.store() == -2
    assert opened[0].send_c_store(an_object()).Status == 0
    opened[0].release()
    deadline = time.monotonic() + 5
    while receiver.store() != 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for one in opened[1:]:
        one.abort()


def test_a_caller_that_does_not_speak_tls_stops_no_other(receive, pem_files):
    receiver = receive(**pem_files)
    silent = [receiver.connect() for _ in range(5)]
    context = ssl.create_default_context(cafile=pem_files["certificate"])
    start = time.monotonic()
    association = receiver.associate(tls=(context, "127.0.0.1"))
    assert association.is_established and time.monotonic() - start < 3
    assert association.send_c_store(an_object()).Status == 0
    association.release()
    for one in silent:
        one.close()


def test_stopping_lets_an_object_that_is_stored_end_and_leaves_no_parts(receive, monkeypatch):
    """As at SIGTERM: a store that takes a while is acknowledged, and what it wrote is whole."""
    from maisi_tools.service import receive as receive_module

    receiver, real = receive(), receive_module.keep

    def slowly(head, incoming, write):
        def write_slowly(part):
            write(part)
            time.sleep(1.0)

        return real(head, incoming, write_slowly)

    monkeypatch.setattr(receive_module, "keep", slowly)
    association, status = receiver.associate(), []
    thread = threading.Thread(target=lambda: status.append(association.send_c_store(an_object())))
    thread.start()
    deadline = time.monotonic() + 5
    while not list(receiver.incoming.rglob(".*.dcm")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    start = time.monotonic()
    receiver.server.close(5.0)
    thread.join()
    assert 0.5 < time.monotonic() - start < 3
    assert [path.name for path in receiver.incoming.rglob("*.dcm")] == ["1.2.3.dcm"]
    receiver.server.close = lambda *_: None
