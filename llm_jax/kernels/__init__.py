"""Kernels: one entry point each, the platform's best implementation behind it."""
