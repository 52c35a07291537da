"""Models of transformers for sound, series, and text with images."""

from __future__ import annotations

import torch
from zoo.configurations import VOCABULARY, classifier, configured, outputs, pixels, text
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


def text_and_image():
    return {**text()(), **pixels()()}


def matching(model, batch):
    """Return the loss of each text with its own image."""
    found = model(**batch)
    return 1 - (found.text_embeds * found.image_embeds).sum(1)


def two_towers(name: str, model_class: str, **changes) -> Entry:
    """Return the entry of a model that embeds texts and images."""
    return Entry(name, configured(model_class, **changes), text_and_image, matching)


AUDIO_AND_MIXED = [
    classifier(
        "Audio spectrogram transformer",
        "ASTForAudioClassification",
        lambda: {"input_values": normal(16, 16)},
        max_length=16,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=4,
        time_stride=4,
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
    two_towers("CLIP", "CLIPModel", **TWO_TOWERS, projection_dim=8),
    outputs(
        "CLIP, squares of unit vectors",
        "CLIPModel",
        text_and_image,
        "text_embeds",
        "image_embeds",
        **TWO_TOWERS,
        projection_dim=8,
        refused="rounding errors only",
    ),
    two_towers(
        "SigLIP",
        "SiglipModel",
        text_config={**TEXT, "max_position_embeddings": 7, "projection_size": 16},
        vision_config=VISION,
    ),
    outputs(
        "CLIP, contrastive logits",
        "CLIPModel",
        text_and_image,
        "logits_per_image",
        **TWO_TOWERS,
        projection_dim=8,
        refused="output of the model .CLIPModel. is the first that differs",
    ),
    two_towers(
        "BLIP",
        "BlipModel",
        text_config={**TEXT, "encoder_hidden_size": 16},
        vision_config=VISION,
        projection_dim=8,
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
