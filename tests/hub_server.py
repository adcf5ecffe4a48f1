"""The few endpoints of the Hugging Face Hub that its real client needs, and faults on request."""

import base64
import hashlib
import json
import re
import socket
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_secret"


class HubServer(ThreadingHTTPServer):
    """A Hub on loopback.

    Attributes:
        repos: each repository's files on its main branch, by name.
        tags: files at other revisions, by repository and revision.
        private: repositories that need TOKEN.
        served: names of the files that were sent.
        asked: paths of all requests.
        fault: what goes wrong; None is nothing. ``"cut"``: half of the content arrives, then the
            connection closes. ``"etag"``: the ETag is the same for every content. ``"changed"``: a
            byte of the content is another one. ``"short"``: the content is shorter than HEAD says.
            ``"hang up"``: connections close without an answer. ``"401"``, ``"404"``, ``"500"``:
            every request is refused.
        faulty: end of the names of the files that ``fault`` concerns.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.tags: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.served: list[str] = []
        self.asked: list[str] = []
        self.sockets: list[socket.socket] = []
        self.fault: str | None = None
        self.faulty = ".safetensors"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def get_request(self) -> tuple[socket.socket, Any]:
        self.sockets.append((request := super().get_request())[0])
        return request

    def stop(self) -> None:
        """Refuse new connections and close those that the client keeps open."""
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Files at a branch, tag or commit."""
        revisions = {"main": self.repos[repo]}
        revisions |= {tag: files for (name, tag), files in self.tags.items() if name == repo}
        commits = {commit(files): files for files in revisions.values()}
        return (commits | revisions).get(revision)


def commit(files: dict[str, bytes]) -> str:
    """A commit's hash: another one for other content."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(
        self, status: int, body: bytes = b"", length: int | None = None, **headers: str
    ) -> None:
        """Send a response; a ``length`` beyond the body's breaks the connection after it."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.close_connection = length is not None

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """The repository's files, or None once an error has been sent."""
        fault = self.server.fault
        self.server.asked.append(self.path)
        if fault == "hang up":
            self.close_connection = True
        elif fault == "500":
            self.answer(500)
        elif fault == "401" or (
            repo in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            self.answer(401, X_Error_Message="Invalid credentials")
        elif fault == "404" or repo not in self.server.repos:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif (files := self.server.files(repo, revision)) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            return files
        return None

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (files := self.files(match[1], match[2] or "main")) is not None:
                siblings = [{"rfilename": name} for name in files]
                self.answer_json({"id": match[1], "sha": commit(files), "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (files := self.files(match[1], match[2])) is not None:
                self.answer_json([_entry(name, data) for name, data in files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self.files(match[1], match[2])) is not None:
                self.answer_file(files, match[3])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def answer_file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.server.served.append(name)
        data, tag = files[name], hashlib.sha1(files[name]).hexdigest()
        fault = self.server.fault if name.endswith(self.server.faulty) else None
        if fault == "etag":
            tag = "0" * 40
        elif fault == "changed":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif fault == "short" and self.command == "GET":
            data = data[:-5]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit(files)}
        if fault == "cut" and self.command == "GET":
            return self.answer(200, data[: len(data) // 2], len(data), **headers)
        return self.answer(200, data, **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, X_Error_Message="Invalid credentials")
            self.server.repos.setdefault(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo)
            return self.answer_json({"url": f"{self.server.url}/{repo}"})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+", self.path)
        files = self.files(match[1]) if match else self.answer(404)
        if files is None or match is None:
            return None
        if match[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for n in names
            ]
            return self.answer_json({"files": modes})
        for line in body.splitlines():
            entry: dict[str, Any] = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                files[entry["value"]["path"]] = content
        made = commit(files)
        url = f"{self.server.url}/{match[1]}/commit/{made}"
        return self.answer_json({"commitUrl": url, "commitOid": made, "success": True})


def _entry(name: str, data: bytes) -> dict[str, object]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": oid}
