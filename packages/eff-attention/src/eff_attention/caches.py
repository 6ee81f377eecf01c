"""The cache among the arguments and results of transformers' models; see `eff_kernels.edit.caches`."""

from eff_kernels.edit.caches import cache_kwargs, cache_name, given_cache, returned_cache

__all__ = ["cache_kwargs", "cache_name", "given_cache", "returned_cache"]
