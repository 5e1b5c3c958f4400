"""One start of a training command, from the first signal handler to exit code."""

import argparse
import contextlib
import gc
import os
import shlex
import sys
import traceback
from typing import Any

from pipeline.caches import use_private_caches
from pipeline.errors import Interrupted, PeerLost, UserError
from pipeline.runtime import (
    LAUNCHER_SECONDS,
    StopSignal,
    end_hard,
    end_within,
    export_ranks,
    launcher_patience,
    read_accelerate,
    read_ranks,
    survive_a_full_log,
)
from pipeline.text import masked_words, printable

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = EXIT_WORKER_DIED = EXIT_CRASH = 1
END_SECONDS = 60.0  # for a process to end in order once all is saved, or has failed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    from pipeline.config import describe_options, list_configs

    epilog = "\n".join(["configs:", *(f"  {name}" for name in list_configs()), "", "options (key=value):",
                        *describe_options()])  # fmt: skip
    parser = argparse.ArgumentParser(
        prog="train.py", description="Trains a Vision Transformer on WebDataset shards.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    from pipeline.config import CONFIG_FOLDER

    parser.add_argument("--config", default=os.path.join(CONFIG_FOLDER, "digits.yaml"), help="YAML file (digits)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be trained, check the shards, and stop"
    )
    parser.add_argument(
        "--print-run-dir", action="store_true", help="print mode and path of the run directory and stop"
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that override the config's")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parses, builds, fits, closes. Returns 0 (finished, or saved after a signal), 2 (a mistake of the user's) or 1."""
    survive_a_full_log()
    stop = StopSignal().install()
    parsed = parse_arguments(arguments)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        with contextlib.ExitStack() as ending:
            return _train(parsed, stop, ending)
    except UserError as error:
        where = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"rank {rank}: "
        print(f"error: {where}{error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except PeerLost as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_PEER_LOST
    except Exception:  # with its traceback, but without waiting for threads that wait for other ranks
        traceback.print_exc()
        return EXIT_CRASH


def _train(parsed: argparse.Namespace, stop: StopSignal, ending: contextlib.ExitStack) -> int:
    from pipeline.config import load_config

    config = load_config(parsed.config, parsed.overrides)
    assert config.run.dir is not None
    if parsed.print_run_dir:
        if printable(config.run.dir) != config.run.dir:  # the scripts take the last line, and show it
            raise UserError(f"run.dir={config.run.dir!r}: holds control characters; choose another run.dir")
        # For scripts, which need the name as it is: not screened.
        print(config.run.mode, os.path.abspath(config.run.dir), file=sys.__stdout__, flush=True)
        return 0
    ranks = read_ranks(os.environ)
    export_ranks(ranks, os.environ)
    if parsed.dry_run:
        from pipeline.report import dry_run

        stop.uninstall()
        return dry_run(config, ranks)
    use_private_caches(compiles=config.engine.compile != "none" or config.engine.offload_optimizer)
    from pipeline.build import build, explain, finished_evaluation, roll_back, summary
    from pipeline.engine import check_launcher, plan_batch
    from pipeline.health import Rollback
    from pipeline.run_dir import RunDir

    plan = plan_batch(config.data.global_batch_size, config.engine.micro_batch_size, ranks.world_size)
    check_launcher(config.engine, plan, read_accelerate(os.environ))
    patience = launcher_patience(os.environ)
    if ranks.is_main and patience is not None and patience < LAUNCHER_SECONDS / 2:
        print(
            f"warning: the launcher kills ranks that still save {patience:g} s after a signal; where a checkpoint takes"
            f" longer set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={LAUNCHER_SECONDS} for it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    run_dir = RunDir(config.run.dir, config.run.directory_mode)
    run: Any = None
    steps_done = 0  # before `run`
    stop.on_end = lambda reason: run_dir.end("failed", run.trainer.steps_done if run else steps_done, reason)
    try:
        ended = None
        while ended is None:
            run = build(config, ranks, stop, run_dir)
            stop.training = True
            try:
                complete = run.trainer.complete
                ended = ("finished", run.trainer.start_step) if complete else run.trainer.fit()
            except Rollback as spike:
                roll_back(run, spike)
                steps_done, run = spike.first, None
            if run is None:  # outside of the except block, whose traceback holds the run as well
                gc.collect()  # or there would be two models in memory
        status, step = ended
        trainer = run.trainer
        if complete:
            trainer.last_evaluation = finished_evaluation(run_dir)
        # First of all: a launcher that loses patience must find it.
        if trainer.failure is not None:
            run_dir.end("failed", step, f"rank {ranks.rank}: {trainer.failure}")
        elif ranks.is_main and status != "failed":
            reason = "all steps done" if status == "finished" else f"{stop.name or 'a stop on another rank'}"
            run_dir.end("finished" if status == "finished" else "saved: start me again", step, reason)
        ending.callback(end_within(END_SECONDS, EXIT_WORKER_DIED if trainer.failure else 0).cancel)
        trainer.close()
        if ranks.is_main:
            words = ["accelerate", "launch", "pipeline/train.py", "--config", os.path.relpath(parsed.config)]
            command = shlex.join(masked_words([*words, *parsed.overrides]))
            title = "the run is complete:" if complete else ""
            print("\n" + (title + " " if title else "") + summary(run, status, step, command), flush=True)
        run.engine.barrier()  # a launcher ends all ranks after the first that fails
        if trainer.failure is not None:
            print(
                f"error: rank {ranks.rank}: {trainer.failure}, and step {step} is saved; start again to resume",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_WORKER_DIED
        run.engine.close()
        return 0
    except Interrupted:  # on all ranks, before the first step of this start
        if ranks.is_main:
            leave_word(run_dir, stop.name or "a stop on another rank")
        run_dir.close()
        end_hard(0)  # threads may be inside of the store, and nothing is left to do
    except BaseException as error:
        shown = explain(error, config, ranks)
        ending.callback(end_within(END_SECONDS, EXIT_USER_ERROR if isinstance(shown, UserError) else EXIT_CRASH).cancel)
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            run_dir.end("failed", run.trainer.steps_done if run else steps_done, f"rank {ranks.rank}: {shown}")
        if run is not None:
            run.trainer.close(failed=True)
        if shown is not error:
            raise shown from None
        raise
    finally:
        run_dir.close()


def leave_word(run_dir: Any, reason: str) -> None:
    """`exit.json` of a start that was stopped before it opened its run directory."""
    from pipeline.checkpoint import newest_step

    with contextlib.suppress(OSError, UserError, Interrupted):  # another start may be training there
        run_dir.create()
        if run_dir.lease is None:
            run_dir.claim(stopped=lambda: True)
            with contextlib.suppress(FileNotFoundError):
                os.remove(run_dir.file("exit.json"))
        run_dir.end("saved: start me again", newest_step(run_dir.checkpoints), reason)
