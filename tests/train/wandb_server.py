"""What wandb's client talks to, as far as it needs one, on this machine: it keeps the history of runs as wandb's server
does, line by line at the place that the client names, and can be told to fail in the ways that servers do."""

import contextlib
import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


class WandbServer:
    """Its address is `url`; `ill` is empty, "hangs", "dies" (drops every connection), or an HTTP status."""

    def __init__(self) -> None:
        self.ill = ""
        self.runs: dict[str, Run] = {}
        self.asked = 0
        """How many requests there were."""
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """For a client."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def close(self) -> None:
        """Nobody listens any more."""
        self.ill = ""
        self._http.shutdown()
        self._http.server_close()

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        """What the server says to a GraphQL query."""
        given = query.get("variables") or {}
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "ada"}}
        match query.get("operationName"):
            case "RunResumeStatus":
                run = self.runs.get(given["name"])
                return {"model": project | {"bucket": run and run.status()}}
            case "UpsertBucket":
                run = self.runs.setdefault(given["name"], Run(given["name"]))
                run.config |= {name: each["value"] for name, each in json.loads(given["config"] or "{}").items()}
                bucket = {"id": "r", "name": run.name, "displayName": run.name, "project": project}
                return {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(run.history)}, "inserted": True}}
            case "CreateRunFiles":
                self.runs[given["run"]].files |= set(given["files"])
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, name: str, given: dict[str, Any]) -> None:
        """Take what a run streams."""
        chunk = given.get("files", {}).get("wandb-history.jsonl")
        if chunk:
            lines = [json.loads(line) for line in chunk["content"]]
            run = self.runs[name]
            run.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
        if given.get("complete"):
            self.runs[name].exit_codes.append(given["exitcode"])


class Run:
    """What the server knows of a run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.files: set[str] = set()
        self.exit_codes: list[int] = []

    def status(self) -> dict[str, Any]:
        """What the client asks for to go on with it."""
        return {
            "id": "r",
            "name": self.name,
            "displayName": self.name,
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps({name: {"value": value} for name, value in self.config.items()}),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_test: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server_of_test
        server.asked += 1
        if server.ill:
            self._fail(server.ill)
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/graphql":
            self._say(200, {"data": server.answer(json.loads(body))})
        else:
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            self._say(200, {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._say(200, {})

    def do_GET(self) -> None:
        self._say(200, {})

    def _fail(self, how: str) -> None:
        if how == "hangs":
            # As long as it is to hang, so that nothing of it outlives the test.
            while self.server_of_test.ill == how:
                time.sleep(0.1)
        if how in ("hangs", "dies"):
            self.close_connection = True
            return
        self._say(int(how), {"error": "no"})

    def _say(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[WandbServer]:
    """A server of wandb's."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()
