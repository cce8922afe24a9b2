"""The extension libraries and how they are detected; everything else is in pyproject.toml."""

import os
import re
import subprocess
import sys
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension as cpp
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "reasonkern compiles against the torch it will run with, and this Python has none.\n"
        "Install torch >= 2.11, then run: pip install --no-build-isolation ."
    )

# Binaries built for target 2.11 run on every later torch; -std is left to torch, whose headers
# want C++17 in 2.11 and C++20 in 2.13.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Contraction would fuse a*b+c in one kernel and not in its twin, and they must agree bit for bit.
# Texts of errors name csrc/… and torch/…, not where they were; of two that fit the last one counts.
HERE, TORCH = os.path.abspath("."), cpp.include_paths()[0]
PLACES = [f"-fmacro-prefix-map={HERE}/=", f"-fmacro-prefix-map={TORCH}/="]
CPU_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *PLACES, TARGET]
CPU_FLAGS += ["-Wno-psabi"]  # vectors wider than registers pass between inlined functions only
SANITIZE = []
if os.environ.get("REASONKERN_SANITIZE") == "1":  # what `make stress` runs the CPU library under
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    CPU_FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
NVCC_FLAGS = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += [*(f"-Xcompiler={flag}" for flag in PLACES), "-DUSE_CUDA", TARGET]


def toolkit_problem():
    """Why CUDA sources cannot be compiled here, or None when they can."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    # An nvcc wrapper in /usr/local/bin makes torch guess /usr/local, which holds no libcudart.
    if cpp.CUDA_HOME == "/usr/local" and os.path.isdir("/usr/local/cuda"):
        cpp.CUDA_HOME = "/usr/local/cuda"
    nvcc = f"{cpp.CUDA_HOME}/bin/nvcc"
    if not os.path.isfile(nvcc):
        return "no nvcc was found (set CUDA_HOME)"
    major = re.search(rb"release (\d+)", subprocess.check_output([nvcc, "--version"]))
    if major is None or major[1].decode() != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is not of torch's CUDA {torch.version.cuda}"
    return None


def is_too_old(arch):
    """Whether an entry of TORCH_CUDA_ARCH_LIST has no cp.async and no reductions of a warp."""
    number = re.match(r"\d+\.\d+", arch)
    old = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")
    return float(number[0]) < 8 if number else arch.startswith(old)


def architecture_problem():
    """Why there is nothing to compile for, or None; takes what is too old from torch's list."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("native", "")
    archs = re.findall("[^; ]+", listed)
    if not archs and torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = [f"{major}.{minor}" for major, minor in sorted(set(gpus))]
        archs[-1] += "+PTX"  # as torch does
    elif not archs:  # torch's own choice ends in an IndexError. 10.0 came with CUDA 12.8.
        archs = ["8.0", "9.0a", *(["10.0+PTX"] if torch.version.cuda >= "12.8" else [])]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs)
    kept = [arch for arch in archs if not is_too_old(arch)]  # containers' lists begin with 7.5
    if not kept:
        return "its kernels need architecture 8.0 or newer"
    if len(kept) < len(archs):
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(kept)
    return None


def library(kind, name, pattern, **flags):
    """One abi3 library; no Python module inside, reasonkern._load hands it to torch.ops."""
    sources = sorted(glob(f"csrc/**/{pattern}", recursive=True))
    if not sources:
        sys.exit(f"reasonkern: csrc/ holds no {pattern}; the source tree is incomplete.")
    options = {"include_dirs": [os.path.abspath("csrc")], "extra_compile_args": flags}
    options |= {"depends": glob("csrc/**/*.*", recursive=True), "py_limited_api": True}
    options |= {"extra_link_args": SANITIZE}
    return kind(f"reasonkern.{name}", sources, **options)


wanted = os.environ.get("REASONKERN_CUDA", "")
if wanted not in ("", "0", "1"):
    sys.exit(f"REASONKERN_CUDA: expected 0, 1 or unset, got {wanted!r}.")
problem = "REASONKERN_CUDA=0" if wanted == "0" else toolkit_problem() or architecture_problem()
if wanted == "1" and problem:
    sys.exit(f"REASONKERN_CUDA=1 asks for the CUDA library, but {problem}.")

extensions = [library(cpp.CppExtension, "_C", "cpu*.cpp", cxx=CPU_FLAGS)]
if problem is None:
    extensions.append(library(cpp.CUDAExtension, "_C_cuda", "cuda*.cu", nvcc=NVCC_FLAGS))
built_for = f"for {os.environ.get('TORCH_CUDA_ARCH_LIST') or 'the GPUs in sight'}"
print("reasonkern: building _C; _C_cuda", f"left out: {problem}" if problem else built_for)

setup(
    license="Apache-2.0",
    ext_modules=extensions,
    cmdclass={"build_ext": cpp.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
