"""Shards: `python -m pipeline.shards digits|write|index|verify`."""

import argparse
import glob
import json
import os
import sys

from pipeline.data.digits import write_digits
from pipeline.data.index import expand_urls, write_index
from pipeline.data.verify import summary, verify_shards
from pipeline.data.write import WriteConfig, add_options, write_shards
from pipeline.errors import UserError


def listed(patterns: list[str]) -> list[str]:
    """Braces are expanded everywhere, `*` in local paths."""
    urls = [url for pattern in expand_urls(patterns) for url in (sorted(glob.glob(pattern)) or [pattern])]
    return list(dict.fromkeys(urls))


def index(urls: list[str]) -> int:
    from tqdm import tqdm

    with tqdm(total=len(urls), unit="shard") as progress:
        samples = write_index(urls, progress)
    print(f"indexed {samples:,} samples in {len(urls)} shards")
    return 0


def write(places: list[str], folder: str, config: WriteConfig) -> int:
    from tqdm import tqdm

    with tqdm(unit=" samples") as progress:
        written = write_shards(places, folder, config, progress)
    index(sorted(glob.glob(f"{glob.escape(folder)}/*.tar")))
    if written.skipped:
        print(f"left out {written.skipped} bad samples, listed in {folder}/{config.prefix}-skipped.jsonl")
    print(f"wrote {folder}/{config.prefix}-{{000000..{len(written.shards) - 1:06d}}}.tar")
    return 0


def verify(urls: list[str], processes: int | None, file: str | None) -> int:
    """Reads and decodes everything. Returns 1 where anything is bad."""
    from tqdm import tqdm

    if file is not None and not os.path.isdir(os.path.dirname(file) or "."):
        raise UserError(f"--json {file}: there is no such folder")
    with tqdm(unit=" samples") as progress:
        report = verify_shards(urls, processes, progress)
    if file is not None:
        with open(file, "w") as out:
            json.dump(report, out, indent=1)
    print(summary(report))
    return 1 if report["bad"] or report["duplicate_keys"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="write the embedded data set")
    digits.add_argument("folder", help="where to write it")
    for name, text in (("index", "write the index of existing shards"), ("verify", "read and decode all shards")):
        command = commands.add_parser(name, help=text)
        command.add_argument("urls", nargs="+", help="shards: paths, URLs, brace or * patterns")
        if name == "verify":
            command.add_argument("--processes", type=int, metavar="N", help="that read; by default the number of cores")
            command.add_argument("--json", metavar="FILE", help="write the whole report there")
    command = commands.add_parser("write", help="write shards and their index from images, a list or other shards")
    command.add_argument("source", nargs="+", help="a folder CLASS/IMAGE, a .csv or .parquet list, or .tar shards")
    command.add_argument("destination", help="the folder for the shards")
    add_options(command)
    parsed = parser.parse_args()
    try:
        if parsed.command == "digits":
            write_digits(parsed.folder)
            return 0
        if parsed.command == "write":
            options = {name: value for name, value in vars(parsed).items() if name in WriteConfig.__dataclass_fields__}
            return write(listed(parsed.source), parsed.destination, WriteConfig(**options))
        if parsed.command == "verify":
            return verify(listed(parsed.urls), parsed.processes, parsed.json)
        return index(listed(parsed.urls))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = ": finished shards are kept; start the same command again to go on" if parsed.command == "write" else ""
        print(f"interrupted{how}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
