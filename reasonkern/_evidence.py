"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {
    ('policy_loss', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-922f668b07.json)',
    ('policy_loss', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-922f668b07.json)',
    ('policy_loss_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('policy_loss_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('policy_metrics', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('policy_metrics', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('scale_rows_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('scale_rows_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('token_stats', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('token_stats', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-66ac5e4.json)',
    ('token_stats_backward_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-922f668b07.json)',
    ('token_stats_backward_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-26 (h200/2026-11-26-922f668b07.json)',
}
