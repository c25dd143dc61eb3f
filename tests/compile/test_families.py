"""Every family of networks with SE in timm and torchvision: all blocks found with their tails, or left for a reason."""

from pathlib import Path

import pytest
from families import FAMILIES, Family, row

TABLE = (Path(__file__).parents[2] / "docs" / "families.md").read_text().splitlines()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family(family: Family) -> None:
    assert row(family) in TABLE


def test_the_table_has_no_other_families() -> None:
    assert sum(line.startswith(("| timm", "| torchvision")) for line in TABLE) == len(FAMILIES)
