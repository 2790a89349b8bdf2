"""`quantize` as a script or notebook calls it: inputs of all kinds, one process and groups of processes."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from toy_formats import layer_format

import distributed_adaround
from distributed_adaround import InputError, MethodSpec, SpecError, quantize
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.report.table import LayerTable
from distributed_adaround.spec.quantize import QuantizeSpec

QUICK: dict[str, Any] = {"dtype": "int3", "max_iter": 120, "lr": 0.02, "batch_size": 64, "progress": False}


class Net(nn.Module):
    """Takes its inputs by position or keyword; `frozen` is in eval mode whatever the rest is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.frozen = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.frozen(self.first(x)).relu()
        if shift is not None:
            x = x + shift
        return self.head(self.second(x).relu()) * self.scale


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    model.head.bias.requires_grad_(False)
    model.train()
    model.frozen.eval()
    return model


def data(num_batches: int = 4, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(8, 8, generator=generator)
    return [torch.randn(size, 8, generator=generator) @ mixing for _ in range(num_batches)]


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["training"] == expected["training"]
    assert found["grad"] == expected["grad"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert all(torch.equal(found["tensors"][name], tensor) for name, tensor in expected["tensors"].items())


def output_error(model: nn.Module, reference: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(copy.deepcopy(m).eval() for m in (model, reference)) for _ in range(1)]
        ours, theirs = pairs[0]
        x = torch.cat(batches)
        return float((ours(x) - theirs(x)).square().sum() / theirs(x).square().sum())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_the_callers_model_stays_and_the_copy_is_on_the_grid() -> None:
    model, batches = net(), data()
    before = state_of(model)
    # Polish would refit the scales that are looked at.
    quantized, table = quantize(model, batches, polish=False, **QUICK)
    assert_same_state(state_of(model), before)
    assert quantized is not model
    assert isinstance(table, LayerTable)
    assert [layer["name"] for layer in table.to_dicts()] == ["first", "second", "head"]
    for name, weight in weights(model).items():
        grid = choose_grid(weight[None], layer_format("int3", observer="mse"))
        changed = weights(quantized)[name]
        codes = grid.quantize(changed[None])
        torch.testing.assert_close(grid.dequantize(codes)[0], changed, rtol=0, atol=1e-6)
        assert not torch.equal(changed, weight)
        assert (changed - weight).abs().max() <= 1.01 * grid.scale.max() or (codes == -4).any() or (codes == 3).any()
    after = state_of(quantized)
    assert after["training"] == before["training"]
    assert after["grad"] == before["grad"]
    assert after["tensors"].keys() == before["tensors"].keys()
    rest = [name for name in before["tensors"] if name.removesuffix(".weight") not in weights(model)]
    assert all(torch.equal(after["tensors"][name], before["tensors"][name]) for name in rest)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in quantized.parameters())


def test_learned_rounding_beats_nearest_on_other_data() -> None:
    model, batches = net(), data(9)
    learned = quantize(model, batches[:6], **QUICK).model
    nearest = quantize(model, batches[:6], **QUICK, solver="nearest").model
    assert output_error(learned, model, batches[6:]) < 0.7 * output_error(nearest, model, batches[6:])


def test_inplace_changes_the_callers_model() -> None:
    model = net()
    other = quantize(model, data(), **QUICK).model
    before = state_of(model)
    parameters = dict(model.named_parameters())
    quantized, _ = quantize(model, data(), **QUICK, inplace=True)
    assert quantized is model
    assert_same_state(state_of(model), state_of(other))
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert state_of(model)["training"] == before["training"]


def test_a_failed_call_leaves_the_training_flags() -> None:
    model = net()
    before = state_of(model)
    with pytest.raises(InputError):
        quantize(model, [torch.randn(4, 7)], **QUICK, inplace=True)
    assert_same_state(state_of(model), before)


def test_batches_of_every_kind_give_the_same() -> None:
    model, batches, few = net(), data(), {**QUICK, "max_iter": 10}
    reference = state_of(quantize(model, batches, **few).model)
    for given in (
        [(x,) for x in batches],
        [[x] for x in batches],
        [{"x": x} for x in batches],
        tuple(batches),
        (x for x in batches),
        [(x, torch.zeros(16, 16)) for x in batches],
        [{"shift": torch.zeros(16, 16), "x": x} for x in batches],
        [{"x": x, "shift": None} for x in batches],
    ):
        assert_same_state(state_of(quantize(model, given, **few).model), reference)


def test_specs_of_every_kind_give_the_same() -> None:
    model, batches = net(), data()
    fields = {name: value for name, value in QUICK.items() if name != "progress"} | {"max_iter": 10}
    reference = state_of(quantize(model, batches, progress=False, **fields).model)
    rounding = {name: value for name, value in fields.items() if name != "dtype"}
    sections = {"quantize": {"dtype": "int3"}, "rounding": rounding}
    for spec, given in (
        (MethodSpec(**sections), {}),
        (sections, {}),
        (None, sections),
        ({"rounding": rounding}, {"dtype": "int3"}),
        ({"rounding": rounding}, {"quantize": QuantizeSpec(dtype="int3")}),
    ):
        quantized = quantize(model, batches, spec, progress=False, **given).model
        assert_same_state(state_of(quantized), reference)


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (None, {"max_iters": 3}, "max_iters: no such setting; known are preset, "),
        (None, {"max_iter": -3}, "max_iter"),
        (None, {"dtype": "int99"}, "int99"),
        ({"rounding": {"max_iter": 3}}, {"max_iter": 4}, "max_iter: given as a keyword argument and in section"),
        (None, {"dtype": "int3", "quantize": {"dtype": "int4"}}, "dtype: given as a keyword argument and in section"),
        (None, {"quantize": QuantizeSpec(), "dtype": "int3"}, "dtype: given as a keyword argument and in section"),
        ({"quantize": {}}, {"quantize": {}}, "quantize: given in spec and as a keyword argument"),
        (MethodSpec(), {"dtype": "int3"}, "give either a spec or keyword arguments"),
        ({"quantise": {}}, {}, "quantise"),
        ("int3", {}, "spec is a str; give a MethodSpec"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong(spec: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        quantize(net(), data(1), spec, **fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty; give at least one calibration batch"),
        (torch.randn(4, 8), "wrap a single batch in a list"),
        ({"x": torch.randn(4, 8)}, "wrap a single batch in a list"),
        ("images", "wrap a single batch in a list"),
        ([3], "a batch is a int; give a tensor"),
        (["a"], "a batch is a str; give a tensor"),
        ([torch.randn(4, 8), torch.randn(0, 8)], "batch 1 is empty"),
        ([(3,)], "batch 0 holds no tensor"),
        ([torch.full((4, 8), float("nan"))], "not finite"),
    ],
)
def test_batches_that_are_wrong(batches: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        quantize(net(), batches, **QUICK)
    assert message in str(caught.value)


def test_masked_tokens_count_for_nothing() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x) * attention_mask[:, :, None]

    torch.manual_seed(0)
    model = Tokens()
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[:, 3:] = 0
    tokens = [torch.randn(6, 5, 8) for _ in range(3)]
    spoiled = [torch.where(mask[:, :, None] != 0, x, 1e3 * torch.randn_like(x)) for x in tokens]
    results = [
        quantize(model, [{"x": x, "attention_mask": mask} for x in batches], **QUICK) for batches in (tokens, spoiled)
    ]
    assert torch.equal(results[0].model.layer.weight, results[1].model.layer.weight)
    assert results[0].table.to_dicts()[0]["hard_error"] == results[1].table.to_dicts()[0]["hard_error"]
    unmasked = quantize(model, [{"x": x, "attention_mask": torch.ones_like(mask)} for x in spoiled], **QUICK)
    assert unmasked.table.to_dicts()[0]["hard_error"] != results[0].table.to_dicts()[0]["hard_error"]


def test_a_model_that_is_one_layer() -> None:
    torch.manual_seed(0)
    quantized, table = quantize(nn.Linear(8, 4), data(), **QUICK)
    assert len(table.to_dicts()) == 1
    assert all(len(row.unique()) <= 8 for row in quantized.weight)


def test_a_fallback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(Net):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return super().forward(x if x.sum() > 0 else x + 1)

    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="distributed_adaround"):
        quantize(Branching(), data(2), **{**QUICK, "max_iter": 5})
    assert "could not be exported: GuardOnDataDependentSymNode" in caplog.text


def test_batches_that_no_single_graph_can_take_are_replayed(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return self.second(self.first(x * factor).tanh())

    torch.manual_seed(0)
    model, batches = Scaled(), data(3)
    expected = quantize(model, [x * 2.0**i for i, x in enumerate(batches)], **QUICK).model
    assert "could not be exported" not in caplog.text
    scaled = quantize(model, [{"x": x, "factor": 2.0**i} for i, x in enumerate(batches)], **QUICK).model
    assert "could not be exported" in caplog.text
    assert_same_state(state_of(scaled), state_of(expected))


def test_a_model_that_cannot_be_copied() -> None:
    model = net()
    model.cache = torch.ones(3, requires_grad=True) * 2
    with pytest.raises(InputError, match=r"cannot be copied .* pass inplace=True"):
        quantize(model, data(1), **QUICK)
    assert quantize(model, data(1), **{**QUICK, "max_iter": 5}, inplace=True).model is model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(8, 4)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced: nn.Module = torch.jit.trace(nn.Linear(8, 4), torch.ones(1, 8))
    return traced


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("model", "line"),
    [
        (lambda: "resnet18", "model is a str; name a model in a job file, or pass the torch.nn.Module itself"),
        (lambda: nn.Linear, "model is a type; pass the torch.nn.Module itself"),
        (lazy, "model has no shape yet for '0.weight'; run it once on a batch before"),
        (on_meta, "model has 'weight' on the meta device, without values; load its weights before"),
        (scripted, "whose layers are hidden; give the Python module before it"),
    ],
)
def test_what_is_no_model_with_weights_is_refused(model: Callable[[], Any], line: str, inplace: bool) -> None:
    with pytest.raises(InputError) as caught:
        quantize(model(), data(1), **QUICK, inplace=inplace)
    assert str(caught.value).endswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bits": 4}, "int4"),
        ({"bits": 3}, "int3"),
        ({"dtype": torch.int8}, "int8"),
        ({"dtype": torch.quint8}, "quint8"),
        ({"dtype": torch.float8_e4m3fn}, "float8_e4m3fn"),
    ],
)
def test_words_of_other_tools_are_understood(fields: dict[str, Any], name: str) -> None:
    _, table = quantize(nn.Linear(8, 4), data(1), solver="nearest", progress=False, **fields)
    assert table[0].format == f"{name} per_channel_symmetric"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"bits": 4, "dtype": "int8"}, "bits: given beside dtype"),
        ({"bits": 16}, "bits: 16 is not a whole number from 2 to 8"),
        ({"bits": "4"}, "bits: '4' is not a whole number from 2 to 8"),
        ({"dtype": torch.int32}, "quantize.dtype: 'int32' "),
    ],
)
def test_words_that_mean_nothing_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        quantize(nn.Linear(8, 4), data(1), **fields)
    assert str(caught.value).startswith(line)


def test_the_table_says_what_stayed_in_float_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distributed_adaround"):
        _, table = quantize(net(), data(), dtype="int4", solver="nearest", ignore=["first"], progress=False)
    left = {parameter.name: parameter.reason for parameter in table.float_parameters}
    assert left["first.weight"] == "ignored by quantize.ignore"
    assert "in float stay first.weight" in caplog.text
    assert str(table).startswith(f"{100 * table.coverage.share:.1f} % of ")
    assert 0 < table.output_error < 1


class Nested(nn.Module):
    """One argument is a dict, one a list; it works in place on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, named: dict[str, Tensor], listed: list[Tensor]) -> Tensor:
        named["x"].mul_(2)
        return self.head(self.first(named["x"] + listed[0]).relu() + listed[1])


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("hooks", [False, True])
def test_tensors_in_dicts_and_lists_of_float64_stay_as_they_are(by_name: bool, hooks: bool) -> None:
    class Branching(Nested):
        def forward(self, named: dict[str, Tensor], listed: list[Tensor]) -> Tensor:
            return super().forward(named, listed if named["x"].sum() > 0 else listed[::1])

    torch.manual_seed(0)
    model = (Branching if hooks else Nested)().eval()
    given = [({"x": x.double()}, [x.double(), x.double() @ torch.ones(8, 16).double()]) for x in data(3)]
    batches: list[Any] = [{"named": named, "listed": listed} for named, listed in given] if by_name else given
    before = copy.deepcopy(batches)
    _, table = quantize(model, batches, dtype="int4", solver="nearest", progress=False)
    assert [row.name for row in table] == ["first", "head"]
    assert 0 < table.output_error < 0.1
    for found, expected in zip(tree_leaves(batches), tree_leaves(before), strict=True):
        assert torch.equal(found, expected)


def test_images_as_bytes_are_explained() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"the data are uint8: make of them .* by data\.transform$"):
        quantize(nn.Conv2d(3, 4, 3), [images], **QUICK)


def test_a_pattern_for_a_module_that_stays_in_float_anyway_is_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with caplog.at_level(logging.WARNING, logger="distributed_adaround"):
        quantize(model, data(1), dtype="int4", solver="nearest", ignore=["1", "Tanh", "other"], progress=False)
    assert [line for line in caplog.messages if "pattern" in line] == [
        "quantize: the pattern 'other' matches no layer of this model"
    ]


def test_a_model_without_layers_is_told_what_it_has() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(InputError, match=r"none of the model's 0 .* layers is to be quantized: scale 8: .*mul"):
        quantize(Scaled(), data(1), **QUICK)


def test_inside_a_group_of_one() -> None:
    model, batches = net(), data()
    alone = state_of(quantize(model, batches, **QUICK).model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for sharded in (False, True):
        assert_same_state(state_of(quantize(model, batches, **QUICK, sharded=sharded).model), alone)
    assert dist.is_initialized()


def in_a_group(kind: str) -> Any:
    """What one rank of a group gets."""
    rank, batches = dist.get_rank(), data(5)
    model, fields = net(), dict(QUICK, compute_dtype="float64")
    if kind == "sharded":
        return weights(quantize(model, batches[:2] if rank == 0 else batches[2:], **fields, sharded=True).model)
    if kind == "one rank has nothing":
        return weights(quantize(model, batches if rank == 1 else [], **fields, sharded=True).model)
    if kind == "same":
        return weights(quantize(model, batches, **fields).model)
    try:
        if kind == "other counts":
            quantize(model, batches[: 3 + rank], **fields)
        elif kind == "other model":
            quantize(net(seed=rank), batches, **fields)
        elif kind == "a token too many on one rank":
            # Of the same shape as the others, so that it is found when the walk comes to it.
            torch.manual_seed(0)
            tokens = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
            quantize(tokens, [torch.full((3, 5), 99 * rank)], **fields, sharded=True)
        elif kind == "bad batch on one rank":
            quantize(model, [*batches, "text"] if rank == 1 else batches, **fields)
        else:
            quantize(model, [], **fields, sharded=True)
    except distributed_adaround.AdaRoundError as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What one rank learns in float64."""
    return weights(quantize(net(), data(5), **QUICK, compute_dtype="float64").model)


@pytest.mark.parametrize("kind", ["same", "sharded", "one rank has nothing"])
def test_two_ranks_learn_what_one_rank_learns(pool: RankPool, alone: dict[str, Tensor], kind: str) -> None:
    for found in pool.run(in_a_group, 2, kind):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], weight) for name, weight in alone.items())


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("other counts", ["InputError: ranks pass [3, 4] batches"] * 2),
        ("other model", ["InputError: the model on ranks [1] has other weights than on rank 0"] * 2),
        ("bad batch on one rank", ["PeerError: rank 1 failed to read the batches", "InputError: a batch is a str"]),
        ("a token too many on one rank", ["PeerError: rank 1 failed to reach layer 1", "microbatch 1"]),
        ("nothing anywhere", ["InputError: batches is empty"] * 2),
    ],
)
def test_ranks_that_do_not_fit_together_all_fail(pool: RankPool, kind: str, messages: list[str]) -> None:
    for found, message in zip(pool.run(in_a_group, 2, kind), messages, strict=True):
        assert isinstance(found, str)
        assert message in found


def test_the_package_exposes_its_names_without_torch() -> None:
    code = (
        "import sys, distributed_adaround as d\n"
        "assert 'torch' not in sys.modules\n"
        "d.JobSpec, d.MethodSpec, d.SpecError, d.__version__\n"
        "assert 'torch' not in sys.modules\n"
        "assert not set(d.__all__) - {n for n in d.__all__ if getattr(d, n) is not None}\n"
        "assert 'torch' in sys.modules\n"
        "public = {n for n in vars(d) if not n.startswith('_')} - {'annotations', 'TYPE_CHECKING', 'Any'}\n"
        "modules = {n for n in public if type(getattr(d, n)) is type(sys)}\n"
        "assert public - modules <= set(d.__all__), public - modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        distributed_adaround.quantise  # noqa: B018
