"""Write a Llama checkpoint with random weights and a made-up tokenizer, for speed comparisons between engines.

Usage: llama_checkpoint.py OUT_DIR. Needs torch, transformers and tokenizers. Every parameter is drawn anew from a fixed seed,
so the same versions write the same file everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 32768
MAX_POSITIONS = 2048
SPECIAL = ("<unk>", "<s>", "</s>")
UNK, BOS, EOS = range(3)
SPACE = "\u2581"
"""What stands for a space within tokens."""
SEED = 0


def build_config() -> LlamaConfig:
    """12 layers of width 768: as many bytes a layer as with an MLP of two matrices and four times the width."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=128,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of up to three lower-case letters, with or without a space before them; anything else as bytes."""
    letters = string.ascii_lowercase
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *letters]
    merges: list[tuple[str, str]] = []
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    parts = [*((pair[0], pair[1]) for pair in pairs), *itertools.product(pairs, letters)]
    parts += [(SPACE, word) for word in [*letters, *pairs, *(a + b for a, b in itertools.product(pairs, letters))]]
    for part in parts[: VOCAB_SIZE - len(tokens)]:
        merges.append(part)
    tokens += ["".join(part) for part in merges]
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == VOCAB_SIZE

    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=SPECIAL[UNK], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNK],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_model() -> LlamaForCausalLM:
    """Random weights. Special tokens and bytes always get the logit zero, so a greedy choice never ends a text early."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(build_config()).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL) + 256] = 0.0
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, do_sample=False)
    return model


def main() -> None:
    """Write the checkpoint to the directory given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    out_dir: Path = parser.parse_args().out_dir
    model = build_model()
    model.save_pretrained(out_dir)
    build_tokenizer().save_pretrained(out_dir)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {out_dir}")


if __name__ == "__main__":
    main()
