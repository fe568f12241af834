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
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

from fluxjax.cli.main import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1_000_000  # bytes; the hub names larger files after another checksum


@dataclass
class Hub:
    """A hub with one repository, owner/model, and how it misbehaves.

    `root`: the folder with the repository's files. `status`, `code`: an error for every request.
    `cut`: how many bytes of the first answer for a large file are sent before the connection is
    closed. `silent`: requests whose path contains it are never answered. `headers`: replace those
    of the answer for a file. `commit`: the version that the repository reports. `files`: paths that
    it lists besides its own. `corrupt`: files that are sent with a changed byte.

    Recorded: `ranges`: the ranges of bytes that clients requested. `served`: the files sent.
    """

    root: Path
    status: int = 200
    code: str | None = None
    cut: int | None = None
    silent: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    commit: str = COMMIT
    files: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    ranges: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    url: str = ""

    def paths(self) -> list[str]:
        """Return the paths of the repository's own files."""
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return [str(path.relative_to(self.root)) for path in files]


def checksum(content: bytes) -> str:
    """Return the hub's checksum of a file: SHA-256 of a large one, git's SHA-1 of a small one."""
    if len(content) > LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Answers as the hub does. `hub` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        if hub.silent is not None and hub.silent in path:
            time.sleep(30)
            self.close_connection = True
        elif hub.status != 200:
            self.reply(hub.status, {"X-Error-Code": hub.code} if hub.code else {}, b"", body)
        elif path.startswith("/api/models/owner/model"):
            self.reply(200, {}, json.dumps(self.model_info()).encode(), body)
        elif path.startswith("/owner/model/resolve/"):
            self.file(path.split("/", 5)[5], body)
        else:
            self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"", body)

    def model_info(self) -> dict[str, object]:
        names = [*self.hub.files, *self.hub.paths()]
        return {
            "id": "owner/model",
            "modelId": "owner/model",
            "sha": self.hub.commit,
            "siblings": [{"rfilename": name} for name in names],
            "private": False,
        }

    def file(self, name: str, body: bool) -> None:
        hub = self.hub
        path = hub.root / name
        content = path.read_bytes() if path.is_file() else b"evil"
        headers = {
            "ETag": f'"{checksum(content)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            **hub.headers,
        }
        if body and name in hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").split("-")[0])
            hub.ranges.append(requested)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        if body:
            hub.served.append(name)
        cut = None
        if body and len(content) > LARGE:
            cut, hub.cut = hub.cut, None
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


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer as the hub does, on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def run_process(url: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, with this hub and without a login."""
    command = [sys.executable, "-m", "fluxjax", *arguments]
    return subprocess.run(
        command, env=_environment(url, cache), capture_output=True, text=True, timeout=120
    )


def run(
    url: str, cache: Path, *arguments: str, timeout: float = 5
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: the same as `run_process`, but seconds faster.

    The hub's client reads the environment when it is imported, so its constants are read again. The
    pauses between its retries are skipped.

    **Arguments:** `timeout`: seconds that the client waits for an answer.
    """
    code = 0
    clock = mock.Mock(wraps=time, sleep=lambda _: None)
    with ExitStack() as stack:
        output = stack.enter_context(TemporaryFile("w+"))
        errors = stack.enter_context(TemporaryFile("w+"))
        stack.enter_context(redirect_stdout(output))
        stack.enter_context(redirect_stderr(errors))
        stack.enter_context(mock.patch.object(_http, "time", clock))
        try:
            with mock.patch.dict(os.environ, _environment(url, cache), clear=True):
                importlib.reload(constants)
                constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = timeout
                main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            importlib.reload(constants)
            close_session()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())


def _environment(url: str, cache: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hub = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    return kept | hub
