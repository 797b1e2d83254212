"""``scope export``: a checkpoint to a folder that transformers and vLLM load.

Not covered: other formats (GGUF), quantisation.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from scope_opd.errors import ConfigError, ModelError, RunFolderError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scope_opd.config import Config

EXAMPLES = """Examples:
  scope export runs/mine --out models/mine
  scope export runs/mine --out models/best --best
  scope export runs/mine/checkpoints/step-000050 --out models/step50
"""


def export(
    source: Path,
    /,
    *,
    out: Path,
    best: Annotated[bool, Parameter(negative="")] = False,
    step: int | None = None,
) -> int:
    """Write a checkpoint's student as a Hugging Face folder.

    What transformers and vLLM load: weights in the dtype they train in
    (adapters merged), config, tokenizer, a model card. Any number of ranks
    may have written the checkpoint. The configured model.path is needed for
    config and tokenizer, and for weights that were not trained.

    Parameters
    ----------
    source
        A run folder (its newest checkpoint) or the folder of a checkpoint.
    out
        The folder to write; it must not hold anything.
    best
        The checkpoint of the best evaluation (run.keep_best).
    step
        The checkpoint of this step.
    """
    from scope_opd.config import validate_config
    from scope_opd.records import iter_jsonl
    from scope_opd.train.checkpoint import DamagedCheckpoint, read_checkpoint
    from scope_opd.train.shards import load_weights

    source, out = source.expanduser(), out.expanduser()
    if step is not None and step < 0:
        raise ConfigError(f"--step {step}", "a number from 0", "name the step of a checkpoint")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file", "a folder that does not exist yet", "choose another")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty", "a folder that does not exist yet", "choose another")
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out} is under a file, {above}", "a folder that can be made", "choose another")
    run, folder = find_checkpoint(source, best=best, step=step)
    try:
        checkpoint = read_checkpoint(folder)
    except DamagedCheckpoint as damage:
        raise RunFolderError(
            f"checkpoint {folder} is damaged ({damage})", "a sound one", "take another with --step"
        ) from None
    config = validate_config(checkpoint.trainer["config"])

    from scope_opd.cli.inputs import student_tokenizer
    from scope_opd.models.adapters import add_adapters
    from scope_opd.models.fingerprint import weights_digest
    from scope_opd.train.export import export_model

    model = empty_student(config)
    if config.model.lora.rank:
        known = checkpoint.trainer.get("models", {}).get("student", {}).get("weights")
        if known is not None and weights_digest(model) != known:
            raise ModelError(
                f"model.path = {config.model.path!r} holds other weights than the run's adapters were trained on",
                "the model that the run began with",
                "put it back",
            )
        add_adapters(model, config.model.lora, seed=config.run.seed)
    try:
        load_weights(model, folder)
    except ValueError as error:
        raise ModelError(
            f"checkpoint {folder}: {error}", f"weights of model.path = {config.model.path!r}", "put that model back"
        ) from None
    evaluations = run / "eval.jsonl"
    rows = [row for _, row in iter_jsonl(evaluations)] if evaluations.exists() else []
    export_model(
        out, model, student_tokenizer(config), config=config, steps=checkpoint.step,
        metrics=checkpoint.trainer["last_row"], evaluations=[row for row in rows if row["step"] <= checkpoint.step],
    )  # fmt: skip
    print(f"step {checkpoint.step} of {run}: {out}")
    return 0


def find_checkpoint(source: Path, *, best: bool, step: int | None) -> tuple[Path, Path]:
    """The run folder and the checkpoint that are meant.

    Raises:
        RunFolderError: there is none.
        ConfigError: more than one is named.
    """
    from scope_opd.train.checkpoint import MANIFEST, checkpoint_name, list_checkpoints, read_json

    if best and step is not None:
        raise ConfigError(f"--best and --step {step}", "one of them", "leave one out")
    if (source / MANIFEST).exists():
        if best or step is not None:
            raise ConfigError(f"{source} is a checkpoint", "a run folder with --best or --step", "leave them out")
        return source.resolve().parent.parent, source
    known = dict(list_checkpoints(source / "checkpoints"))
    if not known:
        raise RunFolderError(f"{source} has no checkpoint", "a run folder or the folder of a checkpoint", "check it")
    if best:
        found = read_json(source / "run.json").get("best")
        if not isinstance(found, dict):
            raise RunFolderError(
                f"{source} has no best checkpoint",
                "a run with run.keep_best",
                f"take one of {_steps(known)} with --step",
            )
        step = found.get("step")
    wanted = max(known) if step is None else step
    if wanted not in known:
        raise RunFolderError(
            f"{source} has no checkpoint {checkpoint_name(wanted)}", f"one of {_steps(known)}", "choose one of them"
        )
    return source, known[wanted]


def empty_student(config: Config) -> PreTrainedModel:
    """The student of a config on the CPU, its weights to be overwritten: read only where some are frozen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from scope_opd.cli.engines import load_student
    from scope_opd.models.places import resolve_path

    if config.model.lora.rank:
        return load_student(config, torch.device("cpu"))
    about = config.model
    options: dict[str, Any] = {"trust_remote_code": about.trust_remote_code}
    options |= {"revision": about.revision} if about.revision is not None else {}
    try:
        target = resolve_path(about.path)
        shape = AutoConfig.from_pretrained(target, **options)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                shape, dtype=getattr(torch, config.train.param_dtype), trust_remote_code=about.trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.path = {about.path!r}: {str(error).splitlines()[0]}", "the folder or hub id of the run",
            "put it back: config and tokenizer come from there",
        ) from None  # fmt: skip
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(target, **options)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.eval()


def _steps(known: dict[int, Path]) -> str:
    return ", ".join(str(step) for step in sorted(known))
