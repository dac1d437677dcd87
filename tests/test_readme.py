"""What README and the docs point to is there."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [m for m in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in m]
    paths = re.findall(r"`((?:tests|docs|benchmarks|llm_jax|serving|experiments|gin|tools)/[\w./-]+)(?:::\w+)?`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_tests_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"


def test_every_row_of_the_feature_table_names_a_test():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("the test that shows it")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15 and all("`tests/" in row for row in rows)


def test_modules_that_commands_name_exist():
    command = re.compile(r"python -m ((?:experiments|serving|benchmarks)(?:\.\w+)+)")
    for page in PAGES:
        for module in command.findall(page.read_text(encoding="utf-8")):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: {module}"
