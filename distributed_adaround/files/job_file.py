"""Job files: read from a path or URI and checked, and written."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML

from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.files import storage
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.load import check_suffix, parse_job


def load_spec(path: str, overrides: Sequence[str] = ()) -> JobSpec:
    """overrides: "section.field=value" each, applied in order before anything is checked. Raises SpecError."""
    check_suffix(path)
    try:
        data = storage.read_bytes(path)
    except InputError as error:
        raise SpecError(f"the job file cannot be read: {error}") from error
    return JobSpec(**parse_job(path, data, overrides))


def yaml_text(job: Mapping[str, Any]) -> str:
    """The sections of a job as a job file."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style, writer.sort_base_mapping_type_on_output = False, False  # type: ignore[assignment]
    text = io.StringIO()
    writer.dump(dict(job), text)
    return text.getvalue()
