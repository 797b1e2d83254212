"""Hub data sets: names, splits, what is pinned; a folder that ``datasets`` really reads, a hub that fails."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from scope_opd.cli.main import main
from scope_opd.data import hub
from scope_opd.data.dataset import read_dataset, read_raw
from scope_opd.data.rows import Columns
from scope_opd.errors import DataError
from tiny import save_pair

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in hub layout with the splits train and test, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "set"
    data.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [
            {"question": f"{split} {i}?", "gold": str(i), "meta": {"level": i, "tags": ["x"]}, "long": "y" * 500}
            for i in range(count)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / f"{split}-00000-of-00001.parquet")
    return f"hf:{data}"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:a/b", hub.HubSource("a/b")),
        ("hf:a/b?split=test", hub.HubSource("a/b", split="test")),
        ("hf:a/b?subset=main&split=train[:10]&revision=v1", hub.HubSource("a/b", "main", "train[:10]", "v1")),
    ],
)
def test_a_name_is_read_with_its_options_and_written_back(text: str, source: hub.HubSource) -> None:
    assert hub.parse_hub(text) == source
    assert str(source) == text


@pytest.mark.parametrize("text", ["hf:", "hf:?split=test", "hf:a/b?config=main", "hf:a/b?split=", "hf:a/b?x"])
def test_a_name_that_is_none_is_an_error_with_the_syntax(text: str) -> None:
    with pytest.raises(DataError, match="hf:OWNER/NAME"):
        hub.parse_hub(text)


class TestFolder:
    def test_rows_come_with_mapped_columns_and_no_revision(self, folder: str) -> None:
        data = read_dataset(f"{folder}?split=test", Columns("question", "meta.level", extra=("gold",)))
        assert [(row.id, row.problem, row.answer) for row in data.rows] == [
            ("row-000001", "test 0?", 0), ("row-000002", "test 1?", 1)
        ]  # fmt: skip
        assert data.rows[0].fields == {"gold": "0"}
        assert data.rows[1].where == f"{folder}?split=test, row 2"
        assert (data.revision, data.sha256, data.warnings) == (None, None, [])

    def test_whole_rows_can_be_had_as_mappings(self, folder: str) -> None:
        table = hub.load_hub(f"{folder}?split=train")
        assert len(table) == 3
        assert table.names == ["question", "gold", "meta", "meta.level", "meta.tags", "long"]
        place, row = next(table.rows())
        assert (place, row["meta"]) == ("row 1", {"level": 0, "tags": ["x"]})
        assert [place for place, _ in read_raw(f"{folder}?split=train")] == ["row 1", "row 2", "row 3"]

    @pytest.mark.parametrize("query", ["", "?split=validation"])
    def test_a_split_must_be_named_where_there_are_several(self, query: str, folder: str) -> None:
        with pytest.raises(DataError, match=r"expected one of train, test; write \?split="):
            hub.load_hub(folder + query)

    def test_an_unknown_subset_names_those_that_are_there(self, folder: str) -> None:
        with pytest.raises(DataError, match=r"Available.*subset="):
            hub.load_hub(f"{folder}?subset=other&split=train")

    def test_a_missing_column_and_a_missing_folder_are_one_line(self, folder: str) -> None:
        with pytest.raises(DataError, match="no column 'problem', found question, gold, meta, long"):
            read_dataset(f"{folder}?split=test")
        with pytest.raises(DataError, match="no folder"):
            hub.load_hub("hf:/nowhere/at/all")

    def test_a_folder_with_the_name_of_a_hub_data_set_is_never_read_in_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=r"is a folder here too.*hf:\./owner/name"):
            hub.load_hub("hf:owner/name")


ANSWERS: dict[str, tuple[int, str | None]] = {
    "no/such": (404, "RepoNotFound"),
    "gated/one": (403, "GatedRepo"),
    "known/one": (404, "RevisionNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does about data sets: a commit, or an error with its code."""

    def do_GET(self) -> None:
        name = "/".join(self.path.split("/")[3:5]).split("?")[0]
        status, code = ANSWERS.get(name, (200, None))
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        body = json.dumps({"id": name, "sha": COMMIT}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub

    server = HTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


class TestHub:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("hf:no/such", "no such data set on the hub"),
            ("hf:gated/one", "ask for access"),
            ("hf:known/one?revision=v9", "no revision 'v9'"),
        ],
    )
    def test_what_the_hub_refuses_is_one_line_with_a_remedy(self, name: str, words: str, small_hub: None) -> None:
        with pytest.raises(DataError, match=words) as raised:
            hub.load_hub(name)
        assert "\n" not in str(raised.value)
        assert raised.value.remedy

    def test_the_commit_that_is_reported_is_the_one_that_is_loaded(
        self, folder: str, small_hub: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        asked: list[Any] = []
        load = datasets.load_dataset

        def from_folder(path: str, name: str | None, revision: str | None) -> Any:
            asked.append((path, name, revision))
            return load(folder.removeprefix("hf:"))

        monkeypatch.setattr(datasets, "load_dataset", from_folder)
        data = read_dataset("hf:some/set?subset=main&split=test&revision=main", Columns("question", "gold"))
        assert asked == [("some/set", "main", COMMIT)]
        assert data.revision == COMMIT
        assert len(data.rows) == 2

    def test_a_run_goes_on_with_its_commit_when_the_branch_has_moved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def load(source: hub.HubSource) -> hub.HubTable:
            import datasets

            commit = source.revision or branch[0]
            rows = [{"id": f"{commit[0]}{i}", "problem": "p", "answer": "1"} for i in range(4)]
            return hub.HubTable(source, datasets.Dataset.from_list(rows), commit)

        branch = ["a" * 40]
        monkeypatch.setattr("scope_opd.data.dataset.load_hub", load)
        save_pair(tmp_path / "model", context=256)
        (tmp_path / "my.toml").write_text("")
        settings = [
            f"model.path={tmp_path / 'model'}", f"teacher.path={tmp_path / 'model'}", "data.train=hf:some/set",
            "data.verifier=boxed", "objective.truncated=incorrect", "rollout.n=2", "rollout.max_tokens=4",
            "train.prompts_per_step=2", "train.threads=1", "run.export=false",
        ]  # fmt: skip
        run = tmp_path / "run"
        command = ["train", str(tmp_path / "my.toml"), "--run-dir", str(run)]
        command += [part for value in settings for part in ("--set", value)]
        assert main([*command, "--set", "train.steps=1"]) == 0
        branch[0] = "b" * 40
        assert main([*command, "--set", "train.steps=2", "--resume"]) == 0, capsys.readouterr().err
        assert json.loads((run / "run.json").read_text())["data"]["train"]["revision"] == "a" * 40
        rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
        assert {row["group"][0] for row in rollouts} == {"a"}

    def test_a_hub_that_cannot_be_reached_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(DataError, match=r"data set hf:some/set: the hub cannot be reached .*HF_HUB_OFFLINE=1"):
            hub.load_hub("hf:some/set")

    def test_without_the_package_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"pip install 'scope-opd\[hub\]'"):
            hub.load_hub("hf:some/set")

    @pytest.mark.parametrize(
        ("folders", "revision"), [([COMMIT], COMMIT), (["abc"], None), ([COMMIT, "x"], None), ([], None)]
    )
    def test_offline_the_revision_is_that_of_the_cache_if_it_is_known(
        self, folders: list[str], revision: str | None
    ) -> None:
        table = SimpleNamespace(
            cache_files=[{"filename": f"/c/set/main/0.0.0/{name}/set-test.arrow"} for name in folders]
        )
        assert hub._cached_revision(table) == revision
