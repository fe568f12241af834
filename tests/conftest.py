import jax

# Every cast in the package is written out: an implicit promotion is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
