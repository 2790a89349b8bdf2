"""What the README says is what the program does."""

from pathlib import Path

from distributed_adaround import errors
from distributed_adaround.spec_reference import markdown

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_fields_is_up_to_date() -> None:
    """To refresh it: python -m distributed_adaround schema --markdown."""
    begin = "<!-- begin: python -m distributed_adaround schema --markdown -->\n"
    block = README.partition(begin)[2].partition("<!-- end -->")[0]
    assert block == markdown()


def test_every_exit_code_is_explained() -> None:
    classes = [errors.AdaRoundError, errors.SpecError, errors.InputError, errors.OutputError, errors.PeerError]
    for code in {cls.exit_code for cls in classes}:
        assert f"\n| {code} | " in README
