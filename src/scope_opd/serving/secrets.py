"""API keys: read from the environment or a file, carried without ever being shown, taken out of any text.

A key never stands in a config. ``Secret`` shows ``***`` however it is printed; ``BearerAuth`` puts it on a request at
the last moment, where httpx itself hides it; ``redact`` cleans what a server said before it goes into an error, a log
or a ledger. Not covered: keys other than bearer tokens, keys that change while a run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from pathlib import Path

import httpx

from scope_opd.errors import ConfigError

HIDDEN = "***"


class Secret:
    """A text that does not show itself. ``reveal`` is the only way to it."""

    __slots__ = ("__text",)

    def __init__(self, text: str) -> None:
        self.__text = text

    def reveal(self) -> str:
        return self.__text

    def __repr__(self) -> str:
        return f"Secret({HIDDEN})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Secret is not written anywhere")


class BearerAuth(httpx.Auth):
    """Puts ``Authorization: Bearer KEY`` on a request. No header dict of ours ever holds the key."""

    def __init__(self, key: Secret) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._key.reveal()}"
        yield request


def load_secret(*, env: str | None, file: str | None, setting: str) -> Secret | None:
    """The key that an environment variable or a file holds; None where neither is named.

    Args:
        env: name of the variable.
        file: path of a file whose only line is the key.
        setting: what to call the setting in errors, up to "_env" and "_file" ("teacher.api_key").

    Raises:
        ConfigError: both are named, the variable is not set, the file cannot be read, or no key is in it.
    """
    if env is not None and file is not None:
        raise ConfigError(f"{setting}_env and {setting}_file are both set", "one of them", "remove the other")
    if env is not None:
        text, place = os.environ.get(env), f"environment variable {env}"
        if text is None:
            raise ConfigError(f"{setting}_env = {env!r}: the variable is not set", "the key in it", f"export {env}=...")
    elif file is not None:
        path, place = Path(file).expanduser(), f"file {file}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(f"{setting}_file = {file!r}: {reason}", "a file with the key", "check the path") from None
    else:
        return None
    key = text.strip()
    if not key or not key.isascii() or any(character.isspace() or not character.isprintable() for character in key):
        raise ConfigError(f"{setting}: {place} holds no key", "one line of printable characters", "put the key there")
    return Secret(key)


def redact(text: str, secrets: Iterable[Secret | None], *, limit: int = 300) -> str:
    """A text on one line, without the keys, cut at ``limit`` characters.

    Args:
        text: what somebody else wrote (a server's error body).
        secrets: keys to take out, wherever they stand.
        limit: characters at most.
    """
    for secret in secrets:
        if secret is not None:
            text = text.replace(secret.reveal(), HIDDEN)
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
