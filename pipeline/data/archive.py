"""The members of a tar archive, read strictly: whatever is neither a member nor the end of the archive is an error.

tarfile takes a damaged header for the end of the archive, and so loses all samples behind it without a word.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline.errors import UserError

BLOCK = 512
END_NBYTES = 2 * BLOCK  # an archive ends with two blocks of zeros
MAX_EXTENSION_BYTES = 1 << 20  # a pax header or a GNU long name
MAX_NAME_LENGTH = 4096  # Linux opens no longer path
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n\0]+)=")
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
GNU_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
FILE, FOLDER = "file", "folder"
KINDS = {
    tarfile.REGTYPE: FILE,
    tarfile.AREGTYPE: FILE,
    tarfile.CONTTYPE: FILE,
    tarfile.DIRTYPE: FOLDER,
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "named pipe",
}


@dataclass(slots=True)
class Member:
    name: str
    kind: str  # one of KINDS
    begin: int  # the first byte of its headers
    data: int  # the first byte of its content
    nbytes: int  # of its content
    end: int  # where the next member's headers begin


class Archive:
    """Iterates over the members of a tar: ustar, pax or GNU; `read` gives the content of the last one.

    Valid archives end with two blocks of zeros, and zeros follow to the end of the file. With `allow_missing_end`,
    a file may also end behind a member or in these two blocks; `missing_end` then says that it did. `origin` is where
    the file begins in that of `url`, for messages.

    Raises:
        UserError: anything else. Names the byte.
    """

    def __init__(self, file: Any, url: str, allow_missing_end: bool = False, origin: int = 0):
        self.file, self.url, self.allow_missing_end, self.origin = file, url, allow_missing_end, origin
        self.missing_end = False
        self.end = 0  # the first byte behind the last member, once that was read
        self.nbytes: int | None = None  # unknown in a stream
        self.at = 0  # the file's position
        if file.seekable():
            self.at = file.tell()
            self.nbytes = file.seek(0, 2)
            file.seek(self.at)

    def __iter__(self) -> Iterator[Member]:
        position = self.at
        while (member := self._member(position)) is not None:
            yield member
            position = member.end

    def read(self, member: Member) -> bytes:
        """The content of the member that the iteration has just given."""
        data = self._take(member.data, member.nbytes)
        if len(data) < member.nbytes:
            self._truncated(member)
        return data

    def _member(self, begin: int) -> Member | None:
        """The member whose headers start at `begin`; None at the end of the archive."""
        position, pax, long_names = begin, None, {}
        while True:
            header = self._take(position, BLOCK)
            if not header.strip(b"\0"):
                if position > begin:
                    self._fail(position, "no member follows the extended header before it")
                self._check_end(position, header)
                return None
            if len(header) < BLOCK:
                self._cut(position + len(header), f"inside the header at byte {self.origin + position}")
            info = self._parse(position, header)
            start = position + BLOCK
            if info.type in (*PAX, tarfile.XGLTYPE, *GNU_NAMES):
                body = self._extension(info, start)
                if info.type in GNU_NAMES:
                    name = body.rstrip(b"\0")  # with the zero behind it, which some writers don't count
                    if not name or b"\0" in name or info.type in long_names:
                        self._fail(start, "a damaged long name")
                    long_names[info.type] = name.decode("utf-8", "surrogateescape")
                elif info.type == tarfile.XGLTYPE:
                    self._check_global(start, self._pax_records(body[: info.size], start))
                elif pax is not None:
                    self._fail(position, "a second pax header for one member")
                else:
                    pax = self._pax_records(body[: info.size], start)
                position = start + -(-info.size // BLOCK) * BLOCK
                continue
            return self._finish(info, begin, start, pax or {}, long_names.get(tarfile.GNUTYPE_LONGNAME))

    def _finish(
        self, info: tarfile.TarInfo, begin: int, start: int, pax: dict[str, bytes], long_name: str | None
    ) -> Member:
        if info.type == tarfile.GNUTYPE_SPARSE or any(keyword.startswith("GNU.sparse") for keyword in pax):
            self._fail(begin, f"{info.name} is a sparse file, which is not supported", "write it without --sparse")
        name, nbytes = long_name or info.name, info.size
        if "path" in pax:
            name = pax["path"].decode("utf-8", "surrogateescape").rstrip("/")
            if not name or "\0" in name:
                self._fail(begin, "a pax header with a damaged path")
        if len(name) > MAX_NAME_LENGTH:
            self._fail(begin, f"a name of {len(name)} characters, more than {MAX_NAME_LENGTH}")
        if "size" in pax:
            if not re.fullmatch(rb"\d{1,18}", pax["size"]):
                self._fail(begin, "a pax header with a damaged size")
            nbytes = int(pax["size"])
        kind = KINDS.get(info.type)
        if kind is None:
            self._fail(
                begin,
                f"{name} is a member of type {info.type.decode('latin-1')!r}, which is not supported",
                "write the shard anew with regular files only (no multi-volume archive, no volume label)",
            )
        if kind != FILE:
            nbytes = 0  # links, folders and devices have no content
        member = Member(name, kind, begin, start, nbytes, start + -(-nbytes // BLOCK) * BLOCK)
        if self.nbytes is not None and member.end > self.nbytes:
            self._truncated(member)
        self.last = member
        return member

    def _parse(self, position: int, header: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if self.origin + position == 0:
                packed = header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
                found = "a compressed file" if packed else f"{header[:16]!r}"
                raise UserError(
                    f"{self.url}: no readable tar: found {found} at byte 0, expected a tar header;"
                    f" {'decompress' if packed else 'write'} the shard anew"
                ) from None
            self._fail(position, f"no tar header ({error}: found {header[:16]!r})")
        if info.size < 0:
            self._fail(position, f"a header with a size of {info.size} bytes")
        return info

    def _extension(self, info: tarfile.TarInfo, start: int) -> bytes:
        if info.size > MAX_EXTENSION_BYTES:
            self._fail(start - BLOCK, f"an extended header of {info.size} bytes, more than {MAX_EXTENSION_BYTES}")
        nbytes = -(-info.size // BLOCK) * BLOCK
        body = self._take(start, nbytes)
        if len(body) < nbytes:
            self._cut(start + len(body), f"inside the extended header at byte {self.origin + start - BLOCK}")
        return body

    def _pax_records(self, body: bytes, start: int) -> dict[str, bytes]:
        records, begin = {}, 0
        while begin < len(body):
            match = PAX_RECORD.match(body, begin)
            end = begin + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(body) or body[end - 1 : end] != b"\n":
                self._fail(start + begin, "a damaged pax record")
            records[match[2].decode("utf-8", "surrogateescape")] = body[match.end() : end - 1]
            begin = end
        return records

    def _check_global(self, start: int, records: dict[str, bytes]) -> None:
        for keyword in records:
            if keyword in ("path", "size") or keyword.startswith("GNU.sparse"):
                self._fail(start, f"a global pax header that sets {keyword}, which is not supported")

    def _check_end(self, position: int, first: bytes) -> None:
        """Checks that zeros follow from `position`, the first byte behind the last member, to the end of the file."""
        if self.at < position:  # a stream that ended inside the last member
            self._truncated(self.last)
        self.end = position
        reached, chunk = position, first
        while chunk:
            data = chunk.lstrip(b"\0")
            if data:
                other = reached + len(chunk) - len(data)
                self._fail(
                    other,
                    f"other data behind the end of the archive at byte {self.origin + position}: a part of it was"
                    " overwritten with zeros, or another archive was appended",
                    "restore the shard, or write each archive as a shard of its own",
                )
            reached += len(chunk)
            chunk = self._take(reached, 1 << 20)
        if reached - position >= END_NBYTES:
            return
        if not self.allow_missing_end:
            found = f"only {reached - position} bytes of zeros" if reached > position else "the end of the file"
            raise UserError(
                f"{self.url}: no end mark at byte {self.origin + position}: found {found}, expected two blocks of"
                " zeros; if the shard was cut, copy it anew; if all samples are there, accept it with"
                " --allow-missing-end (in training data.read.allow_missing_end=true)"
            )
        self.missing_end = True

    def _take(self, start: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `start`; fewer where the file ends."""
        if self.at != start:
            if self.nbytes is not None:
                self.at = self.file.seek(start)
            while self.at < start and (skipped := self.file.read(min(start - self.at, 1 << 20))):
                self.at += len(skipped)
        data = self.file.read(nbytes) if self.at == start else b""
        self.at += len(data)
        return data

    def _truncated(self, member: Member) -> NoReturn:
        self._cut(
            self.at if self.nbytes is None else self.nbytes,
            f"the member {member.name} ends at {self.origin + member.end}",
        )

    def _cut(self, position: int, found: str) -> NoReturn:
        raise UserError(
            f"{self.url}: truncated at byte {self.origin + position}: {found}; copy or write the shard anew"
        )

    def _fail(self, position: int, found: str, fix: str = "restore the shard or write it anew") -> NoReturn:
        raise UserError(f"{self.url}: damaged at byte {self.origin + position}: {found}; {fix}")
