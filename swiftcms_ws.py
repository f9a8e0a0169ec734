# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "blinker>=1.6.2",
#     "flask>=3.0",
#     "flask-sock>=0.7",
#     "pyjwt>=2.12.1",
#     "simple-websocket>=1.1",
#     "werkzeug>=3.0.4",
#     "wsproto>=1.0",
# ]
# ///
"""Real-time push for small Flask sites: one blueprint, one publish(), every subscribed browser.

    from flask import Flask
    from swiftcms_ws import blueprint, publish

    app = Flask(__name__)
    app.register_blueprint(blueprint)                       # ws://HOST/ws

    publish("content.created", "posts", {"id": 7})          # from any view or thread

Glossary
    event         a change that the site publishes: a type (content.created), a content type (posts)
                  and a payload
    handshake     the GET request, answered with status 101, that turns into a WebSocket
    pattern       selects events: a type, a prefix (content.*) or *, and the same for content types
    subscription  one pattern that one connection has asked for
    frame         the bytes of one message, ping, pong or close (RFC 6455 section 5)
    history       the latest events, from which a client that reconnects gets the ones it missed
    replay        the missed events, sent in answer to a subscribe with `since`
    slot          one of the MAX_CONNECTIONS places for a connection or a handshake
    hook          a function of the site: identify, authorize, or a receiver of a signal
    shared log    an SQLite file or Redis: all processes of a site append their events to it and
                  read it
    engine        everything that runs for one app in one process
    hub           the public API: publish(), the hooks, and the blueprint with the /ws route

From publish() to the socket                      From the handshake to an answer
    Hub.publish         checks, serialises            Endpoint         checks, takes the socket over
      | caller's thread                                 | web server's thread
    Loop.publish        gives ids, queues             Session.open     sends 101, system.connected
      | loop thread from here on                        | loop thread from here on
    Loop.deliver        one buffer for each group     Connection.serve bytes from the socket
      |                                                 |
    Registry.matching   finds the subscribers         Session.receive  frames, messages, the rate
      |                                                 |
    Connection.send_to_all  writes to sockets         actions()        one function for each action
      |                                                 |  (a hook runs in a worker meanwhile)
    History.add         keeps the event               Session.answer   the answer's frame

With a shared log, SharedLog.append gives the ids in place of Loop.publish, and the follower of each
process queues the events with Loop.submit.

Threads of each engine, started by its first connection or, without a shared log, its first event
    loop          owns the order of events, all sockets, the history and the editors; never blocks
    heartbeat     asks the loop to send heartbeats; closes the engine if gunicorn stops its worker
    workers 1-4   run authorize, receivers of client_connected and client_disconnected, and log
                  handlers; read from and write to the shared log. Started by the first such task
    follower      reads the shared log, if there is one
identify runs in the web server's thread, and receivers of event_published in the publisher's.

Locks (each is documented where it is created)
    Hub._starting    creating and starting an engine; the others may be taken while it is held
    EventQueue._lock ids and the queue              Registry._lock   connections, subscriptions
    Workers._lock    tasks and threads              Editing._lock    editors of entries
    Counters._lock   the numbers of stats()         Lane._lock       one ordered queue of tasks
    LogFile._queue   one connection to the file of a shared log
A thread holds one lock at a time, except that it may take others while it holds Hub._starting.
No code of the site, no logging and no network I/O runs while a lock is held. Only while it is first
in LogFile._queue, a thread reads and writes a file.

Sections
         1 Map
    I    From publish() to the socket
         2 Hub  3 Engine  4 Events and frames  5 Loop and history  6 Registry  7 Connection
    II   From the handshake to an answer
         8 Endpoint  9 Tokens  10 Session and workers
    III  Further parts
         11 Heartbeat  12 Editing  13 Shared logs  14 Live pages and track  15 Plain HTTP
         16 The ready-made hub
    IV   Around it
         17 Command line  18 Demo  19 client.js and pages
"""

from __future__ import annotations

import argparse
import atexit
import base64
import bisect
import dataclasses
import difflib
import errno
import functools
import hashlib
import heapq
import inspect
import io
import itertools
import json
import logging
import os
import random
import re
import secrets
import selectors
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
import unicodedata
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum, IntEnum
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit
from uuid import UUID

try:
    import fcntl
    import resource
except ImportError:  # Windows: sockets go through the relay, and limits of files do not exist
    fcntl = resource = None  # type: ignore[assignment]

try:
    import sqlite3
except ImportError:  # a Python that was built without it
    sqlite3 = None  # type: ignore[assignment]

try:
    import jwt
    import simple_websocket
    from blinker import NamedSignal, Namespace
    from flask import (
        Blueprint,
        Flask,
        Response,
        abort,
        current_app,
        make_response,
        render_template_string,
        request,
        url_for,
    )
    from flask.typing import ResponseReturnValue
    from flask_sock import Sock
    from jwt.algorithms import get_default_algorithms
    from werkzeug.exceptions import HTTPException
    from werkzeug.serving import make_server
    from wsproto.events import CloseConnection, Ping
    from wsproto.frame_protocol import FrameProtocol, Opcode, ParseFailed
    from wsproto.utilities import ProtocolError
except ImportError as error:
    # Python would say "No module named 'jwt'", and PyPI has another package of that name.
    install_hint = (
        "swiftcms_ws needs packages that are missing:"
        f" python -m pip install flask flask-sock simple-websocket pyjwt ({error})"
    )
    if __name__ == "__main__":
        sys.exit(install_hint)
    raise ImportError(install_hint) from error

__version__ = "2.0.0"
__all__ = [
    "EVERYONE",
    "Hub",
    "PublishError",
    "User",
    "blueprint",
    "client_connected",
    "client_disconnected",
    "event_published",
    "hub",
    "publish",
    "publish_many",
]

logger = logging.getLogger("swiftcms_ws")

# == 1. Map: settings, signals, errors ===========================================================

CONFIG_PREFIX = "SWIFTCMS_WS_"
# The most characters of a type, a content type, an entry's id or a user's id. Clients send them,
# and the server keeps them in memory.
NAME_LENGTH = 128
# The connection of a client that stays silent for this many heartbeats is closed.
MISSED_HEARTBEATS = 2
# Each client id begins with the id of its process, which has this many characters.
PROCESS_LENGTH = 8


class Everyone(Enum):
    """The type of EVERYONE."""

    EVERYONE = "everyone"

    def __repr__(self) -> str:
        return "EVERYONE"


#: The default of publish()'s `to`. It is not None: an empty database column, passed as `to`, must
#: not make a private event public.
EVERYONE = Everyone.EVERYONE

_signals = Namespace()
#: Sent with `hub`, `client_id` and `user`, in a worker and in a request context of the handshake.
#: The server reads the client's first message after the receivers have returned.
client_connected = _signals.signal("client-connected")
#: Sent with `hub`, `client_id` and `user`, in a worker, after the connection is closed.
client_disconnected = _signals.signal("client-disconnected")
#: Sent with `hub`, `id`, `type`, `content_type`, `payload` and `to`, in the thread that published,
#: after the event is queued or, with a shared log, stored. The sender of all three is the app.
event_published = _signals.signal("event-published")


class CloseCode(IntEnum):
    """Why the server closes a connection (RFC 6455 section 7.4; README, Reference)."""

    GOING_AWAY = 1001
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    TRY_AGAIN_LATER = 1013
    UNAUTHORIZED = 4401
    HEARTBEAT_TIMEOUT = 4408


class PublishError(Exception):
    """The shared log did not confirm that it has stored an event or a message. Try again later.

    If Redis stopped answering after it had received the event, clients may receive it anyway, and
    twice if it is published again.
    """


class LogUnavailable(Exception):
    """The shared log cannot be read now."""


class ClientError(Exception):
    """A client's message that cannot be carried out, or a connection that cannot go on.

    code:        one of PROTOCOL.md's table of errors
    message:     a sentence for the client, with the mistake and the remedy
    closes_with: the close code, if the error closes the connection
    """

    def __init__(self, code: str, message: str, closes_with: CloseCode | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.closes_with = closes_with


def log(level: int, message: str, *values: object, exc_info: Any = None) -> None:
    """Log a message. If a handler or filter of the site raises, print its traceback instead.

    Otherwise a broken log handler would stop the thread that logs.
    """
    try:
        logger.log(level, message, *values, exc_info=exc_info, stacklevel=2)
    except Exception:
        # The site's own handlers may raise anything, and the log cannot report that.
        traceback.print_exc()


def did_you_mean(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean `…`?)" with the nearest of `choices`, or an empty string."""
    # Both may come from a client. difflib would take 100 ms for long words or thousands of them.
    few = [choice for choice in itertools.islice(choices, 50) if len(choice) <= NAME_LENGTH]
    near = difflib.get_close_matches(word[:NAME_LENGTH], few, 1)
    if not near:
        return ""
    return f" (did you mean `{prefix}{near[0]}`?)"


def _setting(default: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"expected": expected, "accepts": accepts})


def _number(
    default: float | None,
    expected: str,
    least: float,
    kinds: Any = (int, float),
    most: float = float("inf"),
) -> Any:
    def accepts(value: Any) -> bool:
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and least <= value <= most and value != float("inf")

    return _setting(default, expected, accepts)


def _text(default: str | None, expected: str = "a string", pattern: str = r".+") -> Any:
    def accepts(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    return _setting(default, expected, accepts)


def _is_key(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and len(value) > 0


def _is_path(value: Any) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    path = os.fspath(value)
    # A URL of SQLAlchemy would become the name of a file. In memory, processes share nothing.
    is_file = isinstance(path, str) and not path.startswith((":", "sqlite:", "file:"))
    return is_file and path.strip() != "" and "\0" not in path


def _are_strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _are_algorithms(value: Any) -> bool:
    # All of one family: with HS256 and RS256 in one list, anybody could sign with the public key.
    known = get_default_algorithms().keys() - {"none"}
    return _are_strings(value) and set(value) <= known and len({name[:2] for name in value}) == 1


def _are_origins(value: Any) -> bool:
    return value == "*" or (_are_strings(value) and all(map(is_origin_entry, value)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of app.config["SWIFTCMS_WS_…"]: field `heartbeat` is SWIFTCMS_WS_HEARTBEAT."""

    jwt_key: str | bytes | None = _setting(None, "a string or bytes, not empty", _is_key)
    jwt_algorithms: Sequence[str] = _setting(
        ("HS256",),
        'algorithms of one family, such as ["HS256"]; RS256 needs the package cryptography',
        _are_algorithms,
    )
    jwt_audience: str | None = _text(None)
    jwt_issuer: str | None = _text(None)
    auth: str = _text("optional", '"optional" or "required"', "optional|required")
    origins: Sequence[str] | str | None = _setting(
        None,
        'a list such as ["https://example.org", "https://*.example.org"], or "*"',
        _are_origins,
    )
    heartbeat: float = _number(25, "seconds, from 0.01 to 86,400", 0.01, most=86_400)
    history: int = _number(1000, "a whole number of events, 0 or more", 0, int)
    max_connections: int | None = _number(None, "a whole number, 1 or more", 1, int)
    max_subscriptions: int = _number(100, "a whole number, 1 or more", 1, int)
    max_message: int = _number(64 * 1024, "a whole number of bytes, 1 or more", 1, int)
    max_queue: int = _number(1024 * 1024, "a whole number of bytes, 1 or more", 1, int)
    rate: float = _number(50, "messages a second, 1 or more", 1)
    inspector: bool | None = _setting(
        None, "True or False", lambda value: isinstance(value, bool)
    )
    database: str | os.PathLike[str] | None = _setting(
        None,
        'the path of a file such as "live.sqlite3"; a relative one is inside app.instance_path',
        _is_path,
    )
    redis_url: str | None = _text(
        None, "a URL such as redis://localhost:6379/0", r"(rediss?|unix)://.+"
    )
    redis_prefix: str = _text("swiftcms_ws")
    # Not keys of their own: SECRET_KEY_FALLBACKS, if the key is Flask's SECRET_KEY.
    old_keys: Sequence[str | bytes] = dataclasses.field(default=(), metadata={})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Read and check the keys of a Flask configuration; None stands for the default.

        Raises ValueError that names the key, if a key does not exist or a value is wrong.
        """
        fields = {
            CONFIG_PREFIX + field.name.upper(): field
            for field in dataclasses.fields(cls)
            if field.metadata
        }
        values = {}
        for key, value in config.items():
            if not key.startswith(CONFIG_PREFIX):
                continue
            if key not in fields:
                names = [name.removeprefix(CONFIG_PREFIX) for name in fields]
                hint = did_you_mean(key.removeprefix(CONFIG_PREFIX), names, CONFIG_PREFIX)
                raise ValueError(f"unknown config key {key}{hint}; known are {', '.join(fields)}")
            if value is not None:
                cls._check_value(key, fields[key], value)
                values[fields[key].name] = value
        settings = cls(**values)
        settings.check_key()
        settings.check_log()
        return settings

    @staticmethod
    def _check_value(key: str, field: dataclasses.Field[Any], value: Any) -> None:
        """Raise ValueError if a value is wrong."""
        if not field.metadata["accepts"](value):
            # The JWT key is a secret, and the message may be logged.
            shown = "this value" if field.name == "jwt_key" else repr(value)
            expected = field.metadata["expected"]
            raise ValueError(f"config key {key} must be {expected}, not {shown}")

    def check_key(self) -> None:
        """Raise ValueError if the key does not fit the algorithms: every token would be refused."""
        if self.jwt_key is None:
            return
        for name in self.jwt_algorithms:
            try:
                get_default_algorithms()[name].prepare_key(self.jwt_key)
            except Exception as error:
                # Each algorithm raises exceptions of its own.
                key = f"{CONFIG_PREFIX}JWT_KEY"
                raise ValueError(f"config key {key} must be a key for {name}: {error}") from error

    def check_log(self) -> None:
        """Raise ValueError if it is not clear which shared log is meant."""
        if self.database is not None and not _is_path(self.database):
            # The argument of a hub, or an environment variable.
            raise ValueError(f"the database must be the path of a file, not {self.database!r}")
        if self.database is not None and self.redis_url is not None:
            raise ValueError(
                f"{CONFIG_PREFIX}DATABASE and {CONFIG_PREFIX}REDIS_URL are both set: choose the"
                " file if the site runs on one machine, or Redis if it runs on several"
            )

    @classmethod
    def of_app(cls, app: Flask | None, logs: Mapping[str, Any]) -> Settings:
        """Return the settings of an app, or of a script without one.

        logs: the arguments `database` and `redis_url` of Hub(). If neither config key is set, they
            stand in for both, or else the environment variables SWIFTCMS_WS_DATABASE and
            SWIFTCMS_WS_REDIS_URL do.
        """
        settings = cls() if app is None else cls.from_config(app.config)
        changes: dict[str, Any] = {}
        if settings.database is None and settings.redis_url is None:
            environ = {key: os.environ.get(CONFIG_PREFIX + key.upper()) or None for key in logs}
            changes |= logs if any(value is not None for value in logs.values()) else environ
        if app is not None and settings.jwt_key is None and app.secret_key:
            changes["jwt_key"] = app.secret_key
            changes["old_keys"] = tuple(app.config.get("SECRET_KEY_FALLBACKS") or ())
        settings = dataclasses.replace(settings, **changes)
        settings.check_key()
        settings.check_log()
        return settings


# I  From publish() to the socket
# == 2. Hub: the public API ======================================================================

Hook = TypeVar("Hook", bound="Callable[..., Any]")


class Hub:
    """The public API of a site: publish(), the hooks, and a blueprint with the /ws route.

    Any thread may call any method. A hub may be registered with several apps; each app has an
    engine of its own, in app.extensions["swiftcms_ws"]. Inside an application context a hub uses
    the engine of that app. Outside one it uses the only app that has served a connection, or
    else the only app.

    A script or a task queue has no app and names the site's shared log instead, as an argument or
    in the environment variable SWIFTCMS_WS_DATABASE or SWIFTCMS_WS_REDIS_URL. It then publishes
    without starting a thread:

        with Hub(database="/srv/site/instance/live.sqlite3") as hub:
            hub.publish("content.created", "posts", {"id": 7})

    database:  the path of the file; without an app it must be absolute
    redis_url: such as "redis://localhost:6379/0"
    """

    def __init__(
        self,
        redis_url: str | None = None,
        database: str | os.PathLike[str] | None = None,
    ) -> None:
        self.blueprint: Blueprint = Endpoint(self).blueprint
        self.identify_hook: Callable[[], Any] | None = None
        self.authorize_hook: Callable[[User | None, str, str], Any] | None = None
        self._logs = {"database": database, "redis_url": redis_url}
        # Weak, so that an app which a job or a test created can be freed.
        self._app_refs: list[weakref.ref[Flask]] = []
        # The engine of a hub without an app.
        self._script_engine: Engine | None = None
        # Held while an engine is created or started, so that there is one for each app. An engine
        # is published when it is complete, and read without the lock.
        self._starting = threading.Lock()
        self._starting_guard = ReentryGuard(self._starting)
        _hubs.add(self)

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- methods for the site ----------------------------------------------------------------------

    def init_app(self, app: Flask, **options: Any) -> None:
        """Register the blueprint with an app. Application factories call it.

        options: those of Flask.register_blueprint(), such as `url_prefix`; a second hub of one
            app needs a `name`

        Raises ValueError, naming the key, if a SWIFTCMS_WS_… config key does not exist or has a
        wrong value.
        """
        app.register_blueprint(self.blueprint, **options)

    def publish(
        self, event_type: str, content_type: str, payload: Any, *, to: Any = EVERYONE
    ) -> str:
        """Send an event to all clients that subscribe to it, and return its id.

        The event is queued, so the number of clients makes no difference. With a shared log it is
        stored there, in one step. It waits only while 8 MiB of events are queued. It needs no
        context. Call it after the commit, because a client may ask for the data at once.

        event_type:   such as "content.created": words joined by dots, none under "system."
        content_type: such as "posts"
        payload:      anything that `app.json` can serialise
        to:           a user id or several (str, int or UUID): only these users receive the event

        Raises TypeError or ValueError, naming the argument, if one is wrong. No event is sent then.
        Raises PublishError within two seconds if the shared log does not store the event, and
        RuntimeError if it is not clear which app is meant, or if a signal handler calls this
        while its thread is inside publish(). If a receiver of `event_published` raises, so does
        publish(), but the event was published.
        """
        return self.publish_many([(event_type, content_type, payload, to)])[0]

    def publish_many(self, events: Iterable[tuple[Any, ...]]) -> list[str]:
        """Send events, each a tuple of publish()'s arguments in their order; return their ids.

        Raises as publish() does, and then sends none of them. A shared log takes them in one step.
        """
        engine = self._engine()
        events = [(*event[:3], *map(_keep_iterator, event[3:])) for event in events]
        drafts = [engine.draft(*event) for event in events]
        event_ids = [format_event_id(event_id) for event_id in engine.publish(drafts)]
        if event_published.receivers:
            for event_id, event in zip(event_ids, events, strict=True):
                event_type, content_type, payload, to = (*event, EVERYONE)[:4]
                event_published.send(
                    engine.app or self,
                    hub=self,
                    id=event_id,
                    type=event_type,
                    content_type=content_type,
                    payload=payload,
                    to=to,
                )
        return event_ids

    def identify(self, hook: Hook) -> Hook:
        """Register `hook()`, which returns the user of a handshake.

        It returns a user id, `(user_id, session_id)`, or None if no user is signed in. It runs in
        the handshake's request, so `session` and login extensions work in it. A token in the
        handshake takes precedence.

        Raises TypeError for a coroutine function, RuntimeError if there is another hook already.
        """
        self._check_hook("identify", hook, self.identify_hook)
        self.identify_hook = hook
        return hook

    def authorize(self, hook: Hook) -> Hook:
        """Register `hook(user, event_type, content_type)`, which allows or refuses a subscription.

        It returns True to allow and False to refuse. Anything else refuses too, and is logged.
        `user` is a User or None; the other two are the pattern that the client sent, such as
        "content.*" and "posts.*": decide for everything that it matches. Editing asks for
        "user.editing". The hook runs in a worker, in a request context of its own.

        Raises TypeError for a coroutine function, RuntimeError if there is another hook already.
        """
        self._check_hook("authorize", hook, self.authorize_hook)
        self.authorize_hook = hook
        return hook

    def issue_token(self, user_id: Any, expires_in: float = 3600, **claims: Any) -> str:
        """Return a JWT that `authenticate` accepts for `expires_in` seconds.

        claims: for the authorize hook: issue_token(7, role="editor") is its user.claims["role"]

        Raises ValueError if there is no key to sign with, or a public key only.
        """
        settings = self._engine().settings
        algorithm = settings.jwt_algorithms[0]
        if settings.jwt_key is None:
            raise ValueError("there is no key to sign with: set SECRET_KEY or SWIFTCMS_WS_JWT_KEY")
        if not algorithm.startswith("HS"):
            raise ValueError(
                f"SWIFTCMS_WS_JWT_KEY only verifies {algorithm}; sign with the private key"
            )
        return sign_token(settings, check_user_id(user_id, "user_id"), expires_in, claims)

    def stats(self) -> dict[str, int]:
        """Return numbers of this process for a status page, by name.

        Each process of a site has its own numbers, also if the processes share a log. Now:
        `connections`, `subscriptions`, `queue_length` (events not delivered yet) and
        `waiting_bytes` (not accepted yet by the sockets of slow clients). Since the start:
        `published`, `delivered`, `replayed`, `slow_clients` (closed with 1013), `throttled`
        (pauses of clients that sent too fast), `errors`, and, if there was one, `error_CODE`,
        `closed_CODE` (closed by the server) and `refused_STATUS`.
        """
        engine = self._engine()
        connections = engine.registry.connections()
        return {
            "connections": len(connections),
            "subscriptions": engine.registry.count_subscriptions(),
            "queue_length": engine.loop.queue_length(),
            "waiting_bytes": sum(connection.unsent_bytes for connection in connections),
            **engine.counters.as_dict(),
        }

    def editors(self, content_type: str, entry_id: str | int) -> list[dict[str, Any]]:
        """Return the editors of an entry: dicts of `clientId`, `userId` and `since`."""
        engine = self._engine()
        if engine.log is not None and engine.app is not None:
            # The editors of other processes are known after the follower has asked for them.
            self.start(engine)
        editors = engine.editing.editors((content_type, str(entry_id)))
        return [editor.as_json() for editor in editors]

    def disconnect(self, user_id: Any, session: Any = None) -> int:
        """Close a user's connections after a logout or a ban; return their number in this process.

        session: only the connections of this session, as the identify hook returned it

        Log the user out first. Otherwise the client reconnects, and the identify hook accepts it.

        Raises PublishError if the shared log is away. Then no connection is closed, because those
        in other processes would stay open.
        """
        user = check_user_id(user_id, "user_id")
        session = None if session is None else check_user_id(session, "session")
        return self._engine().disconnect(user, session)

    def last_id(self) -> str:
        """Return the id of the newest event.

        Call it before reading the data of a page: with this id as `since`, the page then gets
        every event that its data may not contain.
        """
        return format_event_id(self._engine().newest_id())

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until the events that this process has published are written to clients' sockets.

        Returns False if that takes more than `timeout` seconds.
        """
        return self._engine().flush(timeout)

    def close(self, timeout: float = 2.0) -> bool:
        """Close all connections with 1001 and accept no others.

        timeout: in seconds; all apps of this hub share it

        Returns False if some connections were still open by then; those are aborted.
        """
        return close_engines(self._engines(), timeout)

    # -- choosing and starting an engine -----------------------------------------------------------

    def _engine(self) -> Engine:
        """Return the engine of the app that is meant; it may not have started.

        Raises RuntimeError if that is not clear, and ValueError if the configuration is wrong.
        """
        if current_app and self in running_app().extensions.get("swiftcms_ws", ()):
            return self.engine_of(running_app())
        apps = self._apps()
        if len(apps) == 1:
            return self.engine_of(apps[0])
        if not apps:
            return self._engine_without_app()
        serving = [engine for engine in self._engines() if engine.has_served]
        if len(serving) == 1:
            return serving[0]
        raise RuntimeError(
            f"this hub is registered with {len(apps)} apps: call it inside"
            " `with app.app_context():`, so that it knows which one is meant"
        )

    def _apps(self) -> list[Flask]:
        """Return the apps with which this hub is registered, and that still exist."""
        return [app for ref in self._app_refs if (app := ref()) is not None]

    def engine_of(self, app: Flask) -> Engine:
        """Return the engine of an app; create it at first use, when configuration is complete."""
        engines: dict[Hub, Engine | None] = app.extensions["swiftcms_ws"]
        engine = engines[self]
        if engine is None:
            with self._starting_guard, self._starting:
                engine = engines[self]
                if engine is None:
                    engine = engines[self] = Engine(self, app, self._logs)
        return engine

    def _engine_without_app(self) -> Engine:
        with self._starting_guard, self._starting:
            if self._script_engine is None:
                engine = Engine(self, None, self._logs)
                if engine.log is None:
                    raise RuntimeError(
                        "this hub is not registered with an app, so no client could receive the"
                        " event: call app.register_blueprint(blueprint) first, or use the hub that"
                        " is registered; a script gives Hub(database=…)"
                    )
                self._script_engine = engine
            return self._script_engine

    def _engines(self) -> list[Engine]:
        """Return the engines that exist."""
        engines = [app.extensions["swiftcms_ws"].get(self) for app in self._apps()]
        return [engine for engine in (*engines, self._script_engine) if engine is not None]

    def start(self, engine: Engine) -> None:
        """Start an engine's threads, unless they run already."""
        if not engine.is_started:
            with self._starting_guard, self._starting:
                engine.start()

    def registered(self, app: Flask) -> None:
        """Prepare an app: called when the blueprint is registered.

        The configuration is checked here too, so that mistakes show early.
        """
        settings = Settings.from_config(app.config)
        if settings.database is not None:
            check_sqlite()
        if settings.redis_url is not None:
            import_redis()
        engines = app.extensions.setdefault("swiftcms_ws", {})
        if self not in engines:
            engines[self] = None
            # A new list, because another thread may be reading the old one.
            self._app_refs = [ref for ref in self._app_refs if ref() is not None]
            self._app_refs.append(weakref.ref(app))
        options = app.config.setdefault("SOCK_SERVER_OPTIONS", {})
        options.setdefault("thread_class", handshake_thread)
        install_signal_handlers()
        for name in ("werkzeug", "gunicorn.access", "gunicorn.error"):
            logging.getLogger(name).addFilter(hide_token)

    def warn_if_nobody_is_reached(self, engine: Engine) -> None:
        """Log once if publish() succeeded in a process or an app that has no clients."""
        parent_process = getattr(sys.modules.get("multiprocessing"), "parent_process", None)
        if parent_process is not None and parent_process() is not None:
            engine.warn(
                "an event was published by a child process of multiprocessing: it reaches no client"
                " of the parent. Set SWIFTCMS_WS_DATABASE or SWIFTCMS_WS_REDIS_URL, or publish in"
                " the parent",
                once=True,
            )
        if not engine.has_served and any(other.has_served for other in self._engines()):
            engine.warn(
                "an event was published for an app that has served no connection, while another"
                " app of this hub has: it reached nobody. Was create_app() called again? Publish"
                " inside the application context of the app that serves the clients",
                once=True,
            )

    def _check_hook(self, name: str, hook: Hook, current: Hook | None) -> None:
        """Raise if a function cannot be a hook, or if the hub has a different one."""
        if inspect.iscoroutinefunction(hook):
            raise TypeError(f"the {name} hook must be a plain function, not a coroutine function")
        if current is not None and _full_name(current) != _full_name(hook):
            raise RuntimeError(
                f"this hub has another {name} hook already: {_full_name(current)}; combine both in"
                " one function"
            )

    def forget_engines(self) -> None:
        """Start again in a forked child: the threads do not exist there, and locks may be held."""
        self._starting = threading.Lock()
        self._starting_guard = ReentryGuard(self._starting)
        for engine in self._engines():
            engine.close_copies()
        for app in self._apps():
            app.extensions["swiftcms_ws"][self] = None
        self._script_engine = None


def _keep_iterator(value: Any) -> Any:
    """Return a list for an iterator given as `to`: it is read twice."""
    return list(value) if isinstance(value, Iterator) else value


def running_app() -> Flask:
    """Return the app of the current context."""
    return cast(Flask, current_app._get_current_object())  # type: ignore[attr-defined]


def _full_name(function: Callable[..., Any]) -> str:
    """Return module and qualified name. A factory that runs again creates the same name."""
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '')}.{name}"


def close_engines(engines: Iterable[Engine], timeout: float) -> bool:
    """Ask all engines to close, then wait for them, under one deadline; False if it passed."""
    deadline = time.monotonic() + timeout
    engines = list(engines)
    for engine in engines:
        engine.begin_closing()
    results = [engine.finish_closing(deadline) for engine in engines]
    return all(results)


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()

# == 3. Engine: creates, starts and stops the parts ==============================================


class Engine:
    """Everything that runs for one app of one hub in one process.

    It owns the parts below, and has no thread of its own. It is created at the first use of the
    hub, from the configuration of that moment. Threads and descriptors are created when start() is
    called: for the first connection, or the first call that needs the loop. Any thread may call
    its methods, except those marked "Loop only". A forked child creates a new one.
    """

    def __init__(self, hub: Hub, app: Flask | None, logs: Mapping[str, Any]) -> None:
        self.hub = hub
        # Weak, so that an app which a job has created can be freed. Its threads stop then.
        self._app_ref = None if app is None else weakref.ref(app)
        self.settings = Settings.of_app(app, logs)
        # The name of this process among the others; client ids begin with it.
        self.process = secrets.token_hex(PROCESS_LENGTH // 2)
        self.counters = Counters()
        self.registry = Registry()
        self.history = History(self.settings.history)
        self.workers = Workers()
        self.editing = Editing(self)
        self.exchange = EditorExchange(self)
        self.log = create_log(self.settings, app, self.report)
        self._create_threads()
        # NaN is not JSON: every browser that received it would throw.
        json_provider = (app or Flask(__name__)).json
        self._to_json = functools.partial(json_provider.dumps, allow_nan=False)
        # The flags are only ever set, and reading or setting one is atomic.
        self.has_served = False
        self.is_started = False
        self.is_closing = False
        # Reading or setting an item is atomic. At worst a message is logged twice.
        self._warned_at: dict[str, float] = {}
        # Recent sign-outs, with their times. A handshake that began earlier is signed out when its
        # connection opens. Loop only.
        self._signed_out: deque[tuple[float, str, str | None]] = deque(maxlen=1000)
        _running_engines.add(self)
        if app is not None:
            weakref.finalize(app, self._abandon).atexit = False

    @property
    def app(self) -> Flask | None:
        """The app; None for a script, or after the app was freed."""
        return None if self._app_ref is None else self._app_ref()

    def _abandon(self) -> None:
        """Stop the threads, because the app was freed. Takes no lock: it may interrupt any code."""
        # The heartbeat thread and the follower look at it.
        self.is_closing = True
        self.workers.request_stop()
        self.loop.request_stop()

    def _create_threads(self) -> None:
        self.loop = Loop(self.registry, self.history, self.counters, self.report)
        self.heartbeat = Heartbeat(self)
        self.follower: Follower | None = None
        if self.log is not None:
            self.follower = Follower(self, self.log)

    def start(self) -> None:
        """Start the threads. The hub's lock is held. If one cannot start, none is left running."""
        if self.is_started:
            return
        try:
            self.loop.start()
            self.heartbeat.start()
            if self.follower is not None:
                self.follower.start()
        except BaseException:
            self.heartbeat.stop()
            self.loop.stop()
            # The next attempt needs new ones.
            self._create_threads()
            raise
        self.is_started = True

    # -- publishing, in the caller's thread --------------------------------------------------------

    def draft(self, event_type: Any, content_type: Any, payload: Any, to: Any = EVERYONE) -> Draft:
        """Check and serialise an event. See Hub.publish()."""
        event_type = check_name(event_type, "event_type")
        if event_type.partition(".")[0] == "system":
            raise ValueError(
                f"event_type must not begin with system., which is the server's: {event_type!r}"
            )
        content_type = check_name(content_type, "content_type")
        receivers = None if to is EVERYONE else check_receivers(to)
        text = self._serialise(payload)
        size = utf8_length(text)
        # Otherwise every client that does not read it at once would be closed for being slow.
        if size > self.settings.max_queue:
            raise ValueError(
                f"payload has {size} bytes as JSON; SWIFTCMS_WS_MAX_QUEUE allows"
                f" {self.settings.max_queue}: publish an id, with which clients fetch the rest"
            )
        return Draft(event_type, content_type, text, receivers)

    def _serialise(self, payload: Any) -> str:
        try:
            text = self._to_json(payload)
            # A provider of the site may return bytes, or ignore allow_nan.
            if isinstance(text, (bytes, bytearray)):
                text = bytes(text).decode()
            if "NaN" in text or "Infinity" in text:
                json.loads(text, parse_constant=_refuse_constant)
            # Raises for a lone surrogate, which UTF-8 cannot express.
            utf8_length(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"payload cannot be sent as JSON: {error}; publish a dict such as"
                ' {"id": post.id}, or teach app.json the type'
            ) from error
        return str(text)

    def publish(self, drafts: list[Draft]) -> list[EventId]:
        """Append the events to the shared log, or queue them in this process; return their ids."""
        event_ids = self._publish_here(drafts) if self.log is None else self.log.append(drafts)
        self.counters.add("published", len(event_ids))
        return event_ids

    def _publish_here(self, drafts: list[Draft]) -> list[EventId]:
        # When exit handlers run, the main thread has ended and no thread can start.
        if self.is_closing or not threading.main_thread().is_alive():
            self.warn(
                "publish() was called on a hub that is closed, or while the interpreter exits:"
                " no client receives the event",
                once=True,
            )
        else:
            self.hub.start(self)
        event_ids = self.loop.publish(drafts)
        if not self.has_served:
            self.hub.warn_if_nobody_is_reached(self)
        return event_ids

    def warn_if_alone(self) -> None:
        """Log if this process has published, and was not the one that serves the clients."""
        if self.log is not None or self.has_served or self.app is None or self.app.testing:
            return
        count = self.counters.as_dict()["published"]
        if count:
            self.warn(
                "this process published %s events and served no client, so they reached nobody: if"
                " another process serves the site, set SWIFTCMS_WS_DATABASE in both (or, on several"
                " machines, SWIFTCMS_WS_REDIS_URL)",
                count,
            )

    def newest_id(self) -> EventId:
        """Return the id of the newest event. Starts no thread."""
        if self.follower is not None and self.follower.newest_id is not None:
            return self.follower.newest_id
        if self.log is None:
            return self.loop.last_id
        with suppress(LogUnavailable):
            return self.log.newest_id() or (0, 0)
        return (0, 0)

    # -- signing out -------------------------------------------------------------------------------

    def disconnect(self, user_id: str, session: str | None) -> int:
        """Close the connections of a user or of one session, in all processes."""
        if self.log is not None:
            message = {"do": "disconnect", "user": user_id, "session": session}
            payload = json.dumps({**message, "process": self.process})
            self.log.append([Draft(SIGN_OUT, "system", payload, frozenset())])
        if self.app is not None:
            # The loop must remember the sign-out, because a handshake may have begun already.
            self.hub.start(self)
        count = len(self._of_session(user_id, session))
        self.loop.call(self.sign_out, user_id, session)
        return count

    def _of_session(self, user_id: str, session: str | None) -> list[Connection]:
        return [
            connection
            for connection in self.registry.connections(user_id)
            if session is None or (connection.user and connection.user.session == session)
        ]

    def sign_out(self, user_id: str, session: str | None) -> None:
        """Close the connections of a user in this process. Loop only."""
        self._signed_out.append((time.monotonic(), user_id, session))
        for connection in self._of_session(user_id, session):
            close_signed_out(connection)

    def was_signed_out(self, user: User, since: float) -> bool:
        """Return whether a user was signed out after `since`, when the handshake began."""
        return any(
            at >= since and user_id == user.id and session in (None, user.session)
            for at, user_id, session in self._signed_out
        )

    # -- logging -----------------------------------------------------------------------------------

    def report(
        self, level: int, message: str, *values: object, exc_info: BaseException | None = None
    ) -> None:
        """Log from the loop or the heartbeat thread: a worker calls the site's log handlers.

        Otherwise a handler that sends mail would stop all clients for as long as that takes.
        """
        record = functools.partial(log, level, message, *values, exc_info=exc_info)
        self.workers.records.put(record)

    def warn(self, message: str, *values: object, once: bool = False) -> None:
        """Log a warning, once a minute at most: clients decide how often there is a reason."""
        now = time.monotonic()
        warned_at = self._warned_at.get(message)
        if warned_at is not None and (once or now < warned_at + 60):
            return
        self._warned_at[message] = now
        if threading.current_thread() in (self.loop.thread, self.heartbeat.thread):
            self.report(logging.WARNING, message, *values)
        else:
            log(logging.WARNING, message, *values)

    # -- flushing and closing ----------------------------------------------------------------------

    def flush(self, timeout: float) -> bool:
        """Wait until everything published so far is written. See Hub.flush()."""
        if not self.is_started and self.log is None:
            return True
        deadline = time.monotonic() + timeout
        flush = Flush(self.log.last_appended if self.log is not None else (0, 0))
        self.hub.start(self)
        if not self.loop.call(self.loop.add_flush, flush):
            # The loop has stopped: no more data will be written.
            return self.registry.slots == 0
        if flush.is_done.wait(max(0.0, deadline - time.monotonic())):
            return True
        self.loop.call(self.loop.remove_flush, flush)
        return False

    def begin_closing(self) -> None:
        """Refuse handshakes from now on, and close all connections with 1001. Takes no lock."""
        self.is_closing = True
        self.loop.request_close_all()

    def finish_closing(self, deadline: float) -> bool:
        """Wait for the connections to close and for receivers to run, then stop all threads.

        Returns False if some connections were still open at the deadline.
        """
        is_empty = self.registry.wait_until_empty(deadline)
        self.loop.call(self.loop.abort_all)
        # Twice: client_disconnected is submitted when a hook of the same client has returned.
        for _ in range(2):
            self.workers.wait_until_idle(deadline)
            self.loop.run_through(deadline)
        if self.follower is not None:
            self.follower.stop()
        self.heartbeat.stop()
        self.loop.stop()
        self.workers.stop(deadline)
        if self.log is not None:
            self.log.close()
        return is_empty

    def is_busy(self) -> bool:
        """Return whether there are connections, or functions of the site to run. Takes no lock."""
        return self.registry.slots > 0 or self.workers.unfinished > 0

    def close_copies(self) -> None:
        """Close a forked child's copies of sockets and descriptors; the parent keeps its own."""
        self.loop.close_copies()
        if self.log is not None:
            self.log.close_copies()
        for connection in (*self.registry.connections_after_fork(), *self.loop.closing):
            connection.close_copy()


def close_signed_out(connection: Connection) -> None:
    connection.close(CloseCode.UNAUTHORIZED, "the site signed you out; sign in again")


class Counters:
    """The numbers of stats() that are counted from the start of the engine. For any thread."""

    def __init__(self) -> None:
        # Guards the numbers. Re-entrant, because a signal handler that publishes may interrupt its
        # own thread while that thread holds the lock.
        self._lock = threading.RLock()
        names = ("published", "delivered", "replayed", "errors", "slow_clients", "throttled")
        self._numbers = Counter(dict.fromkeys(names, 0))

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._numbers[name] += number

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return dict(self._numbers)


# The engines of this process, started or not: closed at exit, and forgotten by a forked child.
_running_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close all connections at exit. Log which engines have published without a client."""
    engines = list(_running_engines)
    close_engines(engines, timeout=2.0)
    for engine in engines:
        engine.warn_if_alone()


def _forget_all() -> None:
    """Forget the parent's engines and signal handlers. A forked child runs this first."""
    for hub_ in list(_hubs):
        hub_.forget_engines()
    _running_engines.clear()
    restore_signal_handlers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

# The handlers that our own ones replace, by signal number.
_former_handlers: dict[int, Any] = {}


def install_signal_handlers() -> None:
    """Send 1001 to all clients if SIGTERM or SIGINT stops a process that does not handle it.

    Only default handlers are replaced. gunicorn has its own; see Heartbeat.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for number, default in defaults.items():
        if signal.getsignal(number) is default:
            _former_handlers[number] = default
            signal.signal(number, _on_signal)


def restore_signal_handlers() -> None:
    for number, former in _former_handlers.items():
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, former)


def _on_signal(number: int, frame: Any) -> None:
    """Close all clients, then let the signal act as it would have without this module.

    The interrupted code may hold any lock, so this function takes none.
    """
    engines = [engine for engine in list(_running_engines) if engine.is_started]
    for engine in engines:
        engine.loop.request_close_all()
    if number == signal.SIGINT:
        # Raises KeyboardInterrupt. A program that catches it goes on, and clients reconnect.
        _former_handlers[number](number, frame)
        return
    deadline = time.monotonic() + 2.0
    for engine in engines:
        engine.is_closing = True
    try:
        while any(engine.is_busy() for engine in engines) and time.monotonic() < deadline:
            time.sleep(0.01)
    except Exception:
        # gevent cannot wait in a signal handler. The exit handler closes the clients.
        sys.exit(128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# == 4. Events and frames: pure functions ========================================================

# Milliseconds since 1970 and a counter, as in a Redis stream. Later events have larger ids.
EventId = tuple[int, int]
# A pattern of event types, and one of content types.
Pattern = tuple[str, str]

NAME_RULE = f"words of letters, digits, _ and - joined by dots, at most {NAME_LENGTH} characters"
# How deeply objects and arrays may be nested in a client's message.
MESSAGE_DEPTH = 100


class Draft(NamedTuple):
    """An event that has no id yet."""

    type: str
    content_type: str
    # As JSON.
    payload: str
    # User ids. If it is None, all subscribers receive the event.
    to: frozenset[str] | None


class Event:
    """One published event. Any thread may create one and read it, except `frame`: loop only.

    To save memory it keeps either the payload or, once that was asked for, the frame.
    """

    __slots__ = ("_frame", "_payload", "content_type", "id", "size", "to", "type")

    def __init__(self, event_id: EventId, draft: Draft) -> None:
        self.id = event_id
        self.type = draft.type
        self.content_type = draft.content_type
        self.to = draft.to
        self.size = utf8_length(draft.payload)
        self._payload: str | None = draft.payload
        self._frame = b""

    @property
    def payload(self) -> str:
        """The payload as JSON, until the frame exists."""
        return self._payload or "null"

    @property
    def frame(self) -> bytes:
        """The bytes that every client receives. Loop only."""
        if self._payload is not None:
            # Names need no escaping, and the payload is JSON already.
            text = (
                f'{{"type": "{self.type}", "contentType": "{self.content_type}",'
                f' "payload": {self._payload}, "id": "{format_event_id(self.id)}",'
                f' "timestamp": "{timestamp(self.id[0])}"}}'
            )
            self._frame = text_frame(text)
            self._payload = None
        return self._frame


def utf8_length(text: str) -> int:
    """Return the number of bytes of a string in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def format_event_id(event_id: EventId) -> str:
    return f"{event_id[0]}-{event_id[1]}"


def parse_event_id(value: object) -> EventId:
    """Return the id that a client sent as `since`, or raise ClientError."""
    match = None
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]{1,20})-([0-9]{1,20})", value)
    if match is None:
        raise ClientError(
            "invalid_since",
            f"`since` must be the `id` of an event, such as 1763832000123-0, not {describe(value)}",
        )
    return int(match[1]), int(match[2])


def is_name(text: str) -> bool:
    """Return whether a string can name a type or a content type."""
    # The length first: the cache must not keep long strings of clients.
    return 0 < len(text) <= NAME_LENGTH and _has_words(text)


@functools.lru_cache(maxsize=1024)
def _has_words(text: str) -> bool:
    return all(map(_is_word, text.split(".")))


def _is_word(word: str) -> bool:
    # \w of a regular expression would leave out the vowel signs of Hindi, Tamil, Thai and others.
    return word != "" and all(
        character in "_-" or unicodedata.category(character)[0] in "LMN" for character in word
    )


def is_pattern(text: str) -> bool:
    """Return whether a string is a name, a prefix such as content.*, or *."""
    return len(text) <= NAME_LENGTH and (text == "*" or is_name(text.removesuffix(".*")))


def check_name(value: object, argument: str) -> str:
    """Return a type or content type that can be published, or raise, naming the argument."""
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a str, not {type(value).__name__}")
    name = plain_str(value)
    if not is_name(name):
        raise ValueError(f"{argument} must be {NAME_RULE}, not {name[:NAME_LENGTH]!r}")
    return name


def plain_str(value: str) -> str:
    """Return the characters of a str subclass. str() of an Enum member would be its name."""
    return str.__str__(value)


def check_user_id(value: object, source: str) -> str:
    """Return a user id as a str. The site may also give an int or a UUID."""
    if isinstance(value, bool) or not isinstance(value, (str, int, UUID)):
        kind = type(value).__name__
        raise TypeError(f"{source} must be a user id (str, int or UUID), not {kind}")
    if isinstance(value, str):
        user_id = plain_str(value)
    elif isinstance(value, int):
        user_id = int.__repr__(value)
    else:
        user_id = str(value)
    if not 0 < len(user_id) <= NAME_LENGTH:
        raise ValueError(f"{source} must be a user id of 1 to {NAME_LENGTH} characters")
    return user_id


def check_receivers(to: Any) -> frozenset[str]:
    """Return the user ids of publish()'s `to`, or raise, naming the argument."""
    if to is None:
        raise TypeError(
            "to must be a user id or several, not None; leave it out to reach everyone who"
            " subscribes, and give [] to reach nobody"
        )
    if isinstance(to, (str, int, UUID)):
        return frozenset([check_user_id(to, "to")])
    if not isinstance(to, Iterable) or isinstance(to, (bytes, bytearray, Mapping)):
        raise TypeError(f"to must be a user id or several, not {type(to).__name__}")
    return frozenset(check_user_id(user, "to") for user in to)


def parse_pattern(fields: Mapping[str, Any]) -> Pattern:
    """Return the pattern that a client's `type` and `contentType` form, or raise ClientError."""
    event_type = _pattern_field(fields, "type", "an event type such as content.created", "content")
    content_type = _pattern_field(fields, "contentType", "a content type such as posts", "posts")
    return event_type, content_type


def _pattern_field(fields: Mapping[str, Any], name: str, example: str, prefix: str) -> str:
    value = fields.get(name, "*")
    if not (isinstance(value, str) and is_pattern(value)):
        raise ClientError(
            "invalid_type",
            f"`{name}` must be {example}, a prefix such as {prefix}.*,"
            f" or * ({NAME_RULE}), not {describe(value)}",
        )
    return value


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of one name matches it."""
    is_prefix = pattern.endswith(".*") and name.startswith(pattern[:-1])
    return pattern in ("*", name) or is_prefix


def _patterns_of_name(name: str) -> list[str]:
    words = name.split(".")
    prefixes = [".".join(words[:count]) + ".*" for count in range(len(words) - 1, 0, -1)]
    return [name, *prefixes, "*"]


@functools.lru_cache(maxsize=1024)
def patterns_of(event_type: str, content_type: str) -> tuple[Pattern, ...]:
    """Return every pattern that matches such an event: matching is then a few look-ups."""
    return tuple(itertools.product(_patterns_of_name(event_type), _patterns_of_name(content_type)))


def describe(value: object) -> str:
    """Name a JSON value's kind for an error message, and show a short value."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    shown = json.dumps(value)
    if len(shown) > 60:
        shown = f"{shown[:60]}…"
    if value is None:
        return shown
    if isinstance(value, bool):
        return f"the boolean {shown}"
    if isinstance(value, str):
        return f"the string {shown}"
    return f"the number {shown}"


def now_milliseconds() -> int:
    return time.time_ns() // 1_000_000


def timestamp(milliseconds: int) -> str:
    """Return a time as the protocol writes it: UTC, ISO 8601, milliseconds."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_format_seconds(seconds)}.{rest:03}Z"


# Cached, because strftime() takes up to 20 µs, a tenth of the time that an event takes.
@functools.lru_cache(maxsize=16)
def _format_seconds(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Return an unmasked, unfragmented frame (RFC 6455 section 5.2).

    wsproto builds the same bytes in ten times the time; a test compares both.
    """
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 65_536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def text_frame(text: str) -> bytes:
    return encode_frame(Opcode.TEXT, text.encode())


def close_frame(code: int, reason: str) -> bytes:
    """Return a close frame. Its payload has at most 125 bytes (RFC 6455 section 5.5)."""
    # If the last character was cut in half, it is dropped.
    short = reason.encode()[:123].decode(errors="ignore")
    return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + short.encode())


def message_frame(
    message_type: str,
    payload: Mapping[str, Any],
    content_type: str | None = None,
    ref: str | float | None = None,
) -> bytes:
    """Return the frame of a message of the server. The payload needs no JSON provider."""
    message: dict[str, Any] = {"type": message_type}
    if content_type is not None:
        message["contentType"] = content_type
    message["payload"] = payload
    message["timestamp"] = timestamp(now_milliseconds())
    if ref is not None:
        message["ref"] = ref
    return text_frame(json.dumps(message))


def parse_message(data: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a client sent, or raise ClientError."""
    if isinstance(data, bytes):
        raise ClientError("invalid_message", "a message must be a text message, not a binary one")
    try:
        message = json.loads(data, parse_constant=_refuse_constant, parse_float=_parse_float)
        if data.count("[") + data.count("{") > MESSAGE_DEPTH:
            _check_depth(message)
    except RecursionError:
        raise ClientError("invalid_json", "the message is nested too deeply") from None
    except ValueError as error:
        raise ClientError("invalid_json", f"the message is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ClientError(
            "invalid_message",
            'a message must be a JSON object such as {"action": "subscribe"},'
            f" not {describe(message)}",
        )
    return message


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is JavaScript, but not JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    # Python would write it as Infinity, which is not JSON.
    if abs(number) == float("inf"):
        raise ValueError(f"the number {text[:60]} is too large")
    return number


def _check_depth(message: object) -> None:
    """Raise RecursionError if a message is nested too deeply to be encoded again safely."""
    level = [message]
    for _ in range(MESSAGE_DEPTH + 1):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return
        level = []
        for container in containers:
            level.extend(container.values() if isinstance(container, dict) else container)
    raise RecursionError


# == 5. Loop and history: one order for all events ===============================================

Call = tuple[Callable[..., object], tuple[Any, ...]]


class ReentryGuard:
    """Raises RuntimeError if a thread is about to take a lock that it holds already.

    Only a signal handler can do that, because it interrupts its own thread anywhere. The lock would
    then wait for ever, and a re-entrant lock would give ids out of order.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        # Threads that have the lock or wait for it. Each step is atomic. If a signal handler
        # raises an exception, its thread may stay here: that is harmless while the lock is free.
        self._threads: set[int] = set()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if thread in self._threads and self._lock.locked():
            raise RuntimeError(SIGNAL_HINT)
        self._threads.add(thread)

    def __exit__(self, *exception: object) -> None:
        self._threads.discard(threading.get_ident())


SIGNAL_HINT = (
    "a signal handler called a method of the hub, such as publish(), while it had interrupted"
    " another one: let the handler set a flag, and call it afterwards"
)


class Flush:
    """A thread waits in flush() until `newest` is delivered and unsent data is written.

    That thread creates it and waits for `is_done`. The loop owns the rest.
    """

    def __init__(self, newest: EventId) -> None:
        self.newest = newest
        self.is_done = threading.Event()
        # Slow clients, and the `written_bytes` to wait for. None until `newest` is delivered.
        self.targets: list[tuple[Connection, int]] | None = None


class EventQueue:
    """The queue of a loop: events and calls, in one order. Any thread may call its methods."""

    # publish() waits while this much is queued. Otherwise a fast publisher could fill the memory.
    MAX_QUEUED_BYTES = 8 * 1024 * 1024
    # How much an event counts in the queue, in addition to its payload.
    EVENT_OVERHEAD = 1024
    # A system call costs about the same for one small frame as for many. So queued events are sent
    # together, up to these limits. The loop never waits for more events to fill a batch.
    BATCH_BYTES = 64 * 1024
    BATCH_EVENTS = 512

    def __init__(self, newest_id: EventId) -> None:
        # Guards the queue, its size, the newest id and the flags below, so that events are queued
        # in the order of their ids. It is held for that long only.
        self._lock = threading.Lock()
        self._guard = ReentryGuard(self._lock)
        # Notified when there is room in the queue again, and when the loop stops.
        self._room = threading.Condition(self._lock)
        self._queue: deque[Event | Call] = deque()
        self._queued_bytes = 0
        # The newest id that this process gave, or that the follower brought.
        self.last_id: EventId = newest_id
        # The loop waits for sockets, or is about to: a new entry of the queue must wake it.
        self._is_asleep = False
        self._is_stopped = False
        # The thread of the loop, and the socket that wakes it; None before the start.
        self.thread: threading.Thread | None = None
        self._waker: socket.socket | None = None

    def publish(self, drafts: Iterable[Draft]) -> list[EventId]:
        """Queue events for delivery and return their ids. Waits while the queue is full.

        Raises RuntimeError if a signal handler calls it while its thread is inside.
        """
        events = []
        with self._guard, self._lock:
            self._wait_for_room()
            for draft in drafts:
                milliseconds = now_milliseconds()
                newest, counter = self.last_id
                # Ids never go back, also if the clock does.
                if milliseconds > newest:
                    self.last_id = (milliseconds, 0)
                else:
                    self.last_id = (newest, counter + 1)
                events.append(Event(self.last_id, draft))
            must_wake = self._enqueue(events)
        if must_wake:
            self._wake()
        return [event.id for event in events]

    def submit(self, events: list[Event]) -> None:
        """Queue events that have ids already. For the follower, in the order of the shared log."""
        with self._lock:
            self._wait_for_room()
            self.last_id = events[-1].id
            must_wake = self._enqueue(events)
        if must_wake:
            self._wake()

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Call a function on the loop's thread, after the events that are queued before this.

        Returns False, and does not call it, if the loop has stopped or has not started.
        """
        with self._guard, self._lock:
            if self._is_stopped or self.thread is None:
                return False
            self._queue.append((function, args))
            must_wake, self._is_asleep = self._is_asleep, False
        if must_wake:
            self._wake()
        return True

    def _wait_for_room(self) -> None:
        """Wait while the queue is full. The lock is held."""
        while self._queued_bytes >= self.MAX_QUEUED_BYTES and not self._is_stopped:
            self._room.wait()

    def _enqueue(self, events: list[Event]) -> bool:
        """Queue events; return whether the loop must be woken. The lock is held."""
        if self._is_stopped:
            return False
        self._queue.extend(events)
        self._queued_bytes += sum(event.size + self.EVENT_OVERHEAD for event in events)
        must_wake, self._is_asleep = self._is_asleep, False
        return must_wake

    def _wake(self) -> None:
        # If the buffer is full, a wake-up is in it. If it is closed, the loop has stopped.
        if self._waker is not None:
            with suppress(OSError):
                self._waker.send(b"\0")

    def queue_length(self) -> int:
        return len(self._queue)

    def _take(self) -> list[Event] | Call:
        """Return the next call, or the events before it that make one batch."""
        with self._lock:
            first = self._queue.popleft()
            if not isinstance(first, Event):
                return first
            batch = [first]
            size = first.size
            while self._queue and size < self.BATCH_BYTES and len(batch) < self.BATCH_EVENTS:
                following = self._queue[0]
                if not isinstance(following, Event):
                    break
                batch.append(following)
                size += following.size
                self._queue.popleft()
            self._release_room(size + len(batch) * self.EVENT_OVERHEAD)
            return batch

    def _release_room(self, size: int) -> None:
        """Let publishers that wait for room continue. The lock is held."""
        was_full = self._queued_bytes >= self.MAX_QUEUED_BYTES
        self._queued_bytes -= size
        if was_full:
            self._room.notify_all()


class Loop(EventQueue):
    """The thread that owns the order of events, all sockets, the history and the editors.

    Any thread may call start() and the methods under "any thread"; a forked child, close_copies().
    The others are for the loop's own thread. It never runs code of the site, and never waits for a
    client, because sockets are non-blocking.
    """

    def __init__(
        self,
        registry: Registry,
        history: History,
        counters: Counters,
        report: Callable[..., None],
    ) -> None:
        super().__init__(history.newest_id)
        self.registry = registry
        self.history = history
        self._counters = counters
        self._report = report
        # Set by any thread, without the lock: a signal handler must not wait for it.
        self._must_close_all = False
        # Loop only from here on.
        self._timers: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._timer_number = itertools.count()
        # Connections with a close frame sent or queued, and an open socket.
        self.closing: set[Connection] = set()
        self._flushes: list[Flush] = []

    def start(self) -> None:
        """Create the selector and the wake-up sockets, and start the thread."""
        self.selector = selectors.DefaultSelector()
        self._wake_up, self._waker = socket.socketpair()
        for sock in (self._wake_up, self._waker):
            sock.setblocking(False)
        self.selector.register(self._wake_up, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run, name="swiftcms-ws loop", daemon=True)
        try:
            self.thread.start()
        except BaseException:
            self.thread = None
            self._close_descriptors()
            raise

    # -- any thread --------------------------------------------------------------------------------

    def request_close_all(self) -> None:
        """Close all connections with 1001 soon. Takes no lock: a signal handler calls it."""
        self._must_close_all = True
        if self.thread is not None:
            self._wake()

    def run_through(self, deadline: float) -> None:
        """Wait until the loop has done everything that is queued now, or until the deadline."""
        is_done = threading.Event()
        if self.call(is_done.set):
            is_done.wait(max(0.0, deadline - time.monotonic()))

    def request_stop(self) -> None:
        """Stop soon. Takes no lock."""
        self._is_stopped = True
        if self.thread is not None:
            self._wake()

    def stop(self) -> None:
        """Stop the thread after the queue is empty, and wait for it."""
        with self._room:
            self._is_stopped = True
            self._room.notify_all()
        if self.thread is not None:
            self._wake()
            if self.thread is not threading.current_thread():
                self.thread.join(1.0)

    # -- the loop's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        """Thread body: wait, empty the queue, then serve the sockets that are ready."""
        while self._prepare_to_wait():
            try:
                ready = self.selector.select(self._seconds_to_wait())
                self._do_queued()
                self._serve(ready)
                self._close_if_requested()
                self._do_timers()
                self._check_flushes()
            except Exception as error:
                self._report(logging.ERROR, "the loop failed and continues", exc_info=error)
        self.abort_all()
        self._close_descriptors()

    def _prepare_to_wait(self) -> bool:
        """Mark the loop as asleep if nothing is queued. Return False if it has to stop."""
        with self._lock:
            self._is_asleep = not self._queue
            return not (self._is_asleep and self._is_stopped)

    def _seconds_to_wait(self) -> float | None:
        if not self._is_asleep or self._must_close_all:
            return 0
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _do_queued(self) -> None:
        """Deliver the events and run the calls that are queued now, in their order.

        Later ones wait for the next round. So an answer comes after every event that was published
        before the client's message, and a fast publisher cannot keep the loop from reading.
        """
        with self._lock:
            self._is_asleep = False
            count = len(self._queue)
        while count > 0:
            work = self._take()
            if isinstance(work, list):
                count -= len(work)
                self.deliver(work)
            else:
                count -= 1
                function, args = work
                function(*args)
            if count > 0:
                # Clients that read now must not be taken for slow ones.
                self._serve(self.selector.select(0), selectors.EVENT_WRITE)

    def _serve(
        self, ready: list[tuple[selectors.SelectorKey, int]], allowed: int = ~0
    ) -> None:
        """Read from and write to the sockets that the selector reported, as far as allowed."""
        for key, events in ready:
            if key.data is not None:
                key.data.serve(events & allowed)
            else:
                # The wake-up has done its work.
                with suppress(BlockingIOError):
                    self._wake_up.recv(4096)

    def _close_if_requested(self) -> None:
        if self._must_close_all:
            self._must_close_all = False
            self.close_all(CloseCode.GOING_AWAY, "the server is going away; reconnect with since")

    def _do_timers(self) -> None:
        """Run the timers that are due."""
        while self._timers and self._timers[0][0] <= time.monotonic():
            _, _, function, args = heapq.heappop(self._timers)
            function(*args)

    def call_at(self, when: float, function: Callable[..., object], *args: Any) -> None:
        """Call a function at a time of time.monotonic()."""
        heapq.heappush(self._timers, (when, next(self._timer_number), function, args))

    def deliver(self, events: list[Event]) -> None:
        """Send each subscriber those of `events` that it wants, in one system call."""
        # A set of events is an integer: bit i stands for events[i].
        kinds: dict[tuple[str, str, frozenset[str] | None], int] = defaultdict(int)
        for index, event in enumerate(events):
            kinds[event.type, event.content_type, event.to] |= 1 << index
        routes: Iterable[tuple[int, Collection[Connection]]]
        routes = [(bits, self.registry.matching(*kind)) for kind, bits in kinds.items()]
        if len(kinds) > 1:
            routes = _merge_routes(routes)
        try:
            for bits, connections in routes:
                if not connections:
                    continue
                chosen = [event.frame for index, event in enumerate(events) if bits >> index & 1]
                Connection.send_to_all(connections, b"".join(chosen))
                self._counters.add("delivered", len(chosen) * len(connections))
        finally:
            self.history.add(events)

    # -- flushing and closing ----------------------------------------------------------------------

    def add_flush(self, flush: Flush) -> None:
        self._flushes.append(flush)
        self._check_flushes()

    def remove_flush(self, flush: Flush) -> None:
        """Forget a thread that does not wait any more."""
        if flush in self._flushes:
            self._flushes.remove(flush)

    def _check_flushes(self) -> None:
        """Wake a thread in flush() if its events are written, or their slow clients are gone."""
        for flush in list(self._flushes):
            if self.history.newest_id < flush.newest:
                continue
            if flush.targets is None:
                flush.targets = [
                    (connection, connection.written_bytes + connection.unsent_bytes)
                    for connection in self.registry.connections()
                    if connection.unsent_bytes
                ]
            if all(connection.has_written(target) for connection, target in flush.targets):
                flush.is_done.set()
                self.remove_flush(flush)

    def close_all(self, code: CloseCode, reason: str) -> None:
        for connection in self.registry.connections():
            connection.close(code, reason)

    def abort_all(self) -> None:
        """Close all sockets, without waiting for answers to close frames."""
        for connection in (*self.registry.connections(), *self.closing):
            connection.abort()

    def _close_descriptors(self) -> None:
        self.selector.close()
        for sock in (self._wake_up, self._waker):
            if sock is not None:
                sock.close()

    def close_copies(self) -> None:
        """Close a forked child's copies. unregister() would change the parent's selector."""
        if self.thread is not None:
            self._close_descriptors()


def _merge_routes(
    routes: Iterable[tuple[int, Collection[Connection]]],
) -> Iterable[tuple[int, Collection[Connection]]]:
    """Group the connections that want the same events, so that each is in one group."""
    wanted: dict[Connection, int] = defaultdict(int)
    for bits, connections in routes:
        for connection in connections:
            wanted[connection] |= bits
    groups: dict[int, list[Connection]] = defaultdict(list)
    for connection, bits in wanted.items():
        groups[bits].append(connection)
    return groups.items()


class History:
    """The latest events, bounded in number and in bytes. Loop only.

    Subscribing with `since` runs on the loop too, between two events. So there is no gap between a
    replay and the live events, and no overlap.
    """

    MAX_BYTES = 32 * 1024 * 1024

    def __init__(self, size: int) -> None:
        self._size = size
        self._events: deque[Event] = deque()
        self._bytes = 0
        # The newest event that was delivered, and the newest that is not in the history any more.
        # Before the first event both are the time of the start, so that a client that has received
        # no event can resume too.
        self.newest_id: EventId = (now_milliseconds(), 0)
        self.forgotten_id = self.newest_id

    def restart(self, newest_id: EventId) -> None:
        """Begin an empty history after an event of the shared log."""
        self._events.clear()
        self._bytes = 0
        self.newest_id = self.forgotten_id = newest_id

    def add(self, events: list[Event]) -> None:
        self._events.extend(events)
        self._bytes += sum(event.size for event in events)
        self.newest_id = events[-1].id
        while len(self._events) > self._size or self._bytes > self.MAX_BYTES:
            oldest = self._events.popleft()
            self._bytes -= oldest.size
            self.forgotten_id = oldest.id

    def after(self, since: EventId) -> list[Event] | None:
        """Return the events after `since`; None if some of them may be missing here.

        `since` must be the id of an event of this history, or of the last one that it dropped.
        Any other id may be of an earlier process, whose events are not known.
        """
        index = bisect.bisect_right(self._events, since, key=lambda event: event.id)
        previous = self._events[index - 1].id if index else self.forgotten_id
        if since != previous:
            return None
        return list(itertools.islice(self._events, index, None))

    def continue_after(self, older: list[Event]) -> list[Event] | None:
        """Return `older`, which was read from the shared log, with the newer events of the history.

        None if there may be events between the two.
        """
        if older[-1].id < self.forgotten_id:
            return None
        newer = [event for event in self._events if event.id > older[-1].id]
        return [event for event in older if event.id <= self.newest_id] + newer


# == 6. Registry: connections, subscriptions and slots ===========================================


class Registry:
    """Connections and their subscriptions, indexed by pattern, by user and by client id.

    Any thread may call any method: the loop for events and messages, the web server's threads to
    reserve slots. Finding the subscribers of an event takes a few look-ups, however many other
    subscriptions there are.
    """

    # Answers of matching() that are kept until a subscription changes.
    CACHE_SIZE = 64

    def __init__(self) -> None:
        # Guards everything below, and each connection's `user` and `subscriptions`, because they
        # change together. It is held only to read and change dictionaries.
        self._lock = threading.Lock()
        # Notified when a slot is released.
        self._released = threading.Condition(self._lock)
        # Slots taken by connections and by handshakes. Reading it is atomic.
        self.slots = 0
        # Dictionaries without values are sets that keep their order.
        self._connections: dict[str, Connection] = {}
        self._subscribers: dict[Pattern, dict[Connection, None]] = {}
        self._by_user: dict[str, dict[Connection, None]] = {}
        self._match_cache: dict[tuple[str, str], tuple[Connection, ...]] = {}

    # -- slots -------------------------------------------------------------------------------------

    def reserve(self, limit: int) -> bool:
        """Take one of `limit` slots; return False if all are taken."""
        with self._lock:
            if self.slots >= limit:
                return False
            self.slots += 1
            return True

    def release(self) -> None:
        with self._released:
            self.slots -= 1
            self._released.notify_all()

    def wait_until_empty(self, deadline: float) -> bool:
        """Wait until no slot is taken; return False at the deadline."""
        with self._released:
            return self._released.wait_for(
                lambda: not self.slots, max(0.0, deadline - time.monotonic())
            )

    # -- connections -------------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        with self._lock:
            self._connections[connection.id] = connection
            if connection.user:
                self._by_user.setdefault(connection.user.id, {})[connection] = None

    def remove(self, connection: Connection) -> None:
        with self._lock:
            self._connections.pop(connection.id, None)
            for pattern in list(connection.subscriptions):
                self._unsubscribe(connection, pattern)
            if connection.user:
                self._discard(self._by_user, connection.user.id, connection)

    def find(self, client_id: str) -> Connection | None:
        with self._lock:
            return self._connections.get(client_id)

    def connections(self, user_id: str | None = None) -> list[Connection]:
        """Return all connections, or those of one user."""
        with self._lock:
            if user_id is None:
                return list(self._connections.values())
            return list(self._by_user.get(user_id, ()))

    def connections_after_fork(self) -> list[Connection]:
        """Return all connections in a forked child, where the lock may be held for ever."""
        return list(self._connections.values())

    def sign_in(self, connection: Connection, user: User, after: EventId) -> None:
        """Set the user of a connection, which receives that user's events after `after`.

        If the connection has this user already, only the claims of the token change.
        """
        with self._lock:
            if connection.user is None:
                # Events for this user were not sent to the connection until now.
                for pattern, (public, _) in connection.subscriptions.items():
                    connection.subscriptions[pattern] = (public, after)
            connection.user = user
            self._by_user.setdefault(user.id, {})[connection] = None

    # -- subscriptions -----------------------------------------------------------------------------

    def subscribe(self, connection: Connection, pattern: Pattern, after: EventId) -> None:
        """Subscribe to the events after `after`. If the subscription exists, keep the earlier id.

        A subscription has two ids. The connection has received all matching public events after the
        first one, and all events for its user after the second one.
        """
        with self._lock:
            public, private = connection.subscriptions.get(pattern, (after, after))
            connection.subscriptions[pattern] = (min(public, after), min(private, after))
            self._subscribers.setdefault(pattern, {})[connection] = None
            self._match_cache.clear()

    def unsubscribe(self, connection: Connection, patterns: Iterable[Pattern] | None) -> int:
        """Remove subscriptions, or all if `patterns` is None; return how many there were."""
        with self._lock:
            if patterns is None:
                patterns = list(connection.subscriptions)
            return sum(self._unsubscribe(connection, pattern) for pattern in patterns)

    def _unsubscribe(self, connection: Connection, pattern: Pattern) -> bool:
        if connection.subscriptions.pop(pattern, None) is None:
            return False
        self._discard(self._subscribers, pattern, connection)
        self._match_cache.clear()
        return True

    @staticmethod
    def _discard(
        index: dict[Any, dict[Connection, None]], key: object, connection: Connection
    ) -> None:
        """Remove a connection from an index, and the key with its last connection."""
        connections = index.get(key, {})
        connections.pop(connection, None)
        if not connections:
            index.pop(key, None)

    def count_subscriptions(self) -> int:
        with self._lock:
            return sum(len(connections) for connections in self._subscribers.values())

    # -- matching ----------------------------------------------------------------------------------

    def matching(
        self, event_type: str, content_type: str, to: frozenset[str] | None = None
    ) -> Collection[Connection]:
        """Return the connections that subscribe to such an event, each once."""
        with self._lock:
            if to is not None:
                return self._matching_users(event_type, content_type, to)
            found = self._match_cache.get((event_type, content_type))
            if found is None:
                found = self._find_subscribers(event_type, content_type)
                if len(self._match_cache) >= self.CACHE_SIZE:
                    self._match_cache.clear()
                self._match_cache[event_type, content_type] = found
            return found

    def _find_subscribers(self, event_type: str, content_type: str) -> tuple[Connection, ...]:
        found: dict[Connection, None] = {}
        for pattern in patterns_of(event_type, content_type):
            found |= self._subscribers.get(pattern, {})
        return tuple(found)

    def _matching_users(
        self, event_type: str, content_type: str, to: frozenset[str]
    ) -> list[Connection]:
        patterns = patterns_of(event_type, content_type)
        return [
            connection
            for user_id in to
            for connection in self._by_user.get(user_id, ())
            if not connection.subscriptions.keys().isdisjoint(patterns)
        ]

    def missed(
        self, connection: Connection, patterns: Collection[Pattern], events: Iterable[Event]
    ) -> list[Event]:
        """Return those of `events` that match `patterns` and have not reached the connection."""
        wanted = set(patterns)
        with self._lock:
            user = connection.user
            subscriptions = dict(connection.subscriptions)

        def is_missed(event: Event) -> bool:
            matching = patterns_of(event.type, event.content_type)
            if wanted.isdisjoint(matching):
                return False
            if event.to is not None and (user is None or user.id not in event.to):
                return False
            index = 0 if event.to is None else 1
            return not any(
                event.id > subscriptions[pattern][index]
                for pattern in matching
                if pattern in subscriptions
            )

        return [event for event in events if is_missed(event)]


# == 7. Connection: one client's socket ==========================================================


class State(Enum):
    """OPEN: frames may be sent. CLOSING: a close frame is queued, and no frame may follow it.

    CLOSED: the socket is closed.
    """

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Connection:
    """Owns one client's socket and the unsent data for it. Loop only, except has_left().

    The socket is non-blocking. If the socket buffer of a slow client is full, unsent data is
    queued here and later frames queue behind it. Other clients are not affected.
    """

    # How many seconds a client has to answer our close frame.
    CLOSE_TIMEOUT = 2.0
    # The size of one read from the socket.
    RECEIVE_BYTES = 16 * 1024
    # The most bytes that are written to one client before the others are served.
    ROUND_BYTES = 256 * 1024
    # With more unsent data than this, the server stops reading from the client, so that the client
    # cannot ask for a second replay before it has read the first.
    MAX_UNSENT_WHILE_READING = 64 * 1024
    # MSG_NOSIGNAL: otherwise a write to a connection that the client has reset would raise SIGPIPE,
    # which stops the process if the site has restored that signal's default. Not on Windows.
    SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)

    # There may be thousands of connections, and __slots__ saves memory.
    __slots__ = (
        "_close_when_written",
        "_is_direct",
        "_loop",
        "_max_queue",
        "_progress_at",
        "_replay_allowance",
        "_selected",
        "_send",
        "_sock",
        "_unsent",
        "close_code",
        "close_deadline",
        "id",
        "session",
        "state",
        "subscriptions",
        "unsent_bytes",
        "user",
        "waiting_since",
        "written_bytes",
    )

    def __init__(
        self, client_id: str, sock: socket.socket, loop: Loop, max_queue: int, user: User | None
    ) -> None:
        sock.setblocking(False)
        # The web servers do not set it, and small frames would wait 40 ms. A Unix socket behind
        # a proxy has no such option.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.id = client_id
        self.state = State.OPEN
        self.close_code: int | None = None
        self.session: Session
        self._sock = sock
        self._send = sock.send
        self._loop = loop
        self._max_queue = max_queue
        # Guarded by the registry's lock. Registry.subscribe() explains the two ids.
        self.user = user
        self.subscriptions: dict[Pattern, tuple[EventId, EventId]] = {}
        # Chunks of one or more whole frames. If a part of the first chunk was sent, a memoryview
        # of the rest replaces it.
        self._unsent: deque[bytes | memoryview] | None = None
        self.unsent_bytes = 0
        # Bytes of `_unsent` that were written. flush() waits for them.
        self.written_bytes = 0
        # A replay may exceed max_queue until everything has been sent once. Otherwise a client
        # could never resume from a history longer than max_queue.
        self._replay_allowance = 0
        # OPEN, and no data is unsent: send() writes to the socket at once.
        self._is_direct = True
        # When the socket last accepted data, if some is unsent.
        self._progress_at = 0.0
        # Since when the client has been silent; infinity while the server does not read it,
        # because its silence does not count then.
        self.waiting_since = time.monotonic()
        # Close the socket as soon as everything is written: the client's close frame has arrived.
        self._close_when_written = False
        self.close_deadline = float("inf")
        # The events that the selector watches for; 0: the socket is not registered.
        self._selected = 0

    # -- sending -----------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send whole frames, now or as soon as the client reads. Never blocks or raises."""
        Connection.send_to_all((self,), data)

    @staticmethod
    def send_to_all(connections: Iterable[Connection], data: bytes) -> None:
        """Send the same frames to several clients. Never blocks or raises.

        Most of the time of an event is spent here, so the `for` calls nothing but socket.send().
        """
        size, flags = len(data), Connection.SEND_FLAGS
        for connection in connections:
            try:
                sent = connection._send(data, flags) if connection._is_direct else 0
            except BlockingIOError:
                sent = 0
            except OSError:
                connection.abort()
                continue
            if sent < size:
                connection._send_later(data, sent)

    def _send_later(self, data: bytes, sent: int) -> None:
        """Queue the unsent rest of `data`; close the connection if too much is queued."""
        if self.state is not State.OPEN:
            return
        self._queue(memoryview(data)[sent:] if sent else data)
        if self.unsent_bytes > self._max_queue + self._replay_allowance:
            self.close(CloseCode.TRY_AGAIN_LATER, "read too slowly; reconnect with since")

    def send_replay(self, frames: Sequence[bytes]) -> None:
        """Send the events that a client missed, of any length."""
        if self.state is not State.OPEN or not frames:
            return
        for frame in frames:
            self._queue(frame)
        self._replay_allowance += sum(map(len, frames))
        self._write()

    def _queue(self, data: bytes | memoryview) -> None:
        if not self._unsent:
            self._unsent = deque()
            self._is_direct = False
            self._progress_at = time.monotonic()
        self._unsent.append(data)
        self.unsent_bytes += len(data)
        self.update_selector()

    def _write(self) -> None:
        """Write unsent data until the socket buffer is full, but about ROUND_BYTES at most."""
        budget = self.ROUND_BYTES
        could_read = self.can_read
        while self._unsent and budget > 0:
            batch = self._next_batch()
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            try:
                sent = self._send(data, self.SEND_FLAGS)
            except BlockingIOError:
                break
            except OSError:
                self.abort()
                return
            self._remove_sent(batch, sent)
            budget -= sent
            if sent < len(data):
                break
        if not self._unsent:
            self._all_written()
        self.update_selector()
        if self.can_read and not could_read:
            # Handle the messages that were received while the client was not read.
            self._loop.call_at(time.monotonic(), self.session.handle_received)

    def _all_written(self) -> None:
        self._unsent = None
        self._replay_allowance = 0
        self._is_direct = self.state is State.OPEN
        if self._close_when_written:
            self.abort()

    def _next_batch(self) -> list[bytes | memoryview]:
        """Return the first chunks, which are written with one system call."""
        batch: list[bytes | memoryview] = []
        size = 0
        for chunk in self._unsent or ():
            if batch and size + len(chunk) > Loop.BATCH_BYTES:
                break
            batch.append(chunk)
            size += len(chunk)
        return batch

    def _remove_sent(self, batch: list[bytes | memoryview], sent: int) -> None:
        assert self._unsent is not None
        self.written_bytes += sent
        self.unsent_bytes -= sent
        if sent:
            self._progress_at = time.monotonic()
        for chunk in batch:
            if sent < len(chunk):
                self._unsent[0] = memoryview(chunk)[sent:]
                return
            sent -= len(chunk)
            self._unsent.popleft()

    def has_written(self, target: int) -> bool:
        """Return whether `target` bytes were written. flush() does not wait for closing clients."""
        return self.written_bytes >= target or self.state is not State.OPEN

    # -- reading -----------------------------------------------------------------------------------

    def serve(self, events: int) -> None:
        """Read or write now. The selector has reported `events`."""
        try:
            if events & selectors.EVENT_WRITE and self.state is not State.CLOSED:
                self._write()
            if events & selectors.EVENT_READ and self.state is not State.CLOSED:
                self._read()
        except Exception as error:
            # An exception closes one connection, and never stops the loop.
            self.session.fail(error)

    def _read(self) -> None:
        try:
            data = self._sock.recv(self.RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.abort()
            return
        self.waiting_since = time.monotonic()
        self.session.receive(data)

    @property
    def can_read(self) -> bool:
        """Whether the server reads from this client and handles its messages now."""
        is_behind = self.unsent_bytes > self.MAX_UNSENT_WHILE_READING
        return self.state is State.OPEN and not is_behind and not self.session.is_paused

    def update_selector(self) -> None:
        """Let the selector watch for the events that this connection can use now.

        A socket that is neither read nor written is unregistered. With an empty mask epoll would
        still report a reset, again and again.
        """
        wanted = 0
        if self.state is not State.CLOSED:
            if self.can_read or self.state is State.CLOSING:
                wanted = selectors.EVENT_READ
            if self._unsent:
                wanted |= selectors.EVENT_WRITE
        if wanted == self._selected:
            return
        self._note_reading(bool(wanted & selectors.EVENT_READ))
        if not self._selected:
            self._loop.selector.register(self._sock, wanted, self)
        elif not wanted:
            self._loop.selector.unregister(self._sock)
        else:
            self._loop.selector.modify(self._sock, wanted, self)
        self._selected = wanted

    def _note_reading(self, is_reading: bool) -> None:
        """Count the client's silence only while the server reads from it."""
        if not is_reading:
            self.waiting_since = float("inf")
        elif not self._selected & selectors.EVENT_READ:
            self.waiting_since = time.monotonic()

    # -- closing -----------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Send a close frame, and close the socket after the client's answer or CLOSE_TIMEOUT."""
        if self.state is not State.OPEN:
            return
        if code == CloseCode.TRY_AGAIN_LATER and self._unsent:
            # The first chunk may be partly sent, and the close frame must not come inside a frame.
            # The client is too slow for the rest.
            first = self._unsent.popleft()
            self._unsent = deque([first])
            self.unsent_bytes = len(first)
        self.close_code = code
        self._begin_closing(close_frame(code, reason))

    def answer_close(self, code: int | None) -> None:
        """The client's close frame has arrived: answer it unless it is an answer; then close."""
        self._close_when_written = True
        if self.state is State.OPEN:
            payload = b"" if code is None else struct.pack("!H", code)
            self._begin_closing(encode_frame(Opcode.CLOSE, payload))
        elif not self._unsent:
            self.abort()

    def fail(self, code: int, reason: str) -> None:
        """Close a connection whose client sent a malformed frame. No later byte is read."""
        self.close(code, reason)
        if not self._unsent:
            # The client reads our close frame, then the end of the stream, and closes the socket.
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def _begin_closing(self, frame: bytes) -> None:
        self.state = State.CLOSING
        self._loop.closing.add(self)
        self.close_deadline = time.monotonic() + self.CLOSE_TIMEOUT
        self._loop.call_at(self.close_deadline, self.abort)
        self._queue(frame)
        self._write()
        if self.session.is_paused:
            # The client's close frame may have been received and not handled yet.
            self._loop.call_at(time.monotonic(), self.session.handle_received)
        self.session.end()

    def abort(self) -> None:
        """Close the socket now, and drop unsent data. Sends no close frame."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._is_direct = False
        self._unsent = None
        self.unsent_bytes = 0
        self.update_selector()
        # Without shutdown() a forked child's copy would keep the connection open.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._loop.closing.discard(self)
        try:
            self.session.end()
        finally:
            self._loop.registry.release()

    def has_left(self) -> bool:
        """Return whether the client has left. For workers, while the loop does not read."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close_copy(self) -> None:
        """Close a forked child's copy of the socket; the parent's stays open."""
        self._sock.close()

    def idle_since(self, now: float) -> float:
        """Return since when the client is silent, or has not accepted any unsent data."""
        moments = [now, self.waiting_since]
        if self._unsent:
            moments.append(self._progress_at)
        return min(moments)

    def is_stuck(self, now: float, limit: float) -> bool:
        """Return whether unsent data has made no progress for `limit` seconds."""
        return bool(self._unsent) and now - self._progress_at >= limit


# II  From the handshake to an answer
# == 8. Endpoint: the /ws route, and taking over the socket ======================================

HANDSHAKE_KEY = "swiftcms_ws.handshake"
RETRY_SOON = {"Retry-After": "10"}
SUPPORTED_SERVERS = "serve the site with gunicorn, waitress or flask run"


class HandshakeRefused(Exception):
    """A handshake that is answered with HTTP (README, Reference).

    status:  of the response
    code:    in its JSON body, as `code`
    message: in its JSON body: a sentence with the mistake and the remedy
    headers: more headers of the response
    """

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.response = make_response({"code": code, "message": message}, status, headers)


class Handshake:
    """One handshake. It replaces the socket while simple-websocket accepts the handshake.

    That library writes its 101 response here, and the loop sends it when the connection is ready.
    An instance also replaces the library's thread, which would read from the socket. Used by the
    thread of the web server, and then by Session.open() on the loop.
    """

    # simple-websocket changes the name of its thread.
    name = "swiftcms-ws handshake"

    def __init__(self, sock: Any, user: User | None, began: float) -> None:
        self.sock = sock
        self.user = user
        # Before the site was asked for the user.
        self.began = began
        self.response = b""
        # After the take-over: our own socket and, if there is a relay, the peer of that socket.
        self.own: socket.socket | None = None
        self.relay: socket.socket | None = None
        self.read_ahead = b""

    def send(self, data: bytes) -> int:
        """Receive the 101 response of simple-websocket."""
        self.response = data
        return len(data)

    def start(self) -> None:
        """Start no thread."""

    # If the site's SOCK_SERVER_OPTIONS name another `thread_class`, the library's thread calls
    # these two methods and exits.

    def recv(self, size: int) -> bytes:
        return b""

    def close(self) -> None:
        """Leave the socket open."""


def handshake_thread(target: Any) -> Any:
    """Return a thread for simple-websocket, or a Handshake, which needs none.

    It is the option `thread_class`. To start a thread takes a third of the time of a handshake.
    """
    sock = target.__self__.sock
    if isinstance(sock, Handshake):
        return sock
    # Another WebSocket route of the site.
    return threading.Thread(target=target)


class Endpoint:
    """The blueprint of a hub. Its functions run in the web server's threads.

    A handshake is checked before the request reaches flask-sock's route. flask-sock and
    simple-websocket accept it. The view then takes the socket over from the web server and
    returns: the request ends as any other, and the WebSocket holds no thread of the server.
    """

    # Take the path of TLS and Windows also where it is not necessary, in tests.
    FORCE_RELAY = False

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.blueprint = Blueprint("swiftcms_ws", __name__)
        self.blueprint.record(lambda state: hub.registered(cast(Flask, state.app)))
        self.blueprint.before_request(self._check_handshake)
        self.blueprint.after_request(self._answer_handshake)
        self.blueprint.teardown_request(self._end_handshake)
        self.blueprint.register_error_handler(ProtocolError, self._refuse_malformed)
        Sock().route("/ws", bp=self.blueprint, endpoint="websocket")(self._websocket)
        self.blueprint.add_url_rule("/ws", "about", self._about)
        self.blueprint.add_url_rule("/ws/client.js", "client_js", self._client_js)
        self.blueprint.url_defaults(self._add_version)

    def _engine(self) -> Engine:
        return self._hub.engine_of(running_app())

    # -- before the handshake ----------------------------------------------------------------------

    def _check_handshake(self) -> Response | None:
        """Refuse a handshake with HTTP, or prepare it; let other requests pass."""
        if (request.endpoint or "").rpartition(".")[2] != "websocket":
            return None
        engine, environ = self._engine(), request.environ
        try:
            handshake = HandshakeCheck(self._hub, engine).run()
        except HandshakeRefused as refused:
            engine.counters.add(f"refused_{refused.status}")
            return refused.response
        # simple-websocket looks for the socket under the second key.
        environ[HANDSHAKE_KEY] = environ["werkzeug.socket"] = handshake
        # Without compression, the same frame can be sent to all clients.
        environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
        return None

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> Response:
        """Count a refused handshake, and return its response."""
        self._engine().counters.add(f"refused_{status}")
        return HandshakeRefused(status, code, message, **headers).response

    def _refuse_malformed(self, error: ProtocolError) -> Response:
        return self._refuse(400, "bad_handshake", f"not a WebSocket handshake: {error}")

    # -- the handshake -----------------------------------------------------------------------------

    def _websocket(self, accepted: Any) -> None:
        """Take over the socket of a handshake that simple-websocket has accepted."""
        # The accepted object has parsed the handshake, and would keep it.
        accepted.ws = None
        environ = request.environ
        handshake: Handshake = environ[HANDSHAKE_KEY]
        engine = self._engine()
        engine.has_served = True
        try:
            if needs_relay(handshake.sock):
                handshake.relay, handshake.own = descriptors().create_pair()
                handshake.sock.setblocking(False)
            else:
                handshake.own = descriptors().take_over(handshake.sock)
        except (OSError, ValueError) as error:
            # ValueError: the server has closed its socket, because the client has left.
            self._log_lost_socket(engine, error)
            return
        handshake.read_ahead = read_server_buffers(environ)

    def _log_lost_socket(self, engine: Engine, error: Exception) -> None:
        """Log it if the process has too many open files. That a client has left is not logged."""
        if getattr(error, "errno", None) in (errno.EMFILE, errno.EINVAL, errno.ENFILE):
            engine.warn(
                "refused a WebSocket: this process has %s connections and may not open more files"
                " (its limit is %s). Raise the limit: ulimit -n, or LimitNOFILE in systemd",
                engine.registry.slots,
                descriptors().limit,
            )

    def _answer_handshake(self, response: Response) -> Response:
        """Answer with a plain 101, so that the server logs this status.

        After the take-over it is written into a dead socket. The client gets the 101 from the loop.
        """
        handshake = request.environ.get(HANDSHAKE_KEY)
        if not isinstance(handshake, Handshake):
            return response
        if handshake.own is None:
            if handshake.response and response.status_code == 200:
                # The handshake was accepted, but the socket could not be taken over.
                message = "too many open files"
                return self._refuse(503, "too_many_connections", message, **RETRY_SOON)
            # Refused by simple-websocket, or by an exception.
            return response
        if handshake.relay is not None:
            return RelayResponse(handshake.sock, handshake.relay)
        return Response(status=101)

    def _end_handshake(self, error: BaseException | None) -> None:
        """Give the socket to the loop; without one, release the slot.

        This runs at the end of the request, after the site has stored its session. A client that
        has the 101 may send the next request, which needs that session.
        """
        environ = request.environ
        handshake = environ.get(HANDSHAKE_KEY)
        if not isinstance(handshake, Handshake):
            return
        engine = self._engine()
        if handshake.own is not None:
            kept = None
            if self._hub.authorize_hook or has_connection_receivers():
                kept = hook_environ(environ)
            address = environ.get("REMOTE_ADDR", "")
            if engine.loop.call(Session.open, engine, handshake, kept, address):
                return
            handshake.own.close()
        engine.registry.release()

    # -- other requests ----------------------------------------------------------------------------

    def _about(self) -> ResponseReturnValue:
        """Answer a plain GET: with the inspector, if it is switched on."""
        is_inspector_on = self._engine().settings.inspector
        if is_inspector_on is None:
            is_inspector_on = current_app.debug
        if is_inspector_on:
            return render_page(demo=False)
        return self._refuse(
            426,
            "upgrade_required",
            "this is the address of a WebSocket; connect to it with ws:// or wss://",
        )

    def _add_version(self, endpoint: str, values: dict[str, Any]) -> None:
        """Add `v`, a hash of client.js, to the address of it that url_for() returns."""
        blueprint, _, name = endpoint.rpartition(".")
        if name == "client_js" and "v" not in values:
            values["v"] = client_js(url_for(f"{blueprint}.about", _external=False, **values))[1]

    def _client_js(self, **values: Any) -> Response:
        """Serve the browser client. Browsers ask each time, and get it again if it has changed.

        With the right `v` they may keep it: a changed file has another address.
        """
        body, version = client_js(url_for(".about", _external=False, **values))
        response = Response(body, mimetype="text/javascript")
        if request.args.get("v") == version:
            response.cache_control.public = True
            response.cache_control.immutable = True
            response.cache_control.max_age = 365 * 24 * 3600
        else:
            response.cache_control.no_cache = True
        response.add_etag()
        return cast(Response, response.make_conditional(request))


class HandshakeCheck:
    """Decides about one handshake, in a thread of the web server.

    It runs before the request reaches flask-sock's route.
    """

    # Names and values of a handshake's headers together: they are kept if the site has hooks.
    MAX_HEADERS = 32 * 1024

    def __init__(self, hub: Hub, engine: Engine) -> None:
        self._hub = hub
        self._engine = engine

    def run(self) -> Handshake:
        """Return the handshake, with a slot reserved for it; raise HandshakeRefused."""
        sock = self._find_socket()
        self._warn_of_processes()
        self._check_headers()
        self._check_origin()
        # Started before the site is asked for the user: a sign-out from now on is noticed.
        self._hub.start(self._engine)
        if self._engine.follower is not None:
            self._engine.follower.wait_for_begin()
        began = time.monotonic()
        user = self._find_user()
        self._reserve_slot()
        return Handshake(sock, user, began)

    def _find_socket(self) -> Any:
        environ = request.environ
        server = environ.get("SERVER_SOFTWARE", "this web server")
        sock = find_socket(environ)
        problem = ""
        if sock is None:
            problem = "gives no access to the socket"
        elif "gunicorn.socket" not in environ and environ.get("wsgi.multiprocess"):
            problem = "starts a process for each request"
        elif needs_relay(sock) and not environ.get("wsgi.multithread"):
            problem = "has one thread, which TLS inside the process would occupy"
        if problem:
            self._engine.warn("refused a WebSocket: %s %s; %s", server, problem, SUPPORTED_SERVERS)
            raise HandshakeRefused(501, "not_supported", f"{server} {problem}; {SUPPORTED_SERVERS}")
        return sock

    def _warn_of_processes(self) -> None:
        if request.environ.get("wsgi.multiprocess") and self._engine.log is None:
            self._engine.warn(
                "the web server has several processes, and an event reaches only the clients of"
                " the process that publishes it: set SWIFTCMS_WS_DATABASE (or, on several machines,"
                " SWIFTCMS_WS_REDIS_URL), or run one process",
                once=True,
            )

    def _check_headers(self) -> None:
        """Refuse a handshake that RFC 6455 section 4.2.1 does not allow."""
        environ = request.environ
        headers = {key: value for key, value in environ.items() if key.startswith("HTTP_")}
        size = sum(len(key) + len(value) for key, value in headers.items())
        if size + len(environ.get("QUERY_STRING", "")) > self.MAX_HEADERS:
            raise HandshakeRefused(
                431, "bad_handshake", f"the headers are over {self.MAX_HEADERS} bytes"
            )
        if request.method != "GET":
            raise HandshakeRefused(
                400, "bad_handshake", f"a handshake is a GET, not a {request.method}"
            )
        if environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
            raise HandshakeRefused(400, "bad_handshake", "a handshake needs HTTP/1.1")
        for key, value in headers.items():
            is_used = key in ("HTTP_HOST", "HTTP_CONNECTION") or "_WEBSOCKET_" in key
            if is_used and not value.isascii():
                name = key.removeprefix("HTTP_").replace("_", "-").title()
                raise HandshakeRefused(400, "bad_handshake", f"the header {name} must be ASCII")
        version = headers.get("HTTP_SEC_WEBSOCKET_VERSION")
        if version != "13":
            raise HandshakeRefused(
                426,
                "upgrade_required",
                f"Sec-WebSocket-Version must be 13, not {version}",
                **{"Sec-WebSocket-Version": "13"},
            )
        if not _is_handshake_key(headers.get("HTTP_SEC_WEBSOCKET_KEY", "")):
            raise HandshakeRefused(
                400, "bad_handshake", "Sec-WebSocket-Key must be 16 bytes in base64"
            )

    def _check_origin(self) -> None:
        """Refuse handshakes of pages of other sites (RFC 6455 section 10.2).

        A browser adds the visitor's cookies to them, so such a page could act as the visitor.
        Clients that are not browsers send no Origin.
        """
        origin, host = request.headers.get("Origin"), request.environ.get("HTTP_HOST", "")
        if origin is None or is_origin_allowed(origin, host, self._engine.settings.origins):
            return
        self._engine.warn(
            "refused a WebSocket to a page of %r, because that is not the host of the request"
            " (%s). If such pages may connect, add the origin to SWIFTCMS_WS_ORIGINS. If it is"
            " this site, let its proxy pass the Host header on",
            origin[:200],
            host[:200],
        )
        raise HandshakeRefused(
            403, "forbidden", "pages of this origin may not connect to this site"
        )

    def _find_user(self) -> User | None:
        """Return the user of the token in the handshake, or of the identify hook."""
        parameter, bearer = request.args.get("token"), _bearer_token()
        token = parameter if parameter is not None else bearer
        if token is not None:
            try:
                return check_token(self._engine.settings, token)
            except ClientError as error:
                # Some proxies add a Bearer header of their own. Then the identify hook decides.
                if parameter is not None or self._hub.identify_hook is None:
                    challenge = {"WWW-Authenticate": "Bearer"}
                    raise HandshakeRefused(401, error.code, str(error), **challenge) from error
        if self._hub.identify_hook is None:
            return None
        # In the request itself: a context of its own would need a second connection of the site's
        # database pool, and concurrent handshakes could wait for each other.
        return _user_of_hook(self._hub.identify_hook())

    def _reserve_slot(self) -> None:
        limit = self._engine.settings.max_connections or descriptors().max_connections
        if not self._engine.registry.reserve(limit):
            self._engine.warn(
                "refused a WebSocket: all %s slots are taken. Set SWIFTCMS_WS_MAX_CONNECTIONS and,"
                " if need be, the limit of open files (ulimit -n, LimitNOFILE in systemd) higher",
                limit,
            )
            raise HandshakeRefused(
                503, "too_many_connections", "too many connections", **RETRY_SOON
            )
        # Checked with the slot taken: closing waits until all slots are released.
        if self._engine.is_closing:
            self._engine.registry.release()
            raise HandshakeRefused(
                503, "going_away", "the server is shutting down", **{"Retry-After": "2"}
            )


def needs_relay(sock: Any) -> bool:
    """Return whether a socket cannot be taken over: TLS, or Windows."""
    return Endpoint.FORCE_RELAY or fcntl is None or isinstance(sock, ssl.SSLSocket)


@functools.lru_cache(maxsize=64)
def client_js(path: str) -> tuple[str, str]:
    """Return client.js with the path of its WebSocket, and a hash of it."""
    body = CLIENT_JS.replace('WEBSOCKET_PATH = "/ws"', f"WEBSOCKET_PATH = {json.dumps(path)}")
    return body, hashlib.sha256(body.encode()).hexdigest()[:16]


def _is_handshake_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except ValueError:
        return False


def _bearer_token() -> str | None:
    """Return the token of the request's Authorization header; None without such a header."""
    authorization = request.authorization
    if authorization is None or authorization.type != "bearer":
        return None
    return authorization.token or ""


def _user_of_hook(value: Any) -> User | None:
    """Return the user that the identify hook named: an id, (id, session id), or None."""
    if value is None:
        return None
    user_id, session = value, None
    if isinstance(value, tuple) and len(value) == 2:
        user_id, session = value
    source = "the value that the identify hook returns"
    if session is not None:
        session = check_user_id(session, source)
    return User(check_user_id(user_id, source), session=session)


# -- origins ---------------------------------------------------------------------------------------

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def normalise_origin(text: str) -> str | None:
    """Return an origin as browsers write it, or None if it is not one.

    That is: lower case, without the scheme's default port, international names in ASCII.
    """
    scheme, separator, rest = text.lower().partition("://")
    rest = rest.removesuffix("/")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        return None
    # urlsplit() would accept a user, a path and more.
    if not rest or re.search(r"[\s/\\@?#]", rest):
        return None
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname or "", parts.port
        if ":" in host:
            host = f"[{host}]"
        elif not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:
        return None
    if not host:
        return None
    if port is None or port == DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{port}"


def is_origin_entry(text: str) -> bool:
    """Return whether an entry of SWIFTCMS_WS_ORIGINS can match an origin that a browser sends."""
    scheme, _, host = (normalise_origin(text) or "").partition("://")
    # A page is not served over the scheme of a WebSocket. `*.` may stand for all subdomains.
    return scheme not in ("", "ws", "wss") and "*" not in host.removeprefix("*.")


def is_origin_allowed(origin: str, host: str, allowed: Sequence[str] | str | None) -> bool:
    """Return whether a page of this origin may connect.

    host:    the Host header of the request
    allowed: the setting SWIFTCMS_WS_ORIGINS
    """
    if allowed == "*":
        return True
    page = normalise_origin(origin)
    if page is None or origin.endswith("/"):
        return False
    scheme = page.partition("://")[0]
    # A proxy may have removed the TLS, so the default port is that of the page's own scheme.
    if page == normalise_origin(f"{scheme}://{host}"):
        return True
    return any(_entry_allows(entry, page) for entry in allowed or ())


def _entry_allows(entry: str, page: str) -> bool:
    """Return whether an entry of SWIFTCMS_WS_ORIGINS is the page's origin, or a pattern of it."""
    named = normalise_origin(entry)
    if named is None:
        return False
    scheme, _, pattern = named.partition("://")
    if not pattern.startswith("*."):
        return page == named
    return page.startswith(f"{scheme}://") and page.endswith(pattern[1:])


# -- hook contexts ---------------------------------------------------------------------------------

# They belong to the server and to the handshake's request, which are gone when a hook runs.
SERVER_KEYS = {
    "wsgi.input",
    "wsgi.errors",
    "wsgi.file_wrapper",
    "werkzeug.socket",
    "werkzeug.request",
    "gunicorn.socket",
    "waitress.client_disconnected",
    HANDSHAKE_KEY,
}


def hook_environ(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return the handshake's environ without SERVER_KEYS. Additions of middleware are kept."""
    return {key: value for key, value in environ.items() if key not in SERVER_KEYS}


@contextmanager
def hook_context(app: Flask | None, environ: Mapping[str, Any] | None) -> Iterator[None]:
    """A request context for one call of hooks, with a `g` of its own.

    Afterwards everything that hooks have opened, such as a database session, is closed. If there
    is no environ, because there was no hook when the client connected, it is an application
    context only.
    """
    assert app is not None
    with app.app_context():
        if environ is None:
            yield
            return
        streams = {"wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr}
        with app.request_context({**environ, **streams}):
            yield


def has_connection_receivers() -> bool:
    return bool(client_connected.receivers or client_disconnected.receivers)


# -- taking over the socket ------------------------------------------------------------------------


def find_socket(environ: Mapping[str, Any]) -> Any:
    """Return the client's socket, or None if the web server gives no access to it."""
    sock = environ.get("werkzeug.socket") or environ.get("gunicorn.socket")
    if sock is None:
        # waitress passes a method of its channel.
        channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
        sock = getattr(channel, "socket", None)
    if type(sock).__module__.startswith("eventlet"):
        return None
    return sock


def read_server_buffers(environ: Mapping[str, Any]) -> bytes:
    """Return the bytes after the handshake that the web server has read into its buffers.

    A client may have sent its first message together with the handshake. Reading does not block,
    because the server's socket is dead now, or non-blocking for the relay. Some of these attributes
    are private. If one is missing, b"" is returned.
    """
    # Each server raises its own exceptions, for example if the handshake claims to have a body.
    with suppress(Exception):
        if "gunicorn.socket" in environ:
            return bytes(environ["wsgi.input"].reader.unreader.read())
        if "waitress.client_disconnected" in environ:
            return bytes(environ["waitress.client_disconnected"].__self__.request.header_plus)
        return bytes(environ["wsgi.input"].read1())
    return b""


class Descriptors:
    """Decides which file descriptors our sockets get. For the web server's threads.

    Many sites and servers use select(), which fails for descriptors of 1024 and more. Some servers
    stop if accept() gets no descriptor. So sockets that were taken over get descriptors of `floor`
    and more, and the last RESERVED descriptors stay free.
    """

    RESERVED = 50
    MOST_CONNECTIONS = 10_000

    def __init__(self) -> None:
        self.limit = self._raise_limit()
        self.floor = 1024
        if self.limit < 4096:
            # Too few descriptors to leave 1024 to the site.
            self.floor = min(200, self.limit // 2)
        self.max_connections = max(
            1, min(self.MOST_CONNECTIONS, self.limit - self.floor - self.RESERVED)
        )
        self._dead = self._create_dead_socket()

    @staticmethod
    def _create_dead_socket() -> socket.socket:
        """Return a socket that behaves as if the client had left, which every server expects.

        Reading returns the end of the stream, and writing fails. SOCK_SEQPACKET raises no SIGPIPE,
        which would stop the process if the site has restored that signal's default. macOS and
        Windows do not have it.
        """
        try:
            dead, peer = socket.socketpair(type=socket.SOCK_SEQPACKET)
        except (OSError, ValueError):
            dead, peer = socket.socketpair()
        peer.close()
        with suppress(OSError):
            dead.shutdown(socket.SHUT_RDWR)
        return dead

    def _raise_limit(self) -> int:
        """Raise the soft limit of open files to the hard one, at most 65,536; return it."""
        if resource is None:
            return 8192
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        # macOS reports a higher hard limit than it accepts.
        while wanted > soft:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return wanted
            except (ValueError, OSError):
                wanted //= 2
        return int(soft)

    def take_over(self, sock: Any) -> socket.socket:
        """Return our own socket for the server's connection, and give the server a dead one.

        Raises OSError if there are too many open files. The server then keeps its socket.
        """
        descriptor = sock.fileno()
        own = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, self.floor)
        if self._is_reserved(own):
            os.close(own)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        os.dup2(self._dead.fileno(), descriptor, inheritable=False)
        return socket.socket(sock.family, sock.type, sock.proto, fileno=own)

    def create_pair(self) -> tuple[socket.socket, socket.socket]:
        """Return two connected sockets for a relay, or raise OSError."""
        relay, own = socket.socketpair()
        if self._is_reserved(max(relay.fileno(), own.fileno())):
            relay.close()
            own.close()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        # Otherwise a burst of events might fill it before the relay's thread runs.
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024 * 1024)
        return relay, own

    def _is_reserved(self, number: int) -> bool:
        # On Windows the numbers of sockets have no limit.
        return resource is not None and number >= self.limit - self.RESERVED


@functools.cache
def descriptors() -> Descriptors:
    """Return the descriptors of this process. They are the same in a forked child."""
    return Descriptors()


# Unlike epoll, poll() needs no descriptor of its own. Windows has neither.
RelaySelector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class RelayResponse(Response):
    """Copies bytes between the server's socket and a socket pair, whose other end the loop owns.

    It is used with TLS inside the process and on Windows, because such a socket cannot be taken
    over. It runs when the server iterates over the response, after the request, and occupies a
    thread of the server until the WebSocket closes.
    """

    # The size of one read. Large, because each system call waits up to 5 ms for the GIL if another
    # thread is busy.
    CHUNK = 256 * 1024

    def __init__(self, server: Any, ours: socket.socket) -> None:
        super().__init__(status=101)
        self._server = server
        self._ours = ours

    def get_app_iter(self, environ: Any) -> Iterable[bytes]:
        # Werkzeug's own would drop the body of a 101.
        return self._copy()

    def _copy(self) -> Iterator[bytes]:
        """Copy in both directions until one side closes. It yields no body."""
        ends = (self._server, self._ours)
        waiting = {self._server: b"", self._ours: b""}
        try:
            for end in ends:
                end.setblocking(False)
            while self._copy_once(ends, waiting) and self._copy_once(ends[::-1], waiting):
                self._wait(waiting)
            self._send_last(waiting[self._server])
            waiting[self._server] = b""
        except OSError:
            # One side is gone.
            pass
        finally:
            self._ours.close()
            # The server now writes its headers, which must not reach the client.
            with suppress(OSError):
                socket.socket.shutdown(self._server, socket.SHUT_RDWR)
        if waiting[self._server]:
            # TLS could not finish a write, and would refuse a different one with an error.
            raise BrokenPipeError(errno.EPIPE, "the client closed the connection")
        yield from ()

    def _copy_once(self, ends: tuple[Any, ...], waiting: dict[Any, bytes]) -> bool:
        """Copy in one direction without waiting; return False at the end of the stream."""
        source, target = ends
        data: bytes | None = b""
        while data is not None:
            if not waiting[target]:
                data = self._receive(source)
                if data == b"":
                    return False
                waiting[target] = data or b""
            sent = self._send(target, waiting[target])
            waiting[target] = waiting[target][sent:]
            if waiting[target]:
                return True
        return True

    def _send_last(self, data: bytes) -> None:
        """Send the last bytes, a close frame, within two seconds."""
        self._server.settimeout(2.0)
        if data:
            self._server.sendall(data)

    def _receive(self, source: Any) -> bytes | None:
        """Return the next bytes. They are empty at the end of the stream, and None if it waits."""
        try:
            return cast(bytes, source.recv(self.CHUNK))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    @staticmethod
    def _send(target: Any, data: bytes) -> int:
        if not data:
            return 0
        try:
            return cast(int, target.send(data))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def _wait(self, waiting: Mapping[Any, bytes]) -> None:
        """Wait until one of the sockets can be read, or written if data waits for it."""
        with RelaySelector() as selector:
            for end, other in ((self._server, self._ours), (self._ours, self._server)):
                events = selectors.EVENT_WRITE if waiting[end] else 0
                if not waiting[other]:
                    events |= selectors.EVENT_READ
                if events:
                    selector.register(end, events)
            # TLS may have to read before it can write, or the other way round.
            selector.select(1.0)


# == 9. Tokens: JWTs, signed and checked by PyJWT ================================================


@dataclasses.dataclass(frozen=True)
class User:
    """The user of a connection: an id, and the claims of the token if there was one."""

    id: str
    claims: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: The session id that the identify hook returned. hub.disconnect() can name it.
    session: str | None = None

    @property
    def expires_at(self) -> float | None:
        """When the token expires, in seconds since 1970; None without a token."""
        return self.claims.get("exp")


# Longer tokens are refused without decoding, so that strangers cannot cause much work.
MAX_TOKEN = 8 * 1024
# The issuer's clock may be this many seconds ahead of ours.
TOKEN_LEEWAY = 60
# The year 10000 in seconds. A larger `exp` is probably in milliseconds.
MAX_EXPIRY = 253_402_300_800

# Exception, error code and message. The first exception type that matches is used.
TOKEN_ERRORS: list[tuple[type[Exception], str, str]] = [
    (jwt.ExpiredSignatureError, "token_expired", "the token has expired; get a fresh one"),
    (
        jwt.MissingRequiredClaimError,
        "invalid_token",
        "the token lacks a claim; it must have sub and exp",
    ),
    (jwt.InvalidAlgorithmError, "invalid_token", "the token must be signed with {algorithms}"),
    (
        jwt.InvalidSignatureError,
        "invalid_token",
        "the token's signature is wrong: it was not signed with this site's key",
    ),
    (jwt.InvalidAudienceError, "invalid_token", "the token's aud must name this site"),
    (
        jwt.InvalidIssuerError,
        "invalid_token",
        "the token's iss must be the issuer that this site trusts",
    ),
    (
        jwt.ImmatureSignatureError,
        "invalid_token",
        "the token is not valid yet; compare the clocks of this server and of the issuer",
    ),
    (OverflowError, "invalid_token", "the token's exp must be in seconds since 1970"),
    (Exception, "invalid_token", "the token is not a valid JWT"),
]


def sign_token(
    settings: Settings, user_id: str, expires_in: float, claims: Mapping[str, Any]
) -> str:
    """Return a JWT that check_token() accepts with the same settings, for `expires_in` seconds."""
    now = time.time()
    own: dict[str, Any] = {"sub": user_id, "iat": int(now), "exp": int(now + expires_in)}
    if settings.jwt_audience:
        own["aud"] = settings.jwt_audience
    if settings.jwt_issuer:
        own["iss"] = settings.jwt_issuer
    key = settings.jwt_key or ""
    return jwt.encode({**claims, **own}, key, algorithm=settings.jwt_algorithms[0])


def check_token(settings: Settings, token: str) -> User:
    """Return the user of a token (RFC 7519 section 7.2; `exp` and `sub` are required).

    Raises ClientError with a sentence about the mistake. It never contains the token.
    """
    if settings.jwt_key is None:
        raise ClientError(
            "auth_not_configured",
            "this site has no key to check tokens with: it must set SECRET_KEY or"
            " SWIFTCMS_WS_JWT_KEY",
        )
    try:
        if len(token) > MAX_TOKEN:
            raise ValueError
        claims = _decode(settings, token)
        # A string, which PyJWT accepts for a number, raises TypeError here.
        if not 0 < claims["exp"] < MAX_EXPIRY:
            raise OverflowError
        # The leeway is for clocks that are ahead; the expiry is exact.
        if claims["exp"] <= time.time():
            raise jwt.ExpiredSignatureError
        return User(check_user_id(claims["sub"], "sub"), claims)
    except Warning:
        # If the site turns warnings into errors, it wants to see PyJWT's about a short key.
        raise
    except Exception as error:
        # PyJWT raises many kinds of exceptions for malformed tokens.
        code, message = next(
            (code, message) for kind, code, message in TOKEN_ERRORS if isinstance(error, kind)
        )
    algorithms = " or ".join(settings.jwt_algorithms)
    raise ClientError(code, message.format(algorithms=algorithms))


def _decode(settings: Settings, token: str) -> dict[str, Any]:
    """Verify a token with the key or, while a site changes its key, with an older one."""
    keys = (settings.jwt_key, *settings.old_keys)
    for key in keys:
        try:
            return jwt.decode(
                token,
                cast(str, key),
                algorithms=list(settings.jwt_algorithms),
                audience=settings.jwt_audience,
                issuer=settings.jwt_issuer,
                leeway=TOKEN_LEEWAY,
                # PyJWT refuses an integer `sub`, which many sites have. check_token() checks it.
                options={"require": ["exp", "sub"], "verify_sub": False},
            )
        except jwt.InvalidSignatureError:
            if key is keys[-1]:
                raise
    raise AssertionError("there is always a key")


def hide_token(record: logging.LogRecord) -> bool:
    """Filter of the servers' access logs, because a token in a log could be used to sign in."""
    try:
        text = record.getMessage()
    except Exception:
        # The site's mistake is for its own log handler to report.
        return True
    if "token=" in text:
        record.msg, record.args = re.sub(r"token=[^&\s\"']*", "token=…", text), ()
    return True


# == 10. Session and workers: a client's messages, and code of the site ==========================


class TokenBucket:
    """The rate limit of one client: a token bucket, which has nothing to do with JWTs. Loop only.

    It holds up to twice RATE tokens and gains RATE a second. A message takes one or more, even if
    the bucket is empty; then the client has to wait.
    """

    BURST = 2

    __slots__ = ("_rate", "_tokens", "_updated_at")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate * self.BURST
        self._updated_at = time.monotonic()

    def take(self, count: float) -> bool:
        """Take tokens. Return whether the client is in debt now."""
        self._fill()
        self._tokens -= count
        return self._tokens < 0

    def seconds_to_wait(self) -> float:
        """Return after how many seconds there is one token again."""
        self._fill()
        # The sum of many small numbers may be a rounding error below 1.
        return max(0.0, (0.999 - self._tokens) / self._rate)

    def _fill(self) -> None:
        now = time.monotonic()
        filled = self._tokens + (now - self._updated_at) * self._rate
        self._tokens = min(self._rate * self.BURST, filled)
        self._updated_at = now


class Received(NamedTuple):
    """A complete message, a control frame, or (CONTINUATION) a part of a message."""

    opcode: Opcode
    payload: Any
    # In tokens of the bucket.
    cost: int


class MessageReader:
    """Turns the bytes of one client into messages and control frames. Loop only.

    wsproto parses the frames. Those that are not asked for yet stay in its buffer.
    """

    # A message counts as one more for each 8 KiB.
    BYTES_PER_TOKEN = 8 * 1024
    # A smaller fragment counts as a message. Otherwise one message could cost 65,536 frames.
    SMALL_FRAGMENT = 256

    __slots__ = ("_parser", "_parts", "_size", "is_too_big", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # The message has more bytes than `limit`. Its parts are dropped.
        self.is_too_big = False
        # None after a close frame, or after bytes that are not a frame: the rest is not read.
        self._parser: FrameProtocol | None = FrameProtocol(client=False, extensions=[])
        # Of a message that is not complete yet.
        self._parts: list[Any] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        if self._parser is not None:
            self._parser.receive_bytes(data)

    def read(self) -> Iterator[Received]:
        """Yield messages and frames, one at a time. Raises ParseFailed if the bytes are wrong."""
        if self._parser is None:
            return
        try:
            for frame in self._parser.received_frames():
                if frame.opcode is Opcode.CLOSE:
                    self._parser = None
                if frame.opcode.iscontrol():
                    yield Received(frame.opcode, frame.payload, 1)
                else:
                    yield self._add(frame)
        except ParseFailed:
            self._parser = None
            raise

    def _add(self, frame: Any) -> Received:
        """Add a frame, or a part of one, to the message; return the message if it is complete."""
        data = frame.payload
        self._size += len(data) if isinstance(data, bytes) else utf8_length(data)
        if self._size > self.limit:
            self.is_too_big = True
            self._parts.clear()
            return Received(Opcode.CONTINUATION, None, 0)
        self._parts.append(data)
        if not frame.message_finished:
            is_small = frame.frame_finished and len(data) < self.SMALL_FRAGMENT
            return Received(Opcode.CONTINUATION, None, int(is_small))
        message = data[:0].join(self._parts)
        cost = 1 + self._size // self.BYTES_PER_TOKEN
        self._parts.clear()
        self._size = 0
        return Received(frame.opcode, message, cost)


class Session:
    """Handles the messages of one client, one at a time and in order, and answers them. Loop only.

    If a client sends faster than RATE, the session reads more slowly. A message that needs a hook
    of the site, or the shared log, becomes a task for a worker, and reading stops until it is done.
    """

    # Log messages: why the server closed a connection, and the setting that decides it.
    CLOSE_REASONS: Mapping[int, str] = {
        CloseCode.MESSAGE_TOO_BIG: "its message was over SWIFTCMS_WS_MAX_MESSAGE",
        CloseCode.TRY_AGAIN_LATER: "it read too slowly (SWIFTCMS_WS_MAX_QUEUE)",
        CloseCode.UNAUTHORIZED: (
            "it did not sign in in time (SWIFTCMS_WS_AUTH), its token expired, or it was signed out"
        ),
        CloseCode.HEARTBEAT_TIMEOUT: "it sent nothing for two heartbeats (SWIFTCMS_WS_HEARTBEAT)",
    }

    # Messages of one client are handled for so many seconds before the others get their turn.
    TURN = 0.005
    # Frames of a client that it sent before it received our close frame. With more, it floods.
    MAX_FRAMES_WHILE_CLOSING = 2000

    __slots__ = (
        "_address",
        "_bucket",
        "_frames_while_closing",
        "_has_begun",
        "_has_ended",
        "_is_throttled",
        "_is_waiting_for_turn",
        "_reader",
        "action",
        "connection",
        "engine",
        "expiry",
        "ref",
        "tasks",
    )

    def __init__(
        self, engine: Engine, connection: Connection, environ: dict[str, Any] | None, address: str
    ) -> None:
        self.engine = engine
        self.connection = connection
        # Of the message that is being handled: its answer needs them.
        self.action: str | None = None
        self.ref: str | float | None = None
        self.tasks = ClientTasks(self, environ)
        self.expiry = Expiry(self)
        self._address = address
        self._reader = MessageReader(engine.settings.max_message)
        self._bucket = TokenBucket(engine.settings.rate)
        # The client sends too fast, and is not read until the bucket has a token again.
        self._is_throttled = False
        # The client's turn is over, and the rest of its messages wait for the next one.
        self._is_waiting_for_turn = False
        self._frames_while_closing = 0
        # The site hears of this client: client_connected was sent, if there are receivers.
        self._has_begun = False
        self._has_ended = False

    @classmethod
    def open(
        cls, engine: Engine, handshake: Handshake, environ: dict[str, Any] | None, address: str
    ) -> None:
        """Adopt the socket of a handshake: send the 101 and the greeting, then begin to read."""
        client_id = engine.process + secrets.token_hex(6)
        max_queue = engine.settings.max_queue
        assert handshake.own is not None
        connection = Connection(client_id, handshake.own, engine.loop, max_queue, handshake.user)
        connection.session = session = cls(engine, connection, environ, address)
        session.guarded(session._start, handshake)

    def _start(self, handshake: Handshake) -> None:
        engine, connection = self.engine, self.connection
        connection.update_selector()
        connection.send(handshake.response)
        if connection.state is State.CLOSED:
            return
        engine.registry.add(connection)
        engine.heartbeat.add(connection)
        # Read before the greeting: the site hears of every client that was greeted before closing.
        is_closing = engine.is_closing
        self._greet()
        if is_closing:
            connection.close(CloseCode.GOING_AWAY, "the server is going away; reconnect with since")
        elif handshake.user and engine.was_signed_out(handshake.user, handshake.began):
            close_signed_out(connection)
        if connection.state is not State.OPEN:
            return
        self.expiry.schedule()
        self._has_begun = True
        self._begin(handshake.read_ahead)

    def _begin(self, read_ahead: bytes) -> None:
        """Handle the first bytes, after the receivers of client_connected have returned."""

        def connected(_: object = None) -> None:
            self.receive(read_ahead)

        if client_connected.receivers:
            self.tasks.start(self.tasks.signal(client_connected), connected)
        else:
            connected()

    def _greet(self) -> None:
        user = self.connection.user
        payload = {
            "clientId": self.connection.id,
            "userId": user.id if user else None,
            "heartbeat": self.engine.settings.heartbeat,
            **place_fields(self.engine),
        }
        self.connection.send(message_frame("system.connected", payload))

    # -- from bytes to messages --------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether the client is not read now.

        A worker is busy for it, it sends too fast, or the other clients have their turn.
        """
        return self.tasks.is_busy or self._is_throttled or self._is_waiting_for_turn

    def receive(self, data: bytes) -> None:
        """Handle bytes from the client."""
        self._reader.feed(data)
        self.handle_received()

    def handle_received(self) -> None:
        """Handle received messages until the client has to wait; then update the selector."""
        connection = self.connection
        if connection.state is State.OPEN and not connection.can_read:
            return
        turn_ends_at = time.monotonic() + self.TURN
        try:
            for received in self._reader.read():
                if received.opcode is Opcode.CLOSE:
                    code, _ = received.payload
                    # 1005 stands for a close frame without a code (RFC 6455 section 7.1.5).
                    connection.answer_close(None if code == 1005 else code)
                elif connection.state is State.OPEN:
                    self._handle(received)
                else:
                    self._drop_while_closing()
                if connection.state is State.OPEN and not connection.can_read:
                    break
                if time.monotonic() > turn_ends_at:
                    self._is_waiting_for_turn = True
                    self.engine.loop.call_at(time.monotonic(), self._begin_turn)
                    break
        except ParseFailed as error:
            connection.fail(error.code, str(error))
        except Exception as error:
            self.fail(error)
        connection.update_selector()

    def _begin_turn(self) -> None:
        self._is_waiting_for_turn = False
        self.handle_received()

    def _drop_while_closing(self) -> None:
        self._frames_while_closing += 1
        if self._frames_while_closing > self.MAX_FRAMES_WHILE_CLOSING:
            self.connection.abort()

    def _handle(self, received: Received) -> None:
        self.consume(received.cost)
        if self._reader.is_too_big:
            self.action = self.ref = None
            limit = self._reader.limit
            message = f"the message is over the limit of {limit} bytes; send several smaller ones"
            self.report_error(ClientError("message_too_big", message, CloseCode.MESSAGE_TOO_BIG))
        elif received.opcode is Opcode.PING:
            self.connection.send(encode_frame(Opcode.PONG, bytes(received.payload)))
        elif received.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._handle_message(received.payload)

    def consume(self, count: float) -> None:
        """Take tokens out of the bucket. A client in debt is not read until it has one again."""
        if not self._bucket.take(count) or self._is_throttled:
            return
        self._is_throttled = True
        self.engine.counters.add("throttled")
        self.engine.warn(
            "client %s at %s sends more than SWIFTCMS_WS_RATE messages a second. The server reads"
            " its messages more slowly, and loses none",
            self.connection.id,
            self._address,
        )
        # Not at once: the next message must not be handled before the one that is being handled.
        seconds = self._bucket.seconds_to_wait()
        self.engine.loop.call_at(time.monotonic() + seconds, self._wait_for_token)

    def _wait_for_token(self) -> None:
        seconds = self._bucket.seconds_to_wait()
        if seconds > 0:
            self.engine.loop.call_at(time.monotonic() + seconds, self._wait_for_token)
            return
        self._is_throttled = False
        if self.connection.can_read:
            self.handle_received()

    # -- from messages to answers ------------------------------------------------------------------

    def _handle_message(self, data: str | bytes) -> None:
        self.action = self.ref = None
        self.guarded(self._do_action, data)

    def _do_action(self, data: str | bytes) -> None:
        message = parse_message(data)
        name = message.get("action")
        if isinstance(name, str):
            self.action = name[:NAME_LENGTH]
        self.ref = ref_of(message)
        name = string_field(message, "action")
        action = actions().get(name)
        if action is None:
            raise ClientError(
                "unknown_action",
                f"there is no action {json.dumps(name[:NAME_LENGTH])}"
                f"{did_you_mean(name, actions())}; there are {', '.join(actions())}",
            )
        if self.must_sign_in() and name != "authenticate":
            raise ClientError("auth_required", "sign in first: send authenticate with a token")
        action(self, message)

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function; answer a ClientError, and close the connection for any other error."""
        try:
            function(*args)
        except ClientError as error:
            self.report_error(error)
        except LogUnavailable as error:
            self.engine.report(logging.INFO, "closed client %s: %s", self.connection.id, error)
            reason = "the history cannot be read now; reconnect with since"
            self.connection.close(CloseCode.GOING_AWAY, reason)
        except Exception as error:
            self.fail(error)

    def must_sign_in(self) -> bool:
        return self.engine.settings.auth == "required" and self.connection.user is None

    def answer(
        self, message_type: str, payload: Mapping[str, Any], content_type: str | None = None
    ) -> None:
        """Answer the message that is being handled."""
        self.connection.send(message_frame(message_type, payload, content_type, self.ref))

    def report_error(self, error: ClientError) -> None:
        """Answer with system.error, and close the connection if the error says so."""
        self.count_error(error)
        payload = {"code": error.code, "message": str(error), "action": self.action}
        self.answer("system.error", payload)
        if error.closes_with is not None:
            self.connection.close(error.closes_with, str(error))

    def count_error(self, error: ClientError) -> None:
        self.engine.counters.add("errors")
        self.engine.counters.add(f"error_{error.code}")
        if error.code == "too_many_subscriptions":
            self.engine.warn(
                "refused a client more than the %s of SWIFTCMS_WS_MAX_SUBSCRIPTIONS",
                self.engine.settings.max_subscriptions,
            )

    def fail(self, error: BaseException) -> None:
        """Log an error of the server or of a hook, and close this connection with 1011."""
        self.engine.counters.add("errors")
        self.engine.report(
            logging.ERROR,
            "closed client %s with 1011 because serving it failed",
            self.connection.id,
            exc_info=error,
        )
        self.connection.close(CloseCode.INTERNAL_ERROR, "the server failed; its log has the reason")

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        """The connection is not OPEN any more: forget the client, and notify the site."""
        if self._has_ended:
            return
        self._has_ended = True
        engine, connection = self.engine, self.connection
        engine.registry.remove(connection)
        engine.heartbeat.discard(connection)
        engine.editing.leave(connection.id)
        self._count_close()
        if self._has_begun and client_disconnected.receivers:
            # If a hook of this client is running, the signal is sent after it.
            self.tasks.finish(self.tasks.signal(client_disconnected))

    def _count_close(self) -> None:
        """Count and log it if the server has closed the connection."""
        engine, code = self.engine, self.connection.close_code
        if code is None:
            return
        engine.counters.add(f"closed_{code:d}")
        if code == CloseCode.TRY_AGAIN_LATER:
            engine.counters.add("slow_clients")
        if code in self.CLOSE_REASONS:
            message = f"closed a client at %s with {code:d}: {self.CLOSE_REASONS[code]}"
            engine.warn(message, self._address)


class ClientTasks:
    """Lets workers run the tasks of one client, one at a time. Loop only; tasks run in a worker.

    While a task runs, the server does not read from the client. So the client's messages are
    handled in order, and a slow hook delays no other client.
    """

    __slots__ = ("_environ", "_last_task", "_session", "is_busy")

    def __init__(self, session: Session, environ: dict[str, Any] | None) -> None:
        self._session = session
        # Of the handshake; None if there were no hooks.
        self._environ = environ
        self.is_busy = False
        # To be run after the one that is running.
        self._last_task: Callable[[], object] | None = None

    def ask(self, patterns: Sequence[Pattern], then: Callable[..., None], *args: Any) -> None:
        """Ask the authorize hook for all patterns, then call `then(*args, answers)`."""
        engine, user = self._session.engine, self._session.connection.user
        hook = engine.hub.authorize_hook
        if hook is None or not patterns:
            then(*args, [True] * len(patterns))
            return

        connection = self._session.connection

        def task() -> list[bool] | None:
            # Many clients may be gone before the hook is asked for them, if it is slow.
            if connection.has_left():
                return None
            with hook_context(engine.app, self._environ):
                return [self._is_allowed(hook(user, *pattern), pattern) for pattern in patterns]

        def answered(answers: list[bool] | None) -> None:
            if answers is None:
                connection.abort()
            else:
                then(*args, answers)

        self.start(task, answered)

    def _is_allowed(self, answer: object, pattern: Pattern) -> bool:
        """Return whether the hook allowed it. Anything but True refuses."""
        if answer is not True and answer is not False:
            if inspect.iscoroutine(answer):
                answer.close()
            self._session.engine.warn(
                "the authorize hook returned %s for %s, which refuses it: it must return True"
                " or False, and be a plain function without a login decorator",
                type(answer).__name__,
                " ".join(pattern),
            )
        return answer is True

    def read_log(self, since: EventId, then: Callable[..., None]) -> None:
        """Read the events after `since` from the shared log, then call `then(events)`."""
        log_ = self._session.engine.log
        assert log_ is not None
        self.start(functools.partial(log_.read_after, since), then)

    def signal(self, named: NamedSignal) -> Callable[[], object]:
        """Return a task that sends a signal to the site's receivers."""
        engine, connection = self._session.engine, self._session.connection

        def task() -> None:
            with hook_context(engine.app, self._environ):
                user = connection.user
                named.send(engine.app, hub=engine.hub, client_id=connection.id, user=user)

        return task

    def start(self, task: Callable[[], object], then: Callable[..., None], *args: Any) -> None:
        """Let a worker run a task, then call `then(*args, result)` on the loop.

        If the task raises, the connection is closed.
        """
        self._set_busy()
        loop = self._session.engine.loop

        def run() -> None:
            try:
                result = task()
            except BaseException as error:
                # Also SystemExit of a hook, which must not stop the worker.
                loop.call(self._done, _raise, error)
            else:
                loop.call(self._done, then, *args, result)

        self._session.engine.workers.submit(run)

    def pause(self, seconds: float, then: Callable[..., None]) -> None:
        """Call `then()` after some time; until then the client is not read."""
        self._set_busy()
        self._session.engine.loop.call_at(time.monotonic() + seconds, self._done, then)

    def finish(self, task: Callable[[], object]) -> None:
        """Run a last task, after the one that is running."""
        if self.is_busy:
            self._last_task = task
        else:
            self._session.engine.workers.submit(task)

    def _set_busy(self) -> None:
        self.is_busy = True
        self._session.connection.update_selector()

    def _done(self, then: Callable[..., None], *args: Any) -> None:
        self.is_busy = False
        session = self._session
        if self._last_task is not None:
            session.engine.workers.submit(self._last_task)
        elif session.connection.state is State.OPEN:
            session.guarded(then, *args)
            if session.connection.can_read:
                session.handle_received()
            else:
                session.connection.update_selector()


def _raise(error: BaseException) -> None:
    """Raise a task's error on the loop. It is not an Exception if a hook called sys.exit()."""
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"a hook raised {type(error).__name__}") from error


class Expiry:
    """Closes a connection if the client is silent, stuck or not signed in, or if its token expires.

    Loop only.
    """

    # If AUTH is "required", a client has this many seconds to sign in.
    AUTH_TIMEOUT = 10.0
    # Times of checks are rounded up to multiples of this, in seconds.
    CHECK_INTERVAL = 0.5

    __slots__ = ("_check_at", "_opened_at", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._opened_at = time.monotonic()
        # When the next check is due.
        self._check_at = float("inf")

    def schedule(self) -> None:
        """Plan the next check for the first time at which something may have expired."""
        session, now = self._session, time.monotonic()
        times = [session.connection.idle_since(now) + self._max_silence()]
        if session.must_sign_in():
            times.append(self._opened_at + self.AUTH_TIMEOUT)
        user = session.connection.user
        if user is not None and user.expires_at is not None:
            times.append(now + user.expires_at - time.time())
        # Rounded up, so that one wake-up of the loop serves many clients.
        rounds = max(min(times), now) // self.CHECK_INTERVAL + 1
        when = rounds * self.CHECK_INTERVAL
        if when < self._check_at:
            self._check_at = when
            # The client's id, because a timer must not keep a closed connection in memory.
            client_id = session.connection.id
            session.engine.loop.call_at(when, Expiry.check, session.engine, client_id)

    def _max_silence(self) -> float:
        return self._session.engine.settings.heartbeat * MISSED_HEARTBEATS

    @staticmethod
    def check(engine: Engine, client_id: str) -> None:
        connection = engine.registry.find(client_id)
        now = time.monotonic()
        if connection is None or now < connection.session.expiry._check_at:
            return
        expiry = connection.session.expiry
        if now - expiry._check_at > engine.settings.heartbeat:
            # The process was suspended, and the client had no heartbeat to answer.
            connection.waiting_since = max(connection.waiting_since, now)
        expiry._check_at = float("inf")
        expiry._close_expired(now)
        if connection.state is State.OPEN:
            expiry.schedule()

    def _close_expired(self, now: float) -> None:
        session, limit = self._session, self._max_silence()
        connection = session.connection
        if now - connection.waiting_since >= limit:
            reason = f"nothing received for {limit:g} seconds; reconnect with since"
            connection.close(CloseCode.HEARTBEAT_TIMEOUT, reason)
        elif connection.is_stuck(now, limit):
            connection.close(CloseCode.TRY_AGAIN_LATER, "read too slowly; reconnect with since")
        elif session.must_sign_in():
            timeout = self.AUTH_TIMEOUT
            if now - self._opened_at >= timeout:
                message = f"no token within {timeout:g} seconds; reconnect and authenticate"
                self._report(ClientError("auth_required", message, CloseCode.UNAUTHORIZED))
        elif self._has_token_expired():
            message = "the token has expired; reconnect with a fresh one"
            self._report(ClientError("token_expired", message, CloseCode.UNAUTHORIZED))

    def _has_token_expired(self) -> bool:
        user = self._session.connection.user
        return user is not None and user.expires_at is not None and user.expires_at <= time.time()

    def _report(self, error: ClientError) -> None:
        # It is not the answer to a message.
        self._session.action = self._session.ref = None
        self._session.report_error(error)


def place_fields(engine: Engine) -> dict[str, Any]:
    """Return the fields from which a client can resume, in system.connected and heartbeats.

    `spread` is part of the protocol. It is always 0 in this version.
    """
    return {"lastId": format_event_id(engine.history.newest_id), "spread": 0}


def ref_of(message: Mapping[str, Any]) -> str | float | None:
    """Return the `ref` of a client's message, or None; raise ClientError for a wrong kind."""
    ref = message.get("ref", "")
    if isinstance(ref, bool) or not isinstance(ref, (str, int, float)):
        raise ClientError(
            "invalid_message", f"`ref` must be a string or a number, not {describe(ref)}"
        )
    return message.get("ref")


def string_field(message: Mapping[str, Any], name: str) -> str:
    """Return a required string of a client's message, or raise ClientError."""
    if name not in message:
        hint = did_you_mean(name, message)
        raise ClientError(
            "invalid_message", f"the field `{name}` is missing{hint}; it must be a string"
        )
    value = message[name]
    if not isinstance(value, str):
        raise ClientError("invalid_message", f"`{name}` must be a string, not {describe(value)}")
    return value


# -- actions: one function for each ----------------------------------------------------------------

Action = Callable[[Session, Mapping[str, Any]], None]
# The most items of a `subscriptions` list.
MAX_LIST = 1000
# An authenticate message costs ten tokens, because checking a JWT takes longer.
AUTHENTICATE_COST = 10
# This many items of a `subscriptions` list cost one more token.
ITEMS_PER_TOKEN = 10


@functools.cache
def actions() -> dict[str, Action]:
    """Return the function of each action of PROTOCOL.md."""
    return {
        "subscribe": subscribe,
        "unsubscribe": unsubscribe,
        "authenticate": authenticate,
        "pong": pong,
        "heartbeat": heartbeat,
        "editStart": edit_start,
        "editStop": edit_stop,
        "editChange": edit_change,
        "presence": presence,
    }


class Subscribing:
    """One `subscribe` message: parses it, asks the authorize hook, and answers. Loop only."""

    # How long to wait if `since` is newer than the newest event of this process, in seconds.
    SINCE_TIMEOUT = 1.0
    # The tokens that a replay of the whole history costs. All clients wait while it is prepared.
    REPLAY_COST = 20

    def __init__(self, session: Session, message: Mapping[str, Any]) -> None:
        self.session = session
        self.is_list = "subscriptions" in message
        self.since = parse_event_id(message["since"]) if "since" in message else None
        # Each once, in the order of the message.
        self.patterns: list[Pattern] = []
        self.refused: list[dict[str, Any]] = []
        self._deadline = time.monotonic() + self.SINCE_TIMEOUT
        items = subscription_list(message) if self.is_list else [message]
        for item in items:
            self._add_pattern(item)
        session.consume(len(items) // ITEMS_PER_TOKEN)

    def _add_pattern(self, item: Mapping[str, Any]) -> None:
        try:
            pattern = parse_pattern(item)
        except ClientError as error:
            self._refuse(item.get("type", "*"), item.get("contentType", "*"), error)
        else:
            if pattern not in self.patterns:
                self.patterns.append(pattern)

    def _refuse(self, event_type: object, content_type: object, error: ClientError) -> None:
        """Name a refused item in the answer, or raise the error of a single subscription."""
        if not self.is_list:
            raise error
        self.session.count_error(error)
        self.refused.append(
            {
                "type": event_type if isinstance(event_type, str) else None,
                "contentType": content_type if isinstance(content_type, str) else None,
                "code": error.code,
                "message": str(error),
            }
        )

    def allowed(self, answers: list[bool]) -> None:
        """The hook has answered: keep the allowed patterns, up to the limit, and go on."""
        connection = self.session.connection
        limit = self.session.engine.settings.max_subscriptions
        count = len(connection.subscriptions)
        accepted = []
        for pattern, is_allowed in zip(self.patterns, answers, strict=True):
            is_new = pattern not in connection.subscriptions
            if not is_allowed:
                self._refuse(*pattern, forbidden(pattern))
            elif is_new and count >= limit:
                message = (
                    f"limit of {limit} subscriptions reached; use a prefix such as content.*,"
                    " or unsubscribe"
                )
                self._refuse(*pattern, ClientError("too_many_subscriptions", message))
            else:
                count += is_new
                accepted.append(pattern)
        self.patterns = accepted
        self.find_missed()

    def find_missed(self) -> None:
        """Find the events after `since`: here, in a moment, or in the shared log."""
        history, engine = self.session.engine.history, self.session.engine
        if self.since is None or not self.patterns:
            self.finish([])
            return
        events = history.after(self.since)
        if events is not None or engine.log is None:
            self.finish(events)
        elif self.since <= history.newest_id:
            self.session.tasks.read_log(self.since, self.read)
        elif time.monotonic() < self._deadline:
            # Another process may have published it, and the follower will read it soon.
            self.session.tasks.pause(0.02, self.find_missed)
        else:
            self.finish(None)

    def read(self, older: list[Event] | None) -> None:
        """Events were read from the shared log; newer ones have been delivered meanwhile."""
        history = self.session.engine.history
        if older is None:
            self.finish(None)
        elif not older:
            self.finish(history.after(cast(EventId, self.since)))
        else:
            self.finish(history.continue_after(older))

    def finish(self, events: list[Event] | None) -> None:
        """Subscribe, answer and replay, all between two events."""
        session = self.session
        engine, connection = session.engine, session.connection
        missed = engine.registry.missed(connection, self.patterns, events or [])
        start = engine.history.newest_id
        if self.since is not None and events is not None:
            start = self.since
        for pattern in self.patterns:
            engine.registry.subscribe(connection, pattern, start)
        recovery = {"recovered": events is not None, "replayed": len(missed)}
        session.answer("system.subscribed", {**self._describe(), **recovery})
        connection.send_replay([event.frame for event in missed])
        engine.counters.add("replayed", len(missed))
        # Looking at events costs as much as sending them.
        session.consume(self.REPLAY_COST * len(events or []) / max(1, engine.settings.history))

    def _describe(self) -> dict[str, Any]:
        if not self.is_list:
            event_type, content_type = self.patterns[0]
            return {"type": event_type, "contentType": content_type}
        return {"subscriptions": describe_patterns(self.patterns), "refused": self.refused}


def subscribe(session: Session, message: Mapping[str, Any]) -> None:
    subscribing = Subscribing(session, message)
    session.tasks.ask(subscribing.patterns, subscribing.allowed)


def unsubscribe(session: Session, message: Mapping[str, Any]) -> None:
    registry, connection = session.engine.registry, session.connection
    if "subscriptions" in message:
        items = subscription_list(message)
        # One malformed item raises, before any subscription is removed.
        patterns = list(dict.fromkeys(map(parse_pattern, items)))
        removed = registry.unsubscribe(connection, patterns)
        payload: dict[str, Any] = {"subscriptions": describe_patterns(patterns), "removed": removed}
        session.consume(len(items) // ITEMS_PER_TOKEN)
    else:
        pattern = parse_pattern(message)
        is_one = "type" in message or "contentType" in message
        removed = registry.unsubscribe(connection, [pattern] if is_one else None)
        payload = {"type": pattern[0], "contentType": pattern[1], "removed": removed}
    session.answer("system.unsubscribed", payload)


def describe_patterns(patterns: Iterable[Pattern]) -> list[dict[str, str]]:
    return [{"type": event_type, "contentType": kind} for event_type, kind in patterns]


def subscription_list(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the items of a message's `subscriptions`, or raise ClientError."""
    items = message["subscriptions"]
    is_list = isinstance(items, list) and all(isinstance(item, dict) for item in items)
    if not is_list or not 1 <= len(items) <= MAX_LIST:
        found = f"a list of {len(items)}" if is_list else describe(items)
        raise ClientError(
            "invalid_message",
            f"`subscriptions` must be a list of 1 to {MAX_LIST} objects with `type` and"
            f" `contentType`, not {found}",
        )
    if "type" in message or "contentType" in message:
        raise ClientError(
            "invalid_message",
            "`type` and `contentType` belong into the items of `subscriptions`, not beside it",
        )
    return cast("list[dict[str, Any]]", items)


def forbidden(pattern: Pattern) -> ClientError:
    event_type, content_type = pattern
    return ClientError(
        "forbidden",
        f"you may not receive {event_type} of content type {content_type}; use a narrower pattern,"
        " or sign in as another user",
    )


def authenticate(session: Session, message: Mapping[str, Any]) -> None:
    token = string_field(message, "token")
    session.consume(AUTHENTICATE_COST - 1)
    engine, connection = session.engine, session.connection
    user = check_token(engine.settings, token)
    if connection.user is not None and connection.user.id != user.id:
        raise ClientError(
            "invalid_token", "the token is of another user; open a new connection for that user"
        )
    if connection.user is not None:
        # The session that the identify hook returned stays.
        user = dataclasses.replace(user, session=connection.user.session)
    # Between two events, so that it is known which events for this user have reached it.
    engine.registry.sign_in(connection, user, engine.history.newest_id)
    session.expiry.schedule()
    expires_at = timestamp(int(user.claims["exp"] * 1000))
    session.answer("system.authenticated", {"userId": user.id, "expiresAt": expires_at})


def pong(session: Session, message: Mapping[str, Any]) -> None:
    """The client's answer to a heartbeat. Anything that a client sends is a sign of life."""


def heartbeat(session: Session, message: Mapping[str, Any]) -> None:
    session.answer("system.heartbeat", place_fields(session.engine))


# -- workers ---------------------------------------------------------------------------------------


class Workers:
    """Four threads that run tasks that may block.

    Tasks call the authorize hook, receivers of signals and log handlers, and use the shared log.
    Any thread may submit one. The first task starts the threads.
    """

    COUNT = 4
    # If a log handler hangs, more records than these are dropped, the oldest first.
    MAX_RECORDS = 1000

    def __init__(self) -> None:
        # Guards the threads and the number of unfinished tasks.
        self._lock = threading.Lock()
        # Notified when no task is left.
        self._is_idle = threading.Condition(self._lock)
        # Tasks that are queued or running. Reading it is atomic.
        self.unfinished = 0
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        # The log records of the loop, in order.
        self.records = Lane(self, self.MAX_RECORDS)

    def submit(self, task: Callable[[], object]) -> None:
        with self._lock:
            self.unfinished += 1
            # If no thread can start now, the next task tries again. While the interpreter exits
            # none can start, and wait_until_idle() runs the tasks.
            with suppress(RuntimeError):
                for number in range(len(self._threads) + 1, self.COUNT + 1):
                    name = f"swiftcms-ws worker {number}"
                    thread = threading.Thread(target=self._run, name=name, daemon=True)
                    thread.start()
                    self._threads.append(thread)
        self._tasks.put(task)

    def _run(self) -> None:
        """Thread body: run tasks until None comes."""
        while (task := self._tasks.get()) is not None:
            self._run_task(task)

    def _run_task(self, task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            # Of a receiver, also its SystemExit. No caller can receive it.
            log(logging.ERROR, "a function of the site failed", exc_info=error)
        with self._is_idle:
            self.unfinished -= 1
            if not self.unfinished:
                self._is_idle.notify_all()

    def wait_until_idle(self, deadline: float) -> None:
        """Wait until no task is left, or until the deadline."""
        if not any(thread.is_alive() for thread in self._threads):
            self._run_left(deadline)
        with self._is_idle:
            self._is_idle.wait_for(
                lambda: not self.unfinished, max(0.0, deadline - time.monotonic())
            )

    def _run_left(self, deadline: float) -> None:
        """Run tasks in this thread, because no worker could start."""
        with suppress(Empty):
            while time.monotonic() < deadline:
                task = self._tasks.get_nowait()
                if task is not None:
                    self._run_task(task)

    def request_stop(self) -> list[threading.Thread]:
        """Let the threads exit after the tasks that are queued. Takes no lock."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        return threads

    def stop(self, deadline: float) -> None:
        """Let the threads exit after the tasks that are queued, and wait for them."""
        threads = self.request_stop()
        for thread in threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


class Lane:
    """Tasks that the workers run one at a time and in order. Any thread may put one.

    So a slow task holds one worker at most. If too many wait, the oldest are dropped.
    """

    def __init__(self, workers: Workers, limit: int) -> None:
        self._workers = workers
        # Guards the tasks, and whether a worker runs them.
        self._lock = threading.Lock()
        self._tasks: deque[Callable[[], object]] = deque(maxlen=limit)
        self._is_running = False

    def put(self, task: Callable[[], object]) -> None:
        with self._lock:
            self._tasks.append(task)
            if self._is_running:
                return
            self._is_running = True
        self._workers.submit(self._run)

    def _run(self) -> None:
        """Run by one worker: run the tasks until none is left."""
        while True:
            with self._lock:
                if not self._tasks:
                    self._is_running = False
                    return
                task = self._tasks.popleft()
            try:
                task()
            except BaseException as error:
                log(logging.ERROR, "a background task failed", exc_info=error)


# III  Further parts
# == 11. Heartbeat ===============================================================================


class Heartbeat:
    """A thread that asks the loop to send heartbeats. The loop owns the slices of connections.

    The interval is divided into slices, and each connection belongs to one of them. So the
    heartbeats of ten thousand clients, and their answers, are spread over the whole interval. The
    loop runs all methods except start(), stop() and the thread body.
    """

    # How often the thread checks whether gunicorn stops its worker, in seconds.
    MAX_PAUSE = 0.5
    MOST_SLICES = 100

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        interval = engine.settings.heartbeat
        count = max(1, min(self.MOST_SLICES, round(interval / 0.25)))
        self._pause = interval / count
        # Dictionaries without values are sets that keep their order. Loop only.
        self._slices: list[dict[Connection, None]] = [{} for _ in range(count)]
        self._slice_of: dict[Connection, int] = {}
        self._next_slice = 0
        self._stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        thread = threading.Thread(target=self._run, name="swiftcms-ws heartbeat", daemon=True)
        thread.start()
        self.thread = thread

    def stop(self) -> None:
        self._stopped.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(1.0)

    def _run(self) -> None:
        """Thread body: ask the loop to send each slice its heartbeat, in turn."""
        next_beat = time.monotonic() + self._pause
        for number in itertools.cycle(range(len(self._slices))):
            while (left := next_beat - time.monotonic()) > 0:
                if self._stopped.wait(min(left, self.MAX_PAUSE)) or self._engine.is_closing:
                    return
                if is_gunicorn_stopping():
                    close_engines([self._engine], timeout=2.0)
                    return
            self._engine.loop.call(self._beat, number)
            # After the process was suspended, missed beats are not made up for.
            next_beat = max(next_beat + self._pause, time.monotonic())

    # -- the loop's thread -------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        self._slices[self._next_slice][connection] = None
        self._slice_of[connection] = self._next_slice
        self._next_slice = (self._next_slice + 1) % len(self._slices)

    def discard(self, connection: Connection) -> None:
        number = self._slice_of.pop(connection, None)
        if number is not None:
            del self._slices[number][connection]

    def _beat(self, number: int) -> None:
        """Send system.heartbeat, which scripts can see, and a ping, which libraries answer."""
        engine = self._engine
        if number == 0:
            engine.exchange.beat()
            if engine.follower is not None:
                engine.follower.check()
        connections = list(self._slices[number])
        if connections:
            message = message_frame("system.heartbeat", place_fields(engine))
            Connection.send_to_all(connections, message + encode_frame(Opcode.PING, b""))


def is_gunicorn_stopping() -> bool:
    """Return whether this is a gunicorn worker that has to stop.

    If a view runs longer than --graceful-timeout, gunicorn kills the worker, and no exit handler
    runs. So this is checked regularly. The worker object is found through its signal handler.
    """
    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    is_gunicorn = type(worker).__module__.startswith("gunicorn.")
    return is_gunicorn and getattr(worker, "alive", True) is False


# == 12. Editing: editors of entries, and what they do ===========================================

# A content type and the id of one of its entries.
Entry = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Editor:
    """One connection that has an entry open for editing. One person in two tabs is two editors."""

    since: str
    client_id: str
    user_id: str | None
    # The process of the connection.
    process: str

    def as_json(self) -> dict[str, Any]:
        return {"clientId": self.client_id, "userId": self.user_id, "since": self.since}


class Editing:
    """The editors of all entries, in this and in other processes.

    The loop alone changes it, so that every message about a change is true when it is sent. Any
    thread may read it.
    """

    MAX_EDITORS = 50
    MAX_ENTRIES = 200
    MAX_PRESENCE = 256 * 1024
    # Editors of clients that are gone: so many are removed before other clients are served.
    STOPS_AT_ONCE = 50

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Guards both indexes against readers in other threads: hub.editors() and the workers.
        self._lock = threading.Lock()
        # The editors of each entry, by client id; and the entries of each client id.
        self._editors: dict[Entry, dict[str, Editor]] = {}
        self._entries: dict[str, dict[Entry, None]] = {}
        # Clients that are gone, and may have been editors. Loop only.
        self._leaving: deque[str] = deque()

    # -- any thread --------------------------------------------------------------------------------

    def editors(self, entry: Entry) -> list[Editor]:
        """Return an entry's editors, the first one first."""
        with self._lock:
            # Editors of one millisecond stay in their order.
            return sorted(self._editors.get(entry, {}).values(), key=lambda editor: editor.since)

    def find(self, entry: Entry, client_id: str) -> Editor | None:
        with self._lock:
            return self._editors.get(entry, {}).get(client_id)

    def entries_of(self, client_id: str) -> list[Entry]:
        """Return the entries that a client edits."""
        with self._lock:
            return list(self._entries.get(client_id, ()))

    def entries(self, content_pattern: str, entry_id: str | None, limit: int) -> list[Entry]:
        """Return the first of the entries that are edited and match."""
        with self._lock:
            if entry_id is not None and is_name(content_pattern):
                # The cost of asking for one entry does not depend on the others.
                entry = (content_pattern, entry_id)
                return [entry] if entry in self._editors else []
            found = [
                entry
                for entry in self._editors
                if entry_id in (None, entry[1]) and matches(content_pattern, entry[0])
            ]
        return heapq.nsmallest(limit, found)

    def of_process(self, process: str) -> set[tuple[Entry, Editor]]:
        with self._lock:
            return {
                (entry, editor)
                for entry, editors in self._editors.items()
                for editor in editors.values()
                if editor.process == process
            }

    # -- the loop's thread: changes ----------------------------------------------------------------

    def start(self, entry: Entry, editor: Editor) -> None:
        """Add an editor and notify the subscribers of user.editing, unless it edits already."""
        with self._lock:
            editors = self._editors.setdefault(entry, {})
            if editor.client_id in editors:
                return
            editors[editor.client_id] = editor
            self._entries.setdefault(editor.client_id, {})[entry] = None
        self._changed("user.editing", entry, editor)

    def stop(self, entry: Entry, client_id: str) -> None:
        """Remove an editor and notify the subscribers of user.stoppedEditing, if it was one."""
        editor = self._remove(entry, client_id)
        if editor is not None:
            self._changed("user.stoppedEditing", entry, editor)

    def _remove(self, entry: Entry, client_id: str) -> Editor | None:
        with self._lock:
            editor = self._editors.get(entry, {}).pop(client_id, None)
            if editor is not None:
                self._entries[client_id].pop(entry)
                # An entry without editors takes no memory.
                if not self._editors[entry]:
                    del self._editors[entry]
                if not self._entries[client_id]:
                    del self._entries[client_id]
            return editor

    def leave(self, client_id: str) -> None:
        """Stop the editing of a client that is gone, in a later round of the loop.

        A broadcast may find more clients that are gone. If their editing were stopped in the same
        call, the calls would nest too deeply.
        """
        if client_id in self._entries:
            if not self._leaving:
                self._engine.loop.call_at(time.monotonic(), self._stop_leaving)
            self._leaving.append(client_id)

    def _stop_leaving(self) -> None:
        """Stop the editing of clients that are gone; a few at a time, so that others are served."""
        frames: dict[str, list[bytes]] = defaultdict(list)
        while self._leaving and sum(map(len, frames.values())) < self.STOPS_AT_ONCE:
            client_id = self._leaving[0]
            entries = self.entries_of(client_id)
            for entry in entries[: self.STOPS_AT_ONCE]:
                editor = self._remove(entry, client_id)
                if editor is not None:
                    frames[entry[0]].append(self._frame("user.stoppedEditing", entry, editor))
            if len(entries) <= self.STOPS_AT_ONCE:
                self._leaving.popleft()
        for content_type, joined in frames.items():
            connections = self._engine.registry.matching("user.stoppedEditing", content_type)
            Connection.send_to_all(connections, b"".join(joined))
        self._engine.exchange.queue_list()
        if self._leaving:
            self._engine.loop.call_at(time.monotonic(), self._stop_leaving)

    def describe(self, entry: Entry) -> dict[str, Any]:
        """Return the fields about an entry's editors that several messages have."""
        editors = [editor.as_json() for editor in self.editors(entry)]
        return {"entryId": entry[1], "editors": editors, "conflict": len(editors) > 1}

    def _changed(self, event_type: str, entry: Entry, editor: Editor) -> None:
        """Broadcast a change to its subscribers, and queue our list for other processes."""
        connections = self._engine.registry.matching(event_type, entry[0])
        if connections:
            Connection.send_to_all(connections, self._frame(event_type, entry, editor))
        if editor.process == self._engine.process:
            self._engine.exchange.queue_list()

    def _frame(self, event_type: str, entry: Entry, editor: Editor) -> bytes:
        payload = {**self.describe(entry), "editor": editor.as_json()}
        return message_frame(event_type, payload, entry[0])

    def relay(self, entry: Entry, editor: Editor, change: object) -> None:
        """Send a change to the other editors of this process, subscribed or not."""
        payload = {"entryId": entry[1], "editor": editor.as_json(), "change": change}
        frame = message_frame("user.edited", payload, entry[0])
        for other in self.editors(entry):
            connection = self._engine.registry.find(other.client_id)
            if connection is not None and other.client_id != editor.client_id:
                connection.send(frame)


class EditorExchange:
    """Sends the editors of this process to the others, and receives theirs.

    With a shared log each process sends a list of its own editors when they change, and once a
    heartbeat while it has some. Other processes compare the list with the one before. Loop only,
    except for the tasks in the outbox.
    """

    # Without a list from a process for so many heartbeats, its editors are gone.
    MISSED_LISTS = 3

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # When each other process last sent its list.
        self._heard_at: dict[str, float] = {}
        # Messages to other processes, in order. Only a worker waits for the shared log.
        self._outbox = Lane(engine.workers, limit=1000)
        # A list of our own editors waits in the outbox. Setting it is atomic.
        self._is_list_queued = False

    def send_change(self, entry: Entry, editor: Editor, change: object) -> None:
        """Send a change to other processes, if the entry has editors there."""
        if any(other.process != editor.process for other in self._engine.editing.editors(entry)):
            fields = {"entry": entry, "editor": dataclasses.asdict(editor), "change": change}
            self._send("change", **fields)

    def queue_list(self) -> None:
        """Send a list of our editors soon. Several changes may become one list."""
        if self._engine.log is not None and not self._is_list_queued:
            self._is_list_queued = True
            self._outbox.put(self._send_list)

    def _send(self, do: str, **fields: Any) -> None:
        message = {"do": do, "process": self._engine.process, **fields}
        log_ = self._engine.log
        if log_ is not None:
            self._outbox.put(lambda: log_.send_quietly(message))

    def _send_list(self) -> None:
        """Run by a worker."""
        # Reset first: a change from now on needs another list.
        self._is_list_queued = False
        engine = self._engine
        assert engine.log is not None
        own = engine.editing.of_process(engine.process)
        editors = [(*entry, dataclasses.asdict(editor)) for entry, editor in own]
        engine.log.send_quietly({"do": "editors", "process": engine.process, "editors": editors})

    def beat(self) -> None:
        """Once a heartbeat: send our list if it is not empty, and forget silent processes."""
        if self._engine.log is None:
            return
        if self._engine.editing.of_process(self._engine.process):
            # The outbox may have dropped the one before.
            self._is_list_queued = False
            self.queue_list()
        silence = self._engine.settings.heartbeat * self.MISSED_LISTS
        for process, heard_at in list(self._heard_at.items()):
            if time.monotonic() - heard_at > silence:
                self._receive_list(process, set())

    def receive(self, message: dict[str, Any]) -> None:
        """Carry out a message from another process."""
        process = message["process"]
        match message["do"]:
            case "hello":
                # A new process asks for all editors.
                if self._engine.editing.of_process(self._engine.process):
                    self.queue_list()
            case "editors":
                found = {
                    ((content_type, entry_id), Editor(**editor))
                    for content_type, entry_id, editor in message["editors"]
                }
                self._receive_list(process, found)
            case "change":
                content_type, entry_id = message["entry"]
                editor = Editor(**message["editor"])
                self._engine.editing.relay((content_type, entry_id), editor, message["change"])

    def _receive_list(self, process: str, found: set[tuple[Entry, Editor]]) -> None:
        """Replace the editors of another process."""
        known = self._engine.editing.of_process(process)
        if found:
            self._heard_at[process] = time.monotonic()
        else:
            self._heard_at.pop(process, None)
        for entry, editor in known - found:
            self._engine.editing.stop(entry, editor.client_id)
        for entry, editor in found - known:
            self._engine.editing.start(entry, editor)


# -- actions ---------------------------------------------------------------------------------------


def edit_start(session: Session, message: Mapping[str, Any]) -> None:
    entry = entry_of(message)
    session.tasks.ask([("user.editing", entry[0])], _start_allowed, session, entry)


def _start_allowed(session: Session, entry: Entry, answers: list[bool]) -> None:
    check_editing_allowed(entry[0], answers)
    engine, connection = session.engine, session.connection
    editing = engine.editing
    open_entries = editing.entries_of(connection.id)
    if entry not in open_entries:
        limit = engine.settings.max_subscriptions
        if len(open_entries) >= limit:
            raise ClientError(
                "too_many_subscriptions",
                f"limit of {limit} open entries reached; stop editing one of them",
            )
        if len(editing.editors(entry)) >= Editing.MAX_EDITORS:
            raise ClientError(
                "too_many_editors", f"the entry has {Editing.MAX_EDITORS} editors already"
            )
        user_id = connection.user.id if connection.user else None
        since = timestamp(now_milliseconds())
        editing.start(entry, Editor(since, connection.id, user_id, engine.process))
    session.answer("system.editing", editing.describe(entry), entry[0])


def edit_stop(session: Session, message: Mapping[str, Any]) -> None:
    entry = entry_of(message)
    session.tasks.ask([("user.editing", entry[0])], _stop_allowed, session, entry)


def _stop_allowed(session: Session, entry: Entry, answers: list[bool]) -> None:
    check_editing_allowed(entry[0], answers)
    editing = session.engine.editing
    editing.stop(entry, session.connection.id)
    session.answer("system.editing", editing.describe(entry), entry[0])


def edit_change(session: Session, message: Mapping[str, Any]) -> None:
    entry = entry_of(message)
    if "payload" not in message:
        hint = did_you_mean("payload", message)
        raise ClientError(
            "invalid_message",
            f"the field `payload` is missing{hint}; it is the change, any JSON value",
        )
    pattern = ("user.editing", entry[0])
    session.tasks.ask([pattern], _change_allowed, session, entry, message["payload"])


def _change_allowed(
    session: Session, entry: Entry, change: object, answers: list[bool]
) -> None:
    check_editing_allowed(entry[0], answers)
    editing = session.engine.editing
    editor = editing.find(entry, session.connection.id)
    if editor is None:
        raise ClientError("not_editing", f"send editStart for entry {describe(entry[1])} first")
    editing.relay(entry, editor, change)
    session.engine.exchange.send_change(entry, editor, change)


def presence(session: Session, message: Mapping[str, Any]) -> None:
    fields = {"contentType": message["contentType"]} if "contentType" in message else {}
    content_type = parse_pattern(fields)[1]
    entry_id = string_field(message, "entryId") if "entryId" in message else None
    pattern = ("user.editing", content_type)
    session.tasks.ask([pattern], _presence_allowed, session, content_type, entry_id)


def _presence_allowed(
    session: Session, content_type: str, entry_id: str | None, answers: list[bool]
) -> None:
    check_editing_allowed(content_type, answers)
    editing = session.engine.editing
    entries: list[dict[str, Any]] = []
    size = 0
    more = False
    for entry in editing.entries(content_type, entry_id, Editing.MAX_ENTRIES + 1):
        editors = editing.describe(entry)["editors"]
        shown = {"contentType": entry[0], "entryId": entry[1], "editors": editors}
        size += len(json.dumps(shown))
        if len(entries) >= Editing.MAX_ENTRIES or size > Editing.MAX_PRESENCE:
            more = True
            break
        entries.append(shown)
    session.answer("system.presence", {"entries": entries, "more": more})


def check_editing_allowed(content_type: str, answers: list[bool]) -> None:
    """Raise ClientError if the authorize hook has refused user.editing."""
    if not all(answers):
        raise forbidden(("user.editing", content_type))


def entry_of(message: Mapping[str, Any]) -> Entry:
    """Return the entry that a client's message names, or raise ClientError."""
    content_type, entry_id = string_field(message, "contentType"), string_field(message, "entryId")
    if not is_name(content_type):
        raise ClientError(
            "invalid_type",
            "`contentType` must be that of the entry, such as posts, without *"
            f" ({NAME_RULE}), not {describe(content_type)}",
        )
    if not 0 < len(entry_id) <= NAME_LENGTH:
        raise ClientError("invalid_message", f"`entryId` must have 1 to {NAME_LENGTH} characters")
    return content_type, entry_id


# == 13. Shared logs: SQLite on one machine, Redis on several ====================================

# A position in a shared log: the last event that was read, and the last control message.
Place = tuple[EventId, str]
# An event without recipients. It is appended to an empty log, to have a position to continue from.
MARKER = Draft("system.marker", "system", "{}", frozenset())
# The type of an event that signs a user out in all processes; no client receives it. Unlike control
# messages, events cannot be lost without notice: the follower then disconnects all clients.
SIGN_OUT = "system.disconnect"


class SharedLog:
    """A log that all processes append to and read: the interface of SqliteLog and RedisLog.

    It gives the ids, and one order, to the events of all processes. It also carries control
    messages between processes: lists of editors and changes, which are never replayed. Any thread
    may call append(), send(), newest_id() and read_after(), which give up within two seconds. Only
    the follower calls find_end(), read_on() and stop_reading(). If the log is away, append() and
    send() raise PublishError, and the others LogUnavailable.
    """

    # The most entries that are read at once.
    READ_SIZE = 256
    # The log keeps this many events more than the history, so that a slow follower misses none.
    FOLLOWER_ROOM = 10_000
    # How many control messages the log keeps, and about how many bytes of them.
    MAX_MESSAGES = 1000
    MAX_MESSAGE_BYTES = 16 * 1024 * 1024
    # The least time between two log records about failures of append(), in seconds.
    LOG_INTERVAL = 60.0

    # What log records call it, and how it may have lost events.
    name: str
    loss_hint: str

    def __init__(self, settings: Settings, is_trimming: bool, report: Callable[..., None]) -> None:
        self._history = settings.history
        # Only a process with an app trims: a script does not know the site's HISTORY.
        self._max_events = settings.history + self.FOLLOWER_ROOM if is_trimming else None
        self._report = report
        # The newest event of this process, for flush(). Setting it is atomic.
        self.last_appended: EventId = (0, 0)
        # When a failure was last logged. Setting it is atomic.
        self._logged_at = float("-inf")

    def append(self, drafts: Sequence[Draft]) -> list[EventId]:
        """Add events, all or none of them, in one step; return their ids.

        Raises PublishError within two seconds if the log does not store them.
        """
        if not drafts:
            return []
        try:
            event_ids = self._add_events(drafts)
        except LogUnavailable as error:
            # A site may catch PublishError, and the follower may be able to read all the same.
            if time.monotonic() > self._logged_at + self.LOG_INTERVAL:
                self._logged_at = time.monotonic()
                log(logging.WARNING, "publish() failed: %s", error)
            message = f"the event is not stored; publish it again later: {error}"
            raise PublishError(message) from error
        self.last_appended = max(self.last_appended, event_ids[-1])
        return event_ids

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a control message to the other processes."""
        text = json.dumps(message)
        most = max(1, min(self.MAX_MESSAGES, self.MAX_MESSAGE_BYTES // len(text)))
        try:
            self._add_message(text, most)
        except LogUnavailable as error:
            raise PublishError(f"the message is not sent: {error}") from error

    def send_quietly(self, message: Mapping[str, Any]) -> None:
        """Send a control message that may be lost. Lists of editors are sent again."""
        with suppress(PublishError):
            self.send(message)

    def _add_events(self, drafts: Sequence[Draft]) -> list[EventId]:
        raise NotImplementedError

    def _add_message(self, text: str, most: int) -> None:
        """Add a control message, and keep the newest `most` of them."""
        raise NotImplementedError

    def newest_id(self) -> EventId | None:
        """Return the id of the newest event, or None if there is none."""
        raise NotImplementedError

    def read_after(self, since: EventId) -> list[Event] | None:
        """Return the events after `since`; None if some of them are not kept any more."""
        raise NotImplementedError

    def find_end(self) -> Place:
        """Return the newest position. An empty log gets a marker event first."""
        raise NotImplementedError

    def read_on(self, place: Place) -> tuple[list[Event], list[str], Place] | None:
        """Wait about a second for new entries; return events, messages, and the place after them.

        None if the place is not in the log any more: it was trimmed, or this is another log.
        """
        raise NotImplementedError

    def parse_event(self, event_id: EventId, fields: Mapping[str, Any]) -> Event:
        """Return an event of the log. Otherwise a stranger's entry would stop the follower."""
        try:
            to = None if fields.get("to") is None else frozenset(json.loads(fields["to"]))
            draft = Draft(fields["type"], fields["contentType"], fields["payload"], to)
            return Event(event_id, draft)
        except (KeyError, ValueError, TypeError):
            message = "ignored the entry %s in %s, which swiftcms_ws did not write"
            self._report(logging.ERROR, message, format_event_id(event_id), self.name)
            return Event(event_id, MARKER)

    def stop_reading(self) -> None:
        """Free what the follower alone uses. Its thread calls this last."""

    def close_copies(self) -> None:
        """Close a forked child's copies of descriptors."""

    def close(self) -> None:
        """Close connections, and let read_on() return soon. A later call opens them again."""
        raise NotImplementedError


def create_log(
    settings: Settings, app: Flask | None, report: Callable[..., None]
) -> SharedLog | None:
    """Return the shared log of the settings, or None. It is opened at its first use."""
    if settings.redis_url is not None:
        return RedisLog(settings, app is not None, report)
    if settings.database is None:
        return None
    path = os.fspath(settings.database)
    if app is None and not os.path.isabs(path):
        raise ValueError(
            f"without an app, the path of the database must be absolute: {os.path.abspath(path)!r}"
            f" instead of {path!r}? In a site's configuration, {path!r} is inside app.instance_path"
        )
    if app is not None and not os.path.isabs(path):
        # If this fails, the first publish() says why.
        with suppress(OSError):
            os.makedirs(app.instance_path, exist_ok=True)
        path = os.path.join(app.instance_path, path)
    return SqliteLog(path, settings, app is not None, report)


# -- SQLite ----------------------------------------------------------------------------------------


def check_sqlite() -> None:
    """Raise ImportError if this Python was built without SQLite."""
    if sqlite3 is None:
        raise ImportError(
            "SWIFTCMS_WS_DATABASE needs the module sqlite3, and this Python was built without it"
        )


class LogFile:
    """One connection to the file of a SqliteLog. Any thread may use it, one at a time.

    It creates a missing file, and notices if the file was deleted or replaced. After an error it
    closes the connection, so that the next use shows whether the fault is gone.
    """

    # One database in WAL mode has three files.
    SUFFIXES = ("", "-wal", "-shm")
    # SQLite must not create the file itself, because other users of the machine could read it.
    URI_OPTIONS = "mode=rw"
    # How long a fork waits for a thread that uses the connection, in seconds.
    FORK_TIMEOUT = 2.5
    # By words of an error's message.
    HINTS: ClassVar[dict[str, str]] = {
        "locked": "Another program holds it; `sqlite3 FILE '.backup COPY'` copies it and does not.",
        "readonly": "This process must be able to write the file and its directory.",
        "unable to open": "This process must be able to read and write the file and its directory.",
        "Permission denied": "This process must be able to read and write the directory.",
        "temporarily unavailable": "Other processes take too long to open it.",
        "full": "Free some space.",
        "disk I/O": "Is the disk full or broken, or was its -wal deleted?",
        "malformed": "It is damaged: delete it with its -wal and -shm, and clients load again.",
        "not a database": "It is damaged, or another file: delete it, or choose another name.",
        "No such file": "Create the directory.",
        "locking protocol": "Is it on a network file system? Choose a local disk, or use Redis.",
    }
    # Connections that a forked child has inherited while another thread used them. Closing them
    # would damage the file, and this process cannot use SQLite any more.
    inherited: ClassVar[list[sqlite3.Connection | None]] = []

    def __init__(self, path: str, timeout: float) -> None:
        """timeout: for waiting for other threads, and then for other processes, in seconds."""
        self._path = path
        self._timeout = timeout
        self._directory = os.path.dirname(path)
        # The thread that uses the connection, and those that wait for it. (A connection for each
        # thread would need no lock, but Werkzeug starts a thread for each request.) This list is
        # the lock. A threading.Lock with a timeout would stay locked for ever if a signal handler
        # raised an exception, such as Celery's time limit, just when acquire() returns.
        self._queue = list[int]()
        self._fork_turn: AbstractContextManager[None] | None = None
        # Only for the first in the queue: the connection, and device and number of the three files.
        self._connection: sqlite3.Connection | None = None
        self._identity: list[tuple[int, int] | None] = []
        _log_files.add(self)

    def __del__(self) -> None:
        self._close()

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection to the file that has the path now; open it if need be.

        Raises LogUnavailable if the file cannot be used.
        """
        with self._turn(self._timeout):
            try:
                if self._connection is None or self._find_identity() != self._identity:
                    self._open()
                yield cast("sqlite3.Connection", self._connection)
            except BaseException as error:
                connection = self._connection
                # A transaction that stays open would lock out all other processes.
                if not is_locked(error) or (connection is not None and connection.in_transaction):
                    self._close()
                if isinstance(error, (sqlite3.Error, OSError)):
                    raise self._unavailable(str(error)) from error
                raise

    @contextmanager
    def _turn(self, timeout: float) -> Iterator[None]:
        """Wait until this thread may use the connection. Each step on the queue is atomic."""
        thread, deadline = threading.get_ident(), time.monotonic() + timeout
        if thread in self._queue:
            raise RuntimeError(SIGNAL_HINT)
        try:
            self._queue.append(thread)
            while self._queue[0] != thread:
                if time.monotonic() >= deadline:
                    raise self._unavailable("other threads of this process still wait for it")
                time.sleep(0.0002)
            yield
        finally:
            self._queue.remove(thread)

    def _unavailable(self, problem: str) -> LogUnavailable:
        hints = [hint for words, hint in self.HINTS.items() if words in problem]
        return LogUnavailable(" ".join([f"cannot use {self._path}: {problem}.", *hints[:1]]))

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """As use(), for one transaction that writes. At the end it is stored, all or nothing."""
        with self.use() as connection:
            self._begin(connection)
            yield connection
            connection.execute("COMMIT")

    def close(self) -> None:
        """Close the connection, unless a thread uses it for longer than the timeout."""
        with suppress(LogUnavailable), self._turn(self._timeout):
            self._close()

    # -- for the first in the queue ----------------------------------------------------------------

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction that writes, as soon as no other process writes.

        SQLite itself would pause for up to 100 ms between two attempts. If other processes publish
        all the time, the file is free for microseconds only, and this process would starve.
        """
        deadline = time.monotonic() + self._timeout
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    if not is_locked(error) or time.monotonic() >= deadline:
                        raise
                time.sleep(random.uniform(0.0002, 0.002))
        finally:
            connection.execute(f"PRAGMA busy_timeout = {round(self._timeout * 1000)}")

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _find_identity(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for suffix in self.SUFFIXES:
            try:
                status = os.stat(self._path + suffix)
                found.append((status.st_dev, status.st_ino))
            except OSError:
                found.append(None)
        return found

    def _open(self) -> None:
        if self.inherited:
            raise self._unavailable(
                "this process was forked while another thread wrote to it; start the process in"
                " another way, such as multiprocessing with the method spawn"
            )
        # Otherwise two processes could create the file, or remove its journal, at the same time.
        with self._locked_directory():
            self._forget_old_files()
            if not os.path.lexists(self._path):
                self._create()
            created = self._find_identity()[0]
            uri = f"{Path(self._path).as_uri()}?{self.URI_OPTIONS}"
            self._connection = sqlite3.connect(
                uri, self._timeout, isolation_level=None, check_same_thread=False, uri=True
            )
            problem = prepare_database(self._connection)
            self._identity = self._find_identity()
            if self._identity[0] != created or None in self._identity:
                problem = problem or "it was deleted while it was opened"
            if problem:
                raise self._unavailable(problem)

    @contextmanager
    def _locked_directory(self) -> Iterator[None]:
        """Hold a lock on the directory, against other processes that open the file."""
        if fcntl is None:
            yield
            return
        deadline = time.monotonic() + self._timeout / 2
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.005)
            yield
        finally:
            os.close(descriptor)

    def _forget_old_files(self) -> None:
        """Close connections to files that were deleted or replaced, and remove an old journal.

        Otherwise SQLite would use the journal of another file, and lose events or damage the file.
        """
        now, before, is_open = self._find_identity(), self._identity, self._connection is not None
        for number, suffix in enumerate(self.SUFFIXES[1:], 1):
            # While the connection is open, no other file can have the same device and number.
            is_old = is_open and now[0] != before[0] and now[number] == before[number]
            if now[0] is None or is_old:
                with suppress(FileNotFoundError):
                    os.unlink(self._path + suffix)
        self._close()
        # If only the -wal or the -shm is gone, SQLite shares the old one between all connections of
        # this process. So all must be closed before one is opened.
        for other in list(_log_files):
            is_open = other is not self and other._connection is not None
            if is_open and other._identity[0] == now[0] and other._identity != now:
                with other._turn(0):
                    other._close()

    def _create(self) -> None:
        """Create an empty file, with mode 0600 and the group's bits of its directory."""
        directory = os.stat(self._directory)
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # The site, which runs as another user, must be able to use a file of the superuser.
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                os.fchown(descriptor, directory.st_uid, directory.st_gid)
            # SQLite gives the other two files the same mode. Their group may be another one.
            if hasattr(os, "fchmod") and os.fstat(descriptor).st_gid == directory.st_gid:
                os.fchmod(descriptor, 0o600 | directory.st_mode & 0o060)
        finally:
            os.close(descriptor)

    # -- forks -------------------------------------------------------------------------------------

    def begin_fork(self) -> None:
        """Close the connection, and let no thread open it until the fork is over.

        A child that inherits one would believe that it holds the locks of its parent.
        """
        self._fork_turn = self._turn(self.FORK_TIMEOUT)
        try:
            self._fork_turn.__enter__()
            self._close()
        except (LogUnavailable, RuntimeError):
            self._fork_turn = None

    def end_fork(self, is_child: bool) -> None:
        turn, self._fork_turn = self._fork_turn, None
        if turn is not None:
            turn.__exit__(None, None, None)
        elif is_child and self._connection is not None:
            self.inherited.append(self._connection)


_log_files: weakref.WeakSet[LogFile] = weakref.WeakSet()
# Held during a fork, because two threads may fork at the same time.
_fork_lock = threading.Lock()


def _begin_fork() -> None:
    _fork_lock.acquire()
    for file in list(_log_files):
        file.begin_fork()


def _end_fork(is_child: bool) -> None:
    for file in list(_log_files):
        file.end_fork(is_child)
    if is_child:
        # The child forgets its engines, and their queues may have threads of the parent.
        _log_files.clear()
    _fork_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_begin_fork,
        after_in_parent=functools.partial(_end_fork, is_child=False),
        after_in_child=functools.partial(_end_fork, is_child=True),
    )


def is_locked(error: BaseException) -> bool:
    """Return whether SQLite waited in vain for the lock of another connection."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


APPLICATION_ID = 0x53574653
FORMAT_VERSION = 1
SCHEMA = (
    # `position` counts all events that ever were in this file, and `bytes` their payloads. So the
    # difference between two rows is the size of what lies between.
    "CREATE TABLE events (id INTEGER PRIMARY KEY, position INTEGER NOT NULL,"
    " bytes INTEGER NOT NULL, type TEXT NOT NULL, content_type TEXT NOT NULL,"
    " payload TEXT NOT NULL, receivers TEXT)",
    "CREATE TABLE messages (id INTEGER PRIMARY KEY, message TEXT NOT NULL)",
    # The UDP ports of followers, and when each was last confirmed (seconds since 1970).
    "CREATE TABLE listeners (port INTEGER PRIMARY KEY, confirmed_at INTEGER NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)


def prepare_database(connection: sqlite3.Connection) -> str:
    """Create the tables in an empty database. Return why it cannot be used, or an empty string."""

    def ask(statement: str) -> Any:
        return connection.execute(statement).fetchone()[0]

    # One damaged string must not stop the follower.
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    has_tables = ask("SELECT count(*) FROM sqlite_master") > 0
    if has_tables and ask("PRAGMA application_id") != APPLICATION_ID:
        return "it is the database of another program. Set SWIFTCMS_WS_DATABASE to another file"
    if has_tables and ask("PRAGMA user_version") > FORMAT_VERSION:
        return (
            "a newer version of swiftcms_ws has written it. Update this installation, or delete the"
            " file with its -wal and -shm"
        )
    if ask("PRAGMA journal_mode = WAL") != "wal":
        return (
            "its file system does not support SQLite's WAL mode, as network file systems do not."
            " Choose a directory on a local disk, or use Redis"
        )
    # After a power failure the last events may be missing. A crash of a process loses none.
    connection.execute("PRAGMA synchronous = NORMAL")
    # If there is a follower, it moves the journal into the file before it has so many pages.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    connection.execute("PRAGMA journal_size_limit = 4194304")
    if not has_tables:
        connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute("COMMIT")
    # From now on all three files exist.
    ask("SELECT count(*) FROM listeners")
    return ""


class SqliteLog(SharedLog):
    """A log in an SQLite file, for the processes of one machine.

    The follower has a connection of its own, so that it does not wait for publish(); the other
    threads share one. A publisher wakes all followers with a UDP datagram on 127.0.0.1, and each of
    them looks once a second anyway: a container may share the file, but not the network.
    """

    # How long to wait for other threads, and then for other processes, in seconds.
    TIMEOUT = 0.9
    # The same for the follower. Clients wait for it meanwhile.
    FOLLOWER_TIMEOUT = 0.5
    POLL_INTERVAL = 1.0
    # An id is one number: milliseconds << COUNTER_BITS | counter.
    COUNTER_BITS = 16
    # The most bytes of payloads: those of the history, and as many for a slow follower.
    MAX_BYTES = 2 * History.MAX_BYTES
    # After so many events, old ones are deleted and the journal is moved into the file.
    TIDY_STEP = 256
    # The most events that one transaction deletes, because publish() waits for it.
    MAX_DELETED = 2000
    # The journal is kept below about so many pages.
    MAX_JOURNAL = 1000
    # How often a follower confirms its port, and when others remove it, in seconds.
    CONFIRM_INTERVAL = 60.0
    PORT_LIFETIME = 200.0

    loss_hint = "was it deleted or replaced?"

    def __init__(
        self, path: str, settings: Settings, is_trimming: bool, report: Callable[..., None]
    ) -> None:
        check_sqlite()
        super().__init__(settings, is_trimming, report)
        self.name = f"the file {path}"
        self._file = LogFile(path, self.TIMEOUT)
        # The newest id, as a number, that this process has given or read. Ids stay above it, also
        # if the file is replaced and the clock is wrong. Setting it is atomic.
        self._newest_number = 0
        # The rest is for the follower's thread, which alone opens the socket.
        self._own_file = LogFile(path, self.FOLLOWER_TIMEOUT)
        self._listener: socket.socket | None = None
        self._port = 0
        self._confirm_at = 0.0
        # Events that were read since _tidy() ran; and whether there may be more of them now.
        self._untidy = 0
        self._has_more = False

    # -- any thread --------------------------------------------------------------------------------

    def _add_events(self, drafts: Sequence[Draft]) -> list[EventId]:
        with self._file.write() as connection:
            newest, position, size = self._last_row(connection) or (0, 0, 0)
            # Ids never go back, also if the clock does.
            clock = now_milliseconds() << self.COUNTER_BITS
            first = max(clock, newest + 1, self._newest_number + 1)
            rows = []
            for index, draft in enumerate(drafts):
                size += utf8_length(draft.payload)
                receivers = None if draft.to is None else json.dumps(sorted(draft.to))
                rows.append((first + index, position + 1 + index, size, *draft[:3], receivers))
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            # Followers trim too, but there may be none.
            if position // self.TIDY_STEP < (position + len(rows)) // self.TIDY_STEP:
                self._trim(connection)
            self._newest_number = rows[-1][0]
            ports = self._ports(connection)
        self._wake(ports)
        return [self._to_id(row[0]) for row in rows]

    def _add_message(self, text: str, most: int) -> None:
        with self._file.write() as connection:
            connection.execute("INSERT INTO messages (message) VALUES (?)", (text,))
            connection.execute(
                "DELETE FROM messages WHERE id <= (SELECT max(id) FROM messages) - ?", (most,)
            )
            ports = self._ports(connection)
        self._wake(ports)

    def newest_id(self) -> EventId | None:
        with self._file.use() as connection:
            row = self._last_row(connection)
        return None if row is None else self._to_id(row[0])

    def read_after(self, since: EventId) -> list[Event] | None:
        events: list[Event] = []
        number = self._to_number(since)
        # In several steps, because publish() waits meanwhile.
        while len(events) <= self._history:
            with self._file.use() as connection:
                rows = self._read_rows(connection, number)
            if not rows:
                return None if rows is None else events
            events += map(self._parse_row, rows)
            number = rows[-1][0]
        return None

    def close(self) -> None:
        self._file.close()
        self._wake([self._port])

    @staticmethod
    def _last_row(connection: sqlite3.Connection) -> tuple[int, int, int] | None:
        """Return number, position and bytes of the newest event."""
        statement = "SELECT id, position, bytes FROM events ORDER BY id DESC LIMIT 1"
        return cast("tuple[int, int, int] | None", connection.execute(statement).fetchone())

    def _read_rows(self, connection: sqlite3.Connection, number: int) -> list[Any] | None:
        """Return the next rows after an event; None if the event is not in the file any more."""
        rows = connection.execute(
            "SELECT id, type, content_type, payload, receivers FROM events WHERE id >= ?"
            " ORDER BY id LIMIT ?",
            (number, self.READ_SIZE + 1),
        ).fetchall()
        return rows[1:] if rows and rows[0][0] == number else None

    def _parse_row(self, row: tuple[Any, ...]) -> Event:
        fields = dict(zip(("type", "contentType", "payload", "to"), row[1:], strict=True))
        return self.parse_event(self._to_id(row[0]), fields)

    def _to_id(self, number: int) -> EventId:
        return number >> self.COUNTER_BITS, number & (1 << self.COUNTER_BITS) - 1

    def _to_number(self, event_id: EventId) -> int:
        """Return the number of an id. -1, which no event has, stands for an impossible one."""
        milliseconds, counter = event_id
        if milliseconds >> 47 or counter >> self.COUNTER_BITS:
            return -1
        return milliseconds << self.COUNTER_BITS | counter

    def _trim(self, connection: sqlite3.Connection) -> bool:
        """Delete events that are too old, in a process with an app. Return whether it did."""
        newest = self._last_row(connection)
        if self._max_events is None or newest is None:
            return False
        limits = (newest[1] - self._max_events, newest[2] - self.MAX_BYTES)
        found = connection.execute(
            "SELECT max(id) FROM (SELECT id, position, bytes FROM events ORDER BY id LIMIT ?)"
            " WHERE position <= ? OR bytes <= ?",
            (self.MAX_DELETED, *limits),
        ).fetchone()
        if found[0] is None:
            return False
        connection.execute("DELETE FROM events WHERE id <= ?", found)
        return True

    @staticmethod
    def _ports(connection: sqlite3.Connection) -> list[int]:
        return [port for (port,) in connection.execute("SELECT port FROM listeners")]

    @staticmethod
    def _wake(ports: Iterable[int]) -> None:
        # A process that is not woken looks at the file within a second.
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            for port in ports:
                sock.sendto(b"\0", ("127.0.0.1", port))

    # -- the follower's thread ---------------------------------------------------------------------

    def find_end(self) -> Place:
        if self._listener is None:
            self._listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._listener.bind(("127.0.0.1", 0))
            self._port = self._listener.getsockname()[1]
        # Before the end is read: a datagram follows each later event.
        self._confirm_port()
        with self._own_file.use() as connection:
            row = self._last_row(connection)
            message = connection.execute("SELECT max(id) FROM messages").fetchone()[0] or 0
        newest = self._to_id(row[0]) if row is not None else self.append([MARKER])[0]
        return newest, str(message)

    def read_on(self, place: Place) -> tuple[list[Event], list[str], Place] | None:
        is_woken = self._has_more or self._wait()
        if time.monotonic() > self._confirm_at:
            # If another process writes for long, the next call does it.
            with suppress(LogUnavailable):
                self._confirm_port()
        number, message_number = self._to_number(place[0]), int(place[1])
        with self._own_file.use() as connection:
            rows = self._read_rows(connection, number)
            messages = connection.execute(
                "SELECT id, message FROM messages WHERE id > ? ORDER BY id LIMIT ?",
                (message_number, self.READ_SIZE),
            ).fetchall()
        self._has_more = bool(rows or messages)
        if rows is None:
            return None
        if self._has_more and not is_woken:
            # The publisher does not know our port, or cannot reach it.
            self._confirm_at = 0
        self._untidy += len(rows)
        # Not while there is more to read, because it would delete what is not read yet.
        if not rows and self._untidy and (self._untidy >= self.TIDY_STEP or not is_woken):
            self._tidy()
        if rows:
            number = rows[-1][0]
            self._newest_number = max(self._newest_number, number)
        if messages:
            message_number = messages[-1][0]
        place = (self._to_id(number), str(message_number))
        return list(map(self._parse_row, rows)), [text for _, text in messages], place

    def _wait(self) -> bool:
        """Wait for a datagram, for a second at most. Return whether one came."""
        assert self._listener is not None
        self._listener.settimeout(self.POLL_INTERVAL)
        try:
            self._listener.recv(16)
            # One look at the file serves all datagrams that have come.
            self._listener.settimeout(0)
            while True:
                self._listener.recv(16)
        except TimeoutError:
            return False
        except BlockingIOError:
            return True

    def _confirm_port(self) -> None:
        """Write our port into the file, and remove those of processes that are gone."""
        now = int(time.time())
        with self._own_file.write() as connection:
            oldest = now - self.PORT_LIFETIME
            connection.execute("DELETE FROM listeners WHERE confirmed_at < ?", (oldest,))
            connection.execute("INSERT OR REPLACE INTO listeners VALUES (?, ?)", (self._port, now))
        self._confirm_at = time.monotonic() + self.CONFIRM_INTERVAL

    def _tidy(self) -> None:
        """Delete old events, and move the journal into the file. If it fails, it is done later.

        Otherwise publish() would do the latter from time to time, and take a hundred times as long.
        """
        self._untidy = 0
        with suppress(LogUnavailable), self._own_file.use() as connection:
            while self._trim(connection):
                pass
            _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if pages > self.MAX_JOURNAL:
                # If events are published all the time, the journal would grow for ever.
                connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def stop_reading(self) -> None:
        with suppress(LogUnavailable), self._own_file.write() as connection:
            connection.execute("DELETE FROM listeners WHERE port = ?", (self._port,))
        self._own_file.close()
        self.close_copies()

    def close_copies(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()


# -- Redis -----------------------------------------------------------------------------------------


def import_redis() -> Any:
    """Return the package redis, or raise ImportError that says how to get it."""
    try:
        # The optional extra: a site without Redis does not need it.
        import redis  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "SWIFTCMS_WS_REDIS_URL needs the package redis: pip install redis"
        ) from error
    return redis


class AppendGuard:
    """Raises RuntimeError if a signal handler publishes while its own thread is inside.

    For any thread. If a signal handler raises, its entry may stay; so entries expire after LIMIT.
    """

    LIMIT = 3.0

    def __init__(self) -> None:
        # When each thread entered. Each step is atomic.
        self._entered: dict[int, float] = {}

    def __enter__(self) -> None:
        thread, now = threading.get_ident(), time.monotonic()
        if now - self._entered.get(thread, now - self.LIMIT) < self.LIMIT:
            raise RuntimeError(SIGNAL_HINT)
        self._entered[thread] = now

    def __exit__(self, *exception: object) -> None:
        self._entered.pop(threading.get_ident(), None)


class RedisLog(SharedLog):
    """A log in Redis: a stream of events, and a second one of control messages.

    Threads may share the client of the package redis.
    """

    # How many seconds Redis has to accept a connection, and to answer.
    TIMEOUT = 1.0
    # How long one XREAD of the follower waits for new entries, in milliseconds.
    BLOCK = 500
    # A connection that was idle for this many seconds is tested, because a firewall may have
    # dropped it.
    MAX_IDLE = 5.0

    name = "Redis"
    loss_hint = "does it keep them on disk?"

    def __init__(self, settings: Settings, is_trimming: bool, report: Callable[..., None]) -> None:
        super().__init__(settings, is_trimming, report)
        redis = import_redis()
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415

        self._redis: Any = redis.Redis.from_url(
            cast(str, settings.redis_url),
            decode_responses=True,
            # Another program may write into the stream: one entry must not stop the follower.
            encoding_errors="replace",
            socket_timeout=self.TIMEOUT,
            socket_connect_timeout=self.TIMEOUT,
            # A page waits for publish(): it fails soon.
            retry=Retry(NoBackoff(), 0),
        )
        self._redis_errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._read_only_error: type[Exception] = redis.ReadOnlyError
        self._events = f"{settings.redis_prefix}:events"
        self._messages = f"{settings.redis_prefix}:messages"
        self._guard = AppendGuard()
        # When publish() or send() last used Redis. Setting it is atomic.
        self._used_at = time.monotonic()

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise LogUnavailable instead of the errors of the package redis."""
        try:
            yield
        except self._redis_errors as error:
            raise LogUnavailable(
                f"cannot use Redis: {error} Is it running, and is SWIFTCMS_WS_REDIS_URL right?"
            ) from error

    def _add_events(self, drafts: Sequence[Draft]) -> list[EventId]:
        with self._guard:
            event_ids: list[EventId] = self._write(lambda: self._add(drafts))
        return event_ids

    def _add(self, drafts: Sequence[Draft]) -> list[EventId]:
        with self._redis.pipeline(transaction=True) as pipe:
            for draft in drafts:
                fields = {
                    "type": draft.type,
                    "contentType": draft.content_type,
                    "payload": draft.payload,
                }
                if draft.to is not None:
                    fields["to"] = json.dumps(sorted(draft.to))
                pipe.xadd(self._events, fields, maxlen=self._max_events)
            return [parse_event_id(event_id) for event_id in pipe.execute()]

    def _write(self, write: Callable[[], Any]) -> Any:
        """Call a function that writes to Redis, over a connection that is likely to work."""
        with self._translated_errors():
            self._test_idle_connections()
            try:
                return write()
            except self._read_only_error:
                # After a failover the name leads to a new primary, but the pooled connections lead
                # to the old one, which is a replica now and has not stored the entry.
                self._redis.connection_pool.disconnect()
                return write()

    def _test_idle_connections(self) -> None:
        """If Redis was not used for MAX_IDLE seconds, drop pooled connections that are dead."""
        if time.monotonic() - self._used_at > self.MAX_IDLE:
            try:
                self._redis.ping()
            except self._redis_errors:
                self._redis.connection_pool.disconnect(inuse_connections=False)
        self._used_at = time.monotonic()

    def _add_message(self, text: str, most: int) -> None:
        self._write(lambda: self._redis.xadd(self._messages, {"message": text}, maxlen=most))

    def newest_id(self) -> EventId | None:
        with self._translated_errors():
            newest = self._redis.xrevrange(self._events, count=1)
        return parse_event_id(newest[0][0]) if newest else None

    def read_after(self, since: EventId) -> list[Event] | None:
        start = format_event_id(since)
        with self._translated_errors():
            # The history may be long: first look whether `since` is in it at all.
            if not self._redis.xrange(self._events, start, start):
                return None
            entries = self._redis.xrange(self._events, start, count=self._history + 2)
        events = [self._parse_entry(*entry) for entry in entries]
        if not events or events[0].id != since or len(events) > self._history + 1:
            return None
        return events[1:]

    def _parse_entry(self, event_id: str, fields: dict[str, str]) -> Event:
        return self.parse_event(parse_event_id(event_id), fields)

    def close(self) -> None:
        self._redis.close()

    # -- the follower's thread ---------------------------------------------------------------------

    def find_end(self) -> Place:
        newest = self.newest_id() or self.append([MARKER])[0]
        with self._translated_errors():
            messages = self._redis.xrevrange(self._messages, count=1)
        return newest, messages[0][0] if messages else "0-0"

    def read_on(self, place: Place) -> tuple[list[Event], list[str], Place] | None:
        event_id, message_id = place
        here = format_event_id(event_id)
        with self._translated_errors(), self._redis.pipeline(transaction=False) as pipe:
            streams = {self._events: here, self._messages: message_id}
            pipe.xread(streams, count=self.READ_SIZE, block=self.BLOCK)
            pipe.xrange(self._events, here, here)
            answer, still_here = pipe.execute()
        if not still_here:
            return None
        found = self._as_dict(answer)
        events = [self._parse_entry(*entry) for entry in found.get(self._events, [])]
        entries = found.get(self._messages, [])
        if events:
            event_id = events[-1].id
        if entries:
            message_id = entries[-1][0]
        # Another program may have written other fields.
        messages = [fields.get("message", "") for _, fields in entries]
        return events, messages, (event_id, message_id)

    @staticmethod
    def _as_dict(answer: Any) -> dict[str, list[Any]]:
        """Return what XREAD answered, by stream: a list of pairs in RESP2, a dict in RESP3."""
        if isinstance(answer, dict):
            return {name: entries[0] if entries else [] for name, entries in answer.items()}
        return dict(answer or [])


# -- the follower ----------------------------------------------------------------------------------


class Follower:
    """A thread that reads the shared log, and queues the events of all processes for the loop.

    It owns the position up to which this process has read. If the log is away, it tries again and
    continues there. If the position is not in the log any more, events may be lost. All clients
    are then disconnected, and learn it when they resume.
    """

    # The pause before the next attempt, in seconds. It is doubled each time.
    FIRST_PAUSE = 0.05
    LAST_PAUSE = 1.0
    # How long a greeting waits for the id of the newest event, in seconds.
    BEGIN_TIMEOUT = 1.0
    # After so many seconds without reading, the heartbeat logs it once a minute.
    MAX_SILENCE = 30.0

    def __init__(self, engine: Engine, log_: SharedLog) -> None:
        self._engine = engine
        self._log = log_
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # Set by the follower; reading it is atomic. None until the place is known.
        self.newest_id: EventId | None = None
        # Set by the loop: the history has begun at the end of the log.
        self._has_begun = threading.Event()
        self._begin_until = 0.0
        # When the log was last read. Setting it is atomic.
        self._read_at = 0.0
        # Thread only.
        self._place: Place | None = None

    def start(self) -> None:
        self._read_at = time.monotonic()
        self._begin_until = self._read_at + self.BEGIN_TIMEOUT
        self._thread = threading.Thread(target=self._run, name="swiftcms-ws follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._log.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def wait_for_begin(self) -> None:
        """Wait until this process knows the newest event, but only in the second after the start.

        Otherwise a greeting would name an old event, and a sign-out might not be noticed.
        """
        if not self._has_begun.is_set():
            self._has_begun.wait(max(0.0, self._begin_until - time.monotonic()))

    def _run(self) -> None:
        """Thread body: read the log until stopped. An error is logged, and it tries again."""
        pause = self.FIRST_PAUSE
        while not self._is_stopping():
            try:
                self._read()
            except BaseException as error:
                if not self._is_stopping():
                    self._report_error(error, is_first=pause == self.FIRST_PAUSE)
                    pause = min(pause * 2, self.LAST_PAUSE)
                    self._stopped.wait(pause * random.uniform(0.5, 1))
            else:
                self._read_at = time.monotonic()
                if pause != self.FIRST_PAUSE:
                    self._engine.report(logging.WARNING, "%s is back", self._log.name)
                pause = self.FIRST_PAUSE
        self._log.stop_reading()

    def _is_stopping(self) -> bool:
        return self._stopped.is_set() or self._engine.is_closing

    def _report_error(self, error: BaseException, is_first: bool) -> None:
        """Log an error. If the log is away, log only the first of many."""
        if not isinstance(error, (PublishError, LogUnavailable)):
            message = "following %s failed; retrying"
            self._engine.report(logging.ERROR, message, self._log.name, exc_info=error)
        elif is_first:
            self._engine.report(
                logging.WARNING,
                "%s Until %s is back, publish() raises PublishError, and clients of this process"
                " get no new events. Retrying",
                error,
                self._log.name,
            )

    def _read(self) -> None:
        """Read what is new and give it to the loop, in order."""
        loop = self._engine.loop
        if self._place is None:
            place = self._log.find_end()
            loop.call(self._restart_history, place[0])
            self._place, self.newest_id = place, place[0]
            self._log.send_quietly({"do": "hello", "process": self._engine.process})
        found = self._log.read_on(self._place)
        if found is None:
            self._place = None
            return
        events, messages, self._place = found
        sign_outs = [event.payload for event in events if event.type == SIGN_OUT]
        if events:
            loop.submit(events)
            self.newest_id = events[-1].id
        for text in (*sign_outs, *messages):
            loop.call(self._receive, text)

    # -- the loop's thread -------------------------------------------------------------------------

    def check(self) -> None:
        """Log if the follower hangs. Called once a heartbeat."""
        silence = time.monotonic() - self._read_at
        if silence > self.MAX_SILENCE:
            self._engine.warn(
                "%s could not be read for %d seconds: clients of this process get no new events",
                self._log.name,
                silence,
            )

    def _restart_history(self, newest: EventId) -> None:
        """Begin at the end of the log. Connected clients may have missed events before it."""
        engine = self._engine
        self._has_begun.set()
        engine.history.restart(newest)
        connections = engine.registry.connections()
        if connections:
            engine.report(
                logging.WARNING,
                "%s lost events (%s), or was away too long: %s clients are disconnected, and"
                " reconnect",
                self._log.name,
                self._log.loss_hint,
                len(connections),
            )
        engine.loop.close_all(CloseCode.GOING_AWAY, "events may be lost; reconnect with since")

    def _receive(self, text: str) -> None:
        message = json.loads(text)
        if message["process"] == self._engine.process:
            return
        if message["do"] == "disconnect":
            self._engine.sign_out(message["user"], message["session"])
        else:
            self._engine.exchange.receive(message)


# == 14. Live pages and track ====================================================================


# == 15. Plain HTTP ==============================================================================


# == 16. The ready-made hub ======================================================================

hub = Hub()
blueprint = hub.blueprint
publish = hub.publish
publish_many = hub.publish_many


# IV  Around it
# == 17. Command line ============================================================================

# Seconds to wait for each answer of a server.
REPLY_TIMEOUT = 10.0
# Clients that check() connects at once: enough to reach several server processes, if there are any.
CONCURRENT_CLIENTS = 8
CONNECTION_ERRORS = (
    OSError,
    simple_websocket.ConnectionError,
    simple_websocket.ConnectionClosed,
    ProtocolError,
)
# Hints by the HTTP status of a refused handshake. 0 stands for no HTTP answer at all.
HINTS = {
    0: "Is the site running, and is this its port?"
    " A proxy must pass the headers Upgrade and Connection (see README).",
    401: "The token in the address is not a valid token of this site.",
    403: "Pages of this site may not connect."
    " Configure the proxy to pass the Host header, or set SWIFTCMS_WS_ORIGINS.",
    404: "Is this the right address, including its path? With a url_prefix it is /url_prefix/ws.",
    426: "A proxy removes the headers Upgrade and Connection (see README).",
    500: "The site failed, or the proxy cannot reach it. Their logs have the reason.",
    501: "The web server gives no access to the socket."
    " Serve the site with gunicorn, waitress or `flask run`.",
    503: "The limit SWIFTCMS_WS_MAX_CONNECTIONS is reached: raise it."
    " Or the server is shutting down: try again.",
}


class Client(simple_websocket.Client):  # type: ignore[misc]
    """A connection of listen() or check() to a server.

    `greeting` is the payload of its system.connected. The constructor raises one of
    CONNECTION_ERRORS if there is no connection within REPLY_TIMEOUT.
    """

    def __init__(self, url: str, **headers: str) -> None:
        daemon_thread = functools.partial(threading.Thread, daemon=True)
        super().__init__(url, headers=headers, thread_class=daemon_thread)
        # The library does not look at frames that arrive together with the handshake's response
        # until more data arrives. The pong makes it look.
        self.sock.send(self.ws.send(Ping()))
        greeting = self.receive(REPLY_TIMEOUT)
        if not isinstance(greeting, str) or '"system.connected"' not in greeting:
            self.close()
            raise OSError("this is a WebSocket, but not one of swiftcms-ws: it sends no greeting")
        self.greeting: dict[str, Any] = json.loads(greeting)["payload"]

    def handshake(self) -> None:
        self.sock.settimeout(REPLY_TIMEOUT)
        super().handshake()
        # The library's thread takes a timeout for a closed connection.
        self.sock.settimeout(None)

    def close(self, reason: int | None = None, message: str | None = None) -> None:
        """Close the connection, unless it is closed already."""
        with suppress(*CONNECTION_ERRORS):
            super().close(reason, message)


def status_of(error: BaseException) -> int:
    """Return the HTTP status of a refused handshake, or 0 if there is none."""
    return int(getattr(error, "status_code", None) or 0)


def hint_for(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "The server accepts connections but does not answer. Is it overloaded?"
    status = status_of(error)
    return HINTS.get(status, HINTS[404 if status < 500 else 500])


def websocket_url(text: str) -> str:
    """Return the address of a WebSocket. The path may be missing, and the scheme may be http."""
    scheme, _, rest = text.rpartition("://")
    host, _, path = rest.partition("/")
    secure = "s" if scheme in ("https", "wss") else ""
    return f"ws{secure}://{host}/{path or 'ws'}"


class PermanentError(Exception):
    """Connecting again would fail in the same way. The message is printed."""


class Listener:
    """Prints events on standard output, and resumes after the event with `last_id`."""

    MAX_PAUSE = 30.0

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.last_id: str | None = None
        # Seconds to wait before the next attempt to connect.
        self.pause = 1.0
        # A heartbeat moves `last_id` only if the server has accepted the subscription.
        # Otherwise a connection that breaks before its replay would skip the rest.
        self.is_subscribed = False

    def run(self) -> None:
        """Connect, and print events until the connection is lost.

        Raises one of CONNECTION_ERRORS, or PermanentError if connecting again would not help.
        """
        self.is_subscribed = False
        client = self._connect()
        try:
            timeout = MISSED_HEARTBEATS * client.greeting["heartbeat"] + REPLY_TIMEOUT
            self._subscribe(client)
            while (data := client.receive(timeout)) is not None:
                self._handle(client, data)
            raise TimeoutError("the server sent nothing for too long")
        except simple_websocket.ConnectionClosed as error:
            if error.reason in (CloseCode.UNAUTHORIZED, CloseCode.MESSAGE_TOO_BIG):
                raise PermanentError(str(error)) from error
            raise
        finally:
            client.close()

    def _connect(self) -> Client:
        try:
            return Client(self.options.url)
        except CONNECTION_ERRORS as error:
            # A proxy answers 502, 503 or 504 while the site restarts.
            if status_of(error) in (0, 502, 503, 504):
                raise
            message = f"cannot connect to {self.options.url}: {error}\n{hint_for(error)}"
            raise PermanentError(message) from error

    def _subscribe(self, client: Client) -> None:
        if self.options.token is not None:
            client.send(json.dumps({"action": "authenticate", "token": self.options.token}))
        if self.last_id is None:
            self.last_id = client.greeting["lastId"]
        message = {
            "action": "subscribe",
            "type": self.options.type,
            "contentType": self.options.content_type,
            "since": self.last_id,
        }
        client.send(json.dumps(message))

    def _handle(self, client: Client, data: str) -> None:
        message = json.loads(data)
        payload = message["payload"]
        if "id" in message:
            print(data, flush=True)
            self.last_id = message["id"]
        elif message["type"] == "system.subscribed":
            print(f"listening to {self.options.url}", file=sys.stderr)
            self.is_subscribed = True
            if not payload["recovered"]:
                print("some events were missed and are lost", file=sys.stderr)
                self.last_id = client.greeting["lastId"]
        elif message["type"] == "system.heartbeat":
            client.send('{"action": "pong"}')
            self.pause = 1.0
            if self.is_subscribed:
                self.last_id = payload["lastId"]
        elif message["type"] == "system.error":
            raise PermanentError(payload["message"])

    def wait(self) -> None:
        # A random time, because all clients of a server that restarts lose it at the same moment.
        time.sleep(self.pause * random.uniform(0.5, 1))
        self.pause = min(self.pause * 2, self.MAX_PAUSE)


def listen(options: argparse.Namespace) -> int:
    """Print events until Ctrl+C. Return 1 if connecting again would not help."""
    listener = Listener(options)
    while True:
        try:
            listener.run()
        except PermanentError as error:
            print(error, file=sys.stderr)
            return 1
        except CONNECTION_ERRORS as error:
            print(f"no connection to {options.url} ({error}); retrying", file=sys.stderr)
        listener.wait()


class Finding(NamedTuple):
    """One line that check() prints, with a hint if `is_ok` is False."""

    is_ok: bool
    message: str
    hint: str


def check(options: argparse.Namespace) -> int:
    """Print a tick or a cross for each check. Return 1 if there is a cross."""
    exit_code = 0
    for finding in find_problems(options.url):
        if finding.is_ok:
            print(f"✓ {finding.message}", flush=True)
        else:
            print(f"✗ {finding.message}\n    {finding.hint}", flush=True)
            exit_code = 1
    return exit_code


def find_problems(url: str) -> Iterator[Finding]:
    """Check the things that often go wrong in a deployment."""
    try:
        client = Client(url)
    except CONNECTION_ERRORS as error:
        yield Finding(False, f"cannot connect to {url}: {error}", hint_for(error))
        return
    yield Finding(True, "the handshake succeeds, and the server sends its greeting", "")
    yield from _check_refusals(url)
    yield from _check_concurrent_clients(url)
    hint = "A proxy does not pass close frames."
    yield Finding(_is_close_answered(client), "the server answers a close frame", hint)


def _check_refusals(url: str) -> Iterator[Finding]:
    """Connect as a page of the site, as a page of another site, and with an invalid token."""

    def connect(url: str, **headers: str) -> int:
        """Return 101, or the HTTP status of the refusal."""
        try:
            Client(url, **headers).close()
        except CONNECTION_ERRORS as error:
            return status_of(error)
        return 101

    # The library sends a Host header without the port, so the origin has none either.
    parts = urlsplit(url)
    own = f"{parts.scheme.replace('ws', 'http')}://{parts.hostname}"
    yield Finding(connect(url, Origin=own) == 101, f"a page of {own} may connect", HINTS[403])
    hint = "Pages of all sites may connect with your visitors' cookies: set SWIFTCMS_WS_ORIGINS."
    is_refused = connect(url, Origin="https://swiftcms-ws-check.example") == 403
    yield Finding(is_refused, "a page of another site is refused", hint)
    separator = "&" if "?" in url else "?"
    hint = "The answer should be 401. Does a proxy remove the query?"
    is_refused = connect(f"{url}{separator}token=bad") == 401
    yield Finding(is_refused, "an invalid token is refused", hint)


def _check_concurrent_clients(url: str) -> Iterator[Finding]:
    """Connect several clients at once, and use them to check the server processes they reach."""
    with ThreadPoolExecutor(CONCURRENT_CLIENTS) as pool:
        attempts = [pool.submit(Client, url) for _ in range(CONCURRENT_CLIENTS)]
    errors = [error for attempt in attempts if (error := attempt.exception())]
    clients = [attempt.result() for attempt in attempts if not attempt.exception()]
    if errors:
        message = f"of {CONCURRENT_CLIENTS} clients at once, only {len(clients)} are accepted"
        yield Finding(False, message, hint_for(errors[0]))
    else:
        yield Finding(True, f"{CONCURRENT_CLIENTS} clients at once are accepted", "")
    if clients:
        yield _check_processes(clients)
    for client in clients:
        client.close()


def _check_processes(clients: list[Client]) -> Finding:
    """Check that an event reaches the clients of all server processes."""
    of_process = {client.greeting["clientId"][:PROCESS_LENGTH]: client for client in clients}
    one_each = list(of_process.values())
    seen = f"server processes seen: {len(one_each)}"
    # No process has such an old event in memory, so it looks into the shared log, if it has one.
    is_answered = [_is_known(client, "1-0") is not None for client in one_each]
    # Ask each process for the newest event of the next one. A single process is asked for its own.
    neighbours = zip(one_each, one_each[1:] + one_each[:1], strict=True)
    is_known = [_is_known(client, next_one.greeting["lastId"]) for client, next_one in neighbours]
    if not all(is_answered):
        hint = (
            "The site's log says what is wrong with the file of SWIFTCMS_WS_DATABASE. With"
            " SWIFTCMS_WS_REDIS_URL: Is Redis running, and is the URL right?"
        )
        return Finding(False, f"{seen}; they cannot read the shared log, so no event arrives", hint)
    if not all(is_known):
        hint = (
            "Set SWIFTCMS_WS_DATABASE (or, on several machines, SWIFTCMS_WS_REDIS_URL), or run one"
            " process."
        )
        return Finding(False, f"{seen}; an event reaches only the clients of one", hint)
    return Finding(True, f"{seen}; an event reaches the clients of all of them", "")


def _is_known(client: Client, event_id: str) -> bool | None:
    """Return whether this client could resume after the event, or None if it gets no answer."""
    message = {
        "action": "subscribe",
        "type": "swiftcms_ws.check",
        "contentType": "none",
        "since": event_id,
        "ref": "check",
    }
    try:
        client.send(json.dumps(message))
        while (data := client.receive(REPLY_TIMEOUT)) is not None:
            answer = json.loads(data)
            if answer.get("ref") == "check":
                # An error has no `recovered`: this client may not ask.
                return bool(answer["payload"].get("recovered", True))
    except CONNECTION_ERRORS:
        pass
    return None


def _is_close_answered(client: Client) -> bool:
    try:
        client.sock.send(client.ws.send(CloseConnection(code=1000)))
        while client.receive(REPLY_TIMEOUT):
            pass
    except CONNECTION_ERRORS as error:
        return getattr(error, "reason", None) == 1000
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="swiftcms-ws",
        description="Real-time push for small Flask sites. Without a command, serve the demo.",
    )
    parser.set_defaults(run=serve_demo)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--host", default="localhost", help="address of the demo (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port of the demo (%(default)s)")
    commands = parser.add_subparsers(title="commands")

    listener = commands.add_parser("listen", help="print events as lines of JSON, and reconnect")
    listener.set_defaults(run=listen)
    listener.add_argument("url", type=websocket_url, help="such as ws://localhost:8080/ws")
    listener.add_argument("--type", default="*", help="event type or prefix (%(default)s)")
    listener.add_argument(
        "--content-type", default="*", help="content type or prefix (%(default)s)"
    )
    listener.add_argument("--token", help="a JWT to sign in with")

    checker = commands.add_parser("check", help="check a deployed site, and say what to change")
    checker.set_defaults(run=check)
    checker.add_argument("url", type=websocket_url, help="such as wss://example.org/ws")

    options = parser.parse_args(argv)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130


# == 18. Demo ====================================================================================

# The longest text of each field of a request, in characters.
DEMO_LENGTHS = {"title": 200, "body": 10_000, "line": 40, "to": 40, "user": 40, "text": 500}


class DemoEntries:
    """The demo's posts and pages, in memory.

    Called from the web server's threads. An entry in the dictionary is never changed, only
    replaced, so it may be returned without a copy.
    """

    def __init__(self) -> None:
        # Guards the entries. A change also publishes its event under it, so that events have the
        # order of the changes.
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, int], dict[str, Any]] = {}
        # Posts and pages share one counter, and an id is never used again.
        self._ids = itertools.count(1)
        for content_type, title, body, state in (
            ("posts", "Hello, class", "Open a second window and edit this post.", "published"),
            ("posts", "Nothing is lost", "Cut the connection, edit elsewhere, and wait.", "draft"),
            ("pages", "About us", "We are the people at the other end.", "published"),
        ):
            self._add(content_type, title, body, state, "SwiftCMS")

    def _add(
        self, content_type: str, title: str, body: str, state: str, user: str
    ) -> dict[str, Any]:
        entry_id = next(self._ids)
        entry = {
            "id": entry_id,
            "title": title,
            "body": body,
            "state": state,
            "version": 1,
            "updated_by": user,
        }
        self._entries[content_type, entry_id] = entry
        return entry

    def all(self, content_type: str) -> list[dict[str, Any]]:
        with self._lock:
            return [entry for key, entry in self._entries.items() if key[0] == content_type]

    def get(self, content_type: str, entry_id: int) -> dict[str, Any]:
        entry = self._entries.get((content_type, entry_id))
        if entry is None:
            abort(404, f"there is no {content_type}/{entry_id}, or it was deleted")
        return entry

    def create(self, content_type: str, title: str, body: str, user: str) -> dict[str, Any]:
        with self._lock:
            entry = self._add(content_type, title, body, "draft", user)
            publish("content.created", content_type, entry)
        return entry

    def change(
        self,
        event_type: str,
        content_type: str,
        entry_id: int,
        values: Mapping[str, str],
        version: int | None = None,
    ) -> dict[str, Any]:
        """Change an entry. Answer 409 if `version` is given and is not the entry's version."""
        with self._lock:
            entry = self.get(content_type, entry_id)
            if version is not None and version != entry["version"]:
                message = f"{entry['updated_by']} saved version {entry['version']} in the meantime"
                abort(make_response({"message": message, "entry": entry}, 409))
            entry = {**entry, **values, "version": entry["version"] + 1}
            self._entries[content_type, entry_id] = entry
            publish(event_type, content_type, entry)
        return entry

    def delete(self, content_type: str, entry_id: int) -> dict[str, Any]:
        with self._lock:
            entry = self.get(content_type, entry_id)
            del self._entries[content_type, entry_id]
            publish("content.deleted", content_type, entry)
        return entry


class DemoCuts:
    """Cuts connections, so that a class can watch a client reconnect and resume.

    A page names its connection in the address: /ws?line=NAME. Called from the web server's
    threads and from workers; each step on one of its dictionaries is atomic.
    """

    SECONDS = 5.0

    def __init__(self, app: Flask) -> None:
        self._client_ids: dict[str, str] = {}
        self._cut_until: dict[str, float] = {}
        # This keeps the object alive. The signal only has a weak reference to it.
        app.before_request(self._delay_handshake)
        client_connected.connect(self._note_name, sender=app)

    def _note_name(self, sender: Flask, client_id: str, **details: Any) -> None:
        """Signal receiver, in a request context of the client's handshake."""
        if "line" in request.args:
            self._client_ids[request.args["line"]] = client_id

    def _delay_handshake(self) -> None:
        """Leave the handshake of a cut connection without an answer, as a broken network would.

        The web server has a thread for each request, so this delays no other client. If the
        connection is cut again meanwhile, the client gets 503 and has to try again.
        """
        name = request.args.get("line", "")
        time.sleep(max(0.0, self._cut_until.get(name, 0.0) - time.monotonic()))
        if self._cut_until.get(name, 0.0) > time.monotonic():
            abort(503, "the connection was cut again")

    def cut(self, name: str) -> None:
        """Break a connection without a close frame, as if its cable were pulled."""
        client_id = self._client_ids.get(name)
        if client_id is None:
            abort(404, "there is no connection of this name")
        self._cut_until[name] = time.monotonic() + self.SECONDS
        engine = hub._engine()
        connection = engine.registry.find(client_id)
        if connection is not None:
            engine.loop.call(connection.abort)


def request_text(name: str, default: str | None = None) -> str:
    """Return a text from the request's JSON object, or from the query of a GET. Else answer 400."""
    fields = request.args if request.method == "GET" else request.get_json()
    value = fields.get(name, default) if isinstance(fields, Mapping) else None
    shortest, longest = 0 if default is not None else 1, DEMO_LENGTHS[name]
    if not isinstance(value, str) or not shortest <= len(value.strip()) <= longest:
        abort(400, f"`{name}` must be a string of {shortest} to {longest} characters")
    return value.strip()


def demo_app() -> Flask:
    """Return a small CMS with a REST API. Its pages show each other's changes."""
    app = Flask(__name__)
    app.config.update(
        # A new key, so that tokens of other sites are not accepted here.
        SWIFTCMS_WS_JWT_KEY=secrets.token_hex(),
        SWIFTCMS_WS_INSPECTOR=True,
        # The demo must not join the shared log of a site.
        SWIFTCMS_WS_DATABASE=None,
        SWIFTCMS_WS_REDIS_URL=None,
    )
    # Fields in their own order are easier to read in the inspector.
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.register_blueprint(blueprint)
    settings = Settings.from_config(app.config)
    entries = DemoEntries()
    cuts = DemoCuts(app)
    list_url = "/api/<any(posts, pages):content_type>"
    entry_url = f"{list_url}/<int:entry_id>"

    def user_id() -> str:
        """Return the user of this request, by the same token that the page uses for /ws."""
        if request.authorization is None:
            return "nobody"
        try:
            return check_token(settings, request.authorization.token or "").id
        except ClientError as error:
            abort(401, str(error))

    @app.errorhandler(HTTPException)
    def error_as_json(error: HTTPException) -> ResponseReturnValue:
        return {"message": error.description}, error.code or 500

    @app.get("/")
    def page() -> ResponseReturnValue:
        return render_page(demo=True)

    @app.get(list_url)
    def list_entries(content_type: str) -> ResponseReturnValue:
        return entries.all(content_type)

    @app.post(list_url)
    def create_entry(content_type: str) -> ResponseReturnValue:
        title, body = request_text("title"), request_text("body", "")
        return entries.create(content_type, title, body, user_id()), 201

    @app.get(entry_url)
    def get_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        return entries.get(content_type, entry_id)

    @app.put(entry_url)
    def update_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        values = {
            "title": request_text("title"),
            "body": request_text("body", ""),
            "updated_by": user_id(),
        }
        version = request.get_json().get("version")
        if not isinstance(version, int):
            abort(400, "`version` must be the number of the version that was changed")
        return entries.change("content.updated", content_type, entry_id, values, version)

    @app.delete(entry_url)
    def delete_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        # An invalid token is refused here too.
        user_id()
        return entries.delete(content_type, entry_id)

    @app.post(f"{entry_url}/publish")
    def publish_entry(content_type: str, entry_id: int) -> ResponseReturnValue:
        # A form on another site cannot send JSON.
        request.get_json()
        values = {"state": "published", "updated_by": user_id()}
        return entries.change("content.published", content_type, entry_id, values)

    @app.get("/api/token")
    def token() -> ResponseReturnValue:
        # A class has no passwords, so a visitor may have any name. A site checks its login here.
        return {"token": hub.issue_token(request_text("user"))}

    @app.post("/api/notices")
    def notify() -> ResponseReturnValue:
        recipient = request_text("to")
        notice = {"from": user_id(), "text": request_text("text")}
        return {"id": publish("notification", "users", notice, to=recipient)}, 201

    @app.post("/api/cut")
    def cut() -> ResponseReturnValue:
        cuts.cut(request_text("line"))
        return {"seconds": cuts.SECONDS}

    return app


def serve_demo(options: argparse.Namespace) -> int:
    """Serve the demo until Ctrl+C or SIGTERM. Return the exit code."""
    host, port = options.host, options.port
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            reason = "another program uses it; choose another port with --port"
        print(f"swiftcms-ws cannot listen on {host} port {port}: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Otherwise the hub would use the shared log that the environment names.
    for key in ("DATABASE", "REDIS_URL"):
        os.environ.pop(CONFIG_PREFIX + key, None)
    with listener:
        server = make_server(host, port, demo_app(), threaded=True, fd=listener.fileno())
    shown_host = f"[{host}]" if ":" in host else host
    print(f"SwiftCMS demo: http://{shown_host}:{server.port}/ (press Ctrl+C to stop)", flush=True)
    try:
        server.serve_forever()
    finally:
        hub.close()
    return 0


# == 19. client.js and pages =====================================================================


def render_page(*, demo: bool) -> str:
    """Return the inspector: alone for GET /ws, or beside the demo's CMS."""
    if not demo:
        return render_template_string(PAGE, demo=False, ws_url=request.root_path + request.path)
    return render_template_string(
        PAGE,
        demo=True,
        ws_url=url_for("swiftcms_ws.about"),
        client_js_url=url_for("swiftcms_ws.client_js"),
    )


CLIENT_JS = r"""// Live events of SwiftCMS in the browser. Reconnects, and resumes where it was.
//
//   const cms = new SwiftCMS()              // or new SwiftCMS({url, token, since})
//   const stop = cms.subscribe("content.*", "posts", event => show(event.payload))
//   cms.onstatus = status => …              // "connecting", "online", "offline" or "refused"
//   cms.ongap = subscriptions => …          // events are lost: load the page's data again
//   const edit = cms.edit("posts", "42")    // the entry's other editors, and their changes
//   cms.close()
(() => {
  // The path of the WebSocket as Flask sees it. The server writes it into this line.
  const WEBSOCKET_PATH = "/ws";
  // A worker has no document, and a module has no current script.
  const page = globalThis.document;
  // Behind a proxy that strips a prefix, only the script's own address has the prefix.
  const SCRIPT_URL = page?.currentScript?.src?.match(/.*\/ws(?=\/client\.js)/)?.[0];
  // All times are in milliseconds. A token is renewed RENEWAL_LEAD before it expires.
  const CONNECT_TIMEOUT = 15_000;
  const RENEWAL_LEAD = 60_000;
  // Firefox closes connections when a link or a download is clicked. That is soon repaired.
  const OFFLINE_DELAY = 2_000;
  const UNSENT = "SwiftCMS: messages wait for two seconds; the server slows fast senders down";
  const MAX_WAIT = 30_000;
  const CLOSE = { SHUTTING_DOWN: 1001, MESSAGE_TOO_BIG: 1009, UNAUTHORIZED: 4401 };
  // Of these, only the first two need a subscription.
  const EDITING = ["user.editing", "user.stoppedEditing", "user.edited", "system.editing"];

  // An id is two numbers: milliseconds and a counter.
  const sortKey = id => id.replace(/\d+/g, number => number.padStart(20, "0"));
  const isLater = (id, other) => id && (!other || sortKey(id) > sortKey(other));
  const isMatch = (pattern, name) =>
    pattern.endsWith("*") ? name.startsWith(pattern.slice(0, -1)) : name === pattern;
  const patternOf = ({ type, contentType }) => ({ type, contentType });
  const hasKey = (set, key) => [...set].some(each => each.key === key);
  // A handler that throws must not affect others: its error becomes an unhandled rejection.
  const call = async (handler, ...values) => handler?.(...values);

  // All open connections, and the one of the SwiftCMS objects that have neither url nor token.
  const connections = new Set();
  let shared;
  for (const type of ["online", "offline", "pagehide", "pageshow", "visibilitychange"])
    addEventListener(type, event => connections.forEach(each => each.wakeUp(event)));

  // One WebSocket after the other, for one or more SwiftCMS objects.
  const createConnection = (url, givenToken) => {
    // For each SwiftCMS object its option `since`, until the client has connected.
    const clients = new Map();
    // Objects {cms, key, type, contentType, handler, stop, since, early, isLost}. All events up to
    // `since` were received, and those with the ids in `early`, because they matched another
    // subscription. If `early` is null, the subscription is live: all up to newestId were received.
    const subscriptions = new Set();
    const edits = new Set();
    // Messages {subscriptions, since, left}. The server answers them in order, and sends a replay
    // directly after its answer. `left` is how many of its events have not arrived.
    let requests = [];
    // The newest id that is known, and the newest that came over this WebSocket.
    let newestId, heardId;
    // After the server has closed the connection with 4401, only the same user is accepted.
    let isSignedOut, ownUserId;
    // isReady: the server has greeted this client, and there is a token if one is needed.
    let socket, status, isReady, maxSilence, attemptedAt, offlineTimer;
    let attempts = 0;
    let timers = {};
    const ownIds = new Set();
    const connection = { clientId: null, add, remove, subscribe, edit, wakeUp };
    const base = page?.baseURI ?? location.href;
    const address = new URL(url ?? SCRIPT_URL ?? location.origin + WEBSOCKET_PATH, base);
    address.protocol = address.protocol.replace("http", "ws");
    connections.add(connection);
    return connection;

    function add(cms, since) {
      const oldStatus = status;
      clients.set(cms, since);
      // Not now, because the page has not set its handlers yet.
      setTimeout(() => {
        if (!clients.has(cms)) return;
        if (isReady) clients.set(cms, undefined);
        if (!status || status === "refused") connect();
        else if (oldStatus) call(cms.onstatus, status);
      });
    }

    function remove(cms) {
      for (const each of [...edits, ...subscriptions]) if (each.cms === cms) each.stop();
      if (clients.delete(cms)) queueMicrotask(() => call(cms.onstatus, "offline"));
      if (clients.size) return;
      disconnect("offline");
      connections.delete(connection);
      if (shared === connection) shared = undefined;
    }

    function connect() {
      disconnect("connecting");
      attemptedAt = performance.now();
      try {
        socket = new WebSocket(address);
      } catch ({ message }) {
        return refuse(`cannot connect to ${address}, which must be like wss://HOST/ws: ${message}`);
      }
      socket.onclose = reconnect;
      socket.onmessage = ({ data }) => receive(data);
      // Messages restart it only when the client is ready, because a token may never come.
      later("silence", CONNECT_TIMEOUT, reconnect);
    }

    function disconnect(newStatus) {
      Object.values(timers).forEach(clearTimeout);
      timers = {};
      if (socket) socket.onclose = socket.onmessage = null;
      socket?.close();
      socket = heardId = undefined;
      isReady = false;
      requests = [];
      for (const each of subscriptions)
        if (!each.early) Object.assign(each, { since: newestId, early: new Set() });
      setStatus(newStatus);
    }

    function reconnect({ code, reason } = {}) {
      if (!code && heardId && !isReady)
        console.error("SwiftCMS: no token came in 15 seconds, will ask for it again");
      if (code === CLOSE.MESSAGE_TOO_BIG)
        console.error("SwiftCMS: the message that was too big is dropped; reconnecting without it");
      if (code === CLOSE.UNAUTHORIZED) isSignedOut = true;
      // A random time, so that not all clients of a server reconnect at once.
      let wait = Math.random() * Math.min(MAX_WAIT, 1_000 * 2 ** attempts);
      // Firefox itself delays an attempt after failed ones: that time has passed already.
      if (!heardId) wait -= performance.now() - attemptedAt;
      // Without a reason it was not the server that closed the connection, but the browser.
      if (code !== CLOSE.SHUTTING_DOWN || reason) attempts++;
      if (code === CLOSE.SHUTTING_DOWN && reason) wait += 1_000;
      disconnect("connecting");
      offlineTimer ??= setTimeout(() => setStatus("offline"), OFFLINE_DELAY);
      later("connect", wait, connect);
    }

    function refuse(message) {
      disconnect("refused");
      console.error(`SwiftCMS: ${message}. It will not reconnect by itself.`);
    }

    function wakeUp({ type, persisted }) {
      // The browser may keep a page that is left, and would keep its connection open.
      if (type === "pagehide") disconnect("connecting");
      else if (type === "pageshow") persisted && connect();
      else if (type === "offline") {
        if (!socket && !timers.connect) return;
        reconnect();
        setStatus("offline");
      } else if (timers.connect && !page?.hidden) connect();
      else if (isReady && !page?.hidden) {
        // The network or the tab is back: check within five seconds that the connection works.
        send({ action: "heartbeat" });
        later("silence", 5_000, reconnect);
      }
    }

    function later(timer, milliseconds, action) {
      clearTimeout(timers[timer]);
      // A longer time would be over at once.
      timers[timer] = setTimeout(action, Math.min(milliseconds, 2 ** 31 - 1));
    }

    function setStatus(newStatus) {
      // It stays offline until it is online: a notice on the page must not flicker.
      if (newStatus === "connecting" && status === "offline") return;
      if (newStatus !== "connecting") offlineTimer = clearTimeout(offlineTimer);
      if (newStatus === status) return;
      status = newStatus;
      // A handler may call close(), which must not happen in the middle of connect().
      for (const cms of clients.keys()) queueMicrotask(() => call(cms.onstatus, newStatus));
    }

    // Until the client is ready, messages are dropped: greet() then sends the current state.
    function send(message) {
      if (!isReady) return;
      const text = JSON.stringify(message);
      // Started by the first message that has to wait: the others find the buffer filled.
      if (!socket.bufferedAmount)
        later("unsent", 2_000, () => socket.bufferedAmount && console.warn(UNSENT));
      socket.send(text);
      for (const cms of clients.keys()) call(cms.onframe, "out", text);
    }

    function receive(text) {
      const { type, contentType, payload, id, timestamp } = JSON.parse(text);
      if (isReady) later("silence", maxSilence, reconnect);
      for (const cms of clients.keys()) call(cms.onframe, "in", text);
      // That handler may have closed the connection.
      if (!socket) return;
      if (type === "system.connected") greet(payload);
      else if (type === "system.authenticated") accept(payload, timestamp);
      else if (type === "system.heartbeat") {
        // A connection that lives for a heartbeat is a good one.
        attempts = 0;
        move(payload.lastId);
        send({ action: "pong" });
      } else if (type === "system.error") handleError(payload);
      else if (type === "system.subscribed") startReplay(payload);
      else if (EDITING.includes(type))
        for (const { key, update } of [...edits])
          if (key === `${contentType} ${payload.entryId}`) update(JSON.parse(text).payload);
      if (!type.startsWith("system.")) dispatch(text, type, contentType, id);
    }

    async function greet({ clientId, userId, heartbeat, lastId }) {
      const ownSocket = socket;
      connection.clientId = clientId;
      ownIds.add(clientId);
      move(lastId);
      const isStranger = isSignedOut && (userId === null || userId !== ownUserId);
      let token;
      try {
        token = typeof givenToken === "function" ? await givenToken() : !isSignedOut && givenToken;
      } catch (error) {
        console.error("SwiftCMS: no token came, will ask for it again:", error);
        return ownSocket.close();
      }
      // The connection may have been lost in the meantime.
      if (ownSocket !== socket) return;
      if (isStranger && !token) return refuse("the user is signed out");
      ownUserId = userId ?? ownUserId;
      isSignedOut = isStranger;
      isReady = true;
      // Two heartbeats, and half of one for delays.
      maxSilence = 2_500 * heartbeat;
      later("silence", maxSilence, reconnect);
      if (token) send({ action: "authenticate", token });
      for (const each of subscriptions) each.since ??= lastId;
      for (const cms of clients.keys()) clients.set(cms, undefined);
      request([...subscriptions]);
      for (const each of edits) each.send("editStart");
    }

    function accept({ userId, expiresAt }, timestamp) {
      ownUserId = userId;
      isSignedOut = false;
      if (typeof givenToken !== "function") return;
      const left = Date.parse(expiresAt) - Date.parse(timestamp);
      // If it fails, the server closes the connection, and the next one asks for a token again.
      const renew = async () => send({ action: "authenticate", token: await givenToken() });
      later("renewal", Math.max(left - RENEWAL_LEAD, left * 0.8), renew);
    }

    function handleError({ code, message, action }) {
      console.error(`SwiftCMS: ${message} (${code})`);
      if (action === "authenticate") reconnect({ code: CLOSE.UNAUTHORIZED });
      if (code !== "invalid_since") return;
      const [failed] = requests;
      for (const each of failed.subscriptions) each.since = undefined;
      request(failed.subscriptions);
      startReplay({ recovered: false, replayed: 0 });
    }

    function subscribe(cms, type, contentType, handler) {
      if (!clients.has(cms)) throw new Error("this SwiftCMS is closed; make a new one");
      const key = `${type} ${contentType}`;
      const since = clients.get(cms) ?? newestId;
      const stop = () => {
        if (subscriptions.delete(own) && !hasKey(subscriptions, key))
          send({ action: "unsubscribe", type, contentType });
      };
      const own = { cms, key, type, contentType, handler, stop, since, early: new Set() };
      subscriptions.add(own);
      if (isReady) request([own]);
      return stop;
    }

    // Subscribe and get what was missed: a message for each distinct `since`, and 1,000 items.
    function request(rest) {
      while (rest.length) {
        const { since } = rest[0];
        const group = rest.filter(each => each.since === since).slice(0, 1_000);
        rest = rest.filter(each => !group.includes(each));
        requests.push({ subscriptions: group, since });
        send({ action: "subscribe", subscriptions: group.map(patternOf), since });
      }
      proceed();
    }

    function startReplay({ refused = [], recovered, replayed }) {
      const [answered] = requests;
      for (const { type, contentType, code, message } of refused)
        console.error(`SwiftCMS: no ${type} of ${contentType}: ${message} (${code})`);
      answered.left = replayed;
      if (recovered) move(answered.since);
      else {
        // The server may have restarted with a wrong clock: only here the place moves back.
        newestId = heardId;
        for (const each of answered.subscriptions)
          Object.assign(each, { since: heardId, isLost: !EDITING.includes(each.type) });
      }
      proceed();
    }

    function proceed() {
      if (requests[0]?.left === 0)
        for (const each of requests.shift().subscriptions) each.early = null;
      if (requests.length) return;
      const lost = [...subscriptions].filter(each => each.isLost);
      for (const each of lost) each.isLost = false;
      for (const cms of new Set(lost.map(each => each.cms)))
        call(cms.ongap, lost.filter(each => each.cms === cms).map(patternOf));
      if (isReady) setStatus("online");
    }

    function move(id) {
      if (isLater(id, heardId)) heardId = id;
      if (isLater(id, newestId)) newestId = id;
    }

    function dispatch(text, type, contentType, id) {
      move(id);
      const [first] = requests;
      for (const each of [...subscriptions]) {
        if (!isMatch(each.type, type) || !isMatch(each.contentType, contentType)) continue;
        // It may be older than subscribe(), or come again after an interrupted replay.
        if (id && (!isLater(id, each.since) || each.early?.has(id))) continue;
        each.early?.add(id);
        // Each handler gets an object of its own. A handler may unsubscribe others.
        if (subscriptions.has(each)) call(each.handler, JSON.parse(text));
      }
      if (!id || !first?.left || first !== requests[0]) return;
      for (const each of first.subscriptions) each.since = id;
      first.left--;
      proceed();
    }

    function edit(cms, contentType, entryId) {
      const key = `${contentType} ${entryId}`;
      const sendEdit = (action, more) => send({ action, contentType, entryId, ...more });
      const stops = EDITING.slice(0, 2).map(type => cms.subscribe(type, contentType, () => {}));
      const handle = {
        // Objects {clientId, userId, since}. Handlers: (editors, conflict), (change, editor) => …
        editors: [],
        oneditors: null,
        onchange: null,
        send: payload => edits.has(own) && sendEdit("editChange", { payload }),
        stop: () => {
          stops.forEach(stop => stop());
          // Another handle of the same entry may go on.
          if (edits.delete(own) && !hasKey(edits, key)) sendEdit("editStop");
        },
      };
      // The server may not have noticed yet that a former connection of this page is lost.
      const isOther = each => each.clientId === connection.clientId || !ownIds.has(each.clientId);
      const update = ({ editors, editor, change }) => {
        if (!editors) return isOther(editor) && call(handle.onchange, change, editor);
        handle.editors = editors.filter(isOther);
        call(handle.oneditors, handle.editors, handle.editors.length > 1);
      };
      const own = { cms, key, send: sendEdit, update, stop: handle.stop };
      edits.add(own);
      sendEdit("editStart");
      return handle;
    }
  };

  globalThis.SwiftCMS = class SwiftCMS {
    onstatus = null;
    ongap = null;
    // (direction, text) => …, for an inspector: every message, "in" or "out".
    onframe = null;
    #connection;

    // since: the id of the newest event that the page shows already; by default the newest of all.
    constructor({ url, token, since, ...others } = {}) {
      const [unknown] = Object.keys(others);
      if (unknown !== undefined)
        throw new TypeError(`SwiftCMS has no option ${unknown}, only url, token and since`);
      if (since !== undefined && !/^\d{1,20}-\d{1,20}$/.test(since))
        throw new TypeError(`since must be the id of an event, not ${JSON.stringify(since)}`);
      if (url !== undefined || token !== undefined) this.#connection = createConnection(url, token);
      else this.#connection = shared ??= createConnection();
      this.#connection.add(this, since);
    }

    // Identifies this page among the editors of an entry.
    get clientId() {
      return this.#connection.clientId;
    }

    // Call handler(event) for each event from now on. Returns a function that unsubscribes.
    subscribe(type = "*", contentType = "*", handler) {
      const kinds = [type, contentType, handler].map(each => typeof each);
      if (kinds.join() !== "string,string,function")
        throw new TypeError("subscribe(): handler must be a function, and both types strings");
      return this.#connection.subscribe(this, type, contentType, handler);
    }

    // Make this page an editor of an entry, until edit.stop().
    edit(contentType, entryId) {
      return this.#connection.edit(this, contentType, String(entryId));
    }

    close() {
      this.#connection.remove(this);
    }
  };
})();
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ "SwiftCMS demo" if demo else "WebSocket inspector" }}</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ground: light-dark(#fff, #11161c); --panel: light-dark(#eef2f7, #1c242d);
  --ink: light-dark(#111, #f3f5f7); --quiet: light-dark(#47525e, #b6c2cf);
  --edge: light-dark(#7d8b9a, #71808f); --notice: light-dark(#fff1b8, #453800);
  --in: light-dark(#00458f, #93c7ff); --out: light-dark(#8a3a00, #ffbd80);
  --good: light-dark(#005c2a, #7ce8a6); --bad: light-dark(#a3001b, #ffa3a3);
}
/* On a projector, which is wide, the text is larger. */
html { font-size: clamp(100%, 1.15vw, 180%); }
* { box-sizing: border-box; margin: 0; }
body { background: var(--ground); color: var(--ink); font: 1.2rem/1.35 system-ui, sans-serif; }
main { display: grid; gap: 1.5rem; padding: 1rem; }
section { min-width: 0; }
ul, ol { padding: 0; list-style: none; }
.entries { margin-bottom: .7rem; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.3rem; }
.row, .row > span { display: flex; flex-wrap: wrap; gap: .5rem .7rem; align-items: end; }
.row { margin-bottom: .7rem; }
header.row, .tools { align-items: center; }
header.row > :first-child { flex: 1; }
label { display: grid; flex: 1 1 8rem; color: var(--quiet); font-size: 1rem; }
label.wide { flex-basis: 100%; }
label.check { display: flex; flex: none; gap: .4rem; align-items: center; }
input, select, textarea, button {
  min-width: 0; border: 2px solid var(--edge); border-radius: 6px;
  background: var(--ground); color: var(--ink); font: inherit;
}
label > :not([type=checkbox]) { padding: .35rem .5rem; font-size: 1.2rem; }
[type=checkbox] { width: 1.3rem; height: 1.3rem; }
textarea { resize: vertical; }
button { padding: .35rem .8rem; border-color: var(--in); color: var(--in); font-weight: 600; }
button:hover, [aria-pressed=true] { background: var(--panel); }
:focus-visible { outline: 4px solid var(--out); outline-offset: 2px; }
.state { font-weight: 700; color: var(--out); }
.online, .published { color: var(--good); }
.offline, .refused { color: var(--bad); }
#log {
  height: 60vh; overflow: auto; padding: .5rem; background: var(--panel); border-radius: .4rem;
}
#log li {
  margin-bottom: .6rem; padding-left: .6rem; border-left: 5px solid; font-family: monospace;
}
#log code { display: block; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
#log .in { color: var(--in); } #log .out { color: var(--out); } #log .note { color: var(--quiet); }
#log.calm .heartbeat { display: none; }
.entries li {
  display: flex; flex-wrap: wrap; gap: .3rem .7rem; padding: .4rem 0;
  align-items: center; justify-content: space-between; border-top: 1px solid var(--edge);
}
.entries small { display: block; color: var(--quiet); font-size: 1rem; }
#editor, #typing li, .notice { padding: .5rem .7rem; margin-bottom: .7rem; border-radius: .4rem; }
#editor { background: var(--panel); }
#typing li { background: var(--ground); }
#typing li, #theirs { white-space: pre-wrap; overflow-wrap: anywhere; }
.notice { background: var(--notice); }
.notice:empty { display: none; }
.name { padding: 0 .5rem; border-radius: 1rem; color: #fff; font-weight: 600; }
@media (min-width: 70rem) and (min-height: 40rem) {
  main { height: 100vh; grid-auto-flow: column; grid-auto-columns: 1fr; }
  main > section { overflow: auto; padding: 5px; }
  #inspector { display: flex; flex-direction: column; }
  #log { flex: 1; min-height: 15rem; }
}
</style>
</head>
<body>
<main>
{% if demo %}
<section aria-labelledby="cms">
  <header class="row">
    <h1 id="cms">A tiny CMS</h1>
    <output id="line" class="state"></output>
    <button id="cut">Cut the connection</button>
  </header>
  <form id="sign-in" class="row" autocomplete="off">
    <label>Your name, on this side
      <input name="user" required maxlength="40" pattern=".*\S.*">
    </label>
    <button>Sign in</button>
  </form>
  <p id="news" class="notice" role="status"></p>
  <ul id="notices" role="log" aria-label="Notices to you"></ul>
  <form id="editor" autocomplete="off" hidden>
    <p id="editors" class="row" role="status"></p>
    <div class="row">
      <label class="wide">Title <input name="title" required maxlength="200"></label>
      <label class="wide">Text <textarea name="body" rows="3" maxlength="10000"></textarea></label>
      <button>Save</button> <button type="button" id="leave">Close</button>
    </div>
    <div id="conflict" class="notice" role="alert" hidden>
      <p id="refusal"></p>
      <p id="theirs"></p>
      <button type="button" id="take">Take theirs</button>
      <button type="button" id="keep">Keep mine</button>
    </div>
    <ul id="typing" aria-label="What others are typing"></ul>
  </form>
  <form id="create" class="row" autocomplete="off">
    <label>New
      <select name="contentType"><option value="posts">post<option value="pages">page</select>
    </label>
    <label>Title <input name="title" required maxlength="200"></label>
    <button>Create</button>
  </form>
  <h2>Posts</h2>
  <ul id="posts" class="entries"></ul>
  <h2>Pages</h2>
  <ul id="pages" class="entries"></ul>
  <form id="tell" class="row" autocomplete="off">
    <label>Notice to <input name="to" value="ana" required maxlength="40"></label>
    <label>Text <input name="text" required maxlength="500"></label>
    <button>Send</button>
  </form>
</section>
{% endif %}
<section id="inspector" aria-labelledby="heading">
  <header class="row">
    <h1 id="heading">WebSocket inspector</h1>
    <output id="state" class="state"></output>
    <button id="toggle">Connect</button>
  </header>
  <form id="subscriptions" class="row" autocomplete="off">
    <label>type <input name="type" value="content.*"></label>
    <label>contentType <input name="contentType" value="posts"></label>
    <label>since <input name="since" placeholder="an id"></label>
    <span>
      <button value="subscribe">Subscribe</button>
      <button value="unsubscribe">Unsubscribe</button>
    </span>
  </form>
  <form id="sign" class="row" autocomplete="off">
    {% if demo %}
    <label>name <input id="whose" value="ana"></label>
    <button type="button" id="get-token">Get token</button>
    {% endif %}
    <label>token <input name="token" required></label>
    <button>Authenticate</button>
  </form>
  <form id="free" class="row" autocomplete="off">
    <label>any message <input name="text" list="examples" placeholder='{"action": …}'></label>
    <datalist id="examples">
      <option>{"action": "heartbeat", "ref": 1}
      <option>{"action": "subscribe"}
      <option>{"action": "unsubscribe"}
      <option>{"action": "presence"}
      <option>{"action": "editStart", "contentType": "posts", "entryId": "1"}
      <option>{"action": "subscrbe"}
      <option>{"action": "subscribe", "type": "con*"}
      <option>this is not JSON
    </datalist>
    <button>Send</button>
  </form>
  <div class="row tools">
    {% if demo %}
    <label class="check"><input type="checkbox" id="both"> client.js too</label>
    {% endif %}
    <label class="check"><input type="checkbox" id="calm"> no heartbeats</label>
    <button id="pause" aria-pressed="false">Pause</button>
    <button id="clear">Clear</button>
  </div>
  <ol id="log" role="log" aria-label="Messages" tabindex="0"></ol>
</section>
</main>
<script>
"use strict";
const $ = id => document.getElementById(id);
// Children that are strings become text, never markup.
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const on = (id, type, action) => $(id).addEventListener(type, action);
const onSubmit = (id, action) =>
  on(id, "submit", event => {
    event.preventDefault();
    action(Object.fromEntries(new FormData(event.target)), event);
  });
const showState = (id, state) =>
  Object.assign($(id), { textContent: state, className: `state ${state}` });

// -- The inspector: a WebSocket of its own, and all of its messages --

const MAX_MESSAGES = 500;
// Of longer messages the rest is shown after a click.
const MAX_LENGTH = 1_000;
const DIRECTIONS = { in: "← in", out: "→ out", note: "•" };
// Close codes that the browser reports without a reason.
const CLOSE_REASONS = {
  1000: "closed as asked",
  1005: "closed without a code",
  1006: "no close frame: the connection broke, or there was none",
};
const address = new URL({{ ws_url | tojson }}, location);
address.protocol = address.protocol.replace("http", "ws");
let socket = null;
// Messages to show in the next animation frame. A burst that is shown one by one blocks the page.
let waiting = [];
let isPaused = false;

const embolden = text =>
  text
    .split(/("(?:action|type)": ?"[^"]*")/)
    .map((part, index) => (index % 2 ? make("b", {}, part) : part));

function log(direction, text, source = "") {
  const now = new Date();
  const milliseconds = String(now.getMilliseconds()).padStart(3, "0");
  const time = `${now.toTimeString().slice(0, 8)}.${milliseconds}`;
  const code = make("code", {}, ...embolden(text.slice(0, MAX_LENGTH)));
  const heading = make("time", {}, `${DIRECTIONS[direction]} ${time} ${source}`);
  const message = make("li", { className: direction }, heading, code);
  message.classList.toggle("heartbeat", /"(system\.heartbeat|pong)"/.test(text));
  if (text.length > MAX_LENGTH) {
    const showAll = () => code.replaceChildren(...embolden(text));
    const label = `… ${text.length - MAX_LENGTH} more characters`;
    code.append(make("button", { onclick: showAll }, label));
  }
  waiting.push(message);
  if (waiting.length > MAX_MESSAGES) waiting.shift();
  // A hidden page gets no animation frames, so it must not ask for more and more of them.
  if (waiting.length === 1) requestAnimationFrame(showWaiting);
}

function showWaiting() {
  if (isPaused || !waiting.length) return;
  const list = $("log");
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 50;
  list.append(...waiting);
  waiting = [];
  while (list.children.length > MAX_MESSAGES) list.firstChild.remove();
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

function connect() {
  const showConnection = () => {
    const state = ["connecting", "online", "closing", "offline"][socket.readyState];
    showState("state", state);
    $("toggle").textContent = state === "offline" ? "Connect" : "Disconnect";
  };
  log("note", `connecting to ${address}`);
  socket = new WebSocket(address);
  socket.onopen = showConnection;
  socket.onmessage = ({ data }) => log("in", data);
  socket.onclose = ({ code, reason }) => {
    const explanation = reason || CLOSE_REASONS[code] || "see RFC 6455 section 7.4";
    log("note", `closed with ${code}: ${explanation}`);
    showConnection();
  };
  showConnection();
}

function send(message) {
  const text = typeof message === "string" ? message : JSON.stringify(message);
  if (socket.readyState !== WebSocket.OPEN) return log("note", "not sent: connect first");
  socket.send(text);
  log("out", text);
}

onSubmit("subscriptions", (fields, { submitter }) => {
  const filled = Object.entries(fields).filter(([, value]) => value);
  send({ action: submitter.value, ...Object.fromEntries(filled) });
});
onSubmit("sign", ({ token }) => send({ action: "authenticate", token }));
onSubmit("free", ({ text }) => send(text));
on("toggle", "click", () =>
  socket.readyState < WebSocket.CLOSING ? socket.close(1000) : connect(),
);
on("calm", "change", ({ target }) => $("log").classList.toggle("calm", target.checked));
on("clear", "click", () => $("log").replaceChildren());
on("pause", "click", ({ target }) => {
  isPaused = !isPaused;
  target.ariaPressed = isPaused;
  showWaiting();
});
connect();
log("note", "subscribe to see events");
</script>
{% if demo %}
<script src="{{ client_js_url }}"></script>
<script>
"use strict";
// -- The demo: a CMS. Only events change its lists, also if this page has changed an entry --

// The server cuts the connection with this name.
const connectionName = Math.random().toString(36).slice(2);
// "posts/7" -> {entry, element, …}
const rows = new Map();
// Keys of deleted entries, which a late response must not bring back.
const deleted = new Set();
let cms, user, token;
// The entry in the editor: {key, version, theirs, presence, typed, focused}
let opened = null;

const showNews = text => {
  $("news").textContent = text;
};
const attempt =
  action =>
  async (...values) => {
    try {
      await action(...values);
    } catch (error) {
      showNews(error.message);
    }
  };

async function api(method, path, body) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(`/api/${path}`, { method, headers, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.message), answer);
  return answer;
}
const getToken = async name => (await api("GET", `token?user=${encodeURIComponent(name)}`)).token;

function signIn(name) {
  leave();
  cms?.close();
  user = sessionStorage.user = $("sign-in").elements.user.value = name;
  cms = new SwiftCMS({
    url: `{{ ws_url }}?line=${connectionName}`,
    token: async () => (token = await getToken(user)),
  });
  let isFirst = true,
    hasGap = false,
    replayed = 0;
  cms.subscribe("content.*", "*", take);
  cms.subscribe("notification", "users", ({ payload }) => notify(payload));
  cms.ongap = () => {
    hasGap = true;
  };
  cms.onframe = (direction, text) => {
    if ($("both").checked) log(direction, text, "client.js");
    const { type, payload } = JSON.parse(text);
    if (type === "system.subscribed") replayed = payload.replayed;
  };
  cms.onstatus = state => {
    showState("line", state);
    if (state === "offline")
      showNews("The connection is lost. Changes made now will arrive when it is back.");
    if (state !== "online") return;
    if (isFirst || hasGap) load();
    const count = `${replayed} event${replayed === 1 ? "" : "s"} replayed`;
    if (isFirst) showNews("");
    else if (hasGap) showNews("Connected again: some events are lost, so everything was reloaded.");
    else showNews(`Connected again: ${count}.`);
    isFirst = hasGap = false;
  };
}

// -- Lists --

const load = attempt(async () => {
  for (const { element } of rows.values()) element.remove();
  rows.clear();
  deleted.clear();
  for (const contentType of ["posts", "pages"])
    for (const entry of await api("GET", contentType)) put(contentType, entry);
});

function take({ type, contentType, payload: entry }) {
  const key = `${contentType}/${entry.id}`;
  if (type === "content.deleted") {
    rows.get(key)?.element.remove();
    rows.delete(key);
    deleted.add(key);
  } else {
    put(contentType, entry);
    rows.get(key)?.element.animate([{ background: "var(--notice)" }, {}], 3_000);
  }
}

function put(contentType, entry) {
  const key = `${contentType}/${entry.id}`;
  if (deleted.has(key) || rows.get(key)?.entry.version > entry.version) return;
  if (!rows.has(key)) addRow(contentType, key);
  const row = rows.get(key);
  row.entry = entry;
  row.title.textContent = `${entry.title} `;
  row.state.textContent = entry.state;
  row.state.className = `state ${entry.state}`;
  row.about.textContent = `version ${entry.version}, by ${entry.updated_by}`;
}

function addRow(contentType, key) {
  const button = (label, action) => make("button", { onclick: attempt(action) }, label);
  const row = { title: make("b"), state: make("span"), about: make("small") };
  row.element = make(
    "li",
    {},
    make("div", {}, row.title, row.state, row.about),
    make(
      "div",
      {},
      button("Edit", () => openEditor(key, row.entry)),
      " ",
      button("Publish", () => api("POST", `${key}/publish`, {})),
      " ",
      button("Delete", () => api("DELETE", key)),
    ),
  );
  rows.set(key, row);
  $(contentType).prepend(row.element);
}

// -- Editor --

function openEditor(key, entry) {
  leave();
  const presence = cms.edit(...key.split("/"));
  opened = { key, presence, typed: new Map(), focused: document.activeElement };
  presence.oneditors = showOthers;
  presence.onchange = (change, { clientId }) => {
    // A change that was sent from the inspector may be any JSON.
    const isText = typeof change?.title === "string";
    const text = isText ? `${change.title}\n${change.body}` : JSON.stringify(change);
    opened.typed.set(clientId, text);
    showOthers();
  };
  showOthers();
  fill(entry);
  $("editor").hidden = false;
  $("editor").elements.title.focus();
}

function leave() {
  if (!opened) return;
  opened.presence.stop();
  $("editor").hidden = true;
  opened.focused.focus();
  opened = null;
}

function fill(entry) {
  opened.version = entry.version;
  $("editor").elements.title.value = entry.title;
  $("editor").elements.body.value = entry.body;
  $("conflict").hidden = true;
}

const written = () => Object.fromEntries(new FormData($("editor")));

const save = attempt(async () => {
  const saved = opened;
  try {
    await api("PUT", saved.key, { ...written(), version: saved.version });
    // The user may have opened another entry meanwhile.
    if (opened === saved) leave();
  } catch (error) {
    if (!error.entry || opened !== saved) throw error;
    saved.theirs = error.entry;
    $("refusal").textContent = `Not saved: ${error.message}. That version is:`;
    $("theirs").textContent = `${error.entry.title}\n${error.entry.body}`;
    $("conflict").hidden = false;
  }
});

const nameOf = ({ userId, clientId }) => {
  const hue = parseInt(clientId.slice(-4), 16) % 360;
  const style = `background: hsl(${hue} 70% 28%)`;
  return make("span", { className: "name", style }, userId ?? "somebody");
};

function showOthers() {
  const others = opened.presence.editors.filter(({ clientId }) => clientId !== cms.clientId);
  $("editors").className = others.length ? "notice row" : "row";
  $("editors").replaceChildren(
    ...(others.length
      ? ["Also editing this:", ...others.map(nameOf), "The second to save will be asked."]
      : ["Nobody else is editing this."]),
  );
  const typing = others.filter(({ clientId }) => opened.typed.has(clientId));
  $("typing").replaceChildren(
    ...typing.map(other =>
      make("li", {}, nameOf(other), ` is typing:\n${opened.typed.get(other.clientId)}`),
    ),
  );
}

onSubmit("editor", save);
on("editor", "input", () => opened.presence.send(written()));
on("leave", "click", leave);
on("take", "click", () => {
  fill(opened.theirs);
  opened.presence.send(written());
});
on("keep", "click", () => {
  opened.version = opened.theirs.version;
  save();
});

// -- Other forms --

function notify({ from, text }) {
  $("notices").prepend(make("li", { className: "notice" }, make("b", {}, from), `: ${text}`));
  while ($("notices").children.length > 3) $("notices").lastChild.remove();
}

onSubmit("sign-in", ({ user: name }) => signIn(name));
onSubmit(
  "create",
  attempt(async ({ contentType, title }, { target }) => {
    await api("POST", contentType, { title });
    target.elements.title.value = "";
  }),
);
onSubmit(
  "tell",
  attempt(async ({ to, text }, { target }) => {
    await api("POST", "notices", { to, text });
    target.elements.text.value = "";
    showNews(`Sent to ${to}, in every window where ${to} is signed in.`);
  }),
);
on(
  "cut",
  "click",
  attempt(async () => {
    const { seconds } = await api("POST", "cut", { line: connectionName });
    showNews(
      `The connection is cut for ${seconds} seconds. Changes made now will arrive after it.`,
    );
  }),
);
on(
  "get-token",
  "click",
  attempt(async () => {
    $("sign").elements.token.value = await getToken($("whose").value);
  }),
);
const NAMES = ["ana", "ben", "cleo", "dario", "eva"];
signIn(sessionStorage.user ?? NAMES[Math.floor(Math.random() * NAMES.length)]);
</script>
{% endif %}
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
