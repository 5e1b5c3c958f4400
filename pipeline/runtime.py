"""Ranks, devices, signals: the only reader of the launchers' environment variables.

Imports torch only where it is used, so that signals are caught from the first moment of a process.
"""

import contextlib
import copy
import ctypes
import datetime
import faulthandler
import io
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline.errors import UserError
from pipeline.text import Screen


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_ranks(environ: Mapping[str, str]) -> Ranks:
    """Reads the variables of torchrun, Accelerate and DeepSpeed (RANK, ...), of srun (SLURM_...), or none of them.

    Raises:
        UserError: a variable that is no number, or a rank outside of the world.
    """
    names = {
        "rank": ("RANK", "SLURM_PROCID", 0),
        "world_size": ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1),
        "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", 0),
        "local_world_size": ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", 1),
    }
    # A shell inside of a Slurm job has SLURM_* too, but only a step of srun has a task number of its own.
    slurm = "RANK" not in environ and "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ
    values = {}
    for field, (plain, of_slurm, default) in names.items():
        name = of_slurm if slurm else plain
        text = environ.get(name, str(default)).split("(")[0].split(",")[0]  # Slurm writes "2(x3)"
        if not text.isdigit():
            raise UserError(f"environment variable {name}: expected a number, found {environ[name]!r}")
        values[field] = int(text)
    ranks = Ranks(**values)
    if ranks.rank >= ranks.world_size:
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size}: RANK must be below WORLD_SIZE; start one process per rank"
        )
    return ranks


def local_device(ranks: Ranks) -> Any:
    """The device of this rank: the only GPU that it sees, or that of its local rank; without GPUs the CPU.

    Raises:
        UserError: the rank sees several GPUs, but none for its local rank.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = ranks.local_rank if count > 1 else 0  # srun --gpus-per-task=1 shows each rank its own GPU as number 0
    if index >= count:
        raise UserError(
            f"rank {ranks.rank} on {socket.gethostname()}: its local rank is {ranks.local_rank}, but it sees {count}"
            " GPUs; start at most one rank for each GPU (--nproc-per-node, --ntasks-per-node)"
        )
    return torch.device("cuda", index)


def export_ranks(ranks: Ranks, environ: Any) -> None:
    """Writes what Accelerate and DeepSpeed read, whichever launcher started us."""
    environ["RANK"] = str(ranks.rank)
    environ["WORLD_SIZE"] = str(ranks.world_size)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(ranks.local_world_size)
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = slurm_head(environ) or environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    if "MASTER_PORT" not in environ:
        job = environ.get("SLURM_JOB_ID")
        environ["MASTER_PORT"] = str(20000 + int(job) % 20000 if job else free_port())
    if sys.platform == "linux" and on_one_machine(environ):  # elsewhere the loopback interface has another name
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")


LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", address) is not None


def on_one_machine(environ: Mapping[str, str]) -> bool:
    """Whether all ranks run on this machine, so that nobody else needs to reach them."""
    return environ["LOCAL_WORLD_SIZE"] == environ["WORLD_SIZE"] or is_loopback(environ["MASTER_ADDR"])


def slurm_head(environ: Mapping[str, str]) -> str | None:
    """The step's first node, "r[07-09]n[1-2],x3" -> "r07n1", if its name resolves; srun itself may run elsewhere."""
    names = re.sub(r"\[(\d+)[^]]*\]", r"\1", environ.get("SLURM_STEP_NODELIST", ""))
    with contextlib.suppress(OSError):
        return names.split(",")[0] if names and socket.gethostbyname(names.split(",")[0]) else None
    return None


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks find each other."""

    address: str
    port: int
    hosted: bool  # the launcher listens there already
    name: str  # of this start: keys of an earlier one must not be taken for ours


def read_rendezvous(environ: Mapping[str, str]) -> Rendezvous:
    """Reads what a launcher or `export_ranks` has set.

    Raises:
        UserError: MASTER_PORT is no port.
    """
    if environ["WORLD_SIZE"] == "1":
        return Rendezvous(LOOPBACK, 0, False, "meeting")  # nobody to meet: no port is opened
    port = environ["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"environment variable MASTER_PORT: expected a port, 1 to 65535, found {port!r}")
    hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # A store of rank 0's own is fresh at each start, which the nodes may count differently.
    start = f"/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if hosted else ""
    address = environ["MASTER_ADDR"] if hosted or not on_one_machine(environ) else LOOPBACK
    return Rendezvous(address, int(port), hosted, f"meeting{start}")


def read_accelerate(environ: Any) -> dict[str, str]:
    """Takes what `accelerate launch` was told of the strategy out of its variables, by option of ours.

    Accelerate itself must not see it: the config alone says what is trained, and the engine holds the two together.
    """
    names = {
        "ACCELERATE_MIXED_PRECISION": "engine.precision",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "accumulation",
        "ACCELERATE_GRADIENT_CLIPPING": "engine.grad_clip",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "engine.zero_stage",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "engine.offload_optimizer",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
        "ACCELERATE_USE_FSDP": "use_fsdp",
        "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend",
    }
    said = {option: environ.pop(name) for name, option in names.items() if name in environ}
    if environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        said.setdefault("engine.zero_stage", "2")  # Accelerate's own default
    environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    silent = ("none", "auto", "false", "")  # and "no": the precision that is passed where nothing was said
    return {option: value for option, value in said.items() if value.lower() not in (*silent, "no")}


def be_deterministic() -> dict[str, Any]:
    """The same results bit for bit in each run on the same ranks and devices. Before the first use of a device.

    Returns what was set, for the manifest.
    """
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over memory
    return {
        "torch.use_deterministic_algorithms": True,
        "torch.backends.cudnn.benchmark": False,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class _Log(io.FileIO):
    """What can't be written (a full disk below the log, a reader that is gone) is dropped: training must go on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def survive_a_full_log() -> None:
    """From now on no `print`, progress bar or warning ends the process since its log can't be written.

    All output is screened: it holds no secrets and no control characters.
    """
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        old.flush()
        buffered = io.BufferedWriter(_Log(old.fileno(), "w", closefd=False))
        setattr(sys, name, Screen(io.TextIOWrapper(buffered, old.encoding, old.errors, line_buffering=True)))


def process_began() -> float:
    """When this process was started, in the seconds of `time.time`; where /proc does not tell, now."""
    with contextlib.suppress(OSError):
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return time.time()


def stop_signals() -> tuple[signal.Signals, ...]:
    """What ends a run with a checkpoint. SIGHUP does not where it is ignored, as under nohup."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    return signals if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*signals, signal.SIGHUP)


SAME_SECONDS = 0.5  # a launcher passes on what its group has got already: two within this time are one
LOOK_SECONDS = 1.0  # between two looks at the STOP file and at the launcher
ORPHAN_SECONDS = 60.0  # for a rank to save and end after its launcher; longer while a checkpoint grows


class StopSignal:
    """Remembers the signals that end a run instead of dying of them; a third one ends the process at once.

    The signals are blocked, and a thread waits for them: no system call is interrupted, they count while the main
    thread is deep in a library, and all children inherit the block: a signal to the whole process group ends neither
    data workers nor the compilers that torch.compile starts.

    Two more things count as a signal: a file named `STOP` in the run directory, which a batch system's shell can leave
    where a signal would kill the launcher; and the death of the launcher that has started this rank.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.count = 0
        self.file: str | None = None
        self.began, self.came = process_began(), float("-inf")
        self.signals = stop_signals()
        self.parent = os.getppid() if has_launcher(os.environ) else None
        self.training = False  # until then there is nothing to save
        self.on_end: Callable[[str], None] = lambda reason: None  # before the process is ended hard
        self.progress: Callable[[], float] = lambda: float("-inf")  # when a checkpoint grew last

    def watch(self, file: str) -> None:
        """Looks for this file from now on; one that is older than this process was meant for an earlier start."""
        with contextlib.suppress(FileNotFoundError):
            if self.file is None and os.stat(file).st_mtime < self.began:
                os.remove(file)
        if self.file is None:  # in a thread of its own: a file system may hang
            threading.Thread(target=self._look, name="stop-file", daemon=True).start()
        self.file = file
        self._look_once()

    def wanted(self) -> bool:
        return self.name is not None

    def request(self, name: str) -> None:
        """Stops the run as a signal does; `name` says why."""
        self.name = self.name or name

    def install(self) -> "StopSignal":
        """From the main thread, before there are others."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        if self.parent is not None:
            signal_at_parents_death(0)  # preflight, whose process this was, has asked for one; we save first
            threading.Thread(target=self._watch_launcher, args=(self.parent,), name="launcher", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """For commands that have nothing to save."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)

    def _look(self) -> None:
        while not self.wanted():
            self._look_once()
            time.sleep(LOOK_SECONDS)

    def _look_once(self) -> None:
        if self.file is not None and os.path.exists(self.file):
            self.request("STOP file")

    def _listen(self) -> None:
        while self.count < 3:
            first = self.count == 0
            self.catch(signal.Signals(signal.sigwait(self.signals)).name, time.monotonic())
            if first:
                tell(f"{self.name}: saves and ends; a third signal ends it at once")
        self._end(128 + signal.Signals[self.name or "SIGTERM"], f"{self.name}, the third signal: ended without saving")

    def _watch_launcher(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        if not self.training:
            self._end(1, "the launcher has died while the run was starting")
        self.request("the launcher has died")
        tell("the launcher has died: saves and ends", every_rank=True)
        orphaned = time.monotonic()
        while time.monotonic() - max(orphaned, self.progress()) < ORPHAN_SECONDS:
            time.sleep(LOOK_SECONDS)
        self._end(1, f"the launcher has died, and nothing was saved for {ORPHAN_SECONDS:g} s: ended hard")

    def _end(self, code: int, reason: str) -> None:
        end_hard(code, lambda: self.on_end(reason))

    def catch(self, name: str, when: float) -> None:
        """Counts a signal that came at `when`, in seconds."""
        if when - self.came > SAME_SECONDS:
            self.count += 1
        self.name, self.came = name, when


def tell(text: str, every_rank: bool = False) -> None:
    """Writes a line about the end of the run to the job's log, where pipe and terminal still take it."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(f"\n{text}", file=sys.stderr, flush=True)


def end_hard(code: int, last_words: Callable[[], None] = lambda: None) -> NoReturn:
    """Ends this process and its data workers, whatever its other threads do. `last_words` have a second."""
    words = threading.Thread(target=last_words, daemon=True)  # the file system may hang
    words.start()
    words.join(1.0)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def end_within(seconds: float, code: int) -> threading.Timer:
    """Ends this process with `code` if it has not ended by itself: nothing may hang once all is saved."""

    def end() -> None:
        tell(f"rank {os.environ.get('RANK', '0')}: not ended by itself within {seconds:g} s: ended hard", True)
        end_hard(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, `accelerate launch` or deepspeed has started this process: it does not outlive them.

    A shell that is gone ends nothing: runs are started by nohup or from terminals that are closed.
    """
    names = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE", "CROSS_RANK")  # torchrun, accelerate, deepspeed
    return any(name in environ for name in names)


LAUNCHER_SECONDS = 3600  # that a launcher should give its ranks to save


def launcher_patience(environ: Mapping[str, str]) -> float | None:
    """Seconds after which torchrun or `accelerate launch` kill ranks that they have passed a signal on to."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    text = environ.get("PET_SHUTDOWN_TIMEOUT", environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    with contextlib.suppress(OSError):  # the option comes before both
        with open(f"/proc/{os.getppid()}/cmdline") as file:
            found = re.search(r"\0--shutdown[-_]timeout[\0=](\d+)\0", file.read())
        text = found[1] if found else text
    return float(text) if text.isdigit() else None


def die_with_parent(parent: int) -> None:
    """Has this process end with the process `parent` that has started it, even if that is killed.

    Linux sends the signal when the thread that has forked ends: let it be one that lasts.
    """
    if not signal_at_parents_death(signal.SIGKILL):
        threading.Thread(target=_poll_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def signal_at_parents_death(number: int) -> bool:
    """Has the kernel send this signal (0: none) when the parent ends; False where it can't. An exec keeps it."""
    if sys.platform != "linux":
        return False
    pr_set_pdeathsig = 1
    return ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number), 0, 0, 0) == 0


def _poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


SHOW_STACKS = signal.SIGUSR2  # a data worker writes the stacks of its threads to the job's log


def settle_signals() -> None:
    """For data workers: the group's signal must not kill them before their rank has saved, and a hang is explained."""
    for number in {*stop_signals(), signal.SIGHUP} - {SHOW_STACKS}:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(SHOW_STACKS, file=2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SHOW_STACKS})


@dataclass(frozen=True)
class Agreement:
    stop: bool
    failed: bool  # a rank stops since it can't go on
    save: bool
    settle: bool  # the savers need all ranks
    valid_rows: int  # of the global batch


class Vote:
    """What all ranks must know of each other before a step, without asking a device.

    `start` sends, on a CPU group, whether this rank wants to stop or (rank 0 only) a checkpoint by the clock, whether
    its saver needs all ranks, and how many of its rows are valid; `finish` brings the answer of all, a step later, when
    it has long arrived. So all do the same at the same step.
    """

    def __init__(
        self,
        stop: StopSignal,
        ranks: Ranks,
        save_wanted: Callable[[], bool],
        settle_wanted: Callable[[], bool],
        timeout_seconds: int,
    ):
        import torch.distributed as dist

        self.stop, self.ranks, self.save_wanted, self.settle_wanted = stop, ranks, save_wanted, settle_wanted
        timeout = datetime.timedelta(seconds=timeout_seconds)  # a group's own default, unlike the first group's
        self.group = dist.new_group(backend="gloo", timeout=timeout) if ranks.world_size > 1 else None
        self.pending: Any = None

    def start(self, valid_rows: int, failed: bool = False) -> None:
        """`failed`: this rank can't go on, and stops the run."""
        import torch
        import torch.distributed as dist

        assert self.pending is None
        save = self.ranks.is_main and self.save_wanted()
        wishes = (self.stop.wanted() or failed, failed, save, self.settle_wanted())
        wish = torch.tensor([*map(int, wishes), valid_rows])
        work = dist.all_reduce(wish, group=self.group, async_op=True) if self.group is not None else None
        self.pending = work, wish

    def finish(self) -> Agreement:
        work, wish = self.pending
        self.pending = None
        if work is not None:
            work.wait()
        stop, failed, save, settle, rows = wish.tolist()
        return Agreement(stop > 0, failed > 0, save > 0, settle > 0, rows)

    def between_steps(self) -> "Vote":
        """Another one of the same ranks, to begin and finish while this one is under way."""
        other = copy.copy(self)
        other.pending = None
        return other

    def drain(self) -> None:
        """Takes the answer to a vote that was begun, if there is one, where nobody needs it any more."""
        if self.pending is not None:
            self.finish()
