"""A Hub in memory: enough of the wire protocol for the real client to push and load models, and to fail on demand.

Start it, and point clients at it with the environment of :meth:`HubServer.environment`, which must be set before
huggingface_hub is imported. Other processes steer it through ``POST /_control`` (see :func:`control`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from paths import environment

TOKEN = "hf_test"  # the only one that may write, and read what is private
REPO = r"(?P<repo>[^/]+/[^/]+?)"


@dataclass
class File:
    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branch or refs/pr/N -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit -> path -> file

    def commit(self, ref: str, files: dict[str, File]) -> str:
        parent = self.refs.get(ref, "")
        tree = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([parent, len(self.commits), tree]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha


@dataclass
class Failure:
    """The requests "METHOD /path" that match ``pattern`` fail ``times`` times, once ``skip`` of them went well."""

    pattern: str
    times: int
    skip: int = 0
    status: int | None = None  # None: the connection is dropped in the middle of the body


class HubServer(ThreadingHTTPServer):
    """``repos``, and ``requests``: what was asked for, as (method, path, bytes of the body that arrived)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files, by sha256
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[Failure] = []
        self.lfs = True  # weights go through LFS; else they travel inside the commit
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, cache: str, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a client that keeps its cache in the folder ``cache``."""
        wanted = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        kept = {k: v for k, v in environment().items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")}
        return kept | wanted | ({"HF_TOKEN": token} if token else {})

    def handle_error(self, request, client_address):
        """Clients that leave, and connections dropped on purpose, are no news."""


def control(url: str, **command) -> list:
    """Steer the server at ``url``: ``fail={...}`` (fields of Failure), ``lfs=bool``. Returns the requests so far."""
    request = urllib.request.Request(f"{url}/_control", json.dumps(command).encode(), method="POST")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.load(response)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", **body):
        self.status, self.code, self.body = status, code, body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def answer(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length", 0))
        failure = self._failure(f"{self.command} {path}")
        if failure is not None and failure.status is None:
            part = self.rfile.read(length // 2)
            self.server.requests.append((self.command, path, len(part)))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if path != "/_control":
            self.server.requests.append((self.command, path, len(self.body)))
        try:
            if failure is not None:
                raise Refused(failure.status, error="this failure was asked for")
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    with self.server.lock:
                        return getattr(self, name)(**{k: v and unquote(v) for k, v in match.groupdict().items()})
            raise Refused(404, error=f"no such route: {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.body.get("error", refused.code)}
            self.send(refused.body, refused.status, headers if refused.code else {})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args):
        pass

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _failure(self, request: str) -> Failure | None:
        with self.server.lock:
            for failure in self.server.failures:
                if re.search(failure.pattern, request) and failure.times > 0:
                    if failure.skip > 0:
                        failure.skip -= 1
                        return None
                    failure.times -= 1
                    return failure
        return None

    def send(self, body, status: int = 200, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- what a request is about

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._authorized()):
            raise Refused(404 if self._authorized() else 401, "RepoNotFound", error="Repository not found")
        if self.command in ("POST", "PUT") and not self._authorized():
            raise Refused(403, error="this needs a token with write access")
        return repo

    def _sha(self, repo: Repo, revision: str | None) -> str:
        revision = revision or "main"
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", error=f"Invalid rev id: {revision}")
        return sha

    # ---- routes

    def control(self):
        command = json.loads(self.body)
        if "fail" in command:
            self.server.failures = [Failure(**command["fail"])]
        self.server.lfs = command.get("lfs", self.server.lfs)
        self.send(self.server.requests)

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self):
        wanted = json.loads(self.body)
        if not self._authorized():
            raise Refused(401, error="Invalid username or password.")
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            raise Refused(409, error="You already created this model repo", url=url)
        repo = self.server.repos[name] = Repo(wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        self.send({"url": url, "name": name})

    def info(self, repo, revision=None):
        found = self._repo(repo)
        sha = self._sha(found, revision)
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        self.send({"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def branch(self, repo, branch):
        found = self._repo(repo)
        if branch in found.refs:
            raise Refused(409, error=f"Reference already exists: {branch}")
        found.refs[branch] = self._sha(found, json.loads(self.body or b"{}").get("startingPoint"))
        self.send({})

    def tree(self, repo, revision, path=None):
        found = self._repo(repo)
        files = found.commits[self._sha(found, revision)]
        prefix = f"{path}/" if path else ""
        if path and not any(name.startswith(prefix) for name in files):
            raise Refused(404, "EntryNotFound", error=f"{path} does not exist")
        self.send([
            {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
            | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 130}} if file.lfs else {})
            for name, file in files.items()
            if name.startswith(prefix)
        ])  # fmt: skip

    def preupload(self, repo, revision):
        found = self._repo(repo)
        files = found.commits[self._sha(found, revision)]
        answers = []
        for wanted in json.loads(self.body)["files"]:
            mode = "lfs" if self.server.lfs and wanted["path"].endswith(".safetensors") else "regular"
            old = files.get(wanted["path"])
            oid = old.oid if old is not None and old.lfs == (mode == "lfs") else None
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send({"files": answers})

    def lfs_batch(self, repo):
        self._repo(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/{wanted['oid']}/verify"},
            }
            objects.append(wanted | ({} if wanted["oid"] in self.server.blobs else {"actions": actions}))
        self.send({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, error="the content does not have this digest")
        self.server.blobs[oid] = self.body
        self.send({})

    def lfs_verify(self, oid):
        self.send({}, 200 if oid in self.server.blobs else 404)

    def commit(self, repo, revision):
        found = self._repo(repo)
        files = dict(found.commits[self._sha(found, revision)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refused(400, error=f"LFS pointer to a file that was not uploaded: {value['path']}")
                files[value["path"]] = File(self.server.blobs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
        answer = {"pullRequestUrl": None}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
            revision, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.server.url}/{repo}/discussions/{number}"}
        sha = found.commit(revision, files)
        self.send(answer | {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def resolve(self, repo, revision, path):
        found = self._repo(repo)
        sha = self._sha(found, revision)
        file = found.commits[sha].get(path)
        if file is None:
            raise Refused(404, "EntryNotFound", error=f"{path} does not exist on {revision}")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if file.lfs:  # large files lie on another host, whose headers say nothing of the repository
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": len(file.content)}
            other_host = self.server.url.replace("127.0.0.1", "localhost")
            return self.send(b"", 302, headers | {"Location": f"{other_host}/lfs/{file.oid}"})
        return self._send_range(file.content, headers)

    def lfs_get(self, oid):
        self._send_range(self.server.blobs[oid], {"ETag": f'"{oid}"'})

    def _send_range(self, content: bytes, headers: dict) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers |= {"Accept-Ranges": "bytes"}
        if not asked:
            return self.send(content, 200, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return self.send(content[start:stop], 206, headers)


ROUTES = [
    ("POST", "/_control", "control"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("GET", f"/api/models/{REPO}", "info"),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]+)", "lfs_get"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/verify", "lfs_verify"),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
