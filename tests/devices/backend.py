"""Builds and loads the stand-in: an accelerator inside PyTorch, in C++ (`standin/`).

It is compiled once for each version of torch and of its source, which takes some ten seconds, and
kept in the user's cache folder. Loading changes the whole process: `torch.accelerator` is there
from then on. So only processes of their own load it (`conftest.py`).
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

NAME = "standin"
N_DEVICES = 2
SOURCES = Path(__file__).parent / "standin"
_OPS = torch.ops.standin


def missing() -> str | None:
    """Why the stand-in cannot be built here; `None` if it can."""
    if os.name != "posix":
        return "the stand-in for an accelerator is built on Linux and macOS alone"
    return None if compiler() else "there is no C++ compiler, which builds the stand-in"


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, `g++` or `clang++`."""
    return next(
        (c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None
    )


def built() -> Path:
    """The compiled backend; compiles it if no earlier run has."""
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_gradinit-tests"
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"standin-{torch.__version__}-{hashlib.sha256(text).hexdigest()[:12]}.so"
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    root = Path(torch.__file__).parent
    libraries = root / "lib"
    includes = (root / "include", root / "include/torch/csrc/api/include")
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        part = Path(directory) / library.name
        command = [
            *(str(compiler()), "-O0", "-std=c++20", "-shared", "-fPIC"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{folder}" for folder in includes),
            *(str(SOURCES / "standin.cpp"), "-o", str(part)),
            *(f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"the stand-in does not compile:\n{done.stderr[-4000:]}"
        part.rename(library)


def load() -> None:
    """Make `standin:0` and `standin:1` devices of this process."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(built())
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _index(device: torch.device | str | int | None = None) -> int:
    if device is None:
        return _OPS.current_device()
    index = device if isinstance(device, int) else torch.device(device).index
    return _OPS.current_device() if index is None or index < 0 else index


class _On:
    """`torch.standin.device(…)`: makes a device the current one while a block runs."""

    def __init__(self, device: torch.device | str | int) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = _OPS.current_device()
        _OPS.set_device(self.index)

    def __exit__(self, *_: object) -> None:
        _OPS.set_device(self.before)


def _module() -> types.ModuleType:
    """`torch.standin`, with the functions that `torch.cuda` has."""
    module = types.ModuleType(f"torch.{NAME}")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: N_DEVICES,
        "current_device": _OPS.current_device,
        "set_device": lambda device: _OPS.set_device(_index(device)),
        "device": _On,
        "synchronize": lambda device=None: _OPS.synchronize(),
        "empty_cache": lambda: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "get_rng_state": lambda device=None: _OPS.rng_state(_index(device)),
        "set_rng_state": lambda state, device=None: _OPS.set_rng_state(state, _index(device)),
        "manual_seed": lambda seed: _OPS.manual_seed(seed, _OPS.current_device()),
        "manual_seed_all": lambda seed: (
            [_OPS.manual_seed(seed, i) for i in range(N_DEVICES)] and None
        ),
        "memory_allocated": lambda device=None: _OPS.bytes_of(_index(device), False),
        "max_memory_allocated": lambda device=None: _OPS.bytes_of(_index(device), True),
        "reset_peak_memory_stats": lambda device=None: _OPS.reset_peak(_index(device)),
    }
    vars(module).update(functions)
    return module


@dataclasses.dataclass
class Counts:
    """What a block of code did: `kernels`, `waits` for the device, and copies to and from it."""

    kernels: int = 0
    waits: int = 0
    to_device: int = 0
    from_device: int = 0
    by_name: dict[str, int] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count what the block does on the stand-in; the numbers are there after the block."""
    counts = Counts()
    _OPS.reset_counts()
    yield counts
    vars(counts).update(_OPS.counts(), by_name=dict(_OPS.kernels()))


@contextlib.contextmanager
def without(*operators: str, float64: bool = True) -> Iterator[None]:
    """Refuse operators (`"aten::linalg_qr"`), and float64 unless it is true, as MPS does."""
    _OPS.refuse(list(operators), not float64)
    try:
        yield
    finally:
        _OPS.refuse([], False)
