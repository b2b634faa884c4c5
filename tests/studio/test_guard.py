"""Who may talk to the studio."""

from __future__ import annotations

import asyncio

import pytest

from maisi_tools.errors import InputError
from maisi_tools.studio.guard import COOKIE, Guard, check_access

TOKEN = "a token of some length"


def ask(method="GET", path="/v1/jobs", query="", bound="127.0.0.1", token=None, secure=False, **headers):
    """Status and headers of the answer; 200 where the app itself was asked."""
    given = {"host": "127.0.0.1:8765", **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, bound, token, secure)(scope, None, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8765"}, 200),
        ({"host": "evil.example:8765"}, 403),  # a name that somebody lets point here (DNS rebinding)
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "["}, 403),
    ],
)
def test_without_a_token_only_names_of_this_machine_are_answered(headers, status):
    assert ask(**headers)[0] == status


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_pages_of_other_sites_change_nothing(method):
    assert ask(method)[0] == 200  # a program
    assert ask(method, origin="http://127.0.0.1:8765")[0] == 200
    for origin in ("https://evil.example", "http://127.0.0.1:9999", "null", "http://["):
        assert ask(method, origin=origin)[0] == 403
    assert ask("GET", origin="https://evil.example")[0] == 200  # which it cannot read


def test_no_answer_is_for_another_site():
    for status, headers in (ask(), ask(bound="10.0.0.5", token=TOKEN)):
        assert headers["cross-origin-resource-policy"] == "same-origin", status
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_nothing_of_a_patient_stays_in_a_browser():
    assert ask(path="/v1/jobs/x/volumes/ct")[1]["cache-control"] == "no-store"
    for path in ("/", "/static/studio.js"):
        assert ask(path=path)[1]["cache-control"] == "no-cache"


def test_the_page_runs_its_own_files_alone():
    policy = ask()[1]["content-security-policy"]
    assert "default-src 'self'" in policy and not any(word in policy for word in ("unsafe", "blob:", "data:", "*"))


def test_with_a_token_every_request_needs_it():
    for path in ("/", "/v1/health/live", "/static/studio.js", "/v1/jobs"):
        assert ask(path=path, token=TOKEN)[0] == 401
    assert ask(token=TOKEN, authorization=f"Bearer {TOKEN}")[0] == 200
    for wrong in (f"Bearer {TOKEN}x", "Bearer ", TOKEN, "Bearer \xff"):
        assert ask(token=TOKEN, authorization=wrong)[0] == 401


def test_the_page_gets_a_cookie_for_the_token_once():
    status, headers = ask(path="/", query=f"token={TOKEN}".replace(" ", "+"), token=TOKEN, secure=True)
    cookie = headers["set-cookie"]
    assert (status, headers["location"]) == (303, "/")
    assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Secure")) and TOKEN not in cookie
    assert ask(path="/", token=TOKEN, cookie=cookie.split(";")[0])[0] == 200
    assert ask("POST", token=TOKEN, cookie=cookie.split(";")[0])[0] == 200
    assert ask(token=TOKEN, cookie=f"{COOKIE}={TOKEN}")[0] == 401
    assert ask(path="/", query="token=wrong", token=TOKEN)[0] == 401
    assert ask(path="/v1/jobs", query=f"token={TOKEN}".replace(" ", "+"), token=TOKEN)[0] == 401


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("0.0.0.0", None, None, None), "host is 0.0.0.0"),
        (("0.0.0.0", TOKEN, None, None), "with a token"),
        (("10.0.0.5", None, "c.pem", "k.pem"), "with a token"),
        (("some.host", TOKEN, None, None), "TLS"),
        (("127.0.0.1", None, "c.pem", None), "go together"),
        (("127.0.0.1", "short", None, None), "allowed are 16 and more"),
        (("127.0.0.1", "ä" * 20, None, None), "ASCII"),
    ],
)
def test_other_machines_need_token_and_tls(given, words):
    with pytest.raises(InputError, match=words):
        check_access(*given)


@pytest.mark.parametrize(
    "given",
    [("127.0.0.1", None, None, None), ("::1", TOKEN, None, None), ("0.0.0.0", TOKEN, "c.pem", "k.pem")],
)
def test_what_may_be_served(given):
    check_access(*given)


def test_tls_and_token_of_a_real_server(start_studio, tmp_path, pem_files):
    import json
    import ssl
    import urllib.error
    import urllib.request

    options = ("--tls_cert", pem_files["certificate"], "--tls_key", pem_files["key"])
    running = start_studio(tmp_path / "studio", *options, MAISI_STUDIO_TOKEN=TOKEN)
    assert running.address.startswith("https://127.0.0.1:") and "token=a%20token" in running.address
    context = ssl.create_default_context(cafile=pem_files["certificate"])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(running.url + "/v1/health/live", context=context)
    request = urllib.request.Request(running.url + "/v1/health/live", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, context=context) as answer:
        assert json.load(answer) == {"status": "live"}
    with pytest.raises(AssertionError, match="cannot be loaded .*; give PEM files"):
        start_studio(tmp_path / "other", "--tls_cert", pem_files["key"], "--tls_key", pem_files["key"])
