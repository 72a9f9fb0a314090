"""A real S3 server on loopback, which can be told to fail a share of its requests."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What a client must find in its environment."""


class ObjectStore:
    """Listens until closed; it has one bucket. A failing request ends in 500 or 503 with nothing
    done, or, as often, in a connection that is dropped after all was done."""

    def __init__(self) -> None:
        self.share = 0.0
        """Of requests that fail."""
        self.requests = self.failed = 0
        self._random = random.Random(0)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self._app, threaded=True)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._address = f"127.0.0.1:{self._http.server_port}"
        os.environ.update(CREDENTIALS)
        fs.S3FileSystem(
            endpoint_override=self._address, scheme="http", allow_bucket_creation=True
        ).create_dir("bucket")

    def uri(self, folder: str) -> str:
        """A URI that PyArrow opens."""
        return f"s3://bucket/{folder}?scheme=http&endpoint_override={self._address}"

    def close(self) -> None:
        self._http.shutdown()

    def _app(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.requests += 1
        if self._random.random() >= self.share:
            return self._moto(environ, start_response)
        self.failed += 1
        if self._random.random() < 0.5:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status = self._random.choice([500, 503])
            return Response("<Error><Code>SlowDown</Code></Error>", status)(environ, start_response)
        list(self._moto(environ, lambda *_: lambda _: None))
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionError("hung up")
