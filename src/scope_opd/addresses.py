"""What a config may say of a server: its address (name, IPv4, IPv6, https, path prefix) and where its key is kept.

Not covered: whether anybody answers there, and reading the key (``serving``).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_EXPECTED = "an address such as http://host:8000/v1"
# A variable's name: what stands there instead is taken for the key itself, and is not repeated in the error.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LOOKS_LIKE_A_KEY = re.compile(r"(?i)^(sk|hf|key|pk|api|token|bearer)[-_ ][A-Za-z0-9_\- ]{8,}$|^[A-Fa-f0-9]{24,}$")


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
    loopback = address.is_loopback if address is not None else shown_host in ("localhost", "localhost.localdomain")
    if port is not None and port != {"http": 80, "https": 443}[parts.scheme]:
        shown_host += f":{port}"
    segments = [segment for segment in parts.path.split("/") if segment]
    if any(segment in (".", "..") for segment in segments):
        raise ValueError(f"address {text!r} with '.' or '..' in its path; expected {_EXPECTED}; write it out")
    path = "".join(f"/{segment}" for segment in segments or ["v1"])
    origin = f"{parts.scheme}://{shown_host}"
    return BaseUrl(text=origin + path, root=origin + path.removesuffix("/v1"), loopback=loopback)


def looks_like_a_key(text: str) -> bool:
    """Whether a text that should be a name or a path looks like a key instead."""
    return bool(_LOOKS_LIKE_A_KEY.match(text.strip()))


def check_variable_name(text: str, setting: str) -> str:
    """The name of an environment variable.

    Raises:
        ValueError: it is none. The text is not repeated: it may be the key itself.
    """
    if not _NAME.fullmatch(text) or looks_like_a_key(text):
        raise ValueError(
            f"{setting} is not the name of an environment variable; expected a name such as TEACHER_API_KEY; put the "
            "key into that variable, never into a config"
        )
    return text


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
