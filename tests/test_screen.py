"""Tables printed to the terminal."""

from gptbert.io.screen import table, table_row


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    rows = [["", "loss", "n"], ["masked", "4.85", "12345"], ["all", "-3.5", ""]]
    assert table(rows).splitlines() == ["        loss      n", "masked  4.85  12345", "all     -3.5"]


def test_a_row_alone_is_like_those_of_a_table():
    assert table_row(["all", "3"], [5, 4]) == "all       3"
