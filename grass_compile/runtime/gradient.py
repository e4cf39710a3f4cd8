"""``.grad`` of a projected weight whose step waits for ``opt.step()``: a compact gradient that behaves like the full one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _aot, _autograd
from ..distributed.crossed import refused_reading
from ..errors import StateError
from ..math.projection import basis_of, expanded, selected

aten = torch.ops.aten


class CompactGrad(Tensor):
    """A gradient of shape ``[m, n]`` that is zero outside of ``r`` rows (columns), and holds only these.

    With a dense projection ``P`` it is ``P C``, and holds ``C``. Its norm is then that of ``C``. With the orthonormal basis of
    ``galore`` this is the norm of ``P C`` too; with the random ``P`` of ``gaussian`` it estimates the norm of the full gradient.

    Norms, clipping by norm or value, scaling, unscaling by ``GradScaler`` and ``zero_grad`` work and are exact. A full gradient
    that is added or copied into it leaves its selected rows there: the result is the compact gradient of the sum. Any other
    operator that only reads it gets the full tensor, made for the purpose. An operator that would write single elements is
    refused.

    Attributes:
        compact: the values, ``[r, n]`` or ``[m, r]``, at least fp32.
        rows: their index, ``int64[r]``; with a dense projection, the basis or the key.
        along: the dimension that it selects along.
        projection: how it is projected.
        name_: the name of the weight.
        fresh: whether ``rows`` were chosen by this very gradient and are not the state's yet.
        next_rows: what its backward proposes for the next step, or None.
        zeroed: whether ``zero_grad(set_to_none=False)`` has emptied it, so that nothing waits in it.
        task: the number of the backward that delivered it, or -1.
        mixed: whether it holds anything that came as a full gradient.
        applied: whether `opt.step()` has moved the weight by it and not come to its end yet.
        outside: makes the error for a full gradient that is added to it; None where it is welcome.
        on_touch: told what a script does to it that a gradient which was already applied would have to refuse.
    """

    compact: Tensor
    rows: Tensor
    along: int
    projection: str
    name_: str
    fresh: bool
    next_rows: Tensor | None
    zeroed: bool
    task: int
    applied: bool
    mixed: bool
    on_touch: Callable[[str], None] | None
    outside: Callable[[], Exception] | None

    @staticmethod
    def __new__(cls, values: Tensor, index: Tensor, dim: int, weight: Tensor, *rest: Any) -> CompactGrad:
        made: CompactGrad = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        return made

    def __init__(
        self,
        values: Tensor,
        index: Tensor,
        dim: int,
        weight: Tensor,
        name: str = "",
        fresh: bool = False,
        next_rows: Tensor | None = None,
        projection: str = "grass",
    ) -> None:
        self.compact, self.rows, self.along, self.name_, self.fresh = values, index, dim, name, fresh
        self.next_rows, self.projection = next_rows, projection
        self.zeroed = self.applied = self.mixed = False
        self.task, self.on_touch, self.outside = _autograd.graph_task(), None, None

    def tolist(self) -> Any:
        """The full gradient as nested lists."""
        return self._read().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The full gradient as an array."""
        return self._read().numpy(force=force)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CompactGrad(shape={tuple(self.shape)}, {self.compact.shape[self.along]} along dimension {self.along})"

    def full(self) -> Tensor:
        """The full gradient, ``[m, n]``, in its nominal dtype."""
        if self.projection != "grass":
            length, rank = self.shape[self.along], self.compact.shape[self.along]
            basis = basis_of(self.projection, self.rows, length, rank, self.compact.dtype)
            return expanded(self.compact, self.along, basis).to(self.dtype)
        if self.compact.shape[1 - self.along] != self.shape[1 - self.along]:
            raise refused_reading(self.name_)
        full = torch.zeros(self.shape, dtype=self.compact.dtype, device=self.compact.device)
        return full.index_add_(self.along, self.rows, self.compact).to(self.dtype)

    def part_of(self, gradient: Tensor) -> Tensor:
        """The values of a full gradient, or of a compact one of other rows, in the rows of this one; ``[r, n]`` or ``[m, r]``."""
        if isinstance(gradient, CompactGrad):
            if gradient.rows is self.rows or torch.equal(gradient.rows, self.rows):
                return gradient.compact
            gradient = gradient.full()
        rank = self.compact.shape[self.along]
        return selected(self.projection, self.along, rank, gradient.to(self.compact.dtype), self.rows)

    def _read(self) -> Tensor:
        _note("read", (self,))
        return self.full()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FINITENESS:  # a stand-in answers this too, so asking says nothing of a loop
            return FINITENESS[func](args[0].full())
        if func == SET_DATA and isinstance(args[0], CompactGrad):
            return args[0].copy_(args[1])
        return _autograd.run_as_is(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0]
        if func in _WHOLE_NORMS and len(args) < 3 and "dim" not in kwargs and _knows_norm(*args):
            _note("" if args[1:2] in ((), (2,)) else "read", args)
            return func(args[0].compact, *args[1:], **kwargs)
        if func is aten._foreach_norm.Scalar:
            _note("" if args[1:2] in ((), (2,)) else "read", args)
        else:
            _note("scaled, clipped or written to" if func._schema.is_mutable else "read", args)
        if func is aten.clone.default:
            grad = args[0]
            held = grad.along, grad, grad.name_, grad.fresh, grad.next_rows, grad.projection
            copy = CompactGrad(grad.compact.clone(), grad.rows.clone(), *held)
            copy.outside = grad.outside
            return copy
        if func is aten.zero_.default:
            args[0].zeroed = True
        if func in _IN_PLACE and _is_number(*args[1:]):
            func(args[0].compact, *args[1:], **kwargs)
            return args[0]
        if func in _FROM_FULL and isinstance(args[0], CompactGrad):
            other = args[1]
            if args[0].outside is not None and isinstance(other, Tensor) and not isinstance(other, CompactGrad) and other.dim():
                raise args[0].outside()
            func(args[0].compact, args[0].part_of(other) if isinstance(other, Tensor) and other.dim() else other, **kwargs)
            args[0].zeroed, args[0].mixed = False, True
            return args[0]
        if func is aten.clamp_.default:
            _clamp_(_inner(args[0]), *args[1:], **{{"min": "low", "max": "high"}[key]: value for key, value in kwargs.items()})
            return args[0]
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            return _unscale(*args)
        if func is aten._foreach_zero_.default:
            return [gradient.zero_() for gradient in args[0]] and None
        if func in (aten._foreach_add_.List, aten._foreach_copy_.default):
            single = Tensor.add_ if func is aten._foreach_add_.List else Tensor.copy_
            pairs = zip(args[0], args[1], strict=True)
            return [single(gradient, other, **kwargs) for gradient, other in pairs] and None
        if func in _ONE_BY_ONE:
            results = _one_by_one(_ONE_BY_ONE[func], *args)
            return results if func._schema.returns else None
        return _read(func, args, kwargs)


def _note(what: str, args: Any) -> None:
    """Tell what is done to the compact gradients among the arguments of an operator, unless the backward that has delivered them
    does it."""
    if not what:
        return
    task = _autograd.graph_task()
    for argument in args:
        for gradient in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(gradient, CompactGrad) and gradient.on_touch is not None and (task < 0 or task != gradient.task):
                gradient.on_touch(what)


class Reading(Tensor):
    """A view of a full gradient that was made for reading. Writing into it is refused, since the values would be lost."""

    full: Tensor
    name_: str

    @staticmethod
    def __new__(cls, full: Tensor, name: str) -> Reading:
        made: Reading = Tensor._make_wrapper_subclass(
            cls, full.shape, strides=full.stride(), storage_offset=full.storage_offset(), dtype=full.dtype, device=full.device
        )
        return made

    def __init__(self, full: Tensor, name: str) -> None:
        self.full, self.name_ = full, name

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.full)

    def tolist(self) -> Any:
        """Its values as nested lists."""
        return self.full.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Its values as an array."""
        return self.full.numpy(force=force)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _read(func, args, kwargs or {})


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on full tensors, if it writes into no gradient; a view of one is for reading too.

    Raises:
        StateError: naming the weight.
    """
    name = ""
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for grad in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(grad, (CompactGrad, Reading)):
                name = name or grad.name_
                if argument.alias_info is not None and argument.alias_info.is_write:
                    raise StateError(
                        f"{grad.name_}: {func} would write into its compact gradient, which is zero outside of its rows. "
                        "Scale or clip it by a number, or keep this weight dense with exclude=."
                    )
    args, kwargs = _aot.tree_map_only(CompactGrad, lambda grad: grad.full(), (args, kwargs))
    args, kwargs = _aot.tree_map_only(Reading, lambda view: view.full, (args, kwargs))
    result = func(*args, **kwargs)
    if any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns):
        return _aot.tree_map_only(Tensor, lambda view: Reading(view, name), result)
    return result


def _is_number(*others: Any) -> bool:
    """Whether a compact gradient may be scaled by ``others`` without knowing where its values stand."""
    return all(other.numel() == 1 for other in others if isinstance(other, Tensor))


def _knows_norm(gradient: CompactGrad, order: Any = 2) -> bool:
    """Whether the norm of the compact gradient is that of the full one: any that zeros do not count in, if rows were selected."""
    return bool(order == 2 if gradient.projection != "grass" else order > 0)


def _one_by_one(single: Callable[..., Any], gradients: list[Any], *rest: Any) -> Any:
    """A ``_foreach`` operator on a list in which compact and full gradients are mixed."""
    if single is _norm:
        whole = [isinstance(g, CompactGrad) and not _knows_norm(g, *rest[:1]) for g in gradients]
        gradients = [g.full() if form else g for g, form in zip(gradients, whole, strict=True)]
    clamps = single in (_clamp_, _clamp_max_)
    arguments = [[other[at] if isinstance(other, (list, tuple)) else other for other in rest] for at in range(len(gradients))]
    for gradient, others in zip(gradients, arguments, strict=True):
        if isinstance(gradient, CompactGrad) and not _is_number(*others):
            raise StateError(f"{gradient.name_}: a compact gradient can be scaled by numbers only; keep it dense with exclude=.")
    inner = [_inner(gradient, clamps) for gradient in gradients]
    return [single(gradient, *others) for gradient, others in zip(inner, arguments, strict=True)]


def _inner(gradient: Tensor, clamped: bool = True) -> Tensor:
    """The values of a gradient, compact or not.

    Raises:
        StateError: they are to be clamped, and are no elements of the gradient that they stand for.
    """
    if not isinstance(gradient, CompactGrad):
        return gradient
    if clamped and gradient.projection != "grass":
        raise StateError(
            f"{gradient.name_}: it is projected with {gradient.projection!r}, so its elements cannot be clamped one by one. "
            "Clip by norm, or keep this weight dense with exclude=."
        )
    return gradient.compact


def _clamp_(gradient: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise StateError("a compact gradient is zero outside of its rows, and this clamp would change that. Clamp around zero.")
    return gradient.clamp_(low, high)


def _clamp_max_(gradient: Tensor, high: Any) -> Tensor:
    return _clamp_(gradient, None, high)


def _norm(gradient: Tensor, order: Any = 2, dtype: Any = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, order, dtype=dtype)
    return norm


def _unscale(gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    inner = [_inner(gradient, False) for gradient in gradients]
    for gradient in inner:
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], found_inf, inverse_scale)


FINITENESS = {
    torch.isfinite: torch.isfinite,
    torch.isnan: torch.isnan,
    torch.isinf: torch.isinf,
    Tensor.isfinite: torch.isfinite,
    Tensor.isnan: torch.isnan,
    Tensor.isinf: torch.isinf,
}
"""The functions that ask whether the elements of a tensor are finite."""

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
"""``gradient.data = other``."""

_SAME = (aten.detach.default, aten.alias.default)
_FROM_FULL = (aten.add_.Tensor, aten.sub_.Tensor, aten.copy_.default)
_IN_PLACE = (aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.zero_.default)
_WHOLE_NORMS = (aten.linalg_vector_norm.default, aten.norm.Scalar)
_ONE_BY_ONE: dict[Any, Callable[..., Any]] = {
    aten._foreach_norm.Scalar: _norm,
    aten._foreach_mul_.Tensor: Tensor.mul_,
    aten._foreach_mul_.Scalar: Tensor.mul_,
    aten._foreach_mul_.List: Tensor.mul_,
    aten._foreach_div_.Tensor: Tensor.div_,
    aten._foreach_div_.Scalar: Tensor.div_,
    aten._foreach_clamp_min_.Scalar: _clamp_,
    aten._foreach_clamp_max_.Scalar: _clamp_max_,
}
