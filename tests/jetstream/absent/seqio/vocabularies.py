"""The two classes, the second as far as `jetstream.engine.token_utils.load_vocab` uses it."""

import functools

import sentencepiece


class Vocabulary:
    pass


class SentencePieceVocabulary(Vocabulary):
    def __init__(self, path, extra_ids=0):
        self._path = path

    @functools.cached_property
    def tokenizer(self):
        return sentencepiece.SentencePieceProcessor(model_file=self._path)

    @property
    def sp_model(self):
        return self.tokenizer.serialized_model_proto()
