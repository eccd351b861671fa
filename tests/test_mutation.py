"""Planted bugs replace source text at any indentation, and only if it occurs exactly once."""

import pytest

from tests.mutation import replaced

OLD, NEW = "a = 1\nb = 2", "a = 2\nb = 1"


@pytest.mark.parametrize("indentation", ["", "    ", "\t\t"])
def test_lines_of_any_indentation_are_replaced_and_keep_it(indentation):
    source = f"if c:\n{indentation}a = 1\n{indentation}b = 2\nd"
    assert replaced(source, OLD, NEW) == f"if c:\n{indentation}a = 2\n{indentation}b = 1\nd"


def test_a_line_that_goes_leaves_the_next_where_it_was():
    assert replaced("f(\n    a = 1\n    b = 2\n)", OLD, "b = 2") == "f(\n    b = 2\n)"


@pytest.mark.parametrize(("source", "times"), [("a = 1; b = 2", 0), ("a = 1\n  b = 2\na  = 1\nb = 2", 2)])
def test_what_is_not_there_once_is_no_mutant(source, times):
    with pytest.raises(AssertionError, match=f"{times} times: a = 1"):
        replaced(source, OLD, NEW)
