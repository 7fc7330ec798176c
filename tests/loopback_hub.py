"""A fake Hugging Face Hub on 127.0.0.1, with repositories in memory that clients can read, create and write to.

    with LoopbackHub() as hub:
        sha = hub.commit("datasets/org/name", {"README.md": b"...", "data/0.parquet": b"..."})
        subprocess.run(command, env={**os.environ, **hub.environment(home)})
        assert hub.count_bytes("0.parquet") < 1000

Repositories are keyed as in the Hub's URLs: `datasets/org/name`, `models/org/name`. `huggingface_hub` and `datasets`
read the endpoint from the environment at import, so clients must run in separate processes. Writing needs the token of
one of `users`, and is allowed in the user's own namespace and in those of the user's organisations. Large files follow
the git LFS protocol: a batch request, an upload to a URL per object, a verification, and the SHA-256 in the commit.
Every request is recorded; `fail` injects failures.
"""

import base64
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

import yaml

MAIN = "main"
KINDS = "datasets|models|spaces"
LARGE_FILE_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclasses.dataclass(frozen=True)
class User:
    """The owner of a token; the role `read` writes nowhere."""

    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"


@dataclasses.dataclass
class Repository:
    """Commits by sha (each a whole tree of files), the branches and tags that point to them, and the access rules.

    Attributes:
        private: visible only to the tokens of `readers`.
        gated: visible to everybody, but only the tokens of `readers` may download files.
        tags: the references that are not branches.
        objects: large files by SHA-256, committed or not.
    """

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: set[str] = dataclasses.field(default_factory=set)
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)

    def resolve(self, revision: str) -> str:
        """Return the sha of a branch, a tag or a sha."""
        sha = self.references.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclasses.dataclass
class Request:
    """An answered request; `body_bytes` is the number of bytes sent in the body of the answer."""

    method: str
    path: str
    status: int | None
    body_bytes: int


@dataclasses.dataclass
class Failure:
    """A failure of the next `times` requests whose path contains `path`."""

    path: str
    kind: str
    times: float


class Refusal(Exception):
    """An error response in the form that `huggingface_hub` understands."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """The fake Hub; a context manager that serves while it is open.

    Attributes:
        repositories: by key.
        requests: the requests since the last `forget_requests`.
        users: by token; any other token is rejected.
        n_held: the number of requests held so far.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.users: dict[str, User] = {}
        self.n_held = 0
        self._failures: list[Failure] = []
        self._is_healed = threading.Event()
        self._lock = threading.Lock()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "LoopbackHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start serving; after a `stop`, at the same address."""
        if self._server:
            return
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop serving; new connections are refused."""
        self._is_healed.set()
        with self._lock:
            server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, home: Any) -> dict[str, str]:
        """Return the environment of a process that uses this server as the Hub, with its caches in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def commit(self, key: str, files: Mapping[str, bytes | None], branch: str = MAIN, sha: str | None = None) -> str:
        """Commit `files` (None deletes) on top of `branch`, created if missing; return the commit's sha."""
        repository = self.repositories.setdefault(key, Repository())
        tree = dict(repository.commits.get(repository.references.get(branch, ""), {}))
        for path, content in files.items():
            if content is None:
                del tree[path]
            else:
                tree[path] = content
        sha = sha or hashlib.sha1(json.dumps([key, len(repository.commits), sorted(tree)]).encode()).hexdigest()
        repository.commits[sha] = tree
        repository.references[branch] = sha
        return sha

    def tag(self, key: str, name: str, revision: str = MAIN) -> None:
        """Tag a revision."""
        repository = self.repositories[key]
        repository.references[name] = repository.resolve(revision)
        repository.tags.add(name)

    def get_file(self, key: str, path: str, revision: str = MAIN) -> bytes:
        repository = self.repositories[key]
        return repository.commits[repository.resolve(revision)][path]

    def fail(self, path: str, kind: str, times: float = float("inf")) -> None:
        """Make requests fail.

        Args:
            path: a substring of the paths that fail.
            kind: "500" or another status; "reset", in the middle of the body (for an upload, of the request's);
                "slow", by a third of a second; "held", until `heal`; or "gone", which stops the Hub before it answers.
            times: how many requests fail.
        """
        self._is_healed.clear()
        self._failures.append(Failure(path, kind, times))

    def heal(self) -> None:
        """Stop all failures, and release the held requests."""
        self._failures.clear()
        self._is_healed.set()

    def hold(self) -> None:
        """Block a request until `heal`."""
        self.n_held += 1
        self._is_healed.wait()

    def forget_requests(self) -> None:
        self.requests.clear()

    def count_requests(self, path: str, method: str = "") -> int:
        """Return the number of requests whose path contains `path`."""
        return sum(path in request.path and method in request.method for request in self.requests)

    def count_bytes(self, path: str) -> int:
        """Return the number of body bytes sent for requests whose path contains `path`."""
        return sum(request.body_bytes for request in self.requests if path in request.path)

    def take_failure(self, path: str) -> str | None:
        """Return the kind of failure for this request, and count it; None if it succeeds."""
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
        self._failure = self.hub.take_failure(address.path)
        if self._failure == "reset" and self.command == "PUT":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.hub.requests.append(Request(self.command, unquote(address.path), None, 0))
            self._reset()
            return
        self._body = self._read_body()
        if self._failure == "slow":
            time.sleep(0.3)
        if self._failure == "held":
            self.hub.hold()
        if self._failure == "gone":
            self.hub.stop()
            self.close_connection = True
            return
        try:
            if self._failure and self._failure.isdigit():
                raise Refusal(int(self._failure), "", "injected failure")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                    return
            raise Refusal(404, "RepoNotFound", f"no such address: {address.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send_user(self) -> None:
        user = self._identify()
        self._send_json(
            {
                "name": user.name,
                "type": "user",
                "orgs": [{"name": name} for name in user.organisations],
                "auth": {"accessToken": {"role": user.role}},
            }
        )

    def create_repository(self) -> None:
        order = json.loads(self._body)
        user = self._identify()
        namespace = order.get("organization") or user.name
        key = f"{order.get('type') or 'model'}s/{namespace}/{order['name']}"
        self._check_may_write(key)
        if key in self.hub.repositories:
            raise Refusal(409, "", "You already created this repo")
        self.hub.repositories[key] = Repository(private=order.get("visibility") == "private")
        self.hub.commit(key, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send_json({"url": f"{self.hub.url}/{namespace}/{order['name']}", "name": f"{namespace}/{order['name']}"})

    def change_settings(self, key: str) -> None:
        repository = self._open(key, is_written=True)
        order = json.loads(self._body)
        repository.private = order.get("visibility", "private" if order.get("private") else "public") == "private"
        self._send_json({})

    def validate_card(self) -> None:
        content = json.loads(self._body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
            assert isinstance(metadata, dict), "the metadata is not a mapping"
            for entry in metadata.get("model-index", []):
                assert isinstance(entry["name"], str), "a model without a name"
                for result in entry["results"]:
                    assert result["task"]["type"] and result["dataset"]["type"], "a result without a task or dataset"
                    assert all(metric["type"] for metric in result["metrics"]), "a metric without a type"
        except (yaml.YAMLError, AssertionError, LookupError, TypeError) as error:
            self._send(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode(), {})
        else:
            self._send_json({"errors": [], "warnings": []})

    def send_upload_modes(self, key: str, revision: str) -> None:
        repository = self._open(key, is_written=True)
        tree = repository.commits[repository.resolve(revision)]
        files = []
        for file in json.loads(self._body)["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path) else "regular"
            known = {"oid": name_content(path, tree[path])} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._send_json({"files": files})

    def send_upload_addresses(self, key: str) -> None:
        key = add_kind(key)
        repository = self._open(key, is_written=True)
        objects = []
        for entry in json.loads(self._body)["objects"]:
            address = f"{self.hub.url}/lfs/{key}/{entry['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            is_there = entry["oid"] in repository.objects
            objects.append({"oid": entry["oid"], "size": entry["size"]} | ({} if is_there else {"actions": actions}))
        self._send_json({"transfer": "basic", "objects": objects})

    def take_object(self, key: str, oid: str) -> None:
        if hashlib.sha256(self._body).hexdigest() != oid:
            raise Refusal(400, "", "the content does not match its SHA-256")
        self.hub.repositories[key].objects[oid] = self._body
        self._send(200, b"", {})

    def verify_object(self, key: str, oid: str) -> None:
        repository = self._open(key, is_written=True)
        if len(repository.objects.get(oid, b"")) != json.loads(self._body)["size"]:
            raise Refusal(404, "", "no such object")
        self._send_json({})

    def take_commit(self, key: str, revision: str) -> None:
        repository = self._open(key, is_written=True)
        files: dict[str, bytes | None] = {}
        tree = repository.commits[repository.resolve(revision)]
        for operation in map(json.loads, self._body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise Refusal(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = repository.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                files[value["path"]] = None
            elif operation["key"] == "deletedFolder":
                files |= dict.fromkeys(path for path in tree if path.startswith(value["path"].rstrip("/") + "/"))
        sha = self.hub.commit(key, files, revision)
        url = f"{self.hub.url}/{key.removeprefix('models/')}/commit/{sha}"
        self._send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def create_branch(self, key: str, name: str) -> None:
        repository = self._open(key, is_written=True)
        if name in repository.references:
            raise Refusal(409, "", f"the reference {name} exists")
        start = json.loads(self._body or b"{}").get("startingPoint", MAIN)
        repository.references[name] = repository.resolve(start)
        self._send_json({})

    def create_tag(self, key: str, revision: str) -> None:
        repository = self._open(key, is_written=True)
        name = json.loads(self._body)["tag"]
        if name in repository.references:
            raise Refusal(409, "", f"the reference {name} exists")
        self.hub.tag(key, name, revision)
        self._send_json({})

    def delete_reference(self, key: str, name: str) -> None:
        repository = self._open(key, is_written=True)
        if name == MAIN or repository.references.pop(name, None) is None:
            raise Refusal(404, "RevisionNotFound", f"no such reference: {name}")
        repository.tags.discard(name)
        self._send_json({})

    def send_references(self, key: str) -> None:
        repository = self._open(key)
        kinds = {"branches": [], "tags": [], "converts": []}
        for name, sha in repository.references.items():
            kind, prefix = ("tags", "refs/tags/") if name in repository.tags else ("branches", "refs/heads/")
            kinds[kind].append({"name": name, "ref": prefix + name, "targetCommit": sha})
        self._send_json(kinds)

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

    def check_access(self, key: str, write: str) -> None:
        self._open(key, is_content=True, is_written=bool(write))
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
        repository = self._open(add_kind(key), is_content=True)
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", f"no file {path}")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{name_content(path, content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise Refusal(416, "", "nothing there")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206, content[start:end], headers)

    def _identify(self) -> User:
        """Return the user that the request's token belongs to."""
        token = self._get_token()
        if not token:
            raise Refusal(401, "", "Invalid username or password.")
        return self.hub.users[token]

    def _get_token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return token

    def _check_may_write(self, key: str) -> None:
        user, namespace = self._identify(), key.split("/")[1]
        if namespace not in (user.name, *user.organisations) or user.role == "read":
            raise Refusal(403, "", f"You don't have the rights to write under the namespace {namespace}")

    def _open(self, key: str, is_content: bool = False, is_written: bool = False) -> Repository:
        """Return a repository that the request's token can see.

        Args:
            is_content: the request downloads files.
            is_written: the request changes something.
        """
        token = self._get_token()
        repository = self.hub.repositories.get(key)
        if repository is not None and repository.private and token not in repository.readers:
            user = self.hub.users[token] if token else None
            if not isinstance(user, User) or key.split("/")[1] not in (user.name, *user.organisations):
                repository = None  # the Hub hides private repositories from strangers
        if repository is None:
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise Refusal(status, "RepoNotFound", message)
        if is_content and repository.gated and token not in repository.readers:
            raise Refusal(403 if token else 401, "GatedRepo", f"Access to {key} is restricted.")
        if is_written:
            self._check_may_write(key)
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
        self.hub.requests.append(request)  # before the client gets the answer and reads the record
        if self.command != "HEAD":
            self.wfile.write(body)
        if self._failure == "reset":
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        # Closing a socket with a linger time of zero resets the connection.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True


_API = rf"/api/(?P<key>(?:{KINDS})/[^/]+/[^/]+)"
_OBJECT = rf"/lfs/(?P<key>(?:{KINDS})/[^/]+/[^/]+)/(?P<oid>[0-9a-f]{{64}})"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.send_user),
    ("POST", r"/api/repos/create", _Handler.create_repository),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("PUT", _API + r"/settings", _Handler.change_settings),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.send_upload_modes),
    ("POST", r"/(?P<key>(?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.send_upload_addresses),
    ("PUT", _OBJECT, _Handler.take_object),
    ("POST", _OBJECT + r"/verify", _Handler.verify_object),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.take_commit),
    ("POST", _API + r"/branch/(?P<name>[^/]+)", _Handler.create_branch),
    ("POST", _API + r"/tag/(?P<revision>[^/]+)", _Handler.create_tag),
    ("DELETE", _API + r"/(?:tag|branch)/(?P<name>[^/]+)", _Handler.delete_reference),
    ("GET", _API + r"/refs", _Handler.send_references),
    ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", _Handler.send_information),
    ("GET", _API + r"/auth-check(?P<write>/write)?", _Handler.check_access),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", _Handler.send_tree),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.send_paths_information),
    ("GET", r"/(?P<key>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.send_file),
]


def list_entries(tree: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """Return all files and folders below `folder`, as in the Hub's tree listing."""
    entries = {}
    for path, content in sorted(tree.items()):
        parts = path.split("/")
        for parent in ("/".join(parts[:i]) for i in range(1, len(parts))):
            entries[parent] = {"type": "directory", "path": parent, "oid": hash_blob(parent.encode()), "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": hash_blob(content), "size": len(content)}
        if is_large(path):
            entries[path]["lfs"] = {"oid": name_content(path, content), "size": len(content), "pointerSize": 134}
    return [entry for path, entry in entries.items() if not folder or path.startswith(folder + "/")]


@functools.cache
def hash_blob(content: bytes) -> str:
    """Return git's hash of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    """Return whether a file is stored in LFS."""
    return path.endswith(LARGE_FILE_SUFFIXES)


@functools.cache
def name_content(path: str, content: bytes) -> str:
    """Return the identifier of a file's content: the SHA-256 of a large file, else git's hash."""
    return hashlib.sha256(content).hexdigest() if is_large(path) else hash_blob(content)


def add_kind(key: str) -> str:
    """Return a repository's key from its web address, where models have no prefix."""
    return key if key.startswith(("datasets/", "spaces/")) else f"models/{key}"
