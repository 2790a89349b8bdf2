"""The manifest of a job's data: which files there are, what they hold, and how their samples are cut."""

import logging
from collections.abc import Mapping, Sequence

from distributed_adaround.data.checksums import Checksums
from distributed_adaround.data.manifest import DataFile, Manifest, cut, take
from distributed_adaround.data.readers import SUFFIXES, has_reader, scan
from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import storage

logger = logging.getLogger(__name__)


def build_manifest(
    uri: str | Sequence[str],
    *,
    num_samples: int | None,
    microbatch_size: int,
    virtual_shards: int,
    fields: Mapping[str, str] | None,
    one_sample_per_file: bool,
    checksums: str | None = None,
) -> Manifest:
    """List, read and hash the files, and cut their samples into microbatches.

    Args:
        uri: one or several files, folders or globs.
        num_samples: how many to take; None: all.
        microbatch_size: samples of a microbatch.
        virtual_shards: parts that are dealt to the ranks.
        fields: model input name -> field in the file; None: all numeric fields under their own names.
        one_sample_per_file: the arrays have no sample axis.
        checksums: URI of a list of the SHA-256 that the files must have.

    Raises: InputError when nothing matches, or a file is empty, damaged, of an unknown type, unlike the others, or not
    as the list says.
    """
    usable, skipped = _list_data((uri,) if isinstance(uri, str) else uri)
    expected = None if checksums is None else Checksums.read(checksums)
    files = tuple(_data_file(found, fields, one_sample_per_file, expected) for found in usable)
    unused = [] if expected is None else expected.unused(usable)
    if unused:
        message = "data.checksums lists %d files that data.uri does not name, the first is %s"
        logger.warning(message, len(unused), unused[0])
    num_available = sum(file.num_samples for file in files)
    manifest = Manifest(
        files=files,
        num_available=num_available,
        microbatches=cut(take(num_available, num_samples), microbatch_size, virtual_shards),
        num_shards=virtual_shards,
        one_sample_per_file=one_sample_per_file,
        skipped=tuple(other for other in skipped if other != checksums),
    )
    assert manifest.fields  # merging them proves that the files agree
    return manifest


def _list_data(uris: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Files that have a reader, and those that have none. A file named by the user must have one."""
    found: set[str] = set()
    for uri in uris:
        matches = storage.list_files(uri)
        if not matches:
            raise InputError(f"{redact(uri)}: no file matches; check the path, the wildcards and the mounts")
        if matches == [uri] and not has_reader(uri):
            raise InputError(f"{redact(uri)}: unknown file type; supported are {', '.join(SUFFIXES)}")
        found.update(matches)
    usable = sorted(uri for uri in found if has_reader(uri))
    skipped = tuple(sorted(found.difference(usable)))
    if not usable:
        shown = ", ".join(map(redact, uris))
        example = f", for example {redact(skipped[0])}" if skipped else ""
        raise InputError(f"{shown}: {len(skipped)} files of unknown type{example}; supported are {', '.join(SUFFIXES)}")
    return usable, skipped


def _data_file(
    uri: str, fields: Mapping[str, str] | None, one_sample_per_file: bool, expected: Checksums | None
) -> DataFile:
    with storage.local_file(uri) as path:
        shown, sha256 = redact(uri), storage.sha256_file(path)
        if expected is not None:
            expected.check(uri, sha256)
        num_samples, infos = scan(path, shown=shown, fields=fields, one_sample_per_file=one_sample_per_file)
        return DataFile(uri, path.stat().st_size, sha256, num_samples, infos)
