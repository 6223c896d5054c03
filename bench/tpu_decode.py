"""Calls of caches for `bench.tpu`: one token of each of 8 examples, capacity 8192.

32 query heads share 8 key heads of 128 numbers, in bfloat16: 268 MB of keys and values.
None of them may be copied. A block is 1024 slots of one key head.
"""

EXAMPLES, CAPACITY, HEADS, KEY_HEADS, PAGE = 8, 8192, 32, 8, 128
# name, what runs, head size
ROWS = (
    ("ragged lengths", "decode", 128),
    ("the same, H=64", "decode", 64),
    ("window, soft cap and ALiBi by lambdas", "decode_lambda", 128),
    ("int8", "decode_int8", 128),
    ("float8", "decode_float8_e4m3fn", 128),
    (f"pages of {PAGE}", "decode_pages", 128),
    ("latent, 512 + 64, 128 heads", "decode_latent", 576),
)


def call(what: str, H: int, array):
    """Gives a function and the types of its arguments: a query and a cache.

    Args:
        what: One of `ROWS`.
        H: The head size.
        array: Makes the type of an array on the chip.
    """
    import jax.numpy as jnp

    options = {}
    if what == "decode_latent":
        options["scale"] = 192**-0.5
    if what == "decode_lambda":
        slopes = jnp.exp2(-jnp.arange(1, HEADS + 1, dtype=jnp.float32) / 4)
        options["mask"] = lambda b, n, t, s: (t >= s) & ((t - s < 4096) | (s < 4))
        options["modifier"] = lambda logit, b, n, t, s: (
            50.0 * jnp.tanh(logit / 50.0) - slopes[n] * (t - s).astype(logit.dtype)
        )
    heads = 128 if what == "decode_latent" else HEADS
    query = array(EXAMPLES, 1, heads, H)
    return lambda query, kv: kv.attend(query, **options), [query, cache(what, H, array)]


def cache(what: str, H: int, array):
    """Makes the type of a cache, as it is on TPU."""
    import jax.numpy as jnp

    from jattn.caches import Cache, LatentCache, PagedCache
    from jattn.caches.pool import Pool
    from jattn.caches.store import Store

    whole = lambda *shape: array(*shape, dtype="int32")
    length = whole(EXAMPLES)
    if what == "decode_latent":
        keys = array(EXAMPLES, 1, H, CAPACITY)
        return LatentCache(Cache(Store(keys, None, None, None, "bfloat16", H, 512), length))
    name = what.removeprefix("decode_")
    is_rounded = name in ("int8", "float8_e4m3fn")
    dtype = name if is_rounded else "bfloat16"
    stored = {"int8": "int8", "bfloat16": "bfloat16"}.get(dtype, "uint8")
    pages = EXAMPLES * CAPACITY // PAGE
    lead, slots = (pages, PAGE) if name == "pages" else (EXAMPLES, CAPACITY)
    keys = array(lead, KEY_HEADS, H, slots, dtype=stored)
    values = array(lead, KEY_HEADS, slots, H, dtype=stored)
    scale = array(lead, KEY_HEADS, slots, dtype="float32") if is_rounded else None
    store = Store(keys, values, scale, scale, jnp.dtype(dtype).name, H, H)
    if name != "pages":
        return Cache(store, length)
    pool = Pool(whole(pages), whole(), whole(pages))
    return PagedCache(store, whole(EXAMPLES, CAPACITY // PAGE), length, pool)
