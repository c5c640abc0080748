"""Manifests held against the schemas that their readers publish."""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.34"


def check_kubernetes(manifest: dict[str, Any]) -> None:
    """Raise for a field that Kubernetes does not know, or a wrong value."""
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def check_kuberay(manifest: dict[str, Any]) -> None:
    """Raise for a manifest of KubeRay's that it would not take.

    The definitions of its kinds come in no package. What they say of pods is Kubernetes' own; the rest, few fields,
    is written down here as its API has them.
    """
    jsonschema.validate(manifest, _MANIFEST[manifest["kind"]])
    for group in _groups(manifest):
        pod = group["template"]
        check_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod})


def clusters(manifest: dict[str, Any]) -> dict[str, Any]:
    """The cluster that a manifest describes."""
    spec: dict[str, Any] = manifest["spec"]
    spec = spec.get("jobTemplate", spec)
    return dict(spec.get("rayClusterSpec", spec))


def _groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = clusters(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _object(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


_TEXT, _YES, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
_TEXTS, _POD = {"type": "object", "additionalProperties": _TEXT}, {"type": "object", "required": ["spec"]}
_CLUSTER = _object(
    ["headGroupSpec"],
    rayVersion=_TEXT,
    enableInTreeAutoscaling=_YES,
    autoscalerOptions=_object(
        [],
        idleTimeoutSeconds=_NUMBER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    headGroupSpec=_object(["template"], serviceType=_TEXT, rayStartParams=_TEXTS, template=_POD),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName=_TEXT,
            replicas=_NUMBER,
            minReplicas=_NUMBER,
            maxReplicas=_NUMBER,
            rayStartParams=_TEXTS,
            template=_POD,
        ),
    },
)
_JOB = _object(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=_TEXT,
    shutdownAfterJobFinishes=_YES,
    ttlSecondsAfterFinished=_NUMBER,
    backoffLimit=_NUMBER,
    runtimeEnvYAML=_TEXT,
    rayClusterSpec=_CLUSTER,
)
_MANIFEST = {
    kind: _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={"type": "object", "required": ["name"]},
        spec=spec,
    )
    for kind, spec in {
        "RayCluster": _CLUSTER,
        "RayJob": _JOB,
        "RayCronJob": _object(["schedule", "jobTemplate"], schedule=_TEXT, jobTemplate=_JOB),
    }.items()
}
