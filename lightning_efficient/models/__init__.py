"""Models that recipes run on: an in-tree Llama, with experts or without, transformers causal LMs, small vision nets."""

from lightning_efficient.models.causal_lm import CausalLM, LlamaLM
from lightning_efficient.models.classifier import Classifier
from lightning_efficient.models.hf import HFCausalLM
from lightning_efficient.models.llama import LLAMA_PRESETS, Llama, LlamaConfig
from lightning_efficient.models.mlp import AutoEncoder, MLPClassifier
from lightning_efficient.models.moe_llama import MOE_LLAMA_PRESETS, MoELlama, MoELlamaConfig
from lightning_efficient.models.moe_lm import MoELlamaLM
from lightning_efficient.models.vision import ResNetClassifier

__all__ = [
    "LLAMA_PRESETS",
    "MOE_LLAMA_PRESETS",
    "AutoEncoder",
    "CausalLM",
    "Classifier",
    "HFCausalLM",
    "Llama",
    "LlamaConfig",
    "LlamaLM",
    "MLPClassifier",
    "MoELlama",
    "MoELlamaConfig",
    "MoELlamaLM",
    "ResNetClassifier",
]
