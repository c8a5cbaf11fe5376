"""A W&B server on loopback that answers what the installed client asks, and keeps a record of it.

It speaks the part of W&B's GraphQL, file-stream and upload protocols that runs and artifacts need,
checks the key, and can be made to refuse, to be slow, to fall silent, to die and to come back.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "5e1f" * 10
ENTITY = "tester"
Answer = dict[str, Any]


@dataclass
class Run:
    """What the server knows of a run."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    """Of the last UpsertBucket: groupName, jobType, tags, notes, config, …"""
    streams: dict[str, list[str]] = field(default_factory=dict)
    """Lines of each file-stream file."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, step by step."""
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", []) if line]

    @property
    def summary(self) -> dict[str, Any]:
        """The latest summary."""
        lines = self.streams.get("wandb-summary.json", [])
        return json.loads(lines[-1]) if lines else {}

    @property
    def config(self) -> dict[str, Any]:
        """The config."""
        return {k: v["value"] for k, v in json.loads(self.values.get("config") or "{}").items()}


@dataclass
class Version:
    """A version of an artifact."""

    id: str
    type: str
    name: str
    digest: str
    metadata: dict[str, Any]
    client_id: str
    producer: str | None
    aliases: set[str] = field(default_factory=set)
    consumers: set[str] = field(default_factory=set)
    state: str = "PENDING"
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class WandbServer:
    """A server in threads of this process; use it as a context manager.

    Attributes:
        delay: seconds before each answer.
        refuse: answer every request with 401.
        mute: accept requests and never answer.
    """

    def __init__(self, port: int = 0) -> None:
        self.delay, self.refuse, self.mute = 0.0, False, False
        self.requests: list[tuple[str, str]] = []
        """Kind (`graphql`, `file_stream`, `upload`, `probe`) and name of each, in order."""
        self.unknown: list[str] = []
        self.runs: dict[str, Run] = {}
        self.versions: list[Version] = []
        self.seen = bytearray()
        """The bodies of all requests, to look for what must not be sent."""
        self._uploads: dict[str, Callable[[bytes], None]] = {}
        self._lock = threading.Lock()
        self._port = port
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> WandbServer:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start, or come back at the same address with what was known."""
        self._server = _Http(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Die: connections are refused from now on, and those open are cut."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def kinds(self) -> Counter[str]:
        """Count the requests by kind and name."""
        with self._lock:
            return Counter(f"{kind} {name}" for kind, name in self.requests)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Wait until a condition holds; return whether it does."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def graphql(self, query: str, variables: dict[str, Any]) -> Answer:
        """Answer a GraphQL request."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query[:60]
        with self._lock:
            self.requests.append(("graphql", name))
            answer = getattr(self, f"_on_{name}", None)
            if answer is None:
                self.unknown.append(query)
                return {"data": None, "errors": [{"message": f"unknown to this server: {name}"}]}
            return {"data": answer(variables)}

    def file_stream(self, run: str, body: dict[str, Any]) -> Answer:
        """Take lines of files, at their offsets."""
        with self._lock:
            self.requests.append(("file_stream", "complete" if body.get("complete") else "lines"))
            known = self._run(run)
            for name, part in (body.get("files") or {}).items():
                lines = known.streams.setdefault(name, [])
                del lines[part["offset"] :]
                lines.extend(part["content"])
            if body.get("exitcode") is not None:
                known.exit_code = body["exitcode"]
        return {"exitcode": None, "limits": {}}

    def upload(self, path: str, body: bytes) -> bool:
        """Take a file; return whether it was announced."""
        with self._lock:
            take = self._uploads.get(path)
            self.requests.append(("upload", path.split("/")[2]))
            if take is not None:
                take(body)
        return take is not None

    def _run(self, name: str) -> Run:
        return self.runs.setdefault(name, Run(name))

    def _announce(self, kind: str, name: str, take: Callable[[bytes], None]) -> str:
        path = f"/upload/{kind}/{len(self._uploads)}/{name}"
        self._uploads[path] = take
        return f"{self.url}{path}"

    def _version(self, id: str) -> Version:
        return next(version for version in self.versions if version.id == id)

    # Answers, by the names of the client's queries.

    def _on_Viewer(self, variables: Answer) -> Answer:  # noqa: N802
        teams: Answer = {"edges": []}
        viewer = {"id": "u1", "entity": ENTITY, "username": ENTITY, "email": "t@example.com"}
        return {"viewer": {**viewer, "flags": "{}", "teams": teams}}

    def _on_ServerFeaturesQuery(self, variables: Answer) -> Answer:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _on_RunResumeStatus(self, variables: Answer) -> Answer:  # noqa: N802
        entity = {"id": "e1", "name": ENTITY}
        model = {"id": "p1", "name": variables["project"], "entity": entity, "bucket": None}
        run = self.runs.get(variables["name"])
        if run is not None and run.values:
            lines = {f: run.streams.get(f"wandb-{f}.jsonl", []) for f in ("history", "events")}
            model["bucket"] = {
                "id": f"id-{run.name}",
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.name,
                "logLineCount": 0,
                "historyLineCount": len(lines["history"]),
                "eventsLineCount": len(lines["events"]),
                "historyTail": json.dumps(lines["history"][-1:]),
                "eventsTail": json.dumps(lines["events"][-1:]),
                "config": run.values.get("config") or "{}",
                "tags": run.values.get("tags") or [],
                "notes": run.values.get("notes"),
                "wandbConfig": "{}",
            }
        return {"model": model}

    def _on_UpsertBucket(self, variables: Answer) -> Answer:  # noqa: N802
        name = variables.get("name") or variables["id"].removeprefix("id-")
        inserted = name not in self.runs
        run = self._run(name)
        run.values |= {key: value for key, value in variables.items() if value is not None}
        project = {
            "id": "p1",
            "name": run.values.get("project"),
            "entity": {"id": "e1", "name": ENTITY},
        }
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.values.get("displayName"),
            "description": None,
            "config": run.values.get("config"),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.streams.get("wandb-history.jsonl", [])),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_OrganizationCoreWeaveOrganizationID(self, variables: Answer) -> Answer:  # noqa: N802
        return {"entity": {"organization": None}}

    def _on_RunStoppedStatus(self, variables: Answer) -> Answer:  # noqa: N802
        return {"project": {"run": {"stopped": False}}}

    def _on_CreateRunFiles(self, variables: Answer) -> Answer:  # noqa: N802
        run = self._run(variables["run"])

        def file(name: str) -> Answer:
            def take(body: bytes) -> None:
                run.files[name] = body

            return {"name": name, "uploadUrl": self._announce("run", name, take)}

        files = [file(name) for name in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{run.name}", "uploadHeaders": [], "files": files}}

    def _on_CreateArtifact(self, variables: Answer) -> Answer:  # noqa: N802
        given = variables["input"]
        names = (given["artifactTypeName"], given["artifactCollectionName"])
        same = [v for v in self.versions if (v.type, v.name) == names]
        known = [v for v in same if v.digest == given["digest"]]
        if known:
            version = known[0]
        else:
            version = Version(
                id=f"artifact-{len(self.versions)}",
                type=names[0],
                name=names[1],
                digest=given["digest"],
                metadata=json.loads(given.get("metadata") or "{}"),
                client_id=given["clientID"],
                producer=given.get("runName"),
            )
            self.versions.append(version)
        version.producer = version.producer or given.get("runName")
        version.aliases |= {alias["alias"] for alias in given.get("aliases") or []}
        latest = next((v.id for v in reversed(same) if v.state == "COMMITTED"), None)
        sequence = {"latestArtifact": latest and {"id": latest}}
        artifact = {"id": version.id, "state": version.state, "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _on_CreateArtifactManifest(self, variables: Answer) -> Answer:  # noqa: N802
        version = self._version(variables["artifactID"])

        def take(body: bytes) -> None:
            version.manifest = json.loads(body)

        file = {"id": f"file-{version.id}", "uploadHeaders": []}
        if variables["includeUpload"]:
            file["uploadUrl"] = self._announce("manifest", version.id, take)
        manifest = {"id": f"manifest-{version.id}", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_CreateArtifactFiles(self, variables: Answer) -> Answer:  # noqa: N802
        def edge(spec: Answer) -> Answer:
            version = self._version(spec["artifactID"])

            def take(body: bytes) -> None:
                version.files[spec["name"]] = body

            node = {
                "storagePath": spec["name"],
                "uploadUrl": self._announce("artifact", spec["name"], take),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": version.id},
            }
            return {"node": node}

        edges = [edge(spec) for spec in variables["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, variables: Answer) -> Answer:  # noqa: N802
        version = self._version(variables["artifactID"])
        version.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}

    def _on_UseArtifact(self, variables: Answer) -> Answer:  # noqa: N802
        given = variables["input"]
        self._version(given["artifactID"]).consumers.add(given["runName"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}


class _Http(ThreadingHTTPServer):
    """Cuts the connections that are open when it stops, as a process that dies does."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._sockets: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._sockets.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for request in list(self._sockets):
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away, or that was cut, is no fault."""


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    expected = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Nothing: the record is kept elsewhere."""

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _reply(self, status: int, answer: Answer) -> None:
            while server.mute:
                time.sleep(0.05)
            time.sleep(server.delay)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            server.requests.append(("probe", self.path))
            self._reply(404, {})

        def do_PUT(self) -> None:
            body = self._body()
            server.seen += body
            self._reply(200 if server.upload(self.path, body) else 404, {})

        def do_POST(self) -> None:
            body = self._body()
            server.seen += body
            if self.path.startswith("/sdk/otel/"):  # the client's own telemetry
                server.requests.append(("telemetry", self.path))
                self._reply(200, {})
                return
            if server.refuse or self.headers.get("Authorization") != expected:
                server.requests.append(("refused", self.path))
                self._reply(401, {"errors": [{"message": "user is not logged in"}]})
                return
            while server.mute:
                time.sleep(0.05)
            given = json.loads(body)
            if self.path == "/graphql":
                self._reply(200, server.graphql(given["query"], given.get("variables") or {}))
            elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self._reply(200, server.file_stream(found[1], given))
            else:
                server.unknown.append(self.path)
                self._reply(404, {})

    return Handler
