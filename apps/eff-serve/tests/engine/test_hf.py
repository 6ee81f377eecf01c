import pytest
import torch
from eff_serve.engine import EngineConfig, load_engine
from eff_serve.engine.hf import HFDecoder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=131, n_positions=128, n_embd=64, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_pieces_and_batches_give_the_logits_of_one_pass(gpt2):
    from transformers import AutoModelForCausalLM

    decoder = HFDecoder(gpt2, num_pages=8)
    assert (decoder.config.vocab_size, decoder.config.max_model_len) == (131, 128)
    assert decoder.config.eos_token_ids == {2}
    assert decoder.config.bytes_per_key == 2 * 4 * 2 * 64
    ids = [torch.randint(3, 131, (n,)) for n in (9, 33)]
    model = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32).eval()
    with torch.inference_mode():
        whole = [model(i[None]).logits[0] for i in ids]
    table = torch.tensor([[5, 0], [3, 1]])
    for i, pages, wanted in zip(ids, table, whole, strict=True):
        torch.testing.assert_close(decoder.prefill(i[:4], 0, pages, all_logits=True), wanted[:4])
        torch.testing.assert_close(decoder.prefill(i[4:-1], 4, pages), wanted[-2:-1])
    tokens, positions = torch.stack([i[-1] for i in ids]), torch.tensor([8, 32])
    logits = decoder.decode(tokens, positions, table.int())
    torch.testing.assert_close(logits, torch.stack([w[-1] for w in whole]))
    with pytest.raises(RuntimeError, match="goes on at token 4, but its cache holds 33"):
        decoder.prefill(ids[0], 4, table[1])


def test_the_engine_serves_it_with_transformers_greedy_text(gpt2, make_engine, ask):
    from transformers import AutoModelForCausalLM

    decoder = HFDecoder(gpt2, num_pages=5)  # fewer than three sequences need: some are preempted
    engine = make_engine(decoder, chunk=8, max_batch=3)
    model = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32).eval()
    prompts = [torch.randint(3, 131, (n,)).tolist() for n in (3, 20, 11)]
    wanted = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    for prompt, steps in zip(prompts, ask(engine, [(p, wanted) for p in prompts]), strict=True):
        output, ids = [], list(prompt)
        for _ in range(60):
            with torch.inference_mode():
                output.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            ids.append(output[-1])
        assert [s.token for s in steps] == output


def test_load_engine_falls_back_to_transformers(gpt2, smollm2, tmp_path):
    for path in gpt2.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="only through transformers, without int8: architecture GPT2LMHeadModel"):
        load_engine(EngineConfig(model=str(tmp_path), quantize="int8"), progress=False)
    loaded = load_engine(EngineConfig(model=str(tmp_path)), progress=False)
    assert isinstance(loaded.engine.decoder, HFDecoder)
    assert loaded.engine.max_model_len == 128
