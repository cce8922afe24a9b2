"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {
    ('commit_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('commit_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('compact_kv_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('conflict_runs', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('elliptical_select', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('gae', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('modulate_logits_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('modulate_logits_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('objective_map', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('objective_map', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('policy_loss', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('policy_loss', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('policy_loss_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('policy_loss_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('policy_metrics', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('policy_metrics', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('sample', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('sample_controlled', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('scale_rows_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('scale_rows_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('sequence_map', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('sequence_map', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('table_draft', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('table_draft', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('table_update_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('table_update_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('token_stats', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('token_stats', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('token_stats_backward', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('token_stats_backward', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('token_stats_backward_', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
    ('token_stats_backward_', 'sm_90', 'triton'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('verify_controlled', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9-tests.json)',
    ('verify_tree', 'sm_90', 'cuda'): 'NVIDIA H200, 2026-11-27 (h200/2026-11-27-9f4b0a9.json)',
}
