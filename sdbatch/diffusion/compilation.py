"""torch's compiler, block by block, and what it made, packed up for processes that shall not compile it again.

Blocks of one kind and shape share what was compiled for the first. What comes of it lies in a folder of its own: graphs
and machine code. ``torch.compiler.save_cache_artifacts`` leaves the latter out: whoever loads what it saved
still builds every kernel.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import uuid
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from torch import nn

from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.diffusion.resnet import ResnetBlock
from sdbatch.diffusion.unet import TransformerBlock
from sdbatch.errors import ModelError

#: Block kinds and shapes in a large model; torch gives up at 8.
_MOST_KINDS = 256


def lacking(device: str) -> str | None:
    """Why blocks can't be compiled for ``device``, cpu or cuda, on this machine; None where they can."""
    if device == "cuda":
        if find_spec("triton") is None:
            return "needs Triton, which comes with torch's builds for CUDA"
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        found = any(shutil.which(compiler) for compiler in compilers)
        return None if found else f"needs a C compiler for Triton, and there is no {' or '.join(compilers)}"
    compiler = os.environ.get("CXX") or "g++"
    return None if shutil.which(compiler) else f"needs a C++ compiler, and there is no {compiler}"


def compile_into(folder: Path, threads: int) -> None:
    """Have the compiler put what it makes into ``folder``, which is this user's alone, and use so many threads."""
    import torch._inductor.config as inductor  # seconds to import: only where it is wanted

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    inductor.compile_threads = threads


def compile_blocks(model: LatentDiffusion) -> None:
    """Compile the U-Net's and the decoder's blocks, each shape of theirs when it first comes by."""
    import torch._dynamo.config as dynamo  # as above

    dynamo.recompile_limit = _MOST_KINDS
    networks: tuple[nn.Module, ...] = (model.unet, model.vae.decoder)
    for network in networks:
        for module in network.modules():
            if isinstance(module, TransformerBlock | ResnetBlock):
                # Kernels are chosen by rule, not by which was faster just then: what is compiled elsewhere computes the
                # same. Asked for here, so that it holds for nothing else that this process compiles.
                module.compile(fullgraph=True, dynamic=False, options={"deterministic": True})


def pack(folder: Path) -> bytes:
    """A tar of what was compiled into ``folder``, where other processes may be at work."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or path.suffix in {".lock", ".done", ".partial"}:
                continue
            try:
                data, mode = path.read_bytes(), path.stat().st_mode
            except FileNotFoundError:  # a compiler's own, for a moment
                continue
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size, info.mode = len(data), mode & 0o700
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Put what ``pack`` packed into a folder; what is there already stays. It is code: load only what you trust.

    Raises ModelError for what is no such tar.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                name, source = PurePosixPath(member.name), tar.extractfile(member)
                if source is None or not member.isreg() or name.is_absolute() or ".." in name.parts:
                    raise ModelError(f"compiled code: {member.name} is no file below its folder")
                path = folder / name
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
                    partial.write_bytes(source.read())
                    partial.chmod(member.mode & 0o700)
                    partial.replace(path)
    except tarfile.TarError as error:
        raise ModelError(f"compiled code can't be unpacked: {error}") from None
