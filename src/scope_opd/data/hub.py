"""Data sets of the Hugging Face hub: ``hf:OWNER/NAME?subset=..&split=..&revision=..``, read with ``datasets``.

What is read is pinned: the revision (a branch, a tag, nothing) is first resolved to the commit that it stands for, and
that commit is loaded and reported. ``hf:./FOLDER`` or ``hf:/FOLDER`` is a folder on disk in any layout that
``datasets.load_dataset`` understands; it has no revision.

Not covered: data sets that are programs (``datasets`` runs none any more), streaming without a local copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from scope_opd.errors import DataError

PREFIX = "hf:"
SYNTAX = "hf:OWNER/NAME?subset=..&split=..&revision=.."
OPTIONS = ("subset", "split", "revision")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set by name; ``split`` may be left out where there is only one."""

    name: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it lies on disk."""
        return self.name.startswith(("/", "./", "../", "~"))

    def __str__(self) -> str:
        options = "&".join(f"{key}={value}" for key in OPTIONS if (value := getattr(self, key)))
        return f"{PREFIX}{self.name}" + (f"?{options}" if options else "")


@dataclass(frozen=True, slots=True)
class HubTable:
    """A data set that was loaded.

    Attributes:
        source: what it was asked for as.
        table: the ``datasets.Dataset``; its rows lie in a file that is mapped into memory.
        revision: the commit that was read; None where it has none or it cannot be known.
    """

    source: HubSource
    table: Any
    revision: str | None

    @property
    def names(self) -> list[str]:
        """Names of the columns, dotted ones for the members of objects."""
        return _feature_names(self.table.features)

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place, row) in order; ``names`` reads these columns alone (of dotted names, the whole object)."""
        table = self.table
        if names is not None:
            columns = table.column_names
            table = table.select_columns([c for c in columns if any(n == c or n.startswith(f"{c}.") for n in names)])
        for number, row in enumerate(table, start=1):
            yield f"row {number}", row


def is_hub(source: str) -> bool:
    """Whether a source names a hub data set rather than a file."""
    return source.startswith(PREFIX)


def parse_hub(source: str) -> HubSource:
    """Read ``hf:OWNER/NAME?subset=..&split=..&revision=..``.

    Raises:
        DataError: no name, or an unknown option.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    unknown = [key for key, value in options if key not in OPTIONS or not value]
    if not name or unknown or (query and not options):
        found = f"data set {source!r}" + (f" with {unknown[0]!r}" if unknown else "")
        raise DataError(found, SYNTAX, "mend the name; quote it for a shell")
    return HubSource(name, **dict(options))


def load_hub(source: str | HubSource) -> HubTable:
    """Load a data set, from the hub or from the local cache of what was loaded before.

    Without a network, set ``HF_HUB_OFFLINE=1`` to read the cache; the revision is then the cached one.

    Raises:
        DataError: ``datasets`` is not installed, the hub cannot be reached, there is no such data set, revision,
            subset or split, or it cannot be read.
    """
    wanted = parse_hub(source) if isinstance(source, str) else source
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data set {wanted}: the package datasets is not installed", "it", "pip install 'scope-opd[hub]'"
        ) from None
    path = str(Path(wanted.name).expanduser()) if wanted.is_folder else wanted.name
    if wanted.is_folder and not Path(path).is_dir():
        raise DataError(f"data set {wanted}: no folder {path}", "a folder", "check the path")
    if not wanted.is_folder and Path(path).exists():
        # ``datasets`` would silently read the folder in place of the hub's data set.
        raise DataError(f"data set {wanted}: {path} is a folder here too", "one of them", f"write hf:./{path} for it")
    revision = None if wanted.is_folder else _resolve(wanted)
    try:
        with _without_bars(datasets):
            loaded = datasets.load_dataset(path, wanted.subset, revision=revision or wanted.revision)
    except Exception as error:  # whatever a third-party builder raises, the data set is what is wrong
        raise DataError(f"data set {wanted}: {_reason(error)}", "one that can be loaded", _remedy(error)) from error
    table = _split(wanted, loaded)
    return HubTable(wanted, table, None if wanted.is_folder else revision or _cached_revision(table))


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """``datasets`` draws a bar for each split that it writes to its cache; downloads keep the hub library's."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _resolve(wanted: HubSource) -> str | None:
    """The commit that the revision stands for; None where the user asked for no network."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return str(huggingface_hub.HfApi().dataset_info(wanted.name, revision=wanted.revision, timeout=30).sha)
    except errors.OfflineModeIsEnabled:
        return None
    except errors.GatedRepoError:
        found, remedy = "its owners ask for access", "accept its terms on the hub and log in (hf auth login)"
    except errors.RevisionNotFoundError:
        found, remedy = f"no revision {wanted.revision!r}", "name a branch, a tag or a commit of it"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        found, remedy = "no such data set on the hub, or it is private", "check the name, or log in (hf auth login)"
    except Exception as error:  # the HTTP library's own family, which is not part of the hub library's interface
        found = f"the hub cannot be reached ({_reason(error)})"
        remedy = "check the network, set HF_HUB_OFFLINE=1 to read the local cache, or give a file"
    raise DataError(f"data set {wanted}: {found}", "a data set that can be read", remedy)


def _split(wanted: HubSource, loaded: Any) -> Any:
    splits = list(loaded)
    if wanted.split is None and len(splits) == 1:
        return loaded[splits[0]]
    if wanted.split not in splits:
        found = "no split named" if wanted.split is None else f"no split {wanted.split!r}"
        raise DataError(f"data set {wanted}: {found}", f"one of {', '.join(splits)}", "write ?split=.. behind the name")
    return loaded[wanted.split]


def _cached_revision(table: Any) -> str | None:
    """The commit whose files the cache holds: ``datasets`` names the folder after it."""
    folders = {Path(file["filename"]).parent.name for file in table.cache_files}
    names = [name for name in folders if _COMMIT.fullmatch(name)]
    return names[0] if len(folders) == 1 and names else None


def _feature_names(features: Any, prefix: str = "") -> list[str]:
    names = []
    for key, feature in features.items():
        names.append(f"{prefix}{key}")
        if isinstance(feature, dict):
            names += _feature_names(feature, f"{prefix}{key}.")
    return names


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _remedy(error: Exception) -> str:
    if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
        return "write ?subset=.. behind the name"
    return "check name, subset and revision; without a network only what is in the local cache can be read"
