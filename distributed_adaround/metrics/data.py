"""The data that models are judged on: fields, labels and arguments of each microbatch of a rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from distributed_adaround.data.deal import InputBinding
from distributed_adaround.data.encoder import LABELS
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import Manifest
from distributed_adaround.data.microbatches import ModelInputs


@dataclass(frozen=True)
class EvaluationData:
    """calibrated: some of the files are calibration data too."""

    manifest: Manifest
    loader: SampleLoader
    binding: InputBinding
    calibrated: bool

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor], ModelInputs]]:
        """This rank's microbatches in order: index, fields, and the model's arguments, which labels never are."""
        for index, batch in self.loader:
            fields = self.binding.transformed(_without_labels(batch))
            inputs = self.binding.bind(_without_labels(fields))
            labels = {LABELS: batch[LABELS]} if LABELS in batch else {}
            yield index, {**fields, **labels}, inputs

    def samples(self, index: int) -> int:
        """Of a microbatch."""
        return len(self.manifest.microbatches[index].samples)

    @property
    def rows(self) -> list[int]:
        """Places of this rank's samples among all."""
        size = len(self.manifest.microbatches[0].samples)
        return [index * size + row for index in self.loader.owned for row in range(self.samples(index))]


def _without_labels(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in fields.items() if name != LABELS}
