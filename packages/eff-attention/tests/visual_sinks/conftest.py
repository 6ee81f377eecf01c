"""Planted sinks, and redistribution written out row by row."""

import pytest
from eff_kernels.edit.attention import attend_explicit, decoder_attention, intercept_attention

DIM, TAU = 7, 6.0


class Plant:
    """A hook before a layer that makes hidden states of the prompt huge in one dimension.

    Attributes:
        places: For each row the places in the whole sequence.
    """

    def __init__(self, model, places, layer=2):
        self.places, self.start = places, 0
        name = decoder_attention(model)[layer].rpartition(".")[0]
        self.hook = model.get_submodule(name).register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        for row in range(len(hidden)):
            for place in self.places[row * len(self.places) // len(hidden)]:  # beams stand side by side
                if self.start <= place < self.start + hidden.shape[1] and hidden.shape[1] > 1:
                    hidden[row, place - self.start, DIM] += 2000.0
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}


@pytest.fixture
def plant():
    return Plant


@pytest.fixture
def by_rows():
    """Redistribution with given sinks [B, n] in one layer, one row of the attention matrix after the other."""

    def run(model, sinks, image, rho=0.5, p=0.6, layer=2):
        def rule(call, attend):
            if call.layer != layer:
                return attend(call)
            weights = attend_explicit(call, weights=True).weights.double()
            start = call.num_keys - call.num_queries
            for b in range(len(weights)):
                marked = [j for j in range(call.num_keys) if j < sinks.shape[1] and sinks[b, j]]
                seen = [j for j in range(call.num_keys) if j < image.shape[1] and image[b, j]]
                good = [j for j in seen if j not in marked]
                if not set(seen) & set(marked):
                    continue
                for h in range(weights.shape[1]):
                    for i in range(call.num_queries):
                        line = weights[b, h, i].clone()
                        mass, rest = line[seen].sum(), line[good].sum()
                        asks = start + i
                        if (
                            asks in seen
                            or asks <= min(set(seen) & set(marked))
                            or mass < 0.2
                            or rest < rho * mass
                            or rest == 0
                        ):
                            continue
                        budget = p * line[marked].sum()
                        weights[b, h, i, marked] = (1 - p) * line[marked]
                        weights[b, h, i, good] = line[good] + budget * line[good] / rest
            value = call.v.double().repeat_interleave(call.num_heads // call.num_kv_heads, 1)
            return (weights @ value).to(call.dtype)

        return intercept_attention(model, rule, where=decoder_attention(model))

    return run
