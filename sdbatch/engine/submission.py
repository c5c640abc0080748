"""Jobs on somebody else's machines: what is sent to a Ray cluster's job server, and how it ends there."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdbatch.errors import JobFailed, Problem, SpecError, UsageError
from sdbatch.spec import JobSpec

#: What the job spec is called where it arrives.
SPEC_NAME = "job.yaml"
_ELSEWHERE = ("s3://", "gs://", "az://", "hf:", "builtin:", "/", "file:///")
_ENDED = {"STOPPED", "SUCCEEDED", "FAILED"}
#: Seconds between two looks, and that a cluster may take until it runs jobs.
_PAUSE, _PATIENCE = 1.0, 60.0


def refuse_unreachable(spec: JobSpec, source: str) -> None:
    """Raise SpecError for what the spec names and only this machine, or this folder, would find."""
    places: list[tuple[str, str | None]] = [
        ("input.uri", spec.input.uri),
        ("prompt.wildcards", spec.prompt.wildcards),
        ("output.uri", spec.output.uri),
        ("model.uri", spec.model.uri),
        ("model.tokenizer", spec.model.tokenizer),
        *((f"model.loras.{place}.uri", lora.uri) for place, lora in enumerate(spec.model.loras)),
        *((f"model.embeddings.{place}.uri", word.uri) for place, word in enumerate(spec.model.embeddings)),
        *((f"checks.{name}.model", uri) for name, uri in (spec.checks.models if spec.checks else {}).items()),
    ]
    wrong = [
        Problem(field, f"is '{uri}', which starts at this machine's folder", "name s3://…, or a full path all share")
        for field, uri in places
        if uri is not None and not uri.startswith(_ELSEWHERE)
    ]
    if wrong:
        raise SpecError(source, wrong)


@dataclass(frozen=True)
class Submission:
    """What is sent. The same spec, with the same variables filled in, has the same ``id``."""

    id: str
    text: bytes  # of the job spec
    arguments: tuple[str, ...]  # of 'sdbatch run', after the spec

    @property
    def entrypoint(self) -> str:
        """The shell itself becomes the job, so that a stop reaches it."""
        return "exec " + shlex.join(["python", "-m", "sdbatch", "run", SPEC_NAME, *self.arguments])


def submission_of(
    spec: JobSpec, text: bytes, overrides: Sequence[str], date: datetime.date, *, extend: bool
) -> Submission:
    """``spec`` is what ``text`` says with the overrides, its variables filled in as of the date."""
    told = json.dumps([spec.model_dump(mode="json"), extend], sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    sets = [word for override in overrides for word in ("--set", override)]
    arguments = (*sets, "--date", date.isoformat(), *(["--extend"] if extend else []))
    return Submission(f"sdbatch-{re.sub('[^A-Za-z0-9_-]', '-', spec.name)}-{digest}", text, arguments)


@dataclass(frozen=True)
class Sent:
    """A job on a cluster. ``attached``: it was there before, and runs."""

    id: str
    attached: bool


class JobServer:
    """The job server of a Ray cluster. Raises JobFailed when it is out of reach, UsageError when it refuses us."""

    def __init__(self, address: str) -> None:
        if not re.match(r"https?://[^/\s]+", address):
            raise UsageError(f"--address: '{address}' should be the cluster's dashboard, as in http://HEAD:8265")
        from ray.job_submission import JobSubmissionClient  # Ray takes a second to import

        self.address = address
        try:
            self._client: Any = JobSubmissionClient(address)
        except Exception as error:  # Ray raises many kinds
            raise _kind(error)(
                f"--address: no Ray job server at {address}: {_told(error)}; check the address, that the cluster runs "
                "with its dashboard (the package ray[default]), and RAY_AUTH_MODE"
            ) from None

    def send(self, submission: Submission) -> Sent:
        """Start the job, or find it at work. One that ended is started again under a name with a number."""
        try:
            earlier = {job.submission_id: str(job.status) for job in self._client.list_jobs()}
            name, attempt = submission.id, 1
            while name in earlier:
                if earlier[name] not in _ENDED:
                    return Sent(name, attached=True)
                attempt += 1
                name = f"{submission.id}-{attempt}"
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / SPEC_NAME).write_bytes(submission.text)
                self._submit(submission.entrypoint, name, folder)
        except Exception as error:
            raise _kind(error)(f"{self.address} does not take the job: {_told(error)}") from None
        return Sent(name, attached=False)

    def _submit(self, entrypoint: str, name: str, folder: str) -> None:
        """A cluster that has just started answers before any of its nodes can run a job."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env={"working_dir": folder})
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE)

    def wait(self, name: str, on_text: Callable[[str], None]) -> int:
        """Follow the job's log to its end; its exit code. Raises JobFailed when the server goes away."""
        try:
            asyncio.run(self._follow(name, on_text))
            while str((info := self._client.get_job_info(name)).status) not in _ENDED:
                time.sleep(_PAUSE)
        except (OSError, RuntimeError) as error:
            raise JobFailed(f"{self.address} went away: {_told(error)}; {name} may well go on there") from None
        if info.driver_exit_code is not None:
            return int(info.driver_exit_code)
        if str(info.status) == "FAILED":
            on_text(f"{_told(info.message)}\n")
        return {"SUCCEEDED": 0, "STOPPED": 130}.get(str(info.status), 1)

    async def _follow(self, name: str, on_text: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(name):
            on_text(text)


def _kind(error: Exception) -> type[JobFailed | UsageError]:
    """What an error of the client is: a server out of reach or in trouble, or a wrong address, version or token."""
    away = isinstance(error, OSError) and not isinstance(error, ValueError)
    return JobFailed if away or "status code 5" in str(error) else UsageError


def _told(error: object) -> str:
    return " ".join(str(error).split())[:500]
