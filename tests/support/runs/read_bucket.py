"""Reads a finished RUN with pyarrow alone, using only what the README says about its files.

    python tests/support/runs/read_bucket.py RUN PROBLEMS.jsonl

Exits with an error unless every part can be read, readers see every problem once (the first part by name that holds a
key counts), each trajectories part has a samples part with the same keys, and the RUN is sealed.
"""

import json
import os
import sys
from pathlib import Path, PurePosixPath

import pyarrow.fs as fs
import pyarrow.parquet as pq


def opened(url):
    if url.startswith("s3://"):
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        scheme, _, address = endpoint.partition("://")
        store = fs.S3FileSystem(endpoint_override=address, scheme=scheme, region=os.environ["AWS_REGION"])
        return store, url.removeprefix("s3://")
    return fs.LocalFileSystem(), url


def parts(store, folder):
    found = store.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return sorted(info.path for info in found if PurePosixPath(info.path).name.startswith("part-"))


def keys(store, file):
    rows = pq.read_table(file, filesystem=store).to_pylist()
    assert rows, f"{file} is empty"
    assert all(len(row["token_ids"]) > 0 for row in rows), f"{file} has an empty trajectory"
    return [(row["problem_id"], row["sample_index"]) for row in rows]


def main(run, problems):
    store, root = opened(run)
    names, seen, rows = {}, {}, 0
    for kind in ("trajectories", "samples"):
        files = parts(store, f"{root}/{kind}")
        names[kind] = {PurePosixPath(file).stem: keys(store, file) for file in files}
    assert names["trajectories"] == names["samples"], "parts without their samples, or with others"
    for part, held in names["trajectories"].items():
        rows += len(held)
        for key in held:
            seen.setdefault(key, part)
    asked = {(json.loads(line)["id"], 0) for line in Path(problems).read_text().splitlines()}
    assert seen.keys() == asked, (
        f"{len(asked - seen.keys())} are missing, {len(seen.keys() - asked)} were not asked for"
    )
    with store.open_input_stream(f"{root}/complete.json") as file:
        sealed = json.loads(file.read())
    assert sealed["trajectories"] == len(asked), sealed
    print(f"{len(asked)} problems once, {len(names['samples'])} parts, {rows - len(asked)} rows written twice")


if __name__ == "__main__":
    main(*sys.argv[1:])
