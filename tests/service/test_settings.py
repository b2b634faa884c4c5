from __future__ import annotations

import pytest

from maisi_tools.errors import InputError
from maisi_tools.service.listener import Listener
from maisi_tools.service.settings import http_address, read_settings


def test_settings_are_read(write_settings, tmp_path, repo_root):
    path, _ = write_settings(4242, poll={"url": "http://127.0.0.1/dicom-web", "user": "me"})
    settings = read_settings(path)
    assert settings.spool == str(tmp_path / "spool") and settings.send.port == 4242
    assert settings.chain("SEG").steps[0].config == "inference.json" and settings.chain("CT") is None
    assert settings.poll.password_variable == "MAISI_DICOMWEB_PASSWORD"


STEP = {"bundle": "bundles/maisi_vae"}
LISTEN = {"allowed": [{"ae_title": "A", "host": "127.0.0.1"}]}
SEND = {"ae_title": "A", "host": "h", "port": 104}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"listen": None}, "neither listen nor poll"),
        ({"listen": None, "query": {"ae_title": "A", "host": "h", "port": 104}}, "neither listen nor poll"),
        (
            {"listen": None, "poll": {"url": "https://u"}, "query": {"ae_title": "A", "host": "h", "port": 104}},
            "needs listen",
        ),
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
        *[
            ({"http": http}, "http is .*127.0.0.1:8080")
            for http in ("8080", ":8080", 8080, "h:", "h:0", "h:99999", "h:x")
        ],
        ({"listen": {**LISTEN, "key": "k.pem"}}, "listen has a key alone"),
        ({"listen": {**LISTEN, "certificate": "c.pem"}}, "listen has a certificate alone"),
        ({"listen": {**LISTEN, "authority": "a.pem"}}, "listen.authority needs TLS"),
        *[({"listen": {**LISTEN, "port": port}}, "listen.port") for port in (0, 70000, "104", True, 1.5)],
        *[({"listen": {**LISTEN, "quiet_seconds": s}}, "quiet_seconds") for s in (0, -1, "10", NAN, INF, True)],
        ({"listen": {**LISTEN, "max_megabytes": 0}}, "max_megabytes"),
        ({"listen": {**LISTEN, "min_free_gigabytes": -1}}, "min_free_gigabytes"),
        ({"listen": {**LISTEN, "ae_title": "A\\B"}}, "ae_title"),
        ({"listen": {**LISTEN, "host": 5}}, "listen.host is 5"),
        ({"send": {**SEND, "tls": "no"}}, "tls is 'no'; allowed are true and false"),
        ({"send": {"ae_title": "A", "host": "h"}}, "send.port is 0"),
        (
            {"send": {**SEND, "tls": True, "key": "k.pem"}},
            "A has a key alone; allowed are certificate and key together",
        ),
        *[
            ({"send": {**SEND, **files}}, "A has an authority or a certificate without TLS.* add it")
            for files in ({"authority": "a.pem"}, {"certificate": "c.pem", "key": "k.pem"})
        ],
        ({"send": {**SEND, "host": ""}}, "host is ''"),
        *[({"attempts": attempts}, "attempts") for attempts in (0, -1, "5", 2.5, True, INF)],
        *[({"retry_seconds": seconds}, "retry_seconds") for seconds in (0, -3, "30", NAN)],
        ({"keep_hours": -1}, "keep_hours"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"poll": {"url": "https://a/b", "every_seconds": 0}}, "poll.every_seconds"),
        ({"poll": {"url": "ftp://a/b"}}, "poll.url"),
        ({"poll": {"url": "https://"}}, "poll.url"),
        ({"poll": {"url": "https://me:word@pacs/dicom-web"}}, "has a user or a password in it"),
        ({"poll": {"url": "http://pacs/dicom-web", "user": "me"}}, "without encryption.*plain_password_to: pacs"),
        ({"poll": {"url": "http://pacs/", "user": "me", "plain_password_to": "other"}}, "without encryption"),
        ({"chains": [{"when": "CT", "steps": [STEP], "keep_patient": False}]}, "shows that patient"),
        *[
            (
                {"chains": [{"when": kind, "steps": [STEP, {**STEP, "settings": given}], **patient}]},
                "takes {series}, and keep_patient: false; allowed is keep_patient: true",
            )
            for kind in ("SEG", "RTSTRUCT")
            for patient in ({}, {"keep_patient": False})
            for given in ({"input": "{series}"}, {"datalist": [{"image": "a/{series}"}]})
        ],
        ({"chains": [{"when": "SEG", "steps": [STEP], "keep_patient": "no"}]}, "keep_patient is 'no'"),
        ({"chains": [{"when": "SEG", "steps": [{**STEP, "settings": "x"}]}]}, "settings"),
        ({"chains": [{"when": "SEG", "steps": [{**STEP, "config": 3}]}]}, "config is 3"),
    ],
)
def test_wrong_settings_are_refused(write_settings, change, words):
    path, _ = write_settings(4242, **change)
    with pytest.raises(InputError, match=words):
        read_settings(path)


def test_a_certificate_that_is_none_is_refused(write_settings, tmp_path):
    files = {"certificate": "none.pem", "key": "none.pem"}
    listen = {"port": 1, "allowed": [{"ae_title": "A", "host": "127.0.0.1"}], **files}
    path, _ = write_settings(4242, listen=listen)
    with pytest.raises(InputError, match=r"none\.pem.*PEM"):
        read_settings(path).listen.tls()
    for node in ({"send": {**SEND, "tls": True, **files}}, {"query": {**SEND, "tls": True, "authority": "none.pem"}}):
        settings = read_settings(write_settings(4242, **node)[0])
        assert settings.send.certificate in (None, str(tmp_path / "none.pem"))
        with pytest.raises(InputError, match=r"none\.pem, for A, cannot be loaded.*PEM"):
            Listener(settings)
    assert not (tmp_path / "spool").exists()


def test_what_is_asked_for_by_name_is_let_through(write_settings):
    for url, more in (
        ("http://127.0.0.1:8042/dicom-web", {}),
        ("http://localhost/dicom-web", {}),
        ("http://[::1]/dicom-web", {}),
        ("https://pacs/dicom-web", {}),
        ("http://pacs/dicom-web", {"plain_password_to": "pacs"}),
    ):
        assert read_settings(write_settings(4242, poll={"url": url, "user": "me", **more})[0]).poll.url == url
    assert read_settings(write_settings(4242, poll={"url": "http://pacs/"})[0]).poll.user is None
    settings = read_settings(write_settings(4242, http="0.0.0.0:8080")[0])
    assert http_address(settings.http) == ("0.0.0.0", 8080) and http_address("[::1]:80") == ("::1", 80)


def test_a_study_is_quiet_for_a_time_without_listen_too(write_settings):
    poll = {"url": "https://pacs/", "quiet_seconds": 7.0}
    assert read_settings(write_settings(4242, listen=None, poll=poll)[0]).quiet_seconds == 7.0
    assert read_settings(write_settings(4242, listen=None, poll={"url": "https://pacs/"})[0]).quiet_seconds == 10.0
    assert read_settings(write_settings(4242, poll=poll)[0]).quiet_seconds == 7.0


def test_a_ct_keeps_its_patient_and_a_mask_does_not_unless_asked(write_settings, repo_root):
    step = {"bundle": str(repo_root / "bundles" / "maisi_vae")}
    chains = [{"when": kind, "steps": [step]} for kind in ("CT", "SEG")]
    settings = read_settings(write_settings(4242, chains=chains)[0])
    assert settings.chain("CT").keep_patient is True and settings.chain("SEG").keep_patient is False
    edit = {**step, "settings": {"input": "{series}"}}
    chains = [{"when": "CT", "steps": [edit]}, {"when": "SEG", "steps": [edit], "keep_patient": True}]
    assert [chain.keep_patient for chain in read_settings(write_settings(4242, chains=chains)[0]).chains] == [True] * 2
