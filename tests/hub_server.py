"""A Hub on this machine: the few calls that huggingface_hub makes, answered from folders, and trouble on demand."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

MAX_REQUESTS = 2000
"""After so many the server answers 508: no client may ask without end."""


def etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Hub(ThreadingHTTPServer):
    """The server, and what it plays.

    Attributes:
        revisions: repository -> branch or commit -> folder.
        refused: repository -> status, the Hub's code for the reason and, where it has one, its message.
        moved: old name -> new name, answered by a redirection.
        breaks: file -> how many bytes of it are sent before the connection is cut, once for each item.
        after: file -> what to do when it is about to be sent.
        log: names of the files that were sent, in order.
        ranges: file -> the `Range` of each request for it.
        mangle: called with a path, status, headers and body, returns what is answered instead.
        tokens: that came with requests for repositories.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions, self.refused, self.moved, self.breaks, self.after = {}, {}, {}, {}, {}
        self.mangle = lambda path, status, headers, body: (status, headers, body)
        self.log, self.ranges, self.tokens, self.count = [], {}, [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, repo, folder, branch="main"):
        """Make a folder the present state of a branch; return its commit."""
        content = "".join(name + etag(path) for name, path in files_of(folder).items())
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.revisions.setdefault(repo, {}).update({branch: folder, commit: folder})
        return commit

    def commit_of(self, repo, folder):
        return next(name for name, one in self.revisions[repo].items() if one is folder and len(name) == 40)

    def handle_error(self, request, client_address):
        """Say nothing of connections that were cut on purpose."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, send_body):
        hub = self.server
        hub.count += 1
        path = unquote(urlparse(self.path).path).strip("/")
        api = path.startswith("api/models/")
        if api or not path.startswith("api/"):  # else a question of huggingface_hub's own
            hub.tokens.append(self.headers.get("Authorization"))
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        rest = path.removeprefix("api/models/").removeprefix(repo).strip("/")
        if hub.count > MAX_REQUESTS:
            return self.reply(508, b"{}", send_body)
        if repo in hub.moved:
            return self.reply(307, b"", send_body, {"Location": self.path.replace(repo, hub.moved[repo], 1)})
        if repo in hub.refused:
            status, *reasons = hub.refused[repo]
            names = zip(("X-Error-Code", "X-Error-Message"), reasons, strict=False)
            return self.reply(status, b"{}", send_body, {name: reason for name, reason in names if reason})
        if repo not in hub.revisions:
            return self.reply(404, b"{}", send_body, {"X-Error-Code": "RepoNotFound"})
        revision = rest.split("/")[1] if "/" in rest else "main"
        folder = hub.revisions[repo].get(revision)
        if folder is None:
            return self.reply(404, b"{}", send_body, {"X-Error-Code": "RevisionNotFound"})
        return self.tell(repo, folder, rest, send_body) if api else self.send(repo, folder, rest, send_body)

    def tell(self, repo, folder, rest, send_body):
        """Answer a question about a repository."""
        files = files_of(folder)
        if rest.startswith("tree"):
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                for name, path in files.items()
            ]
            return self.reply(200, json.dumps(tree).encode(), send_body)
        info = {
            "id": repo, "modelId": repo, "sha": self.server.commit_of(repo, folder), "tags": [], "private": False,
            "siblings": [{"rfilename": name} for name in files],
        }  # fmt: skip
        return self.reply(200, json.dumps(info).encode(), send_body)

    def send(self, repo, folder, rest, send_body):
        """Send a file, or a part of it."""
        hub, name = self.server, "/".join(rest.split("/")[2:])  # resolve/REVISION/NAME
        files = files_of(folder)
        if name not in files:
            return self.reply(404, b"", send_body, {"X-Error-Code": "EntryNotFound"})
        content = files[name].read_bytes()
        headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": hub.commit_of(repo, folder)}
        if not send_body:
            return self.reply(200, content, send_body, headers)
        hub.log.append(name)
        hub.ranges.setdefault(name, []).append(self.headers.get("Range"))
        status, first = 200, 0
        if self.headers.get("Range"):
            status, first = 206, int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = hub.breaks[name].pop(0) if hub.breaks.get(name) else None
        if name in hub.after:  # before the client has it and can ask for more
            hub.after.pop(name)()
        self.reply(status, content[first:], send_body, headers, cut)

    def reply(self, status, body, send_body, headers=None, cut=None):
        status, headers, body = self.server.mangle(self.path, status, dict(headers or {}), body)
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body if cut is None else body[:cut])


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a server on the loopback address as long as the context lasts."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
