"""A RUN in a bucket: what it holds, under which names, and how it is read and written.

    RUN/run.json                      how it was made (`RunManifest`)
    RUN/tokenizer.json                the expert's
    RUN/trajectories/part-*.parquet   one row per trajectory; costly, written first
    RUN/samples/part-*.parquet        one row per trajectory: its kept steps and labels
    RUN/failures/part-*.jsonl         trajectories that failed, and why
    RUN/README.md, RUN/divergence.svg for `datasets`, the Hub and people; written when the RUN is sealed
    RUN/complete.json                 written last: the RUN is sealed (complete)
    RUN/training, RUN/evaluation      results of the trainer, for the report

A part appears whole or not at all, and is never rewritten; names never collide. complete.json is removed while failed
trajectories are retried. If two parts hold a key, readers take the first part by name. samples/part-X is a pure
function of trajectories/part-X: after a crash between the two, `mend` writes the missing samples.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from client.errors import RunError, fault_words, shorten
from client.models.detokenize import MOST_TOKENIZER_BYTES
from client.protocol.requests import Failure, Trajectory, token_fault
from client.runs.keys import Key, Keys
from client.runs.manifest import CARD_TAG, PICTURE, RunManifest, dataset_card, divergence_picture
from client.runs.parts import MOST_PART_BYTES, PartKind, Parts
from client.runs.samples import Sample, SampledGroup, sampled_groups
from client.runs.tally import CountedParts, RunTotals, Tally
from client.storage.ahead import Found, read_ahead
from client.storage.bucket import Bucket
from client.storage.data_sets import DataSet

Keyed = TypeVar("Keyed", Trajectory, Sample)


PARTS_AHEAD, PARTS_LISTED_AHEAD = 4, 16
"""Parts of a remote RUN that are read in parallel: whole ones, and ones of which a few columns are read."""
MOST_JSON_BYTES = 2**22
"""Most bytes of run.json and complete.json."""
TOTALS = TypeAdapter(RunTotals)
FILES = re.compile(
    r"(run|tokenizer|complete)\.json|README\.md|divergence\.svg|(samples|trajectories)/part-[^/]+\.parquet|failures/part-[^/]+\.jsonl"
    r"|(training|evaluation)/[^/]+\.jsonl?"
)
"""Names of a RUN's files. Other files may be beside them."""
OWN_NAMES = frozenset({"run.json", "trajectories", "trajectories/"})
OWN_FOLDERS: tuple[PartKind, ...] = "samples", "failures"
"""Names of which a RUN has at least one, and folders in which it may have parts; an empty folder is no proof."""
FREE = re.compile(r"\..*|lost\+found/|README\.md|probe-[0-9a-f]{32}")
"""Names that do not prevent a new RUN: hidden files, a card, what is left of a probe of the store."""
NAMES_SHOWN = 4


class Seal(BaseModel):
    """The fields of complete.json besides the totals."""

    sealed_at: int


@dataclass(frozen=True)
class Completion:
    """complete.json: when the RUN was sealed, in seconds since the epoch, and what it holds."""

    sealed_at: int
    totals: RunTotals


class Run:
    """One RUN, by the URL of its prefix. Creating the value reads and writes nothing.

    `owner`: the number of a job's owner, for the names of the parts that it writes.
    """

    def __init__(self, url: str, owner: int | None = None) -> None:
        self.bucket = Bucket(url)
        self._parts = Parts(self.bucket, owner)
        self._head: int | None = None

    def __str__(self) -> str:
        return str(self.bucket)

    def manifest(self) -> RunManifest:
        """run.json. Raises RunError, naming the RUN, if it is missing or invalid."""
        data = self.bucket.get("run.json", MOST_JSON_BYTES)
        if data is None:
            raise RunError(f"no RUN at {self}: it has no run.json; 'lightreasoner-client sample' makes one")
        return self._manifest_in(data)

    def _manifest_in(self, data: bytes) -> RunManifest:
        try:
            return RunManifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = shorten(".".join(map(str, first["loc"])))
            said = f"{where}: {fault_words(first)}" if where else fault_words(first)
            raise RunError(
                f"{self}/run.json is not a run.json that this version reads: {said}. If it is not a RUN's, name a new "
                "folder"
            ) from None

    def date(self) -> str | None:
        """The date in this RUN's prompts; None if they have none, or if the RUN does not exist yet."""
        return None if self.bucket.get("run.json") is None else self.manifest().date

    def made_early(self) -> bool:
        """Whether an early version made this RUN: its run.json does not say where its trajectories end."""
        return self.bucket.get("run.json") is not None and self.manifest().end_token_ids is None

    def check_place(self) -> None:
        """Raises RunError if other files than a RUN's are here: a RUN's files would mix with them.

        A folder may be empty, or hold hidden files and a README.md only. A RUN without its run.json is still a RUN: its
        parts identify it.
        """
        if self.bucket.get("run.json", MOST_JSON_BYTES) is not None:
            self.manifest()
            return
        there = sorted(self.bucket.first_names())
        other = [name for name in there if not FREE.fullmatch(name)]
        if other and OWN_NAMES.isdisjoint(there) and not any(map(self.parts, OWN_FOLDERS)):
            listed = shorten(", ".join(other[:NAMES_SHOWN]) + ", …" * (len(other) > NAMES_SHOWN))
            raise RunError(
                f"{self} holds no RUN, but other things ({listed}); name a new folder, as {str(self).rstrip('/')}/run"
            )

    def claim(self, manifest: RunManifest, tokenizer: bytes) -> None:
        """Create this RUN, or join it. Raises RunError, naming every setting that differs from run.json."""
        made = self.bucket.create("run.json", manifest.model_dump_json(indent=2).encode())
        if not made and (different := self.manifest().differences(manifest)):
            listed = "\n  ".join(("use the same or name a new RUN. The RUN's against yours:", *different))
            raise RunError(f"{self} was made with other settings; {listed}")
        self.bucket.create("tokenizer.json", tokenizer)

    def completion(self) -> Completion | None:
        """complete.json; None if the RUN is not sealed."""
        data = self.bucket.get("complete.json", MOST_JSON_BYTES)
        if data is None:
            return None
        try:
            sealed_at = Seal.model_validate_json(data, strict=True).sealed_at
            return Completion(sealed_at, TOTALS.validate_json(data, strict=True))
        except ValidationError as error:
            first = error.errors()[0]
            reason = shorten(": ".join((*map(str, first["loc"]), fault_words(first))))
            raise RunError(
                f"{self}/complete.json is damaged ({reason}); move it out of the RUN, and sample again"
            ) from None

    def seal(self, totals: RunTotals, tally: Tally | None = None) -> bool:
        """Write README.md and complete.json, if the RUN is not sealed. Returns whether this call wrote complete.json.

        A README.md from elsewhere stays. `tally`: the counts behind `totals`, for the card's picture.
        """
        body = {"sealed_at": int(time.time()), **asdict(totals)}
        if self.bucket.get("complete.json") is None:
            manifest = self.manifest()
            if tally:
                edges, counts = tally.bounds.histogram(manifest.beta)
                self.bucket.put(PICTURE, divergence_picture(edges, counts, manifest.beta).encode())
            if CARD_TAG in (self.bucket.get("README.md") or CARD_TAG):
                self.bucket.put("README.md", dataset_card(manifest, body, pictured=tally is not None).encode())
        return self.bucket.create("complete.json", orjson.dumps(body, option=orjson.OPT_INDENT_2))

    def reopen(self) -> None:
        """Remove complete.json, so that failed trajectories can be retried."""
        self.bucket.remove("complete.json")

    def push(self, data_set: DataSet) -> str:
        """Copy this RUN to a data set of the Hub; returns the commit's URL.

        Raises RunError if it is not sealed.
        """
        if self.manifest() and self.completion() is None:
            raise RunError(f"{self} is not complete; run the command that samples it again, then push it")
        return data_set.push(self.bucket, [name for name in self.bucket.names("") if FILES.fullmatch(name)])

    def pull(self, data_set: DataSet) -> int:
        """Copy a RUN from a data set of the Hub to here; returns the number of files copied besides run.json.

        The same call resumes. Raises BucketError if another RUN is here, RunError if other files are.
        """
        self.check_place()
        return data_set.pull(
            self.bucket, lambda name: bool(FILES.fullmatch(name)), "run.json", "complete.json", MOST_PART_BYTES
        )

    def parts(self, kind: PartKind) -> list[str]:
        """The names of the parts of a kind, sorted, without folder and ending."""
        return self._parts.names(kind)

    def write(
        self,
        trajectories: Sequence[Trajectory],
        questions: dict[str, str | None],
        manifest: RunManifest,
        counted: CountedParts | None = None,
    ) -> list[Sample]:
        """Write one part of trajectories, then its samples; returns the samples.

        `questions`: by problem_id. `counted`: counts the part, for `tally`.
        """
        part = self._parts.new_name()
        self._parts.write_trajectories(part, trajectories, questions)
        return self._write_samples_of(part, trajectories, manifest, counted)

    def adopt(self, part: str, other: Run, manifest: RunManifest, write: bool) -> list[SampledGroup]:
        """Read a part of another RUN's trajectories, and make its samples with this RUN's settings.

        `write`: also copy the trajectories byte for byte, and write the samples.
        """
        data = other._parts.data("trajectories", part)
        trajectories = other._sound(other._parts.trajectories(part, data), manifest.expert.vocab_size)
        groups = list(sampled_groups(trajectories, manifest))
        if write:
            self._parts.copy("trajectories", part, data)
            self._parts.write_samples(part, [sample for group in groups for sample in group.samples])
        return groups

    def copy_failures(self, other: Run) -> None:
        """Copy the failures of another RUN."""
        had = set(self.parts("failures"))
        for part in other.parts("failures"):
            if part not in had:
                self._parts.copy("failures", part, other._parts.data("failures", part))

    def tokenizer(self) -> bytes:
        """The expert's tokenizer.json. Raises RunError if it is missing."""
        data = self.bucket.get("tokenizer.json", MOST_TOKENIZER_BYTES)
        if data is None:
            raise RunError(f"{self} has no tokenizer.json; copy the expert's tokenizer.json into it")
        return data

    def write_samples(self, part: str, samples: Sequence[Sample]) -> None:
        """Write one part of samples. If it belongs to a part of trajectories, write that first."""
        self._parts.write_samples(part, samples)

    def write_failures(self, failures: Sequence[Failure]) -> None:
        """Write one part of failures."""
        self._parts.write_failures(self._parts.new_name(), failures)

    def write_evaluation(self, name: str, body: bytes) -> None:
        """Write an evaluation's results, for the report. It replaces one of the same name."""
        self.bucket.put(f"evaluation/{name}.json", body)

    def mend(self, manifest: RunManifest) -> int:
        """Write the samples of parts that have none, as after a crash; returns how many."""
        missing = sorted(set(self.parts("trajectories")) - set(self.parts("samples")))
        for part in missing:
            self._write_samples_of(part, self.trajectories_of(part), manifest)
        return len(missing)

    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory once."""
        return _first_of_each_key(self._every_trajectory(self.parts("trajectories"), self._vocab_size))

    def samples(self) -> Iterator[Sample]:
        """The samples of every trajectory, each once, also of those without a kept step."""
        read = partial(self._parts.samples, vocab_size=self._vocab_size)
        return _first_of_each_key(chain.from_iterable(self._all("samples", read, self.parts("samples"))))

    def trajectories_of(self, part: str) -> list[Trajectory]:
        """A part's trajectories. Raises RunError, naming the part, if it cannot be read."""
        return list(self._sound(self._parts.trajectories(part), self._vocab_size))

    def samples_of(self, part: str) -> list[Sample]:
        """A part's samples. Another part may hold the same keys."""
        return self._parts.samples(part, vocab_size=self._vocab_size)

    def keys(self) -> Keys:
        """The keys of all trajectories; reads two columns of each part."""
        names = "problem_id", "sample_index"
        return Keys(chain.from_iterable(self._columns(names)))

    def questions(self, keys: set[Key]) -> dict[Key, str]:
        """The questions of some trajectories. A problem given as token ids has none. Reads three columns."""
        names = "problem_id", "sample_index", "question"
        rows = chain.from_iterable(self._columns(names))
        found: dict[Key, str] = {}
        for problem_id, sample_index, question in rows:
            if (problem_id, sample_index) in keys and question is not None:
                found.setdefault((problem_id, sample_index), question)
        return found

    def failures(self) -> dict[Key, Failure]:
        """The failures by key. A key that succeeded later may be among them."""
        found = chain.from_iterable(self.each(self.parts("failures"), self._parts.failures, PARTS_LISTED_AHEAD))
        return {(failure.problem_id, failure.sample_index): failure for failure in found}

    def tally(self, manifest: RunManifest, expected: Iterable[str] = (), counted: CountedParts | None = None) -> Tally:
        """Count the whole RUN in one pass over its trajectories. `expected`: see `Tally`.

        `counted`: parts that were counted while they were written. If the RUN has no others, only their keys are read.
        """
        if counted and self._holds_only(counted):
            return counted.tally
        tally = Tally(manifest, expected)
        tally.add_all(self._every_trajectory(self.parts("trajectories"), manifest.expert.vocab_size))
        return tally

    def _holds_only(self, counted: CountedParts) -> bool:
        """Whether the RUN has exactly these parts, with exactly the keys that were counted."""
        parts = self.parts("trajectories")
        if set(parts) != set(counted.parts) or not counted.whole:
            return False
        return Keys(chain.from_iterable(self._columns(("problem_id", "sample_index"), parts))) == counted.tally.keys

    def totals(self, manifest: RunManifest) -> RunTotals:
        """The totals that complete.json would have now."""
        return self.tally(manifest).totals(self.failures())

    def each(self, parts: Iterable[str], read: Callable[[str], Found], ahead: int = PARTS_AHEAD) -> Iterator[Found]:
        """Yield `read(part)` for each part, in order. Parts of a remote RUN are read in parallel."""
        return read_ahead(parts, read, ahead) if self.bucket.remote else map(read, parts)

    @property
    def _vocab_size(self) -> int | None:
        """Columns of the expert's head; None if there is no run.json."""
        if self._head is None and (data := self.bucket.get("run.json", MOST_JSON_BYTES)) is not None:
            self._head = self._manifest_in(data).expert.vocab_size
        return self._head

    def _every_trajectory(self, parts: Sequence[str], vocab_size: int | None) -> Iterator[Trajectory]:
        """The trajectories of these parts."""
        found = chain.from_iterable(self._all("trajectories", self._parts.trajectories, parts))
        return self._sound(found, vocab_size)

    def _sound(self, trajectories: Iterable[Trajectory], vocab_size: int | None) -> Iterator[Trajectory]:
        """The same trajectories. Raises RunError for a token id that is not below the expert's `vocab_size`."""
        for trajectory in trajectories:
            if vocab_size and (fault := token_fault(trajectory, vocab_size)):
                raise RunError(f"{self} is damaged: problem {trajectory.problem_id!r}: {fault}; sample into a new RUN")
            yield trajectory

    def _all(
        self, kind: PartKind, values: Callable[[str, bytes], list[Found]], parts: Sequence[str]
    ) -> Iterator[list[Found]]:
        """The values of each part. The next parts are read while one is used."""
        fetched = self.each(parts, lambda part: (part, self._parts.data(kind, part)))
        return (values(part, data) for part, data in fetched)

    def _columns(self, names: Sequence[str], parts: Sequence[str] | None = None) -> Iterator[list[tuple[Any, ...]]]:
        parts = self.parts("trajectories") if parts is None else parts
        return self.each(parts, lambda part: self._parts.columns(part, names), PARTS_LISTED_AHEAD)

    def _write_samples_of(
        self,
        part: str,
        trajectories: Sequence[Trajectory],
        manifest: RunManifest,
        counted: CountedParts | None = None,
    ) -> list[Sample]:
        samples: list[Sample] = []
        for group in sampled_groups(trajectories, manifest):
            samples += group.samples
            if counted:
                counted.add(part, group)
        self._parts.write_samples(part, samples)
        if counted:
            counted.written(part, len(trajectories))
        return samples


def read_samples(url: str) -> Iterator[Sample]:
    """The samples of every trajectory, each once; one part is in memory at a time. `url`: a RUN, as for commands.

    Raises RunError: at once if there is no RUN, and during the iteration when it reaches a damaged part.
    """
    return _there(url).samples()


def read_trajectories(url: str) -> Iterator[Trajectory]:
    """Every trajectory once; otherwise like `read_samples`."""
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
