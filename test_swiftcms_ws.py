"""Tests of swiftcms_ws: real servers on free ports, real sockets and clients, real browsers.

Run from the folder with pyproject.toml; tests skip what a machine does not have (Chromium, Firefox,
Redis, nginx, npm):

    .venv/bin/pytest -q -n 2                       # all tests
    .venv/bin/pytest -q -k resume                  # tests with a word in their names
    .venv/bin/pytest -q -m core                    # a few tests of each part, in seconds

Sections. The first section has all helpers. The others are those of the module: the tests of its
section 6, Registry, are below `# == 6. Registry` here. Sections 20 and 21 test README, the package,
and everything together under noise, load and the model.

Helpers. `Server` is a site in this process and `Client` a strict WebSocket client, so most tests
are `with Server(…) as server, server.client() as client:`. `Process` runs a site in a process of
its own, and `Browser` opens its pages in Chromium. `until(condition, name)` waits: no test sleeps.
`log_lines` reads the log. Only the functions below "Access to internals" use private names of the
module.

Core. Tests marked `core` touch each part of the module. CI runs them on the oldest and the newest
Python, with the lowest and the newest package versions. It runs all tests on one Python.

Model. Hypothesis invents what publishers, clients, processes and logs do to each other, and
compares what each client received with a list of all published events. It is at the end of this
file, where MODEL_SETTINGS says how to run it for hours.

A warning, or an exception in any thread, fails the test in which it happens (see pyproject.toml).
"""

from __future__ import annotations

import asyncio
import base64
import configparser
import contextlib
import dataclasses
import errno
import functools
import gc
import heapq
import hmac
import inspect
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timezone
from decimal import Decimal
from enum import Enum
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import hypothesis
import jwt
import pytest
import simple_websocket
import sqlalchemy
import sqlalchemy.ext.asyncio
from flask import (
    Blueprint,
    Flask,
    Response,
    current_app,
    flash,
    g,
    get_flashed_messages,
    make_response,
    redirect,
    render_template_string,
    request,
    send_file,
    session,
)
from flask.json.provider import DefaultJSONProvider
from flask.sessions import SecureCookieSessionInterface, SessionInterface, SessionMixin
from flask.testing import FlaskClient
from flask_sock import Sock
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import orm
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import make_server
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import FrameProtocol, Opcode
from wsproto.utilities import LocalProtocolError

import swiftcms_ws
from swiftcms_ws import EVERYONE, Connection, Engine, Hub, WeakList, now_milliseconds

HERE = Path(__file__).parent
SEED = HERE.parent / "shared" / "seed" / "websocket-api.md"
KEY = "a key for tests that is longer than the 64 bytes that HS512 asks for, and so for all"
# How long until() and sockets wait for what must happen, in seconds: a busy machine is slow.
PATIENCE = 20.0
# Factor for bounds of time: CI runs several tests at the same time.
SLOWNESS = 3 if os.environ.get("CI") else 1
# Heartbeat interval of tests that must see no heartbeat.
NEVER = 86_400

# A shell's background jobs ignore SIGINT, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


# == Tools =========================================================================================


# -- Servers in this process -----------------------------------------------------------------------


class Server:
    """An app with a hub under Werkzeug's threaded server, on a free port."""

    def __init__(
        self, configure: Callable[[Flask, Hub], None] | None = None, **config: Any
    ) -> None:
        self.hub = Hub()
        self.app = Flask("site")
        self.app.secret_key = KEY
        for name, value in config.items():
            self.app.config[f"SWIFTCMS_WS_{name}"] = value
        if configure is not None:
            configure(self.app, self.hub)
        self.hub.init_app(self.app)
        ssl_context = self.app.config.get("TEST_SSL")
        self._http = make_server("127.0.0.1", 0, self.app, threaded=True, ssl_context=ssl_context)
        self.port: int = self._http.port
        target = self._http.serve_forever
        self._thread = threading.Thread(target=target, args=(0.005,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hub.close()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(PATIENCE)

    def publish(
        self, number: int = 0, kind: str = "content.created", to: Any = EVERYONE, **more: Any
    ) -> str:
        """Publish an event with the payload {"n": number, **more}, and return its id."""
        return self.hub.publish(kind, "posts", {"n": number, **more}, to=to)

    def client(self, **options: Any) -> Client:
        """Connect a client; `options` are those of Client."""
        return Client(self.port, **options)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Request a page; return status, headers and body."""
        return http(f"http://127.0.0.1:{self.port}{path}", **headers)

    def handshake(
        self, path: str = "/ws", first_line: str | None = None, **changes: str | None
    ) -> tuple[int, dict[str, str], Any]:
        """Send upgrade_request() and disconnect; return status, headers and the JSON body."""
        sent = upgrade_request(self.port, path, first_line, **changes)
        method = sent.split()[0].decode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            sock.sendall(sent)
            with HTTPResponse(sock, method=method) as response:
                response.begin()
                headers, body = dict(response.getheaders()), response.read()
        is_json = headers.get("Content-Type") == "application/json"
        return response.status, headers, json.loads(body) if is_json and body else None


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with the default configuration."""
    with Server() as running:
        yield running


@contextlib.contextmanager
def served(app: Flask) -> Iterator[int]:
    """Serve an app that the test has created, and yield the port. The test closes the hub."""
    http_server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=http_server.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    try:
        yield http_server.port
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join(PATIENCE)


def http(
    url: str, method: str = "GET", data: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send an HTTP request, with `data` as JSON; return status, headers and body."""
    body = None if data is None else json.dumps(data).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        sent["Content-Type"] = "application/json"
    ask = urllib.request.Request(url, body, sent, method=method)
    try:
        with urllib.request.urlopen(ask, timeout=PATIENCE) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


# -- A WebSocket client ----------------------------------------------------------------------------


class Refused(Exception):
    """The server refused the handshake with this HTTP status."""


class Closed(Exception):
    """The server closed the connection with this code, or without a close frame (None)."""

    def __init__(self, code: int | None, reason: str | None) -> None:
        super().__init__(f"{code} {reason}")
        self.code, self.reason = code, reason


class Client:
    """A client that offers permessage-deflate, as browsers do, and accepts no protocol error.

    A reserved bit, a malformed frame, text that is not UTF-8, or a byte after the server's close
    frame fails the test.
    """

    # False: the client ignores pings.
    answers_pings = True

    def __init__(
        self,
        port: int,
        path: str = "/ws",
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        greeted: bool = True,
        sock: socket.socket | None = None,
    ) -> None:
        self.sock = sock or socket.socket()
        self.messages: deque[dict[str, Any]] = deque()
        self.pings = 0
        # The next `ref` of ask().
        self.refs = itertools.count(1)
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._text = ""
        self._status = 0
        self._closed: Closed | None = None
        if receive_buffer is not None:
            # For a client that reads slowly. Otherwise the loopback device buffers megabytes.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self.sock.settimeout(PATIENCE)
        if sock is None:
            self.sock.connect(("127.0.0.1", port))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        hello = Request(
            host=f"127.0.0.1:{port}",
            target=path,
            extensions=[PerMessageDeflate()],
            extra_headers=extra,
        )
        self.sock.sendall(self._ws.send(hello))
        self._accepted = False
        while not self._accepted:
            self.read_once()
        if greeted:
            self.hello = self.receive()
            assert self.hello["type"] == "system.connected"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def read_once(self, timeout: float = PATIENCE) -> None:  # noqa: PLR0912
        """Read bytes once and handle the frames in them: one case for each kind of event."""
        self.sock.settimeout(max(timeout, 0.001))
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._closed = self._closed or Closed(None, None)
            raise self._closed
        if self._closed is not None:
            raise AssertionError(f"bytes after the close frame: {data[:80]!r}")
        self._ws.receive_data(data)
        for event in self._ws.events():
            match event:
                case AcceptConnection():
                    assert not event.extensions, "the server must not compress"
                    self._accepted = True
                case RejectConnection():
                    self._status = event.status_code
                case RejectData():
                    if event.body_finished:
                        self.sock.close()
                        raise Refused(self._status)
                case Ping():
                    self.pings += 1
                    # After our close frame, wsproto sends none. The server may be gone by now.
                    if self.answers_pings and self._ws.state is ConnectionState.OPEN:
                        with contextlib.suppress(OSError):
                            self.sock.sendall(self._ws.send(event.response()))
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        self.messages.append(json.loads(self._text))
                        self._text = ""
                case BytesMessage():
                    raise AssertionError("the server sends text only")
                case CloseConnection():
                    self._closed = Closed(event.code, event.reason)
                    if self._ws.state is ConnectionState.REMOTE_CLOSING:
                        with contextlib.suppress(OSError):
                            self.sock.sendall(self._ws.send(event.response()))

    def receive(self, timeout: float = PATIENCE, heartbeats: bool = False) -> dict[str, Any]:
        """Return the next message; skip heartbeats by default. Raise Closed if there is none."""
        deadline = time.monotonic() + timeout
        while True:
            while self.messages:
                message = self.messages.popleft()
                if heartbeats or message["type"] != "system.heartbeat" or "ref" in message:
                    return message
            self.read_once(deadline - time.monotonic())

    def receive_many(self, count: int) -> list[dict[str, Any]]:
        """Return the next messages."""
        return [self.receive() for _ in range(count)]

    def send(self, **message: Any) -> None:
        """Send a message as JSON."""
        self.send_raw(json.dumps(message))

    def send_raw(self, data: str | bytes) -> None:
        """Send a text message (str) or a binary message (bytes)."""
        self.sock.sendall(self._ws.send(Message(data=data)))

    def ping(self, payload: bytes = b"") -> None:
        """Send a ping frame."""
        self.sock.sendall(self._ws.send(Ping(payload)))

    def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        """Send a message with a `ref` and return the answer; keep other messages for receive()."""
        ref = next(self.refs)
        self.send(action=action, ref=ref, **fields)
        others = []
        while (message := self.receive(heartbeats=True)).get("ref") != ref:
            others.append(message)
        self.messages.extendleft(reversed(others))
        return message

    def subscribe(
        self, pattern: str = "*", content_type: str = "*", **fields: Any
    ) -> dict[str, Any]:
        """Subscribe, and return the payload of the answer, which must not be an error."""
        answer = self.ask("subscribe", type=pattern, contentType=content_type, **fields)
        assert answer["type"] == "system.subscribed", answer
        return answer["payload"]

    def authenticate(self, token: str) -> dict[str, Any]:
        """Send a token, and return the answer."""
        return self.ask("authenticate", token=token)

    def nothing_more(self) -> None:
        """Check that no message is left."""
        assert self.rest() == []

    def rest(self) -> list[dict[str, Any]]:
        """Return all messages that are still on their way.

        The loop answers in order, so every event published before this call arrives before the
        answer.
        """
        self.ask("editStop", contentType="none", entryId="none")
        rest = [message for message in self.messages if message["type"] != "system.heartbeat"]
        self.messages.clear()
        return rest

    def closing(self) -> Closed:
        """Read until the server has closed the connection, and return how."""
        with pytest.raises(Closed) as caught:
            while True:
                self.read_once()
        return caught.value

    def close(self, code: int = 1000) -> Closed:
        """Send a close frame, and wait until the server has closed the connection."""
        self.sock.sendall(self._ws.send(CloseConnection(code)))
        return self.closing()

    def reset(self) -> None:
        """Reset the connection, as a client does that crashes."""
        reset(self.sock)


# -- Waiting, and threads --------------------------------------------------------------------------


def until(condition: Callable[[], Any], awaited: str = "it", timeout: float = PATIENCE) -> Any:
    """Wait until `condition()` is true and return its value; `awaited` names it in the failure."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{awaited} did not happen within {timeout} seconds"
        pause.wait(0.005)
    return result


@contextlib.contextmanager
def running(tasks: list[Callable[[], None]], timeout: float = 60) -> Iterator[None]:
    """Run each task in a thread beside the body; raise the first exception of a task."""
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    yield
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


def run_all(tasks: list[Callable[[], None]], timeout: float = 60) -> None:
    """Run each task in a thread, and wait for all of them."""
    with running(tasks, timeout):
        pass


def publish_steadily(
    publish: Callable[[int], object], stop: threading.Event, rate: int = 500
) -> list[int]:
    """Publish numbers at a steady rate until `stop`; return them."""
    numbers = []
    began = time.monotonic()
    while not stop.wait(max(0, began + len(numbers) / rate - time.monotonic())):
        publish(len(numbers))
        numbers.append(len(numbers))
    return numbers


# -- Log records -----------------------------------------------------------------------------------


def log_lines(
    caplog: pytest.LogCaptureFixture,
    words: str = "",
    *,
    level: int = logging.NOTSET,
    logger: str = "swiftcms_ws",
) -> list[str]:
    """Return the logged messages that contain `words`; `logger=""` is all loggers.

    A worker logs for the loop, so wait for a record with until() before counting.
    """
    records = [record for record in caplog.records if record.levelno >= level]
    lines = [record.getMessage() for record in records if logger in ("", record.name)]
    return [line for line in lines if words in line]


def only_log_line(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    """Wait for a log record with `words`; return whether it is the module's only one."""
    until(lambda: log_lines(caplog, words), f"the log record with {words}")
    return len(log_lines(caplog)) == 1


# -- Statistics, memory, threads and descriptors ---------------------------------------------------


def stat(server: Server, name: str) -> int:
    """Return a number of hub.stats(); a counter that is missing is 0."""
    return server.hub.stats().get(name, 0)


def resident() -> int:
    """Return this process's memory in bytes: that of server and clients."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thread_count() -> int:
    """Return the number of threads, without the workers: the first log record starts them."""
    names = [thread.name for thread in threading.enumerate()]
    return sum(not name.startswith("swiftcms-ws worker") for name in names)


def open_files() -> int:
    """Return the number of this process's descriptors."""
    # Werkzeug leaves an epoll file in a cycle after each refusal.
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# -- Access to internals ---------------------------------------------------------------------------

# Tests observe the module from outside. These functions, and no test, use its private names.


def engine_of(server: Server) -> Engine:
    """Return the engine of a server's app."""
    return server.hub.engine_of(server.app)


def slots(server: Server) -> int:
    """Return the number of handshakes and connections that count against MAX_CONNECTIONS."""
    return engine_of(server).registry.slots


def server_socket(server: Server, client_id: str) -> socket.socket:
    """Return the server's socket of a connection."""
    connection = engine_of(server).registry.find(client_id)
    assert connection is not None
    return connection._sock


def remains(server: Server) -> list[object]:
    """Return the entries of the tables that must be empty without a connection."""
    engine = engine_of(server)
    registry = engine.registry
    tables: list[Any] = [
        *(registry._connections, registry._subscribers, registry._by_user),
        *(engine.loop.closing, engine.heartbeat._slice_of),
    ]
    return [entry for table in tables for entry in table]


def locks_of(hub: Hub) -> list[Any]:
    """Return the locks of a hub and of the parts of its engine."""
    parts = vars(hub._engine()).values()
    locks = [hub._starting, *(part._lock for part in parts if hasattr(part, "_lock"))]
    # Those of the hub, the loop, the registry, the workers, the editors and the counters.
    assert len(locks) == 6
    return locks


def file_of(hub: Hub) -> swiftcms_ws.LogFile:
    """Return the SQLite file of a hub's shared log."""
    log = hub._engine().log
    assert isinstance(log, swiftcms_ws.SqliteLog)
    return log._file


@contextlib.contextmanager
def held_loop(server: Server) -> Iterator[None]:
    """Block the loop's thread in the body: events and calls wait in its queue meanwhile."""
    is_held, may_continue = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        may_continue.wait(PATIENCE)

    assert engine_of(server).loop.call(hold)
    assert is_held.wait(PATIENCE)
    try:
        yield
    finally:
        may_continue.set()


@pytest.fixture(autouse=True)
def connections_stay_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which another thread than the loop's has used a connection."""
    violations: list[str] = []

    def guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Connection, *args: Any) -> Any:
            thread = threading.current_thread()
            if thread is not self._loop.thread:
                violations.append(f"Connection.{name} in {thread.name}")
            return method(self, *args)

        return call

    for name in ("send", "send_replay", "serve", "close", "answer_close", "abort"):
        monkeypatch.setattr(Connection, name, guarded(name, getattr(Connection, name)))
    yield
    assert violations == []


# -- Messages and tokens ---------------------------------------------------------------------------


def token(
    user: Any = "ana",
    expires_in: float = 600,
    key: str = KEY,
    algorithm: str = "HS256",
    **claims: Any,
) -> str:
    """Sign a token with PyJWT, so that the module is not checked against itself."""
    return jwt.encode({"sub": user, "exp": time.time() + expires_in, **claims}, key, algorithm)


def unsigned_token() -> str:
    """Return a token with the algorithm `none`, which has no signature."""
    parts = ({"alg": "none", "typ": "JWT"}, {"sub": "ana", "exp": time.time() + 600})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in parts]
    return ".".join([*(part.rstrip(b"=").decode() for part in encoded), ""])


# The entry that tests edit.
POST = {"contentType": "posts", "entryId": "42"}


def names(message: dict[str, Any]) -> list[Any]:
    """Return the user ids in a list of editors."""
    return [editor["userId"] for editor in message["payload"]["editors"]]


def editing_of(message: dict[str, Any]) -> tuple[str, str | None, list[Any], bool]:
    """Return the type of a message about editing, its editor, all editors, and the conflict."""
    payload = message["payload"]
    return message["type"], payload["editor"]["userId"], names(message), payload["conflict"]


def numbers(messages: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of those messages that Server.publish() has sent."""
    return [message["payload"]["n"] for message in messages if "n" in message["payload"]]


def pairs(*patterns: tuple[str, str]) -> list[dict[str, str]]:
    """Return (type, content type) patterns in the form of `subscriptions`."""
    return [
        {"type": event_type, "contentType": content_type} for event_type, content_type in patterns
    ]


def error_code(answer: dict[str, Any]) -> str | None:
    """Return the code of an answer that is an error, and None for any other."""
    return answer["payload"]["code"] if answer["type"] == "system.error" else None


def position(event_id: str) -> tuple[int, ...]:
    """Return an event's id as numbers, which can be compared."""
    return tuple(map(int, event_id.split("-")))


def receive_answers(client: Client, count: int) -> list[dict[str, Any]]:
    """Return the next messages that carry a `ref`; heartbeats may come between them."""
    answers: list[dict[str, Any]] = []
    while len(answers) < count:
        message = client.receive(heartbeats=True)
        if "ref" in message:
            answers.append(message)
    return answers


# -- Raw sockets, handshakes and frames ------------------------------------------------------------

# The headers of a handshake besides Host.
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "MDEyMzQ1Njc4OTAxMjM0NQ==",
    "Sec-WebSocket-Version": "13",
}


def upgrade_request(
    port: int, path: str = "/ws", first_line: str | None = None, **changes: str | None
) -> bytes:
    """Return a handshake request. `changes` sets headers, or removes those that are None."""
    headers: dict[str, str | None] = {"Host": f"127.0.0.1:{port}", **HANDSHAKE}
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    fields = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    lines = [first_line or f"GET {path} HTTP/1.1", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def open_raw(port: int, path: str = "/ws") -> socket.socket:
    """Return a socket after its handshake, for tests that send and read bytes."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(upgrade_request(port, path))
    read_to(sock, b"\r\n\r\n")
    return sock


def read_to(sock: socket.socket, words: bytes) -> bytes:
    """Read until `words` have arrived, and return all bytes that were read."""
    data = b""
    while words not in data:
        more = sock.recv(65536)
        assert more, f"the connection was closed before {words!r}, after {data[-200:]!r}"
        data += more
    return data


def read_to_the_end(sock: socket.socket) -> bytes:
    """Read until the server has closed or reset the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


def is_readable(sock: socket.socket) -> bool:
    """Return whether bytes, or the end of the stream, have arrived."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def reset(sock: socket.socket) -> None:
    """Reset a connection: the system sends RST, without a close frame or the end of the stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def close_code(data: bytes) -> int | None:
    """Return the code of the close frame at the end of the bytes, or None."""
    for start in range(max(0, len(data) - 127), len(data) - 3):
        if data[start] == 0x88 and data[start + 1] == len(data) - start - 2:
            return int(struct.unpack("!H", data[start + 2 : start + 4])[0])
    return None


class Frames:
    """Raw client frames, valid and invalid ones."""

    @staticmethod
    def masked(
        opcode: int,
        payload: bytes = b"",
        *,
        fin: bool = True,
        rsv: int = 0,
        length: int | None = None,
    ) -> bytes:
        """Return a frame with the mask 0; `length` is a wrong one."""
        size = len(payload) if length is None else length
        head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
        if size < 126:
            head += bytes([0x80 | size])
        elif size < 65536:
            head += bytes([0x80 | 126]) + struct.pack("!H", size)
        else:
            head += bytes([0x80 | 127]) + struct.pack("!Q", size)
        return head + b"\0\0\0\0" + payload


def text(**message: Any) -> bytes:
    """Return a message as a text frame."""
    return Frames.masked(0x1, json.dumps(message).encode())


def padded(size: int, filling: str = "x") -> bytes:
    """Return a message of exactly `size` bytes."""
    frame = json.dumps({"action": "heartbeat", "padding": ""}).encode()
    return frame[:-2] + (filling * size).encode()[: size - len(frame)] + frame[-2:]


def fragments(data: bytes, size: int) -> bytes:
    """Return a text message in fragments of `size` bytes."""
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    last = len(parts) - 1
    frames = []
    for number, part in enumerate(parts):
        frames.append(Frames.masked(0x0 if number else 0x1, part, fin=number == last))
    return b"".join(frames)


# -- Closing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def closed_by_server(server: Server, code: int) -> Iterator[socket.socket]:
    """Open a connection, let the server close it, and read up to the code of its close frame."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(upgrade_request(server.port, f"/ws?token={token()}"))
        read_to(sock, b'"system.connected"')
        until(lambda: stat(server, "connections") == 1, "the connection")
        if code == 4401:
            assert server.hub.disconnect("ana") == 1
        else:
            sock.sendall(Frames.masked(0x1, b"x" * 1001))
        read_to(sock, struct.pack("!H", code))
        yield sock


# -- TLS and slow clients --------------------------------------------------------------------------


def slow_client(server: Server) -> Client:
    """Return a subscribed client with a small receive buffer, which reads only on request."""
    client = server.client(receive_buffer=2048)
    client.subscribe()
    return client


def self_signed(directory: Path) -> tuple[str, str]:
    """Make a certificate for 127.0.0.1 with openssl; return the paths of it and of its key."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    files = ["-subj", "/CN=127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return str(certificate), str(key)


def secure(sock: socket.socket) -> ssl.SSLSocket:
    """Start TLS as a client that trusts every certificate."""
    # ssl.create_default_context() takes 40 ms to load the system's certificates.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(sock)


def with_tls(directory: Path) -> Callable[[Flask, Hub], None]:
    """Return a function that lets a Server speak TLS."""
    certificate = self_signed(directory)

    def configure(app: Flask, hub: Hub) -> None:
        app.config["TEST_SSL"] = certificate

    return configure


def tls_client(server: Server, receive_buffer: int | None = None) -> Client:
    plain = socket.socket()
    if receive_buffer is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    plain.settimeout(PATIENCE)
    plain.connect(("127.0.0.1", server.port))
    return Client(server.port, sock=secure(plain))


# -- Hooks and signals of a site -------------------------------------------------------------------


def identify_as_ana(app: Flask, hub: Hub) -> None:
    """Configure a site whose visitors are all the user ana."""

    @hub.identify
    def identify() -> str:
        return "ana"


class SlowHook:
    """Configures a site whose authorize hook waits at a gate if the type is `slow`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.was_asked = threading.Event()

    def __call__(self, app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            if event_type == "slow":
                self.was_asked.set()
                assert self.gate.wait(PATIENCE)
            return True


@pytest.fixture
def slow_hook() -> Iterator[SlowHook]:
    """A SlowHook whose gate is opened after the test."""
    hook = SlowHook()
    yield hook
    hook.gate.set()


@contextlib.contextmanager
def received_signals() -> Iterator[dict[str, list[str]]]:
    """Collect the names of client_connected and client_disconnected, in order, by client."""
    signals: dict[str, list[str]] = {}

    def connected(app: Flask, client_id: str, **more: Any) -> None:
        signals.setdefault(client_id, []).append("connected")

    def disconnected(app: Flask, client_id: str, **more: Any) -> None:
        signals.setdefault(client_id, []).append("disconnected")

    with (
        swiftcms_ws.client_connected.connected_to(connected),
        swiftcms_ws.client_disconnected.connected_to(disconnected),
    ):
        yield signals


def note_ends(app: Flask) -> list[str]:
    """Collect the path of each request that the app has finished, session and teardown included."""
    ends: list[str] = []
    inner = app.wsgi_app

    def noting(environ: Any, start_response: Any) -> Any:
        try:
            return inner(environ, start_response)
        finally:
            ends.append(environ["PATH_INFO"])

    app.wsgi_app = noting  # type: ignore[method-assign]
    return ends


# -- A server under attack -------------------------------------------------------------------------


@contextlib.contextmanager
def attacked_server(caplog: pytest.LogCaptureFixture, **config: Any) -> Iterator[Server]:
    """Run a server with a healthy client, and check after the attack that nothing is left of it.

    The client has received every event, no failure is logged, and threads, descriptors, connections
    and subscriptions are those of before.
    """
    with Server(**config) as server, server.client() as healthy:
        healthy.subscribe()
        threads, files = thread_count(), open_files()
        stop, got = threading.Event(), []

        def publish() -> None:
            for number in itertools.count():
                server.publish(number)
                if stop.wait(0.01):
                    server.hub.publish("the.end", "posts", {"count": number + 1})
                    return

        def listen() -> None:
            while (message := healthy.receive())["type"] != "the.end":
                if message["type"] == "content.created":
                    got.append(message["payload"]["n"])
            assert got == list(range(message["payload"]["count"]))

        with running([publish, listen], PATIENCE):
            try:
                yield server
            finally:
                stop.set()
        until(lambda: stat(server, "connections") == 1, "the end of all other connections")
        assert (stat(server, "subscriptions"), stat(server, "waiting_bytes")) == (1, 0)
        until(lambda: slots(server) == 1, "the release of their slots")
        until(lambda: thread_count() <= threads, "the end of their threads")
        until(lambda: open_files() <= files, "the closing of their descriptors")
        assert healthy.ask("presence")["payload"]["entries"] == []
    failures = log_lines(caplog, logger="", level=logging.ERROR)
    assert [line for line in failures if "code 400" not in line and "code 50" not in line] == []
    assert "Traceback" not in caplog.text


# -- Processes -------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Process:
    """A server in a process of its own, with its output in a file. It is killed after the body."""

    def __init__(self, *command: str, cwd: Path, port: int, **environ: str) -> None:
        self.port = port
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # gunicorn 25 and newer keep a control socket there. Two servers that share it log errors.
        self._runtime = tempfile.TemporaryDirectory(prefix="run-")
        own = {
            "PYTHONPATH": str(HERE),
            "PYTHONUNBUFFERED": "1",
            "XDG_RUNTIME_DIR": self._runtime.name,
        }
        self.popen = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **own, **environ},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Process:
        until(self._is_up, f"the start of {self.popen.args}", timeout=60)
        return self

    def _is_up(self) -> bool:
        assert self.popen.poll() is None, self.output()
        address = ("127.0.0.1", self.port)
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return True
        return False

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(PATIENCE)
        self._log.close()
        self._runtime.cleanup()

    def output(self) -> str:
        """Return what the server has written to its standard output and error."""
        # The server writes at the offset of the same open file: it must not be moved.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    def client(self, **options: Any) -> Client:
        """Connect a client; `options` are those of Client."""
        return Client(self.port, **options)


SITE = """
import os
from flask import Flask, request
from swiftcms_ws import blueprint, hub, publish

app = Flask(__name__)
app.secret_key = "a key of more than thirty-two bytes, for tests"
app.config["SWIFTCMS_WS_HEARTBEAT"] = float(os.environ.get("TEST_HEARTBEAT", 25))
app.register_blueprint(blueprint)

@app.post("/publish")
def publish_it():
    return {"id": publish("content.created", "posts", request.json)}

if __name__ == "__main__":
    import sys
    app.run(port=int(sys.argv[1]))
"""


# Commands for site(): SITE under a web server.
WERKZEUG = ("{python}", "site_app.py", "{port}")

GUNICORN = ("{python}", "-m", "gunicorn", "site_app:app", "--access-logfile", "-")

SYNC = (*GUNICORN, "--bind", "127.0.0.1:{port}")

GTHREAD = (*SYNC, "--worker-class", "gthread", "--threads", "2")


def site(tmp_path: Path, command: tuple[str, ...], *more: str, **environ: str) -> Process:
    """Run SITE with a command and more arguments."""
    (tmp_path / "site_app.py").write_text(SITE)
    port = free_port()
    filled = [part.format(python=sys.executable, port=port) for part in (*command, *more)]
    return Process(*filled, cwd=tmp_path, port=port, **environ)


def publish_over_http(process: Process, **payload: Any) -> str:
    """Publish an event through the view of SITE, and return its id."""
    status, _, body = http(f"http://127.0.0.1:{process.port}/publish", "POST", payload)
    assert status == 200, body
    return str(json.loads(body)["id"])


def read_line(popen: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints. Kill the process if it prints none."""
    assert popen.stdout is not None
    deadline = threading.Timer(PATIENCE, popen.kill)
    deadline.start()
    try:
        line = popen.stdout.readline()
    finally:
        deadline.cancel()
    assert line, "the process printed nothing"
    return line


def script_site(tmp_path: Path, script: str, *command: str, **environ: str) -> Process:
    """Run a script as site_app.py, with `command` or by itself."""
    (tmp_path / "site_app.py").write_text(script)
    port = free_port()
    filled = [part.format(port=port) for part in command or ("site_app.py", "{port}")]
    return Process(sys.executable, *filled, cwd=tmp_path, port=port, **environ)


def run_script(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script until it exits, for at most half of PATIENCE."""
    (tmp_path / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE / 2,
        check=False,
    )


# -- Web servers -----------------------------------------------------------------------------------

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

SERVER_SITE = '''
import atexit
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

from flask import Flask, request
from swiftcms_ws import blueprint, client_disconnected, hub, publish

app = Flask(__name__)
app.secret_key = "a key of more than thirty-two bytes, for tests"
app.config.update(json.loads(os.environ["TEST_CONFIG"]))


def log(line):
    # One system call, so that the lines of two threads do not mix.
    os.write(1, f"{line}\\n".encode())


def wait_for_file(name):
    while not os.path.exists(name):
        time.sleep(0.01)


exec(os.environ["TEST_SETUP"])
app.register_blueprint(blueprint)


@app.before_request
def hold():
    """Let a handshake wait until the test creates the file that its address names."""
    if "hold" in request.args:
        log("handshake held")
        wait_for_file(request.args["hold"])


@app.teardown_request
def log_teardown(error):
    if request.path == "/ws":
        log(f"teardown {error!r} {request.full_path}")


@app.get("/page")
def page():
    return "a page"


@app.post("/publish")
def publish_it():
    return {"id": publish("content.created", "posts", request.json)}


@app.get("/state")
def state():
    return {"pid": os.getpid(), "slots": hub.engine_of(app).registry.slots, **hub.stats()}


@app.post("/run")
def run():
    """Run the code of a test in this process, and return its `result`."""
    names = dict(globals())
    exec(request.json, names)
    return {"result": names.get("result")}


if __name__ == "__main__":
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    app.run(port=int(sys.argv[1]), **options)
'''

FLASK_RUN = ("{python}", "-m", "flask", "--app", "site_app", "run", "--port", "{port}")

WAITRESS = (
    *("{python}", "-m", "waitress", "--threads", "2", "--listen", "127.0.0.1:{port}"),
    "site_app:app",
)

SERVERS = {
    "werkzeug": WERKZEUG,
    "flask run": FLASK_RUN,
    "flask run single": (*FLASK_RUN, "--without-threads"),
    "sync": SYNC,
    "sync preload": (*SYNC, "--preload"),
    "sync unix": (*GUNICORN, "--bind", "unix:{unix}"),
    "gthread": GTHREAD,
    # gunicorn counts a connection as long as it is open.
    "gthread few connections": (*GTHREAD, "--worker-connections", "10"),
    "gevent": (*SYNC, "--worker-class", "gevent"),
    "waitress": WAITRESS,
    "waitress poll": (*WAITRESS[:-1], "--asyncore-use-poll", WAITRESS[-1]),
}

# One server for each way to find the socket and the data that the server has read ahead.
KINDS_OF_SERVERS = ["werkzeug", "sync", "gthread", "gevent", "waitress"]

FLASK_RUN_TLS = (*FLASK_RUN, "--cert", "{cert}", "--key", "{key}")

SYNC_TLS = (*SYNC, "--certfile", "{cert}", "--keyfile", "{key}")

# Servers whose connections need a relay.
TLS_SERVERS = {
    "flask run TLS": FLASK_RUN_TLS,
    "gthread TLS": (*SYNC_TLS, "--worker-class", "gthread", "--threads", "60"),
}

ALL_SERVERS = {
    **SERVERS,
    **TLS_SERVERS,
    "waitress lookahead": (*WAITRESS[:-1], "--channel-request-lookahead", "5", WAITRESS[-1]),
}

# Servers that cannot serve WebSockets. The answer names servers that can.
UNSUITABLE = {
    "werkzeug processes": (*WERKZEUG, '{"processes": 4, "threaded": false}'),
    "flask run single TLS": (*FLASK_RUN_TLS, "--without-threads"),
    "sync TLS": SYNC_TLS,
}

TROUBLE = re.compile(r"Traceback|^\S*Error\b|\[ERROR\]|\bERROR\b|Exception ignored", re.M)


class Site(Process):
    """SERVER_SITE under a web server, reached over TCP, TLS or a Unix socket.

    It is up once it has answered a page: gunicorn listens before it has a worker. `setup` is code
    for the beginning of the site.
    """

    def __init__(
        self,
        tmp_path: Path,
        command: tuple[str, ...],
        *more: str,
        port: int | None = None,
        config: dict[str, Any] | None = None,
        setup: str = "",
        **environ: str,
    ) -> None:
        self.directory = tmp_path
        (tmp_path / "site_app.py").write_text(SERVER_SITE)
        self.command = (*command, *more)
        self.unix = str(tmp_path / "site.sock")
        names: dict[str, Any] = {
            "python": sys.executable,
            "port": port or free_port(),
            "unix": self.unix,
        }
        self.is_tls = "{cert}" in command
        if self.is_tls:
            names["cert"], names["key"] = self_signed(tmp_path)
        filled = []
        for part in self.command:
            # Options of app.run() are JSON, with braces of their own.
            filled.append(part if part.startswith('{"') else part.format(**names))
        environ |= {"TEST_CONFIG": json.dumps(config or {}), "TEST_SETUP": setup}
        self._log_begin = 0
        super().__init__(*filled, cwd=tmp_path, port=names["port"], **environ)

    def _is_up(self) -> bool:
        assert self.popen.poll() is None, self.output()
        with contextlib.suppress(OSError, HTTPException):
            return self.page() == b"a page"
        return False

    def __exit__(self, *exc: object) -> None:
        # Otherwise gunicorn's workers outlive their master for up to 15 seconds.
        for pid in children(self.popen.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().__exit__(*exc)

    def output(self) -> str:
        return super().output()[self._log_begin :]

    def forget_output(self) -> None:
        """Let output() begin here. For a site that several tests share."""
        self._log_begin += len(self.output())

    def open(self) -> socket.socket:
        with contextlib.ExitStack() as stack:
            if any("{unix}" in part for part in self.command):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(PATIENCE)
                sock.connect(self.unix)
            else:
                address = ("127.0.0.1", self.port)
                sock = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
            if self.is_tls:
                sock = secure(sock)
            stack.pop_all()
            return sock

    def client(self, **options: Any) -> Client:
        sock = self.open()
        try:
            return Client(self.port, sock=sock, **options)
        except BaseException:
            sock.close()
            raise

    def ask(
        self, method: str, path: str, data: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one HTTP request; return status, headers and body."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.sock = self.open()
            sent = {"Content-Type": "application/json", "Connection": "close"}
            for name, value in headers.items():
                sent[name.replace("_", "-")] = value
            body = None if data is None else json.dumps(data)
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def page(self) -> bytes:
        status, _, body = self.ask("GET", "/page")
        assert status == 200, body
        return body

    def json(self, method: str, path: str, data: Any = None) -> dict[str, Any]:
        status, _, body = self.ask(method, path, data)
        assert status == 200, body
        return dict(json.loads(body))

    def state(self) -> dict[str, Any]:
        return self.json("GET", "/state")

    def publish(self, number: int = 0, **more: Any) -> str:
        return str(self.json("POST", "/publish", {"n": number, **more})["id"])

    def run(self, code: str) -> Any:
        """Run code in a view of the site, and return its variable `result`."""
        return self.json("POST", "/run", inspect.cleandoc(code))["result"]

    def refusal(self) -> tuple[int, dict[str, str], dict[str, str]]:
        """Send a handshake that must be refused; return status, headers and the JSON body."""
        status, headers, body = self.ask("GET", "/ws", **HANDSHAKE)
        assert status != 101, "the server accepted the handshake"
        return status, headers, json.loads(body)

    def talk(self) -> None:
        """Greet, subscribe, publish from a view, answer, close."""
        with self.client() as client:
            client.subscribe("content.*", "posts")
            event_id = self.publish(1)
            message = client.receive()
            assert (message["id"], message["payload"]) == (event_id, {"n": 1})
            assert client.ask("heartbeat")["type"] == "system.heartbeat"
            assert client.close().code == 1000

    def check(self) -> None:
        """Check that all clients have left, a new one is served, and no error is logged."""
        until(lambda: self.state()["slots"] == 0, "the release of all slots")
        self.talk()
        assert TROUBLE.search(self.output()) is None, self.output()


@pytest.fixture(scope="module")
def shared_sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Site]]:
    """Return a function that starts a site under a web server, or returns it if it runs already.

    Starting a web server takes longer than most tests. Such a site has restored the default of
    SIGPIPE, as sites do for their subprocesses. OpenSSL does not allow that.
    """
    sites: dict[str, Site] = {}
    config = {"SWIFTCMS_WS_MAX_QUEUE": 30_000_000}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Site:
            if name not in sites or sites[name].popen.poll() is not None:
                command = limited(ALL_SERVERS[name], "ulimit -Sn 1024 && ulimit -Hn 8192")
                setup = "" if "TLS" in name else "signal.signal(signal.SIGPIPE, signal.SIG_DFL)"
                site = Site(tmp_path_factory.mktemp("site"), command, config=config, setup=setup)
                sites[name] = stack.enter_context(site)
            return sites[name]

        yield get


@pytest.fixture(name="site")
def site_under_server(server_name: str, shared_sites: Callable[[str], Site]) -> Site:
    """The shared site under the server that the test's parameter `server_name` names."""
    found = shared_sites(server_name)
    until(lambda: found.state()["slots"] == 0, "the end of another test's clients")
    found.forget_output()
    return found


def children(pid: int) -> list[int]:
    """Return the ids of the running children of a process, and of theirs."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def threads_of(pid: int) -> int:
    """Return the number of the kernel's threads: under gevent, Python's are none."""
    return len(os.listdir(f"/proc/{pid}/task"))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_share(pid: int) -> float:
    """Return the share of one core that a process uses during a quarter of a second."""
    began, used = time.monotonic(), cpu_seconds(pid)
    threading.Event().wait(0.25)
    return (cpu_seconds(pid) - used) / (time.monotonic() - began)


def descriptors(pid: int, clients: list[Client]) -> list[int]:
    """Return the descriptors of the server process for the connections of these clients."""
    ports = {f"{client.sock.getsockname()[1]:04X}" for client in clients}
    inodes = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[2].partition(":")[2] in ports:
            inodes.add(f"socket:[{fields[9]}]")
    numbers = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{number}") in inodes:
                numbers.append(int(number))
    return sorted(numbers)


def connect_many(
    stack: contextlib.ExitStack, site: Site, count: int, **options: Any
) -> list[Client]:
    return [stack.enter_context(site.client(**options)) for _ in range(count)]


def check_requests(
    site: Site, count: int, path: str = "/ws", has_access_log: bool = True
) -> None:
    """Check that each handshake's request had one teardown without error, and is logged as 101."""

    def teardowns() -> list[str]:
        return re.findall(rf"^teardown (.*) {re.escape(path)}\??$", site.output(), re.MULTILINE)

    def accesses() -> int:
        # Werkzeug colours the line.
        pattern = rf'GET {re.escape(path)} HTTP/1\.1\S*" 101 '
        return len(re.findall(pattern, site.output()))

    until(lambda: len(teardowns()) >= count, "the end of all requests")
    if has_access_log:
        until(lambda: accesses() >= count, "the access log")
        assert accesses() == count
    assert teardowns() == ["None"] * count
    assert TROUBLE.search(site.output()) is None, site.output()


def limited(command: tuple[str, ...], limit: str) -> tuple[str, ...]:
    """Return a command that runs under a limit of open files, `ulimit -n 300` for example."""
    return ("bash", "-c", f'{limit} && exec "$@"', "site", *command)


@pytest.fixture(scope="session")
def old_gunicorn() -> Iterator[Callable[[str | None], dict[str, str]]]:
    """Return a function that installs a version of gunicorn, and returns the environment for it."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def install(version: str | None) -> dict[str, str]:
            if version is None:
                return {}
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gunicorn-"))
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
            options = ["--disable-pip-version-check", "--target", directory]
            subprocess.run([*command, *options, f"gunicorn=={version}"], check=True, timeout=120)
            return {"PYTHONPATH": f"{directory}{os.pathsep}{HERE}"}

        yield install


def web_threads() -> int:
    names = [thread.name for thread in threading.enumerate()]
    return sum(not name.startswith("swiftcms-ws") for name in names)


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Server]:
    """A server in this process with a relay for each connection, without TLS."""
    monkeypatch.setattr(swiftcms_ws.Endpoint, "FORCE_RELAY", True)
    limits = {"RATE": 1_000_000, "MAX_MESSAGE": 2_000_000, "MAX_QUEUE": 4_000_000}
    with Server(HISTORY=20, **limits) as server:
        threads = web_threads()
        yield server
        until(lambda: web_threads() <= threads, "the end of the relays")
    assert "Traceback" not in capfd.readouterr().err


def send_and_vanish(site: Site, number: int) -> None:
    """Send a handshake, or a part of it, and disconnect in one of six ways."""
    hello = upgrade_request(site.port)
    frame = text(action="subscribe", ref=1)
    with site.open() as sock:
        match number % 6:
            case 0:
                sock.sendall(hello)
                reset(sock)
            case 1:
                sock.sendall(hello + frame)
                reset(sock)
            case 2:
                sock.sendall(hello[:60])
                reset(sock)
            case 3:
                sock.sendall(hello + frame[:9])
            case 4:
                sock.sendall(hello + frame)
                sock.shutdown(socket.SHUT_WR)
            case 5:
                sock.sendall(hello)
                read_to(sock, b"\r\n\r\n")
                sock.sendall(frame[:9])
                reset(sock)


# -- Shared logs -----------------------------------------------------------------------------------


REDIS = shutil.which("redis-server") or shutil.which("valkey-server")

needs_redis = pytest.mark.skipif(REDIS is None, reason="there is no redis-server on this machine")


class Redis:
    """A redis-server of the test, which can be killed, stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        assert REDIS is not None
        command = [REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._directory), "--appendonly", "yes", "--appendfsync", "always"]
        command += ["--repl-diskless-sync-delay", "0"]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        until(self._answers, "the start of Redis")

    def _answers(self) -> bool:
        address = ("127.0.0.1", self.port)
        with contextlib.suppress(OSError), socket.create_connection(address, 1) as sock:
            sock.settimeout(1)
            sock.sendall(b"PING\r\n")
            return sock.recv(100).startswith(b"+PONG")
        return False

    def kill(self, forget: bool = False) -> None:
        """Kill the server, and delete its data if `forget`."""
        self.popen.kill()
        self.popen.wait(PATIENCE)
        if forget:
            shutil.rmtree(self._directory / "appendonlydir", ignore_errors=True)

    def stop(self) -> None:
        """Stop the process without closing its connections."""
        self.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def send(self, command: str | bytes) -> bytes:
        """Send a command and return the answer, which must not be an error."""
        data = command if isinstance(command, bytes) else f"{command}\r\n".encode()
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as sock:
            sock.sendall(data)
            answer = sock.recv(1000)
        assert answer[:1] in b"+:$", command
        return answer


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A redis-server, which a test may stop."""
    server = Redis(tmp_path)
    yield server
    server.resume()
    server.kill()


class Shared:
    """A shared log of either kind: its configuration for Server(), and as environment variables."""

    def __init__(self, redis: Redis | None = None, **config: str) -> None:
        self.redis = redis
        self.config: dict[str, Any] = config
        self.environ = {f"SWIFTCMS_WS_{key}": value for key, value in config.items()}

    @property
    def path(self) -> Path:
        """The file, if it is SQLite."""
        return Path(self.config["DATABASE"])

    def hub(self) -> Hub:
        """Return a hub without an app, as a script uses it."""
        return Hub(**{key.lower(): value for key, value in self.config.items()})

    def delete_messages(self) -> None:
        """Delete all control messages, as a process does that sends many."""
        if self.redis is not None:
            self.redis.send("XTRIM swiftcms_ws:messages MAXLEN 0")
        else:
            query(self.path, "DELETE FROM messages")


def file_or_redis(kind: str, request: pytest.FixtureRequest, directory: Path) -> Shared:
    """Return a shared log of the kind `sqlite` or `redis`."""
    if kind == "sqlite":
        return Shared(DATABASE=str(directory / "live.sqlite3"))
    if REDIS is None:
        pytest.skip("there is no redis-server on this machine")
    server: Redis = request.getfixturevalue("redis")
    return Shared(server, REDIS_URL=server.url)


@pytest.fixture(params=["sqlite", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Shared:
    """An SQLite file, and then Redis."""
    return file_or_redis(request.param, request, tmp_path)


def does_publish(server: Server, number: int) -> bool:
    """Return whether publish() succeeds: the log is available."""
    with contextlib.suppress(swiftcms_ws.PublishError):
        server.publish(number)
        return True
    return False


def expect_failure(publish: Callable[[], object], words: str) -> None:
    """Call a function that must raise PublishError with these words, within two seconds."""
    began = time.monotonic()
    with pytest.raises(swiftcms_ws.PublishError, match=words):
        publish()
    assert time.monotonic() - began < 2 * SLOWNESS


def expect_recovery(server: Server) -> None:
    """Wait until events can be published, and a new client receives them."""

    def has_recovered() -> bool:
        # If the place in the log was lost, clients of the first second are disconnected.
        with contextlib.suppress(Closed), server.client() as client:
            client.subscribe("content.*")
            server.publish(2)
            while client.receive()["payload"] != {"n": 2}:
                pass
            return True
        return False

    until(lambda: does_publish(server, 1), "a publish() that succeeds")
    until(has_recovered, "an event that is delivered")


@dataclasses.dataclass
class Fault:
    """A failure of a shared log, with words of the PublishError. As a context, it is present."""

    shared: Shared
    words: str
    begin: Callable[[], object]
    end: Callable[[], object]
    # Whether events of the time may be stored all the same.
    may_store: bool = False

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *exc: object) -> None:
        self.end()


@pytest.fixture(params=["redis killed", "redis stopped", "redis full", "sqlite locked"])
def fault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fault]:
    """A failure that begins while a site is running, and loses no event."""
    kind, name = request.param.split()
    shared = file_or_redis(kind, request, tmp_path)
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            backup = sqlite3.connect(shared.path, isolation_level=None)
            stack.callback(backup.close)
            backup.execute("BEGIN EXCLUSIVE")

        if shared.redis is None:
            words = "(?i)another program holds it|other threads"
            yield Fault(shared, words, lock, stack.close)
        elif name == "killed":
            yield Fault(shared, "cannot use Redis", shared.redis.kill, shared.redis.start)
        elif name == "stopped":
            redis = shared.redis
            yield Fault(shared, "cannot use Redis", redis.stop, redis.resume, may_store=True)
        else:
            limit = functools.partial(shared.redis.send, "CONFIG SET maxmemory 1")
            no_limit = functools.partial(shared.redis.send, "CONFIG SET maxmemory 0")
            yield Fault(shared, "maxmemory", limit, no_limit)


# -- SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of an SQLite file."""
    return tmp_path / "live.sqlite3"


def files_of(path: Path) -> list[Path]:
    """Return the paths of a database, its journal and its shared memory."""
    return [path.with_name(path.name + suffix) for suffix in swiftcms_ws.LogFile.SUFFIXES]


def delete(path: Path) -> None:
    for file in files_of(path):
        file.unlink(missing_ok=True)


def query(path: Path, statement: str, *values: Any) -> Any:
    """Execute one statement in another connection, and return the first column of its rows."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [row[0] for row in connection.execute(statement, values)]


def stored_ids(path: Path) -> list[str]:
    """Return the ids of the events in a file."""
    numbers = query(path, "SELECT id FROM events ORDER BY id")
    return [f"{number >> 16}-{number & 0xFFFF}" for number in numbers]


def is_intact(path: Path) -> bool:
    return query(path, "PRAGMA integrity_check") == ["ok"]


def run_code(code: str, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with the project's folder as its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=HERE,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextlib.contextmanager
def alarm_handler(handle: Callable[..., object]) -> Iterator[None]:
    """Call `handle` for each SIGALRM."""
    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class TimeLimit(BaseException):
    """As the exception of Celery's soft time limit, which its signal handler raises."""


# -- Deployment ------------------------------------------------------------------------------------


@contextlib.contextmanager
def gunicorn(
    directory: Path, code: str, port: int, *options: str, **environ: str
) -> Iterator[Process]:
    """Run the site in `code` with gunicorn, and end its workers too."""
    (directory / "deployed_app.py").write_text(code)
    command = [sys.executable, "-m", "gunicorn", "deployed_app:app", *options]
    command += ["--bind", f"127.0.0.1:{port}"]
    with Process(*command, cwd=directory, port=port, **environ) as process:
        try:
            yield process
        finally:
            for pid in children(process.popen.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def publish_from_script(
    shared: Shared, ids: list[str], stop: threading.Event, rate: int = 50
) -> None:
    """Publish until `stop` as a script does, with a hub of its own, and collect the ids."""
    with shared.hub() as hub:
        publish_steadily(
            lambda n: ids.append(hub.publish("content.created", "posts", n)), stop, rate
        )


class Swarm:
    """Many clients in one thread, which reconnect with `since` and keep the ids of all events.

    It searches only for ids in the data, because 200 strict clients would need more time than the
    server.
    """

    EVENT_ID = re.compile(rb'"id": "(\d+-\d+)"')

    def __init__(self, port: int, count: int, since: str) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        # By client: the ids of its events, and the bytes after the last of them.
        self.ids = [[since] for _ in range(count)]
        self._rest = [b""] * count
        # Clients that wait before they connect again, and until when.
        self._waiting = dict.fromkeys(range(count), 0.0)
        self.failures: list[bytes] = []
        self.connects = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Swarm:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)

    def has_all(self, last: str) -> bool:
        return all(ids[-1] == last for ids in self.ids)

    def _run(self) -> None:
        while not self._stopped.is_set():
            for number, when in list(self._waiting.items()):
                if when <= time.monotonic():
                    self._connect(number)
            for key, _ in self._selector.select(0.05):
                self._read(key.fileobj, key.data)  # type: ignore[arg-type]
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _connect(self, number: int) -> None:
        try:
            sock = socket.create_connection(("127.0.0.1", self._port), 1)
        except OSError:
            self._waiting[number] = time.monotonic() + 0.2
            return
        del self._waiting[number]
        self.connects += 1
        message = {"action": "subscribe", "type": "content.*", "since": self.ids[number][-1]}
        sock.sendall(
            upgrade_request(self._port)
            + Frames.masked(1, json.dumps(message).encode())
        )
        sock.setblocking(False)
        self._rest[number] = b""
        self._selector.register(sock, selectors.EVENT_READ, number)

    def _read(self, sock: socket.socket, number: int) -> None:
        try:
            data = sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(sock)
            sock.close()
            # As client.js does, so that not all arrive at once.
            self._waiting[number] = time.monotonic() + random.uniform(0, 0.3)
            return
        if b'"recovered": false' in data or b"system.error" in data:
            self.failures.append(data)
        data = self._rest[number] + data
        end = 0
        for match in self.EVENT_ID.finditer(data):
            self.ids[number].append(sys.intern(match[1].decode()))
            end = match.end()
        self._rest[number] = data[end:]


# -- Streams and polls -----------------------------------------------------------------------------


class Blocks:
    """Parses an event stream (WHATWG HTML, section 9.2.6), and keeps its last id as a browser."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.retry = float("nan")
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the complete messages: the JSON object, with the fields `event` and `id`."""
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            fields: dict[str, list[str]] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            assert fields.keys() <= {"", "id", "event", "data", "retry"}, block
            if "retry" in fields:
                self.retry = int(fields["retry"][0]) / 1000
            if "id" in fields:
                self.last_id = fields["id"][0]
            if "data" in fields:
                message = json.loads("\n".join(fields["data"]))
                message["event"] = fields.get("event", [None])[0]
                message["blockId"] = fields.get("id", [None])[0]
                yield message


class Stream:
    """A client over plain HTTP whose response need not end. It is strict in what it accepts."""

    def __init__(
        self,
        sock: socket.socket | int,
        query: str = "",
        since: str | None = None,
        path: str = "/ws/events",
        **headers: str,
    ) -> None:
        if isinstance(sock, int):
            sock = socket.create_connection(("127.0.0.1", sock), timeout=PATIENCE)
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.messages: deque[dict[str, Any]] = deque()
        self._blocks = Blocks()
        self._chunks: bytes | None = None
        sent = {"Host": "127.0.0.1", **({"Last-Event-ID": since} if since else {})}
        sent.update({name.replace("_", "-"): value for name, value in headers.items()})
        lines = [f"GET {path}?{query} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in sent.items()]
        try:
            self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
            head, rest = self._read_head()
        except BaseException:
            self.sock.close()
            raise
        status, *fields = head.decode("latin-1").split("\r\n")
        self.status = int(status.split()[1])
        self.headers = dict(field.split(": ", 1) for field in fields)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self._chunks = b""
        self._feed(rest)

    def _read_head(self) -> tuple[bytes, bytes]:
        head = b""
        while b"\r\n\r\n" not in head:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionError
            head += data
        head, _, rest = head.partition(b"\r\n\r\n")
        return head, rest

    def _feed(self, data: bytes) -> None:
        if self._chunks is not None:
            # A proxy frames the response.
            self._chunks, data = self._chunks + data, b""
            while match := re.match(rb"([0-9a-f]+)\r\n", self._chunks):
                end = match.end() + int(match[1], 16)
                if len(self._chunks) < end + 2:
                    break
                data += self._chunks[match.end() : end]
                self._chunks = self._chunks[end + 2 :]
        if self.headers.get("Content-Type", "").startswith("text/event-stream"):
            self.messages.extend(self._blocks.feed(data))

    @property
    def last_id(self) -> str | None:
        return self._blocks.last_id

    @property
    def retry(self) -> float:
        return self._blocks.retry

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def receive(self, timeout: float = PATIENCE, heartbeats: bool = False) -> dict[str, Any]:
        """Return the next message, heartbeats only if wanted; raise Closed at the end."""
        deadline = time.monotonic() + timeout
        while True:
            while self.messages:
                message = self.messages.popleft()
                if heartbeats or message["type"] != "system.heartbeat":
                    return message
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.sock.recv(65536)
            if not data:
                raise Closed(None, None)
            self._feed(data)

    def receive_many(self, count: int) -> list[dict[str, Any]]:
        return [self.receive() for _ in range(count)]

    def closing(self) -> str | None:
        """Read to the end; return the code of the last message if that is a system.error."""
        last: dict[str, Any] = {}
        with contextlib.suppress(Closed):
            while True:
                last = self.receive()
        return last["payload"]["code"] if last.get("type") == "system.error" else None


def open_events(
    way: str, server: Server, query: str = "", since: str | None = None
) -> Stream:
    """Request a stream or a poll, over a connection."""
    return Stream(server.port, f"{query}&mode={way}", since)


class Polled:
    """The response of one poll, of http() or of a test client."""

    def __init__(self, answer: Any) -> None:
        if isinstance(answer, tuple):
            self.status, self.headers, body = answer
        else:
            self.status, self.headers = answer.status_code, dict(answer.headers)
            body = answer.data
        blocks = Blocks()
        is_stream = self.headers["Content-Type"].startswith("text/event-stream")
        self.messages = list(blocks.feed(body)) if is_stream else []
        self.retry, self.last_id = blocks.retry, blocks.last_id
        self.types = [message["type"] for message in self.messages]
        self.payloads = [m["payload"] for m in self.messages if m["event"] is None]
        self.first: dict[str, Any] = self.messages[0]["payload"] if self.messages else {}


def poll(server: Server, query: str = "", since: str | None = None, **headers: str) -> Polled:
    """Poll with Flask's test client."""
    if since is not None:
        headers["Last-Event-ID"] = since
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return Polled(server.app.test_client().get(f"/ws/events?mode=poll&{query}", headers=sent))


def events_site(site: Site, query: str = "", **headers: str) -> Polled:
    return Polled(site.ask("GET", f"/ws/events?mode=poll&{query}", **headers))


def npm_files(directory: Path, *packages: str) -> None:
    """Put files of npm packages into a directory; skip the test without access to the registry."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm on this machine")
    command = [npm, "pack", "--silent", *packages]
    run = subprocess.run(command, check=False, cwd=directory, capture_output=True, timeout=60)
    if run.returncode != 0:
        pytest.skip("npm finds no packages from here")
    for archive in directory.glob("*.tgz"):
        files = ("--strip-components=2", "--wildcards", "package/dist/*.min.js")
        command = ["tar", "-xzf", str(archive), *files]
        subprocess.run(command, cwd=directory, check=True, timeout=PATIENCE)


# -- Live pages: sites and sessions ----------------------------------------------------------------


LIVE = {"X-SwiftCMS-Live": "1"}


@pytest.fixture
def bare_site() -> Iterator[tuple[Flask, Hub]]:
    """A site without a server and without routes, which the test adds."""
    app, hub = Flask("site"), Hub()
    app.secret_key, app.testing = KEY, True
    hub.init_app(app)
    yield app, hub
    hub.close()


def newest_id_of(response: Any) -> str | None:
    """Return the id in a response's Server-Timing, or None."""
    found = re.fullmatch(r'swiftcms;desc="(\d+-\d+)"', response.headers.get("Server-Timing", ""))
    return found and found[1]


class MemorySessions(SessionInterface):
    """Sessions that stay in memory: open_session() returns the object that is stored."""

    class Stored(dict[str, Any], SessionMixin):
        pass

    def __init__(self) -> None:
        self.stored = self.Stored()

    def open_session(self, app: Flask, request: Any) -> Any:
        return self.stored

    def save_session(self, app: Flask, session: Any, response: Response) -> None:
        response.set_cookie("seen", "yes")


def use_sessions(app: Flask, kind: str, directory: Path) -> None:
    """Choose how the site stores its sessions."""
    if kind == "permanent":
        app.before_request(lambda: setattr(session, "permanent", True))
    elif kind == "memory":
        app.session_interface = MemorySessions()
    elif kind == "cachelib":
        flask_session = pytest.importorskip("flask_session")
        cachelib = pytest.importorskip("cachelib")
        app.config["SESSION_TYPE"] = "cachelib"
        app.config["SESSION_CACHELIB"] = cachelib.FileSystemCache(str(directory))
        flask_session.Session(app)


@pytest.fixture(params=["cookie", "permanent", "cachelib", "memory"])
def shop(
    request: pytest.FixtureRequest, bare_site: tuple[Flask, Hub], tmp_path: Path
) -> FlaskClient:
    """A visitor, signed in to a site whose views change the session, for each kind of session."""
    app, _ = bare_site
    use_sessions(app, request.param, tmp_path)
    has_begun, may_end = threading.Event(), threading.Event()
    app.extensions.update(has_begun=has_begun, may_end=may_end)

    @app.post("/login")
    def login() -> str:
        session.update(user="ana", cart={"books": 0}, visits=0)
        flash("Welcome")
        return "welcome"

    @app.post("/logout")
    def logout() -> str:
        del session["user"]
        # Otherwise the message of the login would be shown too.
        get_flashed_messages()
        flash("Goodbye")
        return "goodbye"

    @app.get("/")
    def page() -> Response:
        session["visits"] = session.get("visits", 0) + 1
        session["cart"]["books"] += 1
        session.modified = True
        response = make_response(f"{session.get('user')} {get_flashed_messages()}")
        response.set_cookie("last_page", "/")
        return response

    @app.get("/slow")
    def slow() -> Response:
        has_begun.set()
        assert may_end.wait(PATIENCE)
        return page()

    @app.route("/token", methods=["GET", "POST"])
    def add_token() -> str:
        session["csrf_token"] = "a token"
        return "form"

    app.add_url_rule("/session", "session", lambda: dict(session))
    client = app.test_client()
    client.post("/login")
    return client


# -- Models of SQLAlchemy --------------------------------------------------------------------------


class Base(orm.DeclarativeBase):
    pass


class Post(Base):
    __tablename__ = "post"
    id = orm.mapped_column(sqlalchemy.Integer, primary_key=True)
    kind = orm.mapped_column(sqlalchemy.String, default="post")
    title = orm.mapped_column(sqlalchemy.String, default="")
    views = orm.mapped_column(sqlalchemy.Integer, server_default="7")
    comments = orm.relationship(
        "Comment", cascade="all, delete-orphan", back_populates="post", order_by="Comment.id"
    )
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "post"}  # noqa: RUF012


class Article(Post):
    """A subclass with a table of its own: one row of each."""

    __tablename__ = "article"
    id = orm.mapped_column(sqlalchemy.ForeignKey("post.id"), primary_key=True)
    body = orm.mapped_column(sqlalchemy.String, default="")
    __mapper_args__ = {"polymorphic_identity": "article"}  # noqa: RUF012


class Comment(Base):
    __tablename__ = "comment"
    id = orm.mapped_column(sqlalchemy.Integer, primary_key=True)
    text = orm.mapped_column(sqlalchemy.String, default="")
    post_id = orm.mapped_column(sqlalchemy.ForeignKey("post.id"))
    post = orm.relationship("Post", back_populates="comments")
    replies = orm.relationship("Reply", cascade="all")


class Reply(Base):
    __tablename__ = "reply"
    id = orm.mapped_column(sqlalchemy.Integer, primary_key=True)
    comment_id = orm.mapped_column(sqlalchemy.ForeignKey("comment.id"))


class Seat(Base):
    """A composite key, and a foreign key that the database checks at COMMIT."""

    __tablename__ = "seat"
    row = orm.mapped_column(sqlalchemy.Integer, primary_key=True)
    number = orm.mapped_column(sqlalchemy.Integer, primary_key=True)
    guest = orm.mapped_column(sqlalchemy.String)
    post_id = orm.mapped_column(
        sqlalchemy.ForeignKey("post.id", deferrable=True, initially="DEFERRED")
    )
    post = orm.relationship("Post", cascade="all, delete-orphan", single_parent=True)


class Note(Base):
    """A model that is not tracked."""

    __tablename__ = "note"
    id = orm.mapped_column(sqlalchemy.Integer, primary_key=True)
    text = orm.mapped_column(sqlalchemy.String)


def memory_database() -> Any:
    """Return an engine for a database in memory, with savepoints and foreign keys that work."""
    engine = sqlalchemy.create_engine(
        "sqlite://", poolclass=sqlalchemy.StaticPool, connect_args={"check_same_thread": False}
    )

    @sqlalchemy.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        # The driver would send BEGIN too late for a savepoint.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine)
    return engine


class Tracked:
    """A hub with an app and a database, which keeps the events that it publishes."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.app = Flask("tracked")
        self.hub.init_app(self.app)
        # Some tests publish without a client.
        self.app.testing = True
        self.engine = memory_database()
        self.sessions = orm.sessionmaker(self.engine)
        # By thread.
        self._events: dict[int, list[tuple[Any, ...]]] = {}
        swiftcms_ws.event_published.connect(self._receive, self.app)

    def _receive(self, app: Flask, **event: Any) -> None:
        published = (event["type"], event["content_type"], event["payload"], event["to"])
        self._events.setdefault(threading.get_ident(), []).append(published)

    def events(self) -> list[tuple[Any, ...]]:
        """Return the events that this thread has published since the last call."""
        return self._events.pop(threading.get_ident(), [])

    def taken(self) -> list[str]:
        """Return the same, such as "created posts 1"."""
        return [
            f"{event_type.removeprefix('content.')} {content_type} {payload['id']}"
            for event_type, content_type, payload, _ in self.events()
        ]

    def close(self) -> None:
        self.hub.close()
        self.engine.dispose()


@pytest.fixture
def tracked() -> Iterator[Tracked]:
    site = Tracked()
    yield site
    site.close()


def do(work: str, session: Any) -> None:
    """Execute Python statements on the session `s`."""
    exec(work, {**globals(), "s": session})


def load(session: Any, model: Any, key: Any) -> Any:
    """Return an object whose columns are loaded."""
    obj = session.get(model, key)
    session.refresh(obj)
    return obj


def update(session: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(session.get(Post, 1), name, value)


def create_and_delete(session: Any) -> None:
    post = Post(id=4)
    session.add(post)
    session.flush()
    session.delete(post)


def delete_and_create(session: Any) -> None:
    session.delete(session.get(Seat, (1, 2)))
    session.flush()
    session.add(Seat(row=1, number=2, guest="new"))


def save_as_new_version(session: Any) -> None:
    """Save a change as a new row, as in SQLAlchemy's documentation of versioned objects."""
    post = session.get(Post, 1)
    post.title = "changed"
    session.flush()
    session.expunge(post)
    orm.make_transient(post)
    post.id = 4
    session.add(post)


class RandomSession:
    """Random work in a session with a database of its own.

    Values are new, so that no column is set back, and no row is deleted and inserted again with the
    same values. Only a comment may be moved back; `moved` has their keys.
    """

    ACTIONS = re.findall(
        r"\w+",
        "create create update update update increment delete delete recreate renumber move orphan"
        " merge flush flush expire expunge read nest nest release release undo undo commit commit"
        " commit commit_root fail rollback close",
    )

    def __init__(self, tracked: Tracked, chance: random.Random) -> None:
        self.tracked = tracked
        self.chance = chance
        self.engine = memory_database()
        self.values = itertools.count(1)
        self.session = tracked.sessions(
            bind=self.engine,
            autoflush=chance.random() < 0.5,
            expire_on_commit=chance.random() < 0.5,
        )
        self.committed = self.contents()
        self.moved: set[str] = set()
        self.steps: list[str] = []

    def contents(self) -> dict[str, tuple[Any, ...]]:
        """Return all rows, by content type and key. No transaction is open."""
        with self.engine.connect() as connection:
            select = connection.exec_driver_sql
            posts = select(
                "SELECT id, kind, title, views, body FROM post LEFT JOIN article USING (id)"
            )
            found = {f"{row.kind}s {row.id}": tuple(row) for row in posts}
            comments = select("SELECT * FROM comment")
            found.update({f"comments {row.id}": tuple(row) for row in comments})
            seats = select("SELECT * FROM seat")
            found.update({f"seats [{row.row}, {row.number}]": tuple(row) for row in seats})
        return found

    def check(self) -> None:
        """Compare the events with the difference of the database."""
        before, after = self.committed, self.contents()
        expected = [f"deleted {key}" for key in before.keys() - after.keys()]
        expected += [f"created {key}" for key in after.keys() - before.keys()]
        both = after.keys() & before.keys()
        expected += [f"updated {key}" for key in both if after[key] != before[key]]
        moved_back = {f"updated {key}" for key in self.moved} - set(expected)
        published = self.tracked.taken()
        assert sorted(expected) == sorted(set(published) - moved_back), self.steps
        assert len(published) == len(set(published)), self.steps
        self.committed, self.moved, self.steps = after, set(), []

    def step(self) -> None:
        action = self.chance.choice(self.ACTIONS)
        self.steps.append(action)
        try:
            # The other actions are methods of the session.
            getattr(self, action, getattr(self.session, action, None))()
        except (sqlalchemy.exc.SQLAlchemyError, orm.exc.StaleDataError) as error:
            self.steps.append(type(error).__name__)
            self.session.rollback()
        if self.session.in_transaction():
            assert self.tracked.taken() == [], self.steps
        else:
            self.check()

    def pick(self, *models: Any) -> Any:
        """Return an object that is not deleted; the first time, create one."""
        model = self.chance.choice(models)
        found = self.session.scalars(sqlalchemy.select(model))
        objs = [obj for obj in found if obj not in self.session.deleted]
        return self.chance.choice(objs) if objs else self.create(model)

    def create(self, model: Any = None) -> Any:
        model = model or self.chance.choice([Post, Article, Comment, Seat])
        value = next(self.values)
        values: dict[str, Any] = {"id": value}
        if model is Seat:
            values = {"row": value, "number": 1, "guest": f"{value}"}
        elif model is Comment:
            values.update(text=f"{value}", post=self.pick(Post))
        obj = model(**values)
        self.session.add(obj)
        return obj

    def update(self) -> None:
        obj, value = self.pick(Post, Article, Comment, Seat), f"{next(self.values)}"
        columns = {Post: ["title"], Article: ["title", "body"], Comment: ["text"], Seat: ["guest"]}
        setattr(obj, self.chance.choice(columns[type(obj)]), value)

    def increment(self) -> None:
        self.pick(Post, Article).views = Post.views + 1

    def delete(self) -> None:
        self.session.delete(self.pick(Post, Article, Comment, Seat))

    def recreate(self) -> None:
        seat = self.pick(Seat)
        self.session.delete(seat)
        if self.chance.random() < 0.5:
            self.session.flush()
        self.session.add(Seat(row=seat.row, number=seat.number, guest=f"{next(self.values)}"))

    def renumber(self) -> None:
        self.pick(Seat).number = next(self.values)

    def move(self) -> None:
        comment = self.pick(Comment)
        self.moved.add(f"comments {comment.id}")
        comment.post = self.pick(Post)

    def orphan(self) -> None:
        post = self.pick(Post)
        if post.comments:
            post.comments.pop()

    def merge(self) -> None:
        post = self.pick(Post)
        self.session.merge(type(post)(id=post.id, title=f"{next(self.values)}"))

    def expire(self) -> None:
        self.session.flush()
        self.session.expire_all()

    def expunge(self) -> None:
        self.session.flush()
        self.session.expunge(self.pick(Post, Comment, Seat))

    def read(self) -> None:
        post = self.pick(Post)
        assert [post.views, *post.comments]

    def nest(self) -> None:
        self.session.begin_nested()

    def release(self) -> None:
        (self.session.get_nested_transaction() or self.session).commit()

    def undo(self) -> None:
        if self.session.in_nested_transaction():
            self.session.get_nested_transaction().rollback()

    def commit_root(self) -> None:
        if self.session.in_transaction():
            self.session.get_transaction().commit()

    def fail(self) -> None:
        """Break a foreign key that the database checks at COMMIT."""
        self.session.add(Seat(row=next(self.values), number=1, post_id=-1))
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            self.session.commit()
        self.session.rollback()


# -- A proxy that resets connections ---------------------------------------------------------------


class Proxy:
    """A TCP proxy to the port `target`, which tests may change, that can reset its connections."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    # The server is down.
                    near.close()
                    continue
                with self._lock:
                    self._pairs.append((near, far))
                if self._is_closed:
                    # It was accepted while the last connections were reset.
                    self.cut()
                threading.Thread(target=self._relay_both, args=(near, far), daemon=True).start()

    def _relay_both(self, near: socket.socket, far: socket.socket) -> None:
        """Relay in both directions, and close both sockets unless cut() has done so."""
        thread = threading.Thread(target=self._relay, args=(far, near), daemon=True)
        thread.start()
        self._relay(near, far)
        thread.join()
        with self._lock:
            if (near, far) not in self._pairs:
                return
            self._pairs.remove((near, far))
        near.close()
        far.close()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset every connection, to the client and to the server."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for sock in itertools.chain(*pairs):
            # This wakes the thread that reads from the socket.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            reset(sock)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        # Otherwise accept() would go on in its thread after close().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)
        self.cut()


# -- The command line ------------------------------------------------------------------------------


def command(
    *arguments: str, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, with an output of its own, because a new one is slow."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    stderr = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            returncode = swiftcms_ws.main(arguments)
    except SystemExit as error:
        returncode = int(error.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    stdout.seek(0)
    return subprocess.CompletedProcess(arguments, returncode, stdout.read(), stderr.getvalue())


@contextlib.contextmanager
def listening(*arguments: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Run `listen` in a process; yield that, with stdout as a pipe, and a file with stderr."""
    with tempfile.TemporaryFile("w+") as stderr:
        listener = subprocess.Popen(
            [sys.executable, str(HERE / "swiftcms_ws.py"), "listen", *arguments],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            yield listener, stderr
        finally:
            listener.kill()
            listener.communicate(timeout=PATIENCE)


def next_payload(listener: subprocess.Popen[str]) -> Any:
    """Return the payload of the next event that `listen` prints."""
    return json.loads(read_line(listener))["payload"]


QuickCheck = Callable[[str], dict[bool | None, str]]


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> QuickCheck:
    """Return a function that checks an address with short timeouts.

    It returns the findings by their kind: True, False, or None for checks that were skipped.
    """
    monkeypatch.setattr(swiftcms_ws, "STREAM_TIMEOUT", 0.3)
    monkeypatch.setattr(swiftcms_ws.EventsReply, "END_TIMEOUT", 0.1)

    def run(address: str) -> dict[bool | None, str]:
        found: dict[bool | None, str] = {}
        for is_ok, *texts in swiftcms_ws.find_problems(swiftcms_ws.websocket_url(address)):
            found[is_ok] = "\n".join([found.get(is_ok, ""), *texts])
        return found

    return run


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """Serve these bytes to each client, or no answer at all; yield the address."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                with sock, contextlib.suppress(OSError):
                    sock.recv(4096)
                    if answer is None:
                        stopped.wait(PATIENCE)
                    else:
                        sock.sendall(answer)

    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, running([serve]):
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stopped.set()
            listener.shutdown(socket.SHUT_RDWR)


class ChangingProxy(Proxy):
    """A proxy that changes requests, or buffers a response without a length until it has ended."""

    def __init__(
        self, port: int, *, old: bytes = b"", new: bytes = b"", is_buffering: bool = False
    ) -> None:
        self._change, self._is_buffering = (old, new), is_buffering
        super().__init__(port)

    def __enter__(self) -> ChangingProxy:
        return self

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:  # type: ignore[override]
        is_request = source.getsockname()[1] == self.port
        kept = b""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                is_stream = b"event-stream" in data and b"Content-Length" not in data
                if is_request:
                    sink.sendall(re.sub(*self._change, data))
                elif kept or (self._is_buffering and is_stream):
                    kept += data
                else:
                    sink.sendall(data)
            sink.sendall(kept)
            sink.shutdown(socket.SHUT_WR)


def hide_socket(app: Flask, hub: Hub) -> None:
    serve = app.wsgi_app

    def serve_without_socket(environ: dict[str, Any], start_response: Any) -> Any:
        environ.pop("werkzeug.socket")
        return serve(environ, start_response)

    app.wsgi_app = serve_without_socket  # type: ignore[method-assign]


# -- Chromium --------------------------------------------------------------------------------------

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("google-chrome")
    or shutil.which("chromium-browser")
)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


class Browser:
    """Headless Chromium, controlled over its DevTools protocol."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Browser:
        until(lambda: self._port() > 0, "Chromium's start", timeout=60)
        return self

    def _port(self) -> int:
        try:
            return int((Path(self._profile.name) / "DevToolsActivePort").read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._log.close()
        self._profile.cleanup()

    def kill(self) -> None:
        """Kill Chromium."""
        self.popen.kill()
        self.popen.wait(PATIENCE)

    def page(self, url: str, **options: Any) -> Page:
        """Open a page in a new tab; `options` are those of Page.open()."""
        port = self._port()
        target = json.loads(http(f"http://127.0.0.1:{port}/json/new?about:blank", "PUT")[2])
        path = target["webSocketDebuggerUrl"].split(str(port), 1)[1]
        page = Page(port, path, target["id"])
        page.open(url, **options)
        return page


class Navigated(AssertionError):
    """The page was left while Chromium evaluated an expression in it."""


class Page:
    """One page of a Browser. `console` has the lines of its console, those of Chromium included."""

    def __init__(self, port: int, path: str, target: str) -> None:
        self._port, self._target = port, target
        self._numbers = itertools.count(1)
        self.console: list[str] = []
        self._socket = simple_websocket.Client.connect(f"ws://127.0.0.1:{port}{path}")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol, and return its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            data = self._socket.receive(PATIENCE)
            assert data is not None, f"Chromium did not answer {method}"
            message = json.loads(data)
            if message.get("id") == number:
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise Navigated(str(message))
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message["method"]:
            case "Runtime.consoleAPICalled":
                values = [str(arg.get("value", arg.get("description"))) for arg in params["args"]]
                self.console.append(f"{params['type']}: {' '.join(values)}")
            case "Runtime.exceptionThrown":
                self.console.append(f"exception: {params['exceptionDetails']}")
            # Chromium requests the icon of a page that names none, and the site has none.
            case "Log.entryAdded" if not params["entry"].get("url", "").endswith("/favicon.ico"):
                self.console.append(f"{params['entry']['level']}: {params['entry']['text']}")

    def open(self, url: str, before: str = "") -> None:
        """Load a page, with a script that runs before those of the page."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if before:
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=url)
        is_loaded = "document.readyState === 'complete' && location.href !== 'about:blank'"
        until(lambda: self.js(is_loaded), url)

    def js(self, expression: str) -> Any:
        """Evaluate JavaScript, and return its value or that of its promise."""
        options = {"awaitPromise": True, "returnByValue": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, timeout: float = PATIENCE) -> Any:
        """Wait until JavaScript is true, and return its value."""

        def holds() -> Any:
            # A page that is being loaded again has no answer yet.
            with contextlib.suppress(Navigated):
                return self.js(expression)

        try:
            return until(holds, expression, timeout)
        except AssertionError as error:
            shown = self.js("document.body?.innerText")
            raise AssertionError(f"{error}; console: {self.console}; page: {shown}") from None

    def be_offline(self, offline: bool) -> None:
        """Switch the network of the page off or on."""
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=offline, **speed)

    def complaints(self) -> list[str]:
        """Return the warnings and errors in the console."""
        # This reads the lines that are on their way.
        self.js("1")
        return [line for line in self.console if not line.startswith(("log:", "info:"))]

    def close(self) -> None:
        """Close the tab."""
        http(f"http://127.0.0.1:{self._port}/json/close/{self._target}")
        # Chromium may have closed the connection already.
        with contextlib.suppress(OSError, simple_websocket.ConnectionClosed):
            self._socket.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with Browser() as running:
        yield running


def html(body: str) -> str:
    """Return a page with this body."""
    head = '<link rel="icon" href="data:,"><title>test</title>'
    return f'<!doctype html><html lang="en">{head}<body>{body}</html>'


# -- Firefox ---------------------------------------------------------------------------------------


FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")


class BidiClient(simple_websocket.Client):
    """A WebSocket to Firefox, which refuses a Host header without the port."""

    def handshake(self) -> None:
        self.host += f":{self.port}"
        super().handshake()


class Firefox:
    """Headless Firefox, controlled over WebDriver BiDi."""

    def __init__(self) -> None:
        assert FIREFOX is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._log = Path(self._profile.name) / "output"
        with self._log.open("w") as output:
            self.popen = subprocess.Popen(
                [
                    FIREFOX,
                    "--headless",
                    "--no-remote",
                    "--profile",
                    self._profile.name,
                    "--remote-debugging-port=0",
                    "about:blank",
                ],
                env={**os.environ, "HOME": self._profile.name},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._numbers = itertools.count(1)
        self._pages: dict[str, FirefoxPage] = {}

    def __enter__(self) -> Firefox:
        address = until(self._address, "Firefox's start", timeout=60)
        self._socket = BidiClient.connect(f"{address}/session")
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["log.entryAdded"])
        return self

    def _address(self) -> str | None:
        found = re.search(r"WebDriver BiDi listening on (ws://\S+)", self._log.read_text())
        return found and found[1]

    def __exit__(self, *exc: object) -> None:
        self.popen.kill()
        self.popen.wait(PATIENCE)
        with contextlib.suppress(OSError, simple_websocket.ConnectionClosed):
            self._socket.close()
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            data = self._socket.receive(PATIENCE)
            assert data is not None, f"Firefox did not answer {method}"
            message = json.loads(data)
            if message.get("id") == number:
                assert message["type"] == "success", message
                return message["result"]
            if message.get("method") == "log.entryAdded":
                entry = message["params"]
                page = self._pages.get(entry["source"].get("context"))
                if page is not None:
                    page.console.append(f"{entry.get('method', entry['level'])}: {entry['text']}")

    def page(self, url: str, before: str = "") -> FirefoxPage:
        context = self.call("browsingContext.create", type="tab")["context"]
        page = self._pages[context] = FirefoxPage(self, context)
        if before:
            self.call(
                "script.addPreloadScript",
                functionDeclaration=f"() => {{ {before} }}",
                contexts=[context],
            )
        self.call("browsingContext.navigate", context=context, url=url, wait="complete")
        return page


class FirefoxPage:
    """One page of Firefox, with the methods of Page."""

    def __init__(self, firefox: Firefox, context: str) -> None:
        self._firefox, self._context = firefox, context
        self.console: list[str] = []

    def js(self, expression: str) -> Any:
        result = self._firefox.call(
            "script.evaluate",
            expression=expression,
            target={"context": self._context},
            awaitPromise=True,
            serializationOptions={"maxObjectDepth": 10},
        )
        assert result["type"] == "success", result["exceptionDetails"]["text"]
        return self._value(result["result"])

    def _value(self, value: dict[str, Any]) -> Any:
        if value["type"] == "array":
            return [self._value(each) for each in value["value"]]
        if value["type"] == "object":
            return {name: self._value(each) for name, each in value["value"]}
        return value.get("value")

    wait: Any = Page.wait
    complaints: Any = Page.complaints

    def click(self, selector: str) -> None:
        """Click as a visitor does."""
        rect = self.js(
            f"(() => {{ const r = document.querySelector('{selector}').getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        pointer = [
            {"type": "pointerMove", "x": round(rect[0]), "y": round(rect[1])},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        actions = [{"type": "pointer", "id": "mouse", "actions": pointer}]
        self._firefox.call("input.performActions", context=self._context, actions=actions)

    def be_offline(self, offline: bool) -> None:
        self._firefox.call(
            "emulation.setNetworkConditions",
            networkConditions={"type": "offline"} if offline else None,
            contexts=[self._context],
        )

    def close(self) -> None:
        self._firefox.call("browsingContext.close", context=self._context)


@pytest.fixture(scope="module")
def firefox() -> Iterator[Firefox]:
    if FIREFOX is None:
        pytest.skip("there is no Firefox on this machine")
    with Firefox() as running:
        yield running


def browser_called(name: str, request: pytest.FixtureRequest) -> Browser | Firefox:
    """Return the fixture of a browser, or skip the test if there is none."""
    fixture = {"chromium": "browser", "firefox": "firefox"}[name]
    return request.getfixturevalue(fixture)  # type: ignore[no-any-return]


@pytest.fixture(params=["chromium", "firefox"])
def either(request: pytest.FixtureRequest) -> Browser | Firefox:
    """Chromium, and then Firefox."""
    return browser_called(request.param, request)


# -- Sites and pages of the demo -------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The single file, copied to an empty folder and run."""
    path = tmp_path_factory.mktemp("demo")
    shutil.copy(HERE / "swiftcms_ws.py", path)
    port = free_port()
    environ = {
        "PYTHONPATH": "",
        "SWIFTCMS_WS_DATABASE": str(path / "missing" / "live.sqlite3"),
        "SWIFTCMS_WS_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
    }
    command = (sys.executable, "swiftcms_ws.py", "--port", str(port))
    with Process(*command, cwd=path, port=port, **environ) as process:
        yield process


@pytest.fixture
def demo(demo_process: Process) -> Process:
    """The demo with its first entries, which a reset restores."""
    assert demo_api(demo_process, "POST", "reset", {})[0] == 200
    return demo_process


def demo_api(demo: Process, method: str, path: str, data: Any = None) -> tuple[int, Any]:
    """Send a request to the demo's API; return the status and the JSON of the answer."""
    status, _, body = http(f"http://localhost:{demo.port}/api/{path}", method, data)
    return status, json.loads(body)


@contextlib.contextmanager
def running_demo(*options: str, **more: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the demo; yield its process and the line that it prints when it is ready."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "swiftcms_ws.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    ) as popen:
        try:
            yield popen, read_line(popen)
        finally:
            popen.kill()


def port_of(line: str) -> int:
    """Return the port of the first address in a line."""
    return int(re.findall(r"http://[^/]+:(\d+)/", line)[0])


def press(page: Page, selector: str) -> None:
    """Click a button that is enabled and shown."""
    button = f"document.querySelector('{selector}')"
    page.wait(f"(b => !!b && !b.disabled && !!b.offsetParent)({button})")
    page.js(f"{button}.click()")


def submit(page: Page, form: str, **fields: str) -> None:
    """Fill a form and submit it by its first button that submits."""
    element = f"document.querySelector('{form}')"
    for name, value in fields.items():
        page.js(f"{element}.elements.{name}.value = {json.dumps(value)}")
    page.js(f"{element}.requestSubmit({element}.querySelector('button:not([type])'))")


def log_has(page: Page, words: str) -> None:
    """Wait for a row of the log with these words."""
    page.wait(f"document.querySelector('#log').textContent.includes({json.dumps(words)})")


def sign_in(page: Page, name: str) -> None:
    """Give the name that the demo's page asks for, and wait until its list is there."""
    submit(page, "#name", name=name)
    page.wait("document.querySelectorAll('#entries li').length >= 3")


# -- README ----------------------------------------------------------------------------------------


README = (HERE / "README.md").read_text()

# A shell finds the commands of this environment here.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def readme_block(language: str, words: str) -> str:
    """Return README's one block that has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)
    (found,) = [block for block in blocks if words in block]
    return str(found)


def readme_table(heading: str) -> list[list[str]]:
    """Return the rows of README's table whose first column has this heading."""
    (found,) = re.findall(rf"^\| {re.escape(heading)} .*\n\| -.*\n((?:\|.*\n)+)", README, re.M)
    return [line[2:-2].split(" | ") for line in found.splitlines()]


def readme_site(tmp_path: Path) -> None:
    """Write the first of README's blocks of Python to app.py."""
    (tmp_path / "app.py").write_text(readme_block("python", "LIST_PAGE = "))


def readme_app(code: str) -> tuple[Flask, Hub]:
    """Return the app of README's code, and the ready-made hub, which the test closes."""
    # The app of another test of README may still be alive, in a cycle, and have the same hub.
    gc.collect()
    found: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), found)
    return found["app"], found["hub"]


def post_form(port: int, path: str = "/", **fields: str) -> None:
    """Send a form as a browser does."""
    data = urlencode(fields).encode()
    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, PATIENCE).close()


def can_install(tmp_path: Path) -> bool:
    """Return whether pip finds packages from here: there may be no network."""
    options = ("-q", "--no-deps", "-d", str(tmp_path))
    download = (sys.executable, "-m", "pip", "download", *options, "flask-sock")
    return subprocess.run(download, check=False, capture_output=True, timeout=60).returncode == 0


def readme_flask_run(tmp_path: Path) -> Process:
    """Run README's app.py by its command, in this environment instead of a new one."""
    command = readme_block("sh", "flask run").strip().rpartition(" && .venv/bin/")[2]
    port = free_port()
    return Process(
        *("bash", "-c", f"exec {command} --port {port}"), cwd=tmp_path, port=port, PATH=PATH
    )


def editing_script(script: str) -> str:
    """Return the body of a page with client.js, whose script may use `cms`."""
    script = f"const cms = new SwiftCMS(); {script}"
    return f"<script src='/ws/client.js'></script><script>{script}</script>"


@contextlib.contextmanager
def serving_html(
    body: str, configure: Callable[[Flask, Hub], None] | None = None, **config: Any
) -> Iterator[Server]:
    """Serve a site whose first page has this body."""

    def add_page(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", "page", lambda: html(body))
        if configure is not None:
            configure(app, hub)

    with Server(add_page, **config) as server:
        yield server


# -- Messages, hooks and floods of a session -------------------------------------------------------


def message_ids(rows: list[Any]) -> list[str]:
    """Return test ids for rows that begin with an action and the fields of a message."""
    ids = []
    for action, fields, *_ in rows:
        shown = [f"{name}={value!r:.20}" for name, value in fields.items()]
        ids.append(" ".join([action, *shown]))
    return ids


def receive_heartbeat(client: Client) -> dict[str, Any]:
    """Receive messages up to the next heartbeat, and return that."""
    deadline = time.monotonic() + PATIENCE
    while (message := client.receive(heartbeats=True))["type"] != "system.heartbeat":
        assert time.monotonic() < deadline, "no heartbeat was received"
    return message


def allow(allowed: set[tuple[str, str]]) -> Callable[[Flask, Hub], None]:
    """Configure a site whose authorize hook allows these patterns. A test may change the set."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.authorize(lambda user, event_type, content_type: (event_type, content_type) in allowed)

    return configure


def push_until_full(sock: socket.socket, data: bytes, most: int = 40_000_000) -> int:
    """Send without reading until the socket buffers are full; return how many bytes they took."""
    # They are full if they accept nothing for so long.
    sock.settimeout(0.3)
    pushed = 0
    deadline = time.monotonic() + 2
    with contextlib.suppress(TimeoutError):
        while pushed < most and time.monotonic() < deadline:
            pushed += sock.send(data)
    return pushed


# -- Tokens in handshakes, forged tokens, secrecy -------------------------------------------------


def forged(header: dict[str, Any], key: bytes) -> str:
    """Return a token with an HMAC signature, or none if the key is empty.

    PyJWT refuses to sign with such headers and keys.
    """

    def encoded(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    claims = {"sub": "root", "exp": int(time.time()) + 600}
    signed = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
    signature = b""
    if key:
        digest = {"HS384": "sha384", "HS512": "sha512"}.get(header["alg"], "sha256")
        signature = hmac.digest(key, signed.encode(), digest)
    return f"{signed}.{encoded(signature)}"


def in_address(signed: str) -> dict[str, Any]:
    return {"path": f"/ws?token={signed}"}


def in_header(signed: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {signed}"}}


@pytest.fixture
def short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server look for expired tokens more often, so that tests need not wait."""
    monkeypatch.setattr(swiftcms_ws.Expiry, "CHECK_INTERVAL", 0.02)


@pytest.fixture(scope="module")
def rsa_keys() -> dict[str, Any]:
    """Two private keys, and the first one's public key as text."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    own, other = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in "12")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = own.public_key().public_bytes(serialization.Encoding.PEM, form)
    return {"own": own, "other": other, "public": public.decode()}


def check_secret(secret: str, caplog: pytest.LogCaptureFixture, answers: list[Any]) -> None:
    """Check that neither the claims nor the signature of a token were logged or answered."""
    logged = repr([record.__dict__ for record in caplog.records])
    everything = caplog.text + logged + repr(answers)
    for part in secret.split(".")[1:]:
        at = everything.find(part)
        assert at < 0, everything[max(0, at - 300) :][:400]


# -- Pages with client.js --------------------------------------------------------------------------


# What a page has received, its statuses, gaps, and the messages that it has sent.
RECORD = """
const got = [], statuses = [], gaps = [], sent = [], received = [];
const record = cms => {
  cms.onstatus = status => statuses.push(status);
  cms.ongap = list => gaps.push(list.map(({type, contentType}) => `${type} ${contentType}`));
  cms.onframe = (direction, text) => {
    (direction === "out" ? sent : received).push(JSON.parse(text));
  };
  return cms;
};
const take = ({payload}) => got.push(payload.n);
const subscribes = () => sent.filter(({action}) => action === "subscribe");
// A reconnect that takes over two seconds, as on a busy machine, is "offline" meanwhile.
const onlines = () => statuses.filter(status => status === "online").length;
"""

SIMPLE = "const cms = record(new SwiftCMS()); cms.subscribe('content.*', 'posts', take);"

# Clients reconnect almost at once.
NO_WAIT = "Math.random = () => 0.01;"


def faster_timers(which: str, factor: int) -> str:
    """Return a script that divides the times of some timers by `factor`.

    which: a condition of `time`, in milliseconds, and `name`, which is that of the function. The
    page's list `timers` has both of each of these timers.
    """
    return f"""
      window.timers = [];
      {{
        const real = setTimeout;
        window.setTimeout = (run, time, ...more) => {{
          const name = run.name;
          if (!({which})) return real(run, time, ...more);
          timers.push([name, time]);
          return real(run, time / {factor}, ...more);
        }};
      }}
    """


# Counts the WebSockets and the event streams, polls included, that the page has opened.
COUNT_CONNECTIONS = """
  window.sockets = window.sources = 0;
  window.WebSocket = class extends WebSocket {
    constructor(...options) { super(...options); window.sockets++; }
  };
  window.EventSource = class extends EventSource {
    constructor(...options) { super(...options); window.sources++; }
  };
"""

# Without locks, pages cannot agree which of them has the stream: they poll.
WITHOUT_LOCKS = "delete Navigator.prototype.locks;"

# A test can hide the page with hide().
HIDEABLE = """
  let isHidden = false;
  Object.defineProperty(Document.prototype, "hidden", {get: () => isHidden});
  window.hide = value => {
    isHidden = value;
    document.dispatchEvent(new Event("visibilitychange", {bubbles: true}));
  };
"""


def live_page(script: str = SIMPLE, client: str = "/ws/client.js") -> str:
    """Return a page that uses client.js and runs this script."""
    return html(live_body(script, client))


def live_body(script: str = SIMPLE, client: str = "/ws/client.js") -> str:
    return f"<script src='{client}'></script><script>{RECORD}{script}</script>"


def serving(
    script: str = SIMPLE,
    configure: Callable[[Flask, Hub], None] | None = None,
    **config: Any,
) -> contextlib.AbstractContextManager[Server]:
    """Serve a site with a page that uses client.js and runs this script."""
    return serving_html(live_body(script), configure, **config)


@contextlib.contextmanager
def visit(
    browser: Any,
    script: str = SIMPLE,
    configure: Callable[[Flask, Hub], None] | None = None,
    *,
    path: str = "/",
    before: str = "",
    block: int | str | None = None,
    is_online: bool = True,
    **config: Any,
) -> Iterator[tuple[Any, Server, PageProxy]]:
    """Open a page with client.js through a proxy. Yield the page, its server and the proxy.

    It reconnects almost at once. before: a script that runs before all others. block: see
    PageProxy.
    """
    with serving(script, configure, **config) as server, PageProxy(server.port, block) as proxy:
        page = browser.page(f"http://localhost:{proxy.port}{path}", before=NO_WAIT + before)
        try:
            if is_online:
                online(page)
            yield page, server, proxy
        finally:
            page.close()


def online(page: Any) -> None:
    """Wait until the page is online."""
    page.wait("statuses.at(-1) === 'online'")


def go(page: Any, url: str) -> None:
    """Follow a link, and wait until the other page is there."""
    page.js(f"setTimeout(() => {{ location.href = '{url}' }}); 0")
    settle(page, url)


def settle(page: Any, url: str) -> None:
    """Wait until the page with this URL is loaded."""

    def has_arrived() -> bool:
        try:
            return bool(
                page.js(f"location.href.endsWith('{url}') && document.readyState === 'complete'")
            )
        except AssertionError:
            # The page was leaving.
            return False

    until(has_arrived, f"the page {url}")


@pytest.fixture(scope="module")
def offline_page(browser: Browser) -> Iterator[Page]:
    """A page that has loaded client.js and has no server."""
    page = browser.page("data:text/html,<title>x</title>")
    page.js(swiftcms_ws.CLIENT_JS)
    yield page
    page.close()


def console_has(page: Any, words: str) -> None:
    """Wait until the console has a line with these words."""
    until(lambda: words in "\n".join(page.complaints()), f"“{words}” in the console")


def with_login(app: Flask, hub: Hub) -> None:
    """Add views that sign in and out; each user has several devices."""
    hub.identify(lambda: session.get("user_id") and (session["user_id"], session["device"]))

    @app.get("/login/<user_id>/<device>")
    def login(user_id: str, device: str) -> str:
        session["user_id"], session["device"] = user_id, device
        return "hello"

    @app.get("/logout")
    def logout() -> str:
        session.clear()
        return "bye"


def with_download(app: Flask, hub: Hub) -> None:
    """Add a file that browsers download."""
    headers = {"Content-Disposition": "attachment; filename=x.txt"}
    app.add_url_rule("/file", "file", lambda: Response("x", headers=headers))


@pytest.fixture
def set_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Change times of client.js, in milliseconds.

    POLL_END=0 is for tests that cut streams soon, as a server that cannot stream would end them.
    """

    def set_them(**times: int) -> None:
        script = swiftcms_ws.CLIENT_JS
        for name, time_ in times.items():
            script, count = re.subn(rf"(const {name} =) [\d_]+;", rf"\1 {time_};", script)
            assert count == 1, name
        monkeypatch.setattr(swiftcms_ws, "CLIENT_JS", script)
        swiftcms_ws.client_js.cache_clear()

    yield set_them
    swiftcms_ws.client_js.cache_clear()


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages without a stream poll every 0.2 seconds, instead of every 1.5."""
    monkeypatch.setattr(swiftcms_ws.Poll, "LONGEST_RETRY", 0.2)


# The last commit of version 1.0.0.
VERSION_1 = "6c37b16"


@pytest.fixture
def version_1_client() -> str:
    """client.js of version 1.0.0, from the repository's history."""
    command = ["git", "show", f"{VERSION_1}:swiftcms_ws.py"]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if run.returncode and not (HERE / ".git").exists():
        pytest.skip("this is not a checkout, so there is no client.js of version 1.0.0")
    assert run.returncode == 0, (
        f"client.js of version 1.0.0 is in commit {VERSION_1}, which this clone does not have: "
        f"clone with the whole history (fetch-depth: 0 in a workflow). git says: {run.stderr}"
    )
    found = re.search(r'^CLIENT_JS = r"""(.*?)^"""', run.stdout, re.S | re.M)
    assert found is not None
    return found[1]


# -- Proxies before a page -------------------------------------------------------------------------


class PageProxy(Proxy):
    """A proxy that can block WebSockets, and lose its server or its clients.

    block: the status with which it refuses handshakes of WebSockets, or one of these:
    None: everything passes.
    "cut", "hang": it cuts WebSockets before their handshake, or never answers.
    "late": it cuts a WebSocket after the first message of the server.
    "buffer", "hold": WebSockets are refused, and the body of each response, or the whole response,
    is kept back until it is complete.
    "freeze": the same, and all responses are kept back.
    """

    def __init__(self, port: int, block: int | str | None = None) -> None:
        self.block = block
        # How many handshakes are refused before they pass.
        self.refusals = 1_000_000
        # The paths of all requests.
        self.requests: list[str] = []
        self._forgotten: list[socket.socket] = []
        super().__init__(port)

    def __enter__(self) -> PageProxy:
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__()
        for far in self._forgotten:
            with contextlib.suppress(OSError):
                far.shutdown(socket.SHUT_RDWR)
            far.close()

    def count(self, words: str) -> int:
        return sum(words in path for path in self.requests)

    def lead_to(self, port: int, cut: bool = True) -> None:
        """Lead new connections to another server, and cut the others."""
        self.target = port
        if cut:
            self.cut()

    @contextlib.contextmanager
    def without_server(self, cut: bool = True) -> Iterator[None]:
        """Refuse new connections, and cut the others."""
        target = self.target
        self.lead_to(free_port(), cut)
        yield
        self.target = target

    def forget_clients(self) -> None:
        """Cut all connections unnoticed by the server, as a change of the network does."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        self._forgotten += [far for _, far in pairs]
        for near, _ in pairs:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
            near.close()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:  # type: ignore[override]
        kept = b""
        with contextlib.suppress(OSError):
            is_client = source.getsockname()[1] == self.port
            while data := source.recv(65536):
                if is_client:
                    if data.startswith((b"GET", b"HEAD")):
                        self.requests.append(data.split(b" ", 2)[1].decode())
                    if b"upgrade: websocket" in data.lower() and self._refuses(source):
                        continue
                elif self.block == "buffer":
                    head, end, rest = (kept + data).partition(b"\r\n\r\n")
                    kept, data = (rest, head + end) if end else (head, b"")
                elif self.block == "hold":
                    kept, data = kept + data, b""
                elif self.block == "freeze":
                    continue
                sink.sendall(data)
                if self.block == "late" and b'"system.connected"' in data:
                    sink.shutdown(socket.SHUT_RDWR)
            sink.sendall(kept)
        # A reset is passed on too: Firefox resets a WebSocket if its page is left while it opens.
        if sink not in self._forgotten:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def _refuses(self, client: socket.socket) -> bool:
        if self.block in (None, "late") or self.refusals == 0:
            return False
        self.refusals -= 1
        if self.block != "hang":
            status = self.block if isinstance(self.block, int) else 403
            if self.block != "cut":
                client.sendall(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            client.shutdown(socket.SHUT_RDWR)
        return True


class PrefixProxy(Proxy):
    """A proxy that strips /prefix from the paths of requests, and lets no other paths through."""

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                data = re.sub(rb"^([A-Z]+) /(?!prefix/)\S*", rb"\1 /prefix/outside", data)
                sink.sendall(re.sub(rb"^([A-Z]+) /prefix/", rb"\1 /", data))
            sink.shutdown(socket.SHUT_WR)


# -- Live pages in a browser -----------------------------------------------------------------------


# Counts the answers to refreshes: this listener runs after that of client.js. matchesServer()
# fetches the page as a visitor would, and compares an element with it.
LIVE_SCRIPT = """
  var answers = 0, refreshed = [];
  const send = XMLHttpRequest.prototype.send;
  XMLHttpRequest.prototype.send = function () {
    this.addEventListener("loadend", () => answers++);
    send.call(this);
  };
  addEventListener("swiftcms:refresh", ({target}) => refreshed.push(target.id));
  const $ = id => document.getElementById(id);
  const edit = field => field.dispatchEvent(new Event("input", {bubbles: true}));
  function comparable(node) {
    const copy = document.implementation.createHTMLDocument().importNode(node, true);
    for (const each of copy.querySelectorAll("noscript")) each.replaceChildren();
    for (const each of copy.querySelectorAll("template")) each.append(each.innerHTML);
    return copy;
  }
  const matchesServer = id => new Promise(resolve => {
    const request = new XMLHttpRequest();
    request.open("GET", location.href);
    request.responseType = "document";
    request.onload = () => {
      const pages = [request.response, document];
      const [fresh, own] = pages.map(each => comparable(each.getElementById(id)));
      resolve(own.isEqualNode(fresh) || `${own.outerHTML}\\n--\\n${fresh.outerHTML}`);
    };
    send.call(request);
  });
"""

ONLINE = "document.documentElement?.dataset.swiftcms === 'online'"

# The live element of most tests.
UL = "<ul id=posts data-live='content.* posts' data-live-within=0>{}</ul>"


class LivePageSite:
    """A site with one live page. Tests change its body."""

    def __init__(self, body: str = "", **config: Any) -> None:
        self.body = body
        self.head = f"<script>{LIVE_SCRIPT}</script><script src='/ws/client.js'></script>"
        self.headers: dict[str, str] = {}
        self.status = 200
        self.live_requests: list[tuple[str, Any]] = []
        # Refreshes wait until it is set.
        self.pause = threading.Event()
        self.pause.set()
        self._pages: list[Any] = []
        self.server = Server(self._configure, **config)

    def _configure(self, app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", "live_page", self._page, methods=["GET", "POST"])

    def _page(self) -> Any:
        head = f"<head><title>x</title><link rel=icon href=data:,>{self.head}</head>"
        page = f"<!doctype html><html>{head}<body>{self.body}"
        if request.headers.get("X-SwiftCMS-Live"):
            self.live_requests.append((request.full_path.rstrip("?"), request.headers))
            self.pause.wait(PATIENCE)
        return Response(page, self.status, self.headers)

    def replace_view(self, view: Callable[..., Any]) -> None:
        """Answer with view(respond); respond() returns the usual response."""
        functions = self.server.app.view_functions
        functions["live_page"] = functools.partial(view, functions["live_page"])

    def __enter__(self) -> LivePageSite:
        self.server.__enter__()
        self.url = f"http://localhost:{self.server.port}/"
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            for page in self._pages:
                page.close()
        finally:
            self.server.__exit__(*exc)

    def open(self, browser: Any, body: str | None = None, path: str = "", **options: Any) -> Any:
        """Open the page, and wait until it is online."""
        self.body = self.body if body is None else body
        page = browser.page(f"{self.url}{path}", **options)
        self._pages.append(page)
        page.wait(ONLINE)
        return page

    def change(self, page: Any, body: str | None = None, **event: Any) -> None:
        """Change the page on the server, and wait until the browser has fetched it."""
        self.body = self.body if body is None else body
        before = page.js("answers")
        self.server.publish(**event)
        page.wait(f"answers > {before}")

    def change_items(self, page: Any, items: str, **event: Any) -> None:
        """Change the items of the live list."""
        self.change(page, UL.format(items), **event)


@pytest.fixture
def live() -> Iterator[LivePageSite]:
    with LivePageSite(UL.format("<li id=p1>1</li>"), HISTORY=5) as site:
        yield site


# An element that adds a child when it is created.
CUSTOM_ELEMENT = """<script>customElements.define("x-list", class extends HTMLElement {
  connectedCallback() { this.append(document.createElement("b")); this.lastChild.append("made"); }
})</script>"""


@pytest.fixture(scope="module", params=["chromium", "firefox"])
def morphed(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The results of all rows of MORPHS, on one page that is refreshed once."""

    def body(column: int) -> str:
        attributes = "data-live='* posts' data-live-within=0"
        rows = enumerate(row[column] for row in MORPHS)
        return "\n".join(f"<div id=case-{number} {attributes}>{row}</div>" for number, row in rows)

    def run(number: int, script: str) -> Any:
        function = f"(e => {{ {script} }})($('case-{number}'))"
        guarded = f"try {{ return {function} }} catch (error) {{ return String(error) }}"
        return page.js(f"(() => {{ {guarded} }})()")

    with LivePageSite(body(1)) as site:
        site.head += CUSTOM_ELEMENT
        page = site.open(browser_called(request.param, request))
        mistakes = [run(number, f"{row[2]}; return ''") for number, row in enumerate(MORPHS)]
        site.change(page, body(3))
        results = {}
        for number, row in enumerate(MORPHS):
            value = run(number, f"return !!({row[4]})")
            shown = page.js(f"$('case-{number}').innerHTML")
            results[row[0]] = mistakes[number] or value is True or f"{value}: {shown}"
        results["complaints"] = page.complaints()
    return results


def random_tree(rng: random.Random, depth: int = 0) -> str:
    """Random HTML in which ids are missing, recur, and move."""
    parts = []
    for _ in range(rng.randrange(7 - depth)):
        id_ = rng.choice(["", "", f" id=i{rng.randrange(40)}"])
        inner = random_tree(rng, depth + 1) if depth < 4 else ""
        text = rng.choice(["", "a", "b &amp; c", "\n  ", "long text"])
        checked = rng.choice(["", " checked type=checkbox"])
        selected = rng.choice(["", " selected"])
        number = rng.randrange(3)
        tags = ("div", "ul", "li", "x-list", "details")
        parts.append(
            rng.choice(
                [
                    text,
                    f"<!--{text}-->",
                    f"<input{id_} name=n{number} value='{text}'{checked}>",
                    f"<textarea{id_}>{text}</textarea>",
                    f"<select{id_}><option>1<option{selected}>{text}</select>",
                    f"<template{id_}><i>{text}</i></template>",
                    f"<noscript>{text}<b>{text}</b></noscript>",
                    f"<svg{id_}><g id=g{number}><path d='M{number} 1'/></g></svg>",
                    f"<script{id_}>window.runs = {number}</script>",
                    f"<table{id_}><tr><td>{inner}<td>{text}</table>",
                    *(f"<{tag}{id_} class='{text}' title={number}>{inner}</{tag}>" for tag in tags),
                    *[f"<div{id_}>{inner}</div>\n"] * 3,
                ]
            )
        )
    return "".join(parts)


@contextlib.contextmanager
def received_users(users: list[Any]) -> Iterator[None]:
    """Append the id of the user of each connection that is opened."""

    def note(app: Flask, user: Any, **more: Any) -> None:
        users.append(user and user.id)

    with swiftcms_ws.client_connected.connected_to(note):
        yield


# -- The lesson ------------------------------------------------------------------------------------


# The demo with the default policy of Flask-Talisman and a faster heartbeat. /burst publishes many
# events at once, each type and each content type in turn.
LESSON_SITE = """
import sys
from flask import request
from werkzeug.serving import make_server
import swiftcms_ws

app = swiftcms_ws.demo_app()
app.config["SWIFTCMS_WS_HEARTBEAT"] = 1

@app.after_request
def add_policy(response):
    response.headers["Content-Security-Policy"] = "default-src 'self'; object-src 'none'"
    return response

@app.post("/burst/<int:count>")
def burst(count):
    kinds = [(verb, kind) for verb in ("updated", "published") for kind in ("posts", "pages")]
    events = []
    for number in range(count):
        verb, kind = kinds[number % 4]
        events.append((f"content.{verb}", kind, {"id": 1, "version": 1, "title": str(number)}))
    with app.app_context():
        swiftcms_ws.publish_many(events)
    return {}

make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()
"""


class LessonSite(Process):
    """The demo, behind a proxy that strips a prefix."""

    def __init__(self, path: Path) -> None:
        (path / "lesson_site.py").write_text(LESSON_SITE)
        port = free_port()
        super().__init__(sys.executable, "lesson_site.py", str(port), cwd=path, port=port)
        self.proxy = PrefixProxy(port)
        self.url = f"http://localhost:{self.proxy.port}/prefix/"

    def __enter__(self) -> LessonSite:
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.proxy.__exit__()
        super().__exit__()

    def api(self, method: str, path: str, data: Any = None, **headers: str) -> Any:
        status, _, body = http(f"http://127.0.0.1:{self.port}/{path}", method, data, **headers)
        assert status < 300, body
        return json.loads(body)


@pytest.fixture(scope="module")
def lesson_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LessonSite]:
    with LessonSite(tmp_path_factory.mktemp("lesson")) as site:
        yield site


@pytest.fixture(scope="module")
def pupil(browser: Browser, lesson_site: LessonSite) -> Iterator[Page]:
    """A page of the lesson. Whatever the tests do with it, the browser must not complain."""
    # Times of the page over three seconds, such as the five of a lost connection, are shorter.
    before = faster_timers("time > 3_000", 10)
    page = browser.page(lesson_site.url, before=before)
    size = {"width": 1280, "height": 720, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    sign_in(page, "Mira")
    yield page
    # The refusals of a second save and of a second slow reader are part of the lesson.
    assert [line for line in page.complaints() if "409" not in line] == []
    page.close()


STEP_IS_DONE = "document.querySelector('#lesson').classList.contains('done')"


def begin_step(page: Any, number: int, expected: str) -> None:
    """Open a step by its address, and choose the expected answer."""
    for step in ((number + 1) % 9, number):
        page.js(f"location.hash = 'lesson-{step}'")
        page.wait(f"document.querySelector('#steps [aria-current=step]').title === 'Step {step}'")
    assert page.js("document.querySelector('#act').disabled")
    answers = "[...document.querySelectorAll('#expect button')]"
    text = json.dumps(expected)
    page.js(f"{answers}.find(button => button.textContent === {text}).click()")


def act(page: Any, label: str) -> None:
    """Press the filled button, when it has this label."""
    page.wait(f"document.querySelector('#act').textContent === {json.dumps(label)}")
    assert page.js("[...document.querySelectorAll('#lesson .filled')].map(b => b.id)") == ["act"]
    press(page, "#act")


# -- Time ------------------------------------------------------------------------------------------


# How long nothing happens in the idle test, in seconds. All timeouts are a part of it.
IDLE_SECONDS = float(os.environ.get("SOAK_IDLE", "3"))


@contextlib.contextmanager
def nginx_before(directory: Path, ports: list[int], timeout: int) -> Iterator[list[int]]:
    """Run nginx with README's lines before some sites; it cuts connections that are silent."""
    readme = (HERE / "README.md").read_text()
    block = re.search(r"```nginx\n(.*?)```", readme, re.S)
    assert block is not None
    in_http, location = block[1].split("\n\n")
    fronts = [free_port() for _ in ports]
    servers = [
        f"server {{ listen 127.0.0.1:{front};"
        f" {location.replace('127.0.0.1:8000', f'127.0.0.1:{port}')} }}"
        for front, port in zip(fronts, ports, strict=True)
    ]
    names = ("proxy_read_timeout", "proxy_send_timeout", "send_timeout", "keepalive_timeout")
    timeouts = " ".join(f"{name} {timeout}s;" for name in names)
    (directory / "nginx.conf").write_text(
        f"daemon off; error_log stderr; pid {directory}/nginx.pid; events {{}}\n"
        f"http {{ access_log off; {timeouts}\n{in_http}\n{' '.join(servers)} }}"
    )
    assert NGINX is not None
    command = (NGINX, "-c", str(directory / "nginx.conf"))
    with Process(*command, cwd=directory, port=fronts[0]) as nginx:
        yield fronts
        nginx.popen.terminate()
        nginx.popen.wait(PATIENCE)


class IdleClients:
    """Clients of several sites, over WebSocket, stream and poll, which note all events."""

    def __init__(self, heartbeat: float) -> None:
        self._patience = max(PATIENCE, 3 * heartbeat)
        self._stopped = threading.Event()
        # By name of the client: None before it is subscribed, then the payloads of its events.
        self.received: dict[str, list[Any] | None] = {}

    def tasks(self, name: str, port: int) -> list[Callable[[], None]]:
        """Return what has to run in threads, one for each client of a site."""
        methods = {"WebSocket": self._websocket, "stream": self._stream, "poll": self._poll}
        for transport in methods:
            self.received[f"{name}, {transport}"] = None
        return [
            functools.partial(method, f"{name}, {transport}", port)
            for transport, method in methods.items()
        ]

    def have_subscribed(self) -> bool:
        return None not in self.received.values()

    def stop(self) -> None:
        """Let each client receive one more heartbeat, before which a second event would come."""
        self._stopped.set()

    def _websocket(self, name: str, port: int) -> None:
        with Client(port) as client:
            client.subscribe()
            self._read(name, client)

    def _stream(self, name: str, port: int) -> None:
        with Stream(port) as stream:
            assert stream.receive()["type"] == "system.subscribed"
            self._read(name, stream)

    def _read(self, name: str, client: Client | Stream) -> None:
        payloads = self.received[name] = []
        while not self._stopped.is_set():
            message = client.receive(self._patience, heartbeats=True)
            if message["type"] != "system.heartbeat":
                payloads.append(message["payload"])

    def _poll(self, name: str, port: int) -> None:
        query = ""
        while True:
            was_stopped = self._stopped.is_set()
            answer = Polled(http(f"http://127.0.0.1:{port}/ws/events?mode=poll{query}"))
            assert answer.first["recovered"]
            self.received[name] = (self.received[name] or []) + answer.payloads
            if was_stopped:
                return
            query = f"&since={answer.last_id}"
            assert answer.retry is not None
            self._stopped.wait(answer.retry)


# A site in a process of its own that counts what is in its memory.
SOAK_SITE = '''
import functools, gc, itertools, json, os, sys
from collections import Counter
from flask import Flask, request
import swiftcms_ws
import waitress
from swiftcms_ws import Hub

swiftcms_ws.Connection.CLOSE_TIMEOUT = 0.2
app = Flask(__name__)
app.secret_key = "a key of more than thirty-two bytes, for tests"
app.config.update(json.loads(os.environ["TEST_CONFIG"]))
numbers = itertools.count()
hub = Hub()
hub.identify(lambda: request.args.get("user"))
hub.authorize(lambda user, event_type, content_type: True)
hub.init_app(app)


@app.post("/publish/<int:count>")
def publish(count):
    """Publish events with many names, of which every tenth has a recipient of its own."""
    public = 0
    for start in range(0, count, 500):
        chosen = list(itertools.islice(numbers, min(500, count - start)))
        hub.publish_many(
            ("content.created", f"kind{n % 50}", {"n": n}, *([f"user{n}"] if n % 10 == 0 else []))
            for n in chosen
        )
        public += sum(n % 10 > 0 for n in chosen)
        # The clients that stay must not be closed as slow ones.
        assert hub.flush(60)
    return {"public": public}


@app.get("/state")
def state():
    # Caches that have a limit are no leak, and they are not full yet.
    for each in gc.get_objects():
        if isinstance(each, functools._lru_cache_wrapper) and each.cache_parameters()["maxsize"]:
            each.cache_clear()
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "blocks": sys.getallocatedblocks(),
        **Counter(f"objects of {type(each).__name__}" for each in gc.get_objects()),
        "slots": hub._engine().registry.slots,
    }


waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]), threads=4)
'''


class SoakClients:
    """Clients that come and go in six ways, beside a few that stay and count their events."""

    EVENT = b'"id": "'

    def __init__(self, port: int) -> None:
        self._port = port
        self._visits = itertools.count()
        # Each client that stays, with how many events it has received.
        self.counts = {Stream(port).sock: 0 for _ in range(2)}
        self._rests = dict.fromkeys(self.counts, b"")
        # How many events they must receive.
        self.published = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def have_received_all(self) -> bool:
        return set(self.counts.values()) == {self.published}

    def stay(self) -> None:
        """Thread body: count events until stop()."""
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            for sock in self.counts:
                selector.register(stack.enter_context(sock), selectors.EVENT_READ)
            while not self._stopped.is_set():
                for key, _ in selector.select(0.05):
                    self._read(key.fileobj)

    def _read(self, sock: Any) -> None:
        data = sock.recv(1 << 20)
        assert data, f"a client that stays was disconnected: {self._rests[sock]!r}"
        data = self._rests[sock] + data
        self.counts[sock] += data.count(self.EVENT)
        self._rests[sock] = data[1 - len(self.EVENT) :]

    def come_and_go(self, count: int) -> None:
        """Open and close so many connections, in three threads."""
        last = next(self._visits) + count

        def visit() -> None:
            while (number := next(self._visits)) <= last:
                self._visit(number)

        run_all([visit] * 3, timeout=3600)

    def _visit(self, number: int) -> None:
        """Connect as a user and with a subscription that no other client has, and leave."""
        way, query = number % 6, f"user=visitor{number}"
        if way == 0:
            http(f"http://127.0.0.1:{self._port}/ws/events?mode=poll&sub=kind{number}.*&{query}")
        elif way < 3:
            stream = Stream(self._port, f"sub=kind{number}.*&{query}")
            assert stream.receive()["type"] == "system.subscribed"
            self._leave(stream.sock, way)
        else:
            sock = open_raw(self._port, f"/ws?{query}")
            sock.sendall(text(action="subscribe"))
            sock.sendall(text(action="subscribe", type=f"kind{number}.*"))
            sock.sendall(text(action="editStart", contentType="posts", entryId=str(number)))
            read_to(sock, b"system.editing")
            self._leave(sock, way)

    @staticmethod
    def _leave(sock: socket.socket, way: int) -> None:
        if way % 3 == 0:
            sock.sendall(Frames.masked(0x8, b"\x03\xe8"))
            read_to_the_end(sock)
        elif way % 3 == 1:
            reset(sock)
        sock.close()


# -- Interleavings ---------------------------------------------------------------------------------


class SimulatedThread(threading.Thread):
    """A thread that runs only while its scheduler lets it."""

    def __init__(self, scheduler: Scheduler, **options: Any) -> None:
        super().__init__(**options)
        self._scheduler = scheduler
        # Released when it is this thread's turn.
        self.turn = threading.Semaphore(0)
        # The thread can continue if this is true, or at a time of Scheduler.now.
        self.condition: Callable[[], Any] = bool
        self.deadline = math.inf

    def start(self) -> None:
        self.condition = lambda: True
        self._scheduler.threads.append(self)
        super().start()

    def run(self) -> None:
        self.turn.acquire()
        sys.settrace(self._scheduler.trace)
        try:
            self._scheduler.check()
            super().run()
        except BaseException as error:
            self._scheduler.fail(error)
        finally:
            sys.settrace(None)
            self._scheduler.leave(self)

    def is_alive(self) -> bool:
        return self in self._scheduler.threads

    def join(self, timeout: float | None = None) -> None:
        self._scheduler.wait_for(lambda: not self.is_alive(), timeout)


class SimulatedLock:
    """A lock, re-entrant or not, for whose release the scheduler waits."""

    def __init__(self, scheduler: Scheduler, is_reentrant: bool = False) -> None:
        self._scheduler = scheduler
        self._is_reentrant = is_reentrant
        self._owner = 0
        self._count = 0

    def acquire(self) -> bool:
        thread = threading.get_ident()
        if not (self._is_reentrant and self._owner == thread):
            self._scheduler.wait_for(lambda: not self._count)
        self._owner = thread
        self._count += 1
        return True

    def release(self) -> None:
        assert self._owner == threading.get_ident()
        self._count -= 1
        if not self._count:
            self._owner = 0

    def locked(self) -> bool:
        return bool(self._count)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class SimulatedCondition:
    """A condition variable for whose notification the scheduler waits."""

    def __init__(self, scheduler: Scheduler, lock: SimulatedLock) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._waiting: list[object] = []

    def wait(self, timeout: float | None = None) -> bool:
        waiter = object()
        self._waiting.append(waiter)
        self._lock.release()
        is_notified = self._scheduler.wait_for(lambda: waiter not in self._waiting, timeout)
        self._lock.acquire()
        if not is_notified:
            self._waiting.remove(waiter)
        return is_notified

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        while not (result := predicate()):
            if not self.wait(timeout):
                return predicate()
        return result

    def notify_all(self) -> None:
        assert self._lock.locked()
        self._waiting.clear()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


class SimulatedEvent:
    """An event for which the scheduler waits."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        return self._scheduler.wait_for(self.is_set, timeout)


class SimulatedQueue:
    """A queue.SimpleQueue for whose items the scheduler waits."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[Any] = deque()
        self.put = self._items.append

    def get(self) -> Any:
        self._scheduler.wait_for(lambda: self._items)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        raise queue.Empty


class SimulatedSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """A selector for whose sockets the scheduler waits."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def select(self, timeout: float | None = None) -> Any:
        find = super().select
        self._scheduler.wait_for(lambda: find(0), timeout)
        return find(0)


class SimulatedSocket(socket.socket):
    """A socket for whose data the scheduler waits, unless its timeout is 0."""

    def __init__(self, scheduler: Scheduler, *options: Any) -> None:
        super().__init__(*options)
        self._scheduler = scheduler

    def recv(self, *options: Any) -> bytes:
        timeout = self.gettimeout()
        if timeout != 0 and not self._scheduler.wait_for(lambda: is_readable(self), timeout):
            raise TimeoutError
        return super().recv(*options)


class Scheduler:
    """Runs threads one at a time, and chooses by a seed which of them continues.

    It may choose another one before every instruction of the given classes. Locks, sockets and
    time are simulated: a thread that waits in vain is found at once, and a seed repeats its run.
    """

    START = 1_800_000_000.0
    # After so many simulated seconds in which no thread could continue, the run has failed.
    MAX_SECONDS = 60.0

    def __init__(self, seed: int, classes: tuple[type, ...]) -> None:
        self._random = random.Random(seed)
        # A run with few switches lets one thread do much while another one waits in the middle.
        self._chance = self._random.choice([0.01, 0.04, 0.15])
        self._codes = codes_of(classes)
        self.now = self.START
        self.threads: list[SimulatedThread] = []
        self._failure: BaseException | None = None
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Let the module use simulated threads, locks, sockets and time."""

        def simulated(class_: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            return functools.partial(class_, self, **options)

        changes: dict[types.ModuleType, dict[str, Any]] = {
            threading: {
                "Thread": simulated(SimulatedThread),
                "Lock": simulated(SimulatedLock),
                "RLock": simulated(SimulatedLock, is_reentrant=True),
                "Condition": simulated(SimulatedCondition),
                "Event": simulated(SimulatedEvent),
            },
            queue: {"SimpleQueue": simulated(SimulatedQueue)},
            selectors: {"DefaultSelector": simulated(SimulatedSelector)},
            socket: {"socket": simulated(SimulatedSocket)},
            time: {
                "monotonic": lambda: self.now,
                "time": lambda: self.now,
                "time_ns": lambda: round(self.now * 1e9),
                "sleep": self.sleep,
            },
        }
        with pytest.MonkeyPatch.context() as patch:
            for module, names in changes.items():
                stand_in = types.SimpleNamespace(**{**vars(module), **names})
                patch.setattr(swiftcms_ws, module.__name__, stand_in)
            # The collector would run finalizers of earlier runs, at times that no seed decides.
            gc.disable()
            try:
                yield
            finally:
                gc.enable()

    def run(self, main: Callable[[], None]) -> None:
        """Run a function, and all threads that it starts, until all have returned."""
        first = self.start(main)
        first.turn.release()
        is_over = self._is_over.wait(PATIENCE)
        if self._failure is not None:
            raise self._failure
        assert is_over, "a thread waits for something that is not simulated"
        threading.Thread.join(first, PATIENCE)

    def start(self, function: Callable[[], None]) -> SimulatedThread:
        thread = SimulatedThread(self, target=function, daemon=True)
        thread.start()
        return thread

    def run_all(self, tasks: list[Callable[[], None]]) -> None:
        """Run each task in a thread, and wait for all of them."""
        for thread in list(map(self.start, tasks)):
            thread.join()

    # -- the thread whose turn it is ---------------------------------------------------------------

    def trace(self, frame: types.FrameType, event: str, argument: object) -> Any:
        """Be called by the interpreter for each function, line and instruction."""
        if event == "call":
            if frame.f_code not in self._codes:
                return None
            frame.f_trace_opcodes = True
        elif self._random.random() < self._chance:
            self._switch()
        return self.trace

    def wait_for(self, condition: Callable[[], Any], timeout: float | None = None) -> bool:
        """Let other threads run until a condition holds; return whether it does."""
        thread = threading.current_thread()
        if not isinstance(thread, SimulatedThread):
            # The test creates its objects before the run.
            return bool(condition())
        if not condition() or self._random.random() < self._chance:
            thread.condition = condition
            thread.deadline = math.inf if timeout is None else self.now + timeout
            self._switch()
            thread.condition, thread.deadline = lambda: True, math.inf
        return bool(condition())

    def sleep(self, seconds: float) -> None:
        """Sleep for a simulated time, in which other threads may do much or nothing."""
        self.wait_for(lambda: self._random.random() < 0.1, seconds)

    def check(self) -> None:
        """Let a thread exit if the run has failed."""
        if self._failure is not None:
            raise SystemExit

    def fail(self, error: BaseException) -> None:
        """End the run. All threads exit."""
        if self._failure is None:
            self._failure = error
            for thread in self.threads:
                thread.turn.release()
            self._is_over.set()

    def leave(self, thread: SimulatedThread) -> None:
        """Let another thread continue after the last instruction of this one."""
        self.threads.remove(thread)
        if not self.threads:
            self._is_over.set()
        elif self._failure is None:
            with contextlib.suppress(SystemExit):
                self._choose().turn.release()

    def _switch(self) -> None:
        self.check()
        thread = threading.current_thread()
        assert isinstance(thread, SimulatedThread)
        chosen = self._choose()
        if chosen is not thread:
            chosen.turn.release()
            thread.turn.acquire()
        self.check()

    def _choose(self) -> SimulatedThread:
        """Return a thread that can continue. If there is none, let the time pass."""
        ready = [thread for thread in self.threads if thread.condition()]
        if ready:
            chosen = self._random.choice(ready)
        else:
            chosen = min(self.threads, key=lambda thread: thread.deadline)
            if chosen.deadline > self.START + self.MAX_SECONDS:
                self.fail(AssertionError(f"all threads wait in vain: {self._places()}"))
                raise SystemExit
            self.now = max(self.now, chosen.deadline)
        return chosen

    def _places(self) -> str:
        """Return where each thread waits in the module."""
        frames = sys._current_frames()
        places = []
        for thread in self.threads:
            frame = frames.get(thread.ident or 0)
            while frame is not None and frame.f_code.co_filename != swiftcms_ws.__file__:
                frame = frame.f_back
            if frame is not None:
                places.append(f"{thread.name} in {frame.f_code.co_name}:{frame.f_lineno}")
        return ", ".join(places)


def codes_of(classes: tuple[type, ...]) -> set[types.CodeType]:
    """Return the code of all methods of some classes, and of the functions inside them."""
    codes: set[types.CodeType] = set()
    for value in itertools.chain.from_iterable(vars(class_).values() for class_ in classes):
        method = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if code := getattr(inspect.unwrap(method), "__code__", None):
            codes.add(code)
    inner = codes
    while inner:
        inner = {each for code in inner for each in code.co_consts if hasattr(each, "co_code")}
        codes |= inner
    return codes


class FreeThreads:
    """Runs threads as they are. The interpreter switches between them as often as it can.

    It has the methods of Scheduler. At some lines of the given classes a thread gives way.
    """

    def __init__(self, seed: int, classes: tuple[type, ...]) -> None:
        self._random = random.Random(seed)
        self._chance = self._random.choice([0, 0.01, 0.1])
        self._codes = codes_of(classes)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threading.settrace(self._trace)
        try:
            yield
        finally:
            threading.settrace(None)  # type: ignore[arg-type]
            sys.setswitchinterval(interval)

    def _trace(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if event == "call":
            return self._trace if frame.f_code in self._codes else None
        if self._random.random() < self._chance:
            time.sleep(0)
        return self._trace

    def run(self, main: Callable[[], None]) -> None:
        run_all([main])

    def run_all(self, tasks: list[Callable[[], None]]) -> None:
        run_all(tasks)

    def wait_for(self, condition: Callable[[], Any]) -> None:
        until(condition, "what a thread waits for")


def queued_bytes(engine: Engine) -> int:
    """Return the size of the events that wait for the loop."""
    return engine.loop._queued_bytes


class PairClient:
    """A client at the other end of a socket pair, which subscribes to all events after `since`.

    It needs no web server, which the scheduler does not know. Any thread may call take().
    """

    EVENT_ID = re.compile(rb'"id": "(\d+-\d+)"')

    def __init__(self, engine: Engine, since: str, send_buffer: int) -> None:
        self._engine = engine
        self._since = since
        self._send_buffer = send_buffer
        self._lock = threading.Lock()
        self.ids: list[str] = []
        self.connect()

    def connect(self) -> None:
        """Open a connection, and resume after the last event."""
        near, self._sock = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        self._sock.setblocking(False)
        self._data = b""
        self._known = list(self.ids)
        since = self._known[-1] if self._known else self._since
        self._sock.sendall(text(action="subscribe", since=since))
        handshake = swiftcms_ws.Handshake(None, None, 0.0)
        handshake.own_socket = near
        assert self._engine.registry.reserve(100)
        assert self._engine.loop.call(swiftcms_ws.Session.open, self._engine, handshake, None, "")

    def take(self) -> list[str]:
        """Read what has arrived; return the ids of all events that the client has received."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                while data := self._sock.recv(1 << 16):
                    self._data += data
                raise AssertionError(f"disconnected after {self._data[-200:]!r}")
            assert b'"recovered": false' not in self._data
            found = self.EVENT_ID.findall(self._data)
            self.ids = self._known + [event_id.decode() for event_id in found]
            return self.ids

    def is_readable(self) -> bool:
        return is_readable(self._sock)

    def is_subscribed(self) -> bool:
        self.take()
        return b"system.subscribed" in self._data

    def close(self) -> None:
        with self._lock:
            self._sock.close()


class CountingLog(swiftcms_ws.SharedLog):
    """A shared log that stores nothing."""

    def __init__(self) -> None:
        super().__init__(swiftcms_ws.Settings(), False, lambda *record: None)
        self._ids = itertools.count(1)

    def _add_events(self, drafts: Any) -> list[tuple[int, int]]:
        return [(next(self._ids), 0)]


class Subscriber:
    """What the registry needs of a connection."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.framing = swiftcms_ws.WEBSOCKET
        self.user: swiftcms_ws.User | None = None
        self.subscriptions: dict[Any, Any] = {}


# == 1. Map: settings, signals, errors, and the module as a whole ==================================


# -- Configuration ---------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("HEARTBEET", 5, "did you mean `SWIFTCMS_WS_HEARTBEAT`"),
        ("HEARTBEAT", "25", "seconds"),
        ("HEARTBEAT", 0, "seconds"),
        ("HEARTBEAT", True, "seconds"),
        ("HEARTBEAT", float("inf"), "seconds"),
        ("HEARTBEAT", 86_401, "86,400"),
        ("HISTORY", -1, "whole number"),
        ("MAX_QUEUE", 1.5, "whole number"),
        ("AUTH", "yes", '"required"'),
        ("ORIGINS", "https://a.example", "list"),
        ("ORIGINS", ["*"], "list"),
        ("ORIGINS", ["https://a.example/path"], "list"),
        ("PORT", 8080, "unknown config key SWIFTCMS_WS_PORT; known are SWIFTCMS_WS_JWT_KEY"),
        ("JWT_ALGORITHMS", ["none"], "one family"),
        ("JWT_ALGORITHMS", ["HS256", "RS256"], "one family"),
        ("JWT_ALGORITHMS", [], "one family"),
        ("JWT_KEY", "", "not empty"),
        ("INSPECTOR", "no", "True or False"),
        ("RATE", 0, "messages a second"),
    ],
)
def test_config_invalid(key: str, value: object, hint: str) -> None:
    """Registration raises if a config key is unknown or its value is invalid."""
    app = Flask("site")
    app.config[f"SWIFTCMS_WS_{key}"] = value
    with pytest.raises(ValueError, match=re.escape(hint)) as caught:
        Hub().init_app(app)
    assert f"SWIFTCMS_WS_{key}" in str(caught.value)


def test_config_after_registration() -> None:
    """Keys may be set before or after the registration, because they are read at first use."""
    with contextlib.closing(Hub()) as hub:
        app = Flask("site")
        hub.init_app(app)
        app.config.update(SWIFTCMS_WS_HEARTBEAT=7, SWIFTCMS_WS_MAX_SUBSCRIPTIONS=1)
        with served(app) as port, Client(port) as client:
            assert client.hello["payload"]["heartbeat"] == 7
            client.subscribe("a.b")
            assert error_code(client.ask("subscribe", type="a.c")) == "too_many_subscriptions"


def test_config_invalid_after_registration(caplog: pytest.LogCaptureFixture) -> None:
    """The first publish() raises, and a handshake is a logged 500: both name the key."""
    with contextlib.closing(Hub()) as hub:
        app = Flask("site")
        hub.init_app(app)
        app.config["SWIFTCMS_WS_HISTORY"] = -1
        with served(app) as port, pytest.raises(Refused, match="500"):
            Client(port)
        assert "SWIFTCMS_WS_HISTORY" in caplog.text
        with pytest.raises(ValueError, match="SWIFTCMS_WS_HISTORY"):
            hub.publish("content.created", "posts", {})
        app.config["SWIFTCMS_WS_HISTORY"] = 10
        assert hub.publish("content.created", "posts", {})


# -- The module's docstrings -----------------------------------------------------------------------

SOURCE = (HERE / "swiftcms_ws.py").read_text()
MAP = swiftcms_ws.__doc__ or ""


def headings(source: str) -> list[tuple[str, str]]:
    """Return number and name of the sections of a Python file."""
    return re.findall(r"^# == (\d+)\. ([^:\n=]+?)(?::[^=\n]*)? =+$", source, re.M)


def test_map_sections() -> None:
    """The map at the top of the module lists the sections in their order."""
    listed = re.findall(r" (\d+) (\w[\w.-]*(?: [\w.-]+)*)", MAP[MAP.index("Sections") :])
    assert headings(SOURCE) == listed


def test_sections_of_tests() -> None:
    """The sections of this file have the numbers and names of those of the module."""
    own = [each for each in headings(Path(__file__).read_text()) if each[0] not in ("20", "21")]
    assert [each for each in own if each not in headings(SOURCE)] == []


@pytest.mark.parametrize(
    ("owner", "name"), sorted(set(re.findall(r"\b((?:[A-Z][a-z]+)+)\.(_?[a-z_]+)", MAP)))
)
def test_map_names(owner: str, name: str) -> None:
    """Each method, attribute and lock that the map names exists."""
    source = re.search(rf"^class {owner}\b.*?\n(?=\S)", SOURCE, re.M | re.S)
    is_set = source is not None and re.search(rf"\bself\.{name}(:.*)? = ", source[0])
    assert is_set or hasattr(getattr(swiftcms_ws, owner), name)


def test_map_threads() -> None:
    """The map lists the threads that an engine starts."""
    table = MAP[MAP.index("Threads of each engine") : MAP.index("identify runs in")]
    listed = re.findall(r"^    (\w+?)(?:s \d-\d)?  ", table, re.M)
    # swiftcms_ws.Handshake lends its name to a thread of simple-websocket that is never started.
    started = re.findall(r'name ?= ?f?"swiftcms-ws (\w+)(?: \{number\})?"', SOURCE)
    assert {*listed, "handshake"} == set(started)


def test_map_locks() -> None:
    """The map lists all locks, except those of the command line and of the demo."""
    found = {"LogFile._queue"}
    owner = ""
    for line in SOURCE[SOURCE.index("# == 2. ") : SOURCE.index("# == 17. ")].split("\n"):
        if match := re.match(r"class (\w+)", line):
            owner = f"{match[1]}."
        elif match := re.match(r"(\s+self\.)?(_\w+) = threading\.R?Lock\(\)", line):
            found.add((owner if match[1] else "") + match[2])
    table = MAP[MAP.index("What each lock guards") : MAP.index("A thread holds one lock")]
    assert set(re.findall(r"(?:[A-Z]\w+\.)?_\w+", table)) == found


def test_class_docstrings() -> None:
    """Each class has a docstring; most name the thread that runs it."""
    classes = [value for value in vars(swiftcms_ws).values() if isinstance(value, type)]
    own = [each for each in classes if each.__module__ == "swiftcms_ws"]
    # A dataclass without one gets its signature.
    assert [each for each in own if (each.__doc__ or "(").startswith(f"{each.__name__}(")] == []
    assert [each for each in own if not each.__doc__] == []


# -- Platforms without some modules ----------------------------------------------------------------

WINDOWS_SITE = """
import socket, sys

def tcp_socketpair(family=socket.AF_INET, type=socket.SOCK_STREAM, proto=0):
    if type != socket.SOCK_STREAM:
        raise ValueError("Only SOCK_STREAM socket type is supported")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]

sys.modules["fcntl"] = sys.modules["resource"] = None
socket.socketpair = tcp_socketpair
del socket.AF_UNIX

from flask import Flask
from swiftcms_ws import blueprint, publish

app = Flask(__name__)
app.register_blueprint(blueprint)

@app.post("/publish")
def publish_it():
    return {"id": publish("content.created", "posts", {"n": 1})}

app.run(port=int(sys.argv[1]))
"""


def test_platform_without_fcntl_resource_and_unix_sockets(tmp_path: Path) -> None:
    """As on Windows: a site delivers its events, and a file stores them."""
    path = tmp_path / "live.sqlite3"
    site = script_site(tmp_path, WINDOWS_SITE, SWIFTCMS_WS_DATABASE=str(path))
    with site as process, process.client() as client:
        client.subscribe("content.*", "posts")
        event_id = publish_over_http(process)
        assert client.receive()["id"] == event_id
        assert client.close().code == 1000
        assert "Traceback" not in process.output()
    assert event_id in stored_ids(path)


# == 2. Hub: the public API ========================================================================


# -- publish() -------------------------------------------------------------------------------------


@pytest.mark.core
def test_publish_from_any_thread(server: Server) -> None:
    """No app context and no client is needed. Ids grow, and events arrive in their order."""
    ids = [server.publish(0)]
    with server.client() as client:
        assert client.hello["payload"]["lastId"] == ids[0]
        client.subscribe()
        run_all([lambda: ids.append(server.publish(1))])
        ids += [server.publish(number) for number in range(2, 50)]
        messages = client.receive_many(49)
    assert [message["id"] for message in messages] == ids[1:]
    assert numbers(messages) == list(range(1, 50))
    positions = [position(event_id) for event_id in ids]
    assert positions == sorted(set(positions))


@pytest.mark.core
@pytest.mark.parametrize("method", ["publish", "publish_many"])
@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((5, "posts", {}), TypeError, "event_type"),
        (("", "posts", {}), ValueError, "event_type"),
        (("content.*", "posts", {}), ValueError, "event_type"),
        (("a b", "posts", {}), ValueError, "event_type"),
        pytest.param(("x" * 129, "posts", {}), ValueError, "event_type", id="129 letters"),
        (("system.connected", "posts", {}), ValueError, "event_type"),
        (("system", "posts", {}), ValueError, "event_type"),
        (("content.created", None, {}), TypeError, "content_type"),
        (("content.created", "*", {}), ValueError, "content_type"),
        (("content.created", "posts", len), TypeError, "payload"),
        (("content.created", "posts", {"x": float("nan")}), TypeError, "payload"),
        (("content.created", "posts", {1: 1, "a": 2}), TypeError, "payload"),
        (("content.created", "posts", {}, 5.5), TypeError, "to"),
        (("content.created", "posts", {}, ""), ValueError, "to"),
        (("content.created", "posts", {}, [None]), TypeError, "to"),
        (("content.created", "posts", {}, {"ana": 1}), TypeError, "to"),
        # A NULL owner in the database must not make a private event public.
        (("content.created", "posts", {}, None), TypeError, "to .*None"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_publish_invalid(
    server: Server, arguments: tuple[Any, ...], error: type[Exception], named: str, method: str
) -> None:
    """An invalid argument raises in the caller, is named, and nothing is sent."""
    with server.client() as client:
        client.subscribe()
        with pytest.raises(error, match=rf"^{named}\b"):
            if method == "publish":
                server.hub.publish(*arguments[:3], to=(*arguments, EVERYONE)[3])
            else:
                server.hub.publish_many([("content.created", "posts", {}), arguments])
        client.nothing_more()
        assert stat(server, "published") == 0


def sqlite_row() -> sqlite3.Row:
    """Return a row as a query returns it, which is no dict."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute("SELECT 1 AS id").fetchone()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("payload", "hint"),
    [
        (sqlite_row(), r"publish dict\(row\)$"),
        ([sqlite_row()], r"publish dict\(row\)$"),
        ({"tags": {"a"}}, r"publish a list: list\(…\)$"),
        ({"a": 1}.keys(), r"publish a list: list\(…\)$"),
        ({"price": float("nan")}, "publish None in its place$"),
        ({"price": float("inf")}, "publish None in its place$"),
        (object(), "a dict such as"),
    ],
    ids=["row", "rows", "set", "keys", "nan", "infinity", "object"],
)
def test_publish_payload_hint(server: Server, payload: Any, hint: str) -> None:
    """The error says how to publish such a payload."""
    with pytest.raises(TypeError, match=hint):
        server.hub.publish("content.created", "posts", payload)


def test_publish_before_registration() -> None:
    """The error says what to do first."""
    with pytest.raises(RuntimeError, match=r"publish after app\.register_blueprint\(blueprint\)"):
        Hub().publish("content.created", "posts", {})


# -- Recipients ------------------------------------------------------------------------------------


@pytest.mark.core
def test_publish_to_users(server: Server) -> None:
    """An event with `to` reaches all connections of these users, and no other client."""
    users = ["ana", "ana", "bob", "7", None]
    expected = {"ana": [0], "bob": [1], "7": [1], None: []}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in users]
        for client, user in zip(clients, users, strict=True):
            if user:
                client.authenticate(token(user))
            client.subscribe("notification")
        for number, to in enumerate(["ana", ["bob", 7], {"another"}, []]):
            server.publish(number, "notification", to=to)
        for client, user in zip(clients, users, strict=True):
            assert numbers(client.rest()) == expected[user]


def test_publish_to_generator(server: Server) -> None:
    """A generator can be read once, and both clients and receivers get its users."""
    recipients: list[list[str]] = []

    def published(app: Flask, to: Any, **more: Any) -> None:
        recipients.append(list(to))

    with server.client() as client, swiftcms_ws.event_published.connected_to(published):
        client.authenticate(token("ana"))
        client.subscribe()
        server.publish(1, to=(name for name in ("ana", "bob")))
        assert client.receive()["payload"] == {"n": 1}
    assert recipients == [["ana", "bob"]]


class EventType(str, Enum):
    CREATED = "content.created"


class ContentType(str, Enum):
    POSTS = "posts"


class UserId(str, Enum):
    ANA = "ana"


@pytest.mark.parametrize("to", [UserId.ANA, [UserId.ANA, "bob"], (UserId.ANA,)], ids=repr)
def test_publish_str_enum(server: Server, to: Any) -> None:
    """The value of a member counts, as a type, as a content type and as a user's id.

    From Python 3.11 on, str() of a member is its name, so `to=UserId.ANA` reached no client.
    """
    with server.client(path=f"/ws?token={token('ana')}") as client:
        client.subscribe("content.*", "posts")
        server.hub.publish(EventType.CREATED, ContentType.POSTS, {"n": 1}, to=to)
        message = client.receive()
        assert (message["type"], message["contentType"]) == ("content.created", "posts")
        assert server.hub.disconnect(UserId.ANA) == 1
        assert client.closing().code == 4401


def test_user_id_uuid() -> None:
    """A site whose users have UUIDs may pass them instead of strings."""
    ana = UUID(int=7)

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: ana)

    with Server(configure) as server, server.client() as client:
        assert client.hello["payload"]["userId"] == str(ana)
        answer = client.authenticate(server.hub.issue_token(ana))
        assert answer["payload"]["userId"] == str(ana)
        client.subscribe()
        server.publish(1, to=ana)
        server.publish(2, to=[ana])
        assert numbers(client.receive_many(2)) == [1, 2]
        assert server.hub.disconnect(ana) == 1
        assert client.closing().code == 4401


# -- Events without a subscriber -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("item.add", "item.added", True),
        ("item.added", "item.add", True),
        ("items.*", "item.added", True),
        ("item.*", "item.added", True),
        ("*", "item.added", True),
        ("Posts", "post", True),
        ("orderPaid", "order_paid", True),
        ("entries", "entry", True),
        ("contnet.created", "content.created", False),
        ("conten.created", "content.created", True),
        ("content.created", "content.updated", False),
        ("content.created", "content.deleted", False),
        ("media.uploaded", "media.deleted", False),
        ("posts.3.comments", "posts.4.comments", False),
        ("posts", "pages", False),
        ("user.login", "user.logout", False),
        ("user.login", "user.logon", True),
        ("contentcreated", "content.created", True),
        ("channel.a", "channel.b", False),
        ("articles.de", "articles.dk", False),
        ("prices.eur", "prices.eup", False),
    ],
)
def test_is_similar(pattern: str, name: str, expected: bool) -> None:
    """A pattern and a name are similar if one is probably a misspelling of the other."""
    assert swiftcms_ws.is_similar(pattern, name) is expected


def test_unheard_event_with_similar_name_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An event that no client receives is logged once if a subscription has a similar name.

    One with a subscriber, without a similar name, or with `to` is not logged.
    """
    with Server(HEARTBEAT=0.25, RATE=1000) as server, server.client() as client:
        for pattern in ("item.add", "content.created", "private.add", "last.add"):
            client.subscribe(pattern, "posts")

        def publish_and_wait(event_type: str) -> None:
            server.hub.publish(event_type, "posts", {})
            words = f"event {event_type} of posts, but there is a subscription to"
            until(lambda: client.ask("heartbeat") and log_lines(caplog, words), "the log record")

        for event_type in ("item.add", "content.created", "content.updated", "other"):
            server.hub.publish(event_type, "posts", {})
        server.hub.publish("private.added", "posts", {}, to="ana")
        publish_and_wait("item.added")
        server.hub.publish("item.added", "posts", {})
        publish_and_wait("last.added")
    assert len(log_lines(caplog)) == 2


# -- Hooks -----------------------------------------------------------------------------------------


async def asynchronous_answer() -> bool:
    await asyncio.sleep(0)
    return True


HOOK_ANSWERS: dict[str, Callable[[], Any]] = {
    "coroutine": asynchronous_answer,
    "redirect": lambda: redirect("/login"),
    "response": lambda: Response("no", 403),
    "tuple": lambda: ("no", 403),
    "None": lambda: None,
    "1": lambda: 1,
    "string": lambda: "yes",
    "0": lambda: 0,
    "empty list": list,
}


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("kind", HOOK_ANSWERS)
def test_authorize_invalid_answer(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """An answer that is not a bool refuses, even if it is true for Python, and is logged."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.authorize(lambda user, event_type, content_type: HOOK_ANSWERS[kind]())

    with Server(configure) as server, server.client() as client:
        assert error_code(client.ask("subscribe", type="a.b")) == "forbidden"
        assert error_code(client.ask("editStart", **POST)) == "forbidden"
        payload = client.ask("subscribe", subscriptions=pairs(("a.b", "*")))["payload"]
        assert [item["code"] for item in payload["refused"]] == ["forbidden"]
        assert stat(server, "subscriptions") == 0
        until(lambda: log_lines(caplog), "the log record")
    for words in ("authorize", "True", "False"):
        assert log_lines(caplog, words) == log_lines(caplog)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("answer", [True, False])
def test_authorize_answer(caplog: pytest.LogCaptureFixture, answer: bool) -> None:
    """True allows and False refuses, and neither is logged."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.authorize(lambda user, event_type, content_type: answer)

    with Server(configure) as server, server.client() as client:
        code = error_code(client.ask("subscribe", type="a.b"))
        assert code == (None if answer else "forbidden")
    assert log_lines(caplog) == []


@pytest.mark.parametrize("name", ["authorize", "identify"])
def test_hook_coroutine_function(name: str) -> None:
    """Registering an `async def` hook raises, because each call would return a coroutine."""
    with pytest.raises(TypeError, match="coroutine function"):
        getattr(Hub(), name)(asynchronous_answer)


@pytest.mark.parametrize("name", ["authorize", "identify"])
def test_hook_registered_twice(name: str) -> None:
    """A second hook raises, because it would silently replace the first one."""

    def first(*arguments: object) -> bool:
        return False

    def second(*arguments: object) -> bool:
        return True

    register = getattr(Hub(), name)
    register(first)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=name):
        register(second)
    register(first)


def test_hook_of_factory_that_runs_twice() -> None:
    """A function with the same module and qualified name replaces the hook."""

    def register(hub: Hub, is_allowed: bool) -> None:
        @hub.identify
        def identify() -> str:
            return f"allowed: {is_allowed}"

        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            return is_allowed

    def configure(app: Flask, hub: Hub) -> None:
        register(hub, True)
        register(hub, False)

    with Server(configure) as server, server.client() as client:
        assert client.hello["payload"]["userId"] == "allowed: False"
        assert error_code(client.ask("subscribe")) == "forbidden"


# -- Signals ---------------------------------------------------------------------------------------


@pytest.mark.core
def test_signals() -> None:
    """Receivers get connections and events in order; `to` of a public event is EVERYONE."""
    received: list[tuple[str, Any]] = []

    def on_connected(app: Flask, hub: Hub, client_id: str, user: Any) -> None:
        received.append(("connected", client_id))

    def on_disconnected(app: Flask, hub: Hub, client_id: str, user: Any) -> None:
        received.append(("disconnected", client_id))

    def on_published(app: Flask, hub: Hub, **event: Any) -> None:
        received.append(("published", event))

    with (
        Server() as server,
        swiftcms_ws.client_connected.connected_to(on_connected, server.app),
        swiftcms_ws.client_disconnected.connected_to(on_disconnected, server.app),
        swiftcms_ws.event_published.connected_to(on_published, server.app),
    ):
        with server.client() as client:
            client_id = client.hello["payload"]["clientId"]
            until(lambda: received, "the first signal")
            recipients = ["ana", EVERYONE]
            ids = [server.publish(1, to=to) for to in recipients]
            client.close()
        until(lambda: len(received) == 4, "all signals")
    event = {"type": "content.created", "content_type": "posts", "payload": {"n": 1}}
    events = [{"id": each, "to": to, **event} for each, to in zip(ids, recipients, strict=True)]
    assert received == [
        ("connected", client_id),
        *(("published", event) for event in events),
        ("disconnected", client_id),
    ]


def test_signals_client_disconnects_at_once() -> None:
    """client_disconnected comes after client_connected, otherwise a user seems online forever."""
    handshakes: list[int] = []

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: handshakes.append(1))

    with received_signals() as signals, Server(configure, HEARTBEAT=NEVER) as server:
        for _ in range(40):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(upgrade_request(server.port))
        until(lambda: len(handshakes) == 40, "all handshakes")
        until(lambda: slots(server) == 0, "the end of all connections")
    assert {tuple(names) for names in signals.values()} <= {("connected", "disconnected")}


# -- disconnect() ----------------------------------------------------------------------------------


@pytest.mark.core
def test_disconnect_user() -> None:
    """All connections of the user are closed, however it signed in, and no other connection is.

    Events that are published afterwards, and messages that the user sends, have no effect.
    """

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: request.headers.get("X-User"))

    with Server(configure) as server, contextlib.ExitStack() as stack:

        def connect(**options: Any) -> Client:
            return stack.enter_context(server.client(**options))

        users = [connect(headers={"X-User": "7"}), connect(path=f"/ws?token={token(7)}"), connect()]
        users[-1].authenticate(token(7))
        others = [connect(headers={"X-User": user}) for user in ("70", "07", "eve")]
        for client in (*users, *others):
            client.subscribe()
            client.ask("editStart", **POST)
        for client in users:
            client.rest()
        assert server.hub.disconnect(7) == 3
        server.publish(1)
        for client in users:
            with contextlib.suppress(OSError):
                client.send(action="subscribe", type="content.*")
            assert client.closing().code == 4401
            assert numbers(list(client.messages)) == []
            client.sock.close()
        until(lambda: stat(server, "connections") == 3, "the end of the user's connections")
        until(lambda: len(server.hub.editors("posts", "42")) == 3, "the end of the user's editing")
        for client in others:
            assert numbers(client.rest()) == [1]
        assert server.hub.disconnect(7) == 0


def test_disconnect_during_handshake() -> None:
    """A user who is disconnected between identify and the first message is not served.

    Such a connection has no signals. The user may connect again.
    """
    counts: list[int] = []

    def configure(app: Flask, hub: Hub) -> None:
        @hub.identify
        def identify() -> str:
            if not counts:
                counts.append(hub.disconnect("ana"))
            return "ana"

    with Server(configure) as server:
        with received_signals() as signals, server.client() as client:
            assert client.closing().code == 4401
        assert (counts, signals) == ([0], {})
        with server.client() as client:
            assert client.ask("heartbeat")["type"] == "system.heartbeat"


def test_disconnect_session_of_client_with_token() -> None:
    """A token of the same user does not hide the session that the identify hook has found."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: ("ana", "a session"))

    with Server(configure) as server, server.client() as plain, server.client() as both:
        assert both.authenticate(token("ana"))["type"] == "system.authenticated"
        assert server.hub.disconnect("ana", "another session") == 0
        assert server.hub.disconnect("ana", "a session") == 2
        assert plain.closing().code == 4401
        assert both.closing().code == 4401


# -- Several hubs, and several registrations -------------------------------------------------------


@pytest.mark.core
def test_hubs_of_one_app() -> None:
    """Hubs of an app keep their events apart, and url_prefix moves the address of each."""
    other = Hub()

    def configure(app: Flask, hub: Hub) -> None:
        other.init_app(app, url_prefix="/shop", name="shop")
        app.register_blueprint(swiftcms_ws.blueprint, url_prefix="/ready", name="ready")

    with Server(configure) as server, server.app.app_context():
        with contextlib.ExitStack() as stack:
            paths = ("/ws", "/shop/ws", "/ready/ws")
            clients = [stack.enter_context(server.client(path=path)) for path in paths]
            for client in clients:
                client.subscribe()
            server.publish(1)
            other.publish("order.paid", "orders", {"n": 2})
            swiftcms_ws.publish("user.login", "users", {"n": 3})
            assert [numbers(client.rest()) for client in clients] == [[1], [2], [3]]
        other.close()
        swiftcms_ws.hub.close()


def test_blueprint_registered_twice() -> None:
    """It raises without another name, and does not suggest one. With another name it is allowed."""
    hub, app = Hub(), Flask("site")
    hub.init_app(app)
    with pytest.raises(ValueError, match="once") as caught:
        app.register_blueprint(hub.blueprint)
    assert "name=" not in str(caught.value)
    app.register_blueprint(hub.blueprint, name="again", url_prefix="/again")
    with pytest.raises(ValueError, match="name="):
        app.register_blueprint(Hub().blueprint)


# == 3. Engine: creates, starts and stops the parts ================================================


# -- One engine for each app -----------------------------------------------------------------------


@pytest.mark.core
def test_apps_of_one_hub() -> None:
    """Two tenants share a module-level hub: events and users stay in their own app."""
    with contextlib.closing(Hub()) as hub, contextlib.ExitStack() as stack:
        hub.identify(lambda: f"{current_app.name}-7" if "as" not in request.args else "7")

        def tenant(name: str) -> Flask:
            app = Flask(name)
            hub.init_app(app)
            app.post("/publish/<int:n>")(
                lambda n: hub.publish("content.created", "posts", {"n": n})
            )
            return app

        apps = [tenant("north"), tenant("south")]
        ports = [stack.enter_context(served(app)) for app in apps]
        visitors = [stack.enter_context(Client(port)) for port in ports]
        sevens = [stack.enter_context(Client(port, path="/ws?as=7")) for port in ports]
        users = [visitor.hello["payload"]["userId"] for visitor in visitors]
        assert users == ["north-7", "south-7"]
        for client in (*visitors, *sevens):
            client.subscribe()
        http(f"http://127.0.0.1:{ports[1]}/publish/1", "POST")
        http(f"http://127.0.0.1:{ports[0]}/publish/2", "POST")
        with apps[1].app_context():
            hub.publish("content.created", "posts", {"n": 3}, to="7")
            assert hub.stats()["connections"] == 2
        assert [numbers(visitor.rest()) for visitor in visitors] == [[2], [1]]
        assert [numbers(client.rest()) for client in sevens] == [[2], [1, 3]]
        with apps[1].app_context():
            assert hub.disconnect("7") == 1
        assert sevens[1].closing().code == 4401
        assert sevens[0].ask("heartbeat")["type"] == "system.heartbeat"


def test_apps_of_a_test_suite() -> None:
    """If a test suite creates an app for each test, the ready-made hub starts again in each."""

    def configure(app: Flask, hub: Hub) -> None:
        app.register_blueprint(swiftcms_ws.blueprint, name="ready", url_prefix="/r")

    for number in range(3):
        with Server(configure) as server, server.app.app_context():
            with server.client(path="/r/ws") as client:
                client.subscribe()
                swiftcms_ws.publish("notification", "users", number)
                assert client.receive()["payload"] == number
                client.close()
            stats = swiftcms_ws.hub.stats()
            assert (stats["published"], stats["delivered"]) == (1, 1)
    swiftcms_ws.hub.close()


def test_app_created_again_by_a_job(caplog: pytest.LogCaptureFixture) -> None:
    """A second app of the factory disconnects no client. It serves none, which is logged once."""
    with contextlib.closing(Hub()) as hub:

        def create_app() -> Flask:
            app = Flask("site")
            hub.init_app(app)
            return app

        site_app = create_app()
        with served(site_app) as port, Client(port) as client:
            client.subscribe()
            job = create_app()
            with job.app_context():
                for number in range(3):
                    hub.publish("content.created", "posts", {"n": number})
                hub.flush()
            until(lambda: log_lines(caplog), "the log record")
            with site_app.app_context():
                hub.publish("content.created", "posts", {"n": 7})
            # Without a context it is the only app that has served a connection.
            hub.publish("content.created", "posts", {"n": 8})
            assert numbers(client.rest()) == [7, 8]
        with job.app_context():
            hub.close()
    assert len(log_lines(caplog)) == 1


@pytest.mark.parametrize("is_served", [True, False], ids=["served", "only registered"])
def test_publish_outside_a_context_with_two_apps(is_served: bool) -> None:
    """If it is not clear which app is meant, publish() raises and names the solution."""
    with contextlib.closing(Hub()) as hub, contextlib.ExitStack() as stack:
        apps = [Flask("north"), Flask("south")]
        for app in apps:
            hub.init_app(app)
            if is_served:
                stack.enter_context(Client(stack.enter_context(served(app))))
        with pytest.raises(RuntimeError, match=r"app\.app_context\(\)"):
            hub.publish("content.created", "posts", {})
        with apps[0].app_context():
            assert hub.publish("content.created", "posts", {})


def test_app_is_held_weakly() -> None:
    """A factory that runs for each test leaves no app behind in a module-level hub."""
    hub = Hub()
    app = Flask("site")
    hub.init_app(app)
    reference = weakref.ref(app)
    del app
    gc.collect()
    assert reference() is None
    with pytest.raises(RuntimeError, match="register_blueprint"):
        hub.publish("content.created", "posts", {})


# -- Start -----------------------------------------------------------------------------------------


def test_threads_start_at_the_first_event() -> None:
    """Registration and ordinary pages start no thread, so that a server may still fork."""
    before = set(threading.enumerate())

    def own_threads() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread not in before}

    hub, app = Hub(), Flask("site")
    hub.init_app(app)
    app.get("/page")(lambda: "a page")
    assert app.test_client().get("/page").data == b"a page"
    assert own_threads() == set()
    hub.publish("content.created", "posts", {})
    assert own_threads() == {"swiftcms-ws loop", "swiftcms-ws heartbeat"}
    hub.close()
    until(lambda: own_threads() == set(), "the exit of both threads")


def test_start_without_a_free_thread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """publish() raises, and the threads that were started exit. Later it succeeds."""
    before, start = threading.active_count(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "heartbeat" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="new thread"):
            server.publish(1)
    until(lambda: threading.active_count() == before, "the exit of the other threads")
    monkeypatch.undo()
    server.publish(2)


def test_several_processes_without_shared_log_are_logged(tmp_path: Path) -> None:
    """Each process logs once that its events do not reach all clients, and what to set."""
    with site(tmp_path, GTHREAD, "--workers", "2") as process:
        for _ in range(12):
            with process.client() as client:
                client.close()
        log = process.output()
    lines = [line for line in log.splitlines() if "several processes" in line]
    assert 1 <= len(lines) <= 2, log
    assert all(re.search("SWIFTCMS_WS_DATABASE.*SWIFTCMS_WS_REDIS_URL", line) for line in lines)


# -- stats(), flush() and close() ------------------------------------------------------------------


@pytest.mark.core
def test_stats_flush_and_close() -> None:
    """close() sends 1001. Later handshakes are refused, and a late publish() does not raise."""
    with Server() as server, server.client() as client:
        client.subscribe("content.*")
        server.publish(1)
        assert server.hub.flush()
        stats = server.hub.stats()
        names = ("connections", "subscriptions", "published", "delivered", "queue_length")
        assert [stats[name] for name in names] == [1, 1, 1, 1, 0]
        assert stats["waiting_bytes"] == 0
        with running([server.hub.close]):
            assert client.receive()["payload"] == {"n": 1}
            assert client.closing().code == 1001
        assert server.handshake()[0] == 503
        until(lambda: stat(server, "connections") == 0, "the end of the connection")
        server.publish(2)


def test_flush_while_the_hub_closes(server: Server) -> None:
    """flush() returns False until the events are delivered, even if the hub is closing."""
    server.publish(0)
    with contextlib.ExitStack() as stack:
        with held_loop(server):
            server.publish(1)
            stack.enter_context(running([lambda: server.hub.close(PATIENCE)]))
            until(lambda: engine_of(server).is_closing, "the start of the close")
            assert server.hub.flush(0.1) is False
        assert server.hub.flush(PATIENCE) is True
    assert server.hub.flush(0.1) is True


def test_publish_on_a_closed_hub(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A request that outlives its hub does not fail, and its lost event is logged."""
    server.publish(1)
    server.hub.close()
    assert log_lines(caplog) == []
    server.publish(2)
    until(lambda: log_lines(caplog), "the log record")
    assert "closed" in log_lines(caplog)[0]


FIRST_PUBLISH_AT_EXIT = """
import atexit
atexit.register(lambda: print("id:", hub.publish("content.created", "posts", {})))
from flask import Flask
from swiftcms_ws import Hub
hub = Hub()
app = Flask("site")
hub.init_app(app)
"""


def test_first_publish_while_the_interpreter_exits(tmp_path: Path) -> None:
    """No thread can be started any more, which is logged. It raises no RuntimeError."""
    result = run_script(tmp_path, FIRST_PUBLISH_AT_EXIT)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert "closed" in result.stderr or "exit" in result.stderr


# -- Forks and signal handlers ---------------------------------------------------------------------


def run_in_child(task: Callable[[], int]) -> int:
    """Run a task in a forked child, and return its result; kill the child if it hangs."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            status = task()
        finally:
            os._exit(status)
    statuses: list[int] = []

    def has_exited() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        statuses.append(status)
        return pid == child

    try:
        until(has_exited, "the exit of the child")
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return os.waitstatus_to_exitcode(statuses[-1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_while_locks_are_held(server: Server) -> None:
    """A child needs locks of its own, because no thread of it releases those of the parent.

    It hung before it ran any code of the site.
    """
    server.publish(1)

    def publish() -> int:
        server.publish(2)
        return 7 if server.hub.flush() else 8

    with contextlib.ExitStack() as stack:
        for lock in locks_of(server.hub):
            stack.enter_context(lock)
        assert run_in_child(publish) == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("is_closing", [False, True], ids=["open", "closing"])
def test_fork_closes_sockets(server: Server, is_closing: bool) -> None:
    """A child closes its copies of sockets: the parent's close would not reach the clients."""

    def count_connections() -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with (
                contextlib.suppress(OSError, IndexError, TypeError),
                socket.socket(fileno=os.dup(int(name))) as sock,
            ):
                count += sock.getsockname()[1] == server.port and sock.getpeername()[1] > 0
        return count

    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(open_raw(server.port, f"/ws?token={token()}"))
        until(lambda: stat(server, "connections") == 5, "all connections")
        if is_closing:
            server.hub.disconnect("ana")
            until(lambda: stat(server, "closed_4401") == 5, "the close frames")
        assert count_connections() == 5
        assert run_in_child(count_connections) == 0


CHAINED_HANDLER = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from flask import Flask
from swiftcms_ws import blueprint

app = Flask("site")
app.register_blueprint(blueprint)
former = signal.getsignal(signal.SIGINT)
signal.signal(signal.SIGINT, lambda number, frame: former(number, frame))
child = os.fork()
if child == 0:
    signal.alarm(5)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        os._exit(7)
    except BaseException:
        os._exit(8)
print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_signal_handler_chained_in_a_child(tmp_path: Path) -> None:
    """If the handler of a site calls ours, ours calls the one before it, in a child too."""
    result = run_script(tmp_path, CHAINED_HANDLER)
    assert result.stdout.split() == ["child:", "7"], result.stderr


def test_hubs_copied_while_another_thread_creates_some() -> None:
    """A signal handler and exit handlers copy the list of hubs. A WeakSet would raise there."""
    hubs: WeakList[threading.Event] = WeakList()
    kept = [threading.Event() for _ in range(3_000)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        adder = threading.Thread(target=lambda: [hubs.add(each) for each in kept])
        adder.start()
        sizes = [len(hubs.copy())]
        while adder.is_alive():
            sizes.append(len(hubs.copy()))
        adder.join()
    finally:
        sys.setswitchinterval(interval)
    assert sizes == sorted(sizes) and len(hubs.copy()) == len(kept)
    del kept[10:]
    assert len(hubs.copy()) == 10


# -- Jobs and scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize("hub", [None, Hub()], ids=["hub for each job", "one hub"])
def test_job_that_creates_an_app(hub: Hub | None) -> None:
    """If the app of a job is freed, so are the threads and the descriptors of its engine."""
    threads, files = thread_count(), open_files()

    def run_job(hub: Hub) -> None:
        app = Flask("job")
        hub.init_app(app)
        with app.app_context():
            hub.publish("content.created", "posts", {})

    for _ in range(5):
        run_job(hub or Hub())
    # open_files() collects garbage first.
    until(
        lambda: open_files() <= files and thread_count() <= threads,
        "the end of the jobs' threads and descriptors",
    )


SCRIPT = """
import logging, multiprocessing, os
from flask import Flask
from swiftcms_ws import blueprint, publish

logging.basicConfig()
app = Flask(__name__)
app.register_blueprint(blueprint)

def run():
    publish("content.created", "posts", {})

"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("run()", "published 1 events and served no client.*_DATABASE.*_REDIS_URL"),
        (
            'child = multiprocessing.get_context("fork").Process(target=run)\n'
            "child.start(); child.join()",
            "child process of multiprocessing",
        ),
        ("import werkzeug._reloader\nrun()", None),
        (
            'import werkzeug._reloader\nos.environ["WERKZEUG_RUN_MAIN"] = "true"\nrun()',
            "published 1 events and served no client",
        ),
    ],
    ids=["script", "child process", "parent of the reloader", "child of the reloader"],
)
def test_publish_in_a_process_without_clients(
    tmp_path: Path, code: str, words: str | None
) -> None:
    """It is logged, unless the child of Werkzeug's reloader runs the same script and serves."""
    result = run_script(tmp_path, SCRIPT + code)
    assert result.returncode == 0, result.stderr
    if words is None:
        assert result.stderr == ""
    else:
        assert re.search(words, result.stderr), result.stderr


# == 4. Events and frames ==========================================================================


# -- Payloads --------------------------------------------------------------------------------------


@pytest.mark.core
def test_payload_is_serialized_by_the_app(server: Server) -> None:
    """Dates, UUIDs and Decimals go through app.json, as in the site's other responses."""
    dates = {"a": date(2026, 1, 2), "b": UUID(int=7), "c": Decimal("1.5")}
    expected = {"a": "Fri, 02 Jan 2026 00:00:00 GMT", "b": str(UUID(int=7)), "c": "1.5"}
    payloads = [dates, None, [], "text", 5, "☃ \u2028 </script>"]
    with server.client() as client:
        client.subscribe()
        for payload in payloads:
            server.hub.publish("notification", "users", payload)
        assert [message["payload"] for message in client.rest()] == [expected, *payloads[1:]]


def test_payload_over_max_queue() -> None:
    """It raises, instead of disconnecting every client that is a little behind."""
    with Server(MAX_QUEUE=1000) as server, server.client() as client:
        client.subscribe()
        with pytest.raises(ValueError, match=r"^payload has .*SWIFTCMS_WS_MAX_QUEUE"):
            server.publish(1, padding="x" * 1000)
        client.nothing_more()


class BytesProvider(DefaultJSONProvider):
    """As the provider for orjson in Flask's documentation: dumps() returns bytes."""

    def dumps(self, obj: Any, **kwargs: Any) -> Any:
        return super().dumps(obj, **kwargs).encode()


class SimpleProvider(DefaultJSONProvider):
    """Ignores the arguments of dumps(), including `allow_nan`."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return json.dumps(obj)


class SimpleBytesProvider(DefaultJSONProvider):
    """As SimpleProvider, but dumps() returns bytes."""

    def dumps(self, obj: Any, **kwargs: Any) -> Any:
        return json.dumps(obj).encode()


@pytest.mark.core
@pytest.mark.parametrize("provider", [BytesProvider, SimpleProvider, SimpleBytesProvider])
def test_json_provider(provider: type[DefaultJSONProvider]) -> None:
    """A provider may return bytes. With each, NaN and infinity raise: they are not JSON."""

    def configure(app: Flask, hub: Hub) -> None:
        app.json = provider(app)

    with Server(configure) as server, server.client() as client:
        client.subscribe()
        payload = {"n": 1, "text": "é ☃ NaN Infinity", "list": [1.5, None, True]}
        server.hub.publish("content.created", "posts", payload)
        assert client.receive()["payload"] == payload
        for number in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(TypeError, match=r"^payload "):
                server.hub.publish("content.created", "posts", {"list": [number]})
        client.nothing_more()
        assert stat(server, "published") == 1


# -- Names -----------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "name",
    [
        "posts",
        "a-b_c.7",
        "समाचार.हिन्दी",
        "செய்திகள்",
        "ข่าว.วันนี้",
        "e\u0301te\u0301",
        "новости",
        "新聞.日本語",
        "a" * 128,
    ],
    ids=["ascii", "signs", "Hindi", "Tamil", "Thai", "decomposed", "Russian", "Japanese", "128"],
)
def test_name_valid(server: Server, name: str) -> None:
    """Letters of any script, with their marks, and digits make a type or a content type."""
    with server.client() as client:
        client.subscribe(name, name)
        server.hub.publish(name, name, {"n": 1})
        message = client.receive()
        assert (message["type"], message["contentType"]) == (name, name)
        assert client.ask("editStart", contentType=name, entryId="1")["type"] == "system.editing"


@pytest.mark.parametrize(
    "name",
    [
        *("posts.", ".posts", "a..b", "a b", "a/b", "a\n", "a\u200b", "😀", "*.a", "a.*.b", "a*"),
        pytest.param("a" * 129, id="129 letters"),
    ],
    ids=ascii,
)
def test_name_invalid(server: Server, name: str) -> None:
    """The publisher and the client get an error, by the same rule."""
    with server.client() as client:
        for fields in ({"type": name}, {"contentType": name}, {"contentType": f"{name}.*"}):
            assert error_code(client.ask("subscribe", **fields)) == "invalid_type"
    with pytest.raises(ValueError, match=r"^event_type "):
        server.hub.publish(name, "posts", {})
    with pytest.raises(ValueError, match=r"^content_type "):
        server.hub.publish("content.created", name, {})


# -- Frames ----------------------------------------------------------------------------------------

WSPROTO_FRAMES: dict[Opcode, Callable[[FrameProtocol, bytes], bytes]] = {
    Opcode.TEXT: lambda protocol, data: protocol.send_data(data.decode(), fin=True),
    Opcode.BINARY: lambda protocol, data: protocol.send_data(data, fin=True),
    Opcode.PING: lambda protocol, data: protocol.ping(data),
    Opcode.PONG: lambda protocol, data: protocol.pong(data),
    Opcode.CLOSE: lambda protocol, data: protocol.close(4401, data[2:].decode()),
}


@pytest.mark.core
@pytest.mark.parametrize("opcode", WSPROTO_FRAMES, ids=lambda opcode: opcode.name)
def test_encode_frame(opcode: Opcode) -> None:
    """Our encoder, which is ten times as fast, returns the bytes of wsproto for every length."""
    protocol = FrameProtocol(client=False, extensions=[])
    lengths = [*range(2, 301), *range(65_500, 65_601), 100_000, 1_000_000]
    for length in lengths[:124] if opcode.iscontrol() else [0, 1, *lengths]:
        data = b"x" * length
        if opcode is Opcode.CLOSE:
            data = struct.pack("!H", 4401) + data[2:]
        expected = bytes(WSPROTO_FRAMES[opcode](protocol, data))
        assert swiftcms_ws.encode_frame(opcode, data) == expected, length


def test_text_frame() -> None:
    """The length of a text frame is that of its bytes in UTF-8, not of its characters."""
    words = "é☃😀" * 50
    protocol = FrameProtocol(client=False, extensions=[])
    assert swiftcms_ws.text_frame(words) == bytes(protocol.send_data(words, fin=True))


# == 5. Loop and history ===========================================================================


# -- The order of events ---------------------------------------------------------------------------


def test_order_under_load(server: Server) -> None:
    """Eight threads publish to twenty clients that ping and subscribe: each gets the same events.

    The clients do as the seed's Swift example: authenticate, subscribe, answer heartbeats.
    """
    publishers, each, clients = 8, 60, 20
    start = threading.Barrier(publishers + clients)
    received: list[list[dict[str, Any]]] = [[] for _ in range(clients)]

    def listen(index: int) -> None:
        events = received[index]
        with server.client() as client:
            client.send(action="authenticate", token=token(f"user-{index}"))
            client.send(action="subscribe", type="content.*", contentType="posts")
            assert client.receive_many(2)[1]["type"] == "system.subscribed"
            start.wait(PATIENCE)
            while len(events) < publishers * each:
                message = client.receive(heartbeats=True)
                if message["type"] == "system.heartbeat":
                    client.send(action="pong")
                elif message["type"].startswith("content."):
                    events.append(message)
                    if len(events) % 40 == 0:
                        client.ping()
                        client.send(action="subscribe", type="content.*", contentType="posts")
            assert client.close(1001).code == 1001

    def publish(index: int) -> None:
        start.wait(PATIENCE)
        for number in range(each):
            kind = ("created", "updated", "deleted", "published")[number % 4]
            server.publish(number, f"content.{kind}", by=index)

    run_all(
        [functools.partial(listen, index) for index in range(clients)]
        + [functools.partial(publish, index) for index in range(publishers)]
    )
    order = [message["id"] for message in received[0]]
    assert order == sorted(set(order), key=position)
    assert len(order) == publishers * each
    for events in received:
        assert [message["id"] for message in events] == order
    for index in range(publishers):
        events = [event for event in received[0] if event["payload"]["by"] == index]
        assert numbers(events) == list(range(each))


def test_publish_waits_for_a_busy_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded: publish() waits for room, and all events arrive in order."""
    monkeypatch.setattr(swiftcms_ws.Loop, "MAX_QUEUED_BYTES", 20_000)

    def publish() -> None:
        for number in range(100):
            server.publish(number)
        published.set()

    published = threading.Event()
    with server.client() as client, contextlib.ExitStack() as stack:
        client.subscribe()
        with held_loop(server):
            stack.enter_context(running([publish]))
            until(lambda: stat(server, "queue_length") >= 15, "a full queue")
            assert not published.wait(0.2)
            assert stat(server, "queue_length") <= 21
        assert numbers(client.receive_many(100)) == list(range(100))


# -- Resuming with `since` -------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(("since", "missed"), [(0, [1, 2, 3]), (2, [3]), (3, [])])
def test_resume(server: Server, since: int, missed: list[int]) -> None:
    """The client receives the missed events that match its subscription, and then live events."""
    ids = [server.publish(number) for number in range(3)]
    server.publish(0, "order.paid")
    ids.append(server.publish(3))
    with server.client() as client:
        answer = client.subscribe("content.*", since=ids[since])
        assert (answer["recovered"], answer["replayed"]) == (True, len(missed))
        server.publish(4)
        assert numbers(client.rest()) == [*missed, 4]


@pytest.mark.core
@pytest.mark.parametrize(
    ("since", "replayed"), [(0, None), (48, None), (49, 50), (98, 1), (99, 0)]
)
def test_resume_from_a_bounded_history(since: int, replayed: int | None) -> None:
    """If events after `since` are not in the history any more, `recovered` is false."""
    with Server(HISTORY=50) as server, server.client() as client:
        ids = [server.publish(number) for number in range(100)]
        answer = client.subscribe(since=ids[since])
        assert (answer["recovered"], answer["replayed"]) == (replayed is not None, replayed or 0)
        assert len(client.rest()) == (replayed or 0)


@pytest.mark.core
@pytest.mark.parametrize(
    ("milliseconds", "counter"),
    [(None, 0), (0, 1), (9, 0), (-(9**9), 0)],
    ids=["0-0", "one later", "of the future", "of another process"],
)
def test_resume_from_an_unknown_id(
    server: Server, milliseconds: int | None, counter: int
) -> None:
    """`recovered` is false, and nothing is replayed."""
    newest = position([server.publish(number) for number in range(3)][-1])
    since = "0-0"
    if milliseconds is not None:
        since = f"{newest[0] + milliseconds}-{newest[1] + counter if counter else 0}"
    with server.client() as client:
        assert client.subscribe(since=since)["recovered"] is False
        client.nothing_more()


def test_resume_without_history() -> None:
    """With HISTORY=0, a client that has missed nothing can still resume."""
    with Server(HISTORY=0) as server, server.client() as client:
        first = server.publish(0)
        assert client.subscribe("content.*", since=first)["recovered"] is True
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}
        assert client.subscribe(since=first)["recovered"] is False


@pytest.mark.core
@pytest.mark.parametrize(("user", "missed"), [("ana", [1]), ("bob", [2]), ("eve", [])])
def test_resume_private_events(server: Server, user: str, missed: list[int]) -> None:
    """A user receives the private events that were sent to it, and no others."""
    since = server.publish(0)
    server.publish(1, "notification", to="ana")
    server.publish(2, "notification", to="bob")
    with server.client() as client:
        client.authenticate(token(user))
        assert client.subscribe("notification", since=since)["replayed"] == len(missed)
        assert numbers(client.rest()) == missed


def test_resume_after_authenticate(server: Server) -> None:
    """A client that authenticates late may resume from before, and gets each event once."""
    with server.client() as client:
        since = client.hello["payload"]["lastId"]
        client.subscribe("notification")
        server.publish(1, "notification", to="ana")
        event_id = server.publish(2, "notification", to="ana")
        client.authenticate(token("ana"))
        assert client.subscribe("notification", since=since)["replayed"] == 2
        server.publish(3, "notification", to="ana")
        assert numbers(client.receive_many(3)) == [1, 2, 3]
        assert client.subscribe("notification", since=event_id)["replayed"] == 0
        client.nothing_more()


@pytest.mark.parametrize("is_one_message", [True, False], ids=["one message", "two messages"])
def test_resume_after_authenticate_with_overlap(server: Server, is_one_message: bool) -> None:
    """Two overlapping subscriptions replay a private event once. In 1.0.0 each replayed it."""
    with server.client() as client:
        since = client.hello["payload"]["lastId"]
        client.subscribe("notification")
        server.publish(1, "notification", to="ana")
        client.authenticate(token("ana"))
        if is_one_message:
            both = pairs(("notification", "*"), ("*", "*"))
            answers = [client.ask("subscribe", subscriptions=both, since=since)["payload"]]
        else:
            answers = [client.subscribe(each, since=since) for each in ("notification", "*")]
        assert sum(answer["replayed"] for answer in answers) == 1
        assert numbers(client.rest()) == [1]


def test_resume_overlapping_subscriptions(server: Server) -> None:
    """An event that another subscription of the connection has replayed is not replayed again."""
    since = server.publish(0)
    for number in range(1, 5):
        server.publish(number, ("content.created", "user.login")[number % 2])
    with server.client() as client:
        patterns = ("content.*", "*", "user.login")
        answers = [client.subscribe(pattern, since=since) for pattern in patterns]
        assert [answer["replayed"] for answer in answers] == [2, 2, 0]
        server.publish(5)
        received = numbers(client.rest())
        assert (sorted(received), received[-1]) == ([1, 2, 3, 4, 5], 5)


def test_resume_longer_than_max_queue() -> None:
    """A replay may exceed MAX_QUEUE, otherwise its client could never resume."""
    with Server(MAX_QUEUE=50_000) as server:
        since = server.publish(0)
        for number in range(1, 200):
            server.publish(number, padding="x" * 20_000)
        with server.client(receive_buffer=4096) as client:
            assert client.subscribe(since=since)["replayed"] == 199
            server.publish(200)
            assert numbers(client.receive_many(200)) == list(range(1, 201))


def test_resume_repeatedly_without_reading() -> None:
    """A client that requests the history again and again, and never reads, gets it once.

    It is not read meanwhile, and is closed with 1013 after two heartbeats without progress.
    """
    with (
        Server(MAX_QUEUE=100_000, HISTORY=200, HEARTBEAT=0.25) as server,
        server.client() as healthy,
    ):
        since = healthy.hello["payload"]["lastId"]
        for number in range(200):
            server.publish(number, padding="x" * 2000)
        assert server.hub.flush()
        with server.client(receive_buffer=2048) as slow:
            for _ in range(40):
                slow.send(action="subscribe", since=since)
                slow.send(action="unsubscribe", type="*")
            largest = 0
            while stat(server, "slow_clients") == 0:
                assert healthy.receive(heartbeats=True)["type"] == "system.heartbeat"
                largest = max(largest, stat(server, "waiting_bytes"))
            assert largest < 2 * 200 * 2200
            assert slow.closing().code == 1013
        assert healthy.ask("heartbeat")["type"] == "system.heartbeat"


def test_resume_after_30_resets() -> None:
    """A client whose connection is reset under 500 events a second gets each once, in order."""
    rng = random.Random(7)
    stop, published = threading.Event(), []
    received: list[int] = []

    def is_complete() -> bool:
        return stop.is_set() and bool(published) and len(received) == len(published)

    with Server(RATE=1000) as server, Proxy(server.port) as proxy:
        last = server.publish(-1)
        with running([lambda: published.extend(publish_steadily(server.publish, stop))]):
            resets = 0
            while not is_complete():
                with contextlib.suppress(Closed, ConnectionError), Client(proxy.port) as client:
                    if resets < 30:
                        resets += 1
                        threading.Timer(rng.uniform(0, 0.08), proxy.cut).start()
                    else:
                        stop.set()
                        until(lambda: published, "the end of the publisher")
                    client.send(action="subscribe", type="content.*", since=last)
                    while not is_complete():
                        message = client.receive()
                        if message["type"] == "system.subscribed":
                            assert message["payload"]["recovered"] is True
                        else:
                            received.append(message["payload"]["n"])
                            last = message["id"]
    assert received == published


# -- The history -----------------------------------------------------------------------------------


def test_history_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large events remove older ones before there are HISTORY events."""
    monkeypatch.setattr(swiftcms_ws.History, "MAX_BYTES", 100_000)
    with Server() as server:
        ids = [server.publish(number, padding="x" * 10_000) for number in range(50)]
        assert server.hub.flush()
        with server.client() as client:
            assert client.subscribe("a.b", since=ids[30])["recovered"] is False
            payload = client.subscribe(since=ids[44])
            assert (payload["recovered"], payload["replayed"]) == (True, 5)
            assert numbers(client.rest()) == [45, 46, 47, 48, 49]


def test_history_memory(server: Server) -> None:
    """Of a hundred events of a megabyte, one copy of the newest 32 MiB is in memory."""
    server.publish(0)
    assert server.hub.flush()
    gc.collect()
    before = resident()
    for number in range(100):
        server.publish(number, padding="x" * 1_000_000)
    assert server.hub.flush()
    gc.collect()
    assert resident() - before < 60_000_000


# -- Calls that interrupt others -------------------------------------------------------------------

INTERRUPTED_CALL = """
import json, signal, time
from flask import Flask
from swiftcms_ws import Hub

hub = Hub()
app = Flask("site")
hub.init_app(app)
ids = [hub.publish("log.line", "site", {})]
refused = []

def publish(number, frame):
    try:
        ids.append(hub.publish("log.line", "site", {"from": "the handler"}))
    except RuntimeError as error:
        refused.append(str(error))
    handled.append(number)
    signal.setitimer(signal.ITIMER_REAL, 0.0003)

handled = []
signal.signal(signal.SIGALRM, publish)
signal.setitimer(signal.ITIMER_REAL, 0.0003)
began = time.monotonic()
while len(handled) < 500 and time.monotonic() < began + 8:
    CALL
signal.signal(signal.SIGALRM, signal.SIG_IGN)
ids.append(hub.publish("log.line", "site", {}))
hub.flush()
print(json.dumps({"refused": refused, "ids": ids}))
hub.close()
"""


@pytest.mark.parametrize(
    ("call", "is_refused"),
    [('ids.append(hub.publish("log.line", "site", {}))', True), ("hub.stats()", False)],
    ids=["publish", "stats"],
)
def test_publish_from_a_signal_handler(tmp_path: Path, call: str, is_refused: bool) -> None:
    """If it has interrupted publish(), it raises instead of a deadlock; stats() does no harm."""
    result = run_script(tmp_path, INTERRUPTED_CALL.replace("CALL", call))
    assert result.returncode == 0, result.stderr
    refused, ids = json.loads(result.stdout).values()
    assert len(ids) == len(set(ids))
    if is_refused:
        assert refused
        assert all("publish()" in message and "signal" in message for message in refused)
    else:
        assert len(ids) >= 500


def test_flush_that_timed_out_is_freed() -> None:
    """flush() beside a slow client leaves nothing behind that the loop checks forever."""
    with (
        Server(HEARTBEAT=NEVER, MAX_QUEUE=50_000_000) as server,
        server.client(receive_buffer=4096) as slow,
        server.client() as other,
    ):
        slow.subscribe()
        for number in range(60):
            server.publish(number, text="x" * 100_000)
        until(lambda: stat(server, "waiting_bytes") > 0, "unsent data")
        for _ in range(20):
            assert not server.hub.flush(0)
        other.ask("heartbeat")
        assert [each for each in gc.get_objects() if isinstance(each, swiftcms_ws.Flush)] == []


# == 6. Registry ===================================================================================


# -- Patterns --------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("pattern", "content_type", "matches"),
    [
        ("*", "*", True),
        ("*", "posts", True),
        ("*", "pages", False),
        ("content.*", "*", True),
        ("content.media.*", "*", True),
        ("content.media.added", "posts", True),
        ("content.media.added.*", "*", False),
        ("content", "*", False),
        ("content.media", "*", False),
        ("cont", "*", False),
        ("order.*", "posts", False),
    ],
)
def test_pattern(server: Server, pattern: str, content_type: str, matches: bool) -> None:
    """A subscription receives the event content.media.added of posts if both patterns match."""
    with server.client() as client:
        client.subscribe(pattern, content_type)
        server.publish(1, "content.media.added")
        assert numbers(client.rest()) == [1] * matches


CONTENT_TYPES = ["posts", "posts.3", "posts.3.comments", "posts.30", "postscript", "pages"]


@pytest.mark.core
@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("posts.*", ["posts.3", "posts.3.comments", "posts.30"]),
        ("posts.3.*", ["posts.3.comments"]),
        ("posts.3", ["posts.3"]),
        ("posts", ["posts"]),
        ("posts.3.comments.*", []),
        ("*", CONTENT_TYPES),
    ],
)
def test_pattern_of_content_types(server: Server, pattern: str, matched: list[str]) -> None:
    """`posts.*` matches any depth below posts, and not posts itself; live and in a replay."""
    with server.client() as live, server.client() as late:
        live.subscribe("content.*", pattern)
        for content_type in CONTENT_TYPES:
            server.hub.publish("content.created", content_type, {})
        assert [message["contentType"] for message in live.rest()] == matched
        # The place of a client that has received no event.
        late.subscribe("*", pattern, since=late.hello["payload"]["lastId"])
        assert [message["contentType"] for message in late.rest()] == matched


def test_pattern_in_authorize() -> None:
    """The hook gets `posts.*`, not the content types that it matches."""
    asked: list[tuple[str, str]] = []

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            asked.append((event_type, content_type))
            return True

    with Server(configure) as server, server.client() as client:
        client.subscribe("*", "posts.*")
        client.ask("subscribe", subscriptions=[{"contentType": "posts.3.*"}, {"type": "a.*"}])
        client.ask("editStart", contentType="posts.3.comments", entryId="1")
    assert asked == [
        ("*", "posts.*"),
        ("*", "posts.3.*"),
        ("a.*", "*"),
        ("user.editing", "posts.3.comments"),
    ]


# -- Subscriptions ---------------------------------------------------------------------------------


@pytest.mark.core
def test_subscriptions_that_overlap(server: Server) -> None:
    """An event that matches several subscriptions is sent once, until the last one is removed."""
    with server.client() as client:
        for pattern in ("*", "content.*", "content.created", "content.created"):
            client.subscribe(pattern)
        client.subscribe("content.created", "posts")
        assert stat(server, "subscriptions") == 4
        server.publish(1)
        assert numbers(client.rest()) == [1]
        for removed in (1, 0):
            answer = client.ask("unsubscribe", type="content.created")
            assert answer["payload"]["removed"] == removed
        server.publish(2)
        assert numbers(client.rest()) == [2]
        all_removed = {"type": "*", "contentType": "*", "removed": 3}
        assert client.ask("unsubscribe")["payload"] == all_removed
        server.publish(3)
        client.nothing_more()
        assert stat(server, "subscriptions") == 0


@pytest.mark.parametrize(
    "fields",
    [{"type": "content.*"}, {"subscriptions": [{"type": "content.*"}]}, {}],
    ids=["one", "list", "all"],
)
def test_unsubscribe_under_load(fields: dict[str, Any]) -> None:
    """No event follows system.unsubscribed, in 60 rounds at full speed. In 1.0.0, 17 did."""
    stop = threading.Event()
    late: list[bytes] = []

    def publish() -> None:
        while not stop.is_set():
            server.publish(1)

    with (
        Server(RATE=10_000, MAX_QUEUE=50_000_000) as server,
        open_raw(server.port) as sock,
        running([publish]),
    ):
        try:
            for _ in range(60):
                sock.sendall(text(action="subscribe", type="content.*"))
                data = read_to(sock, b'"system.subscribed"')
                before = data.partition(b'"system.subscribed"')[0]
                late += re.findall(b'"content.created"', before)
                read_to(sock, b'"content.created"')
                sock.sendall(text(action="unsubscribe", **fields))
                data = read_to(sock, b'"system.unsubscribed"')
                after = data.partition(b'"system.unsubscribed"')[2]
                late += re.findall(b'"content.created"', after)
        finally:
            stop.set()
    assert late == []


# -- Limits ----------------------------------------------------------------------------------------


def test_limit_of_subscriptions(caplog: pytest.LogCaptureFixture) -> None:
    """The same subscription counts once, and one that is removed makes room for another."""
    with Server(MAX_SUBSCRIPTIONS=5) as server, server.client() as client:
        for number in [0, 1, 2, 3, 4, 4, 0]:
            client.subscribe(f"a.b{number}")
        for fields in ({}, {"since": "1-0"}):
            answer = client.ask("subscribe", type="a.b5", **fields)
            assert error_code(answer) == "too_many_subscriptions"
        assert client.ask("unsubscribe", type="a.b5")["payload"]["removed"] == 0
        assert stat(server, "subscriptions") == 5
        server.publish(1, "a.b5")
        client.nothing_more()
        assert client.ask("unsubscribe", type="a.b0")["payload"]["removed"] == 1
        client.subscribe("a.b5")
        # Entries that a client edits have the same limit.
        for number in range(5):
            client.ask("editStart", contentType="posts", entryId=str(number))
        answer = client.ask("editStart", contentType="posts", entryId="5")
        assert error_code(answer) == "too_many_subscriptions"
        client.close()
        until(lambda: stat(server, "subscriptions") == 0, "the end of the subscriptions")
        assert stat(server, "error_too_many_subscriptions") == 3
    assert only_log_line(caplog, "SWIFTCMS_WS_MAX_SUBSCRIPTIONS")


def test_limit_of_connections(caplog: pytest.LogCaptureFixture) -> None:
    """Of 30 concurrent handshakes MAX_CONNECTIONS are accepted, and again after they are closed."""
    together = threading.Barrier(30)

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: together.wait(PATIENCE) and None)

    with Server(configure, MAX_CONNECTIONS=7) as server:
        for round_number in (1, 2):
            heads: list[bytes] = []
            with contextlib.ExitStack() as stack:

                def connect(heads: list[bytes] = heads, stack: Any = stack) -> None:
                    address = ("127.0.0.1", server.port)
                    sock = stack.enter_context(socket.create_connection(address, PATIENCE))
                    sock.sendall(upgrade_request(server.port))
                    heads.append(read_to(sock, b"\r\n\r\n"))

                run_all([connect] * 30)
                statuses = Counter(head.split()[1] for head in heads)
                assert statuses == {b"101": 7, b"503": 23}
                assert sum(b"\r\nRetry-After: " in head for head in heads) == 23
                assert stat(server, "refused_503") == 23 * round_number
                until(lambda: stat(server, "connections") == 7, "the connections")
            until(lambda: slots(server) == 0, "the release of their slots")
    assert only_log_line(caplog, "SWIFTCMS_WS_MAX_CONNECTIONS")


# -- Recipients ------------------------------------------------------------------------------------


# The seventh begins with a Cyrillic letter.
USER_IDS = ["ana", "Ana", "an", "ana ", " ana", "anab", "\u0430na", "ana\u200b", "ana\0", "ana,bob"]
USER_IDS += ["*", "ana.*", "7", "07"]


def test_recipients_with_similar_ids(server: Server) -> None:
    """`to` compares complete ids, live and in a replay."""
    with contextlib.ExitStack() as stack:
        clients: dict[str, Client] = {}
        for user in USER_IDS:
            headers = {"Authorization": f"Bearer {token(user)}"}
            clients[user] = stack.enter_context(server.client(headers=headers))
            clients[user].subscribe()
            assert clients[user].hello["payload"]["userId"] == user
        since = clients["ana"].hello["payload"]["lastId"]
        expected: dict[str, list[int]] = {user: [] for user in USER_IDS}
        lists: list[Any] = [["ana", "7"], ("an", "*"), {"ana", "Ana"}, []]
        for number, to in enumerate([*USER_IDS, 7, *lists]):
            server.publish(number, to=to)
            for user in to if isinstance(to, (list, tuple, set)) else [str(to)]:
                expected[user].append(number)
        for user, client in clients.items():
            assert numbers(client.rest()) == expected[user], user
            with server.client() as again:
                again.authenticate(token(user))
                again.subscribe(since=since)
                assert numbers(again.rest()) == expected[user], user


def test_recipients_and_anonymous_client(server: Server) -> None:
    """A client without a user gets no private event, whatever fields it sends."""
    with server.client() as client:
        since = client.hello["payload"]["lastId"]
        client.subscribe()
        server.publish(1, to="ana")
        server.publish(2, to=[])
        client.nothing_more()
        assert client.ask("unsubscribe")["payload"]["removed"] == 1
        claims = {"userId": "ana", "to": "ana", "user": {"id": "ana"}, "sub": "ana"}
        assert client.subscribe(since=since, **claims)["replayed"] == 0


# == 7. Connection =================================================================================


# -- Slow clients ----------------------------------------------------------------------------------


def test_slow_client_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a client never reads, it gets 1013; publish() and other clients do not wait for it.

    The data that it reads afterwards is complete and in order: the first events, then the close
    frame. It does not get the rest of its queue, because it is too slow for that.
    """
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", PATIENCE)
    with (
        Server(MAX_QUEUE=200_000) as server,
        slow_client(server) as slow,
        server.client() as healthy,
    ):
        healthy.subscribe()
        count = 0
        while stat(server, "slow_clients") == 0:
            assert count < 2000
            server.publish(count, padding="x" * 4000)
            assert healthy.receive()["payload"]["n"] == count
            count += 1
        assert slow.closing().code == 1013
        received = numbers(list(slow.messages))
        assert received == list(range(len(received)))
        assert 0 < len(received) < count - 40
        assert server.hub.flush()
        healthy.nothing_more()


@pytest.mark.core
def test_slow_client_within_max_queue() -> None:
    """Frames that a full socket buffer splits arrive complete, and flush() waits for them."""
    with Server(MAX_QUEUE=50_000_000) as server, slow_client(server) as slow:
        padding = "x" * 20_000
        for number in range(500):
            server.publish(number, padding=padding)
        assert server.hub.flush(0.1) is False
        assert stat(server, "waiting_bytes") > 0
        flushed: list[bool] = []
        with running([lambda: flushed.append(server.hub.flush(PATIENCE))]):
            messages = slow.receive_many(500)
        assert flushed == [True]
        assert numbers(messages) == list(range(500))
        assert {message["payload"]["padding"] for message in messages} == {padding}
        assert stat(server, "waiting_bytes") == 0
        assert slow.ask("heartbeat")["type"] == "system.heartbeat"


def test_client_that_gets_more_than_max_queue_at_once() -> None:
    """A burst that is longer than MAX_QUEUE does not close a client that has read all before it."""
    with Server(MAX_QUEUE=10_000) as server, slow_client(server) as client:
        with held_loop(server):
            for number in range(12):
                server.publish(number, padding="x" * 5_000)
        assert numbers(client.receive_many(12)) == list(range(12))
        client.nothing_more()


def test_slow_client_without_free_descriptors(server: Server) -> None:
    """Unsent data is written even if the process can open no more files."""
    with slow_client(server) as slow:
        for number in range(200):
            server.publish(number, text="x" * 4000)
        until(lambda: stat(server, "waiting_bytes") > 0, "unsent data")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            assert numbers(slow.receive_many(200)) == list(range(200))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_slow_client_with_little_unsent_data(server: Server) -> None:
    """A client with at most 64 KiB of unsent data is still read, so it can unsubscribe."""
    with slow_client(server) as slow:

        def publish_until_unsent() -> bool:
            server.publish(padding="x" * 2000)
            server.hub.flush(0)
            return stat(server, "waiting_bytes") > 0

        until(publish_until_unsent, "unsent data")
        assert stat(server, "waiting_bytes") < Connection.MAX_UNSENT_WHILE_READING
        slow.send(action="unsubscribe")
        until(lambda: stat(server, "subscriptions") == 0, "the end of the subscription")


def test_slow_client_with_much_unsent_data() -> None:
    """A client with more than 64 KiB of unsent data is not read until it has received them."""
    with Server(MAX_QUEUE=50_000_000) as server, slow_client(server) as slow:
        for number in range(200):
            server.publish(number, padding="x" * 20_000)
        limit = Connection.MAX_UNSENT_WHILE_READING
        until(lambda: stat(server, "waiting_bytes") > 10 * limit, "unsent data")
        slow.send(action="unsubscribe", ref="later")
        with server.client() as other:
            for _ in range(5):
                assert other.ask("heartbeat")["type"] == "system.heartbeat"
        assert stat(server, "subscriptions") == 1
        messages = slow.receive_many(201)
        assert numbers(messages[:-1]) == list(range(200))
        assert messages[-1]["ref"] == "later"


def test_pong_between_frames(server: Server) -> None:
    """A pong is never sent inside a large frame, although the client reads slowly."""
    with server.client(receive_buffer=4096) as client:
        client.subscribe()

        def publish() -> None:
            for number in range(60):
                server.publish(number, padding="x" * 15_000)

        with running([publish]):
            for number in range(60):
                client.sock.sendall(Frames.masked(0x9, b"p" * 100))
                assert client.receive()["payload"]["n"] == number


# -- The client closes -----------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_close_by_client(server: Server, code: int) -> None:
    """The code is sent back. No data follows the close frame; Client checks that."""
    with server.client() as client:
        client.subscribe()
        assert client.close(code).code == code
    until(lambda: stat(server, "connections") == 0, "the end of the connection")


@pytest.mark.parametrize(
    "leave",
    [
        Client.reset,
        lambda client: client.sock.close(),
        lambda client: client.sock.shutdown(socket.SHUT_WR),
    ],
    ids=["reset", "closed", "half-closed"],
)
def test_client_vanishes(server: Server, leave: Callable[[Client], None]) -> None:
    """A client without a close frame leaves no subscription, editor, slot or thread behind."""
    before = threading.active_count()
    with server.client() as client:
        client.subscribe()
        client.ask("editStart", **POST)
        leave(client)
        until(lambda: stat(server, "connections") == 0, "the end of the connection")
        until(lambda: not server.hub.editors("posts", "42"), "the end of its editing")
        assert stat(server, "subscriptions") == 0
        assert slots(server) == 0
    # The loop and the heartbeat stay.
    until(lambda: threading.active_count() <= before + 2, "the exit of all other threads")


def test_message_before_close_frame(server: Server) -> None:
    """A message that arrives together with a close frame is handled."""
    with server.client() as stays, server.client() as leaves:
        for client in (stays, leaves):
            client.ask("editStart", **POST)
        change = text(action="editChange", payload="the last word", **POST)
        leaves.sock.sendall(change + Frames.masked(0x8, struct.pack("!H", 1000)))
        assert leaves.closing().code == 1000
        until(lambda: len(server.hub.editors("posts", "42")) == 1, "the end of its editing")
        assert [message["payload"]["change"] for message in stays.rest()] == ["the last word"]


@pytest.mark.core
def test_parser_failure(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If wsproto raises, that is logged, and only this client is closed and stops editing."""

    class Failing(FrameProtocol):  # type: ignore[misc]
        def receive_bytes(self, data: bytes) -> None:
            if len(data) > 1000:
                raise RuntimeError("the parser failed")
            super().receive_bytes(data)

    monkeypatch.setattr(swiftcms_ws, "FrameProtocol", Failing)
    with server.client() as client, server.client() as other:
        client.ask("editStart", **POST)
        assert server.hub.editors("posts", "42")
        client.send(action="heartbeat", padding="x" * 2000)
        until(lambda: not server.hub.editors("posts", "42"), "the end of its editing")
        assert client.closing().code == 1011
        until(lambda: "the parser failed" in caplog.text, "the traceback in the log")
        assert other.ask("heartbeat")["type"] == "system.heartbeat"


# -- The server closes -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [4401, 1009])
def test_server_close_waits_for_answer(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The server keeps TCP open until the client's close frame arrives.

    Otherwise a browser that sends its close frame meets a reset, and reports an unclean close.
    Messages and pings that the client sent before are neither answered nor a failure.
    """
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with Server(MAX_MESSAGE=1000) as server, closed_by_server(server, code) as sock:
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            # The rest of the reason may arrive, but not the end of the stream.
            while sock.recv(4096):
                pass
        sock.settimeout(PATIENCE)
        sent_before = text(action="heartbeat") + Frames.masked(0x9, b"still there?")
        sock.sendall(sent_before + Frames.masked(0x8, struct.pack("!H", code)))
        assert sock.recv(4096) == b""
        until(lambda: stat(server, "connections") == 0, "the end of the connection")


@pytest.mark.parametrize("code", [4401, 1009])
def test_server_close_without_answer(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A client that never answers the close frame is disconnected after CLOSE_TIMEOUT."""
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", 0.3)
    with Server(MAX_MESSAGE=1000) as server, closed_by_server(server, code) as sock:
        began = time.monotonic()
        read_to_the_end(sock)
        assert time.monotonic() - began > 0.2
        until(lambda: stat(server, "connections") == 0, "the end of the connection")


@pytest.mark.parametrize("reason", ["a hook runs", "it sent too fast"])
def test_server_close_of_client_that_is_not_read(
    slow_hook: SlowHook, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """The client's close frame counts at once, also behind messages that are not handled."""
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with (
        Server(slow_hook, RATE=10) as server,
        server.client(path=f"/ws?token={token()}") as client,
    ):
        if reason == "a hook runs":
            client.sock.sendall(text(action="subscribe", type="slow"))
            assert slow_hook.was_asked.wait(PATIENCE)
        else:
            client.sock.sendall(text(action="authenticate", token="x") * 5)
            until(lambda: stat(server, "throttled") == 1, "the pause")
        client.sock.sendall(text(action="heartbeat") * 5)
        assert server.hub.disconnect("ana") == 1
        assert client.closing().code == 4401
        slow_hook.gate.set()


def test_server_close_after_close_frame_of_client(
    slow_hook: SlowHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close frame that has arrived behind a message of a slow hook counts as the answer."""
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with (
        Server(slow_hook) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock,
    ):
        close = Frames.masked(0x8, struct.pack("!H", 1000))
        message = text(action="subscribe", type="slow")
        sock.sendall(upgrade_request(server.port, f"/ws?token={token()}") + message + close)
        assert slow_hook.was_asked.wait(PATIENCE)
        assert server.hub.disconnect("ana") == 1
        assert close_code(read_to_the_end(sock)) == 4401
        slow_hook.gate.set()


def test_server_close_after_message_too_big(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a message over the limit is discarded, so that the client learns the reason.

    If it stayed unread, the socket would be reset, and the error and the close frame lost.
    """
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with Server(MAX_MESSAGE=1000) as server, open_raw(server.port) as sock:
        sock.sendall(Frames.masked(0x1, b"x" * 2_000_000))
        sock.sendall(Frames.masked(0x8, struct.pack("!H", 1009)))
        data = b""
        while more := sock.recv(65536):
            data += more
        assert b'"message_too_big"' in data
        assert struct.pack("!H", 1009) in data


def test_server_close_with_frames_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that a client sends before it has read the close frame are dropped."""
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with Server(MAX_MESSAGE=1000, HEARTBEAT=NEVER) as server:
        with closed_by_server(server, 1009) as sock:
            sock.sendall(Frames.masked(0xA) * 1000 + Frames.masked(0x8, struct.pack("!H", 1009)))
            # The connection is closed, not reset.
            while sock.recv(4096):
                pass
        until(lambda: slots(server) == 0, "the end of the connection")


def test_server_close_of_flooding_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps sending after the server's close frame is disconnected.

    The rate is not limited then, so a flood would take the time of the loop.
    """
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with (
        Server(MAX_MESSAGE=1000, HEARTBEAT=NEVER) as server,
        closed_by_server(server, 1009) as sock,
    ):
        with contextlib.suppress(ConnectionError):
            sock.sendall(Frames.masked(0xA) * 10_000)
        until(lambda: slots(server) == 0, "the end of the connection")


def test_hub_close_without_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() sends 1001 to a client that never answers, and disconnects it at its own timeout."""
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", NEVER)
    with open_raw(server.port) as sock:
        until(lambda: stat(server, "connections") == 1, "the connection")
        assert server.hub.close(timeout=0.1) is False
        assert close_code(read_to_the_end(sock)) == 1001
    until(lambda: slots(server) == 0, "the release of the slot")


@pytest.mark.parametrize("is_in_time", [True, False], ids=["within the timeout", "after it"])
def test_hub_close_during_handshake(monkeypatch: pytest.MonkeyPatch, is_in_time: bool) -> None:
    """close() waits for a handshake that has its slot, and frees the slot.

    The client gets 1001. If the handshake is slower than the timeout, the connection is closed
    without a close frame.
    """
    monkeypatch.setattr(Connection, "CLOSE_TIMEOUT", 0.3)
    may_continue = threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @app.after_request
        def wait(response: Response) -> Response:
            assert may_continue.wait(PATIENCE)
            return response

    results: list[bool] = []
    with (
        Server(configure) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock,
    ):
        engine = engine_of(server)
        timeout = PATIENCE if is_in_time else 0.1
        closing = threading.Thread(target=lambda: results.append(server.hub.close(timeout)))
        sock.sendall(upgrade_request(server.port))
        until(lambda: slots(server) == 1, "the handshake")
        closing.start()
        until(lambda: engine.is_closing, "the beginning of the close")
        if not is_in_time:
            closing.join(PATIENCE)
        may_continue.set()
        data = read_to_the_end(sock)
        assert close_code(data) == (1001 if is_in_time else None)
        assert b" 200 " not in data
        closing.join(PATIENCE)
        assert results == [is_in_time]
        until(lambda: slots(server) == 0, "the release of the slot")


# == 8. Endpoint: the /ws route, and taking over the socket ========================================


# -- Answers of the route --------------------------------------------------------------------------


@pytest.mark.core
def test_plain_get(server: Server) -> None:
    """A GET that is no handshake is answered with a sentence about the purpose of the address."""
    status, _, body = server.get("/ws")
    assert (status, json.loads(body)["code"]) == (426, "upgrade_required")
    assert "WebSocket" in json.loads(body)["message"]


@pytest.mark.parametrize("is_inspector_on", [False, True])
def test_handshake_without_upgrade_header(
    caplog: pytest.LogCaptureFixture, is_inspector_on: bool
) -> None:
    """A proxy that drops the header is logged, because the handshake's key has arrived.

    A visitor's plain GET has no key.
    """
    with Server(INSPECTOR=is_inspector_on) as server:
        server.get("/ws")
        assert log_lines(caplog) == []
        for _ in range(2):
            server.get("/ws", Sec_WebSocket_Key=HANDSHAKE["Sec-WebSocket-Key"])
    assert only_log_line(caplog, "Upgrade and Connection on (README, Deployment, Proxies)")
    assert "**Proxies.**" in README


@pytest.mark.core
@pytest.mark.parametrize(
    ("first_line", "status"),
    [
        ("GET /ws HTTP/1.1", 101),
        ("HEAD /ws HTTP/1.1", 400),
        ("GET /ws HTTP/1.0", 400),
        ("POST /ws HTTP/1.1", 405),
        ("PUT /ws HTTP/1.1", 405),
    ],
)
def test_handshake_first_line(server: Server, first_line: str, status: int) -> None:
    """RFC 6455 section 4.2.1 allows only GET with HTTP/1.1 or newer."""
    assert server.handshake(first_line=first_line)[0] == status


@pytest.mark.parametrize(
    ("key", "status"),
    [
        (base64.b64encode(b"0123456789012345").decode(), 101),
        (base64.b64encode(b"short").decode(), 400),
        (base64.b64encode(b"x" * 17).decode(), 400),
        (base64.b64encode(b"x" * 15).decode(), 400),
        ("MDEyMzQ1Njc4OTAxMjM0NQ", 400),
        ("not base64 at all!!!!!==", 400),
        ("MDEyMzQ1Njc4OTAxMjM0NQ==, x", 400),
        ("", 400),
        (None, 400),
    ],
)
def test_handshake_key(server: Server, key: str | None, status: int) -> None:
    """The key must be 16 bytes in base64."""
    answer = server.handshake(Sec_WebSocket_Key=key)
    assert answer[0] == status
    if status == 400:
        assert answer[2]["code"] == "bad_handshake"


@pytest.mark.core
@pytest.mark.parametrize("version", ["8", "7", "14", None])
def test_handshake_version(server: Server, version: str | None) -> None:
    """A client of another version of the protocol learns which one this server speaks."""
    status, headers, body = server.handshake(Sec_WebSocket_Version=version)
    assert (status, body["code"]) == (426, "upgrade_required")
    assert headers["Sec-WebSocket-Version"] == "13"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Cookie": "x" * 8000}, 101),
        ({f"X-{number}": "x" * 4000 for number in range(40)}, 431),
        ({f"X-{number}-" + "a" * 400: "x" for number in range(20)}, 101),
        ({f"X-{number}-" + "a" * 400: "x" for number in range(90)}, 431),
    ],
    ids=["long value", "many long values", "long names", "many long names"],
)
def test_handshake_size(server: Server, headers: dict[str, str], status: int) -> None:
    """Headers are kept in memory as long as the connection, so their size has a limit."""
    answer = server.handshake(**headers)
    assert answer[0] == status
    if status == 431:
        assert answer[2]["code"] == "bad_handshake"


@pytest.mark.core
def test_handshake_over_max_connections() -> None:
    """If there are too many clients, a handshake gets 503 and Retry-After until one leaves."""
    with Server(MAX_CONNECTIONS=2) as server:
        with server.client(), server.client():
            status, headers, body = server.handshake()
            assert (status, body["code"]) == (503, "too_many_connections")
            assert int(headers["Retry-After"]) > 0
        until(lambda: server.handshake()[0] == 101, "a free slot")
        assert stat(server, "refused_503") >= 1


def test_handshake_after_close(server: Server) -> None:
    """If the hub is closed, handshakes are refused with 503 and Retry-After."""
    server.hub.publish("content.created", "posts", {})
    server.hub.close()
    status, headers, body = server.handshake()
    assert (status, body["code"]) == (503, "going_away")
    assert int(headers["Retry-After"]) > 0
    assert slots(server) == 0


def test_handshake_refused_with_trapped_exceptions() -> None:
    """TRAP_HTTP_EXCEPTIONS is for the site's own views; a refused handshake is no failure."""

    def configure(app: Flask, hub: Hub) -> None:
        app.config["TRAP_HTTP_EXCEPTIONS"] = True

    with Server(configure) as server:
        assert server.handshake(Origin="https://elsewhere.example")[0] == 403


def test_compression() -> None:
    """permessage-deflate is declined. Another flask-sock route of the site still accepts it."""

    def configure(app: Flask, hub: Hub) -> None:
        Sock(app).route("/echo")(lambda ws: ws.send(ws.receive()))

    with Server(configure) as server:
        offer = "permessage-deflate; client_max_window_bits"
        for path, is_accepted in (("/ws", False), ("/echo", True)):
            headers = server.handshake(path, Sec_WebSocket_Extensions=offer)[1]
            assert ("Sec-WebSocket-Extensions" in headers) is is_accepted


@pytest.mark.core
def test_options_for_other_sockets() -> None:
    """SOCK_SERVER_OPTIONS of a site's other WebSocket routes do not apply to this one."""

    def configure(app: Flask, hub: Hub) -> None:
        options = {"ping_interval": 2, "max_message_size": 10, "receive_bytes": 100}
        app.config["SOCK_SERVER_OPTIONS"] = options

    with Server(configure) as server, server.client() as client:
        for _ in range(5):
            client.subscribe()
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}


# -- Origins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "is_allowed"),
    [
        ("http://site.example", "site.example", True),
        # A proxy may have removed the TLS.
        ("https://site.example", "site.example", True),
        ("HTTP://SITE.Example", "site.example", True),
        ("http://site.example:80", "site.example", True),
        ("https://site.example", "site.example:443", True),
        ("http://site.example:8080", "site.example:8080", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        # A service of a compose file may have an underscore in its name.
        ("http://my_site", "my_site", True),
        ("http://my_site:8080", "my_site:8080", True),
        ("http://xn--bcher-kva.example", "xn--bcher-kva.example", True),
        (None, "site.example", True),
        ("http://my_site", "my_site:8080", False),
        ("http://your_site", "my_site", False),
        ("http://site.example:8081", "site.example:8080", False),
        ("http://site.example:8080", "site.example", False),
        ("https://site.example:80", "site.example", False),
        ("http://evil.example", "site.example", False),
        ("http://site.example.evil.example", "site.example", False),
        ("http://evil-site.example", "site.example", False),
        ("http://www.site.example", "site.example", False),
        ("http://site.example.", "site.example", False),
        ("http://site.example@evil.example", "site.example", False),
        ("http://evil.example@site.example", "site.example", False),
        ("http://site.example:80@evil.example", "site.example", False),
        ("http://evil.example#@site.example", "site.example", False),
        ("http://evil.example?http://site.example", "site.example", False),
        ("http://evil.example/http://site.example", "site.example", False),
        ("http://evil.example\\@site.example", "site.example", False),
        ("http://site.example http://evil.example", "site.example", False),
        ("site.example", "site.example", False),
        ("//site.example", "site.example", False),
        ("://site.example", "site.example", False),
        ("1", "site.example", False),
        ("", "site.example", False),
        ("9p://evil.example", "site.example", False),
        ("not_a_scheme://evil.example", "site.example", False),
        ("null", "site.example", False),
        ("null", "not a host", False),
        ("null", "", False),
        ("file://", "site.example", False),
        ("http://", "site.example", False),
        ("http://[evil", "site.example", False),
        ("http://site.example:99999", "site.example", False),
        ("http://site.example:x", "site.example", False),
        ("http://s\u00efte.example", "site.example", False),
        pytest.param("http://" + "a" * 5000, "site.example", False, id="5,000 characters"),
    ],
)
def test_origin_of_same_host(
    server: Server, origin: str | None, host: str, is_allowed: bool
) -> None:
    """By default a page must come from the host and port that it connects to."""
    status, _, body = server.handshake(Origin=origin, Host=host)
    if is_allowed:
        assert status == 101
    else:
        assert (status, body["code"]) == (403, "forbidden")


@pytest.mark.core
@pytest.mark.parametrize(
    ("entry", "origin", "is_allowed"),
    [
        ("https://shop.example", "https://shop.example", True),
        ("https://shop.example", "HTTPS://Shop.Example", True),
        ("https://shop.example", "http://shop.example", False),
        ("https://shop.example", "https://shop.example:8443", False),
        ("https://shop.example", "https://shop.example.evil.example", False),
        ("https://shop.example", "https://shop.example@evil.example", False),
        ("https://shop.example", "null", False),
        ("https://shop.example", "", False),
        ("https://shop.example", "*", False),
        ("https://shop.example:443", "https://shop.example", True),
        ("http://shop.example:80", "http://shop.example", True),
        ("https://shop.example:80", "https://shop.example", False),
        ("HTTPS://Shop.Example", "https://shop.example", True),
        ("http://Local.example:3000/", "http://local.example:3000", True),
        ("http://Local.example:3000/", "http://local.example", False),
        ("https://bücher.example", "https://xn--bcher-kva.example", True),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example", True),
        ("http://my_site:8080", "http://my_site:8080", True),
        ("http://[::1]:3000", "http://[::1]:3000", True),
        ("https://*.example.com", "https://www.example.com", True),
        ("https://*.example.com", "https://a.b.example.com", True),
        ("https://*.example.com", "https://example.com", False),
        ("https://*.example.com", "https://evilexample.com", False),
        ("https://*.example.com", "http://www.example.com", False),
        ("https://*.example.com", "https://www.example.com:8443", False),
        ("https://*.example.com", "https://www.example.com.evil.example", False),
        ("https://*.example.com", "https://evil.example/.example.com", False),
        ("https://*.example.com:8443", "https://www.example.com:8443", True),
        ("https://*.bücher.example", "https://www.xn--bcher-kva.example", True),
    ],
)
def test_origin_listed(entry: str, origin: str, is_allowed: bool) -> None:
    """Entries of ORIGINS are compared as browsers write origins; `*.` means all subdomains."""
    with Server(ORIGINS=["https://another.example", entry]) as server:
        assert (server.handshake(Origin=origin)[0] == 101) is is_allowed


@pytest.mark.parametrize(
    ("origins", "origin", "is_allowed"),
    [
        (["https://shop.example"], "http://site.example", True),
        (["https://shop.example"], "https://site.example", True),
        (["https://shop.example"], None, True),
        (["https://shop.example"], "http://elsewhere.example", False),
        ([], "http://site.example", True),
        ([], "http://elsewhere.example", False),
        ("*", "http://elsewhere.example", True),
        ("*", "null", True),
        ("*", "", True),
        ("*", None, True),
    ],
)
def test_origin_of_site_beside_list(
    origins: list[str] | str, origin: str | None, is_allowed: bool
) -> None:
    """ORIGINS adds to the site's own origin, and "*" allows every page."""
    with Server(ORIGINS=origins) as server:
        assert (server.handshake(Origin=origin, Host="site.example")[0] == 101) is is_allowed


def test_origin_refused_is_logged_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """There is one line for pages of other sites, and one for pages that are opened as a file."""
    for origin in ("http://evil.example", "http://elsewhere.example", "null", "file://"):
        assert server.handshake(Origin=origin)[0] == 403
    assert stat(server, "refused_403") == 4
    assert len(log_lines(caplog, "SWIFTCMS_WS_ORIGINS")) == 1
    assert len(log_lines(caplog)) == 2


@pytest.mark.parametrize(
    "entry",
    [
        "shop.example",
        "//shop.example",
        "https://",
        "https://*",
        "https://shop.example/path",
        "https://shop.example?query",
        "https://shop.example#part",
        "https://ana@shop.example",
        "https://shop.example:99999",
        "https://shop.example:port",
        "https://www.*.example",
        "https://*.*.example",
        "https://*shop.example",
        "https://a shop.example",
        "https://[::1",
        "wss://shop.example",
        "",
    ],
)
def test_origin_entry_that_matches_no_page(entry: str) -> None:
    """An entry that can never match is a mistake, which is named when the hub is registered."""
    app = Flask("site")
    app.config["SWIFTCMS_WS_ORIGINS"] = ["https://another.example", entry]
    with pytest.raises(ValueError, match="SWIFTCMS_WS_ORIGINS"):
        Hub().init_app(app)


# -- The request of a handshake --------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("has_relay", [False, True], ids=["taken over", "relay"])
def test_handshake_request_finished(monkeypatch: pytest.MonkeyPatch, has_relay: bool) -> None:
    """The site's functions run once and in Flask's order, while the WebSocket is still open.

    Otherwise a database connection of the request would be held as long as the WebSocket, or
    returned to its pool twice.
    """
    monkeypatch.setattr(swiftcms_ws.Endpoint, "FORCE_RELAY", has_relay)
    calls: list[str] = []
    pool = ["connection"]

    def configure(app: Flask, hub: Hub) -> None:
        @app.before_request
        def before() -> None:
            g.connection = pool.pop()

        @app.after_request
        def after(response: Response) -> Response:
            calls.append(f"after_request {response.status_code} {g.connection}")
            return response

        @app.teardown_request
        def teardown(error: BaseException | None) -> None:
            pool.append(g.connection)
            calls.append(f"teardown_request {error}")

        app.teardown_appcontext(lambda error: calls.append(f"teardown_appcontext {error}"))

    expected = [
        "after_request 101 connection",
        "teardown_request None",
        "teardown_appcontext None",
    ]
    with Server(configure) as server:
        ends = note_ends(server.app)
        with server.client() as client:
            until(lambda: ends == ["/ws"], "the end of the handshake's request")
            assert calls == expected
            client.subscribe()
            server.publish(1)
            assert client.receive()["payload"] == {"n": 1}
            client.close()
        until(lambda: stat(server, "connections") == 0, "the end of the connection")
    assert (calls, pool, ends) == (expected, ["connection"], ["/ws"])


def test_handshake_accepted_after_after_request() -> None:
    """The 101 is sent after the after_request functions and the session interface have run.

    Otherwise a client that logs out at once could do so before the handshake stores its session.
    """
    is_storing, may_continue = threading.Event(), threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @app.after_request
        def store(response: Response) -> Response:
            is_storing.set()
            assert may_continue.wait(PATIENCE)
            return response

    with (
        Server(configure) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as sock,
    ):
        sock.sendall(upgrade_request(server.port))
        assert is_storing.wait(PATIENCE)
        try:
            with pytest.raises(TimeoutError):
                sock.recv(4096)
        finally:
            may_continue.set()
        sock.settimeout(PATIENCE)
        assert b" 101 " in read_to(sock, b"\r\n\r\n")


@pytest.mark.core
@pytest.mark.parametrize(
    ("path", "expected"),
    [("/logout", {"user": None, "cart": []}), ("/cart/book", {"user": "ana", "cart": ["book"]})],
    ids=["logout", "cart"],
)
def test_session_changed_while_websocket_is_open(
    tmp_path: Path, path: str, expected: dict[str, Any]
) -> None:
    """The identify hook reads the site's session, and the handshake stores it only once, at once.

    Flask-Session stores the whole session after each request. If the handshake's request lasted
    as long as its WebSocket, this would undo a logout or empty a cart that came later.
    """
    flask_session = pytest.importorskip("flask_session")
    cachelib = pytest.importorskip("cachelib")

    def configure(app: Flask, hub: Hub) -> None:
        app.config["SESSION_TYPE"] = "cachelib"
        app.config["SESSION_CACHELIB"] = cachelib.FileSystemCache(str(tmp_path))
        flask_session.Session(app)
        hub.identify(lambda: session.get("user"))

        @app.post("/login")
        def login() -> str:
            session["user"] = "ana"
            session["cart"] = []
            return "welcome"

        @app.post("/logout")
        def logout() -> str:
            session.clear()
            return "goodbye"

        @app.post("/cart/<item>")
        def add(item: str) -> str:
            session["cart"] = [*session["cart"], item]
            return item

        @app.get("/session")
        def show() -> dict[str, Any]:
            return {"user": session.get("user"), "cart": session.get("cart", [])}

    with Server(configure) as server:
        ends = note_ends(server.app)
        address = f"http://127.0.0.1:{server.port}"
        cookie = http(f"{address}/login", "POST")[1]["Set-Cookie"].split(";")[0]
        with server.client(headers={"Cookie": cookie}) as client:
            assert client.hello["payload"]["userId"] == "ana"
            with server.client() as stranger:
                assert stranger.hello["payload"]["userId"] is None
            assert http(address + path, "POST", Cookie=cookie)[0] == 200
            client.close()
        until(lambda: "/ws" in ends, "the end of the handshake's request")
        assert json.loads(server.get("/session", Cookie=cookie)[2]) == expected


def test_database_pool_smaller_than_clients(tmp_path: Path) -> None:
    """A pool of 2 connections is enough for hooks that query, with 20 WebSockets open."""
    pytest.importorskip("flask_sqlalchemy")
    from flask_sqlalchemy import SQLAlchemy
    from sqlalchemy.pool import QueuePool

    db = SQLAlchemy()
    pool_options = {"poolclass": QueuePool, "pool_size": 2, "max_overflow": 0, "pool_timeout": 3}
    queries: Counter[str] = Counter()

    def query(name: str) -> bool:
        queries[name] += 1
        return bool(db.session.execute(sqlalchemy.text("SELECT 1")).scalar())

    def configure(app: Flask, hub: Hub) -> None:
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'site.db'}"
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = pool_options
        db.init_app(app)
        app.before_request(lambda: query("before_request") and None)
        hub.identify(lambda: "ana" if query("identify") else None)
        hub.authorize(lambda user, event_type, content_type: query("authorize"))
        app.get("/page")(lambda: str(query("view")))

    with Server(configure) as server, contextlib.ExitStack() as stack:
        with server.app.app_context():
            pool = db.engine.pool
            stack.callback(db.engine.dispose)
        assert isinstance(pool, QueuePool)
        clients: list[Client] = []

        def connect() -> None:
            for _ in range(5):
                client = stack.enter_context(server.client())
                client.subscribe()
                clients.append(client)

        run_all([connect] * 4)
        until(lambda: pool.checkedout() == 0, "the return of all connections to the pool")
        for _ in range(3):
            assert server.get("/page")[::2] == (200, b"True")
        server.publish(1)
        for client in clients:
            assert client.receive()["payload"] == {"n": 1}
            client.close()
        until(lambda: stat(server, "connections") == 0, "the end of all connections")
        until(lambda: pool.checkedout() == 0, "the return of all connections to the pool")
    assert queries == {"identify": 20, "authorize": 20, "before_request": 23, "view": 3}


def test_hooks_have_their_own_g() -> None:
    """Each call of a hook or a signal receiver has a `g` of its own."""
    seen: list[tuple[str, list[str]]] = []

    def look(name: str) -> bool:
        seen.append((name, sorted(g)))
        setattr(g, name, True)
        return True

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: "ana" if look("identify") else None)
        hub.authorize(lambda user, event_type, content_type: look("authorize"))

    def connected(app: Flask, **more: Any) -> None:
        look("connected")

    def disconnected(app: Flask, **more: Any) -> None:
        look("disconnected")

    with (
        Server(configure) as server,
        swiftcms_ws.client_connected.connected_to(connected, server.app),
        swiftcms_ws.client_disconnected.connected_to(disconnected, server.app),
    ):
        with server.client() as client:
            client.subscribe("a.b")
            client.subscribe("a.c")
            client.close()
        until(lambda: len(seen) == 5, "all calls")
    names = ["authorize", "authorize", "connected", "disconnected", "identify"]
    assert sorted(seen) == [(name, []) for name in names]


def test_hooks_see_environ_of_middleware() -> None:
    """Values that middleware adds reach the hooks; the server's socket does not."""
    tenant = object()
    seen: list[str] = []

    def look(name: str) -> bool:
        environ = request.environ
        assert environ["site.tenant"] is tenant
        assert environ["site.flags"] == {"beta": [True]}
        sockets = [key for key, value in environ.items() if isinstance(value, socket.socket)]
        # The identify hook runs in the handshake's own request.
        assert name == "identify" or not sockets
        assert request.get_data() == b""
        seen.append(name)
        return True

    def configure(app: Flask, hub: Hub) -> None:
        inner = app.wsgi_app

        def middleware(environ: dict[str, Any], start_response: Any) -> Any:
            environ.update({"site.tenant": tenant, "site.flags": {"beta": [True]}})
            return inner(environ, start_response)

        app.wsgi_app = middleware  # type: ignore[method-assign, assignment]
        hub.identify(lambda: "ana" if look("identify") else None)
        hub.authorize(lambda user, event_type, content_type: look("authorize"))

    def connected(app: Flask, **more: Any) -> None:
        look("connected")

    with (
        Server(configure) as server,
        swiftcms_ws.client_connected.connected_to(connected, server.app),
        server.client() as client,
    ):
        assert client.hello["payload"]["userId"] == "ana"
        client.subscribe()
        until(lambda: len(seen) == 3, "all calls")
    assert sorted(seen) == ["authorize", "connected", "identify"]


def test_request_blueprint_name() -> None:
    """README: before_request functions can leave out the handshake, /ws/events and client.js."""
    visits: list[str] = []

    def configure(app: Flask, hub: Hub) -> None:
        @app.before_request
        def note_visit() -> None:
            if request.blueprint == "swiftcms_ws":
                return
            visits.append(request.path)

        app.add_url_rule("/", view_func=lambda: "a page")

    assert 'if request.blueprint == "swiftcms_ws"' in README
    with Server(configure) as server, server.client() as client:
        client.subscribe()
        for path in ("/ws", "/ws/client.js", "/ws/events?mode=poll", "/"):
            server.get(path)
    assert visits == ["/"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("place", "code"),
    [("teardown_request", 1000), ("client_connected", 1011), ("client_disconnected", 1000)],
)
def test_site_code_fails_at_handshake(
    caplog: pytest.LogCaptureFixture, place: str, code: int
) -> None:
    """If a function of the site raises, that is logged, and its client leaves no slot or thread."""
    is_broken = True

    def fail(*arguments: Any, **more: Any) -> None:
        if is_broken:
            raise RuntimeError("the database is down")

    threads = threading.active_count()
    with Server(MAX_CONNECTIONS=1) as server, contextlib.ExitStack() as stack:
        if place == "teardown_request":
            server.app.teardown_request(fail)
        else:
            stack.enter_context(getattr(swiftcms_ws, place).connected_to(fail, server.app))
        for _ in range(2):
            with server.client(greeted=False) as client:
                client.sock.sendall(Frames.masked(0x8, struct.pack("!H", 1000)))
                assert client.closing().code == code
            until(lambda: slots(server) == 0, "the release of the slot")
        until(lambda: "the database is down" in caplog.text, "the log line")
        is_broken = False
        with server.client() as client:
            assert client.subscribe()["recovered"]
    until(lambda: threading.active_count() <= threads, "the exit of all threads")


GENERATOR_MIDDLEWARE = """
app.wsgi_app, inner = lambda *arguments: watch(*arguments), app.wsgi_app

def watch(environ, start_response):
    try:
        chunks = inner(environ, start_response)
        try:
            yield from chunks
        finally:
            getattr(chunks, "close", lambda: None)()
    except Exception as error:
        log(f"the middleware saw {error!r}")
        raise
    finally:
        log(f"finished {environ['PATH_INFO']}")
"""


def test_generator_middleware_under_gunicorn(tmp_path: Path) -> None:
    """Middleware that watches the response's iterator, such as Sentry's, reports no failure."""
    with Site(tmp_path, GTHREAD, setup=GENERATOR_MIDDLEWARE) as site:
        for _ in range(3):
            with site.client() as client:
                client.subscribe()
                assert client.close().code == 1000
        until(lambda: site.output().count("finished /ws") == 3, "the end of all handshakes")
        site.check()
        assert "the middleware saw" not in site.output()


# -- Web servers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_name", "version"),
    [
        *(pytest.param(name, None, marks=pytest.mark.core, id=name) for name in SERVERS),
        # The oldest versions that are supported close sockets in other places than the newest.
        *((name, "22.0.0") for name in ("sync", "gthread")),
        *((name, "23.0.0") for name in ("sync", "gthread")),
    ],
)
def test_server_with_more_clients_than_threads(
    tmp_path: Path,
    old_gunicorn: Callable[[str | None], dict[str, str]],
    server_name: str,
    version: str | None,
) -> None:
    """A WebSocket holds no thread: 60 clients are served, and pages at the same time.

    The handshake's request is finished at once and without an error, the access log says 101, and
    a server without its socket does not spin.
    """
    environ = old_gunicorn(version)
    with (
        Site(tmp_path, SERVERS[server_name], **environ) as site,
        contextlib.ExitStack() as stack,
    ):
        clients = connect_many(stack, site, 60)
        assert site.page() == b"a page"
        for client in clients:
            client.subscribe("content.*", "posts")
        event_id = site.publish(1)
        for client in clients:
            assert client.receive()["id"] == event_id
        state = site.state()
        assert state["connections"] == 60
        until(lambda: threads_of(state["pid"]) <= 16, "the exit of the handshakes' threads")
        assert cpu_share(state["pid"]) < 0.3, "the server spins"
        for client in clients:
            assert client.close().code == 1000
        until(lambda: site.state()["slots"] == 0, "the release of all slots")
        check_requests(site, 60, has_access_log="waitress" not in server_name)
        assert version is None or f"Starting gunicorn {version}" in site.output()


@pytest.mark.parametrize("server_name", UNSUITABLE)
def test_server_that_is_unsuitable(tmp_path: Path, server_name: str) -> None:
    """A server that would keep the socket, or block in the relay, answers 501, and its pages."""
    with Site(tmp_path, UNSUITABLE[server_name]) as site:
        status, _, body = site.refusal()
        assert (status, body["code"]) == (501, "not_supported")
        assert "gunicorn" in body["message"]
        assert site.page() == b"a page"
        assert "Traceback" not in site.output()


@pytest.mark.core
def test_server_is_test_client() -> None:
    """Flask's test client has no socket: 501 with a sentence, no exception."""
    app = Flask("site")
    Hub().init_app(app)
    # Without the version of HTTP, which the test client leaves to WSGI's default, this is 400.
    environ = {"SERVER_PROTOCOL": "HTTP/1.1"}
    answer = app.test_client().get("/ws", headers=HANDSHAKE, environ_overrides=environ)
    assert answer.status_code == 501
    assert answer.json is not None
    assert answer.json["code"] == "not_supported"
    assert "gunicorn" in answer.json["message"]


# -- The socket is taken over ----------------------------------------------------------------------


@pytest.mark.parametrize("server_name", [*KINDS_OF_SERVERS, *TLS_SERVERS])
def test_take_over_frame_sent_with_handshake(site: Site) -> None:
    """The server has read such a frame into its own buffer, or decrypted it; it is not lost."""
    for _ in range(3):
        with site.open() as sock:
            second = text(action="heartbeat", ref="second", padding="x" * 20_000)
            first = text(action="heartbeat", ref="first")
            sock.sendall(upgrade_request(site.port) + first + second[:12_000])
            assert read_to(sock, b'"first"').startswith(b"HTTP/1.1 101 ")
            sock.sendall(second[12_000:])
            read_to(sock, b'"second"')
    site.check()


@pytest.mark.parametrize("server_name", [*KINDS_OF_SERVERS, "waitress lookahead"])
def test_take_over_frame_sent_during_handshake(tmp_path: Path, site: Site) -> None:
    """Such bytes are in the socket, or in the buffers of a server that keeps reading meanwhile."""
    release = tmp_path / "release"
    with site.open() as sock:
        sock.sendall(upgrade_request(site.port, f"/ws?hold={release}"))
        until(lambda: "handshake held" in site.output(), "the handshake")
        second = text(action="heartbeat", ref="second", padding="x" * 20_000)
        sock.sendall(text(action="heartbeat", ref="first") + second[:12_000])
        release.touch()
        read_to(sock, b'"first"')
        sock.sendall(second[12_000:])
        read_to(sock, b'"second"')
    site.check()


@pytest.mark.parametrize("is_pipelined", [False, True], ids=["kept alive", "pipelined"])
@pytest.mark.parametrize("server_name", ["gthread", "gevent", "waitress"])
def test_take_over_after_another_request(site: Site, is_pipelined: bool) -> None:
    """A proxy may send a handshake on a connection that it has kept from an earlier request."""
    with site.open() as sock:
        page = f"GET /page HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n\r\n".encode()
        handshake = upgrade_request(site.port) + text(action="heartbeat", ref="first")
        if is_pipelined:
            sock.sendall(page + handshake)
        else:
            sock.sendall(page)
            assert read_to(sock, b"a page").startswith(b"HTTP/1.1 200 ")
            sock.sendall(handshake)
        read_to(sock, b'"first"')
        assert cpu_share(site.state()["pid"]) < 0.3, "the server spins"
    site.check()


@pytest.mark.parametrize("server_name", KINDS_OF_SERVERS)
def test_take_over_after_reset(tmp_path: Path, site: Site) -> None:
    """A client that resets while its handshake is handled leaves no slot and no traceback.

    A write to the dead socket does not raise SIGPIPE, which would stop the process of this site.
    """
    release = tmp_path / "release"
    with site.open() as sock:
        sock.sendall(upgrade_request(site.port, f"/ws?hold={release}"))
        until(lambda: "handshake held" in site.output(), "the handshake")
        reset(sock)
    release.touch()
    until(lambda: f"hold={release}" in site.output(), "the end of the request")
    site.check()


@pytest.mark.parametrize("server_name", KINDS_OF_SERVERS)
def test_take_over_of_clients_that_vanish(site: Site) -> None:
    """72 short connections leave no slot, descriptor or traceback behind; an older client stays."""
    with site.client() as neighbour:
        neighbour.subscribe()
        pid = site.state()["pid"]
        files = len(os.listdir(f"/proc/{pid}/fd"))

        def come_and_go() -> None:
            for number in range(18):
                send_and_vanish(site, number)

        run_all([come_and_go] * 4)
        until(lambda: site.state()["slots"] == 1, "the release of all slots")
        # A page takes one or two, and waitress closes connections late.
        until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= files + 2, "closing the sockets")
        site.publish(7)
        assert neighbour.receive()["payload"] == {"n": 7}
    site.check()
    assert site.state()["pid"] == pid


# -- Relay and TLS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("server_name", TLS_SERVERS)
def test_tls_server(site: Site) -> None:
    """wss:// without a proxy works if the server has threads; the request is still short."""
    with contextlib.ExitStack() as stack:
        clients = connect_many(stack, site, 10, path="/ws?tls")
        until(lambda: site.output().count("teardown") == 10, "the end of the requests")
        for client in clients:
            client.subscribe()
        event_id = site.publish(1)
        for client in clients:
            assert client.receive()["id"] == event_id
            assert client.close().code == 1000
    check_requests(site, 10, "/ws?tls")
    site.check()


@pytest.mark.parametrize("server_name", TLS_SERVERS)
def test_tls_client_vanishes_with_unsent_data(site: Site) -> None:
    """TLS has begun a write that it cannot finish, and fails if the server writes another one."""
    with site.client() as client:
        client.subscribe()
        for number in range(12):
            site.publish(number, text="x" * 900_000)
        until(lambda: site.state()["waiting_bytes"] > 0, "unsent data")
        assert cpu_share(site.state()["pid"]) < 0.3, "the relay spins"
        client.reset()
    site.check()


def test_tls_burst(tmp_path: Path) -> None:
    """Twice MAX_QUEUE at once closes no client if its socket buffer has room for it."""
    with Server(with_tls(tmp_path)) as server, tls_client(server) as client:
        client.subscribe()
        for number in range(2000):
            server.publish(number, padding="x" * 1000)
        assert numbers(client.receive_many(2000)) == list(range(2000))


def test_tls_slow_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A slow client loses no event, and its unsent data is counted until it leaves."""
    with Server(with_tls(tmp_path), MAX_QUEUE=50_000_000) as server:
        with tls_client(server, receive_buffer=4096) as client:
            client.subscribe()
            for number in range(300):
                server.publish(number, padding="x" * 20_000)
            until(lambda: stat(server, "waiting_bytes") > 0, "unsent data")
            assert numbers(client.receive_many(300)) == list(range(300))
            server.publish(padding="x" * 12_000_000)
            until(lambda: stat(server, "waiting_bytes") > 5_000_000, "unsent data of an event")
            unsent = stat(server, "waiting_bytes")
            for _ in range(100):
                client.read_once()
            until(lambda: stat(server, "waiting_bytes") < unsent - 100_000, "the count")
        until(lambda: stat(server, "connections") == 0, "the end of the connection")
    assert "Traceback" not in caplog.text


def test_relay_large_messages(relay: Server) -> None:
    """Messages larger than all buffers arrive complete, in both directions."""
    change = "0123456789abcdef" * 65_000
    with relay.client() as writer, relay.client() as reader:
        for client in (writer, reader):
            client.ask("editStart", **POST)
        for number in range(5):
            payload = {"n": number, "text": change}
            writer.send(action="editChange", payload=payload, **POST)
            message = reader.receive()
            assert message["type"] == "user.edited"
            assert message["payload"]["change"] == payload
        assert reader.close().code == 1000
        assert writer.close().code == 1000


def test_relay_client_vanishes(relay: Server) -> None:
    """If the client resets, the relay stops without a traceback of the server's thread."""
    with relay.client() as client:
        client.reset()
    until(lambda: stat(relay, "connections") == 0, "the end of the connection")


def test_relay_client_never_reads(relay: Server) -> None:
    """If the client does not read, the relay buffers no more than MAX_QUEUE, and then stops."""
    with slow_client(relay):
        for number in range(20):
            relay.publish(number, text="x" * 900_000)
        until(lambda: stat(relay, "closed_1013") == 1, "the close of the slow client")
        until(lambda: stat(relay, "connections") == 0, "the end of the connection")


@pytest.mark.skipif(NGINX is None, reason="there is no nginx on this machine")
def test_nginx_with_tls(tmp_path: Path) -> None:
    """README's nginx lines work with wss://, and heartbeats keep a silent connection open.

    nginx closes one after 60 seconds by default; a heartbeat comes every 25. The test has 1 second
    and 0.4.
    """
    block = re.search(r"```nginx\n(.*?)```", README, re.S)
    assert block is not None
    in_http, location = block[1].split("\n\n")
    certificate, key = self_signed(tmp_path)
    with Server(HEARTBEAT=0.4) as server:
        port = free_port()
        (tmp_path / "nginx.conf").write_text(
            f"""
            daemon off; error_log stderr; pid {tmp_path}/nginx.pid;
            events {{}}
            http {{
              access_log off;
              {in_http}
              server {{
                listen 127.0.0.1:{port} ssl;
                ssl_certificate {certificate}; ssl_certificate_key {key};
                proxy_read_timeout 1s;
                {location.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")}
              }}
            }}"""
        )
        assert NGINX is not None
        with Process(NGINX, "-c", str(tmp_path / "nginx.conf"), cwd=tmp_path, port=port) as nginx:
            sock = secure(socket.create_connection(("127.0.0.1", port), PATIENCE))
            headers = {"Origin": f"https://127.0.0.1:{port}"}
            with Client(port, sock=sock, headers=headers) as client:
                client.subscribe()
                for _ in range(4):
                    assert client.receive(heartbeats=True)["type"] == "system.heartbeat"
                server.publish(1)
                assert client.receive()["payload"] == {"n": 1}
                assert client.close().code == 1000
            nginx.popen.terminate()
            nginx.popen.wait(PATIENCE)


# -- Descriptors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_name", "config"),
    [
        ("werkzeug", {"SWIFTCMS_WS_MAX_CONNECTIONS": 10_000}),
        ("sync", {"SWIFTCMS_WS_MAX_CONNECTIONS": 10_000}),
        ("gthread", {"SWIFTCMS_WS_MAX_CONNECTIONS": 10_000}),
        ("waitress", {"SWIFTCMS_WS_MAX_CONNECTIONS": 10_000}),
        ("gthread", {}),
        ("gthread TLS", {"SWIFTCMS_WS_MAX_CONNECTIONS": 10_000}),
    ],
    ids=["werkzeug", "sync", "gthread", "waitress", "gthread default", "gthread TLS"],
)
def test_descriptors_used_up(tmp_path: Path, server_name: str, config: dict[str, int]) -> None:
    """At the limit, handshakes get 503, and pages are answered; later there is room again.

    If `accept` got no descriptor, gunicorn's gthread worker would exit and Werkzeug would spin.
    """
    command = limited(ALL_SERVERS[server_name], "ulimit -n 200")
    with Site(tmp_path, command, config=config) as site, contextlib.ExitStack() as stack:
        clients: list[Client] = []
        with pytest.raises(Refused, match="503"):
            while len(clients) < 200:
                clients.append(stack.enter_context(site.client()))
        if site.is_tls:
            # Each client needs three descriptors.
            assert len(clients) >= 25
        else:
            # The floor is half the limit, and the last 50 are the server's.
            assert 40 <= len(clients) <= 50
            used = descriptors(site.state()["pid"], clients)
            assert len(used) == len(clients)
            assert 100 <= min(used) <= max(used) < 150
        for _ in range(3):
            status, headers, body = site.refusal()
            assert (status, body["code"]) == (503, "too_many_connections")
            assert int(headers["Retry-After"]) > 0
            assert site.page() == b"a page"
        until(lambda: "ulimit -n" in site.output(), "the hint how to raise the limit")
        for client in clients[10:]:
            assert client.ask("heartbeat")["type"] == "system.heartbeat"
        for client in clients[:10]:
            assert client.close().code == 1000
        until(lambda: site.state()["slots"] == len(clients) - 10, "the release of ten slots")
        site.talk()
        log = site.output()
        assert log.count("ulimit -n") == 1, log
        assert TROUBLE.search(log) is None, log


@pytest.mark.parametrize("server_name", KINDS_OF_SERVERS)
def test_descriptors_from_floor(site: Site) -> None:
    """Numbers below 1024 stay free for the server and the site, because `select()` fails above.

    The soft limit is raised from 1024 to the hard one, so that there is room for connections.
    """
    with contextlib.ExitStack() as stack:
        clients = connect_many(stack, site, 20)
        pid = site.state()["pid"]
        used = until(
            lambda: min(found := descriptors(pid, clients), default=0) >= 1024 and found,
            "the close of the server's own descriptors",
        )
        assert len(used) == 20
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max open files +(\d+)", limits)[1] == "8192"  # type: ignore[index]


# -- Forks and programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("server_name", ["werkzeug", "sync", "waitress"])
def test_program_inherits_no_socket(site: Site) -> None:
    """Otherwise a program that the site starts would hold the connections of all clients."""
    with contextlib.ExitStack() as stack:
        clients = connect_many(stack, site, 5)
        code = 'result = subprocess.Popen(["sleep", "20"], close_fds=False).pid'
        program = site.run(code)
        stack.callback(os.kill, program, signal.SIGKILL)
        until(lambda: Path(f"/proc/{program}/comm").read_text() == "sleep\n", "the program")
        assert descriptors(program, clients) == []
        paths = [f"/proc/{program}/fd/{number}" for number in os.listdir(f"/proc/{program}/fd")]
        # Werkzeug lets its reloader inherit the socket on which it listens.
        assert sum(os.readlink(path).startswith("socket:") for path in paths) <= 1


# The child lives until the test creates a file. Its exit handlers run, as after sys.exit(), but not
# the code of the web server that called the view.
FORK = """
result = os.fork()
if result == 0:
    wait_for_file({leave!r})
    try:
        publish("content.created", "posts", {{"child": True}})
    finally:
        atexit._run_exitfuncs()
        os._exit(0)
"""

# A library in C forks without calling Python's functions for that.
FORK_IN_C = """
result = ctypes.PyDLL(None).fork()
if result == 0:
    wait_for_file({leave!r})
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("server_name", "code"),
    [("werkzeug", FORK), ("sync", FORK), ("gthread", FORK), ("werkzeug", FORK_IN_C)],
    ids=["werkzeug", "sync", "gthread", "werkzeug, fork in C"],
)
def test_fork_child_lives_on(tmp_path: Path, site: Site, code: str) -> None:
    """A child's copies of the sockets keep no connection open, and the child sends no data.

    This is also true if it publishes, and its exit handlers do not wait for clients.
    """
    leave = tmp_path / "leave"
    with site.client() as stays:
        stays.subscribe()
        with site.client() as leaves:
            child = site.run(code.format(leave=str(leave)))
            began = time.monotonic()
            assert leaves.close().code == 1000
            assert time.monotonic() - began < 2 * SLOWNESS
        leave.touch()
        began = time.monotonic()
        assert site.run(f"result = os.waitpid({child}, 0)[1]") == 0
        assert time.monotonic() - began < 1.5 * SLOWNESS
        stays.nothing_more()
        site.publish(1)
        assert stays.receive()["payload"] == {"n": 1}
    site.check()


def test_fork_child_outlives_server(tmp_path: Path) -> None:
    """If the server exits, its clients get 1001 and are disconnected at once."""
    leave = tmp_path / "leave"
    with Site(tmp_path, WERKZEUG) as site, site.client() as client:
        site.run(FORK.format(leave=str(leave)))
        try:
            site.popen.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert client.closing().code == 1001
            assert time.monotonic() - began < 2 * SLOWNESS
            assert site.popen.wait(PATIENCE) == -signal.SIGTERM
        finally:
            leave.touch()


# The child catches every exception.
STUBBORN_CHILD = """
def catch_everything(is_running):
    is_running.set()
    while True:
        try:
            time.sleep(0.01)
        except:
            pass

context = multiprocessing.get_context("fork")
is_running = context.Event()
child = context.Process(target=catch_everything, args=(is_running,))
child.start()
is_running.wait()
child.terminate()
child.join(5)
result = child.exitcode
child.kill()
"""


@pytest.mark.parametrize("server_name", ["werkzeug", "waitress"])
def test_fork_child_stops_at_sigterm(site: Site) -> None:
    """A child gets the former handlers back: ours would raise an exception, which it may catch."""
    with site.client() as client:
        assert site.run(STUBBORN_CHILD) == -signal.SIGTERM
        assert client.ask("heartbeat")["type"] == "system.heartbeat"


# -- Signals and exits of servers ------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    "server_name", ["flask run", "flask run single", *KINDS_OF_SERVERS, *TLS_SERVERS]
)
def test_signal(tmp_path: Path, server_name: str, number: int) -> None:
    """Each client gets 1001 within two seconds, and the process exits as it does without us."""
    command = ALL_SERVERS[server_name]
    with Site(tmp_path, command) as site, contextlib.ExitStack() as stack:
        clients = connect_many(stack, site, 20)
        assert site.ask("GET", "/page?last")[0] == 200
        if "waitress" not in server_name:
            # Otherwise the handler of gunicorn's sync worker may raise SystemExit in this request.
            until(lambda: "/page?last" in site.output(), "the access log")
        began = time.monotonic()
        site.popen.send_signal(number)
        for client in clients:
            assert client.closing().code == 1001
        assert time.monotonic() - began < 2 * SLOWNESS
        status = site.popen.wait(PATIENCE)
        log = site.output()
        # gunicorn itself takes a second to exit.
        assert time.monotonic() - began < 4 * SLOWNESS, log
        is_caught = "gunicorn" in command or number == signal.SIGINT
        assert status == (0 if is_caught else -number), log
        # gunicorn logs the SystemExit of its own handler if SIGINT meets it in a request.
        assert log.count("Traceback") == log.count("\nSystemExit: 0\n"), log


@pytest.mark.parametrize(
    "code", ["time.sleep(20)", "while True: pass"], ids=["sleeping", "spinning"]
)
@pytest.mark.parametrize("server_name", ["werkzeug", "sync", "gthread", "waitress"])
def test_sigterm_during_long_view(tmp_path: Path, server_name: str, code: str) -> None:
    """Clients get 1001 also if gunicorn kills the worker, because a view takes too long.

    That is --graceful-timeout. Exit handlers do not run then.
    """
    more = ("--graceful-timeout", "1") if server_name in ("sync", "gthread") else ()
    with Site(tmp_path, SERVERS[server_name], *more) as site, contextlib.ExitStack() as stack:
        clients = connect_many(stack, site, 10)

        def run() -> None:
            with contextlib.suppress(OSError, HTTPException):
                site.run(f"log('the view runs')\n{code}")

        with running([run]):
            until(lambda: "the view runs" in site.output(), "the view")
            began = time.monotonic()
            site.popen.send_signal(signal.SIGTERM)
            for client in clients:
                assert client.closing().code == 1001
            assert time.monotonic() - began < 2 * SLOWNESS
            site.popen.wait(PATIENCE)
            # Two seconds for the clients, one of patience for the view, one to be killed.
            assert time.monotonic() - began < 4 * SLOWNESS


@pytest.mark.parametrize("server_name", ["werkzeug", "sync", "gthread", "waitress"])
def test_sigterm_while_clients_connect(tmp_path: Path, server_name: str) -> None:
    """If a handshake was accepted, its client gets 1001, however late it came."""
    outcomes: Counter[str] = Counter()
    with Site(tmp_path, SERVERS[server_name]) as site:
        is_over = threading.Event()

        def come() -> None:
            while not is_over.is_set():
                try:
                    with site.client(greeted=False) as client:
                        outcomes["accepted"] += 1
                        outcomes[f"closed with {client.closing().code}"] += 1
                except Refused as refused:
                    outcomes[f"refused with {refused}"] += 1
                except OSError:
                    outcomes["not connected"] += 1
                except Closed:
                    outcomes["not answered"] += 1

        with running([come] * 20):
            try:
                until(lambda: outcomes["accepted"] == 20, "twenty clients")
                began = time.monotonic()
                site.popen.send_signal(signal.SIGTERM)
                site.popen.wait(PATIENCE)
                assert time.monotonic() - began < 4 * SLOWNESS
            finally:
                is_over.set()
        assert "Traceback" not in site.output()
    assert outcomes["closed with 1001"] == outcomes["accepted"], outcomes


@pytest.mark.parametrize(
    ("setup", "status"),
    [
        ("signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))", 7),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", None),
    ],
    ids=["handler", "ignored"],
)
def test_sigterm_handler_of_site(tmp_path: Path, setup: str, status: int | None) -> None:
    """A handler of the site still runs, and decides the exit status.

    A process that ignores SIGTERM continues, so its clients are not closed.
    """
    with Site(tmp_path, WERKZEUG, setup=setup) as site, site.client() as client:
        site.popen.send_signal(signal.SIGTERM)
        if status is None:
            site.talk()
            assert client.ask("heartbeat")["type"] == "system.heartbeat"
            assert site.popen.poll() is None
        else:
            assert client.closing().code == 1001
            assert site.popen.wait(PATIENCE) == status


def test_sigterm_in_container(tmp_path: Path) -> None:
    """The first process of a container exits, although the kernel ignores a SIGTERM of its own.

    Otherwise the site would continue with a closed hub.
    """
    script = """
import os, signal
from flask import Flask
from swiftcms_ws import blueprint
Flask("site").register_blueprint(blueprint)
# The kernel does the same for process 1.
os.kill = lambda process, number: None
signal.raise_signal(signal.SIGTERM)
print("still running")
"""
    run = run_script(tmp_path, script)
    assert (run.returncode, run.stdout, run.stderr) == (128 + signal.SIGTERM, "", "")


THREE_HUBS = """
import sys

from flask import Flask
from swiftcms_ws import Hub
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple

root = Flask("root")
tenants = {f"/{name}": Flask(name) for name in ("north", "south", "east")}
for app in tenants.values():
    Hub().init_app(app)
run_simple("127.0.0.1", int(sys.argv[1]), DispatcherMiddleware(root, tenants), threaded=True)
"""


def test_sigterm_with_three_hubs(tmp_path: Path) -> None:
    """The hubs close at the same time: if no client answers, their timeout passes only once."""
    with script_site(tmp_path, THREE_HUBS) as process, contextlib.ExitStack() as stack:
        socks = []
        for name in ("north", "south", "east"):
            sock = socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE)
            socks.append(stack.enter_context(sock))
            sock.sendall(upgrade_request(process.port, f"/{name}/ws"))
            read_to(sock, b"system.connected")
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert [close_code(read_to_the_end(sock)) for sock in socks] == [1001] * 3
        assert process.popen.wait(PATIENCE) == -signal.SIGTERM
        assert time.monotonic() - began < 2.5 * SLOWNESS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_sends_client_disconnected(tmp_path: Path, number: int) -> None:
    """A site that counts its clients is notified of each of 30, although its process exits."""
    setup = """
@client_disconnected.connect_via(app)
def note(app, client_id, **more):
    # As long as a database takes.
    time.sleep(0.02)
    log(f"disconnected: {client_id}")
"""
    with Site(tmp_path, WERKZEUG, setup=setup) as site, contextlib.ExitStack() as stack:
        clients = connect_many(stack, site, 30)
        site.popen.send_signal(number)
        for client in clients:
            assert client.closing().code == 1001
            client.sock.close()
        site.popen.wait(PATIENCE)
        output = site.output()
    notified = re.findall(r"^disconnected: (\S+)$", output, re.MULTILINE)
    ids = [client.hello["payload"]["clientId"] for client in clients]
    assert sorted(notified) == sorted(ids), output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("server_name", "version"),
    [
        pytest.param("sync", None, marks=pytest.mark.core),
        pytest.param("gthread", None, marks=pytest.mark.core),
        ("sync", "22.0.0"),
        ("gthread", "23.0.0"),
    ],
)
def test_worker_replaced_after_max_requests(
    tmp_path: Path,
    old_gunicorn: Callable[[str | None], dict[str, str]],
    server_name: str,
    version: str | None,
) -> None:
    """Clients of a worker that gunicorn replaces get 1001, and the next worker serves them."""
    more = ("--max-requests", "20")
    with Site(tmp_path, SERVERS[server_name], *more, **old_gunicorn(version)) as site:
        first = site.state()["pid"]
        with contextlib.ExitStack() as stack:
            clients = connect_many(stack, site, 10)

            def wait_for_close(client: Client) -> None:
                assert client.closing().code == 1001

            with running([functools.partial(wait_for_close, client) for client in clients]):
                for _ in range(20):
                    # One of them may meet the worker that is leaving.
                    with contextlib.suppress(OSError, HTTPException):
                        site.page()
        site.talk()
        assert site.state()["pid"] != first
        assert "Traceback" not in site.output()


@pytest.mark.parametrize("server_name", ["sync", "gthread"])
def test_workers_replaced_at_sighup(tmp_path: Path, server_name: str) -> None:
    """A reload without a restart, as `systemctl reload` does, closes the clients with 1001."""
    with Site(tmp_path, SERVERS[server_name]) as site:
        first = site.state()["pid"]
        with site.client() as client:
            site.popen.send_signal(signal.SIGHUP)
            assert client.closing().code == 1001
        until(lambda: first not in children(site.popen.pid), "the exit of the first worker")
        site.talk()
        assert "Traceback" not in site.output()


def test_reloader(tmp_path: Path) -> None:
    """Saving a file of a site in debug mode closes its clients with 1001; they can reconnect.

    The reloader's child exits with status 0 on SIGTERM, as Werkzeug's own handler does.
    """
    with Site(tmp_path, FLASK_RUN, "--debug") as site:
        first = site.state()["pid"]
        assert first != site.popen.pid
        with site.client() as client:
            later = time.time() + 5
            os.utime(tmp_path / "site_app.py", (later, later))
            assert client.closing().code == 1001
        site.talk()
        second = site.state()["pid"]
        assert second != first
        with site.client() as client:
            os.kill(second, signal.SIGTERM)
            assert client.closing().code == 1001
        assert site.popen.wait(PATIENCE) == 0
        assert "Traceback" not in site.output()


def test_gevent_that_patches_late(tmp_path: Path) -> None:
    """With --preload, gunicorn imports the site first. Its first two requests must not block."""
    script = """
import faulthandler
from flask import Flask
from swiftcms_ws import hub
app = Flask("site")
hub.init_app(app)
import gevent.monkey
gevent.monkey.patch_all()
faulthandler.dump_traceback_later(10, exit=True)
gevent.joinall([gevent.spawn(hub.publish, "content.created", "posts", n) for n in (1, 2)])
hub.engine_of(app).workers.submit(lambda: print("a worker's task"))
gevent.sleep(0.01)
print(hub.stats()["published"], hub.close())
"""
    run = run_script(tmp_path, script)
    assert run.stdout.splitlines() == ["a worker's task", "2 True"], run.stderr


# -- Memory ----------------------------------------------------------------------------------------


def test_long_names_of_clients_take_no_memory() -> None:
    """The caches of names must not keep strings of any length that clients have sent."""
    with Server(HEARTBEAT=NEVER, RATE=10**9) as server, server.client() as client:
        name = "a" * 65_000 + "\U0001f600"
        before = resident()
        for number in range(200):
            for fields in (
                {"action": "subscribe", "type": f"{name}{number}"},
                {"action": "editStart", "contentType": f"{name}{number}", "entryId": "1"},
            ):
                data = json.dumps(fields, ensure_ascii=False).encode()
                client.sock.sendall(Frames.masked(0x1, data))
                assert client.receive()["payload"]["code"] == "invalid_type"
        # Each of 400 strings has 260 KB.
        assert resident() - before < 50_000_000


# == 9. Tokens =====================================================================================


# -- Tokens in handshakes --------------------------------------------------------------------------


BOTH_PLACES = pytest.mark.parametrize("place", [in_address, in_header])


@pytest.mark.core
@BOTH_PLACES
def test_token_in_handshake(server: Server, place: Callable[[str], dict[str, Any]]) -> None:
    """A client that sends a good token with its handshake is signed in at once."""
    with server.client(**place(server.hub.issue_token("ana", role="editor"))) as client:
        assert client.hello["payload"]["userId"] == "ana"


@pytest.mark.core
@BOTH_PLACES
@pytest.mark.parametrize(
    ("refused", "code"),
    [
        ("nonsense", "invalid_token"),
        (token(key="k" * 64), "invalid_token"),
        (token(expires_in=-1), "token_expired"),
    ],
    ids=["not a JWT", "another key", "expired"],
)
def test_token_refused_in_handshake(
    server: Server, place: Callable[[str], dict[str, Any]], refused: str, code: str
) -> None:
    """A bad token is answered with 401 and a JSON body that does not repeat it."""
    request = place(refused)
    status, headers, body = server.handshake(
        request.get("path", "/ws"), **request.get("headers", {})
    )
    assert (status, body["code"], headers["WWW-Authenticate"]) == (401, code, "Bearer")
    assert refused not in body["message"]


@pytest.mark.parametrize(
    "bearer",
    ["nonsense", token(key="k" * 64), token(expires_in=-5)],
    ids=["not a JWT", "another key", "expired"],
)
def test_token_refused_beside_identify_hook(bearer: str) -> None:
    """If a site has an identify hook, that decides instead of a proxy's own Bearer header.

    A bad token in the address is still refused.
    """
    with Server(lambda app, hub: hub.identify(lambda: "ana") and None) as server:
        with server.client(**in_header(bearer)) as client:
            assert client.hello["payload"]["userId"] == "ana"
        with server.client(**in_header(token("bob"))) as client:
            assert client.hello["payload"]["userId"] == "bob"
        assert server.handshake(f"/ws?token={bearer}")[0] == 401


def test_token_over_8_kib(server: Server) -> None:
    """A long token is refused before it is decoded, although its signature is good."""
    short, long = token(padding="x" * 5000), token(padding="x" * 6200)
    assert len(short) < 8 * 1024 < len(long)
    with server.client() as client:
        assert error_code(client.authenticate(long)) == "invalid_token"
        assert error_code(client.authenticate(short)) is None
    status, _, body = server.handshake(f"/ws?token={long}")
    assert (status, body["code"]) == (401, "invalid_token")
    assert server.handshake(Authorization=f"Bearer {long}")[0] == 401


@pytest.mark.parametrize(
    ("options", "is_signed_in"),
    [
        ({"headers": {"X-User": "7"}}, True),
        ({**in_address(token(7)), "headers": {"X-User": "eve"}}, True),
        (in_header(token("7")), True),
        ({}, False),
    ],
    ids=["identify hook", "address", "header", "message"],
)
def test_token_of_another_user(options: dict[str, Any], is_signed_in: bool) -> None:
    """A connection keeps its first user, and gets no event for another one."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: request.headers.get("X-User"))

    with Server(configure) as server, server.client(**options) as client:
        if not is_signed_in:
            client.authenticate(token(7))
        client.subscribe()
        for other in ("eve", "70", "7 ", "\uff17"):
            answer = client.authenticate(token(other))
            assert error_code(answer) == "invalid_token"
            server.publish(1, to=other)
        assert client.authenticate(token("7"))["payload"]["userId"] == "7"
        server.publish(2, to=7)
        assert numbers(client.rest()) == [2]


# -- Keys ------------------------------------------------------------------------------------------


def test_token_without_key() -> None:
    """If the site has no key, the error names the setting."""

    def configure(app: Flask, hub: Hub) -> None:
        app.secret_key = None

    with Server(configure) as server, server.client() as client:
        answer = client.authenticate(token())
        assert error_code(answer) == "auth_not_configured"
        assert "SWIFTCMS_WS_JWT_KEY" in answer["payload"]["message"]
        with pytest.raises(ValueError, match="SECRET_KEY"):
            server.hub.issue_token("ana")


@pytest.mark.parametrize("key_name", ["SWIFTCMS_WS_JWT_KEY", "SECRET_KEY"])
def test_key_of_another_algorithm(key_name: str) -> None:
    """A string is no key for RS256: this raises, because every good token would be refused.

    A SECRET_KEY may be set after the registration, so it is checked at first use.
    """
    app, hub = Flask("site"), Hub()
    app.config.update({"SWIFTCMS_WS_JWT_ALGORITHMS": ["RS256"], key_name: KEY})
    with pytest.raises(ValueError, match="SWIFTCMS_WS_JWT_KEY must be a key for RS256"):
        hub.init_app(app)
        assert key_name == "SECRET_KEY"
        hub.publish("content.created", "posts", {})


@pytest.mark.parametrize(
    "algorithms", [["RS256", "HS256"], ["none"], ["HS256", "none"], []], ids=repr
)
def test_algorithms_that_must_not_be_mixed(algorithms: list[str]) -> None:
    """A public key that is also accepted as an HMAC key would let anybody sign tokens."""
    with pytest.raises(ValueError, match="JWT_ALGORITHMS"):
        Server(JWT_ALGORITHMS=algorithms)


def test_secret_key_changed_while_running(server: Server) -> None:
    """Tokens are signed with the key that checks them, also if SECRET_KEY is changed later."""
    with server.client() as client:
        server.app.secret_key = KEY[::-1]
        answer = client.authenticate(server.hub.issue_token("ana"))
        assert error_code(answer) is None


OLD_KEY = "the key of last year, which is longer than the 64 bytes that HS512 asks for too"


@pytest.mark.core
@pytest.mark.parametrize(
    ("config", "key", "code"),
    [
        ({}, OLD_KEY, None),
        ({}, KEY, None),
        ({}, "k" * 64, "invalid_token"),
        ({"JWT_KEY": "j" * 64}, OLD_KEY, "invalid_token"),
        ({"JWT_KEY": "j" * 64}, "j" * 64, None),
    ],
    ids=["old key", "present key", "unknown key", "JWT_KEY, old key", "JWT_KEY"],
)
def test_secret_key_fallbacks(config: dict[str, str], key: str, code: str | None) -> None:
    """Tokens of SECRET_KEY_FALLBACKS are accepted; JWT_KEY has no fallbacks."""

    def configure(app: Flask, hub: Hub) -> None:
        app.config["SECRET_KEY_FALLBACKS"] = [OLD_KEY]

    with Server(configure, **config) as server, server.client() as client:
        assert error_code(client.authenticate(token(key=key))) == code
        is_accepted = server.handshake(f"/ws?token={token(key=key)}")[0] == 101
        assert is_accepted is (code is None)
        expired = client.authenticate(token(key=key, expires_in=-5))
        assert error_code(expired) == (code or "token_expired")
        issued = server.hub.issue_token("ana")
        assert jwt.decode(issued, config.get("JWT_KEY", KEY), ["HS256"])["sub"] == "ana"


# -- Claims ----------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"iat": 50}, None),
        ({"nbf": 50}, None),
        ({"iat": 50, "nbf": 50}, None),
        ({"iat": 90}, "invalid_token"),
        ({"nbf": 90}, "invalid_token"),
        ({"iat": -900}, None),
        ({"exp": -1}, "token_expired"),
        ({"exp": 5}, None),
    ],
    ids=repr,
)
def test_token_of_another_clock(server: Server, claims: dict[str, int], code: str | None) -> None:
    """`iat` and `nbf` may be up to 60 seconds ahead, because clocks differ; `exp` is exact."""
    signed = token(**{name: time.time() + seconds for name, seconds in claims.items()})
    with server.client() as client:
        assert error_code(client.authenticate(signed)) == code


@pytest.mark.parametrize(
    ("exp", "code"),
    [
        ("9999999999", "invalid_token"),
        (1e300, "invalid_token"),
        (10**30, "invalid_token"),
        (4_000_000_000_000, "invalid_token"),
        (-(10**30), "token_expired"),
        (4e9 + 0.5, None),
        (True, "token_expired"),
        (None, "invalid_token"),
        ([], "invalid_token"),
    ],
    ids=repr,
)
def test_token_with_unusual_exp(
    caplog: pytest.LogCaptureFixture, exp: object, code: str | None
) -> None:
    """Milliseconds, strings and numbers beyond all calendars stop neither client nor heartbeat."""
    unusual = jwt.encode({"sub": "eve", "exp": exp}, KEY)
    with Server(HEARTBEAT=0.1) as server, server.client() as client:
        status = server.handshake(f"/ws?token={unusual}")[0]
        assert status == (101 if code is None else 401)
        assert error_code(client.authenticate(unusual)) == code
        assert client.receive(heartbeats=True)["type"] == "system.heartbeat"
    assert log_lines(caplog, logger="", level=logging.ERROR) == []


AUDIENCE_AND_ISSUER = {"aud": "cms", "iss": "https://id.example"}


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"aud": ["x", "cms"]}, None),
        ({"aud": None}, "invalid_token"),
        ({"aud": "x"}, "invalid_token"),
        ({"iss": None}, "invalid_token"),
        ({"iss": ""}, "invalid_token"),
        ({"iss": "h"}, "invalid_token"),
        ({"iss": "id.example"}, "invalid_token"),
        ({"iss": "https://id.example/"}, "invalid_token"),
        ({"iss": "HTTPS://ID.EXAMPLE"}, "invalid_token"),
    ],
    ids=repr,
)
def test_token_audience_and_issuer(changes: dict[str, Any], code: str | None) -> None:
    """Configured values must be in the token, and equal: a part of the name is another issuer."""
    claims = {**AUDIENCE_AND_ISSUER, **changes}
    signed = token(**{name: value for name, value in claims.items() if value is not None})
    config = {"JWT_AUDIENCE": "cms", "JWT_ISSUER": "https://id.example"}
    with Server(**config) as server, server.client() as client:
        assert error_code(client.authenticate(signed)) == code


@pytest.mark.core
def test_issue_token_with_all_settings() -> None:
    """issue_token() adds audience and issuer, and signs with the first algorithm."""
    config = {"JWT_AUDIENCE": "cms", "JWT_ISSUER": "site", "JWT_ALGORITHMS": ["HS512"]}
    with Server(JWT_KEY="j" * 64, **config) as server, server.client() as client:
        issued = server.hub.issue_token("ana")
        assert jwt.get_unverified_header(issued)["alg"] == "HS512"
        assert client.authenticate(issued)["payload"]["userId"] == "ana"


def test_token_for_another_purpose() -> None:
    """README's warning: any token of the site signs in, unless JWT_AUDIENCE is set."""
    reset_password = token(purpose="reset")
    with Server() as server, server.client() as client:
        assert error_code(client.authenticate(reset_password)) is None
    with Server(JWT_AUDIENCE="live") as server, server.client() as client:
        assert error_code(client.authenticate(reset_password)) == "invalid_token"


def test_token_with_fewer_claims() -> None:
    """After a fresh token with fewer claims, subscriptions stay and new ones need its claims.

    Editing is allowed by content type, as README warns: the client reads the text of any entry.
    """

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: Any, event_type: str, content_type: str) -> bool:
            return user.claims.get("role") == "editor"

    with Server(configure) as server, server.client() as client, server.client() as editor:
        client.authenticate(token(role="editor"))
        client.subscribe("content.*", "posts")
        editor.authenticate(token("bob", role="editor"))
        for each in (editor, client):
            each.ask("editStart", contentType="posts", entryId="any entry")
        editor.send(action="editChange", contentType="posts", entryId="any entry", payload="typed")
        assert client.receive()["payload"]["change"] == "typed"
        client.authenticate(token())
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}
        assert error_code(client.ask("subscribe", type="other")) == "forbidden"


# -- Expiry ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_checks")
@pytest.mark.parametrize("place", ["address", "header", "message"])
def test_token_expires(caplog: pytest.LogCaptureFixture, place: str) -> None:
    """A client is disconnected with 4401 when its token expires. Another one of this user stays."""
    caplog.set_level(logging.DEBUG)
    with Server(AUTH="required") as server, server.client() as lasting:
        lasting.authenticate(token(expires_in=600))
        lasting.subscribe()
        short = token(expires_in=0.8)
        ways = {"address": in_address(short), "header": in_header(short), "message": {}}
        with server.client(**ways[place]) as client:
            if place == "message":
                client.authenticate(short)
            client.subscribe()
            error = client.receive()
            assert error_code(error) == "token_expired"
            closed = client.closing()
            assert closed.code == 4401
            assert "token" in (closed.reason or "")
        until(lambda: stat(server, "connections") == 1, "the end of the connection")
        server.publish(1, to="ana")
        assert lasting.receive()["payload"] == {"n": 1}
        until(lambda: stat(server, "closed_4401") == 1, "the count of the close")
        assert stat(server, "error_token_expired") == 1
    assert only_log_line(caplog, "4401")
    check_secret(short, caplog, [error, closed.reason])


@pytest.mark.usefixtures("short_checks")
@pytest.mark.parametrize(("first", "second"), [(0.8, 1.2), (600, 0.8)], ids=["later", "earlier"])
def test_token_replaced_by_fresh_one(server: Server, first: float, second: float) -> None:
    """The expiry of the last token counts, whether it is later or earlier."""
    now = time.time()
    with server.client() as client:
        client.authenticate(token(exp=now + first))
        answer = client.authenticate(token(exp=now + second))
        expires_at = datetime.fromisoformat(answer["payload"]["expiresAt"].replace("Z", "+00:00"))
        assert abs(expires_at.timestamp() - (now + second)) < 1
        assert error_code(client.receive()) == "token_expired"
        assert time.time() >= now + second
        assert client.closing().code == 4401


@pytest.mark.usefixtures("short_checks")
@pytest.mark.parametrize("is_active", [False, True], ids=["silent", "active"])
def test_auth_timeout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_active: bool
) -> None:
    """If AUTH is required, a client without a valid token is disconnected after AUTH_TIMEOUT."""
    monkeypatch.setattr(swiftcms_ws.Expiry, "AUTH_TIMEOUT", 0.6)
    with Server(AUTH="required") as server, server.client() as signed_in:
        signed_in.authenticate(token())
        with server.client() as client:
            if is_active:
                client.sock.sendall(Frames.masked(0x9) + text(action="authenticate", token="x"))
                assert error_code(client.receive()) == "invalid_token"
            assert error_code(client.receive()) == "auth_required"
            assert client.closing().code == 4401
        until(lambda: stat(server, "closed_4401") == 1, "the count of the close")
        assert stat(server, "error_auth_required") == 1
        assert signed_in.ask("heartbeat")["type"] == "system.heartbeat"
    assert only_log_line(caplog, "SWIFTCMS_WS_AUTH")


# -- Forged tokens ---------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "NONE"},
        {"alg": "HS384"},
        {"alg": "HS256", "crit": ["b64"], "b64": False},
        # RFC 7515 section 4.1.11: a token with an unknown critical extension is invalid.
        {"alg": "HS256", "crit": ["x-policy"], "x-policy": 1},
        {"alg": "HS256", "crit": ["x-policy"]},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "crit": "b64"},
    ],
    ids=repr,
)
def test_token_with_forged_header(server: Server, header: dict[str, Any], is_signed: bool) -> None:
    """The site chooses the algorithm, not the token, and unknown requirements are refused."""
    attack = forged(header, KEY.encode() if is_signed else b"")
    with server.client() as client:
        assert error_code(client.authenticate(attack)) == "invalid_token"
    assert server.handshake(f"/ws?token={attack}")[2]["code"] == "invalid_token"


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ({"alg": "HS256"}, "public"),
        ({"alg": "HS512"}, "public"),
        ({"alg": "HS256", "kid": "../../dev/null"}, "public"),
        ({"alg": "HS256", "jwk": {"kty": "oct", "k": "AA"}}, "public"),
        ({"alg": "HS256", "jku": "http://127.0.0.1:1/"}, "public"),
        ({"alg": "HS256"}, "public without newline"),
        ({"alg": "HS256"}, "\0"),
        ({"alg": "none"}, ""),
        ({"alg": "None"}, ""),
        ({"alg": "nOnE"}, ""),
        ({"alg": ""}, ""),
        ({"alg": "RS256"}, ""),
    ],
    ids=repr,
)
def test_token_forged_with_public_key(
    rsa_keys: dict[str, Any], header: dict[str, Any], key: str
) -> None:
    """With RS256, a token is refused if it is not signed, or by HMAC with the public key's text."""
    public = rsa_keys["public"]
    used = {"public": public, "public without newline": public.strip()}.get(key, key)
    attack = forged({"typ": "JWT", **header}, used.encode())
    config = {"JWT_ALGORITHMS": ["RS256"], "JWT_KEY": public}
    with Server(**config) as server, server.client() as client:
        assert error_code(client.authenticate(attack)) == "invalid_token"
        assert server.handshake(f"/ws?token={attack}")[0] == 401


@pytest.mark.parametrize(
    ("key", "algorithm", "code"),
    [
        ("own", "RS256", None),
        ("other", "RS256", "invalid_token"),
        ("own", "RS512", "invalid_token"),
        ("own", "PS256", "invalid_token"),
    ],
)
def test_token_with_rsa_signature(
    rsa_keys: dict[str, Any], key: str, algorithm: str, code: str | None
) -> None:
    """Only the configured algorithm and key are accepted. A public key cannot sign tokens."""
    config = {"JWT_ALGORITHMS": ["RS256"], "JWT_KEY": rsa_keys["public"]}
    with Server(**config) as server, server.client() as client:
        signed = token(key=rsa_keys[key], algorithm=algorithm)
        assert error_code(client.authenticate(signed)) == code
        with pytest.raises(ValueError, match="private key"):
            server.hub.issue_token("ana")


# -- Secrecy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"expires_in": -5}, {"key": "k" * 64}, {"algorithm": "HS512"}],
    ids=["good", "expired", "another key", "another algorithm"],
)
def test_token_is_never_repeated(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """A token is in no log line, access log included, and in no answer or error of the server."""
    caplog.set_level(logging.DEBUG)
    secret = token(**options)
    answers: list[Any] = []
    with Server() as server:
        for query in (
            f"token={secret}",
            f"a=b&token={secret}&c=d",
            f"%74oken={secret}",
            f"token={secret}%20",
        ):
            answers.append(server.handshake(f"/ws?{query}"))
        answers += [
            server.handshake(Authorization=f"Bearer {secret}"),
            server.get(f"/ws?token={secret}"),
            http(f"http://127.0.0.1:{server.port}/ws?token={secret}", "POST"),
            server.get(f"/ws/client.js?token={secret}"),
            server.get(f"/elsewhere?token={secret}")[0],
        ]
        for first_line in (
            f"GET /ws?token={secret} one two",
            f"GET /ws?token={secret} HTTP/7.0",
            f"X /ws?token={secret} HTTP/1.1",
        ):
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
                sock.sendall(f"{first_line}\r\nHost: x\r\n\r\n".encode())
                # Werkzeug's own error page shows the first line.
                answers.append(read_to_the_end(sock).replace(first_line.encode(), b""))
        with server.client() as client:
            for message in (
                {"action": "authenticate", "token": secret},
                {"action": "authenticate", "tokn": secret},
                {"action": "authenticate", "token": [secret]},
                {"action": "authenticate", "token": secret + "x"},
                {"action": "authenticate", "token": {"token": secret}},
                {"action": "subscribe", "type": "*", "token": secret},
            ):
                client.send(**message)
                answers.append(client.receive())
            client.send_raw('{"action": "authenticate", "token": "' + secret)
            answers.append(client.receive())
    assert "GET /ws?token=" in caplog.text
    check_secret(secret, caplog, answers)


# == 10. Session and workers =======================================================================


# -- The greeting, answers and errors --------------------------------------------------------------


@pytest.mark.core
def test_greeting_and_event_form(server: Server) -> None:
    """The first message, and a published event, have exactly the fields of PROTOCOL.md."""
    with server.client() as client:
        assert client.hello.keys() == {"type", "payload", "timestamp"}
        hello = client.hello["payload"]
        assert hello.keys() == {"clientId", "userId", "heartbeat", "lastId", "spread"}
        assert (hello["userId"], hello["heartbeat"], hello["spread"]) == (None, 25, 0)
        assert re.fullmatch(r"\d+-\d+", hello["lastId"])
        client.subscribe()
        event_id = server.publish(7)
        event = client.receive()
    assert event == {
        "type": "content.created",
        "contentType": "posts",
        "payload": {"n": 7},
        "id": event_id,
        "timestamp": event["timestamp"],
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["timestamp"])
    sent = datetime.fromisoformat(event["timestamp"].replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - sent).total_seconds()) < PATIENCE


ANSWER_TYPES = {
    "subscribe": "system.subscribed",
    "unsubscribe": "system.unsubscribed",
    "heartbeat": "system.heartbeat",
    "authenticate": "system.authenticated",
    "editStart": "system.editing",
    "editStop": "system.editing",
    "presence": "system.presence",
}

ANSWERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("subscribe", {}, {"type": "*", "contentType": "*", "recovered": True, "replayed": 0}),
    ("subscribe", {"type": "content.*"}, {"type": "content.*", "contentType": "*"}),
    ("subscribe", {"contentType": "posts"}, {"type": "*", "contentType": "posts"}),
    ("subscribe", {"type": "a.b-c.d_e", "color": "blue"}, {"type": "a.b-c.d_e"}),
    ("subscribe", {"since": "1-0"}, {"recovered": False, "replayed": 0}),
    ("subscribe", {"since": "99999999999999999999-0"}, {"recovered": False}),
    (
        "subscribe",
        {"subscriptions": [{"type": "content.*"}], "since": "1-0"},
        {
            "subscriptions": [{"type": "content.*", "contentType": "*"}],
            "refused": [],
            "recovered": False,
            "replayed": 0,
        },
    ),
    ("unsubscribe", {}, {"type": "*", "contentType": "*", "removed": 0}),
    ("unsubscribe", {"type": "content.*"}, {"type": "content.*", "removed": 0}),
    ("heartbeat", {}, {"spread": 0}),
    ("authenticate", {"token": token()}, {"userId": "ana"}),
    ("authenticate", {"token": token(42)}, {"userId": "42"}),
    ("editStart", POST, {"entryId": "42", "conflict": False}),
    ("editStop", POST, {"entryId": "42", "editors": []}),
    ("presence", {}, {"entries": [], "more": False}),
]


@pytest.mark.core
@pytest.mark.parametrize(("action", "fields", "payload"), ANSWERS, ids=message_ids(ANSWERS))
def test_answer(
    server: Server, action: str, fields: dict[str, Any], payload: dict[str, Any]
) -> None:
    """Each action is answered as PROTOCOL.md says. The answer is no event, so it has no id."""
    with server.client() as client:
        answer = client.ask(action, **fields)
    assert answer["type"] == ANSWER_TYPES[action]
    assert answer["payload"].items() >= payload.items()
    assert "id" not in answer


@pytest.mark.parametrize("fields", [{}, *({"ref": ref} for ref in (0, 1.5, "", "a ref"))], ids=repr)
def test_answer_with_ref(fields: dict[str, Any]) -> None:
    """An answer, and an error, has the `ref` of its message, and none if the message had none."""
    with Server(HEARTBEAT=NEVER) as server, server.client() as client:
        for action in ("heartbeat", "fly"):
            client.send(action=action, **fields)
            answer = client.receive(heartbeats=True)
            assert {name: answer[name] for name in ("ref",) if name in answer} == fields


def check_error(client: Client, code: str, hint: str, action: str | None) -> None:
    """Receive an error, and check that the connection is still served."""
    error = client.receive()
    assert error["type"] == "system.error"
    assert error["payload"].keys() == {"code", "message", "action"}
    assert error["payload"]["code"] == code
    assert hint in error["payload"]["message"]
    assert error["payload"]["action"] == action
    assert client.subscribe()["recovered"] is True


MALFORMED_MESSAGES = [
    ("{", "invalid_json", "not JSON"),
    ("", "invalid_json", "not JSON"),
    ("[" * 50000, "invalid_json", "nested too deep"),
    ('{"action": NaN}', "invalid_json", "NaN"),
    ("1" * 5000, "invalid_json", "not JSON"),
    ("[]", "invalid_message", "an array"),
    ("null", "invalid_message", "null"),
    ('"subscribe"', "invalid_message", "the string"),
    (b"\x00\x01", "invalid_message", "binary"),
    ("{}", "invalid_message", "`action`"),
    ('{"acton": "subscribe"}', "invalid_message", "did you mean `acton`?"),
    ('{"action": 7}', "invalid_message", "the number 7"),
]


@pytest.mark.core
@pytest.mark.parametrize(
    ("message", "code", "hint"),
    MALFORMED_MESSAGES,
    ids=[f"{message!r:.25}" for message, *_ in MALFORMED_MESSAGES],
)
def test_malformed_message(server: Server, message: str | bytes, code: str, hint: str) -> None:
    """A message without a readable action is an error with a hint. The connection stays open."""
    with server.client() as client:
        client.send_raw(message)
        check_error(client, code, hint, action=None)


WRONG_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("subscrbe", {}, "unknown_action", "did you mean `subscribe`?"),
    ("fly", {}, "unknown_action", "unsubscribe"),
    ("subscribe", {"ref": {}}, "invalid_message", "`ref`"),
    ("subscribe", {"ref": True}, "invalid_message", "the boolean true"),
    ("subscribe", {"ref": None}, "invalid_message", "null"),
    ("subscribe", {"type": "con*"}, "invalid_type", "`type`"),
    ("subscribe", {"type": "*.created"}, "invalid_type", "prefix"),
    ("subscribe", {"type": "a.*.b"}, "invalid_type", "prefix"),
    ("subscribe", {"type": "a..b"}, "invalid_type", "prefix"),
    ("subscribe", {"type": ".*"}, "invalid_type", "prefix"),
    ("subscribe", {"type": "a\n"}, "invalid_type", "prefix"),
    ("subscribe", {"type": "a" * 200}, "invalid_type", "128 characters"),
    ("subscribe", {"type": ""}, "invalid_type", 'the string ""'),
    ("subscribe", {"type": None}, "invalid_type", "null"),
    ("subscribe", {"contentType": ["posts"]}, "invalid_type", "`contentType`"),
    ("subscribe", {"contentType": "po*"}, "invalid_type", "`contentType`"),
    ("unsubscribe", {"type": 5}, "invalid_type", "the number 5"),
    ("subscribe", {"since": "yesterday"}, "invalid_since", "1763832000123-0"),
    ("subscribe", {"since": "-1-0"}, "invalid_since", "`since`"),
    ("subscribe", {"since": "9" * 30 + "-0"}, "invalid_since", "`since`"),
    ("subscribe", {"since": "\u0661-0"}, "invalid_since", "`since`"),
    ("subscribe", {"since": 5}, "invalid_since", "the number 5"),
    ("authenticate", {}, "invalid_message", "`token`"),
    ("authenticate", {"tokn": "x"}, "invalid_message", "did you mean `tokn`?"),
    ("authenticate", {"token": 5}, "invalid_message", "a string"),
    ("editStart", {"contentType": "posts"}, "invalid_message", "`entryId`"),
    (
        "editStart",
        {"contentType": "posts", "entryID": "1"},
        "invalid_message",
        "did you mean `entryID`?",
    ),
    ("editStart", {"contentType": "*", "entryId": "1"}, "invalid_type", "without *"),
    ("editStart", {"entryId": "1"}, "invalid_message", "`contentType`"),
    ("editStart", {"contentType": "posts", "entryId": ""}, "invalid_message", "1 to 128"),
    ("editStart", {"contentType": "posts", "entryId": 5}, "invalid_message", "the number 5"),
    ("editChange", {**POST, "payload": 1}, "not_editing", "editStart"),
    ("editChange", POST, "invalid_message", "`payload`"),
    ("presence", {"entryId": 5}, "invalid_message", "`entryId`"),
    ("presence", {"contentType": 5}, "invalid_type", "`contentType`"),
]


@pytest.mark.core
@pytest.mark.parametrize(
    ("action", "fields", "code", "hint"), WRONG_FIELDS, ids=message_ids(WRONG_FIELDS)
)
def test_wrong_field(
    server: Server, action: str, fields: dict[str, Any], code: str, hint: str
) -> None:
    """A wrong action or field is an error with a hint. The connection stays open."""
    with server.client() as client:
        client.send(action=action, **fields)
        check_error(client, code, hint, action)


WRONG_TOKENS = {
    "no JWT": ("nonsense", "invalid_token", "JWT"),
    "another key": (token(key="k" * 32), "invalid_token", "key"),
    "expired": (token(expires_in=-5), "token_expired", "fresh"),
    "another algorithm": (token(algorithm="HS384"), "invalid_token", "HS256"),
    "no algorithm": (unsigned_token(), "invalid_token", "HS256"),
    "an audience": (token(aud="elsewhere"), "invalid_token", "aud"),
    "an empty user": (token(user=""), "invalid_token", "JWT"),
    "a boolean user": (token(user=True), "invalid_token", "JWT"),
    "no user": (token(user=None), "invalid_token", "sub"),
    "no exp": (jwt.encode({"sub": "ana"}, KEY), "invalid_token", "exp"),
    "nbf ahead": (token(nbf=time.time() + 900), "invalid_token", "clocks"),
}


@pytest.mark.core
@pytest.mark.parametrize("kind", WRONG_TOKENS)
def test_wrong_token(server: Server, kind: str) -> None:
    """The error says why a token is refused, and never repeats it, because logs keep errors."""
    wrong, code, hint = WRONG_TOKENS[kind]
    with server.client() as client:
        error = client.authenticate(wrong)
        assert error_code(error) == code
        assert hint in error["payload"]["message"]
        assert wrong not in json.dumps(error)
        assert client.subscribe()["recovered"] is True


@pytest.mark.parametrize(("others", "is_suggested"), [(49, True), (50, False)])
def test_suggestion_is_bounded(server: Server, others: int, is_suggested: bool) -> None:
    """Only 50 names are compared: for a message full of near misses difflib would take 100 ms."""
    fields = {f"{number}": 0 for number in range(others)}
    with server.client() as client:
        client.send(**fields, acton="subscribe")
        message = client.receive()["payload"]["message"]
    assert ("did you mean `acton`?" in message) is is_suggested


TOO_BIG = {
    "one frame": Frames.masked(0x1, padded(1001)),
    "binary": Frames.masked(0x2, b"\0" * 1001),
    "fragments": fragments(padded(1001), 90),
    "fragments of a byte": fragments(padded(1001), 1),
    "bytes, not characters": Frames.masked(0x1, padded(1002, "é")),
    "fragments of characters": fragments(padded(1002, "é"), 333),
    "frame without an end": Frames.masked(0x1, b"x" * 5000, length=1 << 40),
    "fragments without an end": Frames.masked(0x1, b"x", fin=False)
    + Frames.masked(0x0, b"x" * 500, fin=False) * 9,
}


@pytest.mark.core
@pytest.mark.parametrize("kind", TOO_BIG)
def test_message_too_big(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """The limit counts bytes, however they are split, also of a message that is never complete.

    The error comes before the close frame. The log names the setting, once for two clients.
    """
    with Server(MAX_MESSAGE=1000, RATE=100_000) as server:
        for _ in range(2):
            with server.client() as client:
                client.sock.sendall(TOO_BIG[kind])
                assert error_code(client.receive()) == "message_too_big"
                closed = client.closing()
                assert (closed.code, "1000 bytes" in (closed.reason or "")) == (1009, True)
        until(lambda: stat(server, "closed_1009") == 2, "the count of both closes")
        assert stat(server, "error_message_too_big") == 2
    assert only_log_line(caplog, "SWIFTCMS_WS_MAX_MESSAGE")


@pytest.mark.core
@pytest.mark.parametrize(
    "data",
    [Frames.masked(0x1, padded(1000)), fragments(padded(1000, "é"), 7)],
    ids=["one frame", "fragments"],
)
def test_message_at_the_limit(data: bytes) -> None:
    """A message of exactly MAX_MESSAGE bytes is handled."""
    config = {"MAX_MESSAGE": 1000, "RATE": 100_000, "HEARTBEAT": NEVER}
    with Server(**config) as server, server.client() as client:
        client.sock.sendall(data)
        assert client.receive(heartbeats=True)["type"] == "system.heartbeat"


def test_message_without_an_end_takes_no_memory(server: Server) -> None:
    """A client that continues its message after the close frame is disconnected."""
    piece = Frames.masked(0x0, b"x" * 60_000, fin=False)
    with open_raw(server.port) as sock:
        before = resident()
        sock.sendall(Frames.masked(0x1, b"x", fin=False))
        with contextlib.suppress(OSError):
            for _ in range(2000):
                sock.sendall(piece)
                assert resident() - before < 25_000_000
    until(lambda: stat(server, "connections") == 0, "the close")


# -- Lists of subscriptions ------------------------------------------------------------------------


@pytest.mark.core
def test_subscriptions_accepted_and_refused() -> None:
    """Each item is decided by itself. Only accepted items use up the limit, in the list's order."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.authorize(lambda user, event_type, content_type: content_type != "secret")

    with Server(configure, MAX_SUBSCRIPTIONS=3) as server, server.client() as client:
        answer = client.ask(
            "subscribe",
            subscriptions=[
                {"type": "content.*"},
                {"type": "content.*", "contentType": "secret"},
                {"type": "con*", "contentType": "posts"},
                {"type": "content.*", "contentType": "*"},
                {},
                {"type": 5, "contentType": "posts"},
                {"contentType": "posts.*"},
                {"type": "a.b", "contentType": "pages"},
                {"type": "content.*", "color": "blue"},
            ],
        )
        assert answer["type"] == "system.subscribed"
        payload = answer["payload"]
        assert payload.keys() == {"subscriptions", "refused", "recovered", "replayed"}
        assert payload["subscriptions"] == pairs(("content.*", "*"), ("*", "*"), ("*", "posts.*"))
        assert (payload["recovered"], payload["replayed"]) == (True, 0)
        refused = payload["refused"]
        assert all(item.keys() == {"type", "contentType", "code", "message"} for item in refused)
        # In the order in which they were decided: by their form first, then by the hook.
        assert [(item["type"], item["contentType"], item["code"]) for item in refused] == [
            ("con*", "posts", "invalid_type"),
            (None, "posts", "invalid_type"),
            ("content.*", "secret", "forbidden"),
            ("a.b", "pages", "too_many_subscriptions"),
        ]
        assert "`type`" in refused[0]["message"]
        assert stat(server, "subscriptions") == 3
        server.publish(1, "a.b")
        assert numbers(client.rest()) == [1]


@pytest.mark.core
def test_subscriptions_resume_with_one_replay(server: Server) -> None:
    """One `since` for all patterns: an event that any of them missed comes once, in id order."""
    kinds = ["content.created", "user.login", "order.paid"]
    start = server.publish(0)
    ids = [server.publish(number, kinds[number % 3]) for number in range(1, 10)]
    overlapping = pairs(("content.*", "*"), ("user.login", "posts"), ("content.created", "*"))
    with server.client() as client:
        payload = client.ask("subscribe", subscriptions=overlapping, since=start)["payload"]
        assert (payload["recovered"], payload["replayed"]) == (True, 6)
        assert payload["refused"] == []
        server.publish(10, "user.login")
        messages = client.rest()
    assert numbers(messages) == [1, 3, 4, 6, 7, 9, 10]
    assert [m["id"] for m in messages[:-1]] == [ids[n - 1] for n in (1, 3, 4, 6, 7, 9)]


def test_subscriptions_of_a_thousand_items() -> None:
    """A list of 1,000 is accepted, and can be removed again in one step."""
    patterns = pairs(*[(f"a.b{number}", "posts") for number in range(1000)])
    with Server(MAX_SUBSCRIPTIONS=1000, MAX_MESSAGE=200_000) as server, server.client() as client:
        answer = client.ask("subscribe", subscriptions=patterns)
        assert len(answer["payload"]["subscriptions"]) == stat(server, "subscriptions") == 1000
        answer = client.ask("unsubscribe", subscriptions=patterns)
        assert answer["payload"]["removed"] == 1000
        assert stat(server, "subscriptions") == 0


MALFORMED_SUBSCRIPTIONS: dict[str, dict[str, Any]] = {
    "empty": {"subscriptions": []},
    "over 1,000": {"subscriptions": [{}] * 1001},
    "null": {"subscriptions": None},
    "a string": {"subscriptions": "content.*"},
    "an object": {"subscriptions": {"type": "content.*"}},
    "item a string": {"subscriptions": [{}, "content.*"]},
    "item null": {"subscriptions": [None]},
    "item a list": {"subscriptions": [["content.*", "posts"]]},
    "type beside it": {"subscriptions": [{}], "type": "content.*"},
    "contentType beside it": {"subscriptions": [{}], "contentType": "posts"},
}


@pytest.mark.parametrize("action", ["subscribe", "unsubscribe"])
@pytest.mark.parametrize("kind", MALFORMED_SUBSCRIPTIONS)
def test_subscriptions_malformed(server: Server, action: str, kind: str) -> None:
    """A list that is malformed as a whole is one error, and no subscription changes."""
    with server.client() as client:
        client.subscribe("user.*")
        error = client.ask(action, **MALFORMED_SUBSCRIPTIONS[kind])
        assert error_code(error) == "invalid_message"
        assert "`subscriptions`" in error["payload"]["message"]
        assert stat(server, "subscriptions") == 1


@pytest.mark.parametrize("since", ["yesterday", 5, None, "-1-0", [], ""], ids=repr)
def test_subscriptions_with_malformed_since(server: Server, since: Any) -> None:
    """A malformed `since` refuses the whole message: a client must not miss events silently."""
    with server.client() as client:
        answer = client.ask("subscribe", subscriptions=pairs(("content.*", "*")), since=since)
        assert error_code(answer) == "invalid_since"
        assert stat(server, "subscriptions") == 0


def test_unsubscribe_with_a_list(server: Server) -> None:
    """A list removes existing pairs, counts each once, and fills in the defaults."""
    with server.client() as client:
        client.ask("subscribe", subscriptions=pairs(("a.b", "*"), ("a.c", "posts"), ("*", "posts")))
        answer = client.ask(
            "unsubscribe", subscriptions=[{"type": "a.b"}, {"type": "a.b"}, *pairs(("a.z", "*"))]
        )
        assert answer["type"] == "system.unsubscribed"
        assert answer["payload"] == {
            "subscriptions": pairs(("a.b", "*"), ("a.z", "*")),
            "removed": 1,
        }
        assert stat(server, "subscriptions") == 2
        server.publish(1, "a.b")
        server.hub.publish("a.b", "pages", {"n": 2})
        assert numbers(client.rest()) == [1]


def test_unsubscribe_with_a_malformed_item(server: Server) -> None:
    """If one item is malformed, no subscription is removed."""
    with server.client() as client:
        client.ask("subscribe", subscriptions=pairs(("a.b", "*"), ("a.c", "*")))
        answer = client.ask("unsubscribe", subscriptions=pairs(("a.b", "*"), ("con*", "*")))
        assert error_code(answer) == "invalid_type"
        assert stat(server, "subscriptions") == 2


# -- Authentication and authorization --------------------------------------------------------------


@pytest.mark.parametrize("action", sorted(swiftcms_ws.actions().keys() - {"authenticate"}))
def test_auth_required(action: str) -> None:
    """With AUTH = "required", a client can do nothing but authenticate, and learns nothing."""
    fields = {**POST, "type": "*", "payload": 1, "since": "1-0", "token": token()}
    with Server(AUTH="required") as server, server.client() as client, server.client() as ana:
        ana.authenticate(token())
        ana.ask("editStart", **POST)
        for wrong in ("x", token(expires_in=-1), token(key="k" * 64)):
            assert client.authenticate(wrong)["type"] == "system.error"
        error = client.ask(action, **fields)
        assert error_code(error) == "auth_required"
        assert "ana" not in json.dumps(error)
        assert [editor["userId"] for editor in server.hub.editors("posts", 42)] == ["ana"]
        server.publish(1)
        server.publish(2, to="ana")
        assert server.hub.flush()
        assert numbers(client.rest()) == []
        client.authenticate(token("bob"))
        # It may ask for public events from before it signed in, and not for those of others.
        assert client.subscribe(since=client.hello["payload"]["lastId"])["replayed"] == 1
        assert numbers(client.rest()) == [1]


@pytest.mark.core
def test_authorize_arguments() -> None:
    """The hook gets the user and each pattern as it was sent, in a request context."""
    asked: list[tuple[Any, ...]] = []

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: swiftcms_ws.User | None, event_type: str, content_type: str) -> bool:
            role = user and user.claims.get("role")
            asked.append((user and user.id, role, event_type, content_type, request.path))
            return content_type == "posts" or role == "editor"

    with Server(configure) as server, server.client() as client:
        client.subscribe("content.*", "posts")
        refused = client.ask("subscribe", type="content.*")
        assert error_code(refused) == "forbidden"
        assert "content.*" in refused["payload"]["message"]
        assert error_code(client.ask("editStart", contentType="pages", entryId="1")) == "forbidden"
        assert error_code(client.ask("presence")) == "forbidden"
        client.authenticate(server.hub.issue_token("ana", role="editor"))
        client.subscribe("content.*")
    assert asked == [
        (None, None, "content.*", "posts", "/ws"),
        (None, None, "content.*", "*", "/ws"),
        (None, None, "user.editing", "pages", "/ws"),
        (None, None, "user.editing", "*", "/ws"),
        ("ana", "editor", "content.*", "*", "/ws"),
    ]


@pytest.mark.parametrize(
    ("event_type", "content_type"),
    [
        ("*", "*"),
        ("*", "posts"),
        ("content.*", "posts"),
        ("content.published", "*"),
        ("content.published", "drafts"),
        ("content.published", "Posts"),
        # The third letter is Cyrillic.
        ("content.published", "po\u0455ts"),
        ("content.published.*", "posts"),
        ("content.updated", "posts"),
    ],
)
def test_authorize_refused_pattern(event_type: str, content_type: str) -> None:
    """A wider pattern, or one that looks the same, brings no event: neither live nor replayed."""
    with (
        Server(allow({("content.published", "posts")})) as server,
        server.client() as client,
    ):
        since = client.hello["payload"]["lastId"]
        server.publish(1, "content.published")
        server.publish(2, "content.updated")
        server.hub.publish("content.published", "drafts", {"n": 3})
        fields = {"type": event_type, "contentType": content_type, "to": "ana", "user": "ana"}
        assert error_code(client.ask("subscribe", **fields)) == "forbidden"
        assert error_code(client.ask("subscribe", **fields, since=since)) == "forbidden"
        assert client.subscribe("content.published", "posts", since=since)["replayed"] == 1
        server.publish(4, "content.updated")
        server.publish(5, "content.published")
        assert numbers(client.rest()) == [1, 5]


def test_authorize_refuses_what_it_allowed_before() -> None:
    """A subscription that was accepted stays, and is not accepted again."""
    allowed = {("content.*", "posts")}
    with Server(allow(allowed)) as server, server.client() as client:
        client.subscribe("content.*", "posts")
        allowed.clear()
        again = client.ask("subscribe", type="content.*", contentType="posts")
        assert error_code(again) == "forbidden"
        server.publish(1)
        assert numbers(client.rest()) == [1]


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("editStart", POST),
        ("editStop", POST),
        ("editChange", {**POST, "payload": 1}),
        ("presence", POST),
        ("presence", {}),
        ("presence", {"entryId": "42"}),
        ("presence", {"contentType": "*"}),
    ],
    ids=repr,
)
def test_authorize_refused_editing(action: str, fields: dict[str, Any]) -> None:
    """A client without `user.editing` learns nothing of editors, and does not disturb them."""
    allowed = {("user.editing", "posts")}
    with Server(allow(allowed)) as server, server.client() as client, server.client() as editor:
        editor.ask("editStart", **POST)
        allowed.clear()
        error = client.ask(action, **fields)
        assert error_code(error) == "forbidden"
        assert editor.hello["payload"]["clientId"] not in json.dumps(error)
        assert len(server.hub.editors("posts", 42)) == 1
        editor.nothing_more()


def test_authorize_context_of_one_message() -> None:
    """The patterns of a message share a request context, so a look-up in `g` is made once."""
    lookups: list[list[str]] = []
    teardowns: list[str] = []

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            if "asked" not in g:
                g.asked = []
                lookups.append(g.asked)
            g.asked.append(event_type)
            return True

        @app.teardown_appcontext
        def note(error: BaseException | None) -> None:
            if "asked" in g:
                teardowns.append(f"{len(g.asked)} {error}")

    with Server(configure) as server, server.client() as client:
        client.ask("subscribe", subscriptions=pairs(("a.b", "*"), ("a.c", "*"), ("a.d", "*")))
        client.ask("subscribe", subscriptions=pairs(("a.e", "*"), ("a.f", "*")))
        client.subscribe("a.g")
    assert lookups == [["a.b", "a.c", "a.d"], ["a.e", "a.f"], ["a.g"]]
    assert teardowns == ["3 None", "2 None", "1 None"]


# -- Hooks that are slow or fail -------------------------------------------------------------------


@pytest.mark.core
def test_slow_hook_beside_other_clients(slow_hook: SlowHook) -> None:
    """While a hook runs, other clients get events, heartbeats, pongs and answers of the hook.

    The client that waits for the hook is not read. It is not closed for its silence.
    """
    with (
        Server(slow_hook, HEARTBEAT=0.3) as server,
        server.client() as waiting,
        server.client() as other,
        open_raw(server.port) as pinging,
    ):
        other.subscribe("content.*")
        waiting.send(action="subscribe", type="slow", ref="slow")
        assert slow_hook.was_asked.wait(PATIENCE)
        for number in range(4):
            server.publish(number)
            assert other.receive()["payload"] == {"n": number}
            pinging.sendall(Frames.masked(0x9, b"!"))
            read_to(pinging, b"\x8a\x01!")
            assert other.ask("presence")["type"] == "system.presence"
            receive_heartbeat(other)
        slow_hook.gate.set()
        answer = waiting.receive()
        assert (answer["type"], answer["ref"]) == ("system.subscribed", "slow")


@pytest.mark.parametrize("is_one_write", [True, False], ids=["one write", "twenty writes"])
def test_slow_hook_order_of_answers(slow_hook: SlowHook, is_one_write: bool) -> None:
    """Nineteen messages that need no slow hook wait for the first one, which does."""
    others: list[dict[str, Any]] = [
        {"action": "heartbeat"},
        {"action": "subscribe", "type": "a.b"},
        {"action": "unsubscribe", "type": "a.b"},
        {"action": "authenticate", "token": token()},
        {"action": "presence"},
        {"action": "fly"},
    ]
    first = {"action": "subscribe", "type": "slow"}
    messages = [first, *itertools.islice(itertools.cycle(others), 19)]
    frames = [text(**message, ref=ref) for ref, message in enumerate(messages)]
    with (
        Server(slow_hook, RATE=1000, HEARTBEAT=NEVER) as server,
        server.client() as client,
        server.client() as other,
    ):
        for data in [b"".join(frames)] if is_one_write else frames:
            client.sock.sendall(data)
        assert slow_hook.was_asked.wait(PATIENCE)
        other.subscribe()
        assert not is_readable(client.sock)
        slow_hook.gate.set()
        answers = receive_answers(client, 20)
    assert [answer["ref"] for answer in answers] == list(range(20))


def test_slow_hook_behind_a_replay(slow_hook: SlowHook) -> None:
    """A message must not overtake one whose hook runs, although a replay was sent meanwhile.

    An unsubscribe that was handled before its subscribe removed nothing, and events kept coming.
    """
    with (
        Server(slow_hook, HEARTBEAT=NEVER) as server,
        server.client() as client,
        server.client() as other,
    ):
        start = client.hello["payload"]["lastId"]
        for number in range(100):
            server.publish(number, text="x" * 1000)
        assert server.hub.flush()
        client.sock.sendall(
            text(action="subscribe", type="content.*", since=start, ref="replay")
            + text(action="subscribe", type="slow", ref="slow")
            + text(action="unsubscribe", type="slow", ref="unsubscribe")
        )
        assert client.receive()["ref"] == "replay"
        assert numbers(client.receive_many(100)) == list(range(100))
        assert slow_hook.was_asked.wait(PATIENCE)
        # The loop has rounds in which it could answer the last message too early.
        for _ in range(3):
            other.ask("heartbeat")
        slow_hook.gate.set()
        assert client.receive()["ref"] == "slow"
        answer = client.receive()
        assert (answer["ref"], answer["payload"]["removed"]) == ("unsubscribe", 1)
        server.publish(kind="slow")
        client.nothing_more()


def test_slow_hook_pauses_reading(slow_hook: SlowHook) -> None:
    """While a hook runs, the client's data stays in the socket buffers, not in memory."""
    with (
        Server(slow_hook) as server,
        server.client() as other,
        open_raw(server.port) as flooding,
    ):
        flooding.sendall(text(action="subscribe", type="slow"))
        assert slow_hook.was_asked.wait(PATIENCE)
        before = resident()
        block = text(action="heartbeat", ref="flood") * 2000
        assert push_until_full(flooding, block) < 30_000_000, "the server reads everything"
        assert resident() - before < 15_000_000
        other.subscribe()
        server.publish(1)
        assert other.receive()["payload"] == {"n": 1}
        slow_hook.gate.set()
        flooding.settimeout(PATIENCE)
        data = read_to(flooding, b'"system.subscribed"')
        assert b'"flood"' not in data.partition(b'"system.subscribed"')[0]
        read_to(flooding, b'"ref": "flood"')


def test_slow_hook_of_a_client_that_vanishes(
    slow_hook: SlowHook, caplog: pytest.LogCaptureFixture
) -> None:
    """If the client is gone when its hook returns, the answer is dropped without a traceback."""
    with Server(slow_hook) as server, server.client() as other:
        client = server.client()
        client.send(action="subscribe", type="slow")
        assert slow_hook.was_asked.wait(PATIENCE)
        client.reset()
        slow_hook.gate.set()
        until(lambda: stat(server, "connections") == 1, "the end of the connection")
        other.subscribe("content.*")
        assert stat(server, "subscriptions") == 1
    assert log_lines(caplog, logger="", level=logging.ERROR) == []
    assert "Traceback" not in caplog.text


def test_slow_hook_is_not_asked_for_clients_that_have_left() -> None:
    """If the hook is slow, clients that have left must not delay those that are there."""
    asked: list[str] = []
    gate = threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            asked.append(event_type)
            return event_type != "slow" or gate.wait(PATIENCE)

    with Server(configure, HEARTBEAT=NEVER) as server, contextlib.ExitStack() as stack:
        workers = engine_of(server).workers
        for _ in range(workers.COUNT):
            client = stack.enter_context(server.client())
            client.send(action="subscribe", type="slow")
        until(lambda: len(asked) == workers.COUNT, "a hook in each worker")
        for number in range(1, 11):
            sock = open_raw(server.port)
            sock.sendall(text(action="subscribe", type="gone"))
            until(lambda n=number: workers.unfinished == workers.COUNT + n, "the queued message")
            reset(sock)
        with server.client() as present:
            present.send(action="subscribe", type="here")
            gate.set()
            assert present.receive()["type"] == "system.subscribed"
            until(lambda: stat(server, "connections") == workers.COUNT + 1, "the closes")
    assert "gone" not in asked


@pytest.mark.core
@pytest.mark.parametrize("failure", [ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("action", ["subscribe", "editStart"])
def test_hook_that_fails(
    caplog: pytest.LogCaptureFixture, failure: type[BaseException], action: str
) -> None:
    """A hook that raises or exits is logged, and closes its client with 1011 and no other one.

    More clients fail here than there are workers, so no worker may exit.
    """

    def configure(app: Flask, hub: Hub) -> None:
        @hub.authorize
        def authorize(user: object, event_type: str, content_type: str) -> bool:
            if content_type == "broken":
                raise failure("on purpose")
            return True

    messages: dict[str, dict[str, Any]] = {
        "subscribe": {"subscriptions": pairs(("a.b", "*"), ("a.b", "broken"))},
        "editStart": {"contentType": "broken", "entryId": "1"},
    }
    with Server(configure) as server, server.client() as other:
        other.subscribe("content.*")
        for _ in range(6):
            with server.client() as client:
                client.ask("editStart", **POST)
                client.send(action=action, **messages[action])
                assert client.closing().code == 1011
        other.subscribe("user.*")
        server.publish(1)
        assert numbers(other.rest()) == [1]
        until(lambda: stat(server, "closed_1011") == 6, "the count of all closes")
        until(lambda: stat(server, "connections") == 1, "the end of all others")
        until(lambda: not server.hub.editors("posts", "42"), "the end of their editing")
        assert stat(server, "subscriptions") == 2
    assert f"{failure.__name__}: on purpose" in caplog.text
    assert "in authorize" in caplog.text


def test_worker_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system could not start a thread, the next task starts the workers.

    Otherwise no hook was ever run again, and clients waited for their answers for ever.
    """
    has_failed, may_start = threading.Event(), threading.Event()
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if "swiftcms-ws worker" in thread.name and not may_start.is_set():
            has_failed.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with (
        Server(allow({("one", "*"), ("two", "*")}), HEARTBEAT=NEVER) as server,
        server.client() as one,
        server.client() as two,
    ):
        one.send(action="subscribe", type="one")
        assert has_failed.wait(PATIENCE)
        may_start.set()
        two.send(action="subscribe", type="two")
        assert one.receive()["payload"]["type"] == "one"
        assert two.receive()["payload"]["type"] == "two"


def test_log_handler_that_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site may publish each log record, from any thread, to show its log in a live page.

    The record that a closed hub logs about publishing itself does not publish for ever.
    """
    published: list[str] = []

    class Publishing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            server.hub.publish("log.line", "site", {})
            published.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger("swiftcms_ws"), "handlers", [Publishing()])
    with Server(MAX_MESSAGE=1000) as server, server.client() as client:
        client.subscribe("log.*")
        # The web server's thread logs this.
        assert server.handshake(Origin="https://elsewhere.example")[0] == 403
        assert client.receive()["type"] == "log.line"
        # The loop's thread logs this.
        with server.client() as other:
            other.send(action="heartbeat", padding="x" * 1000)
            assert other.closing().code == 1009
        assert client.receive()["type"] == "log.line"
        client.close()
        server.hub.close()
        server.publish(1)
    until(lambda: len(published) == 3, "all records")


def test_log_filter_with_wrong_arguments(server: Server) -> None:
    """A wrong argument for the server's logger is reported by logging, not raised in the caller."""
    server.hub.last_id()
    werkzeug_logger = logging.getLogger("werkzeug")
    record = werkzeug_logger.makeRecord("werkzeug", logging.INFO, "f", 1, "%d", ("x",), None)
    assert werkzeug_logger.filter(record)


# -- Turns, and the rate limit ---------------------------------------------------------------------


def test_answer_after_events_published_before_its_message() -> None:
    """If a site publishes, and then its page asks something, the event comes before the answer."""
    with Server(RATE=100_000, HEARTBEAT=NEVER) as server, server.client() as client:
        client.subscribe()
        order: list[str] = []
        for number in range(300):
            server.publish(number)
            client.send(action="heartbeat", ref=number)
            order += [client.receive(heartbeats=True)["type"] for _ in range(2)]
    assert order == ["content.created", "system.heartbeat"] * 300


def test_turn_of_a_client_beside_another_client() -> None:
    """One client's messages are handled for a few milliseconds, and then another client's.

    The timestamps of the answers show the order in which they were made.
    """
    with (
        Server(HEARTBEAT=NEVER, HISTORY=2000, RATE=10**9) as server,
        server.client() as greedy,
        server.client() as other,
    ):
        start = greedy.hello["payload"]["lastId"]
        server.hub.publish_many(
            [("content.updated", f"posts.n{number}", {}) for number in range(2000)]
        )
        assert server.hub.flush()
        message = text(action="subscribe", type="none", contentType="none", since=start)
        with held_loop(server):
            greedy.sock.sendall(message * 30)
            other.sock.sendall(text(action="heartbeat"))
        answer = other.receive(heartbeats=True)
        last = greedy.receive_many(30)[-1]
    assert answer["timestamp"] < last["timestamp"]


def test_rate_within_limit() -> None:
    """A bucket fills up again: two bursts with a pause between them are not slowed down."""
    with Server(RATE=400) as server, server.client() as client:
        # The bucket holds 800, so these 950 messages are within the limit only after a pause.
        client.sock.sendall(text(action="heartbeat", ref=1) * 750)
        receive_answers(client, 750)
        answered = time.monotonic()
        until(lambda: time.monotonic() > answered + 0.5, "200 new tokens")
        client.sock.sendall(text(action="heartbeat", ref=2) * 200)
        receive_answers(client, 200)
        assert (stat(server, "errors"), stat(server, "throttled")) == (0, 0)


def test_rate_exceeded(caplog: pytest.LogCaptureFixture) -> None:
    """All messages are answered in order: 200 at once, and the other 100 at the rate.

    The log names the client once. Events reach another client as fast as before.
    """
    delays: list[float] = []
    with Server(RATE=100) as server, server.client() as fast, server.client() as neighbour:
        neighbour.subscribe()
        is_done = threading.Event()

        def flood() -> None:
            try:
                began = time.monotonic()
                # Two megabytes: more than the server reads at once.
                frames = [text(action="heartbeat", ref=n, pad="x" * 7000) for n in range(300)]
                with running([lambda: fast.sock.sendall(b"".join(frames))]):
                    answers = receive_answers(fast, 300)
                assert [answer["ref"] for answer in answers] == list(range(300))
                assert 0.8 < time.monotonic() - began < 3 * SLOWNESS
            finally:
                is_done.set()

        with running([flood]):
            while not is_done.wait(0.01):
                sent = time.monotonic()
                event_id = server.publish(1)
                assert neighbour.receive()["id"] == event_id
                delays.append(time.monotonic() - sent)
        assert stat(server, "throttled") > 0
        assert stat(server, "errors") == 0
        assert fast.ask("heartbeat")["type"] == "system.heartbeat"
        assert only_log_line(caplog, "SWIFTCMS_WS_RATE")
        assert fast.hello["payload"]["clientId"] in log_lines(caplog)[0]
    assert statistics.median(delays) < 0.05


def test_rate_exceeded_for_longer_than_two_heartbeats() -> None:
    """A client that is not read cannot be heard, so it is not closed for its silence."""
    with (
        Server(RATE=10, HEARTBEAT=0.2) as server,
        server.client() as slowed,
        server.client() as neighbour,
    ):
        # Thirty messages' worth: ten more than the bucket, so it is not read for 1.1 seconds.
        slowed.sock.sendall(text(action="authenticate", token=token()) * 3)
        slowed.sock.sendall(text(action="heartbeat", ref="after"))
        for _ in range(5):
            receive_heartbeat(neighbour)
        assert receive_answers(slowed, 1)[0]["ref"] == "after"
        assert stat(server, "throttled") >= 1
        assert stat(server, "connections") == 2


# The cost of messages, in tokens of the bucket.
COSTS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "heartbeats": (50, [{"action": "heartbeat"}] * 50),
    "tokens": (50, [{"action": "authenticate", "token": "x"}] * 5),
    "lists of subscriptions": (51, [{"action": "subscribe", "subscriptions": [{}] * 500}]),
    "messages of 60 KiB": (56, [{"action": "heartbeat", "padding": "x" * 60 * 1024}] * 7),
    "replays": (66, [{"action": "subscribe", "since": True}, {"action": "unsubscribe"}] * 3),
}


@pytest.mark.parametrize("is_throttled", [False, True], ids=["below the limit", "over the limit"])
@pytest.mark.parametrize("kind", COSTS)
def test_rate_and_cost(kind: str, is_throttled: bool) -> None:
    """A message that is as much work as several counts as several."""
    cost, messages = COSTS[kind]
    # The bucket holds twice the rate. While the messages are handled, it gains a little.
    rate = cost * (0.3 if is_throttled else 0.55)
    with Server(RATE=rate, HISTORY=100) as server, server.client() as client:
        since = client.hello["payload"]["lastId"]
        server.hub.publish_many([("content.created", "posts", {})] * 100)
        assert server.hub.flush()
        for message in messages:
            more = {"since": since} if "since" in message else {}
            client.sock.sendall(text(**message | more))
        if is_throttled:
            until(lambda: stat(server, "throttled") == 1, "the pause")
        else:
            client.sock.sendall(text(action="heartbeat", ref="last"))
            assert receive_answers(client, 1)[0]["ref"] == "last"
            assert stat(server, "throttled") == 0


FLOODING_FRAMES: dict[str, tuple[bytes, bytes]] = {
    "pings": (b"", Frames.masked(0x9, b"p" * 10)),
    "pongs": (b"", Frames.masked(0xA)),
    "tiny fragments": (Frames.masked(0x1, b"{", fin=False), Frames.masked(0x0, b" ", fin=False)),
    "empty fragments": (Frames.masked(0x1, b"{", fin=False), Frames.masked(0x0, fin=False)),
    "no JSON": (b"", Frames.masked(0x1, b"{")),
    "long messages": (b"", text(action="pong", padding="x" * 60_000)),
}


@pytest.mark.parametrize("kind", FLOODING_FRAMES)
def test_rate_and_flood_of_frames(kind: str) -> None:
    """Frames that are as much work as a message count as one: their sender is read slowly.

    No connection is closed, and another client receives its event at once.
    """
    first, frame = FLOODING_FRAMES[kind]
    with (
        Server(RATE=20) as server,
        open_raw(server.port) as sock,
        server.client() as neighbour,
    ):
        neighbour.subscribe()
        sock.sendall(first)
        block = frame * (60_000 // len(frame) or 1)
        assert push_until_full(sock, block) < 40_000_000, "the server reads everything"
        until(lambda: stat(server, "throttled") >= 1, "the pause")
        began = time.monotonic()
        server.publish(1)
        assert neighbour.receive()["payload"] == {"n": 1}
        assert time.monotonic() - began < 0.5 * SLOWNESS
        assert stat(server, "connections") == 2
        assert stat(server, "closed_1013") == 0


# == 11. Heartbeat =================================================================================


def test_heartbeat_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """All clients get both kinds of heartbeat. Those that send nothing are closed with 4408.

    A client that sends a frame byte by byte is alive. The log names the setting once.
    """
    with Server(HEARTBEAT=0.3) as server, contextlib.ExitStack() as stack:
        answering, silent = (stack.enter_context(server.client()) for _ in range(2))
        vanished = [stack.enter_context(open_raw(server.port)) for _ in range(5)]
        dripping = stack.enter_context(open_raw(server.port))
        assert answering.hello["payload"]["heartbeat"] == 0.3
        until(lambda: stat(server, "connections") == 8, "all connections")
        drip = itertools.cycle(Frames.masked(0xA))

        def are_closed() -> bool:
            # It answers the ping that comes with the heartbeat.
            receive_heartbeat(answering)
            dripping.sendall(bytes([next(drip)]))
            return stat(server, "closed_4408") == 6

        until(are_closed, "the close of all silent clients")
        assert answering.pings >= 2
        assert silent.closing().code == 4408
        for sock in vanished:
            read_to(sock, struct.pack("!H", 4408) + b"nothing received")
            sock.close()
        assert stat(server, "connections") == 2
        answering.nothing_more()
    assert only_log_line(caplog, "SWIFTCMS_WS_HEARTBEAT")


@pytest.mark.core
def test_heartbeat_last_id(server: Server) -> None:
    """The greeting and a heartbeat have the newest event's id, so an idle client can resume."""
    with server.client() as client:
        last_id = client.hello["payload"]["lastId"]
        assert client.ask("heartbeat")["payload"] == {"lastId": last_id, "spread": 0}
        event_id = server.publish(1)
        assert server.hub.flush()
        assert client.ask("heartbeat")["payload"]["lastId"] == event_id
        with server.client() as later:
            assert later.hello["payload"]["lastId"] == event_id


def test_heartbeat_last_id_beside_events() -> None:
    """Every event up to `lastId` has been sent before the heartbeat, and none of them after it.

    So a client may resume from there, also one that has received no event for a long time.
    """
    stop = threading.Event()
    with Server(HEARTBEAT=0.3) as server, server.client() as client:
        client.subscribe()
        with running([lambda: publish_steadily(server.publish, stop) and None]):
            try:
                beats: list[tuple[int, ...]] = []
                seen = position(client.hello["payload"]["lastId"])
                deadline = time.monotonic() + PATIENCE
                while len(beats) < 3:
                    assert time.monotonic() < deadline, "no heartbeats were received"
                    message = client.receive(heartbeats=True)
                    if message["type"] == "system.heartbeat":
                        beats.append(position(message["payload"]["lastId"]))
                        assert beats[-1] >= seen
                    else:
                        seen = position(message["id"])
                        assert seen > max(beats, default=(0, 0))
            finally:
                stop.set()
        assert len(set(beats)) == 3
        with server.client() as idle:
            newest = server.publish(-1)
            until(
                lambda: receive_heartbeat(idle)["payload"]["lastId"] == newest,
                "a heartbeat with the newest id",
            )
            server.publish(-2)
            payload = idle.subscribe(since=newest)
            assert (payload["recovered"], payload["replayed"]) == (True, 1)


def test_heartbeats_are_spread_over_the_interval() -> None:
    """Forty clients that connect together do not get their heartbeats all at once."""
    with Server(HEARTBEAT=1) as server, contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(40):
            sock = stack.enter_context(open_raw(server.port))
            selector.register(sock, selectors.EVENT_READ, bytearray())
        arrivals: dict[int, float] = {}
        began = time.monotonic()
        while len(arrivals) < 40:
            assert time.monotonic() < began + PATIENCE, "some clients got no heartbeat"
            for key, _ in selector.select(1):
                key.data.extend(key.fileobj.recv(65536))  # type: ignore[union-attr]
                if b'"system.heartbeat"' in key.data:
                    arrivals.setdefault(key.fd, time.monotonic() - began)
    times = sorted(arrivals.values())
    assert times[-1] - times[0] > 0.3, times
    assert times[-1] < 1 + 0.6 * SLOWNESS, times
    busiest = max(sum(1 for each in times if at <= each < at + 0.1) for at in times)
    assert busiest <= 20, times


def test_heartbeat_after_the_process_was_suspended() -> None:
    """Clients had no heartbeat to answer meanwhile, so they are not closed for their silence."""
    with Server(HEARTBEAT=0.5) as server, server.client() as client:
        receive_heartbeat(client)
        client.ask("heartbeat")
        with held_loop(server):
            # Silence is checked after 1 to 1.5 seconds.
            suspended = time.monotonic()
            until(lambda: time.monotonic() > suspended + 1.51, "the end of the suspension")
        for _ in range(3):
            receive_heartbeat(client)
        assert stat(server, "closed_4408") == 0


# == 12. Editing ===================================================================================


# -- Editors and conflicts -------------------------------------------------------------------------


@pytest.mark.core
def test_editing_two_editors() -> None:
    """Subscribers see the editors of an entry, and a conflict while there are two of them.

    A client that vanishes stops editing. These messages are not kept in the history.
    """
    with Server() as server, contextlib.ExitStack() as stack:
        ana, bob, reader = (stack.enter_context(server.client()) for _ in range(3))
        ana.authenticate(token("ana"))
        bob.authenticate(token("bob"))
        for client in (ana, bob, reader):
            client.subscribe("user.*", "posts")
        answer = ana.ask("editStart", **POST)
        assert (answer["type"], answer["contentType"]) == ("system.editing", "posts")
        assert answer["payload"].keys() == {"entryId", "editors", "conflict"}
        assert answer["payload"]["editors"][0].keys() == {"clientId", "userId", "since"}
        assert (names(answer), answer["payload"]["conflict"]) == (["ana"], False)
        assert bob.ask("editStart", **POST)["payload"]["conflict"] is True
        assert [editor["userId"] for editor in server.hub.editors("posts", 42)] == ["ana", "bob"]
        for client in (ana, bob, reader):
            first, second = client.receive_many(2)
            assert first["payload"].keys() == {"entryId", "editor", "editors", "conflict"}
            assert editing_of(first) == ("user.editing", "ana", ["ana"], False)
            assert editing_of(second) == ("user.editing", "bob", ["ana", "bob"], True)
            assert "id" not in second
        assert ana.ask("editStart", **POST)["payload"]["conflict"] is True
        ana.reset()
        for client in (bob, reader):
            assert editing_of(client.receive()) == ("user.stoppedEditing", "ana", ["bob"], False)
        assert names(bob.ask("editStop", **POST)) == []
        assert editing_of(reader.receive()) == ("user.stoppedEditing", "bob", [], False)
        reader.nothing_more()
        with server.client() as late:
            assert late.subscribe(since=late.hello["payload"]["lastId"])["replayed"] == 0
            late.nothing_more()


@pytest.mark.core
def test_editing_changes() -> None:
    """Changes reach the entry's other editors in order, subscribed or not, and no other client."""
    with Server(RATE=10_000) as server, contextlib.ExitStack() as stack:
        ana, bob, eve, reader = (stack.enter_context(server.client()) for _ in range(4))
        reader.subscribe()
        for client in (ana, bob):
            client.ask("editStart", **POST)
        eve.ask("editStart", contentType="posts", entryId="43")
        reader.rest()
        for number in range(300):
            ana.send(action="editChange", payload={"n": number, "any": [None, "☃"]}, **POST)
        messages = bob.receive_many(300)
        assert [message["payload"]["change"]["n"] for message in messages] == list(range(300))
        assert (messages[0]["type"], messages[0]["contentType"]) == ("user.edited", "posts")
        assert messages[0]["payload"].keys() == {"entryId", "editor", "change"}
        assert messages[0]["payload"]["editor"]["clientId"] == ana.hello["payload"]["clientId"]
        for client in (ana, eve, reader):
            client.nothing_more()


def test_editing_in_every_order() -> None:
    """In every order in which three clients start and stop, each message is true.

    They stop by a message, by closing, and by vanishing.
    """
    starts_and_stops = [0, 0, 1, 1, 2, 2]
    orders = sorted(set(itertools.permutations(starts_and_stops)))
    assert len(orders) == 90
    with Server(RATE=10_000) as server, server.client() as watcher:
        watcher.subscribe("user.*", "posts")
        for number, order in enumerate(orders):
            entry = {"contentType": "posts", "entryId": str(number)}
            clients = [server.client() for _ in range(3)]
            editing: set[int] = set()
            for step, index in enumerate(order):
                client = clients[index]
                if index not in editing:
                    editing.add(index)
                    answer = client.ask("editStart", **entry)
                    assert answer["payload"]["conflict"] == (len(editing) > 1)
                else:
                    editing.discard(index)
                    match (number + step) % 3:
                        case 0:
                            client.ask("editStop", **entry)
                        case 1:
                            client.close()
                        case 2:
                            client.reset()
                payload = watcher.receive()["payload"]
                count = len(payload["editors"])
                assert (count, payload["conflict"]) == (len(editing), len(editing) > 1)
            for client in clients:
                client.sock.close()
        assert watcher.ask("presence")["payload"]["entries"] == []


def test_editing_from_many_threads() -> None:
    """Clients that start, stop and leave at the same moment leave no editor behind."""
    with Server(RATE=10_000, MAX_QUEUE=50_000_000) as server, server.client() as watcher:
        watcher.subscribe("user.*", "posts")

        def come_and_go(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(6):
                with server.client() as client:
                    for _ in range(chance.randrange(1, 6)):
                        client.send(action=chance.choice(["editStart", "editStop"]), **POST)
                    if chance.random() < 0.5:
                        client.rest()
                    chance.choice([client.reset, client.close, lambda: None])()

        run_all([lambda seed=seed: come_and_go(seed) for seed in range(12)])
        until(lambda: stat(server, "connections") == 1, "the end of all connections")
        until(lambda: not server.hub.editors("posts", "42"), "the end of all editing")
        messages = watcher.rest()
        for message in messages:
            assert message["payload"]["conflict"] == (len(message["payload"]["editors"]) > 1)
        assert messages[-1]["payload"]["editors"] == []


# -- Limits ----------------------------------------------------------------------------------------


def test_editing_with_fifty_editors() -> None:
    """The 51st editor is refused. An editor may start again, and one that stops makes room."""
    with Server() as server, contextlib.ExitStack() as stack:
        *editors, late = (stack.enter_context(server.client()) for _ in range(51))
        for client in editors:
            assert client.ask("editStart", **POST)["type"] == "system.editing"
        assert error_code(late.ask("editStart", **POST)) == "too_many_editors"
        assert error_code(late.ask("editChange", **POST, payload=1)) == "not_editing"
        assert len(names(editors[0].ask("editStart", **POST))) == 50
        assert error_code(late.ask("editStart", contentType="posts", entryId="43")) is None
        editors[7].ask("editStop", **POST)
        assert len(names(late.ask("editStart", **POST))) == 50
        assert len(server.hub.editors("posts", "42")) == 50


def test_editing_with_large_changes() -> None:
    """An editor that sends large changes is slowed down before they fill another one's queue."""
    with (
        Server() as server,
        server.client() as pushing,
        server.client(receive_buffer=65536) as slow,
    ):
        for client in (slow, pushing):
            client.ask("editStart", **POST)
        change = text(action="editChange", **POST, payload="x" * 65_000)
        with running([lambda: pushing.sock.sendall(change * 20)]):
            until(lambda: stat(server, "throttled") > 0, "slowing down")
            assert slow.ask("heartbeat")["type"] == "system.heartbeat"
        types = {message["type"] for message in slow.messages}
        assert types <= {"user.edited", "user.stoppedEditing"}
        assert stat(server, "slow_clients") == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [("pages", "1"), ("posts", "1"), ("posts", "2")]),
        ({"contentType": "posts"}, [("posts", "1"), ("posts", "2")]),
        ({"entryId": "1"}, [("pages", "1"), ("posts", "1")]),
        ({"contentType": "posts", "entryId": "2"}, [("posts", "2")]),
        ({"contentType": "posts", "entryId": "3"}, []),
        ({"contentType": "news"}, []),
    ],
    ids=repr,
)
def test_presence_filters(
    server: Server, fields: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    """`contentType` and `entryId` narrow the answer, each alone and both together."""
    with server.client() as editor, server.client() as client:
        for content_type, entry_id in (("posts", "1"), ("posts", "2"), ("pages", "1")):
            editor.ask("editStart", contentType=content_type, entryId=entry_id)
        payload = client.ask("presence", **fields)["payload"]
        assert payload["more"] is False
        found = [(entry["contentType"], entry["entryId"]) for entry in payload["entries"]]
        assert sorted(found) == expected
        assert all(len(entry["editors"]) == 1 for entry in payload["entries"])


def test_presence_has_at_most_200_entries() -> None:
    """If more entries are edited, the answer has 200 of them and says that there are more."""
    with Server(MAX_SUBSCRIPTIONS=300, RATE=10_000) as server, server.client() as client:
        for number in range(201):
            client.send(action="editStart", contentType="posts", entryId=str(number))
        client.receive_many(201)
        payload = client.ask("presence")["payload"]
        assert (len(payload["entries"]), payload["more"]) == (200, True)
        client.ask("editStop", contentType="posts", entryId="0")
        payload = client.ask("presence", contentType="posts")["payload"]
        assert (len(payload["entries"]), payload["more"]) == (200, False)


def test_presence_has_at_most_256_kib() -> None:
    """If entries have long names, the answer stops before 256 KiB and says that there are more."""
    # Four bytes in UTF-8, and twelve characters in JSON's ASCII form.
    letter = "\U00010300"
    signed_in = {"headers": {"Authorization": f"Bearer {token(letter * 128)}"}}
    with (
        Server(MAX_SUBSCRIPTIONS=300, RATE=10_000) as server,
        server.client(**signed_in) as client,
        open_raw(server.port) as raw,
    ):
        for number in range(200):
            name = f"{number:03}" + letter * 125
            client.send(action="editStart", contentType=name, entryId=name)
        client.receive_many(200)
        payload = client.ask("presence")["payload"]
        assert 20 < len(payload["entries"]) < 200
        assert payload["more"] is True
        raw.sendall(text(action="presence") + Frames.masked(0x8, struct.pack("!H", 1000)))
        assert 100_000 < len(read_to_the_end(raw)) < 256 * 1024 + 2000


# -- Many editors that leave at once ---------------------------------------------------------------


def test_editors_vanish_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """If a proxy restarts, the server finds hundreds of dead editors while it sends one event.

    Their closing must not nest, which raised RecursionError: other clients then missed the event,
    the editors stayed for ever, and client_disconnected was not sent.
    """
    count = 200
    entries = {str(number) for number in range(count)}
    with (
        received_signals() as signals,
        Server(HEARTBEAT=NEVER) as server,
        contextlib.ExitStack() as stack,
    ):
        editors = [stack.enter_context(open_raw(server.port)) for _ in entries]
        for sock, entry in zip(editors, entries, strict=True):
            edit = text(action="editStart", contentType="posts", entryId=entry)
            sock.sendall(edit + text(action="subscribe"))
        until(lambda: stat(server, "subscriptions") == count, "all subscriptions")
        assert all(server.hub.editors("posts", entry) for entry in entries)
        with server.client() as watcher:
            watcher.subscribe()
            with held_loop(server):
                for sock in editors:
                    reset(sock)
                server.publish(1)
            until(lambda: slots(server) == 1, "the end of all connections")
            for entry in entries:
                until(lambda entry=entry: not server.hub.editors("posts", entry), "the last stop")
            messages = watcher.rest()
        assert numbers(messages) == [1]
        stopped = [m for m in messages if m["type"] == "user.stoppedEditing"]
        assert {m["payload"]["entryId"] for m in stopped} == entries
        assert len(stopped) == count
    pairs_of_signals = [sent for sent in signals.values() if sent == ["connected", "disconnected"]]
    assert len(pairs_of_signals) == count + 1
    assert log_lines(caplog, logger="", level=logging.ERROR) == []


def test_editors_of_one_entry_vanish_at_once(server: Server) -> None:
    """The last message about the entry is the true one: it has no editors any more."""
    with server.client() as one, server.client() as two, server.client() as watcher:
        for client in (one, two, watcher):
            client.subscribe("user.*")
        for client in (one, two):
            client.ask("editStart", **POST)
        watcher.rest()
        with held_loop(server):
            one.reset()
            two.reset()
        until(lambda: not server.hub.editors("posts", "42"), "the end of their editing")
        assert [len(names(message)) for message in watcher.rest()] == [1, 0]


def test_editors_that_watch_each_other_when_the_hub_closes() -> None:
    """Closing must not send each client the end of all others' editing before its close frame.

    With hundreds of editors that took longer than the close timeout, and none received 1001.
    """
    with Server(HEARTBEAT=NEVER) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(20)]
        for number, client in enumerate(clients):
            for entry in range(5):
                client.ask("editStart", contentType="posts", entryId=f"{number}.{entry}")
        for client in clients:
            client.subscribe("user.*")
        with running([server.hub.close]):
            codes = [client.closing().code for client in clients]
        assert codes == [1001] * len(clients)
        assert [m for client in clients for m in client.messages] == []


# -- Editors of several processes ------------------------------------------------------------------


def test_shared_log_list_of_editors_that_arrives_late(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of editors that was made before one of them left does not bring that editor back."""
    with (
        Server(**shared.config) as first,
        Server(**shared.config) as second,
        first.client() as ana,
        second.client() as bob,
    ):
        bob.subscribe("user.*")
        ana.ask("editStart", **POST)
        until(lambda: second.hub.editors("posts", "42"), "the first list")
        log = engine_of(first).log
        assert log is not None
        send, is_sending, may_continue = log.send, threading.Event(), threading.Event()

        def send_late(message: dict[str, Any]) -> None:
            is_sending.set()
            assert may_continue.wait(PATIENCE)
            send(message)

        monkeypatch.setattr(log, "send", send_late)
        # The hello of a new process asks for a list, which is held back.
        send({"do": "hello", "process": "another"})
        assert is_sending.wait(PATIENCE)
        ana.ask("editStop", **POST)
        ana.ask("editStart", contentType="posts", entryId="7")
        may_continue.set()
        until(lambda: second.hub.editors("posts", "7"), "the last list")
        assert second.hub.editors("posts", "42") == []
        shown = [(message["type"], message["payload"]["entryId"]) for message in bob.rest()]
        assert shown == [
            ("user.editing", "42"),
            ("user.stoppedEditing", "42"),
            ("user.editing", "7"),
        ]


def test_shared_log_editors_of_a_killed_process(shared: Shared, tmp_path: Path) -> None:
    """Soon after a process was killed, its editors are gone for the other processes."""
    heartbeat = 0.5
    environ = {**shared.environ, "TEST_HEARTBEAT": str(heartbeat)}
    with (
        Server(**shared.config, HEARTBEAT=heartbeat) as server,
        site(tmp_path, WERKZEUG, **environ) as process,
        # Only now, because it must answer heartbeats.
        server.client() as watcher,
        process.client() as client,
    ):
        watcher.subscribe("user.*")
        client.ask("editStart", **POST)
        assert len(names(watcher.receive())) == 1
        process.popen.kill()
        killed = time.monotonic()
        assert names(watcher.receive()) == []
        assert time.monotonic() - killed < 4 * heartbeat + 0.5 * SLOWNESS


def test_shared_log_list_of_editors_that_the_outbox_dropped(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the log is slow and an editor types, the list of editors may be pushed out of the outbox.

    A later heartbeat must send it, or other processes never learn of the editors.
    """
    is_sending, may_send = threading.Event(), threading.Event()
    send = swiftcms_ws.SharedLog.send

    def slow(log: swiftcms_ws.SharedLog, message: Any) -> None:
        if message["do"] == "change":
            is_sending.set()
            may_send.wait(PATIENCE)
        else:
            send(log, message)

    monkeypatch.setattr(swiftcms_ws.SharedLog, "send", slow)
    config = {**shared.config, "HEARTBEAT": 1, "RATE": 10**9}
    with (
        Server(**config) as first,
        Server(**config) as second,
        first.client() as one,
        second.client() as two,
    ):
        for client in (one, two):
            client.ask("editStart", **POST)
        until(lambda: len(first.hub.editors("posts", 42)) == 2, "the list of the second process")
        one.send(action="editChange", **POST, payload=0)
        assert is_sending.wait(PATIENCE), "no change was sent"
        one.ask("editStart", contentType="posts", entryId="1")
        one.sock.sendall(text(action="editChange", **POST, payload=1) * 1100)
        one.ask("heartbeat")
        may_send.set()

        def is_known_to_the_second() -> bool:
            for client in (one, two):
                client.ask("heartbeat")
            return len(second.hub.editors("posts", 1)) == 1

        until(is_known_to_the_second, "the list that was dropped")


# == 13. Shared logs ===============================================================================


# -- Any shared log --------------------------------------------------------------------------------


@pytest.mark.core
def test_shared_log_one_order(shared: Shared) -> None:
    """The clients of two processes get the events of both, once and in the same order."""
    with (
        Server(**shared.config) as first,
        Server(**shared.config) as second,
        first.client() as one,
        second.client() as two,
    ):
        one.subscribe()
        two.subscribe()
        servers = (first, second)
        run_all([lambda s=s: [s.publish(number) for number in range(100)] for s in servers])
        messages = one.receive_many(200)
        assert messages == two.receive_many(200)
        positions = [position(message["id"]) for message in messages]
        assert positions == sorted(set(positions))
        with second.client() as other:
            assert other.subscribe(since=messages[150]["id"])["replayed"] == 49
            assert other.receive_many(49) == messages[151:]


def test_shared_log_recipients(shared: Shared) -> None:
    """Events with `to` reach that user in all processes, and no other user."""
    with (
        Server(**shared.config) as first,
        Server(**shared.config) as second,
        second.client(headers={"Authorization": f"Bearer {token('ana')}"}) as ana,
    ):
        ana.subscribe()
        events = [("content.created", "posts", number, "ana") for number in range(500)]
        ids = first.hub.publish_many(events)
        first.publish(0, to="eve")
        last = second.publish(1)
        assert [message["id"] for message in ana.receive_many(501)] == [*ids, last]


@pytest.mark.core
@pytest.mark.parametrize(
    ("since", "recovered", "replayed"),
    [
        pytest.param(-1, True, 0, id="newest"),
        pytest.param(-40, True, 39, id="recent"),
        pytest.param(-51, True, 50, id="whole history"),
        pytest.param(-52, False, 0, id="older than the history"),
        pytest.param("5-5", False, 0, id="unknown"),
        pytest.param("99999999999999-0", False, 0, id="future"),
        pytest.param(f"{10**20 - 1}-{10**20 - 1}", False, 0, id="too large"),
    ],
)
def test_shared_log_resume_after_restart(
    shared: Shared,
    monkeypatch: pytest.MonkeyPatch,
    since: int | str,
    recovered: bool,
    replayed: int,
) -> None:
    """A process that has just started reads the history from the log, up to HISTORY events."""
    monkeypatch.setattr(swiftcms_ws.Subscribing, "SINCE_TIMEOUT", 0.1)
    with shared.hub() as script:
        ids = script.publish_many([("content.created", "posts", {"n": n}) for n in range(60)])
    with Server(**shared.config, HISTORY=50) as server, server.client() as client:
        assert client.hello["payload"]["lastId"] == ids[-1]
        answer = client.subscribe(since=ids[since] if isinstance(since, int) else since)
        assert (answer["recovered"], answer["replayed"]) == (recovered, replayed)
        assert numbers(client.rest()) == list(range(60 - replayed, 60))


def test_shared_log_client_changes_process(shared: Shared) -> None:
    """A client that reconnects to the other process 20 times under load gets all events."""
    stop, chance = threading.Event(), random.Random(3)
    published: list[str] = []
    got: list[str] = []
    with Server(**shared.config) as first, Server(**shared.config) as second:
        servers = (first, second)
        got.append(first.publish())

        def publish(server: Server) -> None:
            publish_steadily(lambda number: published.append(server.publish(number)), stop, 250)

        def read(server: Server, count: int) -> None:
            with server.client() as client:
                assert client.subscribe("content.*", since=got[-1])["recovered"] is True
                got.extend(message["id"] for message in client.receive_many(count))

        with running([functools.partial(publish, server) for server in servers]):
            for hop in range(20):
                read(servers[hop % 2], chance.randrange(1, 60))
            stop.set()
        published.sort(key=position)
        read(first, len(published) - published.index(got[-1]) - 1)
    assert got[1:] == published


SITE_OF_ANA = """
import sys
from flask import Flask
from swiftcms_ws import blueprint, hub

app = Flask("site")
app.register_blueprint(blueprint)
hub.identify(lambda: "ana")
app.run(port=int(sys.argv[1]), threaded=True)
"""


def test_shared_log_process_stopped(shared: Shared, tmp_path: Path) -> None:
    """A process that was stopped for a second delivers the events and the sign-out it missed.

    A sign-out must not depend on control messages, because they are deleted soon. Otherwise the
    client would receive private events of a user who has signed out.
    """
    with (
        script_site(tmp_path, SITE_OF_ANA, **shared.environ) as process,
        Server(**shared.config) as server,
        process.client() as ana,
    ):
        ana.subscribe("content.*")

        def is_stopped() -> bool:
            """Stop the process, but not while it has locked the file."""
            process.popen.send_signal(signal.SIGSTOP)
            if does_publish(server, -1):
                return True
            process.popen.send_signal(signal.SIGCONT)
            return False

        until(is_stopped, "the stop of the process")
        stop = threading.Event()
        threading.Timer(1.2, stop.set).start()
        published = publish_steadily(server.publish, stop, rate=500)
        server.hub.disconnect("ana")
        shared.delete_messages()
        process.popen.send_signal(signal.SIGCONT)
        assert numbers(ana.receive_many(len(published) + 1)) == [-1, *published]
        assert ana.closing().code == 4401


def test_shared_log_editors(shared: Shared) -> None:
    """Editors of all processes are listed, and each receives the changes of the others."""
    config = {**shared.config, "HEARTBEAT": 1}
    with (
        Server(**config) as first,
        Server(**config) as second,
        first.client(headers={"Authorization": f"Bearer {token('ana')}"}) as ana,
        second.client(headers={"Authorization": f"Bearer {token('bob')}"}) as bob,
    ):
        ana.subscribe("user.*")
        bob.subscribe("user.*")
        ana.ask("editStart", **POST)
        assert names(bob.receive()) == ["ana"]
        assert bob.ask("editStart", **POST)["payload"]["conflict"] is True
        until(lambda: len(first.hub.editors("posts", "42")) == 2, "both editors in one process")
        assert [names(message) for message in ana.rest()] == [["ana"], ["ana", "bob"]]
        bob.rest()
        bob.send(action="editChange", payload="x", **POST)
        assert ana.receive()["payload"]["change"] == "x"
        with Server(**config) as third:
            until(lambda: len(third.hub.editors("posts", "42")) == 2, "both in a new process")
        ana.close()
        left = bob.receive()
        assert (left["type"], names(left)) == ("user.stoppedEditing", ["bob"])
        assert left["payload"]["conflict"] is False


def test_shared_log_sign_out(shared: Shared) -> None:
    """disconnect() closes the user's connections in all processes, and counts its own."""
    bearer = {"Authorization": f"Bearer {token('ana')}"}
    with (
        Server(**shared.config) as first,
        Server(**shared.config) as second,
        first.client(headers=bearer) as ana,
        second.client() as other,
    ):
        assert second.hub.disconnect("ana") == 0
        assert ana.closing().code == 4401
        other.nothing_more()


def test_shared_log_sign_out_during_first_handshake(shared: Shared) -> None:
    """A process that is about to serve its first client receives the sign-outs of others."""
    is_asked, may_answer = threading.Event(), threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @hub.identify
        def identify() -> str:
            is_asked.set()
            assert may_answer.wait(PATIENCE)
            return "ana"

    clients: list[Client] = []
    with (
        Server(configure, **shared.config) as first,
        Server(**shared.config) as second,
        second.client(),
    ):
        with running([lambda: clients.append(first.client())]):
            assert is_asked.wait(PATIENCE), "the handshake did not begin"
            second.hub.disconnect("ana")
            may_answer.set()
        with clients[0] as client:
            assert client.closing().code == 4401


def test_shared_log_sign_in_after_sign_out(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that reads its own sign-out from the log does not apply it a second time.

    Otherwise it disconnects a client that has signed in since.
    """
    may_read = threading.Event()
    may_read.set()
    kind: Any = swiftcms_ws.RedisLog if shared.redis else swiftcms_ws.SqliteLog
    read_on = kind.read_on

    def read_late(log: Any, *place: Any) -> Any:
        found = read_on(log, *place)
        if found is not None and (found[0] or found[1]):
            may_read.wait(PATIENCE)
        return found

    monkeypatch.setattr(kind, "read_on", read_late)
    with Server(identify_as_ana, **shared.config, HEARTBEAT=NEVER) as server:
        with server.client() as old:
            may_read.clear()
            assert server.hub.disconnect("ana") == 1
            assert old.closing().code == 4401
        with server.client() as new:
            new.subscribe()
            may_read.set()
            # In the log, this event comes after the sign-out.
            server.publish(1, to="ana")
            assert new.receive()["payload"] == {"n": 1}
            new.nothing_more()


TWO_EVENTS = """
import logging, sys, threading
from flask import Flask
from swiftcms_ws import Hub, blueprint, publish

logging.basicConfig()
with Hub(**{sys.argv[1]: sys.argv[2]}) as hub:
    print(hub.publish("content.created", "posts", 1))
app = Flask(__name__)
app.register_blueprint(blueprint)
print(publish("content.created", "posts", 2))
assert threading.active_count() == 1
"""


@pytest.mark.core
def test_shared_log_script(shared: Shared) -> None:
    """A script publishes with a hub or by importing the site's app, without thread or warning."""
    ((key, value),) = shared.config.items()
    with Server(**shared.config) as server, server.client() as client:
        client.subscribe()
        run = run_code(TWO_EVENTS, key.lower(), value, **shared.environ)
        assert (run.returncode, run.stderr) == (0, "")
        assert [message["id"] for message in client.receive_many(2)] == run.stdout.split()


def test_shared_log_scripts_leave_nothing(shared: Shared) -> None:
    """A task queue that opens a hub for each task collects no threads and descriptors."""
    with shared.hub() as first:
        first.publish("content.created", "posts", 0)
    threads, files = threading.active_count(), open_files()
    for number in range(10):
        with shared.hub() as task:
            task.publish("content.created", "posts", number)
    assert threading.active_count() == threads
    assert open_files() <= files


def test_shared_log_signal_handler_publishes(shared: Shared) -> None:
    """If it interrupted publish(), it raises instead of waiting for its own thread."""

    def interrupts_publish() -> bool:
        try:
            signal.setitimer(signal.ITIMER_REAL, 100e-6)
            hub.publish("a", "b", 2)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except RuntimeError as error:
            return "signal handler" in str(error)
        return False

    with shared.hub() as hub, alarm_handler(lambda *_: hub.publish("a", "b", 1)):
        hub.publish("a", "b", 0)
        until(interrupts_publish, "a signal during publish()")
        hub.publish("a", "b", 3)


def test_shared_log_hub_closed(shared: Shared) -> None:
    """close() stops the follower and closes all files and sockets at once."""

    def run() -> None:
        with Server(**shared.config) as server, server.client() as client:
            client.subscribe()
            server.publish(1)
            client.receive()

    run()
    threads, files = threading.active_count(), open_files()
    for _ in range(3):
        run()
    assert (threading.active_count(), open_files()) == (threads, files)
    if shared.redis is None:
        assert query(shared.path, "SELECT count(*) FROM listeners") == [0]


def test_shared_log_fault(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    """publish() raises soon, in all threads; clients stay connected and get the next event."""
    events = [("content.created", "posts", {"n": 1}) for _ in range(50)]
    with Server(**fault.shared.config) as server, server.client() as client:
        client.authenticate(token("ana"))
        client.subscribe("content.*")
        server.publish(0)
        assert client.receive()["payload"] == {"n": 0}
        with fault:
            publish = functools.partial(server.hub.publish_many, events)
            sign_out = functools.partial(server.hub.disconnect, "ana")
            must_fail = functools.partial(expect_failure, words=fault.words)
            run_all([functools.partial(must_fail, call) for call in [*[publish] * 6, sign_out]])
            assert client.ask("heartbeat")["type"] == "system.heartbeat"
            assert server.get("/ws")[0] == 426
            new = server.client()
            assert new.subscribe("content.*")["recovered"] is True
        with new:
            until(lambda: does_publish(server, 2), "a publish() that succeeds")
            for each in (client, new):
                got = [each.receive()["payload"]["n"]]
                while got[-1] != 2:
                    got.append(each.receive()["payload"]["n"])
                assert got == [2] or (fault.may_store and set(got) == {1, 2})
    assert caplog.text.count("publish() failed") == 1
    failures = len(log_lines(caplog, "get no new events"))
    assert failures <= 1
    until(lambda: log_lines(caplog).count("Redis is back") == failures, "the record of the end")


@pytest.mark.parametrize(
    "name",
    [
        "redis not running",
        "sqlite no directory",
        "sqlite newer version",
        "sqlite other program",
        "sqlite damaged",
    ],
)
def test_shared_log_fault_at_start(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """The error says what to do, and no file is changed. Without the fault, the site continues.

    The first clients are disconnected then, because the events that they missed are not known.
    """
    monkeypatch.setattr(swiftcms_ws.Follower, "MAX_PAUSE", 0.1)
    monkeypatch.setattr(swiftcms_ws.Follower, "BEGIN_TIMEOUT", 0.1)
    kind, _, name = name.partition(" ")
    shared = file_or_redis(kind, request, tmp_path)
    words, end = name, lambda: delete(shared.path)
    if name != "no directory":
        with shared.hub() as hub:
            hub.publish("a", "b", 1)
    match name:
        case "not running":
            assert shared.redis is not None
            shared.redis.kill()
            words, end = "cannot use Redis", shared.redis.start
        case "no directory":
            directory = tmp_path / "missing"
            shared = Shared(DATABASE=str(directory / "live.sqlite3"))
            words, end = "Create the directory", directory.mkdir
        case "newer version":
            query(shared.path, "PRAGMA user_version = 2")
        case "other program":
            query(shared.path, "PRAGMA application_id = 7")
            words = "database of another program"
        case "damaged":
            shared.path.write_bytes(b"garbage " * 1000)
            words = "It is damaged"
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with Server(**shared.config) as server:
        expect_failure(lambda: server.publish(1), words)
        with server.client() as client:
            client.subscribe()
            until(lambda: "get no new events" in caplog.text, "the log record")
            assert before == {file: file.read_bytes() for file in before}
            end()
            assert client.closing().code == 1001
        expect_recovery(server)


@pytest.mark.parametrize(
    "loss",
    [
        "redis replaced",
        "sqlite deleted",
        "sqlite deleted without its journal",
        "sqlite replaced",
        "sqlite directory emptied",
    ],
)
def test_shared_log_events_lost(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loss: str,
) -> None:
    """publish() uses the new log. Clients are disconnected and learn that they missed events."""
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "POLL_INTERVAL", 0.1)
    kind, _, loss = loss.partition(" ")
    (directory := tmp_path / "log").mkdir()
    shared = file_or_redis(kind, request, directory)
    with Server(**shared.config) as server, server.client() as client:
        client.subscribe()
        last = server.publish(0)
        assert client.receive()["payload"] == {"n": 0}
        match loss:
            case "replaced" if shared.redis:
                shared.redis.kill(forget=True)
                shared.redis.start()
                # This one finds that its connection is closed.
                until(lambda: does_publish(server, 1), "a publish() that succeeds")
            case "replaced":
                new = Shared(DATABASE=str(directory / "new.sqlite3"))
                with new.hub() as other:
                    other.publish("content.created", "posts", "an event of the other file")
                new.path.rename(shared.path)
            case "deleted":
                delete(shared.path)
            case "deleted without its journal":
                shared.path.unlink()
            case "directory emptied":
                shutil.rmtree(directory)
                directory.mkdir()
        newer = server.publish(1)
        assert position(newer) > position(last)
        assert client.closing().code == 1001
        with server.client() as back:
            assert back.subscribe(since=last)["recovered"] is False
            server.publish(2)
            while back.receive()["payload"] != {"n": 2}:
                pass
            # The new log has the event of publish().
            with Server(**shared.config) as other_server, other_server.client() as other_client:
                assert other_client.subscribe(since=newer)["recovered"] is True
    assert "lost events" in caplog.text
    assert shared.redis or is_intact(shared.path)


# -- SQLite: settings and the file -----------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("is_configured", [True, False])
def test_sqlite_relative_path(tmp_path: Path, is_configured: bool) -> None:
    """It is inside the instance path, which is created at the first use, and only if needed."""
    app, hub = Flask("site", instance_path=str(tmp_path / "instance")), Hub()
    if is_configured:
        app.config["SWIFTCMS_WS_DATABASE"] = Path("live.sqlite3")
    hub.init_app(app)
    assert list(tmp_path.iterdir()) == []
    with hub:
        hub.publish("content.created", "posts", {})
        assert (tmp_path / "instance" / "live.sqlite3").exists() is is_configured


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_sqlite_relative_path_without_app(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error shows the absolute path, and no file is created."""
    monkeypatch.chdir(tmp_path)
    if source == "environment":
        monkeypatch.setenv("SWIFTCMS_WS_DATABASE", "live.sqlite3")
    hub = Hub(database="live.sqlite3" if source == "argument" else None)
    with pytest.raises(ValueError, match=str(tmp_path / "live.sqlite3")):
        hub.publish("content.created", "posts", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [" ", ":memory:", "sqlite:///a.db", "file:a.db", 5, b"x", "a\0b"])
def test_sqlite_path_invalid(value: Any) -> None:
    """A value that is not the path of a file is an error at registration or at the first use."""
    app = Flask("site")
    app.config["SWIFTCMS_WS_DATABASE"] = value
    with pytest.raises(ValueError, match="SWIFTCMS_WS_DATABASE must be the path of a file"):
        Hub().init_app(app)
    with pytest.raises(ValueError, match="must be the path of a file"):
        Hub(database=value).publish("a", "b", 1)


@pytest.mark.parametrize("source", ["config", "arguments", "environment"])
def test_sqlite_and_redis(source: str, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Two shared logs from one source are an error."""
    url = "redis://localhost"
    if source == "config":
        app = Flask("site")
        app.config.update(SWIFTCMS_WS_DATABASE=str(path), SWIFTCMS_WS_REDIS_URL=url)
        with pytest.raises(ValueError, match="both set"):
            Hub().init_app(app)
        return
    if source == "environment":
        monkeypatch.setenv("SWIFTCMS_WS_REDIS_URL", url)
        monkeypatch.setenv("SWIFTCMS_WS_DATABASE", str(path))
    hub = Hub() if source == "environment" else Hub(database=path, redis_url=url)
    with pytest.raises(ValueError, match="both set"):
        hub.publish("a", "b", 1)


def test_sqlite_argument_replaces_environment(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A script may use another log than the site of its environment."""
    monkeypatch.setenv("SWIFTCMS_WS_REDIS_URL", "redis://localhost")
    with Hub(database=path) as hub:
        event_id = hub.publish("content.created", "posts", 1)
    assert stored_ids(path) == [event_id]


def test_sqlite_not_available(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some builds of Python have no module sqlite3. Registration raises."""
    monkeypatch.setattr(swiftcms_ws, "sqlite3", None)
    app = Flask("site")
    app.config["SWIFTCMS_WS_DATABASE"] = str(path)
    with pytest.raises(ImportError, match="SWIFTCMS_WS_DATABASE needs the module sqlite3"):
        Hub().init_app(app)


@pytest.mark.parametrize(
    ("directory", "expected"), [(0o700, 0o600), (0o750, 0o640), (0o775, 0o660)], ids=oct
)
def test_sqlite_file_mode(path: Path, directory: int, expected: int) -> None:
    """Other users of the machine cannot read private events; the directory's group can."""
    path.parent.chmod(directory)
    with Hub(database=path) as hub:
        hub.publish("content.created", "posts", {})
        assert [file.stat().st_mode & 0o777 for file in files_of(path)] == [expected] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a directory away")
def test_sqlite_file_owner(path: Path) -> None:
    """A cron job of root that creates the file must not lock out the site of another user."""
    os.chown(path.parent, 1234, 1235)
    path.parent.chmod(0o770)
    with Hub(database=path) as hub:
        hub.publish("content.created", "posts", {})
        for file in files_of(path):
            assert (file.stat().st_uid, file.stat().st_gid) == (1234, 1235)


@pytest.mark.parametrize("is_new", [True, False])
def test_sqlite_symbolic_link(path: Path, is_new: bool) -> None:
    """Deployment tools link the files of all releases. The journal must not be beside the link."""
    link = path.with_name("link.sqlite3")
    link.symlink_to(path.name)
    if not is_new:
        with Hub(database=path) as hub:
            hub.publish("a", "b", 0)
    with Hub(database=path) as hub, Hub(database=link) as linked:
        events = [hub.publish("a", "b", 1), linked.publish("a", "b", 2), hub.publish("a", "b", 3)]
        assert stored_ids(path)[-3:] == events
        assert sorted(path.parent.iterdir()) == sorted([link, *files_of(path)])


@pytest.mark.parametrize("is_shared", [True, False])
def test_sqlite_open_files_are_limited(path: Path, is_shared: bool) -> None:
    """A test suite may create an app for each test: hubs that are not closed share a few files."""
    hubs, before = [], open_files()
    for number in range(2 * swiftcms_ws.LogFile.MAX_OPEN):
        hub = Hub(database=path if is_shared else path.with_name(f"{number}.sqlite3"))
        hub.publish("content.created", "posts", number)
        hubs.append(hub)
    assert open_files() - before <= 3 * swiftcms_ws.LogFile.MAX_OPEN
    hubs[0].publish("content.created", "posts", "again")
    for hub in hubs:
        hub.close()
    assert open_files() <= before


def test_sqlite_app_freed(path: Path) -> None:
    """A job that calls create_app() and publishes, again and again, leaves no open file."""

    def publish() -> None:
        app, hub = Flask("site"), Hub()
        app.config["SWIFTCMS_WS_DATABASE"] = str(path)
        hub.init_app(app)
        hub.publish("content.created", "posts", 1)

    publish()
    gc.collect()
    before = open_files()
    for _ in range(10):
        publish()
    gc.collect()
    assert open_files() <= before


# -- SQLite: ids and size --------------------------------------------------------------------------


@pytest.mark.core
def test_sqlite_ids_grow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No id is smaller than an earlier one if the clock goes back or the file is deleted."""
    now = [2_000_000_000_000]
    monkeypatch.setattr(swiftcms_ws, "now_milliseconds", lambda: now[0])
    ids: list[tuple[int, ...]] = []

    def publish(hub: Hub) -> None:
        ids.extend(map(position, hub.publish_many([("a", "b", 1)] * 3)))

    with Hub(database=path) as hub:
        for clock in (2_000_000_000_000, 1_000_000_000_000, 0, 2_000_000_000_001):
            now[0] = clock
            with Hub(database=path) as other:
                publish(hub)
                publish(other)
                publish(hub)
        now[0] = 1_000_000_000_000
        delete(path)
        publish(hub)
    assert ids == sorted(set(ids))


def test_sqlite_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with an app delete old events and keep the journal short, with a client or not.

    A script deletes no event, because it does not know the site's HISTORY.
    """
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "FOLLOWER_ROOM", 500)
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "POLL_INTERVAL", 0.1)
    events = [("content.created", "posts", {"pad": "x" * 280})] * 100

    def count() -> int:
        return int(query(path, "SELECT count(*) FROM events")[0])

    with Hub(database=path) as script:
        for _ in range(40):
            script.publish_many(events)
        assert count() == 4000
        with Server(DATABASE=str(path), HISTORY=500) as server:
            for _ in range(20):
                server.hub.publish_many(events)
            assert count() <= 1000 + 256 + 100
            with server.client():
                for _ in range(40):
                    script.publish_many(events)
                until(lambda: script.publish("a", "b", 1) and count() <= 1300, "the deletion")
                monkeypatch.setattr(swiftcms_ws.SqliteLog, "MAX_BYTES", 100_000)
                script.publish_many(events * 3)
                until(
                    lambda: script.publish_many(events[:1]) and count() <= 600,
                    "the deletion by size",
                )
                assert path.stat().st_size + files_of(path)[1].stat().st_size < 10_000_000


def test_sqlite_list_longer_than_history(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """publish_many() must not delete the event after which the followers continue to read."""
    monkeypatch.setattr(swiftcms_ws.SharedLog, "FOLLOWER_ROOM", 100)
    with Server(DATABASE=str(path), HISTORY=10) as server, server.client() as client:
        client.subscribe("content.*", "posts")
        server.hub.publish_many([("content.created", "posts", number) for number in range(2000)])
        payloads = [message["payload"] for message in client.receive_many(2000)]
        assert payloads == list(range(2000))
        server.hub.publish_many([("content.created", "posts", number) for number in range(256)])
        until(lambda: len(stored_ids(path)) <= 110 + 256, "the deletion of old events")


# -- SQLite: wake-ups ------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["datagrams are lost", "no internet sockets"])
def test_sqlite_without_wake_ups(
    path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    """Each process also polls the file: a container or systemd may forbid the datagrams."""
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "POLL_INTERVAL", 0.3)
    if problem == "datagrams are lost":
        monkeypatch.setattr(swiftcms_ws.SqliteLog, "_wake", staticmethod(lambda ports: None))
    else:
        forbidden = types.SimpleNamespace(**{**vars(socket), "AF_INET": 12345})
        monkeypatch.setattr(swiftcms_ws, "socket", forbidden)
    with Server(DATABASE=str(path)) as server, server.client() as client:
        client.subscribe("content.*")
        own = server.publish(1)
        with Hub(database=path) as hub:
            other = hub.publish("content.created", "posts", 2)
        assert [message["id"] for message in client.receive_many(2)] == [own, other]


def test_sqlite_flush(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flush() waits until the events have been read from the file and sent."""
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "POLL_INTERVAL", 0.3)
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "_wake", staticmethod(lambda ports: None))
    with Server(DATABASE=str(path)) as server, server.client() as client:
        client.subscribe()
        server.hub.publish_many([("content.created", "posts", {"n": n}) for n in range(500)])
        assert server.hub.flush() is True
        assert numbers(client.rest()) == list(range(500))


def test_sqlite_ports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process stores its port, again if it is lost, and deletes those of killed processes."""
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "POLL_INTERVAL", 0.2)
    ports = functools.partial(query, path, "SELECT port FROM listeners")
    with Server(DATABASE=str(path)) as first, first.client() as client:
        client.subscribe()
        (own,) = until(ports, "the port of the first process")
        query(path, "INSERT INTO listeners VALUES (1, 0)")
        with Server(DATABASE=str(path)) as second, second.client():
            until(lambda: len(ports()) == 2 and 1 not in ports(), "the deletion of a dead port")
        query(path, "DELETE FROM listeners")
        with Hub(database=path) as hub:
            hub.publish("content.created", "posts", {})
        assert client.receive()["payload"] == {}
        until(lambda: ports() == [own], "the port that was lost")


# -- SQLite: faults of the file --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_sqlite_journal_deleted(path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections of a process must be closed before one is opened again.

    Otherwise SQLite would use the old journal for the new connection, and lose or damage events.
    """
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "POLL_INTERVAL", 0.1)
    with Server(DATABASE=str(path)) as server, server.client(), Hub(database=path) as idle:
        idle.publish("content.created", "posts", {})
        server.publish(0)
        path.with_name(path.name + suffix).unlink()
        expect_recovery(server)
        with Hub(database=path) as other:
            ids = [hub.publish("a", "b", 1) for hub in (other, server.hub, idle, other)]
        assert stored_ids(path)[-4:] == ids
        expect_recovery(server)
    assert is_intact(path)


# It runs in another process: closing one of the files would release SQLite's locks in this one.
DAMAGE = """
import os, sys
for name in sys.argv[1:]:
    with open(name, "r+b") as stream:
        stream.write(b"garbage " * (os.path.getsize(name) // 8))
"""


def test_sqlite_damaged_while_running(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says which files to delete; without them the site continues."""
    monkeypatch.setattr(swiftcms_ws.Follower, "MAX_PAUSE", 0.1)
    monkeypatch.setattr(swiftcms_ws.Follower, "BEGIN_TIMEOUT", 0.1)
    with Server(DATABASE=str(path)) as server:
        with server.client() as client:
            client.subscribe()
            server.publish(0)
            client.receive()
            run_code(DAMAGE, *files_of(path)).check_returncode()
        # One event may still be stored, from memory.
        does_publish(server, 1)
        expect_failure(lambda: server.publish(2), "It is damaged")
        with contextlib.suppress(Closed), server.client() as client:
            client.ask("heartbeat")
        until(lambda: "get no new events" in caplog.text, "the log record")
        delete(path)
        expect_recovery(server)


def test_sqlite_network_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names network file systems, and does not say that the file is damaged."""
    with monkeypatch.context() as patch:
        # This kind of locking has no shared memory, as network file systems have none.
        patch.setattr(swiftcms_ws.LogFile, "URI_OPTIONS", "mode=rw&vfs=unix-dotfile")
        with Hub(database=path) as hub:
            expect_failure(lambda: hub.publish("a", "b", 1), "network file systems")
            patch.undo()
            hub.publish("a", "b", 2)


def test_sqlite_disk_full(path: Path) -> None:
    """publish() raises, and no part of a list is stored; with free space it succeeds again."""
    with Hub(database=path) as hub:
        hub.publish("a", "b", 0)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = files_of(path)[1].stat().st_size + 10_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            events = [("a", "b", "x" * 1000)] * 100
            expect_failure(lambda: hub.publish_many(events), "Is the disk full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        hub.publish("a", "b", 1)
        with file_of(hub).use() as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")
        expect_failure(lambda: hub.publish("a", "b", "x" * 100_000), "delete other files")
        hub.publish("a", "b", 2)
    assert query(path, "SELECT payload FROM events") == ["0", "1", "2"]
    assert is_intact(path)


READ_ONLY = """
import os, sys
from swiftcms_ws import Hub, PublishError
if os.geteuid() == 0:
    # The superuser may write everything.
    os.setuid(65534)
with Hub(database=sys.argv[1]) as hub:
    try:
        hub.publish("a", "b", 1)
    except PublishError as error:
        print(error, flush=True)
    sys.stdin.readline()
    print(hub.publish("a", "b", 2), flush=True)
"""


def test_sqlite_read_only() -> None:
    """The error says what the user must be able to do; once that is so, publish() succeeds."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "live.sqlite3")
        with Hub(database=path) as hub:
            hub.publish("a", "b", 1)
        path.chmod(0o444)
        Path(directory).chmod(0o555)
        with subprocess.Popen(
            [sys.executable, "-c", READ_ONLY, str(path)],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as popen:
            assert popen.stdout is not None
            assert "must be able to" in popen.stdout.readline()
            path.chmod(0o666)
            Path(directory).chmod(0o777)
            assert re.fullmatch(r"\d+-\d+\n", popen.communicate("\n", PATIENCE)[0])
            assert popen.returncode == 0


# -- SQLite: signal handlers, forks and threads ----------------------------------------------------


# An interrupted close() leaves the rest to the garbage collector, and Python 3.13 warns of that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sqlite_signal_handler_raises(path: Path) -> None:
    """An exception anywhere in publish() leaves no lock behind, in this process or in the file."""
    chance = random.Random(2)

    def interrupt(*_: object) -> None:
        raise TimeLimit

    with Hub(database=path) as hub, alarm_handler(interrupt):
        hub.publish("a", "b", 0)
        for _ in range(400):
            with contextlib.suppress(TimeLimit):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(20e-6, 400e-6))
                hub.publish("a", "b", 1)
            # It may be raised only now.
            with contextlib.suppress(TimeLimit):
                signal.setitimer(signal.ITIMER_REAL, 0)
        hub.publish("a", "b", 2)
    gc.collect()
    assert is_intact(path)


FORKS = """
import os, sys, threading, warnings
from test_swiftcms_ws import Server
warnings.simplefilter("ignore")
with Server(DATABASE=sys.argv[1]) as server, server.client() as client:
    client.subscribe()
    publish = lambda: [server.publish(n) for n in range(100)]
    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            for n in range(50):
                server.hub.publish("content.created", "posts", {"n": n, "child": number})
            os._exit(0)
        children.append(child)
    for thread in threads:
        thread.join()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    ids = [message["id"] for message in client.receive_many(400)]
    assert len(set(ids)) == 400
    client.nothing_more()
"""


def test_sqlite_fork(path: Path) -> None:
    """Processes that are forked while threads publish can publish too, and no event is lost.

    A child must not use a connection that it inherited: SQLite would believe that it holds the
    locks of its parent.
    """
    run = run_code(FORKS, path)
    assert run.returncode == 0, run.stderr
    assert is_intact(path)


HANGING_THREAD = """
import os, sys, threading, time, warnings
from swiftcms_ws import Hub, LogFile, PublishError, SqliteLog
from test_swiftcms_ws import file_of
warnings.simplefilter("ignore")
LogFile.FORK_TIMEOUT, SqliteLog.TIMEOUT = 0.1, 0.5
with Hub(database=sys.argv[1]) as hub:
    hub.publish("a", "b", 1)
    is_held, may_end = threading.Event(), threading.Event()

    def hang():
        with file_of(hub).use():
            is_held.set()
            may_end.wait(20)

    thread = threading.Thread(target=hang)
    thread.start()
    is_held.wait(20)
    child = os.fork()
    began = time.monotonic()
    try:
        hub.publish("a", "b", 2)
    except PublishError as error:
        print(error, flush=True)
    assert time.monotonic() - began < int(sys.argv[2])
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    may_end.set()
    thread.join()
    hub.publish("a", "b", 3)
"""


def test_sqlite_thread_hangs(path: Path) -> None:
    """If a disk does not answer one thread, others get PublishError, and so does a forked child."""
    run = run_code(HANGING_THREAD, path, SLOWNESS)
    assert run.returncode == 0, run.stderr
    problems = ("other threads of this process still wait", "was forked while another thread")
    assert [run.stdout.count(problem) for problem in problems] == [1, 1]
    assert query(path, "SELECT payload FROM events") == ["1", "3"]
    assert is_intact(path)


# -- Redis -----------------------------------------------------------------------------------------


@needs_redis
def test_redis_resp3(redis: Redis) -> None:
    """`?protocol=3` in the address changes the form of Redis' answers; events still arrive."""
    url = f"{redis.url}?protocol=3"
    with Server(REDIS_URL=url) as first, Server(REDIS_URL=url) as second, second.client() as client:
        client.subscribe()
        first.publish(1)
        assert client.receive()["payload"] == {"n": 1}


@needs_redis
def test_redis_resume_while_killed(redis: Redis) -> None:
    """A client is disconnected if the log cannot say which events it missed."""
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        redis.kill()
        client.send(action="subscribe", since="5-5")
        assert client.closing().code == 1001


@needs_redis
def test_redis_failover(redis: Redis, tmp_path: Path) -> None:
    """If the address leads to a new primary, publish() uses it at once.

    The connections of the pool still lead to the old one, which is a replica and refuses to write.
    """
    (tmp_path / "second").mkdir()
    second = Redis(tmp_path / "second")
    try:
        with Proxy(redis.port) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}/0"
            with Hub(redis_url=url) as hub:
                hub.publish("content.created", "posts", 0)
                second.send(f"REPLICAOF 127.0.0.1 {redis.port}")
                until(lambda: second.send("XLEN swiftcms_ws:events") == b":1\r\n", "the replica")
                second.send("REPLICAOF NO ONE")
                redis.send(f"REPLICAOF 127.0.0.1 {second.port}")
                proxy.target = second.port
                hub.publish("content.created", "posts", 1)
            assert second.send("XLEN swiftcms_ws:events") == b":2\r\n"
    finally:
        second.kill()


@needs_redis
def test_redis_full_during_list(redis: Redis) -> None:
    """publish_many() stores all events or none, also if Redis refuses one in the middle."""
    events = [("content.created", "posts", "x" * 1000)] * 1000
    with Hub(redis_url=redis.url) as hub:
        hub.publish("content.created", "posts", 0)
        used = re.findall(rb"used_memory:(\d+)", redis.send("INFO memory"))[0]
        redis.send(f"CONFIG SET maxmemory {int(used) + 300_000}")
        expect_failure(lambda: hub.publish_many(events), "maxmemory")
        redis.send("CONFIG SET maxmemory 0")
        assert redis.send("XLEN swiftcms_ws:events") == b":1\r\n"


@needs_redis
def test_redis_script_does_not_trim(redis: Redis) -> None:
    """A script does not know the site's HISTORY: only a process with an app trims the stream."""
    with Server(REDIS_URL=redis.url, HISTORY=15_000) as server:
        server.hub.publish_many([("content.created", "posts", n) for n in range(12_000)])
        with Hub(redis_url=redis.url) as script:
            script.publish("content.created", "posts", 12_000)
        assert int(redis.send("XLEN swiftcms_ws:events")[1:]) >= 12_001


# -- The follower ----------------------------------------------------------------------------------


def test_follower_foreign_entry(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """An entry that another program wrote is logged and skipped, even if it is not UTF-8."""
    with Server(**shared.config) as server, server.client() as client:
        client.subscribe()
        server.publish(1)
        if shared.redis is not None:
            parts = [b"XADD", b"swiftcms_ws:events", b"*", b"\xff\xfe", b"\xff\xfe"]
            encoded = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
            shared.redis.send(b"*%d\r\n%s" % (len(parts), encoded))
        else:
            statement = (
                "INSERT INTO events SELECT max(id) + 1, position + 1, bytes, type, content_type,"
                " payload, 'not JSON' FROM events"
            )
            query(shared.path, statement)
        server.publish(2)
        assert numbers(client.receive_many(2)) == [1, 2]
        until(lambda: "swiftcms_ws did not write" in caplog.text, "the log record")


# Control messages that this version does not send.
WRONG_MESSAGES: list[Any] = [
    {"do": "editors", "process": "another", "editors": [["posts", "42", {}]]},
    {"do": "editors", "process": "another"},
    {"do": "change", "process": "another", "entry": "posts"},
    {"process": "another"},
    {"do": "disconnect", "process": "another"},
    ["do", "process"],
]


def test_follower_wrong_message(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """A control message that cannot be carried out is logged with its traceback and skipped."""

    def tracebacks() -> int:
        return sum(record.exc_info is not None for record in caplog.records)

    with Server(**shared.config) as server, server.client() as client:
        client.subscribe()
        log = engine_of(server).log
        assert log is not None
        for message in WRONG_MESSAGES:
            log.send(message)
        until(lambda: tracebacks() == len(WRONG_MESSAGES), "a traceback of each")
        server.publish(1)
        assert client.receive()["payload"] == {"n": 1}


def test_follower_wrong_sign_out(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """A sign-out that is not JSON is logged, and the next event is delivered."""
    with Server(**shared.config) as server, server.client() as client:
        client.subscribe()
        log = engine_of(server).log
        assert log is not None
        wrong = swiftcms_ws.Draft(swiftcms_ws.SIGN_OUT, "system", "no JSON", frozenset())
        log.append([wrong, swiftcms_ws.Draft("content.created", "posts", "1", None)])
        assert client.receive()["payload"] == 1
        until(lambda: "JSONDecodeError" in caplog.text, "the log record")


def test_follower_unexpected_error(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Any exception is logged, and reading continues without a loss."""
    with Server(**shared.config) as server, server.client() as client:
        client.subscribe()
        log = engine_of(server).log
        assert log is not None
        errors: list[BaseException] = [SystemExit(1), MemoryError(), RuntimeError()]
        read_on = log.read_on

        def fail(place: Any) -> Any:
            if errors:
                raise errors.pop()
            return read_on(place)

        monkeypatch.setattr(log, "read_on", fail)
        # The call of read_on() that has begun returns the first event.
        server.publish(1)
        until(lambda: caplog.text.count("retrying") == 3, "three log records")
        server.publish(2)
        assert numbers(client.receive_many(2)) == [1, 2]


@needs_redis
def test_follower_hangs(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged if the log gives no answer for long, because clients get no events."""
    monkeypatch.setattr(swiftcms_ws.Follower, "MAX_SILENCE", 0.5)
    with Server(REDIS_URL=redis.url, HEARTBEAT=0.3) as server, server.client() as client:
        redis.stop()
        # Reading the client answers its heartbeats.
        until(
            lambda: client.ask("heartbeat") and "could not be read for" in caplog.text,
            "the log record",
        )


@needs_redis
def test_follower_log_handler_fails(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log filter of the site that needs a request raises, and the follower continues."""

    def fail(record: logging.LogRecord) -> bool:
        return bool(request.path)

    handler = logging.StreamHandler()
    handler.addFilter(fail)
    monkeypatch.setattr(logging.getLogger("swiftcms_ws"), "handlers", [handler])
    with Server(REDIS_URL=redis.url) as server, server.client() as client:
        client.subscribe()
        redis.kill()
        until(
            lambda: "Working outside of request context" in capsys.readouterr().err,
            "the error of the filter",
        )
        redis.start()
        until(lambda: does_publish(server, 2), "a publish() that succeeds")
        assert client.receive()["payload"] == {"n": 2}


# -- Deployment ------------------------------------------------------------------------------------


def test_deploy_preload(shared: Shared, tmp_path: Path) -> None:
    """Clients of three workers get each other's events; the site publishes at import too.

    With --preload, gunicorn imports the site before it forks the workers.
    """
    code = "from site_app import app, publish\npublish('a', 'b', 0)\n"
    (tmp_path / "preloaded.py").write_text(code)
    gunicorn = tuple(part.replace("site_app:", "preloaded:") for part in GTHREAD)
    with contextlib.ExitStack() as stack:
        process = site(tmp_path, gunicorn, "--workers", "3", "--preload", **shared.environ)
        stack.enter_context(process)
        clients = [stack.enter_context(process.client()) for _ in range(9)]
        for client in clients:
            client.subscribe()
        ids = [publish_over_http(process, n=n) for n in range(10)]
        for client in clients:
            assert [message["id"] for message in client.receive_many(10)] == ids
        assert "several processes" not in process.output()
        run = command("check", f"ws://127.0.0.1:{process.port}/ws")
        assert run.returncode == 0, run.stdout + run.stderr


def test_deploy_restart(shared: Shared, tmp_path: Path) -> None:
    """100 clients resume after a restart of gunicorn, and get all events of a script."""
    with shared.hub() as hub:
        ids = [hub.publish("content.created", "posts", "first")]
    port, stop = free_port(), threading.Event()
    start = functools.partial(gunicorn, tmp_path, SITE, port, "--workers", "2", **shared.environ)
    script = functools.partial(publish_from_script, shared, ids, stop)
    with contextlib.ExitStack() as stack, Swarm(port, 100, ids[0]) as swarm:
        process = stack.enter_context(start())
        stack.callback(stop.set)
        with running([script]):
            until(lambda: min(map(len, swarm.ids)) > 5, "events at all clients")
            process.popen.terminate()
            assert process.popen.wait(PATIENCE) == 0
            assert "Traceback" not in process.output()
            stack.enter_context(start())
            until(lambda: swarm.connects >= 200, "all clients again")
            stop.set()
        until(lambda: swarm.failures or swarm.has_all(ids[-1]), "the last event at all clients")
        assert swarm.failures == []
        assert [number for number, got in enumerate(swarm.ids) if got != ids] == []


# How long the next test publishes, in seconds. `.ci/run` has a stage with 60.
CHAOS_SECONDS = float(os.environ.get("TEST_CHAOS_SECONDS", "9"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the workers")
def test_deploy_kills_and_restarts(path: Path, tmp_path: Path) -> None:
    """200 clients get each event once and in order, although workers are killed all the time.

    All workers and a script publish. A worker is killed every two seconds, and gunicorn restarts
    twice.
    """
    shared = Shared(DATABASE=str(path))
    with shared.hub() as hub:
        first = hub.publish("content.created", "posts", "first")
    published: list[str] = []
    port, stop, chance = free_port(), threading.Event(), random.Random(11)
    long_history = 'app.config["SWIFTCMS_WS_HISTORY"] = 20_000\napp.register_blueprint'
    code = SITE.replace("app.register_blueprint", long_history)
    # A worker that has just been forked loses the signal that should end it.
    options = ("--workers", "4", "--backlog", "1024", "--graceful-timeout", "3")
    start = functools.partial(gunicorn, tmp_path, code, port, *options, **shared.environ)

    def publish_in_workers() -> None:
        while not stop.wait(1 / 25):
            with contextlib.suppress(OSError, HTTPException):
                published.append(publish_over_http(process, by="a worker"))

    script = functools.partial(publish_from_script, shared, published, stop, rate=100)
    with contextlib.ExitStack() as stack, Swarm(port, 200, first) as swarm:
        process = stack.enter_context(start())
        stack.callback(stop.set)
        with running([script, *[publish_in_workers] * 4], timeout=60):
            began = time.monotonic()
            restarts = [began + CHAOS_SECONDS / 3, began + CHAOS_SECONDS * 2 / 3]
            while (now := time.monotonic()) < began + CHAOS_SECONDS:
                stop.wait(min(2, began + CHAOS_SECONDS - now))
                if restarts and time.monotonic() > restarts[0]:
                    del restarts[0]
                    process.popen.terminate()
                    process.popen.wait(PATIENCE)
                    process = stack.enter_context(start())
                elif workers := children(process.popen.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(workers), signal.SIGKILL)
            stop.set()
        with shared.hub() as hub:
            hub.publish("content.created", "posts", "last")
        ids = stored_ids(path)
        assert ids[0] == first
        assert set(published) <= set(ids)
        # On a busy machine there are few of the 200 a second.
        assert len(ids) > CHAOS_SECONDS * 20
        until(lambda: swarm.failures or swarm.has_all(ids[-1]), "the last event at all clients", 60)
        assert swarm.failures == []
        assert swarm.connects > 400
        assert [number for number, got in enumerate(swarm.ids) if got != ids] == []
    assert is_intact(path)


DEPLOYED_PAGE = """
from flask import Flask
from swiftcms_ws import blueprint

app = Flask(__name__)
app.register_blueprint(blueprint)
app.add_url_rule("/", view_func=lambda: PAGE)
"""


@needs_chromium
def test_deploy_restart_with_client_js(browser: Browser, path: Path, tmp_path: Path) -> None:
    """A page gets all events although gunicorn restarts, and `ongap` is not called."""
    page_text = html(
        "<script src='/ws/client.js'></script><script>const got = [], gaps = [];"
        "const cms = new SwiftCMS(); cms.ongap = list => gaps.push(list);"
        "cms.subscribe('content.*', 'posts', message => got.push(message.id))</script>"
    )
    shared, stop = Shared(DATABASE=str(path)), threading.Event()
    code, port = DEPLOYED_PAGE + f"\nPAGE = {page_text!r}\n", free_port()
    start = functools.partial(gunicorn, tmp_path, code, port, "--workers", "2", **shared.environ)
    published: list[str] = []
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(start())
        page = browser.page(f"http://localhost:{port}/")
        stack.callback(page.close)
        stack.callback(stop.set)
        with running([functools.partial(publish_from_script, shared, published, stop)]):
            page.wait("got.length > 5")
            process.popen.terminate()
            process.popen.wait(PATIENCE)
            stack.enter_context(start())
            count = page.js("got.length")
            page.wait(f"got.length > {count + 5}")
            stop.set()
        page.wait(f"got.at(-1) === '{published[-1]}'")
        got = page.js("got")
        # The page may have connected after the first events.
        assert got == published[published.index(got[0]) :]
        assert page.js("gaps") == []


# == 14. Live pages and track ======================================================================


# -- The newest id in pages ------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("path", "has_id"),
    [
        ("/page", True),
        ("/xhtml", True),
        ("/streamed", True),
        ("/file", True),
        ("/not-modified", True),
        ("/not-found", True),
        ("/error", True),
        ("/redirect", True),
        ("/inner/page", True),
        ("/json", False),
        ("/ws/client.js", False),
    ],
)
def test_newest_id_in_header(
    bare_site: tuple[Flask, Hub], tmp_path: Path, path: str, has_id: bool
) -> None:
    """HTML pages of any origin name the newest event. So does a 304: browsers use its headers."""
    app, hub = bare_site
    app.testing = False
    (tmp_path / "page.html").write_text("<p>page")
    inner = Blueprint("inner", __name__, url_prefix="/inner")
    inner.add_url_rule("/page", "page", lambda: "<p>inner")
    app.register_blueprint(inner)
    views = {
        "/page": lambda: "<p>page",
        "/xhtml": lambda: Response("", mimetype="application/xhtml+xml"),
        "/streamed": lambda: Response(iter(["<p>", "streamed"])),
        "/file": lambda: send_file(tmp_path / "page.html"),
        "/not-modified": lambda: Response(status=304),
        "/error": lambda: 1 / 0,
        "/redirect": lambda: redirect("/page"),
        "/json": lambda: {"a": 1},
    }
    for name, view in views.items():
        app.add_url_rule(name, name, view)
    app.register_error_handler(ZeroDivisionError, lambda error: ("<p>error", 500))
    # Middleware that the site adds later.
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    with app.app_context():
        newest = hub.last_id()
    with app.test_client().get(path) as response:
        assert newest_id_of(response) == (newest if has_id else None)


@pytest.mark.core
def test_newest_id_of_head(bare_site: tuple[Flask, Hub]) -> None:
    """The answer to HEAD has the headers of GET."""
    bare_site[0].get("/")(lambda: "<p>page")
    assert newest_id_of(bare_site[0].test_client().head("/")) is not None


@pytest.mark.core
def test_newest_id_before_site_code(bare_site: tuple[Flask, Hub]) -> None:
    """It is taken before any code of the site runs, so that no event is missed.

    An event that is published after the site has read its data is newer than the id.
    """
    app, hub = bare_site
    ids = []

    def publish(*args: Any) -> None:
        ids.append(hub.publish("content.created", "posts", {}))

    class Sessions(SecureCookieSessionInterface):
        def open_session(self, *args: Any) -> Any:
            publish()
            return super().open_session(*args)

    app.session_interface = Sessions()
    app.url_value_preprocessor(publish)
    app.before_request_funcs.setdefault(None, []).insert(0, publish)
    app.get("/")(lambda: publish() or render_template_string("{{ swiftcms_last_id() }}"))
    first = hub.publish("content.created", "posts", {})
    response = app.test_client().get("/")
    assert len(ids) == 4
    assert newest_id_of(response) == response.text == first
    assert newest_id_of(app.test_client().get("/")) == ids[3]


@pytest.mark.core
def test_newest_id_starts_no_thread(bare_site: tuple[Flask, Hub]) -> None:
    """A site that serves pages and no live client needs no thread."""
    app, _ = bare_site
    app.get("/")(lambda: "<p>page")
    threads = threading.enumerate()
    assert newest_id_of(app.test_client().get("/")) is not None
    assert threading.enumerate() == threads


@pytest.mark.core
def test_newest_id_without_request(bare_site: tuple[Flask, Hub]) -> None:
    """A template that is rendered for a mail has no id."""
    with bare_site[0].app_context():
        assert render_template_string("[{{ swiftcms_last_id() }}]") == "[]"


@pytest.mark.core
def test_newest_id_with_wrong_setting() -> None:
    """Pages are served without an id; publish() raises the error."""
    app = Flask("site")
    Hub().init_app(app)
    app.config["SWIFTCMS_WS_HEARTBEAT"] = "often"
    app.get("/")(lambda: render_template_string("[{{ swiftcms_last_id() }}]"))
    response = app.test_client().get("/")
    assert (newest_id_of(response), response.text) == (None, "[]")


def test_newest_id_of_shared_log(shared: Shared) -> None:
    """Until the follower runs, the log is asked; an own event counts before it is read back."""

    def configure(app: Flask, hub: Hub) -> None:
        app.get("/")(lambda: "<p>page")

    with Server(configure, **shared.config) as server, shared.hub() as script:
        visitor = server.app.test_client()
        assert newest_id_of(visitor.get("/")) is None
        event_id = script.publish("content.created", "posts", {})
        assert newest_id_of(visitor.get("/")) == event_id
        assert not engine_of(server).is_started
        with server.client() as client:
            client.subscribe()
            event_id = script.publish("content.created", "posts", {})
            assert client.receive()["id"] == event_id
            until(lambda: newest_id_of(visitor.get("/")) == event_id, "the follower's place")
            own = server.publish()
            follower = engine_of(server).follower
            assert follower is not None
            follower.newest_id = swiftcms_ws.parse_event_id(event_id)
            assert newest_id_of(visitor.get("/")) == own


@needs_redis
def test_newest_id_while_redis_is_stopped(redis: Redis) -> None:
    """Pages are served soon, without an id until the follower has begun, and then with its id."""

    def configure(app: Flask, hub: Hub) -> None:
        app.get("/")(lambda: render_template_string("[{{ swiftcms_last_id() }}]"))

    with Server(configure, REDIS_URL=redis.url) as server:
        visitor = server.app.test_client()
        event_id = server.publish()
        redis.stop()
        began = time.monotonic()
        response = visitor.get("/")
        assert time.monotonic() - began < 0.5 * SLOWNESS
        assert (newest_id_of(response), response.text) == (None, "[]")
        redis.resume()
        with server.client():
            follower = engine_of(server).follower
            assert follower is not None
            until(lambda: follower.newest_id, "the follower's place")
            redis.stop()
            assert newest_id_of(visitor.get("/")) == event_id
            redis.resume()


@pytest.mark.core
def test_newest_id_with_several_hubs_and_apps(bare_site: tuple[Flask, Hub]) -> None:
    """It is that of the app's first hub. Apps of one hub have their own; others have none."""
    app, hub = bare_site
    with contextlib.closing(Hub()) as second:
        second.init_app(app, name="second", url_prefix="/second")
        other, bare = Flask("other"), Flask("bare")
        hub.init_app(other)
        for each in (app, other, bare):
            each.get("/")(lambda: "<p>page")
        with app.app_context():
            first_id = hub.publish("content.created", "posts", {})
            second.publish("content.created", "posts", {})
        with other.app_context():
            other_id = hub.publish("content.created", "posts", {})
        found = [newest_id_of(each.test_client().get("/")) for each in (app, other, bare)]
        assert found == [first_id, other_id, None]


# -- Refreshes and sessions ------------------------------------------------------------------------


@pytest.mark.core
def test_refresh_session_unchanged(shop: FlaskClient) -> None:
    """A view that changes the session during a refresh, or reads messages, has no effect on it.

    Flask-Session stores every session at the end of its request, changed or not.
    """
    before = shop.get("/session").json
    for _ in range(2):
        refresh = shop.get("/", headers=LIVE)
        assert refresh.text == "ana ['Welcome']"
        assert refresh.headers.getlist("Set-Cookie") == []
        assert "X-SwiftCMS-Live" not in refresh.headers
    assert shop.get("/session").json == before
    assert shop.get("/").text == "ana ['Welcome']"


def test_refresh_is_not_cached(shop: FlaskClient) -> None:
    """A proxy that stored no page because of its cookie must not store the refresh without it."""
    refresh = shop.get("/", headers=LIVE)
    assert refresh.headers["Vary"] == "Cookie"
    # Some proxies ignore Vary.
    assert refresh.headers.getlist("Cache-Control")[-1] == "private"


def test_refresh_adds_session_key(shop: FlaskClient) -> None:
    """A form with a CSRF token in the session needs the stored session: the page is loaded."""
    before = shop.get("/session").json
    assert shop.get("/token", headers=LIVE).headers["X-SwiftCMS-Live"] == "reload"
    assert shop.get("/session").json == before


@pytest.mark.parametrize(
    ("method", "value"), [("GET", None), ("GET", "0"), ("POST", "1")], ids=str
)
def test_refresh_other_requests(shop: FlaskClient, method: str, value: str | None) -> None:
    """Only a GET with the value 1 is a refresh. Any other request stores its session."""
    headers = {} if value is None else {"X-SwiftCMS-Live": value}
    response = shop.open("/token", method=method, headers=headers)
    assert response.headers.getlist("Set-Cookie") != []
    assert "csrf_token" in shop.get("/session").json


@pytest.mark.core
def test_refresh_during_logout(shop: FlaskClient) -> None:
    """A logout during a refresh holds, also if the session is stored on the server."""
    cookie = shop.get_cookie("session")
    sent = {**LIVE, "Cookie": f"session={cookie.value}"} if cookie else LIVE
    has_begun: threading.Event = shop.application.extensions["has_begun"]
    may_end: threading.Event = shop.application.extensions["may_end"]
    with ThreadPoolExecutor(1) as pool:
        other = shop.application.test_client(use_cookies=False)
        late = pool.submit(other.get, "/slow", headers=sent)
        assert has_begun.wait(PATIENCE)
        shop.post("/logout")
        may_end.set()
        assert late.result(PATIENCE).headers.getlist("Set-Cookie") == []
    if not isinstance(getattr(shop.application, "session_interface", None), MemorySessions):
        assert shop.get("/").text == "None ['Goodbye']"


@pytest.mark.core
def test_refresh_without_hub() -> None:
    """All Flask apps share one session interface: an app without a hub must not be changed."""
    app, bare = Flask("site"), Flask("bare")
    app.secret_key = bare.secret_key = KEY
    with contextlib.closing(Hub()) as hub:
        hub.init_app(app)

        def page() -> str:
            session["seen"] = "yes"
            return f"{swiftcms_ws.is_live_refresh()}"

        # An extension may set the session interface at any time.
        app.get("/")(page)
        bare.get("/")(page)
        for _ in range(2):
            refresh = app.test_client().get("/", headers=LIVE)
            assert (refresh.text, refresh.headers["X-SwiftCMS-Live"]) == ("True", "reload")
            app.session_interface = SecureCookieSessionInterface()
        response = bare.test_client().get("/", headers=LIVE)
        assert response.text == "False"
        assert response.headers.getlist("Set-Cookie") != []
    assert not swiftcms_ws.is_live_refresh()


@pytest.mark.core
def test_refresh_without_secret_key() -> None:
    """An app without sessions can have live pages."""
    app = Flask("site")
    with contextlib.closing(Hub()) as hub:
        hub.init_app(app)
        app.get("/")(lambda: f"{session.get('seen')}")
        assert app.test_client().get("/", headers=LIVE).text == "None"


def test_refresh_is_no_handshake() -> None:
    """Hooks of a connection are not a refresh, even if the client sends the header.

    Otherwise a client could hide their changes from track(), its online mark for example.
    """
    found: list[bool] = []

    def connected(sender: Any, **values: Any) -> None:
        found.append(swiftcms_ws.is_live_refresh())

    with (
        Server() as server,
        swiftcms_ws.client_connected.connected_to(connected, server.app),
        server.client(headers=LIVE) as client,
    ):
        client.ask("heartbeat")
    assert found == [False]


# Flask-Login calls datetime.utcnow(), of which Python 3.12 and newer warn.
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
@pytest.mark.core
@pytest.mark.parametrize("is_permanent", [False, True])
def test_refresh_with_flask_login(bare_site: tuple[Flask, Hub], is_permanent: bool) -> None:
    """A refresh does not extend a login. If only the remember cookie is left, the page reloads.

    Otherwise the page would show a user as signed in although the session was not stored.
    """
    flask_login = pytest.importorskip("flask_login")
    app, _ = bare_site
    app.config["REMEMBER_COOKIE_REFRESH_EACH_REQUEST"] = True
    manager = flask_login.LoginManager(app)

    class Person(flask_login.UserMixin):  # type: ignore[misc, name-defined]
        id = "ana"

    manager.user_loader(lambda user_id: Person())

    @app.post("/login")
    def login() -> str:
        session.permanent = is_permanent
        flask_login.login_user(Person(), remember=True)
        return "welcome"

    app.get("/")(lambda: f"{flask_login.current_user.is_authenticated}")
    client = app.test_client()
    client.post("/login")
    refresh = client.get("/", headers=LIVE)
    assert (refresh.text, refresh.headers.getlist("Set-Cookie")) == ("True", [])
    assert "X-SwiftCMS-Live" not in refresh.headers
    client.delete_cookie("session")
    refresh = client.get("/", headers=LIVE)
    assert (refresh.text, refresh.headers.getlist("Set-Cookie")) == ("True", [])
    assert refresh.headers["X-SwiftCMS-Live"] == "reload"
    assert client.get("/").headers.getlist("Set-Cookie") != []
    assert "X-SwiftCMS-Live" not in client.get("/", headers=LIVE).headers


@pytest.mark.core
def test_refresh_with_flask_wtf(bare_site: tuple[Flask, Hub]) -> None:
    """The form of a refresh can be sent: its CSRF token is stored, or the page reloads."""
    flask_wtf = pytest.importorskip("flask_wtf")
    app, _ = bare_site
    flask_wtf.CSRFProtect(app)
    app.get("/")(lambda: render_template_string("{{ csrf_token() }}"))
    app.add_url_rule("/", "save", lambda: "saved", methods=["POST"])
    client = app.test_client()
    lost = client.get("/", headers=LIVE)
    assert lost.headers["X-SwiftCMS-Live"] == "reload"
    assert client.post("/", data={"csrf_token": lost.text}).status_code == 400
    client.get("/")
    refresh = client.get("/", headers=LIVE)
    assert "X-SwiftCMS-Live" not in refresh.headers
    assert client.post("/", data={"csrf_token": refresh.text}).text == "saved"


# -- The time over which refreshes are spread ------------------------------------------------------


def with_slow_pages(app: Flask, hub: Hub) -> None:
    """Add pages that take 30 ms, with their streams."""
    pause = threading.Event()

    def stream(mimetype: str) -> Response:
        return Response((b"<p>" for _ in range(3) if not pause.wait(0.01)), mimetype=mimetype)

    app.add_url_rule("/page", "page", lambda: f"{pause.wait(0.03)}")
    app.add_url_rule("/streamed", "streamed", lambda: stream("text/html"))
    app.add_url_rule("/events", "events", lambda: stream("text/event-stream"))


@pytest.mark.core
def test_spread_by_connections() -> None:
    """`spread` is twice the average time of a refresh for each connection."""
    with Server(with_slow_pages) as server, server.client() as one:
        assert one.ask("heartbeat")["payload"]["spread"] == 0
        server.get("/page", **LIVE)
        # The time is known when the server has closed the response, after the client has read it.
        until(lambda: engine_of(server).refresh_seconds > 0, "the time of the refresh")
        average = engine_of(server).refresh_seconds
        with server.client() as two:
            spread = two.hello["payload"]["spread"]
            assert spread == pytest.approx(2 * average * 2, abs=0.001)
            assert one.ask("heartbeat")["payload"]["spread"] == spread


@pytest.mark.core
@pytest.mark.parametrize("path", ["/page", "/streamed"])
def test_spread_by_time_of_refresh(path: str) -> None:
    """The time of a streamed page counts; that of an endless stream does not.

    Before the first refresh, the pages that visitors open stand in for it.
    """
    with Server(with_slow_pages) as server:
        engine, visitor = engine_of(server), server.app.test_client()
        visitor.get("/page")
        assert engine.refresh_seconds > 0.1 * 0.03
        engine.refresh_seconds = 0.0
        for _ in range(3):
            assert visitor.get(path, headers=LIVE).data
        # It is the average of ten, seven of which took no time.
        average = engine.refresh_seconds
        assert 0.2 * 0.03 < average < 0.1
        visitor.get("/page")
        assert visitor.get("/events", headers=LIVE).data
        assert engine.refresh_seconds == average


# A page that writes in its GET, and publishes that.
BUSY_SITE = """
import contextlib, sqlite3
from flask import Flask
from swiftcms_ws import blueprint, is_live_refresh, publish

app = Flask(__name__)
app.config["SWIFTCMS_WS_DATABASE"] = "live.sqlite3"
app.register_blueprint(blueprint)

def run(statement):
    with contextlib.closing(sqlite3.connect("site.db", timeout=20)) as db, db:
        return db.execute(statement).fetchall()

@app.get("/")
def page():
    if not is_live_refresh():
        run("INSERT INTO visits VALUES (1)")
        publish("visit", "visits", {})
    return f"<p>{run('SELECT title FROM posts')}"

@app.post("/publish")
def create():
    run("INSERT INTO posts VALUES ('News')")
    return {"id": publish("content.created", "posts", {})}
"""


def test_refresh_under_gunicorn(tmp_path: Path) -> None:
    """Whichever of four workers answers, a page resumes from its id, and a refresh is no visit.

    Otherwise each refresh would cause another one of all pages.
    """
    with contextlib.closing(sqlite3.connect(tmp_path / "site.db")) as db:
        tables = "CREATE TABLE posts (title); CREATE TABLE visits (number)"
        db.executescript(f"PRAGMA journal_mode = WAL; {tables}")
    port = free_port()
    url, clients = f"http://127.0.0.1:{port}", []
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(gunicorn(tmp_path, BUSY_SITE, port, "--workers", "4"))
        # Before the first event, a page has no id.
        http(url)
        for _ in range(40):
            newest = re.findall(r'desc="(.+)"', http(url)[1]["Server-Timing"])[0]
            client = stack.enter_context(process.client())
            assert client.subscribe(since=newest)["recovered"] is True
            clients.append(client)
        event_id = publish_over_http(process)
        for client in clients:
            while client.receive()["id"] != event_id:
                pass
        with ThreadPoolExecutor(4) as pool:
            bodies = list(pool.map(lambda _: http(url, **LIVE)[2], clients))
        assert [body for body in bodies if b"News" not in body] == []
        for client in clients:
            client.nothing_more()
        assert TROUBLE.search(process.output()) is None


# -- track: events of a transaction ----------------------------------------------------------------


TRACKED_TYPES: dict[type, Any] = {
    Post: "posts",
    Article: "articles",
    Comment: "comments",
    Reply: "replies",
    Seat: "seats",
}

# Work in the session `s`, and the events of its commit. The database has the posts 1 and 2 (an
# article), two comments of post 1, a reply to the second one, and the seat (1, 2) of post 6.
CHANGES = """
insert: s.add_all([Post(id=4), Article(id=3), Seat(row=4, number=1)])
    -> created posts 4; created articles 3; created seats [4, 1]
update: update(s, title='new') -> updated posts 1
two updates: update(s, title='new'); s.flush(); update(s, views=2) -> updated posts 1
update of a subclass: s.get(Post, 2).body = 'new' -> updated articles 2
SQL expression: update(s, views=Post.views + 1) -> updated posts 1
value set back: post = load(s, Post, 1); post.title = 'new'; post.title = 'one' -> nothing
equal value: load(s, Post, 1).title = 'one' -> nothing
relationship alone: s.get(Post, 1).comments.reverse() -> nothing
foreign key: s.get(Comment, 1).post = s.get(Post, 2) -> updated comments 1
moved to a new parent: s.add(Post(id=4, comments=[s.get(Comment, 1)]))
    -> created posts 4; updated comments 1
delete with children: s.delete(s.get(Post, 1))
    -> deleted posts 1; deleted comments 1; deleted comments 2; deleted replies 1
orphan with a child: post = s.get(Post, 1); post.comments.pop()
    -> deleted comments 2; deleted replies 1
changed orphan: s.get(Comment, 2).text = 'x'; post = s.get(Post, 1); post.comments.pop()
    -> deleted comments 2; deleted replies 1
orphan given to another owner: seat = s.get(Seat, (1, 2));
    s.add(Seat(row=4, number=1, post=seat.post)); seat.post = None
    -> created seats [4, 1]; updated seats [1, 2]
created and updated: post = Post(id=4); s.add(post); s.flush(); post.title = 'x' -> created posts 4
created and deleted: create_and_delete(s) -> nothing
created, deleted, created: create_and_delete(s); s.flush(); s.add(Post(id=4)) -> created posts 4
updated and deleted: seat = s.get(Seat, (1, 2)); seat.guest = 'x'; s.flush(); s.delete(seat)
    -> deleted seats [1, 2]; deleted posts 6
deleted and created: delete_and_create(s) -> updated seats [1, 2]; deleted posts 6
deleted and created in one flush: s.delete(s.get(Comment, 1)); s.add(Comment(id=1, post_id=2))
    -> updated comments 1
deleted, created, deleted: delete_and_create(s); s.flush(); s.delete(s.get(Seat, (1, 2)))
    -> deleted seats [1, 2]; deleted posts 6
primary key: s.get(Seat, (1, 2)).number = 9 -> deleted seats [1, 2]; created seats [1, 9]
saved as a new version: save_as_new_version(s) -> updated posts 1; created posts 4
merge: s.merge(Post(id=1, title='new')) -> updated posts 1
merge of equal values: s.merge(Post(id=1, title='one')) -> nothing
merge of a new row: s.merge(Post(id=4)) -> created posts 4
savepoint: point = s.begin_nested(); update(s, title='new'); point.commit() -> updated posts 1
savepoint rolled back: point = s.begin_nested(); update(s, title='new'); s.flush(); point.rollback()
    -> nothing
created, and deleted in a savepoint rolled back: post = Post(id=4); s.add(post); s.flush();
    point = s.begin_nested(); s.delete(post); s.flush(); point.rollback() -> created posts 4
savepoint in a savepoint rolled back: outer = s.begin_nested(); inner = s.begin_nested();
    update(s, title='new'); inner.commit(); outer.rollback() -> nothing
savepoint rolled back in a savepoint: outer = s.begin_nested(); inner = s.begin_nested();
    update(s, title='new'); s.flush(); inner.rollback(); outer.commit() -> nothing
open savepoint: s.begin_nested(); update(s, title='new') -> updated posts 1
open savepoints: s.begin_nested(); s.begin_nested(); update(s, title='new') -> updated posts 1
order of first flushes: post = Post(id=9); s.add(post); s.flush(); s.add(Post(id=4)); s.flush();
    post.title = 'x'; s.flush(); s.add(Post(id=3))
    -> created posts 9; created posts 4; created posts 3
expunged: s.add(Post(id=4)); s.flush(); s.expunge_all() -> created posts 4
expired: update(s, title='new'); s.flush(); s.expire_all() -> updated posts 1
deleted by a statement: s.add(Post(id=4)); s.flush();
    s.execute(sqlalchemy.delete(Post).where(Post.id == 4)) -> nothing
not tracked: s.add(Note(text='x')) -> nothing
read: s.get(Post, 1) -> nothing
"""


def rows_of(table: str) -> list[Any]:
    """Return the rows of a table in the form `name: work -> expected`."""
    rows = []
    for row in re.split(r"\n(?=\S)", table.strip()):
        name, _, rest = row.partition(": ")
        work, _, expected = " ".join(rest.split()).rpartition(" -> ")
        rows.append(pytest.param(work, expected, id=name))
    return rows


@pytest.mark.core
@pytest.mark.parametrize(("work", "expected"), rows_of(CHANGES))
def test_track_changes(tracked: Tracked, work: str, expected: str) -> None:
    """A commit publishes its net effect. The same work publishes no event if it is rolled back."""
    comments = [Comment(id=1), Comment(id=2, replies=[Reply(id=1)])]
    with tracked.sessions.begin() as session:
        session.add_all([Post(id=1, title="one", comments=comments), Article(id=2)])
        session.add(Seat(row=1, number=2, post=Post(id=6)))
    tracked.hub.track(tracked.sessions, TRACKED_TYPES)
    with tracked.sessions() as session:
        do(work, session)
        session.rollback()
        do(work, session)
        session.flush()
    assert tracked.taken() == []
    with tracked.sessions.begin() as session:
        do(work, session)
    assert ("; ".join(tracked.taken()) or "nothing") == expected


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_track_random_changes(tracked: Tracked) -> None:
    """Two sessions in each of two threads publish the net effect of each commit."""
    seed = int(os.environ.get("TRACK_SEED", "0")) or random.randrange(1, 2**32)
    print(f"TRACK_SEED={seed}")
    tracked.hub.track(tracked.sessions, TRACKED_TYPES)
    deadline = time.monotonic() + float(os.environ.get("TRACK_SECONDS", "3"))
    chances = random.Random(seed)

    def work(chance: random.Random) -> None:
        sessions = [RandomSession(tracked, chance) for _ in range(2)]
        for _ in range(400):
            if time.monotonic() > deadline:
                break
            chance.choice(sessions).step()
        for each in sessions:
            each.session.close()
            each.engine.dispose()

    run_all([functools.partial(work, random.Random(chances.random())) for _ in range(2)])


def test_track_stale_list(tracked: Tracked) -> None:
    """Without expire_on_commit, a list keeps a deleted comment, which SQLAlchemy deletes again."""
    tracked.hub.track(tracked.sessions, TRACKED_TYPES)
    with tracked.sessions(expire_on_commit=False) as session:
        post = Post(id=1, comments=[Comment(id=1), Comment(id=2)])
        session.add(post)
        session.commit()
        session.delete(post.comments[0])
        session.commit()
        tracked.taken()
        assert len(post.comments) == 2
        session.delete(post)
        with pytest.warns(sqlalchemy.exc.SAWarning, match="expected to delete"):
            session.commit()
    assert tracked.taken() == ["deleted posts 1", "deleted comments 2"]


def test_track_publishes_after_commit(tracked: Tracked) -> None:
    """When an event arrives, its receivers can read the data."""
    tracked.hub.track(tracked.sessions, TRACKED_TYPES)
    found: list[Any] = []

    def receive(app: Flask, payload: Any, **event: Any) -> None:
        # In SQLite's memory there is one connection: a transaction is open, or all is committed.
        assert not session.in_transaction()
        found.append(payload["id"])

    with (
        swiftcms_ws.event_published.connected_to(receive, tracked.app),
        tracked.sessions.begin() as session,
    ):
        session.add_all([Post(id=1), Post(id=2)])
        session.flush()
        session.add(Post(id=3))
    assert found == [1, 2, 3]


def test_track_publish_fails(
    tracked: Tracked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The data is saved, so commit() must not fail; it is logged that no event was published."""
    app = Flask("other")
    app.config["SWIFTCMS_WS_DATABASE"] = str(tmp_path / "missing" / "live.sqlite3")
    tracked.hub.init_app(app)
    tracked.hub.track(tracked.sessions, TRACKED_TYPES)
    with app.app_context(), tracked.sessions.begin() as session:
        session.add_all([Post(id=4), Post(id=5)])
    assert "cannot publish 2 events" in caplog.text
    assert "Create the directory" in caplog.text
    with tracked.sessions() as session:
        assert len(session.scalars(sqlalchemy.select(Post)).all()) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("before_flush", []),
        ("after_flush", []),
        ("after_flush_postexec", []),
        ("before_commit", []),
        ("after_commit", ["created posts 1"]),
    ],
)
def test_track_listener_raises(tracked: Tracked, name: str, expected: list[str]) -> None:
    """If a listener of the site raises, the changes are published if they were committed."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    sqlalchemy.event.listen(tracked.sessions, name, fail)
    tracked.hub.track(tracked.sessions, TRACKED_TYPES)
    with tracked.sessions() as session:
        session.add(Post(id=1))
        with pytest.raises(ZeroDivisionError):
            session.commit()
    assert tracked.taken() == expected


# -- track: payload= and to= -----------------------------------------------------------------------


@pytest.mark.core
def test_track_functions(tracked: Tracked) -> None:
    """payload= and to= get the row as it is committed, with database defaults; a delete its last.

    Their queries start no flush, and the values that they return are kept as they were then.
    """

    def payload(post: Any) -> Any:
        query = sqlalchemy.select(Comment.text).where(Comment.post_id == post.id)
        comments = orm.object_session(post).scalars(query).all()
        return {"id": post.id, "title": post.title, "views": post.views, "comments": comments}

    tracked.hub.track(
        tracked.sessions,
        {Post: lambda post: f"posts.{post.kind}s"},
        payload=payload,
        to=lambda post: (name for name in [post.title]),
    )

    @sqlalchemy.event.listens_for(tracked.sessions, "before_flush")
    def before_flush(session: Any, *_: object) -> None:
        for post in filter(lambda obj: isinstance(obj, Post), session.dirty):
            post.title += "!"
            post.views = Post.views + 1

    @sqlalchemy.event.listens_for(tracked.sessions, "after_flush")
    def after_flush(session: Any, *_: object) -> None:
        for post in [obj for obj in session.new if isinstance(obj, Post)]:
            session.add(Comment(text="by a listener", post_id=post.id))

    @sqlalchemy.event.listens_for(tracked.sessions, "before_commit")
    def before_commit(session: Any) -> None:
        for post in session.scalars(sqlalchemy.select(Post)):
            if post.title == "late!":
                post.title = "later"

    def commit(work: str) -> list[tuple[Any, ...]]:
        with tracked.sessions.begin() as session:
            do(work, session)
        return [(*event[:3], *event[3]) for event in tracked.events()]

    row = {"id": 1, "title": "a", "views": 7, "comments": ["by a listener"]}
    assert commit("s.add(Post(id=1, title='a'))") == [("content.created", "posts.posts", row, "a")]
    row = {"id": 1, "title": "b!", "views": 8, "comments": []}
    assert commit("update(s, title='b'); s.delete(s.get(Comment, 1))") == [
        ("content.updated", "posts.posts", row, "b!")
    ]
    assert commit("update(s, title='late')")[0][2]["title"] == "later!"
    row = {"id": 1, "title": "later!", "views": 10, "comments": []}
    # Expired objects are loaded again, before the DELETE.
    assert commit("s.delete(s.get(Post, 1)); s.expire_all()") == [
        ("content.deleted", "posts.posts", row, row["title"])
    ]
    assert commit("s.add(Article(id=2, title='c'))")[0][1] == "posts.articles"


def test_track_payload_of_changed_key(tracked: Tracked) -> None:
    """The event of the old key has no payload of payload=, which would have the new key."""
    with tracked.sessions.begin() as session:
        session.add(Seat(row=1, number=2))
    tracked.hub.track(tracked.sessions, {Seat: "seats"}, payload=lambda seat: {"new": seat.number})
    with tracked.sessions.begin() as session:
        session.get(Seat, (1, 2)).number = 3
    assert [event[2] for event in tracked.events()] == [{"id": [1, 2]}, {"new": 3}]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"payload": lambda post: post.missing}, AttributeError, id="payload raises"),
        pytest.param({"payload": lambda post: object()}, TypeError, id="payload is not JSON"),
        pytest.param({"to": lambda post: 1 / 0}, ZeroDivisionError, id="to raises"),
        pytest.param({"to": lambda post: None}, TypeError, id="to returns None"),
    ],
)
@pytest.mark.parametrize("work", ["s.add(Post(id=2))", "s.delete(s.get(Post, 1))"])
def test_track_function_fails(
    tracked: Tracked, arguments: dict[str, Any], error: type[Exception], work: str
) -> None:
    """commit() raises its error; no row is saved, and no event is published."""
    with tracked.sessions.begin() as session:
        session.add(Post(id=1))
    tracked.hub.track(tracked.sessions, {Seat: "seats"})
    tracked.hub.track(tracked.sessions, {Post: "posts"}, **arguments)
    with tracked.sessions() as session:
        session.add(Seat(row=1, number=1))
        # The release of a savepoint is too early to raise.
        with session.begin_nested():
            do(work, session)
        with pytest.raises(error):
            session.commit()
        session.rollback()
        assert session.get(Post, 1) is not None
        assert session.get(Post, 2) is session.get(Seat, (1, 1)) is None
    # A row that is created and deleted needs no event.
    with tracked.sessions.begin() as session:
        create_and_delete(session)
    assert tracked.taken() == []


# -- track: arguments, apps and refreshes ----------------------------------------------------------


async def coroutine_function(post: Any) -> None: ...


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ("sessions(), {Post: 'posts'}", TypeError, "not <sqlalchemy"),
        ("engine, {Post: 'posts'}", TypeError, "must be a scoped_session"),
        ("async_orm.AsyncSession, {Post: 'posts'}", TypeError, "sync_session_class"),
        ("async_orm.async_sessionmaker(), {Post: 'posts'}", TypeError, "sync_session_class"),
        (
            "async_orm.async_scoped_session(async_orm.async_sessionmaker(), int), {Post: 'posts'}",
            TypeError,
            "sync_session_class",
        ),
        ("sessions, {dict: 'posts'}", TypeError, "mapped classes"),
        ("sessions, {Post.__table__: 'posts'}", TypeError, "mapped classes"),
        ("sessions, {Post: 'no name'}", ValueError, "content_type"),
        ("sessions, {Post: None}", TypeError, "content_type"),
        ("sessions, {Post: coroutine_function}", TypeError, "plain function"),
        ("sessions, {Post: 'posts'}, payload={}", TypeError, "plain function"),
        ("sessions, {Post: 'posts'}, payload=coroutine_function", TypeError, "plain function"),
        ("sessions, {Post: 'posts'}, to='ana'", TypeError, "plain function"),
        ("sessions, {Post: 'posts'}, to=None", TypeError, "plain function"),
        ("sessions, Post", TypeError, "not iterable"),
    ],
)
def test_track_wrong_argument(
    tracked: Tracked, arguments: str, error: type[Exception], words: str
) -> None:
    """It raises at once, and not at the first commit."""
    names = {**globals(), "track": tracked.hub.track, "async_orm": sqlalchemy.ext.asyncio}
    names.update(engine=tracked.engine, sessions=tracked.sessions)
    with pytest.raises(error, match=words):
        eval(f"track({arguments})", names)


@pytest.mark.core
def test_track_twice(tracked: Tracked) -> None:
    """The same call again has no effect; one with another content type or class raises."""
    hub, sessions = tracked.hub, tracked.sessions
    scoped = orm.scoped_session(sessions)
    for target in (sessions, scoped, sessions.class_):
        hub.track(target, {Post: "posts"})
    with pytest.raises(RuntimeError, match="Post already"):
        hub.track(scoped, {Post: "articles"})
    with pytest.raises(RuntimeError, match="sessions of"):
        hub.track(orm.Session, {Post: "posts"})
    scoped.add(Article(id=1))
    scoped.commit()
    scoped.remove()
    assert tracked.taken() == ["created posts 1"]


@pytest.mark.core
def test_track_without_sqlalchemy(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which package to install."""
    monkeypatch.setitem(sys.modules, "sqlalchemy.orm", None)
    with pytest.raises(ImportError, match="pip install sqlalchemy"):
        tracked.hub.track(tracked.sessions, {Post: "posts"})


@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [
        ("GET", LIVE, []),
        ("GET", {}, ["created posts 1"]),
        ("POST", LIVE, ["created posts 1"]),
    ],
    ids=["refresh", "visit", "POST"],
)
def test_track_refresh(
    tracked: Tracked, method: str, headers: dict[str, str], expected: list[str]
) -> None:
    """A page that writes in its GET must not refresh itself again and again."""
    tracked.hub.track(tracked.sessions, {Post: "posts"})

    @tracked.app.route("/", methods=["GET", "POST"])
    def view() -> str:
        with tracked.sessions.begin() as session:
            session.add(Post(id=1))
        return ""

    tracked.app.test_client().open("/", method=method, headers=headers)
    assert tracked.taken() == expected


def test_track_several_apps(tracked: Tracked, caplog: pytest.LogCaptureFixture) -> None:
    """The app's context selects the app. Without one, a commit with events raises."""
    tracked.hub.track(tracked.sessions, {Post: "posts"})
    other = Flask("other")
    tracked.hub.init_app(other)
    with pytest.raises(RuntimeError, match="app_context"), tracked.sessions.begin() as session:
        session.add(Post(id=1))
    with other.app_context(), tracked.sessions.begin() as session:
        session.add(Post(id=1))
    assert tracked.taken() == []
    with tracked.app.app_context(), tracked.sessions.begin() as session:
        session.add(Post(id=2))
    assert tracked.taken() == ["created posts 2"]
    # It changes no tracked class, and needs no app.
    with tracked.sessions.begin() as session:
        session.add(Note(text="x"))
    assert log_lines(caplog, logger="", level=logging.ERROR) == []


def test_track_keeps_nothing(tracked: Tracked) -> None:
    """Sessions that are not closed, and hubs that are not used any more, are freed."""
    hub, sessions = Hub(), orm.sessionmaker(tracked.engine)
    hub.track(sessions, {Post: "posts"})
    session = sessions()
    session.add(Post(id=1))
    session.flush()
    objects = [session, session.get_transaction(), sessions.class_, hub]
    references = [weakref.ref(each) for each in objects]
    del hub, sessions, session, objects
    # The class is freed first, and then the hub of its listeners.
    gc.collect()
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


# == 15. Plain HTTP ================================================================================


# -- Streams ---------------------------------------------------------------------------------------


@pytest.mark.core
def test_events_stream_headers(server: Server) -> None:
    """No proxy, cache or browser may collect or keep the events."""
    with Stream(server.port) as stream:
        assert stream.status == 200
        expected = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "Connection": "close",
            "X-Accel-Buffering": "no",
        }
        assert expected.items() <= stream.headers.items()
        assert "Date" in stream.headers
        assert not {"ETag", "Content-Length"} & stream.headers.keys()


@pytest.mark.core
def test_events_stream_subscribed(server: Server) -> None:
    """The first message names the subscriptions, and its id is that of the newest event."""
    query = "sub=content.*:posts&sub=:pages&sub=content.*:posts"
    with Stream(server.port, query) as stream:
        first = stream.receive()
        assert (first["type"], first["event"]) == ("system.subscribed", "system.subscribed")
        assert first["blockId"] == server.hub.last_id()
        payload = first["payload"]
        assert payload["subscriptions"] == pairs(("content.*", "posts"), ("*", "pages"))
        fields = ("refused", "recovered", "replayed", "userId", "expiresAt", "heartbeat", "spread")
        assert [payload[field] for field in fields] == [[], True, 0, None, None, 25, 0]
        assert 1 <= stream.retry <= 3
        assert stat(server, "connections") == 1
    until(lambda: slots(server) == 0, "the release of the slot")


@pytest.mark.core
def test_events_stream_event(server: Server) -> None:
    """An event is the same object as over a WebSocket. It has an id, and no `event:` field."""
    with Stream(server.port, "sub=content.*") as stream, server.client() as client:
        stream.receive()
        client.subscribe("content.*")
        server.publish(1, "user.login")
        event_id = server.publish(2, text="a\nb\u2028c")
        message = stream.receive()
        assert (message.pop("event"), message.pop("blockId")) == (None, event_id)
        assert message == client.receive()


def test_events_stream_heartbeat() -> None:
    """A heartbeat names the newest event, so that the client resumes there. It needs no answer."""
    with Server(HEARTBEAT=0.1) as server, Stream(server.port, "sub=user.*") as stream:
        event_id = server.publish(1)
        until(
            lambda: stream.receive(heartbeats=True)["blockId"] == event_id,
            "a heartbeat with the id",
        )
        for _ in range(5):
            assert stream.receive(heartbeats=True)["type"] == "system.heartbeat"


def test_events_stream_editors(server: Server) -> None:
    """Messages of the server have their type as `event:`, and no id."""
    with Stream(server.port, "sub=user.*") as stream, server.client() as client:
        stream.receive()
        client.ask("editStart", **POST)
        message = stream.receive()
        assert (message["type"], message["event"]) == ("user.editing", "user.editing")
        assert message["blockId"] is None
        assert message["payload"]["entryId"] == "42"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone has this option")
def test_events_stream_timeout(server: Server) -> None:
    """A client that vanishes without a packet is noticed after three heartbeats."""
    with Stream(server.port) as stream:
        sock = server_socket(server, stream.receive()["payload"]["clientId"])
        timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert timeout == 3 * 25 * 1000


def test_events_stream_of_own_response_class() -> None:
    """Flask turns the response of a view into the site's class, which keeps the stream."""

    class Own(Response):
        default_mimetype = "text/plain"

    with (
        Server(lambda app, hub: setattr(app, "response_class", Own)) as server,
        Stream(server.port) as stream,
    ):
        stream.receive()
        server.publish(1)
        assert stream.receive()["payload"] == {"n": 1}
        for answer in (stream, poll(server)):
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"


# -- Polls -----------------------------------------------------------------------------------------


@pytest.mark.core
def test_events_poll(server: Server) -> None:
    """A poll has the events after `since`, and ends with the id from which the next continues."""
    start = server.hub.last_id()
    first = poll(server)
    assert (first.status, first.types) == (200, ["system.subscribed", "system.heartbeat"])
    assert first.last_id == start
    assert first.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    event_id = server.publish(1)
    server.publish(2, "user.login")
    second = poll(server, "sub=content.*", since=first.last_id)
    assert second.types == ["system.subscribed", "content.created", "system.heartbeat"]
    ids = [message["blockId"] for message in second.messages]
    assert ids == [start, event_id, server.hub.last_id()]
    assert second.first["replayed"] == 1
    assert (stat(server, "polls"), stat(server, "replayed")) == (2, 1)
    assert slots(server) == 0


@pytest.mark.core
def test_events_since(server: Server) -> None:
    """The header of a browser has precedence over the parameter; an unknown id is no error."""
    start = server.hub.last_id()
    server.publish(1)
    assert poll(server, f"since={start}").payloads == [{"n": 1}]
    answer = poll(server, f"since={start}", since="1-0")
    assert (answer.first["recovered"], answer.last_id) == (False, server.hub.last_id())


def test_events_poll_in_parts() -> None:
    """A poll sends MAX_QUEUE bytes, or one larger event; the next ones continue after it."""
    with Server(MAX_QUEUE=4000) as server:
        last: str | None = server.hub.last_id()
        for number, size in enumerate([10, 3000, 10, 3970, 10, 10]):
            server.publish(number, text="x" * size)
        got, counts = [], []
        while len(counts) < 3:
            answer = poll(server, since=last)
            assert answer.first["recovered"] is True
            got += [payload["n"] for payload in answer.payloads]
            counts.append(answer.first["replayed"])
            last = answer.last_id
        assert (got, counts) == ([0, 1, 2, 3, 4, 5], [3, 1, 2])


@pytest.mark.parametrize(
    ("history", "sent", "least", "most"),
    [(1000, 0, 1.2, 1.8), (1000, 500, 0.6, 0.9), (1000, 1000, 0.08, 0.12), (0, 0, 1.2, 1.8)],
)
def test_events_poll_retry(history: int, sent: int, least: float, most: float) -> None:
    """The more of the history a poll has sent, the sooner the next one; at random times."""
    with Server(HISTORY=history) as server:
        start = server.hub.last_id()
        server.hub.publish_many([("content.created", "posts", {"n": 1})] * sent)
        retries = [poll(server, since=start).retry for _ in range(5)]
    assert least <= min(retries) < max(retries) <= most


def test_events_poll_with_indented_json() -> None:
    """Line breaks of the site's JSON provider do not break the messages apart."""

    class Indenting(DefaultJSONProvider):
        def dumps(self, obj: Any, **options: Any) -> str:
            return super().dumps(obj, indent=1, **options).replace("\n", "\r\n")

    with Server(lambda app, hub: setattr(app, "json", Indenting(app))) as server:
        start = server.hub.last_id()
        server.publish(1, text=["a", "b"])
        assert poll(server, since=start).payloads == [{"n": 1, "text": ["a", "b"]}]


@needs_redis
def test_events_poll_of_several_processes(
    server: Server, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a shared log, half of the polls lose events: it is logged at the first poll, once."""

    def poll_twice(app: Flask) -> None:
        environ = {"wsgi.multiprocess": True}
        for _ in range(2):
            response = app.test_client().get("/ws/events?mode=poll", environ_overrides=environ)
            assert response.status_code == 200

    with Server(REDIS_URL=redis.url) as sharing:
        poll_twice(sharing.app)
    assert log_lines(caplog) == []
    poll_twice(server.app)
    assert only_log_line(caplog, "polls misses some. Set SWIFTCMS_WS_DATABASE")


# -- Refusals, HEAD and CORS -----------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("query", "headers", "config", "status", "code", "word"),
    [
        ("since=yesterday", {}, {}, 400, "invalid_since", "since"),
        ("since=", {}, {}, 400, "invalid_since", "since"),
        ("", {"Last-Event-ID": "x"}, {}, 400, "invalid_since", "since"),
        ("sub=con*", {}, {}, 400, "invalid_type", "type"),
        ("sub=content.*:a:b", {}, {}, 400, "invalid_type", "contentType"),
        ("&".join(["sub=a"] * 1001), {}, {}, 400, "invalid_message", "1 to 1000"),
        ("token=bad", {}, {}, 401, "invalid_token", "JWT"),
        ("token=", {}, {}, 401, "invalid_token", "JWT"),
        ("", {"Authorization": "Bearer bad"}, {}, 401, "invalid_token", "JWT"),
        ("", {}, {"AUTH": "required"}, 401, "auth_required", "token"),
        ("", {"Origin": "https://evil.example"}, {}, 403, "forbidden", "origin"),
        ("", {"Origin": "null"}, {}, 403, "forbidden", "opened as a file"),
        # For example an image in a page of another site.
        ("", {"Sec-Fetch-Site": "cross-site"}, {}, 403, "forbidden", "another site"),
        ("sub=" + "a" * 40_000, {}, {}, 431, "bad_handshake", "headers"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_events_refused(
    query: str, headers: dict[str, str], config: dict[str, Any], status: int, code: str, word: str
) -> None:
    """The status is an error, so that a browser does not repeat the request."""
    with Server(**config) as server:
        answer = server.app.test_client().get(f"/ws/events?{query}", headers=headers)
        assert (answer.status_code, answer.json["code"]) == (status, code)
        assert word in answer.json["message"]
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert stat(server, f"refused_{status}") == 1
        assert slots(server) == 0


@pytest.mark.core
@pytest.mark.parametrize(("method", "mode"), [("GET", "poll"), ("HEAD", "stream")])
def test_events_refused_in_other_modes(server: Server, method: str, mode: str) -> None:
    """A poll and HEAD are refused as a stream is."""
    client = server.app.test_client()
    answer = client.open(f"/ws/events?since=x&mode={mode}", method=method)
    assert answer.status_code == 400
    assert stat(server, "refused_400") == 1


@pytest.mark.core
@pytest.mark.parametrize(("query", "status"), [("", 200), ("since=x", 400)])
def test_events_cors(query: str, status: int) -> None:
    """Pages of an allowed origin can read the answer, and errors too."""
    with Server(ORIGINS=["https://app.example"]) as server:
        answer = poll(server, query, Origin="https://app.example")
        assert answer.status == status
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        assert "Origin" in answer.headers["Vary"]
        other = poll(server)
        assert "Access-Control-Allow-Origin" not in other.headers
        # A cache may give its answer to a page of the allowed origin.
        assert "Origin" in other.headers["Vary"]


@pytest.mark.core
def test_events_head(server: Server) -> None:
    """HEAD opens no stream, and has no body."""
    status, headers, body = http(f"http://127.0.0.1:{server.port}/ws/events", "HEAD")
    assert (status, body) == (200, b"")
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert "Content-Length" not in headers
    assert (stat(server, "polls"), stat(server, "connections")) == (0, 0)


@pytest.mark.core
def test_events_post(server: Server) -> None:
    """The address is read-only."""
    assert server.app.test_client().post("/ws/events").status_code == 405


@pytest.mark.parametrize(("error", "status"), [(None, 403), (ValueError("mine"), 500)])
def test_events_refused_by_after_request(error: Exception | None, status: int) -> None:
    """The client gets the site's response and no event, and its slot is released."""
    errors = [error]

    def configure(app: Flask, hub: Hub) -> None:
        @app.after_request
        def refuse(response: Response) -> Response:
            if errors:
                response.status_code = 403
                if error := errors.pop():
                    raise error
            return response

    with Server(configure) as server:
        code, _, body = server.get("/ws/events")
        assert code == status
        assert b"system.subscribed" not in body
        until(lambda: slots(server) == 0, "the release of the slot")
        with Stream(server.port) as stream:
            assert stream.receive()["type"] == "system.subscribed"


# -- Users, hooks and sessions ---------------------------------------------------------------------


def with_name_in_query(app: Flask, hub: Hub) -> None:
    """Identify users by `?name=`, and forbid the content type `secret`."""

    @app.before_request
    def remember() -> None:
        g.name = request.args.get("name")

    @app.after_request
    def mark(response: Response) -> Response:
        response.headers["X-Site"] = str(response.mimetype)
        return response

    @hub.identify
    def identify() -> str | None:
        return g.name  # type: ignore[no-any-return]

    @hub.authorize
    def authorize(user: Any, event_type: str, content_type: str) -> bool:
        if content_type == "raise":
            raise ValueError(f"the hook's own error for {user.id}")
        # The hook is called in the request.
        assert g.name == user.id
        return "yes" if content_type == "wrong" else content_type != "secret"


@pytest.mark.parametrize("way", ["stream", "poll"])
def test_events_user(way: str) -> None:
    """The identify hook gives the user. Events of other users are not sent, nor those forbidden."""
    with Server(with_name_in_query) as server:
        start = server.hub.last_id()
        for number, to in enumerate(["bob", "ana", EVERYONE]):
            server.publish(number, to=to)
        server.hub.publish("content.created", "secret", {})
        query = "name=ana&sub=*:posts&sub=*:secret"
        with open_events(way, server, query, since=start) as answer:
            assert answer.status == 200
            assert answer.headers["X-Site"] == "text/event-stream"
            payload = answer.receive()["payload"]
            assert (payload["userId"], payload["expiresAt"]) == ("ana", None)
            assert [item["code"] for item in payload["refused"]] == ["forbidden"]
            assert numbers(answer.receive_many(2)) == [1, 2]


@pytest.mark.parametrize("way", ["stream", "poll"])
def test_events_all_refused(way: str) -> None:
    """If no subscription is allowed, a browser should not repeat the request: it is no error."""
    with (
        Server(with_name_in_query) as server,
        open_events(way, server, "name=ana&sub=*:secret", since=server.hub.last_id()) as answer,
    ):
        payload = answer.receive()["payload"]
        assert (answer.status, payload["subscriptions"], payload["recovered"]) == (200, [], True)


def test_events_too_many_subscriptions() -> None:
    """The limit is used up in the order of the query."""
    with Server(MAX_SUBSCRIPTIONS=2) as server:
        payload = poll(server, "sub=*:a&sub=*:b&sub=*:c").first
        assert payload["subscriptions"] == pairs(("*", "a"), ("*", "b"))
        (refused,) = payload["refused"]
        assert (refused["contentType"], refused["code"]) == ("c", "too_many_subscriptions")


@pytest.mark.parametrize("way", ["stream", "poll"])
@pytest.mark.parametrize(
    ("content_type", "status", "logged"),
    [("raise", 500, "the hook's own error for ana"), ("wrong", 200, "returned str")],
)
def test_events_hook_fails(
    way: str, content_type: str, status: int, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception of the hook is one of the view; an answer that is no bool is a refusal."""
    query = f"name=ana&sub=*:{content_type}"
    with Server(with_name_in_query) as server:
        with open_events(way, server, query) as answer:
            assert answer.status == status
            if status == 200:
                (refused,) = answer.receive()["payload"]["refused"]
                assert refused["code"] == "forbidden"
        assert logged in caplog.text
        until(lambda: slots(server) == 0, "the release of the slot")


def test_events_signals(server: Server) -> None:
    """A stream sends the signals of a connection, and a poll sends none."""
    with received_signals() as signals:
        poll(server)
        with Stream(server.port) as stream:
            client_id = stream.receive()["payload"]["clientId"]
        expected = {client_id: ["connected", "disconnected"]}
        until(lambda: signals == expected, "both signals")


def test_events_own_cookie() -> None:
    """Cookies and headers of the site's after_request functions are sent with a stream."""

    def configure(app: Flask, hub: Hub) -> None:
        @app.after_request
        def set_cookie(response: Response) -> Response:
            response.set_cookie("seen", "yes")
            return response

    with Server(configure) as server, Stream(server.port) as stream:
        assert stream.headers["Set-Cookie"].startswith("seen=yes")


@pytest.mark.parametrize("kind", ["cookie", "cachelib"])
def test_events_session(tmp_path: Path, kind: str) -> None:
    """A stream or a poll does not store the session; only the change of a hook is stored.

    Otherwise a poll during which the user logs out would undo that.
    """

    def configure(app: Flask, hub: Hub) -> None:
        use_sessions(app, kind, tmp_path)
        app.before_request(lambda: setattr(session, "permanent", True))

        @app.get("/<action>")
        def change(action: str) -> dict[str, Any]:
            if action == "login":
                session["user"] = "ana"
            elif action == "logout":
                session.clear()
            return {"user": session.get("user")}

        @hub.identify
        def identify() -> Any:
            user = session.get("user")
            if "logout" in request.args:
                client.get("/logout")
            if "remember" in request.args:
                session["seen"] = True
            return user

    with Server(configure) as server:
        client = server.app.test_client()
        client.get("/login")
        cookie = client.get_cookie("session")
        assert cookie is not None
        sent = {"Cookie": f"session={cookie.value}"}
        for query, has_cookie in (("", False), ("remember=1", True)):
            with Stream(server.port, query, **sent) as stream:
                assert stream.receive()["payload"]["userId"] == "ana"
                assert ("Set-Cookie" in stream.headers) == has_cookie
        answer = Polled(client.get("/ws/events?mode=poll&logout=1"))
        assert answer.first["userId"] == "ana"
        assert "Set-Cookie" not in answer.headers
        assert client.get("/me").json == {"user": None}


@pytest.mark.parametrize("code", ["token_expired", "signed_out", "going_away"])
def test_events_stream_closed(code: str, caplog: pytest.LogCaptureFixture) -> None:
    """The last message says why the stream is closed."""
    expires_in = 1 if code == "token_expired" else 600
    bearer = f"Bearer {token(expires_in=expires_in)}"
    with (
        Server(AUTH="required", HEARTBEAT=NEVER) as server,
        Stream(server.port, Authorization=bearer) as stream,
    ):
        payload = stream.receive()["payload"]
        assert payload["userId"] == "ana"
        assert payload["expiresAt"].endswith("Z")
        if code == "signed_out":
            assert server.hub.disconnect("ana") == 1
        elif code == "going_away":
            server.hub.close()
        assert stream.closing() == code
        counter = "closed_1001" if code == "going_away" else "closed_4401"
        until(lambda: stat(server, counter) == 1, "the count of closed connections")
    assert log_lines(caplog, logger="", level=logging.ERROR) == []


@pytest.mark.parametrize("way", ["stream", "poll"])
def test_events_signed_out_during_request(way: str) -> None:
    """A sign-out while the authorize hook is called holds."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.identify(lambda: "ana")

        @hub.authorize
        def authorize(user: Any, event_type: str, content_type: str) -> bool:
            hub.disconnect("ana")
            return True

    with Server(configure) as server, open_events(way, server) as answer:
        assert answer.closing() == "signed_out"


# -- Limits and slow clients -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stream", "poll"])
def test_events_after_close(server: Server, way: str) -> None:
    """A browser would give up at 503, so it is asked with a 200 to connect again later."""
    engine_of(server)
    server.hub.close()
    with open_events(way, server) as answer:
        assert (answer.status, answer.closing(), answer.last_id) == (200, "going_away", None)
        assert 10 <= answer.retry <= 20


def test_events_too_many_connections() -> None:
    """Streams count as connections, and polls do not."""
    with Server(MAX_CONNECTIONS=2) as server, server.client(), Stream(server.port) as first:
        assert first.receive()["type"] == "system.subscribed"
        with Stream(server.port, Origin="http://127.0.0.1") as second:
            assert (second.status, second.last_id) == (200, None)
            assert second.closing() == "too_many_connections"
            assert 10 <= second.retry <= 20
            assert second.headers["Access-Control-Allow-Credentials"] == "true"
        with pytest.raises(Refused):
            server.client()
        assert poll(server).types[0] == "system.subscribed"
        assert stat(server, "refused_503") == 2


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "many"), ValueError("closed")], ids=repr)
def test_events_socket_not_taken_over(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """Without a free descriptor the client is asked to connect later; its slot is released."""

    def fail(self: Any, sock: Any) -> None:
        raise error

    monkeypatch.setattr(swiftcms_ws.Descriptors, "take_over", fail)
    with Stream(server.port) as stream:
        assert stream.closing() == "too_many_connections"
        assert 10 <= stream.retry <= 20
    until(lambda: slots(server) == 0, "the release of the slot")
    assert ("may not open more files" in caplog.text) == isinstance(error, OSError)


def test_events_with_relay(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """With TLS in the process, and on Windows, a stream would hold a thread: it is a poll."""
    monkeypatch.setattr(swiftcms_ws.Endpoint, "FORCE_RELAY", True)
    assert Polled(server.get("/ws/events")).types == ["system.subscribed", "system.heartbeat"]
    assert stat(server, "polls") == 1


def test_events_slow_reader(caplog: pytest.LogCaptureFixture) -> None:
    """A stream that is not read is closed, with the reason if there is room; others go on."""
    with Server(MAX_QUEUE=100_000, HEARTBEAT=NEVER) as server, Stream(server.port) as other:
        slow_socket = socket.socket()
        slow_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow_socket.connect(("127.0.0.1", server.port))
        with Stream(slow_socket) as slow:
            other.receive()
            sent = itertools.count()

            def is_closed() -> bool:
                for number in itertools.islice(sent, 20):
                    server.publish(number, text="x" * 10_000)
                assert other.receive_many(20)
                return stat(server, "slow_clients") == 1

            until(is_closed, "the end of the slow reader")
            got = []
            with contextlib.suppress(Closed):
                while True:
                    got.append(slow.receive())
            last = got[-1]
            received = numbers(got)
            assert received == list(range(len(received)))
            assert last["event"] is None or last["payload"].get("code") == "too_slow"
    assert "read too slowly" in caplog.text


def test_events_client_sends(server: Server) -> None:
    """Data that a client sends after its request is read slowly and dropped."""
    with Stream(server.port) as stream:
        assert stream.receive()["type"] == "system.subscribed"
        sent = push_until_full(stream.sock, b"x" * 65_536, most=100_000_000)
        assert sent < 100_000_000, "the server reads everything"
        assert stat(server, "throttled") >= 1
        stream.sock.settimeout(PATIENCE)
        server.publish(1)
        assert stream.receive()["payload"] == {"n": 1}


def test_events_polls_count_for_spread(server: Server) -> None:
    """Ten polls, each before a pause of a twentieth of 30 s, count as half of a connection."""
    assert poll(server).first["spread"] == 0
    engine_of(server).refresh_seconds = 1.0
    for _ in range(9):
        poll(server)
    assert poll(server).first["spread"] == pytest.approx(1.0, abs=0.15)


def test_pollers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each poller of the last 30 seconds counts as one, whatever its pause."""
    now = 1000.0
    monkeypatch.setattr(swiftcms_ws.time, "monotonic", lambda: now)
    pollers = swiftcms_ws.Pollers()
    assert pollers.count() == 0
    due = [(1000 + number / 100, (0.5, 1.5, 5)[number % 3]) for number in range(300)]
    while now < 1120:
        now, pause = heapq.heappop(due)
        pollers.add(pause)
        heapq.heappush(due, (now + pause, pause))
    assert 270 < pollers.count() < 330
    now += 90
    assert pollers.count() < 20


# -- Clients that are interrupted ------------------------------------------------------------------


def test_events_replay_longer_than_queue() -> None:
    """A stream can resume from a history that is longer than MAX_QUEUE."""
    with Server(MAX_QUEUE=20_000, HEARTBEAT=NEVER) as server:
        start = server.hub.last_id()
        for number in range(200):
            server.publish(number, text="x" * 5000)
        with Stream(server.port, since=start) as stream:
            first = stream.receive()
            assert (first["blockId"], first["payload"]["replayed"]) == (start, 200)
            server.publish(200)
            assert numbers(stream.receive_many(201)) == list(range(201))


@pytest.mark.parametrize("way", ["stream", "poll"])
def test_events_thirty_cuts(way: str) -> None:
    """A client that is cut 30 times at 500 events a second gets each event once, in order."""
    chance = random.Random(28)
    stop = threading.Event()
    published: list[int] = []
    got: list[int] = []
    query = "sub=content.*" + ("&mode=poll" if way == "poll" else "")
    longest = 0.08 if way == "stream" else 0.008
    with Server(RATE=1000) as server, Proxy(server.port) as proxy:
        last: str | None = server.publish(-1)

        def read_on(cutter: threading.Timer | None = None) -> bool:
            """Read until the response ends or all is read; return whether it was complete."""
            nonlocal last
            is_complete = False
            if cutter is not None and way == "poll":
                # A poll is short.
                cutter.start()
            with (
                contextlib.suppress(Closed, OSError),
                Stream(proxy.port, query, since=last) as stream,
            ):
                if cutter is not None and way == "stream":
                    cutter.start()
                while cutter is not None or len(got) < len(published):
                    message = stream.receive(heartbeats=True)
                    is_complete = message["type"] == "system.heartbeat"
                    if message["type"] == "system.subscribed":
                        assert message["payload"]["recovered"] is True
                    elif message["event"] is None:
                        got.append(message["payload"]["n"])
                    # A browser has the id of a message once it has handled the message.
                    last = message["blockId"] or last
            return is_complete

        def has_all() -> bool:
            read_on()
            return len(got) == len(published)

        with running([lambda: published.extend(publish_steadily(server.publish, stop))]):
            cuts, deadline = 0, time.monotonic() + 60
            while cuts < 30:
                assert time.monotonic() < deadline, f"only {cuts} cuts"
                cuts += not read_on(threading.Timer(chance.uniform(0, longest), proxy.cut))
            stop.set()
        until(has_all, "the last events")
    assert got == published


@needs_chromium
def test_events_in_browser(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EventSource that is cut gets all events, with a stream and with polls."""
    monkeypatch.setattr(swiftcms_ws.StreamResponse, "RETRY", (0.1, 0.2))
    monkeypatch.setattr(swiftcms_ws.Poll, "LONGEST_RETRY", 0.3)
    script = """
        function listen(query) {
          const source = new EventSource(`/ws/events?sub=content.*${query}`);
          const heard = {source, got: [], recovered: []};
          source.onmessage = ({data}) => heard.got.push(JSON.parse(data).payload.n);
          source.addEventListener("system.subscribed", ({data}) => {
            heard.recovered.push(JSON.parse(data).payload.recovered);
          });
          return heard;
        }
        const both = [listen(""), listen("&mode=poll")];
    """

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", view_func=lambda: html(f"<script>{script}</script>"))

    with Server(configure) as server, Proxy(server.port) as proxy:
        page = browser.page(f"http://localhost:{proxy.port}/")
        page.wait("both.every(each => each.recovered.length)")
        for number in range(20):
            server.publish(number)
            if number == 9:
                page.wait("both.every(each => each.got.length)")
                proxy.cut()
        page.wait("both.every(each => each.got.length >= 20 && each.recovered.length >= 2)")
        assert page.js("both.map(each => each.got)") == [list(range(20))] * 2
        assert page.js("both.every(each => each.recovered.every(Boolean))")
        page.js("both.forEach(each => each.source.close())")
        page.close()


# -- Web servers and processes ---------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "server_name", ["werkzeug", "flask run single", "sync", "gthread", "gevent", "waitress"]
)
def test_events_stream_under_server(tmp_path: Path, server_name: str) -> None:
    """Streams hold no thread: more of them than threads are served, and pages too."""
    with Site(tmp_path, SERVERS[server_name]) as site, contextlib.ExitStack() as stack:
        query = "sub=content.*:posts"
        streams = [stack.enter_context(Stream(site.open(), query)) for _ in range(20)]
        for stream in streams:
            assert stream.receive()["type"] == "system.subscribed"
        assert site.page() == b"a page"
        start = streams[0].last_id
        event_id = site.publish(1)
        for stream in streams:
            assert stream.receive()["blockId"] == event_id
        assert events_site(site, f"since={start}").payloads == [{"n": 1}]
        state = site.state()
        assert (state["connections"], state["polls"]) == (20, 1)
        until(lambda: threads_of(state["pid"]) <= 16, "the end of the requests' threads")
        assert cpu_share(state["pid"]) < 0.3, "the server spins"
        if "waitress" not in server_name:
            assert len(re.findall(r'GET /ws/events\S* HTTP/1\.1\S*" 200 ', site.output())) == 21
        # Clients that leave, with an answer or before, free their slots.
        streams.pop().sock.close()
        reset(streams.pop().sock)
        for _ in range(5):
            sock = site.open()
            sock.sendall(b"GET /ws/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            reset(sock)
        until(lambda: site.state()["slots"] == 18, "the release of the slots")
        site.popen.send_signal(signal.SIGTERM)
        for stream in streams:
            assert stream.closing() == "going_away"
        assert site.popen.wait(PATIENCE) is not None
        assert TROUBLE.search(site.output()) is None, site.output()


UWSGI = (
    *("uwsgi", "--http-socket", "127.0.0.1:{port}", "--wsgi-file", "site_app.py"),
    *("--callable", "app", "--master", "--die-on-term", "--need-app", "--threads", "2"),
)

POLLED_SERVERS = {
    "uwsgi": UWSGI,
    # Without this option, threads of Python run only while a request is handled.
    "uwsgi without threads": UWSGI[:-2],
    "cheroot": ("{python}", "-m", "cheroot", "site_app:app", "--bind", "127.0.0.1:{port}"),
    "sync TLS": UNSUITABLE["sync TLS"],
}


@pytest.mark.parametrize("server_name", POLLED_SERVERS)
def test_events_poll_under_server(tmp_path: Path, server_name: str) -> None:
    """A server that keeps its socket answers polls, and its 501 for WebSockets says so."""
    program = server_name.partition(" ")[0]
    if program in ("uwsgi", "cheroot") and shutil.which(program, path=PATH) is None:
        pytest.skip(f"{program} is not installed in this environment")
    with Site(tmp_path, POLLED_SERVERS[server_name], PATH=PATH) as site:
        status, _, body = site.refusal()
        assert (status, body["code"]) == (501, "not_supported")
        assert "GET /ws/events" in body["message"]
        start = Polled(site.ask("GET", "/ws/events?sub=content.*"))
        assert (start.status, start.types) == (200, ["system.subscribed", "system.heartbeat"])
        for number in range(3):
            site.publish(number)
        answer = events_site(site, Last_Event_ID=str(start.last_id))
        assert [payload["n"] for payload in answer.payloads] == [0, 1, 2]
        assert site.ask("HEAD", "/ws/events")[0] == 200
        assert site.ask("GET", "/ws/events?since=x")[0] == 400
        site.popen.send_signal(signal.SIGTERM)
        assert site.popen.wait(PATIENCE) is not None
        assert "Traceback" not in site.output(), site.output()


@pytest.mark.skipif(NGINX is None, reason="there is no nginx on this machine")
def test_events_behind_nginx(tmp_path: Path) -> None:
    """A proxy that most Flask sites have, without lines for WebSockets, passes events at once.

    Heartbeats keep a stream that nginx would close because of its silence.
    """
    with Server(HEARTBEAT=0.3) as server:
        port = free_port()
        (tmp_path / "nginx.conf").write_text(
            f"""
            daemon off; error_log stderr; pid {tmp_path}/nginx.pid;
            events {{}}
            http {{
              access_log off; proxy_read_timeout 1s;
              server {{
                listen 127.0.0.1:{port};
                location / {{ proxy_pass http://127.0.0.1:{server.port}; }}
              }}
            }}"""
        )
        assert NGINX is not None
        command = (NGINX, "-c", str(tmp_path / "nginx.conf"))
        with Process(*command, cwd=tmp_path, port=port) as nginx:
            with pytest.raises(Refused):
                Client(port)
            with Stream(port) as stream:
                assert stream.receive()["type"] == "system.subscribed"
                for number in range(3):
                    server.publish(number)
                    assert stream.receive(2 * SLOWNESS)["payload"] == {"n": number}
                silent_until = time.monotonic() + 1.3
                while time.monotonic() < silent_until:
                    stream.receive(heartbeats=True)
                start = stream.last_id
            server.publish(9)
            answer = Polled(http(f"http://127.0.0.1:{port}/ws/events?mode=poll&since={start}"))
            assert answer.payloads == [{"n": 9}]
            until(lambda: slots(server) == 0, "the release of the slot")
            nginx.popen.terminate()
            nginx.popen.wait(PATIENCE)


def test_events_stream_and_fork(tmp_path: Path) -> None:
    """A child that was forked while a stream was open does not keep it open."""
    with Site(tmp_path, WERKZEUG) as site, Stream(site.open()) as stream:
        assert stream.receive()["type"] == "system.subscribed"
        leave = tmp_path / "leave"
        site.run(FORK.format(leave=str(leave)))
        try:
            site.publish(1)
            assert stream.receive()["payload"] == {"n": 1}
            site.popen.send_signal(signal.SIGTERM)
            assert stream.closing() == "going_away"
            assert site.popen.wait(PATIENCE) is not None
        finally:
            leave.touch()


def test_events_polls_of_several_processes(shared: Shared) -> None:
    """Polls that reach one process or the other get all events."""
    with Server(**shared.config) as one, Server(**shared.config) as two:
        servers = itertools.cycle([one, two])
        last = poll(one).last_id
        got: list[int] = []

        def has_all() -> bool:
            nonlocal last
            answer = poll(next(servers), since=last)
            assert answer.first["recovered"] is True
            got.extend(payload["n"] for payload in answer.payloads)
            last = answer.last_id
            return len(got) == 12

        for number in range(12):
            one.publish(number)
            if number % 4 == 3:
                has_all()
        until(has_all, "all events")
        assert got == list(range(12))


@pytest.mark.parametrize("way", ["stream", "poll"])
def test_events_since_before_process(shared: Shared, way: str) -> None:
    """A process that has just started reads the history from the log."""
    with shared.hub() as script:
        ids = script.publish_many([("content.created", "posts", {"n": n}) for n in range(9)])
    with Server(**shared.config) as server, open_events(way, server, since=ids[0]) as answer:
        first = answer.receive()
        assert (first["payload"]["recovered"], first["blockId"]) == (True, ids[0])
        assert numbers(answer.receive_many(8)) == list(range(1, 9))


def test_events_poll_since_of_other_process(shared: Shared) -> None:
    """A poll waits for an id that another process has published, and not for a wrong one.

    Otherwise a stranger could hold all threads of the web server with ids of the future.
    """
    with Server(**shared.config) as server, shared.hub() as script:
        poll(server)
        began = time.monotonic()
        future = f"{now_milliseconds() + 60_000}-0"
        assert poll(server, since=future).first["recovered"] is False
        assert time.monotonic() - began < 0.5 * SLOWNESS
        with held_loop(server):
            event_id = script.publish("content.created", "posts", {})
        assert poll(server, since=event_id).first["recovered"] is True


@needs_redis
def test_events_poll_while_redis_is_killed(redis: Redis) -> None:
    """The client is asked to poll again later, and keeps its place."""
    with Server(REDIS_URL=redis.url) as server:
        start = poll(server).last_id
        redis.kill()
        with Server(REDIS_URL=redis.url) as other:
            answer = poll(other, since=start)
            assert (answer.types, answer.first["code"]) == (["system.error"], "going_away")
            assert answer.last_id is None


# == 17. Command line ==============================================================================


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:5000", "ws://localhost:5000/ws"),
        ("https://example.org", "wss://example.org/ws"),
        ("HTTPS://example.org/", "wss://example.org/ws"),
        ("wss://example.org/live/ws", "wss://example.org/live/ws"),
        ("http://::1", "ws://[::1]/ws"),
        ("[::1]:5000?token=a.b", "ws://[::1]:5000/ws?token=a.b"),
        ("example.org/ws?next=http://a/", "ws://example.org/ws?next=http://a/"),
        ("b\u00fccher.example/\u00fc b", "ws://b\u00fccher.example/%C3%BC%20b"),
    ],
)
def test_address(text: str, url: str) -> None:
    """The address for `listen` and `check` may lack its scheme and its path."""
    assert swiftcms_ws.websocket_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "ftp://example.org",
        "http://",
        "localhost:http",
        "localhost:99999",
        "http://[::1",
        f"{'a' * 64}.org",
    ],
)
def test_address_that_cannot_be(text: str) -> None:
    """It is a usage error, and no traceback."""
    run = command("check", text)
    assert (run.returncode, run.stdout) == (2, "")
    assert f"argument url: {text!r} is not an address like wss://example.org/ws" in run.stderr


# -- listen ----------------------------------------------------------------------------------------


@pytest.mark.core
def test_listen_reconnect() -> None:
    """Each event is one line of JSON, also if it was published while the connection was lost.

    The history has forgotten the last event that was printed, so `listen` must resume from the
    last heartbeat.
    """
    options = ("--type", "content.*", "--content-type", "posts", "--token", token())
    with (
        Server(HISTORY=2, HEARTBEAT=0.2) as server,
        Proxy(server.port) as proxy,
        listening(f"ws://127.0.0.1:{proxy.port}/ws", *options) as (listener, stderr),
    ):
        until(lambda: stat(server, "subscriptions") == 1, "the subscription")
        server.publish(1)
        assert next_payload(listener) == {"n": 1}
        for number in range(10):
            server.hub.publish("content.created", "pages", {"n": number})
        with server.client() as client:
            # One heartbeat may be under way already, so the second one has the newest id.
            for _ in range(2):
                receive_heartbeat(client)
        proxy.cut()
        server.publish(2)
        server.publish(3, to="ana")
        assert [next_payload(listener), next_payload(listener)] == [{"n": 2}, {"n": 3}]
        listener.send_signal(signal.SIGINT)
        assert listener.wait(PATIENCE) == 130
        stderr.seek(0)
        assert "lost" not in stderr.read()


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("/ws", ["--token", "nonsense"], "not a valid JWT"),
        ("/ws", ["--type", "con*"], "prefix"),
        ("/ws/elsewhere", [], "Is this the right address"),
    ],
    ids=["token", "pattern", "path"],
)
def test_listen_permanent_error(server: Server, path: str, options: list[str], words: str) -> None:
    """If reconnecting would not help, `listen` prints why and exits with 1."""
    run = command("listen", f"ws://127.0.0.1:{server.port}{path}", *options)
    assert (run.returncode, run.stdout) == (1, "")
    assert words in run.stderr


def test_listen_in_a_terminal_without_unicode() -> None:
    """An event stays JSON if the site and the terminal use different characters."""

    def configure(app: Flask, hub: Hub) -> None:
        app.json.ensure_ascii = False  # type: ignore[attr-defined]

    with (
        Server(configure) as server,
        listening(f"127.0.0.1:{server.port}", PYTHONIOENCODING="cp1252") as (listener, _),
    ):
        until(lambda: stat(server, "subscriptions") == 1, "the subscription")
        server.publish(1, title="\u00e9 \u2713")
        assert next_payload(listener) == {"n": 1, "title": "\u00e9 \u2713"}


@pytest.mark.parametrize(
    ("output", "returncode", "words"),
    [("| head -n 1", 141, ""), ("> /dev/full", 1, "No space left on device")],
    ids=["head", "full disk"],
)
def test_listen_output_cannot_be_written(output: str, returncode: int, words: str) -> None:
    """`listen | head -n 1` exits like other tools, and so it does if the disk is full."""
    script = f"{shlex.join([sys.executable, str(HERE / 'swiftcms_ws.py'), 'listen'])} 127.0.0.1:"
    with Server() as server, tempfile.TemporaryFile("w+") as stderr:
        popen = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", f"{script}{server.port} {output}"],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            until(lambda: stat(server, "subscriptions") == 1, "the subscription")
            for number in itertools.count():
                server.publish(number)
                # If `head` has exited after the first event, the next one cannot be written.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    assert popen.wait(0.2) == returncode
                    break
                assert number < 5 * PATIENCE, "listen does not exit"
        finally:
            popen.kill()
            popen.wait(PATIENCE)
        stderr.seek(0)
        printed = stderr.read()
    assert words in printed
    assert "Traceback" not in printed


def test_listen_output_is_not_read() -> None:
    """It does not read more than it prints, so the server closes it as a slow client."""

    def is_closed() -> bool:
        for _ in range(100):
            server.publish(text="x" * 50_000)
        assert server.hub.flush()
        return stat(server, "slow_clients") > 0

    with (
        Server(MAX_QUEUE=100_000) as server,
        listening(f"127.0.0.1:{server.port}") as (listener, _),
    ):
        until(lambda: stat(server, "subscriptions") == 1, "the subscription")
        until(is_closed, "the close of the slow client")
        status = Path(f"/proc/{listener.pid}/status").read_text()
        assert int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) < 80_000
        # As process 1 of a container it would ignore SIGTERM without a handler.
        listener.terminate()
        assert listener.wait(PATIENCE) == 128 + signal.SIGTERM


# -- check: exit code and output -------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", "✓"), ("cp437", "ok")])
def test_check_good_site(server: Server, encoding: str, mark: str) -> None:
    """Every check is a tick, or a word in a terminal without Unicode, and the exit code is 0."""
    run = command("check", f"ws://127.0.0.1:{server.port}/ws", encoding=encoding)
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split()[0] for line in run.stdout.splitlines()] == [mark] * 6, run.stdout
    assert "visitors get a WebSocket" in run.stdout


def test_check_no_server() -> None:
    """An address without a server is a cross, and the exit code is 1."""
    run = command("check", f"ws://127.0.0.1:{free_port()}/\u2713")
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.startswith("✗ ")
    assert "Is the site running" in run.stdout


def test_check_in_a_terminal_without_unicode() -> None:
    """The mark is a word, and other characters of a server's answer are escaped."""
    body = json.dumps({"code": "", "message": "\u2713"})
    head = f"HTTP/1.1 403 No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with answering((head + body).encode()) as address:
        run = command("check", address, encoding="ascii")
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.startswith("WRONG visitors get no WebSocket: HTTP status 403, \\u2713")


def test_check_processes_without_a_shared_log(tmp_path: Path) -> None:
    """Several processes that do not share their events are a cross that names the keys to set."""
    with site(tmp_path, SYNC, "--workers", "2") as process:
        url = f"ws://127.0.0.1:{process.port}/ws"
        # The requests of one run may all be accepted by the same process.
        found = until(lambda: re.search("SWIFTCMS_WS_.*", command("check", url).stdout), "a cross")
        assert re.match("SWIFTCMS_WS_DATABASE.*SWIFTCMS_WS_REDIS_URL", found[0])


@needs_redis
def test_check_processes_with_redis(redis: Redis, tmp_path: Path) -> None:
    """Several processes that share Redis are a tick, and a cross while Redis is down."""
    environ = {"SWIFTCMS_WS_REDIS_URL": redis.url}
    with site(tmp_path, SYNC, "--workers", "2", **environ) as process:
        url = f"ws://127.0.0.1:{process.port}/ws"
        run = command("check", url)
        assert run.returncode == 0, run.stdout
        redis.kill()
        run = command("check", url)
        assert (run.returncode, "Is Redis running" in run.stdout) == (1, True), run.stdout


# -- check: findings and hints ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configure", "config", "query", "skipped"),
    [
        (None, {"AUTH": "required"}, "", "Add ?token=JWT"),
        (None, {"AUTH": "required"}, f"?token={token(expires_in=600)}", None),
        (None, {}, f"?token={token(expires_in=600)}", None),
        (allow(set()), {}, "", "authorize hook does not allow"),
    ],
    ids=["AUTH without a token", "AUTH with a token", "token", "authorize"],
)
def test_check_sound_site(
    quick_check: QuickCheck, configure: Any, config: dict[str, Any], query: str, skipped: str | None
) -> None:
    """A sound site gets no cross. A check that cannot be made is skipped, with the reason."""
    with Server(configure, **config) as server:
        found = quick_check(f"http://127.0.0.1:{server.port}/ws{query}")
    assert False not in found
    assert "visitors get a WebSocket" in found[True]
    assert (None in found) == (skipped is not None)
    assert (skipped or "") in found.get(None, "")


def test_check_ipv6_address(quick_check: QuickCheck) -> None:
    """The origin of the page has the port and the brackets, as browsers send it."""
    with Server() as server:
        ipv6 = make_server("::1", 0, server.app, threaded=True)
        server.app.config["SWIFTCMS_WS_ORIGINS"] = [f"http://[::1]:{ipv6.port}"]
        with running([functools.partial(ipv6.serve_forever, 0.02)]):
            try:
                assert False not in quick_check(f"http://[::1]:{ipv6.port}")
            finally:
                ipv6.shutdown()
                ipv6.server_close()


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"ORIGINS": "*"}, "a page of another site is refused", "set SWIFTCMS_WS_ORIGINS"),
        (
            {"MAX_CONNECTIONS": 5},
            "of 8 clients at once, only ",
            "SWIFTCMS_WS_MAX_CONNECTIONS is reached",
        ),
    ],
    ids=["ORIGINS", "MAX_CONNECTIONS"],
)
def test_check_wrong_configuration(
    quick_check: QuickCheck, config: dict[str, Any], message: str, hint: str
) -> None:
    """A wrong configuration is one cross, with a hint below it."""
    with Server(**config) as server:
        found = quick_check(f"ws://127.0.0.1:{server.port}/ws")
    cross, below = found[False].strip().splitlines()
    assert message in cross
    assert hint in below


HTTP_HEAD = "HTTP/1.1 {} No\r\n{}Content-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (200, "The answer is a page"),
        (301, "cannot follow this redirect"),
        (401, "not a valid token of this site"),
        (403, "pass the Host header"),
        (404, "Is this the right address"),
        (426, "removes the headers Upgrade and Connection"),
        (500, "the proxy cannot reach it"),
        (501, "gunicorn, waitress or `flask run`"),
        (502, "the proxy cannot reach it"),
        (503, "SWIFTCMS_WS_MAX_CONNECTIONS is reached"),
    ],
)
def test_check_refused_handshake(quick_check: QuickCheck, status: int, hint: str) -> None:
    """Each HTTP status of a refused handshake is a cross with a hint of its own."""
    with answering(HTTP_HEAD.format(status, "").encode()) as address:
        found = quick_check(address)
    assert found.keys() == {False}
    assert hint in found[False]


@pytest.mark.parametrize("target", ["https://www.example.org/ws", "/ws"])
def test_check_redirect_that_cannot_be_followed(quick_check: QuickCheck, target: str) -> None:
    """A redirect to another host, or to itself, is a cross that names the target."""
    with answering(HTTP_HEAD.format(301, f"Location: {target}\r\n").encode()) as address:
        found = quick_check(address)
    assert f"a redirect to {target}" in found[False]
    assert "cannot follow" in found[False]


def test_check_redirect_to_the_same_host(server: Server, quick_check: QuickCheck) -> None:
    """It is followed once, because sites redirect to HTTPS or to an address with a slash."""
    target = f"127.0.0.1:{server.port}/ws"
    with answering(HTTP_HEAD.format(301, f"Location: http://{target}\r\n").encode()) as address:
        found = quick_check(address)
    assert f"redirects to ws://{target}, which is checked" in found[True]
    assert False not in found


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is this its port"),
        (b"", "is this its port"),
        (None, "does not answer"),
    ],
    ids=["no HTTP", "closed", "silent"],
)
def test_check_other_server(
    quick_check: QuickCheck, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str
) -> None:
    """A server that does not speak HTTP is a cross, without a traceback."""
    monkeypatch.setattr(swiftcms_ws, "REPLY_TIMEOUT", 0.3)
    with answering(answer) as address:
        found = quick_check(address)
    assert found.keys() == {False}
    assert words in found[False]


def test_check_other_websocket(quick_check: QuickCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WebSocket of another application, which sends no greeting, is a cross."""
    monkeypatch.setattr(swiftcms_ws, "REPLY_TIMEOUT", 0.3)

    def configure(app: Flask, hub: Hub) -> None:
        Sock(app).route("/other")(lambda ws: ws.receive())

    with Server(configure) as server:
        found = quick_check(f"127.0.0.1:{server.port}/other")
    assert "not one of swiftcms-ws" in found[False]


@pytest.mark.parametrize(
    ("configure", "proxy", "found"),
    [
        (
            None,
            {"old": rb"Upgrade: websocket\r\n", "new": b""},
            {
                False: ["get no WebSocket", "426", "removes the headers Upgrade"],
                True: ["instead, they get a stream"],
            },
        ),
        (
            None,
            {"old": rb"Host: [^\r]*", "new": b"Host: backend:8000"},
            {
                False: ["get no WebSocket", "403", "pass the Host header"],
                True: ["instead, they get a stream"],
            },
        ),
        (
            None,
            {"is_buffering": True},
            {True: ["get a WebSocket"], False: ["without it, they poll", "buffering off"]},
        ),
        (
            hide_socket,
            {},
            {None: ["get no WebSocket", "501"], True: ["instead, they poll", "cannot stream"]},
        ),
    ],
    ids=["no Upgrade", "another Host", "buffering", "no socket"],
)
def test_check_transport_of_a_visitor(
    quick_check: QuickCheck, configure: Any, proxy: Any, found: dict[bool | None, list[str]]
) -> None:
    """It names the transport of a visitor's browser, and the remedy if that is no WebSocket."""
    with Server(configure) as server, ChangingProxy(server.port, **proxy) as changing:
        result = quick_check(f"127.0.0.1:{changing.port}")
    for kind, words in found.items():
        assert [word for word in words if word not in result[kind]] == []
    assert result.keys() == found.keys()


# == 18. Demo ======================================================================================


# -- The server ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_stops(number: int) -> None:
    """Ctrl+C and SIGTERM close connections with 1001. The exit code is 0, with no more output."""
    with running_demo("--port", "0") as (popen, line):
        with Client(port_of(line)) as client:
            popen.send_signal(number)
            assert client.closing().code == 1001
        assert popen.wait(PATIENCE) == 0
        assert popen.stdout is not None
        assert popen.stdout.read() == ""


def test_demo_beside_another_program_on_ipv6() -> None:
    """Another program may have the port on [::1], where browsers look first for localhost.

    No file can be written meanwhile, as on a read-only disk.
    """
    no_files = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with running_demo("--port", str(port), preexec_fn=no_files) as (_, line):
            assert line.startswith(f"SwiftCMS demo: http://127.0.0.1:{port}/ ")
            assert b"SwiftCMS" in http(f"http://127.0.0.1:{port}/")[2]
            with Client(port) as client:
                client.subscribe()


def test_demo_on_all_addresses() -> None:
    """With --host 0.0.0.0, the line has the address that other computers in the network use."""
    with running_demo("--host", "0.0.0.0", "--port", "0") as (_, line):
        own, others = re.findall(r"http://\S+/", line)
        assert own.startswith("http://127.0.0.1:")
        assert not others.startswith(("http://127.", "http://0."))
        assert b"SwiftCMS" in http(others)[2]


def test_demo_on_a_port_in_use(demo: Process) -> None:
    """The error is one line without a traceback, and names the option."""
    run = subprocess.run(
        [sys.executable, "swiftcms_ws.py", "--port", str(demo.port)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "--port" in run.stderr


# -- The API ---------------------------------------------------------------------------------------


@pytest.mark.core
def test_demo_entries(demo: Process) -> None:
    """Each change publishes one event. A wrong or outdated one is refused, and publishes none.

    The environment of this demo names a shared log that cannot be reached: it is not used.
    """
    with demo.client() as client:
        client.subscribe("content.*")
        status, entry = demo_api(demo, "POST", "posts", {"title": "New"})
        assert (status, entry["title"], entry["state"]) == (201, "New", "draft")
        path = f"posts/{entry['id']}"
        change = {"title": "Newer", "body": "text", "version": 1}
        assert demo_api(demo, "PUT", path, change)[1]["version"] == 2
        status, refusal = demo_api(demo, "PUT", path, {**change, "title": "Too late"})
        assert (status, refusal["entry"]["title"]) == (409, "Newer")
        assert demo_api(demo, "POST", f"{path}/publish", {})[1]["state"] == "published"
        assert demo_api(demo, "DELETE", path)[0] == 200
        assert demo_api(demo, "GET", path)[0] == 404
        for wrong in ({"title": ""}, []):
            assert demo_api(demo, "POST", "posts", wrong)[0] == 400
        types = ["content.created", "content.updated", "content.published", "content.deleted"]
        assert [message["type"] for message in client.rest()] == types


def test_demo_notices(demo: Process) -> None:
    """A notice reaches its recipient alone."""
    with demo.client() as client:
        signed = demo_api(demo, "GET", "token?user=ana")[1]["token"]
        assert client.authenticate(signed)["payload"]["userId"] == "ana"
        client.subscribe("notification")
        demo_api(demo, "POST", "notices", {"to": "bob", "text": "not for ana"})
        demo_api(demo, "POST", "notices", {"to": "ana", "text": "hello"})
        assert [message["payload"]["text"] for message in client.rest()] == ["hello"]


def test_demo_keeps_fifty_entries(demo: Process) -> None:
    """The oldest entries are deleted for new ones, with an event each."""
    first = [
        entry["id"] for kind in ("pages", "posts") for entry in demo_api(demo, "GET", kind)[1]
    ]
    with demo.client() as client:
        client.subscribe("content.deleted")
        for number in range(50):
            demo_api(demo, "POST", "posts", {"title": str(number)})
        assert [each["payload"]["id"] for each in client.receive_many(3)] == first
    assert len(demo_api(demo, "GET", "posts")[1]) == 50


def test_demo_cut(demo: Process) -> None:
    """A page can break its own connection, without a close frame, and no other one."""
    with demo.client(path="/ws?page=one") as one, demo.client(path="/ws?page=two") as two:
        # The demo learns the key a little after the handshake.
        until(lambda: demo_api(demo, "POST", "cut", {"key": "one"})[0] == 200, "the cut")
        assert one.closing().code is None
        assert two.ask("heartbeat")["type"] == "system.heartbeat"
    status, answer = demo_api(demo, "POST", "cut", {"key": "three"})
    assert (status, answer["message"]) == (404, "this page has no open connection")


@pytest.mark.parametrize(
    ("address", "header", "status"),
    [
        ("192.0.2.7", {}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.7"}, 403),
        ("::1", {"Via": "1.1 proxy"}, 403),
        ("127.0.0.1", {}, 200),
        ("::ffff:127.0.0.1", {}, 200),
    ],
)
def test_demo_reset(address: str, header: dict[str, str], status: int) -> None:
    """Only the computer that serves the demo may reset it, and its page has the button."""
    app = swiftcms_ws.demo_app()
    client = app.test_client()
    options: Any = {"environ_base": {"REMOTE_ADDR": address}, "headers": header}
    try:
        assert ('id="reset"' in client.get("/", **options).text) == (status == 200)
        client.post("/api/posts", json={"title": "Mine"})
        assert client.post("/api/reset", json={}, **options).status_code == status
        titles = [entry["title"] for entry in client.get("/api/posts").json]
        assert ("Mine" in titles) == (status != 200)
    finally:
        with app.app_context():
            swiftcms_ws.hub.engine_of(app).begin_closing()
            swiftcms_ws.hub.engine_of(app).finish_closing(time.monotonic() + 5)


# -- The page --------------------------------------------------------------------------------------


@needs_chromium
def test_demo_inspector(browser: Browser, demo: Process) -> None:
    """The inspector explains each message and shows its JSON, also in a burst of long messages."""
    page = browser.page(f"http://localhost:{demo.port}/ws")
    log_has(page, "connected you are client")
    submit(page, "#ask")
    log_has(page, "subscribed from now on")
    demo_api(demo, "POST", "posts", {"title": "<b>On the wire</b>"})
    log_has(page, "content.created post “<b>On the wire</b>” by nobody")
    submit(page, "#write", text="nonsense")
    log_has(page, "error invalid_json")
    for number in range(60):
        demo_api(demo, "POST", "posts", {"title": f"long {number}", "body": "x" * 10_000})
    log_has(page, "“long 59”")
    rows = "[...document.querySelectorAll('#log li')]"
    page.js(f"{rows}.find(row => row.textContent.includes('“long 59”')).click()")
    assert "x…" in page.js("document.querySelector('#json').textContent")
    # With the keyboard: another row, and another field of it.
    for key in ("ArrowUp", "ArrowRight"):
        event = f"new KeyboardEvent('keydown', {{key: '{key}'}})"
        page.js(f"document.querySelector('#log').dispatchEvent({event})")
    assert page.js("document.querySelector('#explanation b').textContent") == "message"
    assert "message" in page.js("document.querySelector('#json .focused').textContent")
    press(page, "#toggle")
    log_has(page, "closed 1000, as you asked")
    # The number of rows is limited.
    page.js("for (let i = 0; i < 350; i++) document.querySelector('#write').requestSubmit()")
    page.wait("document.querySelectorAll('#log li').length === 300")
    assert page.complaints() == []
    page.close()


@needs_chromium
def test_demo_two_editors(browser: Browser, demo: Process) -> None:
    """Each sees the other one and their text, and is asked before their work is overwritten.

    If a browser is killed, its user stops editing.
    """
    others = "document.querySelector('#others').textContent"
    title = "document.querySelector('#editor').elements.title"
    edit = "#entries li:first-child button"
    ana = browser.page(f"http://localhost:{demo.port}/")
    with Browser() as other_browser:
        bob = other_browser.page(f"http://localhost:{demo.port}/")
        for page, name in ((ana, "ana"), (bob, "bob")):
            sign_in(page, name)
            press(page, edit)
        ana.wait(f"{others}.includes('bob')")
        bob.wait(f"{others}.includes('ana')")
        bob.js(f"{title}.value = 'Bob was here'")
        bob.js(f"{title}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        ana.wait(f"{others}.includes('typing “Bob was here”')")
        submit(bob, "#editor")
        ana.wait("document.querySelector('#entries').textContent.includes('Bob was here')")
        submit(ana, "#editor")
        ana.wait("!document.querySelector('#conflict').hidden")
        assert "bob saved version 2" in ana.js("document.querySelector('#refusal').textContent")
        press(ana, "#theirs")
        assert ana.js(f"{title}.value") == "Bob was here"
        press(bob, edit)
        ana.wait(f"{others}.includes('bob')")
        other_browser.kill()
        ana.wait(f"!{others}.includes('bob')")
    assert [line for line in ana.complaints() if "409" not in line] == []
    ana.close()


BLOCKED_STORAGE = """Object.defineProperty(window, "sessionStorage", {
  get() { throw new DOMException("blocked", "SecurityError"); },
});"""


@needs_chromium
def test_demo_with_blocked_storage(browser: Browser, lesson_site: LessonSite) -> None:
    """Both halves work in a browser that blocks cookies and storage."""
    page = browser.page(f"{lesson_site.url}#lesson-1", before=BLOCKED_STORAGE)
    sign_in(page, "Tom")
    # A message that is sent while the connection opens is not lost.
    page.js("for (const id of ['#toggle', '#ask button']) document.querySelector(id).click()")
    log_has(page, "subscribed from now on")
    submit(page, "#tell", to="ben", text="a secret")
    log_has(page, "from Tom: a secret: it was for ben only")
    assert "not sent" not in page.js("document.querySelector('#log').textContent")
    assert page.complaints() == []
    page.close()


@needs_chromium
def test_demo_after_a_restart(browser: Browser, tmp_path: Path) -> None:
    """Both halves reconnect to the new server, and show lost and new events."""
    (tmp_path / "lesson_site.py").write_text(LESSON_SITE)
    port = free_port()
    server = (sys.executable, "lesson_site.py", str(port))
    entries = "document.querySelector('#entries').textContent"
    with Process(*server, cwd=tmp_path, port=port) as first:
        page = browser.page(f"http://localhost:{port}/")
        sign_in(page, "Tom")
        press(page, "#toggle")
        log_has(page, "connected you are client")
        submit(page, "#ask")
        log_has(page, "subscribed from now on")
        demo_api(first, "POST", "posts", {"title": "Soon forgotten"})
        page.wait(f"{entries}.includes('Soon forgotten')")
    log_has(page, "connection lost")
    with Process(*server, cwd=tmp_path, port=port) as second:
        log_has(page, "subscribed but what you missed is gone")
        page.wait(f"!{entries}.includes('Soon forgotten')")
        demo_api(second, "POST", "posts", {"title": "New"})
        log_has(page, "content.created post “New”")
        page.wait(f"{entries}.includes('New')")
        page.close()


# == 19. client.js and pages =======================================================================


# -- Files and caching -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["none", "wrong", "right"])
def test_client_js_caching(server: Server, version: str) -> None:
    """Browsers ask for client.js each time, unless its address has the hash of the file."""
    with server.app.test_request_context():
        right = server.app.url_for("swiftcms_ws.client_js")
    wrong = "/ws/client.js?v=0123456789abcdef"
    path = {"none": "/ws/client.js", "wrong": wrong, "right": right}[version]
    status, headers, body = server.get(path)
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/javascript")
    assert b"SwiftCMS" in body
    for_a_year = {"max-age=31536000", "immutable", "public"}
    caching = set(headers["Cache-Control"].split(", "))
    assert caching == (for_a_year if version == "right" else {"no-cache"})
    assert server.get(path, If_None_Match=headers["ETag"])[0] == 304


def test_client_js_address(server: Server) -> None:
    """url_for() adds the hash of the file, which depends on the path prefix of the site."""
    app = server.app
    with app.test_request_context():
        plain = app.url_for("swiftcms_ws.client_js")
        assert "v=" not in app.url_for("swiftcms_ws.about")
    with app.test_request_context(environ_overrides={"SCRIPT_NAME": "/site"}):
        prefixed = app.url_for("swiftcms_ws.client_js")
    assert re.fullmatch(r"/ws/client\.js\?v=[0-9a-f]{16}", plain)
    assert re.fullmatch(r"/site/ws/client\.js\?v=[0-9a-f]{16}", prefixed)
    assert plain.partition("=")[2] != prefixed.partition("=")[2]


@pytest.mark.parametrize(("prefix", "path"), [("", '"/ws"'), ('/si"te', r'"/si\"te/ws"')])
def test_client_js_path_of_websocket(server: Server, prefix: str, path: str) -> None:
    """The path is written into client.js as JavaScript, whatever the prefix of the site is."""
    environ = {"SCRIPT_NAME": prefix}
    response = server.app.test_client().get("/ws/client.js", environ_overrides=environ)
    assert f"const WEBSOCKET_PATH = {path};" in response.text


@pytest.mark.core
@pytest.mark.parametrize(("kind", "mimetype"), [("js", "text/javascript"), ("css", "text/css")])
def test_inspector_files(kind: str, mimetype: str) -> None:
    """The inspector's files are served only if it is enabled, and sent again only if changed."""
    path = f"/ws/inspector.{kind}"
    with Server(INSPECTOR=True) as server:
        assert b'href="ws/inspector.css"' in server.get("/ws")[2]
        status, headers, _ = server.get(path)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, mimetype)
        assert headers["Cache-Control"] == "no-cache"
        assert server.get(path, If_None_Match=headers["ETag"])[0] == 304
    with Server(INSPECTOR=False) as server:
        assert server.get(path)[0] == 404


# Functions that browsers have had since Chrome 99, Firefox 105 or Safari 16.5, or later.
TOO_NEW = (
    r"\.(toSorted|toReversed|toSpliced|with|fromAsync|groupBy|withResolvers|isSubsetOf)\(|"
    r"\b(AbortSignal\.any|Promise\.try|URL\.parse|Iterator\.from)\b"
)


@pytest.mark.parametrize("path", ["", "demo.js", "ws/inspector.js", "ws/client.js"])
def test_files_oldest_browsers(lesson_site: LessonSite, path: str) -> None:
    """Scripts call no function that the oldest browsers of README do not have."""
    status, _, text = http(f"http://127.0.0.1:{lesson_site.port}/{path}")
    assert status == 200
    assert re.search(TOO_NEW, text.decode()) is None


def test_readme_oldest_browsers() -> None:
    """README names the oldest browsers. CI's linter refuses newer syntax than theirs, ES2022."""
    assert "Chrome or Edge 98, Firefox 104, Safari 16.4" in README
    linter = (HERE / ".ci" / "embedded" / "eslint.config.js").read_text()
    assert "ecmaVersion: 2022" in linter


@pytest.mark.parametrize("origin", ["null", "file://"])
def test_page_opened_as_file(
    server: Server, caplog: pytest.LogCaptureFixture, origin: str
) -> None:
    """Browsers send one of these origins for it. The log and the answer name the remedy."""
    status, _, body = server.handshake(Origin=origin)
    assert (status, "through http://" in body["message"]) == (403, True)
    assert only_log_line(caplog, "open it through http://")


# -- Clients of the seed and of version 1.0.0 ------------------------------------------------------


def test_seed_javascript_example(browser: Browser) -> None:
    """The seed's JavaScript works unchanged. Its port 8080 is replaced by a free one."""
    if not SEED.exists():
        pytest.skip(f"{SEED} is not beside this checkout")
    example = re.search(r"```javascript\n(.*?)```", SEED.read_text(), re.S)
    assert example is not None
    script = f"""
        var created = []; function handleContentCreated(payload) {{ created.push(payload) }}
        {example[1]}
        var beats = 0;
        ws.addEventListener('message', e => beats += e.data.includes('system.heartbeat'));
    """

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/", view_func=lambda: html(f"<script>{script}</script>"))

    with Server(configure, HEARTBEAT=0.3) as server:
        url = f"url.replace('ws://localhost:8080/', 'ws://localhost:{server.port}/')"
        before = f"WebSocket = class extends WebSocket {{ constructor(url) {{ super({url}) }} }}"
        page = browser.page(f"http://localhost:{server.port}/", before=before)
        until(lambda: server.hub.stats()["subscriptions"] == 1, "the subscription")
        server.hub.publish("content.created", "pages", {"id": 1})
        server.hub.publish("content.updated", "posts", {"id": 2})
        server.hub.publish("content.created", "posts", {"id": 3})
        page.wait("created.length")
        assert page.js("created") == [{"id": 3}]
        page.wait("beats")
        page.js("ws.close()")
        until(lambda: server.hub.stats()["connections"] == 0, "the close")
        page.wait("ws.readyState === 3")
        assert page.complaints() == []
        page.close()


def test_seed_swift_example() -> None:
    """The messages of the seed's Swift example get the answers that it expects."""
    with Server(HEARTBEAT=0.2) as server, server.client(greeted=False) as client:
        client.send(action="authenticate", token=server.hub.issue_token("ana"))
        client.send(action="subscribe", type="content.*", contentType="posts")
        types = []
        published = iter(("created", "updated", "deleted", "published"))
        while len(types) < 12:
            message = client.receive(heartbeats=True)
            types.append(message["type"])
            if message["type"] == "system.heartbeat":
                client.send(action="pong")
                server.publish(1, f"content.{next(published, 'created')}")
        assert types[:3] == ["system.connected", "system.authenticated", "system.subscribed"]
        events = [each.removeprefix("content.") for each in types if each.startswith("content.")]
        assert events[:4] == ["created", "updated", "deleted", "published"]
        assert client.close(1001).code == 1001


def test_client_js_of_version_1(browser: Browser, version_1_client: str) -> None:
    """A page that stays open while the site is updated resumes, learns of a gap, and edits."""

    def configure(app: Flask, hub: Hub) -> None:
        old = Response(version_1_client, mimetype="text/javascript")
        app.add_url_rule("/old/ws/client.js", "old", lambda: old)
        page = live_page(
            "const gapped = [], cms = record(new SwiftCMS({url: '/ws'}));"
            "cms.ongap = ({type, contentType}) => gapped.push(`${type} ${contentType}`);"
            "cms.subscribe('content.*', 'posts', take);"
            "cms.subscribe('content.created', '*', () => {});"
            "const shown = [], edit = cms.edit('posts', '1');"
            "edit.oneditors = (editors, conflict) => shown.push(conflict);",
            client="/old/ws/client.js",
        )
        app.add_url_rule("/old", "old_page", lambda: page)

    site = visit(browser, "", configure, path="/old", HISTORY=5, HEARTBEAT=0.3)
    with site as (page, server, proxy):
        server.publish(1)
        page.wait("got.length === 1")
        proxy.cut()
        server.publish(2)
        page.wait("got.length === 2")
        online(page)
        assert page.js("[got, gapped]") == [[1, 2], []]
        page.wait("received.filter(({type}) => type === 'system.heartbeat').length > 2")
        with server.client() as other:
            other.ask("editStart", contentType="posts", entryId="1")
            page.wait("shown.at(-1) === true")
        proxy.cut()
        for number in range(10, 20):
            server.publish(number)
        page.wait("gapped.length === 2 && statuses.at(-1) === 'online'")
        server.publish(20)
        page.wait("got.at(-1) === 20")
        assert page.complaints() == []


# -- Connecting ------------------------------------------------------------------------------------


SUBSCRIBE_TO_ALL = "const cms = record(new SwiftCMS()); cms.subscribe('*', '*', take);"

SHARED_WORKER = """
  importScripts("/live/ws/client.js");
  const cms = new SwiftCMS(), got = [];
  cms.subscribe("*", "*", ({payload}) => got.push(payload.n));
  onconnect = ({ports: [port]}) => { port.onmessage = () => port.postMessage(got); };
"""

# Pages in which client.js is not the current script, so that it does not know its own address.
EMBEDDINGS = {
    "module": f"<script>{RECORD}</script><script type=module>"
    f"import '/live/ws/client.js'; {SUBSCRIBE_TO_ALL}</script>",
    "bundle": f"<script>{RECORD}</script><script src=/bundle.js></script>",
    "worker": "<script>const worker = new SharedWorker('/worker.js'); worker.port.start();"
    "let got = []; worker.port.onmessage = ({data}) => { got = data; };"
    "setInterval(() => worker.port.postMessage(0), 50);</script>",
}


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_client_js_connect_embedded(browser: Browser, embedding: str) -> None:
    """In a module, a bundle and a worker, client.js has the path that Flask wrote into it."""
    site_hub = Hub()

    def configure(app: Flask, hub: Hub) -> None:
        def script(text: str) -> Response:
            return Response(text, mimetype="text/javascript")

        def bundle() -> Response:
            client_js = app.test_client().get("/live/ws/client.js").text
            return script(client_js + SUBSCRIBE_TO_ALL)

        site_hub.init_app(app, url_prefix="/live", name="live")
        app.add_url_rule("/", "page", lambda: html(EMBEDDINGS[embedding]))
        app.add_url_rule("/bundle.js", "bundle", bundle)
        app.add_url_rule("/worker.js", "worker", lambda: script(SHARED_WORKER))

    with Server(configure) as server, contextlib.closing(site_hub):
        page = browser.page(f"http://localhost:{server.port}/")
        until(lambda: site_hub.stats()["subscriptions"] == 1, "the subscription")
        with server.app.app_context():
            site_hub.publish("content.created", "posts", {"n": 1})
        page.wait("got.length === 1")
        assert page.complaints() == []
        page.close()


@pytest.mark.parametrize("path", ["script", "base"])
def test_client_js_connect_behind_prefix(browser: Browser, path: str) -> None:
    """The address of the script, or the page's base, goes before the path that Flask wrote."""

    def configure(app: Flask, hub: Hub) -> None:
        based = live_page(
            "history.pushState(0, '', '/elsewhere/deep');"
            "const cms = record(new SwiftCMS({url: 'ws'})); cms.subscribe('*', '*', take);",
            client="/prefix/ws/client.js",
        )
        based = based.replace("<title>", "<base href='/prefix/'><title>")
        app.add_url_rule("/script", "script", lambda: live_page(client="ws/client.js"))
        app.add_url_rule("/base", "base", lambda: based)

    with Server(configure) as server, PrefixProxy(server.port) as proxy:
        page = browser.page(f"http://localhost:{proxy.port}/prefix/{path}")
        online(page)
        assert page.complaints() == []
        page.close()


@pytest.mark.parametrize("address", ["localhost:5000/ws", "/ws#part", "ftp://localhost/ws"])
def test_client_js_connect_invalid_address(either: Any, address: str) -> None:
    """An address that can never work is refused at once, with the reason in the console."""
    script = f"record(new SwiftCMS({{url: '{address}'}})).subscribe('*', '*', take);"
    with visit(either, script, is_online=False) as (page, _, _):
        page.wait("statuses.at(-1) === 'refused'")
        assert page.js("statuses") == ["connecting", "refused"]
        shown = "ws:" if address.startswith("/") else address
        console_has(page, f"cannot connect to {shown}")


def test_client_js_connect_shared(browser: Browser) -> None:
    """Objects share one WebSocket, and each closes its own subscriptions. The last closes it."""
    with visit(browser) as (page, server, _):
        page.js(
            "var other = new SwiftCMS(), others = [], seen = [];"
            "other.onstatus = status => seen.push(status); 0"
        )
        page.js("other.subscribe('content.*', 'posts', ({payload}) => others.push(payload.n)); 0")
        page.wait("seen.length")
        server.publish(1)
        page.wait("got.length === 1 && others.length === 1")
        assert page.js("seen") == ["online"]
        assert server.hub.stats()["connections"] == 1
        page.js("cms.close(); cms.close()")
        server.publish(2)
        page.wait("others.length === 2")
        assert page.js("[got, statuses]") == [[1], ["connecting", "online", "offline"]]
        page.js("other.close()")
        until(lambda: server.hub.stats()["connections"] == 0, "the close of the WebSocket")
        page.js("var again = new SwiftCMS(); again.subscribe('*', '*', take); 0")
        until(lambda: server.hub.stats()["subscriptions"] == 1, "a new WebSocket")
        page.js("var apart = new SwiftCMS({url: '/ws'}); 0")
        until(lambda: server.hub.stats()["connections"] == 2, "one for an object with a url")
        assert page.complaints() == []


def test_client_js_connect_and_leave(either: Any, set_times: Callable[..., None]) -> None:
    """Pages that are left keep no connection open. One to which the visitor returns resumes."""
    # A busy machine does not try plain HTTP meanwhile.
    set_times(FIRST_WAIT=10_000)
    # Firefox closes WebSockets a little before a page is left. It does not reconnect so soon.
    before = "Math.random = () => 1;"
    script = SIMPLE + "var kept; const edit = cms.edit('posts', location.search.slice(1) || '0');"
    script += "const restored = []; addEventListener('pageshow', e => restored.push(e.persisted));"
    with visit(either, script, before=before) as (page, server, _):
        for number in range(1, 4):
            go(page, f"/?{number}")
            online(page)
            until(lambda: server.hub.stats()["connections"] == 1, "one connection")
        assert server.hub.editors("posts", "0") == []
        assert len(server.hub.editors("posts", "3")) == 1
        page.js("setTimeout(() => history.go(-1)); 0")
        settle(page, "/?2")
        page.js("kept = true")
        go(page, "/?other")
        online(page)
        server.publish(1)
        page.js("setTimeout(() => history.back()); 0")
        settle(page, "/?2")
        if page.js("kept"):
            # The page comes from the browser's cache, and gets the events that it missed there.
            page.wait("got.length === 1 && statuses.at(-1) === 'online'")
            assert page.js("restored.at(-1)") is True
            assert "offline" not in page.js("statuses")
        else:
            assert not isinstance(either, Browser), "Chromium's back/forward cache is off"
            online(page)
        until(lambda: server.hub.stats()["connections"] == 1, "one connection")
        assert page.complaints() == []


# -- Resuming --------------------------------------------------------------------------------------


def test_client_js_resume(either: Any) -> None:
    """After a cut, one message carries all subscriptions, and all events arrive once, in order.

    Such a short loss is "connecting", not "offline".
    """
    script = SIMPLE + "const other = [], edit = cms.edit('posts', '1');"
    script += "cms.subscribe('content.created', '*', ({payload}) => other.push(payload.n));"
    script += "cms.subscribe('content.created', '*', () => {});"
    with visit(either, script) as (page, server, proxy):
        last = server.publish(1)
        page.wait("got.length === 1")
        page.js("sent.length = 0")
        proxy.cut()
        server.publish(2)
        server.publish(3, "content.deleted")
        page.wait("got.length === 3 && onlines() === 2")
        pairs = {
            ("content.*", "posts"),
            ("content.created", "*"),
            ("user.editing", "posts"),
            ("user.stoppedEditing", "posts"),
        }
        (message,) = page.js("subscribes()")
        assert message["since"] == last
        assert {(each["type"], each["contentType"]) for each in message["subscriptions"]} == pairs
        assert page.js("[got, other, gaps]") == [[1, 2, 3], [1, 2], []]
        assert page.js("statuses") == ["connecting", "online", "connecting", "online"]
        page.wait("edit.editors.length === 1")


def test_client_js_resume_nothing_older(browser: Browser) -> None:
    """A subscription gets events from its own start on: the time of the call, or `since`."""
    with serving() as server, Proxy(server.port) as proxy:
        first = server.publish(1)
        server.publish(2)
        page = browser.page(f"http://localhost:{proxy.port}/", before=NO_WAIT)
        online(page)
        page.js(
            f"var older = [], later = new SwiftCMS({{since: '{first}'}});"
            "later.subscribe('content.*', '*', ({payload}) => older.push(payload.n)); 0"
        )
        page.wait("older.length === 1")
        server.publish(3)
        page.wait("got.length === 1 && older.length === 2")
        page.js(
            "var early = []; cms.onstatus = status => { if (status === 'connecting')"
            " cms.subscribe('*', '*', ({payload}) => early.push(payload.n)); }; 0"
        )
        proxy.cut()
        server.publish(4)
        page.wait("early.length === 1 && got.length === 2 && older.length === 3")
        assert page.js("[got, older, early, gaps]") == [[3, 4], [2, 3, 4], [4], []]
        page.close()


def test_client_js_resume_different_places(browser: Browser) -> None:
    """Objects with different `since` subscribe with one message each, and each gets its events."""
    script = """
      const [, first, second] = location.hash.split(":"), a = [], b = [];
      const wide = record(new SwiftCMS({since: first})), narrow = new SwiftCMS({since: second});
      narrow.subscribe("content.*", "*", ({payload}) => b.push(payload.n));
      wide.subscribe("content.*", "posts", ({payload}) => a.push(payload.n));
    """
    with serving(script) as server, Proxy(server.port) as proxy:
        first, second = server.publish(1), server.publish(2)
        server.publish(3)
        page = browser.page(f"http://localhost:{proxy.port}/#:{first}:{second}", before=NO_WAIT)
        online(page)
        assert page.js("subscribes().map(({since}) => since)") == [second, first]
        assert page.js("[a, b].map(list => list.toSorted())") == [[2, 3], [3]]
        proxy.cut()
        server.publish(4)
        page.wait("a.length === 3 && b.length === 2")
        assert page.js("subscribes().length") == 3
        assert server.hub.stats()["connections"] == 1
        page.close()


def test_client_js_resume_during_replay(browser: Browser) -> None:
    """If long replays are cut again and again, every handler has every event once, in order.

    Subscriptions that are added meanwhile have every event from their first one on.
    """
    chance = random.Random(23)
    script = """
      const all = [], later = [];
      cms.subscribe("*", "*", ({payload}) => all.push(payload.n));
      const add = type => {
        const list = [];
        later.push(list);
        cms.subscribe(type, "posts", ({payload}) => list.push(payload.n));
      };
    """
    options = {"HEARTBEAT": 0.2, "RATE": 1000, "HISTORY": 50_000}
    with visit(browser, SIMPLE + script, **options) as (page, server, proxy):
        stop, published = threading.Event(), []

        def publish(number: int) -> None:
            server.publish(number, filling="x" * 3000)

        publisher = threading.Thread(
            target=lambda: published.extend(publish_steadily(publish, stop, 200))
        )
        publisher.start()
        try:
            for number in range(16):
                page.js("statuses.length = received.length = 0")
                proxy.cut()
                if number % 2:
                    page.js(f"add('{chance.choice(['*', 'content.*', 'content.created'])}')")
                # Until the replay arrives, or a little later.
                page.wait("received.at(-1)?.payload?.replayed || statuses.at(-1) === 'online'")
                threading.Event().wait(chance.uniform(0, 0.03))
                page.js("add('content.*')")
        finally:
            stop.set()
            publisher.join(PATIENCE)
        # The last subscription may have come after all others.
        publish(len(published))
        published.append(len(published))
        page.wait(
            f"[got, all, ...later].every(list => list.at(-1) === {published[-1]})", timeout=60
        )
        online(page)
        assert page.js("got") == published
        assert page.js("all") == published
        lists = page.js("later")
        assert len(lists) == 24
        for each in lists:
            assert each == published[each[0] :]
        assert page.js("gaps") == []


def test_client_js_resume_from_heartbeat(browser: Browser) -> None:
    """A client that gets no events resumes from the last heartbeat: older ids may be forgotten."""
    with visit(browser, HEARTBEAT=0.3, HISTORY=5) as (page, server, proxy):
        for _ in range(20):
            last = server.hub.publish("content.created", "pages", {})
        page.wait(f"received.some(({{payload}}) => payload.lastId === '{last}')")
        page.js("sent.length = 0")
        proxy.cut()
        server.publish(1)
        page.wait("got.length === 1 && onlines() === 2")
        assert page.js("subscribes()[0].since") == last
        assert page.js("gaps") == []


def test_client_js_gap(browser: Browser) -> None:
    """Lost subscriptions are one call of `ongap` for each object and reconnect, before "online"."""
    script = """
      cms.subscribe("content.created", "*", take);
      cms.edit("posts", "1");
      const other = new SwiftCMS(), others = [];
      other.subscribe("*", "pages", take);
      other.ongap = list => others.push(list.length, statuses.at(-1));
    """
    with visit(browser, SIMPLE + script, HISTORY=2) as (page, server, proxy):
        for cuts in (1, 2):
            with proxy.without_server():
                for number in range(5):
                    server.publish(number)
            page.wait(f"gaps.length === {cuts} && onlines() === {cuts + 1}")
        # The editing of the page is no subscription that lost events.
        assert page.js("gaps") == [["content.* posts", "content.created *"]] * 2
        others = page.js("others")
        assert (others[::2], "online" in others) == ([1, 1], False)
        # The next reconnect resumes from here, without a gap.
        proxy.cut()
        server.publish(10)
        page.wait("got.at(-1) === 10 && onlines() === 4")
        assert page.js("gaps.length") == 2


@pytest.mark.parametrize(
    ("hours_back", "close"), [(0, False), (0, True), (1, False)], ids=["cut", "closed", "clock"]
)
def test_client_js_gap_after_restart(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, hours_back: int, close: bool
) -> None:
    """A server that has lost its history is one gap, and new events arrive, whatever its clock."""
    real = swiftcms_ws.now_milliseconds
    ahead = 3_600_000 * hours_back
    monkeypatch.setattr(swiftcms_ws, "now_milliseconds", lambda: real() + ahead)
    with visit(browser) as (page, server, proxy):
        server.publish(1)
        page.wait("got.length === 1")
        monkeypatch.setattr(swiftcms_ws, "now_milliseconds", real)
        with serving() as restarted:
            proxy.lead_to(restarted.port, cut=not close)
            if close:
                server.hub.close()
            page.wait("gaps.length === 1 && onlines() === 2")
            restarted.publish(2)
            page.wait("got.length === 2")
            proxy.cut()
            restarted.publish(3)
            page.wait("got.length === 3 && onlines() === 3")
            assert page.js("[got, gaps]") == [[1, 2, 3], [["content.* posts"]]]


def test_client_js_gap_invalid_since(browser: Browser) -> None:
    """If the server refuses a `since`, events are lost: ongap, and events arrive from then on."""
    spoil = """
      let count = 0;
      WebSocket = class extends WebSocket {
        send(text) {
          const message = JSON.parse(text);
          if (message.since && !count++) message.since = "nonsense";
          super.send(JSON.stringify(message));
        }
      };
    """
    with visit(browser, before=spoil) as (page, server, _):
        assert page.js("gaps") == [["content.* posts"]]
        server.publish(1)
        page.wait("got.length === 1")
        assert any("invalid_since" in line for line in page.complaints())


def test_client_js_gap_example_of_readme(browser: Browser) -> None:
    """A cached page with a forgotten `since` fetches its data once, and is not loaded again."""
    loads, fetches = [], []
    page_html = ""

    def configure(app: Flask, hub: Hub) -> None:
        @app.get("/page")
        def cached() -> str:
            loads.append(1)
            return page_html

        @app.get("/posts")
        def posts() -> dict[str, Any]:
            fetches.append(1)
            return {"lastId": hub.last_id(), "posts": [{"id": 1, "title": f"{len(fetches)}."}]}

    (example,) = re.findall(r"<!-- browser example: gap -->\n```html\n(.*?)```", README, re.S)
    with serving("", configure, HISTORY=3, HEARTBEAT=0.2) as server:
        old = server.publish(0)
        for number in range(10):
            server.publish(number)
        with server.app.app_context():
            page_html = html(
                render_template_string(example, posts=[], swiftcms_last_id=lambda: old)
            )
        page_html = page_html.replace("</html>", "<input id='typed'></html>")
        page = browser.page(f"http://localhost:{server.port}/page")
        page.js("document.querySelector('#typed').value = 'half a sentence'")
        page.wait("document.body.innerText.includes('1.')")
        server.publish(title="Good news", id=2)
        page.wait("document.body.innerText.includes('Good news')")
        page.js("var beats = 0; new SwiftCMS().onframe = (_, t) => beats += t.includes('beat'); 0")
        page.wait("beats > 3")
        assert (len(loads), len(fetches)) == (1, 1)
        assert page.js("document.querySelector('#typed').value") == "half a sentence"
        page.close()


# -- Status ----------------------------------------------------------------------------------------


def test_client_js_status_offline(either: Any, set_times: Callable[..., None]) -> None:
    """The browser's offline event is "offline" at once, and a cut after two seconds, here 0.3."""
    set_times(OFFLINE_DELAY=300)
    with visit(either, before=COUNT_CONNECTIONS) as (page, server, proxy):
        page.js("var seen; const see = () => { seen = statuses.at(-1) };")
        page.js("addEventListener('offline', () => setTimeout(see)); 0")
        with proxy.without_server(cut=False):
            page.be_offline(True)
            page.wait("seen === 'offline'")
            server.publish(1)
        page.be_offline(False)
        page.wait("got.length === 1 && statuses.at(-1) === 'online'")
        page.js("statuses.length = 0")
        with proxy.without_server():
            page.wait("statuses.at(-1) === 'offline'")
            # It stays offline until it is online again, so that a notice does not flicker.
            page.wait(f"sockets > {page.js('sockets')}")
        online(page)
        assert page.js("[statuses, gaps]") == [["connecting", "offline", "online"], []]


def test_client_js_status_after_download(firefox: Firefox) -> None:
    """Firefox closes WebSockets if a download link is clicked. The wait does not grow by that."""
    script = SIMPLE + "document.body.innerHTML = '<a href=/file id=file>get it</a>';"
    before = "Math.random = () => 1;" + faster_timers("name === 'connect'", 100)
    with visit(firefox, script, with_download, before=before) as (page, server, _):
        for count in (2, 3, 4):
            page.click("#file")
            page.wait(f"onlines() === {count}")
        assert page.js("timers.every(([, time]) => time <= 1_000)")
        assert "offline" not in page.js("statuses")
        server.publish(1)
        page.wait("got.length === 1")


LOGIN = "const cms = record(new SwiftCMS()); cms.subscribe('content.*', 'posts', take);"


@pytest.mark.parametrize(
    ("either", "block"),
    [("chromium", None), ("firefox", None), ("chromium", 403)],
    ids=["chromium", "firefox", "http"],
    indirect=["either"],
)
def test_client_js_status_signed_out(either: Any, block: int | None) -> None:
    """A client that is signed out connects once more: the same user stays, others are refused."""
    options = {"path": "/login/ana/phone", "block": block, "is_online": False}
    with visit(either, LOGIN, with_login, **options) as (page, server, _):
        go(page, "/?")
        online(page)
        # It was another device of this user.
        server.hub.disconnect("ana")
        page.wait("statuses.length === 4")
        assert page.js("statuses") == ["connecting", "online", "connecting", "online"]
        server.publish(1)
        page.wait("got.length === 1")
        page.js("fetch('/logout').then(() => 1)")
        server.hub.disconnect("ana")
        page.wait("statuses.at(-1) === 'refused'")
        until(lambda: server.hub.stats()["connections"] == 0, "the close")
        assert any("signed out" in line for line in page.complaints())
        # Another user of the same browser does not inherit the page.
        again = "fetch('/login/{}/phone').then(() => {{ window.again = new SwiftCMS(); return 1 }})"
        page.js(again.format("bob"))
        page.wait("statuses.length === 8")
        assert page.js("statuses.slice(4)") == ["connecting", "refused"] * 2
        page.js(again.format("ana"))
        page.wait("statuses.at(-1) === 'online'")


@pytest.mark.parametrize("block", [None, 403], ids=["websocket", "http"])
@pytest.mark.parametrize("token", ["undefined", "() => null", "'nonsense'"])
def test_client_js_status_without_token(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, block: int | None, token: str
) -> None:
    """If the server requires a token and the page has no valid one, it does not ask again."""
    monkeypatch.setattr(swiftcms_ws.Expiry, "AUTH_TIMEOUT", 0.3)
    script = f"const cms = record(new SwiftCMS({{token: {token}}})); cms.subscribe('*', '*', take);"
    options = {"block": block, "is_online": False, "AUTH": "required"}
    with visit(browser, script, **options) as (page, server, _):
        page.wait("statuses.at(-1) === 'refused'")
        assert page.js("statuses") == ["connecting", "refused"]
        assert any("will not reconnect" in line for line in page.complaints())
        until(lambda: server.hub.stats()["connections"] == 0, "the close")


def test_client_js_status_expired_token(browser: Browser) -> None:
    """A page with a token that it cannot renew is refused when that expires."""
    with visit(browser, "", is_online=False, AUTH="required") as (page, server, _):
        token_ = server.hub.issue_token("ana", expires_in=1.5)
        page.js(f"var cms = record(new SwiftCMS({{token: '{token_}'}})); 0")
        page.wait("statuses.at(-1) === 'refused'")
        assert page.js("onlines()") == 1
        until(lambda: server.hub.stats()["connections"] == 0, "the close")


# -- Handlers and mistakes of a page ---------------------------------------------------------------


def test_client_js_handler_that_fails(browser: Browser) -> None:
    """A handler may change the event, or fail: other handlers and the resuming are not affected."""
    script = """
      const cms = record(new SwiftCMS());
      cms.subscribe("content.*", "posts", event => Object.assign(event, event.payload, {type: 7}));
      cms.subscribe("content.*", "posts", event => {
        delete event.payload;
        throw new Error("mine");
      });
      cms.subscribe("content.*", "posts", take);
      const edit = cms.edit("posts", "1");
      edit.oneditors = editors => { editors.length = 0; };
    """
    with visit(browser, script) as (page, server, proxy):
        last = server.publish(1, id=7)
        page.wait("got.length === 1")
        page.js("sent.length = 0")
        proxy.cut()
        server.publish(2, id=8)
        page.wait("got.length === 2 && onlines() === 2")
        assert page.js("subscribes().map(({since}) => since)") == [last]
        lines = page.complaints()
        assert len(lines) == 2
        assert all("mine" in line for line in lines)


OPTION = "TypeError: SwiftCMS has no option tokn"
SINCE = "TypeError: since must be the id of an event"
SUBSCRIBE = "TypeError: subscribe(): handler must be a function"


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("new SwiftCMS({tokn: 1})", OPTION),
        ("new SwiftCMS({since: ''})", SINCE),
        ("new SwiftCMS({since: 'undefined'})", SINCE),
        ("new SwiftCMS({since: 7})", SINCE),
        ("new SwiftCMS({since: {}})", SINCE),
        ("new SwiftCMS({since: null})", SINCE),
        ("new SwiftCMS({since: '1-2-3'})", SINCE),
        ("new SwiftCMS({since: '-1'})", SINCE),
        ("cms.subscribe('content.*', 'posts')", SUBSCRIBE),
        ("cms.subscribe('*', '*', '*')", SUBSCRIBE),
        ("cms.subscribe(7, '*', () => {})", SUBSCRIBE),
        ("cms.subscribe(null, '*', () => {})", SUBSCRIBE),
        ("cms.subscribe('*', {}, () => {})", SUBSCRIBE),
        ("cms.close(); cms.subscribe('*', '*', () => {})", "Error: this SwiftCMS is closed"),
        ("new SwiftCMS({since: '1763832000123-0', url}).close()", ""),
        ("new SwiftCMS({since: undefined, url}).close()", ""),
        ("cms.subscribe(undefined, undefined, () => {})", ""),
    ],
)
def test_client_js_mistake(offline_page: Page, expression: str, error: str) -> None:
    """A call with wrong arguments raises an error at once, which names the right ones."""
    found = offline_page.js(f"""(() => {{
        const url = "ws://127.0.0.1/ws", cms = new SwiftCMS({{url}});
        try {{ {expression} }}
        catch (error) {{ return String(error) }}
        finally {{ cms.close() }}
        return "";
    }})()""")
    assert found.startswith(error)
    assert bool(found) == bool(error)


def test_client_js_patterns_left_out(browser: Browser) -> None:
    """undefined is `*`, as in the protocol."""
    script = "const cms = record(new SwiftCMS()); cms.subscribe('content.*', undefined, take);"
    script += "cms.subscribe(undefined, undefined, take);"
    with visit(browser, script) as (page, server, _):
        server.publish(1)
        page.wait("got.length === 2")
        assert page.complaints() == []


def test_client_js_refused_subscription(browser: Browser) -> None:
    """It is named in the console after each reconnect, and the others get their events."""

    def configure(app: Flask, hub: Hub) -> None:
        hub.authorize(lambda user, event_type, content_type: content_type == "posts")

    script = "const cms = record(new SwiftCMS()); cms.subscribe('*', 'secrets', take);"
    script += "cms.subscribe('content.*', 'posts', take);"
    with visit(browser, script, configure) as (page, server, proxy):
        server.hub.publish("content.created", "secrets", {"n": "secret"})
        proxy.cut()
        server.publish(1)
        page.wait("got.length === 1 && onlines() === 2")
        assert page.js("got") == [1]
        refusals = [line for line in page.complaints() if "secrets" in line]
        assert len(refusals) == 2
        assert "forbidden" in refusals[0]


def test_client_js_message_too_big(browser: Browser) -> None:
    """After 1009 it reconnects without the message, is an editor again, and says why."""
    script = EDITOR + "cms.subscribe('*', '*', take);"
    with visit(browser, script, MAX_MESSAGE=2000) as (page, server, _):
        page.js("edit.send('x'.repeat(3000))")
        page.wait("statuses.length === 4")
        assert page.js("statuses") == ["connecting", "online", "connecting", "online"]
        server.publish(1)
        page.wait("got.includes(1)")
        until(lambda: len(server.hub.editors("posts", "1")) == 1, "one editor")
        lines = page.complaints()
        assert any("over the limit of 2000 bytes" in line for line in lines)
        assert any("reconnecting without it" in line for line in lines)


def test_client_js_unsent_messages(browser: Browser) -> None:
    """A page that sends too fast is warned in its console after two seconds, and stays online."""
    before = faster_timers("time === 2_000", 10)
    with visit(browser, EDITOR, before=before, RATE=5) as (page, _, _):
        # More than the sockets' buffers hold.
        page.js("for (let i = 0; i < 400; i++) edit.send('x'.repeat(60_000)); sent.length = 0")
        console_has(page, "two seconds")
        assert page.js("statuses") == ["connecting", "online"]


# -- Timers ----------------------------------------------------------------------------------------


def test_client_js_timer_limit(browser: Browser) -> None:
    """A heartbeat of a million seconds exceeds a browser's timers, which would fire at once."""
    greeting = """
      WebSocket = class extends WebSocket {
        set onmessage(handler) {
          super.onmessage = handler && (({data}) =>
            handler({data: data.replace(/"heartbeat": ?25/, '"heartbeat": 1000000')}));
        }
        get onmessage() { return super.onmessage; }
      };
    """
    with visit(browser, before=greeting + faster_timers("time > 0", 1)) as (page, _, _):
        assert page.js("received[0].payload.heartbeat") == 1_000_000
        assert page.js("Math.max(...timers.map(([, time]) => time))") == 2**31 - 1


def test_client_js_timer_of_reconnects(either: Any) -> None:
    """Waits double up to ten seconds. The time for which the browser delays an attempt counts."""
    longest = [1000, 2000, 4000, 8000, 10_000, 10_000]
    if not isinstance(either, Browser):
        # Firefox delays each new WebSocket longer, after those that failed.
        longest = longest[:4]
    before = "Math.random = () => 1;" + faster_timers("name === 'connect' && time > 0", 100)
    with visit(either, before=before) as (page, server, proxy):
        with proxy.without_server():
            # Other attempts, which have no wait, try plain HTTP.
            page.wait(f"timers.length >= {len(longest)}")
            waits = page.js("timers.map(([, time]) => time)")
        delays = [most - wait for most, wait in zip(longest, waits, strict=False)]
        assert min(delays) >= 0
        assert (max(delays) < 200) == isinstance(either, Browser)
        server.publish(1)
        page.wait("got.length === 1")


@pytest.mark.parametrize("block", [None, 403], ids=["websocket", "http"])
def test_client_js_timer_of_silence(browser: Browser, block: int | None) -> None:
    """The page reconnects if no message arrives for 2.5 heartbeats: browsers report no error."""
    with visit(browser, block=block, HEARTBEAT=0.3) as (page, server, proxy):
        page.wait("received.filter(({type}) => type === 'system.heartbeat').length > 3")
        assert page.js("statuses") == ["connecting", "online"]
        proxy.block = "freeze"
        page.wait("statuses.at(-1) !== 'online'", timeout=5)
        proxy.block = block
        proxy.cut()
        server.publish(1)
        page.wait("got.length === 1 && statuses.at(-1) === 'online'")


def test_client_js_timer_of_attempts(either: Any) -> None:
    """An attempt that the server never answers is abandoned after 15 seconds, here one."""
    before = faster_timers("time === 15_000", 15)
    with (
        visit(either, before=before) as (page, server, proxy),
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        silent.settimeout(PATIENCE)
        proxy.lead_to(silent.getsockname()[1])
        with silent.accept()[0]:
            proxy.lead_to(server.port, cut=False)
            page.wait("onlines() === 2")


def test_client_js_timer_of_tokens(either: Any) -> None:
    """An attempt without an answer of token() is abandoned too, though heartbeats arrive."""
    script = """
      let asked = 0;
      const token = () => ++asked > 1 ? null : new Promise(() => {});
      const cms = record(new SwiftCMS({token}));
    """
    before = faster_timers("time === 15_000", 15)
    with visit(either, script, before=before, HEARTBEAT=0.3) as (page, _, _):
        assert page.js("asked") == 2
        assert any("no token came" in line for line in page.complaints())


# -- Editing ---------------------------------------------------------------------------------------


EDITOR = """
  const cms = record(new SwiftCMS()), shown = [], changes = [];
  const edit = cms.edit("posts", "1");
  edit.oneditors = (editors, conflict) => shown.push([editors.length, conflict]);
  edit.onchange = change => changes.push(change);
"""


def test_client_js_edit_after_reconnect(browser: Browser) -> None:
    """The page's former connection, which the server believes to be open, is no other editor."""
    with visit(browser, EDITOR) as (page, server, proxy):
        page.wait("shown.length")
        page.js("shown.length = 0")
        proxy.forget_clients()
        page.wait("onlines() === 2 && shown.length")
        page.wait("edit.editors[0]?.clientId === cms.clientId")
        assert len(server.hub.editors("posts", "1")) == 2
        assert page.js("[shown.at(-1), edit.editors.length]") == [[1, False], 1]
        with server.client() as other:
            other.ask("editStart", contentType="posts", entryId="1")
            page.wait("shown.at(-1)[1] === true")
            assert page.js("shown.at(-1)") == [2, True]


def test_client_js_edit_with_two_handles(browser: Browser) -> None:
    """The page stays an editor of an entry until all of its handles are stopped."""
    with visit(browser, EDITOR) as (page, server, _):
        page.js("var other = new SwiftCMS(), second = other.edit('posts', 1); 0")
        page.wait("second.editors.length === 1")
        page.js("other.close(); 0")
        with server.client() as client:
            answer = client.ask("editStart", contentType="posts", entryId="1")
            assert len(answer["payload"]["editors"]) == 2
            client.send(action="editChange", contentType="posts", entryId="1", payload="hello")
            page.wait("changes.length === 1")
            page.js("second.send('stopped'); edit.send('hi')")
            assert client.receive()["payload"]["change"] == "hi"
            page.js("edit.stop(); edit.stop()")
            until(lambda: len(server.hub.editors("posts", "1")) == 1, "the stop of both handles")
        assert page.complaints() == []


# -- Tokens ----------------------------------------------------------------------------------------


TOKEN = """
  let asked = 0, isGone = false;
  const token = async () => {
    asked++;
    return isGone ? null : (await fetch("/token")).text();
  };
  const cms = record(new SwiftCMS({token}));
  cms.subscribe("content.*", "posts", take);
"""


def with_tokens(expires_in: float) -> Callable[[Flask, Hub], None]:
    """Add a view that issues tokens."""

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/token", "token", lambda: hub.issue_token("ana", expires_in))

    return configure


TRANSPORTS = pytest.mark.parametrize(
    ("block", "before"),
    [(None, ""), (403, ""), (403, WITHOUT_LOCKS)],
    ids=["websocket", "stream", "poll"],
)


@TRANSPORTS
def test_client_js_token_renewal(browser: Browser, block: int | None, before: str) -> None:
    """A fresh token replaces the old one, and the page stays online. Without one it is refused."""
    # Renewals after 48 seconds, here a hundredth of that.
    before += faster_timers("time > 25_000", 100)
    options = {"block": block, "before": before, "AUTH": "required", "HEARTBEAT": 5}
    with visit(browser, TOKEN, with_tokens(60), **options) as (page, server, _):
        page.wait("asked >= 3")
        server.publish(1, to="ana")
        page.wait("got.length === 1")
        assert page.js("[statuses, gaps]") == [["connecting", "online"], []]
        page.js("isGone = true")
        page.wait("statuses.at(-1) === 'refused'")


@pytest.mark.parametrize(("lifetime", "wait"), [(100, 80), (600, 540)])
def test_client_js_token_renewal_time(browser: Browser, lifetime: int, wait: int) -> None:
    """A token is renewed a minute before it expires, or a short one after 80 % of its life."""
    before = faster_timers("time > 65_000", 1)
    with visit(browser, TOKEN, with_tokens(lifetime), before=before) as (page, _, _):
        page.wait("timers.length")
        assert page.js("timers[0][1]") == pytest.approx(1000 * wait, abs=1000)


def test_client_js_token_that_fails(browser: Browser) -> None:
    """If the page cannot fetch its token, the console says so, and it is asked for again."""
    script = """
      let asked = 0;
      const token = async () => { if (!asked++) throw new Error("no network"); };
      const cms = record(new SwiftCMS({token}));
    """
    with visit(browser, script) as (page, _, _):
        assert page.js("asked") == 2
        assert any("no token came" in line for line in page.complaints())


def test_client_js_token_after_close(browser: Browser) -> None:
    """An object that is closed while its token is fetched takes no lock, which would remain."""
    script = """
      let answer;
      const cms = record(new SwiftCMS({token: () => new Promise(resolve => { answer = resolve })}));
    """
    with visit(browser, script, block=403, is_online=False) as (page, _, _):
        page.wait("answer !== undefined")
        page.js("cms.close(); answer(null)")
        assert page.js("navigator.locks.query().then(({held}) => held.length)") == 0


# -- Live pages ------------------------------------------------------------------------------------


# Name, HTML of the server, script on the page, newer HTML of the server, and the condition that is
# true after the refresh. `e` is the element with this HTML.
MORPHS = [
    ("open", "<details><summary>a</summary>b</details><dialog>c</dialog>",
     "e.querySelector('details').open = true; e.lastChild.show()",
     "<details><summary>a</summary>B</details><dialog>C</dialog>",
     "e.firstChild.open && e.lastChild.open && e.textContent === 'aBC'"),
    ("open by the server", "<details><summary>a</summary></details>", "",
     "<details open><summary>a</summary></details>", "e.firstChild.open"),
    ("classes", "<p class='a b'>1</p>",
     "e.firstChild.classList.add('mine'); e.firstChild.classList.remove('a')",
     "<p class='a c'>2</p>", "e.innerHTML === '<p class=\"mine c\">2</p>'"),
    ("class removed", "<p class='a'>1</p>", "e.firstChild.classList.add('mine')", "<p>1</p>",
     "e.firstChild.className === 'mine'"),
    ("style of a script", "<p>1</p>", "e.firstChild.style.color = 'red'", "<p>2</p>",
     "e.innerHTML === '<p style=\"color: red;\">2</p>'"),
    ("attribute of a script", "<p title=a lang=en>1</p>",
     "e.firstChild.title = 'mine'; e.firstChild.removeAttribute('lang')",
     "<p title=a lang=en>2</p>", "e.firstChild.title === 'mine' && !e.firstChild.lang"),
    ("attribute that both changed", "<p title=a>1</p>", "e.firstChild.title = 'mine'",
     "<p title=b>1</p>", "e.firstChild.title === 'b'"),
    ("date of a script", "<time>2026-11-27</time> <b>1</b>", "e.firstChild.textContent = 'today'",
     "<time>2026-11-27</time> <b>2</b>", "e.textContent === 'today 2'"),
    ("date that the server changed", "<time>2026-11-27</time>",
     "e.firstChild.innerHTML = '<i>to</i>day'", "<time>2026-11-28</time>",
     "e.innerHTML === '<time>2026-11-28</time>'"),
    ("date of an inline script",
     "<time>2026</time><script>document.currentScript.previousSibling.textContent = 'this "
     "year'</script> <b>1</b>", "",
     "<time>2026</time><script>document.currentScript.previousSibling.textContent = 'this "
     "year'</script> <b>2</b>", "e.textContent.startsWith('this year')"),
    ("nodes of a script", "<p id=n1>1</p><p id=n2>2</p>",
     "e.firstChild.after('mine'); e.prepend('first'); e.append('last')",
     "<p id=n0>0</p><p id=n1>1</p><p id=n2>2</p><p id=n3>3</p>",
     "e.textContent === 'first01mine23last'"),
    ("added by a script and by the server", "<p id=w1>1</p>",
     "e.insertAdjacentHTML('beforeend', '<p id=w2>mine</p>')",
     "<p id=w1>1</p><p id=w2>2</p><p id=w3>3</p>", "e.textContent === '123'"),
    ("replaced by a script", "<p>1</p><p>2</p><p>3</p>", "e.innerHTML = e.innerHTML",
     "<p>1</p><p>new</p><p>3</p>", "e.textContent === '1new3'"),
    ("replaced by a script, with new rows", "<p>1</p><b>2</b>", "e.innerHTML = e.innerHTML",
     "<p>0</p><i>new</i><b>2</b><i>3</i>", "e.textContent === '0new23'"),
    ("rows with ids replaced by a script", "<p id=h1>1</p><p id=h2>2</p>",
     "e.innerHTML = e.innerHTML", "<p id=h1>1</p><p id=h2>2</p><p id=h3>3</p>",
     "e.textContent === '123'"),
    ("removed by a script", "<p id=r1>1</p><p id=r2>2</p>", "e.firstChild.remove()",
     "<p id=r1>1</p><p id=r2>new</p>", "e.textContent === 'new'"),
    ("removed by a script and changed", "<p id=r3>1</p><p id=r4>2</p>", "e.firstChild.remove()",
     "<p id=r3>new</p><p id=r4>2</p>", "e.textContent === 'new2'"),
    ("moved elsewhere by a script", "<p><b>1</b></p><i>2</i>",
     "document.body.append(e.b = e.firstChild)", "<p><b>new</b></p><i>2</i>",
     "e.textContent === '2' && e.b.textContent === 'new' && (e.b.remove(), 1)"),
    ("sorted by a script", "<p id=s1>1</p><p id=s2>2</p><p id=s3>3</p>", "e.append(e.firstChild)",
     "<p id=s1>1</p><p id=s2>new</p><p id=s3>3</p>", "e.textContent === 'new31'"),
    ("wrapped by a script", "<img alt=a><b>1</b>",
     "const a = document.createElement('a'); e.firstChild.replaceWith(a); "
     "a.append(document.createElement('img'))", "<img alt=a><b>2</b>",
     "e.firstChild.nodeName === 'A' && e.textContent === '2'"),
    ("contenteditable", "<div contenteditable>a</div><b>1</b>",
     "e.firstChild.innerHTML = 'typed <b>text</b>'", "<div contenteditable>a</div><b>2</b>",
     "e.textContent === 'typed text2'"),
    ("changed fields", "<input value=a><input type=checkbox checked><textarea>a</textarea>",
     "const [a, b, c] = e.children; a.value = 'mine'; b.checked = false; c.value = 'mine'",
     "<input value=b><input type=checkbox checked title=x><textarea>b</textarea>",
     "(([a, b, c]) => a.value === 'mine' && !b.checked && b.title && c.value === "
     "'mine')(e.children)"),
    ("untouched fields",
     "<input value=a><input type=checkbox><textarea>a</textarea><select><option value=1 "
     "selected><option value=2></select>", "",
     "<input value=b><input type=checkbox checked><textarea>b</textarea><select><option "
     "value=1><option value=2 selected></select>",
     "(([a, b, c, d]) => a.value + b.checked + c.value + d.value)(e.children) === 'btrueb2'"),
    ("hidden field", "<input type=hidden value=a>", "", "<input type=hidden value=b>",
     "e.firstChild.value === 'b'"),
    ("changed select", "<select><option>1<option selected>2<option>3</select>",
     "e.firstChild.value = '1'; edit(e.firstChild)",
     "<select><option>1<option>2<option selected>3<option>4</select>",
     "e.firstChild.value === '1' && e.firstChild.length === 4"),
    ("chosen option removed", "<select><option id=o1>1<option id=o2>2</select>",
     "e.firstChild.value = '2'; edit(e.firstChild)",
     "<select><option id=o1>1<option id=o3>3</select>", "e.firstChild.value === '1'"),
    ("select without a default", "<select><option>1<option>2</select>", "",
     "<select><option>1<option selected>2</select>", "e.firstChild.value === '2'"),
    ("multiple select", "<select multiple><option selected>1<option>2</select>",
     "[...e.firstChild.options].forEach(o => { o.selected = !o.selected }); edit(e.firstChild)",
     "<select multiple><option>1<option>2<option selected>3</select>",
     "[...e.firstChild.selectedOptions].map(o => o.text).join() === '2,3'"),
    ("select of a form that was reset", "<form><select><option>1<option>2</select></form>",
     "const s = e.querySelector('select'); s.value = '2'; edit(s); e.firstChild.reset()",
     "<form><select><option>1<option selected>2</select></form>",
     "e.querySelector('select').value === '2'"),
    ("radio", "<input type=radio name=r value=1 checked><input type=radio name=r value=2><input "
     "type=radio name=r value=3>", "e.children[1].checked = true; edit(e.children[1])",
     "<input type=radio name=r value=1><input type=radio name=r value=2><input type=radio "
     "name=r value=3 checked>", "e.children[1].checked && !e.children[2].checked"),
    ("fields named like methods",
     "<form><input name=id><input name=attributes><input name=remove><input name=contains "
     "value=1></form>", "e.form = e.firstChild",
     "<form title=new><input name=id><input name=attributes><input name=remove value=2></form>",
     "e.firstChild === e.form && e.form.getAttribute('title') === 'new' && "
     "e.querySelectorAll('input').length === 3"),
    ("same objects", "<p id=o-1>1</p> <p id=o-2>2</p> <p>3</p>", "e.nodes = [...e.childNodes]",
     "<p id=o-0>0</p> <p id=o-1>1</p> <p id=o-2>new</p> <p>3</p>",
     "e.nodes.every(node => node.parentNode === e) && e.textContent === '0 1 new 3'"),
    ("without ids", "<li>1</li><li>2</li>", "e.nodes = [...e.childNodes]",
     "<li>0</li><li>1</li><li>2</li>",
     "e.children[1] === e.nodes[0] && e.children[2] === e.nodes[1]"),
    ("form beside an element that comes", "<form><input></form><p>1</p>", "e.form = e.firstChild",
     "<div id=flash>saved</div><form><input></form><p>2</p>",
     "e.children[1] === e.form && e.children.length === 3"),
    ("duplicate ids", "<p id=d>1</p><p id=d>2</p>", "", "<p id=d>2</p><p id=d>3</p><p id=d>4</p>",
     "e.innerHTML === '<p id=\"d\">2</p><p id=\"d\">3</p><p id=\"d\">4</p>'"),
    ("other kind with the same id", "<p id=k>1</p>", "", "<div id=k>1</div>",
     "e.innerHTML === '<div id=\"k\">1</div>'"),
    ("keep", "<p data-live-keep>1</p><p>2</p>", "", "<p data-live-keep class=a>x</p><p>3</p>",
     "e.textContent === '13' && !e.firstChild.className"),
    ("keep what the server removed", "<p id=k1>1</p><p id=k2>2</p>",
     "e.firstChild.dataset.liveKeep = ''", "<p id=k2>3</p>", "e.textContent === '13'"),
    ("keep what a script added", "<time>1</time>",
     "e.firstChild.innerHTML = '<b data-live-keep>x</b>'", "<time>2</time>",
     "e.textContent.includes('x') && e.textContent.includes('2')"),
    ("scripts",
     "<script>window.runs = (window.runs ?? 0) + 1</script><script type=application/json>"
     "1</script>", "e.first = e.firstChild",
     "<script>window.runs = (window.runs ?? 0) + 1</script><script>window.evil = 1</script>"
     "<script type=module>window.evil = 2</script><script type=application/json>2</script>",
     "window.runs === 1 && !window.evil && e.firstChild === e.first && e.lastChild.text === '2'"),
    ("script that changed", "<script>window.one = 1</script>", "",
     "<script>window.one = 2</script>", "window.one === 1 && e.firstChild.text.endsWith('2')"),
    ("noscript", "<noscript><b>on</b></noscript><b>1</b>", "e.first = e.firstChild",
     "<noscript><i>off</i></noscript><b>2</b><noscript><style>body { display: none }</style>"
     "</noscript>", "e.firstChild === e.first && e.firstChild.textContent === '<b>on</b>' && "
     "!e.lastChild.childNodes.length"),
    ("template", "<template><b>1</b><template>x</template></template><p>1</p>",
     "e.first = e.firstChild", "<template><b>2</b><template>y</template></template><p>1</p>",
     "e.firstChild.content.firstChild.textContent === '2' && !e.firstChild.childNodes.length "
     "&& e.firstChild.content.lastChild.content.textContent === 'y'"),
    ("template that stays", "<template><b>1</b></template><p>1</p>", "e.first = e.firstChild",
     "<template><b>1</b></template><p>2</p>",
     "e.firstChild === e.first && e.first.content.textContent === '1'"),
    ("shadow root", "<div><template shadowrootmode=open>s</template>1</div>",
     "e.first = e.firstChild", "<div><template shadowrootmode=open>s</template>2</div>",
     "e.first.innerHTML === '2' && e.first.shadowRoot.innerHTML === 's'"),
    ("table", "<table><tr id=t1><td>1</table>", "e.row = e.querySelector('tr')",
     "<table><tr id=t0><td>0<tr id=t1><td>1</table>",
     "e.querySelectorAll('tr')[1] === e.row && e.querySelector('tbody')"),
    ("svg", "<svg><use xlink:href='#a'/></svg>", "e.use = e.querySelector('use')",
     "<svg viewBox='0 0 1 1'><use xlink:href='#b'/><circle r=1></circle></svg>",
     "e.use.href.baseVal === '#b' && e.querySelector('circle').r.baseVal.value === 1 && "
     "e.firstChild.viewBox.baseVal.width"),
    ("odd attributes", "<p @click=a :x=b>1</p>", "", "<p @click=c :x=b>1</p><p @click=d>2</p>",
     "e.firstChild.getAttribute('@click') === 'c' && e.lastChild.getAttribute('@click') === 'd'"),
    ("custom element", "<x-list>server</x-list><p>1</p>", "",
     "<x-list>server</x-list><p>2</p><x-list>new</x-list>",
     "e.firstChild.textContent === 'madeserver' && e.lastChild.textContent === 'newmade'"),
    ("custom element that the server changed", "<x-list>server</x-list>", "e.first = e.firstChild",
     "<x-list>changed</x-list>", "e.firstChild === e.first && e.textContent === 'madechanged'"),
    ("comments", "<!--a-->1", "", "<!--b--><!--c-->2", "e.innerHTML === '<!--b--><!--c-->2'"),
    ("iframe and video", "<iframe srcdoc=x></iframe><video></video><p>1</p>",
     "e.nodes = [...e.children]", "<p>0</p><iframe srcdoc=x></iframe><video></video><p>2</p>",
     "e.children[1] === e.nodes[0] && e.children[2] === e.nodes[1]"),
    ("emptied and filled", "1<b>2</b>", "", "", "!e.childNodes.length"),
    ("filled", "", "", "1<b>2</b>", "e.innerHTML === '1<b>2</b>'"),
    ("order", "".join(f"<p id=x{n}>{n}</p> " for n in range(9)),
     "e.nodes = new Set(e.children)",
     "".join(f"<p id=x{n}>{n}</p> " for n in (8, 2, 7, 1, 0, 3, 6, 4)),
     "e.textContent === '8 2 7 1 0 3 6 4 ' && [...e.children].every(each => e.nodes.has(each))"),
]  # fmt: skip

@pytest.mark.parametrize("name", [*(row[0] for row in MORPHS), "complaints"])
def test_live_page_morph(morphed: dict[str, Any], name: str) -> None:
    """The page gets the server's changes, and keeps those of the visitor and of scripts."""
    assert morphed[name] == ([] if name == "complaints" else True)


def test_live_page_random_changes(either: Any, live: LivePageSite) -> None:
    """A page that only the server changes equals the server's, with and without moveBefore()."""
    rng = random.Random(26)
    pages = [random_tree(rng) for _ in range(12)]
    page = live.open(either, UL.format(pages[0]))
    assert page.js("matchesServer('posts')") is True
    for round_ in range(30):
        if round_ == 15:
            page.js("delete Element.prototype.moveBefore")
        # Every second page is a former one with its parts in another order.
        parts = re.split(r"(?=<div)", rng.choice(pages))
        rng.shuffle(parts)
        body = random_tree(rng) if round_ % 2 else "".join(parts)
        live.change_items(page, body)
        assert page.js("matchesServer('posts')") is True, (round_, body)
    assert page.complaints() == []


def test_live_page_one_row_of_a_thousand(browser: Browser, live: LivePageSite) -> None:
    """One changed row is one changed node, and all rows stay the same objects."""
    rows = [f"<li id=p{n}><a href='/{n}'>title {n}</a> <time>now</time></li>" for n in range(1000)]
    page = live.open(browser, UL.format("\n".join(rows)))
    page.js(
        "var records = [], rows = [...$('posts').children];"
        "new MutationObserver(list => records.push(...list)).observe(document, {subtree: true,"
        "  childList: true, attributes: true, characterData: true, attributeFilter: undefined}); 0"
    )
    rows[500] = rows[500].replace("title", "new")
    live.change_items(page, "\n".join(rows))
    seen = page.js("[records.length, records[0].type, records[0].target.data]")
    assert seen == [1, "characterData", "new 500"]
    rows.insert(0, "<li id=p1001>first</li>")
    rows.pop(700)
    live.change_items(page, "\n".join(rows))
    assert page.js("records.length") <= 6
    assert page.js("rows.filter(row => row.isConnected).length") == 999
    assert page.js("refreshed") == ["posts", "posts"]


def test_live_page_refresh(either: Any, live: LivePageSite) -> None:
    """Elements with a matching pair are changed, with one fetch of the page's own address."""
    other = "<p id=other data-live='order.* *, content.deleted posts' data-live-within=0>{}</p>"
    live.body = UL.format("<li id=p1>1</li>") + other.format("a") + "<p id=dead>a</p>"
    page = live.open(either)
    assert page.js("answers") == 0
    page.js("history.replaceState(0, '', '/?q=1#part')")
    texts = "[$('p1').textContent, $('other').textContent, $('dead').textContent]"
    live.change(page, UL.format("<li id=p1>2</li>") + other.format("b") + "<p id=dead>b</p>")
    assert page.js(texts) == ["2", "a", "a"]
    live.change(page, kind="content.deleted")
    assert page.js(texts) == ["2", "b", "a"]
    live.change(page)
    assert page.js("refreshed") == ["posts", "other"]
    assert len(live.live_requests) == 3
    _, headers = live.live_requests[0]
    assert (headers["X-SwiftCMS-Live"], headers["Cache-Control"]) == ("1", "no-cache")
    live.server.publish(kind="user.login")
    live.change(page)
    assert len(live.live_requests) == 4
    assert page.complaints() == []


@pytest.mark.parametrize("source", ["header", "data-since", "none"])
def test_live_page_event_before_subscribing(
    browser: Browser, live: LivePageSite, source: str
) -> None:
    """Events after the page was rendered refresh it. Without a known id, it is refreshed once."""
    events = 0

    def view(respond: Callable[[], Response]) -> Response:
        response = respond()
        if source == "data-since":
            since = f"<script data-since={live.server.hub.last_id()} src"
            response.set_data(response.get_data(as_text=True).replace("<script src", since))
        if "X-SwiftCMS-Live" not in request.headers:
            for _ in range(events):
                live.body = live.body.replace(">1<", ">2<")
                live.server.publish()
        return response

    live.replace_view(view)
    live.server.publish()
    if source != "header":
        live.head = f"<script>performance.getEntriesByType = () => [];</script>{live.head}"
    page = live.open(browser)
    live.change(page)
    page.wait(f"answers === {2 if source == 'none' else 1}")
    events = 3
    page = live.open(browser)
    page.wait("$('p1').textContent === '2' && answers === 1")


@pytest.mark.parametrize("is_cached", [True, False])
def test_live_page_back_button(either: Any, live: LivePageSite, is_cached: bool) -> None:
    """A page to which the visitor returns shows the events that were published meanwhile."""
    if not is_cached:
        # The browser keeps the HTML, but not the page with its scripts.
        live.head += "<script>onunload = () => {}</script>"
    page = live.open(either)
    go(page, "/ws/client.js")
    live.body = UL.format("<li id=p1>2</li>")
    live.server.publish()
    page.js("setTimeout(() => history.back()); 0")
    settle(page, "/")
    page.wait("document.querySelector('#p1')?.textContent === '2'")
    assert len(live.live_requests) == 1


def test_live_page_elements_added_and_removed(browser: Browser, live: LivePageSite) -> None:
    """Added elements are subscribed to and refreshed, and removed ones are unsubscribed."""

    def subscribed(count: int) -> None:
        until(lambda: live.server.hub.stats()["subscriptions"] == count, f"{count} subscriptions")

    page = live.open(browser)
    page.js("$('posts').remove()")
    subscribed(0)
    page.close()
    page = live.open(browser, UL.format("<li id=p1>1</li>") + "<p id=late>1</p>")
    page.js("var cms = new SwiftCMS(); cms.subscribe('order.*', '*', () => 0); 0")
    subscribed(2)
    assert live.server.hub.stats()["connections"] == 1
    # An element that a script adds may be out of date, so it is refreshed once.
    page.js("Object.assign($('late').dataset, {liveWithin: '0', live: 'late posts'}); 0")
    page.wait("answers === 1")
    subscribed(3)
    live.change(page, UL.format("<li id=p1>1</li>") + "<p id=late>2</p>", kind="late")
    shown = page.js("[$('late').textContent, $('late').dataset.live, refreshed.join()]")
    assert shown == ["2", "late posts", "late"]
    # One that comes with a refresh is up to date.
    live.change_items(page, "<li id=p1 data-live='inner posts' data-live-within=0>1</li>")
    subscribed(4)
    assert page.js("answers") == 3
    live.change_items(page, "<li id=p1>2</li>", kind="inner")
    assert page.js("$('p1').textContent") == "2"
    page.js("$('late').remove()")
    subscribed(2)
    assert page.complaints() == []


def test_live_page_nested_elements(browser: Browser, live: LivePageSite) -> None:
    """The inner one is changed alone, or with the outer one, and later changes still fit."""
    body = (
        "<div id=outer data-live='outer *' data-live-within=0><b>{0}</b>"
        "<i id=inner data-live='inner *' data-live-within=0><u id=u{0}>{0}</u></i></div>"
    )
    page = live.open(browser, body.format(0))
    live.change(page, body.format(1), kind="inner")
    assert page.js("$('outer').textContent") == "01"
    live.change(page, body.format(2), kind="outer")
    assert page.js("$('outer').textContent") == "22"
    live.body = body.format(3)
    page.js("Math.random = () => 1; $('outer').dataset.liveWithin = 0.3; 0")
    page.js("$('inner').dataset.liveWithin = 0.3; 0")
    live.server.publish(kind="outer")
    live.change(page, kind="inner")
    assert page.js("$('outer').textContent") == "33"
    assert page.js("refreshed") == ["inner", "outer", "inner", "outer"]


def test_live_page_reconnect(browser: Browser, live: LivePageSite) -> None:
    """After a reconnect the page is refreshed if events were missed or unknown, and only then."""
    with PageProxy(live.server.port) as proxy:
        live.url = f"http://localhost:{proxy.port}/"
        page = live.open(browser, before=NO_WAIT)
        page.js(
            "var seen = [], root = document.documentElement;"
            "new MutationObserver(() => seen.push(root.dataset.swiftcms))"
            ".observe(root, {attributes: true}); 0"
        )
        proxy.cut()
        page.wait("seen.join() === 'connecting,online'")
        proxy.cut()
        live.body = UL.format("<li id=p1>2</li>")
        live.server.publish()
        page.wait("answers === 1 && seen.length === 4")
        live.body = UL.format("<li id=p1>3</li>")
        live.server.publish()
        page.wait("answers === 2 && $('p1').textContent === '3'")
        # It misses more than the history has.
        with proxy.without_server():
            for number in range(6):
                live.server.publish(number, "user.login")
        page.wait("answers === 3 && seen.at(-1) === 'online'")
        # A fetch that failed, as while the server restarts, is made again.
        live.status = 502
        live.change_items(page, "<li id=p1>4</li>")
        live.status = 200
        proxy.cut()
        page.wait("answers === 5 && $('p1').textContent === '4'")


@pytest.mark.parametrize("has_move_before", [True, False])
def test_live_page_focus_and_scrolling(
    either: Any, live: LivePageSite, has_move_before: bool
) -> None:
    """A field that moves with its row keeps focus, caret and text."""
    rows = [f"<li id=p{n}><input id=f{n} value=text{n}></li>\n" for n in range(40)]
    style = "<style>#posts { height: 90px; overflow: auto; overflow-anchor: none }</style>"
    page = live.open(either, style + UL.format("".join(rows)))
    if not has_move_before:
        page.js("delete Element.prototype.moveBefore")
    page.js(
        "var field = $('f7'), blurs = 0; field.value = 'typed by me';"
        "field.focus(); field.setSelectionRange(2, 5); field.onblur = () => blurs++;"
        "$('posts').scrollTop = 33; 0"
    )
    selection = "field.selectionStart, field.selectionEnd"
    state = f"[document.activeElement.id, field.value, {selection}, blurs, $('posts').scrollTop]"
    field = "<li id=new><input autofocus id=auto></li>"
    for order in (rows[::-1], [field, *rows[7:], *rows[:7]], [*rows[8:], rows[7]], rows):
        live.change(page, style + UL.format("".join(order)))
        assert page.js(state) == ["f7", "typed by me", 2, 5, 0, 33]
        ids = re.findall(r"<li id=(\w+)", "".join(order))
        assert page.js("[...$('posts').children].map(row => row.id)") == ids


def test_live_page_autofocus(either: Any, live: LivePageSite) -> None:
    """A field with autofocus that a refresh adds does not take the focus."""
    page = live.open(either)
    live.change_items(page, "<li id=new><input autofocus id=auto></li>")
    page.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.js("[document.activeElement.nodeName, $('auto').autofocus]") == ["BODY", True]


def test_live_page_hidden(browser: Browser, live: LivePageSite) -> None:
    """A hidden page fetches once, when it becomes visible."""
    page = live.open(browser, before=HIDEABLE + faster_timers("name === 'refresh'", 1))
    page.js("hide(true)")
    page.js("var heard = 0, cms = new SwiftCMS(); cms.subscribe('*', '*', () => heard++); 0")
    for number in range(3):
        live.server.publish(number)
    page.wait("heard === 3")
    assert page.js("timers.length") == 0
    page.js("hide(false)")
    page.wait("answers === 1")
    page.js("hide(false)")
    assert page.js("timers.length") == 1


@pytest.mark.parametrize(
    ("address", "refreshes"), [("/", 2), ("/?other", 1)], ids=["same address", "other address"]
)
def test_live_page_events_during_fetch(
    browser: Browser, live: LivePageSite, address: str, refreshes: int
) -> None:
    """They cause one more fetch. An answer for an address that was left is dropped."""
    page = live.open(browser)
    page.js("var heard = 0, cms = new SwiftCMS(); cms.subscribe('*', '*', () => heard++); 0")
    until(lambda: live.server.hub.stats()["subscriptions"] == 2, "the script's subscription")
    live.pause.clear()
    live.body = UL.format("<li id=p1>2</li>")
    live.server.publish()
    until(lambda: len(live.live_requests) == 1, "the first fetch")
    live.body = UL.format("<li id=p1>3</li>")
    for number in range(3):
        live.server.publish(number)
    page.wait("heard === 4")
    page.js(f"history.pushState(0, '', '{address}')")
    live.pause.set()
    page.wait("answers === 2 && $('p1').textContent === '3'")
    assert [path for path, _ in live.live_requests] == ["/", address]
    assert page.js("refreshed.length") == refreshes


def test_live_page_delay(browser: Browser, live: LivePageSite) -> None:
    """A random time up to the largest of data-live-within, the last fetch's time, and `spread`."""
    before = "Math.random = () => 0.5;" + faster_timers("name === 'refresh'", 1000)
    body = UL.format("<li>").replace("data-live-within=0", "")
    page = live.open(browser, body, before=before)
    live.change(page)
    page.js("$('posts').dataset.liveWithin = 3")
    live.change(page)
    engine_of(live.server).refresh_seconds = 2.5
    # It asks for a heartbeat. Its `spread` says how long one connection has to wait.
    page.js(
        "var spread; dispatchEvent(new Event('online'));"
        "new SwiftCMS().onframe = (_, text) => { spread ??= JSON.parse(text).payload?.spread };"
    )
    page.wait("spread === 5")
    live.change(page)
    # A value that is not a number must not undo the server's wish.
    page.js("$('posts').dataset.liveWithin = '3s'")
    live.change(page)
    times = page.js("timers.map(([, time]) => time)")
    assert times[:3] == [250, 1500, 2500]
    # The average of the refreshes, and so `spread`, may be a little less by now.
    assert 2000 < times[3] <= 2500


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        ("status 500", {"status": 500}),
        ("not HTML", {"headers": {"Content-Type": "image/svg+xml"}}),
        ("no element #posts", {"body": "<p>something else</p>"}),
        ("redirected to", {"status": 302, "headers": {"Location": "/elsewhere"}}),
        ("no answer", {"pause": "hang"}),
    ],
    ids=["status", "type", "other page", "redirect", "timeout"],
)
def test_live_page_refresh_fails(
    browser: Browser, live: LivePageSite, reason: str, answer: dict[str, Any]
) -> None:
    """The page stays as it is, the console says once why, and the next event tries again."""
    live.head = live.head.replace("send.call", "this.timeout /= 100; send.call", 1)
    other = "<p id=other data-live='order.* *' data-live-within=0>1</p>"
    page = live.open(browser, UL.format("<li id=p1>1</li>") + other)
    good = (live.status, live.headers, live.body.replace("1<", "2<"))
    if "pause" in answer:
        live.pause.clear()
    live.status, live.headers = answer.get("status", 200), answer.get("headers", {})
    for _ in range(2):
        live.change(page, answer.get("body", good[2]))
    live.pause.set()
    texts = "[$('p1').textContent, $('other').textContent]"
    assert page.js(f"[...{texts}, refreshed.length]") == ["1", "1", 0]
    warnings = [line for line in page.complaints() if line.startswith("warning: SwiftCMS")]
    assert len(warnings) == 1
    assert reason in warnings[0]
    live.status, live.headers, live.body = good
    if reason != "redirected to":
        # Only a new connection causes one more fetch, and not a script that changes the page.
        page.js("document.body.append('x'); new Promise(resolve => setTimeout(resolve, 30))")
        assert len(live.live_requests) == 2
    # An event of another element tries it again too.
    live.change(page, kind="order.paid")
    page.wait(f"{texts}.join() === '2,2'")


def test_live_page_retry_after(browser: Browser, live: LivePageSite) -> None:
    """The page is not fetched before the time that the server has named."""
    page = live.open(browser)
    live.status, live.headers = 503, {"Retry-After": "1"}
    live.change(page)
    started = time.monotonic()
    live.status = 200
    live.change_items(page, "<li id=p1>2</li>")
    assert 0.9 < time.monotonic() - started < 5
    assert page.js("$('p1').textContent") == "2"


def test_live_page_answer_to_form(either: Any, live: LivePageSite) -> None:
    """The answer to a form is refreshed, and loaded again if necessary, by GET."""
    methods: list[str] = []
    live.server.app.before_request(lambda: methods.append(request.method))
    form = "<form method=post><button>x</button></form>"
    page = live.open(either, UL.format("<li id=p1>1</li>") + form)
    page.js("setTimeout(() => document.forms[0].submit()); window.left = 1; 0")
    page.wait(f"!window.left && {ONLINE}")
    live.change_items(page, "<li id=p1>2</li>")
    assert page.js("$('p1').textContent") == "2"
    live.headers["X-SwiftCMS-Live"] = "reload"
    page.js("window.left = 1; 0")
    live.server.publish()
    page.wait(f"!window.left && {ONLINE}")
    assert methods.count("POST") == 1


def test_live_page_session_changes(browser: Browser) -> None:
    """If the session expires, the page connects once more, as the user of the new session."""
    users: list[Any] = []
    with LivePageSite(UL.format("<li>1</li>")) as site, received_users(users):
        site.server.hub.identify(lambda: session.get("user"))
        site.replace_view(
            lambda respond: respond() if session.get("user") else redirect("/login")
        )

        @site.server.app.get("/login")
        def login() -> str:
            session["user"] = request.args.get("user")
            return "Sign in"

        def log_in(user: str = "") -> None:
            page.js(f"fetch('/login{user and '?user=' + user}').then(() => 1)")

        with Proxy(site.server.port) as proxy:
            page = browser.page(f"http://localhost:{proxy.port}/login?user=ana", before=NO_WAIT)
            go(page, "/")
            page.wait(ONLINE)
            log_in()
            site.server.publish()
            until(lambda: users == ["ana", None], "the connection without a user")
            page.wait("answers === 2")
            site.change(page)
            assert users == ["ana", None]
            # If the session expires again after it was renewed, that happens again.
            log_in("bob")
            site.change(page)
            log_in()
            site.change(page)
            until(lambda: users == ["ana", None, None], "one more connection")
            page.wait(f"answers === 6 && {ONLINE}")
            # A reconnect names another user, so the page may have to show something else.
            log_in("cleo")
            proxy.cut()
            page.wait("answers === 7")
            assert users[3:] == ["cleo"]
            log_in()
            site.server.hub.disconnect("cleo")
            page.wait("document.documentElement.dataset.swiftcms === 'refused'")
            assert page.js("answers") == 7
            page.close()


def test_live_page_reload(browser: Browser, live: LivePageSite) -> None:
    """If the session lacks a key, the page is loaded again once, unless a field was changed."""
    keeps_cookies = True

    def view(respond: Callable[[], Response]) -> Response:
        session["token"] = session.get("token", 0)
        return respond()

    @live.server.app.after_request
    def drop_cookies(response: Response) -> Response:
        session.modified = keeps_cookies
        return response

    def reloaded() -> None:
        live.server.publish()
        page.wait(f"!window.isFormer && {ONLINE}")

    live.replace_view(view)
    page = live.open(browser, UL.format("<li id=p1>1</li>") + "<input id=field>")
    live.change(page)
    assert page.js("refreshed.length") == 0
    page.js("window.isFormer = true; $('field').value = 'typed'; edit($('field')); 0")
    page.call("Network.clearBrowserCookies")
    live.change(page, live.body.replace("1<", "2<"))
    assert page.js("[$('p1').textContent, $('field').value, isFormer]") == ["1", "typed", True]
    assert "a field was changed" in str(page.complaints())
    page.js("$('field').value = ''; 0")
    reloaded()
    assert page.js("$('p1').textContent") == "2"
    live.change(page, live.body.replace("2<", "3<"))
    assert page.js("$('p1').textContent") == "3"
    # Without cookies it is loaded again once, and is refreshed from then on.
    keeps_cookies = False
    page.call("Network.clearBrowserCookies")
    page.js("window.isFormer = true; 0")
    reloaded()
    page.js("window.isFormer = true; 0")
    live.change(page, live.body.replace("3<", "4<"))
    page.wait("$('p1').textContent === '4' && isFormer")


def test_live_page_mistakes(browser: Browser) -> None:
    """An element without an id of its own, a malformed pair and a refused one are named."""
    body = (
        "<p data-live='a posts'>1</p><p id=twice></p><p id=twice data-live='b posts'>1</p>"
        "<p id=one data-live='posts'>1</p><p id=none data-live>1</p>"
        "<p id=comma data-live='a b, c'>1</p>"
        "<p id=secret data-live='content.* secret, con* posts'>1</p>"
    )
    body += UL.format("<li id=p1>1</li>")
    with LivePageSite(body) as site:
        site.server.hub.authorize(lambda user, event_type, content_type: content_type != "secret")
        page = site.open(browser)
        site.change(page, body.replace("1<", "2<"))
        assert page.js("$('p1').textContent") == "2"
        lines = page.complaints()
        hints = (
            'data-live="a posts" needs an id',
            'data-live="b posts" needs an id',
            'content.* pages", not "posts"',
            'content.* pages", not ""',
            'content.* pages", not "c"',
            "no content.* of secret",
            "no con* of posts",
        )
        assert {hint: "\n".join(lines).count(hint) for hint in hints} == dict.fromkeys(hints, 1)
        assert len(lines) == len(hints)


def test_live_page_content_security_policy(either: Any, live: LivePageSite) -> None:
    """Live pages work under a policy with trusted types and without inline code."""
    live.headers["Content-Security-Policy"] = (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:;"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    live.head = "<script src='/ws/client.js'></script>"
    page = live.open(either, UL.format("<li id=p1>1</li>"))
    body = "<li id=p1 class=a>2<svg></svg></li><template>x</template><script>alert(1)</script>"
    live.body = UL.format(body + "<li id=p3>3</li>")
    live.server.publish()
    page.wait("!!document.getElementById('p3')")
    assert page.complaints() == []
    # Attributes that contain code are the exception. The page's other changes are made.
    live.body = UL.format(body.replace("class=a", "onclick=a") + "<li id=p3>4</li>")
    live.server.publish()
    page.wait("document.getElementById('p3').textContent === '4'")
    console_has(page, "a change of onclick")


@pytest.mark.parametrize(
    ("either", "place"),
    [("chromium", "head"), ("chromium", "end"), ("chromium", "defer"), ("firefox", "head")],
    indirect=["either"],
)
def test_live_page_that_arrives_slowly(either: Any, live: LivePageSite, place: str) -> None:
    """Later changes are made to the HTML that the browser parsed, however it was split."""
    script = "<script src='/ws/client.js'></script>"
    scripts = {"head": script, "end": "", "defer": script.replace("src", "defer src")}
    live.head = live.head.replace(script, scripts[place])
    run = "for (const each of document.querySelectorAll('time')) each.textContent = 'today'"
    run = f"<script>{run}</script>"
    chunks = [
        "<main id=posts data-live='* *' data-live-within=0><p>Hel",
        "lo <b>wor",
        "ld</b></p><time>2026</time>" + run,
        "<table><tr><td>1",
        "2</td></tr>\n",
        "<tr><td><template>te",
        "xt</template>",
        "<noscript>no",
        "script</noscript></table><p>end",
        "</main>" + run + "<p>other</p>" + (script if place == "end" else ""),
    ]
    live.body = "".join(chunks)
    tick = threading.Event()

    def view(respond: Callable[[], Response]) -> Response:
        if "X-SwiftCMS-Live" in request.headers or page_is_open:
            return respond()
        start = respond().get_data(as_text=True).split("<body>")[0]

        def parts() -> Iterator[str]:
            yield start
            for chunk in chunks:
                tick.wait(0.03)
                yield chunk

        return Response(parts(), mimetype="text/html")

    page_is_open = False
    live.replace_view(view)
    page = live.open(either)
    page_is_open = True
    page.js("var template = document.querySelector('template'); 0")
    live.change(page, live.body.replace("end", "END"))
    assert page.js("refreshed") == ["posts"]
    assert page.js("template.isConnected && template.innerHTML") == "text"
    # Outside <head>, client.js cannot know which changes scripts made before it.
    shown = page.js("document.querySelector('time').textContent")
    assert shown == ("today" if place == "head" else "2026")
    live.change(page, live.body.replace("2026", "2027"))
    assert page.js("document.querySelector('time').textContent") == "2027"
    assert page.js("matchesServer('posts')") is True
    assert page.complaints() == []


# -- Plain HTTP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("either", "block", "attempts"),
    [
        ("chromium", 403, 1),
        ("chromium", 501, 1),
        ("chromium", "cut", 1),
        ("chromium", "hang", 1),
        # The first message has shown that WebSockets work.
        ("chromium", "late", 3),
        ("firefox", 403, 1),
        ("firefox", "hang", 1),
    ],
    indirect=["either"],
)
def test_client_js_http_if_websockets_are_blocked(
    either: Any, set_times: Callable[..., None], block: int | str, attempts: int
) -> None:
    """The page gets events by plain HTTP, resumes, and does not try WebSockets again."""
    set_times(FIRST_WAIT=500, POLL_END=0)
    with visit(either, block=block) as (page, server, proxy):
        assert page.js("cms.transport") == "events"
        server.publish(1)
        page.wait("got.length === 1")
        proxy.cut()
        server.publish(2)
        page.wait("got.length === 2")
        assert page.js("[got, gaps]") == [[1, 2], []]
        assert proxy.requests.count("/ws") == attempts


def test_client_js_http_after_restart(either: Any, set_times: Callable[..., None]) -> None:
    """Cuts lose nothing, and a restart without a log is a gap. Editing is not possible."""
    set_times(POLL_END=0)
    with visit(either, block=403) as (page, server, proxy):
        # An object that is made later starts at the present place. It needs another request.
        page.js("var later = new SwiftCMS(); later.subscribe('*', 'pages', take); 0")
        for number in (1, 2):
            server.hub.publish("content.created", "pages", {"n": number})
            page.wait(f"got.length === {number}")
            proxy.cut()
        with serving() as restarted:
            proxy.lead_to(restarted.port)
            page.wait("gaps.length === 1 && statuses.at(-1) === 'online'")
            restarted.publish(3)
            page.wait("got.length === 3")
            assert page.js("[got, gaps]") == [[1, 2, 3], [["content.* posts"]]]
            page.js("cms.edit('posts', '1'); 0")
            console_has(page, "edit() needs a WebSocket")
            page.js("later.close(); cms.close()")
            assert page.js("cms.transport") is None
            until(lambda: restarted.hub.stats()["connections"] == 0, "the close of the stream")


def test_client_js_http_only_without_websockets(browser: Browser) -> None:
    """Plain HTTP is for networks without WebSockets, not for servers that were away."""
    with visit(browser, before=COUNT_CONNECTIONS) as (page, server, proxy):
        with proxy.without_server():
            page.wait("sources >= 2")
        online(page)
        assert page.js("cms.transport") == "websocket"
        # The server is back after the third attempt: the fourth shows that WebSockets work.
        proxy.block, proxy.refusals, proxy.requests = 403, 3, []
        proxy.cut()
        page.wait("statuses.at(-1) !== 'online'")
        online(page)
        assert page.js("cms.transport") == "websocket"
        assert proxy.count("/ws/events") == 1
        # A laptop is carried to a network without WebSockets.
        proxy.refusals, proxy.requests = 1_000, []
        server.publish(1)
        page.wait("got.length === 1")
        proxy.cut()
        server.publish(2)
        page.wait("got.length === 2")
        online(page)
        assert page.js("[cms.transport, gaps]") == ["events", []]
        assert (proxy.requests.count("/ws"), proxy.count("/ws/events")) == (4, 2)


def test_client_js_http_until_slow_websocket(
    browser: Browser, set_times: Callable[..., None]
) -> None:
    """A WebSocket that needs more than two seconds to open, here 0.2, replaces plain HTTP."""
    set_times(FIRST_WAIT=200)
    may_answer = threading.Event()

    def configure(app: Flask, hub: Hub) -> None:
        @app.before_request
        def delay() -> None:
            if request.path == "/ws":
                may_answer.wait(PATIENCE)

    with visit(browser, SIMPLE, configure, is_online=False) as (page, server, _):
        page.wait("cms.transport === 'events'")
        server.publish(1)
        page.wait("got.length === 1")
        may_answer.set()
        page.wait("cms.transport === 'websocket'")
        server.publish(2)
        page.wait("got.length === 2")
        until(lambda: server.hub.stats()["connections"] == 1, "the close of the stream")
        assert page.js("[statuses, gaps]") == [["connecting", "online"], []]


@pytest.mark.parametrize(
    ("either", "windows"), [("chromium", 7), ("firefox", 3)], indirect=["either"]
)
def test_client_js_http_windows(either: Any, windows: int, quick_polls: None) -> None:
    """One page streams and the others poll, because a browser opens six connections to a site.

    Pages without locks poll too.
    """

    def streams() -> int:
        return proxy.count("/ws/events") - proxy.count("mode=poll")

    with serving() as server, PageProxy(server.port, 403) as proxy:
        url = f"http://localhost:{proxy.port}/"
        # The tabs in the background believe that they are visible.
        pages = [either.page(url, before=HIDEABLE)]
        # It is the one that streams, because it asks for the lock first.
        online(pages[0])
        pages += [either.page(url, before=HIDEABLE) for _ in range(windows - 2)]
        pages.append(either.page(url, before=HIDEABLE + WITHOUT_LOCKS))
        for page in pages:
            online(page)
        assert server.hub.stats()["connections"] == 1
        server.publish(1)
        for page in pages:
            page.wait("got.length === 1")
        assert all(page.js("statuses.length") == 2 for page in pages)
        # When the first one is closed, another one streams.
        before = streams()
        pages.pop(0).close()
        until(lambda: streams() > before, "another stream")
        for page in pages:
            page.close()


@pytest.mark.parametrize(
    ("block", "times"), [("buffer", {"BUFFER_TIMEOUT": 300}), ("hold", {"CONNECT_TIMEOUT": 500})]
)
def test_client_js_http_buffered_by_proxy(
    browser: Browser,
    set_times: Callable[..., None],
    quick_polls: None,
    block: str,
    times: dict[str, int],
) -> None:
    """If a stream delivers nothing, the page polls, and does not stream again."""
    set_times(**times)
    with visit(browser, block=block) as (page, server, proxy):
        server.publish(1)
        page.wait("got.length === 1")
        assert "mode=poll" not in proxy.requests[3]
        assert all("mode=poll" in path for path in proxy.requests[4:])
        assert page.js("gaps") == []


def test_client_js_http_if_server_cannot_stream(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, quick_polls: None
) -> None:
    """If the server completes each response, the page stays online, and releases the lock."""
    monkeypatch.setattr(swiftcms_ws, "can_stream", lambda sock: False)
    with visit(browser, block=403) as (page, server, _):
        for number in (1, 2):
            server.publish(number)
            page.wait(f"got.length === {number}")
        assert page.js("[statuses, gaps]") == [["connecting", "online"], []]
        assert page.js("navigator.locks.query().then(({held}) => held.length)") == 0


def test_client_js_http_hidden_page(either: Any, set_times: Callable[..., None]) -> None:
    """A hidden page polls seldom, so that another one can stream. When it is shown, it streams."""
    set_times(HIDDEN_PAUSE=300)
    with visit(either, before=HIDEABLE, block=403) as (page, server, _):
        assert server.hub.stats()["connections"] == 1
        page.js("hide(true)")
        page.wait("received.at(-1).type === 'system.heartbeat'")
        assert server.hub.stats()["connections"] == 0
        began = time.monotonic()
        server.publish(1)
        page.wait("got.length === 1")
        assert time.monotonic() - began > 0.2
        page.js("hide(false)")
        until(lambda: server.hub.stats()["connections"] == 1, "another stream")
        server.publish(2)
        page.wait("got.length === 2")
        assert page.js("[statuses, gaps]") == [["connecting", "online"], []]


def test_client_js_http_download(firefox: Firefox) -> None:
    """Firefox closes a stream without an event if a download link is clicked: it is reopened."""
    script = SIMPLE + "document.body.innerHTML = '<a href=/file id=file>get it</a>';"
    with visit(firefox, script, with_download, block=403) as (page, server, _):
        page.click("#file")
        until(lambda: server.hub.stats()["connections"] == 0, "the close of the stream")
        server.publish(1)
        page.wait("got.length === 1", timeout=5)
        assert page.js("statuses") == ["connecting", "online"]


@pytest.mark.parametrize("before", ["", WITHOUT_LOCKS], ids=["stream", "poll"])
def test_client_js_http_resume(
    browser: Browser, before: str, set_times: Callable[..., None]
) -> None:
    """20 cuts under 500 events a second: each handler has every event once, in order."""
    set_times(POLL_END=0)
    chance = random.Random(28)
    script = SIMPLE + "const all = []; cms.subscribe('*', '*', ({payload}) => all.push(payload.n));"
    stop, published = threading.Event(), []
    with visit(browser, script, before=before, block=403) as (page, server, proxy):
        publisher = threading.Thread(
            target=lambda: published.extend(publish_steadily(server.publish, stop))
        )
        publisher.start()
        try:
            for _ in range(20):
                proxy.cut()
                threading.Event().wait(chance.uniform(0, 0.15))
        finally:
            stop.set()
            publisher.join(PATIENCE)
        page.wait(f"[got, all].every(list => list.at(-1) === {published[-1]})")
        assert page.js("got") == published
        assert page.js("all") == published
        assert page.js("gaps") == []
        assert (proxy.count("mode=poll") == 0) == (not before)


@pytest.mark.parametrize("before", ["", WITHOUT_LOCKS], ids=["stream", "poll"])
def test_client_js_http_different_places(browser: Browser, quick_polls: None, before: str) -> None:
    """Each subscription starts at its own place. Malformed and refused ones affect no other one."""
    script = """
      const [, first, second] = location.hash.split(":");
      const lists = [new SwiftCMS({since: first}), new SwiftCMS({since: second}), new SwiftCMS()]
        .map(cms => {
          const list = [];
          cms.subscribe("content.*", "*", ({payload}) => list.push(payload.n));
          return list;
        });
      const cms = record(new SwiftCMS());
      cms.subscribe("con*", "posts", take);
      cms.subscribe("content.*:posts", "posts", take);
      cms.subscribe("content.*", "secrets", take);
      const nothing = record(new SwiftCMS({url: "/ws"}));
    """

    def configure(app: Flask, hub: Hub) -> None:
        hub.authorize(lambda user, event_type, content_type: content_type != "secrets")

    with (
        serving(script, configure, MAX_QUEUE=65536) as server,
        PageProxy(server.port, 403) as proxy,
    ):
        first = server.publish(1, filling="x" * 40_000)
        second = server.publish(2)
        # More than one poll sends.
        server.publish(3, filling="x" * 40_000)
        server.publish(4, filling="x" * 40_000)
        url = f"http://localhost:{proxy.port}/#:{first}:{second}"
        page = browser.page(url, before=NO_WAIT + before)
        page.wait("onlines() === 2")
        page.wait("lists[0].length === 3 && lists[1].length === 2")
        server.publish(5)
        page.wait("lists.every(list => list.at(-1) === 5)")
        assert page.js("lists") == [[2, 3, 4, 5], [3, 4, 5], [5]]
        assert page.js("gaps") == []
        lines = page.complaints()
        assert sum("malformed" in line for line in lines) >= 2
        assert any("(forbidden)" in line for line in lines)
        page.close()


def test_client_js_http_live_page(
    browser: Browser, live: LivePageSite, set_times: Callable[..., None]
) -> None:
    """A live page shows changes, also those during a cut."""
    set_times(POLL_END=0)
    with PageProxy(live.server.port, 403) as proxy:
        live.url = f"http://localhost:{proxy.port}/"
        page = live.open(browser, before=NO_WAIT)
        live.change_items(page, "<li id=p1>2</li>")
        proxy.cut()
        live.change_items(page, "<li id=p1>3</li>")
        assert page.js("$('p1').textContent") == "3"
        assert proxy.count("/ws/events") >= 2


def test_client_js_http_user_changes(
    browser: Browser, live: LivePageSite, quick_polls: None
) -> None:
    """Each poll names the user, so that a live page does not keep the data of another one."""
    live.server.hub.identify(lambda: session.get("user"))

    def view(respond: Callable[[], Response]) -> Response:
        session["user"] = request.args.get("user", session.get("user"))
        live.body = UL.format(f"<li>{session['user']}</li>")
        return respond()

    live.replace_view(view)
    with PageProxy(live.server.port, 403) as proxy:
        live.url = f"http://localhost:{proxy.port}/"
        page = live.open(browser, path="?user=ana", before=WITHOUT_LOCKS)
        go(page, "/")
        page.wait(ONLINE)
        page.js("fetch('/?user=bob').then(() => 1)")
        page.wait("$('posts').textContent === 'bob'")


# -- The lesson ------------------------------------------------------------------------------------


# The step, the expected answer, the labels of the button, the verdict, and words of the row of the
# log that is selected afterwards.
LESSON = [
    (0, "Being told", ["Start asking", "Create a post"], "Right: Being told. Told", ""),
    (1, "Neither", ["Open the connection"], "Not “Neither”: The server.", "connected you are"),
    (2, "The post", ["Subscribe", "Create a post and a page"], "Right", "does not match pages"),
    (3, "Nothing", ["Wait, and watch"], "Not “Nothing”: A sign of life.", "pong"),
    (4, "Nothing", ["Send “subscrbe”", "Send what is not JSON"], "Not", "error invalid_json"),
    (5, "Still you", ["Show a token", "Show a changed token"], "Right", "you are still Mira"),
    (6, "Both", ["Lose it for 5 s", "Create two posts"], "Right: Both.", "2 you missed"),
    (
        7,
        "It is refused",
        ["Open a post", "Let a neighbour save first", "Save yours"],
        "Right: It is refused.",
        "",
    ),
    (8, "Nothing", ["Start a slow reader"], "Right: Nothing.", "closed with 1013, not you"),
]


@pytest.mark.parametrize(
    ("number", "expected", "labels", "verdict", "row"), LESSON, ids=[f"{n}" for n in range(9)]
)
def test_lesson_step(
    pupil: Page,
    lesson_site: LessonSite,
    number: int,
    expected: str,
    labels: list[str],
    verdict: str,
    row: str,
) -> None:
    """Each step can be opened alone, is done only after its last action, and says why."""
    begin_step(pupil, number, expected)
    if number == 4:
        # The server's errors complete the step, not posts with the same text.
        for code in ("unknown_action", "invalid_json"):
            lesson_site.api("POST", "api/posts", {"title": f'"code":"{code}"'})
            log_has(pupil, f'“"code":"{code}"”')
    for label in labels:
        assert not pupil.js(STEP_IS_DONE)
        act(pupil, label)
    pupil.wait(STEP_IS_DONE)
    assert verdict in pupil.js("document.querySelector('#verdict').textContent")
    chip = f"document.querySelectorAll('#steps button')[{number}].textContent"
    assert pupil.js(chip) == "✓"
    assert pupil.js("[...document.querySelectorAll('#lesson .filled')].map(b => b.id)") == ["next"]
    selected = "document.querySelector('#log [aria-selected=true] p')?.textContent ?? ''"
    pupil.wait(f"({selected}).includes({json.dumps(row)})")
    # The verdict does not overlap the button, and the page does not scroll.
    place = "document.querySelector('#{}').getBoundingClientRect().{}"
    assert pupil.js(place.format("verdict", "bottom")) <= pupil.js(place.format("act", "top"))
    root = "document.documentElement"
    assert pupil.js(f"[{root}.scrollWidth, {root}.scrollHeight]") == [1280, 720]
    if number == 7:
        press(pupil, "#theirs")
        press(pupil, "#leave")


def test_lesson_reconnect_without_events(pupil: Page) -> None:
    """A reconnect after which nothing was missed does not complete the step about `since`."""
    begin_step(pupil, 6, "Both")
    pupil.js("document.querySelector('#clear').click()")
    # A second press, while the connection is lost, extends the time, and the page counts it down.
    pupil.js("""import("./ws/inspector.js").then(({ listeners }) => {
        const [you, cut] = ["you", "cut"].map(id => document.getElementById(id));
        window.countdown = [];
        new MutationObserver(() => countdown.push(you.textContent)).observe(you, {childList: true});
        listeners.add(function listener(name) {
            if (name !== "lost") return;
            listeners.delete(listener);
            setTimeout(() => cut.click());
        });
    })""")
    act(pupil, "Lose it for 5 s")
    pupil.wait("countdown.includes('○ 10 s') && countdown.at(-1) === '● You'")
    log_has(pupil, "connection lost 1006, nobody said goodbye")
    log = "document.querySelector('#log').textContent"
    pupil.wait(f"/connection lost.*since ….*subscribed from now on/s.test({log})")
    assert not pupil.js(STEP_IS_DONE)


def test_lesson_faults(pupil: Page, lesson_site: LessonSite) -> None:
    """Each fault that a pupil causes has a visible consequence, and none for another client."""
    with lesson_site.client() as other:
        other.subscribe("*")
        begin_step(pupil, 1, "The server")
        act(pupil, "Open the connection")
        pupil.wait(STEP_IS_DONE)
        for fault in ("flood", "flood", "forge", "fast"):
            pupil.js(f"document.querySelector('#{fault}').click()")
        pupil.wait("document.querySelector('#news').textContent.includes('another slow reader')")
        words = ["invalid_token: you are still unknown", "closed with 1013, not you"]
        for pattern in [*words, r"heartbeat × [3-9]\d+ in \d+ s"]:
            shown = f"/{pattern}/.test(document.querySelector('#log').textContent)"
            # The other client is answered all the time.
            until(lambda: other.ask("heartbeat") and pupil.js(shown), pattern)  # noqa: B023
        submit(pupil, "#tell", to="ben", text="a secret")
        log_has(pupil, "from Mira: a secret: it was for ben only")
        # demo.flood was sent to no other client, and is not kept.
        assert "demo.flood" not in {message["type"] for message in other.messages}
        since = other.hello["payload"]["lastId"]
        assert other.ask("subscribe", type="demo.*", since=since)["payload"]["replayed"] == 0


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("{isOpen: false, patterns: [posts]}", "you were away"),
        ("{isOpen: true, patterns: []}", "you have not subscribed to anything"),
        ("{isOpen: true, patterns: [posts]}", "content.* of posts does not match pages"),
        ("{isOpen: true, patterns: [other]}", "order.* of * does not match content.created"),
        ("{isOpen: true, patterns: [other, posts]}", "content.* of posts does not match pages"),
        ("{isOpen: true, patterns: [posts, all]}", "it was for one user"),
        ("{isOpen: true, patterns: [all], to: 'ben'}", "it was for ben only"),
    ],
)
def test_lesson_reason_of_missing_event(pupil: Page, state: str, reason: str) -> None:
    """For an event that the pupil does not receive, the page gives the reason of the protocol."""
    script = f"""import("./ws/inspector.js").then(({{ whyNot }}) => {{
        const posts = {{ type: "content.*", contentType: "posts" }};
        const all = {{ type: "*", contentType: "*" }};
        const other = {{ type: "order.*", contentType: "*" }};
        return whyNot({{ type: "content.created", contentType: "pages" }}, {state});
    }})"""
    assert reason in pupil.js(script)


@pytest.mark.parametrize(
    # The keys of the rows, the key of the message, and the row to which it belongs.
    ("keys", "key", "index"),
    [
        (["a"], "a", 0),
        (["a", "b"], "a", 0),
        (["a", None], "a", None),
        ([None], None, None),
        (["a", *"bcdefghi"], "a", None),
    ],
    ids=["same", "former", "interrupted", "no key", "too old"],
)
def test_lesson_run_of_messages(
    pupil: Page, keys: list[str | None], key: str | None, index: int | None
) -> None:
    """Messages of one kind become one row, until a loss or a replay, which have no key."""
    script = f"""import("./ws/inspector.js").then(({{ findRun }}) => {{
        const rows = {json.dumps(keys)}.map(key => ({{ key, seenAt: 1000 }}));
        return [2900, 3100].map(now => rows.indexOf(findRun(rows, {json.dumps(key)}, now)));
    }})"""
    assert pupil.js(script) == [-1 if index is None else index, -1]


def place_of(page: Page, selector: str) -> tuple[float, float]:
    """Return a point in an element: 60 pixels right and 10 down of its corner."""
    rect = f"document.querySelector('{selector}').getBoundingClientRect()"
    x, y = page.js(f"(r => [r.x + 60, r.y + 10])({rect})")
    return x, y


def point(page: Page, selector: str) -> None:
    """Move the mouse to an element."""
    x, y = place_of(page, selector)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def test_lesson_with_25_pupils(pupil: Page, lesson_site: LessonSite) -> None:
    """Their names differ, and new entries do not move the list under the mouse."""
    people = [("POST", "api/name", {"key": f"key{n}", "name": "mira"}) for n in range(25)]
    names = [lesson_site.api(*call)["name"] for call in people]
    assert len({name.casefold() for name in ["Mira", *names]}) == 26
    assert names[:2] == ["mira 2", "mira 3"]
    with contextlib.ExitStack() as stack:
        for number in range(25):
            stack.enter_context(lesson_site.client(path=f"/ws?cms=key{number}"))
        # A page has two connections, and is one person.
        until(lambda: lesson_site.api("GET", "api/poll")["people"] == 26, "26 people")
        pupil.wait("document.querySelector('#people').textContent === '26 here'")

    second = "#entries li:nth-child(2)"
    point(pupil, second)
    x, y = place_of(pupil, second)
    under = f"document.elementFromPoint({x}, {y}).closest('li').textContent"
    seen = pupil.js(under)
    for number in range(25):
        lesson_site.api("POST", "api/posts", {"title": f"post {number}"})
    pupil.wait("document.querySelector('#fresh').textContent === '25 new'")
    assert (pupil.js(under), place_of(pupil, second)) == (seen, (x, y))
    press(pupil, "#fresh")
    point(pupil, "h1")
    pupil.wait("document.querySelector('#entries li').textContent.includes('post 24')")


def test_lesson_with_many_messages(pupil: Page, lesson_site: LessonSite) -> None:
    """The log stays readable and small, and does not move under the mouse."""

    def used_memory() -> int:
        pupil.call("HeapProfiler.collectGarbage")
        return int(pupil.call("Runtime.getHeapUsage")["usedSize"])

    begin_step(pupil, 6, "Both")
    pupil.js("document.querySelector('#clear').click()")
    act(pupil, "Lose it for 5 s")
    act(pupil, "Create two posts")
    for number in range(25):
        lesson_site.api("POST", "api/posts", {"title": f"missed {number}"})
    pupil.wait(STEP_IS_DONE)
    lesson_site.api("POST", "burst/200")
    log_has(pupil, "× 50")
    # The last `since` is found within one screen after 200 messages.
    shown = pupil.js("""[...document.querySelectorAll('#log li')].filter(row => {
        const [one, all] = [row, row.parentElement].map(each => each.getBoundingClientRect());
        return one.top >= all.top - 1 && one.bottom <= all.bottom + 1;
    }).map(row => row.textContent)""")
    assert any("since …" in row for row in shown)
    assert 10 <= len(shown) <= 15

    point(pupil, "#log li:last-child")
    seen = place_of(pupil, "#log li:last-child")
    refuse = "document.querySelector('#forge').click()"
    pupil.js(refuse)
    pupil.wait("!document.querySelector('#unseen').hidden")
    assert place_of(pupil, "#log li:hover") == seen
    point(pupil, "h1")

    before = used_memory()
    for _ in range(4):
        lesson_site.api("POST", "burst/1000")
        pupil.js(refuse)
    lesson_site.api("POST", "api/posts", {"title": "the very last"})
    log_has(pupil, "“the very last”")
    assert used_memory() - before < 2_000_000
    assert pupil.js("document.querySelectorAll('*').length") < 2_000


def test_lesson_in_firefox(firefox: Firefox, lesson_site: LessonSite) -> None:
    """A step works in Firefox, with inputs as high as the buttons beside them."""
    page = firefox.page(lesson_site.url)
    sign_in(page, "Eva")
    begin_step(page, 2, "The post")
    act(page, "Subscribe")
    act(page, "Create a post and a page")
    page.wait(STEP_IS_DONE)
    parts = "[...document.querySelectorAll('#create > *, #ask > *')]"
    assert page.js(f"new Set({parts}.map(each => each.offsetHeight)).size") == 1
    assert page.complaints() == []
    page.close()


# == 20. README and packaging ======================================================================


# -- README: its sites and pages -------------------------------------------------------------------


@pytest.mark.core
def test_readme_python_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """README's Python runs, one block after the other, and its test of a site passes."""
    # Its hooks belong to the ready-made hub, which other tests use too.
    for name in ("identify_hook", "authorize_hook"):
        monkeypatch.setattr(swiftcms_ws.hub, name, None)
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README, re.S | re.M)
    assert len(blocks) >= 8
    found: dict[str, Any] = {"__name__": "readme"}
    for indent, block in blocks:
        code = "\n".join(line.removeprefix(indent) for line in block.splitlines())
        if "watch_sensor" in code:
            # This thread would not end: another test runs it.
            code = code.partition("\n")[0]
        code = code.replace("/srv/site/instance", str(tmp_path))
        if "hub.track" in code:
            # It needs a database: test_readme_models runs it.
            continue
        exec(compile(code, "README.md", "exec"), found)
    (line,) = re.findall(r"`(app.config\[.*?)`", README)
    exec(line, found)
    assert len(stored_ids(tmp_path / "live.sqlite3")) == 1
    found["app"].instance_path = str(tmp_path)
    with found["app"].app_context():
        found["test_creating_a_post_is_published"]()
        client = found["app"].test_client()
        assert client.post("/posts/1/edit", data={"title": "A", "version": "1"}).status_code == 302
        assert client.post("/posts/1/edit", data={"title": "B", "version": "1"}).status_code == 409
        assert found["posts"][1]["title"] == "A"
        assert found["hub"].stats()["published"] == 2
        assert len(stored_ids(tmp_path / "live.sqlite3")) == 3
        found["hub"].close()


@needs_chromium
def test_readme_live_site_in_two_windows(browser: Browser) -> None:
    """A post that one window adds to README's first site appears in the other. Typed text stays."""
    parts = ("LIST_PAGE = ", "POST_PAGE = ", "def edit_post")
    code = "".join(readme_block("python", part) for part in parts)
    assert code.count("data-live=") == 3
    app, hub = readme_app(code)
    app.add_url_rule("/favicon.ico", "icon", lambda: Response(status=204))
    refreshes: list[str] = []

    @app.before_request
    def note() -> None:
        if swiftcms_ws.is_live_refresh():
            refreshes.append(request.path)

    rows = "[...document.querySelectorAll('li')].map(each => each.id).join()"
    with served(app) as port, contextlib.closing(hub):
        url = f"http://localhost:{port}/"
        one, two = browser.page(url), browser.page(url)
        until(lambda: hub.stats()["subscriptions"] == 2, "the subscriptions")
        two.js("document.querySelector('input').value = 'half a sent'")
        one.js("document.querySelector('input').value = '<b>New</b>'; document.forms[0].submit()")
        two.wait(f"{rows} === 'post-1,post-2'")
        assert two.js("document.querySelector('#post-2').innerText") == "<b>New</b>"
        assert two.js("document.querySelector('input').value") == "half a sent"
        # The page after the redirect was past its own event.
        one.wait(f"{rows} === 'post-1,post-2'")
        assert refreshes == ["/"]
        for page in (one, two):
            page.js("document.querySelector('#post-2 a').click()")
            page.wait("location.pathname === '/posts/2' && !!document.querySelector('#comments')")
        until(lambda: hub.stats()["subscriptions"] == 4, "the pages of the post")
        # A page that is hidden is not refreshed.
        one.call("Page.bringToFront")
        two.js("document.querySelector('input').value = 'Nice'; document.forms[0].submit()")
        one.wait(f"{rows} === 'comment-1'")
        assert refreshes == ["/", "/posts/2"]
        post_form(port, "/posts/2/edit", title="Better", version="1")
        one.wait("document.querySelector('#title').innerText === 'Better'")
        assert one.complaints() == two.complaints() == []
        one.close()
        two.close()


@needs_chromium
def test_readme_models(browser: Browser, tmp_path: Path) -> None:
    """README's first site with a database: a post that one window adds appears in the other."""
    above, end, _ = readme_block("python", "LIST_PAGE = ").partition('</form>"""\n')
    lines = [above + end, readme_block("python", "hub.track"), "app.get('/stats')(hub.stats)"]
    lines.append("app.get('/favicon.ico')(lambda: ('', 204))")
    (tmp_path / "app.py").write_text("\n".join(lines))
    port = free_port()
    command = (sys.executable, "-m", "flask", "run", "--port", str(port))
    with Process(*command, cwd=tmp_path, port=port) as process:
        url = f"http://localhost:{port}/"
        post_form(port, title="Hello")

        def is_live(count: int) -> bool:
            return bool(json.loads(http(f"{url}stats")[2])["subscriptions"] == count)

        def rows(page: Page, *texts: str) -> None:
            found = "[...document.querySelectorAll('li')].map(row => row.innerText)"
            expected = json.dumps(texts, separators=(",", ":"))
            page.wait(f"JSON.stringify({found}) === {json.dumps(expected)}")

        one, two = browser.page(url), browser.page(url)
        rows(two, "Hello")
        until(lambda: is_live(2), "both subscriptions")
        one.js("document.querySelector('input').value = '<b>New</b>'; document.forms[0].submit()")
        rows(two, "Hello", "<b>New</b>")
        rows(one, "Hello", "<b>New</b>")
        assert one.complaints() == two.complaints() == []
        one.close()
        two.close()
        assert "Traceback" not in process.output()


@needs_chromium
def test_readme_editing(browser: Browser) -> None:
    """README's lines show the other editors and their changes, send a change, and stop."""
    *lines, send, stop = readme_block("js", "edit.stop()").strip().splitlines()
    script = """const shown = [], applied = [];
        const show = (...all) => shown.push(all), apply = change => applied.push(change);"""
    script = editing_script(script + "\n".join(lines))
    with serving_html(script) as server, server.client() as other:
        page = browser.page(f"http://localhost:{server.port}/")
        until(lambda: len(server.hub.editors("posts", "42")) == 1, "one editor")
        assert other.ask("editStart", **POST)["payload"]["conflict"]
        page.wait("JSON.stringify(shown.at(-1)) === '[[null,null],true]'")
        page.js(send)
        assert other.receive()["payload"]["change"] == {"title": "Hello"}
        other.send(action="editChange", **POST, payload={"title": "Hello, you"})
        page.wait("applied.length === 1 && applied[0].title === 'Hello, you'")
        page.js(stop)
        until(lambda: len(server.hub.editors("posts", "42")) == 1, "one editor")
        assert page.complaints() == []
        page.close()


# Stands in for Yjs, which is an npm package: a document that only ever gains lines.
STAND_IN_FOR_YJS = """
const Y = {
  Doc: class {
    lines = new Set();
    on(type, handler) { this.handler = handler; }
    write(line) { Y.applyUpdate(this, new TextEncoder().encode(JSON.stringify([line])), "own"); }
  },
  applyUpdate(doc, update, origin) {
    for (const line of JSON.parse(new TextDecoder().decode(update))) doc.lines.add(line);
    doc.handler?.(update, origin);
  },
  encodeStateAsUpdate: doc => new TextEncoder().encode(JSON.stringify([...doc.lines])),
};
const base64 = bytes => btoa(String.fromCharCode(...bytes));
const bytes = base64 => Uint8Array.from(atob(base64), character => character.charCodeAt(0));
const edit = cms.edit("posts", "42");
"""


@needs_chromium
def test_readme_collaborative_text(browser: Browser) -> None:
    """README's lines for Yjs merge two texts, also after a connection was lost."""
    script = STAND_IN_FOR_YJS + readme_block("js", "Y.Doc")
    with serving_html(editing_script(script)) as server, Proxy(server.port) as proxy:
        lines = "[...text.lines].sort().join()"
        first = browser.page(f"http://localhost:{server.port}/")
        until(lambda: len(server.hub.editors("posts", "42")) == 1, "the first editor")
        first.js("text.write('one – é')")
        second = browser.page(f"http://localhost:{proxy.port}/")
        # The page that opens later receives the whole text.
        second.wait(f"{lines} === 'one – é'")
        second.js("cms.onstatus = status => { if (status === 'connecting') text.write('three'); }")
        second.js("text.write('two')")
        first.wait(f"{lines} === 'one – é,two'")
        # The text that is typed while the connection is lost arrives later.
        proxy.cut()
        first.wait(f"{lines} === 'one – é,three,two'")
        assert first.complaints() == []
        first.close()
        second.close()


@needs_chromium
def test_readme_event_source(browser: Browser) -> None:
    """README's line with EventSource shows an event, and leaves the console empty."""
    (line,) = re.findall(r"`(new EventSource\(.*?)`", README, re.S)
    script = f"const show = text => document.querySelector('p').append(text); {line}"
    with serving_html(f"<p></p><script>{script}</script>", HEARTBEAT=0.5) as server:
        page = browser.page(f"http://localhost:{server.port}/")
        until(lambda: stat(server, "subscriptions") == 1, "the stream")
        server.publish(title="Good news")
        page.wait("document.querySelector('p').textContent.includes('Good news')")
        assert page.complaints() == []
        page.close()


@needs_chromium
def test_readme_htmx(browser: Browser, tmp_path: Path) -> None:
    """README's htmx example loads the list at the start and after each event."""
    npm_files(tmp_path, "htmx.org@2", "htmx-ext-sse@2")
    (element,) = re.findall(r"`(<ul\s+hx-ext=.*?)`", README, re.S)
    scripts = ("htmx.min.js", "sse.min.js")
    head = "".join(f'<script src="/static/{name}"></script>' for name in scripts)

    def configure(app: Flask, hub: Hub) -> None:
        app.static_folder = str(tmp_path)
        app.add_url_rule("/list", "list", lambda: f"<li>{hub.stats()['published']} posts</li>")

    with serving_html(head + element, configure) as server:
        page = browser.page(f"http://localhost:{server.port}/")
        page.wait("document.querySelector('ul').textContent === '0 posts'")
        until(lambda: stat(server, "subscriptions") == 1, "the stream")
        for count in (1, 2):
            server.publish(count)
            page.wait(f"document.querySelector('ul').textContent === '{count} posts'")
        assert page.complaints() == []
        page.close()


CHAT_PAGE = """<ul></ul><form><input name="text"></form>
<script src="/ws/client.js"></script>
<script>
const room = location.pathname.split("/")[2];
const form = document.forms[0];
const show = text => document.querySelector("ul").append(`${text};`);
%s</script>"""


@needs_chromium
def test_readme_chat_from_flask_socketio(browser: Browser) -> None:
    """README's migrated chat: a message reaches the pages of its room, and no other room.

    The lines with Flask-SocketIO must at least be Python.
    """
    server_side, page_side = readme_block("diff", "socket.emit").split("\n\n")
    before = "\n".join(re.findall("^-(.*)", server_side, re.M))
    compile(before, "README.md", "exec")
    code = "\n".join(re.findall(r"^\+(.*)", server_side, re.M))
    script = "\n".join(re.findall(r"^\+(.*)", page_side, re.M))
    page_html = html(CHAT_PAGE % script)

    def configure(app: Flask, hub: Hub) -> None:
        app.add_url_rule("/rooms/<int:room>", "room", lambda room: page_html)
        exec(code, {"app": app, "publish": hub.publish, "request": request})

    with Server(configure) as server:
        url = f"http://localhost:{server.port}/rooms"
        one, two, other = (browser.page(f"{url}/{room}") for room in (7, 7, 8))
        shown = "document.querySelector('ul').textContent"
        until(lambda: server.hub.stats()["subscriptions"] == 3, "the subscriptions")
        for page, text in ((one, "<b>Hi</b>"), (other, "Alone"), (two, "Bye")):
            page.js(f"form.text.value = {json.dumps(text)}; send()")
            page.wait(f"{shown}.endsWith({json.dumps(text + ';')})")
        for page, texts in ((one, "<b>Hi</b>;Bye;"), (two, "<b>Hi</b>;Bye;"), (other, "Alone;")):
            page.wait(f"{shown} === {json.dumps(texts)}")
            assert page.complaints() == []
            page.close()


# -- README: commands and deployment ---------------------------------------------------------------


def test_readme_demo_command(tmp_path: Path) -> None:
    """README's command installs the source distribution, and serves the demo from it.

    It takes packages from the network, as the test command did.
    """
    if not can_install(tmp_path):
        pytest.skip("pip finds no packages from here")
    ignored = shutil.ignore_patterns(".git", ".venv", "dist")
    shutil.copytree(HERE, tmp_path / "checkout", ignore=ignored)
    build = "import sys; from flit_core import buildapi; print(buildapi.build_sdist(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=tmp_path / "checkout",
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    archive = built.stdout.strip()
    subprocess.run(["tar", "-xzf", archive], cwd=tmp_path, check=True, timeout=PATIENCE)
    unpacked = tmp_path / archive.removesuffix(".tar.gz")
    assert unpacked.name == f"swiftcms_ws-{swiftcms_ws.__version__}"
    port = free_port()
    line = readme_block("sh", "bin/swiftcms-ws\n").strip()
    script = f"{line} --port {port}"
    environ = {"PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with Process("bash", "-c", script, cwd=unpacked, port=port, **environ) as demo:
        assert b"WebSocket, live" in http(f"http://127.0.0.1:{port}/")[2]
        with demo.client() as client:
            client.subscribe()
    found = (unpacked / ".venv").rglob("swiftcms_ws*")
    files = {path.name for path in found if path.suffix != ".pyc"}
    assert files == {"swiftcms_ws.py", f"{unpacked.name}.dist-info"}


def test_readme_command_lines(tmp_path: Path) -> None:
    """README's command lines work, with other addresses and ports."""
    block = readme_block("sh", "swiftcms-ws listen")
    listen, check = (shlex.split(line, comments=True)[1:] for line in block.splitlines())
    port = free_port()
    demo = [sys.executable, str(HERE / "swiftcms_ws.py"), "--port", str(port)]
    with Process(*demo, cwd=tmp_path, port=port):
        url = f"ws://localhost:{port}/ws"
        run = command(*[url if word.startswith("wss://") else word for word in check])
        assert (run.returncode, run.stdout.count("✓")) == (0, 6), run.stdout
    with Server() as server:
        url, signed = f"ws://127.0.0.1:{server.port}/ws", server.hub.issue_token("ana")
        words = [{"ws://localhost:8080/ws": url, "…": signed}.get(word, word) for word in listen]
        with listening(*words[1:]) as (listener, _):
            until(lambda: stat(server, "subscriptions") == 1, "the subscription")
            server.publish(1, to="ana")
            assert next_payload(listener) == {"n": 1}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_readme_curl() -> None:
    """README's curl command prints each event of the first site as soon as it is published."""
    app, hub = readme_app(readme_block("python", "LIST_PAGE = "))
    with served(app) as port, contextlib.closing(hub):
        (line,) = re.findall(r"`(curl -N [^`]+)`", README)
        line = line.replace("5000", str(port))
        # `exec`, so that curl is the process that is killed.
        command = ["bash", "-c", f"exec {line} 2>&-"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
            try:
                while not (line := read_line(curl)).startswith("event:"):
                    pass
                assert line == "event: system.subscribed\n"
                post_form(port, title="Hi")
                while '"title": "Hi"' not in read_line(curl):
                    pass
            finally:
                curl.kill()


def test_readme_flask_login(tmp_path: Path) -> None:
    """README's hook for Flask-Login returns the user of the client's cookie."""
    flask_login = pytest.importorskip("flask_login")
    (expression,) = re.findall("# With Flask-Login: return (.*?)\\. None", README)

    def configure(app: Flask, hub: Hub) -> None:
        manager = flask_login.LoginManager(app)
        manager.user_loader(lambda user_id: Person())
        app.post("/login")(lambda: str(flask_login.login_user(Person())))
        hub.identify(lambda: eval(expression, {"current_user": flask_login.current_user}))

    class Person(flask_login.UserMixin):  # type: ignore[misc, name-defined]
        id = 7

    with Server(configure) as server:
        _, headers, _ = http(f"http://127.0.0.1:{server.port}/login", "POST")
        for cookie, user_id in ((headers["Set-Cookie"], "7"), ("", None)):
            with server.client(headers={"Cookie": cookie}) as client:
                assert client.hello["payload"]["userId"] == user_id


# Stands in for a sensor, which fails once.
SENSOR = """
from pathlib import Path

def read_sensor():
    Path(f"reader-{os.getpid()}").touch()
    if not Path("failed").exists():
        Path("failed").touch()
        raise OSError("no sensor")
    return 20

def watch_sensor"""


def test_readme_sensor_thread(tmp_path: Path) -> None:
    """README's thread continues after an error, and runs once under the reloader.

    Its site runs under README's command, and `listen` prints the readings and the posts.
    """
    readme_site(tmp_path)
    code = (tmp_path / "app.py").read_text() + readme_block("python", "watch_sensor")
    for old, new in (("10)", "0.1)"), ("21.5", "read_sensor()"), ("\ndef watch_sensor", SENSOR)):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (tmp_path / "app.py").write_text(code)
    with readme_flask_run(tmp_path) as process:
        assert "swiftcms-ws listen localhost:5000" in README
        with listening(f"localhost:{process.port}") as (listener, _):
            # It has subscribed when the first reading comes.
            assert next_payload(listener) == next_payload(listener) == {"celsius": 20}
            post_form(process.port, title="Hi")
            until(lambda: next_payload(listener) == {"id": 2, "title": "Hi"}, "the post")
        for pid in children(process.popen.pid):
            os.kill(pid, signal.SIGKILL)
        assert process.output().count("a reading was not published") == 1
        assert process.output().count("Traceback") == 1
    assert len(list(tmp_path.glob("reader-*"))) == 1


# Stands in for sudo: the commands run as this user, and systemd is left alone.
SUDO = """#!/bin/bash
case $1 in
  install) exec install -d "${@: -1}" ;;
  systemctl) echo "$@" > systemctl ;;
  *) exec "$@" ;;
esac
"""


def test_readme_raspberry_pi(tmp_path: Path) -> None:
    """README's commands for a Raspberry Pi set the site up, and the unit's command serves it.

    The packages of this environment stand in for those that pip would install.
    """
    folder, target, bin_folder = tmp_path / "folder", tmp_path / "srv", tmp_path / "bin"
    folder.mkdir()
    bin_folder.mkdir()
    readme_site(folder)
    (bin_folder / "sudo").write_text(SUDO)
    (bin_folder / "sudo").chmod(0o755)
    commands = readme_block("sh", "[Service]").replace("/srv/site", str(target))
    pip = re.search(r"python3 -m venv .*? ~/swiftcms-ws\n", commands)
    assert pip is not None
    commands = commands.replace(pip[0], "").replace("/etc/systemd/system", str(tmp_path))
    environ = {**os.environ, "PATH": f"{bin_folder}:{PATH}", "USER": "root"}
    subprocess.run(["bash", "-ec", commands], cwd=folder, env=environ, check=True, timeout=60)
    assert (target / "systemctl").read_text() == "systemctl enable --now site\n"
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((tmp_path / "site.service").read_text())
    assert list(unit) == ["DEFAULT", "Service", "Install"]
    service = unit["Service"]
    port = free_port()
    line = service["ExecStart"].replace(f"{target}/.venv/bin/", "")
    line = line.replace("0.0.0.0:8000", f"127.0.0.1:{port}")
    variables = [Path(service["EnvironmentFile"]).read_text().strip(), service["Environment"]]
    environ = {"PATH": PATH, **dict(variable.split("=", 1) for variable in variables)}
    assert len(environ["SECRET_KEY"]) == 64
    cwd = Path(service["WorkingDirectory"])
    with Process("bash", "-c", f"exec {line}", cwd=cwd, port=port, **environ) as process:
        with process.client() as client:
            client.subscribe()
            post_form(port, title="Hi")
            assert client.receive()["payload"]["title"] == "Hi"
        assert "WARNING" not in process.output()
    assert stored_ids(target / "instance" / "live.sqlite3") != []


SITE_TESTS = """
import gc
import os
import threading
import weakref

def descriptors():
    return sorted(os.listdir("/proc/self/fd"))

before = descriptors()

from app import app
from swiftcms_ws import hub

{recipe}

def test_nothing_is_left():
    global app
    assert hub.stats()["published"] == 1
    hub.close()
    assert threading.enumerate() == [threading.main_thread()]
    assert descriptors() == before
    reference = weakref.ref(app)
    app = None
    del __import__("sys").modules["app"]
    gc.collect()
    assert reference() is None
"""


def test_readme_test_of_a_site(tmp_path: Path) -> None:
    """README's recipe works in a site's own tests, and hub.close() leaves nothing behind."""
    readme_site(tmp_path)
    recipe = readme_block("python", "def test_creating_a_post_is_published")
    (tmp_path / "test_site.py").write_text(SITE_TESTS.format(recipe=recipe))
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "pytest", "-q", "-s"]
    checked = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist", "test_site.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2 passed" in checked.stdout


# -- README as a whole -----------------------------------------------------------------------------


def test_readme_blocks_are_run() -> None:
    """A test runs each block of README. This one fails if a block without a test is added."""
    blocks = re.findall(r"^ *```(\w+)\n(.*?)^ *```", README, re.S | re.M)
    own_tests = ["bin/swiftcms-ws\n", "bin/pytest", "flask run", "[Service]", "proxy_pass"]
    own_tests += ["edit.stop()", "Y.Doc", "swiftcms-ws listen", "socket.emit"]
    others = [block for language, block in blocks if language not in ("python", "html")]
    tests = [[words in block for words in own_tests].count(True) for block in others]
    assert tests == [1] * len(own_tests)
    pages = [block for language, block in blocks if language == "html"]
    assert README.count("<!-- browser example:") == len(pages)


def test_readme_public_names() -> None:
    """README's table has each public name of the module and of a hub, with its parameters."""
    rows = readme_table("public name (its docstring says more)")
    cells = re.findall("`(.+?)`", " ".join(row[0] for row in rows))
    cells += re.findall("`(User|hub.blueprint)`", " ".join(row[1] for row in rows))
    names = {cell.partition("(")[0]: cell.partition("(")[2] for cell in cells}
    section = re.search(r"# -- methods for the site -.*?\n    # -- ", inspect.getsource(Hub), re.S)
    assert section is not None
    methods = {f"hub.{name}" for name in re.findall(r"^    def (\w+)", section[0], re.M)}
    # The first two are methods of the ready-made hub. track() calls the third one.
    methods -= {"hub.publish", "hub.publish_many", "hub.publish_drafts"}
    expected = {*swiftcms_ws.__all__, *methods, "hub.blueprint", "swiftcms_last_id"}
    assert set(names) == expected
    for name, arguments in names.items():
        found = getattr(swiftcms_ws.hub if "hub." in name else swiftcms_ws, name.split(".")[-1])
        if arguments:
            parameters = [
                parameter.replace(annotation=parameter.empty)
                for parameter in inspect.signature(found).parameters.values()
            ]
            assert f"({arguments}" == str(inspect.Signature(parameters)), name


def test_readme_config_keys() -> None:
    """README's table has each config key, with its default."""
    documented = {}
    for keys, defaults, _ in readme_table("key"):
        names = re.findall("`(.+?)`", keys)
        values = [defaults] if len(names) == 1 else (defaults.split(", ") * 2)[: len(names)]
        documented.update(zip(names, values, strict=True))
    every_field = dataclasses.fields(swiftcms_ws.Settings)
    fields = {field.name.upper(): field for field in every_field if field.metadata}
    assert sorted(documented) == sorted(fields)
    for name, text in documented.items():
        default = fields[name].default
        plain = text.strip("`").replace(" KiB", "*1024").replace(" MiB", "*1024*1024")
        if default is None:
            # The default is computed, or the feature is off.
            assert text == "none" or name in {"JWT_KEY", "MAX_CONNECTIONS", "INSPECTOR"}
        elif isinstance(default, (int, float)):
            assert eval(plain) == default, name
        else:
            assert plain.replace('"', "'") in (repr(default), str(default), repr(list(default)))


def test_readme_size_and_links() -> None:
    """README has at most 500 lines of 100 columns, and its links to headings are right."""
    lines = README.splitlines()
    assert len(lines) <= 500
    assert [line for line in lines if len(line) > 100 and "pytest" not in line] == []
    headings = [line.lower() for line in lines if line.startswith("#")]
    anchors = {re.sub(r"[^a-z -]", "", line).strip().replace(" ", "-") for line in headings}
    assert set(re.findall(r"\]\(#(.+?)\)", README)) <= anchors


# -- The package -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_another_jwt", [False, True], ids=["no packages", "another jwt"])
def test_single_file_without_its_packages(tmp_path: Path, is_another_jwt: bool) -> None:
    """It names all packages to install, also if `jwt` is another package of PyPI with this name."""
    shutil.copy(HERE / "swiftcms_ws.py", tmp_path)
    # Without the packages of the environment.
    options = ["-S"]
    if is_another_jwt:
        (tmp_path / "jwt.py").write_text("")
        options = []
    run = subprocess.run(
        [sys.executable, *options, "swiftcms_ws.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "pip install flask flask-sock simple-websocket pyjwt" in run.stderr


def test_dependencies_of_the_single_file() -> None:
    """The module's first lines, which `uv run` reads, name the packages of pyproject.toml."""
    script = re.match(r"# /// script\n(.*?)# ///\n", (HERE / "swiftcms_ws.py").read_text(), re.S)
    assert script is not None
    block = re.sub("^# ?", "", script[1], flags=re.M)
    # Python 3.10 has no tomllib.
    declared = [
        (
            re.findall(r'^requires-python = "(.*)"$', text, re.M),
            re.findall(r'"(.*?)"', re.findall(r"^dependencies = \[(.*?)\]", text, re.S | re.M)[0]),
        )
        for text in (block, (HERE / "pyproject.toml").read_text())
    ]
    (python, packages), (package_python, package_packages) = declared
    assert python == package_python != []
    assert sorted(map("".join, map(str.split, packages))) == sorted(
        map("".join, map(str.split, package_packages))
    )


TYPED_SITE = """
from typing import Any
from flask import Flask, session
from swiftcms_ws import EVERYONE, Hub, User

app, hub = Flask(__name__), Hub()
hub.init_app(app, url_prefix="/live")
hub.identify(lambda: session.get("user_id"))

@hub.authorize
def authorize(user: User | None, event_type: str, content_type: str) -> bool:
    return user is not None and user.claims.get("role") == "editor"

@app.post("/posts")
def create_post() -> dict[str, Any]:
    event_id: str = hub.publish("content.created", "posts", {"id": 7}, to=EVERYONE)
    return {"id": event_id, "editors": hub.editors("posts", 7)}
"""

# In each line, only the module's own types can show the mistake.
MISTAKES = {
    "hub.publish(5, 'posts', {})": "arg-type",
    "number: int = hub.publish('content.created', 'posts', {})": "assignment",
    "hub.publsh('content.created', 'posts', {})": "attr-defined",
    "hub.close('now')": "arg-type",
}


def test_types_of_the_installed_package(tmp_path: Path) -> None:
    """`mypy --strict` finds mistakes in a site, with the setting that README names.

    A single module cannot carry the marker of PEP 561, so mypy ignores its types without it.
    """
    create = [sys.executable, "-m", "venv", "--without-pip", "env"]
    subprocess.run(create, cwd=tmp_path, check=True, timeout=60)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    shutil.copy(HERE / "swiftcms_ws.py", packages)
    # Flask and the others are found in the environment of the tests.
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "site_app.py").write_text(TYPED_SITE)
    (tmp_path / "mistakes.py").write_text("\n".join(["from site_app import hub", *MISTAKES]))
    lines = ["[[tool.mypy.overrides]]", 'module = "swiftcms_ws"', "follow_untyped_imports = true"]
    assert all(f"`{line}`" in README for line in lines)
    (tmp_path / "pyproject.toml").write_text("\n".join(lines))
    options = ["--strict", "--python-executable", "env/bin/python"]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "site_app.py", "mistakes.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert checked.stderr == ""
    errors = re.findall(r"^(.*?):\d+: error: .*\[(.+)\]$", checked.stdout, re.M)
    assert errors == [("mistakes.py", code) for code in MISTAKES.values()], checked.stdout


# -- The server for Autobahn's tests ---------------------------------------------------------------


def test_autobahn_echo_server(tmp_path: Path) -> None:
    """The server that Autobahn tests echoes text, fragments and binary messages."""
    port = free_port()
    command = (sys.executable, str(HERE / ".ci" / "echo_server.py"), str(port))
    with Process(*command, cwd=tmp_path, port=port) as process:
        client = simple_websocket.Client.connect(f"ws://127.0.0.1:{port}/ws")
        for message in ("text – é", b"\0\xff", "x" * 100_000):
            client.send(message)
            assert client.receive(timeout=PATIENCE) == message
        client.close()
        assert "Traceback" not in process.output()


# == 21. The whole under attack: noise, load, the model ============================================


# -- Noise -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server for tests that attack it in many ways."""
    with Server(RATE=100_000) as running:
        yield running


def masked_close(code: int) -> bytes:
    return Frames.masked(0x8, struct.pack("!H", code))


# Ways to break RFC 6455, sections 5 and 7.4, and the close code of each.
VIOLATIONS: dict[str, tuple[bytes, int]] = {
    "unmasked": (b"\x81\x02{}", 1002),
    "unmasked ping": (b"\x89\x00", 1002),
    "reserved bit 1": (Frames.masked(0x1, b"{}", rsv=4), 1002),
    "reserved bit 2": (Frames.masked(0x1, b"{}", rsv=2), 1002),
    "reserved bit 3": (Frames.masked(0x1, b"{}", rsv=1), 1002),
    "all reserved bits": (Frames.masked(0x1, b"{}", rsv=7), 1002),
    **{f"opcode {code:#x}": (Frames.masked(code, b"{}"), 1002) for code in (3, 7, 0xB, 0xF)},
    "fragmented ping": (Frames.masked(0x9, b"x", fin=False), 1002),
    "fragmented close": (Frames.masked(0x8, b"\x03\xe8", fin=False), 1002),
    "large ping": (Frames.masked(0x9, b"x" * 126), 1002),
    "large close": (Frames.masked(0x8, b"\x03\xe8" + b"x" * 300), 1002),
    "length 2 in 16 bits": (b"\x81\xfe\x00\x02\0\0\0\0{}", 1002),
    "length 300 in 64 bits": (b"\x81\xff" + struct.pack("!Q", 300) + b"\0\0\0\0", 1002),
    "negative length": (b"\x81\xff" + struct.pack("!Q", 1 << 63) + b"\0\0\0\0", 1002),
    "continuation of nothing": (Frames.masked(0x0, b"{}"), 1002),
    "text in a text": (Frames.masked(0x1, b"{", fin=False) + Frames.masked(0x1, b"}"), 1002),
    "not UTF-8": (Frames.masked(0x1, b'{"action": "\xff"}'), 1007),
    "overlong UTF-8": (Frames.masked(0x1, b"\xc0\xaf"), 1007),
    "surrogate in UTF-8": (Frames.masked(0x1, b"\xed\xa0\x80"), 1007),
    "UTF-8 cut short": (Frames.masked(0x1, b"\xe2\x82"), 1007),
    "UTF-8 cut short in fragments": (
        Frames.masked(0x1, b"\xe2", fin=False) + Frames.masked(0x0, b"x"),
        1007,
    ),
    "close with one byte": (Frames.masked(0x8, b"\x03"), 1002),
    **{
        f"close with {code}": (masked_close(code), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 65535)
    },
    "close with bad UTF-8": (Frames.masked(0x8, b"\x03\xe8\xff"), 1007),
}


@pytest.mark.parametrize(("data", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_noise_frame(victim: Server, data: bytes, code: int) -> None:
    """A malformed frame closes its connection, after the messages before it were answered."""
    with open_raw(victim.port) as sock:
        sock.sendall(text(action="heartbeat", ref="before it") + data)
        answer = read_to_the_end(sock)
    assert close_code(answer) == code
    assert b"before it" in answer


@pytest.mark.core
def test_noise_random_frames(caplog: pytest.LogCaptureFixture) -> None:
    """Connections send frames, parts of frames and random bytes, and are lost in many ways."""
    pieces = [data for data, _ in VIOLATIONS.values()] + [
        text(action="subscribe"),
        text(action="subscribe", since="1-0", ref=1),
        text(action="editStart", contentType="posts", entryId="1"),
        Frames.masked(0x9, b"ping"),
        Frames.masked(0xA, b"pong"),
        Frames.masked(0x1, b"{", fin=False),
        Frames.masked(0x1, b"x" * 50, length=1 << 62),
        Frames.masked(0x8, b"\x03\xe8bye"),
    ]

    def attack(port: int, rng: random.Random) -> None:
        for _ in range(75):
            sock = open_raw(port)
            sock.settimeout(0.05)
            noise = [rng.randbytes(rng.randrange(1, 300)) for _ in range(5)]
            data = b"".join(rng.choices([*pieces, *noise], k=rng.randrange(5)))
            data = data[: rng.randrange(1, len(data) + 1)] if data else data
            with contextlib.suppress(OSError):
                sock.sendall(data)
                match rng.randrange(5):
                    case 0:
                        sock.recv(65536)
                    case 1:
                        sock.shutdown(socket.SHUT_WR)
                        read_to_the_end(sock)
                    case 2:
                        sock.shutdown(socket.SHUT_RD)
                    case 3:
                        reset(sock)
            sock.close()

    with attacked_server(caplog) as server:
        run_all([functools.partial(attack, server.port, random.Random(seed)) for seed in range(4)])


BROKEN_JSON = [
    *("", " ", "{", "}", "{}", "[]", "nul", "\0", "\ufeff{}", "'a'"),
    *('{"action"}', '{"action":}', '{action: "heartbeat"}', '{"action": "heartbeat",}'),
    *('{"action": "heartbeat"} x', '{"action": "heart\nbeat"}', '{"action": "\\x"}'),
    *('{"action": 1e400}', '{"action": "\\ud800"}'),
    '{"action": "heartbeat", "action": "subscribe", "action": 7}',
    '{"ref": 1, "ref": {}, "action": "heartbeat"}',
    '{"action": "subscribe", "type": "\\ud800"}',
    '{"action": "subscribe", "type": 1e400}',
    '{"action": "subscribe", "since": "\\ud800"}',
    '{"action": "presence", "entryId": 1e999}',
    '{"action": "editStart", "contentType": "posts", "entryId": "\\ud800"}',
    '{"action": "authenticate", "token": "\\ud800.\\ud800.\\ud800"}',
    '{"action": "authenticate", "token": "..\\u0000"}',
]

BROKEN_REFS = [
    *("1e400", "-1e400", "1e-400", "NaN", "Infinity", "-0", '"\\ud800"', '"\\udc00\\ud800"'),
    *("9" * 4000, "9" * 5000, "1" + "0" * 5000 + ".5", '"' + "\\u0000" * 3000 + '"'),
]

BROKEN_PAYLOADS = [
    *("1e400", '[{"a": [-1e999]}]', '"\\ud800"', '{"\\ud800": "\\udfff"}', "9" * 4300),
    # The parser's limit of nesting is not exact.
    *("[" * depth + "]" * depth for depth in (5, 500, *range(900, 1001, 2), 2000, 30_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (5, 500, *range(900, 1001, 2), 2000)),
]


EDIT = '{"action": "editChange", "contentType": "posts", "entryId": "1", "payload": '

NOISY_MESSAGES = {
    "messages": BROKEN_JSON,
    "refs": [f'{{"action": "heartbeat", "ref": {ref}}}' for ref in BROKEN_REFS],
    "payloads": [f"{EDIT}{payload}}}" for payload in BROKEN_PAYLOADS],
}


@pytest.mark.parametrize("messages", NOISY_MESSAGES.values(), ids=NOISY_MESSAGES)
def test_noise_json(victim: Server, messages: list[str]) -> None:
    """A malformed message is answered, and its connection stays open. Other editors get JSON."""
    with victim.client() as client, victim.client() as editor:
        for each in (client, editor):
            each.ask("editStart", contentType="posts", entryId="1")
        for message in messages:
            client.send_raw(message)
            try:
                assert client.ask("heartbeat")["type"] == "system.heartbeat"
            except Closed as closed:
                raise AssertionError(f"{closed} after {message[:100]}") from None
            for answer in client.messages:
                code = answer["payload"].get("code")
                assert answer["type"] != "system.error" or isinstance(code, str), message[:100]
            client.messages.clear()
        editor.ask("heartbeat")
        kinds = {message["type"] for message in editor.messages}
        assert kinds <= {"user.edited", "system.heartbeat"}
        client.close()
        editor.close()


WRONG_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 7, 1.5, 1e308, -(10**40)),
    *("", " ", "*", "**", ".", "a.", "a..b", "*.a", "a\0b", "é", "\u2028", "<b>"),
    *("x" * 129, "x" * 3000, "1-0", "0-0", "18446744073709551616-18446744073709551616"),
    *("constructor", "__class__", "{0}", "%s%n"),
    *([], ["*"], [[]], {}, {"a": 1}, {"type": "*"}),
]

FIELDS = [
    *("action", "type", "contentType", "subscriptions"),
    *("token", "ref", "since", "entryId", "payload"),
]


def test_noise_fields(caplog: pytest.LogCaptureFixture) -> None:
    """No value in any field of any action closes the connection, or fails the server."""
    good = {
        "type": "content.*",
        "contentType": "posts",
        "entryId": "1",
        "payload": 1,
        "since": "1-0",
        "token": "x",
        "ref": 1,
    }
    rng = random.Random(8259)
    messages = [
        {**good, "action": action, field: value}
        for action in swiftcms_ws.actions()
        for field in FIELDS
        for value in WRONG_VALUES
    ]
    # Several wrong or missing fields at once.
    for _ in range(400):
        message = {**good, "action": rng.choice(list(swiftcms_ws.actions()))}
        for field in rng.sample(FIELDS[1:], rng.randrange(2, 6)):
            if rng.random() < 0.3:
                message.pop(field, None)
            else:
                message[field] = rng.choice(WRONG_VALUES)
        messages.append(message)
    rng.shuffle(messages)
    codes: set[str] = set()
    limits = {"RATE": 100_000, "MAX_SUBSCRIPTIONS": 4}
    with attacked_server(caplog, **limits) as server, server.client() as client:
        # Not the `ref` of any of the messages.
        client.refs = itertools.count(1000)
        for start in range(0, len(messages), 50):
            client.sock.sendall(b"".join(text(**each) for each in messages[start : start + 50]))
            assert client.ask("heartbeat")["type"] == "system.heartbeat"
            codes.update(filter(None, map(error_code, client.messages)))
            client.messages.clear()
        client.close()
    assert codes == {
        *("unknown_action", "invalid_message", "invalid_type", "invalid_since", "invalid_token"),
        *("not_editing", "too_many_subscriptions"),
    }


STRANGE_HEADERS: list[dict[str, str | None]] = [
    {"Sec_WebSocket_Protocol": "caf\u00e9"},
    {"Sec_WebSocket_Protocol": ",,;\x01"},
    {"Sec_WebSocket_Extensions": "\u00ff; =;;,"},
    {"Sec_WebSocket_Version": "\u00e9"},
    {"Sec_WebSocket_Version": "-1"},
    {"Sec_WebSocket_Key": "\u00e9"},
    {"Sec_WebSocket_Key": ""},
    {"Connection": "Upgrade, \u00e9"},
    {"Host": "\u00e9"},
    {"Host": ""},
    {"Host": None},
    {"X_A": "a\0b"},
    {"X_(": "a"},
    {"Cookie": "session=\u00ff\u00fe; =; ;"},
    {"Authorization": "Bearer \u00e9"},
    {"Authorization": "Bearer"},
    {"Authorization": "\u00e9"},
    {"Content_Length": "-5"},
    {"Content_Length": "many"},
    {"Transfer_Encoding": "chunked"},
    {"Origin": "\u00ff"},
]


@pytest.mark.parametrize("headers", STRANGE_HEADERS, ids=str)
def test_noise_headers(
    victim: Server, caplog: pytest.LogCaptureFixture, headers: dict[str, str | None]
) -> None:
    """A handshake with headers that no browser sends succeeds, or is refused with JSON."""
    status, _, body = victim.handshake(**headers)
    assert status == 101 or (400 <= status < 500 and body["code"])
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("query", ["%ff%fe", "%00", "", "a.b.c&token=d", "x" * 20_000], ids=repr)
def test_noise_token(victim: Server, query: str) -> None:
    assert victim.handshake(f"/ws?token={query}")[0] == 401


def test_noise_handshakes(caplog: pytest.LogCaptureFixture) -> None:
    """Malformed, unfinished and slow requests take no slot and leave nothing behind."""
    rng = random.Random(2616)
    with attacked_server(caplog) as server:
        whole = upgrade_request(server.port)
        for number in range(80):
            data = bytearray(whole)
            match number % 4:
                case 0:
                    data = bytearray(rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n")
                case 1:
                    data = data[: rng.randrange(1, len(data) - 1)]
                case 2:
                    for _ in range(rng.randrange(1, 6)):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                case 3:
                    method = rng.choice([b"OPTIONS", b"HEAD", b"POST", b"DELETE"])
                    data = bytearray(method + data[3:])
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(data)
                    sock.settimeout(0.02)
                    sock.recv(65536)
                if number % 3 == 0:
                    reset(sock)
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in whole:
                sock.sendall(bytes([byte]))
            read_to(sock, b"system.connected")
            messages = text(action="subscribe", ref="drip")
            messages += fragments(b'{"action": "heartbeat", "ref": "drop"}', 1)
            for byte in messages:
                sock.sendall(bytes([byte]))
            assert b'"drip"' in read_to(sock, b'"ref": "drop"')


# -- Load ------------------------------------------------------------------------------------------


def test_load_connections() -> None:
    """After 1,000 connections, a third of them reset, nothing is left, and memory is flat."""
    with Server() as server:
        # The first client starts the threads that stay, and opens the files that stay.
        with server.client() as first:
            first.close()
        until(lambda: slots(server) == 0, "the end of the first client")
        threads, files = threading.active_count(), open_files()
        cycles, memory = itertools.count(1), {}

        def come_and_go() -> None:
            while (number := next(cycles)) <= 1000:
                sock = open_raw(server.port)
                sock.sendall(text(action="subscribe", type=f"kind{number}.*", ref=1))
                if number % 5 == 0:
                    sock.sendall(text(action="editStart", contentType="posts", entryId=str(number)))
                read_to(sock, b"system.subscribed")
                match number % 3:
                    case 0:
                        reset(sock)
                    case 1:
                        sock.sendall(Frames.masked(0x8, b"\x03\xe8"))
                        read_to_the_end(sock)
                sock.close()
                if number in (300, 1000):
                    memory[number] = resident()

        run_all([come_and_go] * 3, timeout=90)
        until(lambda: stat(server, "connections") == 0, "the end of all connections")
        assert server.hub.flush()
        left = ("subscriptions", "queue_length", "waiting_bytes", "errors")
        assert {name: stat(server, name) for name in left} == dict.fromkeys(left, 0)
        until(lambda: threading.active_count() <= threads, "the end of all threads")
        until(lambda: open_files() <= files, "the end of all files")
        until(lambda: slots(server) == 0, "the release of all slots")
        assert remains(server) == []
        with server.client() as last:
            assert last.ask("presence")["payload"]["entries"] == []
        assert memory[1000] - memory[300] < 10_000_000


FLOODER = """
import socket, sys
port, request, frame = int(sys.argv[1]), *(bytes.fromhex(each) for each in sys.argv[2:])
with socket.create_connection(("127.0.0.1", port)) as sock:
    sock.sendall(request)
    sock.recv(65536)
    print("flooding", flush=True)
    while True:
        sock.sendall(frame * 500)
"""

FLOODS = {
    "messages": text(action="heartbeat"),
    "pongs": Frames.masked(0xA),
    "long messages": Frames.masked(0x1, padded(60_000)),
}


@pytest.mark.parametrize("frame", FLOODS.values(), ids=FLOODS)
def test_load_flood(frame: bytes) -> None:
    """A client that floods is slowed down: it takes no memory, and delays no other client."""

    def delivery(count: int) -> float:
        times = []
        for number in range(count):
            began = time.perf_counter()
            server.publish(number)
            neighbour.receive()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    with Server(HEARTBEAT=1) as server, server.client() as neighbour:
        neighbour.subscribe()
        before, memory = delivery(100), resident()
        sent = upgrade_request(server.port).hex(), frame.hex()
        command = [sys.executable, "-c", FLOODER, str(server.port), *sent]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as flooder:
            try:
                assert flooder.stdout is not None
                assert flooder.stdout.readline() == b"flooding\n"
                during = delivery(150)
                until(lambda: stat(server, "throttled") > 0, "slowing down", timeout=8)
                during = max(during, delivery(150))
                grown = resident() - memory
                assert flooder.poll() is None, "the flooder was disconnected"
                assert stat(server, "connections") == 2
            finally:
                flooder.kill()
        shown = f"{before * 1000:.2f} ms before, {during * 1000:.2f} ms meanwhile"
        assert during < 2 * before + 0.005, shown
        assert grown < 20_000_000
        # Its unread bytes hide its end, which the second heartbeat finds.
        while stat(server, "connections") == 2:
            neighbour.receive(heartbeats=True)


# -- Time ------------------------------------------------------------------------------------------


@needs_redis
@pytest.mark.skipif(NGINX is None, reason="there is no nginx on this machine")
def test_idle_then_event(
    request: pytest.FixtureRequest,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After silence for longer than every timeout between publisher and clients, all get an event.

    Heartbeat, nginx, Redis and the checks of idle connections have timeouts that are shorter than
    the silence, as 25 to 200 seconds are shorter than a night. SOAK_IDLE=250 uses the true ones.
    """
    heartbeat, timeout = IDLE_SECONDS / 10, max(1, int(IDLE_SECONDS / 3))
    monkeypatch.setattr(swiftcms_ws.RedisLog, "MAX_IDLE", IDLE_SECONDS / 3)
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "CONFIRM_INTERVAL", IDLE_SECONDS / 5)
    monkeypatch.setattr(swiftcms_ws.SqliteLog, "PORT_LIFETIME", IDLE_SECONDS / 2)
    redis.send(f"CONFIG SET timeout {timeout}")
    logs = {
        "memory": Shared(),
        "file": Shared(DATABASE=str(tmp_path / "live.sqlite3")),
        "redis": Shared(REDIS_URL=redis.url),
    }
    clients, tasks, publishers, pages = IdleClients(heartbeat), [], [], []
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(HEARTBEAT=heartbeat, **log.config))
            for name, log in logs.items()
        }
        ports = [server.port for server in servers.values()]
        fronts = stack.enter_context(nginx_before(tmp_path, ports, timeout))
        for (name, server), front in zip(servers.items(), fronts, strict=True):
            tasks += clients.tasks(name, server.port)
            tasks += clients.tasks(f"{name} behind nginx", front)
            # A script has a connection to the shared log, which is idle too.
            is_shared = bool(logs[name].config)
            hub = stack.enter_context(logs[name].hub()) if is_shared else server.hub
            hub.publish("content.created", "posts", {"n": 0})
            publishers.append(hub)
            if CHROMIUM is not None:
                browser = request.getfixturevalue("browser")
                page = browser.page(f"http://127.0.0.1:{front}/")
                pages.append(stack.enter_context(contextlib.closing(page)))
                online(page)
        with running(tasks, 4 * PATIENCE + IDLE_SECONDS):
            until(clients.have_subscribed, "the subscriptions of all clients")
            # This is the silence.
            threading.Event().wait(IDLE_SECONDS)
            for hub in publishers:
                hub.publish("content.created", "posts", {"n": 1})
            until(lambda: all(clients.received.values()), "an event at all clients")
            clients.stop()
        assert clients.received == {name: [{"n": 1}] for name in clients.received}
        for page in pages:
            page.wait("got.length > 0")
            assert page.js("[got, onlines()]") == [[1], 1]
            assert page.complaints() == []


# SOAK=1 runs the whole test, with each log. By default it is a part of it, in memory.
IS_SOAK = "SOAK" in os.environ
SOAK_CONNECTIONS, SOAK_EVENTS = (20_000, 1_000_000) if IS_SOAK else (600, 20_000)


@pytest.mark.parametrize("log", ["memory", "file", "redis"] if IS_SOAK else ["memory"])
def test_memory_is_flat(request: pytest.FixtureRequest, tmp_path: Path, log: str) -> None:
    """Connections that come and go leave nothing behind: no object, thread or descriptor.

    Events do not either, although they arrive meanwhile and have many names and recipients.
    """
    config: dict[str, Any] = {"SWIFTCMS_WS_HEARTBEAT": 1, "SWIFTCMS_WS_HISTORY": 100}
    if log == "file":
        config["SWIFTCMS_WS_DATABASE"] = str(tmp_path / "live.sqlite3")
    elif log == "redis":
        config["SWIFTCMS_WS_REDIS_URL"] = request.getfixturevalue("redis").url
    # How much may grow. Objects have a limit for each type, which is passed if one of the six ways
    # to come and go leaves one. Strings and numbers count as blocks only.
    limits = {"memory": 10_000_000, "threads": 0, "files": 2, "slots": 0}
    limits["blocks"] = 2500 if IS_SOAK else 400
    with script_site(tmp_path, SOAK_SITE, TEST_CONFIG=json.dumps(config)) as process:
        url = f"http://127.0.0.1:{process.port}"
        clients = SoakClients(process.port)

        def state() -> dict[str, int]:
            return dict(json.loads(http(f"{url}/state")[2]))

        def growth() -> dict[str, int]:
            """Return what has grown by more than its limit."""
            most = defaultdict(lambda: SOAK_CONNECTIONS // 12, limits)
            left = {name: count - before.get(name, 0) for name, count in state().items()}
            return {name: count for name, count in left.items() if count > most[name]}

        def publish(count: int) -> None:
            for size in [5000] * (count // 5000) + [count % 5000]:
                clients.published += json.loads(http(f"{url}/publish/{size}", "POST")[2])["public"]

        def settle() -> None:
            # Timers of closed connections are left for some seconds.
            with contextlib.suppress(AssertionError):
                until(lambda: not growth(), "the end of all that was left", timeout=6)

        come_and_go = functools.partial(clients.come_and_go, SOAK_CONNECTIONS)
        with running([clients.stay], timeout=3600):
            # The history is full then, and everything was used once.
            clients.come_and_go(30)
            publish(1000)
            # What is used for the first time stays, but a leak is there again the next time.
            for _ in range(3):
                before = state()
                run_all([come_and_go, lambda: publish(SOAK_EVENTS)], timeout=3600)
                settle()
                if IS_SOAK:
                    print(log, {name: (before[name], state()[name]) for name in limits})
                if not growth():
                    break
            assert growth() == {}
            until(clients.have_received_all, "all events at all clients")
            clients.stop()
        assert "Traceback" not in process.output()


# -- Interleavings ---------------------------------------------------------------------------------

# Threads meet in three places: the loop's queue, the registry and the follower. Each run
# interleaves them in another way, which its seed decides. INTERLEAVINGS=5000 tries so many seeds,
# and INTERLEAVING_SEED=7 repeats one run.


@pytest.fixture(params=[Scheduler, FreeThreads], ids=["scheduled", "free"])
def interleave(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a scenario with many seeds. Threads may switch at every line of the given classes."""

    def run_with_all_seeds(scenario: Callable[[Any], None], *classes: type, count: int) -> None:
        if request.param is FreeThreads:
            count = max(2, count // 10)
        seeds = range(int(os.environ.get("INTERLEAVINGS", count)))
        if "INTERLEAVING_SEED" in os.environ:
            seeds = range(int(os.environ["INTERLEAVING_SEED"]), 1 << 62)[:1]
        for seed in seeds:
            run = request.param(seed, classes)
            try:
                with run.patched():
                    scenario(run)
            except BaseException as error:
                raise AssertionError(f"INTERLEAVING_SEED={seed}: {error!r}") from error

    return run_with_all_seeds


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let publishers wait for room after one large event, and send two events at once."""
    monkeypatch.setattr(swiftcms_ws.EventQueue, "MAX_QUEUED_BYTES", 10_000)
    monkeypatch.setattr(swiftcms_ws.EventQueue, "BATCH_EVENTS", 2)


def publish_and_receive(run: Scheduler | FreeThreads, engine: Engine, other: Hub) -> None:
    """Publish from several threads, and check that each client has all events once and in order.

    One client reads slowly, and one resumes twice. other: another hub with the same log
    """
    hub = engine.hub
    engine.has_served = True
    hub.start(engine)
    since = hub.publish("site.started", "site", {})
    if engine.follower is not None:
        # As a handshake does. Until then nothing is read from the shared log.
        engine.follower.wait_for_begin()
    assert hub.flush(30)
    # One large event fills the socket buffer of the slow client.
    reader, slow, late = (PairClient(engine, since, size) for size in (1 << 20, 4096, 1 << 20))
    for client in (reader, slow, late):
        while not client.is_subscribed():
            run.wait_for(client.is_readable)
    ids: list[str] = []
    calls: list[int] = []

    def publish(number: int) -> None:
        for size in (20_000, 10, 20_000):
            batch = [("content.created", "posts", "x" * size)] * (number + 1)
            found = hub.publish_many(batch) if number else [hub.publish(*batch[0])]
            ids.extend(found)
            if engine.log is None:
                # One publisher may have added its batch to a queue that was nearly full.
                assert queued_bytes(engine) < 10_000 + 45_000, "the queue is too long"
            assert position(hub.last_id()) >= position(found[-1]), "the newest id went back"
            assert hub.flush(30), "flush() waited in vain"
            assert set(found) <= set(reader.take()), "flush() returned too early"
            assert set(found) <= set(slow.take()), "flush() did not wait for the slow client"

    def publish_elsewhere() -> None:
        for _ in range(3):
            ids.append(other.publish("content.created", "posts", {}))

    def read(client: PairClient, count: int) -> None:
        while len(client.take()) < count:
            # The publishers read too.
            run.wait_for(lambda: len(client.ids) >= count or client.is_readable())

    def resume() -> None:
        for count in (2, 5):
            read(late, count)
            late.close()
            late.connect()
        read(late, 12)

    def call() -> None:
        for number in range(5):
            assert engine.loop.call(calls.append, number)

    tasks = [lambda: publish(0), lambda: publish(1), publish_elsewhere]
    run.run_all([*tasks, lambda: read(slow, 12), resume, call])
    assert hub.flush(30)
    ids.sort(key=position)
    assert len(set(ids)) == 12, "two events have one id"
    assert (reader.take(), slow.take(), late.take()) == (ids, ids, ids)
    assert calls == [0, 1, 2, 3, 4]
    assert hub.last_id() == ids[-1]
    for client in (reader, slow, late):
        client.close()
    assert hub.close()
    assert engine.registry.slots == 0
    assert (engine.loop.queue_length(), queued_bytes(engine)) == (0, 0)


def test_interleaved_queue(interleave: Callable[..., None], small_queue: None) -> None:
    """Events keep the order of their ids, no wake-up is lost, and flush() waits for its events."""

    def scenario(run: Scheduler | FreeThreads) -> None:
        app, hub = Flask("site"), Hub()
        app.config["SWIFTCMS_WS_HEARTBEAT"] = NEVER
        hub.init_app(app)
        run.run(lambda: publish_and_receive(run, hub.engine_of(app), hub))

    classes = (swiftcms_ws.EventQueue, swiftcms_ws.Loop, swiftcms_ws.ReentryGuard)
    interleave(scenario, *classes, count=25)


def test_interleaved_wake_up(interleave: Callable[..., None]) -> None:
    """Whatever the loop is doing, a call wakes it, and stop() ends it after the last call."""

    def scenario(run: Scheduler | FreeThreads) -> None:
        def log(level: int, message: str, **more: Any) -> None:
            raise AssertionError(message) from more["exc_info"]

        parts = (swiftcms_ws.Registry(), swiftcms_ws.History(10), swiftcms_ws.Counters())
        loop = swiftcms_ws.Loop(*parts, log)
        calls: list[int] = []

        def call() -> None:
            for number in range(5):
                is_done = swiftcms_ws.threading.Event()
                assert loop.call(calls.append, number)
                assert loop.call(is_done.set)
                assert is_done.wait(30), "a call was not made"

        def main() -> None:
            loop.start()
            run.run_all([call] * 2)
            loop.call(calls.append, 5)
            loop.stop()
            assert sorted(calls) == sorted([*range(5), *range(5), 5])

        run.run(main)

    interleave(scenario, swiftcms_ws.EventQueue, swiftcms_ws.Loop, count=200)


def test_interleaved_follower(
    interleave: Callable[..., None], small_queue: None, tmp_path: Path
) -> None:
    """The follower reads each entry of a shared log once and in order, and flush() waits for it."""
    paths = map(str, (tmp_path / f"{number}.sqlite3" for number in itertools.count()))

    def scenario(run: Scheduler | FreeThreads) -> None:
        app, path = Flask("site"), next(paths)
        hub, other = Hub(database=path), Hub(database=path)
        app.config["SWIFTCMS_WS_HEARTBEAT"] = NEVER
        hub.init_app(app)
        run.run(lambda: publish_and_receive(run, hub.engine_of(app), other))
        assert other.close()

    classes = (swiftcms_ws.Follower, swiftcms_ws.SharedLog, swiftcms_ws.SqliteLog)
    interleave(scenario, *classes, swiftcms_ws.EventQueue, count=15)


def test_interleaved_append(interleave: Callable[..., None]) -> None:
    """A thread's newest event stays the newest, or flush() would not wait for it."""

    def scenario(run: Scheduler | FreeThreads) -> None:
        log = CountingLog()

        def append() -> None:
            for _ in range(5):
                newest = log.append([swiftcms_ws.MARKER])[-1]
                assert log.last_appended >= newest

        run.run(lambda: run.run_all([append] * 3))

    interleave(scenario, swiftcms_ws.SharedLog, count=30)


REGISTRY_PATTERNS = [("content.*", "*"), ("content.created", "posts"), ("*", "*"), ("*", "media")]


def use_registry(run: Scheduler | FreeThreads) -> None:
    """Connect, subscribe, sign in and leave in several threads, which see their own changes."""
    registry = swiftcms_ws.Registry()
    holders: set[int] = set()

    def check(each: Subscriber) -> None:
        names = ("content.created", "posts")
        is_subscribed = not each.subscriptions.keys().isdisjoint(REGISTRY_PATTERNS[:3])
        found = registry.matching(*names, None, each.framing)
        assert (each in found) is is_subscribed, "the subscribers of an event are wrong"
        found = registry.matching(*names, frozenset({"ana"}), each.framing)
        is_receiver = is_subscribed and each.user is not None and each.user.id == "ana"
        assert (each in found) is is_receiver, "the receivers of a user's event are wrong"
        assert registry.count_subscriptions() >= len(each.subscriptions)
        assert each in registry.connections()

    def connect(number: int) -> None:
        chance = random.Random(number)
        for visit in range(2):
            while not registry.reserve(2):
                run.wait_for(lambda: registry.slots < 2)
            holders.add(number)
            assert len(holders) <= 2, "there are more connections than slots"
            each = Subscriber(f"{number}.{visit}")
            registry.add(each)
            assert registry.find(each.id) is each
            for _ in range(4):
                pattern = chance.choice(REGISTRY_PATTERNS)
                match chance.randrange(4):
                    case 0:
                        was_subscribed = pattern in each.subscriptions
                        assert registry.unsubscribe(each, [pattern]) == was_subscribed
                    case 1 if each.user is None:
                        registry.sign_in(each, swiftcms_ws.User("ana"), (1, 0))
                    case _:
                        registry.subscribe(each, pattern, (1, 0))
                        assert pattern in registry.patterns(10)
                check(each)
            registry.remove(each)
            holders.remove(number)
            registry.release()
    def wait_until_empty() -> None:
        assert registry.wait_until_empty(swiftcms_ws.time.monotonic() + 30)

    connections = [functools.partial(connect, number) for number in range(3)]
    run.run_all([*connections, wait_until_empty])
    assert registry.slots == 0
    assert registry.connections() == registry.connections("ana") == []
    assert (registry.count_subscriptions(), registry.patterns(10)) == (0, [])


def test_interleaved_registry(interleave: Callable[..., None]) -> None:
    """Slots are counted exactly, and each thread sees its own changes at once."""

    def scenario(run: Scheduler | FreeThreads) -> None:
        run.run(lambda: use_registry(run))

    interleave(scenario, swiftcms_ws.Registry, count=40)


# -- The model -------------------------------------------------------------------------------------

# A Hypothesis state machine lets publishers, clients, processes and logs do things to each other in
# random orders. The docstring of Model says what clients are entitled to, whatever happens.
#
# The suite runs a few examples, always the same ones. This runs random ones for an hour:
#
#     export SOAK_SECONDS=3600
#     pytest -p test_swiftcms_ws --hypothesis-profile soak "test_swiftcms_ws.py::test_model[redis]"
#
# With -p, pytest imports this file, and so the profiles below, before it looks for the profile.
# It prints the seed of each ten examples, and at the end how often each fault has happened. Of a
# failure it prints the shortest example that it finds. With MODEL_SEED=N, the ten examples of that
# seed run again. Threads and processes run at their own pace, so a failure may need several runs.

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    stateful_step_count=25,
    # Looking for a shorter example can take five minutes, which the suite does not have.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "soak",
    settings.get_profile("ci"),
    derandomize=False,
    max_examples=10,
    phases=list(Phase),
    stateful_step_count=40,
)
settings.load_profile("ci")


# Forks a process for each site of the model, which is quicker than a new interpreter.
MODEL_SITES = '''
import json, os, signal, socket, sys, threading, time

clock_shift = 0
system_clock = time.time_ns
time.time_ns = lambda: system_clock() + clock_shift

from flask import Flask, request
from werkzeug.serving import make_server

import swiftcms_ws
from swiftcms_ws import EVERYONE, Hub, PublishError


def publish(hub, batches, pause=0):
    """Publish each batch in a thread of its own; return the ids of accepted events by number."""
    ids = {}

    def run(batch):
        numbers = [event[0] for event in batch["events"]]
        events = [
            (kind, content_type, {"n": n, "filler": "x" * size}, EVERYONE if to is None else to)
            for n, kind, content_type, to, size in batch["events"]
        ]
        try:
            if batch["many"]:
                ids.update(zip(numbers, hub.publish_many(events)))
                return
            for number, event in zip(numbers, events):
                ids[number] = hub.publish(*event[:3], to=event[3])
                time.sleep(pause)
        except PublishError:
            pass

    threads = [threading.Thread(target=run, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ids


def in_child(function):
    """Return the result of a function in a forked child."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(function()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        return json.loads(pipe.read() or "{}")


def set_clock(milliseconds):
    global clock_shift
    clock_shift = milliseconds * 1_000_000


def serve(orders, answers, config, log):
    app = Flask("model")
    app.secret_key = KEY
    app.config.update(config)
    hub = Hub()
    hub.identify(lambda: request.args.get("user"))
    hub.init_app(app)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def from_script(batches):
        with Hub(**log) as script:
            return publish(script, batches)

    actions = {
        "publish": lambda batches: publish(hub, batches),
        "publish slowly": lambda batches: publish(hub, batches, pause=0.0002),
        "publish in a fork": lambda batches: in_child(lambda: publish(hub, batches)),
        "publish from a script": lambda batches: in_child(lambda: from_script(batches)),
        "count connections": lambda: hub.stats()["connections"],
        "disconnect": hub.disconnect,
        "set clock": set_clock,
        "close": hub.close,
        "id": os.getpid,
    }
    print(json.dumps(server.port), file=answers, flush=True)
    for line in orders:
        action, *arguments = json.loads(line)
        try:
            answer = actions[action](*arguments)
        except PublishError as error:
            answer = str(error)
        print(json.dumps(answer), file=answers, flush=True)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with socket.create_connection(("127.0.0.1", order["port"])) as sock:
            serve(sock.makefile("r"), sock.makefile("w"), order["config"], order["log"])
        os._exit(0)
'''.replace("KEY", repr(KEY))

# How long a client of the model waits for its events, in seconds.
MODEL_PATIENCE = 15.0


class ModelSite:
    """A process of the model's site, and the connection that controls it."""

    def __init__(
        self, sites: subprocess.Popen[str], config: dict[str, Any], log: dict[str, str]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(PATIENCE)
            order = {"port": listener.getsockname()[1], "config": config, "log": log}
            assert sites.stdin is not None
            sites.stdin.write(json.dumps(order) + "\n")
            sites.stdin.flush()
            self._sock, _ = listener.accept()
        self._sock.settimeout(PATIENCE)
        self._file = self._sock.makefile("rw")
        self.port: int = json.loads(self._file.readline())
        self.pid: int = self.ask("id")

    def order(self, *action: Any) -> None:
        self._file.write(json.dumps(action) + "\n")
        self._file.flush()

    def ask(self, *action: Any) -> Any:
        self.order(*action)
        return self.answer()

    def answer(self) -> Any:
        return json.loads(self._file.readline())

    def wait_for_answer(self, seconds: float) -> None:
        select.select([self._sock], [], [], seconds)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError):
            # Until the process is gone, it may still store events.
            while self._file.readline():
                pass
        self._file.close()
        self._sock.close()


class MemoryLog:
    """No log: one process, which forgets its events when it exits."""

    site_count = 1
    # Whether an event may be stored although publish() has raised PublishError.
    may_store_refused = False
    faults: tuple[str, ...] = ("none",)

    def options(self) -> dict[str, str]:
        """Return the arguments of a script's Hub; the log is empty."""
        return {}

    @contextlib.contextmanager
    def held(self, fault: str) -> Iterator[None]:
        """Make the log unusable for a while."""
        yield


class SqliteLog(MemoryLog):
    """Two processes that share a file."""

    site_count = 2
    faults = ("IMMEDIATE", "EXCLUSIVE")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)

    def options(self) -> dict[str, str]:
        self._path = str(self._directory / f"{next(self._numbers)}.sqlite3")
        return {"database": self._path}

    @contextlib.contextmanager
    def held(self, fault: str) -> Iterator[None]:
        """Lock the file, as a program that copies it does."""
        connection = sqlite3.connect(self._path, PATIENCE, isolation_level=None)
        with contextlib.closing(connection):
            connection.execute(f"BEGIN {fault}")
            yield


class RedisLog(MemoryLog):
    """Two processes that share a Redis."""

    site_count = 2
    # Redis may read a command after publish() has stopped waiting for the answer.
    may_store_refused = True
    faults = ("freeze", "restart")

    def __init__(self, directory: Path) -> None:
        self.redis = Redis(directory)

    def options(self) -> dict[str, str]:
        self.redis.send("FLUSHALL")
        return {"redis_url": self.redis.url}

    @contextlib.contextmanager
    def held(self, fault: str) -> Iterator[None]:
        """Stop the process of Redis, or kill it; it stores each event before it answers."""
        if fault == "restart":
            self.redis.kill()
        else:
            self.redis.popen.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            if fault == "restart":
                self.redis.start()
            else:
                self.redis.popen.send_signal(signal.SIGCONT)
                # Commands that arrived before are executed before this one.
                self.redis.send("PING")


@dataclasses.dataclass
class Published:
    """An event of the truth."""

    n: int
    id: tuple[int, int]
    type: str
    content_type: str
    to: list[str] | None

    def matches(self, pattern: tuple[str, str]) -> bool:
        return all(map(swiftcms_ws.matches, pattern, (self.type, self.content_type)))


def parsed_id(event_id: str) -> tuple[int, int]:
    milliseconds, counter = event_id.split("-")
    return int(milliseconds), int(counter)


class ModelClient:
    """A client of the model: the events that it must, may and did receive.

    The subclasses receive them, and resume as PROTOCOL.md says. They read only if the model lets
    them: in between, they are clients that have stalled.
    """

    # Whether a half-open connection is noticed by the heartbeat.
    has_pongs = False

    def __init__(self, model: Model, user: str | None) -> None:
        self.model = model
        self.user = user
        self.site: ModelSite | None = None
        self.connection: Any = None
        self.patterns: list[tuple[str, str]] = []
        # Up to which event a pattern has received none, because its subscription is newer.
        self.began: dict[tuple[str, str], tuple[int, int]] = {}
        # The `since` of the next request, and the process that has named it.
        self.place: str | None = None
        self.place_site: ModelSite | None = None
        # Deliveries: numbers of events, but client.js calls the handler of each pattern.
        self.must: set[Any] = set()
        self.received: set[Any] = set()
        # Numbers of events that it may receive beside these.
        self.may: set[int] = set()
        # How many events of a replay are still to come.
        self.replaying = 0
        # How often it was told that it may have missed events.
        self.losses = 0

    def is_receiver(self, event: Published) -> bool:
        return event.to is None or self.user in event.to

    def matches(
        self, events: list[Published], patterns: list[tuple[str, str]] | None = None
    ) -> set[tuple[tuple[str, str], int]]:
        """Return pairs of a pattern and the number of an event that it is entitled to."""
        return {
            (pattern, event.n)
            for event in events
            for pattern in (self.patterns if patterns is None else patterns)
            if self.is_receiver(event)
            and event.matches(pattern)
            and event.id > self.began.get(pattern, (0, 0))
        }

    def deliveries(
        self, events: list[Published], patterns: list[tuple[str, str]] | None = None
    ) -> set[Any]:
        """Return what the client is entitled to, of some events."""
        return {number for _, number in self.matches(events, patterns)}

    def add_pattern(self, pattern: tuple[str, str]) -> None:
        if pattern not in self.patterns:
            self.patterns.append(pattern)
            self.began[pattern] = parsed_id(self.place) if self.place else (0, 0)

    @staticmethod
    def number(delivery: Any) -> int:
        return delivery

    @property
    def has_begun(self) -> bool:
        return self.place is not None

    def missing(self) -> set[Any]:
        return self.must - self.received

    def receive(self, delivery: Any) -> None:
        number = self.number(delivery)
        is_allowed = delivery in self.must or number in self.may
        assert is_allowed, f"event {number} is not for this client"
        self.received.add(delivery)

    def lose(self) -> None:
        """The server has said that events may be lost: the client loads its data again."""
        self.model.check_loss(self)
        self.losses += 1
        # Ids may go back.
        self.began.clear()
        self.may |= set(map(self.number, self.must))
        self.must &= self.received

    def newer(self) -> list[Published]:
        """Return the events of which `since` asks for a replay."""
        assert self.place is not None
        since = parsed_id(self.place)
        return [event for event in self.model.truth if event.id > since]

    # -- the connection: any of these may raise Closed or OSError ----------------------------------

    def open(self, site: ModelSite) -> None:
        raise NotImplementedError

    def subscribe(self, patterns: list[tuple[str, str]]) -> None:
        """Subscribe to some of the patterns with `since`. The replay is still to come."""
        raise NotImplementedError

    def unsubscribe(self, patterns: list[tuple[str, str]]) -> None:
        """Unsubscribe from patterns, which are not among `patterns` any more."""
        raise NotImplementedError

    def sign_in(self, token: str) -> None:
        raise NotImplementedError

    def read(self, deadline: float) -> None:
        """Read until everything that must come has come."""
        raise NotImplementedError

    def finish(self) -> None:
        """Read all that is on its way, although nothing must come any more."""
        raise NotImplementedError

    def leave(self, how: str) -> None:
        """Lose the connection: "reset", "close", "stall" or "half-open".

        If it is half-open, the server's data vanish, and nobody closes anything.
        """
        raise NotImplementedError

    def notice_sign_out(self) -> None:
        """The server has closed the connection, because the user was signed out."""
        with pytest.raises((Closed, OSError)):
            while True:
                self.take(self.connection.receive(heartbeats=True))
        self.leave("close")

    def take(self, message: dict[str, Any]) -> None:
        """Note a message, and check the order."""
        raise NotImplementedError

    def read_messages(self, deadline: float) -> None:
        while self.missing() or self.replaying:
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"never received: {sorted(self.missing())}"
            with contextlib.suppress(TimeoutError):
                self.take(self.connection.receive(min(remaining, 1), heartbeats=True))

    def end(self) -> None:
        """The example is over."""
        if self.connection is not None:
            self.leave("close")


def swallow(sock: socket.socket) -> None:
    """Thread body: let everything vanish that arrives, until the connection is closed."""
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


class WebSocketClient(ModelClient):
    """Its place does not move while a replay is under way."""

    has_pongs = True

    def __init__(self, model: Model, user: str | None) -> None:
        super().__init__(model, user)
        # Connections that it has left without closing them.
        self.left: list[Client] = []

    def open(self, site: ModelSite) -> None:
        path = "/ws" if self.user is None else f"/ws?user={self.user}"
        self.site, self.connection = site, Client(site.port, path, receive_buffer=4096)
        # What has arrived on this connection: numbers, and the newest live id and replayed id.
        self.arrived: set[int] = set()
        self.newest_live = self.newest_replayed = self.since = (0, 0)
        self.replaying, self.is_asking = 0, False
        self.connected_at = self.connection.hello["payload"]["lastId"]
        if self.place is None:
            self.place, self.place_site = self.connected_at, site
        # The newest id during a replay.
        self.newest = self.place

    def subscribe(self, patterns: list[tuple[str, str]]) -> None:
        assert self.place is not None
        self.since = parsed_id(self.place)
        # Live events that come before the answer do not move the place.
        self.is_asking = True
        items = pairs(*patterns)
        answer = self.ask("subscribe", subscriptions=items, since=self.place)["payload"]
        self.is_asking = False
        assert answer["refused"] == []
        if not answer["recovered"]:
            self.lose()
            # The place may move back.
            self.place = self.newest = self.connected_at
            self.since = (0, 0)
        self.place_site = self.site
        self.replaying, self.newest_replayed = answer["replayed"], (0, 0)

    def unsubscribe(self, patterns: list[tuple[str, str]]) -> None:
        self.ask("unsubscribe", subscriptions=pairs(*patterns))

    def sign_in(self, token: str) -> None:
        self.ask("authenticate", token=token)

    def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        """Send a message and read until its answer."""
        try:
            self.connection.send(action=action, ref="model", **fields)
        except LocalProtocolError:
            raise Closed(None, "its close frame had come before") from None
        while True:
            message = self.connection.receive(heartbeats=True)
            if message.get("ref") == "model":
                assert message["type"] != "system.error", message
                return message
            self.take(message)

    def take(self, message: dict[str, Any]) -> None:
        if message["type"] == "system.heartbeat":
            self.move(message["payload"]["lastId"])
            with contextlib.suppress(LocalProtocolError):
                self.connection.send(action="pong")
        if "id" not in message:
            return
        number, event_id = message["payload"]["n"], parsed_id(message["id"])
        assert number not in self.arrived, f"event {number} came twice"
        assert event_id > self.since, f"event {number} is older than `since`"
        if self.replaying:
            assert event_id > self.newest_replayed, f"event {number} was replayed out of order"
            self.newest_replayed = event_id
            self.replaying -= 1
        else:
            assert event_id > self.newest_live, f"event {number} is out of order"
            self.newest_live = event_id
        self.arrived.add(number)
        self.receive(number)
        self.move(message["id"])

    def move(self, event_id: str) -> None:
        assert self.newest is not None
        self.newest = max(self.newest, event_id, key=parsed_id)
        if not self.replaying and not self.is_asking:
            self.place = self.newest

    def read(self, deadline: float) -> None:
        self.read_messages(deadline)

    def finish(self) -> None:
        # The answer comes after all earlier events.
        self.ask("heartbeat")

    def leave(self, how: str) -> None:
        match how:
            case "reset":
                self.connection.reset()
            case "close":
                self.connection.sock.close()
            case "half-open":
                sock = self.connection.sock
                sock.settimeout(None)
                threading.Thread(target=swallow, args=(sock,), daemon=True).start()
        if how in ("stall", "half-open"):
            self.left.append(self.connection)
        self.connection = None

    def end(self) -> None:
        super().end()
        for connection in self.left:
            # Otherwise the thread that reads from it would not notice.
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
            connection.sock.close()


class HttpClient(ModelClient):
    """A stream, or one poll after the other. It resumes as EventSource does."""

    def __init__(self, model: Model, user: str | None, is_stream: bool) -> None:
        super().__init__(model, user)
        self.is_stream = is_stream

    def open(self, site: ModelSite) -> None:
        self.site = site
        if self.place is None or not self.patterns:
            # The answer names the newest id.
            self.request()

    def subscribe(self, patterns: list[tuple[str, str]]) -> None:
        self.request()

    def unsubscribe(self, patterns: list[tuple[str, str]]) -> None:
        self.request()

    def sign_in(self, token: str) -> None:
        self.leave("close")

    def request(self) -> None:
        """Ask for the events after the place, and read the first message."""
        assert self.site is not None
        if self.connection is not None:
            self.connection.sock.close()
        query = [("sub", ":".join(pattern)) for pattern in self.patterns]
        if not query:
            # Without `sub`, it would be all events.
            query.append(("sub", "system.none"))
        if self.user is not None:
            query.append(("user", self.user))
        if not self.is_stream:
            query.append(("mode", "poll"))
        if self.place is not None:
            # As in the address of an EventSource. Last-Event-ID goes before it.
            query.append(("since", "1-0"))
        self.replaying = 0
        self.connection = Stream(self.site.port, urlencode(query), since=self.place)
        assert self.connection.status == 200
        self.take(self.connection.receive(heartbeats=True))

    def take(self, message: dict[str, Any]) -> None:
        place, payload = message["blockId"], message["payload"]
        if message["type"] == "system.error":
            raise Closed(None, payload["code"])
        if message["type"] == "system.subscribed":
            assert payload["refused"] == []
            if not payload["recovered"]:
                self.lose()
            else:
                assert place == self.place or self.place is None, "the answer moves the place"
            self.replaying = payload["replayed"]
            self.place, self.place_site = place, self.site
            return
        assert self.place is not None
        if message["type"] == "system.heartbeat":
            assert not self.replaying, "a replay was not complete"
            assert parsed_id(place) >= parsed_id(self.place), "the place went back"
        else:
            number = payload["n"]
            assert place == message["id"]
            assert parsed_id(place) > parsed_id(self.place), f"event {number} is out of order"
            self.replaying -= self.replaying > 0
            self.receive(number)
        self.place = place

    def read(self, deadline: float) -> None:
        if self.is_stream:
            self.read_messages(deadline)
            return
        while self.missing():
            try:
                self.read_messages(deadline)
            except Closed as closed:
                if closed.reason is not None:
                    raise
                # The response is complete. The pause that the server asks for is longer.
                threading.Event().wait(0.01)
                self.request()

    def finish(self) -> None:
        if not self.is_stream:
            self.request()
        with contextlib.suppress(TimeoutError, Closed):
            while True:
                self.take(self.connection.receive(0.001, heartbeats=True))

    def leave(self, how: str) -> None:
        if self.connection is not None:
            if how == "reset":
                reset(self.connection.sock)
            self.connection.sock.close()
        self.connection = None

    def notice_sign_out(self) -> None:
        # The server knows no poll after its response.
        if self.is_stream:
            super().notice_sign_out()


class Tunnel(Proxy):
    """A proxy that can swallow the data of its connections."""

    def __init__(self) -> None:
        self._swallowed: set[socket.socket] = set()
        super().__init__(0)

    def swallow(self) -> None:
        """From now on, the data of these connections vanish in both directions."""
        with self._lock:
            self._swallowed.update(itertools.chain(*self._pairs))

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:  # type: ignore[override]
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._swallowed:
                    sink.sendall(data)
            if source not in self._swallowed:
                sink.shutdown(socket.SHUT_WR)


MODEL_PAGE = """
const clients = [];
function create(number, url) {
  const cms = new SwiftCMS({ url });
  const client = { cms, log: [], stops: {} };
  cms.onstatus = status => client.log.push([status]);
  cms.ongap = () => client.log.push(["gap"]);
  clients[number] = client;
}
function subscribe(number, type, contentType) {
  const { cms, log, stops } = clients[number];
  let kind = "event";
  const stop = cms.subscribe(type, contentType, event =>
    log.push([kind, type, contentType, event.payload.n]));
  stops[`${type} ${contentType}`] = () => {
    kind = "event after unsubscribing";
    stop();
  };
}
const takeLog = number => clients[number].log.splice(0);
"""


class PageClient(ModelClient):
    """A SwiftCMS object in a page of Chromium, behind a proxy of its own. It reconnects by itself.

    Its deliveries are pairs of a pattern and a number, because each handler is called once.
    """

    def __init__(self, model: Model, user: str | None, page: Page, index: int) -> None:
        super().__init__(model, user)
        self.page = page
        self.index = index
        self.is_online = False
        self.tunnel = Tunnel()

    def deliveries(
        self, events: list[Published], patterns: list[tuple[str, str]] | None = None
    ) -> set[Any]:
        return self.matches(events, patterns)

    @staticmethod
    def number(delivery: Any) -> int:
        return delivery[1]

    @property
    def has_begun(self) -> bool:
        return self.site is not None

    def newer(self) -> list[Published]:
        # The page's own place is not known. A new subscription may begin there.
        self.may |= {event.n for event in self.model.truth if self.is_receiver(event)}
        return []

    def open(self, site: ModelSite) -> None:
        is_new = self.site is None
        self.site = self.connection = site
        self.tunnel.target = site.port
        if is_new:
            query = "" if self.user is None else f"?user={self.user}"
            self.page.js(f"create({self.index}, 'ws://127.0.0.1:{self.tunnel.port}/ws{query}')")
            self.subscribed: set[tuple[str, str]] = set()
            until(self._is_online, "the connection of a page")

    def _is_online(self) -> bool:
        self.collect()
        return self.is_online

    def subscribe(self, patterns: list[tuple[str, str]]) -> None:
        for pattern in patterns:
            if pattern not in self.subscribed:
                self.subscribed.add(pattern)
                self.page.js(f"subscribe({self.index}, {json.dumps(pattern)[1:-1]})")

    def unsubscribe(self, patterns: list[tuple[str, str]]) -> None:
        self.subscribed -= set(patterns)
        keys = json.dumps([" ".join(pattern) for pattern in patterns])
        # All that was called before belongs to the subscription.
        stop = f"for (const key of {keys}) clients[{self.index}].stops[key]();"
        self.note(self.page.js(f"{{ const log = takeLog({self.index}); {stop} log }}"))

    def sign_in(self, token: str) -> None:
        """The page has no token."""

    def collect(self) -> None:
        self.note(self.page.js(f"takeLog({self.index})"))

    def note(self, log: list[list[Any]]) -> None:
        for kind, *details in log:
            if kind == "gap":
                self.lose()
            elif kind == "event":
                *pattern, number = details
                delivery = (tuple(pattern), number)
                assert delivery not in self.received, f"event {number} came twice"
                self.receive(delivery)
            else:
                assert kind in ("connecting", "offline", "online"), (kind, details)
                self.is_online = kind == "online"

    def read(self, deadline: float) -> None:
        self.collect()
        pause = threading.Event()
        while self.missing():
            assert time.monotonic() < deadline, f"never received: {sorted(self.missing())}"
            pause.wait(0.01)
            self.collect()

    def finish(self) -> None:
        self.collect()

    def leave(self, how: str) -> None:
        if self.site not in self.model.sites:
            self.connection = None
        elif how == "half-open" and self.model.heartbeat < 1:
            self.tunnel.swallow()
        else:
            self.tunnel.cut()

    def notice_sign_out(self) -> None:
        """The page connects again, as the same user."""

    def end(self) -> None:
        if self.site is not None:
            self.page.js(f"clients[{self.index}].cms.close()")
        self.tunnel.__exit__()


EVENT_NAMES = ["content.created", "content.media.added", "order.paid"]

CONTENT_NAMES = ["posts", "posts.3.comments", "pages"]

MODEL_PATTERNS = st.tuples(
    st.sampled_from(["*", "content.*", "content.media.*", *EVENT_NAMES]),
    st.sampled_from(["*", "posts.*", *CONTENT_NAMES]),
)

# Type, content type, receivers, and bytes of the payload. One draw is quicker than four.
MODEL_EVENTS = list(
    itertools.product(
        EVENT_NAMES,
        CONTENT_NAMES,
        [None, None, None, ["ana"], ["ana", "bob"], []],
        # Together the large ones exceed what a client may leave unread.
        [10, 10, 10, 3000, 30_000],
    )
)

# Each batch is published by a thread of its own.
MODEL_BATCHES = st.lists(
    st.fixed_dictionaries(
        {
            # With publish_many(), or one event after the other.
            "many": st.booleans(),
            "events": st.lists(st.sampled_from(MODEL_EVENTS), min_size=1, max_size=8),
        }
    ),
    min_size=1,
    max_size=3,
)

CLIENTS = st.integers(0, 3)

CLIENT_SETS = st.sets(CLIENTS, max_size=3)

SITES = st.integers(0, 1)

WAYS = st.sampled_from(["publish", "publish in a fork", "publish from a script"])

TRANSPORTS = st.sampled_from(["websocket", "websocket", "websocket", "stream", "poll"])


class Model(RuleBasedStateMachine):
    """What clients are entitled to, whatever happens to them, to the processes and to the log.

    The truth is the list of the events that publish() has accepted, in the order of their ids. A
    client that resumes with `since`, as PROTOCOL.md says, over as many connections as it takes,

    - receives each event that matches one of its subscriptions and is not for other users: once
      after each place from which it resumes, on each connection in the order of ids
    - receives nothing else: no event of other users, and none after `system.unsubscribed`
    - or gets `recovered: false`, from client.js as a call of `ongap`. This is allowed only if
      HISTORY events are newer than `since`, or, without a shared log, if the process has restarted.

    If a process is killed while it publishes, or the log is away, an event is stored or not. If it
    is, all clients receive it; if it is not, none does. What publish() has refused is not stored
    in SQLite, and may be stored in Redis. The ids of a log only grow, whatever the clock does.
    A half-open connection is closed by its heartbeat: at the end, the server has no others left.
    """

    log: MemoryLog
    # The process that forks sites.
    processes: subprocess.Popen[str]
    # A page whose clients use client.js; None: the clients are ours.
    page: Page | None = None
    # What has happened in all examples.
    tally: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.truth: list[Published] = []
        self.clients: list[ModelClient] = []
        self.sites: list[ModelSite | None] = [None] * self.log.site_count
        self.is_shared = self.log.site_count > 1
        # How many processes were killed, and how many events of the log no client receives.
        self.deaths = 0
        self.hidden = 0
        self.history = 0
        self.heartbeat = 60.0

    @initialize(
        # With few events kept, replays fail. With rare heartbeats, nothing hides a lost wake-up.
        history=st.sampled_from([1000, 1000, 20]),
        heartbeat=st.sampled_from([60, 60, 0.5]),
        transports=st.tuples(*[TRANSPORTS] * 4),
        patterns=st.tuples(*[st.lists(MODEL_PATTERNS, max_size=3, unique=True)] * 4),
    )
    def begin(
        self,
        history: int,
        heartbeat: float,
        transports: tuple[str, ...],
        patterns: tuple[list[tuple[str, str]], ...],
    ) -> None:
        """Connect all clients, so that every step from here on matters to some of them."""
        self.tally["examples"] += 1
        self.history, self.heartbeat = history, heartbeat
        self.options = self.log.options()
        users = (None, "ana", "ana", "bob") if self.page is None else ("ana", "bob")
        for index, user in enumerate(users):
            self.clients.append(self.create_client(user, transports[index], index))
        for index, client in enumerate(self.clients):
            client.patterns = list(patterns[index])
            self.connect(index, index)

    def create_client(self, user: str | None, transport: str, index: int) -> ModelClient:
        if self.page is not None:
            return PageClient(self, user, self.page, index)
        if transport == "websocket":
            return WebSocketClient(self, user)
        return HttpClient(self, user, is_stream=transport == "stream")

    # -- processes ---------------------------------------------------------------------------------

    def site(self, index: int) -> ModelSite:
        """Return a process of the site, started if need be."""
        index %= len(self.sites)
        found = self.sites[index]
        if found is None:
            names = {"database": "DATABASE", "redis_url": "REDIS_URL"}
            config: dict[str, Any] = {
                "HISTORY": self.history,
                "MAX_QUEUE": 100_000,
                "HEARTBEAT": self.heartbeat,
                "ORIGINS": "*",
                **{names[name]: value for name, value in self.options.items()},
            }
            config = {f"SWIFTCMS_WS_{name}": value for name, value in config.items()}
            found = self.sites[index] = ModelSite(self.processes, config, self.options)
        return found

    def kill(self, index: int) -> None:
        """End a process, and with it its connections. Without a log, so are its events."""
        site = self.site(index)
        site.kill()
        self.tally["processes killed"] += 1
        self.deaths += 1
        self.sites[index % len(self.sites)] = None
        for client in self.clients:
            if client.site is site and client.connection is not None:
                client.leave("close")
        if not self.is_shared:
            self.truth.clear()

    @rule(index=SITES, is_graceful=st.booleans())
    def restart_process(self, index: int, is_graceful: bool) -> None:
        """Kill a process, or let it close its clients with 1001 first."""
        if is_graceful:
            self.site(index).ask("close")
        self.kill(index)

    @rule(
        index=SITES,
        batches=MODEL_BATCHES,
        others=MODEL_BATCHES,
        leaving=CLIENT_SETS,
        seconds=st.sampled_from([0.05, 0.05, 0.3]),
    )
    def freeze_process(
        self,
        index: int,
        batches: list[dict[str, Any]],
        others: list[dict[str, Any]],
        leaving: set[int],
        seconds: float,
    ) -> None:
        """A process stands still. Meanwhile another one publishes, and clients leave."""
        self.tally["processes frozen"] += 1
        site, batches = self.site(index), self.numbered(batches)
        with site.frozen():
            site.order("publish", batches)
            if self.is_shared:
                # A process that holds the lock of a file may have been stopped.
                others = self.numbered(others)
                self.add_to_truth(others, self.site(index + 1).ask("publish", others))
            self.cut(leaving, "reset")
            site.wait_for_answer(seconds)
        self.add_to_truth(batches, site.answer())

    @rule(index=SITES, milliseconds=st.sampled_from([0, -3_600_000, -1000, 5000]))
    def set_clock(self, index: int, milliseconds: int) -> None:
        self.tally["clocks changed"] += 1
        self.site(index).ask("set clock", milliseconds)

    # -- publishers --------------------------------------------------------------------------------

    def numbered(self, batches: list[dict[str, Any]], to: bool = True) -> list[dict[str, Any]]:
        """Give each event of some batches a number. to: keep the receivers."""
        return [
            {
                "many": batch["many"],
                "events": [
                    (next(self.numbers), kind, content_type, receivers if to else None, size)
                    for kind, content_type, receivers, size in batch["events"]
                ],
            }
            for batch in batches
        ]

    def add_to_truth(self, batches: list[dict[str, Any]], ids: dict[str, str]) -> None:
        """Events have ids now: clients must receive those that they are entitled to."""
        new = [
            Published(number, parsed_id(ids[str(number)]), kind, content_type, to)
            for batch in batches
            for number, kind, content_type, to, _ in batch["events"]
            if str(number) in ids
        ]
        self.tally["events"] += len(new)
        self.truth = sorted([*self.truth, *new], key=lambda event: event.id)
        known = {event.id for event in self.truth}
        assert len(known) == len(self.truth), "two events have the same id"
        for client in self.clients:
            if client.has_begun:
                client.must |= client.deliveries(new)

    @rule(index=SITES, batches=MODEL_BATCHES)
    def publish(self, index: int, batches: list[dict[str, Any]]) -> None:
        batches = self.numbered(batches)
        newest = self.truth[-1].id if self.truth else (0, 0)
        ids = self.site(index).ask("publish", batches)
        assert len(ids) == sum(len(batch["events"]) for batch in batches), "an event was refused"
        assert all(parsed_id(event_id) > newest for event_id in ids.values()), "ids went back"
        self.add_to_truth(batches, ids)

    @precondition(lambda self: self.is_shared)
    @rule(sources=st.lists(st.tuples(SITES, WAYS, MODEL_BATCHES), min_size=1, max_size=3))
    def publish_from_several_processes(
        self, sources: list[tuple[int, str, list[dict[str, Any]]]]
    ) -> None:
        """Sites, their forked children and scripts publish at the same time."""
        orders = [(self.site(index), way, self.numbered(batch)) for index, way, batch in sources]
        for site, way, batches in orders:
            site.order(way, batches)
        for site, _, batches in orders:
            self.add_to_truth(batches, site.answer())

    @precondition(lambda self: not self.is_shared)
    @rule(index=SITES, batches=MODEL_BATCHES)
    def publish_in_a_child(self, index: int, batches: list[dict[str, Any]]) -> None:
        """Without a shared log, events of another process reach no client of this one."""
        self.site(index).ask("publish in a fork", self.numbered(batches))

    @rule(
        index=SITES,
        batches=MODEL_BATCHES,
        client=CLIENTS,
        patterns=st.lists(MODEL_PATTERNS, min_size=1, max_size=6, unique=True),
        is_cut=st.booleans(),
    )
    def publish_while_subscribing(
        self,
        index: int,
        batches: list[dict[str, Any]],
        client: int,
        patterns: list[tuple[str, str]],
        is_cut: bool,
    ) -> None:
        """Events come before, while and after a client subscribes, or loses its connection."""
        # Events come as long as the client subscribes.
        longer = [
            {"many": False, "events": [(*event[:3], 10) for event in batch["events"]] * 20}
            for batch in batches
        ]
        site, batches = self.site(index), self.numbered(longer)
        numbers = {event[0] for batch in batches for event in batch["events"]}
        for other in self.clients:
            # Until publish() has returned, it is unknown which of the events a client gets.
            other.may |= numbers
        subscriber = self.client(client)
        losses, former = subscriber.losses, set(subscriber.patterns)
        self.hidden += len(numbers)
        site.order("publish slowly", batches)
        for pattern in patterns:
            self.subscribe(client, pattern)
            if is_cut and pattern == patterns[-1]:
                self.cut({client}, "reset")
            self.finish(subscriber)
        ids = site.answer()
        if self.page is not None:
            # The page's place is not known: its new subscriptions may or may not receive these.
            newest = max(map(parsed_id, ids.values()))
            subscriber.began.update(dict.fromkeys(set(subscriber.patterns) - former, newest))
        self.add_to_truth(batches, ids)
        self.hidden -= len(numbers)
        for other in self.clients if self.page is None else []:
            entitled = set(map(other.number, other.deliveries(self.truth)))
            other.may -= numbers - entitled
            arrived = numbers & set(map(other.number, other.received))
            assert arrived <= entitled, f"events {arrived - entitled} are not for this client"
        if subscriber.losses > losses:
            # Those that were published before the answer may be among the lost ones.
            new = {each for each in subscriber.must if subscriber.number(each) in numbers}
            subscriber.may |= set(map(subscriber.number, new))
            subscriber.must -= new - subscriber.received

    # If few events are kept, nobody can find out what was stored.
    @precondition(lambda self: self.history > 100)
    @rule(index=SITES, batches=MODEL_BATCHES, delay=st.sampled_from([0, 0.001, 0.003, 0.01]))
    def publish_and_be_killed(
        self, index: int, batches: list[dict[str, Any]], delay: float
    ) -> None:
        site = self.site(index)
        batches = self.numbered(batches, to=False)
        with self.doubtful(batches):
            site.order("publish", batches)
            site.wait_for_answer(seconds=delay)
            self.kill(index)

    @precondition(lambda self: self.is_shared and self.history > 100)
    @rule(
        data=st.data(),
        batches=st.tuples(MODEL_BATCHES, MODEL_BATCHES),
        leaving=CLIENT_SETS,
        # publish() waits for up to two seconds.
        seconds=st.sampled_from([0.02, 0.1, 0.1, 0.4, 0.4, 2.2]),
    )
    def publish_while_log_is_away(
        self,
        data: st.DataObject,
        batches: tuple[list[dict[str, Any]], ...],
        leaving: set[int],
        seconds: float,
    ) -> None:
        """The file is locked, or Redis stands still or restarts. Meanwhile clients reconnect."""
        fault = data.draw(st.sampled_from(self.log.faults))
        self.tally[f"log away: {fault}"] += 1
        sites = [self.site(index) for index in range(len(self.sites))]
        numbered = [self.numbered(each, to=False) for each in batches]
        with self.doubtful([*numbered[0], *numbered[1]]) as (accepted, refused):
            with self.log.held(fault):
                for site, own in zip(sites, numbered, strict=True):
                    site.order("publish", own)
                self.cut(leaving, "reset")
                sites[0].wait_for_answer(seconds)
            for site, own in zip(sites, numbered, strict=True):
                accepted.update(site.answer())
                refused.update(event[0] for batch in own for event in batch["events"])
            refused.difference_update(map(int, accepted))
            if fault in ("IMMEDIATE", "EXCLUSIVE") and seconds < 1:
                assert not refused, "publish() did not wait for the file"

    @contextlib.contextmanager
    def doubtful(
        self, batches: list[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, str], set[int]]]:
        """The body publishes events that may be stored or not. Find out which are.

        The body adds to the two values: the ids that publish() has returned, by number, and the
        numbers of events that it has refused.
        """
        accepted: dict[str, str] = {}
        refused: set[int] = set()
        with Client(self.site(0).port) as client:
            since = client.hello["payload"]["lastId"]
        numbers = {event[0] for batch in batches for event in batch["events"]}
        for each in self.clients:
            each.may |= numbers
        yield accepted, refused
        if not self.is_shared:
            return
        # Each process publishes again, and the log is read up to there.
        last = [self.publish_marker(index) for index in range(len(self.sites))][-1]
        ids = self.stored_events(since, last)
        stored = {number: event_id for number, event_id in ids.items() if int(number) in numbers}
        assert accepted.items() <= stored.items(), "an accepted event was not stored"
        if not self.log.may_store_refused:
            assert not refused & set(map(int, stored)), "a refused event was stored"
        self.add_to_truth(batches, stored)
        self.forbid(numbers - set(map(int, stored)))

    def publish_marker(self, index: int) -> int:
        """Publish an event as soon as the log accepts it, and return its number."""
        deadline = time.monotonic() + MODEL_PATIENCE
        event = (EVENT_NAMES[0], CONTENT_NAMES[0], None, 10)
        while True:
            batches = self.numbered([{"many": False, "events": [event]}])
            if ids := self.site(index).ask("publish", batches):
                self.add_to_truth(batches, ids)
                return int(next(iter(ids)))
            assert time.monotonic() < deadline, "the log accepts no events any more"

    def stored_events(self, since: str, last: int) -> dict[str, str]:
        """Return the ids of all public events from `since` up to the one with a number."""
        ids: dict[str, str] = {}
        deadline = time.monotonic() + MODEL_PATIENCE
        while str(last) not in ids:
            assert time.monotonic() < deadline, "an accepted event was not stored"
            with Stream(self.site(0).port, "mode=poll", since) as poll:
                messages = [poll.receive()]
                with contextlib.suppress(Closed):
                    while True:
                        messages.append(poll.receive())
            if messages[0]["type"] == "system.error":
                # The log could not be read.
                continue
            assert messages[0]["payload"]["recovered"]
            for message in messages[1:]:
                since = message["id"]
                ids[str(message["payload"]["n"])] = since
        return ids

    def forbid(self, numbers: set[int]) -> None:
        """These events are not stored: no client may receive them."""
        for client in self.clients:
            client.may -= numbers
            wrong = numbers & set(map(client.number, client.received))
            assert not wrong, f"delivered, but not stored: {wrong}"

    @rule(index=SITES, user=st.sampled_from(["ana", "bob"]))
    def sign_out(self, index: int, user: str) -> None:
        self.tally["sign-outs"] += 1
        assert isinstance(self.site(index).ask("disconnect", user), int)
        self.hidden += 1
        for client in self.clients:
            if client.user == user and client.connection is not None:
                client.notice_sign_out()

    # -- clients -----------------------------------------------------------------------------------

    def client(self, index: int) -> ModelClient:
        return self.clients[index % len(self.clients)]

    def chosen(self, indices: set[int]) -> list[ModelClient]:
        """Return clients that have a connection."""
        clients = dict.fromkeys(map(self.client, sorted(indices)))
        return [client for client in clients if client.connection is not None]

    def check_loss(self, client: ModelClient) -> None:
        """Fail if `recovered: false` is not allowed now."""
        self.tally["recovered: false"] += 1
        if isinstance(client, PageClient):
            newer, has_restarted = self.truth, self.deaths > 0
        else:
            newer, has_restarted = client.newer(), client.place_site is not client.site
        if not self.is_shared and has_restarted:
            return
        lost = len(newer) + self.hidden + 1
        assert lost >= self.history, "recovered is false, but nothing was lost"

    @rule(client=CLIENTS, index=SITES)
    def connect(self, client: int, index: int) -> None:
        """Open a connection, and resume if the client had subscriptions."""
        found = self.client(client)
        if found.connection is None:
            self.tally["connections"] += 1
            try:
                found.open(self.site(index))
            except (Closed, OSError):
                # A frozen log, for example, is read again a second later.
                if found.connection is not None:
                    found.leave("close")
                return
            if found.patterns:
                self.send_subscribe(found, found.patterns)

    @rule(client=CLIENTS, pattern=MODEL_PATTERNS)
    def subscribe(self, client: int, pattern: tuple[str, str]) -> None:
        self.connect(client, client)
        found = self.client(client)
        if found.connection is not None and not found.replaying:
            found.add_pattern(pattern)
            self.send_subscribe(found, [pattern])

    def send_subscribe(self, client: ModelClient, patterns: list[tuple[str, str]]) -> None:
        losses, newer = client.losses, client.newer()
        client.may |= set(map(client.number, client.deliveries(newer)))
        try:
            client.subscribe(patterns)
        except (Closed, OSError):
            client.leave("close")
            return
        if client.losses == losses:
            client.must |= client.deliveries(newer, patterns)

    @rule(client=CLIENTS, number=st.integers(0, 3))
    def unsubscribe(self, client: int, number: int) -> None:
        found = self.client(client)
        if found.connection is None or not found.patterns or found.replaying:
            return
        removed = found.patterns[number : number + 1] or list(found.patterns)
        kept = [pattern for pattern in found.patterns if pattern not in removed]
        if isinstance(found, HttpClient):
            # The request names those that are left.
            found.patterns = kept
        try:
            found.unsubscribe(removed)
        except (Closed, OSError):
            found.leave("close")
        found.patterns = kept
        # None of its events may come from now on.
        entitled = found.deliveries(self.truth)
        found.must &= entitled | found.received
        if self.page is None:
            found.may &= set(map(found.number, entitled | found.received))

    @rule(index=SITES, client=CLIENTS, batches=MODEL_BATCHES)
    def unsubscribe_between(
        self, index: int, client: int, batches: list[dict[str, Any]]
    ) -> None:
        """The same kinds of events, before and after a client unsubscribes from everything."""
        self.publish(index, batches)
        self.read({client})
        self.unsubscribe(client, 3)
        self.publish(index, batches)

    @precondition(lambda self: self.page is None)
    @rule(client=CLIENTS)
    def sign_in(self, client: int) -> None:
        found = self.client(client)
        if found.connection is None or found.user is not None:
            return
        found.user = "bob"
        found.may |= set(map(found.number, found.deliveries(self.truth)))
        with contextlib.suppress(Closed, OSError):
            found.sign_in(token("bob"))

    @rule(
        clients=st.sets(CLIENTS, min_size=1),
        how=st.sampled_from(["reset", "close", "stall", "half-open", "half-open"]),
    )
    def cut(self, clients: set[int], how: str) -> None:
        """Clients lose their connections, or leave them and answer nothing any more."""
        for client in self.chosen(clients):
            self.tally[f"cut: {how}"] += 1
            client.leave(how)

    @rule(clients=st.sets(CLIENTS, min_size=1))
    def read(self, clients: set[int]) -> None:
        """Some clients read all that they must receive, if their connections hold."""
        for client in self.chosen(clients):
            try:
                client.read(time.monotonic() + MODEL_PATIENCE)
            except (Closed, OSError):
                client.leave("close")

    def finish(self, client: ModelClient) -> None:
        """A client reads what has arrived, so that it may subscribe again."""
        if client.connection is not None:
            try:
                client.finish()
            except (Closed, OSError):
                client.leave("close")

    def settle(self) -> None:
        """Everything that must arrive arrives, over as many connections as it takes."""
        for index, client in enumerate(self.clients):
            deadline = time.monotonic() + MODEL_PATIENCE
            while True:
                assert time.monotonic() < deadline, "a client is not up to date"
                try:
                    self.connect(index, index)
                    if client.connection is None:
                        continue
                    client.read(deadline)
                    client.finish()
                    break
                except (Closed, OSError):
                    if client.connection is not None:
                        client.leave("close")

    def check_connections(self) -> None:
        """The server has noticed which connections are gone, half-open ones by the heartbeat."""
        for client in self.clients:
            if client.connection is not None and client.has_pongs:
                client.leave("half-open")
            else:
                client.end()
        if self.heartbeat < 1 and self.page is None:
            sites = list(filter(None, self.sites))
            until(
                lambda: not any(site.ask("count connections") for site in sites),
                "the end of half-open connections",
            )

    def teardown(self) -> None:
        try:
            if self.clients:
                self.settle()
                self.check_connections()
        finally:
            for client in self.clients:
                client.end()
            for site in filter(None, self.sites):
                site.kill()


@pytest.fixture
def model_sites() -> Iterator[subprocess.Popen[str]]:
    """Run the process that forks sites."""
    with subprocess.Popen(
        [sys.executable, "-c", MODEL_SITES],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as processes:
        assert processes.stdin is not None
        assert processes.stdout is not None
        assert processes.stdout.readline() == "ready\n"
        yield processes
        processes.stdin.close()
        processes.wait(PATIENCE)


def run_model(
    capsys: pytest.CaptureFixture[str], seed: int, examples: int, **attributes: Any
) -> None:
    """Run a few examples, always the same ones; with the profile `soak` random ones for long.

    SOAK_SECONDS=N: for how long. MODEL_SEED=N: only those of a seed that a soak has printed.
    """
    tally: Counter[str] = Counter()
    machine = type("Model", (Model,), {**attributes, "tally": tally})
    name = f"model of {attributes['log'].__class__.__name__}"
    if settings().derandomize:
        seeded = hypothesis.seed(seed)(machine)
        run_state_machine_as_test(seeded, settings=settings(max_examples=examples))
        print(name, tally)
        return
    seconds, given = float(os.environ.get("SOAK_SECONDS", "1200")), os.environ.get("MODEL_SEED")
    deadline = time.monotonic() + seconds
    try:
        while True:
            number = int(given or random.randrange(2**32))
            with capsys.disabled():
                print(f"{name}: MODEL_SEED={number}", flush=True)
            run_state_machine_as_test(hypothesis.seed(number)(machine), settings=settings())
            if given or time.monotonic() > deadline:
                break
    finally:
        with capsys.disabled():
            print(f"{name}: {json.dumps(tally, indent=4)}", flush=True)


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=needs_redis)])
def model_log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryLog]:
    if request.param != "redis":
        yield MemoryLog() if request.param == "memory" else SqliteLog(tmp_path)
        return
    log = RedisLog(tmp_path)
    yield log
    log.redis.popen.send_signal(signal.SIGCONT)
    log.redis.kill()


def test_model(
    model_log: MemoryLog,
    model_sites: subprocess.Popen[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Clients over WebSockets, streams and polls receive what Model says."""
    run_model(capsys, 6, 3, log=model_log, processes=model_sites)


@needs_chromium
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_model_client_js(
    kind: str,
    model_sites: subprocess.Popen[str],
    browser: Browser,
    set_times: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The handlers of client.js get what Model says, and `ongap` is called if events are lost."""
    # The pause after a graceful restart is not a constant.
    script = swiftcms_ws.CLIENT_JS
    assert "wait += 1_000" in script
    monkeypatch.setattr(swiftcms_ws, "CLIENT_JS", script.replace("wait += 1_000", "wait += 50"))
    # A handshake whose packets vanish is given up after CONNECT_TIMEOUT.
    set_times(MAX_WAIT=50, CONNECT_TIMEOUT=3000)
    log = MemoryLog() if kind == "memory" else SqliteLog(tmp_path)
    with serving(MODEL_PAGE) as server:
        page = browser.page(f"http://127.0.0.1:{server.port}/")
        run_model(capsys, 1, 3, log=log, processes=model_sites, page=page)
        page.close()
