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
    stream        a connection over plain HTTP: a response that does not end (GET /ws/events)
    poll          the same request, if its response ends at once and the client asks again
    framing       how messages are encoded: as WebSocket frames, or as an event stream
    live page     a page with `data-live`: it fetches itself again after an event (a refresh)
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
    Loop.deliver        takes a batch of events       Connection.serve reads from the socket
      |                                                 |
    Registry.matching   finds the subscribers         Session.receive  parses, limits the rate
      |                                                 |
    Connection.send_to_all  writes to sockets         actions()        one function for each action
      |                                                 |  (a worker runs the hook, if there is one)
    History.add         keeps the events              Session.answer   sends the answer

With a shared log, SharedLog.append gives the ids in place of Loop.publish, and the follower of each
process queues the events with Loop.submit.

Threads of each engine. They start with its first connection or, without a shared log, its first
event; a call such as flush() or disconnect() also starts them.
    loop          owns the order of events, all sockets, the history and the editors; never blocks
    heartbeat     asks the loop to send heartbeats; closes the engine if gunicorn stops its worker
    workers 1-4   run authorize, receivers of client_connected and client_disconnected, and log
                  handlers; read from and write to the shared log. They start with the first task
    follower      reads the shared log, if there is one
identify runs in the web server's thread, and receivers of event_published in the publisher's.
For plain HTTP, authorize runs in the web server's thread too.

What each lock guards (comments where the locks are created say more)
    Hub._starting    creating and starting an engine
    EventQueue._lock ids and the queue              Registry._lock   connections, subscriptions
    Workers._lock    tasks and threads              Editing._lock    editors of entries
    Counters._lock   the numbers of stats()         SerialQueue._lock one queue of ordered tasks
    LogFile._queue   one connection to its file     _fork_lock       two forks at the same time
    SharedLog._appended_lock  the newest id that this process has appended, for flush()
A thread holds one lock at a time, except that it may take others while it holds Hub._starting.
No code of the site, no logging and no network I/O runs while a lock is held. LogFile._queue is used
as a lock: the thread that is first in it reads and writes the file.

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
import codecs
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import heapq
import http.client
import importlib
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
import secrets
import selectors
import signal
import socket
import ssl
import string
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
from contextlib import ExitStack, closing, contextmanager, suppress
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit
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
    from blinker import NamedSignal, Namespace
    from flask import (
        Blueprint,
        Flask,
        Response,
        abort,
        current_app,
        has_request_context,
        make_response,
        render_template_string,
        request,
        url_for,
    )
    from flask import session as flask_session
    from flask.sessions import SessionInterface, SessionMixin
    from flask.typing import ResponseReturnValue
    from flask_sock import Sock
    from jwt.algorithms import get_default_algorithms
    from werkzeug.datastructures import Headers
    from werkzeug.exceptions import HTTPException
    from werkzeug.http import http_date
    from werkzeug.serving import make_server
    from werkzeug.wsgi import ClosingIterator
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
    "is_live_refresh",
    "publish",
    "publish_many",
]

logger = logging.getLogger("swiftcms_ws")

# == 1. Map: settings, signals, errors ===========================================================

CONFIG_PREFIX = "SWIFTCMS_WS_"
# The most characters of a type, a content type, an entry's id or a user's id. They are limited
# because clients send them, and the server keeps them in memory.
MAX_NAME_LENGTH = 128
# The connection of a client that stays silent for this many heartbeats is closed.
MISSED_HEARTBEATS = 2
# Each client id begins with the id of its process, which has this many characters.
PROCESS_ID_LENGTH = 8


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
#: after the event is queued or, with a shared log, stored. The sender of all three signals is the
#: app. A hub without an app is itself the sender.
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

    If Redis received the event and then stopped answering, clients may receive the event in spite
    of the error. If it is then published again, they receive it twice.
    """


class LogUnavailable(Exception):
    """The shared log cannot be read now."""


class ClientError(Exception):
    """A client's message cannot be carried out, or its connection has to be closed.

    code:        the `code` of the system.error, such as "invalid_json"
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
    # Both arguments may come from a client. For long words, or thousands of them, difflib would
    # take 100 ms.
    short = [choice for choice in itertools.islice(choices, 50) if len(choice) <= MAX_NAME_LENGTH]
    nearest = difflib.get_close_matches(word[:MAX_NAME_LENGTH], short, 1)
    if not nearest:
        return ""
    return f" (did you mean `{prefix}{nearest[0]}`?)"


def _setting(default: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
    """Return a field of Settings.

    expected: describes the accepted values in the error message for another one
    accepts:  returns whether a value is accepted
    """
    return dataclasses.field(default=default, metadata={"expected": expected, "accepts": accepts})


def _number(
    default: float | None,
    expected: str,
    minimum: float,
    kinds: Any = (int, float),
    maximum: float = float("inf"),
) -> Any:
    def accepts(value: Any) -> bool:
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and minimum <= value <= maximum and value != float("inf")

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
    # A URL of SQLAlchemy would become the name of a file. Processes could not share ":memory:".
    is_file = isinstance(path, str) and not path.startswith((":", "sqlite:", "file:"))
    return is_file and path.strip() != "" and "\0" not in path


def _are_strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _are_algorithms(value: Any) -> bool:
    # All must be of one family. With HS256 and RS256 in one list, anybody could sign a token with
    # the public key.
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
    heartbeat: float = _number(25, "seconds, from 0.01 to 86,400", 0.01, maximum=86_400)
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
    # Flask's SECRET_KEY_FALLBACKS, if `jwt_key` is Flask's SECRET_KEY. There is no config key for
    # it, so the field has no metadata.
    fallback_keys: Sequence[str | bytes] = dataclasses.field(default=(), metadata={})

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
            shown = repr(value)
            if field.name == "jwt_key":
                shown = "this value"
            expected = field.metadata["expected"]
            raise ValueError(f"config key {key} must be {expected}, not {shown}")

    def check_key(self) -> None:
        """Raise ValueError if the key does not fit the algorithms.

        Otherwise every token would be refused.
        """
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
        """Raise ValueError if the path of the shared log is wrong, or if two logs are set."""
        if self.database is not None and not _is_path(self.database):
            # The path is an argument of Hub() or an environment variable. If it were a config key,
            # from_config() would have named the key.
            raise ValueError(f"the database must be the path of a file, not {self.database!r}")
        if self.database is not None and self.redis_url is not None:
            raise ValueError(
                f"{CONFIG_PREFIX}DATABASE and {CONFIG_PREFIX}REDIS_URL are both set: choose the"
                " file if the site runs on one machine, or Redis if it runs on several"
            )

    @classmethod
    def of_app(cls, app: Flask | None, logs: Mapping[str, Any]) -> Settings:
        """Return the settings of an app, or of a script without one.

        The shared log is the one of the config keys; if neither key is set, that of `logs`; and if
        that is empty too, that of the environment variables SWIFTCMS_WS_DATABASE and
        SWIFTCMS_WS_REDIS_URL.

        logs: the arguments `database` and `redis_url` of Hub()
        """
        settings = cls() if app is None else cls.from_config(app.config)
        changes: dict[str, Any] = {}
        if settings.database is None and settings.redis_url is None:
            if any(value is not None for value in logs.values()):
                changes |= logs
            else:
                for key in logs:
                    changes[key] = os.environ.get(CONFIG_PREFIX + key.upper()) or None
        if app is not None and settings.jwt_key is None and app.secret_key:
            changes["jwt_key"] = app.secret_key
            changes["fallback_keys"] = tuple(app.config.get("SECRET_KEY_FALLBACKS") or ())
        settings = dataclasses.replace(settings, **changes)
        settings.check_key()
        settings.check_log()
        return settings


# I  From publish() to the socket
# == 2. Hub: the public API ======================================================================

Hook = TypeVar("Hook", bound="Callable[..., Any]")

T = TypeVar("T")


class WeakList(Generic[T]):
    """Objects that exist only as long as something else refers to them.

    Any thread may call its methods: each step is atomic. A signal handler and a forked child copy
    such a list too. Copying a WeakSet fails if another thread adds an object at the same time.
    """

    def __init__(self) -> None:
        self._references: list[weakref.ref[T]] = []

    def add(self, item: T) -> None:
        self._references.append(weakref.ref(item, self._references.remove))

    def copy(self) -> list[T]:
        references = list(self._references)
        return [item for reference in references if (item := reference()) is not None]

    def clear(self) -> None:
        self._references.clear()


# The hubs of this process. A forked child resets them.
_hubs: WeakList[Hub] = WeakList()


class Hub:
    """The public API of a site: publish(), the hooks, and a blueprint with the /ws route.

    Any thread may call any method. A hub may be registered with several apps; each app has an
    engine of its own, in app.extensions["swiftcms_ws"]. Inside an application context a hub uses
    the engine of that app. Outside one it uses the only app that it is registered with or, if there
    are several, the only one that has served a connection.

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
        # A tracker for each session class: a second track() of a class adds to the first one.
        self._trackers: weakref.WeakKeyDictionary[type, Tracker] = weakref.WeakKeyDictionary()
        # The references are weak, so that an app which a job or a test created can be freed.
        self._app_refs: list[weakref.ref[Flask]] = []
        # The engine of a hub without an app.
        self._script_engine: Engine | None = None
        # Held while an engine is created or started, so that each app gets one engine. An engine is
        # stored after it is complete, so other threads may look it up without the lock.
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

        Call this after the commit, because a client may ask for the data at once. No application
        context is needed. The event is queued, or stored in the shared log, so the number of
        clients makes no difference. Without a shared log, publish() waits while 8 MiB of events
        are queued.

        event_type:   such as "content.created": words joined by dots, none under "system."
        content_type: such as "posts"
        payload:      anything that `app.json` can serialise
        to:           a user id or several (str, int or UUID): only these users receive the event

        Raises TypeError or ValueError, naming the argument, if one is wrong. No event is sent then.
        Raises PublishError within two seconds if the shared log does not store the event, and
        RuntimeError if it is not clear which app is meant, or if a signal handler calls this
        while its thread is inside publish(). An exception of a receiver of `event_published` is
        raised too, but then the event was published.
        """
        return self.publish_many([(event_type, content_type, payload, to)])[0]

    def publish_many(self, events: Iterable[tuple[Any, ...]]) -> list[str]:
        """Send events, each a tuple of publish()'s arguments in their order; return their ids.

        All events are sent, or none. The exceptions are those of publish().
        """
        engine = self._engine()
        # `to` is read twice: by draft(), and by the receivers of event_published.
        events = [(*event[:3], *map(_list_if_iterator, event[3:])) for event in events]
        return self.publish_drafts(engine, events, [engine.draft(*event) for event in events])

    def publish_drafts(
        self, engine: Engine, events: Sequence[tuple[Any, ...]], drafts: list[Draft]
    ) -> list[str]:
        """Send events that are checked and serialised already; return their ids."""
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

    def track(
        self,
        session: Any,
        models: Mapping[type, Any],
        *,
        payload: Callable[[Any], Any] | None = None,
        to: Any = EVERYONE,
    ) -> None:
        """Publish what SQLAlchemy sessions insert, update and delete, after each commit.

            hub.track(db.session, {Post: "posts"})

        session: a scoped_session, a sessionmaker or a Session class
        models:  the content type of each class, or a function of the object that returns it
        payload: a function of the object; without it, the payload is {"id": primary key}
        to:      a function of the object that returns publish()'s `to`

        The events are content.created, content.updated and content.deleted. Statements such as
        update() and delete() are not seen. The functions are called with an object in its last
        state before COMMIT or, if it is deleted, before DELETE. If a function raises, or returns a
        value that publish() refuses, commit() raises the exception, and nothing is saved. If
        publishing fails after COMMIT, the failure is logged.

        Raises TypeError or ValueError if an argument is wrong, RuntimeError if this hub tracks a
        class already in another way, and ImportError if SQLAlchemy is missing.
        """
        session_class = find_session_class(session)
        for other in {*self._trackers} - {session_class}:
            if issubclass(other, session_class) or issubclass(session_class, other):
                raise RuntimeError(f"this hub tracks sessions of {other!r} already: use that class")
        new = Tracker(self)
        # setdefault() is atomic. Two threads may run an application factory at the same time.
        tracker = self._trackers.setdefault(session_class, new)
        if tracker is new:
            tracker.listen(session_class)
        tracker.add(models, payload, to)

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
        `user` is a User or None. The other two are the pattern that the client sent, such as
        "content.*" and "posts.*": return True only if the user may receive everything that it
        matches. To edit an entry, a client needs the event type "user.editing". The hook runs in a
        worker, in a request context of its own; for plain HTTP it runs in the request.

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
        (pauses of clients that sent too fast), `polls`, `errors`, and, if there was one,
        `error_CODE`, `closed_CODE` (closed by the server) and `refused_STATUS`.
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
            # The follower asks the other processes for their editors.
            self.start(engine)
        editors = engine.editing.editors((content_type, str(entry_id)))
        return [editor.as_json() for editor in editors]

    def disconnect(self, user_id: Any, session: Any = None) -> int:
        """Close a user's connections after a logout or a ban; return their number in this process.

        Log the user out first. Otherwise the client reconnects, and the identify hook accepts it.

        session: the id of a session, as the identify hook returned it: close only its connections

        Raises PublishError if the shared log cannot be written. No connection is closed then,
        because those in other processes would stay open.
        """
        user = check_user_id(user_id, "user_id")
        if session is not None:
            session = check_user_id(session, "session")
        return self._engine().disconnect(user, session)

    def last_id(self) -> str:
        """Return the id of the newest event.

        Call it before reading the data of a page: with this id as `since`, the page then gets
        every event that its data may not contain. If a shared log has no event yet, or does not
        answer within 0.1 s, the id is 0-0, and a client that resumes from it gets
        `"recovered": false`.
        """
        return format_event_id(self._engine().newest_id() or (0, 0))

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
            with self._start_lock():
                engine = engines[self]
                if engine is None:
                    engine = engines[self] = Engine(self, app, self._logs)
        return engine

    def _engine_without_app(self) -> Engine:
        engine = self._script_engine
        if engine is not None:
            return engine
        with self._start_lock():
            if self._script_engine is None:
                engine = Engine(self, None, self._logs)
                if engine.log is None:
                    raise RuntimeError(
                        "this hub is not registered with an app, so no client could receive the"
                        " event: publish after app.register_blueprint(blueprint), or use the hub"
                        " that is registered; a script uses Hub(database=…)"
                    )
                self._script_engine = engine
            return self._script_engine

    def _engines(self) -> list[Engine]:
        """Return the engines that exist."""
        engines = [app.extensions["swiftcms_ws"].get(self) for app in self._apps()]
        return [engine for engine in (*engines, self._script_engine) if engine is not None]

    @contextmanager
    def _start_lock(self) -> Iterator[None]:
        """Hold `_starting`.

        With gunicorn --preload, this lock is created before gevent replaces the locks of Python. A
        greenlet that waited for it would block all greenlets of the process, also the one that
        holds it. sleep() is replaced, and lets them run.
        """
        with self._starting_guard:
            while self._starting.locked():
                time.sleep(0.001)
            with self._starting:
                yield

    def start(self, engine: Engine) -> None:
        """Start an engine's threads, unless they run already."""
        if not engine.is_started:
            with self._start_lock():
                engine.start()

    def prepare_app(self, app: Flask) -> None:
        """Add this hub to an app. Called when the blueprint is registered."""
        self._check_config(app)
        if "swiftcms_ws" not in app.extensions:
            LivePages(self, app)
        self._remember_app(app)
        options = app.config.setdefault("SOCK_SERVER_OPTIONS", {})
        options.setdefault("thread_class", handshake_thread)
        install_signal_handlers()
        for name in ("werkzeug", "gunicorn.access", "gunicorn.error"):
            logging.getLogger(name).addFilter(hide_token)

    @staticmethod
    def _check_config(app: Flask) -> None:
        """Raise if the configuration is wrong. The engine, which is created later, reads it again.

        So a mistake stops the site at its start, and not at the first event.
        """
        settings = Settings.from_config(app.config)
        if settings.database is not None:
            check_sqlite()
        if settings.redis_url is not None:
            import_redis()

    def _remember_app(self, app: Flask) -> None:
        engines = app.extensions.setdefault("swiftcms_ws", {})
        if self not in engines:
            engines[self] = None
            # This creates a new list, because another thread may be reading the old one.
            self._app_refs = [ref for ref in self._app_refs if ref() is not None]
            self._app_refs.append(weakref.ref(app))

    def warn_if_no_client(self, engine: Engine) -> None:
        """Log once if an event was published in a process or an app that has no clients."""
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
        """Drop all engines in a forked child, which creates new ones at the next use.

        Their threads do not exist in the child, and their locks may be held for ever.
        """
        self._starting = threading.Lock()
        self._starting_guard = ReentryGuard(self._starting)
        for engine in self._engines():
            engine.close_copies()
        for app in self._apps():
            app.extensions["swiftcms_ws"][self] = None
        self._script_engine = None


def _list_if_iterator(value: Any) -> Any:
    """Return a list of an iterator's items, and any other value as it is."""
    if isinstance(value, Iterator):
        return list(value)
    return value


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


# == 3. Engine: creates, starts and stops the parts ==============================================


class Engine:
    """Everything that runs for one app of one hub in one process.

    It is created at the first use of the hub, from the configuration of that time. Its threads and
    descriptors are created later, by start(): for the first connection, or the first call that
    needs the loop. Any thread may call its methods, except those marked "Loop only". A forked child
    creates a new engine.
    """

    def __init__(self, hub: Hub, app: Flask | None, logs: Mapping[str, Any]) -> None:
        self.hub = hub
        # The reference is weak, so that an app which a job has created can be freed. The threads
        # of the engine stop then.
        self._app_ref = None if app is None else weakref.ref(app)
        self.settings = Settings.of_app(app, logs)
        # A random name of this process. The ids of its clients begin with it.
        self.process = secrets.token_hex(PROCESS_ID_LENGTH // 2)
        self.counters = Counters()
        self.registry = Registry()
        self.history = History(self.settings.history)
        self.workers = Workers()
        self.editing = Editing(self)
        self.exchange = EditorExchange(self)
        self.pollers = Pollers()
        self.log = create_log(self.settings, app, self.report)
        self._create_threads()
        # NaN is not JSON. Every browser that received it would throw an exception.
        json_provider = (app or Flask(__name__)).json
        self._to_json = functools.partial(json_provider.dumps, allow_nan=False)
        # The flags never become False again. Reading or setting one is atomic.
        self.has_served = False
        self.is_started = False
        self.is_closing = False
        # The average time of a live page's refresh, in seconds. Reading and setting it is atomic.
        self.refresh_seconds = 0.0
        # When warn() last logged a message. Reading or setting an item is atomic. If two threads
        # call warn() at the same time, a message may be logged twice.
        self._warned_at: dict[str, float] = {}
        # The time, user id and session id of recent sign-outs. If a handshake began before one, its
        # connection is closed as soon as it opens. Loop only.
        self._signed_out: deque[tuple[float, str, str | None]] = deque(maxlen=1000)
        _all_engines.add(self)
        if app is not None:
            weakref.finalize(app, self._abandon).atexit = False

    @property
    def app(self) -> Flask | None:
        """The app; None for a script, or after the app was freed."""
        if self._app_ref is None:
            return None
        return self._app_ref()

    def _abandon(self) -> None:
        """Stop the threads, because the app was freed.

        The garbage collector calls this, and may interrupt code that holds any lock. So this takes
        no lock.
        """
        # The heartbeat thread and the follower exit.
        self.is_closing = True
        self.workers.request_stop()
        self.loop.request_stop()

    def _create_threads(self) -> None:
        """Create the parts that have a thread, without starting it."""
        self.loop = Loop(self.registry, self.history, self.counters, self.report)
        self.heartbeat = Heartbeat(self)
        self.follower: Follower | None = None
        if self.log is not None:
            self.follower = Follower(self, self.log)

    def start(self) -> None:
        """Start the threads; if one cannot start, stop the others. Hub._starting is held."""
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
            # A thread cannot be started twice, so the next attempt needs new ones.
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
        # The connection of a client with more unsent data than max_queue is closed. So a larger
        # event would disconnect every client that does not read it at once.
        if size > self.settings.max_queue:
            raise ValueError(
                f"payload has {size} bytes as JSON; SWIFTCMS_WS_MAX_QUEUE allows"
                f" {self.settings.max_queue}: publish an id, with which clients fetch the rest"
            )
        return Draft(event_type, content_type, text, receivers)

    def _serialise(self, payload: Any) -> str:
        try:
            text = self._to_json(payload)
            # The JSON provider of a site may return bytes, or ignore allow_nan.
            if isinstance(text, (bytes, bytearray)):
                text = bytes(text).decode()
            if "NaN" in text or "Infinity" in text:
                json.loads(text, parse_constant=refuse_constant)
            # This raises for a lone surrogate, which UTF-8 cannot express.
            utf8_length(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"payload cannot be sent as JSON: {error}; {_payload_hint(str(error))}"
            ) from error
        return str(text)

    def publish(self, drafts: list[Draft]) -> list[EventId]:
        """Append the events to the shared log, or queue them in this process; return their ids."""
        if self.log is None:
            event_ids = self._publish_here(drafts)
        else:
            event_ids = self.log.append(drafts)
        self.counters.add("published", len(event_ids))
        return event_ids

    def _publish_here(self, drafts: list[Draft]) -> list[EventId]:
        # While exit handlers run, the main thread is not alive, and no thread can start.
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
            self.hub.warn_if_no_client(self)
        return event_ids

    def warn_if_served_no_client(self) -> None:
        """Log at exit if this process has published events, but has not served any client."""
        if self.log is not None or self.has_served or self.app is None or self.app.testing:
            return
        # The parent process of Werkzeug's reloader has run the site's script too, but only its
        # child serves clients.
        is_reloader = "werkzeug._reloader" in sys.modules
        if is_reloader and os.environ.get("WERKZEUG_RUN_MAIN") != "true":
            return
        count = self.counters.as_dict()["published"]
        if count:
            self.warn(
                "this process published %s events and served no client, so they reached nobody: if"
                " another process serves the site, set SWIFTCMS_WS_DATABASE in both (or, on several"
                " machines, SWIFTCMS_WS_REDIS_URL)",
                count,
            )

    def newest_id(self) -> EventId | None:
        """Return the id of the newest event.

        Return None if the shared log is empty, or does not answer soon. Starts no thread.
        """
        if self.log is None:
            return self.loop.last_id
        if self.follower is not None and self.follower.newest_id is not None:
            # The follower may not have read this process's own events yet.
            return max(self.follower.newest_id, self.log.last_appended)
        with suppress(LogUnavailable):
            return self.log.newest_id()
        return None

    # -- signing out -------------------------------------------------------------------------------

    def disconnect(self, user_id: str, session: str | None) -> int:
        """Close the connections of a user or of one session, in all processes."""
        if self.log is not None:
            message = {"do": "disconnect", "user": user_id, "session": session}
            payload = json.dumps({**message, "process": self.process})
            self.log.append([Draft(SIGN_OUT, "system", payload, frozenset())])
        if self.app is not None:
            # The loop has to remember the sign-out, because a handshake of the user may be running.
            self.hub.start(self)
        count = len(self._connections_of(user_id, session))
        self.loop.call(self.sign_out, user_id, session)
        return count

    def _connections_of(self, user_id: str, session: str | None) -> list[Connection]:
        return [
            connection
            for connection in self.registry.connections(user_id)
            if session is None or (connection.user and connection.user.session == session)
        ]

    def sign_out(self, user_id: str, session: str | None) -> None:
        """Close the connections of a user in this process. Loop only."""
        self._signed_out.append((time.monotonic(), user_id, session))
        for connection in self._connections_of(user_id, session):
            connection.session.sign_out()

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
        """Log a message of the engine's own threads. A worker calls the log handlers.

        Otherwise a handler of the site, for example one that sends mail, would delay all clients.
        """
        record = functools.partial(log, level, message, *values, exc_info=exc_info)
        self.workers.records.put(record)

    def warn(self, message: str, *values: object, once: bool = False) -> None:
        """Log a warning at most once a minute or, with `once`, at most once.

        Clients can cause most warnings as often as they want. Warnings are the same if `message`
        is; `values` may differ.
        """
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
        # Two rounds, because the loop submits a client's client_disconnected only after a hook of
        # the same client has returned.
        for _ in range(2):
            self.workers.wait_until_idle(deadline)
            self.loop.wait_for_queued(deadline)
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


# What to publish instead. The keys are patterns of the JSON encoder's error messages.
PAYLOAD_HINTS = {
    r"type Row\b": "publish dict(row)",
    r"type (set|frozenset|dict_\w+|generator|map|filter)\b": "publish a list: list(…)",
    r"float|NaN|Infinity": "publish None in its place",
}


def _payload_hint(message: str) -> str:
    for pattern, hint in PAYLOAD_HINTS.items():
        if re.search(pattern, message):
            return hint
    return 'publish a dict such as {"id": post.id}, or let app.json convert the type'


class Counters:
    """The numbers of stats() that are counted from the start of the engine. For any thread."""

    def __init__(self) -> None:
        # Guards the numbers. It is re-entrant, because a signal handler that publishes may
        # interrupt its own thread while that thread holds the lock.
        self._lock = threading.RLock()
        names = "published delivered replayed polls errors slow_clients throttled"
        self._numbers = Counter(dict.fromkeys(names.split(), 0))

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._numbers[name] += number

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return dict(self._numbers)


# The engines of this process, started or not. They are closed at exit, and a forked child drops
# them.
_all_engines: WeakList[Engine] = WeakList()


@atexit.register
def _close_at_exit() -> None:
    """Close all connections at exit. Log which engines have published without a client."""
    engines = _all_engines.copy()
    close_engines(engines, timeout=2.0)
    for engine in engines:
        engine.warn_if_served_no_client()


def _reset_after_fork() -> None:
    """Drop the parent's engines and signal handlers in a forked child."""
    for hub_ in _hubs.copy():
        hub_.forget_engines()
    _all_engines.clear()
    restore_signal_handlers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)

# The handlers that _on_signal() has replaced, by signal number.
_former_handlers: dict[int, Any] = {}


def install_signal_handlers() -> None:
    """Handle SIGTERM and SIGINT, so that clients receive 1001 before the process stops.

    Only default handlers are replaced. gunicorn has its own: Heartbeat notices that it stops a
    worker.
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
    engines = [engine for engine in _all_engines.copy() if engine.is_started]
    for engine in engines:
        engine.loop.request_close_all()
    if number == signal.SIGINT:
        # This raises KeyboardInterrupt. If the program catches it and continues, clients reconnect.
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
    # The first process of a container ignores a signal that has the default handler.
    sys.exit(128 + number)


# == 4. Events and frames: pure functions ========================================================

# Milliseconds since 1970 and a counter, as in a Redis stream. Later events have larger ids.
EventId = tuple[int, int]
# A pattern of event types, and one of content types.
Pattern = tuple[str, str]

NAME_RULE = (
    f"words of letters, digits, _ and - joined by dots, at most {MAX_NAME_LENGTH} characters"
)
# How deeply objects and arrays may be nested in a client's message.
MAX_MESSAGE_DEPTH = 100


class Draft(NamedTuple):
    """An event that has no id yet."""

    type: str
    content_type: str
    # The payload as JSON.
    payload: str
    # The users who receive the event. If it is None, all subscribers do.
    to: frozenset[str] | None


class Event:
    """One published event. Any thread may create one and read it.

    The loop alone may use `frame`, which is encoded when it is first read, and `block`. To save
    memory, the payload is dropped as soon as the frame exists, because the frame contains it, and
    the block is not kept, because the history keeps one encoded copy of each event.
    """

    __slots__ = ("_frame", "_payload", "content_type", "id", "size", "to", "type")

    def __init__(self, event_id: EventId, draft: Draft) -> None:
        self.id = event_id
        self.type = draft.type
        self.content_type = draft.content_type
        self.to = draft.to
        # The bytes of the payload.
        self.size = utf8_length(draft.payload)
        self._payload: str | None = draft.payload
        self._frame = b""

    @property
    def payload(self) -> str:
        """The payload as JSON. After the frame was read, it is "null"."""
        return self._payload or "null"

    @property
    def frame(self) -> bytes:
        """The bytes that a WebSocket receives. Loop only."""
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

    @property
    def block(self) -> bytes:
        """The bytes that a client over plain HTTP receives. Loop only."""
        message = self.frame[frame_head_length(self.frame) :]
        return stream_block(message, event_id=format_event_id(self.id))


def utf8_length(text: str) -> int:
    """Return the number of bytes of a string in UTF-8."""
    if text.isascii():
        return len(text)
    return len(text.encode())


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
    # The length is checked first, because the cache must not keep long strings of clients.
    return 0 < len(text) <= MAX_NAME_LENGTH and _has_words(text)


@functools.lru_cache(maxsize=1024)
def _has_words(text: str) -> bool:
    return all(map(_is_word, text.split(".")))


def _is_word(word: str) -> bool:
    # The \w of a regular expression does not match the vowel signs of Hindi, Tamil and Thai.
    return word != "" and all(
        character in "_-" or unicodedata.category(character)[0] in "LMN" for character in word
    )


def is_pattern(text: str) -> bool:
    """Return whether a string is a name, a prefix such as content.*, or *."""
    return len(text) <= MAX_NAME_LENGTH and (text == "*" or is_name(text.removesuffix(".*")))


def check_name(value: object, argument: str) -> str:
    """Return a type or content type that can be published, or raise, naming the argument."""
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a str, not {type(value).__name__}")
    name = plain_str(value)
    if not is_name(name):
        raise ValueError(f"{argument} must be {NAME_RULE}, not {name[:MAX_NAME_LENGTH]!r}")
    return name


def plain_str(value: str) -> str:
    """Return the characters of a str subclass. str() of an Enum member would be its name."""
    return str.__str__(value)


def check_user_id(value: object, source: str) -> str:
    """Return a user id, which may be an int or a UUID, as a str; or raise, naming the source."""
    if isinstance(value, bool) or not isinstance(value, (str, int, UUID)):
        kind = type(value).__name__
        raise TypeError(f"{source} must be a user id (str, int or UUID), not {kind}")
    if isinstance(value, str):
        user_id = plain_str(value)
    elif isinstance(value, int):
        user_id = int.__repr__(value)
    else:
        user_id = str(value)
    if not 0 < len(user_id) <= MAX_NAME_LENGTH:
        raise ValueError(f"{source} must be a user id of 1 to {MAX_NAME_LENGTH} characters")
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
    """Return the patterns that match a name, such as content.created, content.* and *."""
    words = name.split(".")
    prefixes = [".".join(words[:count]) + ".*" for count in range(len(words) - 1, 0, -1)]
    return [name, *prefixes, "*"]


@functools.lru_cache(maxsize=1024)
def patterns_of(event_type: str, content_type: str) -> tuple[Pattern, ...]:
    """Return every pattern that matches such an event.

    A subscriber is then found by looking up each of them, without comparing subscriptions.
    """
    return tuple(itertools.product(_patterns_of_name(event_type), _patterns_of_name(content_type)))


# Cached, because a site publishes the same names again and again.
@functools.lru_cache(maxsize=2048)
def is_similar(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a name, or is so similar that one may be a mistake.

    Heartbeat uses this for a hint in the log. These are similar: item.add and item.added, Posts and
    post, order_paid and order.paid, and long words that differ in one letter.
    """
    if matches(pattern, name):
        return True
    words, others = _stems(pattern.removesuffix(".*")), _stems(name)
    if pattern.endswith(".*"):
        others = others[: len(words)]
    one, other = ".".join(words), ".".join(others)
    if one == other:
        return True
    longest = max(len(one), len(other))
    # A short word may be a code, for example of a language: articles.de and articles.dk.
    shortest = min(map(len, {*words} ^ {*others}), default=0)
    if longest < 8 or shortest < 4 or re.search(r"\d", one + other):
        return False
    # The common start and the common end leave one letter.
    return _common_start(one, other) + _common_start(one[::-1], other[::-1]) >= longest - 1


def _common_start(one: str, other: str) -> int:
    """Return the number of characters at the start of both strings."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _stems(name: str) -> list[str]:
    """Return the words of a name in lower case, without the endings of plurals and tenses."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", ".", name).lower()
    return [re.sub(r"(ies|y|ing|ed|es|e|s)$", "", word) for word in re.split(r"[._-]", name)]


def describe(value: object) -> str:
    """Describe a JSON value for an error message: its kind, and up to 60 characters of it."""
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


def frame_head_length(frame: bytes) -> int:
    """Return the length of an unmasked frame's head, after which its payload begins."""
    return {126: 4, 127: 10}.get(frame[1], 2)


def text_frame(text: str) -> bytes:
    return encode_frame(Opcode.TEXT, text.encode())


def close_frame(code: int, reason: str) -> bytes:
    """Return a close frame. Its payload has at most 125 bytes (RFC 6455 section 5.5)."""
    # If the cut is inside a character, that character is dropped.
    short = reason.encode()[:123].decode(errors="ignore")
    return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + short.encode())


def message_frame(
    message_type: str,
    payload: Mapping[str, Any],
    content_type: str | None = None,
    ref: str | float | None = None,
) -> bytes:
    """Return a message of the server as a WebSocket frame."""
    return text_frame(message_text(message_type, payload, content_type, ref))


def message_text(
    message_type: str,
    payload: Mapping[str, Any],
    content_type: str | None = None,
    ref: str | float | None = None,
) -> str:
    """Return a message of the server as JSON. The app's JSON provider is not used."""
    message: dict[str, Any] = {"type": message_type}
    if content_type is not None:
        message["contentType"] = content_type
    message["payload"] = payload
    message["timestamp"] = timestamp(now_milliseconds())
    if ref is not None:
        message["ref"] = ref
    return json.dumps(message)


class Framing:
    """Encodes messages for clients as WebSocket frames. Pure functions.

    EventStream, in section 15, encodes them for plain HTTP. An event is encoded once for each
    framing, and not for each client.
    """

    # The client can answer a heartbeat or a close frame. A client over plain HTTP cannot.
    is_bidirectional = True

    def event(self, event: Event) -> bytes:
        return event.frame

    def message(
        self,
        message_type: str,
        payload: Mapping[str, Any],
        content_type: str | None = None,
        ref: str | float | None = None,
    ) -> bytes:
        return message_frame(message_type, payload, content_type, ref)

    def heartbeat(self, payload: Mapping[str, Any]) -> bytes:
        """Return system.heartbeat and a ping.

        Scripts in a browser see only the first; WebSocket libraries answer the second by
        themselves.
        """
        return message_frame("system.heartbeat", payload) + encode_frame(Opcode.PING, b"")

    def closing(self, code: int, reason: str) -> bytes:
        """Return the last bytes of a connection that the server closes."""
        return close_frame(code, reason)


WEBSOCKET = Framing()


def parse_message(data: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a client sent, or raise ClientError."""
    if isinstance(data, bytes):
        raise ClientError("invalid_message", "a message must be a text message, not a binary one")
    try:
        message = json.loads(data, parse_constant=refuse_constant, parse_float=_parse_float)
        if data.count("[") + data.count("{") > MAX_MESSAGE_DEPTH:
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


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is a number in JavaScript, but not in JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    # json.dumps() would write an infinite number as Infinity, which is not JSON.
    if abs(number) == float("inf"):
        raise ValueError(f"the number {text[:60]} is too large")
    return number


def _check_depth(message: object) -> None:
    """Raise RecursionError if a message is nested too deeply to be encoded again safely."""
    level = [message]
    for _ in range(MAX_MESSAGE_DEPTH + 1):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return
        level = []
        for container in containers:
            level.extend(container.values() if isinstance(container, dict) else container)
    raise RecursionError


# == 5. Loop and history: one order for all events ===============================================

# A function for the loop's thread, and its arguments.
Call = tuple[Callable[..., object], tuple[Any, ...]]

SIGNAL_HINT = (
    "a signal handler called a method of the hub, such as publish(), while it had interrupted"
    " another one: let the handler set a flag, and call the method afterwards"
)


class ReentryGuard:
    """Raises RuntimeError if a thread is about to take a lock that it holds already.

    Only a signal handler can do that, because it may interrupt its own thread anywhere. The thread
    would wait for itself for ever. With a re-entrant lock, ids would be given out of order.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        # Threads that have the lock or wait for it. Each step on the set is atomic. If a signal
        # handler raises an exception inside __enter__(), the interrupted thread stays in the set.
        # So __enter__() also looks whether the lock is held.
        self._threads: set[int] = set()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if thread in self._threads and self._lock.locked():
            raise RuntimeError(SIGNAL_HINT)
        self._threads.add(thread)

    def __exit__(self, *exception: object) -> None:
        self._threads.discard(threading.get_ident())


class Flush:
    """One call of flush(), which waits until `newest_id` is delivered and unsent data is written.

    The thread that calls flush() creates it and waits for `is_done`. The loop owns the rest.
    """

    def __init__(self, newest_id: EventId) -> None:
        self.newest_id = newest_id
        self.is_done = threading.Event()
        # Slow clients, and the `written_bytes` to wait for. None until `newest_id` is delivered.
        self.targets: list[tuple[Connection, int]] | None = None


class EventQueue:
    """The queue of a loop: events and calls, in one order. Any thread may call its methods."""

    # publish() waits while so many bytes of events are queued. Otherwise a fast publisher could
    # fill the memory.
    MAX_QUEUED_BYTES = 8 * 1024 * 1024
    # The bytes that an event counts in the queue, in addition to its payload.
    EVENT_OVERHEAD = 1024
    # A system call takes about as long for one small frame as for many. So queued events are sent
    # together, up to these limits. The loop never waits for more events to fill a batch.
    BATCH_BYTES = 64 * 1024
    BATCH_EVENTS = 512

    def __init__(self, newest_id: EventId) -> None:
        # Guards the queue, its size, the newest id and the flags below. An id is given and its
        # event is queued while it is held, so that events are queued in the order of their ids.
        self._lock = threading.Lock()
        self._guard = ReentryGuard(self._lock)
        # Notified when there is room in the queue again, and when the loop stops.
        self._room = threading.Condition(self._lock)
        self._queue: deque[Event | Call] = deque()
        self._queued_bytes = 0
        # The newest id that this process has given or, with a shared log, that the follower has
        # submitted.
        self.last_id: EventId = newest_id
        # The loop waits for sockets, or is about to. A thread that adds to the queue wakes it.
        self._is_asleep = False
        self._is_stopped = False
        # The thread of the loop, and the socket that wakes it; None before the start.
        self.thread: threading.Thread | None = None
        self._wake_sender: socket.socket | None = None

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
                # Ids always increase, even if the clock is set back.
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
        """Interrupt the loop's wait for sockets."""
        # send() fails if the socket's buffer is full, which wakes the loop too, or if the socket
        # is closed because the loop has stopped.
        if self._wake_sender is not None:
            with suppress(OSError):
                self._wake_sender.send(b"\0")

    def queue_length(self) -> int:
        return len(self._queue)

    def _take(self) -> list[Event] | Call:
        """Remove and return the first call of the queue, or a batch of its first events."""
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

    Any thread may call the methods of EventQueue, start() and the methods under "any thread". A
    forked child calls close_copies(). The others are for the loop's own thread, which never runs
    code of the site, and never waits for a client, because the sockets are non-blocking.
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
        # Any thread may set it, without the lock, because a signal handler must not wait for one.
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
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for sock in (self._wake_receiver, self._wake_sender):
            sock.setblocking(False)
        self.selector.register(self._wake_receiver, selectors.EVENT_READ, None)
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

    def wait_for_queued(self, deadline: float) -> None:
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

        The queue is emptied before sockets are read. So an answer comes after every event that was
        published before the client's message. Events and calls that are added meanwhile wait for
        the next round. Otherwise a fast publisher could keep the loop from reading.
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
                # Between two batches, write to clients that have read meanwhile. Otherwise they
                # would be closed for being slow.
                self._serve(self.selector.select(0), selectors.EVENT_WRITE)

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]], mask: int = ~0) -> None:
        """Read from and write to the sockets that the selector reported.

        mask: EVENT_WRITE only writes
        """
        for key, events in ready:
            if key.data is not None:
                key.data.serve(events & mask)
            else:
                # This is the wake-up socket. Remove what _wake() has sent.
                with suppress(BlockingIOError):
                    self._wake_receiver.recv(4096)

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
        """Send each client the events that it subscribes to, in one system call for each client.

        Events with the same names and recipients have the same subscribers, which are looked up
        once. A set of events is an integer, of which bit i stands for events[i].
        """
        kinds: dict[tuple[str, str, frozenset[str] | None], int] = defaultdict(int)
        for index, event in enumerate(events):
            kinds[event.type, event.content_type, event.to] |= 1 << index
        try:
            for framing in self.registry.framings:
                routes: Iterable[tuple[int, Collection[Connection]]]
                routes = [
                    (bits, self.registry.matching(*kind, framing)) for kind, bits in kinds.items()
                ]
                if len(kinds) > 1:
                    routes = _merge_routes(routes)
                self._send_events(events, routes, framing)
        finally:
            self.history.add(events)

    def _send_events(
        self,
        events: list[Event],
        routes: Iterable[tuple[int, Collection[Connection]]],
        framing: Framing,
    ) -> None:
        """Send each group of connections its set of events, joined into one buffer."""
        for bits, connections in routes:
            if not connections:
                continue
            chosen = [
                framing.event(event) for index, event in enumerate(events) if bits >> index & 1
            ]
            Connection.send_to_all(connections, b"".join(chosen))
            self._counters.add("delivered", len(chosen) * len(connections))

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
            if self.history.newest_id < flush.newest_id:
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
        for sock in (self._wake_receiver, self._wake_sender):
            if sock is not None:
                sock.close()

    def close_copies(self) -> None:
        """Close a forked child's copies. unregister() would change the parent's selector."""
        if self.thread is not None:
            self._close_descriptors()


def _merge_routes(
    routes: Iterable[tuple[int, Collection[Connection]]],
) -> Iterable[tuple[int, Collection[Connection]]]:
    """Group the connections by the set of events that each receives.

    A connection may be in several routes, and is in one group of the result.
    """
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

    Subscribing with `since` runs on the loop too, between two deliveries. So there is no gap
    between a replay and the live events, and no overlap.
    """

    MAX_BYTES = 32 * 1024 * 1024

    def __init__(self, size: int) -> None:
        self._size = size
        self._events: deque[Event] = deque()
        self._bytes = 0
        # The ids of the newest event that was delivered, and of the newest that was dropped from
        # the history. Before the first event, both are the time of the start, so that a client that
        # has received no event can resume too.
        self.newest_id: EventId = (now_milliseconds(), 0)
        self.dropped_id = self.newest_id

    def restart(self, newest_id: EventId) -> None:
        """Drop all events. The next one is the one after `newest_id` in the shared log."""
        self._events.clear()
        self._bytes = 0
        self.newest_id = self.dropped_id = newest_id

    def add(self, events: list[Event]) -> None:
        self._events.extend(events)
        self._bytes += sum(event.size for event in events)
        self.newest_id = events[-1].id
        while len(self._events) > self._size or self._bytes > self.MAX_BYTES:
            oldest = self._events.popleft()
            self._bytes -= oldest.size
            self.dropped_id = oldest.id

    def names_after(self, event_id: EventId) -> set[tuple[str, str]]:
        """Return the type and content type of each public event after an id.

        Only the last 50 events are looked at. Heartbeat compares the names with subscriptions.
        """
        latest = itertools.islice(reversed(self._events), 50)
        newer = itertools.takewhile(lambda event: event.id > event_id, latest)
        return {(event.type, event.content_type) for event in newer if event.to is None}

    def after(self, since: EventId) -> list[Event] | None:
        """Return the events after `since`; None if some of them may be missing here.

        They are complete only if `since` is the id of an event of this history, or of the last one
        that it dropped. Any other id may be of an earlier process, whose events are not known.
        """
        index = bisect.bisect_right(self._events, since, key=lambda event: event.id)
        previous = self.dropped_id
        if index:
            previous = self._events[index - 1].id
        if since != previous:
            return None
        return list(itertools.islice(self._events, index, None))

    def append_newer(self, older: list[Event]) -> list[Event] | None:
        """Return `older`, which was read from the shared log, and the newer events of the history.

        Return None if there may be events between the two. Events of `older` that this process has
        not delivered yet are left out, because the client will receive them as live events.
        """
        if older[-1].id < self.dropped_id:
            return None
        newer = [event for event in self._events if event.id > older[-1].id]
        return [event for event in older if event.id <= self.newest_id] + newer


# == 6. Registry: connections, subscriptions and slots ===========================================


class Registry:
    """Connections and their subscriptions, indexed by pattern, by user and by client id.

    Any thread may call any method: the loop calls them for events and messages, and the web
    server's threads reserve slots. Finding the subscribers of an event takes a few look-ups,
    however many other subscriptions there are.
    """

    # How many results of matching() are cached until a subscription changes.
    CACHE_SIZE = 64

    def __init__(self) -> None:
        # Guards everything below, and each connection's `user` and `subscriptions`, because they
        # change together. It is held only to read and change dictionaries.
        self._lock = threading.Lock()
        # Notified when a slot is released.
        self._released = threading.Condition(self._lock)
        # Slots taken by connections and by handshakes. Reading it is atomic.
        self.slots = 0
        # The framings that have been in use since the start. Reading it is atomic.
        self.framings: tuple[Framing, ...] = (WEBSOCKET,)
        # By client id.
        self._connections: dict[str, Connection] = {}
        # Dictionaries without values are sets that keep their order. The framing is a part of the
        # key, because an event is encoded and sent for one framing after the other.
        self._subscribers: dict[tuple[Framing, Pattern], dict[Connection, None]] = {}
        # By user id.
        self._by_user: dict[str, dict[Connection, None]] = {}
        self._match_cache: dict[tuple[Framing, str, str], tuple[Connection, ...]] = {}

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
            if connection.framing not in self.framings:
                self.framings = (*self.framings, connection.framing)
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
        """Set the user of a connection. It receives the events for this user after `after`.

        If the connection has this user already, only the claims of the token change.
        """
        with self._lock:
            if connection.user is None:
                # The connection has not received events for this user until now. See subscribe().
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
            self._subscribers.setdefault((connection.framing, pattern), {})[connection] = None
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
        self._discard(self._subscribers, (connection.framing, pattern), connection)
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

    def patterns(self, limit: int) -> list[Pattern]:
        """Return up to `limit` patterns of subscriptions."""
        with self._lock:
            return [pattern for _, pattern in itertools.islice(self._subscribers, limit)]

    # -- matching ----------------------------------------------------------------------------------

    def matching(
        self,
        event_type: str,
        content_type: str,
        to: frozenset[str] | None,
        framing: Framing,
    ) -> Collection[Connection]:
        """Return the connections of a framing that receive such an event, each once.

        The result is cached if `to` is None.
        """
        with self._lock:
            if to is not None:
                return self._matching_users(event_type, content_type, to, framing)
            key = (framing, event_type, content_type)
            found = self._match_cache.get(key)
            if found is None:
                found = self._find_subscribers(*key)
                if len(self._match_cache) >= self.CACHE_SIZE:
                    self._match_cache.clear()
                self._match_cache[key] = found
            return found

    def has_subscriber(self, event_type: str, content_type: str) -> bool:
        return any(
            self.matching(event_type, content_type, None, framing) for framing in self.framings
        )

    def _find_subscribers(
        self, framing: Framing, event_type: str, content_type: str
    ) -> tuple[Connection, ...]:
        found: dict[Connection, None] = {}
        for pattern in patterns_of(event_type, content_type):
            found |= self._subscribers.get((framing, pattern), {})
        return tuple(found)

    def _matching_users(
        self, event_type: str, content_type: str, to: frozenset[str], framing: Framing
    ) -> list[Connection]:
        patterns = patterns_of(event_type, content_type)
        return [
            connection
            for user_id in to
            for connection in self._by_user.get(user_id, ())
            if connection.framing is framing
            and not connection.subscriptions.keys().isdisjoint(patterns)
        ]

    def missed(
        self, connection: Connection, patterns: Collection[Pattern], events: Iterable[Event]
    ) -> list[Event]:
        """Return the events that match `patterns` and were not sent to the connection before."""
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
            # It was sent already if a subscription that matches it began before it.
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

    The client speaks WebSocket or, with the framing EventStream, receives a stream.

    The socket is non-blocking. If the socket buffer of a slow client is full, unsent data is
    queued here and later frames queue behind it. Other clients are not affected.
    """

    # How many seconds a client has to answer a close frame of the server.
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

    # There may be thousands of connections, so memory is saved.
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
        "framing",
        "id",
        "session",
        "silent_since",
        "state",
        "subscriptions",
        "unsent_bytes",
        "user",
        "written_bytes",
    )

    def __init__(
        self,
        client_id: str,
        sock: socket.socket,
        loop: Loop,
        max_queue: int,
        user: User | None,
        framing: Framing = WEBSOCKET,
    ) -> None:
        sock.setblocking(False)
        # Without this option, which the web servers do not set, small frames would wait 40 ms. The
        # Unix socket of a proxy does not have it.
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.id = client_id
        self.framing = framing
        self.state = State.OPEN
        # The code with which the server closed the connection; None if it did not.
        self.close_code: int | None = None
        # Session.open() sets it.
        self.session: Session
        self._sock = sock
        # Looked up once, because send_to_all() calls it for each client.
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
        # The number of bytes that were queued in `_unsent` and have been written. flush() waits
        # for them.
        self.written_bytes = 0
        # A replay may exceed max_queue until everything has been sent once. Otherwise a client
        # could never resume from a history longer than max_queue.
        self._replay_allowance = 0
        # The state is OPEN and no data is unsent, so send() writes to the socket at once.
        self._is_direct = True
        # When the socket last accepted data, if some is unsent.
        self._progress_at = 0.0
        # Since when the client has been silent. It is infinity while silence does not count: if the
        # server does not read from the client, or if the framing is not bidirectional.
        self.silent_since = time.monotonic()
        # Close the socket as soon as everything is written, because the client's close frame has
        # arrived, or because none will come.
        self._close_when_written = False
        # The events that the selector watches for. If it is 0, the socket is not registered.
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
        # A client that has read everything before is not slow, even if `data` alone is longer than
        # max_queue: several events may be sent at once.
        is_behind = bool(self._unsent)
        self._queue(memoryview(data)[sent:] if sent else data)
        if is_behind and self.unsent_bytes > self._max_queue + self._replay_allowance:
            self.close(CloseCode.TRY_AGAIN_LATER, "read too slowly; reconnect with since")

    def send_replay(self, frames: Sequence[bytes]) -> None:
        """Send the events that a client missed. Their length does not count as slowness."""
        if self.state is not State.OPEN or not frames:
            return
        for frame in frames:
            self._queue(frame)
        self._replay_allowance += sum(map(len, frames))
        self._write()

    def _queue(self, data: bytes | memoryview) -> None:
        """Add data to the unsent data, and watch for the time when it can be written."""
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
            # The session may have received messages that it could not handle until now.
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
        """Remove the first `sent` bytes of `batch` from the unsent data."""
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
        """Read or write, as the selector has reported in `events`."""
        try:
            if events & selectors.EVENT_WRITE and self.state is not State.CLOSED:
                self._write()
            if events & selectors.EVENT_READ and self.state is not State.CLOSED:
                self._read()
        except Exception as error:
            # An exception closes this connection, and must not reach the other clients.
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
        if self.framing.is_bidirectional:
            self.silent_since = time.monotonic()
        self.session.receive(data)

    @property
    def can_read(self) -> bool:
        """Whether the server reads from this client and handles its messages now."""
        is_behind = self.unsent_bytes > self.MAX_UNSENT_WHILE_READING
        return self.state is State.OPEN and not is_behind and not self.session.is_paused

    def update_selector(self) -> None:
        """Let the selector watch for reading, writing, both or neither, as the state requires.

        A socket that is neither read nor written is unregistered, because epoll would report a
        reset even with an empty mask, again and again.
        """
        wanted = 0
        if self.state is not State.CLOSED:
            if self.can_read or self.state is State.CLOSING:
                wanted = selectors.EVENT_READ
            if self._unsent:
                wanted |= selectors.EVENT_WRITE
        if wanted == self._selected:
            return
        self._update_silence(bool(wanted & selectors.EVENT_READ))
        if not self._selected:
            self._loop.selector.register(self._sock, wanted, self)
        elif not wanted:
            self._loop.selector.unregister(self._sock)
        else:
            self._loop.selector.modify(self._sock, wanted, self)
        self._selected = wanted

    def _update_silence(self, is_reading: bool) -> None:
        """Start or stop counting the client's silence, which counts only while it is read."""
        if not is_reading or not self.framing.is_bidirectional:
            self.silent_since = float("inf")
        elif not self._selected & selectors.EVENT_READ:
            self.silent_since = time.monotonic()

    # -- closing -----------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Send a close frame, and close the socket after the client's answer or CLOSE_TIMEOUT.

        The client of a stream cannot answer, so its socket is closed when everything is written.
        """
        if self.state is not State.OPEN:
            return
        if code == CloseCode.TRY_AGAIN_LATER and self._unsent:
            # Drop the unsent data, except the first chunk: it may be partly sent, and the close
            # frame must not come inside another frame.
            first = self._unsent.popleft()
            self._unsent = deque([first])
            self.unsent_bytes = len(first)
        self.close_code = code
        self._close_when_written = not self.framing.is_bidirectional
        self._begin_closing(self.framing.closing(code, reason))

    def answer_close(self, code: int | None) -> None:
        """Handle the client's close frame: answer it if it is the first one, and then close."""
        self._close_when_written = True
        if self.state is State.OPEN:
            payload = b""
            if code is not None:
                payload = struct.pack("!H", code)
            self._begin_closing(encode_frame(Opcode.CLOSE, payload))
        elif not self._unsent:
            self.abort()

    def close_malformed(self, code: int, reason: str) -> None:
        """Close a connection whose client sent a malformed frame. No later byte is read."""
        self.close(code, reason)
        if not self._unsent:
            # The client reads the close frame and the end of the stream, and closes its socket.
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def _begin_closing(self, frame: bytes) -> None:
        self.state = State.CLOSING
        self._loop.closing.add(self)
        self._loop.call_at(time.monotonic() + self.CLOSE_TIMEOUT, self.abort)
        self._queue(frame)
        self._write()
        if self.session.is_paused:
            # The client's close frame may have been received and not handled yet.
            self._loop.call_at(time.monotonic(), self.session.handle_received)
        self.session.on_closed()

    def abort(self) -> None:
        """Close the socket now, and drop unsent data. Sends no close frame."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._is_direct = False
        self._unsent = None
        self.unsent_bytes = 0
        self.update_selector()
        # A forked child may have a copy of the socket. Without shutdown(), it would keep the
        # connection open.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._loop.closing.discard(self)
        try:
            self.session.on_closed()
        finally:
            self._loop.registry.release()

    def has_left(self) -> bool:
        """Return whether the client has left. A worker calls this while the loop does not read."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close_copy(self) -> None:
        """Close a forked child's copy of the socket; the parent's stays open."""
        self._sock.close()

    def stalled_since(self, now: float) -> float:
        """Return since when the client is silent or does not accept unsent data, or `now`."""
        times = [now, self.silent_since]
        if self._unsent:
            times.append(self._progress_at)
        return min(times)

    def is_stuck(self, now: float, limit: float) -> bool:
        """Return whether unsent data has made no progress for `limit` seconds."""
        return bool(self._unsent) and now - self._progress_at >= limit


# II  From the handshake to an answer
# == 8. Endpoint: the /ws route, and taking over the socket ======================================

# The key of the WSGI environ under which a request keeps its Handshake.
ENVIRON_KEY = "swiftcms_ws.handshake"
# The headers of a refusal for lack of a slot or of a file descriptor.
RETRY_SOON = {"Retry-After": "10"}
SUPPORTED_SERVERS = "serve the site with gunicorn, waitress or flask run"


class HandshakeRefused(Exception):
    """The server refuses a handshake with an HTTP response instead of status 101.

    status:  the status of the response
    code:    `code` in its JSON body, such as "bad_handshake"
    message: `message` in its JSON body: a sentence with the mistake and the remedy
    headers: additional headers of the response
    """

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.response = make_response({"code": code, "message": message}, status, headers)


class Handshake:
    """What is known about one handshake. It also acts as a socket and a thread of simple-websocket.

    That library accepts the handshake. It gets this object in place of the socket, and writes its
    101 response here. The loop sends the response later, when the connection is ready. The library
    also gets this object in place of its thread, which would read from the socket. The thread of
    the web server uses it, and then Session.open() on the loop.
    """

    # simple-websocket sets this attribute of its thread.
    name = "swiftcms-ws handshake"

    def __init__(self, sock: Any, user: User | None, began: float) -> None:
        self.sock = sock
        self.user = user
        # A time of time.monotonic() before the site was asked for the user.
        self.began_at = began
        self.response = b""
        # The socket that the loop gets. It is None until the server's socket was taken over.
        self.own_socket: socket.socket | None = None
        # The peer of that socket, if a relay copies between it and the server's socket.
        self.relay: socket.socket | None = None
        # What the client has sent together with the handshake.
        self.read_ahead = b""
        # The class of the session that serves the client.
        self.session_type: type[Session] = Session

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
    """Return the Handshake as simple-websocket's thread, or a thread for another WebSocket route.

    This is the library's option `thread_class`. A thread that does nothing would take a third of
    the time of a handshake.
    """
    sock = target.__self__.sock
    if isinstance(sock, Handshake):
        return sock
    return threading.Thread(target=target)


class HubBlueprint(Blueprint):
    """The blueprint of a hub. If it is registered twice, Flask's error would suggest a new name."""

    def register(self, app: Any, options: dict[str, Any]) -> None:
        name = f"{options.get('name_prefix', '')}.{options.get('name', self.name)}".lstrip(".")
        if app.blueprints.get(name) is self:
            raise ValueError(
                "this blueprint is registered with the app already: call register_blueprint() or"
                " init_app() once"
            )
        super().register(app, options)


class Endpoint:
    """The blueprint of a hub. Its functions run in the web server's threads.

    A handshake is checked before the request reaches flask-sock's route. flask-sock and
    simple-websocket accept it. The view then takes the socket over from the web server and
    returns: the request ends as any other, and the WebSocket holds no thread of the server.
    """

    # Use the relay even if the socket could be taken over. Tests set it.
    FORCE_RELAY = False

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.blueprint = HubBlueprint("swiftcms_ws", __name__)
        self.blueprint.record(lambda state: hub.prepare_app(cast(Flask, state.app)))
        self.blueprint.before_request(self._check_handshake)
        self.blueprint.after_request(self._answer_handshake)
        self.blueprint.teardown_request(self._finish_handshake)
        self.blueprint.register_error_handler(ProtocolError, self._refuse_malformed)
        Sock().route("/ws", bp=self.blueprint, endpoint="websocket")(self._websocket)
        self.blueprint.add_url_rule("/ws", "about", self._about)
        self.blueprint.add_url_rule("/ws/client.js", "client_js", self._client_js)
        self.blueprint.add_url_rule("/ws/events", "events", self._events)
        self.blueprint.add_url_rule(
            "/ws/inspector.<any(js, css):kind>", "inspector", self._inspector_file
        )
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
        # simple-websocket looks for the socket under the key "werkzeug.socket".
        environ[ENVIRON_KEY] = environ["werkzeug.socket"] = handshake
        # Refuse compression, so that the same frame can be sent to all clients.
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
        # Free the parsed handshake, which simple-websocket does not need any more.
        accepted.ws = None
        environ = request.environ
        handshake: Handshake = environ[ENVIRON_KEY]
        engine = self._engine()
        engine.has_served = True
        try:
            if needs_relay(handshake.sock):
                handshake.relay, handshake.own_socket = descriptors().create_pair()
                handshake.sock.setblocking(False)
            else:
                handshake.own_socket = descriptors().take_over(handshake.sock)
        except (OSError, ValueError) as error:
            # ValueError: the server has closed its socket, because the client has left.
            log_lost_socket(engine, error)
            return
        handshake.read_ahead = read_server_buffers(environ)

    def _answer_handshake(self, response: Response) -> Response:
        """Replace flask-sock's response by the one that the web server gets.

        After the socket was taken over, that is a plain 101, so that the server logs this status.
        The server writes it into a dead socket; the client gets its 101 from the loop.
        """
        handshake = request.environ.get(ENVIRON_KEY)
        if not isinstance(handshake, Handshake):
            return response
        if isinstance(handshake, EventsHandshake):
            # This response takes the socket over later.
            return StreamResponse(self._engine(), handshake, response)
        if handshake.relay is not None:
            return RelayResponse(handshake.sock, handshake.relay)
        if handshake.own_socket is not None:
            return Response(status=101)
        if handshake.response and response.status_code == 200:
            # simple-websocket accepted the handshake, but the socket could not be taken over.
            message = "too many open files"
            return self._refuse(503, "too_many_connections", message, **RETRY_SOON)
        # simple-websocket refused the handshake, or a function of the site raised an exception.
        return response

    def _finish_handshake(self, error: BaseException | None) -> None:
        """Give the socket to the loop. If it was not taken over, release the slot.

        This runs at the end of the request, after the site has stored its session. As soon as the
        client gets the 101 from the loop, it may send another request, which needs that session.
        """
        environ = request.environ
        handshake = environ.get(ENVIRON_KEY)
        if not isinstance(handshake, Handshake):
            return
        engine = self._engine()
        if handshake.own_socket is not None:
            # Hooks that run later need the environ. Without hooks, its memory is saved.
            kept_environ = None
            if self._hub.authorize_hook or has_connection_receivers():
                kept_environ = hook_environ(environ)
            address = environ.get("REMOTE_ADDR", "")
            open_session = handshake.session_type.open
            if engine.loop.call(open_session, engine, handshake, kept_environ, address):
                return
            # The loop has stopped.
            handshake.own_socket.close()
        engine.registry.release()

    # -- other requests ----------------------------------------------------------------------------

    def _about(self) -> ResponseReturnValue:
        """Answer a GET that is not a handshake with the inspector or, if it is off, with 426."""
        message = (
            "this is the address of a WebSocket; connect to it with ws:// or wss://, or use plain"
            f" HTTP: GET {url_for('.events')}"
        )
        if "Sec-WebSocket-Key" in request.headers:
            message = (
                "a WebSocket handshake arrived without the header Upgrade: the proxy must pass the"
                " headers Upgrade and Connection on (README, Deployment, Proxies)"
            )
            self._engine().warn(message, once=True)
        if self._is_inspector_on():
            return render_template_string(PAGE, demo=False, address=request.host)
        return self._refuse(426, "upgrade_required", message)

    def _events(self) -> Response:
        """Answer GET /ws/events with a stream or, for a poll, with the missed events."""
        return EventsRequest(self._hub, self._engine()).answer()

    def _is_inspector_on(self) -> bool:
        setting = self._engine().settings.inspector
        if setting is None:
            return current_app.debug
        return setting

    def _inspector_file(self, kind: str, **values: Any) -> Response:
        """Serve the inspector's script or style.

        They are not inside the page, because Flask-Talisman's default policy forbids that.
        """
        if not self._is_inspector_on():
            abort(404)
        files = {
            "js": (INSPECTOR_JS, "text/javascript"),
            "css": (INSPECTOR_CSS, "text/css"),
        }
        return page_file(*files[kind])

    def _add_version(self, endpoint: str, values: dict[str, Any]) -> None:
        """Let url_for() add `v`, a hash of client.js, to the URL of client.js."""
        blueprint, _, name = endpoint.rpartition(".")
        if name == "client_js" and "v" not in values:
            values["v"] = client_js(url_for(f"{blueprint}.about", _external=False, **values))[1]

    def _client_js(self, **values: Any) -> Response:
        """Serve the browser client.

        If the URL has the right `v`, browsers may keep the file for a year, because a changed file
        has another URL. Otherwise they ask each time whether it has changed.
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
    """Accepts or refuses one handshake, in a thread of the web server.

    It runs before the request reaches flask-sock's route. Its subclass EventsRequest uses some of
    the checks for plain HTTP.
    """

    # The most bytes of a handshake's headers, because they are kept in memory if there are hooks.
    MAX_HEADER_BYTES = 32 * 1024

    def __init__(self, hub: Hub, engine: Engine) -> None:
        self._hub = hub
        self._engine = engine

    def run(self) -> Handshake:
        """Return the handshake, with a slot reserved for it; raise HandshakeRefused."""
        sock = self._find_socket()
        self._warn_of_processes()
        self._check_headers()
        self._check_origin()
        began = self._start_engine()
        user = self._find_user()
        self._reserve_slot()
        return Handshake(sock, user, began)

    def _find_socket(self) -> Any:
        """Return the socket of the web server, or refuse if it cannot be used."""
        environ = request.environ
        server = environ.get("SERVER_SOFTWARE", "this web server")
        sock = find_socket(environ)
        problem = ""
        if sock is None:
            problem = "gives no access to the socket"
        elif is_forking(environ):
            problem = "starts a process for each request"
        elif needs_relay(sock) and not environ.get("wsgi.multithread"):
            problem = "has one thread, which TLS inside the process would occupy"
        if problem:
            self._engine.warn("refused a WebSocket: %s %s; %s", server, problem, SUPPORTED_SERVERS)
            hint = f"{SUPPORTED_SERVERS}, or use plain HTTP: GET {url_for('.events')}"
            raise HandshakeRefused(501, "not_supported", f"{server} {problem}; {hint}")
        return sock

    def _start_engine(self) -> float:
        """Start the engine, and return the time since which it notices sign-outs."""
        self._hub.start(self._engine)
        if self._engine.follower is not None:
            self._engine.follower.wait_for_begin()
        return time.monotonic()

    def _warn_of_processes(self) -> None:
        if request.environ.get("wsgi.multiprocess") and self._engine.log is None:
            self._engine.warn(
                "the web server has several processes, and an event reaches only the clients of"
                " the process that publishes it; a client that polls misses some. Set"
                " SWIFTCMS_WS_DATABASE (or, on several machines, SWIFTCMS_WS_REDIS_URL), or run one"
                " process",
                once=True,
            )

    def _check_headers(self) -> None:
        """Refuse a handshake that RFC 6455 section 4.2.1 does not allow."""
        environ = request.environ
        headers = self._check_size()
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
        if not _is_websocket_key(headers.get("HTTP_SEC_WEBSOCKET_KEY", "")):
            raise HandshakeRefused(
                400, "bad_handshake", "Sec-WebSocket-Key must be 16 bytes in base64"
            )

    def _check_size(self) -> dict[str, str]:
        """Return the headers, with the keys of the environ, or refuse if they are too long."""
        environ = request.environ
        headers = {key: value for key, value in environ.items() if key.startswith("HTTP_")}
        size = sum(len(key) + len(value) for key, value in headers.items())
        if size + len(environ.get("QUERY_STRING", "")) > self.MAX_HEADER_BYTES:
            raise HandshakeRefused(
                431, "bad_handshake", f"the headers are over {self.MAX_HEADER_BYTES} bytes"
            )
        return headers

    def _check_origin(self) -> None:
        """Refuse handshakes of pages of other sites (RFC 6455 section 10.2).

        A browser adds the visitor's cookies to such a handshake, so the page could act as the
        visitor. Clients that are not browsers send no Origin.
        """
        origin, host = request.headers.get("Origin"), request.environ.get("HTTP_HOST", "")
        if origin is None or is_origin_allowed(origin, host, self._engine.settings.origins):
            return
        if origin in ("null", "file://"):
            self._engine.warn(
                "refused a connection to a page of the origin %s. If it was opened as a file, open"
                " it through http:// instead",
                origin,
            )
            message = "pages that are opened as a file may not connect: open them through http://"
            raise HandshakeRefused(403, "forbidden", message)
        self._engine.warn(
            "refused a connection to a page of %r, because that is not the host of the request"
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
        bearer = _bearer_token()
        token = request.args.get("token", bearer)
        if token is not None:
            try:
                return check_token(self._engine.settings, token)
            except ClientError as error:
                # Some proxies add a Bearer header of their own. So if there is an identify hook,
                # it decides in place of a wrong token in the header.
                if "token" in request.args or self._hub.identify_hook is None:
                    challenge = {"WWW-Authenticate": "Bearer"}
                    raise HandshakeRefused(401, error.code, str(error), **challenge) from error
        if self._hub.identify_hook is None:
            return None
        # The hook runs in the context of this request. A context of its own would need a second
        # connection of the site's database pool, and concurrent handshakes could wait for each
        # other.
        return _user_of_hook(self._hub.identify_hook())

    def _reserve_slot(self) -> None:
        """Take a slot, or refuse because all are taken or the engine closes."""
        limit = self._engine.settings.max_connections or descriptors().max_connections
        if not self._engine.registry.reserve(limit):
            self._engine.warn(
                "refused a connection: all %s slots are taken. Set SWIFTCMS_WS_MAX_CONNECTIONS and,"
                " if need be, the limit of open files (ulimit -n, LimitNOFILE in systemd) higher",
                limit,
            )
            raise HandshakeRefused(
                503, "too_many_connections", "too many connections", **RETRY_SOON
            )
        # This is checked after the slot is taken. From then on, finish_closing() waits for it.
        if self._engine.is_closing:
            self._engine.registry.release()
            raise HandshakeRefused(
                503, "going_away", "the server is shutting down", **{"Retry-After": "2"}
            )


def log_lost_socket(engine: Engine, error: Exception) -> None:
    """Log that a socket could not be taken over, if the reason is too many open files.

    The other reason, that the client has left, is not logged.
    """
    if getattr(error, "errno", None) in (errno.EMFILE, errno.EINVAL, errno.ENFILE):
        engine.warn(
            "refused a connection: this process has %s connections and may not open more files"
            " (its limit is %s). Raise the limit: ulimit -n, or LimitNOFILE in systemd",
            engine.registry.slots,
            descriptors().limit,
        )


def needs_relay(sock: Any) -> bool:
    """Return whether a socket cannot be taken over, because of TLS or Windows."""
    return Endpoint.FORCE_RELAY or fcntl is None or isinstance(sock, ssl.SSLSocket)


@functools.lru_cache(maxsize=64)
def client_js(path: str) -> tuple[str, str]:
    """Return client.js, which contains the path of the WebSocket, and a hash of it."""
    body = CLIENT_JS.replace('WEBSOCKET_PATH = "/ws"', f"WEBSOCKET_PATH = {json.dumps(path)}")
    return body, hashlib.sha256(body.encode()).hexdigest()[:16]


def page_file(body: str, mimetype: str) -> Response:
    """Return a script or style of a page. Browsers ask each time whether it has changed."""
    response = Response(body, mimetype=mimetype)
    response.cache_control.no_cache = True
    response.add_etag()
    return cast(Response, response.make_conditional(request))


def _is_websocket_key(key: str) -> bool:
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

    They write it in lower case, without the scheme's default port, and with international names in
    ASCII.
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
    # The page's scheme is used, and not the request's, because a proxy may have removed the TLS.
    if page == normalise_origin(f"{scheme}://{host}"):
        return True
    return any(_entry_allows(entry, page) for entry in allowed or ())


def _entry_allows(entry: str, page: str) -> bool:
    """Return whether an entry of SWIFTCMS_WS_ORIGINS is the page's origin, or matches it."""
    named = normalise_origin(entry)
    if named is None:
        return False
    scheme, _, pattern = named.partition("://")
    if not pattern.startswith("*."):
        return page == named
    return page.startswith(f"{scheme}://") and page.endswith(pattern[1:])


# -- hook contexts ---------------------------------------------------------------------------------

# Keys of the environ whose values belong to the web server or to the handshake's request. Hooks run
# after that request.
SERVER_KEYS = {
    "wsgi.input",
    "wsgi.errors",
    "wsgi.file_wrapper",
    "werkzeug.socket",
    "werkzeug.request",
    "gunicorn.socket",
    "waitress.client_disconnected",
    ENVIRON_KEY,
}


def hook_environ(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return the handshake's environ without SERVER_KEYS. Additions of middleware are kept."""
    # Without LIVE_KEY, is_live_refresh() is False in a hook.
    dropped = {*SERVER_KEYS, LIVE_KEY}
    return {key: value for key, value in environ.items() if key not in dropped}


@contextmanager
def hook_context(app: Flask | None, environ: Mapping[str, Any] | None) -> Iterator[None]:
    """Run a hook in a request context of its own, with a `g` of its own.

    At its end the context closes what the hook has opened, such as a database session. If there is
    no environ, because there was no hook when the client connected, it is an application context
    only.
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


def is_forking(environ: Mapping[str, Any]) -> bool:
    """Return whether the web server starts a process for each request, as Werkzeug can."""
    return "gunicorn.socket" not in environ and bool(environ.get("wsgi.multiprocess"))


def read_server_buffers(environ: Mapping[str, Any]) -> bytes:
    """Return the bytes after the handshake that the web server has read into its buffers.

    A client may have sent its first message together with the handshake. Reading does not block,
    because the server's socket has been replaced by a dead one or, for the relay, is non-blocking.
    Some of these attributes are private. If one is missing, b"" is returned.
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

    Many sites and servers use select(), which fails for descriptors of 1024 and more. So sockets
    that were taken over get descriptors from `floor` on, and leave the lower ones to the site. Some
    servers stop if accept() gets no descriptor. So the last RESERVED descriptors stay free.
    """

    RESERVED = 50
    MAX_CONNECTIONS = 10_000

    def __init__(self) -> None:
        self.limit = self._raise_limit()
        self.floor = 1024
        if self.limit < 4096:
            # There are too few descriptors to leave 1024 to the site.
            self.floor = min(200, self.limit // 2)
        self.max_connections = max(
            1, min(self.MAX_CONNECTIONS, self.limit - self.floor - self.RESERVED)
        )
        self._dead = self._create_dead_socket()

    @staticmethod
    def _create_dead_socket() -> socket.socket:
        """Return a socket that behaves as if the client had left, which every server expects.

        Reading returns the end of the stream, and writing fails. SOCK_SEQPACKET raises no SIGPIPE,
        which would stop the process if the site has restored that signal's default. macOS and
        Windows have no SOCK_SEQPACKET.
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
        wanted = 65_536
        if hard != resource.RLIM_INFINITY:
            wanted = min(hard, wanted)
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
        # A burst of events could fill a smaller buffer before the relay's thread runs.
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

    # The size of one read. It is large, because after each system call the thread may wait 5 ms for
    # the GIL if another thread is busy.
    CHUNK = 256 * 1024

    def __init__(self, server: Any, relay: socket.socket) -> None:
        super().__init__(status=101)
        self._server = server
        self._relay = relay

    def get_app_iter(self, environ: Any) -> Iterable[bytes]:
        # Werkzeug's method would not iterate over the body of a 101.
        return self._copy()

    def _copy(self) -> Iterator[bytes]:
        """Copy in both directions until one side closes. It yields no body."""
        ends = (self._server, self._relay)
        # The data that was received and waits to be sent, by the socket that it is sent to.
        waiting = {self._server: b"", self._relay: b""}
        try:
            for end in ends:
                end.setblocking(False)
            while self._copy_once(ends, waiting) and self._copy_once(ends[::-1], waiting):
                self._wait(waiting)
            self._send_last(waiting[self._server])
            waiting[self._server] = b""
        except OSError:
            # One side has closed its connection.
            pass
        finally:
            self._relay.close()
            # The server now writes the headers of its response, which must not reach the client.
            with suppress(OSError):
                socket.socket.shutdown(self._server, socket.SHUT_RDWR)
        if waiting[self._server]:
            # TLS has sent only a part of this data. If the server wrote its headers now, that would
            # fail with an error in its log. After this exception it writes nothing.
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
        """Send the remaining bytes, such as a close frame, within two seconds."""
        self._server.settimeout(2.0)
        if data:
            self._server.sendall(data)

    def _receive(self, source: Any) -> bytes | None:
        """Return the next bytes, b"" at the end of the stream, or None if there are none now."""
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
            for end, other in ((self._server, self._relay), (self._relay, self._server)):
                events = 0
                if waiting[end]:
                    events |= selectors.EVENT_WRITE
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
MAX_TOKEN_LENGTH = 8 * 1024
# The issuer's clock may be this many seconds ahead of ours.
TOKEN_LEEWAY = 60
# The year 10000 in seconds since 1970. A larger `exp` is probably in milliseconds.
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
        if len(token) > MAX_TOKEN_LENGTH:
            raise ValueError
        claims = _decode(settings, token)
        # If `exp` is a string, which PyJWT accepts, the comparison raises TypeError.
        if not 0 < claims["exp"] < MAX_EXPIRY:
            raise OverflowError
        # TOKEN_LEEWAY is for `nbf` and `iat`. PyJWT adds it to `exp` too, which must be exact.
        if claims["exp"] <= time.time():
            raise jwt.ExpiredSignatureError
        return User(check_user_id(claims["sub"], "sub"), claims)
    except Warning:
        # PyJWT warns about a short key. If the site turns warnings into errors, it sees this one.
        raise
    except Exception as error:
        # PyJWT raises many kinds of exceptions for malformed tokens.
        code, message = next(
            (code, message) for kind, code, message in TOKEN_ERRORS if isinstance(error, kind)
        )
    algorithms = " or ".join(settings.jwt_algorithms)
    raise ClientError(code, message.format(algorithms=algorithms))


def _decode(settings: Settings, token: str) -> dict[str, Any]:
    """Verify a token and return its claims. While a site changes its key, older keys count too."""
    keys = (settings.jwt_key, *settings.fallback_keys)
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
    """Log filter that removes tokens from the servers' access logs, and keeps all records.

    Otherwise a reader of the log could sign in with a token.
    """
    try:
        text = record.getMessage()
    except Exception:
        # The record has wrong arguments. The log handler reports that.
        return True
    if "token=" in text:
        record.msg, record.args = re.sub(r"token=[^&\s\"']*", "token=…", text), ()
    return True


# == 10. Session and workers: a client's messages, and code of the site ==========================


class TokenBucket:
    """Limits the rate of one client's messages. Its tokens have nothing to do with JWTs. Loop only.

    The bucket holds up to twice RATE tokens, and gains RATE tokens a second. A message takes one or
    more, even if fewer are left. The client then has to wait until there is one again.
    """

    BURST = 2

    __slots__ = ("_rate", "_tokens", "_updated_at")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate * self.BURST
        self._updated_at = time.monotonic()

    def take(self, count: float) -> bool:
        """Take tokens. Return whether more were taken than there were."""
        self._fill()
        self._tokens -= count
        return self._tokens < 0

    def seconds_to_wait(self) -> float:
        """Return after how many seconds there is one token again."""
        self._fill()
        # 0.999 and not 1, because of rounding errors: the tokens are the sum of many small numbers.
        return max(0.0, (0.999 - self._tokens) / self._rate)

    def _fill(self) -> None:
        now = time.monotonic()
        filled = self._tokens + (now - self._updated_at) * self._rate
        self._tokens = min(self._rate * self.BURST, filled)
        self._updated_at = now


class Received(NamedTuple):
    """A complete message, a control frame or, as CONTINUATION, a part of an incomplete message."""

    opcode: Opcode
    # A str or bytes; the code and reason of a CLOSE; None for CONTINUATION.
    payload: Any
    # The number of tokens that it takes from the bucket.
    cost: int


class MessageReader:
    """Turns the bytes of one client into messages and control frames. Loop only.

    wsproto parses the frames. Bytes after the frame that read() yielded last stay in its buffer.
    """

    # A message takes one token, and one more for each 8 KiB.
    BYTES_PER_TOKEN = 8 * 1024
    # A smaller fragment takes a token too. Otherwise 65,536 fragments of one byte, which are one
    # message, would take only nine.
    SMALL_FRAGMENT = 256

    __slots__ = ("_parser", "_parts", "_size", "is_too_big", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # A message has more bytes than `limit`. Its parts are dropped.
        self.is_too_big = False
        # None after a close frame, or after bytes that are not a frame: what follows is dropped.
        self._parser: FrameProtocol | None = FrameProtocol(client=False, extensions=[])
        # The parts of a message that is not complete yet, and their bytes.
        self._parts: list[Any] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Add bytes of the client, which read() will parse."""
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

    If a client sends faster than RATE, the session reads more slowly. If a message needs a hook of
    the site, or the shared log, a worker runs a task, and the client is not read until it is done.
    """

    # The reasons in log messages for closing a connection, with the settings that decide it.
    CLOSE_REASONS: Mapping[int, str] = {
        CloseCode.MESSAGE_TOO_BIG: "its message was over SWIFTCMS_WS_MAX_MESSAGE",
        CloseCode.TRY_AGAIN_LATER: "it read too slowly (SWIFTCMS_WS_MAX_QUEUE)",
        CloseCode.UNAUTHORIZED: (
            "it did not sign in in time (SWIFTCMS_WS_AUTH), its token expired, or it was signed out"
        ),
        CloseCode.HEARTBEAT_TIMEOUT: "it sent nothing for two heartbeats (SWIFTCMS_WS_HEARTBEAT)",
    }

    FRAMING = WEBSOCKET
    SIGNED_OUT = "the site signed you out; sign in again"
    # Messages of one client are handled for so many seconds before the others get their turn.
    TURN = 0.005
    # A client may have sent frames before it received the close frame. After more frames than this,
    # the connection is aborted.
    MAX_FRAMES_WHILE_CLOSING = 2000

    __slots__ = (
        "_address",
        "_bucket",
        "_frames_while_closing",
        "_is_forgotten",
        "_is_known_to_site",
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
        # The `action` and `ref` of the message that is being handled. Its answer needs them.
        self.action: str | None = None
        self.ref: str | float | None = None
        self.tasks = ClientTasks(self, environ)
        self.expiry = Expiry(self)
        self._address = address
        self._reader = MessageReader(engine.settings.max_message)
        self._bucket = TokenBucket(engine.settings.rate)
        # The client sends too fast, and is not read until the bucket has a token again.
        self._is_throttled = False
        # The client's turn is over, and its other messages wait for the next turn.
        self._is_waiting_for_turn = False
        self._frames_while_closing = 0
        # client_connected was sent, if it has receivers, so client_disconnected has to be sent.
        self._is_known_to_site = False
        # on_closed() was called.
        self._is_forgotten = False

    @classmethod
    def open(
        cls, engine: Engine, handshake: Handshake, environ: dict[str, Any] | None, address: str
    ) -> Connection:
        """Take over the socket of a handshake, send the response and the greeting, and read."""
        client_id = engine.process + secrets.token_hex(6)
        max_queue = engine.settings.max_queue
        assert handshake.own_socket is not None
        own, user = handshake.own_socket, handshake.user
        connection = Connection(client_id, own, engine.loop, max_queue, user, cls.FRAMING)
        connection.session = session = cls(engine, connection, environ, address)
        session.guarded(session._accept, handshake)
        return connection

    def _accept(self, handshake: Handshake) -> None:
        engine, connection = self.engine, self.connection
        connection.update_selector()
        connection.send(handshake.response)
        if connection.state is State.CLOSED:
            return
        engine.registry.add(connection)
        # The flag is read before the greeting, because another thread may set it during the
        # greeting. Such a client is served until the loop closes all connections, so that the site
        # gets both signals of every client that was greeted before the engine began to close.
        is_closing = engine.is_closing
        self._greet()
        if is_closing:
            connection.close(CloseCode.GOING_AWAY, "the server is going away; reconnect with since")
        elif handshake.user and engine.was_signed_out(handshake.user, handshake.began_at):
            self.sign_out()
        if connection.state is not State.OPEN:
            return
        self.expiry.schedule()
        self._is_known_to_site = True
        self._begin_serving(handshake)

    def _begin_serving(self, handshake: Handshake) -> None:
        """Serve the client, after the receivers of client_connected have returned."""

        def connected(_: object = None) -> None:
            self._handle_read_ahead(handshake)

        if client_connected.receivers:
            self.tasks.start(self.tasks.signal_task(client_connected), connected)
        else:
            connected()

    def _handle_read_ahead(self, handshake: Handshake) -> None:
        """Handle the bytes that the client has sent together with the handshake."""
        self.receive(handshake.read_ahead)

    def _greet(self) -> None:
        """Send system.connected. The client gets heartbeats from now on."""
        self.engine.heartbeat.add(self.connection)
        user = self.connection.user
        payload = {
            "clientId": self.connection.id,
            "userId": user.id if user else None,
            "heartbeat": self.engine.settings.heartbeat,
            **resume_fields(self.engine),
        }
        self.connection.send(message_frame("system.connected", payload))

    # -- from bytes to messages --------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether the client is not read now.

        That is if a worker runs a task for it, if it sends too fast, or if the other clients have
        their turn.
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
                self._handle(received)
                if connection.state is State.OPEN and not connection.can_read:
                    break
                if time.monotonic() > turn_ends_at:
                    self._is_waiting_for_turn = True
                    self.engine.loop.call_at(time.monotonic(), self._begin_turn)
                    break
        except ParseFailed as error:
            connection.close_malformed(error.code, str(error))
        except Exception as error:
            self.fail(error)
        connection.update_selector()

    def _begin_turn(self) -> None:
        self._is_waiting_for_turn = False
        self.handle_received()

    def _handle(self, received: Received) -> None:
        """Handle one message or frame, as far as the state of the connection allows."""
        if received.opcode is Opcode.CLOSE:
            code, _ = received.payload
            # 1005 stands for a close frame without a code (RFC 6455 section 7.1.5).
            if code == 1005:
                code = None
            self.connection.answer_close(code)
        elif self.connection.state is State.OPEN:
            self._handle_while_open(received)
        else:
            self._drop_while_closing()

    def _drop_while_closing(self) -> None:
        self._frames_while_closing += 1
        if self._frames_while_closing > self.MAX_FRAMES_WHILE_CLOSING:
            self.connection.abort()

    def _handle_while_open(self, received: Received) -> None:
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
        """Take tokens out of the bucket. If too few are left, stop reading from the client."""
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
        # A timer continues, even if it is due at once. A direct call would handle the next message
        # inside the current one.
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
        """Carry out the action of a message, or answer with system.error."""
        self.action = self.ref = None
        self.guarded(self._do_action, data)

    def _do_action(self, data: str | bytes) -> None:
        message = parse_message(data)
        name = message.get("action")
        if isinstance(name, str):
            self.action = name[:MAX_NAME_LENGTH]
        self.ref = ref_of(message)
        name = string_field(message, "action")
        action = actions().get(name)
        if action is None:
            raise ClientError(
                "unknown_action",
                f"there is no action {json.dumps(name[:MAX_NAME_LENGTH])}"
                f"{did_you_mean(name, actions())}; there are {', '.join(actions())}",
            )
        if self.must_sign_in() and name != "authenticate":
            raise ClientError("auth_required", "sign in first: send authenticate with a token")
        action(self, message)

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function, and handle its exception so that the other clients are not affected.

        A ClientError is answered. After any other exception, the connection is closed: with 1001 if
        the shared log cannot be read, so that the client tries again, and otherwise with 1011.
        """
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
        framing = self.connection.framing
        self.connection.send(framing.message(message_type, payload, content_type, self.ref))

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
                "refused a subscription: the client has %s, as many as"
                " SWIFTCMS_WS_MAX_SUBSCRIPTIONS allows",
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

    # -- closing -----------------------------------------------------------------------------------

    def sign_out(self) -> None:
        """Close the connection, because the site has signed its user out."""
        self.connection.close(CloseCode.UNAUTHORIZED, self.SIGNED_OUT)

    def on_closed(self) -> None:
        """Forget the client and notify the site, because the connection is not OPEN any more."""
        if self._is_forgotten:
            return
        self._is_forgotten = True
        engine, connection = self.engine, self.connection
        engine.registry.remove(connection)
        engine.heartbeat.discard(connection)
        engine.editing.stop_soon(connection.id)
        self._count_close()
        if self._is_known_to_site and client_disconnected.receivers:
            # If a task of this client is running, the signal is sent after it.
            self.tasks.start_last(self.tasks.signal_task(client_disconnected))

    def _count_close(self) -> None:
        """If the server closed the connection, count it; for some close codes also log it."""
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
    handled in order. A slow hook delays only its client, unless it occupies all workers.
    """

    __slots__ = ("_environ", "_last_task", "_session", "is_busy")

    def __init__(self, session: Session, environ: dict[str, Any] | None) -> None:
        self._session = session
        # The environ of the handshake. It is None if there were no hooks.
        self._environ = environ
        # A task is running or queued, or pause() waits.
        self.is_busy = False
        # The task that runs after the current one.
        self._last_task: Callable[[], object] | None = None

    def ask_hook(self, patterns: Sequence[Pattern], then: Callable[..., None], *args: Any) -> None:
        """Ask the authorize hook for all patterns, then call `then(*args, answers)`."""
        engine, user = self._session.engine, self._session.connection.user
        hook = engine.hub.authorize_hook
        if hook is None or not patterns:
            then(*args, [True] * len(patterns))
            return

        connection = self._session.connection

        def task() -> list[bool] | None:
            # If the hook is slow, clients may leave while their tasks are queued.
            if connection.has_left():
                return None
            with hook_context(engine.app, self._environ):
                return [is_allowed(engine, hook(user, *pattern), pattern) for pattern in patterns]

        def answered(answers: list[bool] | None) -> None:
            if answers is None:
                connection.abort()
            else:
                then(*args, answers)

        self.start(task, answered)

    def read_log(self, since: EventId, then: Callable[..., None]) -> None:
        """Read the events after `since` from the shared log, then call `then(events)`."""
        log_ = self._session.engine.log
        assert log_ is not None
        self.start(functools.partial(log_.read_after, since), then)

    def signal_task(self, named: NamedSignal) -> Callable[[], object]:
        """Return a task that sends a signal to the site's receivers."""
        engine, connection = self._session.engine, self._session.connection

        def task() -> None:
            with hook_context(engine.app, self._environ):
                user = connection.user
                named.send(engine.app, hub=engine.hub, client_id=connection.id, user=user)

        return task

    def start(self, task: Callable[[], object], then: Callable[..., None], *args: Any) -> None:
        """Let a worker run a task, then call `then(*args, result)` on the loop.

        If the task raises an exception, guarded() handles it, as if `then` had raised it.
        """
        self._set_busy()
        loop = self._session.engine.loop

        def run() -> None:
            try:
                result = task()
            except BaseException as error:
                # This may be SystemExit, if a hook calls sys.exit(). The worker must not stop.
                loop.call(self._done, _raise, error)
            else:
                loop.call(self._done, then, *args, result)

        self._session.engine.workers.submit(run)

    def pause(self, seconds: float, then: Callable[..., None]) -> None:
        """Call `then()` after some seconds. The client is not read meanwhile."""
        self._set_busy()
        self._session.engine.loop.call_at(time.monotonic() + seconds, self._done, then)

    def start_last(self, task: Callable[[], object]) -> None:
        """Run a task after the current one. The client is not served any more."""
        if self.is_busy:
            self._last_task = task
        else:
            self._session.engine.workers.submit(task)

    def _set_busy(self) -> None:
        self.is_busy = True
        self._session.connection.update_selector()

    def _done(self, then: Callable[..., None], *args: Any) -> None:
        """Continue after a task or a pause, unless the connection was closed meanwhile."""
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


def is_allowed(engine: Engine, answer: object, pattern: Pattern) -> bool:
    """Return whether the authorize hook allowed a pattern. Anything but True refuses it."""
    if answer is not True and answer is not False:
        if inspect.iscoroutine(answer):
            answer.close()
        engine.warn(
            "the authorize hook returned %s for %s, which refuses it: it must return True"
            " or False, and be a plain function without a login decorator",
            type(answer).__name__,
            " ".join(pattern),
        )
    return answer is True


def _raise(error: BaseException) -> None:
    """Raise a task's error on the loop."""
    if isinstance(error, Exception):
        raise error
    # The hook called sys.exit(), which must not stop the loop.
    raise RuntimeError(f"a hook raised {type(error).__name__}") from error


class Expiry:
    """Closes a connection if the client is silent, stuck or not signed in, or if its token expires.

    Loop only.
    """

    # If AUTH is "required", a client has so many seconds to sign in.
    AUTH_TIMEOUT = 10.0
    # Checks are due at multiples of so many seconds, so that one wake-up of the loop serves many
    # clients.
    CHECK_INTERVAL = 0.5

    __slots__ = ("_check_at", "_opened_at", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._opened_at = time.monotonic()
        # When the next check is due.
        self._check_at = float("inf")

    def schedule(self) -> None:
        """Plan the next check for the earliest time at which the connection may have to be closed.

        Until then the client may send something, which moves that time. The check then plans the
        next one.
        """
        session, now = self._session, time.monotonic()
        times = [session.connection.stalled_since(now) + self._max_silence()]
        if session.must_sign_in():
            times.append(self._opened_at + self.AUTH_TIMEOUT)
        user = session.connection.user
        if user is not None and user.expires_at is not None:
            times.append(now + user.expires_at - time.time())
        intervals = max(min(times), now) // self.CHECK_INTERVAL + 1
        when = intervals * self.CHECK_INTERVAL
        if when < self._check_at:
            self._check_at = when
            # The timer gets the client's id, because it must not keep a closed connection in
            # memory.
            client_id = session.connection.id
            session.engine.loop.call_at(when, Expiry.check, session.engine, client_id)

    def _max_silence(self) -> float:
        return self._session.engine.settings.heartbeat * MISSED_HEARTBEATS

    @staticmethod
    def check(engine: Engine, client_id: str) -> None:
        """Close the connection if it has expired; otherwise plan the next check."""
        connection = engine.registry.find(client_id)
        now = time.monotonic()
        if connection is None or now < connection.session.expiry._check_at:
            return
        expiry = connection.session.expiry
        expiry._check_at = float("inf")
        expiry._close_expired(now)
        if connection.state is State.OPEN:
            expiry.schedule()

    def _close_expired(self, now: float) -> None:
        session, limit = self._session, self._max_silence()
        connection = session.connection
        if self._is_silent(now):
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

    def _is_silent(self, now: float) -> bool:
        """Return whether the client has answered no heartbeat for too long."""
        connection = self._session.connection
        if now - connection.silent_since < self._max_silence():
            return False
        if self._session.engine.heartbeat.could_be_answered(connection):
            return True
        # The process was suspended, so the client got no heartbeat that it could answer.
        connection.silent_since = now
        return False

    def _has_token_expired(self) -> bool:
        user = self._session.connection.user
        return user is not None and user.expires_at is not None and user.expires_at <= time.time()

    def _report(self, error: ClientError) -> None:
        # The error is not the answer to a message, so it has no `action` and no `ref`.
        self._session.action = self._session.ref = None
        self._session.report_error(error)


def resume_fields(engine: Engine) -> dict[str, Any]:
    """Return the fields from which a client can resume, in system.connected and heartbeats.

    After an event, each live page refreshes at a random time within `spread` seconds. If all pages
    do, this process is busy for about half of that time.
    """
    clients = engine.registry.slots + engine.pollers.count()
    spread = 2 * engine.refresh_seconds * clients
    return {"lastId": format_event_id(engine.history.newest_id), "spread": round(spread, 3)}


def ref_of(message: Mapping[str, Any]) -> str | float | None:
    """Return the `ref` of a client's message, or None if it has none; or raise ClientError."""
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
MAX_LIST_ITEMS = 1000
# How many tokens of the bucket an authenticate message takes, because checking a JWT takes long.
AUTHENTICATE_COST = 10
# Each time that a `subscriptions` list has so many items, it takes one more token.
ITEMS_PER_TOKEN = 10


@functools.cache
def actions() -> dict[str, Action]:
    """Return the function of each `action` that a client's message may have."""
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
    """Handles one `subscribe` message. Loop only.

    The methods run in this order: __init__() parses the message, and the authorize hook is asked;
    allowed() gets the answers; find_missed() finds the events after `since`, if necessary in the
    shared log; finish() subscribes, answers and sends them.
    """

    # How many seconds to wait if `since` is newer than the newest event of this process.
    SINCE_TIMEOUT = 1.0
    # How many tokens of the bucket a replay of the whole history takes. All clients wait while it
    # is prepared.
    REPLAY_COST = 20

    def __init__(self, session: Session, message: Mapping[str, Any]) -> None:
        self.session = session
        self.is_list = "subscriptions" in message
        self.since: EventId | None = None
        if "since" in message:
            self.since = parse_event_id(message["since"])
        # The patterns that are not refused, each once, in the order of the message.
        self.patterns: list[Pattern] = []
        # The refused items of a list, as the answer names them.
        self.refused: list[dict[str, Any]] = []
        self._deadline = time.monotonic() + self.SINCE_TIMEOUT
        items: Sequence[Any] = [message]
        if self.is_list:
            items = subscription_list(message)
        for item in items:
            self._add_pattern(item)
        self.patterns = list(dict.fromkeys(self.patterns))
        session.consume(len(items) // ITEMS_PER_TOKEN)

    def _add_pattern(self, item: Mapping[str, Any]) -> None:
        try:
            pattern = parse_pattern(item)
        except ClientError as error:
            self._refuse(item.get("type", "*"), item.get("contentType", "*"), error)
        else:
            self.patterns.append(pattern)

    def _refuse(self, event_type: object, content_type: object, error: ClientError) -> None:
        """Add a refused item of a list to the answer, or raise the error if there is no list."""
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
        """Keep the patterns that the hook allowed, up to the limit, and find the missed events."""
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
        """Find the events after `since` in the history or, if they are older, in the shared log."""
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
            # The event may be of another process, and the follower will read it soon.
            self.session.tasks.pause(0.02, self.find_missed)
        else:
            self.finish(None)

    def read(self, older: list[Event] | None) -> None:
        """Continue with the events that were read from the shared log.

        The loop may have delivered newer ones meanwhile.
        """
        history = self.session.engine.history
        if older is None:
            self.finish(None)
        elif not older:
            self.finish(history.after(cast(EventId, self.since)))
        else:
            self.finish(history.append_newer(older))

    def finish(self, events: list[Event] | None) -> None:
        """Subscribe, answer and replay.

        This runs on the loop, so no event is delivered in between.
        """
        session = self.session
        engine, connection = session.engine, session.connection
        missed = engine.registry.missed(connection, self.patterns, events or [])
        start = engine.history.newest_id
        if self.since is not None and events is not None:
            start = self.since
        for pattern in self.patterns:
            engine.registry.subscribe(connection, pattern, start)
        recovery = {"recovered": events is not None, "replayed": len(missed)}
        self.answer({**self.pattern_fields(), **recovery})
        connection.send_replay([connection.framing.event(event) for event in missed])
        engine.counters.add("replayed", len(missed))
        # All events after `since` count, because finding the missed ones among them takes as long
        # as sending them.
        session.consume(self.REPLAY_COST * len(events or []) / max(1, engine.settings.history))

    def answer(self, payload: Mapping[str, Any]) -> None:
        self.session.answer("system.subscribed", payload)

    def pattern_fields(self) -> dict[str, Any]:
        """Return the fields of the answer that name the patterns."""
        if not self.is_list:
            event_type, content_type = self.patterns[0]
            return {"type": event_type, "contentType": content_type}
        return {"subscriptions": describe_patterns(self.patterns), "refused": self.refused}


def subscribe(session: Session, message: Mapping[str, Any]) -> None:
    subscribing = Subscribing(session, message)
    session.tasks.ask_hook(subscribing.patterns, subscribing.allowed)


def unsubscribe(session: Session, message: Mapping[str, Any]) -> None:
    if "subscriptions" in message:
        payload = _unsubscribe_list(session, message)
    else:
        payload = _unsubscribe_one_or_all(session, message)
    session.answer("system.unsubscribed", payload)


def _unsubscribe_list(session: Session, message: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the subscriptions of a list, and return the payload of the answer."""
    items = subscription_list(message)
    # A malformed item raises ClientError before any subscription is removed.
    patterns = list(dict.fromkeys(map(parse_pattern, items)))
    removed = session.engine.registry.unsubscribe(session.connection, patterns)
    session.consume(len(items) // ITEMS_PER_TOKEN)
    return {"subscriptions": describe_patterns(patterns), "removed": removed}


def _unsubscribe_one_or_all(session: Session, message: Mapping[str, Any]) -> dict[str, Any]:
    """Remove one subscription or, if the message names none, all of them."""
    event_type, content_type = parse_pattern(message)
    patterns = None
    if "type" in message or "contentType" in message:
        patterns = [(event_type, content_type)]
    removed = session.engine.registry.unsubscribe(session.connection, patterns)
    return {"type": event_type, "contentType": content_type, "removed": removed}


def describe_patterns(patterns: Iterable[Pattern]) -> list[dict[str, str]]:
    return [{"type": event_type, "contentType": kind} for event_type, kind in patterns]


def subscription_list(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the items of a message's `subscriptions`, or raise ClientError."""
    items = message["subscriptions"]
    is_list = isinstance(items, list) and all(isinstance(item, dict) for item in items)
    if not is_list or not 1 <= len(items) <= MAX_LIST_ITEMS:
        found = describe(items)
        if is_list:
            found = f"a list of {len(items)}"
        raise ClientError(
            "invalid_message",
            f"`subscriptions` must be a list of 1 to {MAX_LIST_ITEMS} objects with `type` and"
            f" `contentType`, not {found}",
        )
    if "type" in message or "contentType" in message:
        raise ClientError(
            "invalid_message",
            "`type` and `contentType` belong in the items of `subscriptions`, not beside it",
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
        # Keep the session id that the identify hook returned.
        user = dataclasses.replace(user, session=connection.user.session)
    # This runs on the loop, so no event is delivered between reading the newest id and setting the
    # user.
    engine.registry.sign_in(connection, user, engine.history.newest_id)
    session.expiry.schedule()
    expires_at = timestamp(int(user.claims["exp"] * 1000))
    session.answer("system.authenticated", {"userId": user.id, "expiresAt": expires_at})


def pong(session: Session, message: Mapping[str, Any]) -> None:
    """Do nothing. Any bytes from the client have already ended its silence."""


def heartbeat(session: Session, message: Mapping[str, Any]) -> None:
    session.answer("system.heartbeat", resume_fields(session.engine))


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
        # Guards the list of threads and the number of unfinished tasks.
        self._lock = threading.Lock()
        # Notified when no task is left.
        self._idle = threading.Condition(self._lock)
        # Tasks that are queued or running. Reading it is atomic.
        self.unfinished = 0
        self._threads: list[threading.Thread] = []
        # The class is looked up in its module at this time, because gevent may have replaced it
        # after this module was imported (gunicorn --preload).
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # The log records of Engine.report(), in order.
        self.records = SerialQueue(self, self.MAX_RECORDS)

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task, and start the threads that are not running yet."""
        with self._lock:
            self.unfinished += 1
            # If a thread cannot start, the next task tries again. While the interpreter exits, none
            # can start, and wait_until_idle() runs the tasks.
            with suppress(RuntimeError):
                for number in range(len(self._threads) + 1, self.COUNT + 1):
                    name = f"swiftcms-ws worker {number}"
                    thread = threading.Thread(target=self._run, name=name, daemon=True)
                    thread.start()
                    self._threads.append(thread)
        self._tasks.put(task)

    def _run(self) -> None:
        """Thread body: run tasks until the queue returns None."""
        while (task := self._tasks.get()) is not None:
            self._run_task(task)

    def _run_task(self, task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            # This may be SystemExit, if a receiver of a signal calls sys.exit().
            log(logging.ERROR, "a function of the site failed", exc_info=error)
        with self._idle:
            self.unfinished -= 1
            if not self.unfinished:
                self._idle.notify_all()

    def wait_until_idle(self, deadline: float) -> None:
        """Wait until no task is left, or until the deadline."""
        if not any(thread.is_alive() for thread in self._threads):
            self._run_queued(deadline)
        with self._idle:
            self._idle.wait_for(
                lambda: not self.unfinished, max(0.0, deadline - time.monotonic())
            )

    def _run_queued(self, deadline: float) -> None:
        """Run tasks in this thread, because no worker could start."""
        with suppress(queue.Empty):
            while time.monotonic() < deadline:
                task = self._tasks.get_nowait()
                if task is not None:
                    self._run_task(task)

    def request_stop(self) -> list[threading.Thread]:
        """Let the threads exit after the queued tasks. Takes no lock."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        return threads

    def stop(self, deadline: float) -> None:
        """Let the threads exit after the queued tasks, and wait for them until the deadline."""
        threads = self.request_stop()
        for thread in threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


class SerialQueue:
    """A queue of tasks that workers run one at a time and in order. Any thread may add one.

    However slow the tasks are, they occupy only one worker. If more than `limit` wait, the oldest
    are dropped.
    """

    def __init__(self, workers: Workers, limit: int) -> None:
        self._workers = workers
        # Guards the tasks and `_is_running`, which is True while a worker runs them.
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
        """Task of a worker: run the queued tasks until none is left."""
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
    """A thread that asks the loop to send heartbeats.

    The interval is divided into slices, and each connection belongs to one of them. So the
    heartbeats of ten thousand clients, and their answers, are spread over the whole interval. The
    loop owns the slices, and runs all methods except start(), stop() and the thread body.
    """

    # How often the thread checks whether gunicorn stops its worker, in seconds.
    CHECK_INTERVAL = 0.5
    MAX_SLICES = 100
    # After the heartbeats of so many slices (5 seconds), names of events are compared with those of
    # subscriptions.
    SLICES_PER_CHECK = 20
    # The most patterns and names that are compared, and the most names that are logged.
    MOST_PATTERNS, MOST_NAMES = 100, 10

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        interval = engine.settings.heartbeat
        count = max(1, min(self.MAX_SLICES, round(interval / 0.25)))
        self._pause = interval / count
        # Dictionaries without values are sets that keep their order. Loop only.
        self._slices: list[dict[Connection, None]] = [{} for _ in range(count)]
        self._slice_of: dict[Connection, int] = {}
        # When each slice had its last two heartbeats. Loop only.
        self._beats: list[deque[float]] = [deque(maxlen=2) for _ in range(count)]
        self._next_slice = 0
        # Names of events up to this one have been compared. Loop only.
        self._seen_id = engine.history.newest_id
        # Types and content types that had no subscriber. The loop sets it, and the thread takes it.
        self._unheard: set[tuple[str, str]] = set()
        # Names that were logged. Thread only.
        self._logged: set[tuple[str, str]] = set()
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
                if self._stopped.wait(min(left, self.CHECK_INTERVAL)) or self._engine.is_closing:
                    return
                if is_gunicorn_stopping():
                    close_engines([self._engine], timeout=2.0)
                    return
            self._engine.loop.call(self._beat, number)
            self._log_similar_names()
            # After the process was suspended, missed beats are not made up for.
            next_beat = max(next_beat + self._pause, time.monotonic())

    def _log_similar_names(self) -> None:
        """Log an event without a subscriber if somebody subscribes to a similar name."""
        unheard, self._unheard = self._unheard, set()
        unheard -= self._logged
        if not unheard or len(self._logged) >= self.MOST_NAMES:
            return
        patterns = self._engine.registry.patterns(self.MOST_PATTERNS)
        for event_type, content_type in itertools.islice(unheard, self.MOST_NAMES):
            for pattern in patterns:
                if is_similar(pattern[0], event_type) and is_similar(pattern[1], content_type):
                    self._logged.add((event_type, content_type))
                    self._engine.warn(
                        f"no client subscribes to the event {event_type} of {content_type}, but"
                        f" there is a subscription to {pattern[0]} of {pattern[1]}: is one of these"
                        " names a mistake?",
                        once=True,
                    )
                    break

    # -- the loop's thread -------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        self._slices[self._next_slice][connection] = None
        self._slice_of[connection] = self._next_slice
        self._next_slice = (self._next_slice + 1) % len(self._slices)

    def discard(self, connection: Connection) -> None:
        number = self._slice_of.pop(connection, None)
        if number is not None:
            del self._slices[number][connection]

    def could_be_answered(self, connection: Connection) -> bool:
        """Return whether a silent client had a heartbeat to answer, and the time to answer it."""
        number = self._slice_of.get(connection)
        if number is None:
            # It still waits for older events, and gets heartbeats after them.
            return False
        latest = time.monotonic() - self._engine.settings.heartbeat / 2
        return any(connection.silent_since <= beat <= latest for beat in self._beats[number])

    def _beat(self, number: int) -> None:
        """Send a slice of the connections their heartbeat."""
        engine = self._engine
        self._beats[number].append(time.monotonic())
        if number == 0:
            engine.exchange.beat()
            if engine.follower is not None:
                engine.follower.check()
        if number % self.SLICES_PER_CHECK == 0 and engine.history.newest_id > self._seen_id:
            names = engine.history.names_after(self._seen_id)
            self._seen_id = engine.history.newest_id
            self._unheard = {name for name in names if not engine.registry.has_subscriber(*name)}
        for framing in engine.registry.framings:
            connections = [each for each in self._slices[number] if each.framing is framing]
            if connections:
                Connection.send_to_all(connections, framing.heartbeat(resume_fields(engine)))


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
    # How many editors of clients that are gone are removed before other clients are served.
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
                if entry in self._editors:
                    return [entry]
                return []
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

    def stop_soon(self, client_id: str) -> None:
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
        changes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        while self._leaving and sum(map(len, changes.values())) < self.STOPS_AT_ONCE:
            client_id = self._leaving[0]
            entries = self.entries_of(client_id)
            for entry in entries[: self.STOPS_AT_ONCE]:
                editor = self._remove(entry, client_id)
                if editor is not None:
                    changes[entry[0]].append(self._describe_change(entry, editor))
            if len(entries) <= self.STOPS_AT_ONCE:
                self._leaving.popleft()
        for content_type, payloads in changes.items():
            self._broadcast("user.stoppedEditing", content_type, payloads)
        self._engine.exchange.queue_list()
        if self._leaving:
            self._engine.loop.call_at(time.monotonic(), self._stop_leaving)

    def describe(self, entry: Entry) -> dict[str, Any]:
        """Return the fields about an entry's editors that several messages have."""
        editors = [editor.as_json() for editor in self.editors(entry)]
        return {"entryId": entry[1], "editors": editors, "conflict": len(editors) > 1}

    def _changed(self, event_type: str, entry: Entry, editor: Editor) -> None:
        """Broadcast a change to its subscribers, and queue our list for other processes."""
        self._broadcast(event_type, entry[0], [self._describe_change(entry, editor)])
        if editor.process == self._engine.process:
            self._engine.exchange.queue_list()

    def _describe_change(self, entry: Entry, editor: Editor) -> dict[str, Any]:
        return {**self.describe(entry), "editor": editor.as_json()}

    def _broadcast(
        self, event_type: str, content_type: str, payloads: list[dict[str, Any]]
    ) -> None:
        """Send changes of one content type to their subscribers."""
        registry = self._engine.registry
        for framing in registry.framings:
            connections = registry.matching(event_type, content_type, None, framing)
            if connections:
                messages = [framing.message(event_type, each, content_type) for each in payloads]
                Connection.send_to_all(connections, b"".join(messages))

    def relay(self, entry: Entry, editor: Editor, change: object) -> None:
        """Send a change to the other editors of this process, subscribed or not."""
        payload = {"entryId": entry[1], "editor": editor.as_json(), "change": change}
        frame = message_frame("user.edited", payload, entry[0])
        for other in self.editors(entry):
            connection = self._engine.registry.find(other.client_id)
            if connection is not None and other.client_id != editor.client_id:
                connection.send(frame)


class EditorExchange:
    """Sends the editors of this process to the other processes, and receives theirs.

    With a shared log each process sends a list of its own editors when they change, and once a
    heartbeat while it has some. Other processes compare it with the previous list. Loop only,
    except for the tasks in the outbox.
    """

    # Without a list from a process for so many heartbeats, its editors are gone.
    MISSED_LISTS = 3

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # When each other process last sent its list.
        self._list_received_at: dict[str, float] = {}
        # Messages to other processes, in order. Only a worker waits for the shared log.
        self._outbox = SerialQueue(engine.workers, limit=1000)
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
            # The outbox may have dropped the previous list.
            self._is_list_queued = False
            self.queue_list()
        silence = self._engine.settings.heartbeat * self.MISSED_LISTS
        for process, heard_at in list(self._list_received_at.items()):
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
            self._list_received_at[process] = time.monotonic()
        else:
            self._list_received_at.pop(process, None)
        for entry, editor in known - found:
            self._engine.editing.stop(entry, editor.client_id)
        for entry, editor in found - known:
            self._engine.editing.start(entry, editor)


# -- actions ---------------------------------------------------------------------------------------


def edit_start(session: Session, message: Mapping[str, Any]) -> None:
    entry = entry_of(message)
    session.tasks.ask_hook([("user.editing", entry[0])], _start_allowed, session, entry)


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
    session.tasks.ask_hook([("user.editing", entry[0])], _stop_allowed, session, entry)


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
    session.tasks.ask_hook([pattern], _change_allowed, session, entry, message["payload"])


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
    fields = {key: message[key] for key in message if key == "contentType"}
    content_type = parse_pattern(fields)[1]
    entry_id = None
    if "entryId" in message:
        entry_id = string_field(message, "entryId")
    pattern = ("user.editing", content_type)
    session.tasks.ask_hook([pattern], _presence_allowed, session, content_type, entry_id)


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
    if not 0 < len(entry_id) <= MAX_NAME_LENGTH:
        raise ClientError(
            "invalid_message", f"`entryId` must have 1 to {MAX_NAME_LENGTH} characters"
        )
    return content_type, entry_id


# == 13. Shared logs: SQLite on one machine, Redis on several ====================================

# A position in a shared log: the last event that was read, and the last control message.
Position = tuple[EventId, str]
# An event without recipients. It is appended to an empty log, to have a position to continue from.
MARKER = Draft("system.marker", "system", "{}", frozenset())
# The type of an event that signs a user out in all processes; no client receives it. Unlike control
# messages, events cannot be lost without notice: the follower then disconnects all clients.
SIGN_OUT = "system.disconnect"


class SharedLog:
    """A log that all processes append to and read: the interface of SqliteLog and RedisLog.

    It gives the ids, and one order, to the events of all processes. It also carries control
    messages between processes: lists of editors and changes, which are never replayed. Any thread
    may call append(), send() and read_after(), which give up within two seconds, and newest_id().
    Only the follower calls find_position(), read_on() and stop_reading(). If the log cannot be
    used, append() and send() raise PublishError, and the other methods raise LogUnavailable.
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
    # Until the follower has begun, every page waits for newest_id(), up to twice this many seconds:
    # for a connection, and for the answer.
    NEWEST_TIMEOUT = 0.05

    # What log records call it, and how it may have lost events.
    name: str
    loss_hint: str

    def __init__(self, settings: Settings, is_trimming: bool, report: Callable[..., None]) -> None:
        self._history = settings.history
        # Only a process with an app trims: a script does not know the site's HISTORY.
        self._max_events: int | None = None
        if is_trimming:
            self._max_events = settings.history + self.FOLLOWER_ROOM
        self._report = report
        # The newest event of this process, for flush(). Reading it is atomic.
        self.last_appended: EventId = (0, 0)
        # Held to change it. Re-entrant, because a signal handler that publishes may interrupt its
        # own thread while that thread holds the lock.
        self._appended_lock = threading.RLock()
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
            # The site may catch PublishError, and the follower, which logs too, may still be able
            # to read.
            if time.monotonic() > self._logged_at + self.LOG_INTERVAL:
                self._logged_at = time.monotonic()
                log(logging.WARNING, "publish() failed: %s", error)
            # Redis may store it all the same if it hangs after it has received the command.
            raise PublishError(
                "the shared log has not confirmed the event, so it is probably not stored; publish"
                f" it again later: {error}"
            ) from error
        with self._appended_lock:
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
        """Return the id of the newest event, or None if there is none. Soon: see NEWEST_TIMEOUT."""
        raise NotImplementedError

    def read_after(self, since: EventId) -> list[Event] | None:
        """Return the events after `since`; None if some of them are not kept any more."""
        raise NotImplementedError

    def find_position(self) -> Position:
        """Return the newest position. An empty log gets a marker event first."""
        raise NotImplementedError

    def read_on(self, place: Position) -> tuple[list[Event], list[str], Position] | None:
        """Wait about a second for new entries; return events, messages, and the place after them.

        None if the place is not in the log any more: it was trimmed, or this is another log.
        """
        raise NotImplementedError

    def parse_event(self, event_id: EventId, fields: Mapping[str, Any]) -> Event:
        """Return an event of the log, or a marker for an entry of another program.

        If such an entry raised an exception, it would stop the follower.
        """
        try:
            to = None
            if fields.get("to") is not None:
                to = frozenset(json.loads(fields["to"]))
            draft = Draft(fields["type"], fields["contentType"], fields["payload"], to)
            return Event(event_id, draft)
        except (KeyError, ValueError, TypeError, AttributeError):
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
    # The most connections of this process to all its files.
    MAX_OPEN = 40
    # By words of an error's message.
    HINTS: ClassVar[dict[str, str]] = {
        "locked": "Another program holds its lock. To copy it while the site runs, use"
        " `sqlite3 FILE '.backup COPY'`.",
        "readonly": "This process must be able to write the file and its directory.",
        "unable to open": "This process must be able to read and write the file and its directory.",
        "Permission denied": "This process must be able to read and write the directory.",
        "temporarily unavailable": "Other processes take too long to open it.",
        "full": "The disk is full: delete other files.",
        "disk I/O": "Is the disk full or broken, or was its -wal deleted?",
        "malformed": "It is damaged: delete it, its -wal and its -shm. Then clients load their data"
        " again.",
        "not a database": "It is damaged, or another file: delete it, or choose another name.",
        "No such file": "Create the directory.",
        "locking protocol": "Is it on a network file system? Choose a local disk, or use Redis.",
    }
    # Files of which a forked child has inherited a connection, because another thread used it for
    # too long. To close it would damage the file, and this process cannot use SQLite any more.
    inherited: ClassVar[list[LogFile]] = []

    def __init__(self, path: str, timeout: float) -> None:
        """timeout: how long one use may wait for other threads and processes, in seconds."""
        # SQLite puts the other two files beside the target of a symbolic link.
        self._path = path = os.path.realpath(path)
        self._timeout = timeout
        self._directory = os.path.dirname(path)
        # The thread that uses the connection, and those that wait for it. (A connection for each
        # thread would need no lock, but Werkzeug starts a thread for each request.) This list is
        # the lock. A threading.Lock with a timeout would stay locked for ever if a signal handler
        # raised an exception, such as Celery's time limit, just when acquire() returns.
        self._queue = list[int]()
        # Only for the first in the queue: the connection, and device and number of the three files.
        self._connection: sqlite3.Connection | None = None
        self._identity: list[tuple[int, int] | None] = []
        _log_files.add(self)

    def __del__(self) -> None:
        self._close()

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection to the file that has the path now. Open it if it is not open.

        Raises LogUnavailable if the file cannot be used.
        """
        with self._turn(self._timeout / 2):
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
                    # Without the path, in which a word of HINTS may occur.
                    problem = getattr(error, "strerror", None) or str(error)
                    raise self._unavailable(problem) from error
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
        """Like use(), for one transaction that writes: it is stored completely or not at all."""
        deadline = time.monotonic() + self._timeout
        with self.use() as connection:
            self._begin(connection, deadline)
            yield connection
            connection.execute("COMMIT")

    def close(self) -> None:
        """Close the connection, unless a thread uses it for longer than the timeout."""
        with suppress(LogUnavailable), self._turn(self._timeout / 2):
            self._close()

    # -- for the first in the queue ----------------------------------------------------------------

    def _begin(self, connection: sqlite3.Connection, deadline: float) -> None:
        """Begin a transaction that writes, as soon as no other process writes.

        SQLite itself would pause for up to 100 ms between two attempts. If other processes publish
        all the time, the file is free for microseconds only, and this process would starve.
        """
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
            connection.execute(f"PRAGMA busy_timeout = {round(self._timeout * 250)}")

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
            self._limit_open_files()
            if not os.path.lexists(self._path):
                self._create()
            created = self._find_identity()[0]
            uri = f"{Path(self._path).as_uri()}?{self.URI_OPTIONS}"
            self._connection = sqlite3.connect(
                uri,
                uri=True,
                timeout=self._timeout / 4,
                isolation_level=None,
                check_same_thread=False,
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
        deadline = time.monotonic() + self._timeout / 4
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
        for other in _log_files.copy():
            is_other = other is not self and other.has_connection()
            if is_other and other._identity[0] == now[0] and other._identity != now:
                with other._turn(0):
                    other._close()

    def _limit_open_files(self) -> None:
        """Close the oldest connections. Apps that tests have created may not be freed for long."""
        open_files = [file for file in _log_files.copy() if file.has_connection()]
        for file in open_files[: 1 - self.MAX_OPEN]:
            with suppress(LogUnavailable), file._turn(0):
                file._close()

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

    def begin_fork(self) -> None:
        """Close the connection, and let no thread open it until the fork is over.

        A child that inherits one would believe that it holds the locks of its parent.
        """
        with suppress(LogUnavailable, RuntimeError):
            _fork_turns.enter_context(self._turn(self.FORK_TIMEOUT))
            self._close()

    def has_connection(self) -> bool:
        return self._connection is not None


_log_files: WeakList[LogFile] = WeakList()
# Held during a fork, because two threads may fork at the same time. The stack holds the turns at
# the files, which a fork takes before it and gives back after it.
_fork_lock = threading.Lock()
_fork_turns = ExitStack()


def _begin_fork() -> None:
    _fork_lock.acquire()
    for file in _log_files.copy():
        file.begin_fork()


def _end_fork() -> None:
    _fork_turns.close()
    _fork_lock.release()


def _end_fork_in_child() -> None:
    """Forget the files, because threads that do not exist in the child may be in their queues."""
    LogFile.inherited += [file for file in _log_files.copy() if file.has_connection()]
    _log_files.clear()
    _end_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_begin_fork,
        after_in_parent=_end_fork,
        after_in_child=_end_fork_in_child,
    )


def is_locked(error: BaseException) -> bool:
    """Return whether SQLite gave up waiting for the lock of another connection."""
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
    threads share one. A publisher wakes all followers with a UDP datagram on 127.0.0.1. Each of
    them also reads the file once a second, because a container may share the file, but not the
    network.
    """

    # How long a method may wait for the file, in seconds.
    TIMEOUT = 1.8
    # The same for the follower. Clients wait for it meanwhile.
    FOLLOWER_TIMEOUT = 0.8
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
        # newest_id() must not wait for publish().
        self._newest_file = LogFile(path, self.NEWEST_TIMEOUT)
        # The newest id, as a number, that this process has given or read. Later ids are greater,
        # even if the file is replaced and the clock is wrong. Setting it is atomic.
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
                receivers = None
                if draft.to is not None:
                    receivers = json.dumps(sorted(draft.to))
                rows.append((first + index, position + 1 + index, size, *draft[:3], receivers))
            # Followers trim too, but there may be none. None has read the new events yet.
            if position // self.TIDY_STEP < (position + len(rows)) // self.TIDY_STEP:
                self._trim(connection)
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
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
        with self._newest_file.use() as connection:
            row = self._last_row(connection)
        if row is None:
            return None
        return self._to_id(row[0])

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
        self._newest_file.close()
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
        if rows and rows[0][0] == number:
            return rows[1:]
        return None

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
        # A process that is not woken reads the file within a second.
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            for port in ports:
                with suppress(OSError, OverflowError):
                    sock.sendto(b"\0", ("127.0.0.1", port))

    # -- the follower's thread ---------------------------------------------------------------------

    def find_position(self) -> Position:
        if self._listener is None:
            # A site behind a Unix socket may not be allowed to open other sockets.
            with suppress(OSError):
                self._listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                self._listener.bind(("127.0.0.1", 0))
                self._port = self._listener.getsockname()[1]
        # Before the end of the log is read. So each event after it sends a datagram to this port.
        self._confirm_port()
        with self._own_file.use() as connection:
            row = self._last_row(connection)
            message = connection.execute("SELECT max(id) FROM messages").fetchone()[0] or 0
        if row is None:
            return self.append([MARKER])[0], str(message)
        return self._to_id(row[0]), str(message)

    def read_on(self, place: Position) -> tuple[list[Event], list[str], Position] | None:
        is_woken = self._has_more or self._wait()
        if time.monotonic() > self._confirm_at:
            # If another process holds the lock for long, the next call tries again.
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
            # The publisher does not know our port, or cannot reach it: write it again.
            self._confirm_at = 0
        self._untidy += len(rows)
        # Not while there is more to read: it could delete events that are not read yet.
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
        if self._listener is None:
            time.sleep(self.POLL_INTERVAL)
            return False
        self._listener.settimeout(self.POLL_INTERVAL)
        try:
            self._listener.recv(16)
            # All datagrams that have arrived need only one look at the file.
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

        Otherwise publish() would sometimes move the journal, and take a hundred times as long.
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
    BLOCK_MS = 500
    # A connection that was idle for this many seconds is tested, because a firewall may have
    # dropped it.
    MAX_IDLE = 5.0

    name = "Redis"
    loss_hint = "does it keep them on disk?"

    def __init__(self, settings: Settings, is_trimming: bool, report: Callable[..., None]) -> None:
        super().__init__(settings, is_trimming, report)
        redis = import_redis()
        self._redis = self._create_client(settings, self.TIMEOUT)
        self._impatient = self._create_client(settings, self.NEWEST_TIMEOUT)
        self._redis_errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._read_only_error: type[Exception] = redis.ReadOnlyError
        self._events = f"{settings.redis_prefix}:events"
        self._messages = f"{settings.redis_prefix}:messages"
        self._guard = AppendGuard()
        # When publish() or send() last used Redis. Setting it is atomic.
        self._used_at = time.monotonic()

    @staticmethod
    def _create_client(settings: Settings, timeout: float) -> Any:
        redis = import_redis()
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415

        return redis.Redis.from_url(
            cast(str, settings.redis_url),
            decode_responses=True,
            # Another program may write into the stream: one entry must not stop the follower.
            encoding_errors="replace",
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # A page waits for publish(): it fails soon.
            retry=Retry(NoBackoff(), 0),
        )

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
        return self._newest(self._impatient)

    def _newest(self, client: Any) -> EventId | None:
        with self._translated_errors():
            newest = client.xrevrange(self._events, count=1)
        if not newest:
            return None
        return parse_event_id(newest[0][0])

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
        for client in (self._redis, self._impatient):
            client.close()
            # Version 5.0.0 of the package leaves that to the garbage collector.
            client.connection_pool.disconnect()

    # -- the follower's thread ---------------------------------------------------------------------

    def find_position(self) -> Position:
        newest = self._newest(self._redis) or self.append([MARKER])[0]
        with self._translated_errors():
            messages = self._redis.xrevrange(self._messages, count=1)
        if not messages:
            return newest, "0-0"
        return newest, messages[0][0]

    def read_on(self, place: Position) -> tuple[list[Event], list[str], Position] | None:
        event_id, message_id = place
        here = format_event_id(event_id)
        with self._translated_errors(), self._redis.pipeline(transaction=False) as pipe:
            streams = {self._events: here, self._messages: message_id}
            pipe.xread(streams, count=self.READ_SIZE, block=self.BLOCK_MS)
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

    It owns the position up to which this process has read. If the log cannot be read, it tries
    again, and continues at this position. If the position is not in the log any more, events may be
    lost. Then all clients are disconnected. When they resume, they get `"recovered": false`.
    """

    # The pause before the next attempt, in seconds. It is doubled each time.
    MIN_PAUSE = 0.05
    MAX_PAUSE = 1.0
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
        self._place: Position | None = None

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
        pause = self.MIN_PAUSE
        while not self._is_stopping():
            try:
                self._read()
            except BaseException as error:
                if not self._is_stopping():
                    self._report_error(error, is_first=pause == self.MIN_PAUSE)
                    pause = min(pause * 2, self.MAX_PAUSE)
                    self._stopped.wait(pause * random.uniform(0.5, 1))
            else:
                self._read_at = time.monotonic()
                if pause != self.MIN_PAUSE:
                    self._engine.report(logging.WARNING, "%s is back", self._log.name)
                pause = self.MIN_PAUSE
        self._log.stop_reading()

    def _is_stopping(self) -> bool:
        return self._stopped.is_set() or self._engine.is_closing

    def _report_error(self, error: BaseException, is_first: bool) -> None:
        """Log an error. While the shared log cannot be used, log only the first error."""
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
        """Read new events and messages, and queue them for the loop in order."""
        loop = self._engine.loop
        if self._place is None:
            place = self._log.find_position()
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
                "%s lost events (%s), or could not be read for too long. All %s clients of this"
                " process are disconnected; they reconnect and load their data again",
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

# Keys of environ: the newest event's id when the request began, and, only in a refresh, a copy of
# the session.
NEWEST_KEY = "swiftcms_ws.newest_id"
LIVE_KEY = "swiftcms_ws.live"


def is_live_refresh() -> bool:
    """Return whether the current request is a page with `data-live` that fetches itself again.

    It is not a visit, so do not note it in a column such as `last_seen`. An event of that change
    would make all pages fetch themselves again, for ever.
    """
    return has_request_context() and LIVE_KEY in request.environ


def swiftcms_last_id() -> str:
    """For templates: the newest event's id when the request began, or "" if it is not known."""
    if not has_request_context():
        return ""
    return cast(str, request.environ.get(NEWEST_KEY, ""))


class LivePages:
    """WSGI middleware of an app, for pages with `data-live`. Runs in the web server's threads.

    It takes the newest event's id before the site reads any data, so that a page can subscribe from
    there. A refresh gets no cookie and its session is not stored. Otherwise it would use up flash
    messages, extend logins for ever, and undo a logout that happens meanwhile.
    """

    def __init__(self, hub: Hub, app: Flask) -> None:
        self._hub, self._app, self._wsgi_app = hub, app, app.wsgi_app
        # The app's session interface, with two methods replaced. Setting it is atomic.
        self._sessions: SessionInterface | None = None
        # Until the first refresh, ordinary pages stand in for refreshes in the average time.
        self._has_refreshed = False
        app.context_processor(lambda: {"swiftcms_last_id": swiftcms_last_id})
        app.wsgi_app = self  # type: ignore[method-assign]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        newest = environ[NEWEST_KEY] = self._newest_id()
        is_live = environ["REQUEST_METHOD"] == "GET" and environ.get("HTTP_X_SWIFTCMS_LIVE") == "1"
        is_page = False

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            nonlocal is_page
            if is_live:
                headers = [field for field in headers if field[0].lower() != "set-cookie"]
                # Without Set-Cookie, a proxy could cache this response for other visitors.
                headers.append(("Cache-Control", "private"))
            is_html = "html" in Headers(headers).get("Content-Type", "")
            is_page = is_html and status.startswith("200")
            # A 304 has no Content-Type. With its headers, browsers update those of the stored page.
            if newest and (is_html or status.startswith("304")):
                headers = [*headers, ("Server-Timing", f'swiftcms;desc="{newest}"')]
            return start_response(status, headers, *exc_info)

        if is_live:
            environ[LIVE_KEY] = {}
            self._guard_sessions()
        began = time.perf_counter()
        body = self._wsgi_app(environ, start)
        seconds = time.perf_counter() - began
        # A stream or a WebSocket may take hours.
        if is_live and is_page:
            self._has_refreshed = True
            return ClosingIterator(self._timed(body, seconds), getattr(body, "close", None))
        if is_page and not self._has_refreshed:
            self._add_time(seconds)
        return body

    def _newest_id(self) -> str:
        """Return the newest event's id, or "" if the shared log does not answer at once."""
        # If the configuration is wrong, publish() raises the error. Pages are served without an id.
        with suppress(Exception):
            newest = self._hub.engine_of(self._app).newest_id()
            if newest is not None:
                return format_event_id(newest)
        return ""

    def _timed(self, body: Iterable[bytes], seconds: float) -> Iterator[bytes]:
        """Yield the body of a refresh. The time that the client takes to read it does not count."""
        began = time.perf_counter()
        for part in body:
            seconds += time.perf_counter() - began
            yield part
            began = time.perf_counter()
        self._add_time(seconds + time.perf_counter() - began)

    def _add_time(self, seconds: float) -> None:
        """Update the average. If two threads do so at once, one of them may not be counted."""
        for engine in self._app.extensions["swiftcms_ws"].values():
            if engine is not None:
                engine.refresh_seconds += (seconds - engine.refresh_seconds) / 10

    def _guard_sessions(self) -> None:
        """Replace methods of the app's session interface. The site may set another at any time."""
        if self._app.session_interface is not self._sessions:
            self._sessions = sessions = copy.copy(self._app.session_interface)
            vars(sessions).update(
                open_session=functools.partial(self._open_session, sessions.open_session),
                save_session=functools.partial(self._save_session, sessions.save_session),
            )
            self._app.session_interface = sessions

    @staticmethod
    def _open_session(open_session: Callable[..., Any], app: Flask, request_: Any) -> Any:
        session = open_session(app, request_)
        if LIVE_KEY in request_.environ:
            request_.environ[LIVE_KEY] = copy.deepcopy(dict(session or {}))
        return session

    @staticmethod
    def _save_session(
        save_session: Callable[..., None], app: Flask, session: SessionMixin, response: Response
    ) -> None:
        if not is_live_refresh():
            save_session(app, session, response)
            return
        before = request.environ[LIVE_KEY]
        if session.keys() - before.keys():
            # For example a CSRF token. The form in this page needs it in the stored session.
            response.headers["X-SwiftCMS-Live"] = "reload"
        session.clear()
        session.update(before)
        # As the replaced method would: a cache must not give the page to another visitor.
        response.vary.add("Cookie")


# -- track -----------------------------------------------------------------------------------------


class Change(NamedTuple):
    """The net effect of a transaction on one row."""

    existed: bool
    # The latest object of the row. The reference keeps it in the session.
    obj: Any
    # If the row is deleted: its event and draft from before the DELETE, or their exception.
    deleted: Any = None


class Changes:
    """The changes of one transaction or savepoint of a session. Used in the session's thread."""

    def __init__(self) -> None:
        # By identity key, in the order of the first flushes.
        self.rows: dict[Any, Change] = {}
        # In a flush: rows that it may delete, and objects that it saves with their earlier keys.
        self.deletes: dict[Any, Change | None] | None = None
        self.saves: list[tuple[Any, Any]] = []
        # How many calls of commit() have begun, without those of inner savepoints.
        self.commits = 0
        self.is_committed = False
        # Complete before COMMIT: events with their drafts.
        self.events: list[tuple[Any, Draft]] = []

    def add(self, key: Any, change: Change) -> None:
        self.rows[key] = change._replace(existed=self.rows.get(key, change).existed)


def find_session_class(session: Any) -> type:
    """Return the class of the sessions that track() observes, or raise."""
    try:
        orm = importlib.import_module("sqlalchemy.orm")
    except ImportError as error:
        raise ImportError("hub.track() needs SQLAlchemy: pip install sqlalchemy") from error
    found = getattr(session, "session_factory", session)
    found = getattr(found, "class_", found)
    if not isinstance(found, type) or not issubclass(found, orm.Session):
        raise TypeError(
            "session must be a scoped_session, a sessionmaker or a Session class, not"
            f" {session!r}; of async sessions, track the class given as sync_session_class"
        )
    return found


class Tracker:
    """Publishes the changes of the sessions of one class. Created by Hub.track().

    SQLAlchemy calls its listeners, which have the names of session events, in the threads that use
    the sessions. A session is used by one thread at a time, and so is each item of `_open`.
    """

    LISTENERS = """after_transaction_create persistent_to_deleted after_flush after_flush_postexec
        before_commit after_commit after_transaction_end"""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._inspect = importlib.import_module("sqlalchemy").inspect
        # By class: the content type, payload() and to().
        self._rules: dict[type, tuple[Any, Any, Any]] = {}
        # By transaction. Weak, because a session may be freed without being closed.
        self._open: weakref.WeakKeyDictionary[Any, Changes] = weakref.WeakKeyDictionary()

    def listen(self, session_class: type) -> None:
        event = importlib.import_module("sqlalchemy.event")
        for name in self.LISTENERS.split():
            # First, because another listener may raise after COMMIT.
            event.listen(session_class, name, getattr(self, name), insert=True)

    def add(self, models: Mapping[type, Any], payload: Any, to: Any) -> None:
        """Check the arguments of track() and add them."""
        rules = {model: (name, payload, to) for model, name in dict(models).items()}
        for model, rule in rules.items():
            if not isinstance(model, type) or not {"__mapper__", "metadata"} & {*dir(model)}:
                raise TypeError(f"models must map mapped classes to content types, not {model!r}")
            if not callable(rule[0]):
                check_name(rule[0], "content_type")
            for value, default in zip(rule, (rule[0], None, EVERYONE), strict=True):
                if inspect.iscoroutinefunction(value) or not (callable(value) or value is default):
                    raise TypeError(f"{value!r} must be a plain function of the object")
            if [*map(_full_name, self._rules.get(model, rule))] != [*map(_full_name, rule)]:
                raise RuntimeError(f"this hub tracks {model.__name__} already, in another way")
        self._rules.update(rules)

    def _rule(self, obj: Any) -> Any:
        """Return the rule of the nearest tracked class, or None."""
        return next((self._rules[base] for base in type(obj).__mro__ if base in self._rules), None)

    def _changes(self, session: Any) -> Changes:
        """Return the changes of the innermost savepoint, or else of the transaction."""
        transaction = session.get_nested_transaction() or session.get_transaction()
        return self._open.setdefault(transaction, Changes())

    def _prepare(self, action: str, obj: Any, key: Any) -> tuple[Any, Draft]:
        """Return publish()'s arguments and the draft made of them."""
        rule = self._rule(obj)
        content_type, payload, to = (value(obj) if callable(value) else value for value in rule)
        # If the primary key was changed, payload() does not know the old one.
        if rule[1] is None or self._inspect(obj).identity_key != key:
            payload = {"id": list(key[1])}
            if len(key[1]) == 1:
                payload = {"id": key[1][0]}
        event = (f"content.{action}", content_type, payload, _list_if_iterator(to))
        return event, self._hub._engine().draft(*event)

    def _delete(self, obj: Any, key: Any) -> Change:
        try:
            return Change(True, obj, self._prepare("deleted", obj, key))
        except Exception as error:
            # commit() raises it, unless the row exists in the end.
            return Change(True, obj, error)

    def after_transaction_create(self, session: Any, transaction: Any) -> None:
        """Look at the session before a flush, which creates an inner transaction first."""
        if transaction.parent is None or transaction.nested:
            return
        changes = self._changes(session)
        changes.deletes = {}
        changes.saves = [(None, obj) for obj in session.new if self._rule(obj)]
        orphans: list[Any] = []
        for state in map(self._inspect, session.dirty):
            for relationship in state.mapper.relationships:
                if relationship.cascade.delete_orphan:
                    orphans += filter(self._rule, state.attrs[relationship.key].history.deleted)
        for obj in (*filter(self._rule, session.deleted), *orphans):
            if self._inspect(obj).persistent:
                self.persistent_to_deleted(session, obj)
            else:
                # An earlier transaction deleted it, but a relationship still contained it.
                changes.deletes[self._inspect(obj).identity_key] = None
        self.after_flush(session)

    def persistent_to_deleted(self, session: Any, obj: Any) -> None:
        """Note a delete. If no flush is in progress, a DELETE statement has found the object."""
        deletes = self._changes(session).deletes
        if deletes is not None and self._rule(obj):
            key = self._inspect(obj).identity_key
            if key is not None and key not in deletes:
                deletes[key] = self._delete(obj, key)

    def after_flush(self, session: Any, *_: object) -> None:
        """Note updates, before and after a flush: it sets keys, and forgets SQL expressions."""
        saves = self._changes(session).saves
        for obj in filter(self._rule, session.dirty):
            state = self._inspect(obj)
            columns = {column.key for column in state.mapper.column_attrs} - state.unmodified
            if any(state.attrs[name].history.has_changes() for name in columns):
                saves.append((state.identity_key, obj))

    def after_flush_postexec(self, session: Any, flush_context: object) -> None:
        """Add the flushed rows. Deletes come first: other rows may have their keys now."""
        changes = self._changes(session)
        deletes, changes.deletes = changes.deletes or {}, None
        for key, change in deletes.items():
            if change is not None and self._inspect(change.obj).deleted:
                changes.add(key, change)
        for key, obj in changes.saves:
            if key not in (None, self._inspect(obj).identity_key):
                changes.add(key, self._delete(obj, key))
        for key, obj in changes.saves:
            state = self._inspect(obj)
            if state.persistent:
                changes.add(state.identity_key, Change(state.identity_key == key, obj))
        self._encode(session)

    def before_commit(self, session: Any) -> None:
        # If savepoints are open, commit() commits them before it flushes.
        if not session.in_nested_transaction():
            session.flush()
        self._changes(session).commits += 1
        self._encode(session)

    def _encode(self, session: Any) -> None:
        """Check and serialise the events if the outermost transaction is being committed.

        Again after each flush then: another listener of before_commit may have changed objects.
        """
        changes = self._changes(session)
        if session.in_nested_transaction() or not changes.commits or is_live_refresh():
            return
        changes.events = []
        for key, (existed, obj, deleted) in changes.rows.items():
            if deleted is None:
                # Loads the row again if the object was taken out of the session.
                current = session.get(type(obj), key[1], identity_token=key[2])
                if current is not None:
                    action = "created"
                    if existed:
                        action = "updated"
                    changes.events.append(self._prepare(action, current, key))
            elif existed and isinstance(deleted, Exception):
                raise deleted
            elif existed:
                changes.events.append(deleted)

    def after_commit(self, session: Any) -> None:
        self._changes(session).is_committed = True

    def after_transaction_end(self, session: Any, transaction: Any) -> None:
        """Publish after COMMIT. Add the changes of a savepoint to the outer transaction's."""
        changes = self._open.pop(transaction, None)
        if changes is None or not changes.is_committed:
            return
        if transaction.parent is not None:
            outer = self._changes(session)
            for key, change in changes.rows.items():
                outer.add(key, change)
            outer.commits += changes.commits - 1
            self._encode(session)
        elif changes.events:
            try:
                events, drafts = zip(*changes.events, strict=True)
                self._hub.publish_drafts(self._hub._engine(), events, [*drafts])
            except Exception as error:
                # The data is saved: a view that failed now would be called again.
                log(logging.ERROR, "cannot publish %s events", len(changes.events), exc_info=error)


# == 15. Plain HTTP ==============================================================================

# If the server is full or stops, a client connects again after so many seconds.
BUSY_RETRY = (10.0, 20.0)


def stream_block(
    data: bytes, event_type: str | None = None, event_id: str | None = None
) -> bytes:
    """Return one message of an event stream (WHATWG HTML, section 9.2.6)."""
    head = ""
    if event_type is not None:
        head += f"event: {event_type}\n"
    if event_id is not None:
        head += f"id: {event_id}\n"
    # JSON of the site's own provider may have line breaks. The client puts the lines together.
    lines = b"\ndata: ".join(data.splitlines())
    return head.encode() + b"data: " + lines + b"\n\n"


def retry_block(seconds: float) -> bytes:
    """Return the field that says after how many seconds a client connects again."""
    return f"retry: {round(seconds * 1000)}\n\n".encode()


class EventStream(Framing):
    """How messages are written to a client over plain HTTP: as server-sent events."""

    is_bidirectional = False
    # The `code` of the last system.error for each close code. For UNAUTHORIZED it was sent already.
    ERRORS: Mapping[int, str] = {
        CloseCode.GOING_AWAY: "going_away",
        CloseCode.TRY_AGAIN_LATER: "too_slow",
    }

    def event(self, event: Event) -> bytes:
        return event.block

    def message(
        self,
        message_type: str,
        payload: Mapping[str, Any],
        content_type: str | None = None,
        ref: str | float | None = None,
        event_id: str | None = None,
    ) -> bytes:
        text = message_text(message_type, payload, content_type)
        return stream_block(text.encode(), message_type, event_id)

    def heartbeat(self, payload: Mapping[str, Any]) -> bytes:
        return self.message("system.heartbeat", payload, event_id=payload["lastId"])

    def closing(self, code: int, reason: str) -> bytes:
        if code not in self.ERRORS:
            return b""
        return self.error(self.ERRORS[code], reason)

    def error(self, code: str, message: str) -> bytes:
        """Return system.error. It is not the answer to an action."""
        return self.message("system.error", {"code": code, "message": message, "action": None})


EVENT_STREAM = EventStream()


class EventsRequest(HandshakeCheck):
    """Checks and answers one request for /ws/events, in a thread of the web server.

    It calls all hooks in its own thread, because the request waits for the answer in any case.
    """

    def answer(self) -> Response:
        """Return a stream, the result of a poll, or a refusal."""
        cors: dict[str, str] = {}
        # Only the changes of hooks are stored.
        flask_session.modified = False
        try:
            self._check_size()
            self._check_origin()
            origin = request.headers.get("Origin")
            if origin is not None:
                cors["Access-Control-Allow-Origin"] = origin
                cors["Access-Control-Allow-Credentials"] = "true"
            response = self._answer()
        except HandshakeRefused as refused:
            self._engine.counters.add(f"refused_{refused.status}")
            response = refused.response
            if refused.status == 503:
                # A browser would give up for good at 503.
                response = busy_response(refused.code, str(refused))
        response.headers.update(cors)
        response.vary.add("Origin")
        if flask_session.permanent and not flask_session.modified:
            # A permanent session is stored in each request. So a poll would undo a logout that
            # happens meanwhile, and keep its user signed in for ever.
            del flask_session["_permanent"]
            flask_session.modified = False
        return response

    def _answer(self) -> Response:
        engine = self._engine
        self._warn_of_processes()
        message = self._parse()
        began = self._start_engine()
        user = self._find_user()
        if user is None and engine.settings.auth == "required":
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HandshakeRefused(401, "auth_required", "sign in first: add a token", **challenge)
        if request.method == "HEAD":
            return EventsResponse(has_length=False)
        handshake = EventsHandshake(find_socket(request.environ), user, began, message)
        handshake.answers = self._ask(user, message)
        engine.has_served = True
        if request.args.get("mode") == "poll" or not can_stream(handshake.sock):
            return self._poll(handshake)
        self._reserve_slot()
        request.environ[ENVIRON_KEY] = handshake
        return EventsResponse(has_length=False)

    def _check_origin(self) -> None:
        """Also refuse images and frames of other sites, which send no Origin but occupy slots."""
        super()._check_origin()
        site = request.headers.get("Sec-Fetch-Site")
        if site == "cross-site" and "Origin" not in request.headers:
            message = "pages of another site must use EventSource or fetch"
            raise HandshakeRefused(403, "forbidden", message)

    def _parse(self) -> dict[str, Any]:
        """Return the `subscribe` message that the query stands for; raise HandshakeRefused."""
        message: dict[str, Any] = {"subscriptions": []}
        for text in request.args.getlist("sub") or [""]:
            event_type, _, content_type = text.partition(":")
            item = {"type": event_type or "*", "contentType": content_type or "*"}
            message["subscriptions"].append(item)
        since = request.headers.get("Last-Event-ID") or request.args.get("since")
        if since is not None:
            message["since"] = since
        try:
            for item in subscription_list(message):
                parse_pattern(item)
            if since is not None:
                parse_event_id(since)
        except ClientError as error:
            raise HandshakeRefused(400, error.code, str(error)) from error
        return message

    def _ask(self, user: User | None, message: Mapping[str, Any]) -> list[bool]:
        """Ask the authorize hook for the patterns, each once and in the order of the message."""
        patterns = dict.fromkeys(map(parse_pattern, message["subscriptions"]))
        hook = self._hub.authorize_hook
        if hook is None:
            return [True] * len(patterns)
        return [is_allowed(self._engine, hook(user, *pattern), pattern) for pattern in patterns]

    def _poll(self, handshake: EventsHandshake) -> Response:
        engine = self._engine
        engine.counters.add("polls")
        poll = Poll(engine, handshake)
        if not engine.is_closing and engine.loop.call(poll.run):
            poll.is_done.wait(Poll.TIMEOUT)
        return EventsResponse(poll.body())


def can_stream(sock: Any) -> bool:
    """Return whether the socket can be taken over directly. A relay would hold a thread."""
    return sock is not None and not is_forking(request.environ) and not needs_relay(sock)


class EventsHandshake(Handshake):
    """What is known about a request for /ws/events, for the session that serves it on the loop.

    message: the `subscribe` message that the query stands for
    answers: those of the authorize hook
    """

    def __init__(
        self, sock: Any, user: User | None, began: float, message: dict[str, Any]
    ) -> None:
        super().__init__(sock, user, began)
        self.session_type = StreamSession
        self.message = message
        self.answers: list[bool] = []


class EventsResponse(Response):
    """A response in the form of an event stream."""

    def __init__(self, body: bytes = b"", has_length: bool = True) -> None:
        self.automatically_set_content_length = has_length
        super().__init__(body, mimetype="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        # nginx would collect 8 KiB before it sends any.
        self.headers["X-Accel-Buffering"] = "no"


def busy_response(code: str, message: str) -> Response:
    """Return the response to a client that has to connect again later."""
    retry = random.uniform(*BUSY_RETRY)
    return EventsResponse(retry_block(retry) + EVENT_STREAM.error(code, message))


class StreamResponse(Response):
    """Takes the socket over when the server calls it, with the headers that the site has left.

    The server gets the same headers for its log, and writes them into a dead socket. The view does
    not return it, because Flask would turn it into the site's own `response_class`.
    """

    # After how many seconds the client connects again if the stream is cut.
    RETRY = (1.0, 3.0)
    automatically_set_content_length = False

    def __init__(self, engine: Engine, handshake: EventsHandshake, view: Response) -> None:
        super().__init__(view.response, view.status, view.headers)
        self._engine = engine
        self._handshake = handshake

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        if self.status_code != 200:
            # A function of the site's after_request has refused the client, or has failed.
            return super().__call__(environ, start_response)
        handshake = self._handshake
        head = self._head(environ) + retry_block(random.uniform(*self.RETRY))
        try:
            own = descriptors().take_over(handshake.sock)
        except (OSError, ValueError) as error:
            # ValueError: the server has closed its socket, because the client has left.
            log_lost_socket(self._engine, error)
            busy = busy_response("too_many_connections", "too many open files")
            return busy(environ, start_response)
        # The server would answer another request of this client into the dead socket.
        read_server_buffers(environ)
        set_timeout(own, self._engine.settings.heartbeat * (MISSED_HEARTBEATS + 1))
        handshake.own_socket, handshake.response = own, head
        return super().__call__(environ, start_response)

    def _head(self, environ: Any) -> bytes:
        headers = self.get_wsgi_headers(environ)
        headers.remove("Content-Length")
        headers.setdefault("Date", http_date())
        # Not for the server: PEP 3333 forbids applications to send it, and waitress checks that.
        headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Let the kernel close a socket whose peer has not confirmed any data for so long.

    The client of a stream never sends anything. Without this option, it would take 15 minutes to
    notice that it has disappeared. Only Linux has it.
    """
    with suppress(OSError, AttributeError):
        milliseconds = round(max(10.0, seconds) * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


class StreamSession(Session):
    """Serves one stream: its only message is the query of the request. Loop only."""

    FRAMING = EVENT_STREAM

    __slots__ = ()

    def _greet(self) -> None:
        """Send nothing: system.subscribed is the first message."""

    def _handle_read_ahead(self, handshake: Handshake) -> None:
        """Handle the query of the request, as the `subscribe` message that it stands for."""
        assert isinstance(handshake, EventsHandshake)
        StreamSubscribing(self, handshake.message).allowed(handshake.answers)

    def receive(self, data: bytes) -> None:
        """Drop what a client sends after its request. If that is much, read more slowly."""
        super().consume(1 + len(data) // MessageReader.BYTES_PER_TOKEN)
        self.connection.update_selector()

    def consume(self, count: float) -> None:
        """Take no tokens: the client cannot ask twice in one request."""

    def sign_out(self) -> None:
        self.connection.send(EVENT_STREAM.error("signed_out", self.SIGNED_OUT))
        super().sign_out()


class StreamSubscribing(Subscribing):
    """Answers the query of a stream. Loop only."""

    def finish(self, events: list[Event] | None) -> None:
        super().finish(events)
        session = self.session
        connection = session.connection
        if self.since is not None and connection.state is State.OPEN:
            # The replay is complete, even if it was empty, so the client may resume from here.
            connection.send(EVENT_STREAM.heartbeat(resume_fields(session.engine)))

    def answer(self, payload: Mapping[str, Any]) -> None:
        """Send system.subscribed. The client gets heartbeats from now on.

        The id of an earlier heartbeat would be newer than events that the client still misses.
        """
        engine, connection = self.session.engine, self.session.connection
        connection.send(self.first_block(payload))
        if connection.state is State.OPEN:
            engine.heartbeat.add(connection)

    def first_block(self, payload: Mapping[str, Any]) -> bytes:
        """Return system.subscribed, with the fields of a greeting."""
        engine, connection = self.session.engine, self.session.connection
        user, place = connection.user, resume_fields(engine)
        last_id = place.pop("lastId")
        if self.since is not None and payload["recovered"]:
            last_id = format_event_id(self.since)
        expires_at = None
        if user is not None and user.expires_at is not None:
            expires_at = timestamp(int(user.expires_at * 1000))
        fields = {
            "clientId": connection.id,
            "userId": user.id if user else None,
            "expiresAt": expires_at,
            "heartbeat": engine.settings.heartbeat,
        }
        message = {**payload, **fields, **place}
        return EVENT_STREAM.message("system.subscribed", message, event_id=last_id)


class Poll(Connection):
    """Collects the events of one request that is not a stream. It has no socket and takes no slot.

    A thread of the web server creates it, waits for `is_done`, and reads the body. The rest is for
    the loop. For the session it is a connection from which nothing can be read.
    """

    # How many seconds the thread waits for the loop and the shared log.
    TIMEOUT = 5.0
    # Seconds until the next poll. The more events this one has sent, the shorter the pause.
    LONGEST_RETRY, SHORTEST_RETRY = 1.5, 0.1

    __slots__ = ("_blocks", "_engine", "_handshake", "_retry", "is_done")

    def __init__(self, engine: Engine, handshake: EventsHandshake) -> None:
        self.id = engine.process + secrets.token_hex(6)
        self.framing = EVENT_STREAM
        self.state = State.OPEN
        self.user = handshake.user
        # Stays empty: it receives no later events.
        self.subscriptions = {}
        self.is_done = threading.Event()
        self._engine = engine
        self._handshake = handshake
        self._blocks: list[bytes] = []
        self._retry: float | None = None

    def body(self) -> bytes:
        """Return the response's body. If the loop gave none, the client asks again later."""
        if self._retry is None:
            reason = "the server is going away; reconnect with since"
            self._blocks = [EVENT_STREAM.closing(CloseCode.GOING_AWAY, reason)]
            self._retry = random.uniform(*BUSY_RETRY)
        return b"".join([retry_block(self._retry), *self._blocks])

    # -- the loop's thread -------------------------------------------------------------------------

    def run(self) -> None:
        """Answer the query now, or as soon as the shared log is read."""
        engine, handshake = self._engine, self._handshake
        self.session = session = StreamSession(engine, self, None, "")
        if handshake.user and engine.was_signed_out(handshake.user, handshake.began_at):
            session.sign_out()
        else:
            session.guarded(self._subscribe)

    def _subscribe(self) -> None:
        PollSubscribing(self.session, self._handshake.message).allowed(self._handshake.answers)

    def send(self, data: bytes) -> None:
        self._blocks.append(data)

    def finish(self, share: float) -> None:
        """Complete the answer. share: how much of the history this poll has sent, from 0 to 1."""
        retry = max(self.SHORTEST_RETRY, self.LONGEST_RETRY * (1 - share))
        self._retry = retry * random.uniform(0.8, 1.2)
        self._engine.pollers.add(retry)
        self._end()

    def close(self, code: int, reason: str) -> None:
        """Send an error instead, after which the client asks again."""
        self.send(self.framing.closing(code, reason))
        self._retry = random.uniform(*BUSY_RETRY)
        self._end()

    def _end(self) -> None:
        self.state = State.CLOSED
        self.is_done.set()

    @property
    def can_read(self) -> bool:
        return False

    def update_selector(self) -> None:
        """There is no socket to watch."""


class PollSubscribing(StreamSubscribing):
    """Answers the query of a poll. Loop only."""

    # The shared log was asked for its newest id, and `since` is not newer.
    _is_known = False

    def find_missed(self) -> None:
        """Find the events after `since`. If no process has such an id, do not wait for it.

        Otherwise a client could occupy all threads of the web server with ids of the future.
        """
        engine = self.session.engine
        is_new = self.since is not None and self.since > engine.history.newest_id
        if engine.log is None or not is_new or self._is_known:
            super().find_missed()
        else:
            self.session.tasks.start(engine.log.newest_id, self._compare)

    def _compare(self, newest: EventId | None) -> None:
        if newest is not None and cast(EventId, self.since) > newest:
            self.finish(None)
            return
        # The follower will read `since` soon, or the shared log cannot be read now.
        self._is_known = True
        super().find_missed()

    def finish(self, events: list[Event] | None) -> None:
        """Collect the answer and as many of the missed events as a poll may send."""
        engine, poll = self.session.engine, cast(Poll, self.session.connection)
        missed = engine.registry.missed(poll, self.patterns, events or [])
        sent = list(_first_events(missed, engine.settings.max_queue))
        recovery = {"recovered": events is not None, "replayed": len(sent)}
        poll.send(self.first_block({**self.pattern_fields(), **recovery}))
        poll.send(b"".join(event.block for event in sent))
        place = resume_fields(engine)
        if len(sent) < len(missed):
            # The rest comes with the next poll.
            place["lastId"] = format_event_id(sent[-1].id)
        poll.send(EVENT_STREAM.heartbeat(place))
        engine.counters.add("replayed", len(sent))
        poll.finish(len(sent) / max(1, engine.settings.history))


def _first_events(events: Iterable[Event], room: int) -> Iterator[Event]:
    """Yield the first events that have at most `room` bytes together, and at least one."""
    size = 0
    for event in events:
        size += len(event.block)
        if size > room and size > len(event.block):
            return
        yield event


class Pollers:
    """Estimates how many clients poll, from the pauses between their requests. Loop only.

    A client that polls every three seconds counts a tenth in each poll. The weights fade in
    WINDOW seconds, so that their sum is the number of clients.
    """

    WINDOW = 30.0

    def __init__(self) -> None:
        self._sum = 0.0
        self._updated_at = time.monotonic()

    def add(self, pause: float) -> None:
        """Note a poll after which the client waits so many seconds."""
        self._sum = self.count() + pause / self.WINDOW
        self._updated_at = time.monotonic()

    def count(self) -> float:
        return self._sum * math.exp((self._updated_at - time.monotonic()) / self.WINDOW)


# == 16. The ready-made hub ======================================================================

hub = Hub()
blueprint = hub.blueprint
publish = hub.publish
publish_many = hub.publish_many


# IV  Around it
# == 17. Command line ============================================================================

# Seconds to wait for each answer of a server, and for the first message of a stream.
REPLY_TIMEOUT = 10.0
STREAM_TIMEOUT = 3.0
# Requests that check() sends at once: enough to reach several server processes, if there are any.
CONCURRENT_CLIENTS = 8
# check() subscribes to this type and content type, which no site publishes.
CHECK_NAME = "swiftcms_ws.check"
CONNECTION_ERRORS = (OSError, http.client.HTTPException, ParseFailed)
# Hints by the HTTP status of a refused handshake. 0 stands for no HTTP answer at all.
HINTS = {
    0: "Is the site running, and is this its port?"
    " A proxy must pass the headers Upgrade and Connection (see README).",
    200: "The answer is a page. Is it the right address? Or does a proxy remove the headers Upgrade"
    " and Connection (see README)?",
    301: "A WebSocket cannot follow this redirect. Use the address of its target.",
    401: "The token in the address is not a valid token of this site.",
    403: "The server believes that this page belongs to another site."
    " Configure the proxy to pass the Host header, or set SWIFTCMS_WS_ORIGINS.",
    404: "Is this the right address, including its path? With a url_prefix it is /url_prefix/ws.",
    426: "A proxy removes the headers Upgrade and Connection (see README).",
    500: "The site failed, or the proxy cannot reach it. Their logs have the reason.",
    501: "For WebSockets, serve the site with gunicorn, waitress or `flask run`.",
    503: "The limit SWIFTCMS_WS_MAX_CONNECTIONS is reached: raise it."
    " Or the server is shutting down: try again.",
}


class RequestRefused(OSError):
    """A response with another status than the one that is needed.

    status:   of HTTP
    code:     in the JSON body of swiftcms-ws, as `code`, or an empty string
    location: the target of a redirect, or an empty string
    """

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.code = ""
        self.location = response.getheader("Location", "")
        message = f"HTTP status {self.status}"
        with suppress(*CONNECTION_ERRORS, ValueError, TypeError, KeyError):
            body = json.loads(response.read(10_000))
            self.code = str(body["code"])
            message += f", {body['message']}"
        if self.location:
            message += f", a redirect to {self.location}"
        super().__init__(message)


class ConnectionClosed(OSError):
    """The server has closed the connection, with a close code or, if it is 0, without one."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the server closed the connection: {code or ''} {reason}".rstrip(": "))
        self.code = code


class HttpRequest:
    """One request of listen() or check(), and its response, whose body may not end.

    The constructor raises one of CONNECTION_ERRORS if there is no response with `status`.
    """

    def __init__(self, url: str, status: int, timeout: float, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        is_secure = parts.scheme == "wss"
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if is_secure:
            kind = http.client.HTTPSConnection
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        connection = kind(parts.hostname or "", port, timeout=timeout)
        try:
            connection.connect()
            # The connection forgets its socket if the body ends with it.
            self.sock = connection.sock
            target = parts._replace(scheme="", netloc="").geturl()
            connection.request("GET", target, headers=dict(headers))
            self.response = connection.getresponse()
            if self.response.status != status:
                raise RequestRefused(self.response)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def close(self) -> None:
        self.response.close()
        self._connection.close()


class Client:
    """A WebSocket of listen() or check(). `greeting` is the payload of its system.connected.

    It reads from the socket in receive() only. So if the output of listen() is not read, no
    messages collect here, and the server notices a slow client.

    The constructor raises one of CONNECTION_ERRORS if there is no connection.
    """

    def __init__(self, url: str, **headers: str) -> None:
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(secrets.token_bytes(16)).decode(),
        }
        self._http = HttpRequest(url, 101, REPLY_TIMEOUT, {**upgrade, **headers})
        self._frames = FrameProtocol(client=True, extensions=[])
        self._messages: deque[str] = deque()
        self._part = ""
        self._closed: ConnectionClosed | None = None
        greeting = ""
        try:
            with suppress(TimeoutError):
                greeting = self.receive(REPLY_TIMEOUT)
            if '"system.connected"' not in greeting:
                raise OSError("this is a WebSocket, but not one of swiftcms-ws: it has no greeting")
        except BaseException:
            self.close()
            raise
        self.greeting: dict[str, Any] = json.loads(greeting)["payload"]

    def send(self, message: Mapping[str, Any]) -> None:
        self._http.sock.sendall(self._frames.send_data(json.dumps(message), fin=True))

    def receive(self, timeout: float) -> str:
        """Return the next message. Raises one of CONNECTION_ERRORS, such as TimeoutError."""
        deadline = time.monotonic() + timeout
        while not self._messages:
            if self._closed is not None:
                raise self._closed
            self._http.sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._http.response.fp.read1(65_536)
            if not data:
                raise ConnectionClosed(0, "")
            self._frames.receive_bytes(data)
            for frame in self._frames.received_frames():
                self._handle(frame)
        return self._messages.popleft()

    def _handle(self, frame: Any) -> None:
        if frame.opcode is Opcode.PING:
            self._http.sock.sendall(self._frames.pong(frame.payload))
        elif frame.opcode is Opcode.CLOSE:
            self._closed = ConnectionClosed(*frame.payload)
        elif frame.opcode is Opcode.TEXT:
            self._part += frame.payload
            if frame.message_finished:
                self._messages.append(self._part)
                self._part = ""

    def close(self) -> None:
        with suppress(*CONNECTION_ERRORS):
            self._http.sock.sendall(self._frames.close(1000))
        self._http.close()


def status_of(error: BaseException | None) -> int:
    """Return the HTTP status of a refused request, or 0 if there is none."""
    return int(getattr(error, "status", 0))


def hint_for(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "The server accepts connections but does not answer. Is it overloaded?"
    if isinstance(error, ssl.SSLError):
        return "Does this port speak TLS, and is the certificate valid for this name?"
    status = status_of(error)
    if status in HINTS:
        return HINTS[status]
    return HINTS[{2: 200, 3: 301, 4: 404}.get(status // 100, 500)]


def websocket_url(text: str) -> str:
    """Return the address of a WebSocket. The path may be missing, and the scheme may be http."""
    form = (
        r"(?:(?P<scheme>https?|wss?)://)?(?P<host>[^/?#]*[^/?#:])"
        r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?"
    )
    match = re.fullmatch(form, text, re.IGNORECASE)
    host = match["host"] if match else ""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    try:
        parts = urlsplit(f"//{host}")
        is_address = bool(parts.hostname and parts.hostname.encode("idna")) and parts.port != 0
    except ValueError:
        is_address = False
    if match is None or not is_address:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like wss://example.org/ws")
    scheme = "wss" if (match["scheme"] or "").lower() in ("https", "wss") else "ws"
    path = match["path"] or "/"
    target = ("/ws" if path == "/" else path) + (match["query"] or "")
    return f"{scheme}://{host}{quote(target, safe=string.punctuation)}"


class OutputError(Exception):
    """Standard output cannot be written: `head` has exited, say, or the disk is full."""


def is_utf8() -> bool:
    """Return whether standard output can show every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return codecs.lookup(encoding).name == "utf-8"


def write_line(text: str) -> None:
    """Print on standard output at once. Raises OutputError, which ends the command."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OutputError from error


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
            while True:
                self._handle(client, client.receive(timeout))
        except ConnectionClosed as error:
            if error.code in (CloseCode.UNAUTHORIZED, CloseCode.MESSAGE_TOO_BIG):
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
            client.send({"action": "authenticate", "token": self.options.token})
        if self.last_id is None:
            self.last_id = client.greeting["lastId"]
        message = {
            "action": "subscribe",
            "type": self.options.type,
            "contentType": self.options.content_type,
            "since": self.last_id,
        }
        client.send(message)

    def _handle(self, client: Client, data: str) -> None:
        message = json.loads(data)
        payload = message["payload"]
        if "id" in message:
            # JSON can be written in ASCII for terminals that cannot show all characters.
            if not is_utf8():
                data = json.dumps(message)
            write_line(data)
            self.last_id = message["id"]
        elif message["type"] == "system.subscribed":
            print(f"listening to {self.options.url}", file=sys.stderr)
            self.is_subscribed = True
            if not payload["recovered"]:
                print("some events were missed and are lost", file=sys.stderr)
                self.last_id = client.greeting["lastId"]
        elif message["type"] == "system.heartbeat":
            client.send({"action": "pong"})
            self.pause = 1.0
            if self.is_subscribed:
                self.last_id = payload["lastId"]
        elif message["type"] == "system.error":
            raise PermanentError(payload["message"])

    def wait(self) -> None:
        # A random time, because all clients of a server that restarts reconnect at the same time.
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
    """What check() prints about one thing.

    is_ok: True is a tick and False a cross. None stands for a check that cannot be made.
    hint:  what to change, or why the check cannot be made; a tick has none
    """

    is_ok: bool | None
    message: str
    hint: str = ""


def check(options: argparse.Namespace) -> int:
    """Print a tick or a cross for each check. Return 1 if there is a cross."""
    marks = {True: "ok", False: "WRONG", None: "note"}
    if is_utf8():
        marks = {True: "✓", False: "✗", None: "–"}
    exit_code = 0
    for finding in find_problems(options.url):
        write_line(f"{marks[finding.is_ok]} {finding.message}")
        if not finding.is_ok:
            write_line(f"    {finding.hint}")
        if finding.is_ok is False:
            exit_code = 1
    return exit_code


class EventsReply:
    """The beginning of the response to a request for /ws/events, which check() sends.

    payload:   of system.subscribed, the first message
    event_id:  from which a client would resume
    is_stream: whether the response has not ended after END_TIMEOUT seconds

    The constructor raises one of CONNECTION_ERRORS, such as TimeoutError if nothing arrives.
    """

    END_TIMEOUT = 0.5

    def __init__(self, url: str, timeout: float, parameters: Mapping[str, str], **headers: str):
        parts = urlsplit(url)
        query = urlencode({"sub": f"{CHECK_NAME}:{CHECK_NAME}", **parameters})
        query = f"{parts.query}&{query}".lstrip("&")
        url = parts._replace(path=f"{parts.path}/events", query=query).geturl()
        with closing(HttpRequest(url, 200, timeout, headers)) as http_request:
            self._read_message(http_request.response)
            http_request.sock.settimeout(self.END_TIMEOUT)
            self.is_stream = not self._has_ended(http_request.response)

    def _read_message(self, response: http.client.HTTPResponse) -> None:
        fields: dict[str, str] = {}
        # `retry` and an empty line come first, then `event`, `id` and `data`.
        for _ in range(5):
            name, _, value = response.readline(100_000).decode(errors="replace").partition(":")
            fields[name] = value.strip()
        try:
            message = json.loads(fields["data"])
            self.payload: dict[str, Any] = message["payload"]
            self.event_id = fields.get("id", "")
        except (ValueError, TypeError, KeyError) as error:
            raise OSError("the response is not an event stream of swiftcms-ws") from error
        if message["type"] == "system.error":
            raise OSError(self.payload["message"])

    def _has_ended(self, response: http.client.HTTPResponse) -> bool:
        deadline = time.monotonic() + self.END_TIMEOUT
        with suppress(TimeoutError):
            while time.monotonic() < deadline:
                if not response.readline(100_000):
                    return True
        return False


def open_websocket(url: str, **headers: str) -> None:
    Client(url, **headers).close()


def poll(url: str, **headers: str) -> EventsReply:
    return EventsReply(url, REPLY_TIMEOUT, {"mode": "poll"}, **headers)


def error_of(connect: Callable[..., object], url: str, **headers: str) -> Exception | None:
    """Connect; return the error, if there is one."""
    try:
        connect(url, **headers)
    except CONNECTION_ERRORS as error:
        return error
    return None


def find_problems(url: str, may_redirect: bool = True) -> Iterator[Finding]:
    """Check the things that often go wrong in a deployment."""
    parts = urlsplit(url)
    origin = f"{parts.scheme.replace('ws', 'http')}://{parts.netloc}"
    refusal = error_of(open_websocket, url, Origin=normalise_origin(origin) or origin)
    target = redirect_target(url, refusal)
    if target and may_redirect:
        yield Finding(True, f"{url} redirects to {target}, which is checked instead")
        yield from find_problems(target, may_redirect=False)
        return
    # A page of the site itself sends no Origin with this request.
    plain_refusal = error_of(poll, url)
    if refusal is None:
        yield Finding(True, f"visitors get a WebSocket, in pages of {origin}")
        yield _check_plain_http(url, plain_refusal, "without it,")
        yield from _check_refusals(url, open_websocket)
        yield _check_concurrent_clients(url)
    elif plain_refusal is None:
        # Some web servers give no access to the socket. Their visitors poll, which is no mistake.
        is_ok: bool | None = False
        if status_of(refusal) == 501:
            is_ok = None
        message = f"visitors get no WebSocket, in pages of {origin}: {refusal}"
        yield Finding(is_ok, message, hint_for(refusal))
        yield _check_plain_http(url, None, "instead,")
        yield from _check_refusals(url, poll)
    else:
        message = f"visitors get no WebSocket: {refusal}. Plain HTTP: {plain_refusal}"
        yield Finding(False, message, hint_for(refusal))
    if plain_refusal is None:
        yield _check_processes(url)


def redirect_target(url: str, refusal: Exception | None) -> str:
    """Return the address to which the same host redirects a handshake, or an empty string."""
    location = getattr(refusal, "location", "")
    target = urljoin(url.replace("ws", "http", 1), location)
    if not location or urlsplit(target).hostname != urlsplit(url).hostname:
        return ""
    return websocket_url(target)


def _check_plain_http(url: str, refusal: Exception | None, when: str) -> Finding:
    """Check whether plain HTTP streams or polls. refusal: the error of a poll."""
    if getattr(refusal, "code", "") == "auth_required":
        message = f"not checked: plain HTTP, and the server's processes: {refusal}"
        hint = "The site wants visitors to sign in. Add ?token=JWT to the address."
        return Finding(None, message, hint)
    if refusal is not None:
        return Finding(False, f"{when} they get nothing: {refusal}", hint_for(refusal))
    try:
        if EventsReply(url, STREAM_TIMEOUT, {}).is_stream:
            return Finding(True, f"{when} they get a stream over plain HTTP")
    except TimeoutError:
        hint = "Turn buffering off for /ws/events in the proxy (nginx: proxy_buffering off)."
        return Finding(False, f"{when} they poll, because a proxy holds streams back", hint)
    except CONNECTION_ERRORS as error:
        return Finding(False, f"{when} they poll, because a stream fails: {error}", HINTS[503])
    return Finding(True, f"{when} they poll over plain HTTP, because the server cannot stream")


def _check_refusals(url: str, connect: Callable[..., object]) -> Iterator[Finding]:
    """Connect as a page of another site, and with an invalid token."""
    hint = "Pages of all sites may connect with your visitors' cookies: set SWIFTCMS_WS_ORIGINS."
    refusal = error_of(connect, url, Origin="https://swiftcms-ws-check.example")
    yield Finding(status_of(refusal) == 403, "a page of another site is refused", hint)
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name != "token"]
    bad_url = parts._replace(query=urlencode([*query, ("token", "bad")])).geturl()
    hint = "The answer should be 401. Does a proxy remove the query?"
    is_refused = status_of(error_of(connect, bad_url)) == 401
    yield Finding(is_refused, "an invalid token is refused", hint)


def _check_concurrent_clients(url: str) -> Finding:
    count = CONCURRENT_CLIENTS
    with ThreadPoolExecutor(count) as pool:
        attempts = [pool.submit(Client, url) for _ in range(count)]
    errors = [error for attempt in attempts if (error := attempt.exception())]
    clients = [attempt.result() for attempt in attempts if not attempt.exception()]
    for client in clients:
        client.close()
    if errors:
        message = f"of {count} clients at once, only {len(clients)} are accepted"
        return Finding(False, message, hint_for(errors[0]))
    return Finding(True, f"{count} clients at once are accepted")


def _check_processes(url: str) -> Finding:
    """Check that an event reaches the clients of all server processes.

    A client may poll any of them, so each must know the newest event of the others.
    """

    def poll_since(since: str) -> EventsReply:
        return EventsReply(url, REPLY_TIMEOUT, {"mode": "poll", "since": since})

    def poll_all(since: Iterable[str]) -> list[EventsReply]:
        with ThreadPoolExecutor(CONCURRENT_CLIENTS) as pool:
            ids = itertools.islice(itertools.cycle(since), CONCURRENT_CLIENTS)
            return list(pool.map(poll_since, ids))

    try:
        # No process has such an old event in memory. So it reads the shared log, if it has one.
        replies = poll_all(["1-0"])
        newest = {
            reply.payload["clientId"][:PROCESS_ID_LENGTH]: reply.event_id for reply in replies
        }
        seen = f"server processes seen: {len(newest)}"
        replies = poll_all(newest.values())
    except CONNECTION_ERRORS as error:
        hint = (
            "The site's log says what is wrong with the file of SWIFTCMS_WS_DATABASE. With"
            " SWIFTCMS_WS_REDIS_URL: Is Redis running, and is the URL right?"
        )
        return Finding(False, f"events may not arrive: {error}", hint)
    if replies[0].payload["refused"]:
        hint = f"The site's authorize hook does not allow check to subscribe to {CHECK_NAME}."
        message = f"{seen}; not checked whether an event reaches the clients of all of them"
        return Finding(None, message, hint)
    if not all(reply.payload["recovered"] for reply in replies):
        hint = (
            "Set SWIFTCMS_WS_DATABASE (or, on several machines, SWIFTCMS_WS_REDIS_URL), or run one"
            " process. Until then, visitors that poll miss events too."
        )
        return Finding(False, f"{seen}; an event reaches only the clients of one of them", hint)
    return Finding(True, f"{seen}; an event reaches the clients of all of them")


def _exit_on_signal(number: int, frame: Any) -> None:
    sys.exit(128 + number)


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
    # As process 1 of a container, a program without a handler would ignore it.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except OutputError as error:
        # Otherwise Python would fail again when it writes buffered output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__cause__, BrokenPipeError):
            # The exit code of a program that SIGPIPE has killed.
            return 128 + 13
        print(f"swiftcms-ws: cannot write the output: {error.__cause__}", file=sys.stderr)
        return 1


# == 18. Demo ====================================================================================

# The longest text of each field of a request, in characters.
DEMO_LENGTHS = {
    "title": 200,
    "body": 10_000,
    "key": 40,
    "name": 20,
    "to": 40,
    "user": 40,
    "text": 500,
}


class DemoEntries:
    """The demo's posts and pages, in memory.

    Called from the web server's threads. An entry in the dictionary is never changed, only
    replaced, so it may be returned without a copy.
    """

    # If a class creates more, the oldest are deleted.
    MAX_ENTRIES = 50
    FIRST = (
        ("pages", "About us", "We are the people on the other side.", "published"),
        ("posts", "Nothing is lost", "Lose the connection, and see what arrives later.", "draft"),
        ("posts", "Hello, class", "Open a second window and edit this post.", "published"),
    )

    def __init__(self) -> None:
        # Guards the entries. A change also publishes its event under it, so that events have the
        # order of the changes.
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, int], dict[str, Any]] = {}
        # Posts and pages share one counter, and an id is never used again.
        self._ids = itertools.count(1)
        self._add_first()

    def _add_first(self) -> None:
        for content_type, title, body, state in self.FIRST:
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
            if len(self._entries) > self.MAX_ENTRIES:
                self._delete(*min(self._entries, key=lambda key: key[1]))
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
            return self._delete(content_type, entry_id)

    def _delete(self, content_type: str, entry_id: int) -> dict[str, Any]:
        entry = self.get(content_type, entry_id)
        del self._entries[content_type, entry_id]
        publish("content.deleted", content_type, entry)
        return entry

    def reset(self) -> None:
        """Restore the first entries. Each page loads itself again when it gets the event."""
        with self._lock:
            self._entries.clear()
            self._add_first()
            publish("class.reset", "class", {})


class DemoPeople:
    """The people who have the page open, and their connections.

    A page has a secret key, which identifies its two connections: /ws?cms=KEY is that of its CMS,
    and counts as one person. /ws?page=KEY is that of its inspector, and may be cut. Called from
    the web server's threads and, by signals, from workers.
    """

    # A name is free again when its page has been gone for so many seconds.
    NAME_SECONDS = 10.0

    def __init__(self, app: Flask) -> None:
        # Guards both dictionaries.
        self._lock = threading.Lock()
        # Of each key, the name and when it was last in use.
        self._names: dict[str, tuple[str, float]] = {}
        # ("cms" or "page", key) -> the client ids, the newest last.
        self._client_ids: dict[tuple[str, str], list[str]] = defaultdict(list)
        # These keep the object alive. A signal only has a weak reference to its receiver.
        app.extensions["demo_people"] = self
        client_connected.connect(self._note_connection, sender=app)
        client_disconnected.connect(self._note_end, sender=app)

    def _note_connection(self, sender: Flask, client_id: str, **details: Any) -> None:
        """Signal receiver, in a request context of the client's handshake."""
        with self._lock:
            for place in self._places():
                self._client_ids[place].append(client_id)

    def _note_end(self, sender: Flask, client_id: str, **details: Any) -> None:
        """Signal receiver, as above."""
        with self._lock:
            for place in self._places():
                self._client_ids[place].remove(client_id)
                if not self._client_ids[place]:
                    del self._client_ids[place]
                _, key = place
                if key in self._names:
                    self._names[key] = (self._names[key][0], time.monotonic())

    @staticmethod
    def _places() -> list[tuple[str, str]]:
        """Return the keys of `_client_ids` that the address of this request names."""
        return [(kind, request.args[kind]) for kind in ("cms", "page") if kind in request.args]

    def count(self) -> int:
        """Return how many people are here."""
        with self._lock:
            return sum(kind == "cms" for kind, _ in self._client_ids)

    def reserve_name(self, key: str, name: str) -> str:
        """Return a name that no other page has: this one, or this one with a number behind it."""
        now = time.monotonic()
        with self._lock:
            self._names = {
                each: (used, at)
                for each, (used, at) in self._names.items()
                if ("cms", each) in self._client_ids or now < at + self.NAME_SECONDS
            }
            self._names.pop(key, None)
            taken = {used.casefold() for used, _ in self._names.values()}
            unique, number = name, 1
            while unique.casefold() in taken:
                number += 1
                unique = f"{name} {number}"
            self._names[key] = (unique, now)
        return unique

    def find(self, engine: Engine, key: str) -> Connection:
        """Return the inspector's connection of a page, or answer 404."""
        with self._lock:
            client_ids = self._client_ids.get(("page", key), [""])
        connection = engine.registry.find(client_ids[-1])
        if connection is None:
            abort(404, "this page has no open connection")
        return connection


class DemoFlood:
    """A client that never reads, and events that only it and one watching client get.

    It shows that a slow client is closed and that the others do not wait for it. There is one at a
    time, because each occupies memory of the server. The loop's thread runs it, except start().
    """

    INTERVAL = 0.03
    FILLER = "x" * 16_000
    # Guards the start: two threads of the web server may call it.
    _starting = threading.Lock()
    _is_running = False

    def __init__(self, engine: Engine, watcher: Connection) -> None:
        self._engine = engine
        self._watcher = watcher
        self._peer, own = descriptors().create_pair()
        # Otherwise the socket buffers would accept the first megabyte.
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._handshake = Handshake(own, None, time.monotonic())
        self._handshake.own_socket = own
        self._environ = hook_environ(request.environ)
        self._number = 0

    @classmethod
    def start(cls, engine: Engine, watcher: Connection) -> None:
        with cls._starting:
            if cls._is_running:
                abort(409, "another slow reader is running; wait until it is closed")
            flood = cls(engine, watcher)
            if not engine.registry.reserve(descriptors().max_connections):
                abort(503, "there is no place for another connection")
            cls._is_running = True
        engine.loop.call(flood._open)

    def _open(self) -> None:
        self._reader = Session.open(self._engine, self._handshake, self._environ, "slow reader")
        self._send()

    def _send(self) -> None:
        """Send the next event, until one of the two connections is not open any more."""
        if self._watcher.state is not State.OPEN or self._reader.state is not State.OPEN:
            self._finish()
            return
        self._number += 1
        frame = self._frame(number=self._number, filler=self.FILLER)
        for connection in (self._reader, self._watcher):
            connection.send(frame)
        self._engine.loop.call_at(time.monotonic() + self.INTERVAL, self._send)

    def _finish(self) -> None:
        if self._reader.close_code is not None:
            self._watcher.send(self._frame(number=self._number, closed=self._reader.close_code))
        # Like the close of a real client: it frees the last descriptor of the reader.
        self._peer.close()
        type(self)._is_running = False

    def _frame(self, **more: Any) -> bytes:
        limit = self._engine.settings.max_queue
        payload = {"unsent": self._reader.unsent_bytes, "limit": limit, **more}
        return message_frame("demo.flood", payload, "demo")


def request_text(name: str, default: str | None = None) -> str:
    """Return a text from the request's JSON object, or from the query of a GET. Else answer 400."""
    fields = request.args if request.method == "GET" else request.get_json()
    value = fields.get(name, default) if isinstance(fields, Mapping) else None
    shortest, longest = 0 if default is not None else 1, DEMO_LENGTHS[name]
    if not isinstance(value, str) or not shortest <= len(value.strip()) <= longest:
        abort(400, f"`{name}` must be a string of {shortest} to {longest} characters")
    return value.strip()


def is_local_request() -> bool:
    """Return whether the request comes from this machine, and no proxy has forwarded it."""
    is_forwarded = any(
        name.startswith("X-Forwarded") or name in ("Forwarded", "Via", "X-Real-Ip")
        for name, _ in request.headers
    )
    address = (request.remote_addr or "").removeprefix("::ffff:")
    return not is_forwarded and (address == "::1" or address.startswith("127."))


def demo_address() -> str:
    """Return the address that other machines use. It is the request's, unless that is localhost."""
    is_wildcard = request.environ.get("SERVER_NAME") in ("0.0.0.0", "::")
    if is_wildcard and is_local_request():
        return f"{network_address()}:{request.environ['SERVER_PORT']}"
    return request.host


def add_lesson_routes(app: Flask, entries: DemoEntries, people: DemoPeople) -> None:
    """Add what the lesson needs: names, polling, faults and Reset."""

    @app.get("/api/poll")
    def poll() -> ResponseReturnValue:
        return {"lastId": hub.last_id(), "people": people.count()}

    @app.get("/api/token")
    def token() -> ResponseReturnValue:
        # A class has no passwords, so a visitor may have any name. A site checks its login here.
        return {"token": hub.issue_token(request_text("user"))}

    @app.post("/api/name")
    def name() -> ResponseReturnValue:
        unique = people.reserve_name(request_text("key"), request_text("name"))
        return {"name": unique, "token": hub.issue_token(unique)}

    @app.post("/api/cut")
    def cut() -> ResponseReturnValue:
        # Without a close frame, as if a cable were pulled. The page itself waits to reconnect.
        engine = hub._engine()
        engine.loop.call(people.find(engine, request_text("key")).abort)
        return {}

    @app.post("/api/flood")
    def flood() -> ResponseReturnValue:
        engine = hub._engine()
        DemoFlood.start(engine, people.find(engine, request_text("key")))
        return {}

    @app.post("/api/reset")
    def reset() -> ResponseReturnValue:
        # A form on another site cannot send JSON.
        request.get_json()
        if not is_local_request():
            abort(403, "only the machine that serves the demo may reset it")
        entries.reset()
        return {}


def demo_app() -> Flask:
    """Return a small CMS with a REST API. Its pages show each other's changes."""
    app = Flask(__name__)
    app.config.update(
        # A new key, so that tokens of other sites are not accepted here.
        SWIFTCMS_WS_JWT_KEY=secrets.token_hex(),
        SWIFTCMS_WS_INSPECTOR=True,
        # A class does not wait half a minute for a heartbeat.
        SWIFTCMS_WS_HEARTBEAT=10,
        # The demo must not join the shared log of a site.
        SWIFTCMS_WS_DATABASE=None,
        SWIFTCMS_WS_REDIS_URL=None,
    )
    # Fields in their own order are easier to read in the inspector.
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.register_blueprint(blueprint)
    settings = Settings.from_config(app.config)
    entries = DemoEntries()
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
        return render_template_string(
            PAGE,
            demo=True,
            address=demo_address(),
            can_reset=is_local_request(),
            heartbeat=app.config["SWIFTCMS_WS_HEARTBEAT"],
        )

    @app.get("/demo.js")
    def script() -> ResponseReturnValue:
        return page_file(DEMO_JS, "text/javascript")

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

    @app.post("/api/notices")
    def notify() -> ResponseReturnValue:
        recipient = request_text("to")
        notice = {"from": user_id(), "text": request_text("text")}
        return {"id": publish("notification", "users", notice, to=recipient)}, 201

    add_lesson_routes(app, entries, DemoPeople(app))
    return app


def serve_demo(options: argparse.Namespace) -> int:
    """Serve the demo until Ctrl+C or SIGTERM. Return the exit code."""
    host, port = options.host, options.port
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
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
        # Not "localhost", because another program may listen on the same port of [::1].
        address, port = listener.getsockname()[:2]
    others = ""
    if address == "0.0.0.0":
        others = f", on other computers http://{network_address()}:{port}/"
        address = "127.0.0.1"
    shown = f"[{address}]" if ":" in address else address
    write_line(f"SwiftCMS demo: http://{shown}:{port}/{others} (press Ctrl+C to stop)")
    try:
        server.serve_forever()
    finally:
        hub.close()
    return 0


def network_address() -> str:
    """Return the address of this computer in its network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(sock.getsockname()[0])


# == 19. client.js and pages =====================================================================


CLIENT_JS = r"""// Live events of SwiftCMS in the browser. Reconnects, and resumes where it was.
//
//   const cms = new SwiftCMS()              // or new SwiftCMS({url, token, since})
//   const stop = cms.subscribe("content.*", "posts", event => show(event.payload))
//   cms.onstatus = status => …              // "connecting", "online", "offline" or "refused"
//   cms.ongap = subscriptions => …          // events are lost: load the page's data again
//   cms.transport                           // "websocket", "events" (plain HTTP), null (offline)
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
  // Firefox closes connections when a link or a download is clicked. The client soon reconnects.
  const OFFLINE_DELAY = 2_000;
  const UNSENT = "SwiftCMS: messages are unsent after two seconds, as the server reads slowly";
  const MAX_WAIT = 10_000;
  const CLOSE = { SHUTTING_DOWN: 1001, LOST: 1006, MESSAGE_TOO_BIG: 1009, UNAUTHORIZED: 4401 };
  // Of these, only the first two need a subscription.
  const EDITING = ["user.editing", "user.stoppedEditing", "user.edited", "system.editing"];

  // Plain HTTP is tried if a page's first WebSocket is still pending after this time.
  const FIRST_WAIT = 2_000;
  // If a stream has opened and its first message does not come in this time, a proxy buffers it.
  const BUFFER_TIMEOUT = 3_000;
  // A server that cannot stream ends its response so soon after a heartbeat.
  const POLL_END = 100;
  // A hidden page waits so long, or up to twice as long, between two polls.
  const HIDDEN_PAUSE = 15_000;
  const NO_EDITING = "SwiftCMS: edit() needs a WebSocket, and this page gets events by plain HTTP";
  // The errors that end events over plain HTTP, and the equivalent close codes of a WebSocket.
  const ENDS = { token_expired: 4401, signed_out: 4401, going_away: 1001, too_slow: 1013 };

  // An id is two numbers: milliseconds and a counter.
  const EVENT_ID = /^\d{1,20}-\d{1,20}$/;
  const sortKey = id => id.replace(/\d+/g, number => number.padStart(20, "0"));
  const isLater = (id, other) => id && (!other || sortKey(id) > sortKey(other));
  const earlier = (id, other) => (isLater(id, other) ? other : id);
  const isMatch = (pattern, name) =>
    pattern.endsWith("*") ? name.startsWith(pattern.slice(0, -1)) : name === pattern;
  // Over plain HTTP the server refuses the whole request if one pattern is malformed.
  const isPattern = text =>
    /^(?!.{129})(\*|[\p{L}\p{M}\p{N}_-]+(\.[\p{L}\p{M}\p{N}_-]+)*(\.\*)?)$/u.test(text);
  const patternOf = ({ type, contentType }) => ({ type, contentType });
  const hasKey = (set, key) => [...set].some(each => each.key === key);
  // A handler that throws must not affect others: its error becomes an unhandled rejection.
  const call = async (handler, ...values) => handler?.(...values);

  // A browser opens six connections to a host, so only one of its pages streams: the one that has
  // the lock. Promises the function that releases it, or null if this page cannot have it.
  const takeLock = () =>
    new Promise(resolve => {
      if (!navigator.locks) return resolve(null);
      const hold = lock => (lock ? new Promise(release => resolve(release)) : resolve(null));
      const locked = navigator.locks.request("swiftcms-stream", { ifAvailable: true }, hold);
      locked.catch(() => resolve(null));
    });

  // All open connections, and the one of the SwiftCMS objects that have neither url nor token.
  const connections = new Set();
  let shared;
  for (const type of ["online", "offline", "pagehide", "pageshow", "visibilitychange"])
    addEventListener(type, event => connections.forEach(each => each.wakeUp(event)));

  // One WebSocket after the other, or plain HTTP, for one or more SwiftCMS objects.
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
    let socket, status, maxSilence, attemptedAt, offlineTimer;
    let attempts = 0;
    let timers = {};
    // Plain HTTP, if it is tried or used: {source, opened, token, isStream, isAnswered, beatAt}.
    // `opened` are the subscriptions of the request. All events up to their `since` were received.
    let events, lock;
    // isPlain: the page stays with plain HTTP. isProbe: the next attempt shows whether it works.
    // mustPoll: streams do not work. hadSocket: a WebSocket was online. failures: attempts in a
    // row with a WebSocket that was not.
    let isPlain, isProbe, mustPoll, hadSocket;
    let failures = 0;
    const ownIds = new Set();
    // transport: null until the server has greeted this client, and there is a token if needed.
    const methods = { add, remove, reopen, subscribe, edit, wakeUp };
    const connection = { clientId: null, transport: null, spread: 0, ...methods };
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
        if (connection.transport) clients.set(cms, undefined);
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
      if (isPlain || isProbe) return openEvents();
      try {
        socket = new WebSocket(address);
      } catch ({ message }) {
        return refuse(`cannot connect to ${address}, which must be like wss://HOST/ws: ${message}`);
      }
      socket.onmessage = ({ data }) => receive(data);
      socket.onclose = end => (events ? (socket = undefined) : reconnect(end));
      // Messages restart it only when the client is ready, because a token may never come.
      later("silence", CONNECT_TIMEOUT, reconnect);
      // If the WebSocket is only slow, it replaces plain HTTP later.
      if (!hadSocket) later("events", FIRST_WAIT, openEvents);
    }

    // For the user that the browser's cookies name now.
    function reopen() {
      if (!connection.transport) return;
      ownUserId = undefined;
      connect();
    }

    function disconnect(newStatus) {
      Object.values(timers).forEach(clearTimeout);
      timers = {};
      if (socket) socket.onclose = socket.onmessage = null;
      socket?.close();
      closeEvents();
      socket = heardId = undefined;
      connection.transport = null;
      requests = [];
      for (const each of subscriptions)
        if (!each.early) Object.assign(each, { since: newestId, early: new Set() });
      setStatus(newStatus);
    }

    function reconnect({ code, reason } = {}) {
      if (!code && heardId && !connection.transport)
        console.error("SwiftCMS: no token came in 15 seconds, will ask for it again");
      if (code === CLOSE.MESSAGE_TOO_BIG)
        console.error("SwiftCMS: the message that was too big is dropped; reconnecting without it");
      if (code === CLOSE.UNAUTHORIZED) isSignedOut = true;
      isProbe = false;
      if (socket && !events) {
        const isBlocked = code === CLOSE.LOST ? status !== "online" : !code && !heardId;
        failures = isBlocked ? failures + 1 : 0;
        isProbe = failures >= (hadSocket || heardId ? 3 : 1);
      }
      // A random time, so that not all clients of a server reconnect at once.
      let wait = Math.random() * Math.min(MAX_WAIT, 1_000 * 2 ** attempts);
      // Firefox itself delays an attempt after failed ones: that time has passed already.
      if (!heardId) wait -= performance.now() - attemptedAt;
      // Without a reason, the browser closed the connection, not the server.
      if (!isProbe && (code !== CLOSE.SHUTTING_DOWN || reason)) attempts++;
      if (code === CLOSE.SHUTTING_DOWN && reason) wait += 1_000;
      disconnect("connecting");
      offlineTimer ??= setTimeout(() => setStatus("offline"), OFFLINE_DELAY);
      later("connect", isProbe ? 0 : wait, connect);
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
        if (!socket && !events && !timers.connect) return;
        reconnect();
        setStatus("offline");
      } else if (timers.connect && !page?.hidden) connect();
      else if (events) openEvents();
      else if (connection.transport && !page?.hidden) {
        // The network or the tab is back: check within five seconds that the connection works.
        send({ action: "heartbeat" });
        later("silence", 5_000, reconnect);
      }
    }

    function later(timer, milliseconds, action) {
      clearTimeout(timers[timer]);
      // Browsers would treat a longer time as zero.
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
      if (!connection.transport) return;
      if (events && message.action === "unsubscribe") later("events", 0, openEvents);
      if (events) return message.action === "editStart" && console.warn(NO_EDITING);
      const text = JSON.stringify(message);
      // Started by the first message that has to wait: the others find the buffer filled.
      if (!socket.bufferedAmount)
        later("unsent", 2_000, () => socket.bufferedAmount && console.warn(UNSENT));
      socket.send(text);
      for (const cms of clients.keys()) call(cms.onframe, "out", text);
    }

    // Over plain HTTP, all events up to the id `place` have been received.
    function receive(text, place) {
      const { type, contentType, payload, id, timestamp } = JSON.parse(text);
      if (connection.transport) later("silence", maxSilence, reconnect);
      if (payload?.spread >= 0) connection.spread = payload.spread;
      for (const cms of clients.keys()) call(cms.onframe, "in", text);
      // That handler may have closed the connection.
      if (!socket && !events) return;
      if (type === "system.connected") greet(payload);
      else if (type === "system.authenticated") accept(payload, timestamp);
      else if (type === "system.heartbeat") {
        // A connection that lives for a heartbeat is a good one.
        attempts = 0;
        if (events) events.beatAt = performance.now();
        move(place ?? payload.lastId);
        send({ action: "pong" });
      } else if (type === "system.error") handleError(payload);
      else if (type === "system.subscribed" && events) resume(payload, place, timestamp);
      else if (type === "system.subscribed") startReplay(payload);
      else if (EDITING.includes(type))
        for (const { key, update } of [...edits])
          if (key === `${contentType} ${payload.entryId}`) update(JSON.parse(text).payload);
      if (!type.startsWith("system.")) dispatch(text, type, contentType, id);
    }

    // Resolves to null if there is no token, and to undefined if it did not come.
    async function fetchToken() {
      try {
        if (typeof givenToken === "function") return (await givenToken()) ?? null;
        return isSignedOut ? null : (givenToken ?? null);
      } catch (error) {
        console.error("SwiftCMS: no token came, will ask for it again:", error);
      }
    }

    async function greet({ clientId, userId, heartbeat, lastId }) {
      const ownSocket = socket;
      // A WebSocket that was slow to open replaces plain HTTP.
      closeEvents();
      connection.transport = isPlain = null;
      ownIds.add(clientId);
      move(lastId);
      const token = await fetchToken();
      if (token === undefined) return ownSocket.close();
      // The connection may have been lost in the meantime.
      if (ownSocket !== socket || !welcome(clientId, userId, token, heartbeat)) return;
      if (token) send({ action: "authenticate", token });
      for (const each of subscriptions) each.since ??= lastId;
      request([...subscriptions]);
      for (const each of edits) each.send("editStart");
    }

    // The connection is ready, unless the user is not the one who was signed out.
    function welcome(clientId, userId, token, heartbeat) {
      const isStranger = isSignedOut && (userId === null || userId !== ownUserId);
      if (isStranger && !token) return refuse("the user is signed out");
      // Polls may name another user each time. A live page then shows something else.
      if (events && userId !== connection.userId) setStatus("connecting");
      Object.assign(connection, { clientId, userId });
      ownUserId = userId ?? ownUserId;
      isSignedOut = isStranger;
      connection.transport = events ? "events" : "websocket";
      // Two heartbeats, and half of one for delays.
      maxSilence = 2_500 * heartbeat;
      later("silence", maxSilence, reconnect);
      for (const cms of clients.keys()) clients.set(cms, undefined);
      return true;
    }

    function accept({ userId, expiresAt }, timestamp) {
      ownUserId = userId;
      isSignedOut = false;
      // If it fails, the server closes the connection, and the next one asks for a token again.
      renew(expiresAt, timestamp, async () =>
        send({ action: "authenticate", token: await givenToken() }),
      );
    }

    function renew(expiresAt, timestamp, action) {
      if (typeof givenToken !== "function") return;
      const left = Date.parse(expiresAt) - Date.parse(timestamp);
      later("renewal", Math.max(left - RENEWAL_LEAD, left * 0.8), action);
    }

    // Ask for events over plain HTTP, from the place of the subscription that is furthest back.
    async function openEvents() {
      events?.source?.close();
      const own = (events = { opened: [] });
      later("silence", CONNECT_TIMEOUT, reconnect);
      own.token = await fetchToken();
      // The connection may have been closed in the meantime. Then it must not take the lock.
      own.isStream = own === events && (await canStream());
      if (own !== events) return;
      if (own.token === undefined) return reconnect();
      // Subscriptions that have no place yet get the newest one first.
      const unplaced = [...subscriptions].filter(each => !each.since);
      own.opened = unplaced.length ? unplaced : [...subscriptions];
      own.source = new EventSource(eventsAddress(own), { withCredentials: true });
      const poll = () => {
        mustPoll = true;
        openEvents();
      };
      // A proxy may keep back the events of a stream, or even its headers.
      own.source.onopen = () => own.isStream && later("events", BUFFER_TIMEOUT, poll);
      if (own.isStream) later("silence", CONNECT_TIMEOUT, poll);
      own.source.onerror = () => endEvents(own);
      for (const type of ["message", "system.subscribed", "system.heartbeat", "system.error"])
        own.source.addEventListener(type, ({ data, lastEventId }) => receive(data, lastEventId));
    }

    function eventsAddress({ opened, token, isStream }) {
      const result = new URL(address);
      result.protocol = address.protocol.replace("ws", "http");
      result.pathname += "/events";
      const { searchParams } = result;
      const names = new Set();
      for (const { type, contentType } of opened)
        if (isPattern(type) && isPattern(contentType)) names.add(`${type}:${contentType}`);
        else console.error(`SwiftCMS: no ${type} of ${contentType}: malformed (invalid_type)`);
      // Without any, the server would send all events.
      for (const name of names.size ? names : ["system.none"]) searchParams.append("sub", name);
      const since = opened.map(each => each.since).reduce(earlier, opened[0]?.since);
      if (since) searchParams.set("since", since);
      if (token) searchParams.set("token", token);
      if (!isStream) searchParams.set("mode", "poll");
      return result;
    }

    function closeEvents() {
      events?.source?.close();
      events = undefined;
      releaseLock();
      clearTimeout(timers.events);
      clearTimeout(timers.renewal);
    }

    async function canStream() {
      if (mustPoll || page?.hidden) releaseLock();
      else lock ??= takeLock();
      const own = lock;
      const isTaken = Boolean(await own);
      if (!isTaken && own === lock) lock = undefined;
      return isTaken;
    }

    function releaseLock() {
      lock?.then(release => release?.());
      lock = undefined;
    }

    // The first message of a stream, and of each poll.
    function resume({ clientId, userId, heartbeat, ...answer }, place, timestamp) {
      if (hadSocket) {
        // The server is there again: one more attempt shows whether WebSockets get through.
        hadSocket = isProbe = false;
        return connect();
      }
      if (!welcome(clientId, userId, events.token, heartbeat)) return;
      clearTimeout(timers.events);
      if (answer.recovered) move(place);
      else lose(subscriptions, place);
      if (events.isAnswered === undefined) {
        report(answer.refused);
        if (events.isStream) watch(events.source);
        if (events.token) renew(answer.expiresAt, timestamp, openEvents);
        for (const each of edits) each.send("editStart");
      }
      isPlain = events.isAnswered = true;
      if (![...subscriptions].every(each => events.opened.includes(each)))
        later("events", 0, openEvents);
      proceed();
    }

    // Firefox closes a stream without an event when a link to a download is clicked.
    function watch(source) {
      if (source !== events?.source) return;
      if (source.readyState === EventSource.CLOSED) openEvents();
      else later("watch", 1_000, () => watch(source));
    }

    // A poll has ended, or the connection is lost, or the server has refused it.
    async function endEvents(own) {
      const { source, token, isAnswered } = own;
      const isRefused = source.readyState === EventSource.CLOSED;
      own.isAnswered = false;
      if (own.isStream) mustPoll ||= performance.now() - own.beatAt < POLL_END;
      own.isStream &&= !mustPoll;
      if (isAnswered && !own.isStream && !isRefused) {
        // The browser asks again by itself, after the time that the server has named.
        later("silence", CONNECT_TIMEOUT, reconnect);
        if (page?.hidden) {
          source.close();
          clearTimeout(timers.silence);
          later("events", HIDDEN_PAUSE * (1 + Math.random()), openEvents);
        } else if ((await canStream()) && own === events) openEvents();
        return;
      }
      if (isRefused && !(token && typeof givenToken === "function")) {
        // EventSource does not say why. If the token is missing or wrong, this is final.
        const options = { method: "HEAD", credentials: "include" };
        const { status: reason } = await fetch(source.url, options).catch(() => ({}));
        if (own !== events) return;
        if (reason === 401) return refuse("the user is not signed in, or the token is not valid");
      }
      reconnect();
    }

    function handleError({ code, message, action }) {
      if (events && code in ENDS) return reconnect({ code: ENDS[code], reason: message });
      console.error(`SwiftCMS: ${message} (${code})`);
      if (action === "authenticate") reconnect({ code: CLOSE.UNAUTHORIZED });
      if (code !== "invalid_since") return;
      const [failed] = requests;
      for (const each of failed.subscriptions) each.since = undefined;
      request(failed.subscriptions);
      startReplay({ recovered: false, replayed: 0 });
    }

    function subscribe(cms, type, contentType, handler, known = clients.get(cms)) {
      if (!clients.has(cms)) throw new Error("this SwiftCMS is closed; make a new one");
      const key = `${type} ${contentType}`;
      const since = known ?? newestId;
      const stop = () => {
        if (subscriptions.delete(own) && !hasKey(subscriptions, key))
          send({ action: "unsubscribe", type, contentType });
      };
      const own = { cms, key, type, contentType, handler, stop, since, early: new Set() };
      subscriptions.add(own);
      if (connection.transport) request([own]);
      return stop;
    }

    // Subscribe and get what was missed: a message for each distinct `since`, and 1,000 items.
    function request(rest) {
      if (events) return later("events", 0, openEvents);
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
      report(refused);
      answered.left = replayed;
      if (recovered) move(answered.since);
      else lose(answered.subscriptions, heardId);
      proceed();
    }

    function report(refused) {
      for (const { type, contentType, code, message } of refused)
        console.error(`SwiftCMS: no ${type} of ${contentType}: ${message} (${code})`);
    }

    function lose(lost, since) {
      // The server may have restarted with a wrong clock: only here the place moves back.
      newestId = heardId = since;
      for (const each of lost) Object.assign(each, { since, isLost: !EDITING.includes(each.type) });
    }

    function proceed() {
      if (requests[0]?.left === 0)
        for (const each of requests.shift().subscriptions) each.early = null;
      if (requests.length) return;
      const lost = [...subscriptions].filter(each => each.isLost);
      for (const each of lost) each.isLost = false;
      for (const cms of new Set(lost.map(each => each.cms)))
        call(cms.ongap, lost.filter(each => each.cms === cms).map(patternOf));
      if (!connection.transport) return;
      hadSocket = !events;
      setStatus("online");
    }

    function move(id) {
      if (isLater(id, heardId)) heardId = id;
      if (isLater(id, newestId)) newestId = id;
      for (const each of events?.opened ?? []) if (isLater(id, each.since)) each.since = id;
    }

    function dispatch(text, type, contentType, id) {
      const [first] = requests;
      // It may be older than subscribe(), or come again after an interrupted replay.
      const isNew = each => !id || (isLater(id, each.since) && !each.early?.has(id));
      const takers = (events?.opened ?? [...subscriptions]).filter(
        each => isMatch(each.type, type) && isMatch(each.contentType, contentType) && isNew(each),
      );
      move(id);
      for (const each of takers) {
        if (!events) each.early?.add(id);
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

  // -- Live pages: <ul id="posts" data-live="content.* posts, schema.changed *"> ------------------
  //
  // After a matching event the page is fetched again, and the element is changed as the server has
  // changed it. What the visitor or a script changed stays, unless the server changed it as well.

  // For each node of such an element a copy of what the server sent last, and the reverse. The
  // document of the copies shows nothing, loads nothing and runs nothing.
  const copyOf = new WeakMap();
  const nodeOf = new WeakMap();
  const copies = page?.implementation.createHTMLDocument();
  const isKept = node => node.nodeType === 1 && node.hasAttribute("data-live-keep");

  function pair(copy, node) {
    copyOf.set(node, copy);
    nodeOf.set(copy, node);
    for (let a = copy.firstChild, b = node.firstChild; a && b; a = a.nextSibling, b = b.nextSibling)
      pair(a, b);
    return copy;
  }

  // isEqualNode() ignores what is in a template, so it becomes the template's children. Unlike a
  // page, an answer has elements in noscript, templates of shadow roots, and readable nonces.
  function tidy(root) {
    for (const each of root.querySelectorAll("[nonce]")) each.removeAttribute("nonce");
    for (const each of root.querySelectorAll("noscript")) each.replaceChildren();
    for (const each of root.querySelectorAll("template[shadowrootmode]")) each.remove();
    for (const each of root.querySelectorAll("template")) {
      each.append(each.content);
      tidy(each);
    }
    return root;
  }

  // The server has changed `before` to `after`. Change the node on the page in the same way, and
  // make its copy `before` equal to `after`. Returns whether the page has changed.
  function morph(before, after, live) {
    if (before.isEqualNode(after) || isKept(live)) return false;
    if (after.nodeType === 1) {
      const hasNewAttributes = morphAttributes(before, after, live);
      return morphChildren(before, after, live) || hasNewAttributes;
    }
    const isNew = live.data !== after.data;
    if (isNew) live.data = after.data;
    before.data = after.data;
    return isNew;
  }

  function morphAttributes(before, after, live) {
    let isNew = false;
    // Not element.attributes: in a form, this may be a field of that name.
    for (const name of new Set([...before.getAttributeNames(), ...after.getAttributeNames()])) {
      const [old, value, current] = [before, after, live].map(each => each.getAttribute(name));
      if (old === value) continue;
      const change = element => {
        if (value === null) return element.removeAttribute(name);
        // setAttribute() refuses names like @click.
        const attribute = after.getAttributeNode(name);
        element.setAttributeNode(element.ownerDocument.importNode(attribute));
      };
      try {
        change(before);
        if (current === value) continue;
        if (name === "class" && current !== old) mergeClasses(live, old ?? "", value ?? "");
        else change(live);
        isNew = true;
      } catch (error) {
        console.error(`SwiftCMS: the page does not allow a change of ${name}:`, error);
      }
    }
    return isNew;
  }

  function mergeClasses(live, ...texts) {
    const [old, added] = texts.map(text => new Set(text.match(/\S+/g)));
    for (const name of old) if (!added.delete(name)) live.classList.remove(name);
    live.classList.add(...added);
  }

  function morphChildren(before, after, live) {
    const [old, fresh] = [before, after].map(each => [...each.childNodes]);
    const partners = findPartners(old, fresh);
    const order = partners.filter(index => index >= 0);
    const isReordered = order.some((index, place) => index < order[place - 1]);
    // For each child its node, and whether that has changed; undefined for new children.
    const nodes = partners.map(index => nodeOf.get(old[index]));
    const changes = nodes.map((node, i) => node && morph(old[partners[i]], fresh[i], node));
    const own = new Set(nodes);
    let isNew = isReordered || changes.some(each => each !== false);

    const kept = [];
    for (const copy of old) {
      const node = nodeOf.get(copy);
      if (own.has(node)) continue;
      // It is removed when it is not kept any more.
      if (isKept(node)) kept.push(copy);
      else {
        isNew ||= node.isConnected;
        node.parentNode?.removeChild(node);
      }
    }

    // Where the next child belongs. Nodes that scripts have added are passed.
    let next = live.firstChild;
    const pass = removes => {
      while (next && !own.has(next)) {
        const other = next;
        next = next.nextSibling;
        if (removes && !copyOf.has(other) && !isKept(other)) live.removeChild(other);
      }
    };
    // Children that are new, or that a script has removed or replaced by nodes of its own. If the
    // server has changed one in a row of them, these nodes are out of date.
    const isOut = nodes.map(node => !node || !(node.parentNode === live || node.isConnected));
    let isRestored;
    const current = fresh.map((child, place) => {
      const node = nodes[place];
      if (isOut[place] && !isOut[place - 1]) {
        const end = isOut.indexOf(false, place);
        const hasChanged = changes.slice(place, end < 0 ? fresh.length : end).includes(true);
        isRestored = hasChanged && next && !own.has(next);
        if (isRestored) pass(true);
        else if (!place) pass();
      }
      if (!node) {
        // A script may have added the same one already.
        const double = page.getElementById(child.getAttribute?.("id") ?? "");
        if (double?.parentNode === live && !copyOf.has(double) && !isKept(double)) {
          if (double === next) next = next.nextSibling;
          live.removeChild(double);
        }
        return addChild(live, child, next);
      }
      if (isOut[place]) {
        if (isRestored || changes[place]) live.insertBefore(node, next);
      } else if (node.parentNode === live) {
        // If the server has not changed the order, the order that a script has made stays.
        if (isReordered) pass();
        if (isReordered && node !== next) moveChild(live, node, next);
        next = node.nextSibling;
      }
      return old[partners[place]];
    });
    if (isReordered || order.length < current.length || order.length < old.length)
      before.replaceChildren(...current, ...kept);
    return isNew;
  }

  // For each new child the index of the old child that becomes it, or -1. Equal children at both
  // ends are matched first, the others by id, and those without ids in their order. A text belongs
  // to the element before it.
  function findPartners(old, fresh) {
    const partners = fresh.map(() => -1);
    let [start, oldEnd, end] = [0, old.length, fresh.length];
    const isEqual = (a, b) => start < Math.min(oldEnd, end) && old[a].isEqualNode(fresh[b]);
    while (isEqual(start, start)) partners[start] = start++;
    while (isEqual(oldEnd - 1, end - 1)) partners[--end] = --oldEnd;
    const keyOf = node => {
      const element = node.nodeType === 1 ? node : node.previousSibling;
      const [id, name] = ["id", "name"].map(each => element?.getAttribute?.(each) ?? "");
      return `${node.nodeName} ${id ? `#${id}` : name}`;
    };
    const groups = new Map();
    for (let index = start; index < oldEnd; index++) {
      const key = keyOf(old[index]);
      groups.set(key, groups.get(key) ?? []);
      groups.get(key).push(index);
    }
    for (; start < end; start++) {
      const child = fresh[start];
      // Scripts and templates are replaced by new ones, unless they are equal.
      const isWhole = /^(SCRIPT|TEMPLATE)$/i.test(child.nodeName);
      const group = groups.get(keyOf(child)) ?? [];
      const found = group.findIndex(index => !isWhole || old[index].isEqualNode(child));
      if (found >= 0) [partners[start]] = group.splice(found, 1);
    }
    return partners;
  }

  // Add what the server has added, and return its copy.
  function addChild(live, child, next) {
    const holder = page.createDocumentFragment();
    holder.append(page.importNode(child, true));
    const copy = pair(copies.importNode(child, true), holder.firstChild);
    for (const each of holder.querySelectorAll("template")) each.content.append(...each.childNodes);
    // An element that is added with autofocus takes the focus, so it gets the attribute later.
    const removed = [...holder.querySelectorAll("[autofocus]")].map(each => [
      each,
      each.removeAttributeNode(each.getAttributeNode("autofocus")),
    ]);
    live.insertBefore(holder, next);
    for (const [each, attribute] of removed) each.setAttributeNode(attribute);
    return copy;
  }

  function moveChild(live, node, next) {
    const put = (live.isConnected && live.moveBefore) || live.insertBefore;
    const hasFocus = [0, 20].includes(node.compareDocumentPosition(page.activeElement ?? page));
    // What has the focus might lose it, or be scrolled to. The nodes before it are moved instead.
    const end = node.nextSibling;
    if (!hasFocus) put.call(live, node, next);
    while (hasFocus && next !== node) {
      const moved = next;
      next = next.nextSibling;
      put.call(live, moved, end);
    }
  }

  // Find the elements with data-live, and fetch the page after events of their keys. `since` is the
  // newest event that the page contains. A key is "TYPE CONTENT_TYPE".
  function watchPage(since) {
    const elements = new Map();
    const stops = new Map();
    const complaints = new Set();
    const edited = new WeakSet();
    const take = ({ type, contentType }) => {
      due.add(`${type} ${contentType}`);
      schedule();
    };
    const client = { onstatus, ongap: list => list.forEach(take) };
    const addressNow = () => location.href.split("#")[0];
    // Inner elements before outer ones.
    const elementsOf = keys =>
      [...elements.keys()].filter(each => elements.get(each).some(key => keys.has(key))).reverse();
    // Keys of events that the page does not show yet.
    let due = new Set();
    let connection, userId, isOnline, isParsed, isReopened, lastScript, request, timer;
    let [lastDuration, notBefore] = [0, 0];
    const observer = new MutationObserver(records => {
      if (!isParsed) copyParsed(records);
      find(isParsed ? undefined : since);
    });
    const attributeFilter = ["data-live", "data-live-within"];
    const observe = characterData =>
      observer.observe(page, { subtree: true, childList: true, attributeFilter, characterData });
    observe(true);
    page.querySelectorAll("[data-live]").forEach(copyWhole);
    lastScript = page.currentScript;
    if (page.readyState !== "loading") finish();
    else page.addEventListener("readystatechange", finish, { once: true });
    page.addEventListener("visibilitychange", schedule);
    page.addEventListener("input", ({ target }) => edited.add(target), true);
    const forget = ({ target }) => Array.from(target.elements ?? [], each => edited.delete(each));
    page.addEventListener("reset", forget, true);

    function finish() {
      copyParsed(observer.takeRecords());
      isParsed = true;
      // Observers do not see what is in a template.
      for (const each of page.querySelectorAll("[data-live] template"))
        copyOf.get(each)?.content.replaceChildren(copies.importNode(each.content, true));
      observe(false);
      find(since);
      schedule();
    }

    // The parser adds nodes behind the last script. It lets observers run before each script, and
    // before a callback of a custom element. So it is known which nodes scripts have added.
    function copyParsed(records) {
      const isBehind = node => !lastScript || !(node.compareDocumentPosition(lastScript) & 4);
      const custom = new Set();
      let script = lastScript;
      for (const { target, addedNodes, nextSibling } of records) {
        const parent = copyOf.get(target);
        if (target.nodeType === 3 && parent && isBehind(target)) parent.data = target.data;
        for (const node of addedNodes) {
          const isScript = node.localName === "script" && !node.async;
          const isLive = parent || (node.nodeType === 1 && node.hasAttribute("data-live"));
          if (!(isScript || isLive) || custom.has(target) || !isBehind(node)) continue;
          if (isScript) script = node;
          if (!isLive) continue;
          if (customElements.get(node.localName)?.prototype.connectedCallback) custom.add(node);
          const copy = copyOf.get(node) ?? copies.importNode(node);
          const next = copyOf.get(nextSibling);
          pair(copy, node);
          parent?.insertBefore(copy, next?.parentNode === parent ? next : null);
        }
      }
      lastScript = script;
    }

    function copyWhole(element) {
      if (copyOf.has(element)) return;
      const copy = pair(copies.importNode(element, true), element);
      // If a script has added the attributes, it is not the server that removes them.
      for (const name of attributeFilter) copy.removeAttribute(name);
    }

    // `version`: the newest event that elements contain which are found now, if it is known.
    function find(version) {
      const former = new Map(elements);
      const wanted = new Set();
      elements.clear();
      for (const element of page.querySelectorAll("[data-live]")) {
        copyWhole(element);
        const pairs = element.getAttribute("data-live").split(",");
        const keys = pairs.map(each => each.trim().split(/\s+/).join(" "));
        const wrong = keys.find(each => !/^\S+ \S+$/.test(each));
        if (wrong !== undefined)
          complain(`data-live must be like "content.* posts, content.* pages", not "${wrong}"`);
        else if (page.getElementById(element.getAttribute("id")) === element)
          elements.set(element, keys);
        else complain(`the element with data-live="${keys}" needs an id that no other has`);
        for (const key of elements.get(element) ?? []) {
          wanted.add(key);
          if (version || (former.has(element) && stops.has(key))) continue;
          // It may be out of date already.
          due.add(key);
          schedule();
        }
      }
      for (const [key, stop] of stops) if (!wanted.has(key) && stops.delete(key)) stop();
      for (const key of wanted) if (!stops.has(key)) stops.set(key, subscribe(key, version));
    }

    function subscribe(key, version) {
      if (!connection) (connection = shared ??= createConnection()).add(client);
      const [type, contentType] = key.split(" ");
      const takeIt = () => take({ type, contentType });
      return connection.subscribe(client, type, contentType, takeIt, version);
    }

    function onstatus(status) {
      page.documentElement.dataset.swiftcms = status;
      isOnline = status === "online";
      if (!isOnline) return;
      if (userId !== undefined && userId !== connection.userId) due = new Set(stops.keys());
      userId = connection.userId;
      schedule();
    }

    function schedule() {
      if (!isOnline || !isParsed || page.hidden || request || timer) return;
      const found = elementsOf(due);
      if (!found.length) return;
      const within = Math.min(...found.map(each => each.getAttribute("data-live-within") ?? 0.5));
      const longest = Math.max(1_000 * within || 0, lastDuration, 1_000 * connection.spread);
      const wait = Math.max(Math.random() * longest, notBefore - performance.now());
      timer = setTimeout(refresh, Math.min(wait, 2 ** 31 - 1));
    }

    function refresh() {
      timer = undefined;
      if (!isOnline || page.hidden) return;
      const keys = due;
      due = new Set();
      const address = addressNow();
      const startedAt = performance.now();
      request = new XMLHttpRequest();
      request.open("GET", address);
      request.responseType = "document";
      request.timeout = 20_000;
      request.setRequestHeader("X-SwiftCMS-Live", "1");
      // Otherwise browsers may answer from their cache.
      request.setRequestHeader("Cache-Control", "no-cache");
      request.onloadend = ({ target }) => {
        request = undefined;
        lastDuration = performance.now() - startedAt;
        // A script may have changed the address.
        const isLeft = addressNow() !== address;
        const problem = isLeft || (problemOf(target, address) ?? apply(target, keys));
        const isDue = due.size || isLeft;
        if (problem) due = new Set([...due, ...keys]);
        if (problem && !isLeft) complain(`the page is not refreshed, because ${problem}`, "warn");
        if (isDue) schedule();
      };
      request.send();
    }

    // Returns why the answer is not the page, if it is not.
    function problemOf(answer, address) {
      const { status, responseURL } = answer;
      if (!status) return "there was no answer";
      const wait = answer.getResponseHeader("Retry-After");
      if (wait && (status === 429 || status === 503))
        notBefore = performance.now() + (1_000 * wait || Date.parse(wait) - Date.now() || 0);
      const isElsewhere = responseURL !== address;
      const hasEnded = isElsewhere || status === 401 || status === 403;
      // The connection is still that of the user whose session has ended.
      if (hasEnded && !isReopened) connection.reopen();
      isReopened = hasEnded;
      if (isElsewhere) return `it was redirected to ${responseURL}`;
      if (status !== 200) return `it has status ${status}`;
      const type = answer.getResponseHeader("Content-Type");
      if (!/^text\/html/i.test(type) || !answer.response) return `it is not HTML, but ${type}`;
      const mustReload = answer.getResponseHeader("X-SwiftCMS-Live") === "reload";
      const isEdited = each =>
        each.options || each.value !== each.defaultValue || each.checked !== each.defaultChecked;
      if (mustReload && editedFields().some(isEdited))
        return "it must be loaded again, but a field was changed";
      // If the browser stores no cookies, loading the page again once has not helped.
      if (mustReload === Boolean(history.state?.swiftcms)) return;
      // After replaceState(), the answer to a form is loaded again without the form.
      history.replaceState({ ...history.state, swiftcms: mustReload }, "");
      if (mustReload) location.reload();
    }

    function editedFields() {
      return [...page.querySelectorAll("input, select, textarea")].filter(each => edited.has(each));
    }

    function apply(answer, keys) {
      const fresh = tidy(answer.response);
      // An attribute of another option or radio button must not undo the visitor's choice.
      const boxes = editedFields().flatMap(each => [...(each.options ?? [each])]);
      const states = boxes.map(({ selected, checked }) => selected ?? checked);
      let problem;
      const changed = elementsOf(keys).filter(element => {
        const after = fresh.getElementById(element.getAttribute("id"));
        if (after?.nodeName === element.nodeName)
          return morph(tidy(copyOf.get(element)), after, element);
        problem = `it has no element #${element.getAttribute("id")}`;
      });
      boxes.forEach((each, index) => {
        each["selected" in each ? "selected" : "checked"] = states[index];
      });
      const timing = answer.getResponseHeader("Server-Timing");
      find(timing?.match(/(?:^|[\s,])swiftcms;desc="?(\d+-\d+)/)?.[1]);
      for (const each of changed)
        each.dispatchEvent(new CustomEvent("swiftcms:refresh", { bubbles: true }));
      return problem;
    }

    function complain(message, level = "error") {
      if (!complaints.has(message)) console[level](`SwiftCMS: ${message}`);
      complaints.add(message);
    }
  }

  // Not if the script was loaded twice.
  if (page && !globalThis.SwiftCMS) {
    const [navigation] = performance.getEntriesByType("navigation");
    const timing = navigation?.serverTiming?.find(each => each.name === "swiftcms");
    const ids = [page.currentScript?.dataset.since, timing?.description];
    watchPage(ids.find(each => EVENT_ID.test(each)));
  }

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
      if (since !== undefined && !EVENT_ID.test(since))
        throw new TypeError(`since must be the id of an event, not ${JSON.stringify(since)}`);
      if (url !== undefined || token !== undefined) this.#connection = createConnection(url, token);
      else this.#connection = shared ??= createConnection();
      this.#connection.add(this, since);
    }

    // Identifies this page among the editors of an entry.
    get clientId() {
      return this.#connection.clientId;
    }

    get transport() {
      return this.#connection.transport;
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
<title>{{ "WebSocket, live: SwiftCMS demo" if demo else "WebSocket inspector" }}</title>
<link rel="stylesheet" href="ws/inspector.css">
{% if demo %}<script src="ws/client.js"></script>{% endif %}
<script type="module" src="{{ 'demo.js' if demo else 'ws/inspector.js' }}"></script>
</head>
<body{% if demo %} class="demo"{% endif %}>
<header>
  <h1>{{ "WebSocket, live" if demo else "WebSocket inspector" }}</h1>
  {% if demo %}
  {% if can_reset %}<button id="reset">Reset</button>{% endif %}
  <button id="reopen" hidden>Lesson</button>
  <button id="rename">You</button>
  <output id="people">… here</output>
  {% endif %}
  <strong>{{ address }}</strong>
</header>
{% if demo %}
<section id="lesson" aria-label="Lesson">
  <nav id="steps" aria-label="Steps"></nav>
  <button id="dismiss" aria-label="Close the lesson">×</button>
  <article data-right="1"><h2>Ask, or be told?</h2>
    <p>This page asks every second: “anything new?” It is also told, by an open connection.</p>
    <p data-options="Asking|Being told|Both at once">Which way is the news here first?</p>
    <p><span id="late"></span> Most questions bring no news. Being told, <em>push</em>, is one
      message, at once, only if there is news.</p></article>
  <article data-right="1"><h2>Open the connection</h2>
    <p>A browser can ask a server. Can a server speak first? Open a connection, and see.</p>
    <p data-options="This browser|The server|Neither">Once it is open, who speaks first?</p>
    <p>The handshake, once: the browser asked (GET, Upgrade), the server agreed (101). Since then
      both may send at any time. The server did: connected.</p></article>
  <article data-right="0"><h2>Subscribe</h2>
    <p>The server sends only what you ask for: content.* of posts. Create a post and a page.</p>
    <p data-options="The post|The page|Both">What will you get?</p>
    <p>content.* stands for content.created too, but pages are not posts. An arrow
      that stops at ✕ is an event that you did not get, and why.</p></article>
  <article data-right="1"><h2>Signs of life</h2>
    <p>Nobody writes for {{ heartbeat }} seconds. How can the server know that you are there?</p>
    <p data-options="Nothing|A sign of life|Goodbye">What will the server send?</p>
    <p>A heartbeat every {{ heartbeat }} s; you answer pong. A closed laptop says no goodbye: after
      two heartbeats without an answer, the server closes the connection.</p></article>
  <article data-right="1"><h2>Mistakes</h2>
    <p>Send a misspelt action, “subscrbe”. Then something that is not even JSON.</p>
    <p data-options="Hangs up|Says what is wrong|Nothing">What does the server do?</p>
    <p>An error is an answer: a code for programs, a sentence for people. The connection stays
      open, as the second answer proves.</p></article>
  <article data-right="2"><h2>Who are you?</h2>
    <p>The server does not know who you are. Show it a token; then change one letter of it.</p>
    <p data-options="Somebody else|Nobody|Still you">Who are you then?</p>
    <p>The server has signed the token. With a letter changed the signature is wrong: it refuses
      the token, and you are still who you were.</p></article>
  <article data-right="0"><h2>Lose the connection</h2>
    <p>Lose it for five seconds. Meanwhile a neighbour (or the button) creates two posts.</p>
    <p data-options="Both|The last|Neither">Which do you have when it is back?</p>
    <p>The server keeps the latest events. Your browser sent the last id that it had, as
      since, and the server sent what came after it.</p></article>
  <article data-right="1"><h2>Two editors</h2>
    <p>You open a post. A neighbour (or the button) saves it first. Now you save.</p>
    <p data-options="It wins|It is refused|It is merged">What happens to the second save?</p>
    <p>A save names the version that it changed. Yours is old: it would wipe out what the
      neighbour wrote. So the server refuses it, and you choose.</p></article>
  <article data-right="2"><h2>A slow client</h2>
    <p>A client does not read what it gets. The server starts one, and sends you the same.</p>
    <p data-options="I wait too|I lose some|Nothing">What happens to you?</p>
    <p>What it does not read waits in the server’s memory. At 1 MiB, only that client is closed
      (1013). It may reconnect, with since. The others never wait.</p></article>
  <div id="expect"></div>
  <output id="verdict"></output>
  <button id="act" class="filled">…</button>
  <button id="next">Next →</button>
</section>
<section id="cms" aria-label="A small CMS">
  <form id="create" autocomplete="off">
    <input name="title" required maxlength="200" placeholder="Title of a new post" aria-label="New">
    <button value="posts">post</button>
    <button value="pages">page</button>
  </form>
  <ul id="entries"></ul>
  <form id="editor" autocomplete="off">
    <input name="title" required maxlength="200" aria-label="Title">
    <textarea name="body" rows="2" maxlength="10000" aria-label="Text"></textarea>
    <output id="others"></output>
    <div id="conflict" role="alert" hidden>
      <p id="refusal"></p>
      <button type="button" id="theirs">Take theirs</button>
      <button type="button" id="mine">Keep mine</button>
    </div>
    <button>Save</button>
    <button type="button" id="leave">Close</button>
    <button type="button" id="publish">Publish</button>
    <button type="button" id="delete">Delete</button>
  </form>
  <footer id="below">
    <button id="fresh" hidden>new</button>
    <button id="more" hidden>more</button>
    <output id="news"></output>
  </footer>
</section>
<dialog id="welcome" aria-labelledby="who">
  <form id="name" autocomplete="off">
    <h2 id="who">What is your name?</h2>
    <p>The class will see it.</p>
    <input name="name" required maxlength="20" pattern=".*\S.*" aria-label="Your name">
    <button class="filled">Begin</button>
  </form>
</dialog>
{% endif %}
<section id="inspector" aria-label="Messages">
  <header>
    <b id="you">○ You</b> <b id="server">Server</b> <b id="own">CMS</b>
    {% if demo %}
    <button id="both" aria-pressed="false">
      + <span>the</span> CMS<span>’s own connection</span></button>
    {% endif %}
    <button id="clear">Clear</button>
    <button id="toggle">Open</button>
  </header>
  <ul id="log" role="listbox" aria-label="Messages, oldest first" tabindex="0"></ul>
  <button id="unseen" hidden>new</button>
  <div id="details">
    <pre id="json"></pre>
    <div id="explanation">Select a row to see the message, and what each of its fields means.</div>
  </div>
  <footer>
    <nav aria-label="Send">
      <button value="ask">Ask</button>
      <button value="sign-in">Sign in</button>
      <button value="write">Write</button>
      {% if demo %}<button value="tell">Tell</button>{% endif %}
      <button value="break">Break</button>
    </nav>
    <form id="ask" autocomplete="off">
      <input name="type" value="{{ 'content.*' if demo else '*' }}" aria-label="type"> of
      <input name="contentType" value="{{ 'posts' if demo else '*' }}" aria-label="contentType">
      <button value="subscribe">Subscribe</button>
      <button value="unsubscribe">Unsubscribe</button>
    </form>
    <form id="sign-in" autocomplete="off">
      {% if demo %}
      as <input name="name" required maxlength="20" aria-label="Name">
      <button>Get a token and send it</button>
      {% else %}
      <input name="token" required placeholder="a token" aria-label="Token">
      <button>Authenticate</button>
      {% endif %}
    </form>
    <form id="write" autocomplete="off">
      <input name="text" value='{"action": "presence"}' aria-label="Any message">
      <button>Send</button>
    </form>
    {% if demo %}
    <form id="tell" autocomplete="off">
      <input name="to" required maxlength="40" placeholder="name" aria-label="To">
      <input name="text" required maxlength="500" placeholder="only for them" aria-label="Text">
      <button>Tell</button>
    </form>
    {% endif %}
    <div id="break">
      {% if demo %}<button id="cut">Lose it for 5 s</button>{% endif %}
      <button id="forge">Bad token</button>
      <button id="fast">Send 300</button>
      {% if demo %}<button id="flood">Slow reader</button>{% endif %}
    </div>
  </footer>
</section>
</body>
</html>
"""

INSPECTOR_CSS = r""":root {
  color-scheme: light dark;
  --ground: #fff; --panel: #f0f4f9; --ink: #111418; --quiet: #47525e; --edge: #7d8b9a;
  --accent: #5a2ca0; --on-accent: #fff; --chosen: #fff1c2; --good: #0a6632; --replay: #e6eef8;
  --out: #944000; --in: #0a4d9c; --bad: #a3001b; --bad-ground: #f8e0e3; --unsent: #006069;
  /* The log's columns: the time, from one lifeline to the next, and all lifelines. */
  --time: 4.6rem; --gap: 7.5rem; --rail: 10rem;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #11161c; --panel: #1c242d; --ink: #f3f5f7; --quiet: #b6c2cf; --edge: #71808f;
    --accent: #cdb0ff; --on-accent: #11161c; --chosen: #453800; --good: #7ce8a6; --replay: #1b2833;
    --out: #ffb26b; --in: #8fc4ff; --bad: #ff9d9d; --bad-ground: #35222a; --unsent: #6fd6de;
  }
}
/* All sizes grow with the window: on a projector they can be read from the back row. */
html { font-size: clamp(15px, min(1.25vw, 2.222vh), 32px); }
*, ::before, ::after { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
body {
  display: grid; grid: "head" 3.5rem "log" minmax(0, 1fr) / minmax(0, 1fr); height: 100vh;
  height: 100dvh; background: var(--ground); color: var(--ink);
  font: 1.1875rem/1.3 system-ui, sans-serif;
}
.demo {
  grid: "head head" 3.5rem "lesson log" auto "cms log" minmax(0, 1fr) / 26.25rem minmax(0, 1fr);
}
h1, h2 { font-size: 1.5rem; line-height: 1.2; }
button, input, textarea {
  min-width: 0; height: 2.25rem; padding: 0 .6rem; border: 2px solid var(--edge);
  border-radius: .4rem; background: var(--ground); color: var(--ink); font: inherit;
}
button { font-size: 1.1rem; font-weight: 600; white-space: nowrap; touch-action: manipulation; }
button:hover:enabled { border-color: var(--ink); }
button:disabled { opacity: .6; }
.filled { border-color: var(--accent); background: var(--accent); color: var(--on-accent); }
[aria-pressed=true] { border-color: var(--ink); background: var(--chosen); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
small { color: var(--quiet); font-size: 1rem; }
#log small, time, code, header strong { font: 1rem/1.35 ui-monospace, monospace; }
header, footer { display: flex; gap: .6rem; align-items: center; }
header button, footer button, footer input { font-size: 1rem; }
body > header { grid-area: head; padding: 0 1rem; border-bottom: 2px solid var(--edge); }
h1 { flex: 1; white-space: nowrap; }
header strong { font-size: 1.4rem; font-weight: 700; }

#lesson {
  position: relative; grid-area: lesson; height: 21.5rem; padding: .6rem 1rem; overflow: hidden;
  border: solid var(--edge); border-width: 0 2px 2px 0; background: var(--panel);
}
.no-lesson #lesson { display: none; }
#steps { display: flex; gap: .3rem; margin: 0 2.4rem .4rem 0; }
#steps button, #dismiss { width: 2.1rem; height: 2.1rem; padding: 0; }
#steps .done { border-color: var(--good); background: var(--good); color: var(--ground); }
#steps [aria-current=step] { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
#dismiss { position: absolute; top: .6rem; right: .6rem; border: 0; background: none; }
#verdict { display: block; }
#lesson p, #verdict { margin-top: .2rem; font-size: 1.125rem; }
[data-options] { font-weight: 600; }
#lesson p:last-child, .done [data-options], .done #expect { display: none; }
#expect { display: flex; gap: .4rem; margin: .3rem 0 .5rem; }
#verdict b { color: var(--good); }
#act, #next { position: absolute; bottom: .7rem; left: 1rem; width: calc(100% - 8.8rem); }
#next { right: 1rem; left: auto; width: 6.2rem; }

#cms {
  display: flex; grid-area: cms; flex-direction: column; padding: .6rem 1rem 0;
  border-right: 2px solid var(--edge);
}
#create { display: flex; gap: .5rem; padding-bottom: .5rem; }
#create input, #write input, #sign-in input, #tell [name=text] { flex: 1; }
#entries { flex: 1; padding: 0; overflow-y: auto; list-style: none; }
#entries li {
  display: flex; gap: .6rem; align-items: center; height: 2.75rem;
  border-top: 1px solid var(--edge);
}
body:not(.no-lesson) #entries:not(.all) li:nth-child(n + 6), .no-lesson #more, .all ~ * #more,
.editing :is(#create, #entries, #below button), #cms:not(.editing) #editor,
#conflict:not([hidden]) ~ button { display: none; }
#entries b { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#entries small { white-space: nowrap; }
#entries button, #below button { height: 1.8rem; }
#entries .gone { opacity: .6; text-decoration: line-through; }
#below { flex: none; height: 2.5rem; border-top: 1px solid var(--edge); font-size: 1rem; }
#editor {
  display: flex; flex: 1; flex-wrap: wrap; gap: .5rem; align-content: flex-start; overflow-y: auto;
}
#editor input, #editor textarea, #others, #conflict { flex: 1 1 100%; overflow-wrap: anywhere; }
#editor textarea { height: 3.6rem; resize: none; }
#conflict { padding: .4rem; background: var(--chosen); }
dialog {
  margin: auto; padding: 2rem; border: 2px solid var(--edge); border-radius: .6rem;
  background: var(--ground); color: var(--ink);
}
dialog form { display: grid; gap: 1rem; justify-items: start; }

#inspector {
  display: flex; position: relative; grid-area: log; flex-direction: column; min-height: 0;
}
#inspector > header {
  position: relative; flex: none; gap: .4rem; justify-content: flex-end; height: 2.75rem;
  padding: 0 .6rem; border-bottom: 2px solid var(--edge); background: var(--panel);
}
header b { position: absolute; white-space: nowrap; transform: translateX(-50%); }
#you { left: calc(var(--time) + 1.25rem); }
#server { left: calc(var(--time) + 1.25rem + var(--gap)); }
#own { left: calc(var(--time) + 1.25rem + 2 * var(--gap)); }
.both { --rail: 17.5rem; }
body:not(.both) :is(#own, li.cms) { display: none; }
#log {
  flex: 1; min-height: 0; padding: 0; overflow-y: scroll; overflow-anchor: none; list-style: none;
  outline-offset: -3px;
}
#log:empty { padding: 2rem 5.8rem; color: var(--quiet); }
#log:empty::before { content: "Nothing has been sent yet."; }
#log li { display: flex; align-items: center; height: 2.25rem; padding-right: .6rem; }
#log time { flex: none; width: var(--time); padding-left: .5rem; color: var(--quiet); }
#log p {
  flex: 1; overflow: hidden; font-size: 1.3125rem; text-overflow: ellipsis; white-space: nowrap;
}
/* The lifelines are the borders of two boxes. The right one begins at the server. */
li > i { position: relative; flex: none; width: var(--rail); height: 100%; }
li > i::before, .both li > i::after {
  position: absolute; left: 1.125rem; width: calc(var(--gap) + .25rem); height: 100%;
  border: solid var(--edge); border-width: 0 .25rem; content: "";
}
.both li > i::after { left: calc(1.125rem + var(--gap)); }
.away > i::before { border-left-style: dotted; }
/* The arrow of a row points to the right, if it is not turned. */
i i {
  position: absolute; top: 1rem; left: 1.375rem; width: calc(var(--gap) - .25rem);
  border-top: .25rem solid;
}
i i::after {
  position: absolute; top: -.625rem; right: 0; border: solid transparent;
  border-width: .5rem 0 .5rem 1.1rem; border-left-color: currentcolor; content: "";
}
.cms i i { left: calc(1.375rem + var(--gap)); }
:is(.in:not(.cms), .ghost, .cms.out) i i { transform: scaleX(-1); }
.dashed i i, .ghost i i { border-top-style: dashed; }
.ghost i i, .unsent i i { width: calc(var(--gap) / 2); }
.ghost i i { left: calc(1.125rem + var(--gap) / 2); }
:is(.ghost, .unsent, .lost) i i::after {
  top: -1.1rem; right: -.4rem; border: 0; font: 700 1.5rem/2rem system-ui, sans-serif; content: "✕";
}
.lost i i { left: .5rem; width: 1.5rem; border-color: transparent; }
.lost i i::after { right: 0; width: 1.5rem; background: inherit; text-align: center; content: "≈"; }
.none i i { display: none; }
.out { --mark: var(--out); }
.in { --mark: var(--in); }
.err { --mark: var(--bad); }
.unsent { --mark: var(--unsent); }
#log b, i i { color: var(--mark, var(--quiet)); }
#log .ghost, #log .ghost b { color: var(--quiet); font-weight: 400; }
#log .lost.err { background: var(--bad-ground); }
#log .replay { background: var(--replay); }
#log .replay p { padding-left: .6rem; border-left: .3rem solid var(--in); }
/* The last `since` stays in sight, because it explains the rows below it. */
#log .since {
  position: sticky; z-index: 1; top: 0; background: var(--ground); box-shadow: 0 1px var(--edge);
}
#log [aria-selected=true] { background: var(--chosen); }
#unseen { position: relative; align-self: flex-end; margin: -2.75rem 1.5rem .5rem 0; }
#details {
  display: grid; flex: none; grid: 11.5rem / 1fr 1fr; border: solid var(--edge);
  border-width: 2px 0; background: var(--panel);
}
#details > * { position: relative; padding: .5rem .8rem; overflow: auto; }
#json code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
#json .focused { outline: 2px solid var(--ink); background: var(--chosen); }
#explanation { border-left: 1px solid var(--edge); }
#explanation small { display: block; margin-top: .6rem; }
#inspector footer { justify-content: space-between; height: 3.75rem; padding: 0 .7rem; }
#inspector footer > :not(nav) {
  display: flex; flex: 1; gap: .4rem; align-items: center; justify-content: flex-end; min-width: 0;
}
#ask input, #tell [name=to] { width: 6.6rem; }
nav { white-space: nowrap; }
footer nav button { padding: 0 .45rem; border-width: 0 0 4px; border-radius: 0; background: none; }
footer nav [aria-pressed=false] { border-color: transparent; color: var(--quiet); }
@media (max-width: 1100px) {
  .demo { grid-template-columns: 25.5rem minmax(0, 1fr); }
  #both span { display: none; }
  #inspector footer { flex-direction: column; justify-content: center; height: 6rem; }
  #inspector footer > :not(nav) { flex: none; width: 100%; }
}
@media (max-width: 700px) {
  :root { --time: 0rem; --gap: 4rem; --rail: 6.5rem; }
  html { font-size: 16px; }
  body { display: flex; flex-direction: column; height: auto; }
  body > header { flex-wrap: wrap; height: auto; padding: .5rem 1rem; }
  h1 { flex: 1 1 100%; }
  #lesson { height: 23.5rem; border-width: 0 0 2px; }
  #lesson button { padding: 0 .4rem; font-size: 1rem; }
  #inspector { height: 45rem; }
  #cms { order: 1; height: 21rem; border: 0; }
  #log time, #log small, #both { display: none; }
  #log p { font-size: 1.0625rem; }
  #details { grid: 9rem 6rem / 1fr; }
  #you { left: .2rem; transform: none; }
  header b, code { font-size: .8125rem; }
  #inspector footer { height: auto; padding: .5rem .7rem; }
  #inspector footer > :not(nav) { flex-wrap: wrap; }
}
"""

INSPECTOR_JS = r"""// The WebSocket inspector: a connection, its messages as arrows and in words.
// GET /ws shows it alone. The demo's page imports it.
const MAX_ROWS = 300;
// Messages of one kind become one row while they follow each other within so many milliseconds.
const RUN_TIME = 2_000;
// A run is looked for in so many of the last rows. Readers would not see a count change above.
const RUN_ROWS = 8;
// Longer strings are cut.
const MAX_STRING = 300;
const RETRY_TIME = 2_000;

export const $ = id => document.getElementById(id);
// Children that are strings become text, never markup.
export const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
export const setAria = (element, name, value) => element.setAttribute(`aria-${name}`, value);
export const onSubmit = (id, action) =>
  $(id).addEventListener("submit", event => {
    event.preventDefault();
    action(Object.fromEntries(new FormData(event.target)), event);
  });

// -- Ids, patterns and words: pure functions --

export function shortId(id) {
  const [milliseconds, counter] = String(id).split("-");
  return `…${milliseconds.slice(-4)}${counter > 0 ? `-${counter}` : ""}`;
}
const sortKey = id => id.replace(/\d+/g, digits => digits.padStart(20, "0"));
export const isLater = (id, other) => !other || sortKey(id) > sortKey(other);
const isMatch = (pattern, name) =>
  pattern.endsWith("*") ? name.startsWith(pattern.slice(0, -1)) : name === pattern;
const patternText = ({ type = "*", contentType = "*" }) => `${type} of ${contentType}`;

// Why an event did not reach a connection that was in this state when the event came.
export function whyNot({ type, contentType }, { isOpen, patterns, to }) {
  if (to) return `it was for ${to} only`;
  if (!isOpen) return "you were away";
  if (!patterns.length) return "you have not subscribed to anything";
  const near = patterns.filter(each => isMatch(each.type, type));
  if (!near.length) return `${patternText(patterns[0])} does not match ${type}`;
  if (near.some(each => isMatch(each.contentType, contentType)))
    return "it was for one user, and you are not signed in as that user";
  return `${patternText(near[0])} does not match ${contentType}`;
}

const nameOf = editor => editor?.userId ?? "somebody";
const editorsText = ({ editors }) => `open at ${editors.map(nameOf).join(", ") || "nobody"}`;
const singular = contentType => String(contentType).replace(/s$/, "");
const entryText = ({ contentType, entryId }) => `${singular(contentType)} ${entryId}`;

const OUT_WORDS = {
  subscribe: ({ subscriptions, since, ...pattern }) =>
    (since ? `since ${shortId(since)}: ` : "")
    + (subscriptions ? `${subscriptions.length} patterns` : patternText(pattern)),
  unsubscribe: ({ type, contentType }) =>
    type || contentType ? patternText({ type, contentType }) : "from all",
  authenticate: () => "with a token",
  pong: () => "I am still here",
  heartbeat: () => "are you still there?",
  editStart: entryText,
  editStop: entryText,
};
const IN_WORDS = {
  "system.connected": ({ clientId, userId }) =>
    `you are client …${clientId.slice(-4)}, user ${userId ?? "unknown"}`,
  "system.subscribed": ({ recovered }) =>
    recovered ? "from now on" : "but what you missed is gone: load the page’s data again",
  "system.unsubscribed": ({ removed }) => `${removed} removed`,
  "system.authenticated": ({ userId }) => `you are ${userId}`,
  "system.heartbeat": ({ lastId }) => `I am still here, and sent all up to ${shortId(lastId)}`,
  "system.error": ({ code, message }) => `${code}: ${message}`,
  "system.editing": editorsText,
  "user.editing": payload => `entry ${payload.entryId}, ${editorsText(payload)}`,
  "user.stoppedEditing": payload => `entry ${payload.entryId}, ${editorsText(payload)}`,
  "user.edited": ({ entryId, editor }) => `entry ${entryId}, ${nameOf(editor)} is typing`,
  notification: ({ from, text }) => `from ${from}: ${text}`,
  "demo.flood": ({ closed, unsent, limit }) =>
    closed
      ? `slow reader closed with ${closed}, not you`
      : `${unsent >> 10} of ${limit >> 10} KiB wait for the slow reader`,
};
function eventWords({ contentType, payload }) {
  const { title, updated_by: author } = payload ?? {};
  const text = title === undefined ? JSON.stringify(payload) : `“${title}”`;
  return `${singular(contentType)} ${text}${author ? ` by ${author}` : ""}`;
}

// {message, head, words} of a message's text. `message` is null if it is not understood.
export function describe(isOut, text) {
  try {
    const message = JSON.parse(text);
    const { action, type, payload } = message;
    const words = isOut ? OUT_WORDS[action]?.(message) : IN_WORDS[type]?.(payload);
    const head = isOut ? String(action) : type.replace("system.", "");
    return { message, head, words: words ?? (isOut ? text : eventWords(message)) };
  } catch {
    return { message: null, head: "not JSON", words: text };
  }
}

// Messages with the same key may become one row. Without a key, a message has a row of its own.
function runKey(isOut, message) {
  const { action, type, contentType, payload } = message ?? {};
  if (isOut) return ["pong", "heartbeat", "editChange"].includes(action) ? action : null;
  if (type === "system.heartbeat") return type;
  return type.startsWith("system.") || payload?.closed ? null : `${type} of ${contentType}`;
}

// The row that a further message with this key belongs to. A row without a key ends all runs.
export function findRun(rows, key, now) {
  for (const row of rows.slice(-RUN_ROWS).reverse()) {
    const isFresh = now - row.seenAt <= RUN_TIME || /heartbeat|pong/.test(key);
    if (row.key === null || row.key === key) return row.key && isFresh ? row : undefined;
  }
}

const CLOSE_WORDS = {
  1000: "as you asked",
  1001: "the server is shutting down",
  1006: "nobody said goodbye",
  1013: "you read too slowly",
  4401: "sign in again",
  4408: "the server heard nothing from you for two heartbeats",
};
const FIELDS = {
  GET: "The browser asks for this address, as for any page: a WebSocket begins as HTTP.",
  Origin: "The site of the page that asks. The server refuses pages of other sites.",
  Upgrade: "The browser asks, and the server agrees, to continue as a WebSocket, not as HTTP.",
  "Sec-WebSocket-Key": "Random. The server must answer with a number that is computed from it.",
  "HTTP/1.1": "101: the server agrees, once. From now on both sides may send, at any time.",
  "Sec-WebSocket-Accept": "Computed from the key: it proves that the server knows WebSockets.",
  action: "What this browser wants from the server. A pong only says: I am still here.",
  type: "What kind of message this is: words joined by dots. A pattern may end with *.",
  contentType: "The kind of data that the event is about, such as posts.",
  since: "The last id that this browser has. The server first sends all that came after it.",
  ref: "A value that the sender chooses. The answer has the same one.",
  token: "Says who you are. The server signed it: change a letter, and the signature is wrong.",
  id: "The id of this event. Ids only grow. After a loss, a client sends its last id, as since.",
  timestamp: "When it happened, by the server’s clock, in universal time.",
  payload: "The content, from the application.",
  clientId: "The server’s name for this connection. The next connection gets another.",
  userId: "Who is signed in on this connection; null: nobody.",
  heartbeat: "The number of seconds between two heartbeats of the server.",
  lastId: "The newest event’s id. All that you asked for up to this event was sent to you.",
  recovered: "true: you get all that you missed. false: the server does not have it any more.",
  replayed: "The number of events that you missed. They follow, in their order.",
  code: "What went wrong, as a word for programs.",
  message: "What went wrong, and what would be right, for people.",
  editors: "All who have this entry open now.",
  conflict: "true: more than one has this entry open.",
  version: "Grows with each save. A save must name the version that it changed.",
  unsent: "The bytes that wait in the server’s memory, because the slow reader does not read.",
  limit: "If more bytes than this wait for a client, the server closes its connection.",
  closed: "Why the connection ended, as a number. 1013: its client read too slowly.",
};

// The field of a line of JSON, or the header of a line of HTTP. An entry has an id of its own.
function fieldOf(line) {
  const [, indent, name] = line.match(/^( +)"([^"]+)": /) ?? [];
  if (!name) return Object.keys(FIELDS).find(each => line.startsWith(each)) ?? "";
  return name === "id" && indent.length > 2 ? "payload.id" : name;
}

// -- The log --

const list = $("log");
let rows = [];
// The row that was added or changed last, and the one whose message is shown.
let latest, selected;
let renderTimer;
// Whether the log scrolls with its rows: it does unless the reader has scrolled up.
let isFollowing = true;
// How many rows are below what is shown, and how many there have been.
let unseen = 0;
let number = 0;
const isInside = () => list.matches(":hover") || list.contains(document.activeElement);
const isAtEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight < 20;

// row: {kind: its classes, head, words, message or text, and maybe key, id, note}
export function addRow({ key = null, ...fields }) {
  const now = performance.now();
  let row = key && findRun(rows, key, now);
  if (!row) rows.push((row = { key, count: 0, beganAt: now, gap: now - (latest?.seenAt ?? now) }));
  latest = Object.assign(row, fields, { count: row.count + 1, seenAt: now, isDirty: true });
  renderTimer ??= setTimeout(render, 16);
}

function fill(row) {
  const gap =
    row.gap < 1_000 ? `${Math.round(row.gap)}ms` : `${+(row.gap / 1_000).toPrecision(2)}s`;
  const seconds = Math.round((row.seenAt - row.beganAt) / 1_000);
  const times = row.count > 1 ? `× ${row.count}${seconds ? ` in ${seconds} s` : ""} · ` : "";
  row.element.className = row.kind;
  row.element.replaceChildren(
    make("time", {}, `+${gap}`),
    make("i", {}, make("i")),
    make("p", {}, make("b", {}, row.head), ` ${times}${row.words.slice(0, MAX_STRING)}`),
    make("small", {}, row.id ? shortId(row.id) : ""),
  );
  row.isDirty = false;
}

function render() {
  renderTimer = null;
  const surplus = rows.splice(0, Math.max(rows.length - MAX_ROWS, 0));
  // Rows that are looked at do not move when rows above them are removed.
  list.scrollTop -= surplus.length * (list.firstChild?.offsetHeight ?? 0);
  for (const { element } of surplus) element?.remove();
  for (const row of rows.filter(({ isDirty }) => isDirty)) {
    if (!row.element) {
      row.element = make("li", { id: `row${++number}`, onclick: () => select(row) });
      row.element.setAttribute("role", "option");
      list.append(row.element);
      unseen++;
    }
    fill(row);
  }
  follow();
}

// Show the newest rows, unless the reader has scrolled up, or rows would move under the pointer.
function follow() {
  if (isFollowing && !isInside()) list.scrollTop = list.scrollHeight;
  if (isAtEnd()) unseen = 0;
  $("unseen").hidden = !unseen;
  $("unseen").textContent = `${unseen} new ▾`;
}

export function selectLatest() {
  render();
  select(latest);
}

function select(row) {
  if (selected) setAria(selected.element, "selected", false);
  selected = row;
  setAria(row.element, "selected", true);
  setAria(list, "activedescendant", row.element.id);
  const { message, text } = row;
  const shorten = (key, value) =>
    value?.length > MAX_STRING && value.slice ? `${value.slice(0, MAX_STRING)}…` : value;
  const lines = (message ? JSON.stringify(message, shorten, 2) : text).split("\n").slice(0, 100);
  const codes = lines.map(line => make("code", { field: fieldOf(line) }, line));
  for (const code of codes) code.onclick = () => explain(code);
  $("json").replaceChildren(...codes);
  const best = ["since", "code", "closed", "replayed", "id", "GET", "HTTP/1.1", "action", "type"];
  const found = best.map(field => codes.find(code => code.field === field));
  explain(found.find(Boolean) ?? codes[0]);
}

// Explain the field of this line of the message.
function explain(code) {
  for (const each of $("json").children) each.classList.toggle("focused", each === code);
  $("json").scrollTop = code.offsetTop - 2 * code.offsetHeight;
  const { field } = code;
  const sentence = field && ` ${FIELDS[field] ?? "A field of the application’s."}`;
  const note = make("small", {}, selected.note ?? "");
  $("explanation").replaceChildren(make("p", {}, make("b", {}, field), sentence), note);
}

list.onkeydown = event => {
  const rowStep = { ArrowDown: 1, ArrowUp: -1, End: MAX_ROWS, Home: -MAX_ROWS }[event.key];
  const fieldStep = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (rowStep && rows.length) {
    render();
    const index = (selected ? rows.indexOf(selected) : rows.length) + rowStep;
    select(rows[Math.min(Math.max(index, 0), rows.length - 1)]);
    selected.element.scrollIntoView({ block: "nearest" });
  } else if (fieldStep && selected) {
    const codes = [...$("json").children].filter(({ field }) => field);
    const index = codes.findIndex(({ className }) => className) + fieldStep;
    if (codes[index]) explain(codes[index]);
  } else return;
  event.preventDefault();
};
list.onscroll = () => {
  isFollowing = isAtEnd();
  follow();
};
list.onpointerleave = list.onblur = window.onresize = follow;
$("unseen").onclick = () => {
  isFollowing = true;
  follow();
};
$("clear").onclick = () => {
  rows = [];
  latest = undefined;
  list.replaceChildren();
  follow();
};

// -- The connection --

// Called with each thing that happens: ("in" | "out" | "lost", message or close code).
export const listeners = new Set();
const emit = (...values) => listeners.forEach(listener => listener(...values));
export const link = {
  // The demo tells the server with it which page this is.
  query: "",
  // From the greeting until the connection is lost.
  isReady: false,
  // From the opening until the user closes it, with all losses in between.
  isWanted: false,
  userId: null,
  // Accepted subscriptions: text -> {type, contentType}.
  wanted: new Map(),
};
// The id up to which everything has arrived, to be sent as `since` after a loss.
let place, greetedId, askedSince;
// The token of the last `authenticate`, and the last that was accepted.
let sentToken, ownToken;
let socket, retryTimer;
let replayLeft = 0;
// It does not reconnect before this time, of performance.now().
let awayUntil = 0;
const address = new URL("../ws", import.meta.url);
const REQUEST = `GET ${address.pathname} HTTP/1.1
Upgrade: websocket
Sec-WebSocket-Key: (random)
Origin: ${location.origin}`;
const RESPONSE = `HTTP/1.1 101 Switching Protocols
Upgrade: websocket
Sec-WebSocket-Accept: (computed from the key)`;

function addHandshake(kind, head, words, text) {
  const note = "Dashed: the browser does this. A page cannot see it, so this is only a summary.";
  addRow({ kind: `${kind} dashed`, head, words, text, note });
}

function showState() {
  const seconds = Math.ceil((awayUntil - performance.now()) / 1_000);
  $("you").textContent = link.isReady ? "● You" : seconds > 0 ? `○ ${seconds} s` : "○ You";
  $("toggle").textContent = link.isWanted ? "Close" : "Open";
  if (seconds > 0) setTimeout(showState, 250);
}

function connect() {
  retryTimer = null;
  const url = new URL(address);
  url.protocol = url.protocol.replace("http", "ws");
  url.search = link.query;
  const own = (socket = new WebSocket(url));
  own.onopen = () => {
    addHandshake("out", "GET … Upgrade", "a request, once", REQUEST);
    addHandshake("in", "101", "Switching Protocols, once", RESPONSE);
    awayUntil = 0;
  };
  own.onmessage = ({ data }) => own === socket && receive(data);
  own.onclose = event => own === socket && lose(event);
}

export function open() {
  link.isWanted = true;
  connect();
  showState();
}

// Close it as the user wishes: it does not reconnect.
export function close() {
  clearTimeout(retryTimer);
  retryTimer = place = ownToken = null;
  awayUntil = 0;
  link.isReady = link.isWanted = false;
  link.wanted.clear();
  socket?.close(1000);
  showState();
}

// Reconnect so many milliseconds later than otherwise.
export function stayAway(milliseconds) {
  awayUntil = Math.max(awayUntil, performance.now()) + milliseconds;
  if (retryTimer) retry();
  showState();
}

function retry() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(connect, Math.max(RETRY_TIME, awayUntil - performance.now()));
}

function lose({ code, reason }) {
  const text = `closed: ${code}\nreason: ${reason || "none was given"}`;
  const note = "A page learns no more than this. It has to reconnect by itself.";
  const words = `${code}, ${CLOSE_WORDS[code] ?? (reason || "see RFC 6455 section 7.4")}`;
  if (!link.isWanted) addRow({ kind: "lost", head: "closed", words, text, note });
  else if (link.isReady) addRow({ kind: "lost err", head: "connection lost", words, text, note });
  else addRow({ kind: "away none", key: "away", head: "no answer", words: "will try again", text });
  link.isReady = false;
  link.userId = null;
  replayLeft = 0;
  if (link.isWanted) retry();
  showState();
  emit("lost", code);
}

export function send(message) {
  const text = typeof message === "string" ? message : JSON.stringify(message);
  if (socket?.readyState === WebSocket.CONNECTING)
    return socket.addEventListener("open", () => send(message));
  if (socket?.readyState !== WebSocket.OPEN)
    return addRow({ kind: "unsent away", head: "not sent", words: "there is no connection", text });
  socket.send(text);
  const { since, token } = show(true, text) ?? {};
  askedSince = since ?? askedSince;
  sentToken = token ?? sentToken;
}

// Add the row of a message, and return the message. `source` is "cms " for client.js's messages.
export function show(isOut, text, source = "", more = {}) {
  const described = describe(isOut, text);
  const { message } = described;
  const key = runKey(isOut, message);
  let kind = source + (isOut ? "out" : "in");
  if (message?.type === "system.error") kind += " err";
  if (message?.since) kind += " since";
  if (!link.isReady && source) kind += " away";
  addRow({ kind, key: key && source + key, id: message?.id, text, ...described, ...more });
  if (!source) emit(isOut ? "out" : "in", message);
  return message;
}

const pairsOf = payload => payload.subscriptions ?? [payload];
// What a message changes. It returns what its row shows otherwise than usual.
const EFFECTS = {
  "system.connected"({ userId, lastId }) {
    Object.assign(link, { userId, isReady: true });
    greetedId = lastId;
    // After the row of this message.
    queueMicrotask(resume);
  },
  "system.subscribed"(payload) {
    for (const { type, contentType } of pairsOf(payload))
      link.wanted.set(patternText({ type, contentType }), { type, contentType });
    // Ids may begin again after a restart. Only then the place moves back.
    if (!payload.recovered) place = greetedId;
    replayLeft = payload.replayed;
    if (!replayLeft) return {};
    const words = `since ${shortId(askedSince)}`;
    return { kind: "in replay", head: `${replayLeft} you missed`, words };
  },
  "system.unsubscribed"(payload) {
    if (payload.removed === link.wanted.size) link.wanted.clear();
    for (const pair of pairsOf(payload)) link.wanted.delete(patternText(pair));
  },
  "system.authenticated"({ userId }) {
    ownToken = sentToken;
    link.userId = userId;
  },
  "system.heartbeat"({ lastId }) {
    if (!replayLeft && isLater(lastId, place)) place = lastId;
  },
  "system.error"({ action, code, message }) {
    if (action !== "authenticate") return {};
    return { words: `${code}: you are still ${link.userId ?? "unknown"}; ${message}` };
  },
};

function receive(text) {
  const { type, payload, id, ref } = JSON.parse(text);
  let more = EFFECTS[type]?.(payload);
  if (id && replayLeft) {
    replayLeft--;
    more = { kind: "in replay", key: null };
    place = id;
  } else if (id && isLater(id, place)) place = id;
  show(false, text, "", more);
  if (type === "system.heartbeat" && ref === undefined) send({ action: "pong" });
  showState();
}

function resume() {
  if (ownToken) send({ action: "authenticate", token: ownToken });
  const subscriptions = [...link.wanted.values()];
  const patterns = subscriptions.length === 1 ? subscriptions[0] : { subscriptions };
  if (subscriptions.length) send({ action: "subscribe", ...patterns, since: place });
  else place = greetedId;
}

// -- The forms --

const tabs = [...document.querySelectorAll("nav [value]")];
for (const tab of tabs)
  tab.onclick = () => {
    for (const each of tabs) {
      setAria(each, "pressed", each === tab);
      $(each.value).hidden = each !== tab;
    }
  };
onSubmit("ask", (pattern, { submitter }) => send({ action: submitter.value, ...pattern }));
onSubmit("write", ({ text }) => send(text));
$("toggle").onclick = () => (link.isWanted ? close() : open());
// It is answered more slowly than it is sent: the server reads no faster than it wants to.
$("fast").onclick = () => {
  for (let ref = link.isReady ? 1 : 300; ref <= 300; ref++) send({ action: "heartbeat", ref });
};
tabs[0].click();
showState();
if (!document.body.classList.contains("demo")) {
  onSubmit("sign-in", ({ token }) => send({ action: "authenticate", token }));
  $("forge").onclick = () => send({ action: "authenticate", token: "not.a.token" });
  open();
}
"""

DEMO_JS = r"""// The demo's page: a lesson, and a small CMS that only events change.
import * as inspector from "./ws/inspector.js";

const { $, make, setAria, onSubmit, link, send, listeners } = inspector;
let storage = {};
try {
  storage = window.sessionStorage;
} catch {
  // It is blocked: a reload asks for the name again.
}
// The server knows this page by this key, and no other page knows it.
const key = (storage.page ??= Math.random().toString(36).slice(2));
let cms, user, token;

async function api(method, path, body, bearer = token) {
  const headers = { "Content-Type": "application/json" };
  if (bearer) headers.Authorization = `Bearer ${bearer}`;
  const response = await fetch(`api/${path}`, { method, headers, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.message), answer, { isRefusal: true });
  return answer;
}
const say = text => $("news").replaceChildren(text);
// The user sees each refusal that no action has handled.
addEventListener("unhandledrejection", event => {
  if (event.reason.isRefusal) event.preventDefault();
  say(event.reason.message);
});
const tokenOf = async name => (await api("GET", `token?user=${encodeURIComponent(name)}`)).token;
const poll = async () => {
  // The server may not be reachable.
  const { people, lastId } = await api("GET", "poll").catch(() => ({ people: "…" }));
  $("people").textContent = `${people} here`;
  return lastId;
};

// -- The name, and the CMS's own connection --

async function signIn() {
  ({ token, name: user } = await api("POST", "name", { key, name: user }, null));
  storage.name = $("sign-in").elements.name.value = user;
  $("rename").textContent = `You: ${user} ✎`;
  return token;
}

function start(name) {
  user = name;
  cms?.close();
  cms = new SwiftCMS({ url: `ws?cms=${key}`, token: signIn });
  cms.subscribe("*", "*", take);
  cms.ongap = load;
  cms.onstatus = state => {
    say(state === "offline" ? "There is no connection. This page will try again." : "");
    if (state === "online" && !rows.size) load();
  };
  cms.onframe = (direction, text) => {
    if (document.body.classList.contains("both")) inspector.show(direction === "out", text, "cms ");
    if (text.includes('"system.heartbeat"')) poll();
  };
}
onSubmit("name", ({ name }) => {
  start(name.trim());
  $("welcome").close();
});
$("welcome").onclose = () => user || $("welcome").showModal();
$("rename").onclick = () => $("welcome").showModal();
$("both").onclick = () => setAria($("both"), "pressed", document.body.classList.toggle("both"));

// -- Events that the inspector's connection did not get --

// Ids that it got, and {event, state, at} for events of which this is not known yet.
const received = new Set();
const undecided = [];

function decide(newest) {
  const isLate = ({ event, at }) =>
    received.has(event.id)
    || (newest && inspector.isLater(newest, event.id))
    || performance.now() - at > 990;
  while (undecided.length && isLate(undecided[0])) {
    const { event, state } = undecided.shift();
    if (received.has(event.id)) continue;
    const { message, words } = inspector.describe(false, JSON.stringify(event));
    const reason = inspector.whyNot(event, state);
    const kind = `ghost${state.isOpen ? "" : " away"}`;
    const note = `Not sent to you: ${reason}. This page got it by the CMS’s own connection.`;
    const runKey = `${event.type} ${event.contentType} ${reason}`;
    const head = `${words.replace(/ by [^”]*$/, "")}:`;
    inspector.addRow({ kind, head, words: reason, message, key: runKey, note });
    watch("ghost", event);
  }
}

function consider(event, to) {
  if (!link.isWanted) return;
  const state = { isOpen: link.isReady, patterns: [...link.wanted.values()], to };
  undecided.push({ event, state, at: performance.now() });
  setTimeout(decide, 1_000);
}

function take(event) {
  const { id, type, contentType, payload } = event;
  news.told++;
  if (id && !news.toldId) Object.assign(news, { toldId: id, toldAt: performance.now() });
  watch("told", event);
  if (id) consider(event);
  if (type === "class.reset") {
    delete storage.name;
    location.replace(location.pathname);
  } else if (type === "notification") say(`${payload.from}: ${payload.text}`);
  else if (type.startsWith("content."))
    put(`${contentType}/${payload.id}`, type === "content.deleted" ? null : payload);
}

listeners.add((name, message) => {
  watch(name, message);
  if (name !== "in" || !message.id) return;
  received.add(message.id);
  if (received.size > 1_000) received.delete(received.values().next().value);
  decide(message.id);
});

// -- The list. No row moves while the pointer or the focus is inside --

const list = $("entries");
const SHOWN = 5;
// "posts/7" -> its row, or null if it was deleted: an older answer may still come.
const rows = new Map();

async function load() {
  list.replaceChildren();
  rows.clear();
  for (const type of ["posts", "pages"])
    for (const entry of await api("GET", type)) put(`${type}/${entry.id}`, entry);
  poll();
}

function put(name, entry) {
  const known = rows.get(name);
  // An answer may be older than an event that has come meanwhile.
  if (known === null || known?.entry.version > entry?.version) return;
  const row = known ?? make("li", {}, make("b"), make("small"), make("button", {}, "Edit"));
  rows.set(name, entry && row);
  row.classList.toggle("gone", !entry);
  if (entry) {
    const [title, state, button] = row.children;
    row.entry = entry;
    title.textContent = entry.title;
    const kind = name.startsWith("pages") ? "page · " : "";
    state.textContent = `${kind}${entry.state} · ${entry.updated_by}`;
    button.onclick = () => edit(name, row);
  }
  if (!known || !entry) arrange();
}

function arrange() {
  const shown = [...rows.values()].filter(Boolean);
  shown.sort((one, other) => other.entry.id - one.entry.id);
  if (!list.matches(":hover, :focus-within")) list.replaceChildren(...shown);
  const waiting = shown.filter(row => !row.isConnected).length;
  $("fresh").hidden = !waiting;
  $("fresh").textContent = `${waiting} new`;
  $("more").hidden = shown.length <= SHOWN;
  $("more").textContent = `${shown.length - SHOWN} more`;
}

list.onpointerleave = arrange;
list.addEventListener("focusout", () => setTimeout(arrange));
$("fresh").onclick = arrange;
$("more").onclick = () => list.classList.add("all");
const create = (type, title, bearer) => api("POST", type, { title }, bearer);
onSubmit("create", ({ title }, { submitter, target }) => {
  create(submitter.value, title);
  target.reset();
});

// -- The editor --

const editor = $("editor");
// {name, version, theirs, presence, typed}
let opened = null;
const written = () => Object.fromEntries(new FormData(editor));

function edit(name, { entry }) {
  leave();
  const presence = cms.edit(...name.split("/"));
  opened = { name, presence, typed: new Map() };
  presence.oneditors = showOthers;
  presence.onchange = (change, { clientId }) => {
    opened.typed.set(clientId, change?.title ?? JSON.stringify(change));
    showOthers();
  };
  showOthers();
  fill(entry);
  $("cms").classList.add("editing");
  editor.elements.title.focus();
}

function fill({ version, title, body }) {
  opened.version = version;
  editor.elements.title.value = title;
  editor.elements.body.value = body;
  $("conflict").hidden = true;
}

function leave() {
  opened?.presence.stop();
  opened = null;
  $("cms").classList.remove("editing");
}

function showOthers() {
  const texts = opened.presence.editors
    .filter(({ clientId }) => clientId !== cms.clientId)
    .map(({ clientId, userId }) => {
      const typed = opened.typed.get(clientId);
      return typed ? `${userId}, who is typing “${typed}”` : userId;
    });
  $("others").textContent = texts.length ? `Also here: ${texts.join("; ")}` : "Only you are here.";
}

async function save() {
  const saved = opened;
  try {
    await api("PUT", saved.name, { ...written(), version: saved.version });
    if (opened === saved) leave();
  } catch (error) {
    if (!error.entry || opened !== saved) throw error;
    saved.theirs = error.entry;
    $("refusal").textContent = `Not saved: ${error.message}: “${error.entry.title}”.`;
    $("conflict").hidden = false;
    watch("refused");
  }
}
onSubmit("editor", save);
editor.oninput = () => opened.presence.send(written());
$("leave").onclick = leave;
$("theirs").onclick = () => fill(opened.theirs);
$("mine").onclick = () => {
  opened.version = opened.theirs.version;
  save();
};
$("publish").onclick = () => api("POST", `${opened.name}/publish`, {}).then(leave);
$("delete").onclick = () => api("DELETE", opened.name).then(leave);

// -- What the lesson's button and the dock do --

const arrives = type =>
  new Promise(resolve => {
    listeners.add(function listener(name, message) {
      if (name !== "in" || message.type !== type) return;
      listeners.delete(listener);
      resolve();
    });
  });

async function connect() {
  if (link.isReady) return;
  if (!link.isWanted) inspector.open();
  await arrives("system.connected");
}
const sendAfterwards = async message => connect().then(() => send(message));

async function subscribe() {
  await sendAfterwards({ action: "subscribe", type: "content.*", contentType: "posts" });
  await arrives("system.subscribed");
}
async function authenticate() {
  const own = await tokenOf($("sign-in").elements.name.value);
  await sendAfterwards({ action: "authenticate", token: own });
}
async function forge() {
  const letter = token.at(-9) === "A" ? "B" : "A";
  const changed = token.slice(0, -9) + letter + token.slice(-8);
  await sendAfterwards({ action: "authenticate", token: changed });
}
async function cut() {
  // If it is lost already, the page waits longer before it reconnects.
  if (link.isReady || !link.isWanted) await api("POST", "cut", { key });
  inspector.stayAway(5_000);
}
async function flood() {
  await connect();
  await api("POST", "flood", { key });
}
function reopen() {
  inspector.close();
  inspector.open();
}
const sendMisspelt = () => sendAfterwards({ action: "subscrbe" });
const sendNonsense = () => sendAfterwards("this is not JSON");
const createOne = () => create("posts", `Hello from ${user}`);
async function createBoth() {
  await create("posts", "A post");
  await create("pages", "A page");
}
async function createMissed() {
  for (const title of ["While you were away", "And another"])
    await create("posts", title, await tokenOf("A neighbour"));
}
async function subscribeAndCut() {
  if (!link.wanted.has("content.* of posts")) await subscribe();
  await cut();
}
const editPost = () =>
  edit(...[...rows].findLast(([name, row]) => row && name.startsWith("posts")));
async function saveFirst() {
  const { entry } = rows.get(opened.name);
  const changed = { ...entry, title: `${entry.title}!` };
  await api("PUT", opened.name, changed, await tokenOf("A neighbour"));
}

// Since the page began to ask: how often it asked, got no news, and was told. `toldId` is the first
// event that it was told of and that no answer has brought yet.
let news = {};
async function startAsking() {
  news = { asked: 0, vain: 0, told: 0, id: await poll() };
  ask(news);
}
async function ask(own) {
  if (own !== news || current !== 0 || done.has(0)) return;
  const id = (await poll()) ?? news.id;
  news.asked++;
  if (id === news.id) news.vain++;
  hint(`Asked ${news.asked} times, ${news.vain} without news; told ${news.told} times.`);
  if (news.toldId && !inspector.isLater(news.toldId, id)) {
    const late = Math.round(performance.now() - news.toldAt);
    const vain = `${news.vain} of ${news.asked} questions without news`;
    $("late").textContent = `Told ${late} ms earlier; ${vain}.`;
    watch("heard");
    news.toldId = null;
  }
  news.id = id;
  setTimeout(() => ask(own), 1_000);
}

// -- The lesson: for each step its actions, and what proves, in this order, that it was done --

// A proof is a pattern of what happened ("in", "out", "lost", "ghost" and so on) and its message.
// A title cannot pretend to be one: its quotes have a backslash before them.
const STEPS = [
  { acts: { "Start asking": startAsking, "Create a post": createOne }, proof: [/^told/, /^heard/] },
  { acts: { "Open the connection": reopen }, proof: [/^in {"type":"system.connected"/] },
  {
    acts: { Subscribe: subscribe, "Create a post and a page": createBoth },
    proof: [/^in {"type":"content.created","contentType":"posts/, /^ghost .*"contentType":"pages/],
  },
  {
    acts: { "Wait, and watch": connect },
    proof: [/^in {"type":"system.heartbeat"(?!.*"ref":)/, /^out {"action":"pong"/],
  },
  {
    acts: { "Send “subscrbe”": sendMisspelt, "Send what is not JSON": sendNonsense },
    proof: [/^in .*"code":"unknown_action"/, /^in .*"code":"invalid_json"/],
  },
  {
    acts: { "Show a token": authenticate, "Show a changed token": forge },
    proof: [/^in {"type":"system.authenticated"/, /^in .*"code":"invalid_token"/],
  },
  {
    acts: { "Lose it for 5 s": subscribeAndCut, "Create two posts": createMissed },
    proof: [/^lost/, /^out .*"since":/, /^in .*"replayed":[1-9]/],
  },
  {
    acts: { "Open a post": editPost, "Let a neighbour save first": saveFirst, "Save yours": save },
    proof: [/^refused/],
  },
  {
    acts: { "Start a slow reader": flood },
    proof: [/^in {"type":"demo.flood"/, /^in {"type":"demo.flood".*"closed":1013/],
  },
];
const articles = [...document.querySelectorAll("#lesson article")];
const go = number => location.assign(`#lesson-${number}`);
const chips = STEPS.map((step, index) =>
  make("button", { title: `Step ${index}`, onclick: () => go(index) }),
);
$("steps").append(...chips);
const done = new Set();
// The step, the index of the expected answer, and how many acts and proofs there were.
let current, expected, acted, proved;
const hint = text => done.has(current) || $("verdict").replaceChildren(text);

function showStep() {
  const number = Number(location.hash.match(/^#lesson-([0-8])$/)?.[1] ?? 0);
  if (number === current) return;
  [current, expected, acted, proved] = [number, null, 0, 0];
  done.delete(current);
  const { options } = articles[current].querySelector("[data-options]").dataset;
  const choose = index => {
    expected = index;
    hint("Now press the button, and watch.");
    showLesson();
  };
  const buttons = options
    .split("|")
    .map((text, index) => make("button", { onclick: () => choose(index) }, text));
  $("expect").replaceChildren(...buttons);
  hint("First: what do you expect?");
  showLesson();
}

function showLesson() {
  const isDone = done.has(current);
  $("lesson").classList.toggle("done", isDone);
  for (const [index, button] of [...$("expect").children].entries())
    setAria(button, "pressed", index === expected);
  for (const [index, chip] of chips.entries()) {
    articles[index].hidden = index !== current;
    chip.textContent = done.has(index) ? "✓" : index;
    chip.className = done.has(index) ? "done" : "";
    setAria(chip, "current", index === current ? "step" : false);
  }
  const labels = Object.keys(STEPS[current].acts);
  $("act").textContent = labels[Math.min(acted, labels.length - 1)];
  $("act").disabled = expected === null;
  $("act").classList.toggle("filled", !isDone);
  $("next").classList.toggle("filled", isDone);
  $("next").textContent = current + 1 < STEPS.length ? "Next →" : "Finish";
}

// Something has happened: does it prove that the current step was done?
function watch(name, message) {
  if (expected === null || done.has(current)) return;
  const { proof } = STEPS[current];
  if (name === "lost") proved = 0;
  if (proof[proved].test(`${name} ${JSON.stringify(message)}`)) proved++;
  if (proved < proof.length) return;
  // Its row explains it.
  if (message) inspector.selectLatest();
  const [right, answers] = [Number(articles[current].dataset.right), $("expect").children];
  const judged = expected === right ? "Right" : `Not “${answers[expected].textContent}”`;
  const verdict = make("b", {}, `✓ ${judged}: ${answers[right].textContent}. `);
  $("verdict").replaceChildren(verdict, articles[current].lastElementChild.textContent);
  done.add(current);
  showLesson();
}

$("act").onclick = async () => {
  const step = current;
  await STEPS[step].acts[$("act").textContent]();
  if (step === current) acted++;
  showLesson();
};
$("next").onclick = () => (current + 1 < STEPS.length ? go(current + 1) : $("dismiss").click());
$("dismiss").onclick = $("reopen").onclick = () => {
  $("reopen").hidden = !document.body.classList.toggle("no-lesson");
};
addEventListener("hashchange", showStep);
onSubmit("sign-in", authenticate);
onSubmit("tell", async ({ to, text }) => {
  const { id } = await api("POST", "notices", { to, text });
  const event = { id, type: "notification", contentType: "users", payload: { from: user, text } };
  // No other page can show it as missed, because only this page knows `to`.
  if (to !== user) consider(event, to);
});
for (const [id, action] of Object.entries({ forge, cut, flood })) $(id).onclick = action;
const reset = () => confirm("Put everything back, on all pages?") && api("POST", "reset", {});
$("reset")?.addEventListener("click", reset);
link.query = `?page=${key}`;
showStep();
if (storage.name) start(storage.name);
else $("welcome").showModal();
"""


if __name__ == "__main__":
    sys.exit(main())
