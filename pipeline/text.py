"""Text from elsewhere (names, servers' messages, URLs), made safe for a terminal, a log, a spreadsheet or a browser."""

import os
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

MASK = "***"

# Control characters, line separators, lone surrogates, and characters that reverse the direction of the text.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CONTROL_BUT_LAYOUT = re.compile(CONTROL.pattern.replace("\x00-\x1f", "\x00-\x08\x0b\x0c\x0e-\x1f"))

# Parameters of a query that say which file is meant. The values of all others are masked: they may be secrets.
SHOWN = frozenset(
    ("alt", "dl", "download", "export", "f", "file", "fileid", "filename", "files", "format", "generation", "id",
     "item", "name", "object", "objectid", "part", "path", "raw", "revision", "shard", "split", "version", "versionid")
)  # fmt: skip
# Also a password with a `/`, `?` or `#`, which it should not have as it is.
_USERINFO = re.compile(
    r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30})://([^\s/?#]*|[^\s/?#:@\[]{1,100}:(?!/|[0-9]{1,5}(?:[/?#]|$))[^\s@]{1,200})@"
)
_QUERY = re.compile(r"""([?&;#])([^\s?&;#='"<>]{1,100})=([^\s&;#"<>]*?)(?=[:,.)\]']{0,3}(?:[\s&;#"<>]|\\"|$))""")
# The secrets below may stand in JSON, whose quotes (also escaped ones) are not theirs.
_WORD = r"""(?:\\[^"]|[^\s'"\\])"""
_HEADER = re.compile(
    r"""(?i)\b((?:proxy-)?authorization|cookie|x-[\w-]{0,40}(?:token|key|auth|secret|signature)[\w-]{0,40})(\s{0,9}:\s{0,9})(?:\\[^"\n]|[^'"\n\\])+"""
)
_FLAG = re.compile(
    r"""(?<![^\s'"])(--(?:user|proxy-user|http-user|password|http-password|token|oauth2-bearer|[\w-]{0,40}secret[\w-]{0,40}"""
    r"""|[\w-]{0,40}access-key[\w-]{0,40}|[\w-]{0,40}api-key|sas-token|account-key)[ =]\s*)('[^']*'|"[^"]*"|"""
    rf"""{_WORD}+)|(?<![^\s'"])(-u ?)('[^']*:[^']*'|"[^"]*:[^"]*"|[^\s'":]+:{_WORD}+)"""
)
_VARIABLE = re.compile(
    r"""\b(\w{0,60}(?:SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|ACCOUNT_KEY)\w{0,60}=)('[^']*'|"[^"]*"|(?:\\[^"]|[^\s;'"\\])+)"""
)
_TOKEN = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_\w{16,}|\bgh[pousr]_\w{16,}|(?<=\b[Bb]earer )[^\s'\"]+")


def mask_secrets(text: str) -> str:
    """Replaces user names, passwords, tokens and signatures in URLs and shell commands by `***`.

    Of a query only the values of `SHOWN` stay. Masked text stays as it is.
    """
    if any(mark in text for mark in "=:_@ "):
        text = _USERINFO.sub(_mask_userinfo, text)
        text = _QUERY.sub(lambda m: m[0] if m[2].lower() in SHOWN else f"{m[1]}{m[2]}={MASK}", text)
        text = _HEADER.sub(rf"\1\2{MASK}", text)
        text = _FLAG.sub(lambda m: (m[1] or m[3]) + MASK, text)
        text = _VARIABLE.sub(rf"\1{MASK}", text)
        text = _TOKEN.sub(MASK, text)
    return text


def _mask_userinfo(match: re.Match) -> str:
    scheme, user = match[1], match[2]
    if scheme.lower() in ("abfs", "abfss", "wasb", "wasbs") and ":" not in user:
        return match[0]  # Azure writes the container's name there
    return f"{scheme}://{MASK}@"


def has_login(url: str) -> bool:
    """Whether a URL begins with a user name or a password."""
    return _USERINFO.match(url) is not None


def printable(text: str) -> str:
    """Escapes what a terminal would act on: control characters, newlines, overrides of the text's direction."""
    return text if text.isprintable() else CONTROL.sub(_escaped, text)


def _escaped(match: re.Match) -> str:
    return repr(match[0])[1:-1]


def shown(text: str) -> str:
    """One line for a message or a log, without secrets."""
    return printable(mask_secrets(text))


@lru_cache(maxsize=1024)
def shown_url(url: str) -> str:
    """`shown`, for a shard that is named again and again."""
    return shown(url)


def masked_tree(tree: Any) -> Any:
    """Plain values with all secrets masked."""
    if isinstance(tree, str):
        return mask_secrets(tree)
    if isinstance(tree, (list, tuple)):
        return [masked_tree(item) for item in tree]
    if isinstance(tree, dict):
        return {key: masked_tree(value) for key, value in tree.items()}
    return tree


def masked_words(words: Iterable[str]) -> list[str]:
    return [mask_secrets(word) for word in words]


def base_name(url: str) -> str:
    """A file's name in its folder. Of a URL's query only what says which file is meant belongs to it.

    A URL that is signed anew names the same file.
    """
    if url.startswith("pipe:"):
        return mask_secrets(url)
    if not url.startswith(("http://", "https://")):
        return os.path.basename(url)
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name.lower() in SHOWN]
    return os.path.basename(parts.path) + ("?" + urlencode(kept) if kept else "")


def folder_of(url: str) -> str:
    """The folder of a file. A query stays, without what says which file is meant: it may be what opens the folder."""
    if not url.startswith(("http://", "https://")):
        return os.path.dirname(url) or "."
    parts = urlsplit(url)
    kept = "&".join(text for text in parts.query.split("&") if text.partition("=")[0].lower() not in SHOWN)
    return urlunsplit((parts.scheme, parts.netloc, os.path.dirname(parts.path), kept, ""))


def inside(folder: str, name: str) -> str:
    """The URL or path of a file in a folder, as `folder_of` gives it."""
    if not folder.startswith(("http://", "https://")):
        return f"{folder}/{name}"
    parts = urlsplit(folder)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))


def csv_cell(text: str) -> str:
    """Text that no spreadsheet evaluates as a formula. Numbers stay numbers."""
    text = printable(text)
    if text.lstrip(" ").startswith(("=", "+", "-", "@")):
        try:
            float(text)
        except ValueError:
            return "'" + text
    return text


def code_block(text: str) -> str:
    """Markdown that shows the text as it is: nothing in it is a link, an image or a tag."""
    return "\n".join("    " + printable(line) for line in text.splitlines())


class Screen:
    """A text stream whose output holds no secrets, and no control characters but newlines, tabs and returns."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        text = mask_secrets(text)
        self.stream.write(text if text.isprintable() else CONTROL_BUT_LAYOUT.sub(_escaped, text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def screen_output() -> None:
    """From now on all output of this process is screened, tracebacks too."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
