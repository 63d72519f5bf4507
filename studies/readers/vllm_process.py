"""Runs in vLLM's environment: reads what is asked, writes the greedy tokens of each adapter."""

import json
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main(asked: str, answer: str) -> None:
    import vllm
    from vllm.lora.request import LoRARequest

    with open(asked) as file:
        wanted = json.load(file)
    engine = vllm.LLM(
        wanted["model"], dtype="float32", enable_lora=True, max_lora_rank=16, max_model_len=256, enforce_eager=True,
        max_loras=1,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=wanted["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in wanted["prompts"]]
    found = {"version": vllm.__version__}
    for number, (name, path) in enumerate([("base", None), *wanted["adapters"].items()]):
        request = None if path is None else LoRARequest(name, number, path)
        try:
            outputs = engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        except Exception as error:  # what it refuses is a result
            found[name] = str(error).split("\n")[0][:120]
            continue
        found[name] = [list(output.outputs[0].token_ids) for output in outputs]
    with open(answer, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
