"""The operators of ``twinkle_dask.custom_losses.operators``: for each its function, and its work.

The work of an operator is a bound of the numbers it reads, makes or multiplies, told before it is
called, so that nothing large is ever begun. A function is one of torch's own where it can do no
harm whatever it is given, else one of those below.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

Work: TypeAlias = Callable[..., int]
Function: TypeAlias = Callable[..., Any]

MAX_PIECES: Final = 1024
# Products of matrices are that much faster than one number at a time.
_PRODUCTS = 8


class Refused(Exception):
    """The operator is not for these arguments; the message is for the tenant."""


# ---- work


def largest(*args: Any, **kwargs: Any) -> int:
    """What is done element by element: the shape that all tensors are broadcast to."""
    shapes = [value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return _broadcast(shapes)


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    sizes: list[int] = []
    for shape in shapes:
        for place, size in enumerate(reversed(shape)):
            if place == len(sizes):
                sizes.append(size)
            sizes[place] = max(sizes[place], size)
    return extent(sizes)


def extent(sizes: Iterable[int]) -> int:
    """How many numbers a shape has, were it empty in no dimension.

    The sum of ``(0, 10**12)`` over its first dimension has 10**12 numbers and reads none.
    """
    return math.prod(max(1, size) for size in sizes)


def _all_of(tensors: Any, *_: Any, **__: Any) -> int:
    return sum(map(largest, _tensors(tensors)))


def _expanded(tensor: Tensor, *sizes: Any, size: Any = None) -> int:
    wanted = _sizes(sizes if size is None else (size,))
    shape = (1,) * (len(wanted) - tensor.ndim) + tuple(tensor.shape)
    both = zip(wanted, shape, strict=False)
    return extent(have if want == -1 else want for want, have in both)


def _repeated(tensor: Tensor, *repeats: Any) -> int:
    return extent(tensor.shape) * extent(_sizes(repeats))


def _repeated_each(tensor: Tensor, repeats: Any, *_: Any, **__: Any) -> int:
    return tensor.numel() * _sizes((repeats,))[0]


def _outer(input: Tensor, vec2: Tensor) -> int:
    return input.numel() * vec2.numel()


def _product(input: Tensor, other: Tensor) -> int:
    inner = max(1, input.shape[-1]) if input.ndim else 1
    made = (input.numel() // inner) * max(1, other.numel() // inner)
    # Matrices in several dimensions are copied to all of these first.
    faster = 1 if input.ndim > 2 and other.ndim > 2 else _PRODUCTS
    return input.numel() + other.numel() + made * (1 + inner // faster)


def _gathered(tensor: Tensor, dim: Any, index: Tensor) -> int:
    return max(tensor.numel(), index.numel())


def _picked(tensor: Tensor, dim: Any, index: Tensor) -> int:
    along = tensor.shape[_one(dim)] if tensor.ndim else 1
    return tensor.numel() + index.numel() * max(1, tensor.numel() // max(1, along))


def _padded(tensor: Tensor, pad: Any, *_: Any, **__: Any) -> int:
    around = [abs(size) for size in _signed(pad)]
    sizes = list(tensor.shape)
    for place in range(0, len(around) - 1, 2):
        if place // 2 < len(sizes):
            sizes[-1 - place // 2] += around[place] + around[place + 1]
    return extent(sizes)


def _of_size(*sizes: Any, size: Any = None, **_: Any) -> int:
    return extent(_sizes(sizes if size is None else (size,)))


def _new_of_size(tensor: Tensor, *sizes: Any, size: Any = None, **_: Any) -> int:
    return extent(_sizes(sizes if size is None else (size,)))


def _full(size: Any, *_: Any, **__: Any) -> int:
    return extent(_sizes((size,)))


def _new_full(tensor: Tensor, size: Any, *_: Any, **__: Any) -> int:
    return extent(_sizes((size,)))


def _counted(start: Any, end: Any = None, step: Any = 1, **_: Any) -> int:
    first, last = (0, start) if end is None else (start, end)
    first, last, by = _number(first), _number(last), _number(step)
    count = (last - first) / by if by else 0.0
    if not math.isfinite(count):
        raise Refused("the bounds must be finite")
    return max(0, math.ceil(count))


def _indexed(value: Any, key: Any) -> int:
    """``value[key]``: what the indices pick out of the dimensions they are for, times the rest."""
    if not isinstance(value, Tensor):
        return 1
    keys = cast(tuple[Any, ...], key) if isinstance(key, tuple) else (key,)
    left = list(value.shape)
    taken = sum(_dimensions(one) for one in keys)
    shapes: list[Sequence[int]] = []
    result = 1
    for one in keys:
        match one:
            case None | bool():
                pass
            case _ if one is Ellipsis:
                for _ in range(max(0, value.ndim - taken)):
                    result *= left.pop(0)
            case slice():
                result *= left.pop(0) if left else 1
            case int():
                del left[:1]
            case Tensor():
                shapes.append((one.numel(),) if one.dtype is torch.bool else tuple(one.shape))
                del left[: _dimensions(one)]
            case _:
                raise Refused("an index must be an integer, a slice, a tensor, None or ...")
    return max(value.numel(), result * _broadcast(shapes) * math.prod(left))


def _dimensions(key: Any) -> int:
    """How many dimensions an index is for."""
    if key is None or key is Ellipsis:
        return 0
    if isinstance(key, Tensor) and key.dtype is torch.bool:
        return key.ndim
    return 1


# ---- arguments


def _tensors(value: Any) -> list[Tensor]:
    items: Sequence[Any] = cast(Sequence[Any], value) if isinstance(value, list | tuple) else ()
    if not items or not all(isinstance(item, Tensor) for item in items):
        raise Refused("it takes a list of tensors")
    return list(items)


def _signed(value: Any) -> list[int]:
    items = cast(Sequence[Any], value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise Refused("sizes must be integers")
    return list(items)


def _sizes(given: Sequence[Any]) -> list[int]:
    """Sizes, given as one list or one by one; -1 means what it means."""
    nested = len(given) == 1 and isinstance(given[0], list | tuple)
    sizes = _signed(given[0] if nested else list(given))
    if any(size < -1 for size in sizes) or len(sizes) > 8:
        raise Refused("sizes must not be negative, and of at most 8 dimensions")
    return sizes


def _one(dim: Any) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise Refused("a dimension must be an integer")
    return dim


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise Refused("it takes plain numbers, not tensors; use torch's function of that name")
    return value


# ---- functions of our own


def _plain(function: Function) -> Function:
    """An operator of Python: on tensors torch's, on numbers bounded, on nothing else."""

    def call(*args: Any) -> Any:
        if not any(isinstance(arg, Tensor) for arg in args):
            for arg in args:
                _number(arg)
        elif any(isinstance(arg, list | tuple | str) for arg in args):
            raise Refused("it takes tensors and numbers")
        return function(*args)

    return call


def _power(a: Any, b: Any) -> Any:
    # Integers of Python have no end. (With a tensor in it, 64 bits are the end.)
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b * a.bit_length() > 128:
        raise Refused("the number is too large")
    return a**b


def _pow(input: Any, exponent: Any) -> Any:
    return _plain(_power)(input, exponent)


def _whole(function: Function) -> Function:
    """A division without remainder, safe for integers.

    The smallest integer by -1 does not fit; processors trap it, and the process would be gone
    (torch 2.13: ``torch.div(torch.tensor([-2**63]), -1, rounding_mode="trunc")``). What counts is
    the integer after both are brought to one dtype, to which a number or a tensor without
    dimensions is cut: -2**31 - 2**32 becomes the smallest one of 32 bits.
    """

    def call(input: Any, other: Any, **kwargs: Any) -> Any:
        if isinstance(input, Tensor) or isinstance(other, Tensor):
            common = torch.result_type(input, other)
            if not common.is_floating_point and common is not torch.bool:
                for value in (input, other):
                    whole = torch.as_tensor(value).to(common)
                    if bool((whole == torch.iinfo(common).min).any()):
                        raise Refused("an integer is too small to be divided")
        return function(input, other, **kwargs)

    return call


def _getitem(value: Any, key: Any) -> Any:
    if not isinstance(value, Tensor | tuple | list):
        raise Refused("it has no parts")
    return cast(Any, value)[key]


def _softmax(input: Tensor, dim: Any = -1, dtype: Any = None) -> Tensor:
    return torch.softmax(input, dim, dtype=dtype)


def _log_softmax(input: Tensor, dim: Any = -1, dtype: Any = None) -> Tensor:
    return torch.log_softmax(input, dim, dtype=dtype)


def _flip(tensor: Tensor, *dims: Any) -> Tensor:
    return torch.flip(tensor, _signed(_flat(dims)))


def _permute(tensor: Tensor, *dims: Any) -> Tensor:
    return torch.permute(tensor, _signed(_flat(dims)))


def _where(condition: Tensor, input: Any, other: Any) -> Tensor:
    return torch.where(condition, input, other)


def _to(tensor: Tensor, other: Any = None, *, dtype: Any = None, device: Any = None) -> Tensor:
    """Conversion of dtype; there is one device."""
    wanted = [value for value in (other, dtype, device) if value is not None]
    for value in wanted:
        if isinstance(value, Tensor):
            tensor = tensor.to(value.dtype)
        elif isinstance(value, torch.dtype):
            tensor = tensor.to(value)
        elif value not in ("cpu", torch.device("cpu")):
            raise Refused("it takes a dtype, a tensor, or the device cpu")
    return tensor


def _pad(tensor: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    if mode != "constant":
        raise Refused("the only mode is 'constant'")
    return functional.pad(tensor, _signed(pad), value=value)


def _split(tensor: Tensor, split_size: Any, dim: Any = 0) -> tuple[Tensor, ...]:
    size = _one(split_size)
    if size < 1 or tensor.shape[_one(dim)] > size * MAX_PIECES:
        raise Refused(f"a tensor may be cut into {MAX_PIECES} pieces")
    return cast(Any, tensor).split(size, dim)


def _chunk(tensor: Tensor, chunks: Any, dim: Any = 0) -> tuple[Tensor, ...]:
    if not 1 <= _one(chunks) <= MAX_PIECES:
        raise Refused(f"a tensor may be cut into {MAX_PIECES} pieces")
    return tensor.chunk(chunks, _one(dim))


def _unbind(tensor: Tensor, dim: Any = 0) -> tuple[Tensor, ...]:
    if tensor.shape[_one(dim)] > MAX_PIECES:
        raise Refused(f"a tensor may be cut into {MAX_PIECES} pieces")
    return tensor.unbind(dim)


def _view(tensor: Tensor, *shape: Any) -> Tensor:
    return tensor.reshape(_sizes(shape))


def _numbers(function: Function) -> Function:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_number, args), **{k: _number(v) for k, v in kwargs.items()})

    return call


def _flat(dims: Sequence[Any]) -> Any:
    nested = len(dims) == 1 and isinstance(dims[0], list | tuple)
    return cast(Any, dims[0]) if nested else list(dims)


def _named(source: Any, names: str) -> dict[str, Function]:
    return {name: getattr(source, name) for name in names.split()}


def attribute(tensor: Any, name: str) -> Any:
    """What a graph may read of a tensor."""
    if not isinstance(tensor, Tensor):
        raise Refused("only a tensor has it")
    match name:
        case "shape":
            return tuple(tensor.shape)
        case "ndim":
            return tensor.ndim
        case "dtype":
            return tensor.dtype
        case "device":
            return tensor.device
        case "T":
            return torch.t(tensor)
        case "mT":
            return tensor.mT
        case _:
            raise Refused("it has no such attribute")


# ---- the table

_linalg: Any = torch.linalg
_python: Any = operator
_TORCH = _named(
    torch,
    "abs absolute acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc exp exp2 "
    "expm1 floor frac isfinite isinf isnan lgamma log log10 log1p log2 logical_not neg negative "
    "positive rad2deg reciprocal relu round rsqrt sgn sigmoid sign sin sinh sqrt square tan tanh "
    "trunc bitwise_not clone detach numel t ravel logit nan_to_num add sub subtract mul multiply "
    "true_divide maximum minimum fmax fmin atan2 arctan2 hypot logaddexp logaddexp2 xlogy eq ne lt "
    "le gt ge less less_equal greater greater_equal not_equal logical_and logical_or logical_xor "
    "bitwise_and bitwise_or bitwise_xor heaviside clamp clip clamp_min clamp_max lerp masked_fill "
    "sum mean nansum nanmean prod amax amin max min argmax argmin all any std var median logsumexp "
    "norm count_nonzero cumsum cumprod logcumsumexp softmax log_softmax sort argsort topk roll "
    "diff flatten squeeze unsqueeze transpose swapaxes broadcast_to repeat_interleave narrow "
    "select index_select gather take_along_dim tril triu outer dot matmul mm mv is_floating_point "
    "reshape permute stack cat concat concatenate zeros_like ones_like full_like arange zeros ones "
    "full",
)
_FUNCTIONAL = _named(
    functional,
    "softsign tanhshrink relu6 mish silu selu softplus gelu elu celu leaky_relu hardtanh softmin "
    "huber_loss mse_loss l1_loss smooth_l1_loss binary_cross_entropy_with_logits kl_div normalize "
    "cosine_similarity logsigmoid",
)
_SPECIAL = _named(torch.special, "expit xlog1py entr ndtr log_ndtr")
_MATH = _named(
    math,
    "sqrt exp log log2 log10 log1p expm1 floor ceil fabs tanh sin cos tan atan erf isfinite isnan "
    "isinf pow atan2",
)
_METHODS = _named(
    Tensor,
    "float double half bfloat16 bool long int contiguous dim ndimension size type_as expand_as "
    "view_as reshape_as expand repeat new_zeros new_ones new_full",
)
_OPERATORS = _named(
    operator, "add sub mul truediv matmul lt le gt ge eq ne and_ or_ xor neg pos abs invert inv"
)

FUNCTIONS: Final[Mapping[str, Function]] = {
    **_TORCH,
    **_FUNCTIONAL,
    **_SPECIAL,
    "vector_norm": _linalg.vector_norm,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "pow": _pow,
    "floor_divide": _whole(torch.floor_divide),
    "remainder": _whole(torch.remainder),
    "fmod": _whole(torch.fmod),
    "div": _whole(torch.div),
    "divide": _whole(torch.div),
    "where": _where,
    "flip": _flip,
    "pad": _pad,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    **{f"math.{name}": _numbers(function) for name, function in _MATH.items()},
    **{f"operator.{name}": _plain(function) for name, function in _OPERATORS.items()},
    "operator.pow": _plain(_power),
    "operator.floordiv": _plain(_whole(_python.floordiv)),
    "operator.mod": _plain(_whole(_python.mod)),
    "operator.getitem": _getitem,
    **{f"Tensor.{name}": function for name, function in _METHODS.items()},
    "Tensor.to": _to,
    "Tensor.view": _view,
    "Tensor.reshape": _view,
    "Tensor.permute": _permute,
    "getattr": attribute,
}


WORK: Final[Mapping[str, Work]] = {
    "stack": _all_of,
    "cat": _all_of,
    "concat": _all_of,
    "concatenate": _all_of,
    "broadcast_to": _expanded,
    "Tensor.expand": _expanded,
    "Tensor.repeat": _repeated,
    "repeat_interleave": _repeated_each,
    "outer": _outer,
    "matmul": _product,
    "mm": _product,
    "mv": _product,
    "operator.matmul": _product,
    "gather": _gathered,
    "index_select": _picked,
    "pad": _padded,
    "arange": _counted,
    "zeros": _of_size,
    "ones": _of_size,
    "full": _full,
    "Tensor.new_zeros": _new_of_size,
    "Tensor.new_ones": _new_of_size,
    "Tensor.new_full": _new_full,
    "operator.getitem": _indexed,
}
"""Of those that are not done element by element; called with the operator's own arguments."""


SLOW: Final[Mapping[str, int]] = {
    **dict.fromkeys(("sort", "argsort", "topk", "logcumsumexp", "cumprod"), 8),
    **dict.fromkeys(("digamma", "lgamma", "log_ndtr", "xlog1py", "asinh", "median", "softmax"), 4),
    **dict.fromkeys(("pow", "operator.pow", "take_along_dim", "gather"), 4),
    **dict.fromkeys(("cosine_similarity", "kl_div"), 4),
}
"""How many times as long as others some take for a number, with their derivative.

Most take 2 to 10 ns in one thread; these 15 to 85, by dtype and shape.
"""
