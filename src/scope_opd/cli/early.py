"""What can be known of a command's input before torch is loaded, which takes seconds: paths, names, files.

Every check is that of the code which later reads the thing. Not covered: what is in models and data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from scope_opd.config import Config
from scope_opd.data.files import check_file
from scope_opd.data.hub import is_hub, parse_hub
from scope_opd.data.prompts import read_template
from scope_opd.errors import ConfigError, RunFolderError
from scope_opd.models.places import check_device_name, resolve_path

ZOO = "zoo"


def check_early(config: Config, sources: Iterable[str | None]) -> None:
    """Refuse a model, tokenizer, device, template or data source that cannot be there.

    Args:
        config: names all but the sources.
        sources: files, hub data sets, the zoo; None is none.

    Raises:
        ScopeError: as reading it would.
    """
    resolve_path(config.model.path)
    if config.model.tokenizer is not None:
        resolve_path(config.model.tokenizer)
    check_device_name(config.train.device)
    _check_extras(config)
    read_template(config.chat)
    for source in sources:
        if source is None or source == ZOO:
            continue
        if is_hub(source):
            parse_hub(source)
        else:
            check_file(Path(source).expanduser())


def check_run_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a run folder that the run could not use: an occupied one is worth knowing of before minutes of loading.

    Raises:
        RunFolderError: occupied, in use, or not writable.
    """
    if folder.exists():
        from scope_opd.train.runfolder import RunFolder

        RunFolder.open(folder, resume=resume).close()
        return
    from scope_opd.cli.checks import writable

    if not writable(folder):
        raise RunFolderError(f"run folder {folder}", "a folder that can be written", "choose another run.dir")


def _check_extras(config: Config) -> None:
    """Optional libraries that the config needs."""
    for setting, wanted, library, extra in (
        (f"model.lora.rank = {config.model.lora.rank}", config.model.lora.rank > 0, "peft", "lora"),
        ("train.optimizer = 'adamw_8bit'", config.train.optimizer == "adamw_8bit", "torchao", "low-bit"),
    ):
        if wanted and importlib.util.find_spec(library) is None:
            raise ConfigError(f"{setting} and {library} is not installed", library, f"pip install 'scope-opd[{extra}]'")


def eval_source(config: Config) -> str | None:
    """Where held-out problems come from; the zoo brings its own. None where the config wants no evaluation.

    Raises:
        ConfigError: an evaluation is asked for and there are no problems for it.
    """
    if not (config.eval.every or config.eval.at_start or config.eval.at_end):
        return None
    source = config.data.eval or (ZOO if config.data.train == ZOO else None)
    if source is None:
        raise ConfigError(
            "[eval] asks for an evaluation and data.eval is not set", "a file of held-out problems", "set data.eval"
        )
    return source
