"""Builds and loads pybind11 modules of simulated kernels; only compiler, ninja and pybind11."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
SANITIZE = "CUDA_SIM_SANITIZE"  # the sanitizers of a process started by run_sanitized

# No contraction, so that a fused multiply-add is one only where the source says fma. With -O2 tests
# run 5 % faster and compile for half as long again, sanitised code for three times as long.
FLAGS = ["-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += [f"-fmacro-prefix-map={path}/=" for path in (HERE, CSRC)]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# No class here has a vtable.
SANITIZED = ["-fno-sanitize-recover=all", "-fno-sanitize=vptr", "-fno-omit-frame-pointer"]

RULES = """\
rule compile
  command = {compiler} {flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {flags} -shared $in -o $out
"""


def build(sources: Sequence[Path], name: str, sanitize: str | None = None) -> Path:
    """The extension module `name` of `sources`, compiled unless it is up to date.

    Its folder is keyed by the sources' text and the flags; inside it ninja watches the headers.
    """
    includes = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", *SANITIZED]
    key = hashlib.sha256(repr((COMPILER, flags, sys.version)).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = HERE / "_build" / f"{name}-{key.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [f"{source.stem}.o" for source in sources]
    lines = [f"build {o}: compile {s.resolve()}" for o, s in zip(objects, sources, strict=True)]
    lines.append(f"build {library.name}: link {' '.join(objects)}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = RULES.format(compiler=COMPILER, flags=" ".join(flags))
        (folder / "build.ninja").write_text(script + "\n".join(lines) + "\n")
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building {name} failed:\n{done.stdout}{done.stderr}")
    return library


def load(sources: Sequence[Path], name: str) -> ModuleType:
    """Build and import `name`, with the sanitizers of a process started by `run_sanitized`."""
    library = build(sources, name, os.environ.get(SANITIZE))
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sanitized(
    arguments: Sequence[str], sanitize: str = "address,undefined", timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` in a process whose `load` builds with `sanitize`."""
    environment = {**plain_environment(), SANITIZE: sanitize}
    # Python's own allocator would hide the bounds of small buffers; the interpreter leaks on exit.
    environment |= {"PYTHONMALLOC": "malloc", "UBSAN_OPTIONS": "print_stacktrace=1"}
    if "address" in sanitize:
        # The C++ library too: the sanitizer looks for its __cxa_throw when it starts.
        libraries = [find_library("libasan.so"), find_library("libstdc++.so")]
        environment["LD_PRELOAD"] = " ".join(libraries)
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def find_library(name: str) -> str:
    """The compiler's own copy of a run-time library."""
    return subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()


def plain_environment() -> dict[str, str]:
    """The environment without what `run_sanitized` adds: a compiler is not to be preloaded."""
    return {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", SANITIZE)}
