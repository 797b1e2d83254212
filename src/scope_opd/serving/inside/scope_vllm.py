"""New weights for a running vLLM server. Runs inside the server: it is started with this folder on PYTHONPATH and
``--worker-extension-cls scope_vllm.WeightReload``, and imports torch, safetensors and vLLM, nothing else of SCOPE.

Two ways in. ``scope_reload`` (POST /collective_rpc) reads a folder. ``SyncEngine`` is a weight transfer backend of the
name "scope" (``--weight-transfer-config '{"backend": "scope"}'``) for vLLM's routes /init_weight_transfer_engine,
/start_weight_update, /update_weights, /finish_weight_update: the trainer broadcasts with torch's own gloo or NCCL, or
hands over CUDA IPC handles, so that it needs no vLLM.

Both load layer by layer as vLLM's ``reload_weights`` does, and then do what that leaves out: on a CPU a linear layer
multiplies with a packed copy of its weight, made when its own weight is loaded; a head that shares its weight with the
embedding gets none of its own on a reload, and would keep the old copy. Parameters that no tensor reached are an error.

Not covered: LoRA, draft models, weights in a kernel's own format.

Source: vLLM 0.32, model_executor/model_loader/reload/layerwise.py (``_layerwise_process`` packs; where nothing was
loaded ``finalize_layerwise_processing`` only puts the old tensors back), layers/utils.py
(``dispatch_cpu_unquantized_gemm`` makes the copy), layers/vocab_parallel_embedding.py (``tie_weights`` shares the
parameter).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from socket import getaddrinfo
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import layerwise

TAG = "scope_tag"
"""Key in a weight file's metadata: which version of which run it holds."""


class Reload:
    """One replacement of all weights of a model."""

    def __init__(self, model: Any, model_config: Any) -> None:
        self._model, self._config = model, model_config
        _abandon(model)
        self._expected = {name for name, _ in model.named_parameters()}
        self._loaded: set[str] = set()
        layerwise.initialize_layerwise_reload(model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take some tensors, named as in a Hugging Face checkpoint."""
        with disable_mtp_completeness_check():
            self._loaded |= set(self._model.load_weights(weights) or ())

    def finish(self) -> list[str]:
        """Put everything in place; returns the parameters that no tensor reached."""
        layerwise.finalize_layerwise_reload(self._model, self._config)
        _repack_shared(self._model)
        return sorted(self._expected - self._loaded)


def _abandon(model: nn.Module) -> None:
    """Undo what a reload that broke off left behind: tensors that it had taken would be counted as the new ones."""
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()


def _repack_shared(model: nn.Module) -> None:
    """Make the packed copy of every weight that several layers share anew."""
    users: dict[int, list[Any]] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.numel() and callable(getattr(layer, "cpu_linear", None)):
            users.setdefault(id(weight), []).append(layer)
    for layers in users.values():
        for layer in layers if len(layers) > 1 else ():
            layer.quant_method.process_weights_after_loading(layer)


class WeightReload:
    """Mixed into vLLM's worker class."""

    def scope_reload(self, folder: str, tag: str) -> dict[str, Any]:
        """Replace all weights by those of ``folder``/*.safetensors.

        Args:
            folder: as this machine sees it.
            tag: must stand in each file's metadata: a file system that still shows an older folder is found out.

        Returns:
            ``{"tag": tag}``, or ``{"error": ...}``: an exception would end the server. Before any weight was touched
            where it says ``"untouched": True``.
        """
        worker: Any = self
        try:
            files = sorted(Path(folder).glob("*.safetensors"))
            if not files:
                return {"error": f"{folder} has no *.safetensors on the server's machine", "untouched": True}
            for file in files:
                with safe_open(file, "pt") as content:
                    found = (content.metadata() or {}).get(TAG)
                if found != tag:
                    return {"error": f"{file} holds {found!r}, not {tag!r}", "untouched": True}
        except Exception as error:
            return {"error": f"{folder} cannot be read on the server's machine: {error}"[:500], "untouched": True}
        try:
            with set_current_vllm_config(worker.vllm_config):
                reload = Reload(worker.model_runner.get_model(), worker.model_runner.model_config)
                for file in files:
                    reload.load(_tensors(file))
                missing = reload.finish()
            _forget_derived(worker.model_runner)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        if missing:
            return {"error": f"no tensor for {', '.join(missing[:3])} ({len(missing)} parameters)"}
        return {"tag": tag}


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as content:
        for name in content.keys():  # noqa: SIM118 - no dict
            yield name, content.get_tensor(name)


def _forget_derived(runner: Any) -> None:
    """What vLLM's own reload forgets besides."""
    for name in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
        if callable(reset := getattr(runner, name, None)):
            reset()


@dataclass
class SyncInit(WeightTransferInitInfo):
    """How trainer and workers meet. ``method``: "gloo", "nccl" or "ipc" (which needs no meeting).

    The trainer is rank 0 and listens at ``host``:``port``; ``world_size`` counts it and all workers of this server.
    """

    method: str
    host: str = ""
    port: int = 0
    world_size: int = 0
    timeout_s: float = 600.0


@dataclass
class SyncUpdate(WeightTransferUpdateInfo):
    """All tensors of an update, in the order in which they are broadcast; ``handles`` for "ipc" alone."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    handles: list[dict[str, Any]] = field(default_factory=list)


class SyncEngine(WeightTransferEngine[SyncInit, SyncUpdate]):
    """Receives weights from SCOPE's trainer. See ``scope_opd.rollout.weight_sync.native`` for the other end."""

    init_info_cls, update_info_cls = SyncInit, SyncUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init: SyncInit | None = None
        self._group: Any = None
        self._reload: Reload | None = None

    def init_transfer_engine(self, init_info: SyncInit) -> None:
        self.shutdown()
        self._init = init_info
        if init_info.method == "ipc":
            return
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_s)
        store = torch.distributed.TCPStore(init_info.host, init_info.port, init_info.world_size, False, timeout)
        store.set(f"here/{rank}", "")
        if init_info.method == "nccl":
            options = torch.distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = torch.distributed.ProcessGroupNCCL(store, rank, init_info.world_size, options)
        else:
            # gloo listens where the machine's name leads to; a trainer on this machine needs no more than loopback.
            gloo: Any = torch.distributed.ProcessGroupGloo
            local = ip_address(getaddrinfo(init_info.host, None)[0][4][0]).is_loopback
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1") if local else gloo.create_default_device()]
            options._timeout = timeout
            self._group = gloo(store, rank, init_info.world_size, options)

    def start_weight_update(self) -> None:
        self._reload = Reload(self.model, self.model_config)

    def receive_weights(self, update_info: SyncUpdate) -> None:
        assert self._reload is not None, "start_weight_update comes first"
        if self._init is None:
            raise RuntimeError("init_weight_transfer_engine comes first")
        receive = self._opened if self._init.method == "ipc" else self._broadcast
        try:
            self._reload.load(receive(update_info))
        except BaseException:
            self.shutdown()  # the trainer's end learns of it: its broadcast breaks off
            raise

    def finish_weight_update(self) -> None:
        assert self._reload is not None
        missing, self._reload = self._reload.finish(), None
        if missing:
            raise RuntimeError(f"no tensor for {', '.join(missing[:3])} ({len(missing)} parameters)")

    def shutdown(self) -> None:
        self._group = None

    def _broadcast(self, update: SyncUpdate) -> Iterator[tuple[str, Tensor]]:
        assert self._init is not None
        device = self.device if self._init.method == "nccl" else torch.device("cpu")
        options = torch.distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for name, dtype, shape in zip(update.names, update.dtypes, update.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self._group.broadcast([tensor], options).wait()
            yield name, tensor

    def _opened(self, update: SyncUpdate) -> Iterator[tuple[str, Tensor]]:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        here = str(torch.cuda.get_device_properties(self.device).uuid)
        for name, dtype, shape, handle in zip(update.names, update.dtypes, update.shapes, update.handles, strict=True):
            if handle["gpu"] != here:
                raise RuntimeError(f"the trainer's tensors are on GPU {handle['gpu']}, this worker is on {here}")
            yield (
                name,
                rebuild_cuda_tensor(
                    Tensor, torch.Size(shape), tuple(handle["stride"]), handle["offset"], torch.storage.TypedStorage,
                    getattr(torch, dtype), self.device.index, base64.b64decode(handle["storage"]),
                    handle["storage_bytes"], handle["storage_offset"], False, base64.b64decode(handle["counter"]),
                    handle["counter_offset"], base64.b64decode(handle["event"]), handle["event_sync"],
                ),
            )  # fmt: skip


WeightTransferEngineFactory.register_engine("scope", SyncEngine)
