"""Tiny random picture-language models of nine families, each with two prompts of unequal length with their pictures."""

import copy
import functools
import weakref

import pytest
import torch

IMAGE = 96
TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
QWEN = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 4, "out_hidden_size": 64,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0], "window_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
FAMILIES = (
    "Llava", "LlavaNext", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "InternVL", "Idefics3", "SmolVLM", "Gemma3", "PaliGemma",
)  # fmt: skip


def settings(name):
    clip = {**TOWER, "image_size": 16, "model_type": "clip_vision_model"}
    text = {**TEXT, "model_type": "llama"}
    if name == "Llava":
        return {"vision_config": clip, "text_config": text}
    if name == "LlavaNext":
        pins = [[16, 32], [32, 16], [32, 32]]
        return {"vision_config": clip, "text_config": text, "image_grid_pinpoints": pins}
    if name.startswith("Qwen"):
        drop = {"Qwen3VL": ("window_size", "fullatt_block_indexes"), "Qwen2_5_VL": (), "Qwen2VL": ("window_size",)}[
            name
        ]
        vision = {k: v for k, v in QWEN.items() if k not in drop}
        if name != "Qwen3VL":
            vision = {
                k: v for k, v in vision.items() if k not in ("num_position_embeddings", "deepstack_visual_indexes")
            }
        if name == "Qwen2VL":
            vision = {**vision, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1}
            vision.pop("fullatt_block_indexes"), vision.pop("out_hidden_size")
        marks = {"video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
        return {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": vision, **marks}
    if name == "InternVL":
        vision = {**TOWER, "patch_size": [4, 4], "image_size": [16, 16]}
        return {"vision_config": vision, "text_config": {**TEXT, "model_type": "qwen2"}}
    if name in ("Idefics3", "SmolVLM"):
        return {"vision_config": {**TOWER, "image_size": 16}, "text_config": text, "scale_factor": 2}
    if name == "Gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        text = {**TEXT, "sliding_window": 12, "layer_types": kinds, "query_pre_attn_scalar": 8}
        return {"vision_config": {**TOWER, "image_size": 16}, "text_config": text, "mm_tokens_per_image": 4}
    vision = {**TOWER, "image_size": 16, "projection_dim": 64, "model_type": "siglip_vision_model"}
    return {"vision_config": vision, "text_config": {**TEXT, "model_type": "gemma"}, "projection_dim": 64}


@functools.cache
def built(name):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(image_token_id=IMAGE, **settings(name))
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for module in model.modules():
        weight = getattr(module, "mm_input_projection_weight", None)
        if weight is not None:
            weight.data.normal_()  # zero at birth
    for parameter, tensor in model.named_parameters():
        if ("vision" in parameter or "visual" in parameter) and tensor.dim() > 1:
            tensor.data.normal_(0, 0.3)  # attention that is not flat
    return model


def picture(name):
    """Tokens of one picture as ids, with the marks around it."""
    if name == "LlavaNext":
        return [IMAGE] * (16 + 4 * 9)  # 16 x 32 pixels are two tiles of 4 x 4
    if name.startswith("Qwen"):
        return [94, *[IMAGE] * 6, 93]
    if name in ("InternVL", "Gemma3"):
        return [IMAGE] * 4
    if name in ("Idefics3", "SmolVLM"):
        return [90, 81, *[IMAGE] * 4, 90, 80, *[IMAGE] * 4, 90]  # one part and the whole
    return [IMAGE] * 16


def pixels(name, count, seed):
    g = torch.Generator().manual_seed(seed)
    if name.startswith("Qwen"):
        return {
            "pixel_values": torch.randn(24 * count, 96, generator=g),
            "image_grid_thw": torch.tensor([[1, 4, 6]] * count),
        }
    if name == "LlavaNext":
        return {
            "pixel_values": torch.randn(count, 3, 3, 16, 16, generator=g),
            "image_sizes": torch.tensor([[16, 32]] * count),
        }
    if name in ("Idefics3", "SmolVLM"):
        return {"pixel_values": torch.randn(1, 2 * count, 3, 16, 16, generator=g)}
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=g)}


def asked(name, *prompts, seed=0):
    """Arguments for prompts of pieces: the word "P" stands for a picture; shorter ones are padded on the left."""
    lines = [[t for p in pieces for t in (picture(name) if p == "P" else [p])] for pieces in prompts]
    width = max(len(line) for line in lines)
    ids = torch.tensor([[0] * (width - len(line)) + line for line in lines])
    mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines])
    count = sum(pieces.count("P") for pieces in prompts)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if count:
        inputs |= pixels(name, count, seed)
    if count and name in ("Idefics3", "SmolVLM"):  # one line of pictures for each prompt, with blank ones at its end
        counts = [2 * pieces.count("P") for pieces in prompts]
        lines = inputs["pixel_values"][0].split(counts)
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
    if name.startswith("Qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if name in ("Gemma3", "PaliGemma"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


class Zoo:
    """`Zoo(name)` gives a model to change; `ask` gives arguments, `each` those of one prompt among several."""

    image, families = IMAGE, FAMILIES
    ask = staticmethod(asked)

    def __call__(self, name):
        return copy.deepcopy(built(name))

    def each(self, name, prompts, seed=0):
        """Arguments of every prompt alone, with the pictures that it has among all."""
        pictures, first, out = pixels(name, sum(p.count("P") for p in prompts), seed), 0, []
        for pieces in prompts:
            own, count = asked(name, pieces), pieces.count("P")
            for key, value in pictures.items():
                one = 24 if name.startswith("Qwen") and key == "pixel_values" else 1
                if name in ("Idefics3", "SmolVLM"):
                    own[key] = value[:, 2 * first : 2 * (first + count)]
                else:
                    own[key] = value[one * first : one * (first + count)]
            if not count:
                own = {k: v for k, v in own.items() if k not in pictures}
            first += count
            out.append(own)
        return out


@pytest.fixture(scope="session")
def zoo():
    return Zoo()


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)


class LargestTensors(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements that an operation gives back, and how many large tensors have at once.

    Args:
        large: Elements from which on a tensor counts for ``alive``.
    """

    def __init__(self, large):
        super().__init__()
        self.large, self.largest, self.alive, self.most, self._known = large, 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self._count(x.untyped_storage())
        return out

    def _count(self, storage):
        elements, name = storage.nbytes() // 8, storage.data_ptr()
        if elements >= self.large and name not in self._known:
            self._known.add(name)
            self.alive += elements
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self._gone, name, elements)

    def _gone(self, name, elements):
        self._known.discard(name)
        self.alive -= elements


@pytest.fixture
def largest_tensors():
    return LargestTensors
