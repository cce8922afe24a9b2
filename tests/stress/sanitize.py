"""The CPU library under AddressSanitizer and UBSan: builds it, then tests and fuzzes over it.

`python tests/stress/sanitize.py`, from the repository. The package under test is build/sanitize:
links to the sources beside a library of its own, so the one in use stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "sanitize"
PACKAGE = OUT / "reasonkern"
# The core tests of every family with kernels: hard inputs, views inside guarded buffers, empty
# shapes, and everything that calls a kernel through the fronts.
FAMILIES = (
    "policy_loss",
    "speculation",
    "modulation",
    "generation",
    "shaping",
    "gae",
    "elliptical",
)
# Of other backends, and of memory, which the sanitizers take for themselves.
LEFT_OUT = "not cuda and not triton and not peak_memory"
LEVELS = ("baseline", "v3", "v4")  # instruction sets; one that this machine lacks falls back
EXAMPLES = "1000"  # of fuzzing, per family and level


def build() -> None:
    environment = {**os.environ, "REASONKERN_SANITIZE": "1", "REASONKERN_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(OUT)]
    command += ["--build-temp", str(OUT / "objects")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (library,) = PACKAGE.glob("_C.*so")
    assert b"__asan_init" in library.read_bytes() and b"__ubsan" in library.read_bytes()
    for source in (ROOT / "reasonkern").iterdir():
        link = PACKAGE / source.name
        if source.suffix != ".so" and source.name != "__pycache__" and not link.exists():
            link.symlink_to(source)


def library(name: str) -> str:
    """The compiler's own copy of a run-time library."""
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def environment(level: str) -> dict[str, str]:
    return {
        **os.environ,
        # The C++ library too: the sanitizer looks for its __cxa_throw when it starts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Leaks are the interpreter's and torch's; a size beyond memory is torch's to refuse.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "OMP_WAIT_POLICY": "passive",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "REASONKERN_CPU": level,
        "STRESS_EXAMPLES": EXAMPLES,
    }


def pytest(level: str, *arguments: str) -> None:
    """Two processes; what a sanitizer writes before it ends one of them is not captured."""
    command = [sys.executable, "-m", "pytest", "-o", "pythonpath=build/sanitize .", "-x", "-n", "2"]
    command += ["--capture=sys", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment(level), check=True)


def assert_is_loaded() -> None:
    code = "import reasonkern._load as l; print(l.__file__); assert l.available('cpu')"
    given = {**environment(""), "PYTHONPATH": str(OUT)}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=OUT, env=given, text=True)
    assert out.strip() == str(PACKAGE / "_load.py"), out


def main() -> None:
    build()
    assert_is_loaded()
    files = [str(path) for name in FAMILIES for path in ROOT.glob(f"tests/test_{name}*.py")]
    chosen = ["-k", LEFT_OUT, "-m", "not slow and not peers", "--dist", "loadfile"]
    for level in LEVELS:
        print(f"level {level}", flush=True)
        pytest(level, *files, *chosen)
        pytest(level, "tests/stress/test_fuzz.py", "--dist", "worksteal")


if __name__ == "__main__":
    main()
