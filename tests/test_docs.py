"""The documents tell the truth where a test can know it: metric keys, links, code blocks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scope_opd.config import validate_config
from scope_opd.train.metrics import METRIC_KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "results.md"])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def test_every_metric_is_documented_and_nothing_else_is() -> None:
    text = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    table = text.split("## metrics.jsonl")[1].split("## rollouts.jsonl")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, flags=re.M) == list(METRIC_KEYS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readmes_config_is_valid() -> None:
    import tomllib

    (block,) = blocks(ROOT / "README.md", "toml")
    assert validate_config(tomllib.loads(block)).objective.method == "scope"


def test_the_method_of_the_extension_guide_works_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    from scope_opd.objective import methods

    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    own, alone = blocks(ROOT / "docs" / "extending.md", "python")
    plugin = ModuleType("my_methods")
    monkeypatch.setitem(sys.modules, "my_methods", plugin)  # dataclasses look their module up
    exec(compile(own, "extending.md", "exec"), plugin.__dict__)
    assert "hardest_wrong" in methods.method_names()
    values: dict[str, object] = {"__name__": "alone"}
    exec(compile(alone, "extending.md", "exec"), values)
    credit = methods.build_method("hardest_wrong").credit(values["group"])
    assert credit.distill.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert values["reinforce"].sum() > 0  # type: ignore[attr-defined]
