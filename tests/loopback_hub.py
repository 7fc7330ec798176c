"""A stand-in for the Hugging Face Hub on 127.0.0.1: repositories in memory, and what reading them asks of the Hub.

    with LoopbackHub() as hub:
        sha = hub.commit("datasets/org/name", {"README.md": b"...", "data/0.parquet": b"..."})
        subprocess.run(command, env={**os.environ, **hub.environment(home)})
        assert hub.count_bytes("0.parquet") < 1000

Repositories are keyed as the Hub's addresses spell them: `datasets/org/name`, `models/org/name`. `huggingface_hub` and
`datasets` take the Hub's address from the environment when they are imported, so that readers have to be processes of
their own. Every request is recorded; `fail` makes chosen requests go wrong.
"""

import dataclasses
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MAIN = "main"


@dataclasses.dataclass
class Repository:
    """Commits by their sha, each a whole tree of files; branches and tags that name commits; and who may read.

    Attributes:
        private: unknown to all but the tokens of `readers`.
        gated: everybody sees that it is there, and the tokens of `readers` may open its files.
    """

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)

    def resolve(self, revision: str) -> str:
        """Return the sha that a branch, a tag or a sha names."""
        sha = self.references.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclasses.dataclass
class Request:
    """A request that was answered: `body_bytes` of its answer were sent."""

    method: str
    path: str
    status: int | None
    body_bytes: int


@dataclasses.dataclass
class Failure:
    """What goes wrong with the next `times` requests whose path contains `path`."""

    path: str
    kind: str
    times: float


class Refusal(Exception):
    """An answer that is an error, in the form that `huggingface_hub` understands."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """The Hub; a context manager that serves while it is open.

    Attributes:
        repositories: by key.
        requests: what was asked since the last `forget_requests`.
        users: every token that is one; any other is refused.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.users: set[str] = set()
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "LoopbackHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; after a `stop`, at the same address."""
        if self._server:
            return
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Be unreachable: new connections are refused."""
        with self._lock:
            server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, home: Any) -> dict[str, str]:
        """Return the environment variables of a process that takes this for the Hub, with its caches in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def commit(self, key: str, files: Mapping[str, bytes | None], branch: str = MAIN) -> str:
        """Commit `files` (None deletes) on top of `branch`, made where it is missing; return the commit's sha."""
        repository = self.repositories.setdefault(key, Repository())
        tree = dict(repository.commits.get(repository.references.get(branch, ""), {}))
        for path, content in files.items():
            if content is None:
                del tree[path]
            else:
                tree[path] = content
        sha = hashlib.sha1(json.dumps([key, len(repository.commits), sorted(tree)]).encode()).hexdigest()
        repository.commits[sha] = tree
        repository.references[branch] = sha
        return sha

    def tag(self, key: str, name: str, revision: str = MAIN) -> None:
        """Give a revision another name."""
        repository = self.repositories[key]
        repository.references[name] = repository.resolve(revision)

    def get_file(self, key: str, path: str, revision: str = MAIN) -> bytes:
        repository = self.repositories[key]
        return repository.commits[repository.resolve(revision)][path]

    def fail(self, path: str, kind: str, times: float = float("inf")) -> None:
        """Let requests go wrong.

        Args:
            path: a part of the paths that are hit.
            kind: "500" or another status, "reset" in the middle of the body, "slow" by a third of a second, or "gone":
                instead of an answer the Hub is stopped.
            times: how many of them.
        """
        self._failures.append(Failure(path, kind, times))

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        self._failures.clear()

    def forget_requests(self) -> None:
        self.requests.clear()

    def count_requests(self, path: str) -> int:
        """Return how many requests there were for paths that contain `path`."""
        return sum(path in request.path for request in self.requests)

    def count_bytes(self, path: str) -> int:
        """Return how many bytes were sent in answer to requests for paths that contain `path`."""
        return sum(request.body_bytes for request in self.requests if path in request.path)

    def take_failure(self, path: str) -> str | None:
        """Return what has to go wrong with this request."""
        with self._lock:
            for failure in self._failures:
                if failure.path in path and failure.times > 0:
                    failure.times -= 1
                    return failure.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self._query = parse_qs(address.query)
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._failure = self.hub.take_failure(address.path)
        if self._failure == "slow":
            time.sleep(0.3)
        if self._failure == "gone":
            self.hub.stop()
            self.close_connection = True
            return
        try:
            if self._failure and self._failure.isdigit():
                raise Refusal(int(self._failure), "", "out of order")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                    return
            raise Refusal(404, "RepoNotFound", f"no such address: {address.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    do_HEAD = do_POST = do_GET

    def send_information(self, key: str, revision: str) -> None:
        repository = self._open(key)
        sha = repository.resolve(revision or MAIN)
        information = {
            "id": key.partition("/")[2],
            "sha": sha,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in repository.commits[sha]],
        }
        self._send_json(information)

    def check_access(self, key: str) -> None:
        self._open(key, is_content=True)
        self._send(200, b"", {})

    def send_tree(self, key: str, revision: str, folder: str) -> None:
        repository = self._open(key)
        tree = repository.commits[repository.resolve(revision)]
        entries = list_entries(tree, folder)
        if folder and not entries:
            raise Refusal(404, "EntryNotFound", f"no folder {folder}")
        if self._query.get("recursive", ["false"])[0].lower() != "true":
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        self._send_json(entries)

    def send_paths_information(self, key: str, revision: str) -> None:
        repository = self._open(key)
        tree = repository.commits[repository.resolve(revision)]
        try:
            wanted = json.loads(self._body)["paths"]
        except ValueError:
            wanted = parse_qs(self._body.decode())["paths"]
        self._send_json([entry for entry in list_entries(tree, "") if entry["path"] in wanted])

    def send_file(self, key: str, revision: str, path: str) -> None:
        repository = self._open(key if key.startswith("datasets/") else f"models/{key}", is_content=True)
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", f"no file {path}")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hash_blob(content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise Refusal(416, "", "nothing there")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206, content[start:end], headers)

    def _open(self, key: str, is_content: bool = False) -> Repository:
        """Return a repository that the request's token may see, and whose files it may open for `is_content`."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.private and token not in repository.readers):
            # The Hub doesn't tell strangers which of the two it is.
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise Refusal(status, "RepoNotFound", message)
        if is_content and repository.gated and token not in repository.readers:
            raise Refusal(403 if token else 401, "GatedRepo", f"Access to {key} is restricted.")
        return repository

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, status, 0 if self.command == "HEAD" else len(body))
        if self._failure == "reset":
            body = body[: len(body) // 2]
            request = dataclasses.replace(request, status=None, body_bytes=min(request.body_bytes, len(body)))
        self.hub.requests.append(request)  # before the client can look
        if self.command != "HEAD":
            self.wfile.write(body)
        if self._failure == "reset":
            self.wfile.flush()
            # Closing a socket that lingers for no time resets the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True


_API = r"/api/(?P<key>(?:datasets|models)/[^/]+/[^/]+)"
ROUTES = [
    ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", _Handler.send_information),
    ("GET", _API + r"/auth-check", _Handler.check_access),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", _Handler.send_tree),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.send_paths_information),
    ("GET", r"/(?P<key>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.send_file),
]


def list_entries(tree: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """Return the files and folders anywhere below `folder`, as the Hub's tree listing describes them."""
    entries = {}
    for path, content in sorted(tree.items()):
        parts = path.split("/")
        for parent in ("/".join(parts[:i]) for i in range(1, len(parts))):
            entries[parent] = {"type": "directory", "path": parent, "oid": hash_blob(parent.encode()), "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": hash_blob(content), "size": len(content)}
    return [entry for path, entry in entries.items() if not folder or path.startswith(folder + "/")]


@functools.cache
def hash_blob(content: bytes) -> str:
    """Return the name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
