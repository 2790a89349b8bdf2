"""How the rounding is learned: the section `rounding` of a job. A null stands for what suits the solver."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.explain import ContradictionError, Section
from distributed_adaround.spec.fields import Arguments, NameIn, PositiveInt

# How a layer is rounded (the contract is solve.problem.Solver).
SOLVERS: dict[str, str] = {
    "minibatch": "distributed_adaround.solve.adaround:MinibatchSolver",
    "gram": "distributed_adaround.solve.gram:GramSolver",
    "gptq": "distributed_adaround.solve.gptq:GptqSolver",
    "nearest": "distributed_adaround.solve.gptq:NearestSolver",
}

Exponent = Annotated[float, Field(gt=1)]

# For nearest measured on ResNet-20 and MiniLM at 3 bits: from 10 to 30 nearly all soft values settle and the output
# error hardly changes; at 3 some stay open, at 1 many. The others are the paper's and the ancestor's.
_REG_PARAMS = {"sum": 0.01, "mean": 0.001, "nearest": 10.0}


class RoundingSpec(Section):
    """How the rounding of each layer is learned."""

    solver: Annotated[str, NameIn(SOLVERS)] = "minibatch"
    """minibatch: AdaRound by gradient steps on batches; gram: descent on the exact quadratic of all calibration data,
    faster and closer; gptq, nearest: the baselines."""
    solver_args: Arguments = Field({})
    """What another solver than these four needs."""
    max_iter: PositiveInt = 2000
    """With minibatch: steps per layer."""
    sweeps: PositiveInt = 100
    """With gram: how often all inputs of a layer are visited, each time for the cost of one and a half steps on all
    calibration data."""
    starts: int = Field(4, ge=1, le=8)
    """With gram and gptq: from how many scales each channel starts, some below the observer's and some above; the best
    result is kept. Where layers are large the time grows with it."""
    polish: bool | None = None
    """After the solver, move single codes to better grid values and refit scales while that lowers the error on all
    calibration data; not in layers with an activation in the loss. null: true for gram and minibatch, whose last open
    values it settles by what the error says."""
    correct_bias: bool | None = None
    """Restore the mean of each output channel in the float network, by the layer's bias or by the mean of the batch
    norm behind it, where it has one of its own. null: true for gram."""
    correct_scale: bool | None = None
    """Restore the spread of each output channel in the float network, by scales of its own: the least squared error
    shrinks outputs, which adds up over many layers. Scales of few bits stay. null: true for gram."""
    batch_size: PositiveInt = 256
    """Size of the batch of one step over all ranks together."""
    batch_unit: Literal["rows", "samples"] = "rows"
    """What batch_size counts: rows (tokens or output pixels, drawn from all samples) or whole samples."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    """Learning rate of Adam."""
    warm_start: float = Field(0.2, ge=0, lt=1)
    """First part of the steps, 0 to 1, in which the regularizer is off."""
    beta: Annotated[tuple[Exponent, Exponent], Field(strict=False)] = (20.0, 2.0)
    """Exponent of the regularizer at its start and at the last step, above 1; it falls along a cosine."""
    reg_param: float | None = Field(None, ge=0)
    """Weight of the regularizer, lambda in the paper; null: 0.01 with normalization sum, 0.001 with mean, 10 with
    nearest."""
    normalization: Literal["sum", "mean", "nearest"] = "nearest"
    """Scale of the squared error. sum: summed over output channels and averaged over rows, as in the paper; mean:
    averaged over both, as in PyTorch's AdaptiveRoundingOptimizer; nearest: each output channel relative to its error
    under nearest rounding, so that one reg_param means the same in every layer."""
    activation_in_loss: bool | None = None
    """Compare outputs after the ReLU or ReLU6 that follows a layer, where there is one. gram cannot: true makes it
    leave such layers to minibatch. null: true for minibatch, false for the others."""
    asymmetry: float | None = Field(None, ge=0, le=1)
    """How much of the error that earlier layers left in a layer's inputs its rounding is to make up for: 1: all, as in
    the paper; 0: none. Less is better where that error is large: transformers at 3 bits. null: 0.5, for gptq 0."""
    damping: float = Field(0.01, gt=0)
    """With gptq and gram: share of the mean squared input that is added to each."""
    rows_per_input: PositiveInt | None = 128
    """Where moments are taken (gram, gptq, polish, output_mse): from at most about this many rows (tokens, output
    pixels) for each input of a layer, spread evenly over all samples; null: from all. Images have far more pixels than
    a small layer needs."""
    reproducible: bool = False
    """With minibatch: the same bytes on any number of ranks. Ranks then exchange the rows of each batch and share the
    output channels, instead of summing gradients. gram and gptq need no such setting."""
    compute_dtype: Literal["float32", "float64"] = "float32"
    """Precision of the learning."""

    def with_solver(self, solver: str) -> Self:
        return self.model_copy(update={"solver": solver})

    @property
    def for_trials(self) -> Self:
        """Less effort, for a look at a few channels."""
        return self.model_copy(update={"sweeps": min(self.sweeps, 20), "starts": 1})

    def with_steps(self, num_steps: int) -> Self:
        return self.model_copy(update={"max_iter": num_steps, "sweeps": num_steps})

    @property
    def regularization(self) -> float:
        return _REG_PARAMS[self.normalization] if self.reg_param is None else self.reg_param

    @property
    def polishes(self) -> bool:
        return self.solver in ("gram", "minibatch") if self.polish is None else self.polish

    @property
    def corrects_bias(self) -> bool:
        return self.solver == "gram" if self.correct_bias is None else self.correct_bias

    @property
    def corrects_scale(self) -> bool:
        return self.solver == "gram" if self.correct_scale is None else self.correct_scale

    @property
    def sees_activation(self) -> bool:
        return self.solver == "minibatch" if self.activation_in_loss is None else self.activation_in_loss

    @property
    def damped_asymmetry(self) -> float:
        default = 0.0 if self.solver == "gptq" else 0.5
        return default if self.asymmetry is None else self.asymmetry

    def resolved(self) -> dict[str, Any]:
        """All fields with the values that count, as JSON."""
        return self.model_dump(mode="json") | {
            "polish": self.polishes,
            "correct_bias": self.corrects_bias,
            "correct_scale": self.corrects_scale,
            "reg_param": self.regularization,
            "activation_in_loss": self.sees_activation,
            "asymmetry": self.damped_asymmetry,
        }

    @model_validator(mode="after")
    def _beta_falls(self) -> Self:
        if self.beta[0] < self.beta[1]:
            raise ContradictionError(("beta",), self.beta, "must not rise; give the larger value first, as in [20, 2]")
        return self
