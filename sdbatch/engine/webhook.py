"""The webhook: tells an address how a job ended. It never fails a job, and a command waits for it only so long."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdbatch import __version__
from sdbatch.errors import BudgetSpent, OutputError, SdbatchError, UsageError
from sdbatch.ledger import read_progress
from sdbatch.spec import JobSpec, Notify
from sdbatch.storage import Store

#: Times that it is tried, seconds that one may take, and the pause after the first, which doubles.
_TRIES, _TIMEOUT, _PAUSE = 4, 5.0, 1.0
#: Answers that another try may change.
_AGAIN = {408, 425, 429, 500, 502, 503, 504}

log = logging.getLogger(__name__)


def check_notify(notify: Notify) -> None:
    """Raise UsageError when the secret that should sign is not there."""
    if notify.url and notify.secret_env and not os.environ.get(notify.secret_env):
        raise UsageError(
            f"notify.secret_env: the environment has no {notify.secret_env}; set it to the secret, or drop the field"
        )


@contextmanager
def telling(spec: JobSpec, store: Store) -> Iterator[None]:
    """Around a job's work: tells how it ended, be it well or by an exception, which goes on as it was.

    A stop by Ctrl-C or SIGTERM is told to nobody, for who stopped it knows; nor is a driver that finds another at work.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        tell(spec, store, "budget" if isinstance(error, BudgetSpent) else "failure", str(error) or type(error).__name__)
        raise
    tell(spec, store, "finish")


def tell(spec: JobSpec, store: Store, event: str, error: str | None = None) -> bool:
    """Tell of an event, if the spec asks for it; returns whether it was received."""
    notify = spec.notify
    if notify.url is None or event not in notify.on:
        return False
    content: dict[str, Any] = {
        "event": event,
        "delivery": uuid.uuid4().hex,
        "sent_at": round(time.time(), 3),
        "job": spec.name,
        "output": store.uri,
        "error": error,
        **_counts(store),
    }
    secret = os.environ.get(notify.secret_env) if notify.secret_env else None
    return deliver(notify.url, content, secret)


def _counts(store: Store) -> dict[str, Any]:
    try:
        progress = read_progress(store)
    except SdbatchError:  # no plan yet, or the store is away, which may be why the job failed
        return {"state": "unknown"}
    status = progress.status
    return {
        "state": status.state,
        "planned": status.planned,
        "committed": status.committed,
        "quarantined": status.quarantined,
        "dropped": status.dropped,
        "reasons": dict(progress.reasons),
    }


def deliver(url: str, content: Mapping[str, Any], secret: str | None) -> bool:
    """POST the content, signed, and again while it may help: every try has the same body and signature."""
    body = json.dumps(content, ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"sdbatch/{__version__}",
        "X-Sdbatch-Event": str(content["event"]),
        "X-Sdbatch-Delivery": str(content["delivery"]),
    }
    if secret is not None:
        headers["X-Sdbatch-Signature"] = f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
    told = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        told, again = _post(urllib.request.Request(url, body, headers, method="POST"))  # noqa: S310 (the spec checks it)
        if not told:
            return True
        if not again:
            break
    log.warning("notify.url: nobody was told of '%s': %s", content["event"], told)
    return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A signed body goes to the address in the spec and to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(request: urllib.request.Request) -> tuple[str, bool]:
    """What went wrong, empty if nothing did, and whether another try may help."""
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT):
            return "", False
    except urllib.error.HTTPError as error:
        with error:
            return f"the answer was {error.code}", error.code in _AGAIN
    except (OSError, ValueError) as error:  # no connection, no such host, no answer in time, no HTTP
        return f"{type(error).__name__}: {error}", True
    except Exception as error:  # http.client has errors of its own for servers that don't speak HTTP
        return f"{type(error).__name__}: {error}", True
