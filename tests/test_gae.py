"""The operator behind `gae` on every backend against the sum it stands for, and its front."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend, make_backend
from tolerance import assert_close, baseline_error, digest, randn
from torch import Tensor

from reasonkern import _load
from reasonkern.shaping import gae, reference

B, T = 7, 41


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Triton in blocks of 16 tokens, so that 40 and 41 tokens cross blocks."""
    if request.param == "triton":
        kernels = pytest.importorskip("reasonkern.shaping.triton_kernels")
        monkeypatch.setattr(kernels, "GAE_BLOCK", 16)
    return make_backend(request.param)


def definition(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float,
    lam: Tensor,
    lam_value: Tensor,
    end: str,
    given: Tensor,
    truncated: Tensor,
) -> tuple[Tensor, Tensor]:
    """O(T^2): every advantage as its own sum of deltas over the tokens that count."""
    out = torch.zeros(2, *reward.shape, dtype=reward.dtype)
    for b in range(len(reward)):
        (at,) = mask[b].nonzero(as_tuple=True)
        if not len(at):
            continue
        v = value[b, at]
        last = {"zero": 0 * v[-1], "last": v[-1], "given": given[b]}[end]
        following = torch.cat((v[1:], (last if truncated[b] else 0 * last).reshape(1)))
        delta = reward[b, at] + gamma * following - v
        for which, factor in enumerate((lam[b], lam_value[b])):
            for t in range(len(at)):
                power = (gamma * factor) ** torch.arange(len(at) - t).to(delta)
                out[which, b, at[t]] = (power * delta[t:]).sum()
        out[1, b, at] += v
    return out[0], out[1]


def inputs(length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Rows: full, random holes, leading and trailing padding, one token, none, first, last.

    One hole has room for a block of 16 tokens.
    """
    reward, value = randn(B, length, seed=1).float(), 3 * randn(B, length, seed=2).float()
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0], mask[4] = True, False
    mask[1, 15:33] = False
    mask[2, :5], mask[2, -20:] = False, False
    mask[3] = torch.arange(length) == 17
    mask[5] = torch.arange(length) == 0
    mask[6] = torch.arange(length) == length - 1
    return reward, value, mask


TRUNCATED = torch.tensor([True, True, False, True, True, False, True])
ROW_LAM = torch.tensor([1.0, 0.95, 0.9, 0.5, 0.3, 0.0, 0.7])
GIVEN = torch.tensor([2.0, -1.0, 9.0, 0.5, 4.0, 3.0, -2.0])


def arguments(
    end: str, masked: bool, per_row: bool, truncated: bool, gamma: float, lam: float,
    length: int = T,
) -> tuple[Any, ...]:  # fmt: skip
    """What follows reward and value in the operator's schema."""
    return (
        inputs(length)[2] if masked else None,
        ROW_LAM if per_row else None,
        ROW_LAM.flip(0) if per_row else None,
        GIVEN if end == "given" else None,
        TRUNCATED if truncated else None,
        gamma,
        lam,
        1.0,
        end == "last",
    )


# Rows of 40 tokens start and end with whole quads of the Triton kernel, those of 41 do not.
CASES = [
    (end, masked, per_row, truncated, gamma, lam, length)
    for end in ("zero", "last", "given")
    for masked, per_row in ((True, False), (False, True), (True, True))
    for truncated, gamma, lam in ((True, 0.97, 0.9), (False, 1.0, 1.0))
    for length in (T, 40)
]
# Whatever three of the four choices are, some case has them.
HALF = [case for n, case in enumerate(CASES) if (n // 4 + n // 2 + n) % 2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(backend: Backend, case: tuple[Any, ...]) -> None:
    end, masked, per_row, truncated, gamma, lam, length = case
    if backend.slow and case not in HALF:
        pytest.skip("interpreted for most of a second: half of the cases")
    reward, value, mask = inputs(length)
    rest = arguments(*case)

    def exact(r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.full((B,), lam, dtype=r.dtype)
        lams = (ROW_LAM, ROW_LAM.flip(0)) if per_row else (one, torch.ones_like(one))
        m = mask if masked else torch.ones_like(mask)
        cut = TRUNCATED if truncated else torch.ones_like(TRUNCATED)
        return definition(r, v, m, gamma, *(x.to(r) for x in lams), end, GIVEN.to(r), cut)

    def plain(r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gae(r, v, *rest)

    # The reference is its own baseline below, which no error of it could exceed.
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in (reward, value, *rest)]  # fmt: skip
    for a, b in zip(reference.gae(*wide), exact(*wide[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    truth, base = baseline_error((reward, value), exact, plain, digest(case))
    got = backend("gae", *(backend.to(x) for x in (reward, value, *rest)))
    # The sum of terms of alternating sign may be smaller than its largest term.
    size = torch.full_like(truth[0], 30.0)
    for name, out, expected, error in zip(("advantage", "returns"), got, truth, base, strict=True):
        assert_close(name, out, expected, error, terms=size)
        if masked:
            assert not out[~mask].any()


def test_cases_are_hard() -> None:
    reward, value, mask = inputs()
    assert mask[0].all() and not mask[4].any() and mask[3].sum() == 1
    assert mask[1, :15].any() and not mask[1, 16:32].any() and mask[1, 33:].any()
    assert TRUNCATED.any() and not TRUNCATED.all()
    ends = {
        end: definition(
            reward.double(), value.double(), mask, 1.0, *(torch.full((B,), 0.9),) * 2, end, GIVEN,
            TRUNCATED,
        )[0]
        for end in ("zero", "last", "given")
    }  # fmt: skip
    assert (ends["zero"] != ends["last"]).any() and (ends["given"] != ends["last"]).any()


@pytest.mark.parametrize(("length", "masked"), [(2052, False), (2051, True)])
def test_triton_blocks_of_the_real_size(length: int, masked: bool) -> None:
    """Rows that take two of them, of whole quads or not."""
    triton = make_backend("triton")
    reward, value = randn(1, length, seed=4).float(), randn(1, length, seed=5).float()
    mask = torch.rand(1, length, generator=torch.Generator().manual_seed(9)) < 0.6
    rest = (mask if masked else None, None, None, None, None, 0.99, 0.95, 1.0, True)
    got = triton("gae", *(triton.to(x) for x in (reward, value, *rest)))
    for a, b in zip(got, reference.gae(reward.double(), value.double(), *rest), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4)


def test_where_rows_are_of_whole_quads() -> None:
    """Only there does the Triton kernel load 16 bytes at a time."""
    aligned = pytest.importorskip("reasonkern.shaping.triton_kernels").quads_are_aligned
    x, mask = torch.zeros(3, 48), torch.zeros(3 * 40 + 1, dtype=torch.bool)
    quads, shifted = x[:, 4:44], x[:, 3:43]
    assert aligned(quads, quads, None) and aligned(quads, quads, mask[:-1].view(3, 40))
    assert not aligned(quads, shifted, None) and not aligned(shifted, quads, None)
    assert not aligned(quads, quads, mask[1:].view(3, 40))
    for odd in (torch.zeros(3, 41), torch.zeros(3, 41)[:, :40]):  # rows that end, or start, inside
        assert not aligned(odd, odd, None)


@pytest.mark.parametrize(
    ("rows", "length"), [(37, 3), (9, 15), (9, 16), (9, 17), (9, 33), (2, 529), (1, 9000)]
)
def test_windows_of_the_cpu_kernel(poisoned_empty: None, rows: int, length: int) -> None:
    """Lengths around its windows of 16 tokens, in float64."""
    reward, value = randn(rows, length, seed=6), randn(rows, length, seed=7)
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(8)) < 0.9
    lam = torch.linspace(0, 1, rows, dtype=torch.float64)
    for given in (None, mask):
        args = (reward, value, given, lam, None, None, None, 1.0, 0.0, 0.999, True)
        got = torch.ops.reasonkern.gae(*args)
        for a, b in zip(got, reference.gae(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9)


def padded_rows(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Rows of 41 tokens with holes, alone and with padding on either side, which is cut off."""
    reward, value, mask = (x[:3] for x in inputs())
    mask[:2, 0] = mask[:2, -1] = True
    out = []
    for before, behind in ((0, 0), (0, 1), (0, 30), (5, 0), (16, 17)):
        r, v, m = (F.pad(x, (before, behind)) for x in (reward.to(dtype), value.to(dtype), mask))
        lam_value = ROW_LAM[:3].to(dtype)
        args = (r, v, m, None, lam_value, None, None, 0.97, 0.9, 0.0, True)
        got = torch.ops.reasonkern.gae(*args)
        out.append((got[0][:, before : before + T], got[1][:, before : before + T]))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_changes_no_bit_on_cpu(dtype: torch.dtype) -> None:
    alone, *padded = padded_rows(dtype)
    for got in padded:
        for a, b in zip(got, alone, strict=True):
            assert torch.equal(a, b)


def test_a_mask_of_ones_changes_no_bit_on_cpu() -> None:
    reward, value, _ = inputs()
    for lam_value in (0.9, 1.0):
        plain = gae(reward, value, gamma=0.97, lam=0.9, lam_value=lam_value)
        got = gae(reward, value, torch.ones(B, T), gamma=0.97, lam=0.9, lam_value=lam_value)
        for a, b in zip(got, plain, strict=True):
            assert torch.equal(a, b)


def bits() -> str:
    """Of results of the CPU kernel."""
    hashed = hashlib.sha256()
    for dtype in (torch.float32, torch.float64):
        reward, value, _ = (x.to(dtype) for x in inputs(529))
        outs = [*padded_rows(dtype), gae(reward, value, lam=0.9), gae(reward, value, lam=ROW_LAM)]
        for out in outs:
            hashed.update(b"".join(x.contiguous().numpy().tobytes() for x in out))
    return hashed.hexdigest()


@pytest.mark.skipif(not _load.available("cpu"), reason="library _C is not built")
@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_bits_do_not_depend_on_the_instruction_set(level: str) -> None:
    """A process takes its level once."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_gae; print(test_gae.bits())"],
        env={**os.environ, "REASONKERN_CPU": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == bits(), done.stderr


def test_what_is_masked_is_not_read(backend: Backend) -> None:
    reward, value, mask = inputs()
    rest = arguments("last", True, True, True, 0.97, 0.9)
    poisoned = [torch.where(mask, x, torch.nan) for x in (reward, value)]
    plain = backend("gae", *(backend.to(x) for x in (reward, value, *rest)))
    got = backend("gae", *(backend.to(x) for x in (*poisoned, *rest)))
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_depend_on_the_batch(backend: Backend) -> None:
    reward, value, mask = inputs()
    rest = arguments("last", True, True, True, 0.97, 0.9)
    whole = backend("gae", *(backend.to(x) for x in (reward, value, *rest)))
    for b in range(B):
        row = [
            x[b : b + 1].contiguous() if isinstance(x, Tensor) else x
            for x in (reward, value, *rest)
        ]
        alone = backend("gae", *(backend.to(x) for x in row))
        for a, w in zip(alone, whole, strict=True):
            assert torch.equal(a[0], w[b])


def test_empty_shapes(backend: Backend) -> None:
    for shape in ((0, 5), (3, 0)):
        x = backend.to(torch.zeros(shape))
        for out in backend("gae", x, x, None, None, None, None, None, 1.0, 0.9, 1.0, True):
            assert out.shape == shape


# ---- the front


def test_no_rows_of_any_strides() -> None:
    reward = torch.zeros(0, 4).mT.contiguous().mT
    advantage, returns = gae(reward, reward, lam=0.9)
    assert advantage.shape == returns.shape == (0, 4)


def test_front_in_half_precision_and_any_strides() -> None:
    reward, value, mask = inputs()
    expected = gae(reward.bfloat16().float(), value.bfloat16().float(), mask, lam=0.9)
    wide = torch.stack((reward, value), -1).bfloat16()
    got = gae(wide[..., 0], wide[..., 1], mask.T.contiguous().T, lam=0.9)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert gae(reward.double(), value.double(), lam=0.9)[0].dtype == torch.float64
    rest = {"bootstrap": "given", "bootstrap_value": GIVEN, "truncated": TRUNCATED, "lam": ROW_LAM}
    strided = {name: x if name == "bootstrap" else torch.stack((x, x), 1)[:, 0]
               for name, x in rest.items()}  # fmt: skip
    expected = torch.ops.reasonkern.gae(
        reward, value, mask, ROW_LAM, ROW_LAM, GIVEN, TRUNCATED, 1.0, 0.0, 0.0, False
    )
    columns = (x.T.contiguous().T for x in (reward, value, mask))
    for got in (gae(reward, value, mask, **rest), gae(*columns, **strided)):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    cut = F.pad(value, (0, 3))[:, :T]  # rows apart, and other than those of `reward`
    for a, b in zip(gae(reward, cut, lam=0.9), gae(reward, value, lam=0.9), strict=True):
        assert torch.equal(a, b)


def test_a_mask_may_be_numbers() -> None:
    reward, value, mask = inputs()
    for a, b in zip(gae(reward, value, mask.long(), lam=0.9), gae(reward, value, mask, lam=0.9),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_targets_carry_no_gradient() -> None:
    reward, value, _ = inputs()
    advantage, returns = gae(reward, value.requires_grad_(), lam=0.9)
    assert not advantage.requires_grad and not returns.requires_grad


def test_compiles_without_a_graph_break() -> None:
    reward, value, mask = inputs()
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    got = compiled(reward, value, mask, lam=ROW_LAM, lam_value=1.0, bootstrap="last")
    for a, b in zip(got, gae(reward, value, mask, lam=ROW_LAM, lam_value=1.0, bootstrap="last"),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reward": torch.zeros(3)}, r"reward: expected shape \(B, T\), got \(3,\)"),
    ({"reward": torch.zeros(2, 3, dtype=torch.int64)}, "reward: expected dtype"),
    ({"value": torch.zeros(2, 4)}, r"value: expected shape \(B, T\) = \(2, 3\)"),
    ({"value": torch.zeros(2, 3).double()}, "value: expected dtype torch.float32"),
    ({"mask": torch.full((2, 3), 2)}, r"mask: expected bool or 0/1 values, got 2 at \(0, 0\)"),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, "mask: expected shape"),
    ({"gamma": 1.5}, r"gamma: expected a number in \[0, 1\], got 1.5"),
    ({"lam": -0.1}, r"lam: expected a number in \[0, 1\], got -0.1"),
    ({"lam": torch.tensor([0.5, -0.1])}, r"lam: expected values in \[0, 1\], got -0.1"),
    ({"lam": torch.tensor([0.0, 1.5])}, r"lam: expected values in \[0, 1\], got 1.5 at \(1,\)"),
    ({"lam": torch.tensor([1.0, torch.nan])}, r"lam: .* got nan at \(1,\)"),
    ({"lam_value": torch.ones(3)}, "lam_value: expected shape"),
    ({"bootstrap": "first"}, "bootstrap: expected 'zero' or 'last' or 'given', got 'first'"),
    ({"bootstrap": "given"}, "bootstrap_value: expected a tensor"),
    ({"bootstrap_value": torch.ones(2)}, "bootstrap_value: expected None"),
    ({"bootstrap": "given", "bootstrap_value": torch.ones(3)}, "bootstrap_value: expected shape"),
    ({"truncated": torch.ones(2)}, "truncated: expected dtype torch.bool"),
    ({"truncated": torch.ones(3, dtype=torch.bool)}, r"truncated: expected shape \(B,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[m for _, m in WRONG])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = {"reward": torch.zeros(2, 3), "value": torch.zeros(2, 3), "lam": 0.9, **change}
    with pytest.raises(ValueError, match=message):
        gae(**given)
