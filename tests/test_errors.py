"""What a message may show of a URI that this process has opened."""

import pytest

from distributed_adaround import errors


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_secrets", set())


@pytest.mark.parametrize(
    ("uri", "text", "shown"),
    [
        (
            "s3://AKIA77:sec/ret@bucket/x",
            'Invalid bucket name "AKIA77:sec/ret@bucket"',
            'Invalid bucket name "***@bucket"',
        ),
        ("s3://AKIA77:secret@bucket/x", "user AKIA77 may not", "user *** may not"),
        ("sftp://me:pass%2Fword@host/x", "wrong password pass/word", "wrong password ***"),
        ("sftp://me:pass/word@host/x", "bad request /?p=pass%2Fword", "bad request /?p=***"),
        ("https://host/x?sig=abcdef&v=1", "GET /x?sig=abcdef&v=1 failed", "GET /x?*** failed"),
        ("https://host/x?sig=abcdef&v=1", "signature abcdef of v=1 is old", "signature *** of v=1 is old"),
        ("abfs://c/x?sig=abcdef", "signature abcdef is old", "signature *** is old"),
        ("zip://a.npy::s3://key77:secret@b/x.zip", "key77 has no access", "*** has no access"),
        ("https://token77@host/x", "token77", "***"),
        # Short parts are ordinary words.
        ("sftp://me:key@host/x", "me and my key, me:key", "me and my key, ***"),
        ("https://host/a.parquet?format=parquet", "parquet files need pyarrow", "parquet files need pyarrow"),
        ("https://host/x?X-Amz-Signature=0af1&v=1", "0af1 a0af1b", "0af1 a0af1b"),
        ("https://host/x?k=0123456789abcdef", "0123456789abcdef", "***"),
        ("s3://bucket/img-??.npy", "img-??.npy in bucket", "img-??.npy in bucket"),
        ("data/a.npy", "data/a.npy", "data/a.npy"),
    ],
)
def test_secrets_of_opened_errors_are_removed_from_any_text(uri: str, text: str, shown: str) -> None:
    errors.remember_secrets(uri)
    assert errors.redact(text) == shown
