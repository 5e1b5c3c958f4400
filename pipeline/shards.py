"""Shards: `python -m pipeline.shards digits|index|verify|audit`."""

import argparse
import glob
import os
import sys

from pipeline.data.decode import decode
from pipeline.data.digits import write_digits
from pipeline.data.index import expand_urls, load_index, load_records, write_index
from pipeline.data.source import ReadConfig, Source
from pipeline.data.tar import IMAGE_SUFFIXES, parse_tar, sample_digest
from pipeline.errors import UserError


def listed(patterns: list[str]) -> list[str]:
    """Braces are expanded everywhere, `*` in local paths."""
    urls = [url for pattern in expand_urls(patterns) for url in (sorted(glob.glob(pattern)) or [pattern])]
    return list(dict.fromkeys(urls))


def index(parsed: argparse.Namespace) -> int:
    from tqdm import tqdm

    urls = listed(parsed.urls)
    limits = ReadConfig(allow_pipe=parsed.allow_pipe)
    with tqdm(total=len(urls), unit="shard") as progress:
        samples = write_index(urls, progress, min(parsed.processes, len(urls)), parsed.to, limits)
    print(f"indexed {samples:,} samples in {len(urls)} shards")
    return 0


def run_audit(parsed: argparse.Namespace) -> int:
    """Returns 1 where a promise does not hold."""
    from pipeline.audit import audit
    from pipeline.config import load_config

    config = load_config(parsed.config, parsed.overrides)
    findings = audit(config, parsed.world_size, parsed.workers, parsed.from_step, parsed.steps, parsed.run)
    for finding in findings:
        print(f"{'ok  ' if finding.fine else 'FAIL'}  {finding.name:34} {finding.text}")
    return 0 if all(finding.fine for finding in findings) else 1


def verify(parsed: argparse.Namespace) -> int:
    """Reads and decodes everything. Returns 1 where anything is bad."""
    from tqdm import tqdm

    bad = 0
    for shard in tqdm(load_index(listed(parsed.urls), check_sizes=False).shards, unit="shard"):
        try:
            samples = list(parse_tar(Source().read(shard.url, 0, shard.nbytes), shard.url))
            records = load_records(shard)
            if len(samples) != len(records):
                raise UserError(f"{shard.url}: {len(samples)} samples, the index says {len(records)}")
            for sample, record in zip(samples, records, strict=True):
                where = f"{shard.url}: sample {sample['__key__']}"
                if sample_digest(sample) != int(record["digest"]):
                    raise UserError(f"{where} is not the indexed one")
                decode(next(sample[s] for s in IMAGE_SUFFIXES if s in sample), where)
        except Exception as error:
            bad += 1
            print(error, file=sys.stderr)
    print("all shards are whole" if not bad else f"{bad} bad shards")
    return 1 if bad else 0


def write(parsed: argparse.Namespace) -> int:
    write_digits(parsed.folder)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.shards", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("digits", help="write the embedded data set")
    command.add_argument("folder", help="where to write it")
    command.set_defaults(command=write)

    command = commands.add_parser("index", help="write the index of existing shards", description=write_index.__doc__)
    command.add_argument("urls", nargs="+", help="shards: paths, URLs, brace or * patterns")
    command.add_argument("--to", metavar="FOLDER", help="where the index goes (beside the shards); then data.index")
    command.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="shards read at a time (cores)")
    command.add_argument("--allow-pipe", action="store_true", help="run the commands of pipe: URLs")
    command.set_defaults(command=index)

    command = commands.add_parser("verify", help="read and decode all shards", description=verify.__doc__)
    command.add_argument("urls", nargs="+", help="shards: paths, URLs, brace or * patterns")
    command.set_defaults(command=verify)

    command = commands.add_parser(
        "audit", help="check the order of a config's stream", description="Plays the plan of all ranks and workers"
        " and checks that each sample comes once an epoch, that the batches are those of one rank, and how well they"
        " are mixed. Exit code 1 where it does not hold.",
    )  # fmt: skip
    command.add_argument("--config", required=True, help="YAML file")
    command.add_argument("--world-size", type=int, nargs="+", default=[1], metavar="W", help="numbers of ranks (1)")
    command.add_argument(
        "--workers", type=int, nargs="+", default=[2], metavar="K", help="numbers of workers of a rank (2)"
    )
    command.add_argument("--from-step", type=int, default=0, help="first step, as after a resume (0)")
    command.add_argument("--steps", type=int, help="how many steps (to the end of the second epoch)")
    command.add_argument("--run", metavar="DIR", help="compare with what this run has logged (data.log_samples=true)")
    command.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="override options")
    command.set_defaults(command=run_audit)
    return parser


def main() -> int:
    parsed = parser().parse_args()
    try:
        return parsed.command(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
