"""What a run begins from: timm's own weights, which one rank per machine fetches from a hub that is here."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from timm.models import PretrainedCfg

from resist_ds.comm import Comm
from tests.conftest import Ranks
from tests.run.test_errors import Outcome
from tests.saved import OPTIONS, outcome

pytestmark = pytest.mark.ranks

SOURCE = PretrainedCfg(hf_hub_id="timm/tiny.a_in1k")
REVISION = "c" * 40


class Hub(ThreadingHTTPServer):
    """One file, as huggingface.co has it; `asked` are the requests."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.content = content
        self.name = "model.safetensors"
        self.asked: list[str] = []


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(self.server.content)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        *_, revision, name = self.path.split("/")
        there = self.path == f"/{SOURCE.hf_hub_id}/resolve/{revision}/{name}" and name == self.server.name
        self.send_response(200 if there else 404)
        if there:
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha256(self.server.content).hexdigest()}"')
            self.send_header("Content-Length", str(len(self.server.content)))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()
        if there:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    torch.manual_seed(1)
    net = timm.create_model(OPTIONS["model"], num_classes=10)
    with Hub(save(net.state_dict(), {"format": "pt"})) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def with_hub(comm: Comm, folder: Path, options: dict[str, Any], port: int) -> Outcome:
    """A run on a machine whose hub is at a port here and whose cache is in `folder`."""
    address = f"http://127.0.0.1:{port}"
    constants.ENDPOINT = address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(folder / "hub")
    constants.HF_HUB_OFFLINE = False
    known = timm.get_pretrained_cfg
    timm.get_pretrained_cfg = lambda name: SOURCE if name == OPTIONS["model"] else known(name)
    return outcome(comm, folder, {"from_pretrained": "timm", "rounds": 1, **options})


def test_timms_weights_are_fetched_once_and_only_where_that_is_asked_for(
    hub: Hub, ranks: Ranks, tmp_path: Path
) -> None:
    options = {"output_dir": str(tmp_path / "run")}
    first, second = ranks(with_hub, 2, tmp_path, options, hub.server_port)
    assert (first.code, second) == (2, (2, ""))
    assert first.stderr == (
        f"error: --from_pretrained timm: the weights timm/tiny.a_in1k are not in {tmp_path}/hub: "
        "type --download to fetch them\n"
    )
    assert hub.asked == []
    results = ranks(with_hub, 2, tmp_path, {**options, "download": True}, hub.server_port)
    assert [r.code for r in results] == [0, 0], results
    assert "starts from the weights in " in (tmp_path / "stdout0").read_text()
    assert [line for line in hub.asked if line.startswith("GET /timm")] == [
        f"GET /{SOURCE.hf_hub_id}/resolve/main/model.safetensors"
    ]
    hub.asked.clear()
    for download in (True, False):  # it is there now
        results = ranks(with_hub, 2, tmp_path, {**options, "download": download}, hub.server_port)
        assert [r.code for r in results] == [0, 0] and hub.asked == []


def test_a_hub_that_does_not_have_them_is_one_line(hub: Hub, ranks: Ranks, tmp_path: Path) -> None:
    hub.name = "elsewhere"
    options = {"output_dir": str(tmp_path / "run"), "download": True}
    first, second = ranks(with_hub, 2, tmp_path, options, hub.server_port)
    assert (first.code, second) == (1, (1, ""))
    assert first.stderr == (
        "error: could not download the weights timm/tiny.a_in1k: it has no pytorch_model.bin\n"
    )
