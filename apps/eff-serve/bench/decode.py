"""Prefill of 512 tokens, and decoding at batch 1, 4 and 16 with 64 and 512 tokens of context, next to installed peers.

Run it as ``nox -s bench -- serve decode``. All providers take turns in one process on the embedded model; the table
gives the median microseconds of one call (one step of the whole batch) and the speed relative to transformers bf16.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import eff_kernels
import torch
from _peers import Eff, OnnxRuntime, Transformers, installed_peers
from eff_embedded.language import smollm2_folder, smollm2_gguf
from eff_kernels.testing import Provider, Recorder, same
from eff_serve.engine.gguf.model import GGUFModel
from eff_serve.models.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
EXACT = "transformers fp32"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--no-prefill", action="store_true", help="only decode")
    parser.add_argument("--engines", nargs="+", help="only these, transformers fp32 aside")
    parser.add_argument("--onnx", type=Path, help="folder of onnxruntime_genai's model builder, with int4 weights")
    parser.add_argument("--no-record", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = smollm2_folder()
    sources = (Path(__file__).parents[1] / "src", Path(eff_kernels.__file__).parent)
    recorder = Recorder("decode", None if arguments.no_record else RESULTS, sources=sources)
    makers = {
        "transformers bf16": lambda: Transformers(folder, torch.bfloat16),
        EXACT: lambda: Transformers(folder, torch.float32),
        "eff bf16": lambda: Eff(folder, None),
        "eff int8": lambda: Eff(folder, "int8"),
        "eff int4": lambda: Eff(GGUFModel(smollm2_gguf()), None),
        "eff fp8": lambda: Eff(folder, "fp8"),
        "eff mxfp4": lambda: Eff(folder, "mxfp4"),
        "eff nvfp4": lambda: Eff(folder, "nvfp4"),
    }
    makers |= installed_peers(arguments.onnx)
    wanted = arguments.engines or list(makers)
    if unknown := set(wanted) - set(makers):
        parser.error(f"--engines {', '.join(sorted(unknown))}: there are {', '.join(makers)}")
    engines = {name: make() for name, make in makers.items() if name in {*wanted, EXACT}}
    text = "\n".join(topics.values())  # Python's own reference manual
    manual = torch.tensor(Tokenizer(folder).encode(text[:100_000]))

    def ids(batch, length):
        return manual[: batch * length].view(batch, length)

    prompt = ids(1, 512)
    runs = {name: (lambda _, e=engine: e.prefill(prompt)) for name, engine in engines.items()}
    if not arguments.no_prefill:
        compare(recorder, "512 tokens", "prefill", runs, arguments.rounds)
    for context in arguments.contexts:
        for batch in arguments.batches:
            block = ids(batch, context + 1)
            tokens, history = block[:, -1], block[:, :-1]
            # ONNX Runtime GenAI takes tokens of its own choice alone where there are several sequences.
            able = {n: e for n, e in engines.items() if batch == 1 or not isinstance(e, OnnxRuntime)}
            steps = {name: engine.prepare(history) for name, engine in able.items()}
            runs = {name: (lambda _, s=step, t=tokens: s(t)) for name, step in steps.items()}
            compare(recorder, f"batch {batch}, context {context}", "decode", runs, arguments.rounds)
    print(recorder.table("transformers bf16" if "transformers bf16" in engines else EXACT))


def compare(recorder, spec, mode, runs, rounds):
    providers = [Provider(name, run, check=check_of(name, runs)) for name, run in runs.items()]
    recorder.run(spec, providers, mode=mode, rounds=rounds)


def check_of(name, runs):
    """What compares an engine's logits with float32's, and those with another engine's; None where there is nothing.

    A wrong mask or position moves logits by half. OpenVINO gives no logits, and so no record of it enters a table
    as compared.
    """
    others = [other for other in runs if other not in (name, EXACT) and not gives_no_logits(other)]
    if gives_no_logits(name) or (name == EXACT and not others):
        return None
    truth = EXACT if name != EXACT else "eff bf16" if "eff bf16" in others else others[0]
    return lambda: same(runs[name](0), runs[truth](0), tolerance=max(limit_of(name), limit_of(truth)))


def gives_no_logits(name):
    return name.startswith("OpenVINO")


def limit_of(name):
    """How far logits may be from float32's.

    On this text bfloat16 moves them by 1 to 3 %, int8 by 5 to 15 %, FP4 by up to a third (see the quality tables of
    eff-quant), llama.cpp's 8-bit activations by 4 to 10 %.
    """
    return 0.05 if "bf16" in name or name == EXACT else 0.4 if "fp4" in name else 0.25


if __name__ == "__main__":
    main()
