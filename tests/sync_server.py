"""``SamplingServer`` with vLLM's development routes: it takes new weights as vLLM does, and records every call.

Weights arrive for real: a folder is read, a broadcast received over gloo. The order of calls is on record, and calls
that vLLM would not survive, or that would leave old keys and values in use, are what tests look for. Not covered: CUDA.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fault_server import Table
from sampling_server import SamplingServer, Weights

GONE = "gone"


class SyncServer(SamplingServer):
    """
    Args:
        weights: what it was started with.

    Attributes:
        calls: path and what it said, in order; GET /weight_info is left out.
        fail: path -> statuses to answer next, before anything is done; 0 does the work and then resets the connection.
        stuck: paths that are never answered.
        broken: weights are taken, but not those that were sent.
        extension, transfer: it was started with the worker extension, with the transfer backend.
    """

    def __init__(self, weights: Weights, **more: Any) -> None:
        super().__init__(weights, **more)
        self.calls: list[str] = []
        self.fail: dict[str, list[int]] = {}
        self.stuck: set[str] = set()
        self.broken = self.asleep = self.paused = False
        self.extension = self.transfer = True
        self.awake = {"weights", "kv_cache"}
        self.stale_cache = False
        self._group: Any = None
        self._update: dict[str, torch.Tensor] | None = None

    def counted(self) -> Counter[str]:
        return Counter(call.partition("?")[0].partition(" ")[0] for call in self.calls)

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        split = urlsplit(path)
        name, query = split.path.removeprefix(self.prefix), dict(parse_qsl(split.query))
        if not self.development or name.startswith("/v1"):
            if "prompt_logprobs" in (json.loads(body) if body else {}) and (self.paused or self.stale_cache):
                return await self._error(writer, 500, "asked while paused, or with old keys and values")
            return await super()._answer(method, path, headers, body, writer)
        if name == "/weight_info":
            return await self._send(writer, 200, {"weight_version": self.weights.tag})
        said = "".join(f"?{key}={value}" for key, value in query.items())
        request = json.loads(body) if body else {}
        if name == "/collective_rpc":
            said = f" {request['method']}"
        self.calls.append(name + said)
        if name in self.stuck:
            await asyncio.sleep(30)
        status = self.fail[name].pop(0) if self.fail.get(name) else 200
        if status not in (0, 200):
            return await self._error(writer, status, "told to fail")
        try:
            answer = await asyncio.get_running_loop().run_in_executor(None, self._do, name, query, request)
        except RuntimeError as error:  # the broadcast broke off: a worker's error, which vLLM answers with 500
            answer = str(error)
        if status == 0:
            self._reset(writer)
            return False
        if isinstance(answer, str):
            return await self._error(writer, 404 if answer == "404" else 500, answer)
        return await self._send(writer, 200, answer)

    # --- the routes --------------------------------------------------------------------------------------------------

    def _do(self, name: str, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any] | str:
        action = getattr(self, "_do_" + name.strip("/"), None)
        return "404" if action is None else action(query, request)

    def _do_pause(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self.gate.clear()
        self.paused = True
        return {"status": "paused"}

    def _do_resume(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self.paused = False
        self.gate.set()
        return {"status": "resumed"}

    def _do_reset_prefix_cache(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self.stale_cache = False
        return {"success": True}

    def _do_update_weight_version(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self.weights.tag = request["new_version"]
        return {"success": True}

    def _do_is_sleeping(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        return {"is_sleeping": self.asleep}

    def _do_sleep(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self.asleep, self.paused, self.awake, self.stale_cache = True, True, set(), False
        self._take({key: torch.zeros_like(value) for key, value in self.weights.model.state_dict().items()})
        self.stale_cache = False
        return {"status": "sleeping"}

    def _do_wake_up(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self.awake.add(query["tags"])
        if self.awake == {"weights", "kv_cache"}:
            self.asleep = self.paused = self.stale_cache = False
        return {"status": "awake"}

    def _do_collective_rpc(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any] | str:
        if not self.extension:
            return f"Method {request['method']!r} is not implemented"
        folder, tag = Path(request["kwargs"]["folder"]), request["kwargs"]["tag"]
        file = folder / "model.safetensors"
        if not file.exists():
            return {"results": [{"error": f"{folder} has no *.safetensors on the server's machine", "untouched": True}]}
        with safe_open(file, "pt") as content:
            assert content.metadata()["scope_tag"] == tag
        self._take(load_file(file))
        return {"results": [{"tag": tag}]}

    def _do_get_world_size(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        return {"world_size": 1}

    def _do_init_weight_transfer_engine(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any] | str:
        if not self.transfer:
            return "Weight transfer not configured. Please set weight_transfer_config to enable weight transfer."
        info, self._group = request["init_info"], None
        limit = timedelta(seconds=10)
        store = torch.distributed.TCPStore(info["host"], info["port"], info["world_size"], False, limit)
        store.set("here/1", "")
        gloo: Any = torch.distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._timeout = [gloo.create_device(hostname="127.0.0.1")], limit
        self._group = gloo(store, 1, info["world_size"], options)
        return {}

    def _do_start_weight_update(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        self._update = {}
        return {}

    def _do_update_weights(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any] | str:
        update = request["update_info"]
        if self._group is None or self._update is None:
            return "init_weight_transfer_engine comes first"
        options = torch.distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for count, (name, kind, shape) in enumerate(
            zip(update["names"], update["dtypes"], update["shapes"], strict=True)
        ):
            if GONE in self.stuck and count == 3:
                self._group = None
                return "the worker failed in the middle"
            self._update[name] = torch.empty(shape, dtype=getattr(torch, kind))
            self._group.broadcast([self._update[name]], options).wait()
        return {}

    def _do_finish_weight_update(self, query: dict[str, str], request: dict[str, Any]) -> dict[str, Any]:
        assert self._update is not None
        self._take(self._update)
        return {}

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        model = copy.deepcopy(self.weights.model)
        if not self.broken:
            missing = model.load_state_dict(tensors, strict=False).missing_keys
            assert set(missing) <= {"lm_head.weight"}, missing
            model.tie_weights()
        self.weights = Weights(model, self.weights.tag)
        self.table = Table(model)
        self.loads.append(threading.current_thread().name)
        self.stale_cache = True
