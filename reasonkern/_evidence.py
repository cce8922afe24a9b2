"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {}
