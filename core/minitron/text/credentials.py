"""The files of a gRPC client that prove who is who, read and tried before anything is asked: PEM for TLS, API keys.

gRPC takes any bytes for a certificate and fails with the first call, which then blames the address.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path

_VISIBLE = re.compile(r"[\x21-\x7e]+")

#: Root certificates, private key and certificate chain, in the order of ``grpc.ssl_channel_credentials``.
Pem = tuple[bytes | None, bytes | None, bytes | None]


def pem(ca: str | Path | None, cert: str | Path | None, key: str | Path | None) -> Pem:
    """The bytes of the files that are given; raises ValueError, naming the file that cannot be."""
    if bool(cert) != bool(key):
        raise ValueError(f"{cert or key} needs {'its private key' if cert else 'the certificate'} beside it")
    authority, of_ours, ours = (_read(path) if path else None for path in (ca, key, cert))
    for path, content in ((ca, authority), (cert, ours)):
        if content is not None:
            _try_certificate(path, content)
    if cert and key and Path(cert).is_file() and Path(key).is_file():  # a pipe cannot be read again
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # whether the key is long enough, the server says
        try_key(context, cert, key)
    return authority, of_ours, ours


def try_key(context: ssl.SSLContext, cert: str | Path, key: str | Path) -> None:
    """Let ``context`` have a certificate and its key; raises ValueError where the two do not belong together."""
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{key} is not the plain private key of {cert} ({error})") from error


def api_keys(path: str | Path) -> list[str]:
    """The keys of a file, one a line; raises ValueError where there is none, or one that no header can hold."""
    try:
        lines = _read(path).decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as an API key ({error})") from None
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise ValueError(f"{path} holds no API key")
    if not all(map(_VISIBLE.fullmatch, keys)):
        raise ValueError(f"{path} must hold keys of printable ASCII characters without spaces, one a line")
    return keys


def api_key(path: str | Path) -> str:
    """The only key of a file; raises ValueError as ``api_keys`` and ``only`` do."""
    return only(api_keys(path), path)


def only(keys: list[str], path: str | Path) -> str:
    """The key of a file that may hold no other; raises ValueError."""
    if len(keys) > 1:
        raise ValueError(f"{path} must hold one line, the key, and has {len(keys)}")
    return keys[0]


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _try_certificate(path: str | Path | None, content: bytes) -> None:
    text = content.decode("ascii", "ignore")  # beside the certificates may stand anything
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise ValueError(f"{path} holds no certificate in PEM") from None


def _no_password() -> str:
    raise ValueError("it has a password, and nobody is asked for one")
