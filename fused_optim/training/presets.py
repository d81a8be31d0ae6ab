"""Llama shapes from 124 M to 70 B parameters: the names and sizes of every tensor, without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama.

    Attributes:
        model: whose sizes these are.
        vocabulary: tokens.
        hidden: width.
        intermediate: width of the MLP.
        layers: number of layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        tied: whether the output head is the token embedding itself.
    """

    model: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, as ``transformers`` names them.

        Returns:
            Shapes by name; a tied head appears once, as the embedding.

        Example:
            >>> from fused_optim.training.presets import PRESETS
            >>> PRESETS["8b"].tensors()["model.layers.0.self_attn.k_proj.weight"]
            (1024, 4096)
        """
        width, rows = self.hidden, self.kv_heads * (self.hidden // self.heads)
        layer = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (rows, width),
            "self_attn.v_proj": (rows, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (self.intermediate, width),
            "mlp.up_proj": (self.intermediate, width),
            "mlp.down_proj": (width, self.intermediate),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, width)}
        for index in range(self.layers):
            tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        tensors["model.norm.weight"] = (width,)
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocabulary, width)
        return tensors


PRESETS: Mapping[str, LlamaShape] = {
    "124m": LlamaShape("a Llama of GPT-2's size", 50257, 768, 2048, 12, 12, 12, tied=True),
    "350m": LlamaShape("a Llama of GPT-2 medium's size", 50257, 1024, 2736, 24, 16, 16, tied=True),
    "1b": LlamaShape("TinyLlama 1.1B", 32000, 2048, 5632, 22, 32, 4),
    "3b": LlamaShape("Llama 3.2 3B", 128256, 3072, 8192, 28, 24, 8, tied=True),
    "7b": LlamaShape("Llama 2 7B", 32000, 4096, 11008, 32, 32, 32),
    "8b": LlamaShape("Llama 3 8B", 128256, 4096, 14336, 32, 32, 8),
    "13b": LlamaShape("Llama 2 13B", 32000, 5120, 13824, 40, 40, 40),
    "70b": LlamaShape("Llama 2 70B", 32000, 8192, 28672, 80, 64, 8),
}
"""Published sizes but for the two smallest, which have GPT-2's vocabulary, width and depth."""
