"""Contenders 3 and 4: transformers' `generate` on padded batches, and its continuous batching; on the same weights.

    python -m benchmarks.serve_trace.huggingface --hf_dir=runs/mine/huggingface --threads=2

Its settings are the fastest of a few that were tried on a CPU: attention by `sdpa` (eager was far slower in continuous
batching); a dynamic cache for `generate` (a static one is allocated anew for every batch, and was slower at 32);
for continuous batching see `CONTINUOUS`. Nothing is compiled by torch: shapes change with every step.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from benchmarks.serve_trace.workers import answer

# Its default of tokens a batch, meant for a GPU, multiplies masks of thousands of tokens by all pages: 3 × slower.
CONTINUOUS = {"max_batch_tokens": 256, "max_requests_per_batch": 32, "page_size": 256, "allow_block_sharing": False}
MAX_CONTEXT = 1024


class Contender:
    """One model; `generate` and `continuous` replay requests (dictionaries with "at", "tokens" and "output")."""

    def __init__(self, hf_dir: str, settings: dict[str, Any]):
        self.model = LlamaForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None  # nothing ends before its length
        self.model.generation_config.pad_token_id = 0
        self._settings = settings
        self._manager: Any = None

    @torch.inference_mode()
    def generate(self, requests: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
        """Batches of so many in the order of arrival, each as long as its longest; returns the fields of `Served`."""
        served = []
        began = time.perf_counter()
        for start in range(0, len(requests), batch):
            group = requests[start:start + batch]
            time.sleep(max(max(r["at"] for r in group) - (time.perf_counter() - began), 0))
            width, longest = max(len(r["tokens"]) for r in group), max(r["output"] for r in group)
            ids = torch.zeros((len(group), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(group):
                ids[row, width - len(request["tokens"]):] = torch.tensor(request["tokens"])
                mask[row, width - len(request["tokens"]):] = 1
            out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False,
                                      use_cache=True)
            if out.shape[1] != width + longest:
                raise RuntimeError(f"generate made {out.shape[1] - width} tokens instead of {longest}")
            now = time.perf_counter() - began
            served += [{"at": r["at"], "first": None, "last": now, "output": r["output"]} for r in group]
        return served

    @torch.inference_mode()
    def continuous(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All requests through one manager, which was started before; returns the fields of `Served`."""
        manager = self._started()
        began, ids = time.perf_counter(), {}
        for request in requests:
            time.sleep(max(request["at"] - (time.perf_counter() - began), 0))
            name = manager.add_request(request["tokens"], max_new_tokens=request["output"], record_timestamps=True)
            ids[name] = request
        served = []
        while len(served) < len(requests):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("the manager's thread ended")
            if result is None or not result.is_finished():
                continue
            request = ids[result.request_id]
            if result.error or len(result.generated_tokens) != request["output"]:
                raise RuntimeError(f"{len(result.generated_tokens)} tokens instead of {request['output']}: "
                                   f"{result.error}")
            served.append({"at": request["at"], "first": result.timestamps[0] - began,
                           "last": result.timestamps[-1] - began, "output": request["output"]})
        return served

    def _started(self) -> Any:
        if self._manager is None:
            blocks = self._settings["max_requests_per_batch"] * MAX_CONTEXT // self._settings["page_size"]
            self._manager = self.model.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=MAX_CONTEXT),
                ContinuousBatchingConfig(num_blocks=blocks, **self._settings))
            self._manager.start()
        return self._manager


def main() -> None:
    """Answers commands until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf_dir", required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contender = Contender(arguments.hf_dir, CONTINUOUS)
    answer({"generate": contender.generate, "continuous": contender.continuous})


if __name__ == "__main__":
    main()
