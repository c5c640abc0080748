"""Azure Blob Storage on loopback, for the tests: what reading takes of it, requests' signatures checked.

https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api; what Azurite, Microsoft's own emulator,
answers to the same requests.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

ACCOUNT, KEY = "sdbatchtest", base64.b64encode(b"a key of the tests").decode()
#: What a signature is over, in this order; the date comes in a header of Azure's own.
_SIGNED = (
    *("Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type", "Date"),
    *("If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range"),
)

#: Container → name → bytes.
Blobs = dict[str, dict[str, bytes]]


@contextmanager
def serving(blobs: Blobs, signature: str = "") -> Iterator[str]:
    """Yields the connection string that leads to it, with the account's key or else a shared access ``signature``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(blobs, dict(parse_qsl(signature.removeprefix("?")))))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        at = f"http://127.0.0.1:{server.server_address[1]}/{ACCOUNT}"
        secret = f"SharedAccessSignature={signature}" if signature else f"AccountKey={KEY}"
        yield f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};{secret};BlobEndpoint={at};"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def handler(blobs: Blobs, signature: dict[str, str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = urlsplit(self.path)
            asked = dict(parse_qsl(parts.query, keep_blank_values=True))
            account, _, rest = unquote(parts.path).lstrip("/").partition("/")
            container, _, name = rest.partition("/")
            if not self.signed(parts.path, asked) or account != ACCOUNT:
                return self.refuse(403, "AuthenticationFailed")
            if "action" in asked:  # of a hierarchical namespace, which there is none
                return self.refuse(400, "InvalidUri")
            if container not in blobs:
                return self.refuse(404, "ContainerNotFound")
            if asked.get("comp") == "list":
                return self.send(200, {"Content-Type": "application/xml"}, listing(container, blobs[container], asked))
            if name not in blobs[container]:
                return self.refuse(404, "BlobNotFound")
            return self.send_blob(blobs[container][name])

        def send_blob(self, data: bytes) -> None:
            headers = {
                "Content-Type": "application/octet-stream",
                "ETag": etag(data),
                "Last-Modified": formatdate(0, usegmt=True),
                "x-ms-creation-time": formatdate(0, usegmt=True),
                "x-ms-blob-type": "BlockBlob",
                "x-ms-server-encrypted": "true",
                "Accept-Ranges": "bytes",
            }
            asked = self.headers.get("x-ms-range") or self.headers.get("Range") or ""
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
                first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return self.send(206, headers, data[first : last + 1])
            return self.send(200, headers, data)

        def signed(self, path: str, asked: dict[str, str]) -> bool:
            if signature:
                return signature.items() <= asked.items()
            lines = [self.command, *(self.headers.get(name, "") for name in _SIGNED)]
            ours = sorted(
                (name.lower(), value) for name, value in self.headers.items() if name.lower().startswith("x-ms-")
            )
            lines += [f"{name}:{value}" for name, value in ours]
            lines += [f"/{ACCOUNT}{path}", *(f"{name.lower()}:{value}" for name, value in sorted(asked.items()))]
            mac = hmac.digest(base64.b64decode(KEY), "\n".join(lines).encode(), hashlib.sha256)
            return self.headers.get("Authorization") == f"SharedKey {ACCOUNT}:{base64.b64encode(mac).decode()}"

        def refuse(self, status: int, code: str) -> None:
            text = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
            if self.command == "HEAD":
                return self.send(status, {"x-ms-error-code": code}, b"")
            return self.send(status, {"Content-Type": "application/xml", "x-ms-error-code": code}, text.encode())

        def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            told = {"x-ms-version": "2024-11-04", "x-ms-request-id": "0", "Content-Length": str(len(content))}
            for name, value in {**told, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def listing(container: str, blobs: dict[str, bytes], asked: dict[str, str]) -> bytes:
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
    folders, found = set(), ""
    for name, data in sorted(blobs.items()):
        if not name.startswith(prefix):
            continue
        first, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if cut:
            folders.add(prefix + first + cut)
            continue
        found += (
            f"<Blob><Name>{escape(name)}</Name><Properties><Creation-Time>{formatdate(0, usegmt=True)}</Creation-Time>"
            f"<Last-Modified>{formatdate(0, usegmt=True)}</Last-Modified><Etag>{escape(etag(data))}</Etag>"
            f"<Content-Length>{len(data)}</Content-Length><Content-Type>application/octet-stream</Content-Type>"
            "<BlobType>BlockBlob</BlobType><ServerEncrypted>true</ServerEncrypted></Properties></Blob>"
        )
    found += "".join(f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>" for folder in sorted(folders))
    return (
        f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="/" ContainerName="{container}">'
        f"<Prefix>{escape(prefix)}</Prefix><Delimiter>{delimiter}</Delimiter><Blobs>{found}</Blobs><NextMarker />"
        "</EnumerationResults>"
    ).encode()


def etag(data: bytes) -> str:
    return f'"0x{hashlib.sha256(data).hexdigest()[:15].upper()}"'
