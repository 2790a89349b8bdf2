"""Manifests against the schemas of Kubernetes 1.30 to 1.37 of JobSet and of Kubeflow Trainer, from packages."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel

FOLDER = Path(__file__).parents[2] / "launch" / "kubernetes"
FILES = ["digits-job.yaml", "digits-jobset.yaml", "digits-trainjob.yaml"]
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
# Names of classes of kubeflow_trainer_api.models.
KINDS = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def unknown_fields(given: Any, model: object, path: str = "") -> list[str]:
    """Fields that a generated model has read without knowing them: its own classes pass over them."""
    if isinstance(model, BaseModel) and isinstance(given, dict):
        known = {field.alias or name: name for name, field in type(model).model_fields.items()}
        found = [f"{path}.{name}" for name in given if name not in known]
        for name in set(given) & set(known):
            found += unknown_fields(given[name], getattr(model, known[name]), f"{path}.{name}")
        return found
    if isinstance(given, list) and isinstance(model, list):
        pairs = enumerate(zip(given, model, strict=True))
        return [field for i, (one, of_model) in pairs for field in unknown_fields(one, of_model, f"{path}[{i}]")]
    return []


def check_custom(document: dict[str, Any]) -> None:
    from kubeflow_trainer_api import models  # takes seconds, which only this process need spend

    model = getattr(models, KINDS[document["kind"]]).from_dict(copy.deepcopy(document))
    unknown = unknown_fields(document, model)
    assert unknown == []


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The Jobs inside a JobSet or a runtime, as Jobs of their own."""
    spec = document.get("spec", {})
    spec = spec["template"]["spec"] if document["kind"] == "TrainingRuntime" else spec
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job["template"]["spec"]}
        for job in spec.get("replicatedJobs", [])
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    checked = 0
    for document in documents(name):
        for plain in pods(document) if document["kind"] in KINDS else [document]:
            kubernetes_validate.validate(plain, version, strict=True)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", FILES[1:])
def test_jobset_and_trainer_know_every_field(name: str) -> None:
    custom = [document for document in documents(name) if document["kind"] in KINDS]
    assert custom
    for document in custom:
        check_custom(document)


def _misspelt_in_pod(document: dict[str, Any]) -> None:
    document["spec"]["template"]["spec"]["restartPolcy"] = "Never"


def _text_for_number(document: dict[str, Any]) -> None:
    document["spec"]["completions"] = "2"


@pytest.mark.parametrize("spoil", [_misspelt_in_pod, _text_for_number])
def test_the_check_of_kubernetes_finds_faults(spoil: Callable[[dict[str, Any]], None]) -> None:
    job = documents("digits-job.yaml")[-1]
    spoil(job)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", FILES[1:])
def test_the_check_of_jobset_and_trainer_finds_faults(name: str) -> None:
    for document in documents(name):
        if document["kind"] in KINDS:
            document["spec"]["sped"] = 1
            with pytest.raises(AssertionError, match="sped"):
                check_custom(document)


@pytest.mark.parametrize("name", FILES)
def test_pods_have_no_rights(name: str) -> None:
    """What the strictest of Kubernetes' pod security standards asks for, and no token."""
    jobs = [
        job for document in documents(name) for job in ([document] if document["kind"] == "Job" else pods(document))
    ]
    assert len(jobs) == 1
    pod = jobs[0]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    grace = next(int(entry["value"]) for entry in container["env"] if entry["name"] == "GRACE_SECONDS")
    assert pod["terminationGracePeriodSeconds"] > grace
    assert all("hostPath" not in volume for volume in pod["volumes"])
