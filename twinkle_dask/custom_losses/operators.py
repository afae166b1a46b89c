"""The operators that a custom loss may use, by the names that clients send. No torch here.

What is not in these tables cannot be asked for. Everything in them is pure: no randomness, no
input or output, nothing in place, no attribute by a client's string. ``trainer.custom_operators``
has the function for each; a test holds the two together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Operator:
    """What an operator takes.

    Attributes:
        names: Of its parameters; the first one is given by position always.
        num_by_position: How many of them may be given by position; None if the first may be
            followed by any number.
        num_required: How many it cannot do without.
    """

    names: tuple[str, ...]
    num_by_position: int | None
    num_required: int


def _read(table: str) -> Iterator[tuple[str, Operator]]:
    """Lines of ``operators : parameters``.

    A parameter with ``?`` may be left out, those after ``*`` are given by name only, and ``...``
    takes any number by position.
    """
    for line in table.strip().splitlines():
        names, _, takes = line.partition(":")
        words = takes.split()
        star = words.index("*") if "*" in words else len(words)
        required = sum(1 for word in words if word not in {"*", "..."} and not word.endswith("?"))
        parameters = tuple(w.rstrip("?") for w in words if w not in {"*", "..."})
        by_position = None if "..." in words else star
        for name in names.split():
            yield name, Operator(parameters, by_position, required)


_ELEMENTWISE = (
    "abs absolute acos acosh asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc exp exp2 "
    "expit expm1 floor frac isfinite isinf isnan lgamma log log10 log1p log2 logical_not neg "
    "negative positive rad2deg reciprocal relu round rsqrt sgn sigmoid sign sin sinh sqrt square "
    "tan tanh trunc"
)

# The same by either spelling: ``torch.exp(x)`` and ``x.exp()``.
_BOTH = f"""
{_ELEMENTWISE} bitwise_not clone detach numel t ravel : input
logit : input eps?
nan_to_num : input nan? posinf? neginf?
add sub subtract : input other * alpha?
mul multiply true_divide floor_divide remainder fmod maximum minimum : input other
fmax fmin atan2 arctan2 hypot logaddexp logaddexp2 xlogy eq ne lt le gt ge : input other
less less_equal greater greater_equal not_equal logical_and logical_or logical_xor : input other
bitwise_and bitwise_or bitwise_xor heaviside : input other
pow : input exponent
div divide : input other * rounding_mode?
clamp clip : input min? max?
clamp_min : input min
clamp_max : input max
lerp : input end weight
masked_fill : input mask value
sum mean nansum nanmean prod : input dim? keepdim? * dtype? axis?
amax amin : input dim? keepdim? * axis?
max min : input dim? keepdim? * other? axis?
argmax argmin all any : input dim? keepdim? * axis?
std var : input dim? unbiased? keepdim? * correction? axis?
median logsumexp : input dim? keepdim?
norm : input p? dim? keepdim? dtype?
count_nonzero : input dim?
cumsum cumprod logcumsumexp : input dim? * dtype? axis?
softmax log_softmax : input dim? dtype?
sort argsort : input dim? descending? * stable?
topk : input k dim? largest? sorted?
flip : input dims ...
roll : input shifts dims?
diff : input * dim?
flatten : input start_dim? end_dim?
squeeze : input dim?
unsqueeze : input dim
transpose swapaxes : input dim0 dim1
broadcast_to : input size
repeat_interleave : input repeats dim?
chunk : input chunks dim?
split : tensor split_size dim?
unbind : input dim?
narrow : input dim start length
select : input dim index
index_select gather : input dim index
take_along_dim : input indices dim?
tril triu : input diagonal?
outer : input vec2
dot : input tensor
matmul mm mv : input other
is_floating_point : input
"""

_FUNCTIONS = """
reshape : input shape
permute : input dims
where : condition input other
stack cat concat concatenate : tensors dim? * axis?
zeros_like ones_like : input * dtype? device?
full_like : input fill_value * dtype? device?
arange : start end? step? * dtype? device?
zeros ones : size ... * dtype? device?
full : size fill_value * dtype? device?
xlog1py : input other
entr ndtr log_ndtr : input
vector_norm : x ord? dim? keepdim? dtype?
logsigmoid softsign tanhshrink relu6 mish silu selu : input
softplus : input beta? threshold?
gelu : input * approximate?
elu celu : input alpha?
leaky_relu : input negative_slope?
hardtanh : input min_val? max_val?
softmin : input dim? * dtype?
huber_loss : input target reduction? delta?
mse_loss l1_loss binary_cross_entropy_with_logits : input target * reduction?
smooth_l1_loss : input target * reduction? beta?
kl_div : input target * reduction? log_target?
pad : input pad mode? value?
normalize : input p? dim? eps?
cosine_similarity : x1 x2 dim? eps?
"""

_METHODS = """
float double half bfloat16 bool long int contiguous dim ndimension : input
size : input dim?
to : input other? * dtype? device?
type_as expand_as view_as reshape_as : input other
view reshape : input shape ...
permute : input dims ...
expand : input size ...
repeat : input repeats ...
new_zeros new_ones : input size ... * dtype? device?
new_full : input size fill_value * dtype? device?
"""

_OPERATORS = """
add sub mul truediv floordiv mod pow matmul lt le gt ge eq ne and_ or_ xor : a b
neg pos abs invert inv : a
getitem : a b
"""

_MATH = """
sqrt exp log2 log10 log1p expm1 floor ceil fabs tanh sin cos tan atan erf : x
isfinite isnan isinf : x
log : x base?
pow atan2 : x y
"""

ATTRIBUTES: Final = frozenset({"shape", "ndim", "dtype", "device", "T", "mT"})
"""What may be read of a tensor with ``getattr``."""

FUNCTIONS: Final[Mapping[str, Operator]] = {
    **dict(_read(_BOTH)),
    **dict(_read(_FUNCTIONS)),
    **{f"operator.{name}": operator for name, operator in _read(_OPERATORS)},
    **{f"math.{name}": operator for name, operator in _read(_MATH)},
}
"""By our name for them: that of torch, or with a module before it."""

METHODS: Final[Mapping[str, Operator]] = {
    **dict(_read(_BOTH)),
    **{f"Tensor.{name}": operator for name, operator in _read(_METHODS)},
}
"""Tensor methods. One that has a function of the same meaning has its name."""

WORDS: Final = frozenset(
    {"floor", "trunc", "mean", "sum", "none", "fro", "constant", "tanh", "cpu"}
)
"""The texts that may stand as arguments."""

# Where torch keeps a function is not what its users call it.
_MODULES = (
    "torch._C._special.special_",
    "torch._C._linalg.linalg_",
    "torch.nn.functional.",
    "torch._C._nn.",
    "torch.functional.",
    "torch.special.",
    "torch.linalg.",
    "torch.",
)
_OTHER_NAMES = {"log_sigmoid": "logsigmoid"}

INERT: Final[Mapping[str, Any]] = {
    "inplace": False,
    "out": None,
    "size_average": None,
    "reduce": None,
    "weight": None,
    "pos_weight": None,
    "_stacklevel": 3,
}
"""Arguments that tracing writes down by itself; with these values they say nothing."""


def function_name(target: str) -> str | None:
    """Our name for a function that a graph calls; None if it is none of ours."""
    if target.startswith(("operator.", "math.")):
        name = target
    else:
        module = next((m for m in _MODULES if target.startswith(m)), None)
        if module is None:
            return None
        name = target.removeprefix(module)
        name = _OTHER_NAMES.get(name, name)
        if "." in name:
            return None
    return name if name in FUNCTIONS else None


def method_name(target: str) -> str | None:
    """Our name for a tensor method that a graph calls; None if it is none of ours."""
    return next((name for name in (f"Tensor.{target}", target) if name in METHODS), None)


def operator_of(name: str) -> Operator:
    """The operator of this name of ours."""
    return METHODS[name] if name in METHODS else FUNCTIONS[name]
