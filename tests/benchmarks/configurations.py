"""What is compared: cases, number formats and solvers, the last two as fields of the job spec. To add one, add a line
to a table here. Knows no torch, so that the process that starts the runs stays small."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed_adaround.errors import SpecError
from distributed_adaround.spec.job import MethodSpec

if TYPE_CHECKING:
    from torch import nn

Fields = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One real model. ignore: layers that stay in float. The sizes are samples (images, sentences, windows of text)."""

    name: str
    module_name: str
    ignore: tuple[str, ...]
    num_calibration: int
    num_held_out: int
    microbatch_size: int


CASES = {
    case.name: case
    for case in (
        Case("resnet20", "cifar10_resnet20", (), 512, 512, 64),
        Case("minilm", "minilm_stsb", (), 512, 256, 32),
        Case("smollm2", "smollm2_wikitext", ("lm_head",), 32, 16, 4),
    )
}

# Name -> fields of the section `quantize`.
FORMATS: Mapping[str, Fields] = {
    "int4": {"dtype": "int4", "qscheme": "per_channel_symmetric", "observer": "mse"},
    "int3": {"dtype": "int3", "qscheme": "per_channel_symmetric", "observer": "mse"},
    "int2": {"dtype": "int2", "qscheme": "per_channel_symmetric", "observer": "mse"},
    "int4g128": {"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 128, "observer": "mse"},
}

# Solvers in whose figures only codes and scales are to count.
_UNRESTORED = {"correct_bias": False, "correct_scale": False}

# Name -> sections of the job spec. `NAME@N` is NAME with N steps (rounding.max_iter; of gram, rounding.sweeps).
SOLVERS: Mapping[str, Fields] = {
    "nearest": {"rounding": {"solver": "nearest"}},
    "gptq": {"rounding": {"solver": "gptq"}},
    "minibatch": {"rounding": {"solver": "minibatch"}},
    "gram-bare": {"rounding": {"solver": "gram", "polish": False} | _UNRESTORED},
    "gptq+polish": {"rounding": {"solver": "gptq", "polish": True}},
    "minibatch+polish": {"rounding": {"solver": "minibatch", "polish": True}},
    "gram+polish": {"rounding": {"solver": "gram"} | _UNRESTORED},
    "gram+polish+bias": {"rounding": {"solver": "gram", "correct_scale": False}},
    "gram": {"rounding": {"solver": "gram"}},
    "gram+polish+output_mse": {
        "rounding": {"solver": "gram"} | _UNRESTORED,
        "quantize": {"observer": "output_mse"},
    },
    "paper": {"preset": "paper"},
    "pytorch": {"preset": "pytorch"},
}

# Not a spec: the restatement of PyTorch's AdaptiveRoundingOptimizer in ancestor.py. Networks only.
ANCESTOR = "ancestor"

DEFAULT_SOLVERS = (
    "nearest", "gptq", "minibatch", "minibatch@10000", "gram-bare", "gptq+polish", "minibatch+polish", "gram+polish",
    "gram", "paper",
)  # fmt: skip
# For error against seconds.
TRAJECTORIES = (
    *(f"minibatch@{steps}" for steps in (100, 300, 1000, 3000, 10000)),
    *(f"gram+polish@{steps}" for steps in (10, 20, 50, 100, 200, 400)),
)

# These draw batches, so their result depends on the seed. The others are run once for the same samples.
_DRAWING = ("minibatch", "paper", "pytorch", ANCESTOR)


def is_random(solver: str) -> bool:
    """Whether runtime.seed changes this solver's result."""
    return solver.partition("@")[0].partition("+")[0] in _DRAWING


def solver_sections(name: str) -> Fields:
    """Sections of the spec for a solver of the table, without the `@N` of its name.

    Raises:
        SpecError: no such solver.
    """
    base, _, steps = name.partition("@")
    if base not in SOLVERS or (steps and not steps.isdecimal()):
        raise SpecError(f"{name}: no such solver here; known are {', '.join(SOLVERS)}, each also with @STEPS")
    return copy.deepcopy(SOLVERS[base])


def method_spec(solver: str, quantize: Fields, *, seed: int, device: str, settings: Sequence[str] = ()) -> MethodSpec:
    """The spec of one run. quantize: the format. settings: `section.field=value` each, over everything
    but the number of steps in a solver's name.

    Raises:
        SpecError: the package refuses it.
    """
    sections = solver_sections(solver)
    sections["quantize"] = quantize | sections.get("quantize", {})
    sections["runtime"] = {"seed": seed, "device": device}
    steps = solver.partition("@")[2]
    for setting in [*settings, *([f"rounding.{_steps_field(solver)}={steps}"] if steps else [])]:
        _apply(sections, setting)
    return MethodSpec(**sections)


def _steps_field(solver: str) -> str:
    return "sweeps" if solver.startswith("gram") else "max_iter"


def _apply(sections: Fields, setting: str) -> None:
    import yaml

    path, equals, value = setting.partition("=")
    section, dot, field = path.partition(".")
    if not (equals and dot):
        raise SpecError(f"{setting}: write section.field=value")
    sections.setdefault(section, {})[field] = yaml.safe_load(value)


def quantize_fields(name: str, inputs_of_layer: Mapping[str, int], ignore: Iterable[str]) -> Fields:
    """Section `quantize` for a format of the table. Layers whose inputs a group does not divide keep one scale per
    channel. inputs_of_layer: inputs of one output, by layer.

    Raises:
        SpecError: groups fit no layer, so that the format is none of its own.
    """
    fields = copy.deepcopy(FORMATS[name]) | {"ignore": list(ignore)}
    size = fields.get("group_size")
    if size is None:
        return fields
    odd = [layer for layer, inputs in inputs_of_layer.items() if inputs % size and layer not in fields["ignore"]]
    if len(odd) == len(inputs_of_layer.keys() - set(fields["ignore"])):
        raise SpecError(f"groups of {size} divide the inputs of no layer; the format is the one without groups")
    if odd:
        fields["overrides"] = [{"match": odd, "qscheme": "per_channel_symmetric"}]
    return fields


def inputs_of_layers(model: nn.Module) -> dict[str, int]:
    """Inputs of one output of every linear and convolution layer, by name."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: module.weight[0].numel() for name, module in model.named_modules() if isinstance(module, kinds)}
