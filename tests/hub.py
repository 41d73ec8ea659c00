"""A small Hub on 127.0.0.1: repositories of models and datasets that are folders, read by the real clients."""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves `root`/NAMESPACE/NAME as NAMESPACE/NAME, whether model or dataset; `requests` lists what was asked for."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.requests = root, []
        self.private: dict[str, bool] = {}
        self.branches: list[str] = []
        self.cut: list[str] = []  # a post whose path holds the first of these is cut off in the middle
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to take this for the Hub; to be set before the libraries are imported."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_dummy",
        }


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.body()
        path = urlsplit(self.path).path.strip("/").split("/")
        if self.server.cut and self.server.cut[0] in path:
            self.server.cut.pop(0)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif (
            path[:3] == ["api", "repos", "create"]
            or path[-2:-1] == ["commit"]
            or path[4:5] in (["preupload"], ["branch"])
        ):
            self.write(path, body)
        elif path == ["api", "validate-yaml"]:
            self.reply({"errors": [], "warnings": []})
        else:
            self.do_GET(json.loads(body) if body.startswith("{") else None, body)

    def body(self) -> str:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts).decode()

    def write(self, path: list[str], body: str) -> None:
        """Repositories are made, files committed; every token but the dummy is refused."""
        self.server.requests.append("/".join(path))
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.headers.get("Authorization") != "Bearer hf_dummy":
            self.reply({"error": "Invalid username or password."}, 401)
        elif path[2] == "create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            name = name if "/" in name else f"me/{name}"
            if name.startswith("others/"):
                self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            self.reply({"url": f"{address}/{name}", "name": name, "id": name})
        elif path[4] == "preupload":
            files = json.loads(body)["files"]
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif path[4] == "branch":
            self.server.branches.append(path[5])
            self.reply({})
        elif path[5] == "protected":
            self.reply({"error": "Forbidden: the branch protected may not be written to"}, 403)
        else:
            folder = self.server.root.joinpath(*path[2:4])
            for line in filter(None, body.splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = folder / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            name = "/".join(path[2:4])
            self.reply({"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/{name}/commit/{COMMIT}"})

    def do_GET(self, posted: dict | None = None, form: str = "") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(path)
        kind, *rest = path.split("/")
        if kind == "api" and rest[1:2] != ["gated"] and rest[0] in ("datasets", "models"):
            self.api("/".join(rest[1:3]), rest[3:], posted, form)
        elif kind == "gated" or rest[1:2] == ["gated"]:
            refused = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
            self.reply({"error": "Access to this model is restricted"}, 403, refused)
        elif kind == "datasets" and rest[2] == "resolve":
            self.send_path(self.server.root.joinpath(*rest[:2], *rest[4:]))
        elif rest[1:2] == ["resolve"]:
            self.send_path(self.server.root.joinpath(kind, rest[0], *rest[3:]))
        else:
            self.send_error(404)

    def api(self, name: str, call: list[str], posted: dict | None, form: str) -> None:
        folder = self.server.root / name
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if not files:
            self.reply({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif call[:1] in ([], ["revision"]):
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in files]
            self.reply({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        elif call[0] == "tree":
            below = folder.joinpath(*call[2:])
            inside = [p for p in sorted(folder.rglob("*")) if below in p.parents]
            if "recursive=true" not in self.path.lower():
                inside = [p for p in inside if p.parent == below]
            self.reply([self.entry(folder, p) for p in inside]) if inside else self.missing()
        elif call[0] == "paths-info":
            wanted = (posted or {}).get("paths") or [
                unquote(part.removeprefix("paths=")) for part in form.split("&") if part.startswith("paths=")
            ]
            self.reply([self.entry(folder, folder / p) for p in wanted if (folder / p).exists()])
        else:
            self.send_error(404)

    def entry(self, folder: Path, path: Path) -> dict:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}

    def send_path(self, path: Path) -> None:
        if not path.is_file():
            self.missing()
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            content = content[int(first) : end + 1]
        self.send(content, 206 if wanted else 200, headers)

    def missing(self) -> None:
        self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def reply(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(answer).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


IN_A_PROCESS = """
import contextlib, io, json, os, sys
from hf_lnfree.cli.main import main
results = []
for arguments, environment in json.loads(sys.argv[1]):
    sys.argv = ["hf-lnfree", *arguments]
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        from hf_lnfree.cli.app import console
        from hf_lnfree.cli.main import errors
        errors.file, console.file = err, out
        code = main(arguments)
    results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(results))
"""


def run_commands(hub: Hub, commands: list[tuple[list[str], dict[str, str]]], **environment: str) -> list[dict]:
    """Commands of the console script with the environment that each adds, one after the other in one process that takes
    `hub` for the Hub: the libraries read where it is when they are imported."""
    environment = {**os.environ, **hub.environment, "HF_HOME": str(hub.root / "home"), **environment}
    start = [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS, json.dumps(commands)]
    done = subprocess.run(start, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
