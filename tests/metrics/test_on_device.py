"""Models and programs as modules on a device."""

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.metrics.on_device import on_device


class Stack(nn.Module):
    """Weights that are read by a list of their own (LSTM), tied, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.recurrent(x)[0])) * self.scale


class Counting(nn.Module):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x - shift + torch.arange(3, device=x.device)


def held(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    return {name: (each, each.data_ptr()) for name, each in module.state_dict(keep_vars=True).items()}


@pytest.mark.gpu
def test_tensors_visit_the_device_and_come_back_as_they_were() -> None:
    model, x = Stack().eval(), torch.randn(2, 3, 4)
    before = {name: (id(tensor), place) for name, (tensor, place) in held(model).items()}
    with torch.no_grad(), on_device(model, torch.device("cuda")) as module:
        output = module(x.cuda())
        assert {tensor.device.type for tensor, _ in held(model).values()} == {"cuda"}
    torch.testing.assert_close(output.cpu(), model(x), rtol=1e-3, atol=1e-3)
    assert {name: (id(tensor), place) for name, (tensor, place) in held(model).items()} == before


def test_a_program_runs_with_the_weights_it_has_now() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).eval().requires_grad_(False), torch.randn(2, 4)
    program = torch.export.export(model, (x,))
    for factor in (1.0, 3.0):
        program.state_dict["0.weight"].fill_(factor)
        with on_device(program, torch.device("cpu")) as module:
            expected = x @ torch.full((4, 3), factor) + program.state_dict["0.bias"]
            torch.testing.assert_close(module(x), expected)


def test_a_program_runs_on_another_device_than_it_was_exported_on() -> None:
    meta = torch.device("meta")
    program = torch.export.export(Counting(), (torch.zeros(2, 3), torch.zeros(3)))
    with on_device(program, meta) as module:
        assert module(torch.zeros(2, 3, device=meta), torch.zeros(3, device=meta)).device == meta
    with on_device(program, torch.device("cpu")) as module:
        assert module(torch.zeros(2, 3), torch.zeros(3)).tolist() == [[0.0, 1.0, 2.0]] * 2


@pytest.mark.parametrize("by_name", [(), ("shift",), ("x", "shift")])
def test_a_program_takes_inputs_by_position_and_by_name(by_name: tuple[str, ...]) -> None:
    inputs = {"x": torch.full((2, 3), 5.0), "shift": torch.ones(3)}
    given = tuple(value for name, value in inputs.items() if name not in by_name)
    program = torch.export.export(Counting(), given, {name: inputs[name] for name in by_name})
    with on_device(program, torch.device("cpu")) as module:
        for found in (module(**inputs), module(*inputs.values()), module(inputs["x"], shift=inputs["shift"])):
            assert found.tolist() == [[4.0, 5.0, 6.0]] * 2
        with pytest.raises(ValueError, match=r"takes the inputs \['x', 'shift'\], not \['x', 'y'\]"):
            module(x=inputs["x"], y=inputs["shift"])
