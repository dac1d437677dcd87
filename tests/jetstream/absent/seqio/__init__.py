"""Stands for seqio, which needs TensorFlow: the archived server's modules name two of its classes, and its load tester
uses one, as the wrapper of a SentencePiece model."""
