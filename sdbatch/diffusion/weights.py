"""Weights in safetensors files: looked at by their headers, mapped into memory, given to networks as they are.

Files of the world name and shape the same weights differently. An ``Origin`` says where a network's weight lies
in a file and how it has to be turned to fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdbatch.errors import ModelError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Number formats that weights come in. Integers would be quantised weights, whose scales are missing here.
_STORED = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_SHOWN = 5

#: Far beyond any model's, and what is still read, or built, in seconds. A forged file or config can ask for anything.
_MOST_HEADER_BYTES = 16_000_000
_MOST_TENSORS = 30_000


@dataclass(frozen=True)
class Origin:
    """A weight's place in a file."""

    key: str
    third: int | None = None  # the first, second or third third of the rows (0, 1, 2): q, k and v in one
    transposed: bool = False


Origins = Mapping[str, Origin]


class Weights:
    """The tensors of one checkpoint, in one file or several. Opening reads headers only."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._opened: dict[str, Any] = {}
        for path in self.files:
            try:
                _refuse_long_header(path)
                opened: Any = safetensors.safe_open(path, framework="pt")
                self.metadata |= opened.metadata() or {}
                keys = opened.keys()
                if len(self.shapes) + len(keys) > _MOST_TENSORS:
                    raise ModelError(f"model file {path} has {len(keys):,} tensors, more than any model that is known")
                for key in keys:
                    view = opened.get_slice(key)
                    self.shapes[key], self.dtypes[key] = tuple(view.get_shape()), view.get_dtype()
                    self._opened[key] = opened
            except (safetensors.SafetensorError, OSError) as error:
                raise ModelError(f"model file {path} can't be read: {error}") from None

    @property
    def name(self) -> str:
        return str(self.files[0]) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def shape(self, origin: Origin) -> tuple[int, ...]:
        """A weight's shape as the network will see it, but for dimensions of 1."""
        shape = self.shapes[origin.key]
        if origin.third is not None and shape and shape[0] % 3 == 0:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if origin.transposed else shape

    def tensor(self, origin: Origin) -> Tensor:
        """The weight, mapped from the file: nothing is copied before it is used."""
        value: Tensor = self._opened[origin.key].get_tensor(origin.key)
        if origin.third is not None:
            value = value.chunk(3)[origin.third]
        return value.T.contiguous() if origin.transposed else value


def _refuse_long_header(path: Path) -> None:
    """Raise ModelError for a header that would take long to read; it begins with its own length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MOST_HEADER_BYTES:
        raise ModelError(f"model file {path} can't be read: it is no .safetensors file, or its header is damaged")


class _NoInitialisation(TorchFunctionMode):
    """Skips ``torch.nn.init``: on tensors without memory it has nothing to do, but it imports torch's compiler.

    Raises ValueError when a network does not come to an end. It does so between operations: in the midst of one,
    such as the end of ``torch.no_grad``, the whole process would stay in a state that nobody asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self._weights += 1
            if self._weights > _MOST_TENSORS:
                raise ValueError("it has more layers than any model that is known")
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def skeletons() -> Iterator[None]:
    """Networks built in here have shapes, but neither memory nor values, until ``assign`` gives them weights.

    Raises ModelError for configs whose numbers don't go together.
    """
    try:
        with torch.device("meta"), _NoInitialisation():
            yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"model: no network can be built as its config says: {error}") from None


def check(module: nn.Module, weights: Weights, origins: Origins, unused: Sequence[str]) -> None:
    """Raise ModelError unless every weight of ``module`` is there in its shape, and nothing in ``unused`` is left."""
    expected = {key: tuple(value.shape) for key, value in sorted(module.state_dict().items())}
    lacking = {key for key in expected if origins[key].key not in weights.shapes}
    there = {key: origins[key] for key in expected if key not in lacking}
    misshapen = [
        f"{origin.key} is {weights.shape(origin)} but should be {expected[key]}"
        for key, origin in there.items()
        if not _fits(weights.shape(origin), expected[key])
    ]
    integers = [f"{o.key} ({weights.dtypes[o.key]})" for o in there.values() if weights.dtypes[o.key] not in _STORED]
    for what, names in (
        ("lacks", sorted({origins[key].key for key in lacking})),
        ("has unknown", sorted(unused)),
        ("misshapen", misshapen),
        ("not floating-point numbers", integers),
    ):
        if names:
            raise ModelError(f"model file {weights.name}: {what}: {some(names)}")


def some(names: Sequence[str]) -> str:
    """The first few of them, and how many there are besides."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def assign(module: nn.Module, weights: Weights, origins: Origins, device: str, dtype: torch.dtype) -> None:
    """Give weights to a skeleton. What is of ``dtype`` already stays mapped from the file, the rest is converted.

    Changing them never changes the file, but networks from the same ``weights`` may share their memory.
    """
    state = {}
    for key, blank in module.state_dict().items():
        value = weights.tensor(origins[key]).to(device).to(dtype)  # a GPU converts sooner than a thread
        state[key] = value.reshape(blank.shape)
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


#: Whose tensors these are: older releases of transformers ask.
_PYTORCH = {"format": "pt"}


def write(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str] = _PYTORCH
) -> None:
    """Store tensors as ``dtype``. A file that is there is replaced as a whole: weights may be mapped from it.

    One entry of ``metadata`` at most, or the order in the header, and so the file's checksum, is left to chance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in tensors.items()}
    part = path.with_name(f".{path.name}.part")
    safetensors.torch.save_file(stored, part, metadata=dict(metadata))
    masked = os.umask(0o077)
    os.umask(masked)
    part.chmod(0o666 & ~masked)  # as any file; safetensors makes them this user's alone
    os.replace(part, path)


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """A linear layer and a 1×1 convolution are the same weights."""
    flat, wide = sorted((shape, expected), key=len)
    return (*flat, *[1] * (len(wide) - len(flat))) == wide
