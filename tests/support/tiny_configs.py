"""Configs of the small models that most tests use."""

from transformers import BertConfig, GPT2Config, LlamaConfig


def tiny_config(kind: str, **changes):
    """A config of two or three small layers; nothing of it is a multiple of a power of two by accident only."""
    configs = {
        "llama": (LlamaConfig, {"hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 3,
                                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}),
        "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64,
                              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        "bert": (BertConfig, {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 64,
                              "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    }  # fmt: skip
    kind, values = configs[kind]
    return kind(**(values | changes))
