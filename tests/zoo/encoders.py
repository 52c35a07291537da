"""Encoders of transformers for text, and encoder-decoders."""

from __future__ import annotations

import torch
from zoo.configurations import VOCABULARY, classifier, configured, text
from zoo.harness import Entry, own_loss
from zoo.tables import integers

PADDING = "padding|influence each other|alone"
PADDED = text(padded=True)
SEQ2SEQ = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 6,
}


def translation():
    """Return a batch of padded sources, and targets some of which are shorter."""
    targets = integers(VOCABULARY, 5, low=3, seed=7)
    targets[::2, 4:] = -100
    return PADDED() | {"labels": targets}


def masked():
    """Return a batch of padded sequences with two tokens of each to be predicted."""
    made = PADDED()
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, :2] = made["input_ids"][:, :2]
    return made | {"labels": labels}


def tagged():
    """Return a batch of padded sequences with a class for each token."""
    made = PADDED()
    return made | {"labels": (made["input_ids"] % 3).masked_fill(made["attention_mask"] == 0, -100)}


def of_tokens(name: str, model_class: str, batch, task: str = "seq2seq", **changes) -> Entry:
    """Return the entry of a model with labels for its positions; its loss is the model's own."""
    entry = {key: changes.pop(key) for key in ("refused", "or_exact", "fault", "rtol") if key in changes}
    return Entry(name, configured(model_class, **changes), batch, task, own_loss, **entry)


ENCODERS = [
    classifier("BERT", "BertForSequenceClassification", PADDED),
    of_tokens("BERT, masked tokens", "BertForMaskedLM", masked, "masked_language_modeling"),
    of_tokens("BERT, tags", "BertForTokenClassification", tagged, "token_classification"),
    classifier("RoBERTa", "RobertaForSequenceClassification", PADDED),
    classifier("XLM-RoBERTa", "XLMRobertaForSequenceClassification", PADDED),
    classifier("CamemBERT", "CamembertForSequenceClassification", PADDED),
    classifier(
        "DistilBERT", "DistilBertForSequenceClassification", PADDED, dim=16, n_heads=2, n_layers=2, hidden_dim=24
    ),
    classifier("ALBERT", "AlbertForSequenceClassification", PADDED, embedding_size=8),
    classifier("ELECTRA", "ElectraForSequenceClassification", PADDED, embedding_size=8),
    classifier(
        "DeBERTa",
        "DebertaForSequenceClassification",
        PADDED,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    ),
    classifier(
        "DeBERTa v2",
        "DebertaV2ForSequenceClassification",
        PADDED,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        conv_kernel_size=3,
    ),
    classifier("MPNet", "MPNetForSequenceClassification", PADDED, relative_attention_num_buckets=32),
    classifier(
        "ConvBERT",
        "ConvBertForSequenceClassification",
        PADDED,
        embedding_size=16,
        conv_kernel_size=3,
        head_ratio=1,
        refused=PADDING,
    ),
    classifier(
        "SqueezeBERT",
        "SqueezeBertForSequenceClassification",
        PADDED,
        embedding_size=16,
        q_groups=1,
        k_groups=1,
        v_groups=1,
        post_attention_groups=1,
        intermediate_groups=1,
        output_groups=1,
    ),
    classifier(
        "MobileBERT",
        "MobileBertForSequenceClassification",
        PADDED,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=1,
        refused=PADDING,
    ),
    classifier(
        "Funnel",
        "FunnelForSequenceClassification",
        text(padded=True, shortest=4),  # it pools, and fails on shorter ones itself
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    classifier("FNet", "FNetForSequenceClassification", text(), tpu_short_seq_length=7),
    classifier(
        "Longformer",
        "LongformerForSequenceClassification",
        text(8, padded=True, first=(8, 4, 3, 2)),
        attention_window=[4, 4],
    ),
    classifier("BigBird", "BigBirdForSequenceClassification", PADDED, attention_type="original_full"),
    classifier(
        "Nyströmformer",
        "NystromformerForSequenceClassification",
        text(8),
        num_landmarks=4,
        segment_means_seq_len=8,
        refused="influence each other.*SelfAttention",  # it divides by the largest sum of the batch
    ),
    classifier("YOSO", "YosoForSequenceClassification", text(8), use_expectation=True),
    classifier("RoFormer", "RoFormerForSequenceClassification", PADDED, embedding_size=16),
    classifier("RemBERT", "RemBertForSequenceClassification", PADDED, input_embedding_size=8, output_embedding_size=8),
    classifier("I-BERT", "IBertForSequenceClassification", PADDED),
    classifier("ERNIE", "ErnieForSequenceClassification", PADDED),
    classifier("Megatron-BERT", "MegatronBertForSequenceClassification", PADDED),
    classifier("X-MOD", "XmodForSequenceClassification", PADDED, languages=["en_XX"], default_language="en_XX"),
    classifier(
        "XLM",
        "XLMForSequenceClassification",
        PADDED,
        emb_dim=16,
        n_layers=2,
        n_heads=2,
        n_words=VOCABULARY,
    ),
    classifier("FlauBERT", "FlaubertForSequenceClassification", PADDED, emb_dim=16, n_layers=2, n_heads=2),
    classifier(
        "XLNet, classes",
        "XLNetForSequenceClassification",
        PADDED,
        d_model=16,
        n_layer=2,
        n_head=2,
        d_inner=24,
        refused=PADDING,
    ),
    classifier(
        "ModernBERT",
        "ModernBertForSequenceClassification",
        text(),
        local_attention=4,
        global_attn_every_n_layers=2,
        hidden_size=16,
        num_attention_heads=2,
    ),
    classifier("EuroBERT", "EuroBertForSequenceClassification", PADDED),
    classifier("ESM", "EsmForSequenceClassification", PADDED, position_embedding_type="rotary", mask_token_id=5),
    classifier(
        "LayoutLM",
        "LayoutLMForSequenceClassification",
        text(padded=True, bbox=lambda: integers(5, 7, 4, low=1, seed=8).cumsum(2)),
        max_2d_position_embeddings=32,
    ),
    classifier("Llama, classes of the last token", "LlamaForSequenceClassification", PADDED),
    classifier(
        "GPT-2, classes of the last token", "GPT2ForSequenceClassification", PADDED, n_embd=16, n_head=2, n_layer=2
    ),
    of_tokens("T5", "T5ForConditionalGeneration", translation, **T5),
    of_tokens("mT5", "MT5ForConditionalGeneration", translation, **T5),
    of_tokens(
        "LongT5", "LongT5ForConditionalGeneration", translation, **T5, local_radius=2, encoder_attention_type="local"
    ),
    of_tokens("UMT5", "UMT5ForConditionalGeneration", translation, **T5),
    of_tokens(
        "Switch",
        "SwitchTransformersForConditionalGeneration",
        translation,
        **T5,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=64,
        router_jitter_noise=0.0,
    ),
    of_tokens("BART", "BartForConditionalGeneration", translation, **SEQ2SEQ),
    of_tokens("mBART", "MBartForConditionalGeneration", translation, **SEQ2SEQ),
    of_tokens("Pegasus", "PegasusForConditionalGeneration", translation, **SEQ2SEQ),
    of_tokens("Blenderbot", "BlenderbotForConditionalGeneration", translation, **SEQ2SEQ),
    of_tokens("Marian", "MarianMTModel", translation, **SEQ2SEQ, decoder_vocab_size=VOCABULARY),
    of_tokens("M2M-100", "M2M100ForConditionalGeneration", translation, **SEQ2SEQ),
    of_tokens(
        "NLLB-MoE",
        "NllbMoeForConditionalGeneration",
        translation,
        **SEQ2SEQ,
        num_experts=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        expert_capacity=64,
    ),
    of_tokens("PLBART", "PLBartForConditionalGeneration", translation, **SEQ2SEQ),
]
