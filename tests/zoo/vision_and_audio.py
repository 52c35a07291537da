"""Models of transformers for images, video, sound, series, and text with images."""

from __future__ import annotations

import torch
from zoo.configurations import VOCABULARY, classifier, configured, pixels, text
from zoo.faults import CACHED, GIVEN_UP, NOISE
from zoo.harness import Entry
from zoo.tables import integers, normal

VIT = {"image_size": 16, "patch_size": 8}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 28}
VISION = {**TOWER, **VIT}
TWO_TOWERS = {"text_config": TEXT, "vision_config": VISION}
WAVES = {
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}


def sound(length: int = 160):
    return lambda: {"input_values": normal(length)}


def video(frames: int = 2, size: int = 16):
    return lambda: {"pixel_values": normal(frames, 3, size, size)}


def text_and_image():
    return {**text()(), **pixels()()}


def squares(*names):
    """Return a task of mean squares of outputs, for models without a loss of single examples."""

    def task(model, batch):
        output = model(**batch)
        return sum(output[name].flatten(1).square().mean(1) for name in names)

    return task


def outputs(name: str, model_class: str, batch, *names: str, **changes) -> Entry:
    """Return the entry of a model, whose loss is the mean square of some of its outputs."""
    entry = {key: changes.pop(key) for key in ("refused", "or_exact", "fault", "rtol") if key in changes}
    return Entry(name, configured(model_class, **changes), batch, squares(*names), **entry)


VISION_AND_AUDIO = [
    classifier("ViT", "ViTForImageClassification", pixels(), **VIT, fault=NOISE),
    classifier("DeiT", "DeiTForImageClassification", pixels(), **VIT, fault=NOISE),
    classifier(
        "BEiT",
        "BeitForImageClassification",
        pixels(),
        **VIT,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        use_mask_token=False,
    ),
    classifier(
        "Data2Vec vision",
        "Data2VecVisionForImageClassification",
        pixels(),
        **VIT,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
    ),
    classifier("DINOv2", "Dinov2ForImageClassification", pixels(), **VIT, use_swiglu_ffn=True),
    classifier("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", pixels(), **VIT),
    outputs("DINOv3", "DINOv3ViTModel", pixels(), "last_hidden_state", **VIT),
    classifier(
        "Swin",
        "SwinForImageClassification",
        pixels(),
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        fault=NOISE,
    ),
    classifier(
        "Swin v2",
        "Swinv2ForImageClassification",
        pixels(),
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    classifier(
        "ConvNeXt",
        "ConvNextForImageClassification",
        pixels(),
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
    ),
    classifier(
        "ConvNeXt v2",
        "ConvNextV2ForImageClassification",
        pixels(),
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
    ),
    classifier(
        "ResNet", "ResNetForImageClassification", pixels(), embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1]
    ),
    classifier(
        "RegNet",
        "RegNetForImageClassification",
        pixels(),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        groups_width=4,
    ),
    classifier(
        "BiT",
        "BitForImageClassification",
        pixels(),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_groups=4,
    ),
    classifier("MobileNet v1", "MobileNetV1ForImageClassification", pixels(32), depth_multiplier=0.25, min_depth=4),
    classifier("MobileNet v2", "MobileNetV2ForImageClassification", pixels(32), depth_multiplier=0.1, min_depth=4),
    classifier(
        "MobileViT",
        "MobileViTForImageClassification",
        pixels(32),
        image_size=32,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8],
        num_attention_heads=2,
    ),
    classifier(
        "SegFormer",
        "SegformerForImageClassification",
        pixels(),
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        fault=NOISE,
    ),
    classifier(
        "PVT",
        "PvtForImageClassification",
        pixels(32),
        image_size=32,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
    ),
    classifier(
        "PVT v2",
        "PvtV2ForImageClassification",
        pixels(32),
        image_size=32,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
    ),
    classifier(
        "PoolFormer", "PoolFormerForImageClassification", pixels(32), hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]
    ),
    classifier(
        "LeViT",
        "LevitForImageClassification",
        pixels(32),
        image_size=32,
        hidden_sizes=[8, 8, 8],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        attention_ratio=[1, 1, 1],
        mlp_ratio=[2, 2, 2],
        fault=CACHED,
    ),
    classifier(
        "SwiftFormer",
        "SwiftFormerForImageClassification",
        pixels(32),
        image_size=32,
        depths=[1, 1, 1, 1],
        embed_dims=[8, 8, 8, 8],
    ),
    classifier(
        "FocalNet",
        "FocalNetForImageClassification",
        pixels(),
        image_size=16,
        patch_size=2,
        embed_dim=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
    ),
    classifier("I-JEPA", "IJepaForImageClassification", pixels(), **VIT, fault=NOISE),
    classifier("ViT-MSN", "ViTMSNForImageClassification", pixels(), **VIT, fault=NOISE),
    classifier(
        "Hiera",
        "HieraForImageClassification",
        pixels(),
        image_size=[16, 16],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        query_stride=[2, 2],
        masked_unit_size=[2, 2],
        masked_unit_attention=[True, False],
        num_query_pool=1,
    ),
    classifier(
        "Perceiver, text",
        "PerceiverForSequenceClassification",
        lambda: {"inputs": integers(VOCABULARY, 7, low=3)},
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
    outputs(
        "DPT",
        "DPTModel",
        pixels(),
        "last_hidden_state",
        **VIT,
        backbone_out_indices=[0, 1, 1, 1],
        neck_hidden_sizes=[8, 8, 8, 8],
    ),
    outputs(
        "YOLOS",
        "YolosModel",
        lambda: {"pixel_values": normal(3, 16, 16)},
        "last_hidden_state",
        image_size=[16, 16],
        patch_size=8,
        num_detection_tokens=3,
    ),
    classifier(
        "ViViT",
        "VivitForVideoClassification",
        video(),
        image_size=16,
        num_frames=2,
        tubelet_size=[1, 8, 8],
        fault=NOISE,
    ),
    classifier(
        "VideoMAE", "VideoMAEForVideoClassification", video(), image_size=16, patch_size=8, num_frames=2, tubelet_size=1
    ),
    classifier("TimeSformer", "TimesformerForVideoClassification", video(), image_size=16, patch_size=8, num_frames=2),
    classifier(
        "Audio spectrogram transformer",
        "ASTForAudioClassification",
        lambda: {"input_values": normal(16, 16)},
        max_length=16,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=4,
        time_stride=4,
        fault=NOISE,
    ),
    classifier("wav2vec 2.0", "Wav2Vec2ForSequenceClassification", sound(), **WAVES),
    classifier(
        "wav2vec 2.0, layer norm",
        "Wav2Vec2ForSequenceClassification",
        sound(),
        **WAVES,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    ),
    classifier("HuBERT", "HubertForSequenceClassification", sound(), **WAVES),
    classifier("WavLM", "WavLMForSequenceClassification", sound(), **WAVES, num_buckets=8, max_bucket_distance=16),
    classifier(
        "Data2Vec audio", "Data2VecAudioForSequenceClassification", sound(), **{**WAVES, "conv_pos_kernel_size": 3}
    ),
    classifier("UniSpeech", "UniSpeechForSequenceClassification", sound(), **WAVES),
    classifier("SEW", "SEWForSequenceClassification", sound(), **WAVES, squeeze_factor=2),
    classifier(
        "Whisper encoder",
        "WhisperForAudioClassification",
        lambda: {"input_features": normal(8, 32)},
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=16,
        classifier_proj_size=8,
    ),
    outputs(
        "Speech2Text",
        "Speech2TextForConditionalGeneration",
        lambda: {"input_features": normal(16, 8), "decoder_input_ids": integers(VOCABULARY, 4, low=3)},
        "logits",
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        input_feat_per_channel=8,
        conv_channels=16,
        num_conv_layers=2,
        max_source_positions=32,
        max_target_positions=16,
    ),
    outputs(
        "SpeechT5 encoder",
        "SpeechT5ForSpeechToText",
        lambda: {"input_values": normal(160), "decoder_input_ids": integers(VOCABULARY, 4, low=3)},
        "logits",
        **WAVES,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    ),
    outputs(
        "CLIP",
        "CLIPModel",
        text_and_image,
        "text_embeds",
        "image_embeds",
        **TWO_TOWERS,
        projection_dim=8,
        fault=GIVEN_UP,
    ),
    outputs(
        "SigLIP",
        "SiglipModel",
        text_and_image,
        "text_embeds",
        "image_embeds",
        text_config={**TEXT, "max_position_embeddings": 7, "projection_size": 16},
        vision_config=VISION,
        fault=GIVEN_UP,
    ),
    outputs(
        "CLIP, contrastive logits",
        "CLIPModel",
        text_and_image,
        "logits_per_image",
        **TWO_TOWERS,
        projection_dim=8,
        refused="influence each other|alone|share a batch",
    ),
    outputs(
        "BLIP",
        "BlipModel",
        text_and_image,
        "text_embeds",
        "image_embeds",
        text_config={**TEXT, "encoder_hidden_size": 16},
        vision_config=VISION,
        projection_dim=8,
        fault=GIVEN_UP,
    ),
    classifier(
        "ViLT",
        "ViltForImagesAndTextClassification",
        lambda: {**text()(), "pixel_values": normal(1, 3, 16, 16)},
        **VIT,
        num_images=1,
        modality_type_vocab_size=3,
    ),
    outputs(
        "VisualBERT",
        "VisualBertModel",
        lambda: {**text()(), "visual_embeds": normal(2, 8)},
        "pooler_output",
        visual_embedding_dim=8,
    ),
    outputs(
        "LXMERT",
        "LxmertModel",
        lambda: {**text()(), "visual_feats": normal(2, 8), "visual_pos": normal(2, 4)},
        "pooled_output",
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=8,
    ),
    outputs("FLAVA text", "FlavaTextModel", text(), "pooler_output"),
    outputs(
        "PatchTST",
        "PatchTSTForPrediction",
        lambda: {"past_values": normal(16, 2)},
        "prediction_outputs",
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        d_model=16,
        ffn_dim=24,
        num_input_channels=2,
        loss="mse",
        do_mask_input=False,
        use_cls_token=True,
        scaling=None,
    ),
    outputs(
        "PatchTSMixer",
        "PatchTSMixerForPrediction",
        lambda: {"past_values": normal(16, 2)},
        "prediction_outputs",
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        d_model=8,
        num_layers=1,
        num_input_channels=2,
        loss="mse",
    ),
    outputs(
        "Decision transformer",
        "DecisionTransformerModel",
        lambda: {
            "states": normal(3, 4),
            "actions": normal(3, 2),
            "rewards": normal(3, 1),
            "returns_to_go": normal(3, 1),
            "timesteps": integers(10, 3),
            "attention_mask": torch.ones(13, 3, dtype=torch.long),
        },
        "action_preds",
        state_dim=4,
        act_dim=2,
        n_head=2,
        n_layer=1,
        max_ep_len=12,
    ),
    classifier(
        "ImageGPT",
        "ImageGPTForImageClassification",
        lambda: {"input_ids": integers(VOCABULARY, 7)},
        n_embd=16,
        n_head=2,
        n_layer=2,
        n_positions=8,
    ),
    classifier(
        "BERT, several choices", "BertForMultipleChoice", lambda: {"input_ids": integers(VOCABULARY, 3, 5, low=3)}
    ),
]
