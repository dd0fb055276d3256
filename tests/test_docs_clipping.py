"""The worked example of docs/clipping.md gives what the page says."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "clipping.md"


def test_the_worked_example():
    done = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert done.attempted >= 6
    assert done.failed == 0
