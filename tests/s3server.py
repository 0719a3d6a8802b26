"""A real S3 API server on loopback, in a process of its own, that fails on demand.

The clients that read a Census and write a corpus (TileDB's and Arrow's, both the AWS C++ SDK) speak HTTP
to it as they would to a bucket; nothing of theirs or ours is replaced. moto is the S3 behind it, in
memory; in front of it stands a WSGI layer that answers 500 or 503, keeps silent or cuts an answer short
for the requests that a `Fault` describes, and counts them, so that a test can tell that a fault was met.

The server ends with its standard input, hence with the tests however they end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import botocore.session
import requests

CONTROL = "/_fault"
REGION = "us-east-1"
SECRET = "langcell-test-secret-access-key"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "langcell-test-key-id",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",  # no other credentials are looked for on the network
}
"""What a client of the server needs in its environment."""


@dataclass(frozen=True)
class Fault:
    """What happens to requests.

    methods: of which kinds; path: a regular expression that their path holds; every: only each so many of
    these; times: only so many in all (None: without end). Then one of: status: answer with this HTTP
    status; hang: say nothing for so many seconds, then close the connection; cut: close it in the middle
    of the answer. With none of these the requests are only counted.
    """

    methods: tuple[str, ...] = ("GET", "HEAD")
    path: str = ""
    every: int = 1
    times: int | None = None
    status: int = 0
    hang: float = 0.0
    cut: bool = False


class S3Server:
    """The server as tests see it.

    url: its endpoint; address: the same without the scheme; client: botocore's, with credentials.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.url = f"http://{address}"
        self._http = requests.Session()
        self.client = botocore.session.get_session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.url,
            aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRET,
        )

    @property
    def tiledb(self) -> dict[str, str]:
        """TileDB settings that lead to it."""
        return {
            "vfs.s3.endpoint_override": self.address,
            "vfs.s3.scheme": "http",
            "vfs.s3.region": REGION,
            "vfs.s3.use_virtual_addressing": "false",
        }

    def uri(self, path: str) -> str:
        """The URI by which Arrow finds `path` (bucket/key) there."""
        return f"s3://{path}?endpoint_override={self.address}&scheme=http&region={REGION}"

    def upload(self, folder: str | Path, bucket: str, prefix: str) -> None:
        """Every file of a local folder as an object below `prefix`."""
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                self.put(bucket, f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, bucket: str, key: str) -> bytes:
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Keys of the objects of a bucket, in order."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[Callable[[], int]]:
        """The fault holds inside the block; gives a function that tells how many requests it has hit."""

        def hits() -> int:
            return int(self._http.get(self.url + CONTROL).json()["hits"])

        self._http.put(self.url + CONTROL, json=asdict(fault)).raise_for_status()
        try:
            yield hits
        finally:
            self._http.delete(self.url + CONTROL).raise_for_status()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server without a bucket, for the length of the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # -P: the folders of the tests are no packages for moto (`docker` would be one).
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the S3 server ended before it began, with code {process.wait()}")
        yield S3Server(address)
    finally:
        process.kill()
        process.communicate()


class Faulty:
    """WSGI application that does to another one's requests what the fault in force says."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._set(None)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == CONTROL:
            return self._control(environ, start_response)
        fault = self._hit(environ)
        if fault is None:
            return self._inner(environ, start_response)
        if fault.hang:
            time.sleep(fault.hang)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if fault.status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the next request
            start_response(f"{fault.status} Injected", [("Content-Length", "0")])
            return []
        body = self._inner(environ, start_response)
        return _cut(b"".join(body), environ["werkzeug.socket"]) if fault.cut else body

    def _set(self, fault: Fault | None) -> None:
        self._fault, self._seen, self._hits = fault, 0, 0

    def _hit(self, environ: dict[str, Any]) -> Fault | None:
        """The fault if it is this request's turn."""
        with self._lock:
            fault = self._fault
            if fault is None or environ["REQUEST_METHOD"] not in fault.methods:
                return None
            if not re.search(fault.path, environ["PATH_INFO"]):
                return None
            self._seen += 1
            if self._seen % fault.every or (fault.times is not None and self._hits >= fault.times):
                return None
            self._hits += 1
            return fault

    def _control(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """PUT sets the fault, DELETE lifts it, GET tells how many requests it has hit."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        with self._lock:
            if environ["REQUEST_METHOD"] == "PUT":
                self._set(Fault(**json.loads(environ["wsgi.input"].read(length))))
            elif environ["REQUEST_METHOD"] == "DELETE":
                self._set(None)
            answer = json.dumps({"hits": self._hits}).encode()
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]


def _cut(body: bytes, connection: socket.socket) -> Iterator[bytes]:
    """The first half of an answer, after which the connection closes."""
    yield body[: len(body) // 2]
    connection.shutdown(socket.SHUT_RDWR)


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as S3 keeps them

        def log(self, *_: object) -> None:
            pass

    application = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(f"127.0.0.1:{server.port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
