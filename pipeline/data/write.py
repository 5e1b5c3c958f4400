"""Writes shards: in parallel, byte for byte the same on any number of processes, and safe to interrupt.

What goes into which shard is planned before anything is written. Each shard is written under a temporary name by one
process, then renamed; so a second start writes only the shards that are missing.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.random  # otherwise loaded at first use, which can swallow a Ctrl-C
from PIL import Image

from pipeline.data.decode import MAX_IMAGE_PIXELS, decode, is_image
from pipeline.data.index import read_classes, remove_partials, write_file
from pipeline.data.order import random_order
from pipeline.data.origins import Origin, Rejects, open_origin
from pipeline.data.parallel import check_stop, in_processes
from pipeline.data.tar import IMAGE_SUFFIXES
from pipeline.errors import UserError
from pipeline.files import new_file, partial_path
from pipeline.lease import Lease, acquire
from pipeline.options import option
from pipeline.parsing import parse_json, read_json
from pipeline.text import shown


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    prefix: str = option("train", "the shards are named PREFIX-000000.tar and so on, their keys PREFIX-00000000")
    bytes_per_shard: str = option("500MB", "size of a shard, counted before --resize; shards are cut evenly")
    samples_per_shard: int | None = option(None, "instead: the most samples of a shard; shards are cut evenly")
    shuffle: bool = option(True, "shuffle all samples; otherwise the source's order stays")
    seed: int = option(0, "of the shuffle")
    resize: int | None = option(None, "scale larger images down to this short side, in pixels")
    quality: int = option(90, "of the JPEG that a resized image becomes")
    json: bool = option(False, 'add a member json with {"source": ...}')
    check: bool = option(False, "decode every image (--resize does so anyway)")
    skip_bad: bool = option(False, "leave bad samples out and list them in PREFIX-skipped.jsonl")
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS, "with --check or --resize: an image of more pixels is bad", may_change=True
    )
    path_column: str = option("path", "column of a list with the image files, relative to the list")
    label_column: str = option("label", "column of a list with the class: names, or whole numbers")
    processes: int | None = option(None, "processes that write; by default the number of cores", may_change=True)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.prefix):
            raise UserError(f"--prefix: expected letters, digits, - and _, found {self.prefix!r}")
        for name, most in (
            ("samples_per_shard", None), ("resize", None), ("max_image_pixels", None), ("quality", 100)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 1 <= value <= (most or value):
                raise UserError(f"{flag(name)}: expected {f'1 to {most}' if most else 'at least 1'}, found {value}")
        if self.seed < 0:
            raise UserError(f"--seed: expected 0 or more, found {self.seed}")

    @property
    def shard_nbytes(self) -> int:
        units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?B)", self.bytes_per_shard)
        if not match or not (nbytes := int(float(match[1]) * units[match[2]])):
            raise UserError(f"--bytes-per-shard: expected a size such as 500MB or 2GB, found {self.bytes_per_shard!r}")
        return nbytes


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each option of WriteConfig."""
    size = parser.add_mutually_exclusive_group()
    for field in dataclasses.fields(WriteConfig):
        group = size if field.name.endswith("_per_shard") else parser
        default = "" if field.default in (None, False) else f" (default: {field.default})"
        words: dict[str, Any] = {"default": field.default, "help": field.metadata["help"] + default}
        if field.type is bool:
            action = argparse.BooleanOptionalAction if field.default else "store_true"
            group.add_argument(flag(field.name), action=action, **words)
        else:
            kind = str if field.type is str else int
            group.add_argument(flag(field.name), type=kind, metavar="N" if kind is int else "TEXT", **words)


@dataclass(frozen=True)
class Written:
    shards: list[str]
    skipped: int  # bad samples


def write_shards(places: Sequence[str], folder: str, config: WriteConfig, progress: Any = None) -> Written:
    """Writes the shards and `classes.json` (not the index) to `folder`, or those that an earlier start left to write.

    Raises:
        UserError: a bad source, a folder that holds something else or that another process is writing these shards to,
            no space; the finished shards stay.
    """
    try:
        return _write(places, folder, config, progress)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written: {error.strerror}; finished shards are kept: mend that (free some space),"
            " then start the same command again"
        ) from None


def _write(places: Sequence[str], folder: str, config: WriteConfig, progress: Any) -> Written:
    if re.search(r"[{*]|\.tar$", folder):
        raise UserError(f"{folder}: expected a folder; --prefix names the shards in it")
    rejects = Rejects(config.skip_bad)
    known = read_classes(f"{folder}/{config.prefix}-000000.tar")
    source, classes = open_origin(places, known, (config.path_column, config.label_column), rejects)
    os.makedirs(folder, exist_ok=True)
    refuse_foreign_files(folder, config.prefix)
    with acquire(folder, f"write-{config.prefix}", f"{folder}: shards with --prefix {config.prefix}") as lease:
        claim_folder(folder, config, source.identity())
        if classes is not None and known is None:
            claim_classes(folder, classes)
        return _write_claimed(source, folder, config, rejects, lease, progress)


def _write_claimed(
    source: Origin, folder: str, config: WriteConfig, rejects: Rejects, lease: Lease, progress: Any
) -> Written:
    samples = len(source.sizes)
    order = random_order(samples, config.seed) if config.shuffle else np.arange(samples)
    sizes = np.ones(samples, dtype=np.int64) if config.samples_per_shard else source.sizes[order]
    bounds = cut(sizes, config.samples_per_shard or config.shard_nbytes)
    shards = [f"{folder}/{config.prefix}-{number:06d}.tar" for number in range(len(bounds) - 1)]

    skipped = SkippedFile(f"{folder}/{config.prefix}-skipped.jsonl")
    skipped.add(rejects.rows)
    tasks, finished = [], 0
    for shard, begin, end in zip(shards, bounds[:-1], bounds[1:], strict=True):
        if os.path.exists(shard):
            finished += end - begin
        else:
            tasks.append((shard, begin, source.take(order[begin:end]), config))
    if progress is not None:
        progress.reset(total=samples)
        progress.update(finished)
    try:
        with contextlib.closing(in_processes(write_shard, tasks, config.processes)) as results:
            for shard, part, rows, count in results:
                skipped.add(rows)
                lease.check()
                os.replace(part, shard)
                if progress is not None:
                    progress.update(count)
    finally:
        # Of this start, and of one that was killed.
        remove_partials(folder, rf"{re.escape(config.prefix)}-(\d{{6,}}\.tar|plan\.json|skipped\.jsonl)")
    return Written(shards, len(skipped.lines))


def claim_folder(folder: str, config: WriteConfig, identity: str) -> None:
    """Leaves a plan file in a folder that is free, or finds the same plan there.

    Raises:
        UserError: another plan, naming what differs.
    """
    path = f"{folder}/{config.prefix}-plan.json"
    plan = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not f.metadata["may_change"]}
    plan["source"] = identity
    if os.path.exists(path):
        try:
            there = read_json(path)
            differing = [f"{flag(k)}: there {there[k]}, now {v}" for k, v in plan.items() if there[k] != v]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a readable plan; write to an empty folder") from None
        if differing:
            text = "; ".join(differing).replace("--source: there", "the source's files changed: digest there")
            raise UserError(
                f"{folder}: holds shards written otherwise: {text}; give the same arguments, or write to another folder"
                " or with another --prefix"
            )
        return
    write_file(path, json.dumps(plan, indent=1).encode())


def claim_classes(folder: str, classes: list[str]) -> None:
    """Writes `classes.json`, unless another process that writes to the folder has done so meanwhile.

    Raises:
        UserError: it has, with other classes.
    """
    path = f"{folder}/classes.json"
    with acquire(folder, "classes", path, wait_seconds=60.0):
        known = read_classes(f"{folder}/any.tar")
        if known is None:
            write_file(path, json.dumps(classes).encode())
        elif known != classes:
            raise UserError(
                f"{path}: another process has written other classes meanwhile; start the same command again"
            )


def refuse_foreign_files(folder: str, prefix: str) -> None:
    """Raises UserError where files of somebody else are in a folder without a plan of ours."""
    names = os.listdir(folder)
    if f"{prefix}-plan.json" in names:
        return
    plans = tuple(name.removesuffix("plan.json") for name in names if name.endswith("-plan.json"))
    prefixes = "|".join(map(re.escape, plans)) or "$"
    ours = re.compile(
        rf"classes\.json.*|index\..*|({prefixes}).*|\.(index|classes|write-.*)\.(lease|time).*"
        rf"|\.(classes\.json|index\.(json|bin)|.*-plan\.json|({prefixes}).*)\.[0-9a-f]+\.part"
    )
    others = sorted(name for name in names if not ours.fullmatch(name))
    if others:
        raise UserError(f"{folder}: not empty: {others[0]} is there; write to an empty folder")


def cut(sizes: np.ndarray, limit: int) -> list[int]:
    """Where shards begin, and the end of the last: as few as `limit` allows, of even size. (N,) -> bounds."""
    total = int(sizes.sum())
    shards = -(-total // limit)
    bounds = np.searchsorted(np.cumsum(sizes), [total * k // shards for k in range(1, shards)], side="right")
    return sorted({0, *bounds.tolist(), len(sizes)})


class SkippedFile:
    """A sorted list of bad samples, one JSON object a line. Adding a line twice is adding it once."""

    def __init__(self, path: str):
        self.path = path
        self.lines: set[str] = set()
        if os.path.exists(path):
            with open(path) as file:
                self.lines.update(file.read().splitlines())

    def add(self, rows: list[dict[str, str]]) -> None:
        if rows:
            self.lines.update(json.dumps(row) for row in rows)
            write_file(self.path, "".join(f"{line}\n" for line in sorted(self.lines)).encode())


def write_shard(shard: str, first: int, source: Origin, config: WriteConfig) -> tuple[str, str, list, int]:
    """Writes all samples of `source` under a temporary name: (shard, that name, rejected samples, samples done)."""
    from webdataset import TarWriter

    rejects = Rejects(config.skip_bad)
    count = len(source.sizes)
    part = partial_path(shard)
    with open(part, "wb", opener=new_file) as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for number in range(count):
                check_stop()
                try:
                    sample = prepare(source, number, config)
                except UserError as error:
                    place = shown(source.place(number))
                    rejects.add(place, str(error).removeprefix(f"{place}: "))
                    continue
                writer.write({"__key__": f"{config.prefix}-{first + number:08d}", **sample})
        file.flush()
        os.fsync(file.fileno())
    if len(rejects.rows) == count:
        raise UserError(f"{shard}: all of its {count} samples are bad, such as: {rejects.rows[0]['reason']}")
    return shard, part, rejects.rows, count


def prepare(source: Origin, number: int, config: WriteConfig) -> dict[str, bytes]:
    """The members of one sample as they are written."""
    name, sample = source.read(number)
    suffix = next((s for s in IMAGE_SUFFIXES if s in sample), None)
    if suffix is None or not is_image(sample[suffix]):  # else a list could pack any file of the user's
        raise UserError(f"{source.place(number)}: can't be decoded: no image (JPEG, PNG or WebP); mend or remove it")
    if config.check or config.resize:
        image = decode(sample[suffix], source.place(number), config.max_image_pixels)  # (H, W, 3)
        if config.resize and min(image.shape[:2]) > config.resize:
            del sample[suffix]
            sample["jpg"] = resized_jpeg(image, config.resize, config.quality)
    if config.json:
        try:
            sample["json"] = json.dumps({"source": name, **parse_json(sample.get("json", b"{}"))}).encode()
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{source.place(number)}: its member json is no JSON object") from None
    return sample


def resized_jpeg(image: np.ndarray, short_side: int, quality: int) -> bytes:
    """(H, W, 3) uint8 -> a JPEG file, bicubic and antialiased."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    file = io.BytesIO()
    Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()
