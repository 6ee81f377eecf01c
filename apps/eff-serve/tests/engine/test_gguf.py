"""GGUF files: blocks against the package gguf, models against transformers, and files that are damaged."""

import asyncio
import contextlib
import struct

import gguf
import numpy as np
import pytest
import torch
from eff_embedded.language import smollm2_gguf
from eff_kernels.testing import compare
from eff_serve.engine import EngineConfig, load_engine
from eff_serve.engine.decoder import Decoder
from eff_serve.engine.gguf.blocks import GROUPED, dequantized, grouped
from eff_serve.engine.gguf.container import GGUFError, GGUFFile
from eff_serve.engine.gguf.model import GGUFModel
from eff_serve.engine.gguf.tokenizer import gguf_folder
from eff_serve.engine.types import Sampling
from eff_serve.models.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MADE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
DRAWN = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def kind_of(name):
    return getattr(gguf.GGMLQuantizationType, name)


def blocks(kind, values, seed=0):
    """A matrix in blocks of a kind: quantised by the package, or drawn where it cannot."""
    if kind not in DRAWN:
        return gguf.quants.quantize(values, kind_of(kind))
    size, halves = DRAWN[kind]
    rng = np.random.default_rng(seed)
    rows, columns = values.shape
    data = rng.integers(0, 256, (rows * columns // 256, size), dtype=np.uint8)
    for at in halves:
        data[:, at : at + 2] = np.float16(rng.uniform(-1, 1, (len(data), 1)) * 4e-4).view(np.uint8)
    return data.reshape(rows, -1)


def pairs_together(rows, heads):
    """Rows as files of Llama have them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(model, family, path, kind, *, head=None, **metadata):
    """Write a transformers model, whose matrices become what the file then holds."""
    c = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim if getattr(c, "head_dim", None) else c.hidden_size // c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_types([3, 3, 3, *[1] * (c.vocab_size - 3)])
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in metadata.items():
        writer.add_string(name.replace("__", "."), value)
    seed = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        *_, part, end = name.split(".")
        if name.startswith("model.layers"):
            _, _, layer, part = name.split(".", 3)
            part, end = part.rsplit(".", 1)
            stored = f"blk.{layer}.{PARTS[part]}.{end}"
        else:
            stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[part] + ".weight"
        if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = c.num_attention_heads if "q_proj" in part else c.num_key_value_heads
            values = pairs_together(values, heads)
        if values.ndim > 1:
            seed += 1
            use = head if head and part in ("embed_tokens", "lm_head") else kind
            data = blocks(use, np.ascontiguousarray(values), seed)
            held = gguf.quants.dequantize(data, kind_of(use))
            if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                held = held.reshape(heads, -1, 2, held.shape[1]).swapaxes(1, 2).reshape(held.shape)
            parameter.data.copy_(torch.from_numpy(held.copy()))
            writer.add_tensor(stored, data, raw_dtype=kind_of(use))
        else:
            writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make(tmp_path):
    """``make(family, kind)`` gives a file, and the model of transformers that it holds."""

    def build(family, kind, *, size=64, **options):
        import transformers

        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        extra = {"attention_bias": True} if family == "llama" and options.pop("bias", False) else {}
        config = getattr(transformers, f"{name}Config")(
            vocab_size=131, hidden_size=size, intermediate_size=max(96, size), num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2,
            initializer_range=0.2, tie_word_embeddings=options.pop("tied", False),
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
            **({"head_dim": 32} if family == "qwen3" else {}), **extra,
        )  # fmt: skip
        torch.manual_seed(1)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias") or "norm" in parameter_name:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
        path = write(model, family, tmp_path / f"{family}-{kind}.gguf", kind, **options)
        return path, model.eval()

    return build


IDS = torch.tensor([5, 90, 17, 3, 3, 44, 128, 61, 7, 8])


@torch.inference_mode()
def logits_of(model, dtype):
    return model.to(dtype)(IDS[None]).logits[0]


def of_file(model):
    return Decoder(model, num_pages=4).prefill(IDS, 0, torch.tensor([2]), all_logits=True)


@pytest.mark.parametrize("kind", [*MADE, *DRAWN])
def test_blocks_are_those_of_the_package(kind):
    values = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    data = blocks(kind, values)
    truth = gguf.quants.dequantize(data, kind_of(kind))
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(5, -1)
    assert np.array_equal(dequantized(raw, kind).float().numpy(), truth)
    if kind in GROUPED:
        assert np.array_equal(grouped(raw, kind).dequantize().numpy(), truth)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tied": True}),
        ("llama", {"bias": True}),
        ("qwen2", {"tied": True}),
        ("qwen3", {}),
    ],
)
def test_models_of_floats_give_the_logits_of_transformers(make, family, options):
    path, model = make(family, "F32", **options)
    eager, truth = logits_of(model, torch.float32), logits_of(model, torch.float64)
    problem = compare(of_file(GGUFModel(path)), eager, truth, factor=4.0, name="logits")
    assert problem is None, problem


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q4_K", "Q6_K"])
def test_every_kind_gives_the_logits_of_transformers(make, kind):
    path, model = make("llama", kind, size=256 if kind in DRAWN else 64, tied=True)
    truth = logits_of(model, torch.float64)
    got = of_file(GGUFModel(path)).double()
    error = float((got - truth).norm() / truth.norm())
    # Codes that run as they are meet activations of int8; other codes become bfloat16 (eight bits).
    assert error < (0.05 if kind in GROUPED else 0.02 if kind not in ("F16", "BF16") else 1e-5), error
    if kind in GROUPED:
        decoder = Decoder(GGUFModel(path), num_pages=1)
        floats = Decoder(GGUFModel(path, keep_codes=False), num_pages=1)
        assert decoder.weight_bytes < floats.weight_bytes
        assert (decoder.layers[0].qkv(torch.eye(64)) - floats.layers[0].qkv(torch.eye(64))).abs().max() < 0.01


def test_kinds_may_differ_from_layer_to_layer(make):
    path, model = make("qwen2", "Q4_0", head="Q8_0")
    truth = logits_of(model, torch.float64)
    opened = GGUFModel(path)
    assert float((of_file(opened).double() - truth).norm() / truth.norm()) < 0.03
    assert opened.describe() == "Q4_0, Q8_0"


def test_a_file_can_be_quantised_anew(make):
    path, _ = make("llama", "Q8_0")
    floats = Decoder(GGUFModel(path, keep_codes=False), num_pages=4).layers[0].gate_up(torch.eye(64))
    for quantize, limit in (("int8", 0.01), ("int4", 0.1)):
        made = (
            Decoder(GGUFModel(path, keep_codes=False), quantize=quantize, num_pages=4).layers[0].gate_up(torch.eye(64))
        )
        assert 1e-4 < float((made - floats).norm() / floats.norm()) < limit


def test_the_embedded_file_is_served_as_it_is(smollm2_tokenizer):
    loaded = load_engine(EngineConfig(model=str(smollm2_gguf()), max_model_len=256), progress=False)
    assert loaded.name == smollm2_gguf().stem
    assert "Q4_1, Q8_0" in loaded.description
    assert loaded.quantization == "Q4_1, Q8_0"
    text = "Digits \u00bd \u00b2 12345, w\u00f6rter\n\n  and   spaces <|im_end|>"
    assert loaded.tokenizer.encode(text) == smollm2_tokenizer.encode(text)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = loaded.tokenizer.encode_chat(question)
    assert prompt == smollm2_tokenizer.encode_chat(question)
    loaded.engine.start()

    async def ask():
        stream = loaded.engine.submit(prompt, Sampling(max_tokens=20, temperature=0.0))
        return [step.token async for step in stream if step.token is not None]

    try:
        answer = loaded.tokenizer.decode(asyncio.run(asyncio.wait_for(ask(), 120)))
    finally:
        loaded.engine.stop(0)
    assert answer == "The capital of France is Paris."


def test_a_tokenizer_of_pieces(make, tmp_path):
    """As SentencePiece does it: the pair with the best score first, bytes for what no piece spells."""
    path, _ = make("llama", "F32")
    model = GGUFModel(path)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(97)), "\u2581", "a", "b", "ab", "\u2581ab", "ba"]
    pieces += [f"<0x{b:02X}>" for b in range(97, 122)]
    assert len(pieces) == 131
    scores = [0.0] * 131
    for piece, score in (("ab", -1.0), ("\u2581ab", -2.0), ("ba", -3.0), ("\u2581", -9.0), ("a", -9.0), ("b", -9.0)):
        scores[pieces.index(piece)] = score
    kinds = [2, 3, 3, *(6 if p.startswith("<0x") else 1 for p in pieces[3:])]
    model.file.metadata.update(
        {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds,
        }
    )  # fmt: skip
    model.file.header += b"pieces"
    tokenizer = Tokenizer(gguf_folder(model))
    assert [pieces[i] for i in tokenizer.encode("abba ab")] == ["\u2581ab", "ba", "\u2581ab"]
    assert [pieces[i] for i in tokenizer.encode("ab", add_special_tokens=True)] == ["<s>", "\u2581ab"]
    assert [pieces[i] for i in tokenizer.encode("a!")] == ["\u2581", "a", "<0x21>"]
    for text in ("abba ab", "a!", "ab b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gpt2"}, "family 'gpt2'"),
        ({"llama.block_count": -1}, "block_count must be a positive integer, got -1"),
        ({"llama.block_count": 1}, "belong to no layer"),
        ({"llama.block_count": 3}, "no tensor 'blk.2"),
        ({"llama.embedding_length": 32}, "must have shape"),
        ({"llama.attention.head_count": [4, 4]}, "head_count must be a positive integer"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon must be a positive number"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens in its tokenizer and 131"),
    ],
)
def test_what_does_not_fit_is_named(make, monkeypatch, change, message):
    path, _ = make("llama", "F32")
    read = GGUFFile.__init__

    def changed(self, path):
        read(self, path)
        self.metadata.update(change)

    monkeypatch.setattr(GGUFFile, "__init__", changed)
    with pytest.raises(GGUFError, match=message):
        Decoder(GGUFModel(path), num_pages=1)


def test_tokenizers_that_are_not_known_are_named(make):
    path, _ = make("llama", "F32")
    for change, message in (
        ({"tokenizer.ggml.pre": "tekken"}, "cuts text by 'tekken'"),
        ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'"),
        ({"tokenizer.ggml.merges": [7]}, "damaged"),
        ({"tokenizer.ggml.token_type": [1]}, "131 tokens and 1 kinds"),
    ):
        model = GGUFModel(path)
        model.file.metadata.update(change)
        model.file.header += repr(change).encode()
        with pytest.raises(GGUFError, match=message):
            gguf_folder(model)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_and_never_a_crash(make, tmp_path, data):
    if not hasattr(make, "bytes"):
        make.bytes = make("llama", "Q4_0")[0].read_bytes()
    whole = make.bytes
    header = len(GGUFFile(next(tmp_path.glob("llama-Q4_0.gguf"))).header)
    damaged = bytearray(whole[: data.draw(st.sampled_from([len(whole), header + 64, header, 40, 11, 3, 0]))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            at = data.draw(st.integers(0, min(len(damaged), header) - 1))
            width = data.draw(st.sampled_from([1, 8]))
            value = data.draw(st.sampled_from([0, 1, 255, 2**31, 2**63, 2**64 - 1]))
            damaged[at : at + width] = struct.pack("<Q", value % 2 ** (8 * width))[:width]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(bytes(damaged))
    with contextlib.suppress(GGUFError):
        Decoder(GGUFModel(path), num_pages=1)


def test_names_of_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_engine(EngineConfig(model=str(tmp_path / "none.gguf")), progress=False)
    (tmp_path / "text.gguf").write_text("hello, this is no model")
    with pytest.raises(GGUFError, match="does not begin with 'GGUF'"):
        load_engine(EngineConfig(model=str(tmp_path / "text.gguf")), progress=False)
