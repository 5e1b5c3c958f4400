"""What can be known of a job's nodes before it trains: what each rank looks at, and what follows from all of it.

A rank's looks travel as plain values to rank 0, which compares them; a finding that is not fine names the rank, its
node, what was seen and the fix.
"""

import contextlib
import dataclasses
import hashlib
import os
import platform
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.audit import Finding
from pipeline.build import check_labels, find_train_index, prepare_data
from pipeline.checkpoint import NAME
from pipeline.config import RunConfig
from pipeline.data.index import expand_urls, load_index
from pipeline.data.loader import SLOTS, train_stream
from pipeline.data.source import Source, is_pipe
from pipeline.engine import plan_batch
from pipeline.errors import UserError
from pipeline.files import new_file
from pipeline.lease import holder_of
from pipeline.report import GIB, activation_bytes, checkpoint_bytes, state_bytes
from pipeline.run_dir import LEASE, create_folder, git_revision, package_versions
from pipeline.runtime import Ranks, local_device
from pipeline.text import shown_url
from vit.model import ViT, count_parameters

MIB = 1 << 20
SHARDS_READ = 4  # of each split on each node; the nodes choose others as far as there are others
BYTES_READ = 4 * MIB  # of each of them
NETWORK = (
    "check that the nodes reach each other on all ports, and set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the"
    " interface that they share"
)
CLOCK_TOLERANCE = 1.0  # seconds
VISIBLE_WITHIN = 3.0  # seconds: network file systems show new files late


# What a rank looks at.


def look_at_process(ranks: Ranks) -> dict[str, Any]:
    """Who and where this rank is, and what it would run."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks.local_world_size
    name, uuid = "CPU", None
    try:
        device = local_device(ranks)
        if device.type == "cuda":
            memory, properties = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_properties(device)
            name, uuid = properties.name, str(properties.uuid)
    except UserError:
        name = f"none of {torch.cuda.device_count()} GPUs"
    versions = {"python": platform.python_version(), **package_versions(), "vit-pretrain": source_revision()}
    return {
        "rank": ranks.rank, "host": socket.gethostname(), "local_rank": ranks.local_rank, "device": name, "uuid": uuid,
        "memory": memory, "versions": versions,
    }  # fmt: skip


def source_revision() -> str:
    """A digest of this project's source files (two dirty trees of one revision differ), and git's revision."""
    root, digest = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), hashlib.blake2b(digest_size=4)
    for package in ("pipeline", "vit"):
        for folder, folders, files in os.walk(os.path.join(root, package)):
            folders.sort()
            for name in sorted(name for name in files if name.endswith(".py")):
                with open(os.path.join(folder, name), "rb") as file:
                    digest.update(f"{os.path.relpath(folder, root)}/{name}\n".encode() + file.read())
    git = git_revision()
    return f"source {digest.hexdigest()}" + (f" (git {git['revision'][:8]})" if git else "")


def prepare(config: RunConfig, ranks: Ranks) -> None:
    """Writes the embedded data set, where it is wanted; `look_at_shards` tells what went wrong."""
    with contextlib.suppress(UserError):
        prepare_data(config, ranks)


def look_at_shards(config: RunConfig, ranks: Ranks, deadline: float) -> dict[str, Any]:
    """Reads the beginnings of a few shards of each split; rank 0 compares all shards with their index before.

    Returns bytes and seconds of reading, and what was wrong.
    """
    limits = dataclasses.replace(
        config.data.read, timeout_seconds=min(deadline, config.data.read.timeout_seconds), deadline_seconds=deadline
    )
    seen: dict[str, Any] = {"wrong": [], "bytes": 0, "seconds": 0.0, "shards": 0}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, read=limits))
    named = [
        (url, split)
        for split, urls in (("train", config.data.train), ("val", config.data.val))
        if urls
        for url in some(expand_urls(urls), ranks.rank // ranks.local_world_size)
    ]
    with told(seen["wrong"]):
        for url, _ in named:
            if is_pipe(url):
                Source(limits).command(url)  # refused here; a check runs no commands
        if ranks.is_main:
            prepare_data(config, ranks)
            find_train_index(config, ranks, Source(config.data.read))
            if config.data.val:
                index = load_index(config.data.val, folder=config.data.index, source=Source(limits))
                check_labels(index, config.model.num_classes, config.data.max_bad_fraction)
    chosen = [(url, split) for url, split in named if not is_pipe(url)]
    began = time.monotonic()
    with ThreadPoolExecutor(2 * SHARDS_READ) as threads:
        for url, nbytes, wrong in threads.map(lambda one: read_some(one[0], one[1], config), chosen):
            seen["bytes"] += nbytes
            seen["shards"] += 1
            if wrong and not any(message.startswith(f"{shown_url(url)}: ") for message in seen["wrong"]):
                seen["wrong"].append(wrong)
    seen["seconds"] = time.monotonic() - began
    return seen


def some(urls: list[str], node: int) -> list[str]:
    """A few shards, spread evenly, and others on each node."""
    count = min(SHARDS_READ, len(urls))
    return [urls[(node + number * len(urls) // count) % len(urls)] for number in range(count)]


def read_some(url: str, split: str, config: RunConfig) -> tuple[str, int, str | None]:
    """Returns the shard, the bytes that came, and what was wrong."""
    source = Source(config.data.read)
    try:
        if split == "val" or not config.data.resampled:
            size = load_index([url], folder=config.data.index, source=source).shard(0).nbytes
        else:
            size = source.size(url)
        return url, len(source.read(url, 0, min(size, BYTES_READ))), None
    except UserError as error:
        return url, 0, str(error)
    finally:
        source.close()


class RunDirProbe:
    """Files of one moment in the run directory: whether each node can write there, and sees what others wrote."""

    def __init__(self, path: str, mode: int, rank: int):
        self.path, self.mode, self.mark = path, mode, f".preflight-{rank}-"
        self.file = os.path.join(path, f"{self.mark}{secrets.token_hex(8)}")
        self.made: list[str] = []  # folders that aren't there before anybody writes
        folder = os.path.abspath(path)
        while not os.path.exists(folder):
            self.made.append(folder)
            folder = os.path.dirname(folder)

    def write(self) -> dict[str, Any]:
        """Returns the free bytes, there and in /dev/shm, and what was wrong."""
        seen: dict[str, Any] = {"wrong": [], "free": None, "shm": None}
        try:
            create_folder(self.path, self.mode)
            for name in os.listdir(self.path):
                if name.startswith(self.mark):  # of a preflight that was killed
                    os.remove(os.path.join(self.path, name))
            if holder := holder_of(self.path, LEASE):
                seen["wrong"].append(
                    f"run.dir={self.path}: {holder} is writing there already; wait for it to end, or end it first"
                )
            with open(self.file, "w", opener=new_file) as file:
                file.write("written by preflight, to be removed by it")
                file.flush()
                os.fsync(file.fileno())
            seen["free"] = shutil.disk_usage(self.path).free
        except OSError as error:
            seen["wrong"].append(f"run.dir={self.path}: can't be written: {error.strerror}; choose another run.dir")
        shm = "/dev/shm"  # noqa: S108  # only its free space is read
        if os.path.isdir(shm):
            seen["shm"] = shutil.disk_usage(shm).free
        return seen

    def unseen(self, ranks: Iterable[int]) -> list[int]:
        """The ranks whose files can't be seen from here."""
        end = time.monotonic() + VISIBLE_WITHIN
        while True:
            names = os.listdir(self.path) if os.path.isdir(self.path) else []  # a listing refreshes NFS's memory
            missing = [rank for rank in ranks if not any(name.startswith(f".preflight-{rank}-") for name in names)]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(0.1)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            os.remove(self.file)
        for folder in self.made:
            with contextlib.suppress(OSError):  # another rank's file may still be there: the last one removes it
                os.rmdir(folder)


@contextlib.contextmanager
def told(wrong: list[str]) -> Iterator[None]:
    """A mistake is noted instead of raised."""
    try:
        yield
    except UserError as error:
        wrong.append(str(error))


def measure(ranks: Ranks, leaders: list[int], store: Any, timeout: float) -> dict[str, Any]:
    """Collective. Joins the process group and measures all ranks together, then one rank of each node."""
    if ranks.world_size == 1:
        return {}
    seen: dict[str, Any] = {}
    phase, limit = "all_reduce", timedelta(seconds=timeout)
    try:
        device = local_device(ranks)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=dist.PrefixStore("collectives", store), rank=ranks.rank,
            world_size=ranks.world_size, timeout=limit, device_id=device if on_gpu else None,
        )  # fmt: skip
        everybody = list(range(ranks.world_size))
        seen[phase] = all_reduce(ranks.rank, device, everybody, None)
        if 1 < len(leaders) < ranks.world_size:
            phase, group = "between_nodes", dist.new_group(leaders)
            if ranks.rank in leaders:
                seen[phase] = all_reduce(ranks.rank, device, leaders, group)
        if on_gpu:  # the ranks' votes and parts of checkpoints go over gloo
            phase, group = "gloo", dist.new_group(backend="gloo", timeout=limit)
            seen[phase] = all_reduce(ranks.rank, torch.device("cpu"), everybody, group)
    except (RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0]
        seen[phase] = {"wrong": [f"{type(error).__name__}: {reason}; {NETWORK}"], "speed": 0.0}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return seen


def all_reduce(rank: int, device: torch.device, members: list[int], group: Any) -> dict[str, Any]:
    """Sums what each member can check, and times it.

    Returns bytes per second that each rank has sent: 2 (n - 1) / n of the buffer in the shortest time.
    """
    buffer = torch.empty((128 if device.type == "cuda" else 16) * MIB // 4, device=device)
    expected, wrong, seconds = float(sum(member + 1 for member in members)), 0, []
    for _ in range(4):
        buffer.fill_(rank + 1)
        dist.barrier(group=group)
        began = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        wrong += int((buffer != expected).sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    sent = 2 * (len(members) - 1) / len(members) * buffer.nbytes
    fix = "take the node out of the job and test its GPUs and its network"
    return {"wrong": [f"{wrong} sums are not {expected:g}; {fix}"] if wrong else [], "speed": sent / min(seconds[1:])}


# What follows from all ranks' looks.


def place(look: dict[str, Any]) -> str:
    return f"rank {look['rank']} on {look['host']}"


def leaders(looks: list[dict[str, Any]]) -> list[int]:
    """The first rank of each node: where the node itself is looked at."""
    return [ranks[0] for ranks in ranks_by_host(looks).values()]


def result(name: str, text: str, wrong: Iterable[str]) -> list[Finding]:
    """One finding with what was seen, or one for each thing that was wrong."""
    return [Finding(name, False, message) for message in wrong] or [Finding(name, True, text)]


def check_arrival(
    name: str, told: dict[int, Any], looks: dict[int, dict[str, Any]], world_size: int, timeout: float
) -> list[Finding]:
    """Whether all ranks have come to this round; the first finding is the map of what runs where."""
    missing = [rank for rank in range(world_size) if rank not in told]
    if not missing:
        return []
    known = [look for rank, look in looks.items() if rank in told]
    arrived = "; ".join(f"{host}: rank {spans(there)}" for host, there in ranks_by_host(known).items())
    lost = ", ".join(place(looks[rank]) for rank in missing if rank in looks) or f"rank {spans(missing)}"
    return [Finding(name, False, f"missing after {timeout:g} s: {lost} of {world_size}; arrived: {arrived}; look at the"
                    " missing ranks' own messages, and whether their node reaches rank 0's")]  # fmt: skip


def ranks_by_host(looks: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for look in looks:
        hosts.setdefault(look["host"], []).append(look["rank"])
    return hosts


def check_processes(looks: list[dict[str, Any]], config: RunConfig) -> list[Finding]:
    """The first round."""
    return check_devices(looks) + check_versions(looks, config) + check_batch(config, len(looks))


def check_nodes(looks: list[dict[str, Any]], config: RunConfig) -> list[Finding]:
    """The second round."""
    parameters = parameter_count(config)
    return [
        *check_clocks(looks),
        *check_shards(looks),
        *check_disk(looks, config, parameters),
        *check_shared_memory(looks, config),
        *check_memory(looks, config, parameters),
    ]


def check_network(looks: list[dict[str, Any]], config: RunConfig) -> list[Finding]:
    """The third round."""
    return check_run_dir(looks, config) + check_all_reduce(looks, parameter_count(config))


def check_devices(looks: list[dict[str, Any]]) -> list[Finding]:
    wrong: list[str] = []
    owners: dict[str, dict[str, Any]] = {}
    on_gpu = Counter(look["uuid"] is not None for look in looks).most_common(1)[0][0]
    for look in looks:
        if (look["uuid"] is not None) != on_gpu:
            wrong.append(
                f"{place(look)}: device {look['device']}, but the others have {'GPUs' if on_gpu else 'none'}; give"
                " each rank a GPU (--gpus-per-node, --nproc-per-node, CUDA_VISIBLE_DEVICES), or none any"
            )
        elif look["uuid"] is not None and (other := owners.setdefault(look["uuid"], look)) is not look:
            wrong.append(
                f"{place(look)}: has the same GPU as rank {other['rank']} (local rank {look['local_rank']} and"
                f" {other['local_rank']}); start one rank for each GPU (--nproc-per-node, --gpus-per-task=1)"
            )
    shown = []
    for host, ranks in ranks_by_host(looks).items():
        devices = Counter(looks[rank]["device"] for rank in ranks)
        shown.append(f"{host}: rank {spans(ranks)} on " + ", ".join(f"{n} x {name}" for name, n in devices.items()))
    return result("ranks and devices", "; ".join(shown), wrong)


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def check_versions(looks: list[dict[str, Any]], config: RunConfig) -> list[Finding]:
    wrong = []
    names = list(dict.fromkeys(name for look in looks for name in look["versions"]))
    for name in names:
        common = Counter(look["versions"].get(name) for look in looks).most_common(1)[0][0]
        fix = (
            "bring the same source to every node"
            if name == "vit-pretrain"
            else "install the same on every node: pip install -c constraints.txt"
        )
        wrong += [
            f"{place(look)}: {name} {look['versions'].get(name, 'is not installed')}, the others have {common}; {fix}"
            for look in looks
            if look["versions"].get(name) != common
        ]
    if config.engine.zero_stage is not None and "deepspeed" not in names:
        wrong.append(f"engine.zero_stage={config.engine.zero_stage} needs deepspeed; pip install"
                     " 'vit-pretrain[deepspeed]'")  # fmt: skip
    first = looks[0]["versions"]
    return result("versions", ", ".join(f"{name} {version}" for name, version in first.items()), wrong)


def check_clocks(looks: list[dict[str, Any]]) -> list[Finding]:
    """All ranks have looked at their clocks at the same signal of rank 0."""
    offsets = [(look, look["clock"] - looks[0]["clock"]) for look in looks]
    wrong = [
        f"{place(look)}: its clock is {offset:+.1f} s from rank 0's; set it by NTP (chronyc makestep)"
        for look, offset in offsets
        if abs(offset) > CLOCK_TOLERANCE
    ]
    spread = max(offset for _, offset in offsets) - min(offset for _, offset in offsets)
    return result("clocks", f"within {spread * 1000:.0f} ms of each other", wrong)


def check_batch(config: RunConfig, world_size: int) -> list[Finding]:
    wrong: list[str] = []
    text = ""
    with told(wrong):
        plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, world_size)
        train_stream(  # refuses lanes that the ranks don't divide
            config.data, None, (), config.model.image_size, config.model.num_classes, 0, Ranks(0, world_size, 0, 1), 0
        )
        text = (
            f"{plan.global_batch} = {plan.micro_batch} micro batch x {plan.accumulation} accumulation x {plan.ranks}"
            f" ranks; {config.data.plan.lanes} lanes, {config.data.plan.lanes // world_size} a rank"
        )
    return result("batch", text, wrong)


def check_shards(looks: list[dict[str, Any]]) -> list[Finding]:
    there = [look for look in looks if "shards" in look]
    wrong = [f"{place(look)}: {message}" for look in there for message in look["shards"]["wrong"]]
    slowest = min(there, key=lambda look: look["shards"]["bytes"] / look["shards"]["seconds"])["shards"]
    text = (
        f"{slowest['shards']} read a few MB each on {len(there)} nodes; the slowest node has"
        f" {slowest['bytes'] / slowest['seconds'] / 1e6:.0f} MB/s (maybe out of its cache)"
    )
    if not slowest["shards"]:
        text = "not read: they are pipe: commands, which a check does not run"
    return result("shards", text, wrong)


def check_run_dir(looks: list[dict[str, Any]], config: RunConfig) -> list[Finding]:
    there = [look for look in looks if "run_dir" in look]
    wrong = [f"{place(look)}: {message}" for look in there for message in look["run_dir"]["wrong"]]
    for look in there:
        for rank in look["unseen"]:
            other = next(other for other in looks if other["rank"] == rank)
            if not (look["run_dir"]["wrong"] or other["run_dir"]["wrong"]):
                wrong.append(
                    f"{place(look)}: does not see what {place(other)} has written into run.dir={config.run.dir}; choose"
                    " a directory that all nodes share, or no run can be resumed"
                )
    return result("run directory", f"{config.run.dir} is written and seen by {len(there)} nodes", wrong)


def check_disk(looks: list[dict[str, Any]], config: RunConfig, parameters: int) -> list[Finding]:
    """Room for the checkpoints; one more than are kept is there for a while."""
    folder = os.path.join(config.run.dir or "", "checkpoints")
    there = [name for name in os.listdir(folder) if NAME.fullmatch(name)] if os.path.isdir(folder) else []
    size, free = checkpoint_bytes(parameters, config), looks[0]["run_dir"]["free"]
    need = size * max(config.checkpoint.keep_last + 1 - len(there), 1)
    if free is None:
        return []  # `check_run_dir` has said that it can't be written
    wrong = [
        f"{place(looks[0])}: run.dir={config.run.dir}: {free / MIB:.1f} MiB free, {need / MIB:.1f} MiB needed for"
        f" checkpoints of {size / MIB:.1f} MiB; free some space, choose another run.dir, or lower checkpoint.keep_last"
    ]
    text = f"{free / GIB:.1f} GiB free for checkpoints of {size / MIB:.1f} MiB"
    return result("disk", text, wrong if free < need else [])


def check_shared_memory(looks: list[dict[str, Any]], config: RunConfig) -> list[Finding]:
    """Batches come from the workers through /dev/shm: those that wait, and one that is being made."""
    images = config.data.global_batch_size + (config.data.val_batch_size if config.data.val else 0)
    batch = -(-images // len(looks)) * 3 * config.model.image_size**2
    wrong, frees = [], []
    for look in looks:
        if "run_dir" not in look or look["run_dir"]["shm"] is None or not config.data.workers:
            continue
        there = sum(other["host"] == look["host"] for other in looks)
        need, free = there * SLOTS * batch, look["run_dir"]["shm"]
        frees.append(free)
        if free < need:
            wrong.append(
                f"{place(look)}: /dev/shm has {free / MIB:.0f} MiB free, the batches of {there} ranks need"
                f" {need / MIB:.0f} MiB; enlarge it (docker run --shm-size, mount -o remount,size=), or"
                " data.workers=0"
            )
    text = f"at least {min(frees) / GIB:.1f} GiB free in /dev/shm" if frees else "not needed"
    return result("shared memory", text, wrong)


def check_memory(looks: list[dict[str, Any]], config: RunConfig, parameters: int) -> list[Finding]:
    wrong: list[str] = []
    with told(wrong):
        plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, len(looks))
        need = state_bytes(parameters, config.engine.zero_stage, config, len(looks))
        need += activation_bytes(config, plan.micro_batch, config.engine.zero_stage is not None)
        smallest = min(look["memory"] for look in looks)
        wrong += [
            f"{place(look)}: {look['device']} has {look['memory'] / GIB:.1f} GiB free, about {need / GIB:.1f} GiB are"
            f" needed at micro batch {plan.micro_batch}; set engine.micro_batch_size={max(plan.micro_batch // 2, 1)},"
            " or a higher engine.zero_stage"
            for look in looks
            if look["memory"] < need
        ]
        return result("memory", f"about {need / GIB:.2f} GiB of {smallest / GIB:.1f} GiB a rank", wrong)
    return []  # `check_batch` has said that the batch does not divide


def check_all_reduce(looks: list[dict[str, Any]], parameters: int) -> list[Finding]:
    """Bandwidth, and how long one step's gradients take at it."""
    findings = []
    names = {"all_reduce": "all-reduce", "between_nodes": "all-reduce of nodes", "gloo": "all-reduce by gloo"}
    for key, name in names.items():
        measured = [look for look in looks if key in look]
        if measured:
            wrong = [f"{place(look)}: {message}" for look in measured for message in look[key]["wrong"]]
            speed, size = min(look[key]["speed"] for look in measured), len(measured)
            seconds = 2 * (size - 1) / size * parameters * 4 / max(speed, 1.0)
            text = f"{size} ranks, correct; {speed / 1e9:.2f} GB/s a rank"
            if key != "gloo":
                text += f": {seconds:.3f} s for the gradients of a step (fp32, without overlap)"
            findings += result(name, text, wrong)
    return findings


def parameter_count(config: RunConfig) -> int:
    with torch.device("meta"):
        return count_parameters(ViT(config.model).parameters())
