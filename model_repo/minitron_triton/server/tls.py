"""TLS of the gRPC port: its files, and whether the text model can call its own server with them.

That model calls back over the loopback address, which the certificate need not name. It trusts the very certificate of
its server, no authority, and asks for a name that stands in it. All of that is tried here, in memory and before a
server starts: a certificate that nobody could use is refused in a sentence.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron.errors import InputError, UsageError, values_as_input
from minitron.text import credentials


@dataclass(frozen=True)
class Tls:
    """PEM files for gRPC; with ``ca`` a client must show a certificate that it signed (mutual TLS).

    ``loopback_certificate`` and ``loopback_key`` are what the text model shows then, ``name`` is one that the server's
    certificate is for.
    """

    certificate: Path
    key: Path
    ca: Path | None = None
    loopback_certificate: Path | None = None
    loopback_key: Path | None = None
    name: str = ""

    @property
    def files(self) -> dict[str, Path]:
        """Every file that the server or the text model reads, by the name of its field."""
        return {field: path for field, path in vars(self).items() if isinstance(path, Path)}


def read(
    certificate: Path | None, key: Path | None, ca: Path | None, loopback: tuple[Path | None, Path | None]
) -> Tls | None:
    """Check what was given with the --tls and --loopback flags; raises UsageError, InputError."""
    given = [path for path in (certificate, key, ca, *loopback) if path]
    if not given:
        return None
    if certificate is None or key is None:
        raise UsageError("TLS needs both --tls-cert and --tls-key; --tls-ca adds the demand for client certificates")
    if any(loopback) and not (all(loopback) and ca):
        raise UsageError("--loopback-cert and --loopback-key go together, and only with --tls-ca")
    for path in given:
        if b"-----BEGIN " not in path.read_bytes():
            raise InputError(f"{path} is no PEM file")
    tls = Tls(certificate.resolve(), key.resolve())
    if ca:
        own_certificate, own_key = (own.resolve() for own in (loopback[0] or certificate, loopback[1] or key))
        tls = Tls(tls.certificate, tls.key, ca.resolve(), own_certificate, own_key)
    return replace(tls, name=_name(_try(tls)))


def _try(tls: Tls) -> dict[str, Any]:
    """What the text model sees of the server's certificate; raises InputError where the two cannot connect."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(server, tls.certificate, tls.key)
    client.check_hostname = False  # the name is what is being looked for
    client.load_verify_locations(tls.certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust it as it stands, as gRPC does
    if tls.ca and tls.loopback_certificate and tls.loopback_key:
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(tls.ca)
        _load(client, tls.loopback_certificate, tls.loopback_key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        "client": client.wrap_bio(to_client, to_server),
        "server": server.wrap_bio(to_server, to_client, server_side=True),
    }
    open_ends = set(ends)
    while open_ends:
        for end in sorted(open_ends):
            try:
                ends[end].do_handshake()
                open_ends.discard(end)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                raise _refusal(tls, end, error) from error
    return dict(ends["client"].getpeercert() or {})


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    with values_as_input():
        credentials.try_key(context, certificate, key)


def _refusal(tls: Tls, end: str, error: ssl.SSLError) -> InputError:
    why = getattr(error, "verify_message", "") or error.reason
    if end == "client":
        return InputError(f"{tls.certificate} convinces no client: {why}")
    return InputError(
        f"{tls.loopback_certificate} is no client certificate of {tls.ca} ({why}), and the text model calls its own "
        "server with it; give it another with --loopback-cert and --loopback-key"
    )


def _name(certificate: dict[str, Any]) -> str:
    """A name that the certificate is for (RFC 6125: its alternative names, or, where there are none, its common name).

    For ``*.example.org`` that is any name there.
    """
    alternatives = certificate.get("subjectAltName", ())
    names = [value for kind, value in alternatives if kind == "DNS"]
    names += [value for kind, value in alternatives if kind == "IP Address"]
    names += [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    return names[0].replace("*", "loopback") if names else ""
