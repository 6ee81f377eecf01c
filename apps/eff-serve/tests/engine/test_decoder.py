import json
import os
from pathlib import Path

import pytest
import torch
from eff_kernels.testing import compare
from eff_serve.engine.config import DecoderConfig, UnsupportedModelError
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.weights import CheckpointError
from safetensors.torch import load_file, save_file

NAMES = (
    "llama",
    "llama-untied-biased",
    "llama-rope-llama3",
    "llama-rope-linear",
    "qwen2",
    "qwen3",
    "mistral",
)


@torch.inference_mode()
def transformers_logits(folder, ids):
    """Logits of every position in float32 and float64."""
    from transformers import AutoModelForCausalLM

    out = []
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        out.append(model(torch.tensor([ids])).logits[0])
    return out


def within(actual, eager, truth):
    # Two orders of float32 summation over 3 layers: each is within a small factor of the other's error.
    problem = compare(actual, eager.float(), truth, factor=4.0, name="logits")
    assert problem is None, problem


def ids_of(length, seed):
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(tiny_model, name):
    folder = tiny_model(name)
    decoder = Decoder(folder, num_pages=12)
    lengths = [1, 45, 70]
    steps = 4
    pages = [[7, 0, 3], [11, 2, 5], [1, 9, 4]]  # neither in order nor next to each other
    cases = [ids_of(n + steps, seed) for seed, n in enumerate(lengths)]
    truth = [transformers_logits(folder, ids) for ids in cases]
    for ids, n, table, (eager, exact) in zip(cases, lengths, pages, truth, strict=True):
        cut = n // 2
        table = torch.tensor(table)
        if cut:  # a prompt in two pieces
            within(decoder.prefill(torch.tensor(ids[:cut]), 0, table, all_logits=True), eager[:cut], exact[:cut])
        rest = decoder.prefill(torch.tensor(ids[cut:n]), cut, table, all_logits=True)
        within(rest, eager[cut:n], exact[cut:n])
        last = decoder.prefill(torch.tensor(ids[cut:n]), cut, table)
        assert last.shape == (1, 131)
        within(last, eager[n - 1 : n], exact[n - 1 : n])
    block_table = torch.tensor(pages, dtype=torch.int32)
    for step in range(steps):  # three sequences of different lengths in one batch
        tokens = torch.tensor([ids[n + step] for ids, n in zip(cases, lengths, strict=True)])
        got = decoder.decode(tokens, torch.tensor(lengths) + step, block_table)
        for row, (eager, exact), n in zip(got, truth, lengths, strict=True):
            at = slice(n + step, n + step + 1)
            within(row[None], eager[at], exact[at])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' count of resident pages")
def test_a_cache_takes_no_memory_before_it_is_written(tiny_model):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    del [torch.zeros(1 << 22) for _ in range(8)][:]  # an allocator that has memory of its own left
    before = resident()
    decoder = Decoder(tiny_model("llama"), num_pages=20_000)
    assert sum(c.nbytes for c in (*decoder.keys, *decoder.values)) > 400 << 20
    assert resident() - before < 40 << 20
    assert not decoder.keys[2][-1].any()


def test_all_names_are_tested(tiny_model):
    assert tiny_model.names == NAMES


def test_sliding_window_limits_the_length_instead_of_being_ignored(tiny_model, tmp_path):
    config = json.loads((tiny_model("mistral") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 40}))
    assert DecoderConfig.from_folder(tmp_path).max_model_len == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(tiny_model, tmp_path, change, message):
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderConfig.from_folder(tmp_path)


@pytest.fixture
def copy(tiny_model, tmp_path):
    for path in tiny_model("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shards_give_the_same_logits(copy, tiny_model):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    parts = {"a.safetensors": list(weights)[::2], "b.safetensors": list(weights)[1::2]}
    for name, keys in parts.items():
        save_file({k: weights[k] for k in keys}, copy / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens, pages = torch.tensor(ids_of(9, 0)), torch.tensor([0])
    whole = Decoder(tiny_model("llama"), num_pages=1).prefill(tokens, 0, pages)
    # the weights lie at other addresses in the mapped files, which may change the order of float32 sums
    torch.testing.assert_close(Decoder(copy, num_pages=1).prefill(tokens, 0, pages), whole, rtol=1e-4, atol=1e-4)
    (copy / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weight file b\.safetensors"):
        Decoder(copy, num_pages=1)


def test_damaged_weights_are_named(copy):
    path = copy / "model.safetensors"
    data, weights = path.read_bytes(), {k: v.clone() for k, v in load_file(path).items()}  # the file is cut below
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        Decoder(copy, num_pages=1)
    norm = "model.layers.1.input_layernorm.weight"
    save_file({k: v for k, v in weights.items() if k != norm}, path)
    with pytest.raises(CheckpointError, match=f"has no tensor {norm}"):
        Decoder(copy, num_pages=1)
    save_file({**weights, norm: torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"must have shape \[64\], got \[3\]"):
        Decoder(copy, num_pages=1)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_rows_do_not_depend_on_their_neighbours(tiny_model, threshold):
    decoder = Decoder(tiny_model("llama"), quantize="int8", threshold=threshold, num_pages=8)
    plain = Decoder(tiny_model("llama"), num_pages=8)
    prompts = [ids_of(n, n) for n in (5, 30, 12)]
    table = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for d in (decoder, plain):
        for prompt, pages in zip(prompts, table, strict=True):
            d.prefill(torch.tensor(prompt), 0, pages)
    tokens, positions = torch.tensor([9, 10, 11]), torch.tensor([len(p) for p in prompts])
    together = decoder.decode(tokens, positions, table.int())
    for i in range(3):
        alone = decoder.decode(tokens[i : i + 1], positions[i : i + 1], table[i : i + 1].int())
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    exact = plain.decode(tokens, positions, table.int())
    assert 0 < float((together - exact).norm() / exact.norm()) < 0.1


PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
)


@torch.inference_mode()
def greedy(decoder, prompts, count):
    """Greedy ids of several prompts decoded as one batch."""
    width = 1 + max(len(p) + count for p in prompts) // PAGE
    table = torch.arange(len(prompts) * width).view(len(prompts), width)
    rows = [[int(decoder.prefill(torch.tensor(p), 0, t)[0].argmax())] for p, t in zip(prompts, table, strict=True)]
    for step in range(count - 1):
        tokens = torch.tensor([r[-1] for r in rows])
        positions = torch.tensor([len(p) + step for p in prompts])
        for row, logits in zip(rows, decoder.decode(tokens, positions, table.int()), strict=True):
            row.append(int(logits.argmax()))
    return rows


@pytest.mark.slow
def test_greedy_text_of_smollm2_equals_transformers_alone_and_in_a_batch(smollm2, smollm2_tokenizer):
    from transformers import AutoModelForCausalLM

    prompts = [
        smollm2_tokenizer.encode(smollm2_tokenizer.render_chat([{"role": "user", "content": p}])) for p in PROMPTS
    ]
    count = 24
    decoder = Decoder(smollm2, num_pages=16)
    together = greedy(decoder, prompts, count)
    assert [greedy(decoder, [p], count)[0] for p in prompts] == together
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for prompt, ours in zip(prompts, together, strict=True):
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)[0, len(prompt) :].tolist()
        assert ours[: len(out)] == out
    assert smollm2_tokenizer.decode(together[0][: together[0].index(2)]) == "The capital of France is Paris."


@pytest.mark.parametrize("name", ["int8", "nvfp4", "mxfp4", "fp8"])
def test_quantised_smollm2_answers(smollm2, smollm2_tokenizer, name):
    prompt = smollm2_tokenizer.encode(smollm2_tokenizer.render_chat([{"role": "user", "content": PROMPTS[0]}]))
    (ids,) = greedy(Decoder(smollm2, quantize=name, num_pages=4), [prompt], 8)
    assert "Paris" in smollm2_tokenizer.decode(ids)
