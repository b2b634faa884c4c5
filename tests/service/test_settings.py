from __future__ import annotations

import pytest

from maisi_tools.errors import InputError
from maisi_tools.service.settings import read_settings


def test_settings_are_read(write_settings, tmp_path, repo_root):
    path, _ = write_settings(4242, poll={"url": "http://127.0.0.1/dicom-web", "user": "me"})
    settings = read_settings(path)
    assert settings.spool == str(tmp_path / "spool") and settings.send.port == 4242
    assert settings.chain("SEG").steps[0].config == "inference.json" and settings.chain("CT") is None
    assert settings.poll.password_variable == "MAISI_DICOMWEB_PASSWORD"


STEP = {"bundle": "bundles/maisi_vae"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"listen": None}, "neither listen nor poll"),
        ({"listen": None, "query": {"ae_title": "A", "host": "h", "port": 104}}, "neither listen nor poll"),
        ({"listen": None, "poll": {"url": "u"}, "query": {"ae_title": "A", "host": "h", "port": 104}}, "needs listen"),
        ({"query": {"ae_title": "A", "host": "h"}}, "query.port"),
        ({"query": {"ae_title": "A", "host": "h", "port": 104, "days": -1}}, "query.days"),
        ({"listen": {"port": 104}}, "allowed is empty"),
        ({"listen": {"prot": 104}}, "prot; allowed are"),
        ({"send": {"ae_title": "A" * 17, "host": "h", "port": 1}}, "1 to 16 characters"),
        ({"send": {"ae_title": "A", "host": "h", "port": 70000}}, "70000"),
        ({"chains": []}, "nothing"),
        ({"chains": [{"when": "MR", "steps": [STEP]}]}, "SEG, RTSTRUCT, CT"),
        ({"chains": [{"when": "CT", "steps": []}]}, "no steps"),
        ({"chains": [{"when": "CT", "steps": [{"bundle": "nowhere"}]}]}, "is no bundle"),
        ({"chains": [{"when": "CT", "steps": [{"config": "a"}]}]}, "no bundle"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_settings_are_refused(write_settings, change, words):
    path, _ = write_settings(4242, **change)
    with pytest.raises(InputError, match=words):
        read_settings(path)


def test_a_certificate_that_is_none_is_refused(write_settings, tmp_path):
    listen = {"port": 1, "allowed": [{"ae_title": "A", "host": "127.0.0.1"}], "certificate": "none.pem"}
    path, _ = write_settings(4242, listen=listen)
    with pytest.raises(InputError, match=r"none\.pem.*PEM"):
        read_settings(path).listen.tls()
