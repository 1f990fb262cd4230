"""Single modules out of peers' wheels, without the frameworks around them.

`make peers` unpacks the wheels into `.peers/`, which git ignores and which may travel to a machine without network. A
package installed in the environment comes first. Of TRL, verl and flash-linear-attention only the files with the
kernels are imported: a parent package becomes an empty shell, so that its `__init__` (and what that needs) never runs,
and the one or two helpers that a file asks its framework for are put in place.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).parents[2] / ".peers"


class Unavailable(Exception):
    """A provider cannot run a case here; the message says why."""


def load(module: str, *, version: str | None = None) -> ModuleType:
    """Import a peer's module by its full name from the environment, or else from `.peers/`.

    Raises:
        Unavailable: the package is in neither place, or the import fails; the message says which.
    """
    package = module.split(".")[0]
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed (`make peers`)")
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise Unavailable(f"{module} does not import: {error}") from error


def load_file(module: str, *, shells: Sequence[str] = (), stubs: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """Import one module of `.peers/` with its parent packages, and `shells`, left empty.

    Args:
        module: full name, such as "trl.kernels.chunked_logprob".
        shells: further packages whose `__init__` must not run.
        stubs: module name -> names that the file imports from it.
    """
    package, *inner = module.split(".")
    if not (FOLDER / package).is_dir():
        raise Unavailable(f"{package} is not installed (`make peers`)")
    parents = [".".join([package, *inner[:i]]) for i in range(len(inner))]
    for name in [*parents, *shells]:
        if name not in sys.modules:
            shell = ModuleType(name)
            shell.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
            sys.modules[name] = shell
    for name, members in (stubs or {}).items():
        stub = sys.modules.setdefault(name, ModuleType(name))
        vars(stub).update(members)
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise Unavailable(f"{module} does not import: {error}") from error


def trl_chunked_logprob() -> Any:
    """TRL's `ChunkedLogProbFunction`; its backward asks for a ZeRO-3 gather, which does nothing here."""
    stubs = {"trl.trainer": {}, "trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *_: nullcontext()}}
    return load_file("trl.kernels.chunked_logprob", stubs=stubs).ChunkedLogProbFunction


def verl_linear_cross_entropy() -> Any:
    """verl's Triton `linear_cross_entropy`; what it asks of its platform layer is what torch says of CUDA."""
    device = {
        "is_cuda_available": torch.cuda.is_available(),
        "get_device_name": lambda: "cuda",
        "get_device_capability": torch.cuda.get_device_capability,
        "get_torch_device": lambda: torch.cuda,
    }
    return load_file("verl.utils.kernel.linear_cross_entropy", stubs={"verl.utils.device": device}).linear_cross_entropy


def fla_linear_cross_entropy() -> Any:
    """flash-linear-attention's `fused_linear_cross_entropy_loss`."""
    shells = ("fla.modules.fused_cross_entropy", "fla.ops", "fla.ops.utils")
    stubs = {"fla": {"__version__": "0.6.0"}}
    module = load_file("fla.modules.fused_linear_cross_entropy.ops", shells=shells, stubs=stubs)
    return module.fused_linear_cross_entropy_loss
