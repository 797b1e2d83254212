"""Connections of the other ranks to rank 0, how they find one another, and how one tells why it ended.

Rank 0 listens (on one machine to that machine alone), says where in the store that torch's own rendezvous uses, and
lets in who knows a key that is in that store too. What travels is pickled: like torch's own control traffic it belongs
on a network that is trusted. Not covered: what is sent (``ranks``).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pickle
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from scope_opd.errors import RunFailed, ScopeError

_KEY = "scope_opd/leader"
_NONCE = 32
_KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
"""A machine that is gone without a word is missed after about 80 s."""
_NAMES_OF_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a rank ended, as its error said it, and the exit code that goes with it."""

    rank: int
    found: str
    expected: str = ""
    remedy: str = ""
    code: int = 1

    def error(self) -> RunFailed:
        """The same, for the other ranks: it names the rank."""
        error = RunFailed(f"rank {self.rank}: {self.found}", self.expected, self.remedy)
        error.exit_code = self.code
        return error


def ending_of(error: BaseException, rank: int) -> Ending:
    """An error in one line, without what the environment keeps secret."""
    if isinstance(error, ScopeError):
        return Ending(rank, _hidden(error.found), _hidden(error.expected), _hidden(error.remedy), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Ending(rank, "interrupted", code=130)
    if isinstance(error, SystemExit):
        return Ending(rank, "was told to end", code=error.code if isinstance(error.code, int) else 1)
    text = " ".join(str(error).split())[:300]
    return Ending(rank, _hidden(f"{type(error).__name__}: {text}"), "", "the traceback is in that rank's own output")


def gone(rank: int, who: str) -> Ending:
    """A rank that ended without saying why."""
    return Ending(
        rank,
        f"its process ({who}) is gone",
        "every rank alive until the end",
        "it was killed (for memory?) or crashed: see its own output, then continue with --resume",
    )


def _hidden(text: str) -> str:
    for name, value in os.environ.items():
        if len(value) >= 8 and any(part in name.upper() for part in _NAMES_OF_SECRETS):
            text = text.replace(value, "***")
    return text


class Wire:
    """A connection over which whole pickled objects travel. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket, who: str) -> None:
        self.who = who
        self._connection = connection
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Any) -> None:
        """Raises OSError where the other side is gone."""
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.sendall(struct.pack("!Q", len(content)))
            self._connection.sendall(content)

    def receive(self) -> Any:
        """Wait for a message. Raises OSError (EOFError is none) where the other side is gone."""
        (size,) = struct.unpack("!Q", _exactly(self._connection, 8))
        return pickle.loads(_exactly(self._connection, size))

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._connection.close()


def open_wires(rank: int, world: int, timeout_s: float, *, cuda: bool) -> tuple[dict[int, Wire], Any]:
    """Make torch's process group where there is none, then the connections: to rank 0, or on rank 0 to all others.

    Returns:
        The connections by rank, and the group for collectives over the CPU (None: the default one does).

    Raises:
        ScopeError: the ranks did not find one another within ``timeout_s``.
    """
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    try:
        group = None
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
        elif dist.get_backend() != "gloo":  # Ray's, on GPUs
            group = dist.new_group(backend="gloo", timeout=limit)
        store = dist.distributed_c10d._get_default_store()
        if rank:
            store.wait([_KEY], limit)
            return {0: _connect(json.loads(store.get(_KEY)), rank, timeout_s)}, group
        one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == world
        with _listener(one_machine, world) as listener:
            key = secrets.token_hex(32)
            places = ["127.0.0.1"] if one_machine else [os.environ.get("MASTER_ADDR", ""), _own_address()]
            found = {"places": places, "port": listener.getsockname()[1], "key": key, "who": _who()}
            store.set(_KEY, json.dumps(found))
            return _accept(listener, bytes.fromhex(key), world, timeout_s), group
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ScopeError(
            f"rank {rank} of {world} did not find the others: {text}",
            f"all of them within {timeout_s:g} s",
            "see that all were started, with one MASTER_ADDR that they reach, and what the first error was",
        ) from error


def _listener(one_machine: bool, world: int) -> socket.socket:
    if one_machine:
        return socket.create_server(("127.0.0.1", 0), backlog=world)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=world)


def _who() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _own_address() -> str:
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def _connect(leader: dict[str, Any], rank: int, timeout_s: float) -> Wire:
    deadline, last = time.monotonic() + timeout_s, OSError("no address")
    while time.monotonic() < deadline:
        for place in filter(None, leader["places"]):
            try:
                connection = socket.create_connection((place, leader["port"]), timeout=min(timeout_s, 10.0))
                nonce = _exactly(connection, _NONCE)
                who = _who().encode()
                connection.sendall(_proof(bytes.fromhex(leader["key"]), nonce, rank))
                connection.sendall(struct.pack("!IH", rank, len(who)) + who)
                return Wire(connection, leader["who"])
            except OSError as error:
                last = error
        time.sleep(0.2)
    raise last


def _accept(listener: socket.socket, key: bytes, world: int, timeout_s: float) -> dict[int, Wire]:
    found: dict[int, Wire] = {}
    deadline = time.monotonic() + timeout_s
    while len(found) < world - 1:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        connection, _ = listener.accept()
        try:
            connection.settimeout(10.0)
            nonce = secrets.token_bytes(_NONCE)
            connection.sendall(nonce)
            proof = _exactly(connection, hashlib.sha256().digest_size)
            rank, size = struct.unpack("!IH", _exactly(connection, 6))
            who = _exactly(connection, size).decode(errors="replace")
            known = 0 < rank < world and rank not in found
            if not known or not hmac.compare_digest(proof, _proof(key, nonce, rank)):
                raise OSError("not one of the ranks")
        except OSError:
            connection.close()  # somebody else who tried the port
            continue
        found[rank] = Wire(connection, who)
    return dict(sorted(found.items()))


def _proof(key: bytes, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(key, nonce + struct.pack("!I", rank), "sha256")


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = bytearray(size)
    view, got = memoryview(content), 0
    while got < size:
        count = connection.recv_into(view[got:], min(size - got, 2**20))
        if not count:
            raise ConnectionError("the other side closed the connection")
        got += count
    return bytes(content)
