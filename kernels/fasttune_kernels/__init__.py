"""Triton kernels and their launchers. Importing this package imports neither triton nor torch."""
