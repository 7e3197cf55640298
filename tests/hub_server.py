"""A small Hugging Face Hub that speaks the Hub's protocol over HTTP and keeps its state in memory.

It decides which files are large (LFS), and checks hashes, sizes, tokens and permissions. It keeps every commit, branch
and pull request. It serves large files from another origin, as the Hub does. Tests can inject faults into any phase of
the protocol. The phases are the names of the handlers in `ROUTES`.

The server knows three tokens: `WRITE_TOKEN` and `READ_TOKEN` of the user "someone", and `OTHER_TOKEN` of "else".
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from hub_repository import Blob, Repo


WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_SecretThatMayWrite", "hf_SecretThatMayRead", "hf_SecretOfSomeoneElse"
USERS = {WRITE_TOKEN: ("someone", "write"), READ_TOKEN: ("someone", "read"), OTHER_TOKEN: ("else", "write")}

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".parquet", ".arrow", ".png", ".jpg")

ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/(?:(?P<kind>dataset|space|kernel)s/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/upload/(?P<oid>\w+)(?:/(?P<part>\d+))?", "upload"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)/complete/(?P<oid>\w+)", "complete"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)/verify", "verify"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
    ("POST", r"/api/spaces/(?P<repo>[^/]+/[^/]+)/variables", "variables"),
    ("GET", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
    ("GET", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths"),
    ("GET", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
    (
        "GET",
        r"/(?:(?P<kind>dataset|space|kernel)s/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "resolve",
    ),
    ("GET", r"/storage/(?P<oid>\w+)", "download"),
]


class HubError(Exception):
    """An error response, with the headers that tell the client its type."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """A fault in the next `times` requests of a phase.

    `action` is a status code, a function to call before the work, or a word. "hang up" drops the connection in the
    middle of the request. "hang up after" loses the response, after the work is done. "truncate" and "corrupt" change
    the body of the response.
    """

    phase: str
    action: str | int | Callable[[], None]
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # tests kill clients on purpose
            super().handle_error(request, client_address)


class HubServer:
    """The state of the server, and the threads that serve it on free ports of the loopback device."""

    def __init__(self):
        self.multipart_size: int | None = None  # larger files are uploaded in parts
        self.reset()
        self.servers = [QuietServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.hub = self
        # Two host names: the client takes the storage for another host, and sends it no token.
        self.endpoint, self.storage_endpoint = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self.servers, strict=True)
        )

    def reset(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # phase, path

    def start(self) -> None:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def create(
        self, repo_id: str, files: dict[str, bytes | Path] | None = None, kind: str = "model", **fields
    ) -> Repo:
        """Create a repository with an initial commit by its owner. Files are contents, or paths of local files."""
        repo = self.repos[kind, repo_id] = Repo(repo_id.split("/")[0], **fields)
        blobs = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}
        for path, content in (files or {}).items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            blobs[path] = Blob(content, path.endswith(LFS_SUFFIXES))
        repo.commit("main", blobs, "initial commit", None)
        return repo

    def phases(self) -> list[str]:
        return [phase for phase, _ in self.requests]

    def take_fault(self, phase: str, has_body: bool) -> Fault | None:
        for fault in self.faults:
            is_possible = has_body or fault.action not in ("truncate", "corrupt")
            if fault.phase == phase and fault.times > 0 and is_possible:
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # send responses at once, instead of waiting for the client's ACK

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        matches = [(phase, re.fullmatch(path, url.path)) for verb, path, phase in ROUTES if verb == method]
        phase, match = next((found for found in matches if found[1]), ("unknown", None))
        self.hub.requests.append((phase, self.path))
        self.fault = self.hub.take_fault(phase, has_body=self.command != "HEAD")
        if self.fault is not None and callable(self.fault.action):
            self.fault.action()
        length = int(self.headers.get("Content-Length", 0))
        if self.fault is not None and self.fault.action == "hang up":
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            return self.hang_up()  # the client is gone
        try:
            if match is None:
                raise HubError(404, f"nothing is served at {self.path}")
            if self.fault is not None and isinstance(self.fault.action, int):
                return self.answer(self.fault.action, {"error": "a fault of the test"}, **self.fault.headers)
            values = {name: value and unquote(value) for name, value in match.groupdict().items()}
            if "kind" in values:
                values["kind"] = values["kind"] or "model"
            self.user, self.role = self.authenticate()
            getattr(self, f"on_{phase}")(**values)
        except HubError as error:
            headers = {"X_Error_Message": error.message}
            if error.code is not None:
                headers["X_Error_Code"] = error.code
            self.answer(error.status, {"error": error.message}, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_) -> None:
        pass

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: dict | list | bytes = b"", **headers: str) -> None:
        if self.fault is not None and self.fault.action == "hang up after":
            return self.hang_up()
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content_Type": "application/json", **headers}
        if self.fault is not None and self.fault.action == "corrupt":
            content = bytes(byte ^ 1 for byte in content)
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.fault is not None and self.fault.action == "truncate":
            self.wfile.write(content[: len(content) // 2])
            return self.hang_up()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Permissions

    def authenticate(self) -> tuple[str | None, str]:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            return None, "none"
        if self.server is self.hub.servers[1]:
            raise HubError(400, "the storage wants no token")
        if scheme != "Bearer" or token not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def find(self, kind: str, repo: str) -> Repo:
        found = self.hub.repos.get((kind, repo))
        if found is None or (found.private and found.owner != self.user):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if found.gated and found.owner != self.user:
            raise HubError(403, f"Access to {repo} is restricted", "GatedRepo")
        return found

    def find_to_write(self, kind: str, repo: str, owner: str | None = None) -> Repo:
        found = self.find(kind, repo)
        self.demand_write(found.owner)
        return found

    def demand_write(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user != owner or self.role != "write":
            raise HubError(403, "You don't have the rights to write here")

    def url_of(self, kind: str, repo: str) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo}"

    def resolve_revision(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Accounts and repositories

    def on_whoami(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": self.role}}
        self.answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", **token}})

    def on_create(self) -> None:
        payload = json.loads(self.body)
        owner = payload.get("organization") or self.user
        repo_id, kind = f"{owner}/{payload['name']}", payload.get("type", "model")
        self.demand_write(owner)
        url = self.url_of(kind, repo_id)
        if (kind, repo_id) in self.hub.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        private = payload.get("visibility") == "private" or payload.get("private") is True
        self.hub.create(repo_id, kind=kind, private=private, sdk=payload.get("sdk"))
        self.answer(200, {"url": url, "name": repo_id})

    def on_validate(self) -> None:
        card = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        errors = [] if isinstance(metadata, dict) else [{"message": "metadata must be a mapping"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def on_info(self, kind: str, repo: str, revision: str | None) -> None:
        found = self.find(kind, repo)
        sha = self.resolve_revision(found, revision or "main")
        fields = {"private": found.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        if kind != "kernel":  # the client's KernelInfo knows no files
            fields["siblings"] = [{"rfilename": path} for path in sorted(found.commits[sha].files)]
        self.answer(200, {"_id": "0", "id": repo, "sha": sha, **fields})

    def on_refs(self, kind: str, repo: str) -> None:
        refs = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in self.find(kind, repo).refs.items()
        ]
        self.answer(200, {"branches": refs, "tags": [], "converts": []})

    def on_branch(self, kind: str, repo: str, revision: str) -> None:
        found = self.find_to_write(kind, repo)
        if revision.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {revision}")
        if revision in found.refs:
            raise HubError(409, "Reference already exists")
        found.refs[revision] = found.refs["main"]
        self.answer(200, {})

    def on_variables(self, repo: str) -> None:
        found, variable = self.find_to_write("space", repo), json.loads(self.body)
        found.variables[variable["key"]] = variable["value"]
        self.answer(200, {key: {"value": value} for key, value in found.variables.items()})

    # Upload

    def on_preupload(self, kind: str, repo: str, revision: str) -> None:
        found = self.find(kind, repo)
        if "create_pr" not in self.query:
            self.demand_write(found.owner)
        files = found.commits[self.resolve_revision(found, revision)].files
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = files[path].etag if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def on_batch(self, kind: str, repo: str) -> None:
        self.find(kind, repo)
        answers = []
        for file in json.loads(self.body)["objects"]:
            oid, size = file["oid"], file["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload = {"href": f"{self.hub.storage_endpoint}/upload/{oid}"}
                if self.hub.multipart_size is not None and size > self.hub.multipart_size:
                    num_parts = -(-size // self.hub.multipart_size)
                    header = {str(part): f"{upload['href']}/{part}" for part in range(1, num_parts + 1)}
                    header["chunk_size"] = str(self.hub.multipart_size)
                    upload = {"href": f"{self.hub.endpoint}/{repo}/complete/{oid}", "header": header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/{repo}/verify"}}
            answers.append(answer)
        self.answer(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content does not have the announced hash")
        self.hub.objects[oid] = content

    def on_upload(self, oid: str, part: str | None) -> None:
        if part is None:
            self.store(oid, self.body)
        else:
            self.hub.parts[oid, int(part)] = self.body
        self.answer(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def on_complete(self, repo: str, oid: str) -> None:
        numbers = sorted(part["partNumber"] for part in json.loads(self.body)["parts"])
        self.store(oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        self.answer(200, {})

    def on_verify(self, repo: str) -> None:
        file = json.loads(self.body)
        if len(self.hub.objects.get(file["oid"], b"")) != file["size"]:
            raise HubError(404, "the object is not there or has another size")
        self.answer(200, {})

    def on_commit(self, kind: str, repo: str, revision: str) -> None:
        found = self.find(kind, repo)
        is_pull_request = "create_pr" in self.query
        if self.user is None or not is_pull_request:
            self.demand_write(found.owner)
        parent = self.resolve_revision(found, revision)
        files, title = dict(found.commits[parent].files), None
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, f"the large file {value['path']} has not been uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise HubError(400, f"unknown operation {operation['key']}")
        ref = revision
        if is_pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref = f"refs/pr/{number}"
        sha = found.commit(ref, files, title, parent)
        url = self.url_of(kind, repo)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        self.answer(200, answer)

    # Download

    def entry(self, path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        return entry

    def on_tree(self, kind: str, repo: str, revision: str, path: str | None) -> None:
        found = self.find(kind, repo)
        files = found.commits[self.resolve_revision(found, revision)].files
        prefix = f"{path}/" if path else ""
        entries = {}
        for name, blob in sorted(files.items()):
            if name.startswith(prefix):
                first, _, inner = name.removeprefix(prefix).partition("/")
                if inner:
                    folder = prefix + first
                    entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                if not inner or self.query.get("recursive", "false").lower() in ("1", "true"):
                    entries[name] = self.entry(name, blob)
        if not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self.answer(200, list(entries.values()))

    def on_paths(self, kind: str, repo: str, revision: str) -> None:
        found = self.find(kind, repo)
        files = found.commits[self.resolve_revision(found, revision)].files
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        entries = [self.entry(path, files[path]) for path in paths if path in files]
        for path in paths:
            if path not in files and any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer(200, entries)

    def on_resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        found = self.find(kind, repo)
        sha = self.resolve_revision(found, revision)
        blob = found.commits[sha].files.get(path)
        if blob is None:
            headers = {"X_Repo_Commit": sha, "X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            return self.answer(404, {"error": "Entry not found"}, **headers)
        if not blob.is_lfs:
            return self.serve(blob.content, X_Repo_Commit=sha, ETag=f'"{blob.etag}"')
        self.hub.objects[blob.sha256] = blob.content
        self.answer(
            302,
            Location=f"{self.hub.storage_endpoint}/storage/{blob.sha256}",
            X_Repo_Commit=sha,
            X_Linked_ETag=f'"{blob.etag}"',
            X_Linked_Size=str(len(blob.content)),
        )

    def on_download(self, oid: str) -> None:
        self.serve(self.hub.objects[oid])

    def serve(self, content: bytes, **headers: str) -> None:
        """Send a file, or the range of its bytes that the client requests."""
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self.answer(200, content, Accept_Ranges="bytes", **headers)
        start = int(match[1])
        end = min(int(match[2]) + 1 if match[2] else len(content), len(content))
        self.answer(206, content[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(content)}", **headers)
