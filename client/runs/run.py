"""A RUN in a bucket: what it holds, under which names, and how it is read and written.

    RUN/run.json                      what made it (`RunManifest`)
    RUN/tokenizer.json                the expert's
    RUN/trajectories/part-*.parquet   a row a trajectory; costly, written first
    RUN/samples/part-*.parquet        a row a trajectory: its kept steps and labels
    RUN/failures/part-*.jsonl         problems that failed, and why
    RUN/complete.json                 written last; its presence means sealed
    RUN/training, RUN/evaluation      what the trainer may have left; only reports read it

Promises: a part appears whole or not at all, names never collide, nothing is rewritten (but the seal, which is taken
off while what failed is asked again). Where two parts hold a key, readers take the first part by name. samples/part-X
is a pure function of trajectories/part-X, so a crash between the two costs nothing: `mend` makes what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TypeVar

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from client.errors import RunError
from client.protocol.requests import Failure, Trajectory
from client.runs.keys import Key, Keys
from client.runs.manifest import RunManifest
from client.runs.parts import PartKind, Parts
from client.runs.samples import Sample, sample_of
from client.runs.tally import RunTotals, Tally
from client.storage.bucket import Bucket

Keyed = TypeVar("Keyed", Trajectory, Sample)


TOTALS = TypeAdapter(RunTotals)


class Seal(BaseModel):
    """What complete.json says beside the totals."""

    sealed_at: int


@dataclass(frozen=True)
class Completion:
    """complete.json: when the RUN was sealed, in seconds since the epoch, and what it holds."""

    sealed_at: int
    totals: RunTotals


class Run:
    """One RUN, by the URL of its prefix. Opening it touches nothing.

    `owner`: the number of a job's owner, which the parts that it writes carry in their names.
    """

    def __init__(self, url: str, owner: int | None = None) -> None:
        self.bucket = Bucket(url)
        self._parts = Parts(self.bucket, owner)

    def __str__(self) -> str:
        return str(self.bucket)

    def manifest(self) -> RunManifest:
        """run.json. Raises RunError, naming the RUN, where it is missing or not ours."""
        data = self.bucket.get("run.json")
        if data is None:
            raise RunError(f"no RUN at {self}: it has no run.json; 'lightreasoner-client sample' makes one")
        try:
            return RunManifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            raise RunError(
                f"{self}/run.json is not a run.json that this version reads: {where}: {first['msg']}"
            ) from None

    def claim(self, manifest: RunManifest, tokenizer: bytes) -> None:
        """Make this RUN, or join it. Raises RunError naming every setting in which it differs."""
        made = self.bucket.create("run.json", manifest.model_dump_json(indent=2).encode())
        if not made and (different := self.manifest().differences(manifest)):
            listed = "\n  ".join(("use the same or name a new RUN. The RUN's against yours:", *different))
            raise RunError(f"{self} was made with other settings; {listed}")
        self.bucket.create("tokenizer.json", tokenizer)

    def completion(self) -> Completion | None:
        """complete.json, or None while the RUN is not sealed."""
        data = self.bucket.get("complete.json")
        if data is None:
            return None
        try:
            sealed_at = Seal.model_validate_json(data, strict=True).sealed_at
            return Completion(sealed_at, TOTALS.validate_json(data, strict=True))
        except ValidationError as error:
            first = error.errors()[0]
            reason = ": ".join((*map(str, first["loc"]), first["msg"]))
            raise RunError(f"{self}/complete.json is damaged ({reason}); remove it and sample again") from None

    def seal(self, totals: RunTotals) -> bool:
        """Write complete.json; whether this call was the one that wrote it. The first writer's stands."""
        body = {"sealed_at": int(time.time()), **asdict(totals)}
        return self.bucket.create("complete.json", orjson.dumps(body, option=orjson.OPT_INDENT_2))

    def reopen(self) -> None:
        """Take the seal off, for trajectories that failed are to be asked for again."""
        self.bucket.remove("complete.json")

    def parts(self, kind: PartKind) -> list[str]:
        """Names, sorted, of the parts under trajectories, samples or failures, without folder and ending."""
        return self._parts.names(kind)

    def write(
        self, trajectories: Sequence[Trajectory], questions: dict[str, str | None], manifest: RunManifest
    ) -> list[Sample]:
        """Write one part of trajectories, then its samples, and return those; `questions` by problem_id."""
        part = self._parts.new_name()
        self._parts.write_trajectories(part, trajectories, questions)
        return self._write_samples_of(part, trajectories, manifest)

    def adopt(self, part: str, other: Run, manifest: RunManifest, write: bool) -> tuple[list[Trajectory], list[Sample]]:
        """A part of another RUN's trajectories with its samples made anew; written, byte for byte, where asked to."""
        data = other._parts.data("trajectories", part)
        trajectories = other._parts.trajectories(part, data)
        samples = [sample_of(trajectory, manifest) for trajectory in trajectories]
        if write:
            self._parts.copy("trajectories", part, data)
            self._parts.write_samples(part, samples)
        return trajectories, samples

    def copy_failures(self, other: Run) -> None:
        """Take over what failed in another RUN."""
        had = set(self.parts("failures"))
        for part in other.parts("failures"):
            if part not in had:
                self._parts.copy("failures", part, other._parts.data("failures", part))

    def tokenizer(self) -> bytes:
        """The expert's tokenizer.json. Raises RunError where it is missing."""
        data = self.bucket.get("tokenizer.json")
        if data is None:
            raise RunError(f"{self} has no tokenizer.json; copy the expert's there")
        return data

    def write_samples(self, part: str, samples: Sequence[Sample]) -> None:
        """Write one part of samples; those of a part of trajectories only after it."""
        self._parts.write_samples(part, samples)

    def write_failures(self, failures: Sequence[Failure]) -> None:
        """Write one part of failures, each a line as the server sent it."""
        self._parts.write_failures(self._parts.new_name(), failures)

    def write_evaluation(self, name: str, body: bytes) -> None:
        """Keep what an evaluation found, for the report; one of the same name gives way."""
        self.bucket.put(f"evaluation/{name}.json", body)

    def mend(self, manifest: RunManifest) -> int:
        """Make the samples parts that a crash left out; returns how many."""
        missing = sorted(set(self.parts("trajectories")) - set(self.parts("samples")))
        for part in missing:
            self._write_samples_of(part, self.trajectories_of(part), manifest)
        return len(missing)

    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory once."""
        return _first_of_each_key(chain.from_iterable(map(self.trajectories_of, self.parts("trajectories"))))

    def samples(self) -> Iterator[Sample]:
        """Every trajectory's samples once; one with no kept step is among them."""
        return _first_of_each_key(chain.from_iterable(map(self.samples_of, self.parts("samples"))))

    def trajectories_of(self, part: str) -> list[Trajectory]:
        """A part's trajectories. Raises RunError naming the part where it cannot be read."""
        return self._parts.trajectories(part)

    def samples_of(self, part: str) -> list[Sample]:
        """One part's samples; a key that another part holds may be among them."""
        return self._parts.samples(part)

    def keys(self) -> Keys:
        """The keys of all trajectories; reads two columns of each part."""
        names = "problem_id", "sample_index"
        return Keys(key for part in self.parts("trajectories") for key in self._parts.columns(part, names))

    def questions(self, keys: set[Key]) -> dict[Key, str]:
        """The questions of some trajectories; those sampled from token ids have none. Reads three columns."""
        names = "problem_id", "sample_index", "question"
        rows = (row for part in self.parts("trajectories") for row in self._parts.columns(part, names))
        found: dict[Key, str] = {}
        for problem_id, sample_index, question in rows:
            if (problem_id, sample_index) in keys and question is not None:
                found.setdefault((problem_id, sample_index), question)
        return found

    def failures(self) -> dict[Key, Failure]:
        """What failed, by key; a key that was had after all may be among them."""
        found = chain.from_iterable(map(self._parts.failures, self.parts("failures")))
        return {(failure.problem_id, failure.sample_index): failure for failure in found}

    def tally(self, manifest: RunManifest, expected: Iterable[str] = ()) -> Tally:
        """Count the whole RUN in one pass over its trajectories; `expected` as `Tally` takes it."""
        tally = Tally(manifest, expected)
        for part in self.parts("trajectories"):
            for trajectory in self.trajectories_of(part):
                tally.add(trajectory)
        return tally

    def totals(self, manifest: RunManifest) -> RunTotals:
        """What complete.json would say now."""
        return self.tally(manifest).totals(self.failures())

    def _write_samples_of(self, part: str, trajectories: Sequence[Trajectory], manifest: RunManifest) -> list[Sample]:
        samples = [sample_of(trajectory, manifest) for trajectory in trajectories]
        self._parts.write_samples(part, samples)
        return samples


def read_samples(url: str) -> Iterator[Sample]:
    """Every trajectory's samples once, a part in memory at a time; `url` as commands take a RUN.

    Raises RunError where there is no RUN at once, and where a part is damaged when it is reached.
    """
    return _there(url).samples()


def read_trajectories(url: str) -> Iterator[Trajectory]:
    """Every trajectory once, as `read_samples` reads samples."""
    return _there(url).trajectories()


def _there(url: str) -> Run:
    run = Run(url)
    run.manifest()
    return run


def _first_of_each_key(rows: Iterator[Keyed]) -> Iterator[Keyed]:
    seen = Keys()
    for row in rows:
        if seen.add((row.problem_id, row.sample_index)):
            yield row
