"""URIs as text."""

import pytest

from distributed_adaround.errors import remember_secrets
from distributed_adaround.files import uris


def test_a_file_has_the_same_name_whatever_was_opened_before() -> None:
    uri = "https://parquet:secret@host/parquet/a.parquet?sig=a.parquet"
    assert uris.file_name(uri) == "a.parquet"
    remember_secrets(uri)
    assert uris.file_name(uri) == "a.parquet"


@pytest.mark.parametrize(
    ("uri", "local"),
    [("a.npy", True), ("/a", True), ("file:///a", True), ("s3://b/a", False), ("simplecache::a", False), ("", True)],
)
def test_is_local(uri: str, local: bool) -> None:
    assert uris.is_local(uri) is local
