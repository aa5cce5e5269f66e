"""A Hub on the loopback interface that speaks what `huggingface_hub` uses to publish and to load.

Repositories live in memory. A commit replaces the files of a repository at once, as on the real Hub.
`GET /_hub` tells what happened, `POST /_hub` plans failures: {"stage": "lfs" or "commit" or
"preupload", "how": an HTTP status or "drop", "times": n}.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_only_for_the_test_server"
_LARGE = (".safetensors", ".bin", ".png")


@dataclass
class Repo:
    """One repository: its files now, and the messages of its commits."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """Changes with every commit."""
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server and its state; use it as a context."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, tuple[object, int]] = {}
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """What `HF_ENDPOINT` is to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def _answer(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fails(self, stage: str) -> bool:
        """Carry out a planned failure; the body has been read or the connection is dropped."""
        how, times = self.server.failures.get(stage, (None, 0))
        if not times:
            return False
        self.server.failures[stage] = (how, times - 1)
        self.server.requests[f"failed {stage}"] += 1
        if how == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self._answer(int(how), {"error": f"planned failure of {stage}"})
        return True

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        with self.server.lock:
            for methods, pattern, act in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods:
                    self.server.requests[act.__name__] += 1
                    writes = act in WRITES
                    if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        self._answer(401, {"error": "no valid token"})
                        return
                    act(self, body, **found.groupdict())
                    return
            self.server.unknown.append(f"{self.command} {path}")
        self._missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # What the routes do ---------------------------------------------------------------------------

    def control(self, body: bytes) -> None:
        if body:
            plan = json.loads(body)
            self.server.failures[plan["stage"]] = (plan["how"], plan["times"])
        state = {name: [sorted(r.files), r.commits] for name, r in self.server.repos.items()}
        self._answer(200, {"repos": state, "requests": self.server.requests})

    def whoami(self, body: bytes) -> None:
        self._answer(200, {"name": "me", "type": "user", "orgs": []})

    def validate_yaml(self, body: bytes) -> None:
        front = json.loads(body)["content"].split("---")[1]
        named = re.search(r"^base_model: (.+)$", front, flags=re.MULTILINE)
        bad = named and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named[1].strip("'\""))
        errors = [{"message": f"base_model {named[1]} is no repository"}] if bad else []
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        known = repo_id in self.server.repos
        self.server.repos.setdefault(repo_id, Repo())
        self._answer(409 if known else 200, url)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if self._fails("preupload"):
            return
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        answer = []
        for wanted in json.loads(body)["objects"]:
            line = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/lfs/{wanted['oid']}"
                line["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answer.append(line)
        self._answer(200, {"transfer": "basic", "objects": answer})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if self._fails("lfs"):
            return
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "wrong content"})
            return
        self.server.objects[oid] = body
        self._answer(200)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        wanted = json.loads(body)
        right = len(self.server.objects.get(oid, b"")) == wanted["size"]
        self._answer(200 if right else 404, {})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if self._fails("commit"):
            return
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self._missing("RepoNotFound")
            return
        files, message = dict(repo.files), ""
        for line in filter(None, body.decode().split("\n")):
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                message = value["summary"]
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                self._answer(400, {"error": f"unknown operation {part['key']}"})
                return
        repo.files, repo.commits = files, [*repo.commits, message]
        url = f"{self.server.endpoint}/{repo_id}/commit/{repo.sha}"
        self._answer(200, {"success": True, "commitUrl": url, "commitOid": repo.sha})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self._missing("RepoNotFound")
            return
        self._answer(200, {
            "id": repo_id, "sha": repo.sha, "private": False, "tags": [], "downloads": 0,
            "siblings": [{"rfilename": name} for name in sorted(repo.files)],
        })  # fmt: skip

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self._missing("RepoNotFound")
            return
        self._answer(
            200,
            [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in sorted(repo.files.items())
                if name.startswith((folder or "").lstrip("/"))
            ],
        )

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            self._missing("RepoNotFound")
        elif name not in repo.files:
            self._missing("EntryNotFound")
        else:
            content = repo.files[name]
            self._answer(
                200, content, ETag=f'"{_etag(content)}"', X_Repo_Commit=repo.sha,
                X_Linked_Size=str(len(content)), Accept_Ranges="none",
            )  # fmt: skip


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    (("GET", "POST"), r"/_hub", Handler.control),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}(?P<folder>/.*)?", Handler.tree),
    (("GET",), rf"/api/models/{_REPO}(/revision/{_REVISION})?", Handler.info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    (("POST",), r"/lfs/(?P<oid>[0-9a-f]+)/verify", Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", Handler.resolve),
)
WRITES = (Handler.create, Handler.preupload, Handler.commit, Handler.lfs_batch)
