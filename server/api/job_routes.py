"""Jobs over HTTP: create, list, get, cancel. All state is in the bucket, so any replica can answer.

The routes block on the bucket and therefore run in threads. Without a bucket they answer 501.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from client.protocol.requests import Job, JobList, JobRequest
from client.storage.bucket import BucketError
from server.api.bodies import BodyRoute
from server.api.problem_details import documented, invalid
from server.api.sharing import Caller, caller_of
from server.jobs.runner import JobRunner
from server.jobs.store import DAMAGED, JobTooLarge, KeyReused, TooManyJobs

OPEN_JOBS_RETRY_SECONDS = 30
"""Retry-After when too many jobs are open."""
MOST_LISTED = 100


def jobs_of(request: Request) -> Iterator[JobRunner]:
    """The server's jobs. Answers 501 if it has no bucket, and 503 if the bucket fails."""
    jobs: JobRunner | None = request.app.state.service.jobs
    if jobs is None:
        raise HTTPException(501, "this server has no bucket, so it takes no jobs: start it with --bucket URL")
    try:
        yield jobs
    except DAMAGED as error:
        what = error.title if isinstance(error, ValidationError) else error
        said = f"{request.url.path}: an object of this job in the bucket is damaged: {what}"
        raise HTTPException(
            500, f"{said}; move the job's folder out of jobs/, and submit its problems again"
        ) from error
    except BucketError as error:
        raise HTTPException(503, f"the bucket fails: {error}", headers={"Retry-After": "5"}) from error


Jobs = Annotated[JobRunner, Depends(jobs_of)]
job_routes = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=BodyRoute)


@job_routes.post(
    "",
    status_code=202,
    responses=documented(400, 422, 429, 501, 503),
)
def create_job(
    body: JobRequest,
    request: Request,
    response: Response,
    jobs: Jobs,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="The same key returns the job it first made.")
    ] = None,
) -> Job:
    """Create a job: the server samples a problem set into a RUN of its bucket; the client may disconnect."""
    limits = jobs.settings.limits
    if objection := request.app.state.service.ready_pair().accepted.objection(body):
        raise invalid(*objection)
    if (count := len(body.problems or []) * body.n) > limits.job_trajectories:
        raise invalid("problems", f"{count} trajectories; a job of this server has at most {limits.job_trajectories}")
    names = {"run": _checked("run", jobs.store.paths.run, body.run)}
    if body.problems_url is not None:
        names["problems_url"] = _checked("problems_url", jobs.store.paths.name, body.problems_url)
    try:
        keys = request.app.state.service.keys
        job_id = jobs.store.post(
            body.model_copy(update=names), idempotency_key, limits.open_jobs, caller_of(request).key_name, keys
        )
    except TooManyJobs:
        raise HTTPException(
            429,
            f"{limits.open_jobs} jobs are open, the most that this service takes; retry when some have ended",
            headers={"Retry-After": str(OPEN_JOBS_RETRY_SECONDS)},
        ) from None
    except JobTooLarge as error:
        raise HTTPException(413, str(error)) from None
    except KeyReused as error:
        raise invalid("Idempotency-Key", f"{error}; use a new key", "header") from None
    jobs.wake()
    response.headers["Location"] = f"/v1/jobs/{job_id}"
    return _told(jobs, job_id, caller_of(request))


@job_routes.get("", responses=documented(422, 501, 503))
def list_jobs(
    request: Request,
    jobs: Jobs,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
    after: Annotated[
        str | None,
        Query(pattern=r"^job-\d{13}-[0-9a-f]{8}$", description="Jobs older than this one: the last page's last_id."),
    ] = None,
) -> JobList:
    """The jobs of the bucket that this key may see, newest first."""
    page, more = jobs.store.page(limit, after, caller_of(request).may_see)
    ends = (page[0].id, page[-1].id) if page else (None, None)
    return JobList(data=page, first_id=ends[0], last_id=ends[1], has_more=more)


@job_routes.get("/{job_id}", responses=documented(404, 422, 501, 503))
def get_job(job_id: str, request: Request, jobs: Jobs) -> Job:
    """A job's status and progress."""
    return _told(jobs, job_id, caller_of(request))


@job_routes.post("/{job_id}/cancel", responses=documented(404, 409, 422, 501, 503))
def cancel_job(job_id: str, request: Request, jobs: Jobs) -> Job:
    """Cancel a job. Its RUN keeps what it holds."""
    _told(jobs, job_id, caller_of(request))
    job = jobs.store.cancel(job_id)
    if job is None:
        raise _no_such_job(job_id)
    if job.status in ("completed", "failed"):
        raise HTTPException(409, f"{job_id} has {job.status} already; there is nothing to cancel")
    return job


def _told(jobs: JobRunner, job_id: str, caller: Caller) -> Job:
    if (job := jobs.store.job(job_id)) is None or not caller.may_see(jobs.store.key_name(job_id)):
        raise _no_such_job(job_id)
    return job


def _checked(field: str, check: Callable[[str], str], given: str) -> str:
    try:
        return check(given)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def _no_such_job(job_id: str) -> HTTPException:
    return HTTPException(404, f"there is no job {job_id!r} in this server's bucket")
