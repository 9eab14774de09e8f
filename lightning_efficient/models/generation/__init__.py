"""Generation: one token at a time, with the keys and values of earlier ones kept, for one request or many."""

from lightning_efficient.models.generation.generate import decoder_for, generate, longest_sequence
from lightning_efficient.models.generation.hf_decoder import HFDecoder
from lightning_efficient.models.generation.llama_decoder import LlamaDecoder
from lightning_efficient.models.generation.sampling import Pick, Sampling, greedy

__all__ = ["HFDecoder", "LlamaDecoder", "Pick", "Sampling", "decoder_for", "generate", "greedy", "longest_sequence"]
