"""Our training step beside the plain loop in torch and a bare DeepSpeed loop.

    python bench/engine.py                           # two processes, every strategy; 5 minutes on two cores
    python bench/engine.py --ranks 1                 # one process
    python bench/engine.py --only ddp zero2 --rounds 40
    python bench/engine.py --ranks 8 --precision bf16 --width 768 --depth 12 --rows 128    # GPUs

It starts torchrun itself. What is timed, on the same model, weights, batch and learning rates:

- ours: the ranks' vote and `Trainer.step`, as `Trainer.fit` has them: normalise, objective with its metrics, backward,
  clip, guard against non-finite gradients, update.
- plain: DistributedDataParallel, cross-entropy, clip_grad_norm_, fused AdamW. No Accelerate, no DeepSpeed: the limit.
- deepspeed (ZeRO only): deepspeed.initialize with our configuration, the same optimizer; none of our code.

In each strategy's launch all take turns forwards and then backwards (A B C, C B A), so that a drift of the machine's
speed hits all alike; a ratio compares the visits of one round, the figure is the median over rounds. The losses of
all must agree at the end, or the figures would compare different work. Where other processes share the cores, look at
the ratios of CPU seconds (of rank 0, all its threads): they tell the work that a step is, without what it waits for.

Memory comes from a launch of its own. `state` is measured from the tensors that a rank holds between steps,
`grown` is the growth of the resident size from before the model is built to after the third step (on a GPU the largest
`max_memory_allocated`).

Communication: a dispatch mode sees every collective of a step (each passes torch's dispatcher as an operator of the
namespace c10d, whoever calls it) and adds up the bytes of its tensors: the larger of input and output. `sent` is what a
ring then sends from each rank, computed: 2 (n-1)/n of the bytes of an all-reduce, (n-1)/n of an all-gather's or
reduce-scatter's, all of a broadcast's or reduce's.

The table of efficiency is computed, not measured, for a step of `--table-ms` milliseconds on one GPU and W bytes of
bf16 weights and of gradients. Nodes have 8 GPUs that exchange 450 GB/s each; a node's links to the others carry B bytes
a second (8x400G: 400e9, 1x400G: 50e9, 100GbE: 12.5e9). A collective over n GPUs on m nodes that must pass on
V = (n-1)/n W bytes of each rank (an all-reduce: twice that) takes, hierarchically,
    t(V) = (7/8) W / 450e9 + (m-1)/m W / B        (an all-reduce: twice that)
A gradient's all-reduce (ZeRO-3: reduce-scatter) runs while backward does (two thirds of a step); what can't hide is the
last bucket of 25 MB and what is longer than the backward pass:
    exposed = t 25e6/W + max(0, t - 2/3 step)
ZeRO-1 and 2 do the same all-reduce, as DeepSpeed does by default and the counting shows, and add an all-gather of the
weights that nothing hides. ZeRO-3 gathers in forward and again in backward, where
it shares the links with the reduce-scatter; of each gather the first block (1/12) is exposed, and what is longer than
the pass that hides it. Efficiency = step / (step + exposed). Latency, stragglers and the input are left out.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from ranks import STRATEGIES, clock, close_run, join, launch, leave, open_run, parser_for, spread, state_tensors, wait
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.build import Run, build_model
from pipeline.data.loader import Batch
from pipeline.optimizer import build_optimizer
from pipeline.runtime import Ranks


@dataclass
class Contender:
    """A training loop, and what was measured of it."""

    name: str
    step: Callable[[int], Tensor]  # number of the step -> mean loss of this rank's rows
    steps: int = 0
    loss: Tensor | None = None
    seconds: list[float] = field(default_factory=list)  # of a step, one a round
    cpu_seconds: list[float] = field(default_factory=list)

    def visit(self, steps: int, run: Run) -> tuple[float, float]:
        """Seconds of a step, as the mean of so many: by the clock, and of this rank's CPU."""
        run.engine.barrier()
        began, cpu = clock(run.engine.device), time.process_time()
        for _ in range(steps):
            self.loss = self.step(self.steps)
            self.steps += 1
        return (clock(run.engine.device) - began) / steps, (time.process_time() - cpu) / steps


def ours(run: Run, batch: Batch) -> Contender:
    trainer = run.trainer
    trainer.vote.start(batch.valid_rows)

    def step(number: int) -> Tensor:
        agreed = trainer.vote.finish()
        trainer.vote.start(batch.valid_rows)  # on the step after: it arrives while this one computes
        return trainer.step(number, batch, agreed.valid_rows).metrics[0]["loss"] / len(batch)

    return Contender("ours", step)


def fresh_model(run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(run.config.model, run.config.engine, run.config.run.seed).to(run.engine.device)
    return model, build_optimizer(model, run.config.optimizer, run.config.schedule.peak_lr)


def plain(run: Run, batch: Batch) -> Contender:
    device, ranks = run.engine.device, run.ranks
    model, optimizer = fresh_model(run)
    wrapped = model
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    half = run.config.engine.precision == "bf16"

    def step(number: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = run.trainer.schedule(number)
        images = batch.images.float().div_(127.5).sub_(1.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = wrapped(images)
        loss = nn.functional.cross_entropy(logits.float(), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contender("plain", step)


def deepspeed(run: Run, batch: Batch) -> Contender:
    import deepspeed as package

    model, optimizer = fresh_model(run)
    # ZeRO-0 in fp32: our engine clips by itself there.
    config = {**copy.deepcopy(run.engine.model.config), "gradient_clipping": run.config.engine.grad_clip}
    engine, optimizer, *_ = package.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    dtype = run.engine.input_dtype

    def step(number: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = run.trainer.schedule(number)
        images = batch.images.float().div_(127.5).sub_(1.0).to(dtype)
        loss = nn.functional.cross_entropy(engine(images).float(), batch.labels)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Contender("deepspeed", step)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of all collectives that are called inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_").removesuffix("_base")
            sides = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args[:2]]
            self.payload[name] += max(sides)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def sent_bytes(payload: dict[str, int], ranks: int) -> float:
    """What a ring sends from each rank: see the top."""
    share = (ranks - 1) / ranks
    sent = 0.0
    for name, size in payload.items():
        if name.startswith("allreduce"):
            sent += 2 * share * size
        elif name.startswith(("allgather", "reduce_scatter", "alltoall")):
            sent += share * size
        else:
            sent += size
    return sent


def overrides(words: Any, strategy: str) -> list[str]:
    stage = STRATEGIES[strategy]
    return [
        f"model.patch_size={words.patch}", f"model.width={words.width}", f"model.depth={words.depth}",
        f"model.heads={max(words.width // 64, 1)}", f"model.mlp_dim={4 * words.width}",
        f"model.image_size={words.image_size}", f"data.global_batch_size={words.rows * words.ranks}",
        f"engine.precision={words.precision}", f"engine.zero_stage={'null' if stage is None else stage}",
    ]  # fmt: skip


def open_strategy(words: Any, strategy: str, ranks: Ranks) -> tuple[Run, Batch]:
    run = open_run(words.worker, ranks, overrides(words, strategy))
    return run, next(iter(run.trainer.train))


def time_strategy(words: Any, strategy: str, ranks: Ranks) -> dict[str, Any]:
    run, batch = open_strategy(words, strategy, ranks)
    contenders = [plain(run, batch), ours(run, batch)]
    if STRATEGIES[strategy] is not None:
        contenders.append(deepspeed(run, batch))
    for contender in contenders:
        contender.visit(words.warm_up, run)
    for _ in range(words.rounds):
        there = [c.visit(words.steps, run) for c in contenders]
        back = [c.visit(words.steps, run) for c in reversed(contenders)]
        for contender, first, second in zip(contenders, there, reversed(back), strict=True):
            contender.seconds.append((first[0] + second[0]) / 2)
            contender.cpu_seconds.append((first[1] + second[1]) / 2)
    losses = {c.name: float(c.loss) for c in contenders if c.loss is not None}
    worst = max(abs(loss / losses["plain"] - 1) for loss in losses.values())
    if worst > (1e-4 if words.precision == "no" else 3e-2):
        raise RuntimeError(
            f"{strategy}: the loops do different work: losses {losses} after {contenders[0].steps} steps"
        )
    with Traffic() as traffic:
        contenders[1].step(contenders[1].steps)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    figures = {
        "strategy": strategy,
        "parameters": parameters,
        "losses": losses,
        "seconds": {c.name: c.seconds for c in contenders},
        "cpu_seconds": {c.name: c.cpu_seconds for c in contenders},
        "payload": dict(traffic.payload),
        "calls": dict(traffic.calls),
    }
    close_run(run)
    return figures


def profile_strategy(words: Any, strategy: str, ranks: Ranks) -> None:
    """Prints the longest operators of rank 0, of each loop."""
    run, batch = open_strategy(words, strategy, ranks)
    contenders = [plain(run, batch), ours(run, batch)]
    if STRATEGIES[strategy] is not None:
        contenders.append(deepspeed(run, batch))
    for contender in contenders:
        contender.visit(words.warm_up, run)
        with torch.profiler.profile() as recorder:
            contender.visit(5, run)
        if ranks.is_main:
            print(f"\n{strategy}, {contender.name}, 5 steps")
            print(recorder.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=60))
    close_run(run)


def resident() -> int:
    return psutil.Process().memory_info().rss


def measure_memory(words: Any, strategy: str, ranks: Ranks) -> dict[str, Any]:
    if STRATEGIES[strategy] is not None:
        import deepspeed  # noqa: F401 (its code must not count)
    before = resident()
    run, batch = open_strategy(words, strategy, ranks)
    contender = ours(run, batch)
    contender.visit(3, run)
    wait(run.engine.device)
    held = state_tensors(run.engine.module, run.engine.torch_optimizer())
    on_gpu = run.engine.device.type == "cuda"
    own = {
        "grown": torch.cuda.max_memory_allocated() if on_gpu else resident() - before,
        **{name: sum(t.nbytes for t in tensors) for name, tensors in held.items()},
    }
    found = run.engine.gather_objects(own)
    close_run(run)
    return {"strategy": strategy, "ranks": found}


LOOPS = ("plain", "ours", "deepspeed")
LINKS = {"8x400G": 400e9, "1x400G": 50e9, "100GbE": 12.5e9}  # bytes a second of a node
GPUS = (8, 16, 64, 256, 512, 1024)


def efficiency(strategy: str, gpus: int, node_bytes_per_second: float, weight_bytes: float, step: float) -> float:
    """Computed: see the top. `step` in seconds."""
    nodes = gpus / 8
    gather = 7 / 8 * weight_bytes / 450e9 + (nodes - 1) / nodes * weight_bytes / node_bytes_per_second
    forward, backward, last = step / 3, 2 * step / 3, 25e6 / weight_bytes
    if strategy != "zero3":
        exposed = (
            2 * gather * last + max(0.0, 2 * gather - backward) + (gather if strategy in ("zero1", "zero2") else 0)
        )
    else:
        exposed = gather * last + 2 * gather / 12 + max(0.0, 2 * gather - backward) + max(0.0, gather - forward)
    return step / (step + exposed)


def heading(*names: str) -> None:
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Ours to each peer: quartiles over rounds."""
    return {
        peer: spread([own / other for own, other in zip(seconds["ours"], values, strict=True)])
        for peer, values in seconds.items()
        if peer != "ours"
    }


def report(words: Any, timed: list[dict[str, Any]], memory: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints the tables. Returns their rows."""
    rows: dict[str, Any] = {"step": [], "memory": [], "communication": [], "computed_efficiency": []}

    print(f"\nStep, {timed[0]['parameters'] / 1e6:.1f} million parameters, {words.ranks} ranks of {words.rows} rows;"
          f" medians of {words.rounds} rounds of {2 * words.steps} steps; ratios of times, quartiles in brackets:"
          " above 1 ours is slower\n")  # fmt: skip
    heading("", *LOOPS, "ours / plain", "by CPU", "ours / deepspeed", "by CPU")
    for found in timed:
        row = {"strategy": found["strategy"], "ratio_quartiles": ratios(found["seconds"]),
               "cpu_ratio_quartiles": ratios(found["cpu_seconds"]),
               "seconds": {name: spread(values)[1] for name, values in found["seconds"].items()}}  # fmt: skip
        rows["step"].append(row)
        cells = [f"{1000 * row['seconds'][name]:.0f} ms" if name in row["seconds"] else "-" for name in LOOPS]
        for peer in ("plain", "deepspeed"):
            for kind in ("ratio_quartiles", "cpu_ratio_quartiles"):
                low, middle, high = row[kind].get(peer, (0, 0, 0))
                cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})" if middle else "-")
        print("| " + " | ".join([found["strategy"], *cells]) + " |")

    print("\nMemory of a rank in MiB (the largest of all ranks)\n")
    heading("", "weights", "master weights", "moments", "state", "grown")
    for found in memory:
        most = {key: max(own[key] for own in found["ranks"]) for key in found["ranks"][0]}
        most["state"] = max(own["weights"] + own["master"] + own["moments"] for own in found["ranks"])
        rows["memory"].append({"strategy": found["strategy"], **most})
        cells = [f"{most[key] / 2**20:.1f}" for key in ("weights", "master", "moments", "state", "grown")]
        print("| " + " | ".join([found["strategy"], *cells]) + " |")

    print("\nCommunication of one of our steps, counted, in MB\n")
    heading("", "collectives (calls)", "payload", "bytes a parameter", "sent by a rank (ring, computed)")
    for found in timed:
        payload = {name: size for name, size in found["payload"].items() if size}
        total, sent = sum(payload.values()), sent_bytes(payload, words.ranks)
        rows["communication"].append(
            {"strategy": found["strategy"], "payload": payload, "calls": found["calls"], "sent": sent}
        )
        kinds = ", ".join(f"{name} {size / 1e6:.2f} ({found['calls'][name]})" for name, size in payload.items()) or "-"
        cells = [kinds, f"{total / 1e6:.2f}", f"{total / found['parameters']:.2f}", f"{sent / 1e6:.2f}"]
        print("| " + " | ".join([found["strategy"], *cells]) + " |")

    weights = words.table_mb * 1e6
    print(f"\nEfficiency by GPUs: computed, not measured; {words.table_mb:g} MB of bf16 gradients,"
          f" {words.table_ms:g} ms a step\n")  # fmt: skip
    heading("", *map(str, GPUS))
    for strategy in ("ddp", "zero1", "zero3"):
        for link, speed in LINKS.items():
            values = [efficiency(strategy, gpus, speed, weights, words.table_ms / 1000) for gpus in GPUS]
            by_gpus = dict(zip(map(str, GPUS), values, strict=True))
            rows["computed_efficiency"].append({"strategy": strategy, "link": link, **by_gpus})
            print(f"| {strategy}, {link} | " + " | ".join(f"{value:.1%}" for value in values) + " |")
    return rows


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="times forwards and backwards through all loops (12)")
    parser.add_argument("--steps", type=int, default=1, help="steps of one visit (1)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each loop before (3)")
    parser.add_argument("--rows", type=int, default=4, help="images of a rank's step (4)")
    parser.add_argument("--width", type=int, default=256, help="of the model (256)")
    parser.add_argument("--depth", type=int, default=6, help="of the model (6)")
    parser.add_argument("--patch", type=int, default=4, help="pixels (4)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (32)")
    parser.add_argument("--table-mb", type=float, default=173.1, help="gradients of the computed table (ViT-B: 173.1)")
    parser.add_argument("--table-ms", type=float, default=60.0, help="step of the computed table (60)")
    parser.add_argument("--no-memory", action="store_true", help="leave the launches for memory out")
    parser.add_argument("--profile", action="store_true", help="list the longest operators of each loop, only")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # of the ranks
    words = parser.parse_args()
    if words.quick:
        words.rounds, words.steps, words.warm_up, words.width, words.depth, words.rows = 1, 1, 1, 64, 1, 4
    if words.worker:
        ranks = join()
        figures = TASKS[words.task](words, words.only[0], ranks)
        if ranks.is_main:
            leave(words.worker, figures)
        return 0
    found: dict[str, list[Any]] = {task: [] for task in TASKS}
    tasks = ["profile"] if words.profile else ["time"] if words.no_memory else ["time", "memory"]
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            for strategy in words.only:
                worker = [*sys.argv[1:], "--task", task, "--only", strategy]
                found[task].append(launch(__file__, worker, words.ranks, folder))
                done = ratios(found[task][-1]["seconds"]) if task == "time" else {}
                shown = "".join(f", {middle:.3f} of {peer}" for peer, (_, middle, _) in done.items())
                print(f"{task}: {strategy}{shown}", file=sys.stderr, flush=True)
    if words.profile:
        return 0
    rows = report(words, found["time"], found["memory"])
    if words.json:
        facts = {"cores": os.cpu_count(), "torch": torch.__version__, "ranks": words.ranks}
        with open(words.json, "w") as file:
            json.dump({**facts, "precision": words.precision, **rows, "measured": found}, file, indent=1)
    return 0


TASKS = {"time": time_strategy, "memory": measure_memory, "profile": profile_strategy}

if __name__ == "__main__":
    sys.exit(main())
