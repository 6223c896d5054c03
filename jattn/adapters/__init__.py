"""The public functions under the signatures of other libraries; none is imported here.

`jattn.adapters.jax_nn` has `jax.nn.dot_product_attention`.
"""
