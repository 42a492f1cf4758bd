"""A wandb server on loopback: it answers what unmodified `wandb sweep` and `wandb agent` ask.

It hands out the trials of a grid, one at a time to each agent, and can have a run stopped, as wandb's own
does for a person or for early termination. What trials log does not come here: WANDB_MODE is offline.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import yaml

ENTITY, PROJECT = "tests", "sweeps"
KEY = "0" * 40  # of a form that wandb accepts


class WandbStub:
    """Serves from entering to leaving the context.

    Attributes:
        trials: the parameters of every trial that was handed out, by sweep and run.
        stopped: runs that their agents were asked to stop.
        unknown: operations that had no answer.
    """

    def __init__(self) -> None:
        self.trials: dict[str, dict[str, dict[str, Any]]] = {}
        self.stopped: set[str] = set()
        self.unknown: list[str] = []
        self._configs: dict[str, str] = {}
        self._points: dict[str, list[dict[str, Any]]] = {}  # yet to be handed out
        self._agents: dict[str, str] = {}  # agent: sweep
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                with stub._lock:
                    data = stub._answer(operation[1] if operation else "", request.get("variables") or {})
                body = {"data": data} if data is not None else {"errors": [{"message": "unknown operation"}]}
                text = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes wandb's command line talk to this server, and to nobody else."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_MODE": "offline",
        }

    def __enter__(self) -> "WandbStub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, sweep: str, *points: dict[str, Any]) -> None:
        """More trials, after those of the grid."""
        with self._lock:
            self._points[sweep] += points

    def _answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._sweep_with_runs,
            "CreateAgent": self._create_agent,
            "Heartbeat": self._heartbeat,
        }
        if operation not in answers:
            self.unknown.append(operation)
            return None
        return answers[operation](variables)

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}}}

    def _upsert_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = f"sweep{len(self._configs)}"
        self._configs[sweep] = variables["config"]
        parameters = yaml.safe_load(variables["config"])["parameters"]
        names = list(parameters)
        choices = [p["values"] if "values" in p else [p["value"]] for p in parameters.values()]
        self._points[sweep] = [dict(zip(names, point, strict=True)) for point in itertools.product(*choices)]
        self.trials[sweep] = {}
        project = {"id": "1", "name": PROJECT, "entity": {"id": "1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": sweep, "project": project}, "configValidationWarnings": []}}

    def _sweep_with_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = variables["sweep"]
        found = {"id": sweep, "name": sweep, "config": self._configs[sweep], "runs": {"edges": []}}
        return {"project": {"sweep": found}}

    def _create_agent(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = f"agent{len(self._agents)}"
        self._agents[agent] = variables["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = self._agents[variables["id"]]
        running = json.loads(variables["runState"])
        commands = [{"type": "stop", "run_id": run} for run in running if run in self.stopped]
        if not running and self._points[sweep]:
            point = self._points[sweep].pop(0)
            run = f"{sweep}-{len(self.trials[sweep])}"
            self.trials[sweep][run] = point
            args = {name: {"value": value} for name, value in point.items()}
            program = yaml.safe_load(self._configs[sweep])["program"]
            commands = [{"type": "run", "run_id": run, "program": program, "args": args}]
        elif not running:
            commands = [{"type": "exit"}]
        agent = {"agent": {"id": variables["id"]}}
        return {"agentHeartbeat": agent | {"commands": json.dumps(commands)}}
