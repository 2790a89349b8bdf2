"""Exporter `dequantized`: weights on the grid under the original names, for `load_state_dict(strict=True)`.

<output>/dequantized.safetensors
"""

from collections.abc import Sequence

from distributed_adaround.capture.open import PlannedUnit
from distributed_adaround.export.result import ExportResult, write_safetensors
from distributed_adaround.files import uris


class DequantizedExporter:
    """Every tensor under its own name, tied ones as copies."""

    files = ("dequantized.safetensors",)

    def check(self, planned: Sequence[PlannedUnit]) -> None:
        """Holds everything."""

    def write(self, result: ExportResult, uri: str) -> None:
        write_safetensors(uris.join(uri, "dequantized.safetensors"), result.weights, {"format": "pt"})
