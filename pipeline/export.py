"""Exports weights: `python -m pipeline.export RUN_OR_CHECKPOINT --layout timm --out vit.safetensors`."""

import argparse
import sys

from pipeline.checkpoint import load_state, load_weights, require
from pipeline.config import describe_checkpoint
from pipeline.errors import UserError
from pipeline.text import screen_output
from pipeline.weights import check_model, find_checkpoint, write_weights
from vit.weights import LAYOUTS


def export(path: str, layout: str, out: str, ema: bool = False) -> None:
    """Writes the weights of a checkpoint, or of a run's newest one, in a layout; with `ema` their moving average.

    Raises:
        UserError: no whole checkpoint, a layout that can't hold this model, or a path that can't be written.
    """
    path = find_checkpoint(path)
    require(path)
    found = describe_checkpoint(load_state(path), path)
    weights = load_weights(path, ema)
    check_model(found.model, weights)
    write_weights(dict(weights), found.model, layout, out, found.classes)
    print(f"wrote {out}: {found.model.variant} after step {found.step}, layout {layout}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="whose names and shapes")
    parser.add_argument("--out", required=True, help="a .safetensors file; .npz for jax; a folder for hf")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optimizer.ema_decay)")
    parsed = parser.parse_args(arguments)
    try:
        export(parsed.checkpoint, parsed.layout, parsed.out, parsed.ema)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    screen_output()
    sys.exit(main())
