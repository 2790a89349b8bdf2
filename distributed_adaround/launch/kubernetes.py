"""Kubernetes manifests for a job, as one YAML file: the job file, and pods that run torchrun.sh on it.

    job       ConfigMap, headless Service, Indexed Job: any cluster, nothing to install
    jobset    ConfigMap, JobSet (jobset.x-k8s.io)
    trainjob  ConfigMap, TrainingRuntime, TrainJob (Kubeflow Trainer v2)

All three hold the same pod. Pod 0 holds the rendezvous. When a pod is lost, torchrun.sh in the others starts the job
again and waits for the new one. An exit code that no restart can mend fails the job at once.

The texts are in manifests/. All values are filled in as quoted JSON, so that none is taken for a number or for more.
"""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Literal

from distributed_adaround.errors import SpecError, redact
from distributed_adaround.launch.request import LaunchRequest, form
from distributed_adaround.spec.explain import shown

DATA_FOLDER = "/data"
_RESTARTS = 6
# torchrun kills ranks after the grace period; Kubernetes must not be faster.
_MARGIN_SECONDS = 30
_NAME = form(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "must be a Kubernetes name: a-z, 0-9, - and .; correct it")
_COMPONENT = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = form(
    rf"(?:[a-zA-Z0-9.-]+(?::[0-9]{{1,5}})?/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    "is no image name; write for instance registry.example.com/adaround:0.1",
)


class KubernetesRequest(LaunchRequest):
    """With what only Kubernetes knows. claim: a PersistentVolumeClaim, at /data; secret: its keys become variables."""

    image: Annotated[str, _IMAGE]
    kind: Literal["job", "jobset", "trainjob"] = "job"
    claim: Annotated[str, _NAME] | None = None
    secret: Annotated[str, _NAME] | None = None
    service_account: Annotated[str, _NAME] | None = None


def render(request: KubernetesRequest, job_text: str, suffix: str) -> str:
    """The manifests. The same request gives the same text. job_text: content of the job file; suffix: of its name.

    Raises SpecError when the job names files that no pod could see, an output that would go with the pod, or passwords.
    """
    _check_places(request)
    arguments = _quoted([f"/etc/adaround/job{suffix}", *request.arguments[1:]])
    values = _values(request) | {"arguments": arguments, "job_file": f"job{suffix}: {_text(job_text)}"}
    return _filled(request.kind, values) + "\n"


def _values(request: KubernetesRequest) -> dict[str, str]:
    """For the blanks of the templates. A line whose only blank is empty is left out."""
    name, ranks, in_set = request.name, request.num_ranks, request.kind != "job"
    host = f"{name}-node-0-0" if in_set else f"{name}-0"
    limits = {} if request.memory_mib is None else {"memory": f"{request.memory_mib}Mi"}
    limits |= {"nvidia.com/gpu": str(request.gpus)} if request.gpus else {}
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    claim = {"persistentVolumeClaim": {"claimName": request.claim}} if request.claim else {"emptyDir": {}}
    return {
        "made_by": request.made_by,
        "instance": name,
        "name": _quoted(name),
        "nodes": str(request.nodes),
        "ranks": str(ranks),
        "restarts_of_set": str(_RESTARTS),
        "restarts": str(_RESTARTS * request.nodes),
        "step": f"metadata: {_quoted(step)}" if request.kind == "trainjob" else "",
        "subdomain": "" if in_set else f"subdomain: {_quoted(name)}",
        "account": f"serviceAccountName: {_quoted(request.service_account)}" if request.service_account else "",
        "end_seconds": str(request.grace + _MARGIN_SECONDS),
        "image": _quoted(request.image),
        "endpoint": _quoted(f"{host}.{name}:29400"),
        "grace": str(request.grace),
        "threads": str(request.cpus),
        "secret": f"envFrom: {_quoted([{'secretRef': {'name': request.secret}}])}" if request.secret else "",
        "requests": _quoted({"cpu": str(ranks * request.cpus)} | limits),
        "limits": _quoted(limits),
        "data": _quoted({"name": "data"} | claim),
    }


def _filled(name: str, values: Mapping[str, str]) -> str:
    """A template with its blanks filled in: by the value of that name, else by the template of that name. A blank with
    a line of its own indents all lines that it stands for, and an empty one takes its line away."""

    def fill(blank: re.Match[str]) -> str:
        margin, of_line, inside = blank.groups()
        key = inside or of_line
        value = values[key] if key in values else _filled(key, values)
        if inside or not value:
            return value
        return "".join(f"{margin}{line}\n" if line else "\n" for line in value.split("\n"))

    text = files(__package__).joinpath("manifests", f"{name}.yaml").read_text(encoding="utf-8")
    return re.sub(r"^( *)\$(\w+)\n|\$(\w+)", fill, text, flags=re.M).removesuffix("\n")


def _text(text: str) -> str:
    """The text as a block, so that it can be read; as a quoted text where it holds what a block cannot."""
    if not all(line.isprintable() for line in text.replace("\t", " ").split("\n")):
        return _quoted(text)
    lines = text.removesuffix("\n").split("\n")
    return "\n".join(["|2+" if text.endswith("\n") else "|2-", *(f"  {line}" if line else "" for line in lines)])


def _quoted(value: object) -> str:
    """JSON, which is YAML too: no reader takes a text for anything else. Odd characters are written as YAML does."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def _check_places(request: KubernetesRequest) -> None:
    spec, claim = request.spec, request.claim
    for field, uri in (*spec.inputs(), ("output.uri", spec.output.uri)):
        if redact(uri) != uri:
            raise SpecError(f"{field}: holds a password or token, which a ConfigMap would show; give it by --secret")
        if "://" not in uri and not uri.startswith("/") and claim is None:
            rule = "is a path in the pod, where it does not exist; give a URI, or the volume that holds it as --claim"
            raise SpecError(f"{field}: {shown(uri)} {rule}")
    output = spec.output.uri.removeprefix("file://")
    if output.startswith("/") and (claim is None or not output.startswith(f"{DATA_FOLDER}/")):
        rule = f"would be lost with the pod; give a URI, or --claim and a path below {DATA_FOLDER}"
        raise SpecError(f"output.uri: {shown(output)} {rule}")
