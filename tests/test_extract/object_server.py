"""An S3 server in this process, and nothing of the machine's own settings for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


@contextmanager
def serve_objects(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve S3 here, let every client of this process and of its children find it, and yield a bucket's URL."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    import logging

    # a line per request
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nowhere",
            "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        }.items():
            patch.setenv(name, value)
        forget_services()
        # what an earlier server of this process held is still there
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    finally:
        server.stop()
        forget_services()


def forget_services() -> None:
    """Let the next use of a URL ask the environment again."""
    import fsspec

    from extract.store.core.remote_path import _service

    _service.cache_clear()
    for scheme in {"s3", "memory"} & {*fsspec.registry}:
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
