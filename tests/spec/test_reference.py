"""The table of fields beside the spec is the one that the program prints."""

from pathlib import Path

from distributed_adaround.spec import reference

README = Path(reference.__file__).with_name("README.md")


def test_the_table_of_fields_is_up_to_date() -> None:
    """To renew it: python -m distributed_adaround schema --markdown"""
    assert README.read_text(encoding="utf-8").endswith(f"\n\n{reference.markdown()}")
