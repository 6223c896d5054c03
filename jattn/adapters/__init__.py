"""The public functions under other libraries' signatures, and inside their layers.

`pairs`     masks and biases as other libraries give them
`layer`     what layers of other libraries have in common
`jax_nn`    `jax.nn.dot_product_attention`
`nnx`       `flax.nnx.MultiHeadAttention`, and its `attention_fn`
`linen`     `flax.linen.MultiHeadDotProductAttention`, and its `attention_fn`
`equinox`   `equinox.nn.MultiheadAttention`
`haiku`     `haiku.MultiHeadAttention`
`keras`     `keras.layers.MultiHeadAttention`, on its JAX backend

This package imports none of them. Each is imported by itself, so that an adapter needs only
its own framework.
"""
