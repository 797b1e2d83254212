"""The development routes of one vLLM server: pausing, new weights, caches, sleep. None of them is behind its key.

They exist where the server runs with VLLM_SERVER_DEV_MODE=1. Each call has a time limit and turns what can go wrong
into a ``Fault`` (to be tried again) or ``Refused`` (a setting is wrong). All coroutines run in the client's loop.
Not covered: in which order they are called (``rollout.weight_sync``).

Source: vLLM 0.32, entrypoints/rl/online/api_router.py, entrypoints/serve/dev/*/api_router.py.
"""

from __future__ import annotations

import json
from typing import Any, Literal
from urllib.parse import urlencode

from scope_opd.serving.faults import BadAnswer, Fault, Refused
from scope_opd.serving.http import HttpClient
from scope_opd.serving.pool import Endpoint
from scope_opd.serving.secrets import redact
from scope_opd.serving.vllm import error_message

PauseMode = Literal["wait", "keep", "abort"]
QUICK_S = 60.0
"""For calls that only flip a switch."""
_REMEDY = "start it with VLLM_SERVER_DEV_MODE=1, reachable by nobody else (scope serve student does)"


class Control:
    """The development routes of ``endpoint``.

    Args:
        http: the client.
        endpoint: the server.
        load_s: time limit of calls that move weights or wait for responses to end; all others have ``QUICK_S``.
    """

    def __init__(self, http: HttpClient, endpoint: Endpoint, *, load_s: float = 600.0) -> None:
        self.http, self.endpoint, self.load_s = http, endpoint, load_s

    async def pause(self, mode: PauseMode) -> None:
        """Sample no further token. "wait": once all responses have ended; "keep": at once, those under way stay and go
        on at ``resume``; "abort": at once, and they end."""
        await self._post("/pause", self.load_s, query={"mode": mode})

    async def resume(self) -> None:
        await self._post("/resume")

    async def reset_prefix_cache(self) -> None:
        """Forget all keys and values, those of responses under way too: they are computed anew from their tokens.

        Raises:
            Fault: the server kept some.
        """
        answer = await self._post("/reset_prefix_cache", query={"reset_running_requests": "true"})
        if answer.get("success") is not True:
            raise Fault("cache", "the prefix cache could not be reset")

    async def reload(self, folder: str, tag: str) -> dict[str, Any]:
        """Have every worker read a folder, by the worker extension ``serving/inside/scope_vllm.py``.

        Returns:
            ``{}``, or the first worker's ``{"error": ..., "untouched": bool}``.

        Raises:
            Refused: the server runs without the extension.
        """
        try:
            answer = await self._post(
                "/collective_rpc", self.load_s, {"method": "scope_reload", "kwargs": {"folder": folder, "tag": tag}}
            )
        except Fault as fault:
            if "scope_reload" in fault.message:
                raise Refused(
                    f"{self.endpoint.url} knows no scope_reload", "a server with SCOPE's worker extension",
                    "start it with --worker-extension-cls scope_vllm.WeightReload (scope serve student does)",
                ) from None  # fmt: skip
            raise
        results = answer.get("results")
        if not isinstance(results, list) or not results or not all(isinstance(each, dict) for each in results):
            raise BadAnswer("POST /collective_rpc has no results")
        failed: list[dict[str, Any]] = [each for each in results if each.get("tag") != tag]
        # Where one worker changed its weights and another did not, the server holds a mixture.
        mixed = len(failed) < len(results) or not all(each.get("untouched") for each in failed)
        if not failed:
            return {}
        said = redact(str(failed[0].get("error", "no reason given")), [self.endpoint.key])
        return {"error": said, "untouched": not mixed}

    async def weight_version(self) -> str:
        """What the server calls its weights: "default" after a start."""
        answer = await self._ask("GET", "/weight_info", QUICK_S)
        if "weight_version" not in answer:
            raise BadAnswer("GET /weight_info has no weight_version")
        return str(answer["weight_version"])

    async def set_weight_version(self, tag: str) -> None:
        await self._post("/update_weight_version", body={"new_version": tag})

    async def sleep(self) -> None:
        """Give all memory of the GPU back, weights and cache; responses under way are aborted."""
        await self._post("/sleep", self.load_s, query={"level": "2"})

    async def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory again: uninitialised. When both parts are awake, sampling goes on by itself."""
        await self._post("/wake_up", self.load_s, query={"tags": part})

    # --- weight transfer ---------------------------------------------------------------------------------------------

    async def world_size(self) -> int:
        """Workers of this server, over all its devices."""
        size = (await self._ask("GET", "/get_world_size", QUICK_S)).get("world_size")
        if type(size) is not int or size < 1:
            raise BadAnswer(f"world_size {size!r}")
        return size

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """
        Raises:
            Refused: the server was started without a weight transfer backend.
        """
        try:
            await self._post("/init_weight_transfer_engine", self.load_s, {"init_info": init_info})
        except Fault as fault:
            if "not configured" in fault.message:
                raise Refused(
                    f"{self.endpoint.url} takes no weights over a connection", "one with SCOPE's transfer backend",
                    """start it with --weight-transfer-config '{"backend": "scope"}' (scope serve student does)""",
                ) from None  # fmt: skip
            raise

    async def start_update(self) -> None:
        await self._post("/start_weight_update", self.load_s)

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._post("/update_weights", self.load_s, {"update_info": update_info})

    async def finish_update(self) -> None:
        await self._post("/finish_weight_update", self.load_s)

    async def _post(
        self,
        path: str,
        limit_s: float = QUICK_S,
        body: dict[str, Any] | None = None,
        *,
        query: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        return await self._ask("POST", f"{path}?{urlencode(query)}" if query else path, limit_s, body)

    async def _ask(self, method: str, path: str, limit_s: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
        endpoint, what = self.endpoint, f"{method} {path.partition('?')[0]}"
        try:
            status, _, content, _ = await self.http.ask(
                method, f"{endpoint.url.root}{path}", key=endpoint.key, body=body, max_bytes=1 << 20, total_s=limit_s
            )
        except Fault as fault:
            raise Fault(fault.kind, f"{what}: {fault.message}", retry_after_s=fault.retry_after_s) from None
        message = redact(error_message(content), [endpoint.key])
        if status == 404:
            raise Refused(f"{endpoint.url.root} has no route {what}", "vLLM's development routes", _REMEDY)
        if status in (401, 403):
            raise Refused(f"{endpoint.url.root} answers {what} with {status}", "its key", f"set {endpoint.names.key}")
        if status != 200:
            raise Fault(f"status {status}", f"{what}: {message}")
        try:
            answer = json.loads(content) if content.strip() else {}
        except (ValueError, RecursionError):
            raise BadAnswer(f"{what}: not JSON") from None
        return answer if isinstance(answer, dict) else {}
