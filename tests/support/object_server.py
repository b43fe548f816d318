"""An S3-compatible server on loopback, with objects in memory and faults at will.

moto's, behind a layer that spoils answers: `faults` holds, for the ends of paths, what happens to
the next requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "clients"
#: A region that moto makes buckets in without being told again.
REGION = "eu-west-1"
SECRET = "planted-s3cret-key"


class ObjectServer:
    """Attributes
    ----------
    address : str
    asked : Counter
        (method, path, whether a range was asked for), of every request.
    faults : dict of str to list of str
        By the end of a path: "500", "403", "cut", "short", "long", "html", "slow"; for GET only.
    """

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str, bool]] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.slow = 1.0  # seconds
        self._moto = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel("ERROR")
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the server has to have in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.address, "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
        }  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked[method, path, "HTTP_RANGE" in environ] += 1
        fault = ""
        for end, left in self.faults.items():
            if method == "GET" and path.endswith(end) and left:
                fault = left.pop(0)
        if fault.isdecimal():
            page = f"<html>{path}?X-Amz-Signature={SECRET}</html>".encode()
            start(f"{fault} Fault", [("Content-Length", str(len(page)))])
            return [page]
        if fault == "slow":
            time.sleep(self.slow)
        told: list[Any] = []
        body = b"".join(self._moto(environ, lambda *answer: told.extend(answer)))
        headers = {k: v for k, v in told[1] if not (fault and k.startswith("x-amz-checksum"))}
        if fault in ("cut", "short"):
            body = body[: len(body) // 2]
        elif fault in ("long", "html"):
            body = body + b"x" if fault == "long" else b"<html>log in</html>"
        if fault in ("short", "long", "html"):
            headers["Content-Length"] = str(len(body))
        start(told[0], list(headers.items()))
        return [body]


def upload(folders: Sequence[Path], prefix: str = "") -> list[str]:
    """Put folders into the bucket; their URLs."""
    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    if not store.exists(BUCKET):
        store.mkdir(BUCKET, region_name=REGION)
    for folder in folders:
        for path in folder.iterdir():
            store.pipe_file(f"{BUCKET}/{prefix}{folder.name}/{path.name}", path.read_bytes())
    return [f"s3://{BUCKET}/{prefix}{folder.name}" for folder in folders]


@contextmanager
def serving() -> Iterator[ObjectServer]:
    server = ObjectServer()
    try:
        yield server
    finally:
        server.close()
