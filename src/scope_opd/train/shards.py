"""What one rank writes of a checkpoint, and reads of one, in the format of ``torch.distributed.checkpoint``.

A checkpoint's tensors are one flat dict: ``weights.<parameter>``, ``states.<parameter>/<state>``, ``rng.<rank>.<..>``.
They are the run's own memory, sharded as it is: saving copies a rank's shards to CPU memory, loading overwrites them in
place, whatever the world was that wrote them. A tensor that several ranks hold is written by one of them; tied weights
are one parameter, and there once. Frozen weights are not saved: they come from the model that the run began with.

``Shards`` registers what ranks do together: plan a save (rank 0 deals the shards out), copy, write, tell what failed,
load. Nothing that saves uses a collective, so a rank can write in a thread while it trains.

Not covered: when a checkpoint counts as one (``checkpoint``), states of another optimiser, 8-bit states that the ranks
of today would cut otherwise.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.ranks import Ranks
from scope_opd.train.optim import Optimizer

WEIGHTS, STATES = "weights.", "states."
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What torch and the system raise where a disk takes no more."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has written.

    Attributes:
        results: where each shard stands.
        files: sha256 and size of each file.
    """

    results: list[WriteResult]
    files: dict[str, dict[str, Any]]


class Shards:
    """A rank's weights and states as parts of checkpoints; registers the jobs of saving and loading.

    Args:
        ranks: the processes of the run.
        model: what is trained, sharded or not.
        optimizer: its optimiser.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: Optimizer) -> None:
        self.ranks, self.model, self.optimizer = ranks, model, optimizer
        self._planner: _Planner | None = None
        self._folder = Path()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        ranks.register("save/plan", self.plan)
        ranks.register("save/copy", self.copy)
        ranks.register("save/failed", self.failed)
        ranks.register("load", self.load)
        ranks.register("check", lambda files: [check_file(*file) for file in files])

    def plan(self, rng: Mapping[str, Tensor] | None) -> SavePlan:
        """Job: which shards are here.

        Args:
            rng: random states to save in place of this rank's present ones.
        """
        tensors = {
            **{f"{WEIGHTS}{name}": tensor for name, tensor in trained_weights(self.model).items()},
            **{f"{STATES}{name}": tensor for name, tensor in self.optimizer.states().items()},
            **{f"rng.{self.ranks.rank}.{name}": state for name, state in (rng or rng_state()).items()},
        }
        self._planner = _Planner(tensors, self.ranks.leads)
        return self._planner.create_local_plan()

    def copy(self, share: tuple[Path, SavePlan]) -> None:
        """Job: copy what rank 0 dealt to this rank to CPU memory; other ranks than 0 begin to write it."""
        assert self._planner is not None, "nothing was planned"
        assert self._thread is None, "the save before is still under way"
        self._folder, self._failure = share[0], None
        self._planner.copy(share[1])
        if not self.ranks.leads:
            self._thread = threading.Thread(target=self._write_apart, name="scope-checkpoint", daemon=True)
            self._thread.start()

    def write(self) -> Part:
        """Write what was copied and force it to disk.

        Raises:
            Exception: one of ``DISK_ERRORS``, if the disk takes no more.
        """
        assert self._planner is not None
        try:
            writer = FileSystemWriter(self._folder)
            future = writer.write_data(self._planner.plan, self._planner)
            future.wait()
            results: list[WriteResult] = future.value()
        finally:
            self._planner = None
        names = {result.storage_data.relative_path for result in results}
        return Part(results, {name: file_facts(self._folder / name) for name in sorted(names)})

    def _write_apart(self) -> None:
        """In a thread of another rank than 0, which finds the part on the disk as soon as it is there."""
        try:
            part = self.write()
            target = part_file(self._folder, self.ranks.rank)
            unfinished = target.with_suffix(".new")
            unfinished.write_bytes(pickle.dumps(part))
            unfinished.rename(target)
        except Exception as error:
            self._failure = reason(error)

    def failed(self, wait: bool) -> str | None:
        """Job: why this rank could not write its part; None where it could, or still writes.

        Args:
            wait: until it writes no more.
        """
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
        return self._failure

    def load(self, folder: Path) -> None:
        """Job: overwrite weights, optimiser states and this rank's random states with those of a checkpoint.

        Raises:
            ValueError: names, shapes or dtypes of weights or states differ from this run's. Nothing was overwritten.
            RunFolderError: states of 8 bits that so many ranks keep in full, or the other way round. The same.
        """
        reader = FileSystemReader(folder)
        metadata = reader.read_metadata()
        saved = metadata.state_dict_metadata
        weights = {f"{WEIGHTS}{name}": tensor for name, tensor in trained_weights(self.model).items()}
        _refuse_others(weights, {name: about for name, about in saved.items() if name.startswith(WEIGHTS)})
        names = [name.removeprefix(STATES) for name in saved if name.startswith(STATES)]
        if (odd := self.optimizer.cut_otherwise(names)) is not None:
            wrote = len({name.split(".")[1] for name in saved if name.startswith("rng.")})
            raise RunFolderError(
                f"checkpoint {folder}: its 8-bit states of {odd} are cut as the {wrote} ranks that saved it cut them, "
                f"not as these {self.ranks.world} do",
                f"{wrote} ranks, train.shard and ranks a machine as they were",
                "start as many in the same way",
            )
        states = self.optimizer.make_states(names) if names else {}
        target = weights | {f"{STATES}{name}": tensor for name, tensor in states.items()}
        _refuse_others(target, {name: about for name, about in saved.items() if name.startswith((WEIGHTS, STATES))})
        prefix = f"rng.{self.ranks.rank}."
        rng = {f"{prefix}{name}": state for name, state in rng_state().items() if f"{prefix}{name}" in saved}
        with torch.no_grad():
            read_tensors(reader, metadata, target | rng)
        restore_rng_state({name.removeprefix(prefix): state for name, state in rng.items()})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Overwrite a whole model's trained weights with those of a checkpoint, whoever wrote it, tensor by tensor.

    Raises:
        ValueError: names, shapes or dtypes differ. Nothing was overwritten.
    """
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    weights = {f"{WEIGHTS}{name}": tensor for name, tensor in trained_weights(model).items()}
    saved = metadata.state_dict_metadata
    _refuse_others(weights, {name: about for name, about in saved.items() if name.startswith(WEIGHTS)})
    with torch.no_grad():
        read_tensors(reader, metadata, weights)


class _Planner(DefaultSavePlanner):
    """Plans a save of a flat dict, and hands out copies of what it held when ``copy`` was called."""

    def __init__(self, tensors: dict[str, Tensor], leads: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(tensors, is_coordinator=leads)
        self._copies: dict[MetadataIndex, Tensor] = {}

    def copy(self, plan: SavePlan) -> None:
        """Keep copies in CPU memory of all that ``plan`` gives to this rank; the tensors themselves are let go."""
        self.finish_plan(plan)
        on_gpu = False
        with torch.no_grad():
            for item in plan.items:
                tensor = self.lookup_object(item.index).detach()
                on_gpu |= tensor.is_cuda
                self._copies[item.index] = _to_cpu(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


def _to_cpu(tensor: Tensor) -> Tensor:
    """A copy in CPU memory of its own; from a GPU it may still be on its way."""
    if not tensor.is_cuda:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def part_file(folder: Path, rank: int) -> Path:
    """Where another rank than 0 leaves its pickled ``Part`` for rank 0."""
    return folder / f".part-{rank}"


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained and buffers that belong to the model, each once and under its first name."""
    held = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in held}
    return {name: value for name, value in model.named_parameters() if value.requires_grad} | buffers


def _refuse_others(own: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    if own.keys() != saved.keys():
        odd = sorted(name.partition(".")[2] for name in own.keys() ^ saved.keys())
        raise ValueError(f"weights differ by name: {', '.join(odd[:4])}")
    for name, tensor in own.items():
        about = saved[name]
        assert isinstance(about, TensorStorageMetadata)
        if tensor.shape != about.size or tensor.dtype != about.properties.dtype:
            raise ValueError(
                f"{name.partition('.')[2]} is {about.properties.dtype}{list(about.size)}; expected "
                f"{tensor.dtype}{list(tensor.shape)}"
            )


def read_tensors(reader: FileSystemReader, metadata: Metadata, into: dict[str, Tensor]) -> None:
    """Overwrite tensors, sharded or not, with those that a checkpoint has under their names.

    Args:
        reader: of the checkpoint.
        metadata: what it says is there.
        into: of the saved shapes.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(into, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()


def rng_state() -> dict[str, Tensor]:
    """Torch's random states of this process. Sampling does not use them; a model's own code might."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: Mapping[str, Tensor]) -> None:
    """Set what is given of ``rng_state``."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def file_facts(path: Path) -> dict[str, Any]:
    """``{"sha256", "bytes"}`` of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def check_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that ought to have these ``file_facts``; None where nothing is."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes instead of {expected['bytes']}"
        if file_facts(path)["sha256"] != expected["sha256"]:
            return f"{path.name} does not have the sha256 of its manifest"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name}: {reason(error)}"
    return None


def force_to_disk(paths: Iterable[Path]) -> None:
    """fsync of files or folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def reason(error: BaseException) -> str:
    """An error as part of a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = error.found if isinstance(error, RunFailed) else str(error)
    return text.splitlines()[0] if text else type(error).__name__
