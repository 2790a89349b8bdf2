import json
import math
import pickle
from dataclasses import replace

import pytest

from distributed_adaround.capture.sites import FloatParameter
from distributed_adaround.errors import InputError, shorten
from distributed_adaround.metrics.figures import MetricFigures
from distributed_adaround.report.table import LayerTable
from distributed_adaround.solve.record import LayerFigures

FIRST = LayerFigures(
    name="conv1",
    kind="Conv2d",
    shape=(16, 3, 3, 3),
    format="int4 per_channel_symmetric",
    solver="minibatch",
    nearest_error=4e-2,
    soft_error=1e-2,
    hard_error=2e-2,
    flipped=0.25,
    unsettled=0.5,
    kept_nearest=False,
    seconds=12.25,
)
SECOND = replace(FIRST, name="fc", kind="Linear", shape=(10, 16), hard_error=1e-3, flipped=0.0, seconds=1.0)


def test_sqnr_is_the_hard_error_in_decibels() -> None:
    assert replace(FIRST, hard_error=1e-3).sqnr_db == pytest.approx(30.0)
    assert replace(FIRST, hard_error=2.0).sqnr_db == pytest.approx(-3.0103, abs=1e-4)
    assert replace(FIRST, hard_error=0.0).sqnr_db == math.inf
    assert math.isnan(replace(FIRST, hard_error=math.nan).sqnr_db)


def test_a_row_survives_json() -> None:
    row = replace(SECOND, resumed=True, note="runs 3 times in one forward", hard_error=0.0)
    assert LayerFigures.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))) == row
    unknown = LayerFigures.from_dict(replace(row, soft_error=math.nan).to_dict())
    assert math.isnan(unknown.soft_error)
    assert replace(unknown, soft_error=row.soft_error) == row
    assert row.to_dict()["sqnr_db"] is None
    assert FIRST.to_dict()["sqnr_db"] == FIRST.sqnr_db


def test_a_row_with_missing_or_unknown_fields_is_refused() -> None:
    values = FIRST.to_dict()
    del values["flipped"]
    with pytest.raises(InputError, match=r"conv1 .*flipped, host"):
        LayerFigures.from_dict(values | {"host": "a"})


def test_totals() -> None:
    perfect = replace(SECOND, name="zero", shape=(40,), hard_error=0.0, soft_error=math.nan, kept_nearest=True)
    totals = LayerTable([FIRST, SECOND, perfect]).totals
    assert (totals.num_layers, totals.num_weights, totals.num_kept_nearest, totals.num_resumed) == (3, 632, 1, 0)
    assert totals.hard_error == pytest.approx((2e-2 + 1e-3) / 3)
    assert totals.soft_error == pytest.approx(1e-2)
    assert totals.sqnr_db == pytest.approx((FIRST.sqnr_db + 30) / 2)
    assert totals.flipped == pytest.approx(0.25 * 432 / 632)
    assert totals.unsettled == pytest.approx(0.5)
    assert totals.seconds == pytest.approx(14.25)
    assert math.isnan(LayerTable().totals.hard_error)
    assert LayerTable().totals.to_dict()["hard_error"] is None


def test_a_table_is_a_sequence() -> None:
    rows = [FIRST, SECOND]
    table = LayerTable(iter(rows))
    assert (len(table), list(table), table[-1], table[:1]) == (2, rows, SECOND, LayerTable([FIRST]))
    assert table != LayerTable([SECOND, FIRST])
    assert table.to_dicts() == [FIRST.to_dict(), SECOND.to_dict()]


def test_text() -> None:
    rows = [
        FIRST,
        replace(SECOND, note="runs 3 times in one forward"),
        replace(SECOND, name="last", format="int8 per_tensor_affine", solver="nearest", soft_error=math.nan),
        replace(SECOND, name="kept", kept_nearest=True, resumed=True, hard_error=0.0),
        replace(FIRST, name="again", resumed=True),
    ]
    coverage, *lines = str(LayerTable(rows)).splitlines()
    assert coverage == "100.0 % of 1,344 parameters are quantized, in 5 layers"
    assert lines[0] == "int4 per_channel_symmetric, solver minibatch"
    header = lines[1].split()
    assert header[:6] == ["layer", "kind", "shape", "nearest", "soft", "hard"]
    body = {line.split()[0]: line.split() for line in lines[3:8]}
    first = "conv1 Conv2d 16x3x3x3 4.00e-02 1.00e-02 2.00e-02 17.0 25.0% 50.0% 12.2"
    assert body["conv1"] == first.split()
    assert body["fc"][-1] == "1"
    assert body["last"][4] == "-"
    assert body["last"][-1] == "2"
    assert body["kept"][6] == "inf"
    assert body["kept"][-1] == "3,4"
    assert body["again"][-1] == "4"
    assert lines[9].split()[:3] == ["5", "layers", "1,344"]
    assert lines[10:14] == [
        "1: runs 3 times in one forward",
        "2: int8 per_tensor_affine, solver nearest",
        "3: learning did not beat nearest rounding, which was kept",
        "4: resumed from a commit",
    ]


def test_columns_are_aligned() -> None:
    _, *lines = str(LayerTable([FIRST, replace(SECOND, seconds=1234.5), replace(FIRST, name="x" * 20)])).splitlines()
    for name in ("nearest", "hard", "seconds"):
        end = lines[1].index(name) + len(name)
        column = [line[:end].split()[-1] for line in lines[3:6]]
        assert [line[end - 1] for line in lines[3:6]] == [cell[-1] for cell in column]
        assert all(line[end : end + 1] in ("", " ") for line in lines[3:6])
    start = lines[1].index("kind")
    assert [line[start:].split()[0] for line in lines[3:6]] == ["Conv2d", "Linear", "Conv2d"]


def test_long_names_and_notes_fit_120_columns() -> None:
    long = replace(
        FIRST,
        name="model.encoder.layers.11.attention.self_attention.query_key_value_projection.linear",
        kind="ConvTranspose3d",
        shape=(4096, 11008, 3, 3, 3),
        seconds=123456.7,
        note="words " * 60,
    )
    text = str(LayerTable([long, replace(long, name="model.short", note=""), SECOND]))
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "mode...inear" in text
    assert "model.short" in text


def test_metrics_stand_below_the_table() -> None:
    figures = MetricFigures("wer", "", 1000, True, 0.1, 0.001, 0.2, 0.002, 0.1, 0.0012)
    table = LayerTable([FIRST], metrics=[figures])
    expected = "0.1000 +- 0.0010 float, 0.2000 +- 0.0020 quantized, difference 0.1000 +- 0.0012."
    assert f"wer on 1000 samples of files that calibration used too: {expected}" in " ".join(str(table).split())
    assert max(map(len, str(table).splitlines())) <= 120
    assert f"<p>{figures}.</p>" in table._repr_html_()
    assert pickle.loads(pickle.dumps(table)).metrics == (figures,)
    assert LayerTable([FIRST]).metrics == ()


def test_what_was_measured_on_other_data_and_warnings_are_shown() -> None:
    rows = [replace(FIRST, held_out_error=0.03), replace(SECOND, warning="8 rows for 16 inputs")]
    table = LayerTable(rows, output_error=0.5, held_out_output_error=0.75)
    text = str(table)
    _, _, header, _, first, second, *_ = text.splitlines()
    assert header.split()[5:7] == ["hard", "held-out"]
    assert first.split()[5:7] == ["2.00e-02", "3.00e-02"]
    assert second.split()[6] == "-"
    assert "1: warning: 8 rows for 16 inputs" in text
    network = "Error of the network's outputs: 5.00e-01 on the calibration data, 7.50e-01 on other data."
    assert network in text
    assert table.totals.held_out_error == 0.03
    page = table._repr_html_()
    assert "<th>held-out</th>" in page
    assert "7.50e-01" in page
    assert "held-out" not in str(LayerTable([FIRST])).splitlines()[2]


def test_little_coverage_is_warned_of_with_the_largest_parameters_first() -> None:
    left = [FloatParameter("bias", (16,), "is a bias"), FloatParameter("head.weight", (100, 100), "ignored")]
    table = LayerTable([FIRST], left)
    assert table.float_parameters == tuple(left)
    first, second, *_ = str(table).splitlines()
    assert first == "4.1 % of 10,448 parameters are quantized, in 1 layers"
    assert second.startswith("Warning: less than 80 % of the parameters are quantized; in float stay head.weight (10,0")
    assert "Warning" not in str(LayerTable([FIRST], left[:1]))
    assert pickle.loads(pickle.dumps(table)).coverage == table.coverage


def test_an_empty_table_prints() -> None:
    assert "no layers" in str(LayerTable())


def test_html_escapes_what_comes_from_the_model() -> None:
    page = LayerTable([replace(FIRST, name="<script>x", note="<b>")])._repr_html_()
    assert "&lt;script&gt;x" in page
    assert "&lt;b&gt;" in page
    assert "<script>" not in page
    assert "<b>" not in page
    assert page.count("<tr>") == 3


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [("abcdef", 6, "abcdef"), ("abcdefghij", 9, "abc...hij"), ("abcdefghijk", 10, "abc...hijk")],
)
def test_names_are_cut_in_the_middle(name: str, width: int, expected: str) -> None:
    assert shorten(name, width) == expected
