"""The table of the published scripts' defects names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "published_saliency.md").read_text(encoding="utf-8")


def test_every_row_names_a_test_that_is_there_or_says_that_it_was_read():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 32
    for row in rows:
        told = row.split("|")[3]
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", told)
        assert named or told.strip() == "by reading", row
        for file, test in named:
            path = ROOT / file if "/" in file else Path(__file__).with_name(file)
            assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
