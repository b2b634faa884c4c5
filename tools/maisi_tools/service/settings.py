"""The listener's settings, a YAML file."""

from __future__ import annotations

import dataclasses
import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maisi_tools.errors import InputError
from maisi_tools.yaml_fields import checked_fields, read_yaml

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
    """

    ae_title: str
    host: str
    port: int = 0
    tls: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ae_title, str) or not 1 <= len(self.ae_title.strip()) <= 16:
            raise InputError(f"ae_title is {self.ae_title!r}; allowed are 1 to 16 characters")
        if not isinstance(self.port, int) or not 0 <= self.port < 65536:
            raise InputError(f"port is {self.port!r}; allowed are 0 to 65535")


@dataclasses.dataclass(frozen=True)
class Listen:
    """The side that receives, a C-STORE SCP.

    Args:
        ae_title, host, port: of this listener; host is the address it is bound to.
        allowed: nodes that may store here, by AE title and address; others are refused.
        quiet_seconds: a study is whole when nothing more has come for so long.
        certificate, key: PEM files; with them it speaks TLS alone.
        authority: PEM file of the certificates whose bearers may connect; None asks for none.
    """

    ae_title: str = "MAISI"
    host: str = "0.0.0.0"
    port: int = 11112
    allowed: Sequence[Node] = ()
    quiet_seconds: float = 10.0
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None

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
        url: of its DICOMweb root.
        every_seconds: how often.
        user: for basic authentication.
        password_variable: environment variable that holds the password, so that it stands in no file.
    """

    url: str
    every_seconds: float = 30.0
    user: str | None = None
    password_variable: str = "MAISI_DICOMWEB_PASSWORD"


@dataclasses.dataclass(frozen=True)
class Query(Node):
    """A PACS that is asked for new objects by C-FIND and sends them here by C-MOVE.

    It has to know this listener's AE title with its host and port, and stands in ``listen.allowed``.

    Args:
        ae_title, host, port, tls: see :class:`Node`.
        every_seconds: how often.
        days: studies of today and so many days before are looked at.
    """

    every_seconds: float = 30.0
    days: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.port:
            raise InputError("query.port is 0; give the port at which the PACS answers C-FIND")
        if not isinstance(self.days, int) or self.days < 0:
            raise InputError(f"query.days is {self.days!r}; allowed is a whole number from 0 up")


@dataclasses.dataclass(frozen=True)
class Step:
    """One bundle of a chain; its input is the volume that the step before wrote.

    Args:
        bundle: its folder.
        config: file, or files, in its ``configs``.
        settings: keys to set. Our bundles read ``input``, which is set to the volume; for others "{input}" in a text
            stands for its path: ``{datalist: ["{input}"]}``.
        result: which of the files that it writes goes on: ``NAME`` + this.
    """

    bundle: str
    config: str | Sequence[str] = "inference.json"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    result: str = "_ct.nii.gz"


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is done with one kind of object.

    Args:
        when: one of :data:`KINDS`.
        steps: run one after another; the last one's volume is stored back.
        names: JSON table of ROI names, for masks.
        keep_patient: whether the result joins the source's patient and study; otherwise it is a new, invented patient.
    """

    when: str
    steps: Sequence[Step]
    names: str | None = None
    keep_patient: bool = False

    def __post_init__(self) -> None:
        if self.when not in KINDS:
            raise InputError(f"when is {self.when!r}; allowed are {', '.join(KINDS)}")
        if not self.steps:
            raise InputError(f"the chain for {self.when} has no steps; add at least one bundle")


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
        keep_hours: how long a study stays in the spool after its last job, for structures that come later.
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

    def chain(self, kind: str) -> Chain | None:
        """The chain for a modality."""
        return next((chain for chain in self.chains if chain.when == kind), None)


def read_settings(path: str | os.PathLike) -> Settings:
    """Read the settings; relative paths in it are relative to the file.

    Raises:
        InputError: no such file, no YAML, an unknown key or a wrong value.
    """
    path = Path(path).expanduser()
    content = read_yaml(path, "settings", "docs/hospital.md")
    content = checked_fields(Settings, content, str(path))

    def near(value: Any) -> Any:
        return None if value is None else str(path.parent / Path(str(value)).expanduser())

    content["spool"] = near(content["spool"])
    content["send"] = Node(**checked_fields(Node, content["send"], "send"))
    if content.get("listen") is not None:
        listen = checked_fields(Listen, content["listen"], "listen")
        listen["allowed"] = tuple(
            Node(**checked_fields(Node, node, "listen.allowed"))
            for node in _list(listen.get("allowed", []), "listen.allowed")
        )
        for name in ("certificate", "key", "authority"):
            listen[name] = near(listen.get(name))
        content["listen"] = Listen(**listen)
    if content.get("poll") is not None:
        content["poll"] = Poll(**checked_fields(Poll, content["poll"], "poll"))
    if content.get("query") is not None:
        content["query"] = Query(**checked_fields(Query, content["query"], "query"))
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
    return settings


def _list(content: Any, where: str) -> list:
    if not isinstance(content, list):
        raise InputError(f"{where} is {content!r}; allowed is a list")
    return content
