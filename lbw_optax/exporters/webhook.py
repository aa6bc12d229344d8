"""Alerts to a URL. Training never waits for it, and goes on whatever becomes of it."""

import atexit
import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

from lbw_optax.alerts import Alert

_LOG = logging.getLogger("lbw_optax")
LEVELS = ("info", "warning", "error")
# Alerts that wait for the receiver at most; what comes then is left out.
MOST = 100
# Tries of one alert, the seconds after the first, and how many times longer each further pause is.
TRIES, PAUSE, LONGER = 4, 1.0, 4.0
# Seconds that the receiver may take to answer.
PATIENCE = 10.0
# Answers that may be better a while later.
_BUSY = (408, 425, 429)


class Webhook:
    """Posts each alert to a URL as JSON, from a thread of its own: a function for ``on_event``.

    The body is ``{"text", "level", "step", "event"}``: the sentence, which Slack and Mattermost
    show, and the line of the audit log. A receiver that is down, slow or busy is asked four times,
    with pauses of 1, 4 and 16 seconds; one that refuses is not asked again. The first
    alert that could not be delivered is a warning of the logger ``"lbw_optax"``, which names the
    host and not the URL, for that may hold a secret. At most 100 alerts wait; what comes when they
    do is left out. At the end of the program what waits is sent, within five seconds.

    Args:
      url: http or https.
      least: the lowest level that is sent: "info", "warning" or "error".
      body: makes what is sent out of an `Alert`: a dict, for another receiver.

    Raises:
      ValueError: for another URL or level.

    Example:
      >>> hook = Webhook("https://chat.example/hook", body=lambda a: {"content": a.sentence})
      >>> hook.close()
      True
    """

    def __init__(
        self,
        url: str,
        *,
        least: str = "warning",
        body: Callable[[Alert], dict[str, Any]] | None = None,
    ):
        url = url.strip()
        host = _host_of(url)
        if least not in LEVELS:
            raise ValueError(f"least must be one of {LEVELS}, got {least!r}.")
        self._url, self._least, self._body = url, LEVELS.index(least), body or _body
        self._host, self._pid = host, os.getpid()
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[Alert] = deque()
        self._is_closed = self._has_warned = False
        self._thread: threading.Thread | None = None
        self.delivered = 0
        """Alerts that the receiver has taken."""
        self.lost = 0
        """Alerts that it has not, and will not."""

    def __call__(self, alert: Alert) -> None:
        """Hand an alert to the thread. Does not wait."""
        if LEVELS.index(alert.level) < self._least:
            return
        with self._changed:
            if self._is_closed or len(self._waiting) >= MOST:
                self.lost += 1
                return
            self._waiting.append(alert)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="lbw_optax webhook", daemon=True
                )
                self._thread.start()
                atexit.register(self.close)

    def close(self, seconds: float = 5.0) -> bool:
        """Send what waits, without pauses between the tries; whether all alerts were delivered.

        Args:
          seconds: after so many, what still waits is given up.
        """
        if os.getpid() != self._pid:  # a fork, as a data worker is: the thread is not here
            return False
        with self._changed:
            was_closed, self._is_closed = self._is_closed, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
        atexit.unregister(self.close)
        with self._changed:
            self.lost += len(self._waiting)
            self._waiting.clear()
            is_busy = self._thread is not None and self._thread.is_alive()
            lost = self.lost + is_busy
        if lost and not was_closed:
            _LOG.warning("%d alerts were not delivered to %s.", lost, self._host)
        return lost == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- on the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while (alert := self._next()) is not None:
            problem = self._deliver(alert)
            with self._changed:
                self.delivered += not problem
                self.lost += bool(problem)
            if problem and not self._has_warned:
                self._has_warned = True
                _LOG.warning(
                    "An alert could not be delivered to %s (%s). Training goes on; should it "
                    "happen again, nothing is said before the end.",
                    self._host,
                    problem,
                )

    def _next(self) -> Alert | None:
        """The oldest that waits; None when there is none and there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return self._waiting.popleft() if self._waiting else None

    def _deliver(self, alert: Alert) -> str:
        """Try, and try again; what was wrong at last, or ""."""
        try:
            data = json.dumps(self._body(alert)).encode()
        except Exception as error:  # of the user's function
            return f"body failed, {type(error).__name__}: {error}"
        problem, may_pass = self._post(data)
        pause = PAUSE
        for _ in range(TRIES - 1):
            if not may_pass:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, timeout=pause)
            problem, may_pass = self._post(data)
            pause *= LONGER
        return problem

    def _post(self, data: bytes) -> tuple[str, bool]:
        """What is wrong, or "", and whether it may be better the next time."""
        request = urllib.request.Request(
            self._url, data, {"Content-Type": "application/json", "User-Agent": "lbw_optax"}
        )
        try:
            with _OPENER.open(request, timeout=PATIENCE):
                return "", False
        except urllib.error.HTTPError as error:
            error.close()
            return f"it answers {error.code}", error.code >= 500 or error.code in _BUSY
        except Exception as error:  # whatever the network brings
            reason = getattr(error, "reason", None) or error
            return f"{type(error).__name__}: {reason}", True


def _host_of(url: str) -> str:
    """Of a URL that can be posted to: what is wrong with another one, later errors would quote."""
    split = urlsplit(url)
    if split.scheme not in ("http", "https") or not split.hostname:
        raise ValueError("url must begin with http:// or https:// and a host.")
    if split.username is not None:
        raise ValueError("url must have no user or password in it.")
    if any(not "!" <= x <= "~" for x in url):
        raise ValueError("url must be of ASCII, without spaces: write others as %20 and the like.")
    try:
        _ = split.port
    except ValueError:
        raise ValueError("url must have a port between 0 and 65535, or none.") from None
    return split.hostname


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A post that is redirected would arrive as a request to read, and count as delivered."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _body(alert: Alert) -> dict[str, Any]:
    return {
        "text": alert.sentence,
        "level": alert.level,
        "step": alert.step,
        "event": alert.line,
    }
