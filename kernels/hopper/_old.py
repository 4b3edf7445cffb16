"""Temporary: the names that files not yet moved to the new vocabulary use."""
from nvfp4jax.kernels.hopper.decode import *  # noqa
from nvfp4jax.kernels.hopper.decode import DECODE_FACTOR, SCALE, decode_codes, permute_k, as_words  # noqa
from nvfp4jax.kernels.hopper.machine import *  # noqa
from nvfp4jax.kernels.hopper.mosaic import *  # noqa
from nvfp4jax.kernels.hopper.mosaic import _i32
from nvfp4jax.kernels.hopper.threads import *  # noqa
import operator as _o
add, sub, mul = (lambda a, b, f=f: f(_i32(a), b) for f in (_o.add, _o.sub, _o.mul))
div, rem, bit_and, bit_xor = (lambda a, b, f=f: f(_i32(a), b) for f in (_o.floordiv, _o.mod, _o.and_, _o.xor))
shift_right = lambda a, b: a >> b
def flag(predicate, a, b):
    return {"lt": _o.lt, "le": _o.le, "eq": _o.eq}[predicate](_i32(a), b)
from nvfp4jax.kernels.hopper.decode import SCALE  # noqa
