"""The benchmark: end-to-end workloads, and the kernels one by one, each beside its physical limit.

`python -m jaxengine.bench` (or `jaxengine bench`) measures an engine, `python -m
jaxengine.bench.kernels` the kernels.
"""
