"""``scope data check``: reads the sets, compares them (``data.overlap``), prints and writes what was found.

Not covered: answers that are wrong; what ``data.overlap`` does not cover.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scope_opd.cli.data_files import write_rows
from scope_opd.data.dataset import DataSet, read_dataset, read_raw
from scope_opd.data.overlap import Match, Overlap
from scope_opd.data.rows import NAME_COLUMNS, Columns, Row
from scope_opd.errors import ConfigError, DataError
from scope_opd.records import dumps
from scope_opd.words import counted

SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """The command's arguments; ``columns`` are those of problem, answer and id."""

    train: str
    against: tuple[str, ...] = ()
    ngram: int = 13
    overlap: float = 0.5
    columns: tuple[str, str, str] = ("problem", "answer", "id")
    against_problem_column: str = "problem"
    json: Path | None = None
    write_clean: Path | None = None
    show: int = 10


@dataclass(slots=True)
class Checked:
    """What a check found. ``held_out`` pairs every held-out row with the index of its set."""

    train: DataSet
    against: list[DataSet]
    held_out: list[tuple[int, Row]]
    found: Overlap
    seconds: float

    @property
    def flagged(self) -> set[int]:
        """Training rows that a clean set leaves out."""
        return {match.train for match in [*self.found.duplicates, *self.found.contaminated]}


def run_check(options: CheckOptions) -> int:
    """The command; returns its exit code."""
    if options.ngram < 1 or not 0 < options.overlap <= 1 or options.show < 0:
        raise ConfigError(
            f"--ngram {options.ngram} --overlap {options.overlap} --show {options.show}",
            "ngram >= 1, overlap in (0, 1] and show >= 0", "change them",
        )  # fmt: skip
    for path in (options.json, options.write_clean):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: no folder {path.parent}", "a folder to write to", "make it first")
    checked = check(options)
    for line in report(checked, options):
        print(line)
    if options.json is not None:
        options.json.write_text(dumps(as_json(checked, options)) + "\n", encoding="utf-8")
        print(f"all pairs: {options.json}")
    if options.write_clean is not None:
        written = write_clean(checked, options)
        print(f"{counted(written, 'row')} written to {options.write_clean}")
        return 0
    return 1 if checked.train.skipped or checked.found.contaminated else 0


def check(options: CheckOptions) -> Checked:
    """Read and compare.

    Raises:
        DataError: a set that cannot be read, or has no sound row.
    """
    start = time.perf_counter()
    problem, answer, identity = options.columns
    train = _read(options.train, Columns(problem, answer, identity), "--problem-column, --answer-column or --id-column")
    held_out_columns = Columns(options.against_problem_column, None)
    against = [_read(name, held_out_columns, "--against-problem-column") for name in options.against]
    held_out = [(index, row) for index, data in enumerate(against) for row in data.rows]
    found = Overlap([row.problem for _, row in held_out], options.ngram, options.overlap)
    for place, row in enumerate(train.rows):
        found.add(row.problem, place)
    return Checked(train, against, held_out, found, time.perf_counter() - start)


def _read(name: str, columns: Columns, options: str) -> DataSet:
    """A set, and where a column is not there the options that name it."""
    try:
        return read_dataset(source_of(name), columns, on_bad_row="skip")
    except DataError as error:
        if error.remedy != NAME_COLUMNS:
            raise
        raise DataError(error.found, error.expected, f"name yours with {options}") from None


def source_of(name: str) -> str:
    """A source as ``read_dataset`` takes it: the zoo's sets go by ``zoo:train`` and ``zoo:heldout``."""
    if name in ("zoo:train", "zoo:heldout"):
        from scope_opd.zoo import data_path

        return str(data_path("train" if name == "zoo:train" else "heldout"))
    return name


def report(checked: Checked, options: CheckOptions) -> Iterator[str]:
    """The findings as lines of text."""
    train, found = checked.train, checked.found
    about = f" ({train.layout}'s layout)" if train.layout != "plain" else ""
    held_out = counted(len(checked.held_out), "held-out problem")
    yield f"{options.train}: {counted(len(train.rows), 'row')}{about}, against {held_out}, {checked.seconds:.1f} s"
    for data in [train, *checked.against]:
        yield from (f"note: {line}" for line in data.notes)
    yield from _listed("bad rows", [f"{each.where}: {each.reason}" for each in train.skipped], options.show)
    for name, data in zip(options.against, checked.against, strict=True):
        bad = [f"{each.where}: {each.reason}" for each in data.skipped]
        if bad:
            yield from _listed(f"bad rows in {name}", bad, options.show)
    kinds = _counted(match.kind for match in found.duplicates)
    yield from _listed(
        f"duplicates{kinds}",
        [_pair(m.kind, train.rows[m.held_out], train.rows[m.train]) for m in found.duplicates], options.show,
    )  # fmt: skip
    if not checked.against:
        return
    yield f"{'held-out set':40}  problems  the same  overlap  neighbours"
    for index, name in enumerate(options.against):
        same, over, near = (_problems(checked, index, kinds) for kinds in (("identical", "same"), ("overlap",), ()))
        shown = name if len(name) <= 40 else "..." + name[-37:]
        size = len(checked.against[index].rows)
        yield f"{shown:40}  {size:8}  {len(same):8}  {len(over - same):7}  {len(near):10}"
    hit = len({match.held_out for match in found.contaminated})
    rows = len({match.train for match in found.contaminated})
    pairs = sorted(found.contaminated, key=lambda match: (-match.share, match.held_out, match.train))
    yield from _listed(
        f"contaminated: {counted(hit, 'held-out problem')} in {counted(rows, 'training row')}; pairs",
        [_held_out_pair(checked, match) for match in pairs], options.show,
    )  # fmt: skip
    near_problems = {match.held_out for match in found.templates}
    both = len(near_problems & {match.held_out for match in found.contaminated})
    also = f" ({both} of them contaminated too)" if both else ""
    yield from _listed(
        f"same-template neighbours: {counted(len(near_problems), 'held-out problem')}{also}; pairs",
        [_held_out_pair(checked, match) for match in found.templates], options.show,
    )  # fmt: skip


def _problems(checked: Checked, index: int, kinds: tuple[str, ...]) -> set[int]:
    """Held-out problems of a set in pairs of these kinds; without kinds, its template neighbours."""
    matches = checked.found.contaminated if kinds else checked.found.templates
    return {m.held_out for m in matches if checked.held_out[m.held_out][0] == index and (not kinds or m.kind in kinds)}


def _listed(title: str, lines: list[str], limit: int) -> Iterator[str]:
    yield f"{title}: {len(lines)}"
    yield from (f"  {line}" for line in lines[:limit])
    if len(lines) > limit:
        yield f"  ... {len(lines) - limit} more"


def _counted(kinds: Iterable[str]) -> str:
    counts = Counter(kinds)
    return f" ({', '.join(f'{count} {kind}' for kind, count in counts.items())})" if counts else ""


def _held_out_pair(checked: Checked, match: Match) -> str:
    share = f"overlap {100 * match.share:.0f}%" if match.kind == "overlap" else match.kind
    return _pair(share, checked.held_out[match.held_out][1], checked.train.rows[match.train])


def _pair(kind: str, one: Row, other: Row) -> str:
    return f"{kind}: {one.id} | {other.id}\n      {_short(one.problem)}\n      {_short(other.problem)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 4] + " ..."


def as_json(checked: Checked, options: CheckOptions) -> dict[str, Any]:
    """Everything that was found, with the problems' texts left out."""
    rows = checked.train.rows

    def held_out(match: Match) -> dict[str, Any]:
        index, row = checked.held_out[match.held_out]
        return {
            "kind": match.kind,
            "share": match.share,
            "held_out": {"set": options.against[index], "id": row.id, "where": row.where},
            "train": {"id": rows[match.train].id, "where": rows[match.train].where},
        }

    return {
        "train": _about(options.train, checked.train),
        "against": [_about(name, data) for name, data in zip(options.against, checked.against, strict=True)],
        "ngram": options.ngram,
        "overlap": options.overlap,
        "bad_rows": [{"where": each.where, "reason": each.reason} for each in checked.train.skipped],
        "duplicates": [
            {"kind": m.kind, "id": rows[m.train].id, "where": rows[m.train].where, "first": rows[m.held_out].where}
            for m in checked.found.duplicates
        ],
        "contaminated": [held_out(match) for match in checked.found.contaminated],
        "same_template": [held_out(match) for match in checked.found.templates],
        "seconds": round(checked.seconds, 3),
    }


def _about(name: str, data: DataSet) -> dict[str, Any]:
    return {**data.about(), "source": name, "notes": data.notes}


def write_clean(checked: Checked, options: CheckOptions) -> int:
    """Write the sound rows that are neither repeats nor contaminated, with all their columns; returns their number."""
    assert options.write_clean is not None
    kept = {row.where for place, row in enumerate(checked.train.rows) if place not in checked.flagged}
    source = checked.train.source
    if Path(source).exists() and options.write_clean.exists() and options.write_clean.samefile(source):
        raise ConfigError(f"--write-clean {options.write_clean} is TRAIN itself", "another file", "name one")
    raw = ((f"{source}, {place}", values) for place, values in read_raw(checked.train.pinned))
    return write_rows(options.write_clean, ((where, values) for where, values in raw if where in kept))
