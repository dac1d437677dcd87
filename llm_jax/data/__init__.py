"""From files to batches: corpus → documents → split → tokenizer → shards → packed rows.

The stops, in order: `corpus` finds the files, `readers` opens them, `cleaning` makes documents of their text, `spool`
does these in parallel and remembers one small record per document, `splits` removes duplicates and decides the sides,
`tokenizer_training` trains the `tokenizer`, `shards` writes token documents, and `prepare` runs all of them. `manifest`
describes and verifies what was written, `documents` reads it back, `packing` lays documents out in rows, `loader` turns
rows into batches for training and `windows` turns documents into batches for evaluation.
"""
