"""The job file at a path or URI, read and checked."""

from collections.abc import Sequence

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
