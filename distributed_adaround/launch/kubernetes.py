"""Kubernetes manifests for a job, as one YAML file: the job file, and pods that run torchrun.sh on it.

    job       ConfigMap, headless Service, Indexed Job: any cluster, nothing to install
    jobset    ConfigMap, JobSet (jobset.x-k8s.io)
    trainjob  ConfigMap, TrainingRuntime, TrainJob (Kubeflow Trainer v2)

All three hold the same pod. Pod 0 holds the rendezvous. When a pod is lost, torchrun.sh in the others starts the job
again and waits for the new one. An exit code that no restart can mend fails the job at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from distributed_adaround.errors import InputError, OutputError, SpecError, redact
from distributed_adaround.launch.request import LaunchRequest, match
from distributed_adaround.spec.explain import shown

KINDS = ("job", "jobset", "trainjob")
PORT = 29400
JOB_FOLDER = "/etc/adaround"
DATA_FOLDER = "/data"
USER = 10001
# Restarts cannot mend these: bad job file, bad input, defect, output that cannot be written.
PERMANENT = [SpecError.exit_code, InputError.exit_code, 70, OutputError.exit_code]
_POD_RESTARTS = 6
# torchrun kills ranks after the grace period; Kubernetes must not be faster.
_MARGIN_SECONDS = 30
_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_NAME_RULE = "must be a Kubernetes name: a-z, 0-9, - and .; correct it"
_COMPONENT = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = (
    rf"(?:[a-zA-Z0-9.-]+(?::[0-9]{{1,5}})?/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)

_Map = dict[str, Any]


@dataclass(frozen=True)
class KubernetesOptions:
    """What only Kubernetes knows. claim: a PersistentVolumeClaim, at /data; secret: its keys become variables.

    job_text: the job file's content. job_suffix: .yaml, .json or .toml.
    """

    image: str
    job_text: str
    job_suffix: str
    kind: str = "job"
    claim: str | None = None
    secret: str | None = None
    service_account: str | None = None

    def __post_init__(self) -> None:
        match("image", self.image, _IMAGE, "is no image name; write for instance registry.example.com/adaround:0.1")
        for option in ("claim", "secret", "service_account"):
            value = getattr(self, option)
            if value is not None:
                match(option.replace("_", "-"), value, _NAME, _NAME_RULE)


def render(request: LaunchRequest, options: KubernetesOptions) -> str:
    """The manifests. The same request gives the same text.

    Raises:
        SpecError: the job names files that no pod could see, an output that would go with the pod, or passwords.
    """
    _check_places(request, options)
    job_file = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(request.name),
        "data": {f"job{options.job_suffix}": options.job_text},
    }
    objects = [job_file, *_KIND[options.kind](request, options)]
    header = (
        f"# Made by: {request.made_by}\n#\n# Start, watch, stop:\n#   kubectl apply -f FILE\n"
        f"#   kubectl logs -f -l app.kubernetes.io/instance={request.name} --prefix\n"
        "#   kubectl delete -f FILE   # saves and stops; apply the same file again, and it goes on\n"
    )
    return header + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120)


def _check_places(request: LaunchRequest, options: KubernetesOptions) -> None:
    spec = request.spec
    data = [spec.data.uri] if isinstance(spec.data.uri, str) else list(spec.data.uri)
    inputs = [("data.uri", uri) for uri in data]
    inputs += [(f"model.{name}", getattr(spec.model, name)) for name in ("weights", "program")]
    for field, uri in [*inputs, ("output.uri", spec.output.uri)]:
        if uri is None:
            continue
        if redact(uri) != uri:
            raise SpecError(f"{field}: holds a password or token, which a ConfigMap would show; give it by --secret")
        if "://" not in uri and not uri.startswith("/") and options.claim is None:
            raise SpecError(
                f"{field}: {shown(uri)} is a path in the pod, where it does not exist; give a URI, or the volume that "
                f"holds it as --claim"
            )
    output = spec.output.uri.removeprefix("file://")
    kept = options.claim is not None and output.startswith(f"{DATA_FOLDER}/")
    if output.startswith("/") and not kept:
        raise SpecError(
            f"output.uri: {shown(output)} would be lost with the pod; give a URI, or --claim and a path below "
            f"{DATA_FOLDER}"
        )


def _metadata(name: str) -> _Map:
    return {"name": name, "labels": _labels(name)}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "distributed-adaround", "app.kubernetes.io/instance": name}


def _indexed_job(request: LaunchRequest, options: KubernetesOptions) -> list[_Map]:
    name = request.name
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name),
        "spec": {
            "clusterIP": "None",
            # Pods look each other up before they are ready.
            "publishNotReadyAddresses": True,
            "selector": _labels(name),
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name),
        "spec": _job_spec(request, options, host=f"{name}-0.{name}", subdomain=name),
    }
    return [service, job]


def _job_set(request: LaunchRequest, options: KubernetesOptions) -> list[_Map]:
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": _metadata(request.name),
            "spec": _job_set_spec(request, options),
        }
    ]


def _train_job(request: LaunchRequest, options: KubernetesOptions) -> list[_Map]:
    name, api = request.name, "trainer.kubeflow.org/v1alpha1"
    template = _job_set_spec(request, options)
    # This label says which job of the set the trainer is.
    job = template["replicatedJobs"][0]["template"]
    job["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    runtime = {
        "apiVersion": api,
        "kind": "TrainingRuntime",
        "metadata": {"name": name, "labels": _labels(name) | {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": request.nodes, "torch": {}}, "template": {"spec": template}},
    }
    train_job = {
        "apiVersion": api,
        "kind": "TrainJob",
        "metadata": _metadata(name),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
            "trainer": {"numNodes": request.nodes, "numProcPerNode": request.ranks},
        },
    }
    return [runtime, train_job]


def _job_set_spec(request: LaunchRequest, options: KubernetesOptions) -> _Map:
    host = f"{request.name}-node-0-0.{request.name}"
    job = _job_spec(request, options, host=host, subdomain=None)
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": _POD_RESTARTS,
            "rules": [{"name": "permanent", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }


_KIND = {"job": _indexed_job, "jobset": _job_set, "trainjob": _train_job}


def _job_spec(request: LaunchRequest, options: KubernetesOptions, *, host: str, subdomain: str | None) -> _Map:
    pod = _pod(request, options, host)
    return {
        "completionMode": "Indexed",
        "completions": request.nodes,
        "parallelism": request.nodes,
        "backoffLimit": _POD_RESTARTS * request.nodes,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "node", "operator": "In", "values": PERMANENT},
                },
                # Drained, preempted, evicted: a new pod, which does not count.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {
            "metadata": {"labels": _labels(request.name)},
            "spec": ({"subdomain": subdomain} if subdomain else {}) | pod,
        },
    }


def _pod(request: LaunchRequest, options: KubernetesOptions, host: str) -> _Map:
    account = {"serviceAccountName": options.service_account} if options.service_account else {}
    claim = {"persistentVolumeClaim": {"claimName": options.claim}} if options.claim else {"emptyDir": {}}
    return {
        **account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": request.grace_seconds + _MARGIN_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(request, options, host)],
        "volumes": [
            {"name": "job", "configMap": {"name": request.name}},
            {"name": "data", **claim},
            {"name": "tmp", "emptyDir": {}},
            # The usual 64 MiB are too few for the collectives of several ranks.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        ],
    }


def _container(request: LaunchRequest, options: KubernetesOptions, host: str) -> _Map:
    secret = {"envFrom": [{"secretRef": {"name": options.secret}}]} if options.secret else {}
    environment = {
        "NNODES": str(request.nodes),
        "NPROC": str(request.ranks),
        "RDZV_ENDPOINT": f"{host}:{PORT}",
        "RDZV_ID": request.name,
        # Machines may have to be found, and images fetched.
        "JOIN_SECONDS": "600",
        "GRACE_SECONDS": str(request.grace_seconds),
        "OMP_NUM_THREADS": str(request.cpus),
    }
    return {
        "name": "node",
        "image": options.image,
        # The entrypoint of the image runs torchrun.sh on this.
        "args": [f"{JOB_FOLDER}/job{options.job_suffix}", *request.arguments[1:]],
        "workingDir": DATA_FOLDER,
        "env": [
            *({"name": name, "value": value} for name, value in environment.items()),
            {"name": "LOCAL_ADDR", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        **secret,
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": _resources(request),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
            {"name": "data", "mountPath": DATA_FOLDER},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _resources(request: LaunchRequest) -> _Map:
    limits: dict[str, str] = {}
    if request.memory is not None:
        limits["memory"] = f"{-(-request.memory // 2**20)}Mi"
    if request.gpus:
        limits["nvidia.com/gpu"] = str(request.gpus)
    return {"requests": {"cpu": str(request.ranks * request.cpus)} | limits} | ({"limits": limits} if limits else {})


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such, so that the job file stays readable; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Quoted where any reader might see something else than text, as in 1e3.
    style = "|" if "\n" in text else None if re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./:-]+", text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
