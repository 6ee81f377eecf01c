"""The engines that the decode benchmark sets side by side, each with ``prefill(ids)`` and ``prepare(ids) -> step``.

``prepare`` fills the cache with a batch of contexts [B, T]; ``step(tokens)`` decodes one token of each sequence.
Engines whose caches can be cut back do so after each step; the others grow by a token a step, which is little beside T.
"""

import ctypes
import importlib.util
import json

import torch
from eff_embedded.language import smollm2_gguf
from eff_serve.engine.decoder import PAGE, Decoder

MOST_SEQUENCES, MOST_TOKENS = 16, 640


class Eff:
    """The lean decoder, each sequence with its own pages."""

    def __init__(self, folder, quantize):
        width = MOST_TOKENS // PAGE
        self.decoder = Decoder(folder, quantize=quantize, num_pages=MOST_SEQUENCES * width)
        self.table = torch.arange(MOST_SEQUENCES * width).view(MOST_SEQUENCES, width)

    def prefill(self, ids):
        return self.decoder.prefill(ids[0], 0, self.table[0])

    def prepare(self, ids):
        for row, pages in zip(ids, self.table, strict=False):
            self.decoder.prefill(row, 0, pages)
        batch, length = ids.shape
        table = self.table[:batch].to(torch.int32)
        return lambda tokens: self.decoder.decode(tokens, torch.full((batch,), length), table)


class Transformers:
    """The model's forward pass with a dynamic cache."""

    def __init__(self, folder, dtype):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def prefill(self, ids):
        return self.model(ids, use_cache=True, logits_to_keep=1).logits[0].float()

    def prepare(self, ids):
        with torch.inference_mode():
            cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values

        @torch.inference_mode()
        def step(tokens):
            logits = self.model(tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()
            cache.crop(-1)
            return logits

        return step


class LlamaCpp:
    """llama.cpp on the GGUF file that the embedded model comes from (4-bit weights), through its batch functions."""

    def __init__(self):
        import llama_cpp

        self.api = api = llama_cpp
        self.holder = api.Llama(str(smollm2_gguf()), n_ctx=64, verbose=False)  # owns the weights
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = MOST_SEQUENCES * MOST_TOKENS, MOST_SEQUENCES
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = api.llama_init_from_model(self.holder.model, settings)
        self.memory = api.llama_get_memory(self.context)
        self.batch = api.llama_batch_init(512, 0, 1)

    def run(self, entries):
        """Decode ``(token, position, sequence)`` entries; logits are computed for the last of each sequence."""
        self.batch.n_tokens = len(entries)
        last = {sequence: i for i, (_, _, sequence) in enumerate(entries)}
        for i, (token, position, sequence) in enumerate(entries):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = last[sequence] == i
        if status := self.api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode failed with status {status}")

    def prefill(self, ids):
        self.api.llama_memory_clear(self.memory, True)
        self.run([(token, i, 0) for i, token in enumerate(ids[0].tolist())])
        return self.logits(1)

    def prepare(self, ids):
        batch, length = ids.shape
        self.api.llama_memory_clear(self.memory, True)
        for sequence, row in enumerate(ids.tolist()):
            self.run([(token, i, sequence) for i, token in enumerate(row)])

        def step(tokens):
            self.run([(token, length, sequence) for sequence, token in enumerate(tokens.tolist())])
            logits = self.logits(batch)
            for sequence in range(batch):
                self.api.llama_memory_seq_rm(self.memory, sequence, length, -1)
            return logits

        return step

    def logits(self, rows):
        """Logits [rows, vocab] of the entries that asked for them; reading them also waits for the computation."""
        vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.holder.model))
        pointer = self.api.llama_get_logits(self.context)
        flat = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (rows * vocab))).contents
        return torch.frombuffer(flat, dtype=torch.float32).view(rows, vocab).clone()


class OpenVino:
    """OpenVINO GenAI's continuous batching on the same GGUF file; it samples by itself and gives no logits."""

    def __init__(self):
        import openvino_genai

        self.api = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.cache_size, scheduler.enable_prefix_caching = 512, 1, False
        self.pipe = openvino_genai.ContinuousBatchingPipeline(
            str(smollm2_gguf()), scheduler, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
        self.handles, self.count = [], 0

    def add(self, row, tokens):
        import openvino

        config = self.api.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        self.count += 1
        prompt = openvino.Tensor(row[None].numpy())
        self.handles.append(self.pipe.add_request(self.count, prompt, config))

    def prefill(self, ids):
        self.clear()
        self.add(ids[0], 1)
        self.finish()

    def prepare(self, ids):
        self.clear()
        for row in ids:
            self.add(row, MOST_TOKENS)
        for _ in range(-(-ids.numel() // 512) + 1):  # every context is read, and its first token sampled
            self.pipe.step()
        return lambda _: self.pipe.step()

    def clear(self):
        """End the batch before."""
        for handle in self.handles:
            handle.stop()
        self.finish()

    def finish(self):
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
        self.handles = []


class OnnxRuntime:
    """ONNX Runtime GenAI on a folder that its model builder made (``python -m onnxruntime_genai.models.builder``)."""

    def __init__(self, folder):
        import onnxruntime_genai

        self.api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        threads = json.dumps({"intra_op_num_threads": torch.get_num_threads()})
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {threads}}}}}}}')
        self.model = onnxruntime_genai.Model(config)

    def read(self, ids):
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=MOST_TOKENS, batch_size=ids.size(0), do_sample=False)
        generator = self.api.Generator(self.model, params)
        generator.append_tokens(ids.to(torch.int32).numpy())
        return generator

    def prefill(self, ids):
        return self.logits(self.read(ids))

    def prepare(self, ids):
        generator, room = None, 0

        def step(tokens):
            nonlocal generator, room
            if not room:  # there is room for so many tokens; to read again every hundred is nothing to a median
                generator, room = self.read(ids), min(100, MOST_TOKENS - ids.size(1))
            room -= 1
            generator.append_tokens(tokens[:, None].to(torch.int32).numpy())
            return self.logits(generator)

        return step

    @staticmethod
    def logits(generator):
        return torch.from_numpy(generator.get_logits())[:, -1].float()


def installed_peers(onnx_folder=None):
    """What makes those of the peers that are installed; says of the others that they are left out."""
    peers = {}
    if onnx_folder:
        peers["ONNX Runtime GenAI int4"] = lambda: OnnxRuntime(onnx_folder)
    else:
        print("ONNX Runtime GenAI: left out, --onnx names no folder that its model builder made")
    for module, name, make in (
        ("llama_cpp", "llama.cpp Q4_1", LlamaCpp),
        ("openvino_genai", "OpenVINO GenAI Q4_1", OpenVino),
    ):
        if importlib.util.find_spec(module):
            peers[name] = make
        else:
            print(f"{name}: left out, the module {module} is not installed")
    return peers
