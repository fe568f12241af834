"""A local stand-in for the model hub, and the command line run with it."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

from fluxjax.cli.main import main as cli

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`root`: the one repository's files. `status`, `code`: an error for every request. `cut`: how many bytes of the first
    answer for a large file are sent before the connection ends. `silent`: requests are never answered if their path holds it.
    `headers`: in place of those of a file's answer. `commit`, `files`: what the repository says that its version is, and
    further paths that it claims to hold. `spoil`: files that are sent with a changed byte."""

    root: Path
    status: int = 200
    code: str | None = None
    cut: int | None = None
    silent: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    commit: str = COMMIT
    files: tuple[str, ...] = ()
    spoil: tuple[str, ...] = ()
    ranges: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    url: str = ""


def checksum(content: bytes) -> str:
    """Return the hub's name of a content: SHA-256 of a large file, git's SHA-1 of a small one."""
    if len(content) > 1_000_000:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer as the hub does, on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.silent is not None and hub.silent in path:
                time.sleep(30)
                self.close_connection = True
            elif hub.status != 200:
                self.reply(hub.status, {"X-Error-Code": hub.code} if hub.code else {}, b"", body)
            elif path.startswith("/api/models/owner/model/tree"):
                self.reply(200, {}, json.dumps(self.tree()).encode(), body)
            elif path.startswith("/api/models/owner/model"):
                siblings = [
                    {"rfilename": name}
                    for name in (*hub.files, *(entry["path"] for entry in self.tree()))
                ]
                info = {
                    "id": "owner/model",
                    "modelId": "owner/model",
                    "sha": hub.commit,
                    "siblings": siblings,
                    "private": False,
                }
                self.reply(200, {}, json.dumps(info).encode(), body)
            elif path.startswith("/owner/model/resolve/"):
                self.file(path.split("/", 5)[5], body)
            else:
                self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"", body)

        def tree(self) -> list[dict]:
            files = sorted(path for path in hub.root.rglob("*") if path.is_file())
            return [
                {
                    "type": "file",
                    "path": str(path.relative_to(hub.root)),
                    "size": path.stat().st_size,
                    "oid": checksum(path.read_bytes()),
                }
                for path in files
            ]

        def file(self, name: str, body: bool) -> None:
            path = hub.root / name
            content = path.read_bytes() if path.is_file() else b"evil"
            headers = {
                "ETag": f'"{checksum(content)}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            } | hub.headers
            if body and name in hub.spoil:
                content = content[:-1] + bytes([content[-1] ^ 1])
            status = 200
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                hub.ranges.append(wanted)
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content, status = content[start:], 206
            if body:
                hub.served.append(name)
            cut = hub.cut if body and len(content) > 1_000_000 else None
            if cut is not None:
                hub.cut = None
            self.reply(status, headers, content, body, cut)

        def reply(
            self, status: int, headers: dict, content: bytes, body: bool, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def run_process(url: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, with this hub and an empty login."""
    command = [sys.executable, "-m", "fluxjax.cli", *arguments]
    return subprocess.run(
        command, env=_environment(url, cache), capture_output=True, text=True, timeout=120
    )


def run(
    url: str, cache: Path, *arguments: str, wait: float = 5
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, as `run_process` does in seconds less. The hub's client reads the environment when
    it is imported, so its constants are read again, and the pauses between its retries are left out.

    **Arguments:** `wait`: seconds for an answer.
    """
    output, errors, code = StringIO(), StringIO(), 0
    clock = mock.Mock(wraps=time, sleep=lambda _: None)
    with redirect_stdout(output), redirect_stderr(errors), mock.patch.object(_http, "time", clock):
        try:
            with mock.patch.dict(os.environ, _environment(url, cache), clear=True):
                importlib.reload(constants)
                constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = wait
                cli.main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            importlib.reload(constants)
            close_session()
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def _environment(url: str, cache: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    return kept | hub
