"""Calibration data as the model takes it: the microbatches of one rank, from files or from a caller's list."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from distributed_adaround.data.encoder import ROW_MASK
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import owner, prove_coverage
from distributed_adaround.errors import InputError, first_line
from distributed_adaround.runtime.comm import Comm, agreed, phase

CallerBatch = Tensor | Sequence[Any] | Mapping[str, Any]

# Name, and shape or value, of everything in a microbatch: what a captured graph may depend on.
Kind = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class ModelInputs:
    """One microbatch as the model takes it. mask: `(N, T)`, nonzero where a token counts, or None."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    mask: Tensor | None = None

    @property
    def size(self) -> int:
        """Samples: the first dimension of the first tensor, 0 where there is none."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return next((leaf.shape[0] if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)), 0)

    @property
    def kind(self) -> Kind:
        leaves, _ = pytree.tree_flatten_with_path((self.args, dict(sorted(self.kwargs.items()))))
        shapes = ((path, tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)) for path, leaf in leaves)
        return tuple((pytree.keystr(path), shape) for path, shape in shapes)

    def narrowed(self, dtype: torch.dtype | None) -> "ModelInputs":
        """Tensors of float64, which numpy makes and few models take, in the dtype of the model; None: as they are."""
        if dtype is None:
            return self
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.dtype == torch.float64 else x, (self.args, self.kwargs)
        )
        return replace(self, args=args, kwargs=kwargs)

    @property
    def hint(self) -> str:
        """What to add to the error of a forward that failed: images are often given as they are in files."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        if not any(isinstance(leaf, Tensor) and leaf.dtype == torch.uint8 for leaf in leaves):
            return ""
        return "; the data are uint8: make of them what the model takes, in a job by data.transform"

    def to(self, device: torch.device) -> "ModelInputs":
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Microbatches:
    """The calibration data of one rank. Indices are global: the same on any number of ranks.

    total: of the whole job. owned: those of this rank, ascending; may be empty. load: any of the owned. read: all
    owned, in order. kinds: the kinds of the owned ones, each with the first of it.
    """

    total: int
    owned: Sequence[int]
    load: Callable[[int], ModelInputs]
    read: Callable[[], Iterator[tuple[int, ModelInputs]]]
    kinds: Callable[[], dict[Kind, int]]

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        return self.read()

    @classmethod
    def of_files(
        cls,
        loader: SampleLoader,
        convert: Callable[[Mapping[str, Tensor]], ModelInputs],
        transformed: bool = False,
    ) -> "Microbatches":
        """Those of a manifest. convert: from the fields of a microbatch to the model's arguments. transformed: it does
        more than to rename."""

        def load(index: int) -> ModelInputs:
            return convert(loader.load(index))

        def read() -> Iterator[tuple[int, ModelInputs]]:
            return ((index, convert(fields)) for index, fields in loader)

        def kinds() -> dict[Kind, int]:
            if loader.varying or transformed:
                return _first_of_kinds(read())
            # All samples are of one size, and only the last microbatch may have fewer of them.
            ends = dict.fromkeys((*loader.owned[:1], *loader.owned[-1:]))
            return _first_of_kinds((index, load(index)) for index in ends)

        return cls(loader.total, loader.owned, load, read, kinds)

    @classmethod
    def of_list(
        cls, batches: Iterable[CallerBatch], comm: Comm, sharded: bool, dtype: torch.dtype | None = None
    ) -> "Microbatches":
        """Those of a caller. A collective. sharded: every rank gives its own batches; else all give the same ones.
        dtype: of the model, for tensors of float64.

        Raises: InputError when a batch cannot be used, there is none, or ranks give different numbers of them.
        """
        with phase(comm, "read the batches"):
            given = [inputs.narrowed(dtype) for inputs in _read(batches)]
        counts = comm.all_gather_object(len(given))
        if not sharded and len(set(counts)) > 1:
            what = f"ranks pass {counts} batches; with sharded=False every rank passes the same ones"
            raise agreed(InputError(f"{what}, else set sharded=True"))
        first, total = (sum(counts[: comm.rank]), sum(counts)) if sharded else (0, len(given))
        if not total:
            raise agreed(InputError("batches is empty; give at least one calibration batch"))
        held = dict(enumerate(given, first))
        if not sharded:
            held = {index: inputs for index, inputs in held.items() if owner(index, comm.world_size) == comm.rank}
        prove_coverage(total, comm.all_gather_object(tuple(held)))
        return cls(
            total, tuple(held), held.__getitem__, lambda: iter(held.items()), lambda: _first_of_kinds(held.items())
        )

    def first(self) -> "Microbatches":
        """The first one alone, as if it were all."""
        inputs = self.load(0)
        return Microbatches(1, (0,), lambda _: inputs, lambda: iter([(0, inputs)]), lambda: {inputs.kind: 0})


def _read(batches: Iterable[CallerBatch]) -> list[ModelInputs]:
    if isinstance(batches, Tensor | Mapping | str):
        raise InputError("batches must be a list or another iterable of batches; wrap a single batch in a list")
    given = [_model_inputs(batch) for batch in batches]
    for index, inputs in enumerate(given):
        leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
        sizes = [leaf.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)]
        if not sizes or (0,) in sizes:
            what = "is empty" if sizes else "holds no tensor"
            raise InputError(f"batch {index} {what}; give tensors whose first dimension is the samples")
    return given


def _first_of_kinds(microbatches: Iterable[tuple[int, ModelInputs]]) -> dict[Kind, int]:
    first: dict[Kind, int] = {}
    for index, inputs in microbatches:
        first.setdefault(inputs.kind, index)
    return first


def _model_inputs(batch: CallerBatch) -> ModelInputs:
    if isinstance(batch, Tensor):
        return ModelInputs((batch,), {})
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        return ModelInputs((), dict(batch), mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return ModelInputs(tuple(batch), {})
    raise InputError(f"a batch is a {type(batch).__name__}; give a tensor, a tuple of arguments or a dict of keywords")


def call_transform(transform: Callable[..., Any], name: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`transform(batch)`, checked to be a mapping from field names to tensors. name: for messages."""
    try:
        result = transform(dict(batch))
    except Exception as error:
        raise InputError(f"data.transform {name!r} failed: {first_line(error)}") from error
    if not isinstance(result, Mapping) or not result:
        kind = type(result).__name__
        raise InputError(f"data.transform {name!r} returned a {kind}; it must return a dict of tensors")
    for field, value in result.items():
        if not isinstance(field, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InputError(f"data.transform {name!r} returned {field!r}: {kind}; fields must be tensors")
    return dict(result)


def bind_inputs(batch: Mapping[str, Tensor], parameters: Sequence[str] | None, mask_field: str) -> ModelInputs:
    """Fields of a batch become keywords of forward, or an only field its first argument where it has another name.

    parameters: names that forward takes as keywords, in order; None: any. The mask goes to the model when forward takes
    it, and is kept as `ModelInputs.mask` when it is `(N, T)`; ROW_MASK is kept in its place, and never goes to the
    model. Raises InputError when fields and parameters differ.
    """
    mask = batch.get(mask_field)
    mask_is_passed = mask is not None and (parameters is None or mask_field in parameters)
    names = [name for name in batch if name not in (mask_field, ROW_MASK)]
    unknown = [] if parameters is None else [name for name in names if name not in parameters]
    takes = "any keyword" if parameters is None else ", ".join(parameters) or "nothing by name"
    if not names or (unknown and len(names) > 1):
        what = f"data fields {', '.join(batch) or '(none)'} do not match the model's forward, which takes {takes}"
        raise InputError(f"{what}; rename or leave out fields with data.fields")
    two_axes = mask is not None and mask.ndim == 2
    if mask is not None and not two_axes and not mask_is_passed:
        what = f"has shape {tuple(mask.shape)} and the model's forward, which takes {takes}, does not use it"
        raise InputError(f"data field {mask_field!r} {what}; a mask of rows must be (samples, tokens)")
    kwargs: dict[str, object] = {name: batch[name] for name in names if name not in unknown}
    if mask_is_passed:
        kwargs[mask_field] = mask
    return ModelInputs(tuple(batch[name] for name in unknown), kwargs, batch.get(ROW_MASK, mask if two_axes else None))
