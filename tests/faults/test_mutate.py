"""A few fixed examples of every trial of `python -m tests.faults.mutate`, and that the checks can fail at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="pip install 'distributed_adaround[test]'")
pytest.importorskip("jsonschema", reason="pip install 'distributed_adaround[test]'")
pytest.importorskip("pyarrow", reason="pip install 'distributed_adaround[test]'")

from tests.faults import damaged_files, job_checks, mutate
from tests.faults.byte_changes import Change
from tests.faults.damaged_files import Kind, check_of, same


# pyarrow and torch warn about some damaged files before they refuse them.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(mutate.TRIALS))
def test_a_few_examples(name: str, tmp_path: Path) -> None:
    assert mutate.hunt(mutate.TRIALS[name], tmp_path, 25, seed=None) >= 20


def test_a_reader_that_takes_other_values_is_noticed(tmp_path: Path) -> None:
    kind = Kind("a.npy", lambda path: np.save(path, np.arange(8)), lambda path: np.load(path).tolist(), checked=True)
    check = check_of(kind, tmp_path)
    check([Change("flip", 130, 0), Change("flip", 130, 0)])
    with pytest.raises(AssertionError, match="without a word"):
        check([Change("flip", 130, 0)])


def test_a_schema_that_disagrees_is_noticed() -> None:
    job = {"model": {"factory": "a:b"}, "data": {"uri": "x"}, "output": {"uri": "y"}}
    job_checks.agree(job)
    job_checks.agree({**job, "nonsense": 1})
    original = job_checks._VALIDATOR
    try:
        job_checks._VALIDATOR = type(original)({**job_checks.SCHEMA, "required": ["nonsense"]})
        with pytest.raises(AssertionError):
            job_checks.agree(job)
        job_checks._VALIDATOR = type(original)(True)
        with pytest.raises(AssertionError, match="only the schema takes it"):
            job_checks.agree({**job, "nonsense": 1})
    finally:
        job_checks._VALIDATOR = original


def test_same_compares_bits() -> None:
    assert same({"a": [torch.tensor([0.0])]}, {"a": [torch.tensor([0.0])]})
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.tensor([0.0]), torch.tensor([0]))
    assert not same({"a": 1}, {"b": 1})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change("flip", 1, 0), b"accde"),
        (Change("cut", 2), b"ab"),
        (Change("drop", 1, 0, 1), b"ade"),
        (Change("repeat", 1, 0, 1), b"abcbcde"),
        (Change("swap", 0, 3, 0), b"dbcae"),
        (Change("overwrite", 3, 0, 0, b"xyz"), b"abcxyz"),
        (Change("insert", 1, 0, 0, b"x"), b"axbcde"),
    ],
)
def test_changes(change: Change, expected: bytes) -> None:
    assert change.apply(b"abcde") == expected
    assert change.apply(b"") == b""


def test_every_reader_of_the_program_is_tried() -> None:
    from distributed_adaround.data.readers import SUFFIXES

    assert {Path(kind.name).suffix for kind in damaged_files.READERS.values()} == set(SUFFIXES)
