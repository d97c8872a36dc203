"""Kinds that other projects define: RayService, TrainJob and ScaledObject have every field that is used, of its type.

Their definitions are in no package, or in one that is not worth installing. So their fields stand here, with where they
were read. What Kubernetes itself owns inside of them is valid by its own schema.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
jsonschema = pytest.importorskip("jsonschema")  # which that needs

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = "1.37"
TEXT, NUMBER, TRUTH, OWNED = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def some(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def fields(required: str = "", /, **known: dict[str, Any]) -> dict[str, Any]:
    """An object that has no other fields than these."""
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


def resource(group: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    said = {"apiVersion": {"const": group}, "kind": {"const": kind}, "metadata": OWNED | {"required": ["name"]}}
    return fields("apiVersion kind metadata spec", **said, spec=spec)


# KubeRay 1.5: ray-operator/apis/ray/v1/raycluster_types.go and rayservice_types.go
GROUP = {"rayStartParams": TEXTS, "template": OWNED, "resources": TEXTS, "labels": TEXTS}
HEAD = fields("template", **GROUP, enableIngress=TRUTH, headService=OWNED, serviceType=TEXT)
WORKERS = fields(
    "groupName minReplicas maxReplicas template", **GROUP, groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER,
    maxReplicas=NUMBER, numOfHosts=NUMBER, idleTimeoutSeconds=NUMBER, suspend=TRUTH,
    scaleStrategy=fields(workersToDelete=some(TEXT)),
)  # fmt: skip
AUTOSCALER = fields(
    resources=OWNED, image=TEXT, imagePullPolicy=TEXT, securityContext=OWNED, idleTimeoutSeconds=NUMBER, version=TEXT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, env=some(OWNED), envFrom=some(OWNED),
    volumeMounts=some(OWNED),
)  # fmt: skip
RAY_CLUSTER = fields(
    "headGroupSpec", headGroupSpec=HEAD, workerGroupSpecs=some(WORKERS), rayVersion=TEXT, suspend=TRUTH,
    enableInTreeAutoscaling=TRUTH, autoscalerOptions=AUTOSCALER, headServiceAnnotations=TEXTS, managedBy=TEXT,
    gcsFaultToleranceOptions=OWNED, upgradeStrategy=OWNED, authOptions=OWNED,
)  # fmt: skip
RAY_SERVICE = fields(
    "rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER, serveService=OWNED, upgradeStrategy=OWNED,
    rayClusterDeletionDelaySeconds=NUMBER, excludeHeadPodFromServeSvc=TRUTH, managedBy=TEXT, suspend=TRUTH,
)  # fmt: skip

# kubeflow-trainer-api 2.3.0: models/trainer_v1alpha1_*.py
CONTAINER_PATCH = fields("name", name=TEXT, env=some(OWNED), volumeMounts=some(OWNED), securityContext=OWNED)
POD_PATCH = fields(
    containers=some(CONTAINER_PATCH), initContainers=some(CONTAINER_PATCH), volumes=some(OWNED), nodeSelector=TEXTS,
    tolerations=some(OWNED), affinity=OWNED, imagePullSecrets=some(OWNED), schedulingGates=some(OWNED),
    securityContext=OWNED, serviceAccountName=TEXT, terminationGracePeriodSeconds=NUMBER,
)  # fmt: skip
JOB_PATCH = fields(metadata=OWNED, spec=fields(template=fields(metadata=OWNED, spec=POD_PATCH)))
JOB_SET_PATCH = fields(metadata=OWNED, spec=fields(replicatedJobs=some(fields("name", name=TEXT, template=JOB_PATCH))))
TRAIN_JOB = fields(
    "runtimeRef", runtimeRef=fields("name", name=TEXT, apiGroup=TEXT, kind=TEXT), initializer=OWNED, suspend=TRUTH,
    managedBy=TEXT, activeDeadlineSeconds=NUMBER,
    trainer=fields(
        image=TEXT, numNodes=NUMBER, numProcPerNode=NUMBER, command=some(TEXT), args=some(TEXT), env=some(OWNED),
        resourcesPerNode=OWNED,
    ),
    runtimePatches=some(
        fields("manager", manager=TEXT, time=TEXT, trainingRuntimeSpec=fields(template=JOB_SET_PATCH))
    ),
)  # fmt: skip

# KEDA 2.16: the models of cloudcoil-models-keda 2.16.1.0
SCALED_OBJECT = fields(
    "scaleTargetRef triggers",
    scaleTargetRef=fields("name", name=TEXT, apiVersion=TEXT, kind=TEXT, envSourceContainerName=TEXT),
    minReplicaCount=NUMBER, maxReplicaCount=NUMBER, idleReplicaCount=NUMBER, pollingInterval=NUMBER,
    cooldownPeriod=NUMBER, initialCooldownPeriod=NUMBER,
    fallback=fields("failureThreshold replicas", failureThreshold=NUMBER, replicas=NUMBER),
    advanced=fields(
        restoreToOriginalReplicaCount=TRUTH, scalingModifiers=OWNED,
        horizontalPodAutoscalerConfig=fields(name=TEXT, behavior=OWNED),
    ),
    triggers=some(
        fields(
            "type metadata", type=TEXT, metadata=TEXTS, name=TEXT, metricType=TEXT, useCachedMetrics=TRUTH,
            authenticationRef=OWNED,
        )
    ),
)  # fmt: skip
FILES = {
    "ray/rayservice.yaml": resource("ray.io/v1", "RayService", RAY_SERVICE),
    "kubernetes/train/trainjob.yaml": resource("trainer.kubeflow.org/v1alpha1", "TrainJob", TRAIN_JOB),
    "kubernetes/service-keda/scaledobject.yaml": resource("keda.sh/v1alpha1", "ScaledObject", SCALED_OBJECT),
}


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / file).read_text())


@pytest.mark.parametrize("file", FILES)
def test_the_kind_has_every_field(file: str) -> None:
    jsonschema.validate(read(file), FILES[file])


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("ray/rayservice.yaml", lambda it: workers(it).update(minReplica=1)),
        ("ray/rayservice.yaml", lambda it: workers(it).update(replicas="1")),
        ("ray/rayservice.yaml", lambda it: workers(it)["rayStartParams"].update({"num-cpus": 4})),
        ("kubernetes/train/trainjob.yaml", lambda it: it["spec"]["trainer"].update(nodes=2)),
        ("kubernetes/service-keda/scaledobject.yaml", lambda it: it["spec"]["triggers"][0]["metadata"].update(x=256)),
    ],
)
def test_a_wrong_field_or_type_is_seen(file: str, change: Change) -> None:
    document = copy.deepcopy(read(file))
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, FILES[file])


def workers(rayservice: dict[str, Any]) -> dict[str, Any]:
    return rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


def test_what_kubernetes_owns_in_them_is_valid_by_its_schema() -> None:
    for document in owned_by_kubernetes():
        kubernetes_validate.validate({"metadata": {"name": "it"}, **document}, KUBERNETES, strict=True)


def owned_by_kubernetes() -> Iterator[dict[str, Any]]:
    cluster = read("ray/rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "Pod", **group["template"]}
    job = read("kubernetes/train/trainjob.yaml")["spec"]
    (patched,) = job["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod, trainer = patched["template"]["spec"]["template"]["spec"], job["trainer"]
    (container,) = pod["containers"]
    mine = {name: trainer[name] for name in ("image", "command", "args", "env")}
    container = container | mine | {"resources": trainer["resourcesPerNode"]}
    yield {"apiVersion": "v1", "kind": "Pod", "spec": pod | {"containers": [container]}}
    scaled = read("kubernetes/service-keda/scaledobject.yaml")["spec"]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": scaled["scaleTargetRef"]["name"]}
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    spec = {"scaleTargetRef": target, "maxReplicas": scaled["maxReplicaCount"], "behavior": behavior}
    yield {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "spec": spec}
