"""Benchmarks and static checks of the kernels."""
