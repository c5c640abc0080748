"""The webhook: signed, tried again where that helps, and never in the job's way. Against real servers on loopback."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sdbatch.engine import webhook
from sdbatch.errors import BudgetSpent, Interrupted, JobFailed, OutputError, SpecError
from sdbatch.spec import parse_spec
from sdbatch.storage import LocalStore
from tests.conftest import CommandLine
from tests.ledger.planned import Planned

Write = Callable[..., Path]


@dataclass
class Heard:
    """Requests that a server got. ``answers``: what it says to the first ones; then 204. 0: nothing, it hangs up."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def listening(*answers: int) -> Iterator[Heard]:
    heard = Heard(answers=list(answers))

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            heard.headers.append(dict(self.headers))
            answer = heard.answers.pop(0) if heard.answers else 204
            if not answer:
                return
            self.send_response(answer)
            self.send_header("Location", f"{heard.url}/elsewhere")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    heard.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def spec(url: str, **notify: Any) -> Any:
    raw = {"name": "n", "input": {"uri": "x"}, "output": {"uri": "o"}, "notify": {"url": url, **notify}}
    return parse_spec(raw)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_PAUSE", 0.001)


@pytest.mark.parametrize(
    ("ends", "event"),
    [
        (None, "finish"),
        (JobFailed("the model is gone"), "failure"),
        (RuntimeError("a mistake of ours"), "failure"),
        (BudgetSpent("too many failed"), "budget"),
        (Interrupted("by a signal"), None),
        (OutputError("is in use"), None),
    ],
)
def test_every_end_is_told_by_its_name_and_changes_nothing(
    ends: BaseException | None, event: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "sesame")
    planned = Planned(LocalStore(tmp_path))
    planned.commit(0, failing=(1,))
    with listening() as heard:
        expected = pytest.raises(type(ends)) if ends is not None else nullcontext()
        with expected, webhook.telling(spec(heard.url, secret_env="HOOK_SECRET"), planned.store):
            if ends is not None:
                raise ends
    assert len(heard.bodies) == (event is not None)
    for body, headers in zip(heard.bodies, heard.headers, strict=True):
        told = json.loads(body)
        assert (told["event"], told["job"], told["output"]) == (event, "n", planned.store.uri)
        assert (told["state"], told["planned"], told["committed"], told["quarantined"]) == ("incomplete", 10, 3, 1)
        assert told["reasons"] == {"it failed": 1}
        assert told["error"] == (str(ends) if ends else None)
        signed = hmac.new(b"sesame", body, hashlib.sha256).hexdigest()
        assert headers["X-Sdbatch-Signature"] == f"sha256={signed}"
        assert (headers["X-Sdbatch-Event"], headers["X-Sdbatch-Delivery"]) == (event, told["delivery"])


def test_what_may_help_is_tried_again_with_the_same_body() -> None:
    content = {"event": "finish", "delivery": "d"}
    with listening(503, 0, 429) as heard:
        assert webhook.deliver(heard.url, content, "s")
    assert len(heard.bodies) == 4
    assert len({*heard.bodies}) == len({headers["X-Sdbatch-Signature"] for headers in heard.headers}) == 1


@pytest.mark.parametrize(("answers", "tries"), [((404,), 1), ((302,), 1), ((500,) * 9, 4), ((0,) * 9, 4)])
def test_it_gives_up_and_follows_nobody_elsewhere(
    answers: tuple[int, ...], tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(*answers) as heard:
        assert not webhook.deliver(heard.url, {"event": "finish", "delivery": "d"}, None)
    assert len(heard.bodies) == tries
    assert "X-Sdbatch-Signature" not in heard.headers[0]
    assert "notify.url: nobody was told of 'finish'" in caplog.text


def test_nobody_there_is_no_failure_of_the_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with listening() as heard:
        pass
    with webhook.telling(spec(heard.url), LocalStore(tmp_path)):
        pass
    assert "nobody was told" in caplog.text


def test_only_what_is_asked_for_is_told(tmp_path: Path) -> None:
    with listening() as heard, webhook.telling(spec(heard.url, on=["failure"]), LocalStore(tmp_path)):
        pass
    assert heard.bodies == []


@pytest.mark.parametrize(
    ("notify", "told"),
    [
        ({"url": "https://user:word@host/hook"}, "notify.url: holds credentials"),
        ({"url": "ftp://host/hook"}, "notify.url: should be an address such as https://"),
        ({"url": "https://host/a\nb"}, "notify.url: should be an address"),
        ({"url": "https://host", "on": ["end"]}, "notify.on.0: is 'end'"),
        ({"url": "https://host", "secret_env": "se-same"}, "notify.secret_env: should be the name of an environment"),
        ({"url": "https://host", "secret": "x"}, "notify.secret: no such field (did you mean 'secret_env'?)"),
    ],
)
def test_a_mistake_in_it_is_told_with_its_field(notify: dict[str, Any], told: str) -> None:
    raw = {"name": "n", "input": {"uri": "x"}, "output": {"uri": "o"}, "notify": notify}
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    assert told in str(caught.value)
    assert "word" not in str(caught.value)


def test_a_job_tells_of_its_end_and_a_secret_that_is_missing_stops_it_before_it_begins(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na red circle\n")
    with listening() as heard:
        job = write_job(model={"uri": "builtin:null"}, notify={"url": heard.url, "secret_env": "NO_SUCH_SECRET"})
        for command in ("validate", "run"):
            assert "notify.secret_env: the environment has no NO_SUCH_SECRET" in sdbatch(command, job, code=2).stderr
        assert not (tmp_path / "out").exists()
        sdbatch("run", write_job(model={"uri": "builtin:null"}, notify={"url": heard.url}))
        sdbatch("run", job.with_name("job.yaml"))  # complete already: nothing to tell, and notify is no change
    assert [json.loads(body)["event"] for body in heard.bodies] == ["finish"]
