"""An imitation of the Hugging Face hub: an HTTP server that answers what huggingface_hub asks to send and fetch models.

It is written from the requests that the library makes; the real hub has not been asked.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_imitation"


class Hub(ThreadingHTTPServer):
    """repos: by name, the commits (hash, {file: bytes}) of each, the newest last. requests, bodies: what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add files to a model; the new commit's hash."""
        commits = self.repos.setdefault(name, [])
        files = {**(commits[-1][1] if commits else {}), **files}
        commits.append((hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest(), files))
        return commits[-1][0]

    def start(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.parts()
        if parts[:2] == ["api", "whoami-v2"]:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self.answer({"name": "tester", "type": "user", "orgs": []}) if known else self.refuse(401, "")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        revision = (parts[5:] or ["main"])[0] if parts[0] == "api" else parts[3]
        commits = self.server.repos.get(name)
        if commits is None:
            return self.refuse(404, "RepoNotFound")
        found = [one for one in commits if revision in ("main", one[0])]
        if not found:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found[-1]
        if parts[0] == "api":
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            about = {"id": name, "sha": commit, "siblings": siblings, "private": self.server.private.get(name, False)}
            return self.answer(about)
        if parts[4] not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[parts[4]]
        return self.send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def do_POST(self):
        parts = self.parts()
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.bodies.append(body.encode())
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repos:
                return self.answer({"url": f"{self.server.url}/{name}"}, 409)
            self.server.repos[name] = []
            self.server.commit(name, {".gitattributes": b""})
            self.server.private[name] = asked.get("visibility") == "private"
            return self.answer({"url": f"{self.server.url}/{name}"})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return self.answer({"files": modes})
        sent = [json.loads(line) for line in body.splitlines()]
        files = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in sent if one["key"] == "file"
        }
        commit = self.server.commit(name, files)
        return self.answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}
        )

    def parts(self) -> list[str]:
        self.server.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def answer(self, content: dict, code: int = 200) -> None:
        self.send(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, why: str) -> None:
        self.send(code, b"{}", {"X-Error-Code": why, "Content-Type": "application/json"})

    def send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
