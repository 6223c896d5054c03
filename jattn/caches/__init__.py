"""Caches: attention across time, for sampling and serving.

Every kind stands for the sequence of tokens that was appended, and attending to it equals
`jattn.attention` over the plain list of them. All are frozen pytrees.

    `rounding`      vectors in 8 or 4 bits, with one scale for each
    `sizes`         the sizes and the dtype that a cache is made with
    `write`         rows written into arrays that keep their place
    `products`      the two products of a decoding step with what a store holds
    `store`         where keys and values lie in memory
    `put`           tokens written into a store
    `asked`         a call to a cache, checked and taken apart
    `examples`      numbers of examples, checked
    `by_kernel`     a few queries by a kernel for TPU
    `decode`        a few queries by the tokens of a store, as one operation
    `attend`        which way a call goes
    `cache`         the tokens so far, with room for more
    `rolling`       the last tokens in a ring, and the first few
    `latent`        one short vector of each token, for all heads
    `pool`          which pages are free, and how many own each
    `pages`         the pages of each example as one run of slots
    `sharing`       pages that are taken, shared and copied
    `tokens`        tokens of any examples in one call
    `paged`         tokens in pages that examples share and give back
"""

from jattn.caches.cache import Cache, empty
from jattn.caches.latent import LatentCache, latent
from jattn.caches.paged import PagedCache, paged
from jattn.caches.rolling import RollingCache, rolling

__all__ = [
    "Cache",
    "LatentCache",
    "PagedCache",
    "RollingCache",
    "empty",
    "latent",
    "paged",
    "rolling",
]
