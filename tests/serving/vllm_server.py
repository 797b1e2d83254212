"""Real vLLM servers for tests: started as a user would, killed as an operator would not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from scope_opd.serving.launch import EXTENSION, INSIDE

PYTHON = os.environ.get("SCOPE_VLLM_PYTHON", "")
MODEL = "tiny"
KEY = "sk-of-the-test-servers-123"
READY_S = 400.0
STUDENT = (
    "--logprobs-mode", "processed_logprobs", "--worker-extension-cls", EXTENSION,
    "--weight-transfer-config", '{"backend": "scope"}', "--no-enable-chunked-prefill",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class VllmServer:
    """One server in a process group of its own.

    Args:
        folder: the model.
        port: None takes a free one.
        more: further command line options.
        student: with what new weights need, as ``scope serve student`` starts it.
    """

    def __init__(self, folder: Path, *more: str, port: int | None = None, student: bool = False) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - lives as long as the server
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": KEY,
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        if student:
            environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(INSIDE)}
            more = (*more, *STUDENT)
        self._process = subprocess.Popen(
            [
                PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
                "--port", str(self.port), "--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "256",
                "--max-num-seqs", "64", "--max-logprobs", "64", "--enforce-eager", *more,
            ],
            env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> VllmServer:
        """Until it answers /health."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                self._log.seek(0)
                raise RuntimeError(f"the server ended: {self._log.read()[-3000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=20).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise RuntimeError("the server did not get ready")

    def kill(self) -> None:
        """SIGKILL for it and its workers. May be called twice."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) != 0:
                    return
            time.sleep(0.05)
