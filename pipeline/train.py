"""The training command: `accelerate launch pipeline/train.py [--config configs/X.yaml] [key=value ...]`."""

import os
import signal

# From here on a signal waits, until the session takes it: a batch system may send it in the first second.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))

from pipeline.session import main  # noqa: E402

if __name__ == "__main__":
    code = main()
    if code:
        os._exit(code)  # the other ranks may hang in a collective: leave without waiting for them
