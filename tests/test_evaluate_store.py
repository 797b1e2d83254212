"""Laws of an evaluation's folder: cut-off lines are dropped, whole batches stay, other settings are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scope_opd.errors import RunFolderError
from scope_opd.evaluate.store import SAMPLES, SampleStore, first_difference

SETTINGS = {"sampling": {"n": 2, "temperature": 0.6}, "benchmarks": {"a": {"sha256": "x"}}}
ROW = {"correct": True, "extracted": "1", "text": "é" * 5}


def keys(problem: str) -> list[tuple[str, str, int]]:
    return [("a", problem, 0), ("a", problem, 1)]


def begun(folder: Path, problems: str = "pq") -> Path:
    store = SampleStore.open(folder, SETTINGS)
    for problem in problems:
        for key in keys(problem):
            store.append(key, ROW)
    store.close()
    return folder / SAMPLES


def test_a_line_that_was_cut_off_is_dropped_and_its_batch_with_it(tmp_path: Path) -> None:
    path = begun(tmp_path)
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[: len(whole) - cut - 1])
        store = SampleStore.open(tmp_path, SETTINGS)
        assert list(store.samples) == [*keys("p"), ("a", "q", 0)]
        store.keep([keys("p"), keys("q")])
        assert list(store.samples) == keys("p")
        store.close()
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_what_is_whole_is_kept_as_it_is(tmp_path: Path) -> None:
    path = begun(tmp_path)
    before = path.read_bytes()
    store = SampleStore.open(tmp_path, SETTINGS)
    store.keep([keys("p"), keys("q"), keys("r")])
    assert len(store.samples) == 4
    assert "text" not in store.samples["a", "p", 0]
    store.close()
    assert path.read_bytes() == before


def test_other_settings_are_refused_naming_the_first_that_differs(tmp_path: Path) -> None:
    begun(tmp_path)
    other = json.loads(json.dumps(SETTINGS))
    other["sampling"]["temperature"] = 1.0
    with pytest.raises(RunFolderError, match=r"begun with sampling\.temperature = 0\.6, and now .* = 1\.0"):
        SampleStore.open(tmp_path, other)
    SampleStore.open(tmp_path, SETTINGS).close()  # the refusal let go of the folder


def test_a_folder_without_a_sample_takes_other_settings(tmp_path: Path) -> None:
    SampleStore.open(tmp_path, SETTINGS).close()
    other = json.loads(json.dumps(SETTINGS))
    other["sampling"]["temperature"] = 1.0
    SampleStore.open(tmp_path, other).close()
    assert json.loads((tmp_path / "settings.json").read_text()) == other


def test_first_difference_is_found_in_depth_and_in_missing_keys() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}, "c": 0}) == ("a.b", 1, 2)
    assert first_difference({}, {"c": 0}) == ("c", None, 0)
    assert first_difference({"a": 1}, {"a": True}) == ("a", 1, True)


def test_folders_in_use_or_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(RunFolderError, match="holds no evaluation"):
        SampleStore.open(tmp_path / "other", SETTINGS)
    path = begun(tmp_path / "mine")
    path.write_text('{"benchmark": "a"}\n')
    with pytest.raises(RunFolderError, match="line 1 is no sample"):
        SampleStore.open(tmp_path / "mine", SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="choose another --out"):
        SampleStore.open(tmp_path / "file", SETTINGS)
