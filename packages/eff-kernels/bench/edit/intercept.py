"""What reading and changing attention costs: ``python packages/eff-kernels/bench/edit/intercept.py --threads 1``.

A decoder of SmolLM2-135M's sizes with random weights. Reading: one decoding step at 512 tokens, each layer's last row
summed over the first four keys. Changing: a prompt of 256 tokens, one head of each layer at half strength. Beside the
plain model stand hooks written by hand, the same thing under attn_implementation="eager", and nnsight if it is there.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from eff_kernels.edit.attention import intercept_attention, masses, observe_attention
from eff_kernels.testing.records import Provider, Recorder
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parents[1] / "results" / "intercept.jsonl"
SOURCES = Path(__file__).parents[2] / "src" / "eff_kernels" / "edit" / "attention"
CONTEXT, PROMPT, HEAD = 512, 256, 64


def smollm2(implementation):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Step:
    """One decoding step that leaves the cache as it was."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids[:, -1:]
        self.cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)

    def __call__(self, **more):
        out = self.model(self.ids, past_key_values=self.cache, **more)
        self.cache.crop(-1)
        return out


def decode(recorder, ids):
    plain, watched, asked = (Step(smollm2("sdpa"), ids) for _ in range(3))
    eager = Step(smollm2("eager"), ids)
    first = torch.zeros(1, CONTEXT)
    first[0, :4] = 1
    seen = []
    observe_attention(watched.model, lambda call, output: seen.append(call.layer))
    observe_attention(asked.model, lambda call, output: seen.append(masses(call, first)))

    def observed(step):
        def run(_):
            seen.clear()
            step()
            return list(seen)

        return run

    def by_eager(_):
        return [w[..., :4].sum(-1) for w in eager(output_attentions=True).attentions]

    want, truth = by_eager(0), eager().logits

    def untouched():
        seen.clear()
        return torch.allclose(watched().logits, truth, atol=1e-4) and len(seen) == 30

    def right():
        return all(torch.allclose(m[..., 0], w, atol=1e-5) for m, w in zip(observed(asked)(0), want, strict=True))

    providers = [
        Provider("plain model", lambda _: plain(), check=lambda: torch.allclose(plain().logits, truth, atol=1e-4)),
        Provider("eff, observer that does nothing", observed(watched), check=untouched),
        Provider("eff, mass of four keys", observed(asked), check=right),
        Provider("eager, output_attentions", by_eager, check=right),  # the same comparison
    ]
    if importlib.util.find_spec("nnsight"):
        import nnsight

        outer = nnsight.NNsight(plain.model)

        def traced(_):
            with outer.trace(plain.ids, past_key_values=plain.cache):
                outs = nnsight.save([layer.self_attn.output[0] for layer in outer.model.layers])
            plain.cache.crop(-1)
            return outs

        providers.append(Provider("nnsight, output of attention saved", traced, check=lambda: len(traced(0)) == 30))
    recorder.run(f"{CONTEXT} tokens fp32", providers, mode="decode", rounds=15)


def halve(module, args):
    return (torch.cat([args[0][..., :HEAD] * 0.5, args[0][..., HEAD:]], -1),)


def prefill(recorder, ids):
    plain, hooked, ours, weights, eager = (smollm2("eager" if i == 4 else "sdpa") for i in range(5))
    for layer in hooked.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(halve)

    def half_output(call, attend):
        out = attend(call).out
        return torch.cat([out[:, :1] * 0.5, out[:, 1:]], 1)

    intercept_attention(ours, half_output)
    intercept_attention(weights, lambda call, attend: attend.with_weights(call, lambda w, part: w * 0.5, heads=[0]))
    want = hooked(ids, logits_to_keep=1).logits

    def run(model):
        return lambda _=0: model(ids, logits_to_keep=1).logits

    def right(model):
        return lambda: torch.allclose(run(model)(), want, atol=1e-4)

    providers = [
        Provider("plain model", run(plain), check=lambda: torch.allclose(run(plain)(), run(eager)(), atol=1e-4)),
        Provider("hooks by hand, output halved", run(hooked), check=right(weights)),  # the same comparison
        Provider("eff, output halved", run(ours), check=right(ours)),
        Provider("eff, weights of one head halved", run(weights), check=right(weights)),
        Provider(
            "eager, nothing changed", run(eager), check=lambda: torch.allclose(run(plain)(), run(eager)(), atol=1e-4)
        ),
    ]
    if importlib.util.find_spec("nnsight"):
        import nnsight

        outer = nnsight.NNsight(plain)

        def traced(_=0):
            with outer.trace(ids, logits_to_keep=1):
                for layer in outer.model.layers:
                    layer.self_attn.o_proj.input[..., :HEAD] *= 0.5
                logits = nnsight.save(outer.output.logits)
            return logits  # noqa: RET504 - the block above runs elsewhere

        good = Provider("nnsight, output halved", traced, check=lambda: torch.allclose(traced(), want, atol=1e-4))
        providers.append(good)
    recorder.run(f"{PROMPT} tokens fp32", providers, mode="prefill", rounds=5)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recorder = Recorder("intercept", None if options.no_record else RESULTS, sources=(SOURCES, Path(__file__)))
    ids = torch.randint(0, 49152, (1, CONTEXT))
    decode(recorder, ids)
    prefill(recorder, ids[:, :PROMPT])
    print(recorder.table())


if __name__ == "__main__":
    main()
