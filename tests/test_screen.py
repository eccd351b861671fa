"""Tables printed to the terminal."""

import subprocess
import sys

from gptbert.io.screen import table, table_row

CLOSED = """
import sys
from gptbert.io.screen import log, provide_streams
provide_streams()
with open(sys.argv[1], "w") as file:
    log("a line")
    print("another", flush=True)
    file.write(str(file.fileno() > 2))
"""


def test_where_streams_are_closed_no_file_gets_their_lines(tmp_path):
    """As some daemons start programs: a run's records would be file 1 or 2."""
    line = [sys.executable, "-c", CLOSED, str(tmp_path / "records")]
    assert subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *line], check=False).returncode == 0
    assert (tmp_path / "records").read_text() == "True"


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    rows = [["", "loss", "n"], ["masked", "4.85", "12345"], ["all", "-3.5", ""]]
    assert table(rows).splitlines() == ["        loss      n", "masked  4.85  12345", "all     -3.5"]


def test_a_row_alone_is_like_those_of_a_table():
    assert table_row(["all", "3"], [5, 4]) == "all       3"
