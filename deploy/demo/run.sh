#!/usr/bin/env bash
# Runs the main job, end to end, on the small pair beside this file: the three real processes and a bucket.
# Usage: deploy/demo/run.sh [FOLDER [PROBLEMS [OPTION …]]]   (make demo sets up what it needs; FOLDER must not exist)
# PROBLEMS: the number of problems to sample, and of others to test; default 1000. OPTION: further options of train.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT="${1:-demo-output}" PROBLEMS="${2:-1000}"
PORT="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$(printf '%q ' "$@")"; "$@"; }

[ $# -gt 0 ] || rm -rf "$OUT" # the default folder is the demo's own
mkdir "$OUT"
began=$SECONDS
trap '[ -z "${server:-}" ] || kill "$server" 2> /dev/null || true; wait' EXIT

say "python deploy/demo/word_problems.py sample $PROBLEMS > $OUT/sample.jsonl"
python deploy/demo/word_problems.py sample "$PROBLEMS" > "$OUT/sample.jsonl"
say "python deploy/demo/word_problems.py test $PROBLEMS > $OUT/test.jsonl"
python deploy/demo/word_problems.py test "$PROBLEMS" > "$OUT/test.jsonl"

say "lightreasoner-server --config deploy/demo/server.yaml --port $PORT > $OUT/server.log &"
lightreasoner-server --config deploy/demo/server.yaml --port "$PORT" > "$OUT/server.log" 2>&1 &
server=$!

# The client itself waits for both engines, but it does not notice a server that has died.
until grep -qs "ready: expert" "$OUT/server.log"; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$OUT/server.log" >&2; exit 1; }
    sleep 0.5
done
run lightreasoner-client sample "$OUT/sample.jsonl" "$OUT/run" --server "http://127.0.0.1:$PORT" \
    --max-tokens 64 --top-k 32
kill "$server" # its work is done; the server ends in its own time

run lightreasoner-trainer train "$OUT/run" --model deploy/demo/expert --output "$OUT/adapter" --epochs 6 "${@:3}"
run lightreasoner-trainer evaluate deploy/demo/expert --adapter "$OUT/adapter" --benchmark "unseen=$OUT/test.jsonl" \
    --system-prompt "Please reason step by step." --max-tokens 64 -o "$OUT/results.json" --run "$OUT/run"
run lightreasoner-client report "$OUT/run" -o "$OUT/report.html"

printf '\nThe whole job took %d s. What it left in %s/:\n' $((SECONDS - began)) "$OUT"
printf '  %-13s %s\n' \
    report.html "the RUN and its results as one page: open it in a browser" \
    results.md "problems that the adapter fixed and broke, with both answers" \
    adapter/ "the LoRA adapter, in PEFT's format" \
    run/ "the RUN: trajectories and contrast samples as Parquet"
python deploy/demo/outcome.py "$OUT"
