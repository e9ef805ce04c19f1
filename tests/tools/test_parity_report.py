"""tools/parity_report.py: rows become tables."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def test_rows_become_tables(load_tool):
    tool = load_tool("parity_report")
    row = {
        "group": "training",
        "what": "losses",
        "case": "a|b",
        "against": "peft 1",
        "measured": "relative",
        "largest": 1e-7,
        "limit": 1e-4,
    }
    other = row | {"group": "sizes", "what": "step", "measured": "seconds", "limit": None}
    rows = [other, row, row | {"largest": 3.14159e-6}, row | {"case": "c"}]
    text = tool.render(rows, "a command")
    assert "Made by `a command`" in text
    training, sizes = text.split("## ")[1:]
    assert training.startswith("Training\n")
    assert training.splitlines()[4:] == [
        "| losses | a/b | peft 1 | relative | 3.14e-06 | 0.0001 |",
        "| losses | c | peft 1 | relative | 1e-07 | 0.0001 |",
        "",
    ]
    assert "| step | a/b | peft 1 | seconds | 1e-07 |  |" in sizes


def test_every_group_of_the_tests_has_a_table(load_tool: Callable[[str], ModuleType]):
    """Otherwise the report fails after half an hour of tests."""
    marks = re.compile(r'mark\.parity\("([^"]+)"')
    files = (Path(__file__).parents[1]).rglob("test_*.py")
    groups = {group for file in files for group in marks.findall(file.read_text())}
    assert len(groups) > 3
    assert groups <= set(load_tool("parity_report").GROUPS)
