"""What an archive says to us: what it takes, and why it takes nothing."""

from __future__ import annotations

import ssl

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, SegmentationStorage
from pynetdicom import AE, evt

from maisi_tools.service.association import ArchiveAway, ArchiveRefuses
from maisi_tools.service.chain import check_reachable, send
from maisi_tools.service.settings import Node

BOTH = (CTImageStorage, SegmentationStorage)


@pytest.fixture
def archive(free_port):
    """``archive(classes, syntax, tls)`` starts one; returns its port and the SOP classes of what it stores."""
    started = []

    def start(classes=BOTH, syntax=ExplicitVRLittleEndian, tls=None):
        ae, port, stored = AE("PACS"), free_port(), []
        ae.require_called_aet = True
        for one in classes:
            ae.add_supported_context(one, syntax)

        def store(event) -> int:
            stored.append(event.dataset.SOPClassUID)
            return 0

        handlers = [(evt.EVT_C_STORE, store)]
        started.append(ae.start_server(("127.0.0.1", port), False, evt_handlers=handlers, ssl_context=tls))
        return port, stored

    yield start
    for one in started:
        one.shutdown()


@pytest.fixture
def result(tmp_path):
    """Files of a CT and a segmentation, in Explicit VR as ours are."""
    files = []
    for kind in BOTH:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = kind, f"1.2.{len(files)}", "P"
        files.append(tmp_path / f"{len(files)}.dcm")
        ds.save_as(files[-1], enforce_file_format=True)
    return files


def test_an_archive_that_speaks_the_default_transfer_syntax_alone_gets_results(archive, result):
    port, stored = archive(syntax=ImplicitVRLittleEndian)
    node = Node("PACS", "127.0.0.1", port)
    check_reachable(node, "MAISI", BOTH)
    send(result, node, "MAISI")
    assert stored == list(BOTH)


def test_an_archive_that_does_not_take_all_kinds_gets_none(archive, result):
    port, stored = archive([CTImageStorage])
    node = Node("PACS", "127.0.0.1", port)
    check_reachable(node, "MAISI", [CTImageStorage])
    words = r"PACS at 127.0.0.1:\d+ does not take Segmentation Storage \(Abstract Syntax Not Supported\); let it"
    with pytest.raises(ArchiveRefuses, match=words):
        send(result, node, "MAISI")
    for kinds in (BOTH, [SegmentationStorage]):  # some of them, all of them
        with pytest.raises(ArchiveRefuses, match=words):
            check_reachable(node, "MAISI", kinds)
    assert not stored


def test_an_archive_that_is_away_is_said_to_be_so_with_the_reason(archive, free_port):
    port, _ = archive()
    for node, words in (
        (Node("OTHER", "127.0.0.1", port), r"refuses us, MAISI: Called AE title not recognised \(Rejected Permanent"),
        (Node("PACS", "127.0.0.1", free_port()), "cannot be reached .*refused"),
        (Node("PACS", "nowhere.invalid", port), "cannot be reached"),
    ):
        with pytest.raises(ArchiveAway, match=words):
            check_reachable(node, "MAISI", BOTH)


def test_tls_with_an_authority_and_a_certificate_of_ones_own(archive, pem_files):
    authority, pair = {"authority": pem_files["certificate"]}, pem_files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair["certificate"], pair["key"])
    port, _ = archive(tls=context)
    check_reachable(Node("PACS", "127.0.0.1", port, True, **authority), "MAISI", BOTH)
    with pytest.raises(ArchiveAway, match=r"in TLS \(.*certificate verify failed.*authority is the file"):
        check_reachable(Node("PACS", "127.0.0.1", port, True), "MAISI", BOTH)
    context.load_verify_locations(pair["certificate"])
    context.verify_mode = ssl.CERT_REQUIRED
    check_reachable(Node("PACS", "127.0.0.1", port, True, **authority, **pair), "MAISI", BOTH)
    with pytest.raises(ArchiveAway, match="may want a certificate of ours"):
        check_reachable(Node("PACS", "127.0.0.1", port, True, **authority), "MAISI", BOTH)
