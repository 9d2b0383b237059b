"""Tiny Llama models of random weights, and a tokenizer whose tokens are numbers, in the Hugging Face layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from problems import ProblemSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
SIZES = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "student": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def forward_cost(name: str) -> int:
    """Weights that a forward pass multiplies by at each position, but for the head: attention and MLP of all layers."""
    size = SIZES[name]
    hidden = size["hidden_size"]
    return size["num_hidden_layers"] * hidden * (4 * hidden + 3 * size["intermediate_size"])


def tokenizer_for(space: ProblemSpace, context: int) -> PreTrainedTokenizerFast:
    """One token a number, a sign or a line's end: what is decoded is what was encoded.

    A vocabulary of about 200 tokens, few of which make sense at a position, is what K is about: with digits as tokens
    K = 25 would be everything.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate([PAD, EOS, *space.symbols])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|#### |[-+*=\n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def random_model(size: dict[str, int], tokenizer: PreTrainedTokenizerFast, context: int, seed: int) -> PreTrainedModel:
    """Return a Llama of random weights; the same ones for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **size,
        vocab_size=len(tokenizer),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
