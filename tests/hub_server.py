"""A Hub on the loopback interface: the HTTP that `huggingface_hub` and `transformers` use. No test lives here.

Everything is in memory. `Hub` is the state, to be read and prepared by tests; `serve(hub)` answers on a port. `Fault`s
refuse requests, cut connections after some bytes, or hold them. `client_environment` is what a client process needs:
`HF_ENDPOINT` and `HF_HUB_DISABLE_XET` are read when `huggingface_hub` is imported, so each client is a process.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.png", "*.jpg", "*.pt")
LARGEST_REGULAR_FILE = 10 * 2**20
BLOCK = 2**16
TIME = "2026-01-01T00:00:00.000Z"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<type>models|datasets|spaces)/{REPO}"
ROUTES: list[tuple[str, re.Pattern, str]] = []


class Refusal(Exception):
    """An answer with an error status; `code` is the Hub's own (`RepoNotFound`, ...)."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What goes wrong with the requests that match.

    Args:
        path: a regular expression that is searched for in `METHOD /path`.
        status, message: refuse with these.
        after_bytes: without a status, the connection is cut after so many bytes of the request's body (of the
            answer's, for GET).
        hold: in place of cutting the connection, set `reached` and leave the client waiting until `released` is set.
        times: how many requests go wrong.
    """

    path: str
    status: int | None = None
    message: str = "refused"
    after_bytes: int = 0
    hold: bool = False
    times: int = 1
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The id of git's blob: of the pointer, where the content is stored apart."""
        blob = self.content
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n"
            blob = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def description(self, path: str) -> dict:
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": 130}} if self.is_lfs else {}
        return {"type": "file", "path": path, "oid": self.blob_id, "size": size, **lfs}


def folder_description(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, File]


class Repository:
    """Branches and tags over commits, each with all its files."""

    def __init__(self, repo_id: str, private: bool = False):
        self.repo_id, self.private = repo_id, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(repr((parent, message, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        found = [commit for name, commit in self.commits.items() if len(oid) >= 7 and name.startswith(oid)]
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """By path the content of every file."""
        return {path: file.content for path, file in self.find(revision).files.items()}

    def history(self, revision: str = "main") -> list[str]:
        """The messages of a revision's commits, the newest first."""
        commit, messages = self.find(revision), []
        while commit is not None:
            messages.append(commit.message)
            commit = self.commits.get(commit.parent)
        return messages


class Hub:
    """Users, repositories, stored objects, and what is to go wrong.

    Args:
        users: by token, {"name", "orgs", "role": "read" or "write"}.
        chunk_size: files larger than this are asked for in parts.
    """

    def __init__(self, users: dict[str, dict], chunk_size: int | None = None):
        self.users, self.chunk_size = users, chunk_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []  # requests that no route answers
        self.received: dict[str, int] = {}  # by stored object, bytes that arrived for it
        self.leaked: list[str] = []  # requests to the storage host that carried a token
        self.lock = threading.RLock()
        self.endpoint = self.storage = ""

    def model(self, repo_id: str) -> Repository:
        return self.repositories["models", repo_id]

    def user_of(self, headers) -> dict | None:
        token = (headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, request):
                    fault.times -= 1
                    return fault
        return None


def may_write(user: dict | None, repo_id: str) -> bool:
    return user is not None and user["role"] == "write" and repo_id.split("/")[0] in (user["name"], *user["orgs"])


def route(method: str, pattern: str):
    def add(handler):
        ROUTES.append((method, re.compile(pattern + "$"), handler.__name__))
        return handler

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    # ---- requests ----------------------------------------------------------------------------------------------------

    def answer(self) -> None:
        self.url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(self.url.query).items()}
        request = f"{self.command} {self.url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        self.fault = self.hub.take_fault(request)
        self.unread = None
        try:
            if self.fault is not None and self.fault.status is not None:
                raise Refusal(self.fault.status, self.fault.message)
            if self.fault is not None and self.command != "GET":
                return self.break_off(self.blocks())
            # A HEAD is the GET without its body.
            method = "GET" if self.command == "HEAD" else self.command
            for of_method, pattern, name in ROUTES:
                match = pattern.match(self.url.path)
                if match and of_method == method:
                    groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    return getattr(self, name)(**groups)
            self.hub.unknown.append(request)
            raise Refusal(404, f"there is no route for {request}")
        except Refusal as refusal:
            self.refuse(refusal)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *arguments) -> None:
        pass

    def blocks(self) -> Iterator[bytes]:
        """The body of the request as it arrives, with a length or in chunks."""
        self.unread = True
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                block = self.rfile.read1(min(BLOCK, left))
                if not block:
                    raise ConnectionAbortedError("the client went away")
                left -= len(block)
                yield block
        self.unread = False

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def json_body(self) -> dict:
        return json.loads(self.body() or b"{}")

    def break_off(self, blocks: Iterator[bytes]) -> None:
        """Take the fault's number of bytes from a request's body, then hold or cut the connection."""
        taken = 0
        while taken < self.fault.after_bytes and (block := next(blocks, b"")):
            taken += len(block)
        self.cut()

    def cut(self) -> None:
        self.fault.reached.set()
        if self.fault.hold:
            self.fault.released.wait(60)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        if self.unread is None and self.command in ("POST", "PUT", "DELETE"):
            self.body()  # or its bytes would be read as the next request
        elif self.unread:
            self.close_connection = True
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.status is None:
            self.wfile.write(content[: self.fault.after_bytes])
            self.wfile.flush()
            return self.cut()
        self.wfile.write(content)

    def send_json(self, value, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, refusal: Refusal) -> None:
        headers = {"X_Error_Message": refusal.message.replace("\n", " ")}
        if refusal.code:
            headers["X_Error_Code"] = refusal.code
        self.send_json({"error": refusal.message}, refusal.status, **headers)

    def repository(self, type: str, repo: str, write: bool = False) -> Repository:
        user = self.hub.user_of(self.headers)
        found = self.hub.repositories.get((type, repo))
        allowed = may_write(user, repo)
        if found is None or (found.private and not allowed):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not allowed:
            status = 401 if user is None else 403
            raise Refusal(status, f"Authorization error: you have no write access to {repo}")
        return found

    # ---- users and repositories --------------------------------------------------------------------------------------

    @route("GET", "/api/agent-harnesses")
    def agent_harnesses(self) -> None:
        """The client asks which coding agents there are, to name the one it runs in."""
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.hub.user_of(self.headers)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": name, "type": "org", "roleInOrg": "write"} for name in user["orgs"]]
        token = {"accessToken": {"displayName": "test", "role": user["role"]}, "type": "access_token"}
        self.send_json({"type": "user", "name": user["name"], "orgs": orgs, "auth": token})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked, user = self.json_body(), self.hub.user_of(self.headers)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo, type = f"{asked.get('organization') or user['name']}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.hub.endpoint}/{'' if type == 'model' else type + 's/'}{repo}"
        if not may_write(user, repo):
            name = repo.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a {type} under the namespace "{name}"')
        if type == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "a Space needs an sdk")
        with self.hub.lock:
            if (f"{type}s", repo) in self.hub.repositories:
                message = f"You already created this {type} repo"
                return self.send_json({"error": message, "url": url}, 409, X_Error_Message=message)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[f"{type}s", repo] = Repository(repo, private)
        self.send_json({"url": url, "name": repo, "id": "1"})

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        asked, user = self.json_body(), self.hub.user_of(self.headers)
        type = f"{asked.get('type') or 'model'}s"
        repo = f"{asked.get('organization') or (user or {}).get('name')}/{asked['name']}"
        self.repository(type, repo, write=True)
        del self.hub.repositories[type, repo]
        self.send_json({})

    @route("GET", rf"{API}/auth-check(?P<write>/write)?")
    def auth_check(self, type: str, repo: str, write: str) -> None:
        self.repository(type, repo, write=bool(write))
        self.send_json({})

    @route("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, type: str, repo: str, revision: str) -> None:
        repository = self.repository(type, repo)
        commit = repository.find(revision or "main")
        card = commit.files.get("README.md", File(b"", False)).content.decode()
        metadata = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if self.query.get("blobs"):
            siblings = [
                {"rfilename": path, "size": len(file.content), "blobId": file.blob_id}
                for path, file in sorted(commit.files.items())
            ]
        self.send_json(
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.oid,
                "private": repository.private,
                "createdAt": TIME,
                "lastModified": TIME,
                "siblings": siblings,
                "tags": metadata.get("tags", []),
                "cardData": metadata,
                "pipeline_tag": metadata.get("pipeline_tag"),
                "library_name": metadata.get("library_name"),
            }
        )

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        content = self.json_body()["content"]
        match = re.match(r"---\n(.*?\n)---(\n|$)", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
            errors = [] if metadata is None or isinstance(metadata, dict) else ["the metadata is no mapping"]
        except yaml.YAMLError as error:
            errors, metadata = [str(error)], {}
        warnings = [] if metadata is not None else ["empty or missing yaml metadata in repo card"]
        found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        self.send_json(found, 400 if errors else 200)

    # ---- revisions and trees -----------------------------------------------------------------------------------------

    @route("GET", rf"{API}/refs")
    def refs(self, type: str, repo: str) -> None:
        repository = self.repository(type, repo)

        def described(folder: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": refs[name]} for name in sorted(refs)]

        found = {"branches": described("heads", repository.branches), "tags": described("tags", repository.tags)}
        self.send_json({**found, "converts": [], "pullRequests": []})

    @route("GET", rf"{API}/commits/(?P<revision>[^/]+)")
    def commits(self, type: str, repo: str, revision: str) -> None:
        repository = self.repository(type, repo)
        commit, found = repository.find(revision), []
        while commit is not None:
            found.append({"id": commit.oid, "title": commit.message, "message": "", "date": TIME, "authors": []})
            commit = repository.commits.get(commit.parent)
        self.send_json(found)

    @route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
    def create_branch(self, type: str, repo: str, branch: str) -> None:
        asked, repository = self.json_body(), self.repository(type, repo, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.find(asked.get("startingPoint") or "main").oid
        self.send_json({})

    @route("DELETE", rf"{API}/branch/(?P<branch>[^/]+)")
    def delete_branch(self, type: str, repo: str, branch: str) -> None:
        repository = self.repository(type, repo, write=True)
        if branch == "main":
            raise Refusal(403, "main cannot be deleted")
        if repository.branches.pop(branch, None) is None:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        self.send_json({})

    @route("POST", rf"{API}/tag/(?P<revision>[^/]+)")
    def create_tag(self, type: str, repo: str, revision: str) -> None:
        asked, repository = self.json_body(), self.repository(type, repo, write=True)
        if asked["tag"] in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {asked['tag']}")
        repository.tags[asked["tag"]] = repository.find(revision).oid
        self.send_json({})

    @route("DELETE", rf"{API}/tag/(?P<tag>[^/]+)")
    def delete_tag(self, type: str, repo: str, tag: str) -> None:
        if self.repository(type, repo, write=True).tags.pop(tag, None) is None:
            raise Refusal(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        self.send_json({})

    @route("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, type: str, repo: str, revision: str, folder: str) -> None:
        files = self.repository(type, repo).find(revision).files
        start = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", "").lower() == "true"
        entries = {}
        for path, file in sorted(inside.items()):
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = start + "/".join(parts[:depth])
                entries[name] = folder_description(name)
            if recursive or len(parts) == 1:
                entries[path] = file.description(path)
        self.send_json(list(entries.values()))

    @route("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, type: str, repo: str, revision: str) -> None:
        content, form = self.body(), "json" not in (self.headers.get("Content-Type") or "")
        paths = parse_qs(content.decode()).get("paths", []) if form else json.loads(content)["paths"]
        files = self.repository(type, repo).find(revision).files
        found = [files[path].description(path) for path in paths if path in files]
        for path in paths:
            if path not in files and any(name.startswith(f"{path}/") for name in files):
                found.append(folder_description(path))
        self.send_json(found)

    # ---- upload ------------------------------------------------------------------------------------------------------

    @route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, type: str, repo: str, revision: str) -> None:
        asked = self.json_body()
        files = self.repository(type, repo, write=True).find(revision).files
        ignored = [line for line in (asked.get("gitIgnore") or "").splitlines() if line and not line.startswith("#")]
        answers = []
        for item in asked["files"]:
            path = item["path"]
            large = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            large = large or item["size"] > LARGEST_REGULAR_FILE or b"\0" in base64.b64decode(item["sample"])
            present = files.get(path)
            oid = present and (present.sha256 if present.is_lfs else present.blob_id)
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                    "oid": oid,
                }
            )
        self.send_json({"files": answers})

    @route("POST", rf"/(?:(?P<type>datasets|spaces)/)?{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, type: str, repo: str) -> None:
        asked = self.json_body()
        self.repository(type or "models", repo, write=True)
        found = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            answer = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.objects:
                upload = {"href": f"{self.hub.storage}/lfs/{oid}?size={size}"}
                if self.hub.chunk_size and size > self.hub.chunk_size and "multipart" in asked["transfers"]:
                    numbers = range(1, -(-size // self.hub.chunk_size) + 1)
                    parts = {str(number): f"{self.hub.storage}/lfs/{oid}/{number}" for number in numbers}
                    upload = {
                        "href": f"{self.hub.endpoint}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(self.hub.chunk_size), **parts},
                    }
                verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            found.append(answer)
        self.send_json({"transfer": "basic", "objects": found})

    def receive(self, oid: str) -> bytes:
        """The request's body; what arrives is counted, even of a body that never ends."""
        if self.headers.get("Authorization"):
            self.hub.leaked.append(self.path)
        blocks = []
        for block in self.blocks():
            blocks.append(block)
            with self.hub.lock:
                self.hub.received[oid] = self.hub.received.get(oid, 0) + len(block)
        return b"".join(blocks)

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def upload(self, oid: str) -> None:
        self.store(oid, self.receive(oid))
        self.send(200)

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)")
    def upload_part(self, oid: str, number: str) -> None:
        content = self.receive(oid)
        self.hub.parts.setdefault(oid, {})[int(number)] = content
        self.send(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')

    @route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete")
    def complete(self, oid: str) -> None:
        parts, asked = self.hub.parts.pop(oid, {}), self.json_body()["parts"]
        etags = {number: f'"{hashlib.md5(content).hexdigest()}"' for number, content in parts.items()}
        if {part["partNumber"]: part["etag"] for part in asked} != etags:
            raise Refusal(400, "the parts are not those that were uploaded")
        self.store(oid, b"".join(parts[number] for number in sorted(parts)))
        self.send_json({})

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(422, "the content is not what its SHA-256 says")
        self.hub.objects[oid] = content

    @route("POST", rf"/{REPO}\.git/info/lfs/verify")
    def verify(self, repo: str) -> None:
        asked = self.json_body()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "the object was not uploaded")
        self.send_json({})

    @route("POST", rf"{API}/commit/(?P<revision>[^/]+)")
    def commit(self, type: str, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        repository = self.repository(type, repo, write=True)
        header = lines[0]["value"]
        with self.hub.lock:
            before = repository.find(revision)
            if header.get("parentCommit") not in (None, before.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(before.files)
            for line in lines[1:]:
                key, value = line["key"], line["value"]
                if key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refusal(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                    files[value["path"]] = File(self.hub.objects[value["oid"]], True)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                elif key == "deletedFolder":
                    files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
                else:
                    raise Refusal(400, f"unknown operation {key}")
            commit = repository.commit(revision, header["summary"], files)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit.oid}"
        self.send_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # ---- download ----------------------------------------------------------------------------------------------------

    @route("GET", rf"/(?:(?P<type>datasets|spaces)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, type: str, repo: str, revision: str, path: str) -> None:
        commit = self.repository(type or "models", repo).find(revision)
        if path not in commit.files:
            headers = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            return self.send(404, b"Entry not found", X_Repo_Commit=commit.oid, **headers)
        file = commit.files[path]
        if file.is_lfs:
            return self.send(
                302,
                Location=f"{self.hub.storage}/storage/{file.sha256}",
                X_Repo_Commit=commit.oid,
                X_Linked_Etag=f'"{file.sha256}"',
                X_Linked_Size=str(len(file.content)),
            )
        self.send_range(file.content, X_Repo_Commit=commit.oid, ETag=f'"{file.blob_id}"')

    @route("GET", r"/storage/(?P<oid>[0-9a-f]{64})")
    def storage(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked.append(self.path)
        if oid not in self.hub.objects:
            raise Refusal(404, "no such object")
        self.send_range(self.hub.objects[oid], ETag=f'"{oid}"')

    def send_range(self, content: bytes, **headers: str) -> None:
        """The content, or the part of it that `Range` asks for."""
        headers["Accept_Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked or not any(asked.groups()):
            return self.send(200, content, **headers)
        size = len(content)
        if asked[1]:
            start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        else:
            start, end = max(0, size - int(asked[2])), size - 1
        if start > end:
            return self.send(416, Content_Range=f"bytes */{size}")
        self.send(206, content[start : end + 1], Content_Range=f"bytes {start}-{end}/{size}", **headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients that go away in mid-request are what is tested; everything else is an error of this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer for a hub on a free port; sets `hub.endpoint`. Stored objects have another host's name, as on the Hub."""
    server = Server(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.endpoint, hub.storage = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            fault.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def client_environment(hub: Hub, home: str | Path, token: str | None = None) -> dict[str, str]:
    """The environment of a client process of this hub: a cache of its own, no proxy, and a token or none."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith(("HF_", "HUGGING")) and not key.upper().endswith("_PROXY")
    }
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    return environment | ({"HF_TOKEN": token} if token else {})
