"""The public functions under other libraries' signatures, and inside their layers.

`layer`     what layers of other libraries have in common
`jax_nn`    `jax.nn.dot_product_attention`
`nnx`       what `flax.nnx.MultiHeadAttention` takes as `attention_fn`
`linen`     what `flax.linen.MultiHeadDotProductAttention` takes as `attention_fn`
`equinox`   `equinox.nn.MultiheadAttention`
`haiku`     `haiku.MultiHeadAttention`
`keras`     `keras.layers.MultiHeadAttention`, on its JAX backend

Each is imported by itself, and none here, so that no framework is needed for another.
"""
