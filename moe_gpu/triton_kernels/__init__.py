"""Triton kernels for routing and experts; `ops.TritonExpertOps` is the way in."""
