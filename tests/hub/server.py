"""A small model hub on loopback: what huggingface_hub and datasets ask of the real one, answered out of memory."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """The files of each commit, and what the branches point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    renamed: str = ""
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = repr(sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub:
    """repositories: 'models/org/name' or 'datasets/org/name'. requests: 'GET /path' of all that was asked.

    faults: a pattern of such requests → answers to give first, each used once: a status; 'cut' to end a download
    halfway; 'reset' to close the connection without an answer, 'hang' to give none for five seconds, 'noise' for one
    that is no HTTP, 'page' for a web page, as a network with a login gives. xet: the address of the storage that large
    files are said to lie in; there is none.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.faults: dict[str, list[int | str]] = {}
        self.xet = ""
        self.lock = threading.Lock()

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def fault(self, request: str) -> int | str | None:
        with self.lock:
            self.requests.append(request)
            for pattern, answers in self.faults.items():
                if answers and re.search(pattern, request):
                    return answers.pop(0)
        return None

    def downloads(self) -> list[str]:
        """What was fetched as a file, by path; ranges of one count each."""
        return [r for r in self.requests if r.startswith("GET") and ("/resolve/" in r or "/cdn/" in r)]

    def serve(self) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def _large(path: str) -> bool:
    """Whether the hub keeps a file in its large-file storage, which a download is redirected to."""
    return path.endswith((".parquet", ".safetensors"))


def _entry(path: str, data: bytes) -> dict:
    sha256 = hashlib.sha256(data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return entry | ({"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if _large(path) else {})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        fault = self.hub.fault(f"{self.command} {path}")
        if isinstance(fault, int):
            self._send(fault, b'{"error": "of the test"}', {"Retry-After": "0"})
        elif fault == "page":
            self._send(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        elif fault in ("reset", "hang", "noise"):
            self._break(str(fault))
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
            self._api(*found.groups(), parse_qs(url.query), body)
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check", path):
            repository = self._repository(f"{found[1]}/{found[2]}")
            if repository is not None:
                self._send(*((403, b"", {"X-Error-Code": "GatedRepo"}) if repository.gated else (200, b"")))
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
            self._resolve(found[1] or "models/", found[2], found[3])
        elif found := re.fullmatch(r"/cdn/(\w+/[^/]+/[^/]+)/(\w{40})/(.+)", path):
            self._file(self.hub.repositories[found[1]].commits[found[2]][found[3]], {}, cut=fault == "cut")
        elif found := re.fullmatch(
            r"/api/(repos/create|validate-yaml|models/([^/]+/[^/]+)/(preupload|commit)/main)", path
        ):
            self._take(found[3] or found[1], found[2], body)
        elif path == "/xet-token":
            about = {"Cas-Url": self.hub.xet, "Access-Token": "t", "Token-Expiration": "9999999999"}
            self._send(200, b"", {f"X-Xet-{name}": value for name, value in about.items()})
        else:
            self._send(404)

    def _break(self, how: str) -> None:
        self.close_connection = True
        if how == "hang":
            time.sleep(5)
        elif how == "noise":
            self.wfile.write(b"\x00\x01\x02 no HTTP\r\n\r\n")
        else:  # closed with nothing to wait for, the system sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repository.renamed:
            self._send(307, headers={"Location": self.path.replace(name.partition("/")[2], repository.renamed)})
        else:
            return repository
        return None

    def _api(self, kind: str, name: str, what: str, rest: str, query: dict, body: bytes) -> None:
        repository = self._repository(f"{kind}/{name}")
        if repository is None:
            return
        revision, path = _split_revision(repository, rest or "main")
        found = repository.at(revision)
        if found is None:
            self._send(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        commit, files = found
        if what == "tree":
            inside = {p: data for p, data in files.items() if not path or p.startswith(f"{path}/")}
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            names = {p for p in inside if deep or "/" not in p.removeprefix(f"{path}/" if path else "")}
            folders = {p.rpartition("/")[0] for p in inside} - {path, ""}
            listed = [_entry(p, inside[p]) for p in sorted(names)]
            self._json(listed + [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)])
        elif what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            self._json([_entry(p, files[p]) for p in asked if p in files])
        else:
            about = {"id": name, "sha": commit, "private": False, "gated": "auto" if repository.gated else False}
            about |= {
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
            self._json(about | {"siblings": [{"rfilename": p} for p in sorted(files)]})

    def _take(self, what: str, name: str, body: bytes) -> None:
        """The steps of an upload, all of whose files come inside the commit."""
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            self._send(401)
        elif what == "repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            self.hub.repository(f"models/{name}").private = about.get("visibility") == "private"
            self._json({"url": f"http://127.0.0.1:{self.server.server_address[1]}/{name}"})
        elif what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            commit = self.hub.repository(f"models/{name}").commit(files)
            self._json({"commitUrl": f"http://127.0.0.1/{name}/commit/{commit}", "commitOid": commit})
        else:
            self._json({"errors": [], "warnings": []})

    def _resolve(self, kind: str, name: str, rest: str) -> None:
        repository = self._repository(f"{kind}{name}")
        if repository is None:
            return
        revision, path = _split_revision(repository, rest)
        commit, files = repository.at(revision) or ("", {})
        if repository.gated:
            self._send(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif path not in files:
            code = "EntryNotFound" if commit else "RevisionNotFound"
            self._send(404, headers={"X-Error-Code": code, "X-Repo-Commit": commit, "X-Error-Message": code})
        elif _large(path):
            data, xet = files[path], {}
            if self.hub.xet:
                route = f"http://127.0.0.1:{self.server.server_address[1]}/xet-token"
                xet = {"X-Xet-Hash": hashlib.sha256(data).hexdigest(), "X-Xet-Refresh-Route": route}
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            # another host, as the hub's storage is: clients follow a redirect on the same one when they only ask
            place = f"http://localhost:{self.server.server_address[1]}/cdn/{kind}{name}/{commit}/{path}"
            self._send(302, headers={"X-Repo-Commit": commit, "Location": place, **linked, **xet})
        else:
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self._file(files[path], {"X-Repo-Commit": commit, "ETag": etag})

    def _file(self, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if found:
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, {"Accept-Ranges": "bytes", **headers}, cut)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def _split_revision(repository: Repository, rest: str) -> tuple[str, str]:
    """'refs/convert/parquet/a/b' → the branch and the path; a branch may hold slashes."""
    for branch in repository.branches:
        if rest == branch or rest.startswith(f"{branch}/"):
            return branch, rest[len(branch) + 1 :]
    revision, _, path = rest.partition("/")
    return revision, path
