"""Prepares a data directory: the whole way from files to shards, restartable and the same for any number of workers."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from llm_jax import storage
from llm_jax.data import corpus as corpora
from llm_jax.data import manifest as manifests
from llm_jax.data import shards, splits, spool, summary, tokenizer_training, workers
from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.tokenizers import folder
from llm_jax.errors import UserError

_WORK = ".preparing"
# Less text than this is prepared sooner than worker processes start.
_POOL_BYTES = 4 << 20
_SMALLEST_DOCUMENT = 200


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a preparation left.

    Attributes:
      data_dir: where it is.
      manifest: its manifest.
      reused: whether everything was already there.
      seconds: wall time of this call.
    """

    data_dir: str
    manifest: dict
    reused: bool
    seconds: float


def prepare(
    data_dir: str,
    corpus: str | Sequence[str] = corpora.PYTHON_STDLIB,
    vocab_size: int = 4096,
    max_document_chars: int = 16384,
    min_document_chars: int = 50,
    tokenizer_sample_mb: int = 64,
    num_workers: int | None = None,
    force: bool = False,
    verbose: bool = True,
    tokenizer: str | os.PathLike | None = None,
) -> Prepared:
    """Reads a corpus, splits it, trains or takes a tokenizer and writes token shards with an index and a manifest.

    The output is a pure function of the corpus and the settings: `num_workers` changes the time alone. It appears
    whole, the manifest last; a preparation that was interrupted starts again. If the same was prepared before and is
    intact, nothing is done.

    Args:
      data_dir: directory to write; made if it does not exist. Needs room for the text once more while it works.
      corpus: 'python-stdlib', or the path of a file or a folder, or several of these; in a bucket too (`gs://…`, `s3://…`),
        of which a copy is made on this machine.
      vocab_size: tokens wanted; a small corpus gets fewer. Of no effect with `tokenizer`.
      max_document_chars: wanted length of the pieces that longer texts are cut into, at paragraph ends.
      min_document_chars: shorter documents are dropped.
      tokenizer_sample_mb: most text, in MiB, that the tokenizer is trained on.
      num_workers: processes to use; None for one per CPU.
      force: whether to replace what another corpus or other settings left in `data_dir`.
      verbose: whether to show progress bars on stderr and print a summary.
      tokenizer: instead of training one, the tokenizer of this run directory, Hugging Face folder, or file.

    Raises:
      UserError: a corpus that is missing, unreadable or empty, a tokenizer that is damaged or cannot end a document,
        or `data_dir` holds other data and `force` is not set.
    """
    started = time.monotonic()
    parts = corpora.resolve(corpus)
    settings = {"corpus": parts, "vocab_size": vocab_size, "max_document_chars": max_document_chars,
                "min_document_chars": min_document_chars, "tokenizer_sample_mb": tokenizer_sample_mb}
    _check(settings, num_workers)
    given = None if tokenizer is None else tokenizers.Tokenizer.load(tokenizer)
    if given is not None:
        given.document_ids("")  # raises if it cannot be used
        settings |= {"vocab_size": None, "tokenizer_sample_mb": None}
    settings["tokenizer"] = given and given.fingerprint
    if not storage.is_local(data_dir):
        raise UserError(f"{data_dir}: data are prepared on a disk; copy the folder into the bucket afterwards "
                        "(`gcloud storage cp -r`, `aws s3 cp --recursive`), from where it can be trained on")
    directory = pathlib.Path(os.path.abspath(os.path.expanduser(data_dir)))
    with _locked(directory):
        files, skipped = corpora.list_files(parts, exclude=str(directory))
        facts: dict[str, Any] = {
            "parts": parts, "files": len(files), "bytes": sum(file.size for file in files),
            "fingerprint": corpora.fingerprint(files)}
        manifest = None if force else _reusable(directory, settings, facts)
        reused = manifest is not None
        if manifest is None:
            if not files:
                raise UserError(_too_little(0, parts, skipped))
            count = 1 if facts["bytes"] < _POOL_BYTES else num_workers or os.cpu_count() or 1
            with _work_folder(directory) as work:
                with workers.start(count) as pool:
                    manifest = _build(work, files, skipped, settings, facts, given, pool, verbose)
                manifest["seconds"] = round(time.monotonic() - started, 1)
                _publish(work, directory, manifest)
    seconds = time.monotonic() - started
    if verbose:
        print(summary.summary(str(directory), manifest, reused, seconds), flush=True)
    return Prepared(str(directory), manifest, reused, seconds)


def _check(settings: dict, num_workers: int | None) -> None:
    given: dict[str, Any] = settings | {"num_workers": 1 if num_workers is None else num_workers}
    least = {"vocab_size": tokenizer_training.SMALLEST_VOCAB, "max_document_chars": _SMALLEST_DOCUMENT,
             "min_document_chars": 1, "tokenizer_sample_mb": 1, "num_workers": 1}
    for name, smallest in least.items():
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise UserError(f"{name} must be a whole number of at least {smallest}, not {value!r}")


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    """Keeps two preparations from writing the same directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    except OSError as error:
        raise UserError(f"cannot write the data directory {directory}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing {directory}; wait for it, or choose another "
                            "DATA_DIR") from error
        yield


@contextlib.contextmanager
def _work_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder for unfinished files, on the same file system; what a killed preparation left in it goes."""
    work = directory / _WORK
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot prepare {directory}: {error.strerror or error}{where}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _reusable(directory: pathlib.Path, settings: dict, facts: dict) -> dict | None:
    """The manifest of what is already there, None if nothing is; a UserError if it is something else."""
    if not (directory / manifests.FILE_NAME).exists():
        return None
    manifest = manifests.load_manifest(directory)
    then = manifest["settings"]
    choose = "choose another DATA_DIR, or replace it with --gin.FORCE=True"
    for name, value in settings.items():
        if then.get(name) != value:
            raise UserError(f"{directory} was prepared with {name}={then.get(name)!r}, not {value!r}; {choose}")
    if manifest["corpus"]["fingerprint"] != facts["fingerprint"]:
        was = manifest["corpus"]
        raise UserError(f"the corpus has changed since {directory} was prepared: {was['files']} files of "
                        f"{was['bytes']} bytes then, {facts['files']} files of {facts['bytes']} bytes now; {choose}")
    return manifest


def _build(work: pathlib.Path, files: list[corpora.CorpusFile], skipped: corpora.SkipReport, settings: dict,
           facts: dict, tokenizer: tokenizers.Tokenizer | None, pool: workers.Workers, verbose: bool) -> dict:
    """Writes everything but the manifest into `work` and returns the manifest."""
    spooled = _spool(work, files, settings["max_document_chars"], settings["min_document_chars"], pool, verbose)
    cut_at = settings["max_document_chars"]
    if len(spooled.records) < 3 and spooled.records["chars"].sum() >= 8 * _SMALLEST_DOCUMENT:
        # One short text: cut it finer, so that it still has all three sides.
        cut_at = max(_SMALLEST_DOCUMENT, int(spooled.records["chars"].sum()) // 20)
        spooled = _spool(work, files, cut_at, settings["min_document_chars"], pool, verbose)
    skipped.merge(spooled.skipped)
    kept = splits.unique(spooled.records)
    if len(kept) < len(spooled.records):
        skipped.add("exact duplicate document", count=len(spooled.records) - len(kept))
    records = spooled.records[kept]
    if len(records) < 3:
        raise UserError(_too_little(len(records), facts["parts"], skipped))
    sides = splits.assign(records["id"], records["source"])

    if tokenizer is None:
        tokenizer = _train(records[sides == splits.TRAIN], spooled.spools, settings, verbose)
    tokenizer.save(work)

    tasks = shards.plan(records, sides, spooled.spools, str(work), str(work))
    with _bar(verbose, "tokenizing", int(records["bytes"].sum(dtype=np.int64))) as bar:
        results = pool.map(shards.write_shard, tasks, lambda result: bar.update(result.text_bytes))
    return _describe(work, results, records, sides, spooled, tokenizer, skipped, settings, facts, cut_at)


def _train(records: np.ndarray, spools: list[str], settings: dict, verbose: bool) -> tokenizers.Tokenizer:
    sample = tokenizer_training.sample_records(records, settings["tokenizer_sample_mb"] << 20)
    with _bar(verbose, "training the tokenizer", int(sample["bytes"].sum(dtype=np.int64))) as bar:
        texts = spool.read_spooled(sample, spools)
        tokenizer = tokenizer_training.train_tokenizer(texts, settings["vocab_size"])
        bar.update(bar.total)
    return tokenizer


def _spool(work: pathlib.Path, files: list[corpora.CorpusFile], max_chars: int, min_chars: int,
           pool: workers.Workers, verbose: bool) -> spool.Spooled:
    tasks = spool.plan(files, str(work), max_chars, min_chars)
    with _bar(verbose, "reading", sum(file.size for file in files)) as bar:
        results = pool.map(spool.run_task, tasks, lambda result: bar.update(result.bytes_read))
    return spool.collect(tasks, results)


def _bar(verbose: bool, what: str, total: int) -> tqdm.tqdm:
    # None: no bar where stderr is not a terminal
    return tqdm.tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None if verbose else True, leave=False)


def _too_little(documents: int, parts: list[str], skipped: corpora.SkipReport) -> str:
    reasons = ", ".join(f"{facts['count']} × {reason}" for reason, facts in skipped.to_dict().items())
    found = "is empty: it holds no document" if not documents else f"holds only {documents} different document(s)"
    return (f"the corpus {', '.join(parts)} {found}; at least 3 are needed, for training, validation and test"
            + (f" (left out: {reasons})" if reasons else ""))


def _describe(work: pathlib.Path, results: list[shards.ShardResult], records: np.ndarray, sides: np.ndarray,
              spooled: spool.Spooled, tokenizer: tokenizers.Tokenizer, skipped: corpora.SkipReport, settings: dict,
              facts: dict, cut_at: int) -> dict:
    """Writes the indices and gathers the manifest."""
    described, counts, listed = {}, {}, {}
    for split in splits.SPLITS:
        of_split = [result for result in results if result.split == split]
        index = np.concatenate([result.index for result in of_split])
        name = f"{split}.index.npy"
        np.save(work / name, index, allow_pickle=False)
        counts[split] = sum(result.token_counts for result in of_split)
        described[split] = {
            "documents": len(index), "tokens": int(index["length"].sum(dtype=np.int64)),
            "bytes": int(index["bytes"].sum(dtype=np.int64)),
            "shards": [{"file": os.path.basename(result.path), "documents": len(result.index)} for result in of_split]}
        listed |= {os.path.basename(r.path): {"size": r.size, "sha256": r.sha256} for r in of_split}
        listed[name] = {"size": os.path.getsize(work / name), "sha256": storage.sha256_of(work / name)}
    for name in folder.names_in(work):
        listed[name] = {"size": os.path.getsize(work / name), "sha256": storage.sha256_of(work / name)}
    per_source = np.zeros((len(spooled.sources), len(splits.SPLITS)), np.int64)
    np.add.at(per_source, (records["source"], sides), 1)
    unigram = shards.unigram_bits_per_byte(counts["train"], counts["validation"], described["validation"]["bytes"])
    return {
        "format": manifests.FORMAT, "data_hash": manifests.data_hash(listed), "settings": settings,
        "corpus": facts | {"characters": int(records["chars"].sum(dtype=np.int64)), "document_chars": cut_at},
        "vocab_size": tokenizer.vocab_size, "unigram_bits_per_byte": unigram, "splits": described,
        "sources": {name: dict(zip(splits.SPLITS, map(int, row), strict=True))
                    for name, row in zip(spooled.sources, per_source, strict=True)},
        "skipped": skipped.to_dict(), "files": listed,
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "sentencepiece", "array_record")}}


def _publish(work: pathlib.Path, directory: pathlib.Path, manifest: dict) -> None:
    """Moves the finished files into place; without a manifest, what is in the directory counts as nothing."""
    (directory / manifests.FILE_NAME).unlink(missing_ok=True)
    for pattern in ("*.array_record", "*.index.npy"):
        for old in directory.glob(pattern):
            old.unlink()
    for name in list(folder.names_in(directory)):
        (directory / name).unlink()
    for name in manifest["files"]:
        (directory / name).parent.mkdir(exist_ok=True)  # of chat templates
        os.replace(work / name, directory / name)
    storage.write_atomically(directory / manifests.FILE_NAME, json.dumps(manifest, indent=1, ensure_ascii=False)
                            .encode("utf-8", "surrogatepass"))  # paths need not be valid Unicode
