"""A Hub on loopback, as much of one as huggingface_hub needs to create, upload, commit and download.

Repositories are branches of commits, a commit is a dictionary of paths to bytes. Files of safetensors go through LFS
as on the Hub. Faults can be planted: an answer other than the right one, some times, before or after the work is done.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_plantedTokenThatMayWrite0123456789"  # noqa: S105
READ_TOKEN = "hf_plantedTokenThatMayRead0123456789"  # noqa: S105
OWNER = "me"


@dataclass
class Fault:
    """Answer `status` to the next `times` requests of `method` whose path matches, after `delay` seconds.

    after: only once the request has had its effect. act: something to do first, such as another's commit.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1
    delay: float = 0.0
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "planted"}'
    act: Callable[[], None] | None = None


@dataclass
class Repo:
    """refs: branch to commit; commits: id to files; large: SHA-256 to content; written: paths of the last upload."""

    private: bool = True
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add to a branch a commit with exactly these files."""
        oid = hashlib.sha1(f"{len(self.log)} {sorted(files)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        self.log.append(oid)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


class Hub:
    """The server, its repositories, faults still to come, and what it was asked: method, path, headers."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, repo_id: str, files: dict[str, bytes] | None = None, **kind: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(**kind)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {}))
        return repo

    def requests(self, method: str, path: str) -> int:
        """How many requests there were of this method and a path that matches."""
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.asked)


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, **more: str):
        self.status, self.code, self.message, self.more = status, code, message, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: the client's delayed acknowledgement of its head would cost 40 ms
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, dict(self.headers)))
        fault = next((f for f in self.hub.faults if f.method == self.command and re.search(f.path, path)), None)
        if fault:
            fault.times -= 1
            if not fault.times:
                self.hub.faults.remove(fault)
            if fault.act:
                fault.act()
        try:
            if fault and fault.status and not fault.after:
                return self._late(fault)
            answer = self._answer(path, body)
            if fault and (fault.after or fault.delay):
                return self._late(fault, *answer)
            return self._send(*answer)
        except _Refused as no:
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
            return self._send(no.status, json.dumps({"error": no.message} | no.more).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):  # the client has given up
            self.close_connection = True

    def _late(self, fault: Fault, *answer: object) -> None:
        time.sleep(fault.delay)
        if fault.status:
            echo = {k: v.format(**self.headers) for k, v in fault.headers.items()}
            body = fault.body.replace("AUTH", self.headers.get("Authorization", ""))
            self._send(fault.status, body.encode(), {"Content-Type": "application/json"} | echo)
        else:
            self._send(*answer)  # type: ignore[arg-type]

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self) -> str | None:
        """Who asks. Raises _Refused for a token that nobody has."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return None if given is None else given.removeprefix("Bearer ")

    def _writer(self) -> None:
        if self._user() is None:
            raise _Refused(401, "", "Invalid username or password.")
        if self._user() != TOKEN:
            raise _Refused(403, "", "this token may only read")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self._user() is None):
            raise _Refused(401 if self._user() is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _files(self, repo: Repo, revision: str) -> dict[str, bytes]:
        try:
            return repo.files(revision)
        except KeyError:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None

    def _answer(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, act in (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda data: {"errors": [], "warnings": []}),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/([^/]+/[^/]+)/(\w+)", self._put),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        ):
            if method == self.command and (match := re.fullmatch(pattern, path)):
                self._user()
                answer = act(body, *match.groups())
                return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        if self.command in ("GET", "HEAD") and (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)):
            return self._resolve(*match.groups())
        raise _Refused(404, "", f"no such place: {self.command} {path}")

    def _create(self, body: bytes) -> object:
        self._writer()
        asked = json.loads(body)
        owner = asked.get("organization") or OWNER
        repo_id = f"{owner}/{asked['name']}"
        if owner != OWNER:
            raise _Refused(403, "", f"you may not create a repository of {owner}")
        if repo_id in self.hub.repos:
            raise _Refused(409, "", "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        self.hub.add(repo_id, private=asked.get("visibility", "public") == "private" or asked.get("private", False))
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "1"}

    def _info(self, _: bytes, repo_id: str, revision: str | None) -> object:
        repo = self._repo(repo_id)
        self._files(repo, revision or "main")
        sha = repo.refs.get(revision or "main", revision)
        return {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": []}

    def _branch(self, _: bytes, repo_id: str, branch: str) -> object:
        self._writer()
        repo = self._repo(repo_id)
        if branch in repo.refs:
            raise _Refused(409, "", "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        return {}

    def _tree(self, _: bytes, repo_id: str, revision: str) -> object:
        assert parse_qs(urlsplit(self.path).query)["recursive"] == ["true"]
        files = self._files(self._repo(repo_id), revision)
        entries: list[dict[str, object]] = []
        for folder in sorted({p.rpartition("/")[0] for p in files} - {""}):
            entries.append({"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            if is_large(path):
                sha = hashlib.sha256(content).hexdigest()
                entry |= {"oid": git_id(sha.encode()), "lfs": {"oid": sha, "size": len(content), "pointerSize": 130}}
            entries.append(entry)
        return entries

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> object:
        self._writer()
        there = self._files(self._repo(repo_id), revision)
        ignored = there.get(".gitignore", b"").decode().split()
        modes: list[dict[str, object]] = [
            {"path": p, "uploadMode": "lfs" if is_large(p) else "regular", "shouldIgnore": p in ignored}
            for p in (f["path"] for f in json.loads(body)["files"])
        ]
        for mode in modes:
            if (content := there.get(str(mode["path"]))) is not None:
                sha = hashlib.sha256(content).hexdigest()
                mode["oid"] = sha if is_large(str(mode["path"])) else git_id(content)
        return {"files": modes}

    def _batch(self, body: bytes, repo_id: str) -> object:
        self._writer()
        repo, objects = self._repo(repo_id), []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{wanted['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, repo_id: str, oid: str) -> object:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "", "not the content that was announced")
        self.hub.repos[repo_id].large[oid] = body
        return {}

    def _commit(self, body: bytes, repo_id: str, branch: str) -> object:
        self._writer()
        repo = self._repo(repo_id)
        files, repo.written = dict(self._files(repo, branch)), []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repo.refs[branch]):
                raise _Refused(412, "", "The branch has moved: another commit came first")
            if line["key"] in ("file", "lfsFile"):
                repo.written.append(value["path"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = repo.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, branch)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}

    def _resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        repo = self._repo(repo_id)
        if repo.gated and self._user() != TOKEN:
            status = 401 if self._user() is None else 403
            raise _Refused(status, "GatedRepo", f"Access to model {repo_id} is restricted")
        files = self._files(repo, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {
            "X-Repo-Commit": repo.refs.get(revision, revision),
            "ETag": f'"{git_id(content)}"',
            "Accept-Ranges": "bytes",
        }
        if is_large(path):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        return 200, content, headers


def git_id(content: bytes) -> str:
    """A blob's id in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))
