"""How torch's operations depend on their arguments, where that is more or less than on the values of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

# Names of torch's functions, methods and properties, where the three rules above need more than D(args).
# fmt: off
ABOUT = frozenset((  # facts about a tensor that no value can change
    "dtype", "device", "layout", "requires_grad", "grad_fn", "_version", "__hash__", "names", "has_names", "name",
    "element_size", "itemsize", "get_device", "result_type", "can_cast", "promote_types", "output_nr",
    "retains_grad", "retain_grad", "register_hook", "_backward_hooks", "_is_view", "register_post_accumulate_grad_hook",
    "_post_accumulate_grad_hooks", "__dlpack_device__", "_has_symbolic_sizes_strides", "qscheme",
))
SHAPES = frozenset((  # facts about a shape
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__",
    "nbytes", "is_contiguous", "is_same_size", "dim_order",
))
LIKE = frozenset((  # the first argument gives shape, dtype and device only
    "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "randint_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "new_tensor",
))
AS = frozenset((  # so does the second
    "expand_as", "view_as", "reshape_as", "type_as", "to",
))
ALIGNED = frozenset((  # each result is a view of one argument, of which the others give the shape only
    "broadcast_tensors", "broadcast_all", "expand_as", "view_as", "reshape_as",
))
FACTORIES = frozenset((  # numbers among the arguments may be sizes
    "zeros", "ones", "empty", "rand", "randn", "randint", "randperm", "arange", "range", "linspace", "logspace",
    "eye", "tril_indices", "triu_indices", "hann_window", "hamming_window", "blackman_window", "bartlett_window",
    "kaiser_window", "fft_fftfreq", "fft_rfftfreq", "fftfreq", "rfftfreq",
))
SIZED = frozenset((  # numbers after the first argument may be sizes
    "repeat", "tile", "expand", "broadcast_to", "narrow", "view", "reshape", "unflatten", "split", "chunk",
    "tensor_split", "unfold", "topk", "resize_", "pad", "diag", "diagonal", "diag_embed", "as_strided",
    "new_zeros", "new_ones", "new_empty", "repeat_interleave", "bincount",
))
POINTWISE = frozenset((  # single integers among the arguments are data
    *(f"{side}{name}" for side in ("", "r", "i") for name in (
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift",
    )),
    "true_divide", "floor_divide", "divide", "multiply", "subtract", "remainder", "fmod", "float_power", "eq", "ne",
    "lt", "le", "gt", "ge", "greater", "less", "equal", "not_equal", "greater_equal", "less_equal", "logical_and",
    "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "maximum", "minimum", "fmax", "fmin",
    "clamp", "clip", "clamp_min", "clamp_max", "where", "lerp", "addcmul", "addcdiv", "atan2", "hypot",
    "copysign", "xlogy", "ldexp", "isclose", "allclose", "broadcast_tensors", "broadcast_all", "gather",
    "index_select", "take", "embedding", "masked_fill", "fill", "copy", "scatter", "scatter_add", "index_add",
    "index_put", "index_fill", "index_copy", "setitem", "getitem", "cross_entropy", "nll_loss", "mse_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "binomial", "poisson", "normal", "lgamma",
))
COUNTS = frozenset((  # the shape of the result depends on the values of the arguments
    "_pack_padded_sequence", "pack_padded_sequence",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount",
    "repeat_interleave",
))
ELSEWHERE = frozenset((  # the result goes into .grad, or through a callback
    "backward", "apply_", "map_", "map2_",
))
REPLACED = frozenset(("set_", "set data"))  # the first argument shows other memory after it
STATISTICS = frozenset((  # buffers among the arguments are changed without being counted as changed
    "batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
))
# fmt: on
KINDS = {
    "__bool__": "bool()",
    "__int__": "int()",
    "__float__": "float()",
    "__complex__": "complex()",
    "__index__": "an index",
    "__array__": "numpy",
    "__dlpack__": "DLPack",
    "__repr__": "printing",
    "__format__": "printing",
}


@lru_cache(maxsize=4096)
def known(func: Callable[..., Any]) -> tuple[str, bool]:
    """The name of a function, a method or a property (``"set data"`` for an assignment); whether it reads no value."""
    name = str(getattr(func, "__name__", ""))
    if name in ("__get__", "__set__", "__delete__"):
        owner = getattr(func, "__self__", None)
        owned = str(getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", ""))
        name = owned if name == "__get__" else f"set {owned}"
    name = name.partition(".")[0]  # overloads such as aten's nonzero.default
    question = name.startswith("is_") and name not in ("is_nonzero", *SHAPES)
    return name, question or name in ABOUT


def relevant(name: str, args: tuple[Any, ...], masks: list[int]) -> list[int]:
    """The masks of the arguments, without those of which only shape, dtype or device matter."""
    if name in LIKE and args and isinstance(args[0], Tensor):
        return [0, *masks[1:]]
    if name in AS and len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
        return [masks[0], 0, *masks[2:]]
    return masks
