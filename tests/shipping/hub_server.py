"""The model hub's interface on this machine, as far as huggingface_hub needs it to make, read and write in it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse

LFS_BYTES = 500
"""Files from this size on are uploaded through the large-file protocol."""


class HubServer:
    """Repositories in memory, served at ``url``; ``requests`` are the methods and paths that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, list[str]]] = {}  # branches: their commits' hashes, newest last
        self.private: set[str] = set()
        self.commits: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.forbidden = False
        self.broken_commits = False

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a branch or commit; None where there is none."""
        branches = self.repositories[repository]
        commit = branches[revision][-1] if revision in branches else revision
        return self.commits.get(commit)

    def sha(self, repository: str, revision: str = "main") -> str:
        branches = self.repositories[repository]
        return branches[revision][-1] if revision in branches else revision

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        text = json.dumps([len(self.commits), *sorted((name, len(data)) for name, data in files.items())])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.repositories[repository].setdefault(branch, []).append(sha)
        return sha


class _Handler(http.server.BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.strip("/").split("/")]
        self.server_hub.requests.append(f"{method} {self.path}")
        if self.server_hub.forbidden and method in ("POST", "PUT"):
            self._json(403, {"error": "You have no right to write here"})
            return
        self._answer(parts)

    def _answer(self, parts: list[str]) -> None:
        if parts[:3] == ["api", "repos", "create"]:
            self._create()
        elif parts[0] == "lfs":
            self.server_hub.objects[parts[1]] = self.body
            self._send(200, b"")
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self._batch()
        elif parts[:2] == ["api", "models"]:
            self._model(f"{parts[2]}/{parts[3]}", parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        else:
            self._json(404, {"error": "Not found"})

    def _model(self, repository: str, rest: list[str]) -> None:
        hub = self.server_hub
        if repository not in hub.repositories:
            return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        action, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if action == "branch":
            hub.repositories[repository][revision] = list(hub.repositories[repository]["main"])
            return self._json(200, {})
        if revision not in hub.repositories[repository] and revision not in hub.commits:
            return self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            return self._preupload()
        if action == "commit":
            return self._commit(repository, revision)
        names = [{"rfilename": name} for name in hub.files(repository, revision)]
        found = {"id": repository, "modelId": repository, "sha": hub.sha(repository, revision), "siblings": names}
        return self._json(200, found)

    def _create(self) -> None:
        asked = json.loads(self.body)
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in self.server_hub.repositories:
            return self._json(409, {"error": "exists", "url": f"{self.server_hub.url}/{repository}"})
        self.server_hub.repositories[repository] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.server_hub.private.add(repository)
        self.server_hub.commit(repository, "main", {".gitattributes": b"*.bin filter=lfs\n"})
        return self._json(200, {"url": f"{self.server_hub.url}/{repository}", "name": repository})

    def _preupload(self) -> None:
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["size"] >= LFS_BYTES else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(self.body)["files"]
        ]
        return self._json(200, {"files": files})

    def _batch(self) -> None:
        hub, objects = self.server_hub, []
        for each in json.loads(self.body)["objects"]:
            wanted = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in hub.objects:
                wanted["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}
            objects.append(wanted)
        return self._json(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, branch: str) -> None:
        hub = self.server_hub
        if hub.broken_commits:
            return self._json(400, {"error": "the commit was refused"})
        files = dict(hub.files(repository, branch))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, hub.sha(repository, branch)):
                return self._json(412, {"error": "A commit has happened since"})
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = hub.commit(repository, branch, files)
        return self._json(200, {"commitUrl": f"{hub.url}/{repository}/commit/{sha}", "commitOid": sha})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        content = (self.server_hub.files(repository, revision) or {}).get(name)
        if content is None:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        sha = self.server_hub.sha(repository, revision)
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        return self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
