"""Starts runners of a grid by forking: the package is imported once, not by each of them.

It reads a folder a line, and answers with a line: the exit code of a runner on that folder, which
prints to the file that `argv[1]` names. Nothing is computed before the forks, so that each runner
begins as a new process would; what takes seconds to import is imported."""

import os
import sys

import pandas  # noqa: F401
import sitecustomize
import sklearn.datasets  # noqa: F401
import torchvision.models  # noqa: F401

from fisher_unlearn.lab.executors import complete
from fisher_unlearn.lab.experiments import cast, sweep

METHODS = ("fisher_mask", "finetune", "mask_classifier", "random_mask")


def runner(folder, said):
    "What a runner does; it dies where the plan of kills says."
    for stream in (1, 2):
        os.dup2(said, stream)
    sitecustomize.watch_if_told()
    complete(sweep("smoke", cast(*METHODS), device="cpu"), folder, on="inline")


for line in sys.stdin:
    said = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if not (child := os.fork()):
        code = 1
        try:
            runner(line.strip(), said)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(said)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
