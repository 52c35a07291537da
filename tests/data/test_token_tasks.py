"""Tasks of tokens: equal to the own losses of transformers' models, whatever their labels mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tracer
from tracer.data import token_tasks
from tracer.data.named_tasks import make_task
from tracer.data.token_tasks import LanguageModeling

transformers = pytest.importorskip("transformers")

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim", "emb_dim"), 16),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("d_kv", "head_dim", "d_inner"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_len"), 64),
    **dict.fromkeys(("num_labels", "pad_token_id", "decoder_start_token_id", "type_vocab_size"), 2),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    "rotary_dim": 4,
}
KINDS = {
    "causal": """BartForCausalLM BioGptForCausalLM BloomForCausalLM CTRLLMHeadModel CohereForCausalLM
        FalconForCausalLM GPT2LMHeadModel GPTJForCausalLM GPTNeoXForCausalLM GemmaForCausalLM LlamaForCausalLM
        MBartForCausalLM MistralForCausalLM MptForCausalLM OPTForCausalLM OlmoForCausalLM OpenAIGPTLMHeadModel
        PegasusForCausalLM PersimmonForCausalLM PhiForCausalLM Qwen2ForCausalLM StableLmForCausalLM""",
    "masked": """AlbertForMaskedLM BertForMaskedLM CamembertForMaskedLM DebertaV2ForMaskedLM DistilBertForMaskedLM
        ElectraForMaskedLM ErnieForMaskedLM FlaubertWithLMHeadModel IBertForMaskedLM MPNetForMaskedLM
        MegatronBertForMaskedLM ModernBertForMaskedLM RemBertForMaskedLM RoFormerForMaskedLM RobertaForMaskedLM
        RobertaPreLayerNormForMaskedLM XLMRobertaForMaskedLM XLMRobertaXLForMaskedLM XLMWithLMHeadModel
        XLNetLMHeadModel""",
    "seq2seq": """BartForConditionalGeneration BlenderbotForConditionalGeneration M2M100ForConditionalGeneration
        MBartForConditionalGeneration MT5ForConditionalGeneration MvpForConditionalGeneration
        PegasusForConditionalGeneration T5ForConditionalGeneration UMT5ForConditionalGeneration""",
    "token": """AlbertForTokenClassification BertForTokenClassification BloomForTokenClassification
        DebertaV2ForTokenClassification DistilBertForTokenClassification ElectraForTokenClassification
        GPT2ForTokenClassification LlamaForTokenClassification MPNetForTokenClassification
        MT5ForTokenClassification MistralForTokenClassification RobertaForTokenClassification
        T5ForTokenClassification XLMForTokenClassification XLNetForTokenClassification""",
}
NAMES = {"masked": "masked_language_modeling", "seq2seq": "seq2seq", "token": "token_classification"}
ARCHITECTURES = [(kind, name) for kind, names in KINDS.items() for name in names.split()]


def build(name):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    default = model_class.config_class()

    def is_property(key):
        return isinstance(getattr(type(default), key, None), property)

    options = {key: value for key, value in SMALL.items() if hasattr(default, key) and not is_property(key)}
    options |= {"decoder_start_token_id": 2} if getattr(default, "is_encoder_decoder", False) else {}
    return model_class(model_class.config_class(**options)).double().eval()


def tokens_and_labels(model, rows=2, length=7, classes=VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(3 % classes, classes, (rows, length), generator=generator)
    labels[:, 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize(("kind", "name"), ARCHITECTURES, ids=[name for _, name in ARCHITECTURES])
def test_losses_are_those_of_the_model_itself(kind, name):
    model = build(name)
    batch = tokens_and_labels(model, classes=2 if kind == "token" else VOCABULARY)
    for task in ("language_modeling", *([NAMES[kind]] if kind in NAMES else [])):
        found = make_task(task).outputs(model, batch)
        for row in range(2):
            own = model(**{key: value[row : row + 1] for key, value in batch.items()}).loss
            torch.testing.assert_close(found.loss[row], own.detach().double(), rtol=1e-5, atol=0)


def test_kinds_are_known_by_name_if_no_loss_shows_them():
    expected = {"GPT2LMHeadModel": True, "BertForMaskedLM": False, "T5ForConditionalGeneration": False}
    for name, shifts in expected.items():
        model = build(name)
        assert token_tasks.shifts_labels(model) is shifts

        class Wrapper(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

        assert token_tasks.shifts_labels(Wrapper(model)) is shifts


def test_adapters_of_peft_pass_for_their_model():
    peft = pytest.importorskip("peft")
    inner = build("BertForMaskedLM")
    batch = tokens_and_labels(inner)
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["query"])).double().eval()
    assert type(model) is peft.PeftModel
    task = make_task("language_modeling")
    torch.testing.assert_close(
        task.outputs(model, {**batch, "index": torch.arange(2)}).loss, task.outputs(inner, batch).loss
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_seq2seq_labels_are_the_decoders_own(reduction):
    model = build("T5ForConditionalGeneration")
    batch = tokens_and_labels(model)
    given = {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}
    task = LanguageModeling(reduction)
    torch.testing.assert_close(task.outputs(model, given).loss, task.outputs(model, batch).loss)


def test_causal_models_are_refused_for_tasks_in_place():
    model = build("GPT2LMHeadModel")
    for task in ("seq2seq", "masked_language_modeling", "token_classification"):
        with pytest.raises(tracer.BatchError, match="shifts them inside"):
            make_task(task).outputs(model, tokens_and_labels(model))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_labels_in_place_are_not_guessed(name):
    model = build(name)
    batch = tokens_and_labels(model)
    for incomplete in ({"input_ids": batch["input_ids"]}, (batch["input_ids"],)):
        with pytest.raises(tracer.BatchError, match="needs 'labels'|expects a mapping"):
            make_task("language_modeling").outputs(model, incomplete)


def test_pairs_of_tokens_that_are_no_labels_are_refused():
    model = build("GPT2LMHeadModel")
    tokens = tokens_and_labels(model)["input_ids"]
    task = make_task("language_modeling")
    with pytest.raises(tracer.BatchError, match="only 0 and 1"):
        task.outputs(model, (tokens, torch.ones_like(tokens)))
    with pytest.raises(tracer.BatchError, match="pair of equal tensors"):
        task.outputs(model, (tokens, tokens))


@pytest.mark.parametrize(
    "name", ["BertForQuestionAnswering", "DistilBertForQuestionAnswering", "T5ForQuestionAnswering"]
)
def test_question_answering_is_the_models_own_loss(name):
    model = build(name)
    batch = {key: value for key, value in tokens_and_labels(model).items() if key != "labels"}
    batch |= {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 6])}
    found = make_task("question_answering").outputs(model, batch)
    torch.testing.assert_close(found.loss.mean(), model(**batch).loss.detach().double(), rtol=1e-5, atol=0)
    with pytest.raises(tracer.BatchError, match="label 9 at position 1"):
        make_task("question_answering").outputs(model, {**batch, "end_positions": torch.tensor([2, 9])})
    with pytest.raises(tracer.BatchError, match="'start_positions' and 'end_positions'"):
        make_task("question_answering").outputs(model, {"input_ids": batch["input_ids"]})
