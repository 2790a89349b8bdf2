"""Cost of one step of solver `minibatch` over its two bare matrix products: python tests/benchmarks/step_cost.py

On the CPU a solver runs whose communicator keeps time: between two steps it runs the bare products, so both see the
same machine. The table shows medians of the thread's CPU time, which other processes disturb least. On a GPU steps are
not looked at one by one: solver and products are timed as whole loops between two waits for the device. Every step has
the regularizer, as the last 80 % of a default job.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.layer_modules import geometry_of
from distributed_adaround.capture.sites import Batch
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.solve.adaround import MinibatchSolver
from distributed_adaround.solve.problem import LayerProblem, Monitor
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.rounding import RoundingSpec

# Layer, rows a batch, steps.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "384x384": (lambda: nn.Linear(384, 384), 256, 400),
    "1536x384": (lambda: nn.Linear(384, 1536), 256, 200),
    "384x1536": (lambda: nn.Linear(1536, 384), 256, 200),
    "1536x576": (lambda: nn.Linear(576, 1536), 256, 200),
    "576x1536": (lambda: nn.Linear(1536, 576), 256, 200),
    "64x64 3x3": (lambda: nn.Conv2d(64, 64, 3, padding=1), 256, 600),
    "64x64 3x3 relu": (lambda: nn.Conv2d(64, 64, 3, padding=1), 256, 600),
    "384x384 1024": (lambda: nn.Linear(384, 384), 1024, 200),
    "4096x4096": (lambda: nn.Linear(4096, 4096), 256, 20),
}


def layer_problem(layer: nn.Module, relu: bool, device: torch.device) -> LayerProblem:
    """4,096 rows of correlated inputs, int4."""
    geometry = geometry_of(layer)
    mixing = torch.randn(geometry.in_channels // 4, geometry.in_channels) / geometry.in_channels**0.5
    x = torch.randn(4096, mixing.shape[0]) @ mixing
    if geometry.num_spatial_dims:
        x = x.view(16, 16, 16, -1).movedim(-1, 1)
    weight = geometry.to_channels(layer.weight.detach()).clone().to(device)
    layer_format = QuantizeSpec(dtype="int4", observer="mse").for_layer("layer", type(layer).__name__)
    assert layer_format is not None
    x = x.to(device)
    float_x = x + 0.05 * torch.randn_like(x)
    with torch.no_grad():
        target = layer.to(device)(float_x)
    return LayerProblem(
        name="layer",
        geometry=geometry,
        weight=weight,
        bias=layer.bias.detach(),
        grid=choose_grid(weight, layer_format),
        transform=OutputTransform(activation="relu" if relu else "identity"),
        batches=[Batch(0, x, float_x, target, None, x.shape[0])],
        total_microbatches=1,
        store=ActivationStore(device, device_budget=2**34, host_budget=2**34),
        seed=0,
    )


def bare_products(problem: LayerProblem, rows: int) -> Callable[[], object]:
    """Forward `(R, I) (I, O)` and backward `(O, R) (R, I)`, into memory of their own."""
    geometry = problem.geometry
    groups, outputs, inputs = geometry.groups, geometry.out_channels // geometry.groups, geometry.inputs_per_output
    x, w, g, y, gradient = (
        torch.randn(groups, *shape, device=problem.device)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs), (rows, outputs), (outputs, inputs))
    )
    return lambda: (
        torch.bmm(x, w.transpose(1, 2), out=y),
        torch.bmm(g.transpose(1, 2), x, out=gradient),
    )


class TimingComm(SoloComm):
    """Called once a step by the solver: keeps the time of the step, and of the bare products it runs meanwhile."""

    def __init__(self, products: Callable[[], object]) -> None:
        self.products = products
        self.step_times: list[float] = []
        self.product_times: list[float] = []
        self._left: float | None = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        entered = time.thread_time()
        if self._left is not None:
            self.step_times.append(entered - self._left)
        # In blocks of 10, so that most steps find the caches as the step before left them.
        if len(self.step_times) % 10 == 0:
            for _ in range(10):
                start = time.thread_time()
                self.products()
                self.product_times.append(time.thread_time() - start)
        self._left = time.thread_time()
        return tensor


def solve(problem: LayerProblem, rows: int, steps: int, comm: SoloComm, monitor: Monitor) -> None:
    settings = RoundingSpec(max_iter=steps, warm_start=0.0, reg_param=1.0, batch_size=rows, lr=1e-2)
    MinibatchSolver(settings).solve(problem, comm, monitor)


def time_on_cpu(problem: LayerProblem, rows: int, steps: int) -> tuple[float, float]:
    """Seconds of one step and of its products."""
    comm = TimingComm(bare_products(problem, rows))
    solve(problem, rows, steps, comm, Monitor())
    return median(comm.step_times), median(comm.product_times)


def time_on_gpu(problem: LayerProblem, rows: int, steps: int) -> tuple[float, float]:
    """Likewise. Between two calls of monitor.step the solver does not wait for the device."""
    looks: list[tuple[int, float]] = []
    watching = Monitor(lambda step, loss: looks.append((step, time.perf_counter())))
    solve(problem, rows, 10 * steps + 100, SoloComm(), watching)
    (first, started), (last, ended) = looks[0], looks[-1]
    products = bare_products(problem, rows)
    products()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10 * steps):
        products()
    torch.cuda.synchronize()
    return (ended - started) / (last - first), (time.perf_counter() - start) / (10 * steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--only", help="layers whose name contains this")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as job.py does
    print(f"{'layer':16} {'rows':>5} {'ms a step':>10} {'products':>9} {'ratio':>6}")
    for name, (layer, rows, steps) in LAYERS.items():
        if args.only and args.only not in name:
            continue
        problem = layer_problem(layer(), "relu" in name, args.device)
        measure = time_on_cpu if args.device.type == "cpu" else time_on_gpu
        step, products = measure(problem, rows, steps)
        print(f"{name:16} {rows:5} {step * 1e3:10.3f} {products * 1e3:9.3f} {step / products:6.2f}")


if __name__ == "__main__":
    main()
