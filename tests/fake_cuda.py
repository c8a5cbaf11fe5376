"""A GPU that is not there: tensors on `cuda` without values, and what would wait for it counted.

Tensors on the CPU are real; those on `cuda` are PyTorch's fake tensors, with a shape, a dtype and a
device. An operation on tensors of two devices raises `FakeTensorDeviceMismatchError`, as it would
raise on a GPU. What copies between them, or reads a value, is counted with the line that does it;
values that are read are ones. Kernels, generators on the GPU and pinning are not tried: that is
what `tests/gpu/check.sh` is for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

PACKAGE = Path(__file__).parents[1]
FREE, TOTAL = 8 * 2**30, 16 * 2**30  # bytes of memory
_load, _swap_tensors = torch.load, torch.utils.swap_tensors
aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
WITHOUT_RESULT = ("empty_cache", "synchronize", "set_device", "get_rng_state", "set_rng_state")
SHAPED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
)


@dataclass
class Waits:
    """What the host waited for the GPU for, as `operation at file:line`."""

    found: list[str] = field(default_factory=list)
    copies: int = 0
    """Copies to the GPU that the host need not wait for."""

    def note(self, operation: str) -> None:
        self.found.append(f"{operation} at {_caller()}")

    def clear(self) -> None:
        self.found.clear()
        self.copies = 0


def _caller() -> str:
    """Return the innermost line of the package, or of a test, that is being run."""
    frames = [frame for frame in traceback.extract_stack() if str(PACKAGE) in frame.filename]
    own = [frame for frame in frames if frame.filename != __file__]
    frame = own[-1] if own else traceback.extract_stack()[0]
    return f"{Path(frame.filename).name}:{frame.lineno}"


class _Fake(FakeTensorMode):
    """Fake tensors that no driver is looked for, whatever `torch.cuda.is_available` says."""

    avoid_device_init = True


class _Counting(TorchDispatchMode):
    """Mode that leaves the CPU real, and counts what waits for the GPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        if not fakes and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._copied(func, args[0], kwargs)
        if func is aten.copy_.default:
            return self._copied_into(func, *args, **kwargs)
        if func in READS:
            self._waits.note(func.name())
            known = _values_of(fakes[0])
            if func in READS[1:]:
                return True
            with unset_fake_temporarily():
                return _one(fakes[0].dtype) if known is None else known.item()
        if func in SHAPED_BY_VALUES:
            self._waits.note(func.name())
            return self._all_of(func, args, kwargs)
        known = _known(func, args, kwargs)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = self._with_positions(func, args)
        if "_fused_" in func.name() and func.name().endswith("_"):
            return _check_devices(func, fakes)
        found = func(*args, **kwargs)
        if known is not None and isinstance(found, FakeTensor):
            _set_values(found, known, changes=int(func._schema.is_mutable))
        return found

    def _copied(self, func: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        target = torch.device(kwargs.get("device") or tensor.device).type
        if target == tensor.device.type:
            return func(tensor, **kwargs)
        if target == "cpu":
            self._waits.note("copy to the CPU")
            return self._real(tensor, kwargs.get("dtype"))
        self._upload(kwargs.get("non_blocking", False))
        fake = func(tensor, **kwargs)
        if not tensor.is_floating_point():
            with unset_fake_temporarily():
                _set_values(fake, tensor.clone())
        return fake

    def _copied_into(self, func: Any, into: Tensor, source: Tensor, wait_not: bool = False) -> Any:
        if into.device == source.device:
            return func(into, source, wait_not)
        if into.device.type == "cpu":
            self._waits.note("copy to the CPU")
            with unset_fake_temporarily():
                return into.fill_(1)
        self._upload(wait_not)
        return func(into, source, wait_not)

    def _upload(self, wait_not: bool) -> None:
        if wait_not:
            self._waits.copies += 1
        else:
            self._waits.note("copy to the GPU")

    def _real(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return values that are known, as those of labels and indices are, else ones."""
        values = _values_of(tensor)
        with unset_fake_temporarily():
            if values is not None:
                return values.to(dtype or tensor.dtype, copy=True)
            return torch.ones(tuple(tensor.shape), dtype=dtype or tensor.dtype)

    def _all_of(self, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """Return the result as if all values were 1, with its shape."""
        real = tree_map(lambda a: self._real(a, None) if isinstance(a, FakeTensor) else a, args)
        with unset_fake_temporarily():
            found = func(*real, **kwargs)

        def fake(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cuda")

        return tree_map(fake, found)

    def _with_positions(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """Replace masks by the positions of all their values, which a GPU has to count."""
        tensor, indices, *rest = args
        masks = [i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool]
        if not masks:
            return args
        if func is aten.index.Tensor or rest[0].numel() != 1:
            self._waits.note(f"{func.name()} of a mask")
        found: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                with unset_fake_temporarily():
                    places = self._real(index, None).nonzero(as_tuple=True)
                found += [torch.empty_like(place, device=tensor.device) for place in places]
            else:
                found.append(index)
        return (tensor, found, *rest)


def _set_values(fake: Any, values: Tensor, changes: int = 0) -> None:
    """Keep the values of a tensor, whose change in place is counted after it is made."""
    fake.cpu_values = (values, _version(fake) + changes)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _values_of(tensor: Any) -> Tensor | None:
    """Return the values of a tensor, where they are known and it was not changed since."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    values, version = getattr(tensor, "cpu_values", (None, 0))
    return values if version == _version(tensor) else None


def _known(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the result of an operation on labels and indices alone, whose values are known."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    whole = all(not tensor.is_floating_point() for tensor in tensors)
    if not tensors or not whole or any(_values_of(tensor) is None for tensor in tensors):
        return None
    here = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs

    def real(leaf: Any) -> Any:
        return _values_of(leaf) if isinstance(leaf, Tensor) else leaf

    with unset_fake_temporarily():
        found = func(*tree_map(real, args), **tree_map(real, here))
    return found if isinstance(found, Tensor) else None


def _swap(old: Tensor, new: Tensor) -> None:
    """Move a module's parameter, unless it is there: hooks keep PyTorch from swapping some.

    That the mode remembers a tensor by a weak reference is no reason not to.
    """
    if (old.device, old.dtype) != (new.device, new.dtype):
        with mock.patch("weakref.getweakrefs", return_value=[]):
            _swap_tensors(old, new)


def _load_as_real(*arguments: Any, **options: Any) -> Any:
    with _disable_current_modes():
        return _load(*arguments, **options)


def _saved(tensor: Tensor, protocol: int) -> Any:
    """Return what `torch.save` writes in place of a fake tensor: ones on the CPU."""
    with unset_fake_temporarily():
        real = torch.ones(tuple(tensor.shape), dtype=tensor.dtype)
        return real.__reduce_ex__(protocol)


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _check_devices(func: Any, fakes: Sequence[FakeTensor]) -> None:
    """Stand for a fused optimiser's step, of which PyTorch has no fake one."""
    if any(tensor.device.type != "cuda" for tensor in fakes):
        raise RuntimeError(f"{func.name()} must have all tensors on cuda")


def _backward(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], wanted: Sequence[Any]
) -> list[Tensor | None]:
    """Run a graph backwards node by node, in Python: the engine needs a driver.

    Args:
        roots: Outputs.
        gradients: Gradients of the outputs; ones where None.
        wanted: Nodes and output numbers whose gradients are returned, and not accumulated.
    """
    nodes, waiting, stack = set[Any](), dict[Any, int](), [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node in nodes or node is None:
            continue
        nodes.add(node)
        for after, _ in node.next_functions:
            if after is not None:
                waiting[after] = waiting.get(after, 0) + 1
                stack.append(after)
    held: dict[Any, dict[int, Tensor]] = {}
    for root, gradient in zip(roots, gradients, strict=True):
        own = torch.ones_like(root) if gradient is None else gradient
        _add(held, root.grad_fn, root.output_nr, own)
    ready = [node for node in nodes if not waiting.get(node)]
    kept: dict[Any, Tensor] = {}
    while ready:
        node = ready.pop()
        given = held.pop(node, {})
        kept |= {(node, number): value for number, value in given.items()}
        stops = wanted and not node.next_functions
        found: Any = [None] * len(node.next_functions)
        if given and not stops:
            inputs = [given.get(number) for number in range(len(node._input_metadata))]
            found = (node.apply if hasattr(node, "apply") else node)(*inputs)
            found = found if isinstance(found, tuple | list) else (found,)
            if hasattr(node, "needs_input_grad") and len(found) > len(node.next_functions):
                found = _of_tensors(node, found)
        for (after, number), gradient in zip(node.next_functions, found, strict=True):
            if after is None:
                continue
            if gradient is not None:
                _add(held, after, number, gradient)
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    return [kept.get(place) for place in wanted]


def _of_tensors(node: Any, gradients: Sequence[Any]) -> list[Any]:
    """Return the gradients of a function in Python without those of what is no tensor."""
    wanted = (g for g, need in zip(gradients, node.needs_input_grad, strict=True) if need)
    return [None if after is None else next(wanted) for after, _ in node.next_functions]


def _add(held: dict[Any, dict[int, Tensor]], node: Any, number: int, gradient: Tensor) -> None:
    """Add a gradient to those of a node, in the shape and dtype that the engine gives it."""
    like = node._input_metadata[number]
    if gradient.device.type != like.device.type:
        raise RuntimeError(f"gradient on {gradient.device} of a tensor on {like.device}")
    if gradient.shape != tuple(like.shape):
        gradient = gradient.sum_to_size(tuple(like.shape))
    gradient = gradient.to(like.dtype)
    own = held.setdefault(node, {})
    own[number] = gradient if number not in own else own[number] + gradient


def _place(tensor: Tensor) -> tuple[Any, int]:
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch.enable_grad():  # the node that accumulates the gradient of a leaf
        return tensor.view_as(tensor).grad_fn.next_functions[0][0], 0


@contextmanager
def _backward_in_python() -> Iterator[None]:
    backward, grad = torch.autograd.backward, torch.autograd.grad

    def is_fake(tensors: Any) -> bool:
        return any(isinstance(tensor, FakeTensor) for tensor in tree_leaves(tensors))

    def run(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        if not is_fake(tensors):
            return backward(tensors, grad_tensors, *args, **kwargs)
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        given = grad_tensors if isinstance(grad_tensors, list | tuple) else [grad_tensors]
        with torch.no_grad():
            _backward(roots, list(given), ())
        return None

    def of(outputs: Any, inputs: Any, grad_outputs: Any = None, **kwargs: Any) -> Any:
        if not is_fake((outputs, inputs)):
            return grad(outputs, inputs, grad_outputs, **kwargs)
        roots = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        given = grad_outputs if isinstance(grad_outputs, list | tuple) else [grad_outputs]
        places = [_place(leaf) for leaf in leaves]
        with torch.no_grad():
            return tuple(_backward(roots, list(given) * len(roots), places))

    with (
        mock.patch("torch.autograd.backward", run),
        mock.patch("torch.autograd.grad", of),
    ):
        yield


@contextmanager
def fake_cuda(*, bfloat16: bool = True, **patches: Callable[..., Any]) -> Iterator[Waits]:
    """Run code as on a machine with one GPU; yields what the host waits for.

    Args:
        bfloat16: Whether the GPU computes in bfloat16.
        patches: Further functions of `torch.cuda` by name.
    """
    waits = Waits()
    functions: Mapping[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *args, **kwargs: bfloat16,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *args: (FREE, TOTAL),
        "get_device_name": lambda *args: "fake",
        "current_device": lambda: 0,
        **dict.fromkeys(WITHOUT_RESULT, lambda *args, **kwargs: None),
        **patches,
    }
    with ExitStack() as stack:
        stack.enter_context(_Fake(allow_non_fake_inputs=True))
        for name, function in functions.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", function))
        stack.enter_context(
            mock.patch("torch.Tensor.pin_memory", lambda tensor, *args: tensor.clone())
        )
        stack.enter_context(mock.patch.object(FakeTensor, "__reduce_ex__", _saved))
        stack.enter_context(mock.patch("torch.load", _load_as_real))
        stack.enter_context(mock.patch("torch.utils.swap_tensors", _swap))
        stack.enter_context(_backward_in_python())
        stack.enter_context(_Counting(waits))
        yield waits
