"""Tables in a narrow terminal."""

import io
import re

import pytest
from rich.console import Console

from hf_lnfree.cli.tables import rich_table
from hf_lnfree.tables import Table

NUMBERS = ["5", "15.64 ± 0.22", "+12.2 ± 73.1 %", "33 ± 12 %", "0 ± 0 %"]
TABLES = {
    "short": (["row", "seeds", "perplexity", "to SM+LN+G", "overloaded", "collapsed"], ["SM+G", *NUMBERS]),
    "one factor": (
        ["row", "seeds", "perplexity", "to the first", "overloaded", "collapsed"],
        ["learning_rate=0.012", *NUMBERS],
    ),
    "two factors": (
        ["row", "seeds", "perplexity", "to learning_rate=0.012, weight_decay=0.1", "overloaded", "collapsed"],
        ["learning_rate=0.012, weight_decay=0.1", *NUMBERS],
    ),
    "compare": (
        ["row", "perplexity, learning-rate-0.003", "perplexity, minutes", "change", "overloaded, learning-rate-0.003"],
        ["SM+LN+G", "15.64 ± 0.22", "14.64 ± 0.22", "-6.4 ± 1.0 % (5 seeds)", "33 ± 12 %"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_word_of_a_header_and_no_number_is_broken(name, width):
    header, row = TABLES[name]
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(Table(header, [row, row])))
    shown = console.file.getvalue()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    words = re.split(r"\s+", shown)
    for heading in header:
        for word in heading.split():
            assert word in words or len(word) > width // 2
    for cell in row[1:] if width > 40 else ():
        assert shown.count(cell) >= 2
    if name in ("short", "one factor") and width == 80:
        assert re.search(rf"row +seeds +perplexity +{re.escape(header[3])} +overloaded +collapsed", shown)
