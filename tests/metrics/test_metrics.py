"""Sums of each metric against plain loops."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_adaround.data.encoder import LABELS, ROW_MASK
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError
from distributed_adaround.metrics import perplexity
from distributed_adaround.metrics.accuracy import Accuracy
from distributed_adaround.metrics.metric import Metric, Seen
from distributed_adaround.metrics.perplexity import Perplexity
from distributed_adaround.metrics.similarity import Similarity

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0], [0, 0, 3, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])  # whole, padded at the right, at the left


def seen(output: Any, mask: Tensor | None = None, index: int = 0, **fields: Tensor) -> Seen:
    inputs = {name: value for name, value in fields.items() if name != LABELS} or {"x": torch.zeros(3, 1)}
    return Seen(index, fields, ModelInputs((), dict(inputs), mask), output)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def surprises(logits: Tensor, tokens: Tensor, mask: Tensor) -> list[tuple[float, int]]:
    """Of each sample: negative log-likelihoods of its next tokens, and their number."""
    found = []
    for row, ids, counts in zip(logits.double(), tokens.tolist(), mask.tolist(), strict=True):
        total, number = 0.0, 0
        for place in range(len(ids) - 1):
            if counts[place] and counts[place + 1]:
                exponentials = [math.exp(value) for value in row[place].tolist()]
                total -= math.log(exponentials[ids[place + 1]] / sum(exponentials))
                number += 1
        found.append((total, number))
    return found


@pytest.mark.parametrize("rows", [1, 2, 128])
@pytest.mark.parametrize("mask", [MASK, None])
def test_perplexity_counts_next_tokens(mask: Tensor | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_ROWS", rows)
    logits = drawn(3, 5, 7)
    expected = surprises(logits, TOKENS, torch.ones_like(TOKENS) if mask is None else mask)
    found = Perplexity().sums(seen(SimpleNamespace(logits=logits), mask, input_ids=TOKENS))
    assert found.dtype == torch.float64
    assert found[:, 1].tolist() == [number for _, number in expected]
    assert found[:, 0].tolist() == pytest.approx([total for total, _ in expected], rel=1e-6)


def test_perplexity_takes_named_logits_and_what_the_decoder_reads() -> None:
    logits, memory = drawn(3, 5, 7), drawn(3, 2, 9)
    fields = {"input_ids": TOKENS[:, :2], "decoder_input_ids": TOKENS, "decoder_attention_mask": MASK}
    found = Perplexity().sums(seen({"memory": memory, "logits": logits}, torch.ones(3, 2), **fields))
    assert found[:, 0].tolist() == pytest.approx([total for total, _ in surprises(logits, TOKENS, MASK)], rel=1e-6)
    first = Perplexity().sums(seen((TOKENS, logits, memory), MASK, input_ids=TOKENS))
    assert torch.equal(first, found)


def test_perplexity_of_half_precision_is_computed_in_float32() -> None:
    logits = drawn(3, 5, 7, dtype=torch.bfloat16)
    found = Perplexity().sums(seen(logits, MASK, input_ids=TOKENS))
    assert found[:, 0].tolist() == pytest.approx([total for total, _ in surprises(logits, TOKENS, MASK)], rel=1e-6)


def test_accuracy_is_one_for_the_right_class_and_nan_for_none() -> None:
    logits = torch.tensor([[1.0, 2, 0], [-torch.inf, 0, 1], [0, torch.nan, 1]])
    found = Accuracy().sums(seen((logits,), **{LABELS: torch.tensor([1, 0, 2], dtype=torch.uint8)}))
    assert found[:, 0].tolist()[:2] == [1.0, 0.0]
    assert math.isnan(found[2, 0])
    assert found[:, 1].tolist() == [1.0, 1.0, 1.0]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def pooled(output: Tensor, mask: Tensor) -> list[list[float]]:
    """Means of the tokens that count."""
    kept = [
        [row for row, keep in zip(rows, keeps, strict=True) if keep]
        for rows, keeps in zip(output.tolist(), mask.tolist(), strict=True)
    ]
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in kept]


@pytest.mark.parametrize("mask", [MASK, None, torch.ones(3, 2)])
def test_similarity_of_tokens_is_that_of_their_mean(mask: Tensor | None) -> None:
    metric = Similarity()
    before, after = drawn(3, 5, 4), drawn(3, 5, 4) + 0.5 * drawn(5, 3, 4).transpose(0, 1)
    assert metric.sums(seen((TOKENS, before), mask, index=4)).tolist() == [[1.0, 1.0]] * 3
    assert metric.sums(seen((TOKENS, before), mask, index=5)).tolist() == [[1.0, 1.0]] * 3
    found = metric.sums(seen((TOKENS, after), mask, index=4))
    counts = MASK if mask is MASK else torch.ones_like(MASK)  # a mask of other tokens says nothing of these
    pairs = zip(pooled(before, counts), pooled(after, counts), strict=True)
    assert found[:, 0].tolist() == pytest.approx([cosine(a, b) for a, b in pairs], rel=1e-6)


def test_similarity_of_other_outputs_is_that_of_all_their_values() -> None:
    metric = Similarity()
    before, after = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4).flip(0)
    metric.sums(seen(before))
    expected = [cosine(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(before, after, strict=True)]
    assert metric.sums(seen(after))[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert math.isnan(Similarity().sums(seen(before.where(before > 0, torch.nan)))[0, 0])


@pytest.mark.parametrize(
    ("metric", "given", "message"),
    [
        (Perplexity(), seen(drawn(3, 7), input_ids=TOKENS), r"logits \(samples, tokens, vocabulary\), but .* \(3, 7\)"),
        (Perplexity(), seen(drawn(3, 4, 7), input_ids=TOKENS), r"output has shape \(3, 4, 7\), the tokens \(3, 5\)"),
        (Perplexity(), seen(drawn(3, 5, 6), input_ids=TOKENS), "tokens go from 0 to 6, but the logits are of 6"),
        (Perplexity(), seen(drawn(3, 5, 7), input_ids=TOKENS - 1), "tokens go from -1 to 5"),
        (Perplexity(), seen(drawn(3, 5, 7), ids=TOKENS), "needs the field input_ids, .* there are ids; name it"),
        (Perplexity(), seen(drawn(3, 5, 7), input_ids=TOKENS.float()), "needs the field input_ids, whole numbers"),
        (Perplexity(), seen(drawn(3, 5, 7), MASK[:, :4], input_ids=TOKENS), r"mask has shape \(3, 4\), the tokens"),
        (Perplexity(), seen({"a": TOKENS}, input_ids=TOKENS), "output is no tensor of real numbers"),
        (Similarity(), seen(drawn(4, 5)), r"is of shape \(4, 5\); its first axis must be the 3 samples"),
        (Similarity(), seen(torch.tensor(1.0)), r"is of shape \(\); its first axis"),
        (Accuracy(), seen(drawn(3, 5), labels=torch.tensor([0, 1, 5])), "labels go from 0 to 5, .* classes 0 to 4"),
        (Accuracy(), seen(drawn(3, 5), labels=torch.tensor([0, -1, 4])), "labels go from -1 to 4"),
        (Accuracy(), seen(drawn(3, 5), labels=torch.zeros(3)), r"labels are torch.float32 \(3,\), .* \(3, 5\)"),
        (Accuracy(), seen(drawn(3, 5, 2), labels=TOKENS[:, 0]), r"the output has shape \(3, 5, 2\)"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(metric: Metric, given: Seen, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        metric.sums(given)
    assert "\n" not in str(raised.value)


def test_the_mask_of_a_decoder_is_that_of_its_own_tokens() -> None:
    """The mask of the model's inputs is of the encoder's, even where it has the same shape."""
    logits, others = drawn(3, 5, 7), torch.ones_like(MASK)
    for name in ("decoder_attention_mask", ROW_MASK):
        given = seen(logits, others, decoder_input_ids=TOKENS, **{name: MASK})
        expected = [total for total, _ in surprises(logits, TOKENS, MASK)]
        assert Perplexity().sums(given)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
        metric = Similarity()
        metric.sums(given)
        # Rows that do not count have no say.
        changed = torch.where(MASK[..., None] != 0, logits, 0)
        assert metric.sums(dataclasses.replace(given, output=changed)).tolist() == [[pytest.approx(1.0), 1.0]] * 3
    without = seen(logits, MASK, decoder_input_ids=TOKENS)
    expected = [total for total, _ in surprises(logits, TOKENS, others)]
    assert Perplexity().sums(without)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
