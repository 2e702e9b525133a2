"""Triton kernels, installed as `fastmono.kernels`. They are imported only when the Triton engine is chosen."""
