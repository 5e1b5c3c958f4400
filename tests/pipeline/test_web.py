"""HTTP servers that are hostile, for real: each answers on a socket of its own, byte for byte."""

import contextlib
import socket
import threading
import time

import psutil
import pytest

from pipeline.data import web
from pipeline.data.source import ReadConfig, Source
from pipeline.errors import UserError

LIMITS = ReadConfig(timeout_seconds=0.3, deadline_seconds=0.8)
OK = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/4\r\n\r\ndata"


class Server:
    """`answer(request, connection)` is called for each connection; `requests` keeps what has come."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/x.tar"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._talk, args=[self.socket.accept()[0]], daemon=True).start()

    def _talk(self, connection):
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                data = connection.recv(4096)
                if not data:
                    return
                request += data
            self.requests.append(request.decode())
            answer = self.answer
            if isinstance(answer, bytes):
                connection.sendall(answer)
            else:
                answer(request, connection)


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


def drip(head, each=b"x", pause=0.02):
    def answer(request, connection):
        connection.sendall(head)
        for _ in range(300):  # 6 seconds
            connection.sendall(each)
            time.sleep(pause)

    return answer


def redirect(location, body=b""):
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


ENDLESS = {
    "status line": drip(b"HTTP/1.1 200 "),
    "header": drip(b"HTTP/1.1 206 OK\r\nX-Name: "),
    "headers": drip(b"HTTP/1.1 206 OK\r\n", b"X: y\r\n", 0.1),
    "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk size": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "body": drip(b"HTTP/1.1 206 OK\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/1000\r\n\r\n"),
    "error": drip(b"HTTP/1.1 503 Later\r\nContent-Length: 100000\r\n\r\n"),
    "redirect": drip(b"HTTP/1.1 302 Found\r\nLocation: /y.tar\r\nContent-Length: 100000\r\n\r\n"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_given_up(serve, what):
    server = serve(ENDLESS[what])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"x\.tar: (no success|more than 5 redirects)"):
        Source(LIMITS).read(server.url, 0, 1000)
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("cut", [len(OK) // 4, OK.index(b"bytes 0-3") + 8, OK.index(b"\r\n\r\n") + 2])
def test_headers_that_are_cut_are_asked_for_again(serve, cut):
    """http.client takes them for whole: a length that is missing, or cut, would look impossible."""

    def answer(request, connection):
        connection.sendall(OK[:cut] if len(server.requests) == 1 else OK)

    server = serve(answer)
    with contextlib.closing(Source(ReadConfig(timeout_seconds=5.0, deadline_seconds=20.0))) as source:
        assert source.read(server.url, 0, 4) == b"data"
    assert len(server.requests) == 2


def test_a_server_that_ignores_ranges_and_sends_without_end_is_given_up(serve):
    server = serve(drip(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1000)))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"x\.tar: no success at byte 1000000000"):
        Source(LIMITS).read(server.url, 1_000_000_000, 10)
    assert time.monotonic() - began < 2.5


def test_a_tls_handshake_that_never_ends_is_given_up(serve):
    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"\x16\x03\x03\x3f\xff")  # a record of 16 kB, of which one byte comes at a time
            for _ in range(300):
                connection.sendall(b"\x02")
                time.sleep(0.02)

    server = serve(b"")
    server._talk = answer
    began = time.monotonic()
    with pytest.raises(UserError, match="no success"):
        Source(LIMITS).read(server.url.replace("http", "https"), 0, 10)
    assert time.monotonic() - began < 2.5


PART = "HTTP/1.1 206 OK\r\nContent-Length: {}\r\nContent-Range: {}\r\n\r\n"
IMPOSSIBLE = {
    "other start": PART.format(10, "bytes 5-14/100"),
    "beyond the file": PART.format(10, "bytes 0-9/5"),
    "backwards": PART.format(10, "bytes 0--9/100"),
    "contradiction": PART.format(10, "bytes 0-4/100"),
    "more than asked": PART.format(20, "bytes 0-19/100"),
    "words": PART.format(10, "all of it"),
    "negative": PART.format(-10, "bytes 0-9/100"),
    "huge": PART.format("9" * 5000, "bytes 0-9/100"),
    "no range": "HTTP/1.1 206 OK\r\nContent-Length: 10\r\n\r\n",
    "many parts": "HTTP/1.1 206 OK\r\nContent-Type: multipart/byteranges; boundary=x\r\n\r\n",
    "no content": "HTTP/1.1 204 No Content\r\n\r\n",
    "compressed": "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 10\r\n\r\n",
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_lengths_are_errors_at_once(serve, what):
    server = serve(IMPOSSIBLE[what].encode() + b"0123456789")
    with pytest.raises(UserError, match=r"impossible|contradict|the server says 204|compresses"):
        Source(LIMITS).read(server.url, 0, 10)
    assert len(server.requests) == 1


@pytest.mark.parametrize("length", ["-5", "1_000", "9" * 30, "+7", "ten", "5, 6"])
def test_an_impossible_size_is_an_error(serve, length):
    server = serve(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode())
    with pytest.raises(UserError, match=r"x\.tar: "):
        Source(LIMITS).size(server.url)
    assert len(server.requests) == 1


def test_where_head_is_forbidden_the_size_comes_from_a_range(serve):
    def answer(request, connection):
        forbidden = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        part = b"HTTP/1.1 206 OK\r\nContent-Length: 1\r\nContent-Range: bytes 0-0/1234\r\n\r\nx"
        connection.sendall(forbidden if request.startswith(b"HEAD") else part)

    assert Source(LIMITS).size(serve(answer).url) == 1234


def test_a_redirect_to_another_server_is_refused_unless_the_user_allows_it(serve):
    inside = serve(OK)
    server = serve(redirect(f"http://127.0.0.1:{inside.port}/secret"))
    with pytest.raises(UserError, match=f"another one, http://127.0.0.1:{inside.port}.*data.read.redirect_hosts"):
        Source(LIMITS).read(server.url, 0, 4)
    assert not inside.requests
    for host in (f"127.0.0.1:{inside.port}", "127.0.0.1", "127.*"):
        limits = ReadConfig(timeout_seconds=1, deadline_seconds=1, redirect_hosts=(host,))
        assert Source(limits).read(server.url, 0, 4) == b"data"


def test_a_redirect_on_its_own_server_is_followed_and_not_drained(serve):
    def answer(request, connection):
        if b" /y.tar" in request:
            connection.sendall(OK)
        else:
            drip(b"HTTP/1.1 307 Moved\r\nLocation: /y.tar\r\nContent-Length: 100000\r\n\r\n")(request, connection)

    began = time.monotonic()
    assert Source(LIMITS).read(serve(answer).url, 0, 4) == b"data"
    assert time.monotonic() - began < 0.3


def test_no_redirect_leads_into_the_local_network(serve, monkeypatch):
    """The user's server has a public address, as far as we know; it redirects to a name that leads here."""
    inside = serve(OK)
    server = serve(redirect(f"http://rebound.example:{inside.port}/latest/meta-data"))
    real = socket.getaddrinfo
    names = {"public.example": server.port, "rebound.example": inside.port}

    def lookup(host, port, *words, **options):
        return real("127.0.0.1" if host in names else host, port, *words, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    known = web.address_kind
    first = iter(["public"])
    monkeypatch.setattr(web, "address_kind", lambda text: next(first, None) or known(text))
    limits = ReadConfig(timeout_seconds=0.3, deadline_seconds=0.8, redirect_hosts=("*.example",))
    web._connections.cache_clear()
    with pytest.raises(UserError, match=r"redirects to rebound.example, a loopback address \(127.0.0.1\)"):
        Source(limits).read(f"http://public.example:{server.port}/x.tar", 0, 4)
    assert not inside.requests


def test_the_kinds_of_addresses():
    kinds = {
        "8.8.8.8": "public", "2606:4700::1111": "public", "127.1.2.3": "loopback", "::1": "loopback",
        "0.0.0.0": "loopback", "::": "loopback", "::ffff:127.0.0.1": "loopback", "169.254.169.254": "link-local",
        "fe80::1": "link-local", "::ffff:169.254.169.254": "link-local", "64:ff9b::a9fe:a9fe": "link-local",
        "2002:7f00:1::": "loopback", "10.1.2.3": "private", "192.168.1.1": "private", "100.64.0.1": "private",
        "fd00::1": "private", "224.0.0.1": "private", "240.0.0.1": "private",
    }  # fmt: skip
    assert {text: web.address_kind(text) for text in kinds} == kinds


@pytest.mark.parametrize(
    ("origin", "location", "fine"),
    [
        ("https://a.org/x", "http://a.org/x", False),
        ("http://a.org/x", "https://a.org/x", True),
        ("http://a.org/x", "http://a.org:6379/x", False),
        ("http://a.org/x", "//b.org/x", False),
        ("http://a.org/x", "file:///etc/passwd", False),
        ("http://a.org/x", "http://a.org@b.org/x", False),
        ("http://a.org/x", "http://[::1", False),
        ("http://a.org/x", "http://a.org:99999/", False),
        ("https://huggingface.co/x", "https://cas-bridge.xethub.hf.co/x?sig=1", True),
        ("https://huggingface.co/x", "https://hf.co.evil.org/x", False),
        ("https://github.com/x", "https://release-assets.githubusercontent.com/x", True),
        ("https://b.s3.amazonaws.com/x", "https://b.s3.eu-west-1.amazonaws.com/x", True),
    ],
)
def test_where_redirects_may_lead(origin, location, fine):
    with contextlib.nullcontext() if fine else pytest.raises(web.Refused, match="redirects to"):
        web._redirected(origin, location, origin, ())


def test_the_password_of_a_url_goes_to_its_own_server_only(serve):
    other = serve(OK)
    server = serve(redirect(f"http://127.0.0.1:{other.port}/"))
    url = server.url.replace("http://", "http://user:pass%20word@")
    limits = ReadConfig(timeout_seconds=1, deadline_seconds=1, redirect_hosts=("127.0.0.1",))
    assert Source(limits).read(url, 0, 4) == b"data"
    assert "Basic dXNlcjpwYXNzIHdvcmQ=" in server.requests[0]
    assert "uthorization" not in other.requests[0]


def test_a_compressed_answer_is_not_unpacked(serve):
    """Or a megabyte would become gigabytes."""
    server = serve(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match="compresses"):
        Source(LIMITS).read(server.url, 0, 4)


def test_connections_are_used_again_and_no_file_stays_open(serve):
    def answer(request, connection):
        while request:
            connection.sendall(OK)
            request = connection.recv(4096)

    server, source = serve(answer), Source(ReadConfig(timeout_seconds=1, deadline_seconds=1))
    for _ in range(20):
        assert source.read(server.url, 0, 4) == b"data"
    # Of this server's only: sockets of tests before may close at any time.
    ends = [found.raddr.port for found in psutil.Process().net_connections() if found.raddr]
    assert ends.count(server.port) == 1
    assert len(server.requests) == 1  # the others came over the same connection


def test_an_address_that_does_not_answer_leaves_time_for_the_next_one(serve, monkeypatch):
    server = serve(OK)
    with socket.socket() as silent, contextlib.ExitStack() as waiting:
        silent.bind(("127.0.0.2", server.port))
        silent.listen(0)
        for _ in range(3):  # its queue is full: Linux drops what else knocks
            knock = waiting.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(silent.getsockname())
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo",
            lambda host, *words, **more: [*real("127.0.0.2", *words, **more), *real("127.0.0.1", *words, **more)]
            if host == "two.example" else real(host, *words, **more),
        )  # fmt: skip
        assert Source(LIMITS).read(server.url.replace("127.0.0.1", "two.example"), 0, 4) == b"data"
