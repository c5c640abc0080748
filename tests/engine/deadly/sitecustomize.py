"""Makes prompts deadly, in every Python process that has this folder on its path: models heed what they say.

    SIGSEGV, SIGKILL, exit     the process ends while a batch with such a prompt is computed
    raise                      an error

As long as there is a file at ``HOLD_BACK`` a batch takes half a second; ``DEADLY_LOAD`` ends processes that load.
"""

import ctypes
import importlib.util
import os
import signal
import sys
import time
from importlib.abc import MetaPathFinder

MODELS = {
    "sdbatch.diffusion.pipeline": ("LatentDiffusion", "generate"),
    "sdbatch.engine.models.null": ("NullModel", "draw"),
}


def heeding(compute):
    def wrapped(self, batch, *arguments, **settings):
        if os.path.exists(os.environ.get("HOLD_BACK", "")):
            time.sleep(0.5)
        for prompt in (getattr(request, "prompt", request) or "" for request in batch):
            if "SIGSEGV" in prompt:
                ctypes.string_at(0)
            if "SIGKILL" in prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if "exit" in prompt:
                os._exit(7)
            if "raise" in prompt:
                raise ArithmeticError("this one raises")
        return compute(self, batch, *arguments, **settings)

    return wrapped


def end_suddenly(self):
    os._exit(9)


class Finder(MetaPathFinder):
    """Changes the models' modules as they are imported."""

    def find_spec(self, name, path, target=None):
        if name not in MODELS:
            return None
        model, compute = MODELS.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            changed = getattr(module, model)
            setattr(changed, compute, heeding(getattr(changed, compute)))
            if "DEADLY_LOAD" in os.environ:
                changed.__init__ = end_suddenly

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
