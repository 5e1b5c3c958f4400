"""Shards: `python -m pipeline.shards digits|index|verify`."""

import argparse
import glob
import sys

from pipeline.data.decode import decode
from pipeline.data.digits import write_digits
from pipeline.data.index import expand_urls, load_index, load_records, write_index
from pipeline.data.source import Source
from pipeline.data.tar import IMAGE_SUFFIXES, parse_tar, sample_digest
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


def verify(urls: list[str]) -> int:
    """Reads and decodes everything. Returns 1 where anything is bad."""
    from tqdm import tqdm

    bad = 0
    for shard in tqdm(load_index(urls, check_sizes=False).shards, unit="shard"):
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="write the embedded data set")
    digits.add_argument("folder", help="where to write it")
    for name, text in (("index", "write the index of existing shards"), ("verify", "read and decode all shards")):
        command = commands.add_parser(name, help=text)
        command.add_argument("urls", nargs="+", help="shards: paths, URLs, brace or * patterns")
    parsed = parser.parse_args()
    try:
        if parsed.command == "digits":
            write_digits(parsed.folder)
            return 0
        return {"index": index, "verify": verify}[parsed.command](listed(parsed.urls))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
