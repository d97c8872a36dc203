"""The Ray Serve files are valid by Ray's own schema, and say what the application and this package understand."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
RAY = ROOT / "deploy" / "ray"
OWN_ARGUMENTS = {"config", "min_replicas", "max_replicas", "gpus"}


def rayservice() -> dict[str, Any]:
    return yaml.safe_load((RAY / "rayservice.yaml").read_text())


def configurations() -> list[dict[str, Any]]:
    """Of `serve run`, and of the RayService."""
    return [yaml.safe_load(text) for text in ((RAY / "serve.yaml").read_text(), rayservice()["spec"]["serveConfigV2"])]


def test_serve_configurations_are_valid_by_rays_schema() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed: pip install 'lightreasoner[ray]'")
    for configuration in configurations():
        schema.ServeDeploySchema(**configuration)


def test_they_name_the_application_and_arguments_that_it_knows() -> None:
    for configuration in configurations():
        (application,) = configuration["applications"]
        module, _, name = application["import_path"].partition(":")
        assert f"\ndef {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert application["args"].keys() <= OWN_ARGUMENTS | ServerSettings.model_fields.keys()


def test_its_secrets_are_those_that_the_readme_makes() -> None:
    used = set(re.findall(r"(?:secretName: |secretRef: \{name: )([\w-]+)", (RAY / "rayservice.yaml").read_text()))
    readme = (ROOT / "deploy" / "README.md").read_text()
    assert used == set(re.findall(r"kubectl create secret generic ([\w-]+)", readme))


def test_the_rayservice_runs_the_pinned_ray_and_has_a_gpu_for_each_replica() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    cluster = rayservice()["spec"]["rayClusterConfig"]
    assert f"ray[serve]>={cluster['rayVersion'].rpartition('.')[0]}," in extras["ray"][0]
    (workers,) = cluster["workerGroupSpecs"]
    args = configurations()[1]["applications"][0]["args"]
    assert workers["maxReplicas"] == args["max_replicas"] and workers["minReplicas"] == args["min_replicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(args["gpus"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(Path(args["api_key_file"]).parent) in mounts


def test_kuberay_finds_a_proxy_on_every_worker_and_wget_in_the_image() -> None:
    """With `wget` it asks each worker's proxy; without an answer the worker is never ready."""
    assert configurations()[1].get("proxy_location", "EveryNode") == "EveryNode"
    image = (ROOT / "deploy" / "docker" / "server.Dockerfile").read_text()
    assert re.search(r"apt-get install[^&]* wget ", image)


def test_the_image_is_built_with_the_extra() -> None:
    image = (ROOT / "deploy" / "docker" / "server.Dockerfile").read_text()
    (given,) = set(re.findall(r"--build-arg EXTRAS=([\w,]*\w)", image + (RAY / "rayservice.yaml").read_text()))
    assert "ray" in given.split(",") and 'pip install ".[$EXTRAS]"' in image
