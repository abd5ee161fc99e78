"""Tiny models of many architectures, built from their own config classes without a network.

A case is plain data: a model class of transformers by name, its config's arguments (hidden size 32, two layers), the
inputs that it takes and the linear layers that must stay dense. :meth:`TinyCase.build` makes it with a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

VOCAB = 96  # tokens; inputs use ids from 8 to 87, which no tiny config takes for padding or another special token
LENGTH = 10  # tokens of a text input
IMAGE = 32  # pixels a side
IMAGE_TOKEN = VOCAB - 1  # stands for one patch of the image in the text of a vision-language model


@dataclass(frozen=True)
class TinyCase:
    """One architecture.

    Attributes:
        name: The architecture's name, and the test's id.
        model: Class of transformers, by name.
        inputs: A name in ``INPUTS``.
        dense: Regular expressions of the linear layers that must stay dense: heads, what lies outside the base model,
            tied weights. Every other linear layer must be shared.
        arguments: Of the model's config.
        train: Run in train mode, for a model that refuses to backpropagate in eval mode (it has no dropout here).
    """

    name: str
    model: str
    inputs: str
    dense: tuple[str, ...]
    arguments: dict
    train: bool = False

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.model)

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        """The dense model in eval mode (or see ``train``), initialised with ``seed``; torch's generator is left alone.

        Biases and norms are moved off their initial zeros and ones, which would hide a lost or swapped one. Matrices of
        the usual std, 0.02, are enlarged: at a hidden size of 32 they would hardly count beside the residual stream.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = self.model_class(self.model_class.config_class(**self.arguments))
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
                elif parameter.square().mean() < 0.05**2:
                    parameter.mul_(6)
        return model.train(self.train)

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of a forward call: two samples, the same for the same ``seed``."""
        return INPUTS[self.inputs](torch.Generator().manual_seed(seed))


def tiny(name: str, model: str, inputs: str, *dense: str, train: bool = False, **arguments) -> TinyCase:
    """A :class:`TinyCase` with its config's arguments spelled as keywords."""
    return TinyCase(name, model, inputs, dense, arguments, train)


def classifier(name: str, prefix: str, *dense: str, **arguments) -> TinyCase:
    """A text encoder with its head for sequence classification; ``prefix`` of its class."""
    return tiny(name, f"{prefix}ForSequenceClassification", "text", *dense, **arguments, num_labels=5, pad_token_id=0)


def causal(name: str, prefix: str, *dense: str, **arguments) -> TinyCase:
    """A decoder with its language-model head; ``prefix`` of its class."""
    return tiny(name, f"{prefix}ForCausalLM", "text", *(dense or ("lm_head",)), **arguments, use_cache=False)


def seq2seq(name: str, model: str, *dense: str, **arguments) -> TinyCase:
    """A text encoder-decoder with its language-model head."""
    return tiny(name, model, "seq2seq", "lm_head", *dense, **arguments, use_cache=False)


# ---- inputs


def _ids(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(8, VOCAB - 8, (2, length), generator=generator)


def _pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, IMAGE, IMAGE, generator=generator)


def _with_image_tokens(ids: Tensor, count: int) -> Tensor:
    return torch.cat([ids[:, :2], ids.new_full((2, count), IMAGE_TOKEN), ids[:, 2:]], dim=1)


INPUTS = {
    "text": lambda g: {"input_ids": _ids(g)},
    "long text": lambda g: {"input_ids": _ids(g, 64)},
    "seq2seq": lambda g: {"input_ids": _ids(g), "decoder_input_ids": _ids(g)},
    "image": lambda g: {"pixel_values": _pixels(g)},
    "video": lambda g: {"pixel_values": torch.randn(2, 2, 3, IMAGE, IMAGE, generator=g)},
    "image and text": lambda g: {"pixel_values": _pixels(g), "input_ids": _ids(g)},
    "image to text": lambda g: {"pixel_values": _pixels(g), "decoder_input_ids": _ids(g)},
    "image in text": lambda g: {"pixel_values": _pixels(g), "input_ids": _with_image_tokens(_ids(g), 16)},
    "audio": lambda g: {"input_values": torch.randn(2, 400, generator=g)},
    "mel and text": lambda g: {"input_features": torch.randn(2, 16, 40, generator=g), "decoder_input_ids": _ids(g)},
    "spectrogram": lambda g: {"input_values": torch.randn(2, 40, 16, generator=g)},
    "codebooks": lambda g: {"input_ids": _ids(g), "decoder_input_ids": _ids(g).repeat(2, 1)},
    "series": lambda g: {"past_values": torch.randn(2, 32, 3, generator=g)},
}

# ---- the table

# fmt: off
BERT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64}
LLAMA = BERT | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
       "image_size": IMAGE, "patch_size": 8, "num_labels": 5}
CLIP_VISION = VIT | {"model_type": "clip_vision_model", "projection_dim": 24}
SIGLIP_VISION = VIT | {"model_type": "siglip_vision_model", "vision_use_head": False}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
          "layer_type": "basic", "out_features": ["stage2"]}
RT_DETR_RESNET = RESNET | {"model_type": "rt_detr_resnet", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                           "out_features": ["stage2", "stage3", "stage4"]}
WAV2VEC2 = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3),
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}

CASES = (
    # text encoders
    classifier("bert", "Bert", "classifier", **BERT),
    tiny("bert masked LM", "BertForMaskedLM", "text", r"cls\.predictions\..*", **BERT),
    classifier("roberta", "Roberta", r"classifier\..*", **BERT),
    classifier("albert", "Albert", "classifier", **BERT, embedding_size=16),
    classifier("distilbert", "DistilBert", "pre_classifier", "classifier", vocab_size=VOCAB, dim=32, hidden_dim=64,
               n_layers=2, n_heads=4, max_position_embeddings=64),
    classifier("electra", "Electra", r"classifier\..*", **BERT, embedding_size=16),
    classifier("deberta", "Deberta", r"pooler\.dense", "classifier", **BERT, relative_attention=True,
               pos_att_type=["c2p", "p2c"]),
    classifier("deberta, talking heads", "Deberta", r"pooler\.dense", "classifier", **BERT, relative_attention=True,
               pos_att_type=["c2p", "p2c"], talking_head=True),
    classifier("deberta-v2", "DebertaV2", r"pooler\.dense", "classifier", **BERT, relative_attention=True,
               pos_att_type=["c2p", "p2c"]),
    classifier("mpnet", "MPNet", r"classifier\..*", **BERT),
    classifier("mobilebert", "MobileBert", "classifier", **BERT, embedding_size=16, intra_bottleneck_size=16,
               num_feedforward_networks=2),
    classifier("convbert", "ConvBert", r"classifier\..*", **BERT, embedding_size=16, conv_kernel_size=3),
    classifier("xlnet", "XLNet", r"sequence_summary\.summary", "logits_proj", vocab_size=VOCAB, d_model=32, n_layer=2,
               n_head=4, d_inner=64),
    classifier("funnel", "Funnel", r"classifier\..*", vocab_size=VOCAB, block_sizes=[1, 1], d_model=32, n_head=4,
               d_head=8, d_inner=64, num_decoder_layers=1),
    classifier("fnet", "FNet", "classifier", **BERT),
    classifier("modernbert", "ModernBert", r"head\.dense", "classifier", **BERT),
    classifier("longformer", "Longformer", r"classifier\..*", **BERT, attention_window=4),
    tiny("reformer", "ReformerModelWithLMHead", "long text", r"lm_head\.decoder", train=True, vocab_size=VOCAB,
         hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=64, is_decoder=True,
         attn_layers=["local", "local"], axial_pos_embds=False, max_position_embeddings=64, local_attn_chunk_length=8,
         hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, use_cache=False),
    # decoders
    tiny("gpt2", "GPT2LMHeadModel", "text", "lm_head", **GPT2, use_cache=False),
    causal("gpt_neo", "GPTNeo", vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
           attention_types=[[["global", "local"], 1]], max_position_embeddings=64, window_size=4),
    causal("gpt_neox", "GPTNeoX", **BERT),
    causal("gptj", "GPTJ", **GPT2, rotary_dim=4),
    causal("codegen", "CodeGen", **GPT2, rotary_dim=4),
    causal("gpt_bigcode", "GPTBigCode", **GPT2),
    causal("opt", "OPT", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
           max_position_embeddings=64, word_embed_proj_dim=16),
    causal("bloom", "Bloom", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    causal("falcon", "Falcon", **BERT),
    causal("falcon, new decoder", "Falcon", **BERT, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    causal("mpt", "Mpt", vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64),
    causal("llama", "Llama", **LLAMA),
    causal("mistral", "Mistral", **LLAMA, sliding_window=4),
    causal("qwen2", "Qwen2", **LLAMA, tie_word_embeddings=True),
    causal("qwen3", "Qwen3", **LLAMA, head_dim=8),
    causal("gemma2", "Gemma2", **LLAMA, head_dim=8, query_pre_attn_scalar=8),
    causal("phi", "Phi", **LLAMA),
    causal("phi3", "Phi3", **LLAMA, pad_token_id=0),
    causal("mixtral", "Mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
    causal("qwen2_moe", "Qwen2Moe", **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
           shared_expert_intermediate_size=32),
    causal("gpt_oss", "GptOss", **LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    causal("deepseek_v3", "DeepseekV3", **BERT, num_experts_per_tok=2, n_routed_experts=4, n_group=2, topk_group=1,
           moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8,
           qk_nope_head_dim=8, v_head_dim=8),
    causal("mamba", "Mamba", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4),
    causal("mamba2", "Mamba2", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8,
           head_dim=8, n_groups=2, chunk_size=8),
    causal("recurrent_gemma", "RecurrentGemma", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
           num_attention_heads=4, intermediate_size=64, lru_width=32, attention_window_size=8,
           block_types=["recurrent", "attention"]),
    causal("rwkv", "Rwkv", "head", vocab_size=VOCAB, context_length=64, hidden_size=32, attention_hidden_size=32,
           num_hidden_layers=2, intermediate_size=64, rescale_every=0),  # which would write to weights
    # encoder-decoders
    seq2seq("t5", "T5ForConditionalGeneration", **T5),
    seq2seq("t5, gated and untied", "T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False),
    seq2seq("switch_transformers", "SwitchTransformersForConditionalGeneration", r".*\.router\.classifier", **T5,
            num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    seq2seq("bart", "BartForConditionalGeneration", **BART, max_position_embeddings=64),
    seq2seq("pegasus", "PegasusForConditionalGeneration", **BART, max_position_embeddings=64),
    seq2seq("marian", "MarianMTModel", **BART, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=0),
    seq2seq("led", "LEDForConditionalGeneration", **BART, attention_window=4, max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64),
    seq2seq("prophetnet", "ProphetNetForConditionalGeneration", vocab_size=VOCAB, hidden_size=32,
            num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, ngram=2),
    # images
    tiny("vit", "ViTForImageClassification", "image", "classifier", **VIT),
    tiny("deit", "DeiTForImageClassification", "image", "classifier", **VIT),
    tiny("swin", "SwinForImageClassification", "image", "classifier", image_size=IMAGE, patch_size=4, embed_dim=16,
         depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5),
    tiny("beit", "BeitForImageClassification", "image", "classifier", **VIT, use_relative_position_bias=True),
    tiny("dinov2", "Dinov2ForImageClassification", "image", "classifier", **VIT),
    tiny("convnext", "ConvNextForImageClassification", "image", "classifier", hidden_sizes=[16, 32], depths=[1, 1],
         num_stages=2, num_labels=5),
    tiny("segformer", "SegformerForSemanticSegmentation", "image", r"decode_head\..*", num_encoder_blocks=2,
         depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
         num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=5),
    tiny("dpt", "DPTForDepthEstimation", "image", r"neck\.reassemble_stage\.readout_projects\..*",
         **VIT | {"num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
         fusion_hidden_size=16),
    tiny("detr", "DetrForObjectDetection", "image", "class_labels_classifier", r"bbox_predictor\..*", **BART,
         num_queries=4, num_labels=5, backbone_config=RESNET),
    tiny("rt_detr", "RTDetrForObjectDetection", "image", r"model\.decoder\.(class|bbox)_embed\..*",
         r"model\.enc_(score|bbox)_head.*", backbone_config=RT_DETR_RESNET, encoder_hidden_dim=32,
         encoder_in_channels=[8, 16, 16], encoder_layers=1, encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32,
         decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, num_queries=4, decoder_layers=2,
         decoder_attention_heads=4, decoder_n_points=2, num_labels=5, num_denoising=0),
    tiny("eomt", "EomtForUniversalSegmentation", "image", "class_predictor", **VIT, num_blocks=1, num_upscale_blocks=1,
         num_queries=4),
    tiny("yolos", "YolosForObjectDetection", "image", r"class_labels_classifier\..*", r"bbox_predictor\..*",
         **VIT | {"image_size": [IMAGE, IMAGE]}, num_detection_tokens=4),
    tiny("videomae", "VideoMAEForVideoClassification", "video", "classifier", **VIT, num_frames=2),
    # sound
    tiny("wav2vec2", "Wav2Vec2ForCTC", "audio", "lm_head", **WAV2VEC2),
    tiny("wavlm", "WavLMForCTC", "audio", "lm_head", **WAV2VEC2, num_buckets=8),
    tiny("hubert", "HubertForSequenceClassification", "audio", "classifier", "projector", **WAV2VEC2, num_labels=5,
         classifier_proj_size=16),
    tiny("whisper", "WhisperForConditionalGeneration", "mel and text", "proj_out", **BART, num_mel_bins=16,
         max_source_positions=20, max_target_positions=32, pad_token_id=0, decoder_start_token_id=1, use_cache=False),
    tiny("spectrogram transformer", "ASTForAudioClassification", "spectrogram", r"classifier\..*", hidden_size=32,
         num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_length=40, num_mel_bins=16,
         patch_size=8, time_stride=8, frequency_stride=8, num_labels=5),
    tiny("musicgen", "MusicgenForConditionalGeneration", "codebooks", r"decoder\.lm_heads\..*",
         text_encoder=T5 | {"model_type": "t5"},
         decoder={"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "ffn_dim": 64, "num_codebooks": 2, "max_position_embeddings": 64},
         audio_encoder={"model_type": "encodec", "num_filters": 4, "hidden_size": 16, "codebook_size": 32,
                        "upsampling_ratios": [2, 2], "num_lstm_layers": 1}),
    # images and text
    tiny("clip", "CLIPModel", "image and text", projection_dim=24, vision_config=CLIP_VISION,
         text_config=BERT | {"projection_dim": 24, "eos_token_id": VOCAB - 9}),
    tiny("siglip", "SiglipModel", "image and text", r"vision_model\.head\.attention\.out_proj", text_config=BERT,
         vision_config=VIT),
    tiny("blip", "BlipForConditionalGeneration", "image and text", r"text_decoder\.cls\.predictions\.decoder",
         text_config=BERT | {"encoder_hidden_size": 32}, vision_config=VIT, projection_dim=24),
    tiny("vit with gpt2 decoder", "VisionEncoderDecoderModel", "image to text", r"decoder\.lm_head",
         encoder=VIT | {"model_type": "vit"},
         decoder=GPT2 | {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True}),
    tiny("llava", "LlavaForConditionalGeneration", "image in text", "lm_head", vision_config=CLIP_VISION,
         text_config=LLAMA | {"model_type": "llama"}, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1),
    tiny("paligemma", "PaliGemmaForConditionalGeneration", "image in text", "lm_head", vision_config=SIGLIP_VISION,
         text_config=LLAMA | {"model_type": "gemma", "head_dim": 8}, image_token_index=IMAGE_TOKEN, projection_dim=32,
         hidden_size=32),
    # time series
    tiny("patchtst", "PatchTSTForPrediction", "series", r"head\.projection", num_input_channels=3, context_length=32,
         patch_length=8, patch_stride=8, num_hidden_layers=2, d_model=32, num_attention_heads=4, ffn_dim=64,
         prediction_length=4),
)
# fmt: on
