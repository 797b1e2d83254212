"""``scope data filter``: keeps the prompts whose pass rate under the student lies in a range.

pass rate = correct / samples. As in evaluation, a response that was cut off or could not be judged is not correct.

Beside OUT lies ``OUT.rates.jsonl``: a first line with everything that the rates depend on, then a line a prompt.
Prompts are sampled in batches of a fixed make-up, and a batch's lines are written together or dropped together: a
filter that was killed repeats its last batch at most and ends with the same bits. With the rates at hand another
``--pass-rate`` samples nothing. Draws come from a stream of their own, so that prompts are not chosen by the draws that
training will meet.

Not covered: other engines than the student in this process.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope_opd.cli.data_files import write_rows
from scope_opd.cli.early import ZOO, check_early
from scope_opd.errors import ConfigError, DataError, RunFolderError
from scope_opd.locks import hold
from scope_opd.records import dumps
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.config import Config
    from scope_opd.data.dataset import DataSet
    from scope_opd.types import Prompt, Rollout

SECONDS_BETWEEN_LINES = 5.0


def run_filter(config: Path, overrides: Sequence[str], *, out: Path, pass_rate: str, samples: int) -> int:
    """The command; returns its exit code."""
    from scope_opd.config import load_config

    low, high = parse_range(pass_rate)
    if samples < 1:
        raise ConfigError(f"--samples {samples}", "at least 1", "raise it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: no folder {out.parent}", "a folder to write to", "make it first")
    settings = load_config(config, overrides)
    train = Path(settings.data.train)
    if out.exists() and train.exists() and out.samefile(train):
        raise ConfigError(f"--out {out} is data.train itself", "another file", "name one")
    check_early(settings, [settings.data.train])
    # Everything above is said before torch is loaded, which takes seconds.
    print("loading torch, data and models ...", file=sys.stderr, flush=True)
    from scope_opd.cli import inputs

    data = inputs.load_data(settings, settings.data.train, "train")
    warnings = list(data.warnings)
    tokenizer = inputs.student_tokenizer(settings)
    limits = inputs.contexts(settings, False)
    prompts = inputs.render(
        settings, data.rows, tokenizer, limits, max_tokens=settings.rollout.max_tokens, warnings=warnings
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rates = RatesFile(
        out.with_name(out.name + ".rates.jsonl"), described(settings, data, samples), batch_size(settings, samples)
    )
    done = rates.open([prompt.id for prompt in prompts])
    if done < len(prompts):
        from scope_opd.cli.train_command import memory_in_one_line

        try:
            with memory_in_one_line():
                sample_rates(settings, prompts, samples, rates, tokenizer)
        except KeyboardInterrupt:
            print(
                f"interrupted: the rates of {rates.done} of {len(prompts)} prompts are kept in {rates.path}; "
                "give the same command again to go on",
                file=sys.stderr,
            )
            return 130
    found = rates.read()
    kept = {row["id"]: row for row in found if low <= Fraction(row["correct"], row["samples"]) <= high}
    where = {row.where: row.id for row in data.rows}
    written = write_rows(out, _kept_rows(settings, data, where, kept))
    for line in summary(found, written, out, rates.path, pass_rate):
        print(line)
    return 0


def parse_range(text: str) -> tuple[Fraction, Fraction]:
    """ "0.1..0.9" as two exact numbers, both included.

    Raises:
        ConfigError: anything else, or numbers outside 0 <= low <= high <= 1.
    """
    low, dots, high = text.partition("..")
    try:
        if dots and 0 <= Fraction(low) <= Fraction(high) <= 1:
            return Fraction(low), Fraction(high)
    except (ValueError, ZeroDivisionError):
        pass
    raise ConfigError(f"--pass-rate {text}", "LOW..HIGH with 0 <= LOW <= HIGH <= 1", "for example 0.1..0.9")


def batch_size(config: Config, samples: int) -> int:
    """Prompts sampled together: as many rollouts as training decodes at once."""
    rows = config.rollout.max_rows or config.train.prompts_per_step * config.rollout.n
    return max(1, rows // samples)


def filter_seed(seed: int) -> int:
    """The seed of a filter's draws: a stream that neither training nor evaluation uses."""
    return int.from_bytes(hashlib.sha256(f"scope/filter/{seed}".encode()).digest()[:8], "big") >> 2


def described(config: Config, data: DataSet, samples: int) -> dict[str, Any]:
    """Everything that the rates depend on, as plain values; a filter goes on only from rates of the same."""
    from scope_opd.cli.eval_settings import verify_options
    from scope_opd.cli.identity import model_identity, template_sha256, tokenizer_identity

    plain = config.model_dump(mode="json")
    return {
        "samples": samples,
        "seed": config.run.seed,
        "model": {**plain["model"], **model_identity(config), "tokenizer_files": tokenizer_identity(config)},
        "data": {**_without(plain["data"], "eval", "shuffle"), "sha256": data.sha256, "revision": data.revision},
        "chat": {**plain["chat"], "template_sha256": template_sha256(config)},
        "verify": verify_options(config.verify),
        "rollout": _without(plain["rollout"], "n"),
        "reward_threshold": config.objective.reward_threshold,
        "param_dtype": config.train.param_dtype,
        "batch": batch_size(config, samples),
    }


class RatesFile:
    """The rates beside OUT: a header, then a line a prompt, in whole batches.

    Args:
        path: the file.
        settings: what the rates depend on.
        batch: prompts sampled together.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], batch: int) -> None:
        self.path = path
        self.settings = json.loads(dumps(settings))
        self.batch = batch
        self.done = 0
        self.total = 0

    def open(self, ids: Sequence[str]) -> int:
        """Begin the file, or find how many prompts it holds; what a kill left of a batch is cut off.

        Raises:
            RunFolderError: a file of another filter, or in use by one.
        """
        self.total = len(ids)
        # Ends with this object at the latest: two filters would append their batches in turns.
        lock = hold(self.path.with_name(f".{self.path.name}.lock"), str(self.path), "one filter an --out")
        weakref.finalize(self, lock.close)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        header = (dumps({"settings": self.settings}) + "\n").encode()
        if b"".join(lines) != header and header.startswith(b"".join(lines)):  # nothing, or what a kill left of it
            self.path.write_bytes(header)
            return 0
        rows = list(takewhile(bool, map(_row, lines)))
        self._check(rows[0] if rows else {})
        found = [row.get("id") for row in rows[1:]]
        whole = len(found) if len(found) >= self.total else len(found) - len(found) % self.batch
        if found[:whole] != list(ids[:whole]):
            raise RunFolderError(f"{self.path} holds rates of other prompts", "those of this data", "move it away")
        with self.path.open("r+b") as stream:
            stream.truncate(sum(map(len, lines[: 1 + whole])))
        self.done = whole
        return whole

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch."""
        with self.path.open("ab") as stream:
            stream.write("".join(dumps(row) + "\n" for row in rows).encode())
        self.done += len(rows)

    def read(self) -> list[dict[str, Any]]:
        """The rows, without the header."""
        with self.path.open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream][1:]

    def _check(self, header: Mapping[str, Any]) -> None:
        theirs = header.get("settings", {})
        other = sorted(_differences(self.settings, theirs))
        if other:
            raise RunFolderError(
                f"{self.path} holds rates with other settings: {', '.join(other[:4])}", "those of this filter",
                "name another --out, or move the file away",
            )  # fmt: skip


def sample_rates(config: Config, prompts: Sequence[Prompt], samples: int, rates: RatesFile, tokenizer: Any) -> None:
    """Sample and judge the prompts that have no rate yet, batch by batch."""
    import torch

    from scope_opd.cli import inputs, models
    from scope_opd.models.loading import end_token_ids, resolve_device
    from scope_opd.pipeline import Pipeline
    from scope_opd.types import SamplingParams

    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = resolve_device(config.train.device)
    verifier, _ = inputs.build_verifier(config, prompts)
    student = models.load_student(config, device)
    params = SamplingParams(
        n=samples,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        stop_token_ids=end_token_ids(student, tokenizer, config.chat.stop_token_ids),
        seed=filter_seed(config.run.seed),
    )
    sampler = models.eval_sampler(config, student, tokenizer, models.autocast_dtype(config, device))
    pipeline = Pipeline(sampler, verifier, None, lambda _: False)
    if rates.done:
        print(f"going on after {rates.done} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    start, before, tokens, told = time.monotonic(), rates.done, 0, time.monotonic()
    try:
        while rates.done < len(prompts):
            batch = prompts[rates.done : rates.done + rates.batch]
            collected = pipeline.collect(batch, params, step=0, policy_version=0)
            rates.append([_rate(group, config.objective.reward_threshold) for group in collected.groups])
            tokens += collected.stats.generated_tokens
            now = time.monotonic()
            if now - told >= SECONDS_BETWEEN_LINES or rates.done == len(prompts):
                told, share = now, (rates.done - before) / (len(prompts) - before)
                left = _duration((now - start) * (1 - share) / share)
                print(
                    f"{rates.done}/{len(prompts)} prompts, {tokens / max(now - start, 1e-9):.0f} tokens/s, {left} left",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    finally:
        close = getattr(verifier, "close", None)
        if close is not None:
            close()


def _rate(group: Sequence[Rollout], reward_threshold: float) -> dict[str, Any]:
    from scope_opd.credit import verdict_of

    verdicts = [verdict_of(rollout, truncated="incorrect", reward_threshold=reward_threshold) for rollout in group]
    correct = sum(verdict is True for verdict in verdicts)
    return {
        "id": group[0].group,
        "pass_rate": correct / len(group),
        "correct": correct,
        "samples": len(group),
        "truncated": sum(rollout.finish_reason == "length" for rollout in group),
        "no_verdict": sum(verdict is None for verdict in verdicts),
        "tokens": sum(len(rollout.token_ids) for rollout in group),
    }


def _kept_rows(
    config: Config, data: DataSet, ids: Mapping[str, str], kept: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The source's own rows that are kept, with their pass rate, and an id where ids are those of the place."""
    for where, values in _raw_rows(data):
        rate = kept.get(ids.get(where, ""))
        if rate is None or isinstance(values, DataError):
            continue
        name = config.data.id_column
        own = {} if "." in name or name in values else {name: rate["id"]}
        yield where, {**own, **values, "pass_rate": rate["pass_rate"], "samples": rate["samples"]}


def _raw_rows(data: DataSet) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    from scope_opd.data.dataset import read_raw

    if data.source == ZOO:
        from scope_opd.zoo.task import load_rows

        yield from ((f"zoo (train), row {number}", row) for number, row in enumerate(load_rows("train"), start=1))
        return
    yield from ((f"{data.source}, {place}", values) for place, values in read_raw(data.pinned))


def summary(found: Sequence[Mapping[str, Any]], written: int, out: Path, rates: Path, pass_rate: str) -> list[str]:
    """What a finished filter has to say."""
    samples = sum(row["samples"] for row in found)
    mean = sum(row["correct"] for row in found) / samples
    none = sum(row["correct"] == 0 for row in found)
    every = sum(row["correct"] == row["samples"] for row in found)
    cut = sum(row["truncated"] for row in found) / samples
    unjudged = sum(row["no_verdict"] for row in found) / samples
    return [
        f"{written} of {counted(len(found), 'prompt')} kept with a pass rate of {pass_rate}: {out}",
        f"mean pass rate {100 * mean:.1f} %; never solved {none}, always solved {every}; "
        f"cut off {100 * cut:.1f} %, no verdict {100 * unjudged:.1f} % of {counted(samples, 'sample')}",
        f"pass rates: {rates}",
        *(
            []
            if written
            else ["no prompt was kept: give a wider --pass-rate; the rates are there, nothing is sampled anew"]
        ),
    ]


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {*ours, *theirs}:
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}"


def _row(line: bytes) -> dict[str, Any]:
    """A line's object; empty for one that a kill cut short."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
