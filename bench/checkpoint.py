"""What a checkpoint costs the training: ours beside torch.save and torch's dcp.async_save.

    python bench/checkpoint.py                       # two processes, DDP and ZeRO-0 to 3, ViT-S; 6 minutes on two cores
    python bench/checkpoint.py --ranks 1 --only ddp --width 768     # one process, ViT-B

It starts torchrun itself. All save the same numbers: fp32 weights and both moments of AdamW.

- ours: `Saver.save`: copies, then writes, syncs and checksums in the background.
- torch.save: training waits for it. Under DDP rank 0 writes everything, as most scripts do; under ZeRO each rank writes
  its partition. It does not sync the disk, and has no checksums.
- dcp.async_save: torch.distributed.checkpoint's, in a thread, on a process group of its own; under ZeRO each rank gives
  it its partition under names of its own. No sync, no checksums.
- none: nothing is saved.

They take turns (A B C D, D C B A); a figure is the median over rounds, a ratio compares visits of one round.
`stall` is how long the call keeps the slowest rank from training. `copy` is a plain copy, into new memory, of the
tensors of which ours keeps one: what training can't be spared. `next steps` is the speed of the 20 steps that follow,
while the checkpoint is being written, as a share of the speed with nothing to write. `background` is how long it took
from the call to the whole checkpoint, steps included. `load` reads all of it back into host memory on rank 0; `verify`
compares all checksums.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from ranks import STRATEGIES, clock, close_run, join, launch, leave, open_run, parser_for, spread, state_tensors
from torch import Tensor

from pipeline import checkpoint
from pipeline.build import Run
from pipeline.data.loader import Batch
from pipeline.runtime import Ranks

PEERS = ("torch.save", "dcp.async_save")


def partition(run: Run) -> dict[str, Any]:
    """The weights and moments that lie on this rank, as a peer would save them."""
    engine, rank = run.engine, run.ranks.rank
    if run.config.engine.zero_stage in (None, 0):
        return {"model": engine.module.state_dict(), "optimizer": engine.torch_optimizer().state_dict()}
    held = state_tensors(engine.module, engine.torch_optimizer())
    kinds = ("master" if held["master"] else "weights", "moments")
    return {f"rank{rank}.{kind}.{n}": t for kind in kinds for n, t in enumerate(held[kind])}


@dataclass
class Way:
    """A way to save, and what was measured of it."""

    name: str
    save: Callable[[str, int], Any]  # (path, step); returns when training may go on
    wait: Callable[[], Any]  # until the checkpoint is whole
    load: Callable[[str], Any]
    stalls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # seconds of the steps that follow
    whole: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)


def ways(run: Run) -> list[Way]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    engine, saver = run.engine, run.trainer.saver
    whole_on_main = run.config.engine.zero_stage in (None, 0)
    group = dist.new_group(backend="gloo")  # dcp.async_save wants one of CPUs, beside NCCL's
    pending: list[Any] = []

    def plain(path: str, step: int) -> None:
        os.makedirs(path, exist_ok=True)
        if run.ranks.is_main or not whole_on_main:
            torch.save(partition(run), f"{path}/{run.ranks.rank}.pt")
        engine.barrier()

    def plain_load(path: str) -> None:
        for name in os.listdir(path):
            torch.load(f"{path}/{name}", weights_only=True)

    def background(path: str, step: int) -> None:
        pending.append(dcp.async_save(partition(run), checkpoint_id=path, process_group=group))

    def background_wait() -> None:
        pending.pop().result()

    def background_load(path: str) -> None:
        dcp.load(empty_like(dcp.FileSystemReader(path).read_metadata()), checkpoint_id=path, no_dist=True)

    def our_load(path: str) -> list[Tensor]:
        state = checkpoint.load(path)  # which maps the files: only a copy reads them
        return [t.clone() for part in (state.weights, *state.moments.values()) for t in part.values()]

    return [
        Way("none", lambda path, step: None, lambda: None, lambda path: None),
        Way("ours", lambda path, step: saver.save(step, {"evaluation": {}}), saver.finish, our_load),
        Way("torch.save", plain, lambda: None, plain_load),
        Way("dcp.async_save", background, background_wait, background_load),
    ]


def empty_like(metadata: Any) -> dict[str, Tensor]:
    """Tensors for all that a checkpoint of dcp holds."""
    found = {}
    for name, value in metadata.state_dict_metadata.items():
        if hasattr(value, "size"):
            found[name] = torch.empty(value.size, dtype=value.properties.dtype)
    return found


def copy_seconds(run: Run) -> tuple[float, int]:
    """Of a plain copy of what ours keeps of this rank, and its bytes."""
    state = run.engine.state()
    tensors = [*state.weights.values(), *(t for kept in state.moments.values() for t in kept.values())]
    run.engine.barrier()
    began = clock(run.engine.device)
    copies = [t.clone() for t in tensors]
    seconds = clock(run.engine.device) - began
    return seconds, sum(t.nbytes for t in copies)


def train(run: Run, batch: Batch, first: int, steps: int) -> float:
    """Seconds of so many steps."""
    began = clock(run.engine.device)
    for step in range(first, first + steps):
        run.trainer.vote.start(batch.valid_rows)
        run.trainer.step(step, batch, run.trainer.vote.finish().valid_rows)
    return clock(run.engine.device) - began


def measure(words: Any, strategy: str, ranks: Ranks) -> dict[str, Any]:
    stage = STRATEGIES[strategy]
    run = open_run(words.worker, ranks, [
        "model.patch_size=8", f"model.width={words.width}", f"model.depth={words.depth}",
        f"model.heads={max(words.width // 64, 1)}", f"model.mlp_dim={4 * words.width}",
        f"data.global_batch_size={words.rows * words.ranks}", f"engine.precision={words.precision}",
        f"engine.zero_stage={'null' if stage is None else stage}",
    ])  # fmt: skip
    engine, batch = run.engine, next(iter(run.trainer.train))
    step, copies, checks, size = 0, [], [], 0
    contenders = ways(run)
    train(run, batch, step, 3)
    for number in range(-1, words.rounds):  # the first round only warms up
        if number >= 0:
            seconds, share = copy_seconds(run)
            copies.append(max(engine.gather_objects(seconds)))
            size = sum(engine.gather_objects(share))
        for way in contenders if number % 2 == 0 else contenders[::-1]:
            step += words.next_steps
            path = os.path.join(words.worker, f"{strategy}-{way.name}-{step}")
            if way.name == "ours":
                path = os.path.join(run.run_dir.checkpoints, f"step-{step:08d}")
            if ranks.is_main:
                os.sync()  # nobody pays for what another has left to be written
            engine.barrier()
            began = time.perf_counter()
            way.save(path, step)
            stall = clock(engine.device) - began
            spent = train(run, batch, step, words.next_steps)
            way.wait()
            whole = time.perf_counter() - began
            engine.barrier()
            load, check = 0.0, 0.0
            if ranks.is_main and way.name != "none":
                began = time.perf_counter()
                way.load(path)
                load = time.perf_counter() - began
            if ranks.is_main and way.name == "ours":
                began = time.perf_counter()
                wrong = checkpoint.verify(path)
                check = time.perf_counter() - began
                if wrong is not None:
                    raise RuntimeError(f"{path}: {wrong}")
            engine.barrier()
            if ranks.is_main and way.name in PEERS:
                shutil.rmtree(path)
            if number < 0:
                continue
            found = engine.gather_objects((stall, spent, whole))
            for values, value in zip(
                (way.stalls, way.steps, way.whole), map(max, zip(*found, strict=True)), strict=True
            ):
                values.append(value)
            way.loads.append(load)
            checks += [check] if way.name == "ours" else []
    close_run(run)
    return {
        "strategy": strategy,
        "mib": size / 2**20,
        "copy": copies,
        "verify": checks,
        "ways": {w.name: {"stall": w.stalls, "next": w.steps, "whole": w.whole, "load": w.loads} for w in contenders},
    }


def report(words: Any, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints the table. Returns its rows."""
    rows = []
    print(
        f"\n{words.ranks} ranks, medians of {words.rounds} rounds; ms, quartiles in brackets; the state of all ranks\n"
    )
    print("| | state | copy | way | stall | to the copy | to torch.save | next steps | background | load | verify |")
    print("|---" * 11 + "|")
    for found in measured:
        copy, all_ways = found["copy"], found["ways"]
        for name in ("ours", *PEERS):
            own = all_ways[name]
            low, middle, high = spread(own["stall"])
            pairs = zip(own["stall"], all_ways["torch.save"]["stall"], copy, strict=True)
            to_peer, to_copy = (
                spread(values)[1] for values in zip(*((s / peer, s / c) for s, peer, c in pairs), strict=True)
            )
            kept = spread([n / w for n, w in zip(all_ways["none"]["next"], own["next"], strict=True)])
            row = {
                "strategy": found["strategy"], "way": name, "state_mib": found["mib"],
                "copy_seconds": spread(copy)[1], "stall_seconds": middle, "stall_to_copy": to_copy,
                "stall_to_torch_save": to_peer, "next_steps_speed": kept[1],
                "background_seconds": spread(own["whole"])[1], "load_seconds": spread(own["load"])[1],
                "verify_seconds": spread(found["verify"])[1] if name == "ours" else None,
            }  # fmt: skip
            rows.append(row)
            verify = f"{1000 * row['verify_seconds']:.0f}" if name == "ours" else "-"
            print(
                f"| {found['strategy']} | {found['mib']:.0f} MiB | {1000 * row['copy_seconds']:.0f} | {name}"
                f" | {1000 * middle:.0f} ({1000 * low:.0f} to {1000 * high:.0f}) | {to_copy:.2f} | {to_peer:.2f}"
                f" | {kept[1]:.1%} ({kept[0]:.1%} to {kept[2]:.1%}) | {1000 * row['background_seconds']:.0f}"
                f" | {1000 * row['load_seconds']:.0f} | {verify} |"
            )
    return rows


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="turns of all ways (6)")
    parser.add_argument("--next-steps", type=int, default=20, help="steps that are timed after each save (20)")
    parser.add_argument("--rows", type=int, default=2, help="images of a rank's step (2)")
    parser.add_argument("--width", type=int, default=384, help="of the model (384, ViT-S)")
    parser.add_argument("--depth", type=int, default=12, help="of the model (12)")
    words = parser.parse_args()
    if words.quick:
        words.rounds, words.next_steps, words.width, words.depth = 1, 2, 64, 1
    if words.worker:
        ranks = join()
        figures = measure(words, words.only[0], ranks)
        if ranks.is_main:
            leave(words.worker, figures)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        measured = []
        for strategy in words.only:
            print(strategy, file=sys.stderr, flush=True)
            measured.append(launch(__file__, [*sys.argv[1:], "--only", strategy], words.ranks, folder))
    rows = report(words, measured)
    if words.json:
        facts = {
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "ranks": words.ranks,
            "precision": words.precision,
        }
        with open(words.json, "w") as file:
            json.dump({**facts, "rows": rows, "measured": measured}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
