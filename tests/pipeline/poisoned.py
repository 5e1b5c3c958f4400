"""The training command with one poisoned batch: `poisoned.py STEP WORDS...`, with STEP counted from 0.

Whenever the samples of that step come, their loss is a hundred times as large, as a batch of bad data may have it.
"""

import sys

from pipeline import build, session

poisoned: list[str] = []


def build_poisoned(*arguments):
    run = assemble(*arguments)
    objective, wanted = run.trainer.objective, int(sys.argv[1])
    train_step = run.trainer.step

    def step(number, batch, valid_rows):
        factor = 100.0 if number == wanted else 1.0

        def harmful(model, inputs):
            loss_sum, values = objective(model, inputs)
            return loss_sum * factor, {**values, "loss": values["loss"] * factor}

        run.trainer.objective = harmful
        return train_step(number, batch, valid_rows)

    run.trainer.step = step
    return run


assemble, build.build = build.build, build_poisoned
sys.exit(session.main(sys.argv[2:]))
