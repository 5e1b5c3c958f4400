"""Shards: `python -m pipeline.shards digits|write|index|verify|audit`."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable

from pipeline.data.decode import MAX_IMAGE_PIXELS
from pipeline.data.digits import write_digits
from pipeline.data.index import expand_urls, write_index
from pipeline.data.source import ReadConfig
from pipeline.data.verify import summary, verify_shards
from pipeline.data.write import WriteConfig, add_options, write_shards
from pipeline.errors import UserError
from pipeline.text import screen_output

ALLOW_MISSING_END = "accept tars that end without two blocks of zeros, but not inside a member"


def listed(patterns: list[str]) -> list[str]:
    """Braces are expanded everywhere, `*` in local paths that don't exist as they are."""
    urls: list[str] = []
    for pattern in expand_urls(patterns):
        urls += [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern)) or [pattern]
    return list(dict.fromkeys(urls))


def digits(parsed: argparse.Namespace) -> int:
    """Writes the embedded data set."""
    write_digits(parsed.folder)
    return 0


def write(parsed: argparse.Namespace) -> int:
    """Writes shards and their index from an image folder, a list of files, or other shards."""
    from tqdm import tqdm

    options = {name: value for name, value in vars(parsed).items() if name in WriteConfig.__dataclass_fields__}
    config = WriteConfig(**options)
    with tqdm(unit=" samples") as progress:
        written = write_shards(listed(parsed.source), parsed.destination, config, progress)
    urls = sorted(glob.glob(f"{glob.escape(parsed.destination)}/*.tar"))
    index_shards(urls, config.processes or os.cpu_count() or 1)
    if written.skipped:
        print(f"left out {written.skipped} bad samples, listed in {parsed.destination}/{config.prefix}-skipped.jsonl")
    print(f"wrote {parsed.destination}/{config.prefix}-{{000000..{len(written.shards) - 1:06d}}}.tar")
    return 0


def index(parsed: argparse.Namespace) -> int:
    """Writes the index of existing shards, local or remote, from their headers and classes."""
    limits = ReadConfig(allow_pipe=parsed.allow_pipe, allow_missing_end=parsed.allow_missing_end)
    index_shards(listed(parsed.urls), parsed.processes, parsed.to, limits)
    return 0


def index_shards(urls: list[str], processes: int, to: str | None = None, limits: ReadConfig | None = None) -> None:
    from tqdm import tqdm

    with tqdm(total=len(urls), unit="shard") as progress:
        indexed = write_index(urls, progress, min(processes, len(urls)), to, limits)
    print(f"indexed {indexed.samples:,} samples in {len(urls)} shards")
    if indexed.missing_ends:
        print(f"{indexed.missing_ends} of the shards have no end mark")


def verify(parsed: argparse.Namespace) -> int:
    """Reads and decodes everything, and compares it with the index. Exit code 1 where anything is bad."""
    from tqdm import tqdm

    file = parsed.json
    if file is not None and not os.path.isdir(os.path.dirname(file) or "."):
        raise UserError(f"--json {file}: there is no such folder")
    with tqdm(unit=" samples") as progress:
        report = verify_shards(
            listed(parsed.urls), parsed.processes, progress, parsed.index, parsed.allow_missing_end,
            parsed.max_image_pixels,
        )  # fmt: skip
    if file is not None:
        with open(file, "w") as out:
            json.dump(report, out, indent=1)
    print(summary(report))
    return 1 if report["bad"] or report["duplicate_keys"] else 0


def audit(parsed: argparse.Namespace) -> int:
    """Plays the plan of all ranks and workers, and checks that each sample comes once an epoch, that the batches are
    those of one rank, and how well they are mixed. Exit code 1 where a check fails; a note is no check."""
    from pipeline.audit import audit
    from pipeline.config import load_config

    config = load_config(parsed.config, parsed.overrides)
    findings = audit(config, parsed.world_size, parsed.workers, parsed.from_step, parsed.steps, parsed.run)
    for finding in findings:
        print(f"{finding.word:4}  {finding.name:34} {finding.text}")
    return 0 if all(finding.fine for finding in findings) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.shards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__, help=summary, description=run.__doc__)
        command.set_defaults(command=run)
        return command

    command = add(digits, "write the embedded data set")
    command.add_argument("folder", help="where to write it")

    command = add(write, "write shards from images, a list or other shards")
    command.add_argument("source", nargs="+", help="a folder CLASS/IMAGE, a .csv or .parquet list, or .tar shards")
    command.add_argument("destination", help="the folder for the shards")
    add_options(command)

    command = add(index, "write the index of existing shards")
    command.add_argument("urls", nargs="+", help="shards: paths, URLs, brace or * patterns")
    command.add_argument("--to", metavar="FOLDER", help="where the index goes (beside the shards); then data.index")
    command.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="shards read at a time (cores)")
    command.add_argument("--allow-pipe", action="store_true", help="run the commands of pipe: URLs")
    command.add_argument("--allow-missing-end", action="store_true", help=ALLOW_MISSING_END)

    command = add(verify, "read and decode all shards")
    command.add_argument("urls", nargs="+", help="shards: paths, URLs, brace or * patterns")
    command.add_argument("--processes", type=int, metavar="N", help="that read; by default the number of cores")
    command.add_argument("--json", metavar="FILE", help="write the whole report there")
    command.add_argument("--index", metavar="FOLDER", help="where the index lies (beside the shards)")
    command.add_argument("--allow-missing-end", action="store_true", help=ALLOW_MISSING_END)

    command.add_argument("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, metavar="N",
                         help="an image of more pixels is bad (%(default)s)")  # fmt: skip

    command = add(audit, "check the order of a config's stream")
    command.add_argument("--config", required=True, help="YAML file")
    command.add_argument("--world-size", type=int, nargs="+", default=[1], metavar="W", help="numbers of ranks (1)")
    command.add_argument("--workers", type=int, nargs="+", default=[2], metavar="K", help="workers of a rank (2)")
    command.add_argument("--from-step", type=int, default=0, help="first step, as after a resume (0)")
    command.add_argument("--steps", type=int, help="how many steps (to the end of the second epoch; of a run: all)")
    command.add_argument("--run", metavar="DIR", help="compare with what this run has logged (data.log_samples=true)")
    command.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="override options")
    return parser


def main() -> int:
    parsed = build_parser().parse_args()
    try:
        return parsed.command(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: out of memory; start again with fewer --processes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = ": finished shards are kept; start the same command again to go on" if parsed.command is write else ""
        print(f"interrupted{how}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
