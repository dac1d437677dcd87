"""The encoders, the encoder–decoders and the task heads of the golden files."""

from __future__ import annotations

import transformers as hf

from tests.golden.decoders import EPS, VOCAB, llama
from tests.golden.spec import Gains, Spec


def _bert(**changes):
    values = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                  max_position_embeddings=48, type_vocab_size=2, layer_norm_eps=EPS)
    return hf.BertConfig(**(values | changes))


def _t5(**changes):
    values = dict(vocab_size=VOCAB, d_model=32, d_kv=12, d_ff=40, num_layers=2, num_heads=3,
                  relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
                  layer_norm_epsilon=EPS)
    return hf.T5Config(**(values | changes))


_LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}

OTHERS = {
    "bert": Spec(_bert, seed=21, model="BertForPreTraining", kind="bert", old={
        "position_embedding_type": "absolute", "gradient_checkpointing": False}),
    "bert_hub": Spec(_bert, seed=22, model="BertForPreTraining", kind="bert", hub="bert"),
    "bert_sequence": Spec(lambda: _bert(problem_type="single_label_classification", **_LABELS), seed=23,
                          model="BertForSequenceClassification", kind="sequence"),
    "bert_regression": Spec(lambda: _bert(num_labels=2, problem_type="regression"), seed=24,
                            model="BertForSequenceClassification", kind="sequence"),
    "bert_tokens": Spec(lambda: _bert(**_LABELS), seed=25, dtype="bfloat16", model="BertForTokenClassification",
                        kind="tokens"),
    "llama_sequence": Spec(lambda: llama(pad_token_id=0, **_LABELS), seed=26, dtype="bfloat16",
                           model="LlamaForSequenceClassification", kind="sequence"),
    "llama_tokens": Spec(lambda: llama(num_labels=4), seed=27, dtype="bfloat16",
                         model="LlamaForTokenClassification", kind="tokens"),
    "t5": Spec(_t5, seed=31, model="T5ForConditionalGeneration", kind="t5", hub="t5", gains=Gains(embed=4.0, qk=0.85),
               old={"n_positions": 512, "output_past": True}, old_drops=(
                   "feed_forward_proj", "dense_act_fn", "is_gated_act", "scale_decoder_outputs",
                   "tie_word_embeddings")),
    "flan_t5": Spec(lambda: _t5(feed_forward_proj="gated-gelu", num_decoder_layers=3, tie_word_embeddings=False),
                    seed=32, model="T5ForConditionalGeneration", kind="t5", hub="flan_t5", dtype="bfloat16",
                    gains=Gains(embed=1.0, qk=0.85),
                    old={"tie_word_embeddings": False, "n_positions": 512, "output_past": True},
                    old_drops=("dense_act_fn", "is_gated_act", "scale_decoder_outputs")),
}
