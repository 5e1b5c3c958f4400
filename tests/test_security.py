"""The table of threats in SECURITY.md names tests that exist."""

import ast
import re

import pytest

from tests.conftest import ROOT


def threats():
    """The rows of the table: (threat, guard, its tests)."""
    text = (ROOT / "SECURITY.md").read_text().partition("\n## Threats, guards and tests\n")[2]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]  # without the head and the line below it


def test_the_table_has_a_guard_and_a_test_for_each_threat():
    assert len(threats()) >= 10
    for row in threats():
        assert len(row) == 3, row
        threat, guard, tests = (cell.strip() for cell in row)
        assert threat
        assert guard
        assert re.fullmatch(r"`[\w/.]+\.(py::\w+|sh)`(, `[\w/.]+\.(py::\w+|sh)`)*", tests), row


@pytest.mark.parametrize("name", sorted({name for row in threats() for name in re.findall(r"`(.*?)`", row[-1])}))
def test_each_test_of_the_table_exists(name):
    path, _, function = name.partition("::")
    assert (ROOT / path).is_file()
    if function:
        module = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        assert function.startswith("test_")
