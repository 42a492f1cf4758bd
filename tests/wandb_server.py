"""A stand-in for wandb's server on loopback: it takes runs, or hangs, and keeps what it was sent."""

import gzip
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

_PROJECT = {"id": "project", "name": "resist_ds", "entity": {"id": "entity", "name": "somebody"}}
_RUN = {
    **{"id": "run", "displayName": "calm-sea-1", "description": None, "sweepName": None, "project": _PROJECT},
    **{"config": "{}", "summaryMetrics": "{}", "historyTail": "[]", "eventsTail": "[]"},
    **{"historyLineCount": 0, "eventsLineCount": 0, "logLineCount": 0, "history": [], "events": []},
}


class Server(http.server.ThreadingHTTPServer):
    """Listens on a free port.

    Attributes:
        url: where.
        received: (path, body) of every request, in order.
        silent: whether requests are taken and not answered, as by a server that hangs.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.received: list[tuple[str, bytes]] = []
        self.silent = False

    def asked(self, operation: str) -> list[dict[str, Any]]:
        """Variables of every GraphQL request of a name."""
        bodies = [json.loads(body) for path, body in self.received if path == "/graphql"]
        return [body["variables"] for body in bodies if body.get("operationName") == operation]

    def run(self) -> dict[str, Any]:
        """What all requests together made of the only run."""
        known = [{k: v for k, v in asked.items() if v is not None} for asked in self.asked("UpsertBucket")]
        return {k: v for asked in known for k, v in asked.items()}

    def history(self) -> dict[str, list[dict[str, Any]]]:
        """{run's id: its rows}."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for path, body in self.received:
            if path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                rows.setdefault(path.split("/")[-2], []).extend(json.loads(line) for line in lines)
        return rows

    def summary(self) -> dict[str, Any]:
        """The last summary that any run sent."""
        last: dict[str, Any] = {}
        for path, body in self.received:
            if path.endswith("/file_stream"):
                for line in (
                    json.loads(body).get("files", {}).get("wandb-summary.json", {}).get("content", [])
                ):
                    last = json.loads(line)
        return last

    def files(self) -> set[str]:
        """Names of the files that were uploaded."""
        return {path.removeprefix("/upload/") for path, _ in self.received if path.startswith("/upload/")}

    def handle_error(self, *args: object) -> None:
        """A client that is gone is no error."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Data of the answer to a GraphQL request."""
        operation, variables = request.get("operationName"), request.get("variables") or {}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": {**_RUN, "name": variables["name"]}, "inserted": True}}
        if operation == "Viewer":
            viewer = {"id": "viewer", "entity": "somebody", "username": "somebody", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = urlsplit(self.path).path
        self.server.received.append((path, body))
        while self.server.silent:
            time.sleep(0.05)
        answer = {"data": self.server.answer(json.loads(body))} if path == "/graphql" else {}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: object) -> None:
        """Not on the terminal."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server at work."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.silent = False
        server.shutdown()
        server.server_close()
        thread.join()
