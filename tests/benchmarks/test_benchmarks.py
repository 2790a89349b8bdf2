"""The benchmark's own arithmetic: the ancestor's step by hand, groups that fit, bytes counted, rows from lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_adaround.errors import SpecError
from distributed_adaround.formats import LayerFormat
from distributed_adaround.spec.quantize import QuantizeSpec
from tests.benchmarks import records
from tests.benchmarks.aggregate import ratio, rows_of
from tests.benchmarks.ancestor import AncestorSettings, SoftWeight, beta_at, learn, loss_at, minmax_grid, round_network
from tests.benchmarks.compare import held_out_errors
from tests.benchmarks.configurations import is_random, method_spec, quantize_fields
from tests.benchmarks.measure import counted_collectives
from tests.benchmarks.table import markdown

CPU = torch.device("cpu")


def layer_format(**fields: Any) -> LayerFormat:
    found = QuantizeSpec(**{"dtype": "int3", "observer": "minmax", **fields}).for_layer("layer", "Linear")
    assert found is not None
    return found


def test_the_ancestor_starts_at_the_float_weight_and_ends_on_the_grid() -> None:
    weight = torch.tensor([[0.3, -0.7, 0.05], [1.0, 0.2, -0.4]])
    grid = minmax_grid(weight, layer_format())
    torch.testing.assert_close(grid.scale, torch.tensor([[0.7 / 3.5], [1.0 / 3.5]]))
    soft = SoftWeight(weight, grid)
    # 1.0 lies beyond the largest code 3 and -0.7 beyond -3.5 only by half a step, so the first is clipped.
    expected = weight.clone()
    expected[1, 0] = 3 * 1.0 / 3.5
    torch.testing.assert_close(soft.value().detach(), expected)
    codes = soft.value(hard=True) / grid.scale
    torch.testing.assert_close(codes, codes.round())


@pytest.mark.parametrize("warm_start", [0.2, 0.0], ids=["warm-up", "regularized"])
def test_one_step_of_the_ancestor_by_hand(warm_start: float) -> None:
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    inputs, targets = torch.randn(5, 3), torch.randn(5, 2)
    settings = AncestorSettings(batch_size=5, warm_start=warm_start, max_iter=10)
    soft = learn(layer, inputs, targets, layer_format(), settings, num_steps=1)

    scale = weight.abs().amax(1, keepdim=True) / 3.5
    fraction = weight / scale - torch.floor(weight / scale)
    start = torch.log((fraction + 0.1) / (1.1 - fraction))
    sigmoid = torch.sigmoid(start)
    inside = torch.floor(weight / scale) + fraction < 3
    error = inputs @ torch.where(inside, weight, 3 * scale).T + bias - targets
    by_h = 2 / 10 * (error.T @ inputs) * scale * inside
    if warm_start == 0:
        centred = 2 * fraction - 1
        by_h = by_h - 1e-3 * 20 * centred.abs() ** 19 * centred.sign() * 2
    gradient = by_h * 1.2 * sigmoid * (1 - sigmoid)
    # Adam's first step has the length of the learning rate, against the gradient's sign.
    torch.testing.assert_close(soft.V.detach(), start - 1e-3 * gradient / (gradient.abs() + 1e-8), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.weight.detach(), soft.value().detach())


def test_schedule_and_loss_of_the_ancestor() -> None:
    settings = AncestorSettings(max_iter=100)
    assert [beta_at(step, settings) for step in (20, 60, 100)] == pytest.approx([20, 11, 2])
    output, target, h = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0, 0.75])
    assert loss_at(19, output, target, h, settings).item() == pytest.approx(2.5)
    assert loss_at(60, output, target, h, settings).item() == pytest.approx(2.5 + 1e-3 * (1 + 0 + 1 - 0.5**11))


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_the_ancestor_rounds_a_network_or_says_what_it_measured() -> None:
    model, batches = small_network(), [torch.randn(8, 4) for _ in range(2)]
    formats = {"0": layer_format(), "2": layer_format(dtype="int4")}
    whole = round_network(model, batches, formats, AncestorSettings(max_iter=4), CPU)
    assert whole.complete
    assert not whole.note
    for name, found in formats.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        hard = whole.hard.get_submodule(name).weight / minmax_grid(weight.detach(), found).scale
        torch.testing.assert_close(hard, hard.round())
    part = round_network(model, batches, formats, AncestorSettings(max_iter=1000, max_layers=1, max_steps=2), CPU)
    assert not part.complete
    assert part.note.startswith("1 of 2 layers and 2 of 1000 steps measured")
    assert part.seconds > part.measured_seconds


def test_errors_of_two_models_side_by_side() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2, bias=False)), nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        other[0].weight.copy_(torch.eye(2) * 1.5)
    errors = held_out_errors(model, other, ["0"], [torch.randn(4, 2)], CPU)
    assert errors == pytest.approx({"output_error": 0.25, "layer_error": 0.25})


def test_groups_apply_where_they_divide() -> None:
    fields = quantize_fields("int4g128", {"wide": 256, "odd": 100, "head": 100}, ["head"])
    spec = method_spec("minibatch@7", fields, seed=3, device="cpu", settings=["rounding.lr=0.1"])
    assert (spec.rounding.max_iter, spec.rounding.lr, spec.runtime.seed) == (7, 0.1, 3)
    formats = [spec.quantize.for_layer(name, "Linear") for name in ("wide", "odd", "head")]
    assert [found and found.group_size for found in formats] == [128, None, None]
    with pytest.raises(SpecError, match="no layer"):
        quantize_fields("int4g128", {"odd": 100, "head": 256}, ["head"])
    with pytest.raises(SpecError, match="no such solver"):
        method_spec("guess", {}, seed=0, device="cpu")


def test_what_the_seed_changes() -> None:
    assert [is_random(name) for name in ("minibatch@10", "minibatch+polish", "ancestor@3", "gram@10", "nearest")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_bytes_handed_to_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor)
    stub = dist.all_reduce
    with counted_collectives() as sent:
        dist.all_reduce(torch.zeros(3))
        dist.all_reduce(torch.zeros(2, dtype=torch.float64))
    assert sent == {"bytes": 28, "calls": 2}
    assert dist.all_reduce is stub


def line(solver: str, layer: str, seed: int, **values: Any) -> dict[str, Any]:
    head = {"part": "layers", "case": "c", "format": "int3", "samples": [4, 2], "settings": [], "device": "cpu"}
    return {**head, "solver": solver, "layer": layer, "seed": seed, **values}


def test_rows_from_a_file_that_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line("gptq", "a", 0, error=0.2, seconds=1.0),
        line("gptq", "b", 0, error=9.0, seconds=9.0),
        line("gptq", "b", 0, error=0.4, seconds=3.0),
        *(line("minibatch", layer, seed, error=0.1 + 0.2 * seed, seconds=4.0) for layer in "ab" for seed in (0, 1)),
        line("minibatch", "a", 2, error=7.0, seconds=4.0),
        {**line("gram", "a", 0), "layer": None, "refused": "not yet"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"part": "lay'
    (tmp_path / records.FILE_NAME).write_text(text, encoding="utf-8")
    found = records.read(tmp_path)
    assert "not whole" in capsys.readouterr().err
    records.append(tmp_path, line("nearest", "a", 0, failed="lost"), machine={})
    assert len(records.read(tmp_path)) == len(found) + 1
    assert records.finished(found) == {records.key(record) for record in found if "refused" not in record}

    gptq, minibatch, gram = rows_of(found, "layers")
    assert gptq.figures["error"].mean == pytest.approx(0.3)
    assert gptq.figures["seconds"].mean == 2
    assert minibatch.figures["error"].mean == pytest.approx(0.2)
    assert minibatch.figures["error"].spread == pytest.approx(0.2 / math.sqrt(2))
    assert "1 of 3 seeds lack layers" in minibatch.problem
    assert gram.problem == "refused: not yet"
    assert ratio(minibatch, "gptq", [gptq, minibatch, gram], "error") == pytest.approx(2 / 3)
    assert "| minibatch | 2 | 0.2 ± 0.1 | 4 ± 0 |" in markdown(found)
