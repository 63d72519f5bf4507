"""Tiny, randomly initialised transformers models of many architectures, by name: one table for the contract over all of
them, for ``rankalloc ls targets`` and for the page that it makes (docs/targets.md).

Hidden size 32, two layers, a vocabulary of 64, no dropout. A new architecture is one entry in :data:`ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, LENGTH, ROWS, LABELS = 64, 8, 2, 3
IMAGE = VOCAB - 1
"""The token that stands for (a part of) an image."""
IMAGE_STARTS, IMAGE_ENDS = 60, 61


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_ids(seed: int, length: int = LENGTH) -> torch.Tensor:
    """(rows, length): no special token, nor the last of the vocabulary, which stands for images, but a 1 at the end,
    which models that pool at an end-of-text token look for."""
    ids = torch.randint(5, VOCAB - 1, (ROWS, length), generator=_generator(seed))
    ids[:, -1] = 1
    return ids


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=_generator(seed))


def language(seed: int) -> dict[str, torch.Tensor]:
    ids = token_ids(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def classes(seed: int) -> dict[str, torch.Tensor]:
    ids = token_ids(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}


def token_classes(seed: int) -> dict[str, torch.Tensor]:
    ids = token_ids(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % LABELS}


def translation(seed: int) -> dict[str, torch.Tensor]:
    ids = token_ids(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": token_ids(seed + 100)}


def images(size: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda seed: {"pixel_values": _numbers(seed, 3, size, size), "labels": torch.tensor([0, 2])}


def pixel_classes(seed: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _numbers(seed, 3, 32, 32), "labels": torch.ones(ROWS, 32, 32, dtype=torch.long)}


def waves(seed: int) -> dict[str, torch.Tensor]:
    return {"input_values": _numbers(seed, 800), "labels": torch.tensor([0, 2])}


def spectra(seed: int) -> dict[str, torch.Tensor]:
    return {"input_values": _numbers(seed, 16, 8), "labels": torch.tensor([0, 2])}


def speech(seed: int) -> dict[str, torch.Tensor]:
    return {"input_features": _numbers(seed, 8, 32), "labels": token_ids(seed)}


def pairs(seed: int) -> dict[str, Any]:
    ids = token_ids(seed)
    return {"input_ids": ids, "pixel_values": _numbers(seed, 3, 16, 16), "return_loss": True}


def images_in_text(count: int, *places: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """Language whose first ``count`` tokens stand for an image of 16 pixels a side (``places``: further dimensions)."""

    def made(seed: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([torch.full((ROWS, count), IMAGE), token_ids(seed)], 1)
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids,
            "pixel_values": _numbers(seed, *places, 3, 16, 16),
        }

    return made


def patches_in_text(seed: int) -> dict[str, torch.Tensor]:
    """Language with an image of four by four patches of Qwen's, which four tokens stand for, between its marks."""
    image = torch.tensor([[IMAGE_STARTS, *[IMAGE] * 4, IMAGE_ENDS]] * ROWS)
    ids = torch.cat([image, token_ids(seed)], 1)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids,
        "pixel_values": torch.randn(ROWS * 16, 24, generator=_generator(seed)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS), "mm_token_type_ids": (ids == IMAGE).long(),
    }


def typed_images(seed: int) -> dict[str, torch.Tensor]:
    """Language and images whose token types tell which is which."""
    made = images_in_text(4)(seed)
    return {**made, "token_type_ids": (made["input_ids"] == IMAGE).long()}


@dataclass(frozen=True)
class Architecture:
    """How to build one model, and what to feed it.

    Attributes:
        family: heading of its section in docs/targets.md.
        model: name of the class in transformers.
        options: of its configuration.
        inputs: {argument: tensor} of one batch, labels included, for a seed.
        generates: whether ``generate`` continues a text, the same with and without a cache.
        targets: of its adapter, where the defaults find nothing.
    """

    family: str
    model: str
    options: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    generates: bool = False
    targets: Any = "all-linear"

    def config(self) -> transformers.PreTrainedConfig:
        made = getattr(transformers, self.model).config_class(**self.options)
        made.architectures = [self.model]
        return made

    def build(self, seed: int = 0) -> nn.Module:
        """The model with weights of ``seed``, in evaluation."""
        torch.manual_seed(seed)
        return getattr(transformers, self.model)(self.config()).eval()


_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MARKS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
_DECODER = _SIZES | _MARKS | {"intermediate_size": 64, "max_position_embeddings": 64}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_ENCODER = _SIZES | {
    "intermediate_size": 64, "max_position_embeddings": 64, "num_labels": LABELS, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}
_TRANSLATOR = _MARKS | {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "dropout": 0.0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}
_IMAGE = {
    "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "num_labels": LABELS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
_VISION = {
    "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64,
}
_WAVES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "classifier_proj_size": 16, "num_labels": LABELS,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "activation_dropout": 0.0,
    "layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "final_dropout": 0.0,
    "apply_spec_augment": False,
}
_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _decoder(model: str, options: Mapping[str, Any] = _GROUPED, **more: Any) -> Architecture:
    return Architecture("Decoders", model, {**options, **more}, language, generates=True)


def _encoder(model: str, options: Mapping[str, Any] = _ENCODER, inputs: Any = classes, **more: Any) -> Architecture:
    return Architecture("Encoders", model, {**options, **more}, inputs)


def _translator(model: str, options: Mapping[str, Any] = _TRANSLATOR, **more: Any) -> Architecture:
    return Architecture("Encoder-decoders", model, {**options, **more}, translation, generates=True)


def _vision(model: str, options: Mapping[str, Any] = _IMAGE, inputs: Any = None, **more: Any) -> Architecture:
    targets = more.pop("targets", "all-linear")
    return Architecture("Vision", model, {**options, **more}, inputs or images(16), targets=targets)


DECODERS = {
    "llama": _decoder("LlamaForCausalLM"),
    "mistral": _decoder("MistralForCausalLM"),
    "qwen2": _decoder("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3ForCausalLM", head_dim=8),
    "gemma": _decoder("GemmaForCausalLM", head_dim=8),
    "gemma2": _decoder("Gemma2ForCausalLM", head_dim=8),
    "gemma3": _decoder("Gemma3ForCausalLM", head_dim=8),
    "phi": _decoder("PhiForCausalLM", resid_pdrop=0.0),
    "phi3": _decoder("Phi3ForCausalLM", resid_pdrop=0.0),
    "gpt2": _decoder("GPT2LMHeadModel", _STILL | _MARKS, vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": _decoder("GPTNeoXForCausalLM", _DECODER),
    "gptj": _decoder(
        "GPTJForCausalLM", _STILL | _MARKS, vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
        n_positions=64,
    ),
    "gpt_neo": _decoder(
        "GPTNeoForCausalLM", _MARKS, vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, intermediate_size=64,
    ),
    "opt": _decoder(
        "OPTForCausalLM", _DECODER, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0,
    ),
    "bloom": _decoder("BloomForCausalLM", _MARKS, vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _decoder("FalconForCausalLM", _DECODER),
    "mpt": _decoder("MptForCausalLM", _MARKS, vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "stablelm": _decoder("StableLmForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM", residual_dropout=0.0, embedding_dropout=0.0),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "cohere": _decoder("CohereForCausalLM"),
    "smollm3": _decoder("SmolLM3ForCausalLM"),
    "granite": _decoder("GraniteForCausalLM"),
    "glm4": _decoder("Glm4ForCausalLM", head_dim=8),
    "codegen": _decoder(
        "CodeGenForCausalLM", _STILL | _MARKS, vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
        n_positions=64,
    ),
    "biogpt": _decoder(
        "BioGptForCausalLM", _DECODER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "nemotron": _decoder("NemotronForCausalLM"),
    "bitnet": _decoder("BitNetForCausalLM"),
    "lfm2": _decoder("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_multiple_of=8),
    "gemma3n": _decoder(
        "Gemma3nForCausalLM", head_dim=8, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        laurel_rank=4, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
    ),
}
ENCODERS = {
    "bert": _encoder("BertForSequenceClassification"),
    "bert_tokens": _encoder("BertForTokenClassification", inputs=token_classes),
    "roberta": _encoder("RobertaForSequenceClassification"),
    "xlm_roberta": _encoder("XLMRobertaForTokenClassification", inputs=token_classes),
    "deberta_v2": _encoder(
        "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=8, max_relative_positions=-1, share_att_key=True, norm_rel_ebd="layer_norm",
        pooler_dropout=0.0,
    ),
    "deberta": _encoder(
        "DebertaForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"],
        max_relative_positions=16, pooler_dropout=0.0,
    ),
    "electra": _encoder("ElectraForSequenceClassification", embedding_size=16),
    "albert": _encoder("AlbertForSequenceClassification", embedding_size=16, classifier_dropout_prob=0.0),
    "distilbert": _encoder(
        "DistilBertForSequenceClassification", {}, vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=LABELS, max_position_embeddings=64,
    ),
    "mpnet": _encoder("MPNetForSequenceClassification"),
    "longformer": _encoder("LongformerForSequenceClassification", attention_window=[4, 4]),
    "modernbert": _encoder(
        "ModernBertForSequenceClassification", _SIZES | _MARKS, intermediate_size=64, num_labels=LABELS,
        max_position_embeddings=64, cls_token_id=2, sep_token_id=1, attn_implementation="eager",
    ),
    "xlnet": _encoder(
        "XLNetForSequenceClassification", {}, vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64,
        dropout=0.0, summary_last_dropout=0.0, num_labels=LABELS,
    ),
    "squeezebert": _encoder(
        "SqueezeBertForSequenceClassification", embedding_size=32, q_groups=2, k_groups=2, v_groups=2,
        intermediate_groups=2, output_groups=2,
    ),
    "convbert": _encoder(
        "ConvBertForSequenceClassification", embedding_size=32, head_ratio=2, num_groups=2, classifier_dropout=0.0,
    ),
    "esm": _encoder("EsmForSequenceClassification", mask_token_id=4, token_dropout=False),
    "canine": _encoder("CanineForSequenceClassification"),
    "xlm": _encoder(
        "XLMForSequenceClassification", {}, vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, num_labels=LABELS,
        dropout=0.0, attention_dropout=0.0, summary_first_dropout=0.0, pad_index=0,
    ),
}
TRANSLATORS = {
    "t5": _translator(
        "T5ForConditionalGeneration", _MARKS, vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0,
    ),
    "bart": _translator("BartForConditionalGeneration"),
    "pegasus": _translator("PegasusForConditionalGeneration"),
    "mbart": _translator("MBartForConditionalGeneration"),
    "marian": _translator("MarianMTModel"),
    "m2m_100": _translator("M2M100ForConditionalGeneration", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "led": _translator(
        "LEDForConditionalGeneration", attention_window=4, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "longt5": _translator(
        "LongT5ForConditionalGeneration", _MARKS, vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2,
        num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, local_radius=4,
    ),
}
VISION = {
    "vit": _vision("ViTForImageClassification"),
    "deit": _vision("DeiTForImageClassification"),
    "dinov2": _vision("Dinov2ForImageClassification", mlp_ratio=2),
    "beit": _vision("BeitForImageClassification", drop_path_rate=0.0),
    "swin": _vision(
        "SwinForImageClassification", {}, images(32), image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
        num_heads=[2, 2], window_size=4, num_labels=LABELS, drop_path_rate=0.0, mlp_ratio=2.0,
    ),
    "convnext": _vision(
        "ConvNextForImageClassification", {}, images(32), hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
        num_labels=LABELS, drop_path_rate=0.0,
    ),
    "convnextv2": _vision(
        "ConvNextV2ForImageClassification", {}, images(32), hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
        num_labels=LABELS, drop_path_rate=0.0,
    ),
    "segformer": _vision(
        "SegformerForSemanticSegmentation", {}, pixel_classes, hidden_sizes=[16, 32], depths=[1, 1],
        num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=LABELS, drop_path_rate=0.0, classifier_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    ),
    "resnet": _vision(
        "ResNetForImageClassification", {}, images(32), embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1],
        num_labels=LABELS, layer_type="basic", targets=["convolution"],
    ),
    "swinv2": _vision(
        "Swinv2ForImageClassification", {}, images(32), image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
        num_heads=[2, 2], window_size=4, num_labels=LABELS, drop_path_rate=0.0, mlp_ratio=2.0,
    ),
    "mobilevit": _vision(
        "MobileViTForImageClassification", {}, images(32), image_size=32, patch_size=2, hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2, num_labels=LABELS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    ),
    "levit": _vision(
        "LevitForImageClassification", {}, images(32), image_size=32, hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=LABELS, drop_path_rate=0,
    ),
}
SPEECH = {
    "whisper": Architecture(
        "Speech", "WhisperForConditionalGeneration",
        _TRANSLATOR | {
            "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        }, speech,
    ),
    "wav2vec2": Architecture("Speech", "Wav2Vec2ForSequenceClassification", _WAVES, waves),
    "hubert": Architecture("Speech", "HubertForSequenceClassification", _WAVES, waves),
    "wavlm": Architecture("Speech", "WavLMForSequenceClassification", _WAVES, waves),
    "wav2vec2_conformer": Architecture(
        "Speech", "Wav2Vec2ConformerForSequenceClassification",
        _WAVES | {"conv_depthwise_kernel_size": 3, "conformer_conv_dropout": 0.0}, waves,
    ),
    "ast": Architecture(
        "Speech", "ASTForAudioClassification",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8,
            "num_labels": LABELS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        }, spectra,
    ),
}
_TEXT = _DECODER | {"attention_dropout": 0.0}
_STILL_TEXT = _DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_QWEN_TEXT = _GROUPED | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2}
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "vision_start_token_id": IMAGE_STARTS, "vision_end_token_id": IMAGE_ENDS,
    "video_token_id": 59,
}


def _sees(model: str, options: Mapping[str, Any], inputs: Any, generates: bool = True) -> Architecture:
    return Architecture("Vision and language", model, options, inputs, generates=generates)


VISION_LANGUAGE = {
    "clip": Architecture(
        "Vision and language", "CLIPModel", {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16},
        pairs,
    ),
    "siglip": Architecture(
        "Vision and language", "SiglipModel", {"text_config": _TEXT, "vision_config": _VISION}, pairs,
    ),
    "llava": Architecture(
        "Vision and language", "LlavaForConditionalGeneration",
        {
            "text_config": _GROUPED | {"model_type": "llama"}, "vision_config": _VISION | {
                "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": IMAGE, "vision_feature_layer": -2,
        },
        images_in_text(4), generates=True,
    ),
    "paligemma": Architecture(
        "Vision and language", "PaliGemmaForConditionalGeneration",
        {
            "text_config": _GROUPED | {"model_type": "gemma", "head_dim": 8},
            "vision_config": _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32,
        },
        lambda seed: {
            **(made := images_in_text(4)(seed)), "token_type_ids": torch.ones_like(made["input_ids"]),
        },
    ),
    "idefics3": Architecture(
        "Vision and language", "Idefics3ForConditionalGeneration",
        {
            "text_config": _GROUPED | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "idefics3_vision"}, "image_token_id": IMAGE, "scale_factor": 2,
            "pad_token_id": 0,
        },
        images_in_text(1, 1), generates=True,
    ),
    "qwen2_vl": _sees(
        "Qwen2VLForConditionalGeneration",
        _QWEN_TOKENS | {
            "text_config": _QWEN_TEXT,
            "vision_config": _QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        }, patches_in_text,
    ),
    "qwen2_5_vl": _sees(
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN_TOKENS | {
            "text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION | {
                "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 8,
                "fullatt_block_indexes": [1],
            },
        }, patches_in_text,
    ),
    "qwen3_vl": _sees(
        "Qwen3VLForConditionalGeneration",
        _QWEN_TOKENS | {
            "text_config": _QWEN_TEXT | {"head_dim": 8}, "vision_config": _QWEN_VISION | {
                "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        }, patches_in_text,
    ),
    "gemma3_vl": _sees(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GROUPED | {"head_dim": 8}, "vision_config": _VISION | {"vision_use_head": False},
            "image_token_id": IMAGE, "boi_token_id": IMAGE_STARTS, "eoi_token_id": IMAGE_ENDS, "mm_tokens_per_image": 4,
        }, typed_images,
    ),
    "internvl": _sees(
        "InternVLForConditionalGeneration",
        {
            "text_config": _GROUPED | {"model_type": "qwen2"},
            "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [4, 4]}, "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        }, images_in_text(4),
    ),
    "git": _sees("GitForCausalLM", _STILL_TEXT | {"vision_config": _VISION}, images_in_text(0)),
    "blip": _sees(
        "BlipForConditionalGeneration",
        {
            "text_config": _STILL_TEXT | {"encoder_hidden_size": 32, "projection_dim": 16}, "vision_config": _VISION,
            "projection_dim": 16, "image_text_hidden_size": 16,
        }, images_in_text(0), generates=False,
    ),
    "blip_2": _sees(
        "Blip2ForConditionalGeneration",
        {
            "vision_config": _VISION, "qformer_config": _STILL_TEXT | {"encoder_hidden_size": 32},
            "text_config": _DECODER | {
                "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0,
            },
            "num_query_tokens": 4, "image_token_id": IMAGE,
        }, images_in_text(4),
    ),
}
_MAMBA = _MARKS | {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
STATE_SPACE = {
    "mamba": Architecture(
        "State space", "MambaForCausalLM", _MAMBA | {"state_size": 4, "time_step_rank": 2}, language, generates=True,
    ),
    "mamba2": Architecture(
        "State space", "Mamba2ForCausalLM",
        _MAMBA | {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}, language,
        generates=True,
    ),
    "rwkv": Architecture(
        "State space", "RwkvForCausalLM",
        _MAMBA | {"attention_hidden_size": 32, "context_length": 64, "intermediate_size": 64}, language,
    ),
    "falcon_mamba": Architecture(
        "State space", "FalconMambaForCausalLM", _MAMBA | {"state_size": 4, "time_step_rank": 2}, language,
        generates=True,
    ),
    "zamba": Architecture(
        "State space", "ZambaForCausalLM",
        _DECODER | {
            "num_hidden_layers": 3, "num_key_value_heads": 4, "mamba_d_state": 4, "mamba_dt_rank": 2,
            "n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid", "hybrid"], "use_mamba_kernels": False,
            "initializer_range": 0.2,
        }, language, generates=True,
    ),
    "bamba": Architecture(
        "State space", "BambaForCausalLM",
        _GROUPED | {
            "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4,
            "attn_layer_indices": [1],
        }, language, generates=True,
    ),
    "zamba2": Architecture(
        "State space", "Zamba2ForCausalLM",
        _DECODER | {
            "num_key_value_heads": 4, "mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "mamba_headdim": 16,
            "chunk_size": 4, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4,
        }, language, generates=True,
    ),
    "falcon_h1": Architecture(
        "State space", "FalconH1ForCausalLM",
        _GROUPED | {
            "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        }, language, generates=True,
    ),
    "jamba": Architecture(
        "State space", "JambaForCausalLM",
        _GROUPED | {
            "num_experts": 1, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
            "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        }, language, generates=True,
    ),
    "granitemoehybrid": Architecture(
        "State space", "GraniteMoeHybridForCausalLM",
        _GROUPED | {
            "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4,
            "mamba_n_groups": 1, "mamba_chunk_size": 4,
        }, language, generates=True,
    ),
    "recurrent_gemma": Architecture(
        "State space", "RecurrentGemmaForCausalLM",
        _MAMBA | {
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32,
            "attention_window_size": 32, "head_dim": 8,
        }, language, generates=True,
    ),
}
_MOE = _GROUPED | {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
EXPERTS: dict[str, Architecture] = {
    "mixtral": Architecture(
        "Mixtures of experts", "MixtralForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, language, generates=True,
    ),
    "qwen2_moe": Architecture(
        "Mixtures of experts", "Qwen2MoeForCausalLM",
        _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24}, language, generates=True,
    ),
    "qwen3_moe": Architecture(
        "Mixtures of experts", "Qwen3MoeForCausalLM",
        _MOE | {"num_experts": 4, "mlp_only_layers": [0]}, language, generates=True,
    ),
    "deepseek_v3": Architecture(
        "Mixtures of experts", "DeepseekV3ForCausalLM",
        _MOE | _ROUTED | {
            "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8,
        }, language, generates=True,
    ),
    "glm4_moe": Architecture(
        "Mixtures of experts", "Glm4MoeForCausalLM", _MOE | _ROUTED, language, generates=True,
    ),
    "olmoe": Architecture(
        "Mixtures of experts", "OlmoeForCausalLM",
        _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}, language, generates=True,
    ),
    "gpt_oss": Architecture(
        "Mixtures of experts", "GptOssForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, language, generates=True,
    ),
    "llama4": Architecture(
        "Mixtures of experts", "Llama4ForCausalLM",
        _GROUPED | {
            "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48,
            "moe_layers": [1],
        }, language, generates=True,
    ),
}
"""Models whose experts' weights are stacked in one tensor."""

ARCHITECTURES: dict[str, Architecture] = {
    **DECODERS, **ENCODERS, **TRANSLATORS, **VISION, **SPEECH, **VISION_LANGUAGE, **STATE_SPACE, **EXPERTS,
}
