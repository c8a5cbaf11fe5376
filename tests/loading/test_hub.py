"""Uploads to a server on loopback that speaks as much of the hub's protocol as they take."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import selfkd


class Hub(BaseHTTPRequestHandler):
    """Keeps the repositories that are created, and the files that are committed to them."""

    repositories: dict[str, dict[str, Any]]
    files: dict[str, bytes]
    tokens: set[str | None]

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        self.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'user'}/{given['name']}"
            self.repositories[name] = given
            self._answer({"url": f"{self.home}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for name in names
            ]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            place = f"{self.home}/user/model/commit/1"
            self._answer({"commitUrl": place, "commitOid": "1", "success": True})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self.send_error(404)

    @property
    def home(self) -> str:
        return f"http://{self.headers['Host']}"

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    own = type("OwnHub", (Hub,), {"repositories": {}, "files": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    yield own
    server.shutdown()
    server.server_close()
    thread.join()


def is_private(given: Mapping[str, Any]) -> bool:
    """Return what a request to create a repository says, as versions of the client say it."""
    return bool(given.get("private", given.get("visibility") == "private"))


def test_a_model_is_pushed_with_its_card(lineage: Path, hub: type[Hub], tmp_path: Path) -> None:
    model = selfkd.load(lineage)
    address = model.push_to_hub("user/model", token="secret-token")
    assert address.endswith("/user/model")
    ((name, given),) = hub.repositories.items()
    assert name == "user/model"
    assert is_private(given)
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    card = hub.files["README.md"].decode()
    assert card == model.card.replace("USER/NAME", "user/model")
    assert 'selfkd.load(snapshot_download("user/model"))' in card
    assert not any(b"secret-token" in content for content in hub.files.values())
    assert hub.tokens == {"Bearer secret-token"}
    for file, content in hub.files.items():
        (tmp_path / file).write_bytes(content)
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    again = selfkd.load(tmp_path)
    assert torch.equal(again.predict(images).probabilities, model.predict(images).probabilities)


def test_a_run_is_pushed_where_it_is_asked_to_be_public(compressed: Path, hub: type[Hub]) -> None:
    selfkd.push_to_hub(compressed, "user/model", private=False, token="t")
    (given,) = hub.repositories.values()
    assert not is_private(given)
    assert b"distils an ensemble" in hub.files["README.md"]


def test_without_the_hubs_client_the_way_out_is_said(
    lineage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="huggingface_hub must be installed to push to the hub"):
        selfkd.push_to_hub(lineage, "user/model")
