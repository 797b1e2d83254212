"""Weights over connections of their own: gloo (TCP, any machine), NCCL (between GPUs) or CUDA IPC (one GPU).

Requests go through vLLM's weight transfer routes; at the other end is the backend "scope" of
serving/inside/scope_vllm.py, so that the trainer needs torch alone. With gloo and NCCL trainer and workers of a server
form a process group beside any other: the trainer is rank 0, listens on ``host``, and broadcasts one tensor after
another while the server's request is under way. Each server has a group of its own, so that one that dies takes none
with it. With IPC the trainer sends handles to tensors in its GPU's memory.

What is sent is a copy, in the servers' dtype: a server that restarts while the trainer steps gets the version that the
others hold, not what half a step has made of it.

Not covered: a trainer of several processes; servers on several nodes behind one address. NCCL and IPC share all of
this with gloo but for the lines that name them; those lines have been read against torch's source, not run.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from scope_opd.errors import ConfigError
from scope_opd.rollout.weight_sync.carrier import Load, checkpoint_tensors
from scope_opd.serving.control import Control
from scope_opd.serving.faults import Fault

Answer = TypeVar("Answer")
Method = Literal["gloo", "nccl", "ipc"]
MEET_S = 60.0
"""Within this time a server's workers must reach the trainer."""


@dataclass(slots=True)
class Link:
    """A process group of the trainer and one server's workers."""

    group: Any
    store: Any

    def cut(self) -> None:
        """Whoever waits at either end of a broadcast fails now: gloo closes its connections with their last owner."""
        group, self.group, self.store = self.group, None, None
        with suppress(Exception):  # it is broken; nothing more is asked of it
            group.abort()


class Native:
    """Sends weights over connections; implements ``carrier.Carrier``.

    Args:
        model: the student.
        method: "gloo", "nccl" or "ipc".
        host: the trainer's address as the servers reach it; only this interface is listened on.
        dtype: what is sent: what the servers compute in. None: the student's own.
        send_s: an update may take so long.

    Raises:
        ConfigError: the method is not to be had on this machine, or ``host`` is not its address.
    """

    def __init__(
        self, model: Any, method: Method, *, host: str = "127.0.0.1", dtype: torch.dtype | None = None,
        send_s: float = 600.0,
    ) -> None:  # fmt: skip
        self.method, self.host, self.send_s = method, host, send_s
        self._model, self._dtype = model, dtype
        self._links: dict[int, Link] = {}
        if method in ("nccl", "ipc") and not torch.cuda.is_available():
            raise ConfigError(
                f"rollout.sync = {method!r} and the trainer has no GPU", "'files' or 'gloo'", "change rollout.sync"
            )
        if method != "ipc":
            self._listener().close()

    def prepare(self, version: int, tag: str) -> Load:
        """Copy the student's weights: to the CPU for gloo, in place otherwise."""
        device = torch.device("cpu") if self.method == "gloo" else None
        copies = {}
        # By storage, not by name: an expert's tensor in a checkpoint is a view into a larger one of the model's.
        live = {own.untyped_storage().data_ptr() for own in (*self._model.parameters(), *self._model.buffers())}
        for name, tensor in checkpoint_tensors(self._model, self._dtype).items():
            moved = tensor if device is None else tensor.to(device)
            shared = moved.untyped_storage().data_ptr() in live
            copies[name] = moved.clone(memory_format=torch.contiguous_format) if shared else moved.contiguous()
        if self.method == "ipc":
            torch.cuda.synchronize()
        return Sending(self, copies)

    def close(self) -> None:
        for link in list(self._links.values()):  # the servers' thread may still let go of one
            link.cut()
        self._links.clear()

    # --- meeting -----------------------------------------------------------------------------------------------------

    async def link(self, control: Control, *, anew: bool) -> Link:
        """The group of a server; made where there is none, or where it is another process than before."""
        key = id(control.endpoint)
        if anew and key in self._links:
            self.drop(control)
        if key not in self._links:
            self._links[key] = await self._meet(control)
        return self._links[key]

    def drop(self, control: Control) -> None:
        """A group in which something went wrong is of no use any more."""
        if (link := self._links.pop(id(control.endpoint), None)) is not None:
            link.cut()

    async def _meet(self, control: Control) -> Link:
        world = 1 + await control.world_size()
        limit = timedelta(seconds=self.send_s)
        listener = self._listener()
        port = listener.getsockname()[1]
        store = torch.distributed.TCPStore(
            self.host, port, world, is_master=True, timeout=timedelta(seconds=MEET_S), wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        asked = asyncio.ensure_future(
            control.init_transfer(
                {"method": self.method, "host": self.host, "port": port, "world_size": world, "timeout_s": self.send_s}
            )
        )
        try:
            async with asyncio.timeout(MEET_S):
                # Only once all are there: the group's constructor could not be called off.
                while not store.check([f"here/{rank}" for rank in range(1, world)]):
                    if asked.done():
                        asked.result()
                    await asyncio.sleep(0.01)
                group = await apart(lambda: self._group(store, world, limit))
                await asked
        except TimeoutError:
            raise Fault("timeout", f"its workers did not reach the trainer at {self.host} in {MEET_S:g} s") from None
        finally:
            asked.cancel()
        return Link(group, store)

    def _group(self, store: Any, world: int, limit: timedelta) -> Any:
        if self.method == "nccl":
            nccl = torch.distributed.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            return torch.distributed.ProcessGroupNCCL(store, 0, world, nccl)
        gloo: Any = torch.distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._timeout = [gloo.create_device(hostname=self.host)], limit
        return gloo(store, 0, world, options)

    def _listener(self) -> socket.socket:
        """A port of this machine, on the one interface that servers are told of."""
        listener: socket.socket | None = None
        try:
            address = socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(address[0], socket.SOCK_STREAM)
            listener.bind(address[4])
            listener.listen(128)
        except OSError as error:
            if listener is not None:
                listener.close()
            raise ConfigError(
                f"rollout.sync_host = {self.host!r}: {error.strerror or error}",
                "an address of the trainer's machine that the servers reach", "set rollout.sync_host",
            ) from None  # fmt: skip
        return listener


class Sending:
    """Sends one version to a server; a ``carrier.Load``."""

    def __init__(self, native: Native, tensors: dict[str, Tensor]) -> None:
        self.native, self.tensors = native, tensors

    async def __call__(self, control: Control) -> None:
        native, described = self.native, self._described()
        if native.method == "ipc":
            await control.init_transfer({"method": "ipc"})
            await control.start_update()
            await control.update_weights({**described, "handles": [ipc_handle(each) for each in self.tensors.values()]})
            await control.finish_update()
            return
        # Who says "default" has been started since: the group was another process's.
        link = await native.link(control, anew=await control.weight_version() == "default")
        try:
            await control.start_update()
            await self._both(control.update_weights(described), link)
            await control.finish_update()
        except BaseException:
            native.drop(control)
            raise

    async def _both(self, receiving: Any, link: Link) -> None:
        """The server's request and our broadcast go on together; if one fails the other is not waited for."""
        asked, sent = asyncio.ensure_future(receiving), asyncio.ensure_future(apart(lambda: self._broadcast(link)))
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it by then
        try:
            done, _ = await asyncio.wait((asked, sent), return_when=asyncio.FIRST_EXCEPTION)
            if asked in done:  # what the server says of a failure tells more than that the connection broke
                asked.result()
            elif (error := sent.exception()) is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(2.0):
                        await asked
                raise error
            sent.result()
        except RuntimeError as error:
            raise Fault("connection", " ".join(str(error).split())[:200]) from None
        finally:
            asked.cancel()

    def _broadcast(self, link: Link) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for tensor in self.tensors.values():
            link.group.broadcast([tensor], options).wait()
        if self.native.method == "nccl":
            torch.cuda.synchronize()

    def _described(self) -> dict[str, Any]:
        return {
            "names": list(self.tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()],
            "shapes": [list(tensor.shape) for tensor in self.tensors.values()],
        }


def ipc_handle(tensor: Tensor) -> dict[str, Any]:
    """What another process on the same GPU needs to open a tensor, as JSON. The tensor must live until it has.

    Args:
        tensor: on a GPU.

    Source: torch/multiprocessing/reductions.py, ``reduce_tensor``.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    _, parts = reduce_tensor(tensor)
    (_, _, stride, offset, _, _, device, storage, size, place, _, counter, counter_offset, event, sync) = parts
    return {
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
        "stride": list(stride),
        "offset": offset,
        "storage": base64.b64encode(storage).decode(),
        "storage_bytes": size,
        "storage_offset": place,
        "counter": base64.b64encode(counter).decode(),
        "counter_offset": counter_offset,
        "event": base64.b64encode(event).decode(),
        "event_sync": sync,
    }


async def apart(work: Callable[[], Answer]) -> Answer:
    """Run something that blocks in a daemon thread: one that never returns keeps neither loop nor interpreter."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Answer] = loop.create_future()

    def tell(answer: Answer | None, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(answer)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

    def run() -> None:
        answer, error = None, None
        try:
            answer = work()
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, answer, error)

    threading.Thread(target=run, name="scope-weights", daemon=True).start()
    return await future
