"""The same job on a CUDA device: run with `pytest -m gpu` on a machine that has one."""

import pytest
import torch
from torch import nn

from distributed_adaround import quantize

pytestmark = pytest.mark.gpu


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, stride=2, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 17 * 17, 10),
    ).eval()


@pytest.mark.parametrize("solver", ["minibatch", "gram", "gptq"])
@pytest.mark.parametrize("device_memory", [None, 4096], ids=["fits", "spills to the host"])
def test_gpu_agrees_with_cpu(device_memory: int | None, solver: str) -> None:
    model = _model()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    settings = {
        "dtype": "int4",
        "max_iter": 200,
        "lr": 1e-2,
        "solver": solver,
        "compute_dtype": "float64",
        "progress": False,
    }
    on_cpu = quantize(model, batches, device="cpu", **settings)
    on_gpu = quantize(model, batches, device="cuda:0", device_memory=device_memory, **settings)
    for cpu_row, gpu_row in zip(on_cpu.table, on_gpu.table, strict=True):
        assert gpu_row.hard_error == pytest.approx(cpu_row.hard_error, rel=0.05)
        assert gpu_row.hard_error <= gpu_row.nearest_error
    for name, parameter in on_gpu.model.named_parameters():
        assert parameter.device.type == "cpu", f"{name} was moved: weights stay where the model has them"


def test_no_step_waits_for_the_device() -> None:
    """Between two looks at the loss nothing may synchronise: torch raises where something does."""
    from distributed_adaround.numerics.soft_rounding import OutputTransform, SoftRounding
    from distributed_adaround.solve.learner import add_regularizer, fill_bucket

    weight = torch.randn(1, 8, 16, device="cuda")
    soft = SoftRounding(weight, weight.floor(), weight.floor() + 1)
    bucket = torch.zeros(weight.numel() + 3, device="cuda")
    shapes = ((1, 32, 16), (32, 8), (32, 8), (8,))
    inputs, base, targets, scale = (torch.randn(*shape, device="cuda") for shape in shapes)
    transform = OutputTransform(scale, scale, "relu")
    linear = transform.linear_part()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fill_bucket(bucket, soft, inputs, None, targets, linear, scale)
        fill_bucket(bucket, soft, inputs, base, targets, transform, scale)
        add_regularizer(bucket, soft, 0.1, 5.0, 0, 1)
        soft.descend(bucket[:-3].view_as(soft.alpha), 1e-2, 1e-8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(bucket).all()


@pytest.mark.parametrize("dtype", ["int3", "nvfp4"])
def test_no_sweep_waits_for_the_device(dtype: str) -> None:
    from distributed_adaround.numerics.descent import Descent
    from distributed_adaround.numerics.moments import Quadratic
    from distributed_adaround.numerics.ranges import choose_grid
    from distributed_adaround.spec.quantize import QuantizeSpec

    layer_format = QuantizeSpec(dtype=dtype).for_layer("layer", "Linear")
    assert layer_format is not None
    weight, inputs = torch.randn(1, 24, 64), torch.randn(200, 64)
    grid = choose_grid(weight, layer_format).to(torch.float32, torch.device("cuda"))
    second = (inputs.T @ inputs / 200).cuda()[None]
    quadratic = Quadratic(second, weight.cuda(), torch.randn_like(weight).cuda())
    descent = Descent(quadratic, grid, block=16, steps=3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mu in (0.1, 1.0):
            descent.sweep(mu)
        descent.settle()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(descent.losses()).all()
