"""Object storage on this machine for tests: emulators on loopback that can refuse writes."""

import contextlib
import dataclasses
import functools
import json
import os
import socket
from http import server as http
from threading import Thread

import pytest

BUCKET = "runs"


@dataclasses.dataclass
class Store:
    """An emulator: its scheme, what processes that use it have in their environment."""

    scheme: str
    environment: dict[str, str]
    refuses: bool = False  # writes; may be changed at any time

    @property
    def root(self) -> str:
        return f"{self.scheme}://{BUCKET}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def gs():
    """The emulator of gcp-storage-emulator, with a thread for each connection."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    class Handler(emulator.RequestHandler):
        def parse_request(self):
            sound = super().parse_request()
            if sound and store.refuses and self.command != "GET":
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = {"error": {"code": 403, "message": "the bucket refuses writes"}}
                content = json.dumps(body).encode()
                self.send_response(403, "Forbidden")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return False
            return sound

    class Server(http.ThreadingHTTPServer):
        def handle_error(self, *_):  # clients that were killed
            pass

    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    server = Server(("127.0.0.1", 0), functools.partial(Handler, storage))
    url = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_CLOUD_PROJECT": "tests",
        "GCE_METADATA_ROOT": "127.0.0.1:1",  # no such server: nobody asks for credentials
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the emulator lacks
    }
    store = Store("gs", environment)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3():
    """The emulator of moto."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    app = server._server.app

    def refusing(environ, start_response):
        if store.refuses and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [body]
        return app(environ, start_response)

    server._server.app = refusing
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    store = Store("s3", environment)
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                          aws_access_key_id="tests", aws_secret_access_key="tests")  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    try:
        yield store
    finally:
        server.stop()


STORES = {"gs": gs, "s3": s3}


@contextlib.contextmanager
def running(scheme: str, cache: str):
    """A store that this process and those that it starts use; local copies go to `cache`."""
    with STORES[scheme]() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in {**store.environment, "KDGQA_CACHE": os.fspath(cache)}.items():
            patch.setenv(name, value)
        _forget_file_systems(scheme)
        yield store


def _forget_file_systems(scheme: str) -> None:
    """They are kept by the process, with the address of the emulator that they were made for."""
    import fsspec
    from etils.epath import backend

    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
