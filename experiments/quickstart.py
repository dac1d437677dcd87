"""From a folder of text to a served model: prepare, train, evaluate, serve, ask.

Each stop is the script that can be run by hand, and its command line is shown before it runs. What is already done is
not done again, so the same command goes on where the last one stopped. `--gin.NAME=VALUE` goes to whichever of
experiments.prepare and experiments.train has such a setting; `--corpus=/a/folder` is short for `--gin.CORPUS`.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli, gin_reader  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

PREPARE_FILE = "gin/data/quickstart.gin"
TRAIN_FILE = "gin/runs/quickstart.gin"
PYTHON_PROMPTS = ("def main(", "import os\nimport sys\n", "class TestCase(unittest.", "    try:\n        return self.")
PROMPT_CHARACTERS = 40
LEARNT = 0.75  # of the unigram model's bits per byte, at most
READY = re.compile(r"^ready: (\S+)")
READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stops in order; 0 if all went well and, with settings as they are, the model has learnt."""
    signal.signal(signal.SIGTERM, _terminated)
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = cli.parse(arguments, shorthand=True)
    if flags.help:
        print(f"usage: make quickstart, or python -m experiments.quickstart [--corpus=PATH] [--run_dir=DIR] "
              f"[--data_dir=DIR] [--num_steps=N]\n         [--gin_file PATH]... [--gin.NAME=VALUE]... "
              f"[--print_config]\n\n{__doc__.strip()}\n\nThe settings of each stop: python -m experiments.prepare "
              f"--help, python -m experiments.train --help.\n\nexamples:\n  make quickstart\n"
              f"  python -m experiments.quickstart --corpus=~/books --num_steps=1000")
        return 0
    prepare, train, values = route(flags)
    if flags.print_config:
        for script, settings in (("prepare", prepare), ("train", train)):
            print(f"# experiments.{script}", flush=True)
            status = subprocess.run([sys.executable, "-m", f"experiments.{script}", *settings, "--print_config"],
                                    check=False).returncode
            if status:
                return status
        return 0
    return Quickstart(prepare, train, values).run()


def route(flags: cli.Flags) -> tuple[list[str], list[str], dict[str, Any]]:
    """Gives each setting to the scripts that have it.

    Returns:
      The flags for experiments.prepare, those for experiments.train, and the values of the macros of both.

    Raises:
      UserError: neither has the setting.
    """
    own = {name.upper() for name, _ in flags.own}
    given = [(name.upper(), value or "") for name, value in flags.own] + flags.settings
    given = [(name, os.path.expanduser(value) if name == "CORPUS" else value) for name, value in given]
    names = {name for name, _ in given}
    if "CORPUS" in names:  # another corpus, another run: the default's data and run stay as they are
        corpus = gin_reader.read_value(dict(given)["CORPUS"], "--corpus")
        if isinstance(corpus, str):
            stem = re.sub(r"\W+", "-", pathlib.Path(corpus).stem).strip("-") or "mine"
            given += [(name, f"'{folder}/{stem}'") for name, folder in (("DATA_DIR", "data"), ("RUN_DIR", "runs"))
                      if name not in names]
    files: dict[str, list[str]] = {"prepare": [], "train": []}
    for file in flags.files:
        is_prepare = any(s.selector.split(".")[-1] == "prepare" for s in gin_reader.read_file(file))
        files["prepare" if is_prepare else "train"].append(file)
    scripts: dict[str, list[str]] = {}
    known: set[str] = set()
    values: dict[str, Any] = {}
    for script, default in (("prepare", PREPARE_FILE), ("train", TRAIN_FILE)):
        settings = [s for file in files[script] or [default] for s in gin_reader.read_file(file)]
        macros = {s.macro_name: s.value for s in settings if s.is_macro}
        scripts[script] = [f"--gin_file={file}" for file in files[script]]
        known |= macros.keys()
        values |= macros
        for name, text in given:
            setting = gin_reader.read_flag(name, text)
            mentioned = any(s.selector.split(".")[-1] == setting.selector.split(".")[-1] for s in settings)
            if setting.is_macro and name in macros or not setting.is_macro and mentioned:
                scripts[script].append(f"--gin.{name}={text}")
                known.add(name)
                values[name] = setting.value
    for name, text in given:
        if name in own - known:
            flag_names = [f"--{n}" for n in (*cli.COMMON_FLAGS, *(k.lower() for k in known))]
            raise UserError(f"unknown flag '--{name.lower()}'{gin_reader.nearest(f'--{name}', flag_names)}")
        if name not in known:
            raise UserError(f"--gin.{name}={text}: neither experiments.prepare nor experiments.train has such a setting"
                            f"{gin_reader.nearest(name, known)}")
    for name in ("RUN_DIR", "DATA_DIR"):
        if not isinstance(values.get(name), str):
            raise UserError(f"{name} must be a string; is {values.get(name)!r}")
    return scripts["prepare"], scripts["train"], values


class Quickstart:
    """The stops, with the processes they run and the time each took.

    Args:
      prepare, train: flags for the scripts of these names.
      values: macros of both; RUN_DIR, DATA_DIR and CORPUS are used.
    """

    def __init__(self, prepare: Sequence[str], train: Sequence[str], values: dict[str, Any]):
        self.prepare_flags, self.train_flags = list(prepare), list(train)
        self.run_dir, self.data_dir = values["RUN_DIR"], values["DATA_DIR"]
        self.is_python = values.get("CORPUS", "python-stdlib") == "python-stdlib"
        self.seconds: list[tuple[str, float]] = []
        self.process: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """All stops; the exit status."""
        try:
            self._stop("prepare the text", lambda: self._call("experiments.prepare", *self.prepare_flags))
            self._stop("train", lambda: self._call("experiments.train", *self.train_flags))
            result = self._stop("evaluate on held-out text", self._evaluate)
            address = self._stop("start the server", self._start_server)
            answers = self._stop("ask it", lambda: self._ask(address))
            self._stop("stop the server", self._stop_server)
        except KeyboardInterrupt:
            self._end_process(patience_s=10)  # Ctrl-C reached the script too; a second signal would cut it short
            raise
        except BaseException:
            self._end_process()
            raise
        for prompt, answer in answers:
            _show(prompt, answer)
        return self._conclude(result, answers[0][0])

    def _stop(self, name: str, action: Callable[[], Any]) -> Any:
        print(f"\n== {len(self.seconds) + 1}. {name}", flush=True)
        start = time.perf_counter()
        result = action()
        self.seconds.append((name, time.perf_counter() - start))
        return result

    def _start(self, module: str, *flags: str, **options: Any) -> subprocess.Popen[str]:
        print(f"$ python -m {module} {' '.join(map(shlex.quote, flags))}".rstrip(), flush=True)
        path = os.pathsep.join(filter(None, [str(gin_reader.ROOT), os.environ.get("PYTHONPATH")]))
        # Huge pages for large arrays: a fifth more training speed on a CPU (docs/training.md). Read by glibc alone.
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ | {"PYTHONPATH": path}
        return subprocess.Popen([sys.executable, "-m", module, *flags], text=True, encoding="utf-8", env=environment,
                                **options)

    def _call(self, module: str, *flags: str, **options: Any) -> str:
        """Runs a script to its end and returns what it printed if that is captured; its failure is ours."""
        self.process = self._start(module, *flags, **options)
        output, _ = self.process.communicate()
        status, self.process = self.process.returncode, None
        if status:
            raise UserError(f"{module} ended with status {status}; the same command goes on from here")
        return output or ""

    def _evaluate(self) -> dict[str, float]:
        """What experiments.evaluate says of the run, kept beside it for as long as it is the same run."""
        from llm_jax import runs, storage
        run_dir = storage.located(self.run_dir)
        kept = run_dir / runs.LOGS / "evaluation.json"
        run = json.loads((run_dir / runs.MANIFEST).read_text())
        of = {name: run.get(name) for name in ("finished_steps", "data_hash", "metrics")}
        try:
            found = json.loads(kept.read_text())
        except (OSError, ValueError):
            found = {}
        if found.get("of") == of:
            print(f"kept from last time in {kept}: the run has not changed\n{json.dumps(found['result'])}", flush=True)
            return found["result"]
        output = self._call("experiments.evaluate", f"--run_dir={self.run_dir}", stdout=subprocess.PIPE)
        print(output, end="", flush=True)
        result = json.loads(output.strip().splitlines()[-1])
        try:
            storage.write_atomically(kept, json.dumps({"of": of, "result": result}).encode())
        except OSError:
            pass  # a run directory that has become read-only costs time, not correctness
        return result

    def _start_server(self) -> str:
        self.process = self._start("experiments.serve", f"--run_dir={self.run_dir}", "--port=0", stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        watchdog = _Watchdog(self.process, READY_TIMEOUT_S)
        for line in self.process.stdout:
            print(line, end="", flush=True)
            if ready := READY.match(line):
                watchdog.cancel()
                return ready[1]
        raise UserError(f"the server ended with status {self.process.wait()} before it was ready")

    def _ask(self, address: str) -> list[tuple[str, dict[str, Any]]]:
        prompts = self._prompts()
        requests = [(prompt, 0.0 if i % 2 == 0 else 0.8) for i, prompt in enumerate(prompts)]
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            clients = [self._start("serving.client", f"--address={address}", f"--prompt={prompt}", "--max_tokens=48",
                                   f"--temperature={temperature}", "--seed=0", "--json", stdout=subprocess.PIPE)
                       for prompt, temperature in requests]
            outputs = list(pool.map(lambda client: client.communicate(timeout=STOP_TIMEOUT_S)[0], clients))
        failed = [client.returncode for client in clients if client.returncode]
        if failed:
            raise UserError(f"{len(failed)} of {len(clients)} requests failed")
        return [(prompt, json.loads(output)) for (prompt, _), output in zip(requests, outputs, strict=True)]

    def _prompts(self) -> Sequence[str]:
        return PYTHON_PROMPTS if self.is_python else _held_out_beginnings(self.data_dir, len(PYTHON_PROMPTS))

    def _stop_server(self) -> None:
        server, self.process = self.process, None
        assert server is not None and server.stdout is not None
        print(f"$ kill -TERM {server.pid}", flush=True)
        server.terminate()
        watchdog = _Watchdog(server, STOP_TIMEOUT_S)
        for line in server.stdout:
            print(line, end="", flush=True)
        status = server.wait()
        watchdog.cancel()
        if status:
            raise UserError(f"the server ended with status {status} instead of 0")

    def _end_process(self, patience_s: float = 0) -> None:
        """Lets the script that runs end by itself, then asks it to save and end, then makes it."""
        for seconds, act in ((patience_s, subprocess.Popen.terminate), (STOP_TIMEOUT_S, subprocess.Popen.kill)):
            if self.process is not None and self.process.poll() is None:
                try:
                    self.process.wait(seconds)
                except subprocess.TimeoutExpired:
                    act(self.process)

    def _conclude(self, result: dict[str, float], prompt: str) -> int:
        print("\n== time")
        for name, seconds in (*self.seconds, ("together", sum(seconds for _, seconds in self.seconds))):
            print(f"  {name:<28} {seconds:7.1f} s")
        model, unigram = result["bits_per_byte"], result["unigram_bits_per_byte"]
        has_learnt = model <= LEARNT * unigram
        print(f"\n== has it learnt?\n  held-out bits per byte   {model:.3f}\n  a unigram token model's  {unigram:.3f}\n"
              f"  ratio                    {model / unigram:.3f} (at most {LEARNT}: {'yes' if has_learnt else 'NO'})")
        run_dir, prompt = shlex.quote(self.run_dir), shlex.quote(prompt.splitlines()[0])
        print(f"\n== next\n"
              f"  python -m experiments.serve --run_dir={run_dir} --port=9000\n"
              f"  python -m serving.client --address=127.0.0.1:9000 --prompt={prompt} --temperature=0.8\n"
              f"  python -m experiments.generate --run_dir={run_dir} --prompt={prompt} --max_tokens=64\n"
              f"  python -m experiments.train --num_steps=2000 --run_dir=runs/longer  # --help: all settings\n"
              f"  make quickstart CORPUS=/a/folder/of/text  # your own text, in runs/text")
        if has_learnt:
            return 0
        if self.prepare_flags or self.train_flags:
            print("\nNot yet: another corpus, or fewer steps, may need --num_steps=N for a larger N (and another "
                  "--run_dir), or more text.")
            return 0
        print(f"error: {model:.3f} bits per byte is more than {LEARNT} × {unigram:.3f}", file=sys.stderr)
        return 1


class _Watchdog:
    """Kills a process that takes longer than it may."""

    def __init__(self, process: subprocess.Popen[str], seconds: float):
        import threading
        self._timer = threading.Timer(seconds, process.kill)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()


def _held_out_beginnings(data_dir: str, number: int) -> list[str]:
    """How the first held-out documents begin, as prompts."""
    from llm_jax.data.documents import read_documents
    from llm_jax.data.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(data_dir)
    prompts = []
    for _, tokens in read_documents(data_dir, "validation"):
        text = tokenizer.decode(tokens[:PROMPT_CHARACTERS].tolist())[:PROMPT_CHARACTERS].rstrip()
        if text:
            prompts.append(text)
        if len(prompts) == number:
            break
    return (prompts * number)[:number]


def _show(prompt: str, answer: dict[str, Any]) -> None:
    print(f"\n-- prompt {prompt!r}: first token after {answer['time_to_first_token_s'] * 1000:.0f} ms, "
          f"{answer['tokens_per_second']:.1f} tokens/s, {answer['completion_tokens']} tokens "
          f"({answer['finish_reason']})")
    print(prompt + answer["text"], flush=True)


def _terminated(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(cli.run(main))
