"""Tensor operations of the fast-weight models: pure functions, no modules, no parameters.

Import them from :mod:`refine_kernels.dispatch`, the one place that says which backend runs each.
"""
