"""Tables in Markdown."""

from collections.abc import Container, Sequence


def markdown(rows: Sequence[Sequence[str]], text_columns: Container[int] = (0,)) -> list[str]:
    """Lines of a table.

    Args:
        rows: of one length; the first is the header.
        text_columns: numbers of the columns that are text, to the left; the others are to the right.
    """
    header, *others = rows
    rule = ["---" if column in text_columns else "--:" for column in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *others)]
