"""The README's table of objectives is the catalog's, and the catalog is the code's."""

from __future__ import annotations

import pytest
from test_docstrings import CONSTRUCTORS, PUBLISHED

from reasonkern import Objective
from reasonkern.policy_loss import catalog
from reasonkern.policy_loss.weights import MODES

# Objectives that need every token's statistics before the loss of one.
TWO_PASSES = {"gspo", "gmpo", "vespo", "bapo", "clip_cov", "kl_cov", "high_entropy", "gtpo"}


def test_readme_holds_the_table() -> None:
    text = catalog.README.read_text()
    assert catalog.with_table(text) == text, "run python -m reasonkern.policy_loss.catalog --write"
    assert text.count(catalog.BEGIN) == text.count(catalog.END) == 1


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    catalog.main([])
    assert capsys.readouterr().out == catalog.table()
    with pytest.raises(SystemExit):
        catalog.main(["--help"])
    assert "--write " in capsys.readouterr().out


def test_every_constructor_is_in_the_catalog() -> None:
    names = [e.name for e in catalog.OBJECTIVES]
    assert len(names) == len(set(names)) and set(names) == set(CONSTRUCTORS) - {"custom"}


@pytest.mark.parametrize("entry", catalog.OBJECTIVES, ids=lambda e: e.name)
def test_entry(entry: catalog.Entry) -> None:
    assert entry.passes == ("two" if entry.name in TWO_PASSES else "one")
    assert entry.aggregation in MODES and "|" not in entry.formula
    cited = PUBLISHED[entry.name][0]
    if cited[:4].isdigit():
        assert cited == entry.paper and cited in getattr(Objective, entry.name).__doc__
