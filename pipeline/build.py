"""The only assembler: RunConfig -> Run."""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.config import RunConfig, fixed_options, to_tree, to_yaml
from pipeline.data.digits import TRAIN, write_digits
from pipeline.data.index import Index, expand_urls, load_index, read_classes
from pipeline.data.loader import Loader, evaluation_stream, train_stream
from pipeline.data.mix import check_blocks
from pipeline.data.source import Source, is_local
from pipeline.engine import BatchPlan, Engine, EngineConfig, plan_batch
from pipeline.errors import Interrupted, PeerLost, UserError, is_out_of_memory
from pipeline.health import Health, Rollback, SpikeDetector
from pipeline.ledger import Ledger
from pipeline.meeting import StopNews
from pipeline.metrics import Sums
from pipeline.monitor.jsonl import HEALTH, Lines, read_lines, restore_logs
from pipeline.monitor.meter import Meter, peak_flops
from pipeline.monitor.sink import Sinks
from pipeline.optimizer import build_optimizer
from pipeline.run_dir import RunDir
from pipeline.runtime import Ranks, StopSignal, Vote, be_deterministic, read_rendezvous
from pipeline.schedule import learning_rate
from pipeline.text import MASK, masked_tree
from pipeline.trainer import Trainer, is_complete
from pipeline.watchdog import Watchdog
from pipeline.weights import fit_weights
from pipeline.zero import ZeroEngine
from vit.model import ViT, ViTConfig, training_flops


@dataclass
class Run:
    """A run that is ready to train, with what belongs to it outside of the loop."""

    config: RunConfig
    ranks: Ranks
    engine: Engine
    run_dir: RunDir
    trainer: Trainer


def prepare_data(config: RunConfig, ranks: Ranks) -> None:
    """Writes the embedded data set where the config asks for it; rank 0 only, and never into a folder with files."""
    if config.data.prepare != "digits" or not ranks.is_main or not config.data.train:
        return
    folders = {os.path.dirname(url) for url in expand_urls(config.data.train)}
    names = [os.path.basename(url) for url in expand_urls(config.data.train)]
    folder = folders.pop()
    if folders or names != expand_urls(TRAIN) or not folder or not is_local(folder):
        return  # other shards than those that would be written
    if not os.path.isdir(folder) or not os.listdir(folder):
        partial = f"{folder}.part-{uuid.uuid4().hex[:8]}"  # another start may be doing the same
        write_digits(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            shutil.rmtree(partial)
            if not os.path.isdir(folder):
                raise


def check_labels(index: Index, num_classes: int, max_bad_fraction: float) -> None:
    """Raises UserError for a shard whose labels the model has no output for, and for too many bad samples."""
    for shard in index.shards:
        if shard.labels[1] >= num_classes:
            raise UserError(
                f"{shard.url}: label {shard.labels[1]} is out of range: model.num_classes={num_classes};"
                f" set model.num_classes={shard.labels[1] + 1} or mend the shard"
            )
    bad = [shard for shard in index.shards if shard.bad]
    count = sum(shard.bad for shard in bad)
    if count > max_bad_fraction * index.samples:
        raise UserError(
            f"{bad[0].url}: {bad[0].bad} samples without an image or without a class as a whole number in a member cls"
            f" ({count} in all shards; data.max_bad_fraction={max_bad_fraction:g} allows"
            f" {int(max_bad_fraction * index.samples)}); mend them (python -m pipeline.shards verify lists them), or"
            " raise data.max_bad_fraction to train on with such rows masked"
        )


def find_train_index(config: RunConfig, ranks: Ranks, source: Source) -> Index | None:
    """The training shards' index, checked; None where shards are drawn with replacement."""
    if config.data.resampled:
        if config.run.steps is None:
            raise UserError("run.epochs: data.resampled=true has no epochs; set run.steps and run.epochs=null")
        return None
    # One rank asks for the sizes of all shards: a thousand that ask at once would be hard on the file system.
    index = load_index(config.data.train, ranks.is_main, config.data.index, source)
    check_labels(index, config.model.num_classes, config.data.max_bad_fraction)
    return index


def build_engine(config: EngineConfig, plan: BatchPlan, ranks: Ranks) -> Engine:
    return (Engine if config.zero_stage is None else ZeroEngine)(config, plan, ranks)


def build_model(config: ViTConfig, execution: EngineConfig, seed: int) -> ViT:
    """The model with its initial weights, the same on every rank."""
    with torch.device("meta"):
        model = ViT(config, fused=execution.fused, activation_checkpointing=execution.activation_checkpointing)
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def compile_model(model: ViT, what: str, backend: str = "inductor") -> None:
    """Compiles each block, or the whole forward pass, at its first call; names in the state dict stay.

    What is compiled is `forward`, not the module's call: ZeRO-3 gathers weights in hooks that can't be compiled.
    """
    modules: dict[str, Iterable[nn.Module]] = {"none": [], "block": model.blocks, "model": [model]}
    for module in modules[what]:
        module.forward = torch.compile(module.forward, fullgraph=True, backend=backend)


def identity(config: RunConfig, index: Index | None) -> dict[str, Any]:
    """What must stay the same through a run's life: all options that may not change, and the data itself."""
    fixed = {key: value for key, value in fixed_options(config) if not key.startswith("monitor")}
    fixed = masked_tree(fixed)  # URLs that are signed anew name the same data
    if index is None:
        return {**fixed, "data.train": masked_tree(config.data.train)}
    return {**fixed, "data.train (names, sizes and counts of the shards)": index.identity()}


def unless_stopped(engine: Engine, read: Callable[[], Any]) -> Any:
    """What `read` returns, which a stop request may interrupt. Collective.

    Raises:
        Interrupted: on all ranks, where it was on one.
    """
    found, stopped = None, False
    try:
        found = read()
    except Interrupted:
        stopped = True
    if any(engine.gather_objects(stopped)):
        raise Interrupted
    return found


def build(config: RunConfig, ranks: Ranks, stop: StopSignal, run_dir: RunDir) -> Run:
    """Checks everything that can be checked, joins the ranks, loads the newest checkpoint.

    Raises:
        UserError: a mistake of the user's, before anything is trained or overwritten.
        Interrupted: a stop, while indices were read.
    """
    plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, ranks.world_size)
    check_blocks(config.mix, plan.micro_batch, plan.micro_batch * plan.accumulation)
    settings = be_deterministic() if config.run.deterministic else {}
    engine = build_engine(config.engine, plan, ranks)
    if ranks.is_main:
        prepare_data(config, ranks)
    engine.barrier()
    news = StopNews(stop, ranks, read_rendezvous(os.environ))
    source = Source(config.data.read, stop=news.wanted)
    index, classes = unless_stopped(
        engine, lambda: (find_train_index(config, ranks, source), read_classes(config.data.train, source))
    )
    model = build_model(config.model, config.engine, config.run.seed)
    if config.model.init_from is not None and not checkpoint.has_any(run_dir.checkpoints):
        model.load_state_dict(fit_weights(model, config.model.init_from, config.model.new_head))
    epoch_rows = index.samples * config.data.repeats if index else None
    total_steps = config.run.total_steps(epoch_rows or 0, plan.global_batch)
    unless_stopped(engine, lambda: run_dir.open(identity(config, index), stop.wanted) if ranks.is_main else None)
    if ranks.is_main:
        stop.watch(run_dir.file("STOP"))
    lease_path = engine.gather_objects(None if run_dir.lease is None else run_dir.lease.path)[0]
    run_dir.join(lease_path)
    assert run_dir.lease is not None
    store = checkpoint.Store(run_dir.checkpoints, run_dir.lease.check)
    start_step, state, facts = restore(store, engine, ranks)
    logs = facts.get("logs", {})
    skipped = run_dir.read("skipped.json") or []
    on_main(engine, lambda: restore_logs(run_dir.path, logs, start_step, steps_left_out(skipped)))
    evaluation_due = facts.get("evaluation_due", False)
    writes = ranks.is_main and not is_complete(start_step, total_steps, evaluation_due)
    stream = train_stream(
        config.data, index, config.augment.train, config.model.image_size, config.model.num_classes,
        config.run.seed, ranks, start_step,
    )  # fmt: skip
    train = Loader(stream, config.data.workers, engine.device, news.wanted)
    val, val_samples = unless_stopped(engine, lambda: build_evaluation(config, engine, ranks, news))
    devices = engine.device_names()
    if writes:
        run_dir.lease.check()
        run_dir.start(to_yaml(config), classes, devices, settings)
    compile_model(model, config.engine.compile)
    optimizer = build_optimizer(model, config.optimizer, config.schedule.peak_lr)
    engine.prepare(model, optimizer, state, config.optimizer.ema_decay)
    sinks = Sinks()
    if writes:
        sinks.sinks = [sink.open(run_dir.path, start_step, total_steps) for sink in config.monitor]
        sinks.text("config", to_yaml(config))
    peak = peak_flops(torch.cuda.get_device_name()) if engine.device.type == "cuda" else None
    named = {"config": masked_tree(to_tree(config)), "classes": classes}
    saver = checkpoint.Saver(config.checkpoint, store, engine, named, run_dir.lease)
    interval = facts.get("interval", {"sums": {}, "grad_norm": None})
    saved = facts.get("health", {"counts": {}, "spikes": None})
    counts = dict(saved["counts"])
    spikes = max((entry.get("spikes", 0) for entry in skipped), default=0)  # the checkpoint is older than the last ones
    if spikes:
        counts["spikes"] = max(spikes, counts.get("spikes", 0))
    detector = SpikeDetector.resume(config.health, saved["spikes"])
    health = Health(config.health, engine, detector, Lines(run_dir.file(HEALTH)), counts, devices)
    watchdog = Watchdog(
        config.health.hang_seconds, ranks, read_rendezvous(os.environ), run_dir.path,
        reading=lambda: trainer.reading(),
        on_hang=lambda message: run_dir.end("failed", trainer.steps_done, message),
    )  # fmt: skip
    growth = watchdog.growth  # and not the run, which a rollback gives up
    stop.progress = lambda: growth.grew
    trainer = Trainer(
        settings=config.run,
        engine=engine,
        objective=config.objective,
        mix=config.mix,
        num_classes=config.model.num_classes,
        schedule=lambda step: learning_rate(step, total_steps, config.schedule),
        train=train,
        val=val,
        sinks=sinks,
        meter=Meter(training_flops(config.model), peak, ranks.world_size),
        vote=Vote(stop, ranks, saver.wanted, saver.needs_all_ranks, config.engine.timeout_seconds),
        health=health,
        watchdog=watchdog,
        news=news,
        ledger=Ledger(
            engine,
            run_dir.path,
            config.data.max_bad_fraction,
            config.data.log_samples,
            index.samples if index else None,
            val_samples,
        ),
        saver=saver,
        lease=run_dir.lease,
        averaged_model=(lambda: averaged_model(config, engine)) if config.optimizer.ema_decay is not None else None,
        skips=[(entry["first"], entry["last"]) for entry in skipped],
        profiler=build_profiler(config, run_dir) if ranks.is_main else None,
        class_names=classes or [],
        start_step=start_step,
        total_steps=total_steps,
        epoch_rows=epoch_rows,
        val_samples=val_samples,
        steps_done=start_step,
        last_evaluation=facts.get("evaluation", {}),
        evaluated_step=start_step,
        evaluation_due=evaluation_due,
        sums=Sums.resume(engine, interval["sums"]),
        grad_norm=interval["grad_norm"],
        logs=logs,
    )
    return Run(config, ranks, engine, run_dir, trainer)


def averaged_model(config: RunConfig, engine: Engine) -> ViT:
    """A model with the moving average of the weights, on each rank's device. Collective."""
    model = build_model(config.model, config.engine, config.run.seed)
    model.load_state_dict(engine.averaged_weights())
    return model.to(engine.device, engine.input_dtype)


def roll_back(run: Run, spike: Rollback) -> None:
    """Closes a run so that the next `build` goes on at its last checkpoint before a spike, whose steps are left out."""
    run.trainer.vote.drain()
    run.trainer.close()
    if run.ranks.is_main:
        run.trainer.lease.check()
        known = run.run_dir.read("skipped.json") or []
        spikes = run.trainer.health.counts["spikes"]  # so far: the checkpoint that is gone back to knows of fewer
        entry = {"first": spike.first, "last": spike.last, "reason": spike.reason, "spikes": spikes}
        run.run_dir.write("skipped.json", [*known, entry])
        run.trainer.saver.store.discard_after(spike.first)
    run.engine.barrier()
    run.trainer.saver.close()
    run.trainer.watchdog.growth.stop()
    run.engine.release()


def build_evaluation(config: RunConfig, engine: Engine, ranks: Ranks, news: StopNews) -> tuple[Loader | None, int]:
    """The loader of the validation samples, and their number."""
    if not config.data.val:
        return None, 0
    source = Source(config.data.read, stop=news.wanted)
    index = load_index(config.data.val, ranks.is_main, config.data.index, source)
    check_labels(index, config.model.num_classes, config.data.max_bad_fraction)
    size, classes = config.model.image_size, config.model.num_classes
    stream = evaluation_stream(config.data, index, config.augment.val, size, classes, ranks)
    return Loader(stream, config.data.workers, engine.device, news.wanted), index.samples


def restore(store: checkpoint.Store, engine: Engine, ranks: Ranks) -> tuple[int, Any, dict[str, Any]]:
    """The step to go on from, and state and facts of the newest intact checkpoint.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    path = on_main(engine, store.find_newest)
    if path is None:
        return 0, None, {}
    if ranks.is_main:
        print(f"resuming from {path}", flush=True)
    facts = checkpoint.load_state(path)
    return facts["step"], checkpoint.load(path), facts


def steps_left_out(skipped: list[dict[str, Any]]) -> set[int]:
    """Those that skipped.json names, counted from 1 as in the logs."""
    return {step + 1 for entry in skipped for step in range(entry["first"], entry["last"] + 1)}


def on_main(engine: Engine, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, which reads and checks for all. Collective.

    Raises:
        UserError: on all ranks, where `action` has raised it, or an OSError.
    """
    found, problem = None, None
    if engine.ranks.is_main:
        try:
            found = action()
        except (UserError, OSError) as error:
            problem = str(error)
    found, problem = engine.gather_objects((found, problem))[0]
    if problem is not None:
        raise UserError(problem)
    return found


def build_profiler(config: RunConfig, run_dir: RunDir) -> Any:
    """A torch profiler for the configured steps, written where TensorBoard and Perfetto open it."""
    wanted = config.run.profile
    if wanted.steps == 0:
        return None
    from torch import profiler

    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    write_trace = profiler.tensorboard_trace_handler(run_dir.file("profile"))

    def ready(finished: Any) -> None:
        write_trace(finished)
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(run_dir.file("profile/memory_snapshot.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    skip = max(wanted.start_step - 1, 0)
    plan = profiler.schedule(wait=0, skip_first=skip, warmup=1, active=wanted.steps, repeat=1)
    recorder = profiler.profile(activities=activities, schedule=plan, on_trace_ready=ready)
    recorder.start()
    return recorder


def explain(error: BaseException, config: RunConfig, ranks: Ranks) -> BaseException:
    """The user's version of running out of memory and of losing another rank; any other error as it is."""
    text = str(error)
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error) and torch.cuda.is_available():
        return UserError(
            f"rank {ranks.rank}: out of host memory ({text or type(error).__name__}); set data.workers or"
            " data.shuffle_pool lower, or give the job more memory; earlier checkpoints are whole"
        )
    if isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error):
        plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, ranks.world_size)
        half = max(plan.micro_batch // 2, 1)
        return UserError(
            f"out of memory with engine.micro_batch_size={plan.micro_batch}; set engine.micro_batch_size={half}"
            f" (the global batch stays {plan.global_batch}); earlier checkpoints are whole"
        )
    # gloo's and NCCL's words for a connection that the other side closed
    if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer|remote process exited", text):
        return PeerLost("another rank ended and this one can't go on; its own message says why")
    if isinstance(error, RuntimeError) and re.search(r"Timed out waiting|Connection timed out|No route to host", text):
        return PeerLost(
            f"no answer from another rank within engine.timeout_seconds={config.engine.timeout_seconds}: it hangs, or"
            " the network between them is down; start again to resume"
        )
    return error


def summary(run: Run, status: str, step: int, command: str) -> str:
    """What a finished run says of itself."""
    trainer, path = run.trainer, run.run_dir.path
    lines = [f"{status} after step {step} of {trainer.total_steps}"]
    if "val/top1" in trainer.last_evaluation:
        found = trainer.last_evaluation
        lines.append(f"  held-out top-1  {found['val/top1']:.2%} of {found['val/count']:.0f} images")
        if "val_ema/top1" in found:
            lines.append(f"  of the average  {found['val_ema/top1']:.2%}")
    if trainer.meter.total_seconds:
        lines.append(f"  speed           {trainer.meter.total_images / trainer.meter.total_seconds:.0f} images/s")
    lines += [
        f"  run directory   {path}",
        f"  TensorBoard     tensorboard --logdir {path}",
        f"  resume          {command}",
    ]
    if MASK in command:
        lines.append(f"                  (put your secrets where {MASK} stands)")
    return "\n".join(lines)


def finished_evaluation(run_dir: RunDir) -> dict[str, float]:
    """The last evaluation in a run's metrics, for a run that was complete already."""
    found: dict[str, float] = {}
    for values in read_lines(run_dir.file("metrics.jsonl")):
        found = {k: v for k, v in values.items() if k.startswith("val")} or found
    return found
