"""Addresses of servers, as a user gives them: names, IPv4, IPv6, https, path prefixes.

Not covered: whether anybody answers there (``pool``).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

_EXPECTED = "an address such as http://host:8000/v1"


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """A normalised OpenAI-style base address; two spellings of the same are equal.

    Attributes:
        text: scheme, host, port where it is not the scheme's own, path; no slash at the end.
        root: the address without a final ``/v1``, where servers keep /health and their development routes.
        loopback: the host is this machine's loopback interface.
    """

    text: str
    root: str
    loopback: bool

    def __str__(self) -> str:
        return self.text


def parse_base_url(text: str) -> BaseUrl:
    """Read and normalise an address; a host without a path gets ``/v1``.

    Args:
        text: such as ``http://teacher:8000/v1``, ``https://[fd00::7]/pool/v1``, ``http://127.0.0.1:8000``.

    Raises:
        ValueError: not http or https, no host, a bad port, a user name or password, a query or a fragment. The error
            repeats no credentials.
    """
    text = text.strip()
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError(f"address with spaces or control characters; expected {_EXPECTED}; remove them")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        has_user = parts.username is not None or parts.password is not None
    except ValueError as error:
        shown = text.rpartition("@")[2]
        raise ValueError(f"address {shown!r}: {error}; expected {_EXPECTED}; mend it") from None
    if has_user or "@" in parts.netloc:
        raise ValueError(
            f"address of {host!r} holds a user name or password; expected {_EXPECTED}; use api_key_env instead"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"address {text!r}; expected {_EXPECTED}; begin it with http:// or https://")
    if parts.query or parts.fragment:
        raise ValueError(
            f"address {text.split('?')[0].split('#')[0]!r} with a query or fragment; expected none; cut it"
        )
    if port == 0:
        raise ValueError(f"address {text!r}: port 0; expected {_EXPECTED}; name the port")
    address = _ip(host)
    if isinstance(address, ipaddress.IPv6Address):
        shown_host = f"[{address.compressed}]"
    elif address is not None:
        shown_host = str(address)
    else:
        try:
            shown_host = host.rstrip(".").encode("idna").decode("ascii").lower()
        except UnicodeError:
            raise ValueError(f"address {text!r}: no such host name; expected {_EXPECTED}; mend it") from None
        if not shown_host:
            raise ValueError(f"address {text!r}; expected {_EXPECTED}; name the host")
    if port is not None and port != {"http": 80, "https": 443}[parts.scheme]:
        shown_host += f":{port}"
    segments = [segment for segment in parts.path.split("/") if segment]
    if any(segment in (".", "..") for segment in segments):
        raise ValueError(f"address {text!r} with '.' or '..' in its path; expected {_EXPECTED}; write it out")
    path = "".join(f"/{segment}" for segment in segments or ["v1"])
    origin = f"{parts.scheme}://{shown_host}"
    loopback = address.is_loopback if address is not None else shown_host in ("localhost", "localhost.localdomain")
    return BaseUrl(text=origin + path, root=origin + path.removesuffix("/v1"), loopback=loopback)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
