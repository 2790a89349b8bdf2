"""The section rounding: what a null stands for with each solver, and one clear line for every refused value."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.job import JobSpec, MethodSpec
from distributed_adaround.spec.rounding import RoundingSpec

JOB: dict[str, Any] = {"model": {"factory": "a:b"}, "data": {"uri": "x.npz"}, "output": {"uri": "out"}}

NULLS = ("polish", "correct_bias", "correct_scale", "activation_in_loss", "asymmetry")
# (polishes, corrects_bias, corrects_scale, sees_activation, damped_asymmetry)
DEFAULTS = {
    "minibatch": (True, False, False, True, 0.5),
    "gram": (True, True, True, False, 0.5),
    "gptq": (False, False, False, False, 0.0),
    "nearest": (False, False, False, False, 0.5),
}


def resolved(spec: RoundingSpec) -> tuple[Any, ...]:
    return (
        spec.polishes, spec.corrects_bias, spec.corrects_scale, spec.sees_activation, spec.damped_asymmetry,
    )  # fmt: skip


@pytest.mark.parametrize("solver", DEFAULTS)
def test_null_is_what_suits_the_solver(solver: Any) -> None:
    spec = RoundingSpec(solver=solver)
    assert {getattr(spec, name) for name in NULLS} == {None}
    assert resolved(spec) == DEFAULTS[solver]
    nulls = RoundingSpec(solver=solver, **dict.fromkeys(NULLS))
    assert nulls == spec


@pytest.mark.parametrize("solver", DEFAULTS)
def test_a_value_that_is_given_counts(solver: Any) -> None:
    on = RoundingSpec(solver=solver, **dict.fromkeys(NULLS, True) | {"asymmetry": 0.25})
    off = RoundingSpec(solver=solver, **dict.fromkeys(NULLS, False) | {"asymmetry": 0})
    assert resolved(on) == (True, True, True, True, 0.25)
    assert resolved(off) == (False, False, False, False, 0.0)


@pytest.mark.parametrize("solver", DEFAULTS)
def test_nulls_and_the_values_they_stand_for_are_one_job(solver: Any) -> None:
    short = RoundingSpec(solver=solver)
    values = {name: short.resolved()[name] for name in NULLS}
    assert tuple(values.values()) == DEFAULTS[solver][:5]
    assert short.resolved()["reg_param"] == 10.0
    assert None not in short.resolved().values()
    digests = {JobSpec(**JOB, rounding={"solver": solver} | given).result_digest() for given in ({}, values)}
    assert len(digests) == 1


def test_presets_are_what_they_were_before_gram() -> None:
    for preset in ("pytorch", "paper"):
        spec = MethodSpec(preset=preset).rounding
        assert (spec.solver, spec.polishes, spec.corrects_bias, spec.damped_asymmetry) == (
            "minibatch",
            False,
            False,
            1.0,
        )
    assert not MethodSpec(preset="pytorch").rounding.sees_activation
    assert MethodSpec(preset="paper").rounding.sees_activation


# (fields, field blamed, what the line must also say)
REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"solver": "gramm"}, "solver", ["'gramm'", "did you mean 'gram'?"]),
    ({"solver": "GPTQ"}, "solver", ["'GPTQ'", "'gptq'"]),
    ({"solver": None}, "solver", ["null"]),
    ({"sweeps": 0}, "sweeps", ["0 must be greater than 0", "100"]),
    ({"sweeps": 1.5}, "sweeps", ["1.5", "whole number"]),
    ({"polish": 1}, "polish", ["1 must be true or false"]),
    ({"polish": "yes"}, "polish", ["'yes'", "true or false"]),
    ({"correct_bias": "true"}, "correct_bias", ["'true'", "true or false"]),
    ({"activation_in_loss": 0}, "activation_in_loss", ["0", "true or false"]),
    ({"asymmetry": -0.1}, "asymmetry", ["-0.1 must be 0.0 or more", "leave it out"]),
    ({"asymmetry": 1.5}, "asymmetry", ["1.5 must be 1.0 or less", "leave it out"]),
    ({"asymmetry": True}, "asymmetry", ["true must be a number"]),
    ({"asymmetry": float("nan")}, "asymmetry", ["nan", "finite"]),
    ({"damping": 0}, "damping", ["0 must be greater than 0", "0.01"]),
    ({"damping": None}, "damping", ["null"]),
    ({"compute_dtype": "bfloat16"}, "compute_dtype", ["'bfloat16'", "'float32'"]),
    ({"sweep": 5}, "sweep", ["no such field", "did you mean sweeps?"]),
    ({"polished": True}, "polished", ["no such field", "polish"]),
]


@pytest.mark.parametrize(("fields", "blamed", "words"), REFUSED)
def test_a_refused_value_is_one_line_with_field_value_and_remedy(
    fields: dict[str, Any], blamed: str, words: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec(**JOB, rounding=fields)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"rounding.{blamed}: ")
    for word in words:
        assert word in text
