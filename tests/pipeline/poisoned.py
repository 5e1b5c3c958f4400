"""The training command with poisoned batches: `poisoned.py STEP[,STEP...] WORDS...`, with steps counted from 0.

Whenever the samples of such a step come, their loss is a hundred times as large, as a batch of bad data may have it.
Before each build it prints what is left of the runs before.
"""

import sys
import weakref

from pipeline import build, session

wanted = [int(step) for step in sys.argv[1].split(",")]
earlier: list[tuple[str, weakref.ref]] = []


def build_poisoned(*arguments):
    print("left in memory:", ", ".join(name for name, part in earlier if part() is not None) or "nothing", flush=True)
    run = assemble(*arguments)
    parts = {"module": run.engine.module, "model": run.engine.model, "optimizer": run.engine.torch_optimizer()}
    parts |= {"engine": run.engine, "trainer": run.trainer, "ring": run.trainer.train.ring, "saver": run.trainer.saver}
    earlier.extend((name, weakref.ref(part)) for name, part in parts.items())
    trainer, objective, train_step = run.trainer.__class__, run.trainer.objective, run.trainer.__class__.step

    def step(self, number, batch, valid_rows):
        factor = 100.0 if number in wanted else 1.0

        def harmful(model, inputs):
            loss_sum, values = objective(model, inputs)
            return loss_sum * factor, {**values, "loss": values["loss"] * factor}

        self.objective = harmful
        return train_step(self, number, batch, valid_rows)

    if not hasattr(trainer, "poisoned"):
        trainer.step, trainer.poisoned = step, True
    return run


assemble, build.build = build.build, build_poisoned
sys.exit(session.main(sys.argv[2:]))
