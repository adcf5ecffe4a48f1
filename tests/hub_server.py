"""The few endpoints of the Hugging Face Hub that its real client needs for a round trip."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_secret"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """A Hub on loopback. ``repos`` maps a repository to its files; ``private`` ones need TOKEN."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.served: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": _COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def files(self, repo: str) -> dict[str, bytes] | None:
        """The repository's files, or None once an error has been sent."""
        if repo in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, X_Error_Message="Invalid credentials")
        elif repo not in self.server.repos:
            self.answer(404, X_Error_Code="RepoNotFound")
        else:
            return self.server.repos[repo]
        return None

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", self.path):
            if (files := self.files(match[1])) is not None:
                siblings = [{"rfilename": name} for name in files]
                self.answer_json({"id": match[1], "sha": _COMMIT, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^?]+(\?.*)?", self.path):
            if (files := self.files(match[1])) is not None:
                self.answer_json([_entry(name, data) for name, data in files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            if (files := self.files(match[1])) is not None:
                self.server.served.append(match[2])
                etag = f'"{hashlib.sha1(files[match[2]]).hexdigest()}"'
                self.answer(200, files[match[2]], ETag=etag)
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(asked[key] for key in ("organization", "name") if asked.get(key))
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
        commit = {"commitUrl": f"{self.server.url}/{match[1]}/commit/{_COMMIT}"}
        return self.answer_json({**commit, "commitOid": _COMMIT, "success": True})


def _entry(name: str, data: bytes) -> dict[str, object]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": oid}
