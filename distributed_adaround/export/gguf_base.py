"""A float GGUF file of a model: which of its tensors holds which layer of ours, and in which order of rows.

llama.cpp's converter gives tensors its own names (the package gguf has the table), stacks experts, and for Llama and
its kin changes the order of the rows of queries and keys, as its rotary embedding wants them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_adaround.errors import InputError, SpecError, first_line, redact
from distributed_adaround.export.stored import QuantizedLayer

_FLOATS = ("F32", "F16", "BF16")
_SUFFIXES = (".weight", ".bias")
# Relative distance of quantized weights from the float ones below which they are the same. That of int2 is about 0.5;
# of numbers that have nothing to do with each other it is 1 and more.
_NEAR = 0.9
# The same of numbers that are only stored in another float type.
_SAME = 0.02


def gguf_library() -> Any:
    try:
        import gguf
    except ImportError as error:
        remedy = f"pip install 'distributed_adaround[gguf]' ({first_line(error)})"
        raise SpecError(f"output.formats gguf needs the package gguf: {remedy}") from error
    return gguf


@dataclass(frozen=True)
class Piece:
    """Rows of a layer that are a tensor of the file, or one of the experts in it; rows: None: all."""

    layer: QuantizedLayer
    target: str
    expert: int | None = None
    rows: slice | None = None

    def of(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]


class BaseGguf:
    """From `BaseGguf.open`. tensors: by their names, as the package gguf reads them. reader: of the file."""

    def __init__(self, reader: Any, shown: str) -> None:
        self.gguf, self.reader, self._shown = gguf_library(), reader, shown
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self._value("general.architecture"))
        known = {name: key for key, name in self.gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise InputError(f"{shown} is of architecture {self.architecture!r}, which the package gguf does not know")
        blocks = self._value(f"{self.architecture}.block_count")
        if not isinstance(blocks, int):
            raise InputError(
                f"{shown} does not say how many blocks it has ({self.architecture}.block_count); make it again"
            )
        self._names = self.gguf.get_tensor_name_map(known[self.architecture], blocks)

    @classmethod
    def open(cls, path: Path, uri: str) -> "BaseGguf":
        """Raises InputError when it is no GGUF file of floats, on one machine's byte order, in one piece."""
        shown, gguf = f"output.base_gguf {redact(uri)!r}", gguf_library()
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the library checks little, so that anything may come
            raise InputError(
                f"{shown} is no GGUF file, or damaged ({first_line(error)}); convert the model again"
            ) from error
        base = cls(reader, shown)
        if reader.byte_order != "I":
            raise InputError(f"{shown} is of the other byte order; convert the model for this one")
        if int(base._value("split.count") or 1) > 1:
            raise InputError(f"{shown} is one of several files; put them together by llama-gguf-split --merge")
        for name, tensor in base.tensors.items():
            if tensor.tensor_type.name not in _FLOATS:
                what = f"holds {name} as {tensor.tensor_type.name}: it is quantized already"
                raise InputError(f"{shown} {what}; convert the model with --outtype f32, f16 or bf16")
        return base

    def name(self, name: str) -> str | None:
        """Of the tensor that holds one of the model; None: none does."""
        found = self._names.get_name(name, try_suffixes=_SUFFIXES)
        if found is not None and not found.endswith(_SUFFIXES):
            found = f"{found}.weight"
        if found == "output.weight" and found not in self.tensors:
            found = "token_embd.weight"  # where a head is tied to the embedding, the file has it once
        return found if found in self.tensors else None

    def pieces(self, layers: Sequence[QuantizedLayer]) -> dict[str, list[Piece]]:
        """By the tensors that are replaced. Raises SpecError for a layer that has none, InputError when one has another
        shape."""
        found: dict[str, list[Piece]] = {}
        for layer in layers:
            for piece in self._pieces(layer):
                found.setdefault(piece.target, []).append(piece)
        for target, pieces in found.items():
            self._check_whole(target, pieces)
        return found

    def _pieces(self, layer: QuantizedLayer) -> Iterator[Piece]:
        part = layer.stored_name.removeprefix(layer.owner)
        target = self.name(layer.owner)
        if len(layer.shape) == 2 and not part and target is not None:
            yield self._checked(Piece(layer, target), 2)
            return
        if len(layer.shape) == 2 and (match := re.fullmatch(r"\[(\d+)\]", part)):
            expert = int(match.group(1))
            # The converter takes two projections of an expert apart that the model has in one.
            halves = [self.name(layer.owner.replace("gate_up_proj", half)) for half in ("gate_proj", "up_proj")]
            if target is not None:
                yield self._checked(Piece(layer, target, expert), 3)
                return
            if "gate_up_proj" in layer.owner and None not in halves and layer.shape[0] % 2 == 0:
                middle = layer.shape[0] // 2
                for half, rows in zip(halves, (slice(0, middle), slice(middle, None)), strict=True):
                    yield self._checked(Piece(layer, str(half), expert, rows), 3)
                return
        what = f"has no tensor of layer {layer.name!r} ({layer.owner}{part}, {list(layer.shape)})"
        raise SpecError(f"{self._shown} {what}; add {layer.name!r} to quantize.ignore")

    def _checked(self, piece: Piece, dims: int) -> Piece:
        rows, inputs = piece.layer.shape
        rows = rows if piece.rows is None else len(range(rows)[piece.rows])
        shape = self.shape(piece.target)
        if len(shape) != dims or shape[-2:] != (rows, inputs):
            own = f"layer {piece.layer.name!r} has {rows} x {inputs}"
            raise InputError(f"{self._shown} has {piece.target} of shape {list(shape)}, {own}; it is of another model")
        return piece

    def shape(self, target: str) -> tuple[int, ...]:
        """With the inputs last, as in torch."""
        return tuple(int(size) for size in reversed(self.tensors[target].shape))

    def _check_whole(self, target: str, pieces: Sequence[Piece]) -> None:
        experts = [piece.expert for piece in pieces]
        if experts == [None]:
            return
        layer, count = pieces[0].layer, self.shape(target)[0]
        if sorted(experts, key=lambda each: -1 if each is None else each) != list(range(count)):
            what = f"{target} holds {count} experts, of which {len(set(experts))} are quantized ({layer.owner})"
            raise SpecError(
                f"output.formats gguf: {what}; quantize all of them, or add 're:{layer.owner}' to quantize.ignore"
            )
        if len({(piece.layer.scheme, str(piece.layer.format)) for piece in pieces}) > 1:
            what = f"all experts of {layer.owner} lie in {target}, in one format"
            raise SpecError(f"output.formats gguf: {what}; remove the quantize.overrides that tell them apart")

    def floats(self, target: str, expert: int | None = None) -> Tensor:
        """Values of a tensor, float32."""
        tensor = self.tensors[target]
        data = tensor.data if expert is None else tensor.data[expert]
        return torch.from_numpy(self.gguf.quants.dequantize(data, tensor.tensor_type).copy())

    def order(self, piece: Piece, weight: Tensor) -> Tensor | None:
        """Which of the layer's rows lie in the file's, one after the other; None: all as they are. weight: quantized.

        Raises InputError when the file holds other numbers."""
        base = self.floats(piece.target, piece.expert)
        orders = [None, *self._orders(piece.target, len(weight))]
        scale = base.norm().clamp_min(torch.finfo(torch.float32).tiny)
        distances = [float((base - (weight if o is None else weight[o])).norm() / scale) for o in orders]
        best = min(range(len(orders)), key=distances.__getitem__)
        if distances[best] > _NEAR:
            what = f"holds other numbers in {piece.target} than layer {piece.layer.name!r}, in any known order of rows"
            raise InputError(f"{self._shown} {what}; give a GGUF made from this very model")
        return orders[best]

    def _orders(self, target: str, rows: int) -> list[Tensor]:
        if not re.search(r"\.attn_[qk]\.", target):
            return []
        heads = {self._value(f"{self.architecture}.attention.head_count{kind}") for kind in ("", "_kv")}
        # Some models have other numbers in each block; those are not of Llama's kin.
        counts = sorted(h for h in heads if isinstance(h, int) and h > 0 and rows % (2 * h) == 0)
        return [torch.arange(rows).reshape(h, 2, -1).transpose(1, 2).flatten() for h in counts]

    def check_same(self, name: str, tensor: Tensor) -> None:
        """Raises InputError when a tensor that stayed in float is another one in the file."""
        base = self.floats(name)
        if tensor.shape != base.shape or float((base - tensor.float()).norm() / base.norm().clamp_min(1e-30)) > _SAME:
            raise InputError(
                f"{self._shown} holds another {name} than the model; give a GGUF made from this very model"
            )

    def _value(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def entries(self, changed: Mapping[str, int]) -> Iterator[tuple[str, bytes | int]]:
        """Metadata in the file's order, as they lie in it; those that are changed, or new, by their values."""
        left = dict(changed)
        for name, field in self.reader.fields.items():
            if name.startswith("GGUF."):
                continue  # the header, which the reader lists as metadata
            if name in left:
                yield name, left.pop(name)
            else:
                size = sum(int(part.nbytes) for part in field.parts)
                yield name, self.reader.data[field.offset : field.offset + size].tobytes()
        yield from left.items()
