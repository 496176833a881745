"""Shipped test tools: conformance cases, numerics, accounting and Triton without a GPU.

Nothing in the rest of fasttune imports this package.
"""
