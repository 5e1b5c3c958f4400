"""The training command: `accelerate launch pipeline/train.py [--config configs/X.yaml] [key=value ...]`."""

import os
import signal

# From here on a signal waits, until the session takes it: a batch system may send it in the first second.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))

from pipeline.runtime import end_within  # noqa: E402
from pipeline.session import END_SECONDS, main  # noqa: E402

if __name__ == "__main__":
    code = main()
    if code:
        os._exit(code)  # the other ranks may hang in a collective: leave without waiting for them
    end_within(END_SECONDS, code)  # a library's thread may hang
