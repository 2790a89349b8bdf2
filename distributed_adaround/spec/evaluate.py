"""The section `evaluate` of a job: what the float and the quantized network are judged by, at the end."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.explain import ABSENT, ContradictionError, Section
from distributed_adaround.spec.fields import ImportPath, NameIn

# What is measured (the contract is metrics.metric.Metric).
METRICS: dict[str, str] = {
    "perplexity": "distributed_adaround.metrics.perplexity:Perplexity",
    "accuracy": "distributed_adaround.metrics.accuracy:Accuracy",
    "similarity": "distributed_adaround.metrics.similarity:Similarity",
}


class EvaluateSpec(Section):
    """A metric of the float and of the quantized network, on data of its own."""

    metric: Annotated[str, NameIn(METRICS)] | None = None
    """perplexity: of the next token. accuracy: percent of samples whose largest logit is that of the field labels.
    similarity: mean cosine between first outputs of the float and the quantized network, averaged over tokens."""
    function: ImportPath | None = Field(None, examples=["my_models:word_errors"])
    """module:callable, instead of metric: called on every rank that has data as function(model, batches), with an
    iterator over dicts of tensors; returns {name: one number for each sample, in order}, of which means are taken. A
    field labels of arrays is in the dicts, though the model does not get it; texts, images and audio give none."""
    data: DataSpec
    """Data that calibration does not use; the fields are those of data."""

    @model_validator(mode="after")
    def _one_metric(self) -> Self:
        if self.metric is None and self.function is None:
            text = "is missing, and function too; give metric (perplexity, say) or function (module:callable)"
            raise ContradictionError(("metric",), ABSENT, text)
        if self.metric is not None and self.function is not None:
            raise ContradictionError(("function",), self.function, "and metric exclude each other; remove one of them")
        return self
