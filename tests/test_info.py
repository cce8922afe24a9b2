"""The registry behind `python -m reasonkern info`, the choice of a CUDA backend, its evidence."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import evidence
from reasonkern import __version__, _load
from reasonkern.__main__ import main

ROOT = Path(__file__).parents[1]
TOY = "toy_for_the_registry"
CUDA_RAN = {(TOY, "sm_90", "cuda"): "a GPU, a day"}


def double(x):
    return 2 * x


@pytest.fixture(scope="module", autouse=True)
def toy_schemas():
    """The registry asks the dispatcher which kernels a library holds, so the op must be defined."""
    libraries = [torch.library.Library(ns, "FRAGMENT") for ns in ("reasonkern", "reasonkern_cuda")]
    for library in libraries:
        library.define(f"{TOY}(Tensor x) -> Tensor")
    libraries[1].impl(TOY, double, "CUDA")
    yield libraries
    for library in libraries:
        library._destroy()


@pytest.fixture
def machine(monkeypatch):
    """Registers the toy op on a pretended machine: its GPU, libraries, Triton and evidence."""

    def pretend(evidence=(), cuda="", triton="", cpu="not built", gpu=True, compiled=(80, 90)):
        monkeypatch.setattr(_load, "_ops", {})
        monkeypatch.setattr(_load, "EVIDENCE", dict(evidence))
        monkeypatch.setattr(_load, "_library_reasons", {"cpu": cpu, "cuda": cuda})
        monkeypatch.setattr(_load, "_triton_reason", lambda: triton)
        monkeypatch.setattr(_load, "_architecture", lambda device: "sm_90")
        monkeypatch.setattr(_load, "_compiled_for", lambda: compiled)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        _load.register_op(TOY, {backend: double for backend in _load.BACKENDS})

    yield pretend
    _load._choose.cache_clear()
    _load.implementation.cache_clear()


def rows():
    return {row["backend"]: row for row in _load.info()["ops"][TOY]}


@pytest.mark.parametrize(
    ("setup", "choice"),
    [
        ({"evidence": CUDA_RAN}, "cuda"),
        ({"evidence": {**CUDA_RAN, (TOY, "sm_90", "triton"): "x"}}, "cuda"),
        ({"evidence": {(TOY, "sm_100", "cuda"): "another architecture"}}, "triton"),
        ({"evidence": {("another_op", "sm_90", "cuda"): "x"}}, "triton"),
        ({"evidence": CUDA_RAN, "cuda": "library _C_cuda is not built"}, "triton"),
        ({"evidence": CUDA_RAN, "compiled": (80,)}, "triton"),  # built where an A100 was in sight
        ({}, "triton"),
    ],
)
def test_cuda_backend_needs_evidence(machine, setup, choice):
    machine(**setup)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _load.choose_cuda_backend(TOY) == choice
    assert rows()[choice]["serves"] == ["cuda (sm_90)"]


def test_the_backend_is_that_of_the_tensors_device(machine, monkeypatch):
    machine(evidence=CUDA_RAN, compiled=(90, 100))
    monkeypatch.setattr(_load, "_architecture", lambda device: f"sm_{90 + 10 * device}")
    devices = [None, *map(torch.device, ("cuda", "cuda:0", "cuda:1"))]
    chosen = [_load.choose_cuda_backend(TOY, device) for device in devices]
    assert chosen == ["cuda", "cuda", "cuda", "triton"]


@pytest.mark.parametrize(
    ("named", "setup", "choice"),
    [
        ("cuda", {}, "cuda"),
        ("triton", {"evidence": CUDA_RAN}, "triton"),
        ("cuda", {"compiled": (80,)}, "triton"),  # no code for this GPU
        ("cuda", {"cuda": "library _C_cuda is not built"}, "triton"),
        ("triton", {"evidence": CUDA_RAN, "triton": "triton is not importable"}, "cuda"),
    ],
)
def test_a_named_backend_comes_first(machine, monkeypatch, named, setup, choice):
    machine(**setup)
    monkeypatch.setenv("REASONKERN_GPU_BACKEND", named)
    assert _load.choose_cuda_backend(TOY) == choice
    found = rows()
    assert found[choice]["serves"] == ["cuda (sm_90)"]
    assert found[choice]["why"].endswith("GPU_BACKEND names it") is (choice == named)


def test_a_named_backend_that_does_not_take_the_arguments(machine, monkeypatch):
    machine(evidence=CUDA_RAN)
    monkeypatch.setenv("REASONKERN_GPU_BACKEND", "triton")
    assert _load.choose_cuda_backend(TOY, triton_serves=False) == "cuda"


def test_another_name_is_refused(machine, monkeypatch):
    machine()
    monkeypatch.setenv("REASONKERN_GPU_BACKEND", "CUDA")
    with pytest.raises(ValueError, match="BACKEND: expected cuda, triton or unset, got 'CUDA'"):
        _load.choose_cuda_backend(TOY)


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "_toy.abi3.so").write_text("no library")
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "_load.py"))
    assert re.search("^library _toy failed to load: .*_toy.abi3.so: .", _load._load_library("_toy"))


@pytest.mark.parametrize(
    ("architecture", "compiled", "same"),
    [
        ("sm_90", (80, 90, 100), True),
        ("sm_86", (80,), True),  # one generation, the older first
        ("sm_80", (86,), False),
        ("sm_90", (80, 100), False),  # PTX of sm_80 knows no clusters; sm_100 is newer
        ("sm_120", (90, 100), False),
        ("sm_90", (), False),
    ],
)
def test_evidence_is_of_code_of_the_generation(machine, architecture, compiled, same):
    machine(compiled=compiled)
    assert (_load._other_code("cuda", architecture) == "") is same
    assert _load._other_code("triton", architecture) == ""


def test_info_says_for_what_the_library_was_compiled(machine):
    machine(evidence=CUDA_RAN, compiled=(80, 86))
    assert rows()["cuda"]["serves"] == []
    why = "library _C_cuda was compiled for sm_80, sm_86, not for sm_90"
    assert rows()["cuda"]["why"] == why


def test_a_library_older_than_its_sources_does_not_say(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert _load._compiled_for.__wrapped__() == ()


@pytest.fixture
def define(machine, monkeypatch):
    """Defines an op that doubles, in libraries of its own."""
    machine()
    libraries = [torch.library.Library(ns, "FRAGMENT") for ns in ("reasonkern", "reasonkern_cuda")]
    monkeypatch.setattr(_load, "LIBRARY", libraries[0])
    monkeypatch.setattr(_load, "CUDA_LIBRARY", libraries[1])

    def define_op(**options):
        options = {"fake": torch.empty_like, "cuda": True, "triton": None} | options
        _load.define_op("toy_defined", "(Tensor x) -> Tensor", reference=double, **options)
        return torch.ops.reasonkern.toy_defined

    yield define_op
    for library in libraries:
        library._destroy()


def test_an_op_without_autograd_gives_constants(define):
    op = define()
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(op(x), torch.full((2,), 2.0))
    assert double(x).requires_grad and not op(x).requires_grad


def test_an_op_with_autograd_has_a_gradient(define):
    op = define(
        autograd=_load.Autograd(lambda ctx, grad: 5 * grad, lambda ctx, inputs, output: None)
    )
    x = torch.ones(2, requires_grad=True)
    op(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 5.0))


def test_arguments_that_triton_does_not_take_go_to_the_next_backend(define, monkeypatch):
    kernels = {}
    monkeypatch.setattr(_load.LIBRARY, "impl", lambda name, fn, key, **_: kernels.update({key: fn}))
    define(triton=lambda x: 3 * x, triton_serves=lambda x: len(x) > 1)
    monkeypatch.setattr(
        _load, "choose_cuda_backend",
        lambda name, device, *, triton_serves=True: "triton" if triton_serves else "reference",
    )  # fmt: skip
    assert kernels["CUDA"](torch.ones(2)).tolist() == [3, 3]
    assert kernels["CUDA"](torch.ones(1)).tolist() == [2]
    monkeypatch.setattr(_load, "choose_cuda_backend", lambda name, device, **_: "reference")
    assert kernels["CUDA"](torch.ones(2)).tolist() == [2, 2]


def test_arguments_that_triton_does_not_take_are_a_fallback_too(machine):
    machine(cuda="library _C_cuda is not built")
    assert _load.choose_cuda_backend(TOY) == "triton"
    with pytest.warns(RuntimeWarning, match="is not built; triton does not take these arguments"):
        assert _load.choose_cuda_backend(TOY, triton_serves=False) == "reference"
    machine(evidence=CUDA_RAN)
    assert _load.choose_cuda_backend(TOY, triton_serves=False) == "cuda"


def test_fallback_warns_once_and_strict_refuses(machine, monkeypatch):
    machine(triton="triton is not importable: gone")
    monkeypatch.setenv("REASONKERN_STRICT", "1")
    message = f"{TOY}.*no result of this cuda kernel on sm_90; triton is not importable: gone"
    with pytest.raises(RuntimeError, match=message):
        _load.choose_cuda_backend(TOY)
    monkeypatch.delenv("REASONKERN_STRICT")
    with pytest.warns(RuntimeWarning, match=message):
        assert _load.choose_cuda_backend(TOY) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _load.choose_cuda_backend(TOY) == "reference"


def test_info_says_why_a_backend_does_not_serve(machine):
    machine(triton="triton is not importable: gone", gpu=False)
    found = rows()
    assert found["reference"]["serves"] == ["cpu", "other devices"]
    assert (found["cpu"]["exists"], found["cpu"]["why"]) == (False, "not built")
    assert (found["cuda"]["exists"], found["cuda"]["why"]) == (True, "no GPU here")
    assert (found["triton"]["exists"], found["triton"]["serves"]) == (False, [])


def test_library_without_the_op_is_not_a_backend(machine):
    machine(cpu="")
    assert rows()["cpu"]["why"] == "library _C was built without this op"
    with pytest.raises(RuntimeError, match="on cpu: library _C was built without this op"):
        _load.implementation(TOY, "cpu")
    assert _load.implementation(TOY, "cuda") is double


def test_a_library_that_is_there_serves():
    serves = {row["backend"]: row["serves"] for row in _load.info()["ops"]["policy_loss"]}
    built = _load.available("cpu")
    assert ("cpu" in serves["cpu"], "cpu" in serves["reference"]) == (built, not built)


def test_the_ops_of_cuda_are_in_its_sources():
    """`info` would take a complete library for an older one."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    written = set(re.findall(r'm\.impl\("(\w+)"', sources))
    declared = {op for op, backends in _load._ops.items() if "cuda" in backends}
    assert "policy_loss" in declared
    assert declared - written == {"table_update_"}  # table_keys, then table_merge_ or _merge_few_


def test_format_info_is_a_table(machine):
    machine(evidence=CUDA_RAN)
    head, table = _load.format_info().split("\n\n")
    assert re.search(r"^gpu +Toy GPU \(sm_90\)$", head, re.MULTILINE)
    lines = [re.split(r" {2,}", line) for line in table.splitlines()]
    assert lines[0] == ["op", "backend", "exists", "serves", "why"]
    assert [TOY, "cuda", "yes", "cuda (sm_90)", "ran on a GPU, a day"] in lines


def test_registry_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="expected a reference and any of"):
        _load.register_op(TOY, {"cpu": double})
    with pytest.raises(ValueError, match="expected a reference and any of"):
        _load.register_op(TOY, {"reference": double, "abacus": double})
    with pytest.raises(ValueError, match="backend: expected reference or cpu.*got 'abacus'"):
        _load.reason("abacus")


def test_unloadable_library_keeps_its_reason(tmp_path, monkeypatch):
    (tmp_path / "_C_cuda.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "_load.py"))
    monkeypatch.delenv("REASONKERN_NO_EXT", raising=False)
    assert _load._load_library("_C_cuda").startswith("library _C_cuda failed to load: ")
    assert _load._load_library("_C") == "library _C is not built"


def test_command_prints_every_op():
    command = [sys.executable, "-m", "reasonkern", "info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "policy_loss" in _load._ops
    for name in _load._ops:
        for backend in _load.BACKENDS:
            assert re.search(rf"^{name} +{backend} +(yes|no) ", done.stdout, re.MULTILINE)


def result_file(tmp_path, **changes):
    row = {"name": "ours", "status": "ok", "match": {"loss": 0.1}, "seconds": {"median": 1.0}}
    row |= {"backend": "cuda", "ops": ["policy_loss", "scale_rows_"], **changes}
    machine = {"gpu": "Toy GPU", "architecture": "sm_90", "date": "2026-11-23T10:00:00+00:00"}
    content = {"machine": machine, "cases": [{"device": "cuda", "providers": [row]}]}
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "one.json").write_text(json.dumps(content))


def test_command_says_the_version(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"reasonkern {__version__}\n"


def test_command_stops_when_nobody_reads_on():
    command = [sys.executable, "-m", "reasonkern", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_evidence_comes_from_matching_results(tmp_path):
    result_file(tmp_path)
    found = evidence.collect(tmp_path)
    assert set(found) == {(op, "sm_90", "cuda") for op in ("policy_loss", "scale_rows_")}
    namespace = {}
    exec(evidence.render(found), namespace)
    assert namespace["EVIDENCE"] == found
    assert found["policy_loss", "sm_90", "cuda"] == "Toy GPU, 2026-11-23 (toy/one.json)"


@pytest.mark.parametrize(
    "change", [{"status": "mismatch"}, {"match": {}}, {"backend": "reference"}]
)
def test_no_evidence_without_a_match(tmp_path, change):
    result_file(tmp_path, **change)
    assert evidence.collect(tmp_path) == {}


def write_tests(tmp_path, name, day, lost=(), **failed):
    machine = {"gpu": "Toy GPU", "architecture": "sm_90", "date": f"2026-11-{day}T10:00:00+00:00"}
    rows = [{"op": op, "backend": "cuda", "passed": 3, "failed": n} for op, n in failed.items()]
    content = {"machine": machine, "tests": rows, "lost": list(lost)}
    (tmp_path / f"{name}-tests.json").write_text(json.dumps(content))


def test_evidence_comes_from_tests_that_all_passed(tmp_path):
    write_tests(tmp_path, "a", 24, scale_rows_=0, gae=1)
    found = evidence.collect(tmp_path)
    assert found == {("scale_rows_", "sm_90", "cuda"): "Toy GPU, 2026-11-24 (a-tests.json)"}


def test_no_evidence_older_than_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "WRITTEN_ANEW", {("policy_loss", "cuda"): "2026-11-24T12:00"})
    key = ("policy_loss", "sm_90", "cuda")
    result_file(tmp_path)
    write_tests(tmp_path, "a", 24, policy_loss=0)
    assert key not in evidence.collect(tmp_path)
    assert ("scale_rows_", *key[1:]) in evidence.collect(tmp_path)
    write_tests(tmp_path, "b", 25, policy_loss=0)
    assert evidence.collect(tmp_path)[key] == "Toy GPU, 2026-11-25 (b-tests.json)"


def test_failed_tests_count_until_they_pass(tmp_path):
    key = ("policy_loss", "sm_90", "cuda")
    write_tests(tmp_path, "a", 22, policy_loss=1)
    result_file(tmp_path)  # a benchmark of the 23rd that matched
    assert key not in evidence.collect(tmp_path)
    assert ("scale_rows_", *key[1:]) in evidence.collect(tmp_path)
    write_tests(tmp_path, "b", 24, policy_loss=0)
    assert evidence.collect(tmp_path)[key] == "Toy GPU, 2026-11-24 (b-tests.json)"
    write_tests(tmp_path, "c", 25, policy_loss=1)
    assert key not in evidence.collect(tmp_path)


def test_a_lost_test_may_have_reached_anything(tmp_path):
    write_tests(tmp_path, "a", 24, lost=["test_x.py::test"], scale_rows_=0)
    assert evidence.collect(tmp_path) == {}


def test_evidence_file_is_up_to_date():
    assert evidence.TARGET.read_text() == evidence.render(evidence.collect())
