"""Microbatches in memory, for walks without files."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from distributed_adaround.data.microbatches import ModelInputs


class Batches:
    """Microbatches of one tensor each; owns all of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.total = len(tensors)
        self.owned: Sequence[int] = range(self.total)

    def load(self, index: int) -> ModelInputs:
        return ModelInputs((self._tensors[index],), {})

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        return ((index, self.load(index)) for index in self.owned)
