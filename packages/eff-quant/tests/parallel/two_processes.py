"""What two processes do together; run by test_two_processes.py with torchrun's environment variables.

For each format: one process alone trains adapters on a quantised Llama; both train under DDP, each on half of the rows;
both train under FSDP2. Losses agree, and what is gathered for saving is what the one process holds.
"""

import gc
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import eff_quant.hf  # noqa: F401 - registers the quantiser
import peft
import torch
import torch.distributed as dist
from eff_quant import FP4Config, FP8Config, Int8Config, W4A8Config, keep_codes_local_, load, quantize_
from eff_quant.layer import QuantizedLinear
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

# Outliers are looked for in each row by itself, so that a row's result does not depend on the others.
FORMATS = {
    "int8": Int8Config(per_token_outliers=True),
    "fp8": FP8Config(),
    "nvfp4": FP4Config(),
    "mxfp4": FP4Config(format="mxfp4"),
    "w4a8": W4A8Config(rotation="hadamard"),
}
STEPS, ROWS = 4, 4


def base(config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, initializer_range=0.15, tie_word_embeddings=False,
        )
    )  # fmt: skip
    quantize_(model, config)
    return model


def adapted(config):
    model = base(config)
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, lora)


def rows(step):
    return torch.randint(96, (ROWS, 10), generator=torch.Generator().manual_seed(step))


def train(model, share, shared):
    """Losses of some steps; ``share`` are this process' rows."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(STEPS):
        ids = rows(step % 2)[share]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if shared:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def close(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert abs(a - b) < 1e-4 * abs(b), (found, wanted)


def same_state(found, wanted):
    """Codes and scales byte for byte; adapters as far as another order of sums goes."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), name
        if "lora_" in name:
            assert (other - tensor).norm() < 1e-3 * tensor.norm(), name
        else:
            assert torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def saved_and_loaded(config, state, folder):
    """The logits of a model from a folder of the base and one of the adapter, made of the gathered tensors."""
    model = adapted(config)
    model.load_state_dict(state)
    model.save_pretrained(folder / "adapter")
    base(config).save_pretrained(folder / "base")
    again = peft.PeftModel.from_pretrained(load(folder / "base"), folder / "adapter")
    with torch.no_grad():
        return again(rows(7)).logits


def check(name, config, folder, rank):
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    alone = adapted(config)
    wanted = train(alone, slice(None), shared=False)
    assert wanted[-1] < wanted[0]
    alone_state = alone.state_dict()

    whole = adapted(config)
    names = keep_codes_local_(whole)
    held = dict(whole.named_buffers())
    assert len(names) == len(set(names)) >= 2 * 14
    assert all("base_layer" in n or "_proj" in n for n in names)
    assert not any(held[n].dtype.itemsize == 1 for n in held.keys() - set(names))
    ddp = DistributedDataParallel(whole)
    close(train(ddp, half, shared=True), wanted)
    same_state(ddp.module.state_dict(), alone_state)

    sharded = adapted(config)
    layers = sharded.get_base_model().model.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(sharded)
    assert all(isinstance(m.base_layer, QuantizedLinear) for m in layers.modules() if hasattr(m, "base_layer"))
    close(train(sharded, half, shared=True), wanted)
    local = sum(p.to_local().numel() for p in sharded.parameters())
    assert local < 0.7 * sum(p.numel() for p in alone.parameters())
    gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.no_grad():
        logits = sharded(rows(7)).logits
    if rank == 0:
        same_state(gathered, alone_state)
        found = saved_and_loaded(config, gathered, folder / name)
        assert (found - logits).norm() < 1e-4 * logits.norm()
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))  # for the other one, should this one fail
    mine = dist.get_rank()
    for kind, settings in FORMATS.items():
        check(kind, settings, Path(sys.argv[1]), mine)
    # A wrapped model is part of a cycle of references; one that outlives its group aborts the process at exit.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write("done\n")
