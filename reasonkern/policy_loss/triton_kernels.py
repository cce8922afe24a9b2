"""Triton kernels of the family and their launchers, which take the arguments of the ops (op.py).

One program per row. A row is read in blocks whose size depends on the dtype alone, into one set of
sums per lane; the lanes are added once at the end. The fused loss reads its row a second time for
the gradient, back to front, because L2 still holds the end of the row.

Sizes, strides and hyper-parameters are run-time arguments that nothing specialises on, so a kernel
compiles once per logits dtype and per set of optional arguments that are present. The compiler may
not contract a*b+c on its own (`enable_fp_fusion=False`; `tl.fma` asks for it by name): the same
helper then computes the same bits in every kernel, which makes `logprob` of `token_stats` and of
`policy_loss` bitwise equal.

Launched on CPU tensors only under the interpreter: TRITON_INTERPRET=1 before triton is imported.
"""

import torch
import triton
import triton.language as tl

from .._triton import check_dtype, check_launchable, kernel
from .triton_conflict import conflict_kernel, conflict_runs  # noqa: F401  (of an operator)
from .triton_objective import Hyper, RowInputs, grad_row, is_finite, objective_row
from .triton_rows import (
    INF,
    STAGES,
    first_argmax,
    load_scale,
    load_target,
    logprob_entropy,
    row_start,
    row_sums,
    write_gradient,
    write_zeros,
)

# ---- row statistics


@kernel
def stats_kernel(
    logits, targets, mask, row_temperature,
    logprob, entropy, lse, collision, varentropy, max_prob, is_top1, row_max,
    seq: tl.int32, vocab: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    temperature: tl.float32, softcap: tl.float32,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(mask + row) == 0 if mask is not None else False:
        tl.store(logprob + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(collision + row, 0.0)
        tl.store(varentropy + row, 0.0)
        tl.store(max_prob + row, 0.0)
        tl.store(is_top1 + row, False)
        tl.store(row_max + row, 0.0)
        return
    x = row_start(logits, row, seq, stride_b, stride_t, ALIGNED)
    scale = load_scale(temperature, row_temperature, softcap, row)
    y = tl.load(targets + row)
    x_y = load_target(x, y, vocab, scale, SOFTCAP)
    sums = row_sums(x, vocab, scale, SOFTCAP, True, BLOCK)
    logp, h, good = logprob_entropy(x_y, sums, scale.inv_temperature)
    top = good & (x_y == sums.top)
    if top:
        top = first_argmax(x, vocab, sums, scale, SOFTCAP, BLOCK) == y
    inv_s = tl.where(good, tl.div_rn(1.0, sums.s), float("nan"))
    mean = sums.u * inv_s
    tl.store(logprob + row, logp)
    tl.store(entropy + row, h)
    m = tl.where(good, sums.top * scale.inv_temperature, float("nan"))
    tl.store(lse + row, m + tl.log(sums.s))
    tl.store(collision + row, sums.q * inv_s * inv_s)
    spread = tl.maximum(sums.w * inv_s - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(varentropy + row, spread)
    tl.store(max_prob + row, inv_s)
    tl.store(is_top1 + row, top)
    # A row of -inf is told from one with a NaN or +inf: a shard of a vocabulary may be all masked.
    known = good | ((sums.top == -INF) & (sums.s == 0) & (x_y == x_y))
    tl.store(row_max + row, tl.where(known, sums.top, float("nan")))


# ---- row gradient


@triton.jit
def load_or_zero(pointer, row):
    return tl.load(pointer + row) if pointer is not None else tl.cast(0.0, tl.float32)


@kernel
def stats_backward_kernel(
    logits, grad, targets, row_temperature,
    logprob, entropy, collision, max_prob, row_max,
    grad_logprob, grad_entropy, grad_lse, grad_collision,
    seq: tl.int32, vocab: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    grad_stride_b: tl.int64, grad_stride_t: tl.int64,
    temperature: tl.float32, softcap: tl.float32,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    out = row_start(grad, row, seq, grad_stride_b, grad_stride_t, ALIGNED)
    inv_s = tl.load(max_prob + row)
    live = (inv_s > 0) & is_finite(inv_s) & is_finite(tl.load(logprob + row))
    if not live:  # inactive or nonfinite
        write_zeros(out, vocab, BLOCK)
        return
    x = row_start(logits, row, seq, stride_b, stride_t, ALIGNED)
    scale = load_scale(temperature, row_temperature, softcap, row)
    g = grad_row(
        tl.load(row_max + row), inv_s, tl.load(entropy + row), tl.load(collision + row),
        load_or_zero(grad_logprob, row), load_or_zero(grad_entropy, row),
        load_or_zero(grad_collision, row), load_or_zero(grad_lse, row), scale.inv_temperature,
    )  # fmt: skip
    y = tl.load(targets + row).to(tl.int32)
    write_gradient(x, out, vocab, y, g, scale, SOFTCAP, grad_collision is not None, BLOCK)


# ---- fused token-local loss


@triton.jit
def load_hyper(values, hyper, hyper_rows, row):
    if hyper is None:
        return Hyper(
            tl.cast(values[0], tl.float32), tl.cast(values[1], tl.float32),
            tl.cast(values[2], tl.float32), tl.cast(values[3], tl.float32),
            tl.cast(values[4], tl.float32), tl.cast(values[5], tl.float32),
            tl.cast(values[6], tl.float32), tl.cast(values[7], tl.float32),
            tl.cast(values[8], tl.float32),
        )  # fmt: skip
    else:
        n = hyper_rows.to(tl.int64)
        at = hyper + tl.where(n == 1, 0, row)
        return Hyper(
            tl.load(at), tl.load(at + n), tl.load(at + 2 * n), tl.load(at + 3 * n),
            tl.load(at + 4 * n), tl.load(at + 5 * n), tl.load(at + 6 * n), tl.load(at + 7 * n),
            tl.load(at + 8 * n),
        )  # fmt: skip


@triton.jit
def load_row_inputs(
    advantage, weight, entropy_weight, importance, old_logprob, ref_logprob, row, logp
):
    w = tl.load(weight + row)
    return RowInputs(
        tl.load(advantage + row),
        w,
        tl.load(entropy_weight + row) if entropy_weight is not None else w,
        tl.load(importance + row) if importance is not None else tl.cast(1.0, tl.float32),
        # On-policy rows have r = 1 with gradient: the old log-probability is logp, detached.
        tl.load(old_logprob + row) if old_logprob is not None else logp,
        load_or_zero(ref_logprob, row),
    )


@kernel
def loss_kernel(
    logits, grad, targets, old_logprob, advantage, weight, entropy_weight, importance, ref_logprob,
    row_temperature, loss_scale, hyper, row_loss, token_loss, logprob, entropy,
    seq: tl.int32, vocab: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    grad_stride_b: tl.int64, grad_stride_t: tl.int64, hyper_rows: tl.int32,
    values, temperature: tl.float32, softcap: tl.float32,
    kind: tl.int32, kl_kind: tl.int32, kl_unbiased: tl.int32,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    active = tl.load(weight + row) != 0
    if entropy_weight is not None:
        active = active | (tl.load(entropy_weight + row) != 0)
    if not active:
        tl.store(row_loss + row, 0.0)
        tl.store(token_loss + row, 0.0)
        tl.store(logprob + row, 0.0)
        tl.store(entropy + row, 0.0)
        if grad is not None:
            out = row_start(grad, row, seq, grad_stride_b, grad_stride_t, ALIGNED)
            write_zeros(out, vocab, BLOCK)
        return
    x = row_start(logits, row, seq, stride_b, stride_t, ALIGNED)
    scale = load_scale(temperature, row_temperature, softcap, row)
    y = tl.load(targets + row)
    x_y = load_target(x, y, vocab, scale, SOFTCAP)
    sums = row_sums(x, vocab, scale, SOFTCAP, False, BLOCK)
    logp, h, _ = logprob_entropy(x_y, sums, scale.inv_temperature)
    inputs = load_row_inputs(
        advantage, weight, entropy_weight, importance, old_logprob, ref_logprob, row, logp
    )
    values = load_hyper(values, hyper, hyper_rows, row)
    loss = objective_row(kind, kl_kind, kl_unbiased != 0, logp, h, inputs, values)
    tl.store(row_loss + row, loss.row_loss)
    tl.store(token_loss + row, loss.token_loss)
    tl.store(logprob + row, logp)
    tl.store(entropy + row, h)
    if grad is not None:
        out = row_start(grad, row, seq, grad_stride_b, grad_stride_t, ALIGNED)
        # Nonfinite rows, and clipped ones without an entropy term: no second read.
        if (loss.dlogp == 0) & (loss.dentropy == 0):
            write_zeros(out, vocab, BLOCK)
            return
        factor = scale.inv_temperature
        if loss_scale is not None:
            factor *= tl.load(loss_scale)
        inv_s = tl.div_rn(1.0, sums.s)
        g = grad_row(sums.top, inv_s, h, 0.0, loss.dlogp, loss.dentropy, 0.0, 0.0, factor)
        write_gradient(x, out, vocab, y.to(tl.int32), g, scale, SOFTCAP, False, BLOCK)


@kernel
def scale_rows_kernel(
    x, factors, seq: tl.int32, vocab: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    factor = tl.load(factors + row)
    if factor == 1.0:
        return
    x = row_start(x, row, seq, stride_b, stride_t, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK, num_stages=STAGES):
        block = tl.load(x + start + lanes).to(tl.float32) * factor
        tl.store(x + start + lanes, block.to(x.dtype.element_ty))
    inside = full + lanes < vocab
    block = tl.load(x + full + lanes, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(x + full + lanes, block.to(x.dtype.element_ty), mask=inside)


# ---- the objective alone, a row per program: blocks of rows spill


@kernel
def map_kernel(
    logprob, entropy, old_logprob, advantage, weight, entropy_weight, importance, ref_logprob,
    hyper, row_loss, token_loss, dlogp, dentropy, finite,
    hyper_rows: tl.int32, values, kind: tl.int32, kl_kind: tl.int32, kl_unbiased: tl.int32,
):  # fmt: skip
    row = tl.program_id(0)
    logp = tl.load(logprob + row)
    inputs = load_row_inputs(
        advantage, weight, entropy_weight, importance, old_logprob, ref_logprob, row, logp
    )
    values = load_hyper(values, hyper, hyper_rows, row)
    h = tl.load(entropy + row)
    loss = objective_row(kind, kl_kind, kl_unbiased != 0, logp, h, inputs, values)
    active = (inputs.weight != 0) | (inputs.entropy_weight != 0)
    tl.store(row_loss + row, tl.where(active, loss.row_loss, 0.0))
    tl.store(token_loss + row, tl.where(active, loss.token_loss, 0.0))
    tl.store(dlogp + row, tl.where(active, loss.dlogp, 0.0))
    tl.store(dentropy + row, tl.where(active, loss.dentropy, 0.0))
    tl.store(finite + row, loss.finite | ~active)


# ---- launchers


def config(dtype, softcap):
    """BLOCK and the compiler's options: 8 KiB per block, 16 lanes per thread.

    One size for every vocabulary (a short row masks most of its only block) and for every kernel:
    it fixes the order in which a row is added.
    """
    block = 8192 // dtype.itemsize
    # Without reflect_ftz exp2 keeps probabilities below 2^-126, which a varentropy may consist of.
    options = {
        "num_warps": block // 512, "enable_fp_fusion": False, "enable_reflect_ftz": False
    }  # fmt: skip
    if softcap:
        # Without a bound the assembler spills a few of these registers to fit one more program.
        options["maxnreg"] = 192
    return block, options


def check_runnable(name, x):
    check_dtype(name, x)
    check_launchable(name, x.device, loss_kernel)


def launch(function, x, *args, **flags):
    """One program per row of x (B, T, V). x comes first, its sizes and alignment are added."""
    batch, seq, vocab = x.shape
    if batch * seq == 0:
        return
    block, options = config(x.dtype, flags.get("SOFTCAP", False))
    # The gradient's rows have the pitch V or are x itself; asking V of the statistics too keeps
    # the order of their sums equal to the fused kernel's.
    steps = [vocab, *(x.stride(dim) for dim in (0, 1) if x.shape[dim] > 1)]
    aligned = all(n % 16 == 0 for n in (x.data_ptr(), *(step * x.itemsize for step in steps)))
    with torch.cuda.device_of(x):
        function[(batch * seq,)](x, *args, **flags, ALIGNED=aligned, BLOCK=block, **options)


def sizes(logits, *grad):
    strides = [t.stride(dim) for t in (logits, *grad) for dim in (0, 1)]
    return logits.shape[1], logits.shape[2], *strides


def token_stats(logits, targets, mask, row_temperature, temperature, softcap):
    check_runnable("token_stats", logits)
    out = [torch.empty_like(targets, dtype=torch.float32) for _ in range(8)]
    out[6] = torch.empty_like(targets, dtype=torch.bool)
    launch(
        stats_kernel, logits, targets, mask, row_temperature, *out,
        *sizes(logits), temperature, softcap, SOFTCAP=softcap > 0,
    )  # fmt: skip
    return tuple(out)


def launch_backward(
    logits, grad, targets, row_temperature, temperature, softcap, logprob, entropy, collision,
    max_prob, row_max, grad_logprob, grad_entropy, grad_lse, grad_collision,
):  # fmt: skip
    launch(
        stats_backward_kernel, logits, grad, targets, row_temperature, logprob, entropy, collision,
        max_prob, row_max, grad_logprob, grad_entropy, grad_lse, grad_collision,
        *sizes(logits, grad), temperature, softcap, SOFTCAP=softcap > 0,
    )  # fmt: skip


def token_stats_backward(logits, *args):
    check_runnable("token_stats_backward", logits)
    grad = logits.new_empty(logits.shape)
    launch_backward(logits, grad, *args)
    return grad


def token_stats_backward_(logits, *args):
    check_runnable("token_stats_backward_", logits)
    launch_backward(logits, logits, *args)


def launch_loss(
    logits, grad, targets, old_logprob, advantage, weight, entropy_weight, importance, ref_logprob,
    row_temperature, loss_scale, hyper, values, temperature, softcap, kind, kl_kind, kl_unbiased,
):  # fmt: skip
    out = [torch.empty_like(targets, dtype=torch.float32) for _ in range(4)]
    launch(
        loss_kernel, logits, grad, targets, old_logprob, advantage, weight, entropy_weight,
        importance, ref_logprob, row_temperature, loss_scale, hyper, *out,
        *sizes(logits, logits if grad is None else grad), 1 if hyper is None else hyper.shape[1],
        Hyper(*values), temperature, softcap,
        kind, 0 if ref_logprob is None else kl_kind, int(kl_unbiased), SOFTCAP=softcap > 0,
    )  # fmt: skip
    return tuple(out)


def policy_loss(logits, *args):
    check_runnable("policy_loss", logits)
    *args, needs_grad = args
    grad = logits.new_empty(logits.shape) if needs_grad else None
    rows = launch_loss(logits, grad, *args)
    return *rows, logits.new_empty(0) if grad is None else grad


def policy_loss_(logits, *args):
    check_runnable("policy_loss_", logits)
    return launch_loss(logits, logits, *args)


def scale_rows_(x, scale):
    check_runnable("scale_rows_", x)
    launch(scale_rows_kernel, x, scale, *sizes(x))


def objective_map(
    logprob, entropy, old_logprob, advantage, weight, entropy_weight, importance, ref_logprob,
    hyper, values, kind, kl_kind, kl_unbiased,
):  # fmt: skip
    check_runnable("objective_map", logprob)
    out = [torch.empty_like(logprob) for _ in range(4)]
    out.append(torch.empty_like(logprob, dtype=torch.bool))
    if logprob.numel():
        with torch.cuda.device_of(logprob):
            map_kernel[(logprob.numel(),)](
                logprob, entropy, old_logprob, advantage, weight, entropy_weight, importance,
                ref_logprob, hyper, *out, 1 if hyper is None else hyper.shape[1], Hyper(*values),
                kind, 0 if ref_logprob is None else kl_kind, int(kl_unbiased),
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return tuple(out)
