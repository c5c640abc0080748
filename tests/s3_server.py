"""An S3 server on loopback for the tests: ``python tests/s3_server.py PORT``; SIGTERM ends it.

moto's server with signatures checked, and with a lock round writes: without one, two conditional puts of the
same key can both succeed now and then. It is an emulator and keeps nothing.
"""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto import settings
from moto.iam import iam_backends
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

ACCESS_KEY, SECRET_KEY = "sdbatch-test-key", "sdbatch-test-secret"
_writing = threading.RLock()


@contextmanager
def serving() -> Iterator[dict[str, str]]:
    """The server in a process of its own; yields the AWS variables that lead to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, str(port)])
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.terminate()
        process.wait(10)


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def locked(response: Any, *args: Any, **kwargs: Any) -> Any:
        _ = response.body  # a slow sender must not hold the lock
        with _writing:
            return method(response, *args, **kwargs)

    return locked


def main(port: int) -> None:
    for name in ("put_object", "_key_response_post"):
        setattr(S3Response, name, _one_at_a_time(getattr(S3Response, name)))
    iam = iam_backends["123456789012"]["aws"]
    iam.create_user("us-east-1", "tester")
    everything = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}'
    iam.put_user_policy("tester", "everything", everything)
    key = iam.create_access_key("tester")
    iam.access_keys.pop(key.access_key_id)
    key.access_key_id, key.secret_access_key = ACCESS_KEY, SECRET_KEY
    iam.access_keys[ACCESS_KEY] = key
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]))
