"""The code of export/README.md runs as it stands."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_base
import pytest
import torch
from export_tasks import finished

import distributed_adaround
from distributed_adaround.export.exporter import Exporter
from distributed_adaround.export.gguf_file import GgufExporter
from distributed_adaround.export.program import ProgramExporter
from distributed_adaround.export.torchao_file import TorchaoExporter

pytestmark = pytest.mark.filterwarnings("ignore")

GROUPS = {"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 32}
README = Path(distributed_adaround.__file__).parent / "export" / "README.md"


@pytest.mark.slow
def test_the_code_of_the_readme_loads_what_a_job_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_base.small_model("Llama")
    base = gguf_base.write_base(model, tmp_path / "base.gguf")
    ids = torch.randint(3, 96, (3, 6))
    output = {"formats": ["gguf"], "base_gguf": str(base)}
    task = finished(tmp_path, model, [{"input_ids": ids}], GgufExporter(), GROUPS, output)
    exporters: list[Exporter] = [GgufExporter(), TorchaoExporter(), ProgramExporter()]
    for exporter in exporters:
        exporter.write(task, task.output.uri)
    monkeypatch.setitem(sys.modules, "my_models", SimpleNamespace(build=lambda: gguf_base.small_model("Llama")))
    monkeypatch.chdir(tmp_path)
    sections = re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    expected = model(input_ids=ids, use_cache=False).logits
    for name in ("gguf", "torchao", "program"):
        (section,) = (text for text in sections if text.startswith(f"{name}\n"))
        (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        names: dict[str, Any] = {}
        exec(code, names)
        with torch.no_grad():
            found = (
                names["model"](input_ids=ids) if name == "program" else names["model"](input_ids=ids, use_cache=False)
            )
        assert torch.equal(found["logits"], expected), name
