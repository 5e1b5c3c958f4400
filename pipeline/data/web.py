"""Sizes and byte ranges of files on HTTP servers that may be broken or hostile.

A socket's own time limit starts anew with each byte; here each phase has a limit on its whole time. Redirects stay on
the server or go where the user allows, and never from elsewhere into the local network.
"""

import contextlib
import fnmatch
import http.client
import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

CHUNK = 1 << 16
MAX_REDIRECTS = 5
MAX_NBYTES = 1 << 60  # larger than any file
# Where the servers of well-known stores redirect to.
KNOWN_REDIRECTS = {
    "huggingface.co": ("*.huggingface.co", "*.hf.co"),
    "hf.co": ("huggingface.co", "*.huggingface.co", "*.hf.co"),
    "github.com": ("*.githubusercontent.com",),
    "*.amazonaws.com": ("*.amazonaws.com",),  # a bucket in another region
}


class Refused(Exception):
    """A failure that no repetition mends: not found, forbidden, cut short."""


def http_size(url: str, timeout_seconds: float, redirect_hosts: tuple[str, ...] = ()) -> int:
    """The file's size in bytes. Requests one byte if the server refuses HEAD, as for URLs signed for GET only."""
    response = _request("HEAD", url, timeout_seconds, {}, redirect_hosts)
    response.release_conn()  # there is no body
    response.close()  # or the connection would wait for it to be read
    if response.status in (401, 403, 405, 501):
        response = _request("GET", url, timeout_seconds, {"Range": "bytes=0-0"}, redirect_hosts)
        response.close()
    _check_status(url, response, 200, 206)
    nbytes = _content_range(response, 0)[1] if response.status == 206 else _content_length(response)
    if nbytes is None:
        raise Refused("the server does not tell the file's size (no Content-Length)")
    return nbytes


def http_chunks(
    url: str, start: int, stop: int, timeout_seconds: float, end: float, redirect_hosts: tuple[str, ...] = ()
) -> Iterator[bytes]:
    """Bytes `start` to `stop`, as they come, until the time `end` (of the monotonic clock).

    A server that ignores ranges is read from its beginning, and skipped.
    """
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    response = _request("GET", url, timeout_seconds, headers, redirect_hosts)
    try:
        _check_status(url, response, 200, 206)
        length, skip = _content_length(response), start
        if response.status == 206:
            last, skip = _content_range(response, start)[0], 0
            if last >= stop or (length is not None and length != last + 1 - start):
                raise Refused(
                    f"the server's lengths contradict each other: Content-Range {_header(response, 'Content-Range')},"
                    f" Content-Length {length}, asked for bytes {start}-{stop - 1}"
                )
        left = stop - start
        with _ended_within(end - time.monotonic(), lambda: response.held):
            while left:
                chunk = response.read1(CHUNK)
                if not chunk:
                    break
                skipped = min(skip, len(chunk))
                skip -= skipped
                chunk = chunk[skipped : skipped + left]
                left -= len(chunk)
                if chunk:
                    yield chunk
        if not left and response.status == 206 and length is not None:
            response.release_conn()  # read to its end: the connection can be used again
    finally:
        response.close()


def _request(
    method: str, url: str, timeout_seconds: float, headers: dict[str, str], redirect_hosts: tuple[str, ...]
) -> Any:
    """The first answer that is no redirect. Bodies of redirects are never read."""
    from urllib3 import Timeout
    from urllib3.exceptions import InvalidHeader

    end = time.monotonic() + timeout_seconds
    target = url
    allowed: frozenset[str] | None = None  # the kinds of addresses; the user's own URL may lead anywhere
    for _ in range(MAX_REDIRECTS + 1):
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {timeout_seconds:g} s")
        sent = {"Accept-Encoding": "identity", **headers, **_login(target, url)}
        try:
            response = _connections(os.getpid(), allowed).request(
                method, _without_userinfo(target), headers=sent, preload_content=False, decode_content=False,
                redirect=False, retries=False, timeout=Timeout(connect=left, read=timeout_seconds),
            )  # fmt: skip
        except InvalidHeader as error:  # several lengths
            raise Refused(str(error)[:200]) from None
        location = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or location is None:
            encoding = response.headers.get("Content-Encoding", "identity")
            if response.status < 300 and encoding.lower() != "identity":
                response.close()
                raise Refused(f"the server compresses what it sends (Content-Encoding: {encoding[:100]})")
            return response
        if method == "HEAD" or response.headers.get("Content-Length") == "0":
            response.release_conn()
        response.close()  # and not drained: its body may never end
        if allowed is None:
            allowed = frozenset({"public", response.place})
        target, named = _redirected(target, location, url, redirect_hosts)
        if named:
            allowed |= {"private"}
    raise Refused(f"more than {MAX_REDIRECTS} redirects")


def _check_status(url: str, response: Any, *expected: int) -> None:
    if response.status in expected:
        return
    response.close()
    if response.status == 404:
        raise FileNotFoundError(url)
    message = f"the server says {response.status} {(response.reason or '')[:100]}"
    if response.status < 500 and response.status not in (408, 425, 429):
        raise Refused(message)
    raise OSError(message)


# Lengths.


def _header(response: Any, name: str) -> str | None:
    text = response.headers.get(name)
    return None if text is None else text.strip()[:100]


def _content_length(response: Any) -> int | None:
    text = _header(response, "Content-Length")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > MAX_NBYTES:
        raise Refused(f"impossible Content-Length: {text}")
    return int(text)


def _content_range(response: Any, start: int) -> tuple[int, int | None]:
    """The last byte of a part that begins at `start`, and the bytes of the whole file, where the server knows them."""
    text = _header(response, "Content-Range")
    match = re.fullmatch(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", text or "")
    if match:
        first, last, total = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
        if first == start and first <= last < (MAX_NBYTES if total is None else min(total, MAX_NBYTES)):
            return last, total
    raise Refused(f"impossible Content-Range: {text}; asked for bytes from {start} on")


# Redirects.


def _without_userinfo(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _login(target: str, url: str) -> dict[str, str]:
    """User name and password of the user's own URL, for the server that it names and no other."""
    from urllib3.util import make_headers

    parts = urlsplit(url)
    if parts.username is None or _origin(target) != _origin(url):
        return {}
    return dict(make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}"))


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)


def _redirected(origin: str, location: str, url: str, redirect_hosts: tuple[str, ...]) -> tuple[str, bool]:
    """Returns the target of a redirect, and whether the user listed its host in `redirect_hosts`.

    Raises:
        Refused: it leaves the server of `url`, and nobody has allowed that.
    """
    try:
        target = urljoin(origin, location)
        (scheme, host, port), (old_scheme, old_host, old_port) = _origin(target), _origin(origin)
    except ValueError:
        raise Refused(f"the server redirects to an impossible address: {location[:200]}") from None
    place = f"{scheme}://{host}:{port}"
    if scheme not in ("http", "https") or not host:
        raise Refused(f"the server redirects to {place}, which is no HTTP server")
    if (old_scheme, scheme) == ("https", "http"):
        raise Refused(f"the server redirects to {place}, without encryption")
    known = [
        pattern
        for name, patterns in KNOWN_REDIRECTS.items()
        if fnmatch.fnmatch(_origin(url)[1], name)
        for pattern in patterns
    ]
    upgraded = (old_port, port) == (80, 443)
    same = host == old_host and (port == old_port or upgraded)
    named = any(
        fnmatch.fnmatch(text, pattern.lower()) for pattern in redirect_hosts for text in (host, f"{host}:{port}")
    )
    usual = port in (80, 443) and any(fnmatch.fnmatch(host, pattern) for pattern in known)
    if not (same or named or usual):
        raise Refused(
            f"the server redirects to another one, {place}; if you trust that one, too, allow it:"
            f" data.read.redirect_hosts={host}"
        )
    return target, named


def address_kind(text: str) -> str:
    """Which network an IP address belongs to: "public", "private", "link-local" or "loopback"."""
    address: Any = ipaddress.ip_address(text)
    if address.version == 6:
        embedded = address.ipv4_mapped or address.sixtofour
        if embedded is None and address in ipaddress.ip_network("64:ff9b::/96"):
            embedded = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
        address = embedded or address
    if address.is_loopback or address.is_unspecified:  # the system connects the unspecified one to itself
        return "loopback"
    if address.is_link_local:  # where clouds hand out the machine's keys
        return "link-local"
    return "public" if address.is_global and not address.is_multicast else "private"


# Connections.


@contextlib.contextmanager
def _ended_within(seconds: float, find_socket: Callable[[], Any]) -> Iterator[None]:
    """Shuts the socket down after this time, even during a blocking read.

    Raises:
        TimeoutError: the time has passed.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError, TypeError):
            socket.socket.shutdown(find_socket(), socket.SHUT_RDWR)  # also of a TLS socket: its own method would wait

    timer = threading.Timer(max(seconds, 0.0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"no end within {seconds:.3g} s")


class _Lines:
    """The stream from which http.client reads headers. Remembers the last line."""

    def __init__(self, file: Any):
        self.file, self.last = file, b""

    def readline(self, limit: int = -1) -> bytes:
        self.last = self.file.readline(limit)
        return self.last

    def close(self) -> None:
        self.file.close()


class _Response(http.client.HTTPResponse):
    """Rejects headers that a broken connection cut off; http.client accepts them as complete."""

    fp: Any

    def begin(self) -> None:
        file = self.fp
        self.fp = lines = _Lines(file)
        try:
            super().begin()
        finally:
            if self.fp is lines:
                self.fp = file
        if not lines.last:
            raise ConnectionResetError("the connection ended within the headers")


@lru_cache(maxsize=16)
def _connections(process: int, allowed: frozenset[str] | None) -> Any:
    """A pool of connections for each process: a forked child must not share its parent's.

    `allowed` are the kinds of addresses that it connects to; None: all.
    """
    import urllib3
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Guarded(HTTPConnection):
        """Limits the total time of each phase, and checks the address before it connects."""

        response_class = _Response
        handle: socket.socket | None = None  # the socket stays within reach while TLS wraps it
        place = "public"

        def _new_conn(self) -> socket.socket:
            seconds = self._seconds()
            end = time.monotonic() + seconds
            failure: Exception = OSError(f"{self._dns_host}: no address")
            found = socket.getaddrinfo(self._dns_host, self.port or 0, type=socket.SOCK_STREAM)
            for number, (*_, address) in enumerate(found):
                host = str(address[0])
                self.place = address_kind(host)
                if allowed is not None and self.place not in allowed:
                    failure = Refused(
                        f"the server redirects to {self._dns_host}, a {self.place} address ({host}), where only the"
                        " user's own URLs may lead"
                    )
                    continue
                left = (end - time.monotonic()) / (len(found) - number)  # one that is silent leaves time for others
                if left <= 0:
                    raise TimeoutError(f"{self.host}: no connection within {seconds:.3g} s")
                try:
                    made = urllib3.util.connection.create_connection(
                        (host, self.port or 0), left, self.source_address, self.socket_options
                    )
                    self.handle = made.dup()
                    return made
                except OSError as error:
                    failure = error
            raise failure

        def connect(self) -> None:
            try:
                with _ended_within(self._seconds(), lambda: self.handle):
                    super().connect()
            finally:
                if self.handle is not None:
                    self.handle.close()
                    self.handle = None

        def getresponse(self) -> Any:
            held = self.sock
            response: Any = None
            try:
                with _ended_within(self._seconds(), lambda: held):
                    response = super().getresponse()
            except TimeoutError:
                if response is not None:  # a header that was cut looks like a whole one
                    response.close()
                raise
            response.held, response.place = held, self.place
            return response

        def _seconds(self) -> float:
            return float(self.timeout) if isinstance(self.timeout, (int, float)) else 30.0

    class GuardedTLS(Guarded, HTTPSConnection):
        pass

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Guarded

    class TLSPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = GuardedTLS

    manager = urllib3.PoolManager(num_pools=32, maxsize=16)
    manager.pool_classes_by_scheme = {"http": Pool, "https": TLSPool}
    return manager
