"""The examples in the docstrings of public names do what they show."""

from __future__ import annotations

import doctest

import pytest

import merge_rl as mrl

EXAMPLES = [
    example
    for name in mrl.__all__
    for example in doctest.DocTestFinder().find(getattr(mrl, name), name)
    if example.examples
]


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example: doctest.DocTest) -> None:
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
