"""A byte-level Llama, its loss, and the memory that training it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spectral import spectral_norm
from .data import VOCABULARY

_LANCZOS_STEPS = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama and how long to train it unless told otherwise; ``lr`` is AdamW's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    sequence_length: int
    batch_size: int
    steps: int
    lr: float


PRESETS = {
    "nano": Shape(64, 2, 2, 2, 176, 128, 4, 400, 2e-3),
    "tiny": Shape(128, 4, 2, 2, 352, 128, 4, 1000, 1.4e-3),
    "small": Shape(384, 6, 6, 6, 1024, 512, 16, 2000, 2e-3),
    "medium": Shape(768, 12, 12, 12, 2048, 1024, 32, 5000, 6e-4),
    "llama-1b": Shape(2048, 22, 32, 4, 5632, 2048, 8, 1000, 3e-4),
}


def build_model(shape: Any, seed: int, device: str | torch.device = "cpu") -> Any:
    """A new LlamaForCausalLM in fp32, whose weights depend on the seed and the kind of device alone.

    Made on the device itself: a billion random numbers take a CPU longer than some steps take a GPU.

    Any: transformers decorates .to() in a way that type checkers misread.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=False,
        # LlamaConfig's 0.02 is too small: it ends 0.16 nats above 0.05 (hidden 128, 800 steps of 4 × 128).
        initializer_range=math.sqrt(2 / (5 * shape.hidden)),
        use_cache=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def next_byte_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats of each token given those before it; tokens ``[batch, length + 1]``."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Of all sequences in batches of tokens."""
    losses = [next_byte_loss(model, tokens).item() for tokens in batches]
    weights = [len(tokens) for tokens in batches]
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (the norms' gains) and the token embedding do not.

    An embedding row is touched only when its byte occurs, so decay would shrink rare bytes' rows
    between their gradients. The output head is a matrix like the others.
    """
    embedding = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    named = list(model.named_parameters())
    decayed = [(name, p) for name, p in named if p.ndim > 1 and p is not embedding]
    others = [(name, p) for name, p in named if p.ndim <= 1 or p is embedding]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct memory behind tensors; whatever is not a tensor counts nothing."""
    storages = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def stored_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer states as they lie in memory now.

    Bits that a codec keeps beside the parameter itself count as parameters.
    """
    planes = list(chain.from_iterable(state.items() for state in optimizer.state.values()))
    low_bits = [plane for name, plane in planes if name.startswith("param.")]
    states = [plane for name, plane in planes if not name.startswith("param.")]
    return {
        "parameters": bytes_of(chain(model.parameters(), low_bits)),
        "gradients": bytes_of(p.grad for p in model.parameters()),
        "states": bytes_of(states),
    }


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """The largest singular value of every matrix by Lanczos steps, NaN for those that are not finite.

    For Gaussian ones of 5632 × 2048 they are 2e-5 too low and take a tenth of an SVD's time (two cores).
    """
    matrices = {name: p.detach().float() for name, p in model.named_parameters() if p.ndim == 2}
    return {
        name: spectral_norm(p, steps=_LANCZOS_STEPS).item() if p.isfinite().all() else math.nan
        for name, p in matrices.items()
    }


def activation_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the parameters themselves."""
    own = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_byte_loss(model, tokens)
    del loss
    return sum(kept.values())
