"""A proxy on loopback between an S3 client and its server that does what networks do, by a seed.

    with FaultProxy.start("http://127.0.0.1:9000", seed=7) as proxy:
        proxy.set({"503 SlowDown": 0.1, "reset after": 0.05})  # shares of the requests
        proxy.outage(10)

Each request meets one fault at most. Faults are an HTTP status with an S3 error code ("503 SlowDown", "500
InternalError", "400 ExpiredToken"…), answered without the server knowing, and three resets:

    reset before    the connection breaks at the request's headers; the server learns nothing
    reset amid      it breaks when half of the request's body has passed; without a body, anywhere in the answer
    reset after     the server has done what was asked, and its answer is lost: no acknowledgement

A request passes as it is, Host header included, so that its signature stays valid. The proxy is a process of its own:
``python tests/fault_proxy.py UPSTREAM_PORT SEED`` prints its own port and that of its administration, where it takes
one JSON object a line. The end of its standard input or SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

RESETS = ("reset before", "reset amid", "reset after")
_MOST_HEADERS = 1 << 18


class FaultProxy:
    """The running proxy, seen from the tests."""

    def __init__(self, process: subprocess.Popen[str], port: int, admin_port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._process, self._admin_port = process, admin_port

    @classmethod
    def start(cls, upstream: str, seed: int) -> Self:
        """Start a proxy to the server at the endpoint ``upstream``, on loopback; it breaks nothing yet."""
        command = [sys.executable, __file__, str(urlsplit(upstream).port), str(seed)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return cls(process, *map(int, process.stdout.readline().split()))

    def set(self, faults: Mapping[str, float] | None = None, *, only: str = "", delay: float = 0.0) -> None:
        """From now on these faults, each with the share of requests it meets, and no others.

        ``only``: a regular expression that "METHOD /path?query" must hold. ``delay``: every such request waits a
        random time of up to so many seconds.
        """
        self._tell({"faults": dict(faults or {}), "only": only, "delay": delay})

    def outage(self, seconds: float, *, hang: bool = False) -> None:
        """Refuse connections and break the present ones for so long; or ``hang``: take them and say nothing.

        Returns at once.
        """
        self._tell({"outage": seconds, "hang": hang})

    def counts(self) -> Counter[str]:
        """How often each fault was done, and how many "requests" there were, since the start."""
        return self._tell({})

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _tell(self, order: dict[str, Any]) -> Counter[str]:
        with socket.create_connection(("127.0.0.1", self._admin_port), timeout=10) as connection:
            connection.sendall(json.dumps(order).encode() + b"\n")
            with connection.makefile("r") as answers:
                answer = json.loads(answers.readline())
        if "error" in answer:
            raise ValueError(answer["error"])
        return Counter(answer["counts"])


@dataclass
class _Message:
    """A request or an answer: the raw head with its empty line, and the raw body."""

    head: bytes
    body: bytes = b""
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def words(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)

    async def read_body(self, reader: asyncio.StreamReader) -> None:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            size = -1
            while size:
                line = await reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                self.body += line + await reader.readexactly(size + 2)
        elif "content-length" in self.headers:
            self.body = await reader.readexactly(int(self.headers["content-length"]))


class _Proxy:
    def __init__(self, upstream_port: int, seed: int) -> None:
        self._upstream_port = upstream_port
        self._random = random.Random(seed)
        self._faults: dict[str, float] = {}
        self._only = re.compile("")
        self._delay = 0.0
        self._counts: Counter[str] = Counter()
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._clients: set[asyncio.StreamWriter] = set()
        # Holds the port, without listening, while there is an outage.
        self._place = self._bound(0)
        self.port: int = self._place.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._ending: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, sock=self._bound(self.port), limit=_MOST_HEADERS)

    async def obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the administration."""
        async for line in reader:
            try:
                await self._do(json.loads(line))
                answer: dict[str, Any] = {"counts": self._counts}
            except (ValueError, KeyError, TypeError, re.error) as error:
                answer = {"error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _do(self, order: dict[str, Any]) -> None:
        if "faults" in order:
            for name in order["faults"]:
                if name not in RESETS and not re.fullmatch(r"[45]\d\d \w+", name):
                    raise ValueError(f"'{name}' is no fault")
            if sum(order["faults"].values()) > 1:
                raise ValueError("the shares of the faults are more than 1 together")
            self._faults, self._only, self._delay = order["faults"], re.compile(order["only"]), order["delay"]
        if "outage" in order:
            if self._ending is not None:
                await self._ending
            self._counts["outage"] += 1
            if order["hang"]:
                self._speaking.clear()
            elif self._server is not None:
                self._server.close()
                for client in list(self._clients):
                    _reset(client)
            self._ending = asyncio.create_task(self._end_outage(order["outage"]))

    async def _end_outage(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._speaking.is_set():
            await self.listen()
        self._speaking.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, request after request."""
        self._clients.add(writer)
        try:
            while await self._pass(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):  # one of the two has gone
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer. False: the connection ends."""
        request = _Message(await reader.readuntil(b"\r\n\r\n"))
        method, path, _ = request.words
        self._counts["requests"] += 1
        await self._speaking.wait()
        fault = ""
        if self._only.search(f"{method} {path}"):
            fault = self._draw()
            await asyncio.sleep(self._random.uniform(0, self._delay))
        self._counts.update([fault] if fault else [])
        if fault == "reset before":
            return _reset(writer)
        if request.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await request.read_body(reader)
        if fault and fault not in RESETS:
            answer = _refusal(fault, with_body=method != "HEAD")
        elif fault == "reset amid" and request.body:
            await self._send_half(request)
            return _reset(writer)
        else:
            answer = await self._ask(request)
        if fault == "reset after":
            return _reset(writer)
        whole = answer.head + answer.body
        if fault == "reset amid":
            writer.write(whole[: self._random.randrange(len(whole))])
            await writer.drain()
            return False
        writer.write(whole)
        await writer.drain()
        return answer.headers.get("connection", "").lower() != "close"

    def _draw(self) -> str:
        drawn = self._random.random()
        for fault, share in self._faults.items():
            drawn -= share
            if drawn < 0:
                return fault
        return ""

    async def _ask(self, request: _Message) -> _Message:
        """The server's answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=_MOST_HEADERS)
        try:
            writer.write(request.head + request.body)
            answer = _Message(await reader.readuntil(b"\r\n\r\n"))
            while answer.words[1].startswith("1"):  # 100 Continue: the client has had its own
                answer = _Message(await reader.readuntil(b"\r\n\r\n"))
            if request.words[0] != "HEAD" and answer.words[1] not in {"204", "304"}:
                await answer.read_body(reader)
            return answer
        finally:
            writer.close()

    async def _send_half(self, request: _Message) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        writer.write(request.head + request.body[: len(request.body) // 2])
        await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def _bound(self, port: int) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("127.0.0.1", port))
        return bound


def _reset(writer: asyncio.StreamWriter) -> bool:
    """End the connection without a farewell, what is unread or unsent thrown away. False: it has ended."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return False


def _refusal(fault: str, *, with_body: bool) -> _Message:
    status, code = fault.split(" ")
    body = f"<Error><Code>{code}</Code><Message>The proxy says so.</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return _Message(head.encode(), body if with_body else b"")


async def main(upstream_port: int, seed: int) -> None:
    proxy = _Proxy(upstream_port, seed)
    await proxy.listen()
    admin = await asyncio.start_server(proxy.obey, "127.0.0.1", 0)
    print(proxy.port, admin.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
