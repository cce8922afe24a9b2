"""The table of papers is complete, true and up to date."""

from __future__ import annotations

import ast

import papers
import pytest
from papers import PAPERS, ROOT, Paper, exists


def test_every_paper_is_there_once() -> None:
    assert [paper.number for paper in PAPERS] == list(range(1, 46))
    assert len({paper.title for paper in PAPERS}) == 45
    assert all(paper.functions for paper in PAPERS)


def test_the_page_is_up_to_date() -> None:
    """After a change: python tests/papers.py."""
    assert papers.TARGET.read_text() == papers.render()


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.system)
def test_what_exists_is_tested(paper: Paper) -> None:
    if any(map(exists, paper.functions)):
        assert paper.tests
    for test in paper.tests:
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_names_that_nobody_offers_are_told_apart() -> None:
    assert exists("shaping.gae") and exists("Objective.gppo") and exists("token_stats")
    assert not exists("shaping.no_such_function") and not exists("no_such_function")
