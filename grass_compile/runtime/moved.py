"""``.grad`` of a projected weight that has already moved inside the backward: a stand-in without storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _aot, _autograd
from ..errors import StateError
from .gradient import FINITENESS, SET_DATA

aten = torch.ops.aten


class MovedGrad(Tensor):
    """A gradient that has been applied and is gone.

    It answers shape, dtype and device, ``is None``, ``zero_grad``, its 2-norm (which the step has computed) and whether it is
    finite. Reading, scaling, clipping or replacing its values comes too late and is refused.

    Attributes:
        square_sum: the squared 2-norm of the compact gradient by which the weight has moved, ``[1]``.
        name_: the name of the weight.
        on_touch: told what is refused.
        spent: whether the ``opt.step()`` that it belongs to is over.
        zeroed: whether ``zero_grad(set_to_none=False)`` has emptied it after that: it stands for zeros then.
    """

    square_sum: Tensor
    name_: str
    on_touch: Callable[[str], None] | None
    spent: bool
    zeroed: bool

    @staticmethod
    def __new__(cls, weight: Tensor, *rest: Any) -> MovedGrad:
        made: MovedGrad = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        return made

    def __init__(self, weight: Tensor, square_sum: Tensor, name: str, on_touch: Callable[[str], None] | None = None) -> None:
        self.square_sum, self.name_, self.on_touch, self.spent, self.zeroed = square_sum, name, on_touch, False, False

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"MovedGrad(shape={tuple(self.shape)}, already applied)"

    def refusal(self, what: str) -> StateError:
        """The error for an operation that comes too late; whoever watches the loop is told."""
        if self.on_touch is not None:
            self.on_touch(what)
        return StateError(
            f"{self.name_}: it has already moved inside the backward, so its gradient can no longer be {what}. Use "
            "max_grad_norm= to clip, or make the optimizer with step_in_backward=False."
        )

    def tolist(self) -> Any:
        """Nested lists of zeros after ``zero_grad``.

        Raises:
            StateError: it stands for a gradient that is gone.
        """
        return self._zeros("read").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """An array of zeros after ``zero_grad``.

        Raises:
            StateError: it stands for a gradient that is gone.
        """
        return self._zeros("read").numpy(force=force)

    def _zeros(self, what: str) -> Tensor:
        if not self.zeroed:
            raise self.refusal(what)
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def _emptied(self) -> MovedGrad:
        if not self.spent:
            raise self.refusal("zeroed")
        self.zeroed = True
        return self

    def _norm(self, dtype: torch.dtype | None = None) -> Tensor:
        norm = torch.zeros_like(self.square_sum[0]) if self.zeroed else self.square_sum[0].sqrt()
        return norm.to(dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FINITENESS:
            (grad,) = args
            answer = FINITENESS[func](grad._norm(grad.square_sum.dtype))
            return answer.expand(grad.shape)
        if func == SET_DATA and isinstance(args[0], MovedGrad):
            raise args[0].refusal("replaced")
        return _autograd.run_as_is(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0]
        if func is aten.zero_.default:
            return args[0]._emptied()
        if func is aten._foreach_zero_.default:
            return [gradient.zero_() for gradient in args[0]] and None
        if func in (aten.linalg_vector_norm.default, aten.norm.Scalar) and _is_two_norm(args[1:], kwargs):
            return args[0]._norm(kwargs.get("dtype"))
        if func is aten._foreach_norm.Scalar and _is_two_norm(args[1:2], {}):
            dtype = args[2] if len(args) > 2 else kwargs.get("dtype")
            return [torch.linalg.vector_norm(gradient, 2, dtype=dtype) for gradient in args[0]]
        what = "scaled, clipped or added to" if func._schema.is_mutable else "read"
        for gradient in args[:1]:
            if func._schema.is_mutable and isinstance(gradient, MovedGrad) and gradient.zeroed:
                raise StateError(
                    f"{gradient.name_}: its gradient was applied inside the backward and then set to zero; what is written into "
                    "it now would be lost. Use zero_grad(set_to_none=True), or make the optimizer with step_in_backward=False."
                )
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            what = "unscaled by GradScaler"
        args, kwargs = _aot.tree_map_only(MovedGrad, lambda gradient: gradient._zeros(what), (args, kwargs))
        return func(*args, **kwargs)


def _is_two_norm(order: Any, kwargs: Any) -> bool:
    return tuple(order) in ((), (2,)) and not set(kwargs) - {"dtype"}
