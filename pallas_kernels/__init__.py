"""Kernels over arrays: one file per operation, each with its reference in plain jnp."""
