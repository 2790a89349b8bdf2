"""Reading job files: three formats, overrides, YAML's traps, and errors that say where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed_adaround.errors import SpecError
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.spec.load import MAX_BYTES, parse_job

YAML = """
model: {factory: "my_models:resnet50", factory_args: {depth: 1_8, tag: no, day: 2024-01-01}}
data: {uri: "calib/*.npz", num_samples: 1024}
quantize:
  dtype: int3
  ignore: ["re:.*head"]
  overrides:
    - {match: Linear, dtype: int8}
rounding: {lr: 1e-3, reg_param: 2.5E-2, beta: [2e1, 2]}
output: {uri: out}
"""
TOML = """
[model]
factory = "my_models:resnet50"
factory_args = {depth = 18, tag = "no", day = "2024-01-01"}
[data]
uri = "calib/*.npz"
num_samples = 1024
[quantize]
dtype = "int3"
ignore = ["re:.*head"]
[[quantize.overrides]]
match = "Linear"
dtype = "int8"
[rounding]
lr = 1e-3
reg_param = 2.5E-2
beta = [2e1, 2]
[output]
uri = "out"
"""


def write(folder: Path, text: str | bytes, name: str = "job.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def value_of(text: str) -> Any:
    return parse_job("job.yaml", f"x: {text}".encode())["x"]


def test_the_three_formats_mean_the_same(tmp_path: Path) -> None:
    from_yaml = load_spec(write(tmp_path, YAML))
    assert from_yaml.rounding.lr == 0.001
    assert from_yaml.rounding.reg_param == 0.025
    assert from_yaml.rounding.beta == (20.0, 2.0)
    assert from_yaml.model.factory_args == {"depth": 18, "tag": "no", "day": "2024-01-01"}
    assert load_spec(write(tmp_path, TOML, "job.toml")) == from_yaml
    text = json.dumps(parse_job("job.yml", YAML.encode()))
    assert load_spec(write(tmp_path, "\ufeff" + text, "JOB.JSON")) == from_yaml
    assert load_spec((tmp_path / "job.yaml").as_uri()) == from_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-2.e+1", -20.0), (".5", 0.5), ("1.0e-3", 0.001), ("010", 10), ("1_000", 1000),
        ("+3", 3), ("~", None), ("", None), ("null", None), ("true", True), ("True", True), ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("'5'", "5"), ("1e-3x", "1e-3x"), ("e5", "e5"),
        ("0x10", 16), ("0o10", 8), ("{<<: {a: 1}}", {"<<": {"a": 1}}), ("'*x'", "*x"),
        (".", "."), ("s3://a/b", "s3://a/b"), ("[1, re:.*x]", [1, "re:.*x"]), ("=", "="),
    ],
)  # fmt: skip
def test_yaml_values(tmp_path: Path, text: str, expected: object) -> None:
    value = value_of(text)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("j.yaml", "a: 1\nb: [", ["YAML", "line 2"]),
        ("j.yaml", "a: 1\na: 2", ["YAML", "line 2, column 1", "'a' appears twice"]),
        ("j.yaml", "a: {b: 1, b: 2}", ["'b' appears twice"]),
        ("j.yaml", "a: &x [1]\nb: *x", ["line 2", "aliases (*name) are not accepted", "quote"]),
        ("j.yaml", "a: &x [*x]", ["aliases"]),
        ("j.yaml", "a: {b: hunter2, b: hunter3}", ["line 1, column 17", "'b' appears twice; correct"]),
        ("j.yaml", "null: 2", ["key null must be text"]),
        ("j.yaml", "1: 2", ["key 1 must be text"]),
        ("j.yaml", "[a]: 2", ["must be text"]),
        ("j.yaml", "a: !!python/object/apply:os.system [x]", ["line 1", "constructor"]),
        ("j.yaml", "a: !!timestamp 2024-01-01", ["constructor"]),
        ("j.yaml", "a: 1\n---\nb: 2", ["line 2", "another document"]),
        ("j.yaml", "a: \x07", ["YAML", "not allowed"]),
        ("j.yaml", "[" * 5000, ["nested too deeply"]),
        ("j.yaml", "a: " + "9" * 5000, ["YAML", "digits"]),
        ("j.yaml", "", ["mapping of sections, not null", "model:"]),
        ("j.yaml", "- a", ["mapping of sections, not ['a']"]),
        ("j.yaml", b"a: \xff", ["byte 3", "UTF-8"]),
        ("j.json", '{"a": 1, "a": 2}', ["JSON", "'a' appears twice"]),
        ("j.json", "{,}", ["JSON", "line 1 column 2"]),
        ("j.json", "[" * 100_000, ["nested too deeply"]),
        ("j.json", "3", ["mapping of sections, not 3"]),
        ("j.toml", "a = 1\na = 2\nb = 3", ["TOML", "line 2"]),
        ("j.toml", "a = \nb = 1", ["TOML", "line 1"]),
        ("j.txt", "a: 1", [".yaml, .yml, .json or .toml", "rename"]),
        ("j.yaml", "#" * (MAX_BYTES + 1), ["256 KiB"]),
    ],
)
def test_unreadable_files_say_where(tmp_path: Path, name: str, text: str | bytes, words: list[str]) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message
    assert caught.value.exit_code == 64


@pytest.mark.parametrize("text", ["%YAML 1.1\n---\nx: [no, 1e3, 010]", "x: [&a no, &a 1e3, 010]"])
def test_yaml_is_version_1_2_and_warns_of_nothing(text: str) -> None:
    assert parse_job("job.yaml", text.encode()) == {"x": ["no", 1000.0, 10]}


def test_missing_files_and_folders_are_spec_errors(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"job file cannot be read: .*none\.yaml.*no such file"):
        load_spec(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match="job file cannot be read"):
        load_spec(str(tmp_path / "folder.yaml"))
    with pytest.raises(SpecError, match="job file cannot be read") as caught:
        load_spec("nosuchscheme://user:hunter2@host/job.yaml")
    assert "hunter2" not in str(caught.value)


def test_a_file_with_the_largest_size_is_read(tmp_path: Path) -> None:
    text = YAML + "#" * (MAX_BYTES - len(YAML))
    assert load_spec(write(tmp_path, text)).quantize.dtype == "int3"


def test_set_is_applied_in_order_before_validation(tmp_path: Path) -> None:
    path = write(tmp_path, YAML)
    spec = load_spec(
        path,
        [
            "rounding.lr=1e-4",
            "rounding.max_iter=5",
            "rounding.max_iter=6",
            "rounding.beta=[8, 1.5e0]",
            "quantize.overrides.0.dtype=uint4",
            "quantize.overrides.1.match=re:.*head$",
            "quantize.overrides.1.observer=minmax",
            "quantize.ignore=[a, 're:b,c']",
            "data.uri=*.npz",
            "data.num_samples=",
            "output.uri=s3://b/c=d",
            "runtime.device=cpu",
            "data.fields={input_ids: x}",
            'runtime.spill_dir="5"',
            "preset=paper",
        ],
    )
    assert spec.rounding.lr == 1e-4
    assert spec.rounding.max_iter == 6
    assert spec.rounding.beta == (8.0, 1.5)
    assert spec.rounding.normalization == "sum"
    assert [override.match for override in spec.quantize.overrides] == ["Linear", "re:.*head$"]
    assert [override.dtype for override in spec.quantize.overrides] == ["uint4", None]
    assert spec.quantize.ignore == ["a", "re:b,c"]
    assert spec.data.uri == "*.npz"
    assert spec.data.num_samples is None
    assert spec.data.fields == {"input_ids": "x"}
    assert spec.output.uri == "s3://b/c=d"
    assert (spec.runtime.device, spec.runtime.spill_dir) == ("cpu", "5")


def test_set_makes_the_first_entry_of_a_missing_list(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {factory: 'a:b'}\ndata: {uri: x}\noutput: {uri: y}")
    spec = load_spec(path, ["quantize.overrides.0.match=Linear", "quantize.overrides.0.dtype=int8"])
    assert spec.quantize.overrides[0].dtype == "int8"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("rounding.max_iter", ["--set 'rounding.max_iter'", "section.field=value", "rounding.max_iter=2000"]),
        ("=5", ["section.field=value"]),
        ("rounding..lr=1", ["section.field=value"]),
        (".".join("a" * 5000) + "=1", ["section.field=value"]),
        ("rounding.lr=[1", ["--set rounding.lr", "'[1'", "not a YAML value", "quote"]),
        ("rounding.lr=" + "[" * 5000, ["--set rounding.lr", "nested too deeply"]),
        ("rounding.lr.x=1", ["--set rounding.lr.x", "inside 0.001"]),
        ("quantize.overrides.2.dtype=int8", ["2 is not a place in a list of 1", "0 to 1"]),
        ("quantize.overrides.-1.dtype=int8", ["-1 is not a place"]),
        ("quantize.overrides.first.dtype=int8", ["first is not a place"]),
        (f"quantize.overrides.{'9' * 5000}.dtype=int8", ["is not a place"]),
        ("rounding.lr=1e-3x", ["rounding.lr: '1e-3x' must be a number"]),
        ("rounding.max_iter=-5", ["rounding.max_iter: -5 must be greater than 0; use 2000, the default"]),
        ("rounding.max_itr=5", ["rounding.max_itr: there is no such field; did you mean max_iter?"]),
        ("output.uri=s3://k:hunter2@b/[", ["--set"]),
        ("data=s3://k:hunter2@b/x", ["data: 's3://b/x' must be a section"]),
    ],
)
def test_bad_set_is_one_line(tmp_path: Path, assignment: str, words: list[str]) -> None:
    path = write(tmp_path, YAML)
    if assignment.startswith("output.uri"):
        assignment = assignment.replace("s3://", "{s3://")
    with pytest.raises(SpecError) as caught:
        load_spec(path, [assignment])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert "hunter2" not in message
    for word in words:
        assert word in message
