"""What cluster/ holds is what its readers take."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from moto.iam.access_control import IAMPolicy, PermissionResult
from moto.iam.policy_validation import IAMPolicyDocumentValidator
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from sdbatch.spec import load_spec
from tests.cluster.schemas import check_kuberay, check_kubernetes, clusters

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = ("raycluster", "rayjob", "raycronjob")
POLICY = (CLUSTER / "iam-policy.json").read_text(encoding="utf-8")


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The manifests of a file, by kind."""
    text = (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8")
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


@pytest.mark.parametrize("name", [*KUBERAY, "cronjob"])
def test_every_manifest_fits_its_schema(name: str) -> None:
    for manifest in documents(name).values():
        (check_kuberay if manifest["apiVersion"].startswith("ray.io") else check_kubernetes)(manifest)


@pytest.mark.parametrize("name", KUBERAY)
def test_rays_autoscaler_understands_the_cluster(name: str) -> None:
    manifest = list(documents(name).values())[-1]
    cluster = {"metadata": {"name": "sdbatch", "namespace": "default"}, "spec": clusters(manifest)}
    found = _derive_autoscaling_config_from_ray_cr(cluster)
    assert found["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    assert found["available_node_types"]["gpu"]["max_workers"] == 16
    assert found["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    assert cluster["spec"]["rayVersion"] == ray.__version__


@pytest.mark.parametrize("name", ["rayjob", "raycronjob", "cronjob"])
def test_the_job_within_a_manifest_is_a_good_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(documents(name)["ConfigMap"]["data"]["job.yaml"])
    spec = load_spec(tmp_path / "job.yaml")
    assert re.fullmatch(r"s3://example-bucket/pictures/weekly/\d{4}-\d\d-\d\d", spec.output.uri)


def test_the_aws_cluster_is_as_rays_launcher_wants_it() -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text(encoding="utf-8"))
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)  # with the launcher's defaults for AWS
    validate_config(prepared)
    head, workers = (prepared["available_node_types"][name] for name in ("head", "gpu_spot"))
    assert "InstanceMarketOptions" not in head["node_config"]  # on demand
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (workers["resources"]["GPU"], workers["min_workers"]) == (1, 0)
    with pytest.raises(jsonschema.ValidationError, match="gpus"):
        jsonschema.validate({**config, "gpus": 1}, schema)


def allowed(action: str, resource: str) -> bool:
    return IAMPolicy({"policy_document": POLICY}).is_action_permitted(action, resource) == PermissionResult.PERMITTED


def test_the_policy_allows_what_the_store_does_and_no_more() -> None:
    IAMPolicyDocumentValidator(POLICY).validate()
    bucket = "arn:aws:s3:::example-bucket"
    on_output = {"GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload"}
    for action in (*on_output, "ListBucket", "PutObjectAcl", "GetObjectVersion", "DeleteBucket"):
        assert allowed(f"s3:{action}", f"{bucket}/pictures/weekly/a.png") == (action in on_output), action
        assert allowed(f"s3:{action}", f"{bucket}/prompts/a.parquet") == (action == "GetObject"), action
        assert not allowed(f"s3:{action}", f"{bucket}/other/a.png")
    assert allowed("s3:ListBucket", bucket)
    assert not allowed("s3:ListBucket", f"{bucket}2")
    # An upload in parts is a PutObject, HEAD a GetObject: what the store calls is covered.
    called = set(re.findall(r"_client\.(\w+)\(", (ROOT / "sdbatch/storage/s3.py").read_text(encoding="utf-8")))
    assert called == {
        *("get_object", "put_object", "list_objects_v2", "delete_object", "head_object"),
        *("create_multipart_upload", "upload_part", "complete_multipart_upload", "abort_multipart_upload"),
    }


def test_hadolint_finds_no_fault_in_the_dockerfile() -> None:
    program = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    found = subprocess.run([program, str(CLUSTER / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_image_holds_all_that_the_package_is_built_from() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE)
    copied = {word.removeprefix("./") for line in lines for word in shlex.split(line)}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "sdbatch"}
    assert all((ROOT / name).exists() for name in copied)
