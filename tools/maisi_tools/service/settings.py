"""The listener's settings, a YAML file."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from maisi_tools.errors import InputError
from maisi_tools.files import expanded
from maisi_tools.masks.codes import read_roi_table
from maisi_tools.settings import check_number, checked_fields, on_this_machine, read_yaml

KINDS = ("SEG", "RTSTRUCT", "CT")
"""Modalities that a chain may wait for."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A DICOM application entity.

    Args:
        ae_title: its name, 1 to 16 characters.
        host: name or address.
        port: where it listens; 0 for one that only sends.
        tls: whether it is talked to in TLS.
        authority: PEM file of the certificates that may have signed its own; None for those that the system trusts.
        certificate, key: PEM files of ours, for one that asks who calls.
    """

    ae_title: str
    host: str
    port: int = 0
    tls: bool = False
    authority: str | None = None
    certificate: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        _check_title(self.ae_title)
        _check_text("host", self.host)
        check_number("port", self.port, 0, 65535, whole=True)
        _check_flag("tls", self.tls)
        _check_pair(self.ae_title, self.certificate, self.key)
        if not self.tls and (self.authority or self.certificate):
            raise InputError(
                f"{self.ae_title} has an authority or a certificate without TLS; allowed are these with tls: true: add "
                "it, or leave them out"
            )

    @functools.cached_property
    def context(self) -> ssl.SSLContext | None:
        """None without TLS; the files are read once.

        Raises:
            InputError: a file that cannot be loaded.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.authority)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(one) for one in (self.authority, self.certificate, self.key) if one is not None)
            raise InputError(
                f"{files or 'the system'}, for {self.ae_title}, cannot be loaded ({error}); give PEM files"
            ) from error
        return context


@dataclasses.dataclass(frozen=True)
class Listen:
    """The side that receives, a C-STORE SCP.

    Args:
        ae_title, host, port: of this listener; host is the address it is bound to.
        allowed: nodes that may store here, by AE title and address; others are refused.
        quiet_seconds: a study is whole when nothing more has come for so long.
        certificate, key: PEM files; with them it speaks TLS alone.
        authority: PEM file of the certificates whose bearers may connect; None asks for none.
        max_megabytes: of one object; a sender of more is cut off.
        min_free_gigabytes: of the spool's disk; with less, objects are refused.
    """

    ae_title: str = "MAISI"
    host: str = "0.0.0.0"
    port: int = 11112
    allowed: Sequence[Node] = ()
    quiet_seconds: float = 10.0
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    max_megabytes: int = 1024
    min_free_gigabytes: float = 1.0

    def __post_init__(self) -> None:
        _check_title(self.ae_title)
        _check_text("listen.host", self.host)
        check_number("listen.port", self.port, 1, 65535, whole=True)
        check_number("listen.quiet_seconds", self.quiet_seconds, 0.1, 86400)
        check_number("listen.max_megabytes", self.max_megabytes, 1, 100_000, whole=True)
        check_number("listen.min_free_gigabytes", self.min_free_gigabytes, 0, 1e6)
        _check_pair("listen", self.certificate, self.key)
        if self.authority is not None and self.certificate is None:
            raise InputError("listen.authority needs TLS; allowed is one with certificate and key: add these")

    def tls(self) -> ssl.SSLContext | None:
        """None without a certificate.

        Raises:
            InputError: a file that cannot be loaded.
        """
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.authority is not None:
                context.load_verify_locations(self.authority)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"listen.certificate {self.certificate} cannot be loaded ({error}); give PEM files"
            ) from error
        return context


@dataclasses.dataclass(frozen=True)
class Poll:
    """A DICOMweb archive that is asked for new objects, in place of, or beside, one that sends them.

    Args:
        url: of its DICOMweb root; https, or http on this machine. Without a password, http elsewhere will do, too.
        every_seconds: how often.
        quiet_seconds: a study is whole when nothing more has come for so long.
        user: for basic authentication.
        password_variable: environment variable that holds the password, so that it stands in no file.
        plain_password_to: host that may get the password without encryption, over http.
        days: how far back studies are looked for, by their date; None for all that there are.
    """

    url: str
    every_seconds: float = 30.0
    quiet_seconds: float = 10.0
    user: str | None = None
    password_variable: str = "MAISI_DICOMWEB_PASSWORD"
    plain_password_to: str | None = None
    days: int | None = None

    def __post_init__(self) -> None:
        _check_text("poll.url", self.url)
        if self.days is not None:
            check_number("poll.days", self.days, 0, 36500, whole=True)
        check_number("poll.every_seconds", self.every_seconds, 0.1, 86400)
        check_number("poll.quiet_seconds", self.quiet_seconds, 0.1, 86400)
        _check_text("poll.password_variable", self.password_variable)
        for name in ("user", "plain_password_to"):
            if (value := getattr(self, name)) is not None:
                _check_text(f"poll.{name}", value)
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = None, None
        if parts is None or parts.scheme not in ("http", "https") or not host:
            raise InputError(f"poll.url is {self.url!r}; allowed is one such as https://pacs/dicom-web")
        if parts.username is not None or parts.password is not None:
            raise InputError(
                f"poll.url has a user or a password in it; allowed is poll.user, with the password in the environment "
                f"variable {self.password_variable}"
            )
        plain = parts.scheme == "http" and not on_this_machine(host)
        if self.user is not None and plain and self.plain_password_to != host:
            raise InputError(
                f"poll.url {self.url} would send the password of {self.user} to {host} without encryption; allowed is "
                f"https, or `plain_password_to: {host}` beside it"
            )


@dataclasses.dataclass(frozen=True)
class Query(Node):
    """A PACS that is asked for new objects by C-FIND and sends them here by C-MOVE.

    It has to know this listener's AE title with its host and port, and stands in ``listen.allowed``.

    Args:
        ae_title, host, port, tls, authority, certificate, key: see :class:`Node`.
        every_seconds: how often.
        days: studies of today and so many days before are looked at.
    """

    every_seconds: float = 30.0
    days: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.port:
            raise InputError("query.port is 0; give the port at which the PACS answers C-FIND")
        check_number("query.every_seconds", self.every_seconds, 0.1, 86400)
        check_number("query.days", self.days, 0, 36500, whole=True)


@dataclasses.dataclass(frozen=True)
class Step:
    """One bundle of a chain; its input is the volume that the step before wrote.

    Args:
        bundle: its folder.
        config: file, or files, in its ``configs``.
        settings: keys to set. Our bundles read ``input``, which is set to the volume; for others "{input}" in a text
            stands for its path: ``{datalist: ["{input}"]}``. "{series}" stands for the folder of the CT series that
            structures were drawn on: ``{input: "{series}", mask: "{input}"}`` edits that scan.
        result: which of the files that it writes goes on: ``NAME`` + this.
    """

    bundle: str
    config: str | Sequence[str] = "inference.json"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    result: str = "_ct.nii.gz"

    def __post_init__(self) -> None:
        names = [self.config] if isinstance(self.config, str) else self.config
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"a step's config is {self.config!r}; allowed is the name of a file, or a list of names")
        if not isinstance(self.settings, Mapping) or not all(isinstance(key, str) for key in self.settings):
            raise InputError(f"a step's settings are {self.settings!r}; allowed are keys with values")
        _check_text("a step's result", self.result)


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is done with one kind of object.

    Args:
        when: one of :data:`KINDS`.
        steps: run one after another; the last one's volume is stored back.
        names: JSON table of ROI names, for masks.
        keep_patient: whether the result joins the source's patient and study; otherwise it is a new, invented patient.
            What is made from a CT shows its patient, so for CT this is so, and cannot be turned off; and chains with a
            step that takes "{series}" need it.
    """

    when: str
    steps: Sequence[Step]
    names: str | None = None
    keep_patient: bool | None = None

    def __post_init__(self) -> None:
        if self.when not in KINDS:
            raise InputError(f"when is {self.when!r}; allowed are {', '.join(KINDS)}")
        if self.keep_patient is None:
            object.__setattr__(self, "keep_patient", self.when == "CT")
        _check_flag("keep_patient", self.keep_patient)
        if self.when == "CT" and not self.keep_patient:
            raise InputError(
                "the chain for CT has keep_patient: false; allowed is true, because a CT that is made from a patient's "
                "scan shows that patient and must not go to an invented one"
            )
        if self.names is not None:
            _check_text("names", self.names)
        if not self.steps:
            raise InputError(f"the chain for {self.when} has no steps; add at least one bundle")
        if not self.keep_patient and any(_names_series(step.settings) for step in self.steps):
            raise InputError(
                f"the chain for {self.when} has a step that takes {{series}}, and keep_patient: false; allowed is "
                "keep_patient: true, because what is made from a patient's scan shows that patient and must not go to "
                "an invented one"
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of it.

    Args:
        spool: folder of what has come in, the queue and the dead letters; on a disk that survives a restart.
        send: where results are stored.
        chains: at most one for each kind.
        listen: None for a listener that only polls.
        poll: DICOMweb archive to ask, if any.
        query: PACS to ask by C-FIND, if any.
        http: address and port of ``/health`` and ``/metrics``.
        attempts: how often a job is tried before it is a dead letter.
        retry_seconds: pause after its first failure; doubled after each further one.
        keep_hours: how long a study stays in the spool after its last job, for structures that come later;
            and an object that could not be read in the folder of dead letters.
        device: for the networks.
    """

    spool: str
    send: Node
    chains: Sequence[Chain]
    listen: Listen | None = None
    poll: Poll | None = None
    query: Query | None = None
    http: str = "127.0.0.1:8080"
    attempts: int = 5
    retry_seconds: float = 30.0
    keep_hours: float = 24.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_text("spool", self.spool)
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(f"device is {self.device!r}; allowed are cpu, cuda, cuda:0 and so on")
        check_number("attempts", self.attempts, 1, 1000, whole=True)
        check_number("retry_seconds", self.retry_seconds, 0.1, 86400)
        check_number("keep_hours", self.keep_hours, 0, 87600)
        http_address(self.http)
        if not self.send.port:
            raise InputError("send.port is 0; give the port at which the archive takes objects")
        kinds = [chain.when for chain in self.chains]
        if not kinds or len(set(kinds)) < len(kinds):
            raise InputError(
                f"chains are for {', '.join(kinds) or 'nothing'}; allowed is one for each of {', '.join(KINDS)}"
            )
        if self.listen is None and self.poll is None:
            raise InputError("there is neither listen nor poll, so nothing could come in; add one of them")
        if self.query is not None and self.listen is None:
            raise InputError("query needs listen, because C-MOVE stores what was asked for there; add it, or use poll")
        if self.listen is not None and not self.listen.allowed:
            raise InputError("listen.allowed is empty, so nobody may send; add the PACS with ae_title and host")

    @property
    def quiet_seconds(self) -> float:
        """A study is whole when nothing more has come for so long."""
        sides = (self.listen, self.poll)
        return max((side.quiet_seconds for side in sides if side is not None), default=0.0)

    def chain(self, kind: str) -> Chain | None:
        """The chain for a modality."""
        return next((chain for chain in self.chains if chain.when == kind), None)


def http_address(text: Any) -> tuple[str, int]:
    """Host and port of ``host:port``, ``[::1]:8080`` included.

    Raises:
        InputError: it has no host, which would mean all of this machine's addresses, or no port.
    """
    host, _, port = str(text).rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise InputError(
            f"http is {text!r}; allowed is an address with a port, such as 127.0.0.1:8080 (0.0.0.0:8080 is open to all)"
        )
    return host, int(port)


def read_settings(path: str | os.PathLike) -> Settings:
    """Read the settings; relative paths in it are relative to the file.

    Raises:
        InputError: no such file, no YAML, an unknown key or a wrong value.
    """
    path = expanded(path)
    content = read_yaml(path, "settings", "docs/hospital.md")
    content = checked_fields(Settings, content, str(path))

    def near(value: Any) -> Any:
        return None if value is None else str(path.parent / expanded(str(value)))

    content["spool"] = near(content["spool"])

    def with_files(fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {name: near(fields.get(name)) for name in ("authority", "certificate", "key")}

    content["send"] = Node(**with_files(checked_fields(Node, content["send"], "send")))
    if content.get("listen") is not None:
        listen = checked_fields(Listen, content["listen"], "listen")
        listen["allowed"] = tuple(
            Node(**checked_fields(Node, node, "listen.allowed"))
            for node in _list(listen.get("allowed", []), "listen.allowed")
        )
        content["listen"] = Listen(**with_files(listen))
    if content.get("poll") is not None:
        content["poll"] = Poll(**checked_fields(Poll, content["poll"], "poll"))
    if content.get("query") is not None:
        content["query"] = Query(**with_files(checked_fields(Query, content["query"], "query")))
    chains = []
    for number, chain in enumerate(_list(content["chains"], "chains")):
        chain = checked_fields(Chain, chain, f"chains[{number}]")
        steps = [checked_fields(Step, step, f"chains[{number}].steps") for step in _list(chain["steps"], "steps")]
        chain["steps"] = tuple(Step(**{**step, "bundle": near(step["bundle"])}) for step in steps)
        chain["names"] = near(chain.get("names"))
        chains.append(Chain(**chain))
    content["chains"] = tuple(chains)
    settings = Settings(**content)
    for chain in settings.chains:
        for step in chain.steps:
            if not (Path(step.bundle) / "configs").is_dir():
                raise InputError(f"{step.bundle} is no bundle, it has no configs; correct chains")
            for name in [step.config] if isinstance(step.config, str) else step.config:
                if not (Path(step.bundle) / "configs" / name).is_file():
                    raise InputError(f"{step.bundle} has no configs/{name}; correct the step's config")
        if chain.names is not None:
            read_roi_table(chain.names)
    return settings


def _list(content: Any, where: str) -> list:
    if not isinstance(content, list):
        raise InputError(f"{where} is {content!r}; allowed is a list")
    return content


def _names_series(value: Any) -> bool:
    """Whether settings have "{series}" in a text, at any depth."""
    if isinstance(value, Mapping):
        return any(map(_names_series, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_names_series, value))
    return isinstance(value, str) and "{series}" in value


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(f"{name} is {value!r}; allowed is a text")


def _check_title(value: Any) -> None:
    text = value.strip() if isinstance(value, str) else ""
    if not 1 <= len(text) <= 16 or not text.isascii() or not text.isprintable() or "\\" in text:
        raise InputError(f"ae_title is {value!r}; allowed are 1 to 16 characters (ASCII, no backslash)")


def _check_pair(name: str, certificate: str | None, key: str | None) -> None:
    if (certificate is None) != (key is None):
        given = "certificate" if key is None else "key"
        raise InputError(
            f"{name} has a {given} alone; allowed are certificate and key together, or neither: add the other one"
        )


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; allowed are true and false, without quotes")
