"""Einsums as batched matrix products, so that the walk sees which operands are weights, and of how many layers.

te,eoi,ti->to      the outputs of experts W[e] on all tokens, times their shares:  x'[t,e,i] = share[t,e] x[t,i],
                   y[e] = x'[:,e] W[e]ᵀ, and the sum over e: a layer for each expert, not one with e * i inputs
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

_EINSUM = torch.ops.aten.einsum.default


def einsum_table(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """For `run_decompositions`: nothing where no weight is read by an einsum, or one is not understood."""
    signature = program.graph_signature
    constant: set[Node] = set()
    weights: dict[str, int] = {}
    for node in program.graph.nodes:
        stored = node.op == "placeholder" and node.name not in signature.user_inputs
        if stored or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
        if node.target == _EINSUM:
            equation, operands = node.args[:2]
            if len(node.args) > 2 or _letters(equation, [operand.meta["val"].dim() for operand in operands]) is None:
                return {}
            own = [place for place, operand in enumerate(operands) if operand in constant]
            if len(own) == 1:
                weights[equation] = own[0]
    return {_EINSUM: lambda equation, operands: _einsum(equation, operands, weights)} if weights else {}


def _letters(equation: str, dims: Sequence[int]) -> tuple[list[str], str] | None:
    """Letters of each operand and of the result; None: not understood (a diagonal, an ellipsis, no arrow)."""
    sources, arrow, result = equation.replace(" ", "").partition("->")
    letters = sources.split(",")
    plain = all(part.isalpha() or not part for part in (*letters, result))
    unique = all(len(set(part)) == len(part) for part in (*letters, result))
    fits = [len(part) for part in letters] == list(dims)
    return (letters, result) if arrow and plain and unique and fits else None


def _einsum(equation: str, operands: Sequence[Tensor], weights: Mapping[str, int]) -> Tensor:
    found = _letters(equation, [operand.dim() for operand in operands])
    assert found is not None
    letters, result = found
    parts = list(zip(letters, operands, strict=True))
    if equation not in weights or len(parts) < 3:
        name, value = _chain(parts, result)
        return _ordered(value, name, result)
    weight_letters, weight = parts.pop(weights[equation])
    experts = _experts(weight_letters, weight, [name for name, _ in parts], result)
    name, value = _chain(parts, weight_letters + result)
    value = _product(name, value, weight_letters, weight, result + experts)
    return value.sum(dim=tuple(range(len(result), value.dim()))) if experts else value


def _experts(letters: str, weight: Tensor, others: Sequence[str], result: str) -> str:
    """Letters over which products are summed, where shares and inputs come from operands of their own: all that are
    summed, but for those of the operand that has the inputs, the longest of them."""
    summed = [letter for letter in letters if letter not in result]
    by_operand = {"".join(letter for letter in summed if letter in other) for other in others} - {""}
    inputs = max(by_operand, key=lambda part: math.prod(int(weight.shape[letters.index(c)]) for c in part), default="")
    return "".join(letter for letter in summed if letter not in inputs)


def _chain(parts: list[tuple[str, Tensor]], needed: str) -> tuple[str, Tensor]:
    """One operand after the other; keeps letters that a later one or the result needs."""
    name, value = parts[0]
    for place, (other, operand) in enumerate(parts[1:], start=2):
        later = needed + "".join(letters for letters, _ in parts[place:])
        kept = "".join(letter for letter in dict.fromkeys(name + other) if letter in later)
        name, value = kept, _product(name, value, other, operand, kept)
    return name, value


def _product(a_letters: str, a: Tensor, b_letters: str, b: Tensor, result: str) -> Tensor:
    """An einsum of two operands as `bmm`."""
    a_letters, a = _summed(a_letters, a, b_letters + result)
    b_letters, b = _summed(b_letters, b, a_letters + result)
    sizes = dict(zip(a_letters, a.shape, strict=True)) | dict(zip(b_letters, b.shape, strict=True))
    both = [letter for letter in b_letters if letter in a_letters]
    batch, inner = ([c for c in both if (c in result) == kept] for kept in (True, False))
    left, right = ([c for c in own if c not in both] for own in (a_letters, b_letters))

    def size(letters: list[str]) -> Any:
        return math.prod(sizes[letter] for letter in letters)

    first = _ordered(a, a_letters, "".join(batch + left + inner)).reshape(size(batch), size(left), size(inner))
    second = _ordered(b, b_letters, "".join(batch + inner + right)).reshape(size(batch), size(inner), size(right))
    whole = torch.bmm(first, second).reshape([sizes[letter] for letter in batch + left + right])
    return _ordered(whole, "".join(batch + left + right), result)


def _summed(letters: str, value: Tensor, needed: str) -> tuple[str, Tensor]:
    """Without the dimensions that nothing else has."""
    dims = [place for place, letter in enumerate(letters) if letter not in needed]
    kept = "".join(letter for letter in letters if letter in needed)
    return kept, value.sum(dim=dims) if dims else value


def _ordered(value: Tensor, letters: str, result: str) -> Tensor:
    letters, value = _summed(letters, value, result)
    return value.permute([letters.index(letter) for letter in result])
