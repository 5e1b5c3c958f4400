"""The training command, which also says which threads the process had whenever it forked."""

import json
import os
import threading

from pipeline.session import main

forks: list[list[str]] = []
os.register_at_fork(before=lambda: forks.append([thread.name for thread in threading.enumerate()]))
code = main()
print("threads at forks:", json.dumps(forks))
os._exit(code)
