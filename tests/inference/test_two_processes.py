"""Two processes over the loopback interface serve what one does."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np

from llm_jax.inference.generation import embed
from llm_jax.inference.lockstep import params_from_json, params_to_json
from llm_jax.inference.request import Constraint, SamplingParams
from llm_jax.inference.service import Service
from tests import peers
from tests.inference.together import CANCELLED, LATE, ask, make_engine

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(folder):
    command = [sys.executable, "-m", "tests.inference.together", str(folder)]
    return [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
            for environment in peers.environments(2)]


def test_two_processes_serve_what_one_does(tmp_path):
    processes = start(tmp_path)
    engine, tokenizer = make_engine(1)
    service = Service(engine, tokenizer)
    one, embedding = ask(service), embed(service, [[5, 6, 7]])
    service.close()
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    lead, other = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    for i, (mine, (tokens, reason, text)) in enumerate(zip(one, lead["completions"], strict=True)):
        if i in (CANCELLED, LATE):
            assert reason == ("cancelled" if i == CANCELLED else "deadline")
            count = min(len(tokens), len(mine.token_ids))
            assert tokens[:count] == list(mine.token_ids[:count])
        else:
            assert (tokens, reason, text) == (list(mine.token_ids), mine.finish_reason, mine.text), i
    np.testing.assert_allclose(lead["embedding"], embedding, atol=1e-4)
    assert "process 0 takes the requests" in other["submit"] and "takes no new weights" in lead["new weights"]
    assert all("the processes differ in the options of the service" in one["other options"] for one in (lead, other))
    # Both have taken the same steps, under pressure, and each holds half of the weights.
    assert lead["plans"] == other["plans"] != 0 and lead["steps"] == other["steps"]
    assert lead["stats"].pop("pid") != other["stats"].pop("pid") and lead["stats"] == other["stats"]
    assert all(lead["stats"][name] for name in ("preemptions", "swaps_in", "prefix_hits", "accepted", "expired"))
    assert lead["weights"] == other["weights"] == [32, 24]


def test_parameters_come_back_from_json():
    for params in (SamplingParams(), SamplingParams(
            temperature=0.1, seed=2**64 - 1, logit_bias={3: 0.1, 4: -5}, stop=("a", "é"), stop_ids=(1, 2),
            constraint=Constraint("regex", "a+"), prompt_logprobs=2, min_p=1 / 3)):
        assert params_from_json(json.loads(json.dumps(params_to_json(params)))) == params
