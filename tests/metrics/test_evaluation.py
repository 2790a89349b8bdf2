"""The section evaluate in whole jobs, on one rank and two, against what their files say."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_models
from rank_pool import RankPool
from sample_jobs import images, job, texts, vectors, write_job
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_adaround.errors import InputError, PeerError, SpecError
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job
from distributed_adaround.report.table import LayerTable
from distributed_adaround.spec.evaluate import METRICS
from distributed_adaround.spec.job import JobSpec, json_schema

JUDGES = '''
import torch

calls = []


def spread(model, batches):
    """Largest less smallest output of each sample; and its first input, drawn to a random number."""
    found, noise = [], []
    for batch in batches:
        output = model(batch["x"])
        found += (output.amax(dim=1) - output.amin(dim=1)).tolist()
        noise += torch.rand(len(output)).tolist()
    return {"spread": found, "noise": torch.tensor(noise)}


def hits(model, batches):
    parts = [model(batch["x"]).argmax(dim=1) == batch["labels"] for batch in batches]
    return {"hits": torch.cat(parts)}


def with_more(batch):
    rows = torch.ones(len(batch["x"]), 36, dtype=torch.int64)
    return dict(batch, labels=rows[:, 0], row_mask=rows)


def names(model, batches):
    found = []
    for batch in batches:
        assert batch.keys() == {"x", "labels"}, batch.keys()
        found += [float(len(batch))] * len(batch["x"])
    return {"names": found}


def raising(model, batches):
    raise KeyError("no such thing\\nand more")


def a_list(model, batches):
    return [1.0 for batch in batches]


def nothing(model, batches):
    return {}


def too_few(model, batches):
    return {"wer": [1.0 for batch in batches]}


def words(model, batches):
    return {"wer": ["a" for batch in batches for row in batch["x"]]}


def not_finite(model, batches):
    return {"wer": [float("nan") for batch in batches for row in batch["x"]]}


def odd_name(model, batches):
    return {1: [0.0 for batch in batches for row in batch["x"]]}


def fails_later(model, batches):
    calls.append(1)
    if len(calls) > 1:
        raise ValueError("only once")
    return {"wer": [0.0 for batch in batches for row in batch["x"]]}
'''


def labelled(path: Path, num_samples: int = 9, classes: int = 5) -> Path:
    """What the toy CNN takes, float32 `(num_samples, 2, 6, 6)` as x, and int64 labels."""
    draw = np.random.default_rng(7)
    x = draw.normal(size=(num_samples, 2, 6, 6)).astype(np.float32)
    np.savez(path, x=x, labels=draw.integers(0, classes, num_samples))
    return path


def write(folder: Path, network: str, evaluate: Mapping[str, Any], **changes: Mapping[str, Any]) -> Path:
    """A job of a toy network at 3 bits with nearest rounding, with data to be judged on in other.npz."""
    path = write_job(folder, network)
    {"cnn": labelled, "attention": lambda to: texts(to, 9, seed=5), "mlp": lambda to: vectors(to, 9, seed=5)}[network](
        folder / "other.npz"
    )
    (folder / "judges.py").write_text(JUDGES, encoding="utf-8")
    content = job(folder, network, **{"rounding": {"solver": "nearest"}, **changes})
    data = {"uri": str(folder / "other.npz"), "microbatch_size": 2} | dict(evaluate.get("data", {}))
    content["evaluate"] = {**evaluate, "data": data}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run(path: Path, *overrides: str) -> LayerTable:
    return run_job(load_spec(str(path), overrides), path.parent)


def run_on_rank(path: str) -> tuple[str, str]:
    try:
        run(Path(path))
    except (InputError, PeerError) as error:
        return type(error).__name__, str(error)
    return "", ""


def metrics(folder: Path) -> list[dict[str, Any]]:
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = report["metrics"]
    return found


def outputs(folder: Path, model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs to be judged on, and outputs before and after, by the job's files alone."""
    data = {name: torch.from_numpy(values) for name, values in np.load(folder / "other.npz").items()}
    inputs = {name: values for name, values in data.items() if name != "labels"}
    with torch.no_grad():
        before = model.eval()(**inputs)
        model.load_state_dict(safetensors.torch.load_file(folder / "out" / "dequantized.safetensors"))
        after = model(**inputs)
    assert not torch.equal(before, after)
    return data, before, after


def test_perplexity_has_the_same_bytes_on_two_ranks_and_is_that_of_the_files(pool: RankPool, tmp_path: Path) -> None:
    reports = []
    for ranks in (1, 2):
        path = write(tmp_path / str(ranks), "attention", {"metric": "perplexity"})
        assert pool.run(run_on_rank, ranks, str(path)) == [("", "")] * ranks
        reports.append(json.dumps(metrics(path.parent)))
    assert reports[0] == reports[1]
    (found,) = json.loads(reports[0])
    data, *both = outputs(tmp_path / "1", toy_models.attention())
    counts = (data["attention_mask"][:, 1:] != 0).double()
    values = []
    for logits in both:
        chosen = F.log_softmax(logits.double(), dim=-1)[:, :-1].gather(2, data["input_ids"][:, 1:, None])[..., 0]
        values.append(math.exp(-float((chosen * counts).sum() / counts.sum())))
    assert [found["float_value"], found["quantized_value"]] == pytest.approx(values, rel=1e-5)
    assert found["difference"] == pytest.approx(values[1] - values[0], rel=1e-3)
    assert (found["name"], found["samples"], found["calibrated"]) == ("perplexity", 9, False)
    assert found["float_error"] > 0
    assert found["difference_error"] > 0


def test_accuracy_of_labels_that_no_model_gets(tmp_path: Path) -> None:
    table = run(write(tmp_path, "cnn", {"metric": "accuracy"}))
    (found,) = metrics(tmp_path)
    data, *both = outputs(tmp_path, toy_models.cnn())
    hits = [(logits.argmax(dim=1) == data["labels"]).double() for logits in both]
    assert [found["float_value"], found["quantized_value"]] == pytest.approx([100 * float(hit.mean()) for hit in hits])
    assert found["float_error"] == pytest.approx(100 * float(hits[0].std()) / 3)
    assert found["difference_error"] == pytest.approx(100 * float((hits[1] - hits[0]).std()) / 3)
    assert (found["unit"], found["samples"]) == ("%", 9)
    line = f"{table.metrics[0]}."
    assert line.startswith("accuracy in % on 9 other samples: ")
    assert line in str(table).splitlines()
    assert f"<p>{line}</p>" in table._repr_html_()
    events = (tmp_path / "out" / "events" / "rank-0.jsonl").read_text(encoding="utf-8").splitlines()
    (event,) = (line for line in map(json.loads, events) if line["event"] == "metric")
    assert event["float_value"] == found["float_value"]


def test_similarity_by_hooks_where_a_model_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no graph")

    monkeypatch.setattr("distributed_adaround.capture.walkers.export_model", refuse)
    monkeypatch.setattr("distributed_adaround.capture.walkers.export_as_it_is", refuse)
    run(write(tmp_path, "mlp", {"metric": "similarity"}))
    (found,) = metrics(tmp_path)
    _, before, after = outputs(tmp_path, toy_models.mlp())
    expected = F.cosine_similarity(before.double(), after.double(), dim=1)
    assert (found["float_value"], found["float_error"]) == (1.0, 0.0)
    assert found["quantized_value"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found["quantized_error"] == pytest.approx(float(expected.std()) / 3, rel=1e-3)
    assert found["difference_error"] == found["quantized_error"]


def test_a_program_is_judged_with_its_rounded_weights(tmp_path: Path) -> None:
    path = write(tmp_path, "cnn", {"metric": "accuracy"})
    program = torch.export.export(
        toy_models.cnn(), (torch.zeros(3, 2, 6, 6),), dynamic_shapes={"x": {0: torch.export.Dim("n", min=1, max=64)}}
    )
    torch.export.save(program, tmp_path / "net.pt2")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"] = {"program": str(tmp_path / "net.pt2")}
    path.write_text(json.dumps(content), encoding="utf-8")
    run(path)
    (found,) = metrics(tmp_path)
    data, *both = outputs(tmp_path, toy_models.cnn())
    expected = [100 * float((logits.argmax(dim=1) == data["labels"]).double().mean()) for logits in both]
    assert [found["float_value"], found["quantized_value"]] == pytest.approx(expected)


def test_a_function_gives_numbers_of_its_own(pool: RankPool, tmp_path: Path) -> None:
    """Of two ranks, the second has no data."""
    reports = []
    for ranks in (1, 2):
        evaluate = {"function": "judges:spread", "data": {"virtual_shards": 1}}
        path = write(tmp_path / str(ranks), "mlp", evaluate)
        assert pool.run(run_on_rank, ranks, str(path)) == [("", "")] * ranks
        reports.append(json.dumps(metrics(path.parent)))
    assert reports[0] == reports[1]
    spread, noise = json.loads(reports[0])
    _, *both = outputs(tmp_path / "1", toy_models.mlp())
    values = [float((output.amax(dim=1) - output.amin(dim=1)).double().mean()) for output in both]
    assert [spread["float_value"], spread["quantized_value"]] == pytest.approx(values, rel=1e-6)
    assert (noise["name"], noise["difference"], noise["within_noise"]) == ("noise", 0.0, False)


def test_random_numbers_of_a_function_do_not_depend_on_the_ranks(pool: RankPool, tmp_path: Path) -> None:
    reports = []
    for ranks in (1, 2):
        path = write(tmp_path / str(ranks), "mlp", {"function": "judges:spread"})
        assert pool.run(run_on_rank, ranks, str(path)) == [("", "")] * ranks
        reports.append(json.dumps(metrics(path.parent)))
    assert reports[0] == reports[1]


def test_a_function_gets_the_labels(tmp_path: Path) -> None:
    run(write(tmp_path, "cnn", {"function": "judges:hits"}))
    (found,) = metrics(tmp_path)
    data, before, _ = outputs(tmp_path, toy_models.cnn())
    assert found["float_value"] == pytest.approx(float((before.argmax(dim=1) == data["labels"]).double().mean()))


def test_the_result_is_that_of_the_job_without_it(tmp_path: Path) -> None:
    path = write(tmp_path / "with", "mlp", {"function": "judges:spread"})
    run(path)
    other = write_job(tmp_path / "without", "mlp", rounding={"solver": "nearest"})
    run(other)
    found = [
        hashlib.sha256((folder.parent / "out" / "quantized.safetensors").read_bytes()).hexdigest()
        for folder in (path, other)
    ]
    assert found[0] == found[1]
    specs = [load_spec(str(each), ()) for each in (path, other)]
    assert specs[0].result_digest() == specs[1].result_digest()
    assert specs[0].job_digest() != specs[0].model_copy(update={"evaluate": None}).job_digest()


def test_data_that_calibration_used_too_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "cnn", {"metric": "similarity"})
    images(tmp_path / "other.npz")  # what write_job has made for calibration
    table = run(path)
    assert metrics(tmp_path)[0]["calibrated"] is True
    assert "similarity on 11 samples of files that calibration used too: " in str(table)
    assert "calibration uses 1 of the files of evaluate.data too: " in caplog.text


BAD = [
    ("cnn", {"metric": "accuracy", "data": {"fields": {"x": "x"}}}, "needs the field 'labels', the data have x; name"),
    ("cnn", {"metric": "perplexity"}, "perplexity needs the field input_ids, .* there are x, labels; name it"),
    ("attention", {"metric": "accuracy"}, "accuracy needs the field 'labels', the data have .*attention_mask"),
    ("mlp", {"metric": "similarity", "data": {"uri": "nowhere.npz"}}, "nowhere.npz: no file matches"),
    ("mlp", {"metric": "similarity", "data": {"num_samples": 99}}, "num_samples is 99, but the files hold 9"),
    ("mlp", {"metric": "similarity", "data": {"fields": {"y": "x", "z": "x"}}}, "data fields y, z do not match"),
    ("mlp", {"function": "judges:missing"}, "'judges:missing': 'judges' has no attribute 'missing'"),
    ("mlp", {"function": "judges:raising"}, "function 'judges:raising' failed: KeyError: "),
    ("mlp", {"function": "judges:a_list"}, "function 'judges:a_list' returned a list; it must return {name: one"),
    ("mlp", {"function": "judges:nothing"}, "returned an empty dict; it must return"),
    ("mlp", {"function": "judges:too_few"}, r"'wer' has shape \(5,\), but there are 9 samples on this rank; return"),
    ("mlp", {"function": "judges:words"}, "'wer' is a list that is not of numbers: "),
    ("mlp", {"function": "judges:odd_name"}, "returned the name 1; names must be plain text"),
    (
        "mlp",
        {"function": "judges:not_finite"},
        "wer of the float model is not finite on 9 samples, the first of them 0",
    ),
]


@pytest.mark.parametrize(("network", "evaluate", "message"), BAD)
def test_what_is_wrong_is_told_before_anything_is_written(
    network: str, evaluate: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, network, evaluate)
    with pytest.raises(InputError, match=f"^evaluate: .*{message}") as raised:
        run(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_ranks_agree_on_a_function_that_fails_on_one_of_them(pool: RankPool, tmp_path: Path) -> None:
    """9 samples in microbatches of 2: rank 0 has 5 of them, and 5 samples on rank 1 are too many."""
    path = write(tmp_path, "mlp", {"function": "judges:too_few"})
    found = pool.run(run_on_rank, 2, str(path))
    assert {kind for kind, _ in found} == {"InputError"}
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_there_when_a_function_fails_on_the_quantized_model(tmp_path: Path) -> None:
    path = write(tmp_path, "mlp", {"function": "judges:fails_later"})
    with pytest.raises(InputError, match="evaluate: function 'judges:fails_later' failed: ValueError: only once"):
        run(path)
    assert (tmp_path / "out" / "dequantized.safetensors").exists()
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "evaluate.metric: is missing, and function too; give metric"),
        ({"metric": "accuracy", "function": "a:b"}, "evaluate.function: .*'?a:b'? and metric exclude each other"),
        ({"metric": "bleu"}, "evaluate.metric: 'bleu' must be one of 'perplexity', 'accuracy' or 'similarity'"),
    ],
)
def test_one_metric_or_one_function(section: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {"model": {"factory": "a:b"}, "data": {"uri": "x"}, "output": {"uri": "y"}}
    with pytest.raises(SpecError, match=message):
        JobSpec(**content, evaluate={**section, "data": {"uri": "z"}})
    with pytest.raises(SpecError, match=r"evaluate\.data: is missing"):
        JobSpec(**content, evaluate={"metric": "accuracy"})


def test_its_data_are_inputs_of_the_job_as_the_others() -> None:
    """Whose places and credentials are checked before a job is sent somewhere."""
    evaluate = {"metric": "accuracy", "data": {"uri": ["c", "d"], "processor": "p"}}
    data = {"uri": "b", "checksums": "sums"}
    spec = JobSpec(model={"hf": "m"}, data=data, output={"uri": "y"}, evaluate=evaluate)
    assert spec.inputs() == [
        ("data.uri", "b"),
        ("data.checksums", "sums"),
        ("evaluate.data.uri", "c"),
        ("evaluate.data.uri", "d"),
        ("evaluate.data.processor", "p"),
        ("model.hf", "m"),
    ]


def test_one_more_metric_is_a_class_and_a_line_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from distributed_adaround.metrics.metric import Metric
import torch

class Energy(Metric):
    unit = "J"

    def sums(self, seen):
        energy = seen.first_output.double().square().sum(dim=1)
        return torch.stack([energy, torch.full_like(energy, 2)], dim=1)
"""
    (tmp_path / "one_more_metric.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METRICS, "energy", "one_more_metric:Energy")
    assert '"energy"' in json.dumps(json_schema())
    table = run(write(tmp_path / "job", "mlp", {"metric": "energy"}))
    _, before, _ = outputs(tmp_path / "job", toy_models.mlp())
    assert table.metrics[0].float_value == pytest.approx(float(before.double().square().sum()) / 18)
    assert "energy in J on 9 other samples: " in str(table)


def test_no_model_gets_labels_and_no_function_a_mask_of_rows(tmp_path: Path) -> None:
    """Also where the transform makes them."""
    path = write(tmp_path, "cnn", {"function": "judges:names", "data": {"transform": "judges:with_more"}})
    run(path)
    (found,) = metrics(tmp_path)
    assert found["float_value"] == 2.0
