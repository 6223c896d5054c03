"""The calls that `bench.tpu` compiles: this library's, and splash attention."""

LENGTH, BLOCK = 4096, 512


def own(what: str):
    """Calls attention as users write it."""
    import jax
    import jax.numpy as jnp

    import jattn
    from jattn.masks import Causal

    def forward(query, key, value, document):
        options = {"mask": Causal()}
        slopes = jnp.array([0.5, 0.25, 0.125, 0.0625])
        if what == "modified":
            options["modifier"] = lambda logit, b, n, t, s: (
                50.0 * jnp.tanh(logit / 50.0)
                - slopes[n] * jnp.abs(t - s).astype(logit.dtype)
            )
        if what == "documents":
            options["mask"] = lambda b, n, t, s: (t >= s) & (document[t] == document[s])
        return jattn.attention(query, key, value, **options)

    def backward(query, key, value, document):
        run = lambda *xs: forward(*xs, document)
        return jax.vjp(run, query, key, value)[1](query)

    return backward if what.endswith("backward") else forward


def splash(backward: bool):
    """Calls splash attention in the same blocks."""
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    names = ("block_q", "block_kv", "block_kv_compute")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = library.make_splash_mha_single_device(
        mask=library.MultiHeadMask([library.CausalMask((LENGTH, LENGTH))] * 4),
        block_sizes=library.BlockSizes(
            **dict.fromkeys(names, BLOCK), use_fused_bwd_kernel=True
        ),
    )
    if not backward:
        return kernel
    return lambda query, key, value: jax.vjp(kernel, query, key, value)[1](query)
