"""The Hugging Face Hub on loopback, for the tests: the endpoints that models and data sets are read by.

https://huggingface.co/docs/hub/api. It keeps a folder a commit, and every request that came.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

OLD, NEW = "0" * 40, "1" * 40  # commits


@dataclass
class Hub:
    """Repositories by name: what each revision stands for, and the folder of each commit. A data set's name begins with
    ``datasets/``."""

    revisions: dict[str, dict[str, str]]
    folders: dict[tuple[str, str], Path]
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self, repo: str, commit: str = NEW) -> set[str]:
        prefix = f"GET /{repo}/resolve/{commit}/"
        return {line.removeprefix(prefix) for line in self.asked if line.startswith(prefix)}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            about = re.fullmatch(
                r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/]+)(?:/(.*))?", path
            )
            file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if about:
                repo, revision = ("datasets/" if about[1] == "datasets" else "") + about[2], about[4]
            elif file:
                repo, revision = file[1], file[2]
            else:
                return self.send(404, {})
            if repo.endswith("studio/gated"):
                return self.send(403, {"X-Error-Code": "GatedRepo"})
            if repo not in hub.revisions:
                return self.send(404, {"X-Error-Code": "RepoNotFound"})
            commit = hub.revisions[repo].get(revision, revision)
            if (repo, commit) not in hub.folders:
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
            folder = hub.folders[repo, commit]
            if file:
                return self.send_file(folder / unquote(file[3]), commit)
            assert about is not None
            if about[3] == "tree":
                below = folder / unquote(about[5] or "")
                if not below.is_dir():
                    return self.send(404, {"X-Error-Code": "EntryNotFound"})
                return self.send_json([entry(path, folder) for path in sorted(below.rglob("*"))])
            if about[3] == "paths-info":
                sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = self.headers["Content-Type"].startswith("application/json")
                paths = json.loads(sent)["paths"] if form else parse_qs(sent)["paths"]
                return self.send_json([entry(folder / path, folder) for path in paths if (folder / path).exists()])
            return self.send_json({"id": about[2], "sha": commit, "siblings": []})

        def send_file(self, path: Path, commit: str) -> None:
            if not path.is_file():
                return self.send(404, {"X-Error-Code": "EntryNotFound"})
            content = path.read_bytes()
            headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                first, last = int(span[1]), min(int(span[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                return self.send(206, headers, content[first : last + 1])
            return self.send(200, headers, content)

        def send_json(self, content: Any) -> None:
            self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": digest(name.encode()), "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
