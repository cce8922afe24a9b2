"""The sdist is complete, gives one abi3 wheel, and importing touches neither GPU nor extras."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import reasonkern

ROOT = Path(__file__).resolve().parent.parent

# Everything that would start the driver, made to fail loudly.
NO_DRIVER = """
import sys
import torch
def refuse(*args, **kwargs):
    raise AssertionError("importing reasonkern called the CUDA driver")
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init",
             "get_device_capability", "get_device_properties", "get_device_name"):
    setattr(torch.cuda, name, refuse)
for name in ("_cuda_init", "_cuda_getDeviceCount"):
    setattr(torch._C, name, refuse)
import reasonkern
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules, "importing reasonkern imported triton"
"""

ONE_OP = """
import torch, reasonkern
from reasonkern import _load
logits = torch.tensor([[0.5, 2.0, -1.0], [3.0, 0.0, 0.25]])
stats = reasonkern.token_stats(logits, torch.tensor([1, 2]))
truth = logits.log_softmax(-1)[[0, 1], [1, 2]]
torch.testing.assert_close(stats.logprob, truth)
"""


def python(code, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def files_in_checkout():
    """Files git knows or would accept, as they are in the working tree."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing to compare the sdist with")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Built from a copy that holds no leftovers: an old egg-info would hide a missing file."""
    tree = tmp_path_factory.mktemp("tree")
    for name in files_in_checkout():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(tree / "out", filter="data")
    (unpacked,) = (tree / "out").iterdir()
    return unpacked


@pytest.fixture(scope="session")
def wheel(sdist):
    """The one wheel, built from the unpacked sdist, so that what the sdist lacks cannot help.

    Not optimised, which takes half as long: the library that the other tests load is.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["-w", "dist", "."]
    compiler = sdist / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    cpu_only = {**os.environ, "REASONKERN_CUDA": "0", "CXX": str(compiler)}
    done = subprocess.run(command, cwd=sdist, env=cpu_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (sdist / "dist").iterdir()
    return path


def test_sdist_holds_all_sources(sdist):
    names = files_in_checkout()
    expected = {name for name in names if name.startswith(("csrc/", "reasonkern/", "tests/"))}
    assert {"csrc/policy_loss/cpu.cpp", "csrc/policy_loss/cuda.cu"} <= expected
    assert expected <= {path.relative_to(sdist).as_posix() for path in sdist.rglob("*")}


def test_wheel_is_abi3_and_holds_the_package(wheel):
    assert wheel.name.startswith("reasonkern-") and "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {name for name in files_in_checkout() if name.startswith("reasonkern/")}
    modules = {name for name in modules if name.endswith((".py", ".typed"))}
    assert modules | {"reasonkern/_C.abi3.so"} <= names
    assert all(name.startswith(("reasonkern/", "reasonkern-")) for name in names)


def test_installed_wheel_serves_from_its_library(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*command, str(wheel)], check=True)
    code = ONE_OP + "assert _load.available('cpu'), _load.reason('cpu')\nprint(_load.__file__)"
    status, output = python(code, tmp_path, REASONKERN_NO_EXT="0")
    assert status == 0, output
    assert output.strip().endswith(str(tmp_path / "reasonkern" / "_load.py"))


def test_version_stands_once(wheel):
    assert wheel.name.split("-")[1] == reasonkern.__version__
    assert f"\nversion: {reasonkern.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_library_is_no_python_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("reasonkern/_C.abi3.so")
    assert b"PyInit" not in library
    assert b"libtorch_python" not in library


def test_library_names_no_folder_of_the_machine_that_built_it(wheel, sdist):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("reasonkern/_C.abi3.so")
    assert b"csrc/policy_loss/" in library
    for folder in (sdist, *torch.__path__):
        assert str(folder).encode() not in library


def test_import_leaves_the_driver_alone():
    status, output = python(NO_DRIVER, ROOT)
    assert status == 0, output


def test_works_without_optional_packages():
    hide = "import sys; sys.modules |= dict.fromkeys(['triton', 'matplotlib', 'tqdm'])\n"
    status, output = python(hide + ONE_OP + "print(_load.reason('triton'))", ROOT)
    assert status == 0, output
    assert output.startswith("triton is not importable: ")


def test_works_without_numpy():
    """Only replaying traces and text similarity need it."""
    hide = "import sys; sys.modules['numpy'] = None\n"
    code = "\ntry: reasonkern.tune_tree([[1, 2]], 2)\nexcept ImportError as e: print(e.name)"
    status, output = python(hide + ONE_OP + code, ROOT)
    assert status == 0, output
    assert output.startswith("numpy\n")


def test_works_without_the_library():
    code = ONE_OP + "assert not _load.available('cpu')\nprint(_load.reason('cpu'))"
    status, output = python(code, ROOT, REASONKERN_NO_EXT="1")
    assert status == 0, output
    assert output.strip() == "switched off by REASONKERN_NO_EXT=1"


def test_a_checkout_that_was_not_built_says_so(tmp_path):
    """It hides the package that was installed from it."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "reasonkern", tmp_path / "reasonkern", ignore=ignored)
    status, output = python(ONE_OP, tmp_path, REASONKERN_NO_EXT="0")
    assert status == 0, output
    assert f"reasonkern in {tmp_path / 'reasonkern'}: library _C is not built, so CPU" in output


def test_extras_take_the_triton_that_torch_brings():
    """Else pip puts another torch in the place of the one that is there."""
    named = re.findall(r'"(triton[<=>~!][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(named) == 2
    for requirement in map(Requirement, named):
        # of torch 2.11, 2.13 and 2.15
        assert all(map(requirement.specifier.contains, ("3.6.0", "3.7.1", "3.9.0")))


def test_an_editable_install_is_found_from_the_folder_above(tmp_path):
    """There the checkout itself would be a package without a module, if a finder came later."""
    tree = tmp_path / "reasonkern"
    for name in ("pyproject.toml", "setup.py", "README.md"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "reasonkern", tree / "reasonkern", ignore=ignored)
    (tree / "csrc").mkdir()
    (tree / "csrc" / "cpu.cpp").touch()  # the sources do not matter here
    code = "from setuptools.build_meta import build_editable; build_editable('dist')"
    status, output = python(code, tree, REASONKERN_CUDA="0")
    assert status == 0, output
    (built,), site = (tree / "dist").iterdir(), tmp_path / "site"
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(site)
    code = f"""
import os, site, sys
installed = os.path.join("reasonkern", "__init__.py")  # where the tests run
sys.path = [p for p in sys.path if not os.path.exists(os.path.join(p, installed))]
site.addsitedir({str(site)!r})
import reasonkern
print(reasonkern)
"""
    status, output = python(code, tmp_path, PYTHONPATH="", REASONKERN_NO_EXT="1")
    assert status == 0, output
    assert str(tree / "reasonkern" / "__init__.py") in output


def run_setup(monkeypatch, **environment):
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("setup.py")
    return str(stop.value)


def test_setup_explains_missing_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = run_setup(monkeypatch)
    assert len(message.splitlines()) == 2
    assert "Install torch >= 2.11" in message


def test_setup_refuses_cuda_it_cannot_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    message = run_setup(monkeypatch, REASONKERN_CUDA="1")
    assert message == "REASONKERN_CUDA=1 asks for the CUDA library, but this torch has no CUDA."


def test_setup_refuses_unknown_switch(monkeypatch):
    message = run_setup(monkeypatch, REASONKERN_CUDA="yes")
    assert message == "REASONKERN_CUDA: expected 0, 1 or unset, got 'yes'."


@pytest.fixture
def toolkit(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    return tmp_path


@pytest.fixture
def cuda_setup(monkeypatch):
    """Runs setup.py as far as `setup()` on a pretended CUDA machine; returns its extensions."""
    cpp = pytest.importorskip("torch.utils.cpp_extension")

    def run(cuda_home, torch_cuda, release, gpus=(), archs=""):
        seen = {}
        monkeypatch.chdir(ROOT)
        monkeypatch.delenv("REASONKERN_CUDA", raising=False)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        monkeypatch.setattr(cpp, "CUDA_HOME", str(cuda_home))
        banner = f"Cuda compilation tools, release {release}, V{release}.48".encode()
        monkeypatch.setattr(subprocess, "check_output", lambda command: banner)
        monkeypatch.setattr("setuptools.setup", lambda **keywords: seen.update(keywords))
        runpy.run_path("setup.py")
        return {extension.name: extension for extension in seen["ext_modules"]}

    return run


def test_setup_builds_cuda_when_toolkit_and_torch_agree(cuda_setup, toolkit, capsys):
    extensions = cuda_setup(toolkit, "13.0", "13.1")
    assert set(extensions) == {"reasonkern._C", "reasonkern._C_cuda"}
    flags = extensions["reasonkern._C_cuda"].extra_compile_args["nvcc"]
    assert not [flag for flag in flags if "fast" in flag or "-std" in flag]
    assert capsys.readouterr().out.endswith("_C_cuda for 8.0;9.0a;10.0+PTX\n")


def test_setup_leaves_cuda_out_when_they_disagree(cuda_setup, toolkit, capsys):
    assert set(cuda_setup(toolkit, "12.6", "13.0")) == {"reasonkern._C"}
    assert "is not of torch's CUDA 12.6" in capsys.readouterr().out
    assert set(cuda_setup(toolkit / "empty", "13.0", "13.0")) == {"reasonkern._C"}
    assert "no nvcc was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "built_for"),
    [
        ({}, "8.0;9.0a;10.0+PTX"),
        ({"archs": "native"}, "8.0;9.0a;10.0+PTX"),
        ({"gpus": [(9, 0)]}, "the GPUs in sight"),
        ({"gpus": [(8, 6), (7, 5), (8, 0)]}, "8.0;8.6+PTX"),
        ({"gpus": [(9, 0)], "archs": "8.6;12.0+PTX"}, "8.6;12.0+PTX"),
        ({"archs": "7.5 8.0 8.6 9.0 10.0 12.0+PTX"}, "8.0;8.6;9.0;10.0;12.0+PTX"),
        ({"archs": "Volta+Tegra;Turing;Ampere;Hopper"}, "Ampere;Hopper"),
        ({"archs": " 7.5 ; 9.0a ;"}, "9.0a"),
    ],
)
def test_setup_compiles_for_what_has_the_instructions(
    cuda_setup, toolkit, machine, built_for, capsys
):
    assert "reasonkern._C_cuda" in cuda_setup(toolkit, "13.0", "13.0", **machine)
    assert capsys.readouterr().out.endswith(f"_C_cuda for {built_for}\n")
    chosen = "" if built_for == "the GPUs in sight" else built_for
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == chosen


@pytest.mark.parametrize("machine", [{"gpus": [(7, 5)]}, {"archs": "7.0;7.5+PTX; "}])
def test_setup_leaves_cuda_out_where_gpus_are_too_old(cuda_setup, toolkit, machine, capsys):
    assert set(cuda_setup(toolkit, "13.0", "13.0", **machine)) == {"reasonkern._C"}
    assert capsys.readouterr().out.endswith(
        "_C_cuda left out: its kernels need architecture 8.0 or newer\n"
    )
