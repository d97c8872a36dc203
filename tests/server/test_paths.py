"""Where a request may point: inside the bucket, and never out of it by any spelling or link."""

import pytest

from server.jobs.paths import BucketPaths

OUTSIDE = [
    "/etc/passwd", "/", "//", "..", "../x", "runs/../../x", "runs/..", "./x", ".", "x/./y", "x//y", "/tmp", "x/.hidden",
    "file:///etc/passwd", "file://host/x", "file:/etc/passwd", "file:x", "FILE:///etc/passwd", "file:///", "file://",
    "http://169.254.169.254/latest", "https://example.org/x", "ftp://x/y", "gs://bucket/x", "az://c/x", "memory:///x",
    "s3://", "s3://other/x", "s3://samples-other/team/x", "s3://samples", "s3://samples/", "s3://samples/team",
    "s3://samples/team/", "s3://samples/teams/x", "s3://samples/team/../x", "s3://samples/team/%2e%2e/x",
    "s3://samples//team/x", "s3://samples/team//x", "s3://user@samples/team/x", "s3://samples:80/team/x",
    "s3://samples/team/x?versionId=1", "s3://samples/team/x#y", "S3://samples/team/x", "s3a://samples/team/x",
    "%2e%2e/x", "x/%2e%2e/y", "..%2fx", "x\\..\\y", "..\\x", "\\\\host\\x", "C:\\x", "C:/x", "~/x", "~root/x",
    "$HOME/x",
    "x/\x00y", "x\ny", "x\n", "x\r", "\tx", " x", "x ", "x y", "-x", "x/-rf", "*", "x/*", "x?", "x;y", "x|y", "`x`",
    "\u2025/x", "\uff0e\uff0e/x", "x\u2044y", "é", "jobs", "jobs/x", "JOBS/x", "jobs/", "jobs/idempotency/x",
    "x" * 201, "/".join(["x" * 100] * 8),
]  # fmt: skip


@pytest.mark.parametrize("given", OUTSIDE)
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_what_is_not_plainly_inside_is_refused(kind, given, tmp_path):
    (tmp_path / "bucket").mkdir()
    paths = BucketPaths(str(tmp_path / "bucket") if kind == "folder" else "s3://samples/team")
    with pytest.raises(ValueError):
        paths.name(given)


@pytest.mark.parametrize("given", ["/tmp/elsewhere", "/", "file:///tmp/elsewhere", "s3://other/x"])
def test_a_place_outside_a_bucket_on_s3_is_told_so(given):
    with pytest.raises(ValueError, match=r"^points outside the server's bucket; name a place inside it, or one relat"):
        BucketPaths("s3://samples/team").name(given)


def test_the_neighbours_of_a_local_bucket_are_outside(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    paths = BucketPaths(str(bucket))
    for given in (bucket, f"{bucket}/", f"{bucket}-other/x", f"{bucket}/../x", f"{bucket}//x", f"{bucket}/./x",
                  f"{bucket}/jobs/x", f"{bucket}/jobs", f"file://{bucket}/%2e%2e/x", f"file://{bucket}/%6a%6f%62%73/x",
                  f"file://{bucket}-other/x", f"/{bucket}/x", tmp_path):  # fmt: skip
        with pytest.raises(ValueError):
            paths.name(str(given))


@pytest.mark.parametrize("name", ["runs/first", "a", "2026-11-22/run_1+b@c,d=e.f", "x" * 200, "jobs2/x", "x/jobs"])
def test_inside_it_is_named_absolute_or_relative(tmp_path, name):
    bucket = tmp_path / "my bucket"
    for paths, root in (
        (BucketPaths(str(bucket)), str(bucket)),
        (BucketPaths(bucket.as_uri()), str(bucket)),
        (BucketPaths("s3://samples/team/"), "s3://samples/team"),
    ):
        given = {name, f"{name}/", f"{root}/{name}"}
        if root.startswith("/"):
            given |= {f"file://{root}/{name}", f"{bucket.as_uri()}/{name}"}
        assert {paths.name(text) for text in given} == {name}
        assert paths.url(name) == f"{root}/{name}"


def test_no_link_leads_out(tmp_path):
    bucket, outside = tmp_path / "bucket", tmp_path / "outside"
    (bucket / "run").mkdir(parents=True)
    (bucket / "jobs").mkdir()
    outside.mkdir()
    (outside / "p.jsonl").write_text("{}")
    paths = BucketPaths(str(bucket))
    (bucket / "inside").symlink_to(bucket / "run")
    assert paths.name("inside") == "inside"
    for link, target in (
        ("link", outside), ("file.jsonl", outside / "p.jsonl"), ("up", bucket / ".."), ("self", bucket), ("root", "/"),
        ("own", bucket / "jobs"), ("loop", bucket / "loop"), ("dangling", outside / "nothing"),
        ("run/trajectories", outside),
    ):  # fmt: skip
        (bucket / link).symlink_to(target)
    for given in ("link", "link/x", "file.jsonl", "up", "up/x", "self", "root/etc", "own/x", "loop/x", "dangling",
                  "run", f"{bucket}/link/x"):  # fmt: skip
        with pytest.raises(ValueError):
            paths.name(given)
    assert paths.name("clean") == "clean"
    (bucket / "clean").symlink_to(outside)  # after the job was taken, before it runs
    with pytest.raises(ValueError):
        paths.url("clean")


def test_a_bucket_that_is_itself_behind_a_link_is_found_by_both_names(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    paths = BucketPaths(str(tmp_path / "link"))
    assert paths.name(f"{tmp_path}/link/x") == paths.name(f"{tmp_path}/real/x") == "x"


@pytest.mark.parametrize("kind", ["folder", "s3"])
@pytest.mark.parametrize(
    "name",
    ["a/trajectories/b", "a/samples", "failures", "training/x", "a/Evaluation/x", "a/run.json", "complete.json/x",
     "a/tokenizer.json"],
)  # fmt: skip
def test_no_run_lies_within_what_another_run_holds(kind, name, tmp_path):
    (tmp_path / "bucket").mkdir()
    paths = BucketPaths(str(tmp_path / "bucket") if kind == "folder" else "s3://samples/team")
    assert paths.name(name) == name  # a problem set may lie there
    with pytest.raises(ValueError, match="every RUN uses inside"):
        paths.run(name)
    assert paths.run("failures-2026/sampled") == "failures-2026/sampled"
