"""Evaluates a checkpoint: `python -m pipeline.evaluate CHECKPOINT --data URLS` (or `--config FILE`).

Model, labels and preprocessing come from the checkpoint. What is read comes from the user: a checkpoint may be a
stranger's, and could name commands, servers or files that nobody meant to touch.
"""

import argparse
import contextlib
import csv
import json
import os
import sys

import torch

from pipeline import checkpoint
from pipeline.config import describe_checkpoint, load_data_config
from pipeline.data.index import load_index
from pipeline.data.loader import DataConfig, Loader, evaluation_stream
from pipeline.data.source import Source
from pipeline.engine import load_weights
from pipeline.errors import UserError, WorkerDied
from pipeline.runtime import Ranks
from pipeline.text import csv_cell, screen_output, shown
from pipeline.trainer import normalised
from pipeline.weights import check_model, find_checkpoint
from vit.model import ViT


@torch.no_grad()
def evaluate(path: str, data: DataConfig, predictions: str | None, workers: int, ema: bool = False) -> dict[str, float]:
    """Counts every sample of `data.val` once; writes one CSV line a sample where asked for.

    Raises:
        UserError: no whole checkpoint, bad shards, or no place for the predictions.
    """
    from tqdm import tqdm

    if predictions:
        check_writable(predictions)
    path = find_checkpoint(path)
    checkpoint.require(path)
    found = describe_checkpoint(checkpoint.load_state(path), path)
    names = found.classes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = checkpoint.load_weights(path, ema)
    check_model(found.model, weights)
    model = ViT(found.model)
    load_weights(model, weights)
    model.to(device).eval()
    index = load_index(data.val, folder=data.index, source=Source(data.read))
    size, classes = found.model.image_size, found.model.num_classes
    alone = Ranks(0, 1, 0, 1)
    loader = Loader(evaluation_stream(data, index, found.preprocessing, size, classes, alone), workers, device)
    sums: dict[str, float] = {}
    rows: list[list] = []
    with contextlib.closing(loader), tqdm(total=index.samples, unit="image") as bar:
        for batch in loader:
            logits = model(normalised(batch, torch.float32).images)
            for name, value in found.objective(lambda _, logits=logits: logits, batch)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if predictions:
                probabilities, best = logits.softmax(1).max(1)
                for row in batch.valid.nonzero()[:, 0].tolist():
                    label, guess = int(batch.labels[row]), int(best[row])
                    named = [names[n] if n < len(names) else str(n) for n in (label, guess)]
                    cells = map(csv_cell, (batch.keys[row], *named))
                    rows.append([next(cells), label, guess, *cells, f"{float(probabilities[row]):.6f}"])
            for bad in batch.bad:
                print(f"bad sample, not counted: {shown(f'{bad.where}: {bad.reason}')}", file=sys.stderr)
            bar.update(batch.valid_rows)
    if predictions:
        with open(predictions, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "label", "prediction", "label_name", "prediction_name", "probability"])
            writer.writerows(rows)
    count = sums.pop("count")
    return {**{f"val/{name}": value / count for name, value in sums.items()}, "val/count": count}


def choose_data(path: str, urls: list[str] | None, config: str | None, overrides: list[str]) -> DataConfig:
    """What the user wants to read: the shards of --data, or those of --config.

    Raises:
        UserError: neither names any.
    """
    data = load_data_config(config, overrides if urls is None else [*overrides, f"data.val={json.dumps(urls)}"])
    if not data.val and config is None:
        known = os.path.join(path, "config.yaml")
        hint = f"; if you have trained this run yourself: --config {known}" if os.path.isfile(known) else ""
        raise UserError(
            f"{path}: name the shards to evaluate on, by --data URL or by --config FILE{hint}. A checkpoint's own"
            " sources are not used: one from somebody else could name commands and servers"
        )
    if not data.val:
        raise UserError(f"{config}: data.val names no shards; name some by --data")
    return data


def check_writable(path: str) -> None:
    """Raises UserError where no file can be written at `path`: before minutes of evaluation."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        found = "is a folder" if os.path.isdir(path) else f"there is no folder {folder}"
        raise UserError(f"--predictions {path}: {found}; name a file in a folder that exists")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--predictions {path}: no permission to write there; name another file")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("--data", nargs="+", metavar="URL", help="shards; default: data.val of --config")
    parser.add_argument("--config", metavar="FILE", help="your config, whose section data says what is read, and how")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="options of data, as in training"
    )
    parser.add_argument("--predictions", metavar="FILE.csv", help="write label and prediction of every sample")
    parser.add_argument("--workers", type=int, default=2, help="processes that read and decode (2)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optimizer.ema_decay)")
    parsed = parser.parse_args(arguments)
    try:
        data = choose_data(parsed.checkpoint, parsed.data, parsed.config, parsed.overrides)
        found = evaluate(parsed.checkpoint, data, parsed.predictions, parsed.workers, parsed.ema)
        for name, value in found.items():
            print(f"{name} {value:.6g}")
    except (UserError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
