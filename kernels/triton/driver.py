"""The Triton driver: one launch per bucket. Triton itself is imported when it is first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..masking import keeps_dense
from ..rules import CAST_ADAM
from .budget import launch_shape, register_bound, span

if TYPE_CHECKING:
    from ..launch import Launch
    from ..spec import Codec, Rule

Constants = dict[str, Any]
Call = Callable[[], object]


def unavailable(device_type: str) -> str | None:
    """None if tensors of this device type can be updated, else what is missing and how to get it."""
    try:
        import triton
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install 'triton>=3.6'"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"Triton {triton.__version__} is too old: pip install 'triton>=3.6'"
    # Triton's own functions were decorated when it was imported, ours are on first use: both must agree.
    interpreted = isinstance(triton.language.sum, InterpretedFunction) and triton.knobs.runtime.interpret
    if interpreted and device_type != "cpu":
        return (
            f"TRITON_INTERPRET is set and the interpreter takes CPU tensors, not {device_type} ones: unset it"
        )
    if interpreted:
        return None
    if device_type != "cuda":
        return (
            f"Triton compiles for CUDA tensors, not {device_type} ones; its interpreter takes CPU tensors "
            "if TRITON_INTERPRET=1 is set before Python starts"
        )
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return (
            "no CUDA device that torch can see; install a CUDA build of torch and a driver, and see that "
            "CUDA_VISIBLE_DEVICES does not hide the GPU"
        )
    return None


def capability_of(device: torch.device) -> int:
    """Ten times the compute capability; 0 in the interpreter."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _functions(codec: str, capability: int = 0) -> tuple[Any, Any] | None:
    """The functions of a codec: decode and encode, or in block_codecs.py value and code."""
    from . import block_codecs, codecs, masking

    both = ("decode", "encode")
    for name in (f"{codec}_sm89", codec) if capability >= 89 else (codec,):
        for module, names in ((codecs, both), (masking, both), (block_codecs, ("value", "code"))):
            first, second = (getattr(module, f"{name}_{each}", None) for each in names)
            if first is not None and second is not None:
                return first, second
    return None


def lacks(codec: str) -> bool:
    """Whether no kernel functions store values like this."""
    return _functions(codec) is None


def _codec(codec: Codec, capability: int) -> tuple[Any, ...]:
    """Decode, encode, the number of addresses, and a block codec's format."""
    import triton.language as tl

    from . import block_codecs, blocks

    functions = _functions(codec.name, capability)
    assert functions is not None, codec.name
    if codec.block == 1:
        return *functions, tl.constexpr(codec.columns)
    codes, scales = codec.planes
    # Inside a nested tuple Triton wraps nothing by itself.
    takes_nan = codec.name in block_codecs.TAKE_NAN
    numbers = map(tl.constexpr, (codec.block, codes.per, scales.bits, codec.signed_scale, takes_nan))
    return blocks.block_decode, blocks.block_encode, tl.constexpr(codec.columns), *functions, *numbers


def _rule(rule: Rule) -> tuple[Any, ...]:
    """What applies a rule, its function, and how a masked one is put together."""
    from . import masking, rules

    if rule.inner is None:
        return masking.unmasked, getattr(rules, rule.name)
    inner, function = rule.inner, getattr(rules, rule.inner.name)
    # Only cast_adam looks at the mask.
    counts = len(inner.scalars), len(inner.slots), inner.name == CAST_ADAM.name
    return masking.masked, function, *counts, rule.group, keeps_dense(rule)


def _sources(*parts: Any) -> str:
    """A hash of the text of functions among these and of all they call (the interpreter's have none)."""
    text = "".join(getattr(part, "cache_key", "") for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def _shared_constants(codecs: Sequence[Codec], strided: bool) -> tuple[Constants, Constants]:
    shape = launch_shape(codecs)
    constants = {"STRIDED": strided, "TILE": shape.tile, "CHUNK": shape.chunk}
    constants |= {"SPREAD": (shape.vector, shape.warps), "MASKED_SPREAD": (1, shape.warps)}
    options = {"num_warps": shape.warps, "num_stages": 1}
    if strided:
        # Left alone, ptxas spills 8 bytes of two of these for more warps (3.9, sm_90). A bound for the
        # others only makes them larger: 118 registers instead of 96 for exact Adam in fp32.
        options["maxnreg"] = 128
    return constants, options


def step_constants(
    rule: Rule, codecs: Sequence[Codec], strided: bool, exact: bool, capability: int
) -> tuple[Constants, Constants]:
    """Compile-time arguments and options of ``step``; codecs in the order parameter, states, gradient."""
    function, in_registers = _rule(rule), tuple(_codec(codec, capability) for codec in codecs)
    constants, options = _shared_constants(codecs, strided)
    sources = _sources(*function, *(part for codec in in_registers for part in codec))
    constants |= {"RULE": function, "SCALARS": len(rule.scalars), "CODECS": in_registers}
    bound = register_bound(rule, codecs, exact, capability)
    if bound is not None and not strided:
        options["maxnreg"] = bound
    return constants | {"SOURCES": sources, "EXACT": exact}, options | {"enable_fp_fusion": not exact}


def square_sum_constants(grad: Codec, strided: bool) -> tuple[Constants, Constants]:
    """Compile-time arguments and options of ``square_sum``."""
    # Gradients have no codec that depends on the GPU.
    in_registers = _codec(grad, 0)
    constants, options = _shared_constants([grad], strided)
    return constants | {"GRAD": in_registers, "SOURCES": _sources(in_registers[0])}, options | {
        "enable_fp_fusion": False
    }


def _prepare(
    bucket: Launch, kernel: Any, tiles: Tensor, arguments: tuple[Any, ...], constants: Constants,
    options: Constants,
) -> Call:  # fmt: skip
    """Launches a kernel once and returns a call that launches it again."""
    positional = (tiles, *arguments, *(constants[name] for name in kernel.arg_names[1 + len(arguments) :]))
    grid = (len(tiles), 1, 1)

    def interpret() -> None:
        with np.errstate(all="ignore"):
            kernel[grid](*positional)

    if bucket.device.type == "cpu":
        interpret()
        return interpret
    with torch.cuda.device(bucket.device):
        # Triton's own launcher looks its kernel up by all constants at every call, the compiled one does not.
        compiled = kernel[grid](*positional, **options)[grid]

    def launch() -> None:
        if torch.cuda.current_device() == bucket.device.index:
            compiled(*positional)
        else:
            with torch.cuda.device(bucket.device):
                compiled(*positional)

    return launch


def _layouts(bucket: Launch) -> Tensor:
    # The kernel of a flat bucket never reads its layouts: any address will do.
    return bucket.layouts if bucket.layouts is not None else bucket.table


def step(bucket: Launch) -> None:
    """Updates every tensor of the bucket whose row is active."""
    if launch := bucket.cache.get("triton.step"):
        launch()
        return
    from . import step as kernels

    codecs = (bucket.param, *bucket.states, bucket.grad)
    capability = capability_of(bucket.device)
    constants, options = step_constants(bucket.rule, codecs, bucket.strided, bucket.exact, capability)
    size = span(sum(bucket.numels), constants["TILE"])
    arguments = (bucket.table, bucket.rows, _layouts(bucket), bucket.table.shape[1], size)
    tiles = bucket.tiles(size)
    bucket.cache["triton.step"] = _prepare(bucket, kernels.step, tiles, arguments, constants, options)


def square_sum(bucket: Launch) -> Tensor:
    """Sum of the squares of all gradients in float64: finite exactly when every gradient is."""
    if cached := bucket.cache.get("triton.square_sum"):
        launch, partials = cached
        launch()
        return partials.sum()
    from . import step as kernels

    constants, options = square_sum_constants(bucket.grad, bucket.strided)
    columns, n = bucket.table.shape
    tiles = bucket.tiles(constants["TILE"])
    partials = torch.empty(len(tiles), dtype=torch.float64, device=bucket.device)
    arguments = (bucket.table, partials, _layouts(bucket), n, columns - len(bucket.grad.planes))
    launch = _prepare(bucket, kernels.square_sum, tiles, arguments, constants, options)
    bucket.cache["triton.square_sum"] = launch, partials
    return partials.sum()
